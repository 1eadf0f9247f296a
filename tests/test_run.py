"""util/run.py: flags, schedules, optimizer, processes, the log and the folder of a run."""

import io
import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

import act
from common import checkpoint, python, randn, refused, rows_of, same
from util import run

SIZES = dict(num_group=8, group_size=4, width=32, depth=1, num_heads=1, encoder_dims=32)
SMALL = act.StudentConfig(decoder_depth=1, target_dim=12, drop_path=0.0, **SIZES)


@dataclass
class Config(run.RunConfig):
    files: list = run.flag((), "files", kind="positional")
    set: list = run.flag((), "NAME=VALUE")
    mask: str = run.flag("random", "which", "random", choices=("random", "block"))
    weight_decay: float = run.flag(0.05, "weight decay, 5 %", 0.05)


def parse(words):
    return run.parse_flags(Config, "", words.split())


def test_flags_have_types_may_have_underscores_and_lists_add_up():
    words = "a b --lr 1e-3 --batch_size=3 --mask block --resume --set depth=3 a_b=2 --set width=0"
    expected = Config(files=["a", "b"], lr=1e-3, batch_size=3, mask="block", resume=True)
    assert parse(words) == replace(expected, set=["depth=3", "a_b=2", "width=0"])


def test_a_bad_flag_is_refused_by_name():
    words = "--epoch=3 --epochs=many --size=huge --epochs=-1 --lr=nan --lr=inf --mask=x".split()
    for word in words + ["--seed=99999999999999999999", "--steps=0 --epochs=3"]:
        with refused(word.split("=")[0]):
            parse("file " + word)


def test_set_changes_a_copy_keeps_types_and_refuses_other_names_and_values():
    sizes = act.StudentConfig()
    changed = run.override(sizes, ["depth=3", "drop_path=0"], ["depth", "drop_path"])
    assert changed == replace(act.StudentConfig(), depth=3, drop_path=0.0) and sizes.depth == 12
    whole = "depth depth=few depth=2.5 depth=-1 depth=0 depth=99999999999".split()
    rates = "drop_path=x drop_path=1 drop_path=nan drop_path=-0.1".split()
    wrong = dict.fromkeys(whole, "whole number") | dict.fromkeys(rates, "rate")
    wrong["width=3"] = "depth, drop_path"
    for pair, words in wrong.items():
        with refused(f"--set {pair}: expected", words):
            run.override(sizes, [pair], ["depth", "drop_path"])


def test_help_says_what_each_size_takes_by_itself(capsys, monkeypatch):
    presets = {"classify": {"tiny": dict(epochs=7, batch_size=32)}, "svm": {"base": dict(lr=1e-4)}}
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        run.run_command(None, Config, "What it does.", presets)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "classify tiny --epochs 7 --batch-size 32" in lines and "svm base --lr 0.0001" in lines
    assert any("seed of everything random (default: 0)" in line for line in lines)


def test_names_that_a_console_cannot_show_are_escaped(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["command"])
    run.run_command(lambda config: print("Stühle 椅子 \udcff"), run.RunConfig, "")
    assert console.buffer.getvalue() == b"St\xfchle \\u6905\\u5b50 \\udcff\n"


MISTAKES = [(act.UserError("a:\n b"), 2, 1), (KeyboardInterrupt(), 130, 1)]  # code, lines
MISTAKES += [(BrokenPipeError(), 141, 0), (ValueError("a bug"), None, 0)]


@pytest.mark.parametrize("error, code, lines", MISTAKES)
def test_a_mistake_is_one_line_and_a_bug_a_traceback(error, code, lines, capsys, monkeypatch):
    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(run.os, "dup2", lambda old, new: None)
    with pytest.raises((SystemExit, ValueError)) as stop:
        run.run_command(main, run.RunConfig, "")
    assert getattr(stop.value, "code", None) == code
    assert capsys.readouterr().err.count("\n") == lines


def test_a_size_settles_the_flags_that_are_not_given():
    presets = {"small": dict(epochs=5, lr=0.1, points=99, width=384)}
    given = run.RunConfig(size="small", lr=0.5, device="cpu", precision="fp32")
    config, _ = run.setup(given, presets)
    assert config == replace(given, epochs=5, points=99)
    with refused("--device", "cuda:99"):
        run.setup(replace(given, device="cuda:99"), presets)


@pytest.mark.parametrize("data, out", [("a", "a/b"), ("a/b", "a"), ("a", "a"), (".", "runs/x")])
def test_results_inside_the_data_or_data_inside_the_results_are_refused(data, out):
    with refused("--out", out, "--data", data):
        run.setup(run.RunConfig(data=data, out=out), {})
    run.check_apart("synthetic", ".")
    run.check_apart("a/b", "a/bc")


