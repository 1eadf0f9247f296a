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
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import act
from util import clouds, files, run, synthetic
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
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # by folder
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
MAX_LABELS = 64  # of points whose labels have no names; a column of more values is a colour
H5_NAME = re.compile(r"(.*)(train|test)(?:ing)?_?\d*(.*)\.h5")  # the split, and a part's number


@dataclass
class Dataset:  # clouds to train and to test on
    name: str
    train: Clouds
    test: Clouds
    everything: Clouds | None = None  # both, if the published pretraining takes both
    notes: list[str] = field(default_factory=list)  # what whoever reads the results must know


@dataclass
class RoomSet:  # rooms, or Scenes, to train and to test on
    name: str
    train: list
    test: list
    classes: list[str]
    notes: list[str] = field(default_factory=list)


def describe(dataset: Dataset | RoomSet) -> str:
    """One line: name, sizes of the splits, number and names of the classes, notes."""
    named = dataset if isinstance(dataset, RoomSet) else dataset.train
    classes = named.classes or named.part_names
    unit = "rooms" if named is dataset else "clouds"
    sizes = f"{len(dataset.train)} training and {len(dataset.test)} test {unit}"
    text = f"{dataset.name}: {sizes}, {len(classes)} classes"
    if 0 < len(classes) <= 40:
        text += f": {', '.join(classes)}"
    return "; ".join([text] + dataset.notes)


# -- Which files, and their splits ----------------------------------------------------------------
@dataclass
class Entry:  # a file of a data set
    name: str  # its path below the root, with slashes
    split: str | None = None  # "train" or "test"; at first also "val", or None if no folder says it
    label: str | None = None  # name of its class
    parts: tuple | None = None  # (first, last + 1) of the labels of its points, if it holds them


def find_clouds(paths: list) -> list[Path]:
    """The clouds below folders; a path without any stays. Says on stderr what it skips."""
    chosen = {}
    for path in map(Path, paths):
        taken, notes = survey(path) if path.is_dir() else ([], [])
        for note in notes:
            print(f"{path}: {note}", file=sys.stderr, flush=True)
        chosen |= dict.fromkeys(taken or [path])
    return list(chosen)


def survey(folder: Path, suffixes: tuple = tuple(files.READERS)) -> tuple[list[Path], list[str]]:
    """The clouds below a folder, and notes of what is none: files of other types, texts without
    points, pictures of our own runs, folders without clouds."""
    listed = [path for path in files.list_files(folder) if path.name != "classes.txt"]
    logs = filter(lambda path: path.name == "metrics.jsonl", listed)
    runs = {path.parent for path in logs if path.with_name("config.json").is_file()}
    taken = []
    filled = set()
    skipped = Counter()
    for path in listed:
        suffix = path.suffix.lower()
        is_cloud = suffix in suffixes or not path.exists()  # Reading a dangling link names it.
        if is_cloud and suffix in (".txt", ".csv") and path.is_file():
            is_cloud = files.holds_points(path)
        if is_cloud and runs.isdisjoint(path.parents):
            taken.append(path)
            filled.update(path.parents)
        else:
            skipped[suffix or path.name] += 1
    empty = []
    for path in sorted(folder.rglob("[!.]*")):
        if path.parent in filled and path not in filled and path.is_dir():
            empty.append(path.relative_to(folder).as_posix())
    lists = {"skipped": [f"{number} {suffix}" for suffix, number in skipped.most_common()]}
    lists |= {"runs of ours, not read": sorted(map(str, runs)), "no clouds in": empty}
    notes = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
    for suffix in sorted(skipped.keys() & files.CONVERSIONS.keys()):
        notes.append(f"to read a {suffix}: {files.CONVERSIONS[suffix]}")
    return taken, notes


