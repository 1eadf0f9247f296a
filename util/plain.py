"""Textbook forms of act's operations and modules: oracles of the tests, baselines of bench.py.

Each is what one writes first: all distances at once, concatenation before a product, 1 x 1
convolutions with channels first, prompts as tokens of the sequence. Memory is not bounded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import act


# -- geometry
def square_distance(a: Tensor, b: Tensor) -> Tensor:
    """All squared distances at once: (B, N, 3), (B, M, 3) -> (B, N, M)."""
    return (a[:, :, None] - b[:, None]).square().sum(-1)


def farthest_point_sample(xyz: Tensor, num_samples: int, first: int | Tensor = 0) -> Tensor:
    """Farthest point sampling as ports of PointNet++ have it: (B, N, 3) -> (B, num_samples)."""
    B, N, _ = xyz.shape
    batch = torch.arange(B, device=xyz.device)
    idx = torch.zeros(B, num_samples, dtype=torch.long, device=xyz.device)
    distance = torch.full((B, N), 1e10, dtype=xyz.dtype, device=xyz.device)
    farthest = torch.zeros_like(batch) + first
    for i in range(num_samples):
        idx[:, i] = farthest
        centroid = xyz[batch, farthest].view(B, 1, 3)
        distance = torch.minimum(distance, ((xyz - centroid) ** 2).sum(-1))
        farthest = distance.max(-1)[1]  # the first of equal maxima
    return idx


def knn(query: Tensor, xyz: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest points; equal distances come in any order."""
    return square_distance(query, xyz).topk(k, largest=False)


