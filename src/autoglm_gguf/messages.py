"""The values that travel between callers, prompts and engines: messages in, chunks out.

Pure data. It does not know how a prompt is rendered or how an engine works.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
Source: TypeAlias = Literal["local", "cloud"]
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text inside a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image inside a message."""

    source: ImageSource
    """A path, a ``data:`` URL, the encoded file's bytes, or a Pillow image."""


Part: TypeAlias = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str | tuple[Part, ...]

    @property
    def text(self) -> str:
        """What it says, without its images."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


MessageLike: TypeAlias = Message | Mapping[str, Any]


def parse_messages(messages: Sequence[MessageLike]) -> tuple[Message, ...]:
    """Take `Message` values or OpenAI-style dicts (unknown fields ignored, null content empty).

    Raises:
        ValueError: An unknown role or part type, or content of another shape.
        TypeError: No list of messages.
    """
    if isinstance(messages, bytes | Mapping | Message) or not isinstance(messages, Iterable):
        raise TypeError(f"prompt: a {type(messages).__name__}, not text or a list of messages")
    return tuple(map(_parse_message, messages))


def _parse_message(raw: Any) -> Message:
    role: Any
    content: Any
    if isinstance(raw, Message):
        role, content = raw.role, raw.content
    elif isinstance(raw, Mapping):
        role, content = raw.get("role"), raw.get("content")
    else:
        raise ValueError(f"message: a {type(raw).__name__}, not a mapping")
    if role not in ROLES:
        raise ValueError(f"message role {role!r}: not one of {', '.join(ROLES)}")
    if content is None:
        return Message(role, "")
    if isinstance(content, str):
        return Message(role, content)
    if isinstance(content, Sequence):
        return Message(role, tuple(_parse_part(part) for part in content))
    raise ValueError(f"message content: a {type(content).__name__}, not text or a list of parts")


def _parse_part(raw: Any) -> Part:
    if isinstance(raw, TextPart | ImagePart):
        return raw
    if isinstance(raw, str):
        return TextPart(raw)
    if not isinstance(raw, Mapping):
        raise ValueError(f"message part: a {type(raw).__name__}, not a mapping")
    match raw.get("type"):
        case "text" if isinstance(raw.get("text"), str):
            return TextPart(raw["text"])
        case "image_url":
            url = raw.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if isinstance(url, str):
                return ImagePart(url)
        case "image" if raw.get("image") is not None:
            return ImagePart(raw["image"])
    raise ValueError(f"message part of type {raw.get('type')!r}: not a text or image part")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost in KV cells; an image counts one per image token."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    dropped_messages: int = 0
    """Oldest messages of the conversation that had no room in the prompt."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in llama.cpp's words."""

    image_ms: float = 0.0
    """Vision tower, milliseconds."""
    prompt_n: int = 0
    """KV cells evaluated for the prompt."""
    cache_n: int = 0
    """KV cells of the prompt that the KV cache held already."""
    prompt_ms: float = 0.0
    """Prefill without the vision tower, milliseconds."""
    predicted_n: int = 0
    """Tokens generated, the one that ended the turn included."""
    predicted_ms: float = 0.0
    """From the first token to the last, milliseconds."""
    ttft_ms: float = 0.0
    """From the request's turn to its first token, milliseconds; reading its images comes before."""
    draft_n: int = 0
    """Tokens guessed from the text so far, and evaluated ahead."""
    draft_n_accepted: int = 0
    """Of these, those that came."""

    @property
    def predicted_per_second(self) -> float:
        """Decode speed in tokens per second; 0 with fewer than two tokens."""
        steps = self.predicted_n - 1
        return 1000.0 * steps / self.predicted_ms if steps > 0 and self.predicted_ms > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable the model held a token, before penalties, temperature and constraints."""

    token: int
    bytes: bytes
    """What it shows: part of a character, perhaps; nothing for control tokens."""
    logprob: float | None
    """Natural logarithm of its probability; ``-inf`` is possible. None for a token appended because
    a constraint left no other: the model was not asked. (OpenAI's field wants a number there; under
    the constraint it is 0.0.)"""
    top: tuple[TokenLogprob, ...] = ()
    """The most probable in its place, best first, as many as were asked for; the token itself
    only if it is one of them."""


@dataclass(frozen=True, slots=True)
class Confidence:
    """How probable a model held the action it chose; 0..1, over the tokens of the action alone."""

    mean: float
    """Mean probability of its tokens."""
    lowest: float
    """Probability of the least probable one."""
    n_tokens: int
    """How many were chosen; those that a constraint left no choice about do not count."""


@dataclass(frozen=True, slots=True)
class Route:
    """Who gave an answer, and why; see `HybridClient`."""

    source: Source
    """The model on this device, or the cloud."""
    reason: str
    """In words, for a person."""
    model: str = ""
    """Name of the model that answered."""
    confidence: Confidence | None = None
    """Of the action that the device chose, where it was judged, whoever answered in the end."""
    cached: bool = False
    """A cloud answer to an earlier request of the same content: nothing was sent."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. Exactly one chunk of a stream, the last, has a ``finish_reason``."""

    text: str
    tokens: tuple[int, ...] = ()
    """Ids that were sampled since the chunk before."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """On the last chunk only."""
    timings: Timings | None = None
    """On the last chunk only."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of ``tokens`` if they were asked for, else none."""
    route: Route | None = None
    """On the last chunk of a `HybridClient`'s answer only."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: what the chunks of a stream add up to."""

    text: str
    finish_reason: FinishReason
    tokens: tuple[int, ...] = ()
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of ``tokens`` if they were asked for, else none."""
    route: Route | None = None
    """Who gave it; of a `HybridClient` only."""


def collect(chunks: Iterator[Chunk] | Sequence[Chunk]) -> Completion:
    """Add a stream's chunks up."""
    texts: list[str] = []
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    last = Chunk("")
    for chunk in chunks:
        texts.append(chunk.text)
        tokens.extend(chunk.tokens)
        logprobs.extend(chunk.logprobs)
        last = chunk
    return Completion(
        "".join(texts),
        last.finish_reason or "cancelled",
        tuple(tokens),
        last.usage or Usage(),
        last.timings or Timings(),
        tuple(logprobs),
        last.route,
    )


def user_message(text: str, image: ImageSource | None) -> Message:
    """What the user says, after the image if there is one."""
    if image is None:
        return Message("user", text)
    return Message("user", (ImagePart(image), TextPart(text)))
