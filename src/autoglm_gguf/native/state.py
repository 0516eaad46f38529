"""The file in which llama.cpp keeps a KV state: what it must hold, compared before it is read back.

llama.cpp trusts such a file: it allocates what the file asks for, and checks types and sizes only
on the way. So all of it but the numbers themselves is known beforehand here, and a file that says
anything else is refused. Source: llama-kv-cache.cpp, ``state_write``; llama-context.cpp,
``state_seq_save_file``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.errors import SavedSessionError
from autoglm_gguf.native.ggml import row_bytes

_MAGIC, _VERSION = 0x67677371, 3  # llama.h: "ggsq", LLAMA_STATE_SEQ_VERSION
_SEQUENCE = 0
_CELL = np.dtype([("pos", "<i4"), ("n_seq", "<u4"), ("seq", "<i4")])
_MROPE_CELL = np.dtype(
    [("pos", "<i4"), ("n_seq", "<u4"), ("x", "<i4"), ("y", "<i4"), ("tok", "<i4"), ("seq", "<i4")]
)


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The shape of a context's KV cache."""

    n_layers: int
    n_embd_k: int
    """Elements of one cell's keys in one layer, all heads together."""
    n_embd_v: int
    type_k: int
    """ggml's numbers."""
    type_v: int
    transposed: bool
    """Values lie element by element instead of cell by cell: without flash attention."""
    uses_mrope: bool
    """Each cell has its column, row and token besides its position."""

    def n_bytes(self, n_cells: int) -> int:
        """Size of the file for so many cells."""
        cells = np.zeros((n_cells, 4), np.int32)
        return sum(len(fixed) + n_data for _, fixed, n_data in self._parts(cells))

    def check(self, path: Path, cells: NDArray[np.int32]) -> None:
        """Compare a file with what llama.cpp writes for these cells, up to the numbers.

        Args:
            path: The file.
            cells: ``(n_cells, 4)``: position, column, row and token of each cell.

        Raises:
            SavedSessionError: It holds anything else.
        """
        n_bytes, n_required = path.stat().st_size, self.n_bytes(len(cells))
        if n_bytes != n_required:
            raise _unfit(f"{n_bytes} bytes, {n_required} are required")
        with path.open("rb") as file:
            for what, fixed, n_data in self._parts(cells):
                if file.read(len(fixed)) != fixed:
                    raise _unfit(f"{what}: not as required")
                file.seek(n_data, 1)

    def _parts(self, cells: NDArray[np.int32]) -> Iterator[tuple[str, bytes, int]]:
        """The file in order: what comes, its bytes, and how many bytes of numbers follow them."""
        n = len(cells)
        n_tokens, n_streams = 0, 1
        yield "its beginning", struct.pack("<5I", _MAGIC, _VERSION, n_tokens, n_streams, n), 0
        table = np.zeros(n, _MROPE_CELL if self.uses_mrope else _CELL)
        table["n_seq"], table["seq"] = 1, _SEQUENCE
        for column, name in enumerate(("pos", "x", "y", "tok")):
            if name in (table.dtype.names or ()):
                table[name] = cells[:, column]
        yield "its cells", table.tobytes(), 0
        yield "its layers", struct.pack("<2I", self.transposed, self.n_layers), 0
        k_bytes, v_bytes = (
            row_bytes(self.type_k, self.n_embd_k),
            row_bytes(self.type_v, self.n_embd_v),
        )
        keys = struct.pack("<iQ", self.type_k, k_bytes)
        values = struct.pack("<iQ", self.type_v, v_bytes)
        if self.transposed:
            values = struct.pack("<iII", self.type_v, row_bytes(self.type_v, 1), self.n_embd_v)
        for layer in range(self.n_layers):
            yield f"keys of layer {layer}", keys, n * k_bytes
        for layer in range(self.n_layers):
            yield f"values of layer {layer}", values, n * v_bytes


def _unfit(why: str) -> SavedSessionError:
    return SavedSessionError(
        f"KV state: does not fit the conversation ({why})",
        hint="the file was changed; save the conversation again",
    )
