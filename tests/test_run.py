"""util/run.py: flags, schedules, optimizer, processes, the log and the folder of a run."""

import math
import os
import re
import signal
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch

import act
import predict
from common import LAUNCH, ROOT, checkpoint, make, python, randn, refused, rows_of, same
from util import processes, run

CONFIG = run.RunConfig(batch_size=4, epochs=2)
ALLOWED = {"act": {"torch", "numpy"}, "processes": {"torch", "act"}}  # others: anything


def settle(out="runs/run", words="--device=cpu"):
    config = run.parse_flags(run.RunConfig, "", f"--out={out} --size=tiny {words}".split())
    return run.setup(config, {"tiny": dict(epochs=1)})[0]


def test_no_file_imports_a_command_or_at_its_top_what_only_unix_has():
    commands = {path.stem for path in ROOT.glob("*.py")} - {"act", "test_act"}
    for path in list(ROOT.glob("*.py")) + list(ROOT.glob("util/*.py")):
        top = set(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M))
        assert not top & (commands | {"fcntl", "grp", "pwd", "resource", "termios"}), path
        assert top <= ALLOWED.get(path.stem, top) | sys.stdlib_module_names, path


def test_a_bad_flag_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "WORLD", 100)
    monkeypatch.setattr(processes, "LOCAL_RANK", 99)
    words = "epoch=3 size=huge epochs=-1 lr=nan seed=18446744073709551616 device=cuda device=cuda:0"
    for word in words.split():
        with refused("--" + word.split("=")[0]):
            settle(words="--" + word)


def test_set_changes_a_copy_keeps_types_and_refuses_other_names_and_values():
    sizes = act.StudentConfig()
    changed = run.override(sizes, ["depth=3", "drop_path=0"], ["depth", "drop_path"])
    assert changed == act.StudentConfig(depth=3, drop_path=0.0) and sizes.depth == 12
    for pair in "width=3 depth depth=2.5 depth=0 drop_path=1 drop_path=nan".split():
        with refused(f"--set {pair}: expected"):
            run.override(sizes, [pair], ["depth", "drop_path"])


