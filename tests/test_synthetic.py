"""Tests of util/synthetic.py: shapes with parts, scans, rooms."""

import numpy as np
import pytest
import torch

from util import synthetic


@pytest.fixture(scope="module")
def shapes():
    return synthetic.synthetic_clouds(2, seed=0, num_points=128)


def test_compositions_are_the_shapes_of_several_parts_and_parts_follow_one_another(shapes):
    several = synthetic.compositions(shapes)
    assert len(several.classes) == 16
    for i, name in enumerate(several.names):
        assert torch.equal(several[i], shapes[shapes.names.index(name)])
    for c, parts in enumerate(several.parts.chunk(16)):
        assert parts.unique().tolist() == list(range(*several.part_ranges[c]))


def test_furniture_stands_within_its_box_and_does_not_overlap():
    for room in synthetic.synthetic_rooms([(1, i) for i in range(12)], density=60):
        for i, (label, low, high) in enumerate(room.boxes):
            inside = ((room.xyz > low - 0.06) & (room.xyz < high + 0.06)).all(1)
            assert (room.labels[inside] == label).sum() >= 150  # 2.5 times the density
            for _, other_low, other_high in room.boxes[:i]:
                assert (high[:2] < other_low[:2]).any() or (other_high[:2] < low[:2]).any()


def test_values_stay_the_same(shapes):
    total = 0
    for i, name in enumerate(synthetic.CATEGORIES):
        xyz, _ = synthetic.synthetic_cloud(name, 300, np.random.default_rng(7))
        total += (i + 1) * np.abs(xyz).sum()
    assert total == pytest.approx(85530.968477, rel=1e-9)
    assert (torch.arange(46).repeat_interleave(128) * shapes.parts).sum() == 3679368
    # Another numpy may round the last digit otherwise and order a scan's points anew.
    assert shapes.points.double().abs().sum().item() == pytest.approx(4923.034, rel=3e-3)
    (room,) = synthetic.synthetic_rooms([(5, 3)], density=60)
    assert room.labels.sum() == 8451
    np.testing.assert_allclose(room.xyz.sum(0, np.float64), [6923.4207, 4818.6731, 4291.2892])
