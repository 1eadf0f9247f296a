"""Tests of act.py: properties, and util/plain.py's textbook forms as oracles.

python -m pytest test_act.py        # half a minute on one core; no network, no GPU
"""

import copy
import inspect
import math
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import act
import common
from common import assert_close, assert_equal, make, randn, randomise, refused, seeded
from util import plain

pytestmark = pytest.mark.filterwarnings("ignore")


# -- helpers --------------------------------------------------------------------------------------
def listed(out):
    """A tensor as a list of one, a tuple of tensors as a list."""
    return [out] if isinstance(out, torch.Tensor) else list(out)


def gradients_of(outs, inputs):
    """Gradients of a fixed random functional of the outputs."""
    total = 0
    for i, out in enumerate(outs):
        total = total + (out * randn(*out.shape, seed=7 + i)).sum()
    return torch.autograd.grad(total, inputs, allow_unused=True)


def assert_same_with_gradients(ours, plainly, inputs, rtol=1e-5):
    """Two forms of the same outputs agree, and so do their gradients."""
    ours = listed(ours)
    plainly = listed(plainly)
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    found = gradients_of(ours, inputs)
    expected = gradients_of(plainly, inputs)
    for a, b in zip(ours, plainly, strict=True):
        assert_close(a, b, rtol)
    scale = max(g.abs().max().item() for g in expected if g is not None)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:  # one that is 0 but for rounding is measured by the rest
            assert_close(a, b, rtol, floor=scale / 10)


def random_clouds(B=3, N=64, seed=0):
    scale = randn(B, 1, 3, seed=seed + 1).abs().clamp(0.3, 1)
    return F.normalize(randn(B, N, 3, seed=seed), dim=-1) * scale


def random_patches():
    """Ten patches of three clouds, and a mask of six of them."""
    neighborhood, center = act.group_points(random_clouds(), 10, 8)
    return neighborhood, center, act.random_mask(center, 0.6, seeded())


make_student = partial(make, "Student")
make_classifier = partial(make, "Classifier")
make_segmenter = partial(make, "Segmenter")


