"""Tests of util/weights.py and act.load_pretrained: weights by name, from files of every layout."""

import hashlib
import json
import os
import zipfile
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import act
from common import Hostile, assert_close, randn, randomise, refused, same
from util import processes, weights

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


SIZES = act.BackboneConfig(W, 2, 6, 8, layer_scale=True, patch_size=4, grid=3, num_prefix=1)
ALL = randomise(act.Backbone(SIZES)).half().float().state_dict()  # exact in a file of halves
del ALL["prefix_tokens"]
for name, rows in (("cls_token", 1), ("dist_token", 1), ("reg_token", 4), ("pos_embed", 11)):
    ALL[name] = randn(1, rows, W).half().float()
PLAIN = {key: value for key, value in ALL.items() if "token" not in key and "gamma" not in key}
PLAIN |= {"cls_token": ALL["cls_token"], "pos_embed": ALL["pos_embed"][:, :10]}
BLOCKS = {key: value for key, value in PLAIN.items() if key.startswith("blocks.")}
PRE_NORM = PLAIN | {"norm_pre.weight": ALL["norm.bias"], "norm_pre.bias": torch.ones(W)}
del PRE_NORM["patch_embed.proj.bias"]
META = {key.replace("reg_token", "register_tokens"): value for key, value in ALL.items()}
DINO = renamed(ALL, TIMM, "module._orig_mod.backbone.", "head.bias mask_token decoder_norm.bias")
AXES = {1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (2, 3, 1, 0)}  # of torch, in JAX's order
JAX_FILE = {"opt/target/head/bias": np.ones(2)}
for key, value in renamed(PLAIN, JAX, "opt/target/").items():
    array = value.numpy().transpose(AXES[value.ndim])  # kernels are (in, out), four heads apart
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
TOKENS = [(9, "", 0), (10, "cls", 1), (11, "cls dist", 2), (9, "cls reg", 0), (10, "cls reg", 1)]
LOADERS = (weights.load_pretrained, act.load_pretrained, act.load)


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
    path = write(tmp_path, held, name).rename((tmp_path / name).with_suffix(""))
    model = weights.load_pretrained(path)
    expected = act.build_backbone(state, replace(act.backbone_config(state, ""), **kind), "")
    assert not model.training and model.config == expected.config
    assert same(model.state_dict(), expected.state_dict())
    path.write_bytes(path.read_bytes()[:-1000])
    for load in LOADERS:
        with refused(path):
            load(path)


@pytest.mark.parametrize("rows, words, positioned", TOKENS)  # rows for so many of the tokens
def test_tokens_get_their_positions(tmp_path, rows, words, positioned):
    pos = randn(1, rows, W)
    state = {"_orig_mod." + name: x for name, x in PLAIN.items() if name != "cls_token"}
    state |= {"_orig_mod.pos_embed": pos, "_orig_mod.head.weight": ONES}
    prefix = []
    for word in words.split():
        token = ALL[f"{word}_token"]
        state[f"_orig_mod.{word}_token"] = token
        prefix.append(token.expand(2, -1, -1))
    backbone = act.load_pretrained(write(tmp_path, {"model": state, "epoch": 3}))
    images = randn(2, 3, 12, 12)
    x = torch.cat(prefix + [backbone.patch_embed["proj"](images).flatten(2).mT], dim=1)
    x[:, :positioned] += pos[:, :positioned]
    x[:, -9:] += pos[:, -9:]
    assert_close(backbone.forward_features(images), backbone.forward_tokens(x))


def test_heads_come_from_config_json_then_the_argument_then_the_width(tmp_path):
    path = write(tmp_path, PRE_NORM, "laion.pth")
    assert weights.load_pretrained(path, num_heads=8).config.num_heads == 8
    said = {"num_attention_heads": 3, "layer_norm_eps": 1e-3, "hidden_act": "quick_gelu"}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": said}))
    config = weights.load_pretrained(path, num_heads=8).config
    assert (config.num_heads, config.eps, config.quick_gelu) == (3, 1e-3, True)
    for text in ("{", "[]", '{"hidden_act": 1}', '{"hidden_size": 7}'):
        (tmp_path / "config.json").write_text(text)
        with refused("config.json"):
            weights.load_pretrained(path)


CODE = Hostile("trace")
FLAGS = {"model": PLAIN, "args": Namespace(out=CODE)}
REFUSED = [  # a file, what it holds, words of the message
    ("w.pth", PRE_NORM, ["config.json", "quick_gelu"]),
    ("w.pth", PLAIN | {"rope.freqs": ONES}, ["nexpected key", "rope.freqs"]),
    ("w.pth", PLAIN | {"pos_embed": randn(1, 73, W)}, ["pos_embed", "square", 73]),
    ("w.pth", FLAGS, ["code that would run"]),
    ("w.old", FLAGS, ["code that would run"]),
    ("w.npz", {"cls": np.array([CODE, None], dtype=object)}, ["Object arrays"]),
    ("w.pt", PLAIN, ["code that would run"]),
]


@pytest.mark.parametrize("name, held, words", REFUSED)
def test_what_does_not_fit_is_named_and_no_code_runs(tmp_path, name, held, words):
    path = write(tmp_path, held, name)
    if name == "w.pt":  # such a method would run as the archive is loaded
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("weights/code/more.PY", "def __setstate__(self, state): pass")
    for load, said in zip(LOADERS, (words, [], []), strict=True):
        with refused(path, *said):
            load(path)
    assert os.listdir() == [name]  # where the code would make a folder


@pytest.mark.parametrize("name", ["dino_vits16", "timm/x_quickgelu"])
def test_a_name_is_downloaded_once_and_whole_or_not_at_all(tmp_path, monkeypatch, name):
    data = write(tmp_path, PLAIN).read_bytes()
    path = tmp_path / "timm/x/model.pth"  # of such a file the address holds no hash
    if name == "dino_vits16":
        path = path.with_name(f"w-{hashlib.sha256(data).hexdigest()[:8]}.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    monkeypatch.setitem(weights.PUBLISHED, "dino_vits16", path.as_uri())
    monkeypatch.setattr(weights, "HUGGING_FACE", f"{tmp_path.as_uri()}/{{}}/model.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cached = tmp_path / "hub/checkpoints" / path.name.replace("model", name)
    weights.load_pretrained(name)
    kept = cached.rename(tmp_path / "kept")
    path.write_bytes(data[:1000])
    with refused(name, cached, path.as_uri()):
        weights.load_pretrained(name)
    assert not os.listdir(cached.parent)  # process 0 downloads it while this one waits:
    monkeypatch.setattr(processes, "first_process", lambda: nullcontext(kept.rename(cached)))
    assert weights.load_pretrained(name).config.width == W
