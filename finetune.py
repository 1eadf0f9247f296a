"""Transfer (Sec. 5): what a pretrained encoder is worth on labelled clouds. Needs no data set.

    python finetune.py                                   # after train_student.py: classification
    python finetune.py --protocol linear                 # frozen encoder; --checkpoint none
    python finetune.py --task fewshot --way 5 --shot 10  # ten episodes, mean and deviation
    python finetune.py --task svm                        # a linear SVM on frozen features
    python finetune.py --task parts                      # part segmentation; --task scene: rooms
    python finetune.py --data ScanObjectNN --checkpoint student.pth --size base     # as published
    python finetune.py --data ModelNet40 --vote 10 --size base
    python finetune.py --predict my_scans --checkpoint runs/classify/last.pt  # label own clouds
    torchrun --nproc_per_node=8 finetune.py --data ModelNet40 --size base     # the same on 8 GPUs

--data is `synthetic` or a folder, recognised by the files in it; .h5 files need h5py:

    ScanObjectNN  main_split/*.h5, main_split_nobg/*.h5; hkust-vgd.github.io/scanobjectnn, h5_files
    ModelNet40    modelnet40_{train,test,shape_names}.txt, <class>/*.txt; PointNet++'s
                  modelnet40_normal_resampled.zip, or modelnet40_{train,test}_8192pts_fps.dat made
                  of it, or <class>/{train,test}/*.off of modelnet.cs.princeton.edu
    few-shot      5way_10shot/0.pkl ...; Point-BERT's episodes of ModelNet40; --task fewshot
    ShapeNetPart  synsetoffset2category.txt, train_test_split/, <synset>/*.txt; PointNet++'s
                  shapenetcore_partanno_segmentation_benchmark_v0_normal.zip; --task parts
    S3DIS         Area_1_office_1.npy ..., x y z r g b label; Stanford3dDataset_v1.2_Aligned_Version
                  through PointNet's collect_indoor3d_data.py; --task scene
    .h5 pair      *train*.h5, *test*.h5 with data (n, P, 3) and label (n,)
    own clouds    <class>/*.ply ... (.npy .npz .off .obj .xyz .txt .pts); folders train and test
                  above or below the classes, else a fifth is the test set
    own labels    train/*, test/* (.npy .txt), x y z ... label, classes.txt: names; --task parts, or
                  scene: in metres, z up

Leaves last.pt, metrics.jsonl, config.json, loss.svg, of parts and scenes a picture and its legend
labels.csv, in --out (default: runs/<task>); --predict its results in runs/predict.
"""

import csv
import glob
import math
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import act
import clouds
import training
from training import RANK, WORLD, flag

# -- config ----------------------------------------------------------------------------------------
EPOCHS = dict(  # tiny, whose BatchNorm needs some 60 steps or more; small; base: as published
    classify=(8, 50, 300), fewshot=(60, 50, 150), svm=(1, 1, 1), parts=(3, 30, 300),
    scene=(6, 10, 60))
QUERIES, FOLDS = 20, 10  # test clouds per class of a few-shot episode; episodes
AUGMENTATIONS = ("auto", "rotate", "scale_translate", "none")

@dataclass
class Config(training.RunConfig):
    out: str = flag("", "folder of the results (default: runs/<task>, runs/predict)")
    task: str = flag("classify", "what is learnt", choices=tuple(EPOCHS))
    protocol: str = flag("full", "what is trained: all, or a head on a frozen encoder", "all three",
                         choices=("full", "mlp3", "linear"))
    checkpoint: str = flag("runs/student/last.pt", "a student; none: from scratch")
    augment: str = flag("auto", "auto: as published for the data set", choices=AUGMENTATIONS)
    weight_decay: float = flag(0.05, "AdamW's weight decay", 0.05)
    clip: float = flag(10.0, "largest norm of the gradient", 10)
    vote: int = flag(0, "classify: also the mean logits of so many augmented samples", 10)
    way: int = flag(5, "classes of an episode", "5, 10")
    shot: int = flag(10, "training clouds per class of an episode", "10, 20")
    fold: str = flag("all", f"the episode, 0 to {FOLDS - 1}, or all", "all")
    predict: list = flag((), "label these clouds or folders with --checkpoint", kind=str)
    category: str = flag("", "what --predict finds the parts of (default: the folder's name)")
    features: str = flag("", "with --predict or --task svm: an .npz for features (n, 2 C)")

    def __post_init__(self):
        self.out = self.out or f"runs/{'predict' if self.predict else self.task}"
        if self.fold not in ("all", *map(str, range(FOLDS))) or self.way < 2 or self.shot < 1:
            raise ValueError(f"expected --fold all or 0 to {FOLDS - 1}, --way from 2, --shot from "
                             f"1, got {self.fold}, {self.way}, {self.shot}")
        if self.protocol != "full" and self.task not in ("classify", "fewshot"):
            raise ValueError(f"--protocol: expected full for {self.task}, got {self.protocol}")
        if self.features and not self.predict and self.task != "svm":
            raise ValueError("--features: expected --predict or --task svm beside it, got neither")

