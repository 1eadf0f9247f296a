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
import sys
import tempfile
import zlib
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
import torch

MESH_POINTS = 8192  # sampled from a mesh
MAX_POINTS = 16384  # kept of a larger cloud
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+|nan|inf)(?:e[-+]?\d+)?(?![^\s,])"
PLY_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
PLY_TYPES = dict(char="i1", uchar="u1", short="i2", ushort="u2", int="i4", uint="u4", float="f4",
                 double="f8", int8="i1", uint8="u1", int16="i2", uint16="u2", int32="i4",
                 uint32="u4", float32="f4", float64="f8")
SPLIT = re.compile("(train|test|val)(ing|id|idation)?", re.IGNORECASE)  # a folder's name
SCAN_FILES = {  # variant of ScanObjectNN -> its training clouds
    "OBJ_BG": "main_split/training_objectdataset.h5",
    "OBJ_ONLY": "main_split_nobg/training_objectdataset.h5",
    "PB_T50_RS": "main_split/training_objectdataset_augmentedrot_scale75.h5"}
SCAN_CLASSES = ("bag bin box cabinet chair desk display door shelf table bed pillow sink sofa "
                "toilet").split()
SHAPENET_PARTS = dict(  # category -> (first, last + 1) of its parts
    Airplane=(0, 4), Bag=(4, 6), Cap=(6, 8), Car=(8, 12), Chair=(12, 16), Earphone=(16, 19),
    Guitar=(19, 22), Knife=(22, 24), Lamp=(24, 28), Laptop=(28, 30), Motorbike=(30, 36),
    Mug=(36, 38), Pistol=(38, 41), Rocket=(41, 44), Skateboard=(44, 47), Table=(47, 50))
S3DIS_CLASSES = ("ceiling floor wall beam column window door table chair sofa bookcase board "
                 "clutter").split()
ROOM_CLASSES = "ceiling floor wall table chair sofa bed bookshelf lamp".split()

# -- One file -------------------------------------------------------------------------------------
# A reader gives points (n, 3 or more columns) and faces (lists of vertex indices).

def _expect(condition, expected, got):
    if not condition:
        raise ValueError(f"expected {expected}, got {got}")

