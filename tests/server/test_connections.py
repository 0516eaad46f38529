"""What a connection may take: heads that do not come, what is no HTTP, one connection too many."""

from __future__ import annotations

import json
import logging
import socket
import time

import httpx2
import pytest
from serving import CHAT, HI, PATIENCE_S, PacedEngine, fake_app, listening
from wires import answer, dialled, receive, said, send

from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.server import connections
from autoglm_gguf.server.params import ServerParams

KEY = "sk-very-secret"
GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def say_to(url: str, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """What is answered to bytes: status, headers, body; the connection is closed by the server."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        client.settimeout(PATIENCE_S)
        client.sendall(data)
        came = b""
        while piece := client.recv(65_536):
            came += piece
    head, _, body = came.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    return int(first.split()[1]), headers, body


def test_request_whose_head_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    with listening(fake_app()) as url:
        for begun in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
                client.settimeout(0.05)
                client.sendall(begun)
                deadline = time.monotonic() + PATIENCE_S
                while time.monotonic() < deadline:  # a byte now and then gains no time
                    try:
                        if client.recv(1) == b"":
                            break
                    except TimeoutError:
                        client.sendall(b"a" if begun else b"")
                    except OSError:  # closed while it was being written to
                        break
                else:
                    pytest.fail("the server waits for ever")


def test_answer_may_take_longer_than_the_head_of_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    engine = PacedEngine(b"again " * 8, token_s=0.02)
    with listening(fake_app(engine)) as url, httpx2.Client(timeout=PATIENCE_S) as client:
        for _ in range(2):  # the second one on the same connection
            answer = client.post(url + CHAT, json=HI)
            assert answer.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\0\x01\0" + b"\xff" * 100,  # TLS, to a port that has none
        GET + b"Content-Length: -1\r\n\r\n",
        GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        GET + b"no colon\r\n\r\n",
        GET + b"X: " + b"a" * 100_000,
        b"GET /health\r\n\r\n",
        GET.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["tls", "negative", "two lengths", "no colon", "long", "HTTP/0.9", "chunk"],
)
def test_what_is_no_http_is_answered_in_the_shape_of_all_errors(data: bytes) -> None:
    with listening(fake_app()) as url:
        status, headers, body = say_to(url, data)
        assert (status, headers["connection"]) == (400, "close")
        assert headers["content-type"] == "application/json"
        assert json.loads(body)["error"]["code"] == "invalid_http"
        assert httpx2.get(url + "/health").status_code == 200


def test_connection_too_many_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    with listening(fake_app()) as url:
        held = [httpx2.Client(timeout=PATIENCE_S) for _ in range(2)]
        for client in held:
            assert client.get(url + "/health").status_code == 200
        refused = httpx2.get(url + "/health")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
        for client in held:
            assert client.get(url + "/health").status_code == 200
            client.close()


def test_keys_on_websockets_are_in_no_log_of_any_level(caplog: pytest.LogCaptureFixture) -> None:
    app = fake_app(FakeEngine(b"ok"), ServerParams(api_key=KEY))
    with caplog.at_level(logging.DEBUG), listening(app) as url:
        for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
            with dialled(url, additional_headers=headers) as wire:
                if not headers:
                    send(wire, type="auth", api_key=KEY)
                assert receive(wire)["type"] == "ready"
                send(wire, type="generate", prompt="hidden words")
                assert said(answer(wire)) == "ok"
    names = {record.name for record in caplog.records}
    assert any(name.startswith("autoglm_gguf") for name in names)
    for record in caplog.records:
        if not record.name.startswith("websockets"):  # the client of this test
            assert KEY not in record.getMessage() and "hidden" not in record.getMessage()
