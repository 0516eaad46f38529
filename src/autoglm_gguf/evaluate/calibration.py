"""`calibrate`: an importance matrix, by running the model over a text or over transcripts.

What llama-imatrix computes, in its GGUF format: for each weight matrix and each of its columns, the
sum of squares of what it was multiplied with, and how many rows that were. An interrupted run
leaves its sums under a temporary name, and the next one goes on from them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.conversion.imatrix import read_sums, write_imatrix
from autoglm_gguf.conversion.writer import open_temporary
from autoglm_gguf.errors import EvaluationError, GGUFError
from autoglm_gguf.evaluate.measuring import (
    Clock,
    Measured,
    OnLoad,
    OnPassage,
    evaluate_whole,
    open_measured,
)
from autoglm_gguf.evaluate.outfile import check_outfile
from autoglm_gguf.evaluate.passages import Corpus, Passages, cut_corpus, read_corpus
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.header import Header, read_header
from autoglm_gguf.gguf.identity import identify_file
from autoglm_gguf.hub import resolve_pair
from autoglm_gguf.memory.budget import DEFAULT_BUDGET, Budget
from autoglm_gguf.memory.estimate import layer_of
from autoglm_gguf.native.nodes import InputWatch

OUTFILE = "imatrix.gguf"
_OUTPUT = "output.weight"
_SAVE_SECONDS = 60.0
_FLOAT_BYTES = 4
_HEADER_ROOM_BYTES = 2**20  # names, counts and alignment of the largest models, rounded up


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate` made."""

    path: Path
    model: str
    corpus: str
    n_ctx: int
    n_passages: int
    """Chunks, or transcripts."""
    n_tokens: int
    """Rows behind each sum: text tokens and image tokens."""
    n_tensors: int
    n_resumed: int
    """Of the passages, those that an interrupted run had done."""
    seconds: float


def calibrate(
    model: str | os.PathLike[str],
    corpus: Corpus | str | os.PathLike[str],
    outfile: str | os.PathLike[str] = OUTFILE,
    *,
    process_output: bool = False,
    mmproj: str | os.PathLike[str] | None = "auto",
    memory_budget: Budget = DEFAULT_BUDGET,
    on_load: OnLoad | None = None,
    on_passage: OnPassage | None = None,
    **context: Any,
) -> Calibration:
    """Compute an importance matrix, for `convert` or llama-quantize.

    Args:
        model: A text GGUF, or a directory with one; best of 8 bits or more.
        corpus: A file, or a `Corpus` that says how it is cut.
        outfile: Written whole or not at all.
        process_output: Collect for the output matrix too.
        mmproj: The vision tower, for transcripts with images.
        memory_budget: For everything the process holds; see `plan_memory`.
        on_load: Told what was loaded, and how: its ``notes`` say what was made smaller.
        on_passage: Told after each chunk or transcript.
        **context: Fields of `ContextParams` but n_ctx, which is the corpus's; ``self_test``.

    Raises:
        ValueError, TypeError: An argument out of range.
        EvaluationError: The corpus is missing, not UTF-8, too short or no transcripts; or the file
            cannot be written.
        ContextFullError: A transcript that does not fit n_ctx.
        AutoGLMError: What `AutoGLM.load` raises; activations that are not finite.
    """
    corpus = (corpus if isinstance(corpus, Corpus) else Corpus(corpus)).resolved
    assert corpus.n_ctx is not None
    content = read_corpus(corpus)
    text, tower = resolve_pair(model, mmproj)
    header = read_header(text)
    matrices = _matrices(header, process_output=process_output)
    target = Path(outfile)
    n_bytes = sum(_FLOAT_BYTES * header.tensors[name].shape[0] for name in matrices)
    check_outfile(target, text, tower, corpus.path, n_bytes=n_bytes + _HEADER_ROOM_BYTES)
    # The graph ends after the last matrix: the output's logits are not asked for. Where layers are
    # streamed it goes on, since the last one must be let go.
    watch = InputWatch(matrices, last=None if process_output else matrices[-1])
    with open_measured(
        model,
        corpus,
        mmproj=mmproj,
        memory_budget=memory_budget,
        n_outputs=corpus.n_ctx,
        watches=(watch,),
        on_load=on_load,
        **context,
    ) as engine:
        plan = engine.info.plan
        if plan is not None and plan.places.streamed:
            watch.go_to_the_end()
        passages = cut_corpus(engine, corpus, content)
        files = [header]
        if tower is not None and passages.kind == "transcripts":
            files.append(read_header(tower))
        facts = [*map(identify_file, files), _identify(passages), sorted(matrices)]
        store = _Store(target, corpus, json.dumps(facts))
        watch.begin(*store.resume(len(passages)))
        clock = Clock(len(passages), on_passage, resumed=store.n_done)
        _collect(engine, passages, watch, store, clock)
        store.finish(matrices)
        return Calibration(
            target,
            engine.info.name,
            corpus.name,
            engine.info.n_ctx,
            len(passages),
            max(watch.counts.values()),
            len(matrices),
            store.n_resumed,
            clock.seconds,
        )


