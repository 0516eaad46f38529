"""Ctrl-C at the worst moments: the next request still gets its turn."""

from __future__ import annotations

import signal
import threading

import pytest

from autoglm_gguf import AutoGLM, EngineBusyError
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.turns import Turn, Turns


class InterruptedLock:
    """A lock that is taken as Ctrl-C comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.release, self.locked = self._lock.release, self._lock.locked

    def acquire(self, timeout: float) -> bool:
        taken = self._lock.acquire(timeout=timeout)
        signal.raise_signal(signal.SIGINT)
        return taken


def take(turns: Turns, *, has_stream: bool = False) -> Turn:
    return Turn(turns, has_stream=has_stream, stopped=None, closes=False)


def test_turn_is_given_back_when_ctrl_c_comes_as_it_is_taken() -> None:
    turns = Turns("model")
    turns._lock = InterruptedLock()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt), take(turns):
        pass
    assert not turns.is_mine
    assert not turns._lock.locked()


def test_turn_that_ctrl_c_kept_from_ending_does_not_block_its_thread() -> None:
    turns = Turns("model")
    take(turns).__enter__()  # and Ctrl-C comes before the first line of __exit__
    with pytest.raises(EngineBusyError, match="model: another stream is open"):
        take(turns, has_stream=True).__enter__()
    with take(turns):
        assert turns.is_mine
    assert not turns.is_mine


def test_model_answers_after_ctrl_c_as_a_turn_is_taken() -> None:
    model = AutoGLM(FakeEngine(b"yes"))
    lock, model._turns._lock = model._turns._lock, InterruptedLock()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        model.generate("?")
    model._turns._lock = lock
    assert model.generate("?").text == "yes"
