"""Tests of util/files.py. Files are written here by hand, byte for byte."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import act
from common import refused
from util import clouds, files

XYZ = np.random.default_rng(0).normal(size=(20, 3)).round(4)
WIDE = np.hstack([XYZ, XYZ * 0 + 7])
NUMBERED = np.column_stack([np.arange(20), XYZ])
NAN = np.insert(XYZ, [4, 9], [[np.nan, 0, 0], [0, 0, np.inf]], axis=0)
LABELLED = np.column_stack([WIDE, np.arange(20)])


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


Z, X, Y = XYZ[:, [2, 0, 1]].T
PLY = "ply\nformat ascii 1.0\ncomment ü\nelement vertex 20\nproperty double z\n"
PLY += f"property double X\nproperty double y\nend_header\n{text(XYZ[:, [2, 0, 1]])}"
DOUBLES = PLY[: PLY.index("end")].replace("ascii", "binary_big_endian").encode() + b"end_header\n"
DOUBLES += XYZ[:, [2, 0, 1]].astype(">f8").tobytes()
POINTS = {"plain.npy": saved(np.save, XYZ), "big.npy": saved(np.save, WIDE.astype(">f8"))}
POINTS |= {"two.npz": saved(np.savez, a=XYZ[0], xyz=XYZ), "semi.xyz": "\ufeff" + text(XYZ, ";")}
POINTS |= {"fields.npy": saved(np.save, np.rec.fromarrays([Z, X, Y, X > 0], names="z,x,y,label"))}
POINTS |= {"axes.npz": saved(np.savez, z=Z, label=Z[:9], y=Y, x=X)}
POINTS |= {"words.txt": text(XYZ, end=" chair\n"), "notes.txt": "//\n#\n\nx,y\n" + text(WIDE, ",")}
POINTS |= {"counted.pts": "x y z\n20\n" + text(XYZ), "ragged.pts": text(WIDE[:9]) + text(XYZ[9:])}
POINTS |= {"id.xyz": "id x y z\n" + text(NUMBERED), "cc.txt": "//Z X Y\n" + text(XYZ[:, [2, 0, 1]])}
POINTS |= {"tabs.pts": "Point ID\tx\ty\tz\n" + text(NUMBERED, "\t")}
POINTS |= {"german.csv": "nr;X [m];Y [m];Z [m]\n" + text(NUMBERED, ";").replace(".", ",")}
POINTS |= {"pandas.csv": ",0,1,2\n" + text(NUMBERED, ","), "0.csv": "0,1,2\n" + text(XYZ, ",")}
POINTS |= {"chairs.csv": "class,x,y,z\nchair," + text(XYZ, ",", "\nchair,")[:-6]}
POINTS |= {"colmap.txt": "# ID, X, Y, Z, T[]\n# y up x z\n" + text(NUMBERED, end=" 9\n")}
POINTS |= {"a.off": "OFF\n20 0 0\n" + text(XYZ), "a.obj": "v " + text(XYZ, end="\nv ")[:-2]}
POINTS |= {"mac.ply": PLY.replace("\n", "\r"), "big.ply": DOUBLES}
CORNERS = "0 0 0\n10 0 0\n10 10 0\n9 10 0\n9 1 0\n1 1 0\n1 10 0\n0 10 0\n0 0 4\n"
FACES = "8 0 1 2 3 4 5 6 7\n3 0 1 8\n"  # a U of area 28 and a triangle of area 20
OBJ = "v " + CORNERS.replace("\n", "\nv ")[:-2]
MESH = "ply\nformat ascii 1.0\nelement face 2\nproperty int material\n"
MESH += "property list uchar int texture_indices\nproperty list uchar int vertex_index\n"
MESH += "element vertex 9\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
MESH += f"7 3 2 2 2 8 0 1 2 3 4 5 6 7\n7 1 9 3 0 1 8\n{CORNERS}"
MESHES = {"glued.off": f"OFF9 2 2\n{CORNERS}{FACES}0 1\n1 2\n", "face_first.ply": MESH}
MESHES |= {"colours.off": "COFF\n9 2\n" + (CORNERS + FACES).replace("\n", " 9 0.5 9\n")}
MESHES |= {"corners.obj": f"{OBJ}vt 0 0\nf 1//2 2/1 3/1/1 4 5 6 \\\n 7 8\nf 1 2 9\n"}
MESHES |= {"backwards.obj": f"{OBJ}f -9 -8 -7 -6 -5 -4 -3 -2\nf -9 -8 -1\nv 0 0 0\n"}
PICKLE = b"csys\nexit\n(S'executed'\ntR."  # It would raise SystemExit.
OFF = "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1"
BAD = {"pickle.npy": PICKLE, "object.npy": saved(np.save, np.full((4, 3), None))}
BAD |= {"objects.npz": saved(np.savez, a=np.full((4, 3), None))}
BAD |= {"bomb.npz": saved(np.savez_compressed, points=np.zeros((2**26, 1), "i1"))}
BAD |= {"turned.npy": saved(np.save, XYZ.T), "two.npz": saved(np.savez, a=XYZ, b=XYZ)}
BAD |= {"nan.xyz": text(NAN), "empty.txt": "", "same.xyz": "1 2 3\n" * 9, "empty.ply": ""}
BAD |= {"two.pts": f"20\n{text(XYZ)}20\n{text(XYZ)}", "scan.las": "LASF", "cut.ply": DOUBLES[:-9]}
BAD |= {"short.csv": "x,y,z\n\n1,2,3\n4,5\n", "comma.txt": "#\n\n1,5 2,5 3,5"}
BAD |= {"names.txt": "Scan no x y z\n1 2 3 4", "lone.off": "OFF\n", "face.obj": f"{OBJ}f 1 2 a"}
BAD |= {
    "v.off": OFF.replace("1 0 0", "1 0 a") + " 2",
    "scan.pcd": "VERSION",
    "v.obj": "v 0 0 0\nv 0",
}
BAD |= {"huge.ply": PLY.replace("x 20", "x 1111111111111"), "no_z.ply": PLY.replace("z", "w")}
BAD |= {"absent.off": f"{OFF} 3", "short.off": OFF, "area.off": f"{OFF} 0", "cut.off": OFF[:20]}
BAD |= {"cross.off": "OFF\n4 1 0\n0 0 0\n1 1 0\n1 0 0\n0 1 0\n4 0 1 2 3", "0.obj": f"{OBJ}f 0 1 2"}
GOT = {"scan.las": "laspy", "scan.pcd": "open3d", "nan.xyz": "2 of 22", "empty.ply": "empty"}
GOT |= {
    "names.txt": "4 columns",
    "absent.off": "0 to 2",
    "object.npy": "objects",
    "lone.off": "OFF",
}
LINE = {"short.csv": 4, "comma.txt": 3, "v.obj": 2, "v.off": 4, "face.obj": 10}
GOT |= {name: f"in line {number}" for name, number in LINE.items()}
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
    np.testing.assert_array_equal(xyz, files.read_points(name))  # each time


@given(st.integers(4, 12), st.integers(0, 999))
def test_triangles_of_a_star_in_space_have_its_area(n, seed):
    rng = np.random.default_rng(seed)
    angle = (np.arange(n) + 0.8 * rng.random(n)) * 2 * np.pi / n
    x, y = rng.uniform(0.2, 1, n) * np.stack([np.cos(angle), np.sin(angle)])
    corners = np.stack([x, y], 1) @ np.linalg.qr(rng.normal(size=(3, 3)))[0][:2] + 5
    triangles = files.triangulate(corners, [range(n)])
    area = np.linalg.norm(np.cross(*np.diff(triangles, axis=1).swapaxes(0, 1)), axis=1).sum()
    assert area == pytest.approx(x @ np.roll(y, -1) - y @ np.roll(x, -1), rel=1e-6)


def test_a_cloud_is_normalised_and_of_its_farthest_points():
    xyz = np.random.default_rng(0).normal(size=(17000, 3)) + 1e6  # as on a map
    whole = files.read_cloud(write("a.npy", saved(np.save, xyz)), None)
    np.testing.assert_array_equal(whole, clouds.normalize(clouds.limit_points(xyz)))
    expected = clouds.normalize(whole[clouds.farthest_points(whole, 20)])
    np.testing.assert_array_equal(files.read_cloud("a.npy", 20), expected)


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


def test_mistakes_are_named_once_and_bugs_are_not_hidden():
    with refused("a.npy: denied"), files.reading("a.npy"), files.reading("a.npy"):
        raise act.UserError("denied")
    with pytest.raises(KeyError), files.reading("a.npy"):
        raise KeyError


def test_points_that_are_not_finite_are_left_out_if_asked_for():
    write("a.txt", text(NAN))
    np.testing.assert_array_equal(files.read_points("a.txt", drop_invalid=True), XYZ)
    expected = clouds.normalize(XYZ)
    np.testing.assert_array_equal(files.read_cloud("a.txt", None, drop_invalid=True), expected)


FIRST = "label,z,x,y\n" + text(LABELLED[:, [6, 2, 0, 1]], ",")


@pytest.mark.parametrize("name, rows", [("a.txt", text(LABELLED)), ("named.csv", FIRST)])
def test_labels_are_the_last_column_or_the_one_that_names_no_axis(name, rows):
    found = np.column_stack(files.read_labelled(write(name, rows), 0, 20))
    np.testing.assert_array_equal(found, LABELLED[:, [0, 1, 2, 6]])


@pytest.mark.parametrize(
    "labels", [np.arange(1, 21), np.arange(-1, 19), np.arange(20) / 2, XYZ[:, :0]]
)
def test_labels_out_of_range_are_refused(labels):
    write("a.npy", saved(np.save, np.column_stack([abs(XYZ).round(), labels])))
    with refused("a.npy: expected", "labels 0 to 19"):
        files.read_labelled("a.npy", 0, 20)


def test_a_file_takes_its_name_when_it_is_complete():
    with pytest.raises(KeyError), files.complete_file(write("a.bin", "before")) as file:
        file.write(b"half")
        raise KeyError
    assert [path.read_bytes() for path in Path().iterdir()] == [b"before"]


@pytest.mark.parametrize("offset, kind", [(0, "f4"), (5.8e6, "f8"), ([0, 0, 1e4], "f8")])
def test_a_written_ply_has_colours_edges_and_points_of_the_precision_they_need(offset, kind):
    plyfile = pytest.importorskip("plyfile")
    files.write_ply("a.ply", XYZ + offset, [[1, 2, 3]] * 20, [[0, 1]])
    ply = plyfile.PlyData.read("a.ply")
    rows = np.column_stack([(XYZ + offset).astype(kind), np.tile([1, 2, 3], (20, 1))])
    assert ply["vertex"].data.tolist() == [tuple(row) for row in rows.tolist()]
    assert ply["vertex"].data.dtype["x"] == kind
    assert ply["edge"].data.tolist() == [(0, 1)]


@pytest.mark.parametrize("name", ["a.stl", "a.glb"])
def test_meshes_of_a_scene_are_sampled_where_they_stand(name):
    trimesh = pytest.importorskip("trimesh")
    scene = trimesh.Scene(trimesh.creation.box((1, 1, 1)))
    scene.add_geometry(trimesh.creation.box((2, 2, 2)), transform=np.eye(4) + 5 * np.eye(4, k=3))
    scene.export(name)
    x, y, z = files.read_points(name).T
    assert abs((x > 2.5).mean() - 0.8) < 0.02
    assert x.max() == 6 and x.min() == -0.5 and y.max() == 1 and z.max() == 1
