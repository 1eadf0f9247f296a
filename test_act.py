"""Tests of act.py: properties, and util/plain.py's textbook forms as oracles.

python -m pytest test_act.py        # half a minute on one core; no network, no GPU
"""

import copy
import math
from dataclasses import asdict, replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import act
import common
from common import assert_close, assert_equal, make, randn, randomise, refused, seeded
from util import plain

pytestmark = pytest.mark.filterwarnings("ignore")


# -- helpers --------------------------------------------------------------------------------------
def listed(out):
    """A tensor as a list of one, a tuple of tensors as a list."""
    return [out] if isinstance(out, torch.Tensor) else list(out)


def assert_same_with_gradients(ours, plainly, inputs, rtol=1e-5):
    """Two forms of the same outputs agree, and so do the gradients of a random functional."""
    ours = listed(ours)
    plainly = listed(plainly)
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = []
    for outs in (ours, plainly):
        total = sum((out * randn(*out.shape, seed=7)).sum() for out in outs)
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for a, b in zip(ours, plainly, strict=True):
        assert_close(a, b, rtol)
    scale = max(g.abs().max().item() for g in gradients[1] if g is not None)
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if b is not None:  # one that is 0 but for rounding is measured by the rest
            assert_close(a, b, rtol, floor=scale / 10)


def random_clouds(B=3, N=64, seed=0):
    scale = randn(B, 1, 3, seed=seed + 1).abs().clamp(0.3, 1)
    return F.normalize(randn(B, N, 3, seed=seed), dim=-1) * scale


def random_patches(xyz):
    """Ten patches of each cloud, and a mask of six of them."""
    neighborhood, center = act.group_points(xyz, 10, 8)
    return neighborhood, center, act.random_mask(center, 0.6, seeded())


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
    "strided": lambda xyz: xyz.mT.contiguous().mT,
    "identical": lambda xyz: xyz[:, :1].expand_as(xyz).clone(),
    "pairs": lambda xyz: xyz[:, torch.arange(xyz.shape[1]) // 2],
}
every_cloud = pytest.mark.parametrize("kind", CLOUDS)
both_norms = pytest.mark.parametrize("norm", [1, 2])
batches = st.integers(1, 3)
seeds = st.integers(0, 999)
shares = st.floats(0, 1, allow_subnormal=False)  # a command may flush them
precisions = st.sampled_from([torch.float32, torch.float64])


def cloud(kind, B, N, seed, dtype=torch.float32):
    return CLOUDS[kind](randn(B, N, 3, seed=seed, dtype=dtype))


@every_cloud
@given(B=batches, N=st.integers(1, 40), share=shares, seed=seeds, dtype=precisions)
@example(B=3, N=200, share=1.0, seed=0, dtype=torch.float32)
def test_fps_equals_the_textbook_but_takes_no_index_twice(kind, B, N, share, seed, dtype):
    xyz = cloud(kind, B, N, seed, dtype)
    G = max(1, round(share * N))
    expected = []
    for row in plain.farthest_point_sample(xyz, G).tolist():
        distinct = dict.fromkeys(row + list(range(N)))  # copies of chosen points come last
        expected.append(list(distinct)[:G])
    assert act.farthest_point_sample(xyz, G).tolist() == expected


def test_fps_starts_at_random_by_its_generator():
    xyz = randn(16, 50, 3)
    idx = act.farthest_point_sample(xyz, 10, generator=seeded(3))
    assert len(idx[:, 0].unique()) > 5
    assert_equal(idx, plain.farthest_point_sample(xyz, 10, first=idx[:, 0]))
    assert_equal(idx, act.farthest_point_sample(xyz, 10, generator=seeded(3)))


@every_cloud
@given(B=batches, Q=batches, N=st.integers(1, 300), share=shares, seed=seeds, dtype=precisions)
@example(B=2, Q=200, N=3000, share=0.01, seed=0, dtype=torch.float32)  # several chunks
def test_knn_equals_a_stable_sort_ties_included(kind, B, Q, N, share, seed, dtype):
    xyz = cloud(kind, B, N, seed, dtype)
    query = cloud(kind, B, Q, seed + 1, dtype)
    k = max(1, round(share * N))
    assert_equal(act.knn(query, xyz, k), plain.stable_knn(query, xyz, k))


