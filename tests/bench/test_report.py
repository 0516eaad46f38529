"""Saved benches: the shape of the file, and files that are none."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bench_reports import make_report, make_result

from autoglm_gguf import BenchError
from autoglm_gguf.bench.report import (
    check_target,
    make_measure,
    read_report,
    write_report,
    write_whole,
)

# Programs read these names: one that changes or goes needs another SCHEMA.
SHAPE = {
    "": "schema complete started machine versions model settings results notes",
    "machine": "system cpu n_cores memory_bytes devices",
    "machine.devices": "name description backend kind total_bytes",
    "versions": "package python llama_cpp_python llama_cpp backends",
    "model": "file file_bytes architecture block_count types mmproj mmproj_bytes mmproj_types",
    "settings": (
        "prompt_n predicted_n repeats pause_s screen memory_budget_bytes self_test context"
    ),
    "results": "n_gpu_layers devices chosen measures held notes failed",
    "results.measures": "name n unit values median low high",
    "results.held": (
        "planned_bytes planned_device_bytes peak_bytes anonymous_bytes mapped_bytes device_bytes "
        "buffers"
    ),
}


def test_saved_bench_has_the_shape_of_schema_1() -> None:
    raw = asdict(make_report())
    assert raw["schema"] == 1
    for where, keys in SHAPE.items():
        value: Any = raw
        for step in filter(None, where.split(".")):
            value = value[step]
            value = value[0] if isinstance(value, tuple) else value
        assert " ".join(value) == keys, where


def test_saved_bench_is_read_back_as_it_was(tmp_path: Path) -> None:
    report = make_report(make_result(0), make_result(41, failed="killed"), complete=False)
    write_report(tmp_path / "a.json", report)
    assert read_report(tmp_path / "a.json") == report


def test_measure_keeps_every_value_and_its_middle() -> None:
    measure = make_measure("decode", 64, "tok/s", [3.00004, 1.0, 2.0])
    assert measure.values == (3.0, 1.0, 2.0)
    assert (measure.median, measure.low, measure.high, measure.spread) == (2.0, 1.0, 3.0, 1.0)


def saved(**changed: Any) -> str:
    return json.dumps({**asdict(make_report()), **changed})


def with_figures(**changed: Any) -> str:
    result = asdict(make_result(0))
    result["measures"][0].update(changed)
    return saved(results=[result])


def with_held(**changed: Any) -> str:
    result = asdict(make_result(0))
    result["held"].update(changed)
    return saved(results=[result])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "no schema number"),
        ('{"schema": "1"}', "no schema number"),
        ('{"schema": 99}', "schema 99, required 1"),
        ('{"schema": 1}', "complete: "),
        (saved(results=7), "results: "),
        (saved(results=[{"n_gpu_layers": None}]), "results.0.n_gpu_layers"),
        (saved(machine=None), "machine: "),
        ('{"schema": true}', "no schema number"),
        (with_figures(median=float("nan")), "not JSON"),
        (with_figures(median=float("inf")), "not JSON"),
        (with_figures(median=7).replace(": 7", ": 1e999"), "results.0.measures.0.median"),
        (with_figures(median=0), "results.0.measures.0.median"),
        (with_figures(low=-1.0), "results.0.measures.0.low"),
        (with_figures(values=[]), "results.0.measures.0.values"),
        (with_figures(unit="furlongs"), "results.0.measures.0.unit"),
        (with_held(peak_bytes=-5), "results.0.held.peak_bytes"),
    ],
)
def test_file_that_is_no_saved_bench_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=r"a\.json: ") as caught:
        read_report(path)
    assert named in caught.value.message
    assert caught.value.hint


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def test_target_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    check_target(tmp_path / "new.json")
    with pytest.raises(BenchError, match="no such folder"):
        check_target(tmp_path / "none" / "new.json")
    with pytest.raises(BenchError, match="a folder, not a file"):
        check_target(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a file that is not regular")
def test_target_that_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BenchError, match="pipe: not a regular file"):
        check_target(tmp_path / "pipe")


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "a.json", tmp_path / "there" / "b.json"
    target.write_text("old")
    link.symlink_to(target)
    write_report(link, make_report())
    assert link.is_symlink() and read_report(target) == make_report()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_writing_leaves_the_old_file_alone(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        raise failure

    with pytest.raises((BenchError, KeyboardInterrupt)):
        write_whole(path, write)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]