@pytest.fixture
def double(monkeypatch):
    """act in float64: in float32 a maximum or a slope may change hands by rounding alone."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


both_modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])

# -- geometry -------------------------------------------------------------------------------------
CLOUDS = {  # what makes equal distances, rounding and odd memory layouts
    "normal": lambda xyz: xyz,
    "far": lambda xyz: xyz + 1e4,
    "grid": lambda xyz: xyz.round(),
    "tenths": lambda xyz: xyz.round(decimals=1),
    "strided": lambda xyz: xyz.mT.contiguous().mT,
    "identical": lambda xyz: xyz[:, :1].expand_as(xyz).clone(),
    "pairs": lambda xyz: xyz[:, torch.arange(xyz.shape[1]) // 2],
}
GEOMETRY = ["farthest_point_sample", "knn", "gather_points", "group_points"]
GEOMETRY += ["chamfer_distance", "fscore", "interpolate"]
every_cloud = pytest.mark.parametrize("kind", CLOUDS)
batches = st.integers(1, 3)
seeds = st.integers(0, 999)
shares = st.floats(0, 1, allow_subnormal=False)  # a command may flush them
precisions = st.sampled_from([torch.float32, torch.float64])


def cloud(kind, B, N, seed, dtype=torch.float32):
    return CLOUDS[kind](randn(B, N, 3, seed=seed, dtype=dtype))


def arguments(name, dtype=torch.float32, device="cpu"):
    """What a function of GEOMETRY can be called with."""
    xyz = (randn(2, 80, 3) + 3).to(device, dtype)
    center = (randn(2, 9, 3, seed=1) + 3).to(device, dtype)
    features = randn(2, 9, 5).to(device, dtype)
    idx = torch.tensor([[3, 9], [5, 0]], device=device)
    calls = {
        "farthest_point_sample": (xyz, 20),
        "knn": (center, xyz, 7),
        "gather_points": (xyz, idx),
        "group_points": (xyz, 6, 5),
        "chamfer_distance": (xyz, center),
        "fscore": (xyz, center, 0.5),
        "interpolate": (xyz, center, features),
    }
    return calls[name]


def call(name, dtype=torch.float32, device="cpu"):
    """What a function of GEOMETRY returns for these arguments, as a list."""
    return listed(getattr(act, name)(*arguments(name, dtype, device)))


@every_cloud
@given(B=batches, N=st.integers(1, 40), share=shares, seed=seeds, dtype=precisions)
@example(B=2, N=1, share=1.0, seed=0, dtype=torch.float32)
@example(B=3, N=200, share=1.0, seed=0, dtype=torch.float32)
def test_fps_equals_the_textbook_but_takes_no_index_twice(kind, B, N, share, seed, dtype):
    xyz = cloud(kind, B, N, seed, dtype)
    G = max(1, round(share * N))
    expected = []
    for row in plain.farthest_point_sample(xyz, G).tolist():
        distinct = dict.fromkeys(row + list(range(N)))  # copies of chosen points come last
        expected.append(list(distinct)[:G])
    assert act.farthest_point_sample(xyz, G).tolist() == expected


def test_fps_starts_at_random_by_its_generator_alone():
    xyz = randn(16, 50, 3)
    state = torch.get_rng_state()
    idx = act.farthest_point_sample(xyz, 10, generator=seeded(3))
    assert len(idx[:, 0].unique()) > 5
    assert_equal(idx, plain.farthest_point_sample(xyz, 10, first=idx[:, 0]))
    assert_equal(idx, act.farthest_point_sample(xyz, 10, generator=seeded(3)))
    assert torch.equal(torch.get_rng_state(), state)


@every_cloud
@given(B=batches, Q=batches, N=st.integers(1, 300), share=shares, seed=seeds, dtype=precisions)
@example(B=1, Q=5, N=1, share=1.0, seed=0, dtype=torch.float32)
@example(B=2, Q=200, N=3000, share=0.01, seed=0, dtype=torch.float32)  # several chunks
@example(B=2, Q=200, N=3000, share=0.0, seed=0, dtype=torch.float32)
def test_knn_equals_a_stable_sort_ties_included(kind, B, Q, N, share, seed, dtype):
    xyz = cloud(kind, B, N, seed, dtype)
    query = cloud(kind, B, Q, seed + 1, dtype)
    k = max(1, round(share * N))
    assert_equal(act.knn(query, xyz, k), plain.stable_knn(query, xyz, k))


def test_knn_of_a_million_points_holds_few_distances_at_a_time(monkeypatch):
    smallest = act.smallest
    numbers = []

    def counted(value, k):
        numbers.append(value.numel())
        return smallest(value, k)

    monkeypatch.setattr(act, "smallest", counted)
    act.knn(randn(1, 30, 3), randn(1, 1_000_000, 3), 32)
    assert sum(numbers) == 30_000_000
    assert max(numbers) == 1_000_000


@every_cloud
@pytest.mark.parametrize("norm", [1, 2])
@given(B=st.integers(1, 2), N=st.integers(1, 12), M=st.integers(1, 12), seed=seeds)
def test_chamfer_equals_the_formula(kind, norm, B, N, M, seed):
    a = cloud(kind, B, N, seed)
    b = cloud(kind, B, M, seed + 1)
    expected = plain.chamfer_distance(a.double(), b.double(), norm).item()
    assert act.chamfer_distance(a, b, norm).item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    found = act.chamfer_distance(a, b.double(), norm)  # in the better of both precisions
    assert_equal(found, act.chamfer_distance(a.double(), b.double(), norm))


@pytest.mark.parametrize("norm", [1, 2])
def test_chamfer_has_the_gradient_of_finite_differences(norm):
    a = randn(2, 6, 3, seed=6, dtype=torch.float64).requires_grad_()
    b = randn(2, 4, 3, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(partial(act.chamfer_distance, norm=norm), (a, b))


@pytest.mark.parametrize("norm", [1, 2])
def test_chamfer_has_gradient_zero_where_clouds_coincide(norm):
    a = cloud("pairs", 2, 20, 0).requires_grad_()
    loss = act.chamfer_distance(a, a.detach().flip(1), norm)
    loss.backward()
    assert loss.item() == 0
    assert not a.grad.any()


@pytest.mark.parametrize(
    "pred, target, threshold, expected",
    [
        ([0, 1], [0, 1], 0.01, 1),
        ([0, 1], [0.05, 1.05], 0.06, 1),
        ([0, 1], [0.05, 1.05], 0.01, 0),  # 0.05 > 0.01, though 0.05^2 < 0.01
        ([0, 1], [0, 5], 0.5, 1 / 2),
        ([0, 1], [0, 5], 2, 2 / 3),
        ([0, 1.5], [0, 5], 2, 2 / 3),  # 1.5 < 2, though 1.5^2 > 2
    ],
)
def test_fscore_of_cases_worked_by_hand(pred, target, threshold, expected):
    pred = F.pad(torch.tensor([pred, [0.0, 1.0]])[..., None], [0, 2])  # points on the x axis
    target = F.pad(torch.tensor([target, [90.0, 91.0]])[..., None], [0, 2])
    for a, b in ((pred, target), (target, pred)):
        assert act.fscore(a, b, threshold).tolist() == pytest.approx([expected, 0])


@every_cloud
@given(N=st.integers(1, 10), G=st.integers(1, 8), C=st.integers(1, 3), seed=seeds)
@example(N=5, G=1, C=2, seed=0)
def test_interpolation_weighs_three_centres_by_inverse_squared_distance(kind, N, G, C, seed):
    xyz = cloud(kind, 2, N, seed)
    center = cloud(kind, 2, G, seed + 1)
    features = randn(2, G, C, seed=seed + 2, dtype=torch.float64).requires_grad_()
    sqdist, idx = plain.stable_knn(xyz, center, min(3, G))
    weight = 1 / (sqdist.double() + 1e-8)[..., None]
    expected = (weight * plain.gather_points(features, idx)).sum(2) / weight.sum(2)
    found = act.interpolate(xyz, center, features)
    assert_same_with_gradients(found, expected, [features], 1e-4)


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_can_be_copied_out_with_torch_alone(name):
    space = {"torch": torch}
    for each in ["smallest", *GEOMETRY]:
        exec(inspect.getsource(getattr(act, each)), space)
    assert_equal(listed(space[name](*arguments(name))), call(name))


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_the_same_under_autocast(name):
    expected = call(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(call(name), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_the_same_on_a_gpu(name):
    for a, b in zip(call(name, device="cuda"), call(name), strict=True):
        assert_close(a.cpu().double(), b.double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half], ids=str)
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_of_half_precision_is_computed_in_float32(name, dtype):
    singles = list(arguments(name, dtype))
    for i, value in enumerate(singles):
        if torch.is_tensor(value) and value.is_floating_point():
            singles[i] = value.float()
    expected = listed(getattr(act, name)(*singles))
    for found, value in zip(call(name, dtype), expected, strict=True):
        if value.is_floating_point() and name not in ("knn", "chamfer_distance", "fscore"):
            value = value.to(dtype)  # what is a distance stays in float32
        assert_equal(found, value)


# -- Transformer ----------------------------------------------------------------------------------
def torchs_block(block, x, c):
    """The same block as torch's own layer."""
    gelu = F.gelu
    if c.quick_gelu:
        gelu = lambda x: x / (1 + (-1.702 * x).exp())  # noqa: E731
    layer = nn.TransformerEncoderLayer(12, 3, c.mlp_hidden, 0.0, gelu, c.eps, True, c.norm_first)
    state = {"self_attn.in_proj_bias": torch.zeros(36)}
    for name, value in block.named_parameters():
        name = name.replace("attn.qkv.", "self_attn.in_proj_").replace("mlp.fc", "linear")
        state[name.replace("attn.proj.", "self_attn.out_proj.")] = value
    for scale, name in (("ls1.gamma", "self_attn.out_proj"), ("ls2.gamma", "linear2")):
        if scale in state:
            gamma = torch.diag(state.pop(scale))
            state[f"{name}.weight"] = gamma @ state[f"{name}.weight"]
            state[f"{name}.bias"] = gamma @ state[f"{name}.bias"]
    return torch.func.functional_call(layer, state, x)


