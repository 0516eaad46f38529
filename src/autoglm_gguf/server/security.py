"""Who may ask: Host, Origin and API key are checked before anything else; and what is noted of it.

- Host: an address or localhost, or a name that the server was told. A page whose name was pointed
  at this machine (DNS rebinding) sends its own name, and is refused.
- Origin: browsers send it with every POST and WebSocket of a page; only the server's own page may.
- Key: compared in constant time. ``/health`` and the page's files need none; a WebSocket may send
  it in its first frame.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoglm_gguf.server.errors import CLIENT_LEFT, ApiError, as_api_error
from autoglm_gguf.server.metrics import Metrics
from autoglm_gguf.server.params import PORTS, ServerParams, is_loopback
from autoglm_gguf.server.sse import LEFT

_KEYED = ("/v1/", "/metrics", "/status", "/ws/")
SOCKET_PATH = "/ws/generate"
_SAFE = ("GET", "HEAD", "OPTIONS")
_DRAIN_S = 10.0
# The page draws screenshots it was given (data:) and talks to this server alone. With trusted types
# that nobody may make, a browser refuses text that would be read as HTML or as a script.
PAGE_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_log = logging.getLogger(__name__)


def route_path(scope: Scope) -> str:
    """The path that routes are found by: without what this application is mounted under."""
    path: str = scope["path"]
    prefix = scope.get("root_path", "")
    rest = path.removeprefix(prefix)
    return rest if rest.startswith("/") or path == prefix else path


def sends_key(headers: Mapping[str, str]) -> bool:
    """Whether a header carries a key, right or wrong."""
    return "authorization" in headers


def key_matches(given: str, key: str) -> bool:
    """Whether a key is the right one, in a time that does not tell how much of it is."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), key.encode())


class Guard:
    """Lets through what may ask.

    Args:
        app: What is guarded.
        params: Whom to trust.
    """

    def __init__(self, app: ASGIApp, params: ServerParams) -> None:
        self._app, self._params = app, params

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request or a WebSocket before it is accepted."""
        if scope["type"] in ("http", "websocket"):
            try:
                self._check(scope, Headers(scope=scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._knows_host(hosts[0]):
            raise ApiError(
                403,
                "host_not_allowed",
                "Host: not a name of this server",
                hint="call it by its address, or start it with --allow-host NAME",
            )
        is_socket = scope["type"] == "websocket"
        origins = headers.getlist("origin")
        if origins and (is_socket or scope["method"] not in _SAFE):
            allowed = (*self._params.allowed_origins, *_own_origins(hosts[0]))
            if len(origins) > 1 or normal_origin(origins[0]) not in map(normal_origin, allowed):
                raise ApiError(
                    403,
                    "origin_not_allowed",
                    "Origin: pages of other origins may not use this server",
                    hint="start it with --allow-origin ORIGIN",
                )
        self._check_key(scope, headers)

    def _knows_host(self, host: str) -> bool:
        name = _host_name(host)
        if name is None:
            return False
        if name in map(str.lower, ("localhost", self._params.host, *self._params.allowed_hosts)):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self._params.host)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        key, path = self._params.api_key, route_path(scope)
        if key is None or not path.startswith(_KEYED):
            return
        if path == SOCKET_PATH and not sends_key(headers):
            return  # its first frame must have it
        sent = headers.getlist("authorization")
        scheme, _, given = (sent[0] if len(sent) == 1 else "").partition(" ")
        if scheme.lower() != "bearer" or not key_matches(given.strip(), key):
            raise ApiError(
                401,
                "invalid_api_key",
                "Authorization: not the API key of this server",
                hint="send the header Authorization: Bearer KEY",
            )


def _host_name(host: str) -> str | None:
    """The name or address in a Host header, in lower case; None if it is not one."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError:
        return None
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return None
    return (parts.hostname or "").rstrip(".") or None


def _own_origins(host: str) -> tuple[str, str]:
    return f"http://{host}", f"https://{host}"  # https: behind a proxy that ends TLS


def normal_origin(origin: str) -> str:
    """An origin as browsers write it: in lower case, without the port that its scheme implies."""
    text = origin.lower()
    return text.removesuffix(f":{PORTS.get(text.partition(':')[0])}")


class Observed:
    """Counts and logs requests, adds what every answer has, and reads off what was not read.

    A client that still sends its body when it is refused would see a broken connection in place of
    the answer: so the rest is read, up to a bound, and dropped.

    Args:
        app: What is observed.
        metrics: Told of every request.
        params: For the bound.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, params: ServerParams) -> None:
        self._app, self._metrics, self._params = app, metrics, params

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, has_body, has_begun = time.monotonic(), 500, True, False

        async def receive_noting() -> Message:
            nonlocal has_body
            message = await receive()
            has_body = has_body and bool(message.get("more_body"))
            return message

        async def send_noting(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                _add_headers(message)
                if status >= 400 and has_body and status != CLIENT_LEFT:
                    await self._drain(scope, receive_noting)
            await send(message)

        try:
            await self._app(scope, receive_noting, send_noting)
        except Exception as error:
            told = as_api_error(error)  # logs what the client is not told
            if not has_begun:
                await told.response()(scope, receive_noting, send_noting)
        finally:
            status = CLIENT_LEFT if scope.get(LEFT) else status
            endpoint = _endpoint(route_path(scope))
            self._metrics.saw_request(endpoint, status)
            took_ms = 1000 * (time.monotonic() - began)
            # Pages and monitors look at it all the time.
            level = logging.DEBUG if scope["method"] in _SAFE and status < 400 else logging.INFO
            _log.log(level, "%s %s %d, %.0f ms", scope["method"], endpoint, status, took_ms)

    async def _drain(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        if "expect" in headers or not (
            "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        ):
            return
        n_left = 4 * self._params.max_body_bytes
        try:
            async with asyncio.timeout(_DRAIN_S):
                more = True
                while more and n_left > 0:
                    message = await receive()
                    more = bool(message.get("more_body"))
                    n_left -= len(message.get("body", b""))
        except TimeoutError:
            pass


_ENDPOINTS = frozenset(
    (
        *("/", "/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"),
        *("/status", "/openapi.json"),
    )
)


def _endpoint(path: str) -> str:
    """A path as metrics and logs call it: what a client made up is not repeated."""
    return path if path in _ENDPOINTS else "other"


def _add_headers(start: Message) -> None:
    headers = MutableHeaders(scope=start)
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("Cache-Control", "no-store")
