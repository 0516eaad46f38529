"""Examples as a person runs them: a process each, in an empty folder, with one converted model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
Example = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of somebody whose cache the first example fills."""
    cache = tmp_path_factory.mktemp("cache")
    return os.environ | {"AUTOGLM_GGUF_CACHE": str(cache), "PYTHONWARNINGS": "error"}


@pytest.fixture
def example(environment: dict[str, str], tmp_path: Path) -> Example:
    """Runs one with arguments and what is typed into it; it must succeed."""

    def run(name: str, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, FOLDER / name, *arguments],
            input=typed,
            capture_output=True,
            encoding="utf-8",
            cwd=tmp_path,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run
