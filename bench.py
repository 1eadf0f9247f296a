"""Speed of every operation and of both stages, beside the textbook form and the machine's own limit, in one run.

    python bench.py                          # two CPU cores: about eight minutes
    python bench.py --quick                  # fewer repeats: under two minutes
    python bench.py --device cuda --compile  # a GPU: the same rows, and the published run in hours

Prints the machine, the versions and a Markdown table. Times are medians of repeats taken in turns, so that a noisy neighbour
disturbs all forms alike; a ratio is the median of the ratios of the turns. The plain form is what one writes first: 1 x 1
convolutions with channels first, every edge and every copy explicit, prompts as tokens of the sequence whose outputs are
dropped, one-hot codes, all distances at once, AdamW as it comes. Both forms carry the same weights; it too embeds only the
visible patches. Exits 1 where an answer differs between the forms. Dropout of prompts and drop path are off: answers could
not be compared otherwise. The models are the paper's (Sec. 4), their weights random.
"""

import argparse
import functools
import math
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import act

rows, notes, wrong = [], [], []


# ---------------------------------------------------------------------------------------------------------------------
# Plain form: geometry
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


def plain_rows(values, idx):
    """values (B, N, C), idx (B, ...) -> (B, ..., C)."""
    batch = torch.arange(len(values), device=values.device).view(-1, *[1] * (idx.ndim - 1))
    return values[batch, idx]


def square_distances(a, b):
    return (a[:, :, None] - b[:, None]).square().sum(-1)  # (B, N, M)


def plain_knn(query, xyz, k):
    return square_distances(query, xyz).topk(k, largest=False)


def plain_group(xyz, num_group, group_size):
    center = plain_rows(xyz, plain_fps(xyz, num_group))
    return plain_rows(xyz, plain_knn(center, xyz, group_size)[1]) - center[:, :, None], center


def plain_chamfer(a, b):
    distance = square_distances(a, b)
    return (distance.min(2)[0].sqrt().mean() + distance.min(1)[0].sqrt().mean()) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Plain form: models, their parameters named as act's
# ---------------------------------------------------------------------------------------------------------------------

class PlainBlock(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias=False, eps=1e-5):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, bias=qkv_bias), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainPatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.first_conv = nn.Sequential(nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128), nn.ReLU(inplace=True), nn.Conv1d(128, 256, 1))
        self.second_conv = nn.Sequential(nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(inplace=True),
                                         nn.Conv1d(512, dim, 1))

    def forward(self, neighborhood):
        B, G, S, _ = neighborhood.shape
        point = self.first_conv(neighborhood.flatten(0, 1).transpose(2, 1))  # (B G, 256, S)
        patch = point.max(dim=2, keepdim=True)[0]
        point = self.second_conv(torch.cat([patch.expand(-1, -1, S), point], dim=1))
        return point.max(dim=2)[0].view(B, G, -1)


