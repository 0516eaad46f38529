"""Reads an importance matrix: llama.cpp's GGUF format and the legacy binary one.

Knows how activations were summed; knows nothing of types or tensors' bytes. Sources: llama.cpp
common/imatrix-loader.cpp and tools/quantize/quantize.cpp (normalisation).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.errors import GGUFError
from autoglm_gguf.gguf.header import MAGIC, TensorInfo, read_header

_SUMS, _COUNTS = ".in_sum2", ".counts"
_METADATA = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_MAX_NAME_BYTES = 1024
_MAX_ENTRIES = 1_000_000


@dataclass(frozen=True, slots=True)
class Imatrix:
    """Mean squared activation of every input column, by GGUF tensor name."""

    path: Path
    columns: Mapping[str, NDArray[np.float32]]
    """``(n_per_row,)`` each."""

    def check_names(self, known: Iterable[str]) -> None:
        """Refuse a file with tensors that the model does not have.

        Raises:
            GGUFError: It was made for another model.
        """
        foreign = sorted(set(self.columns) - set(known))
        if foreign:
            raise GGUFError(
                f"{self.path.name}: made for another model (it has tensor {foreign[0]!r}, "
                "this model has not)",
                hint="give the importance matrix of this model",
            )

    def weights(self, name: str, n_per_row: int, *, padded_from: int) -> NDArray[np.float32] | None:
        """The importance of a tensor's columns; None if the file does not have the tensor.

        Args:
            name: GGUF tensor name.
            n_per_row: Row length in the output.
            padded_from: Row length in the checkpoint; columns beyond it are zero padding and get
                the mean importance, which changes nothing since their weights are zero.

        Raises:
            GGUFError: The file was made for another model.
        """
        found = self.columns.get(name)
        if found is None:
            return None
        if found.size == n_per_row:
            return found
        if found.size != padded_from:
            raise GGUFError(
                f"{self.path.name}: made for another model (tensor {name!r} has {found.size} "
                f"columns, required {padded_from})",
                hint="give the importance matrix of this model",
            )
        padding = np.full(n_per_row - found.size, found.mean(), np.float32)
        return np.concatenate([found, padding])


def read_imatrix(path: str | Path) -> Imatrix:
    """Read an importance matrix of either format.

    Raises:
        GGUFError: Missing, truncated, no importance matrix, or it holds values that are not finite.
    """
    path = Path(path)
    try:
        if path.is_fifo():  # opening it waits for ever
            raise GGUFError(
                f"{path}: a pipe, not a file", hint="make one with: autoglm-gguf calibrate"
            )
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
    except OSError as error:
        raise GGUFError(f"{path}: importance matrix cannot be read ({error.strerror})") from error
    columns = _read_gguf(path) if is_gguf else _read_legacy(path)
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise GGUFError(f"{path.name}: tensor {name!r} holds values that are not finite")
    return Imatrix(path, columns)


def _read_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    header = read_header(path)
    if not all(key in header.metadata for key in _METADATA):
        raise GGUFError(
            f"{path.name}: not an importance matrix (no {_METADATA[0]})",
            hint="make one with llama-imatrix",
        )
    columns = {}
    with path.open("rb") as file:

        def load(info: TensorInfo) -> NDArray[np.float32]:
            if info.type_name != "F32":
                raise GGUFError(f"{path.name}: tensor {info.name!r} is {info.type_name}, not F32")
            file.seek(info.offset)
            return np.frombuffer(file.read(info.n_bytes), np.float32)

        for name, info in header.tensors.items():
            if not name.endswith(_SUMS):
                continue
            bare = name.removesuffix(_SUMS)
            counts = header.tensors.get(bare + _COUNTS)
            if counts is None:
                raise GGUFError(f"{path.name}: tensor {bare!r} has sums but no counts")
            if counts.n_elements != 1:
                continue  # an expert tensor; no model of this family has one
            n = int(np.rint(load(counts)[0]))
            sums = load(info)
            columns[bare] = sums / np.float32(n) if n > 0 else np.ones_like(sums)
    return columns


def _read_legacy(path: Path) -> dict[str, NDArray[np.float32]]:
    data = path.read_bytes()
    at = 0

    def take_int() -> int:
        nonlocal at
        if at + 4 > len(data):
            raise _broken(path)
        (value,) = struct.unpack_from("<i", data, at)
        at += 4
        return int(value)

    columns = {}
    n_entries = take_int()
    if not 1 <= n_entries <= _MAX_ENTRIES:
        raise _broken(path)
    for _ in range(n_entries):
        length = take_int()
        if not 1 <= length <= _MAX_NAME_BYTES or at + length > len(data):
            raise _broken(path)
        name = data[at : at + length].decode("utf-8", "replace")
        at += length
        n_calls, n_values = take_int(), take_int()
        if n_values < 1 or at + 4 * n_values > len(data):
            raise _broken(path)
        sums = np.frombuffer(data, "<f4", count=n_values, offset=at)
        at += 4 * n_values
        columns[name] = (sums / np.float32(n_calls or 1)).astype(np.float32)
    return columns


def _broken(path: Path) -> GGUFError:
    return GGUFError(
        f"{path.name}: not an importance matrix, or truncated", hint="make one with llama-imatrix"
    )
