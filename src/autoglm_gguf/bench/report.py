"""What a bench found, as values that can be saved, read back and compared. Measures nothing.

The saved file is these classes as JSON, field by field. ``SCHEMA`` grows when a field changes its
meaning or goes; a field that is added has a default.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autoglm_gguf.conversion.writer import open_temporary
from autoglm_gguf.errors import BenchError
from autoglm_gguf.memory.offload import ALL

SCHEMA = 1
LOAD = "load"
TOKENS_PER_SECOND = "tok/s"
MILLISECONDS = "ms"


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device of ggml's registry."""

    name: str
    description: str
    backend: str
    kind: str
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it was measured."""

    system: str
    """Name, release and architecture of the system."""
    cpu: str
    n_cores: int
    """Cores this process may use."""
    memory_bytes: int | None
    """The machine's, or the control group's where that is less; None where it is not told."""
    devices: tuple[DeviceFacts, ...]
    """Every device but the CPU."""


@dataclass(frozen=True, slots=True)
class Versions:
    """What was measured with."""

    package: str
    python: str
    llama_cpp_python: str
    llama_cpp: str
    """Commit."""
    backends: tuple[str, ...]
    """ggml's, those that have a device here."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The pair."""

    file: str
    file_bytes: int
    architecture: str
    block_count: int
    """Layers; ``n_gpu_layers`` counts the output as one more."""
    types: dict[str, int]
    """Bytes by tensor type."""
    mmproj: str | None = None
    mmproj_bytes: int = 0
    mmproj_types: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for, the same for every configuration."""

    prompt_n: tuple[int, ...]
    """Prompts, in tokens."""
    predicted_n: int
    """Tokens made after the last prompt."""
    repeats: int
    pause_s: float
    """Between configurations."""
    screen: tuple[int, int] | None
    """Width and height of the screenshot, in pixels; None: no image is encoded."""
    memory_budget_bytes: int | None
    self_test: bool
    """GPUs are compared with the CPU, once they are measured."""
    context: dict[str, Any] = field(default_factory=dict)
    """Fields of `ContextParams` that were given."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of one configuration, over its repeats."""

    name: str
    """load, prefill, ttft, decode, image_encode, image_prefill, image_ttft."""
    n: int
    """Tokens it was measured with; 0 for load."""
    unit: str
    """``tok/s`` (more is better) or ``ms`` (less is better)."""
    values: tuple[float, ...]
    """In the order they were measured; never empty."""
    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the way from the lowest to the highest value, in the unit."""
        return (self.high - self.low) / 2


def make_measure(name: str, n: int, unit: str, values: Iterable[float]) -> Measure:
    """A measure of at least one value, to four significant digits: no clock here knows more."""
    kept = tuple(float(f"{value:.4g}") for value in values)
    middle = float(f"{statistics.median(kept):.4g}")
    return Measure(name, n, unit, kept, middle, min(kept), max(kept))


@dataclass(frozen=True, slots=True)
class Held:
    """What the process held up to the end of its first run; nothing else had run in it."""

    planned_bytes: int
    """The plan's peak, devices included."""
    planned_device_bytes: int
    """Of it, what the plan put on devices."""
    peak_bytes: int
    """Process and devices together, at most. 0 where the system does not tell, as the next two."""
    anonymous_bytes: int
    """Allocated, at the end of the run."""
    mapped_bytes: int
    """Pages of files in the process, at the end of the run."""
    device_bytes: int
    """Buffers on devices."""
    buffers: dict[str, int]
    """Weights, KV cache and scratch by the place ggml names: ``CPU_Mapped``, ``Vulkan0``."""


