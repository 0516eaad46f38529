"""``/ws/generate`` with the real ``websockets`` client: asking, cancelling, leaving, nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx2
import pytest
from serving import (
    CHAT,
    HI,
    PATIENCE_S,
    PacedEngine,
    WordyEngine,
    data_url,
    fake_app,
    listening,
    png,
    service_of,
    wait_until,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection
from wires import answer, dialled, opened, receive, said, send

from autoglm_gguf import AutoGLM
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.messages import Chunk
from autoglm_gguf.server import replies, websocket
from autoglm_gguf.server.answers import Answer
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.service import Service

ENDLESS = b"again " * 3000


@contextlib.contextmanager
def served(
    engine: FakeEngine | None = None, params: ServerParams | None = None
) -> Iterator[tuple[str, Service]]:
    app = fake_app(engine, params)
    with listening(app) as url:
        yield url, service_of(app)


# --- asking ---


def test_prompt_is_answered_in_frames() -> None:
    with served(FakeEngine("好的 ok".encode())) as (url, _), opened(url) as wire:
        send(wire, type="generate", prompt="hi", id="a", max_tokens=50)
        first, *tokens, last = answer(wire)
        assert first == {"type": "queued", "id": "a", "n_ahead": 0}
        assert said(tokens) == "好的 ok"
        assert last["finish_reason"] == "stop"
        assert last["usage"]["completion_tokens"] == 10
        assert last["timings"]["predicted_n"] == 10
        assert {frame["id"] for frame in (*tokens, last)} == {"a"}


def test_messages_and_images_are_those_of_chat_completions() -> None:
    engine = FakeEngine(b"ok")
    picture = {"type": "image_url", "image_url": {"url": data_url(png(112, 168))}}
    with served(engine) as (url, _), opened(url) as wire:
        send(wire, type="generate", messages=[{"role": "user", "content": [picture, "what?"]}])
        *_, last = answer(wire)
        assert last["usage"]["prompt_tokens_details"]["image_tokens"] == 24


def test_several_answers_come_one_after_another() -> None:
    with served(FakeEngine(b"ok")) as (url, _), opened(url) as wire:
        for n in range(3):
            send(wire, type="generate", prompt="hi", id=str(n))
            frames = answer(wire)
            assert (said(frames), frames[-1]["id"]) == ("ok", str(n))


def test_action_of_an_answer_is_told_at_its_end() -> None:
    answers = iter(
        (b'<think>There.</think><answer>do(action="Tap", element=[5,999])', b"just text")
    )
    with served(FakeEngine(lambda _: next(answers))) as (url, _), opened(url) as wire:
        send(wire, type="generate", prompt="hi")
        assert answer(wire)[-1]["action"] == {
            "name": "Tap",
            "arguments": {"element": [5, 999]},
            "text": 'do(action="Tap", element=[5,999])',
            "thinking": "There.",
        }
        send(wire, type="generate", prompt="hi")
        assert "action" not in answer(wire)[-1]


def test_long_text_is_not_searched_for_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_MOST_CHARS", 40)
    with served(FakeEngine(b'do(action="Back")' + b" " * 24)) as (url, _), opened(url) as wire:
        send(wire, type="generate", prompt="hi")
        assert "action" not in answer(wire)[-1]


def test_raw_prompt_is_gone_on_with() -> None:
    engine = FakeEngine(b"ok")
    with served(engine) as (url, _), opened(url) as wire:
        send(wire, type="generate", prompt="Once", raw=True)
        *_, last = answer(wire)
        assert last["usage"]["prompt_tokens"] == 4


def test_logprobs_come_with_the_tokens() -> None:
    with served(FakeEngine(b"ok")) as (url, _), opened(url) as wire:
        send(wire, type="generate", prompt="hi", logprobs=True, top_logprobs=2)
        entries = [
            entry
            for frame in answer(wire)
            if frame["type"] == "token"
            for entry in frame["logprobs"]["content"]
        ]
        assert [entry["token"] for entry in entries] == ["o", "k"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_waiting_is_told_and_turns_are_shared_with_http() -> None:
    engine = PacedEngine(b"ok")
    engine.gate = threading.Event()
    params = ServerParams(keep_alive_s=0.05)
    with served(engine, params) as (url, service), opened(url) as wire:
        thread = threading.Thread(
            target=httpx2.post, args=(url + CHAT,), kwargs={"json": HI, "timeout": PATIENCE_S}
        )
        thread.start()
        wait_until(lambda: not service.queue.is_idle)
        send(wire, type="generate", prompt="hi")
        assert receive(wire) == {"type": "queued", "n_ahead": 1}
        engine.gate.set()
        assert said(answer(wire)) == "ok"
        thread.join(PATIENCE_S)


def test_ping_is_answered_while_an_answer_is_made() -> None:
    with served(PacedEngine(ENDLESS, token_s=0.002, n_ctx=50_000)) as (url, _), opened(url) as wire:
        send(wire, type="generate", prompt="hi")
        send(wire, type="ping", id="p")
        frames = [receive(wire)]
        while frames[-1]["type"] != "pong":
            frames.append(receive(wire))
        assert frames[-1] == {"type": "pong", "id": "p"}


# --- ending ---


def test_cancel_ends_the_answer_and_the_connection_goes_on() -> None:
    engine = PacedEngine(ENDLESS, token_s=0.002, n_ctx=50_000)
    with served(engine) as (url, service), opened(url) as wire:
        send(wire, type="cancel")  # nothing to cancel
        send(wire, type="generate", prompt="hi", id="a")
        while receive(wire)["type"] != "token":
            pass
        send(wire, type="cancel")
        *_, last = answer(wire)
        assert last == {"type": "done", "id": "a", "finish_reason": "cancelled"}
        wait_until(lambda: service.queue.is_idle)
        send(wire, type="generate", prompt="hi", max_tokens=3)
        assert said(answer(wire)) == "aga"


def test_cancelled_answers_are_forgotten() -> None:
    engine = PacedEngine(ENDLESS, token_s=0.002, n_ctx=50_000)
    with served(engine) as (url, service), opened(url) as wire:
        for _ in range(5):
            send(wire, type="generate", prompt="hi")
            send(wire, type="cancel")
            assert answer(wire)[-1]["finish_reason"] == "cancelled"
            wait_until(lambda: service.queue.is_idle)
        gc.collect()
        # `type`, not isinstance: the latter asks `__class__` of whatever proxies live here.
        ours = [a for a in gc.get_objects() if type(a) is Answer and a._metrics is service.metrics]
        assert len(ours) <= 1  # the connection's last one


def test_cancel_ends_a_prefill_too() -> None:
    engine = PacedEngine(prefill_s=60.0)
    with served(engine) as (url, service), opened(url) as wire:
        send(wire, type="generate", prompt="hi")
        wait_until(lambda: not service.queue.is_idle)
        send(wire, type="cancel")
        assert answer(wire)[-1]["finish_reason"] == "cancelled"
        wait_until(lambda: service.queue.is_idle)


@pytest.mark.parametrize("politely", [True, False])
def test_client_that_leaves_ends_the_generation(politely: bool) -> None:
    engine = PacedEngine(ENDLESS, token_s=0.002, n_ctx=50_000)
    with served(engine) as (url, service):
        with dialled(url) as wire:
            receive(wire)
            send(wire, type="generate", prompt="hi")
            while receive(wire)["type"] != "token":
                pass
            if not politely:  # the machine is gone: no closing frame
                wire.socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
                )
                wire.socket.close()
        wait_until(lambda: service.queue.is_idle)
        wait_until(lambda: service.n_sockets == 0)
        assert engine.content.n_cells < 3000, "of 18,000"


def test_slow_reader_gets_all_of_it_and_does_not_hold_the_model() -> None:
    engine = WordyEngine(b"0123456789" * 200)
    with served(engine) as (url, service), narrow(url) as wire:
        send(wire, type="generate", prompt="hi")
        wait_until(lambda: engine.n_evaluated > 0 and service.queue.is_idle)
        frames = answer(wire)
        assert said(frames) == "".join(c * engine.N_BYTES for c in "0123456789" * 200)
        assert len(frames) < 2000, "what waited came together"


def test_reader_that_takes_nothing_is_dropped() -> None:
    engine = WordyEngine(b"x" * 4000)
    with served(engine, ServerParams(stall_s=0.5)) as (url, service), narrow(url) as wire:
        send(wire, type="generate", prompt="hi")
        wait_until(lambda: service.n_sockets == 0)
        assert service.queue.is_idle
        assert httpx2.get(url + "/health").status_code == 200


@contextlib.contextmanager
def narrow(url: str) -> Iterator[ClientConnection]:
    """A connection that takes little at a time and reads ahead one frame; it is cut at the end."""
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)  # before it connects
        wire.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        with dialled(url, sock=wire, max_queue=1) as connection:
            assert receive(connection)["type"] == "ready"
            yield connection
            wire.shutdown(socket.SHUT_RDWR)


# --- nonsense ---


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("not json", "invalid_json"),
        ("[1, 2]", "invalid_json"),
        ("", "invalid_json"),
        (b"\x00\xff", "invalid_json"),
        ('{"no": "type"}', "missing_required_parameter"),
        ('{"type": 5}', "invalid_value"),
        ('{"type": "dance"}', "invalid_value"),
        ('{"type": "generate"}', "missing_required_parameter"),
        ('{"type": "generate", "prompt": 5}', "invalid_value"),
        ('{"type": "generate", "prompt": "x", "temperature": -1}', "invalid_value"),
        ('{"type": "generate", "prompt": "", "raw": true}', "invalid_value"),
        ('{"type": "generate", "messages": []}', "invalid_value"),
        ("[" * 50_000, "invalid_json"),
        ('{"type": "generate", "prompt": "\\ud800"}', "invalid_json"),
    ],
)
def test_frame_that_makes_no_sense_is_an_error_and_no_more(frame: Any, code: str) -> None:
    with served(FakeEngine(b"ok")) as (url, _), opened(url) as wire:
        wire.send(frame)
        assert receive(wire)["error"]["code"] == code
        send(wire, type="generate", prompt="hi")
        assert said(answer(wire)) == "ok"


def test_binary_frame_is_told_to_be_none_that_is_read() -> None:
    with served(FakeEngine(b"ok")) as (url, _), opened(url) as wire:
        wire.send(b'{"type": "ping"}')
        assert "binary" in receive(wire)["error"]["message"]


def test_client_that_makes_no_sense_at_all_is_sent_away() -> None:
    with served() as (url, service):
        with opened(url) as wire, pytest.raises(ConnectionClosed) as caught:
            while True:
                wire.send("nonsense")
                receive(wire)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1008
        wait_until(lambda: service.n_sockets == 0)


def test_frame_over_the_limit_closes_the_connection() -> None:
    with served(params=ServerParams(max_body_bytes=10_000)) as (url, service):
        with opened(url) as wire, pytest.raises(ConnectionClosed) as caught:
            wire.send("x" * 20_000)
            receive(wire)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
        wait_until(lambda: service.n_sockets == 0)


def test_second_question_while_one_is_answered_is_refused() -> None:
    engine = PacedEngine(ENDLESS, token_s=0.002, n_ctx=50_000)
    with served(engine) as (url, _), opened(url) as wire:
        send(wire, type="generate", prompt="hi")
        send(wire, type="generate", prompt="hi")
        *_, last = answer(wire)
        assert last["error"]["code"] == "busy"
        send(wire, type="cancel")
        assert answer(wire)[-1]["finish_reason"] == "cancelled"


class LingeringModel(AutoGLM):
    """Its answers are told to their end a while before it is free again."""

    async def astream(self, *given: Any, **more: Any) -> AsyncGenerator[Chunk, None]:
        try:
            async with contextlib.aclosing(super().astream(*given, **more)) as stream:
                async for chunk in stream:
                    yield chunk
        finally:
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:  # as a thread that ends in its own time
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.05)


def test_next_question_may_follow_the_last_frame_at_once() -> None:
    model = LingeringModel(FakeEngine(b"ok"), content_format="string")
    with listening(fake_app(load=lambda: model)) as url, opened(url) as wire:
        for n in range(3):
            send(wire, type="generate", prompt="hi", id=str(n))
            frames = answer(wire)
            assert (frames[-1]["type"], frames[-1]["id"]) == ("done", str(n)), frames


def test_error_of_the_model_is_a_frame_and_the_connection_goes_on() -> None:
    with served(FakeEngine(b"ok", n_ctx=100)) as (url, _), opened(url) as wire:
        send(wire, type="generate", prompt="x" * 200, id="a")
        last = answer(wire)[-1]
        assert (last["id"], last["error"]["code"]) == ("a", "context_length_exceeded")
        send(wire, type="generate", prompt="hi")
        assert said(answer(wire)) == "ok"


def test_random_bytes_do_no_harm() -> None:
    with served(FakeEngine(b"ok")) as (url, service):
        for junk in (b"\x00" * 64, b"\xff" * 64, b"\x81\xff" * 40, b"\x88\x80\x00\x00\x00\x00"):
            with dialled(url) as wire:
                receive(wire)
                wire.socket.sendall(junk)
                with contextlib.suppress(OSError, ConnectionClosed):
                    with contextlib.suppress(TimeoutError):
                        wire.recv(0.2)
                    wire.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: service.n_sockets == 0)
        assert httpx2.post(url + CHAT, json=HI).status_code == 200


# --- who may connect ---


def test_page_of_another_origin_may_not_connect() -> None:
    with served() as (url, _):
        for origin in ("http://evil.com", "null"):
            with pytest.raises(InvalidStatus) as caught, dialled(url, origin=origin):
                pass
            assert caught.value.response.status_code == 403
        with opened(url, origin=url):
            pass


def test_rebound_name_may_not_connect() -> None:
    with served() as (url, _):
        wrong = {"Host": "evil.com"}
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as wire:
            wire.sendall(
                f"GET /ws/generate HTTP/1.1\r\nHost: {wrong['Host']}\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
            )
            assert wire.recv(100).startswith(b"HTTP/1.1 403")


def test_key_comes_in_a_header_or_in_the_first_frame() -> None:
    with served(params=ServerParams(api_key="k")) as (url, _):
        with opened(url, additional_headers={"Authorization": "Bearer k"}) as wire:
            send(wire, type="generate", prompt="hi")
            assert said(answer(wire)) == "ok"
        with dialled(url) as wire:
            send(wire, type="auth", api_key="k")
            assert receive(wire)["type"] == "ready"
            send(wire, type="generate", prompt="hi")
            assert said(answer(wire)) == "ok"
        with (
            pytest.raises(InvalidStatus) as caught,
            dialled(url, additional_headers={"Authorization": "Bearer wrong"}),
        ):
            pass
        assert caught.value.response.status_code == 401


@pytest.mark.parametrize(
    "first",
    [
        '{"type": "generate", "prompt": "hi"}',
        '{"type": "auth"}',
        '{"type": "auth", "api_key": "wrong"}',
        "nonsense",
        '{"type": "auth", "api_key": "k", "x": "' + "x" * 5000 + '"}',
    ],
)
def test_connection_without_the_key_is_closed(first: str) -> None:
    with served(params=ServerParams(api_key="k")) as (url, _), dialled(url) as wire:
        wire.send(first)
        assert receive(wire)["error"]["code"] == "invalid_api_key"
        with pytest.raises(ConnectionClosed):
            receive(wire)


def test_connection_that_sends_no_key_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "_AUTH_S", 0.2)
    with served(params=ServerParams(api_key="k")) as (url, _), dialled(url) as wire:
        assert receive(wire)["error"]["code"] == "invalid_api_key"


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "MAX_SOCKETS", 1)
    with served() as (url, service):
        with opened(url), pytest.raises(InvalidStatus) as refused, dialled(url):
            pass
        assert refused.value.response.status_code == 429
        assert "retry-after" in refused.value.response.headers
        wait_until(lambda: service.n_sockets == 0)
        with opened(url):
            pass


def test_question_while_the_model_loads_is_refused() -> None:
    gate = threading.Event()

    def load() -> Any:
        assert gate.wait(PATIENCE_S)
        raise RuntimeError("no model")

    try:
        with listening(fake_app(load=load), ready=False) as url, dialled(url) as wire:
            assert receive(wire) == {"type": "ready", "model": None}
            send(wire, type="generate", prompt="hi")
            assert receive(wire)["error"]["code"] == "model_loading"
    finally:
        gate.set()
