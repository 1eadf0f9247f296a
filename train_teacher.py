"""Stage I (Sec. 4.1): a frozen pretrained Transformer becomes a 3D autoencoder, the teacher.

    python train_teacher.py                                # synthetic shapes, minutes on two cores
    python train_teacher.py --data my_clouds --out runs/mine                       # your own clouds
    python train_teacher.py --data my_clouds --init released_teacher.pth --size base # from weights
    python train_teacher.py --data ShapeNet55 --size base           # the published run, on one GPU
    torchrun --nproc_per_node=8 train_teacher.py --data ShapeNet55 --size base           # on eight

Leaves last.pt, metrics.jsonl, config.json, reconstruction.png and .ply, and loss.svg in --out.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

import act
import clouds
import training
from training import flag

# -- config ---------------------------------------------------------------------------------------
DEFAULTS = {  # base is the published run
    "tiny": dict(epochs=5, batch_size=4, lr=1e-3, log_every=100),
    "small": dict(epochs=50, batch_size=64, lr=5e-4),
    "base": dict(epochs=300, batch_size=64, lr=5e-4),
}
PUBLISHED_STEPS = 196_500  # 300 epochs of 41,952 clouds in batches of 64
SET = [f.name for f in fields(act.TeacherConfig) if type(f.default) in (int, float)]

@dataclass
class Config(training.RunConfig):
    out: str = flag("runs/teacher", "folder of the checkpoint, log, configuration and pictures")
    weight_decay: float = flag(5e-4, "AdamW's weight decay", 5e-4)
    weights: str = flag("auto", "the backbone: auto (public weights if they can be had), random, a "
                        "NAME of act.pretrained_names() or the PATH of a weight file", "ViT-B")
    heads: int = flag(None, "attention heads, where a weight file does not tell them", None, int)
    prompt: str = flag("deep", "prompt tuning", "deep", choices=("deep", "shallow", "none"))
    init: str = flag("", "start from the teacher in this checkpoint, ours or the official one")
    set: list = flag((), f"NAME=VALUE of the teacher's {', '.join(SET)}", kind=str)

def temperature(step, total):
    """Of the Gumbel-softmax: 1 -> 0.0625 over the first 100,000 steps of the published run."""
    return training.cosine(step / (100_000 * min(1, total / PUBLISHED_STEPS)), 1.0, 0.0625)

def kl_weight(step, total):
    """0 for the first 10,000 steps of the published run, then 0 -> 0.1 over 100,000."""
    scale = min(1, total / PUBLISHED_STEPS)
    return training.cosine((step - 10_000 * scale) / (100_000 * scale), 0.0, 0.1)

def open_backbone(config, name, width):
    """(backbone, what it holds) by --weights; auto falls back to a random one, in capitals."""
    if config.weights not in ("auto", "random"):
        return act.load_pretrained(config.weights, config.heads), config.weights
    if config.weights == "auto":
        try:
            return act.load_pretrained(name), name
        except ValueError as error:
            print(f"NO PRETRAINED WEIGHTS: THE BACKBONE IS RANDOM. {error}")
    sizes = act.BackboneConfig(width=width, num_heads=width // 64, mlp_hidden=4 * width)
    return act.Backbone(sizes), "random"

def build_teacher(config, device):
    """From --init, with the sizes that checkpoint has, or by --size, --weights, --prompt, --set."""
    if config.init:
        if config.set or config.weights != "auto" or config.prompt != "deep":
            raise ValueError("--init: expected no --set, --weights or --prompt, it has its own")
        return training.load(act.Teacher, config.init, device)
    size = training.SIZES[config.size]
    backbone, weights = open_backbone(config, *size["backbone"])
    sizes = act.TeacherConfig(**size["teacher"], prompt=config.prompt, weights=weights)
    sizes = training.override(sizes, config.set, SET)
    torch.manual_seed(config.seed)
    return act.Teacher(sizes, backbone).to(device)

@torch.no_grad()
def fix_tokenizer(teacher, train, config, device):
    """For runs of minutes: initialise the codebook with patches and freeze the tokenizer.

    Not in the paper. Trained codes mean nothing for thousands of steps: the KL term and the encoder
    move them faster than the reconstruction shapes them, and the decoder learns to ignore them.
    Here a code is a patch, and a patch gets the code that it most resembles by the features of the
    untrained encoder. With --init the codes stay as loaded."""
    c = teacher.config
    teacher.frozen += [teacher.encoder.requires_grad_(False), teacher.dgcnn_1.requires_grad_(False)]
    if config.init:
        return
    if c.tokens_dims != c.encoder_dims:
        raise ValueError(f"--set: expected tokens_dims of {c.encoder_dims}, got {c.tokens_dims}")
    # clouds with four times as many patches as codes; of a small set, several samples of each
    chosen = torch.linspace(0, len(train) - 1, math.ceil(4 * c.num_tokens / c.num_group)).long()
    generator = training.seeded(device, config.seed, "codes")
    xyz, _ = train.sample(chosen, config.points, generator)
    neighborhood, center = act.group_points(xyz, c.num_group, c.group_size)
    for module in teacher.encoder.modules():
        module.momentum = 1.0  # BatchNorms take the statistics of the next forward as they are
    teacher.encoder.train()(neighborhood)
    patch = teacher.encoder.eval()(neighborhood)  # (B, G, C)
    edges = teacher.dgcnn_1.edges(patch, act.knn(center, center, 4)[1])
    patch, edges = patch.flatten(0, 1), edges.flatten(0, 1).float()  # (B G, C), (B G, 2304)
    order = torch.randperm(len(patch), generator=training.seeded("cpu", "codes"))
    codes = order[: c.num_tokens].to(device)
    teacher.codebook.copy_(((patch - patch.mean(dim=0)) / (patch.std(dim=0) + 1e-6))[codes])
    mean = edges.mean(dim=0)
    rows, axis = edges[codes] - mean, F.normalize(mean, dim=0)
    linear, norm = teacher.dgcnn_1.layer5  # without the mean's direction, which favours no code
    linear.weight.copy_(F.normalize(rows - (rows @ axis)[:, None] * axis, dim=-1))
    norm.weight.fill_(10.0)  # logits well above the Gumbel noise, whose standard deviation is 1.3

@torch.no_grad()
def evaluate(teacher, test, config, count):
    """CD-L1, CD-L2 (unit sphere) and F-score at 0.01 of `count` whole clouds, with argmax codes."""
    teacher.eval()
    device = teacher.codebook.device
    sums, done = torch.zeros(3, dtype=torch.float64), 0
    for indices in torch.linspace(0, len(test) - 1, min(len(test), count)).long().split(32):
        generator = training.seeded(device, config.seed, "test", done)
        xyz, _ = test.sample(indices, config.points, generator)
        output = teacher(xyz, hard=True)
        fine = (output.fine + output.center[:, :, None]).flatten(1, 2)  # (B, G S, 3)
        values = [act.chamfer_distance(fine, xyz), act.chamfer_distance(fine, xyz, norm=2)]
        values.append(act.fscore(fine, xyz).mean())
        sums += torch.stack(values).double().cpu() * len(indices)
        done += len(indices)
    return dict(zip(("cd_l1", "cd_l2", "fscore"), (sums / done).tolist()))

@torch.no_grad()
def picture(teacher, test, config, path):
    """Input, its patches in colours, coarse and fine reconstruction -> the names of the clouds."""
    chosen = torch.arange(0, len(test), max(1, len(test) // 5))[:5]
    generator = training.seeded(teacher.codebook.device, config.seed, "picture")
    xyz, _ = test.sample(chosen, config.points, generator)
    output = teacher.eval()(xyz, hard=True)
    colors = clouds.palette(teacher.config.num_group).repeat(teacher.config.group_size, axis=0)
    rows = []
    for i in range(len(xyz)):
        parts = [output.neighborhood[i], output.coarse[i], output.fine[i]]
        parts = [(part + output.center[i][:, None]).flatten(0, 1).cpu().numpy() for part in parts]
        patches, coarse, fine = parts
        rows.append([(xyz[i].cpu().numpy(), None), (patches, colors), (coarse, None), (fine, None)])
    clouds.write_gallery(path, rows)
    return [test.names[i] for i in chosen]

def main(config):
    config, device = training.setup(config, DEFAULTS)

    # -- data -------------------------------------------------------------------------------------
    dataset = clouds.open_dataset(config.data, config.cache or None, config.variant, config.area)
    print(clouds.describe(dataset))
    train, test = dataset.train, dataset.test
    config = training.plan(config, len(train))

    # -- model ------------------------------------------------------------------------------------
    teacher = build_teacher(config, device)
    c = teacher.config
    train, test = training.place(config, c.num_group, device, train, test)
    if config.size == "tiny":
        fix_tokenizer(teacher, train, config, device)
    count = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    print(f"stage I on {device} x {training.WORLD}, {config.precision}; size {config.size}, frozen "
          f"backbone {c.weights}, {c.backbone.width} wide, {c.backbone.depth} deep, and "
          f"{count / 1e6:.1f} M trained parameters, from {config.init or 'scratch'}")

    # -- optimizer, resume ------------------------------------------------------------------------
    optimizer = training.adamw(teacher, config.lr, config.weight_decay)
    net = training.parallel(teacher, config)
    log = training.Log(config, teacher, train.names)
    if log.state:
        optimizer.load_state_dict(log.state["optimizer"])
        before = log.state["before"]
    else:
        before = evaluate(teacher, test, config, 256)

    # -- loop -------------------------------------------------------------------------------------
    warmup = 10 * (len(train) // config.batch_size)
    for epoch in range(log.epoch, config.epochs):
        teacher.train()
        usage = torch.zeros(c.num_tokens, device=device)  # of each code in this epoch
        for batch in training.epoch_batches(config, len(train), epoch, log.step):
            lr = training.set_lr(optimizer, log.step, config, end=1e-7, warmup=warmup)
            tau, weight = temperature(log.step, config.steps), kl_weight(log.step, config.steps)
            if config.size == "tiny":  # the KL term of a frozen tokenizer is a constant
                weight = 0.0
            generator = training.seed_step(config.seed, log.step, device)
            xyz, _ = train.sample(batch, config.points, generator)  # (B, N, 3)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                output = net(xyz[training.RANK :: training.WORLD], tau)
                loss, reconstruction, kl = act.teacher_loss(output, weight)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(teacher.parameters(), math.inf)  # only measured
            optimizer.step()
            codes = output.logits.argmax(dim=-1).flatten()
            usage.index_add_(0, codes, usage.new_ones(len(codes)))  # bincount would wait for a GPU
            log.add(loss=loss, reconstruction=reconstruction, kl=kl, grad_norm=grad_norm, lr=lr,
                    temperature=tau, kl_weight=weight)
        usage = training.sum_over_processes(usage)
        perplexity = torch.distributions.Categorical(usage).entropy().exp().item()
        if perplexity < max(2, c.num_tokens / 200):
            print(f"warning: the codebook has collapsed, perplexity {perplexity:.1f}")
        metrics = dict(perplexity=perplexity, codes_used=int((usage > 0).sum()),
                       cd_l1=evaluate(teacher, test, config, 64)["cd_l1"])
        log.end_epoch(optimizer, metrics, before=before)

    # -- results ----------------------------------------------------------------------------------
    if training.RANK > 0:
        return
    count = min(len(test), 256)
    print(f"reconstruction of {count} test clouds ...", flush=True)
    after = evaluate(teacher, test, config, count)
    names = picture(teacher, test, config, log.out / "reconstruction")
    clouds.write_chart(log.out / "loss.svg", log.rows)
    log.close(**{f"{name}_before": value for name, value in before.items()},
              **{f"{name}_after": value for name, value in after.items()})
    print("reconstruction.png: input, patches, coarse, fine; from the top", ", ".join(names))
    titles = {"cd_l1": "CD-L1 x 1000", "cd_l2": "CD-L2 x 1000", "fscore": "F-score at 0.01, %"}
    for name, title in titles.items():
        scale = 100 if name == "fscore" else 1000
        print(f"reconstruction of {count} test clouds, {title}: "
              f"{scale * before[name]:.2f} untrained -> {scale * after[name]:.2f} trained")

if __name__ == "__main__":
    training.run_script(main, Config, __doc__)
