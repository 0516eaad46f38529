"""Models with known answers, converted once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import build_scripted_checkpoint

from autoglm_gguf import convert

ANSWER = ("<think>", "在桌面", "</think>", "\n\n", "<answer>", 'do(action="Launch", app="微信")')


@pytest.fixture(scope="session")
def acting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real pair on llama.cpp that always opens 微信."""
    base = tmp_path_factory.mktemp("acting")
    return convert(build_scripted_checkpoint(base / "acting", ANSWER), base / "gguf", "q8_0").text


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real pair on llama.cpp that never stops."""
    base = tmp_path_factory.mktemp("endless")
    checkpoint = build_scripted_checkpoint(base / "endless", ("again ",), endless=True)
    return convert(checkpoint, base / "gguf", "q8_0").text


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m autoglm_gguf`` as a user would; returns what it printed."""

    def run(
        *arguments: object, stdin: str = "", module: str = "autoglm_gguf"
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=False,
            env={
                **os.environ,
                "PYTHONIOENCODING": "utf-8",
                "AUTOGLM_GGUF_CACHE": str(tmp_path / "cache"),
            },
        )

    return run
