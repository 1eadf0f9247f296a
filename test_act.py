"""Tests of act.py's method: properties, and util/plain.py's textbook forms as oracles.

python -m pytest test_act.py        # half a minute on one core; on a GPU too, where there is one
"""

import inspect
import math
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import product
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

import act
import common
from common import assert_close, assert_equal, make, randn, randomise, refused, seeded
from util import plain

pytestmark = pytest.mark.filterwarnings("ignore")
GPUS = ["cuda"] * torch.cuda.is_available()
FAKE_GPU = "meta"
if hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):  # torch is new
    backend_registration._setup_privateuseone_for_python_backend("gpu")
    FAKE_GPU = "gpu"


def listed(out):
    """A tensor as a list of one, a tuple of tensors as a list."""
    return [out] if isinstance(out, torch.Tensor) else list(out)


def assert_same_with_gradients(ours, plainly, inputs, rtol=1e-5):
    """Two forms of the same outputs agree, and so do the gradients of a random functional."""
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = []
    for outs in (listed(ours), listed(plainly)):
        total = sum((out * randn(*out.shape, seed=7)).sum() for out in outs)
        gradients.append(torch.autograd.grad(total, inputs, materialize_grads=True))
    for a, b in zip(listed(ours), listed(plainly), strict=True):
        assert_close(a, b, rtol)
    scale = max(gradient.abs().max().item() for gradient in gradients[1])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, rtol, floor=scale / 10)  # one that is 0 but for rounding


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

