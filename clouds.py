"""Point clouds as data: files, folders and published data sets in; pictures and .ply out.

    xyz = clouds.read_cloud("scan.ply")                # (1024, 3) float32 in the unit sphere
    train = clouds.open_dataset("ModelNet40").train    # or a folder of clouds
    batch, _ = train.sample(torch.arange(32), 1024)    # (32, 1024, 3)

Nothing in a file is executed; whatever is wrong with it is a ValueError of one line that begins
with its name. Letters: B clouds of a batch, N points of each, T points of all.
"""

import hashlib
import json
import math
import os
import pickle
import re
import struct
import sys
import tempfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

MESH_POINTS = 8192  # sampled from a mesh
MAX_POINTS = 16384  # kept of a larger cloud
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+|nan|inf)(?:e[-+]?\d+)?(?![^\s,])"
ARRAY_NAMES = ("points", "xyz", "data", "pos")  # looked for in an .npz of several arrays
PLY_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
PLY_PROPERTY = r"\n ?property (?:list (\S+) )?(\S+) (\S+)"  # type of a list's length, type, name
PLY_TYPES = dict(
    char="i1", uchar="u1", short="i2", ushort="u2", int="i4", uint="u4", float="f4", double="f8",
    int8="i1", uint8="u1", int16="i2", uint16="u2", int32="i4", uint32="u4", float32="f4",
    float64="f8")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "val": "val", "valid": "val", "validation": "val"}  # folder -> split
SCAN_FILES = {  # variant of ScanObjectNN -> folder, end of the files' names
    "OBJ_BG": ("main_split", "objectdataset"), "OBJ_ONLY": ("main_split_nobg", "objectdataset"),
    "PB_T50_RS": ("main_split", "objectdataset_augmentedrot_scale75")}
SCAN_CLASSES = ("bag bin box cabinet chair desk display door shelf table bed pillow sink sofa "
                "toilet").split()
SHAPENET_PARTS = dict(  # category -> (first, last + 1) of its parts
    Airplane=(0, 4), Bag=(4, 6), Cap=(6, 8), Car=(8, 12), Chair=(12, 16), Earphone=(16, 19),
    Guitar=(19, 22), Knife=(22, 24), Lamp=(24, 28), Laptop=(28, 30), Motorbike=(30, 36),
    Mug=(36, 38), Pistol=(38, 41), Rocket=(41, 44), Skateboard=(44, 47), Table=(47, 50))
S3DIS_CLASSES = ("ceiling floor wall beam column window door table chair sofa bookcase board "
                 "clutter").split()
ROOM_CLASSES = "ceiling floor wall table chair sofa bed bookshelf lamp".split()

# ---- One file -----------------------------------------------------------------------------------
# A reader gives points (n, 3 or more columns) and faces (lists of vertex indices).

def _expect(condition, expected, got):
    if not condition:
        raise ValueError(f"expected {expected}, got {got}")

@contextmanager
def _naming(path, errors=Exception):
    """Whatever fails while reading `path` becomes a ValueError of one line that begins with it."""
    try:
        yield
    except errors as error:
        message = " ".join(str(error).split())
        if not isinstance(error, ValueError):
            message = f"expected readable data, got {type(error).__name__} {message}"
        named = message.startswith(str(path))
        raise ValueError(message if named else f"{path}: {message}") from error

