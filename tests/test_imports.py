"""Imports run one way: commands -> util -> act, and nothing needs Unix to be imported."""

import re
import sys
from pathlib import Path

import pytest

import act

HERE = Path(act.__file__).parent
UTIL = sorted(HERE.glob("util/*.py"))
TOP = sorted(HERE.glob("*.py"))
COMMANDS = {path.stem for path in TOP} - {"act", "test_act", "conftest"}
every_file = pytest.mark.parametrize("path", TOP + UTIL, ids=lambda path: path.name)


def test_act_imports_torch_numpy_and_the_standard_library_alone():
    text = (HERE / "act.py").read_text(encoding="utf-8")
    found = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M))
    assert found <= {"torch", "numpy", "safetensors"} | sys.stdlib_module_names


@every_file
def test_no_file_imports_a_command_or_at_its_top_what_only_unix_has(path):
    top = set(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M))
    assert not top & COMMANDS
    assert not top & {"fcntl", "grp", "pwd", "resource", "termios"}