def test_a_home_folder_is_written_out_in_every_flag(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = run.parse_flags(predict.Config, "", ["~/a", "b~", "--out=~/x"])
    assert found == predict.Config(files=["/home/me/a", "b~"], out="/home/me/x")


def test_blocks_are_compiled_on_a_gpu_unless_a_flag_says_otherwise(monkeypatch):
    monkeypatch.setattr(run, "pick_device", torch.device)
    expected = {"cpu": False, "cuda": True, "cpu --compile": True, "cuda --no-compile": False}
    assert {words: settle(words=f"--device {words}").compile for words in expected} == expected


@pytest.mark.parametrize("error, code", [(act.UserError, 2), (RuntimeError, None)])
def test_a_mistake_is_one_line_and_a_bug_a_traceback(error, code, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises((SystemExit, RuntimeError)) as stop:
        run.run_command(mock.Mock(side_effect=error("a:\n b")), run.RunConfig, "")
    assert getattr(stop.value, "code", None) == code
    assert capsys.readouterr().err.count("\n") == (code is not None)


def test_the_rate_warms_up_for_a_tenth_at_most_and_ends_on_a_cosine():
    config = run.RunConfig(steps=1000, lr=1e-3)
    optimizer = torch.optim.SGD([dict(params=[torch.ones(1)], scale=0.1)])
    steps = [(0, 50), (25, 50), (50, 50), (525, 50), (1000, 50), (100, 10_000)]  # step, warmup
    rates = [run.set_lr(optimizer, step, config, 1e-6, warmup) for step, warmup in steps]
    assert rates == pytest.approx([1e-6, 5.005e-4, 1e-3, 5.005e-4, 1e-6, 1e-3])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_weight_decay_spares_vectors_and_tokens_and_frozen_ones_are_left_out():
    student = make("Student")
    student.head.requires_grad_(False)
    found = {}
    for group in run.adamw(student, 1e-3, 0.1, slow=("encoder.",)).param_groups:
        found |= dict.fromkeys(group["params"], (group["scale"], group["weight_decay"]))
    assert set(student.parameters()) - found.keys() == set(student.head.parameters())
    assert found[student.encoder.blocks[0].attn.qkv.weight] == (0.1, 0.1)
    assert found[student.encoder.norm.bias] == (0.1, 0) and found[student.mask_token] == (1, 0)


def test_an_epoch_takes_every_cloud_once_in_an_order_of_its_own_up_to_the_last_step(monkeypatch):
    config = run.plan(replace(CONFIG, steps=3), count=11)
    first, second = [torch.cat(run.epoch_batches(config, 11, epoch)) for epoch in (0, 1)]
    assert len(first.unique()) == 8 and len(second) == 4 and not same(first[:4], second)
    assert same(run.epoch_batches(config, 11, epoch=0, step=1)[0], first[4:])
    monkeypatch.setattr(processes, "WORLD", 2)
    assert run.plan(CONFIG, 3).batch_size == 2
    with refused("--batch-size", "2 processes"):
        run.plan(replace(CONFIG, batch_size=3), 10)


def test_a_new_norm_keeps_the_mean_of_its_steps_and_a_loaded_one_is_left_alone():
    norm = torch.nn.BatchNorm1d(3)
    batches = 1e-3 * randn(4, 20, 3)
    for step, batch in enumerate(batches):
        run.set_momentum(run.new_norms(norm, step), step)
        norm(batch)
    assert torch.allclose(norm.running_var, batches.var(dim=1).mean(dim=0), rtol=1e-4)
    assert run.new_norms(norm, step=3) == []


def test_rows_have_means_of_tensors_the_last_of_numbers_and_null_for_no_number(tmp_path, capsys):
    log = run.Log(tmp_path, run.RunConfig(steps=6, batch_size=1, log_every=1), {})
    log.add(loss=torch.tensor(1.0), lr=0.5, extra=torch.tensor(7.0))
    log.add(extra=torch.tensor(9.0), lr=0.25, loss=torch.tensor(2.0))  # in another order
    log.end_epoch(ap25=math.nan, folds=[1.0, math.inf], absent=None)
    rows = rows_of(tmp_path)
    assert rows[1] == dict(epoch=1, step=2, loss=2.0, lr=0.25, extra=9.0)
    means = dict(epoch=1, step=2, loss_epoch=1.5, lr=0.25, extra=8.0)
    assert rows[2] == means | dict(ap25=None, folds=[1.0, None], absent=None)
    printed = capsys.readouterr().out
    assert "\nwithout a value: ap25\nepoch 1  step 2 of 6" in printed
    assert "left  loss_epoch 1.5  extra 8  lr 0.25\n" in printed
    with refused("step 3", "--lr"):
        log.add(loss=torch.tensor(math.nan))


def begin(out, cloud="cloud", **flags):
    """The Log, model and optimizer of a run of four clouds, which takes a step an epoch."""
    config = run.plan(replace(CONFIG, out=str(out), **flags), 4)
    model = make("Student")
    optimizer = run.adamw(model, 1e-3, 0.1)
    return run.begin(config, model, optimizer, [cloud] * 4)[0], model, optimizer


def end_epoch(begun):
    begun[0].add(loss=torch.tensor(processes.RANK + 1.0))
    begun[0].end_epoch()
    run.save(*begun)


@pytest.mark.parametrize("name", ["", "run", "run/config.json", "run/last.pt", "run/labels.csv"])
def test_no_folder_or_one_with_files_of_others_is_refused_and_stays(tmp_path, name):
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"settings": "of another program"}')
    with refused(f"--out {tmp_path}/data/run: expected", file.name):
        settle(tmp_path / "data/run")
    assert file.read_text() == '{"settings": "of another program"}'


def test_an_earlier_run_alone_is_moved_aside(tmp_path):
    end_epoch(begin(tmp_path))
    for name in ("best.pt", "boxes.ply", "my.ply"):
        (tmp_path / name).touch()
    for _ in range(2):  # within a second, mostly
        begin(tmp_path)
    first, second = [set(os.listdir(folder)) for folder in sorted(tmp_path.glob("earlier-*"))]
    assert second == {"config.json", "metrics.jsonl"}
    assert first == second | {"last.pt", "boxes.ply"}
    assert {"best.pt", "my.ply"} < set(os.listdir(tmp_path))


def test_a_run_is_resumed_where_there_is_one_of_the_same_clouds_and_settings(tmp_path):
    with refused("--resume", "last.pt", tmp_path):
        settle(tmp_path, "--resume")
    end_epoch(begin(tmp_path))
    changes = {"--epochs 2 (--steps 2)": {"epochs": 1}, "lr was None": {"lr": 0.5}}
    for named, flags in (changes | {"the clouds differ": {"cloud": "other"}}).items():
        with refused("last.pt", named):
            begin(tmp_path, resume=True, **flags)


def test_a_folder_in_use_is_refused_and_a_file_system_may_have_no_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    run.open_folder(tmp_path)
    done = python("-c", f"from util import run; run.open_folder({str(tmp_path)!r})")
    assert f"--out {tmp_path}: in use" in done.stderr
    monkeypatch.setattr(fcntl, "lockf", mock.Mock(side_effect=OSError))
    run.open_folder(tmp_path)


FULL_DISK = """
import resource, sys, test_run
begun = test_run.begin(sys.argv[1])
test_run.end_epoch(begun)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
with test_run.refused(sys.argv[3], "File too large"):
    test_run.end_epoch(begun)
"""


@pytest.mark.parametrize("name, room", {"metrics.jsonl": "0", "last.pt": "10000"}.items())
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(name, room, tmp_path):
    pytest.importorskip("resource")
    done = python("-c", FULL_DISK, str(tmp_path), room, f"{tmp_path / name}: ")
    assert done.returncode == 0, done.stderr
    assert checkpoint(tmp_path)["epoch"] == 1


def test_saving_takes_two_percent_of_a_run_but_for_its_first_and_last_epoch(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(act, "save", lambda state, path: saved.append(state["epoch"]))
    begun = begin(tmp_path, epochs=7)
    log = begun[0]
    monkeypatch.setattr(run.time, "monotonic", lambda: log.began + 100 * log.step + 3 * len(saved))
    for _ in range(7):
        end_epoch(begun)
    assert saved == [1, 3, 5, 6, 7]  # at 609 s, four times 3 s are less than 2 %


def begin_in_two_processes(config):
    """Run in two processes, of which one cannot see the other's folder, and fails at last."""
    settle(config.out)
    run.seed_step(0, 7, "cpu")
    with refused("noise"):
        processes.agree(torch.rand(4).tolist(), "noise")
    end_epoch(begin(f"{config.out}/{processes.RANK}"))
    with refused("step", "[1, 0]"):
        begin(f"{config.out}/{processes.RANK}", resume=True)
    if processes.RANK == 1:
        raise act.UserError("of process 1")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun ends process 0, too
    processes.sum_over_processes(torch.ones(1))


def test_two_processes_share_a_batch_and_a_run_but_no_noise_and_end_together(tmp_path):
    code = "import test_run as t; t.run.run_command(t.begin_in_two_processes, t.run.RunConfig, '')"
    done = python(*LAUNCH, "--no-python", sys.executable, "-c", code, f"--out={tmp_path}")
    assert os.listdir(tmp_path) == ["0"], done.stderr
    assert rows_of(tmp_path / "0")[0]["loss_epoch"] == 1.5
    assert done.stdout.count("loss_epoch") == 1 and "RuntimeError" not in done.stderr
    assert "error: of process 1\n" in done.stderr and "error: process 0 lost" in done.stderr