@contextmanager
def _naming(path):
    """Whatever fails while reading `path` becomes a ValueError of one line that begins with it."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        if not isinstance(error, ValueError):
            message = f"expected readable data, got {type(error).__name__} {message}"
        named = message.startswith((f"{path}:", f"{path}{os.sep}"))
        raise ValueError(message if named else f"{path}: {message}") from error

@contextmanager
def _atomic(path):
    """A binary file that becomes `path` once complete; a failure leaves `path` as it was."""
    part = Path(f"{path}-{os.urandom(4).hex()}.tmp")
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
        size = sum(member.file_size for member in arrays.zip.infolist())
        _expect(size <= max(2**26, 100 * path.stat().st_size), "less packed data", f"{size} bytes")
        names = [name for name in ("points", "xyz", "data", "pos") if name in arrays]
        _expect(names or len(arrays) == 1, "one array, or points, xyz, data or pos", [*arrays][:5])
        return arrays[[*names, *arrays][0]], ()

def _lines(path):
    """The lines of a text that are not blank, without comments (not the // in an .obj's 1//2)."""
    text = path.read_text("utf-8-sig", errors="replace")
    return [line for line in re.sub(r"(#|(?<!\S)//).*", "", text).split("\n") if line.strip()]

def holds_points(path):
    """Whether a line in the first 64 KiB of a text begins with three numbers."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return re.search(rf"(?im)^[ \t]*{NUMBER}([ \t,]+{NUMBER}){{2}}", file.read(2**16))

def _read_text(path, columns=(0, 1, 2)):
    rows = _lines(path)
    if not re.match(rf"(?i)\s*{NUMBER}[\s,]+{NUMBER}", rows[0]):  # number of points, or words
        head = rows.pop(0).strip()
        _expect(not head.isdecimal() or int(head) == len(rows), f"{head} points", len(rows))
    delimiter = "," if "," in rows[-1] else None
    return np.loadtxt(rows, delimiter=delimiter, usecols=columns, ndmin=2), ()

def _read_off(path):
    text = re.sub(r"^\s*[A-Z]*OFF\s*", "", "\n".join(_lines(path)))  # counts may follow at once
    counts, *rows = map(str.split, text.split("\n"))
    vertices, faces = rows[:int(counts[0])], rows[int(counts[0]):int(counts[0]) + int(counts[1])]
    _expect(len(faces) == int(counts[1]), f"{counts[:2]} vertices and faces", f"{len(rows)} lines")
    _expect(all(len(row) > int(row[0]) for row in faces), "all corners of a face", "fewer")
    faces = [np.array(row[1:int(row[0]) + 1], int) for row in faces]  # colours may follow
    return np.array([row[:3] for row in vertices], float), faces

def _read_obj(path):
    vertices, faces = [], []
    for keyword, *words in map(str.split, _lines(path)):
        if keyword == "v":
            vertices.append(words[:3])
        elif keyword == "f":  # words vertex/texture/normal, from 1, or from -1 backwards; 0 is none
            corners = [int(word.split("/")[0]) for word in words]
            faces.append([c - 1 if c > 0 else len(vertices) + c if c else -1 for c in corners])
    return np.array(vertices, float), faces

def _read_ply(path):
    """Vertices come first; faces, if any, next, each of them a list and then perhaps scalars."""
    head, body = re.split(rb"\nend_header[ \t]*\r?\n", path.read_bytes(), maxsplit=1)
    head = re.sub(r"[ \t\r]+", " ", head.decode("latin-1"))
    head = re.sub(r"\n ?(comment|obj_info).*", "", head)
    order = PLY_ORDERS[re.search(r"\nformat (\w+)", head)[1]]
    if order == "=":  # the numbers of a text become a body of doubles
        body = np.array(body.split(), float).tobytes()
    types = {name: np.dtype("f8" if order == "=" else order + kind)
             for name, kind in PLY_TYPES.items()}
    elements = re.findall(r"\nelement (\w+) (\d+)((?:\s+property .*)*)", head)
    (first, count, lines), (second, num_faces, face_lines) = [*elements, ("", 0, "")][:2]
    names = [name for name, _, _ in elements]
    _expect(first == "vertex" and "face" not in names[2:], "vertices, then faces", names)
    fields = [(name, types[kind]) for kind, name in re.findall(r"property (\w+) (\S+)", lines)]
    vertices, faces = np.frombuffer(body, fields, int(count)), []
    offset = vertices.nbytes
    if second == "face":
        ((length, index),) = re.findall(r"^\s*property list (\w+) (\w+)", face_lines)
        scalars = re.findall(r"property (?!list)(\w+)", face_lines)
        tail = sum(types[kind].itemsize for kind in scalars)
        length = types[length]
        for _ in range(int(num_faces)):
            size = int(np.frombuffer(body, length, 1, offset)[0])
            faces.append(np.frombuffer(body, types[index], size, offset + length.itemsize))
            offset += length.itemsize + faces[-1].nbytes + tail
    complete = order != "=" or offset == len(body) or set(names) - {"vertex", "face"}
    _expect(complete, f"{offset // 8} numbers", len(body) // 8)
    return np.stack([vertices[axis] for axis in "xyz"], axis=1), faces

LABELLED = (".npy", ".txt", ".xyz", ".pts")  # forms that may hold a label for each point
READERS = {".npy": _read_numpy, ".npz": _read_numpy, ".ply": _read_ply, ".off": _read_off,
           ".obj": _read_obj, **dict.fromkeys(LABELLED[1:], _read_text)}

def sample_mesh(vertices, faces, num_points, seed=0):
    """Points uniform over the area of a mesh, the same ones for the same `seed`: vertices (V, 3),
    faces: polygons of vertex indices, cut into fans -> (num_points, 3) float64."""
    triangles = [(face[0], *edge) for face in faces for edge in zip(face[1:], face[2:])]
    corners = np.array(triangles, np.int64).reshape(-1, 3)
    low, high = corners.min(initial=0), corners.max(initial=0)
    _expect(0 <= low <= high < len(vertices), f"{len(vertices)} vertices", f"face of {low}, {high}")
    a, b, c = np.moveaxis(np.asarray(vertices, np.float64)[corners], 1, 0)  # (triangles, 3) each
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
    fits = array.ndim == 2 and 3 <= array.shape[1] <= max(3, min(64, len(array)))  # not (3, n)
    got = f"{array.dtype} of shape {array.shape}"
    _expect(fits and array.dtype.kind in "fiub", "numbers of shape (n, 3), up to 64 columns", got)
    points = np.array(array[:, :3], np.float64)
    broken = (~np.isfinite(points)).any(1).sum()
    _expect(not broken, "finite points", f"{broken} of {len(points)} NaN or infinite")
    return points

def _thin(rows):  # at most MAX_POINTS, random, the same places for the same number of rows
    rng = np.random.default_rng(0)
    return rows[rng.choice(len(rows), MAX_POINTS, False)] if len(rows) > MAX_POINTS else rows

def read_points(path):
    """The points of a file, (n, 3) float64 as stored; of a mesh MESH_POINTS of its surface.
    Raises ValueError, also if a coordinate is not finite or all points are equal."""
    path = Path(path)
    with _naming(path):
        suffix = path.suffix.lower()
        _expect(suffix in READERS, " ".join(READERS), suffix or "no suffix")
        points, faces = READERS[suffix](path)
        points = _coordinates(points)
        normalize(points)  # raises if all are equal
        return sample_mesh(points, faces, MESH_POINTS) if len(faces) else points

def _read_labelled(path, first=0, last=256):
    """Rows x y z ... label of a .npy or a text -> xyz (n, 3) float64, labels (n,) uint8, from first
    to last - 1."""
    with _naming(path):
        rows, _ = _read_numpy(path) if path.suffix.lower() == ".npy" else _read_text(path, None)
        xyz, labels = _coordinates(rows), np.asarray(rows[:, -1])
        given = rows.shape[1] > 3  # else the last column is a coordinate
        fits = given & np.isin(labels, np.arange(first, last))
        wanted = f"a last column of labels {first} to {last - 1}"
        _expect(given and fits.all(), wanted, labels[~fits][:9])
        return xyz, labels.astype(np.uint8)

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

def read_cloud(path, points=1024, normalized=True):
    """A file as a model takes it, (n, 3) float32, n <= points, normalised: of more than MAX_POINTS
    a random part, as in a folder's cache, of which the `points` (None: all) farthest are taken."""
    scaled = normalize if normalized else np.float32
    with _naming(path):
        xyz = scaled(_thin(read_points(path)))
    if points is None or len(xyz) <= points:
        return xyz
    return scaled(xyz[farthest_points(xyz, points)])

def write_ply(path, xyz, colors=None, edges=None):
    """xyz (N, 3), colors (N, 3) uint8, edges (E, 2) vertex indices -> a binary .ply."""
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(xyz)}\n"
    head += "property float x\nproperty float y\nproperty float z\n"
    rows = np.ascontiguousarray(xyz, "<f4").view(np.uint8)  # (N, 12)
    if colors is not None:
        head += "property uchar red\nproperty uchar green\nproperty uchar blue\n"
        rows = np.hstack([rows, np.asarray(colors, np.uint8)])
    edges = np.zeros((0, 2)) if edges is None else edges
    head += f"element edge {len(edges)}\nproperty int vertex1\nproperty int vertex2\nend_header\n"
    with _atomic(path) as file:
        file.write(head.encode() + rows.tobytes() + np.asarray(edges, "<i4").tobytes())

