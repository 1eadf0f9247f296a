"""Tests of util/datasets.py: folders, their cache, published layouts, pickles, rooms and scans."""

import os
import pickle
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common import refused
from util import clouds, datasets, files, synthetic

CLOUD = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
PARTS = np.column_stack([CLOUD[:, :3], np.arange(40) % 4])  # labels in the last column
BAG = np.column_stack([CLOUD, np.arange(40) % 2 + 4])
MUG = np.column_stack([CLOUD, np.arange(40) % 2 + 36])
BOXES = np.column_stack([CLOUD[:3, :3], CLOUD[:3, 3:] ** 2, [3, 39, 14]])
SYNSETS = "synsetoffset2category.txt"
LIST = "train_test_split/shuffled_train_file_list.json"
DAT = "modelnet40_train_8192pts_fps.dat"
SCANS = {"scannetv2_train.txt": "a b z", "scannetv2_val.txt": "c"}
for scan in "abc":
    SCANS |= {f"{scan}_vert.npy": CLOUD, f"{scan}_bbox.npy": BOXES}
SCANS["b_bbox.npy"] = np.zeros(0)
open_scans = partial(datasets.open_scans, points=100)


@pytest.fixture(autouse=True)
def new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(tree, root="set"):
    """Writes texts, bytes, arrays as the suffixes say, the labels of an .h5, or pickled values."""
    for name, content in tree.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif path.suffix == ".npy":
            np.save(path, content)
        elif path.suffix in (".txt", ".xyz"):
            np.savetxt(path, content)
        elif path.suffix == ".h5":
            with pytest.importorskip("h5py").File(path, "w") as file:
                file["data"] = np.stack([CLOUD + 7] * len(content))
                file["label"] = content
        else:
            path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))


def write_clouds(names, root="set"):
    """A cloud at each of the names, no two alike."""
    for i, name in enumerate(names.split()):
        write({name: CLOUD + np.eye(40, 6, i)}, root)


# -- Published layouts ----------------------------------------------------------------------------
LAYOUTS = {  # words of the description -> clouds, other files, labels to train and to test on
    "ShapeNet-55: 2 training and 1 test clouds, 2 classes: a, b; no test clouds of b": (
        "shapenet_pc/a-0.npy shapenet_pc/a-1.npy shapenet_pc/b-0.npy shapenet_pc/b-9.npy",
        {"ShapeNet-55/train.txt": "a-1.npy\nb-0.npy", "ShapeNet-55/test.txt": "a-0.npy\n"},
        [[0, 1], [0]],
    ),
    "ModelNet40: 1 training and 2 test clouds, 2 classes: b, a_c; no training clouds of b": (
        "b/b_1.txt a_c/a_c_2.txt a_c/a_c_3.txt",
        {"modelnet40_shape_names.txt": "b\na_c", "modelnet40_train.txt": "a_c_2"}
        | {"modelnet40_test.txt": "b_1\r\na_c_3"},
        [[1], [1, 0]],
    ),
    "ModelNet40: 2 training and 1 test clouds, 2 classes: class 0, class 1; no test clouds": (
        "",
        {DAT: [[CLOUD, CLOUD], [[0], np.array([1])]], DAT.replace("train", "test"): [[CLOUD], [0]]},
        [[0, 1], [0]],
    ),
    "ShapeNetPart: 2 training and 1 test clouds, 2 classes: Bag, Mug; no test clouds of Bag": (
        "",
        {SYNSETS: "Bag\t01\nMug\t02\n", "01/a.txt": BAG, "02/b.txt": MUG, "02/c.txt": MUG}
        | {LIST: '["s/02/b"]', LIST.replace("train_f", "val_f"): '["s/01/a"]'}
        | {LIST.replace("train_f", "test_f"): '["s/02/c"]'},
        [[0, 1], [1]],
    ),
    "set: 2 training": ("", {"x_train.h5": [[0], [1]], "x_test.h5": [0]}, [[0, 1], [0]]),
    "2 test clouds": ("a/train/0.npy b/TEST/1.npy a/testing/2.npy", {}, [[0], [0, 1]]),
    "val is the test set": ("train/a/0.npy train/b/1.npy valid/b/2.npy", {}, [[0, 1], [1]]),
    "val joins the training set": ("Val/b/1.npy train/a/0.npy test/b/2.npy", {}, [[1, 0], [1]]),
}


