"""Tests, continued."""
import hashlib
import http.server
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st

import act
import clouds as shapes
import training
import finetune

torch.set_num_threads(1)  # clouds are tiny here: threads would only wait for one another
import test_act
from test_act import close, few, randn


# =====================================================================================================================
# clouds
# =====================================================================================================================

XYZ = np.random.default_rng(0).normal(size=(20, 3)).round(4)


# ---- reading one cloud

def npy_bytes(array, **options):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def npz_bytes(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def text_bytes(rows, separator=" "):
    return "\n".join(separator.join(repr(float(value)) for value in row) for row in rows).encode() + b"\n"


def ply_bytes(xyz, form="ascii", kind="double", faces=()):
    head = ["ply", f"format {form} 1.0", "comment a test", "element camera 1", "property list uchar int views",
            f"element vertex {len(xyz)}", "property uchar red", f"property {kind} z", f"property {kind} x", f"property {kind} y"]
    if len(faces):
        head += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    head = "\n".join([*head, "end_header", ""]).encode()
    if form == "ascii":
        rows = ["2 7 8"] + [f"9 {z!r} {x!r} {y!r}" for x, y, z in xyz.tolist()]
        return head + "\n".join(rows + [" ".join(map(str, [len(face), *face])) for face in faces]).encode() + b"\n"
    order, code = "<" if "little" in form else ">", "d" if kind == "double" else "f"
    body = struct.pack(order + "Bii", 2, 7, 8) + b"".join(struct.pack(order + "B3" + code, 9, z, x, y) for x, y, z in xyz)
    return head + body + b"".join(struct.pack(f"{order}B{len(face)}i", len(face), *face) for face in faces)


def h5_bytes(**arrays):
    h5py = pytest.importorskip("h5py")
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return stream.getvalue()


def written(folder, name, data):
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())
    return path


EXTRA = np.hstack([XYZ, XYZ * 0 + 7])
GOOD_FILES = {
    "plain.npy": lambda: npy_bytes(XYZ), "version2.npy": lambda: npy_bytes(XYZ, version=(2, 0)),
    "fortran.npy": lambda: npy_bytes(np.asfortranarray(XYZ)), "big.npy": lambda: npy_bytes(XYZ.astype(">f8")),
    "extra.npy": lambda: npy_bytes(EXTRA), "points.npz": lambda: npz_bytes(other=np.zeros(3), points=XYZ),
    "single.npz": lambda: npz_bytes(anything=EXTRA), "ascii.ply": lambda: ply_bytes(XYZ),
    "little.ply": lambda: ply_bytes(XYZ, "binary_little_endian"), "big.ply": lambda: ply_bytes(XYZ, "binary_big_endian"),
    "dos.ply": lambda: ply_bytes(XYZ).replace(b"\n", b"\r\n"), "blanks.xyz": lambda: text_bytes(XYZ),
    "commas.txt": lambda: text_bytes(EXTRA, ", "), "header.txt": lambda: b"x y z\n" + text_bytes(XYZ),
    "comment.txt": lambda: b"//X,Y,Z\n# made by hand\n\n" + text_bytes(XYZ, ","), "tabs.xyz": lambda: text_bytes(XYZ, "\t"),
    "dos.xyz": lambda: text_bytes(XYZ).replace(b"\n", b"\r\n"), "mac.xyz": lambda: text_bytes(XYZ).replace(b"\n", b"\r"),
    "mark.xyz": lambda: b"\xef\xbb\xbf" + text_bytes(XYZ), "labels.txt": lambda: text_bytes(XYZ).replace(b"\n", b" chair\n"),
    "ragged.txt": lambda: text_bytes(EXTRA[:9]) + text_bytes(XYZ[9:]), "counted.pts": lambda: b"20\n" + text_bytes(XYZ),
    "plain.pts": lambda: text_bytes(EXTRA), "points.off": lambda: b"OFF\n20 0 0\n" + text_bytes(XYZ),
    "points.obj": lambda: b"# made by hand\nmtllib a.mtl\nv " + text_bytes(XYZ)[:-1].replace(b"\n", b"\nvn 0 0 1\nv ") + b"\n",
    "data.h5": lambda: h5_bytes(data=EXTRA, label=np.zeros(20)),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_every_form_of_file_gives_the_points_written_to_it(tmp_path, name):
    points = shapes.read_points(written(tmp_path, name, GOOD_FILES[name]()))
    assert points.dtype == np.float64 and points.shape == XYZ.shape
    np.testing.assert_array_equal(points, XYZ)


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "i2", "u1", "i8", "b1"])
def test_numbers_of_every_type_become_float64(tmp_path, dtype):
    values = (np.arange(12).reshape(4, 3) % 5).astype(dtype)
    points = shapes.read_points(written(tmp_path, "a.npy", npy_bytes(values)))
    np.testing.assert_array_equal(points, values.astype(np.float64))


