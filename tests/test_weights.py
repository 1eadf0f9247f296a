"""Tests of util/weights.py: public weights by name, and from files of every layout."""

import hashlib
import json
import os
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import act
from common import Hostile, assert_close, randn, randomise, refused, same
from util import official, weights

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
W = 32  # width of the tiny models: two blocks, images of 3 x 3 patches of 4 x 4 pixels
HEADS = 2
ONES = torch.ones(2)
# Parts of names in each layout, in the order of timm's:
TIMM = """blocks. norm1 norm2 attn.proj mlp.fc1 mlp.fc2 attn.qkv. attn.q. attn.k. attn.v. norm.
    cls_token pos_embed patch_embed.proj norm_pre"""
TORCHVISION = """encoder.layers.encoder_layer_ ln_1 ln_2 self_attention.out_proj mlp.0 mlp.3
    self_attention.in_proj_ - - - encoder.ln. class_token encoder.pos_embedding conv_proj -"""
CLIP = """visual.transformer.resblocks. ln_1 ln_2 attn.out_proj mlp.c_fc mlp.c_proj attn.in_proj_
    - - - visual.ln_post. visual.class_embedding visual.positional_embedding visual.conv1
    visual.ln_pre"""
JAX = """Transformer/encoderblock_ LayerNorm_0 LayerNorm_2 HEADS/out MlpBlock_3/Dense_0
    MlpBlock_3/Dense_1 - HEADS/query/ HEADS/key/ HEADS/value/ Transformer/encoder_norm/ cls
    Transformer/posembed_input/pos_embedding embedding -"""
JAX = JAX.replace("HEADS", "MultiHeadDotProductAttention_1")
VIT = """encoder.layer. layernorm_before layernorm_after attention.output.dense intermediate.dense
    output.dense - attention.attention.query. attention.attention.key. attention.attention.value.
    layernorm. embeddings.cls_token embeddings.position_embeddings
    embeddings.patch_embeddings.projection -"""
NEWER_VIT = """layers. layernorm_before layernorm_after attention.o_proj mlp.fc1 mlp.fc2 -
    attention.q_proj. attention.k_proj. attention.v_proj. """ + VIT[VIT.index("layernorm. ") :]
BERT = """encoder.layer. attention.output.LayerNorm output.LayerNorm attention.output.dense
    intermediate.dense output.dense - attention.self.query. attention.self.key.
    attention.self.value. - - - - -"""


def vit_state(positions=1, layer_scale=False, **tokens):
    config = act.BackboneConfig(W, 2, HEADS, 4 * W, layer_scale=layer_scale)
    shapes = {name: value.shape for name, value in act.Backbone(config).state_dict().items()}
    shapes |= {"patch_embed.proj.weight": (W, 3, 4, 4), "patch_embed.proj.bias": (W,)}
    shapes |= {"cls_token": (1, 1, W), "pos_embed": (1, positions + 9, W)}
    shapes |= {name: (1, count, W) for name, count in tokens.items()}
    torch.manual_seed(0)  # values that are exact in a file of halves
    return {name: torch.randn(shape).half().float() for name, shape in shapes.items()}


def renamed(state, names, prefix=""):
    """The file's tensors; query, key and value are apart where there is no name for all three."""
    words = dict(zip(TIMM.split(), names.split(), strict=True))
    out = {}
    for key, value in state.items():
        parts = {"qkv": value}
        if ".attn.qkv." in key and words["attn.qkv."] == "-":
            parts = dict(zip("qkv", value.chunk(3), strict=True))
        for letter, part in parts.items():
            name = key.replace("qkv", letter)
            for ours, theirs in words.items():
                name = name.replace(ours, theirs)
            out[prefix + name] = part
    return out


def more(names):
    return {name: torch.ones(2, W) for name in names.split()}  # nobody needs them here


def jax_file(heads=HEADS, prefix=""):
    state = {f"{prefix}head/bias": np.ones(2)}
    for key, value in renamed(PLAIN, JAX, prefix).items():
        array = value.numpy()
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        if array.ndim == 2:
            array = array.T
        if key.endswith("/out.weight"):
            array = array.reshape(heads, -1, W)
        elif "Attention" in key and "/out." not in key:
            array = array.reshape(*array.shape[:-1], heads, -1)
        leaf = "scale" if array.ndim == 1 else "kernel"
        state[key.replace("weight", leaf).replace(".", "/")] = array
    return state


