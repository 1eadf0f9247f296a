"""Transfer of a pretrained encoder (Sec. 5): what finetune.py and segment.py share.

A new task is a subclass of `Task` in segment.py's TASKS. Its defaults are in PRESETS, the flags
that it ignores in `unused`. A new class of model needs a row in act.KINDS.

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
from util import clouds, pictures, processes, run

PROTOCOLS = ("full", "mlp3", "linear")
AUGMENTATIONS = ("auto", "rotate", "scale_translate", "none")
Source = nn.Module | None  # the model of --checkpoint


@dataclass
class TransferConfig(run.RunConfig):  # each command gives `task` its choices
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
    """The settings of a run."""
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
        category, int64 (B,), or None, of a process's share of the indices, which are on the
        CPU. The generator is seeded for the step, and draws for all shares.
    evaluate(model): metrics by name, on all processes. It puts the model in eval mode.
    finish(model, folder): further metrics, tables, pictures, on process 0 alone."""

    names: list  # of each training cloud, for --resume to compare
    loss_weight = None  # of each label, a tensor (L,) on the device
    metric = ""  # highest at the best epoch; "": evaluate after the last epoch only
    turn = staticmethod(clouds.rotate_y)  # about the vertical axis
    move = staticmethod(clouds.scale_translate)

    def augment(self, xyz: torch.Tensor, generator: torch.Generator, share=(0, 1)) -> torch.Tensor:
        """A share of a batch (B, N, 3), turned or moved (Sec. 5)."""
        if self.config.augment == "rotate":
            return self.turn(xyz, generator, share=share)
        if self.config.augment == "scale_translate":
            return self.move(xyz, generator, share=share)
        return xyz


def load_source(config: TransferConfig) -> Source:
    """The model of --checkpoint on the CPU; None if that is `none`."""
    path = config.checkpoint
    if path == "none":
        return None
    if not Path(path).exists():
        raise act.UserError(f"{path}: no such --checkpoint; run train_student.py")
    return run.load_model(path, "cpu", act.Student, act.Classifier, act.Segmenter)


def encoder_sizes(config: TransferConfig, source: Source, size: str = "auto") -> dict:
    """Sizes of the encoder: those of `source`, else of --size.
    `size` is as typed, a UserError if the checkpoint has others."""
    own = act.EncoderConfig(points=1024, **run.ENCODER_SIZES[config.size])
    c = own if source is None else source.config
    if size != "auto" and (c.width, c.depth) != (own.width, own.depth):
        expected = f"width {c.width} and depth {c.depth} as in {config.checkpoint}"
        raise act.UserError(f"--size {size}: expected {expected}, got {own.width}, {own.depth}")
    sizes = {field.name: getattr(c, field.name) for field in fields(act.EncoderConfig)}
    for name in ("normalized", "center", "radius"):
        del sizes[name]
    sizes["points"] = config.points
    sizes["num_group"] = max(1, config.points * c.num_group // c.points)  # as large patches
    return sizes


def check_labels(config: TransferConfig, count: np.ndarray) -> None:
    """UserError unless two or more of `count` (L,) are above 0."""
    if (count > 0).sum() < 2:
        raise act.UserError(f"{config.data}: expected 2 or more classes to train on, got 1")


def start_model(config: TransferConfig, model: nn.Module, source: Source) -> nn.Module:
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


def train(config: TransferConfig, task: Task, source: Source, device: torch.device) -> run.Log:
    """Trains and evaluates a network for a task. Returns the log."""
    count = len(task.names)
    config = run.plan(config, count)
    if config.batch_size < 2 * processes.WORLD:  # for BatchNorm
        expected = f"expected {2 * processes.WORLD} or more of {count} training clouds"
        raise act.UserError(f"--batch-size: {expected}, got {config.batch_size}")
    torch.manual_seed(config.seed)  # the same head for any encoder
    model = start_model(config, task.build_model(), source).to(device)
    optimizer = run.adamw(model, config.lr, config.weight_decay)
    warmup = 10 * (count // config.batch_size)  # ten epochs
    log, _ = run.begin(config, model, optimizer, task.names)
    net = processes.parallel(model, config)
    norms = run.new_norms(net, log.step)

    metrics = {}
    for epoch in range(log.epoch, config.epochs):
        net.train()
        for indices in run.epoch_batches(config, count, epoch, log.step):
            generator = run.seed_step(config.seed, log.step, device)
            run.set_momentum(norms, log.step)
            lr = run.set_lr(optimizer, log.step, config, end=1e-6, warmup=warmup)
            xyz, target, category = task.sample(indices, log.step, generator)
            xyz = task.augment(xyz, generator, processes.SHARE)
            with run.autocast(config, device):
                logits = net(xyz) if category is None else net(xyz, category)
            logits = logits.float().flatten(0, -2)  # (B, L), or (B * N, L)
            target = target.flatten()
            loss = F.cross_entropy(logits, target, task.loss_weight)
            if task.loss_weight is not None and processes.WORLD > 1:
                total = task.loss_weight[target].sum()  # of a share
                loss = loss * (total / processes.average(total))
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 10)  # as published
            optimizer.step()
            log.add(loss=loss, grad_norm=grad_norm, lr=lr)
        if task.metric:
            metrics = task.evaluate(model)
        log.end_epoch(**metrics)
        run.save(log, model, optimizer)

    if not metrics:
        metrics = task.evaluate(model)
    if processes.RANK == 0:
        closing = task.finish(model, log.folder)
        rows = [row for row in log.rows if row.get(task.metric) is not None]
        if rows:
            best = max(rows, key=lambda row: row[task.metric])
            closing |= {f"best_{task.metric}": best[task.metric], "best_epoch": best["epoch"]}
        pictures.write_chart(log.folder / "loss.svg", log.rows)
        close(log, config, metrics | closing)
    return log


def close(log: run.Log, config: TransferConfig, metrics: dict) -> None:
    """Writes the last row of a run, prints the line of its results."""
    log.close(task=config.task, checkpoint=config.checkpoint, seed=config.seed, **metrics)
    row = log.rows[-1]  # has None for NaN
    shown = [f"{name} {row[name]:.4g}" for name in metrics if isinstance(row[name], float)]
    print(f"{describe(config)}: {', '.join(shown)}")


def write_examples(path: Path, shown: dict, colors: np.ndarray) -> None:
    """A gallery: each cloud painted by true and by predicted labels.
    shown: caption -> xyz (N, 3), truth and prediction, (N,) or one label."""
    tiles = []
    for xyz, truth, predicted in shown.values():
        for labels in (truth, predicted):
            tiles.append((xyz, np.broadcast_to(colors[labels], xyz.shape)))
    caption = f"truth and prediction of {', '.join(shown)}"
    pictures.write_gallery(path, [tiles], columns=4, caption=caption)
