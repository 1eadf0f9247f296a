"""Stage I (Sec. 4.1): a frozen pretrained Transformer becomes a 3D autoencoder, the teacher.

    python train_teacher.py  # synthetic shapes, minutes on two cores
    python train_teacher.py --data my_clouds --out runs/mine  # your own clouds
    python train_teacher.py --data ShapeNet55 --size base  # the published run, on one GPU
    torchrun --nproc_per_node=8 train_teacher.py --data ShapeNet55 --size base  # on eight

Leaves last.pt, metrics.jsonl, config.json, reconstruction.png and .ply, and loss.svg in --out.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

import act
from util import clouds, datasets, pictures, processes, run, weights
from util.run import flag

# -- config
PRESETS = {  # base is the published run
    "tiny": dict(epochs=6, batch_size=4, lr=1e-3, log_every=100, codes="information"),
    "small": dict(epochs=50, batch_size=64, lr=5e-4, codes="information"),
    "base": dict(epochs=300, batch_size=64, lr=5e-4, codes="kl"),
}
WIDTHS = dict.fromkeys(("encoder_dims", "tokens_dims", "decoder_dims"), 192)
TEACHERS = {  # what differs from the paper's sizes
    "tiny": dict(num_group=32, num_tokens=512, num_prompt=16) | WIDTHS,
    "small": dict(num_tokens=2048, num_prompt=32),
    "base": dict(),
}
INFORMATION = 0.02  # weight of the mutual information of patch and code
CODES = ("kl", "information")
PUBLISHED_STEPS = 196_500  # 300 epochs of 41,952 clouds in batches of 64
SET = [f.name for f in fields(act.TeacherConfig) if type(f.default) in (int, float)]


@dataclass
class Config(run.RunConfig):
    out: str = flag("runs/teacher", "folder of the results")
    weight_decay: float = flag(5e-4, "AdamW's weight decay", 5e-4)
    weights: str = flag("auto", "auto: public if possible; random, none, a NAME or a PATH", "ViT-B")
    codes: str = flag(None, "term for varied codes; base: kl, else information", "kl", str, CODES)
    prompt: str = flag("deep", "prompt tuning", "deep", choices=("deep", "shallow", "none"))
    tune: str = flag("prompts", "or full: the backbone, too", "prompts", None, ("prompts", "full"))
    init: str = flag("", "start from the teacher in this checkpoint, ours or the official one")
    set: list = flag((), f"NAME=VALUE of the teacher's {', '.join(SET)}")


# -- model
def open_backbone(source, name, width):
    """The backbone of --weights and its name; a random one if auto finds no public weights."""
    if source == "none":
        return None, source
    if source not in ("auto", "random"):
        return weights.load_pretrained(source), source
    if source == "auto":
        try:
            return weights.load_pretrained(name), name
        except act.UserError as error:  # whose message has the file's long name twice
            reason = error.__cause__ or error
            print(f"THE BACKBONE IS RANDOM: the weights {name} could not be fetched ({reason})")
    sizes = act.BackboneConfig(width=width, num_heads=width // 64, mlp_hidden=4 * width)
    return act.Backbone(sizes), "random"


def build_teacher(config, device):
    """From --init, with the sizes of that checkpoint, or by the flags."""
    if config.init:
        run.refuse_flags(config, ["weights", "prompt", "tune", "set"], "--init")
        return run.load_model(config.init, device, act.Teacher)
    name, width = run.BACKBONES[config.size]
    backbone, source = open_backbone(config.weights, name, width)
    sizes = act.TeacherConfig(weights=source, **TEACHERS[config.size])
    if backbone is not None:
        sizes = replace(sizes, prompt=config.prompt, tune=config.tune)
    elif config.prompt == "shallow" or config.tune == "full":
        raise act.UserError("--weights none: expected no --prompt shallow and no --tune full")
    else:
        sizes = replace(sizes, backbone=None, prompt="none")
    sizes = run.override(sizes, config.set, SET)
    torch.manual_seed(config.seed)
    return act.Teacher(sizes, backbone).to(device)


# -- loss: as published, or with the information term, which a run of minutes needs
def temperature(step, total):
    """Of the Gumbel-softmax: 1 -> 0.0625 over the first 100,000 steps of the published run."""
    return run.cosine(step / (100_000 * min(1, total / PUBLISHED_STEPS)), 1.0, 0.0625)


def kl_weight(step, total):
    """0 for the first 10,000 steps of the published run, then 0 -> 0.1 over 100,000."""
    scale = min(1, total / PUBLISHED_STEPS)
    return run.cosine((step - 10_000 * scale) / (100_000 * scale), 0.0, 0.1)


def published_loss(output, step, total):
    """Reconstruction + weight * KL: (loss, reconstruction, KL, weight)."""
    weight = kl_weight(step, total)
    loss, reconstruction, kl = act.teacher_loss(output, weight)
    return loss, reconstruction, kl, weight


def information_loss(output, step, total):
    """Reconstruction - INFORMATION * I(patch; code): (loss, reconstruction, KL, 0). I, in nats, is
    the entropy of the mean probabilities of all processes less the mean entropy of this one's."""
    _, reconstruction, kl = act.teacher_loss(output, 0.0)
    log_q = output.logits.float().flatten(0, 1).log_softmax(dim=-1)  # (B G, codes)
    mean = processes.average(log_q.exp().mean(dim=0))
    entropy = -(log_q.exp() * log_q).sum(dim=-1).mean()
    entropy_of_mean = -(mean * mean.clamp_min(1e-12).log()).sum()
    loss = reconstruction - INFORMATION * (entropy_of_mean - entropy)
    return loss, reconstruction, kl, 0.0


