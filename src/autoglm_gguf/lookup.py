"""Prompt lookup: the text is guessed to go on as it did where it last said the same.

`PromptLookup` finds the guess, `Profit` decides how much of it is worth evaluating. Both know token
ids, counts and seconds only; no engine, no sampler, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_LONGEST = 8  # tokens: what agrees further back says no more
_N_CANDIDATES = 32  # earlier places looked at, the latest first
_BREAK = -1


@dataclass(frozen=True, slots=True)
class Guess:
    """How the text may go on."""

    tokens: tuple[int, ...] = ()
    n_match: int = 0
    """Tokens before it that agree with the place it is taken from: 2 to 8; 0 without a guess."""


class PromptLookup:
    """A text's tokens, and where each pair of them stood before.

    A token is added, and a guess made, in microseconds, however long the text is.

    Args:
        pieces: The text so far. What is no token id, an image, parts it: no guess and no
            comparison goes over it.
    """

    def __init__(self, pieces: Iterable[object]) -> None:
        self._tokens: list[int] = []
        self._earlier: list[int] = []  # per token: where the pair that it ends ended before, or -1
        self._last: dict[tuple[int, int], int] = {}
        for piece in pieces:
            self.add(piece if isinstance(piece, int) else _BREAK)

    def add(self, token: int) -> None:
        """Go on by a token."""
        tokens = self._tokens
        at, before = len(tokens), tokens[-1] if tokens else _BREAK
        tokens.append(token)
        if before < 0 or token < 0:
            self._earlier.append(-1)
            return
        pair = (before, token)
        self._earlier.append(self._last.get(pair, -1))
        self._last[pair] = at

    def guess(self, most: int) -> Guess:
        """At most ``most`` tokens, from where the longest run of last tokens stood before.

        Of equally long runs the latest counts; two tokens must agree at least.
        """
        here = len(self._tokens) - 1
        at = self._earlier[here] if here >= 0 else -1
        found, n_found = -1, 0
        for _ in range(_N_CANDIDATES):
            if at < 0 or n_found == _LONGEST:
                break
            n_same = self._n_same(at, here)
            if n_same > n_found:
                found, n_found = at, n_same
            at = self._earlier[at]
        tokens = self._after(found, most) if n_found else ()
        return Guess(tokens, n_found) if tokens else Guess()

    def _n_same(self, at: int, here: int) -> int:
        """How many tokens up to two places agree, their pairs being the same."""
        tokens, n = self._tokens, 2
        while n < _LONGEST and n <= at and tokens[at - n] == tokens[here - n] != _BREAK:
            n += 1
        return n

    def _after(self, at: int, most: int) -> tuple[int, ...]:
        """What follows a place; where the text ends, it goes on as what repeats itself does."""
        tokens = self._tokens
        period = len(tokens) - 1 - at
        found = tokens[at + 1 : at + 1 + most]
        if _BREAK in found:
            return tuple(found[: found.index(_BREAK)])
        while len(found) < most:
            found.append(found[len(found) - period])
        return tuple(found)


_ALLOWANCE = 0.01  # of the time spent without drafts, what trying them out may cost
_FIRST_CREDIT = 1.0  # in tokens' time: the first try needs no savings
_MOST_CREDIT = 8.0
_MARGIN = 1.05  # what a draft must be expected to gain, since sampling its tokens takes time too
_HOPE = 0.25  # of a token's time: what one more in a batch is hoped to cost, until it is measured
_LASTS = 500  # batches for which a size that does not pay is left alone
_N_PLAIN = 3  # tokens without drafts to be timed before the first draft
_WINDOW = 32.0  # guesses that an estimate remembers
_WEIGHT = 0.2  # of a new measurement
_PRIOR = (1.0, 4.0)  # right, of all: guesses are not believed before they were seen to be right


class Profit:
    """Learns what guesses are worth and what batches cost, and says how many tokens to draft.

    Guesses are judged whether they are drafted or not, by how much before them agreed. Batches are
    timed by their size, since their cost does not grow evenly: kernels take four or eight tokens at
    once. Losses are bounded besides: what drafts cost may not exceed what they have saved, but for
    1 % of the time spent without them. One per model: what it has learnt serves the next answer.
    """

    def __init__(self) -> None:
        self._right = [_PRIOR[0]] * (_LONGEST + 1)
        self._tried = [_PRIOR[1]] * (_LONGEST + 1)
        self._token_seconds = 0.0
        self._n_plain = self._n_batches = 0
        self._costs: dict[int, tuple[float, int]] = {}  # by size, in tokens' time; when measured
        self._hope = _HOPE
        self._credit = _FIRST_CREDIT

    def n_drafts(self, n_match: int, n_guessed: int) -> int:
        """How many of ``n_guessed`` tokens promise the most tokens a second; 0 means none does."""
        best, best_rate = 0, _MARGIN
        if self._n_plain < _N_PLAIN:
            return 0
        expected = chance = worst = 1.0
        for n in range(1, n_guessed + 1):
            chance *= self._chance(n_match + n - 1)
            expected += chance
            cost = self._cost(n + 1)
            worst = self._costs[n + 1][0] if n + 1 in self._costs else worst + 1
            if expected > best_rate * cost and worst - 1 <= self._credit:
                best, best_rate = n, expected / cost
        return best

    def judge(self, n_match: int, was_right: bool) -> None:
        """Note whether a guessed token came, ``n_match`` tokens before it having agreed."""
        n = min(n_match, _LONGEST)
        if self._tried[n] >= _WINDOW:
            self._tried[n] /= 2
            self._right[n] /= 2
        self._tried[n] += 1
        self._right[n] += was_right

    def note_forced(self, n_tokens: int, seconds: float) -> None:
        """Note what tokens cost together that were not guessed: a size's first measurement."""
        if self._token_seconds > 0 and n_tokens not in self._costs:
            self._learn_cost(n_tokens, min(seconds / self._token_seconds, n_tokens))

    def note_batch(self, n_drafts: int, n_accepted: int, seconds: float) -> None:
        """Note what one sampled token and ``n_drafts`` after it cost together."""
        self._n_batches += 1
        known = self._token_seconds
        if n_drafts == 0:
            self._n_plain += 1
            # The first may hold what the prompt left behind; later ones a pause of the machine.
            steady = self._n_plain > 2
            step = _WEIGHT * (min(seconds, 2 * known) - known)
            self._token_seconds = known + step if steady else seconds
            self._credit = min(self._credit + _ALLOWANCE, _MOST_CREDIT)
        elif known > 0:
            size = n_drafts + 1
            cost = min(seconds / known, size)
            before, _ = self._costs.get(size, (cost, 0))
            self._learn_cost(size, before + _WEIGHT * (cost - before))
            self._credit = min(self._credit + n_accepted + 1 - cost, _MOST_CREDIT)

    def _learn_cost(self, size: int, cost: float) -> None:
        self._costs[size] = (cost, self._n_batches)
        # Where batches are nearly free, as with streamed weights, larger ones will be too.
        slopes = [(cost - 1) / (size - 1) for size, (cost, _) in self._costs.items()]
        self._hope = max(0.0, min(_HOPE, *slopes))

    def _chance(self, n_match: int) -> float:
        n = min(n_match, _LONGEST)
        return self._right[n] / self._tried[n]

    def _cost(self, size: int) -> float:
        """Of a batch, in the time of one token."""
        hope = 1 + self._hope * (size - 1)
        cost, measured = self._costs.get(size, (hope, 0))
        return cost if self._n_batches - measured < _LASTS else min(cost, hope)
