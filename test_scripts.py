"""The scripts: what they share, both stages, the downstream tasks, detection, as a user runs them."""

import csv
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import xml.etree.ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import act
import clouds
import detect
import finetune
import train_student
import train_teacher
import training

torch.set_num_threads(1)  # clouds are tiny here: threads would only wait for one another

HERE = Path(__file__).resolve().parent
STAGES = {"teacher": train_teacher, "student": train_student}
SHORT = ["--points", "64", "--batch-size", "4", "--precision", "fp32"]
TINY = {  # flags of a run of seconds
    "teacher": [*SHORT, "--weights", "random", "--set", "num_group=8", "group_size=8",
                "num_prompt=2", "num_tokens=16", "encoder_dims=16", "tokens_dims=16",
                "decoder_dims=16"],
    "student": [*SHORT, "--set", "width=32", "depth=2", "num_heads=1", "encoder_dims=32"],
}
SMALL = act.StudentConfig(num_group=8, group_size=4, width=32, depth=1, num_heads=1,
                          encoder_dims=32, decoder_depth=1, target_dim=12, drop_path=0.0)

def run(stage, *args, flags=None):
    """A script's main, in this process, with the flags of a tiny run or those given."""
    words = map(str, [*(flags or TINY[stage]), *args])
    STAGES[stage].main(training.parse_flags(STAGES[stage].Config, "", list(words)))

def run_as_script(monkeypatch, stage, *args):
    """The same by way of the command line -> the exit code."""
    monkeypatch.setattr(sys, "argv", ["script", *TINY[stage], *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        training.run_script(STAGES[stage].main, STAGES[stage].Config, "")
    return stop.value.code

def python(*args):
    """Another process -> CompletedProcess."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    words = [sys.executable, *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=170, env=env)

def rows_of(folder):
    """metrics.jsonl without the seconds."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows

def checkpoint(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)

def equal(a, b):
    """Whether nested dicts and lists of tensors are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """8 training and 4 test clouds of two classes, 100 points each."""
    root = tmp_path_factory.mktemp("data")
    shapes = clouds.synthetic_clouds(6, seed=3, num_points=100)
    for i, label in enumerate(shapes.labels.tolist()):
        if shapes.classes[label] in ("torus", "chair"):
            path = root / ("train" if i % 6 < 4 else "test") / shapes.classes[label] / f"{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, shapes[i].numpy())
    return root

@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory, folder):
    """The folder of a finished run of stage I: two epochs of two steps."""
    out = tmp_path_factory.mktemp("teacher")
    run("teacher", "--data", folder, "--out", out, "--epochs", 2, "--log-every", 1)
    return out

@pytest.fixture
def args_of(folder, teacher_run):
    student = ["--data", folder, "--teacher", teacher_run / "last.pt"]
    return {"teacher": ["--data", folder], "student": student}

# -- schedules, optimizer, batches ----------------------------------------------------------------
def test_schedules_at_their_ends_and_middle_and_in_shorter_runs():
    published = train_teacher.PUBLISHED_STEPS
    temperature, kl_weight = train_teacher.temperature, train_teacher.kl_weight
    assert temperature(0, published) == 1 and temperature(100_000, published) == 0.0625
    assert temperature(50_000, published) == pytest.approx((1 + 0.0625) / 2)
    assert temperature(2 * published, 2 * published) == 0.0625  # longer runs do not stretch them
    assert kl_weight(10_000, published) == 0 and kl_weight(60_000, published) == pytest.approx(0.05)
    assert kl_weight(110_000, published) == pytest.approx(0.1)
    for schedule in (temperature, kl_weight):
        wanted = schedule(60_000, published)
        assert schedule(600, published // 100) == pytest.approx(wanted, rel=1e-3)

def test_the_rate_warms_up_for_a_tenth_at_most_and_ends_on_a_cosine():
    config = replace(training.RunConfig(), steps=1000, lr=1e-3)
    optimizer = training.adamw(torch.nn.Linear(1, 1), 1.0, 0.0)

    def rate(step, warmup=50):
        found = training.set_lr(optimizer, step, config, end=1e-6, warmup=warmup)
        assert [group["lr"] for group in optimizer.param_groups] == [found, found]
        return found

    assert rate(0) == 1e-6 and rate(25) == pytest.approx((1e-6 + 1e-3) / 2)
    assert rate(50) == pytest.approx(1e-3) and rate(525) == pytest.approx((1e-3 + 1e-6) / 2)
    assert rate(1000) == pytest.approx(1e-6)
    assert rate(99, warmup=10_000) < rate(100, warmup=10_000) == pytest.approx(1e-3)

def test_weight_decay_spares_vectors_biases_tokens_and_what_is_frozen(teacher_run):
    teacher = act.load(teacher_run / "last.pt")
    names = {id(p): name for name, p in teacher.named_parameters()}
    decayed, spared = training.adamw(teacher, 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in (decayed, spared))
    assert {"codebook", "visual_prompt_pos", "deep_prompt_pos", "proj_pre.weight"} <= decayed
    assert {"visual_prompt_token", "deep_prompt_tokens", "proj_pre.bias"} <= spared
    assert all(teacher.get_parameter(name).ndim > 1 for name in decayed)
    assert not any(name.startswith("backbone.") for name in decayed | spared)

def test_an_epoch_takes_every_cloud_once_in_an_order_of_its_own():
    config = training.plan(replace(training.RunConfig(), batch_size=4, epochs=2), count=11)
    assert (config.steps, config.epochs, config.batch_size) == (4, 2, 4)
    epochs = [training.epoch_batches(config, 11, epoch) for epoch in (0, 1)]
    orders = [torch.cat(batches) for batches in epochs]
    assert all(len(order.unique()) == 8 for order in orders) and not torch.equal(*orders)
    assert equal(training.epoch_batches(config, 11, epoch=1, step=3), epochs[1][1:])

def test_steps_cut_the_last_epoch_short_and_the_only_batch_is_kept():
    config = training.plan(replace(training.RunConfig(), batch_size=4, steps=5, epochs=9), count=12)
    assert config.epochs == 2
    assert [len(training.epoch_batches(config, 12, epoch)) for epoch in (0, 1)] == [3, 2]
    assert training.plan(replace(config, batch_size=64), count=3).batch_size == 3

def test_the_batch_is_a_multiple_of_the_processes(monkeypatch):
    monkeypatch.setattr(training, "WORLD", 2)
    config = replace(training.RunConfig(), batch_size=4, epochs=1)
    assert training.plan(config, count=3).batch_size == 2
    for batch_size, count in ((3, 10), (4, 1)):
        with pytest.raises(ValueError, match="--batch-size"):
            training.plan(replace(config, batch_size=batch_size), count)

def test_a_step_draws_from_seed_and_step_alone(monkeypatch):
    def draws(seed, step):
        generator = training.seed_step(seed, step, "cpu")
        return torch.rand(4).tolist(), torch.rand(4, generator=generator).tolist()

    noise, batch = draws(0, 7)
    torch.rand(99)
    assert draws(0, 7) == (noise, batch)
    assert draws(1, 7)[0] != noise and draws(0, 8)[1] != batch
    monkeypatch.setattr(training, "RANK", 1)
    assert draws(0, 7)[0] != noise and draws(0, 7)[1] == batch  # processes share the batch alone

# -- linear SVM -----------------------------------------------------------------------------------
def test_linear_svm_meets_the_optimality_condition_of_its_objective():
    """At the minimum the gradient w - 2 C sum_i y_i x_i max(0, 1 - y_i w.x_i) vanishes."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    x[:, 0] += labels
    w = training.linear_svm(x, labels, 3, C=0.5)
    rows = torch.cat([x, torch.ones(60, 1)], dim=1).double()
    y = 2.0 * F.one_hot(labels, 3) - 1
    gradient = w - rows.T @ (y * (1 - y * (rows @ w)).clamp_min(0))
    assert gradient.abs().max() < 1e-3

def test_svm_accuracy_is_100_on_separable_features_and_near_chance_on_noise():
    labels = torch.arange(240) % 4
    noise = torch.randn(240, 8, generator=torch.Generator().manual_seed(0))
    apart = noise + 20 * F.one_hot(labels, 8)
    assert training.svm_accuracy(apart[:120], labels[:120], apart[120:], labels[120:])[0] == 100
    assert 10 < training.svm_accuracy(noise[:120], labels[:120], noise[120:], labels[120:])[0] < 45

def test_svm_accuracy_knows_no_scale_and_chooses_c_on_every_fifth_training_feature():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(160) % 4
    x = torch.randn(160, 6, generator=generator) + 1.5 * F.one_hot(labels, 6)
    accuracy, C = training.svm_accuracy(x[:100], labels[:100], x[100:], labels[100:])
    far = x * torch.logspace(0, 3, 6) + 7
    again = training.svm_accuracy(far[:100], labels[:100], far[100:], labels[100:])
    assert again == (pytest.approx(accuracy), C)
    order, held_out, right = labels[:100].argsort(stable=True), torch.arange(100) % 5 == 0, {}
    unit, y = ((x[:100] - x[:100].mean(0)) / x[:100].std(0))[order], labels[:100][order]
    for value in (1.0, 0.1, 0.01, 0.001):
        w = training.linear_svm(unit[~held_out], y[~held_out], 4, value)
        found = (unit[held_out].double() @ w[:-1] + w[-1]).argmax(dim=1)
        right[value] = (found == y[held_out]).sum().item()
    assert C == min(value for value in right if right[value] == max(right.values()))

# -- flags ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [
    "--epoch 3", "--nonsense", "--epochs many", "--size huge", "--epochs -1", "--lr nan",
    "--lr inf", "--weight-decay=-1", "--prompt x", "--precision fp64", "--log-every x"])
def test_a_bad_flag_is_an_error_that_names_it(words):
    with pytest.raises(ValueError, match=words.replace("=", " ").split()[0]):
        training.parse_flags(train_teacher.Config, "", words.split())

