"""What the quantised model says against what the original says, over the held-out instructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import Original

from autoglm_gguf import AutoGLM, parse_answer
from autoglm_gguf.actions_grammar import compile_actions

pytestmark = [pytest.mark.reference, pytest.mark.native, pytest.mark.slow]

MAX_TOKENS = 96
BATCH = 24


def original_answers(original: Original, items: list[dict[str, Any]]) -> list[str]:
    """Greedy answers in f32, without the stop token; in batches of similar length."""
    import torch

    tokenizer, model = original.tokenizer, original.model
    eos = model.generation_config.eos_token_id
    prompts = [
        tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
        for item in items
    ]
    order = sorted(range(len(items)), key=lambda index: len(prompts[index]))
    answers = [""] * len(items)
    tokenizer.padding_side = "left"
    for at in range(0, len(order), BATCH):
        part = order[at : at + BATCH]
        inputs = tokenizer(
            [prompts[index] for index in part],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            out = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                eos_token_id=eos,
            )[:, inputs.input_ids.shape[1] :].tolist()
        for index, tokens in zip(part, out, strict=True):
            end = next((n for n, token in enumerate(tokens) if token in eos), len(tokens))
            answers[index] = tokenizer.decode(tokens[:end])
    return answers


def test_q8_0_answers_equal_the_originals_on_held_out_instructions(
    tiny: Original, tiny_pair: Callable[[str], tuple[Path, Path]], held_out: list[dict[str, Any]]
) -> None:
    text, mmproj = tiny_pair("q8_0")
    with AutoGLM.load(text, mmproj=mmproj, n_ctx=2048) as model:
        ours = [model.generate(item["messages"], max_tokens=MAX_TOKENS).text for item in held_out]
    theirs = original_answers(tiny, held_out)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    right = sum(
        _action(answer) == item["action"] for answer, item in zip(ours, held_out, strict=True)
    )
    assert len(held_out) >= 500
    assert same / len(held_out) >= 0.95
    assert right / len(held_out) >= 0.90


def _action(answer: str) -> str:
    return answer.rpartition("<answer>")[2].strip()


def test_held_answers_to_held_out_instructions_are_valid_and_those_that_were_stay(
    tiny_pair: Callable[[str], tuple[Path, Path]], held_out: list[dict[str, Any]]
) -> None:
    automaton = compile_actions()
    with AutoGLM.load(tiny_pair("q8_0")[0], mmproj=None, n_ctx=2048) as model:
        for item in held_out:
            # Exactly: with reuse, of two tokens that are all but equally likely the other may come.
            exactly = {"max_tokens": MAX_TOKENS, "cache_prompt": False}
            free = model.generate(item["messages"], **exactly)
            held = model.generate(item["messages"], **exactly, constrain="action")
            parse_answer(held.text)
            if automaton.after(automaton.start, free.text.encode()) == automaton.complete:
                assert held.tokens == free.tokens, item["id"]
