"""Downstream tasks (Sec. 5): what a pretrained student is worth on labelled clouds. Every task runs with no data at all.

    python finetune.py                                                # after train_student.py: classify the embedded shapes
    python finetune.py --protocol linear                              # encoder frozen; --checkpoint none: from scratch
    python finetune.py --task fewshot --way 5 --shot 10 --fold all    # ten episodes, mean ± std
    python finetune.py --task svm                                     # linear SVM on frozen features
    python finetune.py --task parts                                   # part segmentation; --task scene: rooms
    python finetune.py --data ScanObjectNN --variant PB_T50_RS --size base --checkpoint student.pth      # the published run
    python finetune.py --data ModelNet40 --vote 10 --size base        # .txt folder, .dat cache or .off meshes
    python finetune.py --task scene --data S3DIS --area 5 --size base # and --task parts --data ShapeNetPart
    python finetune.py --predict my_clouds --checkpoint runs/finetune/last.pt     # label your own clouds; --features f.npz
    torchrun --nproc_per_node=8 finetune.py --data ModelNet40 --size base         # the same batch on 8 GPUs

--data is recognised by looking: 'synthetic'; a ScanObjectNN, ModelNet40, few-shot, ShapeNetPart or S3DIS root as published;
one train and one test .h5 (`data` (n, P, 3), `label` (n,)); a labelled folder of clouds; an .npz (`points` (n, P, 3) and
`labels`, or train_points, train_labels, test_points, test_labels; `classes` if you like).
Leaves last.pt, metrics.jsonl, config.json, loss.png and confusion.png, parts.png or scene.png in --out.
"""

import hashlib
import json
import math
import pickle
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import act
import clouds as shapes
import training
from training import flag, say

# -- config -----------------------------------------------------------------------------------------------------------
DEFAULTS = {  # task, size: epochs and batch of a default run; base is the published one
    task: {size: dict(epochs=n, batch_size=batch) for size, n in zip(("tiny", "small", "base"), epochs)}
    for task, batch, epochs in (("classify", 32, (8, 50, 300)), ("fewshot", 32, (20, 50, 150)), ("svm", 32, (1, 1, 1)),
                                ("parts", 16, (2, 30, 300)), ("scene", 32, (2, 10, 60)))}
SCAN_FILES = {"OBJ_BG": ("main_split", "objectdataset.h5"), "OBJ_ONLY": ("main_split_nobg", "objectdataset.h5"),
              "PB_T50_RS": ("main_split", "objectdataset_augmentedrot_scale75.h5")}
SCAN_CLASSES = "bag bin box cabinet chair desk display door shelf table bed pillow sink sofa toilet".split()
SHAPENET_PARTS = {  # category -> (first, last + 1) of its parts
    "Airplane": (0, 4), "Bag": (4, 6), "Cap": (6, 8), "Car": (8, 12), "Chair": (12, 16), "Earphone": (16, 19),
    "Guitar": (19, 22), "Knife": (22, 24), "Lamp": (24, 28), "Laptop": (28, 30), "Motorbike": (30, 36), "Mug": (36, 38),
    "Pistol": (38, 41), "Rocket": (41, 44), "Skateboard": (44, 47), "Table": (47, 50)}
S3DIS_CLASSES = "ceiling floor wall beam column window door table chair sofa bookcase board clutter".split()
ROOM_CLASSES = "ceiling floor wall table chair sofa bed bookshelf lamp".split()  # of the embedded rooms
QUERIES, FOLDS = 20, 10  # test clouds per class of a few-shot episode; episodes


@dataclass
class Config(training.RunConfig):
    out: str = flag("runs/finetune", "folder of the run's checkpoint, log, configuration and pictures")
    data: str = flag("synthetic", "'synthetic' (embedded shapes, compositions, rooms) or a labelled set", group="data")
    variant: str = flag("PB_T50_RS", "of ScanObjectNN", "all three", tuple(SCAN_FILES), group="data")
    area: int = flag(5, "the area of S3DIS, or of the embedded rooms, that is held out", 5, group="data")
    augment: str = flag("auto", "auto (the data set's published one), rotate, scale_translate or none", "auto",
                        ("auto", "rotate", "scale_translate", "none"), group="data")
    task: str = flag("classify", "classify, fewshot, svm, parts or scene", choices=tuple(DEFAULTS))
    protocol: str = flag("full", "full: all is trained; mlp3, linear: that head alone, on a frozen encoder", "all three",
                         ("full", "mlp3", "linear"), group="model")
    checkpoint: str = flag("runs/student/last.pt", "a student, ours or the release's; none: from scratch", group="model")
    lr: float = flag(0.0, "peak learning rate; 0: 5e-4; frozen encoder 1e-3; parts and scene 2e-4", group="training")
    weight_decay: float = flag(0.05, "AdamW's weight decay", 0.05, group="training")
    clip: float = flag(10.0, "largest norm of the gradient", 10, group="training")
    vote: int = flag(0, "classify: also by the mean logits of so many augmented draws", 10, group="evaluation")
    way: int = flag(5, "classes of a few-shot episode", "5, 10", group="evaluation")
    shot: int = flag(10, "training clouds per class of a few-shot episode", "10, 20", group="evaluation")
    fold: str = flag("all", f"the episode, 0 to {FOLDS - 1}, or all", "all", group="evaluation")
    predict: str = flag("", "label this cloud or folder of clouds with --checkpoint, train nothing", group="prediction")
    category: str = flag("", "what the clouds to --predict parts of are (default: their folder's name)", group="prediction")
    features: str = flag("", "with --predict or --task svm: write the (B, 2 C) features to this .npz", group="prediction")


# -- data: the published labelled layouts -----------------------------------------------------------------------------

