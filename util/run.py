"""What the commands share: flags, device, processes, seeds, schedules, optimizer, log, folder."""

import argparse
import hashlib
import io
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

import act
from util import clouds, official, weights

RANK = int(os.environ.get("RANK", 0))  # the number of this process of those torchrun started
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many these are
TINY = dict(num_group=32, width=192, depth=6, num_heads=3, encoder_dims=192)
ENCODER_SIZES = dict(tiny=TINY, small={}, base={})  # what differs from the paper's encoder
SIZES = ("auto", "tiny", "small", "base")
RANGES = {  # what --set takes by the type of a size: lowest value, end, in words; floats are rates
    int: (1, 2**31, "a whole number of 1 or more"),
    float: (0, 1, "a rate from 0 to below 1"),
}


# -- flags ----------------------------------------------------------------------------------------
def flag(default, help: str, paper=None, kind=None, choices=None):
    """A dataclass field that is a flag: False makes a switch, () a list. paper: published value."""
    if default or (default == 0 and default is not False):
        help += f" (default: {default})"
    if paper:
        help += f" (the paper: {paper})"
    if kind == "positional":
        options = dict(nargs="+")
    elif default == ():
        options = dict(nargs="+", action="extend", default=[])
    elif default is False:
        options = dict(action="store_true")
    else:
        options = dict(default=default, type=kind or type(default), choices=choices)
    options["help"] = help.replace("%", "%%")
    return field(default=default, metadata=dict(options=options, positional=kind == "positional"))


