"""OpenAI's chat completions as bytes: what is sent to a cloud, and how its events are read.

Pure: knows no network. Images are sent as their bare pixels (PNG). Not sent: ``apps``,
``cache_prompt``, ``logprobs`` and ``max_thinking_tokens``, which that protocol has no field for, or
nothing to compare with: token ids are a model's own. Reasoning that a cloud sends beside its
content is left out. Fields beyond OpenAI's (top_k, min_p, repetition_penalty, as vLLM and SGLang
name them) are sent only where they are set.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from autoglm_gguf.config import SamplingParams
from autoglm_gguf.errors import CloudError
from autoglm_gguf.messages import FinishReason, ImagePart, Message, TextPart, Usage
from autoglm_gguf.vision import encode_png

MAX_ANSWER_CHARS = 1 << 20
_DONE = "[DONE]"
_MOST_TOLD = 200  # characters of a cloud's own error message
_WITHHELD = "content_filter"


def build_body(model: str, messages: Sequence[Message], params: SamplingParams) -> bytes:
    """A request as JSON: equal requests have equal bytes.

    Raises:
        ImageError: An image that cannot be read.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": m.role, "content": _content(m.content)} for m in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": params.temperature,
    }
    given = {
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "stop": list(params.stop) or None,
        "top_p": params.top_p if params.top_p != 1 else None,
        "frequency_penalty": params.frequency_penalty or None,
        "presence_penalty": params.presence_penalty or None,
        "top_k": params.top_k or None,
        "min_p": params.min_p or None,
        "repetition_penalty": params.repeat_penalty if params.repeat_penalty != 1 else None,
    }
    body |= {name: value for name, value in given.items() if value is not None}
    if isinstance(params.constrain, Mapping):
        schema = {"name": "answer", "schema": dict(params.constrain), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8",
        "replace",  # a lone surrogate, which no server would read
    )


def _content(content: str | tuple[TextPart | ImagePart, ...]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image_url", "image_url": {"url": _data_url(part)}}
        for part in content
    ]


def _data_url(part: ImagePart) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(part.source)).decode()


def error_text(value: Any, secret: str = "") -> str:
    """What an error object of OpenAI's shape, or anything in its place, says: one short line."""
    for name in ("error", "message", "detail"):
        if isinstance(value, Mapping) and value.get(name):
            value = value[name]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else " " for c in text)
    if secret:
        text = text.replace(secret, "***")
    return " ".join(text.split())[:_MOST_TOLD]


class _Delta(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    index: int = 0
    delta: _Delta = Field(default_factory=_Delta)
    finish_reason: str | None = None


class _Details(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(BaseModel):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class AnswerReader:
    """Reads one answer's events.

    Args:
        name: The cloud's, for errors.
        secret: What no error may quote.
    """

    def __init__(self, name: str, secret: str = "") -> None:
        self._name, self._secret = name, secret
        self._n_chars = 0
        self._finish: str | None = None
        self.done = False
        """No event is to follow."""
        self.usage = Usage()
        self.cached_tokens = 0
        """Of the prompt, as the cloud says."""

    @property
    def finished(self) -> bool:
        """The answer is whole; its usage may still follow."""
        return self.done or self._finish is not None

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended.

        Raises:
            CloudError: It ended in the middle, or was withheld.
        """
        if not self.finished:
            raise CloudError(f"{self._name}: its answer ended in the middle")
        if self._finish == _WITHHELD:
            raise CloudError(f"{self._name}: withholds its answer ({_WITHHELD})")
        return "length" if self._finish == "length" else "stop"

    def push(self, data: str) -> str:
        """Read an event.

        Returns:
            The text it adds.

        Raises:
            CloudError: An error, or no event of a chat completion, or too much text.
        """
        if data.strip() == _DONE:
            self.done = True
            return ""
        try:
            event = _Event.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise CloudError(
                f"{self._name}: its answer is no chat completion ({first['msg'][:80]})"
            ) from None  # the cause would quote the answer
        if event.error is not None:
            told = error_text(event.error, self._secret)
            raise CloudError(f"{self._name}: an error within its answer ({told})")
        if event.choices is None and event.usage is None:
            raise CloudError(f"{self._name}: its answer is no chat completion (no choices)")
        if event.usage is not None:
            details = event.usage.prompt_tokens_details
            self.cached_tokens = (details.cached_tokens or 0) if details else 0
            self.usage = Usage(event.usage.prompt_tokens, event.usage.completion_tokens)
        text = ""
        for choice in event.choices or ():
            if choice.index == 0:
                text += choice.delta.content or ""
                self._finish = choice.finish_reason or self._finish
        self._n_chars += len(text)
        if self._n_chars > MAX_ANSWER_CHARS:
            raise CloudError(f"{self._name}: its answer is over {MAX_ANSWER_CHARS} characters")
        return text
