"""Speed of every operation and of both stages, beside the textbook form and the machine's own limit, in one run.

    python bench.py                          # two CPU cores: minutes
    python bench.py --quick                  # fewer repeats: under two minutes
    python bench.py --device cuda --compile  # a GPU: the same rows, and the published run in hours

Prints the machine, the versions and a Markdown table. Times are medians of repeats taken in turns, so that a noisy
neighbour disturbs all forms alike; a ratio is the median of the turns' ratios. The plain form is what one writes first:
1 x 1 convolutions with channels first, every edge and every copy explicit, prompts as tokens of the sequence whose outputs
are dropped, one-hot codes, all distances at once, AdamW as it comes; it too embeds only the visible patches. Both carry the
same random weights in the paper's sizes (Sec. 4), without prompt dropout and drop path. Exits 1 where their answers differ.
"""

import argparse
import copy
import math
import os
import platform
import re
import sys
import timeit
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import act
import clouds as shapes
import training

notes, wrong = [], []


# ---------------------------------------------------------------------------------------------------------------------
# Plain form: act with every saving replaced by the plain formula. What holds no saving, such as a Block, serves both forms
# ---------------------------------------------------------------------------------------------------------------------

def plain_fps(xyz, num_samples):
    """Farthest point sampling as PointNet++'s ports have it."""
    B, N, _ = xyz.shape
    idx = torch.zeros(B, num_samples, dtype=torch.long, device=xyz.device)
    distance = torch.full((B, N), 1e10, device=xyz.device)
    farthest = torch.zeros(B, dtype=torch.long, device=xyz.device)
    batch = torch.arange(B, device=xyz.device)
    for i in range(num_samples):
        idx[:, i] = farthest
        centroid = xyz[batch, farthest].view(B, 1, 3)
        distance = torch.minimum(distance, ((xyz - centroid) ** 2).sum(-1))
        farthest = distance.max(-1)[1]
    return idx


def plain_gather(values, idx):
    """values (B, N, C), idx (B, ...) -> (B, ..., C)."""
    batch = torch.arange(len(values), device=values.device).view(-1, *[1] * (idx.ndim - 1))
    return values[batch, idx]


def plain_knn(query, xyz, k):
    return (query[:, :, None] - xyz[:, None]).square().sum(-1).topk(k, largest=False)


def plain_chamfer(a, b):
    distance = (a[:, :, None] - b[:, None]).square().sum(-1)  # (B, N, M)
    return (distance.min(2)[0].sqrt().mean() + distance.min(1)[0].sqrt().mean()) / 2


