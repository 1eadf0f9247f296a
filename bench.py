"""Speed of act beside the textbook forms and torch_cluster, and whether results are the same.

    python bench.py                          # two CPU cores: minutes
    python bench.py --device cuda            # a GPU: the published runs in hours, the commands
    python bench.py --quick --part search    # tiny sizes, for seconds; one part alone

Times are medians of repeats taken in turns. The plain forms are those of util/plain.py, with the
same weights at the paper's sizes, without dropout. A part that fails, or whose results differ, ends
alone: the others go on, and the exit code is 1.
"""

import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import act
from util import datasets, detector, plain, processes, run

CPU_SHAPES = [(32, 1024, 64), (32, 2048, 128), (16, 8192, 512)]  # clouds, points, centres
GPU_SHAPES = [(128, 1024, 64), (64, 8192, 512), (8, 40000, 2048)]
FORMS = {"ours": act, "plain": plain}
COMMANDS = ["train_teacher.py --steps 50", "train_teacher.py --steps 60 --resume"]
COMMANDS += ["train_student.py --steps 20", "finetune.py --steps 20"]
COMMANDS += ["segment.py --steps 20", "segment.py --task scene --steps 20", "detect.py --steps 20"]


class Work(NamedTuple):  # what the parts measure
    device: torch.device
    shapes: list
    repeats: int = 9
    batch: int = 8  # clouds of a step
    sizes: dict = dict(num_group=64, depth=12)  # of the models
    density: float = 30_000  # of a room; it has some 5/3 as many points


# -- measuring
def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def compare(work, what, forms):
    """Times forms in turns, after two runs to warm up -> the median seconds of "ours". A row for
    each of the others has the median of the turns' ratios."""
    synchronize = getattr(torch, work.device.type).synchronize
    times = {name: [] for name in forms}
    for _ in range(work.repeats + 2):
        for name, form in forms.items():
            times[name].append(timeit(lambda form=form: (form(), synchronize()), number=1))
    ours = times.pop("ours")[2:]
    for name, seconds in times.items():
        ratio = median(a / b for a, b in zip(seconds[2:], ours, strict=True))
        beside = f"{name} {1e3 * median(seconds[2:]):.4g} ms"
        print_row(what, f"{1e3 * median(ours):.4g} ms", beside, f"{ratio:.2f} x")
    return median(ours)


def watch(form):
    """Prints the operations of a call on a GPU; in words: the host's share, memory, waits."""
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        launched = timeit(form, number=1)
        torch.cuda.set_sync_debug_mode("default")
    share = launched / (launched + timeit(torch.cuda.synchronize, number=1))
    memory = torch.cuda.max_memory_allocated() / 1e9
    with torch.profiler.profile() as operations:
        form()
    print(operations.key_averages().table("self_cuda_time_total", row_limit=12))
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a" in str(w.message)]
    waits = f"{len(lines)} waits {' '.join(sorted(set(lines)))}"
    return f"launched in {100 * share:.0f} % of the time, {memory:.1f} GB, {waits}"


def random_clouds(B, N, device="cpu"):
    xyz = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(N + B))
    return (xyz / xyz.norm(dim=-1).amax(dim=1)[:, None, None]).to(device)


# -- geometry
def check_geometry(work):
    """FPS and kNN are, bit for bit, those of the plain forms on the CPU."""
    B, N, G = work.shapes[0]
    xyz = random_clouds(B, N)
    grid = torch.cartesian_prod(*[torch.arange(16.0)] * 3)  # where most distances are ties
    ties = grid[xyz[:, :, 0].argsort(dim=1)]  # (B, N, 3), in another order for each cloud
    for kind, cloud in {"random": xyz, "far": xyz + 1e4, "tie grid": ties}.items():
        idx = plain.farthest_point_sample(cloud, G)
        query = act.gather_points(cloud, idx)
        expected = (idx, plain.stable_knn(query, cloud, 1), plain.stable_knn(query, cloud, 16))
        cloud = cloud.to(work.device)
        query = query.to(work.device)
        idx = act.farthest_point_sample(cloud, G)
        found = (idx, act.knn(query, cloud, 1), act.knn(query, cloud, 16))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, check_device=False)
        print_row(f"FPS and kNN, {kind} clouds", "equal bit for bit", "plain on the CPU", "")