def bert_file(prefix="", positions=512):
    state = renamed(BLOCKS, BERT, prefix) | more("lm_head.dense.weight cls.predictions.bias")
    state |= more(f"{prefix}embeddings.word_embeddings.weight {prefix}pooler.dense.weight")
    state[f"{prefix}embeddings.position_embeddings.weight"] = torch.ones(positions, W)
    if prefix == "bert.":  # older files have other names of a LayerNorm's tensors
        for key in [key for key in state if "LayerNorm" in key]:
            state[key.replace("weight", "gamma").replace("bias", "beta")] = state.pop(key)
    return state


PLAIN = vit_state()
DISTILLED = vit_state(positions=2, dist_token=1)
REGISTERS = vit_state(reg_token=4)
SCALED = vit_state(layer_scale=True)
BLOCKS = {key: value for key, value in PLAIN.items() if key.startswith("blocks.")}
CLIP_KIND = {"eps": 1e-5, "norm_pre": True, "quick_gelu": True}
PRE_NORM = PLAIN | {"norm_pre.weight": SCALED["norm.bias"], "norm_pre.bias": torch.ones(W)}
del PRE_NORM["patch_embed.proj.bias"]
META = {key.replace("reg_token", "register_tokens"): value for key, value in REGISTERS.items()}
CLIP_FILE = {key: value.squeeze() for key, value in renamed(PRE_NORM, CLIP).items()}
CLIP_FILE |= more("visual.proj transformer.resblocks.0.ln_1.weight ln_final.weight vocab_size")
CLIP_FILE |= more("token_embedding.weight positional_embedding text_projection logit_scale")
DINO = renamed(SCALED, TIMM, "module._orig_mod.backbone.") | more("dino_head.0.bias")
FLAGS = Namespace(lr=0.1, output_dir=Path("runs"), sizes=[1, 2])
BERT_KIND = {"eps": 1e-12, "norm_first": False}
LAYOUTS = {  # (what a file holds, the same weights under timm's names, config that is not timm's)
    "DeiT": (DISTILLED | more("head.bias head_dist.weight pre_logits.fc.bias"), DISTILLED, {}),
    "Meta's registers": ({"state_dict": META, "epoch": 3}, REGISTERS, {}),
    "compiled DINO": ({"student": {}, "teacher": DINO}, SCALED, {}),
    "MAE": (PLAIN | more("mask_token decoder_blocks.0.norm1.bias fc_norm.bias"), PLAIN, {}),
    "timm with argparse's flags": ({"args": FLAGS, "model": PLAIN}, PLAIN, {}),
    "torchvision": (renamed(PLAIN, TORCHVISION) | more("heads.head.bias"), PLAIN, {}),
    "Hugging Face": (renamed(PLAIN, VIT) | more("pooler.dense.bias"), PLAIN, {"eps": 1e-12}),
    "newer Hugging Face": (renamed(PLAIN, NEWER_VIT, "vit."), PLAIN, {"eps": 1e-12}),
    "CLIP": (CLIP_FILE, PRE_NORM, CLIP_KIND),
    "JAX": (jax_file(heads=4), PLAIN, {"num_heads": 4}),
    "older JAX": (jax_file(prefix="opt/target/"), PLAIN, {}),
    "BERT": (bert_file(), BLOCKS, BERT_KIND),
    "older BERT": (bert_file("bert."), BLOCKS, BERT_KIND),
    "RoBERTa": (bert_file("roberta."), BLOCKS, BERT_KIND | {"eps": 1e-5}),
    "RoBERTa by its positions": (bert_file(positions=514), BLOCKS, BERT_KIND | {"eps": 1e-5}),
}
FILES = {"CLIP": "w.pt", "JAX": "w.npz", "older JAX": "w.npz", "BERT": "w.safetensors"}


def write(folder, held, name="w.pth"):
    path = folder / name
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(held, path)
    elif path.suffix == ".npz":
        np.savez(path, **held)
    elif path.suffix == ".pt":
        root = nn.Identity()  # OpenAI's archives: a traced module, tensors of half precision
        root._buffers = {key: value.half() for key, value in held.items()}
        torch.jit.trace(root, ONES).save(str(path))
    else:
        torch.save(held, path)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_the_weights_that_timms_names_have(tmp_path, name):
    held, state, kind = LAYOUTS[name]
    path = write(tmp_path, held, FILES.get(name, "w.pth"))
    num_heads = None if "JAX" in name else HEADS  # JAX's file itself tells
    model = weights.load_pretrained(path.rename(tmp_path / "by_content"), num_heads)
    config = replace(act.backbone_config(state, "", HEADS), **kind)
    expected = act.build_backbone(state, config, "")
    assert not model.training and model.config == expected.config
    assert same(model.state_dict(), expected.state_dict())


NO_TOKEN = vit_state(0)  # SigLIP's
del NO_TOKEN["cls_token"]