@pytest.mark.parametrize("stage, words, named", [
    ("teacher", "--device tpu", "--device"), ("teacher", "--set num_prompt=few", "num_prompt"),
    ("teacher", "--set colour=3", "--set colour"), ("teacher", "--set num_prompt", "--set"),
    ("teacher", "--set tokens_dims=8", "tokens_dims"), ("teacher", "--points 7", "--points"),
    ("teacher", "--weights vit_of_nobody", "vit_of_nobody"), ("teacher", "--data absent", "absent"),
    ("teacher", "--init absent.pt --prompt none", "--init"), ("student", "--points 7", "--points"),
    ("student", "--teacher absent.pt", "train_teacher.py"),
    ("student", "--mask-ratio 1", "--mask-ratio"), ("student", "--mask-ratio 0.01", "--mask-ratio"),
    ("student", "--set num_group=4", "num_group"), ("student", "--set target_dim=4", "target_dim"),
    ("student", "--target coordinates --loss l2", "--loss"),
    ("student", "--target codes --loss cosine", "--loss")])
def test_a_mistake_is_one_line_and_code_2_and_leaves_no_folder(
        tmp_path, args_of, stage, words, named, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run_as_script(monkeypatch, stage, *args_of[stage], "--out", out, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error and not out.exists(), error

def test_flags_may_be_written_with_underscores_and_lists_add_up():
    words = "--batch_size 3 --log_every=2 --set a_b=1 c=2 --set d=3".split()
    config = training.parse_flags(train_teacher.Config, "", words)
    assert (config.batch_size, config.log_every, config.set) == (3, 2, ["a_b=1", "c=2", "d=3"])
    assert training.parse_flags(train_teacher.Config, "", []).set == []

@pytest.mark.parametrize("stage", STAGES)
def test_help_fits_100_columns_and_lists_what_set_takes(stage, capsys):
    with pytest.raises(SystemExit):
        training.parse_flags(STAGES[stage].Config, STAGES[stage].__doc__, ["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "num_group" in text and all(name in text for name in STAGES[stage].SET)

def test_override_keeps_types_and_leaves_the_config_as_it_was():
    config = act.StudentConfig()
    changed = training.override(config, ["depth=3", "drop_path=0"], train_student.SET)
    assert changed == replace(config, depth=3, drop_path=0.0) and config.depth == 12
    assert isinstance(changed.drop_path, float)

# -- the log --------------------------------------------------------------------------------------
def make_log(tmp_path, **settings):
    settings = dict(steps=6, epochs=3, batch_size=1, lr=1e-3, out=str(tmp_path / "run"), **settings)
    student = act.Student(SMALL)
    log = training.Log(replace(training.RunConfig(), **settings), student, ["a", "b"])
    return log, training.adamw(student, 1e-3, 0.0)

def test_rows_have_means_since_the_row_before_and_epoch_rows_the_epochs(tmp_path, capsys):
    log, optimizer = make_log(tmp_path, log_every=2)
    for value in (1.0, 2.0, 6.0):
        log.add(loss=torch.tensor(value), lr=value)
    log.end_epoch(optimizer, dict(accuracy=50.0))
    log.add(loss=torch.tensor(10.0), lr=10.0)
    log.close(done=1.0)
    rows = rows_of(tmp_path / "run")
    assert [row.get("loss") for row in rows] == [1.5, 3.0, 10.0, None]
    assert [row.get("lr") for row in rows] == [2.0, 6.0, 10.0, None]  # numbers: the last
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (1, 3), (2, 4), (1, 4)]
    assert rows[1]["accuracy"] == 50 and rows[-1]["done"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["epoch 1", "epoch 1", "epoch 2"]
    assert "clouds/s" in lines[0] and "left" in lines[0]

def test_a_mean_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    log, optimizer = make_log(tmp_path)
    log.add(loss=torch.tensor(1.0))
    log.end_epoch(optimizer, {})
    before = (log.out / "last.pt").read_bytes()
    log.add(loss=torch.tensor(math.nan))
    with pytest.raises(ValueError, match="step 2.*--lr"):
        log.end_epoch(optimizer, {})
    assert (log.out / "last.pt").read_bytes() == before
    assert [row["loss"] for row in rows_of(log.out)] == [1.0]

def test_adding_a_step_reads_no_value_on_the_host(tmp_path):
    """On a GPU each such read would wait for all that is queued there."""
    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    log, _ = make_log(tmp_path)
    with Reads() as reads:
        log.add(loss=torch.tensor(1.0), grad_norm=torch.tensor(2.0), lr=0.1)
        assert reads.count == 0
        torch.tensor(1.0).item()
        assert reads.count == 1

def test_an_earlier_run_is_set_aside_unless_a_run_goes_on_there(tmp_path):
    log, optimizer = make_log(tmp_path)
    log.add(loss=torch.tensor(1.0))
    log.end_epoch(optimizer, {})
    (log.out / "notes.txt").write_text("mine")
    names = ("last.pt", "metrics.jsonl", "config.json")
    before = [(log.out / name).read_bytes() for name in names]
    code = "import sys, pathlib, test_scripts; test_scripts.make_log(pathlib.Path(sys.argv[1]))"
    error = python("-c", code, tmp_path).stderr  # another process, while this one has the folder
    assert "ValueError" in error and str(log.out) in error and "another run" in error
    assert [(log.out / name).read_bytes() for name in names] == before
    make_log(tmp_path)
    aside, = log.out.glob("earlier-*")
    assert [(aside / name).read_bytes() for name in names] == before
    assert not (log.out / "last.pt").exists() and (log.out / "notes.txt").exists()

# -- the stages -----------------------------------------------------------------------------------
def test_stage_one_leaves_its_results(teacher_run, folder):
    files = {path.name for path in teacher_run.iterdir()}
    assert {"loss.svg", "reconstruction.png", "reconstruction.ply"} <= files
    assert not any(name.endswith(".tmp") for name in files)
    *rows, closing = rows_of(teacher_run)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    keys = "loss reconstruction kl grad_norm lr temperature kl_weight".split()
    assert all(math.isfinite(row[key]) for row in rows for key in keys)
    for row in (rows[2], rows[5]):
        assert row["cd_l1"] > 0 and 1 <= row["perplexity"] <= 16 and 1 <= row["codes_used"] <= 16
    for name in ("cd_l1", "cd_l2", "fscore"):
        assert closing[f"{name}_before"] >= 0 and closing[f"{name}_after"] >= 0
    teacher = act.load(teacher_run / "last.pt")  # what was measured is what was saved
    config, test = replace(train_teacher.Config(), points=64), clouds.open_dataset(folder).test
    cd_l1 = train_teacher.evaluate(teacher, test, config, 256)["cd_l1"]
    assert cd_l1 == pytest.approx(closing["cd_l1_after"], rel=1e-5)
    assert cd_l1 == pytest.approx(rows[-1]["cd_l1"], rel=1e-5)

def test_config_json_and_the_checkpoint_show_what_ran(teacher_run):
    about, state = json.loads((teacher_run / "config.json").read_text()), checkpoint(teacher_run)
    assert (about["settings"]["batch_size"], about["settings"]["size"]) == (4, "tiny")
    assert about["command"] and about["device"] == "cpu" and torch.__version__ in about["versions"]
    assert (state["settings"], state["config"]) == (about["settings"], about["model"])
    assert (state["kind"], state["epoch"], state["step"]) == ("Teacher", 2, 4)
    assert {"model", "optimizer", "random", "log", "versions"} <= state.keys()

def test_at_size_tiny_the_tokenizer_is_made_of_patches_and_frozen(tmp_path, folder, monkeypatch):
    start, fix = {}, train_teacher.fix_tokenizer

    def spy(teacher, *args):
        fix(teacher, *args)
        assert teacher.frozen == [teacher.backbone, teacher.encoder, teacher.dgcnn_1]
        teacher.train()
        assert not any(part.training for module in teacher.frozen for part in module.modules())
        start.update({name: value.clone() for name, value in teacher.state_dict().items()})

    monkeypatch.setattr(train_teacher, "fix_tokenizer", spy)
    run("teacher", "--data", folder, "--out", tmp_path, "--epochs", 1)
    state, fixed = checkpoint(tmp_path)["model"], ("backbone.", "encoder.", "dgcnn_1.")
    for name in state:
        assert torch.equal(state[name], start[name]) == name.startswith(fixed), name
    teacher, train = act.load(tmp_path / "last.pt"), clouds.open_dataset(folder).train
    xyz, _ = train.sample(torch.arange(8), 64, torch.Generator().manual_seed(0))
    codes = teacher.tokenize(*act.group_points(xyz, 8, 8))
    assert len(codes.unique()) >= 8  # of 16: patches are told apart

def test_a_larger_size_trains_the_tokenizer_and_init_keeps_the_sizes(tmp_path, folder):
    args = ["--data", folder, "--size", "small", "--epochs", 1]
    run("teacher", *args, "--prompt", "none", "--out", tmp_path / "a")
    init = ["--init", tmp_path / "a/last.pt", "--lr", 0.01]
    run("teacher", *args, *init, "--out", tmp_path / "b", flags=SHORT)
    before, after = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert after["config"] == before["config"] and after["config"]["num_tokens"] == 16
    moved = {name for name in before["model"]
             if not torch.equal(before["model"][name], after["model"][name])}
    assert {"encoder.first_conv.0.weight", "dgcnn_1.layer5.0.weight", "codebook"} <= moved
    assert not any(name.startswith("backbone.") for name in moved)

@pytest.mark.parametrize("target, extra, loss", [
    ("teacher", ["--mask", "block"], "cosine"), ("teacher", ["--loss", "smooth_l1"], "smooth_l1"),
    ("codes", [], None)])
def test_stage_two_runs_with_every_target(tmp_path, args_of, target, extra, loss, capsys):
    args = [*args_of["student"], "--target", target, *extra]
    run("student", *args, "--out", tmp_path, "--epochs", 1)
    row, closing = rows_of(tmp_path)
    assert 0 <= closing["svm_untrained"] <= 100 and 0 <= closing["svm_trained"] <= 100
    assert math.isfinite(row["loss"]) and len(row["cosine_per_depth"]) == 2
    files = {path.name for path in tmp_path.iterdir()}
    assert {"reconstruction.png", "features.png", "features.ply", "loss.svg"} <= files
    c = act.load(tmp_path / "last.pt").config
    assert (c.num_group, c.group_size, c.target_dim, c.points, c.normalized) == (8, 8, 16, 64, True)
    assert checkpoint(tmp_path)["settings"]["loss"] == loss
    printed = capsys.readouterr().out
    assert printed.startswith(clouds.describe(clouds.open_dataset(args[1])))
    assert "too few" in printed and "untrained ->" in printed

def test_coordinates_need_no_teacher(tmp_path, folder, capsys):
    args = ["--teacher", "absent.pt", "--target", "coordinates", "--epochs", 1, "--out", tmp_path]
    run("student", "--data", folder, *args, "--set", "num_group=6", "group_size=5")
    c = act.load(tmp_path / "last.pt").config
    assert (c.num_group, c.group_size, c.target_dim) == (6, 5, 15)
    assert "no teacher" in capsys.readouterr().out

def test_the_teacher_of_stage_two_stays_as_it_was(args_of, folder):
    config = replace(train_student.Config(), loss="cosine", teacher=args_of["student"][3])
    target = train_student.Target(config, torch.device("cpu"))
    before = {name: value.clone() for name, value in target.teacher.state_dict().items()}
    xyz, _ = clouds.open_dataset(folder).train.sample(torch.arange(4), 64)
    patches = act.group_points(xyz, 8, 8)
    prediction = torch.randn(4, 3, 16, requires_grad=True)
    target.loss(prediction, *patches, torch.arange(3).expand(4, 3)).backward()
    assert prediction.grad.abs().sum() > 0 and not target.teacher.training
    assert all(p.grad is None for p in target.teacher.parameters())
    assert equal(before, dict(target.teacher.state_dict()))
    each_time = target.teacher.features(*patches)  # prompts computed anew, not once
    assert torch.allclose(each_time, target.features(*patches), atol=1e-6)

@pytest.mark.parametrize("stage", STAGES)
def test_init_takes_all_weights_that_fit(tmp_path, stage, args_of, capsys):
    args = [*args_of[stage], "--epochs", 1]
    run(stage, *args, "--out", tmp_path / "a")
    init = ["--init", tmp_path / "a/last.pt", "--lr", 0, "--weight-decay", 0]
    run(stage, *args, *init, "--out", tmp_path / "b", flags=SHORT)
    one, two = (checkpoint(tmp_path / name)["model"] for name in "ab")
    assert str(tmp_path / "a") in capsys.readouterr().out
    for name in one:
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(one[name], two[name], atol=1e-4), name  # warm-up is from 1e-6
    if stage == "student":
        run(stage, *args, *init, "--target", "coordinates", "--out", tmp_path / "c", flags=SHORT)
        assert "newly initialised: head.weight, head.bias" in capsys.readouterr().out
        with pytest.raises(ValueError, match="a/last.pt.*width=64"):
            run(stage, *args, *init, "--set", "width=64", "--out", tmp_path / "d")

@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_clouds_are_enough_for_both_stages(tmp_path, folder, count, capsys):
    data = tmp_path / "few"
    data.mkdir()
    for file in sorted(folder.rglob("*.npy"))[:count]:
        (data / file.name).write_bytes(file.read_bytes())
    args = ["--data", next(data.iterdir()) if count == 1 else data, "--epochs", 2]
    run("teacher", *args, "--out", tmp_path / "t")
    run("student", *args, "--out", tmp_path / "s", "--teacher", tmp_path / "t/last.pt")
    assert checkpoint(tmp_path / "s")["step"] == 2
    assert "svm_trained" not in rows_of(tmp_path / "s")[-1]
    assert "two classes" in capsys.readouterr().out

def test_shapenet_is_pretrained_on_whole_and_says_so(tmp_path, folder, args_of, capsys):
    names = {"train": [], "test": []}
    for part in ("shapenet_pc", "ShapeNet-55"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for i, file in enumerate(sorted(folder.rglob("*.npy"))):
        names["train" if i < 8 else "test"].append(f"{i % 2:08d}-{i}.npy")
        (tmp_path / "data/shapenet_pc" / f"{i % 2:08d}-{i}.npy").write_bytes(file.read_bytes())
    for split in names:
        (tmp_path / f"data/ShapeNet-55/{split}.txt").write_text("\n".join(names[split]))
    args = [*args_of["student"], "--data", tmp_path / "data", "--epochs", 1]
    run("student", *args, "--out", tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == 3  # 12 clouds in batches of 4
    assert "all 12 clouds" in capsys.readouterr().out

def test_a_cloud_with_too_few_distinct_points_is_named_and_nothing_moved(tmp_path, args_of):
    run("teacher", *args_of["teacher"], "--out", tmp_path / "run", "--epochs", 1)
    np.save(tmp_path / "few.npy", np.random.default_rng(0).random((5, 3)).repeat(20, axis=0))
    with pytest.raises(ValueError, match="few.npy.*8"):
        run("teacher", "--data", tmp_path / "few.npy", "--out", tmp_path / "run", "--epochs", 1)
    assert (tmp_path / "run/last.pt").exists() and not list(tmp_path.glob("run/earlier-*"))

def lines_of(chart):
    root = xml.etree.ElementTree.parse(chart).getroot()
    lines = [e.get("points").split() for e in root.iter() if e.tag.endswith("polyline")]
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    return [[tuple(map(float, point.split(","))) for point in line] for line in lines], texts

def test_the_chart_shows_loss_and_test_metric(tmp_path, teacher_run):
    (loss, metric), texts = lines_of(teacher_run / "loss.svg")
    assert (len(loss), len(metric)) == (4, 2)  # a point for each step, for each epoch
    assert loss[-1][0] == metric[-1][0] and {"cd_l1", "step", "4"} <= set(texts)
    rows = [dict(epoch=i, step=10 * i, loss=1.0 / i) for i in (1, 2, 3)]
    clouds.write_chart(tmp_path / "a.svg", rows)  # epoch rows alone
    (loss,), _ = lines_of(tmp_path / "a.svg")
    assert loss == sorted(loss) and loss[0][1] < loss[1][1] < loss[2][1]  # downwards is larger y
    clouds.write_chart(tmp_path / "b.svg", [])
    assert lines_of(tmp_path / "b.svg")[0] == [[]]

# -- interruptions --------------------------------------------------------------------------------
STOP = """
import os, signal
import train_{stage} as script, training
add = training.Log.add
def add_and_stop(log, **values):
    add(log, **values)
    if log.step == 3:
        os.kill(os.getpid(), signal.{signal})
training.Log.add = add_and_stop
training.run_script(script.main, script.Config, "")
"""

@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_in_mid_epoch_resumes_to_the_same_bits(tmp_path, stage, args_of):
    args = [*args_of[stage], "--epochs", 3, "--log-every", 1]
    run(stage, *args, "--out", tmp_path / "whole")
    args += ["--out", tmp_path / "cut"]
    done = python("-c", STOP.format(stage=stage, signal="SIGKILL"), *TINY[stage], *args)
    assert done.returncode == -signal.SIGKILL and checkpoint(tmp_path / "cut")["step"] == 2
    for _ in ("interrupted", "finished"):  # of the latter the closing evaluation alone is left
        run(stage, *args, "--resume")
        one, two = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
        for part in ("model", "optimizer", "epoch", "step", "random"):
            assert equal(one[part], two[part]), part
        assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("earlier-*"))

def test_ctrl_c_ends_in_one_line_that_names_the_epoch(tmp_path, folder):
    args = [*TINY["teacher"], "--data", folder, "--epochs", 9, "--out", tmp_path]
    done = python("-c", STOP.format(stage="teacher", signal="SIGINT"), *args)
    assert done.returncode == 130 and done.stderr.count("\n") == 1, done.stderr
    assert "--resume" in done.stderr and "epoch 1" in done.stderr

def test_so_does_ctrl_c_in_the_closing_evaluation(tmp_path, args_of, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_teacher, "picture", interrupted)
    args = [*args_of["teacher"], "--epochs", 1, "--out", tmp_path]
    assert run_as_script(monkeypatch, "teacher", *args) == 130
    printed = capsys.readouterr()
    assert "after epoch 1" in printed.err and "..." in printed.out

def test_resuming_with_more_epochs_goes_on_with_the_longer_schedule(tmp_path, args_of, capsys):
    args = [*args_of["student"], "--out", tmp_path]
    run("student", *args, "--epochs", 1)
    run("student", *args, "--epochs", 3, "--resume")
    assert "longer run" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 4, 6, 6]
    run("student", *args, "--steps", 7, "--resume")  # half an epoch, then its other half
    run("student", *args, "--steps", 8, "--resume")
    assert checkpoint(tmp_path)["step"] == 8

def test_resuming_with_other_settings_or_clouds_is_refused_by_name(tmp_path, args_of, folder):
    args = [*args_of["student"], "--out", tmp_path]
    run("student", *args, "--epochs", 2)
    before = sorted(path.name for path in tmp_path.iterdir())
    changes = ["--lr 0.5", "--mask block", "--set drop_path=0", "--seed 3", "--epochs 1"]
    for change in [*changes, f"--data {folder / 'test'} --epochs 4"]:
        name = change.split()[0].removeprefix("--")
        name = {"epochs": "steps", "data": "clouds"}.get(name, name)
        with pytest.raises(ValueError, match=f"last.pt.*{name} was"):
            run("student", *args, "--epochs", 2, "--resume", *change.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == before

# -- several processes ----------------------------------------------------------------------------
DRIVER = """
import torch, training, test_scripts
from pathlib import Path

def main(config):
    config, device = training.setup(config, {"tiny": dict(epochs=1, batch_size=4, lr=1e-2)})
    config, student = training.plan(config, 8), test_scripts.small_student()
    net, optimizer = training.parallel(student, config), training.adamw(student, config.lr, 0.05)
    log = training.Log(config, student, list("abcdefgh"))
    for batch in training.epoch_batches(config, 8, 0):
        generator = training.seed_step(config.seed, log.step, device)
        loss = test_scripts.small_loss(net, batch, generator, training.RANK, training.WORLD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.add(loss=loss)
    log.end_epoch(optimizer, {})
    torch.save(student.state_dict(), Path(config.out).parent / f"{training.RANK}.pt")

training.run_script(main, training.RunConfig, "")
"""

def small_student():
    torch.manual_seed(5)
    return act.Student(SMALL).train()

def small_loss(net, batch, generator, rank, world):
    """The loss of one process's share of a batch."""
    shapes = clouds.synthetic_clouds(1, seed=4, num_points=100)
    xyz, _ = shapes.sample(batch, 64, generator)
    neighborhood, center = act.group_points(clouds.scale_translate(xyz, generator), 8, 4)
    mask = act.random_mask(center, 0.5, generator)
    neighborhood, center, mask = (t[rank::world] for t in (neighborhood, center, mask))
    _, masked = act.split_mask(mask, "cpu")
    patches = act.gather_points(neighborhood.flatten(2), masked)
    return act.distillation_loss(net(neighborhood, center, mask), patches, "l2")

def test_synchronised_batch_norm_in_one_process_is_the_plain_one():
    x = torch.randn(3, 5, 8)
    plain, synchronised = act.BatchNorm(8), act.BatchNorm(8)
    synchronised.__class__ = training.SyncBatchNorm  # as `parallel` makes it on GPUs
    assert torch.equal(plain(x), synchronised(x))
    assert equal(dict(plain.state_dict()), dict(synchronised.state_dict()))

def test_two_processes_train_as_the_mean_of_their_gradients(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--out", tmp_path / "run", "--device", "cpu", "--precision", "fp32"]
    done = python(*launch, tmp_path / "driver.py", *flags)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("epoch 1") == 1
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    student, losses = small_student(), []
    optimizer = training.adamw(student, 1e-2, 0.05)
    config = training.plan(replace(training.RunConfig(), batch_size=4, epochs=1), 8)
    for step, batch in enumerate(training.epoch_batches(config, 8, 0)):
        optimizer.zero_grad()
        for rank in (0, 1):
            loss = small_loss(student, batch, training.seed_step(0, step, "cpu"), rank, 2) / 2
            loss.backward()  # adds up to the mean
            losses.append(loss.item())
        optimizer.step()
    for name, parameter in student.named_parameters():
        assert torch.equal(one[name], two[name]), name
        if not name.endswith("conv.0.bias"):  # cancelled by BatchNorm: its gradient is rounding
            assert torch.allclose(one[name], parameter, atol=1e-5), name
    row, = rows_of(tmp_path / "run")
    assert row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)

# =================================================================================================
# finetune.py
# =================================================================================================

FINE_SIZES = dict(num_group=8, group_size=8, points=128, width=24, depth=3, num_heads=2, encoder_dims=24)
KINDS = ["mug", "sphere", "table"]
MODEL = ("--checkpoint", "student.pt", "--points", 128)
FINE = ("--data", "shapes", *MODEL, "--batch-size", 6, "--epochs", 1)
DENSE = (*MODEL, "--batch-size", 2, "--steps", 2)
CPU = torch.device("cpu")

def shape(kind, *seed, points=200):
    return clouds.synthetic_cloud(kind, points, np.random.default_rng(seed))[0]

def arrays(n=4, points=40, columns=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, points, columns)).astype(np.float32)

def save_model(path, model):
    state = dict(kind=type(model).__name__, config=asdict(model.config), model=model.state_dict())
    act.save(state, path)

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a student's checkpoint and a small labelled set; one of its clouds is small."""
    root = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    save_model(root / "student.pt", act.Student(act.StudentConfig(**FINE_SIZES, target_dim=12)))
    for split, count in (("train", 6), ("test", 2)):
        for c, kind in enumerate(KINDS):
            folder = root / "shapes" / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                points = 90 if (split, c, i) == ("test", 0, 1) else 200
                np.save(folder / f"{i}.npy", shape(kind, c, i, count, points=points))
    return root

@pytest.fixture
def finetune_run(place, monkeypatch, capsys):
    """finetune_run(*flags): the script's main in that folder -> what it printed."""
    monkeypatch.chdir(place)

    def finetune_run(*flags):
        flags = ["--device", "cpu", "--precision", "fp32", *map(str, flags)]
        finetune.main(training.parse_flags(finetune.Config, "", argv=flags))
        return capsys.readouterr().out

    return finetune_run

def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]

def options(**changed):
    values = dict(size="tiny", points=128, batch_size=4, augment="none", checkpoint="none")
    return finetune.Config(**{**values, **changed})

def dataset(*counts):
    """Clouds of so many points, each a class of its own, to train and test on."""
    points = torch.cat([torch.from_numpy(arrays(1, n, seed=n)[0]) for n in counts])
    names, offsets = [str(n) for n in counts], torch.tensor([0, *counts]).cumsum(0)
    split = clouds.Clouds(points, offsets, names, torch.arange(len(counts)), names)
    return clouds.Dataset("", split, split)

# -- metrics ---------------------------------------------------------------------------------------
def test_accuracy_and_iou_of_a_case_by_hand():
    truth, predicted = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 0, 3])
    matrix = finetune.confusion(truth, predicted, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0, 0, 0, 1]]
    expected = (100 * 4 / 6, 100 * (2 / 3 + 1 / 2 + 1) / 3)
    assert finetune.accuracy(matrix) == pytest.approx(expected)
    expected = [100 * 2 / 4, 100 / 3, np.nan, 100]
    assert finetune.iou(matrix).tolist() == pytest.approx(expected, nan_ok=True)

