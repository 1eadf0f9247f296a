"""Tests of act.py: properties, plain formulas as oracles, public weights, model checkpoints.

    python -m pytest test_act.py                   # a minute on one core; no network, no GPU
    ACT_TEST_WEIGHTS=folder python -m pytest test_act.py -k real      # also real weight files
"""

import copy
import hashlib
import inspect
import json
import math
import os
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

# ---- Helpers -------------------------------------------------------------------------------------
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

def moved(before, after):
    before, after = before.state_dict(), after.state_dict()
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}

def saved(folder, obj, name="weights.pth"):
    torch.save(obj, folder / name)
    return folder / name

def changed(state, change):
    """The state with entries replaced, added or, where the change says None, removed."""
    return {key: value for key, value in (state | change).items() if value is not None}

def renamed(state, rules):
    """Every pattern of the rules replaced, in order, in every key."""
    for pattern, replacement in rules.items():
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return state

@contextmanager
def refused(*words):
    """Within it a ValueError is raised: one line that holds the words."""
    with pytest.raises(ValueError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message

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
SIZES = {  # small, no two alike
    "Teacher": dict(num_group=10, group_size=8, encoder_dims=16, tokens_dims=12, decoder_dims=20,
                    num_tokens=24, num_prompt=3, prompt_dropout=0.5),
    "Student": dict(ENCODER, target_dim=7), "Classifier": dict(ENCODER, num_classes=4),
    "Segmenter": dict(ENCODER, num_parts=5, num_categories=3)}

def make(kind, backbone="ViT", **options):
    if kind == "Teacher":
        options["backbone"] = act.BackboneConfig(width=18, depth=3, num_heads=2, mlp_hidden=24,
                                                 **BACKBONES[backbone])
    torch.manual_seed(0)
    config = getattr(act, f"{kind}Config")(**SIZES[kind] | options)
    return randomise(getattr(act, kind)(config)).eval()

@pytest.fixture
def double(monkeypatch):
    """act in float64: in float32 a maximum or a slope may change hands by rounding alone."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

# ---- Plain forms: what one writes first, once; bench.py times act beside them --------------------
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
        else:  # torch's own batch norm
            x = nn.BatchNorm1d.forward(layer, x) if isinstance(layer, act.BatchNorm) else layer(x)
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
    "strided": lambda xyz: xyz.mT.contiguous().mT,
    "identical": lambda xyz: xyz[:, :1].expand_as(xyz).clone(),
    "pairs": lambda xyz: xyz[:, torch.arange(xyz.shape[1]) // 2]}  # every point twice
seeds, shares = st.integers(0, 999), st.floats(0, 1)
precisions = st.sampled_from([torch.float32, torch.float64])
every_kind = pytest.mark.parametrize("kind", KINDS)
both_modes = pytest.mark.parametrize("train", [True, False])

def cloud(kind, B, N, seed, dtype=torch.float32):
    return KINDS[kind](randn(B, N, 3, seed=seed, dtype=dtype))

def arguments(name, dtype=torch.float32, device="cpu"):
    xyz, center, features = randn(2, 80, 3) + 3, randn(2, 9, 3, seed=1) + 3, randn(2, 9, 5)
    xyz, center, features = (t.to(device, dtype) for t in (xyz, center, features))
    return {"farthest_point_sample": (xyz, 20), "knn": (center, xyz, 7),
            "gather_points": (xyz, torch.tensor([[3, 9], [5, 0]], device=device)),
            "group_points": (xyz, 6, 5), "chamfer_distance": (xyz, center),
            "fscore": (xyz, center, 0.5), "interpolate": (xyz, center, features)}[name]

@every_kind
@few
@given(B=st.integers(1, 3), N=st.integers(1, 40), share=shares, seed=seeds, dtype=precisions)
@example(B=2, N=1, share=1.0, seed=0, dtype=torch.float32)
@example(B=3, N=200, share=1.0, seed=0, dtype=torch.float32)
def test_fps_equals_the_textbook_index_for_index(kind, B, N, share, seed, dtype):
    xyz, G = cloud(kind, B, N, seed, dtype), max(1, round(share * N))
    equal(act.farthest_point_sample(xyz, G), plain_fps(xyz, G))

def test_fps_starts_where_its_generator_says_alone():
    xyz, state = randn(16, 50, 3), torch.get_rng_state()
    idx, again = (act.farthest_point_sample(xyz, 10, generator=seeded(3)) for _ in range(2))
    equal((idx, idx), (again, plain_fps(xyz, 10, first=idx[:, 0])))
    assert len(idx[:, 0].unique()) > 5 and torch.equal(torch.get_rng_state(), state)

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
    out = subprocess.check_output([sys.executable, "-c", script], cwd=Path(act.__file__).parent)
    extra, radius = map(float, out.split())
    extra /= 2**20 if sys.platform == "darwin" else 2**10  # MiB; all differences at once: 1,144
    assert extra < 300 and radius < 0.05**2

@every_kind
@pytest.mark.parametrize("norm", [1, 2])
@few
@given(B=st.integers(1, 2), N=st.integers(1, 12), M=st.integers(1, 12), seed=seeds)
def test_chamfer_equals_the_formula(kind, norm, B, N, M, seed):
    a, b = cloud(kind, B, N, seed), cloud(kind, B, M, seed + 1)
    pairs = (a, b), (a, b.double()), (a.double(), b.double())
    found, better, best = (act.chamfer_distance(*pair, norm) for pair in pairs)
    equal(better, best)  # computed in the better of both precisions
    expected = plain_chamfer(a.double(), b.double(), norm).item()
    assert found.shape == () and found.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)

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
    features = randn(2, G, C, seed=seed + 2, dtype=torch.float64).requires_grad_()
    sqdist, idx = stable_knn(xyz, center, min(3, G))
    weight = 1 / (sqdist.double() + 1e-8)[..., None]
    expected = (weight * plain_gather(features, idx)).sum(2) / weight.sum(2)
    same_with_gradients(act.interpolate(xyz, center, features), expected, [features], 1e-4)

@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_the_same_under_autocast_on_a_gpu_and_from_its_source_alone(name):
    expected, space = getattr(act, name)(*arguments(name)), {"torch": torch}
    for each in GEOMETRY:
        exec(inspect.getsource(getattr(act, each)), space)
    equal(space[name](*arguments(name)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        equal(getattr(act, name)(*arguments(name)), expected)
    if torch.cuda.is_available():
        found = getattr(act, name)(*arguments(name, device="cuda"))
        for a, b in zip(listed(found), listed(expected), strict=True):
            close(a.cpu().double(), b.double(), 1e-6)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half], ids=str)
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_of_half_precision_is_computed_in_float32(name, dtype):
    function, args = getattr(act, name), arguments(name, dtype)
    single = [t.float() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]
    kept = torch.float32 if name in ("knn", "chamfer_distance", "fscore") else dtype
    expected = [t.to(kept) if t.is_floating_point() else t for t in listed(function(*single))]
    equal(function(*args), expected)

# ---- Transformer ---------------------------------------------------------------------------------
def torchs_block(block, x, mlp_hidden=48, norm_first=True, eps=1e-5, quick_gelu=False, **options):
    """The same block as torch's own layer."""
    gelu = (lambda x: x / (1 + (-1.702 * x).exp())) if quick_gelu else F.gelu
    layer = nn.TransformerEncoderLayer(12, 3, mlp_hidden, 0.0, gelu, eps, True, norm_first)
    state = renamed(dict(block.named_parameters()), {
        r"attn\.qkv\.": "self_attn.in_proj_", r"^attn\.": "self_attn.out_", r"mlp\.fc": "linear"})
    state.setdefault("self_attn.in_proj_bias", torch.zeros(36))
    for scale, name in (("ls1.gamma", "self_attn.out_proj"), ("ls2.gamma", "linear2")):
        if scale in state:
            gamma = torch.diag(state.pop(scale))
            state[f"{name}.weight"] = gamma @ state[f"{name}.weight"]
            state[f"{name}.bias"] = gamma @ state[f"{name}.bias"]
    return torch.func.functional_call(layer, state, x)

@pytest.mark.parametrize("options", [
    {}, dict(norm_first=False, eps=1e-2), dict(layer_scale=True), dict(quick_gelu=True),
    dict(qkv_bias=False, mlp_hidden=20)], ids=str)
def test_block_equals_torchs_own(options):
    block, x = randomise(act.Block(12, 3, **options)), randn(2, 5, 12).requires_grad_()
    same_with_gradients(block(x), torchs_block(block, x, **options), [x, *block.parameters()])

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

# ---- Teacher -------------------------------------------------------------------------------------
@both_modes
@pytest.mark.parametrize("module, x, more, plain", [
    (partial(act.PatchEmbed, 16), randn(2, 5, 7, 3), [], plain_patches),
    (partial(act.DGCNN, 10, 8), randn(2, 9, 10), [randn(2, 9, 9).topk(4)[1]], plain_dgcnn),
    (partial(act.FoldingDecoder, 12, 8), randn(2, 5, 12), [], plain_folding)],
    ids=["PatchEmbed", "DGCNN", "FoldingDecoder"])
def test_split_products_equal_explicit_concatenation(module, x, more, plain, train, double):
    module, x = randomise(module()).double().train(train), x.double().requires_grad_()
    twin = copy.deepcopy(module)
    ours, _ = module(x, *more), plain(twin, x, *more)
    for found, expected in zip(module.buffers(), twin.buffers()):  # batch norm's statistics
        close(found, expected, 1e-12)
    same_with_gradients(ours, plain(module, x, *more), [x, *module.parameters()], 1e-9)

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
    one, other = (teacher.train().transform(tokens, center) for _ in range(2))
    assert torch.equal(one, other) == (prompt == "none")  # the prompts' dropout

@both_modes
@pytest.mark.parametrize("hard", [True, False])
def test_teacher_equals_the_formula_with_gumbel_noise_in_training_only(hard, train, double):
    teacher = make("Teacher", prompt_dropout=0.5 * (not train)).double().train(train)
    xyz, state = random_clouds().double(), torch.get_rng_state()
    center = plain_gather(xyz, plain_fps(xyz, 10))
    neighborhood = plain_gather(xyz, stable_knn(center, xyz, 8)[1]) - center[:, :, None]
    graph = stable_knn(center, center, 4)[1]
    logits = plain_dgcnn(teacher.dgcnn_1, plain_patches(teacher.encoder, neighborhood), graph)
    codes = logits.argmax(-1)
    share = F.one_hot(codes, 24).double() if hard else (logits / 0.3).softmax(-1)
    if train:
        share = F.gumbel_softmax(logits, 0.3, hard)
        torch.set_rng_state(state)
    tokens = plain_transform(teacher, share @ teacher.codebook, center)
    features = plain_dgcnn(teacher.dgcnn_2, tokens, graph)
    plain = [*plain_folding(teacher.decoder, features), neighborhood, center, logits]
    ours = [*teacher(xyz, 0.3, hard)]
    if hard and not train:
        equal(teacher.tokenize(neighborhood, center), codes)
        ours.append(teacher.features(neighborhood, center))
        plain.append(features)
    assert torch.equal(torch.get_rng_state(), state) != train
    same_with_gradients(ours, plain, teacher.parameters(), 1e-9)

def test_teacher_takes_a_backbones_blocks_and_norms_without_its_image_side():
    sizes = dict(width=18, depth=2, num_heads=2, mlp_hidden=24, norm_pre=True)
    model = randomise(act.Backbone(act.BackboneConfig(**sizes, patch_size=4, grid=3, num_prefix=1)))
    teacher = act.Teacher(act.TeacherConfig(**SIZES["Teacher"]), model)
    equal(teacher.backbone.forward_tokens(randn(2, 5, 18)), model.forward_tokens(randn(2, 5, 18)))
    parts = {key.split(".")[0] for key in teacher.backbone.state_dict()}
    assert parts == {"norm_pre", "blocks", "norm"}

@pytest.mark.parametrize("logits", [
    3 * randn(4, 5, 9), 0 * randn(2, 5, 5) + 2.5, 50 * torch.eye(5).expand(2, -1, -1),
    *(size * F.one_hot(torch.ones(2, 4).long(), 5) for size in (3.0, 300.0))])  # all on one code
def test_teacher_loss_equals_an_independent_formula(logits):
    B, G, codes = logits.shape
    coarse, fine, patch = (randn(B, G, S, 3, seed=i) for i, S in enumerate((2, 8, 8)))
    output = act.TeacherOutput(coarse, fine, patch, randn(B, G, 3, seed=4), logits)
    total, reconstruction, kl = act.teacher_loss(output, 0.07)
    expected = sum(plain_chamfer(p.flatten(0, 1), patch.flatten(0, 1)) for p in (coarse, fine))
    assert reconstruction.item() == pytest.approx(expected.item(), rel=1e-5)
    used = logits.double().softmax(-1).mean(1)  # by each cloud; kl is KL(uniform || used)
    assert kl.item() == pytest.approx(-(codes * used).log().mean().item(), rel=1e-5, abs=1e-6)
    assert total.item() == pytest.approx(reconstruction.item() + 0.07 * kl.item(), rel=1e-6)

# ---- Student -------------------------------------------------------------------------------------
@pytest.mark.parametrize("masks", [act.random_mask, act.block_mask])
@pytest.mark.parametrize("ratio, masked", [(0, 0), (0.07, 0), (0.47, 4), (0.8, 8), (1, 10)])
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

@both_modes
@pytest.mark.parametrize("encoder_dims", [16, 12])
def test_student_equals_the_formula_and_sees_the_visible_patches_alone(train, encoder_dims, double):
    student, (neighborhood, center, mask) = make("Student", encoder_dims=encoder_dims), patches()
    student, encoder = student.double().train(train), student.encoder
    neighborhood, center = neighborhood.double(), center.double()
    x = encoder.reduce_dim(encoder.patch_embed(neighborhood[~mask].view(3, 4, 8, 3)))
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
    unseen = torch.where(mask[..., None, None], math.nan, neighborhood)
    out = student(unseen, center, mask), encoder(unseen, center, mask)
    same_with_gradients(out, (prediction, tokens), student.parameters(), 1e-9)
    assert student(neighborhood, center, torch.zeros_like(mask)).shape == (3, 0, 7)

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

# ---- Downstream heads ----------------------------------------------------------------------------
HEADED = {  # the model, what it takes besides the clouds
    "mlp3": (partial(make, "Classifier"), []),
    "linear": (partial(make, "Classifier", head="linear"), []),
    "parts": (partial(make, "Segmenter"), [torch.tensor([2, 0, 1])]),
    "scene": (partial(make, "Segmenter", num_categories=0), [])}

@pytest.mark.parametrize("kind", HEADED)
def test_heads_reach_every_parameter_and_depend_on_the_own_cloud_and_no_order(kind):
    build, extra = HEADED[kind]
    model, xyz, perm = build(), random_clouds(), [0, *range(63, 0, -1)]  # FPS starts at the first
    logits = model(xyz, *extra)
    assert logits.shape == ((3, 64, 5) if kind in ("parts", "scene") else (3, 4))
    (logits * randn(*logits.shape)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    close(model(xyz[1:2], *(e[1:2] for e in extra)), logits[1:2], 1e-4)
    equal(model(torch.cat([randn(1, 64, 3, seed=9), xyz[1:]]), *extra)[1:], logits[1:])
    permuted = model(xyz[:, perm], *extra)  # a segmenter's rows follow their points
    close(permuted, logits if logits.ndim == 2 else logits[:, perm], 1e-4)

@pytest.mark.parametrize("kind, options, frozen", [
    *(("Teacher", dict(prompt=prompt), "backbone.") for prompt in ("deep", "shallow", "none")),
    *(("Classifier", dict(head=head), "encoder.") for head in ("mlp3", "linear")),
    ("Classifier", {}, "nothing"), ("Student", {}, "nothing")])
def test_training_moves_all_but_the_frozen_which_stays_bit_identical(kind, options, frozen):
    model, xyz, target = make(kind, **options).train(), random_clouds(), randn(3, 6, 7)
    losses = {"Teacher": lambda: act.teacher_loss(model(xyz), 0.1)[0],
              "Student": lambda: act.distillation_loss(model(*patches()), target),
              "Classifier": lambda: F.cross_entropy(model(xyz), torch.tensor([0, 1, 2]))}
    if frozen == "encoder.":
        assert model.freeze_encoder() is model
    before, held = copy.deepcopy(model), getattr(model, frozen.strip("."), nn.Identity().eval())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)  # by gradients alone
    for _ in range(4):
        optimizer.zero_grad()
        losses[kind]().backward()
        optimizer.step()
    assert moved(before, model) == {key for key in model.state_dict() if not key.startswith(frozen)}
    assert model.training and not any(module.training for module in held.modules())

@pytest.mark.parametrize("kind", ["parts", "scene"])
@both_modes
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
    (lambda: act.Block(10, 3), [10, 3]), (lambda: act.FoldingDecoder(8, 30), ["group_size", 4, 30]),
    (lambda: act.TeacherConfig(prompt="wide"), ["prompt", "deep", "wide"])])
