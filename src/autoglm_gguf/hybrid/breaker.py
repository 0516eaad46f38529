"""`CircuitBreaker`: leaves a cloud alone that does not answer. Knows a clock, no network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

MAX_OPEN_S = 3600.0
"""The longest that a Retry-After is heeded, seconds."""


class CircuitBreaker:
    """Closed while a cloud answers; open, for a while, after failures in a row; then half open.

    Half open lets one request through: its success closes the breaker, its failure opens it again.

    Args:
        n_failures: In a row, before it opens.
        open_s: How long it stays open, seconds.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        n_failures: int,
        open_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._open_s, self._clock = n_failures, open_s, clock
        self._lock = threading.Lock()
        self._n_failed = 0
        self._open_until: float | None = None
        self._trying = False

    def obstacle(self) -> str:
        """Why a request would not be let through now; empty if it would be."""
        with self._lock:
            return self._obstacle()

    def admit(self) -> str:
        """Let a request through, to be ended by `succeed`, `fail` or `release`.

        Returns:
            Empty, or why it is not let through.
        """
        with self._lock:
            obstacle = self._obstacle()
            self._trying = self._trying or (not obstacle and self._open_until is not None)
            return obstacle

    def succeed(self) -> None:
        """The cloud answered."""
        with self._lock:
            self._n_failed, self._open_until, self._trying = 0, None, False

    def fail(self, retry_after_s: float | None = None) -> None:
        """The cloud did not answer.

        Args:
            retry_after_s: How long it asked to be left alone, seconds: one such answer opens.
        """
        with self._lock:
            self._n_failed += 1
            self._trying = False
            wait_s = min(retry_after_s or 0.0, MAX_OPEN_S)
            if self._n_failed >= self._limit:
                wait_s = max(wait_s, self._open_s)
            if wait_s > 0:
                self._open_until = self._clock() + wait_s

    def release(self) -> None:
        """The request was given up by its caller, which says nothing about the cloud."""
        with self._lock:
            self._trying = False

    def _obstacle(self) -> str:
        if self._open_until is None:
            return ""
        left_s = self._open_until - self._clock()
        if left_s > 0:
            times = "once" if self._n_failed == 1 else f"{self._n_failed} times in a row"
            return f"the cloud failed {times} and is left alone for {left_s:.0f} s more"
        return "the cloud failed and is being tried by another request" if self._trying else ""