@contextmanager
def _atomic(path):
    """A binary file that becomes `path` once complete; a failure leaves `path` as it was."""
    part = Path(path).with_name(f".{Path(path).name}-{os.urandom(4).hex()}.tmp")
    try:
        with open(part, "xb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def _read_numpy(path):
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded, ()
    with loaded as arrays:
        names = [name for name in ARRAY_NAMES if name in arrays] or list(arrays)
        _expect(len(names) == 1 or names[0] in ARRAY_NAMES, f"one of {ARRAY_NAMES}", names[:5])
        size = sum(member.file_size for member in arrays.zip.infolist())
        _expect(size <= max(2**26, 100 * path.stat().st_size), "less packed data", f"{size} bytes")
        return arrays[names[0]], ()

def _lines(path, comment="#"):
    """The lines of a text that are not blank, without their comments."""
    text = path.read_text("utf-8-sig", errors="replace")
    return [line for line in re.sub(f"({comment}).*", "", text).split("\n") if line.strip()]

def holds_points(path):
    """Whether a line in the first 64 KiB of a text begins with three numbers."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return re.search(rf"(?im)^[ \t]*{NUMBER}([ \t,]+{NUMBER}){{2}}", file.read(2**16))

def _read_text(path, columns=(0, 1, 2)):
    rows = _lines(path, "#|//") or ["no"]
    head = rows[0].strip()
    if head.isdecimal() or not re.match(f"(?i){NUMBER}", head):  # the number of points, or words
        rows = rows[1:]
    _expect(rows and (not head.isdecimal() or int(head) == len(rows)), f"{head} points", len(rows))
    delimiter = "," if "," in rows[0] else None
    return np.loadtxt(rows, delimiter=delimiter, usecols=columns, ndmin=2), ()

def _read_off(path):
    text = "\n".join(_lines(path)) + "\n"
    header = re.match(r"\s*[A-Z]{0,4}OFF\s*(\d+)\s+(\d+).*\n", text)
    _expect(header, "OFF and the numbers of vertices and faces", repr(text[:40]))
    num_vertices, num_faces = int(header[1]), int(header[2])
    lines, faces = text[header.end():].splitlines()[:num_vertices + num_faces], []
    for line in lines[num_vertices:]:
        size, *corners = line.split()
        faces.append([int(corner) for corner in corners[:int(size)]])
        _expect(len(faces[-1]) == int(size), f"a face of {size} corners", len(faces[-1]))
    _expect(len(faces) == num_faces, f"{num_vertices + num_faces} vertices and faces", len(lines))
    return np.loadtxt(lines[:num_vertices], usecols=(0, 1, 2), ndmin=2), faces

def _read_obj(path):
    vertices, faces = [], []
    for line in _lines(path):
        keyword, *words = line.split()
        if keyword == "v":
            vertices.append([float(word) for word in words[:3]])
        elif keyword == "f":  # words vertex/texture/normal, from 1, or from -1 backwards; 0 is none
            corners = [int(word.split("/")[0]) for word in words]
            faces.append([c - 1 if c > 0 else len(vertices) + c if c else -1 for c in corners])
    return np.array(vertices, np.float64), faces

def _read_ply(path):
    """Vertices are scalars; a face, as any row but a vertex, may be one list and then scalars."""
    head, *rest = re.split(rb"\nend_header[ \t]*(?:\r?\n|$)", path.read_bytes(), maxsplit=1)
    head = re.sub(r"[ \t\r]+", " ", head.decode("latin-1"))
    form = re.match(r"ply ?\n(?: ?(?:comment|obj_info).*\n)* ?format (\S+)", head)
    _expect(rest and form and form[1] in PLY_ORDERS, "a PLY header, known format", repr(head[:40]))
    order, body, found, offset = PLY_ORDERS[form[1]], rest[0], {}, 0
    if order == "=":  # the numbers of a text become a body of doubles
        body = np.array([float(word) for word in body.split()]).tobytes()
    types = {name: "f8" if order == "=" else order + kind for name, kind in PLY_TYPES.items()}
    for element in re.split(r"\n ?element ", head)[1:]:
        name, count = element.split()[:2]
        lengths, kinds, keys = zip(*re.findall(PLY_PROPERTY, element))
        _expect(not any(lengths[1:]), "one list, before the scalars", f"lists in {name}")
        fields = [(key, types[kind]) for key, kind in zip(keys, kinds)]
        found[name] = np.frombuffer(body, fields, 0 if lengths[0] else int(count), offset)
        offset += found[name].nbytes
        if lengths[0]:
            length, (_, kind), tail = np.dtype(types[lengths[0]]), fields[0], np.dtype(fields[1:])
            found[name] = []
            for _ in range(int(count)):
                size = int(np.frombuffer(body, length, 1, offset)[0])
                _expect(size >= 0, f"a list of {keys[0]}", f"length {size}")
                found[name].append(np.frombuffer(body, kind, size, offset + length.itemsize))
                offset += length.itemsize + found[name][-1].nbytes + tail.itemsize
    _expect(order != "=" or offset == len(body), f"{offset // 8} numbers", len(body) // 8)
    columns = found["vertex"].dtype.names
    _expect({"x", "y", "z"} <= set(columns), "vertices with x, y, z", ", ".join(columns))
    return np.stack([found["vertex"][axis] for axis in "xyz"], axis=1), found.get("face", ())

LABELLED = (".npy", ".txt", ".xyz", ".pts")  # forms that may hold a label for each point
READERS = {".npy": _read_numpy, ".npz": _read_numpy, ".ply": _read_ply, ".off": _read_off,
           ".obj": _read_obj, ".xyz": _read_text, ".txt": _read_text, ".pts": _read_text}

def sample_mesh(vertices, faces, num_points, seed=0):
    """Points uniform over the area of a mesh, the same ones for the same `seed`: vertices (V, 3),
    faces: polygons of vertex indices, cut into fans -> (num_points, 3) float64.
    Raises ValueError if a vertex is not there or the faces have no area."""
    triangles = [(face[0], *edge) for face in faces for edge in zip(face[1:], face[2:])]
    corners = np.array(triangles, np.int64).reshape(-1, 3)
    inside = (corners >= 0) & (corners < len(vertices))
    _expect(inside.all(), f"faces of {len(vertices)} vertices", f"index {corners[~inside][:1]}")
    a, b, c = np.moveaxis(np.asarray(vertices, np.float64)[corners], 1, 0)  # (triangles, 3) each
    with np.errstate(over="ignore", invalid="ignore"):
        area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    _expect(0 < area.sum() < math.inf, "faces with an area", area.sum())
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(area), num_points, p=area / area.sum())
    u, v = np.sort(rng.random((2, num_points, 1)), axis=0)
    return a[chosen] + u * (b - a)[chosen] + (1 - v) * (c - a)[chosen]

def normalize(points):
    """(n, 3) -> (n, 3) float32, centroid at 0, farthest point at radius 1, computed in float64.
    Raises ValueError if all points are equal."""
    points = np.asarray(points, np.float64)
    _expect(len(points) and (points != points[0]).any(), "different points", f"{len(points)} equal")
    points = points / np.abs(points).max()  # so that no square overflows
    points = points - points.mean(0)
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)

def unit_sphere(xyz):
    """`normalize` for every cloud of a batch (B, N, 3); a cloud of equal points becomes 0."""
    xyz = xyz.double() - xyz.double().mean(1, keepdim=True)
    return (xyz / xyz.norm(dim=2).amax(1)[:, None, None].clamp(min=1e-12)).float()

def _coordinates(array):
    """The first three columns of an array, (n, 3) float64; ValueError unless they are finite."""
    array = np.asarray(array)
    _expect(array.dtype.kind in "fiub", "numbers", f"type {array.dtype}")
    fits = array.ndim == 2 and 3 <= array.shape[1] <= max(3, min(64, len(array)))  # not (3, n)
    _expect(fits, "an array of shape (n, 3), up to 64 columns", array.shape)
    points = np.array(array[:, :3], np.float64)
    finite = np.isfinite(points).all(1)
    _expect(finite.all(), "finite points", f"{(~finite).sum()} of {len(points)} NaN or infinite")
    return points

def _kept(n):
    """Indices of the points kept of n: at most MAX_POINTS, random, the same for the same n."""
    rng = np.random.default_rng(0)
    return rng.choice(n, MAX_POINTS, replace=False) if n > MAX_POINTS else np.arange(n)

def read_points(path):
    """The points of a file, (n, 3) float64 as stored; of a mesh MESH_POINTS of its surface.
    Raises ValueError, also if a coordinate is not finite or all points are equal."""
    path = Path(path)
    suffix = path.suffix.lower()
    with _naming(path):
        path.stat()  # raises if it is missing, whatever its suffix
        _expect(suffix in READERS, " ".join(READERS), suffix or "no suffix")
        points, faces = READERS[suffix](path)
        points = _coordinates(points)
        normalize(points)  # raises if all are equal
        return sample_mesh(points, faces, MESH_POINTS) if len(faces) else points

def _read_stored(path):
    """A file as a cache stores it: at most MAX_POINTS, normalised, (n, 3) float32."""
    with _naming(path):
        points = read_points(path)
        return normalize(points[_kept(len(points))])

def farthest_points(xyz, num):
    """act.farthest_point_sample in numpy: (n, 3) -> (num,) indices, the same ones, num <= n."""
    planes = np.ascontiguousarray(np.asarray(xyz, np.float32).T)  # (3, n)
    nearest = np.full(len(xyz), np.inf, np.float32)  # squared distance to the chosen ones
    chosen = np.zeros(num, np.int64)
    for i in range(1, num):
        x, y, z = planes - planes[:, chosen[i - 1], None]
        np.minimum(nearest, x * x + y * y + z * z, out=nearest)
        chosen[i] = nearest.argmax()
    return chosen

def read_cloud(path, points=1024):
    """A file as a model takes it, (n, 3) float32, n <= points, normalised: of more than MAX_POINTS
    a random part, as in a folder's cache, of which the `points` (None: all) farthest are taken."""
    xyz = _read_stored(path)
    if points is None or len(xyz) <= points:
        return xyz
    return normalize(xyz[farthest_points(xyz, points)])

def write_ply(path, xyz, colors=None, edges=None):
    """xyz (N, 3), colors (N, 3) uint8, edges (E, 2) vertex indices -> a binary .ply, atomically."""
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(xyz)}"]
    head += ["property float x", "property float y", "property float z"]
    rows = np.ascontiguousarray(xyz, "<f4").view(np.uint8)  # (N, 12)
    if colors is not None:
        head += ["property uchar red", "property uchar green", "property uchar blue"]
        rows = np.hstack([rows, np.asarray(colors, np.uint8)])
    data = rows.tobytes()
    if edges is not None:
        head += [f"element edge {len(edges)}", "property int vertex1", "property int vertex2"]
        data += np.asarray(edges, "<i4").tobytes()
    with _atomic(path) as file:
        file.write("\n".join([*head, "end_header", ""]).encode() + data)

