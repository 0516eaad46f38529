"""Shards that are whole, incomplete, and made by an enemy."""

from __future__ import annotations

import json
import mmap
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    Shape,
    build_checkpoint,
    encode,
    random_tensors,
    read_json,
    write_json,
    write_safetensors,
)

from autoglm_gguf import CheckpointError
from autoglm_gguf.checkpoint.safetensors import INDEX, SINGLE, Shards


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A shard with a header of one's own, its length as it is or as claimed."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shard_names(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_shards_give_every_tensor_of_a_checkpoint(tmp_path: Path, dtype: str) -> None:
    shape = Shape(dtype=dtype, n_shards=3)
    expected = random_tensors(shape)
    with Shards(build_checkpoint(tmp_path / "c", shape)) as shards:
        assert set(shards.tensors) == set(expected)
        for name, tensor in shards.tensors.items():
            assert tensor.name == name
            assert tensor.ggml_type.name == dtype
            assert tensor.shape == tensor.data.shape == expected[name].shape
            assert tensor.data.tobytes() == encode(expected[name], dtype)


def test_shards_take_a_single_file_without_an_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE, {"a": np.ones((2, 3), np.float32)}, "F32")
    with Shards(tmp_path) as shards:
        assert shards.tensors["a"].data.tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
def test_lazy_tensor_gives_its_pages_back_and_reads_them_again(tmp_path: Path) -> None:
    values = np.arange(2**20, dtype=np.float32).reshape(1024, 1024)
    write_safetensors(tmp_path / SINGLE, {"a": values}, "F32")
    with Shards(tmp_path) as shards:
        tensor = shards.tensors["a"]
        assert float(tensor.data.sum()) > 0
        before = resident_bytes(tmp_path / SINGLE)
        tensor.release(0, values.size // 2)
        assert before - resident_bytes(tmp_path / SINGLE) >= values.nbytes // 2 - 2 * mmap.PAGESIZE
        assert np.array_equal(tensor.data, values)


def resident_bytes(path: Path) -> int:
    """Resident bytes of this process's maps of a file."""
    counted = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and first == "Rss:":
            counted += int(line.split()[1]) * 1024
    return counted


def test_shards_can_be_closed_while_an_array_is_in_use(checkpoint: Path) -> None:
    shards = Shards(checkpoint)
    tensor = next(iter(shards.tensors.values()))
    shards.close()
    shards.close()
    assert shards.tensors == {}
    assert tensor.data.size


def test_fingerprint_is_the_contents_and_not_the_places(tmp_path: Path) -> None:
    shape = Shape()
    with (
        Shards(build_checkpoint(tmp_path / "one", shape)) as one,
        Shards(build_checkpoint(tmp_path / "two", shape)) as two,
        Shards(build_checkpoint(tmp_path / "other", Shape(seed=2))) as other,
    ):
        assert len(one.fingerprint) == 16
        assert one.fingerprint == two.fingerprint != other.fingerprint


def test_shards_skip_a_rotary_table_of_another_type(tmp_path: Path) -> None:
    header = {"a": entry([1], 0, 4), "rotary_emb.inv_freq": entry([1], 4, 12, "F64")}
    write_raw(tmp_path / SINGLE, header, bytes(12))
    with Shards(tmp_path) as shards:
        assert set(shards.tensors) == {"a"}


def test_shards_skip_a_rotary_table_of_another_type_when_an_index_names_it(tmp_path: Path) -> None:
    names = {"a": entry([1], 0, 4), "rotary_emb.inv_freq": entry([1], 4, 12, "F64")}
    write_raw(tmp_path / "s.safetensors", names, bytes(12))
    write_json(tmp_path / INDEX, {"weight_map": dict.fromkeys(names, "s.safetensors")})
    with Shards(tmp_path) as shards:
        assert list(shards.tensors) == ["a"]


# --- incomplete ---


def test_shards_refuse_a_directory_without_any(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no {INDEX} and no {SINGLE}") as caught:
        Shards(tmp_path)
    assert caught.value.hint


def test_shards_name_the_missing_one(checkpoint: Path) -> None:
    missing = shard_names(checkpoint)[1]
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"{missing.name}: missing shard") as caught:
        Shards(checkpoint)
    assert "download" in caught.value.hint


def test_shards_name_the_truncated_one_and_its_tensor(checkpoint: Path) -> None:
    path = shard_names(checkpoint)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{path.name}: truncated") as caught:
        Shards(checkpoint)
    assert "downsample" in caught.value.message or "merger" in caught.value.message
    assert "download" in caught.value.hint


def test_shard_cut_anywhere_is_a_checkpoint_error(tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE, {"a": np.ones(8, np.float32)}, "F32")
    whole = (tmp_path / SINGLE).read_bytes()
    for n_bytes in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:n_bytes])
        with pytest.raises(CheckpointError, match=SINGLE):
            Shards(tmp_path)


