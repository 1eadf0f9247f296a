"""Speed of act beside the textbook forms, torch_cluster and the machine's own limit, in one run.

    python bench.py                          # two CPU cores: minutes
    python bench.py --quick                  # fewer repeats: under two minutes
    python bench.py --device cuda --compile  # a GPU: the same rows, and the published runs in hours

Times are medians of repeats taken in turns. The plain forms are those of util/plain.py, with the
same weights at the paper's sizes, without dropout. Exits 1 where the results differ.
"""

import argparse
import copy
import ctypes
import importlib
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from timeit import timeit

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import act
from util import plain, run


@dataclass
class Bench:
    """Where to measure, how often, and what is to be told at the end."""

    device: torch.device
    repeats: int  # of a geometry function
    steps: int  # of a training step
    notes: list = field(default_factory=list)
    differences: list = field(default_factory=list)


# -- measuring ------------------------------------------------------------------------------------
def race(device: torch.device, repeats: int, forms: dict[str, Callable]) -> dict[str, list]:
    """Seconds of each form, taken in turns after one run to warm up: {name: [seconds]}."""
    synchronize = getattr(torch, device.type).synchronize
    times = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            seconds = timeit(lambda form=form: (form(), synchronize()), number=1)
            if turn > 0:
                times[name].append(seconds)
    return times


def ratio(slow: list, fast: list) -> float:
    """The median of the turns' ratios."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def compare(bench: Bench, what: str, forms: dict[str, Callable]) -> None:
    """A row for each form beside "ours", the first; "plain", the second, is to give the same."""
    try:
        torch.testing.assert_close(forms["ours"](), forms["plain"](), rtol=1e-4, atol=1e-9)
    except AssertionError:
        bench.differences.append(what)
    times = race(bench.device, bench.repeats, forms)
    ours = times.pop("ours")
    for name, seconds in times.items():
        beside = f"{name} {1e3 * median(seconds):.4g} ms"
        print_row(what, f"{1e3 * median(ours):.4g} ms", beside, f"{ratio(seconds, ours):.2f} x")


def peak_memory(device: torch.device, form: Callable) -> str:
    """What `form` takes beyond what is held before it; on a GPU or Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return f"{(torch.cuda.max_memory_allocated() - before) >> 20} MiB"
    if sys.platform != "linux":
        return "unknown"
    ctypes.CDLL(None).malloc_trim(0)  # gives back what is free
    Path("/proc/self/clear_refs").write_text("5")  # lowers the mark to what is held
    before = high_water_mark()
    form()
    return f"{(high_water_mark() - before) >> 10} MiB"


