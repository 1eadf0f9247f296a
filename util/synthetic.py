"""Synthetic data: shapes of 23 categories with parts, scans of them, and furnished rooms.

A shape is a list of primitives (boxes, spheres ...) with y up. The same seed gives the same data.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from util.clouds import Clouds, Room, normalize

ROOM_CLASSES = "ceiling floor wall table chair sofa bed bookshelf lamp".split()
# Ceiling, floor and four walls: (label, axis, 0 or 1 for the axis's near or far end).
PLANES = ((0, 2, 1), (1, 2, 0), (2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1))
TOP_RADIUS = {"cylinder": 1.0, "shade": 0.5, "cone": 0.0, "pyramid": 0.0}  # 1 at the bottom
ORIGIN = (0, 0, 0)


# -- Primitives -----------------------------------------------------------------------------------
class Primitive(NamedTuple):
    part: int  # parts of a category are numbered from 0
    kind: str  # box, sphere, torus, cylinder, cone, shade, pyramid; axis y, or as in "cylinder_x"
    center: tuple
    size: tuple  # half its extent along x, y, z


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


def mirrored(part, kind, center, size):
    """Copies of a primitive at x and -x, and at z and -z unless z is 0: two or four of them."""
    x, y, z = center
    places = sorted({(-x, y, -z), (-x, y, z), (x, y, -z), (x, y, z)})
    return [Primitive(part, kind, place, size) for place in places]


def legs(part, thickness, x, length, z):
    return mirrored(part, "box", (x, -length, z), (thickness, length, thickness))


# -- Categories -----------------------------------------------------------------------------------
class Proportions:  # the random numbers `p` of which a category makes its list of primitives
    def __init__(self, rng):
        self.width, self.height, self.depth = rng.uniform(0.4, 1, 3)  # half of each
        self.thickness = rng.uniform(0.04, 0.1)  # half of it
        self.ratio, self.choice = rng.random(2)
        self.radius = self.width * (0.4 + 0.6 * self.ratio)
        self.small = 0.2 + 0.3 * self.ratio  # a factor
        self.short = self.height * self.small


def solid(kind, x, y, z):
    return [Primitive(0, kind, ORIGIN, (x, y, z))]


SOLIDS = {
    "sphere": lambda p: solid("sphere", p.width, p.width * (0.8 + 0.4 * p.ratio), p.width),
    "ellipsoid": lambda p: solid("sphere", p.width, p.height, p.depth),
    "box": lambda p: solid("box", p.width, p.height, p.depth * p.ratio + p.thickness),
    "cylinder": lambda p: solid("cylinder", p.radius, p.height, p.radius),
    "cone": lambda p: solid("cone" if p.choice > 0.3 else "shade", p.radius, p.height, p.radius),
    "pyramid": lambda p: solid("pyramid", p.width, p.height, p.depth),
    "torus": lambda p: solid("torus", p.width, p.width * p.small * 0.7, p.width),
}


def capsule(p):
    size = (p.radius, p.radius, p.radius)
    ends = [Primitive(1, "sphere", (0, y, 0), size) for y in (p.height, -p.height)]
    return solid("cylinder", p.radius, p.height, p.radius) + ends


def table(p):
    kind = "box" if p.choice > 0.3 else "cylinder"
    top = Primitive(0, kind, ORIGIN, (p.width, p.thickness, p.depth))
    return [top] + legs(1, p.thickness, p.width * p.small * 1.4, p.height, p.depth * p.small * 1.4)


def desk(p):
    side = (p.thickness, p.height, p.depth * 0.9)
    drawers = (p.width * 0.4 * p.choice + p.thickness, p.height, p.depth * 0.9)
    top = Primitive(0, "box", ORIGIN, (p.width, p.thickness, p.depth))
    left = Primitive(1, "box", (-p.width * 0.9, -p.height, 0), side)
    return [top, left, Primitive(2, "box", (p.width * 0.6, -p.height, 0), drawers)]


def stool(p):
    kind = "cylinder" if p.choice > 0.4 else "box"
    seat = Primitive(0, kind, ORIGIN, (p.radius, p.thickness, p.radius))
    return [seat] + legs(1, p.thickness, p.radius * 0.6, p.height * 0.8, p.radius * 0.6)


def chair(p):
    seat = Primitive(0, "box", ORIGIN, (p.radius, p.thickness, p.depth * 0.6))
    tall = p.short * 1.5
    back = Primitive(1, "box", (0, tall, -p.depth * 0.6), (p.radius, tall, p.thickness))
    return [seat, back] + legs(2, p.thickness, p.radius * 0.9, p.height * 0.5, p.depth * 0.5)


def sofa(p):
    thick = 2 * p.thickness
    seat = Primitive(0, "box", ORIGIN, (p.width, p.height * 0.3, p.depth * 0.6))
    back = Primitive(1, "box", (0, p.short, -p.depth * 0.6), (p.width, p.height * 0.5, thick))
    arm = (thick, p.short, p.depth * 0.6)
    return [seat, back] + mirrored(2, "box", (p.width, p.height * 0.2, 0), arm)


def bed(p):
    mattress = Primitive(0, "box", ORIGIN, (p.radius, p.height * 0.2, p.depth))
    head = Primitive(1, "box", (0, p.short, -p.depth), (p.radius, p.height * 0.5, p.thickness))
    length = p.height * 0.4 * p.choice
    return [mattress, head] + legs(2, p.thickness, p.radius * 0.9, length, p.depth * 0.9)


def bookshelf(p):
    shelf = mirrored(0, "box", (p.radius, 0, 0), (p.thickness, p.height, p.depth * 0.3))
    board_size = (p.radius, p.thickness / 2, p.depth * 0.3)
    for y in np.linspace(-1, 1, 3 + int(3 * p.choice)):
        shelf.append(Primitive(1, "box", (0, p.height * y, 0), board_size))
    return shelf


def door(p):
    center = (p.radius * 0.8, p.height * 0.2 * p.choice, p.thickness + 0.05)
    knob = Primitive(1, "sphere", center, (p.thickness, p.thickness, p.thickness))
    return solid("box", p.radius, p.height, p.thickness) + [knob]


def lamp(p):
    kind = "shade" if p.choice > 0.4 else "cone"
    foot = Primitive(0, "cylinder", (0, -p.height, 0), (p.width * 0.4, p.thickness, p.width * 0.4))
    pole = Primitive(1, "cylinder", ORIGIN, (p.thickness / 2, p.height, p.thickness / 2))
    shade = Primitive(2, kind, (0, p.height, 0), (p.width * 0.5, p.short, p.width * 0.5))
    return [foot, pole, shade]


def mug(p):
    handle = Primitive(1, "torus_z", (p.radius * 1.1, 0, 0), (p.short, p.short, p.thickness))
    return solid("cylinder", p.radius, p.height, p.radius) + [handle]


def bottle(p):
    wide = p.radius / 2
    narrow = p.radius / 4
    neck_y = p.height * (1.4 + p.small * p.choice)
    body = Primitive(0, "cylinder", ORIGIN, (wide, p.height, wide))
    shoulder = Primitive(1, "shade", (0, p.height * 1.2, 0), (wide, p.height * 0.2, wide))
    neck = Primitive(2, "cylinder", (0, neck_y, 0), (narrow, p.short * p.choice, narrow))
    return [body, shoulder, neck]


def aeroplane(p):
    thick = p.thickness * 2
    thin = p.thickness / 4
    body = Primitive(0, "sphere", ORIGIN, (p.width * 1.3, thick, thick))
    wings = Primitive(1, "box", (p.width * p.small, 0, 0), (p.width * 0.2, thin, p.depth))
    tail = Primitive(2, "box", (-p.width * 1.1, p.short / 2, 0), (p.width * 0.1, p.short / 2, thin))
    return [body, wings, tail]


def car(p):
    low = p.height * 0.2
    cabin_center = (-p.width * p.small * 0.5, p.height * 0.35, 0)
    body = Primitive(0, "box", ORIGIN, (p.width, low, p.depth * 0.45))
    cabin = Primitive(1, "box", cabin_center, (p.width * 0.5, low, p.depth * 0.4))
    wheel = (p.width * 0.6, -low, p.depth * 0.4)
    return [body, cabin] + mirrored(2, "cylinder_z", wheel, (low, low, p.thickness))


def rocket(p):
    wide = p.radius / 2
    thin = p.thickness / 4
    low = (0, -p.height * 0.8, 0)
    body = Primitive(0, "cylinder", ORIGIN, (wide, p.height, wide))
    tip = Primitive(1, "cone", (0, p.height * (1 + p.small), 0), (wide, p.short, wide))
    fin = Primitive(2, "box", low, (thin, p.height * 0.2, p.radius + thin))
    return [body, tip, fin, Primitive(2, "box", low, (p.radius + thin, p.height * 0.2, thin))]


def dumbbell(p):
    kind = "sphere" if p.choice > 0.5 else "cylinder_x"
    bar = Primitive(0, "cylinder_x", ORIGIN, (p.width, p.thickness, p.thickness))
    return [bar] + mirrored(1, kind, (p.width, 0, 0), (p.width * p.small, p.short, p.short))


COMPOSED = [capsule, table, desk, stool, chair, sofa, bed, bookshelf, door, lamp]
COMPOSED += [mug, bottle, aeroplane, car, rocket, dumbbell]
CATEGORIES = SOLIDS | {shape.__name__: shape for shape in COMPOSED}


# -- Shapes and scans -----------------------------------------------------------------------------
def synthetic_cloud(name: str, num_points: int, rng: np.random.Generator) -> tuple:
    """A random upright shape of a category -> points (num_points, 3) float64, their parts."""
    primitives = CATEGORIES[name](Proportions(rng))
    x, y, z = np.array([primitive.size for primitive in primitives]).T
    density = np.exp(0.4 * rng.normal(size=len(primitives)))
    share = (x * z + y * x + z * y) ** 0.75 * density  # areas, levelled so that small parts show
    counts = rng.multinomial(num_points, share / share.sum())
    points = []
    for primitive, count in zip(primitives, counts, strict=True):
        surface = sample_surface(primitive.kind, primitive.size, count, rng)
        points.append(surface + primitive.center)
    parts = np.repeat([primitive.part for primitive in primitives], counts)
    return np.concatenate(points), parts


def rotate(xyz, axes, angle):
    """Points turned by an angle in the plane of two axes."""
    cos = math.cos(angle)
    sin = math.sin(angle)
    rotated = xyz.copy()
    rotated[:, axes] = xyz[:, axes] @ [[cos, -sin], [sin, cos]]
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
        num_parts = CATEGORIES[name](Proportions(np.random.default_rng(0)))[-1].part + 1
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


# -- Rooms ----------------------------------------------------------------------------------------
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


def synthetic_room(area, number, density):
    """Four to seven pieces of furniture stand on the floor; one that finds no place is left out."""
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


def synthetic_rooms(numbers: list[tuple[int, int]], density: float) -> list[Room]:
    """Rooms of (area, number) pairs, each of which seeds its room: `density` points per m²."""
    return [synthetic_room(area, number, density) for area, number in numbers]
