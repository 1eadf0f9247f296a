"""What the scripts share: flags, device and processes, seeds, schedules, optimizer groups, a run's
folder with its log and checkpoint, the linear SVM. The training loops stand in the scripts."""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import act

RANK = int(os.environ.get("RANK", 0))  # this process among those that torchrun started
WORLD = int(os.environ.get("WORLD_SIZE", 1))
SIZES = {  # what differs from the paper; `backbone`: public weights, and the width of a random one
    "tiny": dict(backbone=("vit_tiny_patch16_224", 192),
                 encoder=dict(num_group=32, width=192, depth=6, num_heads=3, encoder_dims=192),
                 teacher=dict(num_group=32, encoder_dims=192, tokens_dims=192, decoder_dims=192,
                              num_tokens=512, num_prompt=16)),
    "small": dict(backbone=("vit_small_patch16_384", 384), encoder={},
                  teacher=dict(num_tokens=2048, num_prompt=32)),
    "base": dict(backbone=("vit_base_patch16_384", 768), encoder={}, teacher={})}

def flag(default, help, paper=None, kind=None, choices=None):
    """A dataclass field that is also a flag of the default's type; `paper`: the published value."""
    help += f" (default: {default})" if default else ""
    help += f" (the paper: {paper})" if paper else ""
    options = dict(default=default, type=kind or type(default), choices=choices)
    if default is False:
        options = dict(action="store_true")
    if default == ():
        options = dict(default=[], nargs="+", action="extend")
    return field(default=default, metadata=dict(options, help=help.replace("%", "%%")))

@dataclass
class RunConfig:
    """The flags of every script, which adds its own. None: the size's default."""
    data: str = flag("synthetic", "'synthetic' or the path of a data set", "ShapeNet-55")
    variant: str = flag("PB_T50_RS", "OBJ_BG, OBJ_ONLY or PB_T50_RS, of ScanObjectNN")
    area: int = flag(5, "the area of S3DIS that is the test set", 5)
    cache: str = flag("", "folder for the memory-mapped copy of a folder of clouds")
    points: int = flag(None, "points sampled from a cloud", 1024, int)
    size: str = flag("auto", "auto: base on a GPU, else tiny", "base", str, ("auto", *SIZES))
    out: str = flag("runs/run", "folder of the run's checkpoint, log, configuration and pictures")
    epochs: int = flag(None, "passes over the data", None, int)
    steps: int = flag(None, "train for so many steps instead", None, int)
    batch_size: int = flag(None, "clouds per step, over all processes", None, int)
    lr: float = flag(None, "peak learning rate", None, float)
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    precision: str = flag("auto", "auto: bf16 if native, or fp32", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the Transformer blocks")
    resume: bool = flag(False, "continue after the last epoch in --out, on a CPU bit for bit")
    log_every: int = flag(None, "also log and print every so many steps", None, int)

def parse_flags(config_class, description, argv=None):
    """An instance of the dataclass from the command line. Raises ValueError for a bad flag."""
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for f in fields(config_class):
        parser.add_argument("--" + f.name.replace("_", "-"), **f.metadata)
    words = sys.argv[1:] if argv is None else argv
    words = [re.sub("^--[a-z_]+", lambda name: name[0].replace("_", "-"), word) for word in words]
    config = config_class(**vars(parser.parse_args(words)))
    for name, value in vars(config).items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    return config

def override(config, pairs, names):
    """A model's config with the NAME=VALUE pairs of --set applied, checked by name and type."""
    kinds = {name: type(getattr(config, name)) for name in names}
    for pair in pairs:
        try:
            name, value = pair.split("=")
            config = replace(config, **{name: kinds[name](value)})
        except (KeyError, ValueError) as error:
            raise ValueError(f"--set {pair}: expected a value of {', '.join(names)}") from error
    return config

def run_script(main, config_class, description):
    """Parses the flags and runs main(config). A user's mistake is one line and exit code 2."""
    try:
        main(parse_flags(config_class, description))
        return dist.destroy_process_group() if dist.is_initialized() else None
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        message, code = f"error: {error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
        if Log.saved:
            message += f"; --resume continues after epoch {Log.saved}"
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)