def high_water_mark() -> int:
    """The most memory this process has held since the mark was lowered, in KiB."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def random_clouds(B: int, N: int, device: torch.device) -> torch.Tensor:
    xyz = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(N + B))
    radius = xyz.norm(dim=-1).amax(dim=1)
    return (xyz / radius[:, None, None]).to(device)


# -- geometry -------------------------------------------------------------------------------------
def bench_chamfer(bench: Bench) -> None:
    a = random_clouds(8, 2048, bench.device).requires_grad_()
    b = random_clouds(8, 2047, bench.device).requires_grad_()
    forms = {"ours": partial(act.chamfer_distance, a, b)}
    forms["plain"] = partial(plain.chamfer_distance, a, b)
    memory = [peak_memory(bench.device, form) for form in forms.values()]
    print_row("Chamfer's extra memory", *memory, "")
    compare(bench, "Chamfer (8, 2048, 2047)", forms)


def bench_search(bench: Bench, peer, B: int, N: int, G: int) -> None:
    k = 32
    xyz = random_clouds(B, N, bench.device)
    query = act.gather_points(xyz, act.farthest_point_sample(xyz, G))
    fps = {"ours": partial(act.farthest_point_sample, xyz, G)}
    fps["plain"] = partial(plain.farthest_point_sample, xyz, G)
    knn = {"ours": partial(act.knn, query, xyz, k), "plain": partial(plain.knn, query, xyz, k)}
    if peer:
        cloud = torch.arange(B, device=bench.device)
        of_points = cloud.repeat_interleave(N)
        of_queries = cloud.repeat_interleave(G)
        x = xyz.flatten(0, 1)
        fps["torch_cluster"] = partial(peer.fps, x, of_points, G / N, random_start=False)
        knn["torch_cluster"] = partial(peer.knn, x, query.flatten(0, 1), k, of_points, of_queries)
    compare(bench, f"FPS ({B}, {N} -> {G})", fps)
    compare(bench, f"kNN ({B}, {G} of {N}), k = {k}", knn)


# -- stages ---------------------------------------------------------------------------------------
def stage_one(B: int, device: torch.device):
    """Our model, and the loss of one batch as a function of the model."""
    model = act.Teacher(act.TeacherConfig(prompt_dropout=0.0)).to(device).train()
    xyz = random_clouds(B, 1024, device)
    return model, lambda model: act.teacher_loss(model(xyz), 0.1)[0]


def stage_two(B: int, device: torch.device):
    teacher = act.Teacher().to(device).eval().requires_grad_(False)
    model = act.Student(act.StudentConfig(drop_path=0.0)).to(device).train()
    xyz = random_clouds(B, 1024, device)
    prompts = teacher.prompt_keys_values()
    mask = act.random_mask(torch.empty(B, 64, 3), 0.8, torch.Generator().manual_seed(0))

    def loss(model):
        neighborhood, center = act.group_points(xyz, 64, 32)
        split = act.split_mask(mask, device)
        with torch.no_grad():
            target = act.gather_points(teacher.features(neighborhood, center, prompts), split[1])
        return act.distillation_loss(model(neighborhood, center, mask, split), target)

    return model, loss


def gradients(model, loss, form):
    """The loss, the whole gradient, the FLOP of both, with fixed Gumbel noise."""
    torch.manual_seed(1)
    model.zero_grad()
    with form(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        value = loss(model)
        value.backward()
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.item(), torch.cat(parts), counter.get_total_flops()


def train_step(model, loss, optimizer, device, bf16=False, form=nullcontext) -> None:
    with form(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        value = loss(model)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def matrix_products(device: torch.device) -> tuple[int, dict[str, Callable]]:
    """The FLOP of a matrix product, which runs at the machine's own rate, and it by precision."""
    n = 8192 if device.type == "cuda" else 2048
    dtypes = {"fp32": torch.float32}
    if run.pick_precision(device) == "bf16":
        dtypes["bf16"] = torch.bfloat16
    products = {}
    for name, dtype in dtypes.items():
        x = torch.randn(n, n, device=device, dtype=dtype)
        w = torch.randn(n, n, device=device, dtype=dtype)
        products[name] = partial(torch.nn.functional.linear, x, w)
    return 2 * n**3, products


def check_gradients(bench: Bench, name: str, model, loss) -> int:
    """Compares loss and gradient with the plain form's -> the FLOP of a step."""
    ours, gradient, flop = gradients(model, loss, nullcontext)
    beside, expected, _ = gradients(model, loss, plain.plain_form)
    error = ((gradient - expected).norm() / expected.norm()).item()
    note = f"{name}: loss {ours:.6f}, plain {beside:.6f}; gradients differ by {error:.1e}"
    bench.notes.append(note)
    # Gradients jump where a maximum changes hands, so they agree less well than losses.
    if abs(ours - beside) > 1e-5 * abs(beside) or error > 2e-2:
        bench.differences.append(note)
    return flop


