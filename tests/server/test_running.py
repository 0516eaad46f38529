"""How the server begins and ends: ports, loading, signals."""

from __future__ import annotations

import asyncio
import gc
import json
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import CHAT, HI, PATIENCE_S, PacedEngine, fake_app, service_of, until

from autoglm_gguf import AutoGLM, ServerError
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.running import address_of, open_sockets, serve
from autoglm_gguf.server.service import Service

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from serving import PacedEngine
from autoglm_gguf import AutoGLM
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.running import serve
engine = PacedEngine(b"again " * {n_words}, token_s={token_s})
model = AutoGLM(engine)
say = lambda text: print(text, flush=True)
serve(
    lambda: model,
    ServerParams(port=0, shutdown_s={shutdown_s}),
    on_listening=say,
    on_loaded=lambda _: say("ready"),
    on_stop=lambda: say("stopping"),
)
say(f"ended, closed: {{engine.closed}}")
"""


class Program:
    """A server in a process of its own."""

    def __init__(self, n_words: int = 600, **values: Any) -> None:
        tests = str(Path(__file__).parents[1])
        script = SCRIPT.format(tests=tests, n_words=n_words, **values)
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self.line()
        assert self.line() == "ready"

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line.strip())

    def line(self) -> str:
        return self._lines.get(timeout=2 * PATIENCE_S)

    def stream(self) -> Iterator[str]:
        """An answer's events."""
        body = {**HI, "stream": True}
        with httpx2.stream("POST", self.url + CHAT, json=body, timeout=PATIENCE_S) as answer:
            yield from (line for line in answer.iter_lines() if line.startswith("data: {"))

    def ended(self) -> int:
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def start() -> Iterator[Any]:
    programs: list[Program] = []

    def start(**values: Any) -> Program:
        programs.append(Program(**values))
        return programs[-1]

    yield start
    for program in programs:
        program.process.kill()
        program.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_the_running_answer_finish(start: Any, number: signal.Signals) -> None:
    program = start(n_words=100, token_s=0.0005, shutdown_s=60.0)
    events = program.stream()
    next(events)
    program.process.send_signal(number)
    assert program.line() == "stopping"
    last = json.loads(list(events)[-1].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "stop"
    assert program.line() == "ended, closed: True"
    assert program.ended() == 0


def test_answer_that_takes_too_long_is_ended_with_an_error(start: Any) -> None:
    program = start(token_s=0.5, shutdown_s=0.3)
    events = program.stream()
    next(events)
    began = time.monotonic()
    program.process.send_signal(signal.SIGTERM)
    last = json.loads(list(events)[-1].removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down"
    assert program.ended() == 0
    assert time.monotonic() - began < PATIENCE_S


def test_second_signal_ends_at_once(start: Any) -> None:
    program = start(token_s=0.5, shutdown_s=1000.0)
    events = program.stream()
    next(events)
    program.process.send_signal(signal.SIGINT)
    assert program.line() == "stopping"
    program.process.send_signal(signal.SIGINT)
    assert program.ended() == 0


def test_port_that_is_taken_is_an_error_with_a_hint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"127.0.0.1:{port}: cannot listen there") as caught:
            serve(lambda: pytest.fail("loaded"), ServerParams(port=port))
    assert "--port" in caught.value.hint


def test_host_that_is_not_this_machine_is_an_error() -> None:
    with pytest.raises(ServerError):
        open_sockets(ServerParams(host="192.0.2.1", port=0, api_key="k"))


def test_address_that_this_machine_has_not_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers without IPv6 know localhost by ::1 too."""
    found = [
        (family, socket.SOCK_STREAM, 6, "", (address, 0))
        for family, address in ((socket.AF_INET6, "2001:db8::1"), (socket.AF_INET, "127.0.0.1"))
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    (listener,) = open_sockets(ServerParams(host="localhost", port=0))
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    found.pop()
    with pytest.raises(ServerError, match="cannot listen there"):
        open_sockets(ServerParams(host="localhost", port=0))


def test_localhost_is_listened_to_on_all_its_addresses() -> None:
    sockets = open_sockets(ServerParams(host="localhost", port=0))
    try:
        assert len({opened.getsockname()[1] for opened in sockets}) == 1
        for opened in sockets:
            assert opened.getsockname()[0] in ("127.0.0.1", "::1")
    finally:
        for opened in sockets:
            opened.close()


def test_address_is_one_that_a_browser_opens() -> None:
    (listener,) = open_sockets(ServerParams(port=0))
    with listener:
        port = listener.getsockname()[1]
        assert address_of("127.0.0.1", listener) == f"http://127.0.0.1:{port}"
        assert address_of("::1", listener) == f"http://[::1]:{port}"


def test_model_that_cannot_be_loaded_ends_the_server_with_its_error() -> None:
    def load() -> Any:
        raise ServerError("no such model", hint="check the path")

    with pytest.raises(ServerError, match="no such model"):
        serve(load, ServerParams(port=0))


def test_stopping_refuses_what_waits_and_what_comes() -> None:
    engine = PacedEngine(b"ok")
    engine.gate = threading.Event()
    app = fake_app(engine)
    service = service_of(app)

    async def run() -> list[httpx2.Response]:
        async with app.router.lifespan_context(app):
            await until(lambda: service.holder.state == "ready")
            transport = httpx2.ASGITransport(app)
            base = "http://127.0.0.1"
            async with httpx2.AsyncClient(transport=transport, base_url=base) as client:
                asked = [asyncio.ensure_future(client.post(CHAT, json=HI)) for _ in range(2)]
                await until(lambda: service.queue.n_waiting == 1)
                stopping = asyncio.ensure_future(service.stop(PATIENCE_S))
                waiting = await asked[1]
                late = await client.post(CHAT, json=HI)
                health = await client.get("/health")
                assert engine.gate is not None
                engine.gate.set()
                await stopping
                return [await asked[0], waiting, late, health]

    running, waiting, late, health = asyncio.run(run())
    assert running.status_code == 200
    assert (waiting.status_code, late.status_code, health.status_code) == (503, 503, 503)
    assert waiting.json()["error"]["code"] == "shutting_down"
    assert health.json() == {"status": "stopping"}
    assert engine.closed


def test_process_has_no_other_handlers_left() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ServerError):
        serve(lambda: _fail(), ServerParams(port=0))
    assert signal.getsignal(signal.SIGINT) is before


def _fail() -> Any:
    raise ServerError("x")


def test_model_that_arrives_after_the_signal_is_not_announced() -> None:
    """Whoever is told asks for the model, which is given to nobody any more."""
    gate, told = threading.Event(), list[str]()

    def load() -> AutoGLM:
        assert gate.wait(PATIENCE_S)
        return AutoGLM(PacedEngine(b"ok"))

    service = Service(load, ServerParams())

    async def run() -> None:
        async with service.running(lambda service: told.append(service.ready().info.name)):
            await service.stop()
            gate.set()
            await until(lambda: service.holder.backend is not None)
            await asyncio.sleep(0.05)

    failed: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: failed.append(context))
    loop.run_until_complete(run())
    gc.collect()
    loop.close()
    assert (told, failed) == ([], [])
    assert service.holder.state == "stopping"