def test_what_is_wrong_is_named(call, words):
    with refused(*words):
        call()

# ---- Export, devices, imports --------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Classifier", "Student"])
def test_torch_export_works_with_any_batch_and_jit_traces(kind):
    model = make(kind)
    if kind == "Student":
        model.forward = model.encode
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (random_clouds(3),), dynamic_shapes=shapes).module()
    for B in (1, 3, 7):
        close(program(random_clouds(B, seed=5)), model(random_clouds(B, seed=5)))
    if kind == "Classifier":
        traced = torch.jit.trace(model, random_clouds())
        close(traced(random_clouds(seed=5)), model(random_clouds(seed=5)))

@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_every_tensor_is_made_on_the_inputs_device(device, monkeypatch):
    if device == "cuda" and torch.version.cuda is None:
        pytest.skip("needs a CUDA build of torch (and no GPU)")
    prompts = {"ViT": "deep", "CLIP": "shallow", "BERT": "none"}
    teachers = [make("Teacher", kind, prompt=prompt) for kind, prompt in prompts.items()]
    student, headed = make("Student"), {build(): len(extra) for build, extra in HEADED.values()}
    for kind in (torch.Tensor, FakeTensor):  # tensors without values cannot be counted
        monkeypatch.setattr(kind, "tolist", lambda tensor: [6, 6, 6])
    with nullcontext() if device == "meta" else FakeTensorMode(allow_non_fake_inputs=True):
        for model in (*teachers, student, *headed):
            model.to_empty(device=device)
        xyz, generator = torch.rand(3, 64, 3, device=device), seeded()
        neighborhood, center = act.group_points(xyz, 10, 8)
        mask = act.random_mask(center, 0.6, generator)
        masked = act.split_mask(mask, device)[1]
        out = [act.farthest_point_sample(xyz, 5, generator), act.block_mask(center, 0.6), masked]
        for teacher in teachers:
            for train in (True, False):
                output = teacher.train(train)(xyz, hard=not train)
                out += [*output, *act.teacher_loss(output, 0.1)]
            target = act.gather_points(teacher.features(neighborhood, center), masked)[..., :7]
        predict = student.train()(neighborhood, center, mask)
        for kind in ("cosine", "smooth_l1", "l2"):
            out.append(act.distillation_loss(predict, target, kind))
        category = torch.zeros(3, dtype=torch.long, device=device)
        out += [model(xyz, *[category][:count]) for model, count in headed.items()]
        assert {t.device.type for t in (*out, student.encode(xyz))} == {device}

