"""Data sets: a folder of clouds, or a published data set, becomes clouds to train and to test on.

    dataset = datasets.open_dataset("my_clouds")           # or the root of ModelNet40, S3DIS, ...
    xyz, _ = dataset.train.sample(torch.arange(32), 1024)  # (32, 1024, 3)

A further data set needs a function that returns a Dataset, and a row of LAYOUTS. Nothing in a file
is executed; wrong data is a UserError that names the file. T: the points of all clouds together.
"""

import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import pickle
import pickletools
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import act
from util import clouds, files, synthetic
from util.clouds import Clouds, Room, Scene

SCAN_FILES = {  # variant of ScanObjectNN -> its training clouds
    "OBJ_BG": "main_split/training_objectdataset.h5",
    "OBJ_ONLY": "main_split_nobg/training_objectdataset.h5",
    "PB_T50_RS": "main_split/training_objectdataset_augmentedrot_scale75.h5",
}
SCAN_CLASSES = "bag bin box cabinet chair desk display door shelf table bed".split()
SCAN_CLASSES += "pillow sink sofa toilet".split()
S3DIS_CLASSES = "ceiling floor wall beam column window door table chair sofa".split()
S3DIS_CLASSES += "bookcase board clutter".split()
SHAPENET_CATEGORIES = "Airplane Bag Cap Car Chair Earphone Guitar Knife Lamp Laptop".split()
SHAPENET_CATEGORIES += "Motorbike Mug Pistol Rocket Skateboard Table".split()
SHAPENET_ENDS = (0, 4, 6, 8, 12, 16, 19, 22, 24, 28, 30, 36, 38, 41, 44, 47, 50)  # of their parts
SHAPENET_PARTS = dict(zip(SHAPENET_CATEGORIES, itertools.pairwise(SHAPENET_ENDS), strict=True))
SCANNET_CLASSES = "cabinet bed chair sofa table door window bookshelf picture counter".split()
SCANNET_CLASSES += "desk curtain refrigerator showercurtrain toilet sink bathtub garbagebin".split()
SCANNET_IDS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
SCANNET = dict(zip(SCANNET_CLASSES, SCANNET_IDS, strict=True))  # class -> its nyu40 id
SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
ROOMS = ((7, 400), (8, 48))  # synthetic scenes to train and to test on: area (its seed), number


@dataclass
class Dataset:  # clouds to train and to test on
    name: str
    train: Clouds
    test: Clouds
    everything: Clouds | None = None  # both, if the published pretraining takes both
    notes: list[str] = field(default_factory=list)  # what whoever reads the results must know
    unit = "clouds"


@dataclass
class RoomSet:  # rooms, or Scenes, to train and to test on
    name: str
    train: list
    test: list
    classes: list[str]
    notes: list[str] = field(default_factory=list)
    unit = "rooms"


def describe(dataset: Dataset | RoomSet) -> str:
    """One line: name, sizes of the splits, number and names of the classes, notes."""
    has_rooms = isinstance(dataset, RoomSet)
    classes = dataset.classes if has_rooms else dataset.train.classes or dataset.train.part_names
    text = f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test "
    text += f"{dataset.unit}, {len(classes)} classes"
    if 0 < len(classes) <= 40:
        text += f": {', '.join(classes)}"
    return "; ".join([text] + dataset.notes)


@dataclass
class Entry:  # a file of a data set
    name: str  # its path below the root, with slashes
    split: str | None = None  # "train" or "test"; at first also "val", or None if no folder says it
    label: str | None = None  # name of its class
    parts: tuple | None = None  # (first, last + 1) of the labels of its points, if it holds them


def find_clouds(paths: list, suffixes: tuple = tuple(files.READERS)) -> list[Path]:
    """The clouds below folders. A path without any stays: reading it says what is wrong."""
    chosen = []
    for path in map(Path, paths):
        found = []
        for file in files.list_files(path) if path.is_dir() else []:
            suffix = file.suffix.lower()
            if suffix == ".txt" and file.is_file() and not files.holds_points(file):
                continue
            if suffix in suffixes or not file.exists():  # A dangling link is named when it is read.
                found.append(file)
        chosen += found or [path]
    return chosen


