"""Every tensor of a GGUF pair, decoded, against the checkpoint's: at any size, without torch.

Streams row blocks, so memory does not grow with the model. Holds each tensor to what its type
allows, which is the same for every model (docs/reference/verify.md). Knows nothing of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.checkpoint.config import read_config
from autoglm_gguf.checkpoint.safetensors import Shards
from autoglm_gguf.conversion.recipe import Recipe, parse_outtype
from autoglm_gguf.conversion.tensors import OutTensor, plan_mmproj, plan_text
from autoglm_gguf.errors import GGUFError
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.header import Header, TensorInfo, read_header
from autoglm_gguf.native.ggml import dequantize, to_float32

_BLOCK_ELEMENTS = 1 << 21
EXACT_TYPES = ("F32", "F16", "BF16")
"""Types that may stand for the original: their rounding is finer than any quantised type's."""
GAUSSIAN_RELATIVE_RMSE = {
    "Q8_0": 0.00536,
    "Q6_K": 0.0178,
    "Q5_K": 0.0361,
    "Q5_1": 0.0379,
    "Q5_0": 0.0427,
    "Q4_K": 0.0713,
    "IQ4_NL": 0.0761,
    "IQ4_XS": 0.0767,
    "Q4_1": 0.0782,
    "Q4_0": 0.0859,
    "Q3_K": 0.151,
    "IQ3_S": 0.166,
    "IQ3_XXS": 0.213,
    "Q2_K": 0.297,
}
"""``relative_rmse`` of normally distributed weights without an importance matrix, by type. Their
size does not matter above 0.01; below, q6_K loses some to its f16 scales. Made by
``benchmarks/outtypes.py``."""
_MARGIN = 2  # heavy tails reach 1.6 times the table, outlier columns 1.35 times
LARGEST_RELATIVE_RMSE = {
    "F32": 0.0,
    "F16": 2.0**-11,  # half a unit in the last place
    "BF16": 2.0**-8,
    **{kind: _MARGIN * error for kind, error in GAUSSIAN_RELATIVE_RMSE.items()},
}
"""What `TensorDifference.relative_rmse` may be, by type."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How far one tensor is from the original."""

    name: str
    type_name: str
    max_abs: float
    """Largest difference of one weight."""
    rmse: float
    """Root of the mean squared difference."""
    relative_rmse: float
    """``rmse`` over the original's root mean square; 0 for equal, √2 for unrelated."""
    cosine: float
    """Of all weights as one vector; 1 for two tensors of zeros."""
    limit: float | None
    """The largest ``relative_rmse`` that passes; None where no threshold is known."""
    passed: bool
    """Whether it is within the limit; true without one."""


