"""What one call of llama.cpp evaluates: tokens or embeddings, positions, whose logits it keeps.

Knows no model and checks nothing: `LlamaContext` does, before anything is put here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MROPE_AXES = 4
"""Time, row, column, unused: llama.cpp's positions per embedding under M-RoPE."""


def point_at(array: NDArray[Any], ctype: Any) -> Any:
    """A pointer of C to an array's first value; it keeps the array."""
    return array.ctypes.data_as(ctypes.POINTER(ctype))


class Batch:
    """llama.h, ``struct llama_batch``, with room that is made once and not for each token.

    Args:
        raw: llama.cpp's own.
        capacity: Tokens.
    """

    def __init__(self, raw: Any, capacity: int) -> None:
        self._raw = raw
        self._tokens = np.empty(capacity, np.int32)
        self.positions = np.empty(MROPE_AXES * capacity, np.int32)
        """One a token; of embeddings, one axis of all of them after another."""
        self._wanted = np.zeros(capacity, np.int8)
        self._embeddings: NDArray[np.float32] | None = None  # kept while llama.cpp reads them
        self._tokens_at = point_at(self._tokens, ctypes.c_int32)
        raw.pos = point_at(self.positions, ctypes.c_int32)
        raw.logits = point_at(self._wanted, ctypes.c_int8)

    def put_tokens(self, tokens: Sequence[int]) -> None:
        """Take token ids in place of what was held."""
        self._tokens[: len(tokens)] = tokens
        self._raw.token, self._raw.embd = self._tokens_at, None
        self._embeddings = None

    def put_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        """Take ``(n, n_embd)``, contiguous, in place of what was held."""
        self._embeddings = embeddings
        self._raw.token, self._raw.embd = None, point_at(embeddings, ctypes.c_float)

    def of_size(self, n: int, n_outputs: int) -> Any:
        """llama.cpp's view of the first ``n``, with logits of the last ones."""
        self._wanted[: n - n_outputs] = 0
        self._wanted[n - n_outputs : n] = 1
        self._raw.n_tokens = n
        return self._raw
