"""What the commands share: flags, device, seeds, schedules, optimizer, log, a run's folder."""

import argparse
import contextlib
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

import act
from util import clouds, files, official, processes, weights

TINY = dict(num_group=32, width=192, depth=6, num_heads=3, encoder_dims=192)
ENCODER_SIZES = dict(tiny=TINY, small={}, base={})  # what differs from the paper's encoder
BACKBONES = {  # the public weights of --weights auto, and the width of a random backbone
    "tiny": ("vit_tiny_patch16_224", 192),
    "small": ("vit_small_patch16_384", 384),
    "base": ("vit_base_patch16_384", 768),
}
SIZES = ("auto", "tiny", "small", "base")
# What --set takes by the type of a size: lowest value, end, in words.
RANGES = {int: (1, 2**31, "a whole number, 1 or more"), float: (0, 1, "a rate from 0 to below 1")}


# -- flags
def flag(default, help: str, paper=None, kind=None, choices=None):
    """A dataclass field that is a flag: () makes a list, False a switch, bool one with --no-."""
    if default or (default == 0 and default is not False):
        help += f" (default: {default})"
    if paper:
        help += f" (the paper: {paper})"
    if default == ():
        options = dict(nargs="+", action="extend", default=[])
    elif kind is bool:
        options = dict(action=argparse.BooleanOptionalAction)
    elif default is False:
        options = dict(action="store_true")
    else:
        options = dict(default=default, type=kind or type(default), choices=choices)
    options["help"] = help.replace("%", "%%")
    return field(default=default, metadata=dict(options=options, positional=kind == "positional"))


@dataclass
class RunConfig:  # the flags of every command, which adds its own; None: the size decides
    data: str = flag("synthetic", "'synthetic' or the path of a data set")
    variant: str = flag("PB_T50_RS", "OBJ_BG, OBJ_ONLY or PB_T50_RS, of ScanObjectNN")
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
    compile: bool = flag(None, "torch.compile the blocks (default: on a GPU)", None, bool)
    resume: bool = flag(False, "continue from the last.pt in --out, on a CPU bit for bit")
    log_every: int = flag(None, "also log and print every so many steps", None, int)


class FlagParser(argparse.ArgumentParser):  # whose errors are the user's mistakes
    def error(self, message):
        raise act.UserError(message)


