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
COLORS = np.column_stack([CLOUD[:, :3], np.arange(120).reshape(40, 3) % 7])
BAG = np.column_stack([CLOUD, np.arange(40) % 2 + 4])
MUG = BAG + np.repeat([0, 32], [6, 1])
BOXES = np.column_stack([CLOUD[:3, :3], CLOUD[:3, 3:] ** 2, [3, 39, 14]])
SCANS = {"scannetv2_train.txt": "a b z", "scannetv2_val.txt": "c", "b_bbox.npy": np.zeros(0)}
SCANS |= dict.fromkeys(["a_vert.npy", "b_vert.npy", "c_vert.npy"], CLOUD)
SCANS |= dict.fromkeys(["a_bbox.npy", "c_bbox.npy"], BOXES)
SHAPENET = {"ShapeNet-55/train.txt": "a-1.npy\nb-0.npy", "ShapeNet-55/test.txt": "a-0.npy\n"}
for i, name in enumerate(["a-0", "a-1", "b-0", "b-9"]):
    SHAPENET[f"shapenet_pc/{name}.npy"] = CLOUD + np.eye(40, 6, i)
MODELNET = {"modelnet40_train.txt": "a_c_2", "modelnet40_test.txt": "b_1\r\na_c_3"}
MODELNET |= {"modelnet40_shape_names.txt": "b\na_c"}
DAT = "modelnet40_train_8192pts_fps.dat"
PACKED = {DAT: [[CLOUD, CLOUD], [[0], np.array([1])]]}
PACKED |= {DAT.replace("train", "test"): [[CLOUD], [0]]}
SYNSETS = "synsetoffset2category.txt"
LIST = "train_test_split/shuffled_train_file_list.json"
MODELS = {SYNSETS: "Bag\t01\nMug\t02\n", "01/a.txt": BAG, "02/b.txt": MUG, "02/c.txt": MUG}
MODELS |= {LIST: '["s/02/b"]', LIST.replace("train_f", "val_f"): '["s/01/a"]'}
MODELS |= {LIST.replace("train_f", "test_f"): '["s/02/c"]'}
H5 = {"x_train10.h5": [[1], [1]], "x_train9.h5": [[0]], "x_testing.h5": [0, 1]}
H5 |= {"shape_names.txt": "bowl\ncone"}
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


LAYOUTS = [  # words of the description, labels to train and to test on, clouds, other files
    ("val is in the test set", [[0, 1], [1]], "a/train/0.npy b/train/1.npy b/Valid/2.npy", {}),
    ("val is in the train set", [[1, 0], [1]], "Val/b/1.npy train/a/0.npy testing/b/2.npy", {}),
    ("train is a class", [[0, 1], [1]], "train/b/0.npy train/train/1.npy test/train/2.npy", {}),
    ("train is a class", [[0, 1], [0, 1]], "car/0.npy car/1.npy train/2.npy train/3.npy", {}),
    ("a, b; no test clouds of b", [[0, 1], [0]], "", SHAPENET),
    ("b, a_c; no training", [[1], [1, 0]], "b/b_1.txt a_c/a_c_2.txt a_c/a_c_3.txt", MODELNET),
    ("ModelNet40: 2 training and 1 test clouds, 2 classes", [[0, 1], [0]], "", PACKED),
    ("Bag, Mug; no test clouds of Bag", [[0, 1], [1]], "", MODELS),
    ("bowl, cone", [[0, 1, 1], [0, 1]], "", H5),
]


@pytest.mark.parametrize("text, labels, names, others", LAYOUTS)
def test_layouts_are_told_apart_and_followed(text, labels, names, others):
    write_clouds(names)
    write(others)
    dataset = datasets.open_dataset("set")
    assert text in datasets.describe(dataset)
    assert [dataset.train.labels.tolist(), dataset.test.labels.tolist()] == labels
    for split in (dataset.train, dataset.test):
        for i, name in enumerate(split.names):
            for path in Path("set").rglob(name):
                np.testing.assert_array_equal(split[i], files.read_cloud(path, None))
    if others is SHAPENET:  # pretraining takes all that the lists name
        assert dataset.everything.names == ["a-1.npy", "b-0.npy", "a-0.npy"]
    if others is H5:  # the other parts are read, too
        assert len(datasets.open_dataset("set/x_train9.h5").train) == 3
    if others is MODELS:
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
        write({f"Area_{area}_a.npy": np.column_stack([xyz, 0 * xyz, (xyz[:, 2] > 11) * 12])})
    rooms = datasets.open_rooms("set", area=1)
    assert set(rooms.test[0].labels) == {0, 12} and rooms.train[0].area == 5
    train = datasets.open_dataset("set").train
    assert [np.ptp(block.numpy(), axis=0)[:2].max() <= 1 for block in train] == [True, True]


