"""The knapsack against trying every choice."""

from __future__ import annotations

import itertools
import random

import pytest

from autoglm_gguf.conversion.knapsack import Knapsack, Option


def try_all(things: list[list[Option]], capacity: int) -> float | None:
    damages = [
        sum(option.damage for option in picked)
        for picked in itertools.product(*things)
        if sum(option.n_bytes for option in picked) <= capacity
    ]
    return min(damages) if damages else None


def draw(rng: random.Random, unit: int) -> list[list[Option]]:
    return [
        [Option(unit * rng.randint(1, 40), rng.random()) for _ in range(rng.randint(1, 5))]
        for _ in range(5)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_choose_finds_the_least_damage(seed: int) -> None:
    rng = random.Random(seed)
    things = draw(rng, unit=rng.choice([1, 7, 64]))
    largest = sum(max(option.n_bytes for option in options) for options in things)
    knapsack = Knapsack(things, largest)
    for capacity in rng.sample(range(largest + 1), 10):
        found = knapsack.choose(capacity)
        least = try_all(things, capacity)
        assert (found is None) == (least is None)
        if found is None or least is None:
            continue
        picked = [options[pick] for options, pick in zip(things, found.picks, strict=True)]
        assert found.damage == pytest.approx(sum(option.damage for option in picked))
        assert found.damage == pytest.approx(least)
        assert found.n_bytes == sum(option.n_bytes for option in picked) <= capacity
        assert knapsack.bound(capacity) <= least + 1e-9


def test_choose_keeps_within_the_size_when_the_table_is_coarse() -> None:
    things = draw(random.Random(1), unit=997)
    knapsack = Knapsack(things, 10**6, max_cells=20)
    for capacity in range(knapsack.least_bytes, 150_000, 9_999):
        found = knapsack.choose(capacity)
        assert found is not None and found.n_bytes <= capacity
        least = try_all(things, capacity)
        assert least is not None and least <= found.damage
        assert knapsack.bound(capacity) <= least + 1e-9, (
            "the bound holds for what was not found, too"
        )


def test_choose_gives_nothing_under_the_least_size() -> None:
    knapsack = Knapsack([[Option(10, 1.0), Option(20, 0.5)], [Option(5, 1.0)]], 100)
    assert knapsack.least_bytes == 15
    assert knapsack.choose(14) is None
    least = knapsack.choose(15)
    assert least is not None and least.picks == (0, 0)


def test_choose_takes_the_best_of_everything_when_there_is_room() -> None:
    knapsack = Knapsack([[Option(10, 1.0), Option(20, 0.0)], [Option(5, 0.0), Option(9, 1.0)]], 100)
    found = knapsack.choose(100)
    assert found is not None
    assert (found.picks, found.damage) == ((1, 0), 0.0)
    assert knapsack.bound(100) == 0.0