SQUARE = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (5, 5, 5)]  # the last belongs to no face
MESHES = {
    "square.off": "OFF\n# two triangles\n5 2 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n\n5 5 5\n3 0 1 2 255 0 0\n3 0 2 3\n",
    "glued.off": "OFF5 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n5 5 5\n4 0 1 2 3\n",
    "colours.off": "COFF\n5 1 0\n0 0 0 1 1 1 1\n1 0 0 1 1 1 1\n1 1 0 1 1 1 1\n0 1 0 1 1 1 1\n5 5 5 1 1 1 1\n4 0 1 2 3\n",
    "slashes.obj": "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 5 5 5\nvt 0 0\nvn 0 0 1\nf 1/1/1 2//1 3/1 4\n",
    "negative.obj": "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf -4 -3 -2\nv 5 5 5\nf -5 -3 -2\n",
    "ascii.ply": ply_bytes(np.array(SQUARE, float), faces=[(0, 1, 2), (0, 2, 3)]),
    "big.ply": ply_bytes(np.array(SQUARE, float), "binary_big_endian", "float", [(0, 1, 2, 3), (0, 1, 2)]),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_sampled_on_their_faces(tmp_path, name):
    points = shapes.read_points(written(tmp_path, name, MESHES[name]))
    assert points.shape == (shapes.MESH_POINTS, 3)
    assert (points[:, 2] == 0).all() and points.min() >= 0 and points.max() <= 1
    np.testing.assert_array_equal(points, shapes.read_points(os.path.join(tmp_path, name)))


def test_mesh_samples_follow_the_area_and_the_seed():
    vertices = np.array([(0, 0, 0), (3, 0, 0), (3, 1, 0), (0, 1, 0), (0, 0, 5), (1, 0, 5), (0, 2, 5)], float)
    faces = [(0, 1, 2, 3), (4, 5, 6)]  # areas 3 and 1
    points = shapes.sample_mesh(vertices, faces, 8000, seed=1)
    assert abs((points[:, 2] == 0).mean() - 0.75) < 0.02
    flat = points[points[:, 2] == 0]
    np.testing.assert_allclose(flat.mean(0), [1.5, 0.5, 0], atol=0.05)  # uniform on the rectangle
    np.testing.assert_allclose(flat.std(0), [3 / 12 ** 0.5, 1 / 12 ** 0.5, 0], atol=0.03)
    assert (points == shapes.sample_mesh(vertices, faces, 8000, seed=1)).all()
    assert (points != shapes.sample_mesh(vertices, faces, 8000, seed=2)).any()
    with pytest.raises(ValueError, match="no area"):
        shapes.sample_mesh(vertices, [(0, 0, 1)], 10)


@pytest.mark.parametrize("form", ["npy", "xyz", "ply"])
def test_geographic_offsets_keep_their_precision(tmp_path, form):
    small = np.random.default_rng(1).normal(size=(50, 3))
    data = {"npy": npy_bytes, "xyz": text_bytes, "ply": ply_bytes}[form](small + [1e6, -4e6, 2e6])
    np.testing.assert_allclose(shapes.read_cloud(written(tmp_path, f"a.{form}", data)), shapes.normalize(small), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(2, 40), st.sampled_from([1e-200, 1e-3, 1, 1e3, 1e200]))
def test_normalized_clouds_fill_the_unit_sphere_whatever_their_unit(seed, n, unit):
    points = np.random.default_rng(seed).normal(size=(n, 3)) + 1
    cloud = shapes.normalize(points * unit)
    assert cloud.dtype == np.float32 and np.abs(cloud.mean(0)).max() < 1e-6
    assert abs(np.linalg.norm(cloud, axis=1).max() - 1) < 1e-6
    np.testing.assert_allclose(cloud, shapes.normalize(points), atol=1e-6)


def test_identical_points_cannot_be_normalized():
    with pytest.raises(ValueError, match="two different points, found 5 at one place"):
        shapes.normalize(np.full((5, 3), 0.1))
    with pytest.raises(ValueError, match="found 0 at"):
        shapes.normalize(np.empty((0, 3)))


def test_write_ply_reads_back(tmp_path):
    shapes.write_ply(tmp_path / "a.ply", torch.from_numpy(XYZ), np.full((20, 3), 200, np.uint8))
    shapes.write_ply(tmp_path / "b.ply", XYZ.astype(np.float32))
    for name in ("a.ply", "b.ply"):
        np.testing.assert_array_equal(shapes.read_points(tmp_path / name), XYZ.astype(np.float32))
    assert sorted(os.listdir(tmp_path)) == ["a.ply", "b.ply"]
    assert (tmp_path / "a.ply").stat().st_size - (tmp_path / "b.ply").stat().st_size == 60 + len("property uchar red\n") * 3 + 3


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    written(tmp_path, "a.bin", b"earlier")
    with pytest.raises(KeyboardInterrupt):
        with act.whole_file(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"earlier"


def test_half_a_million_points_are_read_within_seconds(tmp_path):
    xyz = np.random.default_rng(0).normal(size=(500_000, 3)).astype(np.float32)
    body = b"%.6f %.6f %.6f\n" * len(xyz) % tuple(xyz.reshape(-1).tolist())
    head = b"ply\nformat ascii 1.0\nelement vertex 500000\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    for name, data in {"a.xyz": body, "a.ply": head + body, "a.npy": npy_bytes(xyz)}.items():
        path, begin = written(tmp_path, name, data), time.perf_counter()
        points = shapes.read_points(path)
        assert time.perf_counter() - begin < 3
        np.testing.assert_allclose(points, xyz, atol=1e-6)


# ---- broken files

def raw_npy(header):
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


class Bomb:
    def __reduce__(self):
        return os.system, ("touch act_was_here",)


OBJECTS = npy_bytes(np.array([Bomb()] * 3, object), allow_pickle=True)
OBJECTS_FOUND = "expected an array of numbers, found type '|O'; Python objects are never loaded"
PLY_HEAD = "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
NAN = np.array([(0, 0, 0), (1, np.nan, 0), (np.inf, 0, 0)])
ONE_PLACE = "expected at least two different points, found {} at one place"
EXTENSIONS = ".npy .npz .ply .off .obj .xyz .txt .pts .h5"


def stored_zip(name, data):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def packed_size(data):
    return zipfile.ZipFile(io.BytesIO(data)).infolist()[0].compress_size


BOMB = stored_zip("points.npy", bytes(2 ** 26 + 1))
BROKEN_FILES = [  # (file, what it holds, the message behind its path)
    ("scan.xyz", "1 2 3\n4 5 6\na b\n7 8 9\n", ", line 3: expected 3 numbers, found 'a b'"),
    ("short.xyz", "# two\n1 2 3\n\n4 5\n", ", line 4: expected 3 numbers, found '4 5'"),
    ("comma.txt", "1,2,3\n4,x,6\n", ", line 2: expected 3 numbers, found '4 x 6'"),
    ("utf16.txt", "1 2\n".encode("utf-16"), ", line 1: expected 3 numbers, found '\ufffd\ufffd1\\x00 \\x002\\x00'"),
    ("empty.xyz", "", ": " + ONE_PLACE.format(0)),
    ("one.xyz", "1 2 3\n", ": " + ONE_PLACE.format(1)),
    ("same.xyz", "1 2 3\n1 2 3\n", ": " + ONE_PLACE.format(2)),
    ("nan.xyz", "1 2 3\nnan 2 3\n4 5 1e999\n", ": 2 of 3 points are NaN or infinite"),
    ("count.pts", "3\n1 2 3\n4 5 6\n", ": the first line promises 3 points, the file holds 2"),
    ("nan.npy", npy_bytes(NAN), ": 2 of 3 points are NaN or infinite"),
    ("zero.npy", npy_bytes(np.empty((0, 3))), ": " + ONE_PLACE.format(0)),
    ("flat.npy", npy_bytes(np.zeros(6)), ": expected an array of shape (n, 3), up to 64 columns, found (6,)"),
    ("two.npy", npy_bytes(np.zeros((6, 2))), ": expected an array of shape (n, 3), up to 64 columns, found (6, 2)"),
    ("turned.npy", npy_bytes(np.zeros((3, 100))), ": expected an array of shape (n, 3), up to 64 columns, found (3, 100)"),
    ("cut.npy", npy_bytes(XYZ)[:-8], ": the header promises 480 bytes of points, the file holds 472"),
    ("huge.npy", raw_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 3), }"),
     ": the header promises 24000000000000 bytes of points, the file holds 0"),
    ("text.npy", "1 2 3\n4 5 6\n", ": not a .npy array"),
    ("pickle.npy", pickle.dumps(Bomb()), ": not a .npy array"),
    ("objects.npy", OBJECTS, ": " + OBJECTS_FOUND),
    ("words.npy", npy_bytes(np.array([["a", "b", "c"]])),
     ": expected an array of numbers, found type '<U1'; Python objects are never loaded"),
    ("code.npy", raw_npy("__import__('os').system('touch act_was_here')"),
     ": expected an array of numbers, found type unknown; Python objects are never loaded"),
    ("objects.npz", stored_zip("points.npy", OBJECTS), ": " + OBJECTS_FOUND),
    ("no_zip.npz", "1 2 3\n", ": broken .npz file (File is not a zip file)"),
    ("two.npz", npz_bytes(a=XYZ, b=XYZ), ": expected an array named points, xyz, data, pos, found a, b"),
    ("none.npz", stored_zip("readme.md", b"no arrays"), ": expected an array named points, xyz, data, pos, found none"),
    ("bomb.npz", BOMB, f": array points claims 67108865 bytes, packed into {packed_size(BOMB)}"),
    ("sets.h5", lambda: h5_bytes(data=np.zeros((2, 5, 3))),
     ": expected an array of shape (n, 3), up to 64 columns, found (2, 5, 3)"),
    ("none.h5", lambda: h5_bytes(label=np.array([b"a"])), ": expected an array named points, xyz, data, pos, found none"),
    ("text.ply", "1 2 3\n4 5 6\n", ": expected a PLY header, from 'ply' to 'end_header'"),
    ("open.ply", PLY_HEAD + "0 0 0\n1 1 1\n", ": expected a PLY header, from 'ply' to 'end_header'"),
    ("form.ply", PLY_HEAD.replace("ascii", "middle_endian") + "end_header\n",
     ", line 2: not a line of a PLY header: 'format middle_endian 1.0'"),
    ("type.ply", PLY_HEAD + "property quad q\nend_header\n", ", line 7: not a line of a PLY header: 'property quad q'"),
    ("bare.ply", PLY_HEAD + "property list uchar int\nend_header\n",
     ", line 7: not a line of a PLY header: 'property list uchar int'"),
    ("orphan.ply", "ply\nformat ascii 1.0\nproperty float x\nend_header\n",
     ", line 3: not a line of a PLY header: 'property float x'"),
    ("no_z.ply", PLY_HEAD.replace("float z", "float w") + "end_header\n0 0 0\n1 1 1\n",
     ": expected a vertex with x, y and z, found x, y, w"),
    ("cut.ply", PLY_HEAD + "end_header\n0 0 0\n1 1\n",
     ": promises 2 rows of 'vertex', the file ends before that or its lists are broken"),
    ("huge.ply", PLY_HEAD.replace("ascii", "binary_little_endian").replace("vertex 2", "vertex 1000000000000") + "end_header\n",
     ": promises 1000000000000 rows of 'vertex', the file ends before that or its lists are broken"),
    ("word.ply", PLY_HEAD + "end_header\n0 0 0\n1 one 1\n", ", line 9: expected 3 numbers, found '1 one 1'"),
    ("face.ply", ply_bytes(XYZ, faces=[(0, 1, 20)]), ": the faces name vertices 0 to 20 (from 0), the mesh has 20"),
    ("no_word.off", "4 0 0\n0 0 0\n", ": expected OFF and the counts of vertices and faces at the start of the file"),
    ("no_counts.off", "OFF\n# nothing\n", ": expected OFF and the counts of vertices and faces at the start of the file"),
    ("counts.off", "OFF\nfour 0 0\n", ", line 2: expected 2 numbers, found 'four 0 0'"),
    ("cut.off", "OFF\n4 2 0\n0 0 0\n1 0 0\n", ": promises 4 vertices and 2 faces, 2 lines follow"),
    ("vertex.off", "OFF\n3 1 0\n0 0 0\n1 0\n0 1 0\n3 0 1 2\n", ", line 4: expected 3 numbers, found '1 0'"),
    ("face.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1\n", ", line 6: expected 4 numbers, found '3 0 1'"),
    ("area.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", ": the faces of the mesh have no area"),
    ("vertex.obj", "v 0 0 0\nv 1 0\n", ", line 2: expected 3 numbers, found '1 0'"),
    ("face.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2\n", ", line 4: expected 3 numbers, found '1 2'"),
    ("zero.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", ": the faces name vertices -1 to 1 (from 0), the mesh has 3"),
    ("scan.las", "LASF", f": unknown extension '.las', expected one of {EXTENSIONS}"),
]


