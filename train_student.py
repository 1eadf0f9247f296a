"""Stage II (Sec. 4.2): a plain 3D Transformer learns to predict the teacher's features of the patches it cannot see.

    python train_student.py                                             # after train_teacher.py, on the embedded shapes
    python train_student.py --target coordinates                        # the Point-MAE baseline, all else equal
    python train_student.py --data ShapeNet55 --size base --teacher runs/teacher/last.pt       # the published run, on a GPU
    torchrun --nproc_per_node=8 train_student.py --data ShapeNet55 --size base                 # the same batch on 8 GPUs

Leaves last.pt, metrics.jsonl, config.json, reconstruction, features (.png and .ply) and loss.png in --out.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import act
import clouds as shapes
import training
from training import flag, say

# -- config -----------------------------------------------------------------------------------------------------------
DEFAULTS = {  # size: epochs, batch and rate of a default run; base is the published one
    "tiny": dict(epochs=14, batch_size=16, lr=1e-3, mask_ratio=0.6, log_every=20),
    "small": dict(epochs=50, batch_size=128, lr=1e-3, mask_ratio=0.8),
    "base": dict(epochs=300, batch_size=128, lr=1e-3, mask_ratio=0.8),
}


@dataclass
class Config(training.RunConfig):
    out: str = flag("runs/student", "folder of the run's checkpoint, log, configuration and pictures")
    lr: float = flag(0.0, "peak learning rate; 0: the size's default", 1e-3, group="training")
    batch_size: int = flag(0, "clouds per step over all processes; 0: the size's default", 128, group="training")
    weight_decay: float = flag(0.05, "AdamW's weight decay", 0.05, group="training")
    teacher: str = flag("runs/teacher/last.pt", "the teacher's checkpoint, ours or the public release's", group="model")
    target: str = flag("teacher", "what is predicted at masked patches: the teacher's features, point coordinates or codes",
                       "teacher", ("teacher", "coordinates", "codes"), group="model")
    loss: str = flag("cosine", "distance to the teacher's features", "cosine", ("cosine", "smooth_l1", "l2"), group="model")
    mask_ratio: float = flag(0.0, "share of hidden patches; 0: the size's default", 0.8, group="model")
    mask: str = flag("random", "random patches, or a block of neighbours", "random", ("random", "block"), group="model")


class Target:
    """What the student predicts, and how far off it is. The teacher is fixed, so its prompts are computed once."""

    def __init__(self, config, teacher):
        self.config, self.teacher = config, teacher
        sizes = teacher.config
        self.dim = dict(teacher=sizes.decoder_dims, coordinates=3 * sizes.group_size, codes=sizes.num_tokens)[config.target]
        with torch.no_grad():
            self.prefix = teacher.prefix()

    def loss(self, prediction, neighborhood, center, masked):
        """prediction: (B, M, D) at the groups `masked` (B, M) -> scalar."""
        if self.config.target == "coordinates":  # Point-MAE: CD-L2 of the masked patches
            truth = act.gather_points(neighborhood.flatten(2), masked)
            return act.chamfer_distance(*(t.float().reshape(-1, self.dim // 3, 3) for t in (prediction, truth)), norm=2)
        with torch.no_grad():
            if self.config.target == "codes":
                codes = self.teacher.tokenize(neighborhood, center).gather(1, masked)
            else:
                features = act.gather_points(self.teacher.features(neighborhood, center, self.prefix), masked)
        if self.config.target == "codes":  # as BEiT and Point-BERT
            return F.cross_entropy(prediction.float().flatten(0, 1), codes.flatten())
        return act.distillation_loss(prediction, features, self.config.loss)

    @torch.no_grad()
    def reconstruct(self, prediction, neighborhood, center, masked):
        """The masked patches as points, (B, M, S, 3), as the predictions have them (features through the teacher's decoder)."""
        B, M = masked.shape
        S = neighborhood.shape[2]
        if self.config.target == "coordinates":
            return prediction.view(B, M, S, 3)
        if self.config.target == "codes":
            codes = self.teacher.tokenize(neighborhood, center).scatter(1, masked, prediction.argmax(dim=-1))
            graph = act.knn(center, center, 4)[1]
            tokens = self.teacher.visual(F.embedding(codes, self.teacher.codebook), center, self.prefix)
            features = self.teacher.dgcnn_2(tokens, graph)
        else:
            features = self.teacher.features(neighborhood, center, self.prefix)
            if self.config.loss == "cosine":  # the loss leaves the length open: that of the mean true feature
                prediction = F.normalize(prediction, dim=-1) * features.norm(dim=-1).mean()
            features = features.scatter(1, masked[..., None].expand_as(prediction), prediction)
        fine = self.teacher.decoder(features)[1]  # (B, G, S, 3)
        return act.gather_points(fine.flatten(2), masked).view(B, M, S, 3)


def draw_mask(config, center, step):
    """The masks of a whole batch, from the step alone."""
    generator = act.seeded("cpu", config.seed, "mask", step)
    return (act.random_mask if config.mask == "random" else act.block_mask)(center, config.mask_ratio, generator)


@torch.no_grad()
def features(student, clouds, chosen, points, seed):
    """Frozen features [class token ; max] and labels of the clouds `chosen`, or of 4000 evenly among them."""
    device, out = next(student.parameters()).device, []
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(len(chosen), 4000)).long()]
    for i, indices in enumerate(chosen.split(64)):
        xyz, _ = clouds.draw(indices, points, act.seeded(device, seed, "features", i))
        out.append(act.global_feature(student.eval().encode(xyz)))
    return torch.cat(out), clouds.labels[chosen.to(clouds.labels.device)].to(device)


