"""Public weights of image and text Transformers: by name or from a file, in every common layout.

    backbone = weights.load_pretrained("vit_base_patch16_384")
    backbone = weights.load_pretrained("timm/vit_small_patch14_dinov2.lvd142m")
    backbone = weights.load_pretrained("clip/ViT-B-16.pt")

Nothing in a file runs. A key that the layout does not know is an error, and so is a missing one.
"""

import hashlib
import http.client
import json
import re
import shutil
import sys
import urllib.request
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import act
from util import files

AUGREG = (
    "https://storage.googleapis.com/vit_models/augreg/{}_16-i21k-300ep-lr_0.001-aug_{}-wd_{}"
    "-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_{}-res_{}.npz"
)
META = "https://dl.fbaipublicfiles.com/"
HUGGING_FACE = "https://huggingface.co/{}/resolve/main/model.safetensors"
PUBLISHED = {
    "vit_tiny_patch16_224": AUGREG.format("Ti", "none", "0.03", "0.03", 224),
    "vit_small_patch16_384": AUGREG.format("S", "light1", "0.03", "0.03", 384),
    "vit_base_patch16_384": AUGREG.format("B", "medium1", "0.1", "0.01", 384),
    "deit_tiny_patch16_224": META + "deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": META + "deit/deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": META + "deit/deit_base_patch16_224-b5f2ef4d.pth",
    "deit_base_distilled_patch16_384": META + "deit/deit_base_distilled_patch16_384-d0272ac0.pth",
    "dino_vits16": META + "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vitb16": META + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dinov2_vits14": META + "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": META + "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "mae_vit_base": META + "mae/pretrain/mae_pretrain_vit_base.pth",
    "clip_vit_b16": "https://openaipublic.azureedge.net/clip/models/"
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "bert_base": HUGGING_FACE.format("google-bert/bert-base-uncased"),
    "roberta_base": HUGGING_FACE.format("FacebookAI/roberta-base"),
    "minilm_l6": HUGGING_FACE.format("sentence-transformers/all-MiniLM-L6-v2"),
}
TIMM_NAME = re.compile(r"timm/[\w.-]+")  # published by timm
SHA256 = re.compile("[-/]([0-9a-f]{8,64})[./]")  # in an address: how the file's hash begins
# A CLIP has OpenAI's QuickGELU or plain GELU. OpenAI's archive holds these keys, other files are
# told apart by name, as in timm's notes. What timm itself tuned (openai_ft) is plain.
OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")
QUICK_GELU = "quick[-_]?gelu|openai(?!_ft)|metaclip_(400m|2pt5b)|dfn5b"
QUICK_GELU += "|b(ase_patch|[-_]?)32.*laion400m"
PLAIN_GELU = "laion|open[-_]?clip|datacomp|openai_ft"
CONFIG_TYPES = {"num_attention_heads": int, "hidden_size": int, "layer_norm_eps": float}


# -- Layouts --------------------------------------------------------------------------------------
# Name of a tensor, or of a module with all below it -> timm's; {}: a block. The nearest row counts.
def below(old: str, new: str, names: dict) -> dict:
    """The rows for what is below a module, called `old` in the file and `new` in timm."""
    return {f"{old}.{key}": f"{new}.{value}" for key, value in names.items()}


