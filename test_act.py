"""Tests of act.py: properties, plain formulas as oracles, public weights, model checkpoints.

    python -m pytest test_act.py                   # a minute on one core; no network, no GPU
    ACT_TEST_WEIGHTS=folder python -m pytest test_act.py -k real      # also real weight files

The plain (textbook) forms of act's operations stand here, once; bench.py times act beside them.
"""

import ast
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import act

torch.set_num_threads(1)  # clouds are tiny here: threads would only wait for one another
few = settings(deadline=None, max_examples=25, derandomize=True)
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in (
    "torch.jit.TracerWarning", "DeprecationWarning", "FutureWarning", "UserWarning")]
peer = partial(pytest.importorskip, exc_type=Exception)  # a library can be there and broken

# ---- Helpers, also of the other test files -------------------------------------------------------
def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)

def close(found, expected, rtol=1e-5, floor=0.0):
    """Largest difference, relative to the largest entry expected (or to `floor`)."""
    assert found.shape == expected.shape and found.isfinite().all()
    difference = (found - expected).abs().max().item()
    assert difference <= rtol * max(expected.abs().max().item(), floor), difference

def listed(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)

def equal(found, expected):
    """The same tensors, or tuples of them, to the bit."""
    for a, b in zip(listed(found), listed(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)

def same_with_gradients(ours, plain, inputs, rtol=1e-5):
    """Two forms of the same outputs agree, and so do gradients of a fixed random functional."""
    inputs, gradients = [t for t in inputs if t.requires_grad], []
    for outs in (listed(ours), listed(plain)):
        total = sum((out * randn(*out.shape, seed=7 + i)).sum() for i, out in enumerate(outs))
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for a, b in zip(listed(ours), listed(plain), strict=True):
        close(a, b, rtol)
    scale = max(g.abs().max().item() for g in gradients[1] if g is not None)
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        if b is not None:  # 0 but for rounding in front of a normalisation: measured by the rest
            close(a, b, rtol, floor=scale / 10)

def randomise(module, seed=0):
    """Parameters and statistics away from their start, no two alike; halves, exact in any file."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            scale = 0.5 if p.ndim < 2 else max(1, p[0].numel()) ** -0.5
            p.add_(randn(*p.shape, seed=seed + i) * scale).copy_(p.half())
        for i, (name, buffer) in enumerate(module.named_buffers()):
            if "running" in name:
                buffer.add_(randn(*buffer.shape, seed=seed + i).abs() * 0.3)
    return module

def train_steps(model, loss, count=3):
    """AdamW in train mode, without weight decay: what moves, moves by its gradient."""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0)
    for _ in range(count):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

def copy_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}

def moved(before, module):
    return {k for k, value in module.state_dict().items() if not torch.equal(before[k], value)}

def saved(folder, obj, name="weights.pth"):
    torch.save(obj, folder / name)
    return folder / name

def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}

def without(state, key):
    return {name: value for name, value in state.items() if name != key}

def renamed(state, rules):
    for old, new in rules:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state

@contextmanager
def refused(*words):
    """Within it a ValueError is raised: one line that holds the words."""
    with pytest.raises(ValueError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message

class Hostile:
    """Unpickling one leaves a folder behind."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

def random_clouds(B=3, N=64, seed=0):
    scale = randn(B, 1, 3, seed=seed + 1).abs().clamp(0.3, 1)
    return F.normalize(randn(B, N, 3, seed=seed), dim=-1) * scale

def patches():
    """Ten patches of three clouds, a mask of six."""
    neighborhood, center = act.group_points(random_clouds(), 10, 8)
    return neighborhood, center, act.random_mask(center, 0.6, seeded())

BACKBONES = {
    "ViT": {}, "DINOv2": dict(layer_scale=True), "BERT": dict(norm_first=False, eps=1e-12),
    "CLIP": dict(norm_pre=True, quick_gelu=True, eps=1e-5)}
W, HEADS = 32, 2  # of tiny public models: two blocks, images of 3 x 3 patches of 4 x 4 pixels
IMAGES, TOKENS = randn(2, 3, 12, 12, seed=7), randn(2, 5, W, seed=8)
ENCODER = dict(num_group=10, group_size=8, width=12, depth=3, num_heads=3, encoder_dims=16,
               drop_path=0.0)
TEACHER = dict(num_group=10, group_size=8, encoder_dims=16, tokens_dims=12, decoder_dims=20,
               num_tokens=24, num_prompt=3, prompt_dropout=0.0)
MODELS = {  # the class, its config's class, small sizes, no two alike
    "Teacher": (act.Teacher, act.TeacherConfig, TEACHER),
    "Student": (act.Student, act.StudentConfig, dict(ENCODER, target_dim=7)),
    "Classifier": (act.Classifier, act.ClassifierConfig, dict(ENCODER, num_classes=4)),
    "Segmenter": (act.Segmenter, act.SegmenterConfig, dict(ENCODER, num_parts=5, num_categories=3))}

def make(kind, backbone="ViT", **options):
    """A small model with random weights, in eval mode."""
    model, config, sizes = MODELS[kind]
    if kind == "Teacher":
        options["backbone"] = act.BackboneConfig(width=18, depth=3, num_heads=2, mlp_hidden=24,
                                                 **BACKBONES[backbone])
    torch.manual_seed(0)
    return randomise(model(config(**{**sizes, **options}))).eval()

@pytest.fixture
def double(monkeypatch):
    """act in float64: in float32 a maximum or a slope may change hands by rounding alone."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

# ---- Plain forms: what one writes first. What holds no optimisation (a Block) serves both forms --
def plain_sqdist(a, b):
    """All squared distances at once: (B, N, 3), (B, M, 3) -> (B, N, M)."""
    return (a[:, :, None] - b[:, None]).square().sum(-1)

def plain_fps(xyz, num_samples, first=0):
    """Farthest point sampling as ports of PointNet++ have it."""
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

def plain_knn(query, xyz, k):
    """Equal distances in any order."""
    return plain_sqdist(query, xyz).topk(k, largest=False)

def stable_knn(query, xyz, k):
    """Equal distances by index."""
    value, idx = plain_sqdist(query, xyz).sort(stable=True)
    return value[..., :k], idx[..., :k]

def plain_gather(values, idx):
    batch = torch.arange(len(values), device=values.device).view(-1, *[1] * (idx.ndim - 1))
    return values[batch, idx]

def plain_chamfer(a, b, norm=1):
    sqdist = plain_sqdist(a, b)
    nearest = [sqdist.min(2)[0], sqdist.min(1)[0]]
    if norm == 2:
        return nearest[0].mean() + nearest[1].mean()
    return (nearest[0].sqrt().mean() + nearest[1].sqrt().mean()) / 2

def plain_layers(layers, x):
    """Layers in a row with channels first, each Linear a 1 x 1 convolution: (B, C, N) or 4-D."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            convolution = F.conv1d if x.ndim == 3 else F.conv2d
            ones = [1] * (x.ndim - 2)
            x = convolution(x, layer.weight.view(*layer.weight.shape, *ones), layer.bias)
        elif isinstance(layer, act.BatchNorm):
            x = nn.BatchNorm1d.forward(layer, x)  # torch's own
        else:
            x = layer(x)
    return x

def plain_patches(embed, neighborhood):
    """[patch ; point] for every point."""
    B, G, S, _ = neighborhood.shape
    point = plain_layers(embed.first_conv, neighborhood.flatten(0, 1).mT)  # (B G, 256, S)
    patch = point.max(dim=2, keepdim=True)[0]
    both = torch.cat([patch.expand(-1, -1, S), point], dim=1)
    return plain_layers(embed.second_conv, both).max(dim=2)[0].view(B, G, -1)

def plain_edge_conv(layer, f, graph):
    """Every edge [f_j - f_i ; f_i] explicit."""
    neighbor = plain_gather(f, graph).permute(0, 3, 1, 2).contiguous()  # (B, C, G, K)
    itself = f.mT[..., None].expand_as(neighbor)
    edge = plain_layers([layer.linear], torch.cat([neighbor - itself, itself], dim=1))
    return F.leaky_relu(layer.norm(edge), 0.2).max(dim=-1)[0].mT

def plain_dgcnn(dgcnn, f, graph):
    f, levels = dgcnn.input_trans(f), []
    for layer in (dgcnn.layer1, dgcnn.layer2, dgcnn.layer3, dgcnn.layer4):
        f = plain_edge_conv(layer, f, graph)
        levels.append(f)
    return F.leaky_relu(plain_layers(dgcnn.layer5, torch.cat(levels, dim=-1).mT), 0.2).mT

def plain_folding(decoder, feature):
    """[feature ; grid ; coarse] for every fine point."""
    B, G, C = feature.shape
    coarse = decoder.mlp(feature)  # (B, G, 3 S/4)
    point = coarse.view(B * G, -1, 3).repeat_interleave(4, dim=1).mT  # (B G, 3, S)
    S = point.shape[2]
    grid = torch.tensor([[-0.05, 0.05, -0.05, 0.05], [-0.05, -0.05, 0.05, 0.05]]).to(point)
    grid = grid.repeat(1, S // 4).expand(B * G, -1, -1)
    whole = torch.cat([feature.reshape(B * G, C, 1).expand(-1, -1, S), grid, point], dim=1)
    fine = (plain_layers(decoder.final_conv, whole) + point).mT
    return coarse.view(B, G, -1, 3), fine.reshape(B, G, S, 3)

def plain_transform(teacher, tokens, center, prompts=None):
    """[prompts, tokens] as one sequence through every block; deep prompts' outputs are dropped."""
    c, B = teacher.config, len(tokens)
    x, pos = teacher.proj_pre(tokens), teacher.visual_pos_embed(center)
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

def plain_features(teacher, neighborhood, center, prompts=None):
    """One-hot codes times the codebook."""
    codes = F.one_hot(teacher.tokenize(neighborhood, center), len(teacher.codebook))
    tokens = codes.to(teacher.codebook.dtype) @ teacher.codebook
    return teacher.dgcnn_2(teacher.transform(tokens, center), act.knn(center, center, 4)[1])

@contextmanager
def plain_form():
    """Within it act computes plainly: the same models, the same losses."""
    with (mock.patch.multiple(act, farthest_point_sample=plain_fps, knn=plain_knn,
                              gather_points=plain_gather, chamfer_distance=plain_chamfer),
          mock.patch.object(act.PatchEmbed, "forward", plain_patches),
          mock.patch.object(act.DGCNN, "forward", plain_dgcnn),
          mock.patch.object(act.FoldingDecoder, "forward", plain_folding),
          mock.patch.multiple(act.Teacher, transform=plain_transform, features=plain_features)):
        yield

# ---- Geometry ------------------------------------------------------------------------------------
GEOMETRY = ["farthest_point_sample", "knn", "gather_points", "group_points", "chamfer_distance",
            "fscore", "interpolate"]
KINDS = {
    "normal": lambda xyz: xyz, "far": lambda xyz: xyz + 1e4,
    "grid": lambda xyz: xyz.round(),  # many equal distances
    "tenths": lambda xyz: xyz.round(decimals=1),  # equal but for rounding
    "identical": lambda xyz: xyz[:, :1].expand_as(xyz).clone(),
    "pairs": lambda xyz: xyz[:, torch.arange(xyz.shape[1]) // 2]}  # every point twice
seeds, shares = st.integers(0, 999), st.floats(0, 1)
precisions = st.sampled_from([torch.float32, torch.float64])
every_kind = pytest.mark.parametrize("kind", KINDS)

def cloud(kind, B, N, seed, dtype=torch.float32):
    return KINDS[kind](randn(B, N, 3, seed=seed, dtype=dtype))

def arguments(name, dtype=torch.float32, device="cpu"):
    """Arguments for a function of the geometry."""
    xyz, center, features = randn(2, 80, 3) + 100, randn(2, 9, 3, seed=1) + 100, randn(2, 9, 5)
    xyz, center, features = (t.to(device, dtype) for t in (xyz, center, features))
    return {"farthest_point_sample": (xyz, 20), "knn": (center, xyz, 7),
            "gather_points": (xyz, torch.tensor([[3, 9], [5, 0]], device=device)),
            "group_points": (xyz, 6, 5), "chamfer_distance": (xyz, center),
            "fscore": (xyz, center, 0.5), "interpolate": (xyz, center, features)}[name]

def permutation(N, first=0):
    """A permutation of 0 to N - 1 that leaves those below `first` in place."""
    return torch.cat([torch.arange(first), first + torch.randperm(N - first, generator=seeded())])

@every_kind
@few
@given(B=st.integers(1, 3), N=st.integers(1, 40), share=shares, seed=seeds, dtype=precisions)
@example(B=2, N=1, share=1.0, seed=0, dtype=torch.float32)
@example(B=3, N=200, share=1.0, seed=0, dtype=torch.float32)
def test_fps_equals_the_textbook_index_for_index(kind, B, N, share, seed, dtype):
    xyz, G = cloud(kind, B, N, seed, dtype), max(1, round(share * N))
    equal(act.farthest_point_sample(xyz, G), plain_fps(xyz, G))

def test_fps_and_knn_are_equivariant_to_permutations_and_read_non_contiguous_points():
    xyz, perm = randn(100, 3, 2, 5)[:, :, 1, ::2].transpose(0, 1), permutation(100, first=1)
    idx, permuted = (act.farthest_point_sample(points, 30) for points in (xyz, xyz[:, perm]))
    equal((idx, idx), (plain_fps(xyz, 30), perm[permuted]))
    (sqdist, idx), permuted = act.knn(xyz, xyz, 8), act.knn(xyz[:, perm], xyz[:, perm], 8)
    equal((permuted[0], perm[permuted[1]]), (sqdist[:, perm], idx[:, perm]))

def test_fps_starts_where_its_generator_says_alone():
    xyz, state = randn(16, 50, 3), torch.get_rng_state()
    idx = act.farthest_point_sample(xyz, 10, generator=seeded(3))
    equal(idx, act.farthest_point_sample(xyz, 10, generator=seeded(3)))
    assert len(idx[:, 0].unique()) > 5 and torch.equal(torch.get_rng_state(), state)
    equal(idx, plain_fps(xyz, 10, first=idx[:, 0]))

@every_kind
@few
@given(B=st.integers(1, 3), Q=st.integers(1, 12), N=st.integers(1, 300), share=shares,
       seed=seeds, dtype=precisions)
@example(B=1, Q=5, N=1, share=1.0, seed=0, dtype=torch.float32)
@example(B=2, Q=200, N=3000, share=0.01, seed=0, dtype=torch.float32)  # several chunks
@example(B=2, Q=200, N=3000, share=0.0, seed=0, dtype=torch.float32)
def test_knn_equals_a_stable_sort_ties_included(kind, B, Q, N, share, seed, dtype):
    xyz, query = cloud(kind, B, N, seed, dtype), cloud(kind, B, Q, seed + 1, dtype)
    k = max(1, round(share * N))
    equal(act.knn(query, xyz, k), stable_knn(query, xyz, k))

@pytest.mark.skipif(os.name != "posix", reason="measures memory through Unix's resource")
def test_knn_of_a_million_points_takes_little_memory():
    script = """if True:
        import resource, torch, act
        held = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        xyz, query = torch.rand(1, 1_000_000, 3), torch.rand(1, 100, 3)
        act.knn(query[:, :2], xyz[:, :100], 4)
        before = held()
        sqdist, idx = act.knn(query, xyz, 32)
        print(held() - before, sqdist[..., -1].max().item())"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          cwd=Path(act.__file__).parent)
    assert done.returncode == 0, done.stderr
    extra, radius = map(float, done.stdout.split())
    extra /= 2**20 if sys.platform == "darwin" else 2**10  # MiB; all differences at once: 1,144
    assert extra < 300 and radius < 0.05**2

@few
@given(B=st.integers(1, 3), N=st.integers(1, 9), C=st.integers(1, 4), seed=seeds,
       shape=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_gather_points_equals_advanced_indexing_with_gradient(B, N, C, shape, seed):
    values = randn(B, N, C, seed=seed, dtype=torch.float64).requires_grad_()
    idx = torch.randint(N, (B, *shape), generator=seeded(seed))
    same_with_gradients(act.gather_points(values, idx), plain_gather(values, idx), [values], 1e-12)

def test_group_points_gathers_the_nearest_around_each_farthest_point():
    xyz = randn(2, 50, 3) + 1e3
    center = plain_gather(xyz, plain_fps(xyz, 7))
    nearest = plain_gather(xyz, stable_knn(center, xyz, 5)[1]) - center[:, :, None]
    equal(act.group_points(xyz, 7, 5), (nearest, center))

@every_kind
@pytest.mark.parametrize("norm", [1, 2])
@few
@given(B=st.integers(1, 2), N=st.integers(1, 12), M=st.integers(1, 12), seed=seeds)
def test_chamfer_equals_the_formula_and_is_symmetric(kind, norm, B, N, M, seed):
    a, b = cloud(kind, B, N, seed), cloud(kind, B, M, seed + 1)
    pairs = (a, b), (b, a), (a, b.double()), (a.double(), b.double())
    found, swapped, better, best = (act.chamfer_distance(*pair, norm) for pair in pairs)
    equal(better, best)  # computed in the better of both precisions
    expected = plain_chamfer(a.double(), b.double(), norm).item()
    assert found.shape == () and found.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert swapped.item() == pytest.approx(found.item(), rel=1e-6, abs=1e-12)

@pytest.mark.parametrize("norm", [1, 2])
def test_chamfer_gradient_is_right_and_zero_where_clouds_coincide(norm):
    chamfer = partial(act.chamfer_distance, norm=norm)
    a, b = (randn(2, n, 3, seed=n, dtype=torch.float64).requires_grad_() for n in (6, 4))
    assert torch.autograd.gradcheck(chamfer, (a, b))
    a = cloud("pairs", 2, 20, 0).requires_grad_()
    b = a.detach().flip(1).requires_grad_()
    loss = chamfer(a, b)
    loss.backward()
    assert loss.item() == 0 and not a.grad.any() and not b.grad.any()

def test_fscore_of_hand_worked_cases():
    two, wide = torch.tensor([[[0.0, 0, 0], [1, 0, 0]], [[0, 0, 0], [5, 0, 0]]])[:, None]
    near = two + torch.tensor([0.05, 0, 0])
    rows = [(two, two, 0.01, 1), (two, two + 9, 0.01, 0), (two, near, 0.06, 1),
            (two, near, 0.01, 0),  # 0.05 > 0.01, though 0.05^2 < 0.01
            (two, wide, 0.5, 1 / 2), (two, wide, 2, 2 / 3), (wide, two, 2, 2 / 3),
            (1.5 * two, wide, 2, 2 / 3), (wide, 1.5 * two, 2, 2 / 3)]  # 1.5 < 2, though 1.5^2 > 2
    for pred, target, threshold, expected in rows:
        assert act.fscore(pred, target, threshold).item() == pytest.approx(expected)
    assert act.fscore(two.repeat(2, 1, 1), torch.cat([two, near])).tolist() == [1, 0]

@every_kind
@few
@given(N=st.integers(1, 10), G=st.integers(1, 8), C=st.integers(1, 3), seed=seeds)
@example(N=5, G=1, C=2, seed=0)
def test_interpolation_weighs_three_centres_by_inverse_squared_distance(kind, N, G, C, seed):
    xyz, center = cloud(kind, 2, N, seed), cloud(kind, 2, G, seed + 1)
    features = randn(2, G, C, seed=seed + 2)
    sqdist, idx = stable_knn(xyz.double(), center.double(), min(3, G))
    weight = 1 / (sqdist + 1e-8)[..., None]
    expected = (weight * plain_gather(features.double(), idx)).sum(2) / weight.sum(2)
    close(act.interpolate(xyz, center, features).double(), expected, 1e-4, floor=1)

def test_interpolation_is_exact_at_centres_and_its_gradient_is_right():
    center, features = randn(2, 12, 3).double(), randn(2, 12, 4, seed=1).double()
    close(act.interpolate(center, center, features), features)
    interpolated = partial(act.interpolate, randn(2, 6, 3, seed=2), center)
    assert torch.autograd.gradcheck(interpolated, features.requires_grad_())

@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_under_autocast_is_the_same_to_the_bit(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = getattr(act, name)(*arguments(name))
    equal(found, getattr(act, name)(*arguments(name)))

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half], ids=str)
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_of_half_precision_is_computed_in_float32(name, dtype):
    args = arguments(name, dtype)
    single = [t.float() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]
    found, expected = listed(getattr(act, name)(*args)), listed(getattr(act, name)(*single))
    equal(found, [value.to(half.dtype) for half, value in zip(found, expected)])
    if name in ("knn", "chamfer_distance", "fscore"):
        assert found[0].dtype == torch.float32

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_on_a_gpu_equals_the_cpu(name):
    found = getattr(act, name)(*arguments(name, device="cuda"))
    for a, b in zip(listed(found), listed(getattr(act, name)(*arguments(name)))):
        close(a.cpu().double(), b.double(), 1e-6)

@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_source_runs_alone_beside_torch(name):
    space = {"torch": torch}
    for each in GEOMETRY:
        exec(inspect.getsource(getattr(act, each)), space)
    equal(space[name](*arguments(name)), getattr(act, name)(*arguments(name)))

# ---- Transformer ---------------------------------------------------------------------------------
def plain_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return centred / deviation * norm.weight + norm.bias

def plain_attention(x, attn):
    """softmax(q k^T / sqrt(D)) v, one head after another."""
    qkv = x @ attn.qkv.weight.T + (0 if attn.qkv.bias is None else attn.qkv.bias)
    heads = [t.chunk(attn.num_heads, dim=-1) for t in qkv.chunk(3, dim=-1)]
    out = [(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v for q, k, v in zip(*heads)]
    return torch.cat(out, -1) @ attn.proj.weight.T + attn.proj.bias

def plain_block(block, x, quick):
    def mlp(x):
        x = x @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        x = x / (1 + (-1.702 * x).exp()) if quick else x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    scale1, scale2 = (getattr(ls, "gamma", 1) for ls in (block.ls1, block.ls2))
    if block.norm_first:
        x = x + scale1 * plain_attention(plain_norm(x, block.norm1), block.attn)
        return x + scale2 * mlp(plain_norm(x, block.norm2))
    x = plain_norm(x + plain_attention(x, block.attn), block.norm1)
    return plain_norm(x + mlp(x), block.norm2)

@pytest.mark.parametrize("options", [
    {}, dict(norm_first=False, eps=1e-12), dict(layer_scale=True), dict(quick_gelu=True),
    dict(qkv_bias=False, mlp_hidden=20)], ids=str)
def test_block_equals_the_formula_and_keys_and_values_prompt_tokens_in_front(options):
    block = randomise(act.Block(12, 3, **options))
    plain = partial(plain_block, block, quick="quick_gelu" in options)
    x, prompts = randn(2, 5, 12).requires_grad_(), randn(1, 4, 12, seed=2).requires_grad_()
    same_with_gradients(block(x), plain(x), [x, *block.parameters()])
    whole = plain(torch.cat([prompts.expand(2, -1, -1), x], dim=1))[:, 4:]  # outputs dropped
    ours = block(x, block.keys_values(prompts))
    same_with_gradients(ours, whole, [x, prompts, *block.parameters()])

def test_drop_path_keeps_the_expectation_by_whole_samples_in_training_only():
    torch.manual_seed(0)
    student = act.Student(act.StudentConfig(**{**ENCODER, "drop_path": 0.4, "depth": 5}))
    blocks = [*student.encoder.blocks, *student.decoder["blocks"]]
    for block, rate in zip(blocks, [0, 0.1, 0.2, 0.3, 0.4, 0, 0.4]):  # linear in depth
        block.load_state_dict({key: torch.zeros_like(p) for key, p in block.state_dict().items()})
        block.attn.proj.bias.data.fill_(1)  # attention gives ones, the MLP nothing
        out = block(torch.zeros(20000, 2, 12)).detach()
        equal(out, out[:, :1, :1].expand_as(out))
        close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - rate)))
        error = abs((out == 0).float().mean().item() - rate)
        assert error <= 4.5 * math.sqrt(rate * (1 - rate) / 20000)
        assert block.eval()(torch.zeros(9, 2, 12)).unique().tolist() == [1]

# ---- Optimisations beside their plain forms ------------------------------------------------------
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 5)])
def test_batch_norm_equals_torchs_on_flattened_axes_statistics_included(shape, train):
    ours, plain = (randomise(norm(5)).train(train) for norm in (act.BatchNorm, nn.BatchNorm1d))
    plain.weight, plain.bias, x = ours.weight, ours.bias, (3 * randn(*shape) + 2).requires_grad_()
    expected = plain(x.flatten(0, -2)).view(shape)
    same_with_gradients(ours(x), expected, [x, *ours.parameters()], 1e-6)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        close(getattr(ours, key).double(), getattr(plain, key).double(), 1e-6)

GRAPH = act.knn(randn(2, 9, 3), randn(2, 9, 3), 4)[1]

@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("module, x, more, plain", [
    (partial(act.PatchEmbed, 16), randn(2, 5, 7, 3), [], plain_patches),
    (partial(act.EdgeConv, 10, 16), randn(2, 9, 10), [GRAPH], plain_edge_conv),
    (partial(act.DGCNN, 10, 8), randn(2, 9, 10), [GRAPH], plain_dgcnn),
    (partial(act.FoldingDecoder, 12, 8), randn(2, 5, 12), [], plain_folding)],
    ids=["PatchEmbed", "EdgeConv", "DGCNN", "FoldingDecoder"])
def test_split_products_equal_explicit_concatenation(module, x, more, plain, train, double):
    module, x = randomise(module()).double().train(train), x.double().requires_grad_()
    same_with_gradients(module(x, *more), plain(module, x, *more), [x, *module.parameters()], 1e-9)

# ---- Teacher -------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt", ["deep", "shallow", "none"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_prompted_backbone_equals_the_full_sequence_through_every_block(kind, prompt):
    teacher = make("Teacher", kind, prompt=prompt)
    tokens, center = randn(2, 10, 12).requires_grad_(), randn(2, 10, 3, seed=1)
    ours, plain = teacher.transform(tokens, center), plain_transform(teacher, tokens, center)
    same_with_gradients(ours, plain, [tokens, *teacher.parameters()], 1e-4)
    prompts = teacher.prompt_keys_values()  # once for a whole run
    assert (prompts is None) == (prompt != "deep")
    equal(teacher.transform(tokens, center, prompts), ours)
    neighborhood, center, _ = patches()
    equal(teacher.features(neighborhood, center, prompts), teacher.features(neighborhood, center))

def plain_autoencoder(teacher, xyz, distribution):
    """`distribution` turns logits into probabilities of the codes: both (B, G, codes)."""
    center = plain_gather(xyz, plain_fps(xyz, 10))
    neighborhood = plain_gather(xyz, stable_knn(center, xyz, 8)[1]) - center[:, :, None]
    graph = stable_knn(center, center, 4)[1]
    logits = plain_dgcnn(teacher.dgcnn_1, plain_patches(teacher.encoder, neighborhood), graph)
    tokens = plain_transform(teacher, distribution(logits) @ teacher.codebook, center)
    features = plain_dgcnn(teacher.dgcnn_2, tokens, graph)
    return [logits, *plain_folding(teacher.decoder, features), features]

@pytest.mark.parametrize("hard", [True, False])
def test_teacher_in_eval_equals_the_formula(hard, double):
    teacher, xyz = make("Teacher").double(), random_clouds().double()

    def distribution(logits):
        return F.one_hot(logits.argmax(-1), 24).double() if hard else (logits / 0.3).softmax(-1)
    plain, out = plain_autoencoder(teacher, xyz, distribution), teacher(xyz, 0.3, hard=hard)
    shapes = [tuple(t.shape) for t in out]
    assert shapes == [(3, 10, 2, 3), (3, 10, 8, 3), (3, 10, 8, 3), (3, 10, 3), (3, 10, 24)]
    ours = [out.logits, out.coarse, out.fine]
    if hard:
        equal(teacher.tokenize(out.neighborhood, out.center), plain[0].argmax(-1))
        ours.append(teacher.features(out.neighborhood, out.center))
    same_with_gradients(ours, plain[: len(ours)], teacher.parameters(), 1e-9)

def test_gumbel_noise_is_added_in_training_only(monkeypatch):
    teacher, xyz, calls, real = make("Teacher").train(), random_clouds(), [], F.gumbel_softmax

    def gumbel(logits, tau, hard, dim):
        calls.append((tau, hard, dim))
        return real(logits, tau, hard, dim=dim)
    monkeypatch.setattr(F, "gumbel_softmax", gumbel)
    for hard in (False, True):
        first, second = teacher(xyz, 0.4, hard), teacher(xyz, 0.4, hard)
        assert torch.equal(first.logits, second.logits) and not torch.equal(first.fine, second.fine)
    assert calls == [(0.4, False, -1)] * 2 + [(0.4, True, -1)] * 2
    teacher.eval()
    state = torch.get_rng_state()
    for hard in (False, True):
        equal(teacher(xyz, 0.4, hard), teacher(xyz, 0.4, hard))
    assert len(calls) == 4 and torch.equal(torch.get_rng_state(), state)

def test_targets_are_deterministic_in_eval():
    teacher, (neighborhood, center, _) = make("Teacher", prompt_dropout=0.5).train(), patches()
    with torch.no_grad():
        one, other = (teacher.features(neighborhood, center) for _ in range(2))
        assert not torch.equal(one, other)  # the prompts' dropout
        before, state = copy_of(teacher.eval()), torch.get_rng_state()
        target = teacher.features(neighborhood, center)
        equal(target, teacher.features(neighborhood, center))
        close(teacher.features(neighborhood[:1], center[:1]), target[:1])  # whatever else is there
    assert not moved(before, teacher) and torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize("prompt", ["deep", "shallow", "none"])
def test_training_moves_everything_but_the_backbone_which_stays_bit_identical(prompt):
    teacher, xyz = make("Teacher", prompt=prompt), random_clouds()
    assert not any(p.requires_grad for p in teacher.backbone.parameters())
    before = copy_of(teacher)
    train_steps(teacher, lambda: act.teacher_loss(teacher(xyz), 0.1)[0])
    assert teacher.training and not any(m.training for m in teacher.backbone.modules())
    assert moved(before, teacher) == {key for key in before if not key.startswith("backbone.")}
    expected = {"none": [], "shallow": ["visual_prompt_token"],
                "deep": ["visual_prompt_token", "deep_prompt_tokens"]}[prompt]
    assert [key for key in before if "prompt_token" in key] == expected

def test_teacher_takes_a_backbones_blocks_and_norms_without_its_image_side():
    sizes = dict(width=18, depth=2, num_heads=2, mlp_hidden=24, norm_pre=True)
    model = randomise(act.Backbone(act.BackboneConfig(**sizes, patch_size=4, grid=3, num_prefix=1)))
    teacher = act.Teacher(act.TeacherConfig(**TEACHER), model)
    equal(teacher.backbone.forward_tokens(randn(2, 5, 18)), model.forward_tokens(randn(2, 5, 18)))
    parts = {key.split(".")[0] for key in teacher.backbone.state_dict()}
    assert parts == {"norm_pre", "blocks", "norm"}

def random_output(logits):
    B, G, _ = logits.shape
    coarse, fine, neighborhood = (randn(B, G, S, 3, seed=i) for i, S in enumerate((2, 8, 8)))
    return act.TeacherOutput(coarse, fine, neighborhood, randn(B, G, 3, seed=4), logits)

def test_teacher_loss_equals_an_independent_formula():
    output = random_output(3 * randn(4, 5, 9))
    total, reconstruction, kl = act.teacher_loss(output, 0.07)
    target = output.neighborhood.flatten(0, 1)
    expected = sum(plain_chamfer(p.flatten(0, 1), target) for p in (output.coarse, output.fine))
    assert reconstruction.item() == pytest.approx(expected.item(), rel=1e-5)
    uniform, mean = (torch.distributions.Categorical(probs=p) for p in (
        torch.full((4, 9), 1 / 9), output.logits.softmax(-1).mean(1)))
    divergence = torch.distributions.kl_divergence(uniform, mean).mean()
    assert kl.item() == pytest.approx(divergence.item(), rel=1e-5)
    assert total.item() == pytest.approx(reconstruction.item() + 0.07 * kl.item(), rel=1e-6)

def test_kl_is_zero_for_uniform_use_of_the_codes_and_grows_with_their_collapse():
    rows = [(torch.full((2, 5, 5), 2.5), 0), (50 * torch.eye(5).expand(2, -1, -1), 0)]
    for margin in (3.0, 30.0, 300.0):  # all patches on one code
        expected = 0.8 * margin - math.log(5) + math.log1p(4 * math.exp(-margin))
        rows.append((margin * F.one_hot(torch.ones(2, 4, dtype=torch.long), 5), expected))
    for logits, expected in rows:
        kl = act.teacher_loss(random_output(logits), 1)[2].item()
        assert kl == pytest.approx(expected, rel=1e-5, abs=1e-6)

# ---- Student -------------------------------------------------------------------------------------
@pytest.mark.parametrize("masks", [act.random_mask, act.block_mask])
@pytest.mark.parametrize("ratio, masked", [(0, 0), (0.05, 0), (0.45, 4), (0.8, 8), (1, 10)])
def test_masks_hold_the_exact_share_of_every_cloud_by_their_generator_alone(masks, ratio, masked):
    center, state = randn(20, 10, 3), torch.get_rng_state()
    mask, again, other = (masks(center, ratio, seeded(seed)) for seed in (1, 1, 2))
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [masked] * 20
    assert torch.equal(mask, again) and torch.equal(mask, other) == (masked in (0, 10))
    assert torch.equal(torch.get_rng_state(), state)

def test_random_masks_hold_every_group_and_every_pair_equally_often():
    B, G, M = 20000, 6, 3
    mask = act.random_mask(torch.zeros(B, G, 3), 0.5, seeded()).double()
    pairs = mask.T @ mask / B  # the diagonal: single groups
    apart = pairs[~torch.eye(G, dtype=torch.bool)]
    for expected, found in ((M / G, pairs.diag()), (M * (M - 1) / G / (G - 1), apart)):
        assert (found - expected).abs().max() < 4.5 * math.sqrt(expected * (1 - expected) / B)

def test_block_masks_are_the_nearest_groups_of_each_member_equally_often():
    center = randn(1, 10, 3)
    mask = act.block_mask(center.expand(5000, -1, -1), 0.4, seeded())
    blocks = [frozenset(row) for row in stable_knn(center, center, 4)[1][0].tolist()]
    found = [frozenset(row.nonzero()[:, 0].tolist()) for row in mask]
    assert set(found) == set(blocks)
    for block in set(blocks):
        share = blocks.count(block) / 10
        error = abs(found.count(block) / 5000 - share)
        assert error < 4.5 * math.sqrt(share * (1 - share) / 5000)

def test_split_mask_lists_visible_and_masked_groups_in_order():
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    visible, masked = act.split_mask(mask, "cpu")
    assert visible.tolist() == [[1, 3], [0, 1]] and masked.tolist() == [[0, 2], [2, 3]]

@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("encoder_dims", [16, 12])
def test_student_equals_the_formula_on_the_visible_patches_alone(train, encoder_dims, double):
    student, (neighborhood, center, mask) = make("Student", encoder_dims=encoder_dims), patches()
    student, encoder = student.double().train(train), student.encoder
    neighborhood, center = neighborhood.double(), center.double()
    x = encoder.patch_embed(neighborhood[~mask].view(3, 4, 8, 3))
    x = x if encoder_dims == 12 else encoder.reduce_dim(x)
    x = torch.cat([encoder.cls_token.expand(3, -1, -1), x], dim=1)
    pos = encoder.pos_embed(center[~mask].view(3, 4, 3))
    pos = torch.cat([encoder.cls_pos.expand(3, -1, -1), pos], dim=1)
    for block in encoder.blocks:
        x = block(x + pos)
    tokens = encoder.norm(x)
    x = torch.cat([tokens[:, 1:], student.mask_token.expand(3, 6, -1)], dim=1)
    pos = torch.stack([torch.cat([c[~m], c[m]]) for c, m in zip(center, mask)])
    for block in student.decoder["blocks"]:
        x = block(x + student.decoder_pos_embed(pos))
    prediction = student.head(student.decoder["norm"](x)[:, 4:])
    out = student(neighborhood, center, mask), encoder(neighborhood, center, mask)
    same_with_gradients(out, (prediction, tokens), student.parameters(), 1e-9)

def test_predictions_stand_at_the_masked_groups_and_follow_the_order_of_groups():
    student, (neighborhood, center, mask), perm = make("Student"), patches(), permutation(10)
    out = student(neighborhood, center, mask)
    full = torch.zeros(3, 10, 7).masked_scatter(mask[..., None], out)
    permuted = student(neighborhood[:, perm], center[:, perm], mask[:, perm])
    close(permuted, full[:, perm][mask[:, perm]].view(3, 6, 7))
    for block in student.decoder["blocks"]:  # without attention a prediction knows its own centre
        nn.init.zeros_(block.attn.proj.weight)
    out = student(neighborhood, center, mask)
    for m, g in enumerate(mask[1].nonzero()[:, 0].tolist()):
        elsewhere = center.clone()
        elsewhere[1, g] += 0.5
        difference = (student(neighborhood, elsewhere, mask) - out).abs().amax(dim=-1)
        assert (difference > 1e-4).nonzero().tolist() == [[1, m]]
    assert student(neighborhood, center, torch.zeros_like(mask)).shape == (3, 0, 7)

@pytest.mark.parametrize("train", [True, False])
def test_predictions_never_see_the_masked_patches_but_see_the_visible_ones(train):
    student, (neighborhood, center, mask) = make("Student").train(train), patches()
    out = student(neighborhood, center, mask)
    equal(student(torch.where(mask[..., None, None], 9.0, neighborhood), center, mask), out)
    neighborhood[0, int((~mask[0]).nonzero()[0])] *= 2
    changed = (student(neighborhood, center, mask) != out).flatten(1).any(1)
    assert changed.tolist() == [True, train, train]  # BatchNorm in training

def unused(model):
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]

def test_gradient_reaches_every_parameter_of_the_student_the_class_token_included():
    student = make("Student")  # in eval: a bias before a batch's own statistics would have none
    act.distillation_loss(student(*patches()), randn(3, 6, 7)).backward()
    assert unused(student) == []

def test_encode_is_the_encoder_on_whole_clouds_of_any_float_type():
    student, xyz, (neighborhood, center, mask) = make("Student"), random_clouds(), patches()
    tokens = student.encode(xyz)
    assert tokens.shape == (3, 11, 12)
    close(tokens, student.encoder(neighborhood, center, torch.zeros_like(mask)))
    equal(act.global_feature(tokens), torch.cat([tokens[:, 0], tokens[:, 1:].max(1)[0]], dim=-1))
    for same in (xyz.double(), xyz.numpy(), xyz.double().numpy()):
        equal(student.encode(same), tokens)
    for other in (xyz[0], torch.cat([xyz, xyz], dim=-1)):
        with refused("(B, N, 3)", tuple(other.shape)):
            student.encode(other)

def test_distillation_losses_equal_independent_formulas():
    a, b = 2 * randn(2, 5, 7), 2 * randn(2, 5, 7, seed=1)
    d, cosine = (a - b).abs().double(), (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    expected = {"cosine": 1 - cosine, "l2": d * d, "smooth_l1": (d * d / 2).where(d < 1, d - 0.5)}
    for kind, value in expected.items():
        loss = act.distillation_loss(a, b, kind).item()
        assert loss == pytest.approx(value.mean().item(), rel=1e-5)
        assert act.distillation_loss(a, a, kind).item() == pytest.approx(0, abs=1e-6)
    equal(act.distillation_loss(a, b), act.distillation_loss(a, b, "cosine"))
    assert act.distillation_loss(a, -3 * a).item() == pytest.approx(2, rel=1e-6)

# ---- Downstream heads ----------------------------------------------------------------------------
HEADED = {  # the model, what it takes besides the clouds
    "mlp3": (partial(make, "Classifier"), []),
    "linear": (partial(make, "Classifier", head="linear"), []),
    "parts": (partial(make, "Segmenter"), [torch.tensor([2, 0, 1])]),
    "scene": (partial(make, "Segmenter", num_categories=0), [])}

@pytest.mark.parametrize("kind", HEADED)
def test_heads_reach_every_parameter_and_depend_on_the_own_cloud_and_no_order(kind):
    build, extra = HEADED[kind]
    model, xyz, perm = build(), random_clouds(), permutation(64, first=1)
    logits = model(xyz, *extra)
    assert logits.shape == ((3, 64, 5) if kind in ("parts", "scene") else (3, 4))
    (logits * randn(*logits.shape)).sum().backward()
    assert unused(model) == []
    close(model(xyz[1:2], *(e[1:2] for e in extra)), logits[1:2], 1e-4)
    equal(model(torch.cat([randn(1, 64, 3, seed=9), xyz[1:]]), *extra)[1:], logits[1:])
    permuted = model(xyz[:, perm], *extra)  # a segmenter's rows follow their points
    close(permuted, logits if logits.ndim == 2 else logits[:, perm], 1e-4)

@pytest.mark.parametrize("head, frozen", [("mlp3", True), ("mlp3", False), ("linear", True)])
def test_freezing_holds_the_encoder_bit_identical_statistics_included(head, frozen):
    model, xyz = make("Classifier", head=head).train(), random_clouds()
    if frozen:
        assert model.freeze_encoder() is model and model.training
    before = copy_of(model)
    train_steps(model, lambda: F.cross_entropy(model(xyz), torch.tensor([0, 1, 2])), count=6)
    assert model.head.training and model.encoder.patch_embed.training != frozen
    assert {"encoder.cls_token", "encoder.patch_embed.first_conv.1.running_mean"} <= set(before)
    assert moved(before, model) == {k for k in before if k.startswith("head.") or not frozen}

@pytest.mark.parametrize("kind", ["parts", "scene"])
@pytest.mark.parametrize("train", [True, False])
def test_segmenter_equals_the_formula_with_explicit_concatenation(kind, train, double):
    build, extra = HEADED[kind]
    model, xyz = build().double().train(train), random_clouds().double()
    (neighborhood, center), encoder = act.group_points(xyz, 10, 8), model.encoder
    model.head[3].p = 0.0  # no dropout: each form would draw its own
    x, levels = encoder.reduce_dim(encoder.patch_embed(neighborhood)), []
    for block in encoder.blocks:  # depth 3: all three are read
        x = block(x + encoder.pos_embed(center))
        levels.append(encoder.norm(x))
    tokens = torch.cat(levels, dim=-1)
    cloud = [tokens.amax(1), tokens.mean(1)]
    cloud += [model.label_conv(torch.eye(3).double()[category]) for category in extra]
    cloud = torch.cat(cloud, dim=-1)[:, None].expand(-1, 64, -1)
    point = model.propagation(torch.cat([xyz, act.interpolate(xyz, center, tokens)], dim=-1))
    plain = model.head(torch.cat([point, cloud], dim=-1))
    same_with_gradients(model(xyz, *extra), plain, model.parameters(), 1e-9)
    assert not any("cls" in name for name, _ in model.named_parameters())  # no class token

@pytest.mark.parametrize("depth, depths", [(1, [1, 1, 1]), (2, [1, 1, 2]), (12, [4, 8, 12])])
def test_segmenter_reads_the_encoder_at_thirds_of_any_depth(depth, depths):
    model = make("Segmenter", depth=depth, num_categories=0)
    assert model.depths == depths and model(random_clouds()).shape == (3, 64, 5)

@pytest.mark.parametrize("call, words", [
    (lambda: act.farthest_point_sample(TOKENS, 0), ["num_samples", 5, 0]),
    (lambda: act.knn(IMAGES[0], IMAGES[0], 13), ["k", 12, 13]),
    (lambda: act.group_points(randn(2, 5, 3), 6, 2), [5, 6]),
    (lambda: act.chamfer_distance(TOKENS, TOKENS, norm=3), ["norm", 3]),
    (lambda: make("Segmenter")(random_clouds()), ["category", 3]),
    (lambda: HEADED["scene"][0]()(random_clouds(), torch.zeros(3).long()), ["category", 0]),
    (lambda: make("Classifier", head="mlp"), ["head", "mlp3", "mlp"]),
    (lambda: act.distillation_loss(TOKENS, TOKENS, "l1"), ["kind", "l1"]),
    (lambda: act.distillation_loss(TOKENS, TOKENS[0]), [(2, 5, W), (5, W)]),
    (lambda: act.split_mask(torch.tensor([[True, False], [True, True]]), "cpu"), ["mask", [1, 2]]),
    (lambda: act.Block(10, 3), [10, 3]),
    (lambda: act.TeacherConfig(prompt="wide"), ["prompt", "deep", "wide"]),
    (lambda: act.FoldingDecoder(8, 30), ["group_size", 4, 30])])
def test_what_is_wrong_is_named(call, words):
    with refused(*words):
        call()

# ---- Export, devices, imports --------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Classifier", "Student"])
def test_torch_export_works_with_any_batch(kind):
    model = make(kind)
    if kind == "Student":
        model.forward = model.encode
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (random_clouds(3),), dynamic_shapes=shapes).module()
    for B in (1, 3, 7):
        close(program(random_clouds(B, seed=5)), model(random_clouds(B, seed=5)))

def test_torch_jit_traces_a_classifier():
    model = make("Classifier")
    traced = torch.jit.trace(model, random_clouds())
    close(traced(random_clouds(seed=5)), model(random_clouds(seed=5)))

def run_everything(models, device):
    """Every model, both losses, targets, samples and masks once -> all tensors that come out."""
    xyz, generator = torch.rand(3, 64, 3, device=device), seeded()
    neighborhood, center = act.group_points(xyz, 10, 8)
    mask = act.random_mask(center, 0.6, generator)
    out = [act.farthest_point_sample(xyz, 5, generator), act.block_mask(center, 0.6)]
    for name, model in models.items():
        if name.startswith("Teacher"):
            for train in (True, False):
                output = model.train(train)(xyz, hard=not train)
                out += [*output, *act.teacher_loss(output, 0.1)]
            masked = act.split_mask(mask, device)[1]
            target = act.gather_points(model.features(neighborhood, center), masked)[..., :7]
        elif name == "Student":
            predict = model.train()(neighborhood, center, mask)
            kinds = ("cosine", "smooth_l1", "l2")
            out += [act.distillation_loss(predict, target, kind) for kind in kinds]
            out.append(model.encode(xyz))
        else:
            category = torch.zeros(3, dtype=torch.long, device=device)
            out.append(model(xyz, category) if name == "parts" else model(xyz))
    return out

@pytest.mark.parametrize("device", ["meta", "cpu", "cuda"])
def test_every_tensor_is_made_on_the_inputs_device(device, monkeypatch):
    if device == "cuda" and torch.version.cuda is None:
        pytest.skip("needs a CUDA build of torch (and no GPU)")
    teachers = (("ViT", "deep"), ("CLIP", "shallow"), ("BERT", "none"))
    models = {f"Teacher {kind}": make("Teacher", kind, prompt=prompt) for kind, prompt in teachers}
    models["Student"] = make("Student")
    models.update({name: build() for name, (build, _) in HEADED.items()})
    masked = [6, 6, 6]  # groups: tensors without values cannot be counted
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: masked)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: masked)
    fake = nullcontext() if device == "meta" else FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for model in models.values():
            model.to_empty(device=device)
        assert {t.device.type for t in run_everything(models, device)} == {device}

def imports(path, top=False):
    """Names of the modules that a file imports, anywhere or at its top only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top else list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}

MODULES = sorted(Path(act.__file__).parent.glob("*.py"))

@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_one_way_and_need_no_unix(path):
    own = {other.stem for other in MODULES}
    assert not imports(path, top=True) & {"fcntl", "grp", "pwd", "resource", "termios"}
    below = {"act": set(), "clouds": set(), "training": {"act"}}
    assert imports(path) & own <= below.get(path.stem, own)
    if path.stem == "act":
        assert imports(path) - {"torch", "numpy"} <= sys.stdlib_module_names

# ---- Public weights ------------------------------------------------------------------------------
def vit_state(num_cls=1, num_reg=0, cls_pos=True, layer_scale=False, grid=3):
    """Random weights under timm's names, exact in half precision."""
    torch.manual_seed(0)
    state = {"cls_token": randn(1, 1, W, seed=1), "norm.weight": randn(W, seed=2),
             "pos_embed": randn(1, grid**2 + cls_pos * num_cls, W, seed=3),
             "patch_embed.proj.weight": randn(W, 3, 4, 4, seed=4) / 7,
             "patch_embed.proj.bias": randn(W, seed=5), "norm.bias": randn(W, seed=6)}
    if num_cls == 2:
        state["dist_token"] = randn(1, 1, W, seed=7)
    if num_reg:
        state["reg_token"] = randn(1, num_reg, W, seed=8)
    for i in (0, 1):
        block = randomise(act.Block(W, HEADS, layer_scale=layer_scale), seed=20 * i)
        state |= prefixed(f"blocks.{i}.", block.state_dict())
    return {key: value.half().float() for key, value in state.items()}

def plain_vit(state, x, heads=HEADS, eps=1e-6, **kind):
    """The Transformer of weights under timm's names, on images or on tokens."""
    def norm(name, x):
        if f"{name}.weight" not in state:
            return x
        return F.layer_norm(x, (W,), state[f"{name}.weight"], state[f"{name}.bias"], eps)
    if x.ndim == 4:
        weight, bias = (state.get(f"patch_embed.proj.{name}") for name in ("weight", "bias"))
        x, pos = F.conv2d(x, weight, bias, stride=4).flatten(2).mT, state["pos_embed"]
        rows = torch.cat([state[k] for k in ("cls_token", "dist_token") if k in state], dim=1)
        if pos.shape[1] > x.shape[1]:
            rows, pos = rows + pos[:, : rows.shape[1]], pos[:, rows.shape[1] :]
        rows = torch.cat([rows, state.get("reg_token", rows[:, :0])], dim=1)
        x = torch.cat([rows.expand(len(x), -1, -1), x + pos], dim=1)
    x = norm("norm_pre", x)
    for prefix in ("blocks.0.", "blocks.1."):
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        block = act.Block(W, heads, eps=eps, layer_scale="ls1.gamma" in own, **kind)
        block.load_state_dict(own)
        x = block(x)
    return norm("norm", x)

def same_outputs(model, state, **kind):
    assert not model.training and model.config.eps == kind.get("eps", 1e-6)
    close(model.forward_tokens(TOKENS), plain_vit(state, TOKENS, **kind))
    if "pos_embed" in state:
        close(model.forward_features(IMAGES), plain_vit(state, IMAGES, **kind))
    else:
        with refused("image"):
            model.forward_features(IMAGES)

def write_safetensors(path, state):
    """The format written out by hand, as its specification has it."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.bool: "BOOL"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        raw = value.flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kinds[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)

def write_torchscript(path, state):
    """In half precision, as CLIP's."""
    root = nn.Identity()
    for key, value in state.items():
        *names, leaf = key.split(".")
        node = root
        for name in names:
            node._modules.setdefault(name, nn.Identity())
            node = node._modules[name]
        node.register_buffer(leaf, value.half())
    torch.jit.trace(root, torch.ones(1)).save(str(path))

def written(folder, state, name="weights.pth"):
    """A file of the state, in the format that its name says."""
    writers = {".safetensors": write_safetensors, ".pt": write_torchscript,
               ".npz": lambda path, state: np.savez(path, **state)}
    write = writers.get(Path(name).suffix, lambda path, state: torch.save(state, path))
    write(folder / name, state)
    return folder / name

def split_qkv(state):
    """The fused matrix as three, named q, k and v."""
    out = {key: value for key, value in state.items() if ".attn.qkv." not in key}
    for key in state.keys() - out.keys():
        out |= {key.replace("qkv", name): t for name, t in zip("qkv", state[key].chunk(3))}
    return out

OPENAI_BLOCK = [
    (r"\.norm(\d)\.", r".ln_\1."), (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj.")]
BERT_BLOCK = [
    (r"\.attn\.q\.", ".attention.self.query."), (r"\.attn\.k\.", ".attention.self.key."),
    (r"\.attn\.v\.", ".attention.self.value."), (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.norm1\.", ".attention.output.LayerNorm."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."), (r"\.norm2\.", ".output.LayerNorm.")]
TORCHVISION = [
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."), (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"), (r"\.attn\.proj", ".self_attention.out_proj"),
    (r"\.mlp\.fc1", ".mlp.0"), (r"\.mlp\.fc2", ".mlp.3"), (r"^cls_token", "class_token"),
    (r"^pos_embed", "encoder.pos_embedding"), (r"^patch_embed\.proj", "conv_proj"),
    (r"^norm\.", "encoder.ln.")]
HUGGING_FACE = [
    (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
    *((old, new.replace("self", "attention")) for old, new in BERT_BLOCK[:4]), *BERT_BLOCK[5:7],
    (r"^blocks\.", "encoder.layer."), (r"^cls_token", "embeddings.cls_token"),
    (r"^norm\.", "layernorm."), (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection")]
IN_MEMORY = [  # newer versions of transformers
    (r"^encoder\.layer\.", "layers."), (r"attention\.attention\.(q|k|v)\w+", r"attention.\1_proj"),
    (r"attention\.output\.dense", "attention.o_proj"), (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2")]
CLIP = [
    *OPENAI_BLOCK, (r"^blocks\.", "visual.transformer.resblocks."), (r"^norm\.", "visual.ln_post."),
    (r"^cls_token", "visual.class_embedding"), (r"^pos_embed", "visual.positional_embedding"),
    (r"^patch_embed\.proj", "visual.conv1"), (r"^norm_pre\.", "visual.ln_pre.")]
JAX = [
    (r"\.", "/"), (r"^blocks/(\d+)", r"Transformer/encoderblock_\1"), ("/norm1", "/LayerNorm_0"),
    ("^norm/", "Transformer/encoder_norm/"), ("/norm2", "/LayerNorm_2"), ("^cls_token", "cls"),
    ("/attn", "/MultiHeadDotProductAttention_1"), ("_1/q/", "_1/query/"), ("_1/k/", "_1/key/"),
    ("_1/v/", "_1/value/"), ("_1/proj/", "_1/out/"), ("/mlp/fc1", "/MlpBlock_3/Dense_0"),
    ("/mlp/fc2", "/MlpBlock_3/Dense_1"), ("^patch_embed/proj", "embedding"),
    ("^pos_embed", "Transformer/posembed_input/pos_embedding")]

def jax_arrays(state, heads=HEADS):
    """AugReg's .npz: matrices (in, out), heads apart, convolutions (H, W, in, out)."""
    out = {name: np.ones(2) for name in ("head/kernel", "head/bias", "pre_logits/bias")}
    state = renamed(split_qkv(state), [(r"(norm\d?)\.weight", r"\1.scale"), ("weight$", "kernel")])
    for key, value in state.items():
        array = value.numpy()
        if key.endswith("attn.proj.kernel"):
            array = array.T.reshape(heads, W // heads, W)
        elif ".attn." in key and ".proj." not in key:
            array = array.T.reshape(*array.shape[1:], heads, W // heads)
        elif array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        out[key] = array.T if array.ndim == 2 and ".mlp." in key else array
    return renamed(out, JAX)

def beside(*names):
    """Tensors of another part, which are dropped."""
    return {name: torch.ones(2, W) for name in names}

def clip_state():
    own = vit_state()
    for name in ("weight", "bias"):
        own[f"norm_pre.{name}"] = own[f"norm.{name}"].flip(0)
    return without(own, "patch_embed.proj.bias")

def clip_file(state):
    flat = {k: v.squeeze() if k in ("cls_token", "pos_embed") else v for k, v in state.items()}
    return renamed(flat, CLIP) | beside(
        "visual.proj", "transformer.resblocks.0.ln_1.weight", "token_embedding.weight",
        "positional_embedding", "ln_final.weight", "text_projection", "logit_scale",
        "input_resolution", "context_length", "vocab_size")

def bert_file(state, prefix="", positions=512, older=False):
    foreign = renamed(split_qkv(state), [*BERT_BLOCK, (r"^blocks\.", "encoder.layer.")])
    foreign |= beside("embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight",
                      "embeddings.position_ids", "pooler.dense.weight", "lm_head.dense.weight")
    foreign["embeddings.position_embeddings.weight"] = torch.ones(positions, W)
    older = [("Norm.weight$", "Norm.gamma"), ("Norm.bias$", "Norm.beta")] if older else []
    return prefixed(prefix, renamed(foreign, older))

def layout(convert, file="weights.pth", state=None, **kind):
    return convert, file, state or vit_state(), kind

blocks = {key: value for key, value in vit_state().items() if key.startswith("blocks.")}
bert = partial(layout, state=blocks, norm_first=False)
LAYOUTS = {  # what a file may hold beside, around and instead of timm's names
    "timm": layout(dict), "DeiT": layout(dict, state=vit_state(num_cls=2)),
    "layer scale": layout(dict, state=vit_state(layer_scale=True)),
    "registers": layout(dict, state=vit_state(num_reg=4)),
    "registers alone": layout(dict, state=vit_state(num_reg=4, cls_pos=False)),
    "Meta's registers": layout(lambda s: renamed(s, [("^reg_token$", "register_tokens")]) | beside(
        "mask_token"), state=vit_state(num_reg=4)),
    "model": layout(lambda s: {"model": s, "epoch": 3}),
    "state_dict": layout(lambda s: {"state_dict": prefixed("module.", s)}),
    "heads": layout(lambda s: s | beside("head.bias", "head_dist.weight", "pre_logits.fc.bias")),
    "DINO": layout(lambda s: {"teacher": prefixed("module.backbone.", s) | beside(
        "module.head.mlp.0.weight", "module.head.last_layer.bias"), "student": {}}),
    "DINOv2": layout(lambda s: {"teacher": prefixed("backbone.", s) | beside(
        "dino_head.mlp.0.bias", "ibot_head.last_layer.weight_v")}),
    "MAE": layout(lambda s: {"model": s | beside("mask_token", "decoder_pos_embed",
                                                 "decoder_blocks.0.attn.qkv.weight")}),
    "torchvision": layout(lambda s: renamed(s, TORCHVISION) | beside("heads.head.weight")),
    "older torchvision": layout(lambda s: renamed(s, TORCHVISION + [
        (r"mlp\.0\.", "mlp.linear_1."), (r"mlp\.3\.", "mlp.linear_2.")])),
    "Hugging Face": layout(lambda s: renamed(split_qkv(s), HUGGING_FACE) | beside(
        "pooler.dense.bias"), "m.safetensors", eps=1e-12),
    "Hugging Face's classifier": layout(lambda s: prefixed("vit.", renamed(
        split_qkv(s), HUGGING_FACE + IN_MEMORY)) | beside("classifier.weight"), eps=1e-12),
    "CLIP": layout(clip_file, state=clip_state(), eps=1e-5, quick_gelu=True),
    "TorchScript": layout(clip_file, "ViT.pt", clip_state(), eps=1e-5, quick_gelu=True),
    "JAX": layout(partial(jax_arrays, heads=4), "augreg.npz", heads=4),
    "older JAX": layout(lambda s: prefixed("opt/target/", jax_arrays(s)), "augreg.npz"),
    "BERT": bert(bert_file, "m.safetensors", eps=1e-12),
    "older BERT": bert(partial(bert_file, prefix="bert.", older=True), eps=1e-12),
    "RoBERTa": bert(partial(bert_file, prefix="roberta."), "m.safetensors", eps=1e-5),
    "RoBERTa alone": bert(partial(bert_file, positions=514), eps=1e-5)}

@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_the_formula_on_the_same_weights_under_timms_names(tmp_path, name):
    convert, file, state, kind = LAYOUTS[name]
    heads = None if name == "JAX" else HEADS  # the file says 4
    path = written(tmp_path, convert(dict(state)), file)
    same_outputs(act.load_pretrained(path, num_heads=heads), state, **kind)

def test_images_of_another_size_resample_the_positions(tmp_path):
    state, seen = vit_state(grid=4), []
    state["pos_embed"][:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]  # a ramp in each row
    state["patch_embed.proj.bias"].zero_()
    model = act.load_pretrained(saved(tmp_path, state))
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert model.forward_features(torch.zeros(1, 3, 16, 32)).shape == (1, 1 + 4 * 8, W)
    ramp = seen[0][:, 1:].view(4, 8, W)
    close(ramp, ramp[:1, :, :1].expand_as(ramp))  # the same in all rows and channels
    close(ramp[0, 3:5, 0], torch.tensor([1.25, 1.75]), 1e-4)  # half-pixel centres, twice as fine
    assert (ramp[0].diff(dim=0) > 0).all()

def test_heads_come_from_config_json_then_the_argument_then_the_width(tmp_path):
    path, arrays = saved(tmp_path, vit_state()), written(tmp_path, jax_arrays(vit_state()), "a.npz")
    assert act.load_pretrained(path).config.num_heads == 1
    assert act.load_pretrained(path, num_heads=8).config.num_heads == 8
    assert act.load_pretrained(arrays, num_heads=8).config.num_heads == 8
    published = {"num_attention_heads": 4, "layer_norm_eps": 1e-3, "hidden_size": W}
    (tmp_path / "config.json").write_text(json.dumps(published))
    same_outputs(act.load_pretrained(path, num_heads=8), vit_state(), heads=4, eps=1e-3)

@pytest.mark.parametrize("name", [
    "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_timms_vits_agree_at_any_image_size(tmp_path, name):
    side = 56 if "14" in name else 64
    theirs = peer("timm").create_model(name, img_size=side, depth=1, dynamic_img_size=True)
    ours = act.load_pretrained(saved(tmp_path, randomise(theirs).eval().state_dict()))
    for images in (randn(1, 3, side, side), randn(1, 3, 2 * side, side)):
        close(ours.forward_features(images), theirs.forward_features(images), 1e-4)

def test_torchvisions_vit_agrees(tmp_path):
    theirs = peer("torchvision").models.VisionTransformer(12, 4, 2, HEADS, W, 4 * W).eval()
    randomise(theirs)
    x = torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(IMAGES)], dim=1)
    ours = act.load_pretrained(saved(tmp_path, theirs.state_dict()), num_heads=HEADS)
    close(ours.forward_features(IMAGES), theirs.encoder(x))

@pytest.mark.parametrize("family", ["Bert", "Roberta", "ViT"])
def test_transformers_models_agree(tmp_path, family):
    peer(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    config, model = (getattr(peer("transformers"), family + kind) for kind in ("Config", "Model"))
    theirs = randomise(model(config(
        hidden_size=W, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=4 * W,
        layer_norm_eps=1e-5 if family == "Roberta" else 1e-12, image_size=12, patch_size=4))).eval()
    theirs.save_pretrained(tmp_path)
    ours = act.load_pretrained(tmp_path / "model.safetensors", num_heads=1)  # config.json decides
    if family == "ViT":
        close(ours.forward_features(IMAGES), theirs(IMAGES).last_hidden_state, 1e-4)
    else:
        ids = torch.tensor([[1, 2, 3, 4]])
        close(ours.forward_tokens(theirs.embeddings(ids)), theirs(ids).last_hidden_state, 1e-4)

@pytest.mark.parametrize("name, sizes", [
    ("minilm-l6/model.safetensors", (384, 6, 12, 1e-12)),
    ("vit_tiny_patch4_32_cifar10.pth", (192, 12, 3, 1e-6))])
def test_real_files_equal_their_own_libraries(name, sizes):
    path = Path(os.environ.get("ACT_TEST_WEIGHTS", "")) / name
    if not path.is_file():
        pytest.skip(f"needs ACT_TEST_WEIGHTS, a folder that holds {name}")
    ours, tokens, images = act.load_pretrained(path), randn(1, 6, 384), randn(2, 3, 32, 32)
    c = ours.config
    assert (c.width, c.depth, c.num_heads, c.eps) == sizes
    if "minilm" in name:
        peer("transformers.models.bert.modeling_bert")
        theirs = peer("transformers").BertModel.from_pretrained(path.parent).eval()
        close(ours.forward_tokens(tokens), theirs.encoder(tokens)[0], 1e-4)
    else:
        theirs = peer("timm").create_model("vit_tiny_patch16_224", img_size=32, patch_size=4,
                                           num_classes=10, checkpoint_path=str(path)).eval()
        close(ours.forward_features(images), theirs.forward_features(images), 1e-4)

@pytest.mark.parametrize("obj, words", [
    ([1], ["tensors"]), ({}, ["tensors"]), (beside("conv1.weight"), ["layout", "conv1.weight"]),
    (vit_state() | beside("fc_norm.weight"), ["nexpected key", "fc_norm.weight"]),
    (vit_state() | beside("blocks.9.norm1.bias"), ["nexpected key", "blocks.9.norm1.bias"]),
    (vit_state(num_reg=4) | beside("register_tokens"), ["register_tokens", "reg_token"]),
    (without(vit_state(), "blocks.1.mlp.fc2.bias"), ["issing key", "blocks.1.mlp.fc2.bias"]),
    (without(vit_state(), "blocks.0.attn.qkv.weight"), ["blocks.0.attn.qkv.weight"]),
    (without(vit_state(), "pos_embed"), ["pos_embed"]), (without(vit_state(), "cls_token"), []),
    (vit_state() | {"norm.weight": torch.ones(3)}, ["norm.weight", 3, W]),
    (vit_state() | {"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, []),
    (without(bert_file(blocks), "encoder.layer.0.attention.self.key.bias"), ["attn.k.bias"]),
    (without(bert_file(blocks), "encoder.layer.0.attention.self.query.bias"), ["attn.k.bias"])])
def test_another_family_and_unexpected_or_missing_keys_are_named(tmp_path, obj, words):
    path = saved(tmp_path, obj)
    with refused(path, *words):
        act.load_pretrained(path, num_heads=HEADS)

@pytest.mark.parametrize("text, heads, words", [
    ("{}", 7, [7, W]), ("{}", -2, []), ("{", HEADS, []), ("[1]", HEADS, []),
    ('{"hidden_act": "relu"}', HEADS, ["relu"]), ('{"hidden_size": 768}', HEADS, [768]),
    ('{"num_attention_heads": "many"}', HEADS, [])])
def test_heads_or_a_config_json_that_do_not_fit_are_refused(tmp_path, text, heads, words):
    path = saved(tmp_path, vit_state())
    (tmp_path / "config.json").write_text(text)
    with refused(tmp_path, *words):
        act.load_pretrained(path, num_heads=heads)

@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["w.pth", "w.npz", "w.safetensors"])
def test_truncated_files_are_refused(tmp_path, name, share):
    path = written(tmp_path, jax_arrays(vit_state()) if "npz" in name else vit_state(), name)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with refused(path):
        act.load_pretrained(path)

def test_missing_files_and_unknown_names_are_named(tmp_path):
    for name in (tmp_path / "none.pth", tmp_path, "vit_base_patch"):
        with refused(name, "minilm_l6"):
            act.load_pretrained(name)
        with refused(name):
            act.load(name)

def test_files_are_read_exactly_by_content_whatever_their_name(tmp_path):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True]), "s": torch.tensor(3),
             "e": torch.empty(0, 4), "h": torch.tensor([1.5], dtype=torch.float16),
             "bf": torch.tensor([[2.5]], dtype=torch.bfloat16)}
    path = written(tmp_path, state, "x.safetensors").rename(tmp_path / "x.pth")
    for path in (path, saved(tmp_path, state, "y.safetensors")):
        read = act.read_tensors(path)
        assert list(read) == list(state)
        equal(read.values(), state.values())
        assert [value.shape for value in read.values()] == [value.shape for value in state.values()]

@pytest.mark.parametrize("change", [
    {"data_offsets": [56, 72]}, {"data_offsets": [-16, 0]}, {"data_offsets": [0]}, {"dtype": "F8"},
    {"shape": [10**15]}, {"shape": [2]}, {"shape": [-2, -2]}, {"shape": None}, {"length": 2**63},
    {"length": 2**40}], ids=str)
def test_safetensors_headers_are_held_against_the_file(tmp_path, change):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **change}
    header, path = json.dumps({"a": entry}).encode(), tmp_path / "x.safetensors"
    length = change.get("length", len(header)).to_bytes(8, "little")
    path.write_bytes(length + header + bytes(64))
    with refused(path):
        act.read_tensors(path)

@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "npz", "TorchScript"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    path, trace = tmp_path / "weights", tmp_path / "trace"
    obj = {"model": vit_state(), "epoch": Hostile(trace)}
    with open(path, "wb") as file:
        if form == "npz":
            np.savez(file, cls=np.array([Hostile(trace)], dtype=object))
        elif form == "pickle":
            pickle.dump(obj, file, protocol=2)
        elif form in ("zip", "legacy"):
            torch.save(obj, file, _use_new_zipfile_serialization=form == "zip")
    if form == "TorchScript":  # such a method would run as the archive is loaded
        write_torchscript(path, vit_state())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("weights/code/more.py", "def __setstate__(self, state): pass")
    for read in (act.load_pretrained, act.load, act.read_tensors):
        with refused(path):
            read(path)
    assert not trace.exists()

@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_numpy_scalars_in_metrics_are_admitted_in_both_spellings(tmp_path, module):
    metrics = {"f": np.float64(93.2), "n": np.int64(3), "b": np.bool_(True), "a": np.arange(3.0)}
    path, obj = tmp_path / "w.pth", {"base_model": vit_state(), "metrics": metrics}
    torch.save(obj, path, _use_new_zipfile_serialization=False)
    installed = np.float64.__reduce__(np.float64(0))[0].__module__  # of this numpy
    old, new = (b"c%s\n" % name.encode() for name in (installed, f"{module}.multiarray"))
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with torch.serialization.safe_globals([Hostile]):  # somebody else's choice, which stays
        before = set(torch.serialization.get_safe_globals())
        same_outputs(act.load_pretrained(path, num_heads=HEADS), vit_state())
        assert set(torch.serialization.get_safe_globals()) == before

def test_every_name_has_an_address_and_a_file_of_its_own():
    names = act.pretrained_names()
    assert {"vit_base_patch16_384", "deit_tiny_patch16_224", "dino_vitb16", "dinov2_vits14",
            "mae_vit_base", "clip_vit_b16", "bert_base", "roberta_base", "minilm_l6"} <= set(names)
    assert len(set(names.values())) == len(names)
    suffixes = r"https://[^ {}]+\.(npz|pth|pt|safetensors)"
    assert all(re.fullmatch(suffixes, url) for url in names.values())

@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(name, file, size=None): a name's address becomes a file of ours -> the cache."""
    body = saved(tmp_path, vit_state()).read_bytes()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def publish(name, file, size=None):
        path = tmp_path / "net" / file.format(hashlib.sha256(body).hexdigest())
        path.parent.mkdir(parents=True)
        if size != 0:
            path.write_bytes(body[:size])
        monkeypatch.setitem(act._PUBLISHED, name, path.as_uri())
        return tmp_path / "hub" / "checkpoints" / path.name
    return publish

@pytest.mark.parametrize("name, file", [
    ("deit_tiny_patch16_224", "deit-{:.8}.pth"), ("clip_vit_b16", "{}/ViT.pt"),
    ("dino_vits16", "dino.pth"), ("bert_base", "bert/model.safetensors")])
def test_a_name_is_downloaded_once_and_its_time_out_put_back(publish, monkeypatch, name, file):
    timeouts, before, path = [], socket.getdefaulttimeout(), publish(name, file)
    monkeypatch.setattr(socket, "setdefaulttimeout", timeouts.append)
    for _ in range(2):
        same_outputs(act.load_pretrained(name, num_heads=HEADS), vit_state())
    assert timeouts == [10, before]
    expected = f"{name}.safetensors" if name == "bert_base" else path.name
    assert os.listdir(path.parent) == [expected]

@pytest.mark.parametrize("file, size, words", [
    ("deit-00000000.pth", None, ["hash"]), ("0" * 64 + "/ViT.pt", None, ["hash"]),
    ("dino.pth", 1000, []), ("nowhere.pth", 0, ["net/nowhere.pth"])])
def test_a_download_that_fails_leaves_no_file_and_names_its_place(publish, file, size, words):
    path, before = publish("dino_vits16", file, size), socket.getdefaulttimeout()
    with refused("dino_vits16", path, *words):
        act.load_pretrained("dino_vits16")
    assert os.listdir(path.parent) == [] and socket.getdefaulttimeout() == before

# ---- Model checkpoints ---------------------------------------------------------------------------
UNSEEN = dict(num_group=10, group_size=8, num_heads=3, drop_path=0.0)  # what no tensor shows
OFFICIAL = {  # our names -> the official implementation's
    "ViT": [(r"^backbone\.blocks", "visual_embed.0"), (r"^backbone\.norm", "visual_embed.1")],
    "CLIP": [*OPENAI_BLOCK, (r"^backbone\.norm_pre", "visual_embed.0"),
             (r"^backbone\.blocks", "visual_embed.1"), (r"^backbone\.norm", "visual_embed.2")],
    "BERT": [*BERT_BLOCK, (r"^backbone\.blocks", "visual_embed.0.layer")],
    "Teacher": [(r"(layer\d)\.linear\.", r"\1.0."), (r"(layer\d)\.norm\.", r"\1.1.")],
    "Encoder": [(r"^(encoder\.blocks\.)", r"\1blocks."), ("patch_embed", "encoder")],
    "Student": [(r"^(en|de)coder\.", r"ACT_\1coder."), (r"^head\.", "proj_head.")],
    "Classifier": [(r"^encoder\.", ""), (r"^head\.", "cls_head_finetune.")],
    "Segmenter": [
        (r"^encoder\.", ""), (r"^head\.0\.", "convs1_cls."), (r"^head\.1\.", "bns1_cls."),
        (r"^head\.4\.", "convs2_cls."), (r"^head\.5\.", "bns2_cls."),
        (r"^head\.7\.", "convs3_cls."), (r"^label_conv\.", "label_conv_cls."),
        (r"^propagation\.0\.", "propagation_0_cls.mlp_convs.0."),
        (r"^propagation\.1\.", "propagation_0_cls.mlp_bns.0."),
        (r"^propagation\.3\.", "propagation_0_cls.mlp_convs.1."),
        (r"^propagation\.4\.", "propagation_0_cls.mlp_bns.1.")]}
KERNELS = r"(.*_conv(_cls)?\.[036]|dgcnn_\d\.(input_trans|layer5\.0)|.*convs.*)\.weight"

def official_names(model, backbone="ViT"):
    """A state dict under the official implementation's names, 1 x 1 convolutions with kernels."""
    state = model.state_dict()
    kind = type(model).__name__
    if kind == "Teacher":
        ours = {key: value for key, value in state.items() if key.startswith("backbone.")}
        state = renamed({k: state[k] for k in state if k not in ours}, OFFICIAL["Teacher"])
        ours = split_qkv(ours) if backbone == "BERT" else ours
        state |= renamed(ours, OFFICIAL.get(backbone, OFFICIAL["ViT"]))
    else:
        state = renamed(state, OFFICIAL["Encoder"] + OFFICIAL[kind])
    for key, value in state.items():
        if re.fullmatch(r"dgcnn_\d\.layer[1-4]\.0\.weight", key):
            state[key] = value[..., None, None]
        elif re.fullmatch(KERNELS, key):
            state[key] = value[..., None]
    return state

def released(folder, state, key="base_model", prefix="module."):
    """A file as the official implementation saves it."""
    obj = {key: prefixed(prefix, state), "epoch": 3, "metrics": {"acc": np.float64(93.2)}}
    return saved(folder, obj, "official.pth")

def assert_same(model, loaded, **changes):
    """Kind, sizes and weights, in eval mode."""
    assert type(model) is type(loaded) and not loaded.training
    assert asdict(loaded.config) == asdict(model.config) | changes
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert not moved(model.state_dict(), loaded)

@pytest.mark.parametrize("kind, options", [
    ("Teacher", dict(prompt="shallow", backbone="CLIP")),
    ("Student", dict(points=77, normalized=False)),
    ("Classifier", dict(class_names=["a", "b"], head="linear")),
    ("Segmenter", dict(class_names=["x"], part_ranges=[[0, 2], [2, 5]]))])
def test_our_checkpoints_round_trip(tmp_path, kind, options):
    model, path = make(kind, **options), tmp_path / "last.pt"
    config, state = asdict(model.config), model.state_dict()
    act.save({"kind": kind, "config": config, "model": state, "step": 3}, path)
    assert_same(model, act.load(path))
    assert_same(model, act.load(str(path), device="cpu"))
    assert torch.load(path, weights_only=True)["step"] == 3

def test_a_save_that_fails_leaves_the_earlier_file_and_nothing_beside(tmp_path):
    act.save({"step": 3}, tmp_path / "last.pt")
    with pytest.raises(Exception):
        act.save({"step": 4, "code": lambda: None}, tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"step": 3}
    assert os.listdir(tmp_path) == ["last.pt"]

@pytest.mark.parametrize("backbone, prompt, prefix", [
    ("ViT", "deep", ""), ("ViT", "none", ""), ("DINOv2", "shallow", ""), ("CLIP", "deep", ""),
    ("CLIP", "shallow", "dvae_tokenizer."), ("BERT", "deep", "")])
def test_official_teachers_are_read_also_as_tokenizers(tmp_path, backbone, prompt, prefix):
    model = make("Teacher", backbone, prompt=prompt, num_prompt=0 if prompt == "none" else 3)
    path = released(tmp_path, prefixed(prefix, official_names(model, backbone)))
    loaded = act.load(path, num_group=10, num_heads=2, prompt_dropout=0.0)
    assert_same(model, loaded, weights="official.pth")

BESIDE_STUDENT = beside("ACT_encoder.lm_head.weight", "ACT_encoder.cls_head.0.bias",
                        "dvae_tokenizer.codebook", "dvae_tokenizer.encoder.first_conv.0.weight")

@pytest.mark.parametrize("kind, options, rules, more", [
    ("Student", dict(encoder_dims=12), [], BESIDE_STUDENT),
    ("Student", {}, [(r"^proj_head\.", "proj_head.0.")], BESIDE_STUDENT),
    ("Classifier", dict(head="mlp3"), [], {}), ("Classifier", dict(head="linear"), [], {}),
    ("Segmenter", dict(num_categories=16), [], {}), ("Segmenter", dict(num_categories=0), [], {}),
    ("Segmenter", {}, [(r"_cls\.", ".")], {})])  # older names
def test_official_models_are_read(tmp_path, kind, options, rules, more):
    model = make(kind, **options)
    state = renamed(official_names(model), rules) | more
    for key, prefix in (("base_model", "module."), ("model_state_dict", "base_model.")):
        path = released(tmp_path, state, key, prefix)
        assert_same(model, act.load(path, points=model.config.points, **UNSEEN))
    papers = act.load(path, num_heads=3).config
    assert (papers.num_group, papers.group_size) == (64 if kind == "Student" else 128, 32)

def test_point_mae_students_get_a_new_class_token_with_a_warning(tmp_path):
    model = make("Student", target_dim=3 * 8)
    state = {key: value for key, value in official_names(model).items() if ".cls_" not in key}
    state = renamed(state, [("^ACT_", "MAE_"), (r"^proj_head\.", "increase_dim.0.")])
    state["increase_dim.0.weight"] = state["increase_dim.0.weight"][..., None]
    with pytest.warns(UserWarning, match="class token"):  # the group's size is the head's
        loaded = act.load(released(tmp_path, state), **without(UNSEEN, "group_size"))
    for name in ("cls_token", "cls_pos"):
        assert getattr(loaded.encoder, name).any()
        getattr(model.encoder, name).data = getattr(loaded.encoder, name).data
    assert_same(model, loaded)

def test_export_writes_official_names_and_load_gives_the_student_back(tmp_path):
    model = make("Student", num_group=32, points=500, drop_path=0.1)
    act.export(model, tmp_path / "out.pth")
    file, expected = torch.load(tmp_path / "out.pth", weights_only=True), official_names(model)
    assert {"base_model", "epoch", "metrics", "best_metrics"} <= set(file)
    assert file["base_model"].keys() == expected.keys()
    assert all(torch.equal(file["base_model"][k], expected[k]) for k in expected)
    assert_same(model, act.load(tmp_path / "out.pth"))

@pytest.mark.parametrize("kind, change, sizes, words", [
    ("Classifier", {"side_alpha": torch.ones(1)}, {}, ["nexpected key", "side_alpha"]),
    ("Classifier", {"cls_token": None}, {}, ["issing key", "encoder.cls_token"]),
    ("Student", {"proj_head.weight": None}, {}, ["head.weight"]),
    ("Student", {"norm.weight": torch.ones(2)}, {}, ["nexpected key", "norm.weight"]),
    ("Student", {"ACT_encoder.norm.bias": torch.ones(2)}, {}, ["encoder.norm.bias", 2, 12]),
    ("Student", {}, {"depth": 5}, ["issing key", "encoder.blocks.3"]),
    ("Student", {}, {"num_heads": 5}, [5, 12]), ("Student", {}, {"num_points": 3}, ["num_points"]),
    ("Teacher", {}, {"prompt": "loud"}, ["loud"]),
    ("Teacher", {"decoder.mlp.4.weight": None}, {}, ["decoder.mlp.4.weight"]),
    ("Teacher", {"visual_embed.0.0.attn.qkv.weight": None}, {}, ["Teacher"]),
    ("Teacher", {"codebook": torch.tensor(1.0)}, {}, ["Teacher"])])
def test_checkpoints_that_do_not_fit_are_named_and_told_why(tmp_path, kind, change, sizes, words):
    state = official_names(make(kind)) | change
    path = released(tmp_path, {key: value for key, value in state.items() if value is not None})
    with refused(path, *words):
        act.load(path, **{"num_heads": 2 if kind == "Teacher" else 3, **sizes})

SOME = {"a": torch.ones(1)}

@pytest.mark.parametrize("obj", [
    [1], SOME, {"kind": ["x"], "config": {}, "model": SOME}, {"kind": "Student", "config": {}},
    {"kind": "Student", "config": {"foo": 1}, "model": SOME},
    {"kind": "Student", "config": {"depth": "many"}, "model": SOME},
    {"kind": "Student", "config": 3, "model": SOME},
    {"kind": "Student", "config": ENCODER, "model": [1]},
    {"kind": "Student", "config": ENCODER, "model": {"a": 1}},
    {"kind": "Classifier", "config": ENCODER, "model": SOME}], ids=str)
def test_damaged_checkpoints_are_refused(tmp_path, obj):
    path = saved(tmp_path, obj)
    with refused(path):
        act.load(path)
