"""What a request costs: only what is new is evaluated, and what was not finished is forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from PIL import Image

from autoglm_gguf import (
    AutoGLM,
    Chunk,
    ContextFullError,
    EngineError,
    ImagePart,
    Message,
    TextPart,
    TokenBudget,
)
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.stopping import StopFlag

N_IMAGE = 24


def screen(colour: str) -> Image.Image:
    return Image.new("RGB", (112, 168), colour)  # 4 x 6 image tokens, no resize needed


def user(text: str, image: Image.Image | None = None) -> Message:
    return Message("user", text if image is None else (ImagePart(image), TextPart(text)))


def cost(model: AutoGLM, prompt: str | Sequence[Message], **options: object) -> tuple[int, int]:
    """KV cells taken from the cache, and evaluated, for a prompt."""
    timings = model.generate(prompt, **options).timings
    return timings.cache_n, timings.prompt_n


def test_prompt_that_goes_on_costs_what_is_new() -> None:
    model = AutoGLM(FakeEngine(b"!"))
    assert cost(model, "one", raw=True) == (0, 3)
    assert cost(model, "one!two", raw=True) == (4, 3), "the answer is held too"
    assert cost(model, "one!", raw=True) == (3, 1), "the last token gives the logits"
    assert cost(model, "other", raw=True) == (1, 4)


def test_prompt_is_evaluated_whole_where_the_cache_is_declined() -> None:
    model = AutoGLM(FakeEngine(b"!"))
    cost(model, "one", raw=True)
    assert cost(model, "one", raw=True, cache_prompt=False) == (0, 3)


def test_usage_counts_the_whole_prompt_wherever_it_came_from() -> None:
    model = AutoGLM(FakeEngine(b"!"))
    usages = [model.generate([user("?", screen("red"))], max_tokens=1).usage for _ in range(2)]
    assert usages[0] == usages[1]


def test_agent_step_costs_what_is_new_and_what_the_removed_image_invalidates() -> None:
    """The client's history: the last screenshot is taken out, its answer appended."""
    engine = FakeEngine(b"<answer>x</answer>")
    model = AutoGLM(engine)
    history = [Message("system", "S" * 50), user("task", screen("red"))]
    first = model.generate(history)
    before = engine.content.pieces
    history[-1:] = [user("task"), Message("assistant", first.text + "</answer>")]
    history.append(user("next", screen("blue")))
    second = model.generate(history)

    prompt = model.render(history)
    head = prompt.text.index("task")
    assert prompt.text[:head] == "".join(chr(p) for p in before[:head] if isinstance(p, int))
    begin = prompt.text[:head]  # up to where the image was: <|begin_of_image|> is not there now
    assert second.timings.cache_n == len(begin.encode())
    n_all = sum(len(s.encode()) for s in prompt.segments) + N_IMAGE
    assert second.timings.prompt_n == n_all - second.timings.cache_n
    assert second.usage.prompt_tokens == n_all


def test_image_seen_before_is_not_encoded_again() -> None:
    engine = FakeEngine(b"!")
    model = AutoGLM(engine)
    for text in ("a", "b", "a"):
        model.generate([Message("system", text), user("?", screen("red"))])
    assert engine.n_encoded == 1
    model.generate([user("?", screen("blue"))])
    assert engine.n_encoded == 2


def test_same_conversation_with_another_image_is_not_taken_from_the_cache() -> None:
    model = AutoGLM(FakeEngine(b"!"))
    cost(model, [user("?", screen("red"))])
    kept, evaluated = cost(model, [user("?", screen("blue"))])
    assert kept == model.render([user("")]).text.index("<|assistant|>") + len("<|begin_of_image|>")
    assert evaluated > N_IMAGE


class StoppingEngine(FakeEngine):
    """The run is cancelled while the n-th batch is evaluated."""

    n_left = -1
    flag = StopFlag()

    def watch(self, stop: StopFlag) -> None:
        super().watch(stop)
        self.flag = stop

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        self.n_left -= 1
        if self.n_left == 0:
            self.flag.set()
        super().eval_tokens(tokens, n_outputs=n_outputs)


@pytest.mark.parametrize(("n", "text", "n_kept"), [(1, "", 0), (2, "", 64), (4, "a", 150)])
def test_batch_that_is_cancelled_does_not_count(n: int, text: str, n_kept: int) -> None:
    engine = StoppingEngine(b"abc")
    model = AutoGLM(engine)
    engine.n_left = n
    chunks: list[Chunk] = list(model.stream("p" * 150, raw=True))
    assert chunks[-1].finish_reason == "cancelled"
    assert "".join(c.text for c in chunks) == text
    assert len(engine.evaluated) == n_kept
    assert model.generate("p" * 150, raw=True).text == "abc", "the model stays usable"


class FailingEngine(FakeEngine):
    """A batch fails, once."""

    fails = False

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        if self.fails and len(self.evaluated) > 64:
            self.fails = False
            raise EngineError("llama.cpp: decode failed")
        super().eval_tokens(tokens, n_outputs=n_outputs)


def test_failure_leaves_what_was_evaluated_before_it() -> None:
    engine = FailingEngine(b"abc")
    engine.fails = True
    model = AutoGLM(engine)
    with pytest.raises(EngineError, match="decode failed"):
        model.generate("p" * 150, raw=True)
    assert cost(model, "p" * 150, raw=True) == (128, 22)