@pytest.mark.parametrize("path", sorted(Path(act.__file__).parent.glob("*.py")), ids=str)
def test_imports_run_one_way_and_need_no_unix(path):
    text, own = path.read_text(encoding="utf-8"), {other.stem for other in path.parent.glob("*.py")}
    pattern = r"(?:import|from(?= [\w.]+ import)) (\w+)"
    found, top = (set(re.findall(start + pattern, text, re.M)) for start in ("^ *", "^"))
    assert not top & {"fcntl", "grp", "pwd", "resource", "termios"}
    assert found & own <= {"act": set(), "clouds": set(), "training": {"act"}}.get(path.stem, own)
    if path.stem == "act":
        assert found - {"torch", "numpy"} <= sys.stdlib_module_names

# ---- Public weights ------------------------------------------------------------------------------
def vit_state(grid=3, positions=1, layer_scale=False, **tokens):
    """Random weights under timm's names; positions: those of tokens in front of the patches."""
    shapes = {"cls_token": (1, 1, W), "pos_embed": (1, positions + grid**2, W),
              "patch_embed.proj.weight": (W, 3, 4, 4), "patch_embed.proj.bias": (W,),
              "norm.weight": (W,), "norm.bias": (W,)}
    shapes |= {name: (1, count, W) for name, count in tokens.items()}
    state = {key: randn(*shape, seed=i).half() for i, (key, shape) in enumerate(shapes.items())}
    torch.manual_seed(0)
    for i in (0, 1):
        block = randomise(act.Block(W, HEADS, layer_scale=layer_scale), seed=20 * i)
        state |= renamed(block.state_dict(), {"^": f"blocks.{i}."})
    return {key: value.float() for key, value in state.items()}  # exact in half precision

