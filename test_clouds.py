"""Tests of clouds.py: readers, folders, published layouts, synthetic data, sampling, pictures."""

import io
import json
import os
import pickle
import struct
import sys
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import act
import clouds

XYZ = np.random.default_rng(0).normal(size=(20, 3)).round(4)
WIDE = np.hstack([XYZ, XYZ * 0 + 7])
quick = settings(deadline=None, derandomize=True, max_examples=25)
seeded = torch.Generator().manual_seed

def points(n=40, columns=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, columns)).astype(np.float32)

def npy(*array, save=np.save, **arrays):
    stream = io.BytesIO()
    save(stream, *array, **arrays)
    return stream.getvalue()

def text(rows, separator=" "):
    lines = (separator.join(map(repr, row)) for row in np.asarray(rows, float).tolist())
    return "\n".join(lines).encode() + b"\n"

def ply(xyz, form="ascii", faces=()):
    """Axes in the order z x y, before a colour and the lists of faces."""
    head = (f"ply\nformat {form} 1.0\ncomment a test\nelement vertex {len(xyz)}\n"
            "property uchar red\nproperty double z\nproperty double x\nproperty double y\n"
            f"element face {len(faces)}\nproperty list uchar int vertex_indices\n"
            "property uchar blue\nend_header\n").encode()
    rows = [("B3d", 9, z, x, y) for x, y, z in np.array(xyz, float).tolist()]
    rows += [(f"B{len(face)}iB", len(face), *face, 7) for face in faces]
    if form == "ascii":
        return head + "".join(" ".join(map(repr, row)) + "\n" for _, *row in rows).encode()
    order = ">" if "big" in form else "<"
    return head + b"".join(struct.pack(order + code, *row) for code, *row in rows)

npz = partial(npy, save=np.savez_compressed)
FORMS = {".npy": npy, ".ply": ply, ".txt": text, ".xyz": text, ".pkl": pickle.dumps}

def write(path, data):
    """Writes bytes, a text, or else what the form of the suffix makes of it."""
    data = data.encode() if isinstance(data, str) else data
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    Path(path).write_bytes(data if isinstance(data, bytes) else FORMS[Path(path).suffix](data))
    return path

def write_clouds(*names):
    for name in names:
        write(name, points(30, seed=zlib.crc32(name.encode())))

@contextmanager
def refused(path, *keywords):
    """Expects a ValueError of one line that begins with `path` and has the keywords behind it."""
    with pytest.raises(ValueError) as error:
        yield
    message = str(error.value)
    rest = message.removeprefix(path)
    assert len(message) > len(rest) > len(": expected") and "\n" not in message
    assert all(keyword in rest for keyword in keywords), message

@pytest.fixture(autouse=True)
def new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

GOOD = {
    "plain.npy": npy(XYZ), "big.npy": npy(WIDE.astype(">f8")), "single.npz": npz(anything=WIDE),
    "points.npz": npz(other=XYZ[0], points=XYZ), "plain.pts": text(WIDE), "ascii.ply": ply(XYZ),
    "little.ply": ply(XYZ, "binary_little_endian"), "big.ply": ply(XYZ, "binary_big_endian"),
    "dos.ply": ply(XYZ).replace(b"\n", b"\r\n"), "dos.xyz": text(XYZ).replace(b"\n", b"\r\n"),
    "mac.xyz": text(XYZ).replace(b"\n", b"\r"), "mark.xyz": b"\xef\xbb\xbf" + text(XYZ),
    "header.txt": b"x y z\n" + text(XYZ, "\t"), "commas.txt": b"x,y,z\n" + text(WIDE, ", "),
    "comments.txt": b"//X,Y,Z\n# made by hand, twice\n\n" + text(XYZ, ","),
    "words.txt": text(XYZ).replace(b"\n", b" chair\n"), "counted.pts": b"20\n" + text(XYZ),
    "ragged.txt": text(WIDE[:9]) + text(XYZ[9:]), "points.off": b"OFF\n20 0 0\n" + text(XYZ),
    "points.obj": b"# by hand\nmtllib a.mtl\nv " + text(XYZ)[:-1].replace(b"\n", b"\nvn 0 0 1\nv ")}

@pytest.mark.parametrize("name", GOOD)
def test_every_form_of_file_gives_the_points_written_to_it(name):
    xyz = clouds.read_points(write(name, GOOD[name]))
    assert xyz.dtype == np.float64
    np.testing.assert_array_equal(xyz, XYZ)

