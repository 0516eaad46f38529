"""``tokenizer.json`` to llama.cpp's tables: what is kept, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import SPECIALS, TAGS, read_json, token_ids, vocab_size, write_json

from autoglm_gguf import CheckpointError, UnsupportedModelError
from autoglm_gguf.checkpoint.config import read_config
from autoglm_gguf.checkpoint.tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)


def read(checkpoint: Path) -> Vocabulary:
    return read_vocabulary(checkpoint, read_config(checkpoint))


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = read_json(checkpoint / "tokenizer.json")
    change(raw)
    write_json(checkpoint / "tokenizer.json", raw)


def test_vocabulary_lists_every_token_under_its_id(checkpoint: Path) -> None:
    vocabulary = read(checkpoint)
    ids = token_ids()
    assert vocabulary.ids == ids
    assert all(vocabulary.tokens[i] == token for token, i in ids.items())


def test_vocabulary_fills_ids_without_a_token(checkpoint: Path) -> None:
    vocabulary, n = read(checkpoint), len(token_ids())
    assert len(vocabulary.tokens) == len(vocabulary.token_types) == vocab_size() > n
    assert vocabulary.tokens[n] == f"[PAD{n}]"
    assert set(vocabulary.token_types[n:]) == {UNUSED}


def test_vocabulary_types_tokens_as_llama_cpp_does(checkpoint: Path) -> None:
    vocabulary = read(checkpoint)
    kinds = {token: vocabulary.token_types[i] for token, i in vocabulary.ids.items()}
    assert kinds["hello"] == NORMAL
    assert {kinds[token] for token in TAGS} == {USER_DEFINED}
    assert {kinds[token] for token in SPECIALS if token not in TAGS} == {CONTROL}


@pytest.mark.parametrize("as_text", [False, True])
def test_vocabulary_reads_merges_in_both_published_forms(checkpoint: Path, as_text: bool) -> None:
    if as_text:
        edit(checkpoint, lambda raw: raw["model"].update(merges=["h e", "l l"]))
    assert read(checkpoint).merges[:2] == ("h e", "l l")


@pytest.mark.parametrize(
    ("ignore_merges", "pre"), [(True, "glm4"), (False, "chatglm-bpe"), (None, "chatglm-bpe")]
)
def test_vocabulary_names_the_pre_tokeniser(
    checkpoint: Path, ignore_merges: bool | None, pre: str
) -> None:
    edit(checkpoint, lambda raw: raw["model"].update(ignore_merges=ignore_merges))
    assert read(checkpoint).pre == pre


def test_chat_template_comes_from_the_first_place_that_has_one(checkpoint: Path) -> None:
    assert "[gMASK]<sop>" in (read(checkpoint).chat_template or "")
    write_json(checkpoint / "tokenizer_config.json", {"chat_template": "third"})
    write_json(checkpoint / "chat_template.json", {"chat_template": "second"})
    (checkpoint / "chat_template.jinja").write_text("first 你", "utf-8")
    for expected, name in [
        ("first 你", "chat_template.jinja"),
        ("second", "chat_template.json"),
        ("third", "tokenizer_config.json"),
        (None, None),
    ]:
        assert read(checkpoint).chat_template == expected
        if name:
            (checkpoint / name).unlink()


def test_chat_template_that_is_no_text_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read"):
        read(checkpoint)


def test_tokenizer_that_is_missing_is_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        read(checkpoint)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        {},
        [],
        {"type": "ByteLevel"},
        {"pretokenizers": []},
        {"pretokenizers": [None, None]},
        {"pretokenizers": [{"pattern": {"Regex": r"\w+"}}, {}]},
        {"pretokenizers": [{"pattern": {"String": " "}}, {}]},
        {"pretokenizers": [{"pattern": "x"}, {}]},
    ],
)
def test_tokenizer_with_another_pattern_is_unsupported(
    checkpoint: Path, pre_tokenizer: object
) -> None:
    edit(checkpoint, lambda raw: raw.update(pre_tokenizer=pre_tokenizer))
    with pytest.raises(UnsupportedModelError, match="unknown pre-tokeniser") as caught:
        read(checkpoint)
    assert "GLM-4" in caught.value.hint


def test_tokenizer_error_shows_the_pattern(checkpoint: Path) -> None:
    pretokenizers = [{"pattern": {"Regex": "[0-9]+"}}, {}]
    edit(checkpoint, lambda raw: raw.update(pre_tokenizer={"pretokenizers": pretokenizers}))
    with pytest.raises(UnsupportedModelError) as caught:
        read(checkpoint)
    assert "[0-9]+" in caught.value.message


@pytest.mark.parametrize("model", [None, [], {"type": "Unigram"}, {"type": "WordPiece"}])
def test_tokenizer_of_another_kind_is_unsupported(checkpoint: Path, model: object) -> None:
    edit(checkpoint, lambda raw: raw.update(model=model))
    with pytest.raises(UnsupportedModelError, match="not a BPE"):
        read(checkpoint)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("vocab", None, "no vocabulary"),
        ("vocab", {}, "no vocabulary"),
        ("vocab", ["a"], "no vocabulary"),
        ("vocab", {"a": -1}, "'a' has id -1"),
        ("vocab", {"a": 10**9}, "'a' has id 1000000000"),
        ("vocab", {"a": "0"}, "'a' has id '0'"),
        ("vocab", {"a": None}, "'a' has id None"),
        ("vocab", {"a": 1, "b": 1}, "same id"),
        ("vocab", {"\ud800": 1}, "no text"),
        ("merges", None, "no merges"),
        ("merges", "h e", "no merges"),
        ("merges", ["he"], "broken merge 'he'"),
        ("merges", [["a", "b", "c"]], "broken merge"),
        ("merges", ["a b c"], "broken merge"),
        ("merges", [["a"]], "broken merge"),
        ("merges", [["a", "b c"]], "broken merge"),
        ("merges", [["a", 5, 6]], "broken merge"),
        ("merges", [["a", 5]], "broken merge"),
        ("merges", [7], "broken merge 7"),
    ],
)
def test_tokenizer_with_broken_tables_is_refused(
    checkpoint: Path, field: str, value: object, named: str
) -> None:
    edit(checkpoint, lambda raw: raw["model"].update({field: value}))
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json") as caught:
        read(checkpoint)
    assert named in caught.value.message


@pytest.mark.parametrize(
    "token",
    [
        {"id": 10**9, "content": "x"},
        {"id": -1, "content": "x"},
        {"id": "5", "content": "x"},
        {"content": "x"},
        {"id": 5},
        {"id": 5, "content": 5},
        "x",
        None,
    ],
)
def test_added_token_without_a_usable_id_is_refused(checkpoint: Path, token: object) -> None:
    edit(checkpoint, lambda raw: raw["added_tokens"].append(token))
    with pytest.raises(CheckpointError, match="added token"):
        read(checkpoint)


@pytest.mark.parametrize("eos", [-1, 10**9, vocab_size() - 1])
def test_stop_id_that_is_no_token_is_refused(checkpoint: Path, eos: int) -> None:
    write_json(checkpoint / "generation_config.json", {"eos_token_id": [eos]})
    with pytest.raises(CheckpointError, match=f"eos_token_id {eos} is no token"):
        read(checkpoint)