@pytest.mark.parametrize("state", [PLAIN, DISTILLED, vit_state(0, reg_token=4), NO_TOKEN])
def test_tokens_with_their_positions_go_before_the_patches(tmp_path, state):
    model = weights.load_pretrained(write(tmp_path, state), HEADS)
    images = randn(2, 3, 12, 12, seed=7)
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=4).flatten(2).mT
    tokens = [state[name] for name in ("cls_token", "dist_token") if name in state]
    x = torch.cat([token.expand(2, -1, -1) for token in tokens] + [x], dim=1)
    pos = state["pos_embed"]
    x = x + F.pad(pos, (0, 0, x.shape[1] - pos.shape[1], 0))  # a table may have patches alone
    registers = state.get("reg_token", torch.empty(1, 0, W)).expand(2, -1, -1)
    x = torch.cat([x[:, : len(tokens)], registers, x[:, len(tokens) :]], dim=1)
    assert_close(model.forward_features(images), model.forward_tokens(x))


TIMMS = """vit_small_patch16_224 deit_small_distilled_patch16_224 vit_small_patch14_dinov2
    vit_small_patch14_reg4_dinov2 vit_base_patch32_clip_quickgelu_224.openai
    vit_base_patch32_clip_224.laion2b vit_base_patch16_siglip_224"""


@pytest.mark.parametrize("name", TIMMS.split())
def test_timm_agrees(tmp_path, name):
    timm = pytest.importorskip("timm", exc_type=Exception)
    theirs = randomise(timm.create_model(name, img_size=224, depth=1)).eval()
    ours = weights.load_pretrained(write(tmp_path, theirs.state_dict(), f"{name}.pth"))
    images = randn(1, 3, 224, 224)
    assert_close(ours.forward_features(images), theirs.forward_features(images), 1e-4)


def test_heads_come_from_config_json_then_the_argument_then_the_file(tmp_path):
    path = write(tmp_path, PLAIN)
    with refused(path, "num_heads", W):
        weights.load_pretrained(path)
    for file in (path, write(tmp_path, jax_file(), "w.npz")):
        assert weights.load_pretrained(file, num_heads=8).config.num_heads == 8
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "layer_norm_eps": 1e-3}')
    config = weights.load_pretrained(path, num_heads=8).config
    assert (config.num_heads, config.eps) == (4, 1e-3)
    for text in ("{", "[]", '{"hidden_act": 1}', '{"hidden_size": 7}', '{"layer_norm_eps": ""}'):
        (tmp_path / "config.json").write_text(text)
        with refused(path, "config.json"):
            weights.load_pretrained(path)


def test_a_text_model_of_width_384_has_twelve_heads():
    with torch.device("meta"):
        blocks = act.Backbone(act.BackboneConfig(384, 1, 12, 8)).blocks.state_dict()
    state = renamed({f"blocks.{key}": value for key, value in blocks.items()}, BERT)
    assert weights.translate(state, None, "")[1].num_heads == 12


ACTIVATIONS = [  # name of a CLIP's file, what config.json beside it says, whether QuickGELU
    ("ViT-B-16-openai.pth", {}, True),
    ("open_clip_pytorch_model.bin", {}, False),
    ("vit_b_16-laion400m_e32.pth", {}, False),
    ("vit_base_patch32_clip_224.laion400m_e32.pth", {}, True),
    ("vit_base_patch16_clip_quickgelu_224.dfn2b.pth", {}, True),
    ("vit_base_patch16_clip_224.openai_ft_in1k.pth", {}, False),
    ("w.pth", {"hidden_act": "quick_gelu"}, True),
    ("openai.pth", {"vision_config": {"hidden_act": "gelu"}}, False),
]


@pytest.mark.parametrize("layout", [CLIP, TIMM], ids=["CLIP", "timm"])
@pytest.mark.parametrize("name, beside, quick", ACTIVATIONS)
def test_quick_gelu_is_for_those_clips_that_had_it(tmp_path, layout, name, beside, quick):
    path = write(tmp_path, renamed(PRE_NORM, layout), name)
    (tmp_path / "config.json").write_text(json.dumps(beside))
    config = weights.load_pretrained(path, HEADS).config
    assert (config.quick_gelu, config.norm_pre, config.eps) == (quick, True, 1e-5)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.npz", "w.pt"])
def test_a_file_cut_short_is_refused(tmp_path, name):
    path = write(tmp_path, {"matrix": torch.ones(2, 3)}, name)
    data = path.read_bytes()
    for share in (0.9, 0.5, 0):
        path.write_bytes(data[: int(share * len(data))])
        with refused(path):
            weights.read_tensors(path)