IN_PROJ = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias", "out_proj": "proj"}
QKV = {"query": "q", "key": "k", "value": "v"}
QKV_PROJ = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj"}
DENSE = {"attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1"}
DENSE |= {"output.dense": "mlp.fc2"}  # BERT's and the older ViT's
TIMM_NAMES = ("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.proj", "norm")
TIMM = {name: name for name in TIMM_NAMES}
TIMM |= {"norm_pre": "norm_pre", "register_tokens": "reg_token"}
TIMM_BLOCK = ("norm1", "attn.qkv", "attn.proj", "ls1", "norm2", "mlp.fc1", "mlp.fc2", "ls2")
TIMM |= below("blocks.{}", "blocks.{}", {name: name for name in TIMM_BLOCK})
TORCHVISION = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed"}
TORCHVISION |= {"conv_proj": "patch_embed.proj", "encoder.ln": "norm"}
TORCHVISION_BLOCK = {"ln_1": "norm1", "ln_2": "norm2", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
TORCHVISION_BLOCK |= {"mlp.linear_1": "mlp.fc1", "mlp.linear_2": "mlp.fc2"}  # the older spelling
TORCHVISION_BLOCK |= below("self_attention", "attn", IN_PROJ)
TORCHVISION |= below("encoder.layers.encoder_layer_{}", "blocks.{}", TORCHVISION_BLOCK)
CLIP = {"visual.class_embedding": "cls_token", "visual.positional_embedding": "pos_embed"}
CLIP |= {"visual.conv1": "patch_embed.proj", "visual.ln_pre": "norm_pre", "visual.ln_post": "norm"}
CLIP_BLOCK = {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
CLIP_BLOCK |= below("attn", "attn", IN_PROJ)
CLIP |= below("visual.transformer.resblocks.{}", "blocks.{}", CLIP_BLOCK)
JAX = {"cls": "cls_token", "Transformer.posembed_input.pos_embedding": "pos_embed"}
JAX |= {"embedding": "patch_embed.proj", "Transformer.encoder_norm": "norm"}
JAX_BLOCK = {"LayerNorm_0": "norm1", "LayerNorm_2": "norm2"}
JAX_BLOCK |= {"MlpBlock_3.Dense_0": "mlp.fc1", "MlpBlock_3.Dense_1": "mlp.fc2"}
JAX_BLOCK |= below("MultiHeadDotProductAttention_1", "attn", QKV | {"out": "proj"})
JAX |= below("Transformer.encoderblock_{}", "blocks.{}", JAX_BLOCK)
VIT = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"}
VIT |= {"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}
VIT_NORMS = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
OLDER_BLOCK = VIT_NORMS | DENSE | below("attention.attention", "attn", QKV)
NEWER_BLOCK = VIT_NORMS | {"mlp": "mlp"} | below("attention", "attn", QKV_PROJ)
VIT |= below("encoder.layer.{}", "blocks.{}", OLDER_BLOCK)
VIT |= below("layers.{}", "blocks.{}", NEWER_BLOCK)
BERT_BLOCK = {"attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2"}
BERT_BLOCK |= DENSE | below("attention.self", "attn", QKV)
BERT = below("encoder.layer.{}", "blocks.{}", BERT_BLOCK)
WRAPPINGS = ("model", "state_dict", "teacher", "base_model", "model_state_dict")
PREFIXES = re.compile(r"^(module\.|backbone\.|base_model\.|opt\.target\.)+")
TIMM_DROPPED = ("head.", "head_dist.", "pre_logits.", "dino_head.", "ibot_head.")
TIMM_DROPPED += ("fc_norm.", "attn_pool.")
MAE_DROPPED = ("mask_token", "decoder_")
CLIP_DROPPED = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")
CLIP_DROPPED += ("visual.proj", "text_projection", "logit_scale") + OPENAI_KEYS
VIT_DROPPED = ("embeddings.mask_token", "pooler.", "classifier.", "decoder.")
BERT_DROPPED = ("embeddings.", "pooler.", "cls.", "lm_head.", "classifier.", "qa_outputs.")
CLIP_KIND = {"eps": 1e-5, "norm_pre": True, "quick_gelu": True}
BERT_KIND = {"eps": 1e-12, "norm_first": False}


class Layout(NamedTuple):
    mark: str  # the tensor by whose name the layout is recognised
    names: dict  # old name -> new name
    dropped: tuple = ()  # how the names of tensors without use begin
    kind: dict = {}  # fields of act.BackboneConfig that are not as in timm's ViT


LAYOUTS = (
    Layout("blocks.0.norm1.weight", TIMM, TIMM_DROPPED + MAE_DROPPED),
    Layout("encoder.layers.encoder_layer_0.ln_1.weight", TORCHVISION, ("heads.",)),
    Layout("visual.transformer.resblocks.0.ln_1.weight", CLIP, CLIP_DROPPED, CLIP_KIND),
    Layout("Transformer.encoderblock_0.LayerNorm_0.scale", JAX, ("head.", "pre_logits.")),
    Layout("encoder.layer.0.layernorm_before.weight", VIT, VIT_DROPPED, {"eps": 1e-12}),
    Layout("layers.0.layernorm_before.weight", VIT, VIT_DROPPED, {"eps": 1e-12}),
    Layout("encoder.layer.0.output.LayerNorm.weight", BERT, BERT_DROPPED, BERT_KIND),
)


def find_layout(state: dict, layouts: tuple, path) -> Layout:
    """The first of the layouts whose mark is in the state dict, else UserError."""
    for layout in layouts:
        if layout.mark in state:
            return layout
    raise act.UserError(f"{path}: expected tensors of a known layout, got {list(state)[:3]}")


def rename(state: dict, names: dict, dropped: tuple, path) -> dict:
    """The state dict under new names, without what is dropped. UserError: unknown or doubled."""
    filled = {}  # the table with a row for each block; there are fewer blocks than tensors
    for number in range(len(state)):
        for old, new in names.items():
            filled[old.format(number)] = new.format(number)
    renamed = {}
    for key, value in state.items():
        if key.startswith(dropped):
            continue
        row = key
        while row not in filled and "." in row:
            row = row.rpartition(".")[0]
        if row not in filled:
            raise act.UserError(f"{path}: unexpected key {key}, it is not in this layout")
        new_key = filled[row] + key.removeprefix(row)
        if new_key in renamed:
            raise act.UserError(f"{path}: unexpected key {key}, there is another {new_key}")
        renamed[new_key] = value
    return renamed


# -- What a file holds ----------------------------------------------------------------------------
class Unread:
    """Stands for numpy's scalars and argparse's flags, neither of which runs."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


ADMITTED = [(Unread, "argparse.Namespace"), (Unread, "_codecs.encode")]
ADMITTED += [(Unread, "numpy.dtype"), (Unread, "numpy.ndarray"), (Unread, "pathlib.PosixPath")]
for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
    ADMITTED += [(Unread, f"{module}.scalar"), (Unread, f"{module}._reconstruct")]


@contextmanager
def parsing(path):
    """Around a call of a foreign parser: whatever it raises becomes a UserError."""
    try:
        yield
    except Exception as error:
        reason = str(error).rpartition("error: ")[2].strip().partition("\n")[0]
        if "GLOBAL " in str(error):  # torch.load names the code amid advice to run it
            name = str(error).partition("GLOBAL ")[2].partition(" ")[0]
            reason = f"code that would run: {name}"
        found = f"{type(error).__name__} {reason}"
        raise act.UserError(f"{path}: expected a readable weight file, got {found}") from error


def read_tensors(path):
    """What a .pth, .safetensors, .npz or TorchScript holds, by content; UserError for code."""
    with files.reading(path), open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # 8 bytes with a length, then a header in JSON
        safetensors = files.require("safetensors.torch", "safetensors")
        with parsing(path):
            return safetensors.load_file(path)
    if head.startswith(b"PK"):
        with parsing(path), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if all(name.endswith(".npy") for name in names):
            with parsing(path), np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(array) for name, array in arrays.items()}
        if any(name.endswith("/constants.pkl") for name in names):
            return read_torchscript(path)
    with parsing(path), torch.serialization.safe_globals(ADMITTED), open(path, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def read_torchscript(path) -> dict:
    """The tensors of an archive, refused if a __setstate__ would run as it loads."""
    with parsing(path), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():  # names may be there twice, torch ignores their case
            is_code = entry.filename.lower().endswith(".py")
            if is_code and b"__setstate__" in archive.read(entry):
                raise act.UserError("code that would run")
        return dict(torch.jit.load(str(path), map_location="cpu").state_dict())


def find_state_dict(obj, path) -> dict:
    """The tensors by name inside the usual wrappings, without their prefixes."""
    for key in WRAPPINGS:
        if isinstance(obj, dict) and isinstance(obj.get(key), dict):
            obj = obj[key]
    state = {}
    if isinstance(obj, dict):
        for key, value in obj.items():
            if isinstance(value, torch.Tensor):
                # A compiled module adds _orig_mod. in its place.
                name = str(key).replace("/", ".").replace("_orig_mod.", "")
                state[PREFIXES.sub("", name)] = value
    if not state:
        raise act.UserError(f"{path}: expected a state dict, got no tensors by name")
    return state


def tensor(state: dict, name: str, ndim: int, path) -> torch.Tensor:
    """The tensor of this name and number of dimensions, else UserError."""
    if name not in state:
        raise act.UserError(f"{path}: missing key {name}")
    if state[name].ndim != ndim:
        raise act.UserError(f"{path}: {name}: expected {ndim} dimensions, got {state[name].ndim}")
    return state[name]


def fuse_qkv(state: dict, path) -> dict:
    """The state dict with query, key and value fused to one matrix, as in timm."""
    fused = dict(state)
    for query in state:
        if ".attn.q." not in query:
            continue
        parts = []
        for letter in ("q", "k", "v"):
            name = query.replace(".attn.q.", f".attn.{letter}.")
            parts.append(tensor(state, name, state[query].ndim, path))
            del fused[name]
        try:
            fused[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        except RuntimeError as error:  # of shapes that do not go together
            raise act.UserError(f"{path}: {query} and its key and value: {error}") from error
    return fused


def from_jax(state: dict, path) -> dict:
    """From JAX's kernels (in, out), heads apart, or (H, W, in, out) to torch's order."""
    converted = {}
    for key, value in state.items():
        if key == "patch_embed.proj.kernel":
            value = tensor(state, key, 4, path).permute(3, 2, 0, 1)
        elif key.endswith(".kernel") and ".mlp." in key:
            value = tensor(state, key, 2, path).t()
        elif key.endswith(".attn.proj.kernel"):
            value = tensor(state, key, 3, path).flatten(0, 1).t()  # (heads, C / heads, out)
        elif key.endswith(".kernel"):
            value = tensor(state, key, 3, path).flatten(1).t()  # (in, heads, C / heads)
        elif key.endswith(".bias"):
            value = value.flatten()
        converted[key.replace(".kernel", ".weight").replace(".scale", ".weight")] = value
    return converted


# -- Backbones, by name or from a file -------------------------------------------------------------
def pretrained_names() -> dict[str, str]:
    """The names that load_pretrained knows, with the addresses of their files."""
    return dict(PUBLISHED)


def download(name: str) -> Path:
    """The published file in torch.hub's cache, fetched on first use; else UserError."""
    url = PUBLISHED.get(name)
    if url is None:  # timm's models with QuickGELU share the files of those without
        url = HUGGING_FACE.format(name.replace("_quickgelu", ""))
    file_name = url.rpartition("/")[2]
    if file_name == "model.safetensors":  # so many models call it
        file_name = f"{name}.safetensors"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if path.exists():
        return path
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(request, timeout=10) as response:
            print(f"downloading {url}", file=sys.stderr)
            with files.complete_file(path) as file:
                shutil.copyfileobj(response, file)
                file.flush()
                check_download(file.name, url)
    except (OSError, http.client.HTTPException, act.UserError) as error:
        message = f"{path}: expected the weights {name}, but {url} gave none ({error})"
        raise act.UserError(f"{message}; download that file by other means") from error
    return path


def check_download(path, url: str) -> None:
    """UserError for another hash than the address states, or no weight file."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    stated = SHA256.search(url)
    if stated and not digest.startswith(stated[1]):
        raise act.UserError(f"expected the hash {stated[1]}, got {digest}")
    read_tensors(path)


def load_pretrained(name_or_path, num_heads: int | None = None) -> act.Backbone:
    """A pretrained Backbone in eval mode, by a name of pretrained_names(), timm/NAME or a file.

    Layouts: timm / DeiT / MAE / DINO / DINOv2, torchvision, Hugging Face ViT, CLIP (visual), JAX
    AugReg .npz, BERT, RoBERTa. Heads: those of config.json beside the file, else `num_heads`, else
    those of the file (JAX), else by the width as in act.HEADS (BERT's 384: 12). A GELU by tanh
    (SigLIP so400m) becomes the exact one, which differs by less than 0.001.
    UserError for other files, or if nothing tells the heads or a CLIP's activation."""
    name = str(name_or_path)
    path = Path(name)
    if name in PUBLISHED or (TIMM_NAME.fullmatch(name) and not path.exists()):
        path = download(name)
    if not path.is_file():
        names = ", ".join(PUBLISHED)
        raise act.UserError(f"{path}: expected a file, timm/NAME or one of the names {names}")
    published = read_config(path)
    num_heads = published.get("num_attention_heads", num_heads)
    tensors = find_state_dict(read_tensors(path), path)
    state, config = translate(tensors, num_heads, path)
    config.eps = published.get("layer_norm_eps", config.eps)
    width = published.get("hidden_size", config.width)
    if width != config.width:
        raise act.UserError(f"{path}: config.json: expected width {config.width}, got {width}")
    is_openai = any(key in tensors for key in OPENAI_KEYS)
    if "hidden_act" in published:
        config.quick_gelu = published["hidden_act"] == "quick_gelu"
    elif config.norm_pre and not is_openai:
        config.quick_gelu = is_quick_by_name(path)
    return act.build_backbone(state, config, path)


def translate(state: dict, num_heads: int | None, path) -> tuple[dict, act.BackboneConfig]:
    """The state dict under timm's names and the config of its blocks. A CLIP has QuickGELU."""
    roberta = any(key.startswith("roberta.") for key in state)
    stripped = {}
    for key, value in state.items():
        key = re.sub(r"^(vit|bert|roberta)\.", "", key)
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight")  # as older files call them
        stripped[key.replace("LayerNorm.beta", "LayerNorm.bias")] = value
    layout = find_layout(stripped, LAYOUTS, path)
    state = rename(stripped, layout.names, layout.dropped, path)
    if layout.names is JAX:
        query = tensor(state, "blocks.0.attn.q.kernel", 3, path)  # (C, heads, C / heads)
        num_heads = num_heads or query.shape[1]
        state = from_jax(state, path)
    if layout.names is BERT and state["blocks.0.norm2.weight"].shape == (384,):
        num_heads = num_heads or 12  # MiniLM and its descendants
    state = fuse_qkv(state, path)
    config = replace(act.backbone_config(state, path, num_heads), **layout.kind)
    if "norm_pre.weight" in state:
        config = replace(config, **CLIP_KIND)
    positions = stripped.get("embeddings.position_embeddings.weight", torch.empty(0))
    if roberta or positions.shape[:1] == (514,):  # 512 and the 2 that RoBERTa adds
        config.eps = 1e-5
    return state, config


def is_quick_by_name(path: Path) -> bool:
    """Whether a CLIP has QuickGELU, by its file's name; else UserError."""
    name = path.name.lower()
    if re.search(QUICK_GELU, name):
        return True
    if re.search(PLAIN_GELU, name):
        return False
    wanted = "a config.json beside it with hidden_act quick_gelu (OpenAI) or gelu (OpenCLIP)"
    raise act.UserError(f"{path}: expected {wanted}, got a CLIP of neither name")


def read_config(path: Path) -> dict:
    """Hugging Face's config.json beside a weight file; {} if there is none."""
    beside = path.parent / "config.json"
    if not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a ValueError of the JSON or of the UTF-8
        raise act.UserError(f"{path}: config.json beside it is broken: {error}") from error
    if not isinstance(config, dict):
        raise act.UserError(f"{path}: config.json beside it: expected a dict, got {config!r}")
    if isinstance(config.get("vision_config"), dict):  # of a CLIP
        config = config["vision_config"]
    for key, kind in CONFIG_TYPES.items():
        if key in config and not isinstance(config[key], kind):
            raise act.UserError(f"{path}: config.json: expected {key} a {kind.__name__}")
    hidden_act = config.get("hidden_act", "gelu")
    if hidden_act not in ("gelu", "quick_gelu"):
        raise act.UserError(f"{path}: config.json: expected gelu or quick_gelu, got {hidden_act}")
    return config
