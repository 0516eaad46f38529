"""The real engine keeps its KV cache between requests: the same answers, and nothing half done."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoglm_gguf import AutoGLM, ImagePart, Message, TextPart
from autoglm_gguf.config import ContextParams
from autoglm_gguf.engine.base import ImageEmbedding
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.stopping import StopFlag, Stopped

pytestmark = pytest.mark.native
Pair = tuple[Path, Path]
PIXELS = np.random.default_rng(0).integers(0, 255, (112, 168, 3), np.uint8)
GRID = (6, 4)


@pytest.fixture
def engine(random_pair: Pair) -> LlamaEngine:
    return LlamaEngine(*random_pair, ContextParams(n_ctx=512, n_batch=16, n_threads=1))


def encode(engine: LlamaEngine) -> ImageEmbedding:
    found = engine.encode_image(PIXELS, GRID)
    return ImageEmbedding(found.data, GRID, "picture")


def test_cut_behind_an_image_gives_the_logits_of_a_fresh_prompt(engine: LlamaEngine) -> None:
    """Cells and positions after an image stay right: 24 cells, 6 positions."""
    image = encode(engine)
    engine.eval_tokens([5, 6, 7])
    engine.eval_image(image)
    engine.eval_tokens([8, 9])
    engine.eval_tokens([10])
    wanted = engine.logits()
    engine.eval_tokens([11, 12, 13])
    engine.keep(6)  # three tokens, the image, two tokens
    engine.eval_tokens([10])
    np.testing.assert_array_equal(engine.logits(), wanted)
    engine.keep(4)
    engine.eval_tokens([8, 9])
    engine.eval_tokens([10])
    np.testing.assert_array_equal(engine.logits(), wanted)


def test_cut_before_an_image_forgets_all_its_cells(engine: LlamaEngine) -> None:
    engine.eval_tokens([5, 6, 7])
    engine.eval_tokens([8])
    wanted = engine.logits()
    engine.keep(3)
    engine.eval_image(encode(engine))
    engine.eval_tokens([20])
    engine.keep(3)
    engine.eval_tokens([8])
    np.testing.assert_array_equal(engine.logits(), wanted)


@pytest.mark.parametrize("is_image", [False, True])
def test_stopped_evaluation_leaves_content_and_kv_cache_as_they_were(
    engine: LlamaEngine, is_image: bool
) -> None:
    image = encode(engine)
    engine.eval_tokens([5, 6, 7])
    stop = StopFlag()
    stop.set()
    engine.watch(stop)
    with pytest.raises(Stopped):
        if is_image:
            engine.eval_image(image)
        else:
            engine.eval_tokens([1, 2, 3])
    assert engine.content.pieces == (5, 6, 7)
    engine.watch(StopFlag())
    engine.eval_tokens([8])
    found = engine.logits()
    engine.keep(0)
    engine.eval_tokens([5, 6, 7])
    engine.eval_tokens([8])
    np.testing.assert_array_equal(engine.logits(), found)


def test_stopped_evaluation_is_no_error_in_the_log(
    engine: LlamaEngine, caplog: pytest.LogCaptureFixture
) -> None:
    stop = StopFlag()
    stop.set()
    engine.watch(stop)
    with caplog.at_level(logging.DEBUG, "autoglm_gguf.llama_cpp"), pytest.raises(Stopped):
        engine.eval_tokens([1, 2, 3])
    assert caplog.records, "llama.cpp complains of the graph that ended early"
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


def test_stopped_encoding_is_discarded_and_the_tower_stays_usable(engine: LlamaEngine) -> None:
    wanted = encode(engine).data
    stop = StopFlag()
    stop.set()
    engine.watch(stop)
    with pytest.raises(Stopped):
        engine.encode_image(PIXELS, GRID)
    engine.watch(StopFlag())
    np.testing.assert_array_equal(encode(engine).data, wanted)


def test_ctrl_c_during_the_prompt_ends_it_and_the_model_stays_usable(random_pair: Pair) -> None:
    prompt = "hello " * 300
    with AutoGLM.load(random_pair[0], mmproj=None, n_ctx=4096, n_batch=4096) as model:
        wanted = model.generate(prompt, raw=True, max_tokens=2, cache_prompt=False).tokens
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()  # within: on a busy machine it may end before this returns
            for _ in range(1000):
                model.generate(prompt, raw=True, max_tokens=2, cache_prompt=False)
        timer.join()
        found = model.generate(prompt, raw=True, max_tokens=2, cache_prompt=False)
    assert (found.tokens, found.finish_reason) == (wanted, "length")


def test_conversation_with_screenshots_answers_as_fresh_sessions_do(random_pair: Pair) -> None:
    screens = [Image.fromarray(np.roll(PIXELS, 40 * n, 0)) for n in range(4)]
    history: list[Message] = []
    with AutoGLM.load(random_pair[0], mmproj=random_pair[1], n_ctx=1024) as model:
        for screen in screens:
            history.append(Message("user", (ImagePart(screen), TextPart("what now?"))))
            fresh = model.generate(history, max_tokens=8, cache_prompt=False)
            again = model.generate(history, max_tokens=8)
            assert again.timings.prompt_n == 1
            assert again.tokens == fresh.tokens
            history[-1:] = [Message("user", "what now?"), Message("assistant", "that")]


def test_kept_cells_change_no_logit_where_sums_are_not_rounded(
    tiny_pair: Callable[[str], Pair],
) -> None:
    """f32 throughout: a wrong cell, position or embedding would show; 16 bits round more than that.

    Noise as screens, each taken out of the history again, as a phone agent's client does.
    """
    options: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "flash_attn": False}
    options |= {"type_k": "f32", "type_v": "f32"}
    said: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0, "logprobs": True}
    random = np.random.default_rng(3)
    history = [Message("system", "You operate a phone.")]
    text, mmproj = tiny_pair("f32")
    with (
        AutoGLM.load(text, mmproj=mmproj, **options) as kept,
        AutoGLM.load(text, mmproj=mmproj, **options) as fresh,
    ):
        for step in range(6):
            screen = Image.fromarray(random.integers(0, 256, (224, 112, 3), np.uint8))
            words = f"step {step}: tap the red button"
            history.append(Message("user", (ImagePart(screen), TextPart(words))))
            found = kept.generate(history, **said)
            wanted = fresh.generate(history, cache_prompt=False, **said)
            assert (found.timings.cache_n > 0, wanted.timings.cache_n) == (step > 0, 0)
            assert found.tokens == wanted.tokens
            assert found.logprobs is not None and wanted.logprobs is not None
            pairs = zip(found.logprobs, wanted.logprobs, strict=True)
            assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 1e-5
            history[-1:] = [Message("user", words), Message("assistant", found.text)]
