"""An answer as server-sent events, or as a whole, for as long as its client listens.

The first byte leaves before the model is reached; comments keep a stream alive that has nothing to
say; a client that leaves, or takes nothing for too long, ends the work.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from autoglm_gguf.messages import Chunk, collect
from autoglm_gguf.server.answers import Answer
from autoglm_gguf.server.errors import CLIENT_LEFT, ApiError
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.replies import Writer

LEFT = "autoglm_gguf.client_left"
"""Set in the scope of a stream whose client left."""
_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_log = logging.getLogger(__name__)


class EventStream(Response):
    """An answer, piece by piece.

    Args:
        answer: Closed when the stream ends, however it ends.
        writer: Of its pieces.
        params: How often to show life, and how long to wait for a client that takes nothing.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, writer: Writer, params: ServerParams) -> None:
        self.status_code = 200
        self.background = None
        self._answer, self._writer, self._params = answer, writer, params
        self.init_headers(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        try:
            left = await _while_listening(receive, self._send_all(send))
            if left:
                scope[LEFT] = True
        finally:
            await self._answer.close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for data in self._events():
            async with asyncio.timeout(self._params.stall_s):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        async with asyncio.timeout(self._params.stall_s):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        writer = self._writer
        first = writer.first()
        yield _event(first) if first is not None else _KEEP_ALIVE
        try:
            while True:
                chunk = await self._answer.next(self._params.keep_alive_s)
                if chunk is None:
                    yield _KEEP_ALIVE
                    continue
                if chunk.finish_reason is None:
                    yield _event(writer.piece(chunk))
                    continue
                last = writer.last(chunk)
                yield _event(writer.piece(chunk)) + (_event(last) if last else b"") + _DONE
                return
        except ApiError as error:
            yield _event(_dump(error.body()))


async def answer_whole(answer: Answer, writer: Writer, receive: Receive) -> Response:
    """The answer in one piece.

    Raises:
        ApiError: It failed, or its client left; 499.
    """
    chunks: list[Chunk] = []

    async def gather() -> None:
        while not chunks or chunks[-1].finish_reason is None:
            chunk = await answer.next()
            assert chunk is not None  # without a time limit there is always one
            chunks.append(chunk)

    try:
        if await _while_listening(receive, gather()):
            raise ApiError(CLIENT_LEFT, "client_left", "the client left")
    finally:
        await answer.close()
    return Response(writer.whole(collect(chunks)), media_type="application/json")


async def _while_listening(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Do something until it is done or the client leaves; True if it left."""
    doing = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_wait_for_leave(receive))
    try:
        await asyncio.wait([doing, listening], return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            return True
        error = doing.exception()
        if isinstance(error, TimeoutError | OSError):
            _log.info("a client took nothing any more")
            return True
        if error is not None:
            raise error
        return False
    finally:
        for task in (doing, listening):
            task.cancel()
        await asyncio.wait([doing, listening])


async def _wait_for_leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
