"""Point clouds as data: reading, folders, embedded shapes, augmentation, pictures."""

import hashlib
import io
import math
import os
import re
import struct
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from act import whole_file


# ---------------------------------------------------------------------------------------------------------------------
# Clouds: reading one, folders of them, the embedded shapes, augmentation. Nothing a file holds is ever executed, and a
# size it claims is held against its length before memory is taken. A reader turns a file's bytes into points (n, C) and
# faces (polygons of vertex indices); read_points puts the file's name before what it raises.
# ---------------------------------------------------------------------------------------------------------------------

MESH_POINTS, CACHE_POINTS = 8192, 16384  # points drawn from a mesh; the most that a folder keeps of one cloud
ARRAY_NAMES = ("points", "xyz", "data", "pos")
# what broken files make struct, zipfile, zlib and h5py raise (RuntimeError: an encrypted member, HDF5's own errors)
BROKEN = (OSError, EOFError, OverflowError, RuntimeError, LookupError, struct.error, zipfile.BadZipFile, zlib.error)


def _pick_array(sizes):
    """Of the arrays {name: (bytes, bytes packed)}, one with a name we know, or the only one, unless it is a bomb."""
    names = [name for name in ARRAY_NAMES if name in sizes] or list(sizes)
    if not names or (len(names) > 1 and names[0] not in ARRAY_NAMES):
        found = ", ".join(map(str, names[:5])) or "none"  # HDF5 gives bytes where a name is no text
        raise ValueError(f"expected an array named {', '.join(ARRAY_NAMES)}, found {found}")
    size, packed = sizes[names[0]]
    if size > max(2 ** 26, 100 * packed):
        raise ValueError(f"array {names[0]} claims {size} bytes, packed into {packed}")
    return names[0]