BLOCK = act.BackboneConfig(width=12, num_heads=3, mlp_hidden=48)
POST_NORM = {"norm_first": False, "eps": 1e-2}
NO_BIAS = {"qkv_bias": False, "mlp_hidden": 20}


@pytest.mark.parametrize(
    "options", [{}, POST_NORM, NO_BIAS, {"layer_scale": True}, {"quick_gelu": True}], ids=str
)
def test_block_equals_torchs_own(options):
    c = replace(BLOCK, **options)
    block = randomise(act.Block(c))
    x = randn(2, 5, 12).requires_grad_()
    expected = torchs_block(block, x, c)
    assert_same_with_gradients(block(x), expected, [x] + list(block.parameters()))


def block_of_ones(rate):
    """A block whose attention branch gives ones, and its MLP nothing."""
    block = act.Block(BLOCK, drop_path=rate)
    for p in block.parameters():
        nn.init.zeros_(p)
    nn.init.ones_(block.attn.proj.bias)
    return block


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_drop_path_drops_whole_samples_at_its_rate_and_scales_up_the_rest(rate):
    torch.manual_seed(0)
    out = block_of_ones(rate)(torch.zeros(20000, 2, 12)).detach()
    assert_equal(out, out[:, :1, :1].expand_as(out))
    kept = out[out != 0]
    assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    error = abs((out == 0).float().mean().item() - rate)
    assert error <= 4.5 * math.sqrt(rate * (1 - rate) / 20000)
    assert block_of_ones(rate).eval()(torch.zeros(9, 2, 12)).unique().tolist() == [1]


