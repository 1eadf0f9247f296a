"""Data sets: a folder of clouds, or a published data set, becomes clouds to train and to test on.

    dataset = datasets.open_dataset("my_clouds")           # or the root of ModelNet40, S3DIS, ...
    xyz, _ = dataset.train.sample(torch.arange(32), 1024)  # (32, 1024, 3)

A further one needs a function that returns a Dataset, and a row of LAYOUTS.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import act
from util import clouds, files, processes, run, synthetic
from util.clouds import Clouds, Room, Scene
from util.files import AnyPath

SCAN_FILES = {"OBJ_BG": "main_split/training_objectdataset.h5"}  # variant -> to train on
SCAN_FILES["OBJ_ONLY"] = "main_split_nobg/training_objectdataset.h5"
SCAN_FILES["PB_T50_RS"] = "main_split/training_objectdataset_augmentedrot_scale75.h5"
SCAN_CLASSES = "bag bin box cabinet chair desk display door shelf table bed".split()
SCAN_CLASSES += "pillow sink sofa toilet".split()
S3DIS_CLASSES = "ceiling floor wall beam column window door table chair sofa".split()
S3DIS_CLASSES += "bookcase board clutter".split()
SHAPENET_CATEGORIES = "Airplane Bag Cap Car Chair Earphone Guitar Knife Lamp Laptop".split()
SHAPENET_CATEGORIES += "Motorbike Mug Pistol Rocket Skateboard Table".split()
SHAPENET_ENDS = (0, 4, 6, 8, 12, 16, 19, 22, 24, 28, 30, 36, 38, 41, 44, 47, 50)  # of their parts
SHAPENET_PARTS = dict(zip(SHAPENET_CATEGORIES, itertools.pairwise(SHAPENET_ENDS), strict=True))
SCANNET = "cabinet bed chair sofa table door window bookshelf picture counter".split()
SCANNET += "desk curtain refrigerator showercurtrain toilet sink bathtub garbagebin".split()
SCANNET_IDS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)  # nyu40's of these
SYNSETS = "synsetoffset2category.txt"  # ShapeNetPart's
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # by folder
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
H5_NAME = re.compile(r"(.*)(train|test)(?:ing)?[-_]?\d*(.*)\.h5")  # the split, a part's number
nfc = partial(unicodedata.normalize, "NFC")  # macOS writes an accent apart from its letter
COORDS = ("pointcloud", "coord", "coords", "points", "pos", "positions", "xyz")
TEXTS = (".txt", ".csv")  # of anything: points, a pose, a note
ATTRIBUTES = "pointcloud colou?r rgb normal segment semantic instance label intensity strength"
ATTRIBUTE = re.compile(ATTRIBUTES.replace(" ", "|"))


@dataclass
class Dataset:  # clouds, rooms or Scenes to train and to test on
    name: str
    train: Clouds | list
    test: Clouds | list
    classes: list[str] = field(default_factory=list)  # of rooms; clouds have their own
    everything: Clouds | None = None  # both, if the published pretraining takes both
    notes: list[str] = field(default_factory=list)  # for whoever reads the results


def describe(dataset: Dataset) -> str:
    """One line: name, sizes of the splits, number and names of the classes, notes."""
    classes = dataset.classes or dataset.train.classes or dataset.train.part_names
    unit = "rooms" if dataset.classes else "clouds"
    sizes = f"{len(dataset.train)} training and {len(dataset.test)} test {unit}"
    text = f"{dataset.name}: {sizes}, {len(classes)} classes"
    if 0 < len(classes) <= 40:
        text += f": {', '.join(classes)}"
    return "; ".join([text] + dataset.notes)


# -- Which files, which splits
@dataclass
class Entry:  # a file of a data set
    name: str  # its path below the root, with slashes
    split: str | None = None  # "train" or "test"; at first also "val", or None if no folder says it
    label: str | None = None  # name of its class
    parts: tuple | None = None  # (first, last + 1) of its points' labels, if it holds them


def find_clouds(paths: list) -> list[Path]:
    """The clouds below folders; a path without any stays. Says on stderr what it skips."""
    chosen = {}
    for path in map(Path, paths):
        taken, notes = survey(path) if path.is_dir() else ({}, [])
        for note in notes:
            print(f"{path}: {note}", file=sys.stderr, flush=True)
        chosen |= dict.fromkeys(taken or [path])
    return list(chosen)


def survey(folder: Path, suffixes: tuple = tuple(files.READERS)) -> tuple[dict, list[str]]:
    """The clouds below a folder, file -> what names it; and notes of all that is not read."""
    listed = [path for path in files.list_files(folder) if path.name != "classes.txt"]
    logs = filter(lambda path: path.name == "metrics.jsonl", listed)
    runs = {path.parent for path in logs if path.with_name("config.json").is_file()}
    # A pointcloud.npz is read, and marks the points.npz beside it, of an occupancy network, as its.
    points = {(path.parent, path.suffix) for path in listed if path.stem.lower() in COORDS[1:]}
    others = {(path.parent, path.suffix) for path in listed if ATTRIBUTE.match(path.name.lower())}
    scans = {parent for parent, suffix in points & others if suffix.lower() in suffixes}
    # The first file of a cloud is read: coordinates, else what is no text.
    listed.sort(key=lambda path: (path.stem.lower() not in COORDS, path.suffix.lower() in TEXTS))
    chosen = {}  # what the files of one cloud share -> the first of them
    left = {"skipped": Counter(), "the same clouds, not read": Counter()}
    for path in listed:
        suffix = path.suffix.lower()
        is_cloud = suffix in suffixes or not path.exists()  # A dangling link is named as missing.
        if is_cloud and suffix in TEXTS and path.is_file():
            is_cloud = files.holds_points(path)
        if not is_cloud or not runs.isdisjoint(path.parents):
            left["skipped"][suffix or "without a suffix"] += 1
            continue
        in_scan = path.parent in scans
        first = chosen.setdefault(path.parent if in_scan else path.with_suffix(""), path)
        if first != path:
            name = path.name if in_scan else suffix
            left["the same clouds, not read"][f"{name} beside {first.suffix}"] += 1
    taken = dict(sorted(zip(chosen.values(), chosen, strict=True)))
    filled = set().union(*map(attrgetter("parents"), taken))
    empty = set().union(*map(attrgetter("parents"), listed)) - filled
    empty = [path.relative_to(folder).as_posix() for path in empty if path.parent in filled]
    lists = {}
    for what, names in left.items():
        lists[what] = [f"{number} {name}" for name, number in names.most_common()]
    lists |= {"runs of ours, not read": sorted(map(str, runs)), "no clouds in": sorted(empty)}
    notes = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
    for suffix in filter(left["skipped"].get, files.CONVERSIONS):
        notes.append(f"to read a {suffix}: {files.CONVERSIONS[suffix]}")
    return taken, notes


def list_clouds(folder: Path, parts: tuple | None = None) -> tuple[list[Entry], list[str]]:
    """The clouds below a folder, and notes; `parts`: the range of their points' labels. The first
    level of folders with a training set and another, or with splits alone, splits the clouds."""
    for pattern, layout in UNREAD.items():
        if any(folder.glob(pattern)):
            raise act.UserError(f"{folder}: expected another layout, got {layout}")
    suffixes = files.LABELLED if parts else tuple(files.READERS)
    taken, notes = survey(folder, suffixes)
    if not taken:
        expected = f"{folder}: expected a folder with files {' '.join(suffixes)}, got none"
        raise act.UserError("; ".join([expected] + notes))
    entries = [Entry(path.relative_to(folder).as_posix(), parts=parts) for path in taken]
    above = [list(map(nfc, path.relative_to(folder).parts[:-1])) for path in taken.values()]
    for level in range(1 + max(map(len, above))):
        splits = {SPLITS.get(folders[level].lower()) for folders in above if len(folders) > level}
        if None not in splits or ("train" in splits and len(splits - {None}) > 1):
            break
    for entry, folders in zip(entries, above, strict=True):
        if len(folders) > level and folders[level].lower() in SPLITS:
            entry.split = SPLITS[folders.pop(level).lower()]
    if not parts:
        notes += name_classes(entries, above)
    return entries, notes + choose_splits(folder, entries)


def name_classes(entries, above):
    """A cloud's class is its first folder that not all share. Returns notes."""
    depth = len(os.path.commonprefix(above))
    notes = []
    if depth > 0:
        notes.append(f"{'/'.join(above[0][:depth])} holds all clouds and is no class")
        if len({tuple(folders[: depth + 1]) for folders in above}) == len(above):
            return notes  # Each folder holds one cloud.
    classes = {}
    for entry, folders in zip(entries, above, strict=True):
        entry.label = next(iter(folders[depth:]), None)
    without = [entry.name for entry in entries if entry.label is None]
    if 0 < len(without) < len(entries):
        notes.append(f"no classes, since {without[0]} is in no class folder")
    for label in sorted(set(map(attrgetter("label"), entries)) - {None}):
        if label.lower() in SPLITS:
            notes.append(f"the folder {label} is a class")
        first = classes.setdefault(label.casefold(), label)
        if first != label:
            notes.append(f"{first} and {label} are two classes")
    return notes


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
    labels = set(map(attrgetter("label"), entries))
    is_flat = None in labels or len(labels) == len(entries)
    groups = {}
    for entry in entries:
        groups.setdefault(None if is_flat else entry.label, []).append(entry)
    for group in groups.values():
        group.sort(key=lambda entry: hashlib.sha256(os.fsencode(nfc(entry.name))).digest())
        count = min(max(1, len(group) // 5), len(group) - 1)
        for i, entry in enumerate(group):
            entry.split = "test" if i < count else "train"
    if len(entries) == 1:
        return ["one cloud to train and test on"]
    return ["a fixed fifth is the test set"]


# -- Reading, once
def map_cache(stem):
    """The tensors of a cache, or None if it is absent or damaged."""
    with contextlib.suppress(OSError, act.UserError), files.parsing():
        rows = np.load(f"{stem}.points.npy", mmap_mode="c")  # private
        offsets, distinct = torch.from_numpy(np.load(f"{stem}.offsets.npy"))
        if rows.ndim == 2 and offsets[-1] == len(rows):
            return torch.from_numpy(rows), offsets, distinct[1:]
    return None


def read_cached(root, entries, options, columns):
    """All rows (points, columns) float32, offsets, counts, mapped from a cache process 0 writes."""
    folder = Path(options.cache or root)
    with files.reading(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = [clouds.MAX_POINTS, files.MESH_POINTS, options.drop_invalid]
    for entry in entries:
        status = os.stat(root / entry.name)
        state.append((entry.name, status.st_size, status.st_mtime_ns))
    keys = [[os.path.realpath(root), columns], state]
    hashes = [hashlib.sha256(ascii(key).encode()).hexdigest()[:12] for key in keys]
    stem = folder / f".clouds-{hashes[0]}-{hashes[1]}"
    with processes.first_process():
        if map_cache(stem) is None:
            if not os.access(folder, os.W_OK):
                raise act.UserError(f"{folder}: expected a writable folder, else --cache, got none")
            for path in folder.glob(f".clouds-{hashes[0]}-*"):
                path.unlink(missing_ok=True)
            write_cache(stem, root, entries, options.drop_invalid, columns)
    return map_cache(stem)


def write_cache(stem, root, entries, drop_invalid, columns):
    """Reads all files into a cache, and names broken ones on stderr."""
    print(f"reading {len(entries)} clouds into {stem}.points.npy, once", file=sys.stderr)
    offsets = [0]
    distinct = [0]
    broken = []
    with files.complete_file(f"{stem}.points.npy") as file:
        file.seek(128)  # the length of numpy's header for any number of rows
        for entry in run.progress(entries, f"{root}: files read"):
            path = root / entry.name
            try:
                if entry.parts is None:
                    rows = files.read_cloud(path, None, True, drop_invalid)
                else:
                    with files.reading(path):
                        xyz, labels = files.read_labelled(path, *entry.parts, drop_invalid)
                        xyz = clouds.normalize(clouds.limit_points(xyz))
                    rows = np.column_stack([xyz, clouds.limit_points(labels)])
                file.write(rows.astype("<f4").tobytes())
                offsets.append(offsets[-1] + len(rows))
                distinct.append(clouds.count_points(rows[:, :3]))
            except act.UserError as error:
                print(error, file=sys.stderr, flush=True)
                broken.append(entry.name)
        if broken:
            got = f"got {len(broken)} of {len(entries)} broken: {', '.join(broken[:9])}"
            raise act.UserError(f"{root}: expected files that can be read, {got}")
        header = {"descr": "<f4", "fortran_order": False, "shape": (offsets[-1], columns)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
    with files.complete_file(f"{stem}.offsets.npy") as file:
        np.save(file, np.stack([offsets, distinct]))


def read_files(name, root, entries, options, classes=None, notes=(), pretrain_on_all=False):
    """The Dataset of all entries, sorted by name, a single one for both splits."""
    entries.sort(key=lambda entry: (entry.split == "test", entry.name))
    names, splits, labels = zip(*map(attrgetter("name", "split", "label"), entries), strict=True)
    num_train = splits.count("train")
    if len(entries) != 1 and num_train in (0, len(entries)):
        raise act.UserError(f"{root}: expected training and test clouds, got one kind alone")
    columns = 3 + bool(entries[0].parts)
    rows, offsets, distinct = read_cached(root, entries, options, columns)
    whole = Clouds(rows[:, :3], offsets, list(names), distinct=distinct)
    if columns > 3:
        whole.parts = rows[:, 3].long()
    if None not in labels:
        whole.classes = list(classes or sorted(set(labels)))
        if not set(labels) <= set(whole.classes):
            raise act.UserError(f"{root}: expected {whole.classes}, got {set(labels)}")
        whole.labels = torch.tensor(list(map(whole.classes.index, labels)))
    everything = whole if pretrain_on_all else None
    dataset = Dataset(name, whole, whole, everything=everything, notes=list(notes))
    if len(entries) > 1:
        dataset.train = whole.select(range(num_train))
        dataset.test = whole.select(range(num_train, len(entries)))
    return dataset


def pack_arrays(contents, classes=(), drop_invalid=False):
    """The Clouds, as stored, of path -> (arrays (n, 3 or more), labels of any type and shape)."""
    packed = {}
    numbers = []
    for path, content in contents.items():
        with files.reading(path):
            with files.parsing():  # A foreign pickle can hold anything.
                arrays, labels = content
                arrays = list(arrays)
                labels = np.asarray(labels).reshape(-1)
            end = len(classes) or 1000
            fits = len(labels) == len(arrays) > 0 and labels.dtype.kind in "fiub"
            if not fits or not np.isin(labels, np.arange(end)).all():
                raise act.UserError(f"expected {len(arrays)} labels below {end}, got {labels}")
            numbers.append(torch.from_numpy(labels.astype(np.int64)))
            for i, array in enumerate(arrays):
                with files.reading(f"{path}: cloud {i} of {len(arrays)}"):
                    if not isinstance(array, np.ndarray):
                        raise act.UserError(f"expected an array of points, got {str(array)[:80]}")
                    points = clouds.limit_points(files.check_points(array, drop_invalid))
                    clouds.normalize(points)  # raises if all are equal
                    packed[f"{path.stem}_{i:05d}"] = clouds.as_float32(points, normalized=False)
    offsets = torch.tensor([0] + list(map(len, packed.values()))).cumsum(0)
    points = torch.from_numpy(np.concatenate(list(packed.values())))
    return Clouds(points, offsets, list(packed), torch.cat(numbers), list(classes))


def read_episode(path: AnyPath, way: int) -> tuple[Clouds, Clouds]:
    """A pickled few-shot fold {"train": [(points, label, class), ...], "test": ...} -> Clouds."""
    path = Path(path)
    fold = files.read_pickle(path)
    splits = []
    for split in ("train", "test"):
        with files.reading(path), files.parsing():
            columns = list(zip(*fold[split], strict=True))
        splits.append(pack_arrays({path: columns[:2]}, [f"class {i}" for i in range(way)]))
    return tuple(splits)


# -- Published data sets
def read_words(path):
    return path.read_text("utf-8", errors="replace").split()


def read_names(path, count=0):
    """The lines of a text, verbatim, `count` or more: line i names label i, a blank one "label i".
    Blank ones at the end are dropped. [] if there is no such file."""
    if not path.is_file():
        return []
    text = path.read_text("utf-8-sig", errors="replace").removesuffix("\n")
    names = [nfc(line.strip()) for line in text.split("\n")]
    while len(names) > count and not names[-1]:
        del names[-1]
    names = [name or f"label {i}" for i, name in enumerate(names)]
    if len(names) < count or len(set(names)) < len(names):
        raise act.UserError(f"{path}: expected {count} or more different names, got {names}")
    return names


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
    classes = read_names(root / "modelnet40_shape_names.txt")
    if (root / "modelnet40_train_8192pts_fps.dat").is_file():
        splits = []
        for split in ("train", "test"):
            path = root / f"modelnet40_{split}_8192pts_fps.dat"
            contents = {path: files.read_pickle(path)}
            splits.append(pack_arrays(contents, classes, options.drop_invalid))
        return Dataset("ModelNet40", *splits)
    entries = []
    for split in ("train", "test"):
        for name in read_words(root / f"modelnet40_{split}.txt"):
            label = name.rpartition("_")[0]  # night_stand_0001 -> night_stand
            entries.append(Entry(f"{label}/{name}.txt", split, label))
    return read_files("ModelNet40", root, entries, options, classes)


def open_h5(path, options):
    """*train*.h5, *test*.h5, all numbered parts, shape_names.txt; or ScanObjectNN's `variant`."""
    h5py = files.require("h5py")
    found = [path]
    if path.is_dir():
        found = list(filter(lambda file: file.match("*train*.h5"), files.list_files(path)))
    shown = " ".join(map(str, map(Path.absolute, found))) or "none"
    is_scan = "objectdataset" in shown
    if is_scan and path.is_dir():
        wanted = Path(SCAN_FILES[options.variant])
        fitting = {True: [], False: []}  # in main_split, or not
        for file in filter(lambda file: file.name == wanted.name, found):
            folder = file.absolute().parent.name
            if "split" not in folder or ("nobg" in folder) == ("nobg" in wanted.parent.name):
                fitting["main_split" in folder].append(file)
        found = fitting[True] or fitting[False]
    first = (found or [path])[0]
    own = H5_NAME.fullmatch(first.name)
    parts = {"train": [], "test": []}
    for beside in sorted(first.parent.glob("*.h5"), key=lambda file: (len(file.name), file.name)):
        match = H5_NAME.fullmatch(beside.name)
        if own and match and match.group(1, 3) == own.group(1, 3):
            parts[match[2]].append(beside)
    if not parts["test"] or not set(found) <= set(parts["train"]):
        raise act.UserError(f"{path}: expected train, test .h5 of {options.variant}, got {shown}")
    classes = SCAN_CLASSES if is_scan else read_names(first.with_name("shape_names.txt"))
    splits = []
    for paths in parts.values():
        contents = {}
        for file in paths:
            with files.reading(file), files.parsing(), h5py.File(file, "r") as content:
                contents[file] = content["data"][:], content["label"][:]
        splits.append(pack_arrays(contents, classes, options.drop_invalid))
        splits[-1].normalized = not is_scan
    name = path.stem
    if is_scan:
        name = f"ScanObjectNN ({first.absolute().parent.name}/{first.name})"
    return Dataset(name, *splits)


def open_shapenet_part(root, options):
    """ShapeNetPart with normals: <synset>/<model>.txt, and lists; training takes train and val."""
    if any(root.glob("*/points_label")):
        raise act.UserError(f"{root}: expected ShapeNetPart's v0_normal, got its v0")
    words = read_words(root / SYNSETS)
    classes = words[::2]
    categories = dict(zip(words[1::2], classes, strict=False))  # synset -> category
    entries = []
    for listed, split in (("train", "train"), ("val", "train"), ("test", "test")):
        path = root / "train_test_split" / f"shuffled_{listed}_file_list.json"
        with files.reading(path), files.parsing():
            for name in json.loads(path.read_text("utf-8")):
                synset, model = name.split("/")[-2:]
                label = categories[synset]
                entries.append(Entry(f"{synset}/{model}.txt", split, label, SHAPENET_PARTS[label]))
    dataset = read_files("ShapeNetPart", root, entries, options, classes)
    for split in (dataset.train, dataset.test):
        split.part_ranges = list(map(SHAPENET_PARTS.get, classes))
    return dataset


def open_clouds(path, options):
    """A folder of own clouds: see open_dataset; or a file, one cloud to train and to test on."""
    if path.is_file():
        xyz = torch.from_numpy(files.read_cloud(path, None, True, options.drop_invalid))
        cloud = Clouds(xyz, torch.tensor([0, len(xyz)]), [path.name])
        return Dataset(path.name, cloud, cloud, notes=["one cloud to train and test on"])
    entries, notes = list_clouds(path)
    return read_files(path.absolute().name, path, entries, options, notes=notes)


# In the root of a data set, or a file's suffix -> what opens it; the first that fits counts.
LAYOUTS = {"shapenet_pc": open_shapenet, "modelnet40_ply_hdf5_2048": open_h5}
LAYOUTS |= {"modelnet40_*.*": open_modelnet, "h5_files": open_h5, "main_split*": open_h5}
# In the root of a layout that is not read as clouds -> what it is.
UNREAD = dict.fromkeys(LAYOUTS, "clouds without labels of points: finetune.py reads them")
UNREAD |= {"Area_[0-9]*": "S3DIS: segment.py --task scene reads Area_1_office_1.npy and so on"}
UNREAD |= {"*way_*shot": "few-shot folds: finetune.py --task fewshot reads them"}
UNREAD |= {"*_bbox.npy": "scans with boxes: detect.py reads them"}
LAYOUTS |= {"*train*.h5": open_h5, ".h5": open_h5, SYNSETS: open_shapenet_part}


def open_dataset(data: AnyPath, cache="", variant="PB_T50_RS", drop_invalid=False) -> Dataset:
    """'synthetic', the root of a published data set, a train .h5, a folder of clouds or one cloud.
    Sub-folders are classes; train, test and val, above or below them, are splits, else a fixed
    fifth of each class is the test set. Clouds are read once, into `cache`, else the folder."""
    if data == "synthetic":
        test = synthetic.synthetic_clouds(20, seed=1)
        return Dataset("synthetic shapes", synthetic.synthetic_clouds(50, seed=0), test)
    options = SimpleNamespace(cache=cache, variant=variant, drop_invalid=drop_invalid)
    path = Path(data)
    if not path.exists():
        raise act.UserError(f"{path}: expected 'synthetic', a file or a folder, got no such path")
    with files.reading(path):
        fitting = filter(lambda key: key == path.suffix or any(path.glob(key)), LAYOUTS)
        dataset = LAYOUTS.get(next(fitting, None), open_clouds)(path, options)
    if dataset.train.labels is not None and not dataset.train.classes:
        count = 1 + int(max(dataset.train.labels.max(), dataset.test.labels.max()))
        dataset.train.classes = [f"class {i}" for i in range(count)]
        dataset.test.classes = dataset.train.classes
    for kind, split in (("training", dataset.train), ("test", dataset.test)):
        for i, name in enumerate(split.classes):
            if i not in split.labels:
                dataset.notes.append(f"no {kind} clouds of {name}")
    return dataset


def open_parts(data: AnyPath, cache: AnyPath = "", drop_invalid: bool = False) -> Dataset:
    """'synthetic', a ShapeNetPart root, or own rows x y z ... label, named in classes.txt."""
    if data == "synthetic":
        train = synthetic.compositions(synthetic.synthetic_clouds(50, seed=0))
        test = synthetic.compositions(synthetic.synthetic_clouds(20, seed=1))
        return Dataset("synthetic compositions", train, test)
    root = Path(data)
    options = SimpleNamespace(cache=cache, drop_invalid=drop_invalid)
    with files.reading(root):
        if (root / SYNSETS).is_file():
            return open_shapenet_part(root, options)
        entries, notes = list_clouds(root, (0, 256))
        dataset = read_files(root.absolute().name, root, entries, options, notes=notes)
        labels = torch.cat([dataset.train.parts, dataset.test.parts])
        names = label_names(root, entries[0].name, labels)
        for split in (dataset.train, dataset.test):
            split.part_names = names
            split.part_ranges = [(0, len(names))]
        return dataset


def label_names(root, name, labels):
    """The lines of classes.txt, else "label 0" and so on. UserError if the labels are colours."""
    count = int(labels.max()) + 1
    names = read_names(root / "classes.txt", count)
    if names:
        return names
    if name.lower().endswith(".npy"):
        rows = files.read_numpy(root / name)
    else:
        lines = list(files.number_lines(root / name).values())
        text = re.sub("[,;]", " ", "\n".join(lines[len(lines) // 2 :][:9999]))  # no names
        rows = np.genfromtxt(text.split("\n"), ndmin=2, invalid_raise=False)
    is_byte = np.isin(rows[:, 3:], np.arange(256)).all(axis=0)  # (columns - 3,)
    is_color = len(is_byte) >= 3 and is_byte[-3:].all() and not is_byte[-4:-3].any()
    number = len(np.unique(labels))
    if is_color or number > 64:
        got = f"{number} labels like colours"
        raise act.UserError(f"{root / name}: expected labels, named in classes.txt, got {got}")
    return [f"label {i}" for i in range(count)]


def open_rooms(data: AnyPath, area=5, density=1200.0, drop_invalid: bool = False) -> Dataset:
    """'synthetic' rooms (`density` points per m²), S3DIS (test: `area`) or own, metres and z up."""
    root = Path(data)
    name = "S3DIS"
    classes = S3DIS_CLASSES
    notes = [f"area {area} is the test set"]
    areas = {}  # a file of PointNet's collect_indoor3d_data.py -> its area
    rooms = []
    with files.reading(root):
        if data == "synthetic":
            name = "synthetic rooms"
            classes = synthetic.ROOM_CLASSES
            for seed in itertools.product(range(1, 7), range(1, 4)):
                rooms.append(synthetic.synthetic_room(seed[0], seed[1], density))
        else:
            for path in sorted(root.glob("Area_[0-9]*_*.npy")):
                areas[path] = int(re.search("[0-9]+", path.name)[0])
        if not areas and not rooms:
            name = root.absolute().name
            classes = []
            area = 1
            entries, notes = list_clouds(root, (0, 256))
            for entry in entries:
                areas[root / entry.name] = int(entry.split == "test")
        for path, number in areas.items():
            xyz, labels = files.read_labelled(path, 0, len(classes) or 256, drop_invalid)
            moved = (xyz - xyz.min(axis=0)).astype(np.float32)
            rooms.append(Room(path.stem, number, moved, labels))
        if not classes:
            labels = np.concatenate([room.labels for room in rooms])
            classes = label_names(root, entries[0].name, labels)
        train = [room for room in rooms if room.area != area or len(rooms) == 1]
        test = [room for room in rooms if room.area == area or len(rooms) == 1]
        if not train or not test:
            raise act.UserError(f"expected rooms of Area_{area} and others, got {len(rooms)} rooms")
    return Dataset(name, train, test, classes, notes=notes)


def open_scans(data: AnyPath, points: int) -> Dataset:
    """Scenes with boxes: 'synthetic' of `points` or more points, or VoteNet's form of ScanNetV2."""
    if data == "synthetic":
        train = synthetic_scenes(7, 400, points)
        test = synthetic_scenes(8, 48, points)
        return Dataset("synthetic rooms", train, test, synthetic.ROOM_CLASSES[3:])
    root = Path(data)
    with files.reading(root):
        train, train_note = read_scans(root, "scannetv2_train.txt")
        test, test_note = read_scans(root, "scannetv2_val.txt")
    return Dataset("ScanNetV2", train, test, SCANNET, notes=[train_note, test_note])


def synthetic_scenes(area, count, points):
    """The furnished rooms 0 to count - 1 of an area as Scenes."""
    scenes = []
    for i in range(count):
        room = synthetic.synthetic_room(area, i, points / 35)
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
        labels = np.searchsorted(SCANNET_IDS, boxes[:, 6])
        points = files.read_points(root / f"{name}_vert.npy")
        boxes = np.hstack([boxes[:, :3] - clouds.origin(points), boxes[:, 3:6]])
        xyz = clouds.as_float32(points, normalized=False)
        scans.append(Scene(name, xyz, boxes.astype(np.float32), labels))
    if not scans:
        raise act.UserError(f"expected {list_name} and <scan>_vert.npy of its scans, got none")
    return scans, f"{len(missing)} of {len(names)} scans missing {', '.join(missing)}".strip()
