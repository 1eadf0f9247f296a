"""The tables: their statistics, their arms and runs, and what a start again makes."""

import json
import math
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
if pathlib.Path("broken").read_text() in sys.argv:
    sys.exit("error: no such loss")
row = dict(svm_trained=50 + len(sys.argv), knn_trained=int(flags["--seed"]), accuracy=7.0)
row["best_accuracy"] = 9.0
pathlib.Path(flags["--out"], "metrics.jsonl").write_text(json.dumps(row))
"""


@pytest.fixture(autouse=True)
def stubs(tmp_path, monkeypatch):
    """Commands that only note their flags, in place of those that train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py"])
    for name in ("train_teacher.py", "train_student.py", "finetune.py"):
        Path(name).write_text(STUB)
    Path("broken").write_text("nothing")


def make(words):
    """Runs a study of the stubs -> the command lines it gave them since the last one."""
    Path("calls.txt").write_text("")
    run_command(study, *words.split(), "--out", "runs")
    return Path("calls.txt").read_text().splitlines()


def having(lines, *words):
    """The command lines that hold all these words."""
    return [line for line in lines if all(word in line for word in words)]


def values_of(table):
    return json.loads(Path("runs", f"{table}.json").read_text())


# -- statistics -----------------------------------------------------------------------------------
def test_the_spread_of_values_and_of_paired_differences_worked_by_hand():
    # 2, 4, 9: mean 5, deviations -3, -1, 4, variance 26 / 2; t of 2 degrees of freedom is 4.30265.
    error = math.sqrt(13 / 3)
    expected = pytest.approx((5.0, error, 4.30265 * error), rel=1e-5)
    assert study.spread([2.0, 4.0, 9.0]) == expected
    assert study.spread([7.0]) == (7.0, None, None)
    assert study.paired({0: 5.0, 1: 7.0, 3: 1.0}, {0: 4.0, 1: 3.0, 2: 50.0}) == [1.0, 4.0]


@pytest.mark.parametrize("n", [2, 3, 5, 10, 61])
def test_intervals_are_those_of_scipys_paired_test(n):
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).normal(size=(2, n))
    mean, _, reach = study.spread(study.paired(dict(enumerate(a)), dict(enumerate(b))))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - reach, mean + reach) == pytest.approx((low, high), rel=1e-5)


# -- arms and runs --------------------------------------------------------------------------------
def test_tables_share_the_teachers_and_students_that_their_arms_have_in_common():
    lines = make("target mask decoder loss --seeds 1")
    # target 4, mask 6, decoder 3, loss 3: the default student is an arm of each.
    assert len(having(lines, "train_teacher")) == 1 and len(having(lines, "train_student")) == 13
    for table, arm in (("target", "codes"), ("mask", "block 0.8"), ("loss", "L2")):
        assert values_of(table)[arm]["kNN"] == {"0": 0}
    assert Path("runs/mask/block-0.8/seed0/student/metrics.jsonl").is_file()


def test_a_student_takes_the_teacher_of_its_arm_and_seed_and_coordinates_none():
    lines = make("prompt target --seeds 2")
    (line,) = having(lines, "train_student", "/shallow/seed1/")
    assert "--teacher runs/prompt/shallow/seed1/teacher/last.pt" in line
    lines = having(lines, "coordinates")
    assert len(lines) == 2 and not having(lines, "--teacher")


def test_weights_are_the_arms_of_the_teachers_and_settings_reach_all_runs():
    words = "teacher --weights none a/model.safetensors --data x --transfer y --seeds 1"
    lines = make(f"{words} --teacher-epochs 3 --student-epochs 4")
    assert len(having(lines, "train_teacher", "--data x", "--epochs 3")) == 2
    assert len(having(lines, "train_student", "--data x", "--epochs 4")) == 2
    assert len(having(lines, "finetune", "--data y")) == 4
    assert len(having(lines, "finetune", "--protocol linear")) == 2
    assert values_of("teacher")["none"].keys() == {"linear SVM", "kNN", "y, full", "y, linear"}
    # The best epoch of the best seed stands beside the accuracy of the last.
    assert "| none | 1 | 7.00 |  |  |  | 9.00 |" in Path("runs/teacher.md").read_text()


def test_the_table_of_transfer_fine_tunes_one_student():
    lines = make("transfer --seeds 1")
    assert len(having(lines, "train_student")) == 1
    assert len(having(lines, "--checkpoint none")) == 1
    assert values_of("transfer")["MLP-3"].keys() == {"synthetic"}


def test_a_table_of_one_arm_has_no_differences():
    make("teacher --weights random --seeds 2")
    text = Path("runs/teacher.md").read_text()
    assert "| random | 2 | 0.50 ± 0.50 |  |  |  | 1.00 |" in text


# -- another start, failures ----------------------------------------------------------------------
def test_a_start_again_makes_what_is_missing_and_resumes_what_was_interrupted():
    make("loss --seeds 1")
    note = Path("runs/loss/L2/seed0/student/study.json")
    note.write_text(note.read_text().replace("true", "false"))
    lines = make("loss decoder --seeds 1")
    assert len(lines) == 3  # L2, and the decoders of 1 and 4 blocks
    assert having(lines, "--resume") == having(lines, "--loss l2")


def test_runs_of_two_starts_with_other_weights_never_share_a_folder():
    make("loss --weights a --seeds 1")
    lines = make("loss teacher --weights b a --seeds 1")
    # New are all runs of b, and those of a whose folders the table loss takes now.
    assert len(lines) == 6 and len({line.split()[2] for line in lines}) == 6


def test_a_failing_run_is_named_and_the_others_go_on(capsys):
    Path("broken").write_text("l2")
    with pytest.raises(SystemExit) as ended:
        make("loss --seeds 2 --jobs 2")
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "runs/loss/L2/seed1/student failed with code 1: error: no such loss" in out
    assert "runs/loss/L2/seed0/student" in err and "smooth" not in err
    assert values_of("loss")["L2"] == {} and values_of("loss")["cosine"]["kNN"].keys() == {"0", "1"}


def test_a_run_whose_teacher_was_killed_without_a_word_is_not_made(capsys):
    Path("train_teacher.py").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(SystemExit):
        make("target --seeds 1")
    assert "teacher failed with code -9" in capsys.readouterr().out
    (line,) = Path("calls.txt").read_text().splitlines()
    assert "--target coordinates" in line


WRONG = {
    "colour": "colour",
    "loss --seeds 0": "seeds",
    "loss --jobs 0": "jobs",
    "loss --transfer a/scans.h5 b/scans.h5": "b/scans.h5",
}


@pytest.mark.parametrize("words, named", WRONG.items())
def test_tables_numbers_and_files_that_make_no_study_are_refused(words, named):
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "scans.h5").touch()
    with refused(named):
        make(words)


def test_the_commands_take_what_a_study_gives_them(shapes, tmp_path):
    flags = "--size tiny --seeds 1 --teacher-epochs 1 --student-epochs 1 --weights none".split()
    words = ["teacher", "--data", shapes, *flags, "--out", tmp_path]
    result = common.python(common.ROOT / "study.py", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    values = json.loads((tmp_path / "teacher.json").read_text())["none"]
    assert len(values) == 2 and all(0 <= value["0"] <= 100 for value in values.values())
