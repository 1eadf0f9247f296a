"""Object detection in rooms (Sec. 5): the pretrained encoder in a set predictor after 3DETR.

    python detect.py  # after train_student.py: synthetic rooms
    python detect.py --data scannet_train_detection_data --size base --checkpoint student.pth
    python predict.py my_rooms --checkpoint runs/detect/last.pt  # own rooms, metres, z up

The second is VoteNet's preparation of ScanNetV2 with its scannetv2_{train,val}.txt. Needs scipy.

--size base is the setting of 3DETR (Misra et al., ICCV 2021), with these deviations:
 1. The encoder is the pretrained one: patches of nearest points, positions relative to the room's
    middle at every block, no dropout. The output of the class token is not used.
 2. There are no angle heads. GIoU bounds volumes, not edges: finite for flat boxes.
 3. An epoch's last, smaller batch is dropped. The cosine starts after the warm-up.
 4. Test points are sampled by a fixed seed. Means are over the classes with true boxes.

Shapes: B rooms, N points, Q queries, C classes, L decoder layers, K true boxes of a room. A box is
its center (3) and its size (3), in metres, with faces along the axes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import act
from util import clouds, datasets, detector, files, pictures, processes, run
from util.detector import select_detections  # noqa: F401, for other code
from util.metrics import average_precision, box_iou, generalized_box_iou  # noqa: F401

PRESETS = {  # base: as published
    "tiny": dict(points=4096, epochs=12, batch_size=8, lr=1e-3),
    "small": dict(points=20000, epochs=180, batch_size=8, lr=5e-4),
    "base": dict(points=40000, epochs=1080, batch_size=8, lr=5e-4),
}
# A short run learns faster without dropout and from its queries' tokens.
TINY = dict(num_group=128, group_size=16, num_queries=128, decoder_width=128, decoder_depth=4)
TINY.update(drop_path=0.0, dropout=0.0, head_dropout=0.0, own_tokens=True)
SMALL = dict(num_group=512, num_queries=128, decoder_depth=4, own_tokens=True)
DETECTORS = dict(tiny=TINY, small=SMALL, base={})  # what differs from DetectorConfig
WEIGHT_DECAY = 0.1  # of every parameter, biases too
MAX_GRAD_NORM = 0.1
WARMUP_EPOCHS = 9
EVALUATION_EPOCHS = 10  # from one evaluation to the next
NO_OBJECT_WEIGHT = 0.25  # of a query without a box, in the class loss
GIOU_COST = 2.0  # weight of GIoU in the matching
CENTER_WEIGHT = 5.0  # of the distance of the centers in the loss
MAX_ANGLE = 5  # degrees, of a scan's turns


@dataclass
class Config(run.RunConfig):
    out: str = run.flag("runs/detect", "folder of the results")
    checkpoint: str = run.flag("runs/student/last.pt", "a student; none: from scratch")

    def __post_init__(self):
        run.refuse_flags(self, ["variant", "cache", "drop_invalid"], "detection")


# -- loss
def assign(cost):
    """The query of each box, none twice, at the minimum total cost: (K, Q) -> (K,) int64, CPU."""
    optimize = files.require("scipy.optimize", "scipy")
    cost = torch.as_tensor(cost).detach().cpu().double().numpy()
    K, Q = cost.shape
    if K > Q:
        raise act.UserError(f"cost: expected at most {Q} boxes, got {K}")
    if not np.isfinite(cost).all():
        raise act.UserError("cost: expected finite values; lower --lr")
    _, query = optimize.linear_sum_assignment(cost)
    return torch.from_numpy(query).long()


def layer_loss(logits, center, size, extent, boxes, labels):
    """Loss of a decoder layer, and its weighted parts {"class", "giou", "center", "size"}, means
    over the boxes of all processes. logits (B, Q, C + 1), "no object" last; center, size
    (B, Q, 3); extent (B, 3) of the rooms; lists of the rooms' boxes (K, 6) and labels (K,)."""
    return detection_loss(logits[None], center[None], size[None], extent, boxes, labels)


