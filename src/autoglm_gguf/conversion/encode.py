"""Rows to bytes: ggml's own, or the better of ggml's and a search over scales, block by block.

Without an importance matrix ggml takes the scale of a q4_0 or q5_0 block from its largest value and
the two of a q4_1 or q5_1 block from its range; of a q8_0 block always. Nearby scales round the
block's values otherwise, and one of them nearly always has a smaller squared error. The format
stays, only the numbers in it differ: whatever reads a GGUF reads these. K and IQ types search by
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.native.ggml import GGMLType, dequantize, quantize

_BLOCK = 32
_CHUNK_BLOCKS = 1 << 12  # 512 kB of f32: stays in a core's cache
_HEAD_BYTES = 2  # the scale, f16
_LEVELS = {GGMLType.Q4_0: (-8, 7), GGMLType.Q5_0: (-16, 15), GGMLType.Q8_0: (-127, 127)}
_BY_GGML = (GGMLType.Q4_0, GGMLType.Q5_0, GGMLType.Q4_1, GGMLType.Q5_1)  # search when weighted
SEARCHED = (*_BY_GGML, GGMLType.Q8_0)
"""Types in which a search finds better scales."""
# Scales tried, as shares of the one that just reaches the block's largest value: fewer bits gain
# from cutting it off, eight bits only from other roundings.
_COARSE = np.linspace(0.80, 1.16, 6, dtype=np.float32)
_FINE = np.linspace(0.996, 1.06, 10, dtype=np.float32)


def encode(
    rows: NDArray[np.float32],
    ggml_type: GGMLType,
    imatrix: NDArray[np.float32] | None = None,
    *,
    search: bool = False,
) -> NDArray[np.uint8]:
    """Encode rows, see `quantize`.

    Args:
        rows: ``(n_rows, n_per_row)``, f32, finite.
        ggml_type: The target type.
        imatrix: ``(n_per_row,)``, the importance of each column; None weighs all alike.
        search: Take each block of a `SEARCHED` type from whichever of ggml's encoding and those
            with other scales has the least weighted squared error.

    Returns:
        ``(n_rows, row_bytes)``.
    """
    plain = quantize(rows, ggml_type, imatrix)
    if not search or ggml_type not in SEARCHED:
        return plain
    best = _Best(rows, plain, ggml_type, imatrix)
    if ggml_type in _BY_GGML and imatrix is None:
        # ggml's own search, which it does only where columns have weights.
        best.offer(quantize(rows, ggml_type, np.ones(rows.shape[1], np.float32)))
    if ggml_type in _LEVELS:
        best.search_scales()
    return best.raw.reshape(plain.shape)


class _Best:
    """The best bytes found so far for each block of 32, and their weighted squared error."""

    def __init__(
        self,
        rows: NDArray[np.float32],
        raw: NDArray[np.uint8],
        ggml_type: GGMLType,
        imatrix: NDArray[np.float32] | None,
    ) -> None:
        self._values = rows.reshape(-1, _BLOCK)
        self._type = ggml_type
        self._imatrix = None if imatrix is None else imatrix.reshape(-1, _BLOCK)
        self.raw = raw.reshape(len(self._values), -1).copy()
        self._errors = np.empty(len(self._values), np.float32)
        for span in self._spans():
            self._errors[span] = self._measure(span, self._decode(self.raw[span]))

    def offer(self, raw: NDArray[np.uint8]) -> None:
        """Take the blocks of another encoding that are better."""
        raw = raw.reshape(self.raw.shape)
        for span in self._spans():
            errors = self._measure(span, self._decode(raw[span]))
            better = errors < self._errors[span]
            self.raw[span][better] = raw[span][better]
            self._errors[span][better] = errors[better]

    def search_scales(self) -> None:
        """Try scales around the one of the block's largest value."""
        with np.errstate(over="ignore", invalid="ignore"):  # a scale beyond f16 is never better
            for span in self._spans():
                self._search(span)

    def _search(self, span: slice) -> None:
        values, weights = self._values[span], self._weights(span)
        low, high = _LEVELS[self._type]
        # Signed: the largest value lies on the longer side of the levels, as ggml has it.
        peak = values[np.arange(len(values)), np.abs(values).argmax(1)]
        start = peak / np.float32(low)
        errors = self._errors[span].copy()
        scales = self.raw[span][:, :_HEAD_BYTES].copy().view(np.float16)[:, 0]
        changed = np.zeros(len(values), bool)
        is_fine = self._type == GGMLType.Q8_0
        for share in _FINE if is_fine else _COARSE:
            scale = (start * share).astype(np.float16)
            # As it is; and at few bits with the scale that suits its own rounding best.
            for is_last in (True,) if is_fine else (False, True):
                levels = _round(values, scale, low, high)
                widened = scale.astype(np.float32)[:, None]
                off = values - widened * levels
                off *= off
                found = off.sum(1) if weights is None else (off * weights).sum(1)
                better = found < errors
                errors[better], scales[better] = found[better], scale[better]
                changed |= better
                if not is_last:
                    scale = _least_squares(values, levels, weights)
        if changed.any():
            chosen = _pack(values[changed], scales[changed], self._type)
            blocks = self.raw[span]
            blocks[changed] = chosen
            self._errors[span] = errors

    def _spans(self) -> Iterator[slice]:
        for first in range(0, len(self._values), _CHUNK_BLOCKS):
            yield slice(first, min(first + _CHUNK_BLOCKS, len(self._values)))

    def _decode(self, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
        return dequantize(raw, self._type, _BLOCK)

    def _weights(self, span: slice) -> NDArray[np.float32] | None:
        """``(n_blocks, 32)``; the importance repeats with every row."""
        if self._imatrix is None:
            return None
        places = np.arange(span.start, span.stop) % len(self._imatrix)
        found: NDArray[np.float32] = self._imatrix[places]
        return found

    def _measure(self, span: slice, decoded: NDArray[np.float32]) -> NDArray[np.float32]:
        off = self._values[span] - decoded
        off *= off
        weights = self._weights(span)
        if weights is not None:
            off *= weights
        found: NDArray[np.float32] = off.sum(1)
        return found


def _round(
    values: NDArray[np.float32], scale: NDArray[np.float16], low: int, high: int
) -> NDArray[np.float32]:
    widened = scale.astype(np.float32)
    inverse = np.divide(1, widened, out=np.zeros_like(widened), where=widened != 0)
    levels = values * inverse[:, None]
    np.rint(levels, out=levels)
    return np.clip(levels, low, high, out=levels)


def _least_squares(
    values: NDArray[np.float32], levels: NDArray[np.float32], weights: NDArray[np.float32] | None
) -> NDArray[np.float16]:
    weighted = levels if weights is None else levels * weights
    over = np.einsum("ij,ij->i", weighted, values)
    under = np.einsum("ij,ij->i", weighted, levels)
    scale: NDArray[np.float32] = np.divide(over, under, out=np.zeros_like(over), where=under > 0)
    return scale.astype(np.float16)


def _pack(
    values: NDArray[np.float32], scale: NDArray[np.float16], ggml_type: GGMLType
) -> NDArray[np.uint8]:
    """Blocks as ggml-common.h lays them out: block_q4_0, block_q5_0, block_q8_0."""
    low, high = _LEVELS[ggml_type]
    levels = _round(values, scale, low, high).astype(np.int8)
    head = scale.view(np.uint8).reshape(-1, _HEAD_BYTES)
    if ggml_type == GGMLType.Q8_0:
        return np.hstack([head, levels.view(np.uint8)])
    codes = (levels - low).astype(np.uint8)
    nibbles = (codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4
    if ggml_type == GGMLType.Q4_0:
        return np.hstack([head, nibbles])
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.hstack([head, fifth, nibbles])
