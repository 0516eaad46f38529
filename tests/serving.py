"""Servers for tests: engines that take their time, uvicorn on a free port, and clients."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import httpx2
import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette

from autoglm_gguf import AutoGLM
from autoglm_gguf.engine.fake import STOP, FakeEngine
from autoglm_gguf.sampling import Grammar
from autoglm_gguf.server.app import create_app
from autoglm_gguf.server.backend import Backend
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.running import configure, open_sockets
from autoglm_gguf.server.service import Service
from autoglm_gguf.stopping import StopFlag, Stopped

PATIENCE_S = 30.0  # nothing here takes that long, even on a busy machine
CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


class PacedEngine(FakeEngine):
    """A fake engine that takes its time, and notices a stop in the middle of it.

    Args:
        answer: See `FakeEngine`.
        prefill_s: For each batch of a prompt.
        token_s: For each token.
        **more: See `FakeEngine`.
    """

    def __init__(
        self,
        answer: bytes | Callable[[str], bytes] = b"ok",
        *,
        prefill_s: float = 0.0,
        token_s: float = 0.0,
        **more: Any,
    ) -> None:
        super().__init__(answer, **more)
        self._prefill_s, self._token_s = prefill_s, token_s
        self._flag = StopFlag()
        self.n_stopped = 0
        """Evaluations that were ended half way."""
        self.gate: threading.Event | None = None
        """Evaluation waits for it, if there is one."""

    def watch(self, stop: StopFlag) -> None:
        self._flag = stop
        super().watch(stop)

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        seconds = self._prefill_s if len(tokens) > 1 else self._token_s
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline or (self.gate and not self.gate.is_set()):
            if self._flag.is_set():
                self.n_stopped += 1
                raise Stopped
            time.sleep(0.002)
        super().eval_tokens(tokens, n_outputs=n_outputs)


class OnlyDigits:
    """A grammar that lets digits through, and ends after three."""

    def __init__(self) -> None:
        self._n = 0

    def allows(self, token: int) -> bool:
        return token == STOP if self._n == 3 else token in b"0123456789"

    def allowed(self) -> Any:
        return np.array([STOP] if self._n == 3 else list(b"0123456789"), np.int32)

    def accept(self, token: int) -> bool:
        self._n += 1
        return token == STOP

    def close(self) -> None:
        pass


class GrammarEngine(FakeEngine):
    """A fake engine for which every schema describes three digits."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.schemas: list[str] = []

    def open_grammar(self, schema: str) -> Grammar:
        self.schemas.append(schema)
        return OnlyDigits()


class WordyEngine(FakeEngine):
    """A fake engine whose tokens are long: much to send, and little to compute."""

    N_BYTES = 4096

    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token) * self.N_BYTES


def fake_app(
    engine: FakeEngine | None = None,
    params: ServerParams | None = None,
    load: Callable[[], Backend] | None = None,
) -> Starlette:
    """The application over a fake engine."""
    engine = engine or FakeEngine(b"ok")
    loads = load or (lambda: AutoGLM(engine, content_format="string"))
    return create_app(loads, params)


def service_of(app: Starlette) -> Service:
    service: Service = app.state.service
    return service


async def until(true: Callable[[], Any], within_s: float = PATIENCE_S) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.005)


def wait_until(true: Callable[[], Any], within_s: float = PATIENCE_S) -> None:
    """Likewise, outside of an event loop."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


@contextlib.asynccontextmanager
async def client_of(app: Starlette, **headers: str) -> AsyncIterator[httpx2.AsyncClient]:
    """A client in the same process and event loop; answers come as a whole."""
    async with app.router.lifespan_context(app):
        await until(lambda: service_of(app).holder.state != "loading")
        transport = httpx2.ASGITransport(app)
        base = "http://127.0.0.1:8000"
        async with httpx2.AsyncClient(
            transport=transport, base_url=base, headers=headers, timeout=PATIENCE_S
        ) as client:
            yield client


def ask(app: Starlette, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx2.Response]:
    """Requests one after another: method, path, and httpx's keyword arguments."""

    async def run() -> list[httpx2.Response]:
        async with client_of(app) as client:
            return [await client.request(m, path, **more) for m, path, more in requests]

    return asyncio.run(run())


def chat(app: Starlette, **body: Any) -> httpx2.Response:
    """One chat completion."""
    return ask(app, ("POST", CHAT, {"json": {**HI, **body}}))[0]


@contextlib.contextmanager
def listening(app: Starlette, *, ready: bool = True, port: int = 0) -> Iterator[str]:
    """The application behind a real uvicorn; gives its address. Port 0 takes a free one."""
    service = service_of(app)
    sockets = open_sockets(ServerParams(port=port))
    server = uvicorn.Server(configure(app, service.params))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        if ready:
            wait_until(lambda: service.holder.state == "ready")
        yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not end"


def png(width: int = 56, height: int = 84, seed: int = 0) -> bytes:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def image_part(data: bytes | None = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data or png())}}


def events(text: str) -> list[Any]:
    """The data of events; comments are strings."""
    found: list[Any] = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append("[DONE]" if data == "[DONE]" else json.loads(data))
        elif block:
            found.append(block)
    return found


def text_of(found: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for event in found
        if isinstance(event, dict)
        for choice in event.get("choices", [])
    )
