"""`Service`: what all endpoints share: the model, the queue, the limits, the counters.

Answers begin here and end here; a service that is stopping ends them within a bound.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

from autoglm_gguf.hybrid.client import HybridClient
from autoglm_gguf.hybrid.local import CLOUD_N_CTX
from autoglm_gguf.server.answers import Answer, Ask
from autoglm_gguf.server.asking import Asking
from autoglm_gguf.server.backend import Backend, Holder
from autoglm_gguf.server.errors import ApiError, as_api_error
from autoglm_gguf.server.metrics import Metrics
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.queue import BodyBudget, FairQueue, Held, QueueFullError

_P = ParamSpec("_P")
_T = TypeVar("_T")
SLOW_BYTES = 32_768
"""Larger requests are read in a thread."""
_N_READERS = 4  # threads that read bodies; large ones would hold up everybody's tokens
_LONGEST_RETRY_S = 60  # OpenAI's client heeds no longer one


class Service:
    """One model and those who wait for it.

    Args:
        load: Gives the model; called once, in a thread of its own.
        params: See `ServerParams`.
    """

    def __init__(self, load: Callable[[], Backend], params: ServerParams) -> None:
        self.params = params
        self.holder = Holder(load)
        self.queue = FairQueue(params.max_queue)
        self.bodies = BodyBudget(2 * params.max_body_bytes)
        self.metrics = Metrics(self.queue, self.holder)
        self.started = int(time.time())
        self.n_sockets = 0
        """WebSockets that are open."""
        self._answers: set[Answer] = set()
        self._readers = ThreadPoolExecutor(_N_READERS, "read")
        self._mean_s = 1.0  # of an answer; a guess until there was one

    @asynccontextmanager
    async def running(
        self, on_loaded: Callable[[Service], None] | None = None
    ) -> AsyncIterator[None]:
        """Load the model meanwhile; at the end, stop and free it.

        Args:
            on_loaded: Told when it is there, or has failed.
        """

        async def load() -> None:
            await self.holder.fetch()
            if on_loaded is not None and self.holder.state != "stopping":
                on_loaded(self)

        loading = asyncio.create_task(load())
        try:
            yield
        finally:
            loading.cancel()
            await self.stop()
            await self.close()

    def ready(self) -> Backend:
        """The model.

        Raises:
            ApiError: It is loading, has failed, or the server is stopping; 503.
        """
        state, backend = self.holder.state, self.holder.backend
        if state == "loading":
            raise ApiError(503, "model_loading", "the model is being loaded", retry_after_s=2)
        if state != "ready" or backend is None:
            raise _stopping()
        return backend

    def asking(self, backend: Backend) -> Asking:
        """Makes questions for the model."""
        n_ctx = backend.info.n_ctx
        if isinstance(backend, HybridClient) and backend.may_ask_cloud:
            n_ctx = max(n_ctx, CLOUD_N_CTX)  # what the device refuses, a cloud may take
        return Asking(self.params, n_ctx)

    async def read(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Do something slow in one of the readers' threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, lambda: work(*args, **kwargs))

    async def read_request(self, n_bytes: int, work: Callable[[], _T]) -> _T:
        """Make a question of a request of ``n_bytes``: in a thread where that can take long."""
        if n_bytes > SLOW_BYTES or self.params.fetch_images:
            return await self.read(work)
        return work()

    def begin(self, ask: Ask, held: Held) -> Answer:
        """Begin an answer, or let it wait for its turn.

        Args:
            ask: The question.
            held: Released when the answer has ended.

        Raises:
            ApiError: No place is left, 429; the prompt cannot be rendered, 400; see `ready`.
        """
        backend = self.ready()
        try:
            backend.render(ask.prompt, raw=ask.raw)
        except Exception as error:
            raise as_api_error(error) from error
        try:
            ticket = self.queue.join(ask.client)
        except QueueFullError:
            retry_s = math.ceil(self._mean_s * (self.queue.n_waiting + 1))
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"too many requests are waiting ({self.queue.n_waiting})",
                retry_after_s=max(1, min(retry_s, _LONGEST_RETRY_S)),
            ) from None
        answer = Answer(ask, backend, ticket, held=held, metrics=self.metrics, on_end=self._ended)
        self._answers.add(answer)
        return answer

    def _ended(self, answer: Answer) -> None:
        self._answers.discard(answer)
        if answer.has_turn:
            self._mean_s += (answer.turn_s - self._mean_s) / 8

    async def stop(self, within_s: float | None = None) -> None:
        """Take no more requests, end those that wait, and the running one within a time.

        Args:
            within_s: Seconds that the running answer may go on; None takes the parameters'.
        """
        self.holder.stop()
        limit_s = self.params.shutdown_s if within_s is None else within_s
        for answer in list(self._answers):
            if not answer.has_turn:
                answer.abort(_stopping())
        deadline = time.monotonic() + limit_s
        while self._answers and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for answer in list(self._answers):
            answer.abort(_stopping())
        while self._answers and time.monotonic() < deadline + limit_s:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Free the model."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self.holder.backend is not None:
            await asyncio.to_thread(self.holder.backend.close)


def _stopping() -> ApiError:
    return ApiError(503, "shutting_down", "the server is shutting down", retry_after_s=5)
