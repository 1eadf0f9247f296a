"""Object detection in rooms (Sec. 5): the pretrained encoder in a set predictor after 3DETR.

    python detect.py                            # after train_student.py: synthetic rooms
    python detect.py --predict my_rooms --checkpoint runs/detect/last.pt   # metres, z up; to .ply
    python detect.py --data scannet_train_detection_data --size base --checkpoint student.pth

The last is VoteNet's preparation of ScanNetV2, with scannetv2_{train,val}.txt in it, beside it or
in meta_data beside it. Leaves also boxes.png and .ply: true boxes green, predicted orange. Shapes:
B rooms, N points, G patches, Q queries, C classes, L layers, K boxes of centre (3) and size (3),
axis-aligned, in metres. --size base is 3DETR's setting (Misra et al., ICCV 2021), but:
 1. The encoder is the pretrained one: patches of nearest points, positions at every block, from the
    room's middle, so that boxes move with it; no dropout; the class token's output is unused.
 2. No angle heads. GIoU bounds union and hull, not the edges: flat boxes have a finite one.
 3. Queries are the first patch centres, which FPS over the centres would find again.
 4. An epoch's last, smaller batch is dropped; the cosine starts at the end of the warm-up.
 5. Test points are sampled by a fixed seed; means are over the classes with ground truth."""

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
SIZES = {  # what differs from DetectorConfig; with own tokens, without dropout it learns faster
    "tiny": dict(num_group=128, group_size=16, num_queries=128, decoder_width=128, decoder_depth=4,
                 drop_path=0.0, dropout=0.0, head_dropout=0.0, own_tokens=True),
    "small": dict(num_group=512, num_queries=128, decoder_depth=4, own_tokens=True), "base": {}}
ROOMS = ((7, 400), (8, 48))  # synthetic rooms to train and test on: area, which seeds them, number
SCANNET = dict(cabinet=3, bed=4, chair=5, sofa=6, table=7, door=8, window=9, bookshelf=10,
               picture=11, counter=12, desk=14, curtain=16, refrigerator=24, showercurtrain=28,
               toilet=33, sink=34, bathtub=36, garbagebin=39)  # published names, nyu40 ids

@dataclass
class Config(training.RunConfig):
    out: str = flag("runs/detect", "folder of the results")
    checkpoint: str = flag("runs/student/last.pt", "a student; none: from scratch")
    predict: list = flag((), "find boxes in these rooms or folders with --checkpoint", kind=str)

# -- boxes, loss, evaluation ----------------------------------------------------------------------
def box_iou(a, b, generalized=False):
    """IoU of all pairs of boxes: (..., N, 6), (..., M, 6) -> (..., N, M); 0 of flat ones."""
    pair = a.unsqueeze(-2), b.unsqueeze(-3)
    low = [box[..., :3] - box[..., 3:] / 2 for box in pair]
    high = [box[..., :3] + box[..., 3:] / 2 for box in pair]
    inner = (torch.minimum(*high) - torch.maximum(*low)).clamp_min(0).prod(-1)
    hull = (torch.maximum(*high) - torch.minimum(*low)).prod(-1).clamp_min(1e-9)  # 1 mm^3
    union = ((high[0] - low[0]).prod(-1) + (high[1] - low[1]).prod(-1) - inner).clamp_min(1e-9)
    return inner / union - 1 + union / hull if generalized else inner / union

def generalized_box_iou(a, b):
    """GIoU (Rezatofighi et al., 2019), IoU - 1 + union / hull, in -1..1; as box_iou."""
    return box_iou(a, b, generalized=True)

