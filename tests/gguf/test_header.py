"""`read_header` on files that are right, cut short, damaged, and made by an enemy."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

import pytest
from builders import pack_gguf, pack_string, pack_value

from autoglm_gguf import GGUFError, TensorInfo, read_header

METADATA = {
    "general.architecture": "glm4",
    "general.name": "名字",
    "glm4.block_count": 2,
    "big": 2**40,
    "negative": -5,
    "half": 0.5,
    "yes": True,
    "ids": [3, 1, 2],
    "tokens": ["a", "好", ""],
    "none": [],
}
TENSORS = {
    "token_embd.weight": ((64, 3), 8, bytes(range(204))),  # Q8_0: 2 blocks of 34 bytes a row
    "norm.weight": ((4,), 0, b"\x00\x00\x80\x3f" * 4),
}
WHOLE = pack_gguf(METADATA, TENSORS)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def header_of(n_tensors: int, n_keys: int, body: bytes, version: int = 3) -> bytes:
    return (b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + body).ljust(64, b"\0")


def tensor(
    name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    n = len(shape) if n_dims is None else n_dims
    return pack_string(name) + struct.pack(f"<I{len(shape)}QIQ", n, *shape, kind, offset)


@pytest.mark.parametrize("version", [2, 3])
def test_header_gives_back_every_value(tmp_path: Path, version: int) -> None:
    header = read_header(write(tmp_path / "m.gguf", pack_gguf(METADATA, TENSORS, version=version)))
    assert header.metadata == METADATA
    assert header.version == version
    assert header.architecture == "glm4"
    assert header.alignment == 32


def test_header_places_tensors_in_bytes_from_the_start(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "m.gguf", WHOLE))
    embedding, norm = header.tensors.values()
    assert embedding == TensorInfo("token_embd.weight", (64, 3), 8, embedding.offset, 204)
    assert (embedding.type_name, embedding.n_elements) == ("Q8_0", 192)
    assert embedding.offset % 32 == 0
    assert norm.offset == embedding.offset + 224, "204 bytes are padded to 224"
    assert WHOLE[norm.offset : norm.offset + norm.n_bytes] == TENSORS["norm.weight"][2]
    assert header.weights_bytes == 220
    assert header.n_params == 196
    assert header.file_bytes == len(WHOLE)


def test_header_fills_the_architecture_into_keys(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "m.gguf", WHOLE))
    assert header.get_int("{arch}.block_count") == 2
    assert header.get_int("big") == 2**40
    assert header.get_int("absent") is None
    assert header.get_int("yes") is None, "a flag is no number"
    assert header.get_int("general.name") is None


def test_header_keeps_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "m.gguf", pack_gguf({"tokens": [b"\xff", b"ok"]})))
    first, second = header.metadata["tokens"]
    assert first.encode("utf-8", "surrogateescape") == b"\xff"
    assert second == "ok"


def test_header_honours_another_alignment(tmp_path: Path) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    data += pack_string("general.alignment") + pack_value(64) + tensor("t", (4,))
    data += bytes(-len(data) % 64)
    header = read_header(write(tmp_path / "m.gguf", data + bytes(64)))
    assert header.tensors["t"].offset == len(data)


def test_header_cut_anywhere_is_a_gguf_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    end = read_header(write(path, WHOLE)).tensors["norm.weight"].offset + 16
    for n_bytes in range(end):
        with pytest.raises(GGUFError, match=r"m\.gguf"):
            read_header(write(path, WHOLE[:n_bytes]))


def test_header_damaged_anywhere_is_sound_or_a_gguf_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    began = time.perf_counter()
    for seed in range(500):
        rng = random.Random(seed)
        damaged = bytearray(WHOLE)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(4, len(WHOLE) - 240)
            damaged[at] = rng.choice([0, 1, 8, 9, 0x7F, 0xFF, rng.randrange(256)])
        try:
            header = read_header(write(path, bytes(damaged)))
        except GGUFError as error:
            assert "m.gguf" in error.message
        else:
            assert all(t.offset + t.n_bytes <= len(WHOLE) for t in header.tensors.values())
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not a GGUF"),
        (b"GGUF", "not a GGUF"),
        (b"PK\3\4" + bytes(100), "not a GGUF"),
        (header_of(0, 0, b"", version=1), "version 1"),
        (header_of(0, 0, b"", version=4), "version 4"),
        (header_of(0, 0, b"", version=3 << 24), "version"),
        (header_of(2**63, 0, b""), "tensors"),
        (header_of(0, 2**64 - 1, b""), "keys"),
        (header_of(0, 1, struct.pack("<Q", 2**64 - 1)), "string"),
        (header_of(0, 1, struct.pack("<Q", 70_000)), "string"),
        (header_of(0, 1, pack_string("k") + struct.pack("<I", 99)), "unknown type 99"),
        (header_of(0, 1, pack_string("k") + struct.pack("<IIQ", 9, 8, 2**60)), "strings"),
        (header_of(0, 1, pack_string("k") + struct.pack("<IIQ", 9, 10, 2**62)), "values"),
        (header_of(0, 1, pack_string("k") + struct.pack("<IIQ", 9, 9, 1)), "array"),
        (header_of(0, 2, (pack_string("k") + pack_value(1)) * 2), "twice"),
        (header_of(0, 1, pack_string("general.alignment") + pack_value(0)), "alignment"),
        (header_of(0, 1, pack_string("general.alignment") + pack_value(33)), "alignment"),
        (header_of(0, 1, pack_string("general.alignment") + pack_value("8")), "alignment"),
        (header_of(1, 0, tensor("t", (2**40,))), "truncated"),
        (header_of(1, 0, tensor("t", (2**63, 2**63, 2**63))), "truncated"),
        (header_of(1, 0, tensor("t", (1,), offset=2**62)), "truncated"),
        (header_of(1, 0, tensor("t", (1,), kind=4)), "unknown type 4"),
        (header_of(1, 0, tensor("t", (0,))), "'t'"),
        (header_of(1, 0, tensor("t", (33,), kind=8)), "'t'"),
        (header_of(1, 0, tensor("t", (1,), offset=7)), "'t'"),
        (header_of(1, 0, tensor("t", (), n_dims=0)), "dimensions"),
        (header_of(1, 0, tensor("t", (), n_dims=2**31)), "dimensions"),
        (header_of(2, 0, tensor("t", (1,)) * 2) + bytes(96), "'t'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_header_that_lies_is_a_gguf_error(tmp_path: Path, data: bytes, named: str) -> None:
    with pytest.raises(GGUFError, match=named) as caught:
        read_header(write(tmp_path / "m.gguf", data))
    assert "m.gguf" in caught.value.message
    assert caught.value.hint


def test_header_error_says_how_much_is_missing(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="truncated") as caught:
        read_header(write(tmp_path / "m.gguf", WHOLE[:-32]))
    assert "norm.weight" in caught.value.message
    assert str(len(WHOLE) - 32) in caught.value.message


@pytest.mark.parametrize("name", ["absent.gguf", "file/below.gguf", "."])
def test_header_names_a_path_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / "file", b"")
    with pytest.raises(GGUFError) as caught:
        read_header(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message


def test_header_of_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GGUFError, match="not a GGUF file"):
        read_header(tmp_path / "pipe")


def test_read_header_takes_a_string_path(tmp_path: Path) -> None:
    assert read_header(str(write(tmp_path / "m.gguf", WHOLE))).path == tmp_path / "m.gguf"
