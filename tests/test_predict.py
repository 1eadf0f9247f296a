"""Any checkpoint on own files: classes, features, labels of points, boxes, and what is refused."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import act
import predict
from common import ENCODER, make, python, randn, refused
from util import detector, files, run, synthetic

KINDS = ["torus", "chair", "mug"]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory, shapes):
    """A folder with an untrained checkpoint of each kind, clouds of two classes, a mug, rooms."""
    config = detector.DetectorConfig(**ENCODER, num_queries=8, decoder_width=16, decoder_depth=1)
    config.class_names = ["chair"]  # then an untrained model is sure enough of some boxes
    models = {"detector": detector.Detector(config), "Student": make("Student", points=100)}
    models["Classifier"] = make("Classifier", points=100, num_classes=3, class_names=KINDS)
    models["Mug"] = make("Segmenter", points=100, num_categories=16, num_parts=50)
    models["rooms"] = make("Segmenter", points=100, num_categories=0, num_parts=13)
    room = synthetic.synthetic_rooms([(9, 0)], 30)[0].xyz + np.array([500_000, 4_000_000, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("predict"))
        for name, model in models.items():
            state = {"config": asdict(model.config), "model": model.state_dict()}
            act.save(state | {"kind": type(model).__name__}, f"{name}.pt")
        for name in ("Mug", "rooms", "empty"):
            Path(name).mkdir()
        np.save("Mug/a.npy", 5 + randn(200, 3).numpy())
        np.save("rooms/a.npy", room)
        np.save("wide.npy", 1000 * room)
        np.save("few.npy", np.eye(3))
        Path("empty/a.pcd").touch()
        yield


def predict_run(line):
    words = f"{line} --device cpu --out results".split()
    predict.main(run.parse_flags(predict.Config, "", words))


@pytest.mark.parametrize("kind, points", [("Student", 50), ("Classifier", 100)])
def test_features_and_classes_are_those_of_the_model_by_file(kind, points, shapes, capsys):
    predict_run(f"{shapes}/test --checkpoint {kind}.pt --features f.npz --points {points}")
    stored = np.load("f.npz")
    model = act.load(f"{kind}.pt")
    model.config.num_group = points // 10  # as many points to a patch as before
    xyz = np.stack([files.read_cloud(name, points) for name in stored["names"]])
    tokens = model.encoder(*model.encoder.group(torch.from_numpy(xyz)))
    own = torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=1)
    assert len(xyz) == 4 and np.allclose(stored["features"], own.tolist(), atol=1e-5)
    if kind == "Classifier":
        rows = np.genfromtxt("results/predictions.csv", str, delimiter=",", skip_header=1)
        probability = model.head(own).softmax(dim=1)
        assert rows[:, 0].tolist() == stored["names"].tolist()
        assert rows[:, 1].tolist() == [KINDS[i] for i in probability.argmax(dim=1)]
        assert np.allclose(np.float64(rows[:, 2:]), probability.tolist(), atol=1e-5)
        assert "% of 4 clouds" in capsys.readouterr().out


LABELS = [("Mug --category Bag", {4, 5}), ("Mug", {36, 37}), ("rooms", set(range(13)))]


@pytest.mark.parametrize("words, labels", LABELS)
def test_each_point_gets_a_part_of_the_category_or_a_label_of_rooms(words, labels):
    folder = words.split()[0]
    predict_run(f"{words} --checkpoint {folder}.pt")
    stored = np.load(f"results/{folder}-a.npy.npz")
    assert np.array_equal(stored["points"], np.load(f"{folder}/a.npy"))
    assert set(stored["labels"]) <= labels


def test_boxes_are_found_in_rooms_with_large_coordinates(monkeypatch, capsys):
    monkeypatch.setattr(detector, "SCORE_THRESHOLD", 0.1)  # the model is not trained
    predict_run("rooms wide.npy --checkpoint detector.pt")
    shown = capsys.readouterr()
    name, _, _, x, y = shown.out.replace("[", "").splitlines()[1].split()[:5]
    assert name == "chair" and np.allclose([float(x), float(y)], [500_000, 4_000_000], atol=10)
    assert shown.err.startswith("wide.npy: ") and Path("results/rooms-a.npy.ply").exists()


def test_results_of_different_files_never_have_the_same_name():
    paths = [Path(path) for path in ("a/x.npy", "b/x.npy", "b-x.npy", "../b/x.npy")]
    assert len(set(predict.name_outputs(paths, Path("out")).values())) == 4


def test_flags_and_files_that_do_not_fit_are_named_and_other_files_are_done():
    for flag in ("--category", "--points"):
        with refused(flag):
            predict_run(f"Mug --checkpoint Classifier.pt {flag} 4")
    words = "nowhere Mug empty few.npy --checkpoint Classifier.pt --out results"
    done = python(predict.__file__, *words.split())
    assert done.returncode == 2
    for words in ("nowhere: ", "few.npy: ", "empty: skipped: 1 .pcd", "open3d", "empty: expected"):
        assert words in done.stderr
    assert "\nMug/a.npy," in Path("results/predictions.csv").read_text()
