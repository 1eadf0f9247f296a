"""A trained model on whole clouds: blocks of rooms, labels of points, legends."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import act
from util import inference


@given(st.floats(0.1, 5), st.floats(0.1, 3) | st.just(9000), st.integers(0, 99))
def test_blocks_hold_every_point_and_nothing_beyond_half_a_metre(width, depth, seed):
    xyz = np.random.default_rng(seed).uniform(-3, [width - 3, depth - 3, -1], (90, 3))
    seen = np.zeros(len(xyz), int)
    for inside, origin in inference.room_blocks(xyz):
        assert abs(xyz[inside, :2] - origin[:2]).max() <= 0.502
        assert origin[2] == 0  # heights stay as they are
        seen[inside] += 1
    assert seen.min() >= 1


class Pointwise(torch.nn.Linear):  # in place of a Segmenter; notes what it sees
    def __init__(self, **config):
        super().__init__(1, 1)
        self.config = act.SegmenterConfig(num_parts=3, **config)
        self.seen = []

    def forward(self, xyz, category):
        self.seen.append((xyz, category))
        z = xyz[..., 2]
        logits = torch.stack([z, -z, torch.full_like(z, -9)], dim=-1)
        logits[::2, :, 1] += 0.5
        return logits


def test_a_points_label_is_that_of_its_mean_probability_in_all_sets():
    xyz = np.random.default_rng(0).uniform(-1, 1, (200, 3))
    total = np.zeros((200, 3))
    sets = inference.point_sets(inference.room_blocks(xyz), 50)
    for i, (indices, origin) in enumerate(sets):
        for point in indices:
            z = (xyz[point] - origin)[2]
            logits = np.array([z, -z + 0.5 * (i % 2 == 0), -9])
            total[point] += np.exp(logits) / np.exp(logits).sum()
    model = Pointwise(points=50, normalized=False)
    assert np.array_equal(inference.label_points(model, xyz), total.argmax(axis=1))
    assert not np.array_equal(total.argmax(axis=1), xyz[:, 2] < 0)
    model = Pointwise(points=50, num_categories=2, part_ranges=[[0, 1], [1, 3]])
    assert set(inference.label_points(model, xyz, 1)) == {1}  # of the category's parts alone
    points, category = model.seen[0]
    assert set(category.tolist()) == {1}
    assert points.norm(dim=2).max().item() == pytest.approx(1)  # normalised


def test_a_legend_names_every_label_beside_a_colour_of_its_own(tmp_path):
    config = act.SegmenterConfig(num_parts=3, class_names=["Bag", "Café"])
    config.part_ranges = [[0, 1], [2, 3]]
    names, colors = inference.write_legend(tmp_path / "labels.csv", config)
    assert names == ["Bag part 0", "part 1", "Café part 2"] and len(np.unique(colors, axis=0)) == 3
    last = (tmp_path / "labels.csv").read_text(encoding="utf-8").splitlines()[3]
    assert last == f"#{colors[2].tobytes().hex()},Café part 2"
