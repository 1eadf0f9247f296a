"""Speed of act beside the textbook forms, torch_cluster and the machine's own limit, in one run.

    python bench.py                          # two CPU cores: minutes
    python bench.py --quick                  # fewer repeats: under two minutes
    python bench.py --device cuda --compile  # a GPU: the same rows, and the published runs in hours

Times are medians of repeats taken in turns, so that a noisy neighbour disturbs all forms alike; a
ratio is the median of the turns' ratios. The plain forms are test_act.py's oracles, with the same
weights at the paper's sizes, without dropout. Exits 1 where the results differ."""

import argparse
import copy
import ctypes
import os
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
import training

threads = torch.get_num_threads()
from test_act import listed, plain_chamfer, plain_fps, plain_form, plain_knn  # noqa: E402
torch.set_num_threads(threads)  # the tests run on one

notes, differences = [], []

# ---- Measuring -----------------------------------------------------------------------------------
def race(device, repeats, forms):
    """Seconds of each form, taken in turns after one run to warm up: {name: [seconds]}."""
    wait, times = getattr(torch, device.type).synchronize, {name: [] for name in forms}
    for _ in range(repeats + 1):
        for name, form in forms.items():
            times[name].append(timeit(lambda: (form(), wait()), number=1))
    return {name: values[1:] for name, values in times.items()}

def ratio(slow, fast):
    return median(a / b for a, b in zip(slow, fast))

def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)

def compare(what, device, repeats, forms, **goals):
    """A row for each other form, beside ours; the second is to give the same."""
    ours, plain = ([t.double() for t in listed(form())] for form in list(forms.values())[:2])
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-9) for a, b in zip(ours, plain)):
        differences.append(what)
    times = race(device, repeats, forms)
    ms = {name: f"{name} {1e3 * median(values):.4g} ms" for name, values in times.items()}
    for other in list(forms)[1:]:
        factor = f"{ratio(times[other], times['ours']):.2f} x"
        row(what, ms["ours"], ms[other], factor, goals.get(other, ""))

def peak_memory(device, form):
    """What `form` takes beyond what is held before it; on a GPU or Linux."""
    def peak():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() >> 20
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) >> 10
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free
        Path("/proc/self/clear_refs").write_text("5")  # lowers the mark to what is held
    else:
        return "unknown"
    before, _, after = peak(), form(), peak()
    return f"{after - before} MiB"

def random_clouds(B, N, device):
    xyz = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(N + B))
    return (xyz / xyz.norm(dim=-1).amax(dim=1)[:, None, None]).to(device)

# ---- Geometry ------------------------------------------------------------------------------------
def bench_geometry(device, repeats):
    a, b = (random_clouds(8, N, device).requires_grad_() for N in (2048, 2047))
    forms = {"ours": partial(act.chamfer_distance, a, b), "plain": partial(plain_chamfer, a, b)}
    row("Chamfer's extra memory", *(peak_memory(device, f) for f in forms.values()), "", "bounded")
    compare("Chamfer (8, 2048, 2047)", device, repeats, forms)
    try:
        import torch_cluster as peer
    except Exception as error:  # it can be there and broken
        peer = notes.append(f"no comparison with torch_cluster ({error})")
    for B, N, G in [(32, 1024, 64), (32, 2048, 128), (16, 8192, 512)]:
        xyz, k = random_clouds(B, N, device), 32
        query = act.gather_points(xyz, act.farthest_point_sample(xyz, G))
        fps = {"ours": partial(act.farthest_point_sample, xyz, G),
               "textbook": partial(plain_fps, xyz, G)}
        knn = {"ours": partial(act.knn, query, xyz, k), "plain": partial(plain_knn, query, xyz, k)}
        if peer:
            batch, rows = (torch.arange(B, device=device).repeat_interleave(n) for n in (N, G))
            x, y = xyz.flatten(0, 1), query.flatten(0, 1)
            fps["torch_cluster"] = partial(peer.fps, x, batch, G / N, random_start=False)
            knn["torch_cluster"] = partial(peer.knn, x, y, k, batch, rows)
        compare(f"FPS ({B}, {N} -> {G})", device, repeats, fps, textbook=">= 3 x")
        compare(f"kNN ({B}, {G} of {N}), k = {k}", device, repeats, knn,
                torch_cluster=">= 1 x" if N < 8192 else "")

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
        patches = act.group_points(xyz, 64, 32)
        with torch.no_grad():
            target = teacher.features(*patches, prompts)
            target = act.gather_points(target, act.split_mask(mask, device)[1])
        return act.distillation_loss(model(*patches, mask), target)
    return model, loss

