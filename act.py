"""ACT: a pretrained 2D Transformer, frozen, as a 3D autoencoder that teaches a 3D Transformer.

R. Dong et al., "Autoencoders as Cross-Modal Teachers: Can Pretrained 2D Image Transformers Help 3D
Representation Learning?", ICLR 2023, arXiv:2212.08320. The method in one file, to be read from top
to bottom beside the paper: patches, stage I (Sec. 4.1: Teacher), stage II (Sec. 4.2: Student),
transfer (Sec. 5: Classifier, Segmenter). It imports torch, numpy and the standard library only.

Shapes: B batch, N points, G groups (patches), S points per group, C channels, V / M visible /
masked groups, K neighbours, T tokens, P prompts. A True in a mask means masked.

Where this differs from the paper or from the official implementation:
 1. The teacher of stage II is in eval mode, with argmax codes: targets are deterministic. The
    official one keeps BatchNorm, prompt dropout and Gumbel noise on. No noise in evaluation either.
 2. Deep prompts are keys and values computed once per batch: prompt dropout acts once per step.
 3. The student embeds its visible patches only: BatchNorm sees those alone.
 4. Learning rate, temperature and KL weight move with every step; a run shorter than the published
    one scales temperature and KL weight by its length, and warms up for a tenth of it at most.
 5. Every backbone is treated alike, BERT too: positions at every block, deep prompts. Officially
    BERT gets positions once and fails with deep prompts; CLIP attends across a batch's clouds.
 6. FPS has no rule for points near the origin (the official kernel skips |p|^2 <= 1e-3).
 7. Frozen protocols freeze all below the head, class token and statistics too; only ScanObjectNN is
    rotated; results are the last epoch's; a vote is over ten augmentations.
 8. Rounding only: products split where inputs repeat, codes looked up, 1 x 1 convolutions Linear.
"""

import json
import math
import os
import re
import socket
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Geometry -----------------------------------------------------------------------------------
# Batched, on any device, in float32 or better even under autocast; distances by subtraction, never
# by the expanded square, which loses every digit of a cloud far from the origin. Each function can
# be copied out with `import torch` and what it calls.

def farthest_point_sample(xyz, num_samples, generator=None):
    """Indices of `num_samples` mutually distant points (PointNet++, Sec. 3.2).

    xyz: (B, N, 3) -> (B, num_samples) int64. Starts at point 0, or at a random one by `generator`;
    then argmax_i min_{j chosen} |x_i - x_j|^2, ties by index. ValueError if num_samples > N."""
    B, N, _ = xyz.shape
    if not 1 <= num_samples <= N:
        raise ValueError(f"num_samples: expected 1 to the {N} points of a cloud, got {num_samples}")
    dtype = torch.promote_types(xyz.dtype, torch.float32)
    # coordinates as three planes: every pass of the loop has unit stride, 3x the textbook's pace
    planes = xyz.detach().to(dtype).permute(2, 0, 1).contiguous()  # (3, B, N)
    first = torch.zeros(B, 1, dtype=torch.long, device=xyz.device)
    if generator is not None:
        first = torch.randint(N, (B, 1), generator=generator, device=generator.device)
    idx = [first.to(xyz.device)]
    nearest = torch.full_like(planes[0], float("inf"))  # squared distance to the chosen points
    x, y, z = diff = torch.empty_like(planes)  # one buffer: fresh pages cost as much as arithmetic
    while len(idx) < num_samples:
        torch.sub(planes, planes.gather(2, idx[-1].expand(3, B, 1)), out=diff)
        diff *= diff
        torch.minimum(nearest, x.add_(y).add_(z), out=nearest)  # (B, N)
        idx.append(nearest.max(dim=1, keepdim=True).indices)  # the first of equal maxima
    return torch.cat(idx, dim=1)

