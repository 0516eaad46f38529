"""How long an answer goes on after it was cancelled, and the longest step that cannot be cut short.

``model.cancel()`` from another thread, or Ctrl-C (SIGINT to the own process), at a random moment of
the prompt's evaluation, of an image's encoding, or of making tokens; until the stream has ended.
llama.cpp asks between the nodes of its graph whether to go on, so the longest node stands beside
it: each node timed by itself, the quietest of three runs. Screenshots are noise. Prints Markdown.

    python benchmarks/cancel.py PAIR_FOLDER [--image-tokens 544 1024] [--n-batch 512 256 128]
        [--repeats 30] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import frame
import numpy as np
from frame import Measure, Record, Row
from numpy.typing import NDArray
from PIL import Image

from autoglm_gguf import AutoGLM, plan_memory
from autoglm_gguf.engine import llama as engine_module
from autoglm_gguf.engine.base import ImageEmbedding
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.hub import resolve_pair
from autoglm_gguf.native.ggml import tensor_name
from autoglm_gguf.native.llama import LlamaContext
from autoglm_gguf.native.mtmd import VisionTower

PHASES = ("prefill", "encode", "decode")
WAYS = ("cancel()", "Ctrl-C")
GRIDS = {544: (16, 34), 1024: (32, 32)}
N_TEXT = 512  # tokens after the image
N_DECODED = 32
N_QUIET = 3  # runs of which the quietest counts for a node
MOST_TRIES = 5  # a moment may fall behind the phase's end: then it is tried again


# ---- where a run is


class WatchedEngine(LlamaEngine):
    """Says in which phase it is, and wakes who waits for one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # A random model would end its answer soon.
        self._info = replace(self._info, stop_ids=frozenset(), stop_strings=())
        self.awaited, self.phase = "", ""
        self.begun = threading.Event()

    def arm(self, phase: str) -> None:
        """Wait for a phase."""
        self.awaited, self.phase = phase, ""
        self.begun.clear()

    def _enter(self, phase: str) -> None:
        self.phase = phase
        if phase == self.awaited:
            self.begun.set()

    def encode_image(self, pixels: NDArray[np.uint8], grid: tuple[int, int]) -> ImageEmbedding:
        self._enter("encode")
        return super().encode_image(pixels, grid)

    def eval_image(self, image: ImageEmbedding) -> None:
        self._enter("prefill")
        super().eval_image(image)

    def eval_tokens(self, tokens: Any, *, n_outputs: int = 1) -> None:
        self._enter("decode" if len(tokens) == 1 else "prefill")
        super().eval_tokens(tokens, n_outputs=n_outputs)


# ---- the longest node


@dataclass
class Nodes:
    """Milliseconds of every node of a graph: the longest of a name, in its quietest run."""

    longest: dict[str, float] = field(default_factory=dict)
    quietest: dict[str, float] = field(default_factory=dict)
    since: float = 0.0

    def end_run(self) -> None:
        """What follows is measured anew."""
        for name, ms in self.longest.items():
            self.quietest[name] = min(self.quietest.get(name, ms), ms)
        self.longest = {}

    def look(self, tensor: int, ask: bool) -> None:
        """llama.cpp asks before a node whether to stop behind it, and calls again when it is."""
        now = time.perf_counter()
        if ask:
            self.since = now
        else:
            name = tensor_name(tensor).decode()
            self.longest[name] = max(self.longest.get(name, 0.0), 1000 * (now - self.since))

    def worst(self) -> tuple[str, float]:
        """Name and milliseconds."""
        return max(self.quietest.items(), key=lambda item: item[1])


class TimedContext(LlamaContext):
    """Computes node by node."""

    nodes = Nodes()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "on_layer": lambda _: None})

    def _on_node(self, _names: Any, _on_layer: Any, tensor: int, ask: bool, _data: Any) -> bool:
        self.nodes.look(tensor, ask)
        return True


