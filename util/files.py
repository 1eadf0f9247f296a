"""One file to points, and points to a .ply.

    xyz = files.read_cloud("scan.ply")  # (1024, 3) float32 in the unit sphere

Nothing in a file is executed. What is wrong is a UserError of one line that begins with its name.
"""

import functools
import importlib
import io
import os
import pickle
import pickletools
import re
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Iterator, Mapping, Sequence

import numpy as np
import torch

import act
from util import clouds

MESH_POINTS = 8192  # sampled from a mesh
LABELLED = (".npy", ".txt", ".xyz", ".pts", ".csv")  # forms that may hold a label for each point
POINTS = ("points", "xyz", "data", "pos", "positions")  # names of the points in an .npz
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+|nan|inf)(?:e[-+]?\d+)?(?![^\s,;])"
THREE = rf"{NUMBER}[ \t,;]+{NUMBER}[ \t,;]+{NUMBER}"
POINT = re.compile(rf"(?i)\s*{NUMBER}[\s,;]+{NUMBER}")  # the start of a line of numbers
COMMENT = re.compile(r"(#|(?<!\S)//).*")  # not the // in the corner 1//2 of an .obj
# The same, but for a comment that names columns: "# id x y z", "# id, pos_x, pos_y, pos_z".
AXIS = r"(?<![^\W_])[xyz](?![^\W_])"
BETWEEN = r"(?:\W|_|m|pos|position|coord)*"  # also units
REMARK = re.compile(rf"(?i)(#|(?<!\S)//)(?!.*{AXIS}{BETWEEN}{AXIS}{BETWEEN}{AXIS}).*")
CONVERSIONS = dict.fromkeys((".las", ".laz"), "numpy.save('a.npy', laspy.read('a.las').xyz)")
CONVERSIONS |= dict.fromkeys((".stl", ".glb"), "trimesh.load_mesh('a.stl').export('a.ply')")
CONVERSIONS[".pcd"] = "open3d.io.write_point_cloud('a.ply', open3d.io.read_point_cloud('a.pcd'))"
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")
AnyPath = str | os.PathLike