# ---- Many clouds --------------------------------------------------------------------------------
@dataclass
class Clouds:
    """Clouds of any sizes, one after another: cloud i is points[offsets[i]:offsets[i + 1]]."""
    points: torch.Tensor  # (T, 3) float32, possibly mapped from a file larger than memory
    offsets: torch.Tensor  # (number of clouds + 1,) int64
    names: list
    labels: torch.Tensor | None = None  # one per cloud, int64 indices into classes
    classes: list = field(default_factory=list)
    parts: torch.Tensor | None = None  # (T,) int64, one per point
    part_ranges: list | None = None  # (first, last + 1) of each class's parts
    part_names: list = field(default_factory=list)  # if the data set has them
    normalized: bool = True  # False: samples are used as stored
    largest: int = 0  # points of the largest cloud, if known: sampling then waits for no GPU

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return self.points[self.offsets[i]:self.offsets[i + 1]]

    def to(self, device):
        moved = {name: x.to(device) for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **moved, largest=int(self.offsets.diff().max()))

    def select(self, indices):
        """The clouds `indices`, in that order, as Clouds; neighbours stay mapped."""
        indices = [int(i) for i in indices]
        first, last = indices[0], indices[-1] + 1
        if indices == list(range(first, last)):
            flat = slice(int(self.offsets[first]), int(self.offsets[last]))
        else:
            flat = torch.cat([torch.arange(*self.offsets[i:i + 2].tolist()) for i in indices])
        offsets = torch.nn.functional.pad(self.offsets.diff()[indices].cumsum(0), (1, 0))
        return replace(
            self, points=self.points[flat], offsets=offsets, names=[self.names[i] for i in indices],
            labels=None if self.labels is None else self.labels[indices],
            parts=None if self.parts is None else self.parts[flat])

    def sample(self, indices, num_points, generator=None):
        """A random `num_points` of each cloud, in random order; a smaller cloud is repeated.

        indices (B,) -> xyz (B, num_points, 3) float32, each normalised anew, on the generator's
        device, and flat (B, num_points) int64 into points, on theirs."""
        indices = indices.to(self.offsets.device)
        device = self.points.device if generator is None else generator.device
        start, size = (x[indices].to(device) for x in (self.offsets, self.offsets.diff()))  # (B,)
        largest = self.largest or int(size.max())
        keys = torch.rand(len(size), largest, generator=generator, device=device)
        keys.masked_fill_(torch.arange(largest, device=device) >= size[:, None], 2)  # go last
        order = keys.topk(min(num_points, largest), largest=False).indices
        turn = torch.arange(num_points, device=device) % size[:, None]  # (B, num_points)
        flat = (start[:, None] + order.gather(1, turn)).to(self.points.device)
        xyz = self.points[flat].to(device)
        return (unit_sphere(xyz) if self.normalized else xyz), flat

class Dataset(NamedTuple):
    name: str
    train: Clouds
    test: Clouds
    everything: Clouds | None = None  # of ShapeNet-55, pretrained on both of its lists
    notes: list = ()

class Room(NamedTuple):
    """A whole room, z up, in metres."""
    name: str
    area: int
    xyz: np.ndarray  # (n, 3) float32, from its lowest corner
    labels: np.ndarray  # (n,) uint8
    boxes: list = ()  # of the objects: (class, lowest corner (3,), highest corner (3,))

class RoomSet(NamedTuple):
    name: str
    train: list
    test: list
    classes: list
    notes: list = ()

def describe(dataset):
    """One line: name, sizes of the splits, number and names of the classes, notes."""
    kind = "rooms" if isinstance(dataset, RoomSet) else "clouds"
    source = dataset if kind == "rooms" else dataset.train
    classes = source.classes or source.part_names
    names = f": {', '.join(classes)}" if 0 < len(classes) <= 40 else ""
    sizes = f"{len(dataset.train)} training and {len(dataset.test)} test {kind}"
    return "; ".join([f"{dataset.name}: {sizes}, {len(classes)} classes{names}", *dataset.notes])

def _from_arrays(path, arrays, labels=None, classes=None, normalized=True):
    """Clouds of arrays (n, 3 or more columns), and a label for each, that the file `path` held."""
    if labels is not None:
        labels = np.asarray(labels).reshape(-1)
        _expect(labels.dtype.kind in "iu", "whole labels", f"type {labels.dtype}")
        classes = classes or [f"class {i}" for i in range(labels.max(initial=0) + 1)]
        fits = len(labels) == len(arrays) and np.isin(labels, range(len(classes))).all()
        _expect(fits, f"{len(arrays)} labels below {len(classes)}", f"{len(labels)}: {labels[:9]}")
        labels = torch.from_numpy(labels.astype(np.int64))
    kept, names = [], [f"{Path(path).stem}_{i:05d}" for i in range(len(arrays))]
    for name, array in zip(names, arrays):
        with _naming(f"{path}: {name}"):
            points = _coordinates(array)
        kept.append(points[_kept(len(points))].astype(np.float32))
    points, offsets = torch.from_numpy(np.concatenate(kept)), torch.tensor([0, *map(len, kept)])
    return Clouds(points, offsets.cumsum(0), names, labels, classes or [], normalized=normalized)

# ---- Folders: splits, and a cache ---------------------------------------------------------------
def _files(folder, above=()):
    """All files below a folder, links followed; no hidden ones, no cycles of links."""
    real = os.path.realpath(folder)
    for path in sorted(folder.iterdir()) if real not in above else ():
        if not path.name.startswith("."):
            yield from _files(path, (*above, real)) if path.is_dir() else [path]

