"""Several processes, as torchrun starts them, train one model; on one process nothing here acts.
Each takes its share of what there is to do, the items number RANK, RANK + WORLD, ... of it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

import act

VARIABLES = "RANK WORLD_SIZE LOCAL_RANK MASTER_PORT MASTER_ADDR".split()  # of torchrun


def read_variables(environment: dict) -> tuple[int, int]:
    """(number of this process, number of all) by torchrun's variables, or (0, 1) without RANK and
    WORLD_SIZE. Raises UserError unless they are all there and make sense; empty: not there."""
    texts = [environment.get(name, "") for name in VARIABLES]
    rank, world = texts[:2]
    if not rank and not world:
        return 0, 1
    numbers = [text.isdecimal() for text in texts[:4]]
    if not all(texts + numbers) or int(rank) >= int(world):
        found = " ".join(map("=".join, zip(VARIABLES, texts, strict=True)))
        raise act.UserError(f"RANK, WORLD_SIZE: expected all that torchrun sets, got {found}")
    return int(rank), int(world)


try:
    RANK, WORLD = read_variables(os.environ)
except act.UserError:  # which `join` raises again, where a command can show it
    RANK, WORLD = 0, 1
SHARE = (RANK, WORLD)
LOCAL_RANK = 0 if WORLD == 1 else int(os.environ["LOCAL_RANK"])  # the number on this machine


def join(device: torch.device) -> None:
    """Joins torchrun's processes, once; each waits for others for two hours at most."""
    read_variables(os.environ)
    if WORLD > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, summed in place over all processes."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def average(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of the processes' tensors, whose gradient flows to all of them."""
    if WORLD == 1:
        return tensor
    total = sum_over_processes(tensor.detach().clone()) + (tensor - tensor.detach())
    if total.requires_grad:
        total.register_hook(lambda gradient: sum_over_processes(gradient.clone()))
    return total / WORLD


def collect(value) -> list:
    """The processes' values, by their numbers; a tensor among them is best on the CPU."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def agree(value, what: str) -> None:
    """UserError, on every process, unless all of them have the same value."""
    values = collect(value)
    if values != [value] * WORLD:
        raise act.UserError(f"{what}: expected one value on all processes, got {values}")


@contextlib.contextmanager
def first_process() -> Iterator[None]:
    """Process 0 runs the block alone; the others run it after that."""
    if RANK > 0:
        collect(None)  # waits for process 0
    try:
        yield
    finally:
        if RANK == 0:
            collect(None)


def share(items: Sequence) -> Sequence:
    """This process's share of a list, tensor or range."""
    return items[RANK::WORLD]


def gather(values: list) -> list:
    """What the processes have of share(items), a value an item, in the order of the items."""
    lists = collect(values)
    return [lists[i % WORLD][i // WORLD] for i in range(sum(map(len, lists)))]


def parallel(model, config):
    """The model as a loop calls it: blocks compiled if asked, gradients averaged over processes."""
    if config.compile:
        print("compiling the Transformer blocks in the first step ...", flush=True)
        for module in model.modules():
            if isinstance(module, act.Block):
                module.compile()  # block by block: seconds, where the whole would take minutes
    if WORLD == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(share_norms(model))


def share_norms(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with a SharedNorm of the same tensors in place of each BatchNorm1d."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.BatchNorm1d):
            shared = SharedNorm(module.num_features, module.eps, module.momentum)
            for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(shared, tensor, getattr(module, tensor))
            model.set_submodule(name, shared)
    return model


class SharedNorm(torch.nn.BatchNorm1d):
    """A BatchNorm1d of rows (R, C) with the statistics of all processes, which have as many rows.
    torch's SyncBatchNorm is for GPUs alone and makes them wait to count the rows."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        rows = x.float()
        mean = average(rows.mean(dim=0))
        centred = rows - mean  # patches have variances of 1e-5, which mean squares would round off
        variance = average(centred.square().mean(dim=0))
        with torch.no_grad():
            count = WORLD * len(rows)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias, centred, scale).to(x.dtype)
