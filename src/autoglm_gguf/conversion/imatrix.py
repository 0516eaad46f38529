"""Importance matrices: llama.cpp's GGUF format, read and written, and its legacy one, read.

Knows how activations are summed and what a file may hold; knows nothing of types or tensors' bytes.
Sources: llama.cpp common/imatrix-loader.cpp, tools/imatrix/imatrix.cpp and
tools/quantize/quantize.cpp (normalisation).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.errors import GGUFError
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.header import MAGIC, Header, TensorInfo, read_header

_SUMS, _COUNTS = ".in_sum2", ".counts"
_METADATA = (names.IMATRIX_DATASETS, names.IMATRIX_CHUNK_COUNT, names.IMATRIX_CHUNK_SIZE)
_MAX_NAME_BYTES = 1024
_MAX_ENTRIES = 1_000_000
_MAX_COUNT = 2**62
_MAKE_ONE = "make one: autoglm-gguf calibrate MODEL --text FILE"
# ggml's encoders divide by sums of importances, and IQ3 ends the process where these are 0: a block
# of columns that nothing ever passed through. Below this share of the mean a column counts as that.
_LEAST_SHARE = 1e-10
# They square the importances in f32. Only ratios matter, so beyond these means all are scaled.
_LEAST_MEAN, _MOST_MEAN = 1e-9, 1e9


@dataclass(frozen=True, slots=True)
class Imatrix:
    """Mean squared activation of every input column, by GGUF tensor name."""

    path: Path
    columns: Mapping[str, NDArray[np.float32]]
    """``(n_per_row,)`` each; finite, none negative."""

    def check_names(self, known: Iterable[str], layers: Iterable[str]) -> None:
        """Refuse a file whose tensors are not the model's.

        Args:
            known: The tensors that the model has.
            layers: Those of them that any importance matrix has: the matrices of its layers.

        Raises:
            GGUFError: It was made for another model.
        """
        foreign = sorted(set(self.columns) - set(known))
        missing = sorted(set(layers) - set(self.columns))
        if foreign:
            what = f"it has tensor {foreign[0]!r}, this model has not"
        elif missing:
            what = f"it lacks tensor {missing[0]!r}"
        else:
            return
        raise GGUFError(
            f"{self.path.name}: made for another model ({what})",
            hint="give the importance matrix of this model",
        )

    def weights(self, name: str, n_per_row: int, *, padded_from: int) -> NDArray[np.float32] | None:
        """The importance of a tensor's columns, as ggml can use it; None without the tensor.

        Args:
            name: GGUF tensor name.
            n_per_row: Row length in the output.
            padded_from: Row length in the checkpoint; columns beyond it are zero padding and get
                the mean importance, which changes nothing since their weights are zero. A file
                made with a padded model has zeros there.

        Raises:
            GGUFError: The file was made for another model.
        """
        found = self.columns.get(name)
        if found is None:
            return None
        if found.size < padded_from or found[padded_from:].any():
            raise GGUFError(
                f"{self.path.name}: made for another model (tensor {name!r} has {found.size} "
                f"columns, required {padded_from})",
                hint="give the importance matrix of this model",
            )
        found = _make_usable(found[:padded_from])
        padding = np.full(n_per_row - padded_from, found.mean(), np.float32)
        return np.concatenate([found, padding])


def _make_usable(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Importances in the range that ggml's encoders take, in the same proportions."""
    mean = float(values.mean(dtype=np.float64))
    if mean == 0:
        return np.ones_like(values)
    if not _LEAST_MEAN < mean < _MOST_MEAN:
        values, mean = (values.astype(np.float64) / mean).astype(np.float32), 1.0
    return np.maximum(values, np.float32(mean * _LEAST_SHARE))


def read_imatrix(path: str | Path) -> Imatrix:
    """Read an importance matrix of either format.

    Raises:
        GGUFError: Missing, truncated, no importance matrix, or it holds values that no sums of
            squares can be.
    """
    path = Path(path)
    try:
        if path.is_fifo():  # opening it waits for ever
            raise GGUFError(
                f"{path}: a pipe, not a file", hint="make one with: autoglm-gguf calibrate"
            )
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                file.seek(0)
                return Imatrix(path, _Legacy(path, file).read())
    except OSError as error:
        raise GGUFError(f"{path}: importance matrix cannot be read ({error.strerror})") from error
    header = read_header(path)
    if not all(key in header.metadata for key in _METADATA):
        raise GGUFError(
            f"{path.name}: not an importance matrix (no {_METADATA[0]})", hint=_MAKE_ONE
        )
    sums, counts = read_sums(header)
    return Imatrix(path, {name: _divide(sums[name], counts[name]) for name in sums})


