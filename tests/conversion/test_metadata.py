"""Where stop tokens go, and the keys of both files."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from builders import TEMPLATE, Shape, build_checkpoint, token_ids, vocab_size

from autoglm_gguf import convert, read_header
from autoglm_gguf.conversion.metadata import place_stop_tokens

EOS, EOT, EOM = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
IDS = {"<|endoftext|>": 1, "<|user|>": 2, "<|observation|>": 3, "</answer>": 4, "x": 5, "y": 6}


@pytest.mark.parametrize(
    ("eos_ids", "placed"),
    [
        ((1, 2, 3, 4), {EOS: 4, EOT: 2, EOM: 3}),  # AutoGLM-Phone-9B; llama.cpp finds 1 by text
        ((1, 2, 3), {EOS: 1, EOT: 2, EOM: 3}),  # GLM-4.1V
        ((1,), {EOS: 1}),
        ((2,), {EOT: 2}),
        ((5, 4), {EOS: 4, EOT: 5}),
        ((5,), {EOS: 5}),
        ((), {}),
    ],
)
def test_stop_tokens_take_the_places_stock_llama_cpp_has(
    eos_ids: tuple[int, ...], placed: dict[str, int]
) -> None:
    assert place_stop_tokens(eos_ids, IDS) == placed


def test_stop_tokens_without_a_place_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        placed = place_stop_tokens((1, 2, 3, 4, 5, 6), IDS)
    assert placed == {EOS: 4, EOT: 2, EOM: 3}
    assert "[5, 6]" in caplog.text


@pytest.mark.native
def test_text_header_holds_llama_cpps_keys(tmp_path: Path) -> None:
    shape = Shape(rope_theta=500_000.0)
    checkpoint = build_checkpoint(tmp_path / "small", shape)
    text = read_header(convert(checkpoint, tmp_path, "q4_0").text)
    ids = token_ids()
    expected = {
        "general.architecture": "glm4",
        "general.type": "model",
        "general.name": "small",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "glm4.block_count": 2,
        "glm4.context_length": 4096,
        "glm4.embedding_length": 64,
        "glm4.feed_forward_length": 96,
        "glm4.attention.head_count": 4,
        "glm4.attention.head_count_kv": 2,
        "glm4.attention.key_length": 16,
        "glm4.attention.value_length": 16,
        "glm4.rope.dimension_count": 8,
        "glm4.rope.dimension_sections": [1, 1, 2, 0],
        "glm4.rope.freq_base": 500_000.0,
        "glm4.vocab_size": vocab_size(),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "chatglm-bpe",
        "tokenizer.chat_template": TEMPLATE,
        EOS: ids["</answer>"],
        EOT: ids["<|user|>"],
        EOM: ids["<|observation|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.bos_token_id": ids["<|endoftext|>"],
        "autoglm.eos_token_ids": [
            ids[t] for t in ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")
        ],
    }
    assert {key: text.metadata.get(key) for key in expected} == expected
    assert text.metadata["glm4.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert len(text.metadata["tokenizer.ggml.tokens"]) == vocab_size()
    assert text.metadata["tokenizer.ggml.merges"][0] == "h e"


@pytest.mark.native
def test_mmproj_header_holds_libmtmds_keys(tmp_path: Path) -> None:
    checkpoint = build_checkpoint(
        tmp_path / "small", Shape(vision_hidden=128, max_pixels=6_000_000)
    )
    pair = convert(checkpoint, tmp_path, "q4_0")
    tower = read_header(pair.mmproj)
    expected = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": 7,
        "clip.projector_type": "glm4v",
        "clip.has_vision_encoder": True,
        "clip.use_silu": True,
        "clip.vision.projection_dim": 64,
        "clip.vision.image_size": 112,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 128,
        "clip.vision.feed_forward_length": 64,
        "clip.vision.block_count": 2,
        "clip.vision.attention.head_count": 4,
        "clip.vision.spatial_merge_size": 2,
        "autoglm.vision.min_pixels": 12_544,
        "autoglm.vision.max_pixels": 6_000_000,
        "autoglm.vision.spatial_merge_size": 2,
    }
    assert {key: tower.metadata.get(key) for key in expected} == expected
    assert tower.metadata["clip.vision.image_mean"] == pytest.approx(
        [0.4815, 0.4578, 0.4082], abs=1e-4
    )
    source = "autoglm.source_fingerprint"
    assert tower.metadata[source] == read_header(pair.text).metadata[source]


@pytest.mark.native
def test_text_header_leaves_out_what_the_checkpoint_has_not(tmp_path: Path) -> None:
    checkpoint = build_checkpoint(tmp_path / "small", Shape(eos=()))
    (checkpoint / "chat_template.jinja").unlink()
    metadata = read_header(convert(checkpoint, tmp_path, "f16").text).metadata
    for key in ("tokenizer.chat_template", "autoglm.eos_token_ids", EOS, EOT, EOM):
        assert key not in metadata