def test_knn_of_a_million_points_holds_few_distances_at_a_time():
    with mock.patch.object(act, "smallest", wraps=act.smallest) as smallest:
        act.knn(randn(1, 30, 3), randn(1, 1_000_000, 3), 32)
    assert [call.args[0].numel() for call in smallest.call_args_list] == [1_000_000] * 30


@every_cloud
@both_norms
@given(B=st.integers(1, 2), N=st.integers(1, 12), M=st.integers(1, 12), seed=seeds)
def test_chamfer_equals_the_formula(kind, norm, B, N, M, seed):
    a = cloud(kind, B, N, seed)
    b = cloud(kind, B, M, seed + 1)
    expected = plain.chamfer_distance(a.double(), b.double(), norm).item()
    assert act.chamfer_distance(a, b, norm).item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


@both_norms
def test_chamfer_has_the_gradient_of_finite_differences_and_zero_where_clouds_coincide(norm):
    a = randn(2, 6, 3, seed=6, dtype=torch.float64).requires_grad_()
    b = randn(2, 4, 3, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(partial(act.chamfer_distance, norm=norm), (a, b))
    act.chamfer_distance(a, a.detach().flip(1), norm).backward()
    assert not a.grad.any()


@pytest.mark.parametrize(
    "pred, target, threshold, expected",
    [
        ([0, 1], [0.05, 1.05], 0.01, 0),  # 0.05 > 0.01, though 0.05^2 < 0.01
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
def test_interpolation_weighs_three_centres_by_inverse_squared_distance(kind, N, G, C, seed):
    xyz = cloud(kind, 2, N, seed)
    center = cloud(kind, 2, G, seed + 1)
    features = randn(2, G, C, seed=seed + 2, dtype=torch.float64).requires_grad_()
    sqdist, idx = plain.stable_knn(xyz, center, min(3, G))
    weight = 1 / (sqdist.double() + 1e-8)[..., None]
    expected = (weight * plain.gather_points(features, idx)).sum(2) / weight.sum(2)
    found = act.interpolate(xyz, center, features)
    assert_same_with_gradients(found, expected, [features], 1e-4)


XYZ = randn(2, 80, 3) + 3
CENTER = randn(2, 9, 3, seed=1) + 3
GEOMETRY = {  # arguments of each function
    "farthest_point_sample": (XYZ, 20),
    "knn": (CENTER, XYZ, 7),
    "gather_points": (XYZ, torch.tensor([[3, 9], [5, 0]])),
    "group_points": (XYZ, 6, 5),
    "chamfer_distance": (XYZ, CENTER),
    "fscore": (XYZ, CENTER, 0.5),
    "interpolate": (XYZ, CENTER, randn(2, 9, 5)),
}


def call(name, change=torch.clone):
    """What a function of GEOMETRY returns if each tensor among its arguments is changed so."""
    arguments = [change(value) if torch.is_tensor(value) else value for value in GEOMETRY[name]]
    return listed(getattr(act, name)(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half], ids=str)
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_computed_in_float32_under_autocast_and_of_half_precision(name, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = call(name)
        found = call(name, lambda value: value.to(dtype) if value.is_floating_point() else value)
    assert_equal(autocast, call(name))
    singles = call(name, lambda value: value.to(dtype).to(value.dtype))
    for a, b in zip(found, singles, strict=True):
        assert_equal(a, b.to(a.dtype))
        if name in ("knn", "chamfer_distance", "fscore"):
            assert a.dtype == b.dtype  # what is a distance stays in float32


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
OPTIONS = [POST_NORM, {"qkv_bias": False}, {"layer_scale": True}, {"quick_gelu": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_block_equals_torchs_own(options):
    c = replace(BLOCK, **options)
    block = randomise(act.Block(c))
    x = randn(2, 5, 12).requires_grad_()
    expected = torchs_block(block, x, c)
    assert_same_with_gradients(block(x), expected, [x] + list(block.parameters()))


def test_drop_path_drops_whole_samples_at_its_rate_and_scales_up_the_rest():
    torch.manual_seed(0)
    block = act.Block(BLOCK, drop_path=0.4)
    for p in block.parameters():
        nn.init.zeros_(p)
    nn.init.ones_(block.attn.proj.bias)  # the attention branch gives ones, the MLP nothing
    out = block(torch.zeros(20000, 2, 12)).detach()
    assert_equal(out, out[:, :1, :1].expand_as(out))
    assert_close(out.unique(), torch.tensor([0, 1 / 0.6]))
    assert abs((out == 0).float().mean().item() - 0.4) < 4.5 * math.sqrt(0.4 * 0.6 / 20000)
    assert block.eval()(torch.zeros(9, 2, 12)).unique().tolist() == [1]


def test_drop_path_grows_linearly_with_depth_in_encoder_and_decoder():
    student = make("Student", drop_path=0.4, depth=5)
    rates = [block.drop_rate for block in student.modules() if isinstance(block, act.Block)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0, 0.4])


# -- teacher --------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt", ["deep", "shallow", "none"])
@pytest.mark.parametrize("kind", common.BACKBONES)
def test_prompted_backbone_equals_the_full_sequence_and_drops_prompts_in_training(kind, prompt):
    teacher = common.make_teacher(kind, prompt=prompt)
    tokens = randn(2, 10, 12).requires_grad_()
    center = randn(2, 10, 3, seed=1)
    ours = teacher.transform(tokens, center)
    plainly = plain.transform(teacher, tokens, center)
    assert_same_with_gradients(ours, plainly, [tokens] + list(teacher.parameters()), 1e-4)
    assert_equal(teacher.transform(tokens, center, teacher.prompt_keys_values()), ours)
    teacher.train()
    assert torch.equal(teacher.transform(tokens, center), ours) == (prompt == "none")


def plain_teacher(teacher, xyz, hard):
    """Features, coarse, fine, patches, centres and logits by the formulas."""
    center = plain.gather_points(xyz, plain.farthest_point_sample(xyz, 10))
    _, idx = plain.stable_knn(center, xyz, 8)
    neighborhood = plain.gather_points(xyz, idx) - center[:, :, None]
    _, graph = plain.stable_knn(center, center, 4)
    logits = plain.dgcnn(teacher.dgcnn_1, plain.patch_embed(teacher.encoder, neighborhood), graph)
    if teacher.training:
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
def test_teacher_and_its_targets_equal_the_formula(hard, train, double):
    teacher = common.make_teacher(prompt_dropout=0.0).double().train(train)
    xyz = random_clouds().double()
    torch.manual_seed(5)
    ours = listed(teacher(xyz, 0.3, hard))
    torch.manual_seed(5)
    features, *plainly = plain_teacher(teacher, xyz, hard)
    if hard and not train:  # the targets of stage II
        ours.append(teacher.features(ours[2], ours[3]))
        plainly.append(features)
    assert_same_with_gradients(ours, plainly, teacher.parameters(), 1e-9)


def test_teacher_takes_a_backbones_blocks_and_norms_without_its_image_side():
    sizes = act.BackboneConfig(width=18, depth=2, num_heads=2, mlp_hidden=24, norm_pre=True)
    model = randomise(act.Backbone(replace(sizes, patch_size=4, grid=3, num_prefix=1)))
    teacher = act.Teacher(act.TeacherConfig(**common.TEACHER_SIZES), model)
    tokens = randn(2, 5, 18)
    assert_equal(teacher.backbone.forward_tokens(tokens), model.forward_tokens(tokens))
    assert teacher.config.backbone == replace(model.config, patch_size=0)


@pytest.mark.parametrize("sharpness", [3, 100])
def test_teacher_loss_equals_an_independent_formula(sharpness):
    logits = sharpness * randn(4, 5, 9)
    coarse = randn(4, 5, 2, 3, seed=0)
    fine = randn(4, 5, 8, 3, seed=1)
    patch = randn(4, 5, 8, 3, seed=2)
    output = act.TeacherOutput(coarse, fine, patch, randn(4, 5, 3, seed=4), logits)
    total, reconstruction, kl = act.teacher_loss(output, 0.07)
    patch = patch.flatten(0, 1)
    expected = [plain.chamfer_distance(each.flatten(0, 1), patch) for each in (coarse, fine)]
    assert reconstruction.item() == pytest.approx(sum(expected).item(), rel=1e-5)
    used = logits.double().softmax(-1).mean(1)  # of each cloud
    expected = -(9 * used).log().mean().item()  # KL(uniform || used)
    assert kl.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert total.item() == pytest.approx(reconstruction.item() + 0.07 * kl.item(), rel=1e-6)


# -- student --------------------------------------------------------------------------------------
@pytest.mark.parametrize("make_mask", [act.random_mask, act.block_mask])
@pytest.mark.parametrize("ratio, masked", [(0.07, 0), (0.47, 4), (0.8, 8), (1, 10)])
def test_masks_hold_the_exact_share_by_their_generator_alone(make_mask, ratio, masked):
    center = randn(20, 10, 3)
    mask = make_mask(center, ratio, seeded(1))
    assert mask.sum(1).tolist() == [masked] * 20
    assert torch.equal(mask, make_mask(center, ratio, seeded(1)))
    assert torch.equal(mask, make_mask(center, ratio, seeded(2))) == (masked in (0, 10))


def test_masks_hold_each_group_as_often_as_they_should_and_block_masks_the_nearest():
    center = randn(1, 10, 3)
    many = center.expand(5000, -1, -1)
    blocks = F.one_hot(plain.stable_knn(center, center, 4)[1][0], 10).sum(1)  # of each seed
    for make_mask, expected in ((act.random_mask, 0.4), (act.block_mask, blocks.double().mean(0))):
        mask = make_mask(many, 0.4, seeded()).long()
        assert (mask.double().mean(0) - expected).abs().max() < 4.5 * 0.5 / math.sqrt(5000)
    assert_equal(mask.unique(dim=0), blocks.unique(dim=0))


@both_modes
@pytest.mark.parametrize("encoder_dims", [16, 12], ids=["reduced", "of the width"])
def test_student_equals_the_formula_by_boolean_indexing(train, encoder_dims, double):
    student = make("Student", encoder_dims=encoder_dims).double().train(train)
    neighborhood, center, mask = random_patches(random_clouds().double())
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
    plainly = (student.head(student.decoder.norm(x)[:, 4:]), tokens)
    ours = (student(neighborhood, center, mask), encoder(neighborhood, center, mask))
    assert_same_with_gradients(ours, plainly, student.parameters(), 1e-9)
    assert_equal(student(neighborhood, center, None, act.split_mask(mask, "cpu")), ours[0])
    assert student(neighborhood, center, torch.zeros_like(mask)).shape == (3, 0, 7)


def test_encode_is_the_encoder_on_all_patches_of_any_float_type():
    student = make("Student")
    xyz = random_clouds()
    neighborhood, center, mask = random_patches(xyz)
    tokens = student.encode(xyz)
    assert_close(tokens, student.encoder(neighborhood, center, torch.zeros_like(mask)))
    for same in (xyz.double(), xyz.numpy(), xyz.double().numpy()):
        assert_equal(student.encode(same), tokens)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].max(1)[0]], dim=-1)
    assert_equal(act.global_feature(tokens), expected)


def test_distillation_losses_equal_independent_formulas():
    a = 2 * randn(2, 5, 7)
    b = 2 * randn(2, 5, 7, seed=1)
    d = (a - b).abs().double()
    values = {
        "cosine": 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)),
        "l2": d * d,
        "smooth_l1": (d * d / 2).where(d < 1, d - 0.5),
    }
    for kind, value in values.items():
        loss = act.distillation_loss(a, b, kind).item()
        assert loss == pytest.approx(value.mean().item(), rel=1e-5)