class Rows:
    """Decoded rows of a GGUF file's tensors, read as they are asked for; close it.

    Args:
        header: The file's.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self._file = header.path.open("rb")

    def read(self, info: TensorInfo, first: int, last: int) -> NDArray[np.float32]:
        """Rows ``first`` to ``last`` of a tensor, ``(last - first, n_per_row)``."""
        n_per_row = info.shape[0]
        stride = info.n_bytes // (info.n_elements // n_per_row)
        self._file.seek(info.offset + first * stride)
        raw = np.frombuffer(self._file.read((last - first) * stride), np.uint8)
        return dequantize(raw.reshape(last - first, stride), info.ggml_type, n_per_row)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def compare_with_checkpoint(
    checkpoint: Path,
    text: Path,
    mmproj: Path | None,
    *,
    on_tensor: Callable[[int, int], None] | None = None,
) -> list[TensorDifference]:
    """Compare every tensor of a pair with the checkpoint it was made from.

    Args:
        checkpoint: The published directory.
        text: The text GGUF.
        mmproj: Its vision tower; None leaves the tower out.
        on_tensor: Told ``(done, total)`` after each tensor.

    Raises:
        CheckpointError: The checkpoint is broken.
        GGUFError: A file is broken, or lacks a tensor the checkpoint has.
    """
    config = read_config(checkpoint)
    exact = Recipe(parse_outtype("f32"))
    with Shards(checkpoint) as shards:
        header = read_header(text)
        width = header.get_int(names.FEED_FORWARD_LENGTH)
        jobs = [(header, plan_text(shards.tensors, config, exact, ffn_width=width))]
        if mmproj is not None:
            jobs.append((read_header(mmproj), plan_mmproj(shards.tensors, config, exact)))
        total = sum(len(tensors) for _, tensors in jobs)
        found: list[TensorDifference] = []
        for header, tensors in jobs:
            with Rows(header) as rows:
                for tensor in tensors:
                    found.append(_compare(rows, tensor))
                    if on_tensor is not None:
                        on_tensor(len(found), total)
    return found


def compare_files(
    ours: Path, against: Path, *, on_tensor: Callable[[int, int], None] | None = None
) -> list[TensorDifference]:
    """Compare every tensor of two GGUF files; the second counts as the original.

    Raises:
        GGUFError: A file is broken, or they hold different tensors.
    """
    first, second = read_header(ours), read_header(against)
    found: list[TensorDifference] = []
    with Rows(first) as rows, Rows(second) as originals:
        for info in second.tensors.values():
            n_rows = info.n_elements // info.shape[0]

            def load(start: int, stop: int, info: TensorInfo = info) -> NDArray[np.float32]:
                return originals.read(info, start, stop)

            pairs = _pairs(rows, info.name, n_rows, info.shape[0], load)
            kind = _kind(first, info.name)
            found.append(_difference(info.name, kind, _limit(kind, info.type_name), pairs))
            if on_tensor is not None:
                on_tensor(len(found), len(second.tensors))
    return found


def _compare(rows: Rows, tensor: OutTensor) -> TensorDifference:
    def load(first: int, last: int) -> NDArray[np.float32]:
        values = to_float32(tensor.rows(first, last), tensor.source.ggml_type)
        tensor.release(first, last)
        return values

    pairs = _pairs(rows, tensor.name, tensor.n_rows, tensor.n_per_row, load)
    kind = _kind(rows.header, tensor.name)
    return _difference(tensor.name, kind, LARGEST_RELATIVE_RMSE.get(kind), pairs)


def _limit(kind: str, original: str) -> float | None:
    """Against another file: the coarser type counts, and a quantised original allows no verdict."""
    if original not in EXACT_TYPES or kind not in LARGEST_RELATIVE_RMSE:
        return None
    return max(LARGEST_RELATIVE_RMSE[kind], LARGEST_RELATIVE_RMSE[original])


def _pairs(
    rows: Rows,
    name: str,
    n_rows: int,
    n_per_row: int,
    load: Callable[[int, int], NDArray[np.float32]],
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    info = rows.header.tensors.get(name)
    if info is None or info.shape[0] != n_per_row or info.n_elements != n_rows * n_per_row:
        found = "missing" if info is None else f"of shape {info.shape}"
        raise GGUFError(
            f"{rows.header.path.name}: tensor {name!r} is {found} (required {n_rows} rows of "
            f"{n_per_row})",
            hint="this file was not made from this checkpoint",
        )
    step = max(1, _BLOCK_ELEMENTS // n_per_row)
    for first in range(0, n_rows, step):
        last = min(first + step, n_rows)
        yield rows.read(info, first, last), load(first, last)


def _difference(
    name: str,
    kind: str,
    limit: float | None,
    pairs: Iterator[tuple[NDArray[Any], NDArray[Any]]],
) -> TensorDifference:
    worst = squared = dot = ours_2 = theirs_2 = 0.0
    n = 0
    for ours, theirs in pairs:
        a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
        delta = a - b
        worst = max(worst, float(np.abs(delta).max()))
        squared += float(delta @ delta)
        dot, ours_2, theirs_2 = dot + float(a @ b), ours_2 + float(a @ a), theirs_2 + float(b @ b)
        n += a.size
    norm = np.sqrt(ours_2) * np.sqrt(theirs_2)
    relative = float(np.sqrt(squared / theirs_2)) if theirs_2 else float(squared != 0)
    return TensorDifference(
        name,
        kind,
        worst,
        float(np.sqrt(squared / n)),
        relative,
        float(dot / norm) if norm else float(ours_2 == theirs_2),
        limit,
        limit is None or relative <= limit,  # a NaN passes no limit
    )


def _kind(header: Header, name: str) -> str:
    info = header.tensors.get(name)
    return "?" if info is None else info.type_name
