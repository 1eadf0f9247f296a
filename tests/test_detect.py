"""Detection: matching, loss, augmentation, and the command."""

import functools
import itertools
import sys
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch

import act
import detect
from common import checkpoint, randn, refused, rows_of, run_command, same
from util import datasets, detector, metrics, run, synthetic

pytest.importorskip("scipy")  # nothing is detected without it

FLAGS = "--device cpu --size tiny --points 256 --batch-size 2 --precision fp32".split()
SIZES = dict(width=32, depth=2, num_heads=1, encoder_dims=32, drop_path=0.0, points=256)
SIZES.update(num_group=32, num_queries=32, group_size=8, own_tokens=True, dropout=0.0)
SIZES.update(decoder_width=32, decoder_depth=1, decoder_heads=2, head_dropout=0.0)
CLASSES = synthetic.ROOM_CLASSES[3:]
noise = functools.partial(randn, dtype=torch.float64)
ROOM = datasets.synthetic_scenes((7, 1), 3000)[0]  # 7118 points, 7 boxes


def loss_inputs(counts, layers):
    """Logits, centers, sizes, extents, boxes and labels; counts: true boxes of each of 3 rooms."""
    logits = 2 * noise(layers, 3, 5, 4)
    center, size = noise(layers, 3, 5, 6, seed=1).abs().split(3, dim=-1)
    boxes = [noise(K, 6, seed=K).abs() for K in counts]
    labels = [torch.arange(K) for K in counts]
    return logits, center, size, noise(3, 3, seed=2).abs() + 3, boxes, labels


@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 0)])
def test_loss_is_that_of_loops(counts):
    logits, center, size, extent, boxes, labels = loss_inputs(counts, 1)
    logits = logits[0]
    predicted = torch.cat([center[0], size[0]], dim=-1)
    weights = 0.0
    sums = np.zeros(4)
    for b, K in enumerate(counts):
        p = logits[b].softmax(dim=1)
        giou = metrics.generalized_box_iou(boxes[b], predicted[b])
        cost = -p[:, :K].T - 2 * giou
        orders = itertools.permutations(range(5), K)
        queries = min(orders, key=lambda order: cost[range(K), order].sum())
        for q in range(5):
            weight = 1.0 if q in queries else 0.25
            sums[0] -= weight * p[q, queries.index(q) if q in queries else 3].log()
            weights += weight
        for k, q in enumerate(queries):
            off = ((predicted[b, q] - boxes[b][k]).view(2, 3) / extent[b]).abs().sum(dim=1)
            sums[1:] += [1 - giou[k, q], 5 * off[0], off[1]]
    total, parts = detect.layer_loss(logits, center[0], size[0], extent, boxes, labels)
    assert list(parts) == ["class", "giou", "center", "size"]
    expected = sums / [weights, 5, 5, 5]  # five true boxes, or sums of 0
    assert [value.item() for value in parts.values()] == pytest.approx(expected, abs=1e-9)
    assert total.item() == pytest.approx(expected.sum())


def test_loss_of_all_layers_is_the_sum_of_theirs_with_the_parts_of_the_last():
    logits, center, size, extent, boxes, labels = loss_inputs((3, 0, 2), 2)
    total = 0.0
    for i in range(2):
        loss, parts = detect.layer_loss(logits[i], center[i], size[i], extent, boxes, labels)
        total = total + loss
    found = detect.detection_loss(logits, center, size, extent, boxes, labels)
    assert found == (total, parts)


def points_in(xyz, boxes):
    inside = abs(xyz - boxes[:, None, :3]) <= boxes[:, None, 3:] / 2 + 1e-4
    return inside.all(axis=2).sum(axis=1)


@pytest.mark.parametrize("augment, growth", [("", 1), ("quarters", 1), ("published", 1.4)])
def test_boxes_hold_their_points_and_grow_in_small_turns_alone(monkeypatch, augment, growth):
    monkeypatch.setattr(detect, "CUBOID_TRIES", 0)  # no cuboid, which may cut boxes
    rng = np.random.default_rng(0)
    for _ in range(8):
        xyz, boxes, labels = detect.sample_room(ROOM, len(ROOM.xyz), rng, augment)
        assert len(xyz) == len(ROOM.xyz) and labels.tolist() == ROOM.labels.tolist()
        assert (points_in(xyz, boxes) >= points_in(ROOM.xyz, ROOM.boxes)).all()
        grown = boxes[:, 3:].prod(axis=1) / ROOM.boxes[:, 3:].prod(axis=1)
        assert 0.9999 < grown.min() and grown.max() < growth + 1e-4