class _Store:
    """The sums after the last whole passage, and where they are kept."""

    def __init__(self, target: Path, corpus: Corpus, facts: str) -> None:
        self._target, self._facts = target, facts
        self._partial = target.with_name(f".{target.name}.partial")
        self._corpus = corpus
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}
        self.n_done = self.n_resumed = 0
        self._saved, self._n_saved = time.monotonic(), 0

    def resume(self, n_passages: int) -> tuple[dict[str, NDArray[np.float64]], dict[str, int]]:
        """The sums of an interrupted run of the same model, corpus and sizes, or none."""
        with contextlib.suppress(GGUFError, OSError):
            header = read_header(self._partial)
            n_done = header.get_int(names.IMATRIX_CHUNK_COUNT) or 0
            is_same = header.metadata.get(names.CALIBRATION_FACTS) == self._facts
            if is_same and 0 < n_done <= n_passages:
                sums, self._counts = read_sums(header)
                self._sums = {name: values.astype(np.float64) for name, values in sums.items()}
                self.n_done = self.n_resumed = self._n_saved = n_done
        return self._sums, self._counts

    def keep(self, watch: InputWatch) -> None:
        """Take the sums after one more passage; now and then to the disk."""
        self._sums = {name: values.copy() for name, values in watch.sums.items()}
        self._counts = dict(watch.counts)
        self.n_done += 1
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save_partial()

    def save_partial(self) -> None:
        """To the temporary name, if anything is new; what cannot be written is done without."""
        if self.n_done == self._n_saved:
            return
        with contextlib.suppress(OSError):
            self._write(self._partial, self._facts)
            self._n_saved = self.n_done
        self._saved = time.monotonic()

    def finish(self, matrices: Sequence[str]) -> None:
        """Write the result in the place of the temporary file.

        Raises:
            EvaluationError: It cannot be written, or a matrix was never used.
        """
        missing = [name for name in matrices if not self._counts.get(name)]
        if missing:
            raise EvaluationError(
                f"{missing[0]}: no input of it was seen, nor of {len(missing) - 1} others",
                hint="please report it, with the model's header: autoglm-gguf inspect MODEL",
            )
        try:
            self._write(self._target, None)
            self._partial.unlink(missing_ok=True)
        except OSError as error:
            self.save_partial()
            raise EvaluationError(
                f"{self._target}: cannot be written ({error.strerror or error})",
                hint="give another --outfile, or free disk space",
            ) from error

    def _write(self, path: Path, facts: str | None) -> None:
        n_ctx = self._corpus.n_ctx
        assert n_ctx is not None
        with open_temporary(path) as draft:
            write_imatrix(
                draft,
                self._sums,
                self._counts,
                dataset=self._corpus.name,
                n_chunks=self.n_done,
                chunk_size=n_ctx,
                facts=facts,
            )
            draft.replace(path)


def _collect(
    engine: Measured, passages: Passages, watch: InputWatch, store: _Store, clock: Clock
) -> None:
    """Evaluate what is not done yet; an interruption leaves the sums of whole passages."""
    try:
        for index in range(store.n_done, len(passages)):
            evaluate_whole(engine, passages.passage(index))
            watch.check()
            store.keep(watch)
            clock.tick()
    except BaseException:
        store.save_partial()
        raise


def _matrices(header: Header, *, process_output: bool) -> list[str]:
    """The weight matrices of all layers, in the order of computation."""
    found = [
        tensor.name
        for tensor in header.tensors.values()
        if layer_of(tensor.name) is not None and len(tensor.shape) == 2
    ]
    found.sort(key=lambda name: (layer_of(name), name.endswith("ffn_down.weight"), name))
    if process_output and _OUTPUT in header.tensors:
        found.append(_OUTPUT)
    if not found:
        raise GGUFError(f"{header.path.name}: no weight matrices", hint="give a text model's GGUF")
    return found


def _identify(passages: Passages) -> str:
    digest = sha256()
    for passage in passages:
        digest.update(passage.key.encode())
    return digest.hexdigest()