@pytest.mark.parametrize("name, data, message", BROKEN_FILES, ids=[row[0] for row in BROKEN_FILES])
def test_broken_files_are_named_with_what_is_wrong(tmp_path, monkeypatch, name, data, message):
    monkeypatch.chdir(tmp_path)
    path, begin = written(tmp_path, name, data() if callable(data) else data), time.perf_counter()
    with pytest.raises(ValueError) as error:
        shapes.read_cloud(path)
    assert str(error.value) == path + message
    assert time.perf_counter() - begin < 1 and not os.path.exists("act_was_here")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.ply: no such file$"):
        shapes.read_cloud(tmp_path / "nowhere.ply")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match=r"folder\.npy: no such file$"):
        shapes.read_cloud(tmp_path / "folder.npy")


def assert_read_or_refused(folder, extension, data):
    path, begin = written(folder, "fuzz" + extension, data), time.perf_counter()
    try:
        points = shapes.read_points(path)
        assert points.dtype == np.float64 and points.ndim == 2 and points.shape[1] == 3 and np.isfinite(points).all()
        assert np.isfinite(shapes.normalize(points)).all()
    except ValueError as error:
        assert str(error).startswith(path) and "\n" not in str(error)
    assert time.perf_counter() - begin < 1


SEEDS = {**GOOD_FILES, **{"mesh_" + name: (lambda data=data: data) for name, data in MESHES.items()}}


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", SEEDS)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(fuzz_folder, name, data):
    whole = SEEDS[name]()
    whole = bytearray(whole if isinstance(whole, bytes) else whole.encode())
    for _ in range(data.draw(st.integers(0, 4))):
        place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        whole[place] ^= 1 << bit
    whole = whole[:data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(whole)))
        whole[place:place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=8))
    assert_read_or_refused(fuzz_folder, os.path.splitext(name)[1], bytes(whole))


