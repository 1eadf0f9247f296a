"""Tests, continued."""
import hashlib
import http.server
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st

import act
import clouds as shapes
import training
import finetune

torch.set_num_threads(1)  # clouds are tiny here: threads would only wait for one another
import test_act
from test_act import build, close, few, randn, release_names, released, saved


# =====================================================================================================================
# the scripts, resuming, processes
# =====================================================================================================================

# -- scripts ----------------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent


def script(name, *args, processes=0, timeout=170):
    """Runs a script as a user would -> CompletedProcess."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.run([sys.executable, *launch, str(HERE / name) if "/" not in str(name) else str(name), *map(str, args)],
                          capture_output=True, text=True, timeout=timeout, env=env)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def cloud_folder(tmp_path_factory):
    """8 training and 4 test clouds of two classes as .npy files."""
    root = tmp_path_factory.mktemp("clouds")
    clouds = shapes.synthetic_clouds(6, seed=3, num_points=600)
    for i, label in enumerate(clouds.labels.tolist()):
        if clouds.classes[label] in ("torus", "chair"):
            path = root / ("train" if i % 6 < 4 else "test") / clouds.classes[label] / f"{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, clouds[i].numpy())
    return root


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory, cloud_folder):
    out = tmp_path_factory.mktemp("teacher")
    done = script("train_teacher.py", "--data", cloud_folder, "--weights", "random", "--steps", 3, "--batch-size", 4, "--log-every", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_stage_one_leaves_its_results(teacher_run):
    out, done = teacher_run
    assert any(line.startswith("epoch 1 ") for line in done.stdout.splitlines())
    assert {"last.pt", "metrics.jsonl", "config.json", "reconstruction.png", "reconstruction.ply", "loss.png"} <= {p.name for p in out.iterdir()}
    closing = log_of(out)[-1]
    for key in ("cd_l1", "cd_l2", "fscore"):
        assert closing[f"{key}_before"] >= 0 and closing[f"{key}_after"] >= 0
    for row in log_of(out)[:-1]:
        assert {"epoch", "step", "seconds", "loss", "reconstruction", "kl", "lr", "temperature", "grad_norm"} <= set(row)
    teacher = act.load(out / "last.pt")
    assert isinstance(teacher, act.Teacher) and not teacher.training and teacher.config.weights == "random"


def test_the_closing_figure_is_that_of_the_saved_teacher(teacher_run, cloud_folder):
    import train_teacher
    out, _ = teacher_run
    figures = train_teacher.evaluate(act.load(out / "last.pt"), shapes.open_clouds(cloud_folder, "test"), 1024, 0)
    assert figures["cd_l1"] == pytest.approx(log_of(out)[-1]["cd_l1_after"], rel=1e-4)


@pytest.mark.parametrize("target, extra", [("teacher", ["--mask", "block"]), ("teacher", ["--loss", "smooth_l1"]),
                                           ("coordinates", []), ("codes", [])])
def test_stage_two_runs_with_every_target(tmp_path, teacher_run, cloud_folder, target, extra):
    done = script("train_student.py", "--data", cloud_folder, "--teacher", teacher_run[0] / "last.pt", "--target", target, "--steps", 2,
                  "--batch-size", 4, "--out", tmp_path, *extra)
    assert done.returncode == 0, done.stderr
    closing = log_of(tmp_path)[-1]
    assert 0 <= closing["svm_trained"] <= 100 and 0 <= closing["svm_untrained"] <= 100
    assert {"reconstruction.png", "features.png", "loss.png", "config.json"} <= {p.name for p in tmp_path.iterdir()}
    student, teacher = act.load(tmp_path / "last.pt"), act.load(teacher_run[0] / "last.pt")
    assert student.config.num_group == teacher.config.num_group
    assert student.config.target_dim == dict(teacher=teacher.config.decoder_dims, coordinates=3 * teacher.config.group_size,
                                             codes=teacher.config.num_tokens)[target]


def test_a_killed_run_resumes_bit_for_bit(tmp_path, teacher_run, cloud_folder):
    args = ["--data", str(cloud_folder), "--teacher", str(teacher_run[0] / "last.pt"), "--steps", "9", "--batch-size", "3", "--log-every", "1",
            "--save-minutes", "0"]
    whole = script("train_student.py", *args, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    cut = subprocess.Popen([sys.executable, str(HERE / "train_student.py"), *args, "--out", str(tmp_path / "cut")], env=env,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / "metrics.jsonl"
    while cut.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 5):  # in the second epoch
        time.sleep(0.01)
    cut.kill()
    cut.wait()
    resumed = script("train_student.py", *args, "--out", tmp_path / "cut", "--resume")
    assert resumed.returncode == 0 and "resumed" in resumed.stdout, resumed.stderr
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert one["step"] == two["step"] == 9
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values()) for k in a)
    first, second = log_of(tmp_path / "whole"), log_of(tmp_path / "cut")
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in first] == [{k: v for k, v in row.items() if k != "seconds"} for row in second]


def test_sigterm_saves_and_says_how_to_resume(tmp_path, cloud_folder):
    args = ["--data", str(cloud_folder), "--weights", "random", "--epochs", "1000", "--batch-size", "4", "--out", str(tmp_path)]
    run = subprocess.Popen([sys.executable, str(HERE / "train_teacher.py"), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "epoch 1 " not in run.stdout.readline():
        assert run.poll() is None
    run.terminate()
    out, err = run.communicate(timeout=60)
    assert run.returncode == 143 and "--resume" in out and err == "", err
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] >= 1 and state["kind"] == "Teacher"
    refused = script("train_teacher.py", *args, "--resume", "--lr", "0.1")
    assert refused.returncode == 2 and "--lr was 0.001, is 0.1" in refused.stderr


DRIVER = '''
import os, sys, torch, act, training
import clouds as shapes
from dataclasses import dataclass  # of the driver

@dataclass
class Config(training.RunConfig):
    out: str = training.flag("runs/x", "")
    crash: bool = training.flag(False, "")

def main():
    config = training.parse_flags(Config, "")
    device, rank, world = training.start_processes(config)
    config = training.resolve(config, device, {"tiny": dict(epochs=2, batch_size=5)})
    clouds = shapes.open_clouds(config.data)
    torch.manual_seed(0)
    sizes = act.StudentConfig(num_group=16, group_size=8, width=64, depth=2, num_heads=1, encoder_dims=64, target_dim=24, drop_path=0.0, decoder_depth=1)
    run = training.Run(config, act.Student(sizes), clouds, 0.05)
    def loss(net, step, indices, generator, share):
        if config.crash and rank == 1 and step == 1:
            raise ValueError("process 1 found a bad cloud")
        if step == int(os.environ.get("DIE_AT", -1)):
            os._exit(9)
        xyz, _ = clouds.draw(indices, 128, generator)
        neighborhood, center = act.group_points(shapes.scale_translate(xyz, generator), 16, 8)
        mask = act.random_mask(center, 0.5, act.seeded("cpu", step))[share]
        neighborhood, center = neighborhood[share], center[share]
        masked = act.split_mask(mask, device)[1]
        truth = act.gather_points(neighborhood.flatten(2), masked)
        return act.distillation_loss(net(neighborhood, center, mask), truth, "l2"), {}
    run.train(lambda step: dict(lr=1e-3), loss)
    run.close(rank=rank)

training.run_script(main)
'''


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER)
    return path


def test_two_processes_give_the_losses_of_one(tmp_path, cloud_folder, driver):
    """An odd batch, so that the shares differ; BatchNorm is synchronised; one writer."""
    args = ["--data", cloud_folder, "--lr", "1e-3", "--log-every", 1, "--batch-size", 5, "--precision", "fp32"]
    one = script(driver, *args, "--steps", 6, "--out", tmp_path / "one")
    two = script(driver, *args, "--steps", 6, "--out", tmp_path / "two", processes=2)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    first, second = ([row["loss"] for row in log_of(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert len(first) == 6 and first == pytest.approx(second, rel=2e-4)
    for (key, a), b in zip(*(act.load(tmp_path / name / "last.pt").state_dict().items() if name == "one" else
                             act.load(tmp_path / name / "last.pt").state_dict().values() for name in ("one", "two"))):
        if "running_var" in key:  # means hold biases that a following BatchNorm cancels, which Adam lets drift
            assert torch.allclose(a, b, rtol=1e-3), key
    assert sum("seconds" in row and "loss" not in row for row in log_of(tmp_path / "two")) == 1


def test_a_run_of_two_processes_killed_in_mid_epoch_resumes_as_one(tmp_path, cloud_folder, driver, monkeypatch):
    args = ["--data", cloud_folder, "--log-every", 1, "--batch-size", 2, "--lr", "1e-3", "--precision", "fp32", "--save-minutes", 0,
            "--steps", 18]  # 6 an epoch; two processes agree to save at step 16
    whole = script(driver, *args, "--out", tmp_path / "whole")
    monkeypatch.setenv("DIE_AT", "17")
    assert script(driver, *args, "--out", tmp_path / "cut", processes=2).returncode != 0
    monkeypatch.delenv("DIE_AT")
    resumed = script(driver, *args, "--out", tmp_path / "cut", "--resume")
    assert whole.returncode == 0 and resumed.returncode == 0 and "at step 16" in resumed.stdout, whole.stderr + resumed.stderr
    first, second = ([row["loss"] for row in log_of(tmp_path / name) if "loss" in row] for name in ("whole", "cut"))
    assert len(first) == 18 and first == pytest.approx(second, rel=0.05)  # means of the epoch so far: a lost share would halve them


def test_an_error_in_one_process_ends_all_with_its_message(tmp_path, cloud_folder, driver):
    done = script(driver, "--data", cloud_folder, "--lr", "1e-3", "--steps", 6, "--out", tmp_path / "x", "--crash", processes=2)
    assert done.returncode != 0 and "process 1 found a bad cloud" in done.stderr


# -- schedules --------------------------------------------------------------------------------------------------------

def test_schedules_at_their_ends_and_middle():
    import train_teacher
    long = train_teacher.PUBLISHED_STEPS
    assert train_teacher.temperature(0, long) == 1 and train_teacher.temperature(100_000, long) == 0.0625
    assert train_teacher.temperature(50_000, long) == pytest.approx((1 + 0.0625) / 2)
    assert train_teacher.temperature(2 * long, 2 * long) == 0.0625
    assert train_teacher.kl_weight(10_000, long) == 0 and train_teacher.kl_weight(110_000, long) == pytest.approx(0.1)
    assert train_teacher.kl_weight(60_000, long) == pytest.approx(0.05)
    short = long // 100
    assert train_teacher.temperature(500, short) == pytest.approx(train_teacher.temperature(50_000, long), rel=1e-3)
    assert train_teacher.kl_weight(600, short) == pytest.approx(0.05, rel=1e-3)
    rate = lambda step: training.learning_rate(step, 1000, 1e-3, 1e-6, warmup=50)
    assert rate(0) == 1e-6 and rate(50) == pytest.approx(1e-3) and rate(1000) == pytest.approx(1e-6)
    assert rate(525) == pytest.approx((1e-3 + 1e-6) / 2)
    assert training.learning_rate(100, 1000, 1e-3, 1e-6, warmup=10_000) == pytest.approx(1e-3)  # warm-up: a tenth of the run at most


def test_weight_decay_spares_vectors_biases_and_tokens():
    teacher = act.Teacher(act.TeacherConfig(num_group=4, group_size=4, encoder_dims=8, tokens_dims=8, decoder_dims=8, num_tokens=16, num_prompt=2,
                                            trunk=act.TrunkConfig(width=16, depth=2, num_heads=1, mlp_hidden=16)))
    names = {id(p): name for name, p in teacher.named_parameters()}
    decayed, still = ({names[id(p)] for p in group["params"]} for group in training.adamw(teacher, 1e-3, 0.1).param_groups)
    assert {"codebook", "visual_prompt_pos", "deep_prompt_pos", "proj_pre.weight"} <= decayed
    assert {"visual_prompt_token", "deep_prompt_tokens", "proj_pre.bias", "dgcnn_1.layer1.1.weight"} <= still
    assert not any(name.startswith("trunk.") for name in decayed | still)


# -- bad input to the scripts -----------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ("train_teacher.py", ["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    ("train_teacher.py", ["--nonsense"], "unrecognized arguments: --nonsense"),
    ("train_teacher.py", ["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    ("train_teacher.py", ["--size", "huge"], "argument --size: invalid choice: 'huge' (choose from 'auto', 'tiny', 'small', 'base')"),
    ("train_teacher.py", ["--epochs", "-1"], "--epochs must not be negative, found -1"),
    ("train_teacher.py", ["--lr", "nan"], "--lr must not be negative, found nan"),
    ("train_teacher.py", ["--device", "tpu"], "--device tpu: wanted auto, cpu, cuda or cuda:N"),
    ("train_teacher.py", ["--data", "{tmp}/absent"], "{tmp}/absent: no such folder"),
    ("train_teacher.py", ["--weights", "vit_of_nobody"], "vit_of_nobody: neither a file nor one of the known names: {names}"),
    ("train_student.py", ["--teacher", "{tmp}/absent.pt"], "{tmp}/absent.pt: no such file"),
    ("train_student.py", ["--mask-ratio", "1.5"], "--mask-ratio must lie between 0 and 1, found 1.5"),
    ("train_student.py", ["--target", "pixels"], "argument --target: invalid choice: 'pixels' (choose from 'teacher', 'coordinates', 'codes')"),
]


@pytest.mark.parametrize("name, args, message", BAD_ARGUMENTS)
def test_a_bad_argument_is_one_line_and_code_2(tmp_path, name, args, message, capfd, monkeypatch):
    fill = lambda text: text.replace("{tmp}", str(tmp_path)).replace("{names}", ", ".join(act.pretrained_names()))
    module = __import__(name.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "out"), *map(fill, args)])
    with pytest.raises(SystemExit) as stop:
        training.run_script(module.main)
    assert stop.value.code == 2
    assert capfd.readouterr().err == f"error: {fill(message)}\n"
    assert not (tmp_path / "out").exists()


# -- linear SVM -------------------------------------------------------------------------------------------------------

def test_linear_svm_meets_the_optimality_condition_of_its_objective():
    """At the minimum the gradient w - 2 C sum_i y_i x_i max(0, 1 - y_i w.x_i) vanishes, the intercept included."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    x[:, 0] += labels
    w = training.linear_svm(x, labels, 3, C=0.5)
    rows = torch.cat([x, torch.ones(60, 1)], dim=1).double()
    y = 2.0 * F.one_hot(labels, 3) - 1
    gradient = w - rows.T @ (y * (1 - y * (rows @ w)).clamp_min(0))
    assert gradient.abs().max() < 1e-3


