"""Speed of act beside the textbook forms, peers and the machine's own limit, in one run.

    python bench.py                          # two CPU cores: minutes
    python bench.py --quick                  # fewer repeats: under two minutes
    python bench.py --device cuda --compile  # a GPU: the same rows, and the published runs in hours

Times are medians of repeats taken in turns, so that a noisy neighbour disturbs all forms alike; a
ratio is the median of the turns' ratios. The plain forms are test_act.py's oracles: channels first,
every edge and copy explicit, prompts as tokens, one-hot codes, all distances at once. Both have the
same weights at the paper's sizes, without dropout. Exits 1 where their results differ.
"""

import argparse
import copy
import ctypes
import importlib
import math
import os
import platform
import re
import sys
import timeit
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import act
import training

threads = torch.get_num_threads()
from test_act import plain_chamfer, plain_fps, plain_form, plain_knn  # noqa: E402
torch.set_num_threads(threads)  # the tests run on one

notes, differences = [], []

# ---- Measuring -----------------------------------------------------------------------------------

def race(device, repeats, forms):
    """Seconds of each form, taken in turns after one run to warm up: {name: [seconds]}."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    times = {name: [] for name in forms}
    for _ in range(repeats + 1):
        for name, form in forms.items():
            wait()
            start = timeit.default_timer()
            form()
            wait()
            times[name].append(timeit.default_timer() - start)
    return {name: values[1:] for name, values in times.items()}

def ratio(slow, fast):
    return median(a / b for a, b in zip(slow, fast))

def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)

def compare(what, device, repeats, forms, goals):
    """A row for each other form, beside ours."""
    times = race(device, repeats, forms)
    ms = {name: f"{name} {1e3 * median(values):.4g} ms" for name, values in times.items()}
    for other in list(forms)[1:]:
        factor = f"{ratio(times[other], times['ours']):.2f} x"
        row(what, ms["ours"], ms[other], factor, goals.get(other, ""))

def peak_memory(device, form):
    """What `form` takes beyond what is held before it, in MiB; nan where the system cannot say."""
    def high_water():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status")
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**10
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # gives back what is free
        Path("/proc/self/clear_refs").write_text("5")  # lowers the mark to what is held
    else:
        return math.nan
    before = high_water()
    form()
    return high_water() - before

def best_product(device, dtype):
    """(FLOP, form) of a matrix product at the machine's full rate."""
    n = 8192 if device.type == "cuda" else 2048
    x, w = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3, partial(torch.nn.functional.linear, x, w)

def random_clouds(B, N, device):
    xyz = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(N + B))
    return (xyz / xyz.norm(dim=-1).amax(dim=1)[:, None, None]).to(device)

# ---- Geometry ------------------------------------------------------------------------------------

def bench_geometry(device, repeats):
    peers = {}
    for name in ("torch_cluster", "fpsample"):
        try:
            peers[name] = importlib.import_module(name)
        except Exception as error:  # a library can be there and broken
            notes.append(f"no comparison with {name} ({error})")
    cluster, fpsample = peers.get("torch_cluster"), peers.get("fpsample")
    for B, N, G in [(32, 1024, 64), (32, 2048, 128), (16, 8192, 512)]:
        xyz = random_clouds(B, N, device)
        fps = {"ours": partial(act.farthest_point_sample, xyz, G),
               "textbook": partial(plain_fps, xyz, G)}
        query = act.gather_points(xyz, fps["ours"]())
        knn = {"ours": partial(act.knn, query, xyz, 32), "plain": partial(plain_knn, query, xyz, 32)}
        if not torch.equal(fps["ours"](), fps["textbook"]()):
            differences.append(f"FPS ({B}, {N} -> {G})")
        if not torch.equal(knn["ours"]()[0], knn["plain"]()[0]):
            differences.append(f"kNN ({B}, {G} of {N})")
        if cluster:
            batch, rows = (torch.arange(B, device=device).repeat_interleave(n) for n in (N, G))
            x, y = xyz.flatten(0, 1), query.flatten(0, 1)
            fps["torch_cluster"] = partial(cluster.fps, x, batch, G / N, random_start=False)
            knn["torch_cluster"] = partial(cluster.knn, x, y, 32, batch, rows)
        if fpsample and device.type == "cpu":
            fps["fpsample"] = lambda: [fpsample.fps_sampling(a, G, start_idx=0) for a in xyz.numpy()]
        compare(f"FPS ({B}, {N} -> {G})", device, repeats, fps, {"textbook": ">= 3 x"})
        compare(f"kNN ({B}, {G} of {N}), k = 32", device, repeats, knn,
                {"torch_cluster": ">= 1 x" if N < 8192 else ""})

