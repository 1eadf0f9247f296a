"""The scripts: what they share, both stages, the downstream tasks, detection, as users run them."""

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
from contextlib import nullcontext
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
    found = [temperature(step, published) for step in (0, 50_000, 100_000, published)]
    assert found == pytest.approx([1, (1 + 0.0625) / 2, 0.0625, 0.0625])
    found = [kl_weight(step, published) for step in (10_000, 60_000, 110_000)]
    assert found == pytest.approx([0, 0.05, 0.1])
    for schedule in (temperature, kl_weight):  # shorter runs squeeze them, longer do not stretch
        wanted = pytest.approx(schedule(60_000, published), rel=1e-3)
        assert schedule(600, published // 100) == wanted == schedule(60_000, 2 * published)

def test_the_rate_warms_up_for_a_tenth_at_most_ends_on_a_cosine_and_scales_by_group():
    config = replace(training.RunConfig(), steps=1000, lr=1e-3)
    optimizer = training.adamw(torch.nn.Linear(1, 1), 1.0, 0.1)
    optimizer.param_groups[1]["scale"] = 0.1
    resumed = training.adamw(torch.nn.Linear(1, 1), 1.0, 0.1)
    resumed.load_state_dict(optimizer.state_dict())

    def rate(step, warmup=50):
        found = training.set_lr(resumed, step, config, end=1e-6, warmup=warmup)
        assert [group["lr"] for group in resumed.param_groups] == [found, 0.1 * found]
        return found

    assert [rate(0), rate(25)] == pytest.approx([1e-6, (1e-6 + 1e-3) / 2])
    assert [rate(50), rate(525), rate(1000)] == pytest.approx([1e-3, (1e-3 + 1e-6) / 2, 1e-6])
    assert rate(99, warmup=10_000) < rate(100, warmup=10_000) == pytest.approx(1e-3)

def test_weight_decay_spares_vectors_biases_tokens_and_what_is_frozen(teacher_run):
    teacher = act.load(teacher_run / "last.pt")
    names = {id(p): name for name, p in teacher.named_parameters()}
    groups = training.adamw(teacher, 1e-3, 0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0]
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    assert {"codebook", "visual_prompt_pos", "deep_prompt_pos", "proj_pre.weight"} <= decayed
    assert {"visual_prompt_token", "deep_prompt_tokens", "proj_pre.bias"} <= spared
    assert all(teacher.get_parameter(name).ndim > 1 for name in decayed)
    assert not any(name.startswith("backbone.") or name.endswith("bias") for name in decayed)

def test_an_epoch_takes_every_cloud_once_in_an_order_of_its_own_until_the_last_step():
    start = replace(training.RunConfig(), batch_size=4, epochs=2)
    config = training.plan(start, count=11)
    assert (config.steps, config.epochs, config.batch_size) == (4, 2, 4)
    epochs = [training.epoch_batches(config, 11, epoch) for epoch in (0, 1)]
    orders = [torch.cat(batches) for batches in epochs]
    assert all(len(order.unique()) == 8 for order in orders) and not torch.equal(*orders)
    assert equal(training.epoch_batches(config, 11, epoch=1, step=3), epochs[1][1:])
    config = training.plan(replace(start, steps=5, epochs=9), count=12)
    assert [len(training.epoch_batches(config, 12, epoch)) for epoch in (0, 1)] == [3, 2]

@pytest.mark.parametrize("world, batch_size, count, found", [
    (1, 64, 3, 3), (2, 4, 3, 2), (2, 3, 10, None), (2, 4, 1, None)])
def test_the_batch_is_a_multiple_of_the_processes(monkeypatch, world, batch_size, count, found):
    monkeypatch.setattr(training, "WORLD", world)
    config = replace(training.RunConfig(), batch_size=batch_size, epochs=1)
    with nullcontext() if found else pytest.raises(ValueError, match="--batch-size"):
        assert training.plan(config, count).batch_size == found

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
    x, labels = torch.randn(60, 5, generator=generator).double(), torch.arange(60) % 3
    x[:, 0] += labels
    w, y = training.linear_svm(x, labels, C=0.5), 2.0 * F.one_hot(labels, 3) - 1
    gradient = w - x.T @ (y * (1 - y * (x @ w)).clamp_min(0))
    assert gradient.abs().max() < 1e-3

def test_svm_accuracy_knows_no_scale_and_chooses_c_on_every_fifth_training_feature():
    generator, labels = torch.Generator().manual_seed(1), torch.arange(160) % 4
    x = torch.randn(160, 6, generator=generator)

    def accuracy(x):
        return training.svm_accuracy(x[:100], labels[:100], x[100:], labels[100:])

    assert 10 < accuracy(x)[0] < 45 and accuracy(x + 20 * F.one_hot(labels, 6))[0] == 100
    x += 1.5 * F.one_hot(labels, 6)
    found, C = accuracy(x)
    assert accuracy(x * torch.logspace(0, 3, 6) + 7) == (pytest.approx(found), C)
    order, held_out, right = labels[:100].argsort(stable=True), torch.arange(100) % 5 == 0, {}
    unit, y = ((x[:100] - x[:100].mean(0)) / x[:100].std(0))[order], labels[:100][order]
    unit = F.pad(unit.double(), (0, 1), value=1.0)
    for value in (1.0, 0.1, 0.01, 0.001):
        w = training.linear_svm(unit[~held_out], y[~held_out], value)
        right[value] = ((unit[held_out] @ w).argmax(dim=1) == y[held_out]).sum().item()
    assert C == min(value for value in right if right[value] == max(right.values()))

# -- flags ----------------------------------------------------------------------------------------
BAD = ["--epoch 3", "--nonsense", "--epochs many", "--size huge", "--epochs -1", "--lr nan",
       "--lr inf", "--weight-decay=-1", "--prompt x", "--precision fp64", "--log-every x"]

@pytest.mark.parametrize("stage, words, named", [
    *[("teacher", words, words.replace("=", " ").split()[0]) for words in BAD],
    ("teacher", "--device tpu", "--device"), ("teacher", "--set num_prompt=few", "num_prompt"),
    ("teacher", "--set colour=3", "--set colour"), ("teacher", "--set num_prompt", "--set"),
    ("teacher", "--set tokens_dims=8", "tokens_dims"), ("teacher", "--points 7", "--points"),
    ("teacher", "--weights vit_of_nobody", "vit_of_nobody"), ("teacher", "--data absent", "absent"),
    ("teacher", "--init absent.pt --prompt none", "--init"),
    ("student", "--teacher absent.pt", "train_teacher.py"),
    ("student", "--mask-ratio 1", "--mask-ratio"), ("student", "--mask-ratio 0.01", "--mask-ratio"),
    ("student", "--set num_group=4", "num_group"), ("student", "--set target_dim=4", "target_dim"),
    ("student", "--target coordinates --loss l2", "--loss")])
def test_a_mistake_is_one_line_and_code_2_and_leaves_no_folder(
        tmp_path, args_of, stage, words, named, capsys, monkeypatch):
    flags = [*TINY[stage], *args_of[stage], "--out", tmp_path / "out", *words.split()]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        training.run_script(STAGES[stage].main, STAGES[stage].Config, "")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and named in error, error
    assert not (tmp_path / "out").exists()

def test_flags_may_be_written_with_underscores_and_lists_add_up():
    words = "--batch_size 3 --log_every=2 --set depth=3 a_b=2 --set drop_path=0".split()
    config = training.parse_flags(train_student.Config, "", words)
    assert (config.batch_size, config.log_every) == (3, 2)
    assert config.set == ["depth=3", "a_b=2", "drop_path=0"]
    sizes = act.StudentConfig()
    changed = training.override(sizes, config.set[::2], train_student.SET)
    assert changed == replace(sizes, depth=3, drop_path=0.0) and sizes.depth == 12
    assert isinstance(changed.drop_path, float)

@pytest.mark.parametrize("stage", STAGES)
def test_help_fits_the_terminal_and_lists_what_set_takes(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        training.parse_flags(STAGES[stage].Config, STAGES[stage].__doc__, ["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "num_group" in text and all(name in text for name in STAGES[stage].SET)

# -- the log --------------------------------------------------------------------------------------
def make_log(tmp_path, **settings):
    settings = dict(steps=6, epochs=3, batch_size=1, lr=1e-3, out=str(tmp_path / "run"), **settings)
    student = act.Student(SMALL)
    log = training.Log(replace(training.RunConfig(), **settings), student, ["a", "b"])
    return log, training.adamw(student, 1e-3, 0.0)

def contents(folder):
    names = ("last.pt", "metrics.jsonl", "config.json")
    return [(folder / name).read_bytes() for name in names]

def test_rows_have_means_since_the_row_before_and_epoch_rows_the_epochs(tmp_path, capsys):
    log, optimizer = make_log(tmp_path, log_every=2)
    for value in (1.0, 2.0, 6.0):
        log.add(loss=torch.tensor(value), lr=value)
    log.end_epoch(optimizer, dict(accuracy=50.0))
    log.add(loss=torch.tensor(10.0), lr=10.0)
    log.close(done=1.0)
    rows = rows_of(log.out)
    assert [row.get("loss") for row in rows] == [1.5, 3.0, 10.0, None]
    assert [row.get("lr") for row in rows] == [2.0, 6.0, 10.0, None]  # numbers: the last
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (1, 3), (2, 4), (1, 4)]
    assert rows[1]["accuracy"] == 50 and rows[-1]["done"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["epoch 1", "epoch 1", "epoch 2"]
    assert "clouds/s" in lines[0] and "left" in lines[0]

def test_adding_a_step_reads_no_value_on_the_host(tmp_path):
    """On a GPU each such read would wait for all that is queued there; meta tensors have none."""
    log, _ = make_log(tmp_path)
    log.add(loss=torch.ones((), device="meta"), grad_norm=torch.ones((), device="meta"), lr=0.1)
    with pytest.raises(NotImplementedError):
        log.write(1, log.values)

def test_an_earlier_run_is_set_aside_unless_a_run_goes_on_there(tmp_path):
    log, optimizer = make_log(tmp_path)
    log.add(loss=torch.tensor(1.0))
    log.end_epoch(optimizer, {})
    before = contents(log.out)
    log.add(loss=torch.tensor(math.nan))
    with pytest.raises(ValueError, match="step 2.*--lr"):  # stops, and keeps what there is
        log.end_epoch(optimizer, {})
    (log.out / "notes.txt").write_text("mine")
    code = "import sys, pathlib, test_scripts; test_scripts.make_log(pathlib.Path(sys.argv[1]))"
    error = python("-c", code, tmp_path).stderr  # another process, while this one has the folder
    assert "ValueError" in error and str(log.out) in error and "another run" in error
    assert contents(log.out) == before
    make_log(tmp_path)
    aside, = log.out.glob("earlier-*")
    assert contents(aside) == before
    assert not (log.out / "last.pt").exists() and (log.out / "notes.txt").exists()

# -- the stages -----------------------------------------------------------------------------------
def test_stage_one_leaves_its_results_and_what_ran(teacher_run, folder):
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
    assert [closing["cd_l1_after"], rows[-1]["cd_l1"]] == pytest.approx([cd_l1] * 2, rel=1e-5)
    about, state = json.loads((teacher_run / "config.json").read_text()), checkpoint(teacher_run)
    assert (about["settings"]["batch_size"], about["settings"]["size"]) == (4, "tiny")
    assert about["command"] and about["device"] == "cpu" and torch.__version__ in about["versions"]
    assert about == {name: state[name] for name in about}
    assert (state["kind"], state["epoch"], state["step"]) == ("Teacher", 2, 4)
    assert {"model", "config", "optimizer", "random", "log", "versions"} <= state.keys()

def test_codes_start_from_patches_and_learn_at_a_tenth_of_the_rate(tmp_path, folder, monkeypatch):
    start, make = {}, train_teacher.start_codes

    def spy(teacher, *args):
        make(teacher, *args)
        start.update({name: value.clone() for name, value in teacher.state_dict().items()})
        teacher.eval()
        xyz, _ = args[0].sample(torch.arange(8), 64, torch.Generator().manual_seed(0))
        assert len(teacher.tokenize(*act.group_points(xyz, 8, 8)).unique()) >= 8  # of 16

    monkeypatch.setattr(train_teacher, "start_codes", spy)
    run("teacher", "--data", folder, "--out", tmp_path, "--epochs", 1)
    state = checkpoint(tmp_path)
    slow = ("encoder.", "dgcnn_1.", "codebook")
    for name, value in state["model"].items():
        assert torch.equal(value, start[name]) == name.startswith("backbone."), name
    teacher = act.load(tmp_path / "last.pt")
    names = {name: p for name, p in teacher.named_parameters() if p.requires_grad}
    groups = training.adamw(teacher, 1e-3, 0.1, slow).param_groups
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert all(scale[id(p)] == (0.1 if name.startswith(slow) else 1) for name, p in names.items())
    assert {group["scale"] for group in state["optimizer"]["param_groups"]} == {0.1, 1}
    run("teacher", "--data", folder, "--out", tmp_path / "kl", "--epochs", 1, "--codes", "kl")
    groups = checkpoint(tmp_path / "kl")["optimizer"]["param_groups"]
    assert {group["scale"] for group in groups} == {1}
    assert rows_of(tmp_path / "kl")[0]["kl_weight"] > rows_of(tmp_path)[0]["kl_weight"] == 0

def test_information_is_that_of_patch_and_code():
    """I(patch; code) = sum p(patch) q(code | patch) log(q(code | patch) / mean of q(code))."""
    logits = 3 * torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    q = logits.double().softmax(dim=-1).view(10, 7)
    found = sum((row * (row / q.mean(0)).log()).sum() for row in q) / 10
    assert train_teacher.information(logits).item() == pytest.approx(found.item(), rel=1e-5)
    certain = 1e4 * torch.eye(8).view(1, 8, 8)  # each patch has a code of its own
    certain.requires_grad_()
    train_teacher.information(certain).backward()
    assert train_teacher.information(certain).item() == pytest.approx(math.log(8))
    assert certain.grad.isfinite().all()
    assert train_teacher.information(torch.zeros(2, 3, 4)).item() == pytest.approx(0, abs=1e-6)

def test_reconstruction_with_another_clouds_codes(teacher_run, folder):
    """Equal to its own if the codebook holds one code; else the codes are moved by half a batch."""
    teacher, test = act.load(teacher_run / "last.pt"), clouds.open_dataset(folder).test
    config = replace(train_teacher.Config(), points=64)
    metrics = train_teacher.evaluate(teacher, test, config, 4)
    assert metrics["cd_l1_other"] != metrics["cd_l1"]
    xyz, _ = test.sample(torch.arange(4), 64, training.seeded("cpu", 0, "test", 0))
    n, center = act.group_points(xyz, 8, 8)
    tokens = teacher.codebook[teacher.tokenize(n, center)[[2, 3, 0, 1]]]
    fine = (teacher.decode(tokens, center)[1] + center[:, :, None]).flatten(1, 2)
    assert metrics["cd_l1_other"] == pytest.approx(act.chamfer_distance(fine, xyz).item())
    teacher.codebook.data[:] = teacher.codebook[0].clone()
    metrics = train_teacher.evaluate(teacher, test, config, 4)
    assert metrics["cd_l1_other"] == pytest.approx(metrics["cd_l1"])

@pytest.mark.parametrize("target, extra, loss, sizes", [
    ("teacher", ["--mask", "block"], "cosine", (8, 8, 16)),
    ("teacher", ["--loss", "smooth_l1"], "smooth_l1", (8, 8, 16)), ("codes", [], None, (8, 8, 16)),
    ("coordinates", ["--teacher", "absent", "--set", "num_group=6", "group_size=5"], None,
     (6, 5, 15))])
def test_stage_two_with_every_target(tmp_path, args_of, target, extra, loss, sizes, capsys):
    args = [*args_of["student"], "--target", target, *extra]
    run("student", *args, "--out", tmp_path, "--epochs", 1)
    row, closing = rows_of(tmp_path)
    assert 0 <= closing["svm_untrained"] <= 100 and 0 <= closing["svm_trained"] <= 100
    assert math.isfinite(row["loss"]) and len(row["cosine_per_depth"]) == 2
    files = {path.name for path in tmp_path.iterdir()}
    assert {"features.png", "features.ply", "loss.svg"} <= files
    assert ("reconstruction.png" in files) == (target != "codes")
    c = act.load(tmp_path / "last.pt").config
    assert (c.num_group, c.group_size, c.target_dim, c.points, c.normalized) == (*sizes, 64, True)
    assert checkpoint(tmp_path)["settings"]["loss"] == loss
    printed = capsys.readouterr().out
    assert printed.startswith(clouds.describe(clouds.open_dataset(args[1])))
    assert "too few" in printed and "linear SVM ..." in printed and "untrained ->" in printed

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
def test_init_takes_sizes_and_all_weights_that_fit(tmp_path, stage, args_of, capsys):
    args = [*args_of[stage], "--epochs", 1, "--size", "small", "--weight-decay", 0, "--out"]
    prompt = ["--prompt", "none"] if stage == "teacher" else []
    run(stage, *args, tmp_path / "a", *prompt)
    init = ["--init", tmp_path / "a/last.pt", "--lr"]
    run(stage, *args, tmp_path / "b", *init, 0, flags=SHORT)
    one, two = (checkpoint(tmp_path / name) for name in "ab")
    assert str(tmp_path / "a") in capsys.readouterr().out and one["config"] == two["config"]
    one, two = one["model"], two["model"]
    for name in one:
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(one[name], two[name], atol=1e-4), name  # warm-up is from 1e-6
    if stage == "teacher":  # at this size the tokenizer is trained
        run(stage, *args, tmp_path / "c", *init, 0.01, flags=SHORT)
        two = checkpoint(tmp_path / "c")["model"]
        moved = {name for name in one if not torch.equal(one[name], two[name])}
        assert {"encoder.first_conv.0.weight", "dgcnn_1.layer5.0.weight", "codebook"} <= moved
        assert not any(name.startswith("backbone.") for name in moved)
    else:
        run(stage, *args, tmp_path / "c", *init, 0, "--target", "coordinates", flags=SHORT)
        assert "newly initialised: head.weight, head.bias" in capsys.readouterr().out
        with pytest.raises(ValueError, match="a/last.pt.*encoder"):
            run(stage, *args, tmp_path / "d", *init, 0, "--set", "width=64")

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
    lists, data = {"train": [], "test": []}, tmp_path / "data"
    for part in ("shapenet_pc", "ShapeNet-55"):
        (data / part).mkdir(parents=True)
    for i, file in enumerate(sorted(folder.rglob("*.npy"))):
        lists["train" if i < 8 else "test"].append(f"{i % 2:08d}-{i}.npy")
        (data / "shapenet_pc" / f"{i % 2:08d}-{i}.npy").write_bytes(file.read_bytes())
    for split, names in lists.items():
        (data / f"ShapeNet-55/{split}.txt").write_text("\n".join(names))
    run("student", *args_of["student"], "--data", data, "--epochs", 1, "--out", tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == 3  # 12 clouds in batches of 4
    assert "all 12 clouds" in capsys.readouterr().out

def test_a_cloud_with_too_few_distinct_points_is_named_and_nothing_moved(tmp_path, teacher_run):
    np.save(tmp_path / "few.npy", np.random.default_rng(0).random((5, 3)).repeat(20, axis=0))
    before = sorted(teacher_run.iterdir())
    with pytest.raises(ValueError, match="few.npy.*8"):
        run("teacher", "--data", tmp_path / "few.npy", "--out", teacher_run, "--epochs", 1)
    assert sorted(teacher_run.iterdir()) == before

def test_the_chart_shows_loss_and_test_metric(tmp_path, teacher_run):
    def lines_and_texts(chart):
        parts = list(xml.etree.ElementTree.parse(chart).getroot().iter())
        lines = [part.get("points").split() for part in parts if part.get("points") is not None]
        points = [np.array([point.split(",") for point in line], float) for line in lines]
        return points, {part.text for part in parts}

    (loss, metric), texts = lines_and_texts(teacher_run / "loss.svg")
    assert (len(loss), len(metric)) == (4, 2)  # a point for each step, for each epoch
    assert loss[-1][0] == metric[-1][0] and {"cd_l1", "step", "4"} <= texts
    rows = [dict(epoch=i, step=10 * i, loss=1.0 / i) for i in (1, 2, 3)]
    clouds.write_chart(tmp_path / "a.svg", rows)  # epoch rows alone
    (loss,), _ = lines_and_texts(tmp_path / "a.svg")
    assert (np.diff(loss, axis=0) > 0).all()  # downwards is larger y
    clouds.write_chart(tmp_path / "b.svg", [])
    assert len(lines_and_texts(tmp_path / "b.svg")[0][0]) == 0

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

def test_a_resumed_run_may_be_longer_but_with_no_other_settings(tmp_path, args_of, folder, capsys):
    args = [*args_of["student"], "--out", tmp_path]
    run("student", *args, "--epochs", 1)
    run("student", *args, "--epochs", 3, "--resume")
    assert "longer run" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 4, 6, 6]
    run("student", *args, "--steps", 7, "--resume")  # half an epoch, then its other half
    run("student", *args, "--steps", 8, "--resume")
    assert checkpoint(tmp_path)["step"] == 8
    before = sorted(path.name for path in tmp_path.iterdir())
    changes = {"lr": "--lr 0.5", "mask": "--mask block", "set": "--set drop_path=0",
               "seed": "--seed 3", "steps": "--steps 7", "clouds": f"--data {folder / 'test'}"}
    for name, change in changes.items():
        with pytest.raises(ValueError, match=f"last.pt.*{name} was"):
            run("student", *args, "--steps", 8, "--resume", *change.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == before

# -- several processes ----------------------------------------------------------------------------
def small_main(config):
    """Trains a small student on two shares of each batch: one of two processes takes one of them,
    a process alone takes both in turn, which gives the mean of their gradients."""
    config, device = training.setup(config, {"tiny": dict(epochs=1, batch_size=4, lr=1e-2)})
    student, shapes = act.Student(SMALL), clouds.synthetic_clouds(1, seed=4, num_points=100)
    config, net = training.plan(config, 8), training.parallel(student.train(), config)
    optimizer = training.adamw(student, config.lr, 0.05)
    log = training.Log(config, student, list("abcdefgh"))
    shares = [training.RANK] if training.WORLD == 2 else [0, 1]
    for batch in training.epoch_batches(config, 8, 0):
        generator, total = training.seed_step(config.seed, log.step, device), torch.zeros(())
        xyz = clouds.scale_translate(shapes.sample(batch, 64, generator)[0], generator)
        patches = act.group_points(xyz, 8, 4)
        mask = act.random_mask(patches[1], 0.5, generator)
        optimizer.zero_grad()
        for share in shares:
            neighborhood, center, hidden = (t[share::2] for t in (*patches, mask))
            truth = act.gather_points(neighborhood.flatten(2), act.split_mask(hidden, "cpu")[1])
            loss = act.distillation_loss(net(neighborhood, center, hidden), truth, "l2")
            (loss / len(shares)).backward()
            total += loss.detach() / len(shares)
        optimizer.step()
        log.add(loss=total)
    log.end_epoch(optimizer, {})
    torch.save(student.state_dict(), f"{config.out}{training.RANK}.pt")

def test_synchronised_batch_norm_in_one_process_is_the_plain_one():
    x = torch.randn(3, 5, 8)
    plain, synchronised = act.BatchNorm(8), act.BatchNorm(8)
    synchronised.__class__ = training.SyncBatchNorm  # as `parallel` makes it on GPUs
    assert torch.equal(plain(x), synchronised(x))
    assert equal(dict(plain.state_dict()), dict(synchronised.state_dict()))

def test_two_processes_train_as_the_mean_of_their_gradients(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text("import test_scripts as t\n"
                      "t.training.run_script(t.small_main, t.training.RunConfig, '')")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", driver]
    flags = ["--device", "cpu", "--precision", "fp32", "--out"]
    done = python(*launch, *flags, tmp_path / "two")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("epoch 1") == 1
    small_main(training.parse_flags(training.RunConfig, "", [*flags, str(tmp_path / "one")]))
    first, second, alone = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("two0", "two1", "one0"))
    for name, _ in act.Student(SMALL).named_parameters():
        assert torch.equal(first[name], second[name]), name
        if not name.endswith("conv.0.bias"):  # cancelled by BatchNorm: its gradient is rounding
            assert torch.allclose(first[name], alone[name], atol=1e-5), name
    (two,), (one,) = rows_of(tmp_path / "two"), rows_of(tmp_path / "one")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)

# =================================================================================================
# finetune.py
# =================================================================================================

FINE_SIZES = dict(num_group=8, group_size=8, points=128, width=24, depth=3, num_heads=2,
                  encoder_dims=24)
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
def test_accuracy_and_iou_of_a_case_by_hand(capsys):
    matrix = finetune.confusion([0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 0, 3], 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0, 0, 0, 1]]
    expected = dict(accuracy=100 * 4 / 6, mean_accuracy=100 * (2 / 3 + 1 / 2 + 1) / 3)
    assert finetune.accuracy(matrix) == pytest.approx(expected)
    assert finetune.iou(matrix).tolist() == pytest.approx([50, 100 / 3, np.nan, 100], nan_ok=True)
    finetune.print_table(matrix, ["cat", "dog", "cow", "hen"])
    _, cat, _, cow, _, over = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert cat == ["cat", "3", "66.7", "50.0", "dog", "1"] and cow == ["cow", "0", "-", "-"]
    assert "3 of 4" in " ".join(over)

def test_parts_are_averaged_over_shapes_and_over_categories_as_sets_are(monkeypatch):
    made = clouds.compositions(clouds.synthetic_clouds(2, num_points=64))
    made, rng = made.select([0, 1, 2]), np.random.default_rng(1)  # of two categories
    task = finetune.Parts(options(task="parts"), clouds.Dataset("", made, made), FINE_SIZES, CPU)
    shapes, each = [], [[], [], []]
    for ious, label in zip(each, made.labels):
        truth, predicted = rng.integers(*made.part_ranges[label], (2, 6))
        for part in range(*made.part_ranges[label]):
            a, b = set(np.flatnonzero(truth == part)), set(np.flatnonzero(predicted == part))
            ious.append(100 * len(a & b) / len(a | b) if a | b else 100)
        shapes.append(("", None, torch.tensor(truth), torch.tensor(predicted)))
    monkeypatch.setattr(task, "predictions", lambda model: shapes)
    metrics, each = task.evaluate(None), [np.mean(ious) for ious in each]
    assert metrics["instance_miou"] == pytest.approx(np.mean(each))
    assert metrics["class_miou"] == pytest.approx(np.mean([np.mean(each[:2]), each[2]]))
    right = [(truth == predicted).double().mean() for *_, truth, predicted in shapes]
    assert metrics["accuracy"] == pytest.approx(100 * np.mean(right))

# -- what the networks take ------------------------------------------------------------------------
def test_subsampled_clouds_are_farthest_points_and_small_ones_stay():
    split = dataset(300, 60, 128, 140).train
    less = finetune.subsample(split, 128, "cpu")
    own = split[0][None]
    assert torch.equal(less[0], act.gather_points(own, act.farthest_point_sample(own, 150))[0])
    assert torch.equal(less[1], split[1]) and torch.equal(less[2], split[2])
    assert torch.equal(less[3].unique(dim=0), split[3].unique(dim=0))
    for i, xyz in enumerate(finetune.of_each_cloud(lambda xyz: xyz, less, 128)):
        expected = torch.from_numpy(clouds.normalize(less[i][:128].numpy()))  # nothing is repeated
        assert xyz.shape == expected.shape and torch.allclose(xyz, expected, atol=1e-6)
    published = [finetune.subsample(dataset(2500).train, n, "cpu") for n in (1024, 2048)]
    assert [len(less[0]) for less in published] == [1200, 2400]

def test_augmentations_do_what_their_names_say():
    xyz, generator = torch.from_numpy(arrays()), training.seeded("cpu", 0)
    assert torch.equal(finetune.augment(xyz, options(augment="none"), generator), xyz)
    for task, axis, alike in (("classify", 1, False), ("parts", 1, True), ("scene", 2, True)):
        turned = finetune.augment(xyz, options(augment="rotate", task=task), generator)
        assert torch.equal(turned[..., axis], xyz[..., axis]) and not torch.allclose(turned, xyz)
        assert torch.allclose(turned.norm(dim=2), xyz.norm(dim=2), atol=1e-5)
        scaled = finetune.augment(xyz, options(augment="scale_translate", task=task), generator)
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
        own = split.select([split.names.index(name) for name in part.names])
        assert torch.equal(part.points, own.points)
        assert [part.classes[i] for i in part.labels] == [own.classes[i] for i in own.labels]
    for way, shot in ((2, 9), (1, 3), (2, 0), (99, 3)):
        with pytest.raises(ValueError, match=f"--way {way} --shot {shot}"):
            finetune.draw_episode(data, way, shot, 0)

def test_a_training_block_holds_what_a_slow_search_finds():
    xyz = np.random.default_rng(3).uniform(0, [3, 2, 1], (700, 3)).astype(np.float32)
    xyz = xyz[xyz[:, 0].argsort()]
    room = clouds.Room("room", 1, xyz, xyz[:, 2] > 0.5)
    drawn, labels = finetune.sample_block(room, 60, np.random.default_rng(5))
    assert drawn.dtype == np.float32 and np.array_equal(labels, drawn[:, 2] > 0.5)  # z as it is
    distances = []
    for center in xyz:  # the block's centre is one of the points
        inside = (xyz - np.append(center[:2], 0))[(abs(xyz - center)[:, :2] <= 0.5).all(1)]
        distances.append(abs(drawn[:, None] - inside).max(-1).min(-1).max())
    assert min(distances) < 1e-5
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

def test_every_point_is_labelled_by_the_mean_of_its_votes():
    class Doubtful(torch.nn.Linear):  # class 1 as z tells, and now and then too sure of class 0
        config, calls = act.SegmenterConfig(num_parts=2, normalized=False, points=50), 0

        def forward(self, xyz, category):
            self.calls += 1
            logits = torch.stack([torch.zeros(xyz.shape[:2]), 4 * xyz[..., 2].sign()], dim=-1)
            return logits - torch.tensor([0, 1.0]) * (self.calls % 2)

    xyz = np.random.default_rng(0).uniform(-1, 1, (333, 3))
    assert np.array_equal(finetune.label_points(Doubtful(1, 1), xyz), xyz[:, 2] > 0)

def test_a_vote_is_the_mean_of_logits():
    config = options(vote=3, augment="scale_translate")
    task = finetune.Classification(config, dataset(150, 160, 170, 180), FINE_SIZES, CPU)
    model, logits = act.Classifier(task.sizes).eval(), []
    for i in range(3):
        generator = training.seeded(CPU, config.seed, "vote", i, 0)
        xyz, _ = task.test.sample(torch.arange(4), 128, generator)
        logits.append(model(finetune.augment(xyz, config, generator)))
    best = torch.stack(logits).mean(dim=0).argmax(dim=1)
    right = 100 * (best == task.test.labels).double().mean().item()
    assert task.vote(model) == dict(vote_accuracy=right, vote_mean_accuracy=right)

# -- protocols and checkpoints ---------------------------------------------------------------------
@pytest.mark.parametrize("protocol", ["mlp3", "linear"])
def test_frozen_protocols_leave_the_encoder_bit_identical(finetune_run, protocol):
    finetune_run(*FINE, "--protocol", protocol, "--out", protocol)
    before, after = act.load("student.pt"), act.load(f"{protocol}/last.pt")
    assert after.config.head == protocol
    assert equal(before.encoder.state_dict(), after.encoder.state_dict())  # statistics, too

def started(checkpoint, **changed):
    """(the network of a classification run, the checkpoint's)"""
    config, source = options(checkpoint=str(checkpoint), **changed), act.load(checkpoint)
    sizes = finetune.encoder_sizes(config, source)
    task = finetune.Classification(config, dataset(600, 700), sizes, CPU)
    return finetune.start_model(config, task, source, CPU), source

def test_what_is_loaded_and_what_is_new_is_reported(place, tmp_path, capsys):
    model, source = started(place / "student.pt")
    new, unused = capsys.readouterr().out.split("newly initialised: ")[1].split("; not used: ")
    assert new == "head" and "decoder" in unused and "cls_token" not in unused
    assert equal(model.encoder.state_dict(), source.encoder.state_dict())
    again, _ = started(place / "student.pt")  # the head does not depend on what else is drawn
    assert equal(model.state_dict(), again.state_dict())
    student = act.Student(act.StudentConfig(width=64, depth=2, num_heads=1, encoder_dims=64))
    act.export(student, tmp_path / "release.pth")
    state = torch.load(tmp_path / "release.pth", weights_only=True)["base_model"]
    state = {key.replace("ACT_", "MAE_"): v for key, v in state.items() if "cls_" not in key}
    torch.save({"base_model": state}, tmp_path / "mae.pth")  # Point-MAE's: no class token
    with pytest.warns(UserWarning, match="cls_token"):
        model, _ = started(tmp_path / "mae.pth", points=512)
    assert torch.equal(model.encoder.norm.weight, student.encoder.norm.weight)

def test_checkpoints_and_flags_that_do_not_fit_are_refused(finetune_run, teacher_run):
    state = torch.load("student.pt", weights_only=True)
    state["config"]["encoder_dims"] = 32
    torch.save(state, "unfit.pt")
    for flags, words in (
            (("--checkpoint", "nothing.pt"), "nothing.pt.*train_student.py"),
            (("--checkpoint", "unfit.pt"), "unfit.pt"),
            (("--checkpoint", teacher_run / "last.pt"), "last.pt.*Teacher"),
            (("--predict", "shapes"), "student.pt.*Student"),
            (("--size", "base"), "--size base.*24"), (("--features", "a.npz"), "--features"),
            (("--task", "parts", "--protocol", "linear"), "--protocol")):
        with pytest.raises(ValueError, match=words):
            finetune_run(*FINE, *flags)

def test_patches_follow_the_ratio_of_the_checkpoint(place):
    student = act.load(place / "student.pt")  # 16 points to a patch
    for size, source, groups in (("tiny", student, 128), ("tiny", None, 64), ("base", None, 128)):
        config = options(size=size, points=2048)
        assert finetune.encoder_sizes(config, source)["num_group"] == groups

def test_defaults_are_the_published_ones():
    def base(**flags):
        return finetune.defaults(finetune.Config(**flags))["base"]

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
    assert stored["class_names"].tolist() == KINDS and (stored["split"] == "test").sum() == 6
    names, student = predicted["names"].tolist(), act.load("student.pt")
    for name, feature in zip(stored["names"], stored["features"]):
        xyz = torch.from_numpy(clouds.read_cloud(f"shapes/{name}", student.config.points))
        own = act.global_feature(student.encode(xyz[None]))[0].detach().numpy()
        assert np.allclose(feature, own, atol=1e-4)
        assert np.allclose(predicted["features"][names.index(f"shapes/{name}")], own, atol=1e-4)

def test_classify_votes_and_resumes_bit_for_bit(finetune_run, monkeypatch):
    flags = (*FINE[:-1], 2, "--vote", 2)
    out = finetune_run(*flags, "--out", "whole")
    assert "3 classes: mug" in out and "width 24" in out and "3 of 3 classes" in out
    *epochs, last = log_of("whole")
    assert len(epochs) == 2 and {"loss", "grad_norm", "lr", "mean_accuracy"} <= epochs[0].keys()
    assert last["accuracy"] == epochs[1]["accuracy"] and {"confusion", "vote_accuracy"} <= set(last)
    assert last["best_accuracy"] == max(row["accuracy"] for row in epochs)
    config = act.load("whole/last.pt").config
    assert (config.class_names, config.points, config.normalized) == (KINDS, 128, True)

    def interrupted(log, *values):
        end_epoch(log, *values)
        raise KeyboardInterrupt

    end_epoch = training.Log.end_epoch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Log, "end_epoch", interrupted)
        finetune_run(*flags, "--out", "half")
    assert "resumed" in finetune_run(*flags, "--out", "half", "--resume")
    assert equal(checkpoint("whole")["model"], checkpoint("half")["model"])
    assert rows_of("whole") == rows_of("half")

def test_predict_labels_files_and_goes_on_after_a_broken_one(finetune_run, capsys):
    finetune_run(*FINE, "--out", "cls")
    flags = ["--checkpoint", "cls/last.pt", "--out", "pred", "--features", "pred.npz"]
    out = finetune_run("--predict", "shapes/test", "shapes/train/mug/0.npy", *flags)
    with open("pred/predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "label", *KINDS] and len(rows) == 7
    truth = [Path(row[0]).parent.name for row in rows]
    values = np.array([row[2:] for row in rows], float)
    assert np.allclose(values.sum(1), 1, atol=1e-5) and all(row[0] in out for row in rows)
    assert [row[1] for row in rows] == [KINDS[i] for i in values.argmax(1)]
    assert f"accuracy {100 * np.mean([a[1] == b for a, b in zip(rows, truth)]):.2f} %" in out
    stored = np.load("pred.npz")
    assert stored["features"].shape == (7, 48) and [KINDS[i] for i in stored["labels"]] == truth
    np.save("far.npy", 1e4 + 50 * shape("mug", 0, 9))
    Path("broken.ply").write_text("ply\n")
    with pytest.raises(ValueError, match="--predict"):
        finetune_run("--predict", "broken.ply", "nowhere", "far.npy", *flags[:4])
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in errors] == ["broken.ply", "nowhere"]
    assert "far.npy" in Path("pred/predictions.csv").read_text()

def test_fewshot_draws_episodes_or_reads_the_published_folds(finetune_run):
    flags, episode = (*FINE, "--task", "fewshot", "--way", 2, "--shot", 3), {}
    Path("published/2way_3shot").mkdir(parents=True)
    for split in ("train", "test"):
        points = [shape(KINDS[c], c, i).repeat(2, axis=1) for i, c in enumerate((0, 1, 0, 1))]
        episode[split] = list(zip(points, (0, 1, 0, 1), (30, 31, 30, 31)))  # with normals
    for fold in range(10):
        Path(f"published/2way_3shot/{fold}.pkl").write_bytes(pickle.dumps(episode))
    for data, out in (("shapes", "few"), ("published", "pub")):
        finetune_run(*flags, "--data", data, "--out", out)
        row = log_of(out)[-1]
        assert len(row["folds"]) == 10 and row["accuracy"] == pytest.approx(np.mean(row["folds"]))
        assert row["accuracy_std"] == pytest.approx(np.std(row["folds"], ddof=1))
        assert (row["task"], row["checkpoint"], row["seed"]) == ("fewshot", "student.pt", 0)
        assert log_of(f"{out}/fold_3")[-1]["accuracy"] == row["folds"][3]
    with pytest.raises(ValueError, match="2way_4shot"):
        finetune_run(*flags[:-1], 4, "--data", "published", "--out", "pub")

def write_shapenet_part(root):
    (root / "train_test_split").mkdir(parents=True)
    (root / "synsetoffset2category.txt").write_text("Bag\t001\nMug\t002\n")
    for split, names in (("train", "ab"), ("val", "c"), ("test", "de")):
        models = []
        for name in names:
            synset, first = ("001", 4) if name in "ad" else ("002", 36)
            rows = np.column_stack([arrays(1, 190, 6, ord(name))[0], np.arange(190) % 2 + first])
            (root / synset).mkdir(exist_ok=True)
            np.savetxt(root / synset / f"{name}.txt", rows, fmt="%.6f")
            models.append(f"shape_data/{synset}/{name}")
        file = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        file.write_text(json.dumps(models))

def test_parts_end_to_end_and_a_cloud_is_labelled(finetune_run, place):
    write_shapenet_part(place / "shapenet")
    out = finetune_run(*DENSE, "--task", "parts", "--data", "shapenet", "--out", "parts")
    assert "cls_token" in out.split("not used: ")[1] and "001/d" in out
    assert {"instance_miou", "class_miou", "best_instance_miou"} <= log_of("parts")[-1].keys()
    config = act.load("parts/last.pt").config
    assert (config.class_names, config.part_ranges) == (["Bag", "Mug"], [[4, 6], [36, 38]])
    *_, (one, name), (other, _) = csv.reader(Path("parts/labels.csv").read_text().splitlines())
    assert one != other and one[0] == "#" and name == "Mug part 36"
    points = arrays(1, 300)[0]
    Path("Mug").mkdir()
    np.save("Mug/mine.npy", points)
    predict = ("--predict", "Mug", "--checkpoint", "parts/last.pt", "--out", "coloured")
    assert "Mug part 3" in finetune_run(*predict) and Path("parts/parts.png").is_file()
    stored = np.load("coloured/Mug-mine.npy.npz")
    assert set(stored["labels"]) <= {36, 37} and stored["label_names"][36] == "Mug part 36"
    assert np.allclose(stored["points"], points)
    assert np.allclose(clouds.read_points("coloured/Mug-mine.npy.ply"), points, atol=1e-6)
    with pytest.raises(ValueError, match="--predict"):
        finetune_run(*predict, "--category", "Teapot")

def write_rooms(root, names, columns):
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        xyz = rng.uniform(0, [1.6, 1.2, 2], (900, 3)) + 10
        label = (xyz[:, 2] > 11) * (12 if columns == 7 else 1)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, np.column_stack([xyz, np.ones((900, columns - 4)), label]))

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
    data = clouds.open_rooms("s3dis")
    weight = finetune.Scenes(options(task="scene"), data, FINE_SIZES, CPU).weight[[0, 12]]
    few, many = sorted(np.bincount(data.train[0].labels)[[0, 12]])
    assert sorted(weight.tolist()) == pytest.approx([1, (many / few) ** (1 / 3)])

def test_own_labelled_folders_are_segmented(finetune_run, place):
    write_rooms(place / "own", ["train/a.npy", "train/b.npy", "test/c.npy"], 5)
    (place / "own" / "classes.txt").write_text("low\nhigh\n")
    for task, keys in (("scene", {"iou_low", "iou_high"}), ("parts", {"instance_miou", "miou"})):
        finetune_run(*DENSE, "--task", task, "--data", "own", "--out", f"own_{task}")
        assert keys <= log_of(f"own_{task}")[-1].keys()
        c = act.load(f"own_{task}/last.pt").config
        assert (c.class_names, c.normalized) == (["low", "high"], task == "parts")
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

# -- boxes, assignment, loss ----------------------------------------------------------------------
@pytest.mark.parametrize("other, iou, giou", [
    (BOX, 1, 1),
    ([0.5, 0, 0, 1, 1, 1], 1 / 3, 1 / 3),  # half over each other: the hull is the union
    ([2, 0, 0, 1, 1, 1], 0, -1 / 3),  # 1 m apart: hull 3, union 2
    ([0.5, 0.5, 0.5, 1, 1, 1], 1 / 15, 1 / 15 - 1 + (2 - 1 / 8) / 1.5**3),  # sharing a corner
])
def test_iou_and_giou_of_hand_worked_pairs(other, iou, giou):
    a, b = torch.tensor([BOX, FAR]), torch.tensor([other, other, FAR])
    assert detect.box_iou(a, b)[0].tolist() == pytest.approx([iou, iou, 0], abs=1e-6)
    assert detect.generalized_box_iou(a, b)[0, :2].tolist() == pytest.approx([giou, giou], abs=1e-6)

def test_giou_of_flat_boxes_is_finite_and_so_is_its_gradient():
    flat = torch.tensor([[0.0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1e-4], [0, 0, 0, 0, 0, 0]])
    giou = detect.generalized_box_iou(flat.requires_grad_(), flat)
    giou.sum().backward()
    assert (giou.abs() <= 1 + 1e-6).all() and giou[1, 1] > 0.999 and flat.grad.isfinite().all()

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

def test_assignment_rejects_too_many_boxes_and_costs_that_are_not_finite():
    for cost in (torch.zeros(3, 2), torch.tensor([[math.nan, 1.0]])):
        with pytest.raises(ValueError, match="cost"):
            detect.assign(cost)

def random_layer(Q=5, seed=0):
    """logits, center, size, extent, boxes, labels of three rooms, the second without boxes."""
    boxes = [random_boxes(K, seed + K) for K in (3, 0, 2)]
    labels = [torch.arange(len(own)) for own in boxes]
    logits, center, size = (uniform(seed + n, 3, Q, n) for n in (4, 3, 9))
    extent = torch.tensor([[4.0, 3, 2.5]] * 3, dtype=torch.float64)
    return 3 * logits, 2 * center, size[..., :3] + 0.1, extent, boxes, labels

def loss_by_loops(logits, center, size, extent, boxes, labels):
    """[class, giou, center, size]"""
    entropy, weights, sums = 0.0, 0.0, np.zeros(3)
    for b, (own, kinds) in enumerate(zip(boxes, labels)):
        p, predicted = logits[b].softmax(dim=1), torch.cat([center[b], size[b]], dim=1)
        giou = detect.generalized_box_iou(own, predicted)
        best = detect.assign(-p[:, kinds].T - 2 * giou).tolist()
        target = dict(zip(best, kinds.tolist()))
        for q in range(len(p)):
            weight = 1.0 if q in target else 0.25
            entropy -= weight * p[q, target.get(q, 3)].log().item()
            weights += weight
        for k, q in enumerate(best):
            off = ((predicted[q] - own[k]).view(2, 3) / extent[b]).abs().sum(dim=1)
            sums += [1 - giou[k, q], 5 * off[0], off[1]]
    return [entropy / weights, *(sums / sum(map(len, boxes)))]

@pytest.mark.parametrize("seed", range(3))
def test_loss_is_that_of_loops_and_has_the_gradient_of_differences(seed):
    layer = random_layer(seed=seed)
    total, parts = detect.layer_loss(*layer)
    assert list(parts) == ["class", "giou", "center", "size"]
    values = [value.item() for value in parts.values()]
    assert values == pytest.approx(loss_by_loops(*layer), abs=1e-9)
    assert total.item() == pytest.approx(sum(values))
    outputs = [t.requires_grad_() for t in layer[:3]]
    assert torch.autograd.gradcheck(lambda *t: detect.layer_loss(*t, *layer[3:])[0], outputs)

def test_loss_of_no_boxes_and_of_perfect_ones_is_the_class_term():
    *outputs, extent, boxes, labels = random_layer()
    logits, center, size = (t.clone().requires_grad_() for t in outputs)
    none = [own[:0] for own in boxes], [kinds[:0] for kinds in labels]
    total, _ = detect.layer_loss(logits, center, size, extent, *none)
    total.backward()
    assert total.item() == pytest.approx(-logits.log_softmax(dim=-1)[..., -1].mean().item())
    assert all(t.grad.isfinite().all() for t in (logits, center, size))
    for b, own in enumerate(boxes):
        outputs[1][b, 1 : 1 + len(own)], outputs[2][b, 1 : 1 + len(own)] = own.split(3, dim=1)
    total, parts = detect.layer_loss(*outputs, extent, boxes, labels)
    assert total.item() == pytest.approx(parts["class"].item(), abs=1e-12)

# -- detections, average precision ----------------------------------------------------------------
@pytest.mark.parametrize("x, probabilities, points, side, kept", [
    # boxes at (x, 0, 0), of chair, table, no object; number of points at an x; kept boxes, scores
    ([0, 5], [[5, 3, 2], [1, 6, 3]], {0.5: 4, 5.5: 5}, 1, {5: [0.07, 0.42]}),  # on the borders
    ([0, 1], [[3, 1, 6], [1, 5, 4]], {9: 9}, 1, {1: [0.06, 0.3]}),  # all empty: the likeliest stays
    ([0], [[0.2, 0.2, 9.6]], {9: 9}, 1, {}),  # if it is an object
    ([0, 3, 6], [[6, 1, 3], [5, 1, 4], [4, 1, 5]], {2.5: 5, 4: 5}, 5, [0, 3, 6]),  # IoU 0.25 stays
    ([0, 2.9, 5.9], [[6, 1, 3], [5, 1, 4], [4, 1, 5]], {2.5: 5, 4: 5}, 5, [0, 5.9]),  # > 0.25 not
    ([0, 0], [[6, 1, 3], [1, 6, 3]], {0: 5}, 5, [0, 0]),  # of two classes
])
def test_detections_of_hand_worked_rooms(x, probabilities, points, side, kept):
    xyz = torch.cat([torch.tensor([[float(at), 0, 0]] * count) for at, count in points.items()])
    center = torch.tensor([[float(value), 0, 0] for value in x])
    logits = (torch.tensor(probabilities) / 10).log()
    boxes, scores = detect.select_detections(center, torch.full_like(center, side), logits, xyz)
    assert boxes[:, 0].tolist() == pytest.approx(list(kept))
    if isinstance(kept, dict):
        assert scores.flatten().tolist() == pytest.approx(sum(kept.values(), []), abs=1e-6)

@pytest.mark.parametrize("found, truth, ap, recall", [  # found by falling score
    ([BOX, BOX], [BOX], 1, 1),  # a duplicate after the right one
    ([FAR, BOX], [BOX], 0.5, 1),
    ([BOX, BOX, FAR], [BOX, FAR], (1 + 2 / 3) / 2, 1),  # right, duplicate, right
    ([BOX], [BOX, FAR], 0.5, 0.5),
    ([], [BOX], 0, 0),
    ([[0.0, 0, 0, 1, 1, 2]], [BOX], 0, 0),  # IoU 0.5 is not more than 0.5
])
def test_average_precision_of_hand_worked_rooms(found, truth, ap, recall):
    found, truth = (torch.tensor(boxes).reshape(-1, 6) for boxes in (found, truth))
    scores = torch.linspace(0.9, 0.1, len(found))[:, None].repeat(1, 2)
    empty = torch.tensor([FAR]), torch.tensor([[0.0, 0.0]])  # a room with one wrong box, the last
    truths = [(truth, torch.ones(len(truth), dtype=torch.long)), (truth[:0], torch.zeros(0))]
    result = detect.average_precision([(found, scores), empty], truths, 2, 0.5)
    assert [row[1].item() for row in result] == pytest.approx([ap, recall])
    assert all(row[0].isnan() for row in result)  # no ground truth

# -- model, data ----------------------------------------------------------------------------------
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

def test_boxes_lie_near_their_queries_within_the_extent_and_move_with_the_room():
    model, xyz = small_detector().double().eval(), 4 * uniform(0, 2, 128, 3)
    logits, center, size, extent = model(xyz)
    assert logits.shape == (2, 2, 16, 4) and center.shape == size.shape == (2, 2, 16, 3)
    query = act.gather_points(xyz, act.farthest_point_sample(xyz, 16))
    assert ((center - query).abs() <= 0.5).all() and ((0 <= size) & (size <= extent[:, None])).all()
    shift = torch.tensor([30.0, -20, 10]).double()
    for own, moved in zip((logits, center + shift, size), model(xyz + shift)):
        assert torch.allclose(own, moved, atol=1e-9)

def test_training_overfits_two_rooms_with_a_gradient_for_every_parameter():
    rooms, sizes = [furnished(0, 512), furnished(1, 512)], dict(decoder_depth=1, own_tokens=True)
    model = small_detector(num_group=64, points=512, num_queries=64, **sizes)
    optimizer = torch.optim.AdamW(model.parameters())
    drawn = [detect.sample([room], 512, np.random.default_rng(i)) for i, room in enumerate(rooms)]
    xyz, boxes, labels = ([rows[0] for rows in column] for column in zip(*drawn))
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 120)
        training_step(model, optimizer, torch.stack(xyz), boxes, labels)
    assert all(p.grad.any() for p in model.parameters())
    data = clouds.RoomSet("two rooms", rooms, rooms, CLASSES)
    assert detect.evaluate(model, data)["mean"]["ap25"] == 100

