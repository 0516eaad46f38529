"""`Answer`: one request on its way through the queue and the model; SSE, WebSocket and whole
answers all read it.

Tokens that wait for a slow reader are handed over together, so that what is held for it stays one
piece of text; the model does not wait, since others do. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from autoglm_gguf.messages import Chunk, Message
from autoglm_gguf.server.backend import Backend
from autoglm_gguf.server.errors import ApiError, as_api_error
from autoglm_gguf.server.metrics import Metrics
from autoglm_gguf.server.queue import Held, Ticket

_MOST_CHARS = 16_384  # handed over at once: WebSocket clients refuse frames of a megabyte
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a model is asked, checked as far as that goes without it."""

    prompt: str | tuple[Message, ...]
    raw: bool
    """Complete ``prompt`` as it is, without the chat template."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `AutoGLM.stream`."""
    client: Hashable = None
    """Who asks, as far as fairness goes."""


class Answer:
    """An answer being made. It begins at once; `close` ends it.

    Args:
        ask: What is asked.
        backend: Who answers.
        ticket: Its place in the queue.
        held: Its share of the bodies held; released at the end.
        metrics: Told what happens.
        on_end: Called once, when nothing runs for it any more.
    """

    def __init__(
        self,
        ask: Ask,
        backend: Backend,
        ticket: Ticket,
        *,
        held: Held,
        metrics: Metrics,
        on_end: Callable[[Answer], None],
    ) -> None:
        self._ask, self._backend, self._ticket = ask, backend, ticket
        self._held, self._metrics, self._on_end = held, metrics, on_end
        self._chunks: deque[Chunk] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        self._error: ApiError | None = None
        self._has_failed = False
        self._last: Chunk | None = None
        self._n_tokens = 0
        self._began = time.monotonic()
        self.turn_s = 0.0
        """How long its turn took, seconds; 0 until it ended."""
        self._work = asyncio.create_task(self._run())
        self._work.add_done_callback(self._end)  # a task cancelled early has not run at all

    @property
    def has_turn(self) -> bool:
        """It is its turn, or was."""
        return self._ticket.called.is_set()

    @property
    def n_ahead(self) -> int:
        """Turns until its own."""
        return self._ticket.n_ahead

    async def next(self, within_s: float | None = None) -> Chunk | None:
        """What has come since the last call, as one chunk; the last has a finish_reason.

        Args:
            within_s: How long to wait for something; None waits on.

        Returns:
            None if nothing came within the time.

        Raises:
            ApiError: The answer failed, or was aborted.
        """
        while not self._chunks:
            if self._ended:
                raise self._error or ApiError(503, "cancelled", "the answer was cancelled")
            self._arrived.clear()
            try:
                async with asyncio.timeout(within_s):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        chunks, n_chars = list[Chunk](), 0
        while self._chunks and n_chars < _MOST_CHARS:
            chunks.append(self._chunks.popleft())
            n_chars += len(chunks[-1].text)
        return join_chunks(chunks)

    def abort(self, error: ApiError) -> None:
        """End it with an error."""
        self._error = self._error or error
        self._work.cancel()

    async def close(self) -> None:
        """End it, if it has not ended, and wait until the model is free of it."""
        self._work.cancel()
        await asyncio.wait([self._work])

    async def _run(self) -> None:
        try:
            async with self._ticket:
                began = time.monotonic()
                self._metrics.saw_turn(began - self._began)
                try:
                    await self._generate()
                finally:
                    self.turn_s = time.monotonic() - began
        except Exception as error:
            # A wrong argument is found before the first token, but for a schema that leads nowhere.
            follows_schema = isinstance(self._ask.sampling.get("constrain"), Mapping)
            if self._n_tokens and isinstance(error, ValueError | TypeError) and not follows_schema:
                error = RuntimeError(error)
            self._error, self._has_failed = as_api_error(error), True

    async def _generate(self) -> None:
        ask = self._ask
        stream = self._backend.astream(ask.prompt, raw=ask.raw, **ask.sampling)
        async with aclosing(stream):
            async for chunk in stream:
                if chunk.tokens:
                    if not self._n_tokens:
                        self._metrics.saw_first_token(time.monotonic() - self._began)
                    self._n_tokens += len(chunk.tokens)
                    self._metrics.saw_tokens(len(chunk.tokens))
                if chunk.finish_reason is not None:
                    self._last = chunk
                    if chunk.finish_reason == "cancelled":  # by somebody else
                        continue
                self._chunks.append(chunk)
                self._arrived.set()

    def _end(self, _: asyncio.Task[None]) -> None:
        self._ended = True
        self._arrived.set()
        self._ticket.leave()
        self._held.release()
        early = "error" if self._has_failed else "cancelled"
        reason = (self._last and self._last.finish_reason) or early
        self._metrics.saw_end(self._last, reason)
        self._log(reason)
        self._on_end(self)

    def _log(self, reason: str) -> None:
        """One line an answer: how it ended and what it cost; nothing that was said."""
        last = self._last
        if last is None or last.usage is None or last.timings is None:
            _log.info("answer: %s, %d tokens", reason, self._n_tokens)
            return
        _log.info(
            "answer: %s%s, prompt %d (%d kept) + %d tokens, first %.0f ms, %.1f tok/s",
            reason,
            f" by {last.route.source}" if last.route else "",
            last.usage.prompt_tokens,
            last.timings.cache_n,
            last.usage.completion_tokens,
            last.timings.ttft_ms,
            last.timings.predicted_per_second,
        )


def join_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Several chunks of one answer, in their order, as one."""
    if len(chunks) == 1:
        return chunks[0]
    return replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
    )