@pytest.mark.parametrize("text", LAYOUTS)
def test_layouts_are_told_apart_and_followed(text):
    names, others, labels = LAYOUTS[text]
    write_clouds(names)
    write(others)
    dataset = datasets.open_dataset("set")
    assert text in datasets.describe(dataset)
    assert [dataset.train.labels.tolist(), dataset.test.labels.tolist()] == labels
    for split in (dataset.train, dataset.test):
        for i, name in enumerate(split.names):
            for path in Path("set").rglob(name):
                np.testing.assert_array_equal(split[i], files.read_cloud(path, None))
    if "ShapeNet-55" in text:  # pretraining takes all that the lists name
        assert dataset.everything.names == ["a-1.npy", "b-0.npy", "a-0.npy"]
    if "ShapeNetPart" in text:
        assert dataset.train.part_ranges == [(4, 6), (36, 38)]
        assert datasets.open_parts("set").test.parts.tolist() == [36, 37] * 20


@pytest.mark.parametrize("variant", datasets.SCAN_FILES)
def test_scanobjectnn_is_read_as_stored_by_variant(variant):
    for i, path in enumerate(datasets.SCAN_FILES.values()):
        write({path: [i, 14], path.replace("training", "test"): [i]}, "set/h5_files")
    train = Path("set/h5_files", datasets.SCAN_FILES[variant])
    for path in ("set", train.parent, train):
        dataset = datasets.open_dataset(path, variant=variant)
        assert dataset.name.startswith("ScanObjectNN") and len(dataset.test.classes) == 15
        assert dataset.train.labels.tolist() == [list(datasets.SCAN_FILES).index(variant), 14]
        assert dataset.train.sample(torch.tensor([0]), 40)[0].mean() > 6  # not normalised
    os.rename(train.parent, "renamed")
    assert datasets.open_dataset("renamed", variant=variant).name == dataset.name


def test_s3dis_is_rooms_split_by_area_and_blocks_of_a_square_metre():
    for area in (1, 5):
        xyz = np.random.default_rng(area).uniform(0, [1.6, 1.2, 2], (4000, 3)) + 10
        rows = np.column_stack([xyz, 0 * xyz, (xyz[:, 2] > 11) * 12])
        write({f"Area_{area}_office_1.npy": rows})
    rooms = datasets.open_rooms("set", area=1)
    assert rooms.test[0].name == "Area_1_office_1" and rooms.train[0].area == 5
    xyz = rooms.test[0].xyz
    assert xyz.shape == (4000, 3) and xyz.dtype == np.float32 and (xyz.min(axis=0) == 0).all()
    assert set(rooms.test[0].labels) == {0, 12} and len(rooms.classes) == 13
    train = datasets.open_dataset("set").train
    assert train.labels is None and len(train) == 2  # the others have fewer than 1024 points
    for i in range(2):
        low, high = train[i].aminmax(dim=0)
        assert len(train[i]) >= 1024 and (high - low)[:2].max() <= 1


# -- Own folders and their splits -----------------------------------------------------------------
def test_a_folder_gives_clouds_with_classes_and_says_what_it_skipped():
    write_clouds("chair/a.npy chair/b.xyz lamp/c.npy .hidden.npy")
    write({"lamp/deep/d.npy": np.tile(CLOUD, (500, 1)) + 1e6, "README.txt": "2\n\n1. Install"})
    write({"notes.md": "no cloud", "classes.txt": "chair\nlamp\n"})
    dataset = datasets.open_dataset("set")
    sizes = "set: 2 training and 2 test clouds, 2 classes: chair, lamp"
    notes = ["1 .txt files without points skipped", "a fixed fifth is the test set"]
    assert datasets.describe(dataset) == "; ".join([sizes] + notes)
    longest = [int(split.offsets.diff().max()) for split in (dataset.train, dataset.test)]
    assert max(longest) == clouds.MAX_POINTS
    found = datasets.find_clouds(["set/chair", "nowhere.ply"])
    assert found == [Path("set/chair/a.npy"), Path("set/chair/b.xyz"), Path("nowhere.ply")]