def test_drop_path_grows_linearly_with_depth_in_encoder_and_decoder():
    student = act.Student(act.StudentConfig(**common.ENCODER | {"drop_path": 0.4, "depth": 5}))
    rates = [block.drop_rate for block in student.encoder.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [block.drop_rate for block in student.decoder.blocks] == pytest.approx([0, 0.4])


# -- teacher --------------------------------------------------------------------------------------
every_prompt = pytest.mark.parametrize("prompt", ["deep", "shallow", "none"])


@every_prompt
@pytest.mark.parametrize("kind", common.BACKBONES)
def test_prompted_backbone_equals_the_full_sequence_through_every_block(kind, prompt):
    teacher = common.make_teacher(kind, prompt=prompt)
    tokens = randn(2, 10, 12).requires_grad_()
    center = randn(2, 10, 3, seed=1)
    ours = teacher.transform(tokens, center)
    plainly = plain.transform(teacher, tokens, center)
    assert_same_with_gradients(ours, plainly, [tokens] + list(teacher.parameters()), 1e-4)


@every_prompt
def test_prompts_may_be_computed_once_and_drop_out_in_training(prompt):
    teacher = common.make_teacher(prompt=prompt)
    tokens = randn(2, 10, 12)
    center = randn(2, 10, 3, seed=1)
    expected = teacher.transform(tokens, center)
    assert_equal(teacher.transform(tokens, center, teacher.prompt_keys_values()), expected)
    teacher.train()
    assert torch.equal(teacher.transform(tokens, center), expected) == (prompt == "none")


def plain_teacher(teacher, xyz, hard, train):
    """Features, coarse, fine, patches, centres and logits by the formulas."""
    center = plain.gather_points(xyz, plain.farthest_point_sample(xyz, 10))
    _, idx = plain.stable_knn(center, xyz, 8)
    neighborhood = plain.gather_points(xyz, idx) - center[:, :, None]
    _, graph = plain.stable_knn(center, center, 4)
    logits = plain.dgcnn(teacher.dgcnn_1, plain.patch_embed(teacher.encoder, neighborhood), graph)
    if train:
        share = F.gumbel_softmax(logits, 0.3, hard)
    elif hard:
        share = F.one_hot(logits.argmax(-1), 24).double()
    else:
        share = (logits / 0.3).softmax(-1)
    tokens = plain.transform(teacher, share @ teacher.codebook, center)
    features = plain.dgcnn(teacher.dgcnn_2, tokens, graph)
    coarse, fine = plain.folding(teacher.decoder, features)
    return features, coarse, fine, neighborhood, center, logits


@both_modes
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_teacher_equals_the_formula(hard, train, double):
    # Prompt dropout would act per cloud in the plain form, so it is off in training.
    dropout = 0.0 if train else 0.5
    teacher = common.make_teacher(prompt_dropout=dropout).double().train(train)
    twin = copy.deepcopy(teacher)
    xyz = random_clouds().double()
    torch.manual_seed(5)
    ours = teacher(xyz, 0.3, hard)
    torch.manual_seed(5)
    plain_teacher(twin, xyz, hard, train)
    for found, expected in zip(teacher.buffers(), twin.buffers(), strict=True):
        assert_close(found.double(), expected.double(), 1e-12)  # batch norm's statistics
    torch.manual_seed(5)
    _, *plainly = plain_teacher(teacher, xyz, hard, train)
    assert_same_with_gradients(ours, plainly, teacher.parameters(), 1e-9)


def test_target_features_are_those_of_the_argmax_codes(double):
    teacher = common.make_teacher().double()
    xyz = random_clouds().double()
    features, _, _, neighborhood, center, logits = plain_teacher(teacher, xyz, True, False)
    assert_equal(teacher.tokenize(neighborhood, center), logits.argmax(-1))
    found = teacher.features(neighborhood, center)
    assert_same_with_gradients(found, features, teacher.parameters(), 1e-9)


def test_teacher_takes_a_backbones_blocks_and_norms_without_its_image_side():
    sizes = act.BackboneConfig(width=18, depth=2, num_heads=2, mlp_hidden=24, norm_pre=True)
    model = randomise(act.Backbone(replace(sizes, patch_size=4, grid=3, num_prefix=1)))
    teacher = act.Teacher(act.TeacherConfig(**common.TEACHER_SIZES), model)
    tokens = randn(2, 5, 18)
    assert_equal(teacher.backbone.forward_tokens(tokens), model.forward_tokens(tokens))
    parts = {name.split(".")[0] for name in teacher.backbone.state_dict()}
    assert parts == {"norm_pre", "blocks", "norm"}
    assert teacher.config.backbone == replace(model.config, patch_size=0)


LOGITS = {
    "random": 3 * randn(4, 5, 9),
    "each its own": 50 * torch.eye(5).expand(2, -1, -1),
    "sharply one code": 300 * F.one_hot(torch.ones(2, 4).long(), 5).float(),
}


@pytest.mark.parametrize("name", LOGITS)
def test_teacher_loss_equals_an_independent_formula(name):
    logits = LOGITS[name]
    B, G, _ = logits.shape
    coarse = randn(B, G, 2, 3, seed=0)
    fine = randn(B, G, 8, 3, seed=1)
    patch = randn(B, G, 8, 3, seed=2)
    output = act.TeacherOutput(coarse, fine, patch, randn(B, G, 3, seed=4), logits)
    total, reconstruction, kl = act.teacher_loss(output, 0.07)
    expected = 0.0
    for points in (coarse, fine):
        expected += plain.chamfer_distance(points.flatten(0, 1), patch.flatten(0, 1)).item()
    assert reconstruction.item() == pytest.approx(expected, rel=1e-5)
    used = logits.double().softmax(-1).mean(1)  # of each cloud
    codes = logits.shape[2]
    expected_kl = -(codes * used).log().mean().item()  # KL(uniform || used)
    assert kl.item() == pytest.approx(expected_kl, rel=1e-5, abs=1e-6)
    assert total.item() == pytest.approx(reconstruction.item() + 0.07 * kl.item(), rel=1e-6)


# -- student --------------------------------------------------------------------------------------
both_masks = pytest.mark.parametrize("make_mask", [act.random_mask, act.block_mask])


@both_masks
@pytest.mark.parametrize("ratio, masked", [(0, 0), (0.07, 0), (0.47, 4), (0.8, 8), (1, 10)])
def test_masks_hold_the_exact_share_by_their_generator_alone(make_mask, ratio, masked):
    center = randn(20, 10, 3)
    state = torch.get_rng_state()
    mask = make_mask(center, ratio, seeded(1))
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [masked] * 20
    assert torch.equal(mask, make_mask(center, ratio, seeded(1)))
    assert torch.equal(mask, make_mask(center, ratio, seeded(2))) == (masked in (0, 10))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_masks_hold_every_group_and_every_pair_equally_often():
    mask = act.random_mask(torch.zeros(20000, 6, 3), 0.5, seeded()).double()
    pairs = mask.T @ mask / 20000  # the diagonal: single groups
    apart = pairs[~torch.eye(6, dtype=torch.bool)]
    single = 3 / 6
    pair = 3 / 6 * 2 / 5
    assert (pairs.diag() - single).abs().max() < 4.5 * math.sqrt(single * (1 - single) / 20000)
    assert (apart - pair).abs().max() < 4.5 * math.sqrt(pair * (1 - pair) / 20000)


def test_block_masks_are_the_nearest_groups_of_each_member_equally_often():
    center = randn(1, 10, 3)
    mask = act.block_mask(center.expand(5000, -1, -1), 0.4, seeded())
    _, nearest = plain.stable_knn(center, center, 4)
    blocks = [frozenset(row) for row in nearest[0].tolist()]
    found = [frozenset(row.nonzero()[:, 0].tolist()) for row in mask]
    assert set(found) == set(blocks)
    for block in set(blocks):
        share = blocks.count(block) / 10
        error = abs(found.count(block) / 5000 - share)
        assert error < 4.5 * math.sqrt(share * (1 - share) / 5000)


def plain_student(student, neighborhood, center, mask):
    """Predictions and visible tokens, by boolean indexing."""
    encoder = student.encoder
    x = encoder.reduce_dim(encoder.patch_embed(neighborhood[~mask].view(3, 4, 8, 3)))
    x = torch.cat([encoder.cls_token.expand(3, -1, -1), x], dim=1)
    pos = encoder.pos_embed(center[~mask].view(3, 4, 3))
    pos = torch.cat([encoder.cls_pos.expand(3, -1, -1), pos], dim=1)
    for block in encoder.blocks:
        x = block(x + pos)
    tokens = encoder.norm(x)
    x = torch.cat([tokens[:, 1:], student.mask_token.expand(3, 6, -1)], dim=1)
    order = torch.cat([center[~mask].view(3, 4, 3), center[mask].view(3, 6, 3)], dim=1)
    pos = student.decoder_pos_embed(order)
    for block in student.decoder.blocks:
        x = block(x + pos)
    return student.head(student.decoder.norm(x)[:, 4:]), tokens


@both_modes
@pytest.mark.parametrize("encoder_dims", [16, 12], ids=["reduced", "of the width"])
def test_student_equals_the_formula(train, encoder_dims, double):
    student = make_student(encoder_dims=encoder_dims).double().train(train)
    neighborhood, center, mask = random_patches()
    neighborhood = neighborhood.double()
    center = center.double()
    plainly = plain_student(student, neighborhood, center, mask)
    prediction = student(neighborhood, center, mask)
    tokens = student.encoder(neighborhood, center, mask)
    assert_same_with_gradients((prediction, tokens), plainly, student.parameters(), 1e-9)


def test_student_takes_a_mask_that_is_split_already_or_masks_nothing():
    student = make_student()
    neighborhood, center, mask = random_patches()
    split = act.split_mask(mask, "cpu")
    expected = student(neighborhood, center, mask)
    assert_equal(student(neighborhood, center, mask, split), expected)
    assert student(neighborhood, center, torch.zeros_like(mask)).shape == (3, 0, 7)


def test_encode_is_the_encoder_on_all_patches_of_any_float_type():
    student = make_student()
    neighborhood, center, mask = random_patches()
    xyz = random_clouds()
    tokens = student.encode(xyz)
    assert_close(tokens, student.encoder(neighborhood, center, torch.zeros_like(mask)))
    for same in (xyz.double(), xyz.numpy(), xyz.double().numpy()):
        assert_equal(student.encode(same), tokens)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].max(1)[0]], dim=-1)
    assert_equal(act.global_feature(tokens), expected)


