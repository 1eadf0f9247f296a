"""Synthetic data: shapes of 23 categories with parts, scans of them, and furnished rooms.

A shape is a list of primitives (boxes, spheres ...) with y up. The same seed gives the same data.
"""

import math

import numpy as np
import torch

from util.clouds import Clouds, Room, normalize

ROOM_CLASSES = "ceiling floor wall table chair sofa bed bookshelf lamp".split()
# Ceiling, floor and four walls: (label, axis, 0 or 1 for the axis's near or far end).
PLANES = ((0, 2, 1), (1, 2, 0), (2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1))
TOP_RADIUS = {"cylinder": 1.0, "shade": 0.5, "cone": 0.0, "pyramid": 0.0}  # 1 at the bottom
HERE = [(0, 0, 0)]
CATEGORIES = "sphere ellipsoid box cylinder cone pyramid torus capsule table desk stool".split()
CATEGORIES += "chair sofa bed bookshelf door lamp mug bottle aeroplane car rocket dumbbell".split()


def sample_surface(kind, size, n, rng):
    """n random points on the surface of a primitive about the origin -> (n, 3) float64."""
    kind, _, axis = kind.partition("_")
    order = {"": [0, 1, 2], "x": [1, 0, 2], "z": [0, 2, 1]}[axis]  # exchanges y with another axis
    size = np.array(size)[order]
    height = rng.uniform(-1, 1, n)
    turn = rng.uniform(0, 2 * np.pi, n)
    ring = np.stack([np.cos(turn), np.sin(turn)])
    if kind == "box":
        points = rng.uniform(-1, 1, (n, 3))
        weight = np.cumsum(1 / size)  # the area of two opposite faces is volume / size
        across = np.searchsorted(weight[:2] / weight[2], rng.random(n))
        points[np.arange(n), across] = np.sign(height)
        return (points * size)[:, order]
    if kind == "sphere":
        radius = np.sqrt(1 - height**2)
    elif kind == "torus":
        radius = 1 - size[1] / size[0] * (1 - np.cos(np.pi * height))
        height = np.sin(np.pi * height)
    else:  # cylinder, cone, shade (a cone whose top is cut off) or pyramid, with caps
        cap = rng.random(n) < size[0] / (size[0] + 2 * size[1])
        height = np.where(cap, np.sign(height), height)
        radius = 1 + (TOP_RADIUS[kind] - 1) * (height + 1) / 2
        radius = radius * np.where(cap, np.sqrt(rng.random(n)), 1)
    if kind == "pyramid":
        ring /= np.abs(ring).max(0)  # a square
    return (np.stack([radius * ring[0], height, radius * ring[1]], 1) * size)[:, order]


class Proportions:  # the random numbers of which a shape is made
    def __init__(self, rng):
        self.x, self.y, self.z = rng.uniform(0.4, 1, 3)  # half extents
        self.edge = rng.uniform(0.04, 0.1)  # half a thickness
        self.ratio, self.choice = rng.random(2)
        self.r = self.x * (0.4 + 0.6 * self.ratio)
        self.small = 0.2 + 0.3 * self.ratio  # a factor
        self.short = self.y * self.small
        self.low = self.y * 0.2
        self.slim = self.r / 2
        self.thick = self.edge * 2
        self.thin = self.edge / 4
        self.drawer = self.x * 0.4 * self.choice + self.edge
        self.neck = self.y * (1.4 + self.small * self.choice)  # how high
        self.tube = (self.r, self.y, self.r)
        self.top = (self.x, self.edge, self.z)
        self.knob = (self.edge, self.edge, self.edge)
        self.shade = (self.x * 0.5, self.short, self.x * 0.5)
        self.fin = (self.x * 0.1, self.short / 2, self.thin)
        self.weight = (self.x * self.small, self.short, self.short)


def mirrored(x, y, z):
    """The places at x and -x, and at z and -z unless z is 0: two or four of them."""
    return sorted({(-x, y, -z), (-x, y, z), (x, y, -z), (x, y, z)})


def legs(category, part, p, x, length, z):
    return category, part, "box", mirrored(x, -length, z), (p.edge, length, p.edge)


