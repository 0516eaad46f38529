"""`FairQueue`: one at a time, in turn by client; `BodyBudget`: how much is held meanwhile.

Each client has a lane, first come first served; the lanes take turns. So a client that sends much
waits behind its own requests, and another one's next request waits for at most one of them. Knows
clients by whatever tells them apart. For one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Self


class QueueFullError(Exception):
    """No place is left, in all or for this client."""


class FairQueue:
    """Hands out turns.

    Args:
        n_places: Tickets that may wait; one client takes at most half of them, but at least one.
    """

    def __init__(self, n_places: int) -> None:
        self._n_places = n_places
        self._lanes: OrderedDict[Hashable, deque[Ticket]] = OrderedDict()
        self._running: Ticket | None = None
        self.n_waiting = 0

    @property
    def is_idle(self) -> bool:
        """Nobody has the turn."""
        return self._running is None

    def join(self, client: Hashable) -> Ticket:
        """A place in the queue, or the turn itself if nobody has it.

        Raises:
            QueueFullError: See the class.
        """
        ticket = Ticket(self, client)
        if self._running is None:
            self._call(ticket)
            return ticket
        lane = self._lanes.get(client, ())
        if self.n_waiting >= self._n_places or len(lane) >= max(1, self._n_places // 2):
            raise QueueFullError
        self._lanes.setdefault(client, deque()).append(ticket)
        self.n_waiting += 1
        return ticket

    def n_ahead(self, ticket: Ticket) -> int:
        """Turns until this ticket's, as things are; 0 for one that has it, had it, or left."""
        if ticket.called.is_set() or ticket not in self._lanes.get(ticket.client, ()):
            return 0
        lanes = list(self._lanes.items())
        at = next(n for n, (client, _) in enumerate(lanes) if client == ticket.client)
        own, before = lanes[at][1].index(ticket), 0
        for n, (_, lane) in enumerate(lanes):
            if n != at:
                before += min(len(lane), own + (1 if n < at else 0))
        return 1 + before + own

    def leave(self, ticket: Ticket) -> None:
        """Give the turn or the place up; again is nothing."""
        if ticket is self._running:
            self._running = None
            self._call_next()
            return
        lane = self._lanes.get(ticket.client)
        if lane is not None and ticket in lane:
            lane.remove(ticket)
            self.n_waiting -= 1
            if not lane:
                del self._lanes[ticket.client]

    def _call_next(self) -> None:
        if not self._lanes:
            return
        client, lane = self._lanes.popitem(last=False)
        ticket = lane.popleft()
        self.n_waiting -= 1
        if lane:
            self._lanes[client] = lane  # to the end: the other lanes come first
        self._call(ticket)

    def _call(self, ticket: Ticket) -> None:
        self._running = ticket
        ticket.called.set()


class Ticket:
    """A place in the queue. As a context manager it waits for the turn, and gives it back."""

    def __init__(self, queue: FairQueue, client: Hashable) -> None:
        self._queue, self.client = queue, client
        self.called = asyncio.Event()

    @property
    def n_ahead(self) -> int:
        """See `FairQueue.n_ahead`."""
        return self._queue.n_ahead(self)

    def leave(self) -> None:
        """See `FairQueue.leave`."""
        self._queue.leave(self)

    async def __aenter__(self) -> Self:
        try:
            await self.called.wait()
        except asyncio.CancelledError:
            self.leave()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()


class BodyBudget:
    """Bytes of request bodies held at a time, from their arrival to the end of their answers.

    Args:
        most: Bytes in all.
    """

    def __init__(self, most: int) -> None:
        self.most, self.n_bytes = most, 0

    def hold(self) -> Held:
        """An account for one request."""
        return Held(self)


class Held:
    """What one request holds of a `BodyBudget`."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self.n_bytes = budget, 0

    def add(self, n_bytes: int) -> bool:
        """Hold more; False, and nothing added, if there is no room."""
        if self._budget.n_bytes + n_bytes > self._budget.most:
            return False
        self._budget.n_bytes += n_bytes
        self.n_bytes += n_bytes
        return True

    def release(self) -> None:
        """Hold nothing any more; again is nothing."""
        self._budget.n_bytes -= self.n_bytes
        self.n_bytes = 0
