"""act.py's reading and writing: weights in timm's names, checkpoints of its own models."""

import os
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch

import act
import common
from common import assert_close, make, randn, refused

HOSTILE = {"a.pth": common.Hostile, "a.npz": lambda name: np.array([common.Hostile(name)], object)}


def timm_file(folder, name, change):
    """A ViT and its file under timm's names: class token, 3 x 3 patches of 4 x 4 pixels."""
    sizes = act.BackboneConfig(192, 2, 3, 16, patch_size=4, grid=3, num_prefix=1)
    model = common.randomise(act.Backbone(sizes)).eval()
    state = model.state_dict()
    token = state.pop("prefix_tokens")
    state["cls_token"] = token - 0.5
    state["pos_embed"] = torch.cat([torch.full_like(token, 0.5), state["pos_embed"]], dim=1)
    state["head.weight"] = torch.ones(2)
    state = {key: value for key, value in (state | change).items() if value is not None}
    if name.endswith(".npz"):
        np.savez(folder / name, **state)
    else:
        torch.save({"model": state, "epoch": 3}, folder / name)
    return model, folder / name


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_in_timms_names_gives_its_transformer_and_runs_no_code(tmp_path, name):
    model, path = timm_file(tmp_path, name, {})
    loaded = act.load_pretrained(path)
    assert not loaded.training and loaded.config == model.config
    images = randn(2, 3, 12, 12)
    assert_close(loaded.forward_features(images), model.forward_features(images))
    path.write_bytes(path.read_bytes()[:-99])
    with refused(path):
        act.load_pretrained(path)
    timm_file(tmp_path, name, {"blocks.1.mlp.fc2.bias": None})
    with refused(path, "blocks.1.mlp.fc2.bias"):
        act.load_pretrained(path)
    timm_file(tmp_path, name, {"code": HOSTILE[name](tmp_path / "trace")})
    for read in (act.load_pretrained, act.load):
        with refused(path):
            read(path)
    assert not (tmp_path / "trace").exists()


def test_images_of_another_size_resample_the_positions():
    model = act.Backbone(act.BackboneConfig(width=4, depth=0, num_heads=1, patch_size=4, grid=4))
    model.norm = torch.nn.Identity()  # what goes in comes out
    model.patch_embed["proj"].bias.data.zero_()
    model.pos_embed.data.copy_(torch.arange(4.0).repeat(4)[None, :, None])  # a ramp in each row
    ramp = model.forward_features(torch.zeros(1, 3, 8, 32)).view(2, 8, 4)
    expected = torch.tensor([1.25, 1.75]).expand(2, 4, 2).mT  # half-pixel centres, in both rows
    assert_close(ramp[:, 3:5], expected, 1e-4)


OWN = {
    "Teacher": partial(common.make_teacher, "CLIP", prompt="shallow"),
    "Student": partial(make, "Student", points=77, normalized=False),
    "Classifier": partial(make, "Classifier", class_names=["a", "b"], head="linear"),
    "Segmenter": partial(make, "Segmenter", class_names=["x"], part_ranges=[[0, 2], [2, 5]]),
}


def save(path, name, **change):
    """Writes the checkpoint of a model and returns the model."""
    model = OWN[name]()
    act.save(dict(kind=name, config=asdict(model.config), model=model.state_dict()) | change, path)
    return model


@pytest.mark.parametrize("kind", OWN)
def test_a_checkpoint_gives_its_model_back(tmp_path, kind):
    model = save(tmp_path / "last.pt", kind)
    loaded = act.load(str(tmp_path / "last.pt"))
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.config == model.config and not common.moved(model, loaded)


WRONG = {  # what the message names -> a change of a student's checkpoint
    "Detector": {"kind": "Detector"},
    "kind": {"kind": ["x"]},
    "foo": {"config": {"foo": 1}},
    "encoder.blocks.3": {"config": common.ENCODER | {"depth": 5}},
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
