"""Engines with known logits, for measurements."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.engine.fake import FakeEngine

N_VOCAB = 258
STRENGTH = 6.0


class Following(FakeEngine):
    """After token t it holds t + 1 the most probable, by `STRENGTH` nats over each other one.

    Args:
        strength: Another one, to be compared with it.
    """

    def __init__(self, *, n_outputs: int = 8, strength: float = STRENGTH, n_ctx: int = 512) -> None:
        super().__init__(n_ctx=n_ctx, n_draft_max=n_outputs - 1)
        self.strength = strength
        self.batches: list[tuple[int, int]] = []

    def eval_tokens(self, tokens: list[int], *, n_outputs: int = 1) -> None:  # type: ignore[override]
        super().eval_tokens(tokens, n_outputs=n_outputs)
        self.batches.append((len(tokens), n_outputs))

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        last = self.before(index % self._n_outputs)[-1]
        values = np.zeros(N_VOCAB, np.float32)
        values[(last + 1 if isinstance(last, int) else 0) % N_VOCAB] = self.strength
        return values

    def nll(self, *, follows: bool) -> float:
        """Of a token that follows its predecessor, or of another one."""
        total = np.log(np.exp(self.strength) + N_VOCAB - 1)
        return float(total - self.strength if follows else total)
