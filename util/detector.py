"""A detector of boxes in rooms: the pretrained encoder, then the decoder of 3DETR.

3DETR is Misra et al., ICCV 2021, whose code has the sizes and thresholds below. Coordinates are in
metres, z up. Shapes: B rooms, N points, G patches, Q queries, C classes, L decoder layers, D the
decoder's width. A box is its center (3) and its size (3), with faces along the axes.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

import act
from util import datasets, processes
from util.metrics import box_iou

MIN_EXTENT = 0.1  # metres, of a room: sizes and positions are divided by it
MIN_POINTS = 5  # in the box of a detection
MIN_OBJECTNESS = 0.05
MAX_OVERLAP = 0.25  # IoU of a detection with a better one of its class
SCORE_THRESHOLD = 0.3  # pictures and tables show detections above it
EDGE_DOTS = 80  # on each edge of a box in a picture
CUBOID_TRIES = 100
MIN_ASPECT = 0.8  # of the two most alike of a cuboid's sides, as shares of the room's


# -- model
@dataclass
class DetectorConfig(act.EncoderConfig):
    """Sizes of the encoder and of the decoder. The defaults are 3DETR's, but for the encoder."""

    num_group: int = 2048
    group_size: int = 64
    normalized: bool = False
    num_queries: int = 256
    decoder_width: int = 256
    decoder_depth: int = 8
    decoder_heads: int = 4
    dropout: float = 0.1
    head_dropout: float = 0.3
    own_tokens: bool = False  # the decoder starts from its queries' tokens; published: from zeros
    class_names: list = field(default_factory=lambda: list(datasets.SCANNET))


def fourier_positions(xyz: Tensor, low: Tensor, extent: Tensor, frequencies: Tensor) -> Tensor:
    """Sine and cosine of 2 pi x frequencies (3, D / 2) x places (B, G, 3) -> (B, G, D). A place is
    relative to its room, which begins at `low` (B, 3) and has the size `extent` (B, 3)."""
    place = (xyz - low[:, None]) / extent[:, None]  # (B, G, 3)
    # A matrix product would be rounded to bfloat16 under autocast; this sum is not.
    phase = (2 * math.pi * place[..., None] * frequencies).sum(dim=2)  # (B, G, D / 2)
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def dense(in_dim: int, out_dim: int, dropout: float = 0.0) -> nn.Sequential:
    """A linear layer on rows (n, in_dim), with batch norm, ReLU and dropout."""
    linear = nn.Linear(in_dim, out_dim, bias=False)
    return nn.Sequential(linear, nn.BatchNorm1d(out_dim), nn.ReLU(), nn.Dropout(dropout))


