"""``bench``: what is printed, saved and refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_reports import make_report, make_result

from autoglm_gguf.bench.report import read_report, write_report
from autoglm_gguf.cli.bench import draw_table
from autoglm_gguf.cli.main import build_parser, main

ROOT = Path(__file__).parents[2]
MACHINE = make_report().machine
SMALL = ["--prompt-n", "16", "--predicted-n", "4", "--n-ctx", "256", "--max-image-tokens", "32"]


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def test_table_has_a_row_for_each_configuration_and_units() -> None:
    failed = make_result(20, measures=(), held=None, failed="killed by SIGABRT")
    lines = list(draw_table(make_report(make_result(0), failed, make_result(41, 4.0))))
    at = next(n for n, line in enumerate(lines) if line.startswith("n_gpu_layers "))
    heads = ["n_gpu_layers", "load", "prefill", "ttft", "decode", "peak", "on devices"]
    assert cells(lines[at]) == heads
    assert lines[at + 1].split() == ["512", "512", "64"]
    assert lines[at + 2].split() == ["s", "tok/s", "s", "tok/s"]
    assert cells(lines[at + 3]) == (
        ["0", "2.00 ±0.20", "100 ±10.0", "5.12 ±0.51", "10.0 ±1.00", "3.00 GB", "-"]
    )
    assert cells(lines[at + 4]) == ["20", "-", "-", "-", "-", "-", "-"]
    assert cells(lines[at + 5])[:3] == ["all", "0.50 ±0.050", "400 ±40.0"]
    assert "n_gpu_layers 20: failed: killed by SIGABRT" in lines
    assert "A CPU, 8 cores, 16.00 GB; Linux 6.1 x86_64" in lines


def test_note_of_every_configuration_is_told_once() -> None:
    noted = [make_result(n, notes=("all alike", f"of {n}")) for n in (0, 10)]
    remarks = [line for line in draw_table(make_report(*noted)) if "alike" in line or "of " in line]
    assert remarks[-3:] == ["note: all alike", "n_gpu_layers 0: of 0", "n_gpu_layers 10: of 10"]


@pytest.mark.native
def test_bench_prints_what_it_saves_and_draws(
    run: Callable[..., subprocess.CompletedProcess[str]],
    tiny_pair: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    text = tiny_pair("q8_0")[0]
    saved, plot = tmp_path / "a.json", tmp_path / "a.svg"
    files = ("--save", saved, "--plot", plot)
    result = run("bench", text, *SMALL, "--repeats", 1, "--layers", "0", "--json", *files)
    assert result.returncode == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    assert value == json.loads(saved.read_text("utf-8"))
    assert value["model"]["file"] == text.name
    assert value["settings"]["context"]["max_image_tokens"] == 32
    assert plot.read_text("utf-8").startswith("<?xml")
    assert "[1 of 1] n_gpu_layers 0: warm-up\n" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.svg"]


@pytest.mark.native
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupted_bench_gives_what_it_has(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    saved = tmp_path / "a.json"
    model = [str(tiny_pair("q8_0")[0]), "--no-image", "--repeats", "900", "--save", str(saved)]
    command = [sys.executable, "-m", "autoglm_gguf", "bench", *model, *SMALL, "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout and process.stderr
        for line in process.stderr:
            if "repeat 3 of 900" in line:
                os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: parent and child
                break
        told = process.stderr.read()
        value = json.loads(process.stdout.read())
    assert process.returncode == 130
    assert told.endswith("interrupted\n") and "Traceback" not in told
    assert value["complete"] is False
    (result,) = value["results"]
    assert result["failed"] == "interrupted"
    assert 2 <= len(result["measures"][0]["values"]) < 900
    assert value == json.loads(saved.read_text("utf-8"))
    assert list(tmp_path.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--plot", "p.gif"], 1, "p.gif: unknown kind of picture"),
        (["--plot", "none/p.png"], 1, "none/p.png: no such folder"),
        (["--save", "none/a.json"], 1, "none/a.json: no such folder"),
        (["--layers", "0,eight"], 2, "layers '0,eight'"),
        (["--layers", "0", "--n-gpu-layers", "8"], 2, "--n-gpu-layers: a sweep chooses it"),
        (["--prompt-n", "512,"], 2, "prompt_n '512,'"),
        (["--repeats", "0"], 2, "repeats 0"),
        (["--memory-budget", "much"], 2, "memory budget 'much'"),
        (["--compare", "a.json", "b.json"], 2, "--compare: takes two saved benches"),
        ([], 1, "m.gguf: no such file"),
    ],
)
def test_bench_refuses_before_it_measures(
    options: list[str],
    code: int,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "m.gguf", *options]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {named}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.native
def test_bench_of_a_model_that_fits_nowhere_exits_with_1(
    random_pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(random_pair[0]), *SMALL, "--memory-budget", "2MB"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "n_gpu_layers auto: failed: " in printed.err
    assert "error: random-Q8_0.gguf: nothing measured to its end (" in printed.err


def test_compare_prints_ratios_and_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    write_report(Path(paths[0]), make_report(make_result(0)))
    write_report(Path(paths[1]), make_report(make_result(0, 2.0), complete=False))
    assert main(["bench", "--compare", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(", interrupted")
    assert ["0", "decode 64", "10.0 tok/s", "20.0 tok/s", "2.00", "faster"] in map(cells, lines)
    assert ["0", "peak_memory", "3.00 GB", "3.00 GB", "1.00", "the same"] in map(cells, lines)
    assert main(["bench", "--compare", *paths, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [ratio["ratio"] for ratio in value["ratios"]] == [0.5, 2.0, 0.5, 2.0, 1.0]
    assert read_report(Path(paths[0])).complete


@pytest.mark.parametrize("option", ["--plot", "--save"])
def test_compare_writes_no_file(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = tmp_path / "a.json"
    write_report(a, make_report())
    assert main(["bench", "--compare", str(a), str(a), option, str(tmp_path / "p.png")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option}: writes what is measured")
    assert list(tmp_path.iterdir()) == [a]


def test_compared_file_cannot_move_the_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_report(a, make_report())
    write_report(b, make_report(started="\x1b[2J", machine=replace(MACHINE, cpu="A\x1b[31m CPU")))
    assert main(["bench", "--compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "differs: machine.cpu: A CPU | A\N{REPLACEMENT CHARACTER}[31m CPU" in printed


@pytest.mark.native
@pytest.mark.skipif(os.name != "posix", reason="a folder that is in use can go")
def test_figures_are_told_where_they_cannot_be_saved(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = tmp_path / "away"
    folder.mkdir()
    files = ["--no-image", "--repeats", "1", "--save", str(folder / "a.json")]
    model = str(tiny_pair("q8_0")[0])
    command = [sys.executable, "-m", "autoglm_gguf", "bench", model, *SMALL, *files, "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        next(line for line in process.stderr if "warm-up" in line)
        folder.rmdir()
        told = process.stderr.read()
        value: dict[str, Any] = json.loads(process.stdout.read())
    assert process.returncode == 1
    assert "error: " in told and "a.json: cannot be written (" in told
    assert value["complete"] and value["results"][0]["measures"]


def test_reference_page_names_every_option_and_figure() -> None:
    page = (ROOT / "docs" / "reference" / "bench.md").read_text("utf-8")
    commands = next(a for a in build_parser()._actions if isinstance(a.choices, dict))
    bench = commands.choices["bench"]
    own = [a for a in bench._actions if a.dest not in ("help", "model", "mmproj")]
    for action in own:
        assert f"`{action.option_strings[0]}" in page, action.dest
    for name in (
        "load",
        "prefill",
        "ttft",
        "decode",
        "image_encode",
        "image_prefill",
        "image_ttft",
    ):
        assert f"`{name}`" in page