def knn(query, xyz, k):
    """The k points of `xyz` nearest to each query, ties by index.

    query: (B, Q, 3), xyz: (B, N, 3) -> sqdist (B, Q, k) ascending, idx (B, Q, k) int64, where
    sqdist[b, q, j] = |query[b, q] - xyz[b, idx[b, q, j]]|^2 (squared units, no gradient). Extra
    memory is bounded, whatever N and Q are. Raises ValueError if k > N."""
    B, Q, _ = query.shape
    N = xyz.shape[1]
    if not 1 <= k <= N:
        raise ValueError(f"k: expected 1 to the {N} points of a cloud, got {k}")
    dtype = torch.promote_types(torch.promote_types(query.dtype, xyz.dtype), torch.float32)
    xyz = xyz.detach().to(dtype).permute(2, 0, 1).contiguous()[:, :, None]  # (3, B, 1, N)
    query = query.detach().to(dtype).permute(2, 0, 1).contiguous()[..., None]  # (3, B, Q, 1)
    step = Q  # an exported graph holds for any B; else chunks fit a CPU core's cache, or fill a GPU
    if not torch.compiler.is_compiling():
        step = max(1, (2**17 if xyz.device.type == "cpu" else 2**26) // max(1, B * N))
    sqdist = torch.empty(B, Q, k, dtype=dtype, device=xyz.device)  # here, or the heap fragments
    idx = torch.empty(B, Q, k, dtype=torch.long, device=xyz.device)
    for start in range(0, Q, step):
        part = slice(start, start + step)
        diff = query[:, :, part] - xyz  # (3, B, q, N)
        diff *= diff
        value = diff[0].add_(diff[1]).add_(diff[2])  # (B, q, N)
        if k == 1:
            value, order = value.min(dim=-1, keepdim=True)  # the first of equal minima
        elif dtype == torch.float64 or torch.jit.is_tracing():  # no packed key there
            value, order = value.sort(dim=-1, stable=True)
        else:  # one integer: the bits of a float32 >= 0 sort as its value, the index breaks ties
            key = value.view(torch.int32).long().bitwise_left_shift_(32)
            key = key.bitwise_or_(torch.arange(N, device=xyz.device)).topk(k, largest=False).values
            value, order = (key >> 32).int().view(torch.float32), key & 0xFFFFFFFF
        sqdist[:, part], idx[:, part] = value[..., :k], order[..., :k]
    return sqdist, idx

def gather_points(values, idx):
    """out[b, ...] = values[b, idx[b, ...]]: (B, N, C), (B, ...) int64 -> (B, ..., C)."""
    B, N, C = values.shape
    rows = idx.flatten(1) + torch.arange(B, device=idx.device)[:, None] * N
    rows = torch.nn.functional.embedding(rows, values.reshape(-1, C))  # a parallel backward
    return rows.view(*idx.shape, C)

def group_points(xyz, num_group, group_size):
    """Patches of clouds (Sec. 4.1): farthest-point centres and the nearest points around each.

    xyz: (B, N, 3) -> neighborhood (B, G, S, 3), relative to its centre, nearest point first; center
    (B, G, 3). Raises ValueError for another shape, or too few points."""
    if xyz.ndim != 3 or xyz.shape[2] != 3:
        raise ValueError(f"xyz: expected clouds of shape (B, N, 3), got {tuple(xyz.shape)}")
    center = gather_points(xyz, farthest_point_sample(xyz, num_group))  # (B, G, 3)
    _, idx = knn(center, xyz, group_size)
    return gather_points(xyz, idx) - center[:, :, None], center

def chamfer_distance(a, b, norm=1):
    """Chamfer distance of two batches of point sets, mean over the batch -> scalar.

    a: (B, N, 3), b: (B, M, 3). norm=1: 1/2 (mean_a min_b |a - b| + mean_b min_a |a - b|), the
    paper's CD-L1, in the clouds' unit; norm=2: mean_a min_b |a - b|^2 + mean_b min_a |a - b|^2,
    squared unit, no 1/2. Gradients to both; neighbours are searched without, in bounded memory."""
    if norm not in (1, 2):
        raise ValueError(f"norm: expected 1 or 2, got {norm!r}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    total = 0
    for source, target in ((a, b), (b, a)):
        _, idx = knn(source, target, 1)
        diff = source - gather_points(target, idx[..., 0])  # (B, N, 3)
        if norm == 1:
            total = total + diff.norm(dim=-1).mean() / 2  # torch's norm has gradient 0 at 0
        else:
            total = total + diff.square().sum(dim=-1).mean()
    return total

def fscore(pred, target, threshold=0.01):
    """F-score at `threshold`, a distance (not squared): (B, N, 3), (B, M, 3) -> (B,) in 0..1, the
    harmonic mean of precision and recall, 0 where both are 0."""
    precision = (knn(pred, target, 1)[0].sqrt() < threshold).float().mean(dim=(1, 2))
    recall = (knn(target, pred, 1)[0].sqrt() < threshold).float().mean(dim=(1, 2))
    return 2 * precision * recall / (precision + recall).clamp_min(1e-12)

def interpolate(xyz, center, features):
    """Features interpolated from centres to points (PointNet++, Sec. 3.4).

    xyz: (B, N, 3), center: (B, G, 3), features: (B, G, C) -> (B, N, C): sum_j w_j features[j] over
    the 3 nearest centres (all if G < 3), w_j proportional to 1 / (d_j^2 + 1e-8), summing to 1."""
    sqdist, idx = knn(xyz, center, min(3, center.shape[1]))
    weight = torch.nn.functional.normalize(1 / (sqdist + 1e-8), p=1, dim=-1)
    return (gather_points(features, idx) * weight[..., None]).sum(dim=2).to(features.dtype)

# ---- Transformer --------------------------------------------------------------------------------
# One Block for backbone, student and decoder; parameter names are timm's.

class Attention(nn.Module):
    """Multi-head self-attention; `prompts` are further keys and values in front of those of x."""
    def __init__(self, dim, num_heads, qkv_bias=True):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width: expected a multiple of the {num_heads} heads, got {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x):
        """(B, T, C) -> q, k, v, each (B, heads, T, C / heads)."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, C // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, prompts=None):
        B, T, C = x.shape
        q, k, v = self.queries_keys_values(x)
        if prompts is not None:
            prompt_k, prompt_v = (t.to(k.dtype).expand(B, -1, -1, -1) for t in prompts)
            k = torch.cat([prompt_k, k], dim=2)  # (B, heads, P + T, C / heads)
            v = torch.cat([prompt_v, v], dim=2)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, C))

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation CLIP was trained with."""
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)

class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT; DINOv2)."""
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma

class Block(nn.Module):
    """Pre-norm (ViT, CLIP, the student) or post-norm (BERT): (B, T, C) -> (B, T, C)."""
    def __init__(self, dim, num_heads, mlp_hidden=None, qkv_bias=True, eps=1e-5, norm_first=True,
                 layer_scale=False, quick_gelu=False, drop_path=0.0):
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        mlp_hidden = mlp_hidden or 4 * dim
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, mlp_hidden), act=QuickGELU() if quick_gelu else nn.GELU(),
            fc2=nn.Linear(mlp_hidden, dim)))
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_rate = drop_path

    def drop_path(self, x):
        """In training, drops a sample's residual branch at the drop rate, else scales it up."""
        if not self.training or self.drop_rate == 0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.drop_rate)
        return x * (keep / (1 - self.drop_rate))

    def keys_values(self, prompts):
        """What prompt tokens (1, P, C) contribute to this block's attention."""
        prompts = self.norm1(prompts) if self.norm_first else prompts
        return self.attn.queries_keys_values(prompts)[1:]

    def forward(self, x, prompts=None):
        if self.norm_first:
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), prompts)))
            return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        x = self.norm1(x + self.drop_path(self.attn(x, prompts)))
        return self.norm2(x + self.drop_path(self.mlp(x)))

@dataclass
class BackboneConfig:
    """Sizes and kind of a pretrained Transformer; patch_size = 0: no image side."""
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_hidden: int = 3072
    eps: float = 1e-6
    norm_first: bool = True  # BERT's is False, and it has no final norm
    qkv_bias: bool = True
    layer_scale: bool = False
    quick_gelu: bool = False
    norm_pre: bool = False  # CLIP's ln_pre
    patch_size: int = 0
    grid: int = 0  # the position table holds grid x grid patches
    num_prefix: int = 0  # class token, DeiT's distillation token, DINOv2's registers