def test_svm_accuracy_is_right_on_separable_features_and_near_chance_on_noise():
    labels = torch.arange(240) % 4
    noise = torch.randn(240, 8, generator=torch.Generator().manual_seed(0))
    halves = (labels[:120], noise[120:], labels[120:])
    assert training.svm_accuracy((noise + 20 * F.one_hot(labels, 8))[:120], labels[:120],
                            (noise + 20 * F.one_hot(labels, 8))[120:], labels[120:])[0] == 100
    assert 10 < training.svm_accuracy(noise[:120], *halves)[0] < 45
    assert training.svm_accuracy(noise[:120], *halves) == training.svm_accuracy(noise[:120], *halves)


def test_svm_accuracy_knows_no_scale_and_chooses_c_without_the_test_features():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(160) % 4
    x = torch.randn(160, 6, generator=generator) + 1.5 * F.one_hot(labels, 6)
    train, test = (x[:100], labels[:100]), (x[100:], labels[100:])
    accuracy, C = training.svm_accuracy(*train, *test)
    scaled = [t * torch.logspace(0, 3, 6) + 7 for t in (x[:100], x[100:])]
    assert training.svm_accuracy(scaled[0], labels[:100], scaled[1], labels[100:]) == (pytest.approx(accuracy), C)
    assert training.svm_accuracy(*train, torch.zeros(60, 6), labels[100:])[1] == C


# -- what can go wrong while training ---------------------------------------------------------------------------------