def list_clouds(folder: Path, labelled: bool = False) -> tuple[list[Entry], list[str]]:
    """The clouds below a folder with their splits, and notes; `labelled`: files.LABELLED alone.
    The first level of folders with a training set and another, or with splits alone, splits the
    clouds. A folder train below it, or among others of no split, is a class."""
    suffixes = files.LABELLED if labelled else tuple(files.READERS)
    taken, notes = survey(folder, suffixes)
    if not taken:
        expected = f"{folder}: expected a folder with files {' '.join(suffixes)}, got none"
        raise act.UserError("; ".join([expected] + notes))
    names = [path.relative_to(folder).as_posix() for path in taken]
    above = [name.lower().split("/")[:-1] for name in names]
    level = None
    for depth in reversed(range(max(map(len, above)))):
        splits = {SPLITS.get(folders[depth]) for folders in above if len(folders) > depth}
        if None not in splits or ("train" in splits and len(splits - {None}) > 1):
            level = depth
    entries = []
    for name in names:
        entry = Entry(name, parts=(0, 256) if labelled else None)
        for depth, label in enumerate(name.split("/")[:-1]):
            if depth == level and label.lower() in SPLITS:
                entry.split = SPLITS[label.lower()]
            elif not labelled:
                entry.label = entry.label or label
        entries.append(entry)
    classes = {entry.label for entry in entries if entry.label and entry.label.lower() in SPLITS}
    notes += [f"the folder {label} is a class" for label in sorted(classes)]
    return entries, notes + choose_splits(folder, entries)


def choose_splits(folder, entries):
    """Folders say the splits, else a hash of the names, a fifth of each class. Returns notes."""
    splits = set(map(attrgetter("split"), entries))
    if splits != {None}:
        becomes = "train" if "test" in splits else "test"
        for entry in entries:
            if entry.split is None or len(entries) == 1:
                raise act.UserError(f"{folder}: expected train and test folders, got {entry.name}")
            if entry.split == "val":
                entry.split = becomes
        return [f"val is in the {becomes} set"] if "val" in splits else []
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


# -- Reading, once ---------------------------------------------------------------------------------
def map_cache(stem):
    """The two tensors of a cache, or None if it is absent or damaged."""
    with contextlib.suppress(OSError, act.UserError), files.parsing():
        rows = np.load(f"{stem}.points.npy", mmap_mode="c")  # private, and writable for torch
        offsets = np.load(f"{stem}.offsets.npy")
        if rows.ndim == 2 and offsets[-1] == len(rows):
            return torch.from_numpy(rows), torch.from_numpy(offsets)
    return None


