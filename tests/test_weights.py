"""Tests of util/weights.py: public weights by name, and from files of every layout."""

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import act
from common import Hostile, assert_close, randn, refused, same
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


def clip_file():
    state = renamed(PRE_NORM, CLIP)
    for name in ("visual.class_embedding", "visual.positional_embedding"):
        state[name] = state[name].squeeze()
    state |= more("visual.proj transformer.resblocks.0.ln_1.weight ln_final.weight vocab_size")
    return state | more("token_embedding.weight positional_embedding text_projection logit_scale")


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
PRE_NORM = PLAIN | {"norm_pre.weight": SCALED["norm.bias"], "norm_pre.bias": torch.ones(W)}
del PRE_NORM["patch_embed.proj.bias"]
META = {key.replace("reg_token", "register_tokens"): value for key, value in REGISTERS.items()}
DINO = renamed(SCALED, TIMM, "module.backbone.") | more("dino_head.0.bias ibot_head.last.bias")
BERT_KIND = {"eps": 1e-12, "norm_first": False}
LAYOUTS = {  # (what a file holds, the same weights under timm's names, config that is not timm's)
    "DeiT": (DISTILLED | more("head.bias head_dist.weight pre_logits.fc.bias"), DISTILLED, {}),
    "Meta's registers": ({"state_dict": META, "epoch": 3}, REGISTERS, {}),
    "DINO": ({"student": {}, "teacher": DINO}, SCALED, {}),
    "MAE": ({"model": PLAIN | more("mask_token decoder_blocks.0.norm1.bias")}, PLAIN, {}),
    "torchvision": (renamed(PLAIN, TORCHVISION) | more("heads.head.bias"), PLAIN, {}),
    "Hugging Face": (renamed(PLAIN, VIT) | more("pooler.dense.bias"), PLAIN, {"eps": 1e-12}),
    "newer Hugging Face": (renamed(PLAIN, NEWER_VIT, "vit."), PLAIN, {"eps": 1e-12}),
    "CLIP": (clip_file(), PRE_NORM, {"eps": 1e-5, "norm_pre": True, "quick_gelu": True}),
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
    num_heads = None if "JAX" in name else HEADS  # JAX's file itself tells
    model = weights.load_pretrained(write(tmp_path, held, FILES.get(name, "w.pth")), num_heads)
    config = replace(act.backbone_config(state, "", HEADS), **kind)
    expected = act.build_backbone(state, config, "")
    assert not model.training and model.config == expected.config
    assert same(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("state", [PLAIN, DISTILLED, REGISTERS, vit_state(0, reg_token=4)])
def test_tokens_with_their_positions_go_before_the_patches(tmp_path, state):
    model = weights.load_pretrained(write(tmp_path, state), HEADS)
    images = randn(2, 3, 12, 12, seed=7)
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)  # (2, 9, 48)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).t() + state["patch_embed.proj.bias"]
    tokens = [state[name] for name in ("cls_token", "dist_token") if name in state]
    x = torch.cat([token.expand(2, -1, -1) for token in tokens] + [x], dim=1)
    pos = state["pos_embed"]
    x = x + F.pad(pos, (0, 0, x.shape[1] - pos.shape[1], 0))  # a table may have patches alone
    registers = state.get("reg_token", torch.empty(1, 0, W)).expand(2, -1, -1)
    x = torch.cat([x[:, : len(tokens)], registers, x[:, len(tokens) :]], dim=1)
    assert_close(model.forward_features(images), model.forward_tokens(x))


def test_heads_come_from_config_json_then_the_argument_then_the_width(tmp_path):
    path = write(tmp_path, PLAIN)
    assert weights.load_pretrained(path).config.num_heads == 1
    for file in (path, write(tmp_path, jax_file(), "w.npz")):
        assert weights.load_pretrained(file, num_heads=8).config.num_heads == 8
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "layer_norm_eps": 1e-3}')
    config = weights.load_pretrained(path, num_heads=8).config
    assert (config.num_heads, config.eps) == (4, 1e-3)
    for text in ("{", "[]", '{"hidden_act": 1}', '{"hidden_size": 7}', '{"layer_norm_eps": ""}'):
        (tmp_path / "config.json").write_text(text)
        with refused(path, "config.json"):
            weights.load_pretrained(path)


def test_timm_agrees(tmp_path):
    timm = pytest.importorskip("timm", exc_type=Exception)
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", dynamic_img_size=True, depth=1)
    ours = weights.load_pretrained(write(tmp_path, theirs.state_dict()))
    images = randn(1, 3, 112, 112)
    assert_close(ours.forward_features(images), theirs.eval().forward_features(images), 1e-4)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.npz", "w.pt"])
def test_files_are_read_exactly_by_content_and_refused_when_cut_short(tmp_path, name):
    state = {"matrix": torch.arange(6.0).view(2, 3).half()}
    if name != "w.pt":  # the writer of these makes halves of all
        state |= {"flag": torch.tensor([True]), "scalar": torch.tensor(3), "none": ONES[:0]}
    path = write(tmp_path, state, name).rename(tmp_path / "weights")
    read = weights.read_tensors(path)
    assert same(read, state)  # torch.equal compares shapes, too
    assert all(read[key].dtype == value.dtype for key, value in state.items())
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
        torch.save([PLAIN, hostile], path, _use_new_zipfile_serialization=form == "zip")
    for read in (weights.read_tensors, weights.load_pretrained, official.load):
        with refused(path, word):
            read(path)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_numpy_scalars_among_metrics_are_admitted_in_both_spellings(tmp_path, module):
    path = tmp_path / "w.pth"
    held = {"a": ONES, "metrics": [np.float64(93.2), np.bool_(True), np.arange(3.0)]}
    torch.save(held, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core.")
    path.write_bytes(data.replace(b"cnumpy.core.", f"c{module}.".encode()))
    assert same(weights.read_tensors(path)["a"], ONES)


@pytest.mark.parametrize("file", ["net-{}.pth", "model.safetensors", "net-00000000.pth"])
@pytest.mark.parametrize("size", [None, 1000])
def test_a_name_is_downloaded_once_and_whole_or_not_at_all(tmp_path, monkeypatch, file, size):
    data = write(tmp_path, PLAIN, f"w{Path(file).suffix}").read_bytes()[:size]
    path = tmp_path / file.format(hashlib.sha256(data).hexdigest()[:8])
    path.write_bytes(data)
    monkeypatch.setitem(weights.PUBLISHED, "dino_vits16", path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cached = tmp_path / "hub/checkpoints" / path.name.replace("model", "dino_vits16")
    fails = size is not None or "0000" in file
    for _ in range(2):
        if fails:
            with refused("dino_vits16", cached, path.as_uri()):
                weights.load_pretrained("dino_vits16")
        else:
            state = weights.load_pretrained("dino_vits16", HEADS).state_dict()
            assert torch.equal(state["norm.bias"], PLAIN["norm.bias"])
        path.unlink(missing_ok=True)  # then the address holds nothing
    assert os.listdir(cached.parent) == ([] if fails else [cached.name])


QUERY = "encoder.layer.0.attention.self.query.bias"
JAX_QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"


UNFIT = [  # what a file holds, a change (None leaves the tensor out), words of the message
    ({"model": {"epoch": 3}}, {}, ["tensors"]),
    (PLAIN, {"fc_norm.weight": ONES}, ["nexpected key", "fc_norm.weight"]),
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
