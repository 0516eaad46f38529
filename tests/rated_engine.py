"""A fake engine whose answers are as probable as a test wants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.engine.fake import FakeEngine


class RatedEngine(FakeEngine):
    """A fake engine that holds each token it says for equally probable, 0..1 exclusive."""

    def __init__(self, answer: bytes, probability: float, **options: Any) -> None:
        super().__init__(answer, **options)
        self._probability = probability

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        p, n = self._probability, self.info.n_vocab
        values = np.zeros(n, np.float32)
        values[self._wanted] = math.log(p * (n - 1) / (1 - p))
        return values
