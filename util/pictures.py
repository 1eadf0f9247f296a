"""Pictures without a package: clouds as .png and coloured .ply, the curves of a run as .svg."""

import itertools
import math
import zlib
from pathlib import Path

import numpy as np

from util import files

CAMERA = (  # from 35 degrees aside and 20 above; rows: to the right, up, towards the viewer
    (0.8192, 0, -0.5736),
    (-0.3420 * 0.5736, 0.9397, -0.3420 * 0.8192),
    (0.9397 * 0.5736, 0.3420, 0.9397 * 0.8192),
)
TILE = 320  # pixels of a cloud
BORDER = 3  # white ones around each cloud of a gallery
SPACING = 2.5  # between the clouds of a gallery's .ply, each about as large as the unit ball
HUES = bytes.fromhex("3b6fb6e8833a4a9c5dc94f4f8a63b08c6150d77fb57a7a7ab5aa3c3fb1c0")
TEST_METRICS = ("accuracy", "ap25", "cd_l1", "instance_miou", "miou")  # a chart shows the first


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Writes an image (H, W, 3) uint8, x to the right and y down."""
    H, W, _ = image.shape
    rows = np.pad(image.reshape(H, 3 * W), ((0, 0), (1, 0)))  # filter 0 before each row
    header = np.array([W, H], ">u4").tobytes() + bytes([8, 2, 0, 0, 0])  # 8 bits a channel, RGB
    with files.complete_file(path) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(rows.tobytes()), b"IEND"):
            file.write((len(chunk) - 4).to_bytes(4, "big"))
            file.write(chunk)
            file.write(zlib.crc32(chunk).to_bytes(4, "big"))


def render(xyz: np.ndarray, colors: np.ndarray | None = None, size: int = TILE) -> np.ndarray:
    """A cloud (N, 3), y up, in the unit ball -> (size, size, 3) uint8: discs on white, farther ones
    paler. colors: (N, 3) in 0..1, else by height. Points that are not finite are left out."""
    xyz = np.asarray(xyz, np.float64)
    if colors is None:
        level = np.clip(0.5 + xyz[:, 1:2] / 2, 0, 1)
        colors = [0.10, 0.20, 0.52] + level * [0.15, 0.52, 0.34]  # dark to light blue
    finite = np.isfinite(xyz).all(1)
    colors = np.clip(np.asarray(colors)[finite], 0, 1)
    right, up, near = np.array(CAMERA) @ xyz[finite].T  # (N,) each
    order = np.argsort(near)  # the far ones first
    S = 2 * size  # Painted at twice the size and averaged, edges are smooth.
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
    image = canvas.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    return (255 * image).round().astype(np.uint8)


def palette(n: int) -> np.ndarray:
    """n distinct colours in a fixed order, (n, 3) in 0..1: ten hues, then darker and lighter."""
    hues = np.frombuffer(HUES, np.uint8).reshape(10, 3)[np.arange(n) % 10] / 255
    tier = np.arange(n)[:, None] // 10
    keep = 0.6 ** ((tier + 1) // 2)
    return hues * keep + (1 - keep) * (tier % 2 == 0)


def pca_colors(features: list[np.ndarray]) -> list[np.ndarray]:
    """Features [(N, C), ...] -> colours [(N, 3), ...]: the first three principal components of
    all together, 2nd to 98th percentile to 0..1."""
    values = np.concatenate([np.asarray(array, np.float64) for array in features])
    _, _, axes = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    axes = axes[:3]
    largest = np.abs(axes).argmax(axis=1)
    signs = np.sign(axes[np.arange(len(axes)), largest])  # the decomposition leaves them open
    scores = values @ (axes * signs[:, None]).T
    low, high = np.percentile(scores, [2, 98], axis=0)
    colors = np.clip((scores - low) / np.maximum(high - low, 1e-9), 0, 1)
    colors = np.pad(colors, ((0, 0), (0, 3 - len(axes))), constant_values=0.5)
    return np.split(colors, np.cumsum([len(array) for array in features])[:-1])


def write_gallery(path: str | Path, rows: list, columns: int | None = None) -> None:
    """Clouds side by side, as a picture `path`.png and one cloud `path`.ply, `columns` to a line.
    rows: equally long lists of (xyz (N, 3), colors (N, 3) in 0..1 or None)."""
    clouds = list(itertools.chain.from_iterable(rows))
    columns = columns or len(rows[0])
    step = TILE + 2 * BORDER
    height = step * math.ceil(len(clouds) / columns)
    image = np.full((height, step * columns, 3), 255, np.uint8)
    placed = []
    painted = []
    for i, (xyz, colors) in enumerate(clouds):
        down, right = divmod(i, columns)
        corner = image[BORDER + step * down :, BORDER + step * right :]
        corner[:TILE, :TILE] = render(xyz, colors)
        placed.append(xyz + np.array([SPACING * right, -SPACING * down, 0], np.float32))
        if colors is None:
            colors = np.full(xyz.shape, 0.5)  # grey
        painted.append(colors)
    write_png(Path(path).with_suffix(".png"), image)
    colors = np.uint8(255 * np.concatenate(painted))
    files.write_ply(Path(path).with_suffix(".ply"), np.concatenate(placed), colors)


# -- Charts ---------------------------------------------------------------------------------------
def write_chart(path: str | Path, rows: list[dict]) -> None:
    """The rows of metrics.jsonl -> .svg: the loss and, on the right, a test metric over steps."""
    epochs = [row for row in rows if "loss_epoch" in row]
    losses = curve(rows, "loss") or curve(epochs, "loss_epoch")
    last = max([step for step, _ in losses + curve(epochs, "loss_epoch")], default=1)
    if losses and losses[-1][0] < last:
        losses.append((last, losses[-1][1]))  # the last mean, for the few steps after it
    svg = ["<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 640 400' font-size='12'>"]
    svg.append("<path d='M60 30V350H580V30' fill='none' stroke='gray'/>")
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
    svg.append("<text x='320' y='392'>step</text></svg>\n")
    Path(path).write_text("\n".join(svg), "utf-8")


def write_dots(path: str | Path, panels: dict[str, list]) -> None:
    """title -> [(name, values, half their mean's interval or None)] -> .svg: a panel a title, a row
    a name: a dot per value, a line at the mean, a bar of the interval."""
    svg = []
    down = 0
    for title, rows in panels.items():
        edges = []
        for _, values, reach in rows:
            half = reach or 0.0
            edges += [min(values), max(values), np.mean(values) - half, np.mean(values) + half]
        margin = 0.05 * np.ptp(edges) or 1.0
        low = min(edges) - margin
        high = max(edges) + margin
        down += 40
        svg.append(chart_text(180, down - 8, "start", "black", title))
        for name, values, reach in rows:
            x = 180 + 420 * (np.append(values, np.mean(values)) - low) / (high - low)
            svg.append(chart_text(170, down + 14, "end", "black", name))
            if reach is not None:
                width = 420 * reach / (high - low)
                place = f"x='{x[-1] - width:.1f}' y='{down + 6}' width='{2 * width:.1f}'"
                svg.append(f"<rect {place} height='8' fill='#c9d6ea'/>")
            svg.append(f"<path d='M{x[-1]:.1f} {down + 1}v18' stroke='#3b6fb6' stroke-width='2'/>")
            for center in x[:-1]:
                svg.append(f"<circle cx='{center:.1f}' cy='{down + 10}' r='3' fill='#c94f4f'/>")
            down += 22
        for i, label in enumerate(tick_labels(low, high)):
            svg.append(chart_text(180 + 105 * i, down + 14, "middle", "gray", label))
        down += 20
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 640 {down + 10}' font-size='12'>"
    Path(path).write_text("\n".join([head] + svg + ["</svg>\n"]), "utf-8")


def curve(rows: list[dict], name: str) -> list[tuple]:
    """The (step, value) of the rows that have a value of that name."""
    return [(row["step"], row[name]) for row in rows if name in row]


def tick_labels(low: float, high: float) -> list[str]:
    """Five numbers from low to high, in as many digits as tell them apart."""
    for digits in range(3, 17):
        labels = [f"{tick:.{digits}g}" for tick in np.linspace(low, high, 5)]
        if len(set(labels)) == 5:
            break
    return labels


def chart_line(name: str, points: list, last: int, x: int, anchor: str, color: str) -> list[str]:
    """A line through (step, value) points, dots if they are few, and the values along its axis."""
    values = [value for _, value in points]
    low = min(values, default=0)
    high = max(values, default=1)
    if low == high:  # The line is in the middle.
        high = low + max(abs(low), 1e-3)
        low = 2 * low - high
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
