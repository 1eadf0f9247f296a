"""Transfer of a pretrained encoder (Sec. 5): what finetune.py and segment.py share.

To add a task:
1. Write a subclass of `Task` like Classification in finetune.py.
2. Add it to TASKS there: TASKS[name](config, data, sizes, device).
3. Add defaults of its flags, by size, to PRESETS.
4. Add the flags that it ignores to `unused`.
`train` does the rest, by cross-entropy.
A new class of model needs a row in act.KINDS.

Shapes: B clouds of a batch, N points of each (--points), L labels.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import act
from util import clouds, pictures, run

# -- config ----------------------------------------------------------------------------------------
PROTOCOLS = ("full", "mlp3", "linear")
AUGMENTATIONS = ("auto", "rotate", "scale_translate", "none")


@dataclass
class TransferConfig(run.RunConfig):
    """The flags that finetune.py and segment.py share; each gives `task` its choices."""

    out: str = run.flag("", "folder of the results (default: runs/<task>)")
    task: str = run.flag("", "what is learnt")
    protocol: str = run.flag("full", "what is trained", "all three", choices=PROTOCOLS)
    checkpoint: str = run.flag("runs/student/last.pt", "a student; none: from scratch")
    augment: str = run.flag("auto", "auto: as published", choices=AUGMENTATIONS)
    weight_decay: float = run.flag(0.05, "AdamW's weight decay", 0.05)
    unused: ClassVar[dict] = {}  # task -> the flags that it does not use

    def __post_init__(self):
        if not self.out:
            self.out = f"runs/{self.task}"
        run.refuse_flags(self, self.unused.get(self.task, []), self.task)


def describe(config: TransferConfig) -> str:
    """The settings of a run, for the lines that open and close it."""
    text = f"{config.task}, {config.data}, size {config.size}"
    if "augment" not in config.unused.get(config.task, []):
        text += f", {config.protocol}, augmentation {config.augment}, {config.precision}"
    return text


class Task:
    """What `train` needs of a task. Subclasses set `config` and `names`, and define:

    build_model(): a new network with a `config` (an act.EncoderConfig), an `encoder` and, for
        mlp3 and linear, `freeze_encoder()`. It maps xyz, and the category if `sample` returns
        one, to logits (B, L) or (B, N, L).
    sample(indices, step, generator): on the device xyz (B, N, 3); labels, int64 (B,) or (B, N);
        category, int64 (B,), or None. The indices, on the CPU, are those of all processes.
        The generator is seeded for the step, so that runs resume.
    evaluate(model): metrics of the test clouds by name. It puts the model in eval mode.
    finish(model, folder): further metrics. It prints tables and writes pictures.
    Of several processes the first alone calls `evaluate` and `finish`."""

    names: list  # what tells each training cloud, for --resume to compare
    loss_weight = None  # of each label, a tensor (L,) on the device
    metric = ""  # highest at the best epoch; "": evaluate after the last epoch only
    turn = staticmethod(clouds.rotate_y)  # about the vertical axis
    move = staticmethod(clouds.scale_translate)

    def augment(self, xyz: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Clouds (B, N, 3), turned or moved (Sec. 5) as --augment says."""
        if self.config.augment == "rotate":
            return self.turn(xyz, generator)
        if self.config.augment == "scale_translate":
            return self.move(xyz, generator)
        return xyz


def load_source(config: TransferConfig) -> nn.Module | None:
    """The model of --checkpoint, ours or official, on the CPU; None if that is `none`."""
    path = config.checkpoint
    if path == "none":
        return None
    if not Path(path).exists():
        raise act.UserError(f"{path}: no such --checkpoint; run train_student.py")
    return run.load_model(path, "cpu", act.Student, act.Classifier, act.Segmenter)


