"""A trained model on whole clouds: blocks of rooms, labels of points."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import make
from util import clouds, inference


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
    model = make(
        "Segmenter", points=50, normalized=normalized, part_ranges=[[0, 1], [1, 2], [2, 5]]
    )
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