class PlainDGCNN(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.input_trans = nn.Conv1d(dim, 128, 1)
        for i, (wide_in, wide_out) in enumerate(((256, 256), (512, 512), (1024, 512), (1024, 1024)), start=1):
            layer = nn.Sequential(nn.Conv2d(wide_in, wide_out, 1, bias=False), nn.GroupNorm(4, wide_out), nn.LeakyReLU(0.2))
            setattr(self, f"layer{i}", layer)
        self.layer5 = nn.Sequential(nn.Conv1d(2304, out, 1, bias=False), nn.GroupNorm(4, out), nn.LeakyReLU(0.2))

    def forward(self, f, graph):
        f, levels = self.input_trans(f.transpose(1, 2)), []  # (B, C, G)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            neighbor = plain_rows(f.transpose(1, 2), graph).permute(0, 3, 1, 2).contiguous()  # (B, C, G, K)
            itself = f[..., None].expand_as(neighbor)
            f = layer(torch.cat([neighbor - itself, itself], dim=1)).max(dim=-1)[0]
            levels.append(f)
        return self.layer5(torch.cat(levels, dim=1)).transpose(1, 2)


class PlainDecoder(nn.Module):
    def __init__(self, dim, group_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 1024), nn.ReLU(inplace=True), nn.Linear(1024, 1024), nn.ReLU(inplace=True),
                                 nn.Linear(1024, 3 * group_size // 4))
        self.final_conv = nn.Sequential(nn.Conv1d(dim + 5, 512, 1), nn.BatchNorm1d(512), nn.ReLU(inplace=True),
                                        nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Conv1d(512, 3, 1))

    def forward(self, feature):
        B, G, C = feature.shape
        coarse = self.mlp(feature).view(B * G, -1, 3)
        grid = coarse.new_tensor([[-0.05, 0.05, -0.05, 0.05], [-0.05, -0.05, 0.05, 0.05]])
        point = coarse.repeat_interleave(4, dim=1).transpose(1, 2)  # (B G, 3, S)
        S = point.shape[2]
        parts = [feature.reshape(B * G, C, 1).expand(-1, -1, S), grid.repeat(1, S // 4).expand(B * G, -1, -1), point]
        fine = (self.final_conv(torch.cat(parts, dim=1)) + point).transpose(1, 2)
        return coarse.view(B, G, -1, 3), fine.reshape(B, G, S, 3)


class PlainTeacher(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, t = config, config.trunk
        self.config = c
        self.trunk = nn.ModuleDict({
            "blocks": nn.ModuleList(PlainBlock(t.width, t.num_heads, True, t.eps) for _ in range(t.depth)),
            "norm": nn.LayerNorm(t.width, eps=t.eps)}).requires_grad_(False)
        self.encoder = PlainPatchEmbed(c.encoder_dims)
        self.dgcnn_1, self.dgcnn_2 = PlainDGCNN(c.encoder_dims, c.num_tokens), PlainDGCNN(c.tokens_dims, c.decoder_dims)
        self.codebook = nn.Parameter(torch.empty(c.num_tokens, c.tokens_dims))
        self.proj_pre, self.proj_post = nn.Linear(c.tokens_dims, t.width), nn.Linear(t.width, c.tokens_dims)
        self.visual_pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, t.width))
        self.visual_prompt_token = nn.Parameter(torch.empty(1, c.num_prompt, t.width))
        self.visual_prompt_pos = nn.Parameter(torch.empty(1, c.num_prompt, t.width))
        self.deep_prompt_tokens = nn.Parameter(torch.empty(t.depth - 1, c.num_prompt, t.width))
        self.deep_prompt_pos = nn.Parameter(torch.empty(t.depth - 1, c.num_prompt, t.width))
        self.decoder = PlainDecoder(c.decoder_dims, c.group_size)

    def decode(self, probability, center, graph):
        """Features of the codes chosen with `probability` (B, G, codes) -> (B, G, D)."""
        B, P = len(center), self.config.num_prompt
        x, pos = self.proj_pre(probability @ self.codebook), self.visual_pos_embed(center)
        tokens = torch.cat([self.visual_prompt_token, self.deep_prompt_tokens])
        positions = torch.cat([self.visual_prompt_pos, self.deep_prompt_pos])
        for block, token, position in zip(self.trunk["blocks"], tokens, positions):
            whole = torch.cat([token.expand(B, -1, -1), x], dim=1) + torch.cat([position.expand(B, -1, -1), pos], dim=1)
            x = block(whole)[:, P:]
        return self.dgcnn_2(self.proj_post(self.trunk["norm"](x)), graph)

    def features(self, neighborhood, center):
        graph = plain_knn(center, center, 4)[1]
        codes = self.dgcnn_1(self.encoder(neighborhood), graph).argmax(dim=-1)
        return self.decode(F.one_hot(codes, self.config.num_tokens).float(), center, graph)

    def loss(self, xyz, kl_weight):
        neighborhood, center = plain_group(xyz, self.config.num_group, self.config.group_size)
        graph = plain_knn(center, center, 4)[1]
        logits = self.dgcnn_1(self.encoder(neighborhood), graph)
        coarse, fine = self.decoder(self.decode(F.gumbel_softmax(logits, tau=1.0, dim=-1), center, graph))
        target = neighborhood.flatten(0, 1)
        reconstruction = plain_chamfer(coarse.flatten(0, 1), target) + plain_chamfer(fine.flatten(0, 1), target)
        log_mean = F.softmax(logits, dim=-1).mean(dim=1).log()  # (B, codes)
        uniform = torch.full_like(log_mean, -math.log(self.config.num_tokens))
        return reconstruction + kl_weight * F.kl_div(log_mean, uniform, reduction="batchmean", log_target=True)


class PlainStudent(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, dim = config, config.width
        self.encoder = nn.ModuleDict({
            "patch_embed": PlainPatchEmbed(dim), "pos_embed": nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim)),
            "blocks": nn.ModuleList(PlainBlock(dim, c.num_heads) for _ in range(c.depth)), "norm": nn.LayerNorm(dim)})
        self.encoder.register_parameter("cls_token", nn.Parameter(torch.empty(1, 1, dim)))
        self.encoder.register_parameter("cls_pos", nn.Parameter(torch.empty(1, 1, dim)))
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))
        self.decoder = nn.ModuleDict({
            "blocks": nn.ModuleList(PlainBlock(dim, c.num_heads) for _ in range(c.decoder_depth)), "norm": nn.LayerNorm(dim)})
        self.head = nn.Linear(dim, c.target_dim)

    def forward(self, neighborhood, center, mask):
        e, B = self.encoder, len(center)
        visible, hidden = center[~mask].view(B, -1, 3), center[mask].view(B, -1, 3)
        x = e["patch_embed"](neighborhood[~mask].view(B, visible.shape[1], -1, 3))
        x = torch.cat([e.cls_token.expand(B, -1, -1), x], dim=1)
        pos = torch.cat([e.cls_pos.expand(B, -1, -1), e["pos_embed"](visible)], dim=1)
        for block in e["blocks"]:
            x = block(x + pos)
        x = torch.cat([e["norm"](x)[:, 1:], self.mask_token.expand(B, hidden.shape[1], -1)], dim=1)
        pos = torch.cat([self.decoder_pos_embed(visible), self.decoder_pos_embed(hidden)], dim=1)
        for block in self.decoder["blocks"]:
            x = block(x + pos)
        return self.head(self.decoder["norm"](x[:, -hidden.shape[1]:]))


