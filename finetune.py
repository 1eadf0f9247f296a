"""Transfer (Sec. 5): what a pretrained encoder is worth on labelled clouds. Needs no data set.

    python finetune.py --protocol linear   # classification, frozen encoder; --checkpoint none
    python finetune.py --task fewshot --way 5 --shot 10   # ten episodes, mean and deviation
    python finetune.py --task svm          # a linear SVM on frozen features
    python finetune.py --task parts        # part segmentation; --task scene: rooms
    python finetune.py --data ScanObjectNN --checkpoint student.pth --size base   # as published
    python finetune.py --predict my_scans --checkpoint runs/classify/last.pt   # label own clouds
    torchrun --nproc_per_node=8 finetune.py --data ModelNet40 --vote 10 --size base

--data is `synthetic` or a folder, recognised by the files in it; .h5 files need h5py:

    ScanObjectNN  main_split/*.h5, main_split_nobg/*.h5; hkust-vgd.github.io/scanobjectnn, h5_files
    ModelNet40    modelnet40_{train,test,shape_names}.txt, <class>/*.txt: PointNet++'s
                  modelnet40_normal_resampled; modelnet40_{train,test}_8192pts_fps.dat made of it;
                  or <class>/{train,test}/*.off: modelnet.cs.princeton.edu
    few-shot      5way_10shot/0.pkl ...: Point-BERT's episodes of ModelNet40; --task fewshot
    ShapeNetPart  synsetoffset2category.txt, train_test_split/, <synset>/*.txt: PointNet++'s
                  shapenetcore_partanno_segmentation_benchmark_v0_normal; --task parts
    S3DIS         Area_1_office_1.npy ..., by PointNet's collect_indoor3d_data.py; --task scene
    .h5 pair      *train*.h5, *test*.h5 with data (n, P, 3) and label (n,)
    own clouds    <class>/*.ply ... (.npy .npz .off .obj .xyz .txt .pts), if split: train/, test/
    own labels    train/*, test/* (.npy .txt): x y z ... label, classes.txt: names; --task parts, or
                  scene: in metres, z up

Leaves last.pt, metrics.jsonl, config.json, loss.svg, pictures and their legend labels.csv in --out.
"""

import csv
import glob
import sys
from dataclasses import dataclass, replace
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

@dataclass
class Config(training.RunConfig):
    out: str = flag("", "folder of the results (default: runs/<task>, runs/predict)")
    task: str = flag("classify", "what is learnt", choices=tuple(EPOCHS))
    protocol: str = flag("full", "what is trained", "all three", str, ("full", "mlp3", "linear"))
    checkpoint: str = flag("runs/student/last.pt", "a student; none: from scratch")
    augment: str = flag("auto", "auto: as published", None, str,
                        ("auto", "rotate", "scale_translate", "none"))
    weight_decay: float = flag(0.05, "AdamW's weight decay", 0.05)
    vote: int = flag(0, "classify: also the mean logits of so many augmented samples", 10)
    way: int = flag(5, "classes of an episode", "5, 10")
    shot: int = flag(10, "training clouds per class of an episode", "10, 20")
    predict: list = flag((), "label these clouds or folders with --checkpoint", kind=str)
    category: str = flag("", "what --predict finds the parts of (default: the folder's name)")
    features: str = flag("", "with --predict or --task svm: an .npz for features (n, 2 C)")

    def __post_init__(self):
        self.out = self.out or f"runs/{'predict' if self.predict else self.task}"
        if self.protocol != "full" and self.task not in ("classify", "fewshot"):
            raise ValueError(f"--protocol: expected full for {self.task}, got {self.protocol}")
        if self.features and not self.predict and self.task != "svm":
            raise ValueError("--features: expected --predict or --task svm beside it, got neither")