def read_cached(root, entries, options, columns):
    """The rows (T, columns) float32 of all files, and offsets (files + 1,), mapped from a cache,
    which is written first, in place of earlier ones. Broken files are named on stderr."""
    folder = Path(options.cache or root)
    with files.reading(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = [clouds.MAX_POINTS, files.MESH_POINTS, options.drop_invalid]
    for entry in entries:
        path = root / entry.name
        if path.exists():  # else reading it names it
            state.append((entry.name, path.stat().st_size, path.stat().st_mtime_ns))
    keys = [[os.path.realpath(root), columns], state]
    hashes = [hashlib.sha256(ascii(key).encode()).hexdigest()[:12] for key in keys]
    stem = folder / f".clouds-{hashes[0]}-{hashes[1]}"
    cached = map_cache(stem)
    if cached is not None:
        return cached
    if not os.access(folder, os.W_OK):
        raise act.UserError(f"{folder}: expected a folder to write to, else --cache, got none")
    print(f"reading {len(entries)} clouds into {stem}.points.npy, once", file=sys.stderr)
    offsets = [0]
    broken = []
    header = {"descr": "<f4", "fortran_order": False, "shape": (0, columns)}
    with files.complete_file(f"{stem}.points.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for entry in run.progress(entries, f"{root}: files read"):
            try:
                rows = read_rows(root / entry.name, entry.parts, options.drop_invalid)
                file.write(rows.astype("<f4").tobytes())
                offsets.append(offsets[-1] + len(rows))
            except act.UserError as error:
                print(error, file=sys.stderr, flush=True)
                broken.append(entry.name)
        if broken:
            got = f"got {len(broken)} of {len(entries)} broken: {', '.join(broken[:9])}"
            raise act.UserError(f"{root}: expected files that can be read, {got}")
        header["shape"] = (offsets[-1], columns)  # numpy leaves room in a header for any number
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
    with files.complete_file(f"{stem}.offsets.npy") as file:
        np.save(file, np.array(offsets, np.int64))
    for path in folder.glob(f".clouds-{hashes[0]}-*"):
        if not path.name.startswith(stem.name):
            path.unlink(missing_ok=True)
    return map_cache(stem)


def read_rows(path, parts, drop_invalid):
    """A file as the cache keeps it: normalised x y z and, if it holds labels, the label."""
    if parts is None:
        return files.read_cloud(path, None, True, drop_invalid)
    xyz, labels = map(clouds.limit_points, files.read_labelled(path, *parts))
    with files.reading(path):
        return np.column_stack([clouds.normalize(xyz), labels])


def read_files(name, root, entries, options, classes=None, notes=(), pretrain_on_all=False):
    """The Dataset of all entries, sorted by name, a single one for both splits."""
    entries.sort(key=lambda entry: (entry.split == "test", entry.name))
    names, splits, labels = zip(*map(attrgetter("name", "split", "label"), entries), strict=True)
    num_train = splits.count("train")
    if len(entries) != 1 and num_train in (0, len(entries)):
        raise act.UserError(f"{root}: expected training and test clouds, got one kind alone")
    columns = 3 + bool(entries[0].parts)
    rows, offsets = read_cached(root, entries, options, columns)
    whole = Clouds(rows[:, :3], offsets, list(names))
    if columns > 3:
        whole.parts = rows[:, 3].long()
    if None not in labels:
        whole.classes = list(classes or sorted(set(labels)))
        if not set(labels) <= set(whole.classes):
            raise act.UserError(f"{root}: expected {whole.classes}, got {set(labels)}")
        whole.labels = torch.tensor(list(map(whole.classes.index, labels)))
    dataset = Dataset(name, whole, whole, whole if pretrain_on_all else None, list(notes))
    if len(entries) > 1:
        dataset.train = whole.select(range(num_train))
        dataset.test = whole.select(range(num_train, len(entries)))
    return dataset


def pack_arrays(path, arrays, labels=None, classes=(), drop_invalid=False):
    """The Clouds of a file's arrays (n, 3 or more), unchecked so far, and of their labels below the
    number of classes, (count,) or (count, 1) of any type."""
    with files.reading(path):
        is_list = isinstance(arrays, (list, tuple)) and len(arrays) > 0
        if not is_list or not all(isinstance(array, np.ndarray) for array in arrays):
            raise act.UserError(f"expected a list of arrays of points, got {str(arrays)[:80]}")
        packed = []
        for array in arrays:
            points = clouds.limit_points(files.check_points(array, drop_invalid))
            packed.append(torch.from_numpy(points).float())
        offsets = torch.tensor([0] + list(map(len, packed))).cumsum(0)
        names = [f"{path.stem}_{i:05d}" for i in range(len(packed))]
        split = Clouds(torch.cat(packed), offsets, names, classes=list(classes))
        if labels is not None:
            with files.parsing():  # numpy refuses lists of unequal lengths
                labels = np.asarray(labels).reshape(-1)
            end = len(classes) or 1000
            fits = len(labels) == len(arrays) and labels.dtype.kind in "fiub"
            if not fits or not np.isin(labels, np.arange(end)).all():
                raise act.UserError(f"expected {len(arrays)} labels below {end}, got {labels}")
            split.labels = torch.from_numpy(labels.astype(np.int64))
        return split


# -- Pickles, of which arrays and plain values are read -------------------------------------------
class PickledDtype:  # in place of numpy.dtype, whose flags, if forged, crash the interpreter
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


class ArrayUnpickler(pickle.Unpickler):  # refuses all names that no array needs
    ALLOWED = {
        "numpy.ndarray": None,  # the first argument of _reconstruct, and nothing else
        "numpy.dtype": PickledDtype,
        "numpy._core.multiarray._reconstruct": lambda *_: PickledArray(0),
        "numpy._core.multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.dtype)[0],
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


# -- Published data sets ---------------------------------------------------------------------------
def read_words(path):
    with files.reading(path):
        return path.read_text("utf-8", errors="replace").split()


def open_shapenet(root, options):
    """ShapeNet-55 of Point-BERT: shapenet_pc/<synset>-<model>.npy, and two lists."""
    lists = root / "ShapeNet-55" if (root / "ShapeNet-55").is_dir() else root
    entries = []
    for split in ("train", "test"):
        for name in read_words(lists / f"{split}.txt"):
            entries.append(Entry(name, split, name.split("-")[0]))
    return read_files("ShapeNet-55", root / "shapenet_pc", entries, options, pretrain_on_all=True)


def open_modelnet(root, options):
    """ModelNet40: texts and two lists, or Point-BERT's pickles of [clouds (n, 6), labels]."""
    classes = []
    if (root / "modelnet40_shape_names.txt").is_file():
        classes = read_words(root / "modelnet40_shape_names.txt")
    if (root / "modelnet40_train_8192pts_fps.dat").is_file():
        splits = []
        for split in ("train", "test"):
            path = root / f"modelnet40_{split}_8192pts_fps.dat"
            content = read_pickle(path)
            with files.reading(path), files.parsing():  # a foreign pickle can hold anything
                arrays, labels = content
            splits.append(pack_arrays(path, arrays, labels, classes, options.drop_invalid))
        return Dataset("ModelNet40", *splits)
    entries = []
    for split in ("train", "test"):
        for name in read_words(root / f"modelnet40_{split}.txt"):
            label = name.rpartition("_")[0]  # night_stand_0001 -> night_stand
            entries.append(Entry(f"{label}/{name}.txt", split, label))
    return read_files("ModelNet40", root, entries, options, classes)


def open_h5(path, options):
    """*train*.h5 and *test*.h5 of a folder, all their numbered parts, also if one of these is
    given, and shape_names.txt; or ScanObjectNN's `variant`, which is used as stored."""
    h5py = files.require("h5py")
    found = [path]
    if path.is_dir():
        found = [file for file in files.list_files(path) if file.match("*train*.h5")]
    shown = " ".join(map(str, map(Path.absolute, found)))
    is_scan = "objectdataset" in shown
    if is_scan and path.is_dir():
        wanted = SCAN_FILES[options.variant]
        if "main_split" not in shown:
            wanted = Path(wanted).name  # the folder has another name
        found = [file for file in found if file.absolute().match(wanted)]
    first = found[0] if found else path
    own = H5_NAME.fullmatch(first.name)
    parts = {"train": [], "test": []}
    for beside in sorted(first.parent.glob("*.h5"), key=lambda file: (len(file.name), file.name)):
        match = H5_NAME.fullmatch(beside.name)
        if own and match and match.group(1, 3) == own.group(1, 3):
            parts[match[2]].append(beside)
    if not parts["test"] or not set(found) <= set(parts["train"]):
        expected = f"{path}: expected one train and test .h5 of {options.variant}"
        raise act.UserError(f"{expected}, got {shown or 'none'}")
    classes = SCAN_CLASSES if is_scan else []
    if first.with_name("shape_names.txt").is_file():
        classes = read_words(first.with_name("shape_names.txt"))
    splits = []
    for split in ("train", "test"):
        arrays = []
        labels = []
        for file in parts[split]:
            with files.reading(file), files.parsing(), h5py.File(file, "r") as content:
                arrays += list(content["data"][:])
                labels += content["label"][:].ravel().tolist()
        splits.append(pack_arrays(file, arrays, labels, classes, options.drop_invalid))
        splits[-1].normalized = not is_scan
    name = f"ScanObjectNN ({first.stem})" if is_scan else path.stem
    return Dataset(name, *splits)


def open_shapenet_part(root, options):
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
            for name in json.loads(path.read_text("utf-8")):
                synset, model = name.split("/")[-2:]
                label = categories[synset]
                entries.append(Entry(f"{synset}/{model}.txt", split, label, SHAPENET_PARTS[label]))
    dataset = read_files("ShapeNetPart", root, entries, options, classes)
    for split in (dataset.train, dataset.test):
        split.part_ranges = list(map(SHAPENET_PARTS.get, classes))
    return dataset


def open_blocks(root, options):
    """S3DIS as clouds without labels: blocks of 1 m x 1 m with 1024 points or more, z up."""
    rooms = open_rooms(root, options.area)
    splits = []
    for split in (rooms.train, rooms.test):
        blocks = []
        for room in split:
            _, which = np.unique(np.floor(room.xyz[:, :2]), axis=0, return_inverse=True)
            blocks += [room.xyz[which.reshape(-1) == i] for i in range(which.max() + 1)]
        blocks = [block for block in blocks if len(block) >= 1024]
        splits.append(pack_arrays(root, blocks))
    return Dataset("S3DIS", *splits, notes=rooms.notes + ["blocks of 1 m x 1 m"])


def open_clouds(path, options):
    """A folder of own clouds: see open_dataset; or a file, one cloud to train and to test on."""
    if path.is_file():
        xyz = torch.from_numpy(files.read_cloud(path, None, True, options.drop_invalid))
        cloud = Clouds(xyz, torch.tensor([0, len(xyz)]), [path.name])
        return Dataset(path.name, cloud, cloud, notes=["one cloud to train and test on"])
    entries, notes = list_clouds(path)
    dataset = read_files(path.absolute().name, path, entries, options, notes=notes)
    without = [entry.name for entry in entries if entry.label is None]
    if 0 < len(without) < len(entries):
        dataset.notes.append(f"no classes, since {without[0]} is in no class folder")
    return dataset


# A name in the root of a published data set, or the suffix of a file: the first that fits opens it.
LAYOUTS = {"shapenet_pc": open_shapenet, "modelnet40_ply_hdf5_2048": open_h5}
LAYOUTS |= {"modelnet40_*.*": open_modelnet, "h5_files": open_h5, "main_split*": open_h5}
LAYOUTS |= {"*train*.h5": open_h5, ".h5": open_h5, "Area_[0-9]*": open_blocks}
LAYOUTS |= {"synsetoffset2category.txt": open_shapenet_part}


def open_dataset(
    data: str | Path,
    cache: str | Path | None = None,
    variant: str = "PB_T50_RS",
    area: int = 5,
    drop_invalid: bool = False,
) -> Dataset:
    """'synthetic', the root of a published data set, a train .h5, a folder of clouds or one cloud.

    Sub-folders are classes; train, test and val, above or below them, are splits, else a fixed
    fifth of each class is the test set. Clouds are read once, into `cache`, else the folder.
    variant: a key of SCAN_FILES; area: the test area of S3DIS; drop_invalid: leaves out points
    that are not finite, else an error."""
    if data == "synthetic":
        test = synthetic.synthetic_clouds(20, seed=1)
        return Dataset("synthetic shapes", synthetic.synthetic_clouds(50, seed=0), test)
    options = SimpleNamespace(cache=cache, variant=variant, area=area, drop_invalid=drop_invalid)
    path = Path(data)
    if not path.exists():
        raise act.UserError(f"{path}: expected 'synthetic', a file or a folder, got no such path")
    with files.reading(path):
        names = os.listdir(path) if path.is_dir() else [path.suffix]
        openers = [LAYOUTS[key] for key in LAYOUTS if fnmatch.filter(names, key)] + [open_clouds]
        dataset = openers[0](path, options)
    if dataset.train.labels is not None and not dataset.train.classes:
        count = 1 + int(max(dataset.train.labels.max(), dataset.test.labels.max()))
        dataset.train.classes = [f"class {i}" for i in range(count)]
        dataset.test.classes = dataset.train.classes
    for kind, split in (("training", dataset.train), ("test", dataset.test)):
        for i, name in enumerate(split.classes):
            if i not in split.labels:
                dataset.notes.append(f"no {kind} clouds of {name}")
    return dataset


def open_parts(data: str | Path, cache: str | Path | None = None) -> Dataset:
    """'synthetic', a ShapeNetPart root, or own rows x y z ... label, named in classes.txt."""
    if data == "synthetic":
        train = synthetic.compositions(synthetic.synthetic_clouds(50, seed=0))
        test = synthetic.compositions(synthetic.synthetic_clouds(20, seed=1))
        return Dataset("synthetic compositions", train, test)
    root = Path(data)
    options = SimpleNamespace(cache=cache, drop_invalid=False)
    with files.reading(root):
        if (root / "synsetoffset2category.txt").is_file():
            return open_shapenet_part(root, options)
        entries, notes = list_clouds(root, labelled=True)
        dataset = read_files(root.absolute().name, root, entries, options, notes=notes)
        labels = torch.cat([dataset.train.parts, dataset.test.parts])
        names = label_names(root, entries[0].name, labels)
        for split in (dataset.train, dataset.test):
            split.part_names = names
            split.part_ranges = [(0, len(names))]
        return dataset


def label_names(root, name, labels):
    """Names of the labels (n,) of a folder, from 0 on: the lines of classes.txt, else "label 0" and
    so on, unless they are colours: many, or three columns of bytes, not four, end file `name`."""
    stated = root / "classes.txt"
    count = int(labels.max()) + 1
    if stated.is_file():
        names = list(map(str.strip, files.text_lines(stated)))
        if len(names) < count:
            raise act.UserError(f"{stated}: expected {count} names, got {len(names)}")
        return names
    if name.lower().endswith(".npy"):
        rows = files.read_numpy(root / name)
    else:
        lines = files.text_lines(root / name)
        lines = lines[len(lines) // 2 :][:9999]  # without names of columns
        text = re.sub("[,;]", " ", "\n".join(lines))
        rows = np.genfromtxt(text.split("\n"), ndmin=2, invalid_raise=False)
    is_byte = np.isin(rows[:, 3:], np.arange(256)).all(axis=0)  # (columns - 3,)
    is_color = len(is_byte) >= 3 and is_byte[-3:].all() and not is_byte[-4:-3].any()
    number = len(np.unique(labels))
    if is_color or number > MAX_LABELS:
        expected = "expected a last column of labels, named in classes.txt"
        raise act.UserError(f"{root / name}: {expected}, got {number} labels like colours")
    return [f"label {i}" for i in range(count)]


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
            labels = np.concatenate([room.labels for room in rooms])
            classes = label_names(root, entries[0].name, labels)
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
        train = synthetic_scenes((7, 400), points)
        test = synthetic_scenes((8, 48), points)
        return RoomSet("synthetic rooms", train, test, synthetic.ROOM_CLASSES[3:])
    root = Path(data)
    with files.reading(root):
        train, train_note = read_scans(root, "scannetv2_train.txt")
        test, test_note = read_scans(root, "scannetv2_val.txt")
    return RoomSet("ScanNetV2", train, test, list(SCANNET), [train_note, test_note])


def synthetic_scenes(rooms, points):
    """The furnished rooms (area, which is their seed, and number of them) as Scenes."""
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
    missing = [name for name in names if not (root / f"{name}_vert.npy").is_file()]
    scans = []
    for name in filter(lambda name: name not in missing, names):
        with files.reading(root / f"{name}_bbox.npy"):
            boxes = files.read_numpy(root / f"{name}_bbox.npy")
            if boxes.size == 0:
                boxes = np.zeros((0, 7))
            fits = boxes.dtype.kind in "fiu" and boxes.shape[1:] == (7,)
            fits = fits and np.isfinite(boxes).all() and (boxes[:, 3:6] >= 0).all()
            if not fits or not np.isin(boxes[:, 6], SCANNET_IDS).all():
                raise act.UserError(f"expected rows center, size, nyu40 id, got {boxes[:1]}")
        labels = np.searchsorted(SCANNET_IDS, boxes[:, 6])  # The ids are sorted.
        xyz = files.read_points(root / f"{name}_vert.npy").astype(np.float32)
        scans.append(Scene(name, xyz, boxes[:, :6].astype(np.float32), labels))
    if not scans:
        raise act.UserError(f"expected {list_name} and <scan>_vert.npy of its scans, got none")
    return scans, f"{len(missing)} of {len(names)} scans missing {', '.join(missing)}".strip()