def test_a_folder_says_what_it_skipped_and_holds_out_a_fixed_fifth_of_each_class():
    write_clouds(" ".join(f"a/{i}.npy" for i in range(19)) + " b/0.npy b/1.npy c/0.npy run/a.npy")
    write({"b/1.npy": np.tile(CLOUD, (500, 1)), "README.txt": "2\n\n1. Install", ".x.npy": CLOUD})
    write({"run/config.json": "", "run/metrics.jsonl": "", "sofa/a.e57": ""})
    dataset = datasets.open_dataset("set")
    notes = "skipped: 1 .txt, 1 .npy, 1 .json, 1 .jsonl, 1 .e57; runs of ours, not read: set/run"
    notes += "; no clouds in: run, sofa; a fixed fifth is the test set; no test clouds of c"
    assert "; ".join(dataset.notes) == notes
    assert dataset.test.names == ["a/0.npy", "a/16.npy", "a/6.npy", "b/0.npy"]  # for ever
    assert dataset.train.labels.bincount().tolist() == [16, 1, 1]
    assert dataset.train.offsets.diff().max() == clouds.MAX_POINTS
    write({"0.npy": CLOUD})  # in no class folder
    dataset = datasets.open_dataset("set")
    assert dataset.train.labels is None and "no classes, since 0.npy" in dataset.notes[-1]
    assert datasets.open_dataset("set/0.npy").test.names == ["0.npy"]


def all_points(**options):
    dataset = datasets.open_dataset("set", **options)
    return torch.cat([dataset.train.points, dataset.test.points])


def test_a_folder_is_read_once_until_a_file_changes(monkeypatch):
    write_clouds("a/0.npy a/1.npy")
    first = all_points()
    with monkeypatch.context() as patch:
        patch.setattr(files, "READERS", dict.fromkeys(files.READERS))  # none can be called
        datasets.open_dataset("set").train.points.zero_()  # what is written stays private
        assert torch.equal(all_points(), first)
    for path in Path("set").glob(".clouds*"):  # a damaged one is made again
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        assert torch.equal(all_points(), first) and path.read_bytes() == whole
    np.save("set/a/0.npy", np.insert(CLOUD, 3, np.nan, axis=0))
    assert len(all_points(drop_invalid=True)) == 80
    assert len(list(Path("set").glob(".clouds*"))) == 2  # in place of those of earlier files
    with refused("a/0.npy"):
        all_points()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with refused("set: ", "--cache"):
        all_points()


class Call(tuple):  # Its pickle calls a function with arguments, and may set a state.
    def __reduce__(self):
        return tuple(self)


