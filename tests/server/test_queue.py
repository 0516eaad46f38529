"""Turns and places: who comes when, and what is held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from autoglm_gguf.server.queue import BodyBudget, FairQueue, QueueFullError, Ticket


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


def order(queue: FairQueue, tickets: dict[Ticket, str]) -> str:
    """The names of all tickets in the order of their turns."""
    served = ""
    for _ in range(len(tickets)):
        turn = next(t for t in tickets if t.called.is_set() and tickets[t] not in served)
        served += tickets[turn]
        turn.leave()
    return served


@in_loop
async def test_queue_serves_one_client_in_its_order() -> None:
    queue = FairQueue(8)
    tickets = {queue.join("a"): name for name in "1234"}
    assert queue.n_waiting == 3
    assert order(queue, tickets) == "1234"
    assert queue.is_idle


@in_loop
async def test_clients_take_turns_however_much_one_sends() -> None:
    queue = FairQueue(20)
    tickets = {queue.join("greedy"): name for name in "ABCDEF"}
    tickets |= {queue.join("b"): name for name in "12"}
    tickets[queue.join("c")] = "x"
    assert order(queue, tickets) == "AB1xC2DEF"


@in_loop
async def test_n_ahead_is_the_number_of_turns_before() -> None:
    queue = FairQueue(20)
    tickets = {queue.join("greedy"): name for name in "ABCDEF"}
    tickets |= {queue.join("b"): name for name in "12"}
    tickets[queue.join("c")] = "x"
    ahead = {name: ticket.n_ahead for ticket, name in tickets.items()}
    served = order(queue, tickets)
    assert ahead == {name: served.index(name) for name in served}


@in_loop
async def test_full_queue_refuses() -> None:
    queue = FairQueue(2)
    for client in "abc":
        queue.join(client)
    with pytest.raises(QueueFullError):
        queue.join("d")


@in_loop
async def test_one_client_takes_half_of_the_places_only() -> None:
    queue = FairQueue(4)
    for _ in range(3):
        queue.join("a")  # one has the turn, two wait
    with pytest.raises(QueueFullError):
        queue.join("a")
    queue.join("b")


@in_loop
async def test_place_that_is_left_is_free_again() -> None:
    queue = FairQueue(1)
    first, second = queue.join("a"), queue.join("b")
    second.leave()
    second.leave()
    assert queue.n_waiting == 0
    third = queue.join("c")
    first.leave()
    first.leave()
    assert third.called.is_set()
    assert not second.called.is_set()


@in_loop
async def test_ticket_that_is_cancelled_while_waiting_leaves() -> None:
    queue = FairQueue(4)
    running, waiting, last = (queue.join(client) for client in "abc")

    async def wait() -> None:
        async with waiting:
            raise AssertionError("it had no turn")

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert queue.n_waiting == 1
    async with running:
        pass
    assert last.called.is_set()


def test_bodies_are_held_up_to_a_bound() -> None:
    budget = BodyBudget(10)
    first, second = budget.hold(), budget.hold()
    assert first.add(6)
    assert not second.add(5)
    assert second.add(4)
    first.release()
    first.release()
    assert budget.n_bytes == 4
    assert second.add(6)


@in_loop
async def test_ticket_that_has_left_has_nobody_ahead() -> None:
    queue = FairQueue(4)
    queue.join("a")
    lonely, one, _ = queue.join("b"), queue.join("c"), queue.join("c")
    for ticket in (lonely, one):
        ticket.leave()
        assert ticket.n_ahead == 0
