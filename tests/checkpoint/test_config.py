"""Configurations of every age, and impossible ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import Shape, config_json, read_json, token_ids, write_json

from autoglm_gguf import CheckpointError, UnsupportedModelError
from autoglm_gguf.checkpoint.config import read_config
from autoglm_gguf.checkpoint.config import read_json as read_checked_json

GONE = object()


def write_config(directory: Path, raw: dict[str, Any], **others: dict[str, Any]) -> Path:
    write_json(directory / "config.json", raw)
    for name, value in others.items():
        write_json(directory / f"{name}.json", value)
    return directory


def change(raw: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """Set ``a.b.c`` to a value, or drop it."""
    *path, last = place.split(".")
    inner = raw
    for key in path:
        inner = inner[key]
    if value is GONE:
        inner.pop(last)
    else:
        inner[last] = value
    return raw


def test_config_reads_every_field(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, config_json(Shape(n_layers=3, tied=True))))
    assert config.architecture == "Glm4vForConditionalGeneration"
    assert config.text.num_hidden_layers == 3
    assert config.text.tie_word_embeddings
    assert config.text.rotary_dim == 8
    assert config.vision.out_hidden_size == config.text.hidden_size == 64


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters", "flat"])
def test_config_finds_the_rope_keys_of_every_age(tmp_path: Path, style: str) -> None:
    shape = Shape(rope_style=style, rope_theta=500_000.0)
    rope = read_config(write_config(tmp_path, config_json(shape))).text.rope
    assert rope.mrope_section == (1, 1, 2)
    assert rope.rope_theta == 500_000.0
    assert rope.partial_rotary_factor == 0.5


def test_config_takes_the_newest_place_when_rope_keys_differ(tmp_path: Path) -> None:
    raw = config_json(Shape(rope_style="rope_parameters", rope_theta=3.0))
    raw["text_config"] |= {
        "rope_theta": 1.0,
        "rope_scaling": {"rope_theta": 2.0, "type": "default"},
    }
    assert read_config(write_config(tmp_path, raw)).text.rope.rope_theta == 3.0


def test_config_without_mrope_has_none(tmp_path: Path) -> None:
    raw = change(config_json(Shape(rope_style="flat")), "text_config.mrope_section", GONE)
    assert read_config(write_config(tmp_path, raw)).text.rope.mrope_section is None


@pytest.mark.parametrize("value", [GONE, None])
def test_config_completes_what_published_files_leave_out(tmp_path: Path, value: object) -> None:
    raw = config_json(Shape(n_kv_heads=4, rope_style="flat"))
    for key in (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "attention_bias",
        "hidden_act",
        "tie_word_embeddings",
        "max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
    ):
        change(raw, f"text_config.{key}", value)
    text = read_config(write_config(tmp_path, raw)).text
    assert (text.num_key_value_heads, text.head_dim) == (4, 16)
    assert (text.rms_norm_eps, text.attention_bias, text.tie_word_embeddings) == (1e-5, True, False)
    assert (text.rope.rope_theta, text.rope.partial_rotary_factor) == (10_000.0, 0.5)


def test_config_takes_tied_embeddings_from_the_top_level(tmp_path: Path) -> None:
    raw = change(config_json(Shape()), "text_config.tie_word_embeddings", GONE)
    raw["tie_word_embeddings"] = True
    assert read_config(write_config(tmp_path, raw)).text.tie_word_embeddings


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [5, 7, 5]}, (5, 7)),
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": None}, (9,)),
        ({"eos_token_id": []}, (9,)),
        ({"eos_token_id": ["</answer>"]}, (9,)),
        (None, (9,)),
    ],
)
def test_config_reads_the_stop_list_from_the_first_place_that_has_one(
    tmp_path: Path, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    raw = change(config_json(Shape()), "text_config.eos_token_id", 9)
    others = {} if generation is None else {"generation_config": generation}
    assert read_config(write_config(tmp_path, raw, **others)).eos_token_ids == expected


def test_config_without_a_stop_list_has_an_empty_one(tmp_path: Path) -> None:
    assert read_config(write_config(tmp_path, config_json(Shape()))).eos_token_ids == ()


@pytest.mark.parametrize(
    ("preprocessor", "limits"),
    [
        (None, (12_544, 47_040_000)),
        ({}, (12_544, 47_040_000)),
        ({"size": {"shortest_edge": 20_000, "longest_edge": 5_000_000}}, (20_000, 5_000_000)),
        ({"size": {"shortest_edge": 20_000}}, (20_000, 47_040_000)),
        ({"min_pixels": 30_000, "max_pixels": 40_000}, (30_000, 40_000)),
        ({"min_pixels": None, "size": None}, (12_544, 47_040_000)),
    ],
)
def test_config_reads_image_limits_or_takes_the_defaults(
    tmp_path: Path, preprocessor: dict[str, Any] | None, limits: tuple[int, int]
) -> None:
    others = {} if preprocessor is None else {"preprocessor_config": preprocessor}
    image = read_config(write_config(tmp_path, config_json(Shape()), **others)).image
    assert (image.min_pixels, image.max_pixels) == limits
    assert image.image_mean == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("text_config.hidden_size", GONE),
        ("text_config.hidden_size", None),
        ("text_config.hidden_size", -64),
        ("text_config.hidden_size", 0),
        ("text_config.hidden_size", 2**60),
        ("text_config.hidden_size", "wide"),
        ("text_config.hidden_size", 64.5),
        ("text_config.hidden_size", [64]),
        ("text_config.num_hidden_layers", 10**9),
        ("text_config.num_hidden_layers", 0),
        ("text_config.num_attention_heads", 0),
        ("text_config.num_attention_heads", -4),
        ("text_config.num_attention_heads", GONE),
        ("text_config.num_key_value_heads", 3),
        ("text_config.num_key_value_heads", 0),
        ("text_config.head_dim", 0),
        ("text_config.head_dim", 18),
        ("text_config.head_dim", 2**40),
        ("text_config.intermediate_size", None),
        ("text_config.vocab_size", 2**31),
        ("text_config.vocab_size", -1),
        ("text_config.max_position_embeddings", 2**31),
        ("text_config.rms_norm_eps", -1e-5),
        ("text_config.rms_norm_eps", float("nan")),
        ("text_config.hidden_act", "gelu"),
        ("text_config.partial_rotary_factor", 0.0),
        ("text_config.partial_rotary_factor", 2),
        ("text_config.partial_rotary_factor", float("inf")),
        ("text_config.rope_theta", 0),
        ("text_config.rope_theta", "big"),
        ("text_config.rope_scaling.mrope_section", [1, 1]),
        ("text_config.rope_scaling.mrope_section", [8, 12, 12]),
        ("text_config.rope_scaling.mrope_section", "112"),
        ("text_config.rope_scaling.rope_type", "yarn"),
        ("vision_config", GONE),
        ("vision_config", None),
        ("vision_config", []),
        ("vision_config.depth", 0),
        ("vision_config.depth", None),
        ("vision_config.num_heads", 3),
        ("vision_config.num_heads", 0),
        ("vision_config.patch_size", 0),
        ("vision_config.patch_size", 10**6),
        ("vision_config.image_size", -336),
        ("vision_config.spatial_merge_size", 3),
        ("vision_config.temporal_patch_size", 1),
        ("vision_config.in_channels", 1),
        ("vision_config.attention_bias", True),
        ("vision_config.out_hidden_size", 128),
        ("text_config", GONE),
        ("text_config", None),
        ("text_config", "x"),
    ],
)
def test_config_refuses_impossible_values(tmp_path: Path, place: str, value: object) -> None:
    raw = change(config_json(Shape()), place, value)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_config(write_config(tmp_path, raw))
    assert "pydantic" not in str(caught.value)


def test_config_error_names_the_field_and_what_was_found(tmp_path: Path) -> None:
    raw = change(config_json(Shape()), "text_config.hidden_size", "wide")
    with pytest.raises(CheckpointError, match="hidden_size") as caught:
        read_config(write_config(tmp_path, raw))
    assert "'wide'" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "preprocessor",
    [
        {"size": {"shortest_edge": 10, "longest_edge": 5}},
        {"size": {"shortest_edge": 0}},
        {"size": {"longest_edge": -1}},
        {"size": {"longest_edge": "x"}},
        {"min_pixels": 10**18, "max_pixels": 10**18},
        {"max_pixels": 10**30},
        {"image_mean": [0.5]},
        {"image_std": "x"},
    ],
)
def test_config_refuses_impossible_image_limits(
    tmp_path: Path, preprocessor: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"^preprocessor_config\.json: "):
        read_config(write_config(tmp_path, config_json(Shape()), preprocessor_config=preprocessor))


@pytest.mark.parametrize(
    "architectures", [GONE, None, [], "Glm4vForConditionalGeneration", ["LlamaForCausalLM"], [None]]
)
def test_config_refuses_an_unknown_architecture(tmp_path: Path, architectures: object) -> None:
    raw = change(config_json(Shape()), "architectures", architectures)
    with pytest.raises(UnsupportedModelError, match="unknown architecture") as caught:
        read_config(write_config(tmp_path, raw))
    assert "Glm4vForConditionalGeneration" in caught.value.message
    assert caught.value.hint


def test_config_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: missing in") as caught:
        read_config(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "a JSON list"),
        (b"null", "a JSON NoneType"),
        (b'{"a": "\xff"}', "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_json_that_is_none_is_a_checkpoint_error(tmp_path: Path, data: bytes, named: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=named) as caught:
        read_checked_json(tmp_path / "config.json")
    assert "config.json" in caught.value.message


def test_json_that_is_a_directory_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checked_json(tmp_path / "config.json", required=False)


def test_config_of_the_built_checkpoint_has_the_stop_list(checkpoint: Path) -> None:
    expected = read_json(checkpoint / "generation_config.json")["eos_token_id"]
    assert read_config(checkpoint).eos_token_ids == tuple(expected)
    assert token_ids()["</answer>"] in expected
