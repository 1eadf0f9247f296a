"""ACT: a pretrained 2D Transformer, frozen, becomes a 3D autoencoder, whose features teach a plain 3D Transformer.

R. Dong et al., "Autoencoders as Cross-Modal Teachers: Can Pretrained 2D Image Transformers Help 3D Representation
Learning?", ICLR 2023, arXiv:2212.08320. The whole method in one file, to be read from top to bottom beside the paper;
a reader may stop at the banner "Clouds": nothing above it depends on what is below.

    paper                                          here
    patches: FPS centres, k nearest points         farthest_point_sample, knn, group_points
    Sec. 4.1, patch embedding (mini-PointNet)      PatchEmbed, pos_mlp
    Sec. 4.1, frozen pretrained trunk              load_pretrained, Trunk, Block
    Sec. 4.1, prompt tuning                        Teacher.prefix (deep), Teacher.visual
    Sec. 4.1, discrete VAE, its loss               Teacher, DGCNN, FoldingDecoder, teacher_loss, chamfer_distance
    Sec. 4.2, masked modelling, distillation       random_mask, block_mask, Encoder, Student, distillation_loss
    Sec. 5, transfer                               Classifier, Segmenter, global_feature, linear_svm
    the public release's checkpoints               load, export

Shapes: B batch, N points, G groups (patches), S points per group, C channels, V / M visible / masked groups, K neighbours,
T tokens, P prompts. Centres and patches are (B, G, 3) and (B, G, S, 3); a True in a mask means hidden.

Where this differs from the paper or from the public release:
 1. The teacher of stage II is in eval mode, with argmax codes: targets are deterministic. The release leaves BatchNorm,
    prompt dropout and Gumbel noise on. Gumbel noise is for training only, so evaluation has none either.
 2. Deep prompts are a prefix of keys and values, computed once for a batch: prompt dropout acts once per step.
 3. The student embeds its visible patches only: BatchNorm sees those alone.
 4. Learning rate, temperature and KL weight move with every step (the release: the rate with every epoch); a run shorter
    than the published one scales temperature and KL by its own length, and warms up for a tenth of it at most.
 5. Any trunk is treated alike, BERT too: positions at every block, deep prompts. In the release BERT gets positions once
    and cannot run with deep prompts, and CLIP's attention runs across the clouds of a batch.
 6. FPS has no rule for points near the origin (the release's CUDA kernel never picks one with |p|^2 <= 1e-3).
 7. Frozen protocols freeze everything below the head, class token and statistics included; fine-tuning rotates
    ScanObjectNN only; the result is the last epoch's; the vote is one of ten draws; the optimizer steps once per step.
 8. At size tiny, whose runs take minutes, the tokenizer is not trained: the codes are patches (Teacher.fix_tokenizer), and
    0.6 of the patches are hidden, which leaves the student as many as the paper's 0.8 of 64 does.
 9. BatchNorm's running statistics average the first ten batches evenly, instead of starting from 0 and 1.
10. Deviations of arithmetic only (rounding): products are split where an input repeats (EdgeConv, mini-PointNet,
    FoldingNet, segmentation head), argmax codes are looked up, 1 x 1 convolutions are Linear.
"""

import hashlib
import json
import math
import os
import re
import socket
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------
# Geometry. Batched, on any device, in float32 or better whatever autocast says; distances by subtraction, never by the
# expanded square, which loses every digit of a cloud far from the origin. Each function can be copied out with
# `import torch` and the functions it calls.
# ---------------------------------------------------------------------------------------------------------------------

def farthest_point_sample(xyz, num_samples, generator=None):
    """Indices of `num_samples` mutually distant points (PointNet++, Sec. 3.2).

    xyz: (B, N, 3) -> (B, num_samples) int64. Starts at point 0, or at a random one if `generator` is given; each next is
    argmax_i min_{j chosen} |x_i - x_j|^2, ties to the lowest index. Raises ValueError if num_samples > N.
    On a GPU the loop is bound by launches, so it is captured once per shape as a CUDA graph and replayed.
    """
    B, N, _ = xyz.shape
    if not 1 <= num_samples <= N:
        raise ValueError(f"num_samples must be from 1 to the cloud's {N} points, found {num_samples}")
    # coordinates as three planes: every pass of the loop runs over unit strides
    planes = xyz.detach().to(torch.promote_types(xyz.dtype, torch.float32)).permute(2, 0, 1).contiguous()  # (3, B, N)
    first = torch.zeros(B, 1, dtype=torch.long, device=xyz.device)
    if generator is not None:
        first = torch.randint(N, (B, 1), generator=generator, device=generator.device).to(xyz.device)

    def loop(planes, first):
        idx = first.expand(num_samples, B, 1).clone()
        nearest = torch.full_like(planes[0], float("inf"))
        diff, value = torch.empty_like(planes), planes.new_empty(B, 1)
        for i in range(1, num_samples):
            torch.sub(planes, planes.gather(2, idx[i - 1].expand(3, B, 1)), out=diff)
            diff.mul_(diff)
            diff[0].add_(diff[1]).add_(diff[2])  # (dx² + dy²) + dz², unfused: bit for bit the plain loop
            torch.minimum(nearest, diff[0], out=nearest)
            torch.max(nearest, dim=1, keepdim=True, out=(value, idx[i]))
        return idx[:, :, 0].t().contiguous()  # (B, num_samples)

    if xyz.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return loop(planes, first)
    graphs = farthest_point_sample.__dict__.setdefault("graphs", {})
    key = (B, N, num_samples, planes.dtype, planes.device)
    if key not in graphs:
        try:
            static = planes.clone(), first.clone()
            loop(*static)  # warm-up outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = loop(*static)
            graphs[key] = (graph, *static, out)
        except RuntimeError:  # capture is impossible here (another capture or an old driver): the plain loop, from now on
            graphs[key] = None
    if graphs[key] is None:
        return loop(planes, first)
    graph, static_planes, static_first, out = graphs[key]
    static_planes.copy_(planes)
    static_first.copy_(first)
    graph.replay()
    return out.clone()


