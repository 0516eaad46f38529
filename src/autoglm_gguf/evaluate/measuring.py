"""Runs a model over passages: opens it under its memory budget, and hands out logits in order.

Knows batches and outputs; knows no scores and no files.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.engine.base import EngineInfo, ImageEmbedding
from autoglm_gguf.engine.content import Content, ImageCells
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.engine.loading import load_engine
from autoglm_gguf.evaluate.passages import (
    Corpus,
    Kind,
    Passage,
    Reader,
    read_image,
)
from autoglm_gguf.evaluate.scores import rows_at_once
from autoglm_gguf.memory.budget import Budget
from autoglm_gguf.native.nodes import NodeWatch
from autoglm_gguf.stopping import StopFlag

_CACHE_TYPE = "f16"  # llama.cpp's tools': under a budget the plan would choose another, silently


@dataclass(frozen=True, slots=True)
class PassageProgress:
    """How far a measurement is."""

    done: int
    """Passages, those of an earlier run included."""
    total: int
    seconds: float
    """Since this run began."""
    what: str = ""
    """What ``value`` is: ``perplexity``, ``kl_divergence`` (the mean), or nothing."""
    value: float | None = None
    """Of what was measured so far."""
    resumed: int = 0
    """Of ``done``, what an earlier run did; it says nothing about the speed."""

    @property
    def seconds_left(self) -> float:
        """At the speed so far."""
        done_now = self.done - self.resumed
        return self.seconds / done_now * (self.total - self.done) if done_now > 0 else 0.0


OnPassage = Callable[[PassageProgress], None]
OnLoad = Callable[[EngineInfo], None]


class Clock:
    """Tells progress after each passage.

    Args:
        total: Passages.
        on_passage: Who is told.
        what: What the values are.
        resumed: Passages that an earlier run did.
    """

    def __init__(
        self, total: int, on_passage: OnPassage | None, what: str = "", *, resumed: int = 0
    ) -> None:
        self._total, self._on_passage, self._what = total, on_passage, what
        self._resumed = resumed
        self._began = time.monotonic()
        self._done = resumed

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def tick(self, value: float | None = None) -> None:
        """One more passage is done."""
        self._done += 1
        if self._on_passage is not None:
            sizes = (self._done, self._total, self.seconds)
            self._on_passage(PassageProgress(*sizes, self._what, value, self._resumed))


class Measured(Reader, Protocol):
    """What can be run over passages: `LlamaEngine`, or the fake one."""

    @property
    def n_batch(self) -> int:
        """Tokens a batch at most."""

    @property
    def n_outputs_max(self) -> int:
        """Tokens of a batch whose logits may be read."""

    @property
    def vocabulary_key(self) -> str:
        """Equal keys are equal vocabularies."""

    @property
    def content(self) -> Content:
        """What was evaluated and is kept."""

    def keep(self, n: int) -> None:
        """Forget all that was evaluated but the first ``n`` pieces."""

    def watch(self, stop: StopFlag) -> None:
        """End evaluation with `Stopped` when a flag is set."""

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        """Evaluate at most `n_batch` tokens."""

    def encode_image(self, pixels: NDArray[np.uint8], grid: tuple[int, int]) -> ImageEmbedding:
        """Run the vision tower."""

    def eval_image(self, image: ImageEmbedding, *, whole: bool = False) -> None:
        """Evaluate an encoded image."""

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """``(n_vocab,)`` of one of the last batch's outputs."""


@contextlib.contextmanager
def open_measured(
    model: str | os.PathLike[str],
    corpus: Corpus,
    *,
    mmproj: str | os.PathLike[str] | None = "auto",
    memory_budget: Budget,
    n_outputs: int,
    watches: Sequence[NodeWatch] = (),
    on_load: OnLoad | None = None,
    **context: Any,
) -> Iterator[LlamaEngine]:
    """Load a model to be measured; an interrupt ends its batch.

    Args:
        model: A text GGUF, or a directory with one.
        corpus: Decides n_ctx, and whether a vision tower is wanted.
        mmproj: The vision tower; for transcripts only.
        memory_budget: See `plan_memory`.
        n_outputs: Tokens of a batch whose logits are read, at most.
        watches: Look at the nodes of every batch.
        on_load: Told what was loaded, and how.
        **context: Other fields of `ContextParams`, and ``self_test``.

    Raises:
        ValueError, TypeError, AutoGLMError: See `AutoGLM.load`.
    """
    corpus = corpus.resolved
    engine = load_engine(
        model,
        mmproj if corpus.kind == "transcripts" else None,
        memory_budget,
        self_test=context.pop("self_test", True),
        context={
            "type_k": _CACHE_TYPE,
            "type_v": _CACHE_TYPE,
            "n_draft_max": 0,
            **context,
            "n_ctx": corpus.n_ctx,
            "n_outputs": n_outputs,
        },
        watches=watches,
    )
    try:
        engine.watch(StopFlag())
        if on_load is not None:
            on_load(engine.info)
        yield engine
    finally:
        engine.close()


def read_logits(
    engine: Measured, passage: Passage, kind: Kind
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Evaluate a passage, and hand out what its scored tokens are predicted from.

    A text's chunk is evaluated from its first token on; a transcript from where it differs from the
    one before, since they share long prompts.

    Yields:
        A few rows of logits ``(n, n_vocab)``, and their tokens ``(n,)``, in order.
    """
    first = len(passage.pieces) - passage.n_scored - 1  # predicts the first scored token
    common = engine.content.n_common(passage.pieces) if kind == "transcripts" else 0
    engine.keep(min(common, first))
    at_once = rows_at_once(engine.info.n_vocab)
    targets = passage.targets
    for end, n_outputs in _run(engine, passage, first):
        begin = max(first, end - n_outputs)
        last = min(end, len(passage.pieces) - 1)  # nothing follows the last token
        for at in range(begin, last, at_once):
            count = min(at_once, last - at)
            rows = [engine.logits(n_outputs - end + at + n) for n in range(count)]
            yield np.stack(rows), targets[at - first : at - first + count]


def evaluate_whole(engine: Measured, passage: Passage) -> None:
    """Evaluate all of a passage so that each of its cells passes every layer, for those who watch.

    The last layer computes no more rows than there are outputs.
    """
    engine.keep(0)
    for _ in _run(engine, passage, 0, whole=True):
        pass


def _run(
    engine: Measured, passage: Passage, first: int, *, whole: bool = False
) -> Iterator[tuple[int, int]]:
    """Evaluate what the engine does not hold; yields the pieces so far and the last outputs.

    Args:
        engine: Holds the first pieces of the passage, or none.
        passage: What is evaluated.
        first: The piece from which on tokens have outputs.
        whole: Images have them too.
    """
    pieces, n_pieces = passage.pieces, len(passage.pieces)
    at = len(engine.content)
    while at < n_pieces:
        piece = pieces[at]
        if isinstance(piece, ImageCells):
            pixels = read_image(passage.images[piece.key], engine.info)
            image = replace(engine.encode_image(pixels.array, pixels.grid), key=piece.key)
            engine.eval_image(image, whole=whole)
            at += 1
            continue
        tokens: list[int] = []
        for following in pieces[at : at + engine.n_batch]:
            if not isinstance(following, int):
                break
            tokens.append(following)
        surplus = len(tokens) - max(first - at, 0) - engine.n_outputs_max
        if surplus > 0:
            del tokens[-surplus:]
        at += len(tokens)
        n_outputs = max(1, min(len(tokens), at - first))
        engine.eval_tokens(tokens, n_outputs=n_outputs)
        if at > first:
            yield at, n_outputs
