"""What clients receive: OpenAI's objects, made from chunks.

Beside OpenAI's fields stand ours, which its clients ignore: ``timings`` (llama.cpp's words), image
tokens and dropped messages in ``usage``, and ``route`` where a cloud takes part.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from autoglm_gguf import __version__
from autoglm_gguf.actions import parse_answer
from autoglm_gguf.errors import ActionParseError
from autoglm_gguf.messages import Chunk, Completion, TokenLogprob
from autoglm_gguf.messages import Route as ChunkRoute
from autoglm_gguf.messages import Timings as ChunkTimings
from autoglm_gguf.messages import Usage as ChunkUsage

FINGERPRINT = f"autoglm-gguf-{__version__}"
_MOST_CHARS = 8192  # longer texts are no agent's answers; reading them could take long
_IMPOSSIBLE = -9999.0  # OpenAI's number for what cannot come; JSON has no infinity


class Reply(BaseModel):
    """Written without the fields that were not set; None is written as null."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    def json_bytes(self) -> bytes:
        """As JSON."""
        return self.model_dump_json(exclude_unset=True).encode()


class PromptTokensDetails(Reply):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Held by the KV cache already."""
    image_tokens: int = 0


class Usage(Reply):
    """In KV cells: one per token of text, one per image token."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    dropped_messages: int = 0
    """Oldest messages that had no room in the prompt."""


class Timings(Reply):
    """Where the time went."""

    image_ms: float
    prompt_n: int
    cache_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    ttft_ms: float
    draft_n: int
    draft_n_accepted: int
    predicted_per_second: float


class Logprob(Reply):
    """How probable a token was, as a natural logarithm."""

    token: str
    logprob: float
    bytes: list[int]


class RatedToken(Logprob):
    """A token of the answer, and the most probable ones in its place."""

    top_logprobs: list[Logprob]


class Confidence(Reply):
    """How sure the device was of its action: probabilities of its tokens, 0 to 1."""

    mean: float
    lowest: float
    n_tokens: int
    """How many there was a choice of."""


class Route(Reply):
    """Who gave an answer, and why; only where a cloud is configured."""

    source: Literal["local", "cloud"]
    reason: str
    model: str
    confidence: Confidence | None
    """Of the device's own action, where it was judged."""
    cached: bool
    """The cloud's answer to an earlier request of the same content."""


class ChatLogprobs(Reply):
    """One entry for each token of the answer."""

    content: list[RatedToken]
    refusal: None = None


class AssistantMessage(Reply):
    """The answer; thinking is part of it."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """The only one."""

    index: Literal[0]
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Reply):
    """The answer to a chat, as a whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    route: Route | None = None


