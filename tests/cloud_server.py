"""A cloud on loopback that answers from a script: events, and misbehaviour.

Keeps the bytes of each request. Knows HTTP, and nothing of the package.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

_PATIENCE_S = 20  # no handler outlives its test for longer


def event(text: str | None = None, **fields: Any) -> bytes:
    """One piece of an answer, as OpenAI's API streams it."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": None}
    return frame({"object": "chat.completion.chunk", "choices": [choice | fields]})


def frame(value: object) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def say(
    *texts: str, finish: str = "stop", prompt_tokens: int = 7, completion_tokens: int = 3
) -> Play:
    """A whole answer in pieces, as vLLM sends it: role, text, finish, usage, end."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    role = {"delta": {"role": "assistant", "content": ""}}
    last = frame({"choices": [], "usage": usage})
    return Play([event(**role), *map(event, texts), event(finish_reason=finish), last, DONE])


@dataclass
class Play:
    """What is answered to one request."""

    blocks: Sequence[bytes] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})
    wait_s: float = 0.0
    """Before each block."""
    hangs: bool = False
    """After the blocks nothing follows, until the client leaves or the server ends."""
    breaks: bool = False
    """After the blocks the connection ends, in the middle of the transfer."""
    resets: bool = False
    """The same with a reset."""


def refuse(status: int, body: str | bytes = b"", **headers: str) -> Play:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Play([body.encode() if isinstance(body, str) else body], status, named)


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    raw: bytes
    """The body as it came."""

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


class Cloud:
    """The server; use it in a ``with`` block.

    Attributes:
        plays: What is answered, in order; the last one goes on.
        requests: All requests in order.
        n_connections: Accepted so far.
        left: Set when a client went away before its answer ended.
    """

    def __init__(self, *plays: Play | Callable[[Request], Play]) -> None:
        self.plays = list(plays) or [say("ok")]
        self.requests: list[Request] = []
        self.n_connections = 0
        self.left, self.release = threading.Event(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.cloud = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def base_url(self) -> str:
        return f"{self.address}/v1"

    def next_play(self, request: Request) -> Play:
        play = self.plays.pop(0) if len(self.plays) > 1 else self.plays[0]
        return play(request) if callable(play) else play

    def __enter__(self) -> Cloud:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE_S

    def setup(self) -> None:
        super().setup()
        self.cloud: Cloud = self.server.cloud  # type: ignore[attr-defined]
        self.cloud.n_connections += 1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.path, headers, raw)
        self.cloud.requests.append(request)
        play = self.cloud.next_play(request)
        self.close_connection = True
        try:
            self.send_response(play.status)
            for key, value in ({"Transfer-Encoding": "chunked"} | play.headers).items():
                self.send_header(key, value)
            self.end_headers()
            for block in play.blocks:
                if self.cloud.release.wait(play.wait_s) and play.wait_s:
                    return
                self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if block else b"")
            if play.hangs:
                self._wait_until_left()
            elif play.resets:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            elif not play.breaks:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.cloud.left.set()

    def _wait_until_left(self) -> None:
        self.connection.settimeout(0.02)
        while not self.cloud.release.is_set():
            try:
                if not self.connection.recv(1):
                    self.cloud.left.set()
                    return
            except TimeoutError:
                continue