MAKE = np.zeros(1).__reduce__()[0]
# The flags of a forged object type say that it holds no objects: its bytes would become pointers.
FORGED = Call((np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)))
FORGED_ARRAY = Call((MAKE, (np.ndarray, (0,), b"b"), (1, (4, 3), FORGED, False, b"A" * 96)))
FOLD = {"train": [(CLOUD, 0, "a")], "test": [(CLOUD[:20], 1, "b")]}
MANY = np.column_stack([CLOUD[:, :3], np.arange(40)])
BROKEN = {"a.xyz": "1 2 3\n4 5", "b.npy": [1], "c.npy": CLOUD}
MISTAKES = [  # what opens it, words of the message, files
    (datasets.open_dataset, "2 of 3 broken a.xyz b.npy", BROKEN),
    (open_scans, "a_bbox.npy", SCANS | {"a_bbox.npy": [[13.0] * 7]}),
    (datasets.open_dataset, "1 .las laspy", {"a.las": b"", "b.txt": ""}),
    (datasets.open_parts, "7 labels colours", {"a.npy": COLORS, "b.npy": COLORS}),
    (datasets.open_rooms, "7 labels colours", {"a.xyz": COLORS, "b.xyz": COLORS}),
    (datasets.open_parts, "80 colours", {"a.npy": MANY, "b.npy": MANY + [0, 0, 0, 40]}),
    (datasets.open_dataset, "b.npy", {"train/a.npy": CLOUD, "test/a.npy": CLOUD, "b.npy": CLOUD}),
    (datasets.open_dataset, f"{DAT} data", {DAT: [1, 2, 3]}),
    (datasets.open_dataset, "x_test.h5 labels", {"x_train.h5": [0], "x_test.h5": [0, -1]}),
    (datasets.open_parts, "train_file_list '2'", {SYNSETS: "Bag 1", LIST: '["a/2/b"]'}),
    (datasets.open_rooms, "Area_5", {"Area_1_a.npy": PARTS, "Area_2_b.npy": PARTS}),
    (open_fold, "sys.exit", {"0.pkl": [Call((sys.exit, ("executed",)))]}),  # no reader catches it
    (open_fold, "memo", {"0.pkl": b"\x80\x02Nr\xff\xff\xff\xff."}),  # claims 4 GB
    (open_fold, "below 2", {"0.pkl": FOLD | {"test": [(CLOUD, 2, "c")]}}),
    (open_fold, "object", {"0.pkl": FOLD | {"test": [(FORGED_ARRAY, 1, "b")]}}),
    (open_fold, "points", {"0.pkl": FOLD | {"test": [("words", 1, "b")]}}),
]


@pytest.mark.parametrize("opener, words, tree", MISTAKES)
def test_mistakes_are_named_in_one_line_and_nothing_in_a_file_runs(opener, words, tree):
    write(tree)
    with refused("set", *words.split()):
        opener(next(Path("set").glob("0.pkl"), "set"))
    assert not list(Path().rglob("*.tmp"))


def test_few_shot_folds_of_every_numpy_type_and_order_as_numpy_1_writes_them():
    values = np.arange(48).reshape(8, 6)
    arrays = [values.astype(code) for code in ("f4", "f8", "<i2", ">i8")]
    arrays.append(np.asfortranarray(values.astype(">f4")))
    data = pickle.dumps(FOLD | {"train": [(array, np.int64(0), "a") for array in arrays]}, 2)
    write({"0.pkl": data.replace(b"numpy._core.", b"numpy.core.")})
    train, test = datasets.read_episode("set/0.pkl", 2)
    assert train.labels.tolist() == [0] * 5 and test.labels.tolist() == [1]
    np.testing.assert_array_equal(train.points, np.tile(values[:, :3], (5, 1)))


def test_labelled_clouds_are_parts_or_rooms():
    write({"train/x/a.npy": PARTS, "train/b.txt": PARTS, "Test/c.xyz": PARTS})
    assert datasets.open_parts("set").test.part_names == [f"label {i}" for i in range(4)]
    write({"classes.txt": "wall\nfloor\ndoor\nlamp\nsofa"})
    dataset = datasets.open_parts("set")
    rooms = datasets.open_rooms("set")
    assert dataset.train.part_names == rooms.classes == "wall floor door lamp sofa".split()
    assert dataset.train.labels is None and dataset.test.part_ranges == [(0, 5)]
    assert dataset.test.parts.tolist() == rooms.test[0].labels.tolist() == PARTS[:, 3].tolist()
    assert (rooms.test[0].xyz.min(axis=0) == 0).all()


def test_scans_are_read_as_they_were_written():
    write(SCANS)
    data = open_scans("set")
    first, second = data.train
    np.testing.assert_array_equal(first.xyz, CLOUD[:, :3])
    np.testing.assert_array_equal(first.boxes, BOXES[:, :6].astype(np.float32))
    assert first.labels.tolist() == [0, 17, 10] and data.classes[17] == "garbagebin"
    assert second.boxes.shape == (0, 6) and data.test[0].name == "c"
    assert data.notes == ["1 of 3 scans missing z", "0 of 1 scans missing"]