def bench_chamfer(device, repeats):
    a, b = (random_clouds(8, N, device).requires_grad_() for N in (2048, 2047))

    def gradients(distance):
        loss = distance(a, b)
        return loss, *torch.autograd.grad(loss, (a, b))
    distances = {"ours": act.chamfer_distance, "plain": plain_chamfer}
    forms = {name: partial(gradients, distance) for name, distance in distances.items()}
    ours, plain = (f"{peak_memory(device, form):.0f} MiB" for form in forms.values())
    row("Chamfer's extra memory", ours, f"plain {plain}", "", "bounded")
    for ours, plain in zip(forms["ours"](), forms["plain"]()):
        if not torch.allclose(ours, plain, rtol=1e-4, atol=1e-9):
            differences.append("Chamfer or its gradient")
    compare("Chamfer (8, 2048, 2047) and gradients", device, repeats, forms, {})

# ---- Stages --------------------------------------------------------------------------------------

def stage_one(B, device):
    """-> our model, the loss of one batch as a function of the model."""
    model = act.Teacher(act.TeacherConfig(prompt_dropout=0.0)).to(device).train()
    xyz = random_clouds(B, 1024, device)
    return model, lambda model: act.teacher_loss(model(xyz), 0.1)[0]

def stage_two(B, device):
    teacher = act.Teacher().to(device).eval().requires_grad_(False)
    model = act.Student(act.StudentConfig(drop_path=0.0)).to(device).train()
    xyz, prompts = random_clouds(B, 1024, device), teacher.prompt_keys_values()
    mask = act.random_mask(torch.empty(B, 64, 3), 0.8, torch.Generator().manual_seed(0))

    def loss(model):
        neighborhood, center = act.group_points(xyz, 64, 32)
        with torch.no_grad():
            target = teacher.features(neighborhood, center, prompts)
            target = act.gather_points(target, act.split_mask(mask, device)[1])
        return act.distillation_loss(model(neighborhood, center, mask), target)
    return model, loss

def check_stage(name, model, loss):
    """Compares both forms with the same weights and noise -> FLOP of our step."""
    values, flops, gradients = [], [], []
    for form in (nullcontext, plain_form):
        torch.manual_seed(1)  # the Gumbel noise
        model.zero_grad()
        with form(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            value = loss(model)
            value.backward()
        values.append(value.item())
        flops.append(counter.get_total_flops())
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts).double())
    error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    note = f"{name}: loss {values[0]:.6f}, plain {values[1]:.6f}; gradients differ by {error:.1e}"
    notes.append(note)  # gradients jump where a nearest neighbour or a maximum changes hands
    if abs(values[0] - values[1]) > 1e-5 * abs(values[1]) or error > 2e-2:
        differences.append(note)
    return flops[0]

