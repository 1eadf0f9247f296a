"""What the scripts share: flags, processes, schedules, the loop with its checkpoints and log, the linear SVM."""

import argparse
import hashlib
import json
import math
import os
import re
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import act
import clouds as shapes


def linear_svm(features, labels, num_classes, C=1.0):
    """One-against-rest linear SVM, full batch: min 1/2 |w|^2 + C sum_i max(0, 1 - y_i w.x_i)^2 for each class.

    features: (n, D), labels: (n,) int64 -> weights (D + 1, classes) float64, the last row the intercept, which is
    penalised too, as in LIBLINEAR. Deterministic.
    """
    x = torch.cat([features.double(), features.new_ones(len(features), 1).double()], dim=1)
    y = 2.0 * F.one_hot(labels, num_classes).double() - 1
    w = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=1000, tolerance_grad=1e-6 * len(x), tolerance_change=1e-12, history_size=20,
                               line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        value = w.square().sum() / 2 + C * (1 - y * (x @ w)).clamp_min(0).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(objective)
    return w.detach()


def svm_accuracy(train, train_labels, test, test_labels):
    """Percent of the test features that a linear SVM on the train features labels right, and its C.

    Features are standardised by the train features. C is the best of 0.001, 0.01, 0.1 and 1 on every fifth train feature
    in order of class, held out for that choice alone; of equals the smallest. Deterministic.
    """
    train, test, num_classes = train.double(), test.double(), int(max(train_labels.max(), test_labels.max())) + 1
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    order = train_labels.argsort(stable=True)
    x, y, test = ((train - mean) / std)[order], train_labels[order], (test - mean) / std

    def percent(x, y, queries, truth, C):
        w = linear_svm(x, y, num_classes, C)
        return 100 * ((queries @ w[:-1] + w[-1]).argmax(dim=1) == truth).double().mean().item()

    held = torch.arange(len(x), device=x.device) % 5 == 0
    C = max((0.001, 0.01, 0.1, 1.0), key=lambda C: percent(x[~held], y[~held], x[held], y[held], C))
    return percent(x, y, test, test_labels, C), C


# ---------------------------------------------------------------------------------------------------------------------
# Running: flags, processes, schedules, the loop with its checkpoints and log
# ---------------------------------------------------------------------------------------------------------------------

def flag(default, help, paper=None, choices=None, group="run"):
    """A dataclass field that is also a flag of the default's type; `paper`: the published value, shown by --help."""
    said = f"{help} (default: {default!r}{'' if paper is None else f'; the paper: {paper}'})".replace("%", "%%")
    kind = dict(action="store_true") if default is False else dict(type=type(default), choices=choices)
    return field(default=default, metadata=dict(group=group, options=dict(default=default, help=said, **kind)))