def plain_twin(plain, fast):
    """`plain` with the weights of `fast`: the same names, other ranks where one has convolutions."""
    own = plain.state_dict()
    plain.load_state_dict({name: value.view(own[name].shape) for name, value in fast.state_dict().items()})
    return plain.to(next(fast.parameters()).device).train(fast.training)


# ---------------------------------------------------------------------------------------------------------------------
# Least arithmetic of a step
# ---------------------------------------------------------------------------------------------------------------------

class Arithmetic:
    """Counts 2 x multiply-adds of products, forward and (train) backward: one more for the weights, one for the input."""

    def __init__(self):
        self.flops = 0

    def chain(self, n, *widths, kind="trained"):
        """Linear layers in a row on n rows. `first`: the first one's input needs no gradient; `forward`: nothing does."""
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            passes = {"trained": 3, "first": 2 if i == 0 else 3, "frozen": 2, "forward": 1}[kind]
            self.flops += 2 * passes * n * a * b

    def patches(self, n, S, dim, kind):
        """The first Linear on [patch ; point] once per patch and once per point."""
        self.chain(n * S, 3, 128, 256, kind=kind)
        kind = "trained" if kind == "first" else kind
        self.chain(n, 256, 512, kind=kind)
        self.chain(n * S, 256, 512, dim, kind=kind)

    def dgcnn(self, n, dim, out, kind="trained"):
        """An EdgeConv as two products per point."""
        self.chain(n, dim, 128, kind=kind)
        for a, b in ((128, 256), (256, 512), (512, 512), (512, 1024)):
            self.chain(2 * n, a, b, kind=kind)
        self.chain(n, 2304, out, kind=kind)

    def blocks(self, depth, B, T, C, kind="trained", keys=0):
        """Blocks on B x T tokens, whose attention sees `keys` further keys; both its products backward to both operands."""
        for a, b in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
            self.chain(depth * B * T, a, b, kind=kind)
        self.chain(2 * depth * B * T, T + keys, C, kind="forward" if kind == "forward" else "trained")

    def teacher(self, c, B, kind):
        """All of stage I's forward but the decoder and the choice of codes."""
        n, t = B * c.num_group, c.trunk
        trained, frozen = ("forward", "forward") if kind == "forward" else ("trained", "frozen")
        self.patches(n, c.group_size, c.encoder_dims, kind)
        self.dgcnn(n, c.encoder_dims, c.num_tokens, trained)
        self.chain(n, c.tokens_dims, t.width, kind=trained)
        self.chain(n, 3, 128, t.width, kind=kind)
        self.blocks(t.depth, B, c.num_group, t.width, frozen, keys=c.num_prompt)
        self.chain(n, t.width, c.tokens_dims, kind=trained)
        self.dgcnn(n, c.tokens_dims, c.decoder_dims, trained)

    @classmethod
    def stage_one(cls, c, B):
        count, n = cls(), B * c.num_group
        count.teacher(c, B, "first")
        count.chain(n, c.num_tokens, c.tokens_dims)  # soft codes times codebook
        count.chain(c.trunk.depth * c.num_prompt, c.trunk.width, 2 * c.trunk.width, kind="frozen")  # once for the batch
        count.chain(n, c.decoder_dims, 1024, 1024, 3 * c.group_size // 4)
        count.chain(n, c.decoder_dims, 512)
        count.chain(n * c.group_size // 4, 3, 512)
        count.chain(n * c.group_size, 512, 512, 3)
        return count.flops

    @classmethod
    def stage_two(cls, teacher, c, B, masked):
        count, visible = cls(), c.num_group - masked
        count.teacher(teacher, B, "forward")
        count.patches(B * visible, c.group_size, c.width, "first")
        count.chain(B * visible, 3, 128, c.width, kind="first")
        count.blocks(c.depth, B, 1 + visible, c.width)
        count.chain(B * c.num_group, 3, 128, c.width, kind="first")
        count.blocks(c.decoder_depth, B, c.num_group, c.width)
        count.chain(B * masked, c.width, c.target_dim)
        return count.flops


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------

def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def race(device, repeats, forms):
    """Seconds of each form, taken in turns after one run to warm up: {name: [seconds]}."""
    times = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            wait(device)
            start = time.perf_counter()
            form()
            wait(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times, slow, fast):
    return statistics.median(a / b for a, b in zip(times[slow], times[fast]))


def seconds(times):
    s = statistics.median(times)
    return f"{s:.2f} s" if s >= 1 else f"{1e3 * s:.1f} ms" if s >= 0.01 else f"{1e3 * s:.3f} ms"


def row(*cells):
    rows.append(cells)
    print("| " + " | ".join(cells) + " |", flush=True)


def compare(what, times, other, goal=""):
    row(what, seconds(times["ours"]), f"{other} {seconds(times[other])}", f"{ratio(times, other, 'ours'):.2f} ×", goal)


def check(condition, message):
    if not condition:
        wrong.append(message)


def peak_memory(device, form):
    """MiB that `form` takes beyond what is held before it; nan where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return math.nan

    def status(key):
        return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    form()
    return (status("VmHWM") - before) / 1024


def best_product(device, dtype, repeats):
    """(FLOP, form) of the fastest of several matrix products, repeated to a tenth of a second: the machine's own limit."""
    sizes = [(1024, 1024, 1024), (2048, 2048, 2048), (512, 768, 3072), (512, 2304, 8192), (16384, 512, 512)]
    if device.type == "cuda":
        sizes = [(8192, 8192, 8192), (4096, 4096, 4096), (16384, 4096, 4096)]
    best, best_rate = None, 0
    for n, a, b in sizes:
        x, w = torch.randn(n, a, device=device, dtype=dtype), torch.randn(b, a, device=device, dtype=dtype)

        def product(count=1, x=x, w=w):
            for _ in range(count):
                F.linear(x, w)

        time_of_one = statistics.median(race(device, repeats, {"product": product})["product"])
        count, flops = math.ceil(0.1 / time_of_one), 2 * n * a * b
        if flops / time_of_one > best_rate:
            best, best_rate = (count * flops, functools.partial(product, count)), flops / time_of_one
    return best


def clouds(B, N, device):
    """Points inside the unit ball, (B, N, 3)."""
    xyz = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(N + B))
    return (xyz / xyz.norm(dim=2).amax(1)[:, None, None]).to(device)


def optional(name):
    try:
        return __import__(name)
    except ImportError:
        notes.append(f"{name} is not installed: no comparison with it")


def processor():
    """Name and instruction sets of the CPU."""
    path = Path("/proc/cpuinfo")
    info = dict(re.findall(r"^(model name|flags)\s*: (.*)$", path.read_text(), re.M)) if path.exists() else {}
    return info.get("model name", platform.machine()), info.get("flags", "")


def has_bf16(device):
    """Whether bf16 products run in hardware."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else bool(re.search("amx_bf16|avx512_bf16", processor()[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------

def bench_geometry(device, repeats):
    cluster, fpsample = optional("torch_cluster"), optional("fpsample") if device.type == "cpu" else None
    shapes = [(32, 1024, 64), (32, 2048, 128), (16, 8192, 512)] + [(128, 1024, 64)] * (device.type == "cuda")
    for B, N, G in shapes:
        xyz, k = clouds(B, N, device), 32
        batch = torch.arange(B, device=device).repeat_interleave(N)
        forms = {"ours": lambda: act.farthest_point_sample(xyz, G), "textbook": lambda: plain_fps(xyz, G)}
        idx = forms["ours"]()
        check(torch.equal(idx, forms["textbook"]()), f"FPS ({B}, {N} -> {G}) differs from the textbook's")
        if cluster:
            forms["torch_cluster"] = lambda: cluster.fps(xyz.flatten(0, 1), batch, ratio=G / N, random_start=False)
        if fpsample:
            forms["fpsample"] = lambda: [fpsample.fps_sampling(cloud, G, start_idx=0) for cloud in xyz.numpy()]
        times = race(device, repeats, forms)
        for other in list(forms)[1:]:
            goal = "≥ 3 ×" if other == "textbook" else "> 1 ×"
            compare(f"FPS ({B}, {N} → {G})", times, other, "≤ 0.6 ms" if B == 128 else goal)
        if B == 128:
            continue

        query = act.gather_points(xyz, idx)
        query_batch = torch.arange(B, device=device).repeat_interleave(G)
        forms = {"ours": lambda: act.knn(query, xyz, k), "plain": lambda: plain_knn(query, xyz, k)}
        check(torch.equal(forms["ours"]()[0], forms["plain"]()[0]), f"kNN ({B}, {G} of {N}) differs from the plain form's")
        if cluster:
            forms["torch_cluster"] = lambda: cluster.knn(xyz.flatten(0, 1), query.flatten(0, 1), k, batch, query_batch)
        times = race(device, repeats, forms)
        for other in list(forms)[1:]:
            goal = "" if other == "plain" else "≥ 1 ×" if N < 8192 else "≥ 0.5 ×"
            compare(f"kNN k = 32 ({B}, {G} of {N})", times, other, goal)


def bench_chamfer(device, repeats):
    a, b = clouds(8, 2048, device), clouds(8, 2048, device).flip(1).mul(0.9)
    answers = {}

    def form(name, distance):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        loss = distance(x, y)
        loss.backward()
        answers[name] = loss.detach(), x.grad, y.grad

    forms = {"ours": lambda: form("ours", act.chamfer_distance), "plain": lambda: form("plain", plain_chamfer)}
    memory = {name: peak_memory(device, run) for name, run in forms.items()}
    for ours, plain in zip(*answers.values()):
        check(torch.allclose(ours, plain, rtol=1e-4, atol=1e-9), "Chamfer or its gradient differs from the plain form's")
    compare("Chamfer (8, 2048, 2048), with gradients", race(device, repeats, forms), "plain", "≥ 1 ×")
    row("its extra memory", f"{memory['ours']:.0f} MiB", f"plain {memory['plain']:.0f} MiB", "", "bounded")


def compile_blocks(model, wanted):
    """As the scripts' --compile does."""
    for module in model.modules():
        if wanted and isinstance(module, (act.Block, act.PatchEmbed)):
            module.compile()


def stage_one(B, device, compiled=False):
    """-> our model, the plain one, the loss of each on one batch, the least arithmetic of a step."""
    fast = act.Teacher(act.TeacherConfig(prompt_dropout=0.0)).to(device).train()
    plain = plain_twin(PlainTeacher(fast.config), fast)
    xyz = clouds(B, 1024, device)
    compile_blocks(fast, compiled)
    least = Arithmetic.stage_one(fast.config, B)
    return fast, plain, lambda: act.teacher_loss(fast(xyz), 0.1)[0], lambda: plain.loss(xyz, 0.1), least


def stage_two(B, device, compiled=False):
    teacher = act.Teacher().to(device).eval().requires_grad_(False)
    fast = act.Student(act.StudentConfig(drop_path=0.0)).to(device).train()
    plain_teacher, plain = plain_twin(PlainTeacher(teacher.config), teacher), plain_twin(PlainStudent(fast.config), fast)
    xyz, prefix = clouds(B, 1024, device), teacher.prefix()
    mask = act.random_mask(torch.empty(B, 64, 3), 0.8, torch.Generator().manual_seed(0))
    compile_blocks(fast, compiled)

    def fast_loss():
        neighborhood, center = act.group_points(xyz, 64, 32)
        with torch.no_grad():
            target = act.gather_points(teacher.features(neighborhood, center, prefix), act.split_mask(mask, device)[1])
        return act.distillation_loss(fast(neighborhood, center, mask), target)

    def plain_loss():
        neighborhood, center = plain_group(xyz, 64, 32)
        hidden = mask.to(device)
        with torch.no_grad():
            target = plain_teacher.features(neighborhood, center)[hidden].view(B, -1, 384)
        return 1 - F.cosine_similarity(plain(neighborhood, center, hidden), target, dim=-1).mean()

    masked = int(mask[0].sum())
    return fast, plain, fast_loss, plain_loss, Arithmetic.stage_two(teacher.config, fast.config, B, masked)


def same_answers(name, fast, plain, fast_loss, plain_loss, bf16):
    """Loss and gradient of both forms from the same weights and noise; the loss alone in bf16."""
    losses = []
    for loss in (fast_loss, plain_loss):
        torch.manual_seed(1)  # the Gumbel noise
        losses.append(loss())
        losses[-1].backward()
    ours, beside = (x.item() for x in losses)
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    pairs = [(p.grad, theirs[n].view_as(p)) for n, p in fast.named_parameters() if p.grad is not None]
    check(len(pairs) == len(theirs), f"{name}: {len(pairs)} gradients, the plain form has {len(theirs)}")
    difference = math.sqrt(sum((a - b).double().square().sum().item() for a, b in pairs))
    difference /= math.sqrt(sum(b.double().square().sum().item() for _, b in pairs))
    check(abs(ours - beside) < 1e-5 * abs(beside), f"{name}: loss {ours} differs from the plain form's {beside}")
    # it jumps where a nearest neighbour or a maximum changes hands: our own step on one thread or two differs by 5e-3
    check(difference < 2e-2, f"{name}: the gradient differs from the plain form's by {difference:.1e} of its length")
    note = f"{name}: loss {ours:.6f}, plain {beside:.6f}; gradients differ by {difference:.1e} of their length"
    if bf16:
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast(theirs[next(iter(theirs))].device.type, torch.bfloat16):
            low = fast_loss().item()
        check(abs(low - beside) < 0.02 * abs(beside), f"{name}: loss in bf16 {low} is far from {beside}")
        note += f"; in bf16 {low:.4f}"
    notes.append(note)


def check_arithmetic(name, loss, least):
    """Holds the formula against torch's own count of one step; attention as plain products, so that it counts them all."""
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss().backward()
    counted = counter.get_total_flops()
    check(abs(counted / least - 1) < 0.03, f"{name}: the formula gives {least:.4g} FLOP, torch counts {counted:.4g}")
    notes.append(f"{name}: least arithmetic {least / 1e9:.1f} GFLOP a step by formula, torch counts {counted / 1e9:.1f}")


def train_step(loss, optimizer, device, bf16=False):
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        value = loss()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def bench_stage(name, build, goal, device, repeats, products):
    """One optimizer step in the plain form, in ours and in ours with bf16, taken in turns with the best products.

    Returns the seconds of ours.
    """
    torch.manual_seed(0)
    fast, plain, fast_loss, plain_loss, least = build(8, device)
    same_answers(name, fast, plain, fast_loss, plain_loss, torch.bfloat16 in products)
    check_arithmetic(name, fast_loss, least)
    ours = act.adamw(fast, 5e-4, 0.05)
    other = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.05)
    forms = {"ours": lambda: train_step(fast_loss, ours, device), "plain": lambda: train_step(plain_loss, other, device)}
    if torch.bfloat16 in products:
        forms["bf16"] = lambda: train_step(fast_loss, ours, device, bf16=True)
    times = race(device, repeats, forms | {dtype: form for dtype, (_, form) in products.items()})
    compare(f"{name} step, batch 8, fp32", times, "plain", f"≥ {goal} ×")
    if "bf16" in forms:
        row(f"{name} step, batch 8, bf16", seconds(times["bf16"]), f"plain fp32 {seconds(times['plain'])}",
            f"{ratio(times, 'plain', 'bf16'):.2f} ×", "≥ 4 ×")
    for dtype, form, wanted in ((torch.float32, "ours", "≥ 65 %"), (torch.bfloat16, "bf16", "≥ 40 %")):
        if form in times:
            flops, kind = products[dtype][0], "fp32" if form == "ours" else "bf16"
            speed, best = least / statistics.median(times[form]), flops / statistics.median(times[dtype])
            row(f"{name} arithmetic, {kind}", f"{speed / 1e9:.0f} GFLOP/s", f"best product {best / 1e9:.0f} GFLOP/s",
                f"{100 * least / flops * ratio(times, dtype, form):.0f} %", wanted)
    return statistics.median(times["ours"])