def test_shape_iou_equals_a_loop_over_sets_and_an_absent_part_counts_one():
    truth, foreign = torch.tensor([4, 4, 4, 5, 5]), torch.tensor([4, 4, 4, 5, 9])
    assert finetune.shape_iou(truth, foreign, (4, 6)) == pytest.approx(100 * (1 + 1 / 2) / 2)
    rng = np.random.default_rng(1)
    for _ in range(20):
        truth, predicted, each = rng.integers(3, 6, 12), rng.integers(3, 7, 12), []
        for part in range(3, 8):
            a, b = set(np.flatnonzero(truth == part)), set(np.flatnonzero(predicted == part))
            each.append(len(a & b) / len(a | b) if a | b else 1)
        value = finetune.shape_iou(torch.tensor(truth), torch.tensor(predicted), (3, 8))
        assert value == pytest.approx(100 * np.mean(each))

def test_parts_are_averaged_over_instances_and_over_categories(monkeypatch):
    made = clouds.compositions(clouds.synthetic_clouds(2, num_points=64))
    made = made.select([0, 1, 2])  # two of a category, one of another
    data, sizes = clouds.Dataset("", made, made), act.EncoderConfig(**FINE_SIZES)
    task = finetune.Parts(options(task="parts"), data, sizes, CPU)
    first = torch.tensor([task.ranges[label][0] for label in made.labels])
    truth = first[:, None].expand(-1, 4)
    wrong = truth + torch.tensor([0, 0, 1])[:, None]  # IoU 0 of two parts of the last
    monkeypatch.setattr(task, "predict", lambda model, i: (None, truth, wrong, made.labels))
    parts = task.ranges[1][1] - task.ranges[1][0]
    last = 100 * (parts - 2) / parts
    metrics = task.evaluate(None)
    assert metrics["instance_miou"] == pytest.approx((200 + last) / 3)
    assert metrics["class_miou"] == pytest.approx((100 + last) / 2)
    assert metrics["accuracy"] == pytest.approx(100 * 2 / 3)

