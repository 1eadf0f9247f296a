"""Clouds of points in memory, many in one tensor: samples, normalising, augmentation.

    xyz, _ = clouds.sample(torch.arange(32), num_points=1024)    # (32, 1024, 3)

Letters in shapes: B clouds of a batch, N points of each, T points of all clouds.
"""

import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

import act

MAX_POINTS = 16384  # A larger cloud keeps a random part of this size.
MAX_WIDTH = 200  # metres; a wider room is in other units
Random = Generator | None  # None: torch's own
Share = tuple[int, int]  # (rank, world): clouds rank::world of a batch


class Room(NamedTuple):  # in metres, z up
    name: str
    area: int  # part of the building, for training or for test
    xyz: np.ndarray  # (n, 3) float32
    labels: np.ndarray  # (n,) uint8, one per point
    boxes: list = ()  # (class, lowest corner, highest corner) of each object


class Scene(NamedTuple):  # in metres, z up
    name: str
    xyz: np.ndarray  # (n, 3) float32
    boxes: np.ndarray  # (m, 6) float32, center and size
    labels: np.ndarray  # (m,) int64, one per box


def identity(name: str, *arrays: np.ndarray) -> str:
    """A name and a checksum of arrays, by which --resume notices others."""
    return f"{name} {zlib.crc32(b''.join(array.tobytes() for array in arrays))}"


@dataclass
class Clouds:
    """Clouds of any sizes, one after another: cloud i is points[offsets[i] : offsets[i + 1]]."""

    points: Tensor  # (T, 3) float32, possibly mapped from a file
    offsets: Tensor  # (number of clouds + 1,) int64
    names: list[str]
    labels: Tensor | None = None  # one per cloud, int64 indices into classes
    classes: list[str] = field(default_factory=list)
    parts: Tensor | None = None  # (T,) int64, one per point
    part_ranges: list | None = None  # (first, last + 1) of each class's parts
    part_names: list[str] = field(default_factory=list)  # if the data set has them
    normalized: bool = True  # False: samples are used as stored
    largest: int = 0  # points of the largest, if known: no wait for a GPU
    distinct: Tensor | None = None  # what count_distinct tells, if known

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Tensor:
        """The points of cloud i, (n, 3) float32, without a copy."""
        return self.points[self.offsets[i] : self.offsets[i + 1]]

    def identities(self) -> list[str]:
        """Each cloud's name, size, ends and points' labels, for --resume."""
        places = torch.stack([self.offsets[:-1], self.offsets[1:] - 1], dim=1)
        ends = self.points[places].cpu().numpy()  # (number of clouds, 2, 3)
        sizes = self.offsets.diff().tolist()
        marks = [0] * len(self)
        if self.parts is not None:
            marks = [zlib.crc32(part.numpy()) for part in self.parts.cpu().split(sizes)]
        rows = zip(self.names, sizes, ends, marks, strict=True)
        return [f"{name} {size} {end.tobytes().hex()} {mark}" for name, size, end, mark in rows]

    def to(self, device: torch.device | str) -> "Clouds":
        """The same clouds with all tensors on `device`."""
        moved = {name: x.to(device) for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **moved, largest=int(self.offsets.diff().max()))

    def select(self, indices: Tensor | list[int] | range) -> "Clouds":
        """The clouds `indices`, in that order; a view if they follow one another."""
        indices = torch.as_tensor(indices).reshape(-1)
        start = self.offsets[indices]
        size = self.offsets.diff()[indices]
        offsets = torch.nn.functional.pad(size.cumsum(0), (1, 0))
        if (indices.diff() == 1).all():
            rows = slice(int(start[0]), int(start[-1] + size[-1]))
        else:
            rows = (start - offsets[:-1]).repeat_interleave(size)
            rows += torch.arange(len(rows), device=rows.device)
        tensors = {"points": self.points[rows], "offsets": offsets}
        for name, chosen in (("labels", indices), ("distinct", indices), ("parts", rows)):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)[chosen]
        return replace(self, names=[self.names[i] for i in indices.tolist()], **tensors)

    def frame(self) -> tuple[tuple, float]:
        """The means of the clouds' centroids and of their largest distances from them; those of
        the unit sphere for clouds that samples normalise."""
        if self.normalized:
            return (0.0, 0.0, 0.0), 1.0
        frames = []
        for cloud in self.points.split(self.offsets.diff().tolist()):
            center = cloud.double().mean(0)
            frames.append(torch.hstack([center, (cloud - center).norm(dim=1).max()]))
        x, y, z, radius = torch.stack(frames).mean(0).tolist()
        return (x, y, z), radius

    def sample(self, indices: Tensor, num_points: int, generator=None, share=(0, 1)) -> tuple:
        """A random `num_points` of each, a smaller one repeated: xyz (B, num_points, 3) on the
        generator's device, normalised if `normalized`, and flat, their rows of `points`."""
        rank, world = share
        device = self.points.device if generator is None else generator.device
        indices = indices.to(self.offsets.device, non_blocking=True)
        size = self.offsets.diff()[indices].to(device)  # (B,)
        largest = self.largest or int(size.max())
        # Places in the order of random keys; a key of 2 is beyond a cloud's end.
        keys = torch.rand(len(size), largest, generator=generator, device=device)[rank::world]
        start = self.offsets[indices[rank::world]].to(device)
        size = size[rank::world]
        keys.masked_fill_(torch.arange(largest, device=device) >= size[:, None], 2)
        order = keys.topk(min(num_points, largest), largest=False).indices
        turn = torch.arange(num_points, device=device) % size[:, None]  # (B, num_points)
        flat = (start[:, None] + order.gather(1, turn)).to(self.points.device)
        xyz = self.points[flat].to(device)
        if self.normalized:
            xyz = unit_sphere(xyz)
        return xyz, flat


