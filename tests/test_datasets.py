"""Tests of util/datasets.py: folders, their cache, published layouts, pickles, rooms and scans."""

import os
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common import refused
from util import clouds, datasets, files

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
open_fold = partial(datasets.read_episode, way=2)


@pytest.fixture(autouse=True)
def new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(tree):
    for name, content in tree.items():
        path = Path("set", name)
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


def write_clouds(names):
    for i, name in enumerate(names.split()):
        write({name: CLOUD + np.eye(40, 6, i)})


LAYOUTS = {  # words of the description -> clouds, other files, labels to train and to test on
    "ShapeNet-55: 2 training and 1 test cloud, 2 classes: a, b; no test clouds of b": (
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
    "ModelNet40: 2 training and 1 test cloud, 2 classes: class 0, class 1; no test clouds": (
        "",
        {DAT: [[CLOUD, CLOUD], [[0], np.array([1])]], DAT.replace("train", "test"): [[CLOUD], [0]]},
        [[0, 1], [0]],
    ),
    "ShapeNetPart: 2 training and 1 test cloud, 2 classes: Bag, Mug; no test clouds of Bag": (
        "",
        {SYNSETS: "Bag\t01\nMug\t02\n", "01/a.txt": BAG, "02/b.txt": MUG, "02/c.txt": MUG}
        | {LIST: '["s/02/b"]', LIST.replace("train_f", "val_f"): '["s/01/a"]'}
        | {LIST.replace("train_f", "test_f"): '["s/02/c"]'},
        [[0, 1], [1]],
    ),
    "set: 4 training and 2 test clouds, 2 classes: bowl, cone; val joins the training set": (
        "",
        {"x_train1.h5": [[1], [1]], "x_train0.h5": [[0]], "x_val0.h5": [0], "x_testing.h5": [0, 1]}
        | {"shape_names.txt": "bowl\ncone"},
        [[0, 1, 1, 0], [0, 1]],
    ),
    "val is the test set": ("a/train/0.npy b/train/1.npy b/Valid/2.npy", {}, [[0, 1], [1]]),
    "b, train; the folder train is a class": (
        "train/b/0.npy train/train/1.npy test/train/2.npy",
        {},
        [[0, 1], [1]],
    ),
    "car, train; the folder train is a class; a fixed fifth": (
        "car/0.npy car/1.npy train/2.npy train/3.npy",
        {},
        [[0, 1], [0, 1]],
    ),
    "val joins the training set": ("Val/b/1.npy train/a/0.npy testing/b/2.npy", {}, [[1, 0], [1]]),
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


def test_scanobjectnn_is_read_as_stored_by_variant():
    for i, path in enumerate(datasets.SCAN_FILES.values()):
        path = f"h5_files/{path}"
        write({path: [i, 14], path.replace("training", "test"): [i]})
    for i, (variant, path) in enumerate(datasets.SCAN_FILES.items()):
        for root in ("set", Path("set/h5_files", path).parent, Path("set/h5_files", path)):
            dataset = datasets.open_dataset(root, variant=variant)
            assert dataset.train.labels.tolist() == [i, 14] and len(dataset.test.classes) == 15
            assert dataset.train.sample(torch.tensor([0]), 40)[0].mean() > 6  # not normalised


def test_s3dis_is_rooms_split_by_area_and_blocks_of_a_square_metre():
    for area in (1, 5):
        xyz = np.random.default_rng(area).uniform(0, [1.6, 1.2, 2], (4000, 3)) + 10
        labels = (xyz[:, 2] > 11) * 12
        write({f"Area_{area}_office_1.npy": np.column_stack([xyz, 0 * xyz, labels])})
    rooms = datasets.open_rooms("set", area=1)
    assert rooms.test[0].name == "Area_1_office_1" and len(rooms.classes) == 13
    assert set(rooms.test[0].labels) == {0, 12} and rooms.train[0].area == 5
    train = datasets.open_dataset("set").train
    for i in range(2):  # the others have fewer than 1024 points
        assert len(train) == 2 and np.ptp(train[i].numpy(), axis=0)[:2].max() <= 1


def test_a_folder_gives_clouds_with_classes_and_says_what_it_skipped():
    write_clouds("chair/a.npy chair/b.xyz lamp/c.npy .hidden.npy run/picture.npy")
    write({"lamp/deep/d.npy": np.tile(CLOUD, (500, 1)), "README.txt": "2\n\n1. Install"})
    write({"run/config.json": "", "run/metrics.jsonl": "", "sofa/a.e57": "", "sofa/b.e57": ""})
    Path("set/stool").mkdir()
    dataset = datasets.open_dataset("set")
    sizes = "set: 2 training and 2 test clouds, 2 classes: chair, lamp; "
    skipped = "skipped: 2 .e57, 1 .txt, 1 .json, 1 .jsonl, 1 .npy; not read, as of a run of ours: "
    rest = "set/run; no clouds in run, sofa, stool; a fixed fifth is the test set"
    assert datasets.describe(dataset) == f"{sizes}{skipped}{rest}"
    longest = max(dataset.train.offsets.diff().max(), dataset.test.offsets.diff().max())
    assert longest == clouds.MAX_POINTS


def test_a_fixed_fifth_of_each_class_is_held_out_but_never_all_of_it():
    write_clouds(" ".join(f"a/{i}.npy" for i in range(19)) + " b/0.npy b/1.npy c/0.npy")
    dataset = datasets.open_dataset("set")
    assert dataset.test.names == ["a/0.npy", "a/16.npy", "a/6.npy", "b/0.npy"]  # for ever
    assert dataset.train.labels.bincount().tolist() == [16, 1, 1]
    write_clouds("0.npy")  # in no class folder
    dataset = datasets.open_dataset("set")
    assert dataset.train.labels is None and "no classes, since 0.npy" in dataset.notes[1]
    assert datasets.open_dataset("set/0.npy").test.names == ["0.npy"]


def all_points():
    dataset = datasets.open_dataset("set")
    return torch.cat([dataset.train.points, dataset.test.points])


def test_a_folder_is_read_once_until_a_file_changes(monkeypatch):
    write_clouds("a/0.npy a/1.npy")
    first = all_points()
    before = set(Path("set").glob(".clouds*"))
    with monkeypatch.context() as patch:
        patch.setattr(files, "READERS", dict.fromkeys(files.READERS))  # none can be called
        datasets.open_dataset("set").train.points.zero_()  # what is written stays private
        assert torch.equal(all_points(), first)
    os.utime("set/a/0.npy", ns=(1, 1))
    assert torch.equal(all_points(), first)
    after = set(Path("set").glob(".clouds*"))
    assert len(after) == 2 and not after & before
    for path in after:  # a damaged one is made again
        whole = path.read_bytes()
        for damaged in (b"", whole[:-5]):
            path.write_bytes(damaged)
            assert torch.equal(all_points(), first) and path.read_bytes() == whole
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(datasets.tempfile, "gettempdir", lambda: "temporary")
    assert torch.equal(all_points(), first)
    assert len(list(Path("temporary").rglob(".clouds*.points"))) == 1


def test_points_that_are_not_finite_are_left_out_if_asked_for():
    for cloud in ("set/a.npy", "set/b.npy"):
        write_clouds("a.npy b.npy")
        np.save(cloud, np.insert(CLOUD, 3, np.nan, axis=0))
        dataset = datasets.open_dataset("set", drop_invalid=True)
        assert len(dataset.train[0]) == len(dataset.test[0]) == 40
        with refused(cloud[4:]):
            datasets.open_dataset("set")


def test_broken_files_are_named_one_in_a_line(capsys):
    write({"a.xyz": "1 2 3\n4 5", "b.npy": [1], "c.npy": CLOUD})
    with refused("2 of 3 broken", "a.xyz", "b.npy"):
        datasets.open_dataset("set")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines[1:]] == ["set/a.xyz", "set/b.npy"]


PARTS_H5 = {"a_train0.h5": [0], "a_train1.h5": [0], "a_test.h5": [0]}
MANY = np.column_stack([CLOUD[:, :3], np.arange(40)])
COLORS = np.column_stack([CLOUD[:, :3], np.arange(120).reshape(40, 3) % 7])
MISTAKES = [  # what opens it, words of the message, files
    (open_scans, "a_bbox.npy", SCANS | {"a_bbox.npy": [[13.0] * 7]}),
    (datasets.open_dataset, "1 .las laspy", {"a.las": b"", "b.txt": ""}),
    (datasets.open_dataset, "from 0 or 1", {"a_train0.h5": [0], "a_train2.h5": [0]}),
    (lambda _: datasets.open_dataset("set/a_train0.h5"), "a_train0.h5: 2 parts", PARTS_H5),
    (datasets.open_parts, "7 labels colours", {"a.npy": COLORS, "b.npy": COLORS}),
    (datasets.open_rooms, "7 labels colours", {"a.xyz": COLORS, "b.xyz": COLORS}),
    (datasets.open_parts, "80 colours", {"a.npy": MANY, "b.npy": MANY + [0, 0, 0, 40]}),
    (datasets.open_dataset, "b.npy", {"train/a.npy": CLOUD, "test/a.npy": CLOUD, "b.npy": CLOUD}),
    (datasets.open_dataset, f"{DAT} readable", {DAT: [1, 2, 3]}),
    (datasets.open_dataset, "x_test.h5 labels", {"x_train.h5": [0], "x_test.h5": [0, -1]}),
    (datasets.open_parts, "train_file_list synset", {SYNSETS: "Bag 1", LIST: '["a/2/b"]'}),
    (datasets.open_parts, "classes.txt 4", {"a.npy": PARTS, "b.npy": PARTS, "classes.txt": "x"}),
    (datasets.open_rooms, "Area_5", {"Area_1_a.npy": PARTS, "Area_2_b.npy": PARTS}),
    (datasets.open_rooms, "Area_5b_a.npy", {"Area_5b_a.npy": PARTS}),
]


class Call(tuple):  # Its pickle calls a function with arguments, and may set a state.
    def __reduce__(self):
        return tuple(self)


MAKE = np.zeros(1).__reduce__()[0]
# The flags of a forged object type say that it holds no objects: its bytes would become pointers.
FORGED = Call((np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)))
FORGED_ARRAY = Call((MAKE, (np.ndarray, (0,), b"b"), (1, (4, 3), FORGED, False, b"A" * 96)))
FOLD = {"train": [(CLOUD, 0, "a")], "test": [(CLOUD[:20], 1, "b")]}
REFUSED = {
    "sys.exit": [Call((sys.exit, ("executed",)))],  # no reader catches a SystemExit
    "readable": pickle.dumps(FOLD)[:-40],
    "memo": b"\x80\x02Nr\xff\xff\xff\xff.",  # claims 4 GB
    "below 2": FOLD | {"test": [(CLOUD, 2, "c")]},
    "object": FOLD | {"test": [(FORGED_ARRAY, 1, "b")]},
    "points": FOLD | {"test": [("words", 1, "b")]},
}
for word, content in REFUSED.items():  # and nothing in them runs
    MISTAKES.append((open_fold, f"0.pkl expected {word}", {"0.pkl": content}))