def test_the_table_shows_a_dash_for_what_does_not_occur(capsys):
    finetune.print_table(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]]), ["cat", "dog", "cow"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[0] == ["cat", "4", "75.0", "75.0", "dog", "1"]
    assert rows[1:] == [["dog", "0", "-", "0.0"], ["cow", "0", "-", "-"]]

# -- what the networks take ------------------------------------------------------------------------
def test_subsampled_clouds_are_farthest_points_and_small_ones_stay():
    split = dataset(300, 60, 128, 140).train
    less = finetune.subsample(split, 128, "cpu")
    own = split[0][None]
    assert torch.equal(less[0], act.gather_points(own, act.farthest_point_sample(own, 150))[0])
    assert torch.equal(less[1], split[1]) and torch.equal(less[2], split[2])
    assert torch.equal(less[3].unique(dim=0), split[3].unique(dim=0))
    seen = {}
    for indices, xyz in finetune.evaluation_batches(less, 128):
        seen.update(zip(indices.tolist(), xyz))
    assert [len(seen[i]) for i in range(4)] == [128, 60, 128, 128]  # nothing is repeated
    expected = torch.from_numpy(clouds.normalize(less[0][:128].numpy()))
    assert torch.allclose(seen[0], expected, atol=1e-6)
    published = [finetune.subsample(dataset(2500).train, n, "cpu") for n in (1024, 2048)]
    assert [len(less[0]) for less in published] == [1200, 2400]

def test_augmentations_do_what_their_names_say():
    xyz = torch.from_numpy(arrays())

    def augmented(**flags):
        return finetune.augment(xyz, options(**flags), training.seeded("cpu", 0))

    for task, axis in (("classify", 1), ("scene", 2)):
        turned = augmented(augment="rotate", task=task)
        assert torch.equal(turned[..., axis], xyz[..., axis]) and not torch.allclose(turned, xyz)
        assert torch.allclose(turned.norm(dim=2), xyz.norm(dim=2), atol=1e-5)
    assert torch.equal(augmented(), xyz)
    for task, alike in (("parts", True), ("scene", True), ("classify", False)):
        scaled = augmented(augment="scale_translate", task=task)
        factor = (scaled[:, 1] - scaled[:, 0]) / (xyz[:, 1] - xyz[:, 0])  # (B, 3)
        assert torch.allclose(factor, factor[:, :1].expand(-1, 3), atol=1e-3) == alike
        assert not alike or 0.79 < factor.min() <= factor.max() < 1.26

def test_episodes_are_reproducible_and_hold_what_was_asked():
    split = clouds.synthetic_clouds(5, num_points=64)
    data = clouds.Dataset("", split, split)
    a, b, c = (finetune.draw_episode(data, 2, 3, fold) for fold in (0, 0, 1))
    assert (a.train.names, a.test.names) == (b.train.names, b.test.names)
    assert a.train.names != c.train.names and a.train.labels.bincount().tolist() == [3, 3]
    for part in (a.train, a.test):
        for i, name in enumerate(part.names):
            k = split.names.index(name)
            assert torch.equal(part[i], split[k])
            assert part.classes[part.labels[i]] == split.classes[split.labels[k]]
    with pytest.raises(ValueError, match="--shot 9.*got 0"):
        finetune.draw_episode(data, 2, 9, 0)

def test_a_training_block_holds_what_a_slow_search_finds():
    xyz = np.random.default_rng(3).uniform(0, [3, 2, 1], (700, 3)).astype(np.float32)
    xyz = xyz[xyz[:, 0].argsort()]
    room = clouds.Room("room", 1, xyz, xyz[:, 2] > 0.5)
    drawn, labels = finetune.sample_block(room, 60, np.random.default_rng(5))
    assert np.array_equal(drawn, finetune.sample_block(room, 60, np.random.default_rng(5))[0])
    assert drawn.dtype == np.float32 and np.array_equal(labels, drawn[:, 2] > 0.5)  # z as it is
    found = []
    for center in xyz:  # the block's centre is one of the points
        moved = xyz - np.append(center[:2], 0)
        inside = moved[(abs(moved[:, :2]) <= 0.5).all(1)]
        distance = abs(drawn[:, None] - inside).max(-1).min(-1)
        found.append(len(inside) > 30 and distance.max() < 1e-5)
    assert any(found)
    with pytest.raises(ValueError, match="room.*--points"):
        finetune.sample_block(room, 4000, np.random.default_rng(0))

@pytest.mark.parametrize("width", [0.4, 1.0, 1.3, 4.0])
def test_test_blocks_cover_every_point(width):
    rng, seen = np.random.default_rng(0), np.zeros(500, int)
    xyz = (rng.uniform(0, [width, 1.7, 2], (500, 3)) - 3).astype(np.float32)
    for inside, origin in finetune.room_blocks(xyz):
        assert abs(xyz[inside, :2] - origin[:2]).max() <= 0.502 and origin[2] == 0
        seen[inside] += 1
    assert seen.min() >= 1 and (width < 2 or seen.max() >= 4)

def test_every_point_is_labelled_and_its_votes_are_means():
    class Fixed(torch.nn.Linear):  # class 1 with a certainty that z tells
        config = act.SegmenterConfig(num_parts=2, normalized=False)

        def forward(self, xyz, category):
            return torch.stack([torch.zeros(xyz.shape[:2]), xyz[..., 2]], dim=-1)

    xyz = np.random.default_rng(0).uniform(-1, 1, (333, 3))
    votes = finetune.label_points(Fixed(1, 1), xyz, 50)
    assert torch.allclose(votes[:, 1], torch.from_numpy(xyz[:, 2]).sigmoid(), atol=1e-6)
    assert torch.allclose(votes.sum(1), torch.ones(333).double())

def test_a_vote_is_the_mean_of_logits():
    config = options(vote=3, augment="scale_translate")
    data, sizes = dataset(150, 160, 170, 180), act.EncoderConfig(**FINE_SIZES)
    task, logits = finetune.Classification(config, data, sizes, CPU), []
    model = task.build().eval()
    for i in range(3):
        generator = training.seeded(CPU, config.seed, "vote", i, 0)
        xyz, _ = task.test.sample(torch.arange(4), 128, generator)
        logits.append(model(finetune.augment(xyz, config, generator)))
    best = torch.stack(logits).mean(dim=0).argmax(dim=1)
    assert torch.equal(task.vote(model), finetune.confusion(task.test.labels, best, 4))

# -- protocols and checkpoints ---------------------------------------------------------------------
@pytest.mark.parametrize("protocol", ["mlp3", "linear"])
def test_frozen_protocols_leave_the_encoder_bit_identical(finetune_run, protocol):
    finetune_run(*FINE, "--protocol", protocol, "--out", protocol)
    before, after = act.load("student.pt"), act.load(f"{protocol}/last.pt")
    assert after.config.head == protocol
    for name, value in before.encoder.state_dict().items():  # statistics, too
        assert torch.equal(value, after.encoder.state_dict()[name]), name

def started(checkpoint, **changed):
    """(the network of a classification run, the checkpoint's)"""
    config = options(checkpoint=str(checkpoint), **{"size": "auto", **changed})
    source = finetune.open_checkpoint(config)
    sizes = finetune.encoder_sizes(replace(config, size="tiny"), source)
    task = finetune.Classification(config, dataset(600, 700), sizes, CPU)
    return finetune.start_model(config, task, source, CPU), source

def test_what_is_loaded_and_what_is_new_is_reported(place, tmp_path, capsys):
    model, source = started(place / "student.pt")
    new, unused = capsys.readouterr().out.split("newly initialised: ")[1].split("; not used: ")
    assert new == "head" and "decoder" in unused and "cls_token" not in unused
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value)
    again, _ = started(place / "student.pt")  # the head does not depend on what else is drawn
    for a, b in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)
    capsys.readouterr()
    sizes = dict(width=64, depth=2, num_heads=1, encoder_dims=64, target_dim=96)
    student = act.Student(act.StudentConfig(**sizes))
    act.export(student, tmp_path / "release.pth")
    state = torch.load(tmp_path / "release.pth", weights_only=True)["base_model"]
    state = {key.replace("ACT_", "MAE_"): v for key, v in state.items() if "cls_" not in key}
    torch.save({"base_model": state}, tmp_path / "mae.pth")  # Point-MAE's: no class token
    model, _ = started(tmp_path / "mae.pth", points=512)
    assert "newly initialised: cls_token, cls_pos, head;" in capsys.readouterr().out
    assert torch.equal(model.encoder.norm.weight, student.encoder.norm.weight)

