"""Whom the server answers, what it refuses to read, and what it keeps to itself."""

from __future__ import annotations

import logging
import mimetypes
import socket
import struct
import threading
import time
import zlib
from typing import Any

import httpx2
import pytest
from serving import (
    CHAT,
    HI,
    PATIENCE_S,
    PacedEngine,
    ask,
    chat,
    data_url,
    fake_app,
    image_part,
    listening,
    png,
    service_of,
    wait_until,
)

from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.server import images, security
from autoglm_gguf.server.errors import ApiError
from autoglm_gguf.server.images import fetch_image, public_address
from autoglm_gguf.server.params import ServerParams

KEY = "sk-very-secret"


def post(params: ServerParams | None = None, **headers: str) -> httpx2.Response:
    """A chat with headers of one's own."""
    return ask(fake_app(params=params), ("POST", CHAT, {"json": HI, "headers": headers}))[0]


# --- where it listens ---


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "box.lan"])
def test_network_without_a_key_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="no API key is set"):
        ServerParams(host=host)
    ServerParams(host=host, api_key="k")
    ServerParams(host=host, allow_no_key=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert ServerParams(host=host).api_key is None


@pytest.mark.parametrize("key", ["", "two words", "ключ", "a\nb"])
def test_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="api_key"):
        ServerParams(api_key=key)


def test_key_is_not_shown_with_the_parameters() -> None:
    assert KEY not in repr(ServerParams(api_key=KEY))


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70_000},
        {"max_queue": 0},
        {"max_body_bytes": 1},
        {"max_image_pixels": 0},
        {"max_tokens": 0},
        {"keep_alive_s": 0},
        {"shutdown_s": float("nan")},
        {"allowed_origins": ("evil.com",)},
        {"allowed_hosts": ("a/b",)},
        {"constrain_actions": "maybe"},
    ],
)
def test_parameter_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerParams(**wrong)


# --- Host and Origin ---


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000", "127.0.0.2", "localhost."],
)
def test_host_that_is_this_machine_is_let_in(host: str) -> None:
    assert post(host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.com", "evil.com:8000", "127.0.0.1.evil.com", "192.168.1.5", "a@localhost", "", "[::1"],
)
def test_host_of_a_rebound_name_is_refused(host: str) -> None:
    refused = post(host=host)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "host_not_allowed"


def test_names_that_were_allowed_and_addresses_of_an_open_server_are_let_in() -> None:
    params = ServerParams(host="0.0.0.0", api_key=KEY, allowed_hosts=("Phone.lan",))
    bearer = {"authorization": f"Bearer {KEY}"}
    for host in ("192.168.1.5:8000", "phone.lan:8000"):
        assert post(params, host=host, **bearer).status_code == 200
    assert post(params, host="evil.com", **bearer).status_code == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://localhost:8000", 403),  # another origin than the Host that was called
        ("http://evil.com", 403),
        ("http://127.0.0.1:9000", 403),
        ("null", 403),
        ("http://127.0.0.1:8000.evil.com", 403),
        ("http://127.0.0.1:x", 403),
    ],
)
def test_origin_must_be_the_servers_own_page(origin: str, status: int) -> None:
    assert post(origin=origin).status_code == status


def test_no_origin_may_read_unless_it_was_allowed() -> None:
    friend = "https://friend.example"
    preflight = {"origin": friend, "access-control-request-method": "POST"}
    closed = ask(fake_app(), ("OPTIONS", CHAT, {"headers": preflight}))[0]
    assert closed.status_code == 405
    assert not any(name.startswith("access-control") for name in closed.headers)
    params = ServerParams(allowed_origins=(friend,))
    opened, foreign, answer = ask(
        fake_app(params=params),
        ("OPTIONS", CHAT, {"headers": preflight}),
        ("OPTIONS", CHAT, {"headers": {**preflight, "origin": "https://evil.com"}}),
        ("POST", CHAT, {"json": HI, "headers": {"origin": friend}}),
    )
    assert opened.headers["access-control-allow-origin"] == friend
    assert "access-control-allow-origin" not in foreign.headers
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == friend