@torch.no_grad()
def pictures(config, student, untrained, target, clouds):
    """reconstruction: input, visible patches, output; features: principal components of the patches' features."""
    device = next(student.parameters()).device
    fixed = torch.arange(0, len(clouds), max(1, len(clouds) // 5))[:5]
    xyz, _ = clouds.draw(fixed, config.points, act.seeded(device, config.seed, "picture"))
    neighborhood, center = act.group_points(xyz, target.teacher.config.num_group, target.teacher.config.group_size)
    mask = draw_mask(config, center, -1)
    visible, masked = act.split_mask(mask, device)
    output = target.reconstruct(student(neighborhood, center, mask).float(), neighborhood, center, masked)
    of = {"teacher": target.teacher.features(neighborhood, center, target.prefix),
          "student": student.encode(xyz)[:, 1:], "untrained": untrained.encode(xyz)[:, 1:]}
    reconstruction, components = [], []
    for i in range(len(xyz)):
        cloud = xyz[i].cpu().numpy()
        seen = (neighborhood[i] + center[i][:, None])[visible[i]].flatten(0, 1).cpu().numpy()
        made = (output[i] + center[i][masked[i]][:, None]).flatten(0, 1).cpu().numpy()
        colors = shapes.palette(2)[[0] * len(seen) + [1] * len(made)]
        reconstruction.append([(cloud, None), (seen, colors[: len(seen)]), (np.concatenate([seen, made]), colors)])
        carried = [act.interpolate(xyz[i : i + 1], center[i : i + 1], tokens[i : i + 1].float())[0] for tokens in of.values()]
        components.append([(cloud, None), *((cloud, shapes.pca_colors(tokens.cpu().numpy())) for tokens in carried)])
    return [("reconstruction", (reconstruction, ["input", "visible", "output"])), ("features", (components, ["input", *of]))]


def main():
    config = training.parse_flags(Config, __doc__)
    device, rank, world = training.start_processes(config)
    config = training.resolve(config, device, DEFAULTS)
    if not 0 < config.mask_ratio < 1:
        raise ValueError(f"--mask-ratio must lie between 0 and 1, found {config.mask_ratio}")

    # -- data ---------------------------------------------------------------------------------------------------------
    train, test = training.open_data(config, device, everything=True)

    # -- model: the teacher from its checkpoint alone, the student's patches as the teacher's ------------------------------
    teacher = act.load(config.teacher, device)
    if not isinstance(teacher, act.Teacher):
        raise ValueError(f"--teacher {config.teacher}: holds a {type(teacher).__name__}, wanted a Teacher")
    teacher.requires_grad_(False)
    if config.compile:
        training.compile_blocks(teacher)
    target = Target(config, teacher)
    G, S = teacher.config.num_group, teacher.config.group_size
    if not 0 < int(config.mask_ratio * G) < G:
        raise ValueError(f"--mask-ratio {config.mask_ratio} hides {int(config.mask_ratio * G)} of the {G} patches, "
                         "wanted some, not all")
    sizes = act.StudentConfig(**{**training.SIZES[config.size]["encoder"], "num_group": G, "group_size": S}, target_dim=target.dim)
    torch.manual_seed(config.seed)
    student = act.Student(sizes).to(device)
    parameters = sum(p.numel() for p in student.parameters())
    say(f"stage II on {device} x {world}, {config.precision}: size {config.size}, {parameters / 1e6:.1f} M parameters; "
        f"target {config.target} of a teacher whose trunk is {teacher.config.weights}; "
        f"{len(train)} clouds of {config.points} points, {len(test)} held out")

    # -- optimizer, resume --------------------------------------------------------------------------------------------
    run = training.Run(config, student, train, config.weight_decay)

    def schedule(step):
        return dict(lr=training.learning_rate(step, run.total, config.lr, 1e-6, 10 * run.per_epoch))

    # -- loop ---------------------------------------------------------------------------------------------------------
    def loss(net, step, indices, generator, share):
        xyz, _ = train.draw(indices, config.points, generator)
        xyz = shapes.scale_translate(xyz, generator)
        neighborhood, center = act.group_points(xyz, G, S)
        mask = draw_mask(config, center, step)[share]
        neighborhood, center = neighborhood[share], center[share]
        _, masked = act.split_mask(mask, device)
        return target.loss(net(neighborhood, center, mask), neighborhood, center, masked), {}

    @torch.no_grad()
    def finish_epoch(epoch):
        """Mean cosine between the tokens of one cloud after each block: near 1, the tokens have collapsed into one."""
        xyz, _ = test.draw(torch.arange(min(len(test), 16)), config.points, act.seeded(device, config.seed, "depth"))
        student.eval()
        tokens = student.encoder.layers(*act.group_points(xyz, G, S), range(1, sizes.depth + 1))
        unit = [F.normalize(t[:, 1:].float(), dim=-1) for t in tokens]
        return dict(cosine_per_depth=[round((u @ u.mT).mean().item(), 4) for u in unit])

    run.train(schedule, loss, finish_epoch)

    # -- results ------------------------------------------------------------------------------------------------------
    if rank == 0:
        torch.manual_seed(config.seed)
        untrained, figures = act.Student(sizes).to(device).eval(), {}
        known = set(test.names)  # ShapeNet-55 is trained on whole: its test clouds teach no SVM
        taught = torch.tensor([i for i, name in enumerate(train.names) if name not in known], dtype=torch.long)
        if test.labels is not None and len(train.labels[taught].unique()) > 1:
            for name, model in (("svm_untrained", untrained), ("svm_trained", student)):
                figures[name], _ = training.svm_accuracy(*features(model, train, taught, config.points, config.seed),
                                                    *features(model, test, torch.arange(len(test)), config.points, config.seed))
        run.close(pictures(config, student, untrained, target, test), **figures)
        if figures:
            say(f"linear SVM on frozen features, {min(len(taught), 4000)} training clouds, {min(len(test), 4000)} held out, "
                f"{len(test.classes)} classes: {figures['svm_untrained']:.1f} % untrained -> {figures['svm_trained']:.1f} % trained")
        else:
            say("no linear SVM: it wants training clouds of two classes beside the held-out ones")


if __name__ == "__main__":
    training.run_script(main)