def knn(query, xyz, k):
    """The k points of `xyz` nearest to each query: (sqdist (B, Q, k) ascending, idx (B, Q, k) int64), ties by index.

    query: (B, Q, 3), xyz: (B, N, 3); sqdist[b, q, j] = |query[b, q] - xyz[b, idx[b, q, j]]|^2, squared units, without
    gradient. Chunked over the queries: extra memory stays in the tens of megabytes on a CPU, whatever N and Q are.
    Raises ValueError if k > N.
    """
    B, Q, _ = query.shape
    N = xyz.shape[1]
    if not 1 <= k <= N:
        raise ValueError(f"k must be from 1 to the cloud's {N} points, found {k}")
    dtype = torch.promote_types(torch.promote_types(query.dtype, xyz.dtype), torch.float32)
    # The k nearest points lie in the k groups whose nearest members are nearest: first choose groups of g points by their
    # minima, then points within them: two selections of about sqrt(N k) candidates instead of one of N.
    g = 1
    while k > 1 and 4 * g * g * k <= N:
        g *= 2
    M = -(-N // g)  # groups; the point at position (a, m) is m * g + a, so that lower groups hold lower indices
    padded = torch.full((B, M * g, 3), float("inf"), dtype=dtype, device=xyz.device)
    padded[:, :N] = xyz.detach()
    planes = padded.view(B, M, g, 3).permute(3, 0, 2, 1).contiguous()  # (3, B, g, M)
    query = query.detach().to(dtype).permute(2, 0, 1).contiguous()  # (3, B, Q)

    def smallest(value, index, count):
        """The `count` smallest of (value, index) in lexicographic order: unique integer keys make ties exact."""
        if value.dtype == torch.float64:  # no room for the index beside 64 bits: a stable sort in order of index
            index, order = index.expand_as(value).sort(dim=-1)
            value, stable = value.gather(-1, order).sort(dim=-1, stable=True)
            return value[..., :count], index.gather(-1, stable[..., :count])
        key = value.view(torch.int32).long() << 32 | index  # floats >= 0 order as their bits do
        key = key.topk(count, dim=-1, largest=False)[0]
        return (key >> 32).int().view(torch.float32), key & 0xFFFFFFFF

    position = torch.arange(M * g, device=xyz.device).view(M, g).t()  # (g, M) -> index of the point
    out = []
    budget = 2**19 if xyz.device.type == "cpu" else 2**26  # a chunk that stays in a core's cache, or fills a GPU
    step = min(Q, max(1, budget // (B * M * g)))
    buffer = planes.new_empty(3 * B * step * g * M)  # allocated once: fresh pages would cost more than the arithmetic
    for part in query.split(step, dim=2):
        diff = buffer[: part.numel() * g * M].view(*part.shape, g, M)
        torch.sub(part[..., None, None], planes[:, :, None], out=diff)  # (3, B, q, g, M)
        diff *= diff
        sqdist = diff[0].add_(diff[1]).add_(diff[2])  # (B, q, g, M)
        if k == 1:
            out.append(sqdist.flatten(2).min(dim=-1, keepdim=True))  # min takes the first
            continue
        index = position
        if g > 1:
            _, group = smallest(sqdist.amin(dim=2), torch.arange(M, device=xyz.device), k)  # (B, q, k)
            sqdist = sqdist.gather(3, group[:, :, None].expand(-1, -1, g, -1))  # (B, q, g, k)
            index = group[:, :, None] * g + torch.arange(g, device=xyz.device)[:, None]
        out.append(smallest(sqdist.flatten(2), index.flatten(-2), k))
    return tuple(torch.cat(parts, dim=1) for parts in zip(*out))


def gather_points(values, idx):
    """Rows by index: out[b, ...] = values[b, idx[b, ...]]. values: (B, N, C), idx: (B, ...) int64 -> (B, ..., C)."""
    B, N, C = values.shape
    flat = idx.reshape(B, -1) + torch.arange(B, device=idx.device)[:, None] * N
    # as an embedding look-up, whose backward is a parallel sum over rows
    return torch.nn.functional.embedding(flat, values.reshape(B * N, C)).view(*idx.shape, C)


def group_points(xyz, num_group, group_size):
    """Patches of a cloud (Sec. 4.1): farthest-point centres and the nearest points around each.

    xyz: (B, N, 3) -> neighborhood (B, G, S, 3), each relative to its centre, nearest point first; center (B, G, 3).
    Raises ValueError if the cloud has fewer than `num_group` or `group_size` points.
    """
    center = gather_points(xyz, farthest_point_sample(xyz, num_group))  # (B, G, 3)
    _, idx = knn(center, xyz, group_size)
    return gather_points(xyz, idx) - center[:, :, None], center


def chamfer_distance(a, b, norm=1):
    """Chamfer distance of two batches of point sets, mean over the batch -> scalar, with gradients to both.

    a: (B, N, 3), b: (B, M, 3). norm=1: 1/2 (mean_a min_b |a - b| + mean_b min_a |a - b|), the paper's CD-L1, in the
    clouds' unit; norm=2: mean_a min_b |a - b|^2 + mean_b min_a |a - b|^2, squared unit, no 1/2. The neighbours are
    searched without gradient (they are piecewise constant), so memory stays bounded; |0| has gradient 0.
    """
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, found {norm!r}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    total = 0
    for one, other in ((a, b), (b, a)):
        nearest = gather_points(other, knn(one, other, 1)[1][..., 0])
        sqdist = (one - nearest).square().sum(-1)  # (B, N)
        if norm == 1:  # the square root's slope is infinite at 0: step around it
            sqdist = torch.where(sqdist > 0, sqdist, 1).sqrt() * (sqdist > 0) / 2
        total = total + sqdist.mean()
    return total


def fscore(pred, target, threshold=0.01):
    """F-score of reconstruction: harmonic mean of precision and recall at `threshold`, a distance (not squared).

    pred: (B, N, 3), target: (B, M, 3) -> (B,) in 0..1; 0 where precision and recall both are 0.
    """
    precision = (knn(pred, target, 1)[0].sqrt() < threshold).float().mean(dim=(1, 2))
    recall = (knn(target, pred, 1)[0].sqrt() < threshold).float().mean(dim=(1, 2))
    return 2 * precision * recall / (precision + recall).clamp_min(1e-12)


def interpolate(xyz, center, features):
    """Features carried from centres to points by inverse squared distance (PointNet++, Sec. 3.4).

    xyz: (B, N, 3), center: (B, G, 3), features: (B, G, C) -> (B, N, C): sum_j w_j features[j] over the 3 nearest centres,
    w_j proportional to 1 / (d_j^2 + 1e-8), summing to 1. With fewer than 3 centres, all of them.
    """
    sqdist, idx = knn(xyz, center, min(3, center.shape[1]))
    weight = 1 / (sqdist + 1e-8)
    weight = weight / weight.sum(dim=-1, keepdim=True)
    return (gather_points(features, idx) * weight[..., None]).sum(dim=2).to(features.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Transformer. One Block for the trunk, the student and its decoder; parameter names are timm's.
# ---------------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention; `prefix` puts further keys and values in front of those of the tokens."""

    def __init__(self, dim, num_heads, qkv_bias=True):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of the {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x):
        """(B, T, n * C) -> n tensors (B, heads, T, C / heads)."""
        B, T, _ = x.shape
        return x.view(B, T, -1, self.num_heads, self.proj.in_features // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def keys_values(self, x):
        """Keys and values alone, for tokens whose own output nobody reads."""
        C = self.proj.in_features
        return self.split_heads(F.linear(x, self.qkv.weight[C:], None if self.qkv.bias is None else self.qkv.bias[C:]))

    def forward(self, x, prefix=None):
        B, T, C = x.shape
        q, k, v = self.split_heads(self.qkv(x))  # (B, heads, T, C / heads)
        if prefix is not None:
            k, v = (torch.cat([p.to(t.dtype).expand(B, -1, -1, -1), t], dim=2) for p, t in zip(prefix, (k, v)))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    def __init__(self, dim, hidden, quick_gelu=False):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = QuickGELU() if quick_gelu else nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT; DINOv2)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    """Drops the whole residual branch of a sample with probability p, in training; the rest is scaled by 1 / (1 - p)."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.p)
        return x * (keep / (1 - self.p))


class Block(nn.Module):
    """Transformer block: pre-norm (ViT, CLIP, the student) or post-norm (BERT). (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, num_heads, mlp_hidden=None, qkv_bias=True, eps=1e-5, norm_first=True, layer_scale=False,
                 quick_gelu=False, drop_path=0.0):
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_hidden or 4 * dim, quick_gelu)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def prefix(self, prompts):
        """Keys and values that prompt tokens (1, P, C) contribute to this block's attention."""
        return self.attn.keys_values(self.norm1(prompts) if self.norm_first else prompts)

    def forward(self, x, prefix=None):
        if self.norm_first:
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), prefix)))
            return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        x = self.norm1(x + self.drop_path(self.attn(x, prefix)))
        return self.norm2(x + self.drop_path(self.mlp(x)))


@dataclass
class TrunkConfig:
    """Sizes and kind of a pretrained Transformer. The second group describes its image side, absent if patch_size = 0."""
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_hidden: int = 3072
    eps: float = 1e-6
    norm_first: bool = True
    qkv_bias: bool = True
    layer_scale: bool = False
    quick_gelu: bool = False
    norm_pre: bool = False  # CLIP's ln_pre
    final_norm: bool = True  # BERT has none

    patch_size: int = 0
    patch_bias: bool = True
    grid: int = 0  # the position table holds grid x grid patches ...
    num_cls: int = 1  # class tokens: 2 with DeiT's distillation token
    num_reg: int = 0  # DINOv2's registers, which have no position
    cls_pos: bool = True  # ... and the class tokens


