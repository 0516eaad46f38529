"""``autoglm-gguf bench``: how fast a model runs here and what it holds, by layers on the GPU.

Draws tables; measuring, saving, comparing and plotting are ``bench``'s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autoglm_gguf.bench.compare import Comparison, Ratio, compare_reports
from autoglm_gguf.bench.plot import SUFFIXES, check_plot, draw_report
from autoglm_gguf.bench.report import (
    LOAD,
    MILLISECONDS,
    Measure,
    Report,
    Result,
    Settings,
    check_target,
    read_report,
    write_report,
)
from autoglm_gguf.bench.sweep import SCREEN, Bench, Stage, parse_sweep
from autoglm_gguf.cli import options, output
from autoglm_gguf.errors import BenchError
from autoglm_gguf.memory.budget import parse_budget
from autoglm_gguf.units import format_bytes


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("bench", help="measure speed and memory, by layers on the GPU")
    options.add_memory_options(parser)
    add = parser.add_argument
    add("--n-threads", type=int, metavar="N", help="default: usable cores")
    add("--sweep-gpu-layers", action="store_true", help="with 0, a few and all layers on the GPU")
    add("--layers", metavar="LIST", help="the sweep's values, for example 0,8,16,all")
    add("--prompt-n", metavar="LIST", default="512", help="prompts, tokens (default: %(default)s)")
    add("--predicted-n", type=int, default=64, metavar="N", help="answer, tokens (default: 64)")
    add("--repeats", type=int, default=3, metavar="N", help="besides the warm-up (default: 3)")
    add("--pause", type=float, default=0.0, metavar="S", help="seconds between configurations")
    add("--no-image", action="store_true", help="leave the screenshot out")
    options.add_self_test_option(parser)
    add("--json", action="store_true", help="print everything as JSON")
    add("--save", type=Path, metavar="FILE", help="write everything as JSON, for --compare")
    add("--plot", type=Path, metavar="FILE", help=f"draw it ({' or '.join(SUFFIXES)})")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two saved benches, side by side")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure, or compare what was measured."""
    if arguments.compare is not None:
        if arguments.model is not None:
            raise ValueError("--compare: takes two saved benches and no MODEL")
        for option, path in (("--plot", arguments.plot), ("--save", arguments.save)):
            if path is not None:
                raise ValueError(f"{option}: writes what is measured (--compare measures nothing)")
        _compare(*arguments.compare, as_json=arguments.json)
        return
    layers = _layers(arguments)
    settings = _settings(arguments)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    if arguments.save is not None:
        check_target(arguments.save)
    model, mmproj = options.find_model(arguments)
    bench = Bench(model, mmproj=mmproj, settings=settings, layers=layers)
    for note in bench.report.notes:
        output.note(f"note: {note}")
    try:
        line = _StageLine()
        for result in bench.run(line):
            line.end()
            output.note(_summary(bench.report, result))
            if arguments.save is not None:
                _save_meanwhile(arguments.save, bench.report)
    except KeyboardInterrupt:
        line.end()
        if bench.report.results:
            _finish(bench.report, arguments)
        raise
    _finish(bench.report, arguments)
    failed = [result.failed for result in bench.report.results if result.failed is not None]
    if len(failed) == len(bench.report.results):
        raise BenchError(f"{bench.report.model.file}: nothing measured to its end ({failed[0]})")


def _layers(arguments: argparse.Namespace) -> Sequence[int | str] | None:
    """The sweep's values, none of them for a spread over the model's; None without a sweep."""
    if not arguments.sweep_gpu_layers and arguments.layers is None:
        return None
    if arguments.n_gpu_layers is not None:
        raise ValueError("--n-gpu-layers: a sweep chooses it (give its values with --layers)")
    return () if arguments.layers is None else parse_sweep(arguments.layers)


