"""Tests of util/pictures.py: .png, rendered clouds, colours, galleries, charts."""

import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest

from util import files, pictures

NORMAL = np.random.default_rng(0).normal(size=(2000, 3))


def test_nearer_points_hide_farther_ones_which_are_paler():
    near = np.array([[0.539, 0.342, 0.770]]) / 2  # seen from 35 degrees aside and 20 above
    xyz = np.concatenate([near, -near])
    colors = np.array([[1, 0, 0], [0, 0, 1]])  # red in front of blue
    for order in ([0, 1], [1, 0]):
        assert pictures.render(xyz[order], colors[order])[160, 160].argmax() == 0
    faces = [pictures.render(point[None], [[0, 0, 0]]).min() for point in xyz]
    assert faces[0] < faces[1]


def test_the_frame_holds_the_unit_ball_with_y_up_and_x_to_the_right():
    sphere = NORMAL / np.linalg.norm(NORMAL, axis=1, keepdims=True)
    ball, top, right = [
        np.array(np.nonzero((pictures.render(xyz, size=200) < 250).any(axis=2)))
        for xyz in (sphere, [[0, 0.8, 0]], [[0.8, 0, 0], [np.nan, 0, 0]])
    ]  # (2, n) rows and columns of the pixels that are not white
    assert 0 < ball.min() < 15 < 185 < ball.max() < 199
    assert top[0].max() < 90 < 110 < right[1].min()


def test_pca_colors_are_principal_components_over_all_clouds():
    scores = NORMAL[:400] * [9, 3, 1]
    scores[0] = [1e4, 0, 0]  # The range does not stretch to an outlier.
    features = scores @ np.linalg.qr(NORMAL[:16])[0].T + 5
    colors = np.concatenate(pictures.pca_colors([features[:150], features[150:]]))[1:]
    assert (colors[:, 0].min(), colors[:, 0].max()) == (0, 1)
    for i in range(3):
        assert abs(np.corrcoef(colors[:, i], scores[1:, i])[0, 1]) > 0.95


def test_a_gallery_places_each_cloud_in_the_picture_and_in_the_ply(tmp_path):
    xyz = NORMAL[:40] / 2
    red = np.tile([1, 0, 0], (40, 1))
    pictures.write_gallery(tmp_path / "g", [[(xyz, None), (xyz, red)]] * 2, columns=3)
    data = (tmp_path / "g.png").read_bytes()
    assert struct.unpack(">2I2B", data[16:26]) == (3 * 326, 2 * 326, 8, 2)
    lines = np.frombuffer(zlib.decompress(data[41:-16]), np.uint8).reshape(2 * 326, -1)
    image = lines[:, 1:].reshape(2 * 326, 3 * 326, 3)
    np.testing.assert_array_equal(image[329:649, 3:323], pictures.render(xyz, red))
    pytest.importorskip("plyfile")  # reads the .ply
    spread = files.read_points(tmp_path / "g.ply").reshape(4, 40, 3)
    np.testing.assert_allclose(spread[3], xyz + [0, -2.5, 0], atol=1e-6)


def test_a_chart_shows_the_loss_to_its_end_and_the_test_metric_beside_ticks_that_differ(tmp_path):
    steps = [dict(step=100, loss=0.05551), dict(step=200, loss=0.05552)]
    epochs = [dict(step=200, loss_epoch=0.07, miou=1), dict(step=287, loss_epoch=0.06, miou=2)]
    pictures.write_chart(tmp_path / "a.svg", steps + epochs)
    svg = ElementTree.parse(tmp_path / "a.svg")
    loss, metric = [line.get("points") for line in svg.iterfind("{*}polyline")]
    assert loss == "241.2,350.0 422.4,30.0 580.0,30.0"  # larger y is lower
    assert metric == "422.4,350.0 580.0,30.0"
    words = [word.text for word in svg.iterfind("{*}text")]
    assert words[:6] == ["0", "50", "100", "150", "200", "250"]
    assert len(set(words[6:12])) == len(set(words[12:18])) == 6  # values and names