SQUARE = np.array([(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (5, 5, 5)])  # no face has the last
LINES = ["0 0 0\n", "1 0 0\n", "1 1 0\n", "0 1 0\n", "5 5 5\n"]
MESHES = {
    "two.off": "OFF\n# a\n5 2 0\n" + "".join(LINES) + "\n3 0 1 2 255 0 0\n3 0 2 3 0.5 0 0\n",
    "colours.off": "COFF5 1 0\n" + "".join(LINES).replace("\n", " 1 1 1 1\n") + "4 0 1 2 3\n",
    "slashes.obj": "v " + "v ".join(LINES) + "vt 0 0\nvn 0 0 1\nf 1/1/1 2//1 3/1 4\n",
    "negative.obj": "v " + "v ".join(LINES[:4]) + "f -4 -3 -2\nv 5 5 5\nf -5 -3 -2\n",
    "ascii.ply": ply(SQUARE, faces=[(0, 1, 2), (0, 2, 3)]),
    "big.ply": ply(SQUARE, "binary_big_endian", [(0, 1, 2, 3), (0, 1, 2)])}

@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_sampled_on_their_faces(name):
    xyz = clouds.read_points(write(name, MESHES[name]))
    assert xyz.shape == (clouds.MESH_POINTS, 3)
    np.testing.assert_allclose([xyz.min(0), xyz.max(0)], [[0, 0, 0], [1, 1, 0]], atol=0.05)
    np.testing.assert_array_equal(xyz, clouds.read_points(name))

def test_mesh_samples_follow_the_area_and_the_seed():
    vertices = [(0, 0, 0), (3, 0, 0), (3, 1, 0), (0, 1, 0), (0, 0, 5), (1, 0, 5), (0, 2, 5)]
    faces = [(0, 1, 2, 3), (4, 5, 6)]  # areas 3 and 1
    xyz, other = (clouds.sample_mesh(vertices, faces, 8000, seed) for seed in (1, 2))
    flat = xyz[xyz[:, 2] == 0] * [1 / 3, 1, 1]  # uniform on the unit square
    assert abs(len(flat) / 8000 - 0.75) < 0.02 and (xyz != other).any()
    np.testing.assert_allclose(flat.mean(0), [1 / 2, 1 / 2, 0], atol=0.02)
    np.testing.assert_allclose(flat.std(0), [12**-0.5, 12**-0.5, 0], atol=0.01)

@quick
@given(st.integers(0, 99), st.integers(2, 40), st.sampled_from([1e-200, 1e-3, 1, 1e3, 1e200]))
def test_normalized_clouds_fill_the_unit_sphere_whatever_their_unit(seed, n, unit):
    xyz = points(n, seed=seed).astype(float) + 1
    cloud = clouds.normalize(xyz * unit)
    assert cloud.dtype == np.float32 and np.abs(cloud.mean(0)).max() < 1e-6
    assert abs(np.linalg.norm(cloud, axis=1).max() - 1) < 1e-6
    batch = clouds.unit_sphere(torch.from_numpy(np.stack([xyz, xyz + 9, xyz * 0])))
    np.testing.assert_allclose(batch, [cloud, cloud, cloud * 0], atol=1e-6)

@quick
@given(st.integers(1, 60), st.integers(0, 99), st.booleans())
def test_farthest_points_are_those_of_act_ties_included(n, seed, on_grid):
    rng = np.random.default_rng(seed)
    xyz = rng.integers(0, 3, (n, 3)) if on_grid else rng.normal(size=(n, 3))
    expected = act.farthest_point_sample(torch.tensor(xyz, dtype=torch.float32)[None], n)[0]
    np.testing.assert_array_equal(clouds.farthest_points(xyz, n), expected)

class Call(SimpleNamespace):
    def __reduce__(self):  # its pickle calls a function
        return self.function, self.arguments

RUN = Call(function=sys.exit, arguments=("executed",))  # no reader catches a SystemExit
OBJECTS = np.array([[RUN] * 3] * 4, object)
HUGE = npy(XYZ).replace(b"(20, 3), }           ", b"(10000000000000, 3), }")[:128]
OFF = "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1"
OBJ = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf "
BROKEN = {  # file: (a word of the message, content)
    "word.xyz": ("'a'", "1 2 3\n4 5 6\na b c\n7 8 9\n"), "short.xyz": ("", "1 2 3\n\n4 5\n"),
    "decimals.txt": ("", "0,18 -0,19 0,2\n0,1 0,2 0,3\n"), "same.xyz": ("", "1 2 3\n1 2 3\n"),
    "nan.xyz": ("2 of 3", "nan nan nan\n1 2 3\n4 5 1e999\n"), "empty.txt": ("", ""),
    "flat.npy": ("shape", npy(XYZ[:, 0])), "two.npy": ("shape", npy(XYZ[:, :2])),
    "turned.npy": ("shape", npy(XYZ.T)), "huge.npy": ("", HUGE), "objects.npy": ("", npy(OBJECTS)),
    "pickle.npy": ("", pickle.dumps(RUN)), "words.npy": ("", npy(np.full((4, 3), "a"))),
    "objects.npz": ("", npz(a=OBJECTS)), "two.npz": ("xyz", npz(a=XYZ, b=XYZ)),
    "bomb.npz": ("packed", npz(points=np.zeros((2**26, 1), "i1"))), "cut.ply": ("", ply(XYZ)[:-9]),
    "type.ply": ("quad", ply(XYZ).replace(b"double x", b"quad x")), "open.ply": ("", "ply\n"),
    "form.ply": ("middle", ply(XYZ, "middle_endian")), "face.obj": ("x", OBJ + "1 x\n"),
    "order.ply": ("face", ply(XYZ).replace(b"element face", b"element edge 0\nelement face")),
    "list.ply": ("", ply(SQUARE, faces=[(0, 1, 2)]).replace(b"\n3 0 1", b"\n-2 0 1")),
    "no_z.ply": ("z", ply(XYZ).replace(b"double z", b"double w")), "scan.las": (".las", "LASF"),
    "huge.ply": ("", ply(XYZ, "binary_little_endian").replace(b"x 20", b"x 1111111111111")),
    "face.ply": ("20", ply(XYZ, faces=[(0, 1, 20)])), "absent.off": ("3", OFF + " 3\n"),
    "cut.off": ("2", "OFF\n4 2 0\n0 0 0\n1 0 0\n"), "corner.off": ("corners", OFF),
    "vertex.off": ("", "OFF\n2 0 0\n0 0 0\n1 0\n"), "area.off": ("area", OFF + " 0\n"),
    "zero.obj": ("", OBJ + "0 1 2\n"), "vertex.obj": ("", "v 0 0 0\nv 1 0\n")}

@pytest.mark.parametrize("name", [*BROKEN, "nowhere.ply"])
def test_broken_files_are_named_in_one_line_and_nothing_in_them_runs(name):
    keyword, content = BROKEN.get(name, ("", None))
    with refused(name if content is None else write(name, content), keyword):
        clouds.read_cloud(name)

WHOLE = {**GOOD, **{"mesh_" + name: MESHES[name] for name in MESHES}}
WORDS = [b"1", b"-1", b"3", b"9" * 20, b"nan", b"1e400", b"\n", b", 3), }", b"/", b"\0",
         b"end_header\n", b"property list uchar float x\n", b"element face 9\n"]

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
@quick
@given(st.integers(0, 9999))
def test_damaged_files_are_read_or_refused(name, seed):
    rng = np.random.default_rng(seed)
    damaged = bytearray(Path(write(name, WHOLE[name])).read_bytes())
    for place in rng.integers(len(damaged), size=rng.integers(4)):
        damaged[place] ^= 1 << rng.integers(8)
    place = rng.integers(len(damaged))
    words = b" ".join(rng.choice(WORDS, rng.integers(9)))
    damaged[place:rng.choice([place, place + 3, len(damaged)])] = rng.choice([words, rng.bytes(8)])
    try:
        xyz = clouds.read_points(write(name, bytes(damaged)))
        assert xyz.shape[1:] == (3,) and np.isfinite(xyz).all()
    except ValueError as error:
        assert str(error).startswith(name) and "\n" not in str(error)

def make_clouds(sizes, **options):
    names = [str(i) for i in range(len(sizes))]
    xyz, offsets = torch.from_numpy(points(sum(sizes))), torch.tensor([0, *sizes]).cumsum(0)
    return clouds.Clouds(xyz, offsets, names, torch.arange(len(sizes)), names, **options)

@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 99))
def test_a_sample_takes_each_point_of_its_cloud_as_rarely_as_possible(sizes, num_points, seed):
    data = make_clouds(sizes, normalized=False)
    indices = torch.arange(len(sizes)).flip(0)
    xyz, flat = data.sample(indices, num_points, seeded(seed))
    assert xyz.shape == (len(sizes), num_points, 3) and torch.equal(xyz, data.points[flat])
    for row, i in zip(flat, indices.tolist()):
        counts = torch.bincount(row - data.offsets[i], minlength=sizes[i])  # fails if negative
        assert len(counts) == sizes[i] and counts.max() - counts.min() <= 1  # evenly repeated
    assert torch.equal(flat, data.to("cpu").sample(indices, num_points, seeded(seed))[1])

