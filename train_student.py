"""Stage II (Sec. 4.2): a plain 3D Transformer learns to predict the teacher's features of masked
patches from those that it sees.

    python train_student.py                         # after train_teacher.py, minutes on two cores
    python train_student.py --target coordinates    # Point-MAE, all else equal; no teacher
    python train_student.py --data my_clouds --size base --init official.pth   # from its weights
    python train_student.py --data ShapeNet55 --size base                      # as published
    torchrun --nproc_per_node=8 train_student.py --data ShapeNet55 --size base # on eight GPUs

Leaves last.pt, metrics.jsonl, config.json, loss.svg, reconstruction and features (.png, .ply).
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import act
import clouds
import training
from training import flag

# -- config ---------------------------------------------------------------------------------------
DEFAULTS = {  # base is the published run
    "tiny": dict(epochs=14, batch_size=16, lr=1e-3, mask_ratio=0.6, log_every=50),
    "small": dict(epochs=50, batch_size=128, lr=1e-3, mask_ratio=0.8),
    "base": dict(epochs=300, batch_size=128, lr=1e-3, mask_ratio=0.8),
}
PATCHES = ["num_group", "group_size"]  # with a teacher they are the teacher's
SET = [f.name for f in fields(act.StudentConfig) if type(f.default) in (int, float)
       and f.name not in ("points", "target_dim")]

@dataclass
class Config(training.RunConfig):
    out: str = flag("runs/student", "folder of the checkpoint, log, configuration and pictures")
    weight_decay: float = flag(0.05, "AdamW's weight decay", 0.05)
    teacher: str = flag("runs/teacher/last.pt", "the teacher's checkpoint, our or official")
    target: str = flag("teacher", "what is predicted: the teacher's features, coordinates or codes",
                       choices=("teacher", "coordinates", "codes"))
    loss: str = flag(None, "distance to the teacher's features (default: cosine)", "cosine", str,
                     ("cosine", "smooth_l1", "l2"))
    mask_ratio: float = flag(None, "share of masked patches", 0.8, float)
    mask: str = flag("random", "random patches, or a block", "random", choices=("random", "block"))
    init: str = flag("", "a checkpoint to take weights from: our, official or Point-MAE's student")
    set: list = flag((), f"NAME=VALUE of the student's {', '.join(SET)}; {' and '.join(PATCHES)} "
                     "with --target coordinates only, else they are the teacher's", kind=str)

class Target:
    """What the student predicts. The teacher is fixed, so its prompts are computed once."""
    def __init__(self, config, device):
        self.config, self.teacher = config, None
        if config.target == "coordinates":
            return
        if not Path(config.teacher).is_file():
            raise ValueError(f"{config.teacher}: no such --teacher; run train_teacher.py first")
        self.teacher = training.load(act.Teacher, config.teacher, device).requires_grad_(False)
        self.prompts = self.teacher.prompt_keys_values()

    @torch.no_grad()
    def features(self, neighborhood, center):
        return self.teacher.features(neighborhood, center, self.prompts)  # (B, G, D)

    def loss(self, prediction, neighborhood, center, masked):
        """prediction: (B, M, D) at the groups `masked` (B, M) -> scalar."""
        if self.config.target == "coordinates":  # Point-MAE: CD-L2 of the masked patches
            patch = act.gather_points(neighborhood.flatten(2), masked)  # (B, M, 3 S)
            patch, points = (t.reshape(-1, t.shape[2] // 3, 3) for t in (patch, prediction.float()))
            return act.chamfer_distance(points, patch, norm=2)
        if self.config.target == "codes":  # as BEiT and Point-BERT
            with torch.no_grad():
                codes = self.teacher.tokenize(neighborhood, center).gather(1, masked)
            return F.cross_entropy(prediction.float().flatten(0, 1), codes.flatten())
        features = act.gather_points(self.features(neighborhood, center), masked)
        return act.distillation_loss(prediction, features, self.config.loss)

    def reconstruct(self, prediction, neighborhood, center, masked):
        """The predictions as points (B, M, S, 3); features by way of the teacher's decoder."""
        if self.config.target == "coordinates":
            return prediction.unflatten(2, (-1, 3))
        if self.config.target == "codes":
            codes = self.teacher.tokenize(neighborhood, center)
            codes = codes.scatter(1, masked, prediction.argmax(dim=-1))
            tokens = F.embedding(codes, self.teacher.codebook)
            tokens = self.teacher.transform(tokens, center, self.prompts)
            features = self.teacher.dgcnn_2(tokens, act.knn(center, center, 4)[1])
        else:
            features = self.features(neighborhood, center)
            if self.config.loss == "cosine":  # which leaves the length open
                prediction = F.normalize(prediction, dim=-1) * features.norm(dim=-1).mean()
            features = features.scatter(1, masked[..., None].expand_as(prediction), prediction)
        _, fine = self.teacher.decoder(features)  # (B, G, S, 3)
        return act.gather_points(fine.flatten(2), masked).unflatten(2, (-1, 3))

