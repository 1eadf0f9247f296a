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

# -- Official name -> our name --------------------------------------------------------------------
# As in util/weights.py: a row is a tensor, or a module with all of it.
STUDENT = {
    "ACT_encoder": "encoder",
    "ACT_encoder.encoder": "encoder.patch_embed",
    "ACT_encoder.blocks.blocks": "encoder.blocks",
    "ACT_decoder": "decoder",
    "decoder_pos_embed": "decoder_pos_embed",
    "mask_token": "mask_token",
    "proj_head": "head",
}
POINT_MAE = {old.replace("ACT", "MAE"): new for old, new in STUDENT.items()}
OTHER_HEADS = {"proj_head.0": "head", "increase_dim.0": "head"}
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
TEACHER = {name: name for name in SAME}
for layer in ("dgcnn_{}.layer1", "dgcnn_{}.layer2", "dgcnn_{}.layer3", "dgcnn_{}.layer4"):
    TEACHER |= below(layer, layer, {"0": "linear", "1": "norm"})

# A teacher's name of its trunk -> the name in the layout of that trunk.
VIT_TRUNK = {"visual_embed.0": "blocks", "visual_embed.1": "norm"}
CLIP_TRUNK = {"visual_embed.0": "visual.ln_pre", "visual_embed.2": "visual.ln_post"}
CLIP_TRUNK |= {"visual_embed.1": "visual.transformer.resblocks"}
TRUNKS = (
    ("visual_embed.0.0.norm1.weight", VIT_TRUNK),
    ("visual_embed.1.0.ln_1.weight", CLIP_TRUNK),
    ("visual_embed.0.layer.0.output.LayerNorm.weight", {"visual_embed.0.layer": "encoder.layer"}),
)


# -- Reading: official tensors -> state dict under our names, config ------------------------------
def load(path, device="cpu", **sizes) -> nn.Module:
    """The Teacher, Student, Classifier or Segmenter of an official checkpoint, in eval mode.

    The file is ACT's, Point-MAE's or from export(). Sizes that no tensor shows come from `sizes`,
    else they are the paper's: heads = width // 64 (of a Teacher as in act.HEADS), num_group 64
    (128 with a head of transfer), group_size 32. Point-MAE's missing class token is newly
    initialised with a warning. UserError for any other file."""
    obj = weights.read_tensors(path)
    state = weights.find_state_dict(obj)
    _, kind, read = weights.find_layout(state, KINDS, path)
    state, config = read(state, path, sizes.get("num_heads"))
    if isinstance(obj.get("config"), dict):  # of export()
        config = obj["config"]
    config = config | sizes
    if kind == "Teacher":
        config.pop("num_heads", None)  # They are its backbone's.
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


def rename(state: dict, names: dict, path, dropped: tuple = ()) -> dict:
    """The tensors under our names; 1 x 1 convolutions become matrices."""
    state = weights.rename(state, names, dropped, path)
    for key, value in state.items():
        if key.endswith(".weight") and value.ndim > 2:
            state[key] = value.flatten(1)
    return state


def count_blocks(state: dict, prefix: str) -> int:
    return sum(key.startswith(prefix) and key.endswith(".norm1.weight") for key in state)


def encoder_config(state: dict, path, num_heads: int | None) -> dict:
    width = len(tensor(state, "encoder.norm.weight", 1, path))
    patch_embed = tensor(state, "encoder.patch_embed.second_conv.3.weight", 2, path)
    depth = count_blocks(state, "encoder.blocks.")
    if num_heads is None:
        num_heads = max(1, width // 64)
    return dict(width=width, depth=depth, num_heads=num_heads, encoder_dims=len(patch_embed))


def read_student(state: dict, path, num_heads: int | None) -> tuple[dict, dict]:
    state = rename(state, STUDENT | POINT_MAE | OTHER_HEADS, path, STUDENT_DROPPED)
    config = encoder_config(state, path, num_heads)
    config["decoder_depth"] = count_blocks(state, "decoder.blocks.")
    config["target_dim"] = len(tensor(state, "head.weight", 2, path))
    if "encoder.cls_token" not in state:  # Point-MAE, which predicts points
        config["group_size"] = config["target_dim"] // 3
    return state, config


def read_classifier(state: dict, path, num_heads: int | None) -> tuple[dict, dict]:
    state = rename(state, CLASSIFIER, path)
    config = encoder_config(state, path, num_heads)
    config["head"] = "linear"
    last = "head.0.weight"
    if "head.8.weight" in state:
        config["head"] = "mlp3"
        last = "head.8.weight"
    config["num_classes"] = len(tensor(state, last, 2, path))
    return state, config


def read_segmenter(state: dict, path, num_heads: int | None) -> tuple[dict, dict]:
    # The names of the head end in _cls, but for older files.
    state = {key.replace("_cls.", "."): value for key, value in state.items()}
    state = rename(state, SEGMENTER, path)
    config = encoder_config(state, path, num_heads)
    config["num_parts"] = len(tensor(state, "head.7.weight", 2, path))
    config["num_categories"] = 0
    if "label_conv.0.weight" in state:
        config["num_categories"] = tensor(state, "label_conv.0.weight", 2, path).shape[1]
    return state, config


def read_teacher(state: dict, path, num_heads: int | None) -> tuple[dict, dict]:
    state = {key.removeprefix("dvae_tokenizer."): value for key, value in state.items()}
    trunk = {key: value for key, value in state.items() if key.startswith("visual_embed.")}
    _, names = weights.find_layout(trunk, TRUNKS, path)
    trunk = weights.rename(trunk, names, (), path)
    trunk, backbone = weights.translate(trunk, num_heads, path)
    state = rename(state, TEACHER, path, ("visual_embed.",))
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


KINDS = (  # A student's file can hold its teacher, so it is first.
    ("ACT_encoder.norm.weight", "Student", read_student),
    ("MAE_encoder.norm.weight", "Student", read_student),
    ("codebook", "Teacher", read_teacher),
    ("dvae_tokenizer.codebook", "Teacher", read_teacher),
    ("convs3_cls.weight", "Segmenter", read_segmenter),
    ("convs3.weight", "Segmenter", read_segmenter),
    ("cls_head_finetune.0.weight", "Classifier", read_classifier),
)


# -- Writing --------------------------------------------------------------------------------------
def export(student: act.Student, path) -> None:
    """Writes our Student as an official file, for the official fine-tuning scripts.

    Our config is in it, too: load() gives the same student back."""
    names = {our: official for official, our in STUDENT.items()}
    state = weights.rename(student.state_dict(), names, (), path)
    for key, value in state.items():
        if key.endswith(("_conv.0.weight", "_conv.3.weight")):
            value = value.unsqueeze(-1)  # of a 1 x 1 convolution
        state[key] = value.cpu()
    checkpoint = {"base_model": state, "config": asdict(student.config), "epoch": 0}
    act.save(checkpoint | {"metrics": {}, "best_metrics": {}}, path)
