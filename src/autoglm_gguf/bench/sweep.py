"""Configurations one after another, each in a process of its own.

A driver that ends the process, or a system that runs out of memory, costs one configuration. What
was measured is in `Bench.report` at every moment, also after an interrupt.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autoglm_gguf.bench.process import Worker, probe_machine
from autoglm_gguf.bench.report import (
    LOAD,
    SCHEMA,
    TOKENS_PER_SECOND,
    Held,
    Measure,
    ModelFacts,
    Report,
    Result,
    Settings,
    make_measure,
)
from autoglm_gguf.bench.worker import Job
from autoglm_gguf.config import ContextParams
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.describe import describe_pair
from autoglm_gguf.gguf.header import Header
from autoglm_gguf.hub import resolve_pair
from autoglm_gguf.memory.estimate import round_n_ctx
from autoglm_gguf.memory.offload import ALL, AUTO, parse_layers

SCREEN = (1080, 2400)
"""Width and height of the phones whose screenshots are encoded, in pixels."""
_MAX_TOKENS = 2**20
_SLOWER = 0.9  # repeats below this share of the first one's speed are told


@dataclass(frozen=True, slots=True)
class Stage:
    """What is being measured now."""

    label: str
    """``n_gpu_layers`` of the configuration."""
    position: int
    """1 for the first configuration."""
    n_configurations: int
    run: int
    """0 while it warms up."""
    repeats: int
    what: str


OnStage = Callable[[Stage], None]


def parse_sweep(text: str) -> tuple[int | str, ...]:
    """Read ``"0,8,16,all"``.

    Raises:
        ValueError: Something else than whole numbers from 0 and ``all``.
    """
    found: list[int | str] = []
    for part in text.split(","):
        word = part.strip()
        if word != ALL and not (word.isascii() and word.isdigit() and len(word) < 6):
            raise ValueError(f"layers {text!r}: {word!r} is no number (write for example 0,8,all)")
        found.append(word if word == ALL else int(word))
    return tuple(found)


class Bench:
    """A bench of one pair.

    Everything that can be refused is refused here; measuring starts with `run`.

    Args:
        model: A text GGUF, or a directory with one.
        mmproj: The vision tower; ``"auto"`` looks beside the model, None leaves it out.
        settings: What to measure.
        layers: A sweep over these ``n_gpu_layers``, ``"all"`` allowed, where it is empty over none,
            a quarter, half, three quarters and all; on a machine without a GPU device only 0 is
            measured. None makes no sweep: the value is ``settings.context``'s.

    Raises:
        ValueError, TypeError: A setting out of range, layers that the model does not have.
        GGUFError: A file is missing, broken or of another kind.
        BenchError: A device that is not there; the devices cannot be listed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        mmproj: str | os.PathLike[str] | None = "auto",
        settings: Settings,
        layers: Sequence[int | str] | None = None,
    ) -> None:
        settings = _check_settings(settings)
        text, tower = resolve_pair(model, mmproj)
        described = describe_pair(text, tower)
        facts = _model_facts(described.text, described.mmproj)
        if described.vision is None:
            settings = replace(settings, screen=None)
        wanted = None if layers is None else _resolve_layers(layers, facts.block_count)
        machine, versions, no_gpu = probe_machine(settings.context.get("device"))
        notes: tuple[str, ...] = ()
        if wanted is not None and no_gpu:
            told = f"{no_gpu}: the CPU alone is measured (autoglm-gguf doctor tells more)"
            wanted, notes = (0,), (told,)
        self._text, self._tower, self._layers = text, tower, wanted
        self.report = Report(
            schema=SCHEMA,
            complete=False,
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=machine,
            versions=versions,
            model=facts,
            settings=settings,
            notes=notes,
        )

    def run(self, on_stage: OnStage) -> Iterator[Result]:
        """Measure every configuration, the one that fails included; each is yielded when done.

        Closing the iterator, or an exception out of ``on_stage``, ends the measuring process; the
        repeats that it had finished are kept in `report`.
        """
        settings = self.report.settings
        contexts = (
            [settings.context]
            if self._layers is None
            else [{**settings.context, "n_gpu_layers": n} for n in self._layers]
        )
        for position, context in enumerate(contexts, start=1):
            if position > 1:
                time.sleep(settings.pause_s)
            yield self._measure(context, (position, len(contexts)), on_stage)
        self.report = replace(self.report, complete=True)

    def _measure(
        self, context: Mapping[str, Any], place: tuple[int, int], on_stage: OnStage
    ) -> Result:
        settings = self.report.settings
        gathered = _Gathered(context.get("n_gpu_layers", AUTO))
        label = self.report.label(Result(gathered.n_gpu_layers))
        job = Job(
            text=str(self._text),
            mmproj=None if self._tower is None else str(self._tower),
            memory_budget_bytes=settings.memory_budget_bytes,
            context=dict(context),
            prompt_n=list(settings.prompt_n),
            predicted_n=settings.predicted_n,
            repeats=settings.repeats,
            self_test=settings.self_test,
            screen=None if settings.screen is None else list(settings.screen),
        )
        try:
            with Worker(job) as worker:
                for message in worker.messages():
                    if message["event"] == "stage":
                        run, what = int(message["run"]), str(message["what"])
                        on_stage(Stage(label, *place, run, settings.repeats, what))
                    gathered.add(message)
                gathered.end(worker.end())
        except BaseException:
            if gathered.n_figures:
                gathered.end("interrupted")
                self._keep(gathered.result())
            raise
        result = gathered.result()
        self._keep(result)
        return result

    def _keep(self, result: Result) -> None:
        self.report = replace(self.report, results=(*self.report.results, result))


