"""finetune.py and util/transfer.py: flags, checkpoints, protocols, the tasks as users run them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import act
import common
import finetune
from common import SHORT, checkpoint, interrupt, refused, rows_of, run_command, same
from util import clouds, datasets, files, run, synthetic


@pytest.fixture
def command(shapes, student_run, capsys):
    """command(flags): the command -> what it printed."""

    def command(flags):
        words = ["--data", shapes, "--checkpoint", student_run / "last.pt"]
        if "svm" not in flags:
            words += SHORT
        run_command(finetune, *words, *flags.split())
        return capsys.readouterr().out

    return command


def test_points_and_augmentation_follow_the_data_as_published():
    published = [  # name of the data, flags, points, augment
        ("ScanObjectNN, PB_T50_RS", dict(data="folder", size="base"), 2048, "rotate"),
        ("synthetic", dict(task="fewshot"), 1024, "scale_translate"),
        ("synthetic", dict(task="svm"), 512, "auto"),  # the checkpoint's points
    ]
    source = common.make("Student", points=512)
    for name, flags, points, augment in published:
        given = finetune.Config(**flags)
        data = datasets.Dataset(name, None, None)
        config = finetune.settle(replace(given, points=1024), given, data, source)
        assert (config.points, config.augment) == (points, augment)


def test_data_flags_and_checkpoints_that_do_not_fit_are_refused(command, shapes, teacher_run):
    shutil.copytree(shapes / "train/torus", "one/torus")
    Path("episodes/5way_10shot").mkdir(parents=True)
    mistakes = {
        "--data one": "sub-folder for each class",
        "--data episodes --task fewshot": "5way_10shot/0.pkl",
        "--task svm --weight-decay 1": "--weight-decay",
        "--checkpoint nothing.pt": "train_student.py",
        f"--checkpoint {teacher_run}/last.pt": "Teacher",
        "--size base": "--size base",
        "--batch-size 1": "--batch-size",
    }
    for flags, word in mistakes.items():
        with refused(word):
            command(flags)


def test_a_model_knows_the_frame_of_clouds_as_stored_and_votes_by_the_mean_of_augmented_samples():
    split = replace(synthetic.synthetic_clouds(2, num_points=100), normalized=False)
    split.points = 3 * split.points + 7
    config = finetune.Config(points=64, vote=3, augment="rotate")
    data = datasets.Dataset("", split, split)
    task = finetune.Classification(config, data, common.PATCHES, torch.device("cpu"))
    assert not task.sizes.normalized and (task.sizes.center, task.sizes.radius) == split.frame()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * 3, 23))
    logits = 0
    for i in range(3):
        generator = run.seeded("cpu", config.seed, "vote", i, 0)
        xyz, _ = split.sample(torch.arange(46), 64, generator)
        logits = logits + model(clouds.rotate_y(xyz, generator))
    task.test = replace(split, labels=logits.argmax(dim=1))
    assert task.vote(model)["accuracy"] == 100


def test_an_interrupted_run_resumes_bit_for_bit_to_the_same_figures_and_model(command, monkeypatch):
    flags = "--epochs 2 --vote 2 --augment scale_translate --out "
    assert "newly initialised: head; not used: " in command(flags + "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, "add", interrupt(3))
        command(flags + "half")
    assert "resumed" in command(flags + "half --resume")
    assert same(checkpoint("whole")["model"], checkpoint("half")["model"])
    assert rows_of("whole") == rows_of("half")
    first, second, last = rows_of("half")
    assert last["best_accuracy"] == max(first["accuracy"], second["accuracy"])
    assert {"confusion", "vote_accuracy", "vote_mean_accuracy", "best_epoch"} <= last.keys()
    assert Path("half/confusion.png").exists() and Path("half/classify.png").exists()
    c = act.load("half/last.pt").config
    assert (c.class_names, c.points, c.normalized) == (["chair", "torus"], 64, True)


def test_eight_steps_tell_thirty_sparse_clouds_of_three_plain_shapes_apart(command, monkeypatch):
    monkeypatch.setitem(run.ENCODER_SIZES, "tiny", common.ENCODER | {"width": 48, "num_group": 32})
    rng = np.random.default_rng(0)
    for shape, extent in dict(ball=[1, 1, 1], plate=[1, 0.1, 1], rod=[0.1, 1, 0.1]).items():
        Path("data", shape).mkdir(parents=True)
        for i in range(10):
            np.save(f"data/{shape}/{i}.npy", extent * rng.normal(size=(rng.integers(150, 900), 3)))
    command("--data data --points 1024 --batch-size 24 --checkpoint none --steps 8 --out out")
    assert rows_of("out")[-1]["accuracy"] > 80
    assert act.load("out/last.pt").config.num_group == 64


def test_an_episode_is_reproducible_and_holds_what_was_asked():
    split = synthetic.synthetic_clouds(5, num_points=64)
    data = datasets.Dataset("", split, split)
    first, again, other = [finetune.draw_episode(data, 2, 3, fold) for fold in (2, 2, 1)]
    assert again.train.names == first.train.names != other.train.names
    assert first.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert first.test.labels.bincount().tolist() == [5, 5]  # fewer than 20: all
    for label, name in zip(first.test.labels, first.test.names, strict=True):
        assert name.startswith(first.test.classes[label])
    with refused("--way 2 --shot 9"):
        finetune.draw_episode(data, 2, 9, fold=0)


def test_few_shot_is_over_ten_episodes_and_linear_leaves_the_encoder(command, student_run):
    command("--task fewshot --way 2 --shot 3 --epochs 1 --protocol linear --out out")
    folds = [rows_of(f"out/fold_{k}")[-1]["accuracy"] for k in range(10)]
    expected = dict(folds=folds, accuracy=np.mean(folds), accuracy_std=np.std(folds, ddof=1))
    assert rows_of("out")[-1] | expected == rows_of("out")[-1]
    before, after = [act.load(folder / "last.pt") for folder in (student_run, Path("out/fold_3"))]
    assert after.config.head == "linear"
    assert same(dict(before.encoder.state_dict()), dict(after.encoder.state_dict()))


def test_the_svms_features_are_the_students_own(command, student_run, shapes):
    command("--task svm --out svm --features svm.npz")
    assert {"accuracy", "C", "task", "checkpoint", "seed"} <= rows_of("svm")[-1].keys()
    stored = np.load("svm.npz")
    assert stored["split"].tolist() == ["train"] * 8 + ["test"] * 4
    model = act.load(student_run / "last.pt")
    for name, feature in zip(stored["names"], stored["features"], strict=True):
        xyz = torch.from_numpy(files.read_cloud(shapes / name, model.config.points))
        own = act.global_feature(model.encode(xyz[None]))[0]
        assert np.allclose(feature, own.detach().numpy(), atol=1e-4)