BROKEN_HEADS = {".npy": [b"\x93NUMPY\x01\x00\x40\x00{'descr': '<f4', 'fortran_order': False, 'shape': ("],
         ".npz": [b"PK\x03\x04", b"PK\x05\x06"],
         ".ply": [PLY_HEAD.encode(), b"ply\nformat binary_big_endian 1.0\nelement vertex "], ".off": [b"OFF\n", b"OFF 3 "],
         ".obj": [b"v 1 2 3\nf ", b"v "], ".xyz": [b"1 2 3\n"], ".txt": [b"x y z\n"],
         ".pts": [b"2\n"], ".h5": [b"\x89HDF\r\n\x1a\n"]}


@pytest.mark.parametrize("extension", BROKEN_HEADS)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data())
def test_random_bytes_and_headers_are_read_or_refused(fuzz_folder, extension, data):
    words = st.lists(st.sampled_from([b"1", b"-1", b"3", b"99999999999999999999", b"nan", b"1e400", b" ", b"\n", b", 3), }", b"/",
                                      b"\0", b"end_header\n", b"property list uchar float x\n", b"property list uchar\n",
                                      b"property float x\n", b"element face 9\n"]), max_size=20)
    body = data.draw(st.binary(max_size=60) | words.map(b" ".join) | words.map(b"".join))
    assert_read_or_refused(fuzz_folder, extension, data.draw(st.sampled_from([b"", *BROKEN_HEADS[extension]])) + body)


# ---- drawing from clouds

def make_clouds(sizes, normalized=True, seed=0):
    points = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed))
    return shapes.Clouds(points, torch.tensor([0, *np.cumsum(sizes)]), [str(i) for i in range(len(sizes))], normalized=normalized)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 99))
def test_a_draw_takes_points_of_its_cloud_each_as_rarely_as_possible(sizes, num_points, seed):
    clouds = make_clouds(sizes, normalized=False)
    indices = torch.arange(len(sizes)).flip(0)
    xyz, flat = clouds.draw(indices, num_points, torch.Generator().manual_seed(seed))
    assert xyz.shape == (len(sizes), num_points, 3) and xyz.dtype == torch.float32 and flat.dtype == torch.int64
    assert torch.equal(xyz, clouds.points[flat])
    for row, i in zip(flat, indices.tolist()):
        counts = torch.bincount(row - clouds.offsets[i], minlength=sizes[i])
        assert len(counts) == sizes[i] and int(row.min()) >= int(clouds.offsets[i])
        assert int(counts.max()) - int(counts.min()) <= 1  # without repetition; a small cloud is repeated evenly
    again = clouds.draw(indices, num_points, torch.Generator().manual_seed(seed))[1]
    assert torch.equal(flat, again)


def test_draws_are_uniform_over_points_and_order():
    clouds = make_clouds([8, 5], normalized=False)
    _, flat = clouds.draw(torch.zeros(8000, dtype=torch.long), 4, torch.Generator().manual_seed(0))
    assert (torch.bincount(flat.reshape(-1)).float() / 8000 - 0.5).abs().max() < 0.03
    assert (torch.bincount(flat[:, 0]).float() / 8000 - 0.125).abs().max() < 0.02  # the first place too


def test_each_draw_is_normalized_anew_in_double_precision():
    clouds = make_clouds([50, 7])
    clouds.points += 1000
    xyz, flat = clouds.draw(torch.tensor([0, 1, 0]), 16, torch.Generator().manual_seed(0))
    for cloud, rows in zip(xyz, flat):
        np.testing.assert_allclose(cloud, shapes.normalize(clouds.points[rows].numpy()), atol=1e-6)
    single, _ = clouds.draw(torch.tensor([0]), 1)
    assert (single == 0).all()


def test_huge_clouds_are_drawn_in_parts(monkeypatch):
    clouds, asked, rand = make_clouds([3_000_000, 10]), [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **options: asked.append(size) or rand(*size, **options))
    _, flat = clouds.draw(torch.tensor([0, 1] * 4), 64, torch.Generator().manual_seed(0))
    assert max(rows * keys for rows, keys in asked) <= 2 ** 24 and len(asked) == 2
    assert all(len(row.unique()) == (64, 10)[i % 2] for i, row in enumerate(flat))


# ---- folders

@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate(("chair/a.npy", "chair/b.xyz", "lamp/c.ply", "lamp/deep/d.npy", "lamp/e.txt")):
        points = rng.normal(size=(10 + i, 3))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path, name, {".npy": npy_bytes, ".ply": ply_bytes}.get(os.path.splitext(name)[1], text_bytes)(points))
    written(tmp_path, "notes.md", "not a cloud")
    return tmp_path


def caches(path):
    return sorted(name for name in os.listdir(path) if name.startswith(".act"))


def test_a_folder_gives_normalized_clouds_with_their_classes(folder):
    clouds = shapes.open_clouds(folder)
    assert sorted(clouds.names) == ["chair/a.npy", "chair/b.xyz", "lamp/c.ply", "lamp/deep/d.npy", "lamp/e.txt"]
    assert clouds.classes == ["chair", "lamp"] and len(clouds) == 5
    for i, name in enumerate(clouds.names):
        assert torch.equal(clouds[i], torch.from_numpy(shapes.read_cloud(folder / name)))
        assert clouds.classes[clouds.labels[i]] == name.split("/")[0]
    assert clouds.draw(torch.arange(5), 12)[0].shape == (5, 12, 3)
    assert torch.equal(clouds.to("cpu").points, clouds.points)