def test_samples_are_uniform_over_points_and_order_and_normalized_anew():
    data = make_clouds([8, 5])
    _, flat = data.sample(torch.zeros(8000, dtype=torch.long), 4, seeded(0))
    assert (torch.bincount(flat.reshape(-1)) / 8000 - 0.5).abs().max() < 0.03
    assert (torch.bincount(flat[:, 0]) / 8000 - 0.125).abs().max() < 0.02  # the first place too
    data.points += 1000
    for cloud, rows in zip(*data.sample(torch.tensor([0, 1, 0]), 16, seeded(0))):
        np.testing.assert_allclose(cloud, clouds.normalize(data.points[rows].numpy()), atol=1e-6)

@pytest.mark.parametrize("indices", [[2, 0, 2], [1, 2], torch.tensor([[3], [0]])])
def test_selected_clouds_keep_points_labels_and_parts(indices):
    data = make_clouds([4, 9, 1, 6], parts=torch.arange(20))
    chosen = data.select(indices)
    for place, i in enumerate(int(i) for i in indices):
        assert torch.equal(chosen[place], data[i]) and chosen.names[place] == str(i)
        assert chosen.labels[place] == i and chosen.parts[chosen.offsets[place]] == data.offsets[i]

@pytest.fixture
def first():
    """The points of a folder "set", which has been read once."""
    write_clouds("set/chair/a.npy", "set/chair/b.xyz", "set/lamp/c.ply", "set/.hidden.npy")
    write("set/lamp/deep/d.npy", points(17000, 6).astype(float) + 1e6)  # far away, as on a map
    write("set/lamp/e.txt", points(1500))
    write("set/notes.md", "not a cloud")
    write("set/README.txt", "Version 2\n\n1. Install\n")
    return all_points("set")

def all_points(root, **options):
    dataset = clouds.open_dataset(root, **options)
    return torch.cat([dataset.train.points, dataset.test.points])

def test_a_folder_gives_the_clouds_of_its_files_with_their_classes(first):
    dataset = clouds.open_dataset("set")
    for split, size in ((dataset.train, 3), (dataset.test, 2)):  # one of each class
        assert split.classes == ["chair", "lamp"] and len(split) == size
        for i, name in enumerate(split.names):
            assert name.startswith(split.classes[split.labels[i]])
            np.testing.assert_array_equal(split[i], clouds.read_cloud(f"set/{name}", None))
            few = split[i][act.farthest_point_sample(split[i][None], 20)]
            few = clouds.unit_sphere(few)[0]
            np.testing.assert_allclose(clouds.read_cloud(f"set/{name}", 20), few, atol=1e-6)
    assert max(dataset.train.offsets.diff().max(), dataset.test.offsets.diff().max()) == 16384
    words = ("3 training", "2 test", "chair, lamp", "1 .txt")
    assert all(word in clouds.describe(dataset) for word in words)

