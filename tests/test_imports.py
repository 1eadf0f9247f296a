"""Imports run one way: commands -> util -> act, and nothing needs Unix to be imported."""

import re
import sys
from pathlib import Path

import act

HERE = Path(act.__file__).parent
COMMANDS = {path.stem for path in HERE.glob("*.py")} - {"act", "test_act", "conftest"}
ALLOWED = {"act": {"torch", "numpy"}, "processes": {"torch", "act"}}


def test_no_file_imports_a_command_or_at_its_top_what_only_unix_has():
    for path in list(HERE.glob("*.py")) + list(HERE.glob("util/*.py")):
        top = set(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M))
        assert not top & (COMMANDS | {"fcntl", "grp", "pwd", "resource", "termios"}), path
        assert top <= ALLOWED.get(path.stem, top) | sys.stdlib_module_names, path
