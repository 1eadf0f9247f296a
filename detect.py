"""Object detection in rooms (Sec. 5): the pretrained encoder in a set predictor after 3DETR.

    python detect.py                            # after train_student.py: synthetic rooms
    python detect.py --checkpoint none          # the same from scratch
    python detect.py --predict my_rooms --checkpoint runs/detect/last.pt    # in metres, z up
    python detect.py --data scannet_train_detection_data --size base --checkpoint student.pth
    torchrun --nproc_per_node=8 detect.py --data scannet_train_detection_data --size base

--data is `synthetic` or what VoteNet's scripts make of ScanNetV2: <scan>_vert.npy (n, 6), at most
50,000 points x y z r g b, and <scan>_bbox.npy (k, 7), centre, size and nyu40 id, of 1201 + 312
scans; scannetv2_{train,val}.txt are in the folder, beside it or in a meta_data there. Leaves in
--out last.pt, metrics.jsonl, config.json, loss.svg, boxes.png and .ply (test rooms; true boxes
green, predicted ones orange), or the .ply of each room. Shapes: B rooms, N points, G patches,
Q queries, C classes, L layers, K boxes, of centre (3) and full size (3), axis-aligned, in metres.

--size base is 3DETR's setting (Misra et al., ICCV 2021); the paper is silent on its own. But:
 1. The encoder is the pretrained one, not set aggregation and 3 layers of width 256. A patch is
    the nearest points, not those within 0.2 m; positions enter every block, from the room's
    middle, so that boxes move with the room; the class token's output is unused; no dropout.
 2. No angle heads: ScanNet's boxes are axis-aligned.
 3. Queries are the first patch centres, which FPS over the centres would find again.
 4. GIoU bounds union and hull from below, not the edges: flat boxes have a finite one.
 5. An epoch's last, smaller batch is dropped; the cosine starts at the end of the warm-up.
 6. Test points are sampled by a fixed seed. Means are over the classes with ground truth; as
    published also over predicted ones, which on ScanNet is the same.
 7. Synthetic rooms are mirrored and turned by quarters. In sizes tiny and small the decoder
    starts from the queries' tokens, not from zeros, and tiny has no dropout: it learns faster.
"""

import math
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import act
import clouds
import training
from training import RANK, WORLD, flag

# -- config ---------------------------------------------------------------------------------------
DEFAULTS = {  # base: as published
    "tiny": dict(points=4096, epochs=12, batch_size=8, lr=1e-3),
    "small": dict(points=20000, epochs=180, batch_size=8, lr=5e-4),
    "base": dict(points=40000, epochs=1080, batch_size=8, lr=5e-4)}
SIZES = {  # what differs from DetectorConfig
    "tiny": dict(num_group=128, group_size=16, num_queries=128, decoder_width=128, decoder_depth=4,
                 drop_path=0.0, dropout=0.0, head_dropout=0.0, own_tokens=True),
    "small": dict(num_group=512, num_queries=128, decoder_depth=4, own_tokens=True), "base": {}}
ROOMS = ((7, 400), (8, 48))  # synthetic rooms to train and test on: area, which seeds them, number
SCANNET = dict(  # the published names, and their nyu40 ids
    cabinet=3, bed=4, chair=5, sofa=6, table=7, door=8, window=9, bookshelf=10, picture=11,
    counter=12, desk=14, curtain=16, refrigerator=24, showercurtrain=28, toilet=33, sink=34,
    bathtub=36, garbagebin=39)
SHOWN = 0.3  # the least score of a box in pictures and tables

@dataclass
class Config(training.RunConfig):
    out: str = flag("runs/detect", "folder of the results")
    checkpoint: str = flag("runs/student/last.pt", "a student; none: from scratch")
    weight_decay: float = flag(0.1, "AdamW's weight decay, of every parameter", 0.1)
    clip: float = flag(0.1, "largest norm of the gradient", 0.1)
    predict: list = flag((), "find boxes in these rooms or folders with --checkpoint", kind=str)