# -- Many clouds ----------------------------------------------------------------------------------
Dataset = namedtuple("Dataset", "name train test everything notes", defaults=(None, ()))
RoomSet = namedtuple("RoomSet", "name train test classes notes", defaults=((),))
# z up, in metres: xyz (n, 3) float32, labels (n,) uint8, boxes [(class, lowest, highest corner)]
Room = namedtuple("Room", "name area xyz labels boxes", defaults=((),))

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
        indices = torch.as_tensor(indices).reshape(-1)
        flat = slice(self.offsets[indices[0]], self.offsets[indices[-1] + 1])
        if (indices.diff() != 1).any():
            flat = torch.cat([torch.arange(*self.offsets[i:i + 2]) for i in indices])
        offsets = torch.nn.functional.pad(self.offsets.diff()[indices].cumsum(0), (1, 0))
        labels = None if self.labels is None else self.labels[indices]
        parts = None if self.parts is None else self.parts[flat]
        return replace(self, points=self.points[flat], offsets=offsets, labels=labels, parts=parts,
                       names=[self.names[i] for i in indices])

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

def describe(dataset):
    """One line: name, sizes of the splits, number and names of the classes, notes."""
    source, kind = (dataset, "rooms") if isinstance(dataset, RoomSet) else (dataset.train, "clouds")
    classes = source.classes or source.part_names
    names = f": {', '.join(classes)}" if 0 < len(classes) <= 40 else ""
    sizes = f"{len(dataset.train)} training and {len(dataset.test)} test {kind}"
    return "; ".join([f"{dataset.name}: {sizes}, {len(classes)} classes{names}", *dataset.notes])

def _from_arrays(name, sources, classes=None, normalized=True):
    """Dataset of (file, arrays (n, 3 or more columns), labels or None) for train and test."""
    splits = []
    for path, arrays, labels in sources:
        with _naming(path):
            kept = [torch.from_numpy(_thin(_coordinates(array))).float() for array in arrays]
            if labels is not None:
                labels = np.asarray(labels).reshape(-1)
                known = np.isin(labels, np.arange(len(classes or range(1000)))).all()
                got = f"{len(labels)}: {labels[:9]}"
                _expect(known and len(labels) == len(kept), f"{len(kept)} indices of classes", got)
                labels = torch.from_numpy(labels.astype(np.int64))
            offsets = torch.tensor([0, *map(len, kept)]).cumsum(0)
            names = [f"{path.stem}_{i:05d}" for i in range(len(kept))]
            splits.append(Clouds(torch.cat(kept), offsets, names, labels, normalized=normalized))
    if labels is not None and not classes:
        count = 1 + max(int(split.labels.max()) for split in splits)
        classes = [f"class {i}" for i in range(count)]
    return Dataset(name, *(replace(split, classes=classes or []) for split in splits))

# -- Folders: splits, and a cache -----------------------------------------------------------------
def _files(folder, above=()):  # all below it, links followed; no hidden ones, no cycles of links
    real = os.path.realpath(folder)
    for path in sorted(folder.iterdir()) if real not in above else ():
        if not path.name.startswith("."):
            yield from _files(path, (*above, real)) if path.is_dir() else [path]

