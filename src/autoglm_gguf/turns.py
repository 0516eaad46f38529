"""Whose turn it is: one engine, one request at a time, and the others wait.

Knows threads and Ctrl-C; knows no engine and no request.
"""

from __future__ import annotations

import threading

from autoglm_gguf.errors import EngineBusyError, EngineError
from autoglm_gguf.native.interrupts import HeldInterrupts
from autoglm_gguf.stopping import StopFlag

_WAIT_SECONDS = 0.05  # how often a waiting request looks whether it was cancelled


class Turns:
    """The turns of one model's requests.

    Args:
        name: Of the model, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._owner: int | None = None
        self.closing = False
        """The model takes no other requests any more."""

    @property
    def is_mine(self) -> bool:
        """Whether it is this thread's turn."""
        return self._owner == threading.get_ident()


class Turn:
    """Exclusive use of an engine for the duration of a ``with`` block.

    Args:
        turns: The model's.
        has_stream: Whether a stream of the model is open, which may rest between two chunks.
        stopped: Set from outside, it ends the waiting.
        closes: Of the request that closes the model.

    Raises:
        EngineBusyError: This thread has a stream open, or was cancelled while it waited.
        EngineError: The model is closed.
    """

    def __init__(
        self, turns: Turns, *, has_stream: bool, stopped: StopFlag | None, closes: bool
    ) -> None:
        self._turns, self._has_stream = turns, has_stream
        self._stopped, self._closes = stopped, closes

    def __enter__(self) -> None:
        turns = self._turns
        if turns.is_mine and self._has_stream:
            raise EngineBusyError(
                f"{turns._name}: another stream is open in this thread",
                hint="read it to its end or close it first",
            )
        if turns.is_mine:
            self.__exit__()  # Ctrl-C came as a turn ended, before its first line here
        try:
            while not self._take():
                if self._stopped is not None and self._stopped.is_set():
                    raise EngineBusyError(f"{turns._name}: cancelled while another answer ran")
                self._check()
            self._check()
        except BaseException:
            if turns.is_mine:
                self.__exit__()
            raise

    def _take(self) -> bool:
        """Wait a moment. Ctrl-C is raised after it is noted whose turn it is."""
        turns = self._turns
        with HeldInterrupts():
            if turns._lock.acquire(timeout=_WAIT_SECONDS):
                turns._owner = threading.get_ident()
        return turns.is_mine

    def _check(self) -> None:
        if self._turns.closing and not self._closes:
            raise EngineError("model: closed", hint="load it again")

    def __exit__(self, *_: object) -> None:
        self._turns._owner = None  # Ctrl-C cannot come between these two
        self._turns._lock.release()