@pytest.mark.parametrize("kind", ["cosine", "l2", "smooth_l1"])
def test_distillation_losses_equal_independent_formulas(kind):
    a = 2 * randn(2, 5, 7)
    b = 2 * randn(2, 5, 7, seed=1)
    d = (a - b).abs().double()
    values = {
        "cosine": 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)),
        "l2": d * d,
        "smooth_l1": (d * d / 2).where(d < 1, d - 0.5),
    }
    loss = act.distillation_loss(a, b, kind).item()
    assert loss == pytest.approx(values[kind].mean().item(), rel=1e-5)
    assert act.distillation_loss(a, a, kind).item() == pytest.approx(0, abs=1e-6)
    assert_equal(act.distillation_loss(a, b), act.distillation_loss(a, b, "cosine"))


# -- transfer heads -------------------------------------------------------------------------------
CATEGORY = torch.tensor([2, 0, 1])  # of each cloud, for a model that wants it
HEADED = {
    "mlp3": make_classifier,
    "linear": partial(make_classifier, head="linear"),
    "parts": make_segmenter,
    "scene": partial(make_segmenter, num_categories=0),
}
every_head = pytest.mark.parametrize("kind", HEADED)


def logits_of(model, xyz):
    if getattr(model.config, "num_categories", 0):
        return model(xyz, CATEGORY.to(xyz.device))
    return model(xyz)