@pytest.mark.parametrize("angle, size", [(0, [2, 1, 3]), (90, [1, 2, 3]), (5, [2.0795, 1.1705, 3])])
def test_turned_box_is_the_hull_of_its_turned_corners(angle, size):
    corners = np.float32(list(itertools.product([0, 2], [1.5, 2.5], [1.5, 4.5])))
    points, (box,) = detect.turn(corners, np.float32([[1, 2, 3, 2, 1, 3]]), angle)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    assert box == pytest.approx([cos - 2 * sin, sin + 2 * cos, 3, *size], abs=1e-4)
    low, high = points.min(axis=0), points.max(axis=0)
    assert [*(low + high) / 2, *high - low] == pytest.approx(box, abs=1e-5)

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
            assert held >= (1 if augment == "published" else before)  # a cuboid may cut it
            assert augment == "published" or sorted(box[3:]) == pytest.approx(sorted(own[3:]))
    assert detect.sample([scene], 4000, np.random.default_rng(0))[0].shape == (1, 4000, 3)

def test_random_cuboid_keeps_boxes_by_their_centres_or_everything():
    scene, sizes = furnished(), []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        inside, held = detect.random_cuboid(scene.xyz, scene.boxes, rng, 1000)
        kept, center = scene.xyz[inside], scene.boxes[:, :3]
        within = (center >= kept.min(axis=0)) & (center <= kept.max(axis=0))
        assert held.any() and held.tolist() == within.all(axis=1).tolist()
        sizes.append(len(kept))
    assert 1000 <= min(sizes) and np.median(sizes) < 3000
    for boxes, least in ((scene.boxes, 3001), (scene.boxes[:0], 1000)):  # few points, no boxes
        inside, held = detect.random_cuboid(scene.xyz, boxes, np.random.default_rng(0), least)
        assert inside.all() and held.all()

