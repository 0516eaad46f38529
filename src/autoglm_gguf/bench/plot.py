"""A report as a figure: prefill and decode speed and memory over ``n_gpu_layers``.

Needs matplotlib (the ``plot`` extra), and nothing of it but the figure itself: no window system, no
global state.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from autoglm_gguf.bench.report import Report, Result, check_target, write_whole
from autoglm_gguf.errors import BenchError
from autoglm_gguf.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
_INCHES = (9.6, 3.5)
_DPI = 200
_GB = 10**9
_HEADROOM = 1.12  # above the highest bar, for its figure
_FAR = 3  # a budget this many times above every bar would flatten them
_FEW = 6  # configurations whose figures have room in full size
_SPEED, _PROCESS, _DEVICE, _BUDGET = "#1f6fb4", "#7a8b99", "#e08214", "#b2182b"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "svg.hashsalt": "autoglm-gguf",  # the same report gives the same bytes
}


def check_plot(path: Path) -> None:
    """Refuse what could not be drawn, before anything is measured.

    Raises:
        BenchError: An unknown suffix, a folder that is missing, or no matplotlib.
    """
    if path.suffix.lower() not in SUFFIXES:
        found = path.suffix or "none"
        raise BenchError(
            f"{path}: unknown kind of picture (suffix {found}, required {' or '.join(SUFFIXES)})",
            hint=f"--plot {path.with_suffix('.png')}",
        )
    check_target(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError(
            "matplotlib: not installed, and --plot draws with it",
            hint="pip install 'autoglm-gguf[plot]'",
        )


def draw_report(path: Path, report: Report) -> None:
    """Draw the configurations that were measured, side by side, into a PNG or SVG file.

    Raises:
        BenchError: Nothing was measured, or the file cannot be written; see also `check_plot`.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measured = [r for r in report.results if r.find("decode") and r.find("prefill")]
    if not measured:
        raise BenchError(f"{path}: nothing to draw (no configuration was measured)")
    labels = [report.label(result) for result in measured]
    with rc_context(_STYLE):
        figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor="white", layout="constrained")
        axes = figure.subplots(1, 3)
        n = report.settings.prompt_n[0]
        _draw_speed(axes[0], labels, measured, "prefill", f"prefill, {n} tokens")
        n = report.settings.predicted_n
        _draw_speed(axes[1], labels, measured, "decode", f"decode, {n} tokens")
        _draw_memory(axes[2], labels, measured, report.settings.memory_budget_bytes)
        for axis in axes:
            axis.set_xlabel(f"n_gpu_layers (of {report.model.block_count} and the output)")
        figure.suptitle(_title(report), fontsize=9, color="#333333")
        kind = path.suffix.lower().removeprefix(".")
        date = {"Date": None} if kind == "svg" else {}
        write_whole(path, lambda file: figure.savefig(file, format=kind, metadata=date))


def _title(report: Report) -> str:
    """Model, and where it ran: the devices that layers went to, and the CPU."""
    used = {name for result in report.results for name in result.devices}
    devices = (device.description for device in report.machine.devices if device.name in used)
    where = ", ".join((*devices, report.machine.cpu))
    return f"{report.model.file} ({format_bytes(report.model.file_bytes)}) · {where}"


def _draw_speed(
    axis: Axes, labels: list[str], results: list[Result], name: str, title: str
) -> None:
    """Medians as bars, the lowest and highest repeat as a line on each."""
    measures = [m for result in results if (m := result.find(name)) is not None]
    medians = [m.median for m in measures]
    reach = [
        [m.median - m.low for m in measures],
        [m.high - m.median for m in measures],
    ]
    axis.bar(labels, medians, width=_width(labels), color=_SPEED)
    axis.errorbar(labels, medians, yerr=reach, fmt="none", ecolor="#333333", capsize=3, lw=1)
    texts = [f"{m:.0f}" if m >= 100 else f"{m:.3g}" for m in medians]
    _label_bars(axis, [m.high for m in measures], texts)
    axis.set_title(title, fontsize=9, fontweight="bold")
    axis.set_ylabel("tokens per second")
    axis.set_ylim(0, max(m.high for m in measures) * _HEADROOM)
    _narrow(axis, labels)


def _draw_memory(
    axis: Axes, labels: list[str], results: list[Result], budget_bytes: int | None
) -> None:
    """What the process and its devices held, one above the other, and the budget as a line."""
    held = [result.held for result in results]
    device = [0.0 if h is None else h.device_bytes / _GB for h in held]
    process = [0.0 if h is None else max(0, h.peak_bytes - h.device_bytes) / _GB for h in held]
    peaks = [a + b for a, b in zip(process, device, strict=True)]
    width = _width(labels)
    axis.bar(labels, process, width=width, color=_PROCESS, label="process")
    if any(device):
        axis.bar(labels, device, bottom=process, width=width, color=_DEVICE, label="device")
    top = max(*peaks, 1e-3)
    if budget_bytes is not None and budget_bytes / _GB <= _FAR * top:
        axis.axhline(budget_bytes / _GB, color=_BUDGET, ls="--", lw=1, label="budget")
        top = max(top, budget_bytes / _GB)
    _label_bars(axis, peaks, [f"{peak:.1f}" if peak >= 1 else f"{peak:.2f}" for peak in peaks])
    axis.set_title("memory at most", fontsize=9, fontweight="bold")
    axis.set_ylabel("GB (10⁹ bytes)")
    axis.set_ylim(0, top * _HEADROOM * 1.15)  # the legend stands above the bars
    axis.legend(loc="upper center", ncols=3, frameon=False, fontsize=8, handlelength=1.2)
    _narrow(axis, labels)


def _label_bars(axis: Axes, tops: list[float], texts: list[str]) -> None:
    """Figures above their bars, legible over a line too."""
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    size = 8 if len(texts) <= _FEW else 6.5
    for at, (top, text) in enumerate(zip(tops, texts, strict=True)):
        axis.annotate(
            text,
            (at, top),
            (0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=size,
            bbox=behind,
        )


def _width(labels: list[str]) -> float:
    return 0.65 if len(labels) > 1 else 0.3


def _narrow(axis: Axes, labels: list[str]) -> None:
    """Keep the bar of a single configuration from filling the panel."""
    if len(labels) == 1:
        axis.set_xlim(-0.6, 0.6)