class TimedTower(VisionTower):
    """Looks where it always looks: behind each long node, with the short ones before it."""

    nodes = Nodes()

    def _on_node(self, tensor: int, ask: bool, data: Any) -> bool:
        self.nodes.look(tensor, ask)
        return super()._on_node(tensor, ask, data)


def open_engine(pair: tuple[Path, Path], n_batch: int, n_threads: int) -> WatchedEngine:
    """Held as `AutoGLM.load` holds it where memory is no matter."""
    sizes = {"n_ctx": 2560, "n_batch": n_batch, "n_threads": n_threads, "n_gpu_layers": 0}
    plan = plan_memory(pair[0], mmproj=pair[1], memory_budget="none", **sizes)
    return WatchedEngine(*pair, plan.context, plan=plan)


def find_longest(
    pair: tuple[Path, Path], n_batch: int, n_threads: int, n_image: int
) -> dict[str, tuple[str, float]]:
    """The longest node of each phase, name and milliseconds."""
    prefill, encode, decode = Nodes(), Nodes(), Nodes()
    TimedTower.nodes = encode
    with (
        mock.patch.object(engine_module, "LlamaContext", TimedContext),
        mock.patch.object(engine_module, "VisionTower", TimedTower),
    ):
        engine = open_engine(pair, n_batch, n_threads)
        grid = GRIDS[n_image]
        tokens = random_tokens(engine, N_TEXT)
        for run in range(N_QUIET):
            print(f"{n_image} tokens, n_batch {n_batch}: nodes, run {run + 1}", file=sys.stderr)
            TimedContext.nodes = prefill
            engine.keep(0)
            engine.eval_image(engine.encode_image(noise(grid, 0), grid))
            for at in range(0, len(tokens), engine.n_batch):
                engine.eval_tokens(tokens[at : at + engine.n_batch])
            TimedContext.nodes = decode
            engine.eval_tokens(tokens[:1])
            for nodes in (prefill, encode, decode):
                nodes.end_run()
        engine.close()
    every = zip(PHASES, (prefill, encode, decode), strict=True)
    return {phase: nodes.worst() for phase, nodes in every}


