"""Tests of util/official.py: checkpoints of the official ACT and of Point-MAE, in and out."""

import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

from common import make, make_teacher, moved, refused, same
from util import official

HIDDEN = {"num_group": 10, "group_size": 8, "num_heads": 3, "drop_path": 0.0}  # no tensor shows it
STUDENT = """encoder.patch_embed.=ACT_encoder.encoder. encoder.blocks.=ACT_encoder.blocks.blocks.
    encoder.=ACT_encoder. decoder.=ACT_decoder. head.=proj_head."""
PATCHES = "encoder.patch_embed.=encoder. encoder.blocks.=blocks.blocks. encoder.= "
SEGMENTER = """label_conv.=label_conv_cls. propagation.0.=propagation_0_cls.mlp_convs.0.
    propagation.1.=propagation_0_cls.mlp_bns.0. propagation.3.=propagation_0_cls.mlp_convs.1.
    propagation.4.=propagation_0_cls.mlp_bns.1. head.0.=convs1_cls. head.1.=bns1_cls.
    head.4.=convs2_cls. head.5.=bns2_cls. head.7.=convs3_cls."""
VIT = "backbone.blocks.=visual_embed.0. backbone.norm.=visual_embed.1. .linear.=.0. .norm.=.1."
NAMES = {  # parts of our names = parts of the official ones
    "Student": STUDENT,
    "Student of two layers": STUDENT.replace("=proj_head.", "=proj_head.0."),
    "Student of Point-MAE": STUDENT.replace("ACT", "MAE").replace("proj_head.", "increase_dim.0."),
    "Classifier": PATCHES + "head.=cls_head_finetune.",
    "Segmenter": PATCHES + SEGMENTER,
    "Segmenter of older files": PATCHES + SEGMENTER.replace("_cls.", "."),
    "ViT": VIT,
    "DINOv2": VIT,
    "CLIP": """backbone.norm_pre.=visual_embed.0. backbone.blocks.=visual_embed.1. norm1=ln_1
        backbone.norm.=visual_embed.2. .linear.=.0. .norm.=.1. norm2=ln_2 attn.proj=attn.out_proj
        attn.qkv.=attn.in_proj_ mlp.fc1=mlp.c_fc mlp.fc2=mlp.c_proj""",
    "BERT": """backbone.blocks.=visual_embed.0.layer. .linear.=.0. .norm.=.1. mlp.fc2=output.dense
        norm1=attention.output.LayerNorm norm2=output.LayerNorm mlp.fc1=intermediate.dense
        attn.proj=attention.output.dense attn.=attention.self.""",
}


def official_state(model, names):
    """A model's tensors under the official names, of the form of 1 x 1 convolutions where those
    are: (out, in, 1), and (out, in, 1, 1) of edges. BERT has query, key and value apart."""
    table = dict(pair.split("=") for pair in NAMES[names].split())
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
    """The file as the official implementation writes it, numpy's scalars among the metrics."""
    state = {prefix + name: value for name, value in state.items() if value is not None}
    torch.save({key: state, "epoch": 3, "metrics": {"acc": np.float64(93.2)}}, folder / "w.pth")
    return folder / "w.pth"


def assert_same(model, loaded, **changes):
    assert not loaded.training
    assert not moved(model, loaded)
    assert asdict(loaded.config) == asdict(model.config) | changes


@pytest.mark.parametrize(
    "names, options",
    [
        ("Student", {"encoder_dims": 12}),
        ("Student of two layers", {"decoder_depth": 1}),
        ("Classifier", {"head": "mlp3"}),
        ("Classifier", {"head": "linear"}),
        ("Segmenter", {"num_categories": 16}),
        ("Segmenter of older files", {"num_categories": 0}),
    ],
)
def test_official_models_are_read(tmp_path, names, options):
    model = make(names.split()[0], **options)
    state = official_state(model, names)
    if "Student" in names:  # Its file holds more than the student.
        state["dvae_tokenizer.codebook"] = torch.ones(2)
        state["ACT_encoder.lm_head.bias"] = torch.ones(2)
    assert_same(model, official.load(publish(tmp_path, state), **HIDDEN))