def list_clouds(folder: Path, labelled: bool = False) -> tuple[list[Entry], list[str]]:
    """The clouds below a folder with their splits, and notes; `labelled`: files.LABELLED alone."""
    suffixes = files.LABELLED if labelled else tuple(files.READERS)
    found = find_clouds([folder], suffixes)
    if found == [folder]:
        raise act.UserError(f"{folder}: expected files {' '.join(suffixes)}, got none")
    names = [path.relative_to(folder).as_posix() for path in found]
    level = split_level(names)
    notes = []
    entries = []
    for name in names:
        entry = Entry(name, parts=(0, 256) if labelled else None)
        for depth, above in enumerate(name.split("/")[:-1]):
            if depth == level and split_name(above):
                entry.split = split_name(above)
            elif not labelled:
                entry.label = entry.label or above
        if entry.label and split_name(entry.label):
            notes = [f"the folder {entry.label} is a class"]
        entries.append(entry)
    notes += choose_splits(folder, entries)
    others = set(files.list_files(folder)) - set(found)
    skipped = sum(path.suffix.lower() == ".txt" and path.name != "classes.txt" for path in others)
    if skipped:
        notes.insert(0, f"{skipped} .txt files without points skipped")
    return entries, notes


def split_name(folder):
    """train, val or test if a folder of this name may be a split, else None."""
    name = SPLIT_NAMES.get(folder.lower(), folder.lower())
    return name if name in ("train", "val", "test") else None


def split_level(names):
    """The first depth of folders, from 0, that splits the clouds, or None: it has a training set
    and another, or splits alone. A folder train among others of no split, or below, is a class."""
    folders = [name.split("/")[:-1] for name in names]
    for depth in range(max(len(above) for above in folders)):
        splits = {split_name(above[depth]) for above in folders if len(above) > depth}
        if None not in splits or ("train" in splits and len(splits - {None}) > 1):
            return depth
    return None


