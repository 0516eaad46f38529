"""Ctrl-C during a call into llama.cpp that calls back into Python.

An exception cannot cross C: raised in a callback, ctypes prints and forgets it. So an interrupt
waits as a flag, which callbacks answer by ending the work, and is raised when that call returns.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class HeldInterrupts:
    """Keeps SIGINT back; a context manager around one call. Off the main thread there is nothing
    to keep back.
    """

    def __init__(self) -> None:
        self._arrived = False
        self._before: Any = None
        self._is_main = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._arrived = True

    @property
    def ends_work(self) -> bool:
        """Whether KeyboardInterrupt will be raised. A handler of the caller's own may let the work
        go on, so it must be whole.
        """
        return self._arrived and self._before is signal.default_int_handler

    def __enter__(self) -> HeldInterrupts:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._before = signal.getsignal(signal.SIGINT)
            self._is_main = callable(self._before)  # ignored, or handled in C: theirs stays
        if self._is_main:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_main:
            return
        signal.signal(signal.SIGINT, self._before)
        if self._arrived:
            self._before(signal.SIGINT, None)
