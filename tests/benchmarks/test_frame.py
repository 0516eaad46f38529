"""What every benchmark shares: turns, ratios, failures, files, tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import frame
import pytest
from frame import Measure, Record, Row, RowError

MEASURES = [
    Measure("speed", "decode", "tok/s", more=True),
    Measure("seconds", "load", "s", more=False),
    Measure("cells", "cells"),
]


def make_record(*names: str) -> Record:
    rows = [Row(name, f"the {name}") for name in names]
    return Record("speed-tiny", "Speed", "python benchmarks/speed.py", MEASURES, rows)


def runs_of(
    order: list[str], **figures: Callable[[int], Mapping[str, float]]
) -> dict[str, Callable[[int], Mapping[str, float]]]:
    def noting(name: str, work: Callable[[int], Mapping[str, float]]) -> Callable[..., object]:
        def run(turn: int) -> Mapping[str, float]:
            order.append(name)
            return work(turn)

        return run

    return {name: noting(name, work) for name, work in figures.items()}  # type: ignore[misc]


def test_turns_begin_with_another_row_each() -> None:
    record, order = make_record("ours", "a", "b"), list[str]()
    same = {name: lambda _: {"speed": 1.0} for name in ("ours", "a", "b")}
    frame.take_turns(record, runs_of(order, **same), 2)
    assert order == ["ours", "a", "b", "a", "b", "ours"]
    assert record.complete


def test_ratio_above_one_says_that_ours_is_ahead() -> None:
    record = make_record("ours", "peer")
    record.row("ours").turns = [{"speed": 20.0, "seconds": 2.0, "cells": 3}]
    record.row("peer").turns = [{"speed": 10.0, "seconds": 8.0, "cells": 3}]
    assert record.times("peer", "speed") == [2.0]
    assert record.times("peer", "seconds") == [4.0]
    assert record.times("peer", "cells") == []


def test_ratio_is_of_the_same_turn() -> None:
    record = make_record("ours", "peer")
    record.row("ours").turns = [{"speed": 10.0}, {"speed": 20.0}, {"speed": 30.0}]
    record.row("peer").turns = [{"speed": 5.0}, {"cells": 1}]
    assert record.times("peer", "speed") == [2.0]


def test_failing_row_says_so_and_the_others_go_on() -> None:
    record = make_record("ours", "peer")

    def fail(turn: int) -> Mapping[str, float]:
        if turn:
            raise RowError("died in /home/somebody/models/model.gguf\nwith status 6")
        return {"speed": 4.0}

    order: list[str] = []
    frame.take_turns(record, runs_of(order, ours=lambda _: {"speed": 8.0}, peer=fail), 3)
    assert [row.values("speed") for row in record.rows] == [[8.0] * 3, [4.0]]
    assert record.row("peer").failed == "died in model.gguf with status 6"
    assert order.count("peer") == 2
    assert "- the peer: died in model.gguf with status 6" in frame.markdown(record)


def test_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    record = make_record("ours", "peer")

    def interrupted(turn: int) -> Mapping[str, float]:
        if turn:
            raise KeyboardInterrupt
        return {"speed": 2.0}

    frame.take_turns(record, {"ours": lambda _: {"speed": 1.0}, "peer": interrupted}, 3)
    with pytest.raises(SystemExit) as ended:
        frame.finish(record, tmp_path / "r.json")
    assert ended.value.code == 130
    kept = frame.read(tmp_path / "r.json")
    assert not kept.complete
    assert kept.row("ours").values("speed") == [1.0]
    assert kept.row("peer").values("speed") == [2.0]


def test_record_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    record = make_record("ours", "peer")
    record.row("ours").turns = [{"speed": 20.0}]
    record.row("peer").facts = {"weights": "repacked"}
    frame.save(record, tmp_path / "new" / "r.json")
    assert frame.read(tmp_path / "new" / "r.json") == record


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 2}'])
def test_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match="not a record"):
        frame.read(tmp_path / "r.json")


def test_table_tells_median_spread_and_ratio() -> None:
    record = make_record("ours", "peer")
    record.row("ours").turns = [{"speed": 10.0}, {"speed": 12.0}, {"speed": 11.0}]
    record.row("peer").turns = [{"speed": 20.0}, {"speed": 20.0}, {"speed": 20.0}]
    assert frame.results_table(record).splitlines() == [
        "|  | decode, tok/s | ours is × |",
        "| --- | --- | --- |",
        "| the ours | 11.0 (10.0 to 12.0) |  |",
        "| the peer | 20.0 | **0.55** |",
    ]


def test_command_names_no_folder_of_this_machine() -> None:
    argv = ["/x/benchmarks/load.py", "--work", "/tmp/w", "--json", "/tmp/a.json", "--size", "9b"]
    assert frame.shown_command(argv) == "python benchmarks/load.py --work DIR --size 9b"
    argv = ["load.py", "/m/model-Q4_0.gguf", "--server=/b/llama-server", "--json=/tmp/a.json"]
    expected = "python benchmarks/load.py model-Q4_0.gguf --server=llama-server"
    assert frame.shown_command(argv) == expected


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234.5, "tok/s", "1234"),
        (12.345, "s", "12.3"),
        (0.5, "s", "0.50"),
        (0.01234, "s", "0.0123"),
        (0, "", "0"),
        (5_300_000_000, "B", "5.30 GB"),
        (117_420_032, "B", "117.42 MB"),
    ],
)
def test_figure_has_three_digits(value: float, unit: str, text: str) -> None:
    assert frame.figure(value, unit) == text


def test_percentile_is_a_value_that_was_measured() -> None:
    assert frame.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert frame.percentile([4.0, 1.0, 3.0, 2.0], 0.95) == 4.0
    assert frame.percentile([7.0], 0.01) == 7.0


def test_only_takes_rows_that_there_are() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    frame.add_rows_option(parser, {"ours": "", "a": "", "b": ""})
    assert parser.parse_args([]).only == ["ours", "a", "b"]
    assert parser.parse_args(["--only", "b,ours"]).only == ["ours", "b"]
    with pytest.raises(argparse.ArgumentError, match="of ours,a,b"):
        parser.parse_args(["--only", "c"])