def setup(config, defaults):
    """(config with the size's `defaults`; device). Seeds torch, joins torchrun's processes."""
    # gradients of a sharp softmax are denormal numbers, on which a CPU is several times slower
    torch.set_flush_denormal(True)  # stage I with a trained tokenizer: 2.4 -> 8.3 clouds/s
    gpu = torch.cuda.is_available()
    name = config.device.replace("auto", "cuda" if gpu else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?" if gpu else "cpu", name):
        raise ValueError(f"--device: expected auto, cpu, or with a GPU cuda[:N], got {name}")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    cpu = Path("/proc/cpuinfo")  # bf16 pays where it is multiplied in, not only converted to
    bf16 = cpu.exists() and re.search("avx512_bf16|amx_bf16", cpu.read_text())
    size, precision = "tiny", "bf16" if bf16 else "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        size, precision = "base", "bf16" if native else "fp32"
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:  # only the first prints
        sys.stdout = open(os.devnull, "w")
    torch.manual_seed(config.seed)
    given = {name: value for name, value in vars(config).items() if value not in (None, "auto")}
    settled = dict(points=1024, size=size, precision=precision)
    return replace(config, **{**settled, **defaults[given.get("size", size)], **given}), device

def seeded(device, *numbers):
    """A generator that depends on the numbers alone: a step needs no memory of those before it."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))

def seed_step(seed, step, device):
    """Seeds this process's dropout and Gumbel noise -> a generator for the whole batch."""
    torch.manual_seed(seeded("cpu", seed, "noise", step, RANK).initial_seed())
    return seeded(device, seed, "batch", step)

def place(config, num_group, device, *splits):
    """Clouds, checked to have as many distinct points as patches, on the GPU if they fit."""
    for clouds in splits:
        for i, name in enumerate(clouds.names):
            count = len(clouds[i][: 4 * num_group].unique(dim=0))  # enough of nearly every cloud
            if count < num_group:
                count = len(clouds[i].unique(dim=0))
            count = min(count, config.points)
            if count < num_group:
                raise ValueError(f"{name}: expected {num_group} distinct --points, got {count}")
    fit = device.type == "cuda" and splits[0].points.nbytes < torch.cuda.mem_get_info()[0] / 4
    return [clouds.to(device) if fit else clouds for clouds in splits]

def load(path, device, *kinds):
    """The model in the checkpoint `path`, which must be of one of the classes `kinds`."""
    model = act.load(path, device)
    if not isinstance(model, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{path}: expected a {expected}, got a {type(model).__name__}")
    return model

def plan(config, count):
    """The config with batch size, steps and epochs settled for `count` clouds."""
    batch = min(config.batch_size, count // WORLD * WORLD)
    if batch < 1 or batch % WORLD:
        raise ValueError(f"--batch-size: expected a multiple of the {WORLD} processes, got {batch}")
    steps = config.steps or config.epochs * (count // batch)
    epochs = math.ceil(steps / (count // batch))
    return replace(config, batch_size=batch, steps=steps, epochs=epochs)

def epoch_batches(config, count, epoch, step=0):
    """Indices of the clouds in each full batch of an epoch (from 0) that is left at `step`."""
    order = torch.randperm(count, generator=seeded("cpu", config.seed, "order", epoch))
    batches = order.split(config.batch_size)[: count // config.batch_size]
    first = epoch * len(batches)
    return batches[max(0, step - first) : config.steps - first]

def cosine(x, start, end):
    """From `start` at x <= 0 to `end` at x >= 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, x)))) / 2

def set_lr(optimizer, step, config, end, warmup, start=1e-6):
    """Linear from `start` over `warmup` steps (at most a tenth), then a cosine to `end`."""
    warmup = min(warmup, config.steps / 10)
    lr = cosine((step - warmup) / max(1, config.steps - warmup), config.lr, end)
    if step < warmup:
        lr = start + (config.lr - start) * step / warmup
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1)  # a group may have a rate of its own
    return lr

def adamw(model, lr, weight_decay, slow=()):
    """AdamW as published: no decay on 1-D parameters (biases, too) and names holding "token". Names
    that begin with a string of `slow` learn at a tenth of the rate."""
    groups = {(weight_decay, 1.0): [], (0.0, 1.0): []}  # in this order in every checkpoint
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.0 if p.ndim <= 1 or "token" in name else weight_decay
            kind = decay, 0.1 if name.startswith(slow) else 1.0
            groups.setdefault(kind, []).append(p)
    groups = [dict(params=params, weight_decay=decay, scale=scale)
              for (decay, scale), params in groups.items() if params]
    return torch.optim.AdamW(groups, lr=lr, fused=True)

class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """act.BatchNorm with the statistics of all processes; on GPUs only."""
    process_group = None
    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view_as(x)

def parallel(model, config):
    """The model as a loop calls it: blocks compiled if asked, gradients averaged over processes."""
    for module in model.modules():
        if config.compile and isinstance(module, act.Block):
            module.compile()  # block by block: seconds, where the whole would take minutes
        if WORLD > 1 and isinstance(module, act.BatchNorm) and module.weight.is_cuda:
            module.__class__ = SyncBatchNorm
    return torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model

def sum_over_processes(tensor):
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor

class Log:
    """A run's folder: config.json, metrics.jsonl, and last.pt at the end of every epoch.

    `state`: the checkpoint that a resumed run continues, already in the model, else None. Raises
    ValueError if another run uses the folder, or settings or clouds (`names`) have changed."""
    free = {"out", "resume", "log_every", "cache", "data", "device", "compile", "epochs", "vote"}
    kinds = {".pt", ".jsonl", ".json", ".svg", ".png", ".ply", ".csv", ".npz"}
    saved = 0  # epochs, of the last run of this process

    def __init__(self, config, model, names):
        self.config, self.model, self.out = config, model, Path(config.out)
        self.step, self.epoch, self.state, self.rows, self.values = 0, 0, None, [], []
        clouds = hashlib.sha256(repr(names).encode()).hexdigest()
        self.about = dict(kind=type(model).__name__, config=asdict(model.config), command=sys.argv,
                          settings={**asdict(config), "clouds": clouds}, processes=WORLD,
                          device=str(next(model.parameters()).device),
                          versions=f"Python {sys.version.split()[0]}, torch {torch.__version__}")
        Log.saved = 0
        self.out.mkdir(parents=True, exist_ok=True)
        if RANK == 0 and os.name == "posix":
            import fcntl
            try:  # until this process ends
                file = os.open(self.out / ".lock", os.O_CREAT | os.O_RDWR)
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"--out {self.out}: in use by another run") from error
        if config.resume and (self.out / "last.pt").is_file():
            self.resume(self.out / "last.pt", len(names) // config.batch_size)
        elif RANK == 0 and (self.out / "config.json").exists():
            aside = self.out / time.strftime("earlier-%Y%m%d-%H%M%S")
            aside.mkdir()
            for file in [file for file in self.out.iterdir() if file.suffix in self.kinds]:
                file.rename(aside / file.name)
            print(f"the earlier run in {self.out} is now in {aside}")
        if RANK == 0:
            (self.out / "config.json").write_text(json.dumps(self.about, indent=1))
        self.file = open(self.out / "metrics.jsonl" if RANK == 0 else os.devnull, "w", buffering=1)
        self.file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.began = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0)

    def resume(self, path, steps_per_epoch):
        self.state = state = act.read_tensors(path)
        if not isinstance(state, dict) or "settings" not in state:
            raise ValueError(f"{path}: expected a run's checkpoint, got {str([*state])[:80]}")
        then, now = state["settings"], self.about["settings"]
        free = self.free | {"steps"} if now["steps"] > then["steps"] else self.free
        changed = [f"{name} was {value!r}, is {now.get(name)!r}" for name, value in then.items()
                   if value != now.get(name) and name not in free]
        if changed:
            raise ValueError(f"{path}: expected the same settings, got: {'; '.join(changed)}")
        act.load_exactly(self.model, state["model"], path)
        torch.set_rng_state(state["random"])
        self.rows, self.step = state["log"], state["step"]
        self.epoch = Log.saved = self.step // steps_per_epoch
        longer = ", on the schedule of the longer run" if "steps" in free else ""
        print(f"resumed {path} after epoch {state['epoch']}{longer}")

    def add(self, **values):
        """A step's tensors, for the rows' means, then numbers. Reads none: a GPU would wait."""
        self.step += 1
        self.last = values
        tensors = [value.detach().float() for value in values.values() if torch.is_tensor(value)]
        self.values.append(torch.stack(tensors))
        every = self.config.log_every
        if every and self.step % every == 0:
            self.write(self.epoch + 1, self.values[-every:])  # those since the row before
        elif sys.stdout.isatty():
            print(self.pace(), end="  \r", flush=True)  # the next line is longer, and covers it

    def end_epoch(self, optimizer, metrics, **extra):
        """The row of an epoch: its means and `metrics`; then the checkpoint."""
        self.epoch += 1
        self.write(self.epoch, self.values, **metrics)
        self.values = []
        state = dict(model=self.model.state_dict(), optimizer=optimizer.state_dict(), log=self.rows,
                     epoch=self.epoch, step=self.step, random=torch.get_rng_state())
        if RANK == 0:
            act.save({**self.about, **state, **extra}, self.out / "last.pt")
        Log.saved = self.epoch

    def pace(self):
        rate = self.step / (time.monotonic() - self.began)
        left = (self.config.steps - self.step) / rate / 60
        clouds = f"{rate * self.config.batch_size:.1f} clouds/s"
        return f"step {self.step} of {self.config.steps}  {clouds}  {left:.1f} min left"

    def write(self, epoch, values=(), **metrics):
        """A row of metrics.jsonl; one with means, over steps and processes, is printed, too."""
        if values:
            means = sum_over_processes(torch.stack(values).mean(dim=0) / WORLD).tolist()
            metrics = {**self.last, **dict(zip(self.last, means)), **metrics}
            if not all(map(math.isfinite, means)):
                raise ValueError(f"loss not finite up to step {self.step}: {metrics}; lower --lr")
            shown = [f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float))]
            print(f"epoch {epoch}", self.pace(), *shown, sep="  ", flush=True)
        seconds = round(time.monotonic() - self.began, 2)
        self.rows.append(dict(epoch=epoch, step=self.step, seconds=seconds, **metrics))
        print(json.dumps(self.rows[-1]), file=self.file)

    def close(self, **metrics):
        """The last row, with the closing metrics, and a line on the run."""
        self.write(self.epoch, **metrics)
        print(f"{self.rows[-1]['seconds']:.0f} s for {self.step} steps; results in {self.out}")
        if 0 < self.step < 100:
            print("too few for BatchNorm's statistics: trained and untrained models do not compare")

def linear_svm(x, labels, C):
    """One-against-rest: weights (D, classes) of min ½ |w|² + C Σ max(0, 1 - y w·x)² per class."""
    y = 2.0 * F.one_hot(labels) - 1
    w = x.new_zeros(x.shape[1], y.shape[1])

    def objective():
        slack = (1 - y * (x @ w)).clamp_min(0)
        w.grad = w - 2 * C * x.T @ (y * slack)
        return w.square().sum() / 2 + C * slack.square().sum()

    torch.optim.LBFGS([w], max_iter=1000, tolerance_grad=1e-6 * len(x), history_size=20,
                      tolerance_change=1e-12, line_search_fn="strong_wolfe").step(objective)
    return w

def svm_accuracy(train, train_labels, test, test_labels):
    """Percent of the test features that a linear SVM on the train features labels right, and its C:
    of 0.001, 0.01, 0.1 and 1 the best, then smallest, on every fifth train feature in order of
    class. Features are standardised by the train features, the intercept is penalised, too."""
    mean, std = train.double().mean(dim=0), train.double().std(dim=0) + 1e-6
    x, test = (F.pad((f - mean) / std, (0, 1), value=1.0) for f in (train, test))
    order = train_labels.argsort(stable=True)
    x, y, held = x[order], train_labels[order], torch.arange(len(x), device=x.device) % 5 == 0

    def right(x, y, queries, truth, C):
        return ((queries @ linear_svm(x, y, C)).argmax(dim=1) == truth).double().mean().item()

    C = max((0.001, 0.01, 0.1, 1.0), key=lambda C: right(x[~held], y[~held], x[held], y[held], C))
    return 100 * right(x, y, test, test_labels, C), C
