"""Detection: matching, loss, augmentation, and the command."""

import functools
import itertools
import sys

import numpy as np
import pytest
import torch

import act
import detect
from common import checkpoint, interrupt, randn, refused, rows_of, run_command, same
from util import datasets, detector, metrics, plain, processes, run, synthetic

pytest.importorskip("scipy")  # nothing is detected without it

FLAGS = "--device cpu --size tiny --points 256 --batch-size 2 --precision fp32".split()
CONFIG = run.parse_flags(detect.Config, "", FLAGS)
CLASSES = synthetic.ROOM_CLASSES[3:]
noise = functools.partial(randn, dtype=torch.float64)
ROOM = datasets.synthetic_scenes(7, 1, 3000)[0]  # 7118 points, 7 boxes


def use_rooms(patch, train, test):
    rooms = datasets.Dataset("rooms", train, [test], CLASSES)
    patch.setattr(datasets, "open_scans", lambda data, points: rooms)


@pytest.mark.parametrize("elsewhere", [[], [7]])  # true boxes of the other processes
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 0)])  # of three rooms
def test_loss_is_that_of_loops_and_the_sum_over_layers(counts, elsewhere, monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 1 + len(elsewhere))
    mean = (sum(counts) + sum(elsewhere)) / processes.WORLD
    monkeypatch.setattr(processes, "average", lambda count: count - sum(counts) + mean)
    logits = 2 * noise(2, 3, 5, 4)  # two layers, three rooms, five queries
    center, size = noise(2, 3, 5, 6, seed=1).abs().split(3, dim=-1)
    extent = noise(3, 3, seed=2).abs() + 3
    boxes = [noise(K, 6, seed=K).abs() for K in counts]
    labels = [torch.arange(K) for K in counts]
    first, _ = detect.layer_loss(logits[0], center[0], size[0], extent, boxes, labels)
    loss, parts = detect.layer_loss(logits[1], center[1], size[1], extent, boxes, labels)
    found = detect.detection_loss(logits, center, size, extent, boxes, labels)
    assert found == (first + loss, parts)
    predicted = torch.cat([center[1], size[1]], dim=-1)
    sums = np.zeros(4)
    for b, K in enumerate(counts):
        p = logits[1, b].softmax(dim=1)
        giou = metrics.generalized_box_iou(boxes[b], predicted[b])
        cost = -p[:, :K].T - 2 * giou
        orders = itertools.permutations(range(5), K)
        queries = min(orders, key=lambda order: cost[range(K), order].sum())
        for q in set(range(5)) - set(queries):
            sums[0] -= 0.25 * p[q, 3].log()
        for k, q in enumerate(queries):
            off = ((predicted[b, q] - boxes[b][k]).view(2, 3) / extent[b]).abs().sum(dim=1)
            sums += [-p[q, k].log(), 1 - giou[k, q], 5 * off[0], off[1]]
    expected = sums / np.append(mean + 0.25 * (15 - mean), [max(mean, 1)] * 3)
    assert list(parts) == ["class", "giou", "center", "size"]
    assert [value.item() for value in parts.values()] == pytest.approx(expected, abs=1e-9)
    assert loss.item() == pytest.approx(expected.sum())


def test_a_share_of_a_batch_is_what_the_whole_batch_has():
    whole = detect.sample([ROOM] * 3, 1000, [0], "published")
    assert not same(whole[0][0], whole[0][1])
    share = detect.sample([None, ROOM, None], 1000, [0], "published", share=(1, 2))
    for found, values in zip(share, whole, strict=True):
        assert same(found, values[1::2])


@pytest.mark.parametrize("augment, growth", [("", 1), ("quarters", 1), ("published", 1.4)])
def test_boxes_hold_their_points_and_grow_in_small_turns_alone(monkeypatch, augment, growth):
    monkeypatch.setattr(detector, "CUBOID_TRIES", 0)  # no cuboid, which may cut boxes
    monkeypatch.setattr(detector, "sample_points", lambda xyz, num_points, rng: xyz)
    offset = abs(ROOM.xyz - ROOM.boxes[:, None, :3])  # (7, N, 3)
    held = (offset <= ROOM.boxes[:, None, 3:] / 2).all(axis=2)
    for seed in range(8):
        xyz, boxes, _ = detect.sample_room(ROOM, 0, np.random.default_rng(seed), augment)
        offset = abs(xyz - boxes[:, None, :3])
        assert (offset <= boxes[:, None, 3:] / 2 + 1e-4).all(axis=2)[held].all()
        grown = boxes[:, 3:].prod(axis=1) / ROOM.boxes[:, 3:].prod(axis=1)
        assert 0.9999 < grown.min() and grown.max() < growth + 1e-4


def test_random_cuboid_keeps_enough_points_and_boxes_by_their_centers():
    for seed in range(9):
        found = detector.random_cuboid(ROOM.xyz, ROOM.boxes, np.random.default_rng(seed), 2000)
        expected = plain.random_cuboid(ROOM.xyz, ROOM.boxes, np.random.default_rng(seed), 2000)
        np.testing.assert_equal(found, expected)
    inside, held = found
    kept = ROOM.xyz[inside]
    center = ROOM.boxes[:, :3]
    within = (center >= kept.min(axis=0)) & (center <= kept.max(axis=0))
    assert held.any() and (held == within.all(axis=1)).all()
    assert 2000 <= len(kept) < len(ROOM.xyz)


def test_the_encoder_is_the_students_and_the_rest_does_not_depend_on_it():
    student = act.Student(act.StudentConfig(**run.ENCODER_SIZES["tiny"]))
    expected = detect.build_model(CONFIG, CLASSES)
    expected.encoder = student.encoder
    assert same(detect.build_model(CONFIG, CLASSES, student).state_dict(), expected.state_dict())


def test_a_killed_run_resumes_bit_for_bit(student_run, monkeypatch, tmp_path):
    use_rooms(monkeypatch, [ROOM] * 4, ROOM)
    monkeypatch.setattr(detect, "EVALUATION_EPOCHS", 2)
    words = FLAGS + ["--checkpoint", student_run / "last.pt", "--epochs", 3, "--out"]
    train = functools.partial(run_command, detect, *words)
    train(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, "add", interrupt(5))
        train(tmp_path / "part")
    train(tmp_path / "part", "--resume")
    assert same(checkpoint(tmp_path / "part")["model"], checkpoint(tmp_path)["model"])
    assert rows_of(tmp_path / "part") == rows_of(tmp_path)
    assert rows_of(tmp_path)[-1].keys() >= {"ap25", "ap50", "recall", "ap25_start", "classes"}


def test_without_true_boxes_there_is_no_average_precision(monkeypatch, tmp_path, capsys):
    use_rooms(monkeypatch, [ROOM] * 2, ROOM._replace(boxes=ROOM.boxes[:0], labels=ROOM.labels[:0]))
    run_command(detect, *FLAGS, "--checkpoint", "none", "--epochs", 1, "--out", tmp_path)
    for name in ("metrics.jsonl", "loss.svg"):
        text = (tmp_path / name).read_text().lower()
        assert "nan" not in text and "ap25" not in text
    assert "no test room has boxes" in capsys.readouterr().out


def test_other_flags_rooms_in_millimetres_and_a_missing_scipy_are_refused(monkeypatch):
    with refused("--area"):
        run_command(detect, "--area", 3)
    use_rooms(monkeypatch, [ROOM], ROOM._replace(xyz=1000 * ROOM.xyz))
    with refused(ROOM.name, "metres"):
        run_command(detect, "--device", "cpu")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with refused("pip install scipy"):
        run_command(detect)
