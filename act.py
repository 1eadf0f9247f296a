"""ACT: a pretrained 2D Transformer, frozen, as a 3D autoencoder that teaches a 3D Transformer.

R. Dong et al., "Autoencoders as Cross-Modal Teachers: Can Pretrained 2D Image Transformers Help 3D
Representation Learning?", ICLR 2023, arXiv:2212.08320. The method in one file, to be read from top
to bottom beside the paper: geometry, Transformer, patches, teacher (stage I, Sec. 4.1), student
(stage II, Sec. 4.2), transfer heads (Sec. 5), and last weights and checkpoints.

Shapes: B batch, N points, G groups (patches), S points per group, C and D channels, V visible and
M masked groups, K neighbours, T tokens, P prompts, R rows. A True in a mask means masked.

Where this differs from the paper or from the official implementation:
 1. The teacher of stage II is in eval mode, with argmax codes, so that targets are deterministic.
    The official one keeps BatchNorm, prompt dropout and Gumbel noise on. Evaluation has no noise.
 2. Deep prompts are keys and values computed once per batch: prompt dropout acts once per step.
 3. The student embeds its visible patches only: BatchNorm sees those alone.
 4. Learning rate, temperature and KL weight move with every step. A run shorter than the published
    one scales temperature and KL weight by its length. No warm-up exceeds a tenth of a run.
 5. Every backbone is treated alike, BERT too: positions at every block, deep prompts. Officially
    BERT gets positions once and fails with deep prompts; CLIP attends across a batch's clouds.
 6. FPS takes no index twice; the official kernel repeats 0, and skips points of |p|^2 <= 1e-3.
 7. Frozen protocols freeze all below the head, class token and statistics too. Of the published
    sets only ScanObjectNN is rotated. Results are the last epoch's.
 8. A new BatchNorm averages all steps before its tenth, then as published with momentum 0.1.
 9. Sizes tiny and small take mutual information for the KL term and start codes from patches: in
    a short run the decoder would learn to ignore the codes (train_teacher.py).
10. By rounding only: a Linear of concatenated inputs is computed part by part, and the product with
    one-hot codes is a look-up.
"""

import math
import os
import threading
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """A mistake of the user, told in one line that names the file or the argument."""


class MissingFile(UserError, FileNotFoundError):
    """A UserError that callers of Python's own open() expect, too."""


