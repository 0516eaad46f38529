"""The arithmetic of perplexity and KL divergence, on a few rows of logits at a time, in f64.

Definitions, the 16-bit form of a base's log-probabilities and its floor are llama-perplexity's
(llama.cpp, tools/perplexity/perplexity.cpp), so that figures and files are the same. Knows numbers
only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.errors import EngineError, EvaluationError

# 40 bytes each at most are held, and of a large vocabulary one row: less than the plan counts for a
# sampler, which there is none of.
_BLOCK_ELEMENTS = 1 << 16
FLOOR = 16.0
"""Nats under the largest logit, below which a base's logits are all taken for this far below."""
MAKE_BASE = "make it again: autoglm-gguf evaluate perplexity BASE_MODEL --save-base FILE …"
"""The hint where a base is of no use."""
_LEVELS = 65535
_SUM_OFF = 0.01  # of a row's probabilities from 1; their 16 bits make it some 1e-4
_HEAD = 4  # 16-bit words of a row before its levels: scale and lowest log-probability, f32 each


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error."""

    value: float
    error: float
    """0 for fewer than two values."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How values over tokens are spread."""

    mean: float
    error: float
    """Standard error of the mean."""
    median: float
    p90: float
    p95: float
    p99: float
    """99th percentile, between neighbours linearly; the others alike."""
    p99_9: float
    maximum: float


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model and its base held of the same tokens, ``(n,)`` each."""

    nll: NDArray[np.float64]
    """Negative log-probability of the token, nats."""
    base_nll: NDArray[np.float64]
    """The base's, never above about `FLOOR` and the logarithm of the vocabulary."""
    kl_divergence: NDArray[np.float64]
    """Of the model from the base, nats. Rounding to 16 bits may make it a little less than 0."""
    same_top: NDArray[np.bool_]
    """Both hold the same token the most probable."""

    @property
    def delta_p(self) -> NDArray[np.float64]:
        """The token's probability, less the base's."""
        delta: NDArray[np.float64] = np.exp(-self.nll) - np.exp(-self.base_nll)
        return delta