class Backbone(nn.Module):
    """A plain Transformer: a ViT on images, or its blocks alone on tokens of any origin."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.patch_size:
            proj = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
            self.patch_embed = nn.ModuleDict({"proj": proj})
            self.prefix_tokens = nn.Parameter(torch.zeros(1, c.num_prefix, c.width))
            self.pos_embed = nn.Parameter(torch.zeros(1, c.grid**2, c.width))
        self.norm_pre = nn.LayerNorm(c.width, eps=c.eps) if c.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(c.width, c.num_heads, c.mlp_hidden, c.qkv_bias, c.eps, c.norm_first,
                  c.layer_scale, c.quick_gelu) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=c.eps) if c.norm_first else nn.Identity()
        init_linear(self)  # as timm

    def forward_tokens(self, tokens):
        """The blocks and the final norm alone (CLIP: ln_pre first). (B, T, C) -> (B, T, C)."""
        tokens = self.norm_pre(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward_features(self, images):
        """Images (B, 3, H, W), normalised as published, -> (B, T, C) after the final norm.

        T: class token and the like, then the patches row by row. Positions are resampled to another
        size than the published one, as in timm. Raises ValueError if there is no image side."""
        c = self.config
        if not c.patch_size:
            raise ValueError("images: expected a model with an image side; this has forward_tokens")
        x = self.patch_embed["proj"](images)
        B, _, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, H W, C)
        pos = self.pos_embed
        if (H, W) != (c.grid, c.grid):
            pos = pos.mT.unflatten(2, (c.grid, c.grid))  # (1, C, grid, grid)
            pos = F.interpolate(pos, (H, W), mode="bicubic", antialias=True).flatten(2).mT
        prefix = self.prefix_tokens.expand(B, -1, -1)
        return self.forward_tokens(torch.cat([prefix, x + pos], dim=1))

def trunc_normal(*shape):
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))

def init_linear(model, init=lambda weight: nn.init.trunc_normal_(weight, std=0.02)):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

# ---- Public weights -----------------------------------------------------------------------------
# A list of (pattern, replacement) per published layout, applied in order to every name; what a
# pattern without replacement matches is dropped. A missing or unexpected key is an error.

_AUGREG = ("https://storage.googleapis.com/vit_models/augreg/{}_16-i21k-300ep-lr_0.001-aug_{}-wd_{}"
           "-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_{}-res_{}.npz")
_META = "https://dl.fbaipublicfiles.com/"
_HUGGING_FACE = "https://huggingface.co/{}/resolve/main/model.safetensors"
_PUBLISHED = {
    "vit_tiny_patch16_224": _AUGREG.format("Ti", "none", "0.03", "0.03", 224),
    "vit_small_patch16_384": _AUGREG.format("S", "light1", "0.03", "0.03", 384),
    "vit_base_patch16_384": _AUGREG.format("B", "medium1", "0.1", "0.01", 384),
    "deit_tiny_patch16_224": _META + "deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": _META + "deit/deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": _META + "deit/deit_base_patch16_224-b5f2ef4d.pth",
    "deit_base_distilled_patch16_384": _META + "deit/deit_base_distilled_patch16_384-d0272ac0.pth",
    "dino_vits16": _META + "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vitb16": _META + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dinov2_vits14": _META + "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": _META + "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "mae_vit_base": _META + "mae/pretrain/mae_pretrain_vit_base.pth",
    "clip_vit_b16": "https://openaipublic.azureedge.net/clip/models/"
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "bert_base": _HUGGING_FACE.format("google-bert/bert-base-uncased"),
    "roberta_base": _HUGGING_FACE.format("FacebookAI/roberta-base"),
    "minilm_l6": _HUGGING_FACE.format("sentence-transformers/all-MiniLM-L6-v2")}

_CLIP_BLOCK = [
    (r"\.ln_(?=[12]\.)", ".norm"), (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."), (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2.")]
_HUGGING_FACE_BLOCK = [
    (r"^(bert|roberta|vit)\.", ""), (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"Norm\.gamma$", "Norm.weight"), (r"Norm\.beta$", "Norm.bias"),
    (r"\.attention\.(?:attention\.|self\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(?:layernorm_before|attention\.output\.LayerNorm)\.", ".norm1."),
    (r"\.(?:layernorm_after|output\.LayerNorm)\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2.")]
_LAYOUTS = {  # name: (what a name of this layout has in it, [(pattern, replacement)])
    "timm": (r"^blocks\.0\.norm1\.", [
        (r"^register_tokens$", "reg_token"), (r"^(mask_token$|decoder_)", None),
        (r"^(head|head_dist|pre_logits|dino_head|ibot_head)\.", None)]),
    "torchvision": (r"^encoder\.layers\.encoder_layer_", [
        (r"^encoder\.layers\.encoder_layer_", "blocks."), (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"), (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.ln\.", "norm."), (r"^heads\.", None), (r"\.self_attention\.", ".attn."),
        (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
        *_CLIP_BLOCK]),
    "clip": (r"^visual\.transformer\.resblocks\.", [
        (r"^visual\.transformer\.resblocks\.", "blocks."), (r"^visual\.ln_pre\.", "norm_pre."),
        (r"^visual\.class_embedding$", "cls_token"), (r"^visual\.ln_post\.", "norm."),
        (r"^visual\.positional_embedding$", "pos_embed"),
        (r"^visual\.conv1\.", "patch_embed.proj."),
        (r"^(transformer|token_embedding|ln_final)\.", None), *_CLIP_BLOCK,
        (r"^(visual\.proj|positional_embedding|text_projection|logit_scale)$", None),
        (r"^(input_resolution|context_length|vocab_size)$", None)]),
    "jax": (r"^Transformer\.encoderblock_", [
        (r"^Transformer\.encoderblock_", "blocks."), (r"^cls$", "cls_token"),
        (r"^Transformer\.posembed_input\.pos_embedding$", "pos_embed"),
        (r"^embedding\.", "patch_embed.proj."), (r"^Transformer\.encoder_norm\.", "norm."),
        (r"^(head|pre_logits)\.", None), (r"\.(kernel|scale)$", ".weight"),
        (r"\.LayerNorm_0\.", ".norm1."), (r"\.LayerNorm_2\.", ".norm2."),
        (r"\.MultiHeadDotProductAttention_1\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
        (r"\.MultiHeadDotProductAttention_1\.out\.", ".attn.proj."),
        (r"\.MlpBlock_3\.Dense_0\.", ".mlp.fc1."), (r"\.MlpBlock_3\.Dense_1\.", ".mlp.fc2.")]),
    "bert": (r"\.attention\.output\.LayerNorm\.", [
        *_HUGGING_FACE_BLOCK,
        (r"^(embeddings|pooler|cls|lm_head|classifier|qa_outputs)\.", None)]),
    "huggingface": (r"\.layernorm_before\.", [
        *_HUGGING_FACE_BLOCK, (r"^layernorm\.", "norm."), (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^(embeddings\.mask_token$|pooler\.|classifier\.|decoder\.)", None)])}

def pretrained_names():
    """The names `load_pretrained` knows, each with the public address of its file: {name: url}."""
    return dict(_PUBLISHED)

def _download(name):
    """The published file in torch.hub's cache, fetched on first use; a given hash is checked."""
    url, timeout = _PUBLISHED[name], socket.getdefaulttimeout()
    file = url.rsplit("/", 1)[1].replace("model.safetensors", f"{name}.safetensors")
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.exists():
        return path
    digest = re.search(r"(?<=-)[0-9a-f]{8}(?=\.pth$)|(?<=/)[0-9a-f]{64}(?=/)", url)
    try:
        socket.setdefaulttimeout(10)  # torch.hub offers no other way to bound the wait
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest and digest[0])
        read_tensors(path)  # a transfer cut short must not stay in the cache
    except Exception as error:  # whatever the network or the disk fails with
        path.unlink(missing_ok=True)
        raise ValueError(f"{path}: expected the weights {name}, but {url} gave none ({error}); "
                         "download that file by other means") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path