def defaults(config, source):
    """size -> values of the flags that are not given."""
    dense, table = config.task in ("parts", "scene"), {}
    lr = 2e-4 if dense else 5e-4 if config.protocol == "full" else 1e-3
    for size, epochs in zip(training.SIZES, EPOCHS[config.task]):
        points = 2048 if dense and size != "tiny" else 1024
        if config.task == "svm" and source:
            points = source.config.points
        batch_size = 16 if config.task == "parts" else 32
        table[size] = dict(epochs=epochs, batch_size=batch_size, lr=lr, points=points)
    return table

# -- data ------------------------------------------------------------------------------------------
def draw_episode(data, way, shot, fold):
    """The data set of an episode, the same whatever --seed is: `way` classes, of each `shot`
    support clouds and up to QUERIES query clouds."""
    rng, splits, names = np.random.default_rng([way, shot, fold]), [], data.train.classes
    support, query = data.train.labels, data.test.labels
    enough = [c for c in range(len(names)) if (support == c).sum() >= shot and (query == c).any()]
    if len(enough) < way:
        raise ValueError(f"--way {way} --shot {shot}: expected {way} classes with {shot} training "
                         f"clouds and a test cloud, got {len(enough)}")
    chosen = rng.permutation(enough)[:way]
    for split, count in ((data.train, shot), (data.test, QUERIES)):
        drawn = [rng.permutation(np.flatnonzero(split.labels == c))[:count] for c in chosen]
        labels = torch.arange(way).repeat_interleave(torch.tensor([*map(len, drawn)]))
        split = split.select(np.concatenate(drawn))
        splits.append(replace(split, labels=labels, classes=[names[c] for c in chosen]))
    return data._replace(train=splits[0], test=splits[1])

