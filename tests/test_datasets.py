"""Tests of util/datasets.py: folders, caches, layouts, pickles, rooms, scans."""

import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common import refused
from util import clouds, datasets, files
from util.datasets import SYNSETS, open_dataset, open_parts, open_rooms

CLOUD = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
PARTS = np.column_stack([CLOUD[:, :3], np.arange(40) % 4])
MANY = np.column_stack([CLOUD[:, :3], np.arange(40)])
COLORS = np.column_stack([CLOUD[:, :3], np.arange(120).reshape(40, 3) % 7])
BAG = np.column_stack([CLOUD, np.arange(40) % 2 + 4])
BOXES = np.column_stack([CLOUD[:3, :3], CLOUD[:3, 3:] ** 2, [3, 39, 14]])
SCANS = {"scannetv2_train.txt": "a b z", "scannetv2_val.txt": "c", "b_bbox.npy": np.zeros(0)}
SCANS |= dict.fromkeys(["a_vert.npy", "b_vert.npy", "c_vert.npy"], CLOUD)
SCANS |= dict.fromkeys(["a_bbox.npy", "c_bbox.npy"], BOXES)
SHAPENET = {"ShapeNet-55/train.txt": "a-1.npy\nb-0.npy", "ShapeNet-55/test.txt": "a-0.npy\n"}
SHAPENET |= {f"shapenet_pc/{name}.npy": CLOUD for name in ("a-0", "a-1", "b-0", "b-9")}
MODELNET = {"modelnet40_train.txt": "a_c_2", "modelnet40_test.txt": "b_1\r\na_c_3"}
MODELNET |= {"modelnet40_shape_names.txt": "b\na_c"}
LISTED = MODELNET | dict.fromkeys(["b/b_1.txt", "a_c/a_c_2.txt", "a_c/a_c_3.txt"], CLOUD)
DAT = "modelnet40_train_8192pts_fps.dat"
PACKED = {DAT: [[CLOUD] * 2, [[0], np.array([1])]], DAT.replace("train", "test"): [[CLOUD], [0]]}
MODELS = {SYNSETS: "Bag 01\nMug\t02", "01/a.txt": BAG, "02/b.txt": BAG + 32, "02/c.txt": BAG + 32}
for name, path in {"train": "s/02/b", "val": "s/01/a", "test": "s/02/c"}.items():
    MODELS[f"train_test_split/shuffled_{name}_file_list.json"] = f'["{path}"]'
H5 = {"x_train10.h5": [[1], [1]], "x_train9.h5": [[0]], "x_testing.h5": [0, 1]}
H5 |= {"shape_names.txt": "bowl\ncone"}
open_scans = partial(datasets.open_scans, points=100)
open_fold = partial(datasets.read_episode, way=2)


def write(tree):
    for name, content in tree.items():
        path = Path("set", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, "latin-1")
        elif path.suffix == ".npy":
            np.save(path, content)
        elif path.suffix in (".txt", ".xyz"):
            np.savetxt(path, content)
        elif path.suffix == ".h5":  # labels, or (clouds, labels)
            if not isinstance(content, tuple):
                content = ([CLOUD + 7] * len(content), content)
            with pytest.importorskip("h5py").File(path, "w") as file:
                file["data"] = np.stack(content[0])
                file["label"] = content[1]
        else:  # as by numpy 1
            path.write_bytes(pickle.dumps(content, 2).replace(b"numpy._core.", b"numpy.core."))


def write_clouds(names):
    for i, name in enumerate(names.split()):
        write({f"{name}.npy": CLOUD + np.eye(40, 6, i)})


ALIKE = "train/o\u0308/0 train/x/1 test/\u00f6/2 test/X/3"
LAYOUTS = [  # words of the description, labels of both splits, clouds, other files
    ("val is in the train set", [[1, 0], [1]], "Val/b/1 train/a/0 testing/b/2", {}),
    ("train is a class", [[0, 1], [1]], "train/b/0 train/train/1 test/train/2", {}),
    ("x/y holds all", [[0, 1]] * 2, "x/y/a/0 x/y/a/1 x/y/train/2 x/y/train/3", {}),
    (": X, x, \u00f6; X and x are two", [[2, 1], [0, 2]], ALIKE, {}),
    ("a, b; no test clouds of b", [[0, 1], [0]], "", SHAPENET),
    ("b, a_c; no training", [[1], [1, 0]], "", LISTED),
    ("ModelNet40: 2 training and 1 test clouds", [[0, 1], [0]], "", PACKED),
    ("Bag, Mug; no test clouds of Bag", [[0, 1], [1]], "", MODELS),
    (": bowl, cone", [[0, 1, 1], [0, 1]], "", H5),
]


