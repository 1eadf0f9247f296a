"""util/run.py: flags, schedules, optimizer, processes, the log and the folder of a run."""

import math
import sys
from dataclasses import replace

import pytest
import torch

import act
from common import python, randn, refused, rows_of, same
from util import run

SIZES = dict(num_group=8, group_size=4, width=32, depth=1, num_heads=1, encoder_dims=32)
SMALL = act.StudentConfig(decoder_depth=1, target_dim=12, drop_path=0.0, **SIZES)
CONFIG = run.RunConfig(batch_size=4, epochs=2)


@pytest.mark.parametrize("words", ["epoch=3", "size=huge", "epochs=-1", "lr=nan", f"seed={2**64}"])
def test_a_bad_flag_is_refused_by_name(words):
    with refused("--" + words.split("=")[0]):
        run.parse_flags(run.RunConfig, "", ["--" + words])


def test_set_changes_a_copy_keeps_types_and_refuses_other_names_and_values():
    names = ["depth", "drop_path"]
    changed = run.override(SMALL, ["depth=3", "drop_path=0"], names)
    assert changed == replace(SMALL, depth=3, drop_path=0.0) and SMALL.depth == 1
    for pair in "width=3 depth depth=2.5 depth=0 drop_path=1 drop_path=nan".split():
        with refused(f"--set {pair}: expected"):
            run.override(SMALL, [pair], names)


ERRORS = {2: act.UserError("a:\n b"), 130: KeyboardInterrupt(), None: ValueError("a bug")}


@pytest.mark.parametrize("code", ERRORS)
def test_a_mistake_is_one_line_and_a_bug_a_traceback(code, capsys, monkeypatch):
    def main(config):
        raise ERRORS[code]

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises((SystemExit, ValueError)) as stop:
        run.run_command(main, run.RunConfig, "")
    assert getattr(stop.value, "code", None) == code
    assert capsys.readouterr().err.count("\n") == (code is not None)


def test_processes_share_the_batch_of_a_step_and_not_the_noise(monkeypatch):
    first = run.seed_step(0, 7, "cpu")
    noise = torch.rand(4)
    monkeypatch.setattr(run, "RANK", 1)
    second = run.seed_step(0, 7, "cpu")
    assert same(first.get_state(), second.get_state()) and not same(noise, torch.rand(4))


def test_the_rate_warms_up_for_a_tenth_at_most_and_ends_on_a_cosine():
    config = run.RunConfig(steps=1000, lr=1e-3)
    optimizer = torch.optim.SGD([dict(params=[torch.ones(1)], scale=0.1)])
    steps = [(0, 50), (25, 50), (50, 50), (525, 50), (1000, 50), (100, 10_000)]  # step, warmup
    rates = [run.set_lr(optimizer, step, config, 1e-6, warmup) for step, warmup in steps]
    assert rates == pytest.approx([1e-6, 5.005e-4, 1e-3, 5.005e-4, 1e-6, 1e-3])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_weight_decay_spares_vectors_and_tokens_and_frozen_ones_are_left_out():
    student = act.Student(SMALL)
    student.head.requires_grad_(False)
    names = {id(p): name for name, p in student.named_parameters()}
    found = {}
    for group in run.adamw(student, 1e-3, 0.1, slow=("encoder.",)).param_groups:
        for p in group["params"]:
            found[names[id(p)]] = (group["scale"], group["weight_decay"])
    assert names.values() - found.keys() == {"head.weight", "head.bias"}
    assert found["encoder.blocks.0.attn.qkv.weight"] == (0.1, 0.1)
    assert found["encoder.norm.bias"] == (0.1, 0) and found["mask_token"] == (1, 0)


def test_an_epoch_takes_every_cloud_once_in_an_order_of_its_own_up_to_the_last_step(monkeypatch):
    config = run.plan(CONFIG, count=11)
    first, second = [run.epoch_batches(config, 11, epoch) for epoch in (0, 1)]
    assert len(torch.cat(first).unique()) == len(torch.cat(second).unique()) == 8
    assert not same(first, second)
    assert same(run.epoch_batches(config, 11, epoch=1, step=3), second[1:])
    config = run.plan(replace(CONFIG, steps=3), count=11)
    assert same(run.epoch_batches(config, 11, epoch=1), second[:1])
    monkeypatch.setattr(run, "WORLD", 2)
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
    norm.num_batches_tracked.fill_(50)
    assert run.new_norms(norm, 4) == []


def test_rows_have_the_means_of_tensors_and_the_last_of_numbers(tmp_path, capsys):
    log = run.Log(tmp_path, run.RunConfig(steps=6, batch_size=1, log_every=1), {})
    log.add(loss=torch.tensor(1.0), lr=0.5, extra=torch.tensor(7.0))
    log.add(extra=torch.tensor(9.0), lr=0.25, loss=torch.tensor(2.0))  # in another order
    log.end_epoch(accuracy=50.0)
    assert rows_of(tmp_path) == [
        dict(epoch=1, step=1, loss=1.0, lr=0.5, extra=7.0),
        dict(epoch=1, step=2, loss=2.0, lr=0.25, extra=9.0),
        dict(epoch=1, step=2, loss_epoch=1.5, lr=0.25, extra=8.0, accuracy=50.0),
    ]
    assert "\nepoch 1  step 2 of 6" in capsys.readouterr().out
    with refused("step 3", "--lr"):
        log.add(loss=torch.tensor(math.nan))


def test_a_folder_that_another_process_uses_is_refused(tmp_path):
    run.open_folder(tmp_path)
    done = python("-c", f"from util import run; run.open_folder({str(tmp_path)!r})")
    assert f"--out {tmp_path}: in use" in done.stderr


def compare_gradients():
    """In one of two processes: `parallel` averages gradients over both, and a log its means."""
    config, _ = run.setup(run.RunConfig(size="tiny", device="cpu"), {"tiny": {}})
    student = act.Student(SMALL).eval()
    patches = randn(4, 8, 4, 3)
    mask = torch.arange(8).expand(4, 8) < 4
    student(patches, patches[:, :, 0], mask).square().mean().backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    patches = patches[run.RANK :: 2]
    net = run.parallel(student, config)
    net(patches, patches[:, :, 0], mask[:2]).square().mean().backward()
    for p, gradient in zip(student.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-6)
    log = run.Log(None, config, {})
    log.add(loss=torch.tensor(run.RANK + 1.0))
    print(log.means(log.steps), flush=True)


def test_two_processes_train_as_the_mean_of_their_gradients(tmp_path):
    (tmp_path / "driver.py").write_text("import test_run\ntest_run.compare_gradients()\n")
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = python(*launch, tmp_path / "driver.py")
    assert done.stdout == "{'loss': 1.5}\n", done.stderr  # only the first process prints
