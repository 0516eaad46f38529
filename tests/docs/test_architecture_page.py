"""ARCHITECTURE.md draws the code as it is: every module, and the levels that hold."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
SOURCE = ROOT / "src" / "autoglm_gguf"
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def tree() -> str:
    """The drawing, from the package to the tests."""
    return PAGE.partition("src/autoglm_gguf/\n")[2].partition("\nvendor/llama.cpp")[0]


@pytest.mark.parametrize("module", [m for m in MODULES if m.stem != "__init__"], ids=str)
def test_module_stands_in_the_tree(module: Path) -> None:
    folder = str(module.parent)
    entry = re.search(rf"^  {folder}/ .*\n(?:^ {{6,}}.*\n)*", tree(), re.MULTILINE)
    told = tree() if folder == "." else entry[0] if entry else ""
    assert re.search(rf"\b{module.stem}\b", told), f"{module}: not in ARCHITECTURE.md"


def test_levels_are_those_that_hold() -> None:
    path = ROOT / "tests" / "test_architecture.py"
    spec = importlib.util.spec_from_file_location("levels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = PAGE.partition("## Levels")[2].split("```")[1].strip()
    # __main__ is the command line by another name.
    expected = [sorted(set(level) - {"__main__"}) for level in module.LEVELS]
    assert [sorted(line.split(", ")) for line in drawn.splitlines()] == expected