def choose_splits(folder, entries):
    """Folders say the splits, else a hash of the names, a fifth of each class. Returns notes."""
    splits = {entry.split for entry in entries}
    if splits != {None}:
        becomes = "train" if "test" in splits else "test"
        for entry in entries:
            if entry.split is None or len(entries) == 1:
                raise act.UserError(f"{folder}: expected train and test folders, got {entry.name}")
            if entry.split == "val":
                entry.split = becomes
        notes = {"train": "val joins the training set", "test": "val is the test set"}
        return [notes[becomes]] if "val" in splits else []
    groups = {}
    for entry in entries:
        groups.setdefault(entry.label, []).append(entry)
    if None in groups or len(groups) == len(entries):
        groups = {None: list(entries)}
    for group in groups.values():
        group.sort(key=lambda entry: hashlib.sha256(os.fsencode(entry.name)).digest())
        count = min(max(1, len(group) // 5), len(group) - 1)
        for i, entry in enumerate(group):
            entry.split = "test" if i < count else "train"
    if len(entries) == 1:
        return ["one cloud to train and test on"]
    return ["a fixed fifth is the test set"]


def read_cached(root, entries, cache, columns):
    """The rows (T, columns) float32 of all files, and offsets (files + 1,), mapped from a cache."""
    folder = Path(cache or root)
    if not cache and not os.access(root, os.W_OK):
        folder = Path(tempfile.gettempdir(), f"clouds-cache-{Path(os.path.expanduser('~')).name}")
    folder.mkdir(parents=True, exist_ok=True)
    state = [clouds.MAX_POINTS, files.MESH_POINTS]
    for entry in entries:
        path = root / entry.name
        if path.exists():  # else reading it names it
            state.append((entry.name, path.stat().st_size, path.stat().st_mtime_ns))
    keys = [[os.path.realpath(root), columns], state]
    hashes = [hashlib.sha256(ascii(key).encode()).hexdigest()[:12] for key in keys]
    stem = folder / f".clouds-{hashes[0]}-{hashes[1]}"
    if map_cache(stem) is None:
        print(f"reading {len(entries)} clouds into {stem}.points.npy, once", file=sys.stderr)
        write_cache(stem, root, entries, columns)
    return map_cache(stem)


def map_cache(stem):
    """The two tensors of a cache, or None if it is absent or damaged."""
    with contextlib.suppress(OSError, act.UserError), files.parsing():
        rows = np.load(f"{stem}.points.npy", mmap_mode="c")  # private, and writable for torch
        offsets = np.load(f"{stem}.offsets.npy")
        if rows.ndim == 2 and offsets[-1] == len(rows):
            return torch.from_numpy(rows), torch.from_numpy(offsets)
    return None


def write_cache(stem, root, entries, columns):
    """Writes the cache in place of earlier ones of the folder; a UserError names broken files."""
    offsets = [0]
    broken = []
    header = {"descr": "<f4", "fortran_order": False, "shape": (0, columns)}
    with files.complete_file(f"{stem}.points.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for entry in entries:
            try:
                rows = read_rows(root / entry.name, entry.parts)
                file.write(rows.astype("<f4").tobytes())
                offsets.append(offsets[-1] + len(rows))
            except act.UserError as error:
                broken.append(str(error))
        if broken:
            raise act.UserError("; ".join(broken))
        # The number of rows is known only now. numpy leaves room in the header for any number.
        header["shape"] = (offsets[-1], columns)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
    with files.complete_file(f"{stem}.offsets.npy") as file:
        np.save(file, np.array(offsets, np.int64))
    for path in stem.parent.glob(f"{stem.name[:-12]}*.npy"):
        if not path.name.startswith(stem.name):
            path.unlink(missing_ok=True)


def read_rows(path, parts):
    """A file as the cache keeps it: normalised x y z and, if it holds labels, the label."""
    if parts is None:
        return files.read_cloud(path, points=None)
    with files.reading(path):
        xyz, labels = files.read_labelled(path, *parts)
        xyz = clouds.normalize(clouds.limit_points(xyz))
        return np.column_stack([xyz, clouds.limit_points(labels)])


def read_files(name, root, entries, cache, classes=None, notes=(), pretrain_on_all=False):
    """The Dataset of all entries, sorted by name, a single one for both splits."""
    num_train = sum(entry.split == "train" for entry in entries)
    if len(entries) != 1 and num_train in (0, len(entries)):
        raise act.UserError(f"{root}: expected training and test clouds, got one kind alone")
    entries.sort(key=lambda entry: (entry.split == "test", entry.name))
    columns = 3 + bool(entries[0].parts)
    rows, offsets = read_cached(root, entries, cache, columns)
    whole = Clouds(rows[:, :3], offsets, [entry.name for entry in entries])
    if columns > 3:
        whole.parts = rows[:, 3].long()
    labels = [entry.label for entry in entries]
    if None not in labels:
        whole.classes = list(classes or sorted(set(labels)))
        unknown = sorted(set(labels) - set(whole.classes))
        if unknown:
            raise act.UserError(f"{root}: expected classes {whole.classes}, got {unknown}")
        whole.labels = torch.tensor([whole.classes.index(label) for label in labels])
    dataset = Dataset(name, whole, whole, whole if pretrain_on_all else None, list(notes))
    if len(entries) > 1:
        dataset.train = whole.select(range(num_train))
        dataset.test = whole.select(range(num_train, len(entries)))
    return dataset


def pack_arrays(path, arrays, labels=None, classes=None):
    """The Clouds of the arrays (n, 3 or more) in one file, which come from outside unchecked."""
    packed = []
    offsets = [0]
    with files.reading(path):
        if not isinstance(arrays, (list, tuple)) or not arrays:
            raise act.UserError(f"expected a list of one cloud or more, got {str(arrays)[:80]}")
        for array in arrays:
            if not isinstance(array, np.ndarray):
                raise act.UserError(f"expected arrays of points, got {type(array).__name__}")
            points = clouds.limit_points(files.check_points(array))
            packed.append(torch.from_numpy(points).float())
            offsets.append(offsets[-1] + len(points))
        names = [f"{path.stem}_{i:05d}" for i in range(len(packed))]
        split = Clouds(torch.cat(packed), torch.tensor(offsets), names, classes=list(classes or []))
        if labels is not None:
            with files.parsing():  # numpy refuses lists of unequal lengths
                numbers = np.asarray(labels).reshape(-1)
            fits = len(numbers) == len(packed) and numbers.dtype.kind in "fiub"
            count = len(classes or range(1000))
            if not fits or not np.isin(numbers, np.arange(count)).all():
                raise act.UserError(f"expected {len(packed)} labels below {count}, got {numbers}")
            split.labels = torch.from_numpy(numbers.astype(np.int64))
    return split


# -- Pickles, of which arrays and plain values are read -------------------------------------------
class PickledDtype:
    """In place of numpy.dtype, whose flags come from the file: wrong ones crash the interpreter."""

    def __init__(self, code, *_):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"an array of {self.dtype}")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray(np.ndarray):  # takes its type from a PickledDtype
    def __setstate__(self, state):
        version, shape, kind, is_fortran, data = state
        super().__setstate__((version, shape, kind.dtype, is_fortran, data))


class ArrayUnpickler(pickle.Unpickler):
    """Knows the names that pickled arrays need, and refuses any other."""

    ALLOWED = {
        "numpy.ndarray": None,  # the first argument of _reconstruct, and nothing else
        "numpy.dtype": PickledDtype,
        "numpy._core.multiarray._reconstruct": lambda *_: PickledArray(0),
        "numpy._core.multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.dtype)[0],
        "numpy._core.numeric._frombuffer": lambda data, kind, shape, order: (  # protocol 5
            np.frombuffer(data, kind.dtype).reshape(shape, order=order)
        ),
        "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes of protocols 0 to 2
    }

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # as numpy 1 calls it
        if name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{name}, which is no part of an array")
        return self.ALLOWED[name]


def read_pickle(path):
    """The plain values and arrays of a pickle, also of one that Python 2 wrote."""
    with files.reading(path), open(path, "rb") as file, files.parsing():
        # A few bytes can claim any amount of memory. genops checks the lengths of all values.
        for opcode, argument, _ in pickletools.genops(file):
            if "PUT" in opcode.name and int(argument) > os.fstat(file.fileno()).st_size:
                raise pickle.UnpicklingError(f"place {argument} of the memo")
        file.seek(0)
        return ArrayUnpickler(file, encoding="latin1").load()


def read_episode(path: Path | str, way: int) -> tuple[Clouds, Clouds]:
    """A pickled few-shot fold {"train": [(points, label, class), ...], "test": ...} -> Clouds."""
    path = Path(path)
    fold = read_pickle(path)
    classes = [f"class {i}" for i in range(way)]
    splits = []
    for split in ("train", "test"):
        with files.reading(path), files.parsing():  # a foreign pickle can hold anything
            arrays, labels = list(zip(*fold[split], strict=True))[:2]
        splits.append(pack_arrays(path, arrays, labels, classes))
    return tuple(splits)


# -- Published data sets, by functions that all take the options of open_dataset ------------------
def read_words(path):
    with files.reading(path):
        return path.read_text("utf-8", errors="replace").split()


def open_shapenet(root, cache, variant, area):
    """ShapeNet-55 of Point-BERT: shapenet_pc/<synset>-<model>.npy, and two lists."""
    lists = root / "ShapeNet-55" if (root / "ShapeNet-55").is_dir() else root
    entries = []
    for split in ("train", "test"):
        for name in read_words(lists / f"{split}.txt"):
            entries.append(Entry(name, split, name.split("-")[0]))
    return read_files("ShapeNet-55", root / "shapenet_pc", entries, cache, pretrain_on_all=True)


def open_modelnet(root, cache, variant, area):
    """ModelNet40: texts and two lists, or Point-BERT's pickles of [clouds (n, 6), labels]."""
    stated = root / "modelnet40_shape_names.txt"
    classes = read_words(stated) if stated.is_file() else None
    if (root / "modelnet40_train_8192pts_fps.dat").is_file():
        splits = []
        for split in ("train", "test"):
            path = root / f"modelnet40_{split}_8192pts_fps.dat"
            content = read_pickle(path)
            with files.reading(path), files.parsing():  # a foreign pickle can hold anything
                arrays, labels = content
            splits.append(pack_arrays(path, arrays, labels, classes))
        return Dataset("ModelNet40", *splits)
    entries = []
    for split in ("train", "test"):
        for name in read_words(root / f"modelnet40_{split}.txt"):
            label = name.rpartition("_")[0]  # night_stand_0001 -> night_stand
            entries.append(Entry(f"{label}/{name}.txt", split, label))
    return read_files("ModelNet40", root, entries, cache, classes)


def open_h5(path, cache, variant, area):
    """The training .h5, or ScanObjectNN's `variant`, used as stored, and the test .h5 beside it."""
    found = [path]
    if path.is_dir():
        found = [file for file in files.list_files(path) if file.match("*train*.h5")]
    is_scan = any("objectdataset" in file.name for file in found)
    if is_scan and path.is_dir():
        wanted = SCAN_FILES[variant]
        if not any("main_split" in str(file.absolute()) for file in found):
            wanted = Path(wanted).name  # the folder has another name
        found = [file for file in found if file.absolute().match(wanted)]
    if len(found) != 1 or "train" not in found[0].name:
        raise act.UserError(f"{path}: expected one train .h5 (of {variant}), got {len(found)}")
    test_name = found[0].name.replace("training", "test").replace("train", "test")
    splits = []
    for file in (found[0], found[0].with_name(test_name)):
        with files.reading(file):
            h5py = files.require("h5py")
            with files.parsing(), h5py.File(file, "r") as content:
                arrays = list(content["data"][:])
                labels = content["label"][:]
        splits.append(pack_arrays(file, arrays, labels, SCAN_CLASSES if is_scan else None))
        splits[-1].normalized = not is_scan
    return Dataset(f"ScanObjectNN ({found[0].stem})" if is_scan else path.stem, *splits)


def open_shapenet_part(root, cache, variant, area):
    """ShapeNetPart with normals: <synset>/<model>.txt, and lists; training takes train and val."""
    words = read_words(root / "synsetoffset2category.txt")
    classes = words[::2]
    if not words or not set(classes) <= SHAPENET_PARTS.keys():
        raise act.UserError(f"{root}: expected categories and their synsets, got {words[:8]}")
    categories = dict(zip(words[1::2], classes, strict=False))  # synset -> category
    entries = []
    for listed, split in (("train", "train"), ("val", "train"), ("test", "test")):
        path = root / "train_test_split" / f"shuffled_{listed}_file_list.json"
        with files.reading(path), files.parsing():  # a foreign list can hold anything
            names = ["/".join(name.split("/")[-2:]) for name in json.loads(path.read_text("utf-8"))]
        for name in names:
            label = categories.get(name.split("/")[0])
            if label is None or "/" not in name:
                raise act.UserError(f"{path}: expected shape_data/<synset>/<model>, got {name}")
            entries.append(Entry(f"{name}.txt", split, label, SHAPENET_PARTS[label]))
    dataset = read_files("ShapeNetPart", root, entries, cache, classes)
    for split in (dataset.train, dataset.test):
        split.part_ranges = list(map(SHAPENET_PARTS.get, classes))
    return dataset


def open_blocks(root, cache, variant, area):
    """S3DIS as clouds without labels: blocks of 1 m x 1 m with 1024 points or more, z up."""
    rooms = open_rooms(root, area)
    splits = []
    for split in (rooms.train, rooms.test):
        blocks = []
        for room in split:
            _, which = np.unique(np.floor(room.xyz[:, :2]), axis=0, return_inverse=True)
            for i in range(which.max() + 1):
                block = room.xyz[which.reshape(-1) == i]
                if len(block) >= 1024:
                    blocks.append(block)
        splits.append(pack_arrays(root, blocks))
    return Dataset("S3DIS", *splits, notes=rooms.notes + ["blocks of 1 m x 1 m"])


def open_clouds(path, cache, variant, area):
    """A folder of own clouds: see open_dataset; or a file, one cloud to train and to test on."""
    if path.is_file():
        xyz = torch.from_numpy(files.read_cloud(path, points=None))
        cloud = Clouds(xyz, torch.tensor([0, len(xyz)]), [path.name])
        return Dataset(path.name, cloud, cloud, notes=["one cloud to train and test on"])
    entries, notes = list_clouds(path)
    dataset = read_files(path.absolute().name, path, entries, cache, notes=notes)
    without = [entry.name for entry in entries if entry.label is None]
    if 0 < len(without) < len(entries):
        dataset.notes.append(f"no classes, since {without[0]} is in no class folder")
    return dataset


# A name in the root of a published data set, and what opens it: the first that fits.
LAYOUTS = {"shapenet_pc": open_shapenet, "modelnet40_*": open_modelnet, "h5_files": open_h5}
LAYOUTS |= {"main_split*": open_h5, "*.h5": open_h5, "Area_[0-9]*": open_blocks}
LAYOUTS |= {"synsetoffset2category.txt": open_shapenet_part}


def open_dataset(
    data: str | Path, cache: str | Path | None = None, variant: str = "PB_T50_RS", area: int = 5
) -> Dataset:
    """'synthetic', the root of a published data set, a train .h5, a folder of clouds or one cloud.

    Sub-folders are classes; train, test and val, above or below them, are splits, else a fixed
    fifth of each class is the test set. Clouds are read once, into `cache`, else the folder, else
    the temporary folder. variant: a key of SCAN_FILES; area: the test area of S3DIS."""
    if data == "synthetic":
        test = synthetic.synthetic_clouds(20, seed=1)
        return Dataset("synthetic shapes", synthetic.synthetic_clouds(50, seed=0), test)
    path = Path(data)
    if not path.exists():
        raise act.UserError(f"{path}: expected 'synthetic', a file or a folder, got no such path")
    with files.reading(path):
        names = os.listdir(path) if path.is_dir() else [path.suffix]
        openers = [LAYOUTS[key] for key in LAYOUTS if fnmatch.filter(names, key)] + [open_clouds]
        dataset = openers[0](path, cache, variant, area)
    if dataset.train.labels is not None and not dataset.train.classes:
        count = 1 + int(max(dataset.train.labels.max(), dataset.test.labels.max()))
        dataset.train.classes = [f"class {i}" for i in range(count)]
        dataset.test.classes = dataset.train.classes
    for kind, split in (("training", dataset.train), ("test", dataset.test)):
        missing = [name for i, name in enumerate(split.classes) if i not in split.labels]
        if missing:
            dataset.notes.append(f"no {kind} clouds of {', '.join(missing)}")
    return dataset


def open_parts(data: str | Path, cache: str | Path | None = None) -> Dataset:
    """'synthetic', a ShapeNetPart root, or own rows x y z ... label, named in classes.txt."""
    if data == "synthetic":
        train = synthetic.compositions(synthetic.synthetic_clouds(50, seed=0))
        test = synthetic.compositions(synthetic.synthetic_clouds(20, seed=1))
        return Dataset("synthetic compositions", train, test)
    root = Path(data)
    with files.reading(root):
        if (root / "synsetoffset2category.txt").is_file():
            return open_shapenet_part(root, cache, variant=None, area=None)
        entries, notes = list_clouds(root, labelled=True)
        dataset = read_files(root.absolute().name, root, entries, cache, notes=notes)
        last = max(dataset.train.parts.max(), dataset.test.parts.max())
        for split in (dataset.train, dataset.test):
            split.part_names = label_names(root, int(last))
            split.part_ranges = [(0, len(split.part_names))]
        return dataset


def label_names(root, last):
    """Names of the labels 0 to `last`: the lines of classes.txt, else "label 0" and so on."""
    path = root / "classes.txt"
    if not path.is_file():
        return [f"label {i}" for i in range(last + 1)]
    names = list(map(str.strip, files.text_lines(path)))
    if len(names) <= last:
        raise act.UserError(f"{path}: expected {last + 1} names, got {len(names)}")
    return names


def open_rooms(data: str | Path, area: int = 5, density: float = 1200.0) -> RoomSet:
    """'synthetic' rooms (`density` points per m²), S3DIS (test: `area`) or own, metres and z up."""
    root = Path(data)
    name = root.absolute().name
    notes = [f"area {area} is the test set"]
    rooms = []
    with files.reading(root):
        if data == "synthetic":
            name = "synthetic rooms"
            classes = synthetic.ROOM_CLASSES
            rooms = synthetic.synthetic_rooms(itertools.product(range(1, 7), range(1, 4)), density)
        elif any(root.glob("Area_[0-9]*")):  # files of PointNet's collect_indoor3d_data.py
            name = "S3DIS"
            classes = S3DIS_CLASSES
            for path in sorted(root.glob("Area_[0-9]*_*.npy")):
                with files.reading(path), files.parsing():
                    number = int(path.stem.split("_")[1])
                rooms.append(read_room(path, number, len(classes)))
        else:
            area = 1
            entries, notes = list_clouds(root, labelled=True)
            for entry in sorted(entries, key=lambda entry: entry.name):
                rooms.append(read_room(root / entry.name, int(entry.split == "test"), 256))
            classes = label_names(root, max(int(room.labels.max()) for room in rooms))
        train = [room for room in rooms if room.area != area or len(rooms) == 1]
        test = [room for room in rooms if room.area == area or len(rooms) == 1]
        if not train or not test:
            raise act.UserError(f"expected rooms of Area_{area} and others, got {len(rooms)} rooms")
    return RoomSet(name, train, test, classes, notes)


def read_room(path, area, num_classes):
    """A file of labelled points as a Room, moved so that its lowest coordinates are 0."""
    xyz, labels = files.read_labelled(path, last=num_classes)
    return Room(path.stem, area, (xyz - xyz.min(axis=0)).astype(np.float32), labels)


def open_scans(data: str | Path, points: int) -> RoomSet:
    """Scenes with boxes: 'synthetic' of `points` or more points, or VoteNet's form of ScanNetV2."""
    if data == "synthetic":
        train, test = [synthetic_scenes(rooms, points) for rooms in ROOMS]
        return RoomSet("synthetic rooms", train, test, synthetic.ROOM_CLASSES[3:])
    root = Path(data)
    with files.reading(root):
        train, train_note = read_scans(root, "scannetv2_train.txt")
        test, test_note = read_scans(root, "scannetv2_val.txt")
    return RoomSet("ScanNetV2", train, test, list(SCANNET), [train_note, test_note])


def synthetic_scenes(rooms, points):
    """The furnished rooms (area, number of them) as Scenes, whatever --seed is."""
    scenes = []
    for room in synthetic.synthetic_rooms([(rooms[0], i) for i in range(rooms[1])], points / 35):
        labels, low, high = map(np.stack, zip(*room.boxes, strict=True))  # (m,), (m, 3), (m, 3)
        boxes = np.hstack([(low + high) / 2, high - low]).astype(np.float32)
        scenes.append(Scene(room.name, room.xyz, boxes, labels - 3))  # after floor, ceiling, wall
    return scenes


def read_scans(root, list_name):
    """The scans of a list that are there, and a note of those that are not."""
    names = []
    for folder in (root.parent / "meta_data", root.parent, root):  # the last that has it counts
        if (folder / list_name).is_file():
            names = read_words(folder / list_name)
    missing = []
    scans = []
    for name in names:
        if not (root / f"{name}_vert.npy").is_file():
            missing.append(name)
            continue
        with files.reading(root / f"{name}_bbox.npy"):
            boxes = files.read_numpy(root / f"{name}_bbox.npy")
            if boxes.size == 0:
                boxes = np.zeros((0, 7))
            fits = boxes.dtype.kind in "fiu" and boxes.shape[1:] == (7,)
            fits = fits and np.isfinite(boxes).all() and (boxes[:, 3:6] >= 0).all()
            if not fits or not np.isin(boxes[:, 6], SCANNET_IDS).all():
                raise act.UserError(
                    f"expected rows of center, size from 0, nyu40 id, got {boxes[:1]}"
                )
        labels = np.searchsorted(SCANNET_IDS, boxes[:, 6])  # The ids are sorted.
        xyz = files.read_points(root / f"{name}_vert.npy").astype(np.float32)
        scans.append(Scene(name, xyz, boxes[:, :6].astype(np.float32), labels))
    if not scans:
        raise act.UserError(f"expected {list_name} and <scan>_vert.npy of its scans, got none")
    return scans, f"{len(missing)} of {len(names)} scans missing {', '.join(missing)}".strip()