def _list_clouds(root, labelled=False):
    """[(0 train or 1 test, file, class or None)] of a folder, and notes: see open_dataset."""
    kinds, found, skipped = LABELLED if labelled else READERS, {}, 0
    for path in _files(root):
        if path.suffix.lower() == ".txt" and path.is_file() and not holds_points(path):
            skipped += path.name != "classes.txt"
        elif path.suffix.lower() in kinds or not path.exists():  # a dangling link: named when read
            *folders, _ = path.relative_to(root).parts
            splits = [match[1].lower() for match in map(SPLIT.fullmatch, folders) if match]
            labels = [folder for folder in folders if not (labelled or SPLIT.fullmatch(folder))]
            found[path.relative_to(root).as_posix()] = (*splits, None)[0], (*labels, None)[0]
    _expect(found, f"files {' '.join(kinds)}", "none")
    notes = [f"{skipped} .txt files without points skipped"] if skipped else []
    splits, labels = zip(*found.values())
    if any(splits):
        stray = [name for name, (split, _) in found.items() if not split]
        _expect(not stray, "all clouds in train or test folders", ", ".join(stray[:5]))
        last = "test" if "test" in splits else "val"
        test = {name for name, (split, _) in found.items() if split == last}
        _expect(0 < len(test) < len(found), "train and test", f"{len(test)} test of {len(found)}")
        if "val" in splits:
            notes.append(f"val {'is the test' if last == 'val' else 'joins the training'} set")
    else:  # by a hash of the name, of each class at least one and never all
        groups, together = {}, None in labels or len(set(labels)) == len(labels)
        for name in sorted(found, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
            groups.setdefault(together or found[name][1], []).append(name)
        sizes = [min(max(1, len(names) // 5), len(names) - 1) for names in groups.values()]
        test = {name for names, size in zip(groups.values(), sizes) for name in names[:size]}
        notes.append("a fixed fifth is the test set" if test else "one cloud to train and test on")
    return [(int(name in test), name, label) for name, (_, label) in found.items()], notes

def _cached(root, names, cache, read, columns):
    """What `read` gives of all files, rows (T, columns) and offsets (n + 1,), mapped from one file,
    which ends in a hash of the files' state: one that does not is written anew, whole or not."""
    elsewhere = Path(tempfile.gettempdir(), "clouds-cache-" + Path(os.path.expanduser("~")).name)
    cache = Path(cache or (root if os.access(root, os.W_OK) else elsewhere))
    cache.mkdir(parents=True, exist_ok=True)
    stats = [os.stat(root / name) if (root / name).exists() else None for name in names]
    stats = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]  # None: named when read
    state = names, stats, MAX_POINTS, MESH_POINTS
    source = os.path.realpath(root), columns
    source, state = (hashlib.sha256(ascii(value).encode()).digest() for value in (source, state))
    path = cache / f".clouds-{source.hex()[:12]}.bin"
    size = path.stat().st_size if path.is_file() else 0
    if size < 32 or np.fromfile(path, np.uint8, offset=size - 32).tobytes() != state:
        print(f"reading {len(names)} clouds into {path}, once", file=sys.stderr)
        offsets, broken = [0], []
        with _atomic(path) as file:
            for name in names:
                try:
                    rows = read(root / name).astype(np.float32)
                    offsets.append(offsets[-1] + file.write(rows.tobytes()) // (4 * columns))
                except ValueError as error:
                    broken.append(str(error))
            if broken:
                raise ValueError("; ".join(broken))
            file.write(np.array(offsets, np.int64).tobytes() + state)
    data = np.memmap(path, np.uint8, "c")  # private to this process, and writable for torch
    rows, offsets, _ = np.split(data, [len(data) - 40 - 8 * len(names), len(data) - 32])
    rows, offsets = rows.view(np.float32).reshape(-1, columns), np.array(offsets).view(np.int64)
    return torch.from_numpy(rows), torch.from_numpy(offsets)

def _open_files(name, root, entries, cache, notes=(), classes=None, read=None, columns=3,
                together=False):
    """Dataset of the files [(0 train or 1 test, file, class or None)] below `root`; `together`:
    with everything, of which stage II takes both lists."""
    splits, files, labels = zip(*sorted(entries))  # each split becomes a run of the mapped rows
    train, count = splits.count(0), len(files)
    _expect(0 < train < count or count == 1, "clouds to train and test on", f"{train} of {count}")
    rows, offsets = _cached(root, files, cache, read or partial(read_cloud, points=None), columns)
    clouds = Clouds(rows[:, :3], offsets, list(files))
    if None not in labels:
        clouds.classes = classes or sorted(set(labels))
        unknown = ", ".join(set(labels) - set(clouds.classes))
        _expect(not unknown, f"classes {', '.join(clouds.classes)}", unknown)
        clouds.labels = torch.tensor([clouds.classes.index(label) for label in labels])
    elif any(labels):
        notes = [*notes, f"no classes, since {files[labels.index(None)]} is in no class folder"]
    if columns > 3:
        clouds.parts = rows[:, 3].long()
        clouds.part_names = [] if classes else _label_names(root, int(clouds.parts.max()))
        ranges = [SHAPENET_PARTS[name] for name in clouds.classes]
        clouds.part_ranges = ranges or [(0, len(clouds.part_names))]
    splits = clouds, clouds
    if count > 1:
        splits = clouds.select(range(train)), clouds.select(range(train, count))
    return Dataset(name, *splits, clouds if together else None, list(notes))

# -- Published data sets --------------------------------------------------------------------------
class _PickledType:
    """In place of a pickled dtype: the flags in a forged one's state crash the interpreter."""
    def __init__(self, code, *_):
        self.dtype = np.dtype(code)
        _expect(self.dtype.kind in "fiub", "arrays of numbers", f"type {code!r}")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])

class _PickledArray(np.ndarray):
    def __setstate__(self, state):
        *shape, kind, fortran, data = state
        super().__setstate__((*shape, kind.dtype, fortran, data))

class _Unpickler(pickle._Unpickler):  # in Python: C's takes memory that a file only claims
    """Knows what arrays are made of, by stand-ins of its own, and nothing else."""
    FOUND = dict(
        dtype=_PickledType, ndarray=None, _reconstruct=lambda *_: _PickledArray(0),
        scalar=lambda kind, data: np.frombuffer(data, kind.dtype)[0],
        _frombuffer=lambda data, kind, shape, order:  # protocol 5
            np.frombuffer(data, kind.dtype).reshape(shape, order=order),
        encode=lambda text, _: text.encode("latin-1"))  # bytes in protocols 0 to 2

    def find_class(self, module, name):
        _expect(name in self.FOUND, "arrays and plain values alone", f"{module}.{name}")
        return self.FOUND[name]

    def load_bytearray8(self):  # Python's own makes one of the size that a file only claims
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}

def _unpickle(path):
    with _naming(path), open(path, "rb") as file:
        data = mmap(file.fileno(), 0, access=ACCESS_READ)  # reads no more
        return _Unpickler(data, encoding="latin1").load()  # of Python 2, too

def read_episode(path, way):
    """(train, test) Clouds of a published few-shot fold of `way` classes, a pickle of {"train":
    [(points, label, class)], "test": [...]}."""
    with _naming(path):
        fold = _unpickle(path)
        sources = [(Path(path), *[*zip(*fold[split])][:2]) for split in ("train", "test")]
        return _from_arrays("", sources, [f"class {i}" for i in range(way)])[1:3]

def _listed(root, pattern):  # (0, name) of each in the list of training clouds, (1, name) of test
    for is_test, split in enumerate(("train", "test")):
        for name in (root / pattern.format(split)).read_text().split():
            yield is_test, name

def _open_shapenet(root, cache, **_):
    lists = root / "ShapeNet-55" if (root / "ShapeNet-55").is_dir() else root
    entries = [(split, name, name.split("-")[0]) for split, name in _listed(lists, "{}.txt")]
    return _open_files("ShapeNet-55", root / "shapenet_pc", entries, cache, together=True)

def _open_modelnet(root, cache, **_):  # two .dat, or a text for each cloud and their names' lists
    names, entries = root / "modelnet40_shape_names.txt", []
    classes = names.read_text().split() if names.is_file() else None
    packed = [root / f"modelnet40_{split}_8192pts_fps.dat" for split in ("train", "test")]
    if packed[0].is_file():
        sources = [(path, *_unpickle(path)) for path in packed]
        _expect([*map(len, sources)] == [3, 3], f"[clouds, labels] in {packed[0].name}", "others")
        return _from_arrays("ModelNet40", sources, classes)
    for is_test, name in _listed(root, "modelnet40_{}.txt"):
        label = name.rpartition("_")[0]
        entries.append((is_test, f"{label}/{name}.txt", label))
    return _open_files("ModelNet40", root, entries, cache, (), classes)

def _open_h5(path, variant, **_):
    """A train .h5 and the test .h5 beside it; ScanObjectNN's are used as stored, not normalised."""
    found = [file for file in _files(path) if file.match("*train*.h5")] if path.is_dir() else [path]
    is_scan, sources = any("objectdataset" in file.name for file in found), []
    if path.is_dir() and is_scan:
        flat = not any("main_split" in str(file.absolute()) for file in found)
        wanted = SCAN_FILES[variant].split("/")[-1] if flat else SCAN_FILES[variant]
        found = [file for file in found if file.absolute().match(wanted)]
    expected = f"one train .h5, or {SCAN_FILES[variant]} of ScanObjectNN"
    names = ", ".join(file.name for file in found) or "none"
    _expect(len(found) == 1 and "train" in names, expected, names)
    for file in (found[0], found[0].with_name(re.sub("train(ing)?", "test", names))):
        with _naming(f"{file} (read by h5py: pip install h5py)"):
            import h5py
            with h5py.File(file, "r") as content:
                sources.append((file, content["data"][:], content["label"][:]))
    name = f"ScanObjectNN ({found[0].stem})" if is_scan else path.stem
    return _from_arrays(name, sources, SCAN_CLASSES if is_scan else None, not is_scan)

def _read_parts(path, *limits):  # as a cache stores it: as read_cloud, labels as fourth column
    with _naming(path):
        xyz, labels = map(_thin, _read_labelled(path, *limits))
        return np.column_stack([normalize(xyz), labels])

def _open_shapenet_part(root, cache, **_):  # train and val are for training
    words, entries = (root / "synsetoffset2category.txt").read_text().split(), []
    categories = dict(zip(words[1::2], words[::2]))
    _expect(words and set(words[::2]) <= set(SHAPENET_PARTS), "synsets of categories", words[:8])
    for split in ("train", "val", "test"):
        listed = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        with _naming(listed):
            for entry in json.loads(listed.read_text()):
                synset, model = entry.split("/")[-2:]
                entries.append((int(split == "test"), f"{synset}/{model}.txt", categories[synset]))

    def read(path):
        return _read_parts(path, *SHAPENET_PARTS[categories[path.parent.name]])

    return _open_files("ShapeNetPart", root, entries, cache, (), words[::2], read, columns=4)

def _label_names(root, last):
    """The lines of classes.txt, if there is one, else "label 0" and so on, for labels to `last`."""
    path = root / "classes.txt"
    names = _lines(path) if path.is_file() else [f"label {i}" for i in range(last + 1)]
    _expect(len(names) > last, f"{last + 1} names in classes.txt", len(names))
    return [name.strip() for name in names]

def open_parts(data, cache=None):
    """Part segmentation: 'synthetic', a ShapeNetPart root, or a folder of own labelled clouds.

    These are .npy, .txt, .xyz or .pts files, x y z first and a label last in each row, with the
    splits of open_dataset. They have no classes, and parts named by the lines of classes.txt."""
    if data == "synthetic":
        train, test = synthetic_clouds(50, seed=0), synthetic_clouds(20, seed=1)
        return Dataset("synthetic compositions", compositions(train), compositions(test))
    root = Path(data)
    with _naming(root):
        if (root / "synsetoffset2category.txt").is_file():
            return _open_shapenet_part(root, cache)
        entries, notes = _list_clouds(root, labelled=True)
        name = root.absolute().name
        return _open_files(name, root, entries, cache, notes, None, _read_parts, columns=4)

def _read_room(path, area, *limits):
    xyz, labels = _read_labelled(path, *limits)
    return Room(path.stem, area, (xyz - xyz.min(0)).astype(np.float32), labels)

def open_rooms(data, area=5, density=1200.0):
    """Rooms: 'synthetic' (`density` points per m²), an S3DIS root, or a folder of own rooms.

    Area `area` is the test set. Own rooms, in metres and z up, are files as in open_parts."""
    root, notes = Path(data), [f"area {area} is the test set"]
    with _naming(root):
        if data == "synthetic":
            name, classes = "synthetic rooms", ROOM_CLASSES
            rooms = synthetic_rooms([(a, i) for a in range(1, 7) for i in range(1, 4)], density)
        elif any(root.glob("Area_[0-9]*")):
            name, classes = "S3DIS", S3DIS_CLASSES
            files = sorted(root.glob("Area_[0-9]*_*.npy"))  # made by collect_indoor3d_data.py
            rooms = [_read_room(file, int(file.stem.split("_")[1]), 0, 13) for file in files]
        else:
            name, area = root.absolute().name, 1
            entries, notes = _list_clouds(root, labelled=True)
            rooms = [_read_room(root / file, is_test) for is_test, file, _ in sorted(entries)]
            classes = _label_names(root, max(int(room.labels.max()) for room in rooms))
        test = [room for room in rooms if room.area == area or len(rooms) == 1]
        train = [room for room in rooms if room.area != area or len(rooms) == 1]
        expected = f"rooms of {name} (Area_5_office_1.npy) in area {area} and in others"
        _expect(train and test, expected, [room.name for room in rooms][:5])
    return RoomSet(name, train, test, classes, notes)

def _open_blocks(root, area, **_):
    """S3DIS as unlabelled clouds: blocks of 1 m x 1 m with at least 1024 points, z up."""
    rooms, sources = open_rooms(root, area), []
    for split in (rooms.train, rooms.test):
        blocks = []
        for room in split:
            cell = np.floor(room.xyz[:, :2]).astype(np.int64) @ [1 << 20, 1]
            blocks += [room.xyz[cell == chosen] for chosen in np.unique(cell)]
        sources.append((root, [block for block in blocks if len(block) >= 1024], None))
        _expect(sources[-1][1], "blocks of 1024 points or more", "none")
    dataset = _from_arrays("S3DIS", sources)
    return dataset._replace(notes=[*rooms.notes, "blocks of 1 m x 1 m"])

def _open_clouds(path, cache, **_):
    if path.is_dir():
        entries, notes = _list_clouds(path)
        return _open_files(path.absolute().name, path, entries, cache, notes)
    xyz = torch.from_numpy(read_cloud(path, None))
    cloud = Clouds(xyz, torch.tensor([0, len(xyz)]), [path.name])
    return Dataset(path.name, cloud, cloud, None, ["one cloud to train and test on"])

DATASETS = [  # (the name of something in a root of the layout, its reader): the first that fits
    ("^shapenet_pc$", _open_shapenet), ("^modelnet40_", _open_modelnet),
    (r"^h5_files$|^main_split|\.h5$", _open_h5), (r"^Area_\d", _open_blocks),
    ("^synsetoffset2category.txt$", _open_shapenet_part), ("", _open_clouds)]

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
    with _naming(path):
        _expect(path.exists(), "'synthetic', a file or a folder", "no such path")
        names = "\n".join(os.listdir(path) if path.is_dir() else [path.suffix])
        readers = [reader for layout, reader in DATASETS if re.search(layout, names, re.MULTILINE)]
        dataset = readers[0](path, cache=cache, variant=variant, area=area)
    for kind, split in (("training", dataset.train), ("test", dataset.test)):
        found = [] if split.labels is None else split.labels.unique().tolist()
        missing = [name for i, name in enumerate(split.classes) if i not in found]
        notes += [f"no {kind} clouds of {', '.join(missing)}"] if missing else []
    return dataset._replace(notes=[*dataset.notes, *notes])

# -- Synthetic shapes and rooms -------------------------------------------------------------------
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
        signs = [(i, k) for i in (-1, 1) for k in (-1, 1) if z or k > 0]
        return [(part, kind, (i * x, y, k * z), size) for i, k in signs]

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
    parts, kinds, centers, sizes = zip(*primitives)
    # a primitive's share: its area, levelled so that small parts show, times a random density
    density = np.exp(0.4 * rng.normal(size=len(sizes)))
    share = (np.array(sizes) * np.roll(sizes, 1, 1)).sum(1) ** 0.75 * density
    counts = rng.multinomial(num_points, share / share.sum())
    points = [_surface(kind, size, n, rng) for kind, size, n in zip(kinds, sizes, counts)]
    return np.concatenate(points) + np.repeat(centers, counts, axis=0), np.repeat(parts, counts)

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
    shapes, scans, names = _shapes(*[0.5] * 6), [], []
    ends = np.cumsum([0] + [1 + shape[-1][0] for shape in shapes.values()]).tolist()  # of the parts
    for c, name in enumerate(shapes):
        for i in range(num_per_class):
            xyz, part = _scan(name, num_points, np.random.default_rng([seed, c, i]))
            scans.append((xyz, part + ends[c]))
            names.append(f"{name}_{seed}_{i:04d}")
    points, parts = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*scans))
    labels = torch.arange(len(shapes)).repeat_interleave(num_per_class)
    offsets, ranges = torch.arange(len(names) + 1) * num_points, list(zip(ends, ends[1:]))
    return Clouds(points, offsets, names, labels, list(shapes), parts, ranges)

