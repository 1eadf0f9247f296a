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
from common import Hostile, assert_close, randn, refused, same
from util import weights

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
W = 384  # Two blocks, images of 3 x 3 patches of 4 x 4 pixels.
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


def renamed(state, names, prefix="", strays=""):
    """The file's tensors; query, key and value are apart where there is no name for all three."""
    words = dict(zip(TIMM.split(), names.split(), strict=True))
    out = dict.fromkeys(strays.split(), ONES)  # Nobody needs them here.
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


def bert_file(prefix="", positions=512):
    state = renamed(BLOCKS, BERT, prefix, "lm_head.dense.weight cls.predictions.bias")
    return state | {f"{prefix}embeddings.position_embeddings.weight": torch.ones(positions, W)}


VIT_S = act.Backbone(act.BackboneConfig(W, 2, 6, 8, layer_scale=True)).state_dict()
SHAPES = {name: value.shape for name, value in VIT_S.items()}
SHAPES |= {"patch_embed.proj.weight": (W, 3, 4, 4), "patch_embed.proj.bias": (W,)}
SHAPES |= {"cls_token": (1, 1, W), "dist_token": (1, 1, W), "reg_token": (1, 4, W)}
SHAPES |= {"pos_embed": (1, 11, W)}
torch.manual_seed(0)  # Values that are exact in a file of halves.
ALL = {name: torch.randn(shape).half().float() for name, shape in SHAPES.items()}
PLAIN = {key: value for key, value in ALL.items() if "token" not in key and "gamma" not in key}
PLAIN |= {"cls_token": ALL["cls_token"], "pos_embed": ALL["pos_embed"][:, :10]}
BLOCKS = {key: value for key, value in PLAIN.items() if key.startswith("blocks.")}
PRE_NORM = PLAIN | {"norm_pre.weight": ALL["norm.bias"], "norm_pre.bias": torch.ones(W)}
del PRE_NORM["patch_embed.proj.bias"]
META = {key.replace("reg_token", "register_tokens"): value for key, value in ALL.items()}
DINO = renamed(ALL, TIMM, "module._orig_mod.backbone.", "head.bias mask_token decoder_norm.bias")
AXES = {1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (2, 3, 1, 0)}  # of torch, in JAX's order
JAX_FILE = {"opt/target/head/bias": np.ones(2)}  # its kernels are (in, out), four heads apart
for key, value in renamed(PLAIN, JAX, "opt/target/").items():
    array = value.numpy().transpose(AXES[value.ndim])
    if key.endswith("/out.weight"):
        array = array.reshape(4, -1, W)
    elif "Attention" in key and "/out." not in key:
        array = array.reshape(*array.shape[:-1], 4, -1)
    leaf = "scale" if array.ndim == 1 else "kernel"
    JAX_FILE[key.replace("weight", leaf).replace(".", "/")] = array