@pytest.fixture
def scans(tmp_path):
    """Scans in VoteNet's layout, of which the second has no boxes, and one that is missing."""
    (tmp_path / "data").mkdir()
    for i in range(3):
        scene = furnished(i)
        rows = np.hstack([scene.boxes, [[3], [39], [14]]])[: 0 if i == 1 else 3]
        np.save(tmp_path / "data" / f"scene{i}_vert.npy", np.hstack([scene.xyz, scene.xyz]))
        np.save(tmp_path / "data" / f"scene{i}_bbox.npy", rows)
    (tmp_path / "data" / "scannetv2_train.txt").write_text("scene0\nscene1\nscene9\n")
    (tmp_path / "scannetv2_val.txt").write_text("scene2\n")
    return tmp_path / "data"

def test_scans_are_read_as_they_were_written(scans):
    data, expected = detect.open_scans(scans), furnished(0)
    first, second = data.train
    assert np.array_equal(first.xyz, expected.xyz) and np.array_equal(first.boxes, expected.boxes)
    assert first.labels.tolist() == [0, 17, 10] and data.classes[17] == "garbagebin"
    assert second.boxes.shape == (0, 6) and [scene.name for scene in data.test] == ["scene2"]
    assert "1 of 3" in data.notes[0] and "scene9" in data.notes[0]