# --- the key ---


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        (None, 401),
        ("Bearer wrong", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        (f"Bearer {KEY}x", 401),
        ("Bearer ключ".encode(), 401),
    ],
)
def test_key_is_asked_for(authorization: str | bytes | None, status: int) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    found = ask(
        fake_app(params=ServerParams(api_key=KEY)),
        *(("POST", CHAT, {"json": HI, "headers": headers}),),
        *(("GET", path, {"headers": headers}) for path in ("/v1/models", "/metrics", "/status")),
    )
    assert [answer.status_code for answer in found] == [status] * 4
    assert KEY not in "".join(answer.text for answer in found)


def test_health_page_and_description_need_no_key() -> None:
    paths = ("/health", "/", "/openapi.json")
    found = ask(fake_app(params=ServerParams(api_key=KEY)), *(("GET", p, {}) for p in paths))
    assert [answer.status_code for answer in found] == [200] * 3


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []
    compare = security.hmac.compare_digest
    monkeypatch.setattr(
        security.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or compare(a, b)
    )
    post(ServerParams(api_key=KEY), authorization="Bearer guess")
    assert seen == [(b"guess", KEY.encode())]


def test_without_a_key_any_is_taken() -> None:
    assert post(authorization="Bearer EMPTY").status_code == 200


def test_nothing_that_was_said_or_sent_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = fake_app(FakeEngine(b"hidden answer"), ServerParams(api_key=KEY))
    with caplog.at_level(logging.DEBUG):
        said = {"messages": [{"role": "user", "content": ["hidden words", image_part()]}]}
        headers = {"authorization": f"Bearer {KEY}"}
        assert ask(app, ("POST", CHAT, {"json": said, "headers": headers}))[0].status_code == 200
        ask(app, ("GET", f"/v1/models?key={KEY}", {"headers": {"authorization": f"Bearer {KEY}x"}}))
        ask(app, ("GET", "/some/hidden/path", {}))
    own = [r.getMessage() for r in caplog.records if r.name.startswith("autoglm_gguf")]
    assert any("POST /v1/chat/completions 200" in line for line in own)
    assert any("answer: stop" in line for line in own)
    for line in own:
        assert KEY not in line and "hidden" not in line and "base64" not in line


# --- bodies ---


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


# --- images ---


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises a size, with next to nothing behind it."""

    def block(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = block(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + data + block(b"IEND", b"")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1/x.png", "not fetched"),
        ("https://example.com/x.png", "not fetched"),
        ("HTTPS://example.com/x.png", "not fetched"),
        ("file:///etc/passwd", "not a data: URL"),
        ("/etc/passwd", "not a data: URL"),
        ("C:\\x.png", "not a data: URL"),
        ("ftp://x/y", "not a data: URL"),
        ("", "not a data: URL"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64", "not base64"),
        ("data:image/png;base64,@@@", "not base64"),
        ("data:image/png;base64,", "not an image"),
        (data_url(b"GIF89a, no more"), "not an image"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not an image"),
        (data_url(bomb(50_000, 50_000)), "more pixels"),
        (data_url(bomb(5_000, 5_000)), "too large"),
        (data_url(bomb(0, 5)), "not an image"),
    ],
)
def test_image_that_is_none_or_elsewhere_is_refused(url: str, says: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    refused = chat(fake_app(), messages=[{"role": "user", "content": [part]}])
    assert refused.status_code == 400
    assert says in refused.json()["error"]["message"]


def test_image_that_breaks_off_is_refused() -> None:
    part = image_part(png(200, 200)[:-4000])
    refused = chat(fake_app(), messages=[{"role": "user", "content": [part]}])
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_image"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        *((a, False) for a in ("127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254")),
        *((a, False) for a in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255")),
        *((a, False) for a in ("::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::")),
        *((a, False) for a in ("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1:2:3:4:80ff:fffe")),
    ],
)
def test_only_public_addresses_are_fetched_from(
    monkeypatch: pytest.MonkeyPatch, address: str, public: bool
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert public_address("name.example", 80) == (address if public else None)


def test_name_with_one_private_address_is_not_fetched_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(socket.AF_INET, 1, 0, "", (a, 80)) for a in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ApiError, match="not a public address"):
        fetch_image("http://name.example/x.png", 1000, "p")


@pytest.mark.parametrize(
    "url", ["http://u:p@h/x", "http://h:8080/x", "http://[::1/x", "http:///x", "http://h:99999/"]
)
def test_odd_address_is_not_fetched(url: str) -> None:
    with pytest.raises(ApiError):
        fetch_image(url, 1000, "p")


class Site:
    """A web site on loopback, for a test that takes it for a public one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: bytes, slow_s: float = 0.0) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._answer, self._slow_s, self.asked = answer, slow_s, b""
        monkeypatch.setattr(images, "_PORTS", {"http": self.port, "https": 443})
        monkeypatch.setattr(images, "public_address", lambda *_: "127.0.0.1")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener:
            self.asked = connection.recv(65_536)
            for at in range(0, len(self._answer), 1000):
                time.sleep(self._slow_s)
                try:
                    connection.sendall(self._answer[at : at + 1000])
                except OSError:
                    return