@dataclass
class RunConfig:
    """The flags that every script has; a script's own dataclass adds to them."""
    data: str = flag("synthetic", "'synthetic' (embedded shapes) or the path of a data set", "ShapeNet-55", group="data")
    cache: str = flag("", "folder for the memory-mapped copy of a folder of clouds; '': beside the data", group="data")
    size: str = flag("auto", "auto: base on a GPU, tiny on a CPU", "base", ("auto", "tiny", "small", "base"), group="model")
    out: str = flag("runs/run", "folder of the run's checkpoint, log, configuration and pictures")
    points: int = flag(0, "points drawn from a cloud; 0: the size's default", 1024, group="data")
    epochs: int = flag(0, "passes over the data; 0: the size's default", 300, group="training")
    steps: int = flag(0, "train for this many steps instead; 0: as --epochs says", group="training")
    batch_size: int = flag(0, "clouds per step over all processes; 0: the size's default", group="training")
    lr: float = flag(0.0, "peak learning rate; 0: the published one", group="training")
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    precision: str = flag("auto", "auto: bf16 where the device multiplies in it, else fp32", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the Transformer blocks")
    resume: bool = flag(False, "go on from the checkpoint in --out, bit for bit on a CPU")
    save_minutes: float = flag(10.0, "a checkpoint at least this often, besides one per epoch")
    log_every: int = flag(0, "also log every so many steps; 0: the size's default, or epochs only")


def parse_flags(config_class, description, argv=None):
    """An instance of the dataclass from the command line; an unknown, abbreviated or unfit flag is a ValueError."""
    def refuse(message):
        raise ValueError(message)

    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=layout)
    parser.error = refuse
    groups = {}
    for f in fields(config_class):
        group = f.metadata["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        groups[group].add_argument("--" + f.name.replace("_", "-"), **f.metadata["options"])
    config = config_class(**vars(parser.parse_args(argv)))
    for name in ("points", "epochs", "steps", "batch_size", "lr", "save_minutes", "log_every"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, found {getattr(config, name)}")
    return config


def run_script(main):
    """Runs a script's main: a user's mistake is one line and exit code 2, never a traceback."""
    mistake = None
    try:
        main()
    except (ValueError, OSError) as error:
        mistake = str(error)
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            mistake = f"{error}: lower --batch-size"
        elif re.search("Connection (closed|reset) by peer", str(error)):
            mistake = "another process ended"
        else:
            raise
    if mistake is not None:
        process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{process}: {' '.join(mistake.split())}", file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():
        if mistake is None:
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0 if mistake is None else 2)  # the peers may hang in a collective; gloo's threads may abort an ordinary exit
    sys.exit(0 if mistake is None else 2)


def start_processes(config):
    """(device, rank, number of processes), as torchrun set them up; one process without it. Seeds everything."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: wanted auto, cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no GPU here")
    if device == "cuda":
        device += f":{os.environ.get('LOCAL_RANK', 0)}"
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    if device != "cpu":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(config.seed)
    return torch.device(device), int(os.environ.get("RANK", 0)), world


def say(*words, **options):
    """print, once, whatever the number of processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, **options, flush=True)