@pytest.mark.parametrize("opener, words, tree", MISTAKES)
def test_mistakes_are_named_in_one_line(opener, words, tree):
    write(tree)
    with refused("set", *words.split()):
        opener(next(Path("set").glob("0.pkl"), "set"))
    assert not list(Path().rglob("*.tmp"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_few_shot_folds_of_every_numpy_type_and_order(protocol):
    values = np.arange(48).reshape(8, 6)
    arrays = [values.astype(code) for code in ("f4", "f8", "<i2", ">i8")]
    arrays.append(np.asfortranarray(values.astype(">f4")))
    data = pickle.dumps(FOLD | {"train": [(array, np.int64(0), "a") for array in arrays]}, protocol)
    if protocol < 4:  # as numpy 1 writes it
        data = data.replace(b"numpy._core.", b"numpy.core.")
    write({"0.pkl": data})
    train, test = datasets.read_episode("set/0.pkl", 2)
    assert train.labels.tolist() == [0] * 5 and test.labels.tolist() == [1]
    np.testing.assert_array_equal(train.points, np.tile(values[:, :3], (5, 1)))


def test_labelled_clouds_are_parts_or_rooms():
    write({"train/x/a.npy": PARTS, "train/b.txt": PARTS, "Test/c.xyz": PARTS})
    assert datasets.open_parts("set").test.part_names == [f"label {i}" for i in range(4)]
    expected = ["wall", "floor", "door", "lamp", "sofa"]
    write({"classes.txt": "\n".join(expected)})
    dataset = datasets.open_parts("set")
    rooms = datasets.open_rooms("set")
    assert dataset.train.part_names == rooms.classes == expected
    assert dataset.train.labels is None and dataset.test.part_ranges == [(0, len(expected))]
    assert dataset.test.parts.tolist() == rooms.test[0].labels.tolist() == PARTS[:, 3].tolist()
    assert (rooms.test[0].xyz.min(axis=0) == 0).all()
    rooms = datasets.open_rooms("synthetic", area=2, density=60)
    assert datasets.describe(rooms).startswith("synthetic rooms: 15 training and 3 test rooms, 9")


def test_scans_are_read_as_they_were_written():
    write(SCANS)
    data = open_scans("set")
    first, second = data.train
    np.testing.assert_array_equal(first.xyz, CLOUD[:, :3])
    np.testing.assert_array_equal(first.boxes, BOXES[:, :6].astype(np.float32))
    assert first.labels.tolist() == [0, 17, 10] and data.classes[17] == "garbagebin"
    assert second.boxes.shape == (0, 6) and data.test[0].name == "c"
    assert data.notes == ["1 of 3 scans missing z", "0 of 1 scans missing"]
