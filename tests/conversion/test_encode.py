"""The search over scales: never worse, better by how much, and in ggml's own format."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from autoglm_gguf.conversion.encode import SEARCHED, encode
from autoglm_gguf.native.ggml import GGMLType, dequantize, quantize

pytestmark = pytest.mark.native
N_PER_ROW = 256


def gaussian(n_rows: int = 64) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (0.02 * rng.standard_normal((n_rows, N_PER_ROW))).astype(np.float32)


def block_errors(
    rows: np.ndarray, raw: np.ndarray, kind: GGMLType, weights: np.ndarray | None
) -> np.ndarray:
    off = np.square(dequantize(raw, kind, rows.shape[1]) - rows)
    if weights is not None:
        off *= weights
    return off.reshape(-1, 32).sum(1)


@pytest.mark.parametrize("kind", SEARCHED)
@pytest.mark.parametrize("weighted", [False, True])
def test_search_makes_no_block_worse(kind: GGMLType, weighted: bool) -> None:
    rows = gaussian()
    rows[3] = 0
    rows[4, 7] = 3.0
    weights = np.random.default_rng(6).exponential(1.0, N_PER_ROW).astype(np.float32)
    given = weights if weighted else None
    plain = block_errors(rows, quantize(rows, kind, given), kind, given)
    found = block_errors(rows, encode(rows, kind, given, search=True), kind, given)
    assert (found <= plain * (1 + 1e-6)).all()


# What the search takes off the squared error of normal weights: measured 11 to 20 %.
@pytest.mark.parametrize("kind", SEARCHED)
def test_search_lowers_the_error_of_normal_weights(kind: GGMLType) -> None:
    rows = gaussian(256)
    plain = block_errors(rows, quantize(rows, kind), kind, None).sum()
    found = block_errors(rows, encode(rows, kind, search=True), kind, None).sum()
    assert found < 0.9 * plain


def test_search_finds_a_scale_that_fits_exactly() -> None:
    # ggml puts the largest value, 7 steps up, at -8: no other value is hit then.
    levels = np.arange(32) % 15 - 7
    rows = np.tile(0.25 * levels, 8).astype(np.float32)[None]
    assert block_errors(rows, quantize(rows, GGMLType.Q4_0), GGMLType.Q4_0, None).min() > 0
    raw = encode(rows, GGMLType.Q4_0, search=True)
    assert (dequantize(raw, GGMLType.Q4_0, N_PER_ROW) == rows).all()


@pytest.mark.parametrize("kind", SEARCHED)
def test_searched_bytes_are_read_by_gguf_py(kind: GGMLType) -> None:
    rows = gaussian()
    raw = encode(rows, kind, search=True)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(kind)))
    assert np.array_equal(theirs, dequantize(raw, kind, N_PER_ROW))


@pytest.mark.parametrize("kind", [k for k in GGMLType if k not in SEARCHED])
def test_other_types_are_ggmls_own_bytes(kind: GGMLType) -> None:
    rows = gaussian(4)
    weights = np.ones(N_PER_ROW, np.float32)
    assert np.array_equal(encode(rows, kind, weights, search=True), quantize(rows, kind, weights))


@pytest.mark.parametrize("kind", SEARCHED)
def test_nothing_is_searched_unless_asked(kind: GGMLType) -> None:
    rows = gaussian(4)
    assert np.array_equal(encode(rows, kind), quantize(rows, kind))
