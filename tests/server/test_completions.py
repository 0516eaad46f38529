"""Bodies: what is read of them, up to which bounds, and what is said of the rest."""

from __future__ import annotations

import json
import socket
import threading
import tracemalloc
from typing import Any

import httpx2
import pytest
from serving import (
    CHAT,
    PATIENCE_S,
    PacedEngine,
    ask,
    chat,
    fake_app,
    image_part,
    listening,
    png,
    service_of,
    wait_until,
)

from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.server.params import ServerParams

KEY = "sk-very-secret"


def test_body_over_the_limit_is_refused_while_it_is_read() -> None:
    params = ServerParams(max_body_bytes=10_000)
    n_sent = 0

    async def endless() -> Any:
        nonlocal n_sent
        while n_sent < 2000:
            n_sent += 1
            yield b" " * 1000

    declared, chunked = ask(
        fake_app(params=params),
        ("POST", CHAT, {"content": b" " * 20_000}),
        ("POST", CHAT, {"content": endless()}),
    )
    for refused in (declared, chunked):
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "request_too_large"
    assert n_sent < 100, "read to a bound, so that the client hears why, and no further"


def test_client_that_sends_too_much_hears_why() -> None:
    """It is still sending when it is refused: the answer must not be lost in a broken pipe."""
    params = ServerParams(max_body_bytes=500_000, api_key=KEY)
    with listening(fake_app(params=params)) as url:
        big = b" " * 1_900_000
        right = {"authorization": f"Bearer {KEY}"}
        assert httpx2.post(url + CHAT, content=big, headers=right).status_code == 413
        assert httpx2.post(url + CHAT, content=big[:400_000]).status_code == 401


def test_bodies_held_at_a_time_are_bounded() -> None:
    engine = PacedEngine(b"ok", n_ctx=100_000)
    engine.gate = threading.Event()
    app = fake_app(engine, ServerParams(max_body_bytes=100_000))
    service = service_of(app)
    words = {"messages": [{"role": "user", "content": "x" * 90_000}]}
    with listening(app) as url:
        threads = [
            threading.Thread(
                target=httpx2.post,
                args=(url + CHAT,),
                kwargs={"json": words, "timeout": PATIENCE_S},
            )
            for _ in range(2)
        ]
        for n, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda n=n: service.bodies.n_bytes > n * 90_000)
        refused = httpx2.post(url + CHAT, json=words)
        assert refused.status_code == 429
        engine.gate.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        wait_until(lambda: service.bodies.n_bytes == 0)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "text/plain"}, b"{}", 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b"{}", 415),
        ({"content-type": "application/json; charset=utf-8"}, b"{}", 400),
        ({}, b"", 400),
        ({}, b"\xff\xfe", 400),
        ({}, b'{"messages": "\\ud800"}', 400),
        ({}, b"[" * 100_000, 400),
        ({}, b'{"a":' * 10_000, 400),
        ({}, b"9" * 10_000, 400),
        ({}, b'{"messages": [], "temperature": 1e999}', 400),
    ],
)
def test_body_that_is_no_request_is_refused(
    headers: dict[str, str], body: bytes, status: int
) -> None:
    answer = ask(fake_app(), ("POST", CHAT, {"content": body, "headers": headers}))[0]
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_more_messages_images_or_text_than_allowed_is_refused() -> None:
    app = fake_app(params=ServerParams(max_messages=3, max_images=1))
    many = [{"role": "user", "content": "x"}] * 4
    assert chat(app, messages=many).status_code == 400
    app = fake_app(params=ServerParams(max_messages=3, max_images=1))
    two = [{"role": "user", "content": [image_part(), image_part()]}]
    assert "too many images" in chat(app, messages=two).json()["error"]["message"]
    long = [{"role": "user", "content": "x" * 70_000}]
    assert chat(fake_app(), messages=long).json()["error"]["code"] == "context_length_exceeded"


def test_answers_are_not_longer_than_the_server_allows() -> None:
    app = fake_app(FakeEngine(b"x" * 100), ServerParams(max_tokens=5))
    assert chat(app, max_tokens=50).json()["usage"]["completion_tokens"] == 5
    app = fake_app(FakeEngine(b"x" * 100), ServerParams(max_tokens=5))
    assert chat(app).json()["choices"][0]["finish_reason"] == "length"


def test_body_is_gone_once_its_answer_has_begun() -> None:
    engine = PacedEngine(b"ok")
    engine.gate = threading.Event()
    app = fake_app(engine)
    picture = png(1200, 1200)  # 4.3 MB that do not compress, 5.8 MB in base64
    with listening(app) as url:
        data = json.dumps({"messages": [{"role": "user", "content": [image_part(picture)]}]})
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            tracemalloc.start()
            try:
                client.sendall(head.encode() + data.encode())
                wait_until(lambda: not service_of(app).queue.is_idle)
                # The file and its pixels, and no text of it: that alone is twice as much.
                wait_until(lambda: tracemalloc.get_traced_memory()[0] < 3 * len(picture))
            finally:
                tracemalloc.stop()
                engine.gate.set()
            assert client.recv(12) == b"HTTP/1.1 200"