# -- transfer heads -------------------------------------------------------------------------------
CATEGORY = torch.tensor([2, 0, 1])  # of each cloud, for a model that wants it
HEADED = {
    "mlp3": partial(make, "Classifier"),
    "linear": partial(make, "Classifier", head="linear"),
    "parts": partial(make, "Segmenter"),
    "scene": partial(make, "Segmenter", num_categories=0),
}


def logits_of(model, xyz):
    if getattr(model.config, "num_categories", 0):
        return model(xyz, CATEGORY.to(xyz.device))
    return model(xyz)


@pytest.mark.parametrize("kind", HEADED)
def test_logits_depend_neither_on_other_clouds_nor_on_the_order_of_points(kind):
    model = HEADED[kind]()
    xyz = random_clouds()
    expected = logits_of(model, xyz)[1:]
    order = [0, *range(63, 0, -1)]  # FPS starts at the first point
    if expected.ndim == 3:  # a segmenter's rows follow their points
        expected = expected[:, order]
    found = logits_of(model, torch.cat([randn(1, 64, 3, seed=9), xyz[1:, order]]))[1:]
    assert_close(found, expected, 1e-4)


@both_modes
@pytest.mark.parametrize("kind, depth, thirds", [("parts", 2, [1, 1, 2]), ("scene", 6, [2, 4, 6])])
def test_segmenter_equals_the_formula_at_thirds_of_its_depth(kind, depth, thirds, train, double):
    model = HEADED[kind](depth=depth).double().train(train)
    model.head[3].p = 0.0  # no dropout: each form would draw its own
    xyz = random_clouds().double()
    neighborhood, center = act.group_points(xyz, 10, 8)
    encoder = model.encoder
    x = encoder.reduce_dim(encoder.patch_embed(neighborhood))
    levels = []
    for block in encoder.blocks:
        x = block(x + encoder.pos_embed(center))
        levels.append(encoder.norm(x))
    tokens = torch.cat([levels[i - 1] for i in thirds], dim=-1)
    cloud = [tokens.amax(1), tokens.mean(1)]
    if kind == "parts":
        cloud.append(model.label_conv(torch.eye(3).double()[CATEGORY]))
    cloud = torch.cat(cloud, dim=-1)[:, None].expand(-1, 64, -1)
    point = torch.cat([xyz, act.interpolate(xyz, center, tokens)], dim=-1)
    point = model.propagation(point.flatten(0, 1)).view(3, 64, 1024)
    plainly = model.head(torch.cat([point, cloud], dim=-1).flatten(0, 1)).view(3, 64, 5)
    assert_same_with_gradients(logits_of(model, xyz), plainly, model.parameters(), 1e-9)