def gradients(model, loss, form):
    """-> the loss, the whole gradient, the FLOP of both, with fixed Gumbel noise."""
    torch.manual_seed(1)
    model.zero_grad()
    with form(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        value = loss(model)
        value.backward()
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.item(), torch.cat(parts), counter.get_total_flops()

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
    (ours, gradient, flop), (plain, expected, _) = (
        gradients(model, loss, form) for form in (nullcontext, plain_form))
    error = ((gradient - expected).norm() / expected.norm()).item()
    notes.append(f"{name}: loss {ours:.6f}, plain {plain:.6f}; gradients differ by {error:.1e}")
    if abs(ours - plain) > 1e-5 * abs(plain) or error > 2e-2:  # they jump where a maximum does
        differences.append(notes[-1])
    twin, optimizer = copy.deepcopy(model), training.adamw(model, 5e-4, 0.05)
    other = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=5e-4)
    forms = {"plain": partial(train_step, twin, loss, other, device, form=plain_form)}
    for precision, (_, product) in products.items():
        forms[precision] = partial(train_step, model, loss, optimizer, device, precision == "bf16")
        forms[f"product {precision}"] = product
    times = race(device, repeats, forms)
    for precision, (work, _) in products.items():
        step, product = times[precision], times[f"product {precision}"]
        share = f"{100 * flop / work * ratio(product, step):.0f} % of the best product"
        ours = f"{1e3 * median(step):.0f} ms, {8 / median(step):.1f} clouds/s, {share}"
        plain = f"plain fp32 {1e3 * median(times['plain']):.0f} ms"
        row(f"{name} step, batch 8, {precision}", ours, plain,
            f"{ratio(times['plain'], step):.2f} x", goal if precision == "fp32" else "")
    memory = [peak_memory(device, forms[form]) for form in ("fp32", "plain")]
    row(f"{name}'s extra memory, fp32", *memory, "", "")

def bench_published(device, repeats, compiled):
    """The published runs on a GPU in bf16."""
    runs = [("stage I", stage_one, 64, 196_500), ("stage II", stage_two, 128, 123_000)]
    for name, build, B, steps in runs:
        model, loss = build(B, device)
        training.parallel(model, training.RunConfig(compile=compiled))
        xyz, optimizer = random_clouds(B, 1024, device), training.adamw(model, 5e-4, 0.05)
        forms = {"step": partial(train_step, model, loss, optimizer, device, True),
                 "FPS": partial(act.farthest_point_sample, xyz, 64),
                 "kNN": partial(act.knn, xyz[:, :64], xyz, 32)}
        times = race(device, 5 * repeats, forms)  # its first run compiles
        memory, step = peak_memory(device, forms["step"]), median(times["step"])
        shares = [f"{n} {100 * ratio(times[n], times['step']):.1f} %" for n in ("FPS", "kNN")]
        row(f"{name}, {steps:,} steps of {B}, bf16{', compiled' if compiled else ''}",
            f"{1e3 * step:.1f} ms a step, {B / step:.0f} clouds/s", memory,
            ", ".join(shares), f"{steps * step / 3600:.2f} h")

def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the published runs")
    args = parser.parse_args()
    device, cpuinfo = torch.device(args.device), Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    machine = re.search(r"model name\s*: (.*)|$", text)[1] or "CPU"
    bf16 = re.search("avx512_bf16|amx_bf16", text)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # the plain form's convolutions in fp32
        bf16, machine = True, f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    repeats, steps = (2, 1) if args.quick else (9, 7)
    print(f"{machine}, {os.cpu_count()} cores, {threads} threads; torch {torch.__version__}\n")
    print("| what | ours | beside it | ratio | goal |\n" + 5 * "| --- " + "|")
    bench_geometry(device, repeats)
    products, n = {}, 8192 if device.type == "cuda" else 2048  # these run at the machine's rate
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if bf16 else {})
    for name, dtype in dtypes.items():
        x, w = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        products[name] = 2 * n**3, partial(torch.nn.functional.linear, x, w)  # FLOP, form
    bench_stage("stage I", stage_one, ">= 1.5 x", device, steps, products)
    bench_stage("stage II", stage_two, ">= 1.4 x", device, steps, products)
    if device.type == "cuda":
        bench_published(device, repeats, args.compile)
    print("\n" + "\n".join(f"- {note}" for note in notes))
    if differences:
        sys.exit("results differ:\n" + "\n".join(differences))

if __name__ == "__main__":
    main()
