"""Images in requests: bombs, paths, and addresses of other machines."""

from __future__ import annotations

import socket
import struct
import threading
import time
import zlib

import httpx2
import pytest
from serving import (
    PATIENCE_S,
    chat,
    data_url,
    fake_app,
    image_part,
    listening,
    png,
    wait_until,
)
from wires import answer as answer_of
from wires import opened, send

from autoglm_gguf.server import images
from autoglm_gguf.server.errors import ApiError
from autoglm_gguf.server.images import fetch_image, public_address
from autoglm_gguf.server.params import ServerParams


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


def test_name_that_cannot_be_looked_up_has_no_address() -> None:
    assert public_address("a\x00b", 80) is None
    assert public_address("x" * 70 + ".example", 80) is None


@pytest.mark.parametrize(
    "url", ["http://u:p@h/x", "http://h:8080/x", "http://[::1/x", "http:///x", "http://h:99999/"]
)
def test_odd_address_is_not_fetched(url: str) -> None:
    with pytest.raises(ApiError):
        fetch_image(url, 1000, "p")


class Site:
    """A web site on loopback, for a test that takes it for a public one."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        answer: bytes,
        slow_s: float = 0.0,
        n_bytes: int = 1000,
        gate: threading.Event | None = None,
    ) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._answer, self._slow_s, self.asked = answer, slow_s, b""
        self._n_bytes, self._gate = n_bytes, gate
        monkeypatch.setattr(images, "PORTS", {"http": self.port, "https": 443})
        monkeypatch.setattr(images, "public_address", lambda *_: "127.0.0.1")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener:
            self.asked = connection.recv(65_536)
            if self._gate is not None:
                self._gate.wait(PATIENCE_S)
            for at in range(0, len(self._answer), self._n_bytes):
                time.sleep(self._slow_s)
                try:
                    connection.sendall(self._answer[at : at + self._n_bytes])
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


def test_site_that_sends_a_little_now_and_then_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time; all of them together do not, in the head and in the body."""
    monkeypatch.setattr(images, "_FETCH_S", 0.4)
    for answer in (response(b"x" * 200), b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 200):
        site = Site(monkeypatch, answer, slow_s=0.1, n_bytes=5)
        with pytest.raises(ApiError, match="too slow"):
            fetch_image(f"http://name.example:{site.port}/", 10_000, "p")


@pytest.mark.parametrize("host", ["b\u00fccher.example", "a\x00b", "." + "x" * 70 + ".example"])
def test_name_that_no_header_can_hold_is_refused_or_written_as_one(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    site = Site(monkeypatch, response(b"picture"))
    if host.endswith("cher.example"):
        assert fetch_image(f"http://{host}:{site.port}/", 10_000, "p") == b"picture"
        assert b"xn--bcher-kva.example" in site.asked
    else:
        with pytest.raises(ApiError):
            fetch_image(f"http://{host}:{site.port}/", 10_000, "p")


def test_fetching_for_a_websocket_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    site = Site(monkeypatch, response(png(56, 84)), gate=gate)
    part = {"type": "image_url", "image_url": {"url": f"http://name.example:{site.port}/x.png"}}
    with listening(fake_app(params=ServerParams(fetch_images=True))) as url, opened(url) as wire:
        send(wire, type="generate", messages=[{"role": "user", "content": [part]}])
        wait_until(lambda: site.asked)
        assert httpx2.get(url + "/health", timeout=PATIENCE_S).status_code == 200
        gate.set()
        last = answer_of(wire)[-1]
        assert last["type"] == "done", last
