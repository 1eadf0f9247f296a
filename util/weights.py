"""Public weights of image and text Transformers: by name or from a file, in every layout.

    backbone = weights.load_pretrained("vit_base_patch16_384")
    backbone = weights.load_pretrained("timm/vit_small_patch14_dinov2.lvd142m")
    backbone = weights.load_pretrained("clip/ViT-B-16.pt")

Nothing in a file runs. Unknown and missing keys are errors.
"""

import hashlib
import http.client
import json
import re
import sys
import urllib.request
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import act
from util import files, processes

AUGREG = "https://storage.googleapis.com/vit_models/augreg/{}_16-i21k-300ep-lr_0.001-aug_{}"
AUGREG += "-wd_{}-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_{}-res_{}.npz"
META = "https://dl.fbaipublicfiles.com/"
DEIT = META + "deit/deit_{}.pth"
DINO = META + "dino/dino_{0}_pretrain/dino_{0}_pretrain.pth"
DINOV2 = META + "dinov2/dinov2_vit{0}14/dinov2_vit{0}14_pretrain.pth"
HUGGING_FACE = "https://huggingface.co/{}/resolve/main/model.safetensors"
PUBLISHED = {
    "vit_tiny_patch16_224": AUGREG.format("Ti", "none", "0.03", "0.03", 224),
    "vit_small_patch16_384": AUGREG.format("S", "light1", "0.03", "0.03", 384),
    "vit_base_patch16_384": AUGREG.format("B", "medium1", "0.1", "0.01", 384),
    "deit_tiny_patch16_224": DEIT.format("tiny_patch16_224-a1311bcf"),
    "deit_small_patch16_224": DEIT.format("small_patch16_224-cd65a155"),
    "deit_base_patch16_224": DEIT.format("base_patch16_224-b5f2ef4d"),
    "deit_base_distilled_patch16_384": DEIT.format("base_distilled_patch16_384-d0272ac0"),
    "dino_vits16": DINO.format("deitsmall16"),
    "dino_vitb16": DINO.format("vitbase16"),
    "dinov2_vits14": DINOV2.format("s"),
    "dinov2_vitb14": DINOV2.format("b"),
    "mae_vit_base": META + "mae/pretrain/mae_pretrain_vit_base.pth",
    "clip_vit_b16": "https://openaipublic.azureedge.net/clip/models/"
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "bert_base": HUGGING_FACE.format("google-bert/bert-base-uncased"),
    "roberta_base": HUGGING_FACE.format("FacebookAI/roberta-base"),
    "minilm_l6": HUGGING_FACE.format("sentence-transformers/all-MiniLM-L6-v2"),
}
# OpenAI's CLIPs have QuickGELU, their archives these keys. Other files are told by name.
OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")
QUICK_GELU = "quick[-_]?gelu|openai(?!_ft)|metaclip_(400m|2pt5b)|dfn5b"
QUICK_GELU += "|b(ase_patch|[-_]?)32.*laion400m"
PLAIN_GELU = "laion|open[-_]?clip|datacomp|openai_ft"
CONFIG_TYPES = {"num_attention_heads": int, "hidden_size": int, "layer_norm_eps": float}


# Name of a tensor or module -> timm's; {} is a block's number. The nearest row counts.
def below(old: str, new: str, names: dict) -> dict:
    """The rows for what is below a module, called `old` in the file and `new` in timm."""
    return {f"{old}.{key}": f"{new}.{value}" for key, value in names.items()}


