"""Stage II (Sec. 4.2): a student predicts the teacher's features of masked patches.

    python train_student.py  # after train_teacher.py, minutes on two cores
    python train_student.py --target coordinates  # Point-MAE, all else equal; no teacher
    python train_student.py --data my_clouds --size base --init official.pth
    python train_student.py --data ShapeNet55 --size base  # as published

Leaves last.pt, metrics.jsonl, config.json, loss.svg, features and reconstruction in --out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import act
from util import clouds, datasets, metrics, pictures, processes, run
from util.run import flag


# -- target: what is predicted of the masked patches
class FixedTeacher:  # never trained: its prompts are computed once
    def __init__(self, path, device):
        if not Path(path).exists():
            raise act.UserError(f"{path}: expected a teacher; run train_teacher.py first")
        self.model = run.load_model(path, device, act.Teacher).requires_grad_(False)
        self.prompts = self.model.prompt_keys_values()

    def features(self, neighborhood, center):
        """(B, G, S, 3), (B, G, 3) -> (B, G, D)."""
        return self.model.features(neighborhood, center, self.prompts)


def features_loss(prediction, neighborhood, center, masked, teacher, kind):
    """As published; prediction (B, M, D) of masked (B, M)."""
    features = act.gather_points(teacher.features(neighborhood, center), masked)
    return act.distillation_loss(prediction, features, kind)


def backbone_loss(prediction, neighborhood, center, masked, teacher, kind):
    """The backbone's normed tokens, before what is trained on points."""
    codes = F.embedding(teacher.model.tokenize(neighborhood, center), teacher.model.codebook)
    tokens = teacher.model.backbone_tokens(codes, center, teacher.prompts)
    return act.distillation_loss(prediction, act.gather_points(tokens, masked), kind)


def codes_loss(prediction, neighborhood, center, masked, teacher, kind):
    """As BEiT and Point-BERT: cross-entropy with the codes, D = their number."""
    codes = teacher.model.tokenize(neighborhood, center).gather(1, masked)
    return F.cross_entropy(prediction.float().flatten(0, 1), codes.flatten())


