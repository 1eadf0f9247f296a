"""Tests of util/clouds.py: many clouds and their samples, normalising, augmentation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import act
from common import randn, refused, seeded
from util import clouds


def make_clouds(sizes, **options):
    names = [str(i) for i in range(len(sizes))]
    offsets = torch.tensor([0] + sizes).cumsum(0)
    return clouds.Clouds(randn(sum(sizes), 3), offsets, names, offsets[:-1], names, **options)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(1, 40), st.integers(0, 99))
def test_a_sample_is_in_random_order_and_begins_again(sizes, num, seed):
    rank, world = [(0, 1), (0, 2), (1, 2)][seed % 3]
    data = make_clouds(sizes)
    xyz, flat = data.sample(torch.arange(len(sizes)), num, seeded(seed), (rank, world))
    assert torch.equal(xyz, clouds.unit_sphere(data.points[flat]))
    keys = torch.rand(len(sizes), max(sizes), generator=seeded(seed))  # of the whole batch
    for i, rows in zip(range(rank, len(sizes), world), flat.tolist(), strict=True):
        order = sorted(range(sizes[i]), key=keys[i].tolist().__getitem__)
        assert rows == [int(data.offsets[i]) + order[j % sizes[i]] for j in range(num)]


@pytest.mark.parametrize("indices", [[2, 0, 2], [1, 2]])
def test_selected_clouds_keep_what_is_theirs(indices):
    options = {"parts": torch.arange(20), "distinct": torch.arange(4)}
    data = make_clouds([4, 9, 1, 6], **options)
    chosen = data.select(indices)
    assert chosen.distinct.tolist() == indices
    for place, i in enumerate(indices):
        assert torch.equal(chosen[place], data[i])
        assert chosen.labels[place] == chosen.parts[chosen.offsets[place]] == data.offsets[i]
        assert chosen.identities()[place] == data.identities()[i]
    assert data.select([1, 2]).points.data_ptr() == data[1].data_ptr()  # without a copy


def test_samples_that_cannot_be_cut_into_patches_are_refused():
    data = make_clouds([1, 100, 100])
    data.points[101:] = data.points[1:6].repeat(20, 1)
    data.points[1:61] *= torch.tensor([0.0, -0.0]).repeat(30)[:, None]
    assert clouds.count_distinct(data.points, data.offsets).tolist() == [1, 41, 5]
    pair = data.select([1, 2])
    assert clouds.check_sizes([pair], act.EncoderConfig(num_group=5, group_size=4), 64) == 5
    with refused("2: expected 8 distinct", "got 5"):
        clouds.check_sizes([pair, pair], act.EncoderConfig(num_group=8, group_size=4), 64)


def test_subsampled_clouds_are_farthest_points():
    data = make_clouds([300, 60, 128])
    less = clouds.subsample(data, 128, "cpu")
    assert torch.equal(less[0], data[0][act.farthest_point_sample(data[0][None], 150)[0]])
    assert torch.equal(less.select([1, 2]).points, data.select([1, 2]).points)


@given(st.integers(0, 99), st.integers(2, 40), st.sampled_from([1e-200, 1e-3, 1, 1e3, 1e200]))
def test_normalised_clouds_fill_the_unit_sphere(seed, n, unit):
    xyz = np.random.default_rng(seed).normal(size=(n, 3)) + 1
    cloud = clouds.normalize(xyz * unit)
    assert np.abs(cloud.mean(0)).max() < 1e-6
    assert abs(np.linalg.norm(cloud, axis=1).max() - 1) < 1e-6
    batch = clouds.unit_sphere(torch.from_numpy(np.stack([xyz, xyz + 9, xyz * 0])))
    np.testing.assert_allclose(batch, [cloud, cloud, cloud * 0], atol=1e-6)


def test_the_frame_of_clouds_is_the_mean_of_their_centres_and_radii():
    cube = torch.tensor([[1.0, 1, 1], [-1, 1, 1], [1, -1, -1], [-1, -1, -1]])
    both = torch.cat([cube + 1, 3 * cube + 5])
    data = clouds.Clouds(both, torch.tensor([0, 4, 8]), ["a", "b"], normalized=False)
    assert data.frame() == ((3, 3, 3), pytest.approx(2 * 3**0.5))


def test_clouds_are_scaled_and_then_moved():
    generator = seeded(1)
    xyz = randn(40, 5, 3)
    scale = 0.5 + 1.5 * torch.rand(40, 1, 3, generator=generator)
    expected = xyz * scale + 0.2 * torch.rand(40, 1, 3, generator=generator) - 0.1
    found = clouds.scale_translate(xyz[1::2], seeded(1), (0.5, 2), 0.1, True, (1, 2))
    torch.testing.assert_close(found, expected[1::2])


def test_a_rotation_about_y_moves_z_towards_x():
    x, y, z = randn(3, 40, 4)
    turned = torch.complex(z, x) * (2j * torch.pi * torch.rand(40, 1, generator=seeded(1))).exp()
    found = clouds.rotate_y(torch.stack([x, y, z], dim=2)[1::2], seeded(1), (1, 2))
    torch.testing.assert_close(found, torch.stack([turned.imag, y, turned.real], dim=2)[1::2])