def train_step(model, loss, optimizer, device, bf16=False, form=nullcontext):
    with form(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        value = loss(model)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()

def bench_stage(name, build, goal, device, repeats, products):
    """Steps of 8 clouds, plainly and ours in each precision, in turns with matrix products."""
    torch.manual_seed(0)
    model, loss = build(8, device)
    flop = check_stage(name, model, loss)
    plain, optimizer = copy.deepcopy(model), training.adamw(model, 5e-4, 0.05)
    other = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=5e-4)
    forms = {"plain": partial(train_step, plain, loss, other, device, form=plain_form)}
    for precision, (_, product) in products.items():
        forms[precision] = partial(train_step, model, loss, optimizer, device, precision == "bf16")
        forms[f"product {precision}"] = product
    times = race(device, repeats, forms)
    for precision, (work, _) in products.items():
        step, product = times[precision], times[f"product {precision}"]
        share = f"{100 * flop / work * ratio(product, step):.0f} % of the best product"
        ours = f"{1e3 * median(step):.0f} ms, {8 / median(step):.1f} clouds/s, {share}"
        row(f"{name} step, batch 8, {precision}", ours, f"plain {1e3 * median(times['plain']):.0f} ms",
            f"{ratio(times['plain'], step):.2f} x", goal if precision == "fp32" else "")
    ours, plain = (f"{peak_memory(device, forms[form]):.0f} MiB" for form in ("fp32", "plain"))
    row(f"{name}'s extra memory, fp32", ours, f"plain {plain}", "", "")

def bench_published(device, repeats, compiled):
    """The published runs on a GPU in bf16."""
    runs = [("stage I", stage_one, 64, 196_500), ("stage II", stage_two, 128, 123_000)]
    for name, build, B, steps in runs:
        model, loss = build(B, device)
        for module in model.modules():
            if compiled and isinstance(module, act.Block):
                module.compile()
        xyz = random_clouds(B, 1024, device)
        center = act.gather_points(xyz, act.farthest_point_sample(xyz, 64))
        optimizer = training.adamw(model, 5e-4, 0.05)
        forms = {"step": partial(train_step, model, loss, optimizer, device, True),
                 "FPS": partial(act.farthest_point_sample, xyz, 64),
                 "kNN": partial(act.knn, center, xyz, 32)}
        race(device, 3, forms)  # compiles
        memory, times = peak_memory(device, forms["step"]), race(device, 5 * repeats, forms)
        step = median(times["step"])
        shares = [f"{n} {100 * ratio(times[n], times['step']):.1f} %" for n in ("FPS", "kNN")]
        row(f"{name}, {steps:,} steps of {B}, bf16{', compiled' if compiled else ''}",
            f"{1e3 * step:.1f} ms a step, {B / step:.0f} clouds/s", f"{memory:.0f} MiB",
            ", ".join(shares), f"{steps * step / 3600:.2f} h")

def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the published runs")
    args = parser.parse_args()
    device, cpuinfo = torch.device(args.device), Path("/proc/cpuinfo")
    torch.backends.cudnn.allow_tf32 = False  # the plain form's convolutions in fp32
    repeats, steps = (2, 1) if args.quick else (9, 7)
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    bf16, name = re.search("avx512_bf16|amx_bf16", text), re.search(r"model name\s*: (.*)", text)
    machine = name[1] if name else platform.machine()
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported()
        machine += f", {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    print(f"{machine}, {os.cpu_count()} cores, {threads} threads; torch {torch.__version__}\n")
    row("what", "ours", "beside it", "ratio", "goal")
    row(*["---"] * 5)
    bench_chamfer(device, repeats)
    bench_geometry(device, repeats)
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if bf16 else {})
    products = {name: best_product(device, dtype) for name, dtype in dtypes.items()}
    bench_stage("stage I", stage_one, ">= 1.5 x", device, steps, products)
    bench_stage("stage II", stage_two, ">= 1.4 x", device, steps, products)
    if device.type == "cuda":
        bench_published(device, repeats, args.compile)
    print("\n" + "\n".join(f"- {note}" for note in notes))
    if differences:
        sys.exit("results differ:\n" + "\n".join(differences))

if __name__ == "__main__":
    main()
