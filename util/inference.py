"""A trained model on whole clouds: a feature of each, a label for each point; results."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import act
from util import clouds, files, pictures, processes, run

BLOCK = 1.0  # metres, the side of a room's blocks
STRIDE = 0.5  # metres from block to block
BATCH_SIZE = 16


@torch.no_grad()
def cloud_feature(model: nn.Module, xyz: torch.Tensor) -> torch.Tensor:
    """The frozen feature [class token ; max over the patches], (B, 2 C), of clouds xyz (B, N, 3),
    prepared as those that the model, a Student or Classifier in eval mode, was trained on."""
    return act.global_feature(model.encoder(*model.encoder.group(xyz)))


def each_cloud(function: Callable, split: clouds.Clouds, num_points: int) -> torch.Tensor:
    """clouds.each_cloud by all processes together: one tensor (n, ...) on each."""
    own = processes.share(range(len(split)))
    values = clouds.each_cloud(function, split.select(own), num_points) if own else []
    values = processes.gather([value.cpu() for value in values])
    return torch.stack(values).to(split.points.device)


def block_centers(low: float, high: float, values: np.ndarray) -> np.ndarray:
    """Centres of blocks along an axis; the last ends at high.
    Those near a value alone, for a room in millimetres has millions."""
    last = max(low, high - BLOCK)  # where the last block begins
    count = int(np.ceil((last - low) / STRIDE)) + 1
    centers = np.minimum(low + STRIDE * np.arange(count), last) + BLOCK / 2
    first = np.unique(np.searchsorted(centers, values - BLOCK))
    near = np.unique(first[:, None] + np.arange(5))  # four, and the last block
    return centers[near[near < count]]


def room_blocks(xyz: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Regions of 1 m x 1 m, 0.5 m apart, that cover a room xyz (n, 3), in metres, z up,
    as S3DIS is tested. Their origin is the middle in x and y, 0 in z."""
    low = xyz.min(axis=0).astype(np.float64)
    high = xyz.max(axis=0).astype(np.float64)
    reach = BLOCK / 2 + 0.001  # rounding loses no point
    for x in block_centers(low[0], high[0], xyz[:, 0]):
        column = np.flatnonzero(abs(xyz[:, 0] - x) <= reach)
        for y in block_centers(low[1], high[1], xyz[column, 1]):
            inside = column[abs(xyz[column, 1] - y) <= reach]
            if len(inside):
                yield inside, np.array([x, y, 0])


def point_sets(regions: Iterable, num_points: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random sets, always the same, that hold every point of each region.
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
    sum of a point's probabilities in all sets that hold it."""
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


def write_csv(path: str | Path, rows: Iterable[Iterable]) -> None:
    """Rows of values -> a .csv in UTF-8."""
    with files.complete_file(path) as file, io.TextIOWrapper(file, "utf-8", newline="") as text:
        csv.writer(text).writerows(rows)


def check_features(path: str) -> None:
    """UserError unless --features is empty or an .npz that can be written."""
    path = Path(path)
    if path.name and (path.suffix != ".npz" or path.is_dir() or not path.parent.is_dir()):
        raise act.UserError(f"--features: expected an .npz in a folder that is there, got {path}")


def write_legend(path: str | Path, config: act.SegmenterConfig) -> tuple[list[str], np.ndarray]:
    """A .csv of a Segmenter's labels -> their names, and colours (labels, 3) uint8."""
    names = list(config.class_names)
    if config.num_categories:
        names = [f"part {i}" for i in range(config.num_parts)]
        for category, (first, end) in zip(config.class_names, config.part_ranges, strict=True):
            names[first:end] = [f"{category} part {part}" for part in range(first, end)]
    colors = np.uint8(255 * pictures.palette(config.num_parts))
    rows = [("colour", "name")]
    for color, name in zip(colors, names, strict=True):
        rows.append((f"#{color.tobytes().hex()}", name))
    write_csv(path, rows)
    return names, colors
