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

import argparse
import hashlib
import io
import json
import math
import os
import re
import resource
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
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


def linear_svm(features, labels, num_classes, C=1.0):
    """One-against-rest linear SVM, full batch: min 1/2 |w|^2 + C sum_i max(0, 1 - y_i w.x_i)^2 for each class.

    features: (n, D), labels: (n,) int64 -> weights (D + 1, classes) float64, the last row the intercept, which is
    penalised too, as in LIBLINEAR. Deterministic.
    """
    x = torch.cat([features.double(), features.new_ones(len(features), 1).double()], dim=1)
    y = 2.0 * F.one_hot(labels, num_classes).double() - 1
    w = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=1000, tolerance_grad=1e-6 * len(x), tolerance_change=1e-12, history_size=20,
                               line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        value = w.square().sum() / 2 + C * (1 - y * (x @ w)).clamp_min(0).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(objective)
    return w.detach()


def svm_accuracy(train, train_labels, test, test_labels):
    """Percent of the test features that a linear SVM on the train features labels right, and its C.

    Features are standardised by the train features. C is the best of 0.001, 0.01, 0.1 and 1 on every fifth train feature
    in order of class, held out for that choice alone; of equals the smallest. Deterministic.
    """
    train, test, num_classes = train.double(), test.double(), int(max(train_labels.max(), test_labels.max())) + 1
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    order = train_labels.argsort(stable=True)
    x, y, test = ((train - mean) / std)[order], train_labels[order], (test - mean) / std

    def percent(x, y, queries, truth, C):
        w = linear_svm(x, y, num_classes, C)
        return 100 * ((queries @ w[:-1] + w[-1]).argmax(dim=1) == truth).double().mean().item()

    held = torch.arange(len(x), device=x.device) % 5 == 0
    C = max((0.001, 0.01, 0.1, 1.0), key=lambda C: percent(x[~held], y[~held], x[held], y[held], C))
    return percent(x, y, test, test_labels, C), C


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


# ---------------------------------------------------------------------------------------------------------------------
# Clouds: reading one, folders of them, the embedded shapes, augmentation. Nothing a file holds is ever executed, and a
# size it claims is held against its length before memory is taken. A reader turns a file's bytes into points (n, C) and
# faces (polygons of vertex indices); read_points puts the file's name before what it raises.
# ---------------------------------------------------------------------------------------------------------------------

MESH_POINTS, CACHE_POINTS = 8192, 16384  # points drawn from a mesh; the most that a folder keeps of one cloud
ARRAY_NAMES = ("points", "xyz", "data", "pos")
# what broken files make struct, zipfile, zlib and h5py raise (RuntimeError: an encrypted member, HDF5's own errors)
BROKEN = (OSError, EOFError, OverflowError, RuntimeError, LookupError, struct.error, zipfile.BadZipFile, zlib.error)


def _pick_array(sizes):
    """Of the arrays {name: (bytes, bytes packed)}, one with a name we know, or the only one, unless it is a bomb."""
    names = [name for name in ARRAY_NAMES if name in sizes] or list(sizes)
    if not names or (len(names) > 1 and names[0] not in ARRAY_NAMES):
        found = ", ".join(map(str, names[:5])) or "none"  # HDF5 gives bytes where a name is no text
        raise ValueError(f"expected an array named {', '.join(ARRAY_NAMES)}, found {found}")
    size, packed = sizes[names[0]]
    if size > max(2 ** 26, 100 * packed):
        raise ValueError(f"array {names[0]} claims {size} bytes, packed into {packed}")
    return names[0]