def encoder_sizes(config: TransferConfig, source: nn.Module | None, size: str = "auto") -> dict:
    """Sizes of the encoder, without `normalized`: those of `source`, else of --size.
    `size` is what the user typed, a UserError if the checkpoint has others."""
    own = act.EncoderConfig(points=1024, **run.ENCODER_SIZES[config.size])
    c = own if source is None else source.config
    if size != "auto" and (c.width, c.depth) != (own.width, own.depth):
        expected = f"width {c.width} and depth {c.depth} as in {config.checkpoint}"
        raise act.UserError(f"--size {size}: expected {expected}, got {own.width}, {own.depth}")
    sizes = {field.name: getattr(c, field.name) for field in fields(act.EncoderConfig)}
    del sizes["normalized"]
    sizes["points"] = config.points
    sizes["num_group"] = max(1, config.points * c.num_group // c.points)  # as large patches
    return sizes


def check_labels(config: TransferConfig, count: np.ndarray) -> None:
    """UserError unless two labels or more of `count` (L,) are above 0."""
    if (count > 0).sum() < 2:
        raise act.UserError(f"{config.data}: expected 2 or more classes to train on, got 1")


def start_model(config: TransferConfig, model: nn.Module, source: nn.Module | None) -> nn.Module:
    """The model with the encoder of `source`, frozen if --protocol says so."""
    if config.protocol != "full":
        model.freeze_encoder()
    if source is not None:
        keys = model.encoder.load_state_dict(source.encoder.state_dict(), strict=False)
        heads = [name for name, _ in model.named_children() if name != "encoder"]
        others = [name for name, _ in source.named_children() if name != "encoder"]
        new = ", ".join(keys.missing_keys + heads) or "nothing"
        print(f"loaded the encoder in {config.checkpoint}")
        print(f"newly initialised: {new}; not used: {', '.join(keys.unexpected_keys + others)}")
    c = model.config
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    sizes = f"width {c.width}, depth {c.depth}, {count:.1f} M parameters"
    patches = f"{c.num_group} patches of {c.group_size} of {c.points} points"
    print(f"{type(model).__name__}: {sizes}, {patches}")
    return model


def train(
    config: TransferConfig, task: Task, source: nn.Module | None, device: torch.device
) -> run.Log:
    """Trains a network for a task and evaluates it. Returns the run's log."""
    count = len(task.names)
    config = run.plan(config, count)
    if config.batch_size < 2 * run.WORLD:  # for BatchNorm
        expected = f"expected {2 * run.WORLD} or more of {count} training clouds"
        raise act.UserError(f"--batch-size: {expected}, got {config.batch_size}")
    torch.manual_seed(config.seed)  # the same head for any encoder
    model = start_model(config, task.build_model(), source).to(device)
    optimizer = run.adamw(model, config.lr, config.weight_decay)
    warmup = 10 * (count // config.batch_size)  # ten epochs
    log, _ = run.begin(config, model, optimizer, task.names)
    net = run.parallel(model, config)
    norms = run.new_norms(net, log.step)

    # -- loop
    metrics = {}
    own = slice(run.RANK, None, run.WORLD)  # this process's part
    for epoch in range(log.epoch, config.epochs):
        net.train()
        for indices in run.epoch_batches(config, count, epoch, log.step):
            generator = run.seed_step(config.seed, log.step, device)
            run.set_momentum(norms, log.step)
            lr = run.set_lr(optimizer, log.step, config, end=1e-6, warmup=warmup)
            xyz, target, category = task.sample(indices, log.step, generator)
            xyz = task.augment(xyz, generator)
            with run.autocast(config, device):
                logits = net(xyz[own]) if category is None else net(xyz[own], category[own])
            logits = logits.float().flatten(0, -2)  # (B, L), or (B * N, L)
            loss = F.cross_entropy(logits, target[own].flatten(), task.loss_weight)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 10)  # as published
            optimizer.step()
            log.add(loss=loss, grad_norm=grad_norm, lr=lr)
        if task.metric and run.RANK == 0:
            metrics = task.evaluate(model)
        log.end_epoch(**metrics)
        run.save(log, model, optimizer)

    # -- results
    if run.RANK == 0:
        if not metrics:
            metrics = task.evaluate(model)
        closing = task.finish(model, log.folder)
        rows = [row for row in log.rows if task.metric in row]
        if rows:
            best = max(rows, key=lambda row: row[task.metric])
            closing |= {f"best_{task.metric}": best[task.metric], "best_epoch": best["epoch"]}
        pictures.write_chart(log.folder / "loss.svg", log.rows)
        close(log, config, metrics | closing)
    return log


def close(log: run.Log, config: TransferConfig, metrics: dict) -> None:
    """Writes the last row of a run and prints the line of its results."""
    log.close(task=config.task, checkpoint=config.checkpoint, seed=config.seed, **metrics)
    shown = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)]
    print(f"{describe(config)}: {', '.join(shown)}")


def write_examples(path: Path, shown: dict, colors: np.ndarray) -> None:
    """A gallery: each cloud painted by its true and, beside it, by its predicted labels.
    shown: caption -> xyz (N, 3), truth and prediction, both (N,) or one label."""
    tiles = []
    for xyz, truth, predicted in shown.values():
        for labels in (truth, predicted):
            tiles.append((xyz, np.broadcast_to(colors[labels], xyz.shape)))
    pictures.write_gallery(path, [tiles], columns=4)
    print(f"{path}.png: truth and prediction of {', '.join(shown)}")