@dataclass(slots=True)
class _Gathered:
    """One configuration's messages, added up."""

    n_gpu_layers: int | str
    devices: tuple[str, ...] = ()
    chosen: dict[str, Any] = field(default_factory=dict)
    figures: dict[tuple[str, int, str], list[float]] = field(default_factory=dict)
    held: Held | None = None
    notes: list[str] = field(default_factory=list)
    failed: str | None = None
    is_done: bool = False

    @property
    def n_figures(self) -> int:
        return sum(map(len, self.figures.values()))

    def add(self, message: dict[str, Any]) -> None:
        event = message.pop("event")
        if event == "planned":
            self.chosen, self.notes = message["chosen"], message["notes"]
            self.devices = tuple(message["devices"])
            self.n_gpu_layers = self.chosen["n_gpu_layers"]
        elif event == "noted":
            self.notes = [*self.notes, *message["notes"]]
        elif event == "held":
            self.held = Held(**message)
        elif event == "figures":
            for name, n, unit, value in message["figures"]:
                self.figures.setdefault((name, n, unit), []).append(value)
        elif event == "failed":
            self.failed = message["message"]
            if message["hint"]:
                self.failed += f"; {message['hint']}"
        elif event == "done":
            self.is_done = True

    def end(self, how: str) -> None:
        """The process has ended; ``how`` counts unless it told its end itself."""
        if not self.is_done and self.failed is None:
            self.failed = how

    def result(self) -> Result:
        """Load first, the rest as measured."""
        measures = [make_measure(*key, values) for key, values in self.figures.items()]
        measures.sort(key=lambda measure: measure.name != LOAD)
        slowing = [note for measure in measures if (note := _slowing(measure))]
        return Result(
            self.n_gpu_layers,
            self.devices,
            self.chosen,
            tuple(measures),
            self.held,
            (*self.notes, *slowing),
            self.failed,
        )


def _slowing(measure: Measure) -> str | None:
    """A remark where the last repeat and the middle one of the later ones are slower."""
    if measure.name not in ("prefill", "decode", "image_encode") or len(measure.values) < 2:
        return None
    faster = measure.unit == TOKENS_PER_SECOND
    speeds = [value if faster else 1 / value for value in measure.values]
    later = sorted(speeds[1:])[(len(speeds) - 1) // 2]
    if max(later, speeds[-1]) >= _SLOWER * speeds[0]:
        return None
    told = ", ".join(f"{value:g}" for value in measure.values)
    return (
        f"{measure.name} {measure.n} slows as it repeats ({told} {measure.unit}): "
        "heat, a power limit, or other work on this machine"
    )


# --- what can be refused ---


def _check_settings(settings: Settings) -> Settings:
    """The settings, with an n_ctx that holds prompt and answer where the default would not."""
    if not settings.prompt_n:
        raise ValueError("prompt_n: none given")
    for name, n in (
        *(("prompt_n", n) for n in settings.prompt_n),
        ("predicted_n", settings.predicted_n),
    ):
        if not 1 <= n <= _MAX_TOKENS:
            raise ValueError(f"{name} {n}: not in 1..{_MAX_TOKENS}")
    if not 1 <= settings.repeats <= 1000:
        raise ValueError(f"repeats {settings.repeats}: not in 1..1000")
    if not 0 <= settings.pause_s <= 86_400:
        raise ValueError(f"pause {settings.pause_s}: not in 0..86400 seconds")
    context = dict(settings.context)
    required = max(settings.prompt_n) + settings.predicted_n
    layers = parse_layers(context.get("n_gpu_layers"))
    n_ctx = ContextParams(**{**context, "n_gpu_layers": layers or 0}).n_ctx
    if required > n_ctx and "n_ctx" in context:
        raise ValueError(f"n_ctx {n_ctx}: too small for prompt and answer ({required} tokens)")
    if required > n_ctx:
        context["n_ctx"] = round_n_ctx(required)
    return replace(settings, context=context)


def _resolve_layers(layers: Sequence[int | str], block_count: int) -> tuple[int, ...]:
    most = block_count + 1  # llama.cpp counts the output as one more
    quarters = (*(round(block_count * share / 4) for share in range(4)), most)
    numbers = [most if n == ALL else int(n) for n in layers or quarters]
    for n in numbers:
        if n > most:
            raise ValueError(
                f"layers {n}: the model has {block_count} and its output ({most} is all)"
            )
    return tuple(dict.fromkeys(numbers))


def _model_facts(text: Header, tower: Header | None) -> ModelFacts:
    return ModelFacts(
        file=text.path.name,
        file_bytes=text.file_bytes,
        architecture=text.architecture,
        block_count=text.get_int(names.BLOCK_COUNT) or 0,
        types=_types(text),
        mmproj=None if tower is None else tower.path.name,
        mmproj_bytes=0 if tower is None else tower.file_bytes,
        mmproj_types={} if tower is None else _types(tower),
    )


def _types(header: Header) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in header.tensors.values():
        found[tensor.type_name] = found.get(tensor.type_name, 0) + tensor.n_bytes
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))
