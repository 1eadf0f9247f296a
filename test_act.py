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
import clouds as shapes
import training
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
        monkeypatch.setattr(training.Path, "read_text", lambda path: flags)
        config = training.resolve(training.RunConfig(), torch.device("cpu"), {"tiny": dict(epochs=3)})
        assert (config.precision, config.size, config.epochs) == (precision, "tiny", 3)
        assert training.resolve(training.RunConfig(precision="fp32"), torch.device("cpu"), {"tiny": {}}).precision == "fp32"


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