def apply_to_rows(module: nn.Module, x: Tensor) -> Tensor:
    """`module`, which takes rows (n, C), applied to x (..., C)."""
    return module(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and an MLP, each after a LayerNorm; values lack positions."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)

    def forward(self, x, query_pos, key, memory):
        """Queries x and their positions (B, Q, D); key (with positions), memory (B, G, D) -> x."""
        value = self.norm1(x)
        query = value + query_pos
        attended, _ = self.self_attn(query, query, value, need_weights=False)
        x = x + self.dropout(attended)
        query = self.norm2(x) + query_pos
        attended, _ = self.cross_attn(query, key, memory, need_weights=False)
        x = x + self.dropout(attended)
        hidden = self.fc1(self.norm3(x)).relu()
        return x + self.dropout(self.fc2(self.dropout(hidden)))


class Detector(nn.Module):
    """The encoder, and a decoder of its patches: the first are queries, each a class and a box."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        c = config
        D = c.decoder_width
        self.config = config
        self.encoder = act.Encoder(c)
        self.projection = nn.Sequential(dense(c.width, D), dense(D, D), dense(D, D))
        self.query_mlp = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU())
        self.register_buffer("frequencies", torch.randn(3, D // 2))
        layers = [DecoderLayer(D, c.decoder_heads, c.dropout) for _ in range(c.decoder_depth)]
        self.decoder = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(D)
        self.heads = nn.ModuleList()  # of class, center, size; shared by all layers
        for out_dim in (len(c.class_names) + 1, 3, 3):
            hidden = nn.Sequential(dense(D, D, c.head_dropout), dense(D, D, c.head_dropout))
            self.heads.append(hidden.append(nn.Linear(D, out_dim)))

    def forward(self, xyz):
        """Rooms (B, N, 3) -> logits (L, B, Q, C + 1), "no object" last; center (L, B, Q, 3), within
        0.5 m of its query on each axis; size (L, B, Q, 3); extent (B, 3) of the rooms."""
        Q = self.config.num_queries
        neighborhood, center = self.encoder.group(xyz)
        low = xyz.amin(dim=1)
        high = xyz.amax(dim=1)
        extent = (high - low).clamp_min(MIN_EXTENT)
        middle = (low + high)[:, None] / 2  # the encoder's origin: boxes move with the room
        tokens = self.encoder(neighborhood, center - middle)[:, 1:]  # no class token
        memory = apply_to_rows(self.projection, tokens)  # (B, G, D)
        pos = fourier_positions(center, low, extent, self.frequencies)
        key = memory + pos
        query_pos = self.query_mlp(pos[:, :Q])
        x = memory[:, :Q] if self.config.own_tokens else torch.zeros_like(query_pos)
        normed = []
        for layer in self.decoder:
            x = layer(x, query_pos, key, memory)
            normed.append(self.norm(x))
        layers = torch.stack(normed)  # (L, B, Q, D)
        class_head, center_head, size_head = self.heads
        logits = apply_to_rows(class_head, layers).float()
        center = center[:, :Q] + apply_to_rows(center_head, layers).float().sigmoid() - 0.5
        size = apply_to_rows(size_head, layers).float().sigmoid() * extent[:, None]
        return logits, center, size, extent


def load_detector(path, device="cpu") -> Detector:
    """The detector of a checkpoint of detect.py, in eval mode; UserError for other files."""
    return act.load(path, device, {"Detector": (Detector, DetectorConfig)})


# -- samples of rooms, detections
def sample_points(xyz: np.ndarray, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """`num_points` random points of a room (n, 3); points are repeated only if it has fewer."""
    return xyz[rng.choice(len(xyz), num_points, replace=len(xyz) < num_points)]


def random_cuboid(xyz: np.ndarray, boxes: np.ndarray, rng, min_points: float) -> tuple:
    """Masks of points (N,) and boxes (K,), by their centers, in a random cuboid of half to all of
    each side, two alike, with min_points and a box; of all, if 100 tries find none."""
    everything = np.ones(len(xyz), bool), np.ones(len(boxes), bool)
    if len(xyz) < min_points:
        return everything
    planes = np.ascontiguousarray(xyz.T)  # (3, N): a try takes a 17th of the time
    extent = np.ptp(planes, axis=1)
    for _ in range(CUBOID_TRIES):
        ratio = rng.uniform(0.5, 1, 3)
        middle = planes[:, rng.integers(len(xyz))]
        ascending = np.sort(ratio)
        if max(ascending[:2] / ascending[1:]) < MIN_ASPECT:
            continue
        inside = (abs(planes - middle[:, None]) <= (ratio * extent / 2)[:, None]).all(0)
        if np.count_nonzero(inside) < min_points:
            continue
        kept = xyz[inside]
        held = ((boxes[:, :3] >= kept.min(0)) & (boxes[:, :3] <= kept.max(0))).all(1)
        if held.any():
            return inside, held
    return everything


@torch.no_grad()
def find_boxes(model: Detector, scenes: list) -> list:
    """select_detections of each scene, on the CPU, by all processes. Scene i is sampled with the
    seed i: a second call finds the same. Leaves the model in eval mode."""
    model.eval()
    detections = []
    for i in processes.share(range(len(scenes))):
        xyz = sample_points(scenes[i].xyz, model.config.points, np.random.default_rng(i))
        xyz = torch.from_numpy(xyz).to(model.frequencies.device)
        logits, center, size, _ = model(xyz[None])
        boxes, scores = select_detections(center[-1, 0], size[-1, 0], logits[-1, 0], xyz)
        detections.append((boxes.cpu(), scores.cpu()))
    return processes.gather(detections)


def select_detections(center: Tensor, size: Tensor, logits: Tensor, xyz: Tensor) -> tuple:
    """Detections of a room, by falling objectness: from center and size (Q, 3), logits (Q, C + 1)
    and the points (N, 3) the boxes (n, 6) and scores (n, C), class probability x objectness.
    As VoteNet and 3DETR evaluate, boxes are left out of fewer than 5 points (if all are, the
    likeliest stays), of an objectness up to 0.05, of an IoU above 0.25 with a likelier one of their
    class (non-maximum suppression)."""
    probability = logits.softmax(dim=-1)
    objectness = 1 - probability[:, -1]
    label = probability[:, :-1].argmax(dim=-1)
    boxes = torch.cat([center, size], dim=-1)
    distance = (xyz - center[:, None]).abs()  # (Q, N, 3)
    inside = (distance <= size[:, None] / 2).all(dim=-1)  # faces included
    kept = inside.sum(dim=1) >= MIN_POINTS  # (Q,)
    if not kept.any():
        kept[objectness.argmax()] = True
    kept &= objectness > MIN_OBJECTNESS
    order = objectness.argsort(descending=True, stable=True)
    order = order[kept[order]]
    same_class = label[order, None] == label[order]
    rivals = (same_class & (box_iou(boxes[order], boxes[order]) > MAX_OVERLAP)).cpu()  # (n, n)
    best = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if best[i]:
            best[i + 1 :] &= ~rivals[i, i + 1 :]
    order = order[best.to(order.device)]
    scores = probability[:, :-1] * objectness[:, None]
    return boxes[order], scores[order]


def outline(xyz: np.ndarray, boxes: np.ndarray, colors: np.ndarray) -> tuple:
    """Points (m, 3) and colours (m, 3), in 0 to 1, of a picture: a grey room (n, 3), and the edges
    of boxes (K, 6) as dots of the boxes' colours (K, 3)."""
    along = np.linspace(-0.5, 0.5, EDGE_DOTS)
    edges_x = np.stack(np.meshgrid(along, [-0.5, 0.5], [-0.5, 0.5]), axis=-1).reshape(-1, 3)
    edges = np.concatenate([np.roll(edges_x, i, axis=1) for i in range(3)])  # of a unit cube
    dots = boxes[:, None, :3] + edges * boxes[:, None, 3:]  # (K, number of dots, 3)
    painted = [np.full(xyz.shape, 0.7), np.repeat(colors, len(edges), axis=0)]
    return np.concatenate([xyz, dots.reshape(-1, 3)]), np.concatenate(painted)