def test_checkpoints_that_do_not_fit_are_refused(place, tmp_path):
    state = torch.load(place / "student.pt", weights_only=True)
    state["config"]["encoder_dims"] = 32
    torch.save(state, tmp_path / "unfit.pt")
    backbone = act.BackboneConfig(width=24, depth=1, num_heads=2)
    dims = dict(encoder_dims=24, tokens_dims=24, decoder_dims=24, num_tokens=16, num_prompt=2)
    config = act.TeacherConfig(num_group=8, group_size=8, backbone=backbone, **dims)
    save_model(tmp_path / "teacher.pt", act.Teacher(config))
    refused = {"nothing.pt": "nothing.pt.*train_student.py", "unfit.pt": "unfit.pt"}
    for name, words in {**refused, "teacher.pt": "teacher.pt.*Teacher"}.items():
        with pytest.raises(ValueError, match=words):
            started(tmp_path / name)
    with pytest.raises(ValueError, match="--size base.*24"):
        started(place / "student.pt", size="base")

def test_patches_follow_the_ratio_of_the_checkpoint(place):
    groups = [started(place / "student.pt", points=n)[0].config.num_group for n in (128, 512)]
    assert groups == [8, 32]  # 16 points to a patch, as in the file
    configs = [options(size=size, points=2048) for size in ("tiny", "base")]
    assert [finetune.encoder_sizes(config, None).num_group for config in configs] == [64, 128]

@pytest.mark.parametrize("flags, keyword", [
    (dict(fold="12"), "--fold"), (dict(task="parts", protocol="linear"), "--protocol"),
    (dict(features="a.npz"), "--features"), (dict(way=1), "--way")])
def test_flags_that_do_not_fit_together_are_refused(flags, keyword):
    with pytest.raises(ValueError, match=keyword):
        options(**flags)

def test_defaults_are_the_published_ones():
    def base(**flags):
        return finetune.defaults(finetune.Config(**flags), None)["base"]

    assert base() == dict(epochs=300, batch_size=32, lr=5e-4, points=1024)
    assert base(protocol="linear")["lr"] == 1e-3 and base(task="fewshot")["epochs"] == 150
    assert base(task="parts") == dict(epochs=300, batch_size=16, lr=2e-4, points=2048)
    assert base(task="scene") == dict(epochs=60, batch_size=32, lr=2e-4, points=2048)
    assert finetune.Config(task="svm").out == "runs/svm"

# -- tasks through the script ----------------------------------------------------------------------
def test_features_agree_three_ways(finetune_run):
    finetune_run(*FINE, "--task", "svm", "--out", "svm", "--features", "svm.npz")
    finetune_run("--predict", "shapes", *MODEL[:2], "--features", "all.npz", "--out", "found")
    row, stored, predicted = log_of("svm")[-1], np.load("svm.npz"), np.load("all.npz")
    assert (row["task"], row["checkpoint"], row["seed"]) == ("svm", "student.pt", 0)
    assert Path("svm/config.json").is_file() and stored["class_names"].tolist() == KINDS
    assert stored["split"].tolist().count("test") == 6 and len(predicted["features"]) == 24
    names, student = predicted["names"].tolist(), act.load("student.pt")
    for name, feature in zip(stored["names"], stored["features"]):
        xyz = torch.from_numpy(clouds.read_cloud(f"shapes/{name}", student.config.points))
        with torch.no_grad():
            own = act.global_feature(student.encode(xyz[None]))[0].numpy()
        assert np.allclose(feature, own, atol=1e-4)
        assert np.allclose(predicted["features"][names.index(f"shapes/{name}")], own, atol=1e-4)

def test_classify_votes_and_resumes_bit_for_bit(finetune_run, monkeypatch):
    flags = (*FINE[:-1], 2, "--vote", 2)
    out = finetune_run(*flags, "--out", "whole")
    for words in ("3 classes: mug", "width 24", "3 of 3 classes", "augmentation scale_translate"):
        assert words in out
    *epochs, last = log_of("whole")
    keys = {"loss", "grad_norm", "lr", "accuracy", "mean_accuracy"}
    assert len(epochs) == 2 and keys <= epochs[0].keys() and np.sum(last["confusion"]) == 6
    assert last["accuracy"] == epochs[1]["accuracy"]
    assert last["best_accuracy"] == max(row["accuracy"] for row in epochs)
    assert {"vote_accuracy", "best_epoch"} <= last.keys()
    config = act.load("whole/last.pt").config
    assert (config.class_names, config.points, config.normalized) == (KINDS, 128, True)

    def interrupted(log, *values):
        end_epoch(log, *values)
        raise KeyboardInterrupt

    end_epoch = training.Log.end_epoch
    monkeypatch.setattr(training.Log, "end_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune_run(*flags, "--out", "half")
    monkeypatch.setattr(training.Log, "end_epoch", end_epoch)
    assert "resumed" in finetune_run(*flags, "--out", "half", "--resume")
    states = [act.load(f"{name}/last.pt").state_dict().values() for name in ("whole", "half")]
    assert all(torch.equal(a, b) for a, b in zip(*states))
    for a, b in zip(log_of("whole"), log_of("half"), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}

def test_predict_labels_files_and_goes_on_after_a_broken_one(finetune_run, monkeypatch, capsys):
    finetune_run(*FINE, "--out", "cls")
    flags = ["--checkpoint", "cls/last.pt", "--out", "pred", "--features", "pred.npz"]
    out = finetune_run("--predict", "shapes/test", "shapes/train/mug/0.npy", *flags)
    with open("pred/predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "label", *KINDS] and len(rows) == 7
    truth = [Path(row[0]).parent.name for row in rows]
    for file, label, *values in rows:
        values = np.array(values, float)
        assert values.sum() == pytest.approx(1, abs=1e-5) and label == KINDS[values.argmax()]
        assert file in out
    hits = [row[1] == name for row, name in zip(rows, truth)]
    assert f"accuracy {100 * np.mean(hits):.2f}" in out
    stored = np.load("pred.npz")
    assert stored["features"].shape == (7, 48) and [KINDS[i] for i in stored["labels"]] == truth
    np.save("far.npy", 1e4 + 50 * shape("mug", 0, 9))
    Path("broken.ply").write_text("ply\n")
    flags = ["--predict", "broken.ply", "far.npy", "--device", "cpu", *flags[:4]]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags])
    with pytest.raises(SystemExit) as end:
        training.run_script(finetune.main, finetune.Config, "")
    assert end.value.code == 2 and capsys.readouterr().err.startswith("broken.ply")
    assert "far.npy" in Path("pred/predictions.csv").read_text()
    with pytest.raises(ValueError, match="student.pt"):
        finetune_run("--predict", "shapes", "--checkpoint", "student.pt")
    with pytest.raises(ValueError, match="nowhere"):
        finetune_run("--predict", "nowhere", "--checkpoint", "cls/last.pt")