CLOUDS = {  # what makes equal distances, rounding and odd memory layouts
    "normal": lambda xyz: xyz,
    "far": lambda xyz: xyz + 1e4,
    "grid": lambda xyz: xyz.round(),
    "strided": lambda xyz: xyz.mT.contiguous().mT,
    "identical": lambda xyz: xyz[:, :1].expand_as(xyz).clone(),
    "pairs": lambda xyz: xyz[:, torch.arange(xyz.shape[1]) // 2],
}
every_cloud = pytest.mark.parametrize("device, kind", list(product(["cpu"] + GPUS, CLOUDS)))
few = st.integers(1, 12)
batches = st.integers(1, 3)
seeds = st.integers(0, 999)
shares = st.floats(0, 1, allow_subnormal=False)  # a command may flush them
precisions = st.sampled_from([torch.bfloat16, torch.float32, torch.float64])


def cloud(kind, B, N, seed, dtype):
    """A cloud, and the same in the precision that is computed in, at least float32."""
    xyz = CLOUDS[kind](randn(B, N, 3, seed=seed)).to(dtype)
    return xyz, xyz.to(torch.promote_types(dtype, torch.float32))


def geometry(name, device, *args):
    """What act's function of this name returns on a device, under autocast, on the CPU."""
    args = [each.to(device) if torch.is_tensor(each) else each for each in args]
    with torch.autocast(device, torch.bfloat16):
        return [each.cpu() for each in listed(getattr(act, name)(*args))]


@every_cloud
@given(B=batches, N=st.integers(1, 40), share=shares, seed=seeds, dtype=precisions)
@example(B=3, N=200, share=1.0, seed=0, dtype=torch.float32)
def test_fps_equals_the_textbook_but_takes_no_index_twice(kind, B, N, share, seed, dtype, device):
    xyz, exact = cloud(kind, B, N, seed, dtype)
    G = max(1, round(share * N))
    expected = []
    for row in plain.farthest_point_sample(exact, G).tolist():
        distinct = dict.fromkeys(row + list(range(N)))  # copies of chosen points come last
        expected.append(list(distinct)[:G])
    assert geometry("farthest_point_sample", device, xyz, G)[0].tolist() == expected


@mock.patch.object(torch, "cuda")
def test_one_graph_replayed_for_other_clouds_gives_the_loops_indices(cuda):
    owner = (cuda.current_stream(), act.threading.get_ident())
    owner[0].device = "cpu"
    shape = torch.Size([3, 2, 40])

    def replay():
        inputs, _, idx = act.record_farthest(shape, torch.float32, 7, owner)
        idx.copy_(act.choose_farthest(inputs[0], inputs[1], 7))

    cuda.CUDAGraph().replay.side_effect = replay
    found = []
    expected = []
    for seed in range(3):
        with torch.inference_mode(seed == 0):  # of the call that records
            planes = randn(3, 2, 40, seed=seed)
            first = torch.full((2, 1), seed)
            found.append(act.replay_farthest(planes, first, 7))
            expected.append(act.choose_farthest(planes, first, 7))
    assert_equal(found, expected)
    assert cuda.graph.call_count == 1


def test_fps_starts_at_random_by_its_generator():
    xyz = randn(16, 50, 3)
    idx = act.farthest_point_sample(xyz, 10, generator=seeded(3))
    assert len(idx[:, 0].unique()) > 5
    assert_equal(idx, plain.farthest_point_sample(xyz, 10, first=idx[:, 0]))


@every_cloud
@given(B=batches, Q=batches, N=st.integers(1, 300), share=shares, seed=seeds, dtype=precisions)
@example(B=2, Q=200, N=3000, share=0.01, seed=0, dtype=torch.float32)  # several chunks
def test_knn_equals_a_stable_sort_ties_included(kind, B, Q, N, share, seed, dtype, device):
    xyz, exact = cloud(kind, B, N, seed, dtype)
    query, exact_query = cloud(kind, B, Q, seed + 1, dtype)
    k = max(1, round(share * N))
    assert_equal(geometry("knn", device, query, xyz, k), plain.stable_knn(exact_query, exact, k))


def test_geometry_can_be_copied_with_what_it_names():
    alone = {"torch": torch, "lru_cache": lru_cache, "threading": act.threading}
    names = "farthest_point_sample choose_farthest replay_farthest record_farthest knn smallest"
    for name in f"{names} gather_points group_points chamfer_distance".split():
        exec(inspect.getsource(getattr(act, name)), alone)
    xyz = randn(2, 20, 3)
    assert_equal(alone["group_points"](xyz, 5, 4), act.group_points(xyz, 5, 4))
    assert_equal(alone["chamfer_distance"](xyz, -xyz), act.chamfer_distance(xyz, -xyz))


def test_knn_of_a_million_points_holds_few_distances_at_a_time():
    with mock.patch.object(act, "smallest", wraps=act.smallest) as smallest:
        act.knn(randn(1, 30, 3), randn(1, 1_000_000, 3), 32)
    assert [call.args[0].numel() for call in smallest.call_args_list] == [1_000_000] * 30


@every_cloud
@given(norm=st.integers(1, 2), B=batches, N=few, M=few, seed=seeds, dtype=precisions)
def test_chamfer_equals_the_formula(kind, norm, B, N, M, seed, dtype, device):
    a, exact_a = cloud(kind, B, N, seed, dtype)
    b, exact_b = cloud(kind, B, M, seed + 1, dtype)
    expected = plain.chamfer_distance(exact_a.double(), exact_b.double(), norm).item()
    (found,) = geometry("chamfer_distance", device, a, b, norm)
    assert found.dtype == exact_a.dtype
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("norm", [1, 2])
def test_chamfer_has_the_gradient_of_finite_differences_and_zero_where_clouds_coincide(norm):
    a = randn(2, 6, 3, seed=6, dtype=torch.float64).requires_grad_()
    b = randn(2, 4, 3, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(partial(act.chamfer_distance, norm=norm), (a, b))
    act.chamfer_distance(a, a.detach().flip(1), norm).backward()
    assert not a.grad.any()


@pytest.mark.parametrize("device", ["cpu"] + GPUS)
def test_fscore_of_a_case_worked_by_hand(device):
    pred = F.pad(torch.tensor([[0, 1.5], [0, 1]])[..., None], [0, 2])  # points on the x axis
    target = F.pad(torch.tensor([[0, 5.0], [90, 91]])[..., None], [0, 2])
    for a, b in ((pred, target), (target, pred)):  # 1.5 < 2 < 1.5^2, and 5 - 1.5 < 2^2
        assert_close(geometry("fscore", device, a, b, 2)[0], torch.tensor([2 / 3, 0]))


@every_cloud
@given(N=st.integers(1, 10), G=st.integers(1, 8), C=batches, seed=seeds, dtype=precisions)
def test_interpolation_weighs_three_centres_by_inverse_squares(kind, N, G, C, seed, dtype, device):
    xyz, exact = cloud(kind, 2, N, seed, dtype)
    center, exact_center = cloud(kind, 2, G, seed + 1, dtype)
    features = randn(2, G, C, seed=seed + 2, dtype=torch.float64).requires_grad_()
    sqdist, idx = plain.stable_knn(exact, exact_center, min(3, G))
    weight = 1 / (sqdist.double() + 1e-8)[..., None]
    expected = (weight * plain.gather_points(features, idx)).sum(2) / weight.sum(2)
    found = geometry("interpolate", device, xyz, center, features)
    assert_same_with_gradients(found, expected, [features], 1e-4)


def torchs_block(block, x, c):
    """The same block as torch's own layer."""
    gelu = (lambda x: x / (1 + (-1.702 * x).exp())) if c.quick_gelu else F.gelu
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
    inputs = [x] + list(block.parameters())
    assert_same_with_gradients(block(x), torchs_block(block, x, c), inputs)


def test_drop_path_drops_whole_samples_at_a_rate_that_grows_linearly_with_depth():
    student = make("Student", drop_path=0.4, depth=5).train()
    torch.manual_seed(0)
    for blocks in (student.encoder.blocks, student.decoder.blocks):
        for i, block in enumerate(blocks):
            for p in block.parameters():
                nn.init.zeros_(p)
            nn.init.ones_(block.attn.proj.bias)  # the attention branch gives ones, the MLP nothing
            out = block(torch.zeros(9000, 2, 12)).detach()
            rate = 0.4 * i / (len(blocks) - 1)
            assert_equal(out, out[:, :1, :1].expand_as(out))
            deviation = math.sqrt(rate * (1 - rate) / 9000)
            assert abs((out == 0).float().mean().item() - rate) <= 4.5 * deviation
            assert_close(out.max(), torch.tensor(1 / (1 - rate)))  # the rest is scaled up
            assert block.eval()(torch.zeros(9, 2, 12)).unique().tolist() == [1]


def test_images_of_another_size_resample_the_positions():
    model = act.Backbone(act.BackboneConfig(width=4, depth=0, num_heads=1, patch_size=4, grid=4))
    model.norm = nn.Identity()  # what goes in comes out
    model.patch_embed["proj"].bias.data.zero_()
    model.pos_embed.data.copy_(torch.arange(4.0).repeat(4)[None, :, None])  # a ramp in each row
    ramp = model.forward_features(torch.zeros(1, 3, 8, 32)).view(2, 8, 4)
    expected = torch.tensor([1.25, 1.75]).expand(2, 4, 2).mT  # half-pixel centres, in both rows
    assert_close(ramp[:, 3:5], expected, 1e-4)


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
    sizes = act.BackboneConfig(18, 2, 2, 24, norm_pre=True, patch_size=4, grid=3, num_prefix=1)
    model = randomise(act.Backbone(sizes))
    teacher = act.Teacher(act.TeacherConfig(**common.TEACHER_SIZES), model)
    tokens = randn(2, 5, 18)
    assert_equal(teacher.backbone.forward_tokens(tokens), model.forward_tokens(tokens))
    assert teacher.config.backbone == replace(model.config, patch_size=0)


@pytest.mark.parametrize("sharpness", [3, 100])
def test_teacher_loss_equals_an_independent_formula(sharpness):
    logits = sharpness * randn(4, 5, 9)
    coarse, fine, patch = randn(3, 4, 5, 8, 3)
    output = act.TeacherOutput(coarse, fine, patch, None, logits)
    total, reconstruction, kl = act.teacher_loss(output, 0.07)
    patch = patch.flatten(0, 1)
    expected = [plain.chamfer_distance(each.flatten(0, 1), patch) for each in (coarse, fine)]
    assert_close(reconstruction, sum(expected))
    used = logits.double().softmax(-1).mean(1)  # of each cloud
    assert kl.item() == pytest.approx(-(9 * used).log().mean().item(), rel=1e-5, abs=1e-6)
    assert_close(total, reconstruction + 0.07 * kl, 1e-6)


@pytest.mark.parametrize("make_mask", [act.random_mask, act.block_mask])
@pytest.mark.parametrize("ratio, masked", [(0.07, 0), (0.47, 4), (0.8, 8), (1, 10)])
def test_masks_hold_the_exact_share_and_each_group_as_often(make_mask, ratio, masked):
    center = randn(1, 10, 3).expand(5000, -1, -1)
    mask = make_mask(center, ratio, seeded(1)).long()
    assert mask.sum(1).tolist() == [masked] * 5000
    assert torch.equal(mask, make_mask(center, ratio, seeded(2))) == (masked in (0, 10))
    expected = torch.full((10,), masked / 10)
    if make_mask == act.block_mask:  # it masks one group and those nearest to it
        blocks = F.one_hot(plain.stable_knn(center[:1], center[:1], masked)[1][0], 10).sum(1)
        assert_equal(mask.unique(dim=0), blocks.unique(dim=0))
        expected = blocks.double().mean(0)
    assert ((mask.double().mean(0) - expected).abs() < 4.5 * 0.5 / math.sqrt(5000)).all()


def plain_levels(encoder, neighborhood, center):
    """The normed tokens after each block."""
    x = encoder.reduce_dim(encoder.patch_embed(neighborhood))
    pos = encoder.pos_embed(center)
    if encoder.cls_token is not None:
        x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
        pos = torch.cat([encoder.cls_pos.expand(len(x), -1, -1), pos], dim=1)
    levels = []
    for block in encoder.blocks:
        x = block(x + pos)
        levels.append(encoder.norm(x))
    return levels


@both_modes
@pytest.mark.parametrize("encoder_dims", [16, 12], ids=["reduced", "of the width"])
def test_student_equals_the_formula_by_boolean_indexing(train, encoder_dims, double):
    student = make("Student", encoder_dims=encoder_dims).double().train(train)
    xyz = random_clouds().double()
    neighborhood, center, mask = random_patches(xyz)
    everything = plain_levels(student.encoder, neighborhood, center)[-1]
    assert_close(student.encode(xyz.numpy()), everything)
    visible = center[~mask].view(3, 4, 3)
    tokens = plain_levels(student.encoder, neighborhood[~mask].view(3, 4, 8, 3), visible)[-1]
    x = torch.cat([tokens[:, 1:], student.mask_token.expand(3, 6, -1)], dim=1)
    pos = student.decoder_pos_embed(torch.cat([visible, center[mask].view(3, 6, 3)], dim=1))
    for block in student.decoder.blocks:
        x = block(x + pos)
    plainly = (student.head(student.decoder.norm(x)[:, 4:]), tokens)
    ours = (student(neighborhood, center, mask), student.encoder(neighborhood, center, mask))
    assert_same_with_gradients(ours, plainly, student.parameters(), 1e-9)
    assert_equal(student(neighborhood, center, None, act.split_mask(mask, "cpu")), ours[0])
    assert student(neighborhood, center, torch.zeros_like(mask)).shape == (3, 0, 7)


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
        assert_close(act.distillation_loss(a, b, kind).double(), value.mean().double())


HEADED = {  # a model, its options, the depths whose tokens it takes
    "mlp3": ("Classifier", {}, [2]),
    "linear": ("Classifier", {"head": "linear"}, [2]),
    "parts": ("Segmenter", {}, [1, 1, 2]),
    "scene": ("Segmenter", {"num_categories": 0}, [2, 4, 6]),
}


def logits_of(model, xyz):
    wanted = getattr(model.config, "num_categories", 0)
    return model(xyz, 2 - torch.arange(3, device=xyz.device)) if wanted else model(xyz)


@both_modes
@pytest.mark.parametrize("name", HEADED)
def test_heads_equal_the_formula_of_tokens_at_these_depths(name, train, double):
    kind, options, depths = HEADED[name]
    model = make(kind, depth=depths[-1], **options).double().train(train)
    for layer in model.head:
        layer.p = 0.0  # no dropout: each form would draw its own
    xyz = random_clouds().double()
    neighborhood, center = act.group_points(xyz, 10, 8)
    levels = plain_levels(model.encoder, neighborhood, center)
    tokens = torch.cat([levels[i - 1] for i in depths], dim=-1)
    if kind == "Classifier":
        plainly = model.head(torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], dim=-1))
    else:
        cloud = [tokens.amax(1), tokens.mean(1)]
        if name == "parts":
            cloud.append(model.label_conv(torch.eye(3).double().flip(0)))
        cloud = torch.cat(cloud, dim=-1)[:, None].expand(-1, 64, -1)
        point = torch.cat([xyz, act.interpolate(xyz, center, tokens)], dim=-1)
        point = model.propagation(point.flatten(0, 1)).view(3, 64, 1024)
        plainly = model.head(torch.cat([point, cloud], dim=-1).flatten(0, 1)).view(3, 64, 5)
    assert_same_with_gradients(logits_of(model, xyz), plainly, model.parameters(), 1e-9)