def _hold_out(found):
    """Of [(_, file, class or None)] a fixed fifth of each class, or of all if they form no classes:
    at least one, never all of them."""
    labels, held_out = [label for *_, label in found], set()
    together = None in labels or len(set(labels)) == len(labels)
    for group in [None] if together else set(labels):
        names = [name for _, name, label in found if group in (None, label)]
        names.sort(key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        held_out.update(names[:min(max(1, len(names) // 5), len(names) - 1)])
    return held_out

def _list_clouds(root, kinds, labelled=True):
    """[(0 train or 1 test, file, class or None)] of a folder, and notes: see open_dataset."""
    _expect(root.is_dir(), "'synthetic' or a folder", "no such path")
    found, notes, skipped = [], [], 0  # found: (split or None, file, class or None)
    for path in _files(root):
        if path.suffix.lower() == ".txt" and path.is_file() and not holds_points(path):
            skipped += path.name != "classes.txt"
        elif path.suffix.lower() in kinds or not path.exists():  # a dangling link: named when read
            *folders, _ = path.relative_to(root).parts
            split = next((SPLITS[name.lower()] for name in folders if name.lower() in SPLITS), None)
            label = next((name for name in folders if name.lower() not in SPLITS), None)
            found.append((split, path.relative_to(root).as_posix(), label if labelled else None))
    _expect(found, f"files {' '.join(kinds)}", "none")
    if skipped:
        notes.append(f"{skipped} .txt files without points skipped")
    splits = {split for split, _, _ in found}
    if splits == {None}:
        held_out = _hold_out(found)
        notes += ["a fixed fifth is the test set" if held_out else "one cloud to train and test on"]
    else:
        stray = [name for split, name, _ in found if split is None]
        _expect(not stray, "all clouds in train or test folders", ", ".join(stray[:5]))
        test = "test" if "test" in splits else "val"
        _expect(len(splits) > 1 and test in splits, "train and test", f"{min(splits)} alone")
        if "val" in splits:
            notes += ["val is the test set" if test == "val" else "val joins the training set"]
        held_out = {name for split, name, _ in found if split == test}
    return [(int(name in held_out), name, label) for _, name, label in found], notes

def _cached(root, names, cache, read, columns):
    """What `read` gives of all files, rows (T, columns) and offsets (n + 1,), mapped from one file:
    written once, complete or not at all, and again when it is damaged or a file has changed."""
    user = os.path.basename(os.path.expanduser("~"))
    elsewhere = os.path.join(tempfile.gettempdir(), f"clouds-cache-{user}")
    cache = Path(cache or (root if os.access(root, os.W_OK) else elsewhere))
    cache.mkdir(parents=True, exist_ok=True)
    files = [root / name for name in names]
    stats = [file.stat() if file.exists() else None for file in files]
    state = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
    contents = (os.path.realpath(root), columns), (names, state, MAX_POINTS, MESH_POINTS)
    root_id, state_id = (hashlib.sha256(ascii(x).encode()).hexdigest()[:12] for x in contents)
    path = cache / f".clouds-{root_id}-{state_id}.bin"
    size = path.stat().st_size - 8 * (len(names) + 1) if path.is_file() else -1
    offsets = np.fromfile(path, np.int64, offset=size) if size >= 0 else [0]
    if 4 * columns * int(offsets[-1]) != size:
        print(f"reading {len(names)} clouds into {path}, once", file=sys.stderr)
        offsets, broken = [0], []
        with _atomic(path) as file:
            for cloud in files:
                try:
                    rows = read(cloud).astype(np.float32)
                    file.write(rows.tobytes())
                    offsets.append(offsets[-1] + len(rows))
                except ValueError as error:
                    broken.append(str(error))
            if broken:
                raise ValueError("; ".join(broken))
            file.write(np.array(offsets, np.int64).tobytes())
        for earlier in set(cache.glob(f".clouds-{root_id}-*.bin")) - {path}:
            with suppress(OSError):  # gone, or on Windows mapped by another run
                earlier.unlink()
    # mode "c": private to this process, and writable, as torch expects
    rows = np.memmap(path, np.float32, "c", shape=(int(offsets[-1]), columns))
    return torch.from_numpy(rows), torch.as_tensor(offsets)

def _open_files(root, entries, notes=(), cache=None, classes=None, read=_read_stored, columns=3):
    """Dataset of the files [(0 train or 1 test, name, class or None)] below `root`."""
    splits, names, labels = zip(*sorted(entries))  # each split becomes a run of the mapped rows
    num_train = splits.count(0)
    sizes = f"{num_train} and {len(names) - num_train}"
    _expect(0 < num_train < len(names) or len(names) == 1, "clouds to train and to test on", sizes)
    rows, offsets = _cached(root, names, cache, read, columns)
    everything = Clouds(rows[:, :3], offsets, list(names))
    if None not in labels:
        everything.classes = list(classes or sorted(set(labels)))
        unknown = ", ".join(set(labels) - set(everything.classes))
        _expect(not unknown, f"classes {', '.join(everything.classes)}", unknown)
        everything.labels = torch.tensor([everything.classes.index(label) for label in labels])
    elif any(labels):
        notes = [*notes, f"no classes, since {names[labels.index(None)]} is in no class folder"]
    if columns > 3:
        everything.parts = rows[:, 3].long()
        part_names = [] if classes else _label_names(root, int(everything.parts.max()) + 1)
        ranges = [SHAPENET_PARTS[name] for name in everything.classes] or [(0, len(part_names))]
        everything = replace(everything, part_names=part_names, part_ranges=ranges)
    train = everything.select(range(num_train))
    test = everything.select(range(num_train % len(names), len(names)))  # one cloud: that one
    return Dataset(root.absolute().name, train, test, everything, list(notes))

def _open_file(path, **_):
    cloud = replace(_from_arrays(path, [_read_stored(path)]), names=[path.name])
    return Dataset(path.name, cloud, cloud, None, ["one cloud to train and test on"])

def _open_folder(root, cache, **_):
    return _open_files(root, *_list_clouds(root, READERS), cache)._replace(everything=None)

# ---- Published data sets ------------------------------------------------------------------------
def _words(path):
    return " ".join(_lines(path)).split()

def _open_shapenet(root, cache, **_):
    lists = root / "ShapeNet-55" if (root / "ShapeNet-55").is_dir() else root
    entries = []
    for is_test, split in enumerate(("train", "test")):
        names = _words(lists / f"{split}.txt")
        entries += [(is_test, name, name.split("-")[0]) for name in names]
    return _open_files(root / "shapenet_pc", entries, cache=cache)._replace(name="ShapeNet-55")

class _PickledType:
    """In place of a pickled dtype: the flags in a forged one's state crash the interpreter."""
    def __init__(self, code, *_):
        self.dtype = np.dtype(code)
        _expect(self.dtype.kind in "fiub", "an array of numbers", f"type {code!r}")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])

class _PickledArray(np.ndarray):
    def __setstate__(self, state):
        *shape, kind, fortran, data = state
        super().__setstate__((*shape, kind.dtype, fortran, data))

class _Unpickler(pickle._Unpickler):  # in Python: C's takes memory that a file only claims
    """Finds what arrays are made of, by the names of numpy 1 and 2, and nothing else."""
    FOUND = {
        "numpy.dtype": _PickledType,
        "numpy.ndarray": None,  # an argument of _reconstruct alone
        "numpy.core.multiarray._reconstruct": lambda *_: _PickledArray(0),
        "numpy.core.multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.dtype)[0],
        "numpy.core.numeric._frombuffer": lambda data, kind, shape, order:  # protocol 5
            np.frombuffer(data, kind.dtype).reshape(shape, order=order),
        "_codecs.encode": lambda text, _: text.encode("latin-1")}  # bytes in protocols 0 to 2

    def find_class(self, module, name):
        known = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        _expect(known in self.FOUND, "arrays and plain values alone", f"{module}.{name}")
        return self.FOUND[known]

def _read_pickle(path, kind, expected):
    with _naming(path), open(path, "rb") as file:
        content = _Unpickler(file, encoding="latin1").load()
        _expect(isinstance(content, kind) and len(content) == 2, expected, type(content).__name__)
        return content

def read_episode(path, way):
    """(train, test) Clouds of a published few-shot fold of `way` classes, a pickle of {"train":
    [(points, label, class)], "test": [...]}."""
    content = _read_pickle(path, dict, "a dict of train and test")
    classes, splits = [f"class {i}" for i in range(way)], []
    with _naming(path):
        for split in ("train", "test"):
            points, labels, *_ = zip(*content[split])
            splits.append(_from_arrays(path, points, labels, classes))
    return tuple(splits)

def _open_modelnet(root, cache, **_):
    """ModelNet40: two .dat caches, or a text file for each cloud and lists of their names."""
    names, entries, clouds = root / "modelnet40_shape_names.txt", [], []
    classes = _words(names) if names.is_file() else None
    for is_test, split in enumerate(("train", "test")):
        path = root / f"modelnet40_{split}_8192pts_fps.dat"
        if any(root.glob("*_fps.dat")):
            content = _read_pickle(path, (list, tuple), "[clouds, labels]")
            with _naming(path):
                clouds.append(_from_arrays(path, *content, classes))
            continue
        for name in _words(root / f"modelnet40_{split}.txt"):
            label = name.rpartition("_")[0]
            entries.append((is_test, f"{label}/{name}.txt", label))
    dataset = Dataset("", *clouds) if clouds else _open_files(root, entries, (), cache, classes)
    return dataset._replace(name="ModelNet40", everything=None)

def _read_h5(path, is_scan):
    """`data` (clouds, points, 3) and `label` (clouds,) of an HDF5 file."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{path}: expected h5py for .h5 files: pip install h5py") from error
    with _naming(path), h5py.File(path, "r") as file:
        _expect({"data", "label"} <= set(file), "data and label", ", ".join(file) or "nothing")
        classes = SCAN_CLASSES if is_scan else None
        return _from_arrays(path, file["data"][:], file["label"][:], classes, not is_scan)

def _open_h5(path, variant, **_):
    """A train .h5 and the test .h5 beside it; ScanObjectNN's are used as stored, not normalised."""
    split, end = SCAN_FILES[variant]
    folders = (path / "h5_files" / split, path / split, path)
    folder = next(folder for folder in folders if folder.exists())
    found = sorted(folder.glob("*train*.h5")) if path.is_dir() else [path]
    is_scan = any("objectdataset" in file.name for file in found)
    expected = "the train .h5 of one pair"
    if path.is_dir() and (is_scan or folder != path):
        expected = f"{split}/training_{end}.h5 of ScanObjectNN"
        fits = folder.name == split or "main_split" not in folder.name
        found = [file for file in found if fits and file.stem == f"training_{end}"]
    names = ", ".join(file.name for file in found) or f"none in {folder}"
    _expect(len(found) == 1 and "train" in names, expected, names)
    test = found[0].with_name(re.sub("train(ing)?", "test", names))
    splits = [_read_h5(file, is_scan) for file in (found[0], test)]
    classes = max((split.classes for split in splits), key=len)
    name = f"ScanObjectNN ({found[0].stem})" if is_scan else path.stem
    return Dataset(name, *(replace(split, classes=classes) for split in splits))

def _read_labelled(path, columns=None, first=0, last=256):
    """Rows x y z ... label of a .npy or text -> xyz (n, 3) float64, labels (n,) uint8.
    Raises ValueError unless it has `columns` (None: any) and labels from first to last - 1."""
    with _naming(path):
        rows, _ = _read_numpy(path) if path.suffix.lower() == ".npy" else _read_text(path, None)
        xyz, labels = _coordinates(rows), np.array(rows[:, -1])
        wide = rows.shape[1] > 3 and columns in (None, rows.shape[1])
        _expect(wide, f"{columns or '4 or more'} columns, the last a label", rows.shape[1])
        stray = labels[~np.isin(labels, np.arange(first, last))]
        _expect(not len(stray), f"whole labels {first} to {last - 1} in the last column", stray[:5])
        return xyz, labels.astype(np.uint8)

def _read_parts(path, *limits):
    """A labelled cloud as a cache stores it: see _read_stored, with the labels as fourth column."""
    xyz, labels = _read_labelled(path, *limits)
    with _naming(path):
        kept = _kept(len(xyz))
        return np.column_stack([normalize(xyz[kept]), labels[kept]])

def _open_shapenet_part(root, cache, **_):
    """ShapeNetPart; train and val are for training."""
    words, entries = _words(root / "synsetoffset2category.txt"), []
    category_of = dict(zip(words[1::2], words[::2]))
    known = words and len(words) % 2 == 0 and set(category_of.values()) <= set(SHAPENET_PARTS)
    _expect(known, "ShapeNetPart's categories and synsets in synsetoffset2category.txt", words[:8])
    for split in ("train", "val", "test"):
        path = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        with _naming(path):
            for entry in json.loads(path.read_text()):
                synset, model = entry.split("/")[-2:]
                entries.append((int(split == "test"), f"{synset}/{model}.txt", category_of[synset]))

    def read(path):
        return _read_parts(path, 7, *SHAPENET_PARTS[category_of[path.parent.name]])

    dataset = _open_files(root, entries, (), cache, words[::2], read, columns=4)
    return dataset._replace(name="ShapeNetPart", everything=None)

def _label_names(root, count):
    """The lines of classes.txt, if there is one, else "label 0" and so on."""
    path = root / "classes.txt"
    names = _lines(path) if path.is_file() else [f"label {i}" for i in range(count)]
    _expect(len(names) >= count, f"{count} names in classes.txt", len(names))
    return [name.strip() for name in names]

def open_parts(data, cache=None):
    """Part segmentation: 'synthetic', a ShapeNetPart root, or a folder of own labelled clouds.

    These are .npy, .txt, .xyz or .pts files, x y z first and a label last in each row, with the
    splits of open_dataset. They have no classes, and parts named by the lines of classes.txt."""
    if data == "synthetic":
        train, test = synthetic_clouds(50, seed=0), synthetic_clouds(20, seed=1)
        return Dataset("synthetic compositions", compositions(train), compositions(test))
    root = Path(data)
    with _naming(root, (ValueError, OSError)):
        if (root / "synsetoffset2category.txt").is_file():
            return _open_shapenet_part(root, cache)
        found = _list_clouds(root, LABELLED, labelled=False)
        dataset = _open_files(root, *found, cache, read=_read_parts, columns=4)
        return dataset._replace(everything=None)

def _read_room(path, area, *limits):
    xyz, labels = _read_labelled(path, *limits)
    return Room(path.stem, area, (xyz - xyz.min(0)).astype(np.float32), labels)

def open_rooms(data, area=5, density=1200.0):
    """Rooms: 'synthetic' (`density` points per m²), an S3DIS root, or a folder of own rooms.

    Area `area` is the test set. Own rooms, in metres and z up, are files as in open_parts."""
    root, notes = Path(data), [f"area {area} is the test set"]
    with _naming(root, (ValueError, OSError)):
        if data == "synthetic":
            name, classes = "synthetic rooms", ROOM_CLASSES
            rooms = synthetic_rooms([(a, i) for a in range(1, 7) for i in range(1, 4)], density)
        elif any(root.glob("Area_[0-9]*")):
            name, classes = "S3DIS", S3DIS_CLASSES
            files = sorted(root.glob("Area_[0-9]*_*.npy"))
            _expect(files, "Area_N_ROOM.npy of S3DIS, by collect_indoor3d_data.py", "none")
            rooms = [_read_room(file, int(file.stem.split("_")[1]), 7, 0, 13) for file in files]
        else:
            name, area = root.absolute().name, 1
            entries, notes = _list_clouds(root, LABELLED, labelled=False)
            rooms = [_read_room(root / file, is_test) for is_test, file, _ in sorted(entries)]
            classes = _label_names(root, max(int(room.labels.max()) for room in rooms) + 1)
        test = [room for room in rooms if room.area == area or len(rooms) == 1]
        train = [room for room in rooms if room.area != area or len(rooms) == 1]
        areas = sorted({room.area for room in rooms})
        _expect(train and test, "a test area among several", f"area {area} of {areas}")
    return RoomSet(name, train, test, classes, notes)

def _open_blocks(root, area, **_):
    """S3DIS as unlabelled clouds: blocks of 1 m x 1 m with at least 1024 points, z up."""
    rooms, splits = open_rooms(root, area), []
    for split in (rooms.train, rooms.test):
        blocks = []
        for room in split:
            cell = np.floor(room.xyz[:, :2]).astype(np.int64) @ [1 << 20, 1]
            order = np.argsort(cell, kind="stable")
            members = np.split(order, np.flatnonzero(np.diff(cell[order])) + 1)
            blocks += [room.xyz[flat] for flat in members if len(flat) >= 1024]
        _expect(blocks, "blocks of 1024 points or more", "none")
        splits.append(_from_arrays(root, blocks))
    return Dataset("S3DIS", *splits, None, [*rooms.notes, "blocks of 1 m x 1 m"])

DATASETS = [  # (what a root of the layout holds, its reader): the first that fits
    ("shapenet_pc", _open_shapenet), ("modelnet40_*", _open_modelnet), ("h5_files", _open_h5),
    ("main_split*", _open_h5), ("*.h5", _open_h5), ("Area_[0-9]*", _open_blocks),
    ("synsetoffset2category.txt", _open_shapenet_part)]

def open_dataset(data, cache=None, variant="PB_T50_RS", area=5):
    """'synthetic', the root of a published data set, a train .h5, a folder of clouds or one cloud.

    In a folder of clouds sub-folders are classes; train, test and val folders (training, testing,
    valid, validation; in any case), above or below them, are the splits, else a fixed fifth of each
    class is the test set. Clouds are read once, into a file in `cache`, else in the folder itself,
    else, if that cannot be written, in the system's temporary folder.
    variant: of ScanObjectNN, see SCAN_FILES; area: the test area of S3DIS."""
    if data == "synthetic":
        train, test = synthetic_clouds(50, seed=0), synthetic_clouds(20, seed=1)
        return Dataset("synthetic shapes", train, test)
    path, notes = Path(data), []
    with _naming(path, (ValueError, OSError)):
        _expect(path.exists(), "'synthetic', a file or a folder", "no such path")
        readers = [reader for layout, reader in DATASETS if any(path.glob(layout))]
        if path.is_file():
            readers = [_open_h5 if path.suffix == ".h5" else _open_file]
        dataset = [*readers, _open_folder][0](path, cache=cache, variant=variant, area=area)
    for kind, split in (("training", dataset.train), ("test", dataset.test)):
        found = [] if split.labels is None else split.labels.unique().tolist()
        missing = [name for i, name in enumerate(split.classes) if i not in found]
        notes += [f"no {kind} clouds of {', '.join(missing)}"] if missing else []
    return dataset._replace(notes=[*dataset.notes, *notes])

# ---- Synthetic shapes and rooms -----------------------------------------------------------------
def _surface(kind, size, n, rng):
    """(n, 3) points on a box, sphere, torus, cylinder, cone, shade or pyramid of half-sizes `size`;
    its axis is y, or as in "cone_x"."""
    kind, _, axis = kind.partition("_")
    order = {"": [0, 1, 2], "x": [1, 0, 2], "z": [0, 2, 1]}[axis]
    size, t, turn = np.array(size)[order], rng.uniform(-1, 1, n), rng.uniform(0, 2 * np.pi, n)
    ring = np.stack([np.cos(turn), np.sin(turn)])
    if kind == "box":
        points, share = rng.uniform(-1, 1, (n, 3)), np.cumsum(1 / size)  # a face's area: ~ 1 / size
        points[np.arange(n), np.searchsorted(share[:2] / share[2], rng.random(n))] = np.sign(t)
        return (points * size)[:, order]
    if kind == "sphere":
        height, radius = t, np.sqrt(1 - t**2)
    elif kind == "torus":
        height, radius = np.sin(np.pi * t), 1 - size[1] / size[0] * (1 - np.cos(np.pi * t))
    else:
        top = {"cylinder": 1, "shade": 0.5}.get(kind, 0)  # radius there; 1 at the bottom
        cap = rng.random(n) < size[0] / (size[0] + 2 * size[1])
        height = np.where(cap, np.sign(t), t)
        radius = (1 + (top - 1) * (height + 1) / 2) * np.where(cap, np.sqrt(rng.random(n)), 1)
        ring /= np.abs(ring).max(0) if kind == "pyramid" else 1
    return (np.stack([radius * ring[0], height, radius * ring[1]], 1) * size)[:, order]

def _shapes(w, h, d, t, ratio, choice):
    """Category -> [(part, primitive, center, half-sizes)], y up, from half the width, height, depth
    and thickness and two numbers in (0, 1). Proportions overlap: a box may be as flat as a door."""
    mid, r, small = (0, 0, 0), w * (0.4 + 0.6 * ratio), 0.2 + 0.3 * ratio
    s = h * small

    def mirrored(part, kind, x, y, z, size):  # two, or four unless z is 0
        sides = (-1, 1) if z else (1,)
        return [(part, kind, (i * x, y, k * z), size) for i in (-1, 1) for k in sides]

    def legs(part, x, length, z):
        return mirrored(part, "box", x, -length, z, (t, length, t))

    heights = np.linspace(-1, 1, 3 + int(3 * choice))
    boards = [(1, "box", (0, h * y, 0), (r, t / 2, d * 0.3)) for y in heights]
    return dict(
        sphere=[(0, "sphere", mid, (w, w * (0.8 + 0.4 * ratio), w))],
        ellipsoid=[(0, "sphere", mid, (w, h, d))],
        box=[(0, "box", mid, (w, h, d * ratio + t))],
        cylinder=[(0, "cylinder", mid, (r, h, r))],
        cone=[(0, "cone" if choice > 0.3 else "shade", mid, (r, h, r))],
        pyramid=[(0, "pyramid", mid, (w, h, d))],
        torus=[(0, "torus", mid, (w, w * small * 0.7, w))],
        capsule=[(0, "cylinder", mid, (r, h, r)),
                 (1, "sphere", (0, h, 0), (r, r, r)), (1, "sphere", (0, -h, 0), (r, r, r))],
        table=[(0, "box" if choice > 0.3 else "cylinder", mid, (w, t, d)),
               *legs(1, w * small * 1.4, h, d * small * 1.4)],
        desk=[(0, "box", mid, (w, t, d)), (1, "box", (-w * 0.9, -h, 0), (t, h, d * 0.9)),
              (2, "box", (w * 0.6, -h, 0), (w * 0.4 * choice + t, h, d * 0.9))],
        stool=[(0, "cylinder" if choice > 0.4 else "box", mid, (r, t, r)),
               *legs(1, r * 0.6, h * 0.8, r * 0.6)],
        chair=[(0, "box", mid, (r, t, d * 0.6)),
               (1, "box", (0, s * 1.5, -d * 0.6), (r, s * 1.5, t)),
               *legs(2, r * 0.9, h * 0.5, d * 0.5)],
        sofa=[(0, "box", mid, (w, h * 0.3, d * 0.6)),
              (1, "box", (0, s, -d * 0.6), (w, h * 0.5, 2 * t)),
              *mirrored(2, "box", w, h * 0.2, 0, (2 * t, s, d * 0.6))],
        bed=[(0, "box", mid, (r, h * 0.2, d)), (1, "box", (0, s, -d), (r, h * 0.5, t)),
             *legs(2, r * 0.9, h * 0.4 * choice, d * 0.9)],
        bookshelf=[*mirrored(0, "box", r, 0, 0, (t, h, d * 0.3)), *boards],
        door=[(0, "box", mid, (r, h, t)),
              (1, "sphere", (r * 0.8, h * 0.2 * choice, t + 0.05), (t, t, t))],
        lamp=[(0, "cylinder", (0, -h, 0), (w * 0.4, t, w * 0.4)),
              (1, "cylinder", mid, (t / 2, h, t / 2)),
              (2, "shade" if choice > 0.4 else "cone", (0, h, 0), (w * 0.5, s, w * 0.5))],
        mug=[(0, "cylinder", mid, (r, h, r)), (1, "torus_z", (r * 1.1, 0, 0), (s, s, t))],
        bottle=[(0, "cylinder", mid, (r / 2, h, r / 2)),
                (1, "shade", (0, h * 1.2, 0), (r / 2, h * 0.2, r / 2)),
                (2, "cylinder", (0, h * (1.4 + small * choice), 0), (r / 4, s * choice, r / 4))],
        aeroplane=[(0, "sphere", mid, (w * 1.3, t * 2, t * 2)),
                   (1, "box", (w * small, 0, 0), (w * 0.2, t / 4, d)),
                   (2, "box", (-w * 1.1, s / 2, 0), (w * 0.1, s / 2, t / 4))],
        car=[(0, "box", mid, (w, h * 0.2, d * 0.45)),
             (1, "box", (-w * small * 0.5, h * 0.35, 0), (w * 0.5, h * 0.2, d * 0.4)),
             *mirrored(2, "cylinder_z", w * 0.6, -h * 0.2, d * 0.4, (h * 0.2, h * 0.2, t))],
        rocket=[(0, "cylinder", mid, (r / 2, h, r / 2)),
                (1, "cone", (0, h * (1 + small), 0), (r / 2, s, r / 2)),
                (2, "box", (0, -h * 0.8, 0), (t / 4, h * 0.2, r + t / 4)),
                (2, "box", (0, -h * 0.8, 0), (r + t / 4, h * 0.2, t / 4))],
        dumbbell=[(0, "cylinder_x", mid, (w, t, t)), *mirrored(
            1, "sphere" if choice > 0.5 else "cylinder_x", w, 0, 0, (w * small, s, s))])

def synthetic_cloud(name, num_points, rng):
    """A random upright shape of a category: points (num_points, 3) float64, parts (num_points,)."""
    primitives = _shapes(*rng.uniform(0.4, 1, 3), rng.uniform(0.04, 0.1), *rng.random(2))[name]
    sizes = np.array([size for _, _, _, size in primitives])
    # a primitive's share: its area, levelled so that small parts show, times a random density
    density = np.exp(0.4 * rng.normal(size=len(sizes)))
    share = (sizes * np.roll(sizes, 1, 1)).sum(1) ** 0.75 * density
    counts = rng.multinomial(num_points, share / share.sum())
    points = [center + _surface(kind, size, n, rng)
              for n, (_, kind, center, size) in zip(counts, primitives)]
    return np.concatenate(points), np.repeat([part for part, *_ in primitives], counts)

def _scan(name, num_points, rng):
    """A synthetic cloud as a scan might see it, with parts: turned about y, tilted by up to 15
    degrees, denser towards one side, half the time cut away on the far side, with noise."""
    xyz, part = synthetic_cloud(name, 2 * num_points, rng)
    turn, tilt, side = rng.uniform(-np.pi, np.pi), rng.uniform(0, np.pi / 12), rng.normal(size=3)
    for axes, angle in (([0, 2], turn), ([0, 1], tilt)):
        cos, sin = math.cos(angle), math.sin(angle)
        xyz[:, axes] = xyz[:, axes] @ [[cos, -sin], [sin, cos]]
    depth = normalize(xyz) @ (side / np.linalg.norm(side))
    keys = rng.exponential(size=len(xyz)) * np.exp(rng.uniform(0, 1.5) * depth)  # the smallest stay
    if rng.random() < 0.5:
        keys[depth > np.quantile(depth, rng.uniform(0.65, 1))] = np.inf
    kept = np.argpartition(keys, num_points)[:num_points]
    xyz = normalize(xyz[kept])
    return normalize(xyz + 0.02 * rng.normal(size=xyz.shape)), part[kept]

def synthetic_clouds(num_per_class, seed=0, num_points=2048):
    """`num_per_class` scans of each synthetic category, with parts, in the order of the classes.
    Cloud i of class c depends on (seed, c, i) alone."""
    shapes, points, parts, names = _shapes(*[0.5] * 6), [], [], []
    ends = np.cumsum([0] + [1 + shape[-1][0] for shape in shapes.values()]).tolist()  # of the parts
    for c, name in enumerate(shapes):
        for i in range(num_per_class):
            xyz, part = _scan(name, num_points, np.random.default_rng([seed, c, i]))
            points.append(torch.from_numpy(xyz))
            parts.append(torch.from_numpy(part + ends[c]))
            names.append(f"{name}_{seed}_{i:04d}")
    labels = torch.arange(len(shapes)).repeat_interleave(num_per_class)
    offsets, ranges = torch.arange(len(names) + 1) * num_points, list(zip(ends, ends[1:]))
    return Clouds(torch.cat(points), offsets, names, labels, list(shapes), torch.cat(parts), ranges)

def compositions(clouds):
    """The synthetic shapes of several parts, classes and parts renumbered."""
    ranges = torch.tensor(clouds.part_ranges)
    kept = (ranges.diff() > 1).nonzero()[:, 0]  # classes
    parts = torch.cat([torch.arange(*ranges[c]) for c in kept])
    chosen = clouds.select(torch.isin(clouds.labels, kept).nonzero())
    return replace(
        chosen, classes=[clouds.classes[c] for c in kept],
        labels=torch.searchsorted(kept, chosen.labels),
        parts=torch.searchsorted(parts, chosen.parts),
        part_ranges=torch.searchsorted(parts, ranges[kept]).tolist())

def synthetic_room(density, rng):
    """A room, `density` points per m², z up: points (n, 3) float32, labels (n,) uint8 into
    ROOM_CLASSES, and a box (class, lowest corner, highest corner) of each piece of furniture.

    Four to seven pieces stand on the floor, turned; those that would overlap are left out."""
    size, pieces, boxes = np.append(rng.uniform(2.5, 4, 2), rng.uniform(2.3, 2.8)), [], []
    for label, axis, far in ((0, 2, 1), (1, 2, 0), (2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)):
        plane = rng.random((int(density * np.delete(size, axis).prod()), 3)) * size
        plane[:, axis] = far * size[axis]
        pieces.append((label, plane))
    for _ in range(rng.integers(4, 8)):
        label = int(rng.integers(3, len(ROOM_CLASSES)))
        shape, _ = synthetic_cloud(ROOM_CLASSES[label], int(2.5 * density), rng)
        x, z, y = 0.6 * shape.T  # shapes have y up
        turn = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(turn), math.sin(turn)
        xyz = np.stack([cos * x - sin * y, sin * x + cos * y, z], 1)
        xyz -= xyz.min(0)
        free = size - xyz.max(0)
        for _ in range(20 if (free > 0.1).all() else 0):  # tries to place it
            low = np.append(rng.uniform(0.05, free[:2] - 0.05 + 1e-9), 0)
            high = low + xyz.max(0)
            if all((high[:2] < b[:2]).any() or (t[:2] < low[:2]).any() for _, b, t in boxes):
                pieces.append((label, xyz + low))
                boxes.append((label, low, high))
                break
    labels = np.concatenate([np.full(len(xyz), label, np.uint8) for label, xyz in pieces])
    points = np.concatenate([xyz for _, xyz in pieces])
    return (points + 0.01 * rng.normal(size=points.shape)).astype(np.float32), labels, boxes

def synthetic_rooms(numbers, density):
    """Rooms of (area, number) pairs, each of which seeds its room."""
    rooms = [synthetic_room(density, np.random.default_rng(pair)) for pair in numbers]
    return [Room(f"Area_{a}_room_{i}", a, *room) for (a, i), room in zip(numbers, rooms)]

# ---- Augmentation -------------------------------------------------------------------------------
def scale_translate(xyz, generator=None, scale=(2 / 3, 3 / 2), shift=0.2, per_axis=True):
    """Each cloud of xyz (B, N, 3) scaled by U(*scale), for each axis or once, and moved along each
    axis by U(-shift, shift)."""
    B, like = len(xyz), {"generator": generator, "device": xyz.device, "dtype": xyz.dtype}
    factor = torch.rand(B, 1, 3 if per_axis else 1, **like)
    offset = torch.rand(B, 1, 3, **like)
    return xyz * (scale[0] + (scale[1] - scale[0]) * factor) + shift * (2 * offset - 1)

def rotate_y(xyz, generator=None):
    """Each cloud of xyz (B, N, 3) turned about the y axis by an angle of its own, U(0, 2 pi)."""
    random = torch.rand(len(xyz), 1, generator=generator, device=xyz.device, dtype=xyz.dtype)
    angle = 2 * math.pi * random
    cos, sin, (x, y, z) = angle.cos(), angle.sin(), xyz.unbind(2)
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], 2)

# ---- Pictures -----------------------------------------------------------------------------------
# Arrays (H, W, 3) uint8, x to the right and y down.

def write_png(path, image):
    """Writes a (H, W, 3) uint8 image, atomically."""
    assert image.dtype == np.uint8 and image.shape[2:] == (3,), f"{image.shape} {image.dtype}"
    H, W, _ = image.shape
    rows = np.pad(image.reshape(H, 3 * W), ((0, 0), (1, 0))).tobytes()  # filter 0 before each row
    header = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    with _atomic(path) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            checksum = struct.pack(">I", zlib.crc32(name + data))
            file.write(struct.pack(">I", len(data)) + name + data + checksum)

def render(xyz, colors=None, size=320, radius=1.05):
    """A cloud (N, 3) as shaded discs on white, y up, from 35 degrees aside and 20 above
    -> (size, size, 3) uint8. colors: (N, 3) in 0..1, by height if not given. The frame holds the
    ball of `radius` about the origin. Points that are not finite are left out."""
    xyz = np.asarray(xyz, dtype=np.float64)
    level = np.clip(0.5 + xyz[:, 1:2] / radius / 2, 0, 1)
    colors = [0.10, 0.20, 0.52] + level * [0.15, 0.52, 0.34] if colors is None else colors
    xyz, colors = (np.asarray(values)[np.isfinite(xyz).all(axis=1)] for values in (xyz, colors))
    sa, ca, se, ce = 0.5736, 0.8192, 0.3420, 0.9397  # sine and cosine of 35 and of 20 degrees
    x, y, depth = np.array([[ca, 0, -sa], [-se * sa, ce, -se * ca], [ce * sa, se, ce * ca]]) @ xyz.T
    S = 2 * size  # painted at twice the size and averaged: smooth edges
    zoom = 0.97 * S * 2 / np.maximum(4 * radius - depth, radius)  # perspective, from 4 radii away
    pixels = S / 2 + np.stack([-y, x]) * zoom
    row, column = np.rint(np.clip(pixels, -S, 2 * S)).astype(int)[..., None]
    disc = min(max(0.52 * S / math.sqrt(len(xyz) + 1), 1.5), 0.02 * S)  # radius: smaller if many
    grid = np.mgrid[-int(disc):int(disc) + 1, -int(disc):int(disc) + 1]
    dy, dx = grid[:, np.hypot(*grid) <= disc]  # its pixels
    ball = 0.8 * np.sqrt(1 - (dx**2 + dy**2) / disc**2) - (0.35 * dx + 0.5 * dy) / disc
    light = 0.62 + 0.38 * np.clip(ball, 0, 1)[:, None]  # from the upper left
    fade = 0.45 + 0.55 * np.clip(0.5 + depth / radius / 2, 0, 1)[:, None, None]  # pale if far
    colors, canvas = np.clip(colors, 0, 1)[:, None], np.ones((S, S, 3), np.float32)
    # far to near, so that the nearer hides the farther; in parts, to bound the memory
    for part in np.array_split(np.argsort(depth, kind="stable"), len(xyz) // 2**16 + 1):
        rows, columns = row[part] + dy, column[part] + dx  # (n, pixels)
        inside = (rows >= 0) & (rows < S) & (columns >= 0) & (columns < S)
        painted = colors[part] * light * fade[part] + 1 - fade[part]
        canvas[rows[inside], columns[inside]] = painted[inside]
    return (255 * canvas.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))).round().astype(np.uint8)

