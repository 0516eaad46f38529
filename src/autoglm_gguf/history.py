"""A conversation that outgrows its room: whole turns are left out, the oldest first.

A turn is a user message and all that follows up to the next one. Knows messages and a way to count
them; knows no tokens and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from autoglm_gguf.messages import Message

_SHARES = 4  # what is left out grows by quarters of the room


def fit_history(
    messages: Sequence[Message], room: int, count: Callable[[Sequence[Message]], int]
) -> tuple[tuple[Message, ...], int]:
    """Leave out the oldest turns until a conversation fits.

    The system prompt and the last turn always stay, even where they alone do not fit. More than is
    needed is left out, up to a quarter of the room: the next requests of a growing conversation
    then begin with the same turns, and the KV cache keeps them.

    Args:
        messages: The conversation.
        room: What it may take, in the unit of ``count``.
        count: What a conversation takes; fewer turns must not take more.

    Returns:
        What stays, and the number of messages that were left out.
    """
    whole = count(messages)
    if whole <= room:
        return tuple(messages), 0
    n_head = sum(1 for _ in takewhile(lambda message: message.role == "system", messages))
    begins = [n for n in range(n_head, len(messages)) if messages[n].role == "user"]
    cuts = [n for n in begins if n > n_head]

    def without(cut: int) -> list[Message]:
        return [*messages[:n_head], *messages[cut:]]

    share = max(1, room // _SHARES)
    excess = -(-(whole - room) // share) * share
    cut = _first(cuts, lambda n: whole - count(without(n)) >= excess)
    if cut is None:
        cut = _first(cuts, lambda n: count(without(n)) <= room) or (cuts[-1] if cuts else n_head)
    return tuple(without(cut)), cut - n_head


def _first(cuts: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The first cut for which something holds, as for all after it."""
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(cuts[middle]) else (middle + 1, high)
    return cuts[low] if low < len(cuts) else None