TRAINED = {  # a model, and what of it is frozen
    "teacher": (common.make_teacher, "backbone"),
    "classifier": (lambda: make("Classifier").freeze_encoder(), "encoder"),
    "parts": (partial(make, "Segmenter"), "nothing"),
    "scene": (partial(make, "Segmenter", num_categories=0), "nothing"),
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
    before = build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)  # gradients alone
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    wanted = {name for name in model.state_dict() if not name.startswith(frozen + ".")}
    assert common.moved(before, model) == wanted


@pytest.mark.parametrize("device", [FAKE_GPU] + GPUS)
@pytest.mark.parametrize("name", TRAINED)
def test_no_step_mixes_devices_or_asks_for_a_value(name, device, monkeypatch):
    monkeypatch.setattr(FakeTensor, "tolist", lambda mask: [6, 6, 6])  # of a mask without values
    model = TRAINED[name][0]()
    expected = loss_of(model)
    mode = nullcontext()
    if device == FAKE_GPU:  # it raises for both, as a GPU raises for one and waits for the other
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = model.to_empty(device=device) if device == FAKE_GPU else model.to(device)
        xyz = random_clouds().to(device)
        out = [loss_of(model, device), act.block_mask(xyz, 0.6)]
        assert device == FAKE_GPU or out[0].item() == pytest.approx(expected.item(), rel=1e-3)
        out += [loss_of(model.train(), device), act.farthest_point_sample(xyz, 5, seeded())]
        if isinstance(model, act.Teacher):
            out += [model.features(*act.group_points(xyz, 10, 8)), *model(xyz, hard=True)]
        assert all(tensor.device.type == device for tensor in out)
        out[2].backward()


