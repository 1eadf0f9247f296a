"""A label for each point: samples, weights and figures of parts and rooms, and the command."""

from pathlib import Path

import numpy as np
import pytest
import torch

import act
import segment
from common import ENCODER, SHORT, refused, rows_of, run_command, seeded
from util import clouds, datasets, synthetic

SIZES = ENCODER | {"points": 64}
FLAGS = SHORT + "--batch-size 2 --steps 2 --out run".split()


@pytest.fixture
def parts():
    split = synthetic.compositions(synthetic.synthetic_clouds(2, num_points=64)).select([0, 1, 2])
    data = datasets.Dataset("parts", split, split)
    return segment.Parts(segment.Config(points=64), data, SIZES, "cpu")


def room_of(num_points, name="room"):
    """A room of 3 m x 2 m, sorted along x; label 1 is above 0.8 m."""
    xyz = np.random.default_rng(0).uniform(0, [3, 2, 1], (num_points, 3)).astype(np.float32)
    xyz = xyz[xyz[:, 0].argsort()]
    return clouds.Room(name, 1, xyz, (xyz[:, 2] > 0.8).astype(np.uint8))


def test_samples_are_points_with_their_parts_and_the_category(parts, monkeypatch):
    monkeypatch.setattr(clouds, "unit_sphere", lambda xyz: xyz)  # so that points stay the same
    xyz, labels, category = parts.sample(torch.tensor([2]), 0, seeded())
    assert category == parts.train.labels[2]
    own = torch.column_stack([parts.train.points, parts.train.parts])[128:]
    drawn = torch.column_stack([xyz[0], labels[0]])
    assert (drawn[:, None] == own).all(dim=2).any(dim=1).all()
    assert 30 < len(drawn.unique(dim=0)) < 64  # with replacement, as published


def test_iou_is_averaged_over_objects_and_over_categories(parts, monkeypatch):
    first = np.array(parts.test_ranges)[:, :1]
    truth = first + [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    predicted = first + [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    answers = [("", None, truth[i], predicted[i]) for i in range(3)]
    monkeypatch.setattr(parts, "predictions", lambda model: answers)
    values = parts.evaluate(None)
    means = [100 * (2 / 3 + 1 / 2) / 2, 100 * 3 / 8, 100]  # an absent part counts 100
    assert values["instance_miou"] == pytest.approx(np.mean(means))
    assert values["class_miou"] == pytest.approx((np.mean(means[:2]) + means[2]) / 2)


def test_a_training_block_is_what_a_slow_search_around_some_point_finds():
    room = room_of(700)
    drawn, labels = segment.sample_block(room, 60, np.random.default_rng(5))
    assert np.array_equal(labels, drawn[:, 2] > 0.8)  # heights stay as they are
    distances = []
    for center in room.xyz * [1, 1, 0]:
        inside = room.xyz[(abs(room.xyz - center)[:, :2] <= 0.5).all(axis=1)]
        distances.append(abs(drawn[:, None] - (inside - center)).max(axis=2).min(axis=1).max())
    assert min(distances) < 1e-5
    with refused("room", "--points"):
        segment.sample_block(room, 4000, np.random.default_rng(0))


def test_blocks_follow_step_and_room_large_rooms_have_more_and_rare_classes_weigh_more():
    rooms = [room_of(640, "large"), room_of(100, "small")]
    data = datasets.RoomSet("rooms", rooms, rooms, ["low", "high"])
    scenes = segment.Scenes(segment.Config(task="scene", points=64), data, SIZES, "cpu")
    assert [name[:5] for name in scenes.names] == ["large"] * 10 + ["small"]
    indices = torch.tensor([3, 1])
    xyz, _, _ = scenes.sample(indices, 7, None)
    assert torch.equal(xyz, scenes.sample(indices.flip(0), 7, None)[0].flip(0))
    assert not torch.equal(xyz, scenes.sample(indices, 8, None)[0])
    with refused("2 or more"):
        scenes.count_labels([0, 0], [1])
    high = sum(room.labels.sum() for room in rooms)
    assert scenes.loss_weight.tolist() == pytest.approx([1, (740 / high - 1) ** (1 / 3)])


def test_parts_are_learnt_from_a_student(student_run, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset("parts", parts.train, parts.test)
    monkeypatch.setattr(datasets, "open_parts", lambda path, cache: data)
    run_command(segment, *FLAGS, "--checkpoint", student_run / "last.pt")
    assert {"class_miou", "best_instance_miou"} <= rows_of("run")[-1].keys()
    assert act.load("run/last.pt").config.part_ranges == parts.sizes.part_ranges


@pytest.mark.parametrize("task, names", [("parts", "low high none"), ("scene", "none low high")])
def test_own_labels_of_no_cloud_are_in_no_mean(tmp_path, monkeypatch, task, names):
    monkeypatch.chdir(tmp_path)
    xyz = np.random.default_rng(0).uniform(0, [1.6, 1.2, 2], (900, 3))
    labels = names.split().index("low") + (xyz[:, 2] > 1)
    for name in ("data/train/a.npy", "data/train/b.npy", "data/test/c.npy"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        np.save(name, np.column_stack([xyz, labels]))
    Path("data/classes.txt").write_text(names.replace(" ", "\n"))
    run_command(segment, *FLAGS, "--task", task, "--data", "data", "--checkpoint", "none")
    closing = rows_of("run")[-1]
    assert closing["iou_none"] is None
    mean = pytest.approx((closing["iou_low"] + closing["iou_high"]) / 2)
    values = [closing[name] for name in ("miou", "instance_miou", "class_miou") if name in closing]
    assert values == [mean] * len(values)
    assert act.load("run/last.pt").config.normalized == (task == "parts")