def test_a_fixed_fifth_of_each_class_is_held_out_but_never_all_of_it():
    write_clouds(" ".join(f"a/{i}.npy" for i in range(19)) + " b/0.npy b/1.npy c/0.npy")
    dataset = datasets.open_dataset("set")
    # Results of different versions compare only as long as these stay the same clouds.
    assert dataset.test.names == ["a/0.npy", "a/16.npy", "a/6.npy", "b/0.npy"]
    assert dataset.train.labels.bincount().tolist() == [16, 1, 1]
    write_clouds("d/0.npy")
    assert datasets.open_dataset("set").test.names == dataset.test.names
    write_clouds("0.npy")  # in no class folder
    dataset = datasets.open_dataset("set")
    assert dataset.train.labels is None and len(dataset.test) == 4
    assert "no classes, since 0.npy" in dataset.notes[1]


def test_single_clouds_and_links_that_run_in_a_circle():
    write_clouds("0.npy", "one")
    for path in ("one", "one/0.npy"):
        assert datasets.open_dataset(path).train.names == ["0.npy"]
    write_clouds("a/0.npy")
    os.symlink(os.path.abspath("one"), "set/b")
    os.symlink(os.path.abspath("set"), "one/back")
    dataset = datasets.open_dataset("set")  # with one cloud in each class, a fifth of all
    assert len(dataset.train) == len(dataset.test) == 1 and dataset.test.classes == ["a", "b"]


def all_points(root="set", **options):
    dataset = datasets.open_dataset(root, **options)
    return torch.cat([dataset.train.points, dataset.test.points])


def test_a_folder_is_read_once_until_a_file_changes(monkeypatch):
    write_clouds("a/0.npy a/1.npy")
    first = all_points()
    before = sorted(Path("set").glob(".clouds*"))
    with monkeypatch.context() as patch:
        patch.setattr(files, "READERS", dict.fromkeys(files.READERS))  # none can be called
        datasets.open_dataset("set").train.points.zero_()  # what is written stays private
        assert torch.equal(all_points(), first)
    os.utime("set/a/0.npy", ns=(1, 1))
    assert torch.equal(all_points(), first)
    after = sorted(Path("set").glob(".clouds*"))
    assert len(after) == 2 and not set(after) & set(before)
    all_points(cache="there/deep")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(datasets.tempfile, "gettempdir", lambda: "temporary")
    write_clouds("0.npy", "other")
    assert not torch.equal(all_points(), all_points("other"))
    for folder, count in {"there/deep": 1, "temporary": 2, "other": 0}.items():
        assert len(list(Path(folder).rglob(".clouds*.points.npy"))) == count


@pytest.mark.parametrize("which", [0, 1], ids=["offsets", "points"])
def test_a_damaged_cache_is_rebuilt(which):
    write_clouds("a/0.npy a/1.npy")
    first = all_points()
    path = sorted(Path("set").glob(".clouds*"))[which]
    whole = path.read_bytes()
    broken = [b"", whole[:-5], whole[:100], bytes(len(whole)), b"PK\x03\x04" + whole]
    if which == 0:
        broken.append(whole[:-8] + bytes(8))  # offsets that do not fit the points
    for damaged in broken:
        path.write_bytes(damaged)
        assert torch.equal(all_points(), first) and path.read_bytes() == whole