def bench_search(work):
    peer = None
    try:
        import torch_cluster as peer
    except (ImportError, OSError) as error:  # it can be there and broken
        print_row("torch_cluster", "", str(error), "")
    for B, N, G in work.shapes:
        xyz = random_clouds(B, N, work.device)
        query = act.gather_points(xyz, act.farthest_point_sample(xyz, G))
        fps = {name: partial(form.farthest_point_sample, xyz, G) for name, form in FORMS.items()}
        knn = {name: partial(form.knn, query, xyz, 32) for name, form in FORMS.items()}
        if peer:
            cloud = torch.arange(B, device=work.device)
            of_points = cloud.repeat_interleave(N)
            of_queries = cloud.repeat_interleave(G)
            x = xyz.flatten(0, 1)
            centers = query.flatten(0, 1)
            fps["torch_cluster"] = partial(peer.fps, x, of_points, G / N, random_start=False)
            knn["torch_cluster"] = partial(peer.knn, x, centers, 32, of_points, of_queries)
        compare(work, f"FPS ({B}, {N} -> {G})", fps)
        compare(work, f"kNN ({B}, {G} of {N}), k = 32", knn)


def bench_cuboid(work):
    """Detection's augmentation, on the CPU, of a room where no cuboid has enough points."""
    [room] = datasets.synthetic_scenes(0, 1, work.density)

    def masks(form):
        rng = np.random.default_rng(0)
        return form.random_cuboid(room.xyz, room.boxes, rng, 0.6 * len(room.xyz))

    assert all(map(np.array_equal, masks(detector), masks(plain))), "masks differ"
    forms = {"ours": partial(masks, detector), "plain": partial(masks, plain)}
    compare(work, f"cuboid in {len(room.xyz)} points", forms)


# -- stages
def stage_one(B, device, sizes):
    """Our model, and the loss of one batch as a function of the model."""
    backbone = act.BackboneConfig(depth=sizes["depth"])
    G = sizes["num_group"]
    config = act.TeacherConfig(G, num_tokens=128 * G, prompt_dropout=0.0, backbone=backbone)
    model = act.Teacher(config).to(device).train()
    xyz = random_clouds(B, 16 * G, device)
    return model, lambda model: act.teacher_loss(model(xyz), 0.1)[0]


def stage_two(B, device, sizes):
    teacher = stage_one(B, device, sizes)[0].eval().requires_grad_(False)
    config = act.StudentConfig(drop_path=0.0, **sizes)
    model = act.Student(config).to(device).train()
    xyz = random_clouds(B, config.points, device)
    prompts = teacher.prompt_keys_values()
    center = torch.empty(B, config.num_group, 3)
    mask = act.random_mask(center, 0.8, torch.Generator().manual_seed(0))

    def loss(model):
        neighborhood, center = model.encoder.group(xyz)
        split = act.split_mask(mask, device)
        with torch.no_grad():
            target = act.gather_points(teacher.features(neighborhood, center, prompts), split[1])
        return act.distillation_loss(model(neighborhood, center, mask, split), target)

    return model, loss


# The batch and the number of steps are the published ones.
STAGES = {"stage-I": (stage_one, 64, 196_500), "stage-II": (stage_two, 128, 123_000)}


def train_step(work, model, loss, optimizer, precision, form=nullcontext):
    with form(), torch.autocast(work.device.type, torch.bfloat16, enabled=precision == "bf16"):
        value = loss(model)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def check_models(work):
    """Loss and gradient in fp32 and eval mode, which has no noise, are those of the plain form on
    the CPU. Gradients jump where a maximum changes hands, so they agree less well than losses."""
    for name, (build, _, _) in STAGES.items():
        results = []
        for device, form in (("cpu", plain.plain_form), (work.device, nullcontext)):
            torch.manual_seed(0)
            model, loss = build(work.batch, device, work.sizes)
            with form():
                value = loss(model.eval())
                value.backward()
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            results.append((value.cpu(), torch.cat(grads).cpu()))
        (expected, gradient), (value, ours) = results
        error = (ours - gradient).norm() / gradient.norm()
        beside = f"plain on the CPU {expected:.6f}"
        print_row(f"{name}, loss", f"{value:.6f}, gradients ± {error:.1e}", beside, "")
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
        assert error < 2e-2, "gradients differ"


