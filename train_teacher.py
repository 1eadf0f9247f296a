"""Stage I (Sec. 4.1): a frozen pretrained Transformer becomes a 3D autoencoder, the teacher.

    python train_teacher.py                                # synthetic shapes, minutes on two cores
    python train_teacher.py --data my_clouds --out runs/mine                       # your own clouds
    python train_teacher.py --data ShapeNet55 --size base           # the published run, on one GPU
    torchrun --nproc_per_node=8 train_teacher.py --data ShapeNet55 --size base           # on eight

Leaves last.pt, metrics.jsonl, config.json, reconstruction.png and .ply, and loss.svg in --out.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

import act
import clouds
import training
from training import flag

# -- config ---------------------------------------------------------------------------------------
DEFAULTS = {  # base is the published run
    "tiny": dict(epochs=6, batch_size=4, lr=1e-3, log_every=100, codes="information"),
    "small": dict(epochs=50, batch_size=64, lr=5e-4, codes="information"),
    "base": dict(epochs=300, batch_size=64, lr=5e-4, codes="kl")}
INFORMATION = 0.02  # weight of the mutual information of patch and code
PUBLISHED_STEPS = 196_500  # 300 epochs of 41,952 clouds in batches of 64
SET = [f.name for f in fields(act.TeacherConfig) if type(f.default) in (int, float)]

@dataclass
class Config(training.RunConfig):
    out: str = flag("runs/teacher", "folder of the checkpoint, log, configuration and pictures")
    weight_decay: float = flag(5e-4, "AdamW's weight decay", 5e-4)
    weights: str = flag("auto", "the backbone: auto (public weights if they can be had), random, a "
                        "NAME of act.pretrained_names() or the PATH of a weight file", "ViT-B")
    codes: str = flag(None, "the term for varied codes (default: information but for base)", "kl",
                      str, ("kl", "information"))
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
        return act.load_pretrained(config.weights), config.weights
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
        return training.load(config.init, device, act.Teacher)
    size = training.SIZES[config.size]
    backbone, weights = open_backbone(config, *size["backbone"])
    sizes = act.TeacherConfig(**size["teacher"], prompt=config.prompt, weights=weights)
    sizes = training.override(sizes, config.set, SET)
    torch.manual_seed(config.seed)
    return act.Teacher(sizes, backbone).to(device)

@torch.no_grad()
def start_codes(teacher, train, config, device):
    """With --codes information the codebook starts from patches, not from noise.

    A patch gets the code that it most resembles by the features of the untrained encoder, so that
    codes mean something at once. As published they mean nothing for thousands of steps: the KL term
    moves them faster than the reconstruction does, and the decoder learns to ignore them."""
    c = teacher.config
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
    for module in teacher.encoder.modules():
        module.momentum = 0.1
    patch = teacher.encoder.eval()(neighborhood)  # (B, G, C)
    edges = teacher.dgcnn_1.edges(patch, act.knn(center, center, 4)[1])
    patch, edges = patch.flatten(0, 1), edges.flatten(0, 1).float()  # (B G, C), (B G, edges)
    codes = torch.randperm(len(patch), generator=training.seeded("cpu", "codes"))[: c.num_tokens]
    teacher.codebook.copy_(((patch - patch.mean(dim=0)) / (patch.std(dim=0) + 1e-6))[codes])
    mean = edges.mean(dim=0)
    rows, axis = edges[codes] - mean, F.normalize(mean, dim=0)
    linear, norm = teacher.dgcnn_1.layer5  # without the mean's direction, which favours no code
    linear.weight.copy_(F.normalize(rows - (rows @ axis)[:, None] * axis, dim=-1))
    norm.weight.fill_(10.0)  # logits well above the Gumbel noise, whose standard deviation is 1.3

def information(logits):
    """Mutual information of patch and code in nats, (B, G, codes) -> scalar: the entropy of the
    codes' mean probabilities over all patches of a share, less the mean entropy of a patch's."""
    log_q = logits.float().flatten(0, 1).log_softmax(dim=-1)
    mean = log_q.exp().mean(dim=0)
    gain = (log_q.exp() * log_q).sum(dim=-1).mean()
    return gain - (mean * mean.clamp_min(1e-12).log()).sum()

@torch.no_grad()
def evaluate(teacher, test, config, count):
    """CD-L1, CD-L2 (unit sphere) and F-score at 0.01 of `count` whole clouds, with argmax codes;
    cd_l1_other: CD-L1 with the codes of another cloud, equal if the decoder ignores them."""
    sums, done = torch.zeros(4, dtype=torch.float64), 0
    for indices in torch.linspace(0, len(test) - 1, min(len(test), count)).long().split(32):
        generator = training.seeded(teacher.codebook.device, config.seed, "test", done)
        xyz, _ = test.sample(indices, config.points, generator)
        output = teacher.eval()(xyz, hard=True)
        codes = output.logits.argmax(dim=-1).roll(len(xyz) // 2, dims=0)  # of another class, mostly
        _, other = teacher.decode(F.embedding(codes, teacher.codebook), output.center)
        center = output.center[:, :, None]
        fine, other = ((part + center).flatten(1, 2) for part in (output.fine, other))
        values = [act.chamfer_distance(fine, xyz), act.chamfer_distance(fine, xyz, norm=2),
                  act.fscore(fine, xyz).mean(), act.chamfer_distance(other, xyz)]
        sums += torch.stack(values).double().cpu() * len(indices)
        done += len(indices)
    return dict(zip(("cd_l1", "cd_l2", "fscore", "cd_l1_other"), (sums / done).tolist()))

@torch.no_grad()
def picture(teacher, test, config, path):
    """Input, its patches in colours, coarse and fine reconstruction of five test clouds."""
    chosen = torch.arange(0, len(test), max(1, len(test) // 5))[:5]
    generator = training.seeded(teacher.codebook.device, config.seed, "picture")
    xyz, _ = test.sample(chosen, config.points, generator)
    coarse, fine, patches, center, _ = teacher.eval()(xyz, hard=True)
    columns = [(part + center[:, :, None]).flatten(1, 2) for part in (patches, coarse, fine)]
    columns = [column.cpu().numpy() for column in (xyz, *columns)]
    colors = clouds.palette(teacher.config.num_group).repeat(teacher.config.group_size, axis=0)
    rows = [list(zip(row, (None, colors, None, None))) for row in zip(*columns)]
    clouds.write_gallery(path, rows)
    names = ", ".join(test.names[i] for i in chosen)
    print("reconstruction.png: input, patches, coarse, fine; from the top", names)

def main(config):
    config, device = training.setup(config, DEFAULTS)

    # -- data -------------------------------------------------------------------------------------
    dataset = clouds.open_dataset(config.data, config.cache or None, config.variant, config.area)
    print(clouds.describe(dataset))
    config = training.plan(config, len(dataset.train))

    # -- model ------------------------------------------------------------------------------------
    teacher = build_teacher(config, device)
    c = teacher.config
    train, test = training.place(config, c.num_group, device, dataset.train, dataset.test)
    informed = config.codes == "information"
    if informed and not config.init:
        start_codes(teacher, train, config, device)
    trained = sum(p.numel() for p in teacher.parameters() if p.requires_grad) / 1e6
    print(f"stage I on {device} x {training.WORLD}, {config.precision}; size {config.size}, frozen "
          f"backbone {c.weights}, {c.backbone.width} wide, {c.backbone.depth} deep, and "
          f"{trained:.1f} M trained parameters, from {config.init or 'scratch'}")

    # -- optimizer, resume ------------------------------------------------------------------------
    slow = ("encoder.", "dgcnn_1.", "codebook") if informed else ()
    optimizer = training.adamw(teacher, config.lr, config.weight_decay, slow)
    net = training.parallel(teacher, config)
    log = training.Log(config, teacher, train.names)
    if log.state:
        optimizer.load_state_dict(log.state["optimizer"])
    before = log.state["before"] if log.state else evaluate(teacher, test, config, 256)

    # -- loop -------------------------------------------------------------------------------------
    warmup = 10 * (len(train) // config.batch_size)
    for epoch in range(log.epoch, config.epochs):
        teacher.train()
        usage = torch.zeros(c.num_tokens, device=device)  # of each code in this epoch
        for batch in training.epoch_batches(config, len(train), epoch, log.step):
            lr = training.set_lr(optimizer, log.step, config, end=1e-7, warmup=warmup)
            tau = temperature(log.step, config.steps)
            weight = 0.0 if informed else kl_weight(log.step, config.steps)
            generator = training.seed_step(config.seed, log.step, device)
            xyz, _ = train.sample(batch, config.points, generator)  # (B, N, 3)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                output = net(xyz[training.RANK :: training.WORLD], tau)
                loss, reconstruction, kl = act.teacher_loss(output, weight)
                if informed:
                    loss = loss - INFORMATION * information(output.logits)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(teacher.parameters(), math.inf)  # measured
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
    picture(teacher, test, config, log.out / "reconstruction")
    clouds.write_chart(log.out / "loss.svg", log.rows)
    other = after.pop("cd_l1_other")
    log.close(**{f"{name}_before": before[name] for name in after},
              **{f"{name}_after": value for name, value in after.items()}, cd_l1_other=other)
    for name, title, scale in (("cd_l1", "CD-L1 x 1000", 1000), ("fscore", "F-score, %", 100)):
        print(f"reconstruction of {count} test clouds, {title}: "
              f"{scale * before[name]:.2f} untrained -> {scale * after[name]:.2f} trained")
    worse = 100 * (other / after["cd_l1"] - 1)
    warning = "; warning: the decoder ignores the codes" if worse < 2 and count >= 32 else ""
    print(f"CD-L1 with the codes of another cloud: {worse:.1f} % worse{warning}")

if __name__ == "__main__":
    training.run_script(main, Config, __doc__)