def plain_vit(state, x, heads=HEADS, eps=1e-6, **kind):
    """The Transformer of weights under timm's names, on images or on tokens."""
    def norm(name, x):
        weight, bias = (state.get(f"{name}.{part}") for part in ("weight", "bias"))
        return x if weight is None else F.layer_norm(x, (W,), weight, bias, eps)
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

def write_safetensors(state, path, **change):
    """The format written out by hand, as its specification has it, or with a wrong header."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.bool: "BOOL"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        raw = value.flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kinds[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(body), len(body) + len(raw)], **change}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(change.get("length", len(text)).to_bytes(8, "little") + text + body)

def write_torchscript(state, path):
    root = nn.Identity()
    for key, value in state.items():
        *names, leaf = key.split(".")
        node = root
        for name in names:
            node = node._modules.setdefault(name, nn.Identity())
        node.register_buffer(leaf, value.half())  # as CLIP's
    torch.jit.trace(root, torch.ones(1)).save(str(path))

def written(folder, state, name, **change):
    writers = {".safetensors": write_safetensors, ".pt": write_torchscript,
               ".npz": lambda state, path: np.savez(path, **state)}
    writers.get(Path(name).suffix, torch.save)(state, folder / name, **change)
    return folder / name

def split_qkv(state, *names):
    """The fused matrices as three of these names."""
    out = {}
    for key, value in state.items():
        parts = value.chunk(3) if ".attn.qkv." in key else [value]
        out |= {key.replace("qkv", name): part for name, part in zip(names, parts)}
    return out

def names(*theirs):
    """Rules from timm's names to those of others, in this order."""
    return dict(zip([
        r"^blocks\.", "norm1", "norm2", r"attn\.(?!proj)(\w+)\.", r"attn\.proj", r"mlp\.fc1",
        r"mlp\.fc2", r"^norm\.", "^cls_token", "^pos_embed", r"^patch_embed\.proj"], theirs))

WORDS = "query", "key", "value"
CLIP = names(
    "visual.transformer.resblocks.", "ln_1", "ln_2", "attn.in_proj_", "attn.out_proj", "mlp.c_fc",
    "mlp.c_proj", "visual.ln_post.", "visual.class_embedding", "visual.positional_embedding",
    "visual.conv1") | {"^norm_pre": "visual.ln_pre"}
TORCHVISION = names(
    "encoder.layers.encoder_layer_", "ln_1", "ln_2", "self_attention.in_proj_",
    "self_attention.out_proj", "mlp.0", "mlp.3", "encoder.ln.", "class_token",
    "encoder.pos_embedding", "conv_proj")
