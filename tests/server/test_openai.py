"""The real ``openai`` client against a real port: every parameter, streaming and not."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image
from serving import GrammarEngine, data_url, fake_app, image_part, listening, png

from autoglm_gguf.server.params import ServerParams

ACTION = '<think>t</think><answer>do(action="Tap", element=[500,300])'


class EchoEngine(GrammarEngine):
    """Says what it was asked last; remembers the sampling it was given, and schemas."""

    def __init__(self, **more: Any) -> None:
        super().__init__(self._say, **more)
        self.params: Any = None

    def _say(self, prompt: str) -> bytes:
        return prompt.rpartition("<|user|>\n")[2].removesuffix("<|assistant|>\n").encode()

    def open_sampler(self, params: Any) -> Any:
        self.params = params
        return super().open_sampler(params)


@pytest.fixture(scope="module")
def engine() -> EchoEngine:
    return EchoEngine(n_ctx=8192, n_draft_max=7)


@pytest.fixture(scope="module")
def client(engine: EchoEngine) -> Iterator[openai.OpenAI]:
    with (
        listening(fake_app(engine)) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="EMPTY", max_retries=0) as client,
    ):
        yield client


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def create(client: openai.OpenAI, stream: bool, content: Any = "hello", **more: Any) -> Any:
    """The choice, and the usage, of an answer that came as a whole or in pieces."""
    more = {"model": "autoglm-phone-9b", "messages": user(content), **more}
    if not stream:
        whole = client.chat.completions.create(**more)
        assert whole.object == "chat.completion"
        return whole.choices[0].message.content, whole.choices[0], whole.usage
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**more, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    told = [chunk for chunk in chunks if chunk.choices]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in told)
    last = told[-1].choices[0]
    if last.logprobs is not None:  # those of all chunks, however the tokens were put together
        rated = [c.choices[0].logprobs.content for c in told if c.choices[0].logprobs]
        last.logprobs.content = [entry for content in rated for entry in content]
    return text, last, chunks[-1].usage


both = pytest.mark.parametrize("stream", [False, True])


@both
def test_text_comes_back_with_reason_and_usage(client: openai.OpenAI, stream: bool) -> None:
    text, choice, usage = create(client, stream, "你好, agent")
    assert text == "你好, agent"
    assert choice.finish_reason == "stop"
    assert usage.completion_tokens == len("你好, agent".encode()) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@both
@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"temperature": 0.7}, "temperature", 0.7),
        ({"top_p": 0.85}, "top_p", 0.85),
        ({"frequency_penalty": 0.2}, "frequency_penalty", 0.2),
        ({"presence_penalty": -1.5}, "presence_penalty", -1.5),
        ({"seed": 7}, "seed", 7),
        ({"seed": -1}, "seed", 2**32 - 2),
        ({"extra_body": {"top_k": 5, "min_p": 0.1}}, "top_k", 5),
        ({"extra_body": {"top_k": -1}}, "top_k", 0),
        ({"extra_body": {"min_p": 0.1}}, "min_p", 0.1),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repeat_penalty", 1.1),
        ({"extra_body": {"repeat_penalty": 1.2}}, "repeat_penalty", 1.2),
        ({"extra_body": {"cache_prompt": False}}, "cache_prompt", False),
        ({"extra_body": {"n_draft": 0}}, "n_draft", 0),
        ({"extra_body": {"n_draft": None}}, "n_draft", None),
        ({"extra_body": {"max_thinking_tokens": 9}}, "max_thinking_tokens", 9),
        ({"max_tokens": 3}, "max_tokens", 3),
        ({"max_completion_tokens": 4, "max_tokens": 3}, "max_tokens", 4),
        ({"stop": "l"}, "stop", ("l",)),
        ({"stop": ["x", "y"]}, "stop", ("x", "y")),
        ({"temperature": None, "stop": None, "seed": None}, "temperature", 0.0),
    ],
)
def test_sampling_parameter_reaches_the_model(
    client: openai.OpenAI,
    engine: EchoEngine,
    stream: bool,
    given: dict[str, Any],
    field: str,
    value: Any,
) -> None:
    create(client, stream, **given)
    assert getattr(engine.params, field) == value


@both
def test_max_tokens_cuts_and_says_so(client: openai.OpenAI, stream: bool) -> None:
    text, choice, usage = create(client, stream, max_tokens=2)
    assert (text, choice.finish_reason, usage.completion_tokens) == ("he", "length", 2)


@both
def test_max_tokens_beyond_the_room_is_cut_to_it(client: openai.OpenAI, stream: bool) -> None:
    text, choice, _ = create(client, stream, max_tokens=10**9)
    assert (text, choice.finish_reason) == ("hello", "stop")


@both
def test_stop_string_ends_the_answer_and_is_not_in_it(client: openai.OpenAI, stream: bool) -> None:
    text, choice, _ = create(client, stream, stop=["lo"])
    assert (text, choice.finish_reason) == ("hel", "stop")


@both
def test_cached_tokens_are_told(client: openai.OpenAI, stream: bool) -> None:
    create(client, stream, "the same again")
    _, _, usage = create(client, stream, "the same again")
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


@both
def test_logprobs_are_those_of_the_tokens(client: openai.OpenAI, stream: bool) -> None:
    _, choice, _ = create(client, stream, "é", logprobs=True, top_logprobs=2)
    entries = choice.logprobs.content
    assert [entry.bytes for entry in entries] == [[0xC3], [0xA9]]
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob < 0
    assert choice.logprobs.refusal is None


def test_logprobs_are_null_when_not_asked_for(client: openai.OpenAI) -> None:
    _, choice, _ = create(client, False)
    assert choice.logprobs is None


@both
def test_tokens_without_choice_have_logprob_zero(client: openai.OpenAI, stream: bool) -> None:
    more = {"logprobs": True, "extra_body": {"constrain": "action"}}
    text, choice, _ = create(client, stream, '<answer>do(action="Back")', **more)
    assert text == '<answer>do(action="Back")'
    assert any(entry.logprob == 0 for entry in choice.logprobs.content)
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == text


@both
def test_image_is_seen_before_the_text(
    client: openai.OpenAI, engine: EchoEngine, stream: bool
) -> None:
    n_before = engine.n_encoded
    picture = image_part(png(112, 168, seed=stream))
    text, _, usage = create(client, stream, [picture, {"type": "text", "text": "what?"}])
    assert engine.n_encoded == n_before + 1
    assert usage.prompt_tokens_details.image_tokens == 24
    assert text.endswith("what?")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_image_of_every_common_format_is_taken(client: openai.OpenAI, kind: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (112, 168), "red").save(data, kind)
    part = {"type": "image_url", "image_url": {"url": data_url(data.getvalue(), kind.lower())}}
    assert create(client, False, [part])[2].prompt_tokens_details.image_tokens == 24


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_parts_are_taken_for_every_role(
    client: openai.OpenAI, engine: EchoEngine, role: str
) -> None:
    parts = [
        {"type": "text", "text": "one"},
        "two",
        {"type": "image_url", "image_url": data_url(png())},
    ]
    messages = [{"role": role, "content": parts}, *user("hello")]
    assert create(client, False, messages=messages)[0] == "hello"


def test_developer_is_another_word_for_system(client: openai.OpenAI, engine: EchoEngine) -> None:
    messages = [{"role": "developer", "content": "be brief"}, *user("hello")]
    create(client, False, messages=messages)
    said = bytes(token for token in engine.evaluated if token < 256).decode()
    assert "<|system|>\nbe brief<|user|>\nhello" in said


def test_null_content_and_unknown_fields_are_tolerated(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        *user("hello"),
    ]
    more = {
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": False,
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "n": 1,
        "modalities": ["text"],
        "extra_body": {"skip_special_tokens": False, "best_of": None, "unheard_of": {"x": [1]}},
    }
    assert create(client, False, messages=messages, **more)[0] == "hello"


@both
def test_json_schema_holds_the_answer(
    client: openai.OpenAI, engine: EchoEngine, stream: bool
) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    text, choice, _ = create(client, stream, "42, no, 1", response_format=form)
    assert text == "420"
    assert choice.finish_reason == "stop"
    assert '"integer"' in engine.schemas[-1]


def test_json_object_is_the_schema_of_any_object(client: openai.OpenAI, engine: EchoEngine) -> None:
    create(client, False, response_format={"type": "json_object"})
    assert engine.schemas[-1] == '{"type": "object"}'
    n_schemas = len(engine.schemas)
    assert create(client, False, response_format={"type": "text"})[0] == "hello"
    assert len(engine.schemas) == n_schemas


@both
def test_answer_is_held_where_the_system_prompt_speaks_of_actions(
    client: openai.OpenAI, stream: bool
) -> None:
    messages = [{"role": "system", "content": 'say do(action="Tap", …)'}, *user("I will not.")]
    text, choice, _ = create(client, stream, messages=messages, max_tokens=200)
    assert "do(action=" in text or "finish(message=" in text
    assert text.endswith(")")
    assert choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("mode", "system", "constrain", "held"),
    [
        ("auto", "be kind", None, False),
        ("auto", "do(action=", None, True),
        ("auto", "do(action=", "none", False),
        ("on", "be kind", None, True),
        ("off", "do(action=", None, False),
        ("off", "be kind", "action", True),
    ],
)
def test_constrain_actions_auto_on_off(
    mode: Any, system: str, constrain: str | None, held: bool
) -> None:
    engine = EchoEngine()
    app = fake_app(engine, ServerParams(constrain_actions=mode))
    with (
        listening(app) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="EMPTY", max_retries=0) as client,
    ):
        messages = [{"role": "system", "content": system}, *user("plain")]
        more = {"extra_body": {"constrain": constrain}, "max_tokens": 200}
        text, _, _ = create(client, False, messages=messages, **more)
    assert (text == "plain") is not held


@both
def test_completions_go_on_with_a_text(
    client: openai.OpenAI, engine: EchoEngine, stream: bool
) -> None:
    more: dict[str, Any] = {"model": "any", "prompt": "<|user|>\nabcde", "logprobs": 2}
    if stream:
        chunks = list(client.completions.create(**more, stream=True, max_tokens=4))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "abcd"
        return
    whole = client.completions.create(**more, max_tokens=4)
    assert whole.object == "text_completion"
    choice = whole.choices[0]
    assert (choice.text, choice.finish_reason) == ("abcd", "length")
    assert choice.logprobs.tokens == list("abcd")
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    assert whole.usage.prompt_tokens == len("<|user|>\nabcde")


def test_completions_end_after_16_tokens_by_default(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="any", prompt=["<|user|>\n" + "a" * 40])
    assert whole.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("field", "value"), [("echo", True), ("echo", 0), ("suffix", "end"), ("best_of", 2)]
)
def test_field_of_a_completion_that_cannot_be_honoured_is_refused(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="any", prompt="x", extra_body={field: value})
    assert caught.value.param == field


def test_models_are_the_one_that_is_loaded(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "autoglm-gguf"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    assert client.chat.completions.create(model="gpt-4", messages=user("x")).model == "fake"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "missing_required_parameter"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": user(5)}, "messages.0.content", "invalid_value"),
        ({"messages": user([{"type": "input_audio"}])}, "messages.0.content.0", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"n_draft": 64}, "n_draft", "invalid_value"),
        ({"max_thinking_tokens": 0}, "max_thinking_tokens", "invalid_value"),
        ({"cache_prompt": 1}, "cache_prompt", "invalid_value"),
        ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
        ({"n": 2}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"stop": [""]}, "stop.0", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing_required_parameter",
        ),
        ({"apps": ["微信"]}, "apps", "invalid_value"),
        (
            {"constrain": "action", "response_format": {"type": "json_object"}},
            "constrain",
            "invalid_value",
        ),
    ],
)
def test_wrong_field_is_named(
    client: openai.OpenAI, body: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", cast_to=object, body={"messages": user("x"), **body})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]], [7]])
def test_token_ids_are_told_to_be_none_that_are_taken(
    client: openai.OpenAI, prompt: list[Any]
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"prompt: .*token ids are not taken"):
        client.completions.create(model="any", prompt=prompt)


def test_error_in_a_stream_is_raised_by_the_client(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="any", messages=user("x" * 9000), stream=True)
    with pytest.raises(openai.APIError, match="does not fit the context"):
        list(stream)


@both
def test_guessed_tokens_and_times_are_told(client: openai.OpenAI, stream: bool) -> None:
    more: dict[str, Any] = {"extra_body": {"n_draft": 4}, "stream": stream}
    told = client.chat.completions.create(model="any", messages=user("abcabcabcabc"), **more)
    timings = (list(told)[-1] if stream else told).timings
    assert timings["predicted_n"] == 13
    assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
    assert timings["ttft_ms"] > 0


def test_apps_are_the_only_ones_that_launch_opens(client: openai.OpenAI) -> None:
    more = {"extra_body": {"constrain": "action", "apps": ["Maps"]}}
    text, _, _ = create(client, False, '<answer>do(action="Launch", app="Chrome")', **more)
    assert text == '<answer>do(action="Launch", app="Maps")'


def test_conversation_that_outgrows_its_room_says_what_it_dropped(client: openai.OpenAI) -> None:
    turns = [
        m for _ in range(12) for m in (*user("q" * 700), {"role": "assistant", "content": "a"})
    ]
    _, _, usage = create(client, False, messages=[*turns, *user("last")])
    assert usage.dropped_messages > 0


def test_image_data_is_not_repeated_in_errors(client: openai.OpenAI) -> None:
    junk = base64.b64encode(b"secret picture").decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{junk}"}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=user([part]))
    assert junk not in str(caught.value)
    assert caught.value.param == "messages.0.content.0.image_url"