def count_points(xyz: np.ndarray) -> int:
    """How many different points a cloud (n, 3) has."""
    x, y, z = xyz.astype(np.float64).T
    key = x + 2**0.5 * y + 3**0.5 * z  # another one for another point, to double precision
    return 1 + np.count_nonzero(np.diff(np.sort(key)))


def count_distinct(points: Tensor, offsets: Tensor) -> Tensor:
    """count_points of each cloud, (number of clouds,) int64."""
    sizes = offsets.diff().tolist()
    return torch.tensor([count_points(cloud.numpy()) for cloud in points.cpu().split(sizes)])


def check_sizes(splits: list[Clouds], c, points: int) -> int:
    """The fewest distinct points of a sample. UserError unless they do for a model's patches."""
    if points < c.group_size:
        raise act.UserError(f"--points: expected {c.group_size} or more, got {points}")
    fewest = points
    for split in splits:
        distinct = split.distinct
        if distinct is None:
            distinct = count_distinct(split.points, split.offsets)
        for name, count in zip(split.names, distinct.tolist(), strict=True):
            fewest = min(fewest, count)
            if fewest < c.num_group:
                expected = f"expected {c.num_group} distinct --points"
                raise act.UserError(f"{name}: {expected}, got {fewest}")
    return fewest


@torch.no_grad()
def each_cloud(function: Callable, clouds: Clouds, num_points: int | None = None) -> list:
    """What `function` of (B, n, 3) gives for each cloud; n: its size, or num_points, repeated."""
    sizes = clouds.offsets.diff()
    seen = sizes if num_points is None else torch.full_like(sizes, num_points)
    values = [None] * len(clouds)
    for size in seen.unique().tolist():
        for indices in (seen == size).nonzero()[:, 0].split(64):
            turn = torch.arange(size, device=sizes.device) % sizes[indices][:, None]
            xyz = clouds.points[clouds.offsets[indices][:, None] + turn]  # (B, size, 3)
            if num_points is not None and clouds.normalized:
                xyz = unit_sphere(xyz)
            for i, value in zip(indices.tolist(), function(xyz), strict=True):
                values[i] = value
    return values