def _read_npy(data):
    """The header is searched for its three fields, never evaluated."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise ValueError("not a .npy array")
    start = 10 + struct.unpack_from("<H", data, 8)[0] if data[6] == 1 else 12 + struct.unpack_from("<I", data, 8)[0]
    header = data[:min(start, 10_000)].decode("latin-1")
    fields = re.search(r"'descr': *('[^']*'), *'fortran_order': *(True|False), *'shape': *\(([\d, ]*)\)", header)
    kind, fortran, shape = fields.groups() if fields else ("unknown", "", "")
    if not re.fullmatch(r"'[<>=|]?(f[248]|[iu][1248]|b1)'", kind):
        raise ValueError(f"expected an array of numbers, found type {kind}; Python objects are never loaded")
    kind, shape = np.dtype(kind[1:-1]), [int(size) for size in shape.split(",") if size.strip()]
    claimed, held = math.prod(shape) * kind.itemsize, max(0, len(data) - start)
    if claimed > held:
        raise ValueError(f"the header promises {claimed} bytes of points, the file holds {held}")
    return np.frombuffer(data, kind, math.prod(shape), start).reshape(shape, order="CF"[fortran == "True"]), ()


def _read_npz(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        packings = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # numpy's two
        members = [m for m in archive.infolist() if m.filename.endswith(".npy") and m.compress_type in packings]
        sizes = {member.filename[:-4]: (member.file_size, min(member.compress_size, len(data))) for member in members}
        return _read_npy(archive.read(_pick_array(sizes) + ".npy"))


def _read_h5(data):
    try:
        import h5py
    except ImportError as error:
        raise ValueError("reading .h5 needs h5py: pip install h5py") from error
    with h5py.File(io.BytesIO(data), "r") as file:
        arrays = [item for item in file.items() if isinstance(item[1], h5py.Dataset) and item[1].dtype.kind in "fiub"]
        sizes = {name: (array.nbytes, min(array.id.get_storage_size(), len(data))) for name, array in arrays if array.shape}
        return file[_pick_array(sizes)][:], ()


def _lines(data, comment="#"):
    """The lines of a text that are not blank, without comments: [(number, line)]."""
    text = re.sub("\r\n?", "\n", data.decode("utf-8-sig", "replace"))
    lines = re.sub(f"({comment}).*", "", text).split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _row(number, line, wanted=3, kind=float):
    """The first `wanted` numbers of line `number`."""
    try:
        row = [kind(word) for word in line.split()[:wanted]]
    except ValueError:
        row = []  # named below, as a line too short is
    if len(row) < wanted:
        raise ValueError(f"line {number}: expected {wanted} numbers, found {line.strip()[:60]!r}")
    return row


def _numbers(rows, columns=3):
    """The numbers of [(line number, line, how many numbers if not 3)], (n, columns)."""
    return np.fromiter((value for row in rows for value in _row(*row)), float).reshape(-1, columns)


def _read_text(data):
    """A point a line, commas or blanks between its columns; the first line may be a header of words or the count."""
    lines = _lines(data.replace(b",", b" "), "#|//")
    header = re.fullmatch(r"\s*(?:(\d{1,18})|(?!nan\b|inf\b)[_A-Z].*)\s*", lines[0][1] if lines else "", re.IGNORECASE)
    points = _numbers(lines[1:] if header else lines)
    if header and header[1] and int(header[1]) != len(points):
        raise ValueError(f"the first line promises {int(header[1])} points, the file holds {len(points)}")
    return points, ()


def _read_off(data):
    (number, first), *lines = _lines(data) or [(1, "")]
    keyword, counts = re.fullmatch(r"\s*([A-Z]{0,4}OFF)?(.*)", first).groups()
    lines = [(number, counts), *lines] if counts.strip() else lines  # the counts may be glued to the keyword
    if not keyword or not lines:
        raise ValueError("expected OFF and the counts of vertices and faces at the start of the file")
    num_vertices, num_faces = _row(*lines.pop(0), 2, int)
    if min(num_vertices, num_faces) < 0 or num_vertices + num_faces > len(lines):
        raise ValueError(f"promises {num_vertices} vertices and {num_faces} faces, {len(lines)} lines follow")
    vertices, faces = lines[:num_vertices], lines[num_vertices:num_vertices + num_faces]
    return _numbers(vertices), [_row(*face, 1 + max(0, *_row(*face, 1, int)), int)[1:] for face in faces]


def _read_obj(data):
    vertices, faces = [], []
    for number, line in _lines(data):
        keyword, rest, *_ = *line.split(maxsplit=1), ""
        if keyword == "v":
            vertices.append((number, rest))
        elif keyword == "f":
            corners = re.sub(r"/\S*", "", rest)  # a/b/c: vertex, texture, normal
            corners = _row(number, corners, max(3, len(corners.split())), int)
            # from 1, or negative: counted from the last vertex so far
            faces.append([corner - 1 if corner > 0 else corner + len(vertices) if corner else -1 for corner in corners])
    return _numbers(vertices), faces


PLY_TYPES = dict(zip("char uchar short ushort int uint float double int8 uint8 int16 uint16 int32 uint32 float32 float64".split(),
                     "bBhHiIfdbBhHiIfd"))  # as struct and numpy call them


def _ply_rows(data, offset, count, properties):
    """`count` rows of an element from byte `offset` -> ({property: its values, row by row}, the offset behind them)."""
    if all(len(kinds) == 1 for _, kinds in properties):
        rows = np.frombuffer(data, [(name, kind) for name, (kind,) in properties], count, offset)
        return {name: rows[name] for name in rows.dtype.names}, offset + rows.nbytes
    columns = {name: [] for name, _ in properties}
    for _ in range(count):
        for name, kinds in properties:
            values = (1,)
            for kind in kinds:  # of a list: its length, then as many values
                form = f"{kind[0]}{int(values[0])}{kind[1]}"
                values = struct.unpack_from(form, data, offset)
                offset += struct.calcsize(form)
            columns[name].append(values)
    return columns, offset


def _read_ply(data):
    header = re.match(rb"ply\s.*?\nend_header[ \t]*(\r?\n|$)", data, re.DOTALL)
    if not header:
        raise ValueError("expected a PLY header, from 'ply' to 'end_header'")
    lines, offset, order, elements = header[0].decode("latin-1").split("\n"), header.end(), None, []
    for number, line in enumerate(lines, 1):
        keyword, *words = line.split() or [""]
        try:
            if keyword == "format":
                order = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}[words[0]]
            elif keyword == "element":  # (name, count, [(property, [type] or [type of its length, type])])
                elements.append((words[0], max(0, int(words[1])), []))
            elif keyword == "property":
                kinds, name = (words[1:3], words[3]) if words[0] == "list" else (words[:1], words[1])
                kinds = [order + PLY_TYPES[kind] for kind in kinds]
                elements[-1][2].append((name, ["=d"] * len(kinds) if order == "=" else kinds))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"line {number}: not a line of a PLY header: {line.strip()[:60]!r}") from error
    if order == "=":  # the numbers of a text become a file of doubles, read like any other
        rows = [(number, line, len(line.split())) for number, line in _lines(data) if number >= len(lines)]
        data, offset = _numbers(rows, 1).tobytes(), 0
    found = {"vertex": {}, "face": {}}
    for name, count, properties in elements:
        try:
            found[name], offset = _ply_rows(data, offset, count, properties)
        except (ValueError, OverflowError, struct.error) as error:
            raise ValueError(f"promises {count} rows of {name!r}, the file ends before that or its lists are broken") from error
    vertex, face = found["vertex"], found["face"]
    if not set("xyz") <= set(vertex):
        raise ValueError(f"expected a vertex with x, y and z, found {', '.join(vertex) or 'none'}")
    points = np.stack([np.asarray(vertex[axis], np.float64).reshape(-1) for axis in "xyz"], 1)
    return points, face.get("vertex_indices", face.get("vertex_index", ()))


READERS = {".npy": _read_npy, ".npz": _read_npz, ".ply": _read_ply, ".off": _read_off, ".obj": _read_obj, ".xyz": _read_text,
           ".txt": _read_text, ".pts": _read_text, ".h5": _read_h5}


def sample_mesh(vertices, faces, num_points, seed=0):
    """Points drawn uniformly over the area of a mesh, the same for the same `seed`.

    vertices (V, 3), faces: polygons of vertex indices, each cut into a fan of triangles -> (num_points, 3) float64.
    Raises ValueError where a face names a vertex that is not there, or the faces have no area.
    """
    triangles = [(face[0], *edge) for face in faces for edge in zip(face[1:], face[2:])]
    corners = np.array(triangles, np.int64).reshape(-1, 3)
    if corners.size and not 0 <= corners.min() <= corners.max() < len(vertices):
        raise ValueError(f"the faces name vertices {corners.min()} to {corners.max()} (from 0), the mesh has {len(vertices)}")
    a, b, c = np.moveaxis(np.asarray(vertices, np.float64)[corners], 1, 0)  # (T, 3) each
    with np.errstate(over="ignore", invalid="ignore"):
        area = np.cumsum(np.linalg.norm(np.cross(b - a, c - a), axis=1))
    if not len(area) or not 0 < area[-1] < math.inf:
        raise ValueError("the faces of the mesh have no area")
    rng = np.random.default_rng(seed)
    pick = np.minimum(np.searchsorted(area, rng.uniform(0, area[-1], num_points), side="right"), len(area) - 1)
    u, v = rng.random((2, num_points, 1))
    u, v = np.where(u + v > 1, (1 - u, 1 - v), (u, v))  # the far half of the parallelogram folds back onto the triangle
    return a[pick] + u * (b - a)[pick] + v * (c - a)[pick]


def read_points(path):
    """The points of a file, (n, 3) float64 as stored; a mesh gives MESH_POINTS of its surface.

    Raises ValueError, one line that begins with the file's name, also where a coordinate is not finite or all are the same.
    """
    path, kind = os.fspath(path), os.path.splitext(path)[1].lower()
    try:
        if kind not in READERS:
            raise ValueError(f"unknown extension {kind!r}, expected one of {' '.join(READERS)}")
        if not os.path.isfile(path):
            raise ValueError("no such file")
        with open(path, "rb") as file:
            points, faces = READERS[kind](file.read())
        if points.ndim != 2 or not 3 <= points.shape[1] <= 64:
            raise ValueError(f"expected an array of shape (n, 3), up to 64 columns, found {points.shape}")
        points = np.ascontiguousarray(points[:, :3], dtype=np.float64)
        finite = np.isfinite(points).all(1)
        if not finite.all():
            raise ValueError(f"{(~finite).sum()} of {len(points)} points are NaN or infinite")
        normalize(points)  # raises where all are the same
        return sample_mesh(points, faces, MESH_POINTS) if len(faces) else points
    except (ValueError, *BROKEN) as error:
        message = " ".join(str(error).split())
        message = message if isinstance(error, ValueError) else f"broken {kind} file ({message})"
        raise ValueError(f"{path}{', ' if message.startswith('line ') else ': '}{message}") from error


def normalize(points):
    """Centroid to 0, farthest point to radius 1, in float64: (n, 3) -> (n, 3) float32. Raises ValueError unless two differ."""
    points = np.asarray(points, np.float64)
    if len(points) == 0 or (points == points[0]).all():
        raise ValueError(f"expected at least two different points, found {len(points)} at one place")
    points = points / np.abs(points).max()  # so that no square overflows
    points = points - points.mean(0)
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


def read_cloud(path):
    """One file (see read_points) as a normalised cloud, (N, 3) float32 numpy array."""
    return normalize(read_points(path))


def write_ply(path, xyz, colors=None):
    """xyz (N, 3), colors (N, 3) uint8 or None -> a binary little-endian .ply."""
    names = ["float x", "float y", "float z"] + (["uchar red", "uchar green", "uchar blue"] if colors is not None else [])
    rows = np.ascontiguousarray(xyz, "<f4").view(np.uint8)  # (N, 12): as bytes
    rows = rows if colors is None else np.hstack([rows, colors])
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *map("property {}".format, names)]
    with whole_file(path) as file:
        file.write("\n".join([*head, "end_header", ""]).encode() + rows.tobytes())


def unit_sphere(xyz):
    """Each cloud of (B, N, 3) with its centroid at 0 and its farthest point at radius 1, float32; one point stays at 0."""
    xyz = xyz.double() - xyz.double().mean(1, keepdim=True)
    return (xyz / xyz.norm(dim=2).amax(1)[:, None, None].clamp(min=1e-12)).float()


@dataclass
class Clouds:
    """Clouds of any sizes, end to end: cloud i is points[offsets[i]:offsets[i + 1]]."""
    points: torch.Tensor  # (T, 3) float32, possibly mapped from a file larger than memory
    offsets: torch.Tensor  # (n + 1,) int64
    names: list
    labels: torch.Tensor | None = None  # (n,) int64, indices into classes
    classes: list = field(default_factory=list)
    parts: torch.Tensor | None = None  # (T,) int64, a part label per point
    class_parts: list | None = None  # class -> (first, last + 1) of its parts
    normalized: bool = True  # False: draws are used as stored
    largest: int = 0  # points of the largest cloud, where it is known

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return self.points[self.offsets[i]:self.offsets[i + 1]]

    def to(self, device):
        moved = {name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **moved, largest=int(self.offsets.diff().max()))

    def draw(self, indices, num_points, generator=None):
        """A random `num_points` of each cloud, in random order and without repetition; a smaller cloud is repeated.

        indices (B,) -> xyz (B, num_points, 3) float32, each draw normalised anew; flat (B, num_points) int64 into points.
        xyz is on the generator's device, where the draw is made; flat on that of the points, which may be another one.
        """
        indices, home = indices.to(self.offsets.device), self.points.device
        device = home if generator is None else generator.device
        start, size = (t.to(device) for t in (self.offsets[indices], self.offsets.diff()[indices]))  # (B,)
        # the batch's largest on a CPU; on a GPU the set's, known since it was moved there: nothing waits
        largest, order = self.largest or int(size.max()), []
        for rows in size.split(max(1, 2 ** 24 // largest)):  # one part, unless the keys would take more than 64 MiB
            keys = torch.rand(len(rows), largest, generator=generator, device=size.device)
            behind = torch.arange(largest, device=size.device) >= rows[:, None]  # the cloud's end: after every real key
            order.append(keys.masked_fill_(behind, 2).topk(min(num_points, largest), largest=False).indices)
        turn = torch.arange(num_points, device=size.device) % size[:, None]  # (B, num_points)
        flat = (start[:, None] + torch.cat(order).gather(1, turn)).to(home)
        xyz = self.points[flat].to(device)
        return unit_sphere(xyz) if self.normalized else xyz, flat


def _shapenet(root):
    """(folder of the clouds, [train list, test list]) of a ShapeNet-55 root; of any other folder None."""
    for base, lists in ((".", "ShapeNet-55"), (".", "."), ("..", "."), ("ShapeNet55-34", "ShapeNet55-34/ShapeNet-55")):
        lists = [root / lists / name for name in ("train.txt", "test.txt")]
        if lists[0].is_file() and (root / base / "shapenet_pc").is_dir():
            return root / base / "shapenet_pc", lists


def _list_clouds(root):
    """A folder -> (the folder its names start from, [(split: 0 train, 1 test, 2 neither; class or None; name)] in order)."""
    if found := _shapenet(root):
        names = [sorted(path.read_text("utf-8").split()) for path in found[1]]
        return found[0], [(i, name.split("-")[0], name) for i in (0, 1) for name in names[i]]
    entries = []
    for path in root.rglob("*"):
        inside = path.relative_to(root).parts
        if path.suffix.lower() in READERS and not any(name.startswith(".") for name in inside) and path.is_file():
            split = 0 if "train" in inside[:-1] else 1 if "test" in inside[:-1] else 2
            label = next((name for name in inside[:-1] if name not in ("train", "test")), None)
            entries.append((split, label, "/".join(inside)))
    if all(split == 2 for split, _, _ in entries):  # no split of its own: a fifth, by a hash of the names, is for testing
        entries.sort(key=lambda entry: hashlib.sha256(entry[2].encode()).digest())
        entries = [(int(i < max(1, len(entries) // 5)), *entry[1:]) for i, entry in enumerate(entries)]
    return root, sorted(entries, key=lambda entry: (entry[0], entry[2]))


def cached_points(root, names, cache):
    """The clouds `names`, read once, as a memory map (T, 3) and offsets (n + 1,).

    The cache is one file, the points and then the offsets, named by a hash of the clouds' names, sizes and times. It appears
    whole or not at all, so processes may build it at the same time; one that does not add up is built again.
    """
    stats = [os.stat(os.path.join(root, name)) for name in names]
    key = repr((CACHE_POINTS, MESH_POINTS, [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, stats)]))
    if cache is None:
        cache = root if os.access(root, os.W_OK) else os.path.join(tempfile.gettempdir(), f"act-cache-{os.getuid()}")
    os.makedirs(cache, exist_ok=True)
    path = os.path.join(cache, f".act-cache-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin")
    size = os.path.getsize(path) - 8 * (len(names) + 1) if os.path.isfile(path) else -1
    offsets = np.fromfile(path, np.int64, offset=size) if size >= 0 else np.zeros(2, np.int64)
    if offsets[0] != 0 or (np.diff(offsets) <= 0).any() or size != 12 * int(offsets[-1]):
        print(f"reading {len(names)} clouds into {path}, once", file=sys.stderr)
        offsets = np.zeros(len(names) + 1, np.int64)
        with whole_file(path) as file:
            for i, name in enumerate(names):
                points = read_cloud(os.path.join(root, name))
                if len(points) > CACHE_POINTS:
                    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
                    points = points[rng.choice(len(points), CACHE_POINTS, replace=False)]
                file.write(points.tobytes())
                offsets[i + 1] = offsets[i] + len(points)
            file.write(offsets.tobytes())
    # mode "c" is private to this process, and writable, as torch wants it
    return np.memmap(path, np.float32, "c", shape=(int(offsets[-1]), 3)), offsets


def open_clouds(path, split=None, cache=None):
    """A folder of clouds, of any forms in READERS, or a ShapeNet-55 root, as Clouds; read once, then mapped from a cache.

    Sub-folders are classes; folders `train` and `test` above or below them are the splits, else a fixed fifth is for testing.
    split: "train", "test" or None for everything. The cache lies in `cache`, else in the folder itself, else, if that
    cannot be written, in the system's temporary folder; it keeps a random CACHE_POINTS of a larger cloud.
    """
    splits = {None: (0, 1, 2), "train": (0,), "test": (1,)}
    if split not in splits:
        raise ValueError(f"split must be 'train', 'test' or None, found {split!r}")
    if not os.path.isdir(path):
        raise ValueError(f"{path}: no such folder")
    root, entries = _list_clouds(Path(path))
    missing = [name for _, _, name in entries if not (root / name).is_file()]
    if missing:
        raise ValueError(f"{root}: {missing[0]} is listed, but not there")
    chosen = [i for i, entry in enumerate(entries) if entry[0] in splits[split]]
    if not chosen:
        found = f" for {split!r} among its {len(entries)}" if entries else f", expected files {' '.join(READERS)}"
        raise ValueError(f"{path}: no clouds{found}")
    points, offsets = cached_points(root, [name for _, _, name in entries], cache)
    first, end = chosen[0], chosen[-1] + 1  # they are in the order of the splits: the chosen ones are neighbours
    points, offsets = points[offsets[first]:offsets[end]], offsets[first:end + 1] - offsets[first]
    classes = sorted({label for _, label, _ in entries}) if all(label for _, label, _ in entries) else []
    _, labels, names = zip(*entries[first:end])
    labels = torch.tensor([classes.index(label) for label in labels]) if classes else None
    return Clouds(torch.from_numpy(points), torch.from_numpy(offsets), list(names), labels, classes)


def _surface(kind, size, n, rng):
    """(n, 3) points on a box, sphere, torus, cylinder, cone, shade or pyramid of half-sizes `size`; axis y, or as in "cone_x"."""
    kind, _, axis = kind.partition("_")
    order = {"": [0, 1, 2], "x": [1, 0, 2], "z": [0, 2, 1]}[axis]
    size, t, turn = np.array(size)[order], rng.uniform(-1, 1, n), rng.uniform(0, 2 * np.pi, n)
    ring = np.stack([np.cos(turn), np.sin(turn)])
    if kind == "box":
        points, share = rng.uniform(-1, 1, (n, 3)), np.cumsum(1 / size)  # a face's area goes as 1 / its distance
        points[np.arange(n), np.searchsorted(share[:2] / share[2], rng.random(n))] = np.sign(t)
        return (points * size)[:, order]
    if kind == "sphere":
        height, radius = t, np.sqrt(1 - t ** 2)
    elif kind == "torus":
        height, radius = np.sin(np.pi * t), 1 - size[1] / size[0] * (1 - np.cos(np.pi * t))
    else:
        cap, top = rng.random(n) < size[0] / (size[0] + 2 * size[1]), {"cylinder": 1, "shade": 0.5}.get(kind, 0)
        height = np.where(cap, np.sign(t), t)
        radius = (1 + (top - 1) * (height + 1) / 2) * np.where(cap, np.sqrt(rng.random(n)), 1)
        ring /= np.abs(ring).max(0) if kind == "pyramid" else 1
    return (np.stack([radius * ring[0], height, radius * ring[1]], 1) * size)[:, order]


def _shapes(w, h, d, t, p, q):
    """Category -> [(part, primitive, centre, half-sizes)], y up, from half-width, half-height, half-depth, thickness and two
    numbers in (0, 1). Proportions overlap on purpose: a box may be as flat as a door."""
    legs = [(x, z) for x in (-1, 1) for z in (-1, 1)]
    o, r, s = (0, 0, 0), w * (0.4 + 0.6 * p), 0.2 + 0.3 * p
    return {
        "sphere": [(0, "sphere", o, (w, w * (0.8 + 0.4 * p), w))], "ellipsoid": [(0, "sphere", o, (w, h, d))],
        "box": [(0, "box", o, (w, h, d * p + t))], "cylinder": [(0, "cylinder", o, (r, h, r))],
        "cone": [(0, "cone" if q > 0.3 else "shade", o, (r, h, r))], "pyramid": [(0, "pyramid", o, (w, h, d))],
        "torus": [(0, "torus", o, (w, w * s * 0.7, w))],
        "capsule": [(0, "cylinder", o, (r, h, r)), (1, "sphere", (0, h, 0), (r, r, r)), (1, "sphere", (0, -h, 0), (r, r, r))],
        "table": [(0, "box" if q > 0.3 else "cylinder", o, (w, t, d)),
                  *[(1, "box", (x * w * s * 1.4, -h, z * d * s * 1.4), (t, h, t)) for x, z in legs]],
        "desk": [(0, "box", o, (w, t, d)), (1, "box", (-w * 0.9, -h, 0), (t, h, d * 0.9)),
                 (2, "box", (w * 0.6, -h, 0), (w * 0.4 * q + t, h, d * 0.9))],
        "stool": [(0, "cylinder" if q > 0.4 else "box", o, (r, t, r)),
                  *[(1, "box", (x * r * 0.6, -h * 0.8, z * r * 0.6), (t, h * 0.8, t)) for x, z in legs]],
        "chair": [(0, "box", o, (r, t, d * 0.6)), (1, "box", (0, h * s * 1.5, -d * 0.6), (r, h * s * 1.5, t)),
                  *[(2, "box", (x * r * 0.9, -h * 0.5, z * d * 0.5), (t, h * 0.5, t)) for x, z in legs]],
        "sofa": [(0, "box", o, (w, h * 0.3, d * 0.6)), (1, "box", (0, h * s, -d * 0.6), (w, h * 0.5, 2 * t)),
                 *[(2, "box", (x * w, h * 0.2, 0), (2 * t, h * s, d * 0.6)) for x in (-1, 1)]],
        "bed": [(0, "box", o, (r, h * 0.2, d)), (1, "box", (0, h * s, -d), (r, h * 0.5, t)),
                *[(2, "box", (x * r * 0.9, -h * 0.4 * q, z * d * 0.9), (t, h * 0.4 * q, t)) for x, z in legs]],
        "bookshelf": [*[(0, "box", (x * r, 0, 0), (t, h, d * 0.3)) for x in (-1, 1)],
                      *[(1, "box", (0, h * y, 0), (r, t / 2, d * 0.3)) for y in np.linspace(-1, 1, 3 + int(3 * q))]],
        "door": [(0, "box", o, (r, h, t)), (1, "sphere", (r * 0.8, h * 0.2 * q, t + 0.05), (t, t, t))],
        "lamp": [(0, "cylinder", (0, -h, 0), (w * 0.4, t, w * 0.4)), (1, "cylinder", o, (t / 2, h, t / 2)),
                 (2, "shade" if q > 0.4 else "cone", (0, h, 0), (w * 0.5, h * s, w * 0.5))],
        "mug": [(0, "cylinder", o, (r, h, r)), (1, "torus_z", (r * 1.1, 0, 0), (h * s, h * s, t))],
        "bottle": [(0, "cylinder", o, (r / 2, h, r / 2)), (1, "shade", (0, h * 1.2, 0), (r / 2, h * 0.2, r / 2)),
                   (2, "cylinder", (0, h * (1.4 + s * q), 0), (r / 4, h * s * q, r / 4))],
        "aeroplane": [(0, "sphere", o, (w * 1.3, t * 2, t * 2)), (1, "box", (w * s, 0, 0), (w * 0.2, t / 4, d)),
                      (2, "box", (-w * 1.1, h * s / 2, 0), (w * 0.1, h * s / 2, t / 4))],
        "car": [(0, "box", o, (w, h * 0.2, d * 0.45)), (1, "box", (-w * s * 0.5, h * 0.35, 0), (w * 0.5, h * 0.2, d * 0.4)),
                *[(2, "cylinder_z", (x * w * 0.6, -h * 0.2, z * d * 0.4), (h * 0.2, h * 0.2, t)) for x, z in legs]],
        "rocket": [(0, "cylinder", o, (r / 2, h, r / 2)), (1, "cone", (0, h * (1 + s), 0), (r / 2, h * s, r / 2)),
                   *[(2, "box", (0, -h * 0.8, 0), (r * x + t / 4, h * 0.2, r * (1 - x) + t / 4)) for x in (0, 1)]],
        "dumbbell": [(0, "cylinder_x", o, (w, t, t)),
                     *[(1, "sphere" if q > 0.5 else "cylinder_x", (x * w, 0, 0), (w * s, h * s, h * s)) for x in (-1, 1)]],
    }


def synthetic_cloud(name, num_points, rng):
    """A random shape of one category, upright and as it comes: points (num_points, 3) float64, parts (num_points,) from 0."""
    primitives = _shapes(*rng.uniform(0.4, 1, 3), rng.uniform(0.04, 0.1), *rng.random(2))[name]
    sizes = np.array([size for _, _, _, size in primitives])
    # a primitive's share of the points: its area, somewhat levelled so that small parts show, times a random density
    share = (sizes * np.roll(sizes, 1, 1)).sum(1) ** 0.75 * np.exp(0.4 * rng.normal(size=len(sizes)))
    counts = rng.multinomial(num_points, share / share.sum())
    points = [centre + _surface(kind, size, n, rng) for n, (_, kind, centre, size) in zip(counts, primitives)]
    return np.concatenate(points), np.repeat([part for part, *_ in primitives], counts)


def synthetic_clouds(num_per_class, seed=0, num_points=2048):
    """The embedded data: `num_per_class` clouds of each category, class after class, with parts, as Clouds.

    Each is turned about y, tilted by up to 15 degrees, denser towards one side, for every other one with up to a third of it
    cut away on the far side, and noisy (sigma 0.02 of its radius). Cloud i of class c depends on (seed, c, i) alone.
    """
    shapes = _shapes(*[0.5] * 6)
    ends = np.cumsum([0] + [1 + max(part for part, *_ in primitives) for primitives in shapes.values()])
    points = np.empty((len(shapes), num_per_class, num_points, 3), np.float32)
    parts = np.empty(points.shape[:3], np.int64)
    for c, i in np.ndindex(points.shape[:2]):
        rng = np.random.default_rng([seed, c, i])
        xyz, part = synthetic_cloud(list(shapes)[c], 2 * num_points, rng)
        turn, tilt, side = rng.uniform(-np.pi, np.pi), rng.uniform(0, np.pi / 12), rng.normal(size=3)
        for axes, angle in (([0, 2], turn), ([0, 1], tilt)):
            xyz[:, axes] = xyz[:, axes] @ [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        depth = normalize(xyz) @ (side / np.linalg.norm(side))
        keys = rng.exponential(size=len(xyz)) * np.exp(rng.uniform(0, 1.5) * depth)  # small keys stay: thinner with depth
        if rng.random() < 0.5:
            keys[depth > np.quantile(depth, rng.uniform(0.65, 1))] = np.inf
        keep = np.argpartition(keys, num_points)[:num_points]
        xyz = normalize(xyz[keep])
        points[c, i], parts[c, i] = normalize(xyz + 0.02 * rng.normal(size=xyz.shape)), ends[c] + part[keep]
    names = [f"{name}_{seed}_{i:04d}" for name in shapes for i in range(num_per_class)]  # other clouds, other names
    return Clouds(torch.from_numpy(points).reshape(-1, 3), torch.arange(len(names) + 1) * num_points, names,
                  torch.arange(len(shapes)).repeat_interleave(num_per_class), list(shapes), torch.from_numpy(parts).reshape(-1),
                  list(zip(ends[:-1].tolist(), ends[1:].tolist())))


def scale_translate(xyz, generator=None, scale=(2 / 3, 3 / 2), shift=0.2, per_axis=True):
    """Each cloud of xyz (B, N, 3) scaled by U(scale) per axis (or once per cloud), moved per axis by U(-shift, shift)."""
    B = len(xyz)
    factor = torch.rand(B, 1, 3 if per_axis else 1, generator=generator, device=xyz.device, dtype=xyz.dtype)
    offset = torch.rand(B, 1, 3, generator=generator, device=xyz.device, dtype=xyz.dtype)
    return xyz * (scale[0] + (scale[1] - scale[0]) * factor) + shift * (2 * offset - 1)


def rotate_y(xyz, generator=None):
    """Each cloud of xyz (B, N, 3) turned about the up axis y by an angle of its own, uniform over the circle."""
    angle = 2 * math.pi * torch.rand(len(xyz), 1, generator=generator, device=xyz.device, dtype=xyz.dtype)
    cos, sin, (x, y, z) = angle.cos(), angle.sin(), xyz.unbind(2)
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], 2)


# ---------------------------------------------------------------------------------------------------------------------
# Running: flags, processes, schedules, the loop with its checkpoints and log
# ---------------------------------------------------------------------------------------------------------------------

def flag(default, help, paper=None, choices=None, group="run"):
    """A dataclass field that is also a flag of the default's type; `paper`: the published value, shown by --help."""
    said = f"{help} (default: {default!r}{'' if paper is None else f'; the paper: {paper}'})".replace("%", "%%")
    kind = dict(action="store_true") if default is False else dict(type=type(default), choices=choices)
    return field(default=default, metadata=dict(group=group, options=dict(default=default, help=said, **kind)))


