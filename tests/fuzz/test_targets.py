"""The fuzz targets on their seeds, on kept cases and on a few blind changes."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Iterator

import pytest
from fuzz.targets import MOST_BYTES, TARGETS, Target, TooMuchError, blind_changes, run_checked

from autoglm_gguf.memory.measure import reset_peak

N_BLIND = 400


@pytest.fixture(autouse=True, scope="module")
def level_of_the_log() -> Iterator[None]:
    """The targets silence the package; other tests read its log."""
    logger = logging.getLogger("autoglm_gguf")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_target_takes_every_seed(target: Target) -> None:
    for seed in target.seeds():
        assert len(seed) <= target.most_bytes
        assert run_checked(target, seed), seed


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_target_holds_on_blind_changes(target: Target) -> None:
    chance, seeds = random.Random(9), target.seeds()
    took = [run_checked(target, blind_changes(target, seeds, chance)) for _ in range(N_BLIND)]
    assert N_BLIND // 20 < sum(took) < N_BLIND, "some inputs pass, some do not"


def test_run_checked_tells_an_input_that_takes_long() -> None:
    def spin(_: bytes) -> bool:
        end = time.thread_time() + 1.1
        while time.thread_time() < end:
            pass
        return True

    with pytest.raises(TooMuchError, match=r"s, 1\.0 at most"):
        run_checked(Target("slow", spin, list, ()), b"")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's clear_refs")
def test_run_checked_tells_an_input_that_takes_memory() -> None:
    def take(_: bytes) -> bool:
        return bool(bytearray(b"x") * (2 * MOST_BYTES))

    reset_peak()  # what ran before in this process may have held more
    with pytest.raises(TooMuchError, match="bytes more"):
        run_checked(Target("fat", take, list, ()), b"")