def parse_flags(config_class, description: str, argv: list[str] | None = None):
    """An instance of the dataclass from the command line. Raises UserError for a bad flag."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=description, allow_abbrev=False, formatter_class=layout)
    for f in fields(config_class):
        name = f.name if f.metadata["positional"] else "--" + f.name.replace("_", "-")
        parser.add_argument(name, **f.metadata["options"])
    words = []  # --batch_size=2 is --batch-size=2; no shell has written out the ~ of --out='~/x'
    for word in sys.argv[1:] if argv is None else argv:
        name = re.match("(--[^=]*=?)?", word)[0]
        words.append(name.replace("_", "-") + os.path.expanduser(word.removeprefix(name)))
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
        if value not in (getattr(type(config), name), []):  # the class has the defaults
            option = name.replace("_", "-")
            raise act.UserError(f"--{option}: expected none for {task}, got {value}")


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
        value = end  # which is refused
        with contextlib.suppress(ValueError):
            value = kind(text)
        if not lowest <= value < end:
            raise act.UserError(f"--set {pair}: expected {name} to be {wanted}")
        config = replace(config, **{name: value})
    return config


def run_command(main, config_class, description: str, presets: dict | None = None) -> None:
    """Runs main(config). What a user or another process did wrong is one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that a console cannot show are escaped
            stream.reconfigure(errors="backslashreplace")
    if presets:
        description += f"\nDefaults by --size:\n{preset_help(presets)}"
    try:
        main(parse_flags(config_class, description))
        sys.stdout.flush()
        if dist.is_initialized():
            dist.barrier()  # process 0 writes results, which the others wait for
            dist.destroy_process_group()
    except (act.UserError, torch.cuda.OutOfMemoryError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        print(f"error: process {processes.RANK} lost another one: {reason}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; --resume continues a run from its last.pt", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whatever read the output, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush when Python ends
        sys.exit(141)


# -- device, seeds
def setup(config, presets: dict):
    """(config with the presets of its size, device). Seeds torch and joins torchrun's processes."""
    torch.set_flush_denormal(True)  # gradients of a sharp softmax: stage I 2.4 -> 8.3 clouds/s
    check_apart(config.data, config.out)
    device = pick_device(config.device)
    processes.join(device)
    if processes.RANK > 0:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    else:
        check_folder(config)
    torch.manual_seed(config.seed)
    size = config.size
    if size == "auto":
        size = "base" if device.type == "cuda" else "tiny"
    settled = dict(points=1024, precision=pick_precision(device)) | presets[size] | dict(size=size)
    if "epochs" in settled:  # a linear SVM has none, and nothing to compile
        settled["compile"] = device.type == "cuda"
    missing = [name for name in settled if getattr(config, name, settled[name]) in (None, "auto")]
    return replace(config, **{name: settled[name] for name in missing}), device


def check_apart(data: str, out: str) -> None:
    """UserError if --out is in --data or holds it: a run's pictures would be taken for clouds."""
    source = Path(data).resolve()
    folder = Path(out).resolve()
    if data != "synthetic" and (source.is_relative_to(folder) or folder.is_relative_to(source)):
        raise act.UserError(f"--out {out}: expected a folder apart from --data {data}")


def pick_device(name: str) -> torch.device:
    """The device of --device; `cuda` and `auto` with a GPU: this process's own one of the GPUs."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and processes.WORLD > 1:
        raise act.UserError(f"--device {name}: expected cuda, which gives each process its own")
    if name == "cuda":
        name = f"cuda:{processes.LOCAL_RANK}"
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in devices:
        raise act.UserError(f"--device: expected auto or {', '.join(devices)}, got {name}")
    if name != "cpu":
        torch.cuda.set_device(name)
    return torch.device(name)


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
    torch.manual_seed(seeded("cpu", seed, "noise", step, processes.RANK).initial_seed())
    return seeded(device, seed, "batch", step)


def autocast(config, device: torch.device) -> torch.autocast:
    """The context in which a step's forward pass runs, by --precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def place(split: clouds.Clouds, device: torch.device) -> clouds.Clouds:
    """The clouds on the GPU if they take less than a quarter of its free memory; else as given."""
    if device.type != "cuda":
        return split
    fits = split.points.nbytes < torch.cuda.mem_get_info()[0] / 4
    where = "on the GPU" if fits else "in main memory, for the GPU has no room: slower"
    print(f"{len(split)} clouds, {split.points.nbytes / 2**30:.2f} GiB, {where}")
    return split.to(device) if fits else split


# -- batches, learning rate, optimizer
def plan(config, count: int):
    """The config with batch size, steps and epochs settled for `count` clouds."""
    world = processes.WORLD
    batch_size = min(config.batch_size, count // world * world)
    if batch_size < 1 or batch_size % world:
        expected = "1 or more" if world == 1 else f"a multiple of {world} processes"
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
    norms = [module for module in model.modules() if hasattr(module, "num_batches_tracked")]
    return [norm for norm in norms if int(norm.num_batches_tracked) <= step]


def set_momentum(norms: list, step: int) -> None:
    """Running statistics of new BatchNorms are the mean of all steps, from the tenth on with the
    published momentum of 0.1, with which alone they stay near their start, 1, for 100 steps."""
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


def load_model(path, device, *kinds):
    """The model, of a class in `kinds`, in our own or an official checkpoint, in eval mode."""
    obj = weights.read_tensors(path)
    ours = isinstance(obj, dict) and "kind" in obj
    model = act.load(path, device) if ours else official.load(path, device)
    if not isinstance(model, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise act.UserError(f"{path}: expected a {expected}, got a {type(model).__name__}")
    return model


# -- a run's folder: config.json, metrics.jsonl, last.pt
RUN_FILES = ["config.json", "metrics.jsonl", "last.pt", "loss.svg", "confusion.png", "labels.csv"]
for picture in ("reconstruction", "features", "classify", "parts", "scene", "boxes"):
    RUN_FILES += [f"{picture}.png", f"{picture}.ply"]
FREE_SETTINGS = "out resume log_every cache data device compile epochs vote".split()  # may change


def check_folder(config) -> None:
    """UserError unless --out can be the folder of a run and has the last.pt of --resume."""
    folder = Path(config.out)
    above = next(path for path in (folder.absolute() / "last.pt").parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise act.UserError(f"--out {folder}: expected a folder to write to, got {above}")
    name = "fold_*/last.pt" if getattr(config, "task", "") == "fewshot" else "last.pt"
    if config.resume and not any(folder.glob(name)):
        raise act.UserError(f"--resume: expected a run's {name} in {folder}, got none")
    find_run(folder)


def find_run(folder: Path) -> list[Path]:
    """The files of a run in a folder. UserError if such files are there without its config.json."""
    found = [folder / name for name in RUN_FILES if (folder / name).exists()]
    about = {}
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((folder / "config.json").read_text())
    if found and not (isinstance(about, dict) and {"settings", "versions"} <= about.keys()):
        wanted = f"a new folder or a run's, got a {found[-1].name} of something else"
        raise act.UserError(f"--out {folder}: expected {wanted}")
    return found


def begin(config, model, optimizer, names: list[str]):
    """Opens --out, moves an earlier run aside: (the Log, the checkpoint it resumes or None).
    `names` are the training clouds' identities: with others the run is not resumed."""
    folder = Path(config.out)
    settings = asdict(config) | dict(clouds=hashlib.sha256(repr(names).encode()).hexdigest())
    about = dict(kind=type(model).__name__, config=asdict(model.config), command=sys.argv)
    device = str(next(model.parameters()).device)
    about.update(settings=settings, processes=processes.WORLD, device=device)
    about.update(versions=f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    log = Log(folder, config, about)
    if processes.RANK == 0:
        open_folder(folder)
    state = None
    if config.resume and (folder / "last.pt").is_file():
        state = load_state(log, model, optimizer, len(names) // config.batch_size)
    for name, value in (settings | dict(step=log.step)).items():
        if name not in FREE_SETTINGS:
            processes.agree(value, f"{folder}: {name}")
    if processes.RANK == 0:
        earlier = find_run(folder)
        if earlier and state is None:
            move_aside(earlier, folder)
        with files.complete_file(folder / "config.json") as file:
            file.write(json.dumps(log.about, indent=1).encode())
        with files.complete_file(folder / "metrics.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in log.rows).encode())
    return log, state


def move_aside(paths: list[Path], folder: Path) -> None:
    """Moves an earlier run into a folder in its own, its mark, config.json, last."""
    aside = folder / time.strftime("earlier-%Y%m%d-%H%M%S")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-")
    aside.mkdir()
    for path in reversed(paths):
        path.rename(aside / path.name)
    print(f"the earlier run in {folder} is now in {aside}")


def open_folder(out: str | Path) -> None:
    """Makes the folder --out if need be, and locks it until this process ends."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        lock = os.open(Path(out, ".lock"), os.O_CREAT | os.O_RDWR, 0o666)  # closing would unlock
    except OSError as error:
        raise act.UserError(f"--out {out}: expected a folder to write to, got {error}") from error
    with contextlib.suppress(ImportError, OSError):  # some file systems know no locks
        import fcntl  # POSIX alone has it

        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise act.UserError(f"--out {out}: in use by another run") from error


def load_state(log: "Log", model, optimizer, steps_per_epoch: int) -> dict:
    """Loads last.pt, of a run with the same settings, into log, model and optimizer; its dict."""
    path = log.folder / "last.pt"
    state = act.read_tensors(path)
    now = log.about["settings"]
    before = state.get("settings", {})
    if now["clouds"] != before.get("clouds"):
        raise act.UserError(f"{path}: expected a run of the same clouds, but the clouds differ")
    changed = []
    for name, value in before.items():
        if name not in FREE_SETTINGS and name != "steps" and value != now.get(name, value):
            changed.append(f"{name} was {value!r}, is {now[name]!r}")
    if changed:
        raise act.UserError(f"{path}: expected the same settings, got: {'; '.join(changed)}")
    if now["steps"] < before["steps"]:
        expected = f"--epochs {before['epochs']} (--steps {before['steps']}) or more"
        raise act.UserError(f"{path}: expected {expected}, got {now['epochs']} ({now['steps']})")
    act.load_exactly(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    log.rows = state["log"]
    log.step = state["step"]
    log.epoch = log.step // steps_per_epoch  # a run of so many steps may end within an epoch
    log.began -= log.rows[-1]["seconds"]
    print(f"resumed {path} after epoch {state['epoch']}, on a schedule of {now['steps']} steps")
    return state


def save(log: "Log", model, optimizer, **extra) -> None:
    """Writes last.pt, for --resume and act.load. Between the first and the last epoch, one is left
    out while saving would take more than 2 % of the time so far, or of a minute."""
    if processes.RANK > 0:
        return
    began = time.monotonic()
    allowed = 0.02 * max(60, began - log.began)
    if log.saves and log.epoch < log.config.epochs and sum(log.saves) + log.saves[-1] > allowed:
        return
    state = dict(log.about, model=model.state_dict(), optimizer=optimizer.state_dict())
    state.update(log=log.rows, epoch=log.epoch, step=log.step, random=torch.get_rng_state())
    act.save(state | extra, log.folder / "last.pt")
    log.saves.append(time.monotonic() - began)


class Log:  # the rows of metrics.jsonl, and the lines that a run prints
    def __init__(self, folder: Path, config, about: dict):
        self.folder = folder
        self.config = config
        self.about = about  # what config.json and the checkpoint say of the run
        self.step = 0  # steps done
        self.epoch = 0  # epochs done
        self.rows = []
        self.steps = []  # what was added in this epoch: a dict for each step
        self.saves = []  # seconds that each last.pt took
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
            means.append(torch.stack([step[name] for step in steps]).mean() / processes.WORLD)
        means = processes.sum_over_processes(torch.stack(means)).tolist()  # the one wait for a GPU
        row.update(zip(names, means, strict=True))
        if not all(math.isfinite(mean) for mean in means):
            raise act.UserError(f"loss not finite up to step {self.step}: {row}; lower --lr")
        return row

    def write(self, epoch: int, values: dict) -> None:
        """Appends a row to metrics.jsonl. What is not finite is None there, for JSON has no NaN."""
        seconds = round(time.monotonic() - self.began, 2)
        row = dict(epoch=epoch, step=self.step, seconds=seconds) | values
        row = json.loads(json.dumps(row), parse_constant=lambda name: None)
        undefined = [name for name in values if row[name] is None and values[name] is not None]
        if undefined:
            print(f"without a value: {', '.join(undefined)}")
        self.rows.append(row)
        path = self.folder / "metrics.jsonl"
        try:
            if processes.RANK == 0:
                with open(path, "a") as file:
                    file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise act.UserError(f"{path}: it cannot be written: {error}") from error

    def show(self) -> None:
        """Prints the numbers of the last row in a line that begins with its epoch."""
        shown = [f"epoch {self.rows[-1]['epoch']}", self.pace()]
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
