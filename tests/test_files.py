"""util/files.py on files written byte for byte."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import act
from common import python, refused
from util import clouds, files

NEAR = np.random.default_rng(0).normal(size=(20, 3)).round(4)
XYZ = (NEAR + [500_000, 5_800_000, 0]).round(4)
WIDE = np.hstack([XYZ, XYZ * 0 + 7])
NUMBERED = np.column_stack([np.arange(20), XYZ])
FIELDS = np.rec.fromarrays(WIDE[:, [2, 0, 1, 3]].T, names="z,x,y,label")


def saved(save, *arrays, **named):
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


def text(rows, separator=" ", end="\n"):
    return "".join(separator.join(map(repr, row)) + end for row in rows.tolist())


def write(name, content):
    if name.endswith(".ply"):
        pytest.importorskip("plyfile")
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


PLY = "ply\nformat ascii 1.0\n\ncomment ü\nelement vertex 20\nproperty double z\n"
PLY += f"property double X\nproperty double y\nend_header\n{text(XYZ[:, [2, 0, 1]])}"
POINTS = {"fields.npy": saved(np.save, FIELDS), "big.npy": saved(np.save, WIDE.astype(">f8"))}
POINTS |= {"a.off": "OFF 20 0 0\n" + text(XYZ), "a.obj": "v " + text(XYZ, end="\nv ")[:-2]}
POINTS |= {"axes.npz": saved(np.savez, z=FIELDS.z, y=FIELDS.y, x=FIELDS.x, label=XYZ)}
POINTS |= {"two.npz": saved(np.savez, a=XYZ[0], xyz=XYZ), "semi.xyz": "\ufeff" + text(XYZ, ";")}
POINTS |= {"mac.ply": PLY.replace("\n", "\r"), "a.txt": "//\n#\n\nx,y\n" + text(WIDE, ",")}
UNITS = "# no pos_x[m] pos_y[m] pos_z[m]\n"
POINTS["units.txt"] = UNITS + text(NUMBERED)
POINTS |= {"chairs.pts": "class x y z\n20\nchair " + text(XYZ, end="\nchair ")[:-6]}
POINTS |= {"colmap.txt": "# ID, X, Y, Z, T[]\n# y up x z\n" + text(NUMBERED, end=" 9\n")}
CORNERS = "0 0 0\n10 0 0\n10 10 0\n9 10 0\n9 1 0\n1 1 0\n1 10 0\n0 10 0\n0 0 4\n"
FACES = "8 0 1 2 3 4 5 6 7\n3 0 1 8\n"  # a U of area 28, a triangle of 20
OBJ = "v " + CORNERS.replace("\n", "\nv ")[:-2]
MESH = "ply\nformat ascii 1.0\nelement face 2\nproperty list uchar int uv\n"
MESH += "property list uchar int vertex_index\nelement vertex 9\nproperty float x\n"
MESH += "property float y\nproperty float z\nend_header\n"
MESH += f"3 2 2 2 8 0 1 2 3 4 5 6 7\n1 9 3 0 1 8\n{CORNERS}"
MESHES = {"faces.ply": MESH, "edges.off": f"coff9 2 2\n{CORNERS}{FACES[:-1]} 9 0.5 9\n0 1\n1 2\n"}
MESHES |= {"faces.obj": f"{OBJ}f 1//2 2/1 3/1/1 4 5 6 \\\n 7 8\nf -9 -8 -1\nv 0 0 0\n"}
OFF = "OFF\n4 1 0\n0 0 0\n1 1 0\n1 0 0\n0 1 0\n"
BAD = {"pickle.npy": b"csys\nexit\n(S'executed'\ntR."}
BAD |= {"objects.npz": saved(np.savez, a=[None]), "no.xyz": "", "a.las": "LASF"}
BAD |= {"bomb.npz": saved(np.savez_compressed, points=np.zeros(2**26, "i1"))}
BAD |= {"paraview.csv": "points:0,points:1,points:2\n1,2,3\n2,3,4", "same.xyz": "1 2 3\n" * 9}
BAD |= {"turned.npy": saved(np.save, XYZ.T), "nan.xyz": "nan 1 2\n1 2 inf\n1 2 3\n2 3 4"}
BAD |= {"two.pts": f"20\n{text(XYZ)}20\n{text(XYZ)}", "0.csv": ",0,1,2\n1,2,3,4\n2,3,4,5"}
BAD |= {"short.csv": "x,y,z\n\n1,2,3\n4,5\n", "names.txt": "Scan no x y z\n1 2 3 4"}
BAD |= {"cut.off": OFF, "absent.off": f"{OFF}3 0 1 4", "bow.off": f"{OFF}4 0 1 2 3"}
BAD |= {"lfs.npy": "version https://git-lfs.github.com/spec/v1"}
BAD |= {"huge.ply": PLY.replace("x 20", "x 1111111111111"), "no_z.ply": PLY.replace("z", "w")}
GOT = {"lfs.npy": "lfs pull", "nan.xyz": "got 2 not finite", "short.csv": "in line 4"}
WORDS = [b"-1", b"9" * 20, b"nan", b"1e400", b"\n", b", 3), }", b"/", b"\0"]


@pytest.mark.parametrize("name", POINTS)
def test_every_form_of_file_gives_its_points(name):
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
    place, end = np.sort(rng.integers(len(damaged) + 1, size=2))
    damaged[place:end] = b" ".join(rng.choice(WORDS, rng.integers(9)))
    try:
        assert np.isfinite(files.read_points(write(name, bytes(damaged)))).all()
    except act.UserError as error:
        assert str(error).startswith(f"{name}: expected")


def test_a_cloud_is_normalised_of_its_farthest_points():
    xyz = np.random.default_rng(0).normal(size=(17000, 3)) + 1e6
    whole = files.read_cloud(write("a.npy", saved(np.save, xyz)), None)
    np.testing.assert_array_equal(whole, clouds.normalize(clouds.limit_points(xyz)))
    chosen = whole[act.farthest_point_sample(torch.from_numpy(whole)[None], 20)[0]]
    np.testing.assert_array_equal(files.read_cloud("a.npy", 20), clouds.normalize(chosen))
    placed = files.read_cloud("a.npy", 20, False, frame=((1, 2, 3), 0.5))
    np.testing.assert_allclose(placed, [1, 2, 3] + 0.5 * clouds.normalize(chosen), atol=1e-6)
    stored = files.read_cloud(write("b.npy", saved(np.save, NEAR)), None, normalized=False)
    np.testing.assert_array_equal(stored, NEAR.astype(np.float32))


def test_labels_are_the_column_that_is_no_axis():
    rows = np.insert(NUMBERED[:, [0, 3, 1, 2]], [4, 9], np.nan, axis=0)
    path = Path(write("a.csv", f"label,z,x,y\n{text(rows, ',')}"))
    xyz, labels = files.read_labelled(path, 0, 20, drop_invalid=True)
    np.testing.assert_array_equal(np.column_stack([labels, xyz]), NUMBERED)
    with refused("a.csv: ", "labels 1 to 20"):
        files.read_labelled(path, 1, 21, drop_invalid=True)


@pytest.mark.parametrize("offset, kind", [(0, "f4"), (5.8e6, "f8"), ([0, 0, 1e4], "f8")])
def test_a_written_ply_has_colours_and_the_precision_it_needs(offset, kind):
    plyfile = pytest.importorskip("plyfile")
    files.write_ply("a.ply", NEAR + offset, [[1, 2, 3]] * 20)
    vertex = plyfile.PlyData.read("a.ply")["vertex"].data
    rows = np.column_stack([(NEAR + offset).astype(kind), np.tile([1, 2, 3], (20, 1))])
    assert vertex.tolist() == list(map(tuple, rows.tolist()))


def test_a_file_that_cannot_be_written_is_named_and_unchanged():
    with refused("a.csv: ", "No space left"), files.complete_file(write("a.csv", "old")):
        raise OSError(28, "No space left on device")
    assert [os.listdir(), Path("a.csv").read_text()] == [["a.csv"], "old"]


def test_leftovers_of_killed_writers_alone_are_removed():
    code = "import os; from util import files\nwith files.complete_file('a.npy'): os._exit(9)"
    assert [python("-c", code).returncode, len(os.listdir())] == [9, 1]
    with files.complete_file(write("scan.tmp", "")):
        files.remove_leftovers.cache_clear()  # as in another process
        with files.complete_file("b.npy"):
            assert len(os.listdir()) == 3
    assert sorted(os.listdir()) == ["b.npy", "scan.tmp"]


def test_folders_are_listed_once_by_their_own_path():
    for name in "0.npy far/1.npy in/b/c/2.npy in/3.npy in/@eaDir/4.npy in/.d/5.npy".split():
        write(name, "")
    for link, target in (("a", "b"), ("z", "b"), ("b/c/up", "../../.."), ("e", "../far")):
        Path("in", link).symlink_to(target)
    assert list(map(str, files.list_files("in"))) == ["in/3.npy", "in/b/c/2.npy", "in/e/1.npy"]
