"""Pictures without a package: clouds as .png and .ply, curves and tables as .svg."""

import itertools
import math
import zlib
from pathlib import Path

import numpy as np

from util import files

# From 35 degrees aside and 20 above. Rows: to the right, up, towards the viewer.
CAMERA = [[0.8192, 0, -0.5736], [-0.1962, 0.9397, -0.2802], [0.5390, 0.3420, 0.7698]]
TILE = 320  # pixels of a cloud
BORDER = 3  # white ones around each cloud of a gallery
SPACING = 2.5  # between the clouds of a gallery's .ply, each about a unit ball
HUES = bytes.fromhex("3b6fb6e8833a4a9c5dc94f4f8a63b08c6150d77fb57a7a7ab5aa3c3fb1c0")
PERCENTAGES = ("accuracy", "ap25", "instance_miou", "miou")
TEST_METRICS = PERCENTAGES + ("cd_l1",)  # a chart shows the first that it has


def write_png(path: str | Path, image: np.ndarray, caption: str = "") -> None:
    """Writes an image (H, W, 3) uint8; the caption is its Description."""
    H, W, _ = image.shape
    rows = np.pad(image.reshape(H, 3 * W), ((0, 0), (1, 0)))  # filter 0 before each row
    header = np.array([W, H], ">u4").tobytes() + bytes([8, 2, 0, 0, 0])  # 8 bits, RGB
    text = b"tEXtDescription\0" + caption.encode("latin-1", "backslashreplace")
    with files.complete_file(path) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for chunk in (b"IHDR" + header, text, b"IDAT" + zlib.compress(rows.tobytes()), b"IEND"):
            file.write((len(chunk) - 4).to_bytes(4, "big"))
            file.write(chunk)
            file.write(zlib.crc32(chunk).to_bytes(4, "big"))


def render(xyz: np.ndarray, colors: np.ndarray | None = None) -> np.ndarray:
    """A cloud (N, 3), y up, in the unit ball -> (320, 320, 3) uint8: discs on white, farther
    ones paler. colors: (N, 3) in 0..1, else by height."""
    if colors is None:
        level = np.clip(0.5 + xyz[:, 1:2] / 2, 0, 1)
        colors = [0.10, 0.20, 0.52] + level * [0.15, 0.52, 0.34]  # dark to light blue
    colors = np.clip(colors, 0, 1)
    right, up, near = np.array(CAMERA) @ xyz.T  # (N,) each
    order = np.argsort(near)  # the far ones first
    S = 2 * TILE  # Painted at twice the size and averaged, edges are smooth.
    centers = np.clip(S / 2 + 0.46 * S * np.stack([-up, right]), -S, 2 * S)  # (2, N)
    radius = np.clip(0.52 * S / math.sqrt(len(near) + 1), 1.5, 0.02 * S)  # smaller if many
    disc = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, 1, -1)
    disc = disc[:, :, np.hypot(disc[0, 0], disc[1, 0]) <= radius]  # (2, 1, D)
    rows, columns = np.rint(centers[:, order, None] + disc).astype(int)  # (N, D) each
    fade = (0.45 + 0.55 * np.clip(0.5 + near / 2, 0, 1))[:, None]
    paint = (colors * fade + 1 - fade)[order, None].repeat(rows.shape[1], 1)  # (N, D, 3)
    inside = (rows >= 0) & (rows < S) & (columns >= 0) & (columns < S)
    canvas = np.ones((S, S, 3))
    canvas[rows[inside], columns[inside]] = paint[inside]
    image = canvas.reshape(TILE, 2, TILE, 2, 3).mean(axis=(1, 3))
    return (255 * image).round().astype(np.uint8)