MISTAKES = [  # what opens it, words of the message, files
    (datasets.open_dataset, "synthetic", {}),
    (datasets.open_dataset, "broken.xyz flat.npy", {"broken.xyz": "1 2 3\n4 5", "flat.npy": [1]}),
    (datasets.open_dataset, "training test", {"train/a.npy": CLOUD, "train/b.npy": CLOUD}),
    (datasets.open_dataset, "b.npy", {"train/a.npy": CLOUD, "test/a.npy": CLOUD, "b.npy": CLOUD}),
    (datasets.open_dataset, "train.txt", {"shapenet_pc/a-1.npy": CLOUD}),
    (datasets.open_dataset, "b-2", {"shapenet_pc/x": "", "train.txt": "b-1", "test.txt": "b-2"}),
    (datasets.open_dataset, f"{DAT} sys.exit", {DAT: b"csys\nexit\n(S'executed'\ntR."}),
    (datasets.open_dataset, f"{DAT} readable", {DAT: [1, 2, 3]}),
    (datasets.open_dataset, "one 2", {"a_train.h5": [0], "b_train.h5": [0]}),
    (datasets.open_dataset, "x_test.h5 labels", {"x_train.h5": [0], "x_test.h5": [0, -1]}),
    (datasets.open_dataset, "ScanObjectNN", {"main_split/test_objectdataset.h5": [0]}),
    (datasets.open_parts, "synsets", {SYNSETS: "Teapot 3"}),
    (datasets.open_parts, "train_file_list synset", {SYNSETS: "Bag 1", LIST: '["a/2/b"]'}),
    (datasets.open_parts, "train_file_list readable", {SYNSETS: "Bag 1", LIST: "[3"}),
    (datasets.open_parts, "classes.txt 4", {"a.npy": PARTS, "b.npy": PARTS, "classes.txt": "x"}),
    (datasets.open_rooms, "Area_5", {"Area_1/office_1/Annotations/wall_1.txt": CLOUD}),
    (datasets.open_rooms, "Area_5", {"Area_1_a.npy": PARTS, "Area_2_b.npy": PARTS}),
    (datasets.open_rooms, "Area_5b_a.npy", {"Area_5b_a.npy": PARTS}),
    (datasets.open_rooms, "Area_1_a.npy 12", {"Area_1_a.npy": PARTS + 10}),
]
for boxes in ([[13.0] * 7], [[3.0] * 6], [[-3.0] * 7], [["a"] * 7]):
    MISTAKES.append((open_scans, "a_bbox.npy", SCANS | {"a_bbox.npy": boxes}))


@pytest.mark.parametrize("opener, words, tree", MISTAKES)
def test_mistakes_in_folders_are_named_in_one_line(opener, words, tree):
    write(tree)
    with refused("set", *words.split()):
        opener("set")
    assert not list(Path().rglob("*.tmp"))