@dataclass
class RunConfig:
    """The flags that every script has; a script's own dataclass adds to them."""
    data: str = flag("synthetic", "'synthetic' (embedded shapes) or the path of a data set", "ShapeNet-55", group="data")
    cache: str = flag("", "folder for the memory-mapped copy of a folder of clouds; '': beside the data", group="data")
    size: str = flag("auto", "auto: base on a GPU, tiny on a CPU", "base", ("auto", "tiny", "small", "base"), group="model")
    out: str = flag("runs/run", "folder of the run's checkpoint, log, configuration and pictures")
    points: int = flag(0, "points drawn from a cloud; 0: the size's default", 1024, group="data")
    epochs: int = flag(0, "passes over the data; 0: the size's default", 300, group="training")
    steps: int = flag(0, "train for this many steps instead; 0: as --epochs says", group="training")
    batch_size: int = flag(0, "clouds per step over all processes; 0: the size's default", group="training")
    lr: float = flag(0.0, "peak learning rate; 0: the published one", group="training")
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    precision: str = flag("auto", "auto: bf16 where the device multiplies in it, else fp32", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the Transformer blocks")
    resume: bool = flag(False, "go on from the checkpoint in --out, bit for bit on a CPU")
    save_minutes: float = flag(10.0, "a checkpoint at least this often, besides one per epoch")
    log_every: int = flag(0, "also log every so many steps; 0: the size's default, or epochs only")


def parse_flags(config_class, description, argv=None):
    """An instance of the dataclass from the command line; an unknown, abbreviated or unfit flag is a ValueError."""
    def refuse(message):
        raise ValueError(message)

    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=layout)
    parser.error = refuse
    groups = {}
    for f in fields(config_class):
        group = f.metadata["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        groups[group].add_argument("--" + f.name.replace("_", "-"), **f.metadata["options"])
    config = config_class(**vars(parser.parse_args(argv)))
    for name in ("points", "epochs", "steps", "batch_size", "lr", "save_minutes", "log_every"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, found {getattr(config, name)}")
    return config


def run_script(main):
    """Runs a script's main: a user's mistake is one line and exit code 2, never a traceback."""
    mistake = None
    try:
        main()
    except (ValueError, OSError) as error:
        mistake = str(error)
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            mistake = f"{error}: lower --batch-size"
        elif re.search("Connection (closed|reset) by peer", str(error)):
            mistake = "another process ended"
        else:
            raise
    if mistake is not None:
        process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{process}: {' '.join(mistake.split())}", file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():
        if mistake is None:
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0 if mistake is None else 2)  # the peers may hang in a collective; gloo's threads may abort an ordinary exit
    sys.exit(0 if mistake is None else 2)


def start_processes(config):
    """(device, rank, number of processes), as torchrun set them up; one process without it. Seeds everything."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: wanted auto, cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no GPU here")
    if device == "cuda":
        device += f":{os.environ.get('LOCAL_RANK', 0)}"
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    if device != "cpu":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(config.seed)
    return torch.device(device), int(os.environ.get("RANK", 0)), world


def say(*words, **options):
    """print, once, whatever the number of processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, **options, flush=True)