@pytest.fixture
def small_run(tmp_path, cloud_set):
    """A student's Run of a few steps in `tmp_path`, with the loss to train it by."""
    @dataclass
    class Config(training.RunConfig):
        out: str = training.flag(str(tmp_path / "run"), "")

    config = replace(Config(), steps=4, batch_size=4, lr=1e-3)
    sizes = act.StudentConfig(num_group=8, group_size=8, width=32, depth=1, num_heads=1, encoder_dims=32, target_dim=24, decoder_depth=1)

    def loss(net, step, indices, generator, share):
        xyz, _ = cloud_set.draw(indices, 64, generator)
        neighborhood, center = act.group_points(xyz, 8, 8)
        return net(neighborhood, center, act.random_mask(center, 0.5, generator)).square().mean(), {}
    return training.Run(config, act.Student(sizes), cloud_set, 0.05), loss


@pytest.fixture(scope="module")
def cloud_set():
    return shapes.synthetic_clouds(1, seed=4, num_points=100)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(small_run, cloud_set):
    run, loss = small_run
    run.save()
    before = run.checkpoint.read_bytes()

    def bad(net, step, *rest, **more):
        value, parts = loss(net, step, *rest, **more)
        return (value * math.nan if step == 2 else value), parts
    with pytest.raises(ValueError, match=r"not finite at step 2 \(clouds .*lower --lr.*last good checkpoint is"):
        run.train(lambda step: dict(lr=1e-3), bad)
    assert run.checkpoint.read_bytes() == before


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(small_run, monkeypatch):
    run, _ = small_run
    run.save()
    before, names = run.checkpoint.read_bytes(), sorted(p.name for p in run.out.iterdir())

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.save()
    assert run.checkpoint.read_bytes() == before and sorted(p.name for p in run.out.iterdir()) == names


def test_an_earlier_run_is_set_aside_not_overwritten(small_run):
    run, loss = small_run
    run.train(lambda step: dict(lr=1e-3), loss)
    before = run.checkpoint.read_bytes()
    again = training.Run(run.config, run.model, shapes.synthetic_clouds(1, seed=4, num_points=100), 0.05)
    assert not again.checkpoint.exists()
    assert [p.read_bytes() for p in run.out.glob("earlier-*/last.pt")] == [before]


def test_an_epoch_takes_every_cloud_once_in_an_order_of_its_own_that_is_drawn_once(small_run, cloud_set, monkeypatch):
    run, loss = small_run
    run.total, draw, drawn, taken = 2 * run.per_epoch, torch.randperm, [], []
    monkeypatch.setattr(torch, "randperm", lambda n, **options: drawn.append(n) or draw(n, **options))

    def noting(net, step, indices, *rest):
        taken.append(indices.tolist())
        return loss(net, step, indices, *rest)
    run.train(lambda step: dict(lr=1e-3), noting)
    assert drawn.count(len(cloud_set)) == 2
    first, second = ([i for batch in half for i in batch] for half in (taken[: run.per_epoch], taken[run.per_epoch :]))
    assert len(set(first)) == len(set(second)) == run.per_epoch * run.batch and first != second


def test_a_finished_run_that_is_resumed_leaves_its_log_as_it_was(small_run, cloud_set):
    run, loss = small_run
    run.train(lambda step: dict(lr=1e-3), loss)
    run.close(figure=1.0)
    before = run.log.read_bytes()
    again = training.Run(replace(run.config, resume=True), run.model, cloud_set, 0.05)
    again.train(lambda step: dict(lr=1e-3), loss)
    again.close(figure=1.0)
    assert again.step == 4 and run.log.read_bytes() == before and before.count(b"figure") == 1


def test_no_step_reads_a_value_on_the_host(small_run):
    """On a GPU each such read would wait for all that is queued there."""
    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    run, _ = small_run
    run.model.train()
    xyz = torch.randn(4, 64, 3)

    def loss(net, step, indices, generator, share):
        mask = torch.tensor([True, False] * 4).expand(4, 8)
        return net(*act.group_points(xyz, 8, 8), mask).square().mean(), {}
    with Reads() as reads:
        run._update(loss, torch.arange(4), lr=1e-3)
        assert reads.count == 0 and run.step == 1
        run.sums["loss"].item()
        assert reads.count == 1


def test_a_gpus_loss_is_read_once_for_each_line_of_the_log(small_run, monkeypatch):
    run, _ = small_run
    run.config, run.device, reads, means = replace(run.config, log_every=2), torch.device("cuda"), [], run._means

    def update(loss, indices, lr):
        run.step += 1
        run.sums["loss"] = run.sums.get("loss", 0) + torch.tensor(float(run.step))
    monkeypatch.setattr(run, "_update", update)
    monkeypatch.setattr(run, "_means", lambda indices: reads.append(run.step) or means(indices))
    run.train(lambda step: dict(lr=1e-3), None)
    assert reads == [2, 4] and [(row["step"], row["loss"]) for row in log_of(run.out)] == [(2, 1.5), (4, 2.5)]


def test_an_unwritable_folder_is_reported_before_training(tmp_path, cloud_set):
    (tmp_path / "file").write_text("")
    config = replace(training.RunConfig(), out=str(tmp_path / "file" / "run"), steps=1, batch_size=2, lr=1e-3)
    with pytest.raises(ValueError, match="--out .*file/run: cannot be written"):
        training.Run(config, act.Student(act.StudentConfig(num_group=8, group_size=8, width=32, depth=1, num_heads=1, encoder_dims=32)), cloud_set, 0.05)


def test_fewer_distinct_points_than_patches_is_an_error_that_names_the_cloud():
    points = torch.rand(5, 3).repeat(20, 1)
    clouds = shapes.Clouds(points, torch.tensor([0, 100]), ["few.ply"])
    with pytest.raises(ValueError, match="few.ply: has 5 distinct points, wanted at least the 8 patches"):
        training.check_distinct(clouds, 8)
    training.check_distinct(clouds, 5)


def test_three_lines_of_python_and_numpy_in_and_out(tmp_path):
    sizes = act.StudentConfig(num_group=8, group_size=8, width=32, depth=1, num_heads=1, encoder_dims=32)
    act.save({"kind": "Student", "config": asdict(sizes), "model": act.Student(sizes).state_dict()}, tmp_path / "last.pt")
    shapes.write_ply(tmp_path / "scan.ply", np.random.default_rng(0).normal(size=(200, 3)))
    student = act.load(tmp_path / "last.pt")
    cloud = shapes.read_cloud(tmp_path / "scan.ply")[None]
    tokens = student.encode(cloud)
    assert isinstance(tokens, np.ndarray) and tokens.shape == (1, 9, 32)
    assert np.array_equal(tokens, student.encode(torch.from_numpy(cloud)).detach().numpy())


# =====================================================================================================================
# finetune.py
# =====================================================================================================================

FINE_SIZES = dict(num_group=8, group_size=8, width=24, depth=3, num_heads=2, encoder_dims=24)
DATA_KINDS = ("sphere", "table", "mug")


def write_npz(path, per_class=6, points=200):
    """A small labelled set of embedded shapes."""
    made = [(shapes.synthetic_cloud(kind, points, np.random.default_rng([c, i]))[0], c) for c, kind in enumerate(DATA_KINDS) for i in range(per_class)]
    np.savez(path, points=np.stack([m[0] for m in made]).astype(np.float32), labels=np.array([m[1] for m in made]), classes=np.array(DATA_KINDS))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a student's checkpoint and a small labelled set."""
    root = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    student = act.Student(act.StudentConfig(**FINE_SIZES, target_dim=12))
    act.save(dict(kind="Student", config=asdict(student.config), model=student.state_dict()), root / "student.pt")
    write_npz(root / "set.npz")
    return root


