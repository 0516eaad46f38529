"""Which token is chosen, against the official server's rules computed in numpy."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autoglm_gguf import EngineError
from autoglm_gguf.config import SamplingParams
from autoglm_gguf.native.sampler import SamplerChain

pytestmark = pytest.mark.native


def open_chain(n_vocab: int, **sampling: Any) -> SamplerChain:
    model: Any = SimpleNamespace(n_vocab=n_vocab)
    return SamplerChain(model, SamplingParams(**sampling))


def context(logits: NDArray[np.float32]) -> Any:
    return SimpleNamespace(logits=lambda _output=-1: logits)


def penalised(
    logits: NDArray[np.float32],
    history: list[int],
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    repeat_penalty: float = 1.0,
) -> NDArray[np.float64]:
    """OpenAI's and vLLM's formulas, token by token."""
    found = logits.astype(np.float64)
    for token, count in Counter(history).items():
        if repeat_penalty != 1.0:
            positive = found[token] > 0
            found[token] *= 1 / repeat_penalty if positive else repeat_penalty
        found[token] -= frequency_penalty * count + presence_penalty
    return found


def support(logits: NDArray[np.float64], **sampling: float) -> dict[int, float]:
    """Each token that may come and its probability: temperature, min_p, top_k, top_p."""
    scaled = logits / sampling.get("temperature", 1.0)
    kept = [n for n in np.argsort(-scaled) if scaled[n] > -np.inf]
    p = np.exp(scaled - scaled.max())
    kept = [n for n in kept if p[n] >= sampling.get("min_p", 0.0) * p.max()]
    kept = kept[: int(sampling.get("top_k", 0)) or None]
    share = p[kept] / p[kept].sum()
    n_needed = int(np.searchsorted(np.cumsum(share), sampling.get("top_p", 1.0))) + 1
    kept = kept[:n_needed]
    return {int(n): float(p[n] / p[kept].sum()) for n in kept}


PENALTIES = [
    {"frequency_penalty": 0.2},
    {"frequency_penalty": -1.5},
    {"presence_penalty": 1.1},
    {"presence_penalty": -0.7},
    {"repeat_penalty": 1.3},
    {"repeat_penalty": 0.6},
    {"frequency_penalty": 0.3, "presence_penalty": -0.4, "repeat_penalty": 1.2},
]


@pytest.mark.parametrize("penalties", PENALTIES)
def test_greedy_choices_follow_the_formulas(penalties: dict[str, float]) -> None:
    rng = np.random.default_rng(3)
    chain = open_chain(64, **penalties)
    history: list[int] = []
    n_moved = 0
    for _ in range(300):
        logits = rng.normal(0, 1.5, 64).astype(np.float32)
        expected = penalised(logits, history, **penalties)
        token = chain.sample(context(logits))
        assert expected[token] == pytest.approx(expected.max(), abs=1e-5)
        n_moved += token != int(logits.argmax())
        history.append(int(rng.choice([token, rng.integers(64)])))
        chain.accept(history[-1])
    chain.close()
    assert n_moved > 20, "the penalties decided"


def test_penalties_reach_over_the_whole_answer() -> None:
    """Said once, 3000 tokens ago."""
    logits = np.zeros(8, np.float32)
    logits[[2, 3]] = 1.0, 0.9
    chain = open_chain(8, presence_penalty=0.5)
    assert chain.sample(context(logits)) == 2
    chain.accept(2)
    for _ in range(3000):
        chain.accept(7)
    assert chain.sample(context(logits)) == 3
    chain.close()


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-38, 9e-6])
def test_no_temperature_is_greedy_whatever_the_filters(temperature: float) -> None:
    """Below 1e-5 too, as vLLM has it: logits divided by so little are infinite."""
    logits = np.random.default_rng(5).normal(0, 3, 1000).astype(np.float32)
    for filters in ({}, {"top_p": 0.1}, {"top_k": 500, "min_p": 1.0}, {"top_p": 0.0, "seed": 1}):
        chain = open_chain(1000, temperature=temperature, **filters)
        assert {chain.sample(context(logits)) for _ in range(5)} == {int(logits.argmax())}
        chain.close()


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "min_p": 0.25},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.8},
    {"top_k": 3, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.2, "top_k": 4, "top_p": 0.75},
]


@pytest.mark.parametrize("penalty", [0.0, 0.8])
@pytest.mark.parametrize("filters", FILTERS)
def test_draws_are_distributed_as_the_official_server_draws(
    filters: dict[str, float], penalty: float
) -> None:
    """4000 draws: the same tokens, each as often as it should within 5 standard deviations."""
    logits = np.array([2.0, 1.7, 1.1, 0.9, 0.4, 0.1, -0.6, -1.3, -2.0, -np.inf], np.float32)
    history = [0, 0, 3]
    expected = support(penalised(logits, history, frequency_penalty=penalty), **filters)
    options = {"temperature": 1.0, "frequency_penalty": penalty, **filters}
    chain = open_chain(len(logits), seed=11, **options)
    for token in history:
        chain.accept(token)
    n_draws = 4000
    found = Counter(chain.sample(context(logits)) for _ in range(n_draws))
    chain.close()
    assert set(found) <= set(expected)
    for token, share in expected.items():
        deviation = np.sqrt(n_draws * share * (1 - share))
        assert abs(found[token] - n_draws * share) <= 5 * deviation + 1, token


def test_order_of_the_filters_matters_where_it_is_tested() -> None:
    """The cases above tell the official order from others."""
    logits = np.array([2.0, 1.7, 1.1, 0.9, 0.4, 0.1, -0.6, -1.3, -2.0], np.float64)
    cold, hot = support(logits, min_p=0.25), support(logits, temperature=2.0, min_p=0.25)
    assert set(cold) != set(hot), "temperature comes before min_p"
    assert set(support(logits, top_k=3, top_p=0.8)) != set(support(logits, top_k=3)), (
        "top_p is last"
    )
    alone = support(logits, top_p=0.8)
    assert set(alone) & {0, 1, 2} != set(support(logits, top_k=3, top_p=0.8))


def test_choice_among_some_is_of_these() -> None:
    logits = np.arange(10, dtype=np.float32)
    among = np.array([1, 4, 6], np.int32)
    greedy = open_chain(10, frequency_penalty=2.0)
    assert greedy.sample(context(logits), among) == 6
    greedy.accept(6)
    greedy.accept(6)
    assert greedy.sample(context(logits), among) == 4
    greedy.close()
    drawing = open_chain(10, temperature=50.0, seed=2)
    assert {drawing.sample(context(logits), among) for _ in range(60)} == {1, 4, 6}
    drawing.close()


def test_seed_repeats_draws_and_none_draws_another() -> None:
    logits = context(np.zeros(1000, np.float32))

    def draws(seed: int | None) -> list[int]:
        chain = open_chain(1000, temperature=1.0, seed=seed)
        found = [chain.sample(logits) for _ in range(20)]
        chain.close()
        return found

    assert draws(7) == draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    logits = np.zeros(10, np.float32)
    logits[4] = bad
    chain = open_chain(10, temperature=temperature)
    with pytest.raises(EngineError, match="not finite"):
        chain.sample(context(logits))
    chain.close()


def test_logits_are_left_as_they_are() -> None:
    """They are told as logprobs after the choice."""
    logits = np.random.default_rng(0).normal(0, 1, 50).astype(np.float32)
    before = logits.copy()
    for temperature in (0.0, 0.7):
        chain = open_chain(50, temperature=temperature, presence_penalty=2.0, repeat_penalty=3.0)
        chain.accept(int(logits.argmax()))
        chain.sample(context(logits))
        chain.close()
    np.testing.assert_array_equal(logits, before)
