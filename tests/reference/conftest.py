"""Checkpoints on both sides, each loaded once per session."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import Shape, build_checkpoint
from family import glm46v
from parity import N_BATCH, Original, exact_params, load_original

from autoglm_gguf import convert
from autoglm_gguf.engine.llama import LlamaEngine

TINY = Path(__file__).parents[2] / "models" / "autoglm-tiny"
# What nothing may be tuned to: other widths and head counts, tied embeddings, each rope style,
# other special tokens.
SHAPES = {
    "wide_heads": Shape(
        hidden_size=192, n_heads=3, n_kv_heads=1, head_dim=64, mrope_section=(4, 6, 6)
    ),
    "tied_new_rope": Shape(
        tied=True, rope_style="rope_parameters", rope_theta=500000.0, n_layers=3
    ),
    "flat_old_names": Shape(
        rope_style="rope_scaling",
        prefixes=("language_model.model.", "visual."),
        dtype="F32",
        n_shards=1,
    ),
    "glm46v": glm46v(),
    "glm46v_under_glm4vs_name": glm46v("Glm4vForConditionalGeneration", seed=5),
}


@pytest.fixture(scope="session")
def tiny() -> Original:
    return load_original(TINY)


@pytest.fixture(scope="session")
def tiny_engine(tiny_pair: Callable[[str], tuple[Path, Path]]) -> Iterator[LlamaEngine]:
    engine = LlamaEngine(*tiny_pair("f32"), exact_params(), n_outputs_max=N_BATCH)
    yield engine
    engine.close()


@pytest.fixture(scope="session", params=list(SHAPES))
def random_original(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Original, LlamaEngine]]:
    base = tmp_path_factory.mktemp(request.param)
    directory = build_checkpoint(base / "checkpoint", SHAPES[request.param])
    pair = convert(directory, base, "f32")
    engine = LlamaEngine(pair.text, pair.mmproj, exact_params(), n_outputs_max=N_BATCH)
    # transformers reads the published names alone: it gets the same weights under those.
    published = replace(SHAPES[request.param], prefixes=Shape().prefixes)
    yield load_original(build_checkpoint(base / "published", published)), engine
    engine.close()


@pytest.fixture(scope="session")
def held_out() -> list[dict[str, Any]]:
    """The instructions that autoglm-tiny never saw, from the script beside the checkpoint."""
    sys.path.insert(0, str(TINY))
    try:
        spec = importlib.util.spec_from_file_location("instructions", TINY / "instructions.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["instructions"] = module
        spec.loader.exec_module(module)
        items: list[dict[str, Any]] = module.held_out()
    finally:
        sys.path.remove(str(TINY))
    return items
