"""Answers on their way: first byte, life signs, clients that leave, errors early and late."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from serving import (
    CHAT,
    HI,
    PATIENCE_S,
    PacedEngine,
    WordyEngine,
    chat,
    client_of,
    events,
    fake_app,
    listening,
    service_of,
    text_of,
    until,
    wait_until,
)

from autoglm_gguf import AutoGLM, Chunk, ContextFullError, EngineError
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.messages import Timings, Usage
from autoglm_gguf.server.answers import join_chunks
from autoglm_gguf.server.params import ServerParams

ENDLESS = b"again " * 3000


def read_a_token(lines: Iterator[str]) -> None:
    """Read a stream until something was said."""
    while '"delta":{"content":"' not in next(lines):
        pass


def test_stream_is_role_text_reason_and_done() -> None:
    found = events(chat(fake_app(FakeEngine("好的 ok".encode())), stream=True).text)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(found) == "好的 ok"
    assert [e["choices"][0]["finish_reason"] for e in found[:-1]][-1] == "stop"
    assert found[-1] == "[DONE]"
    assert all("usage" not in event for event in found[:-1])
    assert len({event["id"] for event in found[:-1]}) == 1


def test_usage_comes_in_an_event_of_its_own_when_asked_for() -> None:
    found = events(chat(fake_app(), stream=True, stream_options={"include_usage": True}).text)
    *before, last, done = found
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert all(event["usage"] is None for event in before)


def test_first_byte_leaves_before_the_model_is_reached() -> None:
    engine = PacedEngine(b"ok")
    engine.gate = threading.Event()
    params = ServerParams(keep_alive_s=0.05)
    with listening(fake_app(engine, params)) as url:
        began = time.monotonic()
        with httpx2.stream("POST", url + CHAT, json={**HI, "stream": True}) as answer:
            lines = answer.iter_lines()
            first = json.loads(next(lines).removeprefix("data: "))
            assert first["choices"][0]["delta"]["role"] == "assistant"
            assert engine.n_evaluated == 0
            alive = [next(lines) for _ in range(6)]
            assert alive == ["", ": keep-alive"] * 3
            engine.gate.set()
            assert "data: [DONE]" in list(lines)
        assert time.monotonic() - began < PATIENCE_S


def test_client_that_leaves_ends_the_generation() -> None:
    engine = PacedEngine(ENDLESS, token_s=0.005, n_ctx=50_000)
    app = fake_app(engine)
    with listening(app) as url:
        with httpx2.stream("POST", url + CHAT, json={**HI, "stream": True}) as answer:
            read_a_token(answer.iter_lines())
        wait_until(lambda: service_of(app).queue.is_idle)
        assert engine.content.n_cells < 1000, "of 18,000"
        assert httpx2.get(url + "/metrics").text.count('status="499"} 1.0') == 1


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_ends_a_prefill_between_two_batches(stream: bool) -> None:
    engine = PacedEngine(prefill_s=60.0)
    app = fake_app(engine)
    with listening(app) as url:
        with pytest.raises(httpx2.ReadTimeout), httpx2.Client(timeout=0.2) as client:
            answer = client.post(url + CHAT, json={**HI, "stream": stream})
            assert answer.status_code == 200
        wait_until(lambda: engine.n_stopped == 1)
        wait_until(lambda: service_of(app).queue.is_idle)


def test_client_that_leaves_while_waiting_leaves_the_queue() -> None:
    engine = PacedEngine(b"ok")
    engine.gate = threading.Event()
    app = fake_app(engine)
    with listening(app) as url, httpx2.Client(timeout=PATIENCE_S) as client:
        queue = service_of(app).queue
        with client.stream("POST", url + CHAT, json={**HI, "stream": True}):
            wait_until(lambda: not queue.is_idle)
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(url + CHAT, json=HI, timeout=0.2)
            wait_until(lambda: queue.n_waiting == 0)
            assert not queue.is_idle, "the other one still runs"
            engine.gate.set()


def test_each_request_is_evaluated_once() -> None:
    engine = FakeEngine(b"ok")
    app = fake_app(engine)
    first = chat(app).json()["usage"]["prompt_tokens"]
    assert engine.n_evaluated == first + 2, "the prompt, and the answer's two tokens"


def test_client_that_takes_nothing_is_dropped_and_the_model_is_free() -> None:
    engine = WordyEngine(b"x" * 4000)
    app = fake_app(engine, ServerParams(stall_s=0.5))
    with listening(app) as url:
        service = service_of(app)
        port = int(url.rpartition(":")[2])
        body = json.dumps({**HI, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", port)) as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            lazy.sendall(head.encode() + body)
            wait_until(lambda: not service.queue.is_idle)
            wait_until(lambda: service.queue.is_idle)
            assert httpx2.get(url + "/health").status_code == 200


def test_tokens_that_wait_are_sent_together() -> None:
    usage, timings = Usage(3, 2), Timings(predicted_n=2)
    joined = join_chunks(
        [Chunk("a", (1,)), Chunk("b", (2, 3)), Chunk("", (4,), "stop", usage, timings)]
    )
    assert joined == Chunk("ab", (1, 2, 3, 4), "stop", usage, timings)
    assert join_chunks([Chunk("a")]) == Chunk("a")


# --- errors ---


class FailingEngine(FakeEngine):
    """Fails at the n-th evaluated batch."""

    def __init__(self, n_good: int, error: Exception) -> None:
        super().__init__(b"abcdef")
        self._n_good, self._error = n_good, error

    def eval_tokens(self, tokens: Any, **outputs: Any) -> None:
        self._n_good -= 1
        if self._n_good < 0:
            raise self._error
        super().eval_tokens(tokens, **outputs)


def test_error_before_the_first_byte_has_its_status() -> None:
    full = chat(fake_app(FakeEngine(n_ctx=64)), messages=[{"role": "user", "content": "x" * 100}])
    assert full.status_code == 400
    assert full.json()["error"]["code"] == "context_length_exceeded"
    broken = chat(fake_app(FailingEngine(0, EngineError("broke"))))
    assert broken.status_code == 500
    assert broken.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("n_good", "error", "code"),
    [
        (0, EngineError("broke"), "engine_error"),
        (3, EngineError("broke"), "engine_error"),
        (0, ContextFullError("full", n_prompt=9, n_ctx=8), "context_length_exceeded"),
        (3, ValueError("a bug, whose text is for the log"), "internal_error"),
        (0, MemoryError("a bug"), "internal_error"),
    ],
)
def test_error_after_the_first_byte_is_an_event_and_the_end(
    n_good: int, error: Exception, code: str
) -> None:
    answer = chat(fake_app(FailingEngine(n_good, error)), stream=True)
    assert answer.status_code == 200
    *_, last = events(answer.text)
    assert last["error"]["code"] == code
    assert "bug" not in answer.text
    assert "[DONE]" not in answer.text


def test_server_goes_on_after_an_error() -> None:
    engine = FailingEngine(0, EngineError("broke"))
    with listening(fake_app(engine)) as url:
        assert httpx2.post(url + CHAT, json=HI).status_code == 500
        engine._n_good = 100
        assert httpx2.post(url + CHAT, json=HI).status_code == 200


def test_answer_that_somebody_else_cancels_is_an_error() -> None:
    engine = PacedEngine(ENDLESS, token_s=0.002, n_ctx=50_000)
    model = AutoGLM(engine)
    app = fake_app(load=lambda: model)
    with listening(app) as url:
        with httpx2.stream("POST", url + CHAT, json={**HI, "stream": True}) as answer:
            lines = answer.iter_lines()
            read_a_token(lines)
            model.cancel()
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "cancelled"


# --- loading, refusing, stopping ---


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_server_says_that_it_loads_then_that_it_is_ready(gate: threading.Event) -> None:
    def load() -> AutoGLM:
        assert gate.wait(PATIENCE_S)
        return AutoGLM(FakeEngine(b"ok"))

    app = fake_app(load=load)
    with listening(app, ready=False) as url:
        loading = httpx2.get(url + "/health")
        assert (loading.status_code, loading.json()) == (503, {"status": "loading"})
        status = httpx2.get(url + "/status").json()
        assert (status["status"], status["model"]) == ("loading", None)
        refused = httpx2.post(url + CHAT, json=HI)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "model_loading"
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx2.get(url + "/metrics").status_code == 200
        gate.set()
        wait_until(lambda: httpx2.get(url + "/health").status_code == 200)
        assert httpx2.post(url + CHAT, json=HI).status_code == 200


def test_full_queue_answers_429_with_retry_after() -> None:
    engine = PacedEngine(b"ok")
    engine.gate = threading.Event()
    app = fake_app(engine, ServerParams(max_queue=1))
    with listening(app) as url:
        queue = service_of(app).queue
        threads = [
            threading.Thread(
                target=httpx2.post,
                args=(url + CHAT,),
                kwargs={"json": {**HI, "user": name}, "timeout": PATIENCE_S},
            )
            for name in "ab"
        ]
        for n, thread in enumerate(threads):
            thread.start()
            wait_until(lambda n=n: not queue.is_idle and queue.n_waiting == n)
        refused = httpx2.post(url + CHAT, json={**HI, "user": "c"})
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        engine.gate.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert httpx2.post(url + CHAT, json=HI).status_code == 200


@pytest.mark.parametrize(
    ("users", "n_taken"),
    [
        pytest.param("abcdefghij", 5, id="ten clients"),
        pytest.param("a" * 10, 3, id="one client takes half of the places"),
    ],
)
def test_ten_at_once_are_answered_or_told_to_come_again(users: str, n_taken: int) -> None:
    engine = PacedEngine(b"ok")
    engine.gate = threading.Event()
    app = fake_app(engine, ServerParams(max_queue=4))

    async def run() -> list[httpx2.Response]:
        async with client_of(app) as client:
            asked = [
                asyncio.ensure_future(client.post(CHAT, json={**HI, "user": user}))
                for user in users
            ]
            await until(lambda: sum(one.done() for one in asked) == len(users) - n_taken)
            assert service_of(app).queue.n_waiting == n_taken - 1
            assert engine.gate is not None
            engine.gate.set()
            return await asyncio.gather(*asked)

    answers = asyncio.run(run())
    assert [answer.status_code for answer in answers] == [200] * n_taken + [429] * (10 - n_taken)
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers[n_taken:])


def test_client_that_sends_much_does_not_hold_up_another() -> None:
    engine = PacedEngine(b"ok")
    engine.gate = threading.Event()
    app = fake_app(engine)
    ended: list[str] = []

    async def run() -> None:
        async with client_of(app) as client:

            async def ask_as(user: str) -> None:
                assert (await client.post(CHAT, json={**HI, "user": user})).status_code == 200
                ended.append(user)

            asked = []
            for n, user in enumerate(("greedy", "greedy", "greedy", "greedy", "other")):
                asked.append(asyncio.ensure_future(ask_as(user)))
                await until(lambda n=n: service_of(app).queue.n_waiting == n)
            await until(lambda: not service_of(app).queue.is_idle)
            assert engine.gate is not None
            engine.gate.set()
            await asyncio.gather(*asked)

    asyncio.run(run())
    assert ended == ["greedy", "greedy", "other", "greedy", "greedy"]
