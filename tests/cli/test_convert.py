"""``convert``: what is printed where, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import Shape, build_checkpoint, build_sparse_checkpoint

from autoglm_gguf import read_header
from autoglm_gguf.cli.main import main

pytestmark = pytest.mark.native
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_convert_prints_files_to_stdout_and_progress_to_stderr(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(checkpoint), "--outdir", str(out), "--outtype", "q4_0"]) == 0
    printed = capsys.readouterr()
    text, mmproj = printed.out.splitlines()
    assert text.startswith("text ") and text.endswith(str(out / "checkpoint-Q4_0.gguf"))
    assert mmproj.startswith("mmproj ") and mmproj.endswith("mmproj-checkpoint-Q8_0.gguf")
    assert "100%" in printed.err
    assert "converted in" in printed.err


def test_convert_prints_json(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--outdir", tmp_path / "out", "--name", "M", "--mmproj-outtype", "f16", "--json"]
    result = run("convert", checkpoint, *arguments, "--n-threads", 1)
    assert result.returncode == 0, result.stderr
    files = json.loads(result.stdout)["files"]
    assert Path(files["text"]["path"]).name == "M-Q8_0.gguf"
    assert Path(files["mmproj"]["path"]).name == "mmproj-M-F16.gguf"
    for file in files.values():
        assert read_header(file["path"]).file_bytes == file["n_bytes"]


def test_convert_error_has_a_hint_and_no_traceback(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    next(checkpoint.glob("*.safetensors")).unlink()
    result = run("convert", checkpoint, "--outdir", tmp_path / "out")
    assert (result.returncode, result.stdout) == (1, "")
    first, second = result.stderr.splitlines()
    assert first.startswith("error: model-0000")
    assert second.startswith("hint: ")


@pytest.mark.skipif(os.name != "posix", reason="SIGINT of POSIX")
@pytest.mark.parametrize("older", [False, True])
def test_convert_interrupted_by_ctrl_c_leaves_what_was_there(tmp_path: Path, older: bool) -> None:
    out = tmp_path / "out"
    if older:
        main(["convert", str(build_checkpoint(tmp_path / "large")), "--outdir", str(out)])
    before = {path: path.read_bytes() for path in out.iterdir()} if older else {}
    wide = Shape(hidden_size=1024, n_layers=24, intermediate_size=4096)
    large = build_sparse_checkpoint(tmp_path / "large", wide)
    # Shells start background jobs with SIGINT ignored; a terminal does not.
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from autoglm_gguf.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "convert", str(large), "--outdir", str(out)]
    with subprocess.Popen(
        [*command, "--n-threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert " 0%" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.endswith("interrupted\n")
    assert "Traceback" not in stderr
    assert {path: path.read_bytes() for path in out.iterdir()} == before


# --- fit ---


def test_convert_fits_a_size_and_tells_the_recipe(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--outdir", str(out), "--fit-weights", "10MB", "--prefer", "speed"]
    assert main(["convert", str(checkpoint), *arguments]) == 0
    printed = capsys.readouterr()
    text, _, types, error = printed.out.splitlines()
    assert text.endswith("checkpoint-FIT_10MB.gguf")
    assert types.startswith("types   F16 ×")
    assert "by sampling" in error
    assert "measuring" in printed.err


def test_inspect_prints_the_recipe_of_a_fit(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--fit", "200MB", "--n-ctx", 512, "--image-tokens", 64, "--json"]
    result = run("convert", checkpoint, "--outdir", tmp_path / "out", *arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["fit"]["limit"] == "run"
    shown = run("inspect", report["files"]["text"]["path"], "--json")
    assert json.loads(shown.stdout)["fit"] == report["fit"]
    shown = run("inspect", report["files"]["text"]["path"])
    assert "  limit_bytes            200,000,000" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fit", "4GB", "--fit-weights", "3GB"], "not allowed with"),
        (["--fit", "4GB", "--outtype", "q4_0"], "beside a fit"),
        (["--fit", "lots"], "memory budget 'lots'"),
        (["--prefer", "speed"], "--prefer: belongs to a fit"),
        (["--fit-weights", "3GB", "--n-ctx", "4096"], "--n-ctx: belongs to a run"),
        (["--fit-weights", "3GB", "--image-tokens", "64"], "--image-tokens: belongs to a run"),
        (["--fit", "0"], "more than zero bytes"),
        (["--fit", "-1"], "'-1': not a size"),
        (["--fit", "1e9"], "'1e9': not a size"),
        (["--fit", "none"], "no size"),
        (["--fit", "9" * 5000], "not a size"),
        (["--fit-weights", "9" * 400], "more than any machine has"),
        (["--fit", "4GB", "--n-ctx", "0"], "n_ctx 0"),
        (["--fit", "4GB", "--image-tokens", "-5"], "max_image_tokens -5"),
        (["--fit", "4GB", "--backend", "abacus"], "invalid choice"),
    ],
)
def test_convert_refuses_a_fit_that_makes_no_sense(
    run: Run, checkpoint: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    result = run("convert", checkpoint, "--outdir", tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_convert_names_the_smallest_budget_that_could_be_met(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    result = run("convert", checkpoint, "--outdir", tmp_path / "out", "--fit", "100MB")
    assert result.returncode == 1
    assert "no mix of types fits a run into 100.00 MB" in result.stderr
    assert "hint: --fit 1" in result.stderr
    assert not (tmp_path / "out").exists()
