"""finetune.py and util/transfer.py: flags, checkpoints, protocols, the tasks as users run them."""

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import act
import common
import finetune
from common import SHORT, checkpoint, interrupt, randn, refused, rows_of, run_command, same
from util import clouds, datasets, files, run, synthetic, transfer

SIZES = dict(num_group=8, group_size=8, points=64, width=24, depth=2, num_heads=2, encoder_dims=24)


def config_of(**changed):
    values = dict(size="tiny", points=64, checkpoint="none")
    return finetune.Config(**values | changed)


@pytest.fixture
def command(shapes, student_run, tmp_path, monkeypatch, capsys):
    """command(flags): the command in an empty folder -> what it printed."""
    monkeypatch.chdir(tmp_path)
    usual = ["--data", shapes, "--checkpoint", student_run / "last.pt"]

    def command(flags):
        words = usual + flags.split()
        if "svm" not in words:
            words = SHORT + words
        run_command(finetune, *words)
        return capsys.readouterr().out

    return command


PUBLISHED = [  # name of the data, flags, points, augment
    ("ScanObjectNN, PB_T50_RS", dict(data="folder", size="base"), 2048, "rotate"),
    ("ModelNet40", dict(data="folder", size="base"), 1024, "scale_translate"),
    ("synthetic", dict(task="fewshot"), 1024, "scale_translate"),
    ("synthetic", dict(task="svm"), 512, "auto"),  # the checkpoint's points
]


@pytest.mark.parametrize("name, flags, points, augment", PUBLISHED)
def test_points_and_augmentation_follow_the_data_as_published(name, flags, points, augment):
    given = config_of(**dict(points=None) | flags)
    source = SimpleNamespace(config=SimpleNamespace(points=512))
    config = finetune.settle(replace(given, points=1024), given, SimpleNamespace(name=name), source)
    assert (config.points, config.augment) == (points, augment)


def test_what_does_not_fit_the_encoder_is_refused(command, student_run, teacher_run):
    state = checkpoint(student_run)
    state["config"]["encoder_dims"] = 16
    torch.save(state, "unfit.pt")
    Path("one/torus").mkdir(parents=True)
    for i in range(3):
        np.save(f"one/torus/{i}.npy", randn(100, 3, seed=i).numpy())
    mistakes = {
        "--data one": "2 or more classes",
        "--data one --task svm": "2 or more classes",
        "--task svm --weight-decay 1": "--weight-decay",
        "--task svm --features none/a.npz": "none/a.npz",
        "--way 3": "--way",
        "--task fewshot --features a": "--features",
        "--checkpoint nothing.pt": "train_student.py",
        "--checkpoint unfit.pt": "unfit.pt",
        f"--checkpoint {teacher_run}/last.pt": "Teacher",
        "--size base": "--size base",
        "--batch-size 1": "--batch-size",
    }
    for flags, word in mistakes.items():
        with refused(word):
            command(flags)


def test_sizes_are_the_checkpoints_or_else_the_flags_with_as_large_patches(student_run):
    source = act.load(student_run / "last.pt")
    sizes = transfer.encoder_sizes(config_of(points=128), source)
    assert (sizes["num_group"], sizes["width"]) == (2 * source.config.num_group, 32)
    assert transfer.encoder_sizes(config_of(size="base", points=2048), None)["num_group"] == 128


@pytest.mark.parametrize("protocol", ["mlp3", "linear"])
def test_protocols_that_freeze_leave_the_encoder_bit_identical(command, student_run, protocol):
    assert config_of(protocol=protocol).lr == 1e-3
    command(f"--protocol {protocol} --epochs 1 --out out")
    before, after = [act.load(path) for path in (student_run / "last.pt", "out/last.pt")]
    assert after.config.head == protocol
    assert same(dict(before.encoder.state_dict()), dict(after.encoder.state_dict()))


AUGMENT = [("rotate", clouds.rotate_y), ("scale_translate", clouds.scale_translate)]


@pytest.mark.parametrize("augment, function", AUGMENT)
def test_a_vote_is_by_the_mean_logits_of_augmented_samples(augment, function):
    split = synthetic.synthetic_clouds(2, num_points=100)
    config = config_of(vote=3, augment=augment)
    data = datasets.Dataset("", split, split)
    task = finetune.Classification(config, data, SIZES, torch.device("cpu"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * 3, 23))
    logits = 0
    for i in range(3):
        generator = run.seeded("cpu", config.seed, "vote", i, 0)
        xyz, _ = split.sample(torch.arange(46), 64, generator)
        logits = logits + model(function(xyz, generator))
    task.test = replace(split, labels=logits.argmax(dim=1))
    assert task.vote(model)["accuracy"] == 100