def cosine(x, start, end):
    """From `start` at x <= 0 to `end` at x >= 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, x)))) / 2


def learning_rate(step, total, peak, end, warmup, start=1e-6):
    """Linear warm-up from `start` over `warmup` steps (at most a tenth of the run), then a cosine to `end` at `total`."""
    warmup = min(warmup, total / 10)
    if step < warmup:
        return start + (peak - start) * step / warmup
    return cosine((step - warmup) / max(1, total - warmup), peak, end)


def compile_blocks(model):
    """torch.compile on each Transformer block in place: seconds, where the whole would take minutes."""
    for module in model.modules():
        if isinstance(module, act.Block):
            module.compile()


def adamw(model, lr, weight_decay):
    """AdamW without decay on one-dimensional parameters, biases and names holding "token" (Sec. 4, as published)."""
    decayed, spared = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (spared if p.ndim <= 1 or name.endswith("bias") or "token" in name else decayed).append(p)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=spared, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


class Run:
    """One training run: its folder, settings, checkpoint, log, and the loop over steps.

    All that a step draws comes from seeds made of (seed, step), so that a resumed run goes on bit for bit, in the middle of
    an epoch too, and every process draws the same batch and takes its share of it.
    """
    HARMLESS = set("out resume save_minutes log_every cache data device compile vote predict features category".split())

    def __init__(self, config, model, clouds, weight_decay, clip=math.inf, extra=None):
        self.config, self.model, self.clip, self.extra = config, model, clip, dict(extra or {})
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.names, self.out = next(model.parameters()).device, clouds.names, Path(config.out)
        self.checkpoint, self.log = self.out / "last.pt", self.out / "metrics.jsonl"
        self.digest = hashlib.sha256("\n".join(clouds.names).encode()).hexdigest()[:16]
        check_distinct(clouds, model.config.num_group)
        self.batch = min(config.batch_size, len(clouds))
        if self.batch < self.world:
            raise ValueError(f"--batch-size {self.batch} is less than the {self.world} processes")
        self.per_epoch = len(clouds) // self.batch  # the last, smaller batch is dropped, unless it is the only one
        self.total = config.steps or config.epochs * self.per_epoch
        self.step, self.sums, self.seconds = 0, {}, 0.0
        self.optimizer = adamw(model, config.lr, weight_decay)
        self.net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if self.world > 1 else model
        if config.compile:
            compile_blocks(model)
        self._open()

    def _open(self):
        """The folder: with --resume an earlier run in it is taken up, else its files are set aside."""
        resume = self.config.resume and self.checkpoint.exists()
        if resume:
            self._resume()
        elif self.config.resume:
            say(f"--resume: no checkpoint {self.checkpoint} yet, from the beginning")
        if self.rank:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            ours = () if resume else ("last.pt", "metrics.jsonl", "config.json", "*.png", "*.ply")
            earlier = [path for name in ours for path in self.out.glob(name)]
            if earlier:
                aside = self.out / time.strftime("earlier-%Y%m%d-%H%M%S")
                aside.mkdir(exist_ok=True)
                for path in earlier:
                    path.rename(aside / path.name)
                say(f"the earlier run in {self.out} is now in {aside}")
            with act.whole_file(self.out / "config.json") as file:
                file.write(json.dumps({**asdict(self.config), "model": asdict(self.model.config)}, indent=1).encode())
        except OSError as error:
            raise ValueError(f"--out {self.out}: cannot be written ({error.strerror})") from error

    def _resume(self):
        state, now = act.read_tensors(self.checkpoint), asdict(self.config)
        if not {"settings", "model", "optimizer", "step"} <= set(state):
            raise ValueError(f"{self.checkpoint}: wanted a checkpoint of a training run")
        changed = [f"--{k.replace('_', '-')} was {v!r}, is {now.get(k)!r}" for k, v in state["settings"].items()
                   if k not in self.HARMLESS and now.get(k) != v]
        if state["clouds"] != self.digest:
            changed.append("the data set's clouds are others")
        if changed:
            raise ValueError(f"{self.checkpoint}: cannot resume, since {'; '.join(changed)}")
        act.load_exactly(self.model, state["model"], self.checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds, self.extra = state["step"], state["seconds"], state["extra"]
        self.sums = state["sums"] if self.rank == 0 else {name: 0 * value for name, value in state["sums"].items()}
        if self.rank == 0 and self.log.exists():
            rows = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
            rows = [row for row in rows if row["step"] <= self.step and "loss" in row]  # the closing figures are made anew
            with act.whole_file(self.log) as file:
                file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
        say(f"resumed {self.checkpoint} at step {self.step}")

    def save(self):
        if self.rank == 0:
            act.save({"kind": type(self.model).__name__, "config": asdict(self.model.config), "model": self.model.state_dict(),
                  "optimizer": self.optimizer.state_dict(), "settings": asdict(self.config), "clouds": self.digest,
                  "step": self.step, "epoch": self.step // self.per_epoch, "random": torch.get_rng_state(),
                  "sums": self.sums, "seconds": self.seconds, "extra": self.extra,
                  "versions": {"torch": str(torch.__version__), "numpy": np.__version__}}, self.checkpoint)

    def record(self, **values):
        """Appends one object to metrics.jsonl; figures that are not finite become null."""
        if self.rank == 0:
            epoch = -(-self.step // self.per_epoch)  # the one that the last step belongs to, from 1
            values = {"epoch": epoch, "step": self.step, "seconds": round(self.seconds, 2), **values}
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with open(self.log, "a") as file:
                file.write(json.dumps(values) + "\n")

    def train(self, schedule, loss, finish_epoch=lambda epoch: {}):
        """The loop. schedule(step) -> {"lr": …, further numbers handed to the loss and logged}.

        loss(net, step, indices (B,), generator, share, **numbers) -> (loss, {name: scalar tensor}): means over the clouds
        `share` (a slice) of the batch; draws made from the generator are for the whole batch.
        """
        stop, order, seed = [], None, self.config.seed
        handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        self.model.train()
        while self.step < self.total:
            epoch, position = divmod(self.step, self.per_epoch)
            if order is None or position == 0:  # each epoch takes all clouds, in a new order
                order = torch.randperm(len(self.names), generator=act.seeded("cpu", seed, "order", epoch)).split(self.batch)
            numbers = schedule(self.step)
            self._update(loss, order[position], **numbers)
            self.seconds = time.monotonic() - began
            ends = position + 1 == self.per_epoch or self.step == self.total
            stopped, late = self._agree(ends, bool(stop), time.monotonic() - saved > 60 * self.config.save_minutes)
            saves, logs = ends or stopped or late, ends or self.step % (self.config.log_every or math.inf) == 0
            self._progress(hidden=ends or stopped)
            if saves or logs or self.device.type == "cpu":  # all that waits for a GPU
                means = {**self._means(order[position]), **numbers}
            if ends:
                self.sums = {}
                means.update(finish_epoch(epoch + 1))
                self.model.train()
                shown = "  ".join(f"{k} {v:.4g}" for k, v in means.items() if isinstance(v, (int, float)))
                say(f"epoch {epoch + 1}  step {self.step}  {shown}  seconds {self.seconds:.1f}")
            if logs:
                self.record(**means)
            if saves:
                self.save()
                saved = time.monotonic()
            if stopped and self.step < self.total:
                say(f"stopped at step {self.step} of {self.total}; "
                    f"the same command with --resume goes on from {self.checkpoint}")
                sys.exit(128 + stop[0] if stop else 143)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        self.model.eval()

    def _update(self, loss, indices, lr, **numbers):
        """One step of the optimizer, on this process's share of the clouds; adds to the epoch's sums, waits for nothing."""
        share, seed = slice(self.rank, None, self.world), self.config.seed
        weight = len(indices[share]) / len(indices)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # dropout, drop path, Gumbel noise: different on every process
        torch.manual_seed(act.seeded("cpu", seed, "noise", self.step, self.rank).initial_seed())
        generator = act.seeded(self.device, seed, "batch", self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            value, parts = loss(self.net, self.step, indices, generator, share, **numbers)
        self.optimizer.zero_grad()
        (value * (weight * self.world)).backward()  # DDP averages over processes, not over clouds
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.step += 1
        for name, tensor in {"loss": value, **parts, "grad_norm": norm}.items():
            self.sums[name] = self.sums.get(name, 0) + weight * tensor.detach().double()

    def _agree(self, now, *conditions):
        """Whether each condition holds in any process; asked `now`, else at every 16th step, since all wait for all."""
        if self.world == 1:
            return conditions
        if not now and self.step % 16:
            return [False] * len(conditions)
        flags = torch.tensor(conditions, dtype=torch.int, device=self.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return flags.bool().tolist()

    def _means(self, indices):
        """Means of the epoch so far over all processes' clouds. Raises ValueError if loss or gradient is not finite."""
        sums = torch.stack(list(self.sums.values()))
        if self.world > 1:
            torch.distributed.all_reduce(sums)
            self.sums = dict(zip(self.sums, sums if self.rank == 0 else torch.zeros_like(sums)))  # process 0 has and saves all
        means = dict(zip(self.sums, (sums / ((self.step - 1) % self.per_epoch + 1)).tolist()))
        if not all(map(math.isfinite, means.values())):
            names = ", ".join(self.names[i] for i in indices[:5])
            kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else "no checkpoint yet"
            raise ValueError(f"the loss or its gradient is not finite at step {self.step - 1} (clouds {names}, …): "
                             f"lower --lr, or --precision fp32; {kept}")
        return means

    def _progress(self, hidden):
        """On a terminal a bar with rate and time left, `hidden` where a line follows."""
        if self.rank == 0 and sys.stdout.isatty():
            rate, left = self.step * self.batch / self.seconds, int(self.seconds * (self.total / self.step - 1))
            bar = (f"[{'#' * (20 * self.step // self.total):.<20}] step {self.step}/{self.total}  {rate:.1f} clouds/s  "
                   f"{left // 60}:{left % 60:02d} left")
            print("\r\033[K" + ("" if hidden else bar), end="", flush=True)

    def close(self, pictures=(), **figures):
        """The run's closing figures as the last object of the log, its pictures, time and memory."""
        if self.rank:
            return
        self.record(**figures)
        for name, picture in pictures:  # an image, or what write_gallery takes
            if isinstance(picture, np.ndarray):
                shapes.write_png(self.out / f"{name}.png", picture)
            else:
                shapes.write_gallery(self.out / name, *picture)
        rows = [json.loads(line) for line in self.log.read_text().splitlines()]
        curves = {name: [(row["step"], row[name]) for row in rows if name in row] for name in ("loss", "reconstruction")}
        curves = {name: tuple(zip(*points)) for name, points in curves.items() if points}
        shapes.write_png(self.out / "loss.png", shapes.plot_lines(curves, "training loss", "step", "loss"))
        peak = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        say(f"{self.seconds:.0f} s for {self.step} steps, peak memory {peak / 2**30:.2f} GiB; {self.out} holds "
            + ", ".join(sorted(p.name for p in self.out.iterdir() if p.is_file() and not p.name.startswith("."))))