@every_head
def test_logits_depend_on_the_own_cloud_alone_and_not_on_the_order_of_its_points(kind):
    model = HEADED[kind]()
    xyz = random_clouds()
    expected = logits_of(model, xyz)
    other = torch.cat([randn(1, 64, 3, seed=9), xyz[1:]])
    assert_equal(logits_of(model, other)[1:], expected[1:])
    order = [0, *range(63, 0, -1)]  # FPS starts at the first point
    if expected.ndim == 3:  # a segmenter's rows follow their points
        expected = expected[:, order]
    assert_close(logits_of(model, xyz[:, order]), expected, 1e-4)


@both_modes
@pytest.mark.parametrize("kind", ["parts", "scene"])
def test_segmenter_equals_the_formula_with_explicit_concatenation(kind, train, double):
    model = HEADED[kind]().double().train(train)
    model.head[3].p = 0.0  # no dropout: each form would draw its own
    xyz = random_clouds().double()
    neighborhood, center = act.group_points(xyz, 10, 8)
    encoder = model.encoder
    x = encoder.reduce_dim(encoder.patch_embed(neighborhood))
    levels = []
    for block in encoder.blocks:  # depth 3: all three are read
        x = block(x + encoder.pos_embed(center))
        levels.append(encoder.norm(x))
    tokens = torch.cat(levels, dim=-1)
    cloud = [tokens.amax(1), tokens.mean(1)]
    if kind == "parts":
        cloud.append(model.label_conv(torch.eye(3).double()[CATEGORY]))
    cloud = torch.cat(cloud, dim=-1)[:, None].expand(-1, 64, -1)
    point = torch.cat([xyz, act.interpolate(xyz, center, tokens)], dim=-1)
    point = model.propagation(point.flatten(0, 1)).view(3, 64, 1024)
    plainly = model.head(torch.cat([point, cloud], dim=-1).flatten(0, 1)).view(3, 64, 5)
    assert_same_with_gradients(logits_of(model, xyz), plainly, model.parameters(), 1e-9)


