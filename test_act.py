"""The tests: properties of the geometry, parity with independent formulas, every reader, the scripts end to end.

    python -m pytest                      # a few minutes on two cores; no network, no GPU
    ACT_TEST_WEIGHTS=folder python -m pytest -k real      # also with real weight files, where you have them
"""

import hashlib
import http.server
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st

import act
import finetune

torch.set_num_threads(1)  # clouds are tiny here: threads would only wait for one another


# =====================================================================================================================
# geometry, Transformer, patches, teacher, student, heads
# =====================================================================================================================

GEOMETRY = ["farthest_point_sample", "knn", "gather_points", "group_points", "chamfer_distance", "fscore", "interpolate"]
few = settings(deadline=None, max_examples=25, derandomize=True)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found, wanted, rtol=1e-5, floor=0.0):
    """Largest difference, relative to the largest entry wanted (or to `floor`)."""
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    assert (found - wanted).abs().max() <= rtol * max(wanted.abs().max().item(), floor), (
        f"{(found - wanted).abs().max():.3g} beside {wanted.abs().max():.3g}")


def same_with_gradients(ours, plain, inputs, rtol=1e-5):
    """Two forms of the same outputs agree, and so do the gradients of a fixed random functional of them."""
    ours, plain = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (ours, plain))
    for one, other in zip(ours, plain, strict=True):
        close(one, other, rtol)
    inputs = [t for t in inputs if t.requires_grad]
    totals = [sum((o * randn(*o.shape, seed=7 + i)).sum() for i, o in enumerate(outs)) for outs in (ours, plain)]
    grads = [torch.autograd.grad(total, inputs, allow_unused=True) for total in totals]
    assert all((a is None) == (b is None) for a, b in zip(*grads)) and any(a is not None for a in grads[0])
    scale = max(g.abs().max().item() for g in grads[1] if g is not None)
    for a, b in zip(*grads):
        if b is not None:  # a bias in front of a normalisation has gradient 0: rounding there is measured by the rest
            close(a, b, rtol, floor=scale / 10)


def randomise(module, seed=0):
    """Every parameter away from 0 and 1, norms' scales of both signs, statistics away from their start."""
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            p.add_(randn(*p.shape, seed=seed + i) * (0.7 if p.ndim == 1 else 0.02))
        for i, (name, b) in enumerate(module.named_buffers()):
            if name.endswith(("running_mean", "running_var")):
                b.add_(randn(*b.shape, seed=seed + i).abs() * 0.3)
    return module


def steps(model, loss, count=3):
    """A few AdamW steps in train mode, without weight decay: what moves, moves by its gradient."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    for i in range(count):
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()


def copy_of(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def moved(before, module):
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------

KINDS = ["normal", "far", "grid", "tenths", "identical", "pairs"]


def cloud(kind, B, N, seed, dtype=torch.float32):
    xyz = randn(B, N, 3, seed=seed, dtype=dtype)
    if kind == "far":
        return xyz + 1e4
    if kind == "grid":  # many equal distances
        return xyz.round()
    if kind == "tenths":  # equal but for rounding
        return xyz.round(decimals=1)
    if kind == "identical":
        return xyz[:, :1].expand(B, N, 3).clone()
    if kind == "pairs":  # every point twice
        return xyz[:, torch.arange(N) // 2]
    return xyz


def brute_sqdist(a, b):
    """(N, 3), (M, 3) -> (N, M) in the arrays' own precision, by numpy."""
    d = a.numpy()[:, None] - b.numpy()[None]
    d = d * d
    return (d[..., 0] + d[..., 1]) + d[..., 2]


def brute_fps(xyz, num_samples, first=None):
    out = []
    for b, points in enumerate(xyz):
        sqdist = brute_sqdist(points, points)
        idx = [0 if first is None else int(first[b])]
        while len(idx) < num_samples:
            idx.append(int(np.argmax(sqdist[:, idx].min(axis=1))))  # numpy's argmax is the first
        out.append(idx)
    return torch.tensor(out)


def brute_knn(query, xyz, k):
    sqdist = np.stack([brute_sqdist(q, x) for q, x in zip(query, xyz)])
    idx = np.argsort(sqdist, axis=-1, kind="stable")[..., :k]
    return torch.from_numpy(np.take_along_axis(sqdist, idx, -1)), torch.from_numpy(idx)


@few
@given(B=st.integers(1, 3), N=st.integers(1, 40), share=st.floats(0, 1), kind=st.sampled_from(KINDS), seed=st.integers(0, 999),
       double=st.booleans())
@example(B=2, N=1, share=1.0, kind="normal", seed=0, double=False)
@example(B=1, N=30, share=1.0, kind="grid", seed=1, double=False)
@example(B=3, N=200, share=1.0, kind="tenths", seed=0, double=False)
@example(B=2, N=20, share=1.0, kind="identical", seed=2, double=False)
@example(B=2, N=40, share=0.5, kind="far", seed=3, double=False)
@example(B=1, N=24, share=1.0, kind="pairs", seed=4, double=True)
def test_fps_equals_a_brute_force_loop_index_for_index(B, N, share, kind, seed, double):
    xyz = cloud(kind, B, N, seed, torch.float64 if double else torch.float32)
    G = max(1, round(share * N))
    idx = act.farthest_point_sample(xyz, G)
    assert idx.dtype == torch.int64
    assert torch.equal(idx, brute_fps(xyz, G))


def test_fps_resolves_a_cloud_far_from_the_origin_as_well_as_float32_allows():
    near = (randn(2, 200, 3) * 2**10).round() / 2**10  # representable beside 1e4: adding it moves nothing
    assert torch.equal(act.farthest_point_sample(near + 2.0**13, 50), act.farthest_point_sample(near, 50))


def test_fps_maps_indices_when_all_points_but_the_first_are_permuted():
    xyz = randn(2, 100, 3)
    perm = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(99, generator=torch.Generator().manual_seed(0))])
    assert torch.equal(perm[act.farthest_point_sample(xyz[:, perm], 30)], act.farthest_point_sample(xyz, 30))


def test_fps_reads_non_contiguous_points_and_computes_half_precision_in_float32():
    xyz = randn(200, 3, 2, 5)[:, :, 1, ::2].transpose(0, 1)  # (3, 200, 3)
    assert not xyz.is_contiguous()
    assert torch.equal(act.farthest_point_sample(xyz, 150), brute_fps(xyz, 150))
    for dtype in (torch.bfloat16, torch.half):
        coarse = xyz.to(dtype)
        assert torch.equal(act.farthest_point_sample(coarse, 150), brute_fps(coarse.float(), 150))