def plain_layers(layers, x):
    """Layers in a row with channels first, each Linear as a 1 x 1 convolution. (B, C, N) or (B, C, N, K)."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            convolution = F.conv1d if x.ndim == 3 else F.conv2d
            x = convolution(x, layer.weight.view(*layer.weight.shape, *[1] * (x.ndim - 2)), layer.bias)
        elif isinstance(layer, nn.BatchNorm1d):
            x = nn.BatchNorm1d.forward(layer, x)  # torch's own, not act's
        else:
            x = F.relu_(x) if isinstance(layer, nn.ReLU) else layer(x)
    return x


def plain_patches(embed, neighborhood):
    B, G, S, _ = neighborhood.shape
    point = plain_layers(embed.first_conv, neighborhood.flatten(0, 1).transpose(1, 2))  # (B G, 256, S)
    patch = point.max(dim=2, keepdim=True)[0]
    point = plain_layers(embed.second_conv, torch.cat([patch.expand(-1, -1, S), point], dim=1))
    return point.max(dim=2)[0].view(B, G, -1)


def plain_dgcnn(dgcnn, f, graph):
    f, levels = plain_layers([dgcnn.input_trans], f.transpose(1, 2)), []  # (B, C, G)
    for layer in (dgcnn.layer1, dgcnn.layer2, dgcnn.layer3, dgcnn.layer4):
        neighbor = plain_gather(f.transpose(1, 2), graph).permute(0, 3, 1, 2).contiguous()  # (B, C, G, K)
        itself = f[..., None].expand_as(neighbor)
        edge = plain_layers(layer, torch.cat([neighbor - itself, itself], dim=1))
        f = F.leaky_relu(edge, 0.2).max(dim=-1)[0]
        levels.append(f)
    return F.leaky_relu(plain_layers(dgcnn.layer5, torch.cat(levels, dim=1)), 0.2).transpose(1, 2)


def plain_folding(decoder, feature):
    B, G, C = feature.shape
    coarse = decoder.mlp(feature)  # (B, G, 3 S/4)
    point = coarse.view(B * G, -1, 3).repeat_interleave(4, dim=1).transpose(1, 2)  # (B G, 3, S)
    S = point.shape[2]
    grid = decoder.grid.t().repeat(1, S // 4).expand(B * G, -1, -1)
    whole = torch.cat([feature.reshape(B * G, C, 1).expand(-1, -1, S), grid, point], dim=1)
    fine = (plain_layers(decoder.final_conv, whole) + point).transpose(1, 2)
    return coarse.view(B, G, -1, 3), fine.reshape(B, G, S, 3)


def plain_visual(teacher, tokens, center, prefix=None):
    x, pos = teacher.proj_pre(tokens), teacher.visual_pos_embed(center)
    prompts = torch.cat([teacher.visual_prompt_token, teacher.deep_prompt_tokens])  # (layers, P, C)
    positions = torch.cat([teacher.visual_prompt_pos, teacher.deep_prompt_pos])
    for block, prompt, position in zip(teacher.trunk.blocks, prompts, positions):
        whole = torch.cat([prompt.expand(len(x), -1, -1), x], dim=1)
        x = block(whole + torch.cat([position.expand(len(x), -1, -1), pos], dim=1))[:, len(prompt):]
    return teacher.proj_post(teacher.trunk.norm(x))


def plain_features(teacher, neighborhood, center, prefix=None):
    graph = act.knn(center, center, 4)[1]
    codes = F.one_hot(teacher.logits(neighborhood, graph).argmax(dim=-1), len(teacher.codebook)).float()
    return teacher.dgcnn_2(teacher.visual(codes @ teacher.codebook, center), graph)


@contextmanager
def plain_form():
    """Within it, act computes plainly: the same models, the same losses."""
    with (mock.patch.multiple(act, farthest_point_sample=plain_fps, knn=plain_knn, gather_points=plain_gather,
                              chamfer_distance=plain_chamfer),
          mock.patch.object(act.PatchEmbed, "forward", plain_patches), mock.patch.object(act.DGCNN, "forward", plain_dgcnn),
          mock.patch.object(act.FoldingDecoder, "forward", plain_folding),
          mock.patch.multiple(act.Teacher, visual=plain_visual, features=plain_features)):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------

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


def ratio(times, slow, fast):
    return median(a / b for a, b in zip(times[slow], times[fast]))


def seconds(times):
    s = median(times)
    return f"{s:.2f} s" if s >= 1 else f"{1e3 * s:.1f} ms" if s >= 0.01 else f"{1e3 * s:.3f} ms"


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def compare(what, times, goals, ours="ours"):
    """A row for each form that has a goal and was run, beside ours."""
    for other, goal in goals.items():
        if other in times:
            row(what, seconds(times[ours]), f"{other} {seconds(times[other])}", f"{ratio(times, other, ours):.2f} ×", goal)


def check(condition, message):
    if not condition:
        wrong.append(message)


def peak_memory(device, form):
    """MiB that `form` takes beyond what is held before it; nan where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        form()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return math.nan
    clear.write_text("5")  # lowers the high-water mark to what is held
    high_water = r"VmHWM:\s*(\d+)"
    before = int(re.search(high_water, status.read_text())[1])
    form()
    return (int(re.search(high_water, status.read_text())[1]) - before) / 1024