# -- boxes ----------------------------------------------------------------------------------------
def overlap(a, b):
    """Intersection / union and union / hull of pairs: (..., N, 6), (..., M, 6) -> (..., N, M)."""
    a_low, a_high = ((a[..., :3] + side * a[..., 3:]).unsqueeze(-2) for side in (-0.5, 0.5))
    b_low, b_high = ((b[..., :3] + side * b[..., 3:]).unsqueeze(-3) for side in (-0.5, 0.5))
    inner = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp_min(0).prod(-1)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    union = (a_high - a_low).prod(-1) + (b_high - b_low).prod(-1) - inner
    union, hull = union.clamp_min(1e-9), hull.clamp_min(1e-9)  # 1 mm^3
    return inner / union, union / hull

def box_iou(a, b):
    """IoU of all pairs of boxes: (..., N, 6), (..., M, 6) -> (..., N, M); 0 of flat ones."""
    return overlap(a, b)[0]

def generalized_box_iou(a, b):
    """GIoU (Rezatofighi et al., 2019), IoU - 1 + union / hull, in -1..1; as box_iou."""
    iou, filled = overlap(a, b)
    return iou - 1 + filled

def assign(cost):
    """The query of each box, none twice, at minimum total cost: (K, Q) -> (K,) int64.

    Exact: each box in turn takes a shortest augmenting path (Jonker and Volgenant, 1987).
    Raises ValueError if K > Q or a cost is not finite."""
    cost = torch.as_tensor(cost).detach().cpu().double().numpy()
    K, Q = cost.shape
    if K > Q or not np.isfinite(cost).all():
        raise ValueError(f"cost: expected finite ones of at most {Q} boxes, got {K} boxes: {cost}")
    cost = np.pad(cost, ((0, 0), (0, 1)))  # query Q is where each path starts
    box_price, query_price, box_of = np.zeros(K + 1), np.zeros(Q + 1), np.full(Q + 1, -1)
    for first in range(K):
        distance, previous, done = np.full(Q + 1, np.inf), np.full(Q + 1, Q), np.arange(Q + 1) == Q
        box_of[Q], distance[Q], query = first, 0, Q
        while (box := box_of[query]) >= 0:
            through = distance[query] + cost[box] - box_price[box] - query_price
            shorter = ~done & (through < distance)
            distance[shorter], previous[shorter] = through[shorter], query
            query = np.where(done, np.inf, distance).argmin()
            done[query] = True
        gain = distance[query] - distance[done]
        box_price[box_of[done]] += gain  # -1, of the free query, is in nobody's way
        query_price[done] -= gain
        while query != Q:
            box_of[query], query = box_of[previous[query]], previous[query]
    return torch.tensor([box_of.tolist().index(box) for box in range(K)], dtype=torch.long)

def layer_loss(logits, center, size, extent, boxes, labels):
    """Loss of a decoder layer: (total, its weighted parts {"class", "giou", "center", "size"}).

    logits (B, Q, C + 1), the last "no object"; center, size (B, Q, 3); extent (B, 3) of the rooms;
    boxes, labels: lists of (K, 6), (K,). They are matched at cost -p(class) - 2 GIoU; losses of
    boxes are sums, divided by the number of boxes in the batch (mean over processes)."""
    predicted, probability = torch.cat([center, size], dim=-1), logits.softmax(dim=-1)
    target = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
    matched, off = [], []
    for b, (own, kinds) in enumerate(zip(boxes, labels)):
        cost = -probability[b][:, kinds].T - 2 * generalized_box_iou(own, predicted[b])  # (K, Q)
        query = assign(cost).to(logits.device)
        target[b, query] = kinds
        matched.append(generalized_box_iou(predicted[b, query, None], own[:, None]))  # (K, 1, 1)
        off.append((predicted[b, query] - own).abs() / extent[b].repeat(2))
    weight = torch.ones_like(logits[0, 0])
    weight[-1] = 0.25  # no object
    number = training.sum_over_processes(weight.new_tensor(sum(map(len, boxes)))) / WORLD
    matched, (center, size) = torch.cat(matched), torch.cat(off).split(3, dim=1)
    sums = {"giou": (1 - matched).sum(), "center": 5 * center.sum(), "size": size.sum()}
    entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight)
    parts = {name: value / number.clamp_min(1) for name, value in sums.items()}
    parts = {"class": entropy, **parts}
    return sum(parts.values()), parts