def cosine(x, start, end):
    """From `start` at x <= 0 to `end` at x >= 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, x)))) / 2


def learning_rate(step, total, peak, end, warmup, start=1e-6):
    """Linear warm-up from `start` over `warmup` steps (at most a tenth of the run), then a cosine to `end` at `total`."""
    warmup = min(warmup, total / 10)
    if step < warmup:
        return start + (peak - start) * step / warmup
    return cosine((step - warmup) / max(1, total - warmup), peak, end)


def compile_blocks(model):
    """torch.compile on each Transformer block in place: seconds, where the whole would take minutes."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def adamw(model, lr, weight_decay):
    """AdamW without decay on one-dimensional parameters, biases and names holding "token" (Sec. 4, as published)."""
    decayed, spared = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (spared if p.ndim <= 1 or name.endswith("bias") or "token" in name else decayed).append(p)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=spared, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


class Run:
    """One training run: its folder, settings, checkpoint, log, and the loop over steps.

    All that a step draws comes from seeds made of (seed, step), so that a resumed run goes on bit for bit, in the middle of
    an epoch too, and every process draws the same batch and takes its share of it.
    """
    HARMLESS = set("out resume save_minutes log_every cache data device compile vote predict features category".split())

    def __init__(self, config, model, clouds, weight_decay, clip=math.inf, extra=None):
        self.config, self.model, self.clip, self.extra = config, model, clip, dict(extra or {})
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.names, self.out = next(model.parameters()).device, clouds.names, Path(config.out)
        self.checkpoint, self.log = self.out / "last.pt", self.out / "metrics.jsonl"
        self.digest = hashlib.sha256("\n".join(clouds.names).encode()).hexdigest()[:16]
        check_distinct(clouds, model.config.num_group)
        self.batch = min(config.batch_size, len(clouds))
        if self.batch < self.world:
            raise ValueError(f"--batch-size {self.batch} is less than the {self.world} processes")
        self.per_epoch = len(clouds) // self.batch  # the last, smaller batch is dropped, unless it is the only one
        self.total = config.steps or config.epochs * self.per_epoch
        self.step, self.sums, self.seconds = 0, {}, 0.0
        self.optimizer = adamw(model, config.lr, weight_decay)
        self.net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if self.world > 1 else model
        if config.compile:
            compile_blocks(model)
        self._open()

    def _open(self):
        """The folder: with --resume an earlier run in it is taken up, else its files are set aside."""
        resume = self.config.resume and self.checkpoint.exists()
        if resume:
            self._resume()
        elif self.config.resume:
            say(f"--resume: no checkpoint {self.checkpoint} yet, from the beginning")
        if self.rank:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            ours = () if resume else ("last.pt", "metrics.jsonl", "config.json", "*.png", "*.ply")
            earlier = [path for name in ours for path in self.out.glob(name)]
            if earlier:
                aside = self.out / time.strftime("earlier-%Y%m%d-%H%M%S")
                aside.mkdir(exist_ok=True)
                for path in earlier:
                    path.rename(aside / path.name)
                say(f"the earlier run in {self.out} is now in {aside}")
            with whole_file(self.out / "config.json") as file:
                file.write(json.dumps({**asdict(self.config), "model": asdict(self.model.config)}, indent=1).encode())
        except OSError as error:
            raise ValueError(f"--out {self.out}: cannot be written ({error.strerror})") from error

    def _resume(self):
        state, now = read_tensors(self.checkpoint), asdict(self.config)
        if not {"settings", "model", "optimizer", "step"} <= set(state):
            raise ValueError(f"{self.checkpoint}: wanted a checkpoint of a training run")
        changed = [f"--{k.replace('_', '-')} was {v!r}, is {now.get(k)!r}" for k, v in state["settings"].items()
                   if k not in self.HARMLESS and now.get(k) != v]
        if state["clouds"] != self.digest:
            changed.append("the data set's clouds are others")
        if changed:
            raise ValueError(f"{self.checkpoint}: cannot resume, since {'; '.join(changed)}")
        load_exactly(self.model, state["model"], self.checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds, self.extra = state["step"], state["seconds"], state["extra"]
        self.sums = state["sums"] if self.rank == 0 else {name: 0 * value for name, value in state["sums"].items()}
        if self.rank == 0 and self.log.exists():
            rows = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
            rows = [row for row in rows if row["step"] <= self.step and "loss" in row]  # the closing figures are made anew
            with whole_file(self.log) as file:
                file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
        say(f"resumed {self.checkpoint} at step {self.step}")

    def save(self):
        if self.rank == 0:
            save({"kind": type(self.model).__name__, "config": asdict(self.model.config), "model": self.model.state_dict(),
                  "optimizer": self.optimizer.state_dict(), "settings": asdict(self.config), "clouds": self.digest,
                  "step": self.step, "epoch": self.step // self.per_epoch, "random": torch.get_rng_state(),
                  "sums": self.sums, "seconds": self.seconds, "extra": self.extra,
                  "versions": {"torch": str(torch.__version__), "numpy": np.__version__}}, self.checkpoint)

    def record(self, **values):
        """Appends one object to metrics.jsonl; figures that are not finite become null."""
        if self.rank == 0:
            epoch = -(-self.step // self.per_epoch)  # the one that the last step belongs to, from 1
            values = {"epoch": epoch, "step": self.step, "seconds": round(self.seconds, 2), **values}
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with open(self.log, "a") as file:
                file.write(json.dumps(values) + "\n")

    def train(self, schedule, loss, finish_epoch=lambda epoch: {}):
        """The loop. schedule(step) -> {"lr": …, further numbers handed to the loss and logged}.

        loss(net, step, indices (B,), generator, share, **numbers) -> (loss, {name: scalar tensor}): means over the clouds
        `share` (a slice) of the batch; draws made from the generator are for the whole batch.
        """
        stop, order, seed = [], None, self.config.seed
        handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        self.model.train()
        while self.step < self.total:
            epoch, position = divmod(self.step, self.per_epoch)
            if order is None or position == 0:  # each epoch takes all clouds, in a new order
                order = torch.randperm(len(self.names), generator=seeded("cpu", seed, "order", epoch)).split(self.batch)
            numbers = schedule(self.step)
            self._update(loss, order[position], **numbers)
            self.seconds = time.monotonic() - began
            ends = position + 1 == self.per_epoch or self.step == self.total
            stopped, late = self._agree(ends, bool(stop), time.monotonic() - saved > 60 * self.config.save_minutes)
            saves, logs = ends or stopped or late, ends or self.step % (self.config.log_every or math.inf) == 0
            self._progress(hidden=ends or stopped)
            if saves or logs or self.device.type == "cpu":  # all that waits for a GPU
                means = {**self._means(order[position]), **numbers}
            if ends:
                self.sums = {}
                means.update(finish_epoch(epoch + 1))
                self.model.train()
                shown = "  ".join(f"{k} {v:.4g}" for k, v in means.items() if isinstance(v, (int, float)))
                say(f"epoch {epoch + 1}  step {self.step}  {shown}  seconds {self.seconds:.1f}")
            if logs:
                self.record(**means)
            if saves:
                self.save()
                saved = time.monotonic()
            if stopped and self.step < self.total:
                say(f"stopped at step {self.step} of {self.total}; "
                    f"the same command with --resume goes on from {self.checkpoint}")
                sys.exit(128 + stop[0] if stop else 143)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        self.model.eval()

    def _update(self, loss, indices, lr, **numbers):
        """One step of the optimizer, on this process's share of the clouds; adds to the epoch's sums, waits for nothing."""
        share, seed = slice(self.rank, None, self.world), self.config.seed
        weight = len(indices[share]) / len(indices)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # dropout, drop path, Gumbel noise: different on every process
        torch.manual_seed(seeded("cpu", seed, "noise", self.step, self.rank).initial_seed())
        generator = seeded(self.device, seed, "batch", self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            value, parts = loss(self.net, self.step, indices, generator, share, **numbers)
        self.optimizer.zero_grad()
        (value * (weight * self.world)).backward()  # DDP averages over processes, not over clouds
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.step += 1
        for name, tensor in {"loss": value, **parts, "grad_norm": norm}.items():
            self.sums[name] = self.sums.get(name, 0) + weight * tensor.detach().double()

    def _agree(self, now, *conditions):
        """Whether each condition holds in any process; asked `now`, else at every 16th step, since all wait for all."""
        if self.world == 1:
            return conditions
        if not now and self.step % 16:
            return [False] * len(conditions)
        flags = torch.tensor(conditions, dtype=torch.int, device=self.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return flags.bool().tolist()

    def _means(self, indices):
        """Means of the epoch so far over all processes' clouds. Raises ValueError if loss or gradient is not finite."""
        sums = torch.stack(list(self.sums.values()))
        if self.world > 1:
            torch.distributed.all_reduce(sums)
            self.sums = dict(zip(self.sums, sums if self.rank == 0 else torch.zeros_like(sums)))  # process 0 has and saves all
        means = dict(zip(self.sums, (sums / ((self.step - 1) % self.per_epoch + 1)).tolist()))
        if not all(map(math.isfinite, means.values())):
            names = ", ".join(self.names[i] for i in indices[:5])
            kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else "no checkpoint yet"
            raise ValueError(f"the loss or its gradient is not finite at step {self.step - 1} (clouds {names}, …): "
                             f"lower --lr, or --precision fp32; {kept}")
        return means

    def _progress(self, hidden):
        """On a terminal a bar with rate and time left, `hidden` where a line follows."""
        if self.rank == 0 and sys.stdout.isatty():
            rate, left = self.step * self.batch / self.seconds, int(self.seconds * (self.total / self.step - 1))
            bar = (f"[{'#' * (20 * self.step // self.total):.<20}] step {self.step}/{self.total}  {rate:.1f} clouds/s  "
                   f"{left // 60}:{left % 60:02d} left")
            print("\r\033[K" + ("" if hidden else bar), end="", flush=True)

    def close(self, pictures=(), **figures):
        """The run's closing figures as the last object of the log, its pictures, time and memory."""
        if self.rank:
            return
        self.record(**figures)
        for name, picture in pictures:  # an image, or what write_gallery takes
            if isinstance(picture, np.ndarray):
                write_png(self.out / f"{name}.png", picture)
            else:
                write_gallery(self.out / name, *picture)
        rows = [json.loads(line) for line in self.log.read_text().splitlines()]
        curves = {name: [(row["step"], row[name]) for row in rows if name in row] for name in ("loss", "reconstruction")}
        curves = {name: tuple(zip(*points)) for name, points in curves.items() if points}
        write_png(self.out / "loss.png", plot_lines(curves, "training loss", "step", "loss"))
        peak = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        say(f"{self.seconds:.0f} s for {self.step} steps, peak memory {peak / 2**30:.2f} GiB; {self.out} holds "
            + ", ".join(sorted(p.name for p in self.out.iterdir() if p.is_file() and not p.name.startswith("."))))


SIZES = {  # the teacher's and the student's, where they are not the paper's
    "tiny": dict(trunk="vit_tiny_patch16_224", trunk_width=192,
                 encoder=dict(num_group=32, width=192, depth=6, num_heads=3, encoder_dims=192),
                 teacher=dict(num_group=32, encoder_dims=192, tokens_dims=192, decoder_dims=192, num_tokens=512,
                              num_prompt=16, tokenizer="fixed")),
    "small": dict(trunk="vit_small_patch16_384", trunk_width=384, encoder={}, teacher=dict(num_tokens=2048, num_prompt=32)),
    "base": dict(trunk="vit_base_patch16_384", trunk_width=768, encoder={}, teacher={}),
}


def processor_has_bf16():
    """Whether the CPU multiplies in bf16, not only converts to it."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and re.search(r"\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text()) is not None


def resolve(config, device, defaults):
    """The settings with `auto` and 0 replaced by what they stand for on this device."""
    bf16 = device.type == "cuda" or processor_has_bf16()
    auto = dict(size="base" if device.type == "cuda" else "tiny", precision="bf16" if bf16 else "fp32")
    config = replace(config, **{name: value for name, value in auto.items() if getattr(config, name) == "auto"})
    default = {"points": 1024, **defaults[config.size]}
    return replace(config, **{name: getattr(config, name) or value for name, value in default.items()})


def check_distinct(clouds, num_group):
    """Raises ValueError, naming the first cloud that has fewer distinct points than patches."""
    for i, name in enumerate(clouds.names):
        points = clouds[i]
        if len(points[: 4 * num_group].unique(dim=0)) < num_group and (n := len(points.unique(dim=0))) < num_group:
            raise ValueError(f"{name}: has {n} distinct points, wanted at least the {num_group} patches of the model")


def open_data(config, device, everything=False):
    """(train, test) Clouds of --data, on the device where they fit; `everything`: ShapeNet-55 is trained on whole."""
    if config.data == "synthetic":
        train, test = synthetic_clouds(50, seed=0), synthetic_clouds(20, seed=1)
    else:
        first = None if everything and _shapenet(Path(config.data)) else "train"
        train, test = (open_clouds(config.data, split, config.cache or None) for split in (first, "test"))
    if device.type == "cuda" and train.points.nbytes < torch.cuda.mem_get_info()[0] // 4:
        train, test = train.to(device), test.to(device)
    return train, test


# Pictures, with numpy and zlib alone: an image is a (H, W, 3) uint8 array, x to the right and y down, in pixels. The font
# holds ASCII 32..126, then a box for all else: five columns a glyph, a byte each, the top pixel in the lowest bit.
FONT = bytes.fromhex(
    "000000000000005f00000007000700147f147f14242a7f2a12231308646236495522500000070000001c2241000041221c0014083e081408083e0808"
    "00806000000808080808006060000060100804031c2241221c44427f4040426151494622414949361814127f1027454545393c4a4949300101710d03"
    "3649494936064949291e0066660000008666000008142241001414141414004122140802015909063e415d555e7e0909097e7f494949363e41414122"
    "7f4141413e7f494949417f090909013e4149497a7f0808087f00417f41002040413f017f081422417f404040407f020c027f7f0608307f3e4141413e"
    "7f090909063e4151215e7f09192946464949493101017f01013f4040403f0f3040300f7f2018207f631408146303047804036151494543007f414100"
    "03040810600041417f0004020102048080808080000102000020545454787f444444383844444444384444447f3854545418087e09090218a4a4a47c"
    "7f0404047800447d40008080847d007f1028440000417f40007c047804787c040404783844444438fc2424241818242424fc7c080404004854545424"
    "043f4444203c4040407c1c2040201c3c4038403c44281028441ca0a0a07c4464544c4400087741000000ff0000004177080008040810087f4141417f")
INK, GRID = (50, 50, 60), (225, 225, 230)


def write_png(path, image):
    """Writes a (H, W, 3) uint8 image as PNG, whole or not at all."""
    assert image.dtype == np.uint8 and image.shape[2:] == (3,), f"{path}: found {image.shape} {image.dtype}"
    H, W, _ = image.shape
    rows = np.pad(image.reshape(H, 3 * W), ((0, 0), (1, 0))).tobytes()  # each row opens with its filter: 0, none
    header = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    with whole_file(path) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def draw_text(image, x, y, text, color=INK, scale=2, align=0.0, width=math.inf):
    """Writes `text` into `image`, 8 pixels times `scale` high from y down; align 0, 0.5, 1: x is its left, middle, right.
    What lies outside is cut off; text wider than `width` pixels is drawn at half the scale, then shortened."""
    scale = scale if 6 * scale * len(text) <= width else scale // 2
    if 6 * scale * len(text) > width:
        text = text[: max(int(width) // (6 * scale) - 2, 0)] + ".."
    glyphs = np.frombuffer(FONT, np.uint8).reshape(96, 5)[[ord(c) - 32 if " " <= c <= "~" else 95 for c in text]]
    bits = np.unpackbits(np.pad(glyphs, ((0, 0), (0, 1))).reshape(-1, 1), axis=1, bitorder="little")  # (6 len, 8)
    columns, rows = np.nonzero(bits.repeat(scale, axis=0).repeat(scale, axis=1))
    columns, rows = columns + round(x - align * (6 * len(text) - 1) * scale), rows + round(y)
    inside = (columns >= 0) & (columns < image.shape[1]) & (rows >= 0) & (rows < image.shape[0])
    image[rows[inside], columns[inside]] = color


def render(xyz, colors=None, size=320, radius=1.05):
    """A cloud (N, 3) as shaded discs on white, y up, seen from 35 degrees aside and 20 above -> (size, size, 3) uint8.

    colors: (N, 3) in 0..1, by height if not given. The frame holds the ball of `radius` about the origin whatever the
    cloud, so that renders compare. Points that are not finite are left out.
    """
    xyz = np.asarray(xyz, dtype=np.float64)
    height = np.clip(0.5 + xyz[:, 1:2] / radius / 2, 0, 1)
    colors = [0.10, 0.20, 0.52] + height * [0.15, 0.52, 0.34] if colors is None else np.asarray(colors)
    xyz, colors = [values[np.isfinite(xyz).all(axis=1)] for values in (xyz, colors)]
    sa, ca, se, ce = 0.5736, 0.8192, 0.3420, 0.9397  # sine and cosine of 35 and of 20 degrees
    x, y, depth = np.array([[ca, 0, -sa], [-se * sa, ce, -se * ca], [ce * sa, se, ce * ca]]) @ xyz.T
    S = 2 * size  # painted at twice the size, averaged at the end: smooth edges
    zoom = 0.97 * S * 2 / np.maximum(4 * radius - depth, radius)  # mild perspective, from 4 radii away
    row, column = [np.rint(np.clip(S / 2 + v * zoom, -S, 2 * S)).astype(int)[:, None] for v in (-y, x)]
    disc = min(max(0.52 * S / math.sqrt(len(xyz) + 1), 1.5), 0.02 * S)  # its radius: the more points, the smaller
    reach = int(disc)
    dy, dx = (np.argwhere(np.hypot(*np.mgrid[-reach:reach + 1, -reach:reach + 1]) <= disc) - reach).T  # its pixels
    ball = 0.8 * np.sqrt(1 - (dx**2 + dy**2) / disc**2) - (0.35 * dx + 0.5 * dy) / disc  # lit from the upper left
    light = 0.62 + 0.38 * np.clip(ball, 0, 1)[:, None]
    fade = 0.45 + 0.55 * np.clip(0.5 + depth / radius / 2, 0, 1)[:, None, None]  # the far side fades into the white
    colors = np.clip(colors, 0, 1)[:, None]
    canvas = np.ones((S, S, 3), np.float32)
    # far to near, the nearer hides the farther; parts bound the memory
    for part in np.array_split(np.argsort(depth, kind="stable"), len(xyz) // 2**16 + 1):
        rows, columns = row[part] + dy, column[part] + dx  # (n, pixels)
        inside = (rows >= 0) & (rows < S) & (columns >= 0) & (columns < S)
        canvas[rows[inside], columns[inside]] = (colors[part] * light * fade[part] + 1 - fade[part])[inside]
    return (255 * canvas.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))).round().astype(np.uint8)


def palette(n):
    """n distinct colours in a fixed order -> (n, 3) in 0..1: ten hues, then the same, darker and lighter by turns."""
    hues = np.frombuffer(bytes.fromhex("3b6fb6e8833a4a9c5dc94f4f8a63b08c6150d77fb57a7a7ab5aa3c3fb1c0"), np.uint8)
    tier = np.arange(n)[:, None] // 10
    keep = 0.6 ** ((tier + 1) // 2)
    return hues.reshape(10, 3)[np.arange(n) % 10] / 255 * keep + (1 - keep) * (tier % 2 == 0)


def pca_colors(features):
    """First three principal components of (N, C) features -> colours (N, 3), 2nd to 98th percentile to 0..1; the largest
    loading of each is positive, a component without variance gives 0.5."""
    features = np.asarray(features, dtype=np.float64)
    _, strength, axes = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    axes = axes[:3][strength[:3] > 1e-9 * np.linalg.norm(features)]
    scores = features @ axes.T * np.sign([axis[abs(axis).argmax()] for axis in axes])
    low, high = np.percentile(scores, [2, 98], axis=0)
    scores = np.clip((scores - low) / np.maximum(high - low, 1e-300), 0, 1)
    return np.pad(scores, ((0, 0), (0, 3 - len(axes))), constant_values=0.5)


def montage(rows, columns=None, labels=None):
    """A grid of images, all of one size, from equally long rows of them, with headings above and labels at the left."""
    h, w, _ = np.add(rows[0][0].shape, 6)  # with a margin
    left, top = 12 * max(map(len, labels or [""])), 20 if columns else 0
    tiles = [np.hstack([np.pad(tile, ((6, 0), (6, 0), (0, 0)), constant_values=255) for tile in row]) for row in rows]
    image = np.pad(np.vstack(tiles), ((top, 6), (left, 6), (0, 0)), constant_values=255)
    for j, heading in enumerate(columns or []):
        draw_text(image, left + j * w + 3 + w / 2, 6, heading, align=0.5, width=w - 6)
    for i, label in enumerate(labels or []):
        draw_text(image, 6, top + i * h + h / 2 - 8, label)
    return image


def write_gallery(path, rows, columns, labels=None):
    """Clouds side by side as a picture, `path`.png, and for other viewers as one coloured cloud, `path`.ply.

    rows: lists of (xyz (N, 3), colors (N, 3) in 0..1 or None), under the headings `columns`.
    """
    path = Path(path)
    write_png(path.with_suffix(".png"), montage([[render(xyz, colors) for xyz, colors in row] for row in rows], columns, labels))
    placed = [(xyz + np.array([2.5 * x, -2.5 * y, 0], np.float32), np.full(xyz.shape, 0.5) if colors is None else colors)
              for y, row in enumerate(rows) for x, (xyz, colors) in enumerate(row)]
    xyz, colors = (np.concatenate(parts) for parts in zip(*placed))
    write_ply(path.with_suffix(".ply"), xyz, np.uint8(255 * colors))


def plot_lines(curves, title="", xlabel="", ylabel="", size=(640, 400)):
    """Curves {name: (xs, ys)} in axes with a legend -> image of `size` = (width, height). NaN and Inf are gaps; the y axis
    is logarithmic if all values are positive and span over two decades."""
    W, H = size
    lines = [np.array([[*x, np.nan], [*y, np.nan]], dtype=np.float64) for x, y in curves.values()]  # (2, K), never empty
    lines = [np.where(np.isfinite(xy).all(axis=0), xy, np.nan) for xy in lines]
    every = np.hstack([np.empty((2, 0)), *(xy[:, ~np.isnan(xy[0])] for xy in lines)])
    every = every if every.size else np.eye(2)
    log = 0 < 100 * every[1].min() < every[1].max()
    for xy in (every, *lines) if log else ():
        xy[1] = np.log10(xy[1])
    low, high = every.min(axis=1), every.max(axis=1)
    pad = np.where(high > low, 0.04 * (high - low), np.where(high == 0, 0.5, 0.1 * abs(high)))
    low, high = low - pad, high + pad
    ticks = []
    for a, whole in enumerate(((every[0] % 1 == 0).all(), log)):  # about six, whole numbers for epochs and exponents
        least = max((high[a] - low[a]) / 6, whole) * (1 - 1e-9)
        step = next(s for s in 10.0 ** math.floor(math.log10(least)) * np.array([1, 2, 5, 10]) if s >= least)
        ticks.append(np.arange(math.ceil(low[a] / step), math.floor(high[a] / step) + 1) * step)
    texts = [f"{v:.7g}" for v in ticks[0]], [f"{10**v if log else v:.7g}" for v in ticks[1]]
    left, right, top, bottom = 36 + 12 * max(map(len, texts[1])), W - 24, 44 + 20 * -(-len(lines) // 2), H - 52
    scale = np.array([[right - left], [top - bottom]]) / (high - low)[:, None]
    origin = np.array([[left], [bottom]]) - low[:, None] * scale  # pixel = value * scale + origin
    image = np.full((H, W, 3), 255, np.uint8)
    draw_text(image, left, 8, title, width=W - left)
    draw_text(image, (left + right) / 2, H - 20, xlabel, align=0.5)
    draw_text(np.rot90(image, -1), H - (top + bottom) / 2, 4, ylabel, align=0.5)  # a view, turned: written upwards
    for x, text in zip(np.rint(ticks[0] * scale[0] + origin[0]).astype(int), texts[0]):
        image[top:bottom, x] = GRID
        draw_text(image, x, bottom + 8, text, align=0.5)
    for y, text in zip(np.rint(ticks[1] * scale[1] + origin[1]).astype(int), texts[1]):
        image[y, left:right] = GRID
        draw_text(image, left - 8, y - 6, text, align=1)
    image[top:bottom, left - 1] = image[bottom, left - 1 : right] = INK
    canvas = image.repeat(2, axis=0).repeat(2, axis=1)  # curves at twice the size, averaged at the end: smooth
    for i, (name, xy, color) in enumerate(zip(curves, lines, 255 * palette(len(lines)))):
        x, y = 2 * left + i % 2 * (W - left), 64 + i // 2 * 40  # the legend, two names a line
        canvas[y + 2 : y + 26, x : x + 24] = color
        draw_text(canvas, x + 34, y, name, scale=4, width=W - left - 44)
        xy = 2 * (xy * scale + origin)
        jumps = np.nan_to_num(abs(np.diff(xy)).max(axis=0))  # pixels from each value to the next
        ends = np.append(0, np.cumsum(np.ceil(jumps) + 1))  # so many samples that no two are a pixel apart
        dense = np.stack([np.interp(np.arange(ends[-1] + 1), ends, v) for v in xy])
        for points, r in ((dense, 2), (xy, 5 if len(ends) <= 40 else 2)):
            x, y = np.rint(points[:, ~np.isnan(points[0])]).astype(int)
            for dy, dx in np.argwhere(np.hypot(*np.mgrid[-r : r + 1, -r : r + 1]) <= r) - r:
                canvas[y + dy, x + dx] = color
    return canvas.reshape(H, 2, W, 2, 3).mean(axis=(1, 3)).astype(np.uint8)


def plot_matrix(matrix, names, title=""):
    """Confusion matrix (n, n) of counts as an image: a row for each true class, shaded by the share of its row."""
    matrix, n = np.asarray(matrix), len(matrix)
    cell = max(28, min(48, 480 // n))
    labels = [f"{name if len(name) < 17 else name[:15] + '..'} {i}" for i, name in enumerate(names)]
    left, top, side = 12 + 12 * max(map(len, ["truth", *labels])), 74, n * cell
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    tint = np.where(matrix > 0, 0.1 + 0.9 * share, 0)[:, :, None]
    hue = np.where(np.eye(n, dtype=bool)[:, :, None], [35, 85, 165], [200, 65, 45])  # hits blue, misses red
    cells = (255 + tint * (hue - 255)).repeat(cell, axis=0).repeat(cell, axis=1)
    cells[::cell] = cells[:, ::cell] = cells[-1] = cells[:, -1] = GRID
    image = np.full((top + side + 8, max(left + max(side, 108) + 8, 12 * len(title) + 12), 3), 255, np.uint8)
    image[top : top + side, left : left + side] = cells
    for x, y, text, align in ((6, 6, title, 0), (left, 32, "predicted", 0), (left - 6, 54, "truth", 1)):
        draw_text(image, x, y, text, align=align)
    for i, label in enumerate(labels):
        middle = i * cell + cell / 2
        draw_text(image, left - 6, top + middle - 6, label, align=1)
        draw_text(image, left + middle, 54, str(i), align=0.5, width=cell)
        for j in np.flatnonzero(matrix[i]) if n <= 12 else ():
            color = (255, 255, 255) if share[i, j] > 0.5 else INK
            draw_text(image, left + j * cell + cell / 2, top + middle - 6, str(matrix[i, j]), color, align=0.5, width=cell)
    return image