def test_shard_damaged_anywhere_is_sound_or_a_checkpoint_error(tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE, {"a": np.ones(8), "b": np.ones((2, 2))}, "F32")
    whole = (tmp_path / SINGLE).read_bytes()
    for seed in range(300):
        rng = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(whole) - 48)] = rng.randrange(256)
        (tmp_path / SINGLE).write_bytes(damaged)
        try:
            with Shards(tmp_path) as shards:
                assert all(t.data.shape == t.shape for t in shards.tensors.values())
        except CheckpointError as error:
            assert SINGLE in error.message


def test_shards_name_an_index_entry_that_is_in_no_shard(checkpoint: Path) -> None:
    index = read_json(checkpoint / INDEX)
    index["weight_map"]["model.ghost.weight"] = shard_names(checkpoint)[0].name
    write_json(checkpoint / INDEX, index)
    with pytest.raises(CheckpointError, match=r"model\.ghost\.weight") as caught:
        Shards(checkpoint)
    assert caught.value.hint


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": None}, {"weight_map": []}]
)
def test_shards_refuse_an_index_without_a_map(tmp_path: Path, index: dict[str, Any]) -> None:
    write_json(tmp_path / INDEX, index)
    with pytest.raises(CheckpointError, match="no weight_map"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "x\0y",
        "\ud800",
        7,
        None,
    ],
)
def test_shards_refuse_names_that_lead_elsewhere(tmp_path: Path, shard: object) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": np.ones(1, np.float32)})
    write_json(tmp_path / INDEX, {"weight_map": {"a": shard}})
    with pytest.raises(CheckpointError, match="shard"):
        Shards(tmp_path)


# --- lies ---


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a": entry([4], 16, 32)}, "truncated"),
        ({"a": entry([2**40], 0, 2**42)}, "truncated"),
        ({"a": entry([4], 0, 8)}, "is not 8 bytes"),
        ({"a": entry([2**40, 2**40], 0, 16)}, "is not 16 bytes"),
        ({"a": entry([4], 16, 0)}, "'a'"),
        ({"a": entry([2**62], 0, 16)}, "shape"),
        ({"a": entry([-4], 0, 16)}, "shape"),
        ({"a": entry([4.0], 0, 16)}, "shape"),  # type: ignore[list-item]
        ({"a": entry([True], 0, 4)}, "shape"),
        ({"a": entry([1] * 9, 0, 4)}, "shape"),
        ({"a": entry([0], 0, 0)}, "'a'"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, "offsets"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": "0-16"}}, "offsets"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "offsets"),
        ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "type None"),
        ({"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, "type"),
        ({"a": entry([4], 0, 16, "F8_E4M3")}, "F8_E4M3"),
        ({"a": entry([4], 0, 16, "I32")}, "I32"),
        ({"a": [4]}, "list"),
        ({"a": None}, "NoneType"),
        ({"a": entry([3], 0, 12), "b": entry([2], 8, 16)}, "overlap"),
        ({"a": entry([4], 0, 16), "b": entry([1], 4, 8)}, "overlap"),
    ],
)
def test_shard_that_lies_about_a_tensor_is_refused(
    tmp_path: Path, tensors: dict[str, Any], named: str
) -> None:
    write_raw(tmp_path / SINGLE, tensors, bytes(16))
    with pytest.raises(CheckpointError, match=named) as caught:
        Shards(tmp_path)
    assert SINGLE in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("length", [0, 1, 17, 2**31, 2**63, 2**64 - 1])
def test_shard_that_lies_about_its_header_is_refused(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path / SINGLE, {"a": entry([4], 0, 16)}, bytes(16), length)
    with pytest.raises(CheckpointError, match=SINGLE):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"{}x",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 50_000,
        b'{"a": {}, "a": {}}',
        b'"' + b"9" * 5000,
    ],
    ids=lambda header: header[:8].decode("latin-1"),
)
def test_shard_with_a_header_that_is_no_table_is_refused(tmp_path: Path, header: bytes) -> None:
    write_raw(tmp_path / SINGLE, header, bytes(16))
    with pytest.raises(CheckpointError, match="broken safetensors"):
        Shards(tmp_path)


def test_shards_refuse_a_tensor_that_is_in_two(checkpoint: Path) -> None:
    first, second = shard_names(checkpoint)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="in two shards"):
        Shards(checkpoint)
