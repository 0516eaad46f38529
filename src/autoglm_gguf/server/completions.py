"""``POST /v1/chat/completions`` and ``/v1/completions``: from a request's bytes to its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import TypeVar

from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response

from autoglm_gguf.server.answers import Answer, Ask
from autoglm_gguf.server.asking import Asking, parse_body
from autoglm_gguf.server.errors import CLIENT_LEFT, ApiError
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.protocol import ChatRequest, CompletionRequest, Sampling
from autoglm_gguf.server.queue import Held
from autoglm_gguf.server.replies import Writer
from autoglm_gguf.server.service import Service
from autoglm_gguf.server.sse import EventStream, answer_whole

_BODY_S = 60.0  # a body must arrive within this time, seconds
_JSON_TYPES = ("application/json", "")
_Body = TypeVar("_Body", bound=Sampling)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _complete(request, ChatRequest, Asking.chat)


async def completions(request: Request) -> Response:
    """Go on with a text."""
    return await _complete(request, CompletionRequest, Asking.completion)


async def _complete(
    request: Request,
    kind: type[_Body],
    make: Callable[[Asking, _Body, Hashable], Ask],
) -> Response:
    service: Service = request.app.state.service
    answer, writer, stream = await _begin(request, service, kind, make)
    if stream:
        return EventStream(answer, writer, service.params)
    return await answer_whole(answer, writer, request.receive)


async def _begin(
    request: Request,
    service: Service,
    kind: type[_Body],
    make: Callable[[Asking, _Body, Hashable], Ask],
) -> tuple[Answer, Writer, bool]:
    """Read a request and begin its answer; its bytes and texts are gone when this returns."""
    asking = service.asking(service.ready())
    held = service.bodies.hold()
    try:
        raw = await read_body(request, held, service.params)
        client = client_of(request)

        def read() -> tuple[_Body, Ask]:
            body = parse_body(kind, raw)
            raw.clear()  # a screenshot is 10 MB of text: held once, not twice
            return body, make(asking, body, client)

        body, ask = await service.read_request(len(raw), read)
        answer = service.begin(ask, held)
    except BaseException:
        held.release()
        raise
    return answer, writer_for(body, service), bool(body.stream)


def writer_for(body: Sampling, service: Service) -> Writer:
    """Writes the answer to a body."""
    info = service.ready().info
    options = body.stream_options
    is_chat = isinstance(body, ChatRequest)
    logprobs = getattr(body, "logprobs", None)
    return Writer(
        model=info.name,
        stop_ids=info.stop_ids,
        logprobs=logprobs is not None and logprobs is not False,
        top_logprobs=bool(logprobs) and not is_chat,
        include_usage=bool(body.stream and options is not None and options.include_usage),
        is_chat=is_chat,
    )


def client_of(connection: HTTPConnection) -> Hashable:
    """Who asks, as far as turns go: programs at one address are told apart by their names."""
    host = connection.client.host if connection.client else ""
    return host, connection.headers.get("user-agent", "")


async def read_body(request: Request, held: Held, params: ServerParams) -> bytearray:
    """The body, refused as soon as it is too large.

    Raises:
        ApiError: 415, 413, 429 when too much is held already, 408, or 499: the client left.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in _JSON_TYPES and not content_type.endswith("+json"):
        raise ApiError(
            415,
            "unsupported_media_type",
            f"Content-Type {content_type}: not application/json",
            hint="send the header Content-Type: application/json",
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > params.max_body_bytes:
        raise _too_large(params)
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for piece in request.stream():
                if len(data) + len(piece) > params.max_body_bytes:
                    raise _too_large(params)
                if not held.add(len(piece)):
                    raise ApiError(
                        429,
                        "rate_limit_exceeded",
                        "too much is being sent at once",
                        retry_after_s=2,
                    )
                data += piece
    except TimeoutError:
        raise ApiError(408, "request_timeout", "the body did not arrive in time") from None
    except ClientDisconnect:
        raise ApiError(CLIENT_LEFT, "client_left", "the client left") from None
    return data


def _too_large(params: ServerParams) -> ApiError:
    most = params.max_body_bytes
    return ApiError(413, "request_too_large", f"body: too large ({most} bytes at most)")