OLDER_BERT = {}  # with other names of a LayerNorm's tensors
for key, value in bert_file("bert.").items():
    OLDER_BERT[key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")] = value
ARGS = {"args": Namespace(lr=0.1, out=Path("runs")), "best": [np.float64(93.2), np.arange(3.0)]}
GELU = {"eps": 1e-5, "norm_pre": True}
QUICK = GELU | {"quick_gelu": True}
BERT_KIND = {"eps": 1e-12, "norm_first": False, "num_heads": 12}
LAYOUTS = [  # a file, what it holds, these weights under timm's names, config that is not timm's
    ("DINO.pth", {"student": {}, "teacher": DINO}, ALL, {}),
    ("registers.safetensors", META, ALL, {}),
    ("numpy_1.old", ARGS | {"model": PLAIN}, PLAIN, {}),
    ("torchvision.pth", renamed(PLAIN, TORCHVISION, "", "heads.head.bias"), PLAIN, {}),
    ("vit.pth", renamed(PLAIN, VIT, "", "pooler.dense.bias"), PLAIN, {"eps": 1e-12}),
    ("newer_vit.pth", renamed(PLAIN, NEWER_VIT, "vit."), PLAIN, {"eps": 1e-12}),
    ("archive.pt", renamed(PRE_NORM, CLIP, "", "vocab_size visual.proj"), PRE_NORM, QUICK),
    ("openai.pth", renamed(PRE_NORM, CLIP), PRE_NORM, QUICK),
    ("open_clip.pth", renamed(PRE_NORM, CLIP), PRE_NORM, GELU),
    ("vit_base_patch32_clip_224.laion400m.pth", PRE_NORM, PRE_NORM, QUICK),
    ("vit_base_patch16_clip_224.openai_ft.pth", PRE_NORM, PRE_NORM, GELU),
    ("jax.npz", JAX_FILE, PLAIN, {"num_heads": 4}),
    ("bert.pth", OLDER_BERT, BLOCKS, BERT_KIND),
    ("roberta.pth", bert_file("roberta."), BLOCKS, BERT_KIND | {"eps": 1e-5}),
    ("positions.pth", bert_file(positions=514), BLOCKS, BERT_KIND | {"eps": 1e-5}),
]


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
        torch.save(held, path, _use_new_zipfile_serialization=path.suffix != ".old")
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
    return path


@pytest.mark.parametrize("name, held, state, kind", LAYOUTS)
def test_every_layout_loads_and_is_refused_cut_short(tmp_path, name, held, state, kind):
    path = write(tmp_path, held, name)
    path = path.rename(path.with_suffix(""))
    model = weights.load_pretrained(path)
    expected = act.build_backbone(state, replace(act.backbone_config(state, ""), **kind), "")
    assert not model.training and model.config == expected.config
    assert same(model.state_dict(), expected.state_dict())
    path.write_bytes(path.read_bytes()[:-1000])
    with refused(path):
        weights.load_pretrained(path)


def test_images_become_tokens_by_a_convolution(tmp_path):
    model = weights.load_pretrained(write(tmp_path, PLAIN))
    images = randn(2, 3, 12, 12, seed=7)
    x = F.conv2d(images, PLAIN["patch_embed.proj.weight"], PLAIN["patch_embed.proj.bias"], stride=4)
    x = torch.cat([PLAIN["cls_token"].expand(2, -1, -1), x.flatten(2).mT], dim=1)
    assert_close(model.forward_features(images), model.forward_tokens(x + PLAIN["pos_embed"]))


def test_heads_come_from_config_json_then_the_argument_then_the_width(tmp_path):
    path = write(tmp_path, PRE_NORM, "laion.pth")
    assert weights.load_pretrained(path, num_heads=8).config.num_heads == 8
    said = {"num_attention_heads": 3, "layer_norm_eps": 1e-3, "hidden_act": "quick_gelu"}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": said}))
    config = weights.load_pretrained(path, num_heads=8).config
    assert (config.num_heads, config.eps, config.quick_gelu) == (3, 1e-3, True)
    for text in ("{", "[]", '{"hidden_act": 1}', '{"hidden_size": 7}', '{"layer_norm_eps": ""}'):
        (tmp_path / "config.json").write_text(text)
        with refused(path, "config.json"):
            weights.load_pretrained(path)


@pytest.mark.parametrize("name", ["w.pth", "w.old", "w.npz", "w.pt"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, name):
    hostile = Hostile(tmp_path / "trace")
    held = {"w.pt": PLAIN, "w.npz": {"cls": np.array([hostile, None], dtype=object)}}
    path = write(tmp_path, held.get(name, {"model": PLAIN, "args": Namespace(out=hostile)}), name)
    if name == "w.pt":  # such a method would run as the archive is loaded
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("weights/code/more.PY", "def __setstate__(self, state): pass")
    with refused(path):
        weights.load_pretrained(path)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("file", ["a-{}.pth", "cut-{}.pth", "a-00000000.pth", "timm/x/model.pth"])
def test_a_name_is_downloaded_once_and_whole_or_not_at_all(tmp_path, monkeypatch, file):
    name = "timm/x_quickgelu" if "timm" in file else "dino_vits16"
    size = 1000 if "cut" in file else None
    data = write(tmp_path, PLAIN).read_bytes()[:size]
    path = tmp_path / file.format(hashlib.sha256(data).hexdigest()[:8])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    monkeypatch.setitem(weights.PUBLISHED, "dino_vits16", path.as_uri())
    monkeypatch.setattr(weights, "HUGGING_FACE", f"{tmp_path.as_uri()}/{{}}/model.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cached = tmp_path / "hub/checkpoints" / path.name.replace("model", name)
    if size or "0000" in file:
        with refused(name, cached, path.as_uri()):
            weights.load_pretrained(name)
        assert not os.listdir(cached.parent)
    else:
        weights.load_pretrained(name)
        path.unlink()  # Then the address holds nothing.
        assert weights.load_pretrained(name).config.width == W


QUERY = "encoder.layer.0.attention.self.query.bias"
UNFIT = [  # what a file holds, a change (None leaves the tensor out), words of the message
    ({"model": {"epoch": 3}}, {}, ["tensors"]),
    (PRE_NORM, {}, ["config.json", "quick_gelu"]),
    (PLAIN, {"rope.freqs": ONES}, ["rope.freqs"]),
    (bert_file(), {QUERY: None}, ["nexpected key", "blocks.0.attn.k.bias"]),
    (bert_file(), {QUERY: torch.ones(2, 2)}, ["blocks.0.attn.k.bias", 2]),
]


@pytest.mark.parametrize("held, change, words", UNFIT)
def test_tensors_that_do_not_fit_are_named(tmp_path, held, change, words):
    held = {key: value for key, value in (held | change).items() if value is not None}
    path = write(tmp_path, held)
    with refused(path, *words):
        weights.load_pretrained(path)
    with refused("absent", "minilm_l6"):
        weights.load_pretrained("absent")