# -- what training moves, and where ---------------------------------------------------------------
TRAINED = {  # a model, and what of it is frozen
    "deep prompts": (common.make_teacher, "backbone"),
    "shallow prompts": (partial(common.make_teacher, "CLIP", prompt="shallow"), "backbone"),
    "frozen mlp3": (lambda: HEADED["mlp3"]().freeze_encoder(), "encoder"),
    "parts": (HEADED["parts"], "nothing"),
    "scene": (HEADED["scene"], "nothing"),
    "student": (partial(make, "Student"), "nothing"),
}


def loss_of(model, device="cpu"):
    xyz = random_clouds().to(device)
    if isinstance(model, act.Teacher):
        return act.teacher_loss(model(xyz), 0.1)[0]
    if isinstance(model, act.Student):
        return act.distillation_loss(model(*random_patches(xyz)), randn(3, 6, 7).to(device))
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
    assert not any(module.training for module in held.modules())


def test_every_tensor_is_made_on_the_inputs_device(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tolist", lambda mask: [6, 6, 6])  # no values to count
    xyz = random_clouds().to("meta")
    out = [act.farthest_point_sample(xyz, 5, seeded()), act.block_mask(xyz, 0.6)]
    for build, _ in TRAINED.values():
        model = build().to("meta")
        out += [loss_of(model.train(), "meta"), loss_of(model.eval(), "meta")]
    teacher = common.make_teacher("BERT", prompt="none").to("meta")
    out += [teacher.features(*act.group_points(xyz, 10, 8)), *teacher(xyz, hard=True)]
    assert all(tensor.is_meta for tensor in out)


# -- mistakes in a call ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: act.knn(randn(2, 9, 3), randn(2, 12, 3), 13), ["k", 12, 13]),
        (lambda: act.group_points(randn(2, 5, 3), 6, 2), ["num_samples", 5, 6]),
        (lambda: make("Student").encode(randn(64, 3)), ["(B, N, 3)", (64, 3)]),
        (lambda: HEADED["parts"]()(random_clouds()), ["category", 3]),
        (lambda: act.distillation_loss(randn(2, 5), randn(5)), [(2, 5), (5,)]),
        (lambda: act.split_mask(torch.tensor([[True, False], [True, True]]), "cpu"), [[1, 2]]),
    ],
)
def test_what_is_wrong_is_named(call, words):
    with refused(*words):
        call()