def bench_data(device, repeats, stage_two_seconds):
    """Drawing 1024 of 8192 points, normalising, augmenting, and the masks of a batch."""
    B, N = 8, 8192
    points = clouds(64, N, torch.device("cpu")).flatten(0, 1)
    data = act.Clouds(points, torch.arange(65) * N, [str(i) for i in range(64)]).to(device)
    center, generator = torch.empty(B, 64, 3, device=device), torch.Generator().manual_seed(0)

    def prepare():
        xyz, _ = data.draw(torch.arange(B) * 7, 1024)
        act.split_mask(act.random_mask(center, 0.8, generator), device)
        return act.scale_translate(xyz)

    times = race(device, 10 * repeats, {"ours": prepare})["ours"]
    row("data of a batch of 8: draw, normalise, augment, mask", seconds(times), f"stage II step {1e3 * stage_two_seconds:.0f} ms",
        f"{100 * statistics.median(times) / stage_two_seconds:.1f} %", "< 5 %")


def bench_published(device, repeats, product, compiled):
    """The published run on a GPU: batch 128 (stage I: 64), bf16, 300 epochs (Sec. 5)."""
    for name, build, B, size, hours in (("stage I", stage_one, 64, 41_952, 2), ("stage II", stage_two, 128, 52_470, 1)):
        torch.manual_seed(0)
        fast, _, loss, _, least = build(B, device, compiled)
        optimizer = act.adamw(fast, 5e-4, 0.05)
        forms = {"ours": lambda: train_step(loss, optimizer, device, bf16=True), "product": product[1]}
        race(device, 3, forms)  # compiles
        torch.cuda.reset_peak_memory_stats()
        times = race(device, 5 * repeats, forms)
        time_of_step = statistics.median(times["ours"])
        row(f"{name} step, batch {B}, bf16{', compiled' if compiled else ''}", seconds(times["ours"]),
            f"best product {product[0] / statistics.median(times['product']) / 1e12:.0f} TFLOP/s",
            f"{100 * least / product[0] * ratio(times, 'product', 'ours'):.0f} %", "≥ 45 %")
        row(f"{name}, 300 epochs of {size:,} clouds", f"{300 * -(-size // B) * time_of_step / 3600:.2f} h",
            f"{B / time_of_step:.0f} clouds/s", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", f"< {hours} h")


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile on the GPU's published run")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # convolutions of the plain form in float32, as its products are
    repeats = 2 if args.quick else 9

    print(f"{processor()[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
          f"torch {torch.__version__}, numpy {np.__version__}"
          + (f"; {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if device.type == "cuda" else "") + "\n")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"load average {os.getloadavg()[0]:.1f}: other programs run beside this one, times mean little\n")
    row("what", "ours", "beside it", "ratio", "goal")
    row(*["---"] * 5)
    bench_chamfer(device, repeats)  # first: memory freed by others would hide its own
    bench_geometry(device, repeats)
    dtypes = [torch.float32] + [torch.bfloat16] * has_bf16(device)
    products = {dtype: best_product(device, dtype, 2 * repeats) for dtype in dtypes}
    steps = 2 if args.quick else 7
    bench_stage("stage I", stage_one, 1.5, device, steps, products)
    bench_data(device, repeats, bench_stage("stage II", stage_two, 1.8, device, steps, products))
    if device.type == "cuda":
        bench_published(device, repeats, products[torch.bfloat16], args.compile)

    print("\n" + "\n".join(f"- {note}" for note in notes))
    if len(dtypes) == 1:
        print("- this processor has no bf16: its rows are left out")
    if wrong:
        sys.exit("answers differ:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