@pytest.mark.parametrize("text, labels, names, others", LAYOUTS)
def test_layouts_are_told_apart_and_followed(text, labels, names, others):
    write_clouds(names)
    write(others)
    dataset = open_dataset("set")
    assert text in datasets.describe(dataset)
    assert [dataset.train.labels.tolist(), dataset.test.labels.tolist()] == labels
    for split in (dataset.train, dataset.test):
        for i, name in enumerate(split.names):
            for path in Path("set").rglob(name):
                np.testing.assert_array_equal(split[i], files.read_cloud(path, None))
    if others is SHAPENET:
        assert dataset.everything.names == ["a-1.npy", "b-0.npy", "a-0.npy"]
    if others is H5:
        assert len(open_dataset("set/x_train9.h5").train) == 3
    if others is MODELS:
        assert dataset.train.part_ranges == [(4, 6), (36, 38)]
        assert open_parts("set").test.parts.tolist() == [36, 37] * 20


def test_scanobjectnn_is_read_by_variant_in_every_split():
    for i, path in enumerate(datasets.SCAN_FILES.values()):
        for name in (f"h5_files/{path}", f"h5_files/{path.replace('main_split', 'split3')}"):
            write({name: [i, 14], name.replace("training", "test"): [i]})
    for i, (variant, path) in enumerate(datasets.SCAN_FILES.items()):
        main = Path("set/h5_files", path)
        other = Path("set/h5_files", path.replace("main_split", "split3"))
        for root, file in (("set", main), (main, main), (other.parent, other)):
            dataset = open_dataset(root, variant=variant)
            assert dataset.train.labels.tolist() == [i, 14]
            assert dataset.name == f"ScanObjectNN ({file.parent.name}/{file.name})"
            assert not dataset.train.normalized and dataset.train[0].mean() > 6
    with refused("split3_nobg", "OBJ_BG"):
        open_dataset("set/h5_files/split3_nobg", variant="OBJ_BG")


METRES = np.round(CLOUD[:, :3].astype(float), 3) + [500_000, 5_800_000, 0]


@pytest.mark.parametrize("points", [METRES, np.asfortranarray(1000 * METRES).astype(">i8")])
def test_far_clouds_keep_their_shape_in_every_form(points):
    far = ([points], [0])
    write({"a/train.h5": far, "a/test.h5": far})
    labelled = np.column_stack([points, np.arange(40) % 4])
    write({"c/0.npy": labelled, "c/1.xyz": labelled})
    write({"0.pkl": dict.fromkeys(["train", "test"], [(points, np.int64(0), "a")])})
    write({"e/a_bbox.npy": np.column_stack([points[:3], BOXES[:, 3:]]), "e/a_vert.npy": points})
    write({"e/scannetv2_train.txt": "a", "e/scannetv2_val.txt": "a"})
    scan = open_scans("set/e").train[0]
    read = [open_dataset("set/a").train[0], open_dataset("set/c").test[0], scan.xyz]
    read += [open_fold("set/0.pkl")[0][0], open_parts("set/c").test[0]]
    for xyz in read + [open_rooms("set/c").train[0].xyz]:
        assert np.abs(clouds.normalize(xyz) - clouds.normalize(points)).max() < 1e-3
    np.testing.assert_allclose(scan.boxes[:, :3], scan.xyz[:3], rtol=1e-5)


def test_a_folder_says_what_it_skips_and_holds_out_a_fifth():
    write_clouds(" ".join(f"a/{i}" for i in range(19)) + " b/0 run/a")
    write({"b/1.npy": np.tile(CLOUD, (500, 1)), "b/1.csv": "1,2,3", "a.txt": "2\n\n1. Install"})
    write({"c/x/color.npy": CLOUD, "c/x/coord.npy": MANY, ".x.npy": CLOUD})
    write({"c/y/pointcloud.npy": CLOUD + 1, "c/y/points.npy": CLOUD})
    write({"run/config.json": "", "run/metrics.jsonl": "", "z/a.e57": ""})
    dataset = open_dataset("set")
    notes = """skipped: 1 .npy, 1 .json, 1 .jsonl, 1 .e57, 1 .txt; the same clouds, not read:
        1 points.npy beside .npy, 1 color.npy beside .npy, 1 .csv beside .npy; runs of ours,
        not read: set/run; no clouds in: run, z; a fixed fifth is the test set"""
    assert "; ".join(dataset.notes) == " ".join(notes.split())
    assert dataset.test.names == ["a/0.npy", "a/16.npy", "a/6.npy", "b/0.npy", "c/y/pointcloud.npy"]
    assert dataset.train.offsets.diff().max() == clouds.MAX_POINTS
    assert dataset.train.distinct.tolist() == [40] * 18
    np.testing.assert_array_equal(dataset.train[17], clouds.normalize(MANY[:, :3]))
    assert len(datasets.find_clouds(["set"])) == len(dataset.train) + len(dataset.test)
    write({"0.npy": CLOUD, "d/e/1/model.npy": CLOUD, "d/e/2/model.npy": CLOUD})
    assert "no classes, since 0.npy" in open_dataset("set").notes[-2]
    assert open_dataset("set/0.npy").test.names == ["0.npy"]
    assert open_dataset("set/d").train.labels is None  # one cloud a folder