def sample_mask(config, center, step):
    """The masks of a whole batch, from the step alone."""
    mask = act.random_mask if config.mask == "random" else act.block_mask
    return mask(center, config.mask_ratio, training.seeded("cpu", config.seed, "mask", step))

def build_student(config, teacher, normalized, device):
    """By --size, or as the student of --init, and --set; patches and target as the teacher's."""
    sizes, names = act.StudentConfig(**training.SIZES[config.size]["encoder"]), SET
    if config.init:
        source = training.load(act.Student, config.init, device)
        sizes = source.config
    if teacher:
        names = [name for name in SET if name not in PATCHES]
        sizes = replace(sizes, **{name: getattr(teacher.config, name) for name in PATCHES})
    sizes = training.override(sizes, config.set, names)
    dim = 3 * sizes.group_size
    if teacher:
        dim = len(teacher.codebook) if config.target == "codes" else teacher.config.decoder_dims
    sizes = replace(sizes, target_dim=dim, points=config.points, normalized=normalized)
    torch.manual_seed(config.seed)
    student = act.Student(sizes).to(device)
    if config.init:
        shapes = {name: value.shape for name, value in student.state_dict().items()}
        state = source.state_dict().items()
        state = {name: value for name, value in state if value.shape == shapes.get(name)}
        new = student.load_state_dict(state, strict=False).missing_keys
        if any(name.startswith("encoder.") for name in new):
            raise ValueError(f"{config.init}: expected its encoder, got --set {config.set}")
        print(f"weights from {config.init}; newly initialised: {', '.join(new) or 'nothing'}")
    return student

@torch.no_grad()
def cosine_per_depth(student, test, config):
    """Mean cosine between a cloud's tokens after each block: near 1 they have collapsed."""
    generator = training.seeded(student.mask_token.device, config.seed, "depth")
    xyz, _ = test.sample(torch.arange(min(len(test), 16)), config.points, generator)
    encoder = student.eval().encoder
    tokens = encoder.layers(*encoder.group(xyz), range(1, student.config.depth + 1))
    unit = [F.normalize(t[:, 1:].float(), dim=-1) for t in tokens]
    return [round((u @ u.mT).mean().item(), 4) for u in unit]

@torch.no_grad()
def svm_features(student, split, config):
    """Frozen features [class token ; max] and labels of up to 4000 clouds, evenly spread."""
    device, features = student.mask_token.device, []
    chosen = torch.linspace(0, len(split) - 1, min(len(split), 4000)).long()
    for i, indices in enumerate(chosen.split(64)):
        generator = training.seeded(device, config.seed, "features", i)
        xyz, _ = split.sample(indices, config.points, generator)
        features.append(act.global_feature(student.eval().encode(xyz)))
    return torch.cat(features), split.labels[chosen.to(split.labels.device)].to(device)