IN_PROJ = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias", "out_proj": "proj"}
QKV = {"query": "q", "key": "k", "value": "v"}
QKV_PROJ = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj"}
DENSE = {"attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1"}
DENSE |= {"output.dense": "mlp.fc2"}  # BERT's and the older ViT's
TIMM = {name: name for name in "cls_token dist_token reg_token pos_embed patch_embed".split()}
TIMM |= {"blocks": "blocks", "norm": "norm", "norm_pre": "norm_pre", "register_tokens": "reg_token"}
TORCHVISION = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed"}
TORCHVISION |= {"conv_proj": "patch_embed.proj", "encoder.ln": "norm"}
TORCHVISION_BLOCK = {"ln_1": "norm1", "ln_2": "norm2", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
TORCHVISION_BLOCK |= {"mlp.linear_1": "mlp.fc1", "mlp.linear_2": "mlp.fc2"}  # older
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
VIT_BLOCK = {"layernorm_before": "norm1", "layernorm_after": "norm2", "mlp": "mlp"}
VIT_BLOCK |= DENSE | below("attention.attention", "attn", QKV)
VIT_BLOCK |= below("attention", "attn", QKV_PROJ)  # newer files
VIT |= below("encoder.layer.{}", "blocks.{}", VIT_BLOCK)
VIT |= below("layers.{}", "blocks.{}", VIT_BLOCK)
BERT_BLOCK = {"attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2"}
BERT_BLOCK |= DENSE | below("attention.self", "attn", QKV)
BERT = below("encoder.layer.{}", "blocks.{}", BERT_BLOCK)
WRAPPINGS = ("model", "state_dict", "teacher", "base_model", "model_state_dict")
OLDER_NAMES = {"/": ".", "LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
OLDER_NAMES |= {"_orig_mod.": ""}  # a compiled module's
PREFIXES = re.compile(r"^(module\.|backbone\.|base_model\.|opt\.target\.|vit\.|bert\.)+")
TIMM_DROPPED = ("head.", "head_dist.", "pre_logits.", "fc_norm.", "attn_pool.")
TIMM_DROPPED += ("dino_head.", "ibot_head.", "mask_token", "decoder_")
CLIP_DROPPED = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")
CLIP_DROPPED += ("visual.proj", "text_projection", "logit_scale") + OPENAI_KEYS
VIT_DROPPED = ("embeddings.mask_token", "pooler.", "classifier.", "decoder.")
BERT_DROPPED = ("embeddings.", "pooler.", "cls.", "lm_head.", "classifier.", "qa_outputs.")
BERT_KIND = {"eps": 1e-12, "norm_first": False}
LAYOUTS = (  # mark, old -> new names, useless ones, what is not as in timm's ViT
    ("blocks.0.norm1.weight", TIMM, TIMM_DROPPED, {}),
    ("encoder.layers.encoder_layer_0.ln_1.weight", TORCHVISION, ("heads.",), {}),
    ("visual.transformer.resblocks.0.ln_1.weight", CLIP, CLIP_DROPPED, {}),
    ("Transformer.encoderblock_0.LayerNorm_0.scale", JAX, ("head.", "pre_logits."), {}),
    ("embeddings.cls_token", VIT, VIT_DROPPED, {"eps": 1e-12}),
    ("encoder.layer.0.output.LayerNorm.weight", BERT, BERT_DROPPED, BERT_KIND),
)


def find_layout(state: dict, layouts: tuple, path) -> tuple:
    """The first row whose mark, a tensor's name, is in the state dict."""
    for layout in layouts:
        if layout[0] in state:
            return layout
    raise act.UserError(f"{path}: expected tensors of a known layout, got {list(state)[:3]}")


def rename(state: dict, names: dict, dropped: tuple, path) -> dict:
    """The state dict under new names, without what is dropped."""
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
        new_key = filled.get(row, row) + key.removeprefix(row)
        if row not in filled or new_key in renamed:
            raise act.UserError(f"{path}: unexpected key {key}, unknown or twice there")
        renamed[new_key] = value
    return renamed


class Unread:  # stands for numpy's scalars and argparse's flags; neither runs
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
        raise act.UserError(f"{path}: it cannot be read: {found}") from error


def read_tensors(path):
    """What a .pth, .safetensors, .npz or TorchScript holds, by content."""
    with files.reading(path), open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # 8 bytes with a length, then a header in JSON
        safetensors = files.require("safetensors.torch", "safetensors")
        with parsing(path):
            return safetensors.load_file(path)
    if head.startswith(b"PK"):
        with parsing(path), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for entry in archive.infolist():  # a name may be twice there
                is_code = entry.filename.lower().endswith(".py")
                if is_code and b"__setstate__" in archive.read(entry):
                    raise act.UserError("code that would run")
            if all(name.endswith(".npy") for name in names):
                with np.load(path, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(array) for name, array in arrays.items()}
            if any(name.endswith("/constants.pkl") for name in names):  # a TorchScript
                return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
    with parsing(path), torch.serialization.safe_globals(ADMITTED):
        return torch.load(path, map_location="cpu", weights_only=True)


def find_state_dict(obj) -> dict:
    """The tensors by name inside the usual wrappings, without their prefixes."""
    for key in WRAPPINGS:
        if isinstance(obj, dict) and isinstance(obj.get(key), dict):
            obj = obj[key]
    state = {}
    if isinstance(obj, dict):
        for key, value in obj.items():
            if isinstance(value, torch.Tensor):
                name = str(key)
                for old, new in OLDER_NAMES.items():
                    name = name.replace(old, new)
                state[PREFIXES.sub("", name)] = value
    return state


def tensor(state: dict, name: str, ndim: int, path) -> torch.Tensor:
    if name not in state or state[name].ndim != ndim:
        raise act.UserError(f"{path}: expected {name} of {ndim} dimensions")
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
        with parsing(f"{path}: {query}"):  # The three shapes must go together.
            fused[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return fused


def from_jax(state: dict, path) -> dict:
    """From JAX's kernels (in, out), heads apart, or (H, W, in, out) to torch's order."""
    converted = {}
    for key, value in state.items():
        if key == "patch_embed.proj.kernel":
            value = tensor(state, key, 4, path).permute(3, 2, 0, 1)
        elif key.endswith(".attn.proj.kernel"):
            value = tensor(state, key, 3, path).flatten(0, 1).t()  # (heads, C / heads, out)
        elif key.endswith(".kernel") and value.ndim > 1:
            value = value.flatten(1).t()  # (in, out) or (in, heads, C / heads)
        elif key.endswith(".bias"):
            value = value.flatten()
        converted[key.replace(".kernel", ".weight").replace(".scale", ".weight")] = value
    return converted


def pretrained_names() -> dict[str, str]:
    """The names that load_pretrained knows -> the addresses of their files."""
    return dict(PUBLISHED)


def download(name: str) -> Path:
    """The published file in torch.hub's cache, fetched on first use."""
    url = PUBLISHED.get(name, HUGGING_FACE.format(name.replace("_quickgelu", "")))  # the same file
    file_name = url.rpartition("/")[2]
    file_name = file_name.replace("model.", f"{name}.")  # so many models call theirs
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if path.exists():
        return path
    stated = re.search("[-/]([0-9a-f]{8,64})[./]", url)  # how the file's hash begins
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(request, timeout=10) as response:
            print(f"downloading {url}", file=sys.stderr)
            data = response.read()
        digest = hashlib.sha256(data).hexdigest()
        if stated and not digest.startswith(stated[1]):
            raise act.UserError(f"expected the hash {stated[1]}, got {digest}")
        with files.complete_file(path) as file:
            file.write(data)
            file.flush()
            read_tensors(file.name)
    except (OSError, http.client.HTTPException, act.UserError) as error:
        raise act.UserError(f"{path}: expected {name} there from {url}, got {error}") from error
    return path


def load_pretrained(name_or_path, num_heads: int | None = None) -> act.Backbone:
    """A pretrained Backbone in eval mode, by a name of pretrained_names(), timm/NAME or a file.

    Heads: of a config.json beside the file, else `num_heads`, else as in a JAX file, else by width
    as in act.HEADS (12 for a BERT of 384). SigLIP's GELU by tanh becomes the exact one, less than
    0.001 away. UserError for other layouts, or if nothing tells heads or a CLIP's activation."""
    name = str(name_or_path)
    path = Path(name)
    if name in PUBLISHED or (re.fullmatch(r"timm/[\w.-]+", name) and not path.exists()):
        with processes.first_process():
            path = download(name)
    if not path.is_file():
        raise act.UserError(f"{path}: expected a file, timm/NAME or one of {list(PUBLISHED)}")
    published = read_config(path)
    num_heads = published.get("num_attention_heads", num_heads)
    tensors = find_state_dict(read_tensors(path))
    state, config = translate(tensors, num_heads, path)
    config.eps = published.get("layer_norm_eps", config.eps)
    if published.get("hidden_size", config.width) != config.width:
        raise act.UserError(f"{path}: config.json: expected hidden_size {config.width}")
    if "hidden_act" in published:
        config.quick_gelu = published["hidden_act"] == "quick_gelu"
    elif config.norm_pre and tensors.keys().isdisjoint(OPENAI_KEYS):
        config.quick_gelu = re.search(QUICK_GELU, path.name, re.I) is not None
        if not config.quick_gelu and not re.search(PLAIN_GELU, path.name, re.I):
            wanted = "a config.json with hidden_act gelu or quick_gelu (OpenAI's)"
            raise act.UserError(f"{path}: expected {wanted} beside a CLIP")
    return act.build_backbone(state, config, path)


def translate(state: dict, num_heads: int | None, path) -> tuple[dict, act.BackboneConfig]:
    """The state dict under timm's names and the config of its blocks. A CLIP has QuickGELU."""
    roberta = any(key.startswith("roberta.") for key in state)
    stripped = {key.removeprefix("roberta."): value for key, value in state.items()}
    _, names, dropped, kind = find_layout(stripped, LAYOUTS, path)
    state = rename(stripped, names, dropped, path)
    if names is JAX:
        query = tensor(state, "blocks.0.attn.q.kernel", 3, path)  # (C, heads, C / heads)
        num_heads = num_heads or query.shape[1]
        state = from_jax(state, path)
    if names is BERT and state["blocks.0.norm2.weight"].shape == (384,):
        num_heads = num_heads or 12  # MiniLM and its descendants
    state = fuse_qkv(state, path)
    config = replace(act.backbone_config(state, path, num_heads), **kind)
    if "norm_pre.weight" in state:
        config = replace(config, eps=1e-5, norm_pre=True, quick_gelu=True)
    positions = stripped.get("embeddings.position_embeddings.weight", torch.empty(0))
    if roberta or positions.shape[:1] == (514,):  # 512 and the 2 that RoBERTa adds
        config.eps = 1e-5
    return state, config


def read_config(path: Path) -> dict:
    """Hugging Face's config.json beside a weight file; {} if there is none."""
    beside = path.parent / "config.json"
    if not beside.is_file():
        return {}
    with parsing(beside):
        config = json.loads(beside.read_text(encoding="utf-8"))
        config = config.get("vision_config") or config  # of a CLIP
        for key in CONFIG_TYPES.keys() & config.keys():
            config[key] = CONFIG_TYPES[key](config[key])
        if config.get("hidden_act", "gelu") not in ("gelu", "quick_gelu"):
            raise ValueError("hidden_act: expected gelu or quick_gelu")
    return config