def test_random_cuboid_keeps_enough_points_and_boxes_by_their_centers():
    center = ROOM.boxes[:, :3]
    for seed in range(10):
        rng = np.random.default_rng(seed)
        inside, held = detect.random_cuboid(ROOM.xyz, ROOM.boxes, rng, 2000)
        kept = ROOM.xyz[inside]
        within = (center >= kept.min(axis=0)) & (center <= kept.max(axis=0))
        assert held.any() and (held == within.all(axis=1)).all() and len(kept) >= 2000
    assert len(kept) < len(ROOM.xyz)


def test_the_encoder_is_the_students_and_the_rest_does_not_depend_on_it():
    config = run.parse_flags(detect.Config, "", FLAGS)
    student = act.Student(act.StudentConfig(**run.ENCODER_SIZES["tiny"]))
    expected = detect.build_model(config, CLASSES)
    expected.encoder.load_state_dict(student.encoder.state_dict())
    found = detect.build_model(config, CLASSES, student)
    assert same(found.state_dict(), expected.state_dict())


def test_training_overfits_a_room_with_a_gradient_for_every_parameter():
    torch.manual_seed(0)
    model = detector.Detector(detector.DetectorConfig(**SIZES, class_names=CLASSES))
    optimizer = torch.optim.AdamW(model.parameters())
    xyz, boxes, labels = detect.sample([ROOM], 256, np.random.default_rng(0))  # as evaluate's
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 100)
        logits, center, size, extent = model(xyz)
        loss, _ = detect.layer_loss(logits[0], center[0], size[0], extent, boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.parameters())
    table = detect.evaluate(model, datasets.RoomSet("a room", [ROOM], [ROOM], CLASSES))
    assert table["mean"]["ap25"] == 100


def test_a_killed_run_resumes_bit_for_bit(student_run, monkeypatch, tmp_path):
    flags = FLAGS + ["--checkpoint", student_run / "last.pt", "--epochs", 3, "--out"]
    train = functools.partial(run_command, detect, *flags)
    whole = tmp_path / "whole"
    part = tmp_path / "part"
    evaluate = Mock(wraps=detect.evaluate)
    monkeypatch.setattr(detect, "evaluate", evaluate)
    monkeypatch.setattr(detect, "EVALUATION_EPOCHS", 2)
    monkeypatch.setattr(datasets, "ROOMS", ((7, 4), (8, 2)))
    train(whole)
    assert [row["epoch"] for row in rows_of(whole) if "ap25" in row] == [2, 3]
    assert rows_of(whole)[-1].keys() >= {"ap50", "recall", "ap25_start", "classes"}
    evaluate.side_effect = [DEFAULT, KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        train(part)
    evaluate.side_effect = None
    train(part, "--resume")
    assert same(checkpoint(part)["model"], checkpoint(whole)["model"])
    assert rows_of(part) == rows_of(whole)


def test_rooms_of_the_same_name_differ_by_their_points_boxes_or_labels():
    rooms = [ROOM, ROOM._replace(xyz=ROOM.xyz + 1), ROOM._replace(boxes=ROOM.boxes + 1)]
    rooms.append(ROOM._replace(labels=ROOM.labels + 1))
    assert len(set(map(detect.identity, rooms))) == 4


def test_rooms_in_millimetres_and_flags_of_other_commands_are_refused(monkeypatch):
    room = ROOM._replace(xyz=1000 * ROOM.xyz)
    rooms = datasets.RoomSet("rooms", [ROOM], [room], CLASSES)
    monkeypatch.setattr(datasets, "open_scans", Mock(return_value=rooms))
    with refused(room.name, "metres"):
        run_command(detect, "--device", "cpu")
    with refused("--area"):
        run_command(detect, "--area", 3)


def test_a_missing_scipy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with refused("pip install scipy"):
        run_command(detect, "--out", tmp_path / "out")