def test_the_cache_is_used_then_rebuilt_when_a_file_changes(folder, monkeypatch):
    first = shapes.open_clouds(folder).points.clone()
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "read_cloud", lambda path: pytest.fail("read again"))
        assert torch.equal(shapes.open_clouds(folder).points, first)
    written(folder, "chair/a.npy", npy_bytes(np.random.default_rng(5).normal(size=(30, 3))))
    assert len(shapes.open_clouds(folder).points) == len(first) + 20
    assert len(caches(folder)) == 2


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-5], lambda data: data + b"12345678",
                                    lambda data: data[:-4] + b"\xff\xff\xff\x7f", lambda data: bytes(len(data))])
def test_a_damaged_cache_is_rebuilt(folder, tmp_path_factory, damage):
    place = tmp_path_factory.mktemp("cache")
    first = shapes.open_clouds(folder, cache=place).points.clone()
    assert not caches(folder)
    name, = caches(place)
    (place / name).write_bytes(damage((place / name).read_bytes()))
    assert torch.equal(shapes.open_clouds(folder, cache=place).points, first)
    assert caches(place) == [name]


def test_changing_a_mapped_cloud_does_not_change_the_cache(folder):
    shapes.open_clouds(folder).points.zero_()
    assert shapes.open_clouds(folder).points.abs().sum() > 0


def test_two_builders_at_once_get_the_same_whole_cache(folder):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shapes.open_clouds(folder).points.clone(), range(4)))
    assert all(torch.equal(points, found[0]) for points in found)
    assert len(caches(folder)) == 1


def build_and_sum(folder):
    return float(np.asarray(shapes.open_clouds(folder).points, np.float64).sum())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_build_one_cache(folder):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        sums = pool.map(build_and_sum, [folder] * 4, chunksize=1)
    assert set(sums) == {build_and_sum(folder)} and len(caches(folder)) == 1