class Trunk(nn.Module):
    """A plain Transformer: a ViT on images, or its blocks alone on tokens of any origin."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.patch_size:
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=c.patch_bias)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
            if c.num_cls == 2:
                self.dist_token = nn.Parameter(torch.zeros(1, 1, c.width))
            if c.num_reg:
                self.reg_token = nn.Parameter(torch.zeros(1, c.num_reg, c.width))
            self.pos_embed = nn.Parameter(torch.zeros(1, c.grid**2 + c.cls_pos * c.num_cls, c.width))
        self.norm_pre = nn.LayerNorm(c.width, eps=c.eps) if c.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(c.width, c.num_heads, c.mlp_hidden, c.qkv_bias, c.eps, c.norm_first, c.layer_scale, c.quick_gelu)
            for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=c.eps) if c.final_norm else nn.Identity()
        for module in self.modules():  # as timm starts a ViT; a random trunk is the baseline of the pretrained ones
            if isinstance(module, nn.Linear):
                init_linear(module)

    def forward_tokens(self, tokens):
        """The blocks and the final norm alone (CLIP: ln_pre first). (B, T, C) -> (B, T, C)."""
        tokens = self.norm_pre(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward_features(self, images):
        """Images (B, 3, H, W), normalised as the weights' publisher does, -> (B, T, C) after the final norm.

        T: class token(s), registers, then the patches row by row. At a size other than the published one the position
        table is resampled (bicubic, antialiased, as timm). Raises ValueError for a language model.
        """
        c = self.config
        if not c.patch_size:
            raise ValueError("this trunk has no image side (a language model, or a teacher's blocks): use forward_tokens")
        x = self.patch_embed.proj(images)
        B, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, H W, C)
        cls = self.cls_token if c.num_cls == 1 else torch.cat([self.cls_token, self.dist_token], dim=1)
        cls_pos, pos = self.pos_embed.split([self.pos_embed.shape[1] - c.grid**2, c.grid**2], dim=1)
        if (H, W) != (c.grid, c.grid):
            pos = pos.transpose(1, 2).unflatten(2, (c.grid, c.grid))
            pos = F.interpolate(pos, (H, W), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        cls = cls + cls_pos if c.cls_pos else cls
        reg = self.reg_token if c.num_reg else x[:1, :0]
        return self.forward_tokens(torch.cat([cls.expand(B, -1, -1), reg.expand(B, -1, -1), x + pos], dim=1))


def init_linear(module):
    """Truncated normal 0.02 and zero bias: how ViTs, and the release's student, begin."""
    nn.init.trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def seeded(device, *numbers):
    """A generator that depends on the numbers alone: what a step draws needs no memory of the steps before it."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


# ---------------------------------------------------------------------------------------------------------------------
# Public weights. One table of names per published layout, checked in both directions: a key that no name covers, or a
# parameter that no key fills, is an error.
# ---------------------------------------------------------------------------------------------------------------------

_AUGREG = ("https://storage.googleapis.com/vit_models/augreg/{}_16-i21k-300ep-lr_0.001-aug_{}-wd_{}-do_0.0-sd_0.0"
           "--imagenet2012-steps_20k-lr_{}-res_{}.npz")
_FAIR = "https://dl.fbaipublicfiles.com/"
_CLIP = "https://openaipublic.azureedge.net/clip/models/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/"
_HUGGING_FACE = "https://huggingface.co/{}/resolve/main/model.safetensors"
_PUBLISHED = {
    "vit_tiny_patch16_224": _AUGREG.format("Ti", "none", "0.03", "0.03", 224),
    "vit_small_patch16_384": _AUGREG.format("S", "light1", "0.03", "0.03", 384),
    "vit_base_patch16_384": _AUGREG.format("B", "medium1", "0.1", "0.01", 384),
    "deit_tiny_patch16_224": _FAIR + "deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": _FAIR + "deit/deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": _FAIR + "deit/deit_base_patch16_224-b5f2ef4d.pth",
    "deit_base_distilled_patch16_384": _FAIR + "deit/deit_base_distilled_patch16_384-d0272ac0.pth",
    "dino_vits16": _FAIR + "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vitb16": _FAIR + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dinov2_vits14": _FAIR + "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": _FAIR + "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "mae_vit_base": _FAIR + "mae/pretrain/mae_pretrain_vit_base.pth",
    "clip_vit_b16": _CLIP + "ViT-B-16.pt",
    "bert_base": _HUGGING_FACE.format("google-bert/bert-base-uncased"),
    "roberta_base": _HUGGING_FACE.format("FacebookAI/roberta-base"),
    "minilm_l6": _HUGGING_FACE.format("sentence-transformers/all-MiniLM-L6-v2"),
}

# What is spelt in several ways, made one before the tables are asked: Hugging Face's models with a head, BERT's first
# files, transformers 5; Point-MAE, segmenters, the trunks of teachers.
_SPELLINGS = (
    (r"^(bert|roberta|vit)\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^layers\.", "encoder.layer."), (r"^MAE_", "ACT_"), (r"^(label_conv|propagation_0|convs\d|bns\d)_cls\.", r"\1."),
    (r"^visual_embed\.[01]\.(layer\.)?(?=\d)", "trunk.blocks."))
# Within a block, whatever the layout: our name, and all that it goes by.
_BLOCK = {theirs: ours for ours, names in {
    "norm1.": "norm1. ln_1. layernorm_before. LayerNorm_0. attention.output.LayerNorm.",
    "norm2.": "norm2. ln_2. layernorm_after. LayerNorm_2. output.LayerNorm.",
    "attn.qkv.": "attn.qkv. attn.in_proj_ self_attention.in_proj_",
    "attn.q.": "attention.attention.query. attention.self.query. attention.q_proj. MultiHeadDotProductAttention_1.query.",
    "attn.k.": "attention.attention.key. attention.self.key. attention.k_proj. MultiHeadDotProductAttention_1.key.",
    "attn.v.": "attention.attention.value. attention.self.value. attention.v_proj. MultiHeadDotProductAttention_1.value.",
    "attn.proj.": "attn.proj. attn.out_proj. self_attention.out_proj. attention.output.dense. attention.o_proj. "
                  "MultiHeadDotProductAttention_1.out.",
    "mlp.fc1.": "mlp.fc1. mlp.c_fc. mlp.0. mlp.linear_1. intermediate.dense. MlpBlock_3.Dense_0.",
    "mlp.fc2.": "mlp.fc2. mlp.c_proj. mlp.3. mlp.linear_2. output.dense. MlpBlock_3.Dense_1.",
    "ls1.": "ls1.", "ls2.": "ls2."}.items() for theirs in names.split()}


def _table(text):
    """A table of names from words old=new, same, dropped= : {what a key begins with: our name, "": dropped}."""
    return {old: new if equals else old for old, equals, new in (word.partition("=") for word in text.split())}


# Around the blocks: of the names that a key begins with the first counts. A layout is told by its first name.
_LAYOUTS = {
    "timm": _table("""blocks. cls_token dist_token reg_token register_tokens=reg_token pos_embed patch_embed. norm. head.=
        head_dist.= pre_logits.= mask_token= decoder_= dino_head.= ibot_head.="""),
    "torchvision": _table("""encoder.layers.encoder_layer_=blocks. class_token=cls_token encoder.pos_embedding=pos_embed
        conv_proj.=patch_embed.proj. encoder.ln.=norm. heads.="""),
    "huggingface": _table("""encoder.layer.0.layernorm_before.=blocks.0.norm1. encoder.layer.=blocks. layernorm.=norm.
        embeddings.cls_token=cls_token embeddings.position_embeddings=pos_embed embeddings.mask_token=
        embeddings.patch_embeddings.projection.=patch_embed.proj. pooler.= classifier.= decoder.="""),
    "clip": _table("""visual.transformer.resblocks.=blocks. visual.class_embedding=cls_token visual.ln_pre.=norm_pre.
        visual.positional_embedding=pos_embed visual.conv1.=patch_embed.proj. visual.ln_post.=norm. visual.proj=
        transformer.= token_embedding.= ln_final.= positional_embedding= text_projection= logit_scale=
        input_resolution= context_length= vocab_size="""),
    "jax": _table("""Transformer.encoderblock_=blocks. cls=cls_token Transformer.posembed_input.pos_embedding=pos_embed
        embedding.=patch_embed.proj. Transformer.encoder_norm.=norm. head.= pre_logits.="""),
    "bert": _table("""encoder.layer.0.attention.output.LayerNorm.=blocks.0.norm1. encoder.layer.=blocks. embeddings.=
        pooler.= cls.= lm_head.= classifier.= qa_outputs.="""),
}


def pretrained_names():
    """The names `load_pretrained` knows, each with the public address of its file: {name: url}."""
    return dict(_PUBLISHED)


def _download(name):
    """Published weights in torch.hub's cache, fetched on first use; hash checked where the publisher gives one."""
    url, timeout = _PUBLISHED[name], socket.getdefaulttimeout()
    file = url.rsplit("/", 1)[1].replace("model.safetensors", f"{name}.safetensors")  # Hugging Face has but one file name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.exists():
        return path
    digest = re.search(r"(?<=-)[0-9a-f]{8}(?=\.pth$)|(?<=/)[0-9a-f]{64}(?=/)", url)
    try:
        socket.setdefaulttimeout(10)  # torch.hub offers no other way to bound the wait
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest and digest[0])
        read_tensors(path)  # a transfer cut short has no hash to fail, and must not stay in the cache
    except Exception as error:  # whatever the network or the disk trips over
        if path.exists():
            path.unlink()
        raise ValueError(f"weights {name!r}: not in the cache as {path}, and {url} did not give them ({error}); "
                         "download the file there by other means") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _read_safetensors(data):
    """8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then raw little-endian tensors."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
              "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
    start = 8 + int.from_bytes(data[:8], "little")
    header, body, state = json.loads(data[8:start]), bytearray(data[start:]), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        (begin, end), dtype, shape = entry["data_offsets"], dtypes[entry["dtype"]], entry["shape"]
        n = math.prod(shape)
        if not 0 <= begin <= end <= len(body) or n * dtype.itemsize != end - begin:
            raise ValueError(f"tensor {name} does not fit in the file")
        state[name] = torch.frombuffer(body, dtype=dtype, count=n, offset=begin).view(shape) if n else torch.empty(shape)
    return state


# Stand in for the numpy scalars and small arrays among a checkpoint's metrics, which nobody reads: none of their code runs.
_NUMPY_NAMES = [
    type(name, (), {"__module__": module, "__init__": lambda self, *args: None, "__setstate__": lambda self, state: None})
    for module, name in (("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode"),
                         ("numpy.core.multiarray", "scalar"), ("numpy.core.multiarray", "_reconstruct"),  # numpy 1, and 2:
                         ("numpy._core.multiarray", "scalar"), ("numpy._core.multiarray", "_reconstruct"))]


def read_tensors(path):
    """What a weight file holds, on the CPU: .pth .pt .bin, .safetensors, .npz or a TorchScript archive, told by content.

    Runs nothing from the file: torch.load admits tensors and plain values only, npz arrays only; a TorchScript archive that
    brings code to run on loading is refused. Raises ValueError, naming the file, if it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    allowed = list(torch.serialization.get_safe_globals())
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:] == b"{":
            return _read_safetensors(path.read_bytes())
        if head[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if any(b"__setstate__" in archive.read(name) for name in names if name.endswith(".py")):
                    raise ValueError("a TorchScript archive with code that runs on loading")
            if all(name.endswith(".npy") for name in names):
                with np.load(path, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(array) for name, array in arrays.items()}
            if any(name.endswith("/constants.pkl") for name in names):
                return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        torch.serialization.add_safe_globals(_NUMPY_NAMES)
        with open(path, "rb") as file:  # not by path: torch would go by the extension
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the readers trip over
        code = re.search(r"GLOBAL (\S+)", str(error))  # so torch names it, with much advice that is better not given
        reason = f"it would run {code[1]}" if code else str(error).rpartition("error: ")[2].strip().split("\n")[0]
        raise ValueError(f"{path}: not a readable weight file, corrupt or of another kind "
                         f"({reason or type(error).__name__})") from error
    finally:  # torch 2.4 has no context manager for this
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _state_dict(obj, path):
    """The flat dict of tensors inside the usual wrappings, its keys dotted and without the prefixes that wrappers add."""
    for key in ("model", "state_dict", "teacher", "base_model", "model_state_dict"):
        if isinstance(obj, dict) and isinstance(obj.get(key), dict):
            obj = obj[key]
    state = {str(k): v for k, v in obj.items() if isinstance(v, torch.Tensor)} if isinstance(obj, dict) else {}
    if not state:
        raise ValueError(f"{path}: holds no tensors by name, wanted a state dict")
    prefix = r"^(module\.|backbone\.|base_model\.|opt\.target\.)+"
    return {re.sub(prefix, "", k.replace("/", ".")): v for k, v in state.items()}


def _translate(state, tables, what, path):
    """(name of the table that fits, the state under our names). Each key must be covered, and alone in its place."""
    spelt = list(state)
    for old, new in _SPELLINGS:
        spelt = [re.sub(old, new, name) for name in spelt]
    told = next((kind for kind, table in tables.items() if any(name.startswith(next(iter(table))) for name in spelt)), None)
    if told is None:
        raise ValueError(f"{path}: holds no {what} of a known layout ({', '.join(tables)}): {', '.join(spelt[:3])} …")

    def rename(name, table):
        old = next((old for old in table if name.startswith(old)), None)
        if old is None:
            raise ValueError(f"{path}: stray key {key!r} (shape {tuple(value.shape)}) is in no file of the layout {told}")
        return table[old] and table[old] + name.removeprefix(old)

    out = {}
    for (key, value), name in zip(state.items(), spelt):
        new = rename(name, tables[told])
        if block := re.match(r".*blocks\.\d+\.", new):
            new = block[0] + rename(new[block.end():], _BLOCK)
        if new in out:
            raise ValueError(f"{path}: stray key {key!r}, since another one is {new!r} already")
        if new:
            out[new] = value
    return told, out


def _fuse_qkv(state):
    """Separate query, key and value matrices become one, in that order."""
    for query in [key for key in state if ".attn.q." in key]:
        parts = [state.pop(query.replace(".attn.q.", f".attn.{letter}.")) for letter in "qkv"]
        state[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return state


def _from_jax(key, value):
    """JAX keeps matrices as (in, out), heads apart, and images as (H, W, in, out). -> key and value as torch has them."""
    if key == "patch_embed.proj.kernel":
        value = value.permute(3, 2, 0, 1)
    elif key.endswith(".kernel"):
        value = (value.flatten(0, 1) if ".attn.proj." in key else value.flatten(1)).t()
    elif key.endswith(".bias"):
        value = value.flatten()
    return re.sub(r"\.(kernel|scale)$", ".weight", key), value


def load_pretrained(name_or_path, num_heads=None):
    """A pretrained Transformer as a `Trunk` in eval mode, from a name of `pretrained_names()` or a file.

    Layouts: timm / DeiT / MAE / DINO / DINOv2, torchvision, Hugging Face ViT, OpenAI CLIP's visual tower, JAX AugReg .npz,
    BERT and RoBERTa. Heads: config.json beside the file, else `num_heads`, else what the file says (JAX), else width // 64.
    Raises ValueError, naming the file, if it is missing, corrupt, of another family, or a key is stray or missing.
    """
    name = str(name_or_path)
    path = _download(name) if name in _PUBLISHED else Path(name)
    if not path.is_file():
        raise ValueError(f"{path}: neither a file nor one of the known names: {', '.join(_PUBLISHED)}")
    state = _state_dict(read_tensors(path), path)
    beside = path.parent / "config.json"  # as Hugging Face publishes it
    try:
        config = dict(json.loads(beside.read_text())) if beside.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{beside}: not a JSON object ({error})") from error
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{beside}: hidden_act {config['hidden_act']!r}, wanted 'gelu'")
    roberta = any(k.startswith("roberta.") or v.shape[:1] == (514,) and "position_embeddings" in k
                  for k, v in state.items())
    layout, state = _translate(state, _LAYOUTS, "Transformer", path)
    heads = config.get("num_attention_heads") or num_heads or {"minilm_l6": 12}.get(name)
    try:
        if layout == "jax":
            heads = heads or state["blocks.0.attn.q.kernel"].shape[1]
            state = dict(_from_jax(*item) for item in state.items())
        sizes = _trunk_config(_fuse_qkv(state), layout, heads, config.get("layer_norm_eps") or (1e-5 if roberta else None))
        if config.get("hidden_size", sizes.width) != sizes.width:
            raise ValueError(f"width {sizes.width}, but the config.json beside it says {config['hidden_size']}")
        for key in {"cls_token", "pos_embed"} & set(state):  # CLIP leaves out the batch dimensions
            state[key] = state[key].reshape(1, -1, sizes.width)
        trunk = Trunk(sizes)
    except Exception as error:  # a KeyError for a missing tensor, and whatever one of an unexpected shape trips over
        raise ValueError(f"{path}: its tensors, or num_heads, make no Transformer: {error!r}") from error
    return load_exactly(trunk, state, path).eval()


def _trunk_config(state, layout, num_heads=None, eps=None):
    """Sizes of a trunk read off its tensors, under our names; what no tensor tells is the layout's."""
    width = state["blocks.0.attn.qkv.weight"].shape[1]
    config = TrunkConfig(
        width=width, depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        num_heads=num_heads or max(1, width // 64), mlp_hidden=state["blocks.0.mlp.fc1.weight"].shape[0],
        eps=eps or {"huggingface": 1e-12, "bert": 1e-12, "clip": 1e-5}.get(layout, 1e-6),
        norm_first=layout != "bert", final_norm=layout != "bert", norm_pre=layout == "clip", quick_gelu=layout == "clip",
        qkv_bias="blocks.0.attn.qkv.bias" in state, layer_scale="blocks.0.ls1.gamma" in state)
    if {"cls_token", "pos_embed", "patch_embed.proj.weight"} & state.keys():
        config.patch_size = state["patch_embed.proj.weight"].shape[-1]
        config.patch_bias = "patch_embed.proj.bias" in state
        positions = state["pos_embed"].numel() // width
        config.grid = math.isqrt(positions)
        config.num_cls = 1 + ("dist_token" in state)
        config.num_reg = state["reg_token"].shape[1] if "reg_token" in state else 0
        config.cls_pos = positions != config.grid**2
    return config


def load_exactly(model, state, path, fresh=()):
    """Loads a state dict whose keys and shapes must be the model's, but for the parameters under the prefixes `fresh`.

    Raises ValueError naming the file and the first missing key, stray key and differing shape. Returns the model.
    """
    own = model.state_dict()
    wrong = ([f"missing key {k!r}" for k in own if k not in state and not k.startswith(tuple(fresh))],
             [f"stray key {k!r}" for k in state if k not in own],
             [f"shape {tuple(v.shape)} of {k!r}, not {tuple(own[k].shape)}" for k, v in state.items()
              if k in own and v.shape != own[k].shape])
    if any(wrong):
        found = " and ".join(f"{faults[0]} ({len(faults)} in all)" for faults in wrong if faults)
        raise ValueError(f"{path}: {found}, wanted exactly the parameters of a {type(model).__name__}")
    model.load_state_dict(state, strict=not fresh)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------------------------------

class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _SumOverProcesses.forward(ctx, grad)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over all axes but the last, across all processes: (..., C) -> (..., C).

    The first ten batches are averaged evenly: coordinates have variances near 1e-3, which a start at 1 would hide for a
    hundred steps. torch's SyncBatchNorm is for GPUs only; this one also counts uneven shares right.
    """

    def __init__(self, dim):
        super().__init__(dim)
        self.seen = 0  # batches, counted to 10

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.seen = min(10, int(self.num_batches_tracked))

    def forward(self, x):
        rows = x.flatten(0, -2)
        if self.training:
            self.seen = min(10, self.seen + 1)
            self.momentum = 1 / self.seen
        if not self.training or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return super().forward(rows).view_as(x)
        rows, reduce = rows.float(), _SumOverProcesses.apply
        total = reduce(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
        count = total[-1].detach()
        mean = total[:-1] / count
        var = reduce((rows - mean).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return ((rows - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype).view_as(x)


class PatchEmbed(nn.Module):
    """Mini-PointNet (PointNet, Sec. 4.2; here Sec. 4.1): one vector per patch. (..., S, 3) -> (..., C)."""

    def __init__(self, dim):
        super().__init__()
        self.first_conv = nn.Sequential(nn.Linear(3, 128), BatchNorm(128), nn.ReLU(), nn.Linear(128, 256))
        self.second_conv = nn.Sequential(nn.Linear(512, 512), BatchNorm(512), nn.ReLU(), nn.Linear(512, dim))

    def forward(self, neighborhood):
        point = self.first_conv(neighborhood)  # (..., S, 256)
        patch = point.amax(dim=-2)  # (..., 256)
        # Linear([patch ; point]) = its patch half, once per patch, + its point half
        linear = self.second_conv[0]
        patch = F.linear(patch, linear.weight[:, :256], linear.bias)
        x = F.linear(point, linear.weight[:, 256:]) + patch.unsqueeze(-2)  # (..., S, 512)
        return self.second_conv[1:](x).amax(dim=-2)


def pos_mlp(dim):
    """Position of a patch: an MLP of its centre (Sec. 4.1)."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))


# ---------------------------------------------------------------------------------------------------------------------
# Teacher: stage I (Sec. 4.1), a discrete VAE around a frozen pretrained Transformer
# ---------------------------------------------------------------------------------------------------------------------

def group_norm(x, norm):
    """GroupNorm, channels last, as the map x * scale + shift that it amounts to: (B, ..., C) -> scale, shift (B, C)."""
    B, C = x.shape[0], x.shape[-1]
    x = x.float().view(B, -1, C)
    mean = x.mean(dim=1)  # (B, C); two plain passes are several times faster on CPUs than var_mean over a strided axis
    var = (x - mean[:, None]).square().mean(dim=1)
    mean, var = mean.view(B, norm.num_groups, -1), var.view(B, norm.num_groups, -1)
    center = mean.mean(dim=2, keepdim=True)
    var = var.mean(dim=2, keepdim=True) + (mean - center).square().mean(dim=2, keepdim=True)
    scale = (var + norm.eps).rsqrt() * norm.weight.view(norm.num_groups, -1)  # (B, groups, C / groups)
    return scale.view(B, C), (norm.bias.view(norm.num_groups, -1) - center * scale).view(B, C)


class EdgeConv(nn.Sequential):
    """Edge convolution (DGCNN, Sec. 3.1): max_j LeakyReLU(GroupNorm(W [f_j - f_i ; f_i])) over the neighbours j of i."""

    def __init__(self, dim, out):
        super().__init__(nn.Linear(2 * dim, out, bias=False), nn.GroupNorm(4, out))

    def forward(self, f, graph):
        linear, norm = self
        # W [f_j - f_i ; f_i] = W1 f_j + (W2 - W1) f_i: two products per point instead of one per edge
        w1, w2 = linear.weight.chunk(2, dim=1)
        edge = gather_points(F.linear(f, w1), graph) + F.linear(f, w2 - w1)[:, :, None]  # (B, G, K, out)
        scale, shift = (t[:, None] for t in group_norm(edge, norm))
        # an affine map and LeakyReLU keep order (or reverse it), so the maximum can be taken first
        edge = torch.where(scale >= 0, edge.amax(dim=2), edge.amin(dim=2))  # (B, G, out)
        return F.leaky_relu(edge * scale + shift, 0.2)


class DGCNN(nn.Module):
    """Four EdgeConvs on the graph of the nearest centres, then one Linear of all their outputs. (B, G, in) -> (B, G, out)."""

    def __init__(self, dim, out):
        super().__init__()
        self.input_trans = nn.Linear(dim, 128)
        self.layer1 = EdgeConv(128, 256)
        self.layer2 = EdgeConv(256, 512)
        self.layer3 = EdgeConv(512, 512)
        self.layer4 = EdgeConv(512, 1024)
        self.layer5 = nn.Sequential(nn.Linear(2304, out, bias=False), nn.GroupNorm(4, out))

    def edges(self, f, graph):
        """The outputs of the four EdgeConvs, concatenated: (B, G, 2304)."""
        f1 = self.layer1(self.input_trans(f), graph)
        f2 = self.layer2(f1, graph)
        f3 = self.layer3(f2, graph)
        return torch.cat([f1, f2, f3, self.layer4(f3, graph)], dim=-1)

    def forward(self, f, graph):
        f = self.layer5[0](self.edges(f, graph))
        scale, shift = group_norm(f, self.layer5[1])
        return F.leaky_relu(f * scale[:, None] + shift[:, None], 0.2)


class FoldingDecoder(nn.Module):
    """FoldingNet: a feature per patch -> S/4 coarse points, each unfolded on a 2 x 2 grid -> S fine points."""

    def __init__(self, dim, group_size):
        super().__init__()
        if group_size % 4:
            raise ValueError(f"group_size must be a multiple of 4, found {group_size}")
        self.mlp = nn.Sequential(nn.Linear(dim, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                                 nn.Linear(1024, 3 * group_size // 4))
        self.final_conv = nn.Sequential(nn.Linear(dim + 5, 512), BatchNorm(512), nn.ReLU(),
                                        nn.Linear(512, 512), BatchNorm(512), nn.ReLU(), nn.Linear(512, 3))
        grid = torch.tensor([[-0.05, -0.05], [0.05, -0.05], [-0.05, 0.05], [0.05, 0.05]])  # the first varies fastest
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, feature):
        B, G, C = feature.shape
        coarse = self.mlp(feature).view(B, G, -1, 3).float()  # (B, G, S/4, 3)
        # Linear([feature ; grid ; coarse]) in three parts: once per patch, per grid point, per coarse point
        linear = self.final_conv[0]
        w_feature, w_grid, w_coarse = linear.weight.split([C, 2, 3], dim=1)
        x = (F.linear(feature, w_feature, linear.bias)[:, :, None] + F.linear(coarse, w_coarse))[:, :, :, None]
        x = x + F.linear(self.grid, w_grid)  # (B, G, S/4, 4, 512)
        fine = self.final_conv[1:](x).float() + coarse[:, :, :, None]
        return coarse, fine.flatten(2, 3)  # (B, G, S, 3): fine point 4 m + s belongs to coarse point m


@dataclass
class TeacherConfig:
    """Sizes of the stage I autoencoder; the defaults are the paper's."""
    num_group: int = 64
    group_size: int = 32
    encoder_dims: int = 384
    tokens_dims: int = 384
    decoder_dims: int = 384
    num_tokens: int = 8192  # codes
    prompt: str = "deep"  # deep, shallow or none
    num_prompt: int = 64
    prompt_dropout: float = 0.1
    tokenizer: str = "trained"  # or fixed, for runs of minutes: Teacher.fix_tokenizer
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    weights: str = "random"  # what the trunk was initialised from

    def __post_init__(self):
        if isinstance(self.trunk, dict):  # from a checkpoint
            self.trunk = TrunkConfig(**self.trunk)
        if self.prompt not in ("deep", "shallow", "none"):
            raise ValueError(f"prompt must be deep, shallow or none, found {self.prompt!r}")
        if self.tokenizer not in ("trained", "fixed"):
            raise ValueError(f"tokenizer must be trained or fixed, found {self.tokenizer!r}")


class TeacherOutput(NamedTuple):
    coarse: torch.Tensor  # (B, G, S/4, 3), relative to the centres, as are fine and neighborhood
    fine: torch.Tensor  # (B, G, S, 3)
    neighborhood: torch.Tensor  # (B, G, S, 3)
    center: torch.Tensor  # (B, G, 3)
    logits: torch.Tensor  # (B, G, codes)


class Teacher(nn.Module):
    """The 3D autoencoder (Sec. 4.1): patches -> codes -> prompted frozen trunk -> features -> patches.

    Everything is trained but the trunk (and a fixed tokenizer), whose gradients, statistics and dropout are off for good.
    """

    def __init__(self, config=None, trunk=None):
        super().__init__()
        c = config or TeacherConfig()
        c = self.config = replace(c, trunk=replace(trunk.config if trunk else c.trunk, patch_size=0))  # no image side
        self.trunk = Trunk(c.trunk)
        if trunk is not None:
            own = self.trunk.state_dict()
            self.trunk.load_state_dict({k: v for k, v in trunk.state_dict().items() if k in own})
        self.encoder = PatchEmbed(c.encoder_dims)
        self.dgcnn_1 = DGCNN(c.encoder_dims, c.num_tokens)
        self.codebook = nn.Parameter(torch.randn(c.num_tokens, c.tokens_dims))
        width, depth = c.trunk.width, c.trunk.depth
        self.proj_pre = nn.Linear(c.tokens_dims, width)
        self.visual_pos_embed = pos_mlp(width)
        self.proj_post = nn.Linear(width, c.tokens_dims)
        if c.prompt != "none":
            self.visual_prompt_token = nn.Parameter(torch.empty(1, c.num_prompt, width))
            self.visual_prompt_pos = nn.Parameter(torch.empty(1, c.num_prompt, width))
        if c.prompt == "deep":
            self.deep_prompt_tokens = nn.Parameter(torch.empty(depth - 1, c.num_prompt, width))
            self.deep_prompt_pos = nn.Parameter(torch.empty(depth - 1, c.num_prompt, width))
        for name, parameter in self.named_parameters():
            if "prompt" in name:
                nn.init.trunc_normal_(parameter, std=0.02)
        self.dgcnn_2 = DGCNN(c.tokens_dims, c.decoder_dims)
        self.decoder = FoldingDecoder(c.decoder_dims, c.group_size)
        self.frozen = [self.trunk] if c.tokenizer == "trained" else [self.trunk, self.encoder, self.dgcnn_1]
        for module in self.frozen:
            module.requires_grad_(False).eval()

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    @torch.no_grad()
    def fix_tokenizer(self, xyz):
        """Makes each code a patch drawn from the clouds xyz (B, N, 3); any patch then gets the code it most resembles.

        Trained codes mean nothing for thousands of steps: the KL term and the changing encoder move them faster than the
        reconstruction shapes them, and the decoder learns to ignore them. Patches are compared by the features of the
        untrained encoder, whose statistics are taken here. Raises ValueError if there are fewer patches than codes, or
        tokens are not as wide as the encoder's output.
        """
        c = self.config
        patches = len(xyz) * c.num_group
        if patches < c.num_tokens or c.tokens_dims != c.encoder_dims:
            raise ValueError(f"a fixed tokenizer wants a patch for each of the {c.num_tokens} codes, as wide as a token "
                             f"({c.tokens_dims}), found {patches} patches of width {c.encoder_dims}")
        neighborhood, center = group_points(xyz, c.num_group, c.group_size)
        self.encoder.train()(neighborhood)
        patch = self.encoder.eval()(neighborhood)  # (B, G, C)
        edges = self.dgcnn_1.edges(patch, knn(center, center, 4)[1]).flatten(0, 1).float()  # (B G, 2304)
        patch = patch.flatten(0, 1).float()
        chosen = torch.randperm(len(patch), generator=seeded("cpu", "codes"))[: c.num_tokens].to(xyz.device)
        self.codebook.copy_(((patch - patch.mean(dim=0)) / (patch.std(dim=0) + 1e-6))[chosen])
        mean = edges.mean(dim=0)
        rows, axis = edges[chosen] - mean, F.normalize(mean, dim=0)
        linear, norm = self.dgcnn_1.layer5  # without the mean's direction: what all share favours no code
        linear.weight.copy_(F.normalize(rows - (rows @ axis)[:, None] * axis, dim=-1))
        norm.weight.fill_(10.0)  # logits well above the Gumbel noise, whose standard deviation is 1.3

    def prefix(self):
        """Deep prompts as keys and values, one pair per layer, each (1, heads, P, C / heads); else None.

        The outputs at prompt positions are thrown away at every layer, so neither query, projection nor MLP is needed
        there; and they do not depend on the cloud: one pass serves the batch, or a whole run once the teacher is fixed.
        """
        if self.config.prompt != "deep":
            return None
        drop = self.config.prompt_dropout
        tokens = [F.dropout(t, drop, self.training) for t in (self.visual_prompt_token, *self.deep_prompt_tokens.split(1))]
        tokens[0] = self.trunk.norm_pre(tokens[0])
        pos = [self.visual_prompt_pos, *self.deep_prompt_pos.split(1)]
        return [block.prefix(t + p) for block, t, p in zip(self.trunk.blocks, tokens, pos)]

    def visual(self, tokens, center, prefix=None):
        """The prompted trunk, positions added at every block. tokens: (B, G, D), center: (B, G, 3) -> (B, G, D)."""
        c = self.config
        x, pos = self.proj_pre(tokens), self.visual_pos_embed(center)  # (B, G, width)
        first = 0
        if c.prompt == "shallow":
            first = c.num_prompt
            prompt = F.dropout(self.visual_prompt_token.expand(len(x), -1, -1), c.prompt_dropout, self.training)
            x = torch.cat([prompt.to(x.dtype), x], dim=1)
            pos = torch.cat([self.visual_prompt_pos.expand(len(x), -1, -1).to(pos.dtype), pos], dim=1)
        x = self.trunk.norm_pre(x)
        prefix = prefix or self.prefix() or [None] * c.trunk.depth
        for block, kv in zip(self.trunk.blocks, prefix):
            x = block(x + pos, kv)
        return self.proj_post(self.trunk.norm(x)[:, first:])

    def tokenize(self, neighborhood, center):
        """Index of each patch's code: (B, G, S, 3), (B, G, 3) -> (B, G) int64."""
        return self.logits(neighborhood, knn(center, center, 4)[1]).argmax(dim=-1)

    def logits(self, neighborhood, graph):
        return self.dgcnn_1(self.encoder(neighborhood), graph).float()  # (B, G, codes)

    def features(self, neighborhood, center, prefix=None):
        """The target of distillation: features of the argmax codes. (B, G, S, 3), (B, G, 3) -> (B, G, D).

        Deterministic in eval mode. `prefix` is what `prefix()` returned, if it was computed before.
        """
        graph = knn(center, center, 4)[1]
        codes = self.logits(neighborhood, graph).argmax(dim=-1)
        return self.dgcnn_2(self.visual(F.embedding(codes, self.codebook), center, prefix), graph)

    def forward(self, xyz, temperature=1.0, hard=False):
        """Autoencodes clouds (B, N, 3). Gumbel noise in train mode only; in eval mode softmax, or argmax if `hard`."""
        neighborhood, center = group_points(xyz, self.config.num_group, self.config.group_size)
        graph = knn(center, center, 4)[1]  # a centre is its own first neighbour
        logits = self.logits(neighborhood, graph)
        if self.training:
            tokens = F.gumbel_softmax(logits, tau=temperature, hard=hard, dim=-1) @ self.codebook
        elif hard:
            tokens = F.embedding(logits.argmax(dim=-1), self.codebook)  # one-hot times codebook
        else:
            tokens = F.softmax(logits / temperature, dim=-1) @ self.codebook
        coarse, fine = self.decoder(self.dgcnn_2(self.visual(tokens, center), graph))
        return TeacherOutput(coarse, fine, neighborhood, center, logits)


def teacher_loss(output, kl_weight):
    """Stage I loss: (total, reconstruction, kl), total = reconstruction + kl_weight * kl.

    reconstruction: CD-L1 of the coarse and of the fine points to the patch, summed. kl: KL(uniform || q), q the codes'
    probabilities averaged over the G patches of a cloud; summed over codes, mean over clouds.
    """
    target = output.neighborhood.flatten(0, 1)  # (B G, S, 3)
    reconstruction = chamfer_distance(output.coarse.flatten(0, 1), target) + chamfer_distance(output.fine.flatten(0, 1), target)
    G, codes = output.logits.shape[1:]
    log_q = torch.logsumexp(F.log_softmax(output.logits, dim=-1), dim=1) - math.log(G)  # (B, codes)
    kl = -math.log(codes) - log_q.mean()
    return reconstruction + kl_weight * kl, reconstruction, kl


# ---------------------------------------------------------------------------------------------------------------------
# Student: stage II (Sec. 4.2), masked modelling against the teacher's features
# ---------------------------------------------------------------------------------------------------------------------

def random_mask(center, ratio, generator=None):
    """Hides int(ratio * G) random patches of each cloud. center: (B, G, 3) -> (B, G) bool, True = hidden."""
    B, G, _ = center.shape
    device = generator.device if generator is not None else center.device
    rank = torch.rand(B, G, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return rank < int(ratio * G)


def block_mask(center, ratio, generator=None):
    """Hides the int(ratio * G) patches nearest to a random one of each cloud. (B, G, 3) -> (B, G) bool, True = hidden."""
    B, G, _ = center.shape
    device = generator.device if generator is not None else center.device
    seed = torch.randint(G, (B, 1), generator=generator, device=device).to(center.device)
    _, idx = knn(gather_points(center, seed), center, max(1, int(ratio * G)))
    mask = torch.zeros(B, G, dtype=torch.bool, device=center.device)
    return mask.scatter_(1, idx[:, 0], int(ratio * G) > 0)


def split_mask(mask, device):
    """Indices of the visible (B, V) and of the masked (B, M) groups, each ascending.

    A mask on the CPU is counted there and spares a GPU the synchronisation. Raises ValueError if the counts differ.
    """
    counts = mask.sum(dim=1).tolist()
    M = counts[0]
    if min(counts) != max(counts):
        raise ValueError(f"a mask must hide equally many groups of every cloud, found {counts}")
    order = mask.to(torch.uint8).argsort(dim=1, stable=True).to(device, non_blocking=True)
    return order[:, : mask.shape[1] - M], order[:, mask.shape[1] - M :]


@dataclass
class EncoderConfig:
    """Sizes of the 3D Transformer; the defaults are the paper's."""
    num_group: int = 64
    group_size: int = 32
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    encoder_dims: int = 384  # of the patch embedding
    drop_path: float = 0.1


@dataclass
class StudentConfig(EncoderConfig):
    decoder_depth: int = 2
    target_dim: int = 384


class Encoder(nn.Module):
    """The plain 3D Transformer that is pretrained: patch embedding, pre-norm blocks without qkv bias, LayerNorm."""

    def __init__(self, config, cls_token=True):
        super().__init__()
        c = config
        self.patch_embed = PatchEmbed(c.encoder_dims)
        self.reduce_dim = nn.Linear(c.encoder_dims, c.width) if c.encoder_dims != c.width else nn.Identity()
        self.pos_embed = pos_mlp(c.width)
        self.blocks = nn.ModuleList(Block(c.width, c.num_heads, qkv_bias=False, drop_path=p)
                                    for p in torch.linspace(0, c.drop_path, c.depth).tolist())
        self.norm = nn.LayerNorm(c.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
        self.cls_token = self.cls_pos = None
        if cls_token:
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, c.width), std=0.02))
            self.cls_pos = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, c.width), std=0.02))

    def forward(self, neighborhood, center, mask=None):
        """(B, G, S, 3), (B, G, 3), mask (B, G) bool, True = hidden -> (B, 1 + V, C), class token first.

        Only the visible patches are embedded, so that BatchNorm sees those alone.
        """
        if mask is not None:
            visible, _ = split_mask(mask, center.device)
            B, V = visible.shape
            neighborhood = gather_points(neighborhood.flatten(2), visible).view(B, V, -1, 3)
            center = gather_points(center, visible)
        return self.layers(neighborhood, center, [len(self.blocks)])[0]

    def layers(self, neighborhood, center, depths):
        """The normed tokens after the blocks numbered `depths` (from 1), class token (if any) first: a list of (B, 1 + G, C)."""
        x, pos = self.reduce_dim(self.patch_embed(neighborhood)), self.pos_embed(center)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
            pos = torch.cat([self.cls_pos.expand(len(x), -1, -1).to(pos.dtype), pos], dim=1)
        out = {}
        for i, block in enumerate(self.blocks, start=1):
            x = block(x + pos)
            if i in depths:
                out[i] = self.norm(x)
        return [out[i] for i in depths]  # a shallow encoder may be asked for one depth twice


class Student(nn.Module):
    """Masked modelling (Sec. 4.2): the encoder sees the visible patches, the decoder predicts the masked ones' targets."""

    def __init__(self, config=None):
        super().__init__()
        c = self.config = config or StudentConfig()
        self.encoder = Encoder(c)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, c.width), std=0.02))
        self.decoder_pos_embed = pos_mlp(c.width)
        self.decoder = nn.ModuleDict({
            "blocks": nn.ModuleList(Block(c.width, c.num_heads, qkv_bias=False, drop_path=p)
                                    for p in torch.linspace(0, c.drop_path, c.decoder_depth).tolist()),
            "norm": nn.LayerNorm(c.width)})
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):  # as the release
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.head = nn.Linear(c.width, c.target_dim)

    def forward(self, neighborhood, center, mask):
        """Predictions at the masked groups, in group order: (B, G, S, 3), (B, G, 3), (B, G) bool -> (B, M, D)."""
        visible, masked = split_mask(mask, center.device)
        x = self.encoder(neighborhood, center, mask)[:, 1:]  # (B, V, C)
        pos = self.decoder_pos_embed(gather_points(center, torch.cat([visible, masked], dim=1)))
        B, M = masked.shape
        x = torch.cat([x, self.mask_token.expand(B, M, -1).to(x.dtype)], dim=1)  # (B, G, C)
        for block in self.decoder["blocks"]:
            x = block(x + pos)
        return self.head(self.decoder["norm"](x[:, x.shape[1] - M :]))  # not -M: M may be 0

    def encode(self, xyz):
        """All tokens of whole clouds, class token first: (B, N, 3) -> (B, 1 + G, C); a numpy array gives a numpy array."""
        if isinstance(xyz, np.ndarray):
            with torch.no_grad():
                return self.encode(torch.from_numpy(xyz).to(self.mask_token)).cpu().numpy()
        return self.encoder(*group_points(xyz, self.config.num_group, self.config.group_size))