def read_sums(header: Header) -> tuple[dict[str, NDArray[np.float32]], dict[str, int]]:
    """The sums of squares of an importance matrix in GGUF, and the rows in each, by tensor name.

    Raises:
        GGUFError: They are not what such a file holds.
    """
    sums: dict[str, NDArray[np.float32]] = {}
    rows: dict[str, int] = {}
    with header.path.open("rb") as file:
        for name, info in header.tensors.items():
            if not name.endswith(_SUMS):
                continue
            bare = name.removesuffix(_SUMS)
            counts = header.tensors.get(bare + _COUNTS)
            if counts is None:
                raise GGUFError(f"{header.path.name}: tensor {bare!r} has sums but no counts")
            if counts.n_elements != 1:
                continue  # an expert tensor; no model of this family has one
            count = float(_load(header.path, file, counts)[0])
            if count > _MAX_COUNT:
                raise _odd(header.path, bare)
            sums[bare], rows[bare] = _load(header.path, file, info), round(count)
    return sums, rows


def _load(path: Path, file: BinaryIO, info: TensorInfo) -> NDArray[np.float32]:
    if info.type_name != "F32":
        raise GGUFError(f"{path.name}: tensor {info.name!r} is {info.type_name}, not F32")
    file.seek(info.offset)
    values = np.frombuffer(file.read(info.n_bytes), np.float32)
    _check_values(path, info.name, values)
    return values


def _check_values(path: Path, name: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all() or (values < 0).any():
        raise _odd(path, name)


def _odd(path: Path, name: str) -> GGUFError:
    return GGUFError(
        f"{path.name}: damaged (tensor {name!r} holds values that are not finite, or negative)",
        hint=_MAKE_ONE,
    )


def _divide(sums: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    return sums / np.float32(count) if count > 0 else np.ones_like(sums)


class _Legacy:
    """The binary format of before 2025: entries of a name, a number of calls and mean squares."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._left = os.fstat(file.fileno()).st_size

    def read(self) -> dict[str, NDArray[np.float32]]:
        columns = {}
        for _ in range(self._take_int(_MAX_ENTRIES)):
            name = self._take(self._take_int(_MAX_NAME_BYTES)).decode("utf-8", "replace")
            (n_calls,) = struct.unpack("<i", self._take(4))
            n_values = self._take_int(self._left // 4)
            sums = np.frombuffer(self._take(4 * n_values), "<f4").astype(np.float32)
            _check_values(self._path, name, sums)
            columns[name] = sums / np.float32(n_calls) if n_calls > 0 else sums
        return columns

    def _take_int(self, most: int) -> int:
        (value,) = struct.unpack("<i", self._take(4))
        if not 1 <= value <= most:
            raise self._broken()
        return int(value)

    def _take(self, n: int) -> bytes:
        data = self._file.read(n) if n <= self._left else b""
        self._left -= n
        if len(data) != n:
            raise self._broken()
        return data

    def _broken(self) -> GGUFError:
        return GGUFError(
            f"{self._path.name}: not an importance matrix, or truncated", hint=_MAKE_ONE
        )


def write_imatrix(
    path: Path,
    sums: Mapping[str, NDArray[np.float64]],
    counts: Mapping[str, int],
    *,
    dataset: str,
    n_chunks: int,
    chunk_size: int,
    facts: str | None = None,
) -> None:
    """Write an importance matrix in llama.cpp's GGUF format, and sync it to the disk.

    Args:
        path: Overwritten.
        sums: ``(n_per_row,)`` by GGUF tensor name.
        counts: Rows in each sum.
        dataset: Name of what the model was run over.
        n_chunks: How many chunks that were.
        chunk_size: Their tokens.
        facts: Of an unfinished file: what it was made from.

    Raises:
        OSError: It cannot be written.
    """
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # llama-imatrix's files have no general.architecture
    writer.add_type("imatrix")
    writer.add_array(names.IMATRIX_DATASETS, [dataset])
    writer.add_uint32(names.IMATRIX_CHUNK_COUNT, n_chunks)
    writer.add_uint32(names.IMATRIX_CHUNK_SIZE, chunk_size)
    if facts is not None:
        writer.add_string(names.CALIBRATION_FACTS, facts)
    for name in sorted(sums):
        writer.add_tensor(name + _SUMS, sums[name].astype(np.float32))
        writer.add_tensor(name + _COUNTS, np.array([counts[name]], np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
    finally:
        writer.close()
    with path.open("r+b") as file:
        os.fsync(file.fileno())
