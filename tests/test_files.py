"""Tests of util/files.py. Files are written here by hand, byte for byte."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import act
from common import refused
from util import clouds, files

XYZ = np.random.default_rng(0).normal(size=(20, 3)).round(4)
WIDE = np.hstack([XYZ, XYZ * 0 + 7])
NUMBERED = np.column_stack([np.arange(20), XYZ])
NAN = np.insert(XYZ, [4, 9], [[np.nan, 0, 0], [0, 0, np.inf]], axis=0)
FIELDS = np.rec.fromarrays(WIDE[:, [2, 0, 1, 3]].T, names="z,x,y,label")


@pytest.fixture(autouse=True)
def new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(save, *arrays, **named):
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


def text(rows, separator=" ", end="\n"):
    return "".join(separator.join(map(repr, row)) + end for row in rows.tolist())


def write(name, content):
    """Writes a text or bytes; skips the test of a .ply if plyfile is missing."""
    if name.endswith(".ply"):
        pytest.importorskip("plyfile")
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


PLY = "ply\nformat ascii 1.0\ncomment ü\nelement vertex 20\nproperty double z\n"
PLY += f"property double X\nproperty double y\nend_header\n{text(XYZ[:, [2, 0, 1]])}"
POINTS = {"fields.npy": saved(np.save, FIELDS), "big.npy": saved(np.save, WIDE.astype(">f8"))}
POINTS |= {"axes.npz": saved(np.savez, z=FIELDS.z, y=FIELDS.y, x=FIELDS.x, label=XYZ)}
POINTS |= {"two.npz": saved(np.savez, a=XYZ[0], xyz=XYZ), "semi.xyz": "\ufeff" + text(XYZ, ";")}
POINTS |= {"mac.ply": PLY.replace("\n", "\r"), "a.txt": "//\n#\n\nx,y\n" + text(WIDE, ",")}
POINTS |= {"chairs.pts": "class x y z\n20\nchair " + text(XYZ, end="\nchair ")[:-6]}
POINTS |= {"colmap.txt": "# ID, X, Y, Z, T[]\n# y up x z\n" + text(NUMBERED, end=" 9\n")}
CORNERS = "0 0 0\n10 0 0\n10 10 0\n9 10 0\n9 1 0\n1 1 0\n1 10 0\n0 10 0\n0 0 4\n"
FACES = "8 0 1 2 3 4 5 6 7\n3 0 1 8\n"  # a U of area 28 and a triangle of area 20
OBJ = "v " + CORNERS.replace("\n", "\nv ")[:-2]
MESH = "ply\nformat ascii 1.0\nelement face 2\nproperty list uchar int texture_indices\n"
MESH += "property list uchar int vertex_index\nelement vertex 9\nproperty float x\n"
MESH += "property float y\nproperty float z\nend_header\n"
MESH += f"3 2 2 2 8 0 1 2 3 4 5 6 7\n1 9 3 0 1 8\n{CORNERS}"
MESHES = {"faces.ply": MESH, "edges.off": f"coff9 2 2\n{CORNERS}{FACES[:-1]} 9 0.5 9\n0 1\n1 2\n"}
MESHES |= {"a.obj": f"{OBJ}f 1//2 2/1 3/1/1 4 5 6 \\\n 7 8\nf -9 -8 -1\nv 0 0 0\n"}
OFF = "OFF\n4 1 0\n0 0 0\n1 1 0\n1 0 0\n0 1 0\n"
BAD = {"pickle.npy": b"csys\nexit\n(S'executed'\ntR."}  # It would raise SystemExit.
BAD |= {"objects.npz": saved(np.savez, a=np.full((4, 3), None)), "no.xyz": "", "a.las": "LASF"}
BAD |= {"bomb.npz": saved(np.savez_compressed, points=np.zeros((2**26, 1), "i1"))}
BAD |= {"paraview.csv": "r,points:0,points:1,points:2\n1,2,3,4\n1,3,4,5"}
BAD |= {"turned.npy": saved(np.save, XYZ.T), "nan.xyz": text(NAN), "same.xyz": "1 2 3\n" * 9}
BAD |= {"two.pts": f"20\n{text(XYZ)}20\n{text(XYZ)}", "0.csv": ",0,1,2\n1,2,3,4\n2,3,4,5"}
BAD |= {"short.csv": "x,y,z\n\n1,2,3\n4,5\n", "names.txt": "Scan no x y z\n1 2 3 4"}
BAD |= {"cut.off": OFF, "absent.off": f"{OFF}3 0 1 4", "crossing.off": f"{OFF}4 0 1 2 3"}
BAD |= {"lone.off": "OFF\n", "short.off": f"{OFF}3 0 1", "face.obj": f"{OBJ}f 1 2 a"}
BAD |= {"huge.ply": PLY.replace("x 20", "x 1111111111111"), "no_z.ply": PLY.replace("z", "w")}
GOT = {"a.las": "laspy", "nan.xyz": "got 2 not finite", "short.csv": "in line 4"}
WORDS = [b"-1", b"9" * 20, b"nan", b"1e400", b"\n", b", 3), }", b"/", b"\0"]


@pytest.mark.parametrize("name", POINTS)
def test_every_form_of_file_gives_the_points_written_to_it(name):
    np.testing.assert_array_equal(files.read_points(write(name, POINTS[name])), XYZ)


@pytest.mark.parametrize("name", MESHES)
def test_samples_of_a_mesh_are_spread_like_its_area(name):
    xyz = files.read_points(write(name, MESHES[name]))
    assert abs((xyz[:, 2] > 0).mean() - 20 / 48) < 0.02
    x, y, _ = xyz[xyz[:, 2] == 0].T
    assert y[(x > 1) & (x < 9)].max() < 1
    np.testing.assert_allclose([x.mean(), y.mean()], [5, (18 * 5.5 + 10 * 0.5) / 28], atol=0.2)


@pytest.mark.parametrize("name", BAD)
def test_broken_files_are_named_and_nothing_in_them_runs(name):
    with refused(f"{write(name, BAD[name])}: expected", GOT.get(name, "got")):
        files.read_cloud(name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", POINTS | MESHES)
@given(st.integers(0, 9999))
def test_damaged_files_are_read_or_refused(name, seed):
    rng = np.random.default_rng(seed)
    damaged = bytearray(Path(write(name, (POINTS | MESHES)[name])).read_bytes())
    damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
    place, end = np.sort(rng.integers(len(damaged) + 1, size=2))
    damaged[place:end] = b" ".join(rng.choice(WORDS, rng.integers(9)))
    try:
        assert np.isfinite(files.read_points(write(name, bytes(damaged)))).all()
    except act.UserError as error:
        assert str(error).startswith(f"{name}: expected")


def test_a_cloud_is_normalised_of_its_farthest_points_and_if_asked_of_its_finite_ones():
    xyz = np.random.default_rng(0).normal(size=(17000, 3)) + 1e6  # as on a map
    whole = files.read_cloud(write("a.npy", saved(np.save, xyz)), None)
    np.testing.assert_array_equal(whole, clouds.normalize(clouds.limit_points(xyz)))
    chosen = act.farthest_point_sample(torch.from_numpy(whole)[None], 20)[0]
    expected = clouds.normalize(whole[chosen])
    np.testing.assert_array_equal(files.read_cloud("a.npy", 20), expected)
    finite = files.read_cloud(write("a.txt", text(NAN)), None, drop_invalid=True)
    np.testing.assert_array_equal(finite, clouds.normalize(XYZ))


def test_labels_are_the_column_that_names_no_axis_and_within_their_range():
    rows = np.column_stack([np.arange(20), XYZ[:, [2, 0, 1]]])
    xyz, labels = files.read_labelled(write("a.csv", f"label,z,x,y\n{text(rows, ',')}"), 0, 20)
    np.testing.assert_array_equal(xyz, XYZ)
    np.testing.assert_array_equal(labels, np.arange(20))
    with refused("a.csv: expected", "labels 1 to 20"):
        files.read_labelled("a.csv", 1, 21)


@pytest.mark.parametrize("offset, kind", [(0, "f4"), (5.8e6, "f8"), ([0, 0, 1e4], "f8")])
def test_a_written_ply_has_colours_and_points_of_the_precision_they_need(offset, kind):
    plyfile = pytest.importorskip("plyfile")
    files.write_ply("a.ply", XYZ + offset, [[1, 2, 3]] * 20)
    vertex = plyfile.PlyData.read("a.ply")["vertex"].data
    rows = np.column_stack([(XYZ + offset).astype(kind), np.tile([1, 2, 3], (20, 1))])
    assert vertex.tolist() == list(map(tuple, rows.tolist()))


def test_meshes_of_a_scene_are_sampled_where_they_stand():
    trimesh = pytest.importorskip("trimesh")
    scene = trimesh.Scene(trimesh.creation.box((1, 1, 1)))
    scene.add_geometry(trimesh.creation.box((2, 2, 2)), transform=np.eye(4) + 5 * np.eye(4, k=3))
    scene.export("a.glb")
    xyz = files.read_points("a.glb")
    assert abs((xyz[:, 0] > 2.5).mean() - 0.8) < 0.02
    assert [xyz.max(axis=0).tolist(), xyz[:, 0].min()] == [[6, 1, 1], -0.5]
