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
BAG = "Mug --checkpoint parts.pt --category Bag"
LABELS = [
    (BAG, {4, 5}),
    (BAG.replace("Bag", "Mug"), {36, 37}),
    ("rooms --checkpoint scene.pt", set(range(13))),
]


def save_model(path, model):
    state = {"config": asdict(model.config), "model": model.state_dict()}
    act.save(state | {"kind": type(model).__name__}, path)


@pytest.fixture(scope="module")
def place(tmp_path_factory, shapes):
    """A folder with an untrained checkpoint of each kind, clouds of two classes, a mug, rooms."""
    root = tmp_path_factory.mktemp("predict")
    save_model(root / "student.pt", make("Student", points=100))
    model = make("Classifier", points=100, num_classes=3, class_names=KINDS)
    save_model(root / "classifier.pt", model)
    save_model(root / "parts.pt", make("Segmenter", points=100, num_categories=16, num_parts=50))
    save_model(root / "scene.pt", make("Segmenter", points=100, num_categories=0, num_parts=13))
    config = detector.DetectorConfig(**ENCODER, num_queries=8, decoder_width=16, decoder_depth=1)
    config.class_names = ["chair"]  # then an untrained model is sure enough of some boxes
    save_model(root / "detector.pt", detector.Detector(config))
    (root / "shapes").symlink_to(shapes)
    for name in ("Mug", "rooms"):
        (root / name).mkdir()
    np.save(root / "Mug" / "a.npy", 5 + randn(200, 3).numpy())
    room = synthetic.synthetic_rooms([(9, 0)], 30)[0].xyz
    np.save(root / "rooms" / "a.npy", room + np.array([500_000, 4_000_000, 0]))
    return root


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def predict_run(line):
    words = f"{line} --device cpu --out results".split()
    predict.main(run.parse_flags(predict.Config, "", words))


@pytest.mark.parametrize("kind, points", [("student", 50), ("classifier", 100)])
def test_features_and_classes_are_those_of_the_model_by_file(kind, points, capsys):
    predict_run(f"shapes/test --checkpoint {kind}.pt --features f.npz --points {points}")
    stored = np.load("f.npz")
    model = act.load(f"{kind}.pt")
    model.config.num_group = points // 10  # as many points to a patch as before
    assert len(stored["names"]) == 4
    for i, name in enumerate(stored["names"]):
        xyz = torch.from_numpy(files.read_cloud(name, points))[None]
        tokens = model.encoder(*model.encoder.group(xyz))[0]
        own = torch.cat([tokens[0], tokens[1:].amax(dim=0)])
        assert np.allclose(stored["features"][i], own.tolist(), atol=1e-5)
        if kind == "classifier":
            probability = model(xyz)[0].softmax(dim=0)
            row = Path("results/predictions.csv").read_text().splitlines()[i + 1].split(",")
            assert row[:2] == [name, KINDS[probability.argmax()]]
            assert np.allclose(np.float64(row[2:]), probability.tolist(), atol=1e-5)
    assert ("% of 4 clouds" in capsys.readouterr().out) == (kind == "classifier")


@pytest.mark.parametrize("flags, labels", LABELS)
def test_each_point_gets_a_part_of_the_category_or_a_label_of_rooms(flags, labels):
    predict_run(flags)
    folder = flags.split()[0]
    stored = np.load(f"results/{folder}-a.npy.npz")
    assert np.array_equal(stored["points"], np.load(f"{folder}/a.npy"))
    assert set(stored["labels"]) <= labels


def test_boxes_are_found_in_rooms_with_large_coordinates(monkeypatch, capsys):
    monkeypatch.setattr(detector, "SCORE_THRESHOLD", 0.1)  # the model is not trained
    predict_run("rooms --checkpoint detector.pt")
    shown = capsys.readouterr()
    table = shown.out.splitlines()[1:-1]
    assert "chair" in table[0] and "center [5.0000" in table[0] and "metres?" not in shown.err
    np.save("millimetres.npy", 1000 * np.load("rooms/a.npy"))
    predict_run("millimetres.npy --checkpoint detector.pt")
    assert "m wide: metres?" in capsys.readouterr().err
    pytest.importorskip("plyfile")  # reads the .ply
    room = np.load("rooms/a.npy")
    written = files.read_points("results/rooms-a.npy.ply")[: len(room)]
    np.testing.assert_allclose(written, room, rtol=0, atol=1e-3)


def test_results_of_different_files_never_have_the_same_name():
    paths = [Path(path) for path in ("a/x.npy", "b/x.npy", "b-x.npy", "../b/x.npy", "a/x.npy")]
    assert len(set(predict.name_outputs(paths, Path("out")).values())) == 4


@pytest.mark.parametrize("flag", ["--category Mug", "--points 4"])
def test_flags_that_do_not_fit_are_named(flag):
    with refused(flag.split()[0]):
        predict_run(f"Mug --checkpoint classifier.pt {flag}")


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_done():
    np.save("few.npy", np.eye(3))
    Path("empty").mkdir()
    Path("empty/a.pcd").touch()
    words = "nowhere Mug empty few.npy --checkpoint classifier.pt --out results"
    done = python(predict.__file__, *words.split())
    assert done.returncode == 2
    for words in ("nowhere: ", "few.npy: ", "empty: skipped: 1 .pcd", "open3d", "empty: expected"):
        assert words in done.stderr
    assert "\nMug/a.npy," in Path("results/predictions.csv").read_text()
