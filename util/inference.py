"""A trained model on whole clouds: a feature of each cloud, a label for each of its points."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import act
from util import clouds, pictures, run

BLOCK = 1.0  # metres, the side of a room's blocks
STRIDE = 0.5  # metres from block to block
MARGIN = 0.001  # metres around a block, so that rounding loses no point at a wall
BATCH_SIZE = 16


@torch.no_grad()
def cloud_feature(model: nn.Module, xyz: torch.Tensor) -> torch.Tensor:
    """The frozen feature [class token ; max over the patches], (B, 2 C), of clouds xyz (B, N, 3),
    prepared as those that the model, a Student or Classifier in eval mode, was trained on."""
    return act.global_feature(model.encoder(*model.encoder.group(xyz)))


# -- a label for each point ------------------------------------------------------------------------
def block_centers(low: float, high: float, values: np.ndarray) -> np.ndarray:
    """Centres of blocks along an axis, the last of which ends at high.
    Those near a value alone, for a room in millimetres has millions."""
    last = max(low, high - BLOCK)  # where the last block begins
    count = int(np.ceil((last - low) / STRIDE)) + 1
    centers = np.minimum(low + STRIDE * np.arange(count), last) + BLOCK / 2
    first = np.unique(np.searchsorted(centers, values - BLOCK))
    near = np.unique(first[:, None] + np.arange(5))  # four, and the last block
    return centers[near[near < count]]


def room_blocks(xyz: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The regions of 1 m x 1 m, 0.5 m apart, that cover a room xyz (n, 3), in metres, z up.
    S3DIS is tested so. Their origin is the middle in x and y, and 0 in z: heights stay."""
    low = xyz.min(axis=0).astype(np.float64)
    high = xyz.max(axis=0).astype(np.float64)
    reach = BLOCK / 2 + MARGIN
    for x in block_centers(low[0], high[0], xyz[:, 0]):
        column = np.flatnonzero(abs(xyz[:, 0] - x) <= reach)
        for y in block_centers(low[1], high[1], xyz[column, 1]):
            inside = column[abs(xyz[column, 1] - y) <= reach]
            if len(inside):
                yield inside, np.array([x, y, 0])


def point_sets(regions: Iterable, num_points: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random sets, always the same ones, that hold every point of each region.
    Regions and sets are pairs: indices (m,) or (num_points,), origin (3,)."""
    rng = np.random.default_rng(0)
    for inside, origin in regions:
        count = -(-len(inside) // num_points)  # rounded up
        for indices in np.resize(rng.permutation(inside), (count, num_points)):
            yield indices, origin


@torch.no_grad()
def label_points(model: nn.Module, xyz: np.ndarray, category: int | None = None) -> np.ndarray:
    """xyz (n, 3) of an object, or of a room if the Segmenter takes clouds as stored -> labels
    (n,) int64, always the same: the likeliest, among the parts of a category if given, by the
    sum of a point's probabilities in all sets that hold it. Leaves the model in eval mode."""
    c = model.config
    device = next(model.parameters()).device
    model.eval()
    regions = [(np.arange(len(xyz)), np.zeros(3))]
    if not c.normalized:
        regions = room_blocks(xyz)
    sets = list(point_sets(regions, c.points))
    votes = torch.zeros(len(xyz), c.num_parts, dtype=torch.float64)
    for i in run.progress(range(0, len(sets), BATCH_SIZE), f"batches of {BATCH_SIZE} sets"):
        indices, origins = map(np.stack, zip(*sets[i : i + BATCH_SIZE], strict=True))
        points = torch.from_numpy(xyz[indices] - origins[:, None])  # (B, N, 3)
        if c.normalized:
            points = clouds.unit_sphere(points)
        categories = None
        if category is not None:
            categories = torch.full((len(points),), category, device=device)
        logits = model(points.float().to(device), categories)  # (B, N, labels)
        probability = logits.flatten(0, 1).double().softmax(dim=1)
        votes.index_add_(0, torch.from_numpy(indices.ravel()), probability.cpu())
    first, end = (0, c.num_parts) if category is None else c.part_ranges[category]
    return votes[:, first:end].argmax(dim=1).numpy() + first


# -- tables ----------------------------------------------------------------------------------------
def write_csv(path: str | Path, rows: Iterable[Iterable]) -> None:
    """Rows of values -> a .csv file in UTF-8."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def label_names(config: act.SegmenterConfig) -> list[str]:
    """The name of each label of a Segmenter; parts are numbered behind their category's name."""
    if not config.num_categories:
        return list(config.class_names)
    names = [f"part {i}" for i in range(config.num_parts)]
    for category, (first, end) in zip(config.class_names, config.part_ranges, strict=True):
        for part in range(first, end):
            names[part] = f"{category} part {part}"
    return names


def write_legend(path: str | Path, config: act.SegmenterConfig) -> tuple[list[str], np.ndarray]:
    """A .csv of a Segmenter's labels -> their names, and colours (labels, 3) uint8."""
    names = label_names(config)
    colors = np.uint8(255 * pictures.palette(config.num_parts))
    rows = [("colour", "name")]
    for (red, green, blue), name in zip(colors, names, strict=True):
        rows.append((f"#{red:02x}{green:02x}{blue:02x}", name))
    write_csv(path, rows)
    return names, colors
