"""Checkpoints of the official implementation of ACT and of Point-MAE, in and out.

student = official.load("act_pretrained.pth", num_group=64)
official.export(student, "for_the_official_scripts.pth")
"""

import warnings
from dataclasses import asdict
from pathlib import Path

import torch.nn as nn

import act
from util import weights
from util.weights import below, tensor

# Official name -> our name. As in util/weights.py: a row is a tensor, or a module with all of it.
STUDENT = {
    "ACT_encoder": "encoder",
    "ACT_encoder.encoder": "encoder.patch_embed",
    "ACT_encoder.blocks.blocks": "encoder.blocks",
    "ACT_decoder": "decoder",
    "decoder_pos_embed": "decoder_pos_embed",
    "mask_token": "mask_token",
    "proj_head": "head",
}
STUDENTS = STUDENT | {old.replace("ACT", "MAE"): new for old, new in STUDENT.items()}
STUDENTS |= {"proj_head.0": "head", "increase_dim.0": "head"}  # of other files
STUDENT_DROPPED = ("dvae_tokenizer.", "ACT_encoder.lm_head.", "ACT_encoder.cls_head.")

ENCODER = {"encoder": "encoder.patch_embed", "blocks.blocks": "encoder.blocks"}
for name in ("reduce_dim", "pos_embed", "cls_token", "cls_pos", "norm"):
    ENCODER[name] = f"encoder.{name}"
CLASSIFIER = ENCODER | {"cls_head_finetune": "head"}
SEGMENTER = ENCODER | {"label_conv": "label_conv"}
SEGMENTER |= below("propagation_0.mlp_convs", "propagation", {"0": "0", "1": "3"})
SEGMENTER |= below("propagation_0.mlp_bns", "propagation", {"0": "1", "1": "4"})
SEGMENTER |= {"convs1": "head.0", "convs2": "head.4", "convs3": "head.7"}
SEGMENTER |= {"bns1": "head.1", "bns2": "head.5"}

SAME = ("encoder", "codebook", "dgcnn_{}", "proj_pre", "proj_post", "visual_pos_embed", "decoder")
SAME += ("visual_prompt_token", "visual_prompt_pos", "deep_prompt_tokens", "deep_prompt_pos")
TEACHER = dict(zip(SAME, SAME, strict=True))
for layer in ("dgcnn_{}.layer1", "dgcnn_{}.layer2", "dgcnn_{}.layer3", "dgcnn_{}.layer4"):
    TEACHER |= below(layer, layer, {"0": "linear", "1": "norm"})

# A teacher's name of its trunk -> the name in the layout of that trunk.
CLIP_TRUNK = {"visual_embed.0": "visual.ln_pre", "visual_embed.2": "visual.ln_post"}
CLIP_TRUNK |= {"visual_embed.1": "visual.transformer.resblocks"}
TRUNKS = (
    ("visual_embed.0.0.norm1.weight", {"visual_embed.0": "blocks", "visual_embed.1": "norm"}),
    ("visual_embed.1.0.ln_1.weight", CLIP_TRUNK),
    ("visual_embed.0.layer.0.output.LayerNorm.weight", {"visual_embed.0.layer": "encoder.layer"}),
)
KINDS = (  # A student's file can hold its teacher, so it is first.
    ("ACT_encoder.norm.weight", "Student", STUDENTS, STUDENT_DROPPED),
    ("MAE_encoder.norm.weight", "Student", STUDENTS, STUDENT_DROPPED),
    ("codebook", "Teacher", None, None),  # see read_teacher
    ("dvae_tokenizer.codebook", "Teacher", None, None),
    ("convs3.weight", "Segmenter", SEGMENTER, ()),
    ("cls_head_finetune.0.weight", "Classifier", CLASSIFIER, ()),
)


def load(path, device="cpu", **sizes) -> nn.Module:
    """The Teacher, Student, Classifier or Segmenter of an official checkpoint, in eval mode.

    The file is ACT's, Point-MAE's or from export(). Sizes that no tensor shows come from `sizes`,
    else they are the paper's: heads = width // 64 (of a Teacher as in act.HEADS), num_group 64
    (128 with a head of transfer), group_size 32. Point-MAE's missing class token is newly
    initialised with a warning. UserError for any other file."""
    obj = weights.read_tensors(path)
    state = weights.find_state_dict(obj)  # newer Segmenters' heads end in _cls
    state = {key.replace("_cls.", "."): value for key, value in state.items()}
    _, kind, names, dropped = weights.find_layout(state, KINDS, path)
    num_heads = sizes.get("num_heads")
    if kind == "Teacher":
        state, config = read_teacher(state, path, num_heads)
        sizes.pop("num_heads", None)  # They are its backbone's.
    else:
        state = rename(state, names, dropped, path)
        config = read_sizes(kind, state, path, num_heads)
    if isinstance(obj.get("config"), dict):  # of export()
        config = obj["config"]
    config = config | sizes
    model_class, config_class = act.KINDS[kind]
    try:
        model = model_class(config_class(**config))
    except (TypeError, ValueError, RuntimeError) as error:
        raise act.UserError(f"{path}: its sizes make no {kind}: {error}") from error
    if kind == "Student" and "encoder.cls_token" not in state:
        warnings.warn(f"{path}: no class token; it is newly initialised", stacklevel=2)
        state["encoder.cls_token"] = model.encoder.cls_token.detach()
        state["encoder.cls_pos"] = model.encoder.cls_pos.detach()
    return act.load_exactly(model, state, path).to(device).eval()


