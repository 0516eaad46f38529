"""The arithmetic, against numbers worked out by hand and the definitions in plain f64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from autoglm_gguf import EngineError, EvaluationError
from autoglm_gguf.evaluate import scores


def softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    exponentials = np.exp(row.astype(np.float64) - row.max())
    return exponentials / exponentials.sum()


def test_nll_is_the_negative_logarithm_of_the_softmax() -> None:
    rows = np.log(np.array([[1, 2, 5], [8, 1, 1]], np.float32))
    found = scores.negative_log_likelihoods(rows, np.array([1, 0], np.int32))
    assert found == pytest.approx([-math.log(2 / 8), -math.log(8 / 10)])


def test_nll_of_large_logits_does_not_overflow() -> None:
    rows = np.array([[3e4, 0, -3e4]], np.float32)
    assert scores.negative_log_likelihoods(rows, np.array([2], np.int32)) == pytest.approx([6e4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    rows = np.array([[0, bad, 1]], np.float32)
    with pytest.raises(EngineError, match="not finite"):
        scores.negative_log_likelihoods(rows, np.array([0], np.int32))


def test_base_row_is_scale_lowest_and_levels() -> None:
    """Worked out by hand: three logits, the middle one half way."""
    row = np.array([[0, 4, 8]], np.float32)
    encoded = scores.encode_base(row)
    assert encoded.shape == (1, 4 + 4)  # an odd vocabulary is padded to an even one
    scale, lowest = encoded[0, :4].view("<f4")
    assert scale == pytest.approx(8 / 65535)
    assert lowest == pytest.approx(-8 - math.log(1 + math.exp(-4) + math.exp(-8)))
    assert encoded[0, 4:].tolist() == [0, 32768, 65535, 0]  # 32767.5 rounds to the even level


def test_base_logits_far_below_the_largest_are_cut_off() -> None:
    encoded = scores.encode_base(np.array([[-100, -15.9, -16, 0]], np.float32))
    levels = encoded[0, 4:].tolist()
    assert levels[0] == levels[2] == 0
    assert levels[1] == pytest.approx(0.1 / 16 * 65535, abs=1)
    assert levels[3] == 65535


def test_equal_logits_make_a_base_without_scale() -> None:
    encoded = scores.encode_base(np.full((1, 4), 3, np.float32))
    assert encoded[0, :4].view("<f4").tolist() == [0, pytest.approx(-math.log(4))]
    assert not encoded[0, 4:].any()


def test_kl_divergence_is_its_definition() -> None:
    rng = np.random.default_rng(5)
    base, other = (rng.normal(0, 2, (6, 301)).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, 301, 6).astype(np.int32)
    found = scores.compare_with_base(other, scores.encode_base(base), targets)
    for n in range(6):
        p, q = softmax(base[n]), softmax(other[n])
        assert found.kl_divergence[n] == pytest.approx((p * np.log(p / q)).sum(), abs=2e-4)
        assert found.nll[n] == pytest.approx(-math.log(q[targets[n]]))
        assert found.base_nll[n] == pytest.approx(-math.log(p[targets[n]]), abs=2e-4)
        assert found.delta_p[n] == pytest.approx(q[targets[n]] - p[targets[n]], abs=1e-4)
        assert found.same_top[n] == (p.argmax() == q.argmax())


def test_model_is_no_distance_from_itself() -> None:
    rows = np.random.default_rng(1).normal(0, 3, (4, 1000)).astype(np.float32)
    found = scores.compare_with_base(rows, scores.encode_base(rows), np.zeros(4, np.int32))
    assert np.abs(found.kl_divergence).max() < 1e-4
    assert found.same_top.all()


def test_estimates_are_mean_and_standard_error() -> None:
    values = np.array([1.0, 2, 3, 6])
    found = scores.estimate_mean(values)
    assert found.value == 3
    # sum of squares of the differences 4 + 1 + 0 + 9, over n (n - 1), as llama-perplexity's
    assert found.error == pytest.approx(math.sqrt(14 / 4 / 3))
    assert scores.estimate_mean(values[:1]).error == 0
    perplexity = scores.estimate_perplexity(values)
    assert perplexity.value == pytest.approx(math.exp(3))
    assert perplexity.error == pytest.approx(math.exp(3) * found.error)


def test_perplexity_too_large_for_a_float_is_infinite() -> None:
    assert scores.estimate_perplexity(np.array([2000.0])).value == math.inf


def test_spread_interpolates_percentiles() -> None:
    found = scores.spread(np.arange(101, dtype=np.float64))
    assert (found.mean, found.median, found.maximum) == (50, 50, 100)
    assert (found.p90, found.p95, found.p99) == (90, 95, 99)
    assert found.p99_9 == pytest.approx(99.9)


def test_log_ratio_error_is_that_of_paired_differences() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(5, 1, 50)
    nll = base + rng.normal(0.1, 0.01, 50)
    found = scores.estimate_log_ratio(
        scores.TokenScores(nll, base, np.zeros(50), np.ones(50, np.bool_))
    )
    # llama-perplexity: the errors of both, less twice their covariance
    variance = (nll.var() + base.var() - 2 * np.cov(nll, base, ddof=0)[0, 1]) / 49
    assert found.error == pytest.approx(math.sqrt(variance))
    assert found.value == pytest.approx((nll - base).mean())


def test_work_is_done_on_a_few_rows_of_a_large_vocabulary() -> None:
    assert scores.rows_at_once(151_552) == 1
    assert scores.rows_at_once(1024) == 64


@pytest.mark.parametrize(
    ("scale", "lowest"),
    [(0, 0), (math.nan, -3), (1e-4, math.nan), (1e38, -3), (-math.inf, -3), (0, math.inf), (0, -9)],
)
def test_base_rows_that_hold_no_probabilities_are_refused(scale: float, lowest: float) -> None:
    """Zeros, as of a file that was never written to its end, and what anyone may forge."""
    base = np.zeros((2, 4 + 8), np.uint16)
    base[0, :4] = np.array([0, -math.log(8)], "<f4").view(np.uint16)  # eight tokens alike
    base[1, :4] = np.array([scale, lowest], "<f4").view(np.uint16)
    rows, targets = np.zeros((2, 8), np.float32), np.zeros(2, np.int32)
    assert scores.compare_with_base(rows[:1], base[:1], targets[:1]).kl_divergence[0] < 1e-6
    with pytest.raises(EvaluationError, match="damaged") as caught:
        scores.compare_with_base(rows, base, targets)
    assert "--save-base" in caught.value.hint


def test_base_with_much_under_its_floor_is_taken() -> None:
    """A large vocabulary, nearly all of it as improbable as can be told: 1.8 % in sum."""
    rows = np.full((1, 160_000), -16, np.float32)
    rows[0, 7] = 0
    found = scores.compare_with_base(rows, scores.encode_base(rows), np.array([7], np.int32))
    assert abs(found.kl_divergence[0]) < 0.02