def subsample(clouds: Clouds, num_points: int, device: torch.device | str) -> Clouds:
    """The clouds on `device`, each thinned to its 75/64 num_points farthest points, in order:
    training samples 1024 of 1200 or 2048 of 2400 (Sec. 5), evaluation takes the first."""

    def farthest(xyz):
        count = min(num_points * 75 // 64, xyz.shape[1])
        if count <= num_points:
            return xyz
        order = act.farthest_point_sample(xyz.to(device), count)
        return act.gather_points(xyz, order.to(xyz.device))

    kept = each_cloud(farthest, clouds)
    offsets = torch.tensor([0] + [len(xyz) for xyz in kept]).cumsum(0)
    less = replace(clouds, points=torch.cat(kept), offsets=offsets, parts=None, distinct=None)
    return less.to(device)


def normalize(points: np.ndarray) -> np.ndarray:
    """(n, 3) -> float32, centroid 0, radius 1; UserError if all are equal."""
    points = np.asarray(points, np.float64)
    if len(points) == 0 or (points == points[0]).all():
        raise act.UserError(f"expected different points, got {len(points)} at one place")
    points = points / np.abs(points).max()  # so that no square overflows
    points = points - points.mean(0)
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


def origin(points: np.ndarray) -> np.ndarray:
    """The centroid (3,) of points over 1000 times their radius away, as on a map; else 0."""
    center = points.mean(axis=0)
    if np.linalg.norm(center) > 1000 * np.linalg.norm(points - center, axis=1).max():
        return center
    return np.zeros(3)


def as_float32(points: np.ndarray, normalized: bool = True) -> np.ndarray:
    """Points (n, 3) float64 -> float32, normalised, or as stored less their origin."""
    if normalized:
        return normalize(points)
    return (points - origin(points)).astype(np.float32)


def unit_sphere(xyz: Tensor) -> Tensor:
    """`normalize` for every cloud of a batch (B, N, 3); equal points become 0."""
    xyz = xyz.double() - xyz.double().mean(1, keepdim=True)
    return (xyz / xyz.norm(dim=2).amax(1)[:, None, None].clamp(min=1e-12)).float()


def limit_points(rows: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS rows, chosen at random, the same places for one length."""
    if len(rows) <= MAX_POINTS:
        return rows
    return rows[np.random.default_rng(0).choice(len(rows), MAX_POINTS, replace=False)]


def random_rows(xyz: Tensor, columns: int, generator: Random, share: Share) -> Tensor:
    """U(0, 1) for the clouds xyz of a share, (B, 1, columns), drawn for the whole batch."""
    rank, world = share
    return xyz.new_empty(len(xyz) * world, 1, columns).uniform_(generator=generator)[rank::world]


def scale_translate(
    xyz: Tensor, generator: Random, scale=(2 / 3, 3 / 2), shift=0.2, per_axis=True, share=(0, 1)
) -> Tensor:
    """Clouds (B, N, 3), each scaled by U(*scale), moved by U(-shift, shift)."""
    num_factors = 3 if per_axis else 1
    factor = scale[0] + (scale[1] - scale[0]) * random_rows(xyz, num_factors, generator, share)
    return xyz * factor + shift * (2 * random_rows(xyz, 3, generator, share) - 1)


def rotate_y(xyz: Tensor, generator: Random, share: Share = (0, 1)) -> Tensor:
    """Each cloud of xyz (B, N, 3) turned about the y axis by its own U(0, 2 pi)."""
    angle = 2 * math.pi * random_rows(xyz, 1, generator, share)[:, 0]  # (B, 1)
    cos = angle.cos()
    sin = angle.sin()
    x, y, z = xyz.unbind(2)  # (B, N) each
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], dim=2)