def palette(n):
    """n distinct colours in a fixed order, (n, 3) in 0..1: ten hues, then darker and lighter."""
    hues = bytes.fromhex("3b6fb6e8833a4a9c5dc94f4f8a63b08c6150d77fb57a7a7ab5aa3c3fb1c0")
    hues = np.frombuffer(hues, np.uint8).reshape(10, 3) / 255
    tier = np.arange(n)[:, None] // 10
    keep = 0.6 ** ((tier + 1) // 2)
    return hues[np.arange(n) % 10] * keep + (1 - keep) * (tier % 2 == 0)

def pca_colors(features):
    """Features [(N, C), ...] -> colours [(N, 3), ...], comparable over the list: its first three
    principal components, 2nd to 98th percentile to 0..1; one without variance gives 0.5."""
    values = np.concatenate([np.asarray(array, np.float64) for array in features])
    _, strength, axes = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    axes = axes[:3][strength[:3] > 1e-9 * np.linalg.norm(values)]
    scores = values @ axes.T * np.sign([axis[abs(axis).argmax()] for axis in axes])  # a fixed sign
    low, high = np.percentile(scores, [2, 98], axis=0)
    scores = np.clip((scores - low) / np.maximum(high - low, 1e-300), 0, 1)
    colors = np.pad(scores, ((0, 0), (0, 3 - len(axes))), constant_values=0.5)
    return np.split(colors, np.cumsum([len(array) for array in features])[:-1])

def write_gallery(path, rows, columns=None):
    """Clouds side by side, as a picture `path`.png and as one coloured cloud `path`.ply.

    rows: equally long lists of (xyz (N, 3), colors (N, 3) in 0..1 or None); columns: clouds to a
    line of the picture, a multiple of their length, if several rows shall share a line."""
    columns, images, placed, painted = columns or len(rows[0]), [], [], []
    for i, (xyz, colors) in enumerate(cloud for row in rows for cloud in row):
        tile = render(xyz, colors)
        images.append(np.pad(tile, ((3, 3), (3, 3), (0, 0)), constant_values=255))
        placed.append(xyz + np.array([2.5 * (i % columns), -2.5 * (i // columns), 0], np.float32))
        painted.append(np.full(xyz.shape, 0.5) if colors is None else colors)
    images += [np.full_like(images[0], 255)] * (-len(images) % columns)
    lines = [np.hstack(images[i:i + columns]) for i in range(0, len(images), columns)]
    write_png(Path(path).with_suffix(".png"), np.vstack(lines))
    colors = np.uint8(255 * np.concatenate(painted))
    write_ply(Path(path).with_suffix(".ply"), np.concatenate(placed), colors)

def write_chart(path, rows):
    """Rows of metrics.jsonl -> .svg: the loss by step and, on the right, a test metric by epoch."""
    text = "<text x='{}' y='{}' text-anchor='{}' fill='{}'>{}</text>".format
    epochs = {row["epoch"]: row for row in rows if "loss" in row}  # the last row has the mean
    steps = [row for row in rows if "loss" in row and row is not epochs[row["epoch"]]]
    tested = set().union(*epochs.values()) & {"cd_l1", "accuracy", "instance_miou", "miou", "ap25"}
    last = max([row["step"] for row in rows], default=1)
    svg = ["<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 640 400' font-size='12'>"
           "<path d='M60 30V350H580V30' fill='none' stroke='gray'/>"]
    svg += [text(60 + 130 * i, 370, "middle", "black", last * i // 4) for i in range(5)]
    sides = (52, "end", "start", "#3b6fb6"), (588, "start", "end", "#c94f4f")
    for name, (x, outward, inward, color) in zip(["loss", *sorted(tested)], sides):
        source = steps if steps and name == "loss" else epochs.values()
        points = [row for row in source if name in row]
        y = np.array([row[name] for row in points] or [0, 1])
        is_log = name == "loss" and 0 < 3 * y.min() < y.max()
        for i, tick in enumerate((np.geomspace if is_log else np.linspace)(y.min(), y.max(), 5)):
            svg.append(text(x, 354 - 80 * i, outward, color, f"{tick:.3g}"))
        svg.append(text(x, 18, inward, color, name + ", logarithmic" if is_log else name))
        y = np.log(y) if is_log else y
        y = 350 - 320 * (y - y.min()) / (np.ptp(y) or 1)
        line = [f"{60 + 520 * row['step'] / last:.1f},{v:.1f}" for row, v in zip(points, y)]
        svg.append(f"<polyline points='{' '.join(line)}' fill='none' stroke='{color}'/>")
    Path(path).write_text("\n".join([*svg, "<text x='320' y='392'>step</text></svg>\n"]))
