"""The converted model's logits against transformers', text and image, every outtype."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Shape, build_checkpoint
from parity import (
    N_BATCH,
    Original,
    engine_logits,
    exact_params,
    load_original,
    lowest_cosine,
    screenshot,
)
from PIL import Image

from autoglm_gguf import ContextParams, convert
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.messages import ImagePart, Message, TextPart, parse_messages
from autoglm_gguf.prompt import render_prompt
from autoglm_gguf.vision import read_pixels

pytestmark = [pytest.mark.reference, pytest.mark.native]

SIZES = [(336, 448), (500, 777), (1080, 2400), (200, 150)]
TEXTS = [
    "[gMASK]<sop><|user|>\n打开微信<|assistant|>\n<think>用户要打开微信。</think>\n"
    '<answer>do(action="Launch", app="微信")</answer>',
    "[gMASK]<sop><|system|>\nYou operate a phone.<|user|>\nOpen Chrome and wait 3 seconds"
    "<|assistant|>\n",
    "def f(x):\n\treturn x ** 2  # 注释 🎉\n" * 12,
]


def check_text(original: Original, engine: LlamaEngine, text: str) -> None:
    ids = engine.tokenize(text)
    ours, theirs = engine_logits(engine, ids), original.logits(ids)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert lowest_cosine(ours, theirs) >= 0.99999


def check_image(original: Original, engine: LlamaEngine, image: Image.Image) -> None:
    assert engine.info.vision is not None and engine.info.chat_template is not None
    pixels = read_pixels(image, engine.info.vision)
    theirs = original.pixels(image)["image_grid_thw"][0].tolist()
    assert [1, 2 * pixels.grid[1], 2 * pixels.grid[0]] == theirs
    embedding = engine.encode_image(pixels.array, pixels.grid)
    assert lowest_cosine(embedding.data, original.embed(image)) >= 0.9999

    message = Message("user", (ImagePart(image), TextPart("打开微信 Open the third app")))
    before, after = render_prompt([message], engine.info.chat_template).segments
    head, tail = engine.tokenize(before), engine.tokenize(after)
    image_id = original.model.config.image_token_id
    expected = original.logits([*head, *[image_id] * pixels.n_tokens, *tail], image)
    ours = engine_logits(engine, head)
    engine.eval_image(embedding)
    after_image = engine_logits(engine, tail, reset=False)
    assert lowest_cosine(ours, expected[: len(head)]) >= 0.9999
    assert lowest_cosine(after_image, expected[-len(tail) :]) >= 0.9999


@pytest.mark.parametrize("text", TEXTS, ids=["chinese", "english", "code"])
def test_f32_logits_equal_the_originals(
    tiny: Original, tiny_engine: LlamaEngine, text: str
) -> None:
    check_text(tiny, tiny_engine, text)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_f32_image_and_text_equal_the_originals(
    tiny: Original, tiny_engine: LlamaEngine, size: tuple[int, int]
) -> None:
    check_image(tiny, tiny_engine, screenshot(*size))


def test_f32_image_equals_the_original_when_png_is_rgba(
    tiny: Original, tiny_engine: LlamaEngine
) -> None:
    buffer = io.BytesIO()
    screenshot(540, 1200, mode="RGBA").save(buffer, "PNG")
    check_image(tiny, tiny_engine, Image.open(buffer))


def test_random_checkpoint_text_equals_the_original(
    random_original: tuple[Original, LlamaEngine],
) -> None:
    for text in TEXTS:
        check_text(*random_original, text)


def test_random_checkpoint_image_equals_the_original(
    random_original: tuple[Original, LlamaEngine],
) -> None:
    check_image(*random_original, screenshot(500, 777))


@pytest.mark.slow
def test_official_image_limit_gives_the_originals_embeddings(tmp_path: Path) -> None:
    """1080x2400 under the official 5,000,000 pixels: 3108 image tokens."""

    directory = build_checkpoint(tmp_path / "checkpoint", Shape(vision_depth=1))
    pair = convert(directory, tmp_path, "f32")
    # Fused attention in the tower, as it is used: without it this one image takes 10 GB.
    engine = LlamaEngine(pair.text, pair.mmproj, ContextParams(n_ctx=256))
    try:
        assert engine.info.vision is not None
        image = screenshot(1080, 2400)
        pixels = read_pixels(image, engine.info.vision)
        assert pixels.n_tokens == 3108
        embedding = engine.encode_image(pixels.array, pixels.grid)
    finally:
        engine.close()
    assert lowest_cosine(embedding.data, load_original(directory).embed(image)) >= 0.9999


TRANSCRIPTS = [
    f"[gMASK]<sop>{system}<|user|>\n{asked}<|assistant|>\n<think>{thought}</think>\n<answer>{action}"
    for system, asked, thought, action in [
        ("", "打开微信", "打开微信。", 'do(action="Launch", app="微信")</answer>'),
        ("", "Open Chrome", "Open Chrome.", 'do(action="Launch", app="Chrome")</answer>'),
        ("", "点击(350,720)", "点击屏幕。", 'do(action="Tap", element=[350,720])</answer>'),
        ("", "Go back", "Go back.", 'do(action="Back")</answer>'),
        (
            "<|system|>\n你是一个手机操作助手。",
            "返回桌面",
            "回到桌面。",
            'do(action="Home")</answer>',
        ),
    ]
]


@pytest.mark.parametrize(
    ("outtype", "required", "share"), [("q8_0", 0.999, 0.9), ("q4_0", 0.98, 0.8)]
)
def test_quantised_logits_stay_close_to_the_originals(
    tiny: Original,
    tiny_pair: Callable[[str], tuple[Path, Path]],
    held_out: list[dict[str, Any]],
    outtype: str,
    required: float,
    share: float,
) -> None:
    """At every position of the transcripts; of held-out texts, at every position of most.

    Single positions where two answers compete fall lower under rounding; the model card and
    docs/reference/verify.md have the distribution.
    """
    engine = LlamaEngine(*tiny_pair(outtype), exact_params(), n_outputs_max=N_BATCH)
    try:
        assert engine.info.chat_template is not None

        def lowest(text: str) -> float:
            ids = engine.tokenize(text)
            return lowest_cosine(engine_logits(engine, ids), tiny.logits(ids))

        for transcript in TRANSCRIPTS:
            assert lowest(transcript) >= required, transcript
        found = []
        for item in held_out[::12]:
            prompt = render_prompt(parse_messages(item["messages"]), engine.info.chat_template)
            found.append(lowest(prompt.text + item["answer"]) >= required)
        assert sum(found) / len(found) >= share
    finally:
        engine.close()
