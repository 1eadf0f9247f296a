"""Tests of util/synthetic.py: shapes with parts, scans, rooms."""

import numpy as np
import pytest
import torch

from util import synthetic


def test_values_stay_the_same():
    total = 0
    for i, name in enumerate(synthetic.CATEGORIES):
        xyz, _ = synthetic.synthetic_cloud(name, 300, np.random.default_rng(7))
        total += (i + 1) * np.abs(xyz).sum()
    assert total == pytest.approx(85530.968477, rel=1e-9)
    # Another numpy may round the last digit otherwise and order a scan's points anew.
    shapes = synthetic.synthetic_clouds(2, seed=0, num_points=128)
    assert shapes.points.double().abs().sum().item() == pytest.approx(4923.034, rel=3e-3)
    assert (torch.arange(46).repeat_interleave(128) * shapes.parts).sum() == 3679368
    several = synthetic.compositions(shapes)
    assert several.points.double().abs().sum().item() == pytest.approx(3241.861, rel=3e-3)
    assert (torch.arange(32).repeat_interleave(128) * several.parts).sum() == 1677410
    assert len(several.classes) == 16 and several.part_ranges[-1] == [39, 41]
    room = synthetic.synthetic_room(5, 3, density=60)
    assert room.labels.sum() == 8451
    np.testing.assert_allclose(room.xyz.sum(0, np.float64), [6923.4207, 4818.6731, 4291.2892])
    for label, low, high in room.boxes:  # furniture stands within its box
        inside = ((room.xyz > low - 0.06) & (room.xyz < high + 0.06)).all(1)
        assert (room.labels[inside] == label).sum() >= 150  # 2.5 times the density