def palette(n: int) -> np.ndarray:
    """n distinct colours (n, 3) in 0..1: ten hues, then darker and lighter."""
    hues = np.frombuffer(HUES, np.uint8).reshape(10, 3)[np.arange(n) % 10] / 255
    tier = np.arange(n)[:, None] // 10
    keep = 0.6 ** ((tier + 1) // 2)
    return hues * keep + (1 - keep) * (tier % 2 == 0)


def pca_colors(features: list[np.ndarray]) -> list[np.ndarray]:
    """Features [(N, C), ...] -> colours [(N, 3), ...]: the first three principal components of
    all together, 2nd to 98th percentile to 0..1."""
    values = np.concatenate([np.asarray(array, np.float64) for array in features])
    _, _, axes = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    scores = values @ axes[:3].T
    low, high = np.percentile(scores, [2, 98], axis=0)
    colors = np.clip((scores - low) / np.maximum(high - low, 1e-9), 0, 1)
    return np.split(colors, np.cumsum([len(array) for array in features])[:-1])


def write_gallery(path: str | Path, rows: list, caption: str, columns: int = 0) -> None:
    """Clouds side by side, `columns` to a line, as `path`.png and as one cloud `path`.ply.
    rows: equally long lists of (xyz (N, 3), colors (N, 3) in 0..1 or None). The caption is
    printed, and stored in the picture."""
    clouds = sum(rows, [])
    columns = columns or len(rows[0])
    step = TILE + 2 * BORDER
    image = np.full((step * math.ceil(len(clouds) / columns), step * columns, 3), 255, np.uint8)
    placed = []
    painted = []
    for i, (xyz, colors) in enumerate(clouds):
        down, right = divmod(i, columns)
        corner = image[BORDER + step * down :, BORDER + step * right :]
        corner[:TILE, :TILE] = render(xyz, colors)
        placed.append(xyz + np.array([SPACING * right, -SPACING * down, 0], np.float32))
        painted.append(np.full(xyz.shape, 0.5) if colors is None else colors)  # grey
    write_png(f"{path}.png", image, caption)
    print(f"{path}.png: {caption}")
    colors = np.uint8(255 * np.concatenate(painted))
    files.write_ply(f"{path}.ply", np.concatenate(placed), colors)


def write_chart(path: str | Path, rows: list[dict]) -> None:
    """The rows of metrics.jsonl -> .svg: the loss and a test metric over steps."""
    epochs = [row for row in rows if "loss_epoch" in row]
    losses = curve(rows, "loss") or curve(epochs, "loss_epoch")
    last = max([step for step, _ in losses + curve(epochs, "loss_epoch")], default=1)
    if losses and losses[-1][0] < last:
        losses.append((last, losses[-1][1]))  # the last mean, to the end
    svg = ["<path d='M60 30V350H580V30' fill='none' stroke='gray'/>"]
    spacing = 1
    factors = itertools.cycle((2, 2.5, 2))  # 1, 2, 5, 10, 20, 50 ... steps from tick to tick
    while 6 * spacing < last:
        spacing = int(spacing * next(factors))
    for step in range(0, last + 1, spacing):
        svg.append(chart_text(60 + 520 * step // last, 370, "middle", "black", step))
    svg += chart_line("loss", losses, last, 52, "end", "#3b6fb6")
    for metric in TEST_METRICS:
        if curve(epochs, metric):
            svg += chart_line(metric, curve(epochs, metric), last, 588, "start", "#c94f4f")
            break
    write_svg(path, 400, svg + ["<text x='320' y='392'>step</text>"])


def write_dots(path: str | Path, panels: dict[str, list]) -> None:
    """title -> [(name, percentages, half their mean's interval or None)] -> .svg:
    a dot per value, a line at the mean, a bar of the interval within 0 to 100."""
    svg = []
    down = 0
    for title, rows in panels.items():
        marks = []  # of each row: the interval's ends, the mean, the values
        for _, values, reach in rows:
            three = np.mean(values) + np.array([-1, 1, 0]) * (reach or 0.0)
            marks.append(np.concatenate([three, values]))
        edges = np.concatenate(marks)
        margin = 0.05 * np.ptp(edges) or 1.0
        low = max(edges.min() - margin, 0)
        high = min(edges.max() + margin, 100)
        down += 40
        svg.append(chart_text(180, down - 8, "start", "black", title))
        for (name, _, _), mark in zip(rows, marks, strict=True):
            x = 180 + 420 * (mark.clip(low, high) - low) / (high - low)
            svg.append(chart_text(170, down + 14, "end", "black", name))
            place = f"x='{x[0]:.1f}' y='{down + 6}' width='{x[1] - x[0]:.1f}'"
            svg.append(f"<rect {place} height='8' fill='#c9d6ea'/>")
            svg.append(f"<path d='M{x[2]:.1f} {down + 1}v18' stroke='#3b6fb6' stroke-width='2'/>")
            for center in x[3:]:
                svg.append(f"<circle cx='{center:.1f}' cy='{down + 10}' r='3' fill='#c94f4f'/>")
            down += 22
        for i, label in enumerate(tick_labels(low, high)):
            svg.append(chart_text(180 + 105 * i, down + 14, "middle", "gray", label))
        down += 20
    write_svg(path, down + 10, svg)


def write_svg(path: str | Path, height: int, svg: list[str]) -> None:
    """Writes elements. Names that are not UTF-8 are escaped."""
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 640 {height}' font-size='12'>"
    with files.complete_file(path) as file:
        file.write("\n".join([head] + svg + ["</svg>\n"]).encode("utf-8", "backslashreplace"))


def curve(rows: list[dict], name: str) -> list[tuple]:
    """The (step, value) of the rows that have a finite value of that name."""
    points = [(row["step"], row.get(name)) for row in rows]
    return [(step, y) for step, y in points if y is not None and math.isfinite(y)]


def tick_labels(low: float, high: float) -> list[str]:
    """Five numbers from low to high, in as many digits as tell them apart."""
    for digits in range(3, 17):
        labels = [f"{tick:.{digits}g}" for tick in np.linspace(low, high, 5)]
        if len(set(labels)) == 5:
            break
    return labels


def chart_line(name: str, points: list, last: int, x: int, anchor: str, color: str) -> list[str]:
    """A line through (step, value) points, and the values along its axis."""
    values = [value for _, value in points]
    low = min(values, default=0)
    high = max(values, default=1)
    if low == high:  # The line is in the middle.
        high = low + max(abs(low), 1e-3)
        low = 2 * low - high
    if name in PERCENTAGES:
        low = max(low, 0)
        high = min(high, 100)
    svg = []
    for i, label in enumerate(tick_labels(low, high) + [name]):
        svg.append(chart_text(x, max(16, 354 - 80 * i), anchor, color, label))
    line = []
    for step, value in points:
        right = 60 + 520 * step / last
        down = 350 - 320 * (value - low) / (high - low)
        line.append(f"{right:.1f},{down:.1f}")
        if len(points) <= 20:
            svg.append(f"<circle cx='{right:.1f}' cy='{down:.1f}' r='3' fill='{color}'/>")
    svg.append(f"<polyline points='{' '.join(line)}' fill='none' stroke='{color}'/>")
    return svg


def chart_text(x: int, y: int, anchor: str, color: str, content: str | int) -> str:
    return f"<text x='{x}' y='{y}' text-anchor='{anchor}' fill='{color}'>{content}</text>"