# A row: category, number of its part, primitive (axis y, or as in cylinder_x), centers of its
# copies, half its extent along x, y, z.
def solids(p):
    return [
        ("sphere", 0, "sphere", HERE, (p.x, p.x * (0.8 + 0.4 * p.ratio), p.x)),
        ("ellipsoid", 0, "sphere", HERE, (p.x, p.y, p.z)),
        ("box", 0, "box", HERE, (p.x, p.y, p.z * p.ratio + p.edge)),
        ("cylinder", 0, "cylinder", HERE, p.tube),
        ("cone", 0, "cone" if p.choice > 0.3 else "shade", HERE, p.tube),
        ("pyramid", 0, "pyramid", HERE, (p.x, p.y, p.z)),
        ("torus", 0, "torus", HERE, (p.x, p.x * p.small * 0.7, p.x)),
        ("capsule", 0, "cylinder", HERE, p.tube),
        ("capsule", 1, "sphere", [(0, p.y, 0), (0, -p.y, 0)], (p.r, p.r, p.r)),
    ]


def objects(p):
    ends = mirrored(p.x, 0, 0)
    boards = [(0, y, 0) for y in p.y * np.linspace(-1, 1, 3 + int(3 * p.choice))]
    return [
        ("table", 0, "box" if p.choice > 0.3 else "cylinder", HERE, p.top),
        legs("table", 1, p, p.x * p.small * 1.4, p.y, p.z * p.small * 1.4),
        ("desk", 0, "box", HERE, p.top),
        ("desk", 1, "box", [(-p.x * 0.9, -p.y, 0)], (p.edge, p.y, p.z * 0.9)),
        ("desk", 2, "box", [(p.x * 0.6, -p.y, 0)], (p.drawer, p.y, p.z * 0.9)),
        ("stool", 0, "cylinder" if p.choice > 0.4 else "box", HERE, (p.r, p.edge, p.r)),
        legs("stool", 1, p, p.r * 0.6, p.y * 0.8, p.r * 0.6),
        ("chair", 0, "box", HERE, (p.r, p.edge, p.z * 0.6)),
        ("chair", 1, "box", [(0, p.short * 1.5, -p.z * 0.6)], (p.r, p.short * 1.5, p.edge)),
        legs("chair", 2, p, p.r * 0.9, p.y * 0.5, p.z * 0.5),
        ("sofa", 0, "box", HERE, (p.x, p.y * 0.3, p.z * 0.6)),
        ("sofa", 1, "box", [(0, p.short, -p.z * 0.6)], (p.x, p.y * 0.5, p.thick)),
        ("sofa", 2, "box", mirrored(p.x, p.low, 0), (p.thick, p.short, p.z * 0.6)),
        ("bed", 0, "box", HERE, (p.r, p.low, p.z)),
        ("bed", 1, "box", [(0, p.short, -p.z)], (p.r, p.y * 0.5, p.edge)),
        legs("bed", 2, p, p.r * 0.9, p.y * 0.4 * p.choice, p.z * 0.9),
        ("bookshelf", 0, "box", mirrored(p.r, 0, 0), (p.edge, p.y, p.z * 0.3)),
        ("bookshelf", 1, "box", boards, (p.r, p.edge / 2, p.z * 0.3)),
        ("door", 0, "box", HERE, (p.r, p.y, p.edge)),
        ("door", 1, "sphere", [(p.r * 0.8, p.low * p.choice, p.edge + 0.05)], p.knob),
        ("lamp", 0, "cylinder", [(0, -p.y, 0)], (p.x * 0.4, p.edge, p.x * 0.4)),
        ("lamp", 1, "cylinder", HERE, (p.edge / 2, p.y, p.edge / 2)),
        ("lamp", 2, "shade" if p.choice > 0.4 else "cone", [(0, p.y, 0)], p.shade),
        ("mug", 0, "cylinder", HERE, p.tube),
        ("mug", 1, "torus_z", [(p.r * 1.1, 0, 0)], (p.short, p.short, p.edge)),
        ("bottle", 0, "cylinder", HERE, (p.slim, p.y, p.slim)),
        ("bottle", 1, "shade", [(0, p.y * 1.2, 0)], (p.slim, p.low, p.slim)),
        ("bottle", 2, "cylinder", [(0, p.neck, 0)], (p.slim / 2, p.short * p.choice, p.slim / 2)),
        ("aeroplane", 0, "sphere", HERE, (p.x * 1.3, p.thick, p.thick)),
        ("aeroplane", 1, "box", [(p.x * p.small, 0, 0)], (p.x * 0.2, p.thin, p.z)),
        ("aeroplane", 2, "box", [(-p.x * 1.1, p.short / 2, 0)], p.fin),
        ("car", 0, "box", HERE, (p.x, p.low, p.z * 0.45)),
        ("car", 1, "box", [(-p.x * p.small * 0.5, p.y * 0.35, 0)], (p.x * 0.5, p.low, p.z * 0.4)),
        ("car", 2, "cylinder_z", mirrored(p.x * 0.6, -p.low, p.z * 0.4), (p.low, p.low, p.edge)),
        ("rocket", 0, "cylinder", HERE, (p.slim, p.y, p.slim)),
        ("rocket", 1, "cone", [(0, p.y * (1 + p.small), 0)], (p.slim, p.short, p.slim)),
        ("rocket", 2, "box", [(0, -p.y * 0.8, 0)], (p.thin, p.low, p.r + p.thin)),
        ("rocket", 2, "box", [(0, -p.y * 0.8, 0)], (p.r + p.thin, p.low, p.thin)),
        ("dumbbell", 0, "cylinder_x", HERE, (p.x, p.edge, p.edge)),
        ("dumbbell", 1, "sphere" if p.choice > 0.5 else "cylinder_x", ends, p.weight),
    ]