def defaults(config):
    """size -> values of the flags that are not given."""
    dense = config.task in ("parts", "scene")
    lr = 2e-4 if dense else 5e-4 if config.protocol == "full" else 1e-3
    same = dict(lr=lr, batch_size=16 if config.task == "parts" else 32)
    points = (1024, 2048, 2048) if dense else (1024, 1024, 1024)
    sizes = zip(training.SIZES, points, EPOCHS[config.task])
    return {size: dict(same, points=points, epochs=epochs) for size, points, epochs in sizes}

# -- clouds ----------------------------------------------------------------------------------------
def draw_episode(data, way, shot, fold):
    """An episode, whatever --seed is: `way` classes of `shot` support and QUERIES query clouds."""
    if data.train.labels is None:
        raise ValueError(f"{data.name}: expected a sub-folder for each class, got no classes")
    rng, splits, names = np.random.default_rng([way, shot, fold]), [], data.train.classes
    support, query = (np.bincount(part.labels, minlength=len(names)) for part in data[1:3])
    enough = np.flatnonzero((support >= shot) & (query > 0))
    if not 2 <= way <= len(enough) or not shot:
        raise ValueError(f"--way {way} --shot {shot}: expected 2 or more classes of so many "
                         f"training clouds and a test cloud, got {len(enough)}")
    chosen = rng.permutation(enough)[:way].tolist()
    for split, count in ((data.train, shot), (data.test, QUERIES)):
        drawn = [rng.permutation(np.flatnonzero(split.labels == c))[:count] for c in chosen]
        split = split.select(np.concatenate(drawn))
        labels = torch.tensor([chosen.index(label) for label in split.labels])
        splits.append(replace(split, labels=labels, classes=[names[c] for c in chosen]))
    return clouds.Dataset(data.name, *splits)

@torch.no_grad()
def of_each_cloud(function, split, num_points=None):
    """[`function` (of xyz (B, n, 3)) of every cloud], or of its first num_points, normalised as in
    `clouds.read_cloud`: batches are of clouds of equal size, so that nothing is repeated."""
    sizes, values = split.offsets.diff().clamp(max=num_points or 2**40), [None] * len(split)
    for size in sizes.unique().tolist():
        for indices in (sizes == size).nonzero()[:, 0].split(64):
            first = split.offsets[indices][:, None]
            xyz = split.points[first + torch.arange(size, device=first.device)]
            xyz = clouds.unit_sphere(xyz) if num_points and split.normalized else xyz
            for i, value in zip(indices.tolist(), function(xyz)):
                values[i] = value
    return values