# -- weights, checkpoints (tests/test_checkpoints.py has more) ------------------------------------
@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12), (1152, 16), (1280, 16), (1664, 16)])
def test_heads_are_those_published_for_a_width_or_asked_for(width, heads):
    matrices = ["blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"]
    state = dict.fromkeys(matrices, torch.empty(0, width))
    assert act.backbone_config(state, "x.pth").num_heads == heads
    state["blocks.0.attn.qkv.weight"] = torch.empty(0, width + 8)
    assert act.backbone_config(state, "x.pth", num_heads=8).num_heads == 8
    with refused("x.pth", "num_heads", width + 8):
        act.backbone_config(state, "x.pth")


CLS = {"cls_token": 1}
DEIT = {"cls_token": 1, "dist_token": 1}
REGISTERS = {"cls_token": 1, "reg_token": 4}


@pytest.mark.parametrize(
    "rows, tokens, positioned",  # how many of the tokens have a row of the table
    [(16, {}, 0), (17, CLS, 1), (18, DEIT, 2), (16, REGISTERS, 0), (17, REGISTERS, 1)],
)
def test_tokens_get_their_positions_and_the_rest_is_a_square(tmp_path, rows, tokens, positioned):
    state = act.Backbone(act.BackboneConfig(192, 1, 3, 8)).state_dict()
    state["patch_embed.proj.weight"] = randn(192, 3, 4, 4)
    state["pos_embed"] = randn(1, rows, 192)
    for name, number in tokens.items():
        state[name] = randn(1, number, 192, seed=number)
    path = tmp_path / "vit.pth"
    torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, path)
    backbone = act.load_pretrained(path)
    prefix = torch.cat([torch.empty(1, 0, 192)] + [state[name] for name in tokens], dim=1)
    prefix[:, :positioned] += state["pos_embed"][:, :positioned]
    assert_equal(backbone.prefix_tokens.data, prefix)
    assert_equal(backbone.pos_embed.data, state["pos_embed"][:, positioned:])
    assert backbone.forward_features(randn(2, 3, 16, 16)).shape[1] == prefix.shape[1] + 16
    torch.save(state | {"pos_embed": randn(1, 129, 192)}, path)  # 16 x 8 and a token
    with refused(path, "pos_embed", "square", 129):
        act.load_pretrained(path)


