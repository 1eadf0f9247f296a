"""Imports run one way: commands -> util -> act, and nothing needs Unix to be imported."""

import re
import sys
from pathlib import Path

import pytest

import act

HERE = Path(act.__file__).parent
IMPORT = re.compile(r"^ *(?:import|from(?= [\w.]+ import)) (\w+)", re.M)


def imports_of(path):
    return set(IMPORT.findall(path.read_text(encoding="utf-8")))


def test_act_imports_torch_numpy_and_the_standard_library_alone():
    known = {"torch", "numpy", "safetensors"} | sys.stdlib_module_names  # safetensors if there
    assert imports_of(HERE / "act.py") <= known


@pytest.mark.parametrize("path", sorted(HERE.glob("util/*.py")), ids=lambda path: path.name)
def test_util_imports_no_command(path):
    commands = {command.stem for command in HERE.glob("*.py")} - {"act"}
    assert not imports_of(path) & commands


@pytest.mark.parametrize("path", sorted(HERE.glob("*.py")), ids=lambda path: path.name)
def test_commands_import_no_other_command(path):
    commands = {command.stem for command in HERE.glob("*.py")} - {"act", "test_act", "conftest"}
    assert not imports_of(path) & commands


@pytest.mark.parametrize("path", sorted(HERE.glob("**/*.py")), ids=lambda path: path.name)
def test_nothing_imports_what_only_unix_has_at_its_top(path):
    top = re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M)
    assert not set(top) & {"fcntl", "grp", "pwd", "resource", "termios"}