def compositions(clouds):
    """The synthetic shapes of several parts, classes and parts renumbered."""
    ranges = torch.tensor(clouds.part_ranges)
    kept = (ranges.diff() > 1).nonzero()[:, 0]  # classes
    parts = torch.cat([torch.arange(*ranges[c]) for c in kept])
    chosen = clouds.select(torch.isin(clouds.labels, kept).nonzero())
    chosen.classes = [clouds.classes[c] for c in kept]
    chosen.labels = torch.searchsorted(kept, chosen.labels)
    chosen.parts = torch.searchsorted(parts, chosen.parts)
    chosen.part_ranges = torch.searchsorted(parts, ranges[kept]).tolist()
    return chosen

def _room(area, number, density):
    """Four to seven pieces of furniture stand on the floor, turned; those that would overlap are
    left out. The pair of numbers seeds the room."""
    rng = np.random.default_rng((area, number))
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
    labels, points = zip(*pieces)
    labels, xyz = np.repeat(np.uint8(labels), [*map(len, points)]), np.concatenate(points)
    xyz = (xyz + 0.01 * rng.normal(size=xyz.shape)).astype(np.float32)
    return Room(f"Area_{area}_room_{number}", area, xyz, labels, boxes)

def synthetic_rooms(numbers, density):
    """Rooms of (area, number) pairs, each of which seeds its room: `density` points per m², z up,
    labels into ROOM_CLASSES, a box of each piece of furniture."""
    return [_room(*pair, density) for pair in numbers]