def test_a_checkpoint_of_a_compiled_model_is_read_and_what_is_none_says_what_it_is(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(FileNotFoundError):
        act.load(path)
    with refused(tmp_path, "folder"):
        act.load(tmp_path)
    student = make("Student")
    state = {f"module._orig_mod.{name}": value for name, value in student.state_dict().items()}
    torch.save(state, path)
    with refused(path, "load_state_dict"):
        act.load(path)
    checkpoint = {"kind": "Student", "config": asdict(student.config), "model": state}
    act.save(checkpoint, path)
    assert not common.moved(student, act.load(path))
    state["module._orig_mod.head.bias"][3] = math.inf
    act.save(checkpoint, path)
    with refused(path, "head.bias", "finite"):
        act.load(path)


# -- export ---------------------------------------------------------------------------------------
def test_exports_of_encode_work_with_any_batch_and_equal_ours(tmp_path):
    student = make("Student", num_group=4, depth=1)  # the export takes a while
    student.forward = student.encode
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(student, (random_clouds(3),), dynamic_shapes=shapes).module()
    clouds = [random_clouds(B, seed=5).round(decimals=1) for B in (1, 7)]  # with equal distances
    for xyz in clouds:
        assert_close(program(xyz), student(xyz))
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "student.onnx"
    torch.onnx.export(student, (random_clouds(3),), path, dynamo=True, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)
    for xyz in clouds:
        tokens = session.run(None, {session.get_inputs()[0].name: xyz.numpy()})[0]
        assert_close(torch.from_numpy(tokens), student(xyz), 1e-4)