def test_a_step_draws_from_seed_and_step_alone(monkeypatch):
    def draws(seed, step):
        generator = run.seed_step(seed, step, "cpu")
        return torch.rand(4).tolist(), torch.rand(4, generator=generator).tolist()

    noise, batch = draws(0, 7)
    assert draws(0, 7)[0] == noise != draws(1, 7)[0] and draws(0, 8)[1] != batch
    monkeypatch.setattr(run, "RANK", 1)  # processes share the batch and not the noise
    assert draws(0, 7)[0] != noise and draws(0, 7)[1] == batch


def test_the_rate_warms_up_for_a_tenth_at_most_and_ends_on_a_cosine():
    config = run.RunConfig(steps=1000, lr=1e-3)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    optimizer = run.adamw(model, 1.0, 0.1, slow=("0.",))

    def rate(step, warmup=50):
        return run.set_lr(optimizer, step, config, end=1e-6, warmup=warmup)

    rates = [rate(step) for step in (0, 25, 50, 525, 1000)]
    assert rates == pytest.approx([1e-6, 5.005e-4, 1e-3, 5.005e-4, 1e-6])
    assert rate(100, warmup=10_000) == pytest.approx(1e-3)
    rates = {id(group["params"][0]): group["lr"] for group in optimizer.param_groups}
    assert rates[id(model[0].weight)] == pytest.approx(1e-4)


def test_weight_decay_spares_vectors_tokens_and_what_is_frozen(teacher_run):
    teacher = act.load(teacher_run / "last.pt")
    names = {id(p): name for name, p in teacher.named_parameters()}
    groups = run.adamw(teacher, 1e-3, 0.1).param_groups
    decayed, spared = [{names[id(p)] for p in group["params"]} for group in groups]
    assert {"codebook", "deep_prompt_pos", "proj_pre.weight"} <= decayed
    assert {"visual_prompt_token", "deep_prompt_tokens", "proj_pre.bias"} <= spared
    assert not any(name.startswith("backbone.") for name in decayed | spared)


def test_an_epoch_takes_every_cloud_once_in_an_order_of_its_own_up_to_the_last_step():
    config = run.plan(run.RunConfig(batch_size=4, epochs=2), count=11)
    assert (config.steps, config.epochs, config.batch_size) == (4, 2, 4)
    first, second = [run.epoch_batches(config, 11, epoch) for epoch in (0, 1)]
    assert len(torch.cat(first).unique()) == len(torch.cat(second).unique()) == 8
    assert not same(first, second)
    assert same(run.epoch_batches(config, 11, epoch=1, step=3), second[1:])
    config = run.plan(run.RunConfig(batch_size=4, steps=3, epochs=9), count=11)
    assert len(run.epoch_batches(config, 11, epoch=1)) == 1
    assert run.plan(run.RunConfig(batch_size=4, steps=0, epochs=9), count=11).epochs == 0


def test_a_batch_is_a_multiple_of_the_processes_and_at_most_all_clouds(monkeypatch):
    assert run.plan(run.RunConfig(batch_size=64, epochs=1), 3).batch_size == 3
    with refused("--batch-size 0: expected 1 or more"):
        run.plan(run.RunConfig(batch_size=0, epochs=1), 3)
    monkeypatch.setattr(run, "WORLD", 2)
    assert run.plan(run.RunConfig(batch_size=4, epochs=1), 3).batch_size == 2
    for batch_size, count in ((3, 10), (4, 1)):
        with refused("--batch-size", "2 processes"):
            run.plan(run.RunConfig(batch_size=batch_size, epochs=1), count)


def test_a_new_norm_keeps_the_mean_of_its_steps_and_a_loaded_one_moves_by_a_tenth():
    model = torch.nn.ModuleList([torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)])
    new, loaded = model
    loaded.num_batches_tracked.fill_(50)
    norms = run.new_norms(model, 0)
    batches = 1e-3 * randn(4, 20, 3)
    expected = torch.ones(3)
    for step, batch in enumerate(batches):
        run.set_momentum(norms, step)
        for norm in model:
            norm(batch)
        expected = 0.9 * expected + 0.1 * batch.var(dim=0)
    assert torch.allclose(new.running_var, batches.var(dim=1).mean(dim=0), rtol=1e-4)
    assert torch.allclose(loaded.running_var, expected)
    assert run.new_norms(model, 4) == [new]  # of a resumed run


def begin(folder, names=("a", "b"), **settings):
    """(log, state, student, optimizer) of a run on clouds of these identities."""
    config = run.RunConfig(steps=6, epochs=3, batch_size=1, lr=1e-3, out=str(folder), **settings)
    torch.manual_seed(0)
    student = act.Student(SMALL)
    optimizer = run.adamw(student, 1e-3, 0.0)
    return run.begin(config, student, optimizer, list(names)) + (student, optimizer)


@pytest.fixture
def finished(tmp_path):
    log, _, student, optimizer = begin(tmp_path)
    log.add(loss=torch.tensor(1.0))
    log.end_epoch()
    run.save(log, student, optimizer, before=7)
    return log