def test_prompt_that_does_not_fit_leaves_the_cache_as_it_was() -> None:
    model = AutoGLM(FakeEngine(b"!", n_ctx=64))
    cost(model, "one", raw=True)
    with pytest.raises(ContextFullError):
        model.generate("x" * 64, raw=True)
    assert cost(model, "one!?", raw=True) == (4, 1)


# --- token budgets ---


def talk(n_turns: int) -> list[Message]:
    messages = [Message("system", "S")]
    for n in range(n_turns):
        messages += [Message("user", f"question {n}"), Message("assistant", f"answer {n}")]
    return [*messages, Message("user", "last?")]


def test_oldest_turns_are_left_out_and_the_result_says_how_many() -> None:
    engine = FakeEngine(b"!", n_ctx=512)
    model = AutoGLM(engine)
    assert model.generate(talk(2)).usage.dropped_messages == 0
    usage = model.generate(talk(30), max_tokens=64).usage
    assert usage.dropped_messages > 2
    assert usage.dropped_messages % 2 == 0, "whole turns"
    said = bytes(token for token in engine.evaluated if token < 256).decode()
    assert "<|system|>\nS" in said
    assert "question 0" not in said
    assert "question 29" in said
    assert "last?" in said
    assert usage.prompt_tokens <= 512 - 64


def test_prompt_budget_counts_beside_the_newest_image() -> None:
    model = AutoGLM(FakeEngine(b"!"), token_budget=TokenBudget(prompt=200))
    messages = [*talk(4)[:-1], user("last?", screen("red"))]
    usage = model.generate(messages).usage
    assert 0 < usage.dropped_messages < 8
    assert usage.prompt_tokens <= 200 + N_IMAGE


def test_message_over_the_prompt_budget_is_refused_with_counts() -> None:
    model = AutoGLM(FakeEngine(b"!"), token_budget=TokenBudget(prompt=50))
    with pytest.raises(ContextFullError, match=r"over the token budget \(\d+ tokens, 50 at most"):
        model.generate("x" * 60)


def test_turn_that_goes_takes_its_image_out_of_the_budget() -> None:
    model = AutoGLM(FakeEngine(b"!"), token_budget=TokenBudget(prompt=200))
    for n_turns in range(3, 12):
        messages = [user("look", screen("red")), Message("assistant", "ok"), *talk(n_turns)[1:]]
        usage = model.generate(messages).usage
        assert usage.image_tokens in (0, N_IMAGE)
        assert usage.prompt_tokens <= 200 + usage.image_tokens
        assert usage.dropped_messages % 2 == 0, "whole turns"


def test_message_that_n_ctx_does_not_hold_is_no_matter_of_a_larger_budget() -> None:
    model = AutoGLM(FakeEngine(b"!", n_ctx=400), token_budget=TokenBudget(prompt=6000))
    assert model.generate("x" * 350).finish_reason == "stop", "as without a budget"
    with pytest.raises(ContextFullError, match="does not fit the context") as caught:
        model.generate("x" * 400)
    assert caught.value.hint.startswith("raise n_ctx")


def test_thinking_over_its_budget_is_closed_and_the_answer_begun() -> None:
    engine = FakeEngine(b"<think>" + b"hm " * 100)
    model = AutoGLM(engine, token_budget=TokenBudget(thinking=16, answer=40))
    answer = model.generate("?")
    assert answer.text.startswith("<think>" + "hm hm hm " + "</think><answer>")
    assert answer.usage.completion_tokens == 16 + 40
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(("asked_for", "n_thought"), [(8, 8), (100, 16)])
def test_thinking_asked_for_stays_within_the_budget(asked_for: int, n_thought: int) -> None:
    model = AutoGLM(FakeEngine(b"<think>" + b"hm " * 100), token_budget=TokenBudget(thinking=16))
    answer = model.generate("?", max_thinking_tokens=asked_for, max_tokens=60)
    assert answer.text.index("</think>") == n_thought


@pytest.mark.parametrize("said", [b"no tags, " * 9, b"<think>short</think>" + b"answer " * 9])
def test_text_that_is_no_thinking_is_left_alone(said: bytes) -> None:
    model = AutoGLM(FakeEngine(said), token_budget=TokenBudget(thinking=21))
    assert model.generate("?").text == said.decode()


def test_thinking_before_an_action_is_ended_too_where_no_tag_marks_it() -> None:
    model = AutoGLM(FakeEngine(b"hm " * 100))
    answer = model.generate("?", constrain="action", max_thinking_tokens=9, max_tokens=200)
    assert answer.text.startswith("hm hm hm <answer>")


@pytest.mark.parametrize(("n_ctx", "noted"), [(399, True), (400, False)])
def test_token_budget_that_n_ctx_does_not_hold_is_noted(n_ctx: int, noted: bool) -> None:
    budget = TokenBudget(prompt=300, image=9000, answer=100)  # no image comes: none is counted
    notes = AutoGLM(FakeEngine(b"!", n_ctx=n_ctx, vision=False), token_budget=budget).info.notes
    assert notes == (
        (
            "token budget: its parts take 400 tokens, n_ctx is 399: turns are left out earlier, or "
            "answers cut",
        )
        if noted
        else ()
    )


def test_token_budget_gives_the_sizes_of_a_context() -> None:
    assert TokenBudget(3000, 1024, 200, 100).sizes() == {"n_ctx": 4324, "max_image_tokens": 1024}
    assert TokenBudget(prompt=3000).sizes() == {}
    without_image = TokenBudget(prompt=3000, answer=100)
    assert without_image.sizes() == {}, "an image of any size may come"
    assert without_image.sizes(with_images=False) == {"n_ctx": 3100}