def test_fps_starts_where_the_generator_says_and_leaves_the_global_random_state_alone():
    xyz, state = randn(16, 50, 3), torch.get_rng_state()
    idx = act.farthest_point_sample(xyz, 10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(idx, act.farthest_point_sample(xyz, 10, generator=torch.Generator().manual_seed(3)))
    assert len(idx[:, 0].unique()) > 5
    assert torch.equal(idx, brute_fps(xyz, 10, first=idx[:, 0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_geometry_under_autocast_is_the_same_to_the_bit():
    xyz, center, features = randn(2, 80, 3) + 100, randn(2, 9, 3) + 100, randn(2, 9, 5)
    calls = [lambda: act.farthest_point_sample(xyz, 20), lambda: act.knn(center, xyz, 7), lambda: act.group_points(xyz, 6, 5),
             lambda: act.chamfer_distance(xyz, center), lambda: act.fscore(xyz, center, 0.5),
             lambda: act.interpolate(xyz, center, features)]
    for call in calls:
        plain = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = call()
        for one, other in zip(plain if isinstance(plain, tuple) else [plain], mixed if isinstance(mixed, tuple) else [mixed]):
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_geometry_on_a_gpu_equals_the_cpu():
    for seed, kind in enumerate(KINDS):
        xyz = cloud(kind, 3, 200, seed)
        for _ in range(2):  # the capture, then its replay
            assert torch.equal(act.farthest_point_sample(xyz.cuda(), 64).cpu(), act.farthest_point_sample(xyz, 64))
        for one, other in zip(act.knn(xyz.cuda(), xyz.cuda(), 8), act.knn(xyz, xyz, 8)):
            assert torch.equal(one.cpu(), other)


@few
@given(B=st.integers(1, 3), Q=st.integers(1, 12), N=st.integers(1, 300), share=st.floats(0, 1), kind=st.sampled_from(KINDS),
       seed=st.integers(0, 999), double=st.booleans())
@example(B=1, Q=5, N=1, share=1.0, kind="normal", seed=0, double=False)
@example(B=2, Q=5, N=20, share=1.0, kind="grid", seed=0, double=False)
@example(B=2, Q=5, N=300, share=0.03, kind="grid", seed=0, double=False)
@example(B=2, Q=5, N=299, share=0.02, kind="grid", seed=0, double=True)
@example(B=1, Q=3, N=257, share=0.01, kind="identical", seed=0, double=False)
@example(B=1, Q=3, N=200, share=0.0, kind="pairs", seed=0, double=False)
@example(B=3, Q=12, N=300, share=0.3, kind="tenths", seed=0, double=False)
@example(B=1, Q=3, N=200, share=0.05, kind="far", seed=0, double=False)
def test_knn_equals_a_stable_sort_ties_included(B, Q, N, share, kind, seed, double):
    dtype = torch.float64 if double else torch.float32
    xyz, query = cloud(kind, B, N, seed, dtype), cloud(kind, B, max(Q, 2), seed + 1, dtype)
    k = max(1, round(share * N))
    (sqdist, idx), (wanted_sqdist, wanted_idx) = act.knn(query, xyz, k), brute_knn(query, xyz, k)
    assert idx.dtype == torch.int64 and sqdist.dtype == dtype
    assert torch.equal(idx, wanted_idx)
    assert torch.equal(sqdist, wanted_sqdist)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_knn_chunks_are_invisible(k):
    xyz, query = cloud("tenths", 2, 3000, 0), cloud("tenths", 2, 300, 1)
    sqdist, idx = act.knn(query, xyz, k)  # several chunks
    for b, q in [(0, 0), (0, 150), (1, 86), (1, 87), (1, 299)]:
        one = act.knn(query[b : b + 1, q : q + 1], xyz[b : b + 1], k)
        assert torch.equal(one[0][0, 0], sqdist[b, q]) and torch.equal(one[1][0, 0], idx[b, q])
    assert torch.equal(idx[:, ::50], brute_knn(query[:, ::50], xyz, k)[1])


def test_knn_is_permutation_equivariant():
    xyz, query = randn(2, 400, 3), randn(2, 30, 3, seed=1)
    of_points = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    of_queries = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    sqdist, idx = act.knn(query, xyz, 8)
    permuted_sqdist, permuted_idx = act.knn(query[:, of_queries], xyz[:, of_points], 8)
    assert torch.equal(permuted_sqdist, sqdist[:, of_queries])
    assert torch.equal(of_points[permuted_idx], idx[:, of_queries])


def test_knn_computes_half_precision_in_float32():
    xyz = randn(2, 50, 3).to(torch.bfloat16)
    for one, other in zip(act.knn(xyz, xyz, 6), brute_knn(xyz.float(), xyz.float(), 6)):
        assert torch.equal(one, other)


def test_knn_of_a_million_points_stays_under_a_gigabyte():
    script = ("import resource, torch, act\n"
              "xyz, query = torch.rand(1, 1_000_000, 3), torch.rand(1, 1000, 3)\n"
              "act.knn(query[:, :2], xyz[:, :100], 4)\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "sqdist, idx = act.knn(query, xyz, 32)\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sqdist[..., -1].max().item())\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(act.__file__).parent)
    assert done.returncode == 0, done.stderr
    kib, radius = done.stdout.split()
    assert int(kib) < 1e6  # the plain table of distances alone would be 4 GB
    assert float(radius) < 0.05**2


@pytest.mark.parametrize("call, message", [
    (lambda xyz: act.farthest_point_sample(xyz, 6), "num_samples must be from 1 to the cloud's 5 points, found 6"),
    (lambda xyz: act.farthest_point_sample(xyz, 0), "num_samples must be from 1 to the cloud's 5 points, found 0"),
    (lambda xyz: act.knn(xyz, xyz, 6), "k must be from 1 to the cloud's 5 points, found 6"),
    (lambda xyz: act.group_points(xyz, 6, 2), "found 6"), (lambda xyz: act.group_points(xyz, 2, 6), "found 6"),
    (lambda xyz: act.chamfer_distance(xyz, xyz, norm=3), "norm must be 1 or 2, found 3")])
def test_geometry_names_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(randn(2, 5, 3))


@few
@given(B=st.integers(1, 3), N=st.integers(1, 9), C=st.integers(1, 4), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
       seed=st.integers(0, 99))
def test_gather_points_equals_advanced_indexing_and_so_does_its_gradient(B, N, C, shape, seed):
    values = randn(B, N, C, seed=seed, dtype=torch.float64).requires_grad_()
    idx = torch.randint(N, (B, *shape), generator=torch.Generator().manual_seed(seed))
    ours = act.gather_points(values, idx)
    plain = values[torch.arange(B).view(B, *[1] * len(shape)), idx]
    assert torch.equal(ours, plain)
    weight = randn(*plain.shape, seed=seed + 1, dtype=torch.float64)
    close(*(torch.autograd.grad((out * weight).sum(), values)[0] for out in (ours, plain)), 1e-12)


def test_group_points_gathers_the_nearest_points_relative_to_each_farthest_point():
    xyz = randn(2, 50, 3) + 1e3
    neighborhood, center = act.group_points(xyz, 7, 5)
    first = brute_fps(xyz, 7)
    for b in range(2):
        for g in range(7):
            assert torch.equal(center[b, g], xyz[b, first[b, g]])
            order = np.argsort(brute_sqdist(center[b, g : g + 1], xyz[b])[0], kind="stable")[:5]
            assert torch.equal(neighborhood[b, g], xyz[b, torch.from_numpy(order)] - center[b, g])
    assert torch.equal(neighborhood[:, :, 0], torch.zeros(2, 7, 3))


def loop_chamfer(a, b, norm):
    """The definition, one point at a time, in float64."""
    total = 0.0
    for one, other in zip(a.double().tolist(), b.double().tolist()):
        for x, y in ((one, other), (other, one)):
            nearest = [min(math.dist(p, q) for q in y) for p in x]
            total += sum(d / 2 if norm == 1 else d * d for d in nearest) / len(nearest) / len(a)
    return total


@few
@given(B=st.integers(1, 2), N=st.integers(1, 12), M=st.integers(1, 12), norm=st.sampled_from([1, 2]),
       kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
@example(B=1, N=1, M=1, norm=1, kind="normal", seed=0)
@example(B=2, N=7, M=5, norm=2, kind="far", seed=0)
def test_chamfer_equals_a_loop_over_the_points_and_is_symmetric(B, N, M, norm, kind, seed):
    a, b = cloud(kind, B, N, seed), cloud(kind, B, M, seed + 1)
    found = act.chamfer_distance(a, b, norm)
    assert found.shape == ()
    assert found.item() == pytest.approx(loop_chamfer(a, b, norm), rel=1e-5, abs=1e-12)
    assert act.chamfer_distance(b, a, norm).item() == pytest.approx(found.item(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("norm", [1, 2])
def test_chamfer_of_a_cloud_and_its_shuffled_self_is_zero_with_gradient_zero(norm):
    a = cloud("pairs", 2, 20, 0).requires_grad_()
    b = a.detach().flip(1).requires_grad_()
    loss = act.chamfer_distance(a, b, norm)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(a.grad, torch.zeros_like(a)) and torch.equal(b.grad, torch.zeros_like(b))


@pytest.mark.parametrize("norm", [1, 2])
def test_chamfer_gradient_is_right_in_float64(norm):
    a, b = (randn(2, n, 3, seed=n, dtype=torch.float64).requires_grad_() for n in (6, 4))
    assert torch.autograd.gradcheck(lambda a, b: act.chamfer_distance(a, b, norm), (a, b))


def test_chamfer_computes_in_the_better_of_both_precisions_and_float32_at_least():
    a, b = randn(1, 9, 3).to(torch.bfloat16), randn(1, 8, 3, seed=1).to(torch.bfloat16)
    assert torch.equal(act.chamfer_distance(a, b), act.chamfer_distance(a.float(), b.float()))
    a, b = randn(1, 9, 3), randn(1, 8, 3, seed=1, dtype=torch.float64)
    assert torch.equal(act.chamfer_distance(a, b), act.chamfer_distance(a.double(), b))


def test_fscore_of_hand_worked_cases():
    two = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    wide = torch.tensor([[[0.0, 0, 0], [5, 0, 0]]])
    assert act.fscore(two, two).tolist() == [1]
    assert act.fscore(two, two + 9).tolist() == [0]
    assert act.fscore(two, wide, threshold=0.5).tolist() == pytest.approx([1 / 2])  # precision 1/2, recall 1/2
    assert act.fscore(two, wide, threshold=2).tolist() == pytest.approx([2 / 3])  # precision 1, recall 1/2
    assert act.fscore(wide, two, threshold=2).tolist() == pytest.approx([2 / 3])
    assert act.fscore(two, two + torch.tensor([0.05, 0, 0])).tolist() == [0]  # 0.05 > 0.01, though 0.05² < 0.01
    assert act.fscore(two, two + torch.tensor([0.05, 0, 0]), threshold=0.06).tolist() == [1]
    assert act.fscore(1.5 * two, wide, threshold=2).tolist() == pytest.approx([2 / 3])  # 1.5 < 2, though 1.5² > 2
    assert act.fscore(wide, 1.5 * two, threshold=2).tolist() == pytest.approx([2 / 3])
    both = act.fscore(torch.cat([two, two]), torch.cat([two, wide]), threshold=2)
    assert both.tolist() == pytest.approx([1, 2 / 3])


@few
@given(N=st.integers(1, 10), G=st.integers(1, 8), C=st.integers(1, 3), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
@example(N=5, G=1, C=2, kind="normal", seed=0)
@example(N=5, G=2, C=2, kind="normal", seed=0)
@example(N=5, G=6, C=2, kind="identical", seed=0)
def test_interpolation_weighs_the_three_nearest_centres_by_inverse_squared_distance(N, G, C, kind, seed):
    xyz, center, features = cloud(kind, 2, N, seed), cloud(kind, 2, G, seed + 1), randn(2, G, C, seed=seed + 2)
    found = act.interpolate(xyz, center, features)
    wanted = torch.zeros(2, N, C, dtype=torch.float64)
    for b in range(2):
        for n in range(N):
            near = sorted((math.dist(xyz[b, n].tolist(), center[b, g].tolist()) ** 2, g) for g in range(G))[:3]
            weights = [1 / (d + 1e-8) for d, _ in near]
            wanted[b, n] = sum(w * features[b, g].double() for w, (_, g) in zip(weights, near)) / sum(weights)
    close(found.double(), wanted, 1e-4, floor=1)


def test_interpolation_is_exact_at_centres_and_for_constants():
    center, features = randn(2, 12, 3), randn(2, 12, 4, seed=1)
    close(act.interpolate(center, center, features), features)
    close(act.interpolate(randn(2, 30, 3, seed=2), center, torch.ones(2, 12, 4)), torch.ones(2, 30, 4), 1e-6)


def test_interpolation_gradient_is_right_in_float64_and_half_precision_is_rounded_once():
    xyz, center, features = (randn(2, n, 3, seed=n, dtype=torch.float64) for n in (6, 4, 4))
    assert torch.autograd.gradcheck(lambda f: act.interpolate(xyz, center, f), features.requires_grad_())
    coarse = [t.detach().to(torch.bfloat16) for t in (xyz, center, features)]
    assert torch.equal(act.interpolate(*coarse), act.interpolate(*(t.float() for t in coarse)).to(torch.bfloat16))


def names_in(code):
    return set(code.co_names).union(*(names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_source_runs_alone_beside_torch(name):
    wanted, queue = [], [name]
    while queue:  # the function, the geometry it names, and so on
        wanted.append(queue.pop())
        queue += [n for n in names_in(getattr(act, wanted[-1]).__code__) if n in GEOMETRY and n not in wanted + queue]
    space = {"torch": torch}
    for each in wanted:
        exec(inspect.getsource(getattr(act, each)), space)
    xyz, center = randn(2, 100, 3), randn(2, 9, 3, seed=1)
    args = {"farthest_point_sample": (xyz, 9), "knn": (center, xyz, 4), "gather_points": (xyz, torch.tensor([[3], [5]])),
            "group_points": (xyz, 9, 4), "chamfer_distance": (xyz, center), "fscore": (xyz, center, 0.3),
            "interpolate": (xyz, center, randn(2, 9, 5))}[name]
    alone, ours = space[name](*args), getattr(act, name)(*args)
    for one, other in zip(alone if isinstance(alone, tuple) else [alone], ours if isinstance(ours, tuple) else [ours]):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# Transformer
# ---------------------------------------------------------------------------------------------------------------------

def plain_norm(x, norm):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def plain_attention(x, attn):
    T, C = x.shape[1:]
    D = C // attn.num_heads
    w, b = attn.qkv.weight, attn.qkv.bias
    out = []
    for h in range(attn.num_heads):
        q, k, v = (x @ w[i * C + h * D : i * C + (h + 1) * D].T + (0 if b is None else b[i * C + h * D : i * C + (h + 1) * D])
                   for i in range(3))
        out.append(((q @ k.transpose(1, 2)) / math.sqrt(D)).softmax(-1) @ v)
    return torch.cat(out, -1) @ attn.proj.weight.T + attn.proj.bias


def plain_mlp(x, mlp, quick):
    x = x @ mlp.fc1.weight.T + mlp.fc1.bias
    x = x / (1 + (-1.702 * x).exp()) if quick else x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x @ mlp.fc2.weight.T + mlp.fc2.bias


def plain_block(block, x, quick=False):
    gamma1, gamma2 = (getattr(ls, "gamma", 1) for ls in (block.ls1, block.ls2))
    if block.norm_first:
        x = x + gamma1 * plain_attention(plain_norm(x, block.norm1), block.attn)
        return x + gamma2 * plain_mlp(plain_norm(x, block.norm2), block.mlp, quick)
    x = plain_norm(x + plain_attention(x, block.attn), block.norm1)
    return plain_norm(x + plain_mlp(x, block.mlp, quick), block.norm2)


BLOCKS = {"pre-norm": {}, "post-norm": dict(norm_first=False, eps=1e-12), "layer scale": dict(layer_scale=True),
          "quick gelu": dict(quick_gelu=True), "no qkv bias": dict(qkv_bias=False, mlp_hidden=20)}


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_equals_the_formula(kind):
    block = randomise(act.Block(12, 3, **BLOCKS[kind]))
    x = randn(2, 5, 12, seed=1).requires_grad_()
    same_with_gradients(block(x), plain_block(block, x, kind == "quick gelu"), [x, *block.parameters()])


@pytest.mark.parametrize("kind", BLOCKS)
def test_prefix_equals_prompt_tokens_in_front_whose_outputs_are_dropped(kind):
    block = randomise(act.Block(12, 3, **BLOCKS[kind]))
    x, prompts = randn(2, 5, 12, seed=1).requires_grad_(), randn(1, 4, 12, seed=2).requires_grad_()
    plain = plain_block(block, torch.cat([prompts.expand(2, -1, -1), x], dim=1), kind == "quick gelu")[:, 4:]
    same_with_gradients(block(x, block.prefix(prompts)), plain, [x, prompts, *block.parameters()])


def test_drop_path_keeps_the_expectation_by_whole_samples_and_rests_in_eval():
    torch.manual_seed(0)
    drop, x = act.DropPath(0.3), torch.ones(20000, 2, 3)
    out = drop(x)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert {round(v, 4) for v in out.unique().tolist()} == {0.0, round(1 / 0.7, 4)}
    assert out.mean().item() == pytest.approx(1, abs=4 * math.sqrt(0.3 / 0.7 / 20000))
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_leaves_the_residual_stream_of_a_dropped_sample_untouched():
    torch.manual_seed(0)
    block, x = act.Block(8, 2, drop_path=0.9), randn(40, 3, 8)
    untouched = (block(x) == x).flatten(1).all(dim=1)
    assert 20 < untouched.sum() < 40  # 0.81 of them on average
    assert not (block.eval()(x) == x).flatten(1).all(dim=1).any()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 10 is not a multiple of the 3 heads"):
        act.Block(10, 3)


@pytest.mark.parametrize("extra", [{}, dict(num_cls=2), dict(num_reg=3, layer_scale=True), dict(cls_pos=False),
                                   dict(norm_pre=True, patch_bias=False, quick_gelu=True), dict(final_norm=False)],
                         ids=["ViT", "two class tokens", "registers", "no class position", "norm first", "no final norm"])
def test_trunk_on_images_equals_the_formula(extra):
    trunk = randomise(act.Trunk(act.TrunkConfig(width=8, depth=2, num_heads=2, mlp_hidden=16, patch_size=4, grid=3, **extra)))
    images, c = randn(2, 3, 12, 12, seed=1), trunk.config
    patches = [images[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1) for i in range(3) for j in range(3)]
    x = torch.stack(patches, dim=1) @ trunk.patch_embed.proj.weight.flatten(1).T
    x = x + (trunk.patch_embed.proj.bias if c.patch_bias else 0) + trunk.pos_embed[:, -9:]
    cls = trunk.cls_token if c.num_cls == 1 else torch.cat([trunk.cls_token, trunk.dist_token], 1)
    cls = cls + trunk.pos_embed[:, : c.num_cls] if c.cls_pos else cls
    front = [cls] + ([trunk.reg_token] if c.num_reg else [])
    x = torch.cat([t.expand(2, -1, -1) for t in front] + [x], dim=1)
    x = plain_norm(x, trunk.norm_pre) if c.norm_pre else x
    for block in trunk.blocks:
        x = plain_block(block, x, c.quick_gelu)
    x = plain_norm(x, trunk.norm) if c.final_norm else x
    same_with_gradients(trunk.forward_features(images), x, trunk.parameters())


def test_trunk_on_images_of_another_size_resamples_its_positions():
    trunk = randomise(act.Trunk(act.TrunkConfig(width=8, depth=1, num_heads=2, mlp_hidden=16, patch_size=4, grid=4)))
    with torch.no_grad():  # columns of a ramp across the picture: resampling it is known
        trunk.pos_embed[:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]
    images = torch.zeros(1, 3, 16, 32)
    seen = []
    trunk.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert trunk.forward_features(images).shape == (1, 1 + 4 * 8, 8)
    ramp = (seen[0][:, 1:] - trunk.patch_embed.proj.bias).view(4, 8, 8)
    close(ramp, ramp[:1, :, :1].expand_as(ramp))  # the same in all rows and channels
    close(ramp[0, 3:5, 0], torch.tensor([1.25, 1.75]), 1e-4)  # half-pixel centres of a grid twice as fine
    assert (ramp[0, 1:, 0] > ramp[0, :-1, 0]).all()


def test_trunk_without_image_side_says_so():
    trunk = act.Trunk(act.TrunkConfig(width=8, depth=1, num_heads=2, mlp_hidden=16))
    with pytest.raises(ValueError, match="no image side"):
        trunk.forward_features(torch.zeros(1, 3, 8, 8))
    assert trunk.forward_tokens(randn(2, 5, 8)).shape == (2, 5, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Savings beside the plain formulas
# ---------------------------------------------------------------------------------------------------------------------

def channels_first(x):
    return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)  # (B, ..., C) -> (B, C, positions)


def share_processes(monkeypatch):
    """Take the path of many processes with this one alone: its sums are then the total."""
    import torch.distributed.nn.functional
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, *_: None)


@pytest.mark.parametrize("many", [False, True], ids=["one process", "many"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 5)])
def test_batch_norm_equals_torchs_with_channels_first_statistics_included(shape, many, monkeypatch):
    if many:
        share_processes(monkeypatch)
    ours, plain = randomise(act.BatchNorm(5)), randomise(nn.BatchNorm1d(5, momentum=None))
    x = (3 * randn(*shape) + 2).requires_grad_()
    for train in (True, True, False):
        ours.train(train), plain.train(train)
        out, wanted = ours(x), plain(channels_first(x)).transpose(1, 2).reshape(shape)
        close(out, wanted)
        inputs = [[x, *m.parameters()] for m in (ours, plain)]
        for a, b in zip(*(torch.autograd.grad((o * randn(*shape, seed=5)).sum(), i) for o, i in zip((out, wanted), inputs))):
            close(a, b, floor=1)
    for (key, a), b in zip(ours.state_dict().items(), plain.state_dict().values()):
        close(a.double(), b.double(), 1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_patch_embedding_equals_the_plain_concatenation(train):
    embed = randomise(act.PatchEmbed(16)).train(train)
    points = randn(2, 5, 7, 3, seed=1).requires_grad_()
    point = embed.first_conv(points)
    both = torch.cat([point.amax(2, keepdim=True).expand_as(point), point], dim=-1)
    same_with_gradients(embed(points), embed.second_conv(both).amax(2), [points, *embed.parameters()])


def plain_edge_conv(layer, f, graph):
    B, G, C = f.shape
    f_j = torch.stack([f[b][graph[b]] for b in range(B)])  # (B, G, K, C)
    f_i = f[:, :, None].expand_as(f_j)
    x = F.linear(torch.cat([f_j - f_i, f_i], dim=-1), layer[0].weight).permute(0, 3, 1, 2)  # (B, out, G, K)
    x = F.group_norm(x, 4, layer[1].weight, layer[1].bias, eps=1e-5)
    return F.leaky_relu(x, 0.2).amax(dim=-1).transpose(1, 2)


def plain_dgcnn(model, f, graph):
    f, out = model.input_trans(f), []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        f = plain_edge_conv(layer, f, graph)
        out.append(f)
    x = F.linear(torch.cat(out, dim=-1), model.layer5[0].weight).transpose(1, 2)
    return F.leaky_relu(F.group_norm(x, 4, model.layer5[1].weight, model.layer5[1].bias), 0.2).transpose(1, 2)


def test_edge_convolution_equals_the_formula_on_explicit_edges():
    layer = act.EdgeConv(10, 16)
    with torch.no_grad():  # some scales negative: there the maximum comes from the least edge
        layer[1].weight.copy_(randn(16, seed=1)), layer[1].bias.copy_(randn(16, seed=2))
    f, center = randn(2, 9, 10).requires_grad_(), randn(2, 9, 3, seed=3)
    graph = act.knn(center, center, 4)[1]
    assert (layer[1].weight < 0).any()
    same_with_gradients(layer(f, graph), plain_edge_conv(layer, f, graph), [f, *layer.parameters()])


def test_dgcnn_equals_the_formula_on_explicit_edges():
    model = act.DGCNN(10, 8)
    f, center = randn(2, 6, 10).requires_grad_(), randn(2, 6, 3, seed=3)
    graph = act.knn(center, center, 4)[1]
    same_with_gradients(model(f, graph), plain_dgcnn(model, f, graph), [f, *model.parameters()])


@pytest.mark.parametrize("train", [True, False])
def test_folding_decoder_equals_the_plain_concatenation_in_the_published_order(train):
    decoder = randomise(act.FoldingDecoder(12, 8)).train(train)
    feature = randn(2, 5, 12, seed=1).requires_grad_()
    coarse = decoder.mlp(feature).view(2, 5, 2, 3)
    rows = [torch.cat([feature, torch.tensor(offset).expand(2, 5, 2), coarse[:, :, m]], dim=-1)
            for m in range(2) for offset in ([-0.05, -0.05], [0.05, -0.05], [-0.05, 0.05], [0.05, 0.05])]
    fine = decoder.final_conv(torch.stack(rows, dim=2)) + coarse.repeat_interleave(4, dim=2)
    same_with_gradients(decoder(feature), (coarse, fine), [feature, *decoder.parameters()])


def test_folding_decoder_needs_groups_of_fours():
    with pytest.raises(ValueError, match="group_size must be a multiple of 4, found 30"):
        act.FoldingDecoder(8, 30)


# ---------------------------------------------------------------------------------------------------------------------
# Teacher
# ---------------------------------------------------------------------------------------------------------------------

TRUNKS = {"ViT": {}, "BERT": dict(norm_first=False, final_norm=False, eps=1e-12),
          "CLIP": dict(norm_pre=True, quick_gelu=True, eps=1e-5), "DINOv2": dict(layer_scale=True)}


CODES = dict(num_group=8, group_size=8, encoder_dims=16, tokens_dims=12, decoder_dims=16, num_tokens=20)


def make_teacher(prompt="deep", depth=3, **trunk):
    torch.manual_seed(0)
    trunk = act.TrunkConfig(width=16, depth=depth, num_heads=2, mlp_hidden=24, **trunk)
    teacher = act.Teacher(act.TeacherConfig(**CODES, prompt=prompt, num_prompt=3, prompt_dropout=0.0, trunk=trunk))
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if "prompt" in name or name.endswith("gamma"):
                p.add_(randn(*p.shape, seed=len(name)) * 0.5)
    return teacher


def clouds(B=3, N=64, seed=0):
    return F.normalize(randn(B, N, 3, seed=seed), dim=-1) * randn(B, 1, 3, seed=seed + 1).abs().clamp(0.3, 1)


def plain_visual(teacher, tokens, center):
    """[prompts, tokens] as one sequence through every block; at every layer the prompts' outputs are dropped (deep) or kept."""
    c, B, P = teacher.config, len(tokens), teacher.config.num_prompt if teacher.config.prompt != "none" else 0
    x, pos = teacher.proj_pre(tokens), teacher.visual_pos_embed(center)
    if P:
        x = torch.cat([teacher.visual_prompt_token.expand(B, -1, -1), x], dim=1)
        pos = torch.cat([teacher.visual_prompt_pos.expand(B, -1, -1), pos], dim=1)
    if c.trunk.norm_pre:
        x = plain_norm(x, teacher.trunk.norm_pre)
    for l, block in enumerate(teacher.trunk.blocks):
        if c.prompt == "deep" and l > 0:
            x = torch.cat([teacher.deep_prompt_tokens[l - 1].expand(B, -1, -1), x[:, P:]], dim=1)
            pos = torch.cat([teacher.deep_prompt_pos[l - 1].expand(B, -1, -1), pos[:, P:]], dim=1)
        x = plain_block(block, x + pos, c.trunk.quick_gelu)
    return teacher.proj_post((plain_norm(x, teacher.trunk.norm) if c.trunk.final_norm else x)[:, P:])


@pytest.mark.parametrize("prompt", ["deep", "shallow", "none"])
@pytest.mark.parametrize("kind", TRUNKS)
def test_prompted_trunk_equals_the_full_sequence_through_every_block(kind, prompt):
    teacher = make_teacher(prompt, **TRUNKS[kind])
    tokens, center = randn(2, 8, 12).requires_grad_(), randn(2, 8, 3, seed=1)
    same_with_gradients(teacher.visual(tokens, center), plain_visual(teacher, tokens, center), [tokens, *teacher.parameters()])


def test_deep_prompts_of_a_trunk_of_one_block_are_the_first_prompts_alone():
    teacher = make_teacher(depth=1)
    tokens, center = randn(2, 8, 12), randn(2, 8, 3, seed=1)
    close(teacher.visual(tokens, center), plain_visual(teacher, tokens, center))


@pytest.mark.parametrize("prompt", ["deep", "shallow", "none"])
def test_prefix_computed_once_equals_prefix_computed_on_the_way(prompt):
    teacher = make_teacher(prompt).eval()
    neighborhood, center = act.group_points(clouds(), 8, 8)
    prefix = teacher.prefix()
    assert (prefix is None) == (prompt != "deep")
    assert torch.equal(teacher.features(neighborhood, center, prefix), teacher.features(neighborhood, center))


def plain_autoencoder(teacher, xyz, codes_of):
    """The stages by their plain formulas; `codes_of` turns logits into a distribution over the codes (B, G, codes)."""
    neighborhood, center = act.group_points(xyz, 8, 8)
    graph = brute_knn(center, center, 4)[1]
    logits = plain_dgcnn(teacher.dgcnn_1, teacher.encoder(neighborhood), graph)
    features = plain_dgcnn(teacher.dgcnn_2, plain_visual(teacher, codes_of(logits) @ teacher.codebook, center), graph)
    return logits, features, *teacher.decoder(features)


@pytest.mark.parametrize("hard", [True, False])
def test_teacher_in_eval_equals_the_formula_soft_and_hard(hard, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # in float32 the slope at a kink may differ by rounding alone
    teacher, xyz = make_teacher().double().eval(), clouds().double()

    def codes_of(logits):
        return F.one_hot(logits.argmax(-1), 20).double() if hard else (logits / 0.3).softmax(-1)
    logits, features, coarse, fine = plain_autoencoder(teacher, xyz, codes_of)
    out = teacher(xyz, temperature=0.3, hard=hard)
    assert [t.shape for t in out] == [(3, 8, 2, 3), (3, 8, 8, 3), (3, 8, 8, 3), (3, 8, 3), (3, 8, 20)]
    same_with_gradients((out.logits, out.coarse, out.fine), (logits, coarse, fine), teacher.parameters(), rtol=1e-9)
    if hard:
        close(teacher.features(out.neighborhood, out.center), features, 1e-9)
        assert torch.equal(teacher.tokenize(out.neighborhood, out.center), logits.argmax(-1))


def test_looking_up_hard_codes_equals_the_one_hot_product_gradient_included(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    teacher, xyz = make_teacher().double().eval(), clouds().double()
    neighborhood, center = act.group_points(xyz, 8, 8)
    _, features, _, _ = plain_autoencoder(teacher, xyz, lambda logits: F.one_hot(logits.argmax(-1), 20).double())
    same_with_gradients(teacher.features(neighborhood, center), features, [teacher.codebook, teacher.proj_pre.weight], rtol=1e-9)


def test_gumbel_noise_is_drawn_in_training_only(monkeypatch):
    teacher, xyz, calls = make_teacher(), clouds(), []
    real = F.gumbel_softmax
    monkeypatch.setattr(F, "gumbel_softmax", lambda *args, **kwargs: calls.append(kwargs) or real(*args, **kwargs))
    teacher.train()
    for hard in (False, True):
        one, two = teacher(xyz, temperature=0.4, hard=hard), teacher(xyz, temperature=0.4, hard=hard)
        assert torch.equal(one.logits, two.logits) and not torch.equal(one.fine, two.fine)
    assert [(kwargs["tau"], kwargs["hard"]) for kwargs in calls] == [(0.4, False)] * 2 + [(0.4, True)] * 2
    teacher.eval()
    state = torch.get_rng_state()
    for hard in (False, True):
        assert all(torch.equal(a, b) for a, b in zip(teacher(xyz, 0.4, hard), teacher(xyz, 0.4, hard)))
    assert len(calls) == 4 and torch.equal(torch.get_rng_state(), state)


def test_temperature_runs_from_the_hard_code_to_the_mean_of_all():
    teacher, xyz = make_teacher().eval(), clouds()
    close(teacher(xyz, temperature=1e-4).fine, teacher(xyz, hard=True).fine, 1e-4)
    mean = plain_autoencoder(teacher, xyz, lambda logits: torch.full_like(logits, 1 / 20))[-1]
    close(teacher(xyz, temperature=1e5).fine, mean, 1e-3)


def test_targets_are_deterministic_in_eval():
    teacher = make_teacher().train()
    teacher.config.prompt_dropout = 0.5
    neighborhood, center = act.group_points(clouds(), 8, 8)
    with torch.no_grad():
        assert not torch.equal(teacher.features(neighborhood, center), teacher.features(neighborhood, center))
        before, state = copy_of(teacher.eval()), torch.get_rng_state()
        target = teacher.features(neighborhood, center)
        assert torch.equal(target, teacher.features(neighborhood, center))
        close(teacher.features(neighborhood[:1], center[:1]), target[:1])  # whatever else is in the batch
    assert not moved(before, teacher) and torch.equal(torch.get_rng_state(), state)


INTENDED = {"none": set(), "shallow": {"visual_prompt_token", "visual_prompt_pos"},
            "deep": {"visual_prompt_token", "visual_prompt_pos", "deep_prompt_tokens", "deep_prompt_pos"}}


@pytest.mark.parametrize("prompt", ["deep", "shallow", "none"])
def test_training_moves_everything_but_the_trunk_which_stays_bit_identical(prompt):
    teacher, xyz = make_teacher(prompt), clouds()
    assert not any(p.requires_grad for p in teacher.trunk.parameters()) and not teacher.trunk.training
    before = copy_of(teacher)
    steps(teacher, lambda i: act.teacher_loss(teacher(xyz), 0.1)[0])
    assert teacher.training and not any(m.training for m in teacher.trunk.modules())
    changed = moved(before, teacher)
    parts = {k.split(".")[0] for k in before} - {"trunk"}
    assert {p for p in parts if "prompt" in p} == INTENDED[prompt]
    always = {"encoder", "dgcnn_1", "codebook", "proj_pre", "visual_pos_embed", "proj_post", "dgcnn_2", "decoder"}
    assert parts == always | INTENDED[prompt]
    assert changed == {k for k in before if not k.startswith("trunk.")}


FIXED = {**CODES, "tokens_dims": 16, "num_prompt": 3, "tokenizer": "fixed"}


def make_fixed_teacher():
    torch.manual_seed(3)
    teacher = act.Teacher(act.TeacherConfig(**FIXED), make_teacher().trunk)
    xyz = clouds(6, 40)
    teacher.fix_tokenizer(xyz)
    return teacher, xyz


def test_fixed_codes_are_patches_and_say_which():
    teacher, xyz = make_fixed_teacher()
    neighborhood, center = act.group_points(xyz, 8, 8)
    codes = teacher.eval().tokenize(neighborhood, center)
    tokens = teacher.encoder(neighborhood).flatten(0, 1)
    tokens = (tokens - tokens.mean(dim=0)) / (tokens.std(dim=0) + 1e-6)
    nearest = torch.cdist(teacher.codebook, tokens)  # (codes, B G)
    own = nearest.argmin(dim=1)
    assert nearest.amin(dim=1).max() < 1e-2 and len(own.unique()) == 20  # each code is a patch, every one another
    assert (codes.flatten()[own] == torch.arange(20)).float().mean() >= 0.9  # whose own code it is
    untrained = make_teacher().eval().tokenize(neighborhood, center)
    assert len(codes.unique()) == 20 > len(untrained.unique())


def test_a_fixed_tokenizer_stays_bit_identical_while_the_codebook_learns():
    teacher, xyz = make_fixed_teacher()
    before = copy_of(teacher.train())
    steps(teacher, lambda i: act.teacher_loss(teacher(xyz), 0.0)[0])
    assert not any(m.training for m in (*teacher.encoder.modules(), *teacher.dgcnn_1.modules()))
    still = ("trunk.", "encoder.", "dgcnn_1.")
    assert moved(before, teacher) == {k for k in before if not k.startswith(still)} and "codebook" in before


def test_a_fixed_tokenizer_wants_a_patch_for_each_code():
    teacher = act.Teacher(act.TeacherConfig(**FIXED), make_teacher().trunk)
    with pytest.raises(ValueError, match="wants a patch for each of the 20 codes, as wide as a token .*, found 8 patches of width"):
        teacher.fix_tokenizer(clouds(1, 40))
    with pytest.raises(ValueError, match="tokenizer must be trained or fixed, found 'frozen'"):
        act.TeacherConfig(tokenizer="frozen")


def test_auto_precision_is_bf16_where_the_processor_multiplies_in_it(monkeypatch):
    for flags, precision in (("flags : avx512f avx512_bf16", "bf16"), ("flags : amx_bf16", "bf16"), ("flags : avx2", "fp32")):
        monkeypatch.setattr(act.Path, "read_text", lambda path: flags)
        config = act.resolve(act.RunConfig(), torch.device("cpu"), {"tiny": dict(epochs=3)})
        assert (config.precision, config.size, config.epochs) == (precision, "tiny", 3)
        assert act.resolve(act.RunConfig(precision="fp32"), torch.device("cpu"), {"tiny": {}}).precision == "fp32"


def test_teacher_takes_a_trunks_blocks_and_norms_and_leaves_its_image_side():
    config = act.TrunkConfig(width=16, depth=2, num_heads=2, mlp_hidden=24, norm_pre=True, patch_size=4, grid=3)
    trunk = randomise(act.Trunk(config))
    teacher = act.Teacher(act.TeacherConfig(**CODES, num_prompt=3), trunk)
    assert torch.equal(teacher.trunk.forward_tokens(randn(2, 5, 16)), trunk.forward_tokens(randn(2, 5, 16)))
    assert set(trunk.state_dict()) - set(teacher.trunk.state_dict()) == {
        "patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed"}


def test_prompt_kind_is_checked():
    with pytest.raises(ValueError, match="prompt must be deep, shallow or none, found 'wide'"):
        act.TeacherConfig(prompt="wide")


def random_output(logits):
    B, G, _ = logits.shape
    coarse, fine, neighborhood = (randn(B, G, s, 3, seed=i) for i, s in enumerate((2, 8, 8)))
    return act.TeacherOutput(coarse, fine, neighborhood, randn(B, G, 3, seed=4), logits)


def test_teacher_loss_equals_an_independent_formula():
    output = random_output(3 * randn(4, 5, 9))
    total, reconstruction, kl = act.teacher_loss(output, 0.07)
    target = output.neighborhood.flatten(0, 1)
    wanted = loop_chamfer(output.coarse.flatten(0, 1), target, 1) + loop_chamfer(output.fine.flatten(0, 1), target, 1)
    assert reconstruction.item() == pytest.approx(wanted, rel=1e-5)
    uniform = torch.distributions.Categorical(probs=torch.full((4, 9), 1 / 9))
    mean = torch.distributions.Categorical(probs=output.logits.softmax(-1).mean(1))
    assert kl.item() == pytest.approx(torch.distributions.kl_divergence(uniform, mean).mean().item(), rel=1e-5)
    assert total.item() == pytest.approx(reconstruction.item() + 0.07 * kl.item(), rel=1e-6)


def test_kl_is_zero_for_uniform_use_of_the_codes_and_grows_with_their_collapse():
    codes = 5
    assert act.teacher_loss(random_output(torch.full((2, codes, codes), 2.5)), 1)[2].item() == pytest.approx(0, abs=1e-6)
    # each patch sure of its own code: the mean is uniform all the same
    assert act.teacher_loss(random_output(50 * torch.eye(codes).expand(2, -1, -1)), 1)[2].item() == pytest.approx(0, abs=1e-6)
    # all patches on one code by a margin a: KL(uniform || q) = (K - 1) / K a - log K + log(1 + (K - 1) exp(-a))
    for a in (3.0, 30.0, 300.0):
        logits = torch.zeros(2, 4, codes)
        logits[..., 1] = a
        wanted = (codes - 1) / codes * a - math.log(codes) + math.log1p((codes - 1) * math.exp(-a))
        assert act.teacher_loss(random_output(logits), 1)[2].item() == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Student
# ---------------------------------------------------------------------------------------------------------------------

SIZES = dict(num_group=10, group_size=6, width=12, depth=3, num_heads=3, encoder_dims=16, drop_path=0.0)


def make_student(**sizes):
    torch.manual_seed(0)
    return randomise(act.Student(act.StudentConfig(**{**SIZES, "target_dim": 7, **sizes})))


def patches(B=3, seed=0):
    neighborhood, center = act.group_points(clouds(B, 64, seed), 10, 6)
    return neighborhood, center, act.random_mask(center, 0.6, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masks", [act.random_mask, act.block_mask])
@pytest.mark.parametrize("ratio, hidden", [(0, 0), (0.05, 0), (0.45, 4), (0.6, 6), (0.8, 8), (1, 10)])
def test_masks_hide_exactly_the_share_of_every_cloud(masks, ratio, hidden):
    mask = masks(randn(20, 10, 3), ratio, torch.Generator().manual_seed(0))
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [hidden] * 20


@pytest.mark.parametrize("masks", [act.random_mask, act.block_mask])
def test_masks_are_reproducible_by_their_generator_alone(masks):
    center, state = randn(20, 10, 3), torch.get_rng_state()
    one, two, other = (masks(center, 0.6, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_masks_hide_every_group_and_every_pair_equally_often():
    B, G, M = 20000, 6, 3
    mask = act.random_mask(torch.zeros(B, G, 3), 0.5, torch.Generator().manual_seed(0)).double()
    pairs = mask.T @ mask / B  # the diagonal: single groups
    for wanted, found in [(M / G, pairs.diag()), (M * (M - 1) / G / (G - 1), pairs[~torch.eye(G, dtype=torch.bool)])]:
        assert (found - wanted).abs().max() < 4.5 * math.sqrt(wanted * (1 - wanted) / B)


def test_block_masks_hide_the_nearest_groups_of_one_member_each_equally_often():
    center = randn(1, 10, 3).expand(5000, -1, -1)
    mask = act.block_mask(center, 0.4, torch.Generator().manual_seed(0))
    blocks = {frozenset(row.tolist()): 0 for row in brute_knn(center[:1], center[:1], 4)[1][0]}  # around each member
    for row in mask:
        blocks[frozenset(row.nonzero()[:, 0].tolist())] += 1  # KeyError: no such block
    members = [frozenset(row.tolist()) for row in brute_knn(center[:1], center[:1], 4)[1][0]]
    for block, count in blocks.items():
        share = members.count(block) / 10
        assert abs(count / 5000 - share) < 4.5 * math.sqrt(share * (1 - share) / 5000)


def test_split_mask_lists_visible_and_masked_groups_in_order():
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    visible, masked = act.split_mask(mask, "cpu")
    assert visible.tolist() == [[1, 3], [0, 1]] and masked.tolist() == [[0, 2], [2, 3]]


def test_masks_of_unequal_count_are_refused():
    neighborhood, center, mask = patches()
    mask[1] = True
    for call in (make_student(), make_student().encoder):
        with pytest.raises(ValueError, match=r"equally many groups of every cloud, found \[6, 10, 6\]"):
            call(neighborhood, center, mask)


@pytest.mark.parametrize("train", [True, False])
def test_encoder_embeds_the_visible_patches_alone(train):
    encoder = make_student().encoder.train(train)
    neighborhood, center, mask = patches()
    visible = torch.stack([n[~m] for n, m in zip(neighborhood, mask)])
    x = encoder.reduce_dim(encoder.patch_embed(visible))
    x = torch.cat([encoder.cls_token.expand(3, -1, -1), x], dim=1)
    pos = encoder.pos_embed(torch.stack([c[~m] for c, m in zip(center, mask)]))
    pos = torch.cat([encoder.cls_pos.expand(3, -1, -1), pos], dim=1)
    for block in encoder.blocks:
        x = plain_block(block, x + pos)
    out = encoder(neighborhood, center, mask)
    assert out.shape == (3, 1 + 4, 12)
    same_with_gradients(out, plain_norm(x, encoder.norm), encoder.parameters())


def test_student_equals_the_formula():
    student = make_student().eval()
    neighborhood, center, mask = patches()
    tokens = student.encoder(neighborhood, center, mask)[:, 1:]
    x = torch.cat([tokens, student.mask_token.expand(3, 6, -1)], dim=1)
    pos = torch.stack([student.decoder_pos_embed(torch.cat([c[~m], c[m]])) for c, m in zip(center, mask)])
    for block in student.decoder["blocks"]:
        x = plain_block(block, x + pos)
    prediction = student.head(plain_norm(x, student.decoder["norm"])[:, -6:])
    out = student(neighborhood, center, mask)
    assert out.shape == (3, 6, 7)
    same_with_gradients(out, prediction, student.parameters())


def test_predictions_stand_at_the_masked_groups_in_group_order():
    student = make_student().eval()
    for block in student.decoder["blocks"]:  # without attention a prediction knows its own centre only
        nn.init.zeros_(block.attn.proj.weight)
    neighborhood, center, mask = patches()
    out = student(neighborhood, center, mask)
    for m, g in enumerate(mask[1].nonzero()[:, 0].tolist()):
        elsewhere = center.clone()
        elsewhere[1, g] += 0.5
        changed = (student(neighborhood, elsewhere, mask) - out).abs().amax(dim=-1) > 1e-4
        assert changed.nonzero().tolist() == [[1, m]]


def test_student_is_equivariant_to_the_order_of_groups():
    student = make_student().eval()
    neighborhood, center, mask = patches()
    perm = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    full = torch.zeros(3, 10, 7).masked_scatter(mask[..., None], student(neighborhood, center, mask))
    permuted = student(neighborhood[:, perm], center[:, perm], mask[:, perm])
    close(permuted, full[:, perm][mask[:, perm]].view(3, 6, 7))


def test_predictions_never_see_the_masked_patches_but_see_the_visible_ones():
    student = make_student().train()
    neighborhood, center, mask = patches()
    out = student(neighborhood, center, mask)
    assert torch.equal(student(torch.where(mask[..., None, None], 9.0, neighborhood), center, mask), out)
    g = int((~mask[0]).nonzero()[0])
    other = neighborhood.clone()
    other[0, g] *= 2
    changed = (student.eval()(other, center, mask) != student(neighborhood, center, mask)).flatten(1).any(1)
    assert changed.tolist() == [True, False, False]


def test_student_without_masked_groups_predicts_nothing():
    neighborhood, center, mask = patches()
    assert make_student()(neighborhood, center, torch.zeros_like(mask)).shape == (3, 0, 7)


def test_gradient_reaches_every_parameter_of_the_student_the_class_token_included():
    student = make_student().eval()  # the bias in front of a batch's own statistics would have none
    neighborhood, center, mask = patches()
    act.distillation_loss(student(neighborhood, center, mask), randn(3, 6, 7)).backward()
    assert student.encoder.cls_token.grad.abs().max() > 0
    assert [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_encode_is_the_encoder_on_whole_clouds():
    student, xyz = make_student().eval(), clouds()
    tokens = student.encode(xyz)
    assert tokens.shape == (3, 11, 12)
    neighborhood, center = act.group_points(xyz, 10, 6)
    close(tokens, student.encoder(neighborhood, center, torch.zeros(3, 10, dtype=torch.bool)))
    feature = act.global_feature(tokens)
    assert torch.equal(feature, torch.stack([torch.cat([t[0], t[1:].max(0)[0]]) for t in tokens]))


def test_drop_path_rises_linearly_with_depth():
    config = act.StudentConfig(**{**SIZES, "drop_path": 0.1, "depth": 5})
    assert [b.drop_path.p for b in act.Student(config).encoder.blocks] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert [b.drop_path.p for b in act.Student(config).decoder["blocks"]] == pytest.approx([0, 0.1])


def test_distillation_losses_equal_independent_formulas():
    a, b = 2 * randn(2, 5, 7), 2 * randn(2, 5, 7, seed=1)
    x, y = a.double().flatten(0, 1).numpy(), b.double().flatten(0, 1).numpy()
    cosine = np.mean([1 - p @ q / np.linalg.norm(p) / np.linalg.norm(q) for p, q in zip(x, y)])
    d = np.abs(x - y)
    assert (d < 1).any() and (d > 1).any()
    assert act.distillation_loss(a, b).item() == pytest.approx(cosine, rel=1e-5)
    assert act.distillation_loss(a, b, "smooth_l1").item() == pytest.approx(np.where(d < 1, d * d / 2, d - 0.5).mean(), rel=1e-5)
    assert act.distillation_loss(a, b, "l2").item() == pytest.approx((d * d).mean(), rel=1e-5)
    for kind in ("cosine", "smooth_l1", "l2"):
        assert act.distillation_loss(a, a, kind).item() == pytest.approx(0, abs=1e-6)
    assert act.distillation_loss(a, -3 * a).item() == pytest.approx(2, rel=1e-6)
    with pytest.raises(ValueError, match="loss must be cosine, smooth_l1 or l2, found 'l1'"):
        act.distillation_loss(a, b, "l1")
    with pytest.raises(ValueError, match=r"\(2, 5, 7\) and target \(2, 7\) differ"):
        act.distillation_loss(a, b[:, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Downstream heads
# ---------------------------------------------------------------------------------------------------------------------

def make_classifier(head="mlp3"):
    torch.manual_seed(0)
    return randomise(act.Classifier(act.ClassifierConfig(**SIZES, num_classes=4, head=head)))


def make_segmenter(categories=3, **sizes):
    torch.manual_seed(0)
    return randomise(act.Segmenter(act.SegmenterConfig(**{**SIZES, **sizes}, num_parts=5, num_categories=categories)))


MODEL_HEADS = {"mlp3": (make_classifier, ()), "linear": (lambda: make_classifier("linear"), ()),
         "parts": (make_segmenter, (torch.tensor([2, 0, 1]),)), "scene": (lambda: make_segmenter(0), ())}


@pytest.mark.parametrize("kind", MODEL_HEADS)
def test_heads_give_logits_and_pass_gradients_to_every_parameter(kind):
    make, extra = MODEL_HEADS[kind]
    model = make().eval()
    logits = model(clouds(), *extra)
    assert logits.shape == ((3, 4) if kind in ("mlp3", "linear") else (3, 64, 5))
    (logits * randn(*logits.shape)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", MODEL_HEADS)
def test_prediction_in_eval_does_not_depend_on_the_rest_of_the_batch(kind):
    make, extra = MODEL_HEADS[kind]
    model = make().eval()
    both, alone = model(clouds(), *extra), model(clouds()[1:2], *(e[1:2] for e in extra))
    close(alone, both[1:2])
    other = clouds()
    other[0] = randn(64, 3, seed=9)
    assert torch.equal(model(other, *extra)[1:], both[1:])


@pytest.mark.parametrize("kind", MODEL_HEADS)
def test_permuting_all_points_but_the_first_changes_logits_by_rounding_only(kind):
    make, extra = MODEL_HEADS[kind]
    model = make().eval()
    perm = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(63, generator=torch.Generator().manual_seed(0))])
    logits, permuted = model(clouds(), *extra), model(clouds()[:, perm], *extra)
    close(permuted, logits if logits.ndim == 2 else logits[:, perm])  # a segmenter's rows follow their points
    assert logits.ndim == 2 or not torch.equal(logits[:, perm], logits)


@pytest.mark.parametrize("head", ["mlp3", "linear"])
def test_frozen_encoder_is_bit_identical_after_training_statistics_and_class_token_included(head):
    model, xyz = make_classifier(head), clouds()
    assert model.freeze_encoder() is model and model.training and not any(m.training for m in model.encoder.modules())
    before = copy_of(model)
    steps(model, lambda i: F.cross_entropy(model(xyz), torch.tensor([0, 1, 2])))
    assert not any(m.training for m in model.encoder.modules())
    assert {"encoder.cls_token", "encoder.cls_pos", "encoder.patch_embed.first_conv.1.running_mean"} <= set(before)
    assert moved(before, model) == {k for k in before if k.startswith("head.")}


def test_full_training_moves_everything_statistics_included():
    model, xyz = make_classifier(), clouds()
    before = copy_of(model)
    steps(model, lambda i: F.cross_entropy(model(xyz), torch.tensor([0, 1, 2])), count=6)
    assert moved(before, model) == set(before)


@pytest.mark.parametrize("categories", [3, 0])
@pytest.mark.parametrize("train", [True, False])
def test_segmenter_equals_the_plain_concatenation(categories, train):
    model, xyz = make_segmenter(categories).double().train(train), clouds().double()  # float64: see the teacher
    model.head[3].p = 0.0  # no dropout: both forms would draw their own
    category = torch.tensor([2, 0, 1]) if categories else None
    neighborhood, center = act.group_points(xyz, 10, 6)
    x, pos, layers = model.encoder.reduce_dim(model.encoder.patch_embed(neighborhood)), model.encoder.pos_embed(center), []
    for block in model.encoder.blocks:  # depth 3: all three are read
        x = plain_block(block, x + pos)
        layers.append(plain_norm(x, model.encoder.norm))
    tokens = torch.cat(layers, dim=-1)
    point = model.propagation(torch.cat([xyz, act.interpolate(xyz, center, tokens)], dim=-1))
    whole = [tokens.amax(1), tokens.mean(1)] + ([model.label_conv(torch.eye(3).double()[category])] if categories else [])
    plain = model.head(torch.cat([point] + [w[:, None].expand(-1, 64, -1) for w in whole], dim=-1))
    args = (xyz, category) if categories else (xyz,)
    same_with_gradients(model(*args), plain, model.parameters(), rtol=1e-9)


@pytest.mark.parametrize("depth, depths", [(1, [1, 1, 1]), (2, [1, 1, 2]), (4, [1, 2, 4]), (12, [4, 8, 12])])
def test_segmenter_reads_the_encoder_at_thirds_of_any_depth(depth, depths):
    model = make_segmenter(depth=depth).eval()
    assert model.depths == depths
    assert model(clouds(), torch.tensor([0, 1, 2])).shape == (3, 64, 5)


def test_segmenter_has_no_class_token():
    assert not any("cls" in name for name, _ in make_segmenter().named_parameters())


def test_category_is_wanted_if_and_only_if_the_segmenter_has_some():
    with pytest.raises(ValueError, match="3 object categories: category must be given"):
        make_segmenter()(clouds())
    with pytest.raises(ValueError, match="0 object categories: category must be None"):
        make_segmenter(0)(clouds(), torch.tensor([0, 1, 2]))


def test_head_kind_is_checked():
    with pytest.raises(ValueError, match="head must be mlp3 or linear, found 'mlp'"):
        act.Classifier(act.ClassifierConfig(**SIZES, head="mlp"))


# =====================================================================================================================
# public weights and checkpoints
# =====================================================================================================================

W, DEPTH, HEADS, PATCH, GRID = 32, 2, 2, 4, 3  # a tiny ViT: images of 12 x 12


def random_tensor(generator, *shape, scale=0.3):
    return scale * torch.randn(*shape, generator=generator)


def vit_state(seed=0, num_cls=1, num_reg=0, cls_pos=True, layer_scale=False):
    """A tiny ViT with random weights, under timm's names."""
    g = torch.Generator().manual_seed(seed)
    state = {"cls_token": random_tensor(g, 1, 1, W), "patch_embed.proj.weight": random_tensor(g, W, 3, PATCH, PATCH),
             "patch_embed.proj.bias": random_tensor(g, W), "pos_embed": random_tensor(g, 1, GRID**2 + cls_pos * num_cls, W),
             "norm.weight": 1 + random_tensor(g, W), "norm.bias": random_tensor(g, W)}
    if num_cls == 2:
        state["dist_token"] = random_tensor(g, 1, 1, W)
    if num_reg:
        state["reg_token"] = random_tensor(g, 1, num_reg, W)
    for i in range(DEPTH):
        for name, out, inner in (("attn.qkv", 3 * W, W), ("attn.proj", W, W), ("mlp.fc1", 4 * W, W), ("mlp.fc2", W, 4 * W)):
            state[f"blocks.{i}.{name}.weight"] = random_tensor(g, out, inner, scale=inner**-0.5)
            state[f"blocks.{i}.{name}.bias"] = random_tensor(g, out)
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"] = 1 + random_tensor(g, W)
            state[f"blocks.{i}.{name}.bias"] = random_tensor(g, W)
        for name in ("ls1", "ls2") if layer_scale else ():
            state[f"blocks.{i}.{name}.gamma"] = random_tensor(g, W)
    return state


def reference_attention(state, prefix, x, heads):
    """softmax(q k^T / sqrt(d)) v, one head after another."""
    q, k, v = F.linear(x, state[prefix + "qkv.weight"], state[prefix + "qkv.bias"]).chunk(3, dim=-1)
    d = x.shape[-1] // heads
    out = []
    for s in (slice(h * d, (h + 1) * d) for h in range(heads)):
        out.append(torch.softmax(q[..., s] @ k[..., s].mT / d**0.5, dim=-1) @ v[..., s])
    return F.linear(torch.cat(out, dim=-1), state[prefix + "proj.weight"], state[prefix + "proj.bias"])


def plain_tokens(state, x, heads=HEADS, eps=1e-6, post_norm=False, quick_gelu=False):
    """The Transformer of a state dict under timm's names, written out."""
    def norm(name, x):
        return F.layer_norm(x, (W,), state[name + ".weight"], state[name + ".bias"], eps) if name + ".weight" in state else x

    def mlp(prefix, x):
        x = F.linear(x, state[prefix + "fc1.weight"], state[prefix + "fc1.bias"])
        x = x * torch.sigmoid(1.702 * x) if quick_gelu else x * 0.5 * (1 + torch.erf(x / 2**0.5))
        return F.linear(x, state[prefix + "fc2.weight"], state[prefix + "fc2.bias"])

    x = norm("norm_pre", x)
    for i in range(DEPTH):
        b = f"blocks.{i}."
        scale1, scale2 = state.get(b + "ls1.gamma", 1), state.get(b + "ls2.gamma", 1)
        if post_norm:
            x = norm(b + "norm1", x + reference_attention(state, b + "attn.", x, heads))
            x = norm(b + "norm2", x + mlp(b + "mlp.", x))
        else:
            x = x + scale1 * reference_attention(state, b + "attn.", norm(b + "norm1", x), heads)
            x = x + scale2 * mlp(b + "mlp.", norm(b + "norm2", x))
    return norm("norm", x)


def plain_features(state, images, **kind):
    x = F.conv2d(images, state["patch_embed.proj.weight"], state.get("patch_embed.proj.bias"), stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    cls = torch.cat([state[k] for k in ("cls_token", "dist_token") if k in state], dim=1)
    pos = state["pos_embed"]
    if pos.shape[1] > GRID**2:
        cls, pos = cls + pos[:, : cls.shape[1]], pos[:, cls.shape[1]:]
    rows = [cls, *[state[k] for k in ("reg_token",) if k in state]]
    return plain_tokens(state, torch.cat([*(r.expand(len(x), -1, -1) for r in rows), x + pos], dim=1), **kind)


def images(n=2):
    return torch.randn(n, 3, PATCH * GRID, PATCH * GRID, generator=torch.Generator().manual_seed(7))


def tokens(n=2):
    return torch.randn(n, 5, W, generator=torch.Generator().manual_seed(8))


def saved(folder, obj, name="weights.pth"):
    torch.save(obj, folder / name)
    return folder / name


def write_safetensors(path, state):
    """The format written out by hand, as its specification has it."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        raw = value.flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def renamed(state, pairs):
    """Regular expressions applied in order to every key."""
    for old, new in pairs:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def split_qkv(state):
    """The fused matrix as three, the last dotted name before weight or bias being q, k or v."""
    out = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            out.update({key.replace("qkv", letter): part for letter, part in zip("qkv", value.chunk(3))})
        else:
            out[key] = value
    return out


def assert_close(a, b):
    assert a.shape == b.shape
    assert (a - b).norm() <= 1e-4 * b.norm(), f"relative difference {(a - b).norm() / b.norm():.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------

TORCHVISION = [(r"^blocks\.(\d+)\.norm(\d)", r"encoder.layers.encoder_layer_\1.ln_\2"),
               (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
               (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layers.encoder_layer_\1.self_attention.out_proj"),
               (r"^blocks\.(\d+)\.mlp\.fc1", r"encoder.layers.encoder_layer_\1.mlp.0"),
               (r"^blocks\.(\d+)\.mlp\.fc2", r"encoder.layers.encoder_layer_\1.mlp.3"),
               (r"^cls_token", "class_token"), (r"^pos_embed", "encoder.pos_embedding"), (r"^patch_embed\.proj", "conv_proj"),
               (r"^norm\.", "encoder.ln.")]
HUGGINGFACE = [(r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
               (r"\.attn\.q\.", ".attention.attention.query."), (r"\.attn\.k\.", ".attention.attention.key."),
               (r"\.attn\.v\.", ".attention.attention.value."), (r"\.attn\.proj\.", ".attention.output.dense."),
               (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."), (r"^blocks\.", "encoder.layer."),
               (r"^cls_token", "embeddings.cls_token"), (r"^pos_embed", "embeddings.position_embeddings"),
               (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^norm\.", "layernorm.")]
IN_MEMORY = [(r"^encoder\.layer\.", "layers."), (r"attention\.attention\.(q|k|v)\w+", r"attention.\1_proj"),
             (r"attention\.output\.dense", "attention.o_proj"), (r"intermediate\.dense", "mlp.fc1"),
             (r"output\.dense", "mlp.fc2")]
OPENAI_BLOCK = [(r"\.norm(\d)\.", r".ln_\1."), (r"\.attn\.qkv\.", ".attn.in_proj_"), (r"\.attn\.proj\.", ".attn.out_proj."),
                (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj.")]
CLIP = [*OPENAI_BLOCK, (r"^blocks\.", "visual.transformer.resblocks."), (r"^cls_token", "visual.class_embedding"),
        (r"^pos_embed", "visual.positional_embedding"), (r"^patch_embed\.proj", "visual.conv1"),
        (r"^norm_pre\.", "visual.ln_pre."), (r"^norm\.", "visual.ln_post.")]
BERT_BLOCK = [(r"\.attn\.q\.", ".attention.self.query."), (r"\.attn\.k\.", ".attention.self.key."),
              (r"\.attn\.v\.", ".attention.self.value."), (r"\.attn\.proj\.", ".attention.output.dense."),
              (r"\.norm1\.", ".attention.output.LayerNorm."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
              (r"\.mlp\.fc2\.", ".output.dense."), (r"\.norm2\.", ".output.LayerNorm.")]


@pytest.mark.parametrize("kind", [dict(), dict(num_cls=2), dict(layer_scale=True), dict(num_reg=4, layer_scale=True),
                                  dict(num_reg=4, cls_pos=False, layer_scale=True)], ids=str)
def test_vits_in_timms_names_equal_the_plain_formula(tmp_path, kind):
    state = vit_state(**kind)
    trunk = act.load_pretrained(saved(tmp_path, state), num_heads=HEADS)
    assert trunk.config.eps == 1e-6 and not trunk.training
    assert_close(trunk.forward_features(images()), plain_features(state, images()))
    assert_close(trunk.forward_tokens(tokens()), plain_tokens(state, tokens()))


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": {"module." + k: v for k, v in s.items()}},
    lambda s: {**s, "head.weight": torch.ones(2, W), "head.bias": torch.ones(2), "head_dist.weight": torch.ones(2, W),
               "pre_logits.fc.weight": torch.ones(2)},
    lambda s: {"teacher": {**{"module.backbone." + k: v for k, v in s.items()},
                           "module.head.mlp.0.weight": torch.ones(2), "module.head.last_layer.bias": torch.ones(2)},
               "student": {}},
    lambda s: {"teacher": {**{"backbone." + k: v for k, v in s.items()},
                           "dino_head.mlp.0.bias": torch.ones(2), "ibot_head.last_layer.weight_v": torch.ones(1)}},
    lambda s: {"model": {**s, "mask_token": torch.ones(1, 1, 5), "decoder_pos_embed": torch.ones(1, 10, 5),
                         "decoder_pred.bias": torch.ones(5), "decoder_blocks.0.attn.qkv.weight": torch.ones(15, 5)}}],
    ids=["model", "state_dict", "heads", "DINO", "DINOv2", "MAE"])
def test_wrappings_prefixes_and_foreign_heads_are_dropped_by_name(tmp_path, wrap):
    state = vit_state()
    trunk = act.load_pretrained(saved(tmp_path, wrap(state)), num_heads=HEADS)
    assert_close(trunk.forward_features(images()), plain_features(state, images()))


def test_facebooks_registers_have_no_position(tmp_path):
    state = vit_state(num_reg=4, layer_scale=True)
    foreign = renamed(state, [("^reg_token$", "register_tokens")]) | {"mask_token": torch.ones(1, W)}
    trunk = act.load_pretrained(saved(tmp_path, foreign), num_heads=HEADS)
    assert_close(trunk.forward_features(images()), plain_features(state, images()))


@pytest.mark.parametrize("older", [False, True])
def test_torchvisions_names_equal_the_plain_formula(tmp_path, older):
    state = vit_state()
    foreign = renamed(state, TORCHVISION) | {"heads.head.weight": torch.ones(2, W)}
    if older:
        foreign = renamed(foreign, [(r"mlp\.0\.", "mlp.linear_1."), (r"mlp\.3\.", "mlp.linear_2.")])
    trunk = act.load_pretrained(saved(tmp_path, foreign), num_heads=HEADS)
    assert_close(trunk.forward_features(images()), plain_features(state, images()))


@pytest.mark.parametrize("prefix", ["", "vit."])
@pytest.mark.parametrize("in_memory", [False, True])
def test_hugging_face_vits_equal_the_plain_formula(tmp_path, prefix, in_memory):
    state = vit_state()
    foreign = renamed(split_qkv(state), HUGGINGFACE + (IN_MEMORY if in_memory else []))
    foreign = {prefix + k: v for k, v in foreign.items()}
    foreign |= {"classifier.weight": torch.ones(2)} if prefix else {"pooler.dense.bias": torch.ones(W)}
    trunk = act.load_pretrained(write_safetensors(tmp_path / "model.safetensors", foreign), num_heads=HEADS)
    assert trunk.config.eps == 1e-12
    assert_close(trunk.forward_features(images()), plain_features(state, images(), eps=1e-12))


def clip_state():
    """(CLIP's visual tower under timm's names, the whole of its file with the text tower)."""
    state = vit_state(seed=1)
    g = torch.Generator().manual_seed(2)
    state["norm_pre.weight"], state["norm_pre.bias"] = 1 + random_tensor(g, W), random_tensor(g, W)
    del state["patch_embed.proj.bias"]
    foreign = renamed(state, CLIP)
    foreign["visual.class_embedding"] = foreign["visual.class_embedding"].flatten()
    foreign["visual.positional_embedding"] = foreign["visual.positional_embedding"][0]
    foreign |= {"visual.proj": torch.ones(W, 5), "transformer.resblocks.0.ln_1.weight": torch.ones(5),
                "token_embedding.weight": torch.ones(9, 5), "positional_embedding": torch.ones(7, 5),
                "ln_final.weight": torch.ones(5), "text_projection": torch.ones(5, 5), "logit_scale": torch.tensor(1.0)}
    return state, foreign


def module_tree(state):
    """Modules whose state dict is `state`, for a TorchScript archive."""
    root = nn.Identity()
    for key, value in state.items():
        *path, leaf = key.split(".")
        node = root
        for name in path:
            if name not in node._modules:
                node.add_module(name, nn.Identity())
            node = node._modules[name]
        node.register_buffer(leaf, value)
    return root


def test_clips_visual_tower_equals_the_plain_formula(tmp_path):
    state, foreign = clip_state()
    trunk = act.load_pretrained(saved(tmp_path, foreign), num_heads=HEADS)
    assert trunk.config.eps == 1e-5
    assert_close(trunk.forward_features(images()), plain_features(state, images(), eps=1e-5, quick_gelu=True))
    assert_close(trunk.forward_tokens(tokens()), plain_tokens(state, tokens(), eps=1e-5, quick_gelu=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clip_is_read_from_a_torchscript_archive_in_half_precision(tmp_path):
    state, foreign = clip_state()
    half = {key: value.half() for key, value in foreign.items()}
    half |= {"input_resolution": torch.tensor(12), "context_length": torch.tensor(7), "vocab_size": torch.tensor(9)}
    torch.jit.trace(module_tree(half), torch.ones(1)).save(str(tmp_path / "ViT.pt"))
    trunk = act.load_pretrained(tmp_path / "ViT.pt", num_heads=HEADS)
    rounded = {k: v.half().float() for k, v in state.items()}
    assert_close(trunk.forward_features(images()), plain_features(rounded, images(), eps=1e-5, quick_gelu=True))


JAX = [(r"^blocks/(\d+)", r"Transformer/encoderblock_\1"), ("^norm/", "Transformer/encoder_norm/"),
       ("/norm1", "/LayerNorm_0"), ("/norm2", "/LayerNorm_2"), ("/attn", "/MultiHeadDotProductAttention_1"),
       ("_1/q/", "_1/query/"), ("_1/k/", "_1/key/"), ("_1/v/", "_1/value/"), ("_1/proj/", "_1/out/"),
       ("/mlp/fc1", "/MlpBlock_3/Dense_0"), ("/mlp/fc2", "/MlpBlock_3/Dense_1"), ("^cls_token", "cls"),
       ("^pos_embed", "Transformer/posembed_input/pos_embedding"), ("^patch_embed/proj", "embedding")]


def jax_arrays(state, heads=HEADS):
    """AugReg's .npz of a state dict: matrices (in, out), heads apart, images (H, W, in, out)."""
    out, d = {}, W // heads
    for key, value in split_qkv(state).items():
        array, bias = value.numpy(), key.endswith("bias")
        if ".attn." in key and ".proj." not in key:
            array = array.reshape(heads, d) if bias else array.T.reshape(W, heads, d)
        elif key.startswith("blocks") and ".attn.proj.weight" in key:
            array = array.T.reshape(heads, d, W)
        elif "patch_embed" in key and not bias:
            array = array.transpose(2, 3, 1, 0)
        elif array.ndim == 2:
            array = array.T
        key = re.sub("weight$", "scale" if "norm" in key else "kernel", key).replace(".", "/")
        for old, new in JAX:
            key = re.sub(old, new, key)
        out[key] = array
    return out | {"head/kernel": np.ones((W, 2)), "head/bias": np.ones(2), "pre_logits/bias": np.ones(2)}


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_jax_arrays_equal_the_plain_formula_and_tell_their_heads(tmp_path, prefix):
    state = vit_state()
    np.savez(tmp_path / "augreg.npz", **{prefix + k: v for k, v in jax_arrays(state, heads=4).items()})
    trunk = act.load_pretrained(tmp_path / "augreg.npz")
    assert trunk.config.num_heads == 4
    assert_close(trunk.forward_features(images()), plain_features(state, images(), heads=4))


def bert_state(prefix="", gamma=False, positions=512):
    state = {k: v for k, v in vit_state(seed=3).items() if k.startswith("blocks.")}
    foreign = renamed(split_qkv(state), BERT_BLOCK + [(r"^blocks\.", "encoder.layer.")])
    foreign |= {"embeddings.word_embeddings.weight": torch.ones(9, W), "embeddings.LayerNorm.weight": torch.ones(W),
                "embeddings.position_embeddings.weight": torch.ones(positions, W),
                "embeddings.position_ids": torch.arange(positions)[None], "pooler.dense.weight": torch.ones(W, W)}
    foreign = {prefix + k: v for k, v in foreign.items()}
    heads = {"": {}, "bert.": {"cls.predictions.bias": torch.ones(2)}, "roberta.": {"lm_head.dense.weight": torch.ones(2)}}
    foreign |= heads[prefix]
    if gamma:
        foreign = renamed(foreign, [(r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")])
    return state, foreign


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix, gamma, positions, eps", [("", False, 512, 1e-12), ("bert.", True, 512, 1e-12),
                                                           ("roberta.", False, 514, 1e-5), ("", True, 514, 1e-5)])
def test_bert_and_roberta_equal_the_plain_formula(tmp_path, name, prefix, gamma, positions, eps):
    state, foreign = bert_state(prefix, gamma, positions)
    path = tmp_path / name
    write_safetensors(path, foreign) if path.suffix == ".safetensors" else torch.save(foreign, path)
    trunk = act.load_pretrained(path, num_heads=HEADS)
    assert trunk.config.eps == eps
    assert_close(trunk.forward_tokens(tokens()), plain_tokens(state, tokens(), eps=eps, post_norm=True))
    with pytest.raises(ValueError, match="no image side"):
        trunk.forward_features(images())


def test_heads_come_from_config_json_then_the_argument_then_the_width(tmp_path):
    path = saved(tmp_path, vit_state())
    assert act.load_pretrained(path).config.num_heads == 1
    assert act.load_pretrained(path, num_heads=8).config.num_heads == 8
    np.savez(tmp_path / "heads.npz", **jax_arrays(vit_state(), heads=2))
    assert act.load_pretrained(tmp_path / "heads.npz", num_heads=8).config.num_heads == 8
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "layer_norm_eps": 1e-3, "hidden_size": W}))
    trunk = act.load_pretrained(path, num_heads=8)
    assert (trunk.config.num_heads, trunk.config.eps) == (4, 1e-3)
    assert_close(trunk.forward_features(images()), plain_features(vit_state(), images(), heads=4, eps=1e-3))


# ---------------------------------------------------------------------------------------------------------------------
# The weights' own libraries, where they are installed
# ---------------------------------------------------------------------------------------------------------------------

def peer(name):
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library can be there and broken: RuntimeError of a torchvision for another torch
        pytest.skip(f"{name} cannot be imported: {error}")


def randomized(model):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel()**-0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    return model.eval()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2",
                                  "vit_small_patch14_reg4_dinov2"])
def test_timms_vits_agree_at_any_image_size(tmp_path, name):
    timm = peer("timm")
    side = 56 if "14" in name else 64
    model = randomized(timm.create_model(name, pretrained=False, img_size=side, depth=1, num_classes=2, dynamic_img_size=True))
    trunk = act.load_pretrained(saved(tmp_path, model.state_dict()))
    for shape in ((side, side), (2 * side, side)):
        x = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert_close(trunk.forward_features(x), model.forward_features(x).reshape(1, -1, model.embed_dim))


def test_timm_reads_the_same_from_jax_arrays(tmp_path):
    timm = peer("timm")
    np.savez(tmp_path / "w.npz", **{k: v for k, v in jax_arrays(vit_state()).items() if "pre_logits" not in k})
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=12, patch_size=PATCH, embed_dim=W, depth=DEPTH, num_heads=HEADS, num_classes=2).eval()
    model.load_pretrained(str(tmp_path / "w.npz"))
    with torch.no_grad():
        assert_close(act.load_pretrained(tmp_path / "w.npz").forward_features(images()), model.forward_features(images()))


def test_torchvisions_vit_agrees(tmp_path):
    torchvision = peer("torchvision")
    model = randomized(torchvision.models.VisionTransformer(12, PATCH, DEPTH, HEADS, W, 4 * W))
    with torch.no_grad():
        x = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(images())], dim=1)
        trunk = act.load_pretrained(saved(tmp_path, model.state_dict()), num_heads=HEADS)
        assert_close(trunk.forward_features(images()), model.encoder(x))


@pytest.mark.parametrize("family", ["Bert", "Roberta", "ViT"])
def test_transformers_models_agree(tmp_path, family):
    peer(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    transformers = peer("transformers")
    sizes = dict(hidden_size=W, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * W)
    if family == "ViT":
        config = transformers.ViTConfig(image_size=12, patch_size=PATCH, **sizes)
    else:
        eps = 1e-5 if family == "Roberta" else 1e-12
        config = getattr(transformers, family + "Config")(vocab_size=11, layer_norm_eps=eps, **sizes)
    model = randomized(getattr(transformers, family + "Model")(config))
    model.save_pretrained(tmp_path)
    trunk = act.load_pretrained(tmp_path / "model.safetensors", num_heads=1)  # config.json knows better
    with torch.no_grad():
        if family == "ViT":
            assert_close(trunk.forward_features(images()), model(images()).last_hidden_state)
        else:
            ids = torch.tensor([[1, 2, 3, 4]])
            assert_close(trunk.forward_tokens(model.embeddings(ids)), model(ids).last_hidden_state)


def real_file(name):
    folder = os.environ.get("ACT_TEST_WEIGHTS")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"set ACT_TEST_WEIGHTS to a folder that holds {name}")
    return Path(folder) / name


def test_the_real_minilm_equals_transformers():
    path = real_file("minilm-l6/model.safetensors")
    trunk = act.load_pretrained(path)
    assert (trunk.config.width, trunk.config.depth, trunk.config.num_heads, trunk.config.eps) == (384, 6, 12, 1e-12)
    peer("transformers.models.bert.modeling_bert")
    transformers = peer("transformers")
    model = transformers.BertModel(transformers.BertConfig(**json.loads((path.parent / "config.json").read_text()))).eval()
    missing, _ = model.load_state_dict(act.read_tensors(path), strict=False)
    assert all("embeddings" in key for key in missing)
    x = torch.randn(1, 6, 384, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(trunk.forward_tokens(x), model.encoder(x)[0])


def test_the_real_vit_classifies_alike_through_timm():
    path = real_file("vit_tiny_patch4_32_cifar10.pth")
    trunk = act.load_pretrained(path)
    assert (trunk.config.width, trunk.config.depth, trunk.config.num_heads, trunk.config.patch_size) == (192, 12, 3, 4)
    timm = peer("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10, pretrained=False).eval()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(trunk.forward_features(x), model.forward_features(x))


# ---------------------------------------------------------------------------------------------------------------------
# Files: broken, foreign, hostile
# ---------------------------------------------------------------------------------------------------------------------

def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


@pytest.mark.parametrize("obj, words", [
    ([1], ["holds no tensors by name"]), ({}, ["holds no tensors by name"]),
    ({"conv1.weight": torch.ones(1)}, ["no Transformer of a known layout", "conv1.weight"]),
    ({**vit_state(), "blocks.0.attn.q_norm.weight": torch.ones(2)}, ["stray key 'blocks.0.attn.q_norm.weight'"]),
    ({**vit_state(), "fc_norm.weight": torch.ones(2)}, ["stray key 'fc_norm.weight'"]),
    ({**vit_state(num_reg=4), "register_tokens": torch.ones(1, 4, W)}, ["stray key 'register_tokens'", "'reg_token' already"]),
    ({**vit_state(), "blocks.9999999.norm1.weight": torch.ones(W)}, ["stray key 'blocks.9999999.norm1.weight'"]),
    (without(vit_state(), "blocks.1.mlp.fc2.bias"), ["missing key 'blocks.1.mlp.fc2.bias'"]),
    (without(vit_state(), "blocks.0.attn.qkv.weight"), ["blocks.0.attn.qkv.weight"]),
    (without(vit_state(), "pos_embed"), ["pos_embed"]),
    (without(vit_state(), "patch_embed.proj.weight"), ["patch_embed.proj.weight"]),
    (without(vit_state(), "cls_token"), ["missing key 'cls_token'"]),
    ({**vit_state(), "norm.weight": torch.ones(3)}, ["'norm.weight'", "(3,)", f"({W},)"]),
    ({**vit_state(), "blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, ["make no Transformer"]),
    ({**vit_state(), "pos_embed": torch.tensor(1.0)}, ["make no Transformer"]),
    (without(bert_state()[1], "encoder.layer.0.attention.self.key.bias"), ["blocks.0.attn.k.bias"]),
    (without(bert_state()[1], "encoder.layer.0.attention.self.query.bias"), ["blocks.0.attn.k.bias"]),
    ({**bert_state()[1], "encoder.layer.1.attention.self.key.weight": torch.ones(3, 5)}, ["make no Transformer"])])
def test_weights_of_another_family_and_stray_or_missing_tensors_are_named(tmp_path, obj, words):
    path = saved(tmp_path, obj)
    with pytest.raises(ValueError) as error:
        act.load_pretrained(path, num_heads=HEADS)
    assert_one_line(error, path, *words)


@pytest.mark.parametrize("heads", [7, -2])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, heads):
    with pytest.raises(ValueError) as error:
        act.load_pretrained(saved(tmp_path, vit_state()), num_heads=heads)
    assert_one_line(error, "weights.pth", heads, W)


@pytest.mark.parametrize("text, word", [
    ("{", "not a JSON object"), ("[1]", "not a JSON object"), ('{"hidden_act": "relu"}', "relu"), ('{"hidden_size": 768}', "768"),
    ('{"num_attention_heads": "many"}', "make no Transformer")])
def test_a_config_json_that_does_not_fit_is_refused(tmp_path, text, word):
    path = saved(tmp_path, vit_state())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        act.load_pretrained(path)
    assert_one_line(error, tmp_path, word)


@pytest.mark.parametrize("length", [0, 1, 8, 9, 100, 0.5, -1])
@pytest.mark.parametrize("name", ["w.pth", "w.npz", "w.safetensors"])
def test_truncated_files_are_refused(tmp_path, name, length):
    path = tmp_path / name
    if name == "w.pth":
        torch.save(vit_state(), path)
    elif name == "w.npz":
        np.savez(path, **jax_arrays(vit_state()))
    else:
        write_safetensors(path, vit_state())
    data = path.read_bytes()
    path.write_bytes(data[: int(length * len(data)) if isinstance(length, float) else length])
    with pytest.raises(ValueError) as error:
        act.load_pretrained(path)
    assert_one_line(error, path, "corrupt or of another kind")


def test_missing_files_and_unknown_names_are_named(tmp_path):
    for name in (tmp_path / "none.pth", tmp_path, "vit_base_patch"):
        with pytest.raises(ValueError) as error:
            act.load_pretrained(name)
        assert_one_line(error, name, "minilm_l6")
    with pytest.raises(ValueError) as error:
        act.load(tmp_path / "none.pth")
    assert_one_line(error, "none.pth", "no such file")


def test_safetensors_of_every_type_are_read_exactly(tmp_path):
    state = {"a": torch.arange(6.0).view(2, 3), "s": torch.tensor(3), "b": torch.tensor([True, False]), "e": torch.empty(0, 4),
             "h": torch.tensor([1.5], dtype=torch.float16), "bf": torch.tensor([[2.5]], dtype=torch.bfloat16)}
    read = act.read_tensors(write_safetensors(tmp_path / "x.safetensors", state))
    assert list(read) == list(state)
    for name, value in state.items():
        assert read[name].shape == value.shape and torch.equal(read[name], value)


@pytest.mark.parametrize("change", [
    {"data_offsets": [56, 72]}, {"data_offsets": [-16, 0]}, {"data_offsets": [16, 0]}, {"shape": [10**15]}, {"dtype": "F8"},
    {"shape": [8]}, {"shape": [2]}, {"shape": [-2, -2]}, {"shape": [4.0]}, {"shape": None}, {"data_offsets": [0]}], ids=str)
def test_safetensors_headers_are_held_against_the_file(tmp_path, change):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **change}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError) as error:
        act.read_tensors(tmp_path / "x.safetensors")
    assert_one_line(error, "x.safetensors")


def test_files_are_told_by_their_content_not_their_names(tmp_path):
    for path in (saved(tmp_path, vit_state(), "a.safetensors"), write_safetensors(tmp_path / "b.pth", vit_state())):
        assert torch.equal(act.read_tensors(path)["cls_token"], vit_state()["cls_token"])


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
def test_safetensors_header_lengths_are_held_against_the_file(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a": {}}')
    with pytest.raises(ValueError) as error:
        act.read_tensors(tmp_path / "x.safetensors")
    assert_one_line(error, "x.safetensors")


class Hostile:
    """Unpickling one touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "npz"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    path, trace = tmp_path / ("w.npz" if form == "npz" else "w.pth"), tmp_path / "trace"
    if form == "npz":
        np.savez(path, cls=np.array([Hostile(trace)], dtype=object))
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"model": Hostile(trace)}, protocol=2))
    else:
        torch.save({"model": vit_state(), "epoch": Hostile(trace)}, path, _use_new_zipfile_serialization=form == "zip")
    for read in (act.load_pretrained, act.load):
        with pytest.raises(ValueError) as error:
            read(path)
        assert_one_line(error, path, "corrupt or of another kind")
    assert not trace.exists()


class SetsState(nn.Module):
    """A scripted module of this class runs code as its archive is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.training = True

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.weight, self.training = state[0], state[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_that_runs_code_on_loading_is_refused(tmp_path):
    torch.jit.script(SetsState()).save(str(tmp_path / "w.pt"))
    with pytest.raises(ValueError) as error:
        act.read_tensors(tmp_path / "w.pt")
    assert_one_line(error, "w.pt", "code that runs on loading")


@pytest.mark.parametrize("spelling", ["numpy._core", "numpy.core"])
@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_in_the_metrics_are_admitted_in_old_and_new_spelling(tmp_path, spelling, zipped):
    metrics = {"acc": np.float64(93.2), "f": np.float32(1.5), "n": np.int64(3), "b": np.bool_(True), "a": np.arange(3.0)}
    path = saved(tmp_path, {"base_model": vit_state(), "metrics": metrics})
    written = np.float64.__reduce__(np.float64(0))[0].__module__.encode()  # the spelling of the numpy that is installed
    if zipped:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        assert any(b"c" + written + b"\n" in data for data in members.values())
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data.replace(b"c" + written + b"\n", f"c{spelling}.multiarray\n".encode()))
    else:
        torch.save({"base_model": vit_state(), "metrics": metrics}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"c" + written + b"\n", f"c{spelling}.multiarray\n".encode()))
    torch.serialization.add_safe_globals([Hostile])  # somebody else's choice, which stays
    trunk = act.load_pretrained(path, num_heads=HEADS)
    admitted = torch.serialization.get_safe_globals()
    assert Hostile in admitted and not any(name in admitted for name in act._NUMPY_NAMES)
    torch.serialization.clear_safe_globals()
    assert_close(trunk.forward_features(images()), plain_features(vit_state(), images()))


# ---------------------------------------------------------------------------------------------------------------------
# Names and downloads
# ---------------------------------------------------------------------------------------------------------------------

def test_every_name_has_an_address_and_a_file_of_its_own():
    names = act.pretrained_names()
    assert {"vit_base_patch16_384", "deit_tiny_patch16_224", "dino_vitb16", "dinov2_vits14", "mae_vit_base", "clip_vit_b16",
            "bert_base", "roberta_base", "minilm_l6"} <= set(names)
    assert len(set(names.values())) == len(names)
    assert all(re.fullmatch(r"https://[^ {}]+\.(npz|pth|pt|safetensors)", url) for url in names.values())
    names.clear()
    assert act.pretrained_names()  # a copy


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for one body, with torch.hub's cache in tmp_path / "hub"; .publish(name, file) gives a name its address."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(socket.getdefaulttimeout())
            self.send_response(200)
            self.send_header("Content-Length", str(self.server.claimed))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.cache = [], tmp_path / "hub" / "checkpoints"
        server.body = saved(tmp_path, vit_state()).read_bytes()
        server.claimed, server.digest = len(server.body), hashlib.sha256(server.body).hexdigest()
        address = f"http://127.0.0.1:{server.server_port}/"
        server.publish = lambda name, file: monkeypatch.setitem(act._PUBLISHED, name, address + file)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def cached(server):
    return sorted(path.name for path in server.cache.iterdir())


@pytest.mark.parametrize("name, file", [("deit_tiny_patch16_224", "deit-{digest:.8}.pth"), ("clip_vit_b16", "{digest}/ViT.pt"),
                                        ("dino_vits16", "dino.pth"), ("bert_base", "bert/model.safetensors")])
def test_a_name_is_downloaded_once_with_a_time_out_that_is_put_back(server, name, file):
    server.publish(name, file.format(digest=server.digest))
    before = socket.getdefaulttimeout()
    for _ in range(2):
        trunk = act.load_pretrained(name, num_heads=HEADS)
        assert_close(trunk.forward_features(images()), plain_features(vit_state(), images()))
    assert server.requests == [10] and socket.getdefaulttimeout() == before
    assert cached(server) == [f"{name}.safetensors" if name == "bert_base" else file.format(digest=server.digest).split("/")[-1]]


@pytest.mark.parametrize("file", ["deit-00000000.pth", "0" * 64 + "/ViT.pt"])
def test_a_download_with_a_wrong_hash_leaves_no_file(server, file):
    server.publish("deit_tiny_patch16_224", file)
    before = socket.getdefaulttimeout()
    with pytest.raises(ValueError) as error:
        act.load_pretrained("deit_tiny_patch16_224")
    assert_one_line(error, "deit_tiny_patch16_224", server.cache / file.split("/")[-1], "hash", server.digest)
    assert cached(server) == [] and socket.getdefaulttimeout() == before


def test_a_download_cut_short_leaves_no_file(server):
    server.publish("dino_vits16", "dino.pth")
    server.body = server.body[:1000]
    with pytest.raises(ValueError) as error:
        act.load_pretrained("dino_vits16")
    assert_one_line(error, "dino_vits16", server.cache / "dino.pth")
    assert cached(server) == []


def test_without_a_network_the_error_says_where_the_file_would_be(server, monkeypatch):
    monkeypatch.setitem(act._PUBLISHED, "dino_vits16", "http://127.0.0.1:9/dino.pth")  # nobody listens there
    with pytest.raises(ValueError) as error:
        act.load_pretrained("dino_vits16")
    assert_one_line(error, "dino_vits16", server.cache / "dino.pth", "http://127.0.0.1:9/dino.pth")
    assert cached(server) == []


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

ENCODER = dict(num_group=8, group_size=8, width=W, depth=3, num_heads=HEADS, encoder_dims=W)
SMALL_SIZES = dict(num_group=8, group_size=8, num_heads=HEADS)  # what no tensor tells


def trunk_config(kind):
    return act.TrunkConfig(width=W, depth=DEPTH, num_heads=HEADS, mlp_hidden=4 * W, **{
        "vit": dict(), "dinov2": dict(layer_scale=True), "clip": dict(eps=1e-5, quick_gelu=True, norm_pre=True),
        "bert": dict(eps=1e-12, norm_first=False, final_norm=False)}[kind])


def scrambled(model):
    """Random parameters and BatchNorm statistics, in eval mode: no two alike, nothing at its initial value."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                spread = len(value[0])**-0.5 if value.ndim == 2 else 0.3
                value.copy_(torch.randn(value.shape, generator=g) * spread + (value.ndim == 1))
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
    return model.eval()


def build(kind, **options):
    if kind == "Teacher":
        trunk = trunk_config(options.pop("trunk", "vit"))
        return scrambled(act.Teacher(act.TeacherConfig(
            num_group=8, group_size=8, encoder_dims=24, tokens_dims=20, decoder_dims=28, num_tokens=32, num_prompt=3, trunk=trunk,
            **options)))
    cls, config = {"Student": (act.Student, act.StudentConfig), "Classifier": (act.Classifier, act.ClassifierConfig),
                   "Segmenter": (act.Segmenter, act.SegmenterConfig)}[kind]
    return scrambled(cls(config(**{**ENCODER, **options})))


def random_clouds(n=2):
    return torch.rand(n, 64, 3, generator=torch.Generator().manual_seed(5)) * 2 - 1


def outputs(model):
    """Everything a model computes of fixed random_clouds."""
    with torch.no_grad():
        if isinstance(model, act.Teacher):
            patches = act.group_points(random_clouds(), 8, 8)
            return [*model(random_clouds(), hard=True), model.features(*patches), model.tokenize(*patches)]
        if isinstance(model, act.Student):
            mask = torch.arange(8)[None].repeat(2, 1) % 4 > 0
            return [model.encode(random_clouds()), model(*act.group_points(random_clouds(), 8, 8), mask)]
        if isinstance(model, act.Segmenter):
            return [model(random_clouds(), torch.tensor([1, 3]) if model.config.num_categories else None)]
        return [model(random_clouds())]


def assert_same(a, b):
    assert type(a) is type(b) and not b.training
    for x, y in zip(outputs(a), outputs(b), strict=True):
        assert torch.equal(x, y)


STUDENT = [(r"^encoder\.blocks\.", "encoder.blocks.blocks."), (r"^encoder\.patch_embed\.", "encoder.encoder.")]
SEGMENTER = [(r"^head\.0\.", "convs1_cls."), (r"^head\.1\.", "bns1_cls."), (r"^head\.4\.", "convs2_cls."),
             (r"^head\.5\.", "bns2_cls."), (r"^head\.7\.", "convs3_cls."), (r"^label_conv\.", "label_conv_cls."),
             (r"^propagation\.", "propagation_0_cls."),
             (r"_0_cls\.0\.", "_0_cls.mlp_convs.0."), (r"_0_cls\.1\.", "_0_cls.mlp_bns.0."),
             (r"_0_cls\.3\.", "_0_cls.mlp_convs.1."), (r"_0_cls\.4\.", "_0_cls.mlp_bns.1.")]


def release_names(model):
    """Our state dict under the names of the public release, convolutions with their kernel of size 1."""
    state = model.state_dict()
    if isinstance(model, act.Teacher):
        trunk = {key: value for key, value in state.items() if key.startswith("trunk.")}
        state = {key: value for key, value in state.items() if key not in trunk}
        c = model.config.trunk
        if not c.final_norm:
            pairs = BERT_BLOCK + [(r"^trunk\.blocks\.", "visual_embed.0.layer.")]
        elif c.norm_pre:
            pairs = OPENAI_BLOCK + [(r"^trunk\.norm_pre", "visual_embed.0"), (r"^trunk\.blocks", "visual_embed.1"),
                                    (r"^trunk\.norm", "visual_embed.2")]
        else:
            pairs = [(r"^trunk\.blocks", "visual_embed.0"), (r"^trunk\.norm", "visual_embed.1")]
        state |= renamed(trunk if c.final_norm else split_qkv(trunk), pairs)
    elif isinstance(model, act.Student):
        state = renamed(state, STUDENT + [(r"^(en|de)coder\.", r"ACT_\1coder."), (r"^head\.", "proj_head.")])
    elif isinstance(model, act.Classifier):
        state = renamed(state, STUDENT + [(r"^encoder\.", ""), (r"^head\.", "cls_head_finetune.")])
    else:
        state = renamed(state, STUDENT + [(r"^encoder\.", "")] + SEGMENTER)
    flat = r"dgcnn_\d\.layer[1-4]\.0\.weight"  # (out, in, 1, 1); the following (out, in, 1)
    line = r".*_conv\.[036]\.weight|dgcnn_\d\.(input_trans|layer5\.0)\.weight|label_conv.*\.0\.weight|.*convs.*\.weight"
    return {key: value[..., None, None] if re.fullmatch(flat, key) else value[..., None] if re.fullmatch(line, key) else value
            for key, value in state.items()}


def released(folder, state, key="base_model", prefix="module."):
    return saved(folder, {key: {prefix + k: v for k, v in state.items()}, "epoch": 3, "metrics": {"acc": np.float64(93.2)}})


@pytest.mark.parametrize("kind, options", [
    ("Teacher", {"prompt": "shallow", "trunk": "clip"}), ("Student", {"target_dim": 20}), ("Student", {"encoder_dims": 24}),
    ("Classifier", {"num_classes": 5}), ("Segmenter", {"num_parts": 6, "num_categories": 4})])
def test_our_checkpoints_round_trip(tmp_path, kind, options):
    model = build(kind, **options)
    act.save({"kind": kind, "config": asdict(model.config), "model": model.state_dict(), "step": 3}, tmp_path / "last.pt")
    assert_same(model, act.load(tmp_path / "last.pt"))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("trunk, prompt", [("vit", "deep"), ("vit", "none"), ("dinov2", "shallow"), ("clip", "deep"),
                                           ("clip", "shallow"), ("bert", "deep")])
def test_teachers_of_the_release_are_read(tmp_path, trunk, prompt):
    model = build("Teacher", trunk=trunk, prompt=prompt)
    if prompt == "none":
        model.config.num_prompt = 0
    loaded = act.load(released(tmp_path, release_names(model)), num_group=8, num_heads=HEADS)
    assert_same(model, loaded)
    assert asdict(loaded.config) == asdict(model.config) | {"weights": "weights.pth"}


def test_a_tokenizer_alone_in_a_file_is_a_teacher(tmp_path):
    model = build("Teacher")
    state = {"dvae_tokenizer." + k: v for k, v in release_names(model).items()}
    assert_same(model, act.load(str(released(tmp_path, state, prefix="")), num_group=8, num_heads=HEADS))


@pytest.mark.parametrize("encoder_dims", [W, 24])
@pytest.mark.parametrize("head", ["proj_head.", "proj_head.0."])
def test_students_of_the_release_are_read_without_their_teacher_and_unused_heads(tmp_path, encoder_dims, head):
    model = build("Student", encoder_dims=encoder_dims, target_dim=20)
    state = renamed(release_names(model), [(r"^proj_head\.", head)])
    if head == "proj_head.0.":
        state["proj_head.0.weight"] = state["proj_head.0.weight"][..., None]
    state |= {"ACT_encoder.lm_head.weight": torch.ones(2), "ACT_encoder.cls_head.0.bias": torch.ones(2),
              "dvae_tokenizer.codebook": torch.ones(4, 4), "dvae_tokenizer.encoder.first_conv.0.weight": torch.ones(1)}
    assert_same(model, act.load(released(tmp_path, state), **SMALL_SIZES))


@pytest.mark.parametrize("head", ["mlp3", "linear"])
def test_classifiers_of_the_release_are_read(tmp_path, head):
    model = build("Classifier", num_classes=5, head=head)
    path = released(tmp_path, release_names(model))
    assert_same(model, act.load(path, **SMALL_SIZES))
    assert (act.load(path).config.num_group, act.load(path).config.group_size) == (128, 32)


@pytest.mark.parametrize("suffix", ["_cls", ""])
@pytest.mark.parametrize("categories", [16, 0])
def test_segmenters_of_the_release_are_read_in_newer_and_older_names(tmp_path, suffix, categories):
    model = build("Segmenter", num_parts=6, num_categories=categories)
    state = renamed(release_names(model), [] if suffix else [(r"_cls\.", ".")])
    assert_same(model, act.load(released(tmp_path, state, key="model_state_dict"), **SMALL_SIZES))


def test_a_point_mae_student_has_a_fresh_class_token_and_tells(tmp_path):
    model = build("Student", target_dim=3 * 8)
    state = renamed({k: v for k, v in release_names(model).items() if ".cls_" not in k},
                    [("^ACT_", "MAE_"), (r"^proj_head\.", "increase_dim.0.")])
    state["increase_dim.0.weight"] = state["increase_dim.0.weight"][..., None]
    path = released(tmp_path, state)
    with pytest.warns(UserWarning, match="no class token"):
        loaded = act.load(path, num_group=8, num_heads=HEADS)
    assert loaded.config.group_size == 8  # told by its head
    for student in (model, loaded):  # compared without the token
        student.encoder.cls_token = student.encoder.cls_pos = None
    patches, mask = act.group_points(random_clouds(), 8, 8), torch.arange(8)[None].repeat(2, 1) % 4 > 0
    with torch.no_grad():
        assert torch.equal(loaded.encoder(*patches, mask), model.encoder(*patches, mask))
        assert_close(loaded.encoder(*patches), model.encoder(*patches))


def test_export_writes_the_releases_names_and_is_read_back(tmp_path):
    model = build("Student", encoder_dims=24, target_dim=20)
    act.export(model, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert set(written) == {"base_model", "epoch", "metrics", "best_metrics"}
    wanted = release_names(model)
    assert written["base_model"].keys() == wanted.keys()
    assert all(torch.equal(written["base_model"][k], wanted[k]) for k in wanted)
    assert {"ACT_encoder.encoder.first_conv.0.weight", "ACT_encoder.cls_pos", "ACT_encoder.blocks.blocks.2.attn.qkv.weight",
            "ACT_encoder.reduce_dim.bias", "ACT_decoder.blocks.1.mlp.fc2.bias", "ACT_decoder.norm.weight", "mask_token",
            "decoder_pos_embed.2.weight", "proj_head.bias"} <= wanted.keys()
    assert written["base_model"]["ACT_encoder.encoder.first_conv.0.weight"].shape == (128, 3, 1)
    assert_same(model, act.load(tmp_path / "out.pth", **SMALL_SIZES))


def checkpoint_errors():
    student, teacher = release_names(build("Student")), release_names(build("Teacher"))
    classifier = release_names(build("Classifier"))
    return [({"a.b": torch.ones(2)}, {}, ["holds no Student", "a.b"]),
            ({**classifier, "side_alpha": torch.ones(1)}, {}, ["stray key 'side_alpha'"]),
            (without(classifier, "cls_token"), {}, ["missing key 'encoder.cls_token'"]),
            (without(student, "mask_token"), {}, ["missing key 'mask_token'"]),
            (without(student, "proj_head.weight"), {}, ["head.weight"]),
            ({**student, "norm.weight": torch.ones(2)}, {}, ["stray key 'norm.weight'"]),
            ({**student, "ACT_encoder.norm.bias": torch.ones(2)}, {}, ["'encoder.norm.bias'", "(2,)", f"({W},)"]),
            (student, {"depth": 5}, ["missing key 'encoder.blocks.3"]), (student, {"num_heads": 5}, ["the 5 heads", str(W)]),
            (student, {"num_points": 3}, ["'num_points'", "num_group"]), (teacher, {"prompt": "loud"}, ["loud"]),
            (without(teacher, "decoder.mlp.4.weight"), {}, ["decoder.mlp.4.weight"]),
            ({k: v for k, v in teacher.items() if "visual_embed" not in k}, {}, ["make no Teacher"]),
            ({**teacher, "codebook": torch.tensor(1.0)}, {}, ["make no Teacher"])]


def test_checkpoints_that_do_not_fit_are_named_with_what_is_wrong(tmp_path):
    for state, sizes, words in checkpoint_errors():
        path = released(tmp_path, state)
        with pytest.raises(ValueError) as error:
            act.load(path, **sizes)
        assert_one_line(error, path, *words)


@pytest.mark.parametrize("obj", [
    [1], {"kind": ["x"], "config": {}, "model": {"a": torch.ones(1)}},
    {"kind": "Student", "config": {"foo": 1}, "model": {"a": torch.ones(1)}},
    {"kind": "Student", "config": {"depth": "many"}, "model": {"a": torch.ones(1)}}, {"kind": "Student", "config": {}},
    {"kind": "Classifier", "config": asdict(act.ClassifierConfig(**ENCODER)), "model": {"a": torch.ones(1)}}], ids=str)
def test_damaged_checkpoints_of_ours_are_refused(tmp_path, obj):
    path = saved(tmp_path, obj)
    with pytest.raises(ValueError) as error:
        act.load(path)
    assert_one_line(error, path)


# =====================================================================================================================
# clouds
# =====================================================================================================================

XYZ = np.random.default_rng(0).normal(size=(20, 3)).round(4)


# ---- reading one cloud

def npy_bytes(array, **options):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def npz_bytes(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def text_bytes(rows, separator=" "):
    return "\n".join(separator.join(repr(float(value)) for value in row) for row in rows).encode() + b"\n"


def ply_bytes(xyz, form="ascii", kind="double", faces=()):
    head = ["ply", f"format {form} 1.0", "comment a test", "element camera 1", "property list uchar int views",
            f"element vertex {len(xyz)}", "property uchar red", f"property {kind} z", f"property {kind} x", f"property {kind} y"]
    if len(faces):
        head += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    head = "\n".join([*head, "end_header", ""]).encode()
    if form == "ascii":
        rows = ["2 7 8"] + [f"9 {z!r} {x!r} {y!r}" for x, y, z in xyz.tolist()]
        return head + "\n".join(rows + [" ".join(map(str, [len(face), *face])) for face in faces]).encode() + b"\n"
    order, code = "<" if "little" in form else ">", "d" if kind == "double" else "f"
    body = struct.pack(order + "Bii", 2, 7, 8) + b"".join(struct.pack(order + "B3" + code, 9, z, x, y) for x, y, z in xyz)
    return head + body + b"".join(struct.pack(f"{order}B{len(face)}i", len(face), *face) for face in faces)


def h5_bytes(**arrays):
    h5py = pytest.importorskip("h5py")
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return stream.getvalue()


def written(folder, name, data):
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())
    return path


EXTRA = np.hstack([XYZ, XYZ * 0 + 7])
GOOD_FILES = {
    "plain.npy": lambda: npy_bytes(XYZ), "version2.npy": lambda: npy_bytes(XYZ, version=(2, 0)),
    "fortran.npy": lambda: npy_bytes(np.asfortranarray(XYZ)), "big.npy": lambda: npy_bytes(XYZ.astype(">f8")),
    "extra.npy": lambda: npy_bytes(EXTRA), "points.npz": lambda: npz_bytes(other=np.zeros(3), points=XYZ),
    "single.npz": lambda: npz_bytes(anything=EXTRA), "ascii.ply": lambda: ply_bytes(XYZ),
    "little.ply": lambda: ply_bytes(XYZ, "binary_little_endian"), "big.ply": lambda: ply_bytes(XYZ, "binary_big_endian"),
    "dos.ply": lambda: ply_bytes(XYZ).replace(b"\n", b"\r\n"), "blanks.xyz": lambda: text_bytes(XYZ),
    "commas.txt": lambda: text_bytes(EXTRA, ", "), "header.txt": lambda: b"x y z\n" + text_bytes(XYZ),
    "comment.txt": lambda: b"//X,Y,Z\n# made by hand\n\n" + text_bytes(XYZ, ","), "tabs.xyz": lambda: text_bytes(XYZ, "\t"),
    "dos.xyz": lambda: text_bytes(XYZ).replace(b"\n", b"\r\n"), "mac.xyz": lambda: text_bytes(XYZ).replace(b"\n", b"\r"),
    "mark.xyz": lambda: b"\xef\xbb\xbf" + text_bytes(XYZ), "labels.txt": lambda: text_bytes(XYZ).replace(b"\n", b" chair\n"),
    "ragged.txt": lambda: text_bytes(EXTRA[:9]) + text_bytes(XYZ[9:]), "counted.pts": lambda: b"20\n" + text_bytes(XYZ),
    "plain.pts": lambda: text_bytes(EXTRA), "points.off": lambda: b"OFF\n20 0 0\n" + text_bytes(XYZ),
    "points.obj": lambda: b"# made by hand\nmtllib a.mtl\nv " + text_bytes(XYZ)[:-1].replace(b"\n", b"\nvn 0 0 1\nv ") + b"\n",
    "data.h5": lambda: h5_bytes(data=EXTRA, label=np.zeros(20)),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_every_form_of_file_gives_the_points_written_to_it(tmp_path, name):
    points = act.read_points(written(tmp_path, name, GOOD_FILES[name]()))
    assert points.dtype == np.float64 and points.shape == XYZ.shape
    np.testing.assert_array_equal(points, XYZ)


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "i2", "u1", "i8", "b1"])
def test_numbers_of_every_type_become_float64(tmp_path, dtype):
    values = (np.arange(12).reshape(4, 3) % 5).astype(dtype)
    points = act.read_points(written(tmp_path, "a.npy", npy_bytes(values)))
    np.testing.assert_array_equal(points, values.astype(np.float64))


SQUARE = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (5, 5, 5)]  # the last belongs to no face
MESHES = {
    "square.off": "OFF\n# two triangles\n5 2 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n\n5 5 5\n3 0 1 2 255 0 0\n3 0 2 3\n",
    "glued.off": "OFF5 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n5 5 5\n4 0 1 2 3\n",
    "colours.off": "COFF\n5 1 0\n0 0 0 1 1 1 1\n1 0 0 1 1 1 1\n1 1 0 1 1 1 1\n0 1 0 1 1 1 1\n5 5 5 1 1 1 1\n4 0 1 2 3\n",
    "slashes.obj": "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 5 5 5\nvt 0 0\nvn 0 0 1\nf 1/1/1 2//1 3/1 4\n",
    "negative.obj": "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf -4 -3 -2\nv 5 5 5\nf -5 -3 -2\n",
    "ascii.ply": ply_bytes(np.array(SQUARE, float), faces=[(0, 1, 2), (0, 2, 3)]),
    "big.ply": ply_bytes(np.array(SQUARE, float), "binary_big_endian", "float", [(0, 1, 2, 3), (0, 1, 2)]),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_sampled_on_their_faces(tmp_path, name):
    points = act.read_points(written(tmp_path, name, MESHES[name]))
    assert points.shape == (act.MESH_POINTS, 3)
    assert (points[:, 2] == 0).all() and points.min() >= 0 and points.max() <= 1
    np.testing.assert_array_equal(points, act.read_points(os.path.join(tmp_path, name)))


def test_mesh_samples_follow_the_area_and_the_seed():
    vertices = np.array([(0, 0, 0), (3, 0, 0), (3, 1, 0), (0, 1, 0), (0, 0, 5), (1, 0, 5), (0, 2, 5)], float)
    faces = [(0, 1, 2, 3), (4, 5, 6)]  # areas 3 and 1
    points = act.sample_mesh(vertices, faces, 8000, seed=1)
    assert abs((points[:, 2] == 0).mean() - 0.75) < 0.02
    flat = points[points[:, 2] == 0]
    np.testing.assert_allclose(flat.mean(0), [1.5, 0.5, 0], atol=0.05)  # uniform on the rectangle
    np.testing.assert_allclose(flat.std(0), [3 / 12 ** 0.5, 1 / 12 ** 0.5, 0], atol=0.03)
    assert (points == act.sample_mesh(vertices, faces, 8000, seed=1)).all()
    assert (points != act.sample_mesh(vertices, faces, 8000, seed=2)).any()
    with pytest.raises(ValueError, match="no area"):
        act.sample_mesh(vertices, [(0, 0, 1)], 10)


@pytest.mark.parametrize("form", ["npy", "xyz", "ply"])
def test_geographic_offsets_keep_their_precision(tmp_path, form):
    small = np.random.default_rng(1).normal(size=(50, 3))
    data = {"npy": npy_bytes, "xyz": text_bytes, "ply": ply_bytes}[form](small + [1e6, -4e6, 2e6])
    np.testing.assert_allclose(act.read_cloud(written(tmp_path, f"a.{form}", data)), act.normalize(small), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(2, 40), st.sampled_from([1e-200, 1e-3, 1, 1e3, 1e200]))
def test_normalized_clouds_fill_the_unit_sphere_whatever_their_unit(seed, n, unit):
    points = np.random.default_rng(seed).normal(size=(n, 3)) + 1
    cloud = act.normalize(points * unit)
    assert cloud.dtype == np.float32 and np.abs(cloud.mean(0)).max() < 1e-6
    assert abs(np.linalg.norm(cloud, axis=1).max() - 1) < 1e-6
    np.testing.assert_allclose(cloud, act.normalize(points), atol=1e-6)


def test_identical_points_cannot_be_normalized():
    with pytest.raises(ValueError, match="two different points, found 5 at one place"):
        act.normalize(np.full((5, 3), 0.1))
    with pytest.raises(ValueError, match="found 0 at"):
        act.normalize(np.empty((0, 3)))


def test_write_ply_reads_back(tmp_path):
    act.write_ply(tmp_path / "a.ply", torch.from_numpy(XYZ), np.full((20, 3), 200, np.uint8))
    act.write_ply(tmp_path / "b.ply", XYZ.astype(np.float32))
    for name in ("a.ply", "b.ply"):
        np.testing.assert_array_equal(act.read_points(tmp_path / name), XYZ.astype(np.float32))
    assert sorted(os.listdir(tmp_path)) == ["a.ply", "b.ply"]
    assert (tmp_path / "a.ply").stat().st_size - (tmp_path / "b.ply").stat().st_size == 60 + len("property uchar red\n") * 3 + 3


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    written(tmp_path, "a.bin", b"earlier")
    with pytest.raises(KeyboardInterrupt):
        with act.whole_file(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"earlier"


def test_half_a_million_points_are_read_within_seconds(tmp_path):
    xyz = np.random.default_rng(0).normal(size=(500_000, 3)).astype(np.float32)
    body = b"%.6f %.6f %.6f\n" * len(xyz) % tuple(xyz.reshape(-1).tolist())
    head = b"ply\nformat ascii 1.0\nelement vertex 500000\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    for name, data in {"a.xyz": body, "a.ply": head + body, "a.npy": npy_bytes(xyz)}.items():
        path, begin = written(tmp_path, name, data), time.perf_counter()
        points = act.read_points(path)
        assert time.perf_counter() - begin < 3
        np.testing.assert_allclose(points, xyz, atol=1e-6)


# ---- broken files

def raw_npy(header):
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


class Bomb:
    def __reduce__(self):
        return os.system, ("touch act_was_here",)


OBJECTS = npy_bytes(np.array([Bomb()] * 3, object), allow_pickle=True)
OBJECTS_FOUND = "expected an array of numbers, found type '|O'; Python objects are never loaded"
PLY_HEAD = "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
NAN = np.array([(0, 0, 0), (1, np.nan, 0), (np.inf, 0, 0)])
ONE_PLACE = "expected at least two different points, found {} at one place"
EXTENSIONS = ".npy .npz .ply .off .obj .xyz .txt .pts .h5"


def stored_zip(name, data):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def packed_size(data):
    return zipfile.ZipFile(io.BytesIO(data)).infolist()[0].compress_size


BOMB = stored_zip("points.npy", bytes(2 ** 26 + 1))
BROKEN_FILES = [  # (file, what it holds, the message behind its path)
    ("scan.xyz", "1 2 3\n4 5 6\na b\n7 8 9\n", ", line 3: expected 3 numbers, found 'a b'"),
    ("short.xyz", "# two\n1 2 3\n\n4 5\n", ", line 4: expected 3 numbers, found '4 5'"),
    ("comma.txt", "1,2,3\n4,x,6\n", ", line 2: expected 3 numbers, found '4 x 6'"),
    ("utf16.txt", "1 2\n".encode("utf-16"), ", line 1: expected 3 numbers, found '\ufffd\ufffd1\\x00 \\x002\\x00'"),
    ("empty.xyz", "", ": " + ONE_PLACE.format(0)),
    ("one.xyz", "1 2 3\n", ": " + ONE_PLACE.format(1)),
    ("same.xyz", "1 2 3\n1 2 3\n", ": " + ONE_PLACE.format(2)),
    ("nan.xyz", "1 2 3\nnan 2 3\n4 5 1e999\n", ": 2 of 3 points are NaN or infinite"),
    ("count.pts", "3\n1 2 3\n4 5 6\n", ": the first line promises 3 points, the file holds 2"),
    ("nan.npy", npy_bytes(NAN), ": 2 of 3 points are NaN or infinite"),
    ("zero.npy", npy_bytes(np.empty((0, 3))), ": " + ONE_PLACE.format(0)),
    ("flat.npy", npy_bytes(np.zeros(6)), ": expected an array of shape (n, 3), up to 64 columns, found (6,)"),
    ("two.npy", npy_bytes(np.zeros((6, 2))), ": expected an array of shape (n, 3), up to 64 columns, found (6, 2)"),
    ("turned.npy", npy_bytes(np.zeros((3, 100))), ": expected an array of shape (n, 3), up to 64 columns, found (3, 100)"),
    ("cut.npy", npy_bytes(XYZ)[:-8], ": the header promises 480 bytes of points, the file holds 472"),
    ("huge.npy", raw_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 3), }"),
     ": the header promises 24000000000000 bytes of points, the file holds 0"),
    ("text.npy", "1 2 3\n4 5 6\n", ": not a .npy array"),
    ("pickle.npy", pickle.dumps(Bomb()), ": not a .npy array"),
    ("objects.npy", OBJECTS, ": " + OBJECTS_FOUND),
    ("words.npy", npy_bytes(np.array([["a", "b", "c"]])),
     ": expected an array of numbers, found type '<U1'; Python objects are never loaded"),
    ("code.npy", raw_npy("__import__('os').system('touch act_was_here')"),
     ": expected an array of numbers, found type unknown; Python objects are never loaded"),
    ("objects.npz", stored_zip("points.npy", OBJECTS), ": " + OBJECTS_FOUND),
    ("no_zip.npz", "1 2 3\n", ": broken .npz file (File is not a zip file)"),
    ("two.npz", npz_bytes(a=XYZ, b=XYZ), ": expected an array named points, xyz, data, pos, found a, b"),
    ("none.npz", stored_zip("readme.md", b"no arrays"), ": expected an array named points, xyz, data, pos, found none"),
    ("bomb.npz", BOMB, f": array points claims 67108865 bytes, packed into {packed_size(BOMB)}"),
    ("sets.h5", lambda: h5_bytes(data=np.zeros((2, 5, 3))),
     ": expected an array of shape (n, 3), up to 64 columns, found (2, 5, 3)"),
    ("none.h5", lambda: h5_bytes(label=np.array([b"a"])), ": expected an array named points, xyz, data, pos, found none"),
    ("text.ply", "1 2 3\n4 5 6\n", ": expected a PLY header, from 'ply' to 'end_header'"),
    ("open.ply", PLY_HEAD + "0 0 0\n1 1 1\n", ": expected a PLY header, from 'ply' to 'end_header'"),
    ("form.ply", PLY_HEAD.replace("ascii", "middle_endian") + "end_header\n",
     ", line 2: not a line of a PLY header: 'format middle_endian 1.0'"),
    ("type.ply", PLY_HEAD + "property quad q\nend_header\n", ", line 7: not a line of a PLY header: 'property quad q'"),
    ("bare.ply", PLY_HEAD + "property list uchar int\nend_header\n",
     ", line 7: not a line of a PLY header: 'property list uchar int'"),
    ("orphan.ply", "ply\nformat ascii 1.0\nproperty float x\nend_header\n",
     ", line 3: not a line of a PLY header: 'property float x'"),
    ("no_z.ply", PLY_HEAD.replace("float z", "float w") + "end_header\n0 0 0\n1 1 1\n",
     ": expected a vertex with x, y and z, found x, y, w"),
    ("cut.ply", PLY_HEAD + "end_header\n0 0 0\n1 1\n",
     ": promises 2 rows of 'vertex', the file ends before that or its lists are broken"),
    ("huge.ply", PLY_HEAD.replace("ascii", "binary_little_endian").replace("vertex 2", "vertex 1000000000000") + "end_header\n",
     ": promises 1000000000000 rows of 'vertex', the file ends before that or its lists are broken"),
    ("word.ply", PLY_HEAD + "end_header\n0 0 0\n1 one 1\n", ", line 9: expected 3 numbers, found '1 one 1'"),
    ("face.ply", ply_bytes(XYZ, faces=[(0, 1, 20)]), ": the faces name vertices 0 to 20 (from 0), the mesh has 20"),
    ("no_word.off", "4 0 0\n0 0 0\n", ": expected OFF and the counts of vertices and faces at the start of the file"),
    ("no_counts.off", "OFF\n# nothing\n", ": expected OFF and the counts of vertices and faces at the start of the file"),
    ("counts.off", "OFF\nfour 0 0\n", ", line 2: expected 2 numbers, found 'four 0 0'"),
    ("cut.off", "OFF\n4 2 0\n0 0 0\n1 0 0\n", ": promises 4 vertices and 2 faces, 2 lines follow"),
    ("vertex.off", "OFF\n3 1 0\n0 0 0\n1 0\n0 1 0\n3 0 1 2\n", ", line 4: expected 3 numbers, found '1 0'"),
    ("face.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1\n", ", line 6: expected 4 numbers, found '3 0 1'"),
    ("area.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", ": the faces of the mesh have no area"),
    ("vertex.obj", "v 0 0 0\nv 1 0\n", ", line 2: expected 3 numbers, found '1 0'"),
    ("face.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2\n", ", line 4: expected 3 numbers, found '1 2'"),
    ("zero.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", ": the faces name vertices -1 to 1 (from 0), the mesh has 3"),
    ("scan.las", "LASF", f": unknown extension '.las', expected one of {EXTENSIONS}"),
]


@pytest.mark.parametrize("name, data, message", BROKEN_FILES, ids=[row[0] for row in BROKEN_FILES])
def test_broken_files_are_named_with_what_is_wrong(tmp_path, monkeypatch, name, data, message):
    monkeypatch.chdir(tmp_path)
    path, begin = written(tmp_path, name, data() if callable(data) else data), time.perf_counter()
    with pytest.raises(ValueError) as error:
        act.read_cloud(path)
    assert str(error.value) == path + message
    assert time.perf_counter() - begin < 1 and not os.path.exists("act_was_here")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.ply: no such file$"):
        act.read_cloud(tmp_path / "nowhere.ply")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match=r"folder\.npy: no such file$"):
        act.read_cloud(tmp_path / "folder.npy")


def assert_read_or_refused(folder, extension, data):
    path, begin = written(folder, "fuzz" + extension, data), time.perf_counter()
    try:
        points = act.read_points(path)
        assert points.dtype == np.float64 and points.ndim == 2 and points.shape[1] == 3 and np.isfinite(points).all()
        assert np.isfinite(act.normalize(points)).all()
    except ValueError as error:
        assert str(error).startswith(path) and "\n" not in str(error)
    assert time.perf_counter() - begin < 1


SEEDS = {**GOOD_FILES, **{"mesh_" + name: (lambda data=data: data) for name, data in MESHES.items()}}


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", SEEDS)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(fuzz_folder, name, data):
    whole = SEEDS[name]()
    whole = bytearray(whole if isinstance(whole, bytes) else whole.encode())
    for _ in range(data.draw(st.integers(0, 4))):
        place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        whole[place] ^= 1 << bit
    whole = whole[:data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(whole)))
        whole[place:place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=8))
    assert_read_or_refused(fuzz_folder, os.path.splitext(name)[1], bytes(whole))


BROKEN_HEADS = {".npy": [b"\x93NUMPY\x01\x00\x40\x00{'descr': '<f4', 'fortran_order': False, 'shape': ("],
         ".npz": [b"PK\x03\x04", b"PK\x05\x06"],
         ".ply": [PLY_HEAD.encode(), b"ply\nformat binary_big_endian 1.0\nelement vertex "], ".off": [b"OFF\n", b"OFF 3 "],
         ".obj": [b"v 1 2 3\nf ", b"v "], ".xyz": [b"1 2 3\n"], ".txt": [b"x y z\n"],
         ".pts": [b"2\n"], ".h5": [b"\x89HDF\r\n\x1a\n"]}


@pytest.mark.parametrize("extension", BROKEN_HEADS)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data())
def test_random_bytes_and_headers_are_read_or_refused(fuzz_folder, extension, data):
    words = st.lists(st.sampled_from([b"1", b"-1", b"3", b"99999999999999999999", b"nan", b"1e400", b" ", b"\n", b", 3), }", b"/",
                                      b"\0", b"end_header\n", b"property list uchar float x\n", b"property list uchar\n",
                                      b"property float x\n", b"element face 9\n"]), max_size=20)
    body = data.draw(st.binary(max_size=60) | words.map(b" ".join) | words.map(b"".join))
    assert_read_or_refused(fuzz_folder, extension, data.draw(st.sampled_from([b"", *BROKEN_HEADS[extension]])) + body)


# ---- drawing from clouds

def make_clouds(sizes, normalized=True, seed=0):
    points = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed))
    return act.Clouds(points, torch.tensor([0, *np.cumsum(sizes)]), [str(i) for i in range(len(sizes))], normalized=normalized)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 99))
def test_a_draw_takes_points_of_its_cloud_each_as_rarely_as_possible(sizes, num_points, seed):
    clouds = make_clouds(sizes, normalized=False)
    indices = torch.arange(len(sizes)).flip(0)
    xyz, flat = clouds.draw(indices, num_points, torch.Generator().manual_seed(seed))
    assert xyz.shape == (len(sizes), num_points, 3) and xyz.dtype == torch.float32 and flat.dtype == torch.int64
    assert torch.equal(xyz, clouds.points[flat])
    for row, i in zip(flat, indices.tolist()):
        counts = torch.bincount(row - clouds.offsets[i], minlength=sizes[i])
        assert len(counts) == sizes[i] and int(row.min()) >= int(clouds.offsets[i])
        assert int(counts.max()) - int(counts.min()) <= 1  # without repetition; a small cloud is repeated evenly
    again = clouds.draw(indices, num_points, torch.Generator().manual_seed(seed))[1]
    assert torch.equal(flat, again)


def test_draws_are_uniform_over_points_and_order():
    clouds = make_clouds([8, 5], normalized=False)
    _, flat = clouds.draw(torch.zeros(8000, dtype=torch.long), 4, torch.Generator().manual_seed(0))
    assert (torch.bincount(flat.reshape(-1)).float() / 8000 - 0.5).abs().max() < 0.03
    assert (torch.bincount(flat[:, 0]).float() / 8000 - 0.125).abs().max() < 0.02  # the first place too


def test_each_draw_is_normalized_anew_in_double_precision():
    clouds = make_clouds([50, 7])
    clouds.points += 1000
    xyz, flat = clouds.draw(torch.tensor([0, 1, 0]), 16, torch.Generator().manual_seed(0))
    for cloud, rows in zip(xyz, flat):
        np.testing.assert_allclose(cloud, act.normalize(clouds.points[rows].numpy()), atol=1e-6)
    single, _ = clouds.draw(torch.tensor([0]), 1)
    assert (single == 0).all()


def test_huge_clouds_are_drawn_in_parts(monkeypatch):
    clouds, asked, rand = make_clouds([3_000_000, 10]), [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **options: asked.append(size) or rand(*size, **options))
    _, flat = clouds.draw(torch.tensor([0, 1] * 4), 64, torch.Generator().manual_seed(0))
    assert max(rows * keys for rows, keys in asked) <= 2 ** 24 and len(asked) == 2
    assert all(len(row.unique()) == (64, 10)[i % 2] for i, row in enumerate(flat))


# ---- folders

@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate(("chair/a.npy", "chair/b.xyz", "lamp/c.ply", "lamp/deep/d.npy", "lamp/e.txt")):
        points = rng.normal(size=(10 + i, 3))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path, name, {".npy": npy_bytes, ".ply": ply_bytes}.get(os.path.splitext(name)[1], text_bytes)(points))
    written(tmp_path, "notes.md", "not a cloud")
    return tmp_path


def caches(path):
    return sorted(name for name in os.listdir(path) if name.startswith(".act"))


def test_a_folder_gives_normalized_clouds_with_their_classes(folder):
    clouds = act.open_clouds(folder)
    assert sorted(clouds.names) == ["chair/a.npy", "chair/b.xyz", "lamp/c.ply", "lamp/deep/d.npy", "lamp/e.txt"]
    assert clouds.classes == ["chair", "lamp"] and len(clouds) == 5
    for i, name in enumerate(clouds.names):
        assert torch.equal(clouds[i], torch.from_numpy(act.read_cloud(folder / name)))
        assert clouds.classes[clouds.labels[i]] == name.split("/")[0]
    assert clouds.draw(torch.arange(5), 12)[0].shape == (5, 12, 3)
    assert torch.equal(clouds.to("cpu").points, clouds.points)


def test_the_cache_is_used_then_rebuilt_when_a_file_changes(folder, monkeypatch):
    first = act.open_clouds(folder).points.clone()
    with monkeypatch.context() as patch:
        patch.setattr(act, "read_cloud", lambda path: pytest.fail("read again"))
        assert torch.equal(act.open_clouds(folder).points, first)
    written(folder, "chair/a.npy", npy_bytes(np.random.default_rng(5).normal(size=(30, 3))))
    assert len(act.open_clouds(folder).points) == len(first) + 20
    assert len(caches(folder)) == 2


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-5], lambda data: data + b"12345678",
                                    lambda data: data[:-4] + b"\xff\xff\xff\x7f", lambda data: bytes(len(data))])
def test_a_damaged_cache_is_rebuilt(folder, tmp_path_factory, damage):
    place = tmp_path_factory.mktemp("cache")
    first = act.open_clouds(folder, cache=place).points.clone()
    assert not caches(folder)
    name, = caches(place)
    (place / name).write_bytes(damage((place / name).read_bytes()))
    assert torch.equal(act.open_clouds(folder, cache=place).points, first)
    assert caches(place) == [name]


def test_changing_a_mapped_cloud_does_not_change_the_cache(folder):
    act.open_clouds(folder).points.zero_()
    assert act.open_clouds(folder).points.abs().sum() > 0


def test_two_builders_at_once_get_the_same_whole_cache(folder):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: act.open_clouds(folder).points.clone(), range(4)))
    assert all(torch.equal(points, found[0]) for points in found)
    assert len(caches(folder)) == 1


def build_and_sum(folder):
    return float(np.asarray(act.open_clouds(folder).points, np.float64).sum())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_build_one_cache(folder):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        sums = pool.map(build_and_sum, [folder] * 4, chunksize=1)
    assert set(sums) == {build_and_sum(folder)} and len(caches(folder)) == 1


def test_a_folder_that_cannot_be_written_is_cached_elsewhere(folder, tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(act.tempfile, "gettempdir", lambda: str(place))
    act.open_clouds(folder)
    inside, = os.listdir(place)
    assert not caches(folder) and len(caches(place / inside)) == 1


def test_large_clouds_are_thinned_the_same_way_each_time(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(act, "CACHE_POINTS", 50)
    written(tmp_path, "a.npy", npy_bytes(np.random.default_rng(0).normal(size=(80, 3))))
    first, second = (act.open_clouds(tmp_path, cache=tmp_path_factory.mktemp("c")).points for _ in range(2))
    whole = {tuple(row) for row in act.read_cloud(tmp_path / "a.npy").tolist()}
    assert len(first) == 50 and torch.equal(first, second)
    assert {tuple(row) for row in first.tolist()} < whole and len(first.unique(dim=0)) == 50


@pytest.mark.parametrize("layout", ["{split}/{label}/{i}.npy", "{label}/{split}/{i}.npy"])
def test_train_and_test_folders_are_the_splits_above_or_below_the_classes(tmp_path, layout):
    for i in range(8):
        path = tmp_path / layout.format(split="test" if i % 4 == 0 else "train", label="ab"[i % 2], i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        written(path.parent, path.name, npy_bytes(XYZ + i))
    train, test, both = (act.open_clouds(tmp_path, split) for split in ("train", "test", None))
    assert len(train) == 6 and len(test) == 2 and set(train.names) | set(test.names) == set(both.names)
    assert train.classes == test.classes == ["a", "b"] and test.labels.tolist() == [0, 0]
    assert torch.equal(torch.cat([train.points, test.points]), both.points) and len(caches(tmp_path)) == 1


def test_without_folders_a_fixed_fifth_is_for_testing(tmp_path):
    for i in range(20):
        written(tmp_path, f"{i}.npy", npy_bytes(np.random.default_rng(i).normal(size=(5, 3))))
    train, test = act.open_clouds(tmp_path, "train"), act.open_clouds(tmp_path, "test")
    assert len(train) == 16 and len(test) == 4 and not set(train.names) & set(test.names)
    assert train.labels is None and train.classes == []
    assert test.names == act.open_clouds(tmp_path, "test").names
    for i in range(len(test)):
        assert torch.equal(test[i], torch.from_numpy(act.read_cloud(tmp_path / test.names[i])))


@pytest.mark.parametrize("root, lists, base", [(".", "ShapeNet-55", "shapenet_pc"), (".", ".", "shapenet_pc"),
                                               ("ShapeNet-55", "ShapeNet-55", "shapenet_pc"),
                                               (".", "ShapeNet55-34/ShapeNet-55", "ShapeNet55-34/shapenet_pc")])
def test_shapenet_55_follows_its_lists(tmp_path, root, lists, base):
    for part in (lists, base):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
    names = [f"{synset}-{i}.npy" for synset in ("03001627", "02691156") for i in range(3)]
    for i, name in enumerate(names + ["03001627-unlisted.npy"]):
        written(tmp_path / base, name, npy_bytes(np.random.default_rng(i).normal(size=(6, 3)).astype(np.float32)))
    written(tmp_path / lists, "train.txt", "\n".join(names[:4]))
    written(tmp_path / lists, "test.txt", "\n".join(names[4:]) + "\n")
    train, test, both = (act.open_clouds(tmp_path / root, split) for split in ("train", "test", None))
    assert sorted(train.names) == sorted(names[:4]) and sorted(test.names) == sorted(names[4:]) and len(both) == 6
    assert train.classes == ["02691156", "03001627"] and test.labels.tolist() == [0, 0]
    written(tmp_path / lists, "test.txt", "02691156-gone.npy\n")
    with pytest.raises(ValueError, match="02691156-gone.npy is listed, but not there$"):
        act.open_clouds(tmp_path / root)


def test_folders_without_clouds_and_broken_files_are_named(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError) as error:
        act.open_clouds(empty)
    assert str(error.value) == f"{empty}: no clouds, expected files {EXTENSIONS}"
    with pytest.raises(ValueError) as error:
        act.open_clouds(empty / "none")
    assert str(error.value) == f"{empty}/none: no such folder"
    with pytest.raises(ValueError, match="split must be 'train', 'test' or None, found 'val'"):
        act.open_clouds(folder, "val")
    written(folder, "lamp/broken.xyz", "1 2 3\n4 5\n")
    with pytest.raises(ValueError) as error:
        act.open_clouds(folder)
    assert str(error.value) == f"{folder}/lamp/broken.xyz, line 2: expected 3 numbers, found '4 5'"
    assert not caches(folder)  # nothing half-written
    (empty / "train").mkdir()
    written(empty / "train", "a.npy", npy_bytes(XYZ))
    with pytest.raises(ValueError) as error:
        act.open_clouds(empty, "test")
    assert str(error.value) == f"{empty}: no clouds for 'test' among its 1"


# ---- the embedded shapes

@pytest.fixture(scope="module")
def shapes():
    return act.synthetic_clouds(3, seed=0, num_points=256)


def test_embedded_shapes_are_labelled_normalized_and_of_at_least_twenty_classes(shapes):
    assert len(shapes.classes) >= 20 and len(shapes) == len(shapes.names) == 3 * len(shapes.classes)
    assert torch.bincount(shapes.labels).tolist() == [3] * len(shapes.classes)
    xyz = shapes.points.reshape(len(shapes), 256, 3)
    assert xyz.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(xyz.norm(dim=2).amax(1), torch.ones(len(shapes)))
    assert all(len(cloud.unique(dim=0)) == 256 for cloud in xyz)


def test_part_labels_are_consecutive_over_the_classes_and_stay_in_their_range(shapes):
    ends = [end for _, end in shapes.class_parts]
    assert [first for first, _ in shapes.class_parts] == [0, *ends[:-1]]
    parts = shapes.parts.reshape(len(shapes.classes), -1)
    for (first, end), found in zip(shapes.class_parts, parts):
        assert set(found.tolist()) == set(range(first, end))
    assert sum(end - first >= 2 for first, end in shapes.class_parts) >= 12


def test_embedded_shapes_depend_on_seed_class_and_number_alone(shapes):
    again = act.synthetic_clouds(2, seed=0, num_points=256)
    assert torch.equal(again.points.reshape(-1, 2, 256, 3), shapes.points.reshape(-1, 3, 256, 3)[:, :2])
    other = act.synthetic_clouds(2, seed=1, num_points=256)
    assert not torch.equal(again.points, other.points)
    assert again.names[:3] == ["sphere_0_0000", "sphere_0_0001", "ellipsoid_0_0000"]


def test_a_thousand_embedded_shapes_take_seconds():
    begin = time.perf_counter()
    assert len(act.synthetic_clouds(44, num_points=1024)) >= 1000
    assert time.perf_counter() - begin < 10


# ---- augmentation

def test_scale_and_translate_stay_in_their_ranges_and_differ_per_cloud_and_axis():
    xyz = torch.randn(4000, 5, 3, generator=torch.Generator().manual_seed(0))
    out = act.scale_translate(xyz, torch.Generator().manual_seed(1))
    scale = (out[:, 1] - out[:, 0]) / (xyz[:, 1] - xyz[:, 0])  # (B, 3)
    shift = out[:, 0] - scale * xyz[:, 0]
    assert 2 / 3 - 1e-2 < scale.quantile(0.005) < 0.68 and 1.48 < scale.quantile(0.995) < 1.51
    assert shift.abs().median() < 0.2 and abs(float(shift.mean())) < 0.01 and 0.19 < shift.abs().quantile(0.98) < 0.21
    assert (scale[:, 0] - scale[:, 1]).abs().median() > 0.05
    torch.testing.assert_close(out, scale[:, None] * xyz + shift[:, None], atol=1e-3, rtol=1e-3)
    same = act.scale_translate(xyz, torch.Generator().manual_seed(1), (0.8, 1.25), 0.1, per_axis=False)
    scale = (same[:, 1] - same[:, 0]) / (xyz[:, 1] - xyz[:, 0])
    assert (scale[:, 0] - scale[:, 1]).abs().median() < 1e-5 and scale.std() > 0.1


def test_rotation_about_y_keeps_heights_and_distances_and_covers_the_circle():
    xyz = torch.randn(2000, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = act.rotate_y(xyz, torch.Generator().manual_seed(1))
    assert torch.equal(out[..., 1], xyz[..., 1])
    torch.testing.assert_close(torch.cdist(out, out), torch.cdist(xyz, xyz))
    triple = torch.linalg.det(out[:, :3])
    torch.testing.assert_close(triple, torch.linalg.det(xyz[:, :3]))  # a turn, not a mirror
    turn = torch.view_as_complex(torch.stack([out[:, 0, 0], out[:, 0, 2]], 1)) / torch.view_as_complex(
        torch.stack([xyz[:, 0, 0], xyz[:, 0, 2]], 1))
    assert turn.mean().abs() < 0.06 and turn.real.max() > 0.99 and turn.real.min() < -0.99


# =====================================================================================================================
# pictures
# =====================================================================================================================

def decode_png(path):
    """An independent reader of 8-bit RGB PNG files with filter 0, every checksum verified -> (H, W, 3) uint8."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        chunks.append((body[:4], body[4:]))
        at += 12 + length
    assert [name for name, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    W, H, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    raw = zlib.decompress(chunks[1][1])
    assert len(raw) == H * (1 + 3 * W)
    rows = [raw[y * (1 + 3 * W) : (y + 1) * (1 + 3 * W)] for y in range(H)]
    assert all(row[0] == 0 for row in rows)
    return np.array([list(row[1:]) for row in rows], dtype=np.uint8).reshape(H, W, 3)


def ink(image):
    """Rows and columns of all pixels that are not white."""
    return np.nonzero((image < 250).any(axis=2))


def colourful(image):
    """Where a picture is neither white nor grey: its data, not its text and axes."""
    return image.max(axis=2).astype(int) - image.min(axis=2) > 40


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 300)])
def test_png_decodes_to_the_same_pixels(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    act.write_png(path, image[::-1, ::-1])  # not contiguous
    assert (decode_png(path) == image[::-1, ::-1]).all()
    assert os.listdir(tmp_path) == ["picture.png"]


def test_png_replaces_the_old_file_only_when_whole(tmp_path):
    path = tmp_path / "picture.png"
    act.write_png(path, np.zeros((2, 2, 3), np.uint8))
    before = path.read_bytes()
    with pytest.raises(AssertionError):
        act.write_png(path, np.zeros((2, 2, 3)))
    assert path.read_bytes() == before
    act.write_png(path, np.full((2, 2, 3), 9, np.uint8))
    assert (decode_png(path) == 9).all()


def test_every_printable_character_has_a_glyph_of_its_own():
    seen = {}
    for c in map(chr, range(33, 127)):
        image = np.full((10, 8, 3), 255, np.uint8)
        act.draw_text(image, 1, 1, c, scale=1)
        rows, columns = ink(image)
        assert len(rows) and rows.min() >= 1 and rows.max() <= 8 and columns.min() >= 1 and columns.max() <= 5
        assert seen.setdefault(image.tobytes(), c) == c
    boxes = [np.full((10, 8, 3), 255, np.uint8) for _ in range(2)]
    for image, c in zip(boxes, "é\n"):
        act.draw_text(image, 1, 1, c, scale=1)
    assert (boxes[0] == boxes[1]).all() and boxes[0].tobytes() not in seen


@pytest.mark.parametrize("x, y", [(-30, 3), (55, 3), (5, -6), (5, 25), (500, 500), (-500, 0)])
def test_text_over_the_edge_is_cut_off(x, y):
    wide = np.full((232, 264, 3), 255, np.uint8)
    act.draw_text(wide, x + 100, y + 100, "clipped")
    image = np.full((32, 64, 3), 255, np.uint8)
    act.draw_text(image, x, y, "clipped")
    assert (image == wide[100:132, 100:164]).all()  # what is inside is as it would be, nothing wraps around


def test_text_aligns_and_keeps_its_colour_and_width():
    for align, edge in ((0, 0), (1, -1)):
        image = np.full((20, 200, 3), 255, np.uint8)
        act.draw_text(image, 100, 2, "HH", (200, 0, 0), align=align)
        rows, columns = ink(image)
        assert abs(sorted(columns)[edge] - 100) <= 1
        assert (image[rows, columns] == (200, 0, 0)).all()
    for width in (90, 60, 30, 12):
        image = np.full((20, 200, 3), 255, np.uint8)
        act.draw_text(image, 0, 2, "a long text", width=width)
        assert 0 < ink(image)[1].max() < width


def test_nearer_point_hides_the_farther():
    a, e = np.radians(35), np.radians(20)
    toward = np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
    points, colors = np.stack([0.5 * toward, -0.5 * toward]), np.array([[1.0, 0, 0], [0, 0, 1.0]])
    for order in ([0, 1], [1, 0]):
        image = act.render(points[order], colors[order], size=64)
        r, g, b = image[32, 32].astype(int)
        assert r > b + 50
        rows, columns = ink(image)
        assert (image[rows, columns, 0] >= image[rows, columns, 2]).all()


def test_y_is_up_and_x_is_right():
    middle = [act.render([p], size=96) for p in ([0, 0.8, 0], [0, -0.8, 0], [0.8, 0, 0], [-0.8, 0, 0])]
    top, bottom, right, left = [tuple(v.mean() for v in ink(image)) for image in middle]
    assert top[0] < 40 < 56 < bottom[0] and abs(top[1] - 48) < 2
    assert left[1] < 40 < 56 < right[1]


def test_frame_is_fixed_and_holds_the_unit_ball():
    xyz = np.random.default_rng(0).normal(size=(2000, 3))
    xyz /= np.linalg.norm(xyz, axis=1, keepdims=True)
    extent = []
    for scale in (1, 0.5):
        rows, columns = ink(act.render(scale * xyz, size=200))
        assert rows.min() > 0 and rows.max() < 199 and columns.min() > 0 and columns.max() < 199
        extent.append(np.ptp(rows))
    assert 0.45 < extent[1] / extent[0] < 0.55
    assert extent[0] > 170  # and fills it


def test_render_keeps_colours_fades_with_depth_and_shrinks_discs():
    for channel in range(3):
        image = act.render(np.zeros((1, 3)), np.eye(3)[[channel]], size=64)
        rows, columns = ink(image)
        assert (image[rows, columns].argmax(axis=1) == channel).all()
    near, far = [act.render([[0, 0, z]], [[0.0, 0, 0]], size=64).min() for z in (0.9, -0.9)]
    assert near < far
    xyz = np.random.default_rng(0).uniform(-0.5, 0.5, (5000, 3))
    assert len(ink(act.render(xyz[:1]))[0]) > 4 * len(ink(act.render(np.repeat(xyz[:1], 5000, axis=0)))[0])


def test_render_takes_what_it_cannot_show():
    for xyz in (np.zeros((0, 3)), np.full((2, 3), np.nan), np.array([[np.inf, 0, 0]])):
        image = act.render(xyz, size=32)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and (image == 255).all()
    assert (act.render([[1e6, 1e6, 1e6]], size=32) == 255).all()  # outside the frame
    whole = act.render([[0, 0, 0], [np.nan, 0, 0]], [[1.0, 0, 0], [0, 1.0, 0]], size=32)
    assert len(ink(whole)[0])


def test_palette_is_distinct_and_its_order_fixed():
    colors = act.palette(60)
    assert colors.shape == (60, 3) and colors.min() >= 0 and colors.max() <= 1
    gaps = np.linalg.norm(colors[:, None] - colors[None], axis=2) + np.eye(60)
    assert gaps.min() > 0.02 and gaps[:10, :10].min() > 0.15
    assert (act.palette(7) == colors[:7]).all() and act.palette(0).shape == (0, 3)


def test_pca_colors_follow_the_components_whatever_the_sign_of_the_solver():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 3)) * [9, 3, 1]
    axes = np.linalg.qr(rng.normal(size=(16, 3)))[0].T
    colors = act.pca_colors(scores @ axes + 5)
    assert colors.shape == (400, 3) and colors.min() == 0 and colors.max() == 1
    for i in range(3):
        assert abs(np.corrcoef(colors[:, i], scores[:, i])[0, 1]) > 0.95
    order = rng.permutation(400)
    assert np.allclose(act.pca_colors((scores @ axes + 5)[order]), colors[order], atol=1e-6)


def test_pca_colors_are_not_squeezed_by_an_outlier():
    line = np.linspace(0, 1, 200)[:, None] * [3.0, 1, 0]
    line[-1] *= 100
    assert np.percentile(act.pca_colors(line)[:, 0], 90) > 0.85


def test_pca_colors_without_variance_are_grey():
    assert (act.pca_colors(np.full((5, 8), 3.3)) == 0.5).all()
    line = act.pca_colors(np.linspace(0, 1, 50)[:, None] * np.arange(1, 5))
    assert (line[:, 1:] == 0.5).all() and (np.diff(line[:, 0]) >= 0).all() and np.ptp(line[:, 0]) == 1
    assert act.pca_colors(np.eye(2)).shape == (2, 3) and act.pca_colors(np.arange(3.0)[:, None]).shape == (3, 3)


def test_montage_places_each_image_and_its_headings():
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 200, (40, 60, 3), dtype=np.uint8) for _ in range(3)] for _ in range(2)]
    plain, headed = act.montage(rows), act.montage(rows, ["a", "bb", "a heading too long"], ["one", "two"])
    for image in (plain, headed):
        for tile in (tile for row in rows for tile in row):
            found = np.argwhere((image[:-39, :-59] == tile[0, 0]).all(axis=2))
            assert any((image[y : y + 40, x : x + 60] == tile).all() for y, x in found)
    dy, dx = np.subtract(headed.shape[:2], plain.shape[:2])
    assert (headed[dy + 6 :, dx + 6 :] == plain[6:, 6:]).all()  # text stands outside the images
    assert len(ink(headed[: dy + 6, dx:])[0]) and len(ink(headed[dy:, : dx + 6])[0])


@pytest.mark.parametrize("xs, ys", [
    ([3], [0.5]), ([0, 1, 2], [4, 4, 4]), ([0, 1, 2], [0, 0, 0]), ([1, 2, 3, 4], [1, np.nan, np.inf, 2]), ([0, 1], [-1e9, 1e9]),
    ([0, 1, 2], [1e-9, 1e-3, 10]), ([0.1, 0.2], [1e-12, 2e-12]), (range(100), np.random.default_rng(0).normal(size=100)),
], ids=["point", "constant", "zero", "gaps", "large", "decades", "small", "noise"])
def test_curves_put_ink_inside_the_axes(xs, ys):
    image = act.plot_lines({"loss": (xs, ys)}, "title", "step", "loss", size=(400, 300))
    assert image.shape == (300, 400, 3) and image.dtype == np.uint8
    rows, columns = np.nonzero(colourful(image)[64:248, 110:376])
    assert len(rows) >= 4
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (edge == 255).all()  # nothing is cut off
    for part in (image[8:24], image[280:], image[64:248, :20]):  # title, label of x, label of y
        assert len(ink(part)[0])


def test_curves_without_data_are_empty_axes():
    for curves in ({}, {"none": ([], [])}, {"none": ([1, 2], [np.nan, np.nan])}):
        image = act.plot_lines(curves)
        assert len(ink(image)[0]) and not colourful(image[64:]).any()


def test_curves_have_one_colour_each_and_rise_with_their_values():
    xs = np.arange(50)
    image = act.plot_lines({"up": (xs, xs), "down": (xs, -xs)})
    for color, sign in zip((255 * act.palette(2)).astype(np.uint8), (1, -1)):
        rows, columns = np.nonzero((image[70:] == color).all(axis=2))
        assert len(rows) > 200 and sign * np.corrcoef(rows, columns)[0, 1] < -0.99


def test_a_gap_is_not_bridged():
    ys = np.ones(100)
    whole = colourful(act.plot_lines({"": (np.arange(100), ys)})[70:340])
    ys[40:60] = np.nan
    gap = colourful(act.plot_lines({"": (np.arange(100), ys)})[70:340])
    covered = [np.flatnonzero(picture.any(axis=0)) for picture in (whole, gap)]
    assert np.diff(covered[0]).max() == 1 and np.diff(covered[1]).max() > 0.15 * np.ptp(covered[1])


def test_positive_values_over_two_decades_are_drawn_on_a_log_axis():
    xs = np.arange(60)
    for ys, straight in ((10.0 ** (-xs / 15), True), (10.0 ** (-xs / 15) - 0.001, False)):
        rows, columns = np.nonzero(colourful(act.plot_lines({"": (xs, ys)})[70:340]))
        assert (abs(np.corrcoef(rows, columns)[0, 1]) > 0.999) == straight


@pytest.mark.parametrize("n", [3, 12, 13, 40])
def test_matrix_shades_hits_blue_misses_red_and_nothing_white(n):
    counts = 1000 * np.eye(n, dtype=int)
    counts[0, -1] = 1000
    counts[1] = 0  # a class without clouds
    image = act.plot_matrix(counts, [f"a class with a long name {i}" for i in range(n)])
    cell = max(28, min(48, 480 // n))
    left, top = image.shape[1] - 8 - n * cell, 74
    corners = image[top + 3 : top + n * cell : cell, left + 3 : left + n * cell : cell].astype(int)  # (n, n, 3)
    hit, miss = np.zeros((2, n, n), bool)
    hit[np.arange(n), np.arange(n)], miss[0, -1] = counts.diagonal() > 0, True
    assert (corners[hit][:, 2] > corners[hit][:, 0] + 50).all() and (corners[miss][:, 0] > corners[miss][:, 2] + 50).all()
    assert (corners[~hit & ~miss] == 255).all()
    assert (corners[2, 2] < corners[0, 0]).any()  # all of a row is darker than half of one


@pytest.mark.parametrize("n, title", [(1, ""), (1, "a title that is wider than the matrix"), (2, "t"), (40, "t")])
@pytest.mark.parametrize("name", ["x", "a class with a long name"])
def test_matrix_cuts_no_text_off(n, title, name):
    image = act.plot_matrix(12345 * np.eye(n, dtype=int), [name] * n, title)
    assert image.dtype == np.uint8 and colourful(image).any()
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (edge == 255).all()


def test_matrix_prints_counts_up_to_twelve_classes():
    names = [str(i) for i in range(13)]
    for n, printed in ((12, True), (13, False)):
        one, two = [act.plot_matrix(k * np.eye(n, dtype=int), names[:n]) for k in (1, 2)]
        assert (one != two).any() == printed


# =====================================================================================================================
# the scripts, resuming, processes
# =====================================================================================================================

# -- scripts ----------------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent


def script(name, *args, processes=0, timeout=170):
    """Runs a script as a user would -> CompletedProcess."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.run([sys.executable, *launch, str(HERE / name) if "/" not in str(name) else str(name), *map(str, args)],
                          capture_output=True, text=True, timeout=timeout, env=env)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def cloud_folder(tmp_path_factory):
    """8 training and 4 test clouds of two classes as .npy files."""
    root = tmp_path_factory.mktemp("clouds")
    clouds = act.synthetic_clouds(6, seed=3, num_points=600)
    for i, label in enumerate(clouds.labels.tolist()):
        if clouds.classes[label] in ("torus", "chair"):
            path = root / ("train" if i % 6 < 4 else "test") / clouds.classes[label] / f"{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, clouds[i].numpy())
    return root


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory, cloud_folder):
    out = tmp_path_factory.mktemp("teacher")
    done = script("train_teacher.py", "--data", cloud_folder, "--weights", "random", "--steps", 3, "--batch-size", 4, "--log-every", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_stage_one_leaves_its_results(teacher_run):
    out, done = teacher_run
    assert any(line.startswith("epoch 1 ") for line in done.stdout.splitlines())
    assert {"last.pt", "metrics.jsonl", "config.json", "reconstruction.png", "reconstruction.ply", "loss.png"} <= {p.name for p in out.iterdir()}
    closing = log_of(out)[-1]
    for key in ("cd_l1", "cd_l2", "fscore"):
        assert closing[f"{key}_before"] >= 0 and closing[f"{key}_after"] >= 0
    for row in log_of(out)[:-1]:
        assert {"epoch", "step", "seconds", "loss", "reconstruction", "kl", "lr", "temperature", "grad_norm"} <= set(row)
    teacher = act.load(out / "last.pt")
    assert isinstance(teacher, act.Teacher) and not teacher.training and teacher.config.weights == "random"


def test_the_closing_figure_is_that_of_the_saved_teacher(teacher_run, cloud_folder):
    import train_teacher
    out, _ = teacher_run
    figures = train_teacher.evaluate(act.load(out / "last.pt"), act.open_clouds(cloud_folder, "test"), 1024, 0)
    assert figures["cd_l1"] == pytest.approx(log_of(out)[-1]["cd_l1_after"], rel=1e-4)


@pytest.mark.parametrize("target, extra", [("teacher", ["--mask", "block"]), ("teacher", ["--loss", "smooth_l1"]),
                                           ("coordinates", []), ("codes", [])])
def test_stage_two_runs_with_every_target(tmp_path, teacher_run, cloud_folder, target, extra):
    done = script("train_student.py", "--data", cloud_folder, "--teacher", teacher_run[0] / "last.pt", "--target", target, "--steps", 2,
                  "--batch-size", 4, "--out", tmp_path, *extra)
    assert done.returncode == 0, done.stderr
    closing = log_of(tmp_path)[-1]
    assert 0 <= closing["svm_trained"] <= 100 and 0 <= closing["svm_untrained"] <= 100
    assert {"reconstruction.png", "features.png", "loss.png", "config.json"} <= {p.name for p in tmp_path.iterdir()}
    student, teacher = act.load(tmp_path / "last.pt"), act.load(teacher_run[0] / "last.pt")
    assert student.config.num_group == teacher.config.num_group
    assert student.config.target_dim == dict(teacher=teacher.config.decoder_dims, coordinates=3 * teacher.config.group_size,
                                             codes=teacher.config.num_tokens)[target]


def test_a_killed_run_resumes_bit_for_bit(tmp_path, teacher_run, cloud_folder):
    args = ["--data", str(cloud_folder), "--teacher", str(teacher_run[0] / "last.pt"), "--steps", "9", "--batch-size", "3", "--log-every", "1",
            "--save-minutes", "0"]
    whole = script("train_student.py", *args, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    cut = subprocess.Popen([sys.executable, str(HERE / "train_student.py"), *args, "--out", str(tmp_path / "cut")], env=env,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / "metrics.jsonl"
    while cut.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 5):  # in the second epoch
        time.sleep(0.01)
    cut.kill()
    cut.wait()
    resumed = script("train_student.py", *args, "--out", tmp_path / "cut", "--resume")
    assert resumed.returncode == 0 and "resumed" in resumed.stdout, resumed.stderr
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert one["step"] == two["step"] == 9
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values()) for k in a)
    first, second = log_of(tmp_path / "whole"), log_of(tmp_path / "cut")
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in first] == [{k: v for k, v in row.items() if k != "seconds"} for row in second]


def test_sigterm_saves_and_says_how_to_resume(tmp_path, cloud_folder):
    args = ["--data", str(cloud_folder), "--weights", "random", "--epochs", "1000", "--batch-size", "4", "--out", str(tmp_path)]
    run = subprocess.Popen([sys.executable, str(HERE / "train_teacher.py"), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "epoch 1 " not in run.stdout.readline():
        assert run.poll() is None
    run.terminate()
    out, err = run.communicate(timeout=60)
    assert run.returncode == 143 and "--resume" in out and err == "", err
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] >= 1 and state["kind"] == "Teacher"
    refused = script("train_teacher.py", *args, "--resume", "--lr", "0.1")
    assert refused.returncode == 2 and "--lr was 0.001, is 0.1" in refused.stderr


DRIVER = '''
import os, sys, torch, act
from dataclasses import dataclass  # of the driver

@dataclass
class Config(act.RunConfig):
    out: str = act.flag("runs/x", "")
    crash: bool = act.flag(False, "")

def main():
    config = act.parse_flags(Config, "")
    device, rank, world = act.start_processes(config)
    config = act.resolve(config, device, {"tiny": dict(epochs=2, batch_size=5)})
    clouds = act.open_clouds(config.data)
    torch.manual_seed(0)
    sizes = act.StudentConfig(num_group=16, group_size=8, width=64, depth=2, num_heads=1, encoder_dims=64, target_dim=24, drop_path=0.0, decoder_depth=1)
    run = act.Run(config, act.Student(sizes), clouds, 0.05)
    def loss(net, step, indices, generator, share):
        if config.crash and rank == 1 and step == 1:
            raise ValueError("process 1 found a bad cloud")
        if step == int(os.environ.get("DIE_AT", -1)):
            os._exit(9)
        xyz, _ = clouds.draw(indices, 128, generator)
        neighborhood, center = act.group_points(act.scale_translate(xyz, generator), 16, 8)
        mask = act.random_mask(center, 0.5, act.seeded("cpu", step))[share]
        neighborhood, center = neighborhood[share], center[share]
        masked = act.split_mask(mask, device)[1]
        truth = act.gather_points(neighborhood.flatten(2), masked)
        return act.distillation_loss(net(neighborhood, center, mask), truth, "l2"), {}
    run.train(lambda step: dict(lr=1e-3), loss)
    run.close(rank=rank)

act.run_script(main)
'''


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER)
    return path


def test_two_processes_give_the_losses_of_one(tmp_path, cloud_folder, driver):
    """An odd batch, so that the shares differ; BatchNorm is synchronised; one writer."""
    args = ["--data", cloud_folder, "--lr", "1e-3", "--log-every", 1, "--batch-size", 5, "--precision", "fp32"]
    one = script(driver, *args, "--steps", 6, "--out", tmp_path / "one")
    two = script(driver, *args, "--steps", 6, "--out", tmp_path / "two", processes=2)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    first, second = ([row["loss"] for row in log_of(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert len(first) == 6 and first == pytest.approx(second, rel=2e-4)
    for (key, a), b in zip(*(act.load(tmp_path / name / "last.pt").state_dict().items() if name == "one" else
                             act.load(tmp_path / name / "last.pt").state_dict().values() for name in ("one", "two"))):
        if "running_var" in key:  # means hold biases that a following BatchNorm cancels, which Adam lets drift
            assert torch.allclose(a, b, rtol=1e-3), key
    assert sum("seconds" in row and "loss" not in row for row in log_of(tmp_path / "two")) == 1


def test_a_run_of_two_processes_killed_in_mid_epoch_resumes_as_one(tmp_path, cloud_folder, driver, monkeypatch):
    args = ["--data", cloud_folder, "--log-every", 1, "--batch-size", 2, "--lr", "1e-3", "--precision", "fp32", "--save-minutes", 0,
            "--steps", 18]  # 6 an epoch; two processes agree to save at step 16
    whole = script(driver, *args, "--out", tmp_path / "whole")
    monkeypatch.setenv("DIE_AT", "17")
    assert script(driver, *args, "--out", tmp_path / "cut", processes=2).returncode != 0
    monkeypatch.delenv("DIE_AT")
    resumed = script(driver, *args, "--out", tmp_path / "cut", "--resume")
    assert whole.returncode == 0 and resumed.returncode == 0 and "at step 16" in resumed.stdout, whole.stderr + resumed.stderr
    first, second = ([row["loss"] for row in log_of(tmp_path / name) if "loss" in row] for name in ("whole", "cut"))
    assert len(first) == 18 and first == pytest.approx(second, rel=0.05)  # means of the epoch so far: a lost share would halve them


def test_an_error_in_one_process_ends_all_with_its_message(tmp_path, cloud_folder, driver):
    done = script(driver, "--data", cloud_folder, "--lr", "1e-3", "--steps", 6, "--out", tmp_path / "x", "--crash", processes=2)
    assert done.returncode != 0 and "process 1 found a bad cloud" in done.stderr


# -- schedules --------------------------------------------------------------------------------------------------------

def test_schedules_at_their_ends_and_middle():
    import train_teacher
    long = train_teacher.PUBLISHED_STEPS
    assert train_teacher.temperature(0, long) == 1 and train_teacher.temperature(100_000, long) == 0.0625
    assert train_teacher.temperature(50_000, long) == pytest.approx((1 + 0.0625) / 2)
    assert train_teacher.temperature(2 * long, 2 * long) == 0.0625
    assert train_teacher.kl_weight(10_000, long) == 0 and train_teacher.kl_weight(110_000, long) == pytest.approx(0.1)
    assert train_teacher.kl_weight(60_000, long) == pytest.approx(0.05)
    short = long // 100
    assert train_teacher.temperature(500, short) == pytest.approx(train_teacher.temperature(50_000, long), rel=1e-3)
    assert train_teacher.kl_weight(600, short) == pytest.approx(0.05, rel=1e-3)
    rate = lambda step: act.learning_rate(step, 1000, 1e-3, 1e-6, warmup=50)
    assert rate(0) == 1e-6 and rate(50) == pytest.approx(1e-3) and rate(1000) == pytest.approx(1e-6)
    assert rate(525) == pytest.approx((1e-3 + 1e-6) / 2)
    assert act.learning_rate(100, 1000, 1e-3, 1e-6, warmup=10_000) == pytest.approx(1e-3)  # warm-up: a tenth of the run at most


def test_weight_decay_spares_vectors_biases_and_tokens():
    teacher = act.Teacher(act.TeacherConfig(num_group=4, group_size=4, encoder_dims=8, tokens_dims=8, decoder_dims=8, num_tokens=16, num_prompt=2,
                                            trunk=act.TrunkConfig(width=16, depth=2, num_heads=1, mlp_hidden=16)))
    names = {id(p): name for name, p in teacher.named_parameters()}
    decayed, still = ({names[id(p)] for p in group["params"]} for group in act.adamw(teacher, 1e-3, 0.1).param_groups)
    assert {"codebook", "visual_prompt_pos", "deep_prompt_pos", "proj_pre.weight"} <= decayed
    assert {"visual_prompt_token", "deep_prompt_tokens", "proj_pre.bias", "dgcnn_1.layer1.1.weight"} <= still
    assert not any(name.startswith("trunk.") for name in decayed | still)


# -- bad input to the scripts -----------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ("train_teacher.py", ["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    ("train_teacher.py", ["--nonsense"], "unrecognized arguments: --nonsense"),
    ("train_teacher.py", ["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    ("train_teacher.py", ["--size", "huge"], "argument --size: invalid choice: 'huge' (choose from 'auto', 'tiny', 'small', 'base')"),
    ("train_teacher.py", ["--epochs", "-1"], "--epochs must not be negative, found -1"),
    ("train_teacher.py", ["--lr", "nan"], "--lr must not be negative, found nan"),
    ("train_teacher.py", ["--device", "tpu"], "--device tpu: wanted auto, cpu, cuda or cuda:N"),
    ("train_teacher.py", ["--data", "{tmp}/absent"], "{tmp}/absent: no such folder"),
    ("train_teacher.py", ["--weights", "vit_of_nobody"], "vit_of_nobody: neither a file nor one of the known names: {names}"),
    ("train_student.py", ["--teacher", "{tmp}/absent.pt"], "{tmp}/absent.pt: no such file"),
    ("train_student.py", ["--mask-ratio", "1.5"], "--mask-ratio must lie between 0 and 1, found 1.5"),
    ("train_student.py", ["--target", "pixels"], "argument --target: invalid choice: 'pixels' (choose from 'teacher', 'coordinates', 'codes')"),
]


@pytest.mark.parametrize("name, args, message", BAD_ARGUMENTS)
def test_a_bad_argument_is_one_line_and_code_2(tmp_path, name, args, message, capfd, monkeypatch):
    fill = lambda text: text.replace("{tmp}", str(tmp_path)).replace("{names}", ", ".join(act.pretrained_names()))
    module = __import__(name.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "out"), *map(fill, args)])
    with pytest.raises(SystemExit) as stop:
        act.run_script(module.main)
    assert stop.value.code == 2
    assert capfd.readouterr().err == f"error: {fill(message)}\n"
    assert not (tmp_path / "out").exists()


# -- linear SVM -------------------------------------------------------------------------------------------------------

def test_linear_svm_meets_the_optimality_condition_of_its_objective():
    """At the minimum the gradient w - 2 C sum_i y_i x_i max(0, 1 - y_i w.x_i) vanishes, the intercept included."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    x[:, 0] += labels
    w = act.linear_svm(x, labels, 3, C=0.5)
    rows = torch.cat([x, torch.ones(60, 1)], dim=1).double()
    y = 2.0 * F.one_hot(labels, 3) - 1
    gradient = w - rows.T @ (y * (1 - y * (rows @ w)).clamp_min(0))
    assert gradient.abs().max() < 1e-3


def test_svm_accuracy_is_right_on_separable_features_and_near_chance_on_noise():
    labels = torch.arange(240) % 4
    noise = torch.randn(240, 8, generator=torch.Generator().manual_seed(0))
    halves = (labels[:120], noise[120:], labels[120:])
    assert act.svm_accuracy((noise + 20 * F.one_hot(labels, 8))[:120], labels[:120],
                            (noise + 20 * F.one_hot(labels, 8))[120:], labels[120:])[0] == 100
    assert 10 < act.svm_accuracy(noise[:120], *halves)[0] < 45
    assert act.svm_accuracy(noise[:120], *halves) == act.svm_accuracy(noise[:120], *halves)


def test_svm_accuracy_knows_no_scale_and_chooses_c_without_the_test_features():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(160) % 4
    x = torch.randn(160, 6, generator=generator) + 1.5 * F.one_hot(labels, 6)
    train, test = (x[:100], labels[:100]), (x[100:], labels[100:])
    accuracy, C = act.svm_accuracy(*train, *test)
    scaled = [t * torch.logspace(0, 3, 6) + 7 for t in (x[:100], x[100:])]
    assert act.svm_accuracy(scaled[0], labels[:100], scaled[1], labels[100:]) == (pytest.approx(accuracy), C)
    assert act.svm_accuracy(*train, torch.zeros(60, 6), labels[100:])[1] == C


# -- what can go wrong while training ---------------------------------------------------------------------------------

@pytest.fixture
def small_run(tmp_path, cloud_set):
    """A student's Run of a few steps in `tmp_path`, with the loss to train it by."""
    @dataclass
    class Config(act.RunConfig):
        out: str = act.flag(str(tmp_path / "run"), "")

    config = replace(Config(), steps=4, batch_size=4, lr=1e-3)
    sizes = act.StudentConfig(num_group=8, group_size=8, width=32, depth=1, num_heads=1, encoder_dims=32, target_dim=24, decoder_depth=1)

    def loss(net, step, indices, generator, share):
        xyz, _ = cloud_set.draw(indices, 64, generator)
        neighborhood, center = act.group_points(xyz, 8, 8)
        return net(neighborhood, center, act.random_mask(center, 0.5, generator)).square().mean(), {}
    return act.Run(config, act.Student(sizes), cloud_set, 0.05), loss


@pytest.fixture(scope="module")
def cloud_set():
    return act.synthetic_clouds(1, seed=4, num_points=100)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(small_run, cloud_set):
    run, loss = small_run
    run.save()
    before = run.checkpoint.read_bytes()

    def bad(net, step, *rest, **more):
        value, parts = loss(net, step, *rest, **more)
        return (value * math.nan if step == 2 else value), parts
    with pytest.raises(ValueError, match=r"not finite at step 2 \(clouds .*lower --lr.*last good checkpoint is"):
        run.train(lambda step: dict(lr=1e-3), bad)
    assert run.checkpoint.read_bytes() == before


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(small_run, monkeypatch):
    run, _ = small_run
    run.save()
    before, names = run.checkpoint.read_bytes(), sorted(p.name for p in run.out.iterdir())

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.save()
    assert run.checkpoint.read_bytes() == before and sorted(p.name for p in run.out.iterdir()) == names


def test_an_earlier_run_is_set_aside_not_overwritten(small_run):
    run, loss = small_run
    run.train(lambda step: dict(lr=1e-3), loss)
    before = run.checkpoint.read_bytes()
    again = act.Run(run.config, run.model, act.synthetic_clouds(1, seed=4, num_points=100), 0.05)
    assert not again.checkpoint.exists()
    assert [p.read_bytes() for p in run.out.glob("earlier-*/last.pt")] == [before]


def test_an_epoch_takes_every_cloud_once_in_an_order_of_its_own_that_is_drawn_once(small_run, cloud_set, monkeypatch):
    run, loss = small_run
    run.total, draw, drawn, taken = 2 * run.per_epoch, torch.randperm, [], []
    monkeypatch.setattr(torch, "randperm", lambda n, **options: drawn.append(n) or draw(n, **options))

    def noting(net, step, indices, *rest):
        taken.append(indices.tolist())
        return loss(net, step, indices, *rest)
    run.train(lambda step: dict(lr=1e-3), noting)
    assert drawn.count(len(cloud_set)) == 2
    first, second = ([i for batch in half for i in batch] for half in (taken[: run.per_epoch], taken[run.per_epoch :]))
    assert len(set(first)) == len(set(second)) == run.per_epoch * run.batch and first != second


def test_a_finished_run_that_is_resumed_leaves_its_log_as_it_was(small_run, cloud_set):
    run, loss = small_run
    run.train(lambda step: dict(lr=1e-3), loss)
    run.close(figure=1.0)
    before = run.log.read_bytes()
    again = act.Run(replace(run.config, resume=True), run.model, cloud_set, 0.05)
    again.train(lambda step: dict(lr=1e-3), loss)
    again.close(figure=1.0)
    assert again.step == 4 and run.log.read_bytes() == before and before.count(b"figure") == 1


def test_no_step_reads_a_value_on_the_host(small_run):
    """On a GPU each such read would wait for all that is queued there."""
    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    run, _ = small_run
    run.model.train()
    xyz = torch.randn(4, 64, 3)

    def loss(net, step, indices, generator, share):
        mask = torch.tensor([True, False] * 4).expand(4, 8)
        return net(*act.group_points(xyz, 8, 8), mask).square().mean(), {}
    with Reads() as reads:
        run._update(loss, torch.arange(4), lr=1e-3)
        assert reads.count == 0 and run.step == 1
        run.sums["loss"].item()
        assert reads.count == 1


def test_a_gpus_loss_is_read_once_for_each_line_of_the_log(small_run, monkeypatch):
    run, _ = small_run
    run.config, run.device, reads, means = replace(run.config, log_every=2), torch.device("cuda"), [], run._means

    def update(loss, indices, lr):
        run.step += 1
        run.sums["loss"] = run.sums.get("loss", 0) + torch.tensor(float(run.step))
    monkeypatch.setattr(run, "_update", update)
    monkeypatch.setattr(run, "_means", lambda indices: reads.append(run.step) or means(indices))
    run.train(lambda step: dict(lr=1e-3), None)
    assert reads == [2, 4] and [(row["step"], row["loss"]) for row in log_of(run.out)] == [(2, 1.5), (4, 2.5)]


def test_an_unwritable_folder_is_reported_before_training(tmp_path, cloud_set):
    (tmp_path / "file").write_text("")
    config = replace(act.RunConfig(), out=str(tmp_path / "file" / "run"), steps=1, batch_size=2, lr=1e-3)
    with pytest.raises(ValueError, match="--out .*file/run: cannot be written"):
        act.Run(config, act.Student(act.StudentConfig(num_group=8, group_size=8, width=32, depth=1, num_heads=1, encoder_dims=32)), cloud_set, 0.05)


def test_fewer_distinct_points_than_patches_is_an_error_that_names_the_cloud():
    points = torch.rand(5, 3).repeat(20, 1)
    clouds = act.Clouds(points, torch.tensor([0, 100]), ["few.ply"])
    with pytest.raises(ValueError, match="few.ply: has 5 distinct points, wanted at least the 8 patches"):
        act.check_distinct(clouds, 8)
    act.check_distinct(clouds, 5)


def test_three_lines_of_python_and_numpy_in_and_out(tmp_path):
    sizes = act.StudentConfig(num_group=8, group_size=8, width=32, depth=1, num_heads=1, encoder_dims=32)
    act.save({"kind": "Student", "config": asdict(sizes), "model": act.Student(sizes).state_dict()}, tmp_path / "last.pt")
    act.write_ply(tmp_path / "scan.ply", np.random.default_rng(0).normal(size=(200, 3)))
    student = act.load(tmp_path / "last.pt")
    cloud = act.read_cloud(tmp_path / "scan.ply")[None]
    tokens = student.encode(cloud)
    assert isinstance(tokens, np.ndarray) and tokens.shape == (1, 9, 32)
    assert np.array_equal(tokens, student.encode(torch.from_numpy(cloud)).detach().numpy())


# =====================================================================================================================
# finetune.py
# =====================================================================================================================

FINE_SIZES = dict(num_group=8, group_size=8, width=24, depth=3, num_heads=2, encoder_dims=24)
DATA_KINDS = ("sphere", "table", "mug")


def write_npz(path, per_class=6, points=200):
    """A small labelled set of embedded shapes."""
    made = [(act.synthetic_cloud(kind, points, np.random.default_rng([c, i]))[0], c) for c, kind in enumerate(DATA_KINDS) for i in range(per_class)]
    np.savez(path, points=np.stack([m[0] for m in made]).astype(np.float32), labels=np.array([m[1] for m in made]), classes=np.array(DATA_KINDS))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a student's checkpoint and a small labelled set."""
    root = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    student = act.Student(act.StudentConfig(**FINE_SIZES, target_dim=12))
    act.save(dict(kind="Student", config=asdict(student.config), model=student.state_dict()), root / "student.pt")
    write_npz(root / "set.npz")
    return root


def run(place, monkeypatch, capsys, *flags):
    """The script's own main -> what it printed."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--device", "cpu", "--size", "tiny", *map(str, flags)])
    finetune.main()
    return capsys.readouterr().out


TINY = ("--data", "set.npz", "--checkpoint", "student.pt", "--points", 128, "--batch-size", 6, "--epochs", 1)


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def options(**changed):
    return finetune.Config(**{"size": "tiny", "points": 128, "batch_size": 4, "augment": "none", "checkpoint": "none", **changed})


# -- metrics ----------------------------------------------------------------------------------------------------------

def test_accuracy_and_iou_of_a_hand_worked_case():
    truth, predicted = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 0, 3])
    matrix = finetune.confusion(truth, predicted, 5)
    assert matrix.tolist() == [[2, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5, [0, 0, 0, 1, 0], [0] * 5]
    overall, mean = finetune.accuracy(matrix)
    assert overall == pytest.approx(100 * 4 / 6) and mean == pytest.approx(100 * (2 / 3 + 1 / 2 + 1) / 3)
    each = finetune.iou(matrix).tolist()
    assert each[:2] + each[3:4] == pytest.approx([100 * 2 / 4, 100 / 3, 100]) and np.isnan(each[2]) and np.isnan(each[4])


def test_metrics_equal_a_count_by_sets():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 6, 300), rng.integers(0, 6, 300)
    matrix = finetune.confusion(truth, predicted, 6)
    assert finetune.accuracy(matrix)[0] == pytest.approx(100 * np.mean(truth == predicted))
    assert finetune.accuracy(matrix)[1] == pytest.approx(100 * np.mean([np.mean(predicted[truth == c] == c) for c in range(6)]))
    for c, value in enumerate(finetune.iou(matrix).tolist()):
        a, b = set(np.flatnonzero(truth == c)), set(np.flatnonzero(predicted == c))
        assert value == pytest.approx(100 * len(a & b) / len(a | b))


def test_shape_iou_of_a_hand_worked_case_and_an_absent_part_counts_one():
    truth, predicted = torch.tensor([4, 4, 4, 5, 5]), torch.tensor([4, 4, 5, 5, 5])
    assert finetune.shape_iou(truth, predicted, (4, 6)) == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    assert finetune.shape_iou(truth, predicted, (4, 7)) == pytest.approx(100 * (2 / 3 + 2 / 3 + 1) / 3)
    assert finetune.shape_iou(truth, torch.tensor([4, 4, 4, 5, 9]), (4, 6)) == pytest.approx(100 * (1 + 1 / 2) / 2)  # a foreign part


def test_shape_iou_equals_a_loop_over_sets():
    rng = np.random.default_rng(1)
    for _ in range(20):
        truth, predicted, each = rng.integers(3, 6, 12), rng.integers(3, 7, 12), []
        for part in range(3, 8):
            a, b = set(np.flatnonzero(truth == part)), set(np.flatnonzero(predicted == part))
            each.append(len(a & b) / len(a | b) if a | b else 1)
        assert finetune.shape_iou(torch.tensor(truth), torch.tensor(predicted), (3, 8)) == pytest.approx(100 * np.mean(each))


def test_parts_are_averaged_over_instances_and_over_categories(monkeypatch):
    clouds = finetune.select(finetune.compositions(act.synthetic_clouds(2, num_points=64)), [0, 1, 2])  # two of one class, one of another
    task = finetune.Parts(options(task="parts", points=32), torch.device("cpu"), clouds, clouds)
    first = [task.ranges[label][0] for label in task.test.labels]
    truth = torch.tensor(first)[:, None].expand(-1, 4)
    wrong = truth.clone()
    wrong[2] += 1  # cloud 2: IoU 0 of both its parts, the others 1
    monkeypatch.setattr(task, "answers", lambda model, indices: (None, truth, wrong))
    figures = task.evaluate(None)
    parts = task.ranges[2 - 1][1] - task.ranges[1][0]
    third = 100 * (parts - 2) / parts
    assert figures["instance_miou"] == pytest.approx((200 + third) / 3) and figures["class_miou"] == pytest.approx((100 + third) / 2)
    assert figures["accuracy"] == pytest.approx(100 * 2 / 3)


# -- readers ----------------------------------------------------------------------------------------------------------

def arrays(n=4, points=40, columns=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, points, columns)).astype(np.float32)


def opened(path, **flags):
    return finetune.open_labelled(finetune.Config(data=str(path), **flags))


def write_h5(path, array, label, name="data"):
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[name], file["label"] = array, label


@pytest.mark.parametrize("variant, folder, file", [
    ("OBJ_BG", "main_split", "objectdataset"), ("OBJ_ONLY", "main_split_nobg", "objectdataset"),
    ("PB_T50_RS", "main_split", "objectdataset_augmentedrot_scale75")])
def test_scanobjectnn_is_read_as_stored_by_variant(tmp_path, variant, folder, file):
    for number, (where, what) in enumerate(finetune.SCAN_FILES.values()):
        for split in ("training", "test"):
            write_h5(tmp_path / where / f"{split}_{what}", arrays(seed=number) + 7, np.array([0, 14, 1, 2], np.int32))
    for path in (tmp_path, tmp_path / folder, tmp_path / folder / f"training_{file}.h5"):
        name, train, test = opened(path, variant=variant)
        assert name == "ScanObjectNN" and not train.normalized and len(train.classes) == 15 and len(test) == 4
        number = list(finetune.SCAN_FILES).index(variant)
        assert torch.equal(train[1], torch.from_numpy(arrays(seed=number)[1] + 7))
        assert train.labels.tolist() == [0, 14, 1, 2]
        assert finetune.settle(finetune.Config(task="classify", points=512), name, 0).augment == "rotate"
    drawn, _ = train.draw(torch.tensor([0]), 40)
    assert drawn.mean() > 6  # not normalised


def test_h5_pair_is_read_and_normalised(tmp_path):
    write_h5(tmp_path / "mine_train.h5", arrays(), np.array([[0], [1], [2], [1]], np.uint8))
    write_h5(tmp_path / "mine_test.h5", arrays(2, columns=6), np.array([0, 1], np.uint8))
    _, train, test = opened(tmp_path)
    assert train.normalized and train.labels.tolist() == [0, 1, 2, 1] and test.classes == ["class 0", "class 1", "class 2"]
    assert test.points.shape == (80, 3)


def write_modelnet(root):
    """Two classes in the published .txt layout."""
    root.mkdir(exist_ok=True)
    (root / "modelnet40_shape_names.txt").write_text("airplane\nnight_stand\n")
    (root / "modelnet10_train.txt").write_text("nothing_0001\n")
    for split, names in (("train", ["airplane_0001", "night_stand_0002"]), ("test", ["night_stand_0003"])):
        (root / f"modelnet40_{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            (root / name[:-5]).mkdir(exist_ok=True)
            np.savetxt(root / name[:-5] / f"{name}.txt", arrays(columns=6, seed=i)[0], delimiter=",")
    return root


def test_modelnet_txt_root_and_its_augmentation(tmp_path):
    name, train, test = opened(write_modelnet(tmp_path / "m"))
    assert name == "ModelNet40" and train.names == ["airplane_0001", "night_stand_0002"] and train.labels.tolist() == [0, 1]
    assert test.classes == ["airplane", "night_stand"] and test.labels.tolist() == [1]
    assert torch.allclose(train[0], torch.from_numpy(act.normalize(arrays(columns=6)[0][:, :3])), atol=1e-5)
    assert finetune.settle(finetune.Config(points=512), name, 0).augment == "scale_translate"


def dat(n=3, protocol=4):
    return pickle.dumps([[a for a in arrays(n, columns=6)], [np.array([i], np.int32) for i in range(n)]], protocol)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_dat_cache_is_read_under_old_and_new_numpy_names(tmp_path, protocol):
    old = dat(protocol=protocol).replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if protocol < 4 else dat()
    (tmp_path / "modelnet40_train_8192pts_fps.dat").write_bytes(old)
    (tmp_path / "modelnet40_test_8192pts_fps.dat").write_bytes(dat(protocol=protocol))
    (tmp_path / "modelnet40_shape_names.txt").write_text("a b c")
    name, train, test = opened(tmp_path)
    assert name == "ModelNet40" and train.labels.tolist() == [0, 1, 2] and test.classes == ["a", "b", "c"]
    assert torch.equal(train[2], torch.from_numpy(arrays(3, columns=6)[2][:, :3]))


def test_pickle_of_python_2_is_read(tmp_path):
    # protocol 2 as Python 2 wrote it: an array's bytes are a str, opcode U
    data = np.arange(3, dtype="<f4").tobytes()
    raw = (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85U\x01b\x87R(K\x01K\x03\x85cnumpy\ndtype\n"
           b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(data)]) + data + b"tb.")
    (tmp_path / "a.pkl").write_bytes(raw)
    assert finetune.read_pickle(tmp_path / "a.pkl").tolist() == [0, 1, 2]


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    for i, (function, args, name) in enumerate(((os.mkdir, (str(tmp_path / "ran"),), r"(posix|nt)\.mkdir"),
                                                (eval, ("__import__('os').mkdir('ran')",), r"(builtins|__builtin__)\.eval"))):
        path = tmp_path / f"{i}.dat"
        path.write_bytes(pickle.dumps([[np.zeros((3, 3)), Evil(function, *args)], [0]], protocol))
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: refers to {name}, wanted arrays and plain values only$"):
            finetune.read_pickle(path)
    assert not (tmp_path / "ran").exists() and not Path("ran").exists()


def test_pickled_array_of_objects_is_refused(tmp_path):
    for i, array in enumerate((np.array([object], object), np.zeros(3, "V8"), np.zeros(2, "f4,O"), np.array(["a"]))):
        (tmp_path / f"{i}.pkl").write_bytes(pickle.dumps(array))
        with pytest.raises(ValueError, match=r"\d\.pkl: (holds an array of type '.+', wanted numbers|refers to builtins\.object, )"):
            finetune.read_pickle(tmp_path / f"{i}.pkl")


def test_pickled_numbers_keep_type_shape_order_and_bytes(tmp_path):
    stored = [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">i4"), np.array([True, False]), np.float32(2.5)]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(stored, protocol))
        for a, b in zip(finetune.read_pickle(tmp_path / "a.pkl"), stored):
            assert a.dtype.str[1:] == b.dtype.str[1:] and np.array_equal(a, b)  # numpy swaps bytes as it unpickles


@pytest.mark.parametrize("cut", [0, 1, 10, 60, 200, -1])
def test_broken_pickle_is_a_mistake_that_names_the_file(tmp_path, cut):
    (tmp_path / "a.dat").write_bytes(dat()[:cut])
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/a.dat: ")):
        finetune.read_pickle(tmp_path / "a.dat")


def test_off_folder_is_read(tmp_path):
    tetrahedron = "OFF\n4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
    for label in ("bed", "desk"):
        for split in ("train", "test"):
            (tmp_path / label / split).mkdir(parents=True)
            (tmp_path / label / split / f"{label}_1.off").write_text(tetrahedron)
    _, train, test = opened(tmp_path)
    assert train.classes == ["bed", "desk"] and train.labels.tolist() == [0, 1] == test.labels.tolist()


def test_npz_is_split_by_a_hash_or_by_its_own_keys(tmp_path, place):
    _, train, test = opened(place / "set.npz")
    again = opened(place / "set.npz")[1]
    assert (len(train), len(test), train.classes) == (15, 3, list(DATA_KINDS)) and train.names == again.names
    assert not set(train.names) & set(test.names)
    stored = np.load(place / "set.npz")
    for clouds in (train, test):
        for i, name in enumerate(clouds.names):
            k = int(name[-5:])
            assert np.array_equal(clouds[i].numpy(), stored["points"][k]) and clouds.labels[i] == stored["labels"][k]
    np.savez(tmp_path / "own.npz", train_points=arrays(5), train_labels=np.arange(5), test_points=arrays(2), test_labels=np.array([0, 1]))
    _, train, test = opened(tmp_path / "own.npz")
    assert (len(train), len(test), len(test.classes)) == (5, 2, 5)


@pytest.mark.parametrize("change, message", [
    (dict(labels=np.arange(3)), "found 4 clouds and 3 labels of type int64, wanted some clouds and a whole number for each"),
    (dict(labels=np.array([0, 1, 2, -1])), "found labels -1 to 2, wanted 0 to 2"),
    (dict(labels=np.array([0.5, 1, 2, 3])), "found 4 clouds and 4 labels of type float64, wanted some clouds and a whole number for each"),
    (dict(classes=np.array(["a", "b"])), "found labels 0 to 3, wanted 0 to 1"),
    (dict(points=arrays(columns=2)), "cloud 0 has shape (40, 2), wanted numbers (points, 3)"),
    (dict(points=np.where(np.arange(4)[:, None, None] == 2, np.nan, arrays())), "cloud 2 has coordinates that are NaN or infinite"),
    (dict(points=None), "found labels, wanted points and labels, or train_points, train_labels, test_points and test_labels"),
    (dict(points=np.array([object()] * 4)), "Object arrays cannot be loaded when allow_pickle=False"),
])
def test_broken_npz_is_a_mistake_that_names_it(tmp_path, change, message):
    content = {"points": arrays(), "labels": np.arange(4), **change}
    np.savez(tmp_path / "a.npz", **{k: v for k, v in content.items() if v is not None})
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/a.npz: {message}") + "$"):
        opened(tmp_path / "a.npz")


def test_other_broken_data_is_a_mistake_that_names_it(tmp_path):
    def mistake(path, message, **flags):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            opened(path, **flags)

    mistake(tmp_path / "none", f"--data {tmp_path}/none: no such file or folder")
    (tmp_path / "a.csv").write_text("1")
    mistake(tmp_path / "a.csv", f"--data {tmp_path}/a.csv: wanted a folder, an .npz or the …train….h5 of a pair")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no")
    mistake(tmp_path / "a.npz", f"{tmp_path}/a.npz: ")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(6):
        np.save(flat / f"{i}.npy", arrays()[0])
    mistake(flat, f"--data {flat}: the clouds have no classes, wanted one sub-folder for each")
    root = write_modelnet(tmp_path / "m")
    os.unlink(root / "night_stand" / "night_stand_0002.txt")
    mistake(root, f"{root}/modelnet40_train.txt: lists night_stand_0002, wanted the file {root}/night_stand/night_stand_0002.txt")
    os.unlink(root / "modelnet40_train.txt")
    mistake(root, f"{root}/modelnet40_train.txt: no such file")
    (root / "modelnet40_train_8192pts_fps.dat").write_bytes(pickle.dumps({"a": 1}))
    mistake(root, f"{root}/modelnet40_train_8192pts_fps.dat: found a dict, wanted [list of clouds, list of labels]")


def test_broken_h5_is_a_mistake_that_names_it(tmp_path):
    def mistake(path, message, **flags):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            opened(path, **flags)

    train, test = tmp_path / "x_train.h5", tmp_path / "x_test.h5"
    write_h5(train, arrays(), np.arange(4), name="points")
    mistake(tmp_path, f"{train}: found label, points, wanted data and label")
    write_h5(train, arrays(), np.arange(4))
    mistake(tmp_path, f"{test}: no such file")
    test.write_bytes(b"not hdf5")
    mistake(tmp_path, f"{test}: ")
    write_h5(tmp_path / "y_train.h5", arrays(), np.arange(4))
    mistake(tmp_path, f"--data {tmp_path}: found x_train.h5, y_train.h5, wanted one; give its own path")
    (tmp_path / "s" / "main_split").mkdir(parents=True)
    mistake(tmp_path / "s", f"{tmp_path}/s/main_split/training_objectdataset.h5: no such file", variant="OBJ_BG")


def write_shapenet_part(root, part=lambda first, last, n: np.arange(n) % (last - first) + first):
    (root / "train_test_split").mkdir(parents=True, exist_ok=True)
    (root / "synsetoffset2category.txt").write_text("Bag\t001\nMug\t002\n")
    lists = {"train": [("001", "a"), ("002", "b")], "val": [("002", "c")], "test": [("001", "d"), ("002", "e")]}
    for split, entries in lists.items():
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps([f"shape_data/{s}/{m}" for s, m in entries]))
        for synset, model in entries:
            (root / synset).mkdir(exist_ok=True)
            n = 90 + ord(model)
            first, last = {"001": (4, 6), "002": (36, 38)}[synset]
            values = np.column_stack([arrays(1, n, 6, ord(model))[0], part(first, last, n)])
            np.savetxt(root / synset / f"{model}.txt", values, fmt="%.6f")
    return root


def test_shapenet_part_is_read_as_published(tmp_path):
    train, test = finetune.read_shapenet_part(write_shapenet_part(tmp_path))
    assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [0, 1] and train.classes == ["Bag", "Mug"]
    assert train.class_parts == [(4, 6), (36, 38)] and len(train[2]) == 90 + ord("c")
    assert torch.allclose(train[0], torch.from_numpy(arrays(1, 90 + ord("a"), 6, ord("a"))[0][:, :3]), atol=1e-5)
    assert set(test.parts[: test.offsets[1]].tolist()) == {4, 5} and set(test.parts[test.offsets[1]:].tolist()) == {36, 37}


def test_broken_shapenet_part_is_a_mistake_that_names_it(tmp_path):
    def mistake(message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            finetune.read_shapenet_part(tmp_path)

    mistake(f"{tmp_path}/synsetoffset2category.txt: no such file")
    write_shapenet_part(tmp_path, lambda first, last, n: np.full(n, last))
    mistake(f"{tmp_path}/001/a.txt: 7 columns, the last 6 to 6, wanted 7, the last a part of a Bag: 4 to 5")
    os.unlink(tmp_path / "001" / "a.txt")
    mistake(f"{tmp_path}/001/a.txt: no such file")
    (tmp_path / "train_test_split" / "shuffled_train_file_list.json").write_text("[")
    mistake(f"{tmp_path}/train_test_split/shuffled_train_file_list.json: ")
    (tmp_path / "synsetoffset2category.txt").write_text("Bag 001\nTeapot 003\n")
    mistake(f"{tmp_path}/synsetoffset2category.txt: found 'Teapot 003', wanted lines of a category of ShapeNetPart and its synset")


def write_s3dis(root, areas=(1, 5)):
    root.mkdir(exist_ok=True)
    for area in areas:
        rng = np.random.default_rng(area)
        xyz = rng.uniform(0, [1.6, 1.2, 2], (900, 3)) + 10
        np.save(root / f"Area_{area}_office_1.npy", np.column_stack([xyz, rng.uniform(0, 255, (900, 3)), (xyz[:, 2] > 11) * 12]))
    return root


def test_s3dis_areas_are_split(tmp_path):
    train, test = finetune.open_rooms(finetune.Config(data=str(write_s3dis(tmp_path))))
    assert [r.name for r in train] == ["Area_1_office_1"] and [r.area for r in test] == [5]
    assert train[0].xyz.shape == (900, 3) and set(train[0].labels) == {0, 12} and train[0].xyz.min() >= 10


def test_broken_s3dis_is_a_mistake_that_names_it(tmp_path):
    def mistake(message, **flags):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            finetune.open_rooms(finetune.Config(data=str(tmp_path), **flags))

    mistake(f"--data {tmp_path}: found no rooms, wanted Area_<number>_<room>.npy")
    write_s3dis(tmp_path)
    mistake("--area 6: found the areas [1, 5], wanted one of several", area=6)
    path = tmp_path / "Area_2_hall_1.npy"
    np.save(path, np.zeros((4, 6)))
    mistake(f"{path}: found an array of shape (4, 6), wanted (n, 7): x y z r g b label")
    np.save(path, np.full((4, 7), 13.0))
    mistake(f"{path}: found coordinates that are not finite or labels beyond 0 to 12, wanted neither")
    np.save(path, np.array([object()]), allow_pickle=True)
    mistake(f"{path}: ")


# -- what networks are given ------------------------------------------------------------------------------------------

def test_thinned_clouds_are_farthest_points_and_small_ones_stay():
    clouds = finetune.labelled("a", [arrays(1, n, seed=n)[0] for n in (300, 60, 128, 140)], np.zeros(4, int))
    thinned = finetune.thin(clouds, 128, "cpu")
    assert thinned.offsets.diff().tolist() == [150, 60, 128, 140]
    own = clouds[0][None]
    assert torch.equal(thinned[0], act.gather_points(own, act.farthest_point_sample(own, 150))[0])
    assert torch.equal(thinned[1], clouds[1]) and torch.equal(thinned[2], clouds[2])
    assert torch.equal(thinned[3].unique(dim=0), clouds[3].unique(dim=0))  # all of its points, in the order found
    xyz = finetune.first_points(thinned, torch.tensor([0, 1]), 128)
    assert torch.allclose(xyz[0], torch.from_numpy(act.normalize(thinned[0][:128].numpy())), atol=1e-6)
    assert torch.equal(xyz[1, :60], xyz[1, 60:120])


def test_published_numbers_of_points_are_kept():
    clouds = finetune.labelled("a", arrays(1, 2500), np.zeros(1, int))
    assert [len(finetune.thin(clouds, n, "cpu")[0]) for n in (1024, 2048)] == [1200, 2400]


def test_a_prediction_does_not_depend_on_the_batch(place):
    _, train, test = opened(place / "set.npz")
    task = finetune.Classification(options(), torch.device("cpu"), train, train)
    model = task.build(FINE_SIZES).eval()
    with torch.no_grad():
        together = model(finetune.first_points(task.test, torch.arange(5), 128))
        alone = torch.cat([model(finetune.first_points(task.test, torch.tensor([i]), 128)) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_augmentations_do_what_their_names_say():
    xyz = torch.from_numpy(arrays())
    turned = finetune.augment(xyz, "rotate", act.seeded("cpu", 0))
    assert torch.equal(turned[..., 1], xyz[..., 1]) and torch.allclose(turned.norm(dim=2), xyz.norm(dim=2), atol=1e-5)
    room = finetune.augment(xyz, "rotate", act.seeded("cpu", 0), "scene")
    assert torch.equal(room[..., 2], xyz[..., 2]) and not torch.allclose(room, xyz) and torch.allclose(room.norm(dim=2), xyz.norm(dim=2), atol=1e-5)
    assert finetune.augment(xyz, "none", None) is xyz
    scaled = finetune.augment(xyz, "scale_translate", act.seeded("cpu", 0), "parts")
    factor = (scaled[:, 1] - scaled[:, 0]) / (xyz[:, 1] - xyz[:, 0])
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), atol=1e-4) and (0.79 < factor).all() and (factor < 1.26).all()
    factor = finetune.augment(xyz, "scale_translate", act.seeded("cpu", 0)).diff(dim=1) / xyz.diff(dim=1)
    assert (factor[:, 0, 0] - factor[:, 0, 1]).abs().max() > 1e-3  # per axis


def test_episodes_are_reproducible_and_hold_what_was_asked(place):
    _, train, test = opened(place / "set.npz")
    a, b, c = (finetune.draw_episode(train, train, 2, 3, fold) for fold in (0, 0, 1))
    assert a[0].names == b[0].names and a[1].names == b[1].names and a[0].names != c[0].names
    assert a[0].labels.bincount().tolist() == [3, 3] and len(a[0].classes) == 2
    for clouds in a:
        for i, name in enumerate(clouds.names):
            k = train.names.index(name)
            assert torch.equal(clouds[i], train[k]) and clouds.classes[clouds.labels[i]] == train.classes[train.labels[k]]
    with pytest.raises(ValueError, match=r"^--way 2 --shot 9: only 0 classes have 9 training clouds and a test cloud$"):
        finetune.draw_episode(train, test, 2, 9, 0)


def test_embedded_compositions_have_all_their_parts_numbered_anew():
    clouds = act.synthetic_clouds(2, num_points=256)
    made = finetune.compositions(clouds)
    assert "sphere" not in made.classes and "chair" in made.classes and len(made) == 2 * len(made.classes)
    assert made.class_parts[0][0] == 0 and all(a[1] == b[0] for a, b in zip(made.class_parts, made.class_parts[1:]))
    for i, label in enumerate(made.labels.tolist()):
        own = made.parts[made.offsets[i] : made.offsets[i + 1]]
        first, last = made.class_parts[label]
        assert first <= own.min() and own.max() < last and made.names[i].startswith(made.classes[label])
        assert torch.equal(made[i], clouds[clouds.names.index(made.names[i])])


@pytest.mark.parametrize("seed", range(4))
def test_embedded_rooms_hold_objects_in_their_boxes_on_the_floor(seed):
    xyz, labels, boxes = finetune.synthetic_room(60, np.random.default_rng(seed))
    assert xyz.dtype == np.float32 and len(xyz) == len(labels) and {0, 1, 2} < set(labels.tolist()) and boxes
    inside = np.zeros(len(xyz), int)
    for i, (label, low, high) in enumerate(boxes):
        assert low[2] == 0
        inside += ((xyz > low - 0.06) & (xyz < high + 0.06)).all(1) & (labels == label)
        for _, b, t in boxes[:i]:  # no two overlap
            assert (high[:2] < b[:2]).any() or (t[:2] < low[:2]).any()
    assert (inside[labels > 2] >= 1).all()
    assert abs(xyz[labels == 1, 2]).max() < 0.06 and xyz[labels > 2].max() < 4.1


def test_training_blocks_are_centred_full_and_reproducible(tmp_path):
    rooms, _ = finetune.open_rooms(finetune.Config(data=str(write_s3dis(tmp_path))))
    blocks = finetune.Blocks(rooms, 256)
    assert len(blocks) == len(blocks.names) == 3
    xyz, labels = blocks.draw(1, np.random.default_rng(0))
    assert xyz.shape == (256, 3) and labels.shape == (256,) and xyz.dtype == np.float32
    assert abs(xyz[:, :2]).max() <= 0.5 + 1e-5 and xyz[:, 2].min() > 9.9  # z as it is
    assert np.array_equal(labels, (xyz[:, 2] > 11) * 12)
    assert np.array_equal(xyz, blocks.draw(1, np.random.default_rng(0))[0])
    with pytest.raises(ValueError, match="^Area_1_office_1: of 200 random blocks"):
        finetune.Blocks(rooms, 4000).draw(0, np.random.default_rng(0))


def test_a_block_holds_what_a_slow_search_finds():
    rng = np.random.default_rng(3)
    xyz = rng.uniform(0, [3, 2, 1], (700, 3)).astype(np.float32)
    drawn, _ = finetune.Blocks([finetune.Room(1, "r", xyz, np.zeros(700, np.uint8))], 60).draw(0, np.random.default_rng(5))
    for center in xyz:  # the block's centre is one of the points
        moved = xyz - np.append(center[:2], 0)
        if all((abs(moved - p) < 1e-5).all(1).any() for p in drawn[:5]):
            inside = moved[(abs(moved[:, :2]) <= 0.5).all(1)]
            assert len(inside) > 30 and all((abs(inside - p) < 1e-5).all(1).any() for p in drawn)
            return
    raise AssertionError("no point is the centre")


@pytest.mark.parametrize("width", [0.4, 1.0, 1.3, 4.0])
def test_test_blocks_cover_every_point(width):
    xyz = (np.random.default_rng(0).uniform(0, [width, 1.7, 2], (500, 3)) - 3).astype(np.float32)
    blocks, seen = finetune.room_blocks(xyz), np.zeros(500, int)
    for inside, origin in blocks:
        assert len(inside) and abs(xyz[inside, :2] - origin[:2]).max() <= 0.5 + 2e-3 and origin[2] == 0
        seen[inside] += 1
    assert seen.min() >= 1 and (width < 2 or seen.max() == 4 or seen.max() >= 4)


def test_every_point_is_labelled_and_votes_are_means():
    class Fixed:  # says class 1 with a certainty that the point's z tells
        config = act.SegmenterConfig(num_parts=2)
        parameters = lambda self: iter([torch.zeros(1)])
        eval = lambda self: lambda xyz, category: torch.stack([torch.zeros(xyz.shape[:2]), xyz[..., 2]], dim=-1)

    xyz = np.random.default_rng(0).uniform(-1, 1, (333, 3))
    votes = finetune.label_points(Fixed(), xyz, finetune.room_blocks(xyz), 50)
    assert torch.allclose(votes[:, 1], torch.from_numpy(1 / (1 + np.exp(-xyz[:, 2]))), atol=1e-6) and torch.allclose(votes.sum(1), torch.ones(333).double())


def test_class_weights_are_the_published_ones(tmp_path):
    train, test = finetune.open_rooms(finetune.Config(data=str(write_s3dis(tmp_path))))
    task = finetune.Scenes(options(task="scene", data=str(tmp_path)), torch.device("cpu"), train, test)
    few, many = sorted([(train[0].labels == 0).sum(), (train[0].labels == 12).sum()])
    assert sorted([task.weight[0].item(), task.weight[12].item()]) == pytest.approx([1, (many / few) ** (1 / 3)])


def test_loss_of_shares_adds_up_to_the_loss_of_the_batch(tmp_path):
    train, test = finetune.open_rooms(finetune.Config(data=str(write_s3dis(tmp_path))))
    task = finetune.Scenes(options(task="scene", data=str(tmp_path), points=64), torch.device("cpu"), train, test)
    model, indices = task.build(FINE_SIZES).eval(), torch.arange(3)
    loss = lambda share: task.loss(model, 0, indices, act.seeded("cpu", 0), share)[0].item()
    assert loss(slice(0, None, 2)) * 2 / 3 + loss(slice(1, None, 2)) / 3 == pytest.approx(loss(slice(None)), rel=1e-5)


# -- protocols and checkpoints ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", ["mlp3", "linear"])
def test_frozen_protocols_leave_the_encoder_bit_identical(place, monkeypatch, capsys, protocol):
    run(place, monkeypatch, capsys, *TINY, "--protocol", protocol, "--out", protocol)
    before, after = act.load(place / "student.pt"), act.load(place / protocol / "last.pt")
    assert after.config.head == protocol
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(value, after.encoder.state_dict()[name]), name


def test_what_is_loaded_and_what_is_fresh_is_said(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    task = finetune.Classification(options(checkpoint="student.pt"), torch.device("cpu"), *opened("set.npz")[1:])
    model = finetune.start_model(task.config, task.build, "cpu")
    n = len(model.encoder.state_dict())
    assert capsys.readouterr().out == (f"loaded the encoder, all {n} tensors, from the Student in student.pt; fresh: head; "
                                       "of the file not used: decoder, decoder_pos_embed, head, mask_token\n")
    assert model.config.num_group == 8 and model.config.group_size == 8
    act.export(act.load("student.pt"), tmp_path / "release.pth")
    finetune.start_model(options(checkpoint=str(tmp_path / "release.pth"), points=512), lambda sizes: task.build({**sizes, "num_heads": 2}), "cpu")
    assert f"all {n} tensors, from the Student" in capsys.readouterr().out
    state = torch.load(tmp_path / "release.pth")
    state["base_model"] = {k.replace("ACT_", "MAE_"): v for k, v in state["base_model"].items() if "cls_" not in k}
    torch.save(state, tmp_path / "mae.pth")
    finetune.start_model(options(checkpoint=str(tmp_path / "mae.pth")), task.build, "cpu")
    assert f"all {n - 2} tensors, from the Student in {tmp_path}/mae.pth; fresh: cls_token, cls_pos, head;" in capsys.readouterr().out
    finetune.start_model(options(), task.build, "cpu")
    assert re.fullmatch(r"from scratch: all \d+ tensors of the Classifier are fresh\n", capsys.readouterr().out)
    with pytest.raises(ValueError, match="^--checkpoint nothing.pt: no such file; train_student.py writes one, none starts from scratch$"):
        finetune.start_model(options(checkpoint="nothing.pt"), task.build, "cpu")


def test_the_head_does_not_depend_on_where_the_encoder_comes_from(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    task = finetune.Classification(options(), torch.device("cpu"), *opened("set.npz")[1:])
    a, b = (finetune.start_model(options(checkpoint="student.pt"), task.build, "cpu") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_flags_that_do_not_fit_together_are_refused():
    for changed, message in ((dict(fold="12"), "--fold must be all or 0 to 9, found '12'"),
                             (dict(task="parts", protocol="linear"), "--protocol linear: --task parts trains everything, wanted full"),
                             (dict(features="a.npz"), "--features wants --predict or --task svm beside it"), (dict(way=1), "--vote must not")):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            finetune.check(options(**changed))


# -- tasks through the script -----------------------------------------------------------------------------------------

def test_classify_votes_predicts_and_resumes(place, monkeypatch, capsys):
    out = run(place, monkeypatch, capsys, *TINY[:-1], 2, "--vote", 2, "--out", "whole")
    assert "augmentation scale_translate: last epoch overall" in out and "vote of 2" in out and "best epoch" in out
    *epochs, last = log(place / "whole")
    assert len(epochs) == 2 and {"loss", "accuracy", "mean_accuracy"} <= epochs[0].keys()
    assert last["accuracy"] == epochs[-1]["accuracy"] and last["best_accuracy"] == max(e["accuracy"] for e in epochs)
    assert {"vote_accuracy", "vote_mean_accuracy", "best_epoch"} <= last.keys() and (place / "whole" / "confusion.png").is_file()

    # a run that is stopped after one of two epochs and resumed ends where the whole run does
    class Stop(Exception):
        pass

    def interrupted(self):
        save(self)
        raise Stop

    save = act.Run.save
    monkeypatch.setattr(act.Run, "save", interrupted)
    with pytest.raises(Stop):
        run(place, monkeypatch, capsys, *TINY[:-1], 2, "--vote", 2, "--out", "half")
    monkeypatch.setattr(act.Run, "save", save)
    assert "resumed half/last.pt at step 2" in run(place, monkeypatch, capsys, *TINY[:-1], 2, "--vote", 2, "--out", "half", "--resume")
    a, b = act.load(place / "whole" / "last.pt"), act.load(place / "half" / "last.pt")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert {k: v for k, v in log(place / "half")[-1].items() if k != "seconds"} == {k: v for k, v in last.items() if k != "seconds"}

    (place / "clouds" / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.npy", "deep/b.npy")):
        np.save(place / "clouds" / name, 1e4 + 50 * act.synthetic_cloud("mug", 300, np.random.default_rng(i))[0])
    out = run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", "whole/last.pt", "--features", "f/features.npz")
    assert re.search(r"^a\.npy +(sphere|table|mug) +0\.\d{3} +(sphere|table|mug) 0\.\d{3}$", out, re.M) and "deep/b.npy" in out
    stored = np.load(place / "f" / "features.npz")
    assert stored["features"].shape == (2, 48) and stored["names"].tolist() == ["a.npy", "deep/b.npy"]
    alone = run(place, monkeypatch, capsys, "--predict", "clouds/a.npy", "--checkpoint", "whole/last.pt")
    assert re.search(r"a\.npy +(\w+ +0\.\d+)", alone)[1].split() == re.search(r"a\.npy +(\w+ +0\.\d+)", out)[1].split()
    run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", "student.pt", "--points", 128, "--features", "s.npz")
    with pytest.raises(ValueError, match="holds a Student, wanted a Classifier or Segmenter that finetune.py wrote"):
        run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", "student.pt")
    with pytest.raises(ValueError, match="^--predict nowhere: no clouds there"):
        run(place, monkeypatch, capsys, "--predict", "nowhere", "--checkpoint", "student.pt")
    with pytest.raises(ValueError, match=r"^--points 2: wanted at least \d+, for the checkpoint's \d+ patches of \d+ points"):
        run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", "whole/last.pt", "--points", 2)
    path, seen, group = released(place, release_names(build("Classifier", num_classes=5))), [], act.group_points
    monkeypatch.setattr(act, "group_points", lambda xyz, *sizes: seen.append((xyz.shape[1], *sizes)) or group(xyz, *sizes))
    run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", path, "--points", 512)
    assert set(seen) == {(512, 32, 32)}  # a patch for every 16 points, as the release fine-tunes


def test_fewshot_draws_episodes_or_reads_the_published_folds(place, monkeypatch, capsys):
    out = run(place, monkeypatch, capsys, *TINY, "--task", "fewshot", "--way", 2, "--shot", 3, "--out", "few")
    folds = log(place / "few")[-1]["folds"]
    assert len(folds) == 10 and re.search(r"2-way 3-shot: [\d.]+ ± [\d.]+ % over 10 folds, last epochs", out)
    assert log(place / "few")[-1]["accuracy"] == pytest.approx(np.mean(folds))
    assert log(place / "few")[-1]["accuracy_std"] == pytest.approx(np.std(folds, ddof=1))
    (place / "published" / "2way_3shot").mkdir(parents=True)
    episode = {split: [(act.synthetic_cloud(DATA_KINDS[c], 150, np.random.default_rng([c, i]))[0].repeat(2, axis=1), c, 30 + c) for c in (0, 1)
                       for i in range(3)] for split in ("train", "test")}
    (place / "published" / "2way_3shot" / "4.pkl").write_bytes(pickle.dumps(episode))
    out = run(place, monkeypatch, capsys, *TINY, "--data", "published", "--task", "fewshot", "--way", 2, "--shot", 3, "--fold", 4, "--out", "pub")
    assert "few-shot ModelNet40" in out and "over 1 folds" in out
    (place / "published" / "2way_3shot" / "4.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="^published/2way_3shot/4.pkl: found a list, wanted a dict with train and test$"):
        run(place, monkeypatch, capsys, *TINY, "--data", "published", "--task", "fewshot", "--way", 2, "--shot", 3, "--fold", 4, "--out", "pub")


def test_svm_agrees_with_scikit_learn_on_the_features_it_writes(place, monkeypatch, capsys):
    sklearn = pytest.importorskip("sklearn.svm")
    write_npz(place / "more.npz", per_class=60, points=160)
    run(place, monkeypatch, capsys, *TINY, "--data", "more.npz", "--task", "svm", "--out", "svm", "--features", "svm.npz")
    stored, result = np.load(place / "svm.npz"), log(place / "svm")[-1]
    n, x = 144, torch.from_numpy(stored["features"]).double()
    assert x.shape == (180, 48) and len(stored["names"]) == 180
    x = ((x - x[:n].mean(dim=0)) / (x[:n].std(dim=0) + 1e-6)).numpy()
    theirs = sklearn.LinearSVC(C=result["C"], dual=True, max_iter=200_000, tol=1e-6, random_state=0).fit(x[:n], stored["labels"][:n])
    assert abs(100 * theirs.score(x[n:], stored["labels"][n:]) - result["accuracy"]) <= 1


def test_parts_end_to_end_and_a_cloud_is_coloured(place, monkeypatch, capsys):
    write_shapenet_part(place / "shapenet")
    flags = ("--task", "parts", "--data", "shapenet", "--checkpoint", "student.pt", "--points", 128, "--batch-size", 2)
    out = run(place, monkeypatch, capsys, *flags, "--steps", 2, "--out", "parts")
    assert "fresh: head, label_conv, propagation; of the file not used: cls_pos, cls_token, decoder" in out and "instance mIoU" in out
    assert {"instance_miou", "class_miou", "accuracy"} <= log(place / "parts")[-1].keys() and (place / "parts" / "parts.png").is_file()
    (place / "Mug").mkdir()
    np.save(place / "Mug" / "mine.npy", arrays(1, 300)[0])
    out = run(place, monkeypatch, capsys, "--predict", "Mug", "--checkpoint", "parts/last.pt", "--out", "coloured")
    assert re.search(r"^mine\.npy +300  Mug part 3[67] \d+ %", out, re.M)
    stored = np.load(place / "coloured" / "mine.npy.npz")
    assert set(stored["labels"]) <= {36, 37} and np.allclose(stored["points"], arrays(1, 300)[0])
    assert np.allclose(act.read_points(place / "coloured" / "mine.npy.ply"), arrays(1, 300)[0], atol=1e-6)
    with pytest.raises(ValueError, match="none of the checkpoint's categories, wanted --category, or a folder named one of Bag, Mug$"):
        run(place, monkeypatch, capsys, "--predict", "Mug", "--category", "Teapot", "--checkpoint", "parts/last.pt")
    with pytest.raises(ValueError, match="the checkpoint holds a Segmenter, wanted a Student or Classifier"):
        run(place, monkeypatch, capsys, "--predict", "Mug", "--features", "x.npz", "--checkpoint", "parts/last.pt")


def test_scenes_end_to_end_and_a_room_is_coloured(place, monkeypatch, capsys):
    write_s3dis(place / "s3dis")
    out = run(place, monkeypatch, capsys, "--task", "scene", "--data", "s3dis", "--checkpoint", "student.pt", "--points", 128, "--batch-size", 2,
              "--steps", 2, "--out", "scene")
    assert re.search(r"^clutter +[\d.]+ +[\d.]+ +\d+$", out, re.M) and re.search(r"^beam +nan +nan +0$", out, re.M)
    last = log(place / "scene")[-1]
    assert last["miou"] == pytest.approx(np.mean([v for k, v in last.items() if k.startswith("iou_") and v is not None]))
    assert (place / "scene" / "scene.png").is_file() and "mIoU" in out
    np.save(place / "room.npy", np.load(place / "s3dis" / "Area_5_office_1.npy")[:, :3])
    out = run(place, monkeypatch, capsys, "--predict", "room.npy", "--checkpoint", "scene/last.pt", "--out", "coloured")
    assert re.search(r"^room\.npy +900  [a-z]+ \d+ %", out, re.M) and len(np.load(place / "coloured" / "room.npy.npz")["labels"]) == 900


def test_the_script_ends_a_mistake_with_one_line_and_code_2(place):
    done = subprocess.run([sys.executable, finetune.__file__, "--data", "nothing", "--checkpoint", "none"], cwd=place, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --data nothing: no such file or folder\n")