def _read_safetensors(data):
    """8 bytes of header length, JSON {name: {dtype, shape, data_offsets}}, raw tensors."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "U8": torch.uint8,
              "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
              "I8": torch.int8, "BOOL": torch.bool}
    start = 8 + int.from_bytes(data[:8], "little")
    header, body, state = json.loads(data[8:start]), bytearray(data[start:]), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype, count = dtypes[entry["dtype"]], math.prod(entry["shape"])
        if not 0 <= begin <= end <= len(body) or count * dtype.itemsize != end - begin:
            raise ValueError(f"tensor {name} does not fit in the file")
        flat = torch.frombuffer(body[begin:end] or bytearray(1), dtype=torch.uint8)[: end - begin]
        state[name] = flat.view(dtype).view(entry["shape"])
    return state

# takes the place of numpy scalars among a checkpoint's metrics: none of their code runs
_Unread = type("_Unread", (), {"__init__": lambda self, *args: None,
                               "__setstate__": lambda self, state: None})
_NUMPY_NAMES = [(_Unread, name) for name in (  # numpy 1's and 2's
    "numpy.dtype", "numpy.ndarray", "_codecs.encode", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct")]

def read_tensors(path):
    """What a weight file holds, on the CPU: .pth, .safetensors, .npz or TorchScript, by content.

    Nothing in the file runs: torch.load admits tensors and plain values only, .npz arrays only; a
    TorchScript archive with code that runs on loading is refused. Raises ValueError if broken."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:] == b"{":
            return _read_safetensors(Path(path).read_bytes())
        if head[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                code = [archive.read(name) for name in names if name.endswith(".py")]
            if all(name.endswith(".npy") for name in names):
                with np.load(path, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(array) for name, array in arrays.items()}
            if any(b"__setstate__" in text for text in code):
                raise ValueError("a TorchScript archive with code that runs on loading")
            if any(name.endswith("/constants.pkl") for name in names):
                return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        with torch.serialization.safe_globals(_NUMPY_NAMES), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the readers fail with
        code = re.search(r"GLOBAL (\S+)", str(error))  # torch names it amid much advice
        reason = str(error).rpartition("error: ")[2].strip().split("\n")[0]
        reason = f"it would run {code[1]}" if code else reason
        raise ValueError(f"{path}: expected a weight file, got a broken or foreign one "
                         f"({reason})") from error

def _state_dict(obj, path):
    """The tensors inside the usual wrappings, names dotted, without prefixes of wrappers."""
    for key in ("model", "state_dict", "teacher", "base_model", "model_state_dict"):
        if isinstance(obj, dict) and isinstance(obj.get(key), dict):
            obj = obj[key]
    prefix, state = r"^(module\.|backbone\.|base_model\.|opt\.target\.)+", {}
    for key, value in obj.items() if isinstance(obj, dict) else ():
        if isinstance(value, torch.Tensor):
            state[re.sub(prefix, "", str(key).replace("/", "."))] = value
    if not state:
        raise ValueError(f"{path}: expected a state dict, got no tensors by name")
    return state

def _translate(state, layouts, path):
    """(the layout recognised, the state with its rules applied, in order, to every name)."""
    layout = next((name for name, (pattern, _) in layouts.items()
                   if any(re.search(pattern, key) for key in state)), None)
    if layout is None:
        raise ValueError(f"{path}: expected names of a known layout ({', '.join(layouts)}), got "
                         f"{', '.join(list(state)[:3])}")
    out = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in layouts[layout][1]:
            if replacement is None and re.search(pattern, name):
                break
            name = re.sub(pattern, replacement or "", name)
        else:
            if name in out:
                raise ValueError(f"{path}: unexpected key {key!r}, since {name!r} is there already")
            out[name] = value
    return layout, out

def _fuse_qkv(state):
    """Separate query, key and value matrices become one, in that order."""
    for query in [key for key in state if ".attn.q." in key]:
        parts = [state.pop(query.replace(".attn.q.", f".attn.{letter}.")) for letter in "qkv"]
        state[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return state

def _from_jax(key, value):
    """JAX has matrices as (in, out), heads apart, and convolutions as (H, W, in, out)."""
    if key == "patch_embed.proj.weight":
        return value.permute(3, 2, 0, 1)
    if re.search(r"(attn\.\w+|mlp\.fc\d)\.weight$", key):
        return (value.flatten(0, 1) if ".attn.proj." in key else value.flatten(1)).t()
    return value.flatten() if key.endswith(".bias") else value

def load_pretrained(name_or_path, num_heads=None):
    """A pretrained Backbone in eval mode, by a name of pretrained_names() or from a file.

    Layouts: timm / DeiT / MAE / DINO / DINOv2, torchvision, Hugging Face ViT, OpenAI CLIP (visual),
    JAX AugReg .npz, BERT, RoBERTa. Heads: config.json's beside the file, else `num_heads`, else the
    file's (JAX), else width // 64. Raises ValueError if the file is missing, broken, of another
    family, or a key is unexpected or missing."""
    name = str(name_or_path)
    path = _download(name) if name in _PUBLISHED else Path(name)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file or one of the names {', '.join(_PUBLISHED)}")
    state = _state_dict(read_tensors(path), path)
    beside = path.parent / "config.json"  # as Hugging Face publishes it
    roberta = any(key.startswith("roberta.") or "position_embeddings" in key and len(value) == 514
                  for key, value in state.items())
    layout, state = _translate(state, _LAYOUTS, path)
    try:
        published = json.loads(beside.read_text()) if beside.is_file() else {}
        heads = published.get("num_attention_heads") or num_heads or {"minilm_l6": 12}.get(name)
        eps = published.get("layer_norm_eps") or (1e-5 if roberta else None)
        if layout == "jax":
            heads = heads or state["blocks.0.attn.q.weight"].shape[1]
            state = {key: _from_jax(key, value) for key, value in state.items()}
        config = _backbone_config(_fuse_qkv(state), layout, heads, eps)
        for key, value in (("hidden_act", "gelu"), ("hidden_size", config.width)):
            if published.get(key, value) != value:
                raise ValueError(f"{key} {published[key]!r} in config.json, not {value!r}")
        backbone = Backbone(_fold_image_side(state, config))
    except Exception as error:  # a missing tensor, or whatever one of an unexpected shape leads to
        raise ValueError(f"{path}: its tensors, its config.json or num_heads make no Transformer: "
                         f"{error!r}") from error
    return load_exactly(backbone, state, path).eval()

def _backbone_config(state, layout, num_heads=None, eps=None):
    """Sizes read off the tensors, under our names; what no tensor shows is the layout's."""
    width = state["blocks.0.attn.qkv.weight"].shape[1]
    return BackboneConfig(
        width=width, depth=sum(key.endswith(".norm1.weight") for key in state),
        num_heads=num_heads or max(1, width // 64), qkv_bias="blocks.0.attn.qkv.bias" in state,
        mlp_hidden=len(state["blocks.0.mlp.fc1.weight"]), layer_scale="blocks.0.ls1.gamma" in state,
        eps=eps or {"huggingface": 1e-12, "bert": 1e-12, "clip": 1e-5}.get(layout, 1e-6),
        norm_first=layout != "bert", norm_pre=layout == "clip", quick_gelu=layout == "clip")

def _fold_image_side(state, config):
    """The config with its image side; in the state, the tokens before patches become one tensor."""
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} & state.keys():
        return config
    names = [name for name in ("cls_token", "dist_token") if name in state]
    tokens = torch.cat([state.pop(name).float().reshape(1, 1, -1) for name in names], dim=1)
    pos = state["pos_embed"].float().reshape(1, -1, config.width)  # CLIP has no batch dimension
    grid = math.isqrt(pos.shape[1])
    first = pos.shape[1] - grid**2  # positions of tokens: of all or of none; registers have none
    tokens = tokens + pos[:, :first] if first else tokens
    if "reg_token" in state:
        tokens = torch.cat([tokens, state.pop("reg_token")], dim=1)
    state.update({"pos_embed": pos[:, first:], "prefix_tokens": tokens})
    state.setdefault("patch_embed.proj.bias", torch.zeros(config.width))  # CLIP has none
    size = state["patch_embed.proj.weight"].shape[-1]
    return replace(config, patch_size=size, grid=grid, num_prefix=tokens.shape[1])

def load_exactly(model, state, path):
    """The model with a state dict of exactly its keys and shapes; else ValueError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:400]}") from error
    return model

# ---- Patches -------------------------------------------------------------------------------------
class BatchNorm(nn.BatchNorm1d):
    """Batch norm over all axes but the last: (..., C) -> (..., C)."""
    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view_as(x)

class PatchEmbed(nn.Module):
    """Mini-PointNet (PointNet, Sec. 4.2): one vector per patch, (..., S, 3) -> (..., C)."""
    def __init__(self, dim):
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Linear(3, 128), BatchNorm(128), nn.ReLU(), nn.Linear(128, 256))
        self.second_conv = nn.Sequential(
            nn.Linear(512, 512), BatchNorm(512), nn.ReLU(), nn.Linear(512, dim))

    def forward(self, neighborhood):
        point = self.first_conv(neighborhood)  # (..., S, 256)
        patch = point.amax(dim=-2, keepdim=True)  # (..., 1, 256)
        # Linear([patch ; point]): its patch half once per patch, its point half once per point
        linear = self.second_conv[0]
        patch = F.linear(patch, linear.weight[:, :256], linear.bias)
        x = F.linear(point, linear.weight[:, 256:]) + patch  # (..., S, 512)
        return self.second_conv[1:](x).amax(dim=-2)

def pos_mlp(dim):
    """Position of a patch: an MLP of its centre (Sec. 4.1)."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))

# ---- Teacher: stage I (Sec. 4.1), a discrete VAE around a frozen pretrained Transformer ----------
class EdgeConv(nn.Module):
    """max_j LeakyReLU(GroupNorm(W [f_j - f_i ; f_i])), j the neighbours of i (DGCNN, Sec. 3.1)."""
    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(2 * dim, out, bias=False)
        self.norm = nn.GroupNorm(4, out)  # statistics over all edges of a cloud

    def forward(self, f, graph):
        # W [f_j - f_i ; f_i] = W1 f_j + (W2 - W1) f_i: two products per point, not one per edge
        w1, w2 = self.linear.weight.chunk(2, dim=1)
        edge = gather_points(F.linear(f, w1), graph) + F.linear(f, w2 - w1)[:, :, None]
        edge = self.norm(edge.movedim(-1, 1)).movedim(1, -1)  # (B, G, K, out)
        return F.leaky_relu(edge, 0.2).amax(dim=2)  # (B, G, out)

class DGCNN(nn.Module):
    """Four EdgeConvs on the graph of nearest centres, a Linear of all: (B, G, C) -> (B, G, out)."""
    def __init__(self, dim, out):
        super().__init__()
        self.input_trans = nn.Linear(dim, 128)
        self.layer1 = EdgeConv(128, 256)
        self.layer2 = EdgeConv(256, 512)
        self.layer3 = EdgeConv(512, 512)
        self.layer4 = EdgeConv(512, 1024)
        self.layer5 = nn.Sequential(nn.Linear(2304, out, bias=False), nn.GroupNorm(4, out))

    def edges(self, f, graph):
        """The outputs of the four EdgeConvs, concatenated: (B, G, 2304)."""
        f1 = self.layer1(self.input_trans(f), graph)
        f2 = self.layer2(f1, graph)
        f3 = self.layer3(f2, graph)
        return torch.cat([f1, f2, f3, self.layer4(f3, graph)], dim=-1)

    def forward(self, f, graph):
        linear, norm = self.layer5
        return F.leaky_relu(norm(linear(self.edges(f, graph)).mT).mT, 0.2)

class FoldingDecoder(nn.Module):
    """FoldingNet: a feature -> S/4 coarse points, each unfolded on a 2 x 2 grid: S fine points."""
    def __init__(self, dim, group_size):
        super().__init__()
        if group_size % 4:
            raise ValueError(f"group_size: expected a multiple of 4, got {group_size}")
        self.mlp = nn.Sequential(nn.Linear(dim, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                                 nn.Linear(1024, 3 * group_size // 4))
        self.final_conv = nn.Sequential(
            nn.Linear(dim + 5, 512), BatchNorm(512), nn.ReLU(),
            nn.Linear(512, 512), BatchNorm(512), nn.ReLU(), nn.Linear(512, 3))
        grid = torch.tensor([[-0.05, -0.05], [0.05, -0.05], [-0.05, 0.05], [0.05, 0.05]])
        self.register_buffer("grid", grid, persistent=False)  # the first coordinate varies fastest

    def forward(self, feature):
        B, G, C = feature.shape
        coarse = self.mlp(feature).view(B, G, -1, 1, 3).float()  # (B, G, S/4, 1, 3)
        # Linear([feature ; grid ; coarse]): once per patch, per grid point, per coarse point
        linear = self.final_conv[0]
        w_feature, w_grid, w_coarse = linear.weight.split([C, 2, 3], dim=1)
        x = F.linear(feature, w_feature, linear.bias)[:, :, None, None] + F.linear(coarse, w_coarse)
        x = x + F.linear(self.grid, w_grid)  # (B, G, S/4, 4, 512)
        fine = coarse + self.final_conv[1:](x).float()
        return coarse.squeeze(3), fine.flatten(2, 3)  # fine point 4 m + s belongs to coarse point m

@dataclass
class TeacherConfig:
    """Sizes of the stage I autoencoder; the defaults are the paper's."""
    num_group: int = 64
    group_size: int = 32
    encoder_dims: int = 384
    tokens_dims: int = 384
    decoder_dims: int = 384
    num_tokens: int = 8192  # codes
    prompt: str = "deep"  # deep, shallow or none
    num_prompt: int = 64
    prompt_dropout: float = 0.1
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    weights: str = "random"  # what the backbone was initialised from

    def __post_init__(self):
        if isinstance(self.backbone, dict):  # from a checkpoint
            self.backbone = BackboneConfig(**self.backbone)
        if self.prompt not in ("deep", "shallow", "none"):
            raise ValueError(f"prompt: expected deep, shallow or none, got {self.prompt!r}")

class TeacherOutput(NamedTuple):
    coarse: torch.Tensor  # (B, G, S/4, 3), relative to the centres, as are fine and neighborhood
    fine: torch.Tensor  # (B, G, S, 3)
    neighborhood: torch.Tensor  # (B, G, S, 3)
    center: torch.Tensor  # (B, G, 3)
    logits: torch.Tensor  # (B, G, codes)

class Teacher(nn.Module):
    """The 3D autoencoder: patches -> codes -> prompted frozen backbone -> features -> patches.

    All is trained but `frozen`, the backbone: no gradients, fixed statistics, no dropout."""
    def __init__(self, config=None, backbone=None):
        super().__init__()
        c = config or TeacherConfig()
        sizes = backbone.config if backbone else c.backbone
        c = self.config = replace(c, backbone=replace(sizes, patch_size=0))  # without an image side
        self.backbone = Backbone(c.backbone)
        if backbone is not None:
            given, names = backbone.state_dict(), self.backbone.state_dict()
            self.backbone.load_state_dict({name: given[name] for name in names})
        self.encoder = PatchEmbed(c.encoder_dims)
        self.dgcnn_1 = DGCNN(c.encoder_dims, c.num_tokens)
        self.codebook = nn.Parameter(torch.randn(c.num_tokens, c.tokens_dims))
        width, depth, P = c.backbone.width, c.backbone.depth, c.num_prompt
        self.proj_pre = nn.Linear(c.tokens_dims, width)
        self.visual_pos_embed = pos_mlp(width)
        self.proj_post = nn.Linear(width, c.tokens_dims)
        if c.prompt != "none":
            self.visual_prompt_token = trunc_normal(1, P, width)
            self.visual_prompt_pos = trunc_normal(1, P, width)
        if c.prompt == "deep":
            self.deep_prompt_tokens = trunc_normal(depth - 1, P, width)
            self.deep_prompt_pos = trunc_normal(depth - 1, P, width)
        self.dgcnn_2 = DGCNN(c.tokens_dims, c.decoder_dims)
        self.decoder = FoldingDecoder(c.decoder_dims, c.group_size)
        self.frozen = [self.backbone.requires_grad_(False).eval()]

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def prompt_keys_values(self):
        """Deep prompts as keys and values, (1, heads, P, C / heads) each, per layer; else None.

        Prompt outputs are dropped at every layer, so they need no query, projection or MLP; nor do
        they depend on the cloud: one pass serves a batch, or a run with a fixed teacher (1.9x)."""
        if self.config.prompt != "deep":
            return None
        tokens = torch.cat([self.visual_prompt_token, self.deep_prompt_tokens])  # (depth, P, C)
        tokens = [F.dropout(t, self.config.prompt_dropout, self.training) for t in tokens.split(1)]
        tokens[0] = self.backbone.norm_pre(tokens[0])
        positions = torch.cat([self.visual_prompt_pos, self.deep_prompt_pos]).split(1)
        layers = zip(self.backbone.blocks, tokens, positions)
        return [block.keys_values(token + position) for block, token, position in layers]

    def transform(self, tokens, center, prompts=None):
        """The prompted backbone, positions added at every block: (B, G, D), (B, G, 3) -> (B, G, D).

        `prompts` is what prompt_keys_values() returned, if it was computed before."""
        c = self.config
        x, pos = self.proj_pre(tokens), self.visual_pos_embed(center)  # (B, G, width)
        if c.prompt == "shallow":  # one set of tokens, carried through the layers
            B = x.shape[0]
            prompt = self.visual_prompt_token.expand(B, -1, -1)
            prompt = F.dropout(prompt, c.prompt_dropout, self.training)
            x = torch.cat([prompt.to(x.dtype), x], dim=1)
            pos = torch.cat([self.visual_prompt_pos.expand(B, -1, -1).to(pos.dtype), pos], dim=1)
        if prompts is None:
            prompts = self.prompt_keys_values() or [None] * c.backbone.depth
        x = self.backbone.norm_pre(x)
        for block, keys_values in zip(self.backbone.blocks, prompts):
            x = block(x + pos, keys_values)
        return self.proj_post(self.backbone.norm(x)[:, x.shape[1] - tokens.shape[1] :])

    def tokenize(self, neighborhood, center):
        """Index of each patch's code: (B, G, S, 3), (B, G, 3) -> (B, G) int64."""
        return self.dgcnn_1(self.encoder(neighborhood), knn(center, center, 4)[1]).argmax(dim=-1)

    def features(self, neighborhood, center, prompts=None):
        """The distillation target, deterministic in eval mode: (B, G, D) of the argmax codes."""
        tokens = F.embedding(self.tokenize(neighborhood, center), self.codebook)
        return self.dgcnn_2(self.transform(tokens, center, prompts), knn(center, center, 4)[1])

    def decode(self, tokens, center):
        """Codes' vectors (B, G, D) at centres (B, G, 3) -> coarse, fine: see TeacherOutput."""
        return self.decoder(self.dgcnn_2(self.transform(tokens, center), knn(center, center, 4)[1]))

    def forward(self, xyz, temperature=1.0, hard=False):
        """Autoencodes (B, N, 3): Gumbel noise in train mode; else softmax, argmax if `hard`."""
        neighborhood, center = group_points(xyz, self.config.num_group, self.config.group_size)
        graph = knn(center, center, 4)[1]  # a centre is its own first neighbour
        logits = self.dgcnn_1(self.encoder(neighborhood), graph).float()  # (B, G, codes)
        if self.training:
            tokens = F.gumbel_softmax(logits, tau=temperature, hard=hard, dim=-1) @ self.codebook
        elif hard:
            tokens = F.embedding(logits.argmax(dim=-1), self.codebook)  # one-hot times codebook
        else:
            tokens = F.softmax(logits / temperature, dim=-1) @ self.codebook
        return TeacherOutput(*self.decode(tokens, center), neighborhood, center, logits)

def teacher_loss(output, kl_weight):
    """Stage I loss: (total, reconstruction, kl), total = reconstruction + kl_weight * kl.

    reconstruction: CD-L1 of coarse and of fine points to the patch, summed. kl: KL(uniform || q), q
    the codes' probabilities, mean over a cloud's patches; summed over codes, mean over clouds."""
    patch = output.neighborhood.flatten(0, 1)  # (B G, S, 3)
    reconstruction = chamfer_distance(output.coarse.flatten(0, 1), patch)
    reconstruction = reconstruction + chamfer_distance(output.fine.flatten(0, 1), patch)
    G, codes = output.logits.shape[1:]
    log_q = F.log_softmax(output.logits, dim=-1).logsumexp(dim=1) - math.log(G)  # (B, codes)
    kl = -math.log(codes) - log_q.mean()
    return reconstruction + kl_weight * kl, reconstruction, kl

# ---- Student: stage II (Sec. 4.2), masked modelling against the teacher's features ---------------
def random_mask(center, ratio, generator=None):
    """Masks int(ratio * G) random patches of each cloud: (B, G, 3) -> (B, G) bool."""
    B, G, _ = center.shape
    device = generator.device if generator is not None else center.device
    order = torch.rand(B, G, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return order < int(ratio * G)

def block_mask(center, ratio, generator=None):
    """Masks the int(ratio * G) patches nearest to a random one: (B, G, 3) -> (B, G) bool."""
    B, G, _ = center.shape
    device = generator.device if generator is not None else center.device
    seed = torch.randint(G, (B, 1), generator=generator, device=device).to(center.device)
    _, idx = knn(gather_points(center, seed), center, max(1, int(ratio * G)))
    mask = torch.zeros(B, G, dtype=torch.bool, device=center.device)
    return mask.scatter_(1, idx[:, 0], int(ratio * G) > 0)

def split_mask(mask, device):
    """Indices of the visible (B, V) and of the masked (B, M) groups, each ascending.

    A mask on the CPU spares a GPU the wait. Raises ValueError if the clouds' counts differ."""
    counts = mask.sum(dim=1).tolist()
    V = mask.shape[1] - counts[0]
    if min(counts) != max(counts):
        raise ValueError(f"mask: expected as many masked groups in every cloud, got {counts}")
    order = mask.to(torch.uint8).argsort(dim=1, stable=True).to(device, non_blocking=True)
    return order[:, :V], order[:, V:]

@dataclass
class EncoderConfig:
    """Sizes of the 3D Transformer and its training clouds; the defaults are the paper's."""
    num_group: int = 64
    group_size: int = 32
    points: int = 0  # of a training cloud; 0: 16 per group
    normalized: bool = True  # clouds were centred and scaled into the unit sphere
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    encoder_dims: int = 384  # of the patch embedding
    drop_path: float = 0.1

    def __post_init__(self):
        self.points = self.points or 16 * self.num_group

@dataclass
class StudentConfig(EncoderConfig):
    decoder_depth: int = 2
    target_dim: int = 384

class Encoder(nn.Module):
    """The 3D Transformer that is pretrained: patch embedding, pre-norm blocks, LayerNorm."""
    def __init__(self, config, cls_token=True):
        super().__init__()
        c = self.config = config
        self.patch_embed = PatchEmbed(c.encoder_dims)
        reduce_dim = nn.Linear(c.encoder_dims, c.width) if c.encoder_dims != c.width else None
        self.reduce_dim = reduce_dim or nn.Identity()
        self.pos_embed = pos_mlp(c.width)
        drop_paths = torch.linspace(0, c.drop_path, c.depth).tolist()
        self.blocks = nn.ModuleList(
            Block(c.width, c.num_heads, qkv_bias=False, drop_path=p) for p in drop_paths)
        self.norm = nn.LayerNorm(c.width)
        init_linear(self)
        self.cls_token = self.cls_pos = None
        if cls_token:
            self.cls_token = trunc_normal(1, 1, c.width)
            self.cls_pos = trunc_normal(1, 1, c.width)

    def group(self, xyz):
        """Patches of clouds (B, N, 3), tensor or array, on the model's device and in its dtype."""
        weight = self.norm.weight
        xyz = torch.as_tensor(xyz, dtype=weight.dtype, device=weight.device)
        return group_points(xyz, self.config.num_group, self.config.group_size)

    def forward(self, neighborhood, center, mask=None):
        """(B, G, S, 3), (B, G, 3), mask (B, G) bool -> (B, 1 + V, C), class token first.

        Only the visible patches are embedded, so that BatchNorm sees those alone."""
        if mask is not None:
            visible, _ = split_mask(mask, center.device)
            B, V = visible.shape
            neighborhood = gather_points(neighborhood.flatten(2), visible).view(B, V, -1, 3)
            center = gather_points(center, visible)
        return self.layers(neighborhood, center, [len(self.blocks)])[0]

    def layers(self, neighborhood, center, depths):
        """The normed tokens after blocks number `depths` (from 1): a list of (B, 1 + G, C)."""
        x = self.reduce_dim(self.patch_embed(neighborhood))  # (B, G, C)
        pos = self.pos_embed(center)
        if self.cls_token is not None:
            B = x.shape[0]
            x = torch.cat([self.cls_token.expand(B, -1, -1).to(x.dtype), x], dim=1)
            pos = torch.cat([self.cls_pos.expand(B, -1, -1).to(pos.dtype), pos], dim=1)
        out = {}
        for i, block in enumerate(self.blocks, start=1):
            x = block(x + pos)
            if i in depths:
                out[i] = self.norm(x)
        return [out[i] for i in depths]  # a shallow encoder may be asked for one depth twice

class Student(nn.Module):
    """Masked modelling: from the visible patches to the teacher's features of the masked ones."""
    def __init__(self, config=None):
        super().__init__()
        c = self.config = config or StudentConfig()
        self.encoder = Encoder(c)
        self.mask_token = trunc_normal(1, 1, c.width)
        self.decoder_pos_embed = pos_mlp(c.width)
        drop_paths = torch.linspace(0, c.drop_path, c.decoder_depth).tolist()
        blocks = [Block(c.width, c.num_heads, qkv_bias=False, drop_path=p) for p in drop_paths]
        self.decoder = nn.ModuleDict(
            {"blocks": nn.ModuleList(blocks), "norm": nn.LayerNorm(c.width)})
        init_linear(self.decoder, nn.init.xavier_uniform_)  # as in the official implementation
        self.head = nn.Linear(c.width, c.target_dim)

    def forward(self, neighborhood, center, mask):
        """(B, G, S, 3), (B, G, 3), (B, G) -> predictions (B, M, D) of the masked groups."""
        visible, masked = split_mask(mask, center.device)
        x = self.encoder(neighborhood, center, mask)[:, 1:]  # (B, V, C)
        pos = self.decoder_pos_embed(gather_points(center, torch.cat([visible, masked], dim=1)))
        B, M = masked.shape
        x = torch.cat([x, self.mask_token.expand(B, M, -1).to(x.dtype)], dim=1)  # (B, G, C)
        for block in self.decoder["blocks"]:
            x = block(x + pos)
        return self.head(self.decoder["norm"](x[:, x.shape[1] - M :]))  # not -M: M may be 0

    def encode(self, xyz):
        """All tokens of whole clouds, class token first: (B, N, 3) -> (B, 1 + G, C).

        Expects clouds as in training: `config.points` points, in the unit sphere if `normalized`;
        features of other densities do not compare. Arrays and any float type will do."""
        return self.encoder(*self.encoder.group(xyz))

def distillation_loss(prediction, target, kind="cosine"):
    """Stage II loss of predictions and targets (..., D) -> scalar.

    cosine: mean over tokens of 1 - cos; smooth_l1 (beta = 1), l2 (squared): mean over elements."""
    if prediction.shape != target.shape:
        raise ValueError(f"target: expected the shape {tuple(prediction.shape)} of the prediction, "
                         f"got {tuple(target.shape)}")
    prediction, target = prediction.float(), target.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(prediction, target)
    if kind == "l2":
        return F.mse_loss(prediction, target)
    raise ValueError(f"kind: expected cosine, smooth_l1 or l2, got {kind!r}")

def global_feature(tokens):
    """[class token ; max over the others], the feature of transfer: (B, 1 + G, C) -> (B, 2 C)."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)

# ---- Downstream heads (Sec. 5) -------------------------------------------------------------------
@dataclass
class ClassifierConfig(EncoderConfig):
    num_group: int = 128
    num_classes: int = 40
    head: str = "mlp3"  # mlp3 or linear
    class_names: list = field(default_factory=list)

class Classifier(nn.Module):
    """The pretrained encoder, a head on [class token ; max]: (B, N, 3) -> logits (B, classes)."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.head not in ("mlp3", "linear"):
            raise ValueError(f"head: expected mlp3 or linear, got {c.head!r}")
        self.frozen = False
        self.encoder = Encoder(c)
        if c.head == "linear":
            self.head = nn.Sequential(nn.Linear(2 * c.width, c.num_classes))
        else:
            self.head = nn.Sequential(
                nn.Linear(2 * c.width, 256), BatchNorm(256), nn.ReLU(), nn.Dropout(0.5),
                nn.Linear(256, 256), BatchNorm(256), nn.ReLU(), nn.Dropout(0.5),
                nn.Linear(256, c.num_classes))

    def freeze_encoder(self):
        """No gradients, fixed statistics, no drop path, class token and its position included."""
        self.frozen = True
        self.encoder.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, xyz):
        return self.head(global_feature(self.encoder(*self.encoder.group(xyz))))

@dataclass
class SegmenterConfig(EncoderConfig):
    num_group: int = 128
    num_parts: int = 50
    num_categories: int = 16  # 0: no object category is given, as in scenes
    class_names: list = field(default_factory=list)  # of categories, or of labels without
    part_ranges: list = field(default_factory=list)  # [first, last + 1] of each category's parts

class Segmenter(nn.Module):
    """The pretrained encoder without class token, a label per point: (B, N, 3) -> (B, N, parts)."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c, cls_token=False)
        self.depths = [max(1, c.depth * i // 3) for i in (1, 2, 3)]  # 4, 8, 12 of 12
        dim, label_dim = 3 * c.width, 64 if c.num_categories else 0
        if c.num_categories:
            self.label_conv = nn.Sequential(
                nn.Linear(c.num_categories, 64, bias=False), BatchNorm(64), nn.LeakyReLU(0.2))
        self.propagation = nn.Sequential(
            nn.Linear(dim + 3, 4 * c.width), BatchNorm(4 * c.width), nn.ReLU(),
            nn.Linear(4 * c.width, 1024), BatchNorm(1024), nn.ReLU())
        self.head = nn.Sequential(
            nn.Linear(1024 + 2 * dim + label_dim, 512), BatchNorm(512), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(512, 256), BatchNorm(256), nn.ReLU(), nn.Linear(256, c.num_parts))

    def forward(self, xyz, category=None):
        """`category`: (B,) int64 index of the object category, for a model that has categories."""
        c = self.config
        if (category is None) != (c.num_categories == 0):
            raise ValueError(f"category: expected indices below {c.num_categories}, or None for 0, "
                             f"got {category}")
        neighborhood, center = self.encoder.group(xyz)
        tokens = torch.cat(self.encoder.layers(neighborhood, center, self.depths), dim=-1)
        cloud = [tokens.amax(dim=1), tokens.mean(dim=1)]
        if category is not None:
            one_hot = F.one_hot(category, c.num_categories).to(tokens.dtype)
            cloud.append(self.label_conv(one_hot))
        xyz = xyz.to(center.dtype)
        point = torch.cat([xyz.to(tokens.dtype), interpolate(xyz, center, tokens)], dim=-1)
        point = self.propagation(point)  # (B, N, 1024)
        linear = self.head[0]  # its part on the cloud's features once per cloud, not once per point
        cloud = F.linear(torch.cat(cloud, dim=-1), linear.weight[:, 1024:], linear.bias)
        return self.head[1:](F.linear(point, linear.weight[:, :1024]) + cloud[:, None])

# ---- Checkpoints: ours, and those of the official implementation and its relatives ---------------
_ENCODER = [
    (r"blocks\.blocks\.", "blocks."), (r"^encoder\.", "encoder.patch_embed."),
    (r"^(blocks|cls_token|cls_pos|norm|pos_embed|reduce_dim)\b", r"encoder.\1")]
_OFFICIAL = {  # as _LAYOUTS
    "Student": (r"^(ACT|MAE)_encoder\.", [
        (r"^dvae_tokenizer\.", None), (r"^ACT_encoder\.(lm_head|cls_head)\.", None),
        (r"blocks\.blocks\.", "blocks."), (r"^\w+_encoder\.encoder\.", "encoder.patch_embed."),
        (r"^(ACT|MAE)_(?=[ed])", ""), (r"^(increase_dim\.0|proj_head(\.0)?)\.", "head.")]),
    "Teacher": (r"^(dvae_tokenizer\.)?codebook$", [
        (r"^dvae_tokenizer\.", ""), (r"^visual_embed\.[01]\.(layer\.)?(?=\d)", "backbone.blocks."),
        (r"^visual_embed\.0\.", "backbone.norm_pre."), (r"^visual_embed\.[12]\.", "backbone.norm."),
        (r"^(dgcnn_\d\.layer[1-4])\.0\.", r"\1.linear."), *_CLIP_BLOCK,
        (r"^(dgcnn_\d\.layer[1-4])\.1\.", r"\1.norm."), *_HUGGING_FACE_BLOCK]),
    "Segmenter": (r"^convs3(_cls)?\.", [
        (r"^(label_conv|propagation_0|convs\d|bns\d)_cls\.", r"\1."), (r"^convs1\.", "head.0."),
        (r"^bns1\.", "head.1."), (r"^convs2\.", "head.4."), (r"^bns2\.", "head.5."),
        (r"^convs3\.", "head.7."), (r"^propagation_0\.mlp_convs\.0\.", "propagation.0."),
        (r"^propagation_0\.mlp_bns\.0\.", "propagation.1."),
        (r"^propagation_0\.mlp_convs\.1\.", "propagation.3."),
        (r"^propagation_0\.mlp_bns\.1\.", "propagation.4."), *_ENCODER]),
    "Classifier": (r"^cls_head_finetune\.", [(r"^cls_head_finetune\.", "head."), *_ENCODER])}
_EXPORT = {"Student": (r"^encoder\.", [
    (r"^encoder\.patch_embed\.", "ACT_encoder.encoder."),
    (r"^encoder\.blocks\.", "ACT_encoder.blocks.blocks."), (r"^encoder\.", "ACT_encoder."),
    (r"^decoder\.", "ACT_decoder."), (r"^head\.", "proj_head.")])}
_KINDS = {"Teacher": (Teacher, TeacherConfig), "Student": (Student, StudentConfig),
          "Classifier": (Classifier, ClassifierConfig), "Segmenter": (Segmenter, SegmenterConfig)}

def load(path, device="cpu", **sizes):
    """The Teacher, Student, Classifier or Segmenter that a checkpoint holds, in eval mode.

    Reads our checkpoints, the official implementation's and Point-MAE's. Sizes are read off the
    tensors; what those cannot show comes from `sizes`, else it is the paper's: heads = width // 64
    (of a Teacher: its backbone's), num_group 64 (128 with a downstream head), group_size 32.
    Point-MAE's class token is newly initialised, with a warning. Raises ValueError if the file is
    missing, broken, of no known kind or unfit."""
    obj = read_tensors(path)
    fields = obj if isinstance(obj, dict) else {}
    kind, config, state = fields.get("kind"), fields.get("config"), fields.get("model")
    if not isinstance(config, dict) or not isinstance(state, dict):
        kind, state = _translate(_state_dict(obj, path), _OFFICIAL, path)
        for key, value in state.items():  # 1 x 1 convolutions are products here
            state[key] = value.flatten(1) if key.endswith(".weight") and value.ndim > 2 else value
    try:
        model_class, config_class = _KINDS[kind]
        config = {**(config or _official_config(kind, _fuse_qkv(state), path)), **sizes}
        if kind == "Teacher" and "num_heads" in config:
            config["backbone"] = {**config["backbone"], "num_heads": config.pop("num_heads")}
        model = model_class(config_class(**config))
    except Exception as error:  # as in load_pretrained
        raise ValueError(f"{path}: its tensors, or sizes, make no {kind}: {error!r}") from error
    if kind == "Student" != fields.get("kind") and "encoder.cls_token" not in state:
        warnings.warn(f"{path}: no class token; encoder.cls_token, cls_pos are newly initialised")
        for name in ("encoder.cls_token", "encoder.cls_pos"):
            state[name] = model.get_parameter(name).detach()
    return load_exactly(model, state, path).to(device).eval()

def _official_config(kind, state, path):
    """Config of a model of the official implementation, read off its tensors, under our names."""
    if kind == "Teacher":
        prefix = "backbone."
        backbone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        layout = "clip" if "norm_pre.weight" in backbone else "timm"
        layout = layout if "norm.weight" in backbone else "bert"
        prompts = state["visual_prompt_token"].shape[1] if "visual_prompt_token" in state else 0
        return dict(
            group_size=len(state["decoder.mlp.4.weight"]) * 4 // 3, num_prompt=prompts,
            num_tokens=len(state["codebook"]), tokens_dims=state["codebook"].shape[1],
            encoder_dims=len(state["encoder.second_conv.3.weight"]),
            decoder_dims=len(state["dgcnn_2.layer5.0.weight"]), weights=Path(path).name,
            prompt="deep" if "deep_prompt_tokens" in state else "shallow" if prompts else "none",
            backbone=asdict(_backbone_config(backbone, layout)))
    width = len(state["encoder.norm.weight"])
    blocks = [key for key in state if key.endswith(".norm1.weight")]
    depth = sum(key.startswith("encoder.") for key in blocks)
    config = dict(width=width, depth=depth, num_heads=max(1, width // 64),
                  encoder_dims=len(state["encoder.patch_embed.second_conv.3.weight"]))
    if kind == "Student":
        config.update(decoder_depth=len(blocks) - depth, target_dim=len(state["head.weight"]))
        if "encoder.cls_token" not in state:  # Point-MAE, which predicts the points
            config["group_size"] = config["target_dim"] // 3
    if kind == "Classifier":
        head, last = ("mlp3", 8) if "head.8.weight" in state else ("linear", 0)
        config.update(head=head, num_classes=len(state[f"head.{last}.weight"]))
    if kind == "Segmenter":
        label = state.get("label_conv.0.weight", torch.empty(0, 0))
        config.update(num_parts=len(state["head.7.weight"]), num_categories=label.shape[1])
    return config

def export(student, path):
    """Writes our Student in the official names and file form, for its fine-tuning scripts.

    Our config travels beside what those scripts read: `load` gives the same student back."""
    _, state = _translate(student.state_dict(), _EXPORT, path)
    for key, value in state.items():
        convolution = re.search(r"_conv\.[03]\.weight$", key)
        state[key] = value.unsqueeze(-1).cpu() if convolution else value.cpu()
    save({"base_model": state, "config": asdict(student.config), "epoch": 0, "metrics": {},
          "best_metrics": {}}, path)

def save(obj, path):
    """torch.save to a file beside `path` that takes its name when it is complete."""
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    try:
        torch.save(obj, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