def random_tokens(engine: LlamaEngine, n: int) -> list[int]:
    """Plain ones: the vocabulary's specials stand at its end."""
    rng = random.Random(0)
    return [rng.randrange(engine.info.n_vocab // 2) for _ in range(n)]


def noise(grid: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Pixels of an image that needs no resize."""
    size = (28 * grid[1], 28 * grid[0], 3)
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


# ---- cancelling


class Bench:
    """One model, asked the same thing again and again."""

    def __init__(self, engine: WatchedEngine, n_image: int, seed: int) -> None:
        self._engine, self._model, self._n_image = engine, AutoGLM(engine), n_image
        self._rng = random.Random(seed)
        self._n_screens = 0
        self._text = " ".join(f"{n}" for n in range(N_TEXT // 2))  # a digit group and a space each
        self.spans = self._measure()
        """Seconds of each phase when nobody cancels it."""

    def close(self) -> None:
        self._model.close()

    def _open(self, phase: str) -> Iterator[Any]:
        """A request whose long phase is the one asked for."""
        if phase == "encode":
            self._n_screens += 1
        screen = Image.fromarray(noise(GRIDS[self._n_image], self._n_screens))
        return self._model.stream(
            self._text,
            image=screen,
            max_tokens=N_DECODED if phase == "decode" else 1,
            n_draft=0,
            cache_prompt=phase == "decode",
        )

    def _measure(self) -> dict[str, float]:
        list(self._open("encode"))
        encode = list(self._open("encode"))[-1].timings
        decode = list(self._open("decode"))[-1].timings
        spans = (encode.prompt_ms, encode.image_ms, decode.predicted_ms)
        return {phase: ms / 1000 for phase, ms in zip(PHASES, spans, strict=True)}

    def cancel(self, phase: str, way: str) -> float:
        """Seconds from the wish to the stream's end.

        Raises:
            RuntimeError: The phase was over each time before the moment came.
        """
        for _ in range(MOST_TRIES):
            found = self._try(phase, way, self._rng.uniform(0, 0.95) * self.spans[phase])
            if found is not None:
                return found
        raise RuntimeError(f"{phase}: over before it could be cancelled, {MOST_TRIES} times")

    def _try(self, phase: str, way: str, delay: float) -> float | None:
        engine, asked = self._engine, [0.0, ""]
        engine.arm(phase)

        def ask() -> None:
            if not engine.begun.wait(600):
                return
            time.sleep(delay)
            asked[:] = time.perf_counter(), engine.phase
            if way == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                self._model.cancel()

        asker = threading.Thread(target=ask)
        ended, reason = 0.0, ""
        try:
            asker.start()
            reason = list(self._open(phase))[-1].finish_reason
            ended = time.perf_counter()
            asker.join()
            time.sleep(0.01)  # a Ctrl-C that came too late is raised here
        except KeyboardInterrupt:
            if not reason:
                reason, ended = "cancelled", time.perf_counter()
        asker.join()
        was_right = reason == "cancelled" and asked[1] == phase
        return ended - float(asked[0]) if was_right else None


# ---- the table


def open_record(arguments: argparse.Namespace, pair: tuple[Path, Path]) -> Record:
    sizes = " and ".join(frame.figure(path.stat().st_size, "B") for path in pair)
    settings = {
        "model": f"{pair[0].name} and {pair[1].name} ({sizes})",
        "n_threads": arguments.threads,
        "prompt": f"an image and {N_TEXT} tokens of text or a few more",
        "moments": "random",
    }
    measures = [
        Measure("ended_ms", "ended after", "ms"),
        Measure("p95_ms", "p95", "ms"),
        Measure("whole_ms", "takes uncancelled", "ms"),
        Measure("node_ms", "longest node", "ms"),
    ]
    return frame.begin("cancel", "How long an answer goes on", measures, {}, settings)


def fill(bench: Bench, row: Row, phase: str, way: str, n_repeats: int) -> None:
    """Cancel a phase in one way, again and again."""
    for n in range(n_repeats):
        row.turns.append({"ended_ms": frame.rounded(1000 * bench.cancel(phase, way))})
        frame.tell(f"{row.label} {n + 1}: {row.turns[-1]['ended_ms']:.1f} ms")
    row.turns[0]["p95_ms"] = frame.percentile(row.values("ended_ms"), 0.95)
    row.turns[0]["whole_ms"] = frame.rounded(1000 * bench.spans[phase])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    frame.add_options(parser, repeats=30)
    parser.add_argument("model", type=Path)
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[544, 1024], choices=GRIDS)
    parser.add_argument("--n-batch", type=int, nargs="+", default=[512, 256, 128])
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    pair = resolve_pair(arguments.model, "auto")
    record = open_record(arguments, pair)
    with frame.until_interrupted(record):
        for n_image, n_batch in itertools.product(arguments.image_tokens, arguments.n_batch):
            longest = find_longest(pair, n_batch, arguments.threads, n_image)
            engine = open_engine(pair, n_batch, arguments.threads)
            bench = Bench(engine, n_image, seed=n_image + n_batch)
            for phase, way in itertools.product(arguments.phases, arguments.ways):
                if phase != "prefill" and n_batch != arguments.n_batch[0]:
                    continue  # the vision tower and single tokens know no batches
                label = f"{n_image} image tokens, n_batch {n_batch}, {phase}, {way}"
                record.rows.append(Row(label, label))
                fill(bench, record.rows[-1], phase, way, arguments.repeats)
                name, milliseconds = longest[phase]
                record.rows[-1].turns[0]["node_ms"] = frame.rounded(milliseconds)
                record.rows[-1].facts["longest node"] = name
                frame.keeper(record, arguments.json)()
            bench.close()
    frame.finish(record, arguments.json)


if __name__ == "__main__":
    main()
