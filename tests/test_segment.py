"""A label for each point: samples, weights and figures of parts and rooms, blocks, the command."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import act
import segment
from common import ENCODER, SHORT, make, refused, rows_of, run_command, seeded
from util import clouds, datasets, inference, synthetic

SIZES = ENCODER | {"points": 64}


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


@pytest.fixture
def scenes():
    rooms = [room_of(640, "large"), room_of(100, "small")]
    data = datasets.Dataset("rooms", rooms, rooms, ["low", "high"])
    return segment.Scenes(segment.Config(task="scene", points=64), data, SIZES, "cpu")


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
    answers = [(i, "", None, truth[i], predicted[i]) for i in range(3)]
    monkeypatch.setattr(parts, "predictions", lambda model: answers)
    values = parts.evaluate(parts.build_model())
    means = [100 * (2 / 3 + 1 / 2) / 2, 100 * 3 / 8, 100]  # an absent part counts 100
    assert values["instance_miou"] == pytest.approx(np.mean(means))
    assert values["class_miou"] == pytest.approx((np.mean(means[:2]) + means[2]) / 2)


def test_a_training_block_is_a_square_metre_around_some_point():
    room = room_of(700)
    drawn, labels = segment.sample_block(room, 60, np.random.default_rng(5))
    assert np.array_equal(labels, drawn[:, 2] > 0.8)  # heights stay as they are
    assert 0.45 < abs(drawn[:, :2]).max() <= 0.50001
    with refused("room", "--points"):
        segment.sample_block(room, 4000, np.random.default_rng(0))


def test_blocks_follow_step_and_room_large_rooms_have_more_and_rare_classes_weigh_more(scenes):
    assert [name[:5] for name in scenes.names] == ["large"] * 10 + ["small"]
    indices = torch.tensor([3, 1])
    xyz, _, _ = scenes.sample(indices, 7, None)
    assert torch.equal(xyz, scenes.sample(indices.flip(0), 7, None)[0].flip(0))
    assert not torch.equal(xyz, scenes.sample(indices, 8, None)[0])
    with refused("2 or more"):
        scenes.count_labels([0, 0], [1])
    high = sum(room.labels.sum() for room in scenes.test)
    assert scenes.loss_weight.tolist() == pytest.approx([1, (740 / high - 1) ** (1 / 3)])


@pytest.mark.parametrize("task", ["parts", "scene"])
def test_own_labels_of_no_cloud_are_in_no_mean(student_run, task):
    names = {"parts": ["low", "hé", "none"], "scene": ["label 1", "label 2"]}[task]
    xyz = np.random.default_rng(0).uniform(0, [1.6, 1.2, 2], (900, 3))
    labels = (xyz[:, 2] > 1) + int(task == "scene")  # 0 is no label there
    xyz[7] = np.nan
    for name in ("data/train/a.npy", "data/train/b.npy", "data/test/c.npy"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        np.save(name, np.column_stack([xyz, labels]))
    if task == "parts":
        Path("data/classes.txt").write_text("\n".join(names), encoding="utf-8")
    words = f"--task {task} --data data --drop-invalid --batch-size 2 --steps 2 --out run".split()
    run_command(segment, *SHORT, *words, "--checkpoint", student_run / "last.pt")
    closing = rows_of("run")[-1]
    each = [name for name in closing if name.startswith("iou_")]
    assert each == [f"iou_{name}" for name in names[:2]]
    assert Path("run/labels.csv").read_text(encoding="utf-8").endswith(f",{names[-1]}\n")
    for name in {"miou", "instance_miou", "class_miou"} & closing.keys():
        assert closing[name] == pytest.approx((closing[each[0]] + closing[each[1]]) / 2)
    assert act.load("run/last.pt").config.normalized == (task == "parts")


@given(st.floats(0.1, 5), st.floats(0.1, 3) | st.just(9000), st.integers(0, 99))
def test_blocks_hold_every_point_and_nothing_beyond_half_a_metre(width, depth, seed):
    xyz = np.random.default_rng(seed).uniform(-3, [width - 3, depth - 3, -1], (90, 3))
    seen = np.zeros(len(xyz), int)
    for inside, origin in inference.room_blocks(xyz):
        assert abs(xyz[inside, :2] - origin[:2]).max() <= 0.502
        assert origin[2] == 0  # heights stay as they are
        seen[inside] += 1
    assert seen.min() >= 1


@pytest.mark.parametrize("normalized", [False, True])
@torch.no_grad()
def test_a_points_label_is_the_likeliest_of_a_category_by_its_probabilities_in_all_sets(normalized):
    xyz = np.random.default_rng(0).uniform(-1, 1, (200, 3))
    options = dict(points=50, part_ranges=[[0, 1], [1, 2], [2, 5]])
    model = make("Segmenter", normalized=normalized, **options)
    regions = [(np.arange(200), np.zeros(3))]
    if not normalized:
        regions = inference.room_blocks(xyz)
    category = torch.tensor([2])
    model.head[-1].bias -= model(torch.from_numpy(xyz).float()[None], category).mean(dim=(0, 1))
    total = torch.zeros(200, 5)
    for indices, origin in inference.point_sets(regions, 50):
        points = torch.from_numpy(xyz[indices] - origin).float()[None]
        if normalized:
            points = clouds.unit_sphere(points)
        total.index_add_(0, torch.from_numpy(indices), model(points, category)[0].softmax(dim=1))
    expected = total[:, 2:].argmax(dim=1) + 2
    assert inference.label_points(model, xyz, 2).tolist() == expected.tolist()
    assert expected.unique().numel() > 1
