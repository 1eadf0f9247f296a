"""Stage I: schedules, losses, start of the codes, evaluation, and the command as users run it."""

import math
from dataclasses import replace

import pytest
import torch

import act
import train_teacher
from common import SHORT, TEACHER, checkpoint, interrupt, randn, refused, rows_of, run_command, same
from util import datasets, run

CONFIG = replace(train_teacher.Config(), points=64)
CPU = torch.device("cpu")


def train(flags, words, out):
    """Stage I with these flags and words, into the folder `out`."""
    run_command(train_teacher, *flags, *words.split(), "--out", out)


@pytest.fixture
def teacher(teacher_run):
    return act.load(teacher_run / "last.pt")


# -- schedules, losses ----------------------------------------------------------------------------
def test_schedules_at_their_ends_and_middle_and_squeezed_in_a_shorter_run():
    for scale in (1, 0.01):
        total = scale * train_teacher.PUBLISHED_STEPS
        for share, expected in ((0, 1), (0.5, 0.53125), (1, 0.0625)):
            step = scale * 100_000 * share
            assert train_teacher.temperature(step, total) == pytest.approx(expected)
            weight = train_teacher.kl_weight(step + scale * 10_000, total)
            assert weight == pytest.approx(0.1 * share)


def test_information_is_that_of_patch_and_code():
    """I(patch; code) = sum p(patch) q(code | patch) log(q(code | patch) / mean of q(code))."""
    logits = 3 * randn(2, 5, 7)
    q = logits.double().softmax(dim=-1).view(10, 7)
    expected = (q * (q / q.mean(dim=0)).log()).sum() / 10
    assert train_teacher.information(logits).item() == pytest.approx(expected.item(), rel=1e-5)
    certain = 1e4 * torch.eye(8).view(1, 8, 8)  # each patch has a code of its own
    information = train_teacher.information(certain.requires_grad_())
    information.backward()
    assert information.item() == pytest.approx(math.log(8))
    assert certain.grad.isfinite().all()


def test_both_losses_are_the_reconstruction_and_a_term_of_the_codes(teacher, shapes):
    xyz, _ = datasets.open_dataset(shapes).train.sample(torch.arange(4), 64)
    output = teacher(xyz, hard=True)
    loss, reconstruction, kl, weight = train_teacher.published_loss(output, 50, 100)
    assert weight == train_teacher.kl_weight(50, 100) > 0
    assert loss.item() == pytest.approx((reconstruction + weight * kl).item())
    loss = train_teacher.information_loss(output, 50, 100)[0]
    gain = train_teacher.INFORMATION * train_teacher.information(output.logits)
    assert loss.item() == pytest.approx((reconstruction - gain).item())


# -- start of the codes ---------------------------------------------------------------------------
def test_codes_start_as_standardised_features_and_rows_without_the_mean():
    patch = 5 * randn(30, 4) + 3
    codes = train_teacher.start_codebook(patch, torch.tensor([7, 2]))
    expected = (patch[[7, 2]] - patch.mean(dim=0)) / patch.std(dim=0)
    assert torch.allclose(codes, expected, atol=1e-4)
    rows = train_teacher.start_rows(patch, torch.tensor([7, 2, 9]))
    assert torch.allclose(rows.norm(dim=1), torch.ones(3))
    assert torch.allclose(rows @ patch.mean(dim=0), torch.zeros(3), atol=1e-5)
    assert ((patch[[7, 2, 9]] - patch.mean(dim=0)) * rows).sum(dim=1).min() > 0


def test_the_untrained_encoder_starts_with_the_statistics_of_patches(shapes):
    config = run.parse_flags(train_teacher.Config, "", TEACHER)
    teacher = train_teacher.build_teacher(replace(config, size="tiny"), CPU)
    train = datasets.open_dataset(shapes).train
    train_teacher.start_codes(teacher, train, CONFIG, CPU)
    xyz, _ = train.sample(torch.linspace(0, 7, 8).long(), 64, run.seeded("cpu", 0, "codes"))
    neighborhood, center = act.group_points(xyz, 8, 8)
    linear, norm = teacher.encoder.first_conv[:2]
    x = linear(neighborhood).flatten(0, 2)
    assert torch.allclose(norm.running_mean, x.mean(dim=0), atol=1e-5)
    assert torch.allclose(norm.running_var, x.var(dim=0), rtol=1e-4)
    codes = teacher.eval().tokenize(neighborhood, center)
    assert len(codes.unique()) >= 8  # of 16


# -- evaluation -----------------------------------------------------------------------------------
def test_one_search_of_the_nearest_points_gives_all_three_figures():
    cloud = 0.05 * randn(3, 40, 3)
    xyz = 0.05 * randn(3, 50, 3, seed=1)
    metrics = train_teacher.compare(cloud, xyz)
    cd_l1 = act.chamfer_distance(cloud, xyz)
    cd_l2 = act.chamfer_distance(cloud, xyz, norm=2)
    expected = [cd_l1.item(), cd_l2.item(), act.fscore(cloud, xyz).mean().item()]
    assert [value.item() for value in metrics.values()] == pytest.approx(expected)