def require(name: str, package: str | None = None) -> ModuleType:
    """The optional module `name`; UserError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise act.UserError(f"needs {name}: pip install {package or name}") from error


@contextmanager
def reading(path: AnyPath) -> Iterator[None]:
    """An OSError or UserError of the block becomes a UserError of one line that names path."""
    try:
        yield
    except (OSError, act.UserError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, OSError):
            message = f"expected a readable file, got {message}"
        if not message.startswith((f"{path}:", f"{path}{os.sep}")):
            message = f"{path}: {message}"
        raise act.UserError(message) from error


@contextmanager
def parsing() -> Iterator[None]:
    """Around a parser of foreign data, whose errors of any type become a UserError."""
    try:
        yield
    except OSError:
        raise  # `reading` tells that the file cannot be opened.
    except Exception as error:
        raise act.UserError(f"expected data, got {type(error).__name__} {error}") from error


def lock(file: BinaryIO) -> None:
    """Locks a file while it is open. OSError if it is locked; ImportError if nothing here can."""
    import fcntl  # POSIX alone has it

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@functools.cache  # Once a process: listing a folder for each file would take long in a large one.
def remove_leftovers(folder: Path) -> None:
    """Removes what complete_file left in a folder when its process was killed."""
    for path in folder.glob(".act-*.tmp"):
        with suppress(ImportError, OSError), open(path, "ab") as file:
            lock(file)
            path.unlink()


@contextmanager
def complete_file(path: AnyPath) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` once complete; a failure leaves `path` as it was. It is
    locked until then, so that the next writer in the folder can tell and remove leftovers."""
    part = Path(path).parent / f".act-{os.urandom(8).hex()}.tmp"
    try:
        remove_leftovers(part.absolute().parent)
        with open(part, "xb") as file:
            with suppress(ImportError, OSError):
                lock(file)
            yield file
        os.replace(part, path)
    except OSError as error:
        raise act.UserError(f"{path}: expected to write, got {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def list_files(folder: AnyPath) -> list[Path]:
    """All files below a folder, sorted, but hidden ones and those of system folders. A folder is
    visited once, by its own path rather than by a link to it, and no link leads above `folder`."""
    visited = set(Path(os.path.realpath(folder)).parents)
    folders = [Path(folder)]  # The last is visited next.
    listed = []
    while folders:
        current = folders.pop()
        real = Path(os.path.realpath(current))
        if real in visited:
            continue
        visited.add(real)
        with reading(current):
            for path in sorted(current.iterdir()):
                is_hidden = path.name[0] == "." or path.name in SYSTEM_FOLDERS
                if path.is_dir() and not is_hidden:  # Links are visited after all that are none.
                    folders.insert(0 if path.is_symlink() else len(folders), path)
                elif not is_hidden:
                    listed.append(path)
    return sorted(listed)


# -- Arrays and texts
def read_numpy(path: Path) -> np.ndarray:
    """The array of a .npy, mapped, or of a .npz: its only one, or the first of POINTS. Fields
    of an array, or arrays of a .npz, become columns if three are named x, y and z."""
    with parsing():
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(table, Mapping):
        size = sum(member.file_size for member in table.zip.infolist())
        if size > max(2**26, 100 * path.stat().st_size):  # It would fill the memory.
            raise act.UserError(f"expected less packed data, got {size} bytes")
        names = list(table)
        if len(names) > 1:
            names = [name for name in POINTS if name in table]
        if names:
            with parsing():
                table = table[names[0]]
    names = list(table) if isinstance(table, Mapping) else table.dtype.names
    if names is None:
        return table
    order = column_order(names)
    if not order:
        raise act.UserError(f"expected points, or x, y and z, got {', '.join(names)[:60]}")
    with parsing():
        fields = [table[names[i]].ravel() for i in order]
        size = fields[0].size
        return np.stack([x for x in fields if x.size == size and x.dtype.kind in "fiub"], axis=1)


def column_order(names: Sequence[str]) -> list[int]:
    """The places of x, y and z among names like "X [m]", then all others; [] if one is missing."""
    plain = [re.sub(r"[\[(].*|[\W_]|position|pos|coord", "", name.lower()) for name in names]
    if not {"x", "y", "z"} <= set(plain):
        return []
    order = [plain.index(axis) for axis in "xyz"]
    return order + [i for i in range(len(names)) if i not in order]


def number_lines(path: AnyPath, comment: re.Pattern = COMMENT) -> dict[int, str]:
    """Number, from 1, -> line: those that are not blank, without comments."""
    rows = {}
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if "#" in line or "//" in line:
                line = comment.sub("", line).lstrip("#/ ")
            if line.strip():
                rows[number] = line
    return rows


def holds_points(path: AnyPath) -> bool:
    """Whether a line in the first 64 KiB of a text begins with three numbers."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return bool(re.search(rf"(?im)^[ \t]*{THREE}", file.read(2**16)))


def parse_numbers(rows: dict[int, str], columns: Sequence[int], mark: str | None = None):
    """The columns of numbered lines, (n, columns) float64; UserError quotes a line that fails."""
    if not rows:
        raise act.UserError("expected lines of three numbers or more, got none")
    try:
        return np.loadtxt(list(rows.values()), delimiter=mark, usecols=columns, ndmin=2)
    except ValueError as error:
        for number, line in rows.items():
            try:
                np.array(line.split(mark), object)[list(columns)].astype(float)
            except (ValueError, IndexError):
                got = f"{line.strip()[:60]!r} in line {number}"
                raise act.UserError(f"expected three numbers like 1.5, got {got}") from error
        raise act.UserError(f"expected numbers, got {error}") from error


def read_text(path: Path, labelled: bool = False) -> np.ndarray:
    """x, y and z of a text, and the last column if `labelled`. Blanks, commas or semicolons stand
    between numbers; lines before them may name the columns, or tell the number of points."""
    rows = number_lines(path, REMARK)
    order = []
    count = None
    for number, line in list(rows.items()):
        if re.match('(,?0,1,2(,3|\n))|.*points:0"?,', line.lower()):  # by pandas, ParaView
            raise act.UserError("expected columns named x, y and z, got numbered ones")
        # Once the columns are named, words may stand before the numbers: "chair 1 2 3".
        if POINT.match(line) or (order and re.search(THREE, line, re.I)):
            break
        names = re.split(r"[;,\t]", line)
        if len(names) < 3:
            names = line.split()
        order = column_order(names) or order
        if line.strip().isdecimal():
            count = line.strip()
        del rows[number]
    if count and count != str(len(rows)):
        raise act.UserError(f"expected {count[:20]} points, got {len(rows)}")
    first = next(iter(rows.values()), "").rstrip(" \t\n,;")
    mark = next((mark for mark in ";," if mark in first), None)
    width = len(first.split(mark))
    if len(order) > width and order[:3] != [0, 1, 2]:
        raise act.UserError(f"expected names of {width} columns, got {len(order)} names")
    order += range(len(order), max(3, width))
    columns = order[:3]
    if labelled and len(order) > 3:
        columns.append(order[-1])
    return parse_numbers(rows, columns, mark)


# -- Pickles, of which arrays and plain values are read
class PickledDtype:  # in place of numpy.dtype, whose flags, if forged, crash the interpreter
    def __init__(self, code, *_):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"an array of {self.dtype}")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray(np.ndarray):  # takes its type from a PickledDtype
    def __setstate__(self, state):
        version, shape, kind, is_fortran, data = state
        super().__setstate__((version, shape, kind.dtype, is_fortran, data))


class ArrayUnpickler(pickle.Unpickler):  # a KeyError for all names that no array needs
    ALLOWED = {
        "numpy.ndarray": None,  # the first argument of _reconstruct, and nothing else
        "numpy.dtype": PickledDtype,
        "numpy._core.multiarray._reconstruct": lambda *_: PickledArray(0),
        "numpy._core.multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.dtype)[0],
        "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes of protocols 0 to 2
    }

    def find_class(self, module, name):
        return self.ALLOWED[f"{module}.{name}".replace("numpy.core.", "numpy._core.")]  # numpy 1's


def read_pickle(path: Path) -> object:
    """The plain values and arrays of a pickle, also of one that Python 2 wrote."""
    with reading(path), open(path, "rb") as file, parsing():
        # A few bytes can claim any amount of memory. genops checks the lengths of all values.
        for opcode, argument, _ in pickletools.genops(file):
            if "PUT" in opcode.name and int(argument) > os.fstat(file.fileno()).st_size:
                raise pickle.UnpicklingError(f"place {argument} of the memo")
        file.seek(0)
        return ArrayUnpickler(file, encoding="latin1").load()


# -- Meshes
def triangulate(vertices: np.ndarray, faces: list) -> np.ndarray:
    """The corners of triangles, (t, 3, 3), that cover the faces, which may be any polygons."""
    by_size = {}
    for face in faces:
        by_size.setdefault(len(face), []).append(face)
    triangles = [np.zeros((0, 3, 3))]
    for size in sorted(by_size.keys() - {0, 1, 2}):
        corners = np.array(by_size[size])  # (m, size)
        if corners.dtype.kind not in "iu" or corners.min() < 0 or corners.max() >= len(vertices):
            got = f"{corners.min()} to {corners.max()}"
            raise act.UserError(f"expected corners 0 to {len(vertices) - 1}, got {got}")
        polygons = vertices[corners]  # (m, size, 3)
        first = np.broadcast_to(polygons[:, :1], (len(polygons), size - 2, 3))
        fans = np.stack([first, polygons[:, 1:-1], polygons[:, 2:]], axis=2)  # (m, size - 2, 3, 3)
        normals = np.cross(fans[:, :, 1] - first, fans[:, :, 2] - first)  # (m, size - 2, 3)
        total = normals.sum(axis=1, keepdims=True)  # (m, 1, 3), normal to the polygon
        upright = (normals * total).sum(axis=2) > -1e-9 * (total**2).sum(axis=2)
        is_covered = (upright | (normals == 0).all(axis=2)).all(axis=1)  # (m,), none turned over
        triangles.append(fans[is_covered].reshape(-1, 3, 3))
        for i in np.flatnonzero(~is_covered):
            triangles.append(cut_polygon(polygons[i], np.abs(normals[i]).sum(axis=0).argmax()))
    return np.concatenate(triangles)


def cut_polygon(polygon: np.ndarray, axis: int) -> np.ndarray:
    """The triangles (t, 3, 3) of a flat polygon (n, 3), convex or not, seen along `axis`. Corners
    cut it into slabs, where each edge that enters it and the next one bound a trapezoid."""
    across, up = np.delete([0, 1, 2], axis)
    ends = np.roll(polygon, -1, axis=0)
    heights = np.unique(polygon[:, up])
    triangles = []
    for low, high in zip(heights[:-1], heights[1:], strict=True):
        crosses = (polygon[:, up] <= low) != (ends[:, up] <= low)  # the edges across the slab
        start = polygon[crosses]
        step = ends[crosses] - start
        height = np.array([[[low]], [[high]]])
        cuts = start + (height - start[:, [up]]) / step[:, [up]] * step  # (2, edges, 3)
        bottom, top = cuts[:, np.argsort(cuts[:, :, across].sum(axis=0))]
        if np.diff([bottom[:, across], top[:, across]], axis=1).min() < -1e-6 * np.ptp(polygon):
            raise act.UserError("expected faces that do not cross themselves, got one that does")
        triangles.append(np.stack([bottom[0::2], bottom[1::2], top[1::2]], axis=1))
        triangles.append(np.stack([bottom[0::2], top[1::2], top[0::2]], axis=1))
    return np.concatenate(triangles)


def sample_mesh(vertices: np.ndarray, faces: list) -> np.ndarray:
    """MESH_POINTS (n, 3) of the surface, uniform by area, always the same ones."""
    a, b, c = np.moveaxis(triangulate(vertices, faces), 1, 0)  # (t, 3) each
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not 0 < area.sum() < np.inf:
        raise act.UserError(f"expected faces with an area, got {area.sum()}")
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(area), MESH_POINTS, p=area / area.sum())
    u, v = np.sort(rng.random((2, MESH_POINTS, 1)), axis=0)
    return a[chosen] + u * (b - a)[chosen] + (1 - v) * (c - a)[chosen]


def read_ply(path: Path) -> tuple:
    """A .ply, by plyfile: elements and properties in any order, as text or binary."""
    plyfile = require("plyfile")
    head, end, body = path.read_bytes().partition(b"end_header")
    for count in re.findall(rb"[\r\n]element\s+\S+\s+(\d+)", head):
        if int(count) > path.stat().st_size:  # plyfile would first reserve memory for all.
            raise act.UserError(f"expected {int(count)} rows of an element, got a shorter file")
    # plyfile refuses blank lines, comments that are not ASCII, line ends of other systems in texts.
    head = re.sub(rb"\s*[\r\n]+", b"\n", head)
    data = head.decode("ascii", "ignore").encode() + end + body
    stream = io.BytesIO(data)
    if re.search(rb"[\r\n]format\s+ascii", head):
        stream = io.StringIO(data.decode("latin-1"), newline=None)
    with parsing():
        elements = {element.name: element for element in plyfile.PlyData.read(stream)}
        names = {each.name.lower(): each.name for each in elements["vertex"].properties}
        vertices = np.stack([elements["vertex"][names[axis]] for axis in "xyz"], axis=1)
    if stream.read().strip():
        raise act.UserError(f"expected an end after {', '.join(elements)}, got more data")
    if "face" not in elements or len(elements["face"]) == 0:
        return vertices, []
    for each in elements["face"].properties:  # The list is vertex_indices or vertex_index.
        if each.name.startswith("vertex_ind") and isinstance(each, plyfile.PlyListProperty):
            return vertices, list(elements["face"][each.name])
    raise act.UserError("expected faces with a list vertex_indices, got none")


# By hand: trimesh 5 reads concave polygons, vertices from -1 and cut files wrong without a word.
def read_off(path: Path) -> tuple:
    rows = list(number_lines(path).items())
    head = "".join(line for _, line in rows[:2])  # OFF stands before the counts, or above them.
    match = re.match(r"(?i)\s*(?:(?:st)?c?n?off)?\s*(\d{1,9})[ \t]+(\d{1,9})[ \t]*(\d{0,9})", head)
    if match is None:
        raise act.UserError(f"expected OFF and the counts of vertices and faces, got {head[:40]!r}")
    num_vertices, num_faces, num_edges = [int(count or 0) for count in match.groups()]
    rest = rows[1 + match[0].count("\n") :]
    if len(rest) - num_vertices - num_faces not in (0, num_edges):  # Some have a line an edge.
        raise act.UserError(f"expected {num_vertices} + {num_faces} lines, got {len(rest)}")
    faces = []
    with parsing():
        for _, line in rest[num_vertices:][:num_faces]:
            words = line.split()
            faces.append([int(words[i]) for i in range(1, int(words[0]) + 1)])  # not its colour
    return parse_numbers(dict(rest[:num_vertices]), (0, 1, 2)), faces


def read_obj(path: Path) -> tuple:
    """An .obj. A corner is vertex/texture/normal; vertices count from 1, or back from -1."""
    vertices = {}
    faces = []
    begun = ""
    for number, line in number_lines(path).items():
        line = begun + line.rstrip()
        begun = ""
        words = line.split()
        if line.endswith("\\"):  # A backslash continues a line.
            begun = line[:-1] + " "
        elif words[0] == "v":
            vertices[number] = line
        elif words[0] == "f":
            with parsing():
                corners = [int(word.split("/")[0]) for word in words[1:]]
            faces.append([len(vertices) + i if i < 0 else i - 1 for i in corners])
    return parse_numbers(vertices, (1, 2, 3)), faces


READERS = {".npy": read_numpy, ".npz": read_numpy} | dict.fromkeys(LABELLED[1:], read_text)
READERS |= {".ply": read_ply, ".off": read_off, ".obj": read_obj}


def check_points(array: np.ndarray, drop_invalid: bool = False) -> np.ndarray:
    """The first three columns of an array, (n, 3) float64, all finite, or without other rows."""
    array = np.asarray(array)
    # At most as many columns as rows, beyond three: an array (3, n) is turned, not a cloud.
    fits = array.ndim == 2 and 3 <= array.shape[1] <= max(3, min(64, len(array)))
    if not fits or array.dtype.kind not in "fiub":
        raise act.UserError(f"expected numbers (n, 3), got {array.dtype} of shape {array.shape}")
    points = np.array(array[:, :3], np.float64)
    bad = ~np.isfinite(points).all(axis=1)
    if bad.any() and not drop_invalid:
        raise act.UserError(f"expected finite points or --drop-invalid, got {bad.sum()} not finite")
    return points[~bad]


def read_points(path: AnyPath, drop_invalid: bool = False) -> np.ndarray:
    """The points of a file, (n, 3) float64 as stored; of a mesh MESH_POINTS of its surface."""
    suffix = Path(path).suffix.lower()
    with reading(path):
        if suffix not in READERS:
            way = CONVERSIONS.get(suffix, "not known")
            raise act.UserError(f"expected {' '.join(READERS)}, got {suffix!r}: {way}")
        with open(path, "rb") as file:
            if file.read(30).startswith(b"version https://git-lfs"):
                raise act.UserError("expected data, got a Git LFS pointer: git lfs pull")
        content = READERS[suffix](Path(path))
        array, faces = content if isinstance(content, tuple) else (content, [])
        points = check_points(array, drop_invalid and not faces)
        if faces:
            points = sample_mesh(points, faces)
        clouds.normalize(points)  # raises if all are equal
    return points


def read_cloud(
    path: AnyPath, points: int | None = 1024, normalized=True, drop_invalid=False, frame=None
) -> np.ndarray:
    """A file as a model takes it, (points, 3) float32: the farthest of limit_points' part, repeated
    if fewer; None: all. normalized=False: as stored, or with a model's frame (center, radius)."""
    normalized = normalized or frame is not None
    with reading(path):
        xyz = clouds.limit_points(read_points(path, drop_invalid))
        xyz = clouds.as_float32(xyz, normalized)
        if points is not None:
            chosen = np.arange(points) % len(xyz)
            if len(xyz) > points:
                chosen = act.farthest_point_sample(torch.from_numpy(xyz)[None], points)[0].numpy()
            xyz = clouds.as_float32(xyz[chosen], normalized)
        if frame is not None:
            xyz = np.float32(frame[1] * xyz + np.asarray(frame[0]))
        return xyz


def read_labelled(path: Path, first: int = 0, last: int = 256, drop_invalid: bool = False) -> tuple:
    """Rows x y z ... label of a .npy or text -> (n, 3) float64, labels first to last - 1, uint8."""
    with reading(path):
        rows = read_numpy(path) if path.suffix.lower() == ".npy" else read_text(path, labelled=True)
        xyz = check_points(rows, drop_invalid)
        finite = np.isfinite(rows[:, :3]).all(axis=1)
        labels = rows[:, 3:][finite, -1:].ravel()  # none if there are coordinates alone
        wrong = labels[~np.isin(labels, np.arange(first, last))]
        if len(wrong) > 0 or len(labels) == 0:
            expected = f"a last column of labels {first} to {last - 1}"
            raise act.UserError(f"expected {expected}, got {wrong[:3]}")
        return xyz, labels.astype(np.uint8)


def write_ply(path: AnyPath, xyz: np.ndarray, colors: np.ndarray | None = None) -> None:
    """xyz (N, 3), colors (N, 3) uint8 -> a binary .ply, in double where float would move a point by
    more than 1e-5 of the cloud's extent, or 0.001."""
    kind = "float"
    moved = np.abs(np.float32(xyz) - xyz).max()
    if moved > 1e-3 or 0 < 1e-5 * np.ptp(xyz, axis=0).max() < moved:
        kind = "double"
    rows = np.ascontiguousarray(xyz, {"float": "<f4", "double": "<f8"}[kind]).view(np.uint8)
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(xyz)}\n"
    head += f"property {kind} x\nproperty {kind} y\nproperty {kind} z\n"
    if colors is not None:
        head += "property uchar red\nproperty uchar green\nproperty uchar blue\n"
        rows = np.hstack([rows, np.asarray(colors, np.uint8)])
    with complete_file(path) as file:
        file.write(f"{head}end_header\n".encode() + rows.tobytes())