def test_classification_leaves_rows_metrics_and_a_model(command):
    printed = command("--epochs 2 --vote 2 --out out")
    new, unused = printed.split("newly initialised: ")[1].splitlines()[0].split("; not used: ")
    assert (new, "decoder" in unused, "cls_token" in unused) == ("head", True, False)
    first, second, last = rows_of("out")
    assert last["best_accuracy"] == max(first["accuracy"], second["accuracy"])
    assert {"confusion", "vote_accuracy", "vote_mean_accuracy", "best_epoch"} <= last.keys()
    assert Path("out/confusion.svg").exists() and Path("out/classify.png").exists()
    c = act.load("out/last.pt").config
    assert (c.class_names, c.points, c.normalized) == (["chair", "torus"], 64, True)


@pytest.mark.parametrize("least, most", [(150, 900), (1024, 1500)])
def test_eight_steps_tell_plain_shapes_apart_however_sparse(command, least, most, monkeypatch):
    sizes = dict(num_group=32, width=48, depth=2, num_heads=2, encoder_dims=48)
    monkeypatch.setitem(run.ENCODER_SIZES, "tiny", sizes)
    rng = np.random.default_rng(0)
    for shape, extent in dict(ball=[1, 1, 1], plate=[1, 0.1, 1], rod=[0.1, 1, 0.1]).items():
        Path("data", shape).mkdir(parents=True)
        for i in range(10):
            xyz = extent * rng.normal(size=(rng.integers(least, most), 3))
            np.save(f"data/{shape}/{i}.npy", xyz)
    flags = "--data data --points 1024 --batch-size 24 --checkpoint none --size tiny --steps 8"
    command(f"{flags} --out out")
    assert rows_of("out")[-1]["accuracy"] > 80


def test_statistics_of_a_loaded_encoder_move_by_a_tenth(command, student_run, monkeypatch):
    """A momentum of 1 leaves the statistics of the step's own clouds, as new norms have them."""
    command("--steps 1 --out usual")
    new_norms = run.new_norms
    monkeypatch.setattr(run, "new_norms", lambda model, step: new_norms(model, 9))
    command("--steps 1 --out step")
    old, usual, step = [checkpoint(folder)["model"] for folder in (student_run, "usual", "step")]
    for name in [name for name in usual if "running" in name]:
        expected = step[name]
        if name.startswith("encoder"):
            expected = 0.9 * old[name] + 0.1 * step[name]
        common.assert_close(usual[name], expected)


def test_a_run_that_was_interrupted_resumes_bit_for_bit(command, monkeypatch):
    flags = "--epochs 2 --augment scale_translate --out "
    command(flags + "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, "add", interrupt(3))
        command(flags + "half")
    assert "resumed" in command(flags + "half --resume")
    assert same(checkpoint("whole")["model"], checkpoint("half")["model"])
    assert rows_of("whole") == rows_of("half")


def test_an_episode_is_reproducible_and_holds_what_was_asked():
    split = synthetic.synthetic_clouds(5, num_points=64)
    data = datasets.Dataset("", split, split)
    first = finetune.draw_episode(data, way=2, shot=3, fold=2)
    assert first.train.names == finetune.draw_episode(data, 2, 3, fold=2).train.names
    assert first.train.names != finetune.draw_episode(data, 2, 3, fold=1).train.names
    assert first.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert first.test.labels.bincount().tolist() == [5, 5]  # fewer than 20: all
    for label, name in zip(first.test.labels, first.test.names, strict=True):
        assert name.startswith(first.test.classes[label])
    for way, shot, most in [(2, 9, "the 0"), (1, 3, ""), (99, 3, "the 23"), (2, 0, "")]:
        with refused(f"--shot {shot}", most):
            finetune.draw_episode(data, way, shot, fold=0)


@pytest.mark.parametrize("published", [False, True])
def test_few_shot_is_the_mean_and_deviation_of_ten_episodes(command, published):
    flags = "--task fewshot --way 2 --epochs 1 --out out --shot 3"
    if published:  # two classes, one to four test clouds, clouds with normals
        flags += " --data episodes"
        Path("episodes/2way_3shot").mkdir(parents=True)
        train = [(points, i % 2, 30 + i % 2) for i, points in enumerate(randn(4, 100, 6).numpy())]
        for fold in range(10):
            with refused(f"{fold}.pkl"):
                command(flags)
            assert not Path("out").exists()
            episode = pickle.dumps({"train": train, "test": train[: 1 + fold % 4]})
            Path(f"episodes/2way_3shot/{fold}.pkl").write_bytes(episode)
    assert "fold 3, 4 of 10" in command(flags)
    last = rows_of("out")[-1]
    assert len(last["folds"]) == 10 and rows_of("out/fold_3")[-1]["accuracy"] == last["folds"][3]
    assert last["accuracy"] == pytest.approx(np.mean(last["folds"]))
    assert last["accuracy_std"] == pytest.approx(np.std(last["folds"], ddof=1))


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
