"""Stage II (Sec. 4.2): a student predicts the teacher's features of masked patches from the rest.

    python train_student.py                         # after train_teacher.py, minutes on two cores
    python train_student.py --target coordinates    # Point-MAE, all else equal; no teacher
    python train_student.py --data my_clouds --size base --init official.pth   # from its weights
    python train_student.py --data ShapeNet55 --size base                      # as published
    torchrun --nproc_per_node=8 train_student.py --data ShapeNet55 --size base # on eight GPUs

Leaves last.pt, metrics.jsonl, config.json, loss.svg, features and reconstruction (.png, .ply); of
codes no reconstruction."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import act
import clouds
import training
from training import RANK, WORLD, flag

# -- config ---------------------------------------------------------------------------------------
DEFAULTS = {  # base is the published run
    "tiny": dict(epochs=14, batch_size=16, lr=1e-3, mask_ratio=0.6, log_every=50),
    "small": dict(epochs=50, batch_size=128, lr=1e-3, mask_ratio=0.8),
    "base": dict(epochs=300, batch_size=128, lr=1e-3, mask_ratio=0.8)}
MASKS = {"random": act.random_mask, "block": act.block_mask}
SET = [f.name for f in fields(act.StudentConfig) if type(f.default) in (int, float)
       and f.name not in ("points", "target_dim")]

@dataclass
class Config(training.RunConfig):
    out: str = flag("runs/student", "folder of the checkpoint, log, configuration and pictures")
    weight_decay: float = flag(0.05, "AdamW's weight decay", 0.05)
    teacher: str = flag("runs/teacher/last.pt", "the teacher's checkpoint, our or official")
    target: str = flag("teacher", "what is predicted", choices=("teacher", "coordinates", "codes"))
    loss: str = flag(None, "default: cosine", "cosine", str, ("cosine", "smooth_l1", "l2"))
    mask_ratio: float = flag(None, "share of masked patches", 0.8, float)
    mask: str = flag("random", "random patches, or a block", "random", choices=tuple(MASKS))
    init: str = flag("", "a checkpoint to take weights from: our, official or Point-MAE's student")
    set: list = flag((), f"NAME=VALUE of the student's {', '.join(SET)}", kind=str)

class Target:
    """What the student predicts. The teacher is fixed, so its prompts are computed once."""
    def __init__(self, config, device):
        self.config, self.teacher = config, None
        if config.target != "coordinates":
            if not Path(config.teacher).is_file():
                raise ValueError(f"{config.teacher}: no such --teacher; run train_teacher.py first")
            self.teacher = training.load(config.teacher, device, act.Teacher).requires_grad_(False)
            prompts = self.teacher.prompt_keys_values()
            self.features = lambda *patches: self.teacher.features(*patches, prompts)  # (B, G, D)

    def loss(self, prediction, neighborhood, center, masked):
        """prediction: (B, M, D) at the groups `masked` (B, M) -> scalar."""
        if self.config.target == "coordinates":  # Point-MAE: CD-L2 of the masked patches
            patch = act.gather_points(neighborhood.flatten(2), masked)  # (B, M, 3 S)
            patch, points = (t.reshape(-1, t.shape[2] // 3, 3) for t in (patch, prediction.float()))
            return act.chamfer_distance(points, patch, norm=2)
        if self.config.target == "codes":  # as BEiT and Point-BERT
            codes = self.teacher.tokenize(neighborhood, center).gather(1, masked)
            return F.cross_entropy(prediction.float().flatten(0, 1), codes.flatten())
        features = act.gather_points(self.features(neighborhood, center), masked)
        return act.distillation_loss(prediction, features, self.config.loss)

def build_student(config, teacher, normalized, device):
    """By --size, or as the student of --init, and --set; patches and target as the teacher's."""
    sizes, names = act.StudentConfig(**training.SIZES[config.size]["encoder"]), SET
    if config.init:
        source = training.load(config.init, device, act.Student)
        sizes = source.config
    if teacher:
        patches = dict(num_group=teacher.config.num_group, group_size=teacher.config.group_size)
        sizes, names = replace(sizes, **patches), [name for name in SET if name not in patches]
    sizes = training.override(sizes, config.set, names)
    dim = teacher.config.decoder_dims if teacher else 3 * sizes.group_size
    dim = len(teacher.codebook) if config.target == "codes" else dim
    sizes = replace(sizes, target_dim=dim, points=config.points, normalized=normalized)
    torch.manual_seed(config.seed)
    student = act.Student(sizes).to(device)
    if config.init:  # its encoder, and what else fits
        own, given = student.state_dict(), source.state_dict()
        new = [name for name in own if name not in given or own[name].shape != given[name].shape]
        if any(name.startswith("encoder.") for name in [*new, *(given.keys() - own.keys())]):
            raise ValueError(f"{config.init}: expected its encoder, got --set {config.set}")
        student.load_state_dict({name: (own if name in new else given)[name] for name in own})
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
    """features: principal components of the patches' features, interpolated to the points;
    reconstruction: visible patches, and with the predicted ones (codes have no such picture)."""
    chosen = torch.arange(0, len(test), max(1, len(test) // 5))[:5]
    generator = training.seeded(student.mask_token.device, config.seed, "picture")
    xyz, _ = test.sample(chosen, config.points, generator)
    neighborhood, center = student.eval().encoder.group(xyz)
    tokens = {"student": student.encode(xyz)[:, 1:], "untrained": untrained.encode(xyz)[:, 1:]}
    if target.teacher:
        tokens["teacher"] = target.features(neighborhood, center)
    arrays = xyz.cpu().numpy()
    columns = [[(cloud, None) for cloud in arrays]]
    for t in tokens.values():
        of_points = act.interpolate(xyz, center, t.float()).cpu().numpy()  # (B, N, C)
        columns.append(zip(arrays, clouds.pca_colors(list(of_points))))
    clouds.write_gallery(out / "features", list(zip(*columns)))
    names = ", ".join(test.names[i] for i in chosen)
    print(f"features.png: input, {', '.join(tokens)}; rows: {names}")
    if config.target == "codes":
        return
    generator = training.seeded("cpu", config.seed, "mask", -1)
    mask = MASKS[config.mask](center, config.mask_ratio, generator)
    visible, masked = act.split_mask(mask, xyz.device)
    prediction = student(neighborhood, center, mask).float()  # (B, M, D)
    if target.teacher:  # points by way of its decoder
        features = tokens["teacher"]
        if config.loss == "cosine":  # which leaves the length open
            prediction = F.normalize(prediction, dim=-1) * features.norm(dim=-1).mean()
        features = features.scatter(1, masked[..., None].expand_as(prediction), prediction)
        prediction = act.gather_points(target.teacher.decoder(features)[1].flatten(2), masked)
    seen = act.gather_points(neighborhood.flatten(2), visible)  # (B, V, 3 S)
    center = act.gather_points(center, torch.cat([visible, masked], dim=1))
    parts = torch.cat([seen, prediction], dim=1).unflatten(2, (-1, 3)) + center[:, :, None]
    parts, n = parts.flatten(1, 2).cpu().numpy(), seen[0].numel() // 3
    colors = clouds.palette(2).repeat([n, parts.shape[1] - n], axis=0)
    rows = [[(cloud, None), (p[:n], colors[:n]), (p, colors)] for cloud, p in zip(arrays, parts)]
    clouds.write_gallery(out / "reconstruction", rows)
    print("reconstruction.png: input, visible patches, visible and predicted; of the same clouds")

def main(config):
    config, device = training.setup(config, DEFAULTS)
    if config.target == "teacher":
        config = replace(config, loss=config.loss or "cosine")
    elif config.loss:
        raise ValueError(f"--loss {config.loss}: expected --target teacher, got {config.target}")

    # -- data -------------------------------------------------------------------------------------
    dataset = clouds.open_dataset(config.data, config.cache or None, config.variant, config.area)
    print(clouds.describe(dataset))
    train, test = dataset.everything or dataset.train, dataset.test
    if dataset.everything:
        print(f"pretraining on all {len(train)} clouds, those of the test set too, without labels")
    config = training.plan(config, len(train))

    # -- model, optimizer, resume: the teacher comes from its checkpoint alone --------------------
    target = Target(config, device)
    student = build_student(config, target.teacher, train.normalized, device)
    c, count = student.config, sum(p.numel() for p in student.parameters())
    train, test = training.place(config, c.num_group, device, train, test)
    if not 0 < int(config.mask_ratio * c.num_group) < c.num_group:
        raise ValueError(f"--mask-ratio: expected a part of the patches, got {config.mask_ratio}")
    print(f"stage II on {device} x {WORLD}, {config.precision}; size {config.size}, {c.width} "
          f"wide, {c.depth} deep, {count / 1e6:.1f} M parameters; target {config.target}")
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
            generator = training.seeded("cpu", config.seed, "mask", log.step)
            mask = MASKS[config.mask](center, config.mask_ratio, generator)
            neighborhood, center, mask = (t[RANK::WORLD] for t in (neighborhood, center, mask))
            _, masked = act.split_mask(mask, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                prediction = net(neighborhood, center, mask)  # (B, M, D)
                loss = target.loss(prediction, neighborhood, center, masked)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), math.inf)  # measured
            optimizer.step()
            log.add(loss=loss, grad_norm=grad_norm, lr=lr)
        log.end_epoch(optimizer, dict(cosine_per_depth=cosine_per_depth(student, test, config)))

    # -- results ----------------------------------------------------------------------------------
    if RANK > 0:
        return
    torch.manual_seed(config.seed)
    untrained = act.Student(c).to(device).eval()
    pictures(config, student, untrained, target, test, log.out)
    clouds.write_chart(log.out / "loss.svg", log.rows)
    metrics, text = {}, "none, since it takes labelled training clouds of two classes"
    if dataset.train.labels is not None and len(dataset.train.labels.unique()) > 1:
        print("features of the training and test clouds for a linear SVM ...", flush=True)
        for name, model in (("svm_untrained", untrained), ("svm_trained", student)):
            known, asked = (svm_features(model, split, config) for split in (dataset.train, test))
            metrics[name], _ = training.svm_accuracy(*known, *asked)
        text = "{svm_untrained:.1f} % untrained -> {svm_trained:.1f} % trained".format(**metrics)
    log.close(**metrics)
    print(f"linear SVM on frozen features, {len(test)} test clouds: {text}")

if __name__ == "__main__":
    training.run_script(main, Config, __doc__)