def rows_at_once(n_vocab: int) -> int:
    """How many rows of logits are worked on together: the bound of what this module holds."""
    return max(1, _BLOCK_ELEMENTS // n_vocab)


def row_words(n_vocab: int) -> int:
    """16-bit words of a base's row."""
    return 2 * ((n_vocab + 1) // 2) + _HEAD


def negative_log_likelihoods(
    rows: NDArray[np.float32], targets: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Of each row's target, in nats.

    Args:
        rows: Logits ``(n, n_vocab)``.
        targets: ``(n,)``.

    Raises:
        EngineError: Logits are not finite.
    """
    log_total = _log_totals(rows)
    chosen = np.take_along_axis(rows, targets[:, None].astype(np.intp), 1)[:, 0]
    return log_total - chosen.astype(np.float64)


def encode_base(rows: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Log-probabilities in 16 bits each, as llama-perplexity writes them.

    Args:
        rows: Logits ``(n, n_vocab)``.

    Returns:
        ``(n, row_words)``: scale and lowest log-probability in f32, then a level for each token;
        log-probability = lowest + scale · level. Logits more than `FLOOR` under the largest get
        level 0.

    Raises:
        EngineError: Logits are not finite.
    """
    totals = _log_totals(rows)
    highest = rows.max(1)
    lowest = np.maximum(rows.min(1), highest - np.float32(FLOOR))
    log_sum = (totals - highest).astype(np.float32)
    scale = (highest - lowest) / np.float32(_LEVELS)
    n, n_vocab = rows.shape
    out = np.zeros((n, row_words(n_vocab)), np.uint16)
    head = np.stack([scale, lowest - highest - log_sum], 1).astype("<f4")
    out[:, :_HEAD] = head.view("<u2")
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    levels = np.rint((rows - lowest[:, None]) * inverse[:, None])
    out[:, _HEAD : _HEAD + n_vocab] = np.where(rows > lowest[:, None], levels, 0)
    return out


def compare_with_base(
    rows: NDArray[np.float32], base: NDArray[np.uint16], targets: NDArray[np.int32]
) -> TokenScores:
    """Score a model's logits against a base's rows.

    Args:
        rows: Logits ``(n, n_vocab)``.
        base: ``(n, row_words)``, from `encode_base`.
        targets: ``(n,)``.

    Raises:
        EngineError: Logits are not finite.
        EvaluationError: A base's row holds no probabilities.
    """
    n_vocab = rows.shape[1]
    head = np.ascontiguousarray(base[:, :_HEAD]).view("<f4").astype(np.float64)
    scale, lowest = head[:, :1], head[:, 1:]
    levels = base[:, _HEAD : _HEAD + n_vocab]
    with np.errstate(over="ignore", invalid="ignore"):  # of a damaged file, which is refused
        p_log_base = scale * levels + lowest
        p_base = np.exp(p_log_base)
    p_base[p_log_base <= -FLOOR] = 0
    _check_sums(p_base.sum(1), n_vocab)
    at = targets[:, None].astype(np.intp)
    log_total = _log_totals(rows)
    nll = log_total - np.take_along_axis(rows, at, 1)[:, 0]
    base_nll = -np.take_along_axis(p_log_base, at, 1)[:, 0]
    p_log_base -= rows
    p_log_base += log_total[:, None]
    p_base *= p_log_base
    same = rows.argmax(1) == levels.argmax(1)
    return TokenScores(nll, base_nll, p_base.sum(1), same)


def join_scores(parts: list[TokenScores]) -> TokenScores:
    """The scores of several blocks as one."""
    return TokenScores(
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.base_nll for part in parts]),
        np.concatenate([part.kl_divergence for part in parts]),
        np.concatenate([part.same_top for part in parts]),
    )


def estimate_mean(values: NDArray[Any]) -> Estimate:
    """The mean and its standard error, with n - 1 degrees of freedom."""
    n = values.size
    error = float(values.std()) / math.sqrt(n - 1) if n > 1 else 0.0
    return Estimate(float(values.mean()), error)


def estimate_perplexity(nll: NDArray[np.float64]) -> Estimate:
    """Perplexity, and its standard error to first order."""
    mean = estimate_mean(nll)
    value = _exp(mean.value)
    return Estimate(value, value * mean.error)


def estimate_log_ratio(scores: TokenScores) -> Estimate:
    """ln(perplexity / perplexity of the base), from the differences token by token."""
    return estimate_mean(scores.nll - scores.base_nll)


def spread(values: NDArray[np.float64]) -> Spread:
    """Mean, error and percentiles."""
    mean = estimate_mean(values)
    at = np.quantile(values, (0.5, 0.9, 0.95, 0.99, 0.999, 1.0))
    return Spread(mean.value, mean.error, *map(float, at))


def _check_sums(sums: NDArray[np.float64], n_vocab: int) -> None:
    """Refuse rows whose probabilities do not sum to 1, but for what lies under the floor."""
    least = 1 - _SUM_OFF - n_vocab * math.exp(-FLOOR)
    wrong = ~((least <= sums) & (sums <= 1 + _SUM_OFF))  # NaN too
    if wrong.any():
        raise EvaluationError(
            f"base file: damaged (the probabilities of a row sum to {sums[wrong][0]:.4g})",
            hint=MAKE_BASE,
        )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _log_totals(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithm of the sum of each row's exponentials, ``(n,)``."""
    if not np.isfinite(rows).all():
        raise EngineError(
            "llama.cpp: logits are not finite",
            hint="the model is damaged: convert the checkpoint again",
        )
    highest = rows.max(1).astype(np.float64)
    shifted = rows - highest[:, None]
    np.exp(shifted, out=shifted)
    totals: NDArray[np.float64] = highest + np.log(shifted.sum(1))
    return totals