def test_what_is_wrong_is_named():
    with refused("k", 12, 13):
        act.knn(randn(2, 9, 3), randn(2, 12, 3), 13)
    with refused("num_samples", 5, 6):
        act.group_points(randn(2, 5, 3), 6, 2)
    with refused("(B, N, 3)", (64, 3)):
        make("Student").encode(randn(64, 3))
    with refused("category", 3):
        make("Segmenter")(random_clouds())


@pytest.mark.parametrize("kind", common.MINIMUM)
def test_a_checkpoint_gives_its_model_back_and_that_of_a_compiled_one_too(tmp_path, kind):
    model = make(kind)
    state = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    act.save({"kind": kind, "config": asdict(model.config), "model": state}, tmp_path / "last.pt")
    loaded = act.load(str(tmp_path / "last.pt"))
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.config == model.config and not common.moved(model, loaded)


STUDENT = make("Student").state_dict()
CHECKPOINT = {"kind": "Student", "config": common.MINIMUM["Student"], "model": STUDENT}
WRONG = {  # what the message names -> what the file holds
    "load_state_dict": STUDENT,
    "Detector": CHECKPOINT | {"kind": "Detector"},
    "foo": CHECKPOINT | {"config": {"foo": 1}},
    "finite": CHECKPOINT | {"model": STUDENT | {"head.bias": torch.full((7,), math.nan)}},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_no_checkpoint_or_does_not_fit_is_named(tmp_path, words):
    act.save(WRONG[words], tmp_path / "last.pt")
    with refused(tmp_path / "last.pt", words):
        act.load(tmp_path / "last.pt")
    with refused(tmp_path, "folder"):
        act.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        act.load(tmp_path / "none.pt")


def test_encode_as_onnx_takes_any_batch_and_equals_ours(tmp_path):
    student = make("Student", num_group=4, depth=1)  # the export takes a while
    student.forward = student.encode
    clouds = [randn(B, 64, 3, seed=B).round(decimals=1) for B in (3, 1, 7)]  # equal distances
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "student.onnx"
    torch.onnx.export(student, (clouds[0],), path, dynamo=True, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)
    for xyz in clouds:
        tokens = session.run(None, {session.get_inputs()[0].name: xyz.numpy()})[0]
        assert_close(torch.from_numpy(tokens), student(xyz), 1e-4)
