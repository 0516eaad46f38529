"""Ctrl-C during a call into llama.cpp.

Python would raise it when the call returns, which may take minutes, or in a callback that llama.cpp
makes meanwhile, a log line for example: there ctypes prints and forgets it, since an exception
cannot cross C. So it is held back until the call has returned, and sets a `StopFlag` at once, which
llama.cpp looks at.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from functools import cache
from types import FrameType, TracebackType
from typing import Any

from autoglm_gguf.stopping import StopFlag

# The C module under it, which signal imports: signal's own functions make an enum of every handler,
# by way of an exception, and that is a good part of what Python costs for each token.
_signal: Any = sys.modules.get("_signal", signal)


class HeldInterrupts:
    """Keeps SIGINT back; a context manager around one call. Off the main thread there is nothing
    to keep back.

    Args:
        stop: Set when an interrupt comes that will be raised as KeyboardInterrupt. At once, even
            inside C, unless an event loop listens to signals.
    """

    def __init__(self, stop: StopFlag | None = None) -> None:
        self._stop = stop
        self._arrived = False
        self._before: Any = None
        self._is_main = self._is_relayed = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._arrived = True
        if self._stop is not None and self.ends_work:
            self._stop.set()

    @property
    def ends_work(self) -> bool:
        """Whether KeyboardInterrupt will be raised. A handler of the caller's own may let the work
        go on, so it must be whole.
        """
        return self._arrived and self._before is signal.default_int_handler

    def __enter__(self) -> HeldInterrupts:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._before = _signal.getsignal(signal.SIGINT)
            self._is_main = callable(self._before)  # ignored, or handled in C: theirs stays
        if self._is_main:
            _signal.signal(signal.SIGINT, self._note)
            if self._stop is not None and self._before is signal.default_int_handler:
                self._is_relayed = _open_relay().begin(self._stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_main:
            return
        if self._is_relayed:
            _open_relay().end()
        _signal.signal(signal.SIGINT, self._before)  # first runs `_note` if a signal waits for it
        if self._arrived:
            if self._is_relayed:
                _open_relay().settle()
            self._before(signal.SIGINT, None)


_SETTLE = b"\0"  # no signal's number
_SETTLE_SECONDS = 1.0  # for a thread that only sleeps


class _Relay:
    """A thread that sleeps until a signal comes, which Python's own handler tells it from C."""

    def __init__(self) -> None:
        self._flag: StopFlag | None = None
        self._settled = threading.Event()
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        threading.Thread(target=self._work, name="interrupts", daemon=True).start()

    def begin(self, flag: StopFlag) -> bool:
        """Set a flag at the next SIGINT; False where somebody else listens to signals."""
        before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            return False
        self._flag = flag
        return True

    def end(self) -> None:
        """Listen no more."""
        self._flag = None
        signal.set_wakeup_fd(-1)

    def settle(self) -> None:
        """Wait until the thread has seen all that was sent: it would set the next call's flag."""
        self._settled.clear()
        self._write.send(_SETTLE)
        self._settled.wait(_SETTLE_SECONDS)

    def _work(self) -> None:
        while numbers := self._read.recv(64):
            flag = self._flag
            if flag is not None and signal.SIGINT in numbers:
                flag.set()
            if _SETTLE in numbers:
                self._settled.set()


@cache
def _open_relay() -> _Relay:
    """One for the process, made when it is first needed."""
    return _Relay()


if hasattr(os, "register_at_fork"):  # a child has neither the thread nor a socket of its own
    os.register_at_fork(after_in_child=_open_relay.cache_clear)
