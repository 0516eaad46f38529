"""What a connection may take, and what is told of it: uvicorn's protocols, with bounds.

- The head of a request must arrive in time: uvicorn waits for it for ever, and a few hundred
  clients that send half of one would keep everybody else out.
- What is no HTTP, and a connection too many, is answered with OpenAI's error object.
- WebSocket frames are logged by nobody: the first one may hold the API key.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from autoglm_gguf.server.errors import ApiError

MAX_CONNECTIONS = 512
HEAD_S = 30.0
"""The head of a request must arrive within this time, seconds."""


class HttpConnection(H11Protocol):
    """A connection, until it becomes a WebSocket."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self.app = _refuse
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._forget_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 cannot read, and close: where the next request begins is not known."""
        error = ApiError(400, "invalid_http", "request: not HTTP/1.1, or broken")
        body = bytes(error.response().body)
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        answer = (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),)
        for event in (*answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # it has arrived
            self._forget_head()
        elif self._late is None:  # counted from its first byte: the next ones gain no time
            self._late = self.loop.call_later(HEAD_S, self.transport.close)

    def _forget_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class SocketConnection(WebSocketsSansIOProtocol):
    """A WebSocket."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.conn.debug = False  # headers and frames would be logged, whatever they hold


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands in the application's place where there are too many connections."""
    full = f"too many connections are open ({MAX_CONNECTIONS})"
    response = ApiError(503, "too_many_connections", full, retry_after_s=5).response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