def _settings(arguments: argparse.Namespace) -> Settings:
    context = options.memory_arguments(arguments)
    budget = context.pop("memory_budget")
    if arguments.n_threads is not None:
        context["n_threads"] = arguments.n_threads
    return Settings(
        prompt_n=_numbers(arguments.prompt_n),
        predicted_n=arguments.predicted_n,
        repeats=arguments.repeats,
        pause_s=arguments.pause,
        screen=None if arguments.no_image else SCREEN,
        memory_budget_bytes=parse_budget(budget),
        self_test=arguments.self_test,
        context=context,
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"prompt_n {text!r}: write for example 512 or 128,512") from None


def _save_meanwhile(path: Path, report: Report) -> None:
    """Save what there is; a failure may pass, and what is still to be measured is not lost."""
    try:
        write_report(path, report)
    except BenchError as error:
        output.note(f"note: {error.message}")


def _finish(report: Report, arguments: argparse.Namespace) -> None:
    """Print what there is, then write the files; without a figure there is no table."""
    measured = any(result.measures for result in report.results)
    if arguments.json:
        output.write_json(asdict(report))
    elif measured:
        for line in draw_table(report):
            output.write(line)
    if arguments.save is not None:
        write_report(arguments.save, report)
        output.note(f"saved: {arguments.save}")
    if arguments.plot is not None and measured:
        draw_report(arguments.plot, report)
        output.note(f"plot: {arguments.plot}")


class _StageLine:
    """What is measured now: a line drawn over, or one per repeat when piped."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown: tuple[int, int] | None = None

    def __call__(self, stage: Stage) -> None:
        """Show it."""
        run = f"repeat {stage.run} of {stage.repeats}" if stage.run else "warm-up"
        line = f"[{stage.position} of {stage.n_configurations}] n_gpu_layers {stage.label}: {run}"
        if self._live:
            output.note(f"\r\x1b[K{line}, {stage.what}", end="")
        elif self._shown != (stage.position, stage.run) and stage.what != LOAD:
            output.note(line)
        self._shown = (stage.position, stage.run)

    def end(self) -> None:
        """Make room for other lines."""
        if self._live and self._shown is not None:
            output.note("\r\x1b[K", end="")


def _summary(report: Report, result: Result) -> str:
    """One configuration in a line, while the others run."""
    found = [f"failed: {result.failed}"] if result.failed is not None else []
    for name in ("prefill", "decode"):
        if (measure := result.find(name)) is not None:
            found.append(f"{name} {_digits(measure.median)} {measure.unit}")
    if result.held is not None:
        found.append(f"{format_bytes(result.held.peak_bytes)} at most")
    return f"n_gpu_layers {report.label(result)}: {', '.join(found)}"


# --- tables ---


def draw_table(report: Report) -> Iterator[str]:
    """Where and with what, a row for each configuration, and what is to be said of them."""
    yield from _heading(report)
    columns = dict.fromkeys((m.name, m.n) for result in report.results for m in result.measures)
    rows = [
        ["n_gpu_layers", *(name for name, _ in columns), "peak", "on devices"],
        ["", *(str(n or "") for _, n in columns), "", ""],
        ["", *(_unit(report, *column) for column in columns), "", ""],
    ]
    for result in report.results:
        cells = [_cell(result.find(*column)) for column in columns]
        held = result.held
        sizes = ("-", "-") if held is None else (held.peak_bytes, held.device_bytes)
        rows.append([report.label(result), *cells, *map(_size, sizes)])
    yield from _align(rows)
    yield ""
    yield from _remarks(report)


def _heading(report: Report) -> Iterator[str]:
    machine, versions, model, settings = (
        report.machine,
        report.versions,
        report.model,
        report.settings,
    )
    yield f"{model.file}: {_pair(model.file_bytes, model.types)}"
    if model.mmproj is not None:
        yield f"{model.mmproj}: {_pair(model.mmproj_bytes, model.mmproj_types)}"
    memory = "unknown" if machine.memory_bytes is None else format_bytes(machine.memory_bytes)
    yield f"{machine.cpu}, {machine.n_cores} cores, {memory}; {machine.system}"
    for device in machine.devices:
        yield f"{device.name}: {device.description}, {format_bytes(device.total_bytes)}"
    yield (
        f"autoglm-gguf {versions.package}, llama-cpp-python {versions.llama_cpp_python} "
        f"({versions.llama_cpp[:9]}), {' '.join(versions.backends)}, Python {versions.python}"
    )
    budget = settings.memory_budget_bytes
    told = "no memory budget" if budget is None else f"memory budget {format_bytes(budget)}"
    given = "".join(f", {key} {value}" for key, value in settings.context.items())
    n = settings.repeats
    yield f"{f'medians of {n}, ± half the spread' if n > 1 else 'one run'}; {told}{given}"
    yield ""


def _pair(n_bytes: int, types: dict[str, int]) -> str:
    total = max(1, sum(types.values()))
    shares = ", ".join(f"{kind} {n / total:.0%}" for kind, n in types.items() if 200 * n >= total)
    return f"{format_bytes(n_bytes)} ({shares})"


def _unit(report: Report, name: str, n: int) -> str:
    found = (m.unit for result in report.results if (m := result.find(name, n)) is not None)
    return "s" if (unit := next(found)) == MILLISECONDS else unit


def _cell(measure: Measure | None) -> str:
    if measure is None:
        return "-"
    factor = 1000 if measure.unit == MILLISECONDS else 1
    spread = f" ±{_digits(measure.spread / factor)}" if len(measure.values) > 1 else ""
    return f"{_digits(measure.median / factor)}{spread}"


def _size(n_bytes: int | str) -> str:
    return format_bytes(n_bytes) if isinstance(n_bytes, int) and n_bytes else "-"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _align(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> Iterator[str]:
    """Columns to the right, but for some."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            f"{text:<{width}}" if at in left else f"{text:>{width}}"
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _remarks(report: Report) -> Iterator[str]:
    """Failures, and notes: once where every configuration has them."""
    every = [set(result.notes) for result in report.results]
    common = set.intersection(*every) if every else set()
    yield from (f"note: {note}" for note in report.notes)
    if report.results:
        yield from (f"note: {note}" for note in report.results[0].notes if note in common)
    for result in report.results:
        label = f"n_gpu_layers {report.label(result)}"
        yield from (f"{label}: {note}" for note in result.notes if note not in common)
        if result.failed is not None:
            yield f"{label}: failed: {result.failed}"
    if not report.complete:
        yield "interrupted: configurations or repeats are missing"