def bench_stage(work, name):
    """Steps of a batch; on a GPU of the published one, and of the share of one GPU of eight."""
    published = STAGES[name][1]
    for B in (published, published // 8) if work.device.type == "cuda" else (work.batch,):
        bench_step(work, name, B)


def bench_step(work, name, B):
    """A step beside a plain one, then its pace; on a GPU its operations, and compiled, too."""
    build, published, steps = STAGES[name]
    on_gpu = work.device.type == "cuda"
    torch.manual_seed(0)
    model, loss = build(B, work.device, work.sizes)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(model).backward()
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    flop = f"{counter.get_total_flops() / 1e12:.3g} TFLOP a step"
    print_row(f"{name}, batch {B}", size, flop, "")
    step = partial(train_step, work, model, loss, run.adamw(model, 5e-4, 0.05))
    other = torch.optim.AdamW(model.parameters(), lr=5e-4)
    forms = {"ours": partial(step, "fp32")}
    forms["plain"] = partial(train_step, work, model, loss, other, "fp32", plain.plain_form)
    compare(work, f"{name} step, fp32", forms)
    precision = run.pick_precision(work.device)
    for form in ("eager", "compiled") if on_gpu else ("eager",):
        if form == "compiled":
            torch.compiler.reset()  # else earlier models' graphs count towards the limit
            processes.parallel(model, run.RunConfig(compile=True))
        seconds = compare(work, "", {"ours": partial(step, precision)})
        pace = f"{1e3 * seconds:.1f} ms a step, {B / seconds:.0f} clouds/s"
        watched = watch(partial(step, precision)) if on_gpu else "no GPU"
        hours = f"{steps * published / B * seconds / 3600:.2f} h on one"  # of the published run
        print_row(f"{name}, {precision}, {form}", pace, watched, hours)


def run_commands(work):
    """Each command that trains, for some steps at size tiny, on synthetic data."""
    with tempfile.TemporaryDirectory() as cwd:
        for words in COMMANDS:
            script, *flags = f"{words} --size tiny --device {work.device}".split()
            command = [sys.executable, Path(act.__file__).with_name(script)] + flags
            form = partial(subprocess.run, command, cwd=cwd, stdout=subprocess.DEVNULL, check=True)
            print_row(words, f"{timeit(form, number=1):.0f} s", "", "")


# -- all
PARTS = {"geometry": check_geometry, "models": check_models, "search": bench_search}
PARTS |= {name: partial(bench_stage, name=name) for name in STAGES}
PARTS |= {"cuboid": bench_cuboid, "commands": run_commands}  # commands: by itself, or on a GPU


@dataclass
class Config:
    device: str = run.flag("cpu", "auto, cpu, cuda or cuda:N")
    quick: bool = run.flag(False, "tiny sizes, one repeat")
    part: str = run.flag("all", "one part alone", choices=["all"] + list(PARTS))


def main(config):
    device = run.pick_device(config.device)
    work = Work(device, GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    if config.quick:
        work = Work(device, [(2, 256, 16)], 1, 2, dict(num_group=16, depth=1), 3000)
    torch.backends.cudnn.allow_tf32 = False  # the plain form's convolutions in fp32, too
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        machine += f", {torch.cuda.get_device_name()}, {versions}"
    print(f"{machine}, {torch.get_num_threads()} threads; torch {torch.__version__}\n")
    print_row("what", "ours", "beside it", "ratio")
    print_row("---", "---", "---", "---")
    names = [config.part]
    if config.part == "all":
        names = list(PARTS) if device.type == "cuda" else list(PARTS)[:-1]
    failed = []
    for name in names:
        began = time.perf_counter()
        try:
            PARTS[name](work)
        except (RuntimeError, AssertionError, subprocess.CalledProcessError):
            traceback.print_exc()
            failed.append(name)
        print_row(f"{name} in {time.perf_counter() - began:.0f} s", "", "", "")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run.run_command(main, Config, __doc__)