@dataclass(frozen=True, slots=True)
class Result:
    """One configuration."""

    n_gpu_layers: int | str
    """``block_count`` + 1 where all are on the GPU; text where it failed before it was chosen."""
    devices: tuple[str, ...] = ()
    """The GPUs that hold them."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """Sizes and places after planning; empty if it failed before."""
    measures: tuple[Measure, ...] = ()
    held: Held | None = None
    notes: tuple[str, ...] = ()
    failed: str | None = None
    """Why it was not measured to its end."""

    def find(self, name: str, n: int | None = None) -> Measure | None:
        """The measure of that name, the first one if ``n`` is not given; None without one."""
        found = (m for m in self.measures if m.name == name and n in (None, m.n))
        return next(found, None)


@dataclass(frozen=True, slots=True)
class Report:
    """A whole bench."""

    schema: int
    complete: bool
    """False: it was interrupted, and configurations are missing or have fewer repeats."""
    started: str
    """ISO 8601, UTC."""
    machine: Machine
    versions: Versions
    model: ModelFacts
    settings: Settings
    results: tuple[Result, ...] = ()
    notes: tuple[str, ...] = ()

    def label(self, result: Result) -> str:
        """``n_gpu_layers`` as a person names it: a number, or ``all``."""
        return (
            ALL if result.n_gpu_layers == self.model.block_count + 1 else str(result.n_gpu_layers)
        )


def write_report(path: Path, report: Report) -> None:
    """Save a report as JSON, whole or not at all.

    Raises:
        BenchError: The file cannot be written.
    """
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False)
    write_whole(path, lambda temporary: temporary.write_text(f"{text}\n", "utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name, then give it its own; links are followed.

    Raises:
        BenchError: The file cannot be written; what stood there before stands there still.
    """
    try:
        target = path.resolve()
        with open_temporary(target) as temporary:
            write(temporary)
            temporary.replace(target)
    except OSError as error:
        raise _cannot_write(path, error.strerror or str(error)) from error


def check_target(path: Path) -> None:
    """Refuse a file that could not be written, before hours of measuring.

    Raises:
        BenchError: Its folder is missing or closed to us, or it is there and no regular file.
    """
    folder = path.parent
    if not folder.is_dir():
        raise BenchError(f"{path}: no such folder ({folder})", hint=f"mkdir -p {folder}")
    if path.is_dir():
        raise BenchError(f"{path}: a folder, not a file", hint="give a file name")
    if path.exists() and not path.is_file():  # /dev/null and /dev/stdout would be replaced
        raise BenchError(f"{path}: not a regular file", hint="give the name of a new file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _cannot_write(path, f"no right to write in {folder}")


def _cannot_write(path: Path, why: str) -> BenchError:
    return BenchError(f"{path}: cannot be written ({why})", hint="give another file")


def read_report(path: Path) -> Report:
    """Read a saved report.

    Raises:
        BenchError: No such file, no saved bench, or one of another schema.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        raw = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise BenchError(
            f"{path}: cannot be read ({error.strerror or error})",
            hint="make one with: autoglm-gguf bench MODEL --save FILE",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _no_report(path, "not JSON") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is not int:
        raise _no_report(path, "no schema number")
    if schema != SCHEMA:
        raise BenchError(
            f"{path}: saved by another version (schema {schema}, required {SCHEMA})",
            hint="measure again with this version, or compare with the version that saved it",
        )
    try:
        report = TypeAdapter(Report).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _no_report(path, f"{where}: {first['msg']}") from error
    wrong = next(_wrong_figures(report), None)
    if wrong is not None:
        raise _no_report(path, wrong)
    return report


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}: not JSON")  # Python reads NaN and Infinity as numbers


def _wrong_figures(report: Report) -> Iterator[str]:
    """What no bench has measured."""
    for n, result in enumerate(report.results):
        for m, measure in enumerate(result.measures):
            where = f"results.{n}.measures.{m}"
            if measure.unit not in (TOKENS_PER_SECOND, MILLISECONDS):
                yield f"{where}.unit: {measure.unit!r}"
            if not measure.values:
                yield f"{where}.values: none"
            for name in ("median", "low", "high"):
                if not 0 < (value := getattr(measure, name)) < math.inf:
                    yield f"{where}.{name}: {value}"
        for name, value in [] if result.held is None else asdict(result.held).items():
            if isinstance(value, int) and value < 0:
                yield f"results.{n}.held.{name}: {value}"


def _no_report(path: Path, why: str) -> BenchError:
    return BenchError(
        f"{path}: not a saved bench ({why})",
        hint="make one with: autoglm-gguf bench MODEL --save FILE",
    )