def test_the_cache_is_private_and_rebuilt_when_a_file_changes_or_it_is_damaged(first, monkeypatch):
    (path,) = Path("set").glob(".clouds*")
    with monkeypatch.context() as patch:
        patch.setattr(clouds, "READERS", dict.fromkeys(clouds.READERS))  # none can be called
        clouds.open_dataset("set").train.points.zero_()
        assert torch.equal(all_points("set"), first)
    whole = path.read_bytes()
    wrong_end = whole[:-4] + b"\xff\xff\xff\x7f"
    for damaged in (b"", whole[:-5], whole + b"12345678", wrong_end, bytes(len(whole))):
        path.write_bytes(damaged)
        assert torch.equal(all_points("set"), first)
    write("set/chair/a.npy", points(50))
    assert len(all_points("set")) == len(first) + 20
    assert [*Path("set").glob(".clouds*")] == [path]

def test_folders_that_cannot_be_written_share_a_temporary_cache(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(clouds.tempfile, "gettempdir", lambda: "temporary")
    write_clouds("a/0.npy", "b/0.npy")
    assert not torch.equal(all_points("a"), all_points("b"))
    assert os.listdir("a") == ["0.npy"] and len(list(Path("temporary").rglob("*.bin"))) == 2

@pytest.mark.parametrize("train, test", [
    ("Training/b/1.npy train/a/0.npy", "TESTING/a/2.npy"),
    ("a/train/0.npy b/train/1.npy", "a/test/2.npy"),
    ("train/a/0.npy train/b/1.npy", "valid/a/2.npy"),
    ("Val/b/1.npy train/a/0.npy", "test/a/2.npy")])
def test_split_folders_stand_above_or_below_the_classes(train, test):
    write_clouds(*[f"set/{name}" for name in [*train.split(), test]])
    dataset = clouds.open_dataset("set")
    assert dataset.train.names == train.split() and dataset.test.names == [test]
    assert dataset.train.classes == dataset.test.classes == ["a", "b"]
    assert sorted(dataset.train.labels) == [0, 1] and dataset.test.labels == 0
    assert any("test" in note and note.endswith(" b") for note in dataset.notes)  # none of b
    assert any("val" in note for note in dataset.notes) == ("val" in f"{train} {test}".lower())

def test_a_fixed_fifth_of_each_class_is_held_out_but_never_all_of_it():
    write_clouds(*[f"set/a/{i}.npy" for i in range(15)], "set/b/0.npy", "set/b/1.npy",
                 "set/c/0.npy")
    train, test = clouds.open_dataset("set")[1:3]
    assert torch.bincount(test.labels, minlength=3).tolist() == [3, 1, 0]
    assert torch.bincount(train.labels).tolist() == [12, 1, 1]
    assert not set(train.names) & set(test.names)
    write_clouds("set/d/0.npy")
    assert test.names == clouds.open_dataset("set").test.names

def test_clouds_without_classes_and_very_few_clouds():
    write_clouds("set/0.npy", "two/a/0.npy", "two/b/0.npy")
    for path in ("set", "set/0.npy"):  # one cloud, in a folder and by its own name
        dataset = clouds.open_dataset(path)
        assert dataset.train.names == dataset.test.names == ["0.npy"] and dataset.notes
    assert [len(split) for split in clouds.open_dataset("two")[1:3]] == [1, 1]
    write_clouds("set/a/0.npy", *[f"set/{i}.npy" for i in range(1, 10)])
    dataset = clouds.open_dataset("set")
    assert dataset.train.labels is None and dataset.train.classes == [] and len(dataset.test) == 2
    assert any("0.npy" in note for note in dataset.notes)  # it has no class

def test_links_to_folders_are_followed_and_cycles_end_and_dangling_ones_are_named():
    write_clouds("elsewhere/0.npy", "elsewhere/1.npy", "set/a/0.npy", "set/a/1.npy")
    os.symlink(os.path.abspath("elsewhere"), "set/b")
    os.symlink(os.path.abspath("set"), "elsewhere/back")
    dataset = clouds.open_dataset("set")
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 1]
    os.symlink("gone", "set/c")
    with refused("set", "c"):
        clouds.open_dataset("set")

PARTS = np.column_stack([points(9, 6), np.arange(9) % 4])  # labels 0 to 3 in the seventh column
SYNSETS = "synsetoffset2category.txt"
MISTAKES = {
    clouds.open_dataset: [  # (words of the message, {file: content})
        ("synthetic", {}), (".npy .npz", {"a.csv": "1"}),
        ("train 2", {"train/a.npy": XYZ, "train/b.npy": XYZ}),
        ("b.xyz e.npy", {"a/b.xyz": "1 2 3\n4 5\n", "a/e.npy": "", "f.npy": XYZ}),
        ("b.npy", {"train/a.npy": XYZ, "test/a.npy": XYZ, "b.npy": XYZ}),
        ("a-2.npy", {"shapenet_pc/a-1.npy": XYZ, "train.txt": "a-1.npy", "test.txt": "a-2.npy"}),
        ("sofa", {"modelnet40_train.txt": "a_1", "modelnet40_test.txt": "sofa_1",
                  "modelnet40_shape_names.txt": "a", "a/a_1.txt": XYZ, "sofa/sofa_1.txt": XYZ}),
        ("x_train.h5 h5py", {"x_train.h5": "no"}),
        ("a_train.h5 b_train.h5", {"a_train.h5": "no", "b_train.h5": "no"}),
        ("ScanObjectNN", {"main_split/test_objectdataset.h5": "no"})],
    clouds.open_parts: [
        ("", {}), ("a.txt", {"a.txt": XYZ}), ("synset", {SYNSETS: "Teapot 3"}),
        ("train_file_list", {SYNSETS: "Bag 1"}),
        ("classes.txt", {"a.npy": PARTS, "b.npy": PARTS, "classes.txt": "wall"})],
    clouds.open_rooms: [
        ("S3DIS", {"Area_1/office_1/Annotations/wall_1.txt": XYZ}), ("b.txt", {"b.txt": PARTS / 2}),
        ("5", {"Area_1_a.npy": PARTS, "Area_2_b.npy": PARTS}), ("255", {"b.txt": PARTS + 253}),
        ("Area_1_a.npy", {"Area_1_a.npy": PARTS[:, :3]}), ("12", {"Area_1_a.npy": PARTS + 10}),
        ("Area_1_a.npy", {"Area_1_a.npy": PARTS * [1, 1, 1, 1, 1, 1, np.nan]})]}