def run(place, monkeypatch, capsys, *flags):
    """The script's own main -> what it printed."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--device", "cpu", "--size", "tiny", *map(str, flags)])
    finetune.main()
    return capsys.readouterr().out


TINY = ("--data", "set.npz", "--checkpoint", "student.pt", "--points", 128, "--batch-size", 6, "--epochs", 1)


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def options(**changed):
    return finetune.Config(**{"size": "tiny", "points": 128, "batch_size": 4, "augment": "none", "checkpoint": "none", **changed})


# -- metrics ----------------------------------------------------------------------------------------------------------

def test_accuracy_and_iou_of_a_hand_worked_case():
    truth, predicted = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 0, 3])
    matrix = finetune.confusion(truth, predicted, 5)
    assert matrix.tolist() == [[2, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5, [0, 0, 0, 1, 0], [0] * 5]
    overall, mean = finetune.accuracy(matrix)
    assert overall == pytest.approx(100 * 4 / 6) and mean == pytest.approx(100 * (2 / 3 + 1 / 2 + 1) / 3)
    each = finetune.iou(matrix).tolist()
    assert each[:2] + each[3:4] == pytest.approx([100 * 2 / 4, 100 / 3, 100]) and np.isnan(each[2]) and np.isnan(each[4])


def test_metrics_equal_a_count_by_sets():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 6, 300), rng.integers(0, 6, 300)
    matrix = finetune.confusion(truth, predicted, 6)
    assert finetune.accuracy(matrix)[0] == pytest.approx(100 * np.mean(truth == predicted))
    assert finetune.accuracy(matrix)[1] == pytest.approx(100 * np.mean([np.mean(predicted[truth == c] == c) for c in range(6)]))
    for c, value in enumerate(finetune.iou(matrix).tolist()):
        a, b = set(np.flatnonzero(truth == c)), set(np.flatnonzero(predicted == c))
        assert value == pytest.approx(100 * len(a & b) / len(a | b))


def test_shape_iou_of_a_hand_worked_case_and_an_absent_part_counts_one():
    truth, predicted = torch.tensor([4, 4, 4, 5, 5]), torch.tensor([4, 4, 5, 5, 5])
    assert finetune.shape_iou(truth, predicted, (4, 6)) == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    assert finetune.shape_iou(truth, predicted, (4, 7)) == pytest.approx(100 * (2 / 3 + 2 / 3 + 1) / 3)
    assert finetune.shape_iou(truth, torch.tensor([4, 4, 4, 5, 9]), (4, 6)) == pytest.approx(100 * (1 + 1 / 2) / 2)  # a foreign part


def test_shape_iou_equals_a_loop_over_sets():
    rng = np.random.default_rng(1)
    for _ in range(20):
        truth, predicted, each = rng.integers(3, 6, 12), rng.integers(3, 7, 12), []
        for part in range(3, 8):
            a, b = set(np.flatnonzero(truth == part)), set(np.flatnonzero(predicted == part))
            each.append(len(a & b) / len(a | b) if a | b else 1)
        assert finetune.shape_iou(torch.tensor(truth), torch.tensor(predicted), (3, 8)) == pytest.approx(100 * np.mean(each))


def test_parts_are_averaged_over_instances_and_over_categories(monkeypatch):
    clouds = finetune.select(finetune.compositions(shapes.synthetic_clouds(2, num_points=64)), [0, 1, 2])  # two of one class, one of another
    task = finetune.Parts(options(task="parts", points=32), torch.device("cpu"), clouds, clouds)
    first = [task.ranges[label][0] for label in task.test.labels]
    truth = torch.tensor(first)[:, None].expand(-1, 4)
    wrong = truth.clone()
    wrong[2] += 1  # cloud 2: IoU 0 of both its parts, the others 1
    monkeypatch.setattr(task, "answers", lambda model, indices: (None, truth, wrong))
    figures = task.evaluate(None)
    parts = task.ranges[2 - 1][1] - task.ranges[1][0]
    third = 100 * (parts - 2) / parts
    assert figures["instance_miou"] == pytest.approx((200 + third) / 3) and figures["class_miou"] == pytest.approx((100 + third) / 2)
    assert figures["accuracy"] == pytest.approx(100 * 2 / 3)


# -- readers ----------------------------------------------------------------------------------------------------------

def arrays(n=4, points=40, columns=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, points, columns)).astype(np.float32)


def opened(path, **flags):
    return finetune.open_labelled(finetune.Config(data=str(path), **flags))


def write_h5(path, array, label, name="data"):
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[name], file["label"] = array, label


@pytest.mark.parametrize("variant, folder, file", [
    ("OBJ_BG", "main_split", "objectdataset"), ("OBJ_ONLY", "main_split_nobg", "objectdataset"),
    ("PB_T50_RS", "main_split", "objectdataset_augmentedrot_scale75")])
def test_scanobjectnn_is_read_as_stored_by_variant(tmp_path, variant, folder, file):
    for number, (where, what) in enumerate(finetune.SCAN_FILES.values()):
        for split in ("training", "test"):
            write_h5(tmp_path / where / f"{split}_{what}", arrays(seed=number) + 7, np.array([0, 14, 1, 2], np.int32))
    for path in (tmp_path, tmp_path / folder, tmp_path / folder / f"training_{file}.h5"):
        name, train, test = opened(path, variant=variant)
        assert name == "ScanObjectNN" and not train.normalized and len(train.classes) == 15 and len(test) == 4
        number = list(finetune.SCAN_FILES).index(variant)
        assert torch.equal(train[1], torch.from_numpy(arrays(seed=number)[1] + 7))
        assert train.labels.tolist() == [0, 14, 1, 2]
        assert finetune.settle(finetune.Config(task="classify", points=512), name, 0).augment == "rotate"
    drawn, _ = train.draw(torch.tensor([0]), 40)
    assert drawn.mean() > 6  # not normalised


def test_h5_pair_is_read_and_normalised(tmp_path):
    write_h5(tmp_path / "mine_train.h5", arrays(), np.array([[0], [1], [2], [1]], np.uint8))
    write_h5(tmp_path / "mine_test.h5", arrays(2, columns=6), np.array([0, 1], np.uint8))
    _, train, test = opened(tmp_path)
    assert train.normalized and train.labels.tolist() == [0, 1, 2, 1] and test.classes == ["class 0", "class 1", "class 2"]
    assert test.points.shape == (80, 3)


def write_modelnet(root):
    """Two classes in the published .txt layout."""
    root.mkdir(exist_ok=True)
    (root / "modelnet40_shape_names.txt").write_text("airplane\nnight_stand\n")
    (root / "modelnet10_train.txt").write_text("nothing_0001\n")
    for split, names in (("train", ["airplane_0001", "night_stand_0002"]), ("test", ["night_stand_0003"])):
        (root / f"modelnet40_{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            (root / name[:-5]).mkdir(exist_ok=True)
            np.savetxt(root / name[:-5] / f"{name}.txt", arrays(columns=6, seed=i)[0], delimiter=",")
    return root


def test_modelnet_txt_root_and_its_augmentation(tmp_path):
    name, train, test = opened(write_modelnet(tmp_path / "m"))
    assert name == "ModelNet40" and train.names == ["airplane_0001", "night_stand_0002"] and train.labels.tolist() == [0, 1]
    assert test.classes == ["airplane", "night_stand"] and test.labels.tolist() == [1]
    assert torch.allclose(train[0], torch.from_numpy(shapes.normalize(arrays(columns=6)[0][:, :3])), atol=1e-5)
    assert finetune.settle(finetune.Config(points=512), name, 0).augment == "scale_translate"


def dat(n=3, protocol=4):
    return pickle.dumps([[a for a in arrays(n, columns=6)], [np.array([i], np.int32) for i in range(n)]], protocol)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_dat_cache_is_read_under_old_and_new_numpy_names(tmp_path, protocol):
    old = dat(protocol=protocol).replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if protocol < 4 else dat()
    (tmp_path / "modelnet40_train_8192pts_fps.dat").write_bytes(old)
    (tmp_path / "modelnet40_test_8192pts_fps.dat").write_bytes(dat(protocol=protocol))
    (tmp_path / "modelnet40_shape_names.txt").write_text("a b c")
    name, train, test = opened(tmp_path)
    assert name == "ModelNet40" and train.labels.tolist() == [0, 1, 2] and test.classes == ["a", "b", "c"]
    assert torch.equal(train[2], torch.from_numpy(arrays(3, columns=6)[2][:, :3]))


def test_pickle_of_python_2_is_read(tmp_path):
    # protocol 2 as Python 2 wrote it: an array's bytes are a str, opcode U
    data = np.arange(3, dtype="<f4").tobytes()
    raw = (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85U\x01b\x87R(K\x01K\x03\x85cnumpy\ndtype\n"
           b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(data)]) + data + b"tb.")
    (tmp_path / "a.pkl").write_bytes(raw)
    assert finetune.read_pickle(tmp_path / "a.pkl").tolist() == [0, 1, 2]


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    for i, (function, args, name) in enumerate(((os.mkdir, (str(tmp_path / "ran"),), r"(posix|nt)\.mkdir"),
                                                (eval, ("__import__('os').mkdir('ran')",), r"(builtins|__builtin__)\.eval"))):
        path = tmp_path / f"{i}.dat"
        path.write_bytes(pickle.dumps([[np.zeros((3, 3)), Evil(function, *args)], [0]], protocol))
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: refers to {name}, wanted arrays and plain values only$"):
            finetune.read_pickle(path)
    assert not (tmp_path / "ran").exists() and not Path("ran").exists()


def test_pickled_array_of_objects_is_refused(tmp_path):
    for i, array in enumerate((np.array([object], object), np.zeros(3, "V8"), np.zeros(2, "f4,O"), np.array(["a"]))):
        (tmp_path / f"{i}.pkl").write_bytes(pickle.dumps(array))
        with pytest.raises(ValueError, match=r"\d\.pkl: (holds an array of type '.+', wanted numbers|refers to builtins\.object, )"):
            finetune.read_pickle(tmp_path / f"{i}.pkl")


def test_pickled_numbers_keep_type_shape_order_and_bytes(tmp_path):
    stored = [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">i4"), np.array([True, False]), np.float32(2.5)]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(stored, protocol))
        for a, b in zip(finetune.read_pickle(tmp_path / "a.pkl"), stored):
            assert a.dtype.str[1:] == b.dtype.str[1:] and np.array_equal(a, b)  # numpy swaps bytes as it unpickles


@pytest.mark.parametrize("cut", [0, 1, 10, 60, 200, -1])
def test_broken_pickle_is_a_mistake_that_names_the_file(tmp_path, cut):
    (tmp_path / "a.dat").write_bytes(dat()[:cut])
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/a.dat: ")):
        finetune.read_pickle(tmp_path / "a.dat")


def test_off_folder_is_read(tmp_path):
    tetrahedron = "OFF\n4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
    for label in ("bed", "desk"):
        for split in ("train", "test"):
            (tmp_path / label / split).mkdir(parents=True)
            (tmp_path / label / split / f"{label}_1.off").write_text(tetrahedron)
    _, train, test = opened(tmp_path)
    assert train.classes == ["bed", "desk"] and train.labels.tolist() == [0, 1] == test.labels.tolist()


def test_npz_is_split_by_a_hash_or_by_its_own_keys(tmp_path, place):
    _, train, test = opened(place / "set.npz")
    again = opened(place / "set.npz")[1]
    assert (len(train), len(test), train.classes) == (15, 3, list(DATA_KINDS)) and train.names == again.names
    assert not set(train.names) & set(test.names)
    stored = np.load(place / "set.npz")
    for clouds in (train, test):
        for i, name in enumerate(clouds.names):
            k = int(name[-5:])
            assert np.array_equal(clouds[i].numpy(), stored["points"][k]) and clouds.labels[i] == stored["labels"][k]
    np.savez(tmp_path / "own.npz", train_points=arrays(5), train_labels=np.arange(5), test_points=arrays(2), test_labels=np.array([0, 1]))
    _, train, test = opened(tmp_path / "own.npz")
    assert (len(train), len(test), len(test.classes)) == (5, 2, 5)


@pytest.mark.parametrize("change, message", [
    (dict(labels=np.arange(3)), "found 4 clouds and 3 labels of type int64, wanted some clouds and a whole number for each"),
    (dict(labels=np.array([0, 1, 2, -1])), "found labels -1 to 2, wanted 0 to 2"),
    (dict(labels=np.array([0.5, 1, 2, 3])), "found 4 clouds and 4 labels of type float64, wanted some clouds and a whole number for each"),
    (dict(classes=np.array(["a", "b"])), "found labels 0 to 3, wanted 0 to 1"),
    (dict(points=arrays(columns=2)), "cloud 0 has shape (40, 2), wanted numbers (points, 3)"),
    (dict(points=np.where(np.arange(4)[:, None, None] == 2, np.nan, arrays())), "cloud 2 has coordinates that are NaN or infinite"),
    (dict(points=None), "found labels, wanted points and labels, or train_points, train_labels, test_points and test_labels"),
    (dict(points=np.array([object()] * 4)), "Object arrays cannot be loaded when allow_pickle=False"),
])
def test_broken_npz_is_a_mistake_that_names_it(tmp_path, change, message):
    content = {"points": arrays(), "labels": np.arange(4), **change}
    np.savez(tmp_path / "a.npz", **{k: v for k, v in content.items() if v is not None})
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/a.npz: {message}") + "$"):
        opened(tmp_path / "a.npz")


def test_other_broken_data_is_a_mistake_that_names_it(tmp_path):
    def mistake(path, message, **flags):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            opened(path, **flags)

    mistake(tmp_path / "none", f"--data {tmp_path}/none: no such file or folder")
    (tmp_path / "a.csv").write_text("1")
    mistake(tmp_path / "a.csv", f"--data {tmp_path}/a.csv: wanted a folder, an .npz or the …train….h5 of a pair")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no")
    mistake(tmp_path / "a.npz", f"{tmp_path}/a.npz: ")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(6):
        np.save(flat / f"{i}.npy", arrays()[0])
    mistake(flat, f"--data {flat}: the clouds have no classes, wanted one sub-folder for each")
    root = write_modelnet(tmp_path / "m")
    os.unlink(root / "night_stand" / "night_stand_0002.txt")
    mistake(root, f"{root}/modelnet40_train.txt: lists night_stand_0002, wanted the file {root}/night_stand/night_stand_0002.txt")
    os.unlink(root / "modelnet40_train.txt")
    mistake(root, f"{root}/modelnet40_train.txt: no such file")
    (root / "modelnet40_train_8192pts_fps.dat").write_bytes(pickle.dumps({"a": 1}))
    mistake(root, f"{root}/modelnet40_train_8192pts_fps.dat: found a dict, wanted [list of clouds, list of labels]")


def test_broken_h5_is_a_mistake_that_names_it(tmp_path):
    def mistake(path, message, **flags):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            opened(path, **flags)

    train, test = tmp_path / "x_train.h5", tmp_path / "x_test.h5"
    write_h5(train, arrays(), np.arange(4), name="points")
    mistake(tmp_path, f"{train}: found label, points, wanted data and label")
    write_h5(train, arrays(), np.arange(4))
    mistake(tmp_path, f"{test}: no such file")
    test.write_bytes(b"not hdf5")
    mistake(tmp_path, f"{test}: ")
    write_h5(tmp_path / "y_train.h5", arrays(), np.arange(4))
    mistake(tmp_path, f"--data {tmp_path}: found x_train.h5, y_train.h5, wanted one; give its own path")
    (tmp_path / "s" / "main_split").mkdir(parents=True)
    mistake(tmp_path / "s", f"{tmp_path}/s/main_split/training_objectdataset.h5: no such file", variant="OBJ_BG")


def write_shapenet_part(root, part=lambda first, last, n: np.arange(n) % (last - first) + first):
    (root / "train_test_split").mkdir(parents=True, exist_ok=True)
    (root / "synsetoffset2category.txt").write_text("Bag\t001\nMug\t002\n")
    lists = {"train": [("001", "a"), ("002", "b")], "val": [("002", "c")], "test": [("001", "d"), ("002", "e")]}
    for split, entries in lists.items():
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps([f"shape_data/{s}/{m}" for s, m in entries]))
        for synset, model in entries:
            (root / synset).mkdir(exist_ok=True)
            n = 90 + ord(model)
            first, last = {"001": (4, 6), "002": (36, 38)}[synset]
            values = np.column_stack([arrays(1, n, 6, ord(model))[0], part(first, last, n)])
            np.savetxt(root / synset / f"{model}.txt", values, fmt="%.6f")
    return root


def test_shapenet_part_is_read_as_published(tmp_path):
    train, test = finetune.read_shapenet_part(write_shapenet_part(tmp_path))
    assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [0, 1] and train.classes == ["Bag", "Mug"]
    assert train.class_parts == [(4, 6), (36, 38)] and len(train[2]) == 90 + ord("c")
    assert torch.allclose(train[0], torch.from_numpy(arrays(1, 90 + ord("a"), 6, ord("a"))[0][:, :3]), atol=1e-5)
    assert set(test.parts[: test.offsets[1]].tolist()) == {4, 5} and set(test.parts[test.offsets[1]:].tolist()) == {36, 37}


def test_broken_shapenet_part_is_a_mistake_that_names_it(tmp_path):
    def mistake(message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            finetune.read_shapenet_part(tmp_path)

    mistake(f"{tmp_path}/synsetoffset2category.txt: no such file")
    write_shapenet_part(tmp_path, lambda first, last, n: np.full(n, last))
    mistake(f"{tmp_path}/001/a.txt: 7 columns, the last 6 to 6, wanted 7, the last a part of a Bag: 4 to 5")
    os.unlink(tmp_path / "001" / "a.txt")
    mistake(f"{tmp_path}/001/a.txt: no such file")
    (tmp_path / "train_test_split" / "shuffled_train_file_list.json").write_text("[")
    mistake(f"{tmp_path}/train_test_split/shuffled_train_file_list.json: ")
    (tmp_path / "synsetoffset2category.txt").write_text("Bag 001\nTeapot 003\n")
    mistake(f"{tmp_path}/synsetoffset2category.txt: found 'Teapot 003', wanted lines of a category of ShapeNetPart and its synset")


def write_s3dis(root, areas=(1, 5)):
    root.mkdir(exist_ok=True)
    for area in areas:
        rng = np.random.default_rng(area)
        xyz = rng.uniform(0, [1.6, 1.2, 2], (900, 3)) + 10
        np.save(root / f"Area_{area}_office_1.npy", np.column_stack([xyz, rng.uniform(0, 255, (900, 3)), (xyz[:, 2] > 11) * 12]))
    return root


def test_s3dis_areas_are_split(tmp_path):
    train, test = finetune.open_rooms(finetune.Config(data=str(write_s3dis(tmp_path))))
    assert [r.name for r in train] == ["Area_1_office_1"] and [r.area for r in test] == [5]
    assert train[0].xyz.shape == (900, 3) and set(train[0].labels) == {0, 12} and train[0].xyz.min() >= 10


def test_broken_s3dis_is_a_mistake_that_names_it(tmp_path):
    def mistake(message, **flags):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            finetune.open_rooms(finetune.Config(data=str(tmp_path), **flags))

    mistake(f"--data {tmp_path}: found no rooms, wanted Area_<number>_<room>.npy")
    write_s3dis(tmp_path)
    mistake("--area 6: found the areas [1, 5], wanted one of several", area=6)
    path = tmp_path / "Area_2_hall_1.npy"
    np.save(path, np.zeros((4, 6)))
    mistake(f"{path}: found an array of shape (4, 6), wanted (n, 7): x y z r g b label")
    np.save(path, np.full((4, 7), 13.0))
    mistake(f"{path}: found coordinates that are not finite or labels beyond 0 to 12, wanted neither")
    np.save(path, np.array([object()]), allow_pickle=True)
    mistake(f"{path}: ")


# -- what networks are given ------------------------------------------------------------------------------------------

def test_thinned_clouds_are_farthest_points_and_small_ones_stay():
    clouds = finetune.labelled("a", [arrays(1, n, seed=n)[0] for n in (300, 60, 128, 140)], np.zeros(4, int))
    thinned = finetune.thin(clouds, 128, "cpu")
    assert thinned.offsets.diff().tolist() == [150, 60, 128, 140]
    own = clouds[0][None]
    assert torch.equal(thinned[0], act.gather_points(own, act.farthest_point_sample(own, 150))[0])
    assert torch.equal(thinned[1], clouds[1]) and torch.equal(thinned[2], clouds[2])
    assert torch.equal(thinned[3].unique(dim=0), clouds[3].unique(dim=0))  # all of its points, in the order found
    xyz = finetune.first_points(thinned, torch.tensor([0, 1]), 128)
    assert torch.allclose(xyz[0], torch.from_numpy(shapes.normalize(thinned[0][:128].numpy())), atol=1e-6)
    assert torch.equal(xyz[1, :60], xyz[1, 60:120])


def test_published_numbers_of_points_are_kept():
    clouds = finetune.labelled("a", arrays(1, 2500), np.zeros(1, int))
    assert [len(finetune.thin(clouds, n, "cpu")[0]) for n in (1024, 2048)] == [1200, 2400]


def test_a_prediction_does_not_depend_on_the_batch(place):
    _, train, test = opened(place / "set.npz")
    task = finetune.Classification(options(), torch.device("cpu"), train, train)
    model = task.build(FINE_SIZES).eval()
    with torch.no_grad():
        together = model(finetune.first_points(task.test, torch.arange(5), 128))
        alone = torch.cat([model(finetune.first_points(task.test, torch.tensor([i]), 128)) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_augmentations_do_what_their_names_say():
    xyz = torch.from_numpy(arrays())
    turned = finetune.augment(xyz, "rotate", act.seeded("cpu", 0))
    assert torch.equal(turned[..., 1], xyz[..., 1]) and torch.allclose(turned.norm(dim=2), xyz.norm(dim=2), atol=1e-5)
    room = finetune.augment(xyz, "rotate", act.seeded("cpu", 0), "scene")
    assert torch.equal(room[..., 2], xyz[..., 2]) and not torch.allclose(room, xyz) and torch.allclose(room.norm(dim=2), xyz.norm(dim=2), atol=1e-5)
    assert finetune.augment(xyz, "none", None) is xyz
    scaled = finetune.augment(xyz, "scale_translate", act.seeded("cpu", 0), "parts")
    factor = (scaled[:, 1] - scaled[:, 0]) / (xyz[:, 1] - xyz[:, 0])
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), atol=1e-4) and (0.79 < factor).all() and (factor < 1.26).all()
    factor = finetune.augment(xyz, "scale_translate", act.seeded("cpu", 0)).diff(dim=1) / xyz.diff(dim=1)
    assert (factor[:, 0, 0] - factor[:, 0, 1]).abs().max() > 1e-3  # per axis


def test_episodes_are_reproducible_and_hold_what_was_asked(place):
    _, train, test = opened(place / "set.npz")
    a, b, c = (finetune.draw_episode(train, train, 2, 3, fold) for fold in (0, 0, 1))
    assert a[0].names == b[0].names and a[1].names == b[1].names and a[0].names != c[0].names
    assert a[0].labels.bincount().tolist() == [3, 3] and len(a[0].classes) == 2
    for clouds in a:
        for i, name in enumerate(clouds.names):
            k = train.names.index(name)
            assert torch.equal(clouds[i], train[k]) and clouds.classes[clouds.labels[i]] == train.classes[train.labels[k]]
    with pytest.raises(ValueError, match=r"^--way 2 --shot 9: only 0 classes have 9 training clouds and a test cloud$"):
        finetune.draw_episode(train, test, 2, 9, 0)


def test_embedded_compositions_have_all_their_parts_numbered_anew():
    clouds = shapes.synthetic_clouds(2, num_points=256)
    made = finetune.compositions(clouds)
    assert "sphere" not in made.classes and "chair" in made.classes and len(made) == 2 * len(made.classes)
    assert made.class_parts[0][0] == 0 and all(a[1] == b[0] for a, b in zip(made.class_parts, made.class_parts[1:]))
    for i, label in enumerate(made.labels.tolist()):
        own = made.parts[made.offsets[i] : made.offsets[i + 1]]
        first, last = made.class_parts[label]
        assert first <= own.min() and own.max() < last and made.names[i].startswith(made.classes[label])
        assert torch.equal(made[i], clouds[clouds.names.index(made.names[i])])


@pytest.mark.parametrize("seed", range(4))
def test_embedded_rooms_hold_objects_in_their_boxes_on_the_floor(seed):
    xyz, labels, boxes = finetune.synthetic_room(60, np.random.default_rng(seed))
    assert xyz.dtype == np.float32 and len(xyz) == len(labels) and {0, 1, 2} < set(labels.tolist()) and boxes
    inside = np.zeros(len(xyz), int)
    for i, (label, low, high) in enumerate(boxes):
        assert low[2] == 0
        inside += ((xyz > low - 0.06) & (xyz < high + 0.06)).all(1) & (labels == label)
        for _, b, t in boxes[:i]:  # no two overlap
            assert (high[:2] < b[:2]).any() or (t[:2] < low[:2]).any()
    assert (inside[labels > 2] >= 1).all()
    assert abs(xyz[labels == 1, 2]).max() < 0.06 and xyz[labels > 2].max() < 4.1


def test_training_blocks_are_centred_full_and_reproducible(tmp_path):
    rooms, _ = finetune.open_rooms(finetune.Config(data=str(write_s3dis(tmp_path))))
    blocks = finetune.Blocks(rooms, 256)
    assert len(blocks) == len(blocks.names) == 3
    xyz, labels = blocks.draw(1, np.random.default_rng(0))
    assert xyz.shape == (256, 3) and labels.shape == (256,) and xyz.dtype == np.float32
    assert abs(xyz[:, :2]).max() <= 0.5 + 1e-5 and xyz[:, 2].min() > 9.9  # z as it is
    assert np.array_equal(labels, (xyz[:, 2] > 11) * 12)
    assert np.array_equal(xyz, blocks.draw(1, np.random.default_rng(0))[0])
    with pytest.raises(ValueError, match="^Area_1_office_1: of 200 random blocks"):
        finetune.Blocks(rooms, 4000).draw(0, np.random.default_rng(0))


def test_a_block_holds_what_a_slow_search_finds():
    rng = np.random.default_rng(3)
    xyz = rng.uniform(0, [3, 2, 1], (700, 3)).astype(np.float32)
    drawn, _ = finetune.Blocks([finetune.Room(1, "r", xyz, np.zeros(700, np.uint8))], 60).draw(0, np.random.default_rng(5))
    for center in xyz:  # the block's centre is one of the points
        moved = xyz - np.append(center[:2], 0)
        if all((abs(moved - p) < 1e-5).all(1).any() for p in drawn[:5]):
            inside = moved[(abs(moved[:, :2]) <= 0.5).all(1)]
            assert len(inside) > 30 and all((abs(inside - p) < 1e-5).all(1).any() for p in drawn)
            return
    raise AssertionError("no point is the centre")


@pytest.mark.parametrize("width", [0.4, 1.0, 1.3, 4.0])
def test_test_blocks_cover_every_point(width):
    xyz = (np.random.default_rng(0).uniform(0, [width, 1.7, 2], (500, 3)) - 3).astype(np.float32)
    blocks, seen = finetune.room_blocks(xyz), np.zeros(500, int)
    for inside, origin in blocks:
        assert len(inside) and abs(xyz[inside, :2] - origin[:2]).max() <= 0.5 + 2e-3 and origin[2] == 0
        seen[inside] += 1
    assert seen.min() >= 1 and (width < 2 or seen.max() == 4 or seen.max() >= 4)


def test_every_point_is_labelled_and_votes_are_means():
    class Fixed:  # says class 1 with a certainty that the point's z tells
        config = act.SegmenterConfig(num_parts=2)
        parameters = lambda self: iter([torch.zeros(1)])
        eval = lambda self: lambda xyz, category: torch.stack([torch.zeros(xyz.shape[:2]), xyz[..., 2]], dim=-1)

    xyz = np.random.default_rng(0).uniform(-1, 1, (333, 3))
    votes = finetune.label_points(Fixed(), xyz, finetune.room_blocks(xyz), 50)
    assert torch.allclose(votes[:, 1], torch.from_numpy(1 / (1 + np.exp(-xyz[:, 2]))), atol=1e-6) and torch.allclose(votes.sum(1), torch.ones(333).double())


def test_class_weights_are_the_published_ones(tmp_path):
    train, test = finetune.open_rooms(finetune.Config(data=str(write_s3dis(tmp_path))))
    task = finetune.Scenes(options(task="scene", data=str(tmp_path)), torch.device("cpu"), train, test)
    few, many = sorted([(train[0].labels == 0).sum(), (train[0].labels == 12).sum()])
    assert sorted([task.weight[0].item(), task.weight[12].item()]) == pytest.approx([1, (many / few) ** (1 / 3)])


def test_loss_of_shares_adds_up_to_the_loss_of_the_batch(tmp_path):
    train, test = finetune.open_rooms(finetune.Config(data=str(write_s3dis(tmp_path))))
    task = finetune.Scenes(options(task="scene", data=str(tmp_path), points=64), torch.device("cpu"), train, test)
    model, indices = task.build(FINE_SIZES).eval(), torch.arange(3)
    loss = lambda share: task.loss(model, 0, indices, act.seeded("cpu", 0), share)[0].item()
    assert loss(slice(0, None, 2)) * 2 / 3 + loss(slice(1, None, 2)) / 3 == pytest.approx(loss(slice(None)), rel=1e-5)


# -- protocols and checkpoints ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", ["mlp3", "linear"])
def test_frozen_protocols_leave_the_encoder_bit_identical(place, monkeypatch, capsys, protocol):
    run(place, monkeypatch, capsys, *TINY, "--protocol", protocol, "--out", protocol)
    before, after = act.load(place / "student.pt"), act.load(place / protocol / "last.pt")
    assert after.config.head == protocol
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(value, after.encoder.state_dict()[name]), name


def test_what_is_loaded_and_what_is_fresh_is_said(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    task = finetune.Classification(options(checkpoint="student.pt"), torch.device("cpu"), *opened("set.npz")[1:])
    model = finetune.start_model(task.config, task.build, "cpu")
    n = len(model.encoder.state_dict())
    assert capsys.readouterr().out == (f"loaded the encoder, all {n} tensors, from the Student in student.pt; fresh: head; "
                                       "of the file not used: decoder, decoder_pos_embed, head, mask_token\n")
    assert model.config.num_group == 8 and model.config.group_size == 8
    act.export(act.load("student.pt"), tmp_path / "release.pth")
    finetune.start_model(options(checkpoint=str(tmp_path / "release.pth"), points=512), lambda sizes: task.build({**sizes, "num_heads": 2}), "cpu")
    assert f"all {n} tensors, from the Student" in capsys.readouterr().out
    state = torch.load(tmp_path / "release.pth")
    state["base_model"] = {k.replace("ACT_", "MAE_"): v for k, v in state["base_model"].items() if "cls_" not in k}
    torch.save(state, tmp_path / "mae.pth")
    finetune.start_model(options(checkpoint=str(tmp_path / "mae.pth")), task.build, "cpu")
    assert f"all {n - 2} tensors, from the Student in {tmp_path}/mae.pth; fresh: cls_token, cls_pos, head;" in capsys.readouterr().out
    finetune.start_model(options(), task.build, "cpu")
    assert re.fullmatch(r"from scratch: all \d+ tensors of the Classifier are fresh\n", capsys.readouterr().out)
    with pytest.raises(ValueError, match="^--checkpoint nothing.pt: no such file; train_student.py writes one, none starts from scratch$"):
        finetune.start_model(options(checkpoint="nothing.pt"), task.build, "cpu")


def test_the_head_does_not_depend_on_where_the_encoder_comes_from(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    task = finetune.Classification(options(), torch.device("cpu"), *opened("set.npz")[1:])
    a, b = (finetune.start_model(options(checkpoint="student.pt"), task.build, "cpu") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_flags_that_do_not_fit_together_are_refused():
    for changed, message in ((dict(fold="12"), "--fold must be all or 0 to 9, found '12'"),
                             (dict(task="parts", protocol="linear"), "--protocol linear: --task parts trains everything, wanted full"),
                             (dict(features="a.npz"), "--features wants --predict or --task svm beside it"), (dict(way=1), "--vote must not")):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            finetune.check(options(**changed))


# -- tasks through the script -----------------------------------------------------------------------------------------

def test_classify_votes_predicts_and_resumes(place, monkeypatch, capsys):
    out = run(place, monkeypatch, capsys, *TINY[:-1], 2, "--vote", 2, "--out", "whole")
    assert "augmentation scale_translate: last epoch overall" in out and "vote of 2" in out and "best epoch" in out
    *epochs, last = log(place / "whole")
    assert len(epochs) == 2 and {"loss", "accuracy", "mean_accuracy"} <= epochs[0].keys()
    assert last["accuracy"] == epochs[-1]["accuracy"] and last["best_accuracy"] == max(e["accuracy"] for e in epochs)
    assert {"vote_accuracy", "vote_mean_accuracy", "best_epoch"} <= last.keys() and (place / "whole" / "confusion.png").is_file()

    # a run that is stopped after one of two epochs and resumed ends where the whole run does
    class Stop(Exception):
        pass

    def interrupted(self):
        save(self)
        raise Stop

    save = training.Run.save
    monkeypatch.setattr(training.Run, "save", interrupted)
    with pytest.raises(Stop):
        run(place, monkeypatch, capsys, *TINY[:-1], 2, "--vote", 2, "--out", "half")
    monkeypatch.setattr(training.Run, "save", save)
    assert "resumed half/last.pt at step 2" in run(place, monkeypatch, capsys, *TINY[:-1], 2, "--vote", 2, "--out", "half", "--resume")
    a, b = act.load(place / "whole" / "last.pt"), act.load(place / "half" / "last.pt")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert {k: v for k, v in log(place / "half")[-1].items() if k != "seconds"} == {k: v for k, v in last.items() if k != "seconds"}

    (place / "clouds" / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.npy", "deep/b.npy")):
        np.save(place / "clouds" / name, 1e4 + 50 * shapes.synthetic_cloud("mug", 300, np.random.default_rng(i))[0])
    out = run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", "whole/last.pt", "--features", "f/features.npz")
    assert re.search(r"^a\.npy +(sphere|table|mug) +0\.\d{3} +(sphere|table|mug) 0\.\d{3}$", out, re.M) and "deep/b.npy" in out
    stored = np.load(place / "f" / "features.npz")
    assert stored["features"].shape == (2, 48) and stored["names"].tolist() == ["a.npy", "deep/b.npy"]
    alone = run(place, monkeypatch, capsys, "--predict", "clouds/a.npy", "--checkpoint", "whole/last.pt")
    assert re.search(r"a\.npy +(\w+ +0\.\d+)", alone)[1].split() == re.search(r"a\.npy +(\w+ +0\.\d+)", out)[1].split()
    run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", "student.pt", "--points", 128, "--features", "s.npz")
    with pytest.raises(ValueError, match="holds a Student, wanted a Classifier or Segmenter that finetune.py wrote"):
        run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", "student.pt")
    with pytest.raises(ValueError, match="^--predict nowhere: no clouds there"):
        run(place, monkeypatch, capsys, "--predict", "nowhere", "--checkpoint", "student.pt")
    with pytest.raises(ValueError, match=r"^--points 2: wanted at least \d+, for the checkpoint's \d+ patches of \d+ points"):
        run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", "whole/last.pt", "--points", 2)
    path, seen, group = released(place, release_names(build("Classifier", num_classes=5))), [], act.group_points
    monkeypatch.setattr(act, "group_points", lambda xyz, *sizes: seen.append((xyz.shape[1], *sizes)) or group(xyz, *sizes))
    run(place, monkeypatch, capsys, "--predict", "clouds", "--checkpoint", path, "--points", 512)
    assert set(seen) == {(512, 32, 32)}  # a patch for every 16 points, as the release fine-tunes


def test_fewshot_draws_episodes_or_reads_the_published_folds(place, monkeypatch, capsys):
    out = run(place, monkeypatch, capsys, *TINY, "--task", "fewshot", "--way", 2, "--shot", 3, "--out", "few")
    folds = log(place / "few")[-1]["folds"]
    assert len(folds) == 10 and re.search(r"2-way 3-shot: [\d.]+ ± [\d.]+ % over 10 folds, last epochs", out)
    assert log(place / "few")[-1]["accuracy"] == pytest.approx(np.mean(folds))
    assert log(place / "few")[-1]["accuracy_std"] == pytest.approx(np.std(folds, ddof=1))
    (place / "published" / "2way_3shot").mkdir(parents=True)
    episode = {split: [(shapes.synthetic_cloud(DATA_KINDS[c], 150, np.random.default_rng([c, i]))[0].repeat(2, axis=1), c, 30 + c) for c in (0, 1)
                       for i in range(3)] for split in ("train", "test")}
    (place / "published" / "2way_3shot" / "4.pkl").write_bytes(pickle.dumps(episode))
    out = run(place, monkeypatch, capsys, *TINY, "--data", "published", "--task", "fewshot", "--way", 2, "--shot", 3, "--fold", 4, "--out", "pub")
    assert "few-shot ModelNet40" in out and "over 1 folds" in out
    (place / "published" / "2way_3shot" / "4.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="^published/2way_3shot/4.pkl: found a list, wanted a dict with train and test$"):
        run(place, monkeypatch, capsys, *TINY, "--data", "published", "--task", "fewshot", "--way", 2, "--shot", 3, "--fold", 4, "--out", "pub")


def test_svm_agrees_with_scikit_learn_on_the_features_it_writes(place, monkeypatch, capsys):
    sklearn = pytest.importorskip("sklearn.svm")
    write_npz(place / "more.npz", per_class=60, points=160)
    run(place, monkeypatch, capsys, *TINY, "--data", "more.npz", "--task", "svm", "--out", "svm", "--features", "svm.npz")
    stored, result = np.load(place / "svm.npz"), log(place / "svm")[-1]
    n, x = 144, torch.from_numpy(stored["features"]).double()
    assert x.shape == (180, 48) and len(stored["names"]) == 180
    x = ((x - x[:n].mean(dim=0)) / (x[:n].std(dim=0) + 1e-6)).numpy()
    theirs = sklearn.LinearSVC(C=result["C"], dual=True, max_iter=200_000, tol=1e-6, random_state=0).fit(x[:n], stored["labels"][:n])
    assert abs(100 * theirs.score(x[n:], stored["labels"][n:]) - result["accuracy"]) <= 1


def test_parts_end_to_end_and_a_cloud_is_coloured(place, monkeypatch, capsys):
    write_shapenet_part(place / "shapenet")
    flags = ("--task", "parts", "--data", "shapenet", "--checkpoint", "student.pt", "--points", 128, "--batch-size", 2)
    out = run(place, monkeypatch, capsys, *flags, "--steps", 2, "--out", "parts")
    assert "fresh: head, label_conv, propagation; of the file not used: cls_pos, cls_token, decoder" in out and "instance mIoU" in out
    assert {"instance_miou", "class_miou", "accuracy"} <= log(place / "parts")[-1].keys() and (place / "parts" / "parts.png").is_file()
    (place / "Mug").mkdir()
    np.save(place / "Mug" / "mine.npy", arrays(1, 300)[0])
    out = run(place, monkeypatch, capsys, "--predict", "Mug", "--checkpoint", "parts/last.pt", "--out", "coloured")
    assert re.search(r"^mine\.npy +300  Mug part 3[67] \d+ %", out, re.M)
    stored = np.load(place / "coloured" / "mine.npy.npz")
    assert set(stored["labels"]) <= {36, 37} and np.allclose(stored["points"], arrays(1, 300)[0])
    assert np.allclose(shapes.read_points(place / "coloured" / "mine.npy.ply"), arrays(1, 300)[0], atol=1e-6)
    with pytest.raises(ValueError, match="none of the checkpoint's categories, wanted --category, or a folder named one of Bag, Mug$"):
        run(place, monkeypatch, capsys, "--predict", "Mug", "--category", "Teapot", "--checkpoint", "parts/last.pt")
    with pytest.raises(ValueError, match="the checkpoint holds a Segmenter, wanted a Student or Classifier"):
        run(place, monkeypatch, capsys, "--predict", "Mug", "--features", "x.npz", "--checkpoint", "parts/last.pt")


def test_scenes_end_to_end_and_a_room_is_coloured(place, monkeypatch, capsys):
    write_s3dis(place / "s3dis")
    out = run(place, monkeypatch, capsys, "--task", "scene", "--data", "s3dis", "--checkpoint", "student.pt", "--points", 128, "--batch-size", 2,
              "--steps", 2, "--out", "scene")
    assert re.search(r"^clutter +[\d.]+ +[\d.]+ +\d+$", out, re.M) and re.search(r"^beam +nan +nan +0$", out, re.M)
    last = log(place / "scene")[-1]
    assert last["miou"] == pytest.approx(np.mean([v for k, v in last.items() if k.startswith("iou_") and v is not None]))
    assert (place / "scene" / "scene.png").is_file() and "mIoU" in out
    np.save(place / "room.npy", np.load(place / "s3dis" / "Area_5_office_1.npy")[:, :3])
    out = run(place, monkeypatch, capsys, "--predict", "room.npy", "--checkpoint", "scene/last.pt", "--out", "coloured")
    assert re.search(r"^room\.npy +900  [a-z]+ \d+ %", out, re.M) and len(np.load(place / "coloured" / "room.npy.npz")["labels"]) == 900


def test_the_script_ends_a_mistake_with_one_line_and_code_2(place):
    done = subprocess.run([sys.executable, finetune.__file__, "--data", "nothing", "--checkpoint", "none"], cwd=place, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --data nothing: no such file or folder\n")
