"""One file to points, and points to a .ply.

    xyz = files.read_cloud("scan.ply")      # (1024, 3) float32 in the unit sphere
    xyz = files.read_points("chair.obj")    # (8192, 3) float64, sampled on the surface

Nothing in a file is executed. What is wrong is a UserError of one line that begins with its name.
"""

import importlib
import io
import os
import re
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Iterator

import numpy as np

import act
from util import clouds

MESH_POINTS = 8192  # sampled from a mesh
LABELLED = (".npy", ".txt", ".xyz", ".pts")  # forms that may hold a label for each point
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+|nan|inf)(?:e[-+]?\d+)?(?![^\s,;])"
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
    """Around one call of a foreign parser, whose errors of any type become a UserError."""
    try:
        yield
    except OSError:
        raise  # The file cannot be opened, which `reading` tells.
    except Exception as error:
        got = f"{type(error).__name__} {error}"
        raise act.UserError(f"expected readable data, got {got}") from error


@contextmanager
def complete_file(path: AnyPath) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` once complete; a failure leaves `path` as it was."""
    part = Path(f"{path}-{os.urandom(4).hex()}.tmp")
    try:
        with open(part, "xb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise act.UserError(f"{path}: expected to write it, got {error}") from error
    finally:
        part.unlink(missing_ok=True)


def list_files(folder: AnyPath, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files below a folder, sorted, but hidden ones. No link is followed back `above`."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in sorted(path for path in Path(folder).iterdir() if path.name[0] != "."):
        if path.is_dir():
            yield from list_files(path, above + (real,))
        else:
            yield path


def read_numpy(path: Path) -> np.ndarray:
    """The array of a .npy, mapped, or of a .npz: its only one, or points, xyz, data or pos."""
    with parsing():
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded as arrays:
        size = sum(member.file_size for member in arrays.zip.infolist())
        if size > max(2**26, 100 * path.stat().st_size):  # It would fill the memory.
            raise act.UserError(f"expected less packed data, got {size} bytes")
        names = list(arrays)
        if len(names) != 1:
            names = [name for name in ("points", "xyz", "data", "pos") if name in arrays]
        if not names:
            raise act.UserError(f"expected points, xyz, data or pos, got {list(arrays)[:5]}")
        with parsing():
            return arrays[names[0]]


def text_lines(path: AnyPath) -> list[str]:
    """The lines of a text that are not blank, without # and // comments."""
    text = Path(path).read_text("utf-8-sig", errors="replace")
    # The // in the corner 1//2 of an .obj is no comment: no blank stands before it.
    return [line for line in re.sub(r"(#|(?<!\S)//).*", "", text).split("\n") if line.strip()]


def holds_points(path: AnyPath) -> bool:
    """Whether a line in the first 64 KiB of a text begins with three numbers."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return bool(re.search(rf"(?im)^[ \t]*{NUMBER}([ \t,;]+{NUMBER}){{2}}", file.read(2**16)))


def read_text(path: Path, columns: tuple[int, ...] | None = (0, 1, 2)) -> np.ndarray:
    """Columns (None: all) of numbers between blanks , or ; below names or the number of rows."""
    rows = text_lines(path)
    for _ in range(2):
        if not rows or re.match(rf"(?i)\s*{NUMBER}[\s,;]+{NUMBER}", rows[0]):
            break
        head = rows.pop(0).strip()
        if head.isdecimal() and int(head) != len(rows):
            raise act.UserError(f"expected {head} points, got {len(rows)}")
    if not rows:
        raise act.UserError("expected lines of three numbers or more, got none")
    delimiter = next((mark for mark in ",;" if mark in rows[-1]), None)
    with parsing():
        return np.loadtxt(rows, delimiter=delimiter, usecols=columns, ndmin=2)


def triangulate(vertices: np.ndarray, faces: list) -> np.ndarray:
    """The corners of triangles, (t, 3, 3), that cover the faces, which may be any polygons."""
    by_size = {}
    for face in faces:
        by_size.setdefault(len(face), []).append(face)
    triangles = [np.zeros((0, 3, 3))]
    for size in sorted(by_size.keys() - {0, 1, 2}):
        corners = np.array(by_size[size])  # (m, size)
        if corners.dtype.kind not in "iu" or corners.min() < 0 or corners.max() >= len(vertices):
            got = f"got {corners.min()} to {corners.max()}"
            raise act.UserError(f"expected faces of vertices 0 to {len(vertices) - 1}, {got}")
        polygons = vertices[corners]  # (m, size, 3)
        first = np.broadcast_to(polygons[:, :1], (len(polygons), size - 2, 3))
        fans = np.stack([first, polygons[:, 1:-1], polygons[:, 2:]], axis=2)  # (m, size - 2, 3, 3)
        normals = np.cross(fans[:, :, 1] - first, fans[:, :, 2] - first)  # (m, size - 2, 3)
        total = normals.sum(axis=1)  # (m, 3), normal to the polygon
        upright = np.einsum("mtk,mk->mt", normals, total) > -1e-9 * (total**2).sum(axis=1)[:, None]
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
        height = np.reshape([low, high], (2, 1, 1))
        cuts = start + (height - start[:, [up]]) / step[:, [up]] * step  # (2, edges, 3)
        bottom, top = cuts[:, np.argsort(cuts[:, :, across].sum(axis=0))]
        gaps = np.diff([bottom[:, across], top[:, across]], axis=1)
        if gaps.min() < -1e-6 * np.ptp(polygon):
            raise act.UserError("expected faces that do not cross themselves, got one that does")
        triangles.append(np.stack([bottom[0::2], bottom[1::2], top[1::2]], axis=1))
        triangles.append(np.stack([bottom[0::2], top[1::2], top[0::2]], axis=1))
    return np.concatenate(triangles)


def sample_mesh(vertices: np.ndarray, faces: list) -> np.ndarray:
    """MESH_POINTS (n, 3) of the surface, always the same ones; without faces, the vertices."""
    vertices = check_points(vertices)
    if len(faces) == 0:
        return vertices
    triangles = triangulate(vertices, faces)
    a, b, c = np.moveaxis(triangles, 1, 0)  # (t, 3) each
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not 0 < area.sum() < np.inf:
        raise act.UserError(f"expected faces with an area, got {area.sum()}")
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(area), MESH_POINTS, p=area / area.sum())
    u, v = np.sort(rng.random((2, MESH_POINTS, 1)), axis=0)
    return a[chosen] + u * (b - a)[chosen] + (1 - v) * (c - a)[chosen]


def read_ply(path: Path) -> np.ndarray:
    """A .ply, by plyfile: elements and properties in any order, as text or binary."""
    plyfile = require("plyfile")
    head, end, body = path.read_bytes().partition(b"end_header")
    for count in re.findall(rb"[\r\n]element\s+\S+\s+(\d+)", head):
        if int(count) > path.stat().st_size:  # plyfile would first reserve memory for all.
            raise act.UserError(f"expected {int(count)} rows of an element, got a shorter file")
    # plyfile refuses comments that are not ASCII, and texts with the line ends of other systems.
    data = head.decode("ascii", "ignore").encode() + end + body
    stream = io.BytesIO(data)
    if re.search(rb"[\r\n]format\s+ascii", head):
        stream = io.StringIO(data.decode("latin-1"), newline=None)
    with parsing():
        elements = {element.name: element for element in plyfile.PlyData.read(stream)}
    if stream.read().strip():
        raise act.UserError(f"expected an end after {', '.join(elements)}, got more data")
    if "vertex" not in elements:
        raise act.UserError(f"expected an element vertex, got {', '.join(elements)}")
    vertex = elements["vertex"]
    names = {each.name.lower(): each.name for each in vertex.properties}
    if not {"x", "y", "z"} <= names.keys():
        raise act.UserError(f"expected vertices with x, y and z, got {', '.join(names)}")
    vertices = np.stack([vertex[names[axis]] for axis in "xyz"], axis=1)
    if "face" not in elements or len(elements["face"]) == 0:
        return sample_mesh(vertices, [])
    for each in elements["face"].properties:  # The list is vertex_indices or vertex_index.
        if each.name.startswith("vertex_ind") and isinstance(each, plyfile.PlyListProperty):
            return sample_mesh(vertices, list(elements["face"][each.name]))
    raise act.UserError("expected faces with a list vertex_indices, got none")


# By hand: trimesh 5 reads concave polygons, vertices from -1 and cut files wrong without a word.
def read_off(path: Path) -> np.ndarray:
    text = "\n".join(text_lines(path))
    lines = re.sub(r"^\s*((ST)?C?N?OFF|(st)?c?n?off)?\s*", "", text).split("\n")
    words = lines.pop(0).split()[:3]
    if len(words) < 2 or not all(word.isdecimal() for word in words):
        raise act.UserError(f"expected OFF and whole numbers, got {str(words)[:80]}")
    num_vertices, num_faces, num_edges = map(int, (words + ["0"])[:3])
    if len(lines) - num_vertices - num_faces not in (0, num_edges):  # Some have a line an edge.
        raise act.UserError(f"expected {num_vertices} + {num_faces} lines, got {len(lines)}")
    with parsing():
        vertices = np.array([line.split()[:3] for line in lines[:num_vertices]], np.float64)
    faces = []
    for line in lines[num_vertices:][:num_faces]:
        words = line.split()
        if not words[0].isdecimal() or int(words[0]) >= len(words):
            raise act.UserError(f"expected a face of {words[0][:20]} corners, got {line[:80]}")
        with parsing():
            faces.append([int(word) for word in words[1 : int(words[0]) + 1]])  # not its colour
    return sample_mesh(vertices, faces)


def read_obj(path: Path) -> np.ndarray:
    """An .obj. A corner is vertex/texture/normal; vertices count from 1, or back from -1."""
    text = re.sub(r"\\[ \t]*\n", " ", "\n".join(text_lines(path)))  # A backslash continues a line.
    vertices = []
    faces = []
    for line in text.split("\n"):
        words = line.split()
        if words[:1] == ["v"]:
            vertices.append(words[1:4])
        elif words[:1] == ["f"]:
            with parsing():
                corners = [int(word.split("/")[0]) for word in words[1:]]
            faces.append([len(vertices) + i if i < 0 else i - 1 for i in corners])
    with parsing():
        vertices = np.array(vertices, np.float64)
    return sample_mesh(vertices, faces)


READERS = {".npy": read_numpy, ".npz": read_numpy, ".txt": read_text, ".xyz": read_text}
READERS |= {".pts": read_text, ".ply": read_ply, ".off": read_off, ".obj": read_obj}


def check_points(array: np.ndarray) -> np.ndarray:
    """The first three columns of an array, (n, 3) float64; UserError unless they are finite."""
    array = np.asarray(array)
    # At most as many columns as rows, beyond three: an array (3, n) is turned, not a cloud.
    fits = array.ndim == 2 and 3 <= array.shape[1] <= max(3, min(64, len(array)))
    if not fits or array.dtype.kind not in "fiub":
        raise act.UserError(f"expected numbers (n, 3), got {array.dtype} of shape {array.shape}")
    points = np.array(array[:, :3], np.float64)
    broken = (~np.isfinite(points)).any(axis=1).sum()
    if broken > 0:
        raise act.UserError(f"expected finite points, got {broken} of {len(points)} not finite")
    return points


def read_points(path: AnyPath) -> np.ndarray:
    """The points of a file, (n, 3) float64 as stored; of a mesh MESH_POINTS of its surface."""
    suffix = Path(path).suffix.lower()
    with reading(path):
        if suffix not in READERS:
            raise act.UserError(f"expected {' '.join(READERS)}, got {suffix or 'no suffix'}")
        points = check_points(READERS[suffix](Path(path)))
        clouds.normalize(points)  # raises if all are equal
    return points


def read_cloud(path: AnyPath, points: int | None = 1024, normalized: bool = True) -> np.ndarray:
    """A file as a model takes it, (points, 3) float32: the farthest ones of limit_points' part; a
    smaller cloud is repeated, as in training. points=None: all of that part."""
    prepare = clouds.normalize if normalized else np.float32
    with reading(path):
        xyz = prepare(clouds.limit_points(read_points(path)))
        if points is None:
            return xyz
        chosen = np.arange(points) % len(xyz)
        if len(xyz) > points:
            chosen = clouds.farthest_points(xyz, points)
        return prepare(xyz[chosen])


def read_labelled(path: AnyPath, first: int = 0, last: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Rows x y z ... label of a .npy or text -> xyz (n, 3) float64, labels first to last - 1."""
    path = Path(path)
    with reading(path):
        is_numpy = path.suffix.lower() == ".npy"
        rows = read_numpy(path) if is_numpy else read_text(path, columns=None)
        xyz = check_points(rows)
        expected = f"a last column of labels {first} to {last - 1}"
        if rows.shape[1] == 3:
            raise act.UserError(f"expected {expected}, got coordinates alone")
        labels = np.asarray(rows[:, -1])
        fits = np.isin(labels, np.arange(first, last))
        if not fits.all():
            raise act.UserError(f"expected {expected}, got {labels[~fits][:9]}")
        return xyz, labels.astype(np.uint8)


def write_ply(
    path: AnyPath, xyz: np.ndarray, colors: np.ndarray | None = None, edges: np.ndarray | tuple = ()
) -> None:
    """xyz (N, 3), colors (N, 3) uint8, edges (E, 2) vertex indices -> a binary .ply."""
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(xyz)}\n"
    head += "property float x\nproperty float y\nproperty float z\n"
    rows = np.ascontiguousarray(xyz, "<f4").view(np.uint8)  # (N, 12)
    if colors is not None:
        head += "property uchar red\nproperty uchar green\nproperty uchar blue\n"
        rows = np.hstack([rows, np.asarray(colors, np.uint8)])
    head += f"element edge {len(edges)}\nproperty int vertex1\nproperty int vertex2\nend_header\n"
    with complete_file(path) as file:
        file.write(head.encode() + rows.tobytes() + np.asarray(edges, "<i4").tobytes())
