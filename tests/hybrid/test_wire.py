"""Requests to bytes, events to text."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from autoglm_gguf import CloudError, ImageError, ImagePart, Message, SamplingParams, TextPart, Usage
from autoglm_gguf.hybrid.wire import MAX_ANSWER_CHARS, AnswerReader, build_body, error_text

ASK = [Message("user", "hi")]


def body(messages: list[Message] = ASK, **params: Any) -> Any:
    return json.loads(build_body("m", messages, SamplingParams.of(**params)))


# --- requests ---


def test_plain_request_has_only_what_every_server_takes() -> None:
    assert body() == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
    }


def test_given_sampling_is_sent_and_the_devices_own_options_are_not() -> None:
    given = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.85,
        "seed": 3,
        "stop": ["x"],
        "frequency_penalty": 0.2,
        "presence_penalty": -1.0,
        "top_k": 4,
        "min_p": 0.1,
    }
    ours = {"cache_prompt": False, "logprobs": True, "max_thinking_tokens": 9}
    sent = body(**given, **ours, repeat_penalty=1.1, constrain="action", apps=["A"])
    for name in ("model", "messages", "stream", "stream_options"):
        del sent[name]
    assert sent == {**given, "repetition_penalty": 1.1}


def test_schema_is_sent_as_a_response_format() -> None:
    schema = {"type": "object"}
    assert body(constrain=schema)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }


def test_equal_requests_have_equal_bytes(tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 4), "red")
    image.save(tmp_path / "red.png")
    made = {
        build_body("m", [Message("user", (ImagePart(source),))], SamplingParams())
        for source in (image, tmp_path / "red.png", (tmp_path / "red.png").read_bytes())
    }
    assert len(made) == 1


def test_image_is_sent_as_its_bare_pixels(tmp_path: Path) -> None:
    """A photo's place and time stay here, and so does the name of the file."""
    image = Image.new("RGBA", (3, 2), (10, 20, 30, 255))
    notes, exif = PngInfo(), Image.Exif()
    notes.add_text("Comment", "secret place")
    exif[0x010E] = "secret place"
    image.save(tmp_path / "secret-name.png", pnginfo=notes, exif=exif, icc_profile=b"secret icc")
    parts = (ImagePart(tmp_path / "secret-name.png"), TextPart("see"))
    raw = build_body("m", [Message("user", parts)], SamplingParams())
    first, second = json.loads(raw)["messages"][0]["content"]
    assert second == {"type": "text", "text": "see"}
    assert first["type"] == "image_url"
    head, _, data = first["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    sent = base64.b64decode(data)
    assert b"secret" not in sent and b"secret" not in raw
    with Image.open(io.BytesIO(sent)) as opened:
        assert opened.mode == "RGB" and opened.size == (3, 2)
        assert opened.getpixel((0, 0)) == (10, 20, 30)
        assert not opened.getexif() and not opened.info


def test_image_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ImageError):
        build_body("m", [Message("user", (ImagePart(b"no image"),))], SamplingParams())


# --- answers ---


def piece(text: str | None = None, **choice: Any) -> str:
    delta = {} if text is None else {"content": text}
    return json.dumps({"choices": [{"index": 0, "delta": delta, **choice}]})


def test_reader_adds_up_text_usage_and_reason() -> None:
    reader = AnswerReader("c")
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    events = [
        '{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"usage":null}',
        piece("he"),
        piece("llo"),
        piece("other choice", index=1),
        piece(finish_reason="length"),
        json.dumps({"choices": [], "usage": {**usage, "prompt_tokens_details": None}}),
    ]
    assert "".join(map(reader.push, events)) == "hello"
    assert reader.finished and not reader.done
    assert reader.push("[DONE]") == "" and reader.done
    assert reader.finish_reason == "length"
    assert reader.usage == Usage(9, 2)


def test_reader_tells_what_the_cloud_had_cached() -> None:
    reader = AnswerReader("c")
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    reader.push(json.dumps({"choices": [], "usage": usage}))
    assert reader.cached_tokens == 4


@pytest.mark.parametrize("reason", ["stop", "eos", "tool_calls"])
def test_reader_takes_other_reasons_for_stop(reason: str) -> None:
    reader = AnswerReader("c")
    reader.push(piece(finish_reason=reason))
    assert reader.finish_reason == "stop"


def test_reader_refuses_an_answer_that_ends_in_the_middle() -> None:
    reader = AnswerReader("c")
    reader.push(piece("he"))
    with pytest.raises(CloudError, match="c: its answer ended in the middle"):
        reader.finish_reason  # noqa: B018


def test_reader_refuses_an_answer_that_is_withheld() -> None:
    reader = AnswerReader("c")
    reader.push(piece(finish_reason="content_filter"))
    with pytest.raises(CloudError, match="withholds"):
        reader.finish_reason  # noqa: B018


@pytest.mark.parametrize(
    "data",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "{}",
        '{"choices": "x"}',
        '{"choices": [{"delta": {"content": ["x"]}}]}',
        '{"choices": [{"delta": null}]}',
        '{"usage": {"prompt_tokens": "many"}}',
    ],
)
def test_reader_refuses_what_is_no_chat_completion(data: str) -> None:
    with pytest.raises(CloudError, match="c: its answer is no chat completion") as caught:
        AnswerReader("c").push(data)
    assert caught.value.__cause__ is None


def test_reader_refuses_an_error_within_the_answer_without_the_key() -> None:
    with pytest.raises(CloudError, match=r"an error within its answer \(bad key \*\*\*\)"):
        AnswerReader("c", "sk-1").push('{"error": {"message": "bad\\nkey sk-1"}}')


def test_reader_bounds_the_answer() -> None:
    reader = AnswerReader("c")
    text = "x" * (MAX_ANSWER_CHARS // 4)
    for _ in range(4):
        reader.push(piece(text))
    with pytest.raises(CloudError, match="characters"):
        reader.push(piece("x"))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"error": {"message": "no such model", "code": 404}}, "no such model"),
        ({"message": "m"}, "m"),
        ({"detail": "d"}, "d"),
        ({"error": "plain"}, "plain"),
        ("a\x1b[31m b\r\n c", "a [31m b c"),
        ({"x": 1}, '{"x": 1}'),
        (None, "null"),
    ],
)
def test_error_text_is_one_printable_line(value: object, told: str) -> None:
    assert error_text(value) == told


def test_error_text_is_short() -> None:
    assert len(error_text("x" * 9999)) == 200
