"""Speed of act beside the textbook forms, torch_cluster and the machine's own limit, in one run.

    python bench.py                          # two CPU cores: minutes
    python bench.py --quick                  # fewer repeats: under two minutes
    python bench.py --device cuda --compile  # a GPU: the same rows, and the published runs in hours

Times are medians of repeats taken in turns. The plain forms are those of util/plain.py, with the
same weights at the paper's sizes, without dropout. Where results differ, it ends with an error.
"""

import argparse
import copy
import ctypes
import os
import platform
import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from timeit import timeit

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import act
from util import plain, run


# -- measuring ------------------------------------------------------------------------------------
def race(device, repeats, forms):
    """Seconds of each form, taken in turns after one run to warm up: {name: [seconds]}."""
    synchronize = getattr(torch, device.type).synchronize
    times = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            seconds = timeit(lambda form=form: (form(), synchronize()), number=1)
            if turn > 0:
                times[name].append(seconds)
    return times


def ratio(slow, fast):
    """The median of the turns' ratios."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def compare(device, repeats, what, forms):
    """A row for each form beside "ours", the first; "plain", the second, is to give the same."""
    torch.testing.assert_close(forms["ours"](), forms["plain"](), rtol=1e-4, atol=1e-9)
    times = race(device, repeats, forms)
    ours = times.pop("ours")
    for name, seconds in times.items():
        beside = f"{name} {1e3 * median(seconds):.4g} ms"
        print_row(what, f"{1e3 * median(ours):.4g} ms", beside, f"{ratio(seconds, ours):.2f} x")


def peak_memory(device, form):
    """What `form` takes beyond what is held before it, in words; on a GPU or Linux."""
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


def high_water_mark():
    """The most memory this process has held since the mark was lowered, in KiB."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def random_clouds(B, N, device):
    xyz = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(N + B))
    radius = xyz.norm(dim=-1).amax(dim=1)
    return (xyz / radius[:, None, None]).to(device)


# -- geometry -------------------------------------------------------------------------------------
def bench_chamfer(device, repeats):
    a = random_clouds(8, 2048, device).requires_grad_()
    b = random_clouds(8, 2047, device).requires_grad_()
    forms = {"ours": partial(act.chamfer_distance, a, b)}
    forms["plain"] = partial(plain.chamfer_distance, a, b)
    memory = [peak_memory(device, form) for form in forms.values()]
    print_row("Chamfer's extra memory", *memory, "")
    compare(device, repeats, "Chamfer (8, 2048, 2047)", forms)


def bench_search(device, repeats, peer, B, N, G):
    k = 32
    xyz = random_clouds(B, N, device)
    query = act.gather_points(xyz, act.farthest_point_sample(xyz, G))
    fps = {"ours": partial(act.farthest_point_sample, xyz, G)}
    fps["plain"] = partial(plain.farthest_point_sample, xyz, G)
    knn = {"ours": partial(act.knn, query, xyz, k), "plain": partial(plain.knn, query, xyz, k)}
    if peer:
        cloud = torch.arange(B, device=device)
        of_points = cloud.repeat_interleave(N)
        of_queries = cloud.repeat_interleave(G)
        x = xyz.flatten(0, 1)
        fps["torch_cluster"] = partial(peer.fps, x, of_points, G / N, random_start=False)
        knn["torch_cluster"] = partial(peer.knn, x, query.flatten(0, 1), k, of_points, of_queries)
    compare(device, repeats, f"FPS ({B}, {N} -> {G})", fps)
    compare(device, repeats, f"kNN ({B}, {G} of {N}), k = {k}", knn)


# -- stages ---------------------------------------------------------------------------------------
def stage_one(B, device):
    """Our model, and the loss of one batch as a function of the model."""
    model = act.Teacher(act.TeacherConfig(prompt_dropout=0.0)).to(device).train()
    xyz = random_clouds(B, 1024, device)
    return model, lambda model: act.teacher_loss(model(xyz), 0.1)[0]


def stage_two(B, device):
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


