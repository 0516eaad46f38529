"""``doctor`` as a user runs it, here and where nothing is installed."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import autoglm_gguf

Run = Callable[..., subprocess.CompletedProcess[str]]
SOURCE = Path(autoglm_gguf.__file__).parents[1]
STATES = {"ok", "note", "problem"}


@pytest.mark.native
def test_doctor_finds_this_installation_usable(run: Run) -> None:
    result = run("doctor", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert all(set(one) == {"name", "state", "text", "hint"} for one in found)
    assert {one["state"] for one in found} <= STATES - {"problem"}
    names = [one["name"] for one in found]
    for name in ("python", "dependencies", "llama-cpp-python", "build", "device CPU", "memory"):
        assert name in names
    assert all(one["hint"] for one in found if one["state"] == "note")


@pytest.fixture
def run_bare(tmp_path: Path) -> Run:
    """Run this package in a fresh interpreter that has nothing else, with an empty PATH."""
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name == "posix")
    python = next((tmp_path / "bare").glob("[bS]*in*/python*"))
    info = tmp_path / "known" / "autoglm_gguf-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        metadata.distribution("autoglm-gguf").read_text("METADATA") or ""
    )

    def run_bare(*arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join((str(SOURCE), str(info.parent)))
        kept = {key: os.environ[key] for key in ("HOME", "SYSTEMROOT") if key in os.environ}
        return subprocess.run(
            [python, "-m", "autoglm_gguf", *arguments],
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=False,
            env={**kept, "PYTHONPATH": path, "PATH": "", "PYTHONIOENCODING": "utf-8"},
        )

    return run_bare


def test_doctor_runs_where_nothing_is_installed(run_bare: Run) -> None:
    result = run_bare("doctor")
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    told = {line[9:28].strip(): line.split()[0] for line in lines if line.split()[0] in STATES}
    assert told["python"] == told["memory"] == "ok" or told["memory"] == "note"
    for name in ("dependencies", "build tools", "llama-cpp-python"):
        assert told[name] == "problem"
    assert told["adb"] == "note"
    assert "-> pip install llama-cpp-python==0.3.36" in result.stdout
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: doctor: not ready to run (dependencies, build tools, llama-cpp")
    assert hint.startswith('hint: pip install "')


def test_other_commands_name_the_doctor_where_a_package_is_missing(run_bare: Run) -> None:
    for arguments in (["plan", "x.gguf"], ["--help"]):
        result = run_bare(*arguments)
        assert result.returncode == 1
        error, hint = result.stderr.splitlines()
        assert error.startswith("error: No module named ")
        assert hint == "hint: autoglm-gguf doctor"
    assert run_bare("--version").stdout == f"autoglm-gguf {autoglm_gguf.__version__}\n"