# -- geometry
# Batched, on any device, in float32 or better even under autocast. Distances are computed by
# subtraction: the expanded square loses every digit of a cloud far from the origin. Each function
# can be copied out with `import torch`, the functions it calls; FPS: threading, lru_cache, too.
def farthest_point_sample(
    xyz: torch.Tensor, num_samples: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Indices of mutually distant points (PointNet++, Sec. 3.2).

    xyz: (B, N, 3) -> (B, num_samples) int64. The first is point 0, or a random one by `generator`.
    Each further one is argmax_i min_{j chosen} |x_i - x_j|^2 over the points that are left, ties by
    index: none is taken twice. Raises ValueError if num_samples > N."""
    B, N, _ = xyz.shape
    if not 1 <= num_samples <= N:
        raise ValueError(f"num_samples: expected 1 to the {N} points of a cloud, got {num_samples}")
    dtype = torch.promote_types(xyz.dtype, torch.float32)
    # Coordinates as three planes: every pass of the loop has unit stride.
    planes = xyz.detach().to(dtype).permute(2, 0, 1).contiguous()  # (3, B, N)
    first = torch.zeros(B, 1, dtype=torch.long, device=xyz.device)
    if generator is not None:
        first = torch.randint(N, (B, 1), generator=generator, device=generator.device)
        first = first.to(xyz.device)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    eager = type(xyz) is torch.Tensor and not traced
    # Clouds that come one by one have a size each: no graph would serve twice.
    if eager and xyz.is_cuda and B > 1 and not torch.cuda.is_current_stream_capturing():
        return replay_farthest(planes, first, num_samples)
    return choose_farthest(planes, first, num_samples)


def choose_farthest(planes: torch.Tensor, farthest: torch.Tensor, num_samples: int) -> torch.Tensor:
    """The loop of farthest_point_sample from the first points, planes (3, B, N), (B, 1)."""
    x, y, z = planes  # (B, N) each
    idx = [farthest]
    nearest = torch.full_like(x, float("inf"))  # squared distance to the chosen points
    for _ in range(num_samples - 1):
        dx = x - x.gather(1, farthest)
        dy = y - y.gather(1, farthest)
        dz = z - z.gather(1, farthest)
        sqdist = dx.mul_(dx).add_(dy.mul_(dy)).add_(dz.mul_(dz))  # (B, N)
        nearest = torch.minimum(nearest, sqdist)
        nearest.scatter_(1, farthest, -1)  # below every distance, that of a copy of a point, too
        farthest = nearest.argmax(dim=1, keepdim=True)  # the first of equal maxima
        idx.append(farthest)
    return torch.cat(idx, dim=1)


def replay_farthest(planes: torch.Tensor, first: torch.Tensor, num_samples: int) -> torch.Tensor:
    """choose_farthest as one CUDA graph: one by one, its kernels wait for the host, by estimate."""
    owner = (torch.cuda.current_stream(planes.device), threading.get_ident())
    inputs, graph, idx = record_farthest(planes.shape, planes.dtype, num_samples, owner)
    inputs[0].copy_(planes)
    inputs[1].copy_(first)
    graph.replay()
    return idx.clone()  # the next replay overwrites idx


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # whose tensors could not be written to outside of it
def record_farthest(shape: torch.Size, dtype: torch.dtype, num_samples: int, owner) -> tuple:
    """The CUDA graph of choose_farthest for a stream of a thread -> its inputs, itself, output."""
    device = owner[0].device
    planes = torch.zeros(shape, dtype=dtype, device=device)
    first = torch.zeros(shape[1], 1, dtype=torch.long, device=device)
    choose_farthest(planes, first, num_samples)  # loads the kernels, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream(device)  # the default stream cannot be captured
    # Other threads, such as NCCL's, may call CUDA during a capture that is thread_local.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        idx = choose_farthest(planes, first, num_samples)
    return (planes, first), graph, idx


def knn(query: torch.Tensor, xyz: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k points of `xyz` nearest to each query, ties by index.
    query: (B, Q, 3), xyz: (B, N, 3) -> sqdist (B, Q, k) ascending, idx (B, Q, k) int64, where
    sqdist[b, q, j] = |query[b, q] - xyz[b, idx[b, q, j]]|^2 (squared unit, no gradient). Extra
    memory is bounded, whatever N and Q are. Raises ValueError if k > N."""
    B, Q, _ = query.shape
    N = xyz.shape[1]
    if not 1 <= k <= N:
        raise ValueError(f"k: expected 1 to the {N} points of a cloud, got {k}")
    dtype = torch.promote_types(torch.promote_types(query.dtype, xyz.dtype), torch.float32)
    points = xyz.detach().to(dtype).permute(2, 0, 1).contiguous()[:, :, None]  # (3, B, 1, N)
    queries = query.detach().to(dtype).permute(2, 0, 1).contiguous()[..., None]  # (3, B, Q, 1)
    chunk = Q  # an exported graph takes all queries at once, so that it holds for any B
    if not torch.compiler.is_compiling():
        distances = 2**26  # at a time: they fill a GPU
        if xyz.device.type == "cpu":
            distances = 2**17  # they fit a core's cache
        chunk = max(1, distances // max(1, B * N))
    sqdist = torch.empty(B, Q, k, dtype=dtype, device=xyz.device)
    idx = torch.empty(B, Q, k, dtype=torch.long, device=xyz.device)
    for start in range(0, Q, chunk):
        part = slice(start, start + chunk)
        diff = queries[:, :, part] - points  # (3, B, q, N)
        diff.mul_(diff)
        value = diff[0].add_(diff[1]).add_(diff[2])  # (B, q, N)
        sqdist[:, part], idx[:, part] = smallest(value, k)
    return sqdist, idx


def smallest(value: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest of each row, ascending, and their indices, ties by index.
    value: (..., N), none below 0 -> (..., k) and (..., k) int64."""
    if k == 1:
        return value.min(dim=-1, keepdim=True)  # the first of equal minima
    if torch.onnx.is_in_onnx_export():
        return value.topk(k, largest=False)  # ONNX has no stable sort; its TopK orders by index
    in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if value.dtype != torch.float32 or in_graph:
        value, idx = value.sort(dim=-1, stable=True)
        return value[..., :k], idx[..., :k]
    # topk leaves the order of equal values open, and a stable sort of all values is 5 times slower.
    # The bits of a float32 that is not negative, read as an integer, are in the order of the
    # values. With the index in the lower half of an int64 no two keys are equal.
    key = value.view(torch.int32).long().bitwise_left_shift_(32)
    key.bitwise_or_(torch.arange(value.shape[-1], device=value.device))
    key = key.topk(k, largest=False).values
    return (key >> 32).int().view(torch.float32), key & 0xFFFFFFFF


def gather_points(values: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """out[b, ...] = values[b, idx[b, ...]]: (B, N, C), (B, ...) int64 -> (B, ..., C)."""
    B, N, C = values.shape
    rows = idx.flatten(1) + N * torch.arange(B, device=idx.device)[:, None]
    # An embedding look-up: its backward pass runs in parallel, that of indexing does not.
    out = torch.nn.functional.embedding(rows, values.reshape(B * N, C))
    return out.view(idx.shape + (C,))


def group_points(
    xyz: torch.Tensor, num_group: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of clouds (Sec. 4.1): farthest-point centres and the nearest points around each.
    xyz: (B, N, 3) -> neighborhood (B, G, S, 3), relative to its centre, nearest point first; center
    (B, G, 3). Raises ValueError for another shape, or too few points."""
    if xyz.ndim != 3 or xyz.shape[2] != 3:
        raise ValueError(f"xyz: expected clouds of shape (B, N, 3), got {tuple(xyz.shape)}")
    center = gather_points(xyz, farthest_point_sample(xyz, num_group))  # (B, G, 3)
    _, idx = knn(center, xyz, group_size)  # (B, G, S)
    neighborhood = gather_points(xyz, idx) - center[:, :, None]
    return neighborhood, center


def chamfer_distance(a: torch.Tensor, b: torch.Tensor, norm: int = 1) -> torch.Tensor:
    """Chamfer distance of two batches of point sets, mean over the batch -> scalar.
    a: (B, N, 3), b: (B, N2, 3). norm=1: 1/2 (mean_a min_b |a - b| + mean_b min_a |a - b|), the
    paper's CD-L1, in the clouds' unit. norm=2: mean_a min_b |a - b|^2 + mean_b min_a |a - b|^2, in
    the squared unit, without 1/2. Gradients flow to both; memory is bounded."""
    if norm not in (1, 2):
        raise ValueError(f"norm: expected 1 or 2, got {norm!r}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a = a.to(dtype)
    b = b.to(dtype)
    total = 0
    for source, target in ((a, b), (b, a)):
        _, idx = knn(source, target, 1)
        diff = source - gather_points(target, idx[..., 0])  # (B, N or N2, 3)
        if norm == 1:
            total = total + diff.norm(dim=-1).mean() / 2  # torch's norm has gradient 0 at 0
        else:
            total = total + diff.square().sum(dim=-1).mean()
    return total


def fscore(pred: torch.Tensor, target: torch.Tensor, threshold: float = 0.01) -> torch.Tensor:
    """F-score of each cloud: the harmonic mean of precision and recall, 0 where both are 0.
    pred: (B, N, 3), target: (B, N2, 3) -> (B,) in 0..1. `threshold` is a distance, not squared."""
    precision = (knn(pred, target, 1)[0].sqrt() < threshold).float().mean(dim=(1, 2))
    recall = (knn(target, pred, 1)[0].sqrt() < threshold).float().mean(dim=(1, 2))
    return 2 * precision * recall / (precision + recall).clamp_min(1e-12)


def interpolate(xyz: torch.Tensor, center: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Features interpolated from centres to points (PointNet++, Sec. 3.4).
    xyz: (B, N, 3), center: (B, G, 3), features: (B, G, C) -> (B, N, C): sum_j w_j features[j] over
    the 3 nearest centres (all if G < 3), w_j proportional to 1 / (d_j^2 + 1e-8), summing to 1."""
    sqdist, idx = knn(xyz, center, min(3, center.shape[1]))
    weight = torch.nn.functional.normalize(1 / (sqdist + 1e-8), p=1, dim=-1)
    return (gather_points(features, idx) * weight[..., None]).sum(dim=2).to(features.dtype)


# -- Transformer
# One Block serves the backbone, the student and its decoder. Parameter names are timm's.
@dataclass
class BackboneConfig:
    """Sizes and kind of a Transformer; patch_size = 0: no image side."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_hidden: int = 3072
    eps: float = 1e-6
    norm_first: bool = True  # BERT's is False, and it has no final norm
    qkv_bias: bool = True
    layer_scale: bool = False
    quick_gelu: bool = False
    norm_pre: bool = False  # CLIP's ln_pre
    patch_size: int = 0
    grid: int = 0  # the position table holds grid x grid patches
    num_prefix: int = 0  # class token, DeiT's distillation token, DINOv2's registers


class Attention(nn.Module):
    """Multi-head self-attention; `prompts` are further keys and values in front of those of x."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"width: expected a multiple of the {num_heads} heads, got {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x):
        """(B, T, C) -> q, k, v, each (B, heads, T, C / heads)."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, C // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, prompts=None):
        B, T, C = x.shape
        q, k, v = self.queries_keys_values(x)
        if prompts is not None:
            prompt_k, prompt_v = prompts
            k = torch.cat([prompt_k.to(k.dtype).expand(B, -1, -1, -1), k], dim=2)
            v = torch.cat([prompt_v.to(v.dtype).expand(B, -1, -1, -1), v], dim=2)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, C / heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT; DINOv2)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm (ViT, CLIP, the student) or post-norm (BERT): (B, T, C) -> (B, T, C)."""

    def __init__(self, config: BackboneConfig, drop_path: float = 0.0):
        super().__init__()
        c = config
        keep_rate = None
        if drop_path > 0:  # A tensor, for blocks are compiled anew for each number.
            keep_rate = torch.tensor(1 - drop_path, dtype=torch.float64)
        self.register_buffer("keep_rate", keep_rate, persistent=False)
        self.norm_first = c.norm_first
        self.norm1 = nn.LayerNorm(c.width, eps=c.eps)
        self.attn = Attention(c.width, c.num_heads, c.qkv_bias)
        self.ls1 = LayerScale(c.width) if c.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(c.width, eps=c.eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(c.width, c.mlp_hidden))
        self.mlp.add_module("act", QuickGELU() if c.quick_gelu else nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(c.mlp_hidden, c.width))
        self.ls2 = LayerScale(c.width) if c.layer_scale else nn.Identity()

    def drop_path(self, x):
        """In training, keeps a sample's residual branch at the keep rate, and scales it up."""
        if not self.training or self.keep_rate is None:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(self.keep_rate)
        return x * (keep / self.keep_rate)

    def keys_values(self, prompts):
        """What prompt tokens (1, P, C) contribute to this block's attention: k, v."""
        if self.norm_first:
            prompts = self.norm1(prompts)
        _, k, v = self.attn.queries_keys_values(prompts)
        return k, v

    def forward(self, x, prompts=None):
        if self.norm_first:
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), prompts)))
            return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        x = self.norm1(x + self.drop_path(self.attn(x, prompts)))
        return self.norm2(x + self.drop_path(self.mlp(x)))


