"""Messages to a prompt: text segments and image slots, by the model's own chat template.

Jinja as transformers renders it (sandboxed, trim_blocks, lstrip_blocks). A literal ``<|image|>`` in
someone's text is never taken for a slot. Knows no tokens and no engine.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from autoglm_gguf.config import ContentFormat
from autoglm_gguf.errors import PromptError
from autoglm_gguf.gguf.names import IMAGE_TOKEN
from autoglm_gguf.messages import ImagePart, ImageSource, Message, TextPart

if TYPE_CHECKING:
    import jinja2

_IMAGE_TEXT = "<|begin_of_image|><|image|><|end_of_image|>"
# Stands for a literal <|image|> while the template runs; a private-use character keeps it unique.
_LITERAL = "\ue000literal-image\ue000"
_MAX_TEMPLATE_CHARS = 200_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt: ``segments[0] image segments[1] image … segments[n]``."""

    segments: tuple[str, ...]
    images: tuple[ImageSource, ...] = ()

    @property
    def text(self) -> str:
        """The whole text, one ``<|image|>`` per image, as transformers renders it."""
        return IMAGE_TOKEN.join(self.segments)


def render_prompt(
    messages: Sequence[Message],
    template: str,
    *,
    content_format: ContentFormat = "openai",
    add_generation_prompt: bool = True,
) -> Prompt:
    """Render a conversation.

    Args:
        messages: At least one.
        template: The model's Jinja chat template.
        content_format: ``openai`` gives the template a list of parts, as transformers does;
            ``string`` joins image and text with a line break first, as the official server does.
        add_generation_prompt: Ends with the assistant's header.

    Raises:
        PromptError: No messages, a template error, or an image that the template leaves out.
    """
    if not messages:
        raise PromptError("messages: none given", hint="give at least one user message")
    images = tuple(
        part.source
        for message in messages
        if not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, ImagePart)
    )
    raw = [_to_template(message, content_format) for message in messages]
    try:
        text = _compile(template).render(
            messages=raw, add_generation_prompt=add_generation_prompt, tools=None, documents=None
        )
    except PromptError:
        raise
    except Exception as error:  # a template may raise anything
        raise PromptError(
            f"chat template: cannot render these messages ({type(error).__name__}: {error})",
            hint="check the roles and their order",
        ) from error
    segments = tuple(part.replace(_LITERAL, IMAGE_TOKEN) for part in text.split(IMAGE_TOKEN))
    if len(segments) != len(images) + 1:
        raise PromptError(
            f"chat template: wrote {len(segments) - 1} image slots for {len(images)} images",
            hint="this model's template takes no images here; put them into a user message",
        )
    return Prompt(segments, images)


def _to_template(message: Message, content_format: ContentFormat) -> dict[str, Any]:
    content = message.content
    if isinstance(content, str):
        return {"role": message.role, "content": _escape(content)}
    if content_format == "string" or not any(isinstance(part, ImagePart) for part in content):
        # Without an image both formats are plain text; templates of text-only models want a string.
        joint = "\n" if content_format == "string" else ""
        texts = [_escape(p.text) if isinstance(p, TextPart) else _IMAGE_TEXT for p in content]
        return {"role": message.role, "content": joint.join(texts)}
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": _escape(part.text)}
        if isinstance(part, TextPart)
        else {"type": "image"}
        for part in content
    ]
    return {"role": message.role, "content": parts}


def _escape(text: str) -> str:
    return text.replace(IMAGE_TOKEN, _LITERAL)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if len(template) > _MAX_TEMPLATE_CHARS:
        raise PromptError(f"chat template: longer than {_MAX_TEMPLATE_CHARS} characters")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise PromptError(f"chat template: not valid Jinja ({error})") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise PromptError(f"chat template: {message}")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
