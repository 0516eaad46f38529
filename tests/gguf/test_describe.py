"""What a pair says about itself, and what is completed where it is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import MMPROJ_METADATA, SPECIALS, TEXT_METADATA, pack_gguf, write_gguf

from autoglm_gguf import GGUFError, PairMismatchError
from autoglm_gguf.gguf.describe import GLM_TEMPLATE, VisionLimits, describe_pair, find_mmproj

TOKENS = ["a", "b", *SPECIALS]
ENDS = {TOKENS.index(t) for t in ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")}


def pair(tmp_path: Path, **tower: Any) -> tuple[Path, Path]:
    return (
        write_gguf(tmp_path / "small-F32.gguf", TEXT_METADATA),
        write_gguf(tmp_path / "mmproj-small-F32.gguf", MMPROJ_METADATA, **tower),
    )


# --- what is completed ---


def test_describe_completes_a_pair_of_upstreams_and_says_why(tmp_path: Path) -> None:
    described = describe_pair(*pair(tmp_path))
    assert described.chat_template == GLM_TEMPLATE
    assert described.stop_ids == ENDS
    assert described.vision == VisionLimits(14, 2, 12_544, 47_040_000)
    assert [note.split(":")[0] for note in described.notes] == [
        "chat template",
        "stop tokens",
        "image limits",
    ]
    assert "</answer> (21)" in described.notes[1]


def test_describe_takes_what_our_converter_wrote_without_notes(tmp_path: Path) -> None:
    text = write_gguf(
        tmp_path / "t.gguf",
        {
            **TEXT_METADATA,
            "tokenizer.chat_template": "{{ messages }}",
            "tokenizer.ggml.eos_token_id": 21,
            "autoglm.eos_token_ids": [21, 5],
        },
    )
    tower = write_gguf(
        tmp_path / "mmproj-t.gguf",
        {
            **MMPROJ_METADATA,
            "autoglm.vision.min_pixels": 20_000,
            "autoglm.vision.max_pixels": 5_000_000,
            "autoglm.vision.spatial_merge_size": 2,
        },
    )
    described = describe_pair(text, tower)
    assert described.chat_template == "{{ messages }}"
    assert described.stop_ids == {21, 5}
    assert described.vision == VisionLimits(14, 2, 20_000, 5_000_000)
    assert described.vision.factor == 28
    assert described.notes == ()


def test_describe_needs_no_mmproj(tmp_path: Path) -> None:
    text, _ = pair(tmp_path)
    described = describe_pair(text, None)
    assert (described.mmproj, described.vision) == (None, None)


def test_describe_gives_no_template_when_the_role_tokens_are_missing(tmp_path: Path) -> None:
    text = write_gguf(tmp_path / "t.gguf", {**TEXT_METADATA, "tokenizer.ggml.tokens": ["a", "b"]})
    described = describe_pair(text, None)
    assert described.chat_template is None
    assert described.stop_ids == frozenset()
    assert any("plain completion only" in note for note in described.notes)


def test_describe_joins_all_places_of_stop_tokens(tmp_path: Path) -> None:
    text = write_gguf(
        tmp_path / "t.gguf",
        {
            **TEXT_METADATA,
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.eot_token_id": 1,
            "tokenizer.ggml.eom_token_id": 2**31,
            "autoglm.eos_token_ids": [3, 2**31, 4],
        },
    )
    assert describe_pair(text, None).stop_ids == {0, 1, 3, 4}, "ids beyond the vocabulary are none"


@pytest.mark.parametrize(("low", "high"), [(5, 4), (0, 4), (2**60, 2**60), ("5", 6), (5, None)])
def test_describe_takes_glms_limits_when_the_files_are_impossible(
    tmp_path: Path, low: object, high: object
) -> None:
    limits = {"autoglm.vision.min_pixels": low, "autoglm.vision.max_pixels": high}
    text, _ = pair(tmp_path)
    tower = write_gguf(tmp_path / "mmproj-x.gguf", {**MMPROJ_METADATA, **limits})
    described = describe_pair(text, tower)
    assert described.vision == VisionLimits(14, 2, 12_544, 47_040_000)
    assert any(note.startswith("image limits") for note in described.notes)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general__architecture": "llama"}, "'llama' is not run here"),
        ({"general__architecture": None}, "'' is not run here"),
        ({"general__type": "mmproj"}, "an mmproj, not a text model"),
        ({"general__architecture": "clip"}, "an mmproj, not a text model"),
        ({"tokenizer__ggml__tokens": None}, "no vocabulary"),
        ({"tokenizer__ggml__tokens": []}, "no vocabulary"),
        ({"tokenizer__ggml__tokens": 7}, "no vocabulary"),
    ],
)
def test_describe_refuses_what_is_no_text_model(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    text = write_gguf(tmp_path / "t.gguf", TEXT_METADATA, **changes)
    with pytest.raises(GGUFError, match=named) as caught:
        describe_pair(text, None)
    assert "t.gguf" in caught.value.message


def test_describe_refuses_a_text_model_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "t.gguf").write_bytes(pack_gguf(TEXT_METADATA))
    with pytest.raises(GGUFError, match="no tensors"):
        describe_pair(tmp_path / "t.gguf", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"general__architecture": "glm4"},
        {"clip__projector_type": "qwen2vl"},
        {"clip__projector_type": None},
        {"clip__vision__projection_dim": 128},
        {"clip__vision__projection_dim": None},
        {"autoglm__source_fingerprint": "b" * 16},
    ],
)
def test_describe_refuses_an_mmproj_of_another_model(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    text = write_gguf(
        tmp_path / "t.gguf", {**TEXT_METADATA, "autoglm.source_fingerprint": "a" * 16}
    )
    tower = write_gguf(tmp_path / "mmproj-x.gguf", MMPROJ_METADATA, **changes)
    with pytest.raises(PairMismatchError, match=r"mmproj-x\.gguf") as caught:
        describe_pair(text, tower)
    assert caught.value.hint


def test_describe_shows_both_widths_when_they_differ(tmp_path: Path) -> None:
    text, tower = pair(tmp_path, clip__vision__projection_dim=4096)
    with pytest.raises(PairMismatchError, match=r"embeddings of 4096, small-F32\.gguf takes 64"):
        describe_pair(text, tower)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip__vision__patch_size", None),
        ("clip__vision__patch_size", 0),
        ("clip__vision__patch_size", 10**6),
        ("autoglm__vision__spatial_merge_size", 0),
        ("autoglm__vision__spatial_merge_size", 2**31),
    ],
)
def test_describe_refuses_impossible_patches(tmp_path: Path, key: str, value: object) -> None:
    text, tower = pair(tmp_path, **{key: value})
    with pytest.raises(GGUFError, match=r"mmproj-small-F32\.gguf: no usable"):
        describe_pair(text, tower)


# --- which mmproj belongs to a text file, by name ---


@pytest.mark.parametrize(
    ("text", "present", "chosen"),
    [
        ("M-Q4_0.gguf", ["mmproj-M-Q4_0.gguf", "mmproj-M-F32.gguf"], "mmproj-M-Q4_0.gguf"),
        ("M-Q4_0.gguf", ["mmproj-M-Q8_0.gguf", "mmproj-M-F16.gguf"], "mmproj-M-Q8_0.gguf"),
        ("M-Q4_0.gguf", ["mmproj-M-Q8_0.gguf"], "mmproj-M-Q8_0.gguf"),
        ("M-Q4_K_M.gguf", ["mmproj-M-BF16.gguf", "mmproj-N-F16.gguf"], "mmproj-M-BF16.gguf"),
        ("m-q8_0.gguf", ["mmproj-M-Q8_0.gguf", "mmproj-N-Q8_0.gguf"], "mmproj-M-Q8_0.gguf"),
        (
            "AutoGLM-Phone-9B-Q8_0.gguf",
            ["mmproj-AutoGLM-Phone-9B-Multilingual-Q8_0.gguf", "mmproj-AutoGLM-Phone-9B-Q8_0.gguf"],
            "mmproj-AutoGLM-Phone-9B-Q8_0.gguf",
        ),
        (
            "AutoGLM-Phone-9B-Multilingual-Q4_0.gguf",
            ["mmproj-AutoGLM-Phone-9B-Multilingual-Q8_0.gguf", "mmproj-AutoGLM-Phone-9B-Q4_0.gguf"],
            "mmproj-AutoGLM-Phone-9B-Multilingual-Q8_0.gguf",
        ),
        ("my-model.gguf", ["mmproj-my-model.gguf", "mmproj-other.gguf"], "mmproj-my-model.gguf"),
        (
            "my-model.gguf",
            ["mmproj-my-model-f16.gguf", "mmproj-x.gguf"],
            "mmproj-my-model-f16.gguf",
        ),
        ("M-Q4_0.gguf", ["mmproj-vision.gguf"], "mmproj-vision.gguf"),
        ("M-Q4_0.gguf", ["mmproj-x.gguf", "mmproj-y.gguf"], None),
        ("M-Q4_0.gguf", ["N-Q8_0.gguf", "readme.md"], None),
    ],
)
def test_find_mmproj_takes_the_same_name_then_the_only_one(
    tmp_path: Path, text: str, present: list[str], chosen: str | None
) -> None:
    for name in [text, *present]:
        (tmp_path / name).touch()
    found = find_mmproj(tmp_path / text)
    assert (found.name if found else None) == chosen