class Delta(Reply):
    """A piece of the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    """The only one."""

    index: Literal[0]
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionChunk(Reply):
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None
    route: Route | None = None


class TextLogprobs(Reply):
    """Parallel lists, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(Reply):
    """The only one."""

    index: Literal[0]
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(Reply):
    """A completion, as a whole or a piece of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None
    timings: Timings | None = None
    route: Route | None = None


@dataclass(slots=True)
class Writer:
    """Writes one answer in OpenAI's shapes.

    Args:
        model: Name of the model that answers.
        stop_ids: Tokens that end a turn; they are not told among the logprobs.
        logprobs: Whether they were asked for.
        top_logprobs: Of a plain completion, whether others were asked for.
        include_usage: Whether a stream tells its usage.
        is_chat: The answer to a chat; else a plain completion.
    """

    model: str
    stop_ids: frozenset[int]
    logprobs: bool = False
    top_logprobs: bool = False
    include_usage: bool = False
    is_chat: bool = True
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _n_chars: int = 0  # of the tokens told so far

    def whole(self, answer: Completion) -> bytes:
        """The answer in one piece."""
        ending = _ending(answer.usage, answer.timings, answer.route)
        reason = _reason(answer.finish_reason)
        if self.is_chat:
            message = AssistantMessage(role="assistant", content=answer.text, refusal=None)
            chat = ChatChoice(
                index=0,
                message=message,
                logprobs=self._chat_logprobs(answer.logprobs),
                finish_reason=reason,
            )
            head = self._head("chat.completion")
            return ChatCompletion(**head, choices=[chat], **ending).json_bytes()
        text = TextChoice(
            index=0,
            text=answer.text,
            logprobs=self._text_logprobs(answer.logprobs),
            finish_reason=reason,
        )
        return TextCompletion(
            **self._head("text_completion"), choices=[text], **ending
        ).json_bytes()

    def first(self) -> bytes | None:
        """What a stream begins with, before anything is known."""
        if not self.is_chat:
            return None
        return self._chunk([_choice(Delta(role="assistant", content=""), None, None)])

    def piece(self, chunk: Chunk) -> bytes:
        """What has come of the answer; with the last piece, how it ended."""
        reason = None if chunk.finish_reason is None else _reason(chunk.finish_reason)
        ending: dict[str, Any] = {}
        if chunk.usage is not None and chunk.timings is not None:
            ending = _ending(chunk.usage, chunk.timings, chunk.route)
            del ending["usage"]
        if self.is_chat:
            delta = Delta(content=chunk.text)
            return self._chunk(
                [_choice(delta, self._chat_logprobs(chunk.logprobs), reason)], **ending
            )
        choice = TextChoice(
            index=0,
            text=chunk.text,
            logprobs=self._text_logprobs(chunk.logprobs),
            finish_reason=reason,
        )
        return self._chunk([choice], **ending)

    def last(self, chunk: Chunk) -> bytes | None:
        """What a stream ends with, if its usage was asked for."""
        if not self.include_usage or chunk.usage is None or chunk.timings is None:
            return None
        return self._chunk([], usage=_usage(chunk.usage, chunk.timings))

    def logprobs_fields(self, chunk: Chunk) -> dict[str, Any]:
        """A piece's logprobs as plain values; nothing if they were not asked for."""
        told = self._chat_logprobs(chunk.logprobs)
        return {} if told is None else {"logprobs": told.model_dump(exclude_unset=True)}

    def _chunk(self, choices: Sequence[Any], **ending: Any) -> bytes:
        if self.include_usage:
            ending = {"usage": None, **ending}
        if self.is_chat:
            head = self._head("chat.completion.chunk")
            return ChatCompletionChunk(**head, choices=list(choices), **ending).json_bytes()
        head = self._head("text_completion")
        return TextCompletion(**head, choices=list(choices), **ending).json_bytes()

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _chat_logprobs(self, entries: Iterable[TokenLogprob]) -> ChatLogprobs | None:
        if not self.logprobs:
            return None
        content = [
            RatedToken(**_logprob(entry), top_logprobs=[Logprob(**_logprob(t)) for t in entry.top])
            for entry in entries
            if entry.token not in self.stop_ids
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _text_logprobs(self, entries: Iterable[TokenLogprob]) -> TextLogprobs | None:
        if not self.logprobs:
            return None
        told = [entry for entry in entries if entry.token not in self.stop_ids]
        tokens, offsets = [_text(entry.bytes) for entry in told], list[int]()
        for token in tokens:
            offsets.append(self._n_chars)
            self._n_chars += len(token)
        tops = [{_text(t.bytes): _number(t.logprob) for t in entry.top} for entry in told]
        return TextLogprobs(
            tokens=tokens,
            token_logprobs=[_number(entry.logprob) for entry in told],
            top_logprobs=tops if self.top_logprobs else None,
            text_offset=offsets,
        )


def _choice(
    delta: Delta, logprobs: ChatLogprobs | None, reason: Literal["stop", "length"] | None
) -> ChunkChoice:
    return ChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=reason)


def _ending(usage: ChunkUsage, timings: ChunkTimings, route: ChunkRoute | None) -> dict[str, Any]:
    found: dict[str, Any] = {"usage": _usage(usage, timings), "timings": _timings(timings)}
    return found if route is None else {**found, "route": Route(**asdict(route))}


def _usage(usage: ChunkUsage, timings: ChunkTimings) -> Usage:
    details = PromptTokensDetails(cached_tokens=timings.cache_n, image_tokens=usage.image_tokens)
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=details,
        dropped_messages=usage.dropped_messages,
    )


def _timings(timings: ChunkTimings) -> Timings:
    return Timings(**asdict(timings), predicted_per_second=timings.predicted_per_second)


def usage_fields(chunk: Chunk) -> dict[str, Any]:
    """Usage and timings of a last chunk, as plain values."""
    if chunk.usage is None or chunk.timings is None:
        return {}
    ending = _ending(chunk.usage, chunk.timings, chunk.route)
    return {k: v.model_dump() if isinstance(v, Reply) else v for k, v in ending.items()}


def action_fields(text: str) -> dict[str, Any]:
    """The action that a whole answer holds, as plain values; nothing where it holds none."""
    if len(text) > _MOST_CHARS:
        return {}
    try:
        thinking, action = parse_answer(text)
    except ActionParseError:
        return {}
    told = {"name": action.name, "arguments": action.arguments, "text": action.render()}
    return {"action": {**told, "thinking": thinking}}


def _reason(reason: str) -> Literal["stop", "length"]:
    return "length" if reason == "length" else "stop"


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    shown = entry.bytes.decode("utf-8", "replace")
    return {"token": shown, "logprob": _number(entry.logprob), "bytes": list(entry.bytes)}


def _number(logprob: float | None) -> float:
    """A number for JSON; 0 where a constraint left no other token."""
    if logprob is None:
        return 0.0
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE


def _text(data: bytes) -> str:
    """A token as /v1/completions writes it: part of a character as ``bytes:\\xe5``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