def assign(cost):
    """The query of each box, none twice, at minimum total cost: (K, Q) -> (K,) int64. Exact: each
    box in turn takes a shortest augmenting path (Jonker and Volgenant, 1987)."""
    K, Q = cost.shape  # a further query Q is where each path starts
    cost = F.pad(torch.as_tensor(cost).detach().cpu().double(), (0, 1)).numpy()
    if K > Q or not np.isfinite(cost).all():
        raise ValueError(f"cost: expected finite ones of at most {Q} boxes, got {K} boxes: {cost}")
    price, box_of = np.zeros(Q + 1), np.full(Q + 1, -1)
    for first in range(K):
        distance, previous, done = np.full(Q + 1, np.inf), np.full(Q + 1, Q), np.arange(Q + 1) == Q
        box_of[Q], distance[Q], query = first, 0, Q
        while (box := box_of[query]) >= 0:
            reduced = cost[box] - price
            through = distance[query] + reduced - reduced[query]
            shorter = ~done & (through < distance)
            distance[shorter], previous[shorter] = through[shorter], query
            query = np.where(done, np.inf, distance).argmin()
            done[query] = True
        price[done] -= distance[query] - distance[done]
        while query != Q:
            box_of[query], query = box_of[previous[query]], previous[query]
    return torch.from_numpy(box_of[:Q].argsort()[Q - K :])  # behind the free ones, -1

def layer_loss(logits, center, size, extent, boxes, labels):
    """Loss of a decoder layer: (total, its weighted parts {"class", "giou", "center", "size"}) of
    logits (B, Q, C + 1), "no object" last; center, size (B, Q, 3); extent (B, 3) of the rooms; per
    room boxes (K, 6), labels (K,), matched at cost -p(class) - 2 GIoU. Parts of boxes are sums over
    the batch, divided by its number of boxes (mean over processes)."""
    predicted, probability = torch.cat([center, size], dim=-1), logits.softmax(dim=-1)
    target = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
    matched, off = [], []
    for b, (own, kinds) in enumerate(zip(boxes, labels)):
        cost = -probability[b][:, kinds].T - 2 * generalized_box_iou(own, predicted[b])  # (K, Q)
        query = assign(cost).to(logits.device)
        target[b, query] = kinds
        matched.append(generalized_box_iou(predicted[b, query, None], own[:, None]))
        off.append((predicted[b, query] - own).abs() / extent[b].repeat(2))  # (K, 6)
    weight = F.pad(torch.ones_like(logits[0, 0, 1:]), (0, 1), value=0.25)  # of no object
    count = training.sum_over_processes(weight.new_tensor(sum(map(len, boxes)))) / WORLD
    center, size = torch.cat(off).split(3, dim=1)
    parts = {"giou": (1 - torch.cat(matched)).sum(), "center": 5 * center.sum(), "size": size.sum()}
    parts = {name: value / count.clamp_min(1) for name, value in parts.items()}
    parts = {"class": F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight), **parts}
    return sum(parts.values()), parts

def select_detections(center, size, logits, xyz):
    """Detections of a room: center, size (Q, 3), logits (Q, C + 1), points (N, 3) -> boxes (n, 6),
    scores (n, C), p(class) x objectness. Left out: boxes of fewer than 5 points (if all are, the
    likeliest stays), of objectness <= 0.05, of IoU > 0.25 with a likelier one of their class."""
    probability = logits.softmax(dim=-1)
    objectness, kind = 1 - probability[:, -1], probability[:, :-1].argmax(dim=-1)
    kept = ((xyz - center[:, None]).abs() <= size[:, None] / 2).all(dim=-1).sum(dim=1) >= 5
    kept[objectness.argmax()] |= ~kept.any()
    order = objectness.argsort(descending=True, stable=True)
    order = order[(kept & (objectness > 0.05))[order]].cpu()
    boxes, kind = torch.cat([center, size], dim=-1)[order], kind[order]
    rivals = ((box_iou(boxes, boxes) > 0.25) & (kind[:, None] == kind)).triu(1).cpu()
    stays = torch.ones(len(order), dtype=torch.bool)
    for i, beaten in enumerate(rivals):
        stays &= ~(beaten & stays[i])
    return boxes[stays], (probability[:, :-1] * objectness[:, None])[order[stays]]

