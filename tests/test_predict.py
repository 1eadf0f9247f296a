"""Any checkpoint on own files: classes, features, labels, boxes, and what is refused."""

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import act
import predict
from common import ENCODER, make, python, randn, refused
from util import clouds, detector, files, inference, run, synthetic


@pytest.fixture(scope="module", autouse=True)
def new_folder(tmp_path_factory):
    """A folder with an untrained checkpoint of each kind, a mug and rooms."""
    config = detector.DetectorConfig(**ENCODER, num_queries=8, decoder_width=16, decoder_depth=1)
    config.class_names = ["chair"]  # then an untrained model is sure of some boxes
    classes = {"num_classes": 3, "class_names": ["torus", "chair", "mug"]}
    models = {
        "detector": detector.Detector(config),
        "stored": make("Student", points=100, normalized=False, center=(1.0, 2.0, 3.0), radius=0.5),
        "Classifier": make("Classifier", points=100, **classes),
        "Mug": make("Segmenter", points=100, num_categories=16, num_parts=50),
        "rooms": make("Segmenter", points=100, normalized=False, num_categories=0, num_parts=13),
    }
    room = synthetic.synthetic_room(9, 0, 30).xyz
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("predict"))
        for name, model in models.items():
            state = {"config": asdict(model.config), "model": model.state_dict()}
            act.save(state | {"kind": type(model).__name__}, f"{name}.pt")
        for name in ("Mug", "rooms", "empty"):
            Path(name).mkdir()
        np.save("Mug/a.npy", 5 + randn(200, 3).numpy())
        np.save("rooms/a.npy", room + np.array([500_000, 4_000_000, 450]))
        np.save("near.npy", room)
        np.save("wide.npy", 1000 * room)
        np.save("few.npy", np.eye(3).repeat(9, axis=0))
        Path("empty/a.pcd").touch()
        yield


def predict_run(line):
    words = f"--device cpu --out results {line}".split()
    predict.main(run.parse_flags(predict.Config, "", words))


def test_features_and_classes_are_those_of_the_model_by_file(shapes, capsys):
    predict_run(f"{shapes}/test --checkpoint Classifier.pt --features f.npz --points 50")
    stored = np.load("f.npz")
    model = act.load("Classifier.pt")
    model.config.num_group = 5  # as many points to a patch as before
    xyz = np.stack([files.read_cloud(name, 50) for name in stored["names"]])
    own = inference.cloud_feature(model, torch.from_numpy(xyz))
    assert len(xyz) == 4 and np.allclose(stored["features"], own, atol=1e-5)
    rows = np.genfromtxt("results/predictions.csv", str, delimiter=",", skip_header=1)
    probability = model.head(own).softmax(dim=1)
    assert rows[:, 0].tolist() == stored["names"].tolist()
    assert rows[:, 1].tolist() == [model.config.class_names[i] for i in probability.argmax(dim=1)]
    assert np.allclose(np.float64(rows[:, 2:]), probability.tolist(), atol=1e-5)
    assert "% of 4 clouds" in capsys.readouterr().out


def test_clouds_of_any_unit_and_origin_come_to_the_place_and_size_of_training(tmp_path, capsys):
    xyz = randn(100, 3).numpy()
    units = {"as_stored": (1, 0), "metres": (0.2, [5e5, 9, 5.8e6]), "millimetres": (1000, 7)}
    for name, (scale, origin) in units.items():
        np.save(tmp_path / f"{name}.npy", scale * np.float64(xyz) + origin)
    predict_run(f"{tmp_path} --checkpoint stored.pt --features f.npz")
    seen = torch.from_numpy([1, 2, 3] + 0.5 * clouds.normalize(xyz))[None]
    own = inference.cloud_feature(act.load("stored.pt"), seen)
    assert np.allclose(np.load("f.npz")["features"], own.expand(3, -1), atol=1e-4)
    assert "centre (1, 2, 3) and radius 0.5" in capsys.readouterr().out.splitlines()[0]


def test_rooms_with_large_coordinates_have_the_labels_and_boxes_of_near_ones(monkeypatch, capsys):
    predict_run("rooms near.npy --checkpoint rooms.pt")
    far, near = [np.load(f"results/{name}.npy.npz")["labels"] for name in ("rooms/a", "near")]
    assert np.mean(far == near) > 0.99
    shown = capsys.readouterr()
    assert "\nnear.npy  " in shown.out
    monkeypatch.setattr(detector, "SCORE_THRESHOLD", 0.1)  # the model is not trained
    with refused("of 3 files, got 2"):
        predict_run("rooms wide.npy few.npy --checkpoint detector.pt --out boxes")
    shown = capsys.readouterr()
    name, _, _, x, y = shown.out.replace("[", "").splitlines()[1].split()[:5]
    assert name == "chair" and np.allclose([float(x), float(y)], [500_000, 4_000_000], atol=10)
    assert shown.err.startswith("wide.npy: ") and Path("boxes/wide.npy.ply").exists()
    assert "few.npy: expected 10 different points, got 3" in shown.err


def test_results_keep_the_tree_of_the_files_and_each_file_has_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("linked").symlink_to("here/site")
    names = {"site/a/x.npy": "site/a/x.npy", "linked/../../site-a/x.npy": "site-a/x.npy"}
    names["linked/a/x.npy"] = "linked/a/x.npy"
    paths = list(names) + ["linked/a/../a/x.npy", tmp_path / "site/a/x.npy"]
    targets = predict.name_outputs(map(Path, paths), Path("out"))
    assert targets == {Path(path): Path("out", name) for path, name in names.items()}


def test_points_get_parts_of_the_category_and_earlier_results_move_aside(tmp_path):
    for words, labels in (("--category Bag", {4, 5}), ("", {36, 37}), ("--category Mug", {36, 37})):
        predict_run(f"Mug --checkpoint Mug.pt --out {tmp_path} {words}")
        stored = np.load(tmp_path / "a.npy.npz")
        assert np.array_equal(stored["points"], np.load("Mug/a.npy"))
        assert set(stored["labels"]) <= labels
    assert stored["label_names"][36] == "Mug part 36"
    files = f"{tmp_path}/a.npy {tmp_path}/a.npy.npz --out {tmp_path}"
    for words in ("Mug.pt", f"Classifier.pt --features {tmp_path}/a.npy.npz"):
        with refused("a.npy.npz: expected"):
            predict_run(f"{files} --checkpoint {words}")
    for name in ("a.npy.npz", "a.npy.ply", "labels.csv"):
        assert (tmp_path / name).exists() and len(list(tmp_path.glob(f"earlier-*/{name}"))) == 2


def test_flags_and_files_that_do_not_fit_are_named_and_other_files_are_done():
    for flag, value in (("--category", "4"), ("--points", "4"), ("--features", "none/f.npz")):
        with refused(flag):
            predict_run(f"Mug --checkpoint Classifier.pt {flag} {value}")
    np.save(os.fsdecode(b"Mug/\xff.npy"), randn(90, 3).numpy())  # no text in UTF-8
    words = "nowhere Mug empty few.npy --checkpoint Classifier.pt --out others"
    done = python(predict.__file__, *words.split())
    assert done.returncode == 2
    for words in ("nowhere: ", "few.npy: ", "empty: skipped: 1 .pcd", "open3d", "empty: expected"):
        assert words in done.stderr
    rows = Path("others/predictions.csv").read_text()
    assert "\nMug/a.npy," in rows and "\nMug/\\udcff.npy," in rows
