"""Reads a GGUF header: keys, tensor names, types, places. Touches no tensor data.

Every length is checked against the file's size before it is used, so a hostile header costs no more
than its own bytes. Format: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_gguf.errors import GGUFError
from autoglm_gguf.gguf import names

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_KEY_BYTES = 65535
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
# ggml type id -> (name, elements per block, bytes per block); ggml/src/ggml.c, type_traits
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """ggml's order: the row length first."""
    ggml_type: int
    offset: int
    """Bytes from the start of the file."""
    n_bytes: int

    @property
    def type_name(self) -> str:
        """ggml's name of the type, upper case."""
        return TENSOR_TYPES[self.ggml_type][0]

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        n = 1
        for side in self.shape:
            n *= side
        return n


@dataclass(frozen=True, slots=True)
class Header:
    """Everything a GGUF file says before its tensor data."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Any]
    """Key to value; arrays are lists."""
    tensors: dict[str, TensorInfo]
    file_bytes: int

    @property
    def architecture(self) -> str:
        """``general.architecture``, or an empty string."""
        value = self.metadata.get(names.ARCHITECTURE, "")
        return value if isinstance(value, str) else ""

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def n_params(self) -> int:
        """Number of weights."""
        return sum(tensor.n_elements for tensor in self.tensors.values())

    def get_int(self, key: str) -> int | None:
        """The integer under a key, ``{arch}`` filled in; None if absent or no integer."""
        value = self.metadata.get(key.format(arch=self.architecture))
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_header(path: str | Path) -> Header:
    """Read a GGUF file's header.

    Args:
        path: A GGUF file.

    Returns:
        Its metadata and tensor table; each tensor lies within the file.

    Raises:
        GGUFError: No such file, not a GGUF, truncated, or it contradicts itself.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size < 24 and not path.is_dir():  # a pipe has none, and opening one waits for ever
            raise _no_gguf(path)
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise _no_gguf(path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).read()
    except FileNotFoundError as error:
        raise GGUFError(f"{path}: no such file", hint="check the path") from error
    except IsADirectoryError as error:
        raise GGUFError(f"{path}: a directory, not a GGUF file") from error
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read ({error.strerror})") from error


def _no_gguf(path: Path) -> GGUFError:
    return GGUFError(
        f"{path.name}: not a GGUF file",
        hint="make one with: autoglm-gguf convert CHECKPOINT --outdir DIR",
    )


class _Reader:
    """A cursor over the mapped header; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self._at = 4

    def read(self) -> Header:
        version, n_tensors, n_keys = self._unpack("<IQQ")
        if version not in VERSIONS:
            raise self._bad(f"GGUF version {version}, this reads {VERSIONS[0]} and {VERSIONS[1]}")
        # Each tensor takes at least 24 bytes, each key at least 13: more cannot be in the file.
        if n_tensors > self._size // 24 or n_keys > self._size // 13:
            raise self._bad(f"{n_tensors} tensors and {n_keys} keys in {self._size} bytes")
        metadata = dict(self._keys(n_keys))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self._bad(f"alignment {alignment!r}")
        raw = [self._tensor() for _ in range(n_tensors)]
        start = -(-self._at // alignment) * alignment
        tensors = dict(self._place(raw, start, alignment))
        return Header(self._path, version, alignment, metadata, tensors, self._size)

    def _keys(self, n_keys: int) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for _ in range(n_keys):
            key = self._string(limit=_MAX_KEY_BYTES)
            if key in seen:
                raise self._bad(f"key {key!r} twice")
            seen.add(key)
            (kind,) = self._unpack("<I")
            yield key, self._value(kind, key)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, n = self._unpack("<IQ")
            return self._array(item_kind, n, key)
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise self._bad(f"key {key!r} has unknown type {kind}")
        return self._take(scalar)

    def _array(self, kind: int, n: int, key: str) -> list[Any]:
        if kind == _STRING:
            if n > (self._size - self._at) // 8:
                raise self._bad(f"key {key!r} claims {n} strings")
            return self._strings(n)
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise self._bad(f"key {key!r} is an array of unknown type {kind}")
        end = self._at + n * scalar.size
        if end > self._size:
            raise self._bad(f"key {key!r} claims {n} values")
        values = list(struct.unpack_from(f"<{n}{scalar.format[-1]}", self._data, self._at))
        self._at = end
        return values

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(limit=_MAX_KEY_BYTES)
        (n_dims,) = self._unpack("<I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self._bad(f"tensor {name!r} has {n_dims} dimensions")
        shape = self._unpack(f"<{n_dims}Q")
        kind, offset = self._unpack("<IQ")
        if kind not in TENSOR_TYPES:
            raise self._bad(f"tensor {name!r} has unknown type {kind}")
        return name, shape, kind, offset

    def _place(
        self, raw: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> Iterator[tuple[str, TensorInfo]]:
        seen: set[str] = set()
        for name, shape, kind, offset in raw:
            _, block, block_bytes = TENSOR_TYPES[kind]
            n = 1
            for side in shape:
                n *= side
            if name in seen or not n or shape[0] % block or offset % alignment:
                raise self._bad(f"tensor {name!r}: double, empty or misplaced (shape {shape})")
            seen.add(name)
            n_bytes = n // block * block_bytes
            if start + offset + n_bytes > self._size:
                raise GGUFError(
                    f"{self._path.name}: truncated (tensor {name!r} ends at byte "
                    f"{start + offset + n_bytes}, the file has {self._size})",
                    hint="copy, download or convert the file again",
                )
            yield name, TensorInfo(name, shape, kind, start + offset, n_bytes)

    def _string(self, limit: int | None = None) -> str:
        (length,) = self._unpack("<Q")
        end = self._at + length
        if end > self._size or (limit is not None and length > limit):
            raise self._bad(f"a string of {length} bytes at byte {self._at}")
        # surrogateescape: chatglm vocabularies hold bytes that are no UTF-8 of their own
        text = self._data[self._at : end].decode("utf-8", "surrogateescape")
        self._at = end
        return text

    def _strings(self, n: int) -> list[str]:
        """What `_string` gives, without calls: a vocabulary and its merges are half a million."""
        data, size, at = self._data, self._size, self._at
        length_at = _LENGTH.unpack_from
        found = []
        for _ in range(n):
            start = at + _LENGTH.size
            if start > size:
                raise self._bad("its header ends in the middle")
            at = start + length_at(data, at)[0]
            if at > size:
                raise self._bad(f"a string of {at - start} bytes at byte {start}")
            found.append(data[start:at].decode("utf-8", "surrogateescape"))
        self._at = at
        return found

    def _unpack(self, form: str) -> tuple[Any, ...]:
        n_bytes = struct.calcsize(form)
        if self._at + n_bytes > self._size:
            raise self._bad("its header ends in the middle")
        values = struct.unpack_from(form, self._data, self._at)
        self._at += n_bytes
        return values

    def _take(self, scalar: struct.Struct) -> Any:
        if self._at + scalar.size > self._size:
            raise self._bad("its header ends in the middle")
        (value,) = scalar.unpack_from(self._data, self._at)
        self._at += scalar.size
        return value

    def _bad(self, what: str) -> GGUFError:
        return GGUFError(
            f"{self._path.name}: broken GGUF header ({what})",
            hint="copy, download or convert the file again",
        )
