"""`AutoGLM` and `ChatSession` over the fake engine: what a caller may rely on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from PIL import Image

from autoglm_gguf import (
    ActionParseError,
    AutoGLM,
    Chunk,
    ContextFullError,
    EngineBusyError,
    EngineError,
    ImageError,
    ImagePart,
    Message,
    PromptError,
    TextPart,
    Usage,
    measure_memory,
)
from autoglm_gguf.actions import Launch
from autoglm_gguf.conversation import close_answer
from autoglm_gguf.engine.fake import IMAGE, STOP, FakeEngine
from autoglm_gguf.messages import collect

ENDLESS = b"x" * 300_000
ROOMY = 1 << 20
SCREEN = Image.new("RGB", (112, 168), "red")  # 4 x 6 image tokens, no resize needed


def raw_model(answer: bytes | Callable[[str], bytes], n_ctx: int = 4096) -> AutoGLM:
    return AutoGLM(FakeEngine(answer, n_ctx=n_ctx))


def evaluated_text(engine: FakeEngine) -> str:
    """What the engine was given, one ``<|image|>`` per run of image tokens."""
    out, last = bytearray(), 0
    for token in engine.evaluated:
        if token == IMAGE and last != IMAGE:
            out += b"<IMAGE>"
        elif token < STOP:
            out.append(token)
        last = token
    return out.decode()


# --- one answer ---


def test_generate_returns_the_answer_with_its_cost() -> None:
    answer = raw_model(b"four").generate("2+2", raw=True)
    assert answer.text == "four"
    assert answer.finish_reason == "stop"
    assert answer.tokens == (*b"four", STOP)
    assert answer.usage == Usage(prompt_tokens=3, completion_tokens=5, image_tokens=0)
    assert answer.timings.prompt_n == 3
    assert answer.timings.predicted_n == 5
    assert answer.timings.ttft_ms >= answer.timings.prompt_ms >= 0


def test_stream_pieces_are_whole_characters_and_add_up() -> None:
    said = "答案是🙂。完"
    chunks = list(raw_model(said.encode()).stream("?", raw=True))
    assert [chunk.text for chunk in chunks] == [*said, ""]
    assert b"".join(bytes(t for t in c.tokens if t < STOP) for c in chunks) == said.encode()


@pytest.mark.parametrize("options", [{}, {"max_tokens": 3}, {"stop": "b"}])
def test_stream_has_one_finish_reason_on_its_last_chunk(options: dict[str, object]) -> None:
    chunks = list(raw_model(b"aaabbb").stream("?", raw=True, **options))
    assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [
        True
    ]
    assert [c.usage is not None for c in chunks] == [c.finish_reason is not None for c in chunks]
    assert [c.timings is not None for c in chunks] == [c.finish_reason is not None for c in chunks]


def test_stream_goes_on_when_a_byte_is_never_valid_utf8() -> None:
    chunks = list(raw_model(b"a\xffb").stream("?", raw=True))
    assert [chunk.text for chunk in chunks] == ["a", "�", "b", ""]


def test_stream_ends_with_replacement_when_cut_inside_a_character() -> None:
    answer = raw_model("a🙂".encode()).generate("?", raw=True, max_tokens=3)
    assert (answer.text, answer.finish_reason) == ("a�", "length")


@pytest.mark.parametrize(
    ("max_tokens", "text", "reason"), [(1, "o", "length"), (2, "ok", "length"), (3, "ok", "stop")]
)
def test_generate_ends_at_max_tokens(max_tokens: int, text: str, reason: str) -> None:
    answer = raw_model(b"ok").generate("?", raw=True, max_tokens=max_tokens)
    assert (answer.text, answer.finish_reason) == (text, reason)
    assert answer.usage.completion_tokens == max_tokens


@pytest.mark.parametrize("stop", ["STOP", ["STOP", "never"], ("never", "STOP")])
def test_generate_ends_before_a_stop_string(stop: str | Sequence[str]) -> None:
    answer = raw_model(b"one STOP two").generate("?", raw=True, stop=stop)
    assert (answer.text, answer.finish_reason) == ("one ", "stop")


def test_generate_gives_back_what_only_looked_like_a_stop_string() -> None:
    assert raw_model(b"one STO").generate("?", raw=True, stop="STOP").text == "one STO"


def test_generate_ends_before_the_end_of_answer_tag_unasked() -> None:
    answer = raw_model(b'<answer>do(action="Back")</answer>more').generate("?", raw=True)
    assert (answer.text, answer.finish_reason) == ('<answer>do(action="Back")', "stop")


def test_generate_goes_on_after_a_tag_that_is_no_stop_of_the_model() -> None:
    model = AutoGLM(FakeEngine(b"a</answer>b", stop_strings=()))
    assert model.generate("?", raw=True).text == "a</answer>b"


@pytest.mark.parametrize(("n_prompt", "n_said"), [(3, 6), (6, 3), (7, 2)])
def test_generate_fills_the_context_exactly(n_prompt: int, n_said: int) -> None:
    engine = FakeEngine(ENDLESS, n_ctx=8)
    answer = AutoGLM(engine).generate("p" * n_prompt, raw=True)
    # The last token is sampled from a full context and needs no cell of its own.
    assert answer.usage.completion_tokens == n_said
    assert answer.finish_reason == "length"
    assert len(engine.evaluated) == 8


def test_generate_stops_by_itself_when_the_answer_just_fits() -> None:
    answer = raw_model(b"12345", n_ctx=8).generate("ppp", raw=True)
    assert (answer.text, answer.finish_reason) == ("12345", "stop")


@pytest.mark.parametrize("n_prompt", [8, 9, 5000])
def test_stream_refuses_a_prompt_that_leaves_no_room(n_prompt: int) -> None:
    engine = FakeEngine(n_ctx=8)
    with pytest.raises(ContextFullError, match=f"{n_prompt} tokens, n_ctx 8") as caught:
        AutoGLM(engine).stream("p" * n_prompt, raw=True)
    assert (caught.value.n_prompt, caught.value.n_ctx) == (n_prompt, 8)
    assert "n_ctx" in caught.value.hint
    assert engine.n_evaluated == 0


def test_long_prompt_is_evaluated_in_batches() -> None:
    engine = FakeEngine(b"")
    prompt = "p" * (3 * engine.n_batch + 1)
    AutoGLM(engine).generate(prompt, raw=True)
    assert evaluated_text(engine) == prompt


# --- prompts ---


def test_stream_renders_a_string_as_a_user_message() -> None:
    engine = FakeEngine(b"")
    AutoGLM(engine).generate("hi")
    assert evaluated_text(engine) == "[gMASK]<sop><|user|>\nhi<|assistant|>\n"


def test_raw_prompt_is_taken_as_it_is() -> None:
    engine = FakeEngine(b"", chat_template=None)
    AutoGLM(engine).generate("once upon", raw=True)
    assert evaluated_text(engine) == "once upon"


def test_stream_takes_openai_messages_with_unknown_fields() -> None:
    engine = FakeEngine(b"")
    AutoGLM(engine).generate(
        [
            {"role": "system", "content": "be brief", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache": {}}]},
        ]
    )
    assert evaluated_text(engine) == "[gMASK]<sop><|system|>\nbe brief<|user|>\nhi<|assistant|>\n"


@pytest.mark.parametrize(("content_format", "joint"), [("openai", ""), ("string", "\n")])
def test_content_format_joins_image_and_text(content_format: str, joint: str) -> None:
    engine = FakeEngine(b"")
    model = AutoGLM(engine, content_format=content_format)  # type: ignore[arg-type]
    answer = model.generate("what?", image=SCREEN)
    slot = "<|begin_of_image|><IMAGE><|end_of_image|>"
    assert evaluated_text(engine) == f"[gMASK]<sop><|user|>\n{slot}{joint}what?<|assistant|>\n"
    assert engine.evaluated.count(IMAGE) == 24
    assert answer.usage.image_tokens == 24
    assert answer.usage.prompt_tokens == len(engine.evaluated)


def test_content_format_is_refused_when_unknown() -> None:
    with pytest.raises(ValueError, match="content_format 'xml': not one of openai, string"):
        AutoGLM(FakeEngine(), content_format="xml")  # type: ignore[arg-type]


def test_literal_image_token_in_text_is_no_slot() -> None:
    engine = FakeEngine(b"")
    AutoGLM(engine).generate("what does <|image|> mean?", image=SCREEN)
    assert engine.evaluated.count(IMAGE) == 24
    assert "what does <|image|> mean?" in evaluated_text(engine)


def test_two_images_are_evaluated_in_their_order() -> None:
    engine = FakeEngine(b"")
    parts = (ImagePart(SCREEN), TextPart("then"), ImagePart(SCREEN.rotate(90, expand=True)))
    AutoGLM(engine).generate([Message("user", (*parts, TextPart("?")))])
    assert evaluated_text(engine).count("<IMAGE>") == 2
    assert engine.evaluated.count(IMAGE) == 48


@pytest.mark.parametrize(
    ("prompt", "options", "error", "named"),
    [
        ("", {"raw": True}, PromptError, "empty"),
        ("a \ud83d b", {}, PromptError, "half a character"),
        ([], {}, PromptError, "messages"),
        ([{"role": "robot", "content": "x"}], {}, ValueError, "robot"),
        ([Message("user", "x")], {"raw": True}, ValueError, "raw"),
        ([Message("user", "x")], {"image": SCREEN}, ValueError, "image"),
        ("x", {"image": SCREEN, "raw": True}, ValueError, "image"),
        ("x", {"image": "nowhere.png"}, ImageError, "nowhere.png"),
        ("x", {"temperature": -1}, ValueError, "temperature"),
        ("x", {"max_tokens": 0}, ValueError, "max_tokens"),
        ("x", {"stop": ""}, ValueError, "stop"),
        ("x", {"temprature": 1}, TypeError, "temprature"),
    ],
)
def test_stream_refuses_a_bad_request_before_any_work(
    prompt: object, options: dict[str, object], error: type[Exception], named: str
) -> None:
    engine = FakeEngine()
    model = AutoGLM(engine)
    with pytest.raises(error, match=named):
        model.stream(prompt, **options)  # type: ignore[arg-type]
    assert engine.n_evaluated == 0
    assert model.generate("still works").text == "ok"


def test_stream_refuses_an_image_when_the_model_takes_none() -> None:
    with pytest.raises(ImageError, match="fake: takes no images") as caught:
        AutoGLM(FakeEngine(vision=False)).stream("?", image=SCREEN)
    assert "mmproj" in caught.value.hint


def test_render_needs_a_template_for_messages() -> None:
    with pytest.raises(PromptError, match="no chat template") as caught:
        AutoGLM(FakeEngine(chat_template=None)).stream("hi")
    assert "raw=True" in caught.value.hint


def test_token_budget_of_another_type_is_named() -> None:
    with pytest.raises(TypeError, match="token_budget None: not a TokenBudget"):
        AutoGLM.load("model.gguf", token_budget=None)  # type: ignore[arg-type]


def test_tokenize_adds_nothing() -> None:
    assert AutoGLM(FakeEngine()).tokenize("ab") == [97, 98]


# --- closing, cancelling, queueing ---


def test_stream_releases_the_engine_when_closed_early() -> None:
    model = raw_model(ENDLESS, ROOMY)
    stream = model.stream("?", raw=True)
    assert next(stream).text == "x"
    stream.close()
    assert model.generate("?", raw=True, max_tokens=2).text == "xx"


def test_stream_releases_the_engine_when_its_loop_is_left() -> None:
    model = raw_model(ENDLESS, ROOMY)
    for chunk in model.stream("?", raw=True):
        assert chunk.text == "x"
        break
    assert model.generate("?", raw=True, max_tokens=1).text == "x"


def test_stream_that_was_never_read_holds_nothing() -> None:
    model = raw_model(b"ok")
    unread = model.stream("?", raw=True)
    assert model.generate("?", raw=True).text == "ok"
    assert collect(unread).text == "ok"


def test_second_stream_in_the_same_thread_is_an_error_not_a_deadlock() -> None:
    model = raw_model(b"abc")
    first = model.stream("?", raw=True)
    next(first)
    with pytest.raises(EngineBusyError, match="another stream is open") as caught:
        model.generate("?", raw=True)
    assert "close it" in caught.value.hint
    assert collect(first).text == "bc", "the first goes on undisturbed"
    assert model.generate("?", raw=True).text == "abc"


def test_calls_from_two_threads_queue() -> None:
    model = raw_model(b"abc")
    first = model.stream("?", raw=True)
    next(first)
    answers: list[str] = []
    other = threading.Thread(target=lambda: answers.append(model.generate("!", raw=True).text))
    other.start()
    other.join(0.1)
    assert other.is_alive() and not answers, "the second waits"
    assert collect(first).text == "bc"
    other.join(10)
    assert answers == ["abc"]


def test_many_threads_get_their_own_whole_answers() -> None:
    model = raw_model(lambda prompt: f"echo {prompt}".encode())
    answers: dict[str, str] = {}

    def ask(name: str) -> None:
        answers[name] = model.generate(name, raw=True).text

    threads = [threading.Thread(target=ask, args=(str(n),)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == {str(n): f"echo {n}" for n in range(16)}


def test_cancel_from_another_thread_ends_the_answer() -> None:
    model = raw_model(ENDLESS, ROOMY)
    stream = model.stream("?", raw=True)
    next(stream)
    canceller = threading.Thread(target=model.cancel)
    canceller.start()
    canceller.join()
    rest = list(stream)
    assert [chunk.finish_reason for chunk in rest] == ["cancelled"]
    assert rest[0].usage == Usage(1, 1, 0)
    assert model.generate("?", raw=True, max_tokens=3).text == "xxx", "the next is not cancelled"


def test_cancel_during_the_prompt_ends_without_text() -> None:
    class CancelledEngine(FakeEngine):
        def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
            super().eval_tokens(tokens, n_outputs=n_outputs)
            model.cancel()

    engine = CancelledEngine(b"never")
    model = AutoGLM(engine)
    chunks = list(model.stream("p" * 200, raw=True))
    assert [(c.text, c.finish_reason) for c in chunks] == [("", "cancelled")]
    assert len(engine.evaluated) == engine.n_batch, "the second batch was not evaluated"


def test_cancel_without_an_answer_does_nothing() -> None:
    model = raw_model(b"ok")
    model.cancel()
    assert model.generate("?", raw=True).finish_reason == "stop"


def test_engine_failure_releases_the_engine() -> None:
    def fail(prompt: str) -> bytes:
        if prompt == "bad":
            raise EngineError("llama.cpp: failed")
        return b"ok"

    model = raw_model(fail)
    with pytest.raises(EngineError, match="failed"):
        model.generate("bad", raw=True)
    assert model.generate("good", raw=True).text == "ok"


def test_close_frees_the_engine_once_and_for_all() -> None:
    engine = FakeEngine()
    with AutoGLM(engine) as model:
        model.generate("hi")
        assert not engine.closed
    assert engine.closed
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.generate("hi")


def test_close_ends_a_stream_that_is_still_open() -> None:
    engine = FakeEngine(ENDLESS, n_ctx=ROOMY)
    with AutoGLM(engine) as model:
        stream = model.stream("?", raw=True)
        next(stream)
    assert engine.closed
    assert list(stream) == []


def test_close_refuses_those_who_wait_and_answers_none_of_them() -> None:
    engine = FakeEngine(b"abc" * 100)
    model = AutoGLM(engine)
    stream = model.stream("x", raw=True)
    next(stream)
    said: list[str] = []

    def ask() -> None:
        try:
            said.append(model.generate("y" * 1000, raw=True, max_tokens=1).text)
        except EngineError as error:
            said.append(error.message)

    waiting = [threading.Thread(target=ask) for _ in range(5)]
    closers = [threading.Thread(target=model.close) for _ in range(2)]
    for thread in waiting:
        thread.start()
    time.sleep(0.01)
    for thread in closers:
        thread.start()
    time.sleep(0.01)
    assert list(stream)[-1].finish_reason == "cancelled"
    for thread in (*waiting, *closers):
        thread.join(10)
    assert said == ["model: closed"] * 5
    assert engine.closed
    assert engine.n_evaluated < 1000


def test_close_by_two_threads_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    model = AutoGLM(engine)
    both = threading.Barrier(2)
    monkeypatch.setattr(model, "cancel", lambda: both.wait(10))  # both are past the first look
    errors: list[BaseException] = []

    def close() -> None:
        try:
            model.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=close) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert errors == []
    assert engine.closed


def test_close_from_another_thread_cancels_the_answer() -> None:
    engine = FakeEngine(ENDLESS, n_ctx=ROOMY)
    model = AutoGLM(engine)
    begun = threading.Event()
    chunks: list[Chunk] = []

    def read() -> None:
        for chunk in model.stream("?", raw=True):
            chunks.append(chunk)
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(10)
    model.close()
    reader.join(10)
    assert engine.closed
    assert chunks[-1].finish_reason == "cancelled"
    assert len(chunks) < len(ENDLESS)


# --- async ---


def test_astream_gives_what_stream_gives() -> None:
    async def read() -> list[str]:
        return [chunk.text async for chunk in raw_model("好的".encode()).astream("?", raw=True)]

    assert asyncio.run(read()) == ["好", "的", ""]


def test_astream_raises_what_stream_raises() -> None:
    async def read() -> None:
        async for _ in raw_model(b"", n_ctx=8).astream("too long a prompt", raw=True):
            pass

    with pytest.raises(ContextFullError):
        asyncio.run(read())


def test_astream_leaves_the_loop_free_while_it_waits_for_the_engine() -> None:
    async def read() -> tuple[str, str]:
        model = raw_model(b"abc")
        held = model.stream("?", raw=True)
        next(held)

        async def ask() -> str:
            return "".join([c.text async for c in model.astream("?", raw=True)])

        waiting = asyncio.ensure_future(ask())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        rest = collect(held).text
        return rest, await asyncio.wait_for(waiting, 10)

    assert asyncio.run(read()) == ("bc", "abc")


def test_astream_stops_the_work_when_closed_early() -> None:
    async def read() -> tuple[int, str]:
        engine = FakeEngine(ENDLESS, n_ctx=ROOMY)
        model = AutoGLM(engine)
        chunks = model.astream("?", raw=True)
        assert (await anext(chunks)).text == "x"
        await chunks.aclose()  # type: ignore[attr-defined]
        n_evaluated = len(engine.evaluated)
        return n_evaluated, model.generate("?", raw=True, max_tokens=2).text

    n_evaluated, after = asyncio.run(read())
    assert n_evaluated < len(ENDLESS)
    assert after == "xx"


def test_astream_stops_the_work_when_its_task_is_cancelled() -> None:
    async def read() -> tuple[int, str]:
        engine = FakeEngine(ENDLESS, n_ctx=ROOMY)
        model = AutoGLM(engine)
        begun = asyncio.Event()

        async def ask() -> None:
            async for _ in model.astream("?", raw=True):
                begun.set()

        task = asyncio.ensure_future(ask())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(engine.evaluated), model.generate("?", raw=True, max_tokens=2).text

    n_evaluated, after = asyncio.run(read())
    assert n_evaluated < len(ENDLESS)
    assert after == "xx"


def test_cancel_ends_an_astream() -> None:
    async def read() -> list[Chunk]:
        model = raw_model(ENDLESS, ROOMY)
        chunks = []
        async for chunk in model.astream("?", raw=True):
            chunks.append(chunk)
            model.cancel()
        return chunks

    chunks = asyncio.run(read())
    assert chunks[-1].finish_reason == "cancelled"
    assert len(chunks) < len(ENDLESS)


# --- memory ---


def test_memory_is_the_process_with_the_models_device_buffers() -> None:
    engine = FakeEngine()
    engine.device_bytes = 2**40
    usage = AutoGLM(engine).memory()
    alone = measure_memory()
    if usage is None or alone is None:
        pytest.skip("this system does not say")
    assert usage.device_bytes == 2**40
    assert usage.total_bytes - 2**40 == pytest.approx(alone.total_bytes, rel=0.1)
    assert usage.peak_bytes - 2**40 == pytest.approx(alone.peak_bytes, rel=0.1)


# --- act ---

ANSWER = '<think>在桌面</think>\n<answer>do(action="Launch", app="微信")</answer>'


def test_act_returns_thinking_and_action() -> None:
    step = raw_model(ANSWER.encode()).act("打开微信", SCREEN)
    assert step.thinking == "在桌面"
    assert step.action == Launch(app="微信")
    assert step.text == ANSWER.removesuffix("</answer>")
    assert step.usage.image_tokens == 24


@pytest.mark.parametrize("stop", [(), "never", ["never"], ("never",)])
def test_act_ends_at_the_end_of_answer_on_any_model(stop: str | Sequence[str]) -> None:
    model = AutoGLM(FakeEngine(f"{ANSWER} and more".encode(), stop_strings=()))
    assert model.act("打开微信", stop=stop).text == ANSWER.removesuffix("</answer>")
    step = asyncio.run(model.aact("打开微信", stop=stop))
    assert step.text == ANSWER.removesuffix("</answer>")


def test_act_keeps_the_callers_stops() -> None:
    model = AutoGLM(FakeEngine(b'do(action="Home") STOP </answer>', stop_strings=()))
    step = model.act("home", stop="STOP", constrain=None)
    assert step.text == 'do(action="Home") '
    with pytest.raises(ValueError, match="stop: a tuple of strings"):
        model.act("home", stop=5)


def test_act_writes_the_clients_layout() -> None:
    engine = FakeEngine(ANSWER.encode())
    AutoGLM(engine, content_format="string").act("open", SCREEN, system="S", current_app="微信")
    # The act itself evaluated its answer too; the prompt comes first.
    assert evaluated_text(engine).startswith(
        "[gMASK]<sop><|system|>\nS<|user|>\n<|begin_of_image|><IMAGE><|end_of_image|>\n"
        'open\n\n{"current_app": "微信"}<|assistant|>\n'
    )


@pytest.mark.parametrize(
    ("system", "expected"), [(None, "[gMASK]<sop><|user|>"), ("S", "[gMASK]<sop><|system|>\nS<")]
)
def test_act_takes_or_leaves_the_system_prompt(system: str | None, expected: str) -> None:
    engine = FakeEngine(ANSWER.encode())
    AutoGLM(engine).act("open", system=system)
    assert evaluated_text(engine).startswith(expected)


def test_act_describes_the_actions_in_the_tasks_language_by_default() -> None:
    engine = FakeEngine(ANSWER.encode())
    AutoGLM(engine).act("打开微信")
    assert evaluated_text(engine).startswith("[gMASK]<sop><|system|>\n你是手机操作助手")


def test_act_refuses_an_answer_without_an_action() -> None:
    with pytest.raises(ActionParseError) as caught:
        raw_model(b"I do not know").act("open", constrain=None)
    assert caught.value.text == "I do not know"


def test_act_says_that_the_answer_was_cut_and_does_not_blame_the_model() -> None:
    with pytest.raises(ActionParseError, match="cut after 30 tokens") as caught:
        raw_model(ANSWER.encode()).act("open", max_tokens=30, constrain=None)
    assert ANSWER.startswith(caught.value.text)
    assert "raise max_tokens" in caught.value.hint


def test_act_says_that_it_was_cancelled() -> None:
    model = raw_model(ENDLESS, ROOMY)
    timer = threading.Timer(0.2, model.cancel)
    timer.start()
    with pytest.raises(ActionParseError, match="cancelled after"):
        model.act("open", max_tokens=ROOMY, constrain=None)
    timer.join()


def test_act_tells_that_a_text_was_closed_since_tokens_ran_out() -> None:
    long = b'<think>t</think><answer>do(action="Type", text="' + b"x" * 500 + b'")</answer>'
    step = raw_model(long).act("type", max_tokens=200)
    assert step.action.render().startswith('do(action="Type", text="xxx')
    assert step.finish_reason == "length"
    assert raw_model(long).act("type", max_tokens=800).finish_reason == "stop"


def test_aact_gives_what_act_gives() -> None:
    model = raw_model(ANSWER.encode())
    step = asyncio.run(model.aact("打开微信", SCREEN, system=None, current_app="桌面"))
    assert step.action == Launch(app="微信")
    assert step.usage == model.act("打开微信", SCREEN, system=None, current_app="桌面").usage


def test_aact_stops_the_work_when_its_task_is_cancelled() -> None:
    async def act() -> str:
        model = raw_model(ENDLESS, ROOMY)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(model.aact("open", max_tokens=ROOMY), 0.05)
        return model.generate("?", raw=True, max_tokens=1).text

    assert asyncio.run(act()) == "x"


# --- conversations ---


def test_chat_keeps_the_turns() -> None:
    engine = FakeEngine(b"yes")
    with AutoGLM(engine).chat(system="S") as chat:
        chat.send("one?")
        chat.send("two?", image=SCREEN)
        assert chat.messages == [
            Message("system", "S"),
            Message("user", "one?"),
            Message("assistant", "yes"),
            Message("user", (ImagePart(SCREEN), TextPart("two?"))),
            Message("assistant", "yes"),
        ]
        assert evaluated_text(engine).startswith(
            "[gMASK]<sop><|system|>\nS<|user|>\none?<|assistant|>\nyes<|user|>\n<|begin_of_image|>"
        )


def test_chat_clear_keeps_the_system_prompt_only() -> None:
    chat = AutoGLM(FakeEngine()).chat(system="S")
    chat.send("one?")
    chat.clear()
    assert chat.messages == [Message("system", "S")]


def test_chat_keeps_what_was_said_when_the_answer_is_closed_early() -> None:
    chat = AutoGLM(FakeEngine(b"a long answer")).chat()
    answer = chat.stream("?")
    for _ in range(6):
        next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert chat.messages == [Message("user", "?"), Message("assistant", "a long")]
    assert chat.send("?").finish_reason == "stop"


def test_chat_keeps_what_was_said_when_the_reader_raises() -> None:
    chat = AutoGLM(FakeEngine(b"a long answer")).chat()
    with pytest.raises(KeyboardInterrupt):
        for chunk in chat.stream("?"):
            if chunk.text == "l":
                raise KeyboardInterrupt
    assert chat.messages == [Message("user", "?"), Message("assistant", "a l")]


def test_chat_keeps_a_cancelled_answer() -> None:
    model = raw_model(b"answer")
    chat = model.chat()
    for _ in chat.stream("?"):
        model.cancel()
    assert chat.messages[-1] == Message("assistant", "a")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"image": "nowhere.png"}, ImageError),
        ({"max_tokens": -1}, ValueError),
        ({"surprise": 1}, TypeError),
    ],
)
def test_chat_is_unchanged_when_a_request_is_refused(
    options: dict[str, object], error: type[Exception]
) -> None:
    chat = AutoGLM(FakeEngine(b"yes")).chat()
    chat.send("one?")
    before = list(chat.messages)
    with pytest.raises(error):
        chat.send("two?", **options)  # type: ignore[arg-type]
    assert chat.messages == before


def test_chat_is_unchanged_when_the_context_is_full() -> None:
    chat = AutoGLM(FakeEngine(b"yes", n_ctx=80)).chat()
    chat.send("one?")
    before = list(chat.messages)
    with pytest.raises(ContextFullError):
        chat.send("long " * 20)
    assert chat.messages == before


def test_chat_closes_the_answer_tag_in_the_history() -> None:
    chat = AutoGLM(FakeEngine(ANSWER.encode())).chat()
    chat.send("?")
    assert chat.messages[-1].content == ANSWER


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("plain", "plain"),
        ("<answer>x", "<answer>x</answer>"),
        ("<answer>x</answer>", "<answer>x</answer>"),
    ],
)
def test_close_answer_adds_the_tag_only_where_it_is_missing(text: str, closed: str) -> None:
    assert close_answer(text) == closed


def test_astream_ends_when_cancelled_while_it_waits_for_the_engine() -> None:
    async def read() -> str:
        model = raw_model(b"abc")
        held = model.stream("?", raw=True)
        next(held)

        async def ask() -> None:
            async for _ in model.astream("?", raw=True):
                pass

        waiting = asyncio.ensure_future(ask())
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting], timeout=5)
        assert waiting.done()
        return collect(held).text

    assert asyncio.run(read()) == "bc"


def test_chat_session_keeps_the_turn_when_the_answer_is_empty() -> None:
    chat = AutoGLM(FakeEngine(b"")).chat()
    assert chat.send("hello").text == ""
    assert [message.role for message in chat.messages] == ["user", "assistant"]