def detection_loss(logits, center, size, extent, boxes, labels):
    """layer_loss of outputs (L, B, Q, ...): the sum over layers, and the last one's parts."""
    L, B, Q, _ = logits.shape
    device = logits.device
    counts = list(map(len, boxes))
    room = torch.arange(B).repeat_interleave(torch.tensor(counts)).to(device, non_blocking=True)
    boxes = torch.cat(boxes).to(device, non_blocking=True)
    labels = torch.cat(labels).to(device, non_blocking=True)
    predicted = torch.cat([center, size], dim=-1)  # (L, B, Q, 6)
    queries = match_boxes(logits, predicted, room, boxes, labels, counts)
    count = processes.average(torch.full((), float(len(boxes)), device=device))
    weight = torch.ones_like(logits[0, 0, 0])  # (C + 1,)
    weight[-1] = NO_OBJECT_WEIGHT
    weights = count + NO_OBJECT_WEIGHT * (B * Q - count)
    count = count.clamp_min(1)
    layers = torch.arange(L, device=device)[:, None]
    matched = predicted[layers, room, queries]  # (L, K, 6)
    giou = generalized_box_iou(matched[:, :, None], boxes[:, None])  # (L, K, 1, 1)
    distance = (matched - boxes).abs() / extent[room].repeat(1, 2)  # (L, K, 6)
    target = torch.full((L, B, Q), len(weight) - 1, device=device)
    target[layers, room, queries] = labels
    loss = 0.0
    for i in range(L):
        rows = logits[i].flatten(0, 1)  # (B Q, C + 1)
        error = F.cross_entropy(rows, target[i].flatten(), weight, reduction="sum")
        parts = {"class": error / weights}
        parts["giou"] = (1 - giou[i]).sum() / count
        parts["center"] = CENTER_WEIGHT * distance[i, :, :3].sum() / count
        parts["size"] = distance[i, :, 3:].sum() / count
        loss = loss + sum(parts.values())
    return loss, parts


@torch.no_grad()
def match_boxes(logits, predicted, room, boxes, labels, counts):
    """The queries of all rooms' true boxes by layer (L, K), at the minimum total of -p(class) -
    2 GIoU. A GPU is waited for once: the costs of all layers are one copy."""
    probability = logits.softmax(dim=-1).permute(1, 3, 0, 2)[room, labels]  # (K, L, Q)
    giou = generalized_box_iou(boxes[:, None], predicted[:, room])[:, :, 0]  # (L, K, Q)
    costs = (-probability.transpose(0, 1) - GIOU_COST * giou).cpu()  # (L, K, Q)
    queries = [assign(cost) for cost in costs.flatten(0, 1).split(counts * len(costs))]
    return torch.cat(queries).view(costs.shape[:2]).to(logits.device, non_blocking=True)


# -- data
def sample_room(scene, num_points, rng, augment=""):
    """num_points of a room, its boxes and labels. augment: "published": a cuboid, mirrors and small
    turns; "quarters": mirrors and quarter turns, which leave boxes tight; "": none."""
    _, xyz, boxes, labels = scene
    if augment == "published":
        inside, held = detector.random_cuboid(xyz, boxes, rng, num_points * 3 // 4)
        xyz = xyz[inside]
        boxes = boxes[held]
        labels = labels[held]
    xyz = detector.sample_points(xyz, num_points, rng)
    if not augment:
        return xyz, boxes, labels
    mirror = np.append(rng.choice([-1, 1], 2), 1).astype(np.float32)
    quarters = augment == "quarters"
    angle = rng.integers(4) * 90 if quarters else rng.uniform(-MAX_ANGLE, MAX_ANGLE)
    cos = np.cos(np.radians(angle))
    sin = np.sin(np.radians(angle))
    matrix = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32) * mirror[:, None]
    size = boxes[:, 3:] @ abs(matrix)  # of the hull of the turned box
    return xyz @ matrix, np.hstack([boxes[:, :3] @ matrix, size]), labels


def sample(scenes, num_points, seed, augment="", device="cpu", share=(0, 1)):
    """Rooms rank::world of a batch, for a share (rank, world): points (B, N, 3), lists of boxes and
    labels on the CPU. `seed`, a list, and a room's place in the batch seed its numbers."""
    rank, world = share
    rooms = []
    for i in range(rank, len(scenes), world):
        rng = np.random.default_rng(seed + [i])
        rooms.append(sample_room(scenes[i], num_points, rng, augment))
    xyz = torch.from_numpy(np.stack([room[0] for room in rooms]))
    boxes = [torch.from_numpy(room[1]) for room in rooms]
    labels = [torch.from_numpy(room[2]) for room in rooms]
    return xyz.to(device, non_blocking=True), boxes, labels


# -- model
def build_model(config, classes, student=None):
    """A detector, with the encoder of a student; --seed alone gives the rest."""
    sizes = dict(run.ENCODER_SIZES[config.size])
    if student is not None:
        for name in ("width", "depth", "num_heads", "encoder_dims"):
            sizes[name] = getattr(student.config, name)
    sizes.update(DETECTORS[config.size], points=config.points, class_names=classes)
    torch.manual_seed(config.seed)
    model = detector.Detector(detector.DetectorConfig(**sizes))
    if student is not None:
        act.load_exactly(model.encoder, student.encoder.state_dict(), config.checkpoint)
    return model


