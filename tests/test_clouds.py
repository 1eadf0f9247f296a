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


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 99))
def test_a_sample_is_in_random_order_and_begins_again(sizes, num, seed):
    data = make_clouds(sizes)
    xyz, flat = data.sample(torch.arange(len(sizes)), num, seeded(seed))
    assert torch.equal(xyz, clouds.unit_sphere(data.points[flat]))
    keys = torch.rand(len(sizes), max(sizes), generator=seeded(seed))
    for i, size in enumerate(sizes):
        order = sorted(range(size), key=keys[i].tolist().__getitem__)
        assert flat[i].tolist() == [int(data.offsets[i]) + order[j % size] for j in range(num)]


@pytest.mark.parametrize("indices", [[2, 0, 2], [1, 2]])
def test_selected_clouds_keep_their_points_labels_parts_and_identities(indices):
    data = make_clouds([4, 9, 1, 6], parts=torch.arange(20), normalized=False)
    chosen = data.select(indices)
    for place, i in enumerate(indices):
        assert torch.equal(chosen[place], data[i])
        assert chosen.labels[place] == chosen.parts[chosen.offsets[place]] == data.offsets[i]
        assert chosen.identities()[place] == data.identities()[i]
    xyz, flat = chosen.sample(torch.arange(len(indices)), 8, seeded())
    assert torch.equal(xyz, chosen.points[flat])  # as stored
    assert data.select([1, 2]).points.data_ptr() == data[1].data_ptr()  # without a copy
    before = data.identities()
    data.points[3] += 1  # the last of cloud 0
    assert [data.identities()[0] != before[0], data.identities()[1:]] == [True, before[1:]]


def test_samples_that_cannot_be_cut_into_patches_are_refused():
    data = make_clouds([100, 100])
    data.points[100:] = data.points[:5].repeat(20, 1)
    data.points[:60] = 0  # Distinct points that come late count.
    clouds.check_sizes(data, num_group=5, group_size=4, points=64)
    with refused("1: expected 8 distinct", "got 5"):
        clouds.check_sizes(data, num_group=8, group_size=4, points=64)


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


def test_clouds_are_scaled_and_then_moved():
    generator = seeded(1)
    xyz = randn(40, 5, 3)
    scale = 0.5 + 1.5 * torch.rand(40, 1, 3, generator=generator)
    expected = xyz * scale + 0.2 * torch.rand(40, 1, 3, generator=generator) - 0.1
    found = clouds.scale_translate(xyz, seeded(1), (0.5, 2), 0.1)
    torch.testing.assert_close(found, expected)


def test_a_rotation_about_y_moves_z_towards_x():
    x, y, z = randn(3, 40, 4)
    turned = torch.complex(z, x) * (2j * torch.pi * torch.rand(40, 1, generator=seeded(1))).exp()
    found = clouds.rotate_y(torch.stack([x, y, z], dim=2), seeded(1))
    torch.testing.assert_close(found, torch.stack([turned.imag, y, turned.real], dim=2))