def best_product(device, dtype, repeats):
    """(FLOP, form) of the fastest of several matrix products, repeated to a tenth of a second: the machine's own limit."""
    sizes = [(1024, 1024, 1024), (2048, 2048, 2048), (512, 768, 3072), (512, 2304, 8192), (16384, 512, 512)]
    if device.type == "cuda":
        sizes = [(8192, 8192, 8192), (4096, 4096, 4096), (16384, 4096, 4096)]
    products = {}
    for n, a, b in sizes:
        x, w = torch.randn(n, a, device=device, dtype=dtype), torch.randn(b, a, device=device, dtype=dtype)
        products[2 * n * a * b] = partial(F.linear, x, w)  # FLOP -> form
    rates = {flop: flop / median(times) for flop, times in race(device, repeats, products).items()}
    flop = max(rates, key=rates.get)
    count = math.ceil(0.1 * rates[flop] / flop)
    return count * flop, partial(timeit.timeit, products[flop], number=count)


def clouds(B, N, device):
    return shapes.unit_sphere(torch.randn(B, N, 3, generator=torch.Generator().manual_seed(N + B))).to(device)


def bench_geometry(device, repeats):
    peers = dict.fromkeys(["torch_cluster"] + ["fpsample"] * (device.type == "cpu"))
    for name in peers:
        try:
            peers[name] = __import__(name)
        except ImportError:
            notes.append(f"{name} is not installed: no comparison with it")
    cluster, fpsample = peers["torch_cluster"], peers.get("fpsample")
    shapes = [(32, 1024, 64), (32, 2048, 128), (16, 8192, 512)] + [(128, 1024, 64)] * (device.type == "cuda")
    for B, N, G in shapes:
        xyz, k = clouds(B, N, device), 32
        fps = {"ours": lambda: act.farthest_point_sample(xyz, G), "textbook": lambda: plain_fps(xyz, G)}
        query = act.gather_points(xyz, fps["ours"]())
        knn = {"ours": lambda: act.knn(query, xyz, k), "plain": lambda: plain_knn(query, xyz, k)}
        check(torch.equal(fps["ours"](), fps["textbook"]()), f"FPS ({B}, {N} -> {G}) differs from the textbook's")
        check(torch.equal(knn["ours"]()[0], knn["plain"]()[0]), f"kNN ({B}, {G} of {N}) differs from the plain form's")
        if cluster:
            batch, query_batch = (torch.arange(B, device=device).repeat_interleave(count) for count in (N, G))
            fps["torch_cluster"] = lambda: cluster.fps(xyz.flatten(0, 1), batch, ratio=G / N, random_start=False)
            knn["torch_cluster"] = lambda: cluster.knn(xyz.flatten(0, 1), query.flatten(0, 1), k, batch, query_batch)
        if fpsample:
            fps["fpsample"] = lambda: [fpsample.fps_sampling(cloud, G, start_idx=0) for cloud in xyz.numpy()]
        goals = {"textbook": "≥ 3 ×" if B < 128 else "≤ 0.6 ms", "torch_cluster": "> 1 ×", "fpsample": "> 1 ×"}
        compare(f"FPS ({B}, {N} → {G})", race(device, repeats, fps), goals)
        goals = {"plain": "", "torch_cluster": "≥ 1 ×" if N < 8192 else "≥ 0.5 ×"}
        compare(f"kNN k = 32 ({B}, {G} of {N})", race(device, repeats, knn), goals)


def bench_chamfer(device, repeats):
    a, b = clouds(8, 2048, device).requires_grad_(), clouds(8, 2048, device).flip(1).mul(0.9).requires_grad_()

    def gradients(distance):
        loss = distance(a, b)
        return loss, *torch.autograd.grad(loss, (a, b))

    forms = {"ours": partial(gradients, act.chamfer_distance), "plain": partial(gradients, plain_chamfer)}
    memory = {name: peak_memory(device, form) for name, form in forms.items()}
    for ours, plain in zip(forms["ours"](), forms["plain"]()):
        check(torch.allclose(ours, plain, rtol=1e-4, atol=1e-9), "Chamfer or its gradient differs from the plain form's")
    compare("Chamfer (8, 2048, 2048), with gradients", race(device, repeats, forms), {"plain": "≥ 1 ×"})
    row("its extra memory", f"{memory['ours']:.0f} MiB", f"plain {memory['plain']:.0f} MiB", "", "bounded")


