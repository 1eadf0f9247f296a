"""Fixtures that several test files need: a folder of clouds, and a finished run of each stage."""

import pytest

import train_student
import train_teacher
from common import STUDENT, TEACHER, run_command, write_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """8 training and 4 test clouds of two classes, 100 points each."""
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root)
    return root


def finished_run(module, flags, out):
    """Runs a command; returns its folder --out."""
    run_command(module, *flags, "--out", out)
    return out


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory, shapes):
    """The folder of a finished stage I: two epochs of two steps, a row for each step."""
    flags = TEACHER + ["--data", shapes, "--epochs", 2, "--log-every", 1]
    return finished_run(train_teacher, flags, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def student_run(tmp_path_factory, shapes, teacher_run):
    """The folder of a finished stage II: one epoch of two steps."""
    flags = STUDENT + ["--data", shapes, "--teacher", teacher_run / "last.pt", "--epochs", 1]
    return finished_run(train_student, flags, tmp_path_factory.mktemp("student"))
