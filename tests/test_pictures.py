"""Tests of util/pictures.py: .png, rendered clouds, colours, galleries, charts."""

import math
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest

from util import files, pictures


def test_a_gallery_places_each_cloud_in_the_picture_and_in_the_ply(tmp_path, capsys):
    xyz = np.random.default_rng(0).normal(size=(40, 3)) / 2
    red = np.tile([1, 0, 0], (40, 1))
    rows = [[(xyz, None), (xyz, red)]] * 2
    pictures.write_gallery(tmp_path / "g", rows, columns=3, caption="Möbel, blue and red")
    assert capsys.readouterr().out == f"{tmp_path / 'g.png'}: Möbel, blue and red\n"
    data = (tmp_path / "g.png").read_bytes()
    assert "tEXtDescription\0Möbel, blue and red".encode("latin-1") in data
    assert struct.unpack(">2I2B", data[16:26]) == (3 * 326, 2 * 326, 8, 2)
    pixels = zlib.decompress(data[data.index(b"IDAT") + 4 : -16])
    lines = np.frombuffer(pixels, np.uint8).reshape(2 * 326, -1)
    image = lines[329:649, 1:].reshape(320, 3 * 326, 3)
    np.testing.assert_array_equal(image[:, 3:323], pictures.render(xyz, red))
    pytest.importorskip("plyfile")  # reads the .ply
    spread = files.read_points(tmp_path / "g.ply").reshape(4, 40, 3)
    np.testing.assert_allclose(spread[3], xyz + [0, -2.5, 0], atol=1e-6)


def test_a_chart_shows_the_loss_to_its_end_and_ticks_that_differ_and_end_at_100_percent(tmp_path):
    steps = [dict(step=100, loss=0.05551), dict(step=200, loss=0.05552)]
    epochs = [dict(step=200, loss_epoch=0.07, miou=100), dict(step=287, loss_epoch=0.06, miou=100)]
    undrawn = [dict(step=287, loss_epoch=math.nan, miou=None)]
    pictures.write_chart(tmp_path / "a.svg", steps + epochs + undrawn)
    svg = ElementTree.parse(tmp_path / "a.svg")
    loss, metric = [line.get("points") for line in svg.findall("{*}polyline")]
    assert loss == "241.2,350.0 422.4,30.0 580.0,30.0"  # larger y is lower
    assert metric == "422.4,30.0 580.0,30.0"
    words = [word.text for word in svg.findall("{*}text")]
    assert words[:6] == ["0", "50", "100", "150", "200", "250"]
    assert len(set(words[6:12])) == 6  # values and a name
    assert words[12:] == ["0", "25", "50", "75", "100", "miou", "step"]
