"""Stage I: schedules, losses, start of the codes, evaluation, and the command."""

from unittest import mock

import pytest
import torch

import act
import train_teacher
from common import SHORT, TEACHER, assert_close, checkpoint, randn, rows_of, run_command
from util import datasets, run, synthetic

CONFIG = train_teacher.Config(points=64)


@pytest.fixture
def teacher(teacher_run):
    return act.load(teacher_run / "last.pt")


def test_schedules_of_a_hundredth_of_the_steps():
    total = train_teacher.PUBLISHED_STEPS / 100
    for share, expected in ((0, 1), (0.5, 0.53125), (1, 0.0625)):
        assert train_teacher.temperature(1000 * share, total) == pytest.approx(expected)
        assert train_teacher.kl_weight(100 + 1000 * share, total) == pytest.approx(0.1 * share)


def test_losses_are_the_reconstruction_and_a_code_term(teacher):
    """I = sum p(patch) q(code | patch) log(q(code | patch) / mean of q(code))."""
    output = teacher(randn(4, 64, 3), hard=True)
    q = output.logits.double().softmax(dim=-1).flatten(0, 1)
    information = (q * (q / q.mean(dim=0)).log()).sum() / len(q)
    loss, reconstruction, kl, weight = train_teacher.published_loss(output, 50, 100)
    assert_close(loss, reconstruction + weight * kl)
    loss = train_teacher.information_loss(output, 50, 100)[0]
    assert_close(loss, (reconstruction - train_teacher.INFORMATION * information).float())


def test_codes_and_statistics_start_as_those_of_patches(shapes):
    teacher = act.Teacher(act.TeacherConfig(8, 8, 16, 16, 16, 16, backbone=None, prompt="none"))
    train = datasets.open_dataset(shapes).train
    train_teacher.start_codes(teacher, train, CONFIG, "cpu")
    xyz, _ = train.sample(torch.linspace(0, 7, 8).long(), 64, run.seeded("cpu", 0, "codes"))
    neighborhood, center = act.group_points(xyz, 8, 8)
    linear, norm = teacher.encoder.first_conv[:2]
    x = linear(neighborhood).flatten(0, 2)
    assert torch.allclose(norm.running_var, x.var(dim=0), rtol=1e-4)
    patch = teacher.eval().encoder(neighborhood).flatten(0, 1)
    patch = (patch - patch.mean(dim=0)) / patch.std(dim=0)
    assert torch.cdist(teacher.codebook, patch).amin(dim=1).max() < 1e-2


def test_a_run_leaves_results_measured_as_by_act(teacher_run, teacher, shapes):
    files = {path.name for path in teacher_run.iterdir()}
    assert {"loss.svg", "reconstruction.png", "reconstruction.ply"} <= files
    rows = rows_of(teacher_run)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 4]
    generator = run.seeded("cpu", 0, "test", 0)
    xyz, _ = datasets.open_dataset(shapes).test.sample(torch.arange(4), 64, generator)
    output = teacher(xyz, hard=True)
    cloud = train_teacher.whole(output.fine, output.center)
    tokens = teacher.codebook[output.logits.argmax(dim=-1)[[2, 3, 0, 1]]]
    other = train_teacher.whole(teacher.decode(tokens, output.center)[1], output.center)
    expected = dict(cd_l1_after=act.chamfer_distance(cloud, xyz))
    expected["cd_l2_after"] = act.chamfer_distance(cloud, xyz, norm=2)
    expected["fscore_after"] = act.fscore(cloud, xyz).mean()
    expected["cd_l1_other"] = act.chamfer_distance(other, xyz)
    for name, value in expected.items():
        assert rows[-1][name] == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("count", [1, 2, 33])
def test_codes_are_swapped_with_another_clouds_or_not_at_all(teacher, count):
    split = synthetic.synthetic_clouds(3, num_points=64).select(range(count))
    with mock.patch.object(teacher, "decode", wraps=teacher.decode) as decode:
        values = train_teacher.evaluate(teacher, split, CONFIG, count, swap_codes=True)
    tokens = [call.args[0] for call in decode.call_args_list]
    assert ("cd_l1_other" in values) == (count > 1)
    for own, swapped in zip(tokens[::2], tokens[1::2], strict=False):
        assert (own != swapped).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("words", ["--init {}/last.pt --codes kl", "--weights none", "--tune full"])
def test_the_backbone_is_frozen_absent_or_trained(tmp_path, shapes, teacher_run, words):
    words = words.format(teacher_run).split()
    flags = SHORT if "--init" in words else TEACHER
    words += ["--data", shapes, "--epochs", 1, "--lr", 0.01, "--out", tmp_path]
    run_command(train_teacher, *flags, *words)
    after = checkpoint(tmp_path)["model"]
    if "none" in words:
        assert not any(name.startswith(("backbone.", "proj_", "visual_")) for name in after)
        return
    for name, value in checkpoint(teacher_run)["model"].items():
        stays = name.startswith("backbone.") and "full" not in words
        assert torch.equal(value, after[name]) == stays, name


def test_missing_public_weights_are_told_in_capitals(monkeypatch, capsys):
    missing = mock.Mock(side_effect=act.UserError("no network"))
    monkeypatch.setattr(train_teacher.weights, "load_pretrained", missing)
    backbone, source = train_teacher.open_backbone("auto", "vit", 64)
    assert (backbone.config.width, source) == (64, "random")
    assert "THE BACKBONE IS RANDOM" in capsys.readouterr().out