BERT = names(
    "encoder.layer.", "attention.output.LayerNorm", "output.LayerNorm", r"attention.self.\1.",
    "attention.output.dense", "intermediate.dense", "output.dense")
VIT = ("layernorm.", "embeddings.cls_token", "embeddings.position_embeddings",
       "embeddings.patch_embeddings.projection")
HUGGING_FACE = names(
    "encoder.layer.", "layernorm_before", "layernorm_after", r"attention.attention.\1.",
    "attention.output.dense", "intermediate.dense", "output.dense", *VIT)
IN_MEMORY = names(  # newer versions of transformers
    "layers.", "layernorm_before", "layernorm_after", r"attention.\1_proj.", "attention.o_proj",
    "mlp.fc1", "mlp.fc2", *VIT)
JAX = names(
    "Transformer.encoderblock_", "LayerNorm_0", "LayerNorm_2",
    r"MultiHeadDotProductAttention_1.\1.", "MultiHeadDotProductAttention_1.out",
    "MlpBlock_3.Dense_0", "MlpBlock_3.Dense_1", "Transformer.encoder_norm.", "cls",
    "Transformer.posembed_input.pos_embedding", "embedding") | {
        r"(orm\w*)\.weight": r"\1.scale", "weight$": "kernel", r"\.": "/"}