def subsample(split, num_points, device):
    """Each larger cloud's farthest points in the order found, up to 75/64 of num_points: training
    samples 1024 of 1200 or 2048 of 2400 (Sec. 5), evaluation takes the first num_points."""
    def farthest(xyz):
        count = min(num_points * 75 // 64, xyz.shape[1])
        if count <= num_points:
            return xyz
        order = act.farthest_point_sample(xyz.to(device), count)
        return act.gather_points(xyz, order.to(xyz.device))

    kept = of_each_cloud(farthest, split)
    offsets = torch.tensor([0, *map(len, kept)]).cumsum(0)
    return replace(split, points=torch.cat(kept), offsets=offsets, parts=None).to(device)

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
    """A 1 m x 1 m block centred on a random point of a room that is sorted along x, of more than
    num_points / 2 points (1024 of 2048, Sec. 5), some repeated: xyz (num_points, 3), labels."""
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
    """Blocks of 1 m x 1 m over a room, 0.5 m apart: yields (indices of points, origin (3,))."""
    low, high = xyz[:, :2].min(0).astype(np.float64), xyz[:, :2].max(0).astype(np.float64)
    centers = []
    for a, b in zip(low, np.maximum(low, high - 1)):  # the last block ends at the wall
        centers.append(np.minimum(a + np.arange(np.ceil(2 * (b - a)) + 1) / 2, b) + 0.5)
    for x in centers[0]:
        near = np.flatnonzero(abs(xyz[:, 0] - x) <= 0.501)  # rounding loses no point at a wall
        for y in centers[1]:
            inside = near[abs(xyz[near, 1] - y) <= 0.501]
            if len(inside):
                yield inside, np.array([x, y, 0])

@torch.no_grad()
def label_points(model, xyz, category=None):
    """The labels (n,) of xyz (n, 3), an object or a room in blocks, by a Segmenter's mean over sets
    of config.points, drawn at random, the last filled up with points of the others."""
    c, rng, device = model.config, np.random.default_rng(0), next(model.parameters()).device
    whole, sets = [(np.arange(len(xyz)), np.zeros(3))], []
    for inside, origin in whole if c.normalized else room_blocks(xyz):
        order = np.resize(rng.permutation(inside), (-(-len(inside) // c.points), c.points))
        sets += [(chosen, xyz[chosen] - origin) for chosen in order]
    votes = torch.zeros(len(xyz), c.num_parts, dtype=torch.float64)
    for chosen, points in torch.utils.data.DataLoader(sets, batch_size=16):
        points = (clouds.unit_sphere(points) if c.normalized else points.float()).to(device)
        given = None if category is None else torch.full((len(points),), category, device=device)
        probabilities = model.eval()(points, given).flatten(0, 1).double().softmax(dim=1)
        votes.index_add_(0, chosen.flatten(), probabilities.cpu())
    first, last = (0, c.num_parts) if category is None else c.part_ranges[category]
    return votes[:, first:last].argmax(dim=1).numpy() + first

# -- metrics ---------------------------------------------------------------------------------------
def confusion(truth, predicted, num_classes):
    """Counts (classes, classes): a row for each true class, a column for each predicted one."""
    truth, predicted = (torch.as_tensor(labels).long().cpu() for labels in (truth, predicted))
    pair = truth * num_classes + predicted
    return torch.bincount(pair, minlength=num_classes**2).view(num_classes, num_classes)

def accuracy(matrix):
    """Accuracy overall, and its mean over the classes that occur, in percent."""
    hits, count = matrix.diag().double(), matrix.sum(1)
    return dict(accuracy=100 * (hits.sum() / count.sum()).item(),
                mean_accuracy=100 * (hits / count).nanmean().item())

def iou(matrix):
    """IoU of each class in percent, NaN for one in neither truth nor prediction."""
    return 100 * matrix.diag().double() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())

def print_table(matrix, names):
    """Size, accuracy and IoU of each class ("-": it does not occur), and what it is taken for."""
    width, count = max(map(len, names)) + 2, matrix.sum(1)
    print(f"{'class':{width}}{'number':>10}{'accuracy':>10}{'IoU':>8}  taken for")
    columns = zip(names, matrix, count, 100 * matrix.diag() / count, iou(matrix))
    for i, (name, row, number, *values) in enumerate(columns):
        recall, overlap = ("-" if value.isnan() else f"{value:.1f}" for value in values)
        order = row.argsort(descending=True, stable=True).tolist()
        others = [f"{names[j]} {row[j]}" for j in order if row[j] and j != i]
        print(f"{name:{width}}{number:10d}{recall:>10}{overlap:>8}  {', '.join(others[:5])}")
    print(f"mean_accuracy is over {(count > 0).sum()} of {len(names)} classes: those that occur")

# -- model -----------------------------------------------------------------------------------------
def encoder_sizes(config, source, size="auto"):
    """Sizes for --points, with as many points to a patch as `source`, of this `size`, or --size."""
    own = act.EncoderConfig(**{"points": 1024, **training.SIZES[config.size]["encoder"]})
    c = source.config if source else own
    if size != "auto" and (c.width, c.depth) != (own.width, own.depth):
        raise ValueError(f"--size {size}: expected that of {config.checkpoint}, width {c.width} "
                         f"and depth {c.depth}, got {own.width} and {own.depth}")
    sizes = {name: getattr(c, name) for name in vars(own) if name != "normalized"}
    num_group = max(1, config.points * c.num_group // c.points)
    return dict(sizes, points=config.points, num_group=num_group)

def start_model(config, task, source, device):
    """The task's network with the encoder of `source`; prints what is loaded and what is new."""
    torch.manual_seed(config.seed)  # the head does not depend on where the encoder comes from
    model = task.network(task.sizes)
    if config.protocol != "full":
        model.freeze_encoder()
    if source:
        report = model.encoder.load_state_dict(source.encoder.state_dict(), strict=False)
        new, unused = ([name for name, _ in net.named_children() if name != "encoder"]
                       for net in (model, source))
        print(f"loaded the encoder in {config.checkpoint}; newly initialised: "
              f"{', '.join([*report.missing_keys, *new])}; not used: "
              f"{', '.join([*report.unexpected_keys, *unused])}")
    c, count = model.config, sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}: width {c.width}, depth {c.depth}, {count / 1e6:.1f} M "
          f"parameters, {c.num_group} patches of {c.group_size} of {c.points} points")
    return model.to(device)

def features(model, xyz):
    """Frozen features [class token ; max] of a Student or Classifier: (B, N, 3) -> (B, 2 C)."""
    return act.global_feature(model.encoder(*model.encoder.group(xyz)))

# -- tasks: the network, samples of a batch, metrics, closing metrics and pictures -----------------
class Classification:
    """A class per cloud."""
    network, weight = act.Classifier, None

    def __init__(self, config, data, sizes, device):
        if data.train.labels is None:
            raise ValueError(f"{config.data}: expected a sub-folder for each class, got no classes")
        self.config, self.device, self.classes = config, device, data.train.classes
        splits = training.place(config, sizes["num_group"], device, data.train, data.test)
        self.train, self.test = (subsample(split, config.points, device) for split in splits)
        self.names = self.train.names
        self.sizes = act.ClassifierConfig(
            **sizes, normalized=data.train.normalized, class_names=self.classes,
            num_classes=len(self.classes), head=config.protocol.replace("full", "mlp3"))

    def sample(self, indices, step, generator):
        xyz, _ = self.train.sample(indices, self.config.points, generator)
        return xyz, self.train.labels[indices.to(self.device)]

    def evaluate(self, model):
        """Metrics by the farthest points of each test cloud."""
        logits = torch.stack(of_each_cloud(model.eval(), self.test, self.config.points))
        self.matrix = confusion(self.test.labels, logits.argmax(dim=1), len(self.classes))
        return accuracy(self.matrix)

    @torch.no_grad()
    def vote(self, model):
        """Metrics by the mean logits of --vote augmented samples of each test cloud."""
        config, logits = self.config, torch.zeros(len(self.test), len(self.classes))
        for indices in torch.arange(len(self.test)).split(64):
            for i in range(config.vote):
                generator = training.seeded(self.device, config.seed, "vote", i, int(indices[0]))
                xyz, _ = self.test.sample(indices, config.points, generator)
                logits[indices] += model.eval()(augment(xyz, config, generator)).float().cpu()
        voted = accuracy(confusion(self.test.labels, logits.argmax(dim=1), len(self.classes)))
        return {f"vote_{name}": value for name, value in voted.items()}

    def finish(self, model, out):
        if self.config.task == "classify":
            print_table(self.matrix, self.classes)
        voted = self.vote(model) if self.config.vote else {}
        return dict(voted, confusion=self.matrix.tolist())

class Parts:
    """Parts of objects, the category given; own labelled clouds have no category."""
    network, weight = act.Segmenter, None

    def __init__(self, config, data, sizes, device):
        self.config, self.device = config, device
        splits = training.place(config, sizes["num_group"], device, data.train, data.test)
        self.train, self.test = (split.to(device) for split in splits)
        self.names, self.categories = data.train.names, data.train.classes
        ranges = data.train.part_ranges
        self.sizes = act.SegmenterConfig(
            **sizes, num_categories=len(self.categories), num_parts=max(map(max, ranges)),
            class_names=self.categories or data.train.part_names,
            part_ranges=[list(parts) for parts in ranges if self.categories])
        self.labels = data.test.labels if self.categories else torch.zeros(len(data.test)).long()
        self.ranges = [ranges[label] for label in self.labels]  # of each test cloud

    def sample(self, indices, step, generator, split=None):
        """Points with replacement, as published: xyz (B, N, 3), parts (B, N), category (B,)."""
        split, indices = split or self.train, indices.to(self.device)
        start, size = split.offsets[indices][:, None], split.offsets.diff()[indices][:, None]
        shape = (len(indices), self.config.points)
        uniform = torch.rand(shape, generator=generator, device=self.device)
        flat = start + (uniform * size).long().minimum(size - 1)
        category = [split.labels[indices]] if self.categories else []
        return clouds.unit_sphere(split.points[flat]), split.parts[flat], *category

    @torch.no_grad()
    def predictions(self, model):
        """Name, xyz, truth and prediction, the best part of its category, of each test cloud."""
        for indices in torch.arange(len(self.test)).split(32):
            generator = training.seeded(self.device, "test", int(indices[0]))  # fixed samples
            xyz, truth, *category = self.sample(indices, None, generator, self.test)
            logits = model.eval()(xyz, *category).float()
            for i, *shape, values in zip(indices, xyz.cpu().numpy(), truth.cpu(), logits.cpu()):
                first, last = self.ranges[i]
                yield self.test.names[i], *shape, values[:, first:last].argmax(dim=1) + first

    def evaluate(self, model):
        """Metrics of all points; IoU of parts (absent: 100), the mean of shapes, of categories."""
        matrices, self.shown = [], {}
        for name, *shape in self.predictions(model):
            if len(matrices) % -(-len(self.test) // 6) == 0:
                self.shown[name] = shape
            matrices.append(confusion(*shape[1:], self.sizes.num_parts))
        self.matrix = sum(matrices)
        metrics = accuracy(self.matrix)
        if self.config.task == "parts":
            shapes = zip(map(iou, matrices), self.ranges)
            each = [values[slice(*parts)].nan_to_num(100.0).mean() for values, parts in shapes]
            each = torch.stack(each)
            by_category = [each[self.labels == label].mean() for label in self.labels.unique()]
            metrics["instance_miou"] = each.mean().item()
            metrics["class_miou"] = torch.stack(by_category).mean().item()
        return metrics

    def finish(self, model, out):
        """IoU of each label, unless it is of a category; a picture without ceiling and walls."""
        names, colors = write_legend(out / "labels.csv", model.config)
        hidden, rows = [i for i, name in enumerate(names) if name in ("ceiling", "wall")], []
        for xyz, *labels in self.shown.values():
            seen = np.flatnonzero(~np.isin(labels[0], hidden))[:: len(xyz) // 30_000 + 1]
            rows.append([(xyz[seen], colors[part[seen]] / 255) for part in labels])
        clouds.write_gallery(out / self.config.task, rows, columns=4)
        print(f"{self.config.task}.png: truth and prediction of {', '.join(self.shown)}; its "
              "colours: labels.csv")
        if self.sizes.num_categories:
            return {}
        print_table(self.matrix, names)
        each = iou(self.matrix)
        metrics = {f"iou_{name}": None if v.isnan() else v.item() for name, v in zip(names, each)}
        return dict(metrics, miou=each.nanmean().item())

class Scenes(Parts):
    """Whole rooms, trained on blocks of them."""
    def __init__(self, config, data, sizes, device):
        self.config, self.device, self.train, self.test = config, device, [], data.test
        for room in data.train:  # once for every config.points of its points
            order = room.xyz[:, 0].argsort(kind="stable")
            room = room._replace(xyz=room.xyz[order], labels=room.labels[order])
            self.train += [room] * max(1, len(order) // config.points)
        self.names = [f"{room.name}#{i}" for i, room in enumerate(self.train)]
        self.sizes = act.SegmenterConfig(**sizes, normalized=False, num_categories=0,
                                         num_parts=len(data.classes), class_names=data.classes)
        labels = np.concatenate([room.labels for room in data.train])
        count = np.bincount(labels, minlength=len(data.classes))
        weight = (count.max() / np.maximum(count, 1)) ** (1 / 3)
        self.weight = torch.from_numpy(weight).float().to(device)

    def sample(self, indices, step, generator):
        blocks = []
        for i in indices.tolist():
            rng = np.random.default_rng([self.config.seed, step, i])
            blocks.append(sample_block(self.train[i], self.config.points, rng))
        xyz, labels = (torch.from_numpy(np.stack(part)).to(self.device) for part in zip(*blocks))
        return xyz, labels.long()

    def predictions(self, model):
        """Name, xyz with y up, truth and prediction of all points of each test room."""
        print(f"labelling every point of {len(self.test)} test rooms", flush=True)
        for room in self.test:
            up = clouds.normalize(room.xyz[:, [0, 2, 1]] * [1, 1, -1])
            yield room.name, up, room.labels, label_points(model, room.xyz)

# -- training --------------------------------------------------------------------------------------
def fit(config, task, source, device):
    """Trains and evaluates a network for a task -> the run's Log, with its closing row."""
    count = len(task.names)
    config = training.plan(config, count)
    if config.batch_size < 2 * WORLD:
        raise ValueError(f"--batch-size: expected {2 * WORLD} or more for BatchNorm, "
                         f"got {config.batch_size}")
    model = start_model(config, task, source, device)
    optimizer = training.adamw(model, config.lr, config.weight_decay)
    log = training.Log(config, model, task.names)
    if log.state:
        optimizer.load_state_dict(log.state["optimizer"])
    net = training.parallel(model, config)
    warmup = 10 * (count // config.batch_size)  # ten epochs
    metric = dict(classify="accuracy", parts="instance_miou").get(config.task)  # of every epoch
    metrics = {}

    # -- loop
    for epoch in range(log.epoch, config.epochs):
        net.train()
        for batch in training.epoch_batches(config, count, epoch, log.step):
            generator = training.seed_step(config.seed, log.step, device)
            lr = training.set_lr(optimizer, log.step, config, end=1e-6, warmup=warmup)
            xyz, *labels = task.sample(batch, log.step, generator)
            xyz = augment(xyz, config, generator)
            xyz, labels, *category = (part[RANK::WORLD] for part in (xyz, *labels))
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = net(xyz, *category).float()  # (B, classes) or (B, N, labels)
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), task.weight)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10)  # as published
            optimizer.step()
            log.add(loss=loss, grad_norm=grad_norm, lr=lr)
        metrics = task.evaluate(model) if metric and RANK == 0 else {}
        log.end_epoch(optimizer, metrics)

    if RANK == 0:
        metrics = metrics or task.evaluate(model)  # the last epoch's, where there was one
        metrics = {**metrics, **task.finish(model, log.out)}
        clouds.write_chart(log.out / "loss.svg", log.rows)
        if metric and log.rows:
            best = max([row for row in log.rows if metric in row], key=lambda row: row[metric])
            metrics.update({f"best_{metric}": best[metric], "best_epoch": best["epoch"]})
        close(log, **metrics)
    return log

def close(log, **metrics):
    """The last row of a run, and the line of its results."""
    c = log.config
    log.close(task=c.task, checkpoint=c.checkpoint, seed=c.seed, **metrics)
    shown = [f"{name} {value:.2f}" for name, value in metrics.items() if isinstance(value, float)]
    print(f"{c.task}, {c.protocol}, {c.data}, augmentation {c.augment}:", ", ".join(shown))

def fewshot(config, data, sizes, source, device):
    """A run per fold in --out/fold_<k>; the mean and standard deviation of their last epochs."""
    accuracies = []
    for fold in range(FOLDS):
        if data:
            episode = draw_episode(data, config.way, config.shot, fold)
        else:
            path = Path(config.data) / f"{config.way}way_{config.shot}shot" / f"{fold}.pkl"
            episode = clouds.Dataset(path.name, *clouds.read_episode(path, config.way))
        own = replace(config, out=f"{config.out}/fold_{fold}")
        log = fit(own, Classification(own, episode, sizes, device), source, device)
        accuracies.append(log.rows[-1].get("accuracy"))
    if RANK == 0:
        log = training.Log(replace(log.config, out=config.out, resume=False), log.model, [])
        close(log, accuracy=np.mean(accuracies).item(), folds=accuracies,
              accuracy_std=np.std(accuracies, ddof=1).item())

def svm(config, task, source, device):
    """A linear SVM on the frozen features of all training clouds."""
    train, test, found = task.train, task.test, []
    model = start_model(config, task, source, device).eval()
    log = training.Log(config, model, task.names)
    for split in (train, test):
        found += of_each_cloud(lambda xyz: features(model, xyz), split, config.points)
    found, n = torch.stack(found), len(train)
    percent, C = training.svm_accuracy(found[:n], train.labels, found[n:], test.labels)
    close(log, accuracy=percent, C=C)
    if config.features:
        np.savez(config.features, features=found.cpu(), names=train.names + test.names,
                 labels=torch.cat([train.labels, test.labels]).cpu(), class_names=task.classes,
                 split=np.repeat(["train", "test"], [n, len(test)]))

# -- prediction ------------------------------------------------------------------------------------
def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)

def write_legend(path, c):
    """The labels of a Segmenter, and their colours -> names, colours (labels, 3) uint8."""
    names, colors = c.class_names, np.uint8(255 * clouds.palette(c.num_parts))
    if c.num_categories:
        names = [f"part {i}" for i in range(c.num_parts)]
        for category, (first, last) in zip(c.class_names, c.part_ranges):
            names[first:last] = [f"{category} part {i}" for i in range(first, last)]
    rows = [("#%02x%02x%02x" % tuple(color), name) for color, name in zip(colors, names)]
    write_csv(path, [("colour", "name"), *rows])
    return names, colors

def label_file(config, model, path, names, colors):
    """Writes a cloud and its points' labels as .npz and coloured .ply -> the shares of labels."""
    c, xyz, category = model.config, clouds.read_points(path), None
    if c.num_categories:
        name = config.category or path.resolve().parent.name
        if name not in c.class_names:
            raise ValueError(f"{path}: expected --category, one of {c.class_names}, got {name}")
        category = c.class_names.index(name)
    labels = label_points(model, xyz, category)
    parts = [part for part in path.parts if part not in ("..", path.anchor)]
    target = Path(config.out, "-".join(parts))
    np.savez(f"{target}.npz", points=xyz, labels=labels, label_names=names)
    clouds.write_ply(f"{target}.ply", xyz, colors[labels])
    shares = np.bincount(labels) / len(labels)
    return ", ".join(f"{names[i]} {share:.0%}" for i, share in enumerate(shares) if share)

@torch.no_grad()
def predict(config, device):
    """--predict: a table and predictions.csv of classes, or each cloud with its labels; --features.
    A file that cannot be read is named and left out; then the exit code is 2."""
    kinds = act.Classifier, act.Student if config.features else act.Segmenter
    model, files, rows, failed = training.load(config.checkpoint, device, *kinds), [], [], 0
    c, kind = model.config, type(model).__name__
    if config.points:  # with as many points to a patch
        vars(c).update(encoder_sizes(config, model))
    if kind == "Classifier" and not c.class_names:  # official files do not name them
        c.class_names = [f"class {i}" for i in range(c.num_classes)]
    if kind == "Segmenter" and not c.class_names:
        c.normalized = c.num_categories > 0
        c.class_names = list(clouds.SHAPENET_PARTS if c.normalized else clouds.S3DIS_CLASSES)
        c.part_ranges = list(clouds.SHAPENET_PARTS.values())
    names = getattr(c, "class_names", [])
    for path in config.predict:  # links are followed
        below = map(Path, sorted(glob.glob(f"{glob.escape(path)}/**", recursive=True)))
        found = [file for file in below if file.suffix.lower() in clouds.READERS and
                 (file.suffix.lower() != ".txt" or clouds.holds_points(file))]
        files += found or [Path(path)]
    Path(config.out).mkdir(parents=True, exist_ok=True)
    legend = write_legend(Path(config.out, "labels.csv"), c) if kind == "Segmenter" else ()
    for file in files:
        try:
            if kind == "Segmenter":
                shown = label_file(config, model, file, *legend)
            else:
                xyz = clouds.read_cloud(file, c.points, c.normalized)
                least, count = max(c.num_group, c.group_size), len(np.unique(xyz, axis=0))
                if count < least:
                    raise ValueError(f"{file}: expected {least} different points, got {count}")
                vector = features(model, xyz[None])
                values = model.head(vector)[0].softmax(dim=0).tolist() if names else []
                best = sorted(zip(values, names), reverse=True)[:2]
                shown = ", ".join(f"{name} {value:.3f}" for value, name in best)
                above = [folder.name for folder in file.resolve().parents[:2]]  # <class>/test/a.ply
                known = [names.index(name) for name in above if name in names]
                rows.append((str(file), (known + [-1])[0], vector.cpu(), values))
            print(f"{file}  {shown}", flush=True)
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            failed += 1
    if rows:
        done, labels, vectors, values = zip(*rows)
        if config.features:
            np.savez(config.features, features=torch.cat(vectors), names=done, labels=labels,
                     class_names=names)
        if names:
            best = np.argmax(values, axis=1)
            table = [(file, names[i], *row) for file, i, row in zip(done, best, values)]
            write_csv(Path(config.out, "predictions.csv"), [("file", "label", *names), *table])
            hits = [i == label for i, label in zip(best, labels) if label >= 0]
            shown = f"accuracy {100 * np.mean(hits):.2f} % of {len(hits)}" if hits else "no"
            print(f"{shown} clouds in class folders")
    if failed:
        raise ValueError(f"--predict: expected {len(files)} readable clouds, {failed} are not")

# -- main ------------------------------------------------------------------------------------------
def main(config):
    given = config
    config, device = training.setup(config, defaults(config))
    if config.predict:
        return predict(replace(config, points=given.points), device) if RANK == 0 else None
    source = None
    if config.checkpoint != "none":
        if not Path(config.checkpoint).exists():
            raise ValueError(f"{config.checkpoint}: no such --checkpoint; run train_student.py")
        kinds = act.Student, act.Classifier, act.Segmenter
        source = training.load(config.checkpoint, "cpu", *kinds)

    # -- data
    if config.task == "fewshot" and any(Path(config.data).glob("*way_*shot")):
        data = None  # published: a file for each episode
    elif config.task == "scene":
        data = clouds.open_rooms(config.data, config.area, density=0.6 * config.points)
    elif config.task == "parts":
        data = clouds.open_parts(config.data, config.cache or None)
    else:
        data = clouds.open_dataset(config.data, config.cache or None, config.variant, config.area)
    print(clouds.describe(data) if data else f"{config.data}: published episodes")
    scanned = data is not None and data.name.startswith("ScanObjectNN")
    if given.points is None and config.task == "svm" and source:
        config = replace(config, points=source.config.points)
    elif given.points is None and scanned and config.size != "tiny":
        config = replace(config, points=2048)  # as published
    rotated = config.task == "classify" and (scanned or config.data == "synthetic")
    auto = "rotate" if rotated else "scale_translate"
    config = replace(config, augment=config.augment.replace("auto", auto))
    sizes = encoder_sizes(config, source, given.size)
    print(f"{config.task} on {device} x {WORLD}, {config.precision}, size {config.size}, "
          f"augmentation {config.augment}")
    if config.task == "fewshot":
        return fewshot(config, data, sizes, source, device)
    task = dict(parts=Parts, scene=Scenes).get(config.task, Classification)
    task = task(config, data, sizes, device)
    if config.task == "svm":
        return svm(config, task, source, device) if RANK == 0 else None
    fit(config, task, source, device)

if __name__ == "__main__":
    training.run_script(main, Config, __doc__)
