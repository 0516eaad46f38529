"""A base model's log-probabilities on disk: what another model is compared with.

Of a text, the file is llama-perplexity's (``--kl-divergence-base``): either tool reads the other's.
Of transcripts, whose lengths differ, it has a magic of our own and the same rows. Behind the rows
stand our facts, which llama-perplexity does not read. Knows bytes; runs nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.conversion.writer import open_temporary
from autoglm_gguf.errors import EvaluationError
from autoglm_gguf.evaluate.outfile import check_outfile
from autoglm_gguf.evaluate.passages import LEAST_N_CTX, Kind, Passages, TextChunks
from autoglm_gguf.evaluate.scores import MAKE_BASE, row_words

_MAGICS: dict[Kind, bytes] = {"text": b"_logits_", "transcripts": b"_answer_"}
_FACTS = b"_facts__"
_KEY_BYTES = 32
_MAX_N_CTX, _MAX_N_VOCAB, _MAX_PASSAGES, _MAX_FACTS_BYTES = 2**20, 2**26, 2**26, 2**20
VOCABULARY, NLL, MODEL, CORPUS = "vocabulary_sha256", "nll", "model", "corpus"
"""Facts: of the tokens; the scored tokens' mean and its error; the names of base and corpus."""


@dataclass(frozen=True, slots=True)
class BaseHeader:
    """What a base file holds, without its rows."""

    path: Path
    kind: Kind
    n_vocab: int
    tokens: NDArray[np.int32] | None
    """``(n_chunks, n_ctx)`` of a text; None for transcripts."""
    keys: tuple[str, ...]
    """Of the transcripts; none for a text."""
    n_scored: tuple[int, ...]
    """Rows of each passage."""
    rows_offset: int
    """Byte of the first row."""
    facts: Mapping[str, Any]
    """Written by this package; empty in a file of llama-perplexity's."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return 2 * row_words(self.n_vocab)


def base_bytes(passages: Passages, n_vocab: int) -> int:
    """What a base file takes, without its facts."""
    return len(_pack_head(passages, n_vocab)) + 2 * row_words(n_vocab) * sum(passages.n_scored)


@contextlib.contextmanager
def create_base(path: Path, passages: Passages, n_vocab: int) -> Iterator[BaseWriter]:
    """Write a base file: under a temporary name until it is whole and on disk.

    Raises:
        EvaluationError: The disk is too small, or the file cannot be written.
    """
    n_bytes = base_bytes(passages, n_vocab)
    check_outfile(path, n_bytes=n_bytes, smaller="use fewer --chunks")
    try:
        with open_temporary(path) as temporary:
            with temporary.open("wb") as file:
                file.write(_pack_head(passages, n_vocab))
                writer = BaseWriter(file, sum(passages.n_scored))
                yield writer
                writer.finish()
            temporary.replace(path)
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be written ({error.strerror or error})",
            hint="give another file, or free disk space",
        ) from error


class BaseWriter:
    """Takes rows in order; see `create_base`."""

    def __init__(self, file: BinaryIO, n_rows: int) -> None:
        self._file, self._n_left = file, n_rows
        self.facts: dict[str, Any] = {}
        """Written at the end."""

    def add(self, rows: NDArray[np.uint16]) -> None:
        """Append rows from `encode_base`."""
        self._n_left -= len(rows)
        self._file.write(np.ascontiguousarray(rows, "<u2").data)

    def finish(self) -> None:
        """Write the facts, and all of it to the disk."""
        if self._n_left:
            raise ValueError(f"base file: {self._n_left} rows are missing")
        facts = json.dumps(self.facts).encode()
        self._file.write(facts + struct.pack("<I", len(facts)) + _FACTS)
        self._file.flush()
        os.fsync(self._file.fileno())


def read_base(path: Path) -> BaseHeader:
    """Read a base file up to its rows, and check that these are all there.

    Raises:
        EvaluationError: Missing, truncated, or no base file.
    """
    try:
        with path.open("rb") as file:
            return _Reading(path, file).header()
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be read ({error.strerror})", hint="check the path"
        ) from error


class BaseRows:
    """The rows of a base file, in order; a context manager."""

    def __init__(self, header: BaseHeader) -> None:
        self._header = header
        self._file = header.path.open("rb")
        self._file.seek(header.rows_offset)

    def read(self, n: int) -> NDArray[np.uint16]:
        """The next ``(n, row_words)``.

        Raises:
            EvaluationError: The file became shorter.
        """
        data = self._file.read(n * self._header.row_bytes)
        if len(data) < n * self._header.row_bytes:
            raise EvaluationError(f"{self._header.path}: became shorter while it was read")
        return np.frombuffer(data, "<u2").reshape(n, -1)

    def __enter__(self) -> BaseRows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _pack_head(passages: Passages, n_vocab: int) -> bytes:
    magic = _MAGICS[passages.kind]
    if isinstance(passages, TextChunks):
        n_chunks, n_ctx = passages.tokens.shape
        tokens = np.ascontiguousarray(passages.tokens, "<i4").tobytes()
        return magic + struct.pack("<Iii", n_ctx, n_vocab, n_chunks) + tokens
    entries = [
        struct.pack("<I", passage.n_scored) + bytes.fromhex(passage.key) for passage in passages
    ]
    return magic + struct.pack("<ii", n_vocab, len(entries)) + b"".join(entries)


class _Reading:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size

    def header(self) -> BaseHeader:
        magic = self._file.read(8)
        if magic == _MAGICS["text"]:
            return self._text()
        if magic == _MAGICS["transcripts"]:
            return self._transcripts()
        raise EvaluationError(f"{self._path}: not a file of base logits", hint=MAKE_BASE)

    def _text(self) -> BaseHeader:
        n_ctx, n_vocab, n_chunks = struct.unpack("<Iii", self._take(12))
        self._check(LEAST_N_CTX <= n_ctx <= _MAX_N_CTX)
        self._check(0 < n_vocab <= _MAX_N_VOCAB and 0 < n_chunks <= _MAX_PASSAGES)
        tokens = np.frombuffer(self._take(4 * n_ctx * n_chunks), "<i4").astype(np.int32)
        self._check(bool(tokens.min() >= 0 and tokens.max() < n_vocab))
        chunks = TextChunks(tokens.reshape(n_chunks, n_ctx), None)
        return self._whole("text", n_vocab, chunks.tokens, (), chunks.n_scored)

    def _transcripts(self) -> BaseHeader:
        n_vocab, n = struct.unpack("<ii", self._take(8))
        self._check(0 < n_vocab <= _MAX_N_VOCAB and 0 < n <= _MAX_PASSAGES)
        entries = [self._take(4 + _KEY_BYTES) for _ in range(n)]
        n_scored = tuple(struct.unpack_from("<I", entry)[0] for entry in entries)
        self._check(all(0 < count <= _MAX_N_CTX for count in n_scored))
        keys = tuple(entry[4:].hex() for entry in entries)
        return self._whole("transcripts", n_vocab, None, keys, n_scored)

    def _whole(
        self,
        kind: Kind,
        n_vocab: int,
        tokens: NDArray[np.int32] | None,
        keys: tuple[str, ...],
        n_scored: tuple[int, ...],
    ) -> BaseHeader:
        offset = self._file.tell()
        end = offset + 2 * row_words(n_vocab) * sum(n_scored)
        if self._size < end:
            raise self._broken(f"truncated ({self._size} bytes, required {end})")
        return BaseHeader(
            self._path, kind, n_vocab, tokens, keys, n_scored, offset, self._facts(end)
        )

    def _facts(self, end: int) -> dict[str, Any]:
        """What stands behind the rows; a file of llama-perplexity's ends there."""
        tail = 4 + len(_FACTS)
        if self._size < end + tail:
            return {}
        self._file.seek(self._size - tail)
        raw = self._file.read(tail)
        (n_bytes,) = struct.unpack_from("<I", raw)
        fits = end + n_bytes + tail == self._size and n_bytes <= _MAX_FACTS_BYTES
        if raw[4:] != _FACTS or not fits:
            return {}
        self._file.seek(end)
        try:
            facts = json.loads(self._file.read(n_bytes))
        except (ValueError, RecursionError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def _take(self, n: int) -> bytes:
        if n > self._size - self._file.tell():
            raise self._broken("truncated")
        return self._file.read(n)

    def _check(self, holds: bool) -> None:
        if not holds:
            raise self._broken("damaged: its sizes or tokens are out of range")

    def _broken(self, how: str) -> EvaluationError:
        return EvaluationError(f"{self._path}: {how}", hint=MAKE_BASE)