@pytest.mark.parametrize("reader", MISTAKES, ids=lambda reader: reader.__name__)
def test_mistakes_in_folders_are_named_in_one_line(tmp_path, reader):
    for i, (words, files) in enumerate(MISTAKES[reader]):
        for name, content in files.items():
            write(f"{i}/{name}", content)
        with refused(str(i), *words.split()):
            reader(str(i))
    assert not list(tmp_path.rglob("*.tmp"))

@pytest.mark.parametrize("lists", ["ShapeNet-55", "."])
def test_shapenet_55_follows_its_lists(lists):
    names = [f"02691156-{i}.npy" for i in range(2)] + [f"03001627-{i}.npy" for i in range(4)]
    write_clouds(*[f"set/shapenet_pc/{name}" for name in [*names, "03001627-unlisted.npy"]])
    write(f"set/{lists}/train.txt", "\n".join(names[1:]))
    write(f"set/{lists}/test.txt", names[0] + "\n")
    dataset = clouds.open_dataset("set")
    assert dataset.name == "ShapeNet-55" and sorted(dataset.train.names) == names[1:]
    assert dataset.test.names == names[:1] and len(dataset.everything) == 6
    assert dataset.test.classes == ["02691156", "03001627"] and dataset.test.labels == 0

def test_modelnet40_is_read_from_texts_and_from_caches():
    write("set/modelnet40_shape_names.txt", "bed\nnight_stand\n")
    write("set/modelnet40_train.txt", "bed_0001\nnight_stand_0002")
    write("set/modelnet40_test.txt", "night_stand_0003\n")
    rows = points(columns=6)
    for name in ("bed/bed_0001", "night_stand/night_stand_0002", "night_stand/night_stand_0003"):
        write(f"set/{name}.txt", text(rows, ","))
    texts = clouds.open_dataset("set")
    train, test = [[rows, rows], [[0], np.array([1])]], [[rows], [np.array([1])]]
    write("set/modelnet40_train_8192pts_fps.dat", pickle.dumps(train))
    write("set/modelnet40_test_8192pts_fps.dat", pickle.dumps(test))
    packed = clouds.open_dataset("set")
    np.testing.assert_array_equal(packed.train[1], rows[:, :3])
    np.testing.assert_allclose(texts.train[0], clouds.normalize(rows[:, :3]), atol=1e-6)
    for dataset in (texts, packed):
        assert dataset.name == "ModelNet40" and dataset.train.labels.tolist() == [0, 1]
        assert dataset.test.labels == 1 and dataset.test.classes == ["bed", "night_stand"]

RECONSTRUCT = Call(function=np.zeros(1).__reduce__()[0], arguments=(np.ndarray, (10**13,), "d"))
FOLD = {"train": [(points(columns=6), 0, "a")], "test": [(points(20, 6), 1, "b")]}
HOSTILE = [RUN, RECONSTRUCT, Call(function=np.zeros, arguments=((4, 3),)), np.ndarray, OBJECTS,
           np.zeros((4, 3), "V8"), np.zeros((4, 3), "f4,O"), np.full((4, 3), "a"), "words", 7]
FOLDS = [{**FOLD, "test": [(other, 1, "b")]} for other in HOSTILE]
FOLDS += [[1, 2], {"train": [], "test": []}, {"train": FOLD["train"], "x": 0},
          {**FOLD, "test": [(points(), 2, "c")]}]

@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_few_shot_folds_of_every_pickle_protocol_numpy_type_and_order(protocol):
    values = np.arange(48).reshape(8, 6)
    arrays = [values.astype(code) for code in ("f4", ">f4", "f8", ">f8", "<i2", ">i8")]
    arrays.append(np.asfortranarray(arrays[1]))
    fold = {"train": [(array, np.int64(0), "a") for array in arrays], "test": FOLD["test"]}
    data = pickle.dumps(fold, protocol)
    old = data.replace(b"numpy._core.", b"numpy.core.") if protocol < 4 else data  # of numpy 1
    for content in (data, old):
        train, test = clouds.read_episode(write("0.pkl", content), 2)
        assert train.labels.tolist() == [0] * 7 and test.labels.tolist() == [1]
        np.testing.assert_array_equal(train.points, np.tile(values[:, :3], (7, 1)))
        np.testing.assert_array_equal(test.points, points(20, 6)[:, :3])
    with refused(write("0.pkl", data[:-200])):
        clouds.read_episode("0.pkl", 2)

