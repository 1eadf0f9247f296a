"""Stage II: targets, masks, weights of --init, and the command as users run it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import act
import common
import train_student
import train_teacher
from common import STUDENT, TEACHER, checkpoint, randn, refused, rows_of, run_command, same
from util import datasets, run


@pytest.fixture
def flags(shapes, teacher_run):
    return STUDENT + ["--data", shapes, "--teacher", teacher_run / "last.pt"]


def train(flags, words, out, module=train_student):
    """Stage II, or another command, with these flags and words, into the folder `out`."""
    run_command(module, *flags, *words.split(), "--out", out)


# -- targets --------------------------------------------------------------------------------------
def test_losses_are_those_of_the_masked_patches_and_leave_the_teacher_alone(shapes, teacher_run):
    teacher = train_student.FixedTeacher(teacher_run / "last.pt", torch.device("cpu"))
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    xyz, _ = datasets.open_dataset(shapes).train.sample(torch.arange(4), 64)
    neighborhood, center = act.group_points(xyz, 8, 8)
    masked = torch.tensor([[1, 5]] * 4)
    prediction = randn(4, 2, 24).requires_grad_()

    def loss_of(target, dim, kind=None):
        loss = train_student.TARGETS[target].loss
        return loss(prediction[..., :dim], neighborhood, center, masked, teacher, kind).item()

    features = teacher.model.features(neighborhood, center)[:, [1, 5]]  # with prompts anew
    expected = act.distillation_loss(prediction[..., :16], features).item()
    assert loss_of("teacher", 16, "cosine") == pytest.approx(expected)
    codes = teacher.model.tokenize(neighborhood, center)[:, [1, 5]]
    expected = -prediction[..., :16].log_softmax(dim=-1).gather(2, codes[..., None]).mean().item()
    assert loss_of("codes", 16) == pytest.approx(expected, rel=1e-5)
    patches = neighborhood[:, [1, 5]].flatten(0, 1)
    expected = act.chamfer_distance(prediction.view(8, 8, 3), patches, norm=2).item()
    assert loss_of("coordinates", 24) == pytest.approx(expected, rel=1e-5)
    assert not teacher.model.training and same(before, dict(teacher.model.state_dict()))
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize("mask", ["random", "block"])
def test_processes_take_shares_of_the_patches_and_masks_of_one(mask):
    config = replace(train_student.Config(), mask=mask, mask_ratio=0.5)
    c = act.StudentConfig(num_group=8, group_size=8)
    xyz = randn(4, 64, 3)
    whole = train_student.draw_patches(xyz, config, c, 7, slice(None))
    assert whole[2].sum(dim=1).tolist() == [4] * 4
    share = train_student.draw_patches(xyz, config, c, 7, slice(1, None, 2))
    assert same(share, [part[1::2] for part in whole])


# -- the command ----------------------------------------------------------------------------------
RUNS = {  # words -> (num_group, group_size, target_dim), whether there is a reconstruction
    "--target teacher --mask block --loss smooth_l1": ((8, 8, 16), True),
    "--target backbone": ((8, 8, 192), False),
    "--target codes": ((8, 8, 16), False),
    "--target coordinates --teacher absent --set num_group=6 group_size=5": ((6, 5, 15), True),
}


@pytest.mark.parametrize("words", RUNS)
def test_a_run_with_every_target(tmp_path, flags, words):
    sizes, has_points = RUNS[words]
    train(flags, f"{words} --epochs 1", tmp_path)
    row, closing = rows_of(tmp_path)
    assert {"svm_untrained", "svm_trained"} <= closing.keys()
    assert len(row["cosine_per_depth"]) == 2
    files = {path.name for path in tmp_path.iterdir()}
    assert {"features.png", "features.ply", "loss.svg"} <= files
    assert ("reconstruction.png" in files) == has_points
    c = act.load(tmp_path / "last.pt").config
    assert (c.num_group, c.group_size, c.target_dim) == sizes
    assert (c.points, c.normalized) == (64, True)


def test_no_steps_train_nothing_and_evaluate(tmp_path, shapes, flags):
    train(flags, "--steps 0", tmp_path / "s")
    train(TEACHER + ["--data", shapes], "--steps 0", tmp_path / "t", train_teacher)
    for folder, before, after in (
        ("s", "svm_untrained", "svm_trained"),
        ("t", "cd_l1_before", "cd_l1_after"),
    ):
        (closing,) = rows_of(tmp_path / folder)
        assert closing["step"] == 0 and closing[before] == closing[after]


MISTAKES = {  # words -> what the message names
    "--teacher absent.pt": "train_teacher.py",
    "--mask-ratio 1": "--mask-ratio",
    "--set depth=2 num_group=4": "the teacher's patches",
    "--target coordinates --loss l2": "--loss",
}


def test_a_mistake_is_one_line_and_leaves_no_folder(tmp_path, flags):
    for words, named in MISTAKES.items():
        with refused(named):
            train(flags, words, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_init_takes_sizes_and_all_weights_that_fit(tmp_path, flags, student_run):
    init = common.SHORT + flags[len(STUDENT) :] + ["--init", student_run / "last.pt"]
    train(init, "--epochs 1 --lr 0 --weight-decay 0 --target coordinates", tmp_path / "b")
    first, second = [checkpoint(folder) for folder in (student_run, tmp_path / "b")]
    assert first["config"] | dict(target_dim=24) == second["config"]
    for name, value in first["model"].items():
        if not name.startswith("head.") and "running" not in name and "num_batches" not in name:
            assert torch.allclose(value, second["model"][name], atol=1e-4), name  # lr is from 1e-6


def test_one_cloud_is_enough_for_both_stages_and_may_lose_invalid_points(tmp_path, shapes):
    cloud = np.load(min(shapes.glob("*/*/*.npy")))
    cloud[7] = np.nan
    np.save(tmp_path / "cloud.npy", cloud)
    data = ["--data", tmp_path / "cloud.npy", "--epochs", 1, "--drop-invalid"]
    train(TEACHER + data, "", tmp_path / "t", train_teacher)
    train(STUDENT + data, f"--teacher {tmp_path}/t/last.pt", tmp_path / "s")
    assert checkpoint(tmp_path / "s")["step"] == 1
    assert "svm_trained" not in rows_of(tmp_path / "s")[-1]
    with refused("cloud.npy"):
        train(STUDENT + data[:-1], f"--teacher {tmp_path}/t/last.pt", tmp_path / "s")


def test_all_clouds_of_shapenet_are_pretrained_on(tmp_path, shapes, flags, monkeypatch):
    dataset = datasets.open_dataset(shapes)
    dataset = replace(dataset, everything=dataset.test)
    monkeypatch.setattr(datasets, "open_dataset", lambda *words: dataset)
    train(flags, "--epochs 1", tmp_path)
    assert checkpoint(tmp_path)["step"] == 1  # 4 clouds in batches of 4


@pytest.mark.parametrize("module", [train_teacher, train_student])
def test_a_run_cut_in_mid_epoch_resumes_to_the_same_bits(tmp_path, shapes, flags, module):
    if module is train_teacher:
        flags = TEACHER + ["--data", shapes]
    train(flags, "--steps 5", tmp_path / "whole", module)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, "add", common.interrupt(3))
        train(flags, "--steps 5", tmp_path / "cut", module)
    train(flags, "--steps 5 --resume", tmp_path / "cut", module)
    expected, resumed = [checkpoint(tmp_path / name) for name in ("whole", "cut")]
    for part in ("model", "optimizer", "epoch", "step", "random"):
        assert same(expected[part], resumed[part]), part
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")


def test_a_resumed_run_may_be_longer_and_nothing_else(tmp_path, flags):
    train(flags, "--steps 5", tmp_path)
    train(flags, "--steps 6 --resume", tmp_path)  # from the middle of an epoch
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 4, 5, 6, 6]
    for words, named in (("--lr 0.5", "lr"), ("--set depth=1", "set"), ("--steps 1", "steps")):
        with refused("last.pt", named):
            train(flags, f"--steps 6 --resume {words}", tmp_path)
