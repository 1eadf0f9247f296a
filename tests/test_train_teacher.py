"""Stage I: schedules, losses, start of the codes, evaluation, and the command as users run it."""

from dataclasses import replace

import pytest
import torch

import act
import train_teacher
from common import SHORT, TEACHER, checkpoint, randn, refused, rows_of, run_command
from util import datasets, run

CONFIG = replace(train_teacher.Config(), points=64)
CPU = torch.device("cpu")


def train(flags, words, out):
    """Stage I with these flags and words, into the folder `out`."""
    run_command(train_teacher, *flags, *words.split(), "--out", out)


@pytest.fixture
def teacher(teacher_run):
    return act.load(teacher_run / "last.pt")


def test_schedules_at_their_ends_and_middle_and_squeezed_in_a_shorter_run():
    for scale in (1, 0.01):
        total = scale * train_teacher.PUBLISHED_STEPS
        for share, expected in ((0, 1), (0.5, 0.53125), (1, 0.0625)):
            step = scale * 100_000 * share
            assert train_teacher.temperature(step, total) == pytest.approx(expected)
            weight = train_teacher.kl_weight(step + scale * 10_000, total)
            assert weight == pytest.approx(0.1 * share)


def test_information_is_that_of_patch_and_code():
    """I = sum p(patch) q(code | patch) log(q(code | patch) / mean of q(code))."""
    logits = 3 * randn(2, 5, 7)
    q = logits.double().softmax(dim=-1).view(10, 7)
    expected = (q * (q / q.mean(dim=0)).log()).sum() / 10
    assert train_teacher.information(logits).item() == pytest.approx(expected.item(), rel=1e-5)
    certain = (1e4 * torch.eye(8).view(1, 8, 8)).requires_grad_()  # a code for each patch
    train_teacher.information(certain).backward()
    assert certain.grad.isfinite().all()


def test_both_losses_are_the_reconstruction_and_a_term_of_the_codes(teacher, shapes):
    xyz, _ = datasets.open_dataset(shapes).train.sample(torch.arange(4), 64)
    output = teacher(xyz, hard=True)
    loss, reconstruction, kl, weight = train_teacher.published_loss(output, 50, 100)
    assert weight == train_teacher.kl_weight(50, 100) > 0
    assert loss.item() == pytest.approx((reconstruction + weight * kl).item())
    gain = train_teacher.INFORMATION * train_teacher.information(output.logits)
    loss = train_teacher.information_loss(output, 50, 100)[0]
    assert loss.item() == pytest.approx((reconstruction - gain).item())


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
    assert torch.allclose(norm.running_var, x.var(dim=0), rtol=1e-4)
    assert len(teacher.eval().tokenize(neighborhood, center).unique()) >= 8  # of 16 codes


def test_reconstruction_with_the_codes_of_the_cloud_half_a_batch_away(teacher, shapes):
    test = datasets.open_dataset(shapes).test
    metrics = train_teacher.evaluate(teacher, test, CONFIG, 4, swap_codes=True)
    xyz, _ = test.sample(torch.arange(4), 64, run.seeded("cpu", 0, "test", 0))
    neighborhood, center = act.group_points(xyz, 8, 8)
    tokens = teacher.codebook[teacher.tokenize(neighborhood, center)[[2, 3, 0, 1]]]
    _, fine = teacher.decode(tokens, center)
    expected = act.chamfer_distance(train_teacher.whole(fine, center), xyz).item()
    assert metrics["cd_l1_other"] == pytest.approx(expected) != metrics["cd_l1"]


def test_a_run_leaves_its_results_and_saves_what_it_measured(teacher_run, teacher, shapes):
    files = {path.name for path in teacher_run.iterdir()}
    assert {"loss.svg", "reconstruction.png", "reconstruction.ply", "config.json"} <= files
    rows = rows_of(teacher_run)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 4]
    assert {"reconstruction", "kl", "lr", "temperature", "kl_weight"} <= rows[0].keys()
    test = datasets.open_dataset(shapes).test
    for name, value in train_teacher.evaluate(teacher, test, CONFIG, 256).items():
        assert rows[-1][f"{name}_after"] == pytest.approx(value, rel=1e-5)
    assert rows[-2]["cd_l1"] == rows[-1]["cd_l1_after"]


def test_a_run_with_kl_from_init_trains_all_but_the_backbone(tmp_path, shapes, teacher_run):
    flags = SHORT + ["--data", shapes, "--init", teacher_run / "last.pt"]
    train(flags, "--epochs 1 --codes kl --lr 0.01", tmp_path)
    before, after = [checkpoint(folder) for folder in (teacher_run, tmp_path)]
    assert before["config"] == after["config"]
    for name, value in before["model"].items():
        assert torch.equal(value, after["model"][name]) == name.startswith("backbone."), name
    assert {group["scale"] for group in before["optimizer"]["param_groups"]} == {1, 0.1}
    assert rows_of(tmp_path)[0]["kl_weight"] > rows_of(teacher_run)[0]["kl_weight"] == 0


@pytest.mark.parametrize("words", ["--weights none", "--tune full"])
def test_a_backbone_is_absent_or_trained_where_asked(tmp_path, shapes, teacher_run, words):
    train(TEACHER + ["--data", shapes], f"{words} --epochs 1", tmp_path)
    frozen, found = [checkpoint(folder)["model"] for folder in (teacher_run, tmp_path)]
    extra = {"backbone", "proj_pre", "proj_post", "visual_pos_embed", "visual_prompt_token"}
    extra |= {"visual_prompt_pos", "deep_prompt_tokens", "deep_prompt_pos"}
    if words == "--weights none":
        assert {name.split(".")[0] for name in frozen.keys() - found.keys()} == extra
        return
    assert frozen.keys() == found.keys()
    name = "backbone.blocks.11.attn.qkv.weight"
    assert 0 < (frozen[name] - found[name]).abs().max() < 1e-2


MISTAKES = {  # words -> what the message names
    "--set tokens_dims=8": "tokens_dims",
    "--points 7": "--points",
    "--weights vit_of_nobody": "vit_of_nobody",
    "--weights none --tune full": "--tune",
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
    assert "THE BACKBONE IS RANDOM: the weights vit" in capsys.readouterr().out