# -- Augmentation ---------------------------------------------------------------------------------
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

# -- Pictures -------------------------------------------------------------------------------------
def write_png(path, image):
    """An image (H, W, 3) uint8, x to the right and y down."""
    H, W, _ = image.shape
    rows = np.pad(image.reshape(H, 3 * W), ((0, 0), (1, 0))).tobytes()  # filter 0 before each row
    header = np.array([W, H], ">u4").tobytes() + bytes([8, 2, 0, 0, 0])  # 8 bits a channel, RGB
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"):
        png += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    with _atomic(path) as file:
        file.write(png)

def render(xyz, colors=None, size=320):
    """A cloud (N, 3) as discs on white, the nearer before the farther and paler ones, y up, from
    35 degrees aside and 20 above; the frame holds the unit ball -> (size, size, 3) uint8.
    colors: (N, 3) in 0..1, by height if not given. Points that are not finite are left out."""
    xyz = np.asarray(xyz, np.float64)
    level = np.clip(0.5 + xyz[:, 1:2] / 2, 0, 1)
    colors = [0.10, 0.20, 0.52] + level * [0.15, 0.52, 0.34] if colors is None else colors
    xyz, colors = (np.asarray(values)[np.isfinite(xyz).all(1)] for values in (xyz, colors))
    sa, ca, se, ce = 0.5736, 0.8192, 0.3420, 0.9397  # sine and cosine of 35 and of 20 degrees
    x, y, z = np.array([[ca, 0, -sa], [-se * sa, ce, -se * ca], [ce * sa, se, ce * ca]]) @ xyz.T
    order = np.argsort(z)  # far to near
    S = 2 * size  # painted at twice the size and averaged: smooth edges
    pixels = np.clip(S / 2 + 0.46 * S * np.stack([-y, x]), -S, 2 * S)[:, order, None]
    disc = np.clip(0.52 * S / math.sqrt(len(xyz) + 1), 1.5, 0.02 * S)  # radius: smaller if many
    grid = np.mgrid[-disc:disc + 1, -disc:disc + 1].reshape(2, 1, -1)
    rows, columns = np.rint(pixels + grid[:, :, np.hypot(*grid)[0] <= disc]).astype(int)
    fade = (0.45 + 0.55 * np.clip(0.5 + z / 2, 0, 1))[:, None]
    painted = (np.clip(colors, 0, 1) * fade + 1 - fade)[order, None].repeat(rows.shape[1], 1)
    inside = (rows >= 0) & (rows < S) & (columns >= 0) & (columns < S)
    canvas = np.ones((S, S, 3))
    canvas[rows[inside], columns[inside]] = painted[inside]
    return (255 * canvas.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))).round().astype(np.uint8)