def response(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *headers, "Connection: close"))
    return head.encode() + b"\r\n" + body


def test_public_image_is_fetched_where_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = png(112, 168)
    site = Site(monkeypatch, response(picture))
    part = {"type": "image_url", "image_url": {"url": f"http://name.example:{site.port}/x.png?y=1"}}
    app = fake_app(params=ServerParams(fetch_images=True))
    answer = chat(app, messages=[{"role": "user", "content": [part]}])
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 24
    assert site.asked.startswith(b"GET /x.png?y=1 HTTP/1.1\r\n")
    assert b"name.example" in site.asked


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (response(b"x" * 50_000), "too large"),
        (response(b"", "302 Found", "Location: http://127.0.0.1/secret"), "answered 302"),
        (response(b"", "500 Oops"), "answered 500"),
        (b"", "cannot be fetched"),
        (b"not http at all\r\n\r\n", "cannot be fetched"),
    ],
)
def test_fetching_is_bounded_and_follows_nobody(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, says: str
) -> None:
    site = Site(monkeypatch, answer)
    with pytest.raises(ApiError, match=says):
        fetch_image(f"http://name.example:{site.port}/", 10_000, "p")


def test_slow_site_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_FETCH_S", 0.3)
    site = Site(monkeypatch, response(b"x" * 9000), slow_s=0.2)
    with pytest.raises(ApiError, match=r"too slow|cannot be fetched"):
        fetch_image(f"http://name.example:{site.port}/", 10_000, "p")


# --- what every answer says ---


def test_page_may_load_nothing_from_elsewhere() -> None:
    page, api = ask(fake_app(), ("GET", "/", {}), ("GET", "/health", {}))
    policy = page.headers["content-security-policy"]
    for rule in ("default-src 'none'", "frame-ancestors 'none'", "trusted-types 'none'"):
        assert rule in policy
    assert "unsafe" not in policy
    for answer in (page, api):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_scripts_of_the_page_are_scripts_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mimetypes.types_map, ".js", "text/plain")  # as Windows may have it
    (answer,) = ask(fake_app(), ("GET", "/app.js", {}))
    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize(
    "path", ["/../../../etc/passwd", "/%2e%2e/app.py", "/..%2fapp.py", "/app.py"]
)
def test_page_gives_no_file_of_another_folder(path: str) -> None:
    assert ask(fake_app(), ("GET", path, {}))[0].status_code == 404


def test_bug_in_the_server_is_500_without_details(monkeypatch: pytest.MonkeyPatch) -> None:
    app = fake_app()

    def broken(*_: Any) -> Any:
        raise RuntimeError("/home/me/secret.py, line 7")

    monkeypatch.setattr(service_of(app), "asking", broken)
    answer = chat(app)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"
