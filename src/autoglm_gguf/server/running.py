"""`serve`: the application on a port, until a signal.

Uvicorn listens; how it ends is decided here: a first signal lets the running answer finish within a
bound, a second one ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from autoglm_gguf.errors import ServerError
from autoglm_gguf.server.app import create_app
from autoglm_gguf.server.backend import Backend
from autoglm_gguf.server.connections import HttpConnection, SocketConnection
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.service import Service

_NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_CLOSE_S = 3  # for connections that do nothing any more, seconds
_M_MMAP_THRESHOLD = -3  # <malloc.h>
_LARGE_BYTES = 1 << 20
_log = logging.getLogger(__name__)


def serve(
    load: Callable[[], Backend],
    params: ServerParams,
    *,
    on_listening: Callable[[str], None] | None = None,
    on_loaded: Callable[[Service], None] | None = None,
    on_stop: Callable[[], None] | None = None,
) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Args:
        load: Gives the model; called in a thread while the port answers already.
        params: See `ServerParams`.
        on_listening: Told the address, as ``http://127.0.0.1:8000``, before the model is there.
        on_loaded: Told when it is there.
        on_stop: Told of the first signal.

    Raises:
        AutoGLMError, ValueError: What ``load`` raises, or the port is taken.
    """
    sockets = open_sockets(params)
    _give_back_large_blocks()
    try:
        asyncio.run(_serve(load, params, sockets, on_listening, on_loaded, on_stop))
    finally:
        for listener in sockets:
            listener.close()


def _give_back_large_blocks() -> None:
    """Have glibc return what bodies and screenshots took, which threads would keep otherwise."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


async def _serve(
    load: Callable[[], Backend],
    params: ServerParams,
    sockets: list[socket.socket],
    on_listening: Callable[[str], None] | None,
    on_loaded: Callable[[Service], None] | None,
    on_stop: Callable[[], None] | None,
) -> None:
    def loaded(service: Service) -> None:
        if service.holder.error is not None:
            server.should_exit = True
        elif on_loaded is not None:
            on_loaded(service)

    app = create_app(load, params, on_loaded=loaded)
    server = _Server(configure(app, params))
    service: Service = app.state.service
    if on_listening is not None:
        on_listening(address_of(params.host, sockets[0]))
    with _ending(server, service, on_stop):
        await server.serve(sockets)
    error = service.holder.error
    if error is not None:
        raise error


def configure(app: Any, params: ServerParams) -> uvicorn.Config:
    """How uvicorn runs the application: one parser of HTTP, bounds, and nothing of its own told."""
    return uvicorn.Config(
        app,
        http=HttpConnection,
        ws=SocketConnection,
        ws_max_size=params.max_body_bytes,
        ws_per_message_deflate=False,  # tokens are small, and a bomb needs no door
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_CLOSE_S,
    )


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: ours let answers finish first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@contextlib.contextmanager
def _ending(
    server: uvicorn.Server, service: Service, on_stop: Callable[[], None] | None
) -> Generator[None, None, None]:
    """While inside, SIGINT and SIGTERM end the server."""
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        await service.stop()
        server.should_exit = True

    def on_signal() -> None:
        if ending:
            _log.warning("second signal: ending at once")
            ending.append(asyncio.ensure_future(service.stop(0.0)))
            server.should_exit = server.force_exit = True
        else:
            ending.append(asyncio.ensure_future(end()))
            if on_stop is not None:
                on_stop()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def handle(*_: object) -> None:
        loop.call_soon_threadsafe(on_signal)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_sockets(params: ServerParams) -> list[socket.socket]:
    """Listening sockets for a host and port; several where a name has several addresses.

    Raises:
        ServerError: The port is taken, or the host is not this machine's.
    """
    where = f"{params.host}:{params.port}"
    opened: list[socket.socket] = []
    missing: OSError | None = None
    try:
        found = socket.getaddrinfo(
            params.host, params.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, _, _, _, address in dict.fromkeys(found):
            port = opened[0].getsockname()[1] if opened else address[1]
            try:
                opened.append(_listen(family, (address[0], port)))
            except OSError as error:
                if error.errno not in _NO_ADDRESS:
                    raise
                missing = error  # localhost has ::1, also where there is no IPv6
        if missing is not None and not opened:
            raise missing
    except OSError as error:
        for listener in opened:
            listener.close()
        raise ServerError(
            f"{where}: cannot listen there ({error.strerror or error})",
            hint="another program may use the port; take a free one: --port 8001",
        ) from error
    return opened


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_REUSEADDR") and not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def address_of(host: str, listener: socket.socket) -> str:
    """Where a browser finds it: ``http://127.0.0.1:8000``."""
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