def test_reconstruction_with_the_codes_of_the_cloud_half_a_batch_away(teacher, shapes):
    test = datasets.open_dataset(shapes).test
    metrics = train_teacher.evaluate(teacher, test, CONFIG, 4, swap_codes=True)
    xyz, _ = test.sample(torch.arange(4), 64, run.seeded("cpu", 0, "test", 0))
    neighborhood, center = act.group_points(xyz, 8, 8)
    tokens = teacher.codebook[teacher.tokenize(neighborhood, center)[[2, 3, 0, 1]]]
    _, fine = teacher.decode(tokens, center)
    expected = act.chamfer_distance(train_teacher.whole(fine, center), xyz).item()
    assert metrics["cd_l1_other"] == pytest.approx(expected)
    assert metrics["cd_l1_other"] != metrics["cd_l1"]


def test_a_collapsed_codebook_is_warned_of(capsys):
    metrics = train_teacher.code_metrics(torch.tensor([5.0, 5, 5, 5]))
    assert metrics == dict(perplexity=pytest.approx(4), codes_used=4)
    assert "collapsed" not in capsys.readouterr().out
    assert train_teacher.code_metrics(torch.tensor([9.0, 0, 0, 0]))["codes_used"] == 1
    assert "collapsed" in capsys.readouterr().out


# -- the command ----------------------------------------------------------------------------------
def test_a_run_leaves_its_results_and_saves_what_it_measured(teacher_run, teacher, shapes):
    files = {path.name for path in teacher_run.iterdir()}
    assert {"loss.svg", "reconstruction.png", "reconstruction.ply", "config.json"} <= files
    rows = rows_of(teacher_run)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 4]
    keys = {"reconstruction", "kl", "grad_norm", "lr", "temperature", "kl_weight"}
    assert all(keys <= row.keys() for row in rows[:-1])
    test = datasets.open_dataset(shapes).test
    for name, value in train_teacher.evaluate(teacher, test, CONFIG, 256).items():
        assert rows[-1][f"{name}_after"] == pytest.approx(value, rel=1e-5)
    assert rows[-2]["cd_l1"] == rows[-1]["cd_l1_after"]
    groups = checkpoint(teacher_run)["optimizer"]["param_groups"]
    assert {group["scale"] for group in groups} == {1, 0.1}  # the latter of the tokenizer


def test_a_run_with_kl_from_init_trains_all_but_the_backbone(tmp_path, shapes, teacher_run):
    flags = SHORT + ["--data", shapes, "--init", teacher_run / "last.pt"]
    train(flags, "--epochs 1 --codes kl --lr 0.01", tmp_path)
    before = checkpoint(teacher_run)
    after = checkpoint(tmp_path)
    assert before["config"] == after["config"]
    for name, value in before["model"].items():
        fixed = name.startswith("backbone.")
        assert torch.equal(value, after["model"][name]) == fixed, name
    assert {group["scale"] for group in after["optimizer"]["param_groups"]} == {1}
    assert rows_of(tmp_path)[0]["kl_weight"] > rows_of(teacher_run)[0]["kl_weight"] == 0
    config = replace(CONFIG, init=teacher_run / "last.pt")
    assert same(before["model"], dict(train_teacher.build_teacher(config, CPU).state_dict()))


MISTAKES = {  # words -> what the message names
    "--set num_prompt=few": "num_prompt",
    "--set tokens_dims=8": "tokens_dims",
    "--points 7": "--points",
    "--weights vit_of_nobody": "vit_of_nobody",
    "--data absent": "absent",
    "--init absent.pt --prompt none": "--init",
}


def test_a_mistake_is_one_line_and_leaves_no_folder(tmp_path, shapes):
    for words, named in MISTAKES.items():
        with refused(named):
            train(TEACHER + ["--data", shapes], words, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_missing_public_weights_are_told_in_capitals(monkeypatch, capsys):
    def missing(name):
        raise act.UserError(f"{name}: no network")

    monkeypatch.setattr(train_teacher.weights, "load_pretrained", missing)
    backbone, source = train_teacher.open_backbone("auto", "vit", 64)
    assert (backbone.config.width, source) == (64, "random")
    assert "THE BACKBONE IS RANDOM. vit: no network" in capsys.readouterr().out


def test_a_run_cut_in_mid_epoch_resumes_to_the_same_bits(tmp_path, shapes, teacher_run):
    flags = TEACHER + ["--data", shapes, "--epochs", 2, "--log-every", 1]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, "add", interrupt(3))
        train(flags, "", tmp_path)
    assert checkpoint(tmp_path)["step"] == 2
    train(flags, "--resume", tmp_path)
    expected = checkpoint(teacher_run)  # not interrupted
    resumed = checkpoint(tmp_path)
    for part in ("model", "optimizer", "epoch", "step", "random"):
        assert same(expected[part], resumed[part]), part
    assert rows_of(teacher_run) == rows_of(tmp_path)