def stable_knn(query: Tensor, xyz: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest points; equal distances come by index."""
    value, idx = square_distance(query, xyz).sort(stable=True)
    return value[..., :k], idx[..., :k]


def gather_points(values: Tensor, idx: Tensor) -> Tensor:
    """values[b, idx[b, ...]] by indexing: (B, N, C), (B, ...) -> (B, ..., C)."""
    batch = torch.arange(len(values), device=values.device)
    return values[batch.view((-1,) + (1,) * (idx.ndim - 1)), idx]


def chamfer_distance(a: Tensor, b: Tensor, norm: int = 1) -> Tensor:
    """CD-L1 or CD-L2 from all distances: (B, N, 3), (B, M, 3) -> scalar."""
    sqdist = square_distance(a, b)
    to_b = sqdist.min(2)[0]
    to_a = sqdist.min(1)[0]
    if norm == 2:
        return to_b.mean() + to_a.mean()
    return (to_b.sqrt().mean() + to_a.sqrt().mean()) / 2


def random_cuboid(xyz: np.ndarray, boxes: np.ndarray, rng: np.random.Generator, count: int):
    """detector.random_cuboid, which compares all points with each cuboid, whatever its sides."""
    for _ in range(100):
        ratio = rng.uniform(0.5, 1, 3)
        offset = abs(xyz - xyz[rng.integers(len(xyz))])
        inside = (offset <= ratio * np.ptp(xyz, axis=0) / 2).all(axis=1)
        low, middle, high = np.sort(ratio)
        if max(low / middle, middle / high) < 0.8 or inside.sum() < count:
            continue
        corners = (xyz[inside].min(axis=0), xyz[inside].max(axis=0))
        held = ((boxes[:, :3] >= corners[0]) & (boxes[:, :3] <= corners[1])).all(axis=1)
        if held.any():
            return inside, held
    return np.ones(len(xyz), bool), np.ones(len(boxes), bool)


# -- modules of act, given as the first argument
def channels_first(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Layers in a row on (B, C, N) or (B, C, N, K), each Linear as a convolution of size 1."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            convolution = F.conv1d if x.ndim == 3 else F.conv2d
            kernel = layer.weight.view(layer.weight.shape + (1,) * (x.ndim - 2))
            x = convolution(x, kernel, layer.bias)
        else:
            x = layer(x)
    return x


def patch_embed(module: act.PatchEmbed, neighborhood: Tensor) -> Tensor:
    """PatchEmbed with [patch ; point] explicit for every point."""
    B, G, S, _ = neighborhood.shape
    point = channels_first(module.first_conv, neighborhood.flatten(0, 1).mT)  # (B G, 256, S)
    patch = point.max(dim=2, keepdim=True)[0]
    both = torch.cat([patch.expand(-1, -1, S), point], dim=1)
    return channels_first(module.second_conv, both).max(dim=2)[0].view(B, G, -1)


def dgcnn(module: act.DGCNN, f: Tensor, graph: Tensor) -> Tensor:
    """DGCNN with every edge [f_j - f_i ; f_i] explicit."""
    f = module.input_trans(f)
    levels = []
    for layer in (module.layer1, module.layer2, module.layer3, module.layer4):
        neighbor = gather_points(f, graph).permute(0, 3, 1, 2).contiguous()  # (B, C, G, K)
        itself = f.mT[..., None].expand_as(neighbor)
        edge = torch.cat([neighbor - itself, itself], dim=1)
        edge = channels_first(nn.Sequential(layer.linear, layer.norm), edge)
        f = F.leaky_relu(edge, 0.2).max(dim=-1)[0].mT
        levels.append(f)
    f = channels_first(module.layer5, torch.cat(levels, dim=-1).mT)
    return F.leaky_relu(f, 0.2).mT


def folding(module: act.FoldingDecoder, feature: Tensor) -> tuple[Tensor, Tensor]:
    """FoldingDecoder with [feature ; grid ; coarse] explicit for every fine point."""
    B, G, C = feature.shape
    coarse = module.mlp(feature)  # (B, G, 3 S/4)
    point = coarse.view(B * G, -1, 3).repeat_interleave(4, dim=1).mT  # (B G, 3, S)
    S = point.shape[2]
    grid = torch.tensor([[-0.05, 0.05, -0.05, 0.05], [-0.05, -0.05, 0.05, 0.05]]).to(point)
    grid = grid.repeat(1, S // 4).expand(B * G, -1, -1)
    feature = feature.reshape(B * G, C, 1).expand(-1, -1, S)
    whole = torch.cat([feature, grid, point], dim=1)
    fine = (channels_first(module.final_conv, whole) + point).mT
    return coarse.view(B, G, -1, 3), fine.reshape(B, G, S, 3)


def transform(teacher: act.Teacher, tokens: Tensor, center: Tensor, prompts=None) -> Tensor:
    """[prompts, tokens] as one sequence through every block; deep prompts' outputs are dropped."""
    c = teacher.config
    B = len(tokens)
    x = teacher.proj_pre(tokens)
    pos = teacher.visual_pos_embed(center)
    P = 0 if c.prompt == "none" else c.num_prompt
    if P:
        x = torch.cat([teacher.visual_prompt_token.expand(B, -1, -1), x], dim=1)
        pos = torch.cat([teacher.visual_prompt_pos.expand(B, -1, -1), pos], dim=1)
    x = teacher.backbone.norm_pre(x)
    for i, block in enumerate(teacher.backbone.blocks):
        if c.prompt == "deep" and i > 0:
            x = torch.cat([teacher.deep_prompt_tokens[i - 1].expand(B, -1, -1), x[:, P:]], dim=1)
            pos = torch.cat([teacher.deep_prompt_pos[i - 1].expand(B, -1, -1), pos[:, P:]], dim=1)
        x = block(x + pos)
    return teacher.proj_post(teacher.backbone.norm(x)[:, P:])


def features(teacher: act.Teacher, neighborhood: Tensor, center: Tensor, prompts=None) -> Tensor:
    """Teacher.features by one-hot codes times the codebook."""
    codes = F.one_hot(teacher.tokenize(neighborhood, center), len(teacher.codebook))
    tokens = codes.to(teacher.codebook.dtype) @ teacher.codebook
    graph = act.knn(center, center, 4)[1]
    return teacher.dgcnn_2(teacher.transform(tokens, center), graph)


# -- act in its plain form
@contextmanager
def plain_form() -> Iterator[None]:
    """Within it act's functions and modules are the ones above; nothing else changes."""
    with (
        mock.patch.multiple(act, farthest_point_sample=farthest_point_sample, knn=knn),
        mock.patch.multiple(act, gather_points=gather_points, chamfer_distance=chamfer_distance),
        mock.patch.object(act.PatchEmbed, "forward", patch_embed),
        mock.patch.object(act.DGCNN, "forward", dgcnn),
        mock.patch.object(act.FoldingDecoder, "forward", folding),
        mock.patch.multiple(act.Teacher, transform=transform, features=features),
    ):
        yield
