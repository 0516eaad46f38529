"""What a text's own past says of its future, and when that is worth a bet."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import pytest

from autoglm_gguf.lookup import Guess, Profit, PromptLookup


def guess(text: str, most: int = 4) -> tuple[str, int]:
    """Of a text in which ``|`` stands for an image."""
    found = PromptLookup([None if c == "|" else ord(c) for c in text]).guess(most)
    return "".join(map(chr, found.tokens)), found.n_match


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ("", 0)),
        ("a", ("", 0)),
        ("abcd", ("", 0)),
        ("abcd..b", ("", 0)),  # a single token says little
        ("abcdef..bc", ("def.", 2)),
        ("abcd1.bcd2,bcd", ("2,bc", 3)),  # the latest of equals
        ("abcd1..xcd2..bcd", ("1..x", 3)),  # the longest comes first
        ("abcdefghij1..fghij2..abcdefghij", ("1..f", 8)),
        ("bc|abc1..bc", ("1..b", 2)),
        ("bc|de..bc", ("", 0)),  # no guess over an image
        ("bc1|de..bc", ("1", 2)),
        ("xb|c1..b|c", ("", 0)),  # no pair over an image
        ("|bc1|bc", ("1", 2)),  # two images are not compared
        ("abab", ("abab", 2)),  # what repeats itself goes on
        ("xaaa", ("aaaa", 2)),
    ],
)
def test_guess_goes_on_as_the_text_did_before(text: str, wanted: tuple[str, int]) -> None:
    assert guess(text) == wanted


def longest_by_hand(text: Sequence[int], most: int) -> Guess:
    """Every earlier place compared."""
    best = Guess()
    for end in range(2, len(text)):
        n = next((n for n in range(8) if n >= end or text[end - 1 - n] != text[-1 - n]), 8)
        if n >= 2 and n >= best.n_match:
            on = list(text[end:])
            while len(on) < most:
                on.append(on[len(on) - (len(text) - end)])
            best = Guess(tuple(on[:most]), n)
    return best


def test_guess_is_the_longest_of_all_places() -> None:
    rng = random.Random(0)
    for n_kinds in (2, 3, 6):
        lookup, text = PromptLookup(()), list[int]()
        for _ in range(34):  # fewer pairs than places are looked at
            text.append(rng.randrange(n_kinds))
            lookup.add(text[-1])
            assert lookup.guess(5) == longest_by_hand(text, 5)


def test_guess_costs_no_more_in_a_long_text() -> None:
    """CPU time of a step: a rescan would take 25,000 tokens' worth."""
    rng = random.Random(0)
    lookup = PromptLookup(rng.choices(range(50), k=25_000))  # every pair ten times
    began = time.thread_time()
    for _ in range(1000):
        lookup.add(rng.randrange(50))
        lookup.guess(7)
    assert time.thread_time() - began < 0.5


# --- what is worth it ---

PLAIN = 0.1  # seconds


def seasoned(n_plain: int = 3) -> Profit:
    profit = Profit()
    for _ in range(n_plain):
        profit.note_batch(0, 0, PLAIN)
    return profit


def convince(profit: Profit, right: int, wrong: int = 0, n_match: int = 8) -> None:
    for _ in range(right):
        profit.judge(n_match, True)
    for _ in range(wrong):
        profit.judge(n_match, False)


def test_nothing_is_drafted_before_guesses_came_true() -> None:
    assert seasoned().n_drafts(8, 7) == 0


def test_nothing_is_drafted_before_tokens_were_timed() -> None:
    profit = seasoned(2)
    convince(profit, 30)
    assert profit.n_drafts(8, 7) == 0
    profit.note_batch(0, 0, PLAIN)
    assert profit.n_drafts(8, 7) > 0


def test_guesses_are_believed_by_what_agreed_before_them() -> None:
    profit = seasoned()
    convince(profit, 30, n_match=4)
    convince(profit, 0, 30, n_match=2)
    assert profit.n_drafts(4, 1) == 1
    assert profit.n_drafts(2, 1) == 0
    assert profit.n_drafts(3, 1) == 0, "never seen"