class Backbone(nn.Module):
    """A plain Transformer: a ViT on images, or its blocks alone on tokens of any origin."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        c = config
        self.config = config
        if c.patch_size:
            proj = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
            self.patch_embed = nn.ModuleDict({"proj": proj})
            self.prefix_tokens = nn.Parameter(torch.zeros(1, c.num_prefix, c.width))
            self.pos_embed = nn.Parameter(torch.zeros(1, c.grid**2, c.width))
        self.norm_pre = nn.LayerNorm(c.width, eps=c.eps) if c.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=c.eps) if c.norm_first else nn.Identity()
        init_linear(self)  # as timm

    def without_image_side(self) -> "Backbone":
        """A Backbone of the same blocks and norms (shared, not copied), for tokens alone."""
        tokens_only = Backbone(replace(self.config, patch_size=0))  # its own blocks are replaced
        tokens_only.norm_pre = self.norm_pre
        tokens_only.blocks = self.blocks
        tokens_only.norm = self.norm
        return tokens_only

    def forward_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The blocks and the final norm alone (CLIP: ln_pre first). (B, T, C) -> (B, T, C)."""
        x = self.norm_pre(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), normalised as published, -> (B, T, C) after the final norm.
        T: class token and the like, then the patches row by row. Positions are resampled to another
        size than the published one, as in timm. Raises ValueError if there is no image side."""
        c = self.config
        if not c.patch_size:
            raise ValueError("images: expected a model with an image side; this has forward_tokens")
        x = self.patch_embed["proj"](images)  # (B, C, H, W), H and W in patches from here on
        B, _, H, W = x.shape
        pos = self.pos_embed  # (1, grid * grid, C)
        if (H, W) != (c.grid, c.grid):
            pos = pos.mT.unflatten(2, (c.grid, c.grid))  # (1, C, grid, grid)
            pos = F.interpolate(pos, (H, W), mode="bicubic", antialias=True)
            pos = pos.flatten(2).mT  # (1, H W, C)
        prefix = self.prefix_tokens.expand(B, -1, -1)
        return self.forward_tokens(torch.cat([prefix, x.flatten(2).mT + pos], dim=1))


def trunc_normal(*shape):
    """A parameter from a normal of deviation 0.02 truncated at +-2, as in timm."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def init_linear(model, xavier=False):
    """Every Linear starts truncated normal of 0.02, or Xavier uniform; biases are 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if xavier:
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# -- patches
# A BatchNorm here averages over all points of all patches: its input is flattened to rows (R, C).
def dense(dim, out):
    """A hidden layer on rows (R, dim) -> (R, out), as a list of modules."""
    return [nn.Linear(dim, out), nn.BatchNorm1d(out), nn.ReLU()]


class PatchEmbed(nn.Module):
    """Mini-PointNet (PointNet, Sec. 4.2): one vector per patch, (..., S, 3) -> (..., C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.first_conv = nn.Sequential(*dense(3, 128), nn.Linear(128, 256))
        self.second_conv = nn.Sequential(*dense(512, 512), nn.Linear(512, dim))

    def forward(self, neighborhood):
        S = neighborhood.shape[-2]
        point = self.first_conv(neighborhood.flatten(0, -2))  # (R, 256), R over all points
        point = point.view(-1, S, 256)  # (patches, S, 256)
        patch = point.amax(dim=1, keepdim=True)  # (patches, 1, 256)
        # The Linear of [patch ; point] is w_patch patch + w_point point. Its patch half is computed
        # once per patch, not once per point. That saves 7 % of a stage I step (size tiny).
        linear = self.second_conv[0]
        w_patch, w_point = linear.weight.split([256, 256], dim=1)
        x = F.linear(point, w_point) + F.linear(patch, w_patch, linear.bias)  # (patches, S, 512)
        x = self.second_conv[1:](x.flatten(0, 1))  # (R, C)
        return x.view(neighborhood.shape[:-1] + (-1,)).amax(dim=-2)


def pos_mlp(dim: int) -> nn.Sequential:
    """Position of a patch: an MLP of its centre (Sec. 4.1)."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))


def center_graph(center: torch.Tensor) -> torch.Tensor:
    """The 4 centres nearest to each, itself first: (B, G, 3) -> (B, G, 4) int64."""
    return knn(center, center, 4)[1]


# -- teacher: stage I (Sec. 4.1), a discrete VAE around a frozen pretrained Transformer
class EdgeConv(nn.Module):
    """max_j LeakyReLU(GroupNorm(W [f_j - f_i ; f_i])), j the neighbours of i (DGCNN, Sec. 3.1)."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.linear = nn.Linear(2 * dim, out, bias=False)
        self.norm = nn.GroupNorm(4, out)  # statistics over all edges of a cloud

    def forward(self, f, graph):
        # W [f_j - f_i ; f_i] = w_diff f_j + (w_self - w_diff) f_i: two products per point instead
        # of one per edge, 4 times fewer operations at K = 4.
        w_diff, w_self = self.linear.weight.chunk(2, dim=1)
        neighbor = gather_points(F.linear(f, w_diff), graph)  # (B, G, K, out)
        edge = neighbor + F.linear(f, w_self - w_diff)[:, :, None]
        edge = self.norm(edge.movedim(-1, 1)).movedim(1, -1)
        return F.leaky_relu(edge, 0.2).amax(dim=2)  # (B, G, out)


class DGCNN(nn.Module):
    """Four EdgeConvs on the graph of nearest centres, a Linear of all: (B, G, C) -> (B, G, out)."""

    def __init__(self, dim: int, out: int):
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
        f4 = self.layer4(f3, graph)
        return torch.cat([f1, f2, f3, f4], dim=-1)

    def forward(self, f, graph):
        linear, norm = self.layer5
        f = linear(self.edges(f, graph))  # (B, G, out)
        f = norm(f.mT).mT  # GroupNorm wants channels second
        return F.leaky_relu(f, 0.2)


class FoldingDecoder(nn.Module):
    """FoldingNet: a feature -> S/4 coarse points, each unfolded on a 2 x 2 grid: S fine points."""

    def __init__(self, dim: int, group_size: int):
        super().__init__()
        if group_size % 4:
            raise UserError(f"group_size: expected a multiple of 4, got {group_size}")
        hidden = [nn.Linear(dim, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
        self.mlp = nn.Sequential(*hidden, nn.Linear(1024, 3 * group_size // 4))
        self.final_conv = nn.Sequential(*dense(dim + 5, 512), *dense(512, 512), nn.Linear(512, 3))
        # The first coordinate of the grid varies fastest.
        grid = torch.tensor([[-0.05, -0.05], [0.05, -0.05], [-0.05, 0.05], [0.05, 0.05]])
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, feature):
        B, G, C = feature.shape
        coarse = self.mlp(feature).view(B, G, -1, 1, 3).float()  # (B, G, S/4, 1, 3)
        # The Linear of [feature ; grid ; coarse] is computed once per patch, per grid point and per
        # coarse point, and summed.
        linear = self.final_conv[0]
        w_feature, w_grid, w_coarse = linear.weight.split([C, 2, 3], dim=1)
        x = F.linear(feature, w_feature, linear.bias)[:, :, None, None] + F.linear(coarse, w_coarse)
        x = x + F.linear(self.grid, w_grid)  # (B, G, S/4, 4, 512)
        offset = self.final_conv[1:](x.flatten(0, -2))  # (R, 3), R over all fine points
        fine = coarse + offset.view(x.shape[:-1] + (3,)).float()  # (B, G, S/4, 4, 3)
        return coarse.squeeze(3), fine.flatten(2, 3)  # fine point 4 m + s is of coarse point m


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
    # None: codes go straight to DGCNN_2, which is the tokenizer of Point-BERT.
    backbone: BackboneConfig | None = field(default_factory=BackboneConfig)
    tune: str = "prompts"  # full: the backbone is trained, too
    weights: str = "random"  # what the backbone was initialised from

    def __post_init__(self):
        if isinstance(self.backbone, dict):  # as a checkpoint holds it
            self.backbone = BackboneConfig(**self.backbone)
        if self.num_group < 4:
            raise UserError(f"num_group: expected 4 or more, for the graph, got {self.num_group}")
        for name in ("num_tokens", "decoder_dims"):
            if getattr(self, name) % 4:
                raise UserError(f"{name}: expected a multiple of 4, got {getattr(self, name)}")
        if self.prompt not in ("deep", "shallow", "none"):
            raise UserError(f"prompt: expected deep, shallow or none, got {self.prompt!r}")
        if self.tune not in ("prompts", "full"):
            raise UserError(f"tune: expected prompts or full, got {self.tune!r}")
        if self.backbone is None and (self.prompt, self.tune) != ("none", "prompts"):
            raise UserError(f"prompt: expected none without a backbone, got {self.prompt!r}")


class TeacherOutput(NamedTuple):
    coarse: torch.Tensor  # (B, G, S/4, 3), relative to the centres, as are fine and neighborhood
    fine: torch.Tensor  # (B, G, S, 3)
    neighborhood: torch.Tensor  # (B, G, S, 3)
    center: torch.Tensor  # (B, G, 3)
    logits: torch.Tensor  # (B, G, codes)


class Teacher(nn.Module):
    """The 3D autoencoder: patches -> codes -> prompted frozen backbone -> features -> patches.
    All is trained but the backbone, unless config.tune is "full". A given `backbone` is not copied:
    the teacher shares its blocks, without the image side, and freezes them."""

    def __init__(self, config: TeacherConfig | None = None, backbone: Backbone | None = None):
        super().__init__()
        if config is None:
            config = TeacherConfig()
        if backbone is not None:
            backbone = backbone.without_image_side()
        elif config.backbone is not None:
            backbone = Backbone(replace(config.backbone, patch_size=0))
        c = config
        self.config = config
        self.backbone = backbone
        self.encoder = PatchEmbed(c.encoder_dims)
        self.dgcnn_1 = DGCNN(c.encoder_dims, c.num_tokens)
        self.codebook = nn.Parameter(torch.randn(c.num_tokens, c.tokens_dims))
        if backbone is not None:
            backbone.requires_grad_(c.tune == "full")
            backbone.eval()  # it has neither dropout nor batch statistics
            self.config = replace(c, backbone=backbone.config)
            width = backbone.config.width
            self.proj_pre = nn.Linear(c.tokens_dims, width)
            self.visual_pos_embed = pos_mlp(width)
            self.proj_post = nn.Linear(width, c.tokens_dims)
            if c.prompt != "none":
                self.visual_prompt_token = trunc_normal(1, c.num_prompt, width)
                self.visual_prompt_pos = trunc_normal(1, c.num_prompt, width)
            if c.prompt == "deep":
                depth = len(backbone.blocks) - 1
                self.deep_prompt_tokens = trunc_normal(depth, c.num_prompt, width)
                self.deep_prompt_pos = trunc_normal(depth, c.num_prompt, width)
        self.dgcnn_2 = DGCNN(c.tokens_dims, c.decoder_dims)
        self.decoder = FoldingDecoder(c.decoder_dims, c.group_size)

    def train(self, mode=True):
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    def prompt_keys_values(self) -> list:
        """Deep prompts as keys and values, (1, heads, P, C / heads) each, or None, for each layer.
        The outputs at prompts are dropped at every layer, so that prompts need no query, projection
        or MLP, nor do they depend on the cloud: one pass serves a batch, or a fixed teacher's whole
        run. This makes the backbone 1.9 times as fast."""
        c = self.config
        if c.backbone is None:
            return []
        if c.prompt != "deep":
            return [None] * c.backbone.depth
        tokens = torch.cat([self.visual_prompt_token, self.deep_prompt_tokens])  # (depth, P, C)
        positions = torch.cat([self.visual_prompt_pos, self.deep_prompt_pos])
        keys_values = []
        for i, block in enumerate(self.backbone.blocks):
            token = F.dropout(tokens[i : i + 1], c.prompt_dropout, self.training)  # (1, P, C)
            if i == 0:
                token = self.backbone.norm_pre(token)
            keys_values.append(block.keys_values(token + positions[i : i + 1]))
        return keys_values

    def backbone_tokens(self, tokens, center, prompts=None):
        """What the prompted backbone makes of codes, positions added at every block, normed.
        (B, G, tokens_dims), (B, G, 3) -> (B, G, width). prompts: prompt_keys_values(), if kept."""
        c = self.config
        x = self.proj_pre(tokens)  # (B, G, width)
        pos = self.visual_pos_embed(center)
        if c.prompt == "shallow":  # one set of tokens, carried through the layers
            B = x.shape[0]
            prompt = self.visual_prompt_token.expand(B, -1, -1)
            prompt = F.dropout(prompt, c.prompt_dropout, self.training)
            prompt_pos = self.visual_prompt_pos.expand(B, -1, -1)
            x = torch.cat([prompt.to(x.dtype), x], dim=1)  # (B, P + G, width)
            pos = torch.cat([prompt_pos.to(pos.dtype), pos], dim=1)
        if prompts is None:
            prompts = self.prompt_keys_values()
        x = self.backbone.norm_pre(x)
        for block, keys_values in zip(self.backbone.blocks, prompts, strict=True):
            x = block(x + pos, keys_values)
        G = tokens.shape[1]
        return self.backbone.norm(x)[:, x.shape[1] - G :]

    def transform(self, tokens, center, prompts=None):
        """backbone_tokens at the codes' width (B, G, tokens_dims); no backbone: the codes."""
        if self.backbone is None:
            return tokens
        return self.proj_post(self.backbone_tokens(tokens, center, prompts))

    def code_logits(self, neighborhood, graph):
        """(B, G, S, 3) and the graph of the centres -> (B, G, codes)."""
        return self.dgcnn_1(self.encoder(neighborhood), graph)

    def tokenize(self, neighborhood, center):
        """Index of each patch's code: (B, G, S, 3), (B, G, 3) -> (B, G) int64."""
        return self.code_logits(neighborhood, center_graph(center)).argmax(dim=-1)

    def features(self, neighborhood, center, prompts=None):
        """The distillation target (B, G, decoder_dims): DGCNN_2 of codes, fixed in eval mode."""
        graph = center_graph(center)
        codes = self.code_logits(neighborhood, graph).argmax(dim=-1)
        tokens = F.embedding(codes, self.codebook)
        return self.dgcnn_2(self.transform(tokens, center, prompts), graph)

    def decode(self, tokens, center, graph=None):
        """Codes' vectors (B, G, tokens_dims), (B, G, 3) -> coarse, fine: TeacherOutput's."""
        if graph is None:
            graph = center_graph(center)
        return self.decoder(self.dgcnn_2(self.transform(tokens, center), graph))

    def forward(self, xyz, temperature=1.0, hard=False) -> TeacherOutput:
        """Autoencodes (B, N, 3): Gumbel noise in train mode; else softmax, argmax if `hard`."""
        neighborhood, center = group_points(xyz, self.config.num_group, self.config.group_size)
        graph = center_graph(center)
        logits = self.code_logits(neighborhood, graph).float()  # (B, G, codes)
        if self.training:
            tokens = F.gumbel_softmax(logits, tau=temperature, hard=hard, dim=-1) @ self.codebook
        elif hard:
            tokens = F.embedding(logits.argmax(dim=-1), self.codebook)  # one-hot times codebook
        else:
            tokens = F.softmax(logits / temperature, dim=-1) @ self.codebook
        coarse, fine = self.decode(tokens, center, graph)
        return TeacherOutput(coarse, fine, neighborhood, center, logits)


def teacher_loss(output: TeacherOutput, kl_weight: float):
    """Stage I loss: (total, reconstruction, kl), total = reconstruction + kl_weight * kl.
    reconstruction: CD-L1 of coarse and of fine points to the patch, summed. kl: KL(uniform || q), q
    the codes' probabilities, mean over a cloud's patches; summed over codes, mean over clouds."""
    patch = output.neighborhood.flatten(0, 1)  # (B G, S, 3)
    coarse = chamfer_distance(output.coarse.flatten(0, 1), patch)
    fine = chamfer_distance(output.fine.flatten(0, 1), patch)
    reconstruction = coarse + fine
    _, G, codes = output.logits.shape
    log_q = F.log_softmax(output.logits, dim=-1).logsumexp(dim=1) - math.log(G)  # (B, codes)
    kl = -math.log(codes) - log_q.mean()
    return reconstruction + kl_weight * kl, reconstruction, kl


# -- student: stage II (Sec. 4.2), masked modelling against the teacher's features
# share = (rank, world): the clouds are number rank, rank + world, ... of a batch, masked as in it.
def random_mask(
    center: torch.Tensor, ratio: float, generator: torch.Generator | None = None, share=(0, 1)
) -> torch.Tensor:
    """Masks int(ratio * G) random patches of each cloud: (B, G, 3) -> (B, G) bool."""
    B, G, _ = center.shape
    rank, world = share
    device = generator.device if generator is not None else center.device
    noise = torch.rand(B * world, G, generator=generator, device=device)[rank::world]
    order = noise.argsort(dim=1).argsort(dim=1)
    return order < int(ratio * G)


def block_mask(
    center: torch.Tensor, ratio: float, generator: torch.Generator | None = None, share=(0, 1)
) -> torch.Tensor:
    """Masks the int(ratio * G) patches nearest to a random one: (B, G, 3) -> (B, G) bool."""
    B, G, _ = center.shape
    M = int(ratio * G)
    rank, world = share
    device = generator.device if generator is not None else center.device
    seed = torch.randint(G, (B * world, 1), generator=generator, device=device)[rank::world]
    seed = seed.to(center.device)
    mask = torch.zeros(B, G, dtype=torch.bool, device=center.device)
    if M > 0:
        _, idx = knn(gather_points(center, seed), center, M)  # (B, 1, M)
        mask.scatter_(1, idx[:, 0], True)
    return mask


def split_mask(mask: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the visible (B, V) and of the masked (B, M) groups, each ascending.
    Raises ValueError if the counts differ. Pass a mask on the CPU: a GPU would wait to count it."""
    counts = mask.sum(dim=1).tolist()
    if min(counts) != max(counts):
        raise ValueError(f"mask: expected as many masked groups in every cloud, got {counts}")
    V = mask.shape[1] - counts[0]
    order = mask.to(torch.uint8).argsort(dim=1, stable=True).to(device, non_blocking=True)
    return order[:, :V], order[:, V:]


@dataclass
class EncoderConfig:
    """Sizes of the 3D Transformer and its training clouds; the defaults are the paper's."""

    num_group: int = 64
    group_size: int = 32
    points: int = 0  # of a training cloud; 0: 16 per group
    normalized: bool = True  # clouds were centred and scaled into the unit sphere
    center: tuple = (0.0, 0.0, 0.0)  # mean centre and radius of the training clouds, for clouds
    radius: float = 1.0  # taken as stored
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    encoder_dims: int = 384  # of the patch embedding
    drop_path: float = 0.1

    def __post_init__(self):
        if self.points == 0:
            self.points = 16 * self.num_group


@dataclass
class StudentConfig(EncoderConfig):
    decoder_depth: int = 2
    target_dim: int = 384


def student_blocks(config: EncoderConfig, depth: int) -> nn.ModuleList:
    """Pre-norm blocks whose qkv has no bias, with a drop path that grows linearly with depth."""
    c = config
    sizes = BackboneConfig(c.width, depth, c.num_heads, 4 * c.width, eps=1e-5, qkv_bias=False)
    rates = torch.linspace(0, c.drop_path, depth).tolist()
    return nn.ModuleList(Block(sizes, rate) for rate in rates)


class Encoder(nn.Module):
    """The 3D Transformer that is pretrained: patch embedding, pre-norm blocks, LayerNorm."""

    def __init__(self, config: EncoderConfig, cls_token: bool = True):
        super().__init__()
        c = config
        self.config = config
        self.patch_embed = PatchEmbed(c.encoder_dims)
        self.reduce_dim = nn.Identity()
        if c.encoder_dims != c.width:
            self.reduce_dim = nn.Linear(c.encoder_dims, c.width)
        self.pos_embed = pos_mlp(c.width)
        self.blocks = student_blocks(c, c.depth)
        self.norm = nn.LayerNorm(c.width)
        init_linear(self)
        self.cls_token = None
        self.cls_pos = None
        if cls_token:
            self.cls_token = trunc_normal(1, 1, c.width)
            self.cls_pos = trunc_normal(1, 1, c.width)

    def group(self, xyz):
        """Patches of clouds (B, N, 3), tensor or array, on the model's device and in its dtype."""
        weight = self.norm.weight
        xyz = torch.as_tensor(xyz, dtype=weight.dtype, device=weight.device)
        return group_points(xyz, self.config.num_group, self.config.group_size)

    def forward(self, neighborhood, center, mask=None):
        """(B, G, S, 3), (B, G, 3), mask (B, G) bool -> (B, 1 + V, C), class token first."""
        if mask is not None:
            visible, _ = split_mask(mask, center.device)
            neighborhood, center = select_patches(neighborhood, center, visible)
        return self.layers(neighborhood, center, [len(self.blocks)])[0]

    def layers(self, neighborhood, center, depths):
        """The normed tokens after blocks number `depths` (from 1): a list of (B, 1 + G, C)."""
        x = self.reduce_dim(self.patch_embed(neighborhood))  # (B, G, C)
        pos = self.pos_embed(center)
        if self.cls_token is not None:
            B = x.shape[0]
            x = torch.cat([self.cls_token.expand(B, -1, -1).to(x.dtype), x], dim=1)
            pos = torch.cat([self.cls_pos.expand(B, -1, -1).to(pos.dtype), pos], dim=1)
        normed = {}
        for i, block in enumerate(self.blocks, start=1):
            x = block(x + pos)
            if i in depths:
                normed[i] = self.norm(x)
        return [normed[i] for i in depths]  # a shallow encoder may be asked for one depth twice


def select_patches(neighborhood, center, idx):
    """The patches idx (B, V) of each cloud: (B, V, S, 3), (B, V, 3)."""
    chosen = gather_points(neighborhood.flatten(2), idx)  # (B, V, 3 S)
    return chosen.unflatten(2, (-1, 3)), gather_points(center, idx)


class StudentDecoder(nn.Module):
    """The blocks after the mask tokens are in, and their LayerNorm."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.blocks = student_blocks(config, config.decoder_depth)
        self.norm = nn.LayerNorm(config.width)
        init_linear(self, xavier=True)  # as in the official implementation

    def forward(self, x, pos, M):
        """(B, T, C) and positions -> the normed last M tokens (B, M, C)."""
        for block in self.blocks:
            x = block(x + pos)
        return self.norm(x[:, x.shape[1] - M :])


class Student(nn.Module):
    """Masked modelling: from the visible patches to the teacher's features of the masked ones."""

    def __init__(self, config: StudentConfig | None = None):
        super().__init__()
        if config is None:
            config = StudentConfig()
        self.config = config
        self.encoder = Encoder(config)
        self.mask_token = trunc_normal(1, 1, config.width)
        self.decoder_pos_embed = pos_mlp(config.width)
        self.decoder = StudentDecoder(config)
        self.head = nn.Linear(config.width, config.target_dim)

    def forward(self, neighborhood, center, mask, split=None):
        """(B, G, S, 3), (B, G, 3), (B, G) -> predictions (B, M, D) of the masked groups.
        `split` is split_mask(mask, device), if the caller has it; then `mask` is not read."""
        if split is None:
            split = split_mask(mask, center.device)
        visible, masked = split
        B, M = masked.shape
        tokens = self.encoder(*select_patches(neighborhood, center, visible))[:, 1:]  # (B, V, C)
        mask_tokens = self.mask_token.expand(B, M, -1).to(tokens.dtype)
        x = torch.cat([tokens, mask_tokens], dim=1)  # (B, G, C)
        order = torch.cat([visible, masked], dim=1)
        pos = self.decoder_pos_embed(gather_points(center, order))
        return self.head(self.decoder(x, pos, M))

    def encode(self, xyz):
        """All tokens of whole clouds, class token first: (B, N, 3) -> (B, 1 + G, C).
        Expects clouds as in training: `config.points` points, in the unit sphere if `normalized`;
        features of other densities do not compare. Arrays and any float type will do."""
        neighborhood, center = self.encoder.group(xyz)
        return self.encoder(neighborhood, center)


def distillation_loss(
    prediction: torch.Tensor, target: torch.Tensor, kind: str = "cosine"
) -> torch.Tensor:
    """Stage II loss of predictions and targets (..., D) -> scalar.
    cosine: mean over tokens of 1 - cos; smooth_l1 (beta = 1), l2 (squared): mean over elements."""
    if prediction.shape != target.shape:
        expected = tuple(prediction.shape)
        raise ValueError(f"target: expected the prediction's {expected}, got {tuple(target.shape)}")
    prediction = prediction.float()
    target = target.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(prediction, target)
    if kind == "l2":
        return F.mse_loss(prediction, target)
    raise ValueError(f"kind: expected cosine, smooth_l1 or l2, got {kind!r}")


def global_feature(tokens: torch.Tensor) -> torch.Tensor:
    """[class token ; max over the others], the feature of transfer: (B, 1 + G, C) -> (B, 2 C)."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)


# -- transfer heads (Sec. 5)
@dataclass
class ClassifierConfig(EncoderConfig):
    num_group: int = 128
    num_classes: int = 40
    head: str = "mlp3"  # mlp3 or linear
    class_names: list = field(default_factory=list)


class Classifier(nn.Module):
    """The pretrained encoder, a head on [class token ; max]: (B, N, 3) -> logits (B, classes)."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        c = config
        if c.head not in ("mlp3", "linear"):
            raise UserError(f"head: expected mlp3 or linear, got {c.head!r}")
        self.config = config
        self.encoder_is_frozen = False
        self.encoder = Encoder(c)
        if c.head == "linear":
            self.head = nn.Sequential(nn.Linear(2 * c.width, c.num_classes))
        else:
            layers = dense(2 * c.width, 256) + [nn.Dropout(0.5)]
            layers += dense(256, 256) + [nn.Dropout(0.5), nn.Linear(256, c.num_classes)]
            self.head = nn.Sequential(*layers)

    def freeze_encoder(self):
        """No gradients, fixed statistics, no drop path, class token and its position included."""
        self.encoder_is_frozen = True
        self.encoder.requires_grad_(False)
        self.encoder.eval()
        return self

    def train(self, mode=True):
        super().train(mode)
        if self.encoder_is_frozen:
            self.encoder.eval()
        return self

    def forward(self, xyz):
        neighborhood, center = self.encoder.group(xyz)
        return self.head(global_feature(self.encoder(neighborhood, center)))


@dataclass
class SegmenterConfig(EncoderConfig):
    num_group: int = 128
    num_parts: int = 50
    num_categories: int = 16  # 0: no object category is given, as in scenes
    class_names: list = field(default_factory=list)  # of categories; of labels if there are none
    part_ranges: list = field(default_factory=list)  # [first, last + 1] of each category's parts


class Segmenter(nn.Module):
    """The pretrained encoder without class token, a label per point: (B, N, 3) -> (B, N, parts)."""

    def __init__(self, config: SegmenterConfig):
        super().__init__()
        c = config
        self.config = config
        self.encoder = Encoder(c, cls_token=False)
        self.depths = [max(1, c.depth * i // 3) for i in (1, 2, 3)]  # 4, 8, 12 of 12
        dim = 3 * c.width
        cloud_dim = 2 * dim
        if c.num_categories:
            cloud_dim += 64
            linear = nn.Linear(c.num_categories, 64, bias=False)
            self.label_conv = nn.Sequential(linear, nn.BatchNorm1d(64), nn.LeakyReLU(0.2))
        self.propagation = nn.Sequential(*dense(3 + dim, 4 * c.width), *dense(4 * c.width, 1024))
        head = dense(1024 + cloud_dim, 512) + [nn.Dropout(0.5)]
        self.head = nn.Sequential(*head, *dense(512, 256), nn.Linear(256, c.num_parts))

    def forward(self, xyz, category=None):
        """`category`: (B,) int64 index of the object category, for a model that has categories."""
        c = self.config
        if (category is None) != (c.num_categories == 0):
            expected = f"indices below {c.num_categories}, or None for 0"
            raise ValueError(f"category: expected {expected}, got {category}")
        neighborhood, center = self.encoder.group(xyz)
        tokens = torch.cat(self.encoder.layers(neighborhood, center, self.depths), dim=-1)
        cloud = torch.cat([tokens.amax(dim=1), tokens.mean(dim=1)], dim=-1)
        if category is not None:
            one_hot = F.one_hot(category, c.num_categories).to(tokens.dtype)
            cloud = torch.cat([cloud, self.label_conv(one_hot)], dim=-1)
        xyz = torch.as_tensor(xyz, dtype=center.dtype, device=center.device)
        point = torch.cat([xyz.to(tokens.dtype), interpolate(xyz, center, tokens)], dim=-1)
        B, N, _ = point.shape
        point = self.propagation(point.flatten(0, 1)).view(B, N, 1024)
        # The Linear of [point ; cloud] is w_point point + w_cloud cloud. Its cloud part is computed
        # once per cloud, not once per point. That saves 19 % of a training step (size tiny).
        linear = self.head[0]
        w_point, w_cloud = linear.weight.split([1024, cloud.shape[1]], dim=1)
        x = F.linear(point, w_point) + F.linear(cloud, w_cloud, linear.bias)[:, None]
        logits = self.head[1:](x.flatten(0, 1))  # (B N, parts)
        return logits.view(B, N, c.num_parts)


# -- weights, checkpoints
# timm's names are read here; a state dict in another layout is renamed first.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16}  # by width


def read_tensors(path) -> dict:
    """What a weight file holds, on the CPU: .safetensors, .npz, or else what torch.save wrote.
    Nothing in the file runs: torch.load admits tensors and plain values, .npz arrays only. Raises
    UserError if the file is broken, MissingFile if there is none."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: expected a weight file, got a folder")
    if not path.is_file():
        raise MissingFile(f"{path}: expected a weight file, got no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays}
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"{path}: needs safetensors: pip install safetensors") from error
    except Exception as error:  # these readers raise whatever a broken file makes them fail with
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: expected a weight file, got a broken one ({reason})") from error


def without_wrappers(state: dict) -> dict:
    """The state dict without what torch.compile and DistributedDataParallel add to its names."""
    names = [str(name).replace("_orig_mod.", "").removeprefix("module.") for name in state]
    return dict(zip(names, state.values(), strict=True))


def load_pretrained(path, num_heads: int | None = None) -> Backbone:
    """A pretrained Backbone in eval mode from a file in timm's names; num_heads: by default HEADS.
    Raises UserError if the file is missing, broken or unfit."""
    state = read_tensors(path)
    for wrapping in ("model", "state_dict"):
        if isinstance(state, dict) and wrapping in state:
            state = state[wrapping]
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a state dict, got a {type(state).__name__}")
    dropped = ("head.", "head_dist.", "pre_logits.", "mask_token")
    state = without_wrappers(state)
    state = {name: value for name, value in state.items() if not name.startswith(dropped)}
    return build_backbone(state, backbone_config(state, path, num_heads), path)


def backbone_config(state: dict, path, num_heads: int | None = None) -> BackboneConfig:
    """Sizes read off a state dict in timm's names. What no tensor shows is as in timm's ViT.
    Raises UserError if the first block is unfit or the number of heads unknown."""
    qkv = state.get("blocks.0.attn.qkv.weight", torch.empty(0))
    fc1 = state.get("blocks.0.mlp.fc1.weight", torch.empty(0))
    if qkv.ndim != 2 or fc1.ndim != 2:
        wanted = "blocks.0.attn.qkv.weight and blocks.0.mlp.fc1.weight"
        raise UserError(f"{path}: expected matrices {wanted}, got {', '.join(list(state)[:3])}")
    width = qkv.shape[1]
    if num_heads is None and width not in HEADS:
        raise UserError(f"{path}: expected num_heads, or a config.json with it, for width {width}")
    if num_heads is None:
        num_heads = HEADS[width]
    return BackboneConfig(
        width=width,
        depth=sum(name.endswith(".norm1.weight") for name in state),
        num_heads=num_heads,
        mlp_hidden=fc1.shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        layer_scale="blocks.0.ls1.gamma" in state,
    )


def build_backbone(state: dict, config: BackboneConfig, path) -> Backbone:
    """A Backbone in eval mode with exactly the tensors of a state dict in timm's names.
    `config` comes without an image side, added if the tensors have one. Raises as load_exactly."""
    state = dict(state)
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"}.isdisjoint(state):
        config = fold_image_side(state, config, path)
    try:
        backbone = Backbone(config)
    except UserError as error:  # of heads that do not fit the width
        raise UserError(f"{path}: {error}") from error
    return load_exactly(backbone, state, path).eval()


def fold_image_side(state: dict, config: BackboneConfig, path) -> BackboneConfig:
    """The config with its image side; in the state, the tokens before patches become one tensor.
    Their positions are added to them. A table has rows for all of them, for all but the registers,
    or for none; SigLIP has no such token."""
    projection = state.get("patch_embed.proj.weight", torch.empty(0))
    if projection.ndim != 4 or "pos_embed" not in state:
        wanted = "an image side of pos_embed and a convolution patch_embed.proj.weight"
        raise UserError(f"{path}: expected {wanted}, got {', '.join(list(state)[:3])}")
    try:
        tokens = [torch.empty(1, 0, config.width)]
        for name in ("cls_token", "dist_token"):
            if name in state:
                tokens.append(state.pop(name).float().reshape(1, 1, config.width))
        registers = state.pop("reg_token", torch.empty(0)).float().reshape(1, -1, config.width)
        pos = state["pos_embed"].float().reshape(1, -1, config.width)  # CLIP's has no batch axis
    except RuntimeError as error:
        raise UserError(f"{path}: expected tokens of width {config.width}, got {error}") from error
    prefix = torch.cat(tokens + [registers], dim=1)  # (1, tokens, width)
    grid = math.isqrt(pos.shape[1])
    extra = pos.shape[1] - grid**2
    if extra not in (0, len(tokens) - 1, prefix.shape[1]):
        wanted = "a square of patches, and all or none of cls_token, dist_token, reg_token"
        raise UserError(f"{path}: pos_embed: expected {wanted}, got {pos.shape[1]} rows")
    prefix[:, :extra] += pos[:, :extra]
    state["prefix_tokens"] = prefix
    state["pos_embed"] = pos[:, extra:]
    state.setdefault("patch_embed.proj.bias", torch.zeros(config.width))  # CLIP has none
    patch_size = projection.shape[-1]
    return replace(config, patch_size=patch_size, grid=grid, num_prefix=prefix.shape[1])


def load_exactly(model: nn.Module, state: dict, path) -> nn.Module:
    """The model with a state dict of exactly its keys and shapes, all finite, else a UserError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:400]}") from error
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {name}: expected finite weights, got NaN or infinity")
    return model


KINDS = {"Teacher": (Teacher, TeacherConfig), "Student": (Student, StudentConfig)}
KINDS |= {"Classifier": (Classifier, ClassifierConfig), "Segmenter": (Segmenter, SegmenterConfig)}


def read_checkpoint(path) -> dict:
    """A checkpoint of this project: a dict of `kind`, `config`, `model` (a state dict) and more.
    Raises UserError if the file holds anything else."""
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: expected a checkpoint, got a {type(checkpoint).__name__}")
    if "model" not in checkpoint and any(torch.is_tensor(each) for each in checkpoint.values()):
        how = "act.Student(config).load_state_dict(torch.load(path)) loads it"
        raise UserError(f"{path}: expected a checkpoint, got a bare state dict: {how}")
    for name, kind in (("kind", str), ("config", dict), ("model", dict)):
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path}: expected a checkpoint's {name}, got {list(checkpoint)[:3]}")
    return checkpoint | {"model": without_wrappers(checkpoint["model"])}


def load(path, device="cpu", kinds=KINDS) -> nn.Module:
    """The model of a checkpoint of this project, in eval mode: of one of `kinds`, a dict as KINDS.
    Raises UserError if the file is missing, broken or unfit."""
    checkpoint = read_checkpoint(path)
    kind = checkpoint["kind"]
    if kind not in kinds:
        raise UserError(f"{path}: expected a {', '.join(kinds)}, got a {kind}")
    model_class, config_class = kinds[kind]
    try:
        model = model_class(config_class(**checkpoint["config"]))
    except (TypeError, ValueError, RuntimeError) as error:  # of sizes that fit no model
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: its config makes no {kind}: {reason}") from error
    return load_exactly(model, checkpoint["model"], path).to(device).eval()


def save(obj: dict, path) -> None:
    """torch.save to a file beside `path` that takes its name when it is complete.

    Raises UserError if it cannot be written; a file that was there stays as it was."""
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(obj, file)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the first into the other
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path}: it cannot be written: {cause}") from error
    finally:
        unfinished.unlink(missing_ok=True)