def distillation_loss(prediction, target, kind="cosine"):
    """Stage II loss of predictions (..., D) and targets of the same shape -> scalar.

    cosine: mean over tokens of 1 - cos; smooth_l1 (beta = 1) and l2 (squared error): mean over all elements.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    prediction, target = prediction.float(), target.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(prediction, target)
    if kind == "l2":
        return F.mse_loss(prediction, target)
    raise ValueError(f"loss must be cosine, smooth_l1 or l2, found {kind!r}")


def global_feature(tokens):
    """[class token ; max over the other tokens]: (B, 1 + G, C) -> (B, 2 C), the feature of transfer (Sec. 5)."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Downstream heads
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class ClassifierConfig(EncoderConfig):
    num_group: int = 128
    num_classes: int = 40
    head: str = "mlp3"  # mlp3 or linear


class Classifier(nn.Module):
    """The pretrained encoder and a head on [class token ; max]: (B, N, 3) -> logits (B, classes)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.head not in ("mlp3", "linear"):
            raise ValueError(f"head must be mlp3 or linear, found {c.head!r}")
        self.frozen = False
        self.encoder = Encoder(c)
        self.head = nn.Sequential(nn.Linear(2 * c.width, c.num_classes)) if c.head == "linear" else nn.Sequential(
            nn.Linear(2 * c.width, 256), BatchNorm(256), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(256, 256), BatchNorm(256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, c.num_classes))

    def freeze_encoder(self):
        """Frozen is frozen: no gradients, fixed statistics, no drop path, the class token and its position included."""
        self.frozen = True
        self.encoder.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, xyz):
        return self.head(global_feature(self.encoder(*group_points(xyz, self.config.num_group, self.config.group_size))))


@dataclass
class SegmenterConfig(EncoderConfig):
    num_group: int = 128
    num_parts: int = 50
    num_categories: int = 16  # 0: scenes, whose points belong to no given object category


class Segmenter(nn.Module):
    """The pretrained encoder (without class token) and a label per point: (B, N, 3) -> logits (B, N, parts)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c, cls_token=False)
        self.depths = [max(1, c.depth * i // 3) for i in (1, 2, 3)]  # 4, 8, 12 of 12
        dim = 3 * c.width
        if c.num_categories:
            self.label_conv = nn.Sequential(nn.Linear(c.num_categories, 64, bias=False), BatchNorm(64), nn.LeakyReLU(0.2))
        self.propagation = nn.Sequential(nn.Linear(dim + 3, 4 * c.width), BatchNorm(4 * c.width), nn.ReLU(),
                                         nn.Linear(4 * c.width, 1024), BatchNorm(1024), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(1024 + 2 * dim + (64 if c.num_categories else 0), 512), BatchNorm(512), nn.ReLU(),
                                  nn.Dropout(0.5), nn.Linear(512, 256), BatchNorm(256), nn.ReLU(), nn.Linear(256, c.num_parts))

    def forward(self, xyz, category=None):
        """`category`: (B,) int64 index of the given object category, wanted exactly if the model was built with some."""
        c = self.config
        if (category is None) != (c.num_categories == 0):
            raise ValueError(f"this Segmenter has {c.num_categories} object categories: category must "
                             + ("be given" if category is None else "be None"))
        neighborhood, center = group_points(xyz, c.num_group, c.group_size)
        tokens = torch.cat(self.encoder.layers(neighborhood, center, self.depths), dim=-1)  # (B, G, 3 C)
        whole = [tokens.amax(dim=1), tokens.mean(dim=1)]
        if category is not None:
            whole.append(self.label_conv(F.one_hot(category, c.num_categories).to(tokens.dtype)))
        point = self.propagation(torch.cat([xyz.to(tokens.dtype), interpolate(xyz, center, tokens)], dim=-1))  # (B, N, 1024)
        linear = self.head[0]  # its part on the whole cloud's features: once per cloud, not once per point
        x = F.linear(torch.cat(whole, dim=-1), linear.weight[:, 1024:], linear.bias)[:, None]
        return self.head[1:](x + F.linear(point, linear.weight[:, :1024]))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: ours, and those of the public release and its relatives
# ---------------------------------------------------------------------------------------------------------------------

_ENCODER = """encoder.=encoder.patch_embed. blocks.blocks.=encoder.blocks. cls_token=encoder.cls_token norm.=encoder.norm.
    cls_pos=encoder.cls_pos pos_embed.=encoder.pos_embed. reduce_dim.=encoder.reduce_dim."""
_RELEASE = {  # tables as those of the public weights
    "Student": _table(" ".join("ACT_encoder." + word for word in _ENCODER.split()) + """ ACT_decoder.=decoder. mask_token
        decoder_pos_embed. increase_dim.0.=head. proj_head.0.=head. proj_head.=head. dvae_tokenizer.=
        ACT_encoder.lm_head.= ACT_encoder.cls_head.="""),
    "Teacher": _table("""codebook encoder. dgcnn_1. dgcnn_2. decoder. proj_pre. proj_post. visual_pos_embed. visual_prompt_
        deep_prompt_ trunk.blocks. visual_embed.0.=trunk.norm_pre. visual_embed.1.=trunk.norm.
        visual_embed.2.=trunk.norm."""),
    "Segmenter": _table("""convs3.=head.7. convs2.=head.4. bns2.=head.5. convs1.=head.0. bns1.=head.1. label_conv.
        propagation_0.mlp_convs.0.=propagation.0. propagation_0.mlp_bns.0.=propagation.1.
        propagation_0.mlp_convs.1.=propagation.3. propagation_0.mlp_bns.1.=propagation.4. """ + _ENCODER),
    "Classifier": _table("cls_head_finetune.=head. " + _ENCODER),
}
_KINDS = {"Teacher": (Teacher, TeacherConfig), "Student": (Student, StudentConfig),
          "Classifier": (Classifier, ClassifierConfig), "Segmenter": (Segmenter, SegmenterConfig)}


def load(path, device="cpu", **sizes):
    """The Teacher, Student, Classifier or Segmenter that a checkpoint holds, in eval mode.

    Reads our checkpoints and those of the public release and Point-MAE. Sizes are read off the tensors; what those cannot
    say comes from `sizes`, else it is the paper's: heads = width // 64 (of a Teacher: its trunk's), num_group 64 (128 with
    a downstream head), group_size 32. A Point-MAE student has no class token: it starts fresh, with a warning.
    Raises ValueError, naming the file, if it is missing, corrupt, of no known kind, or a key is stray or missing.
    """
    obj = read_tensors(path)
    state = _state_dict(obj, path)
    fresh = ("encoder.cls_",) if any(key.startswith("MAE_encoder.") for key in state) else ()
    ours = str(obj.get("kind")) in _KINDS and isinstance(obj.get("config"), dict)
    if all(key.startswith("dvae_tokenizer.") for key in state):
        state = {key.removeprefix("dvae_tokenizer."): value for key, value in state.items()}
    kind, state = (obj["kind"], state) if ours else _translate(state, _RELEASE, "Student or other model", path)
    cls, config_cls = _KINDS[kind]
    known = {f.name for f in fields(config_cls)} | {"num_heads"}
    if unknown := set(sizes) - known:
        raise ValueError(f"{path}: a {kind} has no size {min(unknown)!r}; its sizes: {', '.join(sorted(known))}")
    try:
        if not ours:  # its convolutions of size 1 are products: (out, in, 1) or (out, in, 1, 1) -> (out, in)
            state = _fuse_qkv({k: v.flatten(1) if k.endswith(".weight") and v.ndim > 2 else v for k, v in state.items()})
        config = {**(obj["config"] if ours else _release_sizes(kind, state, path)), **sizes}
        if kind == "Teacher" and "num_heads" in config:
            config["trunk"] = {**config["trunk"], "num_heads": config.pop("num_heads")}
        model = cls(config_cls(**config))
    except Exception as error:  # as in load_pretrained
        raise ValueError(f"{path}: its tensors, or sizes, make no {kind}: {error!r}") from error
    if fresh:
        warnings.warn(f"{path}: has no class token: encoder.cls_token and encoder.cls_pos start fresh")
    return load_exactly(model, state, path, fresh).to(device).eval()


def _release_sizes(kind, state, path):
    """Config of a model of the release, read off its tensors, under our names."""
    if kind == "Teacher":
        trunk = {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
        layout = "bert" if "norm.weight" not in trunk else "clip" if "norm_pre.weight" in trunk else "timm"
        prompts = state["visual_prompt_token"].shape[1] if "visual_prompt_token" in state else 0
        return dict(
            group_size=len(state["decoder.mlp.4.weight"]) * 4 // 3, encoder_dims=len(state["encoder.second_conv.3.weight"]),
            num_tokens=len(state["codebook"]), tokens_dims=state["codebook"].shape[1], num_prompt=prompts,
            prompt="deep" if "deep_prompt_tokens" in state else "shallow" if prompts else "none", weights=Path(path).name,
            decoder_dims=len(state["dgcnn_2.layer5.0.weight"]), trunk=asdict(_trunk_config(trunk, layout)))
    width = len(state["encoder.norm.weight"])
    encoder, decoder = ({k.split(".")[2] for k in state if k.startswith(f"{x}coder.blocks.")} for x in ("en", "de"))
    config = dict(width=width, depth=len(encoder), num_heads=max(1, width // 64),
                  encoder_dims=len(state["encoder.patch_embed.second_conv.3.weight"]))
    if kind == "Student":
        config.update(decoder_depth=len(decoder), target_dim=len(state["head.weight"]))
        # Point-MAE, which has no class token, predicts the points
        return config if "encoder.cls_token" in state else {**config, "group_size": config["target_dim"] // 3}
    if kind == "Classifier":
        head, last = ("mlp3", "head.8.weight") if "head.8.weight" in state else ("linear", "head.0.weight")
        return dict(config, num_classes=len(state[last]), head=head)
    categories = state["label_conv.0.weight"].shape[1] if "label_conv.0.weight" in state else 0
    return dict(config, num_parts=len(state["head.7.weight"]), num_categories=categories)


def export(student, path):
    """Writes our Student in the public release's names and file form, for its fine-tuning scripts. Atomic."""
    table = {new: old for old, new in _RELEASE["Student"].items() if new}  # of a head's three names, the last: proj_head
    _, state = _translate(student.state_dict(), {"Student": table}, "Student", path)
    state = {k: (v.unsqueeze(-1) if re.search(r"_conv\.[03]\.weight$", k) else v).cpu() for k, v in state.items()}
    save({"base_model": state, "epoch": 0, "metrics": {}, "best_metrics": {}}, path)


@contextmanager
def whole_file(path):
    """A binary file that takes the name `path` once all of it is on the disk; an error on the way leaves nothing behind."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def save(obj, path):
    """torch.save, whole or not at all."""
    with whole_file(path) as file:
        torch.save(obj, file)
