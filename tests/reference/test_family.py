"""The text-only members of the family against transformers, and ChatGLM against its twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from family import GLM, build_chatglm, build_glm, build_glm4
from parity import N_BATCH, engine_logits, exact_params, lowest_cosine

from autoglm_gguf import convert
from autoglm_gguf.engine.llama import LlamaEngine

pytestmark = [pytest.mark.reference, pytest.mark.native]

TEXT = "[gMASK]<sop><|user|>\nhello 打开微信 x = 1 + 2<|assistant|>\n"
EDGE = replace(GLM, tied=True, n_heads=2, n_kv_heads=1, head_dim=64, rope_theta=500000.0)


def logits(directory: Path, outdir: Path, outtype: str) -> tuple[list[int], np.ndarray]:
    pair = convert(directory, outdir, outtype)
    assert pair.mmproj is None
    engine = LlamaEngine(pair.text, None, exact_params(512), n_outputs_max=N_BATCH)
    try:
        ids = engine.tokenize(TEXT)
        return ids, engine_logits(engine, ids)
    finally:
        engine.close()


def original_logits(directory: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize(
    ("build", "shape"),
    [(build_glm4, GLM), (build_glm, GLM), (build_glm, EDGE)],
    ids=["Glm4ForCausalLM", "GlmForCausalLM", "GlmForCausalLM-tied"],
)
def test_family_logits_equal_the_originals(
    tmp_path: Path, build: Callable[..., Path], shape: object
) -> None:
    directory = build(tmp_path / "checkpoint", shape)
    ids, exact = logits(directory, tmp_path, "f32")
    theirs = original_logits(directory, ids)
    assert np.abs(exact - theirs).max() <= 1e-5 * np.abs(theirs).max()
    _, rounded = logits(directory, tmp_path, "q8_0")
    assert lowest_cosine(rounded, theirs) >= 0.999


def test_chatglm_logits_equal_its_twin_in_the_other_layout(tmp_path: Path) -> None:
    """Needs no torch: the same weights, fused and under other names, must say the same."""
    twin, fused = build_glm(tmp_path / "twin"), build_chatglm(tmp_path / "fused")
    _, expected = logits(twin, tmp_path, "f32")
    _, ours = logits(fused, tmp_path, "f32")
    assert np.abs(ours - expected).max() <= 1e-6 * np.abs(expected).max()
