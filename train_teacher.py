"""Stage I (Sec. 4.1): a frozen pretrained Transformer becomes a 3D autoencoder, the teacher.

    python train_teacher.py                                                        # embedded shapes, minutes on two cores
    python train_teacher.py --data my_clouds --out runs/mine                       # a folder of your own clouds
    python train_teacher.py --data ShapeNet55 --size base --weights vit_base_patch16_384      # the published run, on a GPU
    torchrun --nproc_per_node=8 train_teacher.py --data ShapeNet55 --size base                # the same batch on 8 GPUs

Leaves last.pt, metrics.jsonl, config.json, reconstruction (.png and .ply) and loss.png in --out.
"""

from dataclasses import dataclass

import torch

import act
import clouds as shapes
import training
from training import flag, say

# -- config -----------------------------------------------------------------------------------------------------------
DEFAULTS = {  # size: epochs, batch and rate of a default run; base is the published one
    "tiny": dict(epochs=5, batch_size=4, lr=1e-3, log_every=20),
    "small": dict(epochs=50, batch_size=64, lr=5e-4),
    "base": dict(epochs=300, batch_size=64, lr=5e-4),
}
PUBLISHED_STEPS = 196_500  # 300 epochs of 41,952 clouds in batches of 64; shorter runs scale the schedules


@dataclass
class Config(training.RunConfig):
    out: str = flag("runs/teacher", "folder of the run's checkpoint, log, configuration and pictures")
    lr: float = flag(0.0, "peak learning rate; 0: the size's default", 5e-4, group="training")
    batch_size: int = flag(0, "clouds per step over all processes; 0: the size's default", 64, group="training")
    weight_decay: float = flag(5e-4, "AdamW's weight decay", 5e-4, group="training")
    weights: str = flag("auto", "the trunk: auto (public weights if they can be had), random, a NAME of act.pretrained_names()\n"
                        "or the PATH of a weight file", "vit_base_patch16_384", group="model")
    heads: int = flag(0, "attention heads of a weight file that does not tell them; 0: width // 64", group="model")
    prompt: str = flag("deep", "prompt tuning: deep, shallow or none", "deep", ("deep", "shallow", "none"), group="model")


def temperature(step, total):
    """Of the Gumbel-softmax: 1 -> 0.0625 over the first 100,000 published steps."""
    return training.cosine(step / (100_000 * min(1, total / PUBLISHED_STEPS)), 1.0, 0.0625)


def kl_weight(step, total):
    """0 for 10,000 published steps, then 0 -> 0.1 over 100,000."""
    scale = min(1, total / PUBLISHED_STEPS)
    return training.cosine((step - 10_000 * scale) / (100_000 * scale), 0.0, 0.1)


