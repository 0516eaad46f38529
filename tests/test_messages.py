"""Messages in the shapes that clients send."""

from __future__ import annotations

import pytest

from autoglm_gguf import Chunk, ImagePart, Message, TextPart, Timings, Usage
from autoglm_gguf.messages import parse_messages

URL = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    ("raw", "parsed"),
    [
        ({"role": "user", "content": "hi"}, Message("user", "hi")),
        ({"role": "assistant", "content": None, "tool_calls": []}, Message("assistant", "")),
        ({"role": "tool"}, Message("tool", "")),
        ({"role": "user", "content": [], "name": "x"}, Message("user", ())),
        (
            {"role": "system", "content": [{"type": "text", "text": "a", "x": 1}, "b"]},
            Message("system", (TextPart("a"), TextPart("b"))),
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]},
            Message("user", (ImagePart(URL),)),
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": URL}]},
            Message("user", (ImagePart(URL),)),
        ),
        (
            {"role": "user", "content": [{"type": "image", "image": b"png"}]},
            Message("user", (ImagePart(b"png"),)),
        ),
        (
            {"role": "user", "content": (ImagePart("a.png"), TextPart("b"))},
            Message("user", (ImagePart("a.png"), TextPart("b"))),
        ),
        (Message("user", "hi"), Message("user", "hi")),
    ],
)
def test_messages_are_read_in_every_shape(raw: object, parsed: Message) -> None:
    assert parse_messages([raw]) == (parsed,)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({}, "role None"),
        ({"role": "robot"}, "role 'robot'"),
        ({"role": ["user"]}, "role"),
        ({"role": "user", "content": 5}, "a int, not text"),
        ({"role": "user", "content": {"text": "x"}}, "a dict, not text"),
        ({"role": "user", "content": [5]}, "a int, not a mapping"),
        ({"role": "user", "content": [{"type": "audio"}]}, "'audio'"),
        ({"role": "user", "content": [{"text": "x"}]}, "None"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "'text'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url'"),
        ({"role": "user", "content": [{"type": "image", "image": None}]}, "'image'"),
        ("hi", "a str, not"),
        (None, "a NoneType, not"),
        (Message("robot", "hi"), "role 'robot'"),  # type: ignore[arg-type]
        (Message("user", 5), "a int, not text"),  # type: ignore[arg-type]
    ],
)
def test_messages_of_another_shape_are_refused(raw: object, named: str) -> None:
    with pytest.raises(ValueError, match="message") as caught:
        parse_messages([raw])  # type: ignore[list-item]
    assert named in str(caught.value)


@pytest.mark.parametrize("given", [None, 5, b"hi", {"role": "user"}, Message("user", "hi")])
def test_what_is_no_list_of_messages_is_refused(given: object) -> None:
    with pytest.raises(TypeError, match=f"prompt: a {type(given).__name__}, not text or a list"):
        parse_messages(given)  # type: ignore[arg-type]


def test_usage_adds_up() -> None:
    assert Usage(5, 3, 2).total_tokens == 8


@pytest.mark.parametrize(
    ("timings", "speed"),
    [
        (Timings(predicted_n=11, predicted_ms=500.0), 20.0),
        (Timings(predicted_n=1, predicted_ms=0.0), 0.0),
        (Timings(), 0.0),
    ],
)
def test_decode_speed_counts_the_steps_between_tokens(timings: Timings, speed: float) -> None:
    assert timings.predicted_per_second == speed


def test_chunk_in_the_middle_says_nothing_but_its_text() -> None:
    chunk = Chunk("a", (1,))
    assert (chunk.finish_reason, chunk.usage, chunk.timings) == (None, None, None)