@pytest.mark.parametrize("depth, depths", [(1, [1, 1, 1]), (2, [1, 1, 2]), (12, [4, 8, 12])])
def test_segmenter_reads_the_encoder_at_thirds_of_any_depth(depth, depths):
    model = make_segmenter(depth=depth, num_categories=0)
    assert model.depths == depths
    assert model(random_clouds()).shape == (3, 64, 5)


# -- what training moves, and where ---------------------------------------------------------------
TRAINED = {  # a model, and what of it is frozen
    "deep prompts": (common.make_teacher, "backbone"),
    "shallow prompts": (partial(common.make_teacher, "CLIP", prompt="shallow"), "backbone"),
    "frozen mlp3": (lambda: make_classifier().freeze_encoder(), "encoder"),
    "frozen linear": (lambda: make_classifier(head="linear").freeze_encoder(), "encoder"),
    "mlp3": (make_classifier, "nothing"),
    "parts": (make_segmenter, "nothing"),
    "scene": (HEADED["scene"], "nothing"),
    "student": (make_student, "nothing"),
}


def loss_of(model, device="cpu"):
    xyz = random_clouds().to(device)
    if isinstance(model, act.Teacher):
        return act.teacher_loss(model(xyz), 0.1)[0]
    if isinstance(model, act.Student):
        neighborhood, center = act.group_points(xyz, 10, 8)
        prediction = model(neighborhood, center, act.random_mask(center, 0.6, seeded()))
        return act.distillation_loss(prediction, randn(3, 6, 7).to(device))
    logits = logits_of(model, xyz).flatten(0, -2)  # of clouds, or of points
    return F.cross_entropy(logits, torch.arange(len(logits), device=device) % 3)


@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_all_but_the_frozen_which_stays_bit_identical(name):
    build, frozen = TRAINED[name]
    model = build().train()
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)  # gradients alone
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    wanted = {name for name in model.state_dict() if not name.startswith(frozen + ".")}
    assert common.moved(before, model) == wanted
    held = getattr(model, frozen, nn.Identity().eval())
    assert model.training
    assert not any(module.training for module in held.modules())


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_every_tensor_is_made_on_the_inputs_device(device, monkeypatch):
    if device == "cuda" and torch.version.cuda is None:
        pytest.skip("needs a CUDA build of torch (and no GPU)")
    for kind in (torch.Tensor, FakeTensor):  # tensors without values cannot be counted
        monkeypatch.setattr(kind, "tolist", lambda tensor: [6, 6, 6])
    mode = nullcontext()
    if device == "cuda":
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        xyz = random_clouds().to(device)
        neighborhood, center = act.group_points(xyz, 10, 8)
        out = [act.farthest_point_sample(xyz, 5, seeded()), act.block_mask(center, 0.6)]
        for build, _ in TRAINED.values():
            model = build().to_empty(device=device)
            out += [loss_of(model.train(), device), loss_of(model.eval(), device)]
        teacher = common.make_teacher("BERT", prompt="none").to_empty(device=device)
        out += [teacher.features(neighborhood, center), *teacher(xyz, hard=True)]
        out.append(make_student().to_empty(device=device).encode(xyz))
        assert {tensor.device.type for tensor in out} == {device}


# -- mistakes in a call ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: act.farthest_point_sample(randn(2, 5, 3), 0), ["num_samples", 5, 0]),
        (lambda: act.knn(randn(2, 9, 3), randn(2, 12, 3), 13), ["k", 12, 13]),
        (lambda: act.group_points(randn(2, 5, 3), 6, 2), [5, 6]),
        (lambda: make_student().encode(randn(64, 3)), ["(B, N, 3)", (64, 3)]),
        (lambda: make_segmenter()(random_clouds()), ["category", 3]),
        (lambda: HEADED["scene"]()(random_clouds(), CATEGORY), ["category", 0]),
        (lambda: make_classifier(head="mlp"), ["head", "mlp3", "mlp"]),
        (lambda: act.distillation_loss(randn(2, 5), randn(5)), [(2, 5), (5,)]),
        (lambda: act.split_mask(torch.tensor([[True, False], [True, True]]), "cpu"), [[1, 2]]),
    ],
)
def test_what_is_wrong_is_named(call, words):
    with refused(*words):
        call()


# -- weights, checkpoints (tests/test_checkpoints.py has more) ------------------------------------
@pytest.mark.parametrize(
    "width, channels",  # of a head
    [(192, 64), (384, 64), (768, 64), (1024, 64), (1152, 72), (1280, 80), (1408, 88), (1664, 104)],
)
def test_heads_are_those_published_for_a_width_or_asked_for(width, channels):
    state = {"blocks.0.attn.qkv.weight": torch.empty(0, width)}
    state["blocks.0.mlp.fc1.weight"] = torch.empty(0, width)
    assert act.backbone_config(state, "x.pth").num_heads == width // channels
    state["blocks.0.attn.qkv.weight"] = torch.empty(0, width + 8)
    assert act.backbone_config(state, "x.pth", num_heads=8).num_heads == 8
    with refused("x.pth", "num_heads", width + 8):
        act.backbone_config(state, "x.pth")