@dataclass
class RunConfig:
    """The flags of every command, which adds its own. None: the size decides."""

    data: str = flag("synthetic", "'synthetic' or the path of a data set")
    variant: str = flag("PB_T50_RS", "OBJ_BG, OBJ_ONLY or PB_T50_RS, of ScanObjectNN")
    area: int = flag(5, "the area of S3DIS that is the test set", 5)
    cache: str = flag("", "folder for the memory-mapped copy of a folder of clouds")
    drop_invalid: bool = flag(False, "leave out the points that are not finite")
    points: int = flag(None, "points sampled from a cloud (default: 1024, or by --size)", None, int)
    size: str = flag("auto", "auto: base on a GPU, else tiny", "base", choices=SIZES)
    out: str = flag("runs/run", "folder of the run's checkpoint, log, configuration and pictures")
    epochs: int = flag(None, "passes over the data (default: by --size)", None, int)
    steps: int = flag(None, "train for so many steps instead of --epochs", None, int)
    batch_size: int = flag(None, "clouds per step in all (default: by --size)", None, int)
    lr: float = flag(None, "peak learning rate (default: by --size)", None, float)
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    precision: str = flag("auto", "auto: bf16 if native, or fp32", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the Transformer blocks")
    resume: bool = flag(False, "continue after the last epoch in --out, on a CPU bit for bit")
    log_every: int = flag(None, "also log and print every so many steps", None, int)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are the user's mistakes."""

    def error(self, message):
        raise act.UserError(message)


def parse_flags(config_class, description: str, argv: list[str] | None = None):
    """An instance of the dataclass from the command line. Raises UserError for a bad flag."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=description, allow_abbrev=False, formatter_class=layout)
    for f in fields(config_class):
        name = f.name if f.metadata["positional"] else "--" + f.name.replace("_", "-")
        parser.add_argument(name, **f.metadata["options"])
    words = []  # --batch_size=2 is --batch-size=2
    for word in sys.argv[1:] if argv is None else argv:
        words.append(re.sub("^--[^=]*", lambda name: name[0].replace("_", "-"), word))
    given = vars(parser.parse_args(words))
    for name, value in given.items():
        if isinstance(value, (int, float)) and not 0 <= value < 2**63:
            raise act.UserError(f"--{name.replace('_', '-')}: expected 0 to 2^63, got {value}")
    if given.get("steps") is not None and given["epochs"] is not None:
        raise act.UserError(f"--steps {given['steps']}: expected no --epochs beside it")
    return config_class(**given)


def refuse_flags(config, names: list[str], task: str) -> None:
    """UserError if a flag among `names`, which the task does not use, was given."""
    for name in names:
        value = getattr(config, name)
        if value != getattr(type(config), name):  # the class has the defaults
            flag = name.replace("_", "-")
            raise act.UserError(f"--{flag}: expected none for {task}, got {value}")


def preset_help(presets: dict, task: str = "") -> str:
    """What each size, of each task, takes of the flags that are not given: a line for each."""
    text = ""
    for name, values in presets.items():
        if name in SIZES:
            flags = [f"--{flag.replace('_', '-')} {value}" for flag, value in values.items()]
            text += f"\n    {task}{name:7}{' '.join(flags)}"
        else:
            text += preset_help(values, f"{name:10}")
    return text


def override(config, pairs: list[str], names: list[str]):
    """A copy of a model's config with the NAME=VALUE pairs of --set; `names` are those allowed."""
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in names:
            raise act.UserError(f"--set {pair}: expected a value of {', '.join(names)}")
        kind = type(getattr(config, name))
        lowest, end, wanted = RANGES[kind]
        try:
            value = kind(text)
        except ValueError:
            value = end  # which is refused
        if not lowest <= value < end:
            raise act.UserError(f"--set {pair}: expected {name} to be {wanted}")
        config = replace(config, **{name: value})
    return config


def run_command(main, config_class, description: str, presets: dict | None = None) -> None:
    """Runs main(config); a user's mistake, a full GPU and Ctrl-C are one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that a console cannot show are escaped
            stream.reconfigure(errors="backslashreplace")
    if presets:
        description += f"\nDefaults by --size:\n{preset_help(presets)}"
    try:
        main(parse_flags(config_class, description))
        sys.stdout.flush()
    except (act.UserError, torch.cuda.OutOfMemoryError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume continues a run after its last full epoch", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whatever read the output, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush when Python ends
        sys.exit(141)
    if dist.is_initialized():
        dist.destroy_process_group()


# -- device, processes, seeds ---------------------------------------------------------------------
def setup(config, presets: dict):
    """(config with the presets of its size, device). Seeds torch and joins torchrun's processes."""
    torch.set_flush_denormal(True)  # gradients of a sharp softmax: stage I 2.4 -> 8.3 clouds/s
    check_apart(config.data, config.out)
    device = pick_device(config.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    torch.manual_seed(config.seed)
    size = config.size
    if size == "auto":
        size = "base" if device.type == "cuda" else "tiny"
    settled = dict(points=1024, precision=pick_precision(device)) | presets[size] | dict(size=size)
    for name, value in settled.items():
        if getattr(config, name, value) in (None, "auto"):
            config = replace(config, **{name: value})
    return config, device


def check_apart(data: str, out: str) -> None:
    """UserError if --out is in --data or holds it: a run's pictures would be taken for clouds."""
    source = Path(data).resolve()
    folder = Path(out).resolve()
    inside = source.is_relative_to(folder) or folder.is_relative_to(source)
    if inside and data != "synthetic":
        raise act.UserError(f"--out {out}: expected a folder apart from --data {data}")


def pick_device(name: str) -> torch.device:
    """The device of --device; `cuda` and `auto` with a GPU: this process's own one of the GPUs."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in devices:
        raise act.UserError(f"--device: expected auto, {', '.join(devices)}, got {name}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies in it, for conversion alone does not pay; else fp32."""
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif os.path.exists("/proc/cpuinfo"):
        native = re.search("avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text())
    return "bf16" if native else "fp32"


def seeded(device, *numbers) -> torch.Generator:
    """A generator that depends on the numbers alone: a step needs no memory of those before it."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def seed_step(seed: int, step: int, device) -> torch.Generator:
    """Seeds this process's dropout and Gumbel noise; returns a generator for the whole batch."""
    torch.manual_seed(seeded("cpu", seed, "noise", step, RANK).initial_seed())
    return seeded(device, seed, "batch", step)


def autocast(config, device: torch.device) -> torch.autocast:
    """The context in which a step's forward pass runs, by --precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def place(split: clouds.Clouds, device: torch.device) -> clouds.Clouds:
    """The clouds on the GPU if they take less than a quarter of its free memory; else as given."""
    if device.type == "cuda" and split.points.nbytes < torch.cuda.mem_get_info()[0] / 4:
        return split.to(device)
    return split


# -- batches, learning rate, optimizer, processes -------------------------------------------------
def plan(config, count: int):
    """The config with batch size, steps and epochs settled for `count` clouds."""
    batch_size = min(config.batch_size, count // WORLD * WORLD)
    if batch_size < 1 or batch_size % WORLD:
        expected = "1 or more" if WORLD == 1 else f"a multiple of {WORLD} processes"
        raise act.UserError(f"--batch-size {batch_size}: expected {expected}")
    steps_per_epoch = count // batch_size
    steps = config.epochs * steps_per_epoch if config.steps is None else config.steps
    epochs = math.ceil(steps / steps_per_epoch)
    return replace(config, batch_size=batch_size, steps=steps, epochs=epochs)


def epoch_batches(config, count: int, epoch: int, step: int = 0) -> tuple[torch.Tensor, ...]:
    """The batches (indices of clouds) of an epoch, from 0, still to do after `step` steps."""
    order = torch.randperm(count, generator=seeded("cpu", config.seed, "order", epoch))
    batches = order.split(config.batch_size)[: count // config.batch_size]
    first = epoch * len(batches)
    return batches[max(0, step - first) : config.steps - first]


def cosine(x: float, start: float, end: float) -> float:
    """From `start` at x <= 0 to `end` at x >= 1 along half a cosine."""
    x = min(1.0, max(0.0, x))
    return end + (start - end) * (1 + math.cos(math.pi * x)) / 2


def set_lr(optimizer, step: int, config, end: float, warmup: int, start: float = 1e-6) -> float:
    """Linear from `start` over `warmup` steps (at most a tenth of all), then a cosine to `end`."""
    warmup = min(warmup, config.steps / 10)
    lr = cosine((step - warmup) / max(1, config.steps - warmup), config.lr, end)
    if step < warmup:
        lr = start + (config.lr - start) * step / warmup
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1)  # a group may have a rate of its own
    return lr


def new_norms(model, step: int) -> list:
    """The BatchNorms that have seen no batch before this run, which has done `step` steps."""
    norm_class = torch.nn.modules.batchnorm._BatchNorm
    norms = [module for module in model.modules() if isinstance(module, norm_class)]
    return [norm for norm in norms if int(norm.num_batches_tracked) <= step]


def set_momentum(norms: list, step: int) -> None:
    """The running statistics of new BatchNorms are the mean of all steps, from the tenth step on
    with the published momentum of 0.1. Otherwise they would keep what they start with, a variance
    of 1, for some 100 steps, where patches have one of 1e-5."""
    for norm in norms:
        norm.momentum = max(0.1, 1 / (step + 1))


def adamw(model, lr: float, weight_decay: float, slow: tuple[str, ...] = ()) -> torch.optim.AdamW:
    """AdamW as published: no decay on 1-D parameters, biases among them, and names with "token"."""
    groups = []  # in this order in every checkpoint
    for scale in (1.0, 0.1):
        for decay in (weight_decay, 0.0):
            groups.append(dict(params=[], weight_decay=decay, scale=scale))
    for name, p in model.named_parameters():
        index = int(p.ndim <= 1 or "token" in name)
        if name.startswith(slow):  # at a tenth of the rate
            index += 2
        if p.requires_grad:
            groups[index]["params"].append(p)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def gradient_norm(model) -> torch.Tensor:
    """The norm of all gradients of the model together, as published; nothing is clipped."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def parallel(model, config):
    """The model as a loop calls it: blocks compiled if asked, gradients averaged over processes."""
    if config.compile:
        print("compiling the Transformer blocks in the first step ...", flush=True)
        for module in model.modules():
            if isinstance(module, act.Block):
                module.compile()  # block by block: seconds, where the whole would take minutes
    if WORLD == 1:
        return model
    if next(model.parameters()).is_cuda:  # BatchNorm's statistics are those of all GPUs
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(model)


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, summed in place over all processes."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def load_model(path, device, *kinds):
    """The model, of a class in `kinds`, in our own or an official checkpoint, in eval mode."""
    obj = weights.read_tensors(path)
    ours = isinstance(obj, dict) and "kind" in obj
    model = act.load(path, device) if ours else official.load(path, device)
    if not isinstance(model, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise act.UserError(f"{path}: expected a {expected}, got a {type(model).__name__}")
    return model


# -- a run's folder: config.json, metrics.jsonl, last.pt ------------------------------------------
RUN_FILES = {".pt", ".jsonl", ".json", ".svg", ".png", ".ply", ".csv", ".npz"}
FREE_SETTINGS = "out resume log_every cache data device compile epochs vote".split()  # may change


def begin(config, model, optimizer, names: list[str]):
    """Opens --out, moves an earlier run aside: (the Log, the checkpoint it resumes or None).
    `names` are the training clouds' identities: with others the run is not resumed."""
    folder = open_folder(config.out)
    log = Log(folder, config, describe_run(config, model, names))
    state = None
    if config.resume and (folder / "last.pt").is_file():
        state = load_state(log, model, optimizer, len(names) // config.batch_size)
    elif RANK == 0 and (folder / "config.json").exists():
        aside = folder / time.strftime("earlier-%Y%m%d-%H%M%S")
        aside.mkdir()
        for file in list(folder.iterdir()):
            if file.suffix in RUN_FILES:
                file.rename(aside / file.name)
        print(f"the earlier run in {folder} is now in {aside}")
    if RANK == 0:
        (folder / "config.json").write_text(json.dumps(log.about, indent=1))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log.rows))
    return log, state


def open_folder(out: str) -> Path:
    """The folder --out, made if need be, and locked until this process ends."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if RANK == 0 and os.name == "posix":
            import fcntl  # POSIX alone has it

            flags = os.O_CREAT | os.O_RDWR
            file = os.open(folder / ".lock", flags, 0o666)  # closing it would unlock
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise act.UserError(f"--out {out}: in use by another run") from error
    except OSError as error:
        raise act.UserError(f"--out {out}: expected a folder to write to, got {error}") from error
    return folder


def describe_run(config, model, names: list[str]) -> dict:
    """What config.json and the checkpoint say of a run: its model, settings, clouds, versions."""
    settings = asdict(config) | dict(clouds=hashlib.sha256(repr(names).encode()).hexdigest())
    about = dict(kind=type(model).__name__, config=asdict(model.config), command=sys.argv)
    about.update(settings=settings, processes=WORLD, device=str(next(model.parameters()).device))
    return about | dict(versions=f"Python {sys.version.split()[0]}, torch {torch.__version__}")


def load_state(log: "Log", model, optimizer, steps_per_epoch: int) -> dict:
    """Loads last.pt, of a run with the same settings, into log, model and optimizer; its dict."""
    path = log.folder / "last.pt"
    state = act.read_tensors(path)
    if not isinstance(state, dict) or "settings" not in state:
        raise act.UserError(f"{path}: expected the checkpoint of a run, got something else")
    now = log.about["settings"]
    if now["clouds"] != state["settings"].get("clouds"):
        raise act.UserError(f"{path}: the clouds differ from those that it was trained on")
    longer = now["steps"] > state["settings"]["steps"]
    changed = []
    for name, value in state["settings"].items():
        free = name in FREE_SETTINGS or (name == "steps" and longer)
        if not free and value != now.get(name):
            changed.append(f"{name} was {value!r}, is {now.get(name)!r}")
    if changed:
        raise act.UserError(f"{path}: expected the same settings, got: {'; '.join(changed)}")
    act.load_exactly(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    log.rows = state["log"]
    log.step = state["step"]
    log.epoch = log.step // steps_per_epoch  # a run of so many steps may end within an epoch
    log.began -= log.rows[-1]["seconds"]
    note = ", on the schedule of the longer run" if longer else ""
    print(f"resumed {path} after epoch {state['epoch']}{note}")
    return state


def save(log: "Log", model, optimizer, **extra) -> None:
    """Writes last.pt, from which --resume continues and which act.load reads."""
    if RANK == 0:
        state = dict(log.about, model=model.state_dict(), optimizer=optimizer.state_dict())
        state.update(log=log.rows, epoch=log.epoch, step=log.step, random=torch.get_rng_state())
        act.save(state | extra, log.folder / "last.pt")


class Log:
    """The rows of metrics.jsonl, and the lines that a run prints."""

    def __init__(self, folder: Path, config, about: dict):
        self.folder = folder
        self.config = config
        self.about = about  # see describe_run
        self.step = 0  # steps done
        self.epoch = 0  # epochs done
        self.rows = []
        self.steps = []  # what was added in this epoch: a dict for each step
        self.shown = 0  # the last step of which a line was printed
        self.began = time.monotonic()

    def add(self, **values) -> None:
        """A step's values, for `means`. No tensor is read here, for a GPU would have to wait."""
        self.step += 1
        for name, value in values.items():
            if torch.is_tensor(value):
                values[name] = value.detach().float()
        self.steps.append(values)
        every = self.config.log_every
        if every and self.step % every == 0:
            self.write(self.epoch + 1, self.means(self.steps[-every:]))  # those since the last
            self.show()
        elif sys.stdout.isatty():
            print(self.pace(), end="  \r", flush=True)  # the next line is longer, and covers it

    def end_epoch(self, **metrics) -> None:
        """The row of an epoch: its means, of which `loss` is named loss_epoch, and `metrics`."""
        self.epoch += 1
        means = self.means(self.steps)
        self.write(self.epoch, dict(loss_epoch=means.pop("loss")) | means | metrics)
        self.show()
        self.steps = []

    def close(self, **metrics) -> None:
        """The last row, with the closing metrics, and a line on the run."""
        self.write(self.epoch, metrics)
        work = f" for {self.step} steps" if self.step else ""
        print(f"{self.rows[-1]['seconds']:.0f} s{work}; results in {self.folder}")

    def means(self, steps: list[dict]) -> dict:
        """Tensors are averaged over steps and processes; of plain numbers the last is kept."""
        row = dict(steps[-1])
        names = [name for name, value in row.items() if torch.is_tensor(value)]
        means = []
        for name in names:
            means.append(torch.stack([step[name] for step in steps]).mean() / WORLD)
        means = sum_over_processes(torch.stack(means)).tolist()  # the one wait for a GPU
        row.update(zip(names, means, strict=True))
        if not all(math.isfinite(mean) for mean in means):
            raise act.UserError(f"loss not finite up to step {self.step}: {row}; lower --lr")
        return row

    def write(self, epoch: int, values: dict) -> None:
        """Appends a row to metrics.jsonl."""
        seconds = round(time.monotonic() - self.began, 2)
        self.rows.append(dict(epoch=epoch, step=self.step, seconds=seconds) | values)
        if RANK == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")

    def show(self) -> None:
        """Prints the numbers of the last row in a line that begins with its epoch."""
        shown = [f"epoch {self.rows[-1]['epoch']}"]
        if self.step > self.shown:  # else the line before has said it
            shown.append(self.pace())
        self.shown = self.step
        for name, value in self.rows[-1].items():
            if name not in ("epoch", "step", "seconds") and isinstance(value, (int, float)):
                shown.append(f"{name} {value:.4g}")
        print("  ".join(shown), flush=True)

    def pace(self) -> str:
        """Steps done, clouds per second and the time that is left, for a line of the log."""
        rate = self.step / (time.monotonic() - self.began)
        minutes = (self.config.steps - self.step) / rate / 60
        speed = f"{rate * self.config.batch_size:.1f} clouds/s"
        return f"step {self.step} of {self.config.steps}  {speed}  {minutes:.1f} min left"


def progress(items, what: str):
    """Yields the items of a list; every five seconds it says on stderr how many are done."""
    shown = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"{what}: {i} of {len(items)}", file=sys.stderr, flush=True)
        yield item
