"""Transfer of a pretrained encoder (Sec. 5): what the tasks of finetune.py and segment.py share.

A downstream task gives a label to each cloud or to each point. To add one:

 1. Write one subclass of `Task` (below), in finetune.py if it labels clouds, in segment.py if it
    labels points. `Classification` in finetune.py is a full example.
 2. Register it in that command's table TASKS under the name that --task takes. The command
    constructs it as TASKS[name](config, data, sizes, device): the flags, the opened --data, the
    encoder's sizes (see `encoder_sizes`) and the torch device.
 3. Give that name a row in the command's table PRESETS: for each --size the values of the flags
    that the user leaves out (points, epochs, batch_size, lr). Then `train` trains it under every
    flag of `TransferConfig`.

Shapes: B clouds of a batch, N points of each (--points), L labels.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import act
from util import pictures, run

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

    def __post_init__(self):
        if not self.out:
            self.out = f"runs/{self.task}"


# -- task ------------------------------------------------------------------------------------------
class Task:
    """A downstream task, as `train` sees it. Only the first of several processes calls `evaluate`
    and `finish`."""

    names: list  # of the training clouds, one for each index that `sample` is given
    loss_weight = None  # of each label in the cross-entropy, a tensor (L,) on the device
    metric = ""  # of `evaluate`, highest at the best epoch; "": evaluate after the last only

    def build_model(self) -> nn.Module:
        """A new network with a `config` (a subclass of act.EncoderConfig), an `encoder`
        (act.Encoder) and, for the protocols mlp3 and linear, `freeze_encoder()`. It maps xyz, and
        the category if `sample` returns one, to logits (B, L) or (B, N, L)."""
        raise NotImplementedError

    def sample(self, indices: torch.Tensor, step: int, generator: torch.Generator) -> tuple:
        """The training clouds of a step, on the device: xyz (B, N, 3); target, their int64 labels
        (B,) or (B, N); category, int64 (B,), or None for a network that takes none.

        indices: (B,) int64 on the CPU, the batch of all processes. Randomness comes from generator,
        seeded for this step, or from `step`, so that a resumed run repeats it."""
        raise NotImplementedError

    def augment(self, xyz: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The clouds (B, N, 3) of a step, augmented as --augment says."""
        return xyz

    def evaluate(self, model: nn.Module) -> dict:
        """Puts the model in eval mode. Returns metrics of the test clouds, name -> number."""
        raise NotImplementedError

    def finish(self, model: nn.Module, folder: Path) -> dict:
        """Prints tables and writes pictures of the last `evaluate`. Returns further metrics."""
        return {}


# -- model -----------------------------------------------------------------------------------------
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
    `size` is what the user typed: UserError if it contradicts the checkpoint."""
    own = act.EncoderConfig(points=1024, **run.ENCODER_SIZES[config.size])
    c = own if source is None else source.config
    if size != "auto" and (c.width, c.depth) != (own.width, own.depth):
        expected = f"width {c.width} and depth {c.depth} of {config.checkpoint}"
        raise act.UserError(f"--size {size}: expected {expected}, got {own.width} and {own.depth}")
    sizes = {field.name: getattr(c, field.name) for field in fields(act.EncoderConfig)}
    del sizes["normalized"]
    sizes["points"] = config.points
    sizes["num_group"] = max(1, config.points * c.num_group // c.points)  # as large patches
    return sizes


def start_model(
    config: TransferConfig, model: nn.Module, source: nn.Module | None, device: torch.device
) -> nn.Module:
    """The model on the device, with the encoder of `source`, frozen if --protocol says so."""
    if config.protocol != "full":
        model.freeze_encoder()
    if source is not None:
        keys = model.encoder.load_state_dict(source.encoder.state_dict(), strict=False)
        new = ", ".join(keys.missing_keys + _modules_beside_encoder(model))
        unused = ", ".join(keys.unexpected_keys + _modules_beside_encoder(source))
        report = f"newly initialised: {new}; not used: {unused}"
        print(f"loaded the encoder in {config.checkpoint}; {report}")
    c = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    sizes = f"width {c.width}, depth {c.depth}, {count / 1e6:.1f} M parameters"
    patches = f"{c.num_group} patches of {c.group_size} of {c.points} points"
    print(f"{type(model).__name__}: {sizes}, {patches}")
    return model.to(device)


def _modules_beside_encoder(model):
    return [name for name, _ in model.named_children() if name != "encoder"]


# -- training --------------------------------------------------------------------------------------
def train(
    config: TransferConfig, task: Task, source: nn.Module | None, device: torch.device
) -> run.Log:
    """Trains a network for a task and evaluates it. Returns the run's log with its closing row."""
    count = len(task.names)
    config = run.plan(config, count)
    least = 2 * run.WORLD  # for BatchNorm
    if config.batch_size < least:
        raise act.UserError(f"--batch-size: expected {least} or more, got {config.batch_size}")

    # -- model
    torch.manual_seed(config.seed)  # the same head for any encoder
    model = start_model(config, task.build_model(), source, device)

    # -- optimizer
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
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10)  # as published
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
        closing = task.finish(model, log.folder) | _best_epoch(log.rows, task.metric)
        pictures.write_chart(log.folder / "loss.svg", log.rows)
        close(log, config, metrics | closing)
    return log


def _best_epoch(rows, metric):
    """The highest value of a metric among the rows that have it, and its epoch."""
    rows = [row for row in rows if metric in row]
    if not rows:
        return {}
    best = max(rows, key=lambda row: row[metric])
    return {f"best_{metric}": best[metric], "best_epoch": best["epoch"]}


def close(log: run.Log, config: TransferConfig, metrics: dict) -> None:
    """Writes the last row of a run and prints the line of its results."""
    log.close(task=config.task, checkpoint=config.checkpoint, seed=config.seed, **metrics)
    shown = []
    for name, value in metrics.items():
        if isinstance(value, float):
            shown.append(f"{name} {value:.2f}")
    settings = f"{config.task}, {config.protocol}, {config.data}, augmentation {config.augment}"
    print(f"{settings}: {', '.join(shown)}")
