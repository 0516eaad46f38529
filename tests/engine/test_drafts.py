"""Drafts on llama.cpp: the answers of plain decoding, and what the KV cache holds after them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoglm_gguf import AutoGLM, Completion, ImagePart, Message, TextPart
from autoglm_gguf.config import ContextParams
from autoglm_gguf.engine.llama import LlamaEngine

pytestmark = pytest.mark.native
Pair = tuple[Path, Path]
WORDS = ["open", "the", "settings", "page", "tap", "wifi", "back", "one", "two", "打开", "设置"]


@pytest.fixture
def engine(random_pair: Pair) -> Iterator[LlamaEngine]:
    engine = LlamaEngine(*random_pair, ContextParams(n_ctx=1024, n_batch=64, n_threads=1))
    yield engine
    engine.close()


def repeating(seed: int) -> str:
    rng = random.Random(seed)
    phrase = " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))
    return " ".join([*rng.choices(WORDS, k=5), *[phrase] * rng.randint(2, 5)])


def is_near_tie(engine: LlamaEngine, tokens: Sequence[int]) -> bool:
    """Whether the two best tokens after a text differ by less than 1e-3 of the logits' scale."""
    engine.keep(0)
    for token in tokens:
        engine.eval_tokens([token])
    logits = np.sort(engine.logits())
    return bool(logits[-1] - logits[-2] < 1e-3 * (logits[-1] - np.median(logits)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frequency_penalty": 0.02, "repeat_penalty": 1.01},
        {"temperature": 0.03},
        {"temperature": 0.1, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=["greedy", "penalties", "sampled", "nucleus"],
)
def test_answer_with_drafts_is_that_without(engine: LlamaEngine, options: dict[str, float]) -> None:
    """Each token from its own logits, with the same draws of the seed and the same penalties."""
    model, n_accepted, n_other = AutoGLM(engine), 0, 0
    for seed in range(12):
        prompt, given = repeating(seed), {**options, "raw": True, "seed": seed, "max_tokens": 48}
        plain = model.generate(prompt, n_draft=0, cache_prompt=False, **given)
        drafted = model.generate(prompt, n_draft=(1, 3, 7)[seed % 3], cache_prompt=False, **given)
        n_accepted += drafted.timings.draft_n_accepted
        if drafted.tokens != plain.tokens:
            n_other += 1
            pairs = enumerate(zip(plain.tokens, drafted.tokens, strict=False))
            at = next((n for n, (a, b) in pairs if a != b), 0)
            text = [*engine.tokenize(prompt), *plain.tokens[:at]]
            assert "temperature" in options or is_near_tie(engine, text)
    assert n_accepted > 40, "there was something to be tested"
    assert n_other <= 1


def test_answer_about_a_screenshot_is_the_same_with_drafts(random_pair: Pair) -> None:
    """Positions after an image lie behind the cells: the cut has to count both."""
    pixels = np.random.default_rng(0).integers(0, 255, (112, 168, 3), np.uint8)
    screen = ImagePart(Image.fromarray(pixels))
    answers: list[Completion] = []
    with AutoGLM.load(random_pair[0], mmproj=random_pair[1], n_ctx=512, n_threads=1) as model:
        for seed in range(4):
            message = Message("user", (screen, TextPart(repeating(seed))))
            for reuse in (False, True):
                options = {"max_tokens": 40, "cache_prompt": reuse}
                plain = model.generate([message], n_draft=0, **options)
                answers.append(model.generate([message], n_draft=7, **options))
                assert answers[-1].tokens == plain.tokens
    assert sum(answer.timings.draft_n_accepted for answer in answers) > 20


def test_kv_cache_after_drafts_is_that_of_a_fresh_prompt(engine: LlamaEngine) -> None:
    """Tokens that did not come leave nothing behind."""
    text = engine.tokenize(repeating(0))[:64]
    engine.eval_tokens(text)
    engine.eval_tokens([text[0], 5, 6, 7], n_outputs=4)
    engine.keep(len(text) + 1)
    engine.eval_tokens([9])
    found = engine.logits()
    engine.keep(0)
    engine.eval_tokens(text)
    engine.eval_tokens([text[0]])
    engine.eval_tokens([9])
    scale = float(np.ptp(found))
    np.testing.assert_allclose(engine.logits(), found, atol=1e-3 * scale)


def test_more_outputs_than_planned_are_refused(engine: LlamaEngine) -> None:
    """llama.cpp would end the process."""
    assert engine.info.n_draft_max == 7
    engine.eval_tokens(list(range(8)), n_outputs=8)
    with pytest.raises(ValueError, match="9 outputs"):
        engine.eval_tokens(list(range(9)), n_outputs=9)


@pytest.mark.parametrize(("n_batch", "n_draft_max", "wanted"), [(64, 0, 0), (4, 7, 3), (1, 7, 0)])
def test_drafts_fit_the_batch(
    random_pair: Pair, n_batch: int, n_draft_max: int, wanted: int
) -> None:
    params = ContextParams(n_ctx=256, n_batch=n_batch, n_draft_max=n_draft_max, n_threads=1)
    engine = LlamaEngine(random_pair[0], None, params)
    assert engine.info.n_draft_max == wanted
    answer = AutoGLM(engine).generate("one two " * 8, raw=True, n_draft=7, max_tokens=24)
    assert len(answer.tokens) == 24
    engine.close()
