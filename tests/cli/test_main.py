"""The command line as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import TEXT_METADATA, write_gguf

from autoglm_gguf import __version__
from autoglm_gguf.cli.main import main

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["chat", "--help"]])
def test_help_exits_with_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: autoglm-gguf")


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"autoglm-gguf {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["convert"],
        ["convert", "x", "--n-threads", "many"],
        ["act"],
        ["chat", "--type-k", "q3"],
        ["chat", "--content-format", "xml"],
        ["chat", "x.gguf", "--n-gpu-layers", "some"],
        ["plan", "x.gguf", "--n-ctx", "many"],
        ["inspect", "a", "b"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "usage:" in printed.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["convert", ".", "--outtype", "q5_9"], "outtype 'q5_9'"),
        (["chat", "x.gguf", "--temperature", "-1"], "temperature -1.0"),
        (["chat", "x.gguf", "--max-tokens", "0"], "max_tokens 0"),
        (["chat", "x.gguf", "--n-ctx", "1"], "n_ctx 1"),
        (["chat", "x.gguf", "--top-p", "nan"], "top_p nan"),
        (["act", "x.gguf", "--task", "t", "--seed", "-1"], "seed -1"),
        (["act", "x.gguf", "--task", "t", "--stop", ""], "stop"),
        (["chat", "x.gguf", "--memory-budget", "4 GB of fun"], "memory budget '4 GB of fun'"),
        (["act", "x.gguf", "--task", "t", "--memory-budget", "0"], "memory budget '0'"),
        (["plan", "x.gguf", "--memory-budget=-4GB"], "memory budget '-4GB'"),
        (["plan", "x.gguf", "--n-batch", "0"], "n_batch 0"),
    ],
)
def test_value_out_of_range_exits_with_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert named in printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "nowhere"],
        ["inspect", "nowhere.gguf"],
        ["chat", "nowhere.gguf"],
        ["plan", "nowhere.gguf"],
        ["act", "nowhere.gguf", "--task", "t"],
        ["chat", "zai-org/AutoGLM-Phone-9B"],
    ],
)
def test_missing_file_exits_with_1_and_a_hint(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = printed.err.splitlines()
    assert first.startswith(f"error: {arguments[1]}")
    assert second.startswith("hint: ")


def test_module_runs_as_a_program(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no model")
    result = run("inspect", tmp_path / "x.gguf")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: x.gguf: not a GGUF file\nhint: ")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", TEXT_METADATA)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "autoglm_gguf", "inspect", str(path)]
    with os.fdopen(writing, "wb") as pipe:
        result = subprocess.run(
            command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (result.returncode, result.stderr) == (0, "")