def test_a_folder_that_cannot_be_written_is_cached_elsewhere(folder, tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(shapes.tempfile, "gettempdir", lambda: str(place))
    shapes.open_clouds(folder)
    inside, = os.listdir(place)
    assert not caches(folder) and len(caches(place / inside)) == 1


def test_large_clouds_are_thinned_the_same_way_each_time(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(shapes, "CACHE_POINTS", 50)
    written(tmp_path, "a.npy", npy_bytes(np.random.default_rng(0).normal(size=(80, 3))))
    first, second = (shapes.open_clouds(tmp_path, cache=tmp_path_factory.mktemp("c")).points for _ in range(2))
    whole = {tuple(row) for row in shapes.read_cloud(tmp_path / "a.npy").tolist()}
    assert len(first) == 50 and torch.equal(first, second)
    assert {tuple(row) for row in first.tolist()} < whole and len(first.unique(dim=0)) == 50


@pytest.mark.parametrize("layout", ["{split}/{label}/{i}.npy", "{label}/{split}/{i}.npy"])
def test_train_and_test_folders_are_the_splits_above_or_below_the_classes(tmp_path, layout):
    for i in range(8):
        path = tmp_path / layout.format(split="test" if i % 4 == 0 else "train", label="ab"[i % 2], i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        written(path.parent, path.name, npy_bytes(XYZ + i))
    train, test, both = (shapes.open_clouds(tmp_path, split) for split in ("train", "test", None))
    assert len(train) == 6 and len(test) == 2 and set(train.names) | set(test.names) == set(both.names)
    assert train.classes == test.classes == ["a", "b"] and test.labels.tolist() == [0, 0]
    assert torch.equal(torch.cat([train.points, test.points]), both.points) and len(caches(tmp_path)) == 1


def test_without_folders_a_fixed_fifth_is_for_testing(tmp_path):
    for i in range(20):
        written(tmp_path, f"{i}.npy", npy_bytes(np.random.default_rng(i).normal(size=(5, 3))))
    train, test = shapes.open_clouds(tmp_path, "train"), shapes.open_clouds(tmp_path, "test")
    assert len(train) == 16 and len(test) == 4 and not set(train.names) & set(test.names)
    assert train.labels is None and train.classes == []
    assert test.names == shapes.open_clouds(tmp_path, "test").names
    for i in range(len(test)):
        assert torch.equal(test[i], torch.from_numpy(shapes.read_cloud(tmp_path / test.names[i])))


@pytest.mark.parametrize("root, lists, base", [(".", "ShapeNet-55", "shapenet_pc"), (".", ".", "shapenet_pc"),
                                               ("ShapeNet-55", "ShapeNet-55", "shapenet_pc"),
                                               (".", "ShapeNet55-34/ShapeNet-55", "ShapeNet55-34/shapenet_pc")])
def test_shapenet_55_follows_its_lists(tmp_path, root, lists, base):
    for part in (lists, base):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
    names = [f"{synset}-{i}.npy" for synset in ("03001627", "02691156") for i in range(3)]
    for i, name in enumerate(names + ["03001627-unlisted.npy"]):
        written(tmp_path / base, name, npy_bytes(np.random.default_rng(i).normal(size=(6, 3)).astype(np.float32)))
    written(tmp_path / lists, "train.txt", "\n".join(names[:4]))
    written(tmp_path / lists, "test.txt", "\n".join(names[4:]) + "\n")
    train, test, both = (shapes.open_clouds(tmp_path / root, split) for split in ("train", "test", None))
    assert sorted(train.names) == sorted(names[:4]) and sorted(test.names) == sorted(names[4:]) and len(both) == 6
    assert train.classes == ["02691156", "03001627"] and test.labels.tolist() == [0, 0]
    written(tmp_path / lists, "test.txt", "02691156-gone.npy\n")
    with pytest.raises(ValueError, match="02691156-gone.npy is listed, but not there$"):
        shapes.open_clouds(tmp_path / root)


def test_folders_without_clouds_and_broken_files_are_named(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError) as error:
        shapes.open_clouds(empty)
    assert str(error.value) == f"{empty}: no clouds, expected files {EXTENSIONS}"
    with pytest.raises(ValueError) as error:
        shapes.open_clouds(empty / "none")
    assert str(error.value) == f"{empty}/none: no such folder"
    with pytest.raises(ValueError, match="split must be 'train', 'test' or None, found 'val'"):
        shapes.open_clouds(folder, "val")
    written(folder, "lamp/broken.xyz", "1 2 3\n4 5\n")
    with pytest.raises(ValueError) as error:
        shapes.open_clouds(folder)
    assert str(error.value) == f"{folder}/lamp/broken.xyz, line 2: expected 3 numbers, found '4 5'"
    assert not caches(folder)  # nothing half-written
    (empty / "train").mkdir()
    written(empty / "train", "a.npy", npy_bytes(XYZ))
    with pytest.raises(ValueError) as error:
        shapes.open_clouds(empty, "test")
    assert str(error.value) == f"{empty}: no clouds for 'test' among its 1"


# ---- the embedded shapes

@pytest.fixture(scope="module")
def embedded():
    return shapes.synthetic_clouds(3, seed=0, num_points=256)


def test_embedded_shapes_are_labelled_normalized_and_of_at_least_twenty_classes(embedded):
    assert len(embedded.classes) >= 20 and len(embedded) == len(embedded.names) == 3 * len(embedded.classes)
    assert torch.bincount(embedded.labels).tolist() == [3] * len(embedded.classes)
    xyz = embedded.points.reshape(len(embedded), 256, 3)
    assert xyz.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(xyz.norm(dim=2).amax(1), torch.ones(len(embedded)))
    assert all(len(cloud.unique(dim=0)) == 256 for cloud in xyz)


def test_part_labels_are_consecutive_over_the_classes_and_stay_in_their_range(embedded):
    ends = [end for _, end in embedded.class_parts]
    assert [first for first, _ in embedded.class_parts] == [0, *ends[:-1]]
    parts = embedded.parts.reshape(len(embedded.classes), -1)
    for (first, end), found in zip(embedded.class_parts, parts):
        assert set(found.tolist()) == set(range(first, end))
    assert sum(end - first >= 2 for first, end in embedded.class_parts) >= 12


def test_embedded_shapes_depend_on_seed_class_and_number_alone(embedded):
    again = shapes.synthetic_clouds(2, seed=0, num_points=256)
    assert torch.equal(again.points.reshape(-1, 2, 256, 3), embedded.points.reshape(-1, 3, 256, 3)[:, :2])
    other = shapes.synthetic_clouds(2, seed=1, num_points=256)
    assert not torch.equal(again.points, other.points)
    assert again.names[:3] == ["sphere_0_0000", "sphere_0_0001", "ellipsoid_0_0000"]


def test_a_thousand_embedded_shapes_take_seconds():
    begin = time.perf_counter()
    assert len(shapes.synthetic_clouds(44, num_points=1024)) >= 1000
    assert time.perf_counter() - begin < 10


# ---- augmentation

def test_scale_and_translate_stay_in_their_ranges_and_differ_per_cloud_and_axis():
    xyz = torch.randn(4000, 5, 3, generator=torch.Generator().manual_seed(0))
    out = shapes.scale_translate(xyz, torch.Generator().manual_seed(1))
    scale = (out[:, 1] - out[:, 0]) / (xyz[:, 1] - xyz[:, 0])  # (B, 3)
    shift = out[:, 0] - scale * xyz[:, 0]
    assert 2 / 3 - 1e-2 < scale.quantile(0.005) < 0.68 and 1.48 < scale.quantile(0.995) < 1.51
    assert shift.abs().median() < 0.2 and abs(float(shift.mean())) < 0.01 and 0.19 < shift.abs().quantile(0.98) < 0.21
    assert (scale[:, 0] - scale[:, 1]).abs().median() > 0.05
    torch.testing.assert_close(out, scale[:, None] * xyz + shift[:, None], atol=1e-3, rtol=1e-3)
    same = shapes.scale_translate(xyz, torch.Generator().manual_seed(1), (0.8, 1.25), 0.1, per_axis=False)
    scale = (same[:, 1] - same[:, 0]) / (xyz[:, 1] - xyz[:, 0])
    assert (scale[:, 0] - scale[:, 1]).abs().median() < 1e-5 and scale.std() > 0.1


def test_rotation_about_y_keeps_heights_and_distances_and_covers_the_circle():
    xyz = torch.randn(2000, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = shapes.rotate_y(xyz, torch.Generator().manual_seed(1))
    assert torch.equal(out[..., 1], xyz[..., 1])
    torch.testing.assert_close(torch.cdist(out, out), torch.cdist(xyz, xyz))
    triple = torch.linalg.det(out[:, :3])
    torch.testing.assert_close(triple, torch.linalg.det(xyz[:, :3]))  # a turn, not a mirror
    turn = torch.view_as_complex(torch.stack([out[:, 0, 0], out[:, 0, 2]], 1)) / torch.view_as_complex(
        torch.stack([xyz[:, 0, 0], xyz[:, 0, 2]], 1))
    assert turn.mean().abs() < 0.06 and turn.real.max() > 0.99 and turn.real.min() < -0.99


# =====================================================================================================================
# pictures
# =====================================================================================================================

def decode_png(path):
    """An independent reader of 8-bit RGB PNG files with filter 0, every checksum verified -> (H, W, 3) uint8."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        chunks.append((body[:4], body[4:]))
        at += 12 + length
    assert [name for name, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    W, H, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    raw = zlib.decompress(chunks[1][1])
    assert len(raw) == H * (1 + 3 * W)
    rows = [raw[y * (1 + 3 * W) : (y + 1) * (1 + 3 * W)] for y in range(H)]
    assert all(row[0] == 0 for row in rows)
    return np.array([list(row[1:]) for row in rows], dtype=np.uint8).reshape(H, W, 3)


def ink(image):
    """Rows and columns of all pixels that are not white."""
    return np.nonzero((image < 250).any(axis=2))


def colourful(image):
    """Where a picture is neither white nor grey: its data, not its text and axes."""
    return image.max(axis=2).astype(int) - image.min(axis=2) > 40


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 300)])
def test_png_decodes_to_the_same_pixels(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    shapes.write_png(path, image[::-1, ::-1])  # not contiguous
    assert (decode_png(path) == image[::-1, ::-1]).all()
    assert os.listdir(tmp_path) == ["picture.png"]


def test_png_replaces_the_old_file_only_when_whole(tmp_path):
    path = tmp_path / "picture.png"
    shapes.write_png(path, np.zeros((2, 2, 3), np.uint8))
    before = path.read_bytes()
    with pytest.raises(AssertionError):
        shapes.write_png(path, np.zeros((2, 2, 3)))
    assert path.read_bytes() == before
    shapes.write_png(path, np.full((2, 2, 3), 9, np.uint8))
    assert (decode_png(path) == 9).all()


def test_every_printable_character_has_a_glyph_of_its_own():
    seen = {}
    for c in map(chr, range(33, 127)):
        image = np.full((10, 8, 3), 255, np.uint8)
        shapes.draw_text(image, 1, 1, c, scale=1)
        rows, columns = ink(image)
        assert len(rows) and rows.min() >= 1 and rows.max() <= 8 and columns.min() >= 1 and columns.max() <= 5
        assert seen.setdefault(image.tobytes(), c) == c
    boxes = [np.full((10, 8, 3), 255, np.uint8) for _ in range(2)]
    for image, c in zip(boxes, "é\n"):
        shapes.draw_text(image, 1, 1, c, scale=1)
    assert (boxes[0] == boxes[1]).all() and boxes[0].tobytes() not in seen


@pytest.mark.parametrize("x, y", [(-30, 3), (55, 3), (5, -6), (5, 25), (500, 500), (-500, 0)])
def test_text_over_the_edge_is_cut_off(x, y):
    wide = np.full((232, 264, 3), 255, np.uint8)
    shapes.draw_text(wide, x + 100, y + 100, "clipped")
    image = np.full((32, 64, 3), 255, np.uint8)
    shapes.draw_text(image, x, y, "clipped")
    assert (image == wide[100:132, 100:164]).all()  # what is inside is as it would be, nothing wraps around


def test_text_aligns_and_keeps_its_colour_and_width():
    for align, edge in ((0, 0), (1, -1)):
        image = np.full((20, 200, 3), 255, np.uint8)
        shapes.draw_text(image, 100, 2, "HH", (200, 0, 0), align=align)
        rows, columns = ink(image)
        assert abs(sorted(columns)[edge] - 100) <= 1
        assert (image[rows, columns] == (200, 0, 0)).all()
    for width in (90, 60, 30, 12):
        image = np.full((20, 200, 3), 255, np.uint8)
        shapes.draw_text(image, 0, 2, "a long text", width=width)
        assert 0 < ink(image)[1].max() < width


def test_nearer_point_hides_the_farther():
    a, e = np.radians(35), np.radians(20)
    toward = np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
    points, colors = np.stack([0.5 * toward, -0.5 * toward]), np.array([[1.0, 0, 0], [0, 0, 1.0]])
    for order in ([0, 1], [1, 0]):
        image = shapes.render(points[order], colors[order], size=64)
        r, g, b = image[32, 32].astype(int)
        assert r > b + 50
        rows, columns = ink(image)
        assert (image[rows, columns, 0] >= image[rows, columns, 2]).all()


def test_y_is_up_and_x_is_right():
    middle = [shapes.render([p], size=96) for p in ([0, 0.8, 0], [0, -0.8, 0], [0.8, 0, 0], [-0.8, 0, 0])]
    top, bottom, right, left = [tuple(v.mean() for v in ink(image)) for image in middle]
    assert top[0] < 40 < 56 < bottom[0] and abs(top[1] - 48) < 2
    assert left[1] < 40 < 56 < right[1]


def test_frame_is_fixed_and_holds_the_unit_ball():
    xyz = np.random.default_rng(0).normal(size=(2000, 3))
    xyz /= np.linalg.norm(xyz, axis=1, keepdims=True)
    extent = []
    for scale in (1, 0.5):
        rows, columns = ink(shapes.render(scale * xyz, size=200))
        assert rows.min() > 0 and rows.max() < 199 and columns.min() > 0 and columns.max() < 199
        extent.append(np.ptp(rows))
    assert 0.45 < extent[1] / extent[0] < 0.55
    assert extent[0] > 170  # and fills it


def test_render_keeps_colours_fades_with_depth_and_shrinks_discs():
    for channel in range(3):
        image = shapes.render(np.zeros((1, 3)), np.eye(3)[[channel]], size=64)
        rows, columns = ink(image)
        assert (image[rows, columns].argmax(axis=1) == channel).all()
    near, far = [shapes.render([[0, 0, z]], [[0.0, 0, 0]], size=64).min() for z in (0.9, -0.9)]
    assert near < far
    xyz = np.random.default_rng(0).uniform(-0.5, 0.5, (5000, 3))
    assert len(ink(shapes.render(xyz[:1]))[0]) > 4 * len(ink(shapes.render(np.repeat(xyz[:1], 5000, axis=0)))[0])


def test_render_takes_what_it_cannot_show():
    for xyz in (np.zeros((0, 3)), np.full((2, 3), np.nan), np.array([[np.inf, 0, 0]])):
        image = shapes.render(xyz, size=32)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and (image == 255).all()
    assert (shapes.render([[1e6, 1e6, 1e6]], size=32) == 255).all()  # outside the frame
    whole = shapes.render([[0, 0, 0], [np.nan, 0, 0]], [[1.0, 0, 0], [0, 1.0, 0]], size=32)
    assert len(ink(whole)[0])


def test_palette_is_distinct_and_its_order_fixed():
    colors = shapes.palette(60)
    assert colors.shape == (60, 3) and colors.min() >= 0 and colors.max() <= 1
    gaps = np.linalg.norm(colors[:, None] - colors[None], axis=2) + np.eye(60)
    assert gaps.min() > 0.02 and gaps[:10, :10].min() > 0.15
    assert (shapes.palette(7) == colors[:7]).all() and shapes.palette(0).shape == (0, 3)


def test_pca_colors_follow_the_components_whatever_the_sign_of_the_solver():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 3)) * [9, 3, 1]
    axes = np.linalg.qr(rng.normal(size=(16, 3)))[0].T
    colors = shapes.pca_colors(scores @ axes + 5)
    assert colors.shape == (400, 3) and colors.min() == 0 and colors.max() == 1
    for i in range(3):
        assert abs(np.corrcoef(colors[:, i], scores[:, i])[0, 1]) > 0.95
    order = rng.permutation(400)
    assert np.allclose(shapes.pca_colors((scores @ axes + 5)[order]), colors[order], atol=1e-6)


def test_pca_colors_are_not_squeezed_by_an_outlier():
    line = np.linspace(0, 1, 200)[:, None] * [3.0, 1, 0]
    line[-1] *= 100
    assert np.percentile(shapes.pca_colors(line)[:, 0], 90) > 0.85


def test_pca_colors_without_variance_are_grey():
    assert (shapes.pca_colors(np.full((5, 8), 3.3)) == 0.5).all()
    line = shapes.pca_colors(np.linspace(0, 1, 50)[:, None] * np.arange(1, 5))
    assert (line[:, 1:] == 0.5).all() and (np.diff(line[:, 0]) >= 0).all() and np.ptp(line[:, 0]) == 1
    assert shapes.pca_colors(np.eye(2)).shape == (2, 3) and shapes.pca_colors(np.arange(3.0)[:, None]).shape == (3, 3)


def test_montage_places_each_image_and_its_headings():
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 200, (40, 60, 3), dtype=np.uint8) for _ in range(3)] for _ in range(2)]
    plain, headed = shapes.montage(rows), shapes.montage(rows, ["a", "bb", "a heading too long"], ["one", "two"])
    for image in (plain, headed):
        for tile in (tile for row in rows for tile in row):
            found = np.argwhere((image[:-39, :-59] == tile[0, 0]).all(axis=2))
            assert any((image[y : y + 40, x : x + 60] == tile).all() for y, x in found)
    dy, dx = np.subtract(headed.shape[:2], plain.shape[:2])
    assert (headed[dy + 6 :, dx + 6 :] == plain[6:, 6:]).all()  # text stands outside the images
    assert len(ink(headed[: dy + 6, dx:])[0]) and len(ink(headed[dy:, : dx + 6])[0])


@pytest.mark.parametrize("xs, ys", [
    ([3], [0.5]), ([0, 1, 2], [4, 4, 4]), ([0, 1, 2], [0, 0, 0]), ([1, 2, 3, 4], [1, np.nan, np.inf, 2]), ([0, 1], [-1e9, 1e9]),
    ([0, 1, 2], [1e-9, 1e-3, 10]), ([0.1, 0.2], [1e-12, 2e-12]), (range(100), np.random.default_rng(0).normal(size=100)),
], ids=["point", "constant", "zero", "gaps", "large", "decades", "small", "noise"])
def test_curves_put_ink_inside_the_axes(xs, ys):
    image = shapes.plot_lines({"loss": (xs, ys)}, "title", "step", "loss", size=(400, 300))
    assert image.shape == (300, 400, 3) and image.dtype == np.uint8
    rows, columns = np.nonzero(colourful(image)[64:248, 110:376])
    assert len(rows) >= 4
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (edge == 255).all()  # nothing is cut off
    for part in (image[8:24], image[280:], image[64:248, :20]):  # title, label of x, label of y
        assert len(ink(part)[0])


def test_curves_without_data_are_empty_axes():
    for curves in ({}, {"none": ([], [])}, {"none": ([1, 2], [np.nan, np.nan])}):
        image = shapes.plot_lines(curves)
        assert len(ink(image)[0]) and not colourful(image[64:]).any()


def test_curves_have_one_colour_each_and_rise_with_their_values():
    xs = np.arange(50)
    image = shapes.plot_lines({"up": (xs, xs), "down": (xs, -xs)})
    for color, sign in zip((255 * shapes.palette(2)).astype(np.uint8), (1, -1)):
        rows, columns = np.nonzero((image[70:] == color).all(axis=2))
        assert len(rows) > 200 and sign * np.corrcoef(rows, columns)[0, 1] < -0.99


def test_a_gap_is_not_bridged():
    ys = np.ones(100)
    whole = colourful(shapes.plot_lines({"": (np.arange(100), ys)})[70:340])
    ys[40:60] = np.nan
    gap = colourful(shapes.plot_lines({"": (np.arange(100), ys)})[70:340])
    covered = [np.flatnonzero(picture.any(axis=0)) for picture in (whole, gap)]
    assert np.diff(covered[0]).max() == 1 and np.diff(covered[1]).max() > 0.15 * np.ptp(covered[1])


def test_positive_values_over_two_decades_are_drawn_on_a_log_axis():
    xs = np.arange(60)
    for ys, straight in ((10.0 ** (-xs / 15), True), (10.0 ** (-xs / 15) - 0.001, False)):
        rows, columns = np.nonzero(colourful(shapes.plot_lines({"": (xs, ys)})[70:340]))
        assert (abs(np.corrcoef(rows, columns)[0, 1]) > 0.999) == straight


@pytest.mark.parametrize("n", [3, 12, 13, 40])
def test_matrix_shades_hits_blue_misses_red_and_nothing_white(n):
    counts = 1000 * np.eye(n, dtype=int)
    counts[0, -1] = 1000
    counts[1] = 0  # a class without clouds
    image = shapes.plot_matrix(counts, [f"a class with a long name {i}" for i in range(n)])
    cell = max(28, min(48, 480 // n))
    left, top = image.shape[1] - 8 - n * cell, 74
    corners = image[top + 3 : top + n * cell : cell, left + 3 : left + n * cell : cell].astype(int)  # (n, n, 3)
    hit, miss = np.zeros((2, n, n), bool)
    hit[np.arange(n), np.arange(n)], miss[0, -1] = counts.diagonal() > 0, True
    assert (corners[hit][:, 2] > corners[hit][:, 0] + 50).all() and (corners[miss][:, 0] > corners[miss][:, 2] + 50).all()
    assert (corners[~hit & ~miss] == 255).all()
    assert (corners[2, 2] < corners[0, 0]).any()  # all of a row is darker than half of one


@pytest.mark.parametrize("n, title", [(1, ""), (1, "a title that is wider than the matrix"), (2, "t"), (40, "t")])
@pytest.mark.parametrize("name", ["x", "a class with a long name"])
def test_matrix_cuts_no_text_off(n, title, name):
    image = shapes.plot_matrix(12345 * np.eye(n, dtype=int), [name] * n, title)
    assert image.dtype == np.uint8 and colourful(image).any()
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (edge == 255).all()


def test_matrix_prints_counts_up_to_twelve_classes():
    names = [str(i) for i in range(13)]
    for n, printed in ((12, True), (13, False)):
        one, two = [shapes.plot_matrix(k * np.eye(n, dtype=int), names[:n]) for k in (1, 2)]
        assert (one != two).any() == printed