def average_precision(detections, truths, num_classes, threshold):
    """Area under the precision envelope and recall of each class, 2 x (C,) float64, NaN without
    truth, from [(boxes (n, 6), scores (n, C))] and [(boxes (K, 6), labels (K,))] of the rooms. By
    score, a detection takes its class's box of highest IoU: right if > threshold and not taken."""
    ap, recall = torch.zeros(2, num_classes, dtype=torch.float64)
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
        right = torch.isin(torch.arange(len(order)), torch.from_numpy(first[box >= 0])).double()
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        envelope = precision.flip(0).cummax(0).values.flip(0)
        ap[c], recall[c] = (envelope * right).sum() / count, right.sum() / count  # 0 / 0: NaN
    return ap, recall

# -- model ----------------------------------------------------------------------------------------
@dataclass
class DetectorConfig(act.EncoderConfig):  # the defaults are 3DETR's, but for the encoder
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
    class_names: list = field(default_factory=lambda: list(SCANNET))

def fourier_positions(xyz, low, extent, frequencies):
    """[sin, cos] of 2 pi x place in the room x frequencies (3, D / 2): (B, G, 3) -> (B, G, D)."""
    share = ((xyz - low[:, None]) / extent[:, None])[..., None]  # autocast rounds a product:
    phase = (2 * np.pi * share * frequencies).sum(dim=2)
    return torch.cat([phase.sin(), phase.cos()], dim=-1)

def dense(in_dim, out_dim, dropout=0.0):
    linear = nn.Linear(in_dim, out_dim, bias=False)
    return nn.Sequential(linear, act.BatchNorm(out_dim), nn.ReLU(), nn.Dropout(dropout))