def coordinates_loss(prediction, neighborhood, center, masked, teacher, kind):
    """As Point-MAE: CD-L2 of the masked patches' points, D = 3 S; no teacher."""
    patch = act.gather_points(neighborhood.flatten(2), masked)  # (B, M, 3 S)
    patch = patch.reshape(-1, patch.shape[2] // 3, 3)  # (B M, S, 3)
    return act.chamfer_distance(prediction.float().reshape(patch.shape), patch, norm=2)


class Target(NamedTuple):  # of --target; a further one is a loss function and a row of TARGETS
    loss: Callable
    dim: Callable  # configs of the teacher (or None), the student -> D
    needs_teacher: bool = True
    takes_loss: bool = False  # whether --loss applies
    has_points: bool = False  # whether a prediction can be drawn


TARGETS = {
    "teacher": Target(features_loss, lambda t, c: t.decoder_dims, takes_loss=True, has_points=True),
    "backbone": Target(backbone_loss, lambda t, c: t.backbone.width, takes_loss=True),
    "codes": Target(codes_loss, lambda t, c: t.num_tokens),
    "coordinates": Target(
        coordinates_loss, lambda t, c: 3 * c.group_size, needs_teacher=False, has_points=True
    ),
}
# A further mask is a function like act's, as many True in every cloud, and a row here.
MASKS = {"random": act.random_mask, "block": act.block_mask}


# -- config
PRESETS = {  # base is the published run
    "tiny": dict(epochs=10, batch_size=16, lr=2e-3, mask_ratio=0.6, log_every=50),
    "small": dict(epochs=50, batch_size=128, lr=1e-3, mask_ratio=0.8),
    "base": dict(epochs=300, batch_size=128, lr=1e-3, mask_ratio=0.8),
}
PATCHES = ["num_group", "group_size"]  # with a teacher, they are the teacher's
SIZES = ["width", "depth", "num_heads", "encoder_dims", "drop_path", "decoder_depth"]


@dataclass
class Config(run.RunConfig):
    out: str = flag("runs/student", "folder of the results")
    weight_decay: float = flag(0.05, "AdamW's weight decay", 0.05)
    teacher: str = flag("runs/teacher/last.pt", "the teacher, ours or official")
    target: str = flag("teacher", "what is predicted", choices=tuple(TARGETS))
    loss: str = flag(None, "default: cosine", "cosine", str, ("cosine", "smooth_l1", "l2"))
    mask_ratio: float = flag(None, "share of masked patches", 0.8, float)
    mask: str = flag("random", "random patches or a block", "random", choices=tuple(MASKS))
    init: str = flag("", "a student to start from: ours, official or Point-MAE's")
    set: list = flag((), f"NAME=VALUE of the student's {', '.join(PATCHES + SIZES)}")


def draw_patches(xyz, config, c, step, share=(0, 1)):
    """Neighborhood, center and mask of a share of a batch, (B, N, 3)."""
    generator = run.seeded("cpu", config.seed, "mask", step)
    neighborhood, center = act.group_points(xyz, c.num_group, c.group_size)
    return neighborhood, center, MASKS[config.mask](center, config.mask_ratio, generator, share)


# -- model
def student_config(config, source, teacher, train):
    """Sizes of --size or --init, then --set; the teacher's patches; the frame of `train`."""
    sizes = act.StudentConfig(**run.ENCODER_SIZES[config.size])
    if source is not None:
        sizes = source.config
    sizes = run.override(sizes, config.set, PATCHES + SIZES)
    c = None
    if teacher is not None:
        c = teacher.model.config
        if any(pair.startswith(tuple(PATCHES)) for pair in config.set):
            raise act.UserError("--set: expected the teacher's patches")
        if config.target == "backbone" and c.backbone is None:
            raise act.UserError(f"{config.teacher}: expected a teacher with a backbone")
        sizes = replace(sizes, num_group=c.num_group, group_size=c.group_size)
    dim = TARGETS[config.target].dim(c, sizes)
    sizes = replace(sizes, target_dim=dim, points=config.points, normalized=train.normalized)
    center, radius = train.frame()
    return replace(sizes, center=center, radius=radius)


def load_matching(student, source, config):
    """Gives the student the encoder of `source` and all else of it that fits."""
    state = student.state_dict()
    given = source.state_dict()
    new = [name for name in state if name not in given or given[name].shape != state[name].shape]
    unfit = new + list(given.keys() - state.keys())
    if any(name.startswith("encoder.") for name in unfit):
        raise act.UserError(f"{config.init}: expected its encoder, got --set {config.set}")
    fits = {name: value for name, value in given.items() if name not in unfit}
    student.load_state_dict(state | fits)
    print(f"weights from {config.init}; newly initialised: {', '.join(new) or 'nothing'}")


@torch.no_grad()
def cosine_per_depth(student, test, config):
    """Mean cosine of a cloud's tokens after each block: near 1 they have collapsed."""
    generator = run.seeded(student.mask_token.device, config.seed, "depth")
    xyz, _ = test.sample(torch.arange(min(len(test), 16)), config.points, generator)
    encoder = student.eval().encoder
    cosines = []
    neighborhood, center = encoder.group(xyz)
    for tokens in encoder.layers(neighborhood, center, range(1, student.config.depth + 1)):
        unit = F.normalize(tokens[:, 1:].float(), dim=-1)  # (B, G, C)
        cosines.append(round((unit @ unit.mT).mean().item(), 4))
    return cosines


@torch.no_grad()
def svm_features(student, split, config):
    """Frozen features and labels of up to 4000 clouds, evenly spread."""
    device = student.mask_token.device
    chosen = torch.linspace(0, len(split) - 1, min(len(split), 4000)).long()
    features = []
    for i, indices in enumerate(run.progress(chosen.split(64), "batches of 64 clouds")):
        generator = run.seeded(device, config.seed, "features", i)
        xyz, _ = split.sample(indices, config.points, generator)
        features.append(act.global_feature(student.eval().encode(xyz)))
    return torch.cat(features), split.labels[chosen.to(split.labels.device)].to(device)


def probe(student, name, train, test, config):
    """Percent right by frozen features: of a linear SVM, of 5 neighbours."""
    print(f"linear SVM on the features of the {name} student ...", flush=True)
    features = svm_features(student, train, config) + svm_features(student, test, config)
    return metrics.svm_accuracy(*features)[0], metrics.knn_accuracy(*features)


@torch.no_grad()
def write_features(student, untrained, teacher, xyz, order, path):
    """Principal components of patches' features as colours."""
    neighborhood, center = student.eval().encoder.group(xyz)
    features = dict(student=student.encode(xyz)[:, 1:])
    features["untrained"] = untrained.eval().encode(xyz)[:, 1:]
    if teacher is not None:
        features["teacher"] = teacher.features(neighborhood, center)
    arrays = xyz.cpu().numpy()
    rows = [[(array, None)] for array in arrays]
    for tokens in features.values():
        of_points = act.interpolate(xyz, center, tokens.float())  # (B, N, C)
        colors = pictures.pca_colors(list(of_points.cpu().numpy()))
        for i in range(len(rows)):
            rows[i].append((arrays[i], colors[i]))
    pictures.write_gallery(path, rows, caption=f"input, {', '.join(features)}; {order}")


@torch.no_grad()
def write_reconstruction(student, teacher, xyz, order, config, path):
    """Input, visible patches, visible and predicted in two colours."""
    neighborhood, center, mask = draw_patches(xyz, config, student.config, -1)
    visible, masked = act.split_mask(mask, xyz.device)
    prediction = student.eval()(neighborhood, center, mask).float()  # (B, M, D)
    if teacher is not None:
        features = teacher.features(neighborhood, center)
        if config.loss == "cosine":  # which leaves the length open
            prediction = F.normalize(prediction, dim=-1) * features.norm(dim=-1).mean()
        features = features.scatter(1, masked[..., None].expand_as(prediction), prediction)
        _, fine = teacher.model.decoder(features)
        prediction = act.gather_points(fine.flatten(2), masked)  # (B, M, 3 S)
    seen = act.gather_points(neighborhood.flatten(2), visible)  # (B, V, 3 S)
    patches = torch.cat([seen, prediction], dim=1).unflatten(2, (-1, 3))  # (B, G, S, 3)
    center = act.gather_points(center, torch.cat([visible, masked], dim=1))
    points = (patches + center[:, :, None]).flatten(1, 2).cpu().numpy()  # (B, G S, 3)
    n = seen[0].numel() // 3  # visible points of a cloud
    colors = pictures.palette(2).repeat([n, points.shape[1] - n], axis=0)
    rows = []
    for array, cloud in zip(xyz.cpu().numpy(), points, strict=True):
        rows.append([(array, None), (cloud[:n], colors[:n]), (cloud, colors)])
    pictures.write_gallery(path, rows, caption=f"input, visible patches, with predicted; {order}")


def main(config):
    config, device = run.setup(config, PRESETS)
    target = TARGETS[config.target]
    if config.loss and not target.takes_loss:
        raise act.UserError(f"--loss {config.loss}: expected --target teacher or backbone")
    if target.takes_loss:
        config = replace(config, loss=config.loss or "cosine")

    # -- data
    dataset = datasets.open_dataset(config.data, config.cache, config.variant, config.drop_invalid)
    print(datasets.describe(dataset))
    train = dataset.everything or dataset.train
    test = dataset.test
    if dataset.everything:
        print(f"pretraining on all {len(train)} clouds, the test set's too, without labels")
    config = run.plan(config, len(train))
    identities = train.identities()

    # -- model
    teacher = None
    if target.needs_teacher:
        teacher = FixedTeacher(config.teacher, device)
    source = None
    if config.init:
        source = run.load_model(config.init, device, act.Student)
    c = student_config(config, source, teacher, train)
    torch.manual_seed(config.seed)
    student = act.Student(c).to(device)
    if source is not None:
        load_matching(student, source, config)
    clouds.check_sizes([train, test], c, config.points)
    train = run.place(train, device)
    test = run.place(test, device)
    if not 0 < int(config.mask_ratio * c.num_group) < c.num_group:
        raise act.UserError(f"--mask-ratio {config.mask_ratio}: expected some patches")
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    start = f"stage II on {device} x {processes.WORLD}, {config.precision}"
    sizes = f"size {config.size}, {c.width} wide, {c.depth} deep, {millions:.1f} M parameters"
    print(f"{start}; {sizes}; target {config.target}")

    # -- optimizer, resume
    optimizer = run.adamw(student, config.lr, config.weight_decay)
    log, _ = run.begin(config, student, optimizer, identities)
    net = processes.parallel(student, config)

    # -- loop
    norms = run.new_norms(net, log.step)
    warmup = 10 * (len(train) // config.batch_size)  # ten epochs
    share = processes.SHARE
    for epoch in range(log.epoch, config.epochs):
        student.train()
        for batch in run.epoch_batches(config, len(train), epoch, log.step):
            run.set_momentum(norms, log.step)
            lr = run.set_lr(optimizer, log.step, config, end=1e-6, warmup=warmup)
            generator = run.seed_step(config.seed, log.step, device)
            xyz, _ = train.sample(batch, config.points, generator, share)
            xyz = clouds.scale_translate(xyz, generator, share=share)  # (B, N, 3)
            neighborhood, center, mask = draw_patches(xyz, config, c, log.step, share)
            visible, masked = act.split_mask(mask, device)
            with run.autocast(config, device):
                prediction = net(neighborhood, center, mask, (visible, masked))  # (B, M, D)
                loss = target.loss(prediction, neighborhood, center, masked, teacher, config.loss)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = run.gradient_norm(student)
            optimizer.step()
            log.add(loss=loss, grad_norm=grad_norm, lr=lr)
        log.end_epoch(cosine_per_depth=cosine_per_depth(student, test, config))
        run.save(log, student, optimizer)

    # -- results
    if processes.RANK > 0:
        return
    torch.manual_seed(config.seed)
    untrained = act.Student(c).to(device)
    chosen = torch.arange(0, len(test), max(1, len(test) // 5))[:5]
    xyz, _ = test.sample(chosen, config.points, run.seeded(device, config.seed, "picture"))
    order = f"from the top {', '.join(test.names[i] for i in chosen)}"
    write_features(student, untrained, teacher, xyz, order, log.folder / "features")
    if target.has_points:
        write_reconstruction(student, teacher, xyz, order, config, log.folder / "reconstruction")
    pictures.write_chart(log.folder / "loss.svg", log.rows)
    labels = dataset.train.labels
    if labels is None or len(labels.unique()) < 2:
        log.close()
        print("no linear SVM, which takes training clouds of two classes")
        return
    before = probe(untrained, "untrained", dataset.train, test, config)
    after = probe(student, "trained", dataset.train, test, config)
    svms = dict(svm_untrained=before[0], svm_trained=after[0])
    log.close(**svms, knn_untrained=before[1], knn_trained=after[1])
    text = f"{before[0]:.1f} % untrained -> {after[0]:.1f} % trained"
    print(f"linear SVM on frozen features, {len(test)} test clouds: {text}")
    print(f"5 nearest neighbours by cosine: {before[1]:.1f} % -> {after[1]:.1f} %")


if __name__ == "__main__":
    run.run_command(main, Config, __doc__, PRESETS)