def all_points(**options):
    dataset = open_dataset("set", **options)
    return torch.cat([dataset.train.points, dataset.test.points])


def test_a_folder_is_read_once_until_a_file_changes(monkeypatch):
    write_clouds("a/0 a/1")
    first = all_points()
    with monkeypatch.context() as patch:
        patch.setattr(files, "READERS", dict.fromkeys(files.READERS))  # none can be called
        open_dataset("set").train.points.zero_()  # stays private
        assert torch.equal(all_points(), first)
    np.save("set/a/0.npy", np.insert(CLOUD, 3, np.nan, axis=0))
    assert len(all_points(drop_invalid=True)) == 80
    assert len(list(Path("set").glob(".clouds*"))) == 2  # none of earlier files


class Call(tuple):  # Its pickle calls a function, and may set a state.
    def __reduce__(self):
        return tuple(self)


MAKE = np.zeros(1).__reduce__()[0]
# Forged flags say that a type holds no objects: its bytes would become pointers.
FORGED = Call((np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)))
FORGED_ARRAY = Call((MAKE, (np.ndarray, (0,), b"b"), (1, (4, 3), FORGED, False, b"A" * 96)))
FOLD = {"train": [(CLOUD, 0, "a")], "test": [(CLOUD[:20], 1, "b")]}
NINE = [CLOUD] * 7 + [np.nan * CLOUD, CLOUD]
MISTAKES = [  # what opens it, words of the message, files
    (open_dataset, "2 of 3 broken a. b.", {"a.xyz": "1 2 3\n4", "b.npy": [1], "c.npy": CLOUD}),
    (open_rooms, "7 labels colours", {"a.xyz": COLORS}),
    (open_parts, "80 colours", {"a.npy": MANY, "b.npy": MANY + [0, 0, 0, 40]}),
    (open_dataset, "b.npy", {"train/a.npy": CLOUD, "test/a.npy": CLOUD, "b.npy": CLOUD}),
    (open_dataset, "v0_normal", {SYNSETS: "Bag 01", "01/points_label/a.seg": "1"}),
    (open_dataset, "segment.py scene", {"Area_1_a.npy": PARTS}),
    (open_parts, "classes.txt different", {"a.npy": PARTS, "classes.txt": "a\nb\na\nd"}),
    (open_dataset, "cloud 7 9:", {"train.h5": (NINE, [0] * 9), "test.h5": [0]}),
    (open_fold, "sys.exit", {"0.pkl": [Call((sys.exit, ("executed",)))]}),
    (open_fold, "memo", {"0.pkl": "\x80\x02Nr\xff\xff\xff\xff."}),
    (open_fold, "object", {"0.pkl": FOLD | {"test": [(FORGED_ARRAY, 1, "b")]}}),
]


@pytest.mark.parametrize("opener, words, tree", MISTAKES)
def test_mistakes_are_named_and_nothing_in_a_file_runs(opener, words, tree):
    write(tree)
    with refused("set", *words.split()):
        opener(next(Path("set").glob("0.pkl"), "set"))
    assert not list(Path().rglob("*.tmp"))


def test_labelled_clouds_are_parts_or_rooms():
    write({"train/x/a.npy": PARTS, "train/b.txt": PARTS, "Test/c.xyz": PARTS})
    assert open_parts("set").test.part_names == [f"label {i}" for i in range(4)]
    broken = np.insert(PARTS, 3, np.nan, axis=0)
    write({"classes.txt": "# wall\n\n//door 1,2\nlamp\n", "train/b.txt": broken})
    dataset = open_parts("set", drop_invalid=True)
    rooms = open_rooms("set", drop_invalid=True)
    assert len(dataset.train.points) == 80 and len(rooms.train[0].xyz) == 40
    assert dataset.train.part_names == rooms.classes == ["# wall", "label 1", "//door 1,2", "lamp"]
    assert dataset.test.parts.tolist() == list(rooms.test[0].labels) == list(PARTS[:, 3])
    assert (rooms.test[0].xyz.min(axis=0) == 0).all()
    write({f"Area_{area}_a.npy": PARTS * [1, 1, 1, 4] for area in (1, 5)})  # S3DIS's
    rooms = open_rooms("set", area=1)
    assert set(rooms.test[0].labels) == {0, 4, 8, 12} and rooms.train[0].area == 5


def test_scans_are_read_as_they_were_written():
    write(SCANS)
    data = open_scans("set")
    first, second = data.train
    np.testing.assert_array_equal(first.xyz, CLOUD[:, :3])
    np.testing.assert_array_equal(first.boxes, BOXES[:, :6].astype(np.float32))
    assert first.labels.tolist() == [0, 17, 10] and data.classes[17] == "garbagebin"
    assert second.boxes.shape == (0, 6) and data.test[0].name == "c"
    assert data.notes == ["1 of 3 scans missing z", "0 of 1 scans missing"]
