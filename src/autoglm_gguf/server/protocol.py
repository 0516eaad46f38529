"""What clients send: OpenAI's request bodies, and the fields that vLLM and llama.cpp add to them.

Fields that are not listed are ignored, and null is the same as leaving a field out. What is listed
must be of its type and in its range. `autoglm_gguf.server.asking` turns bodies into questions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from autoglm_gguf.config import MAX_DRAFT, MAX_TOP_LOGPROBS


class Shape(BaseModel):
    """Strict about types, deaf to what it does not know."""

    model_config = ConfigDict(
        extra="ignore",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class TextBlock(Shape):
    """Text in a message."""

    type: Literal["text"]
    text: str


class Refusal(Shape):
    """What an assistant would not say, in a history from elsewhere."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(Shape):
    """Where an image is: a ``data:`` URL; http and https only if the server allows it."""

    url: str


def _as_image_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImageBlock(Shape):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageUrl, BeforeValidator(_as_image_url, json_schema_input_type=ImageUrl | str)
    ]


Block: TypeAlias = Annotated[TextBlock | ImageBlock | Refusal, Field(discriminator="type")]


def _as_block(value: Any) -> Any:
    return {"type": "text", "text": value} if isinstance(value, str) else value


def _as_blocks(value: Any) -> Any:
    return [_as_block(value)] if isinstance(value, str) else value


class ChatMessage(Shape):
    """One turn. Content may be text, a list of parts, or null, for every role."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[Annotated[Block, BeforeValidator(_as_block, json_schema_input_type=Block | str)]]
        | None,
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block | str] | None),
    ] = None


def _as_strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise ValueError("token ids are not taken; send the text")
    return _as_strings(value)


def _as_bool(value: Any) -> Any:
    if value == 0 and not isinstance(value, bool):  # which equals False to Python, and is not it
        raise ValueError("not a boolean")
    return value


_One = Annotated[int, Field(ge=1, le=1)]
_Word = Annotated[str, Field(min_length=1, max_length=1000)]
_Stops = Annotated[list[_Word], Field(max_length=16)]
_Prompt = Annotated[str, Field(min_length=1)]
_Prompts = Annotated[list[_Prompt], Field(min_length=1, max_length=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Shape):
    """How a stream ends."""

    include_usage: bool | None = None


class Sampling(Shape):
    """What both kinds of completion take."""

    model: str | None = None
    """Any name; the answer says which model it is."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """More than there is room for is cut to the room."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0, the default here, takes the most probable token."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1 switch it off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: _Penalty | None = None
    """Penalties count generated tokens only, the whole answer."""
    presence_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """llama.cpp's name of the same."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[
        _Stops | None,
        BeforeValidator(_as_strings, json_schema_input_type=_Word | _Stops | None),
    ] = None
    n: _One | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Tells clients at one address apart, so that each has its turn."""
    logit_bias: dict[str, float] | None = None
    """Not supported: only an empty one is taken."""
    cache_prompt: bool | None = None
    """False evaluates the whole prompt, also what the KV cache holds of it."""
    n_draft: Annotated[int, Field(ge=0, le=MAX_DRAFT)] | None = None
    """Tokens to guess and evaluate at once where the text repeats itself; 0: none."""


class JsonSchema(Shape):
    """A schema that the answer follows."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Shape):
    """Free text, any JSON object, or what a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of max_tokens, and taken before it."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Needs logprobs."""
    response_format: ResponseFormat | None = None
    constrain: Literal["action", "none"] | None = None
    """Whether the answer is held to the action language; by default the server decides."""
    apps: Annotated[list[_Word], Field(max_length=1000)] | None = None
    """With an answer held to an action: the only names that Launch may open."""
    max_thinking_tokens: Annotated[int, Field(ge=1)] | None = None
    """Then the thinking is closed and the answer begun."""
    tools: list[Any] | None = None
    """Not supported: only an empty list is taken."""
    functions: list[Any] | None = None
    """Likewise."""
    modalities: list[str] | None = None
    """Text is the only one."""


class CompletionRequest(Sampling):
    """The body of ``POST /v1/completions``."""

    prompt: Annotated[
        _Prompts, BeforeValidator(_as_prompts, json_schema_input_type=_Prompt | _Prompts)
    ]
    """Completed as it is, without the chat template."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """So many of the most probable tokens beside each."""
    echo: Annotated[Literal[False] | None, BeforeValidator(_as_bool)] = None
    suffix: Literal[""] | None = None
    best_of: _One | None = None