@pytest.mark.parametrize("form", ["zip", "legacy", "npz", "script"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    path = tmp_path / "weights.npz"
    hostile = Hostile(tmp_path / "trace")
    word = "code that would run"  # and no advice to run it
    if form == "npz":
        np.savez(path, cls=np.array([hostile, None], dtype=object))
        word = "pickle"
    elif form == "script":  # such a method would run as the archive is loaded
        path = write(tmp_path, PLAIN, "w.pt")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("weights/code/more.PY", "def __setstate__(self, state): pass")
    else:
        torch.save(
            [PLAIN, Namespace(out=hostile)], path, _use_new_zipfile_serialization=form == "zip"
        )
    for read in (weights.read_tensors, weights.load_pretrained, official.load):
        with refused(path, word):
            read(path)
    assert os.listdir(tmp_path) == [path.name]


def test_scalars_of_numpy_1_among_metrics_are_admitted(tmp_path):
    path = tmp_path / "w.pth"
    held = {"a": ONES, "metrics": [np.float64(93.2), np.bool_(True), np.arange(3.0)]}
    torch.save(held, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
    assert same(weights.read_tensors(path)["a"], ONES)


@pytest.mark.parametrize("size", [None, 1000])
@pytest.mark.parametrize(
    "name, file",
    [
        ("dino_vits16", "net-{}.pth"),
        ("dino_vits16", "net-00000000.pth"),
        ("dino_vits16", "model.safetensors"),
        ("timm/clip_quickgelu.x", "timm/clip.x/model.safetensors"),
    ],
)
def test_a_name_is_downloaded_once_and_whole_or_not_at_all(tmp_path, monkeypatch, name, file, size):
    data = write(tmp_path, PLAIN, f"w{Path(file).suffix}").read_bytes()[:size]
    path = tmp_path / file.format(hashlib.sha256(data).hexdigest()[:8])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    monkeypatch.setitem(weights.PUBLISHED, "dino_vits16", path.as_uri())
    monkeypatch.setattr(weights, "HUGGING_FACE", f"{tmp_path.as_uri()}/{{}}/model.safetensors")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cached = tmp_path / "hub/checkpoints" / path.name
    if path.name == "model.safetensors":
        cached = tmp_path / f"hub/checkpoints/{name}.safetensors"
    fails = size is not None or "0000" in file
    for _ in range(2):
        if fails:
            with refused(name, cached, path.as_uri()):
                weights.load_pretrained(name)
        else:
            state = weights.load_pretrained(name, HEADS).state_dict()
            assert torch.equal(state["norm.bias"], PLAIN["norm.bias"])
        path.unlink(missing_ok=True)  # then the address holds nothing
    assert os.listdir(cached.parent) == ([] if fails else [cached.name])


def test_a_file_goes_before_timms_model_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "timm").mkdir()
    write(tmp_path, PLAIN, "timm/vit.pth")
    monkeypatch.chdir(tmp_path)
    assert weights.load_pretrained("timm/vit.pth", HEADS).config.width == W


QUERY = "encoder.layer.0.attention.self.query.bias"
JAX_QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
UNFIT = [  # what a file holds, a change (None leaves the tensor out), words of the message
    ({"model": {"epoch": 3}}, {}, ["tensors"]),
    (PRE_NORM, {}, ["config.json", "quick_gelu"]),
    (PLAIN, {"blocks.0.attn.q_norm.weight": ONES}, ["blocks.0.attn.q_norm.weight"]),
    (PLAIN, {"blocks.1.mlp.w12.weight": ONES}, ["blocks.1.mlp.w12.weight"]),
    (PLAIN, {"rope.freqs": ONES}, ["rope.freqs"]),
    (PLAIN, {"norm.bias": None, "fc_norm.bias": ONES}, ["norm.bias"]),
    (bert_file(), {QUERY: None}, ["nexpected key", "blocks.0.attn.k.bias"]),
    (bert_file(), {QUERY: torch.ones(2, 2)}, ["blocks.0.attn.k.bias", 2]),
    (jax_file(), {JAX_QUERY: torch.ones(2)}, ["blocks.0.attn.q.kernel", 3]),
]


@pytest.mark.parametrize("held, change, words", UNFIT)
def test_tensors_that_do_not_fit_are_named(tmp_path, held, change, words):
    held = {key: value for key, value in (held | change).items() if value is not None}
    path = write(tmp_path, held, "w.npz" if JAX_QUERY in change else "w.pth")
    with refused(path, *words):
        weights.load_pretrained(path, HEADS)
    with refused("absent", "minilm_l6"):
        weights.load_pretrained("absent")