class DecoderLayer(nn.Module):
    """Pre-norm self-attention, cross-attention, MLP; positions are added to queries and keys."""
    def __init__(self, dim, num_heads, dropout):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attn, self.cross_attn = (
            nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        for weight in (p for p in self.parameters() if p.ndim > 1):
            nn.init.xavier_uniform_(weight)

    def forward(self, x, query_pos, key, memory):
        value = self.norm1(x)  # (B, Q, D), as query_pos; key, memory: (B, G, D)
        query = value + query_pos
        x = x + self.dropout(self.self_attn(query, query, value, need_weights=False)[0])
        query = self.norm2(x) + query_pos
        x = x + self.dropout(self.cross_attn(query, key, memory, need_weights=False)[0])
        return x + self.dropout(self.fc2(self.dropout(self.fc1(self.norm3(x)).relu())))

class Detector(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        D = c.decoder_width
        self.encoder = act.Encoder(c)
        self.projection = nn.Sequential(dense(c.width, D), dense(D, D), dense(D, D))
        self.query_mlp = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU())
        self.register_buffer("frequencies", torch.randn(3, D // 2))
        self.decoder = nn.ModuleList(
            DecoderLayer(D, c.decoder_heads, c.dropout) for _ in range(c.decoder_depth))
        self.norm, drop = nn.LayerNorm(D), c.head_dropout
        self.heads = nn.ModuleList(  # of class, centre and size, shared by all layers
            nn.Sequential(dense(D, D, drop), dense(D, D, drop), nn.Linear(D, out_dim))
            for out_dim in (len(c.class_names) + 1, 3, 3))

    def forward(self, xyz):
        """Rooms (B, N, 3) -> logits (L, B, Q, C + 1), the last "no object"; center (L, B, Q, 3),
        within 0.5 m of its query on each axis; size (L, B, Q, 3); extent (B, 3) of the rooms."""
        neighborhood, center = self.encoder.group(xyz)
        low, high = xyz.amin(dim=1), xyz.amax(dim=1)
        extent, Q = (high - low).clamp_min(0.1), self.config.num_queries
        tokens = self.encoder(neighborhood, center - (low + high)[:, None] / 2)[:, 1:]
        memory = self.projection(tokens)  # (B, G, D)
        pos = fourier_positions(center, low, extent, self.frequencies)
        query_pos, key = self.query_mlp(pos[:, :Q]), memory + pos
        x, layers = memory[:, :Q] if self.config.own_tokens else torch.zeros_like(query_pos), []
        for layer in self.decoder:
            x = layer(x, query_pos, key, memory)
            layers.append(self.norm(x))
        logits, offset, size = (head(torch.stack(layers)).float() for head in self.heads)
        center = center[:, :Q] + offset.sigmoid() - 0.5
        return logits, center, size.sigmoid() * extent[:, None], extent

# -- data -----------------------------------------------------------------------------------------
Scene = namedtuple("Scene", "name xyz boxes labels")  # (n, 3) float32, (K, 6) float32, (K,) int64

def synthetic_scenes(points):
    """Furnished rooms of at least `points` points, whatever --seed is: a RoomSet of Scenes."""
    splits = [], []
    for split, (area, count) in zip(splits, ROOMS):
        for room in clouds.synthetic_rooms([(area, i) for i in range(count)], points / 35):
            labels, low, high = (np.stack(column) for column in zip(*room.boxes))
            boxes = np.float32(np.hstack([(low + high) / 2, high - low]))
            split.append(Scene(room.name, room.xyz, boxes, labels - 3))  # 3: floor and so on
    return clouds.RoomSet("synthetic rooms", *splits, clouds.ROOM_CLASSES[3:])

def read_scan(root, name):
    path, ids = root / f"{name}_bbox.npy", list(SCANNET.values())
    try:
        rows = np.load(path, allow_pickle=False)
        rows = rows if rows.size else rows.reshape(0, 7)
        if rows.shape[1:] != (7,) or not np.isfinite(rows).all() or (rows[:, 3:6] < 0).any():
            raise ValueError(f"shape {rows.shape}, or NaN, infinite or negative values")
        labels = np.array([ids.index(number) for number in rows[:, 6]], np.int64)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected rows of centre, size, class id, got {error}") from error
    xyz = clouds.read_points(root / f"{name}_vert.npy")
    return Scene(name, np.float32(xyz), np.float32(rows[:, :6]), labels)

def open_scans(data):
    """ScanNetV2 in VoteNet's layout: a RoomSet of Scenes; scans that are missing are noted."""
    root, splits, notes = Path(data), [], []
    for split in ("scannetv2_train.txt", "scannetv2_val.txt"):
        lists = [folder / split for folder in (root, root.parent, root.parent / "meta_data")]
        names = next((file.read_text().split() for file in lists if file.is_file()), [])
        missing = [name for name in names if not (root / f"{name}_vert.npy").is_file()]
        splits.append([read_scan(root, name) for name in names if name not in missing])
        if not splits[-1]:
            raise ValueError(f"{root}: expected {split} and <scan>_vert.npy of its scans, got none")
        notes.append(f"{len(missing)} of {len(names)} scans missing {', '.join(missing)}".strip())
    return clouds.RoomSet("ScanNetV2", *splits, list(SCANNET), notes)

def random_cuboid(xyz, boxes, rng, min_points):
    """Masks of the points (N,) and boxes (K,), by their centres, in a random cuboid of half to all
    of each side, two alike, that holds min_points and a box; of all if 100 tries find none."""
    for _ in range(100 if len(xyz) >= min_points else 0):
        ratio, middle = rng.uniform(0.5, 1, 3), xyz[rng.integers(len(xyz))]
        inside = (abs(xyz - middle) <= ratio * np.ptp(xyz, axis=0) / 2).all(axis=1)
        if max(np.sort(ratio)[:2] / np.sort(ratio)[1:]) >= 0.8 and inside.sum() >= min_points:
            low, high = xyz[inside].min(axis=0), xyz[inside].max(axis=0)
            held = ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(axis=1)
            if held.any():
                return inside, held
    return np.ones(len(xyz), bool), np.ones(len(boxes), bool)

def turn(xyz, boxes, angle):
    """Points and boxes turned about z, by degrees; a box becomes the hull of its turned one."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    matrix = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)
    return xyz @ matrix, np.hstack([boxes[:, :3] @ matrix, boxes[:, 3:] @ abs(matrix)])

def sample(scenes, num_points, rng, augment="", device="cpu"):
    """num_points of each room, repeated only if it has fewer: xyz (B, N, 3), lists boxes, labels.
    augment: "published", or "quarters": mirrors and quarter turns, which leave boxes tight."""
    rooms = []
    for _, xyz, boxes, labels in scenes:
        if augment == "published":
            inside, held = random_cuboid(xyz, boxes, rng, num_points * 3 // 4)
            xyz, boxes, labels = xyz[inside], boxes[held], labels[held]
        xyz = xyz[rng.choice(len(xyz), num_points, replace=len(xyz) < num_points)]
        if augment:
            mirror = np.array([*rng.choice([-1, 1], 2), 1, 1, 1, 1], np.float32)
            angle = rng.integers(4) * 90 if augment == "quarters" else rng.uniform(-5, 5)
            xyz, boxes = turn(xyz * mirror[:3], boxes * mirror, angle)
        rooms.append([torch.from_numpy(array).to(device) for array in (xyz, boxes, labels)])
    xyz, boxes, labels = zip(*rooms)
    return torch.stack(xyz), boxes, labels

# -- results --------------------------------------------------------------------------------------
@torch.no_grad()
def detect(model, scenes):
    """[(boxes, scores)] of rooms, on the CPU; points are sampled by a fixed seed."""
    detections, device = [], model.frequencies.device
    for i, scene in enumerate(scenes):
        xyz, _, _ = sample([scene], model.config.points, np.random.default_rng(i), device=device)
        logits, center, size, _ = model.eval()(xyz)
        boxes, scores = select_detections(center[-1, 0], size[-1, 0], logits[-1, 0], xyz[0])
        detections.append((boxes.cpu(), scores.cpu()))
    return detections

def evaluate(model, data):
    """{class with ground truth, or "mean" over these: {ap25, ap50, recall}}, in percent."""
    truths = [tuple(map(torch.from_numpy, scene[2:])) for scene in data.test]
    given = detect(model, data.test), truths, len(data.classes)
    (ap25, recall), (ap50, _) = average_precision(*given, 0.25), average_precision(*given, 0.5)
    rows = 100 * torch.stack([ap25, ap50, recall], dim=1)
    rows = zip([*data.classes, "mean"], [*rows.tolist(), rows.nanmean(dim=0).tolist()])
    names = ("ap25", "ap50", "recall")
    return {name: dict(zip(names, row)) for name, row in rows if row[0] >= 0 or name == "mean"}

def outline(xyz, boxes, colors):
    """A grey room (n, 3) and dotted edges of boxes (k, 6) in colors (k, 3): points and colours."""
    edges = np.meshgrid(np.linspace(-0.5, 0.5, 80), [-0.5, 0.5], [-0.5, 0.5])  # x, y, z along x
    edges = np.hstack([np.reshape(np.roll(edges, axis, axis=0), (3, -1)) for axis in range(3)]).T
    dots = boxes[:, None, :3] + edges * boxes[:, None, 3:]  # (k, 960, 3)
    colors = np.concatenate([np.full(xyz.shape, 0.7), np.repeat(colors, len(edges), axis=0)])
    return np.concatenate([xyz, dots.reshape(-1, 3)]), colors

def predict(config, device):
    """Prints the boxes in own rooms and writes a .ply of each; a ValueError names broken files."""
    path, files, errors = config.checkpoint, [], []
    obj = act.read_tensors(path)
    if obj.get("kind") != "Detector":
        raise ValueError(f"{path}: expected a Detector, got {obj.get('kind')}")
    c = DetectorConfig(**obj["config"])
    model = act.load_exactly(Detector(c), obj["model"], path).to(device)
    for path in map(Path, config.predict):
        files += sorted(f for f in path.rglob("*") if f.suffix.lower() in clouds.READERS) or [path]
    Path(config.out).mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            points = clouds.read_points(file)
        except ValueError as error:
            errors.append(str(error))
            continue
        low = points.min(axis=0)  # subtracted in float64
        boxes, scores = detect(model, [Scene("", np.float32(points - low), *np.zeros((2, 0)))])[0]
        shown = scores.amax(dim=1) > 0.3  # as in boxes.png
        boxes, (scores, kinds) = boxes[shown].numpy() + [*low, 0, 0, 0], scores[shown].max(dim=1)
        print(f"{file}: {len(points)} points, {np.ptp(points, axis=0)} m, {len(boxes)} boxes")
        for box, kind, score in zip(boxes.round(2), kinds.tolist(), scores.tolist()):
            print(f"  {c.class_names[kind]:16}{score:.2f}  center {box[:3]}  size {box[3:]}")
        xyz, colors = outline(points, boxes, clouds.palette(len(c.class_names))[kinds])
        clouds.write_ply(Path(config.out, f"{file.stem}.ply"), xyz, np.uint8(255 * colors))
    if errors:
        raise ValueError(f"{len(errors)} of {len(files)} rooms left out: {'; '.join(errors)}")

def main(config):
    # -- data, model, optimizer, resume -----------------------------------------------------------
    config, device = training.setup(config, DEFAULTS)
    if config.predict:
        return predict(config, device) if RANK == 0 else None
    augment = "quarters" if config.data == "synthetic" else "published"
    data = synthetic_scenes(config.points) if augment == "quarters" else open_scans(config.data)
    config, path = training.plan(config, len(data.train)), config.checkpoint
    source = None if path == "none" else training.load(path, "cpu", act.Student)
    c = source.config if source else act.EncoderConfig(**training.SIZES[config.size]["encoder"])
    torch.manual_seed(config.seed)  # the decoder does not depend on where the encoder comes from
    model = Detector(DetectorConfig(
        width=c.width, depth=c.depth, num_heads=c.num_heads, encoder_dims=c.encoder_dims,
        points=config.points, class_names=data.classes, **SIZES[config.size])).to(device)
    if source:
        act.load_exactly(model.encoder, source.encoder.state_dict(), path)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{clouds.describe(data)}\n{device} x {WORLD}, {config.precision}; size {config.size}, "
          f"encoder {path}, {c.width} wide, {c.depth} deep; {count:.1f} M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.1)  # of all
    net = training.parallel(model, config)
    log = training.Log(config, model, [scene.name for scene in data.train])
    if log.state:
        optimizer.load_state_dict(log.state["optimizer"])
    start = log.state["start"] if log.state else evaluate(model, data)["mean"]

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
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            log.add(loss=loss, **losses[-1][1], grad_norm=grad_norm, lr=lr)  # of the last layer
        due = RANK == 0 and (epoch + 1) % 10 == 0  # as published
        log.end_epoch(optimizer, evaluate(model, data)["mean"] if due else {}, start=start)

    # -- results ----------------------------------------------------------------------------------
    if RANK > 0:
        return
    table = evaluate(model, data)
    print("in percent; start: the mean before training; means: over the classes with ground truth")
    for name, row in {"start": start, **table}.items():
        print(f"{name:14}", *(f"{key} {value:5.1f}" for key, value in row.items()), sep="  ")
    tiles = []
    for (_, xyz, true, _), (boxes, scores) in zip(data.test, detect(model, data.test[:3])):
        found, low, high = boxes[scores.amax(dim=1) > 0.3], xyz.min(axis=0), xyz.max(axis=0)
        inner = xyz[((xyz > low + [0.1, 0.1, -1]) & (xyz < high - 0.1)).all(axis=1)]  # no walls
        colors = np.repeat([[0.1, 0.5, 0.2], [0.9, 0.4, 0.1]], [len(true), len(found)], axis=0)
        xyz, colors = outline(inner, np.concatenate([true, found]), colors)
        tiles.append((clouds.normalize(xyz)[:, [1, 2, 0]], colors))  # y up
    clouds.write_gallery(log.out / "boxes", [tiles])
    clouds.write_chart(log.out / "loss.svg", log.rows)
    log.close(**table.pop("mean"), **{f"{k}_start": v for k, v in start.items()}, classes=table)

if __name__ == "__main__":
    training.run_script(main, Config, __doc__)