def test_fewshot_draws_episodes_or_reads_the_published_folds(finetune_run):
    flags = (*FINE, "--task", "fewshot", "--way", 2, "--shot", 3)
    finetune_run(*flags, "--out", "few")
    row = log_of("few")[-1]
    assert len(row["folds"]) == 10 and row["accuracy"] == pytest.approx(np.mean(row["folds"]))
    assert row["accuracy_std"] == pytest.approx(np.std(row["folds"], ddof=1))
    assert (row["task"], row["checkpoint"], row["seed"]) == ("fewshot", "student.pt", 0)
    assert log_of("few/fold_3")[-1]["accuracy"] == row["folds"][3]
    assert Path("few/config.json").is_file()
    episode = {"train": [], "test": []}
    for split in episode:
        for c in (0, 1, 0, 1):
            points = shape(KINDS[c], c, len(episode[split])).repeat(2, axis=1)  # with normals
            episode[split].append((points, c, 30 + c))
    path = Path("published/2way_3shot/4.pkl")
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(episode))
    finetune_run(*flags, "--data", "published", "--fold", 4, "--out", "pub")
    assert len(log_of("pub")[-1]["folds"]) == 1
    with pytest.raises(ValueError, match="5.pkl"):
        finetune_run(*flags, "--data", "published", "--fold", 5, "--out", "pub")

def write_shapenet_part(root):
    (root / "train_test_split").mkdir(parents=True)
    (root / "synsetoffset2category.txt").write_text("Bag\t001\nMug\t002\n")
    lists = {"train": ["001/a", "002/b"], "val": ["002/c"], "test": ["001/d", "002/e"]}
    for split, models in lists.items():
        file = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        file.write_text(json.dumps([f"shape_data/{model}" for model in models]))
        for model in models:
            parts = np.arange(190) % 2 + (4 if model[:3] == "001" else 36)
            (root / model).parent.mkdir(exist_ok=True)
            rows = np.column_stack([arrays(1, 190, 6, ord(model[-1]))[0], parts])
            np.savetxt(root / f"{model}.txt", rows, fmt="%.6f")

def test_parts_end_to_end_and_a_cloud_is_labelled(finetune_run, place):
    write_shapenet_part(place / "shapenet")
    out = finetune_run(*DENSE, "--task", "parts", "--data", "shapenet", "--out", "parts")
    assert "cls_token" in out.split("not used: ")[1] and "001/d" in out
    assert {"instance_miou", "class_miou", "best_instance_miou"} <= log_of("parts")[-1].keys()
    config = act.load("parts/last.pt").config
    assert (config.class_names, config.part_ranges) == (["Bag", "Mug"], [[4, 6], [36, 38]])
    with open("parts/labels.csv", newline="") as file:
        legend = {name: color for color, name in csv.reader(file)}
    assert legend["Mug part 36"] != legend["Mug part 37"] and legend["Bag part 4"][0] == "#"
    assert Path("parts/parts.png").is_file()
    (place / "Mug").mkdir()
    np.save(place / "Mug" / "mine.npy", arrays(1, 300)[0])
    predict = ("--predict", "Mug", "--checkpoint", "parts/last.pt", "--out", "coloured")
    assert "Mug part 3" in finetune_run(*predict)
    stored, points = np.load("coloured/Mug-mine.npy.npz"), arrays(1, 300)[0]
    assert set(stored["labels"]) <= {36, 37} and stored["label_names"][36] == "Mug part 36"
    assert np.allclose(stored["points"], points)
    assert np.allclose(clouds.read_points("coloured/Mug-mine.npy.ply"), points, atol=1e-6)
    for flags in (("--category", "Teapot"), ("--features", "x.npz")):
        with pytest.raises(ValueError):
            finetune_run(*predict, *flags)

def write_rooms(root, names, columns):
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        xyz = rng.uniform(0, [1.6, 1.2, 2], (900, 3)) + 10
        label = (xyz[:, 2] > 11) * (12 if columns == 7 else 1)
        colors = rng.uniform(0, 255, (900, columns - 4))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, np.column_stack([xyz, colors, label]))

def test_scenes_end_to_end_and_a_room_is_labelled(finetune_run, place):
    write_rooms(place / "s3dis", ["Area_1_office_1.npy", "Area_5_office_1.npy"], 7)
    out = finetune_run(*DENSE, "--task", "scene", "--data", "s3dis", "--out", "scene")
    assert ["beam", "0", "-", "-"] in [line.split() for line in out.splitlines()]
    last = log_of("scene")[-1]
    each = [v for name, v in last.items() if name.startswith("iou_") and v is not None]
    assert last["miou"] == pytest.approx(np.mean(each)) and last["iou_beam"] is None
    assert Path("scene/scene.png").is_file() and Path("scene/labels.csv").is_file()
    np.save("room.npy", np.load("s3dis/Area_5_office_1.npy")[:, :3])
    finetune_run("--predict", "room.npy", "--checkpoint", "scene/last.pt", "--out", "rooms")
    stored = np.load("rooms/room.npy.npz")
    assert len(stored["labels"]) == 900 and list(stored["label_names"]) == clouds.S3DIS_CLASSES
    data, sizes = clouds.open_rooms("s3dis"), act.EncoderConfig(**FINE_SIZES)
    task = finetune.Scenes(options(task="scene"), data, sizes, CPU)
    few, many = sorted(np.bincount(data.train[0].labels)[[0, 12]])
    assert sorted(task.weight[[0, 12]].tolist()) == pytest.approx([1, (many / few) ** (1 / 3)])

def test_own_labelled_folders_are_segmented(finetune_run, place):
    write_rooms(place / "own", ["train/a.npy", "train/b.npy", "test/c.npy"], 5)
    (place / "own" / "classes.txt").write_text("low\nhigh\n")
    for task, keys in (("scene", {"iou_low", "iou_high"}), ("parts", {"instance_miou", "miou"})):
        finetune_run(*DENSE, "--task", task, "--data", "own", "--out", f"own_{task}")
        assert keys <= log_of(f"own_{task}")[-1].keys()
        c = act.load(f"own_{task}/last.pt").config
        assert c.class_names == ["low", "high"] and c.num_categories == 0
        assert c.normalized == (task == "parts")
        predict = ("--predict", "own/test/c.npy", "--checkpoint", f"own_{task}/last.pt")
        finetune_run(*predict, "--out", f"{task}_found")
        assert len(np.load(f"{task}_found/own-test-c.npy.npz")["labels"]) == 900

# =================================================================================================
# detect.py
# =================================================================================================

CLASSES = ["table", "chair", "sofa"]
BOX, FAR = [0.0, 0, 0, 1, 1, 1], [9.0, 0, 0, 1, 1, 1]

