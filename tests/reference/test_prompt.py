"""Rendered prompts and token ids against transformers' own."""

from __future__ import annotations

import random
from typing import Any

import pytest
from parity import Original

from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.messages import parse_messages
from autoglm_gguf.prompt import render_prompt

pytestmark = [pytest.mark.reference, pytest.mark.native]

TEXTS = [
    "打开微信，给张三发一条“今晚八点见”的消息。",
    "Open Chrome, search for 'weather in Paris', and don't close the tab.",
    "for (int i = 0; i < 1024; ++i) {\r\n\tsum += a[i] * 3.14159;\r\n}\n\n\n// 注释",
    "🎉👨‍👩‍👧‍👦 emoji 🇨🇳 and ｆｕｌｌ－ｗｉｄｔｈ ①②③",
    "literal <|user|> and <|image|> and <think>a</think><answer>b</answer> and <|endoftext|>",
    "  leading,   inner  and trailing spaces   \n \n  ",
    "1234567890 12 999 1000 ½ ٣",
    "Ünïcödé naïve café Привет مرحبا こんにちは 한국어",
    "",
    "a",
]


def random_text(rng: random.Random) -> str:
    alphabet = "ab 12\n\t,.'’!?<>|=[](){}微信打开。，é🎉\r\u00a0\u3000"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60)))


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_equal_the_original_tokenizers(
    tiny: Original, tiny_engine: LlamaEngine, text: str
) -> None:
    expected = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tiny_engine.tokenize(text) == expected


def test_token_ids_equal_the_original_tokenizers_on_random_text(
    tiny: Original, tiny_engine: LlamaEngine
) -> None:
    rng = random.Random(7)
    for _ in range(300):
        text = random_text(rng)
        expected = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tiny_engine.tokenize(text) == expected, repr(text)


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one_user": [{"role": "user", "content": "打开微信"}],
    "system": [
        {"role": "system", "content": "今天的日期是: 2026年11月22日\nYou operate a phone."},
        {"role": "user", "content": "Open Chrome"},
    ],
    "image": [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "screen.png"},
                {"type": "text", "text": '打开微信\n\n{"current_app": "桌面"}'},
            ],
        }
    ],
    "history": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "Open Chrome"}]},
        {
            "role": "assistant",
            "content": '<think>t</think><answer>do(action="Launch", app="Chrome")</answer>',
        },
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "b.png"},
                {"type": "text", "text": '** Screen Info **\n\n{"current_app": "Chrome"}'},
            ],
        },
    ],
    "spaces_and_braces": [{"role": "user", "content": "  {{ 7 * 7 }} {% x %} \n\n "}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompt_equals_the_originals_rendering(
    tiny: Original, tiny_engine: LlamaEngine, name: str, add_generation_prompt: bool
) -> None:
    check_rendering(tiny, tiny_engine, CONVERSATIONS[name], add_generation_prompt)


def test_random_checkpoints_prompts_and_ids_equal_the_originals(
    random_original: tuple[Original, LlamaEngine],
) -> None:
    """Other special tokens and another template among them."""
    original, engine = random_original
    for messages in CONVERSATIONS.values():
        text = check_rendering(original, engine, messages, True)
        expected = original.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert engine.tokenize(text) == expected
    rng = random.Random(11)
    for text in [*TEXTS, *(random_text(rng) for _ in range(50))]:
        expected = original.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert engine.tokenize(text) == expected, repr(text)


def check_rendering(
    original: Original,
    engine: LlamaEngine,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
) -> str:
    expected: str = original.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    template = engine.info.chat_template
    assert template is not None
    ours = render_prompt(
        parse_messages(messages), template, add_generation_prompt=add_generation_prompt
    )
    assert ours.text == expected
    return expected
