"""Measured errors: what is measured, how it is sampled, and how far the sample is to be trusted."""

from __future__ import annotations

import numpy as np
import pytest

from autoglm_gguf import CheckpointError
from autoglm_gguf.checkpoint.safetensors import LazyTensor
from autoglm_gguf.conversion.rounding import RoundingError, measure_rounding, sample_rows
from autoglm_gguf.conversion.tensors import ZERO_ROW, OutTensor
from autoglm_gguf.native.ggml import GGMLType, dequantize, quantize
from autoglm_gguf.progress import Progress

pytestmark = pytest.mark.native
Q4_0, Q3_K, IQ4_NL = GGMLType.Q4_0, GGMLType.Q3_K, GGMLType.IQ4_NL


def matrix(
    values: np.ndarray,
    name: str = "blk.0.ffn_down.weight",
    *,
    row_order: np.ndarray | None = None,
    imatrix: np.ndarray | None = None,
) -> OutTensor:
    source = LazyTensor(name, values.shape, GGMLType.F32, values)
    n_rows = len(values) if row_order is None else len(row_order)
    shape = (n_rows, values.shape[1])
    return OutTensor(name, shape, GGMLType.F16, source, lambda: values, row_order, imatrix)


def draw(n_rows: int, n_per_row: int = 256) -> np.ndarray:
    """Rows of very different size."""
    rng = np.random.default_rng(n_rows)
    sizes = np.exp(rng.standard_normal((n_rows, 1)))
    return (sizes * rng.standard_normal((n_rows, n_per_row))).astype(np.float32)


def test_error_of_a_whole_matrix_is_the_encodings_own() -> None:
    values = draw(64)
    weights = np.random.default_rng(1).exponential(1.0, 256).astype(np.float32)
    tensor = matrix(values, imatrix=weights)
    found = measure_rounding([tensor], {tensor.name: [Q3_K]}, n_threads=1)[tensor.name][Q3_K]
    decoded = dequantize(quantize(values, Q3_K, weights), Q3_K, 256)
    relative = (weights * (decoded - values) ** 2).sum() / (weights * values**2).sum()
    assert found.relative == pytest.approx(relative, rel=1e-4)
    assert (found.standard_error, found.n_rows) == (0.0, 64)


def test_error_of_a_sample_is_near_the_whole_matrixs() -> None:
    values = draw(60_000)
    tensor = matrix(values)
    found = measure_rounding([tensor], {tensor.name: [Q4_0, IQ4_NL]}, n_threads=2)[tensor.name]
    assert found[IQ4_NL].n_rows < found[Q4_0].n_rows < 60_000
    for kind, error in found.items():
        decoded = dequantize(quantize(values, kind), kind, 256)
        whole = ((decoded - values) ** 2).sum() / (values**2).sum()
        if kind == IQ4_NL:  # q4_0 is measured with better scales
            assert 0 < error.standard_error < 0.05 * whole
            assert abs(error.relative - whole) < 4 * error.standard_error


def test_sample_is_one_row_of_every_stretch_and_always_the_same() -> None:
    tensor = matrix(np.zeros((50_000, 256), np.float32))
    rows = sample_rows(tensor)
    assert np.array_equal(rows, sample_rows(tensor))
    edges = np.linspace(0, 50_000, len(rows) + 1)
    assert (rows >= np.floor(edges[:-1])).all() and (rows <= edges[1:]).all()
    assert len(np.unique(rows % 64)) > 60, "no period"


def test_rows_of_padding_are_not_looked_at() -> None:
    order = np.concatenate([np.arange(4), np.full(4, ZERO_ROW), np.arange(4, 8)])
    tensor = matrix(draw(8), row_order=order)
    assert sample_rows(tensor).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_zeros_have_no_error() -> None:
    tensor = matrix(np.zeros((8, 256), np.float32))
    found = measure_rounding([tensor], {tensor.name: [Q4_0]}, n_threads=1)
    assert found == {tensor.name: {Q4_0: RoundingError(0.0, 0.0, 8)}}


def test_not_a_number_is_refused() -> None:
    values = draw(8)
    values[3, 3] = np.nan
    tensor = matrix(values)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        measure_rounding([tensor], {tensor.name: [Q4_0]}, n_threads=2)


def test_progress_ends_with_everything_and_interrupts_end_the_work() -> None:
    tensors = [matrix(draw(8), f"blk.{n}.ffn_down.weight") for n in range(4)]
    candidates = {tensor.name: [Q4_0] for tensor in tensors}
    told: list[Progress] = []
    measure_rounding(tensors, candidates, n_threads=2, on_progress=told.append)
    assert [progress.done_bytes for progress in told][-1] == told[-1].total_bytes

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_rounding(tensors, candidates, n_threads=2, on_progress=interrupt)