def uniform(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def random_boxes(num, seed):
    center, size = uniform(seed, 2, num, 3)
    return torch.cat([2 * center, size + 0.2], dim=1)

def small_detector(**sizes):
    torch.manual_seed(0)
    sizes = {**dict(num_group=24, group_size=8, points=128, width=32, depth=2, num_heads=2,
                    encoder_dims=32, num_queries=16, decoder_width=32, decoder_depth=2,
                    decoder_heads=2, drop_path=0.0, dropout=0.0, head_dropout=0.0), **sizes}
    return detect.Detector(detect.DetectorConfig(**sizes, class_names=CLASSES))

def furnished(seed=0, points=3000):
    """A room of noise with three boxes, which may overlap, and dense points within them."""
    rng = np.random.default_rng(seed)
    low, size = rng.uniform(0, [3, 2, 1], (3, 3)), rng.uniform(0.3, 1, (3, 3))
    inside = (low[:, None] + size[:, None] * rng.random((3, points // 6, 3))).reshape(-1, 3)
    xyz = np.concatenate([inside, rng.uniform(0, [4, 3, 2.5], (points - len(inside), 3))])
    boxes = np.hstack([low + size / 2, size])
    return detect.Scene(f"room {seed}", np.float32(xyz), np.float32(boxes), np.arange(3))

def training_step(model, optimizer, xyz, boxes, labels):
    *outputs, extent = model.train()(xyz)
    losses = [detect.layer_loss(*layer, extent, boxes, labels) for layer in zip(*outputs)]
    optimizer.zero_grad()
    sum(total for total, _ in losses).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# -- boxes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("other, iou, giou", [
    (BOX, 1, 1),
    ([0.5, 0, 0, 1, 1, 1], 1 / 3, 1 / 3),  # half over each other: the hull is the union
    ([2, 0, 0, 1, 1, 1], 0, -1 / 3),  # 1 m apart: hull 3, union 2
    ([1, 0, 0, 1, 1, 1], 0, 0),  # touching
    ([0, 0, 0, 0.5, 0.5, 0.5], 1 / 8, 1 / 8),  # nested
    ([0.5, 0.5, 0.5, 1, 1, 1], 1 / 15, 1 / 15 - 1 + (2 - 1 / 8) / 1.5**3),  # sharing a corner
])
def test_iou_and_giou_of_hand_worked_pairs(other, iou, giou):
    a, b = torch.tensor([BOX, FAR]), torch.tensor([other, other, FAR])
    assert detect.box_iou(a, b)[0].tolist() == pytest.approx([iou, iou, 0], abs=1e-6)
    assert detect.generalized_box_iou(a, b)[0, :2].tolist() == pytest.approx([giou, giou], abs=1e-6)
    assert detect.generalized_box_iou(a, b).shape == (2, 3)

def test_giou_of_flat_boxes_is_finite_and_so_is_its_gradient():
    flat = torch.tensor([[0.0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1e-4], [0, 0, 0, 0, 0, 0]])
    giou = detect.generalized_box_iou(flat.requires_grad_(), flat)
    giou.sum().backward()
    assert (giou.abs() <= 1 + 1e-6).all() and flat.grad.isfinite().all()
    assert giou[1, 1].item() == pytest.approx(1, abs=1e-4)

def test_giou_has_the_gradient_of_differences():
    a, b = (random_boxes(3, seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(detect.generalized_box_iou, (a, b))

# -- assignment, loss -----------------------------------------------------------------------------
@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 10**6), st.booleans())
@example(3, 3, 0, True)
@settings(max_examples=150, deadline=None)
def test_assignment_is_the_best_of_all_permutations(K, Q, seed, ties):
    K, rng = min(K, Q), np.random.default_rng(seed)
    cost = rng.integers(-2, 3, (K, Q)).astype(float) if ties else rng.normal(size=(K, Q))
    query = detect.assign(torch.from_numpy(cost))
    assert query.dtype == torch.int64 and query.shape == (K,) and len(set(query.tolist())) == K
    totals = [cost[range(K), order].sum() for order in itertools.permutations(range(Q), K)]
    assert cost[range(K), query.numpy()].sum() == pytest.approx(min(totals), abs=1e-9)

@pytest.mark.parametrize("cost", [torch.zeros(3, 2), torch.tensor([[math.nan, 1.0]])])
def test_assignment_rejects_too_many_boxes_and_costs_that_are_not_finite(cost):
    with pytest.raises(ValueError, match="cost"):
        detect.assign(cost)

def random_layer(Q=7, seed=0):
    """logits, center, size, extent, boxes, labels of three rooms, the second without boxes."""
    boxes = [random_boxes(K, seed + K) for K in (3, 0, 2)]
    labels = [torch.arange(len(own)) for own in boxes]
    logits, center, size = (uniform(seed + n, 3, Q, n) for n in (4, 3, 9))
    extent = torch.tensor([[4.0, 3, 2.5]] * 3, dtype=torch.float64)
    return 3 * logits, 2 * center, size[..., :3] + 0.1, extent, boxes, labels

def loss_by_loops(logits, center, size, extent, boxes, labels):
    """[class, giou, center, size], the assignment by trying all."""
    number, entropy, weights, sums = sum(map(len, boxes)), 0.0, 0.0, np.zeros(3)
    for b, (own, kinds) in enumerate(zip(boxes, labels)):
        giou = detect.generalized_box_iou(own, torch.cat([center[b], size[b]], dim=1))
        p, Q = logits[b].softmax(dim=1), len(center[b])
        cost = (-p[:, kinds].T - 2 * giou).numpy()
        best = min(itertools.permutations(range(Q), len(own)),
                   key=lambda order: sum(cost[k, q] for k, q in enumerate(order)))
        target = dict(zip(best, kinds.tolist()))
        for q in range(Q):
            weight = 1.0 if q in target else 0.25
            entropy -= weight * p[q, target.get(q, 3)].log().item()
            weights += weight
        for k, q in enumerate(best):
            off = torch.stack([center[b, q], size[b, q]]) - own[k].view(2, 3)
            sums += [1 - giou[k, q], *(torch.tensor([5, 1]) * (off / extent[b]).abs().sum(dim=1))]
    return [entropy / weights, *(sums / number)]

@pytest.mark.parametrize("seed", range(3))
def test_loss_is_that_of_loops(seed):
    layer = random_layer(5, seed)
    total, parts = detect.layer_loss(*layer)
    assert list(parts) == ["class", "giou", "center", "size"]
    values = [value.item() for value in parts.values()]
    assert values == pytest.approx(loss_by_loops(*layer), abs=1e-9)
    assert total.item() == pytest.approx(sum(values))

def test_loss_of_rooms_without_boxes_is_their_class_term_with_gradients_for_all():
    logits, center, size, extent, boxes, labels = random_layer()
    values = [t.requires_grad_() for t in (logits, center, size)]
    none = [own[:0] for own in boxes], [kinds[:0] for kinds in labels]
    total, _ = detect.layer_loss(*values, extent, *none)
    total.backward()
    assert total.item() == pytest.approx(-logits.log_softmax(dim=-1)[..., -1].mean().item())
    assert all(t.grad is not None and t.grad.isfinite().all() for t in values)

def test_perfect_prediction_costs_its_class_term_only():
    logits, center, size, extent, boxes, labels = random_layer()
    for b, own in enumerate(boxes):
        center[b, 1 : 1 + len(own)], size[b, 1 : 1 + len(own)] = own[:, :3], own[:, 3:]
    total, parts = detect.layer_loss(logits, center, size, extent, boxes, labels)
    assert total.item() == pytest.approx(parts["class"].item(), abs=1e-12)

def test_other_rooms_and_the_number_of_their_boxes_change_nothing():
    logits, center, size, extent, boxes, labels = random_layer()
    _, together = detect.layer_loss(logits, center, size, extent, boxes, labels)
    alone = []
    for b in (0, 2):
        own = slice(b, b + 1)
        layer = logits[own], center[own], size[own], extent[own], boxes[own], labels[own]
        alone.append(detect.layer_loss(*layer)[1])
    for name in ("giou", "center", "size"):  # means over boxes
        mean = (3 * alone[0][name] + 2 * alone[1][name]) / 5
        assert together[name].item() == pytest.approx(mean.item(), abs=1e-12)

def test_loss_has_the_gradient_of_differences():
    logits, center, size, *rest = random_layer()
    values = [t.requires_grad_() for t in (logits, center, size)]
    assert torch.autograd.gradcheck(lambda *t: detect.layer_loss(*t, *rest)[0], values)

# -- detections, average precision ----------------------------------------------------------------
def detections(x, probabilities, xyz, side=1.0):
    """Boxes of a side at (x, 0, 0), with probabilities [chair, table, no object]."""
    center = torch.tensor([[value, 0.0, 0] for value in x])
    logits = torch.tensor(probabilities).log()
    boxes, scores = detect.select_detections(center, torch.full_like(center, side), logits, xyz)
    return boxes[:, 0].tolist(), scores

def points_at(x, num):
    return torch.tensor([[float(x), 0, 0]] * num)

def test_boxes_of_four_points_are_dropped_and_of_five_kept_borders_included():
    xyz = torch.cat([points_at(0.5, 4), points_at(5.5, 5)])  # on borders
    x, scores = detections([0.0, 5.0], [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], xyz)
    assert x == [5] and scores[0].tolist() == pytest.approx([0.1 * 0.7, 0.6 * 0.7], abs=1e-6)

def test_the_likeliest_box_stays_where_all_are_empty_if_it_is_an_object():
    x, scores = detections([0.0, 1.0], [[0.3, 0.1, 0.6], [0.1, 0.5, 0.4]], points_at(9, 9))
    assert x == [1] and scores[0].tolist() == pytest.approx([0.06, 0.3], abs=1e-6)
    assert detections([0.0], [[0.02, 0.02, 0.96]], points_at(9, 9))[0] == []

@pytest.mark.parametrize("x, kept", [
    ([0.0, 3.0, 6.0, 0.0], [0, 0, 3, 6]),  # IoU of neighbours exactly 0.25, which stays
    ([0.0, 2.9, 5.9, 0.0], [0, 0, 5.9]),  # the second goes, and so no longer rivals the third
])
def test_overlapping_boxes_leave_the_likeliest_of_their_class(x, kept):
    xyz = torch.cat([points_at(value, 5) for value in x])
    rows = [[0.6, 0.1, 0.3], [0.5, 0.1, 0.4], [0.4, 0.1, 0.5], [0.1, 0.6, 0.3]]
    assert sorted(detections(x, rows, xyz, side=5.0)[0]) == pytest.approx(kept)

@pytest.mark.parametrize("found, truth, ap, recall", [  # found by falling score
    ([BOX], [BOX], 1, 1),
    ([BOX, BOX], [BOX], 1, 1),  # a duplicate after the right one
    ([FAR, BOX], [BOX], 0.5, 1),
    ([BOX, FAR, BOX], [BOX, FAR], 1, 1),
    ([BOX, BOX, FAR], [BOX, FAR], (1 + 2 / 3) / 2, 1),  # right, duplicate, right
    ([BOX], [BOX, FAR], 0.5, 0.5),
    ([FAR], [BOX], 0, 0),
    ([], [BOX], 0, 0),
    ([[0.0, 0, 0, 1, 1, 2]], [BOX], 0, 0),  # IoU 0.5 is not more than 0.5
])
def test_average_precision_of_hand_worked_rooms(found, truth, ap, recall):
    found, truth = (torch.tensor(boxes).reshape(-1, 6) for boxes in (found, truth))
    scores = torch.linspace(0.9, 0.1, len(found))[:, None].repeat(1, 2)
    truths = [(truth, torch.ones(len(truth), dtype=torch.long)), (FAR_ROOM[0][:0], torch.zeros(0))]
    result = detect.average_precision([(found, scores), FAR_ROOM], truths, 2, 0.5)
    assert [row[1].item() for row in result] == pytest.approx([ap, recall])
    assert all(row[0].isnan() for row in result)  # no ground truth

FAR_ROOM = (torch.tensor([FAR]), torch.tensor([[0.0, 0.0]]))  # one wrong box, last

# -- model ----------------------------------------------------------------------------------------
def test_fourier_positions_have_their_closed_form_and_move_and_scale_with_the_room():
    frequencies, xyz = uniform(0, 3, 4), uniform(1, 2, 9, 3)
    low, extent = xyz.amin(dim=1), xyz.amax(dim=1) - xyz.amin(dim=1)
    pos = detect.fourier_positions(xyz, low, extent, frequencies)
    phase = 2 * math.pi * ((xyz[1, 5] - low[1]) / extent[1]) @ frequencies
    assert torch.allclose(pos[1, 5], torch.cat([phase.sin(), phase.cos()]))
    moved = detect.fourier_positions(3 * xyz + 7, 3 * low + 7, 3 * extent, frequencies)
    assert torch.allclose(pos, moved, atol=1e-12)

def test_published_sizes_have_the_published_numbers_of_parameters():
    model = detect.Detector(detect.DetectorConfig(width=256, num_heads=4, depth=1))
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert count["decoder"] + count["norm"] == 5_276_160 and count["projection"] == 198_144
    assert count["query_mlp"] == 131_584 and count["heads"] == 667_419 - 264_706  # angle heads

@pytest.mark.parametrize("own_tokens", [False, True])
def test_boxes_lie_near_their_queries_within_the_extent_and_move_with_the_room(own_tokens):
    model, xyz = small_detector(own_tokens=own_tokens).double().eval(), 4 * uniform(0, 2, 128, 3)
    logits, center, size, extent = model(xyz)
    assert logits.shape == (2, 2, 16, 4) and center.shape == size.shape == (2, 2, 16, 3)
    query = act.gather_points(xyz, act.farthest_point_sample(xyz, 16))
    assert ((center - query).abs() <= 0.5).all() and ((0 <= size) & (size <= extent[:, None])).all()
    shift = torch.tensor([30.0, -20, 10]).double()
    for own, moved in zip((logits, center + shift, size), model(xyz + shift)):
        assert torch.allclose(own, moved, atol=1e-9)

def test_every_parameter_gets_a_gradient():
    model = small_detector(dropout=0.1, head_dropout=0.3)
    for p in model.parameters():  # at the start the first layer's input is 0, and so are its values
        p.data += 0.1 * torch.randn(p.shape)
    scenes = [furnished(0), furnished(1)]
    batch = detect.sample(scenes, 128, np.random.default_rng(0))
    training_step(model, torch.optim.SGD(model.parameters()), *batch)
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == ["decoder.0.norm1.weight"]  # it scales zeros

def test_training_overfits_two_rooms():
    rooms, sizes = [furnished(0, 512), furnished(1, 512)], dict(decoder_depth=1, own_tokens=True)
    model = small_detector(num_group=64, points=512, num_queries=64, **sizes)
    optimizer = torch.optim.AdamW(model.parameters())
    drawn = [detect.sample([room], 512, np.random.default_rng(i)) for i, room in enumerate(rooms)]
    xyz, boxes, labels = ([rows[0] for rows in column] for column in zip(*drawn))
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 120)
        training_step(model, optimizer, torch.stack(xyz), boxes, labels)
    data = clouds.RoomSet("two rooms", rooms, rooms, CLASSES)
    assert detect.evaluate(detect.detect(model, rooms), data)["mean"]["ap25"] == 100

# -- data -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("angle, size", [(0, [2, 1, 3]), (90, [1, 2, 3]), (5, [2.0795, 1.1705, 3])])
def test_turned_box_is_the_hull_of_its_turned_corners(angle, size):
    corners = np.float32(list(itertools.product([0, 2], [1.5, 2.5], [1.5, 4.5])))
    points, boxes = detect.turn(corners, np.float32([[1, 2, 3, 2, 1, 3]]), math.radians(angle))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    assert boxes[0] == pytest.approx([cos - 2 * sin, sin + 2 * cos, 3, *size], abs=1e-4)
    assert points.min(axis=0) == pytest.approx(boxes[0, :3] - boxes[0, 3:] / 2, abs=1e-5)
    assert points.max(axis=0) == pytest.approx(boxes[0, :3] + boxes[0, 3:] / 2, abs=1e-5)

@pytest.mark.parametrize("augment", ["", "quarters", "published"])
def test_sampled_boxes_still_hold_their_points(augment):
    scene = furnished()
    for seed in range(8):
        sampled = detect.sample([scene], 3000, np.random.default_rng(seed), augment)
        xyz, boxes, labels = (rows[0].numpy() for rows in sampled)
        assert xyz.shape == (3000, 3) and len(boxes) == len(labels) > 0
        for box, own in zip(boxes, scene.boxes[labels]):
            held, before = ((abs(points - b[:3]) <= b[3:] / 2 + 1e-4).all(axis=1).sum()
                            for points, b in ((xyz, box), (scene.xyz, own)))
            if augment == "published":  # a cuboid may cut it
                assert 0 < held
            else:
                assert held >= before
                assert sorted(box[3:]) == pytest.approx(sorted(own[3:]), abs=1e-5)
    assert detect.sample([scene], 4000, np.random.default_rng(0))[0].shape == (1, 4000, 3)

def test_random_cuboid_keeps_boxes_by_their_centres_or_everything():
    scene, smaller = furnished(), 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        inside, held = detect.random_cuboid(scene.xyz, scene.boxes, rng, 1000)
        low, high = scene.xyz[inside].min(axis=0), scene.xyz[inside].max(axis=0)
        for rows, kept in ((scene.xyz, inside), (scene.boxes[:, :3], held)):
            assert kept.tolist() == ((rows >= low) & (rows <= high)).all(axis=1).tolist()
        assert inside.sum() >= 1000 and held.any()
        smaller += not inside.all()
    assert smaller > 5
    for boxes, least in ((scene.boxes, 3001), (scene.boxes[:0], 1000)):  # few points, no boxes
        inside, held = detect.random_cuboid(scene.xyz, boxes, np.random.default_rng(0), least)
        assert inside.all() and held.all()

@pytest.fixture
def scans(tmp_path):
    """Scans in VoteNet's layout, of which the second has no boxes, and one that is missing."""
    for i in range(3):
        scene = furnished(i)
        rows = np.hstack([scene.boxes, [[3], [39], [14]]])[: 0 if i == 1 else 3]
        np.save(tmp_path / f"scene{i}_vert.npy", np.hstack([scene.xyz, scene.xyz]))
        np.save(tmp_path / f"scene{i}_bbox.npy", rows)
    (tmp_path / "scannetv2_train.txt").write_text("scene0\nscene1\nscene9\n")
    (tmp_path / "scannetv2_val.txt").write_text("scene2\n")
    return tmp_path

def test_scans_are_read_as_they_were_written(scans):
    (scans / "meta_data").mkdir()
    (scans / "scannetv2_val.txt").rename(scans / "meta_data" / "scannetv2_val.txt")
    data, expected = detect.open_scans(scans), furnished(0)
    first, second = data.train
    assert np.array_equal(first.xyz, expected.xyz) and np.array_equal(first.boxes, expected.boxes)
    assert first.labels.tolist() == [0, 17, 10] and data.classes[17] == "garbagebin"
    assert second.boxes.shape == (0, 6) and [scene.name for scene in data.test] == ["scene2"]
    assert "1 of 3" in data.notes[0] and "scene9" in data.notes[0]

@pytest.mark.parametrize("file, content, named", [
    ("scene0_bbox.npy", None, "scene0_bbox.npy"),
    ("scene0_bbox.npy", b"no", "scene0_bbox.npy"),
    ("scene0_vert.npy", b"no", "scene0_vert.npy"),
    ("scene0_bbox.npy", np.full((1, 7), 13.0), "13"),  # no class has this id
    ("scene0_bbox.npy", np.full((1, 7), math.nan), "scene0_bbox.npy"),
    ("scene0_bbox.npy", np.ones((1, 6)), "scene0_bbox.npy"),
    ("scannetv2_val.txt", None, "scannetv2_val.txt"),
    ("scene2_vert.npy", None, "scannetv2_val.txt"),  # no scan of the list is left
])
def test_broken_scans_name_themselves(scans, file, content, named):
    (scans / file).unlink()
    if content is not None:
        (scans / file).write_bytes(content if isinstance(content, bytes) else b"")
    if isinstance(content, np.ndarray):
        np.save(scans / file, content)
    with pytest.raises(ValueError, match=named):
        detect.open_scans(scans)

# -- the script -----------------------------------------------------------------------------------
@pytest.fixture
def detect_run(monkeypatch, tmp_path):
    """Runs the script with flags, on few rooms and a small model, in a folder with a student."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(width=32, depth=2, num_heads=2, encoder_dims=32)
    monkeypatch.setattr(detect, "ROOMS", ((7, 6), (8, 3)))
    monkeypatch.setitem(training.SIZES["tiny"], "encoder", sizes)
    monkeypatch.setitem(detect.SIZES, "tiny", dict(
        num_group=48, group_size=8, num_queries=32, decoder_width=32, decoder_depth=2))
    c = act.StudentConfig(**sizes, target_dim=8)
    act.save(dict(kind="Student", config=vars(c), model=act.Student(c).state_dict()), "student.pt")
    tiny = "--device cpu --size tiny --points 512 --batch-size 3 --epochs 3".split()
    return lambda *flags: detect.main(training.parse_flags(detect.Config, "", [*tiny, *flags]))

def test_script_trains_resumes_and_predicts(detect_run, tmp_path, capsys):
    detect_run("--checkpoint", "student.pt", "--out", "whole")
    assert "encoder 2 x 32 from student.pt" in capsys.readouterr().out
    for file in ("last.pt", "config.json", "loss.svg", "boxes.png", "boxes.ply"):
        assert (tmp_path / "whole" / file).stat().st_size > 0
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"ap25", "ap50", "recall", "ap25_start", "ap25_mean_box"} <= last.keys()
    detect_run("--checkpoint", "student.pt", "--out", "part", "--epochs", "2")
    detect_run("--checkpoint", "student.pt", "--out", "part", "--resume")
    assert "resumed" in capsys.readouterr().out
    room = clouds.synthetic_rooms([(9, 0)], 30)[0].xyz + np.array([500_000, 4_000_000, 0])
    np.save("mine.npy", room)
    detect_run("--predict", ".", "--checkpoint", "whole/last.pt", "--out", "predicted")
    assert "mine.npy" in capsys.readouterr().out
    written = clouds.read_points(tmp_path / "predicted" / "mine.ply")
    assert len(written) >= len(room) and written[:, 1].min() > 3_999_000

def test_encoder_is_the_checkpoints_and_the_rest_does_not_depend_on_it(detect_run):
    config = detect.Config(size="tiny", points=512, checkpoint="student.pt")
    model, config.checkpoint = detect.start_model(config, CLASSES).state_dict(), "none"
    scratch = detect.start_model(config, CLASSES).state_dict()
    student = act.load("student.pt").state_dict()
    for name, value in model.items():
        assert torch.equal(value, student[name] if name.startswith("encoder.") else scratch[name])

@pytest.mark.parametrize("flags, named", [
    (["--checkpoint", "missing.pt"], "missing.pt"),
    (["--predict", "mine.npy", "--checkpoint", "student.pt"], "student.pt"),
    (["--data", "nowhere", "--checkpoint", "none"], "nowhere"),
])
def test_mistakes_name_the_file(detect_run, flags, named):
    with pytest.raises(ValueError, match=named):
        detect_run(*flags)