# -- evaluation -----------------------------------------------------------------------------------
def select_detections(center, size, logits, xyz):
    """Detections of a room: center, size (Q, 3), logits (Q, C + 1), points (N, 3) -> boxes (n, 6),
    scores (n, C): each box counts for every class, at p(class) x objectness.

    Left out are boxes of fewer than 5 points (if all are, the likeliest stays), of objectness
    <= 0.05, and those with IoU > 0.25 with a likelier one of their class."""
    probability = logits.softmax(dim=-1)
    objectness, kind = 1 - probability[:, -1], probability[:, :-1].argmax(dim=-1)
    kept = ((xyz - center[:, None]).abs() <= size[:, None] / 2).all(dim=-1).sum(dim=1) >= 5
    kept[objectness.argmax()] |= ~kept.any()
    order = objectness.argsort(descending=True, stable=True)
    order = order[(kept & (objectness > 0.05))[order]].cpu()
    boxes, kind = torch.cat([center, size], dim=-1)[order], kind[order]
    rival = ((box_iou(boxes, boxes) > 0.25) & (kind[:, None] == kind)).triu(1).cpu()
    stays = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        stays &= ~(rival[i] & stays[i])
    return boxes[stays], (probability[:, :-1] * objectness[:, None])[order[stays]]

def average_precision(detections, truths, num_classes, threshold):
    """(area under the precision envelope, recall) of each class over all rooms: 2 x (C,) float64.

    detections: [(boxes (n, 6), scores (n, C))], truths: [(boxes (K, 6), labels (K,))]. By falling
    score, a detection takes the box of its room and class that it overlaps most, and is right if
    their IoU > threshold and the box is not taken yet. NaN for a class without ground truth."""
    ap, recall = torch.full((2, num_classes), math.nan, dtype=torch.float64)
    for c in range(num_classes):
        count, scores, taken = 0, [], []
        for (boxes, score), (truth, labels) in zip(detections, truths):
            truth = truth[labels == c]
            iou, box = F.pad(box_iou(boxes, truth), (0, 1), value=-1).max(dim=1)  # -1: no box
            scores.append(score[:, c])
            taken.append(torch.where(iou > threshold, count + box, -1))
            count += len(truth)
        order = torch.cat(scores).argsort(descending=True, stable=True)
        box, first = np.unique(torch.cat(taken)[order], return_index=True)
        right = np.zeros(len(order))
        right[first[box >= 0]] = 1
        precision = right.cumsum() / np.arange(1, len(right) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        if count:
            ap[c], recall[c] = (envelope * right).sum() / count, right.sum() / count
    return ap, recall

# -- model ----------------------------------------------------------------------------------------
@dataclass
class DetectorConfig(act.EncoderConfig):
    """The defaults are 3DETR's, but for the encoder."""
    num_group: int = 2048
    group_size: int = 64
    points: int = 40000
    normalized: bool = False
    num_queries: int = 256
    decoder_width: int = 256
    decoder_depth: int = 8
    decoder_heads: int = 4
    dropout: float = 0.1
    head_dropout: float = 0.3
    own_tokens: bool = False  # the decoder starts from its queries' tokens; published: from zeros
    class_names: list = field(default_factory=lambda: list(SCANNET))

def fourier_positions(xyz, low, extent, frequencies):
    """[sin, cos] of 2 pi x frequencies (3, D / 2) x the place in a room of lowest corner `low` and
    `extent` (B, 3): (B, G, 3) -> (B, G, D)."""
    share = (xyz - low[:, None]) / extent[:, None]
    phase = (2 * math.pi * share[..., None] * frequencies).sum(dim=2)  # autocast rounds a product
    return torch.cat([phase.sin(), phase.cos()], dim=-1)

class DecoderLayer(nn.Module):
    """Pre-norm self-attention, cross-attention and MLP. Positions are added to queries and keys."""
    def __init__(self, dim, num_heads, dropout):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attn, self.cross_attn = (
            nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x, query_pos, key, memory):
        """x, query_pos: (B, Q, D); key, memory: (B, G, D) -> (B, Q, D)."""
        value = self.norm1(x)
        query = value + query_pos
        x = x + self.dropout(self.self_attn(query, query, value, need_weights=False)[0])
        query = self.norm2(x) + query_pos
        x = x + self.dropout(self.cross_attn(query, key, memory, need_weights=False)[0])
        return x + self.dropout(self.fc2(self.dropout(self.fc1(self.norm3(x)).relu())))

class Detector(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, D = config, config.decoder_width
        self.config = c
        self.encoder = act.Encoder(c)

        def dense(in_dim, drop=0.0):
            linear = nn.Linear(in_dim, D, bias=False)
            return nn.Sequential(linear, act.BatchNorm(D), nn.ReLU(), nn.Dropout(drop))

        self.projection = nn.Sequential(dense(c.width), dense(D), dense(D))
        self.query_mlp = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU())
        self.register_buffer("frequencies", torch.randn(3, D // 2))
        self.decoder = nn.ModuleList(
            DecoderLayer(D, c.decoder_heads, c.dropout) for _ in range(c.decoder_depth))
        self.norm, drop = nn.LayerNorm(D), c.head_dropout
        self.heads = nn.ModuleList(  # shared by all layers
            nn.Sequential(dense(D, drop), dense(D, drop), nn.Linear(D, out_dim))
            for out_dim in (len(c.class_names) + 1, 3, 3))

    def forward(self, xyz):
        """Rooms (B, N, 3) -> logits (L, B, Q, C + 1), the last "no object"; center (L, B, Q, 3),
        within 0.5 m of its query on each axis; size (L, B, Q, 3); extent (B, 3) of the rooms."""
        neighborhood, center = self.encoder.group(xyz)
        low, high = xyz.amin(dim=1), xyz.amax(dim=1)
        extent, query = (high - low).clamp_min(0.1), center[:, : self.config.num_queries]
        tokens = self.encoder(neighborhood, center - (low + high)[:, None] / 2)[:, 1:]
        memory = self.projection(tokens)  # (B, G, D)
        query_pos = self.query_mlp(fourier_positions(query, low, extent, self.frequencies))
        key = memory + fourier_positions(center, low, extent, self.frequencies)
        x, layers = torch.zeros_like(query_pos), []
        if self.config.own_tokens:
            x = memory[:, : self.config.num_queries]
        for layer in self.decoder:
            x = layer(x, query_pos, key, memory)
            layers.append(self.norm(x))
        logits, offset, size = (head(torch.stack(layers)).float() for head in self.heads)
        return logits, query + offset.sigmoid() - 0.5, size.sigmoid() * extent[:, None], extent

# -- data -----------------------------------------------------------------------------------------
Scene = namedtuple("Scene", "name xyz boxes labels")  # (n, 3) float32, (K, 6) float32, (K,) int64

def synthetic_scenes(points):
    """Furnished rooms of at least `points` points, whatever --seed is: a RoomSet of Scenes."""
    splits = []
    for area, count in ROOMS:
        splits.append([])
        for room in clouds.synthetic_rooms([(area, i) for i in range(count)], points / 35):
            labels, low, high = (np.stack(column) for column in zip(*room.boxes))
            boxes = np.hstack([(low + high) / 2, high - low]).astype(np.float32)
            splits[-1].append(Scene(room.name, room.xyz, boxes, labels - 3))  # 3: floor and so on
    return clouds.RoomSet("synthetic rooms", *splits, clouds.ROOM_CLASSES[3:])

def read_scan(root, name):
    path, ids = root / f"{name}_bbox.npy", list(SCANNET.values())
    try:
        rows = np.load(path, allow_pickle=False)
        if rows.shape[1:] != (7,) or not np.isfinite(rows).all() or (rows[:, 3:6] < 0).any():
            raise ValueError(f"shape {rows.shape} or other numbers")
        labels = np.array([ids.index(number) for number in rows[:, 6]], np.int64)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected rows of centre, size, class id; got {error}") from error
    xyz = clouds.read_points(root / f"{name}_vert.npy")
    return Scene(name, np.float32(xyz), np.float32(rows[:, :6]), labels)

def open_scans(data):
    """ScanNetV2 in VoteNet's layout: a RoomSet of Scenes; scans that are missing are noted."""
    root, splits, notes = Path(data), [], []
    for split in ("scannetv2_train.txt", "scannetv2_val.txt"):
        places = (root, root.parent, root / "meta_data", root.parent / "meta_data")
        lists = [place / split for place in places if (place / split).is_file()]
        names = lists[0].read_text().split() if lists else []
        found = [name for name in names if (root / f"{name}_vert.npy").is_file()]
        if not found:
            raise ValueError(f"{root}: expected {split} and <scan>_vert.npy of its scans, got none")
        missing = sorted(set(names) - set(found))
        if missing:
            notes.append(f"{len(missing)} of {len(names)} scans missing: {', '.join(missing)}")
        splits.append([read_scan(root, name) for name in found])
    return clouds.RoomSet("ScanNetV2", *splits, list(SCANNET), notes)

def random_cuboid(xyz, boxes, rng, min_points):
    """Which points (N,) and boxes (K,), by their centres, a random cuboid holds: half to all of the
    room along each axis, two of them alike, min_points or more, a box or more; all of them if 100
    tries find none."""
    extent = np.ptp(xyz, axis=0)
    for _ in range(100 if len(xyz) >= min_points else 0):
        ratio, middle = rng.uniform(0.5, 1, 3), xyz[rng.integers(len(xyz))]
        inside = (abs(xyz - middle) <= ratio * extent / 2).all(axis=1)
        alike = max(np.sort(ratio)[:2] / np.sort(ratio)[1:]) >= 0.8
        if alike and inside.sum() >= min_points:
            low, high = xyz[inside].min(axis=0), xyz[inside].max(axis=0)
            held = ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(axis=1)
            if held.any():
                return inside, held
    return np.ones(len(xyz), bool), np.ones(len(boxes), bool)

def turn(xyz, boxes, angle):
    """Points and boxes turned about z; a box becomes the hull of its turned rectangle."""
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)
    return xyz @ matrix, np.hstack([boxes[:, :3] @ matrix, boxes[:, 3:] @ abs(matrix)])

def sample(scenes, num_points, rng, augment="", device="cpu"):
    """num_points of each room, repeated only if it has fewer: xyz (B, N, 3), lists boxes, labels.

    augment: "published": random cuboid, mirrors, a turn of up to 5 degrees; "quarters": mirrors and
    a quarter turn, which leave boxes tight."""
    rooms = []
    for _, xyz, boxes, labels in scenes:
        if augment == "published":
            inside, held = random_cuboid(xyz, boxes, rng, num_points * 3 // 4)
            xyz, boxes, labels = xyz[inside], boxes[held], labels[held]
        xyz = xyz[rng.choice(len(xyz), num_points, replace=len(xyz) < num_points)]
        if augment:
            mirror = np.array([*rng.choice([-1, 1], 2), 1, 1, 1, 1], np.float32)
            angle = rng.integers(4) * 90 if augment == "quarters" else rng.uniform(-5, 5)
            xyz, boxes = turn(xyz * mirror[:3], boxes * mirror, math.radians(angle))
        rooms.append([torch.from_numpy(array).to(device) for array in (xyz, boxes, labels)])
    xyz, boxes, labels = zip(*rooms)
    return torch.stack(xyz), boxes, labels

# -- results --------------------------------------------------------------------------------------
@torch.no_grad()
def detect(model, scenes):
    """[(boxes, scores)] of rooms, on the CPU; points are sampled by a fixed seed."""
    detections = []
    for i, scene in enumerate(scenes):
        rng, device = np.random.default_rng(i), model.frequencies.device
        xyz, _, _ = sample([scene], model.config.points, rng, device=device)
        logits, center, size, _ = model.eval()(xyz)
        boxes, scores = select_detections(center[-1, 0], size[-1, 0], logits[-1, 0], xyz[0])
        detections.append((boxes.cpu(), scores.cpu()))
    return detections

def evaluate(detections, data):
    """{class or "mean": {ap25, ap50, recall}} in percent; means over classes with ground truth."""
    truths = [tuple(map(torch.from_numpy, (scene.boxes, scene.labels))) for scene in data.test]
    ap25, recall = average_precision(detections, truths, len(data.classes), 0.25)
    ap50, _ = average_precision(detections, truths, len(data.classes), 0.5)
    rows = 100 * torch.stack([ap25, ap50, recall], dim=1)
    rows = torch.cat([rows, rows.nanmean(dim=0, keepdim=True)]).tolist()
    names = ("ap25", "ap50", "recall")
    return {name: dict(zip(names, row)) for name, row in zip([*data.classes, "mean"], rows)}

def outline(xyz, boxes, colors):
    """A grey room (n, 3) and dotted edges of boxes (k, 6) in colors (k, 3): points and colours."""
    sides = np.array([(i & 1, i >> 1 & 1, i >> 2) for i in range(8)]) - 0.5
    corners = boxes[:, None, :3] + sides * boxes[:, None, 3:]  # (k, 8, 3)
    first, last = zip(*[(i, i | bit) for i in range(8) for bit in (1, 2, 4) if not i & bit])
    along = np.linspace(0, 1, 80)[:, None, None, None]
    edges = corners[:, first] * (1 - along) + corners[:, last] * along  # (80, k, 12, 3)
    colors = np.broadcast_to(colors[:, None], edges.shape).reshape(-1, 3)
    colors = np.concatenate([np.full(xyz.shape, 0.7), colors])
    return np.concatenate([xyz, edges.reshape(-1, 3)]), colors

def predict(config, device):
    """Prints the boxes in own rooms and writes a .ply of each, in the rooms' own coordinates."""
    path, files = config.checkpoint, []
    obj = act.read_tensors(path)
    if obj.get("kind") != "Detector":
        raise ValueError(f"--checkpoint {path}: expected a Detector, got {obj.get('kind')}")
    c = DetectorConfig(**obj["config"])
    model = act.load_exactly(Detector(c), obj["model"], path).to(device)
    for path in map(Path, config.predict):
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in clouds.READERS)
        files += found or [path]
    Path(config.out).mkdir(parents=True, exist_ok=True)
    for file in files:
        points = clouds.read_points(file)
        low = points.min(axis=0)  # subtracted in float64
        scene = Scene(file.name, np.float32(points - low), np.zeros((0, 6)), np.zeros(0))
        boxes, scores = detect(model, [scene])[0]
        shown = scores.amax(dim=1) > SHOWN
        boxes, (scores, kinds) = boxes[shown].numpy() + [*low, 0, 0, 0], scores[shown].max(dim=1)
        print(f"{file}: {len(points)} points, {np.ptp(points, axis=0)} m, {len(boxes)} boxes")
        for box, kind, score in zip(boxes.round(2), kinds.tolist(), scores.tolist()):
            print(f"  {c.class_names[kind]:16}{score:.2f}  center {box[:3]}  size {box[3:]}")
        xyz, colors = outline(points, boxes, clouds.palette(len(c.class_names))[kinds])
        clouds.write_ply(Path(config.out, f"{file.stem}.ply"), xyz, np.uint8(255 * colors))

def start_model(config, classes):
    """A Detector with the encoder of --checkpoint, or one of --size newly initialised."""
    source = None if config.checkpoint == "none" else act.load(config.checkpoint)
    if source and not isinstance(source, act.Student):
        raise ValueError(f"--checkpoint {config.checkpoint}: expected a Student, got another model")
    default = act.EncoderConfig(**training.SIZES[config.size]["encoder"])
    sizes = {name: getattr(source.config if source else default, name)
             for name in ("width", "depth", "num_heads", "encoder_dims")}
    sizes.update(SIZES[config.size], points=config.points, class_names=classes)
    torch.manual_seed(config.seed)  # the decoder does not depend on where the encoder comes from
    model = Detector(DetectorConfig(**sizes))
    if source:
        act.load_exactly(model.encoder, source.encoder.state_dict(), config.checkpoint)
    return model

def main(config):
    config, device = training.setup(config, DEFAULTS)
    if config.predict:
        return predict(config, device)

    # -- data -------------------------------------------------------------------------------------
    augment = "quarters" if config.data == "synthetic" else "published"
    data = synthetic_scenes(config.points) if augment == "quarters" else open_scans(config.data)
    print(clouds.describe(data))
    config = training.plan(config, len(data.train))

    # -- model, optimizer, resume -----------------------------------------------------------------
    model = start_model(config, data.classes).to(device)
    c, count = model.config, sum(p.numel() for p in model.parameters())
    print(f"encoder {c.depth} x {c.width} from {config.checkpoint}, decoder {c.decoder_depth} x "
          f"{c.decoder_width} newly initialised; {count / 1e6:.1f} M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    net = training.parallel(model, config)
    log = training.Log(config, model, [scene.name for scene in data.train])
    if log.state:
        optimizer.load_state_dict(log.state["optimizer"])
    start = log.state["start"] if log.state else evaluate(detect(model, data.test), data)["mean"]

    # -- loop -------------------------------------------------------------------------------------
    warmup = 9 * (len(data.train) // config.batch_size)
    for epoch in range(log.epoch, config.epochs):
        net.train()
        for batch in training.epoch_batches(config, len(data.train), epoch, log.step):
            lr = training.set_lr(optimizer, log.step, config, end=1e-6, warmup=warmup)
            training.seed_step(config.seed, log.step, device)
            rooms = [data.train[i] for i in batch[RANK::WORLD]]
            rng = np.random.default_rng([config.seed, log.step, RANK])
            xyz, boxes, labels = sample(rooms, config.points, rng, augment, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                *outputs, extent = net(xyz)
            losses = [layer_loss(*layer, extent, boxes, labels) for layer in zip(*outputs)]
            loss = sum(total for total, _ in losses)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            log.add(loss=loss, **losses[-1][1], grad_norm=grad_norm, lr=lr)  # of the last layer
        due = RANK == 0 and (epoch + 1) % 10 == 0  # as published
        metrics = evaluate(detect(model, data.test), data)["mean"] if due else {}
        log.end_epoch(optimizer, metrics, start=start)

    # -- results ----------------------------------------------------------------------------------
    if RANK > 0:
        return
    detections = detect(model, data.test)
    table = evaluate(detections, data)
    for name, row in table.items():
        print(f"{name:14}", *(f"{key} {value:5.1f}" for key, value in row.items()), sep="  ")
    boxes, labels = (np.concatenate([scene[i] for scene in data.train]) for i in (2, 3))
    kind = torch.from_numpy(labels).mode().values
    box = torch.from_numpy(boxes[labels == kind.item()].mean(axis=0, keepdims=True))
    blind = [(box, F.one_hot(kind[None], len(data.classes)))] * len(data.test)
    metrics = dict(table["mean"])
    for end, row in (("start", start), ("mean_box", evaluate(blind, data)["mean"])):
        metrics.update({f"{name}_{end}": value for name, value in row.items()})
    print("means over the classes with ground truth: AP25 {ap25:.1f}, AP50 {ap50:.1f}; before "
          "training {ap25_start:.1f}, {ap50_start:.1f}; always the likeliest class's mean box "
          "{ap25_mean_box:.1f}, {ap50_mean_box:.1f}".format(**metrics))
    rows = []
    for (_, xyz, true, _), (boxes, scores) in zip(data.test[:3], detections):
        found, low, high = boxes[scores.amax(dim=1) > SHOWN], xyz.min(axis=0), xyz.max(axis=0)
        inner = xyz[((xyz > low + [0.1, 0.1, -1]) & (xyz < high - 0.1)).all(axis=1)]  # no walls
        colors = np.repeat([[0.1, 0.5, 0.2], [0.9, 0.4, 0.1]], [len(true), len(found)], axis=0)
        xyz, colors = outline(inner, np.concatenate([true, found]), colors)
        rows.append([(clouds.normalize(xyz)[:, [1, 2, 0]], colors)])  # y up
    clouds.write_gallery(log.out / "boxes", rows, columns=3)
    clouds.write_chart(log.out / "loss.svg", log.rows)
    classes = {name: row for name, row in table.items() if row["ap25"] == row["ap25"]}  # no NaN
    log.close(**metrics, classes=classes)

if __name__ == "__main__":
    training.run_script(main, Config, __doc__)