@pytest.mark.parametrize("fold", FOLDS, ids=range(len(FOLDS)))
def test_other_pickles_run_nothing_and_are_refused(fold):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with refused(write("0.pkl", pickle.dumps(fold, protocol))):
            clouds.read_episode("0.pkl", 2)
        for split in ("test", "train"):
            path = f"set/modelnet40_{split}_8192pts_fps.dat"
            write(path, pickle.dumps([[fold], [0]], protocol))
        with refused(path):
            clouds.open_dataset("set")

def write_h5(path, seed=0, label=(0, 14, 1, 2), name="label"):
    h5py = pytest.importorskip("h5py")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with h5py.File(path, "w") as file:
        file["data"] = np.stack([points(seed=seed + i) + 7 for i in range(len(label))])
        file[name] = np.array(label)

@pytest.mark.parametrize("seed, variant", list(enumerate(clouds.SCAN_FILES)))
@pytest.mark.parametrize("above", ["set", "set/h5_files"])
def test_scanobjectnn_is_read_as_stored_by_variant(above, seed, variant):
    for i, name in enumerate(clouds.SCAN_FILES.values()):
        write_h5(f"{above}/{name}", i)
        write_h5(f"{above}/{name}".replace("training", "test"), i)
    train = Path(above, clouds.SCAN_FILES[variant])
    for path in ("set", train.parent, train):
        dataset = clouds.open_dataset(path, variant=variant)
        assert dataset.name.startswith("ScanObjectNN") and len(dataset.test.classes) == 15
        np.testing.assert_array_equal(dataset.train[1], points(seed=seed + 1) + 7)
        assert dataset.train.labels.tolist() == [0, 14, 1, 2]
    assert dataset.train.sample(torch.tensor([0]), 40)[0].mean() > 6  # not normalised

def test_h5_pairs():
    write_h5("set/x_train.h5", label=[[0], [1], [2], [1]])
    write_h5("set/x_test.h5", label=[0, 1])
    dataset = clouds.open_dataset("set")
    assert dataset.train.normalized and dataset.train.labels.tolist() == [0, 1, 2, 1]
    assert len(dataset.test.classes) == 3 and len(dataset.test) == 2
    for options in ({"label": [0, -1]}, {"name": "other"}):
        write_h5("set/x_test.h5", **options)
        with refused("set", ".h5"):
            clouds.open_dataset("set")

def test_shapenet_part_has_categories_and_parts():
    write("set/synsetoffset2category.txt", "Bag\t001\nMug\t002\n")
    lists = {"train": ["001/a", "002/b"], "val": ["002/c"], "test": ["001/d", "002/e"]}
    for split, models in lists.items():
        entries = json.dumps([f"shape_data/{model}" for model in models])
        write(f"set/train_test_split/shuffled_{split}_file_list.json", entries)
        for model in models:
            parts = {"001": 4, "002": 36}[model[:3]] + np.arange(50) % 2
            write(f"set/{model}.txt", np.column_stack([points(50, 6), parts]))
    dataset = clouds.open_parts("set")
    train, test = dataset.train, dataset.test
    assert dataset.name == "ShapeNetPart" and train.classes == ["Bag", "Mug"]
    assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [0, 1]
    assert train.part_ranges == [(4, 6), (36, 38)] and test.parts[50:].tolist() == [36, 37] * 25
    np.testing.assert_allclose(train[0], clouds.normalize(points(50, 6)[:, :3]), atol=1e-6)
    assert torch.equal(clouds.open_dataset("set").train.points, train.points)

def test_s3dis_areas_are_split_and_blocks_pretrain():
    for area in (1, 5):
        xyz = np.random.default_rng(area).uniform(0, [1.6, 1.2, 2], (4000, 3)) + 10
        rows = np.column_stack([xyz, 0 * xyz, (xyz[:, 2] > 11) * 12])
        write(f"set/Area_{area}_office_1.npy", rows)
    rooms = clouds.open_rooms("set")
    room = rooms.train[0]
    assert room.name == "Area_1_office_1" and room.area == 1 and rooms.test[0].area == 5
    assert room.xyz.shape == (4000, 3) and set(room.labels) == {0, 12} and len(rooms.classes) == 13
    assert room.xyz.dtype == np.float32 and (room.xyz.min(0) == 0).all()
    train = clouds.open_dataset("set").train
    assert train.labels is None and len(train) == 2  # the others are too small
    assert train.offsets.diff().min() >= 1024 and np.ptp(train[0].numpy(), 0)[:2].max() <= 1

def test_own_labelled_clouds_are_parts_or_rooms():
    xyz, labels = points(50), (np.arange(50) % 4).tolist()
    for name in ("set/train/x/a.npy", "set/train/b.txt", "set/Test/c.xyz"):
        write(name, np.column_stack([xyz + 5, xyz, labels]))
    given = ["wall", "floor", "door", "lamp", "sofa"]
    for names in (["label 0", "label 1", "label 2", "label 3"], given):
        dataset, rooms = clouds.open_parts("set"), clouds.open_rooms("set")
        assert dataset.train.part_names == rooms.classes == names
        assert dataset.train.labels is None and dataset.test.part_ranges == [(0, len(names))]
        assert len(dataset.train) == len(rooms.train) == 2 and not dataset.train.classes
        assert dataset.test.parts.tolist() == rooms.test[0].labels.tolist() == labels
        np.testing.assert_allclose(rooms.test[0].xyz, xyz - xyz.min(0), atol=1e-5)
        write("set/classes.txt", "\n".join(given))

@pytest.mark.parametrize("column, found", [([], r"\[2\. 2\. 2"), ([0, 1, 9, 300], r"\[300\.\]")])
def test_a_last_column_without_labels_is_shown(column, found):  # flat clouds: z could be labels
    write("set/a.txt", np.column_stack([np.eye(4, 2), np.full(4, 2), *[column] * bool(column)]))
    with pytest.raises(ValueError, match="labels 0 to 255, got " + found):
        clouds.open_parts("set")