def make_shape(name, rng):
    """The primitives of a random shape of a category: a part, kind, center and size of each."""
    p = Proportions(rng)
    primitives = []
    for category, part, kind, centers, size in solids(p) + objects(p):
        if category == name:
            primitives += [(part, kind, center, size) for center in centers]
    return primitives


def synthetic_cloud(name: str, num_points: int, rng: np.random.Generator) -> tuple:
    """A random upright shape of a category -> points (num_points, 3) float64, their parts."""
    primitives = make_shape(name, rng)
    x, y, z = np.array([size for _, _, _, size in primitives]).T
    density = np.exp(0.4 * rng.normal(size=len(primitives)))
    share = (x * z + y * x + z * y) ** 0.75 * density  # areas, levelled so that small parts show
    counts = rng.multinomial(num_points, share / share.sum())
    points = []
    for (_, kind, center, size), count in zip(primitives, counts, strict=True):
        points.append(sample_surface(kind, size, count, rng) + center)
    return np.concatenate(points), np.repeat([part for part, _, _, _ in primitives], counts)


def rotate(xyz, axes, angle):
    """Points turned by an angle in the plane of two axes."""
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    rotated = xyz.copy()
    rotated[:, axes] = xyz[:, axes] @ turn
    return rotated


def synthetic_scan(name, num_points, rng):
    """A cloud turned, tilted by up to 15 degrees, denser on its near side, the far side often
    missing, with noise; and its parts."""
    xyz, part = synthetic_cloud(name, 2 * num_points, rng)
    xyz = rotate(xyz, [0, 2], rng.uniform(-np.pi, np.pi))
    xyz = rotate(xyz, [0, 1], rng.uniform(0, np.pi / 12))
    side = rng.normal(size=3)
    depth = normalize(xyz) @ (side / np.linalg.norm(side))
    keys = rng.exponential(size=len(xyz)) * np.exp(rng.uniform(0, 1.5) * depth)
    if rng.random() < 0.5:
        keys[depth > np.quantile(depth, rng.uniform(0.65, 1))] = np.inf
    kept = np.argpartition(keys, num_points)[:num_points]  # of the smallest keys
    xyz = normalize(xyz[kept])
    return normalize(xyz + 0.02 * rng.normal(size=xyz.shape)), part[kept]


