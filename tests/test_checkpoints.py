"""act.py's reading and writing: weights in timm's names, checkpoints of its own models."""

import os
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

import act
import common
from common import assert_close, make, randn, refused

SIZES = act.BackboneConfig(width=128, depth=2, num_heads=2, mlp_hidden=160)
IMAGES = randn(2, 3, 12, 12, seed=7)


def timm_file(folder, name="weights.pth", **change):
    """A ViT and its file under timm's names: class token, 3 x 3 patches of 4 x 4 pixels."""
    torch.manual_seed(0)
    model = act.Backbone(replace(SIZES, patch_size=4, grid=3, num_prefix=1))
    model = common.randomise(model).eval()
    state = model.state_dict()
    token = state.pop("prefix_tokens")
    state["cls_token"] = token - 0.5
    state["pos_embed"] = torch.cat([torch.full_like(token, 0.5), state["pos_embed"]], dim=1)
    state["head.weight"] = torch.ones(2)
    for key, value in change.items():
        state[key.replace("__", ".")] = value
    state = {key: value for key, value in state.items() if value is not None}
    path = folder / name
    if path.suffix == ".npz":
        np.savez(path, **state)
    else:
        torch.save({"model": state, "epoch": 3}, path)
    return model, path


@pytest.mark.parametrize("name", ["weights.pth", "weights.npz"])
def test_a_file_in_timms_names_gives_its_transformer(tmp_path, name):
    model, path = timm_file(tmp_path, name)
    loaded = act.load_pretrained(path)
    assert not loaded.training
    assert loaded.config == model.config
    assert_close(loaded.forward_features(IMAGES), model.forward_features(IMAGES))


def test_safetensors_are_read_by_their_suffix(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True])}
    safetensors.save_file(state, tmp_path / "x.safetensors")
    read = act.read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == state.keys()
    common.assert_equal([read["a"], read["b"]], [state["a"], state["b"]])


def test_images_of_another_size_resample_the_positions():
    model = act.Backbone(act.BackboneConfig(width=4, depth=0, num_heads=1, patch_size=4, grid=4))
    model.norm = nn.Identity()  # what goes in comes out
    with torch.no_grad():
        model.patch_embed["proj"].bias.zero_()
        model.pos_embed.copy_(torch.arange(4.0).repeat(4)[None, :, None])  # a ramp in each row
    ramp = model.forward_features(torch.zeros(1, 3, 8, 32)).view(2, 8, 4)
    assert_close(ramp, ramp[:1, :, :1].expand_as(ramp))  # the same in all rows and channels
    assert_close(ramp[0, 3:5, 0], torch.tensor([1.25, 1.75]), 1e-4)  # half-pixel centres
    assert (ramp[0].diff(dim=0) > 0).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"fc_norm.weight": torch.ones(2)}, ["fc_norm.weight"]),
        ({"blocks.1.mlp.fc2.bias": None}, ["blocks.1.mlp.fc2.bias"]),
        ({"blocks.0.attn.qkv.weight": None}, ["blocks.0.attn.qkv.weight"]),
        ({"norm.weight": torch.ones(2)}, ["norm.weight", 2, 128]),
        ({"cls_token": None}, ["cls_token"]),
        ({"pos_embed": torch.ones(1, 129, 128)}, ["square", 129]),  # 16 x 8 and a class token
        ({"cls_token": torch.ones(1, 1, 7)}, ["128"]),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    _, path = timm_file(tmp_path, **change)
    with refused(path, *words):
        act.load_pretrained(path)


@pytest.mark.parametrize("name", ["a.pth", "a.npz"])
@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_a_file_cut_short_is_named(tmp_path, name, share):
    _, path = timm_file(tmp_path, name)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with refused(path):
        act.load_pretrained(path)


@pytest.mark.parametrize("name", ["a.pth", "a.npz"])
def test_code_in_a_file_is_not_run(tmp_path, name):
    trace = tmp_path / "trace"
    path = tmp_path / name
    if name == "a.npz":
        np.savez(path, cls=np.array([common.Hostile(trace)], dtype=object))
    else:
        torch.save({"model": {}, "epoch": common.Hostile(trace)}, path)
    for read in (act.load_pretrained, act.load):
        with refused(path):
            read(path)
    assert not trace.exists()


OWN = {
    "Teacher": partial(common.make_teacher, "CLIP", prompt="shallow"),
    "Student": partial(make, "Student", points=77, normalized=False),
    "Classifier": partial(make, "Classifier", class_names=["a", "b"], head="linear"),
    "Segmenter": partial(make, "Segmenter", class_names=["x"], part_ranges=[[0, 2], [2, 5]]),
}


def own_checkpoint(kind):
    model = OWN[kind]()
    return model, {"kind": kind, "config": asdict(model.config), "model": model.state_dict()}


@pytest.mark.parametrize("kind", OWN)
def test_a_checkpoint_gives_its_model_back(tmp_path, kind):
    model, checkpoint = own_checkpoint(kind)
    act.save(checkpoint, tmp_path / "last.pt")
    loaded = act.load(str(tmp_path / "last.pt"), device="cpu")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.config == model.config
    assert not common.moved(model, loaded)


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path):
    path = tmp_path / "last.pt"
    act.save({"step": 3}, path)
    with pytest.raises(Exception, match="pickle"):
        act.save({"step": 4, "code": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert os.listdir(tmp_path) == ["last.pt"]
    with refused(tmp_path / "nowhere"):
        act.save({}, tmp_path / "nowhere" / "last.pt")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "Detector"}, ["Detector"]),
        ({"kind": ["x"]}, ["kind"]),
        ({"config": 3}, ["config"]),
        ({"config": {"foo": 1}}, ["foo"]),
        ({"config": common.ENCODER | {"depth": 5}}, ["encoder.blocks.3"]),
        ({"config": common.ENCODER | {"num_heads": 5}}, [5, 12]),
    ],
    ids=str,
)
def test_checkpoints_that_do_not_fit_are_named(tmp_path, change, words):
    _, checkpoint = own_checkpoint("Student")
    path = tmp_path / "last.pt"
    act.save(checkpoint | change, path)
    with refused(path, *words):
        act.load(path)


@pytest.mark.parametrize("content", [[1], {"a": torch.ones(2)}], ids=str)
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "last.pt"
    with refused(path):
        act.load(path)
    torch.save(content, path)
    with refused(path):
        act.load(path)
