"""Guessed tokens never change an answer: what comes, when it ends, and what is held after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from PIL import Image

from autoglm_gguf import (
    AutoGLM,
    Chunk,
    Completion,
    EngineError,
    ImagePart,
    Message,
    TextPart,
)
from autoglm_gguf.config import ContextParams, SamplingParams
from autoglm_gguf.drafting import Drafts
from autoglm_gguf.engine.fake import STOP, FakeEngine
from autoglm_gguf.lookup import Profit
from autoglm_gguf.messages import collect
from autoglm_gguf.stopping import StopFlag

TEXT = b"tap the red button, then tap the red button again, then tap the blue one"


class Counting(FakeEngine):
    """Remembers its batches."""

    batches: list[tuple[bytes, int]]

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        super().eval_tokens(tokens, n_outputs=n_outputs)
        self.batches.append((bytes(t for t in tokens if t < STOP), n_outputs))


def counting(answer: bytes | Callable[[str], bytes] = TEXT, **options: int) -> Counting:
    engine = Counting(answer, n_draft_max=7, **options)  # type: ignore[arg-type]
    engine.batches = []
    return engine


def same(answer: bytes, prompt: str, **options: object) -> tuple[Completion, Counting]:
    """The answer with drafts, after it was found to be the one without, and held as that."""
    plain, drafted = counting(answer), counting(answer)
    wanted = AutoGLM(plain).generate(prompt, raw=True, n_draft=0, **options)
    found = AutoGLM(drafted).generate(prompt, raw=True, n_draft=7, **options)
    assert (found.text, found.tokens) == (wanted.text, wanted.tokens)
    assert (found.finish_reason, found.usage) == (wanted.finish_reason, wanted.usage)
    assert drafted.evaluated == plain.evaluated
    assert wanted.timings.draft_n == 0
    return found, drafted


def test_answer_that_repeats_itself_takes_fewer_batches() -> None:
    answer, engine = same(TEXT, "?")
    timings = answer.timings
    n_new = len(answer.tokens) - 1  # the last one is not evaluated
    assert len(engine.batches) - 1 == n_new - timings.draft_n_accepted < n_new - 20
    assert timings.draft_n > timings.draft_n_accepted > 20


def test_answer_that_repeats_its_prompt_takes_fewer_batches() -> None:
    answer, engine = same(b"Open Wi-Fi settings", "Please open Wi-Fi settings. ")
    assert (b"en Wi-Fi", 8) in engine.batches
    assert answer.timings.draft_n_accepted >= 12


def test_guesses_that_never_come_true_change_nothing() -> None:
    answer, engine = same(b"ab1ab2ab3ab4", "ab?")
    assert answer.timings.draft_n > 10 > answer.timings.draft_n_accepted == 0
    assert len(engine.batches) == 1 + 12


def test_turn_that_ends_among_the_drafts_ends_there() -> None:
    answer, engine = same(b"one two", "one two three ")
    assert answer.text == "one two"
    assert answer.tokens[-1] == STOP
    assert engine.batches[-1] == (b"ne two t", 8), "drafted beyond the end"
    assert bytes(engine.evaluated) == b"one two three one two"


@pytest.mark.parametrize("n", range(1, 9))
def test_max_tokens_end_the_answer_among_the_drafts(n: int) -> None:
    answer, engine = same(b"one two three", "one two three ", max_tokens=n)
    assert answer.finish_reason == "length"
    assert engine.n_evaluated <= len("one two three ") + n, "nothing is drafted beyond the limit"


def test_context_that_fills_up_ends_the_answer_among_the_drafts() -> None:
    engine = counting(b"ab" * 99, n_ctx=32)
    answer = AutoGLM(engine).generate("abababab", raw=True, n_draft=7)
    assert answer.finish_reason == "length"
    assert answer.usage.total_tokens == 33
    assert len(engine.evaluated) == 32


def test_stop_string_ends_the_answer_among_the_drafts() -> None:
    answer, _ = same(b"one two three four", "one two three four ", stop=[" thr"])
    assert answer.text == "one two"


def test_stop_token_is_not_drafted() -> None:
    engine = counting(b"!")
    engine.eval_tokens([97, 98, STOP, 97])
    sampler = engine.open_sampler(SamplingParams())
    params = SamplingParams(n_draft=7)
    drafts = Drafts(engine, sampler, engine.content.pieces, params, Profit(), lambda: 0.0)
    drafts.follow([98], 50, 0.0)
    assert engine.content.pieces == (97, 98, STOP, 97, 98)


def test_drafts_are_shown_token_by_token() -> None:
    chunks = AutoGLM(counting(b"one two")).stream("one two ", raw=True, n_draft=7)
    assert [chunk.text for chunk in chunks] == [*"one two", ""]


def test_stream_closed_among_the_drafts_keeps_what_was_right() -> None:
    engine = counting(b"one two")
    model = AutoGLM(engine)
    stream = model.stream("one two ", raw=True, n_draft=7)
    assert "".join(next(stream).text for _ in range(4)) == "one "
    stream.close()
    assert bytes(engine.evaluated) == b"one two one"
    assert model.generate("one two one ", raw=True).timings.cache_n == 11


class Stopping(Counting):
    """The run is cancelled while the first batch with drafts is evaluated."""

    flag = StopFlag()

    def watch(self, stop: StopFlag) -> None:
        super().watch(stop)
        self.flag = stop

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        if n_outputs > 1:
            self.flag.set()
        super().eval_tokens(tokens, n_outputs=n_outputs)


def test_batch_with_drafts_that_is_cancelled_does_not_count() -> None:
    engine = Stopping(b"one two", n_draft_max=7)
    engine.batches = []
    answer = AutoGLM(engine).generate("one two ", raw=True, n_draft=7)
    assert (answer.text, answer.finish_reason) == ("on", "cancelled")
    assert bytes(engine.evaluated) == b"one two o"
    assert answer.timings.draft_n == 0


def test_answer_cancelled_among_the_drafts_ends_there() -> None:
    model = AutoGLM(counting(b"one two"))
    stream = model.stream("one two ", raw=True, n_draft=7)

    def read() -> Iterator[Chunk]:
        for n, chunk in enumerate(stream):
            if n == 3:
                model.cancel()
            yield chunk

    answer = collect(read())
    assert (answer.text, answer.finish_reason) == ("one t", "cancelled")


class Failing(Counting):
    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        if n_outputs > 1:
            raise EngineError("llama.cpp: decode failed")
        super().eval_tokens(tokens, n_outputs=n_outputs)


def test_failure_leaves_what_was_evaluated_before_the_drafts() -> None:
    engine = Failing(b"one two", n_draft_max=7)
    engine.batches = []
    model = AutoGLM(engine)
    with pytest.raises(EngineError, match="decode failed"):
        model.generate("one two ", raw=True, n_draft=7)
    assert bytes(engine.evaluated) == b"one two o"
    assert model.generate("one two ", raw=True, n_draft=0).text == "one two"


@pytest.mark.parametrize("said", ["Tap", "Launch"])
def test_held_answer_is_the_same_with_drafts(said: str) -> None:
    """Forced tokens and guesses meet: forced ones may be guessed, and guesses refused."""
    call = {"Tap": "element=[500,3]", "Launch": 'app="Wi-Fi"'}[said]
    answer = f'<think>again</think><answer>do(action="{said}", {call})'
    before = f'<think>again</think><answer>do(action="{said}", element=[500,300])</answer>'
    history = [Message("user", "t"), Message("assistant", before), Message("user", "t")]
    plain, drafted = counting(answer.encode()), counting(answer.encode())
    wanted = AutoGLM(plain).generate(history, constrain="action", n_draft=0)
    found = AutoGLM(drafted).generate(history, constrain="action", n_draft=7)
    assert (found.text, found.tokens) == (wanted.text, wanted.tokens)
    assert found.text.endswith(f"{call})")
    assert drafted.evaluated == plain.evaluated
    assert len(drafted.batches) < len(plain.batches)


def test_text_around_an_image_is_repeated() -> None:
    screen = ImagePart(Image.new("RGB", (112, 168), "red"))
    message = Message("user", (TextPart("look at "), screen, TextPart(" this screen")))
    engine = counting(b"look at this")
    answer = AutoGLM(engine).generate([message], n_draft=7)
    assert answer.text == "look at this"
    assert (b"look at ", 8) in engine.batches


# --- left to the clock ---


def test_batches_are_timed_until_a_token_was_sampled_from_them() -> None:
    """Two tokens cost as much as one, a token 1 s: a guess that proved right is drafted."""
    engine = counting(b"abcdefgh" * 20)
    engine.eval_tokens(b"abcdefgh" * 8)
    sampler = engine.open_sampler(SamplingParams())
    time = 0.0
    drafts = Drafts(
        engine, sampler, engine.content.pieces, SamplingParams(), Profit(), lambda: time
    )
    for n in range(24):
        drafts.follow([b"abcdefgh"[n % 8]], 100, time)
        time += 1.0 if sampler.output == 0 else 0.0
    assert [tokens for tokens, _ in engine.batches[1:4]] == [b"a", b"b", b"c"]
    assert drafts.n_drafted > 10
    assert drafts.n_accepted >= drafts.n_drafted - 7


def test_nothing_is_drafted_where_the_answer_is_wanted_to_the_last_bit() -> None:
    options = {"raw": True, "cache_prompt": False}
    for n_draft, wanted in ((None, 0), (3, 3)):
        engine = counting(b"abc" * 200)
        found = AutoGLM(engine).generate("abc" * 20, n_draft=n_draft, **options)  # type: ignore[arg-type]
        assert max(n for _, n in engine.batches) == 1 + wanted
        assert (found.timings.draft_n > 0) == (wanted > 0)


def test_engine_without_room_for_drafts_gets_none() -> None:
    engine = FakeEngine(b"abc" * 20)
    assert AutoGLM(engine).generate("abc" * 20, raw=True, n_draft=7).timings.draft_n == 0


@pytest.mark.parametrize("n_draft", [-1, 64, 1.5, True, "7"])
def test_number_of_drafts_that_cannot_be_is_refused(n_draft: object) -> None:
    with pytest.raises((ValueError, TypeError), match="n_draft"):
        SamplingParams(n_draft=n_draft)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match="n_draft_max"):
        ContextParams(n_draft_max=n_draft)  # type: ignore[arg-type]


def test_outputs_are_no_more_than_a_batch() -> None:
    params = ContextParams()
    assert params.n_outputs_max == 8
    assert replace(params, n_batch=4).n_outputs_max == 4
    assert replace(params, n_draft_max=0).n_outputs_max == 1