def test_size_with_the_most_tokens_a_second_is_drafted() -> None:
    """Kernels that take four tokens at once: two or three cost as much as four."""
    profit = seasoned()
    convince(profit, 100)
    for size in range(2, 9):
        profit.note_batch(size - 1, size - 1, PLAIN * (1.5 if size <= 4 else 3.5))
    assert profit.n_drafts(8, 7) == 3
    assert profit.n_drafts(8, 1) == 1, "if there are no more"


def test_size_that_does_not_pay_is_left_alone_for_a_while() -> None:
    profit = seasoned()
    convince(profit, 100)
    profit.note_batch(1, 1, PLAIN * 2)
    assert profit.n_drafts(8, 1) == 0
    for _ in range(500):
        profit.note_batch(0, 0, PLAIN)
    assert profit.n_drafts(8, 1) == 1


def test_drafts_end_where_guesses_cease_to_come_true() -> None:
    profit = seasoned()
    convince(profit, 100)
    profit.note_batch(1, 1, PLAIN * 1.2)
    assert profit.n_drafts(8, 1) == 1
    convince(profit, 0, 60)
    assert profit.n_drafts(8, 1) == 0


def test_batches_of_forced_tokens_tell_what_a_size_costs() -> None:
    profit = seasoned()
    convince(profit, 100)
    profit.note_forced(4, PLAIN * 1.2)
    assert profit.n_drafts(8, 3) == 3, "no try with a smaller batch"
    profit.note_forced(4, PLAIN * 4)
    assert profit.n_drafts(8, 3) == 3, "what was measured with drafts, or first, stays"


def test_larger_batches_are_hoped_to_be_cheap_where_smaller_ones_are() -> None:
    """As with streamed weights, which are read once for all tokens of a batch."""
    sizes = []
    for cost in (1.02, 1.25):
        profit = seasoned()
        convince(profit, 15, 15)
        for _ in range(8):
            profit.note_batch(1, 1, PLAIN * cost)
        sizes.append(profit.n_drafts(8, 7))
    assert sizes == [4, 1]


def test_pause_of_the_machine_moves_the_time_of_a_token_little() -> None:
    profit = seasoned(10)
    convince(profit, 100)
    profit.note_batch(0, 0, 100 * PLAIN)  # taken for 1.2 times a token's time
    profit.note_batch(1, 1, PLAIN * 2.4)
    assert profit.n_drafts(8, 1) == 0, "a batch costs two tokens' time, not 0.1"


@pytest.mark.parametrize("cost", [1.0, 0.9, 0.5])  # of a token more, in a token's time
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_drafting_is_never_slower_than_097_of_plain(cost: float, chance: float) -> None:
    """Whatever guesses are worth and batches cost, over an answer of 150 tokens."""
    ratios = [simulate(random.Random(seed), cost, lambda _: chance) for seed in range(20)]
    assert min(ratios) >= 0.97
    if chance == 1.0 and cost == 0.5:
        assert min(ratios) > 1.2


def test_text_that_deceives_costs_at_most_3_percent() -> None:
    """Guesses come true until drafts are made of them, and again after a while."""
    for period in (10, 40, 100):
        ratio = simulate(random.Random(0), 0.9, lambda n, p=period: float(n // p % 2), 2000)
        assert ratio >= 0.97


def simulate(
    rng: random.Random, cost: float, chance: Callable[[int], float], n_tokens: int = 150
) -> float:
    """The least speed from token 100 on, against no drafts, where every token is guessed at."""
    profit, seconds, n, worst = Profit(), 0.0, 0, 9.0
    while n < n_tokens:
        n_drafts = min(profit.n_drafts(8, 7), n_tokens - n - 1)
        n_right = 0
        while n_right < 7 and rng.random() < chance(n + n_right):
            n_right += 1
        for i in range(min(n_right + 1, max(1, n_drafts))):
            profit.judge(8, i < n_right)
        took = PLAIN * (1 + cost * n_drafts)
        profit.note_batch(n_drafts, min(n_right, n_drafts), took)
        seconds += took
        n += 1 + min(n_right, n_drafts)
        if n >= 100:
            worst = min(worst, n * PLAIN / seconds)
    return worst