# -- start of the codes, with --codes information
@torch.no_grad()
def start_codes(teacher, train, config, device):
    """Sets codebook, the logits' layer and BatchNorm's statistics from training patches, so that a
    patch gets the code it most resembles. From noise, the decoder learns to ignore codes."""
    c = teacher.config
    if c.tokens_dims != c.encoder_dims:
        raise act.UserError(f"--set: expected tokens_dims of {c.encoder_dims}, got {c.tokens_dims}")
    # Four patches for each code; of a small set, several samples of each cloud.
    indices = torch.linspace(0, len(train) - 1, math.ceil(4 * c.num_tokens / c.num_group)).long()
    xyz, _ = train.sample(indices, config.points, run.seeded(device, config.seed, "codes"))
    neighborhood, center = act.group_points(xyz, c.num_group, c.group_size)
    torch.optim.swa_utils.update_bn([neighborhood], teacher.encoder)  # its running statistics
    teacher.encoder.eval()
    patch = teacher.encoder(neighborhood)  # (B, G, C)
    edges = teacher.dgcnn_1.edges(patch, act.center_graph(center))  # (B, G, edges)
    patch = patch.flatten(0, 1)  # (n, C)
    edges = edges.flatten(0, 1).float()  # (n, edges)
    # The numbers of the chosen patches do not depend on --seed; the patches themselves do.
    chosen = torch.randperm(len(patch), generator=run.seeded("cpu", "codes"))[: c.num_tokens]
    patch = (patch - patch.mean(dim=0)) / (patch.std(dim=0) + 1e-6)
    teacher.codebook.copy_(patch[chosen])
    mean = edges.mean(dim=0)
    axis = F.normalize(mean, dim=0)
    rows = edges[chosen] - mean  # (codes, edges)
    rows = rows - (rows @ axis)[:, None] * axis  # the mean adds the same to every logit
    linear, norm = teacher.dgcnn_1.layer5
    linear.weight.copy_(F.normalize(rows, dim=-1))
    norm.weight.fill_(10.0)  # logits well above the Gumbel noise, whose standard deviation is 1.3


