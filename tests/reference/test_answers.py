"""What the quantised model says against what the original says, over the held-out instructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import Original

from autoglm_gguf import AutoGLM

pytestmark = [pytest.mark.reference, pytest.mark.native, pytest.mark.slow]

MAX_TOKENS = 96


def original_answers(original: Original, items: list[dict[str, Any]]) -> list[str]:
    """Greedy answers in f32, one by one; without the stop token."""
    import torch

    eos = original.model.generation_config.eos_token_id
    answers = []
    for item in items:
        prompt = original.tokenizer.apply_chat_template(
            item["messages"], tokenize=False, add_generation_prompt=True
        )
        ids = original.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            out = original.model.generate(
                input_ids=ids, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=eos
            )[0, ids.shape[1] :].tolist()
        answers.append(original.tokenizer.decode([t for t in out if t not in eos]))
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
