"""Whom the server answers, what it refuses to read, and what it keeps to itself."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
from typing import Any

import httpx2
import pytest
from serving import (
    CHAT,
    HI,
    ask,
    chat,
    fake_app,
    image_part,
    service_of,
)

from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.server import security
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


@pytest.mark.parametrize(
    "allowed",
    ["https://Friend.example", "https://friend.example:443", "https://FRIEND.example:443"],
)
def test_origin_is_allowed_however_it_is_written(allowed: str) -> None:
    headers = {"origin": "https://friend.example"}  # as browsers write it
    answer = ask(
        fake_app(params=ServerParams(allowed_origins=(allowed,))),
        ("POST", CHAT, {"json": HI, "headers": headers}),
    )[0]
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == headers["origin"]


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


def test_key_that_is_sent_twice_is_refused() -> None:
    twice = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer other")]
    for headers in (twice, twice[::-1], [twice[0]] * 2):
        found = ask(
            fake_app(params=ServerParams(api_key=KEY)), ("GET", "/v1/models", {"headers": headers})
        )
        assert found[0].status_code == 401


def test_key_in_an_address_is_none() -> None:
    app = fake_app(params=ServerParams(api_key=KEY))
    found = ask(app, *(("GET", f"/v1/models?{n}={KEY}", {}) for n in ("key", "api_key", "token")))
    assert [answer.status_code for answer in found] == [401] * 3


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


def test_key_is_asked_for_under_a_prefix_too() -> None:
    """Behind a proxy that serves it as /llm, the path that arrives begins with that."""
    app = fake_app(params=ServerParams(api_key=KEY))

    async def run() -> list[int]:
        async with app.router.lifespan_context(app):
            transport = httpx2.ASGITransport(app, root_path="/llm")
            base = "http://127.0.0.1"
            async with httpx2.AsyncClient(transport=transport, base_url=base) as client:
                paths = ("/v1/models", "/status", "/metrics", "/health")
                return [(await client.get("/llm" + path)).status_code for path in paths]

    *keyed, health = asyncio.run(run())
    assert keyed == [401, 401, 401]
    assert health in (200, 503)