# -- evaluation
def whole(patches, center):
    """Patches relative to their centres as clouds: (B, G, S, 3), (B, G, 3) -> (B, G S, 3)."""
    return (patches + center[:, :, None]).flatten(1, 2)


def compare(cloud, xyz):
    """CD-L1, CD-L2, F-score at 0.01 of (B, N, 3), (B, N2, 3), as in act, in 2 searches."""
    to_xyz = act.knn(cloud, xyz, 1)[0]  # (B, N, 1) squared distances
    to_cloud = act.knn(xyz, cloud, 1)[0]  # (B, N2, 1)
    precision = (to_xyz.sqrt() < 0.01).float().mean(dim=(1, 2))
    recall = (to_cloud.sqrt() < 0.01).float().mean(dim=(1, 2))
    fscore = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    cd_l1 = (to_xyz.sqrt().mean() + to_cloud.sqrt().mean()) / 2
    return dict(cd_l1=cd_l1, cd_l2=to_xyz.mean() + to_cloud.mean(), fscore=fscore.mean())


@torch.no_grad()
def evaluate(teacher, test, config, count, swap_codes=False):
    """Metrics of `compare` for `count` whole clouds, with argmax codes. swap_codes:
    of two or more, cd_l1_other too: with another cloud's codes, equal if they are ignored."""
    teacher.eval()
    totals = {}
    done = 0
    chosen = torch.linspace(0, len(test) - 1, min(len(test), count)).long()
    batch_size = 32
    if len(chosen) % batch_size == 1:  # the last would be alone in its batch
        batch_size = 33
    for indices in chosen.split(batch_size):
        generator = run.seeded(teacher.codebook.device, config.seed, "test", done)
        xyz, _ = test.sample(indices, config.points, generator)
        output = teacher(xyz, hard=True)
        metrics = compare(whole(output.fine, output.center), xyz)
        if swap_codes and len(chosen) > 1:
            codes = output.logits.argmax(dim=-1)
            codes = codes.roll(len(xyz) // 2, dims=0)  # mostly of another class
            _, fine = teacher.decode(F.embedding(codes, teacher.codebook), output.center)
            metrics["cd_l1_other"] = act.chamfer_distance(whole(fine, output.center), xyz)
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value.item() * len(xyz)
        done += len(xyz)
    return {name: total / done for name, total in totals.items()}


@torch.no_grad()
def write_picture(teacher, test, config, path):
    """Input, its patches in colours, coarse and fine reconstruction of five test clouds."""
    chosen = torch.arange(0, len(test), max(1, len(test) // 5))[:5]
    generator = run.seeded(teacher.codebook.device, config.seed, "picture")
    xyz, _ = test.sample(chosen, config.points, generator)
    output = teacher.eval()(xyz, hard=True)
    colors = pictures.palette(teacher.config.num_group).repeat(teacher.config.group_size, axis=0)
    rows = [[(cloud, None)] for cloud in xyz.cpu().numpy()]
    shown = ((output.neighborhood, colors), (output.coarse, None), (output.fine, None))
    for patches, painted in shown:
        for row, cloud in zip(rows, whole(patches, output.center).cpu().numpy(), strict=True):
            row.append((cloud, painted))
    order = f"from the top {', '.join(test.names[i] for i in chosen)}"
    pictures.write_gallery(path, rows, caption=f"input, patches, coarse, fine; {order}")


def main(config):
    config, device = run.setup(config, PRESETS)

    # -- data
    dataset = datasets.open_dataset(config.data, config.cache, config.variant, config.drop_invalid)
    print(datasets.describe(dataset))
    config = run.plan(config, len(dataset.train))

    # -- model
    teacher = build_teacher(config, device)
    c = teacher.config
    clouds.check_sizes([dataset.train, dataset.test], c, config.points)
    train = run.place(dataset.train, device)
    test = run.place(dataset.test, device)
    loss_function = published_loss
    slow = ()  # the modules that learn at a tenth of the rate
    if config.codes == "information":
        loss_function = information_loss
        slow = ("encoder.", "dgcnn_1.", "codebook")
        if not config.init:
            start_codes(teacher, train, config, device)
    backbone = "none"
    if c.backbone is not None:
        backbone = f"{c.weights}, {c.backbone.width} wide, {c.backbone.depth} deep"
    trained = sum(p.numel() for p in teacher.parameters() if p.requires_grad) / 1e6
    sizes = f"size {config.size}, backbone {backbone}, {trained:.1f} M trained parameters"
    start = config.init or "scratch"
    print(f"stage I on {device} x {processes.WORLD}, {config.precision}; {sizes}, from {start}")

    # -- optimizer, resume
    optimizer = run.adamw(teacher, config.lr, config.weight_decay, slow)
    log, state = run.begin(config, teacher, optimizer, dataset.train.identities())
    net = processes.parallel(teacher, config)
    before = state["before"] if state else evaluate(teacher, test, config, 256)

    # -- loop
    norms = run.new_norms(net, log.step)
    warmup = 10 * (len(train) // config.batch_size)  # ten epochs
    for epoch in range(log.epoch, config.epochs):
        teacher.train()
        usage = torch.zeros(c.num_tokens, device=device)  # of each code in this epoch
        for batch in run.epoch_batches(config, len(train), epoch, log.step):
            run.set_momentum(norms, log.step)
            lr = run.set_lr(optimizer, log.step, config, end=1e-7, warmup=warmup)
            tau = temperature(log.step, config.steps)
            generator = run.seed_step(config.seed, log.step, device)
            xyz, _ = train.sample(batch, config.points, generator, processes.SHARE)  # (B, N, 3)
            with run.autocast(config, device):
                output = net(xyz, tau)
                loss, reconstruction, kl, weight = loss_function(output, log.step, config.steps)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = run.gradient_norm(teacher)
            optimizer.step()
            codes = output.logits.argmax(dim=-1).flatten()
            usage.index_add_(0, codes, usage.new_ones(len(codes)))  # bincount would wait for a GPU
            rates = dict(grad_norm=grad_norm, lr=lr, temperature=tau, kl_weight=weight)
            log.add(loss=loss, reconstruction=reconstruction, kl=kl, **rates)
        usage = processes.sum_over_processes(usage)
        perplexity = torch.distributions.Categorical(usage).entropy().exp().item()
        cd_l1 = evaluate(teacher, test, config, 64)["cd_l1"]
        log.end_epoch(perplexity=perplexity, codes_used=int((usage > 0).sum()), cd_l1=cd_l1)
        run.save(log, teacher, optimizer, before=before)

    # -- results
    if processes.RANK > 0:
        return
    count = min(len(test), 256)
    print(f"reconstruction of {count} test clouds ...", flush=True)
    after = evaluate(teacher, test, config, count, swap_codes=True)
    write_picture(teacher, test, config, log.folder / "reconstruction")
    pictures.write_chart(log.folder / "loss.svg", log.rows)
    other = after.pop("cd_l1_other", None)
    metrics = {f"{name}_before": value for name, value in before.items()}
    metrics |= {f"{name}_after": value for name, value in after.items()}
    log.close(**metrics, cd_l1_other=other)
    for name, title, scale in (("cd_l1", "CD-L1 x 1000", 1000), ("fscore", "F-score, %", 100)):
        text = f"{scale * before[name]:.2f} untrained -> {scale * after[name]:.2f} trained"
        print(f"reconstruction of {count} test clouds, {title}: {text}")
    if other is not None:
        change = 100 * (other / after["cd_l1"] - 1)
        note = "(near 0: the decoder ignores the codes)"
        print(f"CD-L1 with the codes of another cloud: {change:+.1f} % {note}")


if __name__ == "__main__":
    run.run_command(main, Config, __doc__, PRESETS)