def bench_stage(bench: Bench, name: str, build: Callable) -> None:
    """Steps of 8 clouds, plainly and ours in each precision, in turns with matrix products."""
    device = bench.device
    torch.manual_seed(0)
    model, loss = build(8, device)
    flop = check_gradients(bench, name, model, loss)
    optimizer = run.adamw(model, 5e-4, 0.05)
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=5e-4)
    forms = {"plain": partial(train_step, twin, loss, other, device, form=plain.plain_form)}
    most, products = matrix_products(device)
    for precision, product in products.items():
        forms[precision] = partial(train_step, model, loss, optimizer, device, precision == "bf16")
        forms[f"product {precision}"] = product
    times = race(device, bench.steps, forms)
    beside = f"plain fp32 {1e3 * median(times['plain']):.0f} ms"
    for precision in products:
        step = times[precision]
        pace = ratio(times[f"product {precision}"], step)
        share = f"{100 * flop / most * pace:.0f} % of the best product"
        ours = f"{1e3 * median(step):.0f} ms, {8 / median(step):.1f} clouds/s, {share}"
        factor = f"{ratio(times['plain'], step):.2f} x"
        print_row(f"{name} step, batch 8, {precision}", ours, beside, factor)
    memory = [peak_memory(device, forms[form]) for form in ("fp32", "plain")]
    print_row(f"{name}'s extra memory, fp32", *memory, "")


def bench_published(bench: Bench, name: str, build: Callable, B: int, steps: int, compiled: bool):
    """A row on a published run of `steps` steps of B clouds, on a GPU in bf16."""
    device = bench.device
    model, loss = build(B, device)
    run.parallel(model, run.RunConfig(compile=compiled))
    optimizer = run.adamw(model, 5e-4, 0.05)
    xyz = random_clouds(B, 1024, device)
    forms = {"step": partial(train_step, model, loss, optimizer, device, True)}
    forms["FPS"] = partial(act.farthest_point_sample, xyz, 64)
    forms["kNN"] = partial(act.knn, xyz[:, :64], xyz, 32)
    times = race(device, 5 * bench.repeats, forms)  # the first run compiles
    step = median(times["step"])
    what = f"{name}, {steps:,} steps of {B}, " + ("bf16, compiled" if compiled else "bf16")
    pace = f"{1e3 * step:.1f} ms a step, {B / step:.0f} clouds/s"
    fps = 100 * ratio(times["FPS"], times["step"])
    shares = f"FPS {fps:.1f} %, kNN {100 * ratio(times['kNN'], times['step']):.1f} %"
    hours = f"{steps * step / 3600:.2f} h"
    print_row(what, pace, f"{peak_memory(device, forms['step'])}, {shares}", hours)


def describe_machine(device: torch.device) -> str:
    machine = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        machine = cpuinfo.read_text().partition("model name\t: ")[2].partition("\n")[0]
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    threads = torch.get_num_threads()
    return f"{machine}, {os.cpu_count()} cores, {threads} threads; torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the published runs")
    args = parser.parse_args()
    repeats, steps = (2, 1) if args.quick else (9, 7)
    bench = Bench(torch.device(args.device), repeats, steps)
    torch.backends.cudnn.allow_tf32 = False  # the plain form's convolutions in fp32, too
    print(describe_machine(bench.device) + "\n")
    print_row("what", "ours", "beside it", "ratio")
    print_row("---", "---", "---", "---")
    bench_chamfer(bench)
    try:
        peer = importlib.import_module("torch_cluster")
    except (ImportError, OSError) as error:  # it can be there and broken
        peer = None
        bench.notes.append(f"no comparison with torch_cluster ({error})")
    for B, N, G in [(32, 1024, 64), (32, 2048, 128), (16, 8192, 512)]:
        bench_search(bench, peer, B, N, G)
    bench_stage(bench, "stage I", stage_one)
    bench_stage(bench, "stage II", stage_two)
    if bench.device.type == "cuda":
        bench_published(bench, "stage I", stage_one, 64, 196_500, args.compile)
        bench_published(bench, "stage II", stage_two, 128, 123_000, args.compile)
    print("\n" + "\n".join(f"- {note}" for note in bench.notes))
    if bench.differences:
        sys.exit("results differ:\n" + "\n".join(bench.differences))


if __name__ == "__main__":
    main()
