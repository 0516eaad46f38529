"""What every benchmark here does alike: who takes part, taking turns, what is kept and written.

A `Record` is one benchmark on one machine: rows (ours and peers), measures, and a figure of each
measure for each turn. Rows take turns in an order that changes, so that none always runs in the
heat of another; ratios are of figures of the same turn, since a machine's pace drifts. A row that
fails or is not installed says so and the others go on; Ctrl-C keeps what is finished. Knows no
runtime, no model and no page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

SCHEMA = 1
INTERRUPTED = 130
OURS = "ours"
T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
_PATH = re.compile(r"(?<![\w.])(?:/[\w.+@-]+)+/([\w.+@-]+)")
_WIDTH = 110
_FACTORS = {"B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))}


class RowError(RuntimeError):
    """A row cannot take part or go on; the message is what its row says."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured of every row."""

    key: str
    label: str
    unit: str = ""
    """``tok/s``, ``s``, ``ms``, ``B``; nothing for a count or a ratio."""
    more: bool | None = None
    """Whether more of it is better; None: neither, and no ratio is told."""


@dataclass(slots=True)
class Row:
    """One that takes part."""

    name: str
    label: str
    turns: list[dict[str, float]] = field(default_factory=list)
    """Figures by measure, turn by turn."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What it tells of itself: versions, how it holds its weights."""
    failed: str = ""
    """Why it did not take part, or not to the end."""

    def values(self, key: str) -> list[float]:
        """A measure's figures, those turns left out that have none."""
        return [turn[key] for turn in self.turns if key in turn]


@dataclass(slots=True)
class Record:
    """A benchmark's whole result."""

    name: str
    """The JSON file's, and the page's anchor."""
    title: str
    command: str
    """To run it again, without this machine's paths."""
    measures: list[Measure]
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    began: str = ""
    """Local time, to the minute."""
    load_average: list[float] = field(default_factory=list)
    """The system's, of a minute, at the start and at the end: what else ran shows here."""
    complete: bool = False
    """False: it was interrupted."""
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def row(self, name: str) -> Row:
        """A row by its name.

        Raises:
            KeyError: There is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{self.name}: no row {name!r}")

    def measure(self, key: str) -> Measure:
        """A measure by its key.

        Raises:
            KeyError: There is none.
        """
        for measure in self.measures:
            if measure.key == key:
                return measure
        raise KeyError(f"{self.name}: no measure {key!r}")

    def times(self, name: str, key: str, base: str = OURS) -> list[float]:
        """How many times better ``base`` was than a row, turn by turn: above 1, ``base`` is ahead.

        Turns in which either has no figure are left out; empty where more is neither better nor
        worse, or where there is no such base.
        """
        measure = self.measure(key)
        ours = next((row for row in self.rows if row.name == base), None)
        if measure.more is None or ours is None:
            return []
        pairs = [
            (mine[key], theirs[key])
            for mine, theirs in zip(ours.turns, self.row(name).turns, strict=False)
            if mine.get(key) and theirs.get(key)
        ]
        return [mine / theirs if measure.more else theirs / mine for mine, theirs in pairs]


# ---- taking turns


def take_turns(
    record: Record,
    runs: Mapping[str, Callable[[int], Mapping[str, float]]],
    n_turns: int,
    *,
    save: Callable[[], object] = lambda: None,
) -> None:
    """Run every row once a turn, in changing order; figures go into the record.

    Args:
        record: Its rows of the same names get the figures.
        runs: Called with the number of the turn; what is returned are the row's figures.
        n_turns: At least 1.
        save: Called after each turn.
    """
    with until_interrupted(record):
        for turn in range(n_turns):
            for name in turned([*runs], turn):
                row = record.row(name)
                figures = attempt(row, partial(runs[name], turn))
                if figures is None:
                    continue
                row.turns.append({key: rounded(value) for key, value in figures.items()})
                tell(f"turn {turn + 1} of {n_turns}, {row.label}: {told(record, figures)}")
            save()


@contextlib.contextmanager
def until_interrupted(record: Record) -> Iterator[None]:
    """Measure in the block; Ctrl-C ends it, and the record says whether it came to its end."""
    try:
        yield
        record.complete = True
    except KeyboardInterrupt:
        tell("interrupted: what is finished is kept")
        record.notes.append("Interrupted: figures are missing.")


def told(record: Record, figures: Mapping[str, float]) -> str:
    """Figures in a line."""
    return ", ".join(
        f"{m.label} {figure(figures[m.key], m.unit)}" for m in record.measures if m.key in figures
    )


def attempt(row: Row, work: Callable[[], T]) -> T | None:
    """Do a row's work; None, and the reason in the row, if it fails now or has failed before."""
    if row.failed:
        return None
    try:
        return work()
    except RowError as error:
        row.failed = scrub(str(error))
        tell(f"{row.label}: {row.failed}")
        return None


