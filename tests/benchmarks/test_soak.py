"""`soak.judge`: what counts as flat."""

from __future__ import annotations

from dataclasses import replace

import soak
from soak import MOST_GROWN_BYTES, N_ROUNDS, N_WARM, Round

IDLE = 200 * 2**20


def rounds(*idle_bytes: int, n_requests: int = 100) -> list[Round]:
    return [Round(n_requests, n, 0, 2 * IDLE, n_threads=9, n_files=12) for n in idle_bytes]


def test_judge_takes_what_grows_while_it_warms_up() -> None:
    warm = [IDLE // 2, IDLE - 2**20, IDLE]
    assert soak.judge(rounds(*warm, *[IDLE] * (N_ROUNDS - N_WARM))) == (0, [])


def test_judge_takes_one_round_out_of_line() -> None:
    held = [IDLE] * N_ROUNDS
    held[5] = held[9] = IDLE + 10 * MOST_GROWN_BYTES
    assert soak.judge(rounds(*held)) == (0, [])


def test_judge_tells_a_leak_that_goes_on() -> None:
    step = MOST_GROWN_BYTES // 3
    held = [IDLE + n * step for n in range(N_ROUNDS)]
    grown, faults = soak.judge(rounds(*held))
    assert grown == 4 * step, "from the fifth round to the ninth, the medians"
    assert faults == [f"the idle server grew by {grown} bytes ({MOST_GROWN_BYTES} at most)"]


def test_judge_tells_threads_and_files_that_stay() -> None:
    found = rounds(*[IDLE] * N_ROUNDS)
    found = [replace(r, n_threads=9 + n, n_files=12 + 2 * n) for n, r in enumerate(found)]
    assert soak.judge(found)[1] == ["n_threads grew from 14 to 18", "n_files grew from 22 to 30"]
