"""Request bodies become questions to a model: `Ask`. Limits and defaults are applied here.

Knows OpenAI's bodies and the server's parameters; knows no connection.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

from pydantic import ValidationError

from autoglm_gguf.actions import speaks_actions
from autoglm_gguf.config import CONSTRAIN_ACTION, MAX_SEED, SamplingParams
from autoglm_gguf.messages import ImagePart, Message, Part, TextPart
from autoglm_gguf.sampling import act_options
from autoglm_gguf.server.answers import Ask
from autoglm_gguf.server.errors import ApiError, as_bad_request, unsupported
from autoglm_gguf.server.images import read_image
from autoglm_gguf.server.json_schema import check_schema
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ImageBlock,
    ResponseFormat,
    Sampling,
    Shape,
    TextBlock,
)

COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions."""
CHARS_PER_CELL = 16
"""A text of more characters per KV cell than this is refused before it is cut into tokens."""
_SAME = (
    *("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty"),
    *("cache_prompt", "n_draft", "stop"),
)
_ROLES = {"developer": "system"}
_Body = TypeVar("_Body", bound=Shape)


def parse_body(kind: type[_Body], raw: bytes | bytearray | str) -> _Body:
    """A body from its JSON.

    Raises:
        ApiError: Not JSON, or not of this shape; 400.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise as_bad_request(error) from None


class Asking:
    """Makes questions for one model.

    Args:
        params: Limits and defaults.
        n_ctx: KV cells of the model's context.
    """

    def __init__(self, params: ServerParams, n_ctx: int) -> None:
        self._params = params
        self._max_chars = CHARS_PER_CELL * n_ctx

    def chat(self, body: ChatRequest, client: Hashable) -> Ask:
        """The question of a chat completion.

        Raises:
            ApiError: A field that cannot be honoured, or a limit; 400.
        """
        _refuse_chat_extras(body)
        messages = self._messages(body.messages)
        sampling = self._sampling(body)
        most = body.max_completion_tokens or body.max_tokens
        sampling |= self._length(most) | self._held(body, messages)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(
                400, "invalid_value", "top_logprobs: needs logprobs", param="top_logprobs"
            )
        if body.logprobs:
            sampling |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
        if body.max_thinking_tokens is not None:
            sampling["max_thinking_tokens"] = body.max_thinking_tokens
        return _checked(Ask(messages, False, sampling, (client, body.user)))

    def completion(self, body: CompletionRequest, client: Hashable) -> Ask:
        """The question of a plain completion.

        Raises:
            ApiError: See `chat`.
        """
        prompt = body.prompt[0]
        self._check_length(len(prompt), "prompt")
        sampling = self._sampling(body) | self._length(body.max_tokens or COMPLETION_TOKENS)
        if body.logprobs is not None:
            sampling |= {"logprobs": True, "top_logprobs": body.logprobs}
        return _checked(Ask(prompt, True, sampling, (client, body.user)))

    def _messages(self, given: list[ChatMessage]) -> tuple[Message, ...]:
        params = self._params
        if len(given) > params.max_messages:
            raise _too_many("messages", len(given), params.max_messages)
        n_images = sum(isinstance(b, ImageBlock) for m in given for b in m.content or ())
        if n_images > params.max_images:
            raise _too_many("messages", n_images, params.max_images, "images")
        self._check_length(sum(_n_chars(message) for message in given), "messages")
        return tuple(self._message(message, f"messages.{n}") for n, message in enumerate(given))

    def _message(self, given: ChatMessage, param: str) -> Message:
        parts: list[Part] = []
        for n, block in enumerate(given.content or ()):
            if isinstance(block, ImageBlock):
                where = f"{param}.content.{n}.image_url"
                parts.append(ImagePart(read_image(block.image_url.url, self._params, where)))
            else:
                parts.append(
                    TextPart(block.text if isinstance(block, TextBlock) else block.refusal)
                )
        role: Any = _ROLES.get(given.role, given.role)
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        if len(parts) == len(texts) <= 1:
            return Message(role, "".join(texts))
        return Message(role, tuple(parts))

    def _sampling(self, body: Sampling) -> dict[str, Any]:
        """What both kinds take; what is not given is left to the library."""
        if body.logit_bias:
            raise unsupported("logit_bias", "not supported")
        given = {name: getattr(body, name) for name in _SAME}
        given["top_k"] = None if body.top_k is None else max(0, body.top_k)
        given["seed"] = None if body.seed is None else body.seed % (MAX_SEED + 1)
        given["repeat_penalty"] = body.repetition_penalty or body.repeat_penalty
        return {name: value for name, value in given.items() if value is not None}

    def _length(self, wanted: int | None) -> dict[str, int]:
        found = [n for n in (wanted, self._params.max_tokens) if n is not None]
        return {"max_tokens": min(found)} if found else {}

    def _held(self, body: ChatRequest, messages: tuple[Message, ...]) -> dict[str, Any]:
        """What holds the answer: a schema, the action language, or nothing."""
        schema = _schema(body.response_format)
        action = body.constrain == CONSTRAIN_ACTION
        if action and schema is not None:
            raise ApiError(
                400, "invalid_value", "constrain: not beside response_format", param="constrain"
            )
        if body.constrain is None and schema is None:
            mode = self._params.constrain_actions
            action = mode == "on" or (mode == "auto" and speaks_actions(messages))
        if body.apps and not action:
            raise ApiError(400, "invalid_value", "apps: needs constrain=action", param="apps")
        if not action:
            return {} if schema is None else {"constrain": schema}
        options = act_options({"stop": body.stop or ()})
        return {**options, "apps": body.apps} if body.apps else options

    def _check_length(self, n_chars: int, param: str) -> None:
        if n_chars > self._max_chars:
            raise ApiError(
                400,
                "context_length_exceeded",
                f"{param}: longer than the context can be ({n_chars} characters, "
                f"{self._max_chars} at most)",
                param=param,
            )


def _refuse_chat_extras(body: ChatRequest) -> None:
    for name in ("tools", "functions"):
        if getattr(body, name):
            raise unsupported(
                name,
                "this model calls no functions",
                "it answers with actions in text; response_format gives JSON",
            )
    if any(modality != "text" for modality in body.modalities or ()):
        raise unsupported("modalities", "text is the only one")


def _schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None:
        param = "response_format.json_schema"
        raise ApiError(400, "missing_required_parameter", f"{param}: missing", param=param)
    return check_schema(form.json_schema.schema_, "response_format.json_schema.schema")


def _n_chars(message: ChatMessage) -> int:
    blocks = message.content or ()
    return sum(
        len(b.text) if isinstance(b, TextBlock) else len(b.refusal)
        for b in blocks
        if not isinstance(b, ImageBlock)
    )


def _checked(ask: Ask) -> Ask:
    """Ranges that the library has and the shapes have not."""
    try:
        SamplingParams.of(**ask.sampling)
    except (ValueError, TypeError) as error:
        raise ApiError(400, "invalid_value", str(error)) from error
    return ask


def _too_many(param: str, found: int, most: int, what: str = "messages") -> ApiError:
    return ApiError(
        400, "invalid_value", f"{param}: too many {what} ({found}, {most} at most)", param=param
    )