def evaluate(model, data):
    """{class with true boxes, or "mean" of these: {ap25, ap50, recall}} in percent."""
    detections = detector.find_boxes(model, data.test)
    truths = [(torch.tensor(room.boxes), torch.tensor(room.labels)) for room in data.test]
    ap25, recall = average_precision(detections, truths, len(data.classes), 0.25)
    ap50, _ = average_precision(detections, truths, len(data.classes), 0.5)
    figures = 100 * torch.stack([ap25, ap50, recall], dim=1)  # (C, 3)
    rows = torch.cat([figures, figures.nanmean(0, keepdim=True)])
    table = {}
    for label, row in zip(list(data.classes) + ["mean"], rows, strict=True):
        if not row.isnan().any():
            table[label] = dict(zip(("ap25", "ap50", "recall"), row.tolist(), strict=True))
    return table


def draw_boxes(path, scenes, detections):
    """A picture and a cloud of rooms with true and predicted boxes."""
    colors = [(0.1, 0.5, 0.2), (0.9, 0.4, 0.1)]  # green and orange
    tiles = []
    for scene, (boxes, scores) in zip(scenes, detections, strict=True):
        found = boxes[scores.amax(dim=1) > detector.SCORE_THRESHOLD].numpy()
        box_colors = np.repeat(colors, [len(scene.boxes), len(found)], axis=0)
        low = scene.xyz.min(0) + [0.1, 0.1, -1]  # no walls or ceiling
        high = scene.xyz.max(0) - 0.1
        inner = scene.xyz[((scene.xyz > low) & (scene.xyz < high)).all(1)]
        xyz, painted = detector.outline(inner, np.concatenate([scene.boxes, found]), box_colors)
        tiles.append((clouds.normalize(xyz)[:, [1, 2, 0]], painted))  # y up
    caption = "true boxes green, predicted ones orange, in " + ", ".join(s.name for s in scenes)
    pictures.write_gallery(path, [tiles], caption=caption)


def main(config):
    # -- data, model, optimizer
    files.require("scipy.optimize", "scipy")  # every step needs it
    config, device = run.setup(config, PRESETS)
    augment = "quarters" if config.data == "synthetic" else "published"
    data = datasets.open_scans(config.data, config.points)
    for scene in data.train + data.test:
        width = np.ptp(scene.xyz, axis=0).max()
        if width > clouds.MAX_WIDTH:
            raise act.UserError(f"{scene.name}: expected metres, got a width of {width:.0f}")
    config = run.plan(config, len(data.train))
    path = config.checkpoint
    student = run.load_model(path, "cpu", act.Student) if path != "none" else None
    model = build_model(config, data.classes, student).to(device)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{datasets.describe(data)}\n{device} x {processes.WORLD}, {config.precision}; ", end="")
    print(f"size {config.size}, encoder {path}; {count:.1f} M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=WEIGHT_DECAY)
    names = [clouds.identity(s.name, s.xyz, s.boxes, s.labels) for s in data.train]
    log, state = run.begin(config, model, optimizer, names)
    start = state["start"] if state else evaluate(model, data).get("mean", {})
    net = processes.parallel(model, config)
    norms = run.new_norms(net, log.step)

    # -- loop
    share = processes.SHARE
    warmup = WARMUP_EPOCHS * (len(data.train) // config.batch_size)
    table = {}  # of the latest epoch, if evaluated
    for epoch in range(log.epoch, config.epochs):
        net.train()
        for batch in run.epoch_batches(config, len(data.train), epoch, log.step):
            run.set_momentum(norms, log.step)
            lr = run.set_lr(optimizer, log.step, config, end=1e-6, warmup=warmup)
            run.seed_step(config.seed, log.step, device)
            seed = [config.seed, log.step]
            scenes = [data.train[i] for i in batch]
            xyz, boxes, labels = sample(scenes, config.points, seed, augment, device, share)
            with run.autocast(config, device):
                logits, center, size, extent = net(xyz)
            loss, parts = detection_loss(logits, center, size, extent, boxes, labels)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            log.add(loss=loss, **parts, grad_norm=grad_norm, lr=lr)  # the last layer's parts
        due = (epoch + 1) % EVALUATION_EPOCHS == 0
        table = evaluate(model, data) if due else {}
        log.end_epoch(**table.get("mean", {}))
        run.save(log, model, optimizer, start=start)

    # -- results
    if not table:
        table = evaluate(model, data)
    rooms = data.test[:3]
    detections = detector.find_boxes(model, rooms)
    if processes.RANK > 0:
        return
    if not table:
        print("no average precision, for no test room has boxes")
    print("in percent, where test rooms have boxes; start: before training")
    for name, row in ({"start": start} | table).items():
        shown = "  ".join(f"{key} {value:5.1f}" for key, value in row.items())
        print(f"{name:14}  {shown}")
    draw_boxes(log.folder / "boxes", rooms, detections)
    pictures.write_chart(log.folder / "loss.svg", log.rows)
    closing = table.pop("mean", {}) | {f"{name}_start": start[name] for name in start}
    log.close(**closing, classes=table)


if __name__ == "__main__":
    run.run_command(main, Config, __doc__, PRESETS)