@torch.no_grad()
def pictures(config, student, untrained, target, test, out):
    """reconstruction: input, visible patches, visible and predicted ones. features: principal
    components of the patches' features, interpolated to the points."""
    chosen = torch.arange(0, len(test), max(1, len(test) // 5))[:5]
    generator = training.seeded(student.mask_token.device, config.seed, "picture")
    xyz, _ = test.sample(chosen, config.points, generator)
    neighborhood, center = student.eval().encoder.group(xyz)
    tokens = {"student": student.encode(xyz)[:, 1:], "untrained": untrained.encode(xyz)[:, 1:]}
    if target.teacher:
        tokens["teacher"] = target.features(neighborhood, center)
    columns = [[None] * len(xyz)]
    for t in tokens.values():
        of_points = act.interpolate(xyz, center, t.float())  # (B, N, C)
        columns.append(clouds.pca_colors(list(of_points.cpu().numpy())))
    arrays = xyz.cpu().numpy()
    rows = [[(cloud, color) for color in colors] for cloud, colors in zip(arrays, zip(*columns))]
    clouds.write_gallery(out / "features", rows)

    mask = sample_mask(config, center, -1)
    visible, masked = act.split_mask(mask, xyz.device)
    prediction = student(neighborhood, center, mask).float()
    points = target.reconstruct(prediction, neighborhood, center, masked)  # (B, M, S, 3)
    points = (points + act.gather_points(center, masked)[:, :, None]).flatten(1, 2)
    patches = (neighborhood + center[:, :, None]).flatten(2)  # (B, G, 3 S)
    seen = act.gather_points(patches, visible).unflatten(2, (-1, 3)).flatten(1, 2)
    both = torch.cat([seen, points], dim=1).cpu().numpy()
    n = seen.shape[1]
    colors = np.where(np.arange(both.shape[1])[:, None] < n, *clouds.palette(2))
    rows = [[(cloud, None), (parts[:n], colors[:n]), (parts, colors)]
            for cloud, parts in zip(arrays, both)]
    clouds.write_gallery(out / "reconstruction", rows)
    print(f"reconstruction.png: input, visible, visible and predicted; features.png: input, "
          f"{', '.join(tokens)}; rows: {', '.join(test.names[i] for i in chosen)}")

def main(config):
    config, device = training.setup(config, DEFAULTS)
    if config.target != "teacher" and config.loss:
        raise ValueError(f"--loss {config.loss}: expected --target teacher, got {config.target}")
    if config.target == "teacher":
        config = replace(config, loss=config.loss or "cosine")

    # -- data -------------------------------------------------------------------------------------
    dataset = clouds.open_dataset(config.data, config.cache or None, config.variant, config.area)
    print(clouds.describe(dataset))
    train, test = dataset.everything or dataset.train, dataset.test
    if dataset.everything:
        print(f"pretraining on all {len(train)} clouds, those of the test set too, without labels")
    config = training.plan(config, len(train))

    # -- model: the teacher from its checkpoint alone, the student's patches as the teacher's ------
    target = Target(config, device)
    student = build_student(config, target.teacher, train.normalized, device)
    c = student.config
    train, test = training.place(config, c.num_group, device, train, test)
    if not 0 < int(config.mask_ratio * c.num_group) < c.num_group:
        raise ValueError(f"--mask-ratio: expected to mask some of {c.num_group} patches, not all, "
                         f"got {config.mask_ratio}")
    teacher = f"backbone {target.teacher.config.weights}" if target.teacher else "no teacher"
    count = sum(p.numel() for p in student.parameters())
    print(f"stage II on {device} x {training.WORLD}, {config.precision}; size {config.size}, "
          f"{c.width} wide, {c.depth} deep, {count / 1e6:.1f} M parameters; "
          f"target {config.target}, {teacher}")

    # -- optimizer, resume ------------------------------------------------------------------------
    optimizer = training.adamw(student, config.lr, config.weight_decay)
    net = training.parallel(student, config)
    log = training.Log(config, student, train.names)
    if log.state:
        optimizer.load_state_dict(log.state["optimizer"])

    # -- loop -------------------------------------------------------------------------------------
    warmup = 10 * (len(train) // config.batch_size)
    for epoch in range(log.epoch, config.epochs):
        student.train()
        for batch in training.epoch_batches(config, len(train), epoch, log.step):
            lr = training.set_lr(optimizer, log.step, config, end=1e-6, warmup=warmup)
            generator = training.seed_step(config.seed, log.step, device)
            xyz, _ = train.sample(batch, config.points, generator)
            xyz = clouds.scale_translate(xyz, generator)  # (B, N, 3)
            neighborhood, center = act.group_points(xyz, c.num_group, c.group_size)
            mask = sample_mask(config, center, log.step)
            share = slice(training.RANK, None, training.WORLD)
            neighborhood, center, mask = neighborhood[share], center[share], mask[share]
            _, masked = act.split_mask(mask, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                prediction = net(neighborhood, center, mask)  # (B, M, D)
                loss = target.loss(prediction, neighborhood, center, masked)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(student.parameters(), math.inf)  # only measured
            optimizer.step()
            log.add(loss=loss, grad_norm=grad_norm, lr=lr)
        log.end_epoch(optimizer, dict(cosine_per_depth=cosine_per_depth(student, test, config)))

    # -- results ----------------------------------------------------------------------------------
    if training.RANK > 0:
        return
    torch.manual_seed(config.seed)
    untrained = act.Student(c).to(device).eval()
    pictures(config, student, untrained, target, test, log.out)
    clouds.write_chart(log.out / "loss.svg", log.rows)
    metrics, text = {}, "none, since it takes labelled training clouds of two classes"
    if dataset.train.labels is not None and len(dataset.train.labels.unique()) > 1:
        print("features of the training and test clouds for a linear SVM ...", flush=True)
        for name, model in (("svm_untrained", untrained), ("svm_trained", student)):
            features = [svm_features(model, split, config) for split in (dataset.train, test)]
            metrics[name], _ = training.svm_accuracy(*features[0], *features[1])
        text = "{svm_untrained:.1f} % untrained -> {svm_trained:.1f} % trained".format(**metrics)
    log.close(**metrics)
    print(f"linear SVM on frozen features, {len(test)} test clouds: {text}")

if __name__ == "__main__":
    training.run_script(main, Config, __doc__)