@contextmanager
def naming(path):
    """A file that is missing or broken is a ValueError of one line that begins with its name."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    try:
        yield
    except (ValueError, *shapes.BROKEN, pickle.UnpicklingError, AttributeError, TypeError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def labelled(path, arrays, labels, classes=None, normalized=True):
    """Arrays (P, 3 or more columns) and a label for each, from the file `path`, checked -> Clouds."""
    labels = np.asarray(labels)
    if len(arrays) == 0 or labels.size != len(arrays) or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: found {len(arrays)} clouds and {labels.size} labels of type {labels.dtype}, "
                         "wanted some clouds and a whole number for each")
    classes = classes or [f"class {i}" for i in range(labels.max() + 1)]
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"{path}: found labels {labels.min()} to {labels.max()}, wanted 0 to {len(classes) - 1}")
    for i, array in enumerate(arrays):
        if np.ndim(array) != 2 or array.shape[1] < 3 or not len(array) or array.dtype.kind not in "fiu":
            raise ValueError(f"{path}: cloud {i} has shape {np.shape(array)}, wanted numbers (points, 3)")
        if not np.isfinite(array[:, :3]).all():
            raise ValueError(f"{path}: cloud {i} has coordinates that are NaN or infinite")
    points = torch.from_numpy(np.concatenate([np.asarray(array[:, :3], np.float32) for array in arrays]))
    offsets, labels = torch.tensor([0, *map(len, arrays)]).cumsum(0), torch.from_numpy(labels.astype(np.int64).ravel())
    names = [f"{Path(path).stem}_{i:05d}" for i in range(len(arrays))]
    return shapes.Clouds(points, offsets, names, labels, list(classes), normalized=normalized)


def select(clouds, chosen):
    """The clouds numbered `chosen`, in that order, as Clouds."""
    chosen = [int(i) for i in chosen]
    flat = torch.cat([torch.arange(clouds.offsets[i], clouds.offsets[i + 1]) for i in chosen])
    return replace(clouds, points=clouds.points[flat], offsets=F.pad(clouds.offsets.diff()[chosen].cumsum(0), (1, 0)),
                   names=[clouds.names[i] for i in chosen], labels=clouds.labels[chosen],
                   parts=None if clouds.parts is None else clouds.parts[flat])


def read_h5(path, classes=None, normalized=True):
    """`data` (n, P, 3) and `label` (n,) of an HDF5 file, as ScanObjectNN's."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{path}: reading .h5 needs h5py: pip install h5py") from error
    with naming(path), h5py.File(path, "r") as file:
        if not {"data", "label"} <= set(file):
            raise ValueError(f"found {', '.join(file) or 'nothing'}, wanted data and label")
        return labelled(path, file["data"][:], file["label"][:], classes, normalized)


class StoredType:
    """Stands in for a pickled dtype, which numpy would let lie about its memory: plain numbers only."""

    def __init__(self, code, *rest):
        if not re.fullmatch("[fiub][1248]", code):
            raise ValueError(f"holds an array of type {code!r}, wanted numbers")
        self.code = code

    def __setstate__(self, state):
        self.code = (state[1] if state[1] in ("<", ">") else "") + self.code


class StoredArray(np.ndarray):
    def __setstate__(self, state):
        *head, dtype, fortran, data = state
        super().__setstate__((*head, np.dtype(dtype.code), fortran, data))


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy's arrays (1's and 2's names) and plain values; nothing else is looked up, so nothing runs."""
    ADMITTED = {
        "numpy.dtype": StoredType, "numpy.ndarray": "ndarray",  # the latter only as an argument of the next
        "numpy.core.multiarray._reconstruct": lambda *kind: StoredArray.__new__(StoredArray, 0),
        "numpy.core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype.code)[0],
        "numpy.core.numeric._frombuffer":  # protocol 5
            lambda data, dtype, shape, order: np.frombuffer(data, dtype.code).reshape(shape, order=order),
        "_codecs.encode": lambda text, encoding: text.encode("latin-1")}  # bytes in old protocols

    def find_class(self, module, name):
        known = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if known not in self.ADMITTED:
            raise ValueError(f"refers to {module}.{name}, wanted arrays and plain values only")
        return self.ADMITTED[known]


def read_pickle(path):
    """A pickle of arrays, lists, dicts and plain values; Python 2's too. Runs nothing from the file."""
    with naming(path), open(path, "rb") as file:
        return ArrayUnpickler(file, encoding="latin1").load()


def read_dat(path, classes):
    """ModelNet's cache: [list of (8192, 6), list of (1,) labels]."""
    content = read_pickle(path)
    with naming(path):
        if not isinstance(content, (list, tuple)) or len(content) != 2:
            raise ValueError(f"found a {type(content).__name__}, wanted [list of clouds, list of labels]")
        return labelled(path, *content, classes)


def read_episode(path, way):
    """(train, test) of a published few-shot fold, a pickle of {"train": [(points, label, class)], "test": […]}."""
    content, classes = read_pickle(path), [f"class {i}" for i in range(way)]
    with naming(path):
        if not isinstance(content, dict) or not {"train", "test"} <= set(content):
            raise ValueError(f"found a {type(content).__name__}, wanted a dict with train and test")
        return [labelled(path, [entry[0] for entry in content[split]], [int(entry[1]) for entry in content[split]], classes)
                for split in ("train", "test")]


def read_modelnet(root, split, classes, cache):
    """ModelNet40's published .txt folder: modelnet40_<split>.txt, a name a line, and <class>/<name>.txt."""
    lists = root / f"modelnet40_{split}.txt"
    with naming(lists):
        names = lists.read_text().split()
        kinds = [name.rpartition("_")[0] for name in names]
        files = [f"{kind}/{name}.txt" for kind, name in zip(kinds, names)]
        for name, kind, file in zip(names, kinds, files):
            if kind not in classes or not (root / file).is_file():
                raise ValueError(f"lists {name}, wanted the file {root / file}, of a class in modelnet40_shape_names.txt")
        points, offsets = map(torch.from_numpy, shapes.cached_points(str(root), files, cache))
    return shapes.Clouds(points, offsets, names, torch.tensor([*map(classes.index, kinds)]), classes)


