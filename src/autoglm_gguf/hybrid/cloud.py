"""`CloudModel`: an OpenAI-compatible endpoint that streams chat completions. The one network seam.

Nothing is connected before a request, and one connection serves one answer. Every failure leaves as
`CloudError`, without the key. Redirects are not followed: what is sent goes to the address that was
configured. Proxies are taken from the environment, as HTTPX does.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Sequence
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, TypeVar

import httpx2

from autoglm_gguf.config import SamplingParams
from autoglm_gguf.errors import CloudError
from autoglm_gguf.hybrid.wire import AnswerReader, build_body, error_text
from autoglm_gguf.messages import Chunk, FinishReason, Message, Timings
from autoglm_gguf.stopping import StopFlag, Stopped

_T = TypeVar("_T")
_POLL_S = 0.05  # how often a waiting request looks whether it was cancelled
_CLOSE_S = 1.0  # how long a closed stream waits for its connection to be closed
_MAX_ERROR_BYTES = 1 << 16
_HINTS = {
    401: "check the API key",
    403: "check the API key, and what it may use",
    404: "check the model's name and the base URL, which usually ends in /v1",
    429: "try again later",
}


class CloudModel:
    """A model behind ``BASE_URL/chat/completions``: OpenAI's API, vLLM, SGLang, llama-server, ours.

    Args:
        base_url: ``http`` or ``https``, usually ending in ``/v1``. Without credentials or query:
            they would reach logs.
        model: The model's name there.
        api_key: Sent as a bearer token. None sends none.
        api_key_env: The environment variable that holds it, read here.
        connect_s: To connect within, seconds.
        first_byte_s: From the request to the first piece of the answer, seconds.
        total_s: For the whole answer, seconds.

    Raises:
        ValueError: An argument that cannot be used; no message holds the key.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        api_key_env: str | None = None,
        connect_s: float = 5.0,
        first_byte_s: float = 30.0,
        total_s: float = 120.0,
    ) -> None:
        base = _parse_base_url(base_url)
        self._url = base.copy_with(path=base.path.rstrip("/") + "/chat/completions")
        self.name = f"{base.scheme}://{base.netloc.decode('ascii')}"
        """Scheme, host and port: what errors and reasons call it."""
        if not model:
            raise ValueError("cloud: no model's name")
        self.model = model
        self._key = _read_key(api_key, api_key_env)
        for what, seconds in (
            ("connect_s", connect_s),
            ("first_byte_s", first_byte_s),
            ("total_s", total_s),
        ):
            if not 0 < seconds < float("inf"):
                raise ValueError(f"cloud, {what} {seconds}: not a number of seconds over 0")
        self._connect_s, self._first_byte_s, self._total_s = connect_s, first_byte_s, total_s

    def __repr__(self) -> str:
        key = "given" if self._key else "none"
        return f"<CloudModel {self.name} model={self.model!r} api_key={key}>"

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx2.create_ssl_context()  # 50 ms, of which a request would otherwise spend each

    @property
    def is_encrypted(self) -> bool:
        """Whether what is sent is encrypted on its way."""
        return self._url.scheme == "https"

    def build_body(self, messages: Sequence[Message], params: SamplingParams) -> bytes:
        """A request's bytes; see `autoglm_gguf.hybrid.wire.build_body`."""
        return build_body(self.model, messages, params)

    def stream(self, body: bytes, stop: StopFlag | None = None) -> Generator[Chunk, None, None]:
        """Ask, and answer piece by piece; closing the generator ends the request.

        Args:
            body: Of `build_body`.
            stop: Set from any thread, it ends the answer; its last chunk says ``cancelled``.

        Returns:
            Chunks without token ids; the last has finish_reason, usage as the cloud counts it, and
            timings as seen from here.

        Raises:
            CloudError: No answer, or none that is whole; pieces may have come before.
        """
        return _drain(self, body, stop or StopFlag())

    async def astream(
        self, body: bytes, stop: StopFlag | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Like `stream`, for an event loop."""
        timeout, tls = httpx2.Timeout(None, connect=self._connect_s), self._tls
        answer = _Answer(AnswerReader(self.name, self._key), stop or StopFlag())
        first, last = answer.began + self._first_byte_s, answer.began + self._total_s
        try:
            async with httpx2.AsyncClient(
                timeout=timeout, verify=tls, follow_redirects=False
            ) as client:
                request = client.build_request(
                    "POST", self._url, content=body, headers=self._headers()
                )
                response = await answer.within(client.send(request, stream=True), min(first, last))
                async with aclosing(response):
                    if response.status_code != 200:
                        raise await self._refusal(answer, response, min(first, last))
                    events = aiter(httpx2.EventSource(response))
                    while (text := await answer.next_text(events, first, last)) is not None:
                        if text:
                            yield Chunk(text)
            yield answer.end(answer.reader.finish_reason)
        except Stopped:
            yield answer.end("cancelled")
        except TimeoutError:
            waited = (
                f"nothing came within {self._first_byte_s:g} s"
                if not answer.begun and first <= last
                else f"its answer took over {self._total_s:g} s"
            )
            raise CloudError(f"{self.name}: {waited}") from None
        except httpx2.ConnectTimeout:
            raise CloudError(f"{self.name}: not connected within {self._connect_s:g} s") from None
        except httpx2.SSEError as error:
            raise CloudError(f"{self.name}: its answer is no event stream ({error})") from None
        except httpx2.HTTPError as error:
            told = error_text(str(error) or type(error).__name__, self._key)
            what = "its answer broke off" if answer.begun else "cannot be reached"
            raise CloudError(f"{self.name}: {what} ({told})") from None

    def _headers(self) -> dict[str, str]:
        headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": "autoglm-gguf",
        }
        return headers | ({"Authorization": f"Bearer {self._key}"} if self._key else {})

    async def _refusal(
        self, answer: _Answer, response: httpx2.Response, deadline: float
    ) -> CloudError:
        status, told = response.status_code, b""
        blocks = aiter(response.aiter_bytes())
        try:
            while len(told) < _MAX_ERROR_BYTES and (
                block := await answer.within(_next(blocks), deadline)
            ):
                told += block
        except (TimeoutError, httpx2.HTTPError):
            pass
        try:
            said = error_text(json.loads(told), self._key)
        except ValueError:  # a proxy's page, or nothing
            said = ""
        return CloudError(
            f"{self.name}: refuses (HTTP {status}{f', {said}' if said else ''})",
            status=status,
            retry_after_s=_parse_retry_after(response.headers.get("Retry-After")),
            hint=_HINTS.get(status, ""),
        )


class _Answer:
    """One answer on its way: its clock, and waiting that can be ended."""

    def __init__(self, reader: AnswerReader, stop: StopFlag) -> None:
        self.reader, self._stop = reader, stop
        self.began = self._last = time.monotonic()
        self._first: float | None = None

    @property
    def begun(self) -> bool:
        """Whether a piece of it has come."""
        return self._first is not None

    async def within(self, work: Coroutine[Any, Any, _T], deadline: float) -> _T:
        """Await something.

        Raises:
            TimeoutError: It was not done by then.
            Stopped: It was cancelled.
        """
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                left = deadline - time.monotonic()
                if self._stop.is_set():
                    raise Stopped
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait({task}, timeout=min(left, _POLL_S))
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def next_text(
        self, events: AsyncIterator[httpx2.ServerSentEvent], first: float, last: float
    ) -> str | None:
        """The text of the next event; None after the last one. Raises as `within`."""
        if self.reader.done:
            return None
        try:
            event = await self.within(_next(events), last if self.begun else min(first, last))
        except (httpx2.HTTPError, TimeoutError):
            if self.reader.finished:  # the answer is whole, and only its usage is missing
                return None
            raise
        if event is None:
            return None
        self._last = time.monotonic()
        self._first = self._first or self._last
        return self.reader.push(event.data)

    def end(self, reason: FinishReason) -> Chunk:
        """The last chunk."""
        usage, cached = self.reader.usage, self.reader.cached_tokens
        first = self._first or self._last
        timings = Timings(
            prompt_n=max(0, usage.prompt_tokens - cached),
            cache_n=cached,
            predicted_n=usage.completion_tokens,
            predicted_ms=1000 * (self._last - first),
            ttft_ms=1000 * (first - self.began),
        )
        return Chunk("", finish_reason=reason, usage=usage, timings=timings)


async def _next(events: AsyncIterator[_T]) -> _T | None:
    return await anext(events, None)


def _drain(cloud: CloudModel, body: bytes, stop: StopFlag) -> Generator[Chunk, None, None]:
    """Read an answer in a thread of its own: this one may have an event loop already."""
    ready: queue.SimpleQueue[Chunk | BaseException | None] = queue.SimpleQueue()

    async def read() -> None:
        last: BaseException | None = None
        try:
            async with aclosing(cloud.astream(body, stop)) as chunks:
                async for chunk in chunks:
                    ready.put(chunk)
        except BaseException as error:
            last = error
        # From in here: on its way out the loop waits for name look-ups, which nothing can end.
        ready.put(last)

    thread = threading.Thread(target=lambda: asyncio.run(read()), name="cloud", daemon=True)
    thread.start()
    try:
        while isinstance(item := ready.get(), Chunk):
            yield item
        if item is not None:
            raise item
    finally:
        stop.set()
        thread.join(_CLOSE_S)


def _parse_base_url(text: str) -> httpx2.URL:
    hint = "write for example https://api.example.com/v1"
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, TypeError):
        raise ValueError(f"cloud, base URL: not a URL ({hint})") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"cloud, base URL: not an http or https address ({hint})")
    if url.userinfo or url.query or url.fragment:
        raise ValueError(
            "cloud, base URL: has credentials, a query or a fragment (the key goes to api_key_env)"
        )
    return url


def _read_key(key: str | None, name: str | None) -> str:
    if key is not None and name is not None:
        raise ValueError("cloud: api_key and api_key_env are both given")
    if name is not None:
        key = os.environ.get(name)
        if not key:
            raise ValueError(f"cloud, API key: the environment variable {name} is not set")
    key = (key or "").strip()  # files end in line breaks, and so do variables read from them
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("cloud, API key: has characters that no key has")
    return key


def _parse_retry_after(text: str | None) -> float | None:
    """Seconds, of a Retry-After in seconds or as a date; None where it is neither."""
    if text is None:
        return None
    try:
        return max(0.0, float(text)) if text.strip().isdigit() else _seconds_until(text)
    except (ValueError, TypeError):
        return None


def _seconds_until(date: str) -> float:
    return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())
