"""Names, order and layout of the planned tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import Shape, config_json, random_tensors, tensor_shapes, write_json

from autoglm_gguf import CheckpointError
from autoglm_gguf.checkpoint.config import ModelConfig, read_config
from autoglm_gguf.checkpoint.safetensors import LazyTensor
from autoglm_gguf.conversion.recipe import Recipe, parse_outtype
from autoglm_gguf.conversion.tensors import (
    OutTensor,
    check_unused,
    permute_rotary,
    plan_mmproj,
    plan_text,
)
from autoglm_gguf.native.ggml import GGMLType

pytestmark = pytest.mark.native  # row sizes are ggml's
F32, Q8_0, Q4_0 = (Recipe(parse_outtype(name)) for name in ("f32", "q8_0", "q4_0"))
BIG = Shape(
    hidden_size=4096,
    n_layers=40,
    n_heads=32,
    head_dim=128,
    intermediate_size=13696,
    mrope_section=(8, 12, 12),
    vision_depth=24,
    vision_hidden=1536,
    vision_heads=12,
    image_size=336,
    merger_width=13696,
)


def config_of(tmp_path: Path, shape: Shape, vocab_size: int | None = None) -> ModelConfig:
    raw = config_json(shape)
    if vocab_size is not None:
        raw["text_config"]["vocab_size"] = vocab_size
    write_json(tmp_path / "config.json", raw)
    return read_config(tmp_path)


def lazy(name: str, values: np.ndarray) -> LazyTensor:
    return LazyTensor(name, values.shape, GGMLType.F32, values)


def small(shape: Shape) -> dict[str, LazyTensor]:
    return {name: lazy(name, values) for name, values in random_tensors(shape).items()}


def rows(tensor: OutTensor) -> np.ndarray:
    return tensor.rows(0, tensor.n_rows)


def test_permute_rotary_puts_even_rows_before_odd_ones_head_by_head() -> None:
    assert permute_rotary(2, 8, 4).tolist() == [
        *[0, 2, 1, 3, 4, 5, 6, 7],
        *[8, 10, 9, 11, 12, 13, 14, 15],
    ]


def test_permute_rotary_of_the_9b_turns_half_of_each_head() -> None:
    order = permute_rotary(32, 128, 64)
    assert order[:3].tolist() == [0, 2, 4]
    assert order[31:34].tolist() == [62, 1, 3]
    assert order[64:128].tolist() == list(range(64, 128))
    assert sorted(order.tolist()) == list(range(4096))


def test_plan_of_the_9b_has_the_published_sizes(tmp_path: Path) -> None:
    config = config_of(tmp_path, BIG, vocab_size=151_552)
    shapes = tensor_shapes(BIG)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        shapes[name] = (151_552, 4096)
    one = np.zeros((), np.float32)
    tensors = {name: lazy(name, np.broadcast_to(one, sides)) for name, sides in shapes.items()}
    sizes = {}
    for outtype in ("f16", "q8_0", "q4_0"):
        text = plan_text(tensors, config, Recipe(parse_outtype(outtype)))
        tower = plan_mmproj(tensors, config, Recipe(parse_outtype(outtype)))
        assert (len(text), len(tower)) == (523, 182)
        sizes[outtype] = [round(sum(t.n_bytes for t in part) / 1e9, 2) for part in (text, tower)]
    # GB of the published tensors by hand: 0.95 and 0.50 for the tower if all of it were quantised,
    # and 0.08 and 0.10 more since the convolutions' 30 million weights stay f32.
    assert sizes == {"f16": [18.8, 1.79], "q8_0": [9.99, 1.03], "q4_0": [5.29, 0.6]}


def test_plan_text_orders_and_names_tensors_as_llama_cpp(tmp_path: Path) -> None:
    shape = Shape(n_layers=1)
    planned = plan_text(small(shape), config_of(tmp_path, shape), F32)
    assert [(t.name, t.shape) for t in planned] == [
        ("token_embd.weight", (288, 64)),
        ("blk.0.attn_norm.weight", (64,)),
        ("blk.0.attn_q.weight", (64, 64)),
        ("blk.0.attn_q.bias", (64,)),
        ("blk.0.attn_k.weight", (32, 64)),
        ("blk.0.attn_k.bias", (32,)),
        ("blk.0.attn_v.weight", (32, 64)),
        ("blk.0.attn_v.bias", (32,)),
        ("blk.0.attn_output.weight", (64, 64)),
        ("blk.0.post_attention_norm.weight", (64,)),
        ("blk.0.ffn_norm.weight", (64,)),
        ("blk.0.ffn_up.weight", (192, 64)),
        ("blk.0.ffn_down.weight", (64, 96)),
        ("blk.0.post_ffw_norm.weight", (64,)),
        ("output_norm.weight", (64,)),
        ("output.weight", (288, 64)),
    ]


def test_plan_text_permutes_q_and_k_and_nothing_else(tmp_path: Path) -> None:
    shape = Shape(n_layers=1)
    source = random_tensors(shape)
    planned = {t.name: t for t in plan_text(small(shape), config_of(tmp_path, shape), F32)}
    attention = "model.language_model.layers.0.self_attn."
    # 4 heads of 16, of which 8 rotate: 0 2 4 6 1 3 5 7 and then 8 to 15.
    head = [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]
    for letter, n_heads in (("q", 4), ("k", 2)):
        order = [h * 16 + i for h in range(n_heads) for i in head]
        weight, bias = planned[f"blk.0.attn_{letter}.weight"], planned[f"blk.0.attn_{letter}.bias"]
        expected = source[f"{attention}{letter}_proj.weight"][order]
        assert rows(weight).tolist() == expected.tolist()
        assert (
            rows(bias).ravel().tolist() == source[f"{attention}{letter}_proj.bias"][order].tolist()
        )
    value = planned["blk.0.attn_v.weight"]
    assert rows(value).tolist() == source[f"{attention}v_proj.weight"].tolist()


def test_plan_text_permutes_nothing_without_mrope(tmp_path: Path) -> None:
    raw = config_json(Shape(rope_style="flat"))
    del raw["text_config"]["mrope_section"]
    write_json(tmp_path / "config.json", raw)
    planned = plan_text(small(Shape()), read_config(tmp_path), F32)
    query = next(t for t in planned if t.name == "blk.0.attn_q.weight")
    source = random_tensors(Shape())["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert rows(query).tolist() == source.tolist()


def test_plan_text_leaves_the_output_out_when_embeddings_are_tied(tmp_path: Path) -> None:
    shape = Shape(tied=True)
    names = [t.name for t in plan_text(small(shape), config_of(tmp_path, shape), F32)]
    assert "token_embd.weight" in names
    assert "output.weight" not in names


def test_plan_mmproj_splits_the_patch_kernel_into_its_frames(tmp_path: Path) -> None:
    shape = Shape()
    kernel = random_tensors(shape)["model.visual.patch_embed.proj.weight"]
    planned = {t.name: t for t in plan_mmproj(small(shape), config_of(tmp_path, shape), F32)}
    for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        assert planned[name].shape == (64, 3, 14, 14)
        assert rows(planned[name]).ravel().tolist() == kernel[:, :, frame].ravel().tolist()


@pytest.mark.parametrize(
    "vision", ["model.visual.", "visual.", "vision_tower.", "model.vision_tower."]
)
@pytest.mark.parametrize("text", ["model.language_model.", "language_model.model.", "model."])
def test_plan_knows_every_published_prefix(tmp_path: Path, vision: str, text: str) -> None:
    shape = Shape(prefixes=(text, vision))
    tensors, config = small(shape), config_of(tmp_path, shape)
    assert len(plan_text(tensors, config, Q4_0)) == 2 * 13 + 3
    assert len(plan_mmproj(tensors, config, Q8_0)) == 2 * 7 + 14
    check_unused(tensors, config)


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.1.mlp.down_proj.weight",
        "model.visual.patch_embed.proj.weight",
        "model.visual.merger.gate_proj.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("change", ["missing", "reshaped"])
def test_plan_names_a_tensor_that_does_not_fit(tmp_path: Path, name: str, change: str) -> None:
    tensors, config = small(Shape()), config_of(tmp_path, Shape())
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = lazy(name, tensors[name].data[:-1])
    with pytest.raises(CheckpointError) as caught:
        plan_text(tensors, config, Q8_0)
        plan_mmproj(tensors, config, Q8_0)
    assert name.removeprefix("model.language_model.").removeprefix("model.visual.") in str(
        caught.value
    )
    assert caught.value.hint


def test_plan_shows_both_shapes_when_they_differ(tmp_path: Path) -> None:
    name = "lm_head.weight"
    tensors = small(Shape())
    tensors[name] = lazy(name, tensors[name].data[:280])
    with pytest.raises(CheckpointError, match=r"found \(280, 64\), required \(288, 64\)"):
        plan_text(tensors, config_of(tmp_path, Shape()), Q8_0)


def test_check_unused_names_a_tensor_that_would_be_lost(tmp_path: Path) -> None:
    tensors = small(Shape())
    tensors["model.language_model.layers.2.extra.weight"] = lazy("x", np.zeros(1, np.float32))
    with pytest.raises(CheckpointError, match=r"layers\.2\.extra\.weight"):
        check_unused(tensors, config_of(tmp_path, Shape()))


def test_check_unused_lets_rotary_tables_and_a_tied_head_pass(tmp_path: Path) -> None:
    tensors = small(Shape())
    tensors["model.visual.rotary_emb.inv_freq"] = lazy("x", np.zeros(1, np.float32))
    check_unused(tensors, config_of(tmp_path, Shape(tied=True)))