def palette(n):
    """n distinct colours in a fixed order, (n, 3) in 0..1: ten hues, then darker and lighter."""
    hues = bytes.fromhex("3b6fb6e8833a4a9c5dc94f4f8a63b08c6150d77fb57a7a7ab5aa3c3fb1c0")
    tier = np.arange(n)[:, None] // 10
    keep = 0.6 ** ((tier + 1) // 2)
    hues = np.frombuffer(hues, np.uint8).reshape(10, 3)[np.arange(n) % 10] / 255
    return hues * keep + (1 - keep) * (tier % 2 == 0)

def pca_colors(features):
    """Features [(N, C), ...] -> colours [(N, 3), ...], comparable over the list: its first three
    principal components, 2nd to 98th percentile to 0..1."""
    values = np.concatenate([np.asarray(array, np.float64) for array in features])
    _, _, axes = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    axes = [axis * np.sign(axis[abs(axis).argmax()]) for axis in axes[:3]]  # a fixed sign
    scores = values @ np.transpose(axes)
    low, high = np.percentile(scores, [2, 98], axis=0)
    colors = np.clip((scores - low) / np.maximum(high - low, 1e-9), 0, 1)
    colors = np.pad(colors, ((0, 0), (0, 3 - len(axes))), constant_values=0.5)
    return np.split(colors, np.cumsum([len(array) for array in features])[:-1])

def write_gallery(path, rows, columns=None):
    """Clouds side by side, as a picture `path`.png and as one coloured cloud `path`.ply.

    rows: equally long lists of (xyz (N, 3), colors (N, 3) in 0..1 or None); columns: clouds to a
    line of the picture, a multiple of their length, if several rows shall share a line."""
    columns, clouds = columns or len(rows[0]), [cloud for row in rows for cloud in row]
    tiles, placed, painted, border = [], [], [], ((3, 3), (3, 3), (0, 0))
    for i, (xyz, colors) in enumerate(clouds):
        tiles.append(np.pad(render(xyz, colors), border, constant_values=255))
        placed.append(xyz + np.array([2.5 * (i % columns), -2.5 * (i // columns), 0], np.float32))
        painted.append(np.full(xyz.shape, 0.5) if colors is None else colors)
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    lines = [np.hstack(tiles[i:i + columns]) for i in range(0, len(tiles), columns)]
    write_png(Path(path).with_suffix(".png"), np.vstack(lines))
    colors = np.uint8(255 * np.concatenate(painted))
    write_ply(Path(path).with_suffix(".ply"), np.concatenate(placed), colors)

def write_chart(path, rows):
    """Rows of metrics.jsonl -> .svg: the loss by step and, on the right, a test metric by epoch."""
    text = "<text x='{}' y='{}' text-anchor='{}' fill='{}'>{}</text>".format
    rows = [row for row in rows if "loss" in row]
    epochs = {row["epoch"]: row for row in rows}  # the last row has the mean
    steps = [row for row in rows if row is not epochs[row["epoch"]]]
    tested = set().union(*epochs.values()) & {"cd_l1", "accuracy", "instance_miou", "miou", "ap25"}
    last = max([row["step"] for row in rows], default=1)
    svg = ["<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 640 400' font-size='12'>"
           "<path d='M60 30V350H580V30' fill='none' stroke='gray'/>"]
    svg += [text(60 + 130 * i, 370, "middle", "black", last * i // 4) for i in range(5)]
    sides = (52, "end", "#3b6fb6"), (588, "start", "#c94f4f")
    for name, (x, anchor, color) in zip(["loss", *sorted(tested)], sides):
        source = steps if steps and name == "loss" else epochs.values()
        points = [row for row in source if name in row]
        y = np.array([row[name] for row in points] or [0, 1])
        ticks = [f"{tick:.3g}" for tick in np.linspace(y.min(), y.max(), 5)] + [name]
        svg += [text(x, max(16, 354 - 80 * i), anchor, color, t) for i, t in enumerate(ticks)]
        y = 350 - 320 * (y - y.min()) / (np.ptp(y) or 1)
        line = [f"{60 + 520 * row['step'] / last:.1f},{v:.1f}" for row, v in zip(points, y)]
        svg.append(f"<polyline points='{' '.join(line)}' fill='none' stroke='{color}'/>")
    Path(path).write_text("\n".join([*svg, "<text x='320' y='392'>step</text></svg>\n"]))
