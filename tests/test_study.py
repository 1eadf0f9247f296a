"""The tables: their statistics, their arms and runs, and what a start again makes."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import common
import study
from common import refused, run_command

STUB = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open("calls.txt", "a") as file:
    file.write(" ".join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]) + chr(10))
if flags.get("--loss") == pathlib.Path("broken").read_text():
    sys.exit("error: no such loss")
row = dict(svm_trained=50 + len(sys.argv), knn_trained=int(flags["--seed"]), accuracy=7.0)
row["best_accuracy"] = 9.0
pathlib.Path(flags["--out"], "metrics.jsonl").write_text(json.dumps(row))
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Commands that only note their flags, in place of those that train: calls() has the notes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py"])
    for name in ("train_teacher.py", "train_student.py", "finetune.py"):
        Path(name).write_text(STUB)
    Path("broken").write_text("none")

    def calls():
        lines = Path("calls.txt").read_text().splitlines()
        Path("calls.txt").write_text("")
        return lines

    return calls


def make(*words):
    run_command(study, *words, "--out", "runs")


# -- statistics -----------------------------------------------------------------------------------
def test_the_spread_of_values_worked_by_hand():
    # 2, 4, 9: mean 5, deviations -3, -1, 4, variance 26 / 2; t of 2 degrees of freedom is 4.3027.
    error = math.sqrt(13 / 3)
    assert study.spread([2.0, 4.0, 9.0]) == pytest.approx(
        (3, 5.0, error, 4.30265 * error), rel=1e-5
    )
    assert study.spread([7.0]) == (1, 7.0, None, None)


def test_differences_are_paired_by_the_seeds_that_both_arms_have():
    difference = study.paired({0: 5.0, 1: 7.0, 3: 1.0}, {0: 4.0, 1: 3.0, 2: 50.0})
    # 1 and 4: mean 2.5, standard error 1.5; t of one degree of freedom is 12.7062.
    assert difference == pytest.approx((2, 2.5, 1.5, 12.7062 * 1.5), rel=1e-5)
    assert study.paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("df", [1, 2, 4, 9, 60])
def test_quantiles_of_t_are_those_of_scipy(df):
    stats = pytest.importorskip("scipy.stats")
    assert study.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-5)


def test_intervals_are_those_of_scipys_paired_test():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    found = study.paired(dict(enumerate(a)), dict(enumerate(b)))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.mean - found.reach, found.mean + found.reach) == pytest.approx((low, high))


# -- arms and runs --------------------------------------------------------------------------------
def test_tables_share_the_teachers_and_students_that_their_arms_have_in_common(stubs):
    make("target", "mask", "decoder", "loss", "--seeds", 1)
    scripts = [line.split()[0] for line in stubs()]
    assert scripts.count("train_teacher") == 1
    # target 4, mask 6, decoder 3, loss 3: the default student is an arm of each.
    assert scripts.count("train_student") == 13
    for table, arm in (("target", "codes"), ("mask", "block 0.8"), ("loss", "L2")):
        values = json.loads(Path("runs", f"{table}.json").read_text())
        assert values[arm]["kNN"] == {"0": 0}
    assert Path("runs/mask/block-0.8/seed0/student/metrics.jsonl").is_file()


def test_a_student_takes_the_teacher_of_its_arm_and_seed_and_coordinates_none(stubs):
    make("prompt", "target", "--seeds", 2)
    lines = stubs()
    students = [line for line in lines if line.startswith("train_student")]
    shallow = [line for line in students if "/shallow/seed1/" in line]
    assert len(shallow) == 1 and "--teacher runs/prompt/shallow/seed1/teacher/last.pt" in shallow[0]
    coordinates = [line for line in students if "coordinates" in line]
    assert len(coordinates) == 2 and not any("--teacher" in line for line in coordinates)


def test_weights_are_the_arms_of_the_teachers_and_settings_reach_all_runs(stubs):
    words = "teacher --weights none a/model.safetensors --data x --transfer y.h5 --seeds 1"
    make(*words.split(), "--teacher-epochs", 3, "--student-epochs", 4)
    lines = stubs()
    teachers = [line for line in lines if line.startswith("train_teacher")]
    assert len(teachers) == 2 and all("--epochs 3" in line for line in teachers)
    assert all("--data x " in line for line in lines if line.startswith("train_"))
    tuned = [line for line in lines if line.startswith("finetune")]
    assert len(tuned) == 4 and all("--data y.h5" in line for line in tuned)
    assert sum("--protocol linear" in line for line in tuned) == 2
    values = json.loads(Path("runs/teacher.json").read_text())
    assert set(values["none"]) == {"linear SVM", "kNN", "y, full", "y, linear"}
    # The best epoch of the best seed stands beside the accuracy of the last.
    assert "| none | 1 | 7.00 |  |  |  | 9.00 |" in Path("runs/teacher.md").read_text()


def test_the_table_of_transfer_fine_tunes_one_student(stubs):
    make("transfer", "--seeds", 1)
    lines = stubs()
    assert [line.split()[0] for line in lines].count("train_student") == 1
    assert sum("--checkpoint none" in line for line in lines) == 1
    assert set(json.loads(Path("runs/transfer.json").read_text())["MLP-3"]) == {"synthetic"}


def test_a_start_again_makes_what_is_missing_and_resumes_what_was_interrupted(stubs):
    make("loss", "--seeds", 1)
    stubs()
    note = Path("runs/loss/L2/seed0/student/study.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"finished": False}))
    make("loss", "decoder", "--seeds", 1)
    lines = stubs()
    assert len(lines) == 3  # L2, and the decoders of 1 and 4 blocks
    assert [line.endswith("--resume") for line in lines] == [True, False, False]


def test_a_failing_run_is_named_and_the_others_go_on(stubs, capsys):
    Path("broken").write_text("l2")
    with pytest.raises(SystemExit) as ended:
        make("loss", "--seeds", 2, "--jobs", 2)
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "runs/loss/L2/seed1/student failed: error: no such loss" in out
    assert "runs/loss/L2/seed0/student" in err and "smooth" not in err
    values = json.loads(Path("runs/loss.json").read_text())
    assert values["L2"] == {} and list(values["cosine"]["kNN"]) == ["0", "1"]


def test_a_run_whose_teacher_failed_is_not_made(stubs):
    Path("train_teacher.py").write_text("raise SystemExit('error: no weights')")
    with pytest.raises(SystemExit):
        make("target", "--seeds", 1)
    assert [line.split()[0] for line in stubs()] == ["train_student"]  # of coordinates


def test_a_table_of_one_arm_has_no_differences(stubs):
    make("teacher", "--weights", "random", "--seeds", 2)
    assert re.search(
        r"\| random \| 2 \| 0.50 ± 0.50 \|  \|  \|  \| 1.00 \|", Path("runs/teacher.md").read_text()
    )


@pytest.mark.parametrize("words", ["colour", "loss --seeds 0", "loss --jobs 0"])
def test_a_table_or_number_that_cannot_be_is_refused(stubs, words):
    with refused(words.split()[-2].strip("-") if "-" in words else words):
        make(*words.split())


def test_the_commands_take_what_a_study_gives_them(shapes, tmp_path):
    flags = "--size tiny --seeds 1 --teacher-epochs 1 --student-epochs 1 --weights none".split()
    words = ["teacher", "--data", shapes, *flags, "--out", tmp_path]
    result = common.python(common.ROOT / "study.py", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    values = json.loads((tmp_path / "teacher.json").read_text())["none"]
    assert len(values) == 2 and all(0 <= value["0"] <= 100 for value in values.values())
