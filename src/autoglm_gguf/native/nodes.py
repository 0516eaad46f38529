"""What is looked at in a graph while llama.cpp computes it: layers that are done, activations.

llama.cpp asks for every node whether somebody wants it, computes up to it, and calls again with it
done. Knows nodes and their operands; knows nothing of models, batches or files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.errors import AutoGLMError, EngineError
from autoglm_gguf.native.ggml import (
    GGMLType,
    operation_name,
    read_tensor_bytes,
    tensor_fields,
    tensor_name,
)

_BLOCK_BYTES = 1 << 22
_ROWS_AT_ONCE = 64  # summed in f32 before they are added to the f64 total
_FLOAT_BYTES = 4


class NodeWatch(Protocol):
    """Looks at nodes. Called from C: neither method may raise."""

    def wants(self, tensor: int) -> bool:
        """Whether it is to be shown a ``ggml_tensor`` when that is computed."""

    def see(self, tensor: int) -> bool:
        """Look at a computed tensor; False ends the graph there, and reports success."""


class LayerWatch:
    """Tells when a batch has passed a layer.

    Args:
        layers: The numbers of those that are told.
        on_layer: Called with the number; must not raise.
    """

    def __init__(self, layers: Collection[int], on_layer: Callable[[int], None]) -> None:
        self._names = {f"l_out-{n}".encode(): n for n in layers}
        self._on_layer = on_layer

    def wants(self, tensor: int) -> bool:
        """Whether it is the output of one of the layers."""
        return tensor_name(tensor) in self._names

    def see(self, tensor: int) -> bool:
        """Tell it."""
        self._on_layer(self._names[tensor_name(tensor)])
        return True


class InputWatch:
    """Sums the squares of all that each weight matrix is multiplied with, column by column.

    That is what llama-imatrix collects. It leaves out batches of fewer than 16 rows; here every row
    counts. Before `begin` nothing is looked at and no graph is ended: a self-test must not notice.

    Args:
        names: The matrices: GGUF tensor names.
        last: The one after which nothing is left to see: the graph ends there, unless it is None.
    """

    def __init__(self, names: Collection[str], *, last: str | None = None) -> None:
        self._names = {name.encode(): name for name in names}
        self._last = last
        self._totals: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}
        self._error: AutoGLMError | None = None
        self._has_begun = False

    def go_to_the_end(self) -> None:
        """Let graphs be computed beyond the last matrix."""
        self._last = None

    @property
    def sums(self) -> Mapping[str, NDArray[np.float64]]:
        """``(n_per_row,)`` of each matrix that was seen."""
        return self._totals

    @property
    def counts(self) -> Mapping[str, int]:
        """Rows that each sum is made of."""
        return self._counts

    def begin(
        self,
        sums: Mapping[str, NDArray[np.float64]] | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Look from now on; go on from other sums if they are given."""
        self._has_begun = True
        self._totals = {name: values.copy() for name, values in (sums or {}).items()}
        self._counts = dict(counts or {})
        self._error = None

    def check(self) -> None:
        """Raise what went wrong since `begin`, where it could not be raised.

        Raises:
            EngineError: Activations are not finite, or not what this package knows.
        """
        if self._error is not None:
            raise self._error

    def wants(self, tensor: int) -> bool:
        """Whether it is a product with one of the matrices."""
        if not self._has_begun or operation_name(tensor) != b"MUL_MAT":
            return False
        try:
            return _plain_name(tensor_fields(tensor_fields(tensor).src[0]).name) in self._names
        except AutoGLMError as error:
            self._error = error
            return False

    def see(self, tensor: int) -> bool:
        """Add the squares of its second operand."""
        try:
            product = tensor_fields(tensor)
            name = self._names[_plain_name(tensor_fields(product.src[0]).name)]
            self._add(name, product.src[1])
        except AutoGLMError as error:
            self._error = error
            return False
        return name != self._last

    def _add(self, name: str, tensor: int) -> None:
        total, n_rows = _sum_squares(tensor)
        known = self._totals.get(name)
        if known is None:
            self._totals[name], self._counts[name] = total, n_rows
        elif known.shape != total.shape:
            raise EngineError(f"{name}: multiplied with rows of {total.size} and of {known.size}")
        else:
            known += total
            self._counts[name] += n_rows
        if not np.isfinite(self._totals[name]).all():
            raise EngineError(
                f"{name}: its input holds values that are not finite",
                hint="the model is damaged, or its weights overflow: convert the checkpoint again",
            )


def _plain_name(name: bytes) -> bytes:
    """Without what ggml's scheduler puts around the name of a copy: ``CPU#blk.0.attn_q.weight#0``.

    As llama-imatrix's filter_tensor_name does.
    """
    _, mark, rest = name.partition(b"#")
    return rest.partition(b"#")[0] if mark else name


def _sum_squares(tensor: int) -> tuple[NDArray[np.float64], int]:
    """Squares of an f32 tensor's rows, summed: ``(row length,)``, and how many rows that are.

    It is copied block by block, from wherever it lies.
    """
    fields = tensor_fields(tensor)
    length, *counts = fields.ne
    item, row, *strides = fields.nb
    if fields.type != GGMLType.F32 or item != _FLOAT_BYTES or row % item:
        raise EngineError("llama.cpp: a matrix is multiplied with something other than f32 rows")
    total = np.zeros(length, np.float64)
    step = max(1, min(_ROWS_AT_ONCE, _BLOCK_BYTES // row))
    for outer in range(counts[2]):
        for middle in range(counts[1]):
            start = outer * strides[1] + middle * strides[0]
            for first in range(0, counts[0], step):
                n = min(step, counts[0] - first)
                block = np.empty((n - 1) * (row // item) + length, np.float32)
                read_tensor_bytes(tensor, start + first * row, block)
                rows = np.lib.stride_tricks.as_strided(block, (n, length), (row, item))
                total += np.einsum("ij,ij->j", rows, rows)
    return total, counts[0] * counts[1] * counts[2]