@pytest.mark.parametrize("file, content, named", [
    ("scene0_bbox.npy", None, "scene0_bbox.npy"),
    ("scene0_bbox.npy", [[13.0] * 7], "13"),  # no class has this id
    ("scene0_bbox.npy", [[3.0] * 6], "scene0_bbox.npy"),
    ("../scannetv2_val.txt", None, "scannetv2_val.txt"),
    ("scene2_vert.npy", None, "scannetv2_val.txt"),  # no scan of the list is left
])
def test_broken_scans_name_themselves(scans, file, content, named):
    (scans / file).unlink()
    if content:
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
    assert {"last.pt", "loss.svg", "boxes.png", "boxes.ply"} <= set(os.listdir("whole"))
    assert {"ap25", "ap50", "recall", "classes"} <= rows_of("whole")[-1].keys()
    detect_run("--checkpoint", "student.pt", "--out", "part", "--epochs", "2")
    detect_run("--checkpoint", "student.pt", "--out", "part", "--resume")
    assert "resumed" in capsys.readouterr().out
    room = clouds.synthetic_rooms([(9, 0)], 30)[0].xyz + np.array([500_000, 4_000_000, 0])
    (tmp_path / "rooms").mkdir()
    (tmp_path / "rooms" / "broken.ply").write_text("no")
    np.save("rooms/mine.npy", room)
    with pytest.raises(ValueError, match="broken.ply"):  # after the others
        detect_run("--predict", "rooms", "--checkpoint", "whole/last.pt", "--out", "predicted")
    with pytest.raises(ValueError, match="student.pt"):
        detect_run("--predict", "rooms", "--checkpoint", "student.pt")
    written = clouds.read_points("predicted/mine.ply")
    assert len(written) >= len(room) and written[:, 1].min() > 3_999_000

def test_encoder_is_the_checkpoints_and_the_rest_does_not_depend_on_it(detect_run, monkeypatch):
    def stop(config, model, names):
        models.append(model.state_dict())
        raise InterruptedError

    models = [act.load("student.pt").state_dict()]
    monkeypatch.setattr(training, "Log", stop)
    for checkpoint in ("student.pt", "none"):
        with pytest.raises(InterruptedError):
            detect_run("--checkpoint", checkpoint)
    for name, value in models[1].items():
        assert torch.equal(value, models[0 if name.startswith("encoder.") else 2][name])
