"""Safetensors shards as lazy tensors: headers are read and checked, data is mapped.

Nothing of a tensor is in memory before a slice of it is used. Format:
huggingface/safetensors README (8-byte little-endian header length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.checkpoint.config import read_json
from autoglm_gguf.errors import CheckpointError
from autoglm_gguf.native.ggml import GGMLType

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
_DTYPES: dict[str, tuple[GGMLType, Any]] = {
    "F32": (GGMLType.F32, np.dtype("<f4")),
    "F16": (GGMLType.F16, np.dtype("<u2")),
    "BF16": (GGMLType.BF16, np.dtype("<u2")),
}
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
_FINGERPRINT_BYTES = 512


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor on disk; ``data`` is mapped, pages are read when they are touched."""

    name: str
    shape: tuple[int, ...]
    """Hugging Face's order: rows first."""
    ggml_type: GGMLType
    """F32, F16 or BF16."""
    data: NDArray[Any]
    """Of ``shape``; f32, or 16-bit words for F16 and BF16."""
    pages: tuple[mmap.mmap, int] | None = None
    """The map and the data's byte offset in it; None for data that lies in memory."""

    def release(self, first: int, last: int) -> None:
        """Give elements ``first`` to ``last`` back to the page cache; a later use reads them again.

        Does nothing where the system has no way to (Windows).
        """
        if self.pages is None or last <= first or not hasattr(mmap, "MADV_DONTNEED"):
            return
        data, offset = self.pages
        start = (offset + first * self.data.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
        end = offset + last * self.data.itemsize
        data.madvise(mmap.MADV_DONTNEED, start, end - start)


class Shards:
    """All tensors of a checkpoint by name; close it to release the maps.

    Args:
        directory: Holds ``model.safetensors``, or an index and the shards it names.

    Raises:
        CheckpointError: A shard is missing, truncated or broken, or the index names a tensor that
            is in no shard.
    """

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, LazyTensor] = {}
        self._maps: list[mmap.mmap] = []
        self._digest = hashlib.sha256()
        index = directory / INDEX
        try:
            if index.exists():
                self._read_indexed(directory, read_json(index))
            elif (directory / SINGLE).exists():
                self._read_shard(directory / SINGLE)
            else:
                raise CheckpointError(
                    f"{directory}: no {INDEX} and no {SINGLE}",
                    hint="give the directory that holds the safetensors shards",
                )
        except BaseException:
            self.close()
            raise

    @property
    def fingerprint(self) -> str:
        """16 hex digits over names, places and 512 bytes at the head, middle and end of tensors."""
        return self._digest.hexdigest()[:16]

    def _read_indexed(self, directory: Path, index: dict[str, Any]) -> None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX}: no weight_map")
        for shard in sorted({str(name) for name in weight_map.values()}):
            if Path(shard).name != shard:
                raise CheckpointError(f"{INDEX}: shard {shard!r} lies outside the directory")
            self._read_shard(directory / shard)
        for name in weight_map:
            # inv_freq is no weight: one of a type that is not read was left out above.
            if name not in self.tensors and not name.endswith("inv_freq"):
                raise CheckpointError(
                    f"{INDEX}: names tensor {name!r}, which is in no shard",
                    hint="download the shards and the index again, from the same revision",
                )

    def _read_shard(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            file = path.open("rb")
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise CheckpointError(
                f"{path.name}: missing shard ({getattr(error, 'strerror', None) or error})",
                hint="download the checkpoint completely",
            ) from error
        with file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _broken(path, f"header of {length} bytes in a file of {size}")
            raw = file.read(length)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(data)
        self._digest.update(raw)
        self._add(path, _parse_header(path, raw), data, 8 + length, size)

    def _add(
        self, path: Path, header: dict[str, Any], data: mmap.mmap, start: int, size: int
    ) -> None:
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, begin, end = _parse_entry(path, name, entry)
            if start + end > size:
                raise CheckpointError(
                    f"{path.name}: truncated (tensor {name!r} ends at byte {start + end}, the file "
                    f"has {size})",
                    hint="download this shard again",
                )
            if name in self.tensors:
                raise _broken(path, f"tensor {name!r} is in two shards")
            spans.append((begin, end, name))
            if dtype not in _DTYPES:
                if name.endswith("inv_freq"):
                    continue
                raise _broken(path, f"tensor {name!r} has type {dtype}, not F32, F16 or BF16")
            ggml_type, kind = _DTYPES[dtype]
            array = np.frombuffer(
                data, kind, count=(end - begin) // kind.itemsize, offset=start + begin
            )
            for at in (begin, (begin + end) // 2, max(begin, end - _FINGERPRINT_BYTES)):
                self._digest.update(
                    data[start + at : min(start + at + _FINGERPRINT_BYTES, start + end)]
                )
            self.tensors[name] = LazyTensor(
                name, shape, ggml_type, array.reshape(shape), (data, start + begin)
            )
        spans.sort()
        for (_, end, name), (begin, _, other) in pairwise(spans):
            if begin < end:
                raise _broken(path, f"tensors {name!r} and {other!r} overlap")

    def close(self) -> None:
        """Release the maps; tensors handed out must not be used any more."""
        self.tensors.clear()
        for data in self._maps:
            try:
                data.close()
            except BufferError:
                pass  # an array still points into it; the map goes when the array does
        self._maps.clear()

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object")
    return header


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise _broken(path, f"tensor {name!r} is described by a {type(entry).__name__}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _broken(path, f"tensor {name!r} has unknown type {dtype!r}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _broken(path, f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    begin, end = offsets
    n_bytes = _ITEM_BYTES[dtype]
    for side in shape:
        n_bytes *= side
    if begin > end or end - begin != n_bytes or not n_bytes:
        raise _broken(path, f"tensor {name!r}: {shape} of {dtype} is not {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**62 for item in value
    )


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name}: broken safetensors file ({what})", hint="download this shard again"
    )
