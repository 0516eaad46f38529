"""How probable tokens were held: the arithmetic, and what an answer tells of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoglm_gguf import AutoGLM, Chunk, TokenLogprob
from autoglm_gguf.config import ContextParams
from autoglm_gguf.engine.fake import STOP, FakeEngine
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.logprobs import find_logprobs
from autoglm_gguf.messages import collect

N_VOCAB = 151_552  # AutoGLM-Phone-9B's


def test_logprobs_are_logarithms_of_probabilities() -> None:
    logits = np.log(np.array([1, 2, 5, 2], np.float32))
    own, top = find_logprobs(logits, 0, 3)
    assert own == pytest.approx(math.log(0.1), abs=1e-6)
    assert [n for n, _ in top] == [2, 1, 3], "equal ones by id"
    assert [x for _, x in top] == pytest.approx([math.log(p) for p in (0.5, 0.2, 0.2)], abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
def test_logprobs_of_a_full_vocabulary_are_exact(shift: float) -> None:
    """All logits equal, so every probability is 1/n; in float32 the sum alone would be off."""
    own, top = find_logprobs(np.full(N_VOCAB, shift, np.float32), N_VOCAB - 1, 20)
    assert own == pytest.approx(-math.log(N_VOCAB), abs=1e-12)
    assert [n for n, _ in top] == list(range(20))


def test_logprobs_of_a_full_vocabulary_agree_with_exact_sums() -> None:
    logits = np.random.default_rng(0).normal(0, 8, N_VOCAB).astype(np.float32)
    greatest = float(logits.max())
    whole = math.fsum(math.exp(float(x) - greatest) for x in logits)
    own, top = find_logprobs(logits, 77, 20)
    assert own == pytest.approx(float(logits[77]) - greatest - math.log(whole), abs=1e-12)
    order = sorted(range(N_VOCAB), key=lambda n: (-logits[n], n))
    assert [n for n, _ in top] == order[:20]
    assert top[0][1] == pytest.approx(-math.log(whole), abs=1e-12)


def test_token_that_cannot_come_is_minus_infinity_and_spoils_nothing() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    own, top = find_logprobs(logits, 2, 4)
    assert own == -math.inf
    assert top == [(1, math.log(0.5)), (3, math.log(0.5)), (0, -math.inf), (2, -math.inf)]


def test_more_tokens_than_there_are_lists_all() -> None:
    assert len(find_logprobs(np.zeros(3, np.float32), 0, 20)[1]) == 3


# --- what an answer tells ---


def test_nothing_is_told_or_asked_of_the_engine_unless_wanted() -> None:
    class Silent(FakeEngine):
        def logits(self, index: int = -1) -> np.ndarray:
            raise AssertionError("asked")

    assert AutoGLM(Silent(b"abc")).generate("x", raw=True).logprobs == ()


def test_each_token_has_its_logprob_and_the_top_ones() -> None:
    answer = AutoGLM(FakeEngine(b"ab")).generate("x", raw=True, logprobs=True, top_logprobs=2)
    assert [entry.token for entry in answer.logprobs] == list(answer.tokens) == [97, 98, STOP]
    assert [entry.bytes for entry in answer.logprobs] == [b"a", b"b", b""]
    engine = FakeEngine(b"ab")
    engine.open_sampler(None)  # type: ignore[arg-type]
    logits = engine.logits().astype(float)
    wanted = logits[97] - math.log(np.exp(logits).sum())
    assert answer.logprobs[0].logprob == pytest.approx(wanted)
    best, second = answer.logprobs[0].top
    assert (best.token, best.bytes, best.logprob) == (97, b"a", answer.logprobs[0].logprob)
    assert second.token == 0
    assert second.logprob is not None and second.logprob < wanted


def test_chunks_logprobs_are_parallel_to_their_tokens() -> None:
    """A character of three bytes is shown in one piece; a stop string holds text back."""
    model = AutoGLM(FakeEngine("a好b<x".encode()))
    chunks = list(model.stream("x", raw=True, logprobs=True, stop=["<x>"]))
    for chunk in chunks:
        assert [entry.token for entry in chunk.logprobs] == list(chunk.tokens)
    assert any(len(chunk.tokens) == 3 for chunk in chunks)
    assert collect(chunks).logprobs == tuple(e for chunk in chunks for e in chunk.logprobs)
    assert len(collect(chunks).logprobs) == 1 + 3 + 1 + 2 + 1


def test_logprobs_do_not_change_the_answer() -> None:
    model = AutoGLM(FakeEngine(b'<think>t</think><answer>finish(message="m")'))
    plain = model.generate("x", constrain="action")
    rated = model.generate("x", constrain="action", logprobs=True, top_logprobs=20)
    assert (plain.text, plain.tokens, plain.usage) == (rated.text, rated.tokens, rated.usage)


def test_tokens_that_a_constraint_appends_have_no_logprob() -> None:
    answer = AutoGLM(FakeEngine(b'<answer>do(action="Back")')).generate(
        "x", constrain="action", logprobs=True, top_logprobs=1
    )
    shown = b"".join(entry.bytes for entry in answer.logprobs)
    assert shown == b'<answer>do(action="Back")', "forced ones are told too"
    asked = [entry for entry in answer.logprobs if entry.logprob is not None]
    forced = [entry for entry in answer.logprobs if entry.logprob is None]
    assert asked and forced
    assert all(len(entry.top) == 1 for entry in asked)
    assert all(entry.top == () for entry in forced)
    assert asked[0].bytes == b"<"


def test_cancelled_answer_tells_what_was_generated() -> None:
    model = AutoGLM(FakeEngine(b"\xe5\xa5\xbd" * 3))
    chunks: list[Chunk] = []
    for chunk in model.stream("x", raw=True, logprobs=True):
        chunks.append(chunk)
        model.cancel()
    whole = collect(chunks)
    assert whole.finish_reason == "cancelled"
    assert [entry.token for entry in whole.logprobs] == list(whole.tokens)


# --- the real engine ---

Pair = tuple[Path, Path]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide)


@pytest.mark.native
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.5, "top_k": 3, "seed": 4},
        {"frequency_penalty": 2.0, "repeat_penalty": 3.0},
    ],
)
def test_logprobs_are_those_of_the_raw_logits(
    random_pair: Pair, sampling: dict[str, float]
) -> None:
    """Penalties, temperature and filters choose the token; they do not change what is told."""
    engine = LlamaEngine(random_pair[0], None, ContextParams(n_ctx=256, n_threads=1))
    with AutoGLM(engine) as model:
        answer = model.generate(
            "hello", raw=True, max_tokens=12, logprobs=True, top_logprobs=5, **sampling
        )
        engine.keep(0)
        engine.eval_tokens(engine.tokenize("hello"))
        for entry in answer.logprobs:
            wanted = log_softmax(engine.logits())
            assert entry.logprob == pytest.approx(wanted[entry.token], abs=1e-5)
            assert entry.bytes == engine.token_bytes(entry.token)
            best = np.sort(wanted)[::-1][:5]
            assert [t.logprob for t in entry.top] == pytest.approx(list(best), abs=1e-5)
            assert [wanted[t.token] for t in entry.top] == pytest.approx(list(best), abs=1e-5)
            engine.eval_tokens([entry.token])


@pytest.mark.native
def test_greedy_choice_is_first_of_the_top_after_an_image_too(random_pair: Pair) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 168, 3), np.uint8))
    with AutoGLM.load(random_pair[0], mmproj=random_pair[1], n_ctx=256) as model:
        answer = model.generate("hello", image=image, max_tokens=8, logprobs=True, top_logprobs=1)
    assert [entry.top[0] for entry in answer.logprobs] == [
        TokenLogprob(entry.token, entry.bytes, entry.logprob) for entry in answer.logprobs
    ]


@pytest.mark.native
def test_held_answer_tells_what_the_model_held_of_its_choices(random_pair: Pair) -> None:
    """A random model must be masked at nearly every token: its own favourite tops the list."""
    engine = LlamaEngine(random_pair[0], None, ContextParams(n_ctx=512, n_threads=1))
    with AutoGLM(engine) as model:
        answer = model.generate(
            "hello", raw=True, max_tokens=60, constrain="action", logprobs=True, top_logprobs=1
        )
        assert [entry.token for entry in answer.logprobs] == list(answer.tokens)
        assert any(entry.logprob is None for entry in answer.logprobs)
        masked = [e for e in answer.logprobs if e.top and e.top[0].token != e.token]
        assert masked
        for entry in masked:
            assert entry.logprob is not None and entry.top[0].logprob is not None
            assert entry.logprob <= entry.top[0].logprob
        engine.keep(0)
        engine.eval_tokens(engine.tokenize("hello"))
        for entry in answer.logprobs:
            if entry.logprob is not None:
                wanted = log_softmax(engine.logits())[entry.token]
                assert entry.logprob == pytest.approx(wanted, abs=1e-4)
            engine.eval_tokens([entry.token])