def stage_one(B, device):
    """-> our model, the loss of one batch as a function of the model, the least FLOP of a step."""
    model = act.Teacher(act.TeacherConfig(prompt_dropout=0.0)).to(device).train()
    xyz = clouds(B, 1024, device)
    # 2 per multiply-add of each matrix with its rows and of attention, three times if trained (forward; backward to weights
    # and input), twice if the weights are frozen or the input is coordinates, once without gradients; an EdgeConv as two
    # products per point, [patch ; point] as one per patch and one per point; the second term: prompts, once per batch
    return model, lambda model: act.teacher_loss(model(xyz), 0.1)[0], B * 41_572_466_688 + 3_623_878_656


def stage_two(B, device):
    teacher = act.Teacher().to(device).eval().requires_grad_(False)
    model = act.Student(act.StudentConfig(drop_path=0.0)).to(device).train()
    xyz, prefix = clouds(B, 1024, device), teacher.prefix()
    mask = act.random_mask(torch.empty(B, 64, 3), 0.8, torch.Generator().manual_seed(0))

    def loss(model):
        neighborhood, center = act.group_points(xyz, 64, 32)
        with torch.no_grad():
            target = act.gather_points(teacher.features(neighborhood, center, prefix), act.split_mask(mask, device)[1])
        return act.distillation_loss(model(neighborhood, center, mask), target)

    return model, loss, B * 19_954_445_824


def check_stage(name, model, loss, least, device, bf16):
    """Holds both forms together, with the same weights and noise: loss, gradient, our loss in bf16; and our arithmetic."""
    losses, gradients = [], []
    for form in (nullcontext, plain_form):
        torch.manual_seed(1)  # the Gumbel noise
        model.zero_grad()
        with form():
            losses.append(loss(model))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    ours, plain = (value.item() for value in losses)
    difference = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    check(abs(ours - plain) < 1e-5 * abs(plain), f"{name}: loss {ours} differs from the plain form's {plain}")
    # it jumps where a nearest neighbour or a maximum changes hands: our own step on one thread or two differs by 5e-3
    check(difference < 2e-2, f"{name}: the gradient differs from the plain form's by {difference:.1e} of its length")
    notes.append(f"{name}: loss {ours:.6f}, plain {plain:.6f}; gradients differ by {difference:.1e} of their length")
    if bf16:
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            low = loss(model).item()
        check(abs(low - plain) < 0.02 * abs(plain), f"{name}: loss in bf16 {low} is far from {plain}")
        notes.append(f"{name}: loss in bf16 {low:.4f}")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # counts attention too
        loss(model).backward()
    counted = counter.get_total_flops()
    check(abs(counted / least - 1) < 0.01, f"{name}: {least:.4g} FLOP would do, torch counts {counted:.4g}")
    notes.append(f"{name}: least arithmetic {least / 1e9:.1f} GFLOP a step, torch counts {counted / 1e9:.1f}")


def train_step(model, loss, optimizer, device, bf16=False, form=nullcontext):
    with form(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        value = loss(model)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def bench_stage(name, build, goal, device, repeats, products):
    """Steps in the plain form and in ours in each precision, in turns with the best products -> seconds of ours in fp32."""
    torch.manual_seed(0)
    model, loss, least = build(8, device)
    check_stage(name, model, loss, least, device, "bf16" in products)
    plain, ours = copy.deepcopy(model), training.adamw(model, 5e-4, 0.05)
    other = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.05)
    forms = {"plain fp32": partial(train_step, plain, loss, other, device, form=plain_form)}
    for precision, (_, product) in products.items():
        forms[precision] = partial(train_step, model, loss, ours, device, bf16=precision == "bf16")
        forms["product " + precision] = product
    times = race(device, repeats, forms)
    for precision, speedup, share in (("fp32", goal, 65), ("bf16", 4, 40)):
        if precision in products:
            compare(f"{name} step, batch 8, {precision}", times, {"plain fp32": f"≥ {speedup} ×"}, ours=precision)
            flop, product = products[precision][0], "product " + precision
            row(f"{name} arithmetic, {precision}", f"{least / median(times[precision]) / 1e9:.0f} GFLOP/s",
                f"best product {flop / median(times[product]) / 1e9:.0f} GFLOP/s",
                f"{100 * least / flop * ratio(times, product, precision):.0f} %", f"≥ {share} %")
    return median(times["fp32"])