def image_file(folder, rows, tokens):
    """The tensors of a compiled ViT in timm's names with a table of so many positions, a file."""
    state = act.Backbone(act.BackboneConfig(192, 1, 3, 8)).state_dict()
    state["patch_embed.proj.weight"] = randn(192, 3, 4, 4)
    state["pos_embed"] = randn(1, rows, 192)
    for name, number in tokens.items():
        state[name] = randn(1, number, 192, seed=number)
    path = folder / "vit.pth"
    torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, path)
    return state, path


CLS = {"cls_token": 1}
DEIT = {"cls_token": 1, "dist_token": 1}
REGISTERS = {"cls_token": 1, "reg_token": 4}


@pytest.mark.parametrize(
    "rows, tokens, positioned",  # how many of the tokens have a row of the table
    [
        (16, {}, 0),  # SigLIP
        (17, CLS, 1),
        (16, CLS, 0),
        (18, DEIT, 2),
        (16, REGISTERS, 0),
        (17, REGISTERS, 1),
        (21, REGISTERS, 5),
    ],
)
def test_tokens_before_the_patches_get_their_positions(tmp_path, rows, tokens, positioned):
    state, path = image_file(tmp_path, rows, tokens)
    backbone = act.load_pretrained(path)
    prefix = torch.cat([torch.empty(1, 0, 192)] + [state[name] for name in tokens], dim=1)
    prefix[:, :positioned] += state["pos_embed"][:, :positioned]
    assert_equal(backbone.prefix_tokens.data, prefix)
    assert_equal(backbone.pos_embed.data, state["pos_embed"][:, positioned:])
    T = prefix.shape[1] + 16
    assert backbone.forward_features(randn(2, 3, 16, 16)).shape == (2, T, 192)


@pytest.mark.parametrize(
    "rows, tokens", [(129, CLS), (337, CLS), (17, {}), (17, DEIT), (20, REGISTERS)]
)
def test_positions_of_a_grid_that_is_not_square_are_refused(tmp_path, rows, tokens):
    _, path = image_file(tmp_path, rows, tokens)  # 129: 16 x 8 and a token; 337: 14 x 24 and one
    with refused(path, "pos_embed", "square", rows):
        act.load_pretrained(path)


def save_student(path, student, state):
    act.save({"kind": "Student", "config": asdict(student.config), "model": state}, path)


def test_a_checkpoint_with_the_names_of_a_compiled_or_distributed_model_is_read(tmp_path):
    student = make_student()
    state = {}
    for name, value in student.state_dict().items():
        name = name.replace("blocks.1.", "blocks.1._orig_mod.")
        state[f"module._orig_mod.{name}"] = value
    save_student(tmp_path / "last.pt", student, state)
    assert not common.moved(student, act.load(tmp_path / "last.pt"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    student = make_student()
    student.head.bias.data[3] = value
    save_student(tmp_path / "last.pt", student, student.state_dict())
    with refused(tmp_path / "last.pt", "head.bias", "finite"):
        act.load(tmp_path / "last.pt")


def test_what_is_no_checkpoint_says_what_it_is(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(FileNotFoundError):
        act.load(path)
    with refused(path, "no such file"):
        act.load(path)
    with refused(tmp_path, "folder"):
        act.load(tmp_path)
    torch.save(make_student().state_dict(), path)
    with refused(path, "load_state_dict"):
        act.load(path)


# -- export ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Classifier", "Student"])
def test_torch_export_works_with_any_batch(kind):
    model = make(kind)
    if kind == "Student":
        model.forward = model.encode
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (random_clouds(3),), dynamic_shapes=shapes).module()
    for B in (1, 7):
        xyz = random_clouds(B, seed=5)
        assert_close(program(xyz), model(xyz))
    assert_close(torch.jit.trace(model, random_clouds())(random_clouds(7)), model(random_clouds(7)))


def test_onnx_of_encode_works_with_any_batch_and_equals_ours(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student = make_student(num_group=4, depth=1)  # the export takes a while
    student.forward = student.encode
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    path = tmp_path / "student.onnx"
    torch.onnx.export(student, (random_clouds(3),), path, dynamo=True, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)
    for B in (1, 7):
        xyz = random_clouds(B, seed=5).round(decimals=1)  # with equal distances
        tokens = session.run(None, {session.get_inputs()[0].name: xyz.numpy()})[0]
        assert_close(torch.from_numpy(tokens), student(xyz), 1e-4)