def train_step(model, loss, optimizer, device, bf16=False, form=nullcontext):
    with form(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        value = loss(model)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def check_gradients(name, model, loss):
    """Compares loss and gradient with the plain form's -> the FLOP of a step."""
    results = []
    for form in (plain.plain_form, nullcontext):
        torch.manual_seed(1)  # of the Gumbel noise
        model.zero_grad()
        with form(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            value = loss(model)
            value.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((value.item(), torch.cat(grads)))
    beside, expected = results[0]
    ours, gradient = results[1]
    error = ((gradient - expected).norm() / expected.norm()).item()
    print_row(f"{name}, loss", f"{ours:.6f}", f"plain {beside:.6f}", f"gradients ± {error:.1e}")
    # Gradients jump where a maximum changes hands, so they agree less well than losses.
    if abs(ours - beside) > 1e-5 * abs(beside) or error > 2e-2:
        sys.exit(f"{name}: results differ")
    return counter.get_total_flops()


def bench_stage(device, repeats, name, build):
    """Steps of 8 clouds, plainly and ours in each precision, in turns with matrix products, which
    run at the machine's own rate."""
    torch.manual_seed(0)
    model, loss = build(8, device)
    flop = check_gradients(name, model, loss)
    optimizer = run.adamw(model, 5e-4, 0.05)
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=5e-4)
    forms = {"plain": partial(train_step, twin, loss, other, device, form=plain.plain_form)}
    dtypes = {"fp32": torch.float32}
    if run.pick_precision(device) == "bf16":
        dtypes["bf16"] = torch.bfloat16
    n = 8192 if device.type == "cuda" else 2048
    for precision, dtype in dtypes.items():
        x = torch.randn(n, n, device=device, dtype=dtype)
        forms[f"product {precision}"] = partial(torch.nn.functional.linear, x, torch.randn_like(x))
        forms[precision] = partial(train_step, model, loss, optimizer, device, precision == "bf16")
    times = race(device, repeats, forms)
    beside = f"plain fp32 {1e3 * median(times['plain']):.0f} ms"
    for precision in dtypes:
        step = times[precision]
        share = 100 * flop / (2 * n**3) * ratio(times[f"product {precision}"], step)
        ours = f"{1e3 * median(step):.0f} ms, {8 / median(step):.1f} clouds/s"
        ours += f", {share:.0f} % of the best product"
        factor = f"{ratio(times['plain'], step):.2f} x"
        print_row(f"{name} step, batch 8, {precision}", ours, beside, factor)


def bench_published(device, repeats, name, build, B, steps, compiled):
    """A row on a published run of `steps` steps of B clouds, on a GPU in bf16."""
    model, loss = build(B, device)
    run.parallel(model, run.RunConfig(compile=compiled))
    step = partial(train_step, model, loss, run.adamw(model, 5e-4, 0.05), device, True)
    seconds = median(race(device, 5 * repeats, {"step": step})["step"])  # the first run compiles
    pace = f"{1e3 * seconds:.1f} ms a step, {B / seconds:.0f} clouds/s"
    hours = f"{steps * seconds / 3600:.2f} h"
    print_row(f"{name}, {steps:,} steps of {B}, bf16", pace, peak_memory(device, step), hours)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the published runs")
    args = parser.parse_args()
    device = torch.device(args.device)
    repeats, steps = (2, 1) if args.quick else (9, 7)
    torch.backends.cudnn.allow_tf32 = False  # the plain form's convolutions in fp32, too
    machine = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    elif cpuinfo.exists():
        machine = cpuinfo.read_text().partition("model name\t: ")[2].partition("\n")[0]
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{machine}, {threads}; torch {torch.__version__}; {' '.join(sys.argv)}\n")
    print_row("what", "ours", "beside it", "ratio")
    print_row("---", "---", "---", "---")
    bench_chamfer(device, repeats)
    peer = None
    try:
        import torch_cluster as peer
    except (ImportError, OSError) as error:  # it can be there and broken
        print_row("torch_cluster", "", str(error), "")
    for B, N, G in [(32, 1024, 64), (32, 2048, 128), (16, 8192, 512)]:
        bench_search(device, repeats, peer, B, N, G)
    bench_stage(device, steps, "stage I", stage_one)
    bench_stage(device, steps, "stage II", stage_two)
    if device.type == "cuda":
        bench_published(device, repeats, "stage I", stage_one, 64, 196_500, args.compile)
        bench_published(device, repeats, "stage II", stage_two, 128, 123_000, args.compile)


if __name__ == "__main__":
    main()