def jax_arrays(state, heads=HEADS):
    """AugReg's .npz: matrices (in, out), heads apart, convolutions (H, W, in, out)."""
    out = {"head.kernel": np.ones(2), "head.bias": np.ones(2), "pre_logits.bias": np.ones(2)}
    for key, value in split_qkv(state, *WORDS).items():
        array = value.numpy().T if value.ndim == 2 else value.numpy()
        if key.endswith("attn.proj.weight"):
            array = array.reshape(heads, W // heads, W)
        elif ".attn." in key and ".proj." not in key:
            array = array.reshape(*array.shape[:-1], heads, W // heads)
        out[key] = array.transpose(2, 3, 1, 0) if value.ndim == 4 else array
    return renamed(out, JAX)

def layout(rules={}, words=(), prefix="", more=(), file="weights.pth", state=None, **kind):
    """What a file holds, its name; the same under timm's names, with the kind of Transformer."""
    state = state or vit_state()
    held = renamed(split_qkv(state, *words) if words else state, rules | {"^": prefix})
    return held | dict.fromkeys(more, torch.ones(2, W)), file, state, kind

def bert(rules={}, prefix="", file="weights.pth", positions=512, eps=1e-12):
    more = [prefix + name for name in (
        "embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight",
        "embeddings.position_ids", "pooler.dense.weight", "lm_head.dense.weight")]
    blocks = {key: value for key, value in vit_state().items() if key.startswith("blocks.")}
    held, *others = layout(
        BERT | rules, WORDS, prefix, more, file, blocks, eps=eps, norm_first=False)
    held[f"{prefix}embeddings.position_embeddings.weight"] = torch.ones(positions, W)
    return held, *others

def clip(file):
    state, more = changed(vit_state(), {"patch_embed.proj.bias": None}), [
        "visual.proj", "transformer.resblocks.0.ln_1.weight", "token_embedding.weight",
        "positional_embedding", "ln_final.weight", "text_projection", "logit_scale",
        "input_resolution", "context_length", "vocab_size"]
    for part in ("weight", "bias"):
        state[f"norm_pre.{part}"] = state[f"norm.{part}"].flip(0)
    held, *others = layout(CLIP, (), "", more, file, state, eps=1e-5, quick_gelu=True)
    for name in ("visual.class_embedding", "visual.positional_embedding"):
        held[name] = held[name].squeeze()
    return held, *others

LAYOUTS = {  # what a file may hold beside, around and instead of timm's names
    "DeiT": layout(more=["head.bias", "head_dist.weight", "pre_logits.fc.bias"],
                   state=vit_state(positions=2, dist_token=1)),
    "registers alone": layout(state=vit_state(positions=0, reg_token=4)),
    "Meta's registers": layout({"^reg_token$": "register_tokens"}, more=["mask_token"],
                               state=vit_state(reg_token=4)),
    "state_dict": layout(prefix="module."),
    "DINO": layout(prefix="module.backbone.", more=[
        "module.head.mlp.0.weight", "module.head.last_layer.bias"]),
    "DINOv2": layout(prefix="backbone.", more=[
        "dino_head.mlp.0.bias", "ibot_head.last_layer.bias"], state=vit_state(layer_scale=True)),
    "MAE": layout(more=["mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight"]),
    "torchvision": layout(TORCHVISION, more=["heads.head.weight"]),
    "older torchvision": layout(TORCHVISION | {
        r"mlp\.0": "mlp.linear_1", r"mlp\.3": "mlp.linear_2"}),
    "Hugging Face": layout(HUGGING_FACE, WORDS, "", ["pooler.dense.bias"], "a.safetensors",
                           eps=1e-12),
    "in memory": layout(IN_MEMORY, "qkv", "vit.", ["classifier.weight"], eps=1e-12),
    "CLIP": clip("weights.pth"), "TorchScript": clip("ViT.pt"),
    "JAX": (jax_arrays(vit_state(), heads=4), "augreg.npz", vit_state(), dict(heads=4)),
    "older JAX": (renamed(jax_arrays(vit_state()), {"^": "opt/target/"}), "a.npz", vit_state(), {}),
    "BERT": bert(file="m.safetensors"), "RoBERTa": bert(prefix="roberta.", eps=1e-5),
    "older BERT": bert({"Norm.weight$": "Norm.gamma", "Norm.bias$": "Norm.beta"}, "bert."),
    "RoBERTa alone": bert(positions=514, file="m.safetensors", eps=1e-5)}
WRAPPED = {"state_dict": "state_dict", "DINO": "teacher", "DINOv2": "teacher", "MAE": "model"}

@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_the_formula_on_the_same_weights_under_timms_names(tmp_path, name):
    held, file, state, kind = LAYOUTS[name]
    held = {WRAPPED[name]: held, "epoch": 3, "student": {}} if name in WRAPPED else held
    heads = None if name == "JAX" else HEADS  # the file says 4
    path = written(tmp_path, held, file)
    same_outputs(act.load_pretrained(path, num_heads=heads), state, **kind)

def timm_vit(name, **options):
    model = peer("timm").create_model(name, dynamic_img_size=True, **options)
    return model, randn(1, 3, 112, 56), model.forward_features

def hugging_face(family, num_hidden_layers=1, **sizes):
    module = peer(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    model, config = (getattr(module, family + kind) for kind in ("Model", "Config"))
    model = model(config(num_hidden_layers=num_hidden_layers, **sizes))
    x = randn(1, 3, 32, 32) if family == "ViT" else torch.tensor([[1, 2, 3, 4]])
    return model, x, lambda x: model(x).last_hidden_state

@pytest.mark.parametrize("build, file", [
    (partial(timm_vit, "deit_tiny_distilled_patch16_224", depth=1, patch_size=8), None),
    (partial(timm_vit, "vit_small_patch14_reg4_dinov2", depth=1), None),
    (partial(timm_vit, "vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10),
     "vit_tiny_patch4_32_cifar10.pth"),
    (partial(hugging_face, "ViT", image_size=32), None),
    (partial(hugging_face, "Roberta", layer_norm_eps=1e-5, max_position_embeddings=514), None),
    (partial(hugging_face, "Bert", 6, hidden_size=384, intermediate_size=1536),
     "minilm-l6/model.safetensors")])
def test_other_libraries_agree_on_random_and_on_real_weights(tmp_path, build, file):
    path = Path(os.environ.get("ACT_TEST_WEIGHTS", "")) / (file or "")
    if file and not path.is_file():
        pytest.skip(f"needs ACT_TEST_WEIGHTS, a folder that holds {file}")
    theirs, x, run = build()
    state = act.read_tensors(path) if file else randomise(theirs).state_dict()
    theirs.eval().load_state_dict(state.get("model", state), strict=False)  # outputs will tell
    ours = act.load_pretrained(path if file else saved(tmp_path, state))
    found = ours.forward_features(x) if x.ndim == 4 else ours.forward_tokens(theirs.embeddings(x))
    close(found, run(x), 1e-4)

def test_images_of_another_size_resample_the_positions(tmp_path):
    state = vit_state(grid=4)
    state["pos_embed"][:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]  # a ramp in each row
    state["patch_embed.proj.bias"].zero_()
    model = act.load_pretrained(saved(tmp_path, state))
    model.blocks, model.norm = nn.ModuleList(), nn.Identity()  # what goes in comes out
    ramp = model.forward_features(torch.zeros(1, 3, 8, 32))[:, 1:].view(2, 8, W)
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

def test_files_are_read_exactly_by_content_whatever_their_name(tmp_path):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True]), "s": torch.tensor(3),
             "e": torch.empty(0, 4), "h": torch.tensor([1.5], dtype=torch.float16),
             "bf": torch.tensor([[2.5]], dtype=torch.bfloat16)}
    path = written(tmp_path, state, "x.safetensors").rename(tmp_path / "x.pth")
    for path in (path, saved(tmp_path, state, "y.safetensors")):
        read = act.read_tensors(path)
        assert list(read) == list(state)
        equal(read.values(), state.values())  # torch.equal compares shapes, too

@pytest.mark.parametrize("name, share, change", [
    *((name, share, {}) for name in ("a.pth", "a.npz", "a.safetensors") for share in (0, 0.5, 0.9)),
    *(("a.safetensors", 1, change) for change in (
        {"data_offsets": [8, 24]}, {"data_offsets": [-16, 0]}, {"data_offsets": [0]},
        {"dtype": "F8"}, {"shape": [10**15]}, {"shape": [2]}, {"shape": [-2, -2]},
        {"shape": None}, {"length": 2**63}, {"length": 2**40}))])
def test_files_cut_short_and_headers_that_do_not_fit_are_refused(tmp_path, name, share, change):
    path = written(tmp_path, {"a": torch.ones(4)}, name, **change)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with refused(path):
        act.read_tensors(path)

@pytest.mark.parametrize("form", ["zip", "legacy", "npz", "TorchScript"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    path, trace = tmp_path / "weights.npz", tmp_path / "trace"
    hostile = type("_Hostile", (), {"__reduce__": lambda self: (os.mkdir, (str(trace),))})()
    obj = {"model": vit_state(), "epoch": hostile}
    if form == "npz":
        np.savez(path, cls=np.array([hostile], dtype=object))
    elif form == "TorchScript":  # such a method would run as the archive is loaded
        write_torchscript(vit_state(), path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("weights/code/more.py", "def __setstate__(self, state): pass")
    else:
        torch.save(obj, path, _use_new_zipfile_serialization=form == "zip")
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
    same_outputs(act.load_pretrained(path, num_heads=HEADS), vit_state())
    assert not set(act._NUMPY_NAMES) & set(torch.serialization.get_safe_globals())

def test_every_name_has_an_address_and_a_file_of_its_own():
    names = act.pretrained_names()
    assert {"vit_base_patch16_384", "deit_tiny_patch16_224", "dino_vitb16", "dinov2_vits14",
            "mae_vit_base", "clip_vit_b16", "bert_base", "roberta_base", "minilm_l6"} <= set(names)
    assert len(set(names.values())) == len(names)
    for url in names.values():
        assert re.fullmatch(r"https://[^ {}]+\.(npz|pth|pt|safetensors)", url)

@pytest.mark.parametrize("name, file, size, words", [
    ("deit_tiny_patch16_224", "deit-{:.8}.pth", None, None), ("dino_vits16", "d.pth", None, None),
    ("clip_vit_b16", "{}/ViT.pt", None, None), ("bert_base", "model.safetensors", None, None),
    ("dino_vits16", "deit-00000000.pth", None, ["hash"]), ("dino_vits16", "d.pth", 1000, []),
    ("clip_vit_b16", "0" * 64 + "/ViT.pt", None, ["hash"]),
    ("dino_vits16", "nowhere.pth", 0, ["net/nowhere.pth"])])
def test_downloads_are_made_once_or_refused(tmp_path, monkeypatch, name, file, size, words):
    body, cache, timeouts = saved(tmp_path, vit_state()).read_bytes(), tmp_path / "checkpoints", []
    path = tmp_path / "net" / file.format(hashlib.sha256(body).hexdigest())
    path.parent.mkdir(parents=True)
    if size != 0:
        path.write_bytes(body[:size])
    monkeypatch.setitem(act._PUBLISHED, name, path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket, "setdefaulttimeout", timeouts.append)
    fails = words is not None
    with refused(name, cache / path.name, *words) if fails else nullcontext():
        for _ in range(2):
            same_outputs(act.load_pretrained(name, num_heads=HEADS), vit_state())
    file = f"{name}.safetensors" if name == "bert_base" else path.name
    assert os.listdir(cache) == ([] if fails else [file])
    assert timeouts == [10, socket.getdefaulttimeout()]

# ---- Model checkpoints ---------------------------------------------------------------------------
UNSEEN = dict(num_group=10, num_heads=3, drop_path=0.0)  # what no tensor shows, beside group_size
EDGES = {r"(layer\d)\.linear": r"\1.0", r"(layer\d)\.norm": r"\1.1"}
ENCODER_NAMES = {r"^encoder\.blocks": "encoder.blocks.blocks", "patch_embed": "encoder"}
OFFICIAL = {  # our names -> the official implementation's
    "ViT": EDGES | {"^backbone.blocks": "visual_embed.0", "^backbone.norm": "visual_embed.1"},
    "CLIP": EDGES | CLIP | {
        "^backbone.norm_pre": "visual_embed.0", "^backbone.blocks": "visual_embed.1",
        "^backbone.norm": "visual_embed.2"},
    "BERT": EDGES | BERT | {"^backbone.blocks": "visual_embed.0.layer"},
    "Student": ENCODER_NAMES | {r"^(en|de)coder\.": r"ACT_\1coder.", "^head": "proj_head"},
    "Classifier": ENCODER_NAMES | {r"^encoder\.": "", "^head": "cls_head_finetune"},
    "Segmenter": ENCODER_NAMES | {
        r"^encoder\.": "", r"^head\.0": "convs1_cls", r"^head\.1": "bns1_cls",
        r"^head\.4": "convs2_cls", r"^head\.5": "bns2_cls", r"^head\.7": "convs3_cls",
        "^label_conv": "label_conv_cls", r"^propagation\.0": "propagation_0_cls.mlp_convs.0",
        r"^propagation\.1": "propagation_0_cls.mlp_bns.0",
        r"^propagation\.3": "propagation_0_cls.mlp_convs.1",
        r"^propagation\.4": "propagation_0_cls.mlp_bns.1"}}
KERNELS = r"(.*_conv(_cls)?\.[036]|dgcnn_\d\.(input_trans|layer\d\.0)|.*convs.*)\.weight"

def official_names(model):
    """A state dict under the official implementation's names, 1 x 1 convolutions with kernels."""
    state, kind = model.state_dict(), type(model).__name__
    if kind == "Teacher":
        c = model.config.backbone
        kind = "CLIP" if c.norm_pre else "ViT" if c.norm_first else "BERT"
    state = renamed(split_qkv(state, *WORDS) if kind == "BERT" else state, OFFICIAL[kind])
    for key, value in state.items():
        if re.fullmatch(KERNELS, key):
            ones = [1, 1] if re.search("layer[1-4]", key) else [1]
            state[key] = value.view(*value.shape, *ones)
    return state

def released(folder, state, key="base_model", prefix="module."):
    obj = {key: renamed(state, {"^": prefix}), "epoch": 3, "metrics": {"acc": np.float64(93.2)}}
    return saved(folder, obj, "w.pth")

def assert_same(model, loaded, **changes):
    assert type(model) is type(loaded) and not loaded.training and not moved(model, loaded)
    assert asdict(loaded.config) == asdict(model.config) | changes

@pytest.mark.parametrize("kind, options", [
    ("Teacher", dict(prompt="shallow", backbone="CLIP")),
    ("Student", dict(points=77, normalized=False)),
    ("Classifier", dict(class_names=["a", "b"], head="linear")),
    ("Segmenter", dict(class_names=["x"], part_ranges=[[0, 2], [2, 5]]))])
def test_our_checkpoints_round_trip_and_outlive_a_save_that_fails(tmp_path, kind, options):
    model, path = make(kind, **options), tmp_path / "last.pt"
    obj = {"kind": kind, "config": asdict(model.config), "model": model.state_dict()}
    act.save({**obj, "step": 3}, path)
    with pytest.raises(Exception):
        act.save({"step": 4, "code": lambda: None}, path)
    for path_or_name in (path, str(path)):
        assert_same(model, act.load(path_or_name, device="cpu"))
    assert torch.load(path, weights_only=True)["step"] == 3 and os.listdir(tmp_path) == ["last.pt"]

@pytest.mark.parametrize("kind, options, rules", [
    ("Teacher", {}, {}), ("Teacher", dict(prompt="none", num_prompt=0), {}),
    ("Teacher", dict(prompt="shallow", backbone="DINOv2"), {}),
    ("Teacher", dict(backbone="CLIP"), {}), ("Teacher", dict(backbone="BERT"), {}),
    ("Teacher", dict(prompt="shallow", backbone="CLIP"), {"^": "dvae_tokenizer."}),
    ("Student", dict(encoder_dims=12), {}),
    ("Student", dict(decoder_depth=1), {r"^proj_head\.": "proj_head.0."}),
    ("Classifier", dict(head="mlp3"), {}), ("Classifier", dict(head="linear"), {}),
    ("Segmenter", dict(num_categories=16), {}), ("Segmenter", dict(num_categories=0), {}),
    ("Segmenter", {}, {r"_cls\.": "."})])  # older names
def test_official_models_are_read(tmp_path, kind, options, rules):
    model = make(kind, **options)
    state = renamed(official_names(model), rules)
    if kind == "Student":  # in its file stands more
        state |= dict.fromkeys([
            "ACT_encoder.lm_head.weight", "ACT_encoder.cls_head.0.bias", "dvae_tokenizer.codebook",
            "dvae_tokenizer.encoder.first_conv.0.weight"], torch.ones(2))
    sizes, change = dict(UNSEEN, group_size=8, points=160), {}
    if kind == "Teacher":
        sizes, change = dict(num_group=10, num_heads=2, prompt_dropout=0.5), {"weights": "w.pth"}
    for key, prefix in (("base_model", "module."), ("model_state_dict", "base_model.")):
        path = released(tmp_path, state, key, prefix)
        assert_same(model, act.load(path, **sizes), **change)
    papers = act.load(path, num_heads=sizes["num_heads"]).config
    assert papers.num_group == (64 if kind in ("Teacher", "Student") else 128)
    assert papers.group_size == (8 if kind == "Teacher" else 32)  # a teacher's decoder tells

def test_point_mae_students_get_a_new_class_token_with_a_warning(tmp_path):
    model = make("Student", target_dim=3 * 8)
    state = {key: value for key, value in official_names(model).items() if ".cls_" not in key}
    state = renamed(state, {"^ACT_": "MAE_", r"^proj_head\.": "increase_dim.0."})
    state["increase_dim.0.weight"] = state["increase_dim.0.weight"][..., None]
    with pytest.warns(UserWarning, match="class token"):
        loaded = act.load(released(tmp_path, state), **UNSEEN)  # group_size is the head's
    for name in ("cls_token", "cls_pos"):
        assert getattr(loaded.encoder, name).any()
        getattr(model.encoder, name).data = getattr(loaded.encoder, name).data
    assert_same(model, loaded)

def test_export_writes_official_names_and_load_gives_the_student_back(tmp_path):
    model, path = make("Student", num_group=32, points=500, drop_path=0.1), tmp_path / "out.pth"
    act.export(model, path)
    file, expected = torch.load(path, weights_only=True), official_names(model)
    assert {"base_model", "epoch", "metrics", "best_metrics"} <= set(file)
    assert file["base_model"].keys() == expected.keys()
    assert "ACT_encoder.blocks.blocks.0.attn.qkv.bias" not in expected  # as in the published file
    equal([file["base_model"][key] for key in expected], expected.values())
    assert_same(model, act.load(path))

def misfit(obj, *words, load=act.load, config="{}", **options):
    """A file's content, or what makes it, and what its refusal names."""
    return obj, words, load, config, options

def official(kind, **change):
    return lambda: {"base_model": changed(official_names(make(kind)), change)}

def of_kind(kind, config, model):
    return misfit({"kind": kind, "config": config, "model": model})

weights, ones = partial(misfit, load=act.load_pretrained), torch.ones(2)
BERT_BIAS = "encoder.layer.0.attention.self.{}.bias"

@pytest.mark.parametrize("obj, words, load, config, options", [
    misfit(None), weights(None, "minilm_l6"), weights({}, "tensors"), weights([1], "tensors"),
    weights({"a": ones}, "layout", "a"), weights(changed(vit_state(), {"cls_token": None})),
    weights(vit_state() | {"fc_norm.weight": ones}, "nexpected key", "fc_norm.weight"),
    weights(vit_state() | {"blocks.9.norm1.bias": ones}, "nexpected key", "blocks.9.norm1.bias"),
    weights(vit_state(reg_token=4) | {"register_tokens": ones}, "register_tokens", "reg_token"),
    weights(vit_state() | {"norm.weight": ones}, "norm.weight", 2, W),
    weights(vit_state() | {"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}),
    *(weights(changed(vit_state(), {key: None}), key) for key in (
        "blocks.1.mlp.fc2.bias", "blocks.0.attn.qkv.weight", "pos_embed")),
    *(weights(changed(LAYOUTS["BERT"][0], {BERT_BIAS.format(word): None}), "attn.k.bias")
      for word in WORDS[:2]),
    weights(vit_state(), 7, W, num_heads=7), weights(vit_state(), num_heads=-2),
    weights(vit_state(), config="{"), weights(vit_state(), config="[1]"),
    weights(vit_state(), "relu", config='{"hidden_act": "relu"}'),
    weights(vit_state(), 768, config='{"hidden_size": 768}'),
    weights(vit_state(), config='{"num_attention_heads": "many"}'),
    misfit(official("Classifier", side_alpha=ones), "nexpected key", "side_alpha"),
    misfit(official("Classifier", cls_token=None), "issing key", "encoder.cls_token"),
    misfit(official("Student", **{"proj_head.weight": None}), "head.weight"),
    misfit(official("Student", **{"ACT_encoder.norm.bias": ones}), "encoder.norm.bias", 2, 12),
    misfit(official("Student"), "issing key", "encoder.blocks.3", depth=5),
    misfit(official("Student"), 5, 12, num_heads=5),
    misfit(official("Student"), "wide", wide=3), misfit(official("Teacher"), "loud", prompt="loud"),
    misfit(official("Teacher", **{"decoder.mlp.4.weight": None}), "decoder.mlp.4.weight"),
    misfit(official("Teacher", **{"visual_embed.0.0.attn.qkv.weight": None}), "Teacher"),
    misfit(official("Teacher", codebook=torch.tensor(1.0)), "Teacher"),
    misfit([1]), misfit({"a": ones}), misfit({"kind": "Student", "config": {}}),
    of_kind(["x"], {}, {"a": ones}), of_kind("Student", {"foo": 1}, {"a": ones}),
    of_kind("Student", {"depth": "many"}, {"a": ones}), of_kind("Student", 3, {"a": ones}),
    of_kind("Student", ENCODER, [1]), of_kind("Student", ENCODER, {"a": 1}),
    of_kind("Classifier", ENCODER, {"a": ones})])
def test_files_that_do_not_fit_are_named_and_told_why(tmp_path, obj, words, load, config, options):
    path = tmp_path / "weights.pth"
    if obj is not None:
        torch.save(obj() if callable(obj) else obj, path)
    (tmp_path / "config.json").write_text(config)
    with refused(path, *words):
        load(path, **options)
