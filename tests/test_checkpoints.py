"""act.py's reading and writing: weights in timm's names, checkpoints of its own models."""

import os
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

import act
import common
from common import assert_close, make, randn, refused

IMAGES = randn(2, 3, 12, 12, seed=7)


def timm_file(folder, name, change):
    """A ViT and its file under timm's names: class token, 3 x 3 patches of 4 x 4 pixels."""
    torch.manual_seed(0)
    sizes = act.BackboneConfig(192, 2, 3, 16, patch_size=4, grid=3, num_prefix=1)
    model = common.randomise(act.Backbone(sizes)).eval()
    state = model.state_dict()
    token = state.pop("prefix_tokens")
    state["cls_token"] = token - 0.5
    state["pos_embed"] = torch.cat([torch.full_like(token, 0.5), state["pos_embed"]], dim=1)
    state["head.weight"] = torch.ones(2)
    state.update(change)
    state = {key: value for key, value in state.items() if value is not None}
    path = folder / name
    if path.suffix == ".npz":
        np.savez(path, **state)
    else:
        torch.save({"model": state, "epoch": 3}, path)
    return model, path


@pytest.mark.parametrize("name", ["a.pth", "a.npz"])
def test_a_file_in_timms_names_gives_its_transformer_and_is_named_if_cut_short(tmp_path, name):
    model, path = timm_file(tmp_path, name, {})
    loaded = act.load_pretrained(path)
    assert not loaded.training and loaded.config == model.config
    assert_close(loaded.forward_features(IMAGES), model.forward_features(IMAGES))
    data = path.read_bytes()
    for share in (0.9, 0.5, 0):
        path.write_bytes(data[: int(share * len(data))])
        with refused(path):
            act.load_pretrained(path)


@pytest.mark.parametrize("name", ["a.pth", "a.npz"])
def test_code_in_a_file_is_not_run(tmp_path, name):
    trace = tmp_path / "trace"
    hostile = common.Hostile(trace)
    if name == "a.npz":
        hostile = np.array([hostile], dtype=object)
    _, path = timm_file(tmp_path, name, {"code": hostile})
    for read in (act.load_pretrained, act.load):
        with refused(path):
            read(path)
    assert not trace.exists()


UNFIT = {  # a tensor of the file -> what is in its place (None: nothing)
    "fc_norm.weight": torch.ones(2),
    "blocks.1.mlp.fc2.bias": None,
    "blocks.0.attn.qkv.weight": None,
    "norm.weight": torch.ones(2),
}


@pytest.mark.parametrize("name", UNFIT)
def test_weights_that_do_not_fit_are_named(tmp_path, name):
    _, path = timm_file(tmp_path, "a.pth", {name: UNFIT[name]})
    with refused(path, name):
        act.load_pretrained(path)


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


OWN = {
    "Teacher": partial(common.make_teacher, "CLIP", prompt="shallow"),
    "Student": partial(make, "Student", points=77, normalized=False),
    "Classifier": partial(make, "Classifier", class_names=["a", "b"], head="linear"),
    "Segmenter": partial(make, "Segmenter", class_names=["x"], part_ranges=[[0, 2], [2, 5]]),
}


def save(path, name, **change):
    """Writes the checkpoint of a model and returns the model."""
    model = OWN[name]()
    checkpoint = {"kind": name, "config": asdict(model.config), "model": model.state_dict()}
    act.save(checkpoint | change, path)
    return model


@pytest.mark.parametrize("kind", OWN)
def test_a_checkpoint_gives_its_model_back(tmp_path, kind):
    model = save(tmp_path / "last.pt", kind)
    loaded = act.load(str(tmp_path / "last.pt"), device="cpu")
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.config == model.config
    assert not common.moved(model, loaded)


WRONG = {  # what the message names -> a change of a student's checkpoint
    "Detector": {"kind": "Detector"},
    "kind": {"kind": ["x"]},
    "config": {"config": 3},
    "foo": {"config": {"foo": 1}},
    "encoder.blocks.3": {"config": common.ENCODER | {"depth": 5}},
    "5 heads": {"config": common.ENCODER | {"num_heads": 5}},
}


@pytest.mark.parametrize("word", WRONG)
def test_checkpoints_that_do_not_fit_are_named(tmp_path, word):
    save(tmp_path / "last.pt", "Student", **WRONG[word])
    with refused(tmp_path / "last.pt", word):
        act.load(tmp_path / "last.pt")


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path):
    path = tmp_path / "last.pt"
    act.save({"step": 3}, path)
    with pytest.raises(Exception, match="pickle"):
        act.save({"step": 4, "code": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert os.listdir(tmp_path) == ["last.pt"]
    with refused(tmp_path / "nowhere"):
        act.save({}, tmp_path / "nowhere" / "last.pt")
