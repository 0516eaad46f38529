"""Speculation without a second model: guessed tokens, evaluated together with a sampled one.

A batch gives logits after each of its tokens. Sampling walks through them as if the tokens had
been evaluated one by one, and ends at the first that was guessed wrong; the KV cache is cut back
there. So the answer is that of plain decoding, up to how a batch rounds. Knows an engine and a
sampler; how a token is chosen, and when an answer ends, is the caller's matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from autoglm_gguf.config import SamplingParams
from autoglm_gguf.engine.base import Engine, Sampler
from autoglm_gguf.engine.content import Piece
from autoglm_gguf.lookup import Guess, Profit, PromptLookup


class Drafts:
    """Keeps an engine evaluated up to the last chosen token, and sometimes further.

    Args:
        engine: Holds the prompt.
        sampler: Its ``output`` is moved to where the next token is to be sampled.
        pieces: The prompt.
        params: Its n_draft says whether and how many tokens are drafted.
        profit: What earlier answers have taught.
        clock: Seconds; what decides how many tokens are drafted where n_draft is None.
    """

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        pieces: Sequence[Piece],
        params: SamplingParams,
        profit: Profit,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._sampler, self._profit, self._clock = engine, sampler, profit, clock
        self._fixed, self._most = params.n_draft, engine.info.n_draft_max
        if self._fixed is not None:
            self._most = min(self._most, self._fixed)
        elif not params.cache_prompt:
            self._most = 0  # an answer to the last bit: in batches, sums are rounded otherwise
        self._pieces = pieces
        self._lookup: PromptLookup | None = None
        self._guess, self._n_guessed = Guess(), 0  # and how many of its tokens have come
        self._ahead: list[int] = []  # evaluated, and not chosen yet
        self._batch = _Batch()
        self.n_drafted = self.n_accepted = 0
        """Tokens evaluated ahead, and those of them that came."""

    def follow(self, chosen: Sequence[int], n_left: int, now: float) -> None:
        """Evaluate chosen tokens, unless they were; the next is sampled after them.

        Args:
            chosen: At least one.
            n_left: Tokens that may still come after them.
            now: When they were chosen, by the clock.

        Raises:
            Stopped: See `Engine.watch`; nothing is evaluated further than the answer goes then.
        """
        self._batch.end(now)
        self._learn(chosen)
        n = _n_common(chosen, self._ahead)
        del self._ahead[:n]
        self._batch.n_accepted += n
        self.n_accepted += n
        if n == len(chosen):
            self._sampler.output += n
            return
        self.finish()
        drafts = self._draft(n_left) if len(chosen) - n == 1 else []
        self._batch = _Batch(len(chosen) - n, len(drafts), self._clock())
        if drafts:
            self._engine.eval_tokens([chosen[-1], *drafts], n_outputs=1 + len(drafts))
        else:
            evaluate(self._engine, chosen[n:])
        self._sampler.output = 0
        self._ahead = drafts
        self.n_drafted += len(drafts)

    def finish(self) -> None:
        """Forget what was evaluated ahead and did not come."""
        if self._ahead:
            self._engine.keep(len(self._engine.content) - len(self._ahead))
            self._ahead = []
        batch, self._batch = self._batch, _Batch()
        if batch.seconds <= 0:
            return
        if batch.n_chosen == 1:
            self._profit.note_batch(batch.n_drafts, batch.n_accepted, batch.seconds)
        else:
            self._profit.note_forced(batch.n_chosen, batch.seconds)

    def _learn(self, chosen: Sequence[int]) -> None:
        """Judge the guess by what came, and know it as text."""
        if self._most == 0:
            return
        if self._lookup is None:  # the first token is out: nobody waits for it
            self._lookup = PromptLookup(self._pieces)
        for token in chosen:
            self._lookup.add(token)
            if self._n_guessed < len(self._guess.tokens):
                was_right = token == self._guess.tokens[self._n_guessed]
                self._profit.judge(self._guess.n_match + self._n_guessed, was_right)
                self._n_guessed = self._n_guessed + 1 if was_right else len(self._guess.tokens)

    def _draft(self, n_left: int) -> list[int]:
        """Tokens to evaluate beside the last chosen one."""
        if self._lookup is None:
            return []
        self._guess, self._n_guessed = self._lookup.guess(self._most), 0
        stop_ids = self._engine.info.stop_ids
        tokens = list(takewhile(lambda token: token not in stop_ids, self._guess.tokens))
        # The last output of a batch is sampled too; nothing beyond the answer's end is of use.
        tokens = tokens[: max(0, min(n_left, self._engine.n_batch) - 1)]
        if self._fixed is not None:
            return tokens
        return tokens[: self._profit.n_drafts(self._guess.n_match, len(tokens))]


@dataclass(slots=True)
class _Batch:
    """Chosen tokens that were evaluated together, with what was drafted after them."""

    n_chosen: int = 0
    n_drafts: int = 0
    began: float = 0.0
    seconds: float = 0.0
    """Until a token was sampled from it: until then a GPU may be at work. 0: not yet."""
    n_accepted: int = 0

    def end(self, now: float) -> None:
        self.seconds = self.seconds or now - self.began


def evaluate(engine: Engine, tokens: Sequence[int]) -> None:
    """Evaluate any number of tokens, batch by batch; errors as `Engine.eval_tokens`."""
    step = engine.n_batch
    for at in range(0, len(tokens), step):
        engine.eval_tokens(tokens[at : at + step])


def _n_common(chosen: Sequence[int], ahead: Sequence[int]) -> int:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, ahead, strict=False))
    return sum(1 for _ in pairs)
