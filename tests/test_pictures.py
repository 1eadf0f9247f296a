"""Tests of util/pictures.py: .png, rendered clouds, colours, galleries, charts."""

import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest

from util import files, pictures


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def decode_png(path):
    """8-bit RGB in one chunk with filter 0 -> (H, W, 3) uint8."""
    data = path.read_bytes()
    W, H, length = struct.unpack(">16x2I9xI", data[:37])
    assert (length, data[24:26]) == (len(data) - 57, b"\x08\x02")
    rows = np.frombuffer(zlib.decompress(data[41:-16]), np.uint8).reshape(H, 1 + 3 * W)
    return rows[:, 1:].reshape(H, W, 3)


def ink(xyz):
    """(2, n) the rows and columns of all pixels of a rendered cloud that are not white."""
    return np.array(np.nonzero((pictures.render(xyz, size=200) < 250).any(axis=2)))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_nearer_points_hide_farther_ones_which_are_paler(order):
    towards_viewer = np.array([[0.539, 0.342, 0.770]])  # 35 degrees aside and 20 above
    xyz = np.concatenate([towards_viewer, -towards_viewer]) / 2
    colors = np.array([[1, 0, 0], [0, 0, 1]])  # red in front of blue
    image = pictures.render(xyz[order], colors[order], size=64).astype(int)
    assert image[32, 32, 0] > image[32, 32, 2] + 50
    near, far = [pictures.render(point[None], [[0, 0, 0]], size=64).min() for point in xyz]
    assert near < far


def test_the_frame_holds_the_unit_ball_with_y_up_and_x_to_the_right():
    sphere = normal(2000, 3)
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    assert 0 < ink(sphere).min() < 15 < 185 < ink(sphere).max() < 199
    assert 50 < ink(sphere / 2).min() < 58
    assert ink([[0, 0.8, 0]]).mean(1)[0] < 90 < 110 < ink([[0, -0.8, 0]]).mean(1)[0]
    assert ink([[-0.8, 0, 0]]).mean(1)[1] < 90 < 110 < ink([[0.8, 0, 0]]).mean(1)[1]


@pytest.mark.parametrize("x", [np.nan, np.inf, 1e6])
def test_points_that_cannot_be_shown_are_left_out(x):
    assert (pictures.render([[x, 0, 0]], size=32) == 255).all()


def test_pca_colors_are_principal_components_over_all_clouds():
    scores = normal(400, 3) * [9, 3, 1]
    scores[0] = [1e4, 0, 0]  # The range does not stretch to an outlier.
    features = scores @ np.linalg.qr(normal(16, 3))[0].T + 5
    colors = np.concatenate(pictures.pca_colors([features[:150], features[150:]]))[1:]
    assert (colors[:, 0].min(), colors[:, 0].max()) == (0, 1)
    for i in range(3):
        assert abs(np.corrcoef(colors[:, i], scores[1:, i])[0, 1]) > 0.95


@pytest.mark.parametrize("columns, shape", [(None, (2, 2)), (4, (1, 4)), (3, (2, 3))])
def test_a_gallery_places_each_cloud_in_the_picture_and_in_the_ply(tmp_path, columns, shape):
    xyz = normal(40, 3) / 2
    red = np.tile([1, 0, 0], (40, 1))
    pictures.write_gallery(tmp_path / "g", [[(xyz, None), (xyz, red)]] * 2, columns)
    image = decode_png(tmp_path / "g.png")
    assert image.shape == (shape[0] * 326, shape[1] * 326, 3)
    np.testing.assert_array_equal(image[3:323, 329:649], pictures.render(xyz, red))
    pytest.importorskip("plyfile")  # reads the .ply
    spread = files.read_points(tmp_path / "g.ply").reshape(4, 40, 3)
    place = [2.5 * (3 % shape[1]), -2.5 * (3 // shape[1]), 0]
    np.testing.assert_allclose(spread[3], xyz + place, atol=1e-6)


def chart(path, rows):
    """The numbers x, y, x, y ... of each line of a chart, and all words in it."""
    pictures.write_chart(path, rows)
    svg = ElementTree.parse(path)
    lines = [line.get("points").replace(",", " ").split() for line in svg.iterfind("{*}polyline")]
    words = [word.text for word in svg.iterfind("{*}text")]
    return [np.array(line, float) for line in lines], words


def test_a_chart_shows_the_loss_and_the_test_metric(tmp_path):
    steps = [dict(step=1, loss=1), dict(step=2, loss=0.5), dict(step=4, loss=0.25)]
    epochs = [dict(step=2, loss_epoch=0.7, cd_l1=1), dict(step=4, loss_epoch=0.3, cd_l1=2)]
    (loss, metric), _ = chart(tmp_path / "a.svg", steps + epochs)
    np.testing.assert_allclose(loss, [190, 30, 320, 243.3, 580, 350])  # larger y is lower
    np.testing.assert_allclose(metric, [320, 350, 580, 30])
    lines, _ = chart(tmp_path / "a.svg", epochs)
    np.testing.assert_allclose(lines[0], [320, 30, 580, 350])


def test_a_short_run_has_ticks_that_differ_and_a_line_to_its_end(tmp_path):
    steps = [dict(step=100, loss=0.05551), dict(step=200, loss=0.05552)]
    rows = steps + [dict(step=287, loss_epoch=0.07, accuracy=33.3)]
    lines, words = chart(tmp_path / "a.svg", rows)
    np.testing.assert_allclose(lines[0], [241.2, 350, 422.4, 30, 580, 30], atol=0.1)
    assert words[:6] == ["0", "50", "100", "150", "200", "250"]
    assert len(set(words[6:12])) == len(set(words[12:18])) == 6  # values and names
    assert "<circle cx='580.0' cy='190.0'" in (tmp_path / "a.svg").read_text()  # one value
