"""Importance matrices: what is read of either format, made fit for ggml, and refused."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from builders import pack_gguf, pack_imatrix

from autoglm_gguf import GGUFError
from autoglm_gguf.conversion.imatrix import Imatrix, read_imatrix, write_imatrix

NAME = "blk.0.ffn_down.weight"
KEYS = {
    "general.type": "imatrix",
    "imatrix.datasets": ["text"],
    "imatrix.chunk_count": 2,
    "imatrix.chunk_size": 8,
}
F32 = 0


def forge(
    path: Path, sums: list[float], count: float = 2.0, keys: dict[str, object] = KEYS
) -> Path:
    values = {f"{NAME}.in_sum2": sums, f"{NAME}.counts": [count]}
    tensors = {
        name: ((len(numbers),), F32, struct.pack(f"<{len(numbers)}f", *numbers))
        for name, numbers in values.items()
    }
    path.write_bytes(pack_gguf(keys, tensors))
    return path


def matrix(*values: float) -> Imatrix:
    return Imatrix(Path("im.gguf"), {NAME: np.array(values, np.float32)})


def weigh(imatrix: Imatrix, n_per_row: int, padded_from: int) -> list[float]:
    found = imatrix.weights(NAME, n_per_row, padded_from=padded_from)
    assert found is not None and found.dtype == np.float32
    return [float(value) for value in found]


# --- read ---


def test_values_are_sums_over_counts(tmp_path: Path) -> None:
    found = read_imatrix(forge(tmp_path / "im.gguf", [2.0, 6.0, 0.0]))
    assert found.columns[NAME].tolist() == [1.0, 3.0, 0.0]


def test_matrix_that_nothing_passed_through_weighs_all_columns_alike(tmp_path: Path) -> None:
    found = read_imatrix(forge(tmp_path / "im.gguf", [2.0, 6.0], count=0.0))
    assert found.columns[NAME].tolist() == [1.0, 1.0]


def test_legacy_values_are_means_over_calls(tmp_path: Path) -> None:
    path = tmp_path / "im.dat"
    path.write_bytes(pack_imatrix({NAME: np.array([1.0, 3.0], np.float32)}, n_calls=8))
    assert read_imatrix(path).columns[NAME].tolist() == [1.0, 3.0]
    path.write_bytes(pack_imatrix({NAME: np.array([1.0, 3.0], np.float32)}) + b"and what follows")
    assert read_imatrix(path).columns[NAME].tolist() == [1.0, 3.0]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "im.gguf"
    sums = {NAME: np.array([2.0, 6.0])}
    write_imatrix(path, sums, {NAME: 4}, dataset="text", n_chunks=2, chunk_size=2)
    assert read_imatrix(path).columns[NAME].tolist() == [0.5, 1.5]


# --- made fit for ggml ---


def test_weights_are_the_files_own() -> None:
    assert weigh(matrix(1.0, 3.0), 2, 2) == [1.0, 3.0]
    assert matrix(1.0, 3.0).weights("other", 2, padded_from=2) is None


def test_padding_gets_the_mean() -> None:
    assert weigh(matrix(1.0, 3.0), 4, 2) == [1.0, 3.0, 2.0, 2.0]


def test_file_of_a_padded_model_serves_the_unpadded_one() -> None:
    assert weigh(matrix(1.0, 3.0, 0.0, 0.0), 2, 2) == [1.0, 3.0]
    assert weigh(matrix(1.0, 3.0, 0.0, 0.0), 4, 2) == [1.0, 3.0, 2.0, 2.0]
    with pytest.raises(GGUFError, match="has 4 columns, required 2"):
        weigh(matrix(1.0, 3.0, 0.0, 1e-9), 2, 2)


def test_no_column_weighs_nothing_at_all() -> None:
    """IQ3_S ends the process over a block whose importances are all 0."""
    first, second = weigh(matrix(0.0, 4.0), 2, 2)
    assert second == 4.0
    assert 0 < first < 1e-9
    assert weigh(matrix(0.0, 0.0), 2, 2) == [1.0, 1.0]


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e37])
def test_sizes_that_ggml_cannot_square_are_scaled(scale: float) -> None:
    assert weigh(matrix(1.0 * scale, 3.0 * scale), 2, 2) == pytest.approx([0.5, 1.5])


# --- refused ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_values_that_are_no_sums_of_squares_are_refused(tmp_path: Path, value: float) -> None:
    for sums, count in (([1.0, value], 2.0), ([1.0, 1.0], value)):
        with pytest.raises(GGUFError, match=r"im\.gguf: damaged \(tensor 'blk\.0\.ffn_down"):
            read_imatrix(forge(tmp_path / "im.gguf", sums, count))
    path = tmp_path / "im.dat"
    path.write_bytes(pack_imatrix({NAME: np.array([1.0, value], np.float32)}))
    with pytest.raises(GGUFError, match=r"im\.dat: damaged \(tensor 'blk\.0\.ffn_down"):
        read_imatrix(path)


def test_count_beyond_all_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="damaged"):
        read_imatrix(forge(tmp_path / "im.gguf", [1.0], 3e38))


def test_other_gguf_is_refused(tmp_path: Path) -> None:
    keys = {key: value for key, value in KEYS.items() if key != "imatrix.chunk_count"}
    with pytest.raises(GGUFError, match="not an importance matrix") as caught:
        read_imatrix(forge(tmp_path / "im.gguf", [1.0], keys=keys))
    assert "autoglm-gguf calibrate" in caught.value.hint


def test_sums_without_counts_and_other_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "im.gguf"
    path.write_bytes(pack_gguf(KEYS, {f"{NAME}.in_sum2": ((2,), F32, bytes(8))}))
    with pytest.raises(GGUFError, match="has sums but no counts"):
        read_imatrix(path)
    half = {f"{NAME}.in_sum2": ((2,), 1, bytes(4)), f"{NAME}.counts": ((1,), F32, bytes(4))}
    path.write_bytes(pack_gguf(KEYS, half))
    with pytest.raises(GGUFError, match="is F16, not F32"):
        read_imatrix(path)


def test_truncated_files_are_refused_at_every_length(tmp_path: Path) -> None:
    whole = forge(tmp_path / "im.gguf", [1.0, 2.0]).read_bytes()
    legacy = pack_imatrix({NAME: np.ones(2, np.float32), "output.weight": np.ones(3, np.float32)})
    path = tmp_path / "cut"
    # The table is padded to 32 bytes; behind the last tensor nothing is needed.
    for data, last in ((whole, len(whole) - 28), (legacy, len(legacy))):
        for length in range(last):
            path.write_bytes(data[:length])
            with pytest.raises(GGUFError, match=r"truncated|broken|not an importance|not a GGUF"):
                read_imatrix(path)


@pytest.mark.parametrize(("at", "value"), [(0, 0), (0, -1), (0, 2**31 - 1), (4, -1), (4, 2**30)])
def test_absurd_legacy_sizes_are_refused(tmp_path: Path, at: int, value: int) -> None:
    data = bytearray(pack_imatrix({NAME: np.ones(2, np.float32)}))
    struct.pack_into("<i", data, at, value)
    path = tmp_path / "im.dat"
    path.write_bytes(data)
    with pytest.raises(GGUFError, match="not an importance matrix, or truncated"):
        read_imatrix(path)


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(GGUFError, match="cannot be read"):
            read_imatrix(path)
