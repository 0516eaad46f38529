"""Ctrl-C while llama.cpp calls back into Python: it ends the work, and nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from autoglm_gguf import AutoGLM, MemoryPlan, plan_memory
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.memory.holding import Places
from autoglm_gguf.memory.residency import LoadWatch, Residency
from autoglm_gguf.native import pages
from autoglm_gguf.native.interrupts import HeldInterrupts
from autoglm_gguf.stopping import StopFlag

Pair = tuple[Path, Path]
needs_streaming = pytest.mark.skipif(not pages.SUPPORTED, reason="weights cannot be streamed here")


class CtrlC:
    """Pressed at the n-th call from the moment it is armed."""

    left = 0

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def plan(random_pair: Pair) -> MemoryPlan:
    found = plan_memory(random_pair[0], mmproj=None, n_ctx=256, n_threads=1, n_gpu_layers=0)
    return replace(found, weights="streamed", places=Places(streamed=(0, 1)))


def test_interrupt_is_raised_when_the_call_has_returned() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupts() as held:
        os.kill(os.getpid(), signal.SIGINT)
        done.append(held.ends_work)
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_of_one_call_does_not_end_the_next() -> None:
    """The thread that is told of a signal may look when the next call has begun."""
    for _ in range(20):
        first, second = StopFlag(), StopFlag()
        with pytest.raises(KeyboardInterrupt), HeldInterrupts(first):
            os.kill(os.getpid(), signal.SIGINT)
        with HeldInterrupts(second):
            time.sleep(0.02)
        assert first.is_set()
        assert not second.is_set()


def test_handler_of_the_caller_is_called_and_the_work_is_not_ended() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        with HeldInterrupts() as held:
            os.kill(os.getpid(), signal.SIGINT)
            assert not held.ends_work
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_nothing_to_keep_back() -> None:
    found: list[bool] = []

    def use() -> None:
        with HeldInterrupts() as held:
            found.append(held.ends_work)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.native
@needs_streaming
def test_interrupt_ends_a_load(
    random_pair: Pair, plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    press, look = CtrlC(), LoadWatch.look

    def pressed(self: LoadWatch) -> None:
        press()
        look(self)

    monkeypatch.setattr(LoadWatch, "look", pressed)
    press.left = 5
    with pytest.raises(KeyboardInterrupt):
        LlamaEngine(random_pair[0], None, plan.context, plan=plan)
    assert pages.find_mappings(random_pair[0]) == []
    LlamaEngine(random_pair[0], None, plan.context, plan=plan).close()


@pytest.mark.native
@needs_streaming
def test_interrupt_ends_a_streamed_answer_and_the_next_one_is_whole(
    random_pair: Pair, plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    press, passed = CtrlC(), Residency.passed

    def pressed(self: Residency, layer: int) -> None:
        press()
        passed(self, layer)

    monkeypatch.setattr(Residency, "passed", pressed)
    with AutoGLM(LlamaEngine(random_pair[0], None, plan.context, plan=plan)) as model:
        expected = model.generate("hello", raw=True, max_tokens=8).tokens
        press.left = 7
        with pytest.raises(KeyboardInterrupt):
            model.generate("hello", raw=True, max_tokens=8)
        assert model.generate("hello", raw=True, max_tokens=8).tokens == expected
