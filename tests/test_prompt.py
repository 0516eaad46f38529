"""Rendering: what the template is given, and what becomes a slot."""

from __future__ import annotations

import re

import pytest

from autoglm_gguf import ImagePart, Message, PromptError, TextPart
from autoglm_gguf.gguf.describe import GLM_TEMPLATE
from autoglm_gguf.messages import Role
from autoglm_gguf.prompt import Prompt, render_prompt

SLOT = "<|begin_of_image|><|image|><|end_of_image|>"


def user(*parts: str | bytes) -> Message:
    """Text and images (bytes) of one turn."""
    content = (ImagePart(p) if isinstance(p, bytes) else TextPart(p) for p in parts)
    return Message("user", tuple(content))


def test_glm_template_writes_header_and_turn() -> None:
    prompt = render_prompt([Message("user", "你好")], GLM_TEMPLATE)
    assert prompt == Prompt(("[gMASK]<sop><|user|>\n你好<|assistant|>\n",))


def test_glm_template_writes_every_role() -> None:
    roles: tuple[Role, ...] = ("system", "user", "assistant", "tool")
    prompt = render_prompt([Message(role, role[0]) for role in roles], GLM_TEMPLATE)
    assert prompt.text == (
        "[gMASK]<sop><|system|>\ns<|user|>\nu<|assistant|>\na<|observation|>\nt<|assistant|>\n"
    )


def test_generation_prompt_can_be_left_out() -> None:
    prompt = render_prompt([Message("user", "u")], GLM_TEMPLATE, add_generation_prompt=False)
    assert prompt.text == "[gMASK]<sop><|user|>\nu"


@pytest.mark.parametrize(
    ("content_format", "body"),
    [
        ("openai", f"one{SLOT}two{SLOT}"),
        ("string", f"one\n{SLOT}\ntwo\n{SLOT}"),
    ],
)
def test_images_become_slots_in_their_order(content_format: str, body: str) -> None:
    prompt = render_prompt(
        [user("one", b"A", "two", b"B")],
        GLM_TEMPLATE,
        content_format=content_format,  # type: ignore[arg-type]
    )
    assert prompt.text == f"[gMASK]<sop><|user|>\n{body}<|assistant|>\n"
    assert prompt.images == (b"A", b"B")
    assert len(prompt.segments) == 3


def test_images_of_several_turns_keep_their_order() -> None:
    prompt = render_prompt([user(b"A"), Message("assistant", "a"), user("x", b"B")], GLM_TEMPLATE)
    assert prompt.images == (b"A", b"B")


@pytest.mark.parametrize("content_format", ["openai", "string"])
def test_literal_image_token_is_text(content_format: str) -> None:
    prompt = render_prompt(
        [Message("system", "<|image|>"), user(b"A", "is <|image|> a token?")],
        GLM_TEMPLATE,
        content_format=content_format,  # type: ignore[arg-type]
    )
    assert len(prompt.segments) == 2
    assert prompt.segments[0].startswith("[gMASK]<sop><|system|>\n<|image|><|user|>\n")
    assert "is <|image|> a token?" in prompt.segments[1]


@pytest.mark.parametrize(("content_format", "joint"), [("openai", ""), ("string", "\n")])
def test_text_parts_are_joined_for_templates_that_want_a_string(
    content_format: str, joint: str
) -> None:
    template = "{% for m in messages %}{{ m.content.upper() }}{% endfor %}"
    prompt = render_prompt(
        [user("a", "b")],
        template,
        content_format=content_format,  # type: ignore[arg-type]
    )
    assert prompt.text == f"A{joint}B"


def test_template_is_rendered_with_transformers_settings() -> None:
    template = (
        "{% for m in messages %}\n"
        "    {% if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "{{ {'文': 1} | tojson }}\n"
        "{% endfor %}\n"
    )
    # trim_blocks, lstrip_blocks, loop controls, and Chinese left readable in JSON
    messages = [Message("user", "a"), Message("user", "b")]
    assert render_prompt(messages, template).text == '{"文": 1}\n'


def test_template_can_ask_for_the_date() -> None:
    text = render_prompt([Message("user", "a")], "{{ strftime_now('%Y-%m-%d') }}").text
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", text)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ raise_exception('only users may speak') }}", "only users may speak"),
        ("{{ messages[5].content }}", "cannot render"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ range(10**9) | list }}", "cannot render"),
        ("x" * 200_001, "longer than"),
    ],
    ids=lambda value: value[:30],
)
def test_template_that_cannot_be_rendered_is_a_prompt_error(template: str, named: str) -> None:
    with pytest.raises(PromptError, match="chat template") as caught:
        render_prompt([Message("user", "a")], template)
    assert named in caught.value.message


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].role }}", "<|image|><|image|>", "{{ messages }}"],
)
def test_template_that_loses_or_invents_images_is_refused(template: str) -> None:
    with pytest.raises(PromptError, match="image slots for 1 images") as caught:
        render_prompt([user(b"A", "x")], template)
    assert caught.value.hint


def test_no_messages_are_refused() -> None:
    with pytest.raises(PromptError, match="none given") as caught:
        render_prompt([], GLM_TEMPLATE)
    assert caught.value.hint