def turned(names: Sequence[str], by: int) -> list[str]:
    """The same names, another one first."""
    by %= max(1, len(names))
    return [*names[by:], *names[:by]]


def tell(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


# ---- where and with what


def begin(
    name: str,
    title: str,
    measures: Iterable[Measure],
    labels: Mapping[str, str],
    settings: Mapping[str, Any],
    packages: Iterable[str] = (),
) -> Record:
    """An empty record of this machine, now.

    Args:
        name, title, measures, settings: The record's.
        labels: Rows, by name.
        packages: Distributions whose versions are told beside ours, if installed.
    """
    # Every process here imports compiled modules, as an installation does.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    machine, versions = probe()
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return Record(
        name,
        title,
        shown_command(sys.argv),
        [*measures],
        [Row(key, label) for key, label in labels.items()],
        settings={key: plain(value) for key, value in settings.items()},
        machine=machine,
        versions=versions,
        began=time.strftime("%Y-%m-%d %H:%M"),
        load_average=[round(os.getloadavg()[0], 2)],
    )


def probe() -> tuple[dict[str, Any], dict[str, str]]:
    """Machine and versions, ours with the commit where there is one."""
    from autoglm_gguf.bench.process import probe_machine

    machine, versions, _ = probe_machine(None)
    found = asdict(versions)
    found["autoglm-gguf"] = found.pop("package")
    if commit := _commit():
        found["autoglm-gguf"] += f" ({commit})"
    found["llama-cpp-python"] = found.pop("llama_cpp_python")
    found["llama.cpp"] = found.pop("llama_cpp")[:9]
    del found["backends"]
    told = asdict(machine)
    return {key: told[key] for key in ("cpu", "n_cores", "memory_bytes", "system")}, found


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout.strip()
    return ""


def shown_command(argv: Sequence[str]) -> str:
    """How to run it again: this machine's paths by what they are, no ``--json``."""
    words: list[str] = ["python", f"benchmarks/{Path(argv[0]).name}"]
    rest = iter(argv[1:])
    for word in rest:
        if word == "--json":
            next(rest, None)
        elif not word.startswith("--json="):
            words.append(_placeholder(word))
    return " ".join(words)


def _placeholder(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    if not Path(value).is_absolute():
        return word
    name = Path(value).name
    return f"{option}{equals}{name if '.' in name or name.startswith('llama-') else 'DIR'}"


def scrub(text: str) -> str:
    """A message in one line, without this machine's folders."""
    line = " ".join(_PATH.sub(r"\1", text).split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def plain(value: Any) -> Any:
    """A setting as JSON holds it; a path by its name."""
    return value.name if isinstance(value, Path) else value


# ---- files


def save(record: Record, path: Path) -> None:
    """Write a record, whole or not at all."""
    from autoglm_gguf.bench.report import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False)
    write_whole(path, lambda temporary: temporary.write_text(f"{text}\n", "utf-8"))


def read(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: No record, or one of another schema.
    """
    raw = json.loads(path.read_text("utf-8"))
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: not a record of schema {SCHEMA}")
    measures = [Measure(**measure) for measure in raw.pop("measures")]
    rows = [Row(**row) for row in raw.pop("rows")]
    return Record(measures=measures, rows=rows, **raw)


def finish(record: Record, path: Path | None, more: Iterable[str] = ()) -> None:
    """Stamp the end, print Markdown and more of it, save.

    Raises:
        SystemExit: 130, if it was interrupted.
    """
    stamp(record)
    print(*(part for part in [markdown(record), *more] if part), sep="\n\n")
    if path is not None:
        save(record, path)
    if not record.complete:
        raise SystemExit(INTERRUPTED)


def stamp(record: Record) -> None:
    """The load average at the end, once."""
    record.load_average[1:] = [round(os.getloadavg()[0], 2)]


def run_turns(
    record: Record,
    runs: Mapping[str, Callable[[int], Mapping[str, float]]],
    arguments: argparse.Namespace,
) -> None:
    """All of a plain benchmark: turns, the table, the file; the options are `add_options`'s."""
    take_turns(record, runs, arguments.repeats, save=keeper(record, arguments.json))
    finish(record, arguments.json)


def keeper(record: Record, path: Path | None) -> Callable[[], None]:
    """Saves what there is so far; does nothing without a path."""

    def keep() -> None:
        if path is not None:
            save(record, path)

    return keep


def add_options(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """What every benchmark takes."""
    parser.add_argument("--repeats", type=positive, default=repeats, help=f"default: {repeats}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")


def add_rows_option(parser: argparse.ArgumentParser, labels: Mapping[str, str]) -> None:
    """``--only``: some of the rows."""

    def chosen(text: str) -> list[str]:
        asked = text.split(",")
        if not set(asked) <= set(labels):
            raise argparse.ArgumentTypeError(f"{text}: of {','.join(labels)}")
        return [name for name in labels if name in asked]

    every = ",".join(labels)
    parser.add_argument("--only", type=chosen, default=every, metavar="ROWS", help=f"of {every}")


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return value


# ---- Markdown


def markdown(record: Record, *, heading: str = "##") -> str:
    """Title, circumstances, table, notes and command."""
    parts = [f"{heading} {record.title}", wrap(circumstances(record)), results_table(record)]
    parts += ["\n".join(f"- {note}" for note in notes(record))]
    parts += [f"    {record.command}"]
    return "\n\n".join(part for part in parts if part)


def circumstances(record: Record) -> str:
    """Machine, versions, settings and repeats in a few sentences."""
    machine = record.machine
    memory = machine.get("memory_bytes")
    told = f", {memory / 2**30:.0f} GiB" if memory else ""
    parts = [f"{machine.get('cpu', 'unknown')}, {machine.get('n_cores', '?')} cores{told}."]
    load = record.load_average
    if load:
        parts.append(f"Load average {' to '.join(f'{value:.1f}' for value in load)}.")
    parts.append(", ".join(f"{name} {value}" for name, value in record.versions.items()) + ".")
    if record.settings:
        parts.append(", ".join(f"{key} {value}" for key, value in record.settings.items()) + ".")
    n_turns = max((len(row.turns) for row in record.rows), default=0)
    parts.append(f"Turns: {n_turns}. {record.began}.")
    return " ".join(parts)


def results_table(record: Record) -> str:
    """Medians with smallest and largest, and beside each how ours compares."""
    measures = [m for m in record.measures if any(row.values(m.key) for row in record.rows)]
    ratios = {m.key for m in measures if any(record.times(r.name, m.key) for r in record.rows[1:])}
    head = [""]
    for measure in measures:
        unit = f", {measure.unit}" if measure.unit and measure.unit != "B" else ""
        head += [f"{measure.label}{unit}"] + ["ours is ×"] * (measure.key in ratios)
    lines = []
    for row in record.rows:
        cells = [row.label]
        for measure in measures:
            cells.append(show(row.values(measure.key), measure.unit))
            if measure.key in ratios:
                cells.append(_ratio(record, row, measure))
        lines.append(cells)
    return table(head, lines)


def _ratio(record: Record, row: Row, measure: Measure) -> str:
    found = record.times(row.name, measure.key)
    if row.name == OURS or not found:
        return ""
    shown = f"{statistics.median(found):.2f}"
    return f"**{shown}**" if float(shown) < 1 else shown


def notes(record: Record) -> list[str]:
    """What a row says for itself, failures first."""
    failed = [f"{row.label}: {row.failed}" for row in record.rows if row.failed]
    told = [f"{row.label}: {row.facts['note']}" for row in record.rows if "note" in row.facts]
    return [*failed, *told, *record.notes]


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join(map(line, [head, ["---"] * len(head), *rows]))


def line(cells: Sequence[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def wrap(text: str) -> str:
    """Prose at the documents' width."""
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False, break_long_words=False)


# ---- figures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(values: Sequence[float], unit: str = "") -> str:
    """``median (smallest to largest)``; ``-`` without a value."""
    if not values:
        return "-"
    middle, low, high = (figure(value, unit) for value in spread(values).values())
    return middle if low == high else f"{middle} ({low} to {high})"


def figure(value: float, unit: str = "") -> str:
    """Three significant digits; bytes with their unit."""
    for factor, name in _FACTORS.get(unit, ()):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {name}"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def rounded(value: float) -> float:
    """To five significant digits; bytes stay whole."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered), max(1, math.ceil(share * len(ordered)))) - 1]


def records(folder: Path) -> Iterator[Record]:
    """All records of a folder, by name."""
    for path in sorted(folder.glob("*.json")):
        yield read(path)