def rename(state: dict, names: dict, dropped: tuple, path) -> dict:
    """The tensors under our names; 1 x 1 convolutions become matrices."""
    state = weights.rename(state, names, dropped, path)
    for key, value in state.items():
        if key.endswith(".weight") and value.ndim > 2:
            state[key] = value.flatten(1)
    return state


def read_sizes(kind: str, state: dict, path, num_heads: int | None) -> dict:
    """The config of a Student, Classifier or Segmenter, of tensors under our names."""

    def size(name, axis=0):
        return tensor(state, name, 2, path).shape[axis]

    width = len(tensor(state, "encoder.norm.weight", 1, path))
    blocks = [key for key in state if key.endswith(".norm1.weight")]
    config = {"width": width, "depth": sum(key.startswith("encoder.") for key in blocks)}
    config["num_heads"] = num_heads or max(1, width // 64)
    config["encoder_dims"] = size("encoder.patch_embed.second_conv.3.weight")
    if kind == "Student":
        config["decoder_depth"] = len(blocks) - config["depth"]
        config["target_dim"] = size("head.weight")
        if "encoder.cls_token" not in state:  # Point-MAE, which predicts points
            config["group_size"] = config["target_dim"] // 3
    elif kind == "Segmenter":
        config["num_parts"] = size("head.7.weight")
        config["num_categories"] = 0
        if "label_conv.0.weight" in state:
            config["num_categories"] = size("label_conv.0.weight", axis=1)
    elif "head.8.weight" in state:
        config |= {"head": "mlp3", "num_classes": size("head.8.weight")}
    else:
        config |= {"head": "linear", "num_classes": size("head.0.weight")}
    return config


def read_teacher(state: dict, path, num_heads: int | None) -> tuple[dict, dict]:
    state = {key.removeprefix("dvae_tokenizer."): value for key, value in state.items()}
    trunk = {key: value for key, value in state.items() if key.startswith("visual_embed.")}
    _, names = weights.find_layout(trunk, TRUNKS, path)
    trunk = weights.rename(trunk, names, (), path)
    trunk, backbone = weights.translate(trunk, num_heads, path)
    state = rename(state, TEACHER, ("visual_embed.",), path)
    config = {"backbone": backbone, "weights": Path(path).name, "prompt": "none", "num_prompt": 0}
    if "visual_prompt_token" in state:
        config["prompt"] = "shallow"
        config["num_prompt"] = tensor(state, "visual_prompt_token", 3, path).shape[1]
    if "deep_prompt_tokens" in state:
        config["prompt"] = "deep"
    config["num_tokens"], config["tokens_dims"] = tensor(state, "codebook", 2, path).shape
    last = tensor(state, "decoder.mlp.4.weight", 2, path)
    config["group_size"] = len(last) * 4 // 3  # its rows are (S / 4, 3)
    config["encoder_dims"] = len(tensor(state, "encoder.second_conv.3.weight", 2, path))
    config["decoder_dims"] = len(tensor(state, "dgcnn_2.layer5.0.weight", 2, path))
    return state | {f"backbone.{key}": value for key, value in trunk.items()}, config


def export(student: act.Student, path) -> None:
    """Writes our Student as an official file, for the official fine-tuning scripts.

    Our config is in it, too: load() gives the same student back."""
    names = dict(zip(STUDENT.values(), STUDENT.keys(), strict=True))
    state = weights.rename(student.state_dict(), names, (), path)
    for key, value in state.items():
        if key.endswith(("_conv.0.weight", "_conv.3.weight")):
            value = value.unsqueeze(-1)  # of a 1 x 1 convolution
        state[key] = value.cpu()
    checkpoint = {"base_model": state, "config": asdict(student.config), "epoch": 0}
    act.save(checkpoint | {"metrics": {}, "best_metrics": {}}, path)
