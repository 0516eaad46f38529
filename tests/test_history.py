"""`fit_history`: which turns are left out, and that the cut stays put as a conversation grows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from autoglm_gguf.history import fit_history
from autoglm_gguf.messages import Message

SYSTEM = Message("system", "s" * 10)


def turn(n: int, size: int = 5) -> list[Message]:
    return [Message("user", f"{n}".ljust(size)), Message("assistant", "a" * size)]


def length(messages: Sequence[Message]) -> int:
    return sum(len(str(message.content)) for message in messages)


def test_conversation_that_fits_stays_whole() -> None:
    messages = [SYSTEM, *turn(1), Message("user", "?")]
    assert fit_history(messages, 21, length) == (tuple(messages), 0)


def test_oldest_whole_turns_go_and_the_system_prompt_stays() -> None:
    messages = [SYSTEM, *turn(1), *turn(2), *turn(3), Message("user", "?")]
    kept, n_dropped = fit_history(messages, 40, length)
    assert kept == (SYSTEM, *turn(2), *turn(3), Message("user", "?"))
    assert n_dropped == 2


@pytest.mark.parametrize("room", [1, 10, 11])
def test_last_turn_stays_even_where_it_does_not_fit(room: int) -> None:
    messages = [SYSTEM, *turn(1), *turn(2), Message("user", "question")]
    kept, n_dropped = fit_history(messages, room, length)
    assert (kept, n_dropped) == ((SYSTEM, Message("user", "question")), 4)


def test_nothing_can_be_left_out_of_a_single_message() -> None:
    messages = [SYSTEM, Message("user", "x" * 100)]
    assert fit_history(messages, 50, length) == (tuple(messages), 0)


def test_answers_without_a_question_before_them_go_with_the_oldest_turn() -> None:
    messages = [Message("assistant", "greeting!!"), *turn(1), Message("user", "?")]
    kept, n_dropped = fit_history(messages, 12, length)
    assert (kept, n_dropped) == ((*turn(1), Message("user", "?")), 1)


def test_cut_stays_put_for_several_steps_of_a_growing_conversation() -> None:
    """Else every step would begin with another turn, and nothing could be taken from the cache."""
    messages, first_turns = [SYSTEM], list[str]()
    for n in range(40):
        messages += turn(n)
        kept, _ = fit_history([*messages, Message("user", "?")], 131, length)
        assert length(kept) <= 131
        first_turns.append(str(kept[1].content))
    changes = sum(a != b for a, b in pairwise(first_turns))
    assert 5 <= changes <= 40 // 3