# -- Pickles --------------------------------------------------------------------------------------
class Call:
    """Its pickle calls a function, and may set a state."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state)

    def __reduce__(self):
        return self.reduced


RUN = Call(sys.exit, "executed")  # no reader catches a SystemExit
ARRAY = (np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b")  # what makes an array, its arguments
# The flags of a forged object type say that it holds no objects: its bytes would become pointers.
FORGED = Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))
FOLD = {"train": [(CLOUD, 0, "a")], "test": [(CLOUD[:20], 1, "b")]}
REFUSED = {
    "a list": [1, 2],
    "empty": {"train": [], "test": []},
    "no rows": FOLD | {"test": 7},
    "unknown class": FOLD | {"test": [(CLOUD, 2, "c")]},
    "ragged labels": FOLD | {"test": [(CLOUD, [0], "c"), (CLOUD, [0, 1], "c")]},
    "cut": pickle.dumps(FOLD)[:-40],
    "place of the memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 10**13) + b"N.",
}
HOSTILE = [RUN, np.ndarray, np.array([[RUN] * 3] * 4, object), np.zeros((4, 3), "f4,O"), "words", 7]
HOSTILE += [np.full((4, 3), "a"), np.zeros((4, 3), "V8"), Call(np.zeros, (4, 3))]
HOSTILE += [Call(ARRAY[0], np.ndarray, (10**13,), "d")]
HOSTILE += [Call(*ARRAY, state=(1, (4, 3), FORGED, False, b"A" * 96))]
HOSTILE += [Call(*ARRAY, state=(1, (2**32, 2**32), np.dtype("f8"), False, b""))]
for i, value in enumerate(HOSTILE):
    REFUSED[f"hostile {i}"] = FOLD | {"test": [(value, 1, "b")]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_few_shot_folds_of_every_pickle_protocol_numpy_type_and_order(protocol):
    values = np.arange(48).reshape(8, 6)
    arrays = [values.astype(code) for code in ("f4", ">f4", "f8", ">f8", "<i2", ">i8")]
    arrays.append(np.asfortranarray(arrays[1]))
    data = pickle.dumps(FOLD | {"train": [(array, np.int64(0), "a") for array in arrays]}, protocol)
    contents = [data]
    if protocol < 4:  # as numpy 1 writes it
        contents.append(data.replace(b"numpy._core.", b"numpy.core."))
    for content in contents:
        write({"0.pkl": content})
        train, test = datasets.read_episode("set/0.pkl", 2)
        assert train.labels.tolist() == [0] * 7 and test.labels.tolist() == [1]
        np.testing.assert_array_equal(train.points, np.tile(values[:, :3], (7, 1)))
        np.testing.assert_array_equal(test.points, CLOUD[:20, :3])


def test_a_fold_that_python_2_wrote_is_read():
    state = (1, (8, 3), np.dtype("f4"), False, "DATA")
    data = pickle.dumps(FOLD | {"train": [(Call(*ARRAY, state=state), 0, "a")]}, 2)
    text = b"X\x04\x00\x00\x00DATA"  # Python 2 has bytes here, without an encoding
    write({"0.pkl": data.replace(text, b"U" + bytes([96]) + CLOUD[:8, :3].tobytes())})
    train, _ = datasets.read_episode("set/0.pkl", 2)
    np.testing.assert_array_equal(train.points, CLOUD[:8, :3])


@pytest.mark.parametrize("name", REFUSED)
def test_other_pickles_run_nothing_and_are_refused(name):
    content = REFUSED[name]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        if not isinstance(REFUSED[name], bytes):
            content = pickle.dumps(REFUSED[name], protocol)
        write({"0.pkl": content})
        with refused("0.pkl", "expected", "sys.exit" if name == "hostile 0" else ""):
            datasets.read_episode("set/0.pkl", 2)


# -- Own labelled clouds, rooms, scans ------------------------------------------------------------
@pytest.mark.parametrize("names", ["", "wall floor door lamp sofa"])
def test_own_labelled_clouds_are_parts_or_rooms(names):
    write({"train/x/a.npy": PARTS, "train/b.txt": PARTS, "Test/c.xyz": PARTS})
    expected = names.split() or ["label 0", "label 1", "label 2", "label 3"]
    if names:
        write({"classes.txt": names.replace(" ", "\n")})
    dataset = datasets.open_parts("set")
    rooms = datasets.open_rooms("set")
    assert dataset.train.part_names == rooms.classes == expected
    assert dataset.train.labels is None and dataset.test.part_ranges == [(0, len(expected))]
    assert len(dataset.train) == len(rooms.train) == 2
    assert dataset.test.parts.tolist() == rooms.test[0].labels.tolist() == PARTS[:, 3].tolist()
    lowest = CLOUD[:, :3].min(axis=0)
    np.testing.assert_allclose(rooms.test[0].xyz, CLOUD[:, :3] - lowest, atol=1e-5)


def test_synthetic_rooms_are_eighteen_of_six_areas_and_scenes_have_boxes(monkeypatch):
    rooms = datasets.open_rooms("synthetic", area=2, density=60)
    assert [room.area for room in rooms.test] == [2, 2, 2]
    assert datasets.describe(rooms).startswith("synthetic rooms: 15 training and 3 test rooms, 9")
    same = synthetic.synthetic_rooms([(2, 1)], 60)[0]
    np.testing.assert_array_equal(same.xyz, rooms.test[0].xyz)
    monkeypatch.setattr(datasets, "ROOMS", ((7, 1), (8, 1)))
    for scene in open_scans("synthetic").train:
        assert len(scene.xyz) >= 100 and scene.labels.min() >= 0
        for box in scene.boxes:
            assert (abs(scene.xyz - box[:3]) <= box[3:] / 2 + 0.06).all(axis=1).any()


def test_scans_are_read_as_they_were_written():
    write(SCANS)
    data = open_scans("set")
    first, second = data.train
    np.testing.assert_array_equal(first.xyz, CLOUD[:, :3])
    np.testing.assert_array_equal(first.boxes, BOXES[:, :6].astype(np.float32))
    assert first.labels.tolist() == [0, 17, 10] and data.classes[17] == "garbagebin"
    assert second.boxes.shape == (0, 6) and data.test[0].name == "c"
    assert data.notes == ["1 of 3 scans missing z", "0 of 1 scans missing"]
