"""Two saved benches side by side: what differs around them, and the ratio of their figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from autoglm_gguf.bench.report import TOKENS_PER_SECOND, Measure, Report, Result

_COMPARED = ("machine", "versions", "model", "settings")


@dataclass(frozen=True, slots=True)
class Difference:
    """A fact that is not the same in both."""

    fact: str
    """For example ``machine.cpu``."""
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure of both, in one configuration."""

    label: str
    """``n_gpu_layers``."""
    name: str
    """As `Measure.name`; ``peak_memory`` for what was held at most."""
    n: int
    unit: str
    """``tok/s``, ``ms`` or ``B`` (bytes)."""
    a: float
    b: float
    """Medians."""
    ratio: float
    """B divided by A."""
    verdict: str
    """What that says of B, for a person."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two benches say of each other."""

    differences: tuple[Difference, ...]
    ratios: tuple[Ratio, ...]
    unmatched: tuple[str, ...]
    """What only one of them has, one sentence each."""


def compare_reports(a: Report, b: Report) -> Comparison:
    """Match the configurations of two reports by ``n_gpu_layers``, and their figures by size.

    Where each has only one, they are compared whatever their layers are.
    """
    of_a, of_b = ({r.label(result): result for result in r.results} for r in (a, b))
    if len(of_a) == len(of_b) == 1 and of_a.keys() != of_b.keys():
        label = f"{next(iter(of_a))} | {next(iter(of_b))}"
        of_a, of_b = {label: a.results[0]}, {label: b.results[0]}
    ratios: list[Ratio] = []
    unmatched: list[str] = []
    for label in dict.fromkeys((*of_a, *of_b)):
        if label in of_a and label in of_b:
            ratios += _ratios(label, of_a[label], of_b[label])
            unmatched += _unmatched(label, of_a[label], of_b[label])
        else:
            unmatched.append(f"n_gpu_layers {label}: only in {'A' if label in of_a else 'B'}")
    return Comparison(tuple(_differences(a, b)), tuple(ratios), tuple(unmatched))


def _ratios(label: str, a: Result, b: Result) -> Iterator[Ratio]:
    for first in a.measures:
        second = b.find(first.name, first.n)
        if second is not None:
            ratio = round(second.median / first.median, 3)
            medians = first.median, second.median
            verdict = _verdict(first, second)
            yield Ratio(label, first.name, first.n, first.unit, *medians, ratio, verdict)
    if a.held and b.held and a.held.peak_bytes and b.held.peak_bytes:
        peaks = a.held.peak_bytes, b.held.peak_bytes
        ratio = round(peaks[1] / peaks[0], 3)
        verdict = "less memory" if ratio < 1 else "more memory" if ratio > 1 else "the same"
        yield Ratio(label, "peak_memory", 0, "B", *peaks, ratio, verdict)


def _verdict(a: Measure, b: Measure) -> str:
    """Repeats that overlap decide nothing."""
    if a.low <= b.high and b.low <= a.high:
        return "within the spread"
    more_is_better = a.unit == TOKENS_PER_SECOND
    return "faster" if (b.median > a.median) == more_is_better else "slower"


def _unmatched(label: str, a: Result, b: Result) -> Iterator[str]:
    for side, ours, theirs in (("A", a, b), ("B", b, a)):
        if ours.failed is not None:
            yield f"n_gpu_layers {label}: failed in {side} ({ours.failed})"
        for measure in ours.measures:
            if theirs.failed is None and theirs.find(measure.name, measure.n) is None:
                yield f"n_gpu_layers {label}: {_name(measure)} only in {side}"


def _name(measure: Measure) -> str:
    return f"{measure.name} {measure.n}" if measure.n else measure.name


def _differences(a: Report, b: Report) -> Iterator[Difference]:
    for part in _COMPARED:
        first, second = (_flat(part, asdict(getattr(report, part))) for report in (a, b))
        for fact in dict.fromkeys((*first, *second)):
            if first.get(fact) != second.get(fact):
                yield Difference(fact, first.get(fact), second.get(fact))


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested mappings as dotted names; what is a list stays one value."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: v for inner in value for key, v in _flat(f"{name}.{inner}", value[inner]).items()}
