"""An empty folder for each test, and for several a folder of clouds and a run of each stage."""

import numpy as np
import pytest

import train_student
import train_teacher
from common import STUDENT, TEACHER, run_command
from util import synthetic


@pytest.fixture(autouse=True)
def new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder of 8 training and 4 test clouds of two classes, 100 points each."""
    root = tmp_path_factory.mktemp("shapes")
    clouds = synthetic.synthetic_clouds(6, seed=3, num_points=100)
    for i, label in enumerate(clouds.labels.tolist()):
        folder = root / ("train" if i % 6 < 4 else "test") / clouds.classes[label]
        if folder.name in ("torus", "chair"):
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{i}.npy", clouds[i].numpy())
    return root


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory, shapes):
    """The folder of a finished stage I: two epochs of two steps, a row for each step."""
    out = tmp_path_factory.mktemp("teacher")
    words = TEACHER + "--epochs 2 --log-every 1".split()
    run_command(train_teacher, *words, "--data", shapes, "--out", out)
    return out


@pytest.fixture(scope="session")
def student_run(tmp_path_factory, shapes, teacher_run):
    """The folder of a finished stage II: one epoch of two steps."""
    out = tmp_path_factory.mktemp("student")
    words = STUDENT + ["--data", shapes, "--teacher", teacher_run / "last.pt"]
    run_command(train_student, *words, "--epochs", 1, "--out", out)
    return out