def _read_npy(data):
    """The header is searched for its three fields, never evaluated."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise ValueError("not a .npy array")
    start = 10 + struct.unpack_from("<H", data, 8)[0] if data[6] == 1 else 12 + struct.unpack_from("<I", data, 8)[0]
    header = data[:min(start, 10_000)].decode("latin-1")
    fields = re.search(r"'descr': *('[^']*'), *'fortran_order': *(True|False), *'shape': *\(([\d, ]*)\)", header)
    kind, fortran, shape = fields.groups() if fields else ("unknown", "", "")
    if not re.fullmatch(r"'[<>=|]?(f[248]|[iu][1248]|b1)'", kind):
        raise ValueError(f"expected an array of numbers, found type {kind}; Python objects are never loaded")
    kind, shape = np.dtype(kind[1:-1]), [int(size) for size in shape.split(",") if size.strip()]
    claimed, held = math.prod(shape) * kind.itemsize, max(0, len(data) - start)
    if claimed > held:
        raise ValueError(f"the header promises {claimed} bytes of points, the file holds {held}")
    return np.frombuffer(data, kind, math.prod(shape), start).reshape(shape, order="CF"[fortran == "True"]), ()


def _read_npz(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        packings = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # numpy's two
        members = [m for m in archive.infolist() if m.filename.endswith(".npy") and m.compress_type in packings]
        sizes = {member.filename[:-4]: (member.file_size, min(member.compress_size, len(data))) for member in members}
        return _read_npy(archive.read(_pick_array(sizes) + ".npy"))


def _read_h5(data):
    try:
        import h5py
    except ImportError as error:
        raise ValueError("reading .h5 needs h5py: pip install h5py") from error
    with h5py.File(io.BytesIO(data), "r") as file:
        arrays = [item for item in file.items() if isinstance(item[1], h5py.Dataset) and item[1].dtype.kind in "fiub"]
        sizes = {name: (array.nbytes, min(array.id.get_storage_size(), len(data))) for name, array in arrays if array.shape}
        return file[_pick_array(sizes)][:], ()


def _lines(data, comment="#"):
    """The lines of a text that are not blank, without comments: [(number, line)]."""
    text = re.sub("\r\n?", "\n", data.decode("utf-8-sig", "replace"))
    lines = re.sub(f"({comment}).*", "", text).split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _row(number, line, wanted=3, kind=float):
    """The first `wanted` numbers of line `number`."""
    try:
        row = [kind(word) for word in line.split()[:wanted]]
    except ValueError:
        row = []  # named below, as a line too short is
    if len(row) < wanted:
        raise ValueError(f"line {number}: expected {wanted} numbers, found {line.strip()[:60]!r}")
    return row


def _numbers(rows, columns=3):
    """The numbers of [(line number, line, how many numbers if not 3)], (n, columns)."""
    return np.fromiter((value for row in rows for value in _row(*row)), float).reshape(-1, columns)


def _read_text(data):
    """A point a line, commas or blanks between its columns; the first line may be a header of words or the count."""
    lines = _lines(data.replace(b",", b" "), "#|//")
    header = re.fullmatch(r"\s*(?:(\d{1,18})|(?!nan\b|inf\b)[_A-Z].*)\s*", lines[0][1] if lines else "", re.IGNORECASE)
    points = _numbers(lines[1:] if header else lines)
    if header and header[1] and int(header[1]) != len(points):
        raise ValueError(f"the first line promises {int(header[1])} points, the file holds {len(points)}")
    return points, ()


def _read_off(data):
    (number, first), *lines = _lines(data) or [(1, "")]
    keyword, counts = re.fullmatch(r"\s*([A-Z]{0,4}OFF)?(.*)", first).groups()
    lines = [(number, counts), *lines] if counts.strip() else lines  # the counts may be glued to the keyword
    if not keyword or not lines:
        raise ValueError("expected OFF and the counts of vertices and faces at the start of the file")
    num_vertices, num_faces = _row(*lines.pop(0), 2, int)
    if min(num_vertices, num_faces) < 0 or num_vertices + num_faces > len(lines):
        raise ValueError(f"promises {num_vertices} vertices and {num_faces} faces, {len(lines)} lines follow")
    vertices, faces = lines[:num_vertices], lines[num_vertices:num_vertices + num_faces]
    return _numbers(vertices), [_row(*face, 1 + max(0, *_row(*face, 1, int)), int)[1:] for face in faces]


def _read_obj(data):
    vertices, faces = [], []
    for number, line in _lines(data):
        keyword, rest, *_ = *line.split(maxsplit=1), ""
        if keyword == "v":
            vertices.append((number, rest))
        elif keyword == "f":
            corners = re.sub(r"/\S*", "", rest)  # a/b/c: vertex, texture, normal
            corners = _row(number, corners, max(3, len(corners.split())), int)
            # from 1, or negative: counted from the last vertex so far
            faces.append([corner - 1 if corner > 0 else corner + len(vertices) if corner else -1 for corner in corners])
    return _numbers(vertices), faces


PLY_TYPES = dict(zip("char uchar short ushort int uint float double int8 uint8 int16 uint16 int32 uint32 float32 float64".split(),
                     "bBhHiIfdbBhHiIfd"))  # as struct and numpy call them


def _ply_rows(data, offset, count, properties):
    """`count` rows of an element from byte `offset` -> ({property: its values, row by row}, the offset behind them)."""
    if all(len(kinds) == 1 for _, kinds in properties):
        rows = np.frombuffer(data, [(name, kind) for name, (kind,) in properties], count, offset)
        return {name: rows[name] for name in rows.dtype.names}, offset + rows.nbytes
    columns = {name: [] for name, _ in properties}
    for _ in range(count):
        for name, kinds in properties:
            values = (1,)
            for kind in kinds:  # of a list: its length, then as many values
                form = f"{kind[0]}{int(values[0])}{kind[1]}"
                values = struct.unpack_from(form, data, offset)
                offset += struct.calcsize(form)
            columns[name].append(values)
    return columns, offset


def _read_ply(data):
    header = re.match(rb"ply\s.*?\nend_header[ \t]*(\r?\n|$)", data, re.DOTALL)
    if not header:
        raise ValueError("expected a PLY header, from 'ply' to 'end_header'")
    lines, offset, order, elements = header[0].decode("latin-1").split("\n"), header.end(), None, []
    for number, line in enumerate(lines, 1):
        keyword, *words = line.split() or [""]
        try:
            if keyword == "format":
                order = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}[words[0]]
            elif keyword == "element":  # (name, count, [(property, [type] or [type of its length, type])])
                elements.append((words[0], max(0, int(words[1])), []))
            elif keyword == "property":
                kinds, name = (words[1:3], words[3]) if words[0] == "list" else (words[:1], words[1])
                kinds = [order + PLY_TYPES[kind] for kind in kinds]
                elements[-1][2].append((name, ["=d"] * len(kinds) if order == "=" else kinds))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"line {number}: not a line of a PLY header: {line.strip()[:60]!r}") from error
    if order == "=":  # the numbers of a text become a file of doubles, read like any other
        rows = [(number, line, len(line.split())) for number, line in _lines(data) if number >= len(lines)]
        data, offset = _numbers(rows, 1).tobytes(), 0
    found = {"vertex": {}, "face": {}}
    for name, count, properties in elements:
        try:
            found[name], offset = _ply_rows(data, offset, count, properties)
        except (ValueError, OverflowError, struct.error) as error:
            raise ValueError(f"promises {count} rows of {name!r}, the file ends before that or its lists are broken") from error
    vertex, face = found["vertex"], found["face"]
    if not set("xyz") <= set(vertex):
        raise ValueError(f"expected a vertex with x, y and z, found {', '.join(vertex) or 'none'}")
    points = np.stack([np.asarray(vertex[axis], np.float64).reshape(-1) for axis in "xyz"], 1)
    return points, face.get("vertex_indices", face.get("vertex_index", ()))


READERS = {".npy": _read_npy, ".npz": _read_npz, ".ply": _read_ply, ".off": _read_off, ".obj": _read_obj, ".xyz": _read_text,
           ".txt": _read_text, ".pts": _read_text, ".h5": _read_h5}


def sample_mesh(vertices, faces, num_points, seed=0):
    """Points drawn uniformly over the area of a mesh, the same for the same `seed`.

    vertices (V, 3), faces: polygons of vertex indices, each cut into a fan of triangles -> (num_points, 3) float64.
    Raises ValueError where a face names a vertex that is not there, or the faces have no area.
    """
    triangles = [(face[0], *edge) for face in faces for edge in zip(face[1:], face[2:])]
    corners = np.array(triangles, np.int64).reshape(-1, 3)
    if corners.size and not 0 <= corners.min() <= corners.max() < len(vertices):
        raise ValueError(f"the faces name vertices {corners.min()} to {corners.max()} (from 0), the mesh has {len(vertices)}")
    a, b, c = np.moveaxis(np.asarray(vertices, np.float64)[corners], 1, 0)  # (T, 3) each
    with np.errstate(over="ignore", invalid="ignore"):
        area = np.cumsum(np.linalg.norm(np.cross(b - a, c - a), axis=1))
    if not len(area) or not 0 < area[-1] < math.inf:
        raise ValueError("the faces of the mesh have no area")
    rng = np.random.default_rng(seed)
    pick = np.minimum(np.searchsorted(area, rng.uniform(0, area[-1], num_points), side="right"), len(area) - 1)
    u, v = rng.random((2, num_points, 1))
    u, v = np.where(u + v > 1, (1 - u, 1 - v), (u, v))  # the far half of the parallelogram folds back onto the triangle
    return a[pick] + u * (b - a)[pick] + v * (c - a)[pick]


def read_points(path):
    """The points of a file, (n, 3) float64 as stored; a mesh gives MESH_POINTS of its surface.

    Raises ValueError, one line that begins with the file's name, also where a coordinate is not finite or all are the same.
    """
    path, kind = os.fspath(path), os.path.splitext(path)[1].lower()
    try:
        if kind not in READERS:
            raise ValueError(f"unknown extension {kind!r}, expected one of {' '.join(READERS)}")
        if not os.path.isfile(path):
            raise ValueError("no such file")
        with open(path, "rb") as file:
            points, faces = READERS[kind](file.read())
        if points.ndim != 2 or not 3 <= points.shape[1] <= 64:
            raise ValueError(f"expected an array of shape (n, 3), up to 64 columns, found {points.shape}")
        points = np.ascontiguousarray(points[:, :3], dtype=np.float64)
        finite = np.isfinite(points).all(1)
        if not finite.all():
            raise ValueError(f"{(~finite).sum()} of {len(points)} points are NaN or infinite")
        normalize(points)  # raises where all are the same
        return sample_mesh(points, faces, MESH_POINTS) if len(faces) else points
    except (ValueError, *BROKEN) as error:
        message = " ".join(str(error).split())
        message = message if isinstance(error, ValueError) else f"broken {kind} file ({message})"
        raise ValueError(f"{path}{', ' if message.startswith('line ') else ': '}{message}") from error


def normalize(points):
    """Centroid to 0, farthest point to radius 1, in float64: (n, 3) -> (n, 3) float32. Raises ValueError unless two differ."""
    points = np.asarray(points, np.float64)
    if len(points) == 0 or (points == points[0]).all():
        raise ValueError(f"expected at least two different points, found {len(points)} at one place")
    points = points / np.abs(points).max()  # so that no square overflows
    points = points - points.mean(0)
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


def read_cloud(path):
    """One file (see read_points) as a normalised cloud, (N, 3) float32 numpy array."""
    return normalize(read_points(path))


def write_ply(path, xyz, colors=None):
    """xyz (N, 3), colors (N, 3) uint8 or None -> a binary little-endian .ply."""
    names = ["float x", "float y", "float z"] + (["uchar red", "uchar green", "uchar blue"] if colors is not None else [])
    rows = np.ascontiguousarray(xyz, "<f4").view(np.uint8)  # (N, 12): as bytes
    rows = rows if colors is None else np.hstack([rows, colors])
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *map("property {}".format, names)]
    with whole_file(path) as file:
        file.write("\n".join([*head, "end_header", ""]).encode() + rows.tobytes())


def unit_sphere(xyz):
    """Each cloud of (B, N, 3) with its centroid at 0 and its farthest point at radius 1, float32; one point stays at 0."""
    xyz = xyz.double() - xyz.double().mean(1, keepdim=True)
    return (xyz / xyz.norm(dim=2).amax(1)[:, None, None].clamp(min=1e-12)).float()


@dataclass
class Clouds:
    """Clouds of any sizes, end to end: cloud i is points[offsets[i]:offsets[i + 1]]."""
    points: torch.Tensor  # (T, 3) float32, possibly mapped from a file larger than memory
    offsets: torch.Tensor  # (n + 1,) int64
    names: list
    labels: torch.Tensor | None = None  # (n,) int64, indices into classes
    classes: list = field(default_factory=list)
    parts: torch.Tensor | None = None  # (T,) int64, a part label per point
    class_parts: list | None = None  # class -> (first, last + 1) of its parts
    normalized: bool = True  # False: draws are used as stored
    largest: int = 0  # points of the largest cloud, where it is known

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return self.points[self.offsets[i]:self.offsets[i + 1]]

    def to(self, device):
        moved = {name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **moved, largest=int(self.offsets.diff().max()))

    def draw(self, indices, num_points, generator=None):
        """A random `num_points` of each cloud, in random order and without repetition; a smaller cloud is repeated.

        indices (B,) -> xyz (B, num_points, 3) float32, each draw normalised anew; flat (B, num_points) int64 into points.
        xyz is on the generator's device, where the draw is made; flat on that of the points, which may be another one.
        """
        indices, home = indices.to(self.offsets.device), self.points.device
        device = home if generator is None else generator.device
        start, size = (t.to(device) for t in (self.offsets[indices], self.offsets.diff()[indices]))  # (B,)
        # the batch's largest on a CPU; on a GPU the set's, known since it was moved there: nothing waits
        largest, order = self.largest or int(size.max()), []
        for rows in size.split(max(1, 2 ** 24 // largest)):  # one part, unless the keys would take more than 64 MiB
            keys = torch.rand(len(rows), largest, generator=generator, device=size.device)
            behind = torch.arange(largest, device=size.device) >= rows[:, None]  # the cloud's end: after every real key
            order.append(keys.masked_fill_(behind, 2).topk(min(num_points, largest), largest=False).indices)
        turn = torch.arange(num_points, device=size.device) % size[:, None]  # (B, num_points)
        flat = (start[:, None] + torch.cat(order).gather(1, turn)).to(home)
        xyz = self.points[flat].to(device)
        return unit_sphere(xyz) if self.normalized else xyz, flat


def _shapenet(root):
    """(folder of the clouds, [train list, test list]) of a ShapeNet-55 root; of any other folder None."""
    for base, lists in ((".", "ShapeNet-55"), (".", "."), ("..", "."), ("ShapeNet55-34", "ShapeNet55-34/ShapeNet-55")):
        lists = [root / lists / name for name in ("train.txt", "test.txt")]
        if lists[0].is_file() and (root / base / "shapenet_pc").is_dir():
            return root / base / "shapenet_pc", lists


def _list_clouds(root):
    """A folder -> (the folder its names start from, [(split: 0 train, 1 test, 2 neither; class or None; name)] in order)."""
    if found := _shapenet(root):
        names = [sorted(path.read_text("utf-8").split()) for path in found[1]]
        return found[0], [(i, name.split("-")[0], name) for i in (0, 1) for name in names[i]]
    entries = []
    for path in root.rglob("*"):
        inside = path.relative_to(root).parts
        if path.suffix.lower() in READERS and not any(name.startswith(".") for name in inside) and path.is_file():
            split = 0 if "train" in inside[:-1] else 1 if "test" in inside[:-1] else 2
            label = next((name for name in inside[:-1] if name not in ("train", "test")), None)
            entries.append((split, label, "/".join(inside)))
    if all(split == 2 for split, _, _ in entries):  # no split of its own: a fifth, by a hash of the names, is for testing
        entries.sort(key=lambda entry: hashlib.sha256(entry[2].encode()).digest())
        entries = [(int(i < max(1, len(entries) // 5)), *entry[1:]) for i, entry in enumerate(entries)]
    return root, sorted(entries, key=lambda entry: (entry[0], entry[2]))


def cached_points(root, names, cache):
    """The clouds `names`, read once, as a memory map (T, 3) and offsets (n + 1,).

    The cache is one file, the points and then the offsets, named by a hash of the clouds' names, sizes and times. It appears
    whole or not at all, so processes may build it at the same time; one that does not add up is built again.
    """
    stats = [os.stat(os.path.join(root, name)) for name in names]
    key = repr((CACHE_POINTS, MESH_POINTS, [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, stats)]))
    if cache is None:
        cache = root if os.access(root, os.W_OK) else os.path.join(tempfile.gettempdir(), f"act-cache-{os.getuid()}")
    os.makedirs(cache, exist_ok=True)
    path = os.path.join(cache, f".act-cache-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin")
    size = os.path.getsize(path) - 8 * (len(names) + 1) if os.path.isfile(path) else -1
    offsets = np.fromfile(path, np.int64, offset=size) if size >= 0 else np.zeros(2, np.int64)
    if offsets[0] != 0 or (np.diff(offsets) <= 0).any() or size != 12 * int(offsets[-1]):
        print(f"reading {len(names)} clouds into {path}, once", file=sys.stderr)
        offsets = np.zeros(len(names) + 1, np.int64)
        with whole_file(path) as file:
            for i, name in enumerate(names):
                points = read_cloud(os.path.join(root, name))
                if len(points) > CACHE_POINTS:
                    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
                    points = points[rng.choice(len(points), CACHE_POINTS, replace=False)]
                file.write(points.tobytes())
                offsets[i + 1] = offsets[i] + len(points)
            file.write(offsets.tobytes())
    # mode "c" is private to this process, and writable, as torch wants it
    return np.memmap(path, np.float32, "c", shape=(int(offsets[-1]), 3)), offsets


def open_clouds(path, split=None, cache=None):
    """A folder of clouds, of any forms in READERS, or a ShapeNet-55 root, as Clouds; read once, then mapped from a cache.

    Sub-folders are classes; folders `train` and `test` above or below them are the splits, else a fixed fifth is for testing.
    split: "train", "test" or None for everything. The cache lies in `cache`, else in the folder itself, else, if that
    cannot be written, in the system's temporary folder; it keeps a random CACHE_POINTS of a larger cloud.
    """
    splits = {None: (0, 1, 2), "train": (0,), "test": (1,)}
    if split not in splits:
        raise ValueError(f"split must be 'train', 'test' or None, found {split!r}")
    if not os.path.isdir(path):
        raise ValueError(f"{path}: no such folder")
    root, entries = _list_clouds(Path(path))
    missing = [name for _, _, name in entries if not (root / name).is_file()]
    if missing:
        raise ValueError(f"{root}: {missing[0]} is listed, but not there")
    chosen = [i for i, entry in enumerate(entries) if entry[0] in splits[split]]
    if not chosen:
        found = f" for {split!r} among its {len(entries)}" if entries else f", expected files {' '.join(READERS)}"
        raise ValueError(f"{path}: no clouds{found}")
    points, offsets = cached_points(root, [name for _, _, name in entries], cache)
    first, end = chosen[0], chosen[-1] + 1  # they are in the order of the splits: the chosen ones are neighbours
    points, offsets = points[offsets[first]:offsets[end]], offsets[first:end + 1] - offsets[first]
    classes = sorted({label for _, label, _ in entries}) if all(label for _, label, _ in entries) else []
    _, labels, names = zip(*entries[first:end])
    labels = torch.tensor([classes.index(label) for label in labels]) if classes else None
    return Clouds(torch.from_numpy(points), torch.from_numpy(offsets), list(names), labels, classes)


def _surface(kind, size, n, rng):
    """(n, 3) points on a box, sphere, torus, cylinder, cone, shade or pyramid of half-sizes `size`; axis y, or as in "cone_x"."""
    kind, _, axis = kind.partition("_")
    order = {"": [0, 1, 2], "x": [1, 0, 2], "z": [0, 2, 1]}[axis]
    size, t, turn = np.array(size)[order], rng.uniform(-1, 1, n), rng.uniform(0, 2 * np.pi, n)
    ring = np.stack([np.cos(turn), np.sin(turn)])
    if kind == "box":
        points, share = rng.uniform(-1, 1, (n, 3)), np.cumsum(1 / size)  # a face's area goes as 1 / its distance
        points[np.arange(n), np.searchsorted(share[:2] / share[2], rng.random(n))] = np.sign(t)
        return (points * size)[:, order]
    if kind == "sphere":
        height, radius = t, np.sqrt(1 - t ** 2)
    elif kind == "torus":
        height, radius = np.sin(np.pi * t), 1 - size[1] / size[0] * (1 - np.cos(np.pi * t))
    else:
        cap, top = rng.random(n) < size[0] / (size[0] + 2 * size[1]), {"cylinder": 1, "shade": 0.5}.get(kind, 0)
        height = np.where(cap, np.sign(t), t)
        radius = (1 + (top - 1) * (height + 1) / 2) * np.where(cap, np.sqrt(rng.random(n)), 1)
        ring /= np.abs(ring).max(0) if kind == "pyramid" else 1
    return (np.stack([radius * ring[0], height, radius * ring[1]], 1) * size)[:, order]


def _shapes(w, h, d, t, p, q):
    """Category -> [(part, primitive, centre, half-sizes)], y up, from half-width, half-height, half-depth, thickness and two
    numbers in (0, 1). Proportions overlap on purpose: a box may be as flat as a door."""
    legs = [(x, z) for x in (-1, 1) for z in (-1, 1)]
    o, r, s = (0, 0, 0), w * (0.4 + 0.6 * p), 0.2 + 0.3 * p
    return {
        "sphere": [(0, "sphere", o, (w, w * (0.8 + 0.4 * p), w))], "ellipsoid": [(0, "sphere", o, (w, h, d))],
        "box": [(0, "box", o, (w, h, d * p + t))], "cylinder": [(0, "cylinder", o, (r, h, r))],
        "cone": [(0, "cone" if q > 0.3 else "shade", o, (r, h, r))], "pyramid": [(0, "pyramid", o, (w, h, d))],
        "torus": [(0, "torus", o, (w, w * s * 0.7, w))],
        "capsule": [(0, "cylinder", o, (r, h, r)), (1, "sphere", (0, h, 0), (r, r, r)), (1, "sphere", (0, -h, 0), (r, r, r))],
        "table": [(0, "box" if q > 0.3 else "cylinder", o, (w, t, d)),
                  *[(1, "box", (x * w * s * 1.4, -h, z * d * s * 1.4), (t, h, t)) for x, z in legs]],
        "desk": [(0, "box", o, (w, t, d)), (1, "box", (-w * 0.9, -h, 0), (t, h, d * 0.9)),
                 (2, "box", (w * 0.6, -h, 0), (w * 0.4 * q + t, h, d * 0.9))],
        "stool": [(0, "cylinder" if q > 0.4 else "box", o, (r, t, r)),
                  *[(1, "box", (x * r * 0.6, -h * 0.8, z * r * 0.6), (t, h * 0.8, t)) for x, z in legs]],
        "chair": [(0, "box", o, (r, t, d * 0.6)), (1, "box", (0, h * s * 1.5, -d * 0.6), (r, h * s * 1.5, t)),
                  *[(2, "box", (x * r * 0.9, -h * 0.5, z * d * 0.5), (t, h * 0.5, t)) for x, z in legs]],
        "sofa": [(0, "box", o, (w, h * 0.3, d * 0.6)), (1, "box", (0, h * s, -d * 0.6), (w, h * 0.5, 2 * t)),
                 *[(2, "box", (x * w, h * 0.2, 0), (2 * t, h * s, d * 0.6)) for x in (-1, 1)]],
        "bed": [(0, "box", o, (r, h * 0.2, d)), (1, "box", (0, h * s, -d), (r, h * 0.5, t)),
                *[(2, "box", (x * r * 0.9, -h * 0.4 * q, z * d * 0.9), (t, h * 0.4 * q, t)) for x, z in legs]],
        "bookshelf": [*[(0, "box", (x * r, 0, 0), (t, h, d * 0.3)) for x in (-1, 1)],
                      *[(1, "box", (0, h * y, 0), (r, t / 2, d * 0.3)) for y in np.linspace(-1, 1, 3 + int(3 * q))]],
        "door": [(0, "box", o, (r, h, t)), (1, "sphere", (r * 0.8, h * 0.2 * q, t + 0.05), (t, t, t))],
        "lamp": [(0, "cylinder", (0, -h, 0), (w * 0.4, t, w * 0.4)), (1, "cylinder", o, (t / 2, h, t / 2)),
                 (2, "shade" if q > 0.4 else "cone", (0, h, 0), (w * 0.5, h * s, w * 0.5))],
        "mug": [(0, "cylinder", o, (r, h, r)), (1, "torus_z", (r * 1.1, 0, 0), (h * s, h * s, t))],
        "bottle": [(0, "cylinder", o, (r / 2, h, r / 2)), (1, "shade", (0, h * 1.2, 0), (r / 2, h * 0.2, r / 2)),
                   (2, "cylinder", (0, h * (1.4 + s * q), 0), (r / 4, h * s * q, r / 4))],
        "aeroplane": [(0, "sphere", o, (w * 1.3, t * 2, t * 2)), (1, "box", (w * s, 0, 0), (w * 0.2, t / 4, d)),
                      (2, "box", (-w * 1.1, h * s / 2, 0), (w * 0.1, h * s / 2, t / 4))],
        "car": [(0, "box", o, (w, h * 0.2, d * 0.45)), (1, "box", (-w * s * 0.5, h * 0.35, 0), (w * 0.5, h * 0.2, d * 0.4)),
                *[(2, "cylinder_z", (x * w * 0.6, -h * 0.2, z * d * 0.4), (h * 0.2, h * 0.2, t)) for x, z in legs]],
        "rocket": [(0, "cylinder", o, (r / 2, h, r / 2)), (1, "cone", (0, h * (1 + s), 0), (r / 2, h * s, r / 2)),
                   *[(2, "box", (0, -h * 0.8, 0), (r * x + t / 4, h * 0.2, r * (1 - x) + t / 4)) for x in (0, 1)]],
        "dumbbell": [(0, "cylinder_x", o, (w, t, t)),
                     *[(1, "sphere" if q > 0.5 else "cylinder_x", (x * w, 0, 0), (w * s, h * s, h * s)) for x in (-1, 1)]],
    }


def synthetic_cloud(name, num_points, rng):
    """A random shape of one category, upright and as it comes: points (num_points, 3) float64, parts (num_points,) from 0."""
    primitives = _shapes(*rng.uniform(0.4, 1, 3), rng.uniform(0.04, 0.1), *rng.random(2))[name]
    sizes = np.array([size for _, _, _, size in primitives])
    # a primitive's share of the points: its area, somewhat levelled so that small parts show, times a random density
    share = (sizes * np.roll(sizes, 1, 1)).sum(1) ** 0.75 * np.exp(0.4 * rng.normal(size=len(sizes)))
    counts = rng.multinomial(num_points, share / share.sum())
    points = [centre + _surface(kind, size, n, rng) for n, (_, kind, centre, size) in zip(counts, primitives)]
    return np.concatenate(points), np.repeat([part for part, *_ in primitives], counts)


def synthetic_clouds(num_per_class, seed=0, num_points=2048):
    """The embedded data: `num_per_class` clouds of each category, class after class, with parts, as Clouds.

    Each is turned about y, tilted by up to 15 degrees, denser towards one side, for every other one with up to a third of it
    cut away on the far side, and noisy (sigma 0.02 of its radius). Cloud i of class c depends on (seed, c, i) alone.
    """
    shapes = _shapes(*[0.5] * 6)
    ends = np.cumsum([0] + [1 + max(part for part, *_ in primitives) for primitives in shapes.values()])
    points = np.empty((len(shapes), num_per_class, num_points, 3), np.float32)
    parts = np.empty(points.shape[:3], np.int64)
    for c, i in np.ndindex(points.shape[:2]):
        rng = np.random.default_rng([seed, c, i])
        xyz, part = synthetic_cloud(list(shapes)[c], 2 * num_points, rng)
        turn, tilt, side = rng.uniform(-np.pi, np.pi), rng.uniform(0, np.pi / 12), rng.normal(size=3)
        for axes, angle in (([0, 2], turn), ([0, 1], tilt)):
            xyz[:, axes] = xyz[:, axes] @ [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        depth = normalize(xyz) @ (side / np.linalg.norm(side))
        keys = rng.exponential(size=len(xyz)) * np.exp(rng.uniform(0, 1.5) * depth)  # small keys stay: thinner with depth
        if rng.random() < 0.5:
            keys[depth > np.quantile(depth, rng.uniform(0.65, 1))] = np.inf
        keep = np.argpartition(keys, num_points)[:num_points]
        xyz = normalize(xyz[keep])
        points[c, i], parts[c, i] = normalize(xyz + 0.02 * rng.normal(size=xyz.shape)), ends[c] + part[keep]
    names = [f"{name}_{seed}_{i:04d}" for name in shapes for i in range(num_per_class)]  # other clouds, other names
    return Clouds(torch.from_numpy(points).reshape(-1, 3), torch.arange(len(names) + 1) * num_points, names,
                  torch.arange(len(shapes)).repeat_interleave(num_per_class), list(shapes), torch.from_numpy(parts).reshape(-1),
                  list(zip(ends[:-1].tolist(), ends[1:].tolist())))


def scale_translate(xyz, generator=None, scale=(2 / 3, 3 / 2), shift=0.2, per_axis=True):
    """Each cloud of xyz (B, N, 3) scaled by U(scale) per axis (or once per cloud), moved per axis by U(-shift, shift)."""
    B = len(xyz)
    factor = torch.rand(B, 1, 3 if per_axis else 1, generator=generator, device=xyz.device, dtype=xyz.dtype)
    offset = torch.rand(B, 1, 3, generator=generator, device=xyz.device, dtype=xyz.dtype)
    return xyz * (scale[0] + (scale[1] - scale[0]) * factor) + shift * (2 * offset - 1)


def rotate_y(xyz, generator=None):
    """Each cloud of xyz (B, N, 3) turned about the up axis y by an angle of its own, uniform over the circle."""
    angle = 2 * math.pi * torch.rand(len(xyz), 1, generator=generator, device=xyz.device, dtype=xyz.dtype)
    cos, sin, (x, y, z) = angle.cos(), angle.sin(), xyz.unbind(2)
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], 2)


# Pictures, with numpy and zlib alone: an image is a (H, W, 3) uint8 array, x to the right and y down, in pixels. The font
# holds ASCII 32..126, then a box for all else: five columns a glyph, a byte each, the top pixel in the lowest bit.
FONT = bytes.fromhex(
    "000000000000005f00000007000700147f147f14242a7f2a12231308646236495522500000070000001c2241000041221c0014083e081408083e0808"
    "00806000000808080808006060000060100804031c2241221c44427f4040426151494622414949361814127f1027454545393c4a4949300101710d03"
    "3649494936064949291e0066660000008666000008142241001414141414004122140802015909063e415d555e7e0909097e7f494949363e41414122"
    "7f4141413e7f494949417f090909013e4149497a7f0808087f00417f41002040413f017f081422417f404040407f020c027f7f0608307f3e4141413e"
    "7f090909063e4151215e7f09192946464949493101017f01013f4040403f0f3040300f7f2018207f631408146303047804036151494543007f414100"
    "03040810600041417f0004020102048080808080000102000020545454787f444444383844444444384444447f3854545418087e09090218a4a4a47c"
    "7f0404047800447d40008080847d007f1028440000417f40007c047804787c040404783844444438fc2424241818242424fc7c080404004854545424"
    "043f4444203c4040407c1c2040201c3c4038403c44281028441ca0a0a07c4464544c4400087741000000ff0000004177080008040810087f4141417f")
INK, GRID = (50, 50, 60), (225, 225, 230)


def write_png(path, image):
    """Writes a (H, W, 3) uint8 image as PNG, whole or not at all."""
    assert image.dtype == np.uint8 and image.shape[2:] == (3,), f"{path}: found {image.shape} {image.dtype}"
    H, W, _ = image.shape
    rows = np.pad(image.reshape(H, 3 * W), ((0, 0), (1, 0))).tobytes()  # each row opens with its filter: 0, none
    header = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    with whole_file(path) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def draw_text(image, x, y, text, color=INK, scale=2, align=0.0, width=math.inf):
    """Writes `text` into `image`, 8 pixels times `scale` high from y down; align 0, 0.5, 1: x is its left, middle, right.
    What lies outside is cut off; text wider than `width` pixels is drawn at half the scale, then shortened."""
    scale = scale if 6 * scale * len(text) <= width else scale // 2
    if 6 * scale * len(text) > width:
        text = text[: max(int(width) // (6 * scale) - 2, 0)] + ".."
    glyphs = np.frombuffer(FONT, np.uint8).reshape(96, 5)[[ord(c) - 32 if " " <= c <= "~" else 95 for c in text]]
    bits = np.unpackbits(np.pad(glyphs, ((0, 0), (0, 1))).reshape(-1, 1), axis=1, bitorder="little")  # (6 len, 8)
    columns, rows = np.nonzero(bits.repeat(scale, axis=0).repeat(scale, axis=1))
    columns, rows = columns + round(x - align * (6 * len(text) - 1) * scale), rows + round(y)
    inside = (columns >= 0) & (columns < image.shape[1]) & (rows >= 0) & (rows < image.shape[0])
    image[rows[inside], columns[inside]] = color


def render(xyz, colors=None, size=320, radius=1.05):
    """A cloud (N, 3) as shaded discs on white, y up, seen from 35 degrees aside and 20 above -> (size, size, 3) uint8.

    colors: (N, 3) in 0..1, by height if not given. The frame holds the ball of `radius` about the origin whatever the
    cloud, so that renders compare. Points that are not finite are left out.
    """
    xyz = np.asarray(xyz, dtype=np.float64)
    height = np.clip(0.5 + xyz[:, 1:2] / radius / 2, 0, 1)
    colors = [0.10, 0.20, 0.52] + height * [0.15, 0.52, 0.34] if colors is None else np.asarray(colors)
    xyz, colors = [values[np.isfinite(xyz).all(axis=1)] for values in (xyz, colors)]
    sa, ca, se, ce = 0.5736, 0.8192, 0.3420, 0.9397  # sine and cosine of 35 and of 20 degrees
    x, y, depth = np.array([[ca, 0, -sa], [-se * sa, ce, -se * ca], [ce * sa, se, ce * ca]]) @ xyz.T
    S = 2 * size  # painted at twice the size, averaged at the end: smooth edges
    zoom = 0.97 * S * 2 / np.maximum(4 * radius - depth, radius)  # mild perspective, from 4 radii away
    row, column = [np.rint(np.clip(S / 2 + v * zoom, -S, 2 * S)).astype(int)[:, None] for v in (-y, x)]
    disc = min(max(0.52 * S / math.sqrt(len(xyz) + 1), 1.5), 0.02 * S)  # its radius: the more points, the smaller
    reach = int(disc)
    dy, dx = (np.argwhere(np.hypot(*np.mgrid[-reach:reach + 1, -reach:reach + 1]) <= disc) - reach).T  # its pixels
    ball = 0.8 * np.sqrt(1 - (dx**2 + dy**2) / disc**2) - (0.35 * dx + 0.5 * dy) / disc  # lit from the upper left
    light = 0.62 + 0.38 * np.clip(ball, 0, 1)[:, None]
    fade = 0.45 + 0.55 * np.clip(0.5 + depth / radius / 2, 0, 1)[:, None, None]  # the far side fades into the white
    colors = np.clip(colors, 0, 1)[:, None]
    canvas = np.ones((S, S, 3), np.float32)
    # far to near, the nearer hides the farther; parts bound the memory
    for part in np.array_split(np.argsort(depth, kind="stable"), len(xyz) // 2**16 + 1):
        rows, columns = row[part] + dy, column[part] + dx  # (n, pixels)
        inside = (rows >= 0) & (rows < S) & (columns >= 0) & (columns < S)
        canvas[rows[inside], columns[inside]] = (colors[part] * light * fade[part] + 1 - fade[part])[inside]
    return (255 * canvas.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))).round().astype(np.uint8)


def palette(n):
    """n distinct colours in a fixed order -> (n, 3) in 0..1: ten hues, then the same, darker and lighter by turns."""
    hues = np.frombuffer(bytes.fromhex("3b6fb6e8833a4a9c5dc94f4f8a63b08c6150d77fb57a7a7ab5aa3c3fb1c0"), np.uint8)
    tier = np.arange(n)[:, None] // 10
    keep = 0.6 ** ((tier + 1) // 2)
    return hues.reshape(10, 3)[np.arange(n) % 10] / 255 * keep + (1 - keep) * (tier % 2 == 0)


def pca_colors(features):
    """First three principal components of (N, C) features -> colours (N, 3), 2nd to 98th percentile to 0..1; the largest
    loading of each is positive, a component without variance gives 0.5."""
    features = np.asarray(features, dtype=np.float64)
    _, strength, axes = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    axes = axes[:3][strength[:3] > 1e-9 * np.linalg.norm(features)]
    scores = features @ axes.T * np.sign([axis[abs(axis).argmax()] for axis in axes])
    low, high = np.percentile(scores, [2, 98], axis=0)
    scores = np.clip((scores - low) / np.maximum(high - low, 1e-300), 0, 1)
    return np.pad(scores, ((0, 0), (0, 3 - len(axes))), constant_values=0.5)


def montage(rows, columns=None, labels=None):
    """A grid of images, all of one size, from equally long rows of them, with headings above and labels at the left."""
    h, w, _ = np.add(rows[0][0].shape, 6)  # with a margin
    left, top = 12 * max(map(len, labels or [""])), 20 if columns else 0
    tiles = [np.hstack([np.pad(tile, ((6, 0), (6, 0), (0, 0)), constant_values=255) for tile in row]) for row in rows]
    image = np.pad(np.vstack(tiles), ((top, 6), (left, 6), (0, 0)), constant_values=255)
    for j, heading in enumerate(columns or []):
        draw_text(image, left + j * w + 3 + w / 2, 6, heading, align=0.5, width=w - 6)
    for i, label in enumerate(labels or []):
        draw_text(image, 6, top + i * h + h / 2 - 8, label)
    return image


def write_gallery(path, rows, columns, labels=None):
    """Clouds side by side as a picture, `path`.png, and for other viewers as one coloured cloud, `path`.ply.

    rows: lists of (xyz (N, 3), colors (N, 3) in 0..1 or None), under the headings `columns`.
    """
    path = Path(path)
    write_png(path.with_suffix(".png"), montage([[render(xyz, colors) for xyz, colors in row] for row in rows], columns, labels))
    placed = [(xyz + np.array([2.5 * x, -2.5 * y, 0], np.float32), np.full(xyz.shape, 0.5) if colors is None else colors)
              for y, row in enumerate(rows) for x, (xyz, colors) in enumerate(row)]
    xyz, colors = (np.concatenate(parts) for parts in zip(*placed))
    write_ply(path.with_suffix(".ply"), xyz, np.uint8(255 * colors))


def plot_lines(curves, title="", xlabel="", ylabel="", size=(640, 400)):
    """Curves {name: (xs, ys)} in axes with a legend -> image of `size` = (width, height). NaN and Inf are gaps; the y axis
    is logarithmic if all values are positive and span over two decades."""
    W, H = size
    lines = [np.array([[*x, np.nan], [*y, np.nan]], dtype=np.float64) for x, y in curves.values()]  # (2, K), never empty
    lines = [np.where(np.isfinite(xy).all(axis=0), xy, np.nan) for xy in lines]
    every = np.hstack([np.empty((2, 0)), *(xy[:, ~np.isnan(xy[0])] for xy in lines)])
    every = every if every.size else np.eye(2)
    log = 0 < 100 * every[1].min() < every[1].max()
    for xy in (every, *lines) if log else ():
        xy[1] = np.log10(xy[1])
    low, high = every.min(axis=1), every.max(axis=1)
    pad = np.where(high > low, 0.04 * (high - low), np.where(high == 0, 0.5, 0.1 * abs(high)))
    low, high = low - pad, high + pad
    ticks = []
    for a, whole in enumerate(((every[0] % 1 == 0).all(), log)):  # about six, whole numbers for epochs and exponents
        least = max((high[a] - low[a]) / 6, whole) * (1 - 1e-9)
        step = next(s for s in 10.0 ** math.floor(math.log10(least)) * np.array([1, 2, 5, 10]) if s >= least)
        ticks.append(np.arange(math.ceil(low[a] / step), math.floor(high[a] / step) + 1) * step)
    texts = [f"{v:.7g}" for v in ticks[0]], [f"{10**v if log else v:.7g}" for v in ticks[1]]
    left, right, top, bottom = 36 + 12 * max(map(len, texts[1])), W - 24, 44 + 20 * -(-len(lines) // 2), H - 52
    scale = np.array([[right - left], [top - bottom]]) / (high - low)[:, None]
    origin = np.array([[left], [bottom]]) - low[:, None] * scale  # pixel = value * scale + origin
    image = np.full((H, W, 3), 255, np.uint8)
    draw_text(image, left, 8, title, width=W - left)
    draw_text(image, (left + right) / 2, H - 20, xlabel, align=0.5)
    draw_text(np.rot90(image, -1), H - (top + bottom) / 2, 4, ylabel, align=0.5)  # a view, turned: written upwards
    for x, text in zip(np.rint(ticks[0] * scale[0] + origin[0]).astype(int), texts[0]):
        image[top:bottom, x] = GRID
        draw_text(image, x, bottom + 8, text, align=0.5)
    for y, text in zip(np.rint(ticks[1] * scale[1] + origin[1]).astype(int), texts[1]):
        image[y, left:right] = GRID
        draw_text(image, left - 8, y - 6, text, align=1)
    image[top:bottom, left - 1] = image[bottom, left - 1 : right] = INK
    canvas = image.repeat(2, axis=0).repeat(2, axis=1)  # curves at twice the size, averaged at the end: smooth
    for i, (name, xy, color) in enumerate(zip(curves, lines, 255 * palette(len(lines)))):
        x, y = 2 * left + i % 2 * (W - left), 64 + i // 2 * 40  # the legend, two names a line
        canvas[y + 2 : y + 26, x : x + 24] = color
        draw_text(canvas, x + 34, y, name, scale=4, width=W - left - 44)
        xy = 2 * (xy * scale + origin)
        jumps = np.nan_to_num(abs(np.diff(xy)).max(axis=0))  # pixels from each value to the next
        ends = np.append(0, np.cumsum(np.ceil(jumps) + 1))  # so many samples that no two are a pixel apart
        dense = np.stack([np.interp(np.arange(ends[-1] + 1), ends, v) for v in xy])
        for points, r in ((dense, 2), (xy, 5 if len(ends) <= 40 else 2)):
            x, y = np.rint(points[:, ~np.isnan(points[0])]).astype(int)
            for dy, dx in np.argwhere(np.hypot(*np.mgrid[-r : r + 1, -r : r + 1]) <= r) - r:
                canvas[y + dy, x + dx] = color
    return canvas.reshape(H, 2, W, 2, 3).mean(axis=(1, 3)).astype(np.uint8)


def plot_matrix(matrix, names, title=""):
    """Confusion matrix (n, n) of counts as an image: a row for each true class, shaded by the share of its row."""
    matrix, n = np.asarray(matrix), len(matrix)
    cell = max(28, min(48, 480 // n))
    labels = [f"{name if len(name) < 17 else name[:15] + '..'} {i}" for i, name in enumerate(names)]
    left, top, side = 12 + 12 * max(map(len, ["truth", *labels])), 74, n * cell
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    tint = np.where(matrix > 0, 0.1 + 0.9 * share, 0)[:, :, None]
    hue = np.where(np.eye(n, dtype=bool)[:, :, None], [35, 85, 165], [200, 65, 45])  # hits blue, misses red
    cells = (255 + tint * (hue - 255)).repeat(cell, axis=0).repeat(cell, axis=1)
    cells[::cell] = cells[:, ::cell] = cells[-1] = cells[:, -1] = GRID
    image = np.full((top + side + 8, max(left + max(side, 108) + 8, 12 * len(title) + 12), 3), 255, np.uint8)
    image[top : top + side, left : left + side] = cells
    for x, y, text, align in ((6, 6, title, 0), (left, 32, "predicted", 0), (left - 6, 54, "truth", 1)):
        draw_text(image, x, y, text, align=align)
    for i, label in enumerate(labels):
        middle = i * cell + cell / 2
        draw_text(image, left - 6, top + middle - 6, label, align=1)
        draw_text(image, left + middle, 54, str(i), align=0.5, width=cell)
        for j in np.flatnonzero(matrix[i]) if n <= 12 else ():
            color = (255, 255, 255) if share[i, j] > 0.5 else INK
            draw_text(image, left + j * cell + cell / 2, top + middle - 6, str(matrix[i, j]), color, align=0.5, width=cell)
    return image
