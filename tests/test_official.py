"""Tests of util/official.py: checkpoints of the official ACT and of Point-MAE, in and out."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from common import make, make_teacher, moved, refused, same
from util import official

PATCHES = "encoder.patch_embed.=encoder. encoder.blocks.=blocks.blocks. encoder.= "
SEGMENTER = """label_conv.=label_conv_cls. propagation.0.=propagation_0_cls.mlp_convs.0.
    propagation.1.=propagation_0_cls.mlp_bns.0. propagation.3.=propagation_0_cls.mlp_convs.1.
    propagation.4.=propagation_0_cls.mlp_bns.1. head.0.=convs1_cls. head.1.=bns1_cls.
    head.4.=convs2_cls. head.5.=bns2_cls. head.7.=convs3_cls."""
NAMES = {  # parts of our names = parts of the official ones
    "Student": """encoder.patch_embed.=ACT_encoder.encoder. decoder.=ACT_decoder. head.=proj_head.
        encoder.blocks.=ACT_encoder.blocks.blocks. encoder.=ACT_encoder.""",
    "Classifier": PATCHES + "head.=cls_head_finetune.",
    "Segmenter": PATCHES + SEGMENTER,
    "ViT": "backbone.blocks=visual_embed.0 backbone.norm=visual_embed.1",
    "CLIP": """backbone.norm_pre=visual_embed.0 backbone.blocks=visual_embed.1 fc1=c_fc fc2=c_proj
        backbone.norm=visual_embed.2 norm1=ln_1 norm2=ln_2 .proj=.out_proj .qkv.=.in_proj_""",
    "BERT": """backbone.blocks=visual_embed.0.layer mlp.fc2=output.dense
        norm1=attention.output.LayerNorm norm2=output.LayerNorm mlp.fc1=intermediate.dense
        attn.proj=attention.output.dense attn.=attention.self.""",
}


def official_state(model, names):
    """With 1 x 1 convolutions, and a BERT's query, key and value apart."""
    pairs = f"{NAMES[names]} .linear.=.0. .norm.=.1."  # of edges
    table = dict(pair.split("=") for pair in pairs.split())
    state = {}
    for key, value in model.state_dict().items():
        name = re.sub("|".join(map(re.escape, table)), lambda part: table[part[0]], key)
        if value.ndim == 2 and re.search("dgcnn|_conv|convs", name):
            value = value[:, :, None]
        if ".linear." in key:
            value = value[..., None]
        state[name] = value
        if names == "BERT" and ".qkv." in name:
            for word, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[name.replace("qkv", word)] = part
            del state[name]
    return state


def publish(folder, state, key="base_model", prefix="module."):
    state = {prefix + name: value for name, value in state.items()}
    torch.save({key: state, "epoch": 3, "metrics": {"acc": np.float64(93.2)}}, folder / "w.pth")
    return folder / "w.pth"


OPTIONS = [  # a model, the paper's patches, other options, a part of the names, other files' part
    ("Student", 64, {"encoder_dims": 12, "decoder_depth": 1}, "proj_head.", "proj_head.0."),
    ("Classifier", 128, {"head": "mlp3"}, "", ""),
    ("Classifier", 128, {"head": "linear"}, "", ""),
    ("Segmenter", 128, {"num_categories": 16}, "", ""),
    ("Segmenter", 128, {"num_categories": 0}, "_cls.", "."),
]


@pytest.mark.parametrize("kind, num_group, options, part, other", OPTIONS)
def test_official_models_are_read(tmp_path, kind, num_group, options, part, other):
    model = make(kind, **options)
    state = {name.replace(part, other): x for name, x in official_state(model, kind).items()}
    if kind == "Student":  # Its file holds more.
        state["dvae_tokenizer.codebook"] = torch.ones(2)
        state["ACT_encoder.lm_head.bias"] = torch.ones(2)
    path = publish(tmp_path, state)
    loaded = official.load(path, num_group=10, group_size=8, num_heads=3, drop_path=0.0)
    assert loaded.config == model.config and not loaded.training
    assert not moved(model, loaded)
    config = official.load(path).config
    assert (config.num_group, config.group_size, config.num_heads) == (num_group, 32, 1)


@pytest.mark.parametrize("trunk", ["ViT", "CLIP", "BERT"])
@pytest.mark.parametrize("prompt, num_prompt", [("deep", 3), ("shallow", 3), ("none", 0)])
def test_official_teachers_are_read(tmp_path, trunk, prompt, num_prompt):
    model = make_teacher(trunk, prompt=prompt, num_prompt=num_prompt)
    prefix = "module.dvae_tokenizer." if prompt == "shallow" else "module."
    path = publish(tmp_path, official_state(model, trunk), prefix=prefix)
    with refused(path, "num_heads", 18):
        official.load(path)
    loaded = official.load(path, num_group=10, num_heads=2, prompt_dropout=0.5)
    assert not moved(model, loaded) and loaded.config == replace(model.config, weights="w.pth")


def test_point_mae_students_get_a_new_class_token_with_a_warning(tmp_path):
    model = make("Student", target_dim=3 * 8)
    state = {}
    for name, value in official_state(model, "Student").items():
        if "cls" not in name:
            state[name.replace("ACT", "MAE").replace("proj_head", "increase_dim.0")] = value
    state["increase_dim.0.weight"] = state["increase_dim.0.weight"][..., None]
    path = publish(tmp_path, state, "model_state_dict", "base_model.")
    with pytest.warns(UserWarning, match="class token"):  # the head tells the group size
        loaded = official.load(path, num_group=10, num_heads=3, drop_path=0.0)
    assert moved(model, loaded) == {"encoder.cls_token", "encoder.cls_pos"}
    assert loaded.config == model.config and loaded.encoder.cls_token.any()


def test_export_writes_official_names_that_load_reads(tmp_path):
    model = make("Student", num_group=32, points=500, drop_path=0.1)
    official.export(model, tmp_path / "w.pth")
    file = torch.load(tmp_path / "w.pth", weights_only=True)
    assert list(file) == ["base_model", "config", "epoch", "metrics", "best_metrics"]
    assert same(file["base_model"], official_state(model, "Student"))
    loaded = official.load(tmp_path / "w.pth")
    assert not moved(model, loaded) and loaded.config == model.config