def bench_data(device, repeats, step):
    """Drawing 1024 of 8192 points, normalising, augmenting, and the masks of a batch, beside a stage II step's seconds."""
    data = shapes.Clouds(clouds(64, 8192, device).flatten(0, 1), torch.arange(65) * 8192, [""] * 64).to(device)
    indices, center, generator = torch.arange(0, 64, 8), torch.empty(8, 64, 3), torch.Generator().manual_seed(0)

    def prepare():
        act.split_mask(act.random_mask(center, 0.8, generator), device)
        return shapes.scale_translate(data.draw(indices, 1024)[0])

    times = race(device, 10 * repeats, {"ours": prepare})["ours"]
    row("data of a batch of 8: draw, normalise, augment, mask", seconds(times), f"stage II step {1e3 * step:.0f} ms",
        f"{100 * median(times) / step:.1f} %", "< 5 %")


def bench_published(device, repeats, product, compiled):
    """The published run on a GPU: batch 128 (stage I: 64), bf16, 300 epochs (Sec. 5)."""
    for name, build, B, size, hours in (("stage I", stage_one, 64, 41_952, 2), ("stage II", stage_two, 128, 52_470, 1)):
        torch.manual_seed(0)
        model, loss, least = build(B, device)
        if compiled:
            training.compile_blocks(model)
        optimizer = training.adamw(model, 5e-4, 0.05)
        forms = {"ours": partial(train_step, model, loss, optimizer, device, bf16=True), "product": product[1]}
        race(device, 3, forms)  # compiles
        torch.cuda.reset_peak_memory_stats()
        times = race(device, 5 * repeats, forms)
        time_of_step, peak = median(times["ours"]), torch.cuda.max_memory_allocated()
        row(f"{name} step, batch {B}, bf16{', compiled' if compiled else ''}", seconds(times["ours"]),
            f"best product {product[0] / median(times['product']) / 1e12:.0f} TFLOP/s",
            f"{100 * least / product[0] * ratio(times, 'product', 'ours'):.0f} %", "≥ 45 %")
        row(f"{name}, 300 epochs of {size:,} clouds", f"{300 * -(-size // B) * time_of_step / 3600:.2f} h",
            f"{B / time_of_step:.0f} clouds/s", f"{peak / 2**30:.1f} GiB", f"< {hours} h")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile on the GPU's published run")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # convolutions of the plain form in float32, as its products are
    repeats, steps = (2, 2) if args.quick else (9, 7)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"^model name\s*: (.*)$", cpuinfo, re.M)
    bf16 = training.processor_has_bf16()
    machine = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported()
        machine += f"; {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    print(f"{machine}; Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}\n")
    row("what", "ours", "beside it", "ratio", "goal")
    row(*["---"] * 5)
    bench_chamfer(device, repeats)  # first: memory freed by others would hide its own
    bench_geometry(device, repeats)
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if bf16 else {})
    products = {precision: best_product(device, dtype, 2 * repeats) for precision, dtype in dtypes.items()}
    bench_stage("stage I", stage_one, 1.5, device, steps, products)
    bench_data(device, repeats, bench_stage("stage II", stage_two, 1.8, device, steps, products))
    if device.type == "cuda":
        bench_published(device, repeats, products["bf16"], args.compile)

    if not bf16:
        notes.append("this processor has no bf16: its rows are left out")
    print("\n" + "\n".join(f"- {note}" for note in notes))
    if wrong:
        sys.exit("answers differ:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