def contents(folder):
    return [(folder / name).read_bytes() for name in ("last.pt", "metrics.jsonl", "config.json")]


def test_rows_have_the_means_of_tensors_and_the_last_of_numbers(tmp_path):
    log, _, _, _ = begin(tmp_path, log_every=2)
    for value in (1.0, 2.0, 6.0):
        log.add(loss=torch.tensor(value), lr=value)
    log.end_epoch(accuracy=50.0)
    log.add(loss=torch.tensor(1.0), lr=0.5, extra=torch.tensor(7.0))
    log.add(extra=torch.tensor(9.0), lr=0.25, loss=torch.tensor(2.0))  # in another order
    log.end_epoch(table=[1, 2])
    assert rows_of(tmp_path) == [
        dict(epoch=1, step=2, loss=1.5, lr=2.0),  # since the row before
        dict(epoch=1, step=3, loss_epoch=3.0, lr=6.0, accuracy=50.0),  # of the epoch
        dict(epoch=2, step=4, loss=1.0, lr=0.5, extra=7.0),
        dict(epoch=2, step=5, loss_epoch=1.5, lr=0.25, extra=8.0, table=[1, 2]),
    ]


def test_a_step_is_printed_once_where_every_step_is_logged(tmp_path, capsys):
    log, _, _, _ = begin(tmp_path, log_every=1)
    for _ in range(2):
        log.add(loss=torch.tensor(1.0))
    log.end_epoch(accuracy=50.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("step 2 of 6") for line in lines] == [0, 1, 0]
    assert lines[2] == "epoch 1  loss_epoch 1  accuracy 50"


def test_adding_a_step_reads_no_value_on_the_host(tmp_path):
    log, _, _, _ = begin(tmp_path)
    log.add(loss=torch.ones((), device="meta"), lr=0.1)  # Meta tensors have no value.
    with pytest.raises(NotImplementedError):
        log.end_epoch()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(tmp_path, finished):
    before = contents(tmp_path)
    finished.add(loss=torch.tensor(math.nan))
    with refused("step 2", "--lr"):
        finished.end_epoch()
    assert contents(tmp_path) == before


def test_an_earlier_run_is_moved_aside_and_other_files_are_not(tmp_path, finished):
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    begin(tmp_path)
    assert contents(next(tmp_path.glob("earlier-*"))) == before
    assert not (tmp_path / "last.pt").exists() and (tmp_path / "notes.txt").exists()


def test_a_folder_that_another_process_uses_or_none_is_refused(tmp_path):
    lock = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
    words = [sys.executable, "-c", lock + "print(flush=True); input()", str(tmp_path / ".lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as other:
        other.stdout.readline()
        with refused("--out", tmp_path, "another run"):
            begin(tmp_path)
        other.communicate("\n")


def test_a_run_resumes_with_its_rows_and_its_checkpoint_if_settings_agree(tmp_path, finished):
    before = contents(tmp_path)
    with refused("last.pt", "seed was 0, is 3"):
        begin(tmp_path, resume=True, seed=3)
    with refused("last.pt: the clouds differ"):
        begin(tmp_path, ["a", "changed"], resume=True)
    assert contents(tmp_path) == before
    log, state, student, _ = begin(tmp_path, resume=True)
    assert (log.step, log.epoch, state["before"]) == (1, 0, 7)  # of two steps in an epoch
    assert same(dict(student.state_dict()), dict(checkpoint(tmp_path)["model"]))
    assert len(rows_of(tmp_path)) == 1


def compare_gradients():
    """In one of two processes: those of `parallel` are the mean of both shares' gradients."""
    config = run.RunConfig(size="tiny", device="cpu", precision="fp32")
    config, _ = run.setup(config, {"tiny": {}})
    student = act.Student(SMALL).train()
    patches = randn(4, 8, 4, 3)

    def gradients(model, rank):
        share = slice(rank, None, 2)
        mask = torch.arange(8).expand(2, 8) < 4
        student.zero_grad()
        model(patches[share], patches[share, :, 0], mask).square().mean().backward()
        return [p.grad.clone() for p in student.parameters()]

    shares = [gradients(student, rank) for rank in (0, 1)]
    found = gradients(run.parallel(student, config), run.RANK)
    for gradient, first, second in zip(found, *shares, strict=True):
        assert torch.allclose(gradient, (first + second) / 2, atol=1e-6)
    log = run.Log(None, config, {})
    log.add(loss=torch.tensor(run.RANK + 1.0))
    print(log.means(log.steps), flush=True)


def test_two_processes_train_as_the_mean_of_their_gradients(tmp_path):
    (tmp_path / "driver.py").write_text("import test_run\ntest_run.compare_gradients()\n")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = python(*launch, tmp_path / "driver.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{'loss': 1.5}\n"  # only the first process prints