def test_synthetic_shapes_are_labelled_normalized_and_seeded_one_by_one():
    shapes = clouds.synthetic_clouds(2, seed=0, num_points=128)
    assert len(shapes.classes) >= 20 and shapes.names[1:3] == ["sphere_0_0001", "ellipsoid_0_0000"]
    assert torch.bincount(shapes.labels).tolist() == [2] * len(shapes.classes)
    xyz = shapes.points.reshape(-1, 128, 3)
    torch.testing.assert_close(clouds.unit_sphere(xyz), xyz)
    same, other = (clouds.synthetic_clouds(1, seed, 128).points for seed in (0, 1))
    assert torch.equal(same, xyz[::2].flatten(0, 1)) and not torch.equal(same, other)
    several = clouds.compositions(shapes)
    assert len(several.classes) >= 12 and len(several) == 2 * len(several.classes)
    assert torch.equal(several[0], shapes[shapes.names.index(several.names[0])])
    for data in (shapes, several):  # their parts follow one another from 0
        found = [sorted(set(parts.tolist())) for parts in data.parts.chunk(len(data.classes))]
        assert sum(found, []) == list(range(data.part_ranges[-1][1]))
        assert [(parts[0], parts[-1] + 1) for parts in found] == [*map(tuple, data.part_ranges)]

def test_synthetic_rooms_hold_their_boxes_which_do_not_overlap():
    rooms = clouds.open_rooms("synthetic", area=2, density=60)
    assert len(rooms.train) == 15 and [room.area for room in rooms.test] == [2, 2, 2]
    np.testing.assert_array_equal(clouds.synthetic_rooms([(2, 1)], 60)[0].xyz, rooms.test[0].xyz)
    assert sum(len(room.boxes) for room in rooms.train) > 30
    for room in rooms.train:
        for i, (label, low, high) in enumerate(room.boxes):
            inside = ((room.xyz > low - 0.06) & (room.xyz < high + 0.06)).all(1)
            assert (room.labels[inside] == label).sum() > 20  # it stands there
            for _, other_low, other_high in room.boxes[:i]:
                assert (high[:2] < other_low[:2]).any() or (other_high[:2] < low[:2]).any()

def test_scale_and_translate_stay_in_their_ranges_and_differ_per_cloud_and_axis():
    xyz = torch.randn(4000, 5, 3, generator=seeded(0), dtype=torch.float64)
    for per_axis in (True, False):
        out = clouds.scale_translate(xyz, seeded(1), (0.5, 2), 0.1, per_axis)
        scale = (out[:, 1] - out[:, 0]) / (xyz[:, 1] - xyz[:, 0])  # (B, 3)
        shift = out[:, 0] - scale * xyz[:, 0]
        torch.testing.assert_close(out, scale[:, None] * xyz + shift[:, None])
        ranges = [*scale.aminmax(), *shift.aminmax(), shift.mean()]
        np.testing.assert_allclose(ranges, [0.5, 2, -0.1, 0.1, 0], atol=0.01)
        assert (scale.std(dim=1).median() > 0.05) == per_axis

def test_rotation_about_y_keeps_heights_and_shapes_and_covers_the_circle():
    xyz = torch.randn(2000, 4, 3, generator=seeded(0), dtype=torch.float64)
    out = clouds.rotate_y(xyz, seeded(1))
    assert torch.equal(out[..., 1], xyz[..., 1])
    before, after = (torch.complex(batch[..., 0], batch[..., 2]) for batch in (xyz, out))
    turn = after / before  # for every point of a cloud the same number on the unit circle
    torch.testing.assert_close(turn, (turn / turn.abs())[:, :1].expand_as(turn))
    assert turn.mean().abs() < 0.06 and turn.real.max() > 0.99 and turn.real.min() < -0.99

def decode_png(path):
    """8-bit RGB in one chunk with filter 0 -> (H, W, 3) uint8."""
    data = Path(path).read_bytes()
    W, H, length = struct.unpack(">16x2I9xI", data[:37])
    assert data[24:26] == b"\x08\x02" and length == len(data) - 57
    assert int.from_bytes(data[-16:-12], "big") == zlib.crc32(data[37:-16])
    rows = np.frombuffer(zlib.decompress(data[41:-16]), np.uint8).reshape(H, 1 + 3 * W)
    return rows[:, 1:].reshape(H, W, 3)

def ink(image):
    """Rows and columns of all pixels that are not white."""
    return np.array(np.nonzero((image < 250).any(axis=2)))

def test_png_decodes_to_the_same_pixels():
    image = np.random.default_rng(0).integers(0, 256, (2, 300, 3), np.uint8)[::-1, ::-1]
    clouds.write_png("a.png", image)
    assert (decode_png("a.png") == image).all()

def test_write_ply_reads_back_with_colours_and_edges():
    clouds.write_ply("a.ply", torch.from_numpy(XYZ), np.full((20, 3), 200), [(0, 1), (1, 19)])
    np.testing.assert_array_equal(clouds.read_points("a.ply"), XYZ.astype(np.float32))
    end = bytes([200] * 3) + struct.pack("<4i", 0, 1, 1, 19)
    assert Path("a.ply").read_bytes().endswith(end)