def open_trunk(config, name, width):
    """(trunk, what it holds) by --weights; auto falls back to a random trunk and says so loudly."""
    if config.weights not in ("auto", "random"):
        return act.load_pretrained(config.weights, config.heads or None), config.weights
    if config.weights == "auto":
        try:
            return act.load_pretrained(name), name
        except ValueError as error:
            say(f"NO PRETRAINED WEIGHTS: THE TRUNK IS RANDOM. {error}")
    return act.Trunk(act.TrunkConfig(width=width, num_heads=width // 64, mlp_hidden=4 * width)), "random"


@torch.no_grad()
def evaluate(teacher, clouds, points, seed):
    """Reconstruction of whole held-out clouds, patches moved back to their centres: CD-L1, CD-L2 (unit sphere), F-score."""
    teacher.eval()
    device, sums, count = next(teacher.parameters()).device, torch.zeros(3, dtype=torch.float64), 0
    for indices in torch.linspace(0, len(clouds) - 1, min(len(clouds), 256)).long().split(32):
        xyz, _ = clouds.draw(indices, points, act.seeded(device, seed, "test", count))
        out = teacher(xyz, hard=True)
        fine = (out.fine + out.center[:, :, None]).flatten(1, 2)  # (B, G S, 3)
        figures = act.chamfer_distance(fine, xyz), act.chamfer_distance(fine, xyz, norm=2), act.fscore(fine, xyz).mean()
        sums += torch.stack(figures).double().cpu() * len(indices)
        count += len(indices)
    return dict(zip(("cd_l1", "cd_l2", "fscore"), (sums / count).tolist()))


@torch.no_grad()
def picture(teacher, clouds, points, seed):
    """Input, its patches in colours, the coarse and the fine reconstruction of fixed held-out clouds."""
    device = next(teacher.parameters()).device
    xyz, _ = clouds.draw(torch.arange(0, len(clouds), max(1, len(clouds) // 5))[:5], points, act.seeded(device, seed, "picture"))
    out = teacher.eval()(xyz, hard=True)
    rows = []
    for i in range(len(xyz)):
        center = out.center[i][:, None]
        patches, coarse, fine = ((t[i] + center).cpu().numpy() for t in (out.neighborhood, out.coarse, out.fine))
        colors = shapes.palette(len(patches)).repeat(patches.shape[1], axis=0)
        rows.append([(xyz[i].cpu().numpy(), None), (patches.reshape(-1, 3), colors),
                     (coarse.reshape(-1, 3), None), (fine.reshape(-1, 3), None)])
    return rows, ["input", "patches", "coarse", "fine"]


def main():
    config = training.parse_flags(Config, __doc__)
    device, rank, world = training.start_processes(config)
    config = training.resolve(config, device, DEFAULTS)
    size = training.SIZES[config.size]

    # -- data ---------------------------------------------------------------------------------------------------------
    train, test = training.open_data(config, device)
    points = config.points

    # -- model --------------------------------------------------------------------------------------------------------
    trunk, weights = open_trunk(config, size["trunk"], size["trunk_width"])
    sizes = act.TeacherConfig(**size["teacher"], prompt=config.prompt, weights=weights)
    torch.manual_seed(config.seed)
    teacher = act.Teacher(sizes, trunk).to(device)
    if sizes.tokenizer == "fixed":
        # clouds with four times as many patches as codes; a small set gives several draws of each cloud
        some = torch.linspace(0, len(train) - 1, 4 * sizes.num_tokens // sizes.num_group).long()
        teacher.fix_tokenizer(train.draw(some, points, act.seeded(device, config.seed, "codes"))[0])
    trained = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    say(f"stage I on {device} x {world}, {config.precision}: size {config.size}, trunk {weights} "
        f"({teacher.config.trunk.width} wide, {teacher.config.trunk.depth} layers, frozen), {trained / 1e6:.1f} M trained parameters; "
        f"{len(train)} clouds of {points} points, {len(test)} held out")

    # -- optimizer, resume --------------------------------------------------------------------------------------------
    run = training.Run(config, teacher, train, config.weight_decay, extra=dict(usage=torch.zeros(sizes.num_tokens)))
    usage = run.extra["usage"] = run.extra["usage"].to(device)  # of each code, in the epoch so far
    if rank == 0 and run.step == 0:
        run.extra["before"] = evaluate(teacher, test, points, config.seed)

    def schedule(step):
        return dict(lr=training.learning_rate(step, run.total, config.lr, 1e-7, 10 * run.per_epoch),
                    temperature=temperature(step, run.total),
                    # the KL term of a fixed tokenizer is a constant
                    kl_weight=kl_weight(step, run.total) if sizes.tokenizer == "trained" else 0.0)

    # -- loop ---------------------------------------------------------------------------------------------------------
    def loss(net, step, indices, generator, share, temperature, kl_weight):
        xyz, _ = train.draw(indices, points, generator)
        out = net(xyz[share], temperature)
        total, reconstruction, kl = act.teacher_loss(out, kl_weight)
        codes = out.logits.argmax(-1).flatten()
        usage.index_add_(0, codes, usage.new_ones(len(codes)))  # bincount would wait for a GPU
        return total, dict(reconstruction=reconstruction, kl=kl)

    def finish_epoch(epoch):
        if world > 1:
            torch.distributed.all_reduce(usage)
        share = usage / usage.sum()
        perplexity = torch.exp(-(share * share.clamp_min(1e-12).log()).sum()).item()
        used = int((usage > 0).sum())
        usage.zero_()
        if perplexity < max(2, len(usage) / 200):
            say(f"warning: the codebook has collapsed, perplexity {perplexity:.1f} of {len(usage)} codes")
        return dict(perplexity=perplexity, codes_used=used)

    run.train(schedule, loss, finish_epoch)

    # -- results ------------------------------------------------------------------------------------------------------
    if rank == 0:
        before, after = run.extra["before"], evaluate(teacher, test, points, config.seed)
        run.close([("reconstruction", picture(teacher, test, points, config.seed))],
                  **{f"{k}_before": v for k, v in before.items()}, **{f"{k}_after": v for k, v in after.items()})
        for key, name in (("cd_l1", "CD-L1 x 1000"), ("cd_l2", "CD-L2 x 1000"), ("fscore", "F-score at 0.01, %")):
            scale = 100 if key == "fscore" else 1000
            say(f"reconstruction of {min(len(test), 256)} held-out clouds, {name}: {scale * before[key]:.2f} untrained -> "
                f"{scale * after[key]:.2f} trained")


if __name__ == "__main__":
    training.run_script(main)
