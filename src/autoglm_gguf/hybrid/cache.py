"""`AnswerCache`: cloud answers by the content of their request, in memory only, the oldest go."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from autoglm_gguf.messages import Completion


class AnswerCache:
    """A bounded, thread-safe LRU.

    Args:
        n_most: Answers that are kept; 0 keeps none.
    """

    def __init__(self, n_most: int) -> None:
        self._n_most = n_most
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, Completion] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, body: bytes) -> Completion | None:
        """The answer to a request of the same bytes."""
        key = hashlib.sha256(body).digest()
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def keep(self, body: bytes, answer: Completion) -> None:
        """Remember an answer, in place of the one that was asked for longest ago."""
        key = hashlib.sha256(body).digest()
        with self._lock:
            self._answers[key] = answer
            self._answers.move_to_end(key)
            while len(self._answers) > self._n_most:
                self._answers.popitem(last=False)