def synthetic_clouds(num_per_class: int, seed: int = 0, num_points: int = 2048) -> Clouds:
    """`num_per_class` scans of each category with their parts, in the order of the classes. Cloud i
    of class c depends on (seed, c, i) alone. Parts are numbered on from class to class."""
    points = []
    parts = []
    part_ranges = []
    names = []
    first = 0
    for c, name in enumerate(CATEGORIES):
        for i in range(num_per_class):
            xyz, part = synthetic_scan(name, num_points, np.random.default_rng([seed, c, i]))
            points.append(torch.from_numpy(xyz))
            parts.append(torch.from_numpy(part + first))
            names.append(f"{name}_{seed}_{i:04d}")
        num_parts = make_shape(name, np.random.default_rng(0))[-1][0] + 1
        part_ranges.append((first, first + num_parts))
        first += num_parts
    offsets = torch.arange(len(names) + 1) * num_points
    classes = list(CATEGORIES)
    labels = torch.arange(len(classes)).repeat_interleave(num_per_class)
    return Clouds(torch.cat(points), offsets, names, labels, classes, torch.cat(parts), part_ranges)


def compositions(clouds: Clouds) -> Clouds:
    """The clouds of the classes that have several parts; classes and parts are renumbered."""
    ranges = torch.tensor(clouds.part_ranges)  # (classes, 2)
    classes = (ranges.diff() > 1).nonzero()[:, 0]
    parts = torch.cat([torch.arange(first, end) for first, end in ranges[classes].tolist()])
    chosen = clouds.select(torch.isin(clouds.labels, classes).nonzero())
    chosen.labels = torch.searchsorted(classes, chosen.labels)  # the place in a sorted list
    chosen.classes = [clouds.classes[c] for c in classes]
    chosen.parts = torch.searchsorted(parts, chosen.parts)
    chosen.part_ranges = torch.searchsorted(parts, ranges[classes]).tolist()
    return chosen


def furniture(label, num_points, rng):
    """A piece of furniture, z up, turned about z, its lowest corner at 0 -> points (n, 3)."""
    shape, _ = synthetic_cloud(ROOM_CLASSES[label], num_points, rng)
    x, z, y = 0.6 * shape.T  # metres; shapes have y up
    turn = rng.uniform(0, 2 * math.pi)
    cos = math.cos(turn)
    sin = math.sin(turn)
    xyz = np.stack([cos * x - sin * y, sin * x + cos * y, z], 1)
    return xyz - xyz.min(0)


def find_place(extent, size, boxes, rng):
    """The lowest corner (3,) of a random free place on the floor; None if none was found."""
    free = size - extent
    if not (free > 0.1).all():
        return None
    for _ in range(20):
        place = np.append(rng.uniform(0.05, free[:2] - 0.05 + 1e-9), 0)
        overlaps = [(place <= high) & (low <= place + extent) for _, low, high in boxes]
        if not any(axes[:2].all() for axes in overlaps):
            return place
    return None


def synthetic_room(area: int, number: int, density: float) -> Room:
    """The room of a seed (area, number), `density` points per m². Four to seven pieces of furniture
    stand on the floor; one that finds no place is left out."""
    rng = np.random.default_rng((area, number))
    size = np.append(rng.uniform(2.5, 4, 2), rng.uniform(2.3, 2.8))
    pieces = []  # (label, points (n, 3))
    for label, axis, far in PLANES:
        plane = rng.random((int(density * np.delete(size, axis).prod()), 3)) * size
        plane[:, axis] = far * size[axis]
        pieces.append((label, plane))
    boxes = []
    for _ in range(rng.integers(4, 8)):
        label = int(rng.integers(3, len(ROOM_CLASSES)))  # after the wall
        xyz = furniture(label, int(2.5 * density), rng)
        extent = xyz.max(0)
        low = find_place(extent, size, boxes, rng)
        if low is not None:
            pieces.append((label, xyz + low))
            boxes.append((label, low, low + extent))
    xyz = np.concatenate([points for _, points in pieces])
    labels = np.concatenate([np.full(len(points), label, np.uint8) for label, points in pieces])
    xyz = (xyz + 0.01 * rng.normal(size=xyz.shape)).astype(np.float32)
    return Room(f"Area_{area}_room_{number}", area, xyz, labels, boxes)
