"""ggml's kernels through ctypes, against values computed here."""

from __future__ import annotations

import numpy as np
import pytest

from autoglm_gguf.gguf.header import TENSOR_TYPES
from autoglm_gguf.native.ggml import (
    GGMLType,
    block_size,
    dequantize,
    quantize,
    row_bytes,
    to_float32,
)

pytestmark = pytest.mark.native

# Of standard normal values; a step is about range / 2**bits.
WORST_RMSE = {"F32": 0, "F16": 1e-3, "BF16": 5e-3, "Q8": 0.01, "Q6": 0.03, "Q5": 0.06} | {
    "Q4": 0.12,
    "Q3": 0.25,
    "Q2": 0.4,
}


@pytest.mark.parametrize("ggml_type", list(GGMLType))
def test_header_table_agrees_with_ggml(ggml_type: GGMLType) -> None:
    _, block, block_bytes = TENSOR_TYPES[ggml_type]
    assert block_size(ggml_type) == block
    assert row_bytes(ggml_type, 512) == 512 // block * block_bytes


def test_bf16_widens_by_shifting() -> None:
    words = np.array([0x3F80, 0xBF80, 0x0000, 0x4049], np.uint16)
    assert to_float32(words, GGMLType.BF16).tolist() == [1.0, -1.0, 0.0, 3.140625]


def test_f16_widens() -> None:
    words = np.array([1.5, -2.0, 65504.0], np.float16).view(np.uint16)
    assert to_float32(words, GGMLType.F16).tolist() == [1.5, -2.0, 65504.0]


def test_q8_0_block_is_scale_and_rounded_values() -> None:
    """block_q8_0: f16 scale = max|x| / 127, then 32 int8."""
    row = np.linspace(-12.7, 12.7, 32, dtype=np.float32)[None]
    block = quantize(row, GGMLType.Q8_0)
    scale = np.float32(12.7) / 127
    assert block[0, :2].view(np.float16)[0] == np.float16(scale)
    assert np.abs(block[0, 2:].view(np.int8) - row[0] / scale).max() <= 0.5 + 1e-3


def test_q4_0_block_is_scale_and_nibbles() -> None:
    """block_q4_0: f16 scale = signed extreme / -8, low nibbles hold the first 16 values."""
    row = np.arange(-16, 16, dtype=np.float32)[None] / 2
    block = quantize(row, GGMLType.Q4_0)
    assert block[0, :2].view(np.float16)[0] == np.float16(1.0)  # -8 / -8
    first, second = block[0, 2:] & 15, block[0, 2:] >> 4
    assert first.tolist() == [min(15, int(x + 8.5)) for x in row[0, :16]]
    assert second.tolist() == [min(15, int(x + 8.5)) for x in row[0, 16:]]


def test_f16_and_bf16_rows_round_to_nearest() -> None:
    row = np.array([[1.0, 1.00048828125, -3.1415927, 1e-3]], np.float32)
    half = quantize(row, GGMLType.F16).view(np.float16)
    assert np.array_equal(half, row.astype(np.float16))
    brain = to_float32(quantize(row, GGMLType.BF16).view(np.uint16), GGMLType.BF16)
    assert np.abs(brain - row).max() <= np.abs(row).max() * 2**-8


@pytest.mark.parametrize("ggml_type", list(GGMLType))
def test_dequantize_reverses_quantize_within_the_types_step(ggml_type: GGMLType) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 512), np.float32)
    weights = np.ones(512, np.float32) if ggml_type == GGMLType.IQ3_XXS else None
    decoded = dequantize(quantize(rows, ggml_type, weights), ggml_type, 512)
    error = float(np.sqrt(((decoded - rows) ** 2).mean()))
    assert error <= WORST_RMSE[ggml_type.name.split("_")[0].removeprefix("I")]


def test_dequantize_gives_the_values_of_a_block() -> None:
    """q8_0: scale 0.5, then -16..15."""
    block = np.concatenate(
        [
            np.array([0.5], np.float16).view(np.uint8),
            np.arange(-16, 16, dtype=np.int8).view(np.uint8),
        ]
    )[None]
    assert dequantize(block, GGMLType.Q8_0, 32)[0].tolist() == [x / 2 for x in range(-16, 16)]