def test_nearer_points_hide_farther_ones_which_are_paler():
    angles = np.radians([35, 20])
    (sin, rise), (cos, level) = np.sin(angles), np.cos(angles)
    xyz, colors = np.outer([0.5, -0.5], [level * sin, rise, level * cos]), np.eye(3)[[0, 2]]
    for order in ([0, 1], [1, 0]):
        image = clouds.render(xyz[order], colors[order], size=64)
        assert image[32, 32, 0] > image[32, 32, 2] + 50 and (image[..., 0] >= image[..., 2]).all()
    near, far = (clouds.render([[0, 0, z]], [[0, 0, 0]], size=64).min() for z in (0.9, -0.9))
    assert near < far

def test_y_is_up_x_is_right_and_the_frame_holds_the_unit_ball_whatever_the_cloud():
    ends = ([0, 0.8, 0], [0, -0.8, 0], [0.8, 0, 0], [-0.8, 0, 0])
    top, bottom, right, left = (ink(clouds.render([end], size=96)).mean(1) for end in ends)
    assert top[0] < 40 < 56 < bottom[0] and abs(top[1] - 48) < 2 and left[1] < 40 < 56 < right[1]
    sphere = torch.nn.functional.normalize(torch.from_numpy(points(2000)), dim=1).numpy()
    whole, half = (ink(clouds.render(scale * sphere, size=200)) for scale in (1, 0.5))
    assert 0 < whole.min() and whole.max() < 199 and np.ptp(whole[0]) > 170
    assert 0.45 < np.ptp(half[0]) / np.ptp(whole[0]) < 0.55

def test_points_that_cannot_be_shown_are_left_out():
    for xyz in (np.zeros((0, 3)), np.full((2, 3), np.nan), [[np.inf, 0, 0]], [[1e6, 1e6, 1e6]]):
        assert (clouds.render(xyz, size=32) == np.full((32, 32, 3), 255)).all()
    image = clouds.render([[0, 0, 0], [np.nan, 0, 0]], [[1, 0, 0], [0, 1, 0]], size=32)
    assert (image[..., 0] >= image[..., 1]).all() and ink(image).size

def test_palette_is_distinct_and_its_order_fixed():
    colors = clouds.palette(60)
    assert colors.min() >= 0 and colors.max() <= 1 and (clouds.palette(7) == colors[:7]).all()
    assert (np.linalg.norm(colors[:, None] - colors, axis=2) + np.eye(60)).min() > 0.02

def test_pca_colors_are_components_over_all_clouds_of_the_list():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 3)) * [9, 3, 1]
    features = scores @ np.linalg.qr(rng.normal(size=(16, 3)))[0].T + 5
    first, second = clouds.pca_colors([features[:150], features[150:]])
    colors = np.concatenate([first, second])
    assert len(first) == 150 and colors.min() == 0 and colors.max() == 1
    assert np.abs(np.corrcoef(colors.T, scores.T)[:3, 3:]).diagonal().min() > 0.95
    np.testing.assert_allclose(clouds.pca_colors([features[::-1]])[0], colors[::-1], atol=1e-6)
    line = np.append(np.linspace(0, 1, 200), 100)[:, None] * [3.0, 1, 0]  # and an outlier
    (colors,) = clouds.pca_colors([line])
    assert np.percentile(colors[:, 0], 90) > 0.85 and np.isfinite(colors).all()

@pytest.mark.parametrize("columns, lines", [(None, 2), (4, 1)])
def test_a_gallery_places_each_cloud_in_the_picture_and_in_the_ply(columns, lines):
    colors = np.zeros((40, 3)) + [1, 0, 0]
    clouds.write_gallery("g", [[(points(), None), (points(), colors)]] * 2, columns)
    image, tile = decode_png("g.png"), clouds.render(points(), colors)
    assert image.shape == (lines * 326, (columns or 2) * 326, 3)
    assert (image[3:323, 329:649] == tile).all() and len(clouds.read_points("g.ply")) == 4 * 40

def test_what_a_looser_reader_would_take_for_something_else(tmp_path):
    xyz = np.random.default_rng(0).random((50, 3))
    head = "ply\nformat ascii 1.0\nelement vertex 50\n{}\nend_header\n"
    columns = "property float x\nproperty  float\ty\nproperty float z"
    spaced, wide = tmp_path / "spaced.ply", tmp_path / "wide.ply"
    rows = "\n".join(" ".join(map(str, row)) for row in xyz)
    spaced.write_text(head.format(columns) + rows)
    np.testing.assert_allclose(clouds.read_points(spaced), xyz)
    wide.write_text(head.format(columns) + rows.replace("\n", " 1 2\n"))
    with pytest.raises(ValueError, match="wide.ply.*numbers"):
        clouds.read_points(wide)
    (tmp_path / "own" / "train").mkdir(parents=True)
    np.save(tmp_path / "own" / "train" / "a.npy", xyz)
    with pytest.raises(ValueError, match="train and test"):
        clouds.open_dataset(tmp_path / "own")
    np.save(tmp_path / "Area_1_office_1.npy", xyz)  # a file is a cloud, whatever its name
    assert len(clouds.open_dataset(tmp_path / "Area_1_office_1.npy").train) == 1
    named = tmp_path / "ShapeNet-55"
    named.mkdir()
    for i in range(5):
        np.save(named / f"{i}.npy", xyz)
    assert clouds.open_dataset(named).everything is None  # the test clouds stay held out
    (named / "gone.npy").symlink_to(tmp_path / "nowhere.npy")
    (named / "bad.npy").write_text("no array")
    with pytest.raises(ValueError) as error:
        clouds.open_dataset(named)
    assert "bad.npy" in str(error.value) and "gone.npy" in str(error.value)