# --- two of them ---


def _compare(path_a: Path, path_b: Path, *, as_json: bool) -> None:
    a, b = read_report(path_a), read_report(path_b)
    found = compare_reports(a, b)
    if as_json:
        output.write_json(asdict(found))
        return
    lines = (
        f"A: {path_a}, {a.started}{'' if a.complete else ', interrupted'}",
        f"B: {path_b}, {b.started}{'' if b.complete else ', interrupted'}",
        *draw_comparison(found),
    )
    for line in lines:  # a file may come from anywhere: nothing of it moves the cursor
        output.write("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))


def draw_comparison(found: Comparison) -> Iterator[str]:
    """What differs around the figures, then the figures."""
    for difference in found.differences:
        yield f"differs: {difference.fact}: {_told(difference.a)} | {_told(difference.b)}"
    yield ""
    rows = [["n_gpu_layers", "", "A", "B", "B / A", ""]]
    for ratio in found.ratios:
        name = f"{ratio.name} {ratio.n or ''}".strip()
        figures = (_figure(ratio, value) for value in (ratio.a, ratio.b))
        rows.append([ratio.label, name, *figures, f"{ratio.ratio:.2f}", ratio.verdict])
    yield from _align(rows, left=(0, 1, 5))
    yield from found.unmatched
    if not found.ratios:
        yield "nothing in common: no configuration and size was measured in both"


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_told, value)) or "none"
    if isinstance(value, dict):
        return str(value.get("description") or value)
    return "none" if value is None else str(value)


def _figure(ratio: Ratio, value: float) -> str:
    if ratio.unit == "B":
        return format_bytes(round(value))
    if ratio.unit == MILLISECONDS:
        return f"{_digits(value / 1000)} s"
    return f"{_digits(value)} {ratio.unit}"