@pytest.mark.parametrize("trunk", ["ViT", "CLIP", "BERT", "DINOv2"])
@pytest.mark.parametrize("prompt, num_prompt", [("deep", 3), ("shallow", 3), ("none", 0)])
def test_official_teachers_are_read(tmp_path, trunk, prompt, num_prompt):
    model = make_teacher(trunk, prompt=prompt, num_prompt=num_prompt)
    prefix = "module.dvae_tokenizer." if prompt == "shallow" else "module."
    path = publish(tmp_path, official_state(model, trunk), prefix=prefix)
    loaded = official.load(path, num_group=10, num_heads=2, prompt_dropout=0.5)
    assert_same(model, loaded, weights="w.pth")


@pytest.mark.parametrize("kind, num_group", [("Student", 64), ("Classifier", 128)])
def test_sizes_that_nobody_gives_are_the_papers(tmp_path, kind, num_group):
    config = official.load(publish(tmp_path, official_state(make(kind), kind))).config
    found = (config.num_group, config.group_size, config.points, config.num_heads)
    assert found == (num_group, 32, 16 * num_group, 1)


def test_point_mae_students_get_a_new_class_token_with_a_warning(tmp_path):
    model = make("Student", target_dim=3 * 8)
    state = official_state(model, "Student of Point-MAE")
    state |= {"MAE_encoder.cls_token": None, "MAE_encoder.cls_pos": None}
    state["increase_dim.0.weight"] = state["increase_dim.0.weight"][..., None]
    with pytest.warns(UserWarning, match="class token"):  # the head tells the group size
        path = publish(tmp_path, state, "model_state_dict", "base_model.")
        loaded = official.load(path, num_group=10, num_heads=3, drop_path=0.0)
    for name in ("cls_token", "cls_pos"):
        assert getattr(loaded.encoder, name).any()
        getattr(model.encoder, name).data = getattr(loaded.encoder, name).data
    assert_same(model, loaded)


def test_export_writes_official_names_and_load_gives_the_student_back(tmp_path):
    model = make("Student", num_group=32, points=500, drop_path=0.1)
    path = tmp_path / "out.pth"
    official.export(model, path)
    file = torch.load(path, weights_only=True)
    assert {"base_model", "epoch", "metrics", "best_metrics"} <= set(file)
    assert same(file["base_model"], official_state(model, "Student"))
    assert_same(model, official.load(path))


@pytest.mark.parametrize(
    "kind, change, sizes, words",  # change: the tensor is replaced or, if None, left out
    [
        ("Student", {"ACT_encoder.gate": torch.ones(2)}, {}, ["nexpected key", "encoder.gate"]),
        ("Classifier", {"cls_token": None}, {}, ["issing key", "encoder.cls_token"]),
        ("Classifier", {"cls_head_finetune.0.weight": None}, {}, ["official checkpoint"]),
        ("ViT", {}, {}, ["num_heads", 18]),
        ("ViT", {"codebook": torch.tensor(1.0)}, {"num_heads": 2}, ["codebook", 2]),
        ("ViT", {"visual_embed.0.0.attn.qkv.weight": None}, {}, ["blocks.0.attn.qkv.weight"]),
        ("Student", {}, {"num_heads": 5}, [5, 12]),
        ("Student", {}, {"wide": 3}, ["wide"]),
    ],
)
def test_tensors_and_sizes_that_do_not_fit_are_named(tmp_path, kind, change, sizes, words):
    model = make_teacher() if kind == "ViT" else make(kind)
    path = publish(tmp_path, official_state(model, kind) | change)
    with refused(path, *words):
        official.load(path, **sizes)