def subsample(split, num_points, device):
    """Each cloud's farthest points in the order found, 75/64 of num_points or all there are:
    training samples 1024 of 1200 or 2048 of 2400 (Sec. 5), evaluation takes the first num_points.
    A cloud of no more than num_points stays as it is."""
    kept = []
    for rows in torch.arange(len(split)).split(64):
        sizes = split.offsets.diff()[rows]
        position = torch.arange(int(sizes.max()))
        index = split.offsets[rows][:, None] + position % sizes[:, None]  # (64, N)
        order = position.expand_as(index)
        if len(position) > num_points:
            count = min(num_points * 75 // 64, len(position))
            order = act.farthest_point_sample(split.points[index].to(device), count).cpu()
        for own, chosen, size in zip(index, order, sizes.tolist()):
            kept.append(own[chosen[:size]] if size > num_points else own[:size])
    offsets = torch.tensor([0, *map(len, kept)]).cumsum(0)
    split = replace(split, points=split.points[torch.cat(kept)], offsets=offsets, parts=None)
    return split.to(device)

def evaluation_batches(split, num_points):
    """(indices, xyz) for clouds of equal size: their first num_points, or all if there are fewer.
    Nothing is repeated, so that features are those of `clouds.read_cloud`."""
    sizes = split.offsets.diff().clamp(max=num_points)
    for size in sizes.unique().tolist():
        for indices in (sizes == size).nonzero()[:, 0].split(64):
            position = torch.arange(size, device=indices.device)
            xyz = split.points[split.offsets[indices][:, None] + position]  # (B, size, 3)
            yield indices, clouds.unit_sphere(xyz) if split.normalized else xyz

def augment(xyz, config, generator):
    """The augmentation of (B, N, 3); rooms turn about z, parts and rooms keep their proportions."""
    if config.augment == "none":
        return xyz
    if config.augment == "rotate":
        turn = 1 if config.task == "scene" else 0  # z up -> y up, and back
        return clouds.rotate_y(xyz.roll(-turn, 2), generator).roll(turn, 2)
    kept = config.task in ("parts", "scene")
    return clouds.scale_translate(xyz, generator, *((0.8, 1.25), 0.1, False) if kept else ())

def sample_block(room, num_points, rng):
    """A 1 m x 1 m block centred in x and y on a random point of a room that is sorted along x:
    xyz (num_points, 3), labels. It holds more than num_points / 2 points (1024 of 2048, Sec. 5),
    of which some are repeated if it holds fewer than num_points."""
    for _ in range(200):
        center = room.xyz[rng.integers(len(room.xyz)), :2]
        near = slice(*np.searchsorted(room.xyz[:, 0], [center[0] - 0.5, center[0] + 0.5]))
        inside = near.start + np.flatnonzero(abs(room.xyz[near, 1] - center[1]) <= 0.5)
        if len(inside) > num_points // 2:
            chosen = rng.choice(inside, num_points, len(inside) < num_points)
            return room.xyz[chosen] - np.append(center, 0).astype(np.float32), room.labels[chosen]
    raise ValueError(f"{room.name}: expected blocks of 1 m x 1 m (are these metres?) of more than "
                     f"{num_points // 2} points, got none in 200; lower --points")

def room_blocks(xyz):
    """Blocks of 1 m x 1 m over a room, 0.5 m apart: a list of (indices of points, origin (3,))."""
    low, high = xyz[:, :2].min(0).astype(np.float64), xyz[:, :2].max(0).astype(np.float64)
    centers, blocks = [], []
    for a, b in zip(low, np.maximum(low, high - 1)):  # the last block ends at the wall
        centers.append(np.minimum(a + np.arange(math.ceil(2 * (b - a)) + 1) / 2, b) + 0.5)
    for x in centers[0]:
        near = np.flatnonzero(abs(xyz[:, 0] - x) <= 0.501)  # rounding loses no point at a wall
        for y in centers[1]:
            inside = near[abs(xyz[near, 1] - y) <= 0.501]
            if len(inside):
                blocks.append((inside, np.array([x, y, 0])))
    return blocks

@torch.no_grad()
def label_points(model, xyz, num_points, category=None):
    """A Segmenter's mean probabilities (n, labels) for every point of xyz (n, 3).

    An object is normalised; a room is taken in blocks, moved to their origin. Each is cut at random
    into sets of num_points, the last filled up with points of the others."""
    rng, device, sets = np.random.default_rng(0), next(model.parameters()).device, []
    c, blocks = model.config, [(np.arange(len(xyz)), np.zeros(3))]
    for inside, origin in blocks if c.normalized else room_blocks(xyz):
        order = np.resize(rng.permutation(inside), (-(-len(inside) // num_points), num_points))
        sets += [(chosen, xyz[chosen] - origin) for chosen in order]
    votes = torch.zeros(len(xyz), c.num_parts, dtype=torch.float64)
    for first in range(0, len(sets), 16):
        batch = zip(*sets[first : first + 16])
        chosen, points = (torch.from_numpy(np.stack(part)) for part in batch)
        points = (clouds.unit_sphere(points) if c.normalized else points.float()).to(device)
        given = None if category is None else torch.full((len(points),), category, device=device)
        probabilities = model.eval()(points, given).flatten(0, 1).double().softmax(dim=1)
        votes.index_add_(0, chosen.flatten(), probabilities.cpu())
    return votes / votes.sum(dim=1, keepdim=True)

# -- metrics ---------------------------------------------------------------------------------------
def confusion(truth, predicted, num_classes):
    """Counts (classes, classes): a row for each true class, a column for each predicted one."""
    truth, predicted = (torch.as_tensor(labels).long().cpu() for labels in (truth, predicted))
    pair = truth * num_classes + predicted
    return torch.bincount(pair.flatten(), minlength=num_classes**2).view(num_classes, num_classes)

def accuracy(matrix):
    """(overall, mean over the classes that occur) accuracy in percent."""
    hits, count = matrix.diag().double(), matrix.sum(1)
    recall = (hits / count)[count > 0]
    return 100 * (hits.sum() / count.sum()).item(), 100 * recall.mean().item()

def iou(matrix):
    """IoU of each class in percent, NaN for one in neither truth nor prediction."""
    return 100 * matrix.diag().double() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())

def shape_iou(truth, predicted, parts):
    """Mean IoU in percent over the parts range(*parts) of a category; an absent part counts 100."""
    first, last = parts
    inside = (predicted >= first) & (predicted < last)  # a foreign part: in the truth's union
    predicted = torch.where(inside, predicted - first, last - first)
    each = iou(confusion(truth - first, predicted, last - first + 1))[:-1]
    return each.nan_to_num(100.0).mean().item()

def print_table(matrix, names):
    """Size, accuracy and IoU of each class ("-": it does not occur), and what it is taken for."""
    width = max(map(len, names)) + 2
    print(f"{'class':{width}}{'number':>10}{'accuracy':>10}{'IoU':>8}  taken for")
    columns = zip(names, matrix, matrix.sum(1), 100 * matrix.diag() / matrix.sum(1), iou(matrix))
    for i, (name, row, count, *values) in enumerate(columns):
        recall, overlap = ("-" if value.isnan() else f"{value:.1f}" for value in values)
        order = row.argsort(descending=True, stable=True).tolist()
        others = [f"{names[j]} {row[j]}" for j in order if row[j] and j != i]
        print(f"{name:{width}}{count:10d}{recall:>10}{overlap:>8}  {', '.join(others[:5])}")

# -- model -----------------------------------------------------------------------------------------
def open_checkpoint(config):
    """The network that --checkpoint holds, None for none. Raises ValueError for a Teacher, or for
    another --size."""
    path = config.checkpoint
    if path == "none":
        return None
    if not Path(path).exists():
        raise ValueError(f"--checkpoint {path}: no such file; train_student.py writes one")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = act.load(path)
    if isinstance(source, act.Teacher):
        raise ValueError(f"--checkpoint {path}: expected a Student or its like, got a Teacher")
    if any("class token" in str(warning.message) for warning in caught):  # Point-MAE has none
        source.encoder.cls_token = source.encoder.cls_pos = None
    if config.size != "auto":
        c, own = source.config, act.EncoderConfig(**training.SIZES[config.size]["encoder"])
        if (c.width, c.depth) != (own.width, own.depth):
            raise ValueError(f"--size {config.size}: expected that of {path}, width {c.width} and "
                             f"depth {c.depth}, got {own.width} and {own.depth}")
    return source

def encoder_sizes(config, source):
    """An EncoderConfig for --points, with as many points to a patch as the checkpoint or size."""
    sizes = act.EncoderConfig(**{"points": 1024, **training.SIZES[config.size]["encoder"]})
    if source:
        own = {f.name: getattr(source.config, f.name) for f in fields(sizes)}
        sizes = act.EncoderConfig(**own)
    num_group = max(1, config.points * sizes.num_group // sizes.points)
    return replace(sizes, points=config.points, num_group=num_group, normalized=True)

def start_model(config, task, source, device):
    """The task's network with the encoder of `source`; prints what is loaded and what is new."""
    torch.manual_seed(config.seed)  # the head does not depend on where the encoder comes from
    model = task.build()
    if source:
        report = model.encoder.load_state_dict(source.encoder.state_dict(), strict=False)
        new = [name for name, _ in model.named_children() if name != "encoder"]
        unused = [name for name, _ in source.named_children() if name != "encoder"]
        print(f"loaded the encoder of the {type(source).__name__} in {config.checkpoint}; newly "
              f"initialised: {', '.join(report.missing_keys + new)}; not used: "
              + ", ".join(report.unexpected_keys + unused))
    c, count = model.config, sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}: width {c.width}, depth {c.depth}, {count / 1e6:.1f} M "
          f"parameters, {c.num_group} patches of {c.group_size} of {c.points} points")
    return model.to(device)

def features(model, xyz):
    """Frozen features [class token ; max] of a Student or Classifier: (B, N, 3) -> (B, 2 C)."""
    return act.global_feature(model.encoder(*model.encoder.group(xyz)))

def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)

def write_legend(path, c):
    """The labels of a Segmenter, and their colours -> names, colours (labels, 3) uint8."""
    names, colors = c.class_names, clouds.palette(c.num_parts)
    if c.num_categories:  # the parts of a category are told apart
        names = [f"part {i}" for i in range(c.num_parts)]
        for category, (first, last) in zip(c.class_names, c.part_ranges):
            names[first:last] = [f"{category} part {i}" for i in range(first, last)]
            colors[first:last] = clouds.palette(last - first)
    colors = (255 * colors).astype(np.uint8)
    rows = [("#%02x%02x%02x" % tuple(color), name) for color, name in zip(colors, names)]
    write_csv(path, [("colour", "name"), *rows])
    return names, colors

# -- tasks: the network, the loss of a batch, an epoch's metrics, closing metrics and pictures -----
class Classification:
    """A class per cloud."""
    def __init__(self, config, data, sizes, device):
        if data.train.labels is None or data.test.labels is None:
            raise ValueError(f"{config.data}: expected a sub-folder for each class, got no classes")
        self.config, self.device, self.classes = config, device, data.train.classes
        self.sizes = replace(sizes, normalized=data.train.normalized)
        splits = training.place(config, sizes.num_group, device, data.train, data.test)
        self.train, self.test = (subsample(split, config.points, device) for split in splits)
        self.names = self.train.names

    def build(self):
        protocol, count = self.config.protocol, len(self.classes)
        model = act.Classifier(act.ClassifierConfig(
            **vars(self.sizes), num_classes=count, class_names=self.classes,
            head="linear" if protocol == "linear" else "mlp3"))
        return model if protocol == "full" else model.freeze_encoder()

    def loss(self, net, batch, step, generator):
        xyz, _ = self.train.sample(batch, self.config.points, generator)
        xyz = augment(xyz, self.config, generator)[RANK::WORLD]
        labels = self.train.labels[batch.to(self.device)][RANK::WORLD]
        return F.cross_entropy(net(xyz).float(), labels)

    @torch.no_grad()
    def confusion(self, model):
        """Counts by the farthest points of each test cloud."""
        predicted = torch.zeros_like(self.test.labels)
        for indices, xyz in evaluation_batches(self.test, self.config.points):
            predicted[indices] = model.eval()(xyz).argmax(dim=1)
        return confusion(self.test.labels, predicted, len(self.classes))

    @torch.no_grad()
    def vote(self, model):
        """Counts by the mean logits of --vote augmented samples of each test cloud."""
        logits, config = torch.zeros(len(self.test), len(self.classes)), self.config
        for indices in torch.arange(len(self.test)).split(64):
            for i in range(config.vote):
                generator = training.seeded(self.device, config.seed, "vote", i, int(indices[0]))
                xyz, _ = self.test.sample(indices, config.points, generator)
                logits[indices] += model.eval()(augment(xyz, config, generator)).float().cpu()
        return confusion(self.test.labels, logits.argmax(dim=1), len(self.classes))

    def evaluate(self, model):
        if self.config.task == "fewshot":
            return {}  # after the last epoch only
        return dict(zip(("accuracy", "mean_accuracy"), accuracy(self.confusion(model))))

    def finish(self, model, out):
        matrix = self.confusion(model)
        metrics = dict(zip(("accuracy", "mean_accuracy"), accuracy(matrix)))
        if self.config.vote:
            voted = accuracy(self.vote(model))
            metrics.update(zip(("vote_accuracy", "vote_mean_accuracy"), voted))
        if self.config.task == "classify":
            print_table(matrix, self.classes)
            count = int((matrix.sum(1) > 0).sum())
            print(f"mean_accuracy is over {count} of {len(self.classes)} classes: with test clouds")
        return dict(metrics, confusion=matrix.tolist())

class Parts:
    """A part per point, the category of the object given; own labelled clouds have no category."""
    def __init__(self, config, data, sizes, device):
        self.config, self.sizes, self.device = config, sizes, device
        splits = training.place(config, sizes.num_group, device, data.train, data.test)
        self.train, self.test = (split.to(device) for split in splits)
        self.names, self.ranges = data.train.names, data.train.part_ranges
        self.num_categories = len(data.train.classes)
        part = torch.arange(max(last for _, last in self.ranges), device=device)
        allowed = [(part >= first) & (part < last) for first, last in self.ranges]
        self.allowed = torch.stack(allowed)  # (categories, or 1; parts)

    def build(self):
        ranges = [list(parts) for parts in self.ranges if self.num_categories]
        return act.Segmenter(act.SegmenterConfig(
            **vars(self.sizes), num_parts=self.allowed.shape[1], part_ranges=ranges,
            num_categories=self.num_categories,
            class_names=self.train.classes or self.train.part_names))

    def sample(self, split, indices, generator):
        """config.points of each cloud with replacement, as published: xyz (B, N, 3), parts (B, N);
        and the categories (B,), 0 if there are none."""
        start, size = split.offsets[indices][:, None], split.offsets.diff()[indices][:, None]
        shape = (len(indices), self.config.points)
        uniform = torch.rand(shape, generator=generator, device=self.device)
        flat = start + (uniform * size).long().minimum(size - 1)
        labels = split.labels[indices] if self.num_categories else torch.zeros_like(indices)
        return clouds.unit_sphere(split.points[flat]), split.parts[flat], labels

    def loss(self, net, batch, step, generator):
        xyz, *labels = self.sample(self.train, batch.to(self.device), generator)
        xyz = augment(xyz, self.config, generator)[RANK::WORLD]
        parts, category = (part[RANK::WORLD] for part in labels)
        logits = net(xyz, category if self.num_categories else None)
        return F.cross_entropy(logits.float().flatten(0, 1), parts.flatten())

    @torch.no_grad()
    def predict(self, model, indices):
        """Fixed samples of test clouds, on the CPU: xyz (B, N, 3), truth and prediction (B, N), the
        best of the parts that the category has, and category (B,)."""
        generator = training.seeded(self.device, "test", int(indices[0]))
        xyz, truth, category = self.sample(self.test, indices, generator)
        logits = model.eval()(xyz, category if self.num_categories else None).float()
        best = logits.masked_fill(~self.allowed[category][:, None], -math.inf).argmax(dim=-1)
        return [part.cpu() for part in (xyz, truth, best, category)]

    def evaluate(self, model):
        batches = torch.arange(len(self.test), device=self.device).split(32)
        results = zip(*[self.predict(model, indices)[1:] for indices in batches])
        truth, predicted, category = (torch.cat(part) for part in results)
        shapes = zip(truth, predicted, category)
        each = [shape_iou(t, p, self.ranges[c]) for t, p, c in shapes]
        each = torch.tensor(each, dtype=torch.float64)
        by_category = torch.stack([each[category == c].mean() for c in category.unique()])
        self.matrix = confusion(truth, predicted, self.allowed.shape[1])
        return dict(instance_miou=each.mean().item(), class_miou=by_category.mean().item(),
                    accuracy=accuracy(self.matrix)[0])

    def finish(self, model, out):
        names, colors = write_legend(out / "labels.csv", model.config)
        metrics = self.evaluate(model)
        if not self.num_categories:  # then class_miou says no more than instance_miou
            print_table(self.matrix, names)
            metrics["miou"] = iou(self.matrix).nanmean().item()
        shown = torch.arange(0, len(self.test), max(1, len(self.test) // 6), device=self.device)[:6]
        shapes = zip(*self.predict(model, shown)[:3])
        rows = [[(xyz.numpy(), colors[part] / 255) for part in parts] for xyz, *parts in shapes]
        clouds.write_gallery(out / "parts", rows, columns=4)
        names = ", ".join(self.test.names[i] for i in shown)
        print(f"parts.png: truth and prediction of {names}; its colours: labels.csv")
        return metrics

class Scenes:
    """A class per point of whole rooms, trained on blocks of them."""
    def __init__(self, config, data, sizes, device):
        self.config, self.sizes, self.device = config, replace(sizes, normalized=False), device
        self.classes, self.train, self.test = data.classes, [], data.test
        for room in data.train:  # once for every config.points of its points
            order = room.xyz[:, 0].argsort(kind="stable")
            room = room._replace(xyz=room.xyz[order], labels=room.labels[order])
            self.train.extend(room for _ in range(max(1, len(order) // config.points)))
        self.names = [f"{room.name}#{i}" for i, room in enumerate(self.train)]
        labels = np.concatenate([room.labels for room in data.train])
        count = np.bincount(labels, minlength=len(self.classes))
        weight = (count.max() / np.maximum(count, 1)) ** (1 / 3)
        self.weight = torch.tensor(weight, dtype=torch.float32, device=device)

    def build(self):
        return act.Segmenter(act.SegmenterConfig(
            **vars(self.sizes), num_parts=len(self.classes), num_categories=0,
            class_names=self.classes))

    def loss(self, net, batch, step, generator):
        config, blocks = self.config, []
        for i in batch.tolist():
            rng = np.random.default_rng([config.seed, step, i])
            blocks.append(sample_block(self.train[i], config.points, rng))
        xyz, labels = (torch.from_numpy(np.stack(part)).to(self.device) for part in zip(*blocks))
        xyz = augment(xyz, config, generator)[RANK::WORLD]
        labels = labels[RANK::WORLD].long().flatten()
        return F.cross_entropy(net(xyz).float().flatten(0, 1), labels, self.weight)

    def evaluate(self, model):
        return {}  # every point of every room takes long: after the last epoch only

    def finish(self, model, out):
        """Metrics of all test rooms together, a table, and two rooms without ceiling and walls."""
        print(f"labelling every point of {len(self.test)} test rooms")
        _, colors = write_legend(out / "labels.csv", model.config)
        matrix, rows = 0, []
        hidden = [i for i, name in enumerate(self.classes) if name in ("ceiling", "wall")]
        for room in self.test:
            predicted = label_points(model, room.xyz, self.config.points).argmax(dim=1).numpy()
            matrix = matrix + confusion(room.labels, predicted, len(self.classes))
            shown = np.flatnonzero(~np.isin(room.labels, hidden))[:: len(predicted) // 30_000 + 1]
            shown = shown if len(shown) > 1 else np.arange(len(predicted))
            up = clouds.normalize(room.xyz[shown][:, [0, 2, 1]] * [1, 1, -1])  # y up
            rows.append([(up, colors[part[shown]] / 255) for part in (room.labels, predicted)])
        clouds.write_gallery(out / "scene", rows[:2])
        names = ", ".join(room.name for room in self.test[:2])
        print(f"scene.png: truth and prediction of {names}; its colours: labels.csv")
        print_table(matrix, self.classes)
        each, (overall, mean) = iou(matrix), accuracy(matrix)
        metrics = dict(accuracy=overall, mean_accuracy=mean, miou=each.nanmean().item())
        for name, value in zip(self.classes, each.tolist()):
            metrics[f"iou_{name}"] = None if math.isnan(value) else value
        return metrics

# -- training --------------------------------------------------------------------------------------
def fit(config, task, source, device):
    """Trains and evaluates a network for a task -> the run's Log, with its closing row."""
    # -- model, optimizer, resume
    count = len(task.names)
    config = training.plan(config, count)
    if config.batch_size < 2 * WORLD:
        raise ValueError(f"--batch-size: expected 2 or more for BatchNorm, got {config.batch_size}")
    model = start_model(config, task, source, device)
    optimizer = training.adamw(model, config.lr, config.weight_decay)
    log = training.Log(config, model, task.names)
    if log.state:
        optimizer.load_state_dict(log.state["optimizer"])
    net = training.parallel(model, config)
    warmup = 10 * (count // config.batch_size)  # ten epochs

    # -- loop
    for epoch in range(log.epoch, config.epochs):
        net.train()
        for batch in training.epoch_batches(config, count, epoch, log.step):
            generator = training.seed_step(config.seed, log.step, device)
            lr = training.set_lr(optimizer, log.step, config, end=1e-6, warmup=warmup)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = task.loss(net, batch, log.step, generator)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            log.add(loss=loss, grad_norm=grad_norm, lr=lr)
        log.end_epoch(optimizer, task.evaluate(model) if RANK == 0 else {})

    # -- results
    if RANK == 0:
        metrics = task.finish(model, log.out)
        clouds.write_chart(log.out / "loss.svg", log.rows)
        metric = "instance_miou" if config.task == "parts" else "accuracy"
        epochs = [row for row in log.rows if metric in row]
        if epochs:
            best = max(epochs, key=lambda row: row[metric])
            metrics.update({f"best_{metric}": best[metric], "best_epoch": best["epoch"]})
        close(log, **metrics)
    return log

def close(log, **metrics):
    """The last row of a run, and the line of its results."""
    config = log.config
    log.close(task=config.task, checkpoint=config.checkpoint, seed=config.seed, **metrics)
    shown = [f"{name} {value:.2f}" for name, value in metrics.items() if isinstance(value, float)]
    print(f"{config.task}, protocol {config.protocol}, {config.data}, augmentation "
          f"{config.augment}: {', '.join(shown)}")

def fewshot(config, data, sizes, source, device):
    """A run per fold in --out/fold_<k>; the mean and standard deviation of their last epochs."""
    accuracies, published = [], Path(config.data) / f"{config.way}way_{config.shot}shot"
    for fold in range(FOLDS) if config.fold == "all" else [int(config.fold)]:
        if data is None:
            splits = clouds.read_episode(published / f"{fold}.pkl", config.way)
            episode = clouds.Dataset(published.name, *splits)
        else:
            episode = draw_episode(data, config.way, config.shot, fold)
        own = replace(config, out=f"{config.out}/fold_{fold}")
        log = fit(own, Classification(own, episode, sizes, device), source, device)
        accuracies.append(log.rows[-1].get("accuracy"))
    if RANK == 0:
        log = training.Log(replace(log.config, out=config.out, resume=False), log.model, [])
        std = np.std(accuracies, ddof=len(accuracies) > 1).item()
        close(log, accuracy=np.mean(accuracies).item(), accuracy_std=std, folds=accuracies)

@torch.no_grad()
def svm(config, task, source, device):
    """A linear SVM on the frozen features of all training clouds."""
    train, test, vectors = task.train, task.test, []
    model = start_model(config, task, source, device).eval()
    log = training.Log(config, model, task.names)
    for split in (train, test):
        vectors.append(torch.zeros(len(split), 2 * model.config.width, device=device))
        for indices, xyz in evaluation_batches(split, config.points):
            vectors[-1][indices] = features(model, xyz)
    percent, C = training.svm_accuracy(vectors[0], train.labels, vectors[1], test.labels)
    close(log, accuracy=percent, C=C)
    if config.features:
        labels = torch.cat([train.labels, test.labels]).cpu()
        splits = np.repeat(["train", "test"], [len(train), len(test)])
        np.savez(config.features, features=torch.cat(vectors).cpu(), labels=labels, split=splits,
                 names=train.names + test.names, class_names=task.classes)

# -- prediction ------------------------------------------------------------------------------------
def list_files(path):
    """A cloud, or those below a folder, links followed."""
    files = [path]
    if not Path(path).is_file():
        below = sorted(glob.glob(f"{glob.escape(path)}/**", recursive=True))
        files = [file for file in map(Path, below) if file.suffix.lower() in clouds.READERS
                 and (file.suffix.lower() != ".txt" or clouds.holds_points(file))]
    if not files:
        raise ValueError(f"--predict {path}: expected a cloud or a folder of clouds, got none")
    return map(Path, files)

def read_input(path, c):
    """A file as the network with config `c` takes it, (1, n, 3)."""
    if c.normalized:
        xyz = clouds.read_cloud(path, c.points)
    else:  # as stored
        xyz = clouds.read_points(path).astype(np.float32)
        xyz = xyz[clouds.farthest_points(xyz, min(c.points, len(xyz)))]
    least, count = max(c.num_group, c.group_size), len(np.unique(xyz, axis=0))
    if count < least:
        raise ValueError(f"{path}: expected {least} different points or more, got {count}")
    return torch.from_numpy(xyz)[None]

def label_file(config, model, path, names, colors):
    """Writes a cloud and its points' labels as .npz and coloured .ply -> the shares of labels."""
    c, xyz, category = model.config, clouds.read_points(path), None
    first, last = 0, c.num_parts
    if c.num_categories:
        name = config.category or path.resolve().parent.name
        if name not in c.class_names:
            known = ", ".join(c.class_names)
            raise ValueError(f"{path}: expected --category or a folder {known}, got {name}")
        category = c.class_names.index(name)
        first, last = c.part_ranges[category]
    votes = label_points(model, xyz, c.points, category)[:, first:last]
    labels = votes.argmax(dim=1).numpy() + first
    parts = [part for part in path.parts if part not in ("..", path.anchor)]
    target = Path(config.out) / "-".join(parts)
    np.savez(f"{target}.npz", points=xyz, labels=labels, label_names=names)
    clouds.write_ply(f"{target}.ply", xyz, colors[labels])
    shares = Counter(labels.tolist()).most_common()
    return ", ".join(f"{names[label]} {100 * count / len(xyz):.0f} %" for label, count in shares)

@torch.no_grad()
def predict(config, device):
    """--predict: a table and predictions.csv of classes, or each cloud with its labels; --features.
    A file that cannot be read is named and left out; then the exit code is 2."""
    model, out = act.load(config.checkpoint, device), Path(config.out)
    c, kind = model.config, type(model).__name__
    expected = ("Student", "Classifier") if config.features else ("Classifier", "Segmenter")
    if kind not in expected:
        raise ValueError(f"{config.checkpoint}: expected a {' or '.join(expected)}, got a {kind}")
    if config.points:  # with as many points to a patch
        c.num_group = max(1, config.points * c.num_group // c.points)
        c.points = config.points
    if kind == "Classifier" and not c.class_names:  # official files do not name them
        c.class_names = [f"class {i}" for i in range(c.num_classes)]
    if kind == "Segmenter" and not c.class_names:
        c.normalized = c.num_categories > 0
        c.class_names = list(clouds.SHAPENET_PARTS if c.normalized else clouds.S3DIS_CLASSES)
        c.part_ranges = list(clouds.SHAPENET_PARTS.values())
    files = [file for path in config.predict for file in list_files(path)]
    names, width = getattr(c, "class_names", []), max(len(str(file)) for file in files)
    out.mkdir(parents=True, exist_ok=True)
    if kind == "Segmenter":
        labels, colors = write_legend(out / "labels.csv", c)
    done, vectors, rows, truth = [], [], [], []
    for file in files:
        try:
            if kind == "Segmenter":
                shown = label_file(config, model, file, labels, colors)
            else:
                vectors.append(features(model, read_input(file, c)))
                shown = f"{vectors[-1].shape[1]} features"
            if kind == "Classifier":
                values = model.head(vectors[-1])[0].softmax(dim=0)
                best = values.argsort(descending=True).tolist()[:2]
                shown = ", ".join(f"{names[i]} {values[i]:.3f}" for i in best)
                rows.append((file, names[best[0]], *values.tolist()))
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            continue
        print(f"{str(file):{width}}  {shown}", flush=True)
        above = [folder.name for folder in list(file.resolve().parents)[:2]]  # <class>/test/a.ply
        truth.append(next((name for name in above if name in names), ""))
        done.append(str(file))
    if rows:
        write_csv(out / "predictions.csv", [("file", "label", *names), *rows])
        hits = [row[1] == label for row, label in zip(rows, truth) if label]
        if hits:
            print(f"accuracy {100 * np.mean(hits):.2f} % of {len(hits)} clouds in class folders")
    if config.features and done:
        labels = [names.index(label) if label else -1 for label in truth]
        np.savez(config.features, features=torch.cat(vectors).cpu(), names=done, labels=labels,
                 class_names=names)
    if len(done) < len(files):
        raise ValueError(f"--predict: expected {len(files)} clouds, got {len(done)}, see above")

# -- main ------------------------------------------------------------------------------------------
def main(config):
    points, source = config.points, None if config.predict else open_checkpoint(config)
    config, device = training.setup(config, defaults(config, source))
    if config.predict:
        return predict(replace(config, points=points), device) if RANK == 0 else None

    # -- data
    if config.task == "fewshot" and any(Path(config.data).glob("*way_*shot")):
        data = None  # published: a file for each episode
    elif config.task == "scene":
        data = clouds.open_rooms(config.data, config.area, density=0.6 * config.points)
    elif config.task == "parts":
        data = clouds.open_parts(config.data, config.cache or None)
    else:
        data = clouds.open_dataset(config.data, config.cache or None, config.variant, config.area)
    name = data.name if data else "published episodes"
    print(clouds.describe(data) if data else f"{config.data}: {name}")
    scanned = name.startswith("ScanObjectNN")
    if scanned and points is None and config.task != "svm" and config.size != "tiny":
        config = replace(config, points=2048)  # as published
    rotated = config.task == "classify" and (scanned or config.data == "synthetic")
    auto = "rotate" if rotated else "scale_translate"
    config = replace(config, augment=config.augment.replace("auto", auto))
    sizes = encoder_sizes(config, source)
    print(f"{config.task} on {device} x {WORLD}, {config.precision}, size {config.size}, "
          f"augmentation {config.augment}")

    # -- model, optimizer, loop, results
    if config.task == "fewshot":
        return fewshot(config, data, sizes, source, device)
    task = dict(classify=Classification, svm=Classification, parts=Parts, scene=Scenes)[config.task]
    task = task(config, data, sizes, device)
    if config.task == "svm":
        return svm(config, task, source, device) if RANK == 0 else None
    fit(config, task, source, device)

if __name__ == "__main__":
    training.run_script(main, Config, __doc__)
