"""Stage II: targets, masks, weights of --init, and both stages as users run them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import act
import common
import train_student
import train_teacher
from common import assert_close, checkpoint, randn, refused, rows_of, same
from util import run, synthetic


@pytest.fixture
def train(shapes, teacher_run):
    """A function that runs a stage with these words into the folder `out`."""
    student = common.STUDENT + ["--teacher", teacher_run / "last.pt"]
    flags = {train_teacher: common.TEACHER, train_student: student}

    def run_stage(words, out, module=train_student):
        common.run_command(module, *flags[module], "--data", shapes, "--out", out, *words.split())

    return run_stage


def test_losses_are_those_of_the_masked_patches_and_leave_the_teacher_alone(teacher_run):
    teacher = train_student.FixedTeacher(teacher_run / "last.pt", "cpu")
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    neighborhood, center = act.group_points(randn(4, 64, 3), 8, 8)
    masked = torch.tensor([[1, 5]] * 4)
    x = randn(4, 2, 16)
    features = teacher.model.features(neighborhood, center)[:, [1, 5]]  # with prompts anew
    found = train_student.features_loss(x, neighborhood, center, masked, teacher, "cosine")
    assert_close(found, act.distillation_loss(x, features))
    codes = teacher.model.tokenize(neighborhood, center)[:, [1, 5], None]
    found = train_student.codes_loss(x, neighborhood, center, masked, teacher, None)
    assert_close(found, -x.log_softmax(dim=-1).gather(2, codes).mean())
    x = randn(4, 2, 24)
    patches = neighborhood[:, [1, 5]].flatten(0, 1)
    found = train_student.coordinates_loss(x, neighborhood, center, masked, None, None)
    assert_close(found, act.chamfer_distance(x.view(8, 8, 3), patches, norm=2))


RUNS = {  # words -> whether there is a picture of what is predicted
    "--epochs 1 --mask block --loss smooth_l1": True,
    "--epochs 1 --target backbone": False,
    "--steps 0 --target codes": False,
    "--steps 1 --target coordinates --teacher absent --set num_group=6": True,
}


@pytest.mark.parametrize("words", RUNS)
def test_a_run_with_every_target(tmp_path, train, words):
    train(words, tmp_path)
    closing = rows_of(tmp_path)[-1]
    assert closing["step"] > 0 or closing["svm_trained"] == closing["svm_untrained"]
    files = {path.name for path in tmp_path.iterdir()}
    assert {"features.png", "features.ply", "loss.svg"} <= files
    assert ("reconstruction.png" in files) == RUNS[words]


MISTAKES = {  # words -> what the message names
    "--teacher absent.pt": "train_teacher.py",
    "--data a --out a/b": "--out a/b",
    "--data a/b --out a": "--out a",
    "--set num_group=4": "the teacher's patches",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_folder(tmp_path, train, words):
    with refused(MISTAKES[words]):
        train(words, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_init_takes_sizes_and_all_weights_that_fit(tmp_path, shapes, student_run):
    words = common.SHORT + ["--data", shapes, "--init", student_run / "last.pt", "--out", tmp_path]
    common.run_command(train_student, *words, "--lr", 0, "--steps", 1, "--target", "coordinates")
    first, second = [checkpoint(folder) for folder in (student_run, tmp_path)]
    assert first["config"] | dict(target_dim=24) == second["config"]
    for name, value in first["model"].items():
        if not name.startswith("head.") and "running" not in name and "num_batches" not in name:
            assert torch.allclose(value, second["model"][name], atol=1e-4), name  # lr is from 1e-6


def test_a_student_knows_the_frame_of_its_training_clouds_as_stored():
    split = synthetic.synthetic_clouds(1, num_points=64)
    split = replace(split, points=3 * split.points + 7, normalized=False)
    config = train_student.Config(target="coordinates", points=64, size="tiny")
    c = train_student.student_config(config, None, None, split)
    assert (c.center, c.radius) == split.frame() and not c.normalized


def test_one_cloud_is_enough_for_both_stages_and_may_lose_invalid_points(tmp_path, train):
    np.save(tmp_path / "cloud.npy", torch.cat([randn(99, 3), torch.full((1, 3), torch.nan)]))
    words = f"--data {tmp_path}/cloud.npy --epochs 1 --drop-invalid"
    train(words, tmp_path / "t", train_teacher)
    train(words + f" --teacher {tmp_path}/t/last.pt", tmp_path / "s")
    assert "svm_trained" not in rows_of(tmp_path / "s")[-1]


@pytest.mark.parametrize("module", [train_teacher, train_student])
def test_a_run_cut_in_mid_epoch_resumes_to_the_same_bits_and_on(tmp_path, train, module):
    train("--steps 5", tmp_path / "whole", module)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, "add", common.interrupt(3))
        train("--steps 5", tmp_path / "cut", module)
    train("--steps 5 --resume", tmp_path / "cut", module)
    expected, resumed = [checkpoint(tmp_path / name) for name in ("whole", "cut")]
    for part in ("model", "optimizer", "epoch", "step", "random"):
        assert same(expected[part], resumed[part]), part
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")