def read_npz(path):
    """(train, test) of a user's .npz; where it has no split, a fifth by a hash of the clouds' numbers is for testing."""
    with naming(path), np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
        classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
        if {"train_points", "train_labels", "test_points", "test_labels"} <= set(arrays):
            return [labelled(path, arrays[f"{s}_points"], arrays[f"{s}_labels"], classes) for s in ("train", "test")]
        if not {"points", "labels"} <= set(arrays):
            raise ValueError(f"found {', '.join(arrays)}, wanted points and labels, or train_points, train_labels, "
                             "test_points and test_labels")
        clouds = labelled(path, arrays["points"], arrays["labels"], classes)
        if len(clouds) < 2:
            raise ValueError("found one cloud, wanted at least two: one to train on, one to test on")
    order = sorted(range(len(clouds)), key=lambda i: hashlib.sha256(clouds.names[i].encode()).digest())
    held_out = max(1, len(clouds) // 5)
    return select(clouds, sorted(order[held_out:])), select(clouds, sorted(order[:held_out]))


def open_labelled(config):
    """(name of the data set, train, test) of --data, recognised by looking; train is None where folds are published."""
    path, cache, splits = Path(config.data), config.cache or None, ("train", "test")
    if config.data == "synthetic":
        return "embedded shapes", shapes.synthetic_clouds(50, seed=0), shapes.synthetic_clouds(20, seed=1)
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder")
    if config.task == "fewshot" and (path / f"{config.way}way_{config.shot}shot").is_dir():
        return "few-shot ModelNet40", None, None
    if any((path / folder).is_dir() for folder, _ in SCAN_FILES.values()) or list(path.glob("training_objectdataset*.h5")):
        folder, file = SCAN_FILES[config.variant]
        path = (path / folder if (path / folder).is_dir() else path) / f"training_{file}"
    h5 = sorted(path.glob("*train*.h5")) if path.is_dir() else [path] * path.match("*train*.h5")
    caches, names, name = list(path.glob("*_fps.dat")), path / "modelnet40_shape_names.txt", path.name
    if caches or names.is_file():
        name, classes = "ModelNet40", names.read_text().split() if names.is_file() else None
        train, test = (read_dat(path / f"modelnet40_{split}_8192pts_fps.dat", classes) if caches else
                       read_modelnet(path, split, classes, cache) for split in splits)
    elif h5:
        if len(h5) > 1:
            raise ValueError(f"--data {path}: found {', '.join(file.name for file in h5)}, wanted one; give its own path")
        scan = h5[0].name.startswith("training_objectdataset")  # used as stored, not normalised
        name, pair = "ScanObjectNN" if scan else name, (h5[0], h5[0].with_name(re.sub("train(ing)?", "test", h5[0].name)))
        train, test = (read_h5(file, SCAN_CLASSES if scan else None, not scan) for file in pair)
    elif path.suffix == ".npz":
        train, test = read_npz(path)
    elif path.is_dir():
        train, test = (shapes.open_clouds(path, split, cache) for split in splits)
    else:
        raise ValueError(f"--data {path}: wanted a folder, an .npz or the …train….h5 of a pair")
    if train.labels is None or test.labels is None:
        raise ValueError(f"--data {path}: the clouds have no classes, wanted one sub-folder for each")
    classes = max(train.classes, test.classes, key=len)
    return name, replace(train, classes=classes), replace(test, classes=classes)


def draw_episode(train, test, way, shot, fold):
    """(train, test) of an episode: `way` classes, `shot` training and at most QUERIES test clouds of each."""
    rng, out = np.random.default_rng([way, shot, fold]), []  # whatever --seed is: an episode is part of the data
    members = [[np.flatnonzero(clouds.labels.numpy() == c) for c in range(len(train.classes))] for clouds in (train, test)]
    able = [c for c, (taught, asked) in enumerate(zip(*members)) if len(taught) >= shot and len(asked)]
    if len(able) < way:
        raise ValueError(f"--way {way} --shot {shot}: only {len(able)} classes have {shot} training clouds "
                         "and a test cloud")
    chosen = rng.permutation(able)[:way]
    for clouds, own, count in zip((train, test), members, (shot, QUERIES)):
        drawn = [rng.permutation(own[c])[:count] for c in chosen]
        labels = torch.arange(way).repeat_interleave(torch.tensor([*map(len, drawn)]))
        classes = [train.classes[c] for c in chosen]
        out.append(replace(select(clouds, np.concatenate(drawn)), labels=labels, classes=classes))
    return out


def read_shapenet_part(root):
    """(train + val, test) of ShapeNetPart in its published layout, with parts."""
    table, out = root / "synsetoffset2category.txt", []
    with naming(table):
        rows = [line.split() for line in table.read_text().splitlines() if line.strip()] or [["nothing"]]
        for row in rows:
            if len(row) != 2 or row[0] not in SHAPENET_PARTS:
                raise ValueError(f"found {' '.join(row)!r}, wanted lines of a category of ShapeNetPart and its synset")
    classes, synsets = map(list, zip(*rows))
    for splits in (("train", "val"), ("test",)):
        labels, files, arrays = [], [], []
        for lists in [root / "train_test_split" / f"shuffled_{split}_file_list.json" for split in splits]:
            with naming(lists):
                for synset, model in [entry.split("/")[-2:] for entry in json.loads(lists.read_text())]:
                    labels.append(synsets.index(synset))
                    files.append(root / synset / f"{model}.txt")
        for path, label in zip(files, labels):
            first, last = SHAPENET_PARTS[classes[label]]
            with naming(path):
                array = np.loadtxt(path, ndmin=2)
                part = array[:, -1]
                if array.shape[1] != 7 or not first <= part.min() <= part.max() < last:
                    raise ValueError(f"{array.shape[1]} columns, the last {part.min():g} to {part.max():g}, "
                                     f"wanted 7, the last a part of a {classes[label]}: {first} to {last - 1}")
                arrays.append(array[:, [0, 1, 2, 6]])
        parts = torch.from_numpy(np.concatenate([array[:, 3].astype(np.int64) for array in arrays]))
        ranges = [SHAPENET_PARTS[name] for name in classes]
        out.append(replace(labelled(root, arrays, labels, classes), parts=parts, class_parts=ranges))
    return out


def compositions(clouds):
    """Of the embedded shapes those made of several parts, classes and parts numbered anew."""
    ranges = torch.tensor(clouds.class_parts)
    kept = (ranges.diff() > 1).nonzero()[:, 0]  # classes
    parts = torch.cat([torch.arange(*ranges[c]) for c in kept])
    chosen = select(clouds, torch.isin(clouds.labels, kept).nonzero())
    return replace(chosen, labels=torch.searchsorted(kept, chosen.labels), parts=torch.searchsorted(parts, chosen.parts),
                   classes=[clouds.classes[c] for c in kept], class_parts=torch.searchsorted(parts, ranges[kept]).tolist())


def open_parts(config):
    """(name of the data set, train, test) of --data for part segmentation."""
    if config.data != "synthetic":
        return "ShapeNetPart", *read_shapenet_part(Path(config.data))
    return "embedded compositions", *(compositions(shapes.synthetic_clouds(n, seed)) for seed, n in enumerate((50, 20)))


class Room(NamedTuple):
    """A whole room, z up, in metres."""
    area: int
    name: str
    xyz: np.ndarray  # (n, 3) float32
    labels: np.ndarray  # (n,) uint8


def read_room(path):
    """A room of S3DIS: Area_<a>_<room>.npy, (n, 7) = x y z r g b label."""
    with naming(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or array.shape[1] != 7 or not len(array) or array.dtype.kind not in "fiu":
            raise ValueError(f"found an array of shape {array.shape}, wanted (n, 7): x y z r g b label")
        xyz, labels = np.array(array[:, :3], np.float32), np.array(array[:, 6])
        if not np.isfinite(xyz).all() or not ((labels >= 0) & (labels < len(S3DIS_CLASSES))).all():
            raise ValueError("found coordinates that are not finite or labels beyond 0 to 12, wanted neither")
        return Room(int(path.stem.split("_")[1]), path.stem, xyz, labels.astype(np.uint8))


def synthetic_room(density, rng):
    """An embedded room, `density` points per m²: points (n, 3), labels (n,) into ROOM_CLASSES, boxes of its objects.

    Floor, ceiling, four walls, and up to seven pieces of furniture that stand on the floor, turned, and do not overlap;
    a box is (class, lowest (3,), highest (3,)).
    """
    size, pieces, boxes = np.append(rng.uniform(2.5, 4, 2), rng.uniform(2.3, 2.8)), [], []
    for label, axis, far in ((0, 2, 1), (1, 2, 0), (2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)):
        plane = rng.random((int(density * np.delete(size, axis).prod()), 3)) * size
        plane[:, axis] = far * size[axis]
        pieces.append((label, plane))
    for _ in range(rng.integers(4, 8)):
        label = int(rng.integers(3, len(ROOM_CLASSES)))
        x, z, y = 0.6 * shapes.synthetic_cloud(ROOM_CLASSES[label], int(2.5 * density), rng)[0].T  # the shapes have y up
        turn = rng.uniform(0, 2 * math.pi)
        xyz = np.stack([math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y, z], 1)
        xyz -= xyz.min(0)
        free = size - xyz.max(0)
        for _ in range(20 if (free > 0.1).all() else 0):
            low = np.append(rng.uniform(0.05, free[:2] - 0.05 + 1e-9), 0)
            high = low + xyz.max(0)
            if all((high[:2] < b[:2]).any() or (t[:2] < low[:2]).any() for _, b, t in boxes):
                pieces.append((label, xyz + low))
                boxes.append((label, low, high))
                break
    labels = np.concatenate([np.full(len(xyz), label, np.uint8) for label, xyz in pieces])
    points = np.concatenate([xyz for _, xyz in pieces])
    return (points + 0.01 * rng.normal(size=points.shape)).astype(np.float32), labels, boxes


def open_rooms(config):
    """(train, test) Rooms: those of --area are held out; embedded: three in each of six areas, as dense as blocks want."""
    if config.data == "synthetic":
        rooms = [Room(a, f"Area_{a}_room_{i}", *synthetic_room(0.6 * config.points, np.random.default_rng([a, i]))[:2])
                 for a in range(1, 7) for i in range(1, 4)]
    else:
        rooms = [read_room(path) for path in sorted(Path(config.data).glob("Area_*_*.npy"))]
    if not rooms:
        raise ValueError(f"--data {config.data}: found no rooms, wanted Area_<number>_<room>.npy")
    train, test = ([room for room in rooms if (room.area == config.area) == held_out] for held_out in (False, True))
    if not train or not test:
        raise ValueError(f"--area {config.area}: found the areas {sorted({r.area for r in rooms})}, wanted one of several")
    return train, test


# -- clouds as the networks take them ---------------------------------------------------------------------------------

def thin(clouds, num_points, device):
    """Each cloud's farthest points, 75/64 of num_points or all there are: 1200 to draw 1024 of, 2400 for 2048 (Sec. 5).

    They come in the order found: a test cloud is judged by the first num_points. One of no more than those stays as it is.
    """
    kept = []
    for rows in torch.arange(len(clouds)).split(64):
        start, sizes = clouds.offsets[rows], clouds.offsets.diff()[rows]
        width = 1 << (int(sizes.max()) - 1).bit_length()  # few different widths: a GPU captures a graph for each
        position = torch.arange(width)
        order = index = start[:, None] + torch.where(position < sizes[:, None], position, 0)  # (64, width)
        if width > num_points:
            farthest = act.farthest_point_sample(clouds.points[index].to(device), min(num_points * 75 // 64, width))
            order = index.gather(1, farthest.cpu())
        kept += [(own if size <= num_points else far)[:size] for own, far, size in zip(index, order, sizes.tolist())]
    offsets = torch.tensor([0, *map(len, kept)]).cumsum(0)
    return replace(clouds, points=clouds.points[torch.cat(kept)], offsets=offsets, parts=None).to(device)


def first_points(clouds, indices, num_points):
    """The first num_points of each cloud, a smaller one repeated, normalised if the set is: (B,) -> (B, num_points, 3)."""
    start, size = clouds.offsets[indices], clouds.offsets.diff()[indices]
    xyz = clouds.points[start[:, None] + torch.arange(num_points, device=start.device) % size[:, None]]
    return shapes.unit_sphere(xyz) if clouds.normalized else xyz


def draw_repeated(clouds, indices, num_points, generator):
    """num_points of each cloud with replacement, ShapeNetPart's rule, normalised -> xyz (B, N, 3), parts (B, N)."""
    start, size = clouds.offsets[indices][:, None], clouds.offsets.diff()[indices][:, None]
    turn = (torch.rand(len(indices), num_points, generator=generator, device=start.device) * size).long()
    flat = start + turn.minimum(size - 1)
    return shapes.unit_sphere(clouds.points[flat]), clouds.parts[flat]


def augment(xyz, kind, generator, task="classify"):
    """The named augmentation of (B, N, 3); rooms turn about z; parts and rooms are scaled less, alike on all axes."""
    if kind == "none":
        return xyz
    if kind == "rotate":
        return shapes.rotate_y(xyz.roll(-1, 2), generator).roll(1, 2) if task == "scene" else shapes.rotate_y(xyz, generator)
    return shapes.scale_translate(xyz, generator, *(((0.8, 1.25), 0.1, False) if task in ("parts", "scene") else ()))


# -- metrics ----------------------------------------------------------------------------------------------------------

def confusion(truth, predicted, num_classes):
    """Counts (classes, classes): a row for each true class, a column for each predicted one."""
    pair = torch.as_tensor(truth).long().cpu() * num_classes + torch.as_tensor(predicted).long().cpu()
    return torch.bincount(pair.flatten(), minlength=num_classes**2).view(num_classes, num_classes)


def accuracy(matrix):
    """(overall, mean over the classes that occur) accuracy in percent, of counts (classes, classes)."""
    hits, count = matrix.diag().double(), matrix.sum(1)
    return 100 * (hits.sum() / count.sum()).item(), 100 * (hits / count)[count > 0].mean().item()


def iou(matrix):
    """Intersection over union of each class in percent, (classes,), NaN for one in neither truth nor prediction."""
    return 100 * matrix.diag().double() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())


def shape_iou(truth, predicted, parts):
    """Mean IoU in percent over the parts range(*parts) of a shape's category; one in neither truth nor answer is 100."""
    first, last = parts
    inside = (predicted >= first) & (predicted < last)  # what is called a foreign part is in no union but its truth's
    matrix = confusion(truth - first, torch.where(inside, predicted - first, last - first), last - first + 1)
    return iou(matrix)[:-1].nan_to_num(100.0).mean().item()


# -- model ------------------------------------------------------------------------------------------------------------

def start_model(config, build, device):
    """build(sizes) -> a network, its encoder and sizes those of --checkpoint; says what is loaded and what is fresh.

    A patch for every 16 points, as in the paper, of the size the checkpoint was trained with.
    """
    sizes, path = dict(training.SIZES[config.size]["encoder"], num_group=config.points // 16), config.checkpoint
    torch.manual_seed(config.seed)
    if path == "none":
        model = build(sizes)
        say(f"from scratch: all {len(model.state_dict())} tensors of the {type(model).__name__} are fresh")
        return model.to(device)
    if not Path(path).is_file():
        raise ValueError(f"--checkpoint {path}: no such file; train_student.py writes one, none starts from scratch")
    with warnings.catch_warnings(record=True) as said:  # load warns where a file has no class token
        warnings.simplefilter("always")
        source = act.load(path)
    if isinstance(source, act.Teacher):
        raise ValueError(f"--checkpoint {path}: holds a Teacher, wanted a Student, Classifier or Segmenter")
    for name in ("width", "depth", "num_heads", "encoder_dims", "drop_path", "group_size"):
        sizes[name] = getattr(source.config, name)
    torch.manual_seed(config.seed)  # again, for the file's network drew numbers of its own
    model, of_file = build(sizes), source.encoder.state_dict()
    wanted = model.encoder.state_dict()
    given = {k: v for k, v in of_file.items() if k in wanted and not (said and k.startswith("cls_"))}
    fresh = [name for name in ("cls_token", "cls_pos") if name in wanted and name not in given]
    act.load_exactly(model.encoder, given, path, fresh)
    fresh += sorted(name for name, _ in model.named_children() if name != "encoder")
    unused = sorted({key.split(".")[0] for key in source.state_dict()} - {"encoder"} | of_file.keys() - wanted.keys())
    say(f"loaded the encoder, all {len(given)} tensors, from the {type(source).__name__} in {path}; "
        f"fresh: {', '.join(fresh)}; of the file not used: {', '.join(unused) or 'nothing'}")
    return model.to(device)


def features(model, xyz):
    """Frozen features [class token ; max] of a Student or Classifier: (B, N, 3) -> (B, 2 C)."""
    return act.global_feature(model.encoder(*act.group_points(xyz, model.config.num_group, model.config.group_size)))


# -- tasks: the loss of a step, the judgement, the picture -------------------------------------------------------------

class Classification:
    """Logits per cloud, trained and judged on the farthest points of each."""

    def __init__(self, config, device, train, test):
        self.config, self.device, self.classes = config, device, train.classes
        self.train, self.test = (thin(clouds, config.points, device) for clouds in (train, test))
        training.check_distinct(self.test, config.points // 16)
        self.extra = dict(task="classify", classes=self.classes, points=config.points, normalized=train.normalized)

    def build(self, sizes):
        head = "linear" if self.config.protocol == "linear" else "mlp3"
        model = act.Classifier(act.ClassifierConfig(**sizes, num_classes=len(self.classes), head=head))
        return model if self.config.protocol == "full" else model.freeze_encoder()

    def loss(self, net, step, indices, generator, share):
        xyz = augment(self.train.draw(indices, self.config.points, generator)[0], self.config.augment, generator)
        return F.cross_entropy(net(xyz[share]).float(), self.train.labels[indices.to(self.device)][share]), {}

    @torch.no_grad()
    def figures(self, model, draws=0):
        """Accuracies and confusion: by the test clouds' farthest points, or by the mean logits of augmented draws."""
        model.eval()
        logits = torch.zeros(len(self.test), len(self.classes), device=self.device)
        for indices in torch.arange(len(self.test), device=self.device).split(64):
            if not draws:
                logits[indices] = model(first_points(self.test, indices, self.config.points)).float()
            for draw in range(draws):
                generator = act.seeded(self.device, self.config.seed, "vote", draw, int(indices[0]))
                xyz = augment(self.test.draw(indices, self.config.points, generator)[0], self.config.augment, generator)
                logits[indices] += model(xyz).float()
        matrix = confusion(self.test.labels, logits.argmax(dim=1), len(self.classes))
        return dict(zip(("accuracy", "mean_accuracy"), accuracy(matrix))), matrix

    def evaluate(self, model):
        """After an epoch; a few-shot episode is judged after its last one only."""
        return {} if self.config.task == "fewshot" else self.figures(model)[0]

    def finish(self, model):
        figures, matrix = self.figures(model)
        if self.config.vote:
            figures.update({f"vote_{name}": value for name, value in self.figures(model, self.config.vote)[0].items()})
        title = f"{figures['accuracy']:.1f} % of {len(self.test)} clouds"
        return figures, [("confusion", shapes.plot_matrix(matrix.numpy(), self.classes, title))]


class Parts:
    """A part label per point, the object's category given."""

    def __init__(self, config, device, train, test):
        self.config, self.device, self.classes, self.ranges = config, device, train.classes, train.class_parts
        self.train, self.test = train.to(device), test.to(device)
        training.check_distinct(self.test, config.points // 16)
        part = torch.arange(max(last for _, last in self.ranges), device=device)
        self.allowed = torch.stack([(part >= first) & (part < last) for first, last in self.ranges])  # (categories, parts)
        self.extra = dict(task="parts", classes=self.classes, class_parts=self.ranges, points=config.points)

    def build(self, sizes):
        categories, parts = self.allowed.shape
        return act.Segmenter(act.SegmenterConfig(**sizes, num_parts=parts, num_categories=categories))

    def loss(self, net, step, indices, generator, share):
        indices = indices.to(self.device)
        xyz, parts = draw_repeated(self.train, indices, self.config.points, generator)
        logits = net(augment(xyz, self.config.augment, generator, "parts")[share], self.train.labels[indices][share])
        return F.cross_entropy(logits.float().flatten(0, 1), parts[share].flatten()), {}

    @torch.no_grad()
    def answers(self, model, indices):
        """Fixed draws of test clouds and the best of their category's parts: xyz (B, N, 3), truth and prediction (B, N)."""
        xyz, truth = draw_repeated(self.test, indices, self.config.points, act.seeded(self.device, "test", int(indices[0])))
        category = self.test.labels[indices]
        logits = model.eval()(xyz, category).float().masked_fill(~self.allowed[category][:, None], -math.inf)
        return xyz.cpu(), truth.cpu(), logits.argmax(dim=-1).cpu()

    def evaluate(self, model):
        batches, labels = torch.arange(len(self.test), device=self.device).split(32), self.test.labels.cpu()
        truth, predicted = map(torch.cat, zip(*(self.answers(model, indices)[1:] for indices in batches)))
        ious = [shape_iou(t, p, self.ranges[c]) for t, p, c in zip(truth, predicted, labels)]
        ious = torch.tensor(ious, dtype=torch.float64)
        each = torch.stack([ious[labels == c].mean() for c in labels.unique()])
        return dict(instance_miou=ious.mean().item(), class_miou=each.mean().item(),
                    accuracy=100 * (truth == predicted).double().mean().item())

    def finish(self, model):
        fixed = torch.arange(0, len(self.test), max(1, len(self.test) // 6), device=self.device)[:6]
        rows, labels = [], self.test.labels[fixed].tolist()
        for xyz, truth, predicted, label in zip(*self.answers(model, fixed), labels):
            first, last = self.ranges[label]
            rows.append([(xyz.numpy(), shapes.palette(last - first)[part.numpy() - first]) for part in (truth, predicted)])
        return self.evaluate(model), [("parts", (rows, ["truth", "prediction"], [self.classes[label] for label in labels]))]


class Blocks:
    """Training blocks of rooms; each room stands in the list once for every num_points of its points."""

    def __init__(self, rooms, num_points):
        self.num_points, self.rooms = num_points, []
        for room in rooms:
            order = room.xyz[:, 0].argsort(kind="stable")  # along x: a block is found in a slice
            self.rooms += [room._replace(xyz=room.xyz[order], labels=room.labels[order])] * max(1, len(order) // num_points)
        self.names = [f"{room.name}#{i}" for i, room in enumerate(self.rooms)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return torch.from_numpy(self.rooms[i].xyz)

    def draw(self, index, rng):
        """A 1 m x 1 m block about a random point, centred on it in x and y: xyz (num_points, 3), labels (num_points,).

        It holds more than num_points / 2 points (1024 of 2048, Sec. 5); fewer than num_points are drawn repeatedly.
        """
        _, name, xyz, labels = self.rooms[index]
        for _ in range(200):
            center = xyz[rng.integers(len(xyz)), :2]
            near = slice(*np.searchsorted(xyz[:, 0], [center[0] - 0.5, center[0] + 0.5]))
            inside = near.start + np.flatnonzero(abs(xyz[near, 1] - center[1]) <= 0.5)
            if len(inside) > self.num_points // 2:
                chosen = rng.choice(inside, self.num_points, replace=len(inside) < self.num_points)
                return xyz[chosen] - np.append(center, 0).astype(np.float32), labels[chosen]
        raise ValueError(f"{name}: of 200 random blocks of 1 m x 1 m (are its coordinates metres?) none holds more than "
                         f"{self.num_points // 2} of its {len(xyz)} points: lower --points")


def room_blocks(xyz):
    """1 m x 1 m blocks over a room, 0.5 m apart, the last flush with its walls: [(indices of the points, origin (3,))]."""
    low, high = xyz[:, :2].min(0).astype(np.float64), xyz[:, :2].max(0).astype(np.float64)
    last, blocks = np.maximum(low, high - 1), []
    xs, ys = (np.minimum(a + np.arange(math.ceil(2 * (b - a)) + 1) / 2, b) + 0.5 for a, b in zip(low, last))  # centres
    for x in xs:
        column = np.flatnonzero(abs(xyz[:, 0] - x) <= 0.501)  # rounding loses no point at a wall
        for y in ys:
            inside = column[abs(xyz[column, 1] - y) <= 0.501]
            if len(inside):
                blocks.append((inside, np.array([x, y, 0])))
    return blocks


@torch.no_grad()
def label_points(model, xyz, blocks, num_points, category=None):
    """Mean probabilities (n, classes) of every point of xyz (n, 3), over the blocks it lies in.

    Each block is cut at random into sets of num_points, the last filled up with points of the others. With a category the
    sets are normalised, as objects are; without, they are moved by the block's origin, as rooms are.
    """
    rng, device, sets = np.random.default_rng(0), next(model.parameters()).device, []
    for inside, origin in blocks:
        order = np.resize(rng.permutation(inside), (-(-len(inside) // num_points), num_points))
        sets += [(chosen, xyz[chosen] - origin) for chosen in order]
    votes = torch.zeros(len(xyz), model.config.num_parts, dtype=torch.float64)
    for first in range(0, len(sets), 16):
        chosen, points = (torch.from_numpy(np.stack(part)) for part in zip(*sets[first : first + 16]))
        points = (points.float() if category is None else shapes.unit_sphere(points)).to(device)
        logits = model.eval()(points, None if category is None else torch.full((len(points),), category, device=device))
        votes.index_add_(0, chosen.flatten(), logits.flatten(0, 1).double().softmax(dim=1).cpu())
    return votes / votes.sum(dim=1, keepdim=True)


class Scenes:
    """A class per point of whole rooms, trained on blocks of them."""

    def __init__(self, config, device, train, test):
        self.config, self.device, self.test, self.train = config, device, test, Blocks(train, config.points)
        self.classes = ROOM_CLASSES if config.data == "synthetic" else S3DIS_CLASSES
        count = np.bincount(np.concatenate([room.labels for room in train]), minlength=len(self.classes))
        self.weight = torch.tensor((count.max() / np.maximum(count, 1)) ** (1 / 3), dtype=torch.float32, device=device)
        self.extra = dict(task="scene", classes=self.classes, points=config.points)

    def build(self, sizes):
        return act.Segmenter(act.SegmenterConfig(**sizes, num_parts=len(self.classes), num_categories=0))

    def loss(self, net, step, indices, generator, share):
        drawn = [self.train.draw(i, np.random.default_rng([self.config.seed, step, i])) for i in indices.tolist()]
        xyz, labels = (torch.from_numpy(np.stack(part)).to(self.device) for part in zip(*drawn))
        logits, labels = net(augment(xyz, self.config.augment, generator, "scene")[share]), labels.long()
        total = F.cross_entropy(logits.float().flatten(0, 1), labels[share].flatten(), self.weight, reduction="sum")
        # the weighted mean over the whole batch, as a mean over the clouds of this process
        return total / self.weight[labels].sum() * len(labels) / len(labels[share]), {}

    def evaluate(self, model):
        return {}  # every point of every room takes long: after the last epoch only

    def finish(self, model):
        """Figures of all held-out rooms together, the table of classes, and two rooms without their ceiling and walls."""
        matrix, rows, colors = 0, [], shapes.palette(len(self.classes))
        for room in self.test:
            predicted = label_points(model, room.xyz, room_blocks(room.xyz), self.config.points).argmax(dim=1)
            matrix = matrix + confusion(room.labels, predicted, len(self.classes))
            if len(rows) < 2:
                shown = np.flatnonzero((room.labels != 0) & (room.labels != 2))
                shown = (shown if len(shown) > 1 else np.arange(len(predicted)))[:: len(predicted) // 30_000 + 1]
                up = shapes.normalize(room.xyz[shown][:, [0, 2, 1]] * [1, 1, -1])
                rows.append([(up, colors[labels[shown]]) for labels in (room.labels, predicted.numpy())])
        each, (overall, mean) = iou(matrix).tolist(), accuracy(matrix)
        say(f"{'class':12}{'IoU':>8}{'accuracy':>10}{'points':>12}")
        for label, value, hits, count in zip(self.classes, each, matrix.diag(), matrix.sum(1)):
            say(f"{label:12}{value:8.1f}{100 * hits / count:10.1f}{count:12d}")
        figures = dict(accuracy=overall, mean_accuracy=mean, miou=float(np.nanmean(each)))
        figures.update({f"iou_{label}": value for label, value in zip(self.classes, each)})
        return figures, [("scene", (rows, ["truth", "prediction"], [room.name for room in self.test[:2]]))]


# -- training ---------------------------------------------------------------------------------------------------------

def fit(config, task, rank):
    """Trains and judges a network for a task -> its figures, in process 0."""
    # -- model, optimizer, resume -------------------------------------------------------------------------------------
    if min(config.batch_size, len(task.train)) < 2:
        raise ValueError(f"--batch-size {config.batch_size} of {len(task.train)} clouds: BatchNorm wants at least 2")
    model = start_model(config, task.build, task.device)
    run = training.Run(config, model, task.train, config.weight_decay, config.clip, task.extra)

    # -- loop ---------------------------------------------------------------------------------------------------------
    def schedule(step):
        return dict(lr=training.learning_rate(step, run.total, config.lr, 1e-6, 10 * run.per_epoch))

    def finish_epoch(epoch):
        figures = task.evaluate(model) if rank == 0 else {}
        for name in list(figures)[:1]:  # the figure that tells the best epoch
            if figures[name] > run.extra.get(f"best_{name}", -1):
                run.extra.update({f"best_{name}": figures[name], "best_epoch": epoch})
        return figures

    run.train(schedule, task.loss, finish_epoch)
    if rank == 0:
        figures, pictures = task.finish(model)
        figures.update({name: value for name, value in run.extra.items() if name.startswith("best_")})
        run.close(pictures, **figures)
        return figures


def report(config, words, figures=None):
    """The closing line; with figures, of what is not one run of training, also the closing object of metrics.jsonl."""
    kind = f"{config.task}, protocol {config.protocol}" if config.task in ("classify", "fewshot") else config.task
    say(f"{kind}, {config.data}, " + f"augmentation {config.augment}: " * (config.task != "svm") + words)
    if figures:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        with open(Path(config.out) / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"epoch": 0, "step": 0, "seconds": 0.0, **figures}) + "\n")


def fewshot(config, device, rank, train, test):
    """--task fewshot: a run per fold in --out/fold_<k>, and the mean and deviation of their last epochs."""
    accuracies = []
    for fold in range(FOLDS) if config.fold == "all" else [int(config.fold)]:
        path = Path(config.data) / f"{config.way}way_{config.shot}shot" / f"{fold}.pkl"
        episode = draw_episode(train, test, config.way, config.shot, fold) if train else read_episode(path, config.way)
        task = Classification(config, device, *episode)
        figures = fit(replace(config, out=f"{config.out}/fold_{fold}"), task, rank)
        if rank == 0:
            accuracies.append(figures["accuracy"])
            say(f"fold {fold}, {', '.join(task.classes)}: {figures['accuracy']:.1f} %")
    if rank == 0:
        mean, std = np.mean(accuracies).item(), np.std(accuracies, ddof=len(accuracies) > 1).item()
        words = f"{config.way}-way {config.shot}-shot: {mean:.1f} ± {std:.1f} % over {len(accuracies)} folds, last epochs"
        report(config, words, dict(accuracy=mean, accuracy_std=std, folds=accuracies))


@torch.no_grad()
def svm(config, device, train, test):
    """--task svm: a linear SVM on the frozen features of the training clouds."""
    task, found = Classification(config, device, train, test), []
    model = start_model(config, task.build, device).eval()
    for clouds in (task.train, task.test):
        batches = torch.arange(len(clouds), device=device).split(config.batch_size)
        found.append(torch.cat([features(model, first_points(clouds, indices, config.points)) for indices in batches]))
    result, C = training.svm_accuracy(found[0], task.train.labels, found[1], task.test.labels)
    if config.features:
        labels = torch.cat([train.labels, test.labels]).numpy()
        found = torch.cat(found).cpu().numpy()
        write_arrays(config.features, features=found, names=train.names + test.names, labels=labels)
    report(config, f"a linear SVM (C = {C:g}) labels {result:.1f} % of {len(test)} test clouds right", dict(accuracy=result, C=C))


def write_arrays(path, **arrays):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with act.whole_file(path) as file:
        np.savez(file, **arrays)


# -- prediction -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(config, device):
    """--predict: a table of labels, and of a segmenter each cloud with its labels in --out; --features: a file of them."""
    path = Path(config.predict)
    root, files = (path.parent, [path]) if path.is_file() else (path, sorted(path.rglob("*")))
    files = {str(file.relative_to(root)): file for file in files if file == path or file.suffix.lower() in shapes.READERS}
    if not files:
        raise ValueError(f"--predict {path}: no clouds there, wanted a file or a folder of {' '.join(shapes.READERS)}")
    model, stored = act.load(config.checkpoint, device), act.read_tensors(config.checkpoint)
    extra = stored.get("extra") or {}
    if config.points and "kind" not in stored:  # the release's files do not tell: a patch for every 16 points, as published
        model.config.num_group = max(1, config.points // 16)
    points, normalized = config.points or extra.get("points", 16 * model.config.num_group), extra.get("normalized", True)
    kind, c = type(model).__name__, model.config
    if points < max(c.num_group, c.group_size):
        raise ValueError(f"--points {points}: wanted at least {max(c.num_group, c.group_size)}, for the checkpoint's {c.num_group} "
                         f"patches of {c.group_size} points")
    if config.features and kind not in ("Student", "Classifier"):
        raise ValueError(f"--features: the checkpoint holds a {kind}, wanted a Student or Classifier")
    if not config.features and kind not in ("Classifier", "Segmenter"):
        raise ValueError(f"--checkpoint {config.checkpoint}: holds a {kind}, wanted a Classifier or Segmenter "
                         "that finetune.py wrote (or --features FILE)")
    if kind == "Segmenter":
        return predict_points(config, model, extra, points, files)
    # normalised before they are rounded to float32: coordinates may be large
    arrays = [(shapes.read_cloud if normalized else shapes.read_points)(file) for file in files.values()]
    clouds = labelled(path, arrays, np.zeros(len(arrays), int), normalized=normalized)
    training.check_distinct(replace(clouds, names=[*map(str, files.values())]), model.config.num_group)
    clouds = thin(clouds, points, device)
    inputs = [first_points(clouds, indices, points) for indices in torch.arange(len(clouds), device=device).split(64)]
    if config.features:
        found = torch.cat([features(model, xyz) for xyz in inputs]).cpu().numpy()
        write_arrays(config.features, features=found, names=list(files))
        say(f"{config.features} holds the features of {len(found)} clouds, {found.shape[1]} each")
    if kind == "Classifier":
        classes = extra.get("classes") or [f"class {i}" for i in range(model.config.num_classes)]
        width = [max(map(len, column)) + 2 for column in (["file", *files], ["label", *classes])]
        say(f"{'file':{width[0]}}{'label':{width[1]}}{'probability':13}second guess")
        for name, row in zip(files, torch.cat([model(xyz).float().softmax(dim=1) for xyz in inputs])):
            (best, value), *rest = [(classes[i], row[i]) for i in row.argsort(descending=True).tolist()]
            say(f"{name:{width[0]}}{best:{width[1]}}{value:<13.3f}" + (f"{rest[0][0]} {rest[0][1]:.3f}" if rest else ""))


def predict_points(config, model, extra, points, files):
    """Every point of every file labelled; the table tells each cloud's labels by their share of its points."""
    c, width = model.config, max(map(len, ["file", *files])) + 2
    classes = list(SHAPENET_PARTS) if c.num_categories else [f"class {i}" for i in range(c.num_parts)]
    classes, ranges = extra.get("classes") or classes, extra.get("class_parts") or list(SHAPENET_PARTS.values())
    say(f"{'file':{width}}{'points':>9}  labels by share of points")
    for name, file in files.items():
        xyz, category, known = shapes.read_points(file), None, dict(enumerate(classes))
        if c.num_categories:
            kind = config.category or file.resolve().parent.name
            if kind not in classes:
                raise ValueError(f"{file}: {kind!r} is none of the checkpoint's categories, wanted --category, "
                                 f"or a folder named one of {', '.join(classes)}")
            category, blocks = classes.index(kind), [(np.arange(len(xyz)), np.zeros(3))]
            known = {part: f"{kind} part {part}" for part in range(*ranges[category])}
        else:
            blocks = room_blocks(xyz)
        votes = label_points(model, xyz, blocks, points, category)[:, list(known)]
        labels = np.array(list(known))[votes.argmax(dim=1).numpy()]
        target = Path(config.out) / name.replace("/", "-")
        names = dict(label_numbers=list(known), label_names=list(known.values()))
        write_arrays(f"{target}.npz", points=xyz, labels=labels, **names)
        shapes.write_ply(f"{target}.ply", xyz, (255 * shapes.palette(max(known) + 1)[labels]).astype(np.uint8))
        told = [f"{known[i]} {100 * n / len(xyz):.0f} %" for i, n in Counter(labels.tolist()).most_common()]
        say(f"{name:{width}}{len(xyz):9d}  " + ", ".join(told))
    say(f"{config.out} holds each cloud with its labels, as .npz and as .ply coloured by them")


# -- main -------------------------------------------------------------------------------------------------------------

def check(config):
    """What flags say together."""
    if config.vote < 0 or config.way < 2 or config.shot < 1 or config.clip <= 0:
        raise ValueError("--vote must not be negative, --way at least 2, --shot at least 1 and --clip positive, "
                         f"found {config.vote}, {config.way}, {config.shot}, {config.clip}")
    if config.fold not in ("all", *map(str, range(FOLDS))):
        raise ValueError(f"--fold must be all or 0 to {FOLDS - 1}, found {config.fold!r}")
    if config.protocol != "full" and config.task in ("parts", "scene"):
        raise ValueError(f"--protocol {config.protocol}: --task {config.task} trains everything, wanted full")
    if config.features and not config.predict and config.task != "svm":
        raise ValueError("--features wants --predict or --task svm beside it")


def settle(config, name, asked):
    """The settings that wait for the data set's name: points, learning rate and augmentation as published for it."""
    dense, frozen = config.task in ("parts", "scene"), config.task in ("classify", "fewshot") and config.protocol != "full"
    doubled = config.size != "tiny" and (dense or name == "ScanObjectNN")  # 2048 points, not 1024
    turned = config.task == "classify" and name in ("ScanObjectNN", "embedded shapes")
    return replace(config, points=asked or config.points * (2 if doubled else 1),
                   lr=config.lr or (2e-4 if dense else 1e-3 if frozen else 5e-4),
                   augment=config.augment if config.augment != "auto" else "rotate" if turned else "scale_translate")


def main():
    config = training.parse_flags(Config, __doc__)
    check(config)
    device, rank, world = training.start_processes(config)
    if config.predict:
        return predict(config, device) if rank == 0 else None
    asked = config.points
    config = training.resolve(config, device, DEFAULTS[config.task])

    # -- data ---------------------------------------------------------------------------------------------------------
    stored = config.data != "synthetic"
    if config.task == "scene":
        name = "S3DIS" if stored else "embedded rooms"
        config = settle(config, name, asked)
        train, test = open_rooms(config)
    else:
        name, train, test = open_parts(config) if config.task == "parts" else open_labelled(config)
        config = settle(config, name, asked)
    say(f"{config.task} on {device} x {world}, {config.precision}: size {config.size}, {config.points} points; {name}, "
        + (f"{len(train)} to train on, {len(test)} held out" if train else f"{config.way}-way {config.shot}-shot"))

    # -- model, optimizer, loop, results: one run, or one for each fold -----------------------------------------------
    if config.task == "fewshot":
        return fewshot(config, device, rank, train, test)
    if config.task == "svm":
        return svm(config, device, train, test) if rank == 0 else None
    task = {"classify": Classification, "parts": Parts, "scene": Scenes}[config.task](config, device, train, test)
    figures = fit(config, task, rank)
    shown = {"accuracy": "overall", "mean_accuracy": "class mean", "miou": "mIoU", "instance_miou": "instance mIoU",
             "class_miou": "class mIoU", "vote_accuracy": f"vote of {config.vote}",
             "best_accuracy": "best epoch, chosen on the test clouds,"}
    if rank == 0:
        report(config, "last epoch " + ", ".join(f"{shown[k]} {v:.2f} %" for k, v in figures.items() if k in shown))


if __name__ == "__main__":
    training.run_script(main)
