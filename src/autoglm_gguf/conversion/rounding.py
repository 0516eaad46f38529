"""What each type would do to each tensor: the error of the real encoding, on a sample of rows.

Rows are encoded alone, so a sampled row gets the very bytes that it would get in the file. The
error is relative: squared differences over squared values, both weighted by the importance matrix
where there is one. That is the share of noise in what the matrix gives, for inputs whose columns do
not depend on one another. Knows nothing of budgets or of what an error does to answers.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.conversion.encode import encode
from autoglm_gguf.conversion.tensors import ZERO_ROW, OutTensor
from autoglm_gguf.conversion.writer import F16_MAX, check_finite
from autoglm_gguf.native.ggml import GGMLType, dequantize, row_bytes, to_float32
from autoglm_gguf.progress import OnProgress, Progress

# Weights of a tensor that are encoded in each type. ggml's speeds differ by two orders of magnitude
# (Mparam/s a thread: q8_0 260, q4_K 14, iq3_xxs 2), and slow types get by with fewer rows: the 9B
# takes about two minutes on two cores.
_SAMPLED = 1 << 20
_SAMPLED_SLOWLY = {
    **dict.fromkeys((GGMLType.Q2_K, GGMLType.Q4_K, GGMLType.Q5_K), 1 << 18),
    **dict.fromkeys((GGMLType.Q4_1, GGMLType.Q5_1), 1 << 18),
    **dict.fromkeys((GGMLType.IQ4_NL, GGMLType.IQ4_XS), 1 << 17),
    **dict.fromkeys((GGMLType.IQ3_S, GGMLType.IQ3_XXS), 1 << 17),
}
_FEWEST_ROWS = 16


@dataclass(frozen=True, slots=True)
class RoundingError:
    """One tensor in one type."""

    relative: float
    """Weighted squared error over weighted squared values: 0 for equal, about 1 for unrelated."""
    standard_error: float
    """Of ``relative``, from the rows that were not looked at; 0 if all were."""
    n_rows: int
    """Rows that were encoded."""


Errors = Mapping[str, Mapping[GGMLType, RoundingError]]
"""By tensor name and type."""


def measure_rounding(
    tensors: Sequence[OutTensor],
    candidates: Mapping[str, Sequence[GGMLType]],
    *,
    n_threads: int,
    on_progress: OnProgress | None = None,
) -> dict[str, dict[GGMLType, RoundingError]]:
    """Encode a sample of each tensor's rows in each of its candidate types.

    The sample depends on the tensors' names and shapes alone: one random row from each of as many
    equal stretches. Slow types see a part of it.

    Args:
        tensors: As they would be written, but for their type.
        candidates: Types by tensor name; tensors without any are skipped.
        n_threads: Tensors at a time.
        on_progress: Told after every tensor; counts the sampled rows' bytes as published.

    Raises:
        CheckpointError: A sampled row holds NaN or infinity.
    """
    wanted = _in_shard_order([tensor for tensor in tensors if candidates.get(tensor.name)])
    run = _Run(wanted, candidates, on_progress)
    with ThreadPoolExecutor(n_threads, "measure") as pool:
        workers = [pool.submit(run.work) for _ in range(n_threads)]
        try:
            wait(workers, return_when=FIRST_EXCEPTION)
        finally:
            run.stop.set()
    for worker in workers:
        worker.result()
    return run.found


class _Run:
    """Tensors handed to threads one by one."""

    def __init__(
        self,
        tensors: Sequence[OutTensor],
        candidates: Mapping[str, Sequence[GGMLType]],
        on_progress: OnProgress | None,
    ) -> None:
        self.stop = threading.Event()
        self.found: dict[str, dict[GGMLType, RoundingError]] = {}
        self._left = iter(tensors)
        self._candidates, self._on_progress = candidates, on_progress
        self._total_bytes = sum(_sampled_bytes(tensor) for tensor in tensors)
        self._done_bytes = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def work(self) -> None:
        """Measure until nothing is left or somebody fails."""
        try:
            while not self.stop.is_set():
                with self._lock:
                    tensor = next(self._left, None)
                if tensor is None:
                    return
                found = self._measure(tensor)
                with self._lock:
                    self._store(tensor, found)
        except BaseException:
            self.stop.set()
            raise

    def _store(self, tensor: OutTensor, found: dict[GGMLType, RoundingError]) -> None:
        self.found[tensor.name] = found
        self._done_bytes += _sampled_bytes(tensor)
        if self._on_progress is not None and not self.stop.is_set():
            seconds = time.monotonic() - self._started
            self._on_progress(Progress("measuring", self._done_bytes, self._total_bytes, seconds))

    def _measure(self, tensor: OutTensor) -> dict[GGMLType, RoundingError]:
        rows = sample_rows(tensor)
        words = tensor.take(rows)
        tensor.release(0, tensor.n_rows)
        check_finite(tensor, words)
        values = to_float32(words, tensor.source.ggml_type)
        found = {}
        for kind in self._candidates[tensor.name]:
            if self.stop.is_set():
                break
            step = max(1, len(rows) // _n_rows(tensor, kind))
            found[kind] = _measure_type(tensor, values[::step], kind)
        return found


def _in_shard_order(tensors: Sequence[OutTensor]) -> list[OutTensor]:
    """As they lie on the disk, so that it is read forwards; those in memory first."""
    maps: dict[int, int] = {}

    def place(tensor: OutTensor) -> tuple[int, int]:
        if tensor.source.pages is None:
            return -1, 0
        data, offset = tensor.source.pages
        return maps.setdefault(id(data), len(maps)), offset

    return sorted(tensors, key=place)


def sample_rows(tensor: OutTensor) -> NDArray[np.int64]:
    """The rows of a tensor that are looked at, ascending; rows of padding are none of them."""
    n_rows = tensor.n_rows
    real = np.arange(n_rows)
    if tensor.row_order is not None:
        real = np.flatnonzero(tensor.row_order != ZERO_ROW)
    n = min(len(real), _n_rows(tensor, None))
    if n == len(real):
        return real
    # Not one in every k: rows of a head repeat with a period.
    rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    edges = np.linspace(0, len(real), n + 1)
    return real[(edges[:-1] + rng.random(n) * np.diff(edges)).astype(np.int64)]


def _n_rows(tensor: OutTensor, kind: GGMLType | None) -> int:
    n_sampled = _SAMPLED if kind is None else _SAMPLED_SLOWLY.get(kind, _SAMPLED)
    return max(_FEWEST_ROWS, n_sampled // tensor.n_per_row)


def _sampled_bytes(tensor: OutTensor) -> int:
    n_rows = min(tensor.n_rows, _n_rows(tensor, None))
    return row_bytes(tensor.source.ggml_type, tensor.n_per_row) * n_rows


def _measure_type(tensor: OutTensor, values: NDArray[np.float32], kind: GGMLType) -> RoundingError:
    if kind == GGMLType.F16 and float(np.abs(values).max()) > F16_MAX:
        return RoundingError(1.0, 0.0, len(values))  # it cannot be written
    values = np.ascontiguousarray(values)
    raw = encode(values, kind, tensor.imatrix, search=tensor.search)
    if kind in (GGMLType.F16, GGMLType.BF16):
        decoded = to_float32(raw.view(np.uint16), kind)
    else:
        decoded = dequantize(raw, kind, tensor.n_per_row)
    weights = tensor.imatrix
    if weights is None:
        weights = np.ones(tensor.n_per_row, np.float32)
    errors = np.square(decoded - values) @ weights
    energies = np.square(values) @ weights
    return _ratio(errors.astype(np.float64), energies.astype(np.float64), _n_real(tensor))


def _n_real(tensor: OutTensor) -> int:
    if tensor.row_order is None:
        return tensor.n_rows
    return int(np.count_nonzero(tensor.row_order != ZERO_ROW))


def _ratio(errors: NDArray[np.float64], energies: NDArray[np.float64], n_all: int) -> RoundingError:
    """The ratio of two sums over all rows, estimated from some of them (Cochran, ch. 6)."""
    n, total = len(errors), float(energies.sum())
    if total <= 0.0:
        return RoundingError(0.0, 0.0, n)
    ratio = float(errors.sum()) / total
    missing = 1 - n / n_all
    if missing <= 0 or n < 2:
        return RoundingError(ratio, 0.0, n)
    spread = float((errors - ratio * energies).std(ddof=1))
    return RoundingError(ratio, spread * (missing / n) ** 0.5 / (total / n), n)
