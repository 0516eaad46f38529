"""``/ws/generate``: ask and listen over a WebSocket, in JSON frames.

A client sends:
    {"type": "auth", "api_key": KEY}     first, where a key is set and no header has it
    {"type": "generate", …}              the body of a chat completion; ``prompt`` in place of
                                         ``messages`` is what a user says, or with ``"raw": true``
                                         a text to go on with; an ``id`` is repeated by the answer
    {"type": "cancel"}                   end the answer being made
    {"type": "ping"}
and gets:
    {"type": "ready", "model": …}        it may ask; the model is null while it is being loaded
    {"type": "queued", "n_ahead": n}     turns until its own: at once, and when that changes
    {"type": "token", "text": …}         what has come; several tokens where they waited for it
    {"type": "done", "finish_reason": "stop" | "length" | "cancelled", "usage": …, "timings": …}
                                         and with an answer that holds an action, ``action``: its
                                         name, its arguments (points 0..999), text and thinking
    {"type": "error", "error": …}        OpenAI's error object; the connection stays open
    {"type": "pong"}

One answer at a time. It is made as for SSE: same fields, same queue, same limits.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.websockets import WebSocket, WebSocketDisconnect

from autoglm_gguf.server.answers import Answer, Ask
from autoglm_gguf.server.completions import client_of, writer_for
from autoglm_gguf.server.errors import CLIENT_LEFT, ApiError, as_bad_request
from autoglm_gguf.server.protocol import ChatRequest, CompletionRequest, Sampling, Shape
from autoglm_gguf.server.replies import Writer, action_fields, usage_fields
from autoglm_gguf.server.security import key_matches, sends_key
from autoglm_gguf.server.service import SLOW_BYTES, Service

MAX_SOCKETS = 64
_AUTH_S = 10.0  # a key must come within this time, seconds
_AUTH_CHARS = 4096
_MAX_FAULTS = 20  # frames that make no sense, before the connection is closed
_POLICY, _TOO_BIG = 1008, 1009  # close codes, RFC 6455
_Shape = TypeVar("_Shape", bound=Shape)
_CANCELLED = "cancelled"  # the code of an error, not one error: a raised one keeps all it passed


class Frame(Shape):
    """What every frame of a client may have beside the fields of a completion."""

    type: str
    id: str | None = None
    api_key: str | None = None
    prompt: str | None = None
    raw: bool | None = None


async def generate(socket: WebSocket) -> None:
    """Serve one connection until it ends."""
    service: Service = socket.app.state.service
    if service.n_sockets >= MAX_SOCKETS:
        full = ApiError(
            429,
            "rate_limit_exceeded",
            f"too many WebSockets are open ({MAX_SOCKETS})",
            retry_after_s=5,
        )
        await socket.send_denial_response(full.response())
        return
    service.n_sockets += 1
    connection = _Connection(socket, service)
    try:
        await socket.accept()
        await connection.run()
    except (WebSocketDisconnect, TimeoutError, OSError):
        pass  # it left, or takes nothing any more
    finally:
        service.n_sockets -= 1
        await connection.close()


class _Connection:
    """One client, and at most one answer being made for it."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self._socket, self._service = socket, service
        self._answer: Answer | None = None
        self._telling: asyncio.Task[None] | None = None
        self._receiving: asyncio.Task[Any] | None = None
        self._was_told = False
        """Of the answer: its last frame."""
        self._n_faults = 0

    async def run(self) -> None:
        """Take frames until the client leaves or must go."""
        if not await self._authenticate():
            return
        backend = self._service.holder.backend
        await self._send({"type": "ready", "model": backend and backend.info.name})
        while await self._take_frame():
            pass

    async def _take_frame(self) -> bool:
        """Wait for a frame and do what it says; False if the connection is over."""
        text = await self._next_frame()
        if text is None:
            return False
        try:
            return await self._handle(text)
        except ApiError as error:
            await self._send({"type": "error", **error.body()})
            self._n_faults += error.status < 429
        if self._n_faults > _MAX_FAULTS:
            await self._socket.close(_POLICY, "too many frames that make no sense")
        return self._n_faults <= _MAX_FAULTS

    async def close(self) -> None:
        """End what is under way for it."""
        for task in (self._telling, self._receiving):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._answer is not None:
            await self._answer.close()

    async def _authenticate(self) -> bool:
        params = self._service.params
        if params.api_key is None or sends_key(self._socket.headers):
            return True  # a header was checked before the connection came here
        fault = "send the API key first: {'type': 'auth', 'api_key': …}"
        try:
            async with asyncio.timeout(_AUTH_S):
                text = await self._next_frame()
        except TimeoutError:
            text = ""
        if text is None:
            return False
        try:
            frame = _parse(Frame, _read_json(text)) if len(text) <= _AUTH_CHARS else None
        except ApiError:
            frame = None
        if frame is not None and frame.type == "auth":
            if key_matches(frame.api_key or "", params.api_key):
                return True
            fault = "not the API key of this server"
        error = ApiError(401, "invalid_api_key", fault)
        await self._send({"type": "error", **error.body()})
        await self._socket.close(_POLICY, "no API key")
        return False

    async def _next_frame(self) -> str | None:
        """The next text frame; None when the client has left. Raises what ended an answer."""
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._socket.receive())
        while True:
            tasks = [task for task in (self._receiving, self._telling) if task is not None]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._telling is not None and self._telling.done():
                self._end_telling()
            if self._receiving.done():
                message, self._receiving = self._receiving.result(), None
                if message["type"] == "websocket.disconnect":
                    return None
                return message.get("text") or ""  # a binary frame counts as an empty one

    def _end_telling(self) -> None:
        """Forget an answer that was passed on; raises what ended it."""
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.result()

    async def _handle(self, text: str) -> bool:
        """Do what a frame says; False if the connection is over."""
        if len(text) > self._service.params.max_body_bytes:
            await self._socket.close(_TOO_BIG, "frame too large")
            return False
        if len(text) > SLOW_BYTES:
            fields = await self._service.read(_read_json, text)
        else:
            fields = _read_json(text)
        frame = _parse(Frame, fields)
        if frame.type == "generate":
            await self._generate(frame, fields, len(text))
        elif frame.type == "cancel":
            if self._answer is not None:
                self._answer.abort(ApiError(CLIENT_LEFT, _CANCELLED, "cancelled by the client"))
        elif frame.type == "ping":
            await self._send({"type": "pong", **_id(frame)})
        elif frame.type != "auth":
            raise ApiError(400, "invalid_value", f"type {frame.type!r}: unknown", param="type")
        return True

    async def _generate(self, frame: Frame, fields: dict[str, Any], n_bytes: int) -> None:
        service = self._service
        if self._telling is not None:
            if not self._was_told:
                raise ApiError(409, "busy", "an answer is being made; cancel it first")
            await asyncio.wait([self._telling])  # the client knows its end: the model comes free
            self._end_telling()
        asking = service.asking(service.ready())
        held = service.bodies.hold()
        if not held.add(n_bytes):
            raise ApiError(429, "rate_limit_exceeded", "too much is being sent at once")
        client = client_of(self._socket)

        def read() -> tuple[Sampling, Ask]:
            if frame.raw:
                text = _parse(CompletionRequest, fields)
                return text, asking.completion(text, client)
            said = {"role": "user", "content": frame.prompt}
            given = fields if frame.prompt is None else {**fields, "messages": [said]}
            chat = _parse(ChatRequest, given)
            return chat, asking.chat(chat, client)

        try:
            body, ask = await service.read_request(n_bytes, read)
            self._answer = service.begin(ask, held)
        except BaseException:
            held.release()
            raise
        writer = writer_for(body, service)
        self._was_told = False
        self._telling = asyncio.create_task(self._tell(self._answer, writer, _id(frame)))

    async def _tell(self, answer: Answer, writer: Writer, mark: dict[str, str]) -> None:
        """Pass an answer on as it comes."""
        told, said = -1, list[str]()
        try:
            while True:
                n_ahead = answer.n_ahead
                if told != n_ahead and (told < 0 or not answer.has_turn):
                    await self._send({"type": "queued", **mark, "n_ahead": n_ahead})
                    told = n_ahead
                chunk = await answer.next(self._service.params.keep_alive_s)
                if chunk is None:
                    continue
                said.append(chunk.text)
                if chunk.text or chunk.logprobs:
                    logprobs = writer.logprobs_fields(chunk)
                    await self._send({"type": "token", **mark, "text": chunk.text, **logprobs})
                if chunk.finish_reason is not None:
                    ending = {"finish_reason": chunk.finish_reason, **usage_fields(chunk)}
                    action = action_fields("".join(said))
                    await self._send_end({"type": "done", **mark, **ending, **action})
                    return
        except ApiError as error:
            if (error.status, error.code) == (CLIENT_LEFT, _CANCELLED):
                await self._send_end({"type": "done", **mark, "finish_reason": "cancelled"})
            else:
                await self._send_end({"type": "error", **mark, **error.body()})
        finally:
            await answer.close()

    async def _send_end(self, frame: dict[str, Any]) -> None:
        self._was_told = True
        await self._send(frame)

    async def _send(self, frame: dict[str, Any]) -> None:
        async with asyncio.timeout(self._service.params.stall_s):
            await self._socket.send_text(json.dumps(frame, ensure_ascii=False))


def _read_json(text: str) -> dict[str, Any]:
    if not text:
        raise ApiError(400, "invalid_json", "frame: empty or binary, not JSON in a text frame")
    try:
        fields = from_json(text)
    except ValueError as error:
        raise ApiError(400, "invalid_json", f"frame: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "invalid_json", "frame: not a JSON object")
    return fields


def _parse(kind: type[_Shape], fields: dict[str, Any]) -> _Shape:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise as_bad_request(error) from None


def _id(frame: Frame) -> dict[str, str]:
    return {} if frame.id is None else {"id": frame.id}