SIZES = {  # the teacher's and the student's, where they are not the paper's
    "tiny": dict(trunk="vit_tiny_patch16_224", trunk_width=192,
                 encoder=dict(num_group=32, width=192, depth=6, num_heads=3, encoder_dims=192),
                 teacher=dict(num_group=32, encoder_dims=192, tokens_dims=192, decoder_dims=192, num_tokens=512,
                              num_prompt=16, tokenizer="fixed")),
    "small": dict(trunk="vit_small_patch16_384", trunk_width=384, encoder={}, teacher=dict(num_tokens=2048, num_prompt=32)),
    "base": dict(trunk="vit_base_patch16_384", trunk_width=768, encoder={}, teacher={}),
}


def processor_has_bf16():
    """Whether the CPU multiplies in bf16, not only converts to it."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and re.search(r"\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text()) is not None


def resolve(config, device, defaults):
    """The settings with `auto` and 0 replaced by what they stand for on this device."""
    bf16 = device.type == "cuda" or processor_has_bf16()
    auto = dict(size="base" if device.type == "cuda" else "tiny", precision="bf16" if bf16 else "fp32")
    config = replace(config, **{name: value for name, value in auto.items() if getattr(config, name) == "auto"})
    default = {"points": 1024, **defaults[config.size]}
    return replace(config, **{name: getattr(config, name) or value for name, value in default.items()})


def check_distinct(clouds, num_group):
    """Raises ValueError, naming the first cloud that has fewer distinct points than patches."""
    for i, name in enumerate(clouds.names):
        points = clouds[i]
        if len(points[: 4 * num_group].unique(dim=0)) < num_group and (n := len(points.unique(dim=0))) < num_group:
            raise ValueError(f"{name}: has {n} distinct points, wanted at least the {num_group} patches of the model")


def open_data(config, device, everything=False):
    """(train, test) Clouds of --data, on the device where they fit; `everything`: ShapeNet-55 is trained on whole."""
    if config.data == "synthetic":
        train, test = shapes.synthetic_clouds(50, seed=0), shapes.synthetic_clouds(20, seed=1)
    else:
        first = None if everything and shapes._shapenet(Path(config.data)) else "train"
        train, test = (shapes.open_clouds(config.data, split, config.cache or None) for split in (first, "test"))
    if device.type == "cuda" and train.points.nbytes < torch.cuda.mem_get_info()[0] // 4:
        train, test = train.to(device), test.to(device)
    return train, test
