"""The tables: their statistics, their arms and runs, and what a start again makes."""

import json
import shutil
import signal
from pathlib import Path

import pytest

import common
import study
from common import refused, run_command

STUB = """
import json, pathlib, signal, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open("calls.txt", "a") as file:
    file.write(" ".join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]) + chr(10))
if pathlib.Path("broken").read_text() in sys.argv or signal.getsignal(2) == signal.SIG_IGN:
    sys.exit("error: no such prompt")
row = dict(svm_trained=50 + len(sys.argv), knn_trained=int(flags["--seed"]), best_accuracy=9.0)
row["accuracy"] = None if "linear" in sys.argv else 7.0  # null: it could not be had
about = dict(config=dict(weights=flags.get("--weights", "random")), settings=dict(precision="bf16"))
texts = {"metrics.jsonl": row, "config.json": about, "last.pt": ""}
for name, text in texts.items():
    pathlib.Path(flags["--out"], name).write_text(json.dumps(text))
"""


@pytest.fixture(autouse=True)
def stubs(new_folder, tmp_path, monkeypatch):
    """Commands that only note their flags, in place of those that train."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    for name in ("train_teacher.py", "train_student.py", "finetune.py"):
        Path(name).write_text(STUB)
    Path("broken").write_text("nothing")


def make(words):
    """Runs a study of the stubs -> the command lines it gave them."""
    Path("calls.txt").write_text("")
    run_command(study, *words.split(), "--out", "runs")
    return Path("calls.txt").read_text().splitlines()


def having(lines, *words):
    return [line for line in lines if all(word in line for word in words)]


def values_of(table):
    return json.loads(Path("runs", f"{table}.json").read_text())


def test_differences_are_paired_by_seed_and_equal_ones_have_no_interval():
    assert study.t_quantile(9) == pytest.approx(2.26216, rel=1e-5)
    # 5, 7, 1: mean 13 / 3, variance 28 / 3. Differences 1, 4: mean 2.5, error 1.5.
    row = study.format_row("a", {0: 5.0, 1: 7.0, 3: 1.0}, {0: 4.0, 1: 3.0, 2: 50.0}, 9.0)
    assert row == "| a | 3 | 4.33 ± 1.76 | +2.50 | -16.56 to +21.56 | 19.06 | 9.00 |\n"
    row = study.format_row("a", {0: 0.7, 1: 0.8}, {0: 0.4, 1: 0.5}, 1.0)
    assert row == "| a | 2 | 0.75 ± 0.05 | +0.30 |  |  | 1.00 |\n"


def test_arms_share_runs_and_a_student_takes_the_teacher_of_its_arm():
    lines = make("prompt target mask decoder loss transfer --seeds 1")
    # prompt 4, target 4, mask 6, decoder 3, loss 3: the default student is an arm of each.
    assert len(having(lines, "train_teacher")) == 4 and len(having(lines, "train_student")) == 16
    for table, arm in (("target", "codes"), ("mask", "block 0.8"), ("loss", "L2")):
        assert values_of(table)[arm]["kNN"] == {"0": 0}
    assert having(lines, "/shallow/seed0/student", "--teacher runs/prompt/shallow/seed0/teacher")
    assert not having(lines, "--target coordinates", "--teacher")
    assert len(having(lines, "finetune")) == 4 and len(having(lines, "--checkpoint none")) == 1
    assert values_of("transfer")["MLP-3"].keys() == {"synthetic"}


def test_weights_are_the_arms_of_teachers_and_settings_reach_runs(shapes):
    shutil.copytree(shapes, "y")
    words = f"teacher --weights none a/model.safetensors --data {shapes} --transfer y --seeds 1"
    lines = make(f"{words} --teacher-epochs 3 --student-epochs 4")
    assert len(having(lines, "train_teacher", shapes.name, "--epochs 3")) == 2
    assert len(having(lines, "train_student", shapes.name, "--epochs 4")) == 2
    assert len(having(lines, "finetune", "--data y")) == 4
    assert values_of("teacher")["none"].keys() == {"linear SVM", "kNN", "y, full"}
    # The best epoch of the best seed stands beside the accuracy of the last.
    text = Path("runs/teacher.md").read_text()
    assert "| none | 1 | 7.00 |  |  |  | 9.00 |" in text and "y, linear" not in text
    assert "runs: bf16. Backbones of the teachers:\na/model.safetensors, none." in text


def test_a_start_again_makes_and_resumes_what_is_missing():
    lines = make("loss --weights a --seeds 1")
    assert len(lines) == 4 and not having(lines, "--resume")  # there is nothing to resume
    next(Path("runs/loss/L2/seed0").glob("student-*/finished")).unlink()
    lines = make("decoder loss --weights a --seeds 1")
    assert len(lines) == 3  # L2, and the decoders of 1 and 4 blocks
    assert len(having(lines, "--loss l2", "/loss/L2/", "--resume")) == 1
    lines = make("loss teacher --weights b a --seeds 1")  # loss takes b
    assert len(lines) == 4 and not having(lines, "--weights a")


def test_a_failing_run_is_named_its_student_is_not_made_and_the_others_go_on(capsys):
    Path("broken").write_text("shallow")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as & in a script has it
    with pytest.raises(SystemExit) as ended:
        make("prompt --seeds 2 --jobs 2")
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "failed with code 1: error: no such prompt" in out
    assert "runs/prompt/shallow/seed0/student" in err and "deep" not in err
    assert not having(Path("calls.txt").read_text().splitlines(), "train_student", "shallow")
    values = values_of("prompt")
    assert values["shallow"] == {} and values["deep"]["kNN"].keys() == {"0", "1"}


def test_tables_numbers_and_clouds_that_make_no_study_are_refused(shapes):
    train = f"{shapes}/train/chair"  # clouds without labels
    same_name = f"loss --transfer {train} {shapes}/test/chair"
    for words in ("colour", "loss --seeds 0", same_name, f"loss --data {train}"):
        with refused(words.split()[-1]):
            make(words)
    assert not Path("runs").exists()


def test_the_commands_take_what_a_study_gives_them(shapes, tmp_path):
    words = "teacher --weights none --seeds 1 --teacher-epochs 1 --student-epochs 1".split()
    result = common.python(common.ROOT / "study.py", *words, "--data", shapes, "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (value,) = json.loads((tmp_path / "teacher.json").read_text())["none"]["linear SVM"].values()
    assert 0 <= value <= 100
