"""``tokenizer.json`` and the chat template, as llama.cpp's vocabulary tables.

Recognises the tokenizer by its pre-tokeniser pattern; an unknown pattern is an error that shows it.
Covers GLM-4's byte-level BPE. Does not tokenise: llama.cpp does, and tests compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_gguf.checkpoint.config import ModelConfig, read_json
from autoglm_gguf.errors import CheckpointError, UnsupportedModelError

# llama.cpp's token types, llama.h
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp splits both alike; "glm4" also takes a whole word from the vocabulary before merging,
# which is tokenizer.json's ignore_merges.
_PRE_BY_IGNORE_MERGES = {True: "glm4", False: "chatglm-bpe"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A vocabulary in llama.cpp's terms."""

    pre: str
    """llama.cpp's name of the pre-tokeniser."""
    tokens: tuple[str, ...]
    """By id; ids without a token are ``[PADn]``."""
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    """Two pieces separated by a space, best first."""
    chat_template: str | None
    ids: dict[str, int]
    """Every real token's id."""
    model: str = "gpt2"
    """llama.cpp's name of the kind: ``gpt2`` for byte-level BPE, ``llama`` for sentencepiece."""
    scores: tuple[float, ...] = ()
    """Sentencepiece only, by id."""
    extra_stop_ids: tuple[int, ...] = ()
    """Stops that the model's own code knows and ``eos_token_id`` lacks."""


def read_vocabulary(directory: Path, config: ModelConfig) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Raises:
        UnsupportedModelError: A tokenizer of another kind or with another pattern.
        CheckpointError: A file is missing or broken, or a token id lies beyond vocab_size.
    """
    raw = read_json(directory / "tokenizer.json")
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type") not in ("BPE", None):
        kind = model.get("type") if isinstance(model, dict) else None
        raise UnsupportedModelError(f"tokenizer.json: model {kind!r} is not a BPE")
    _check_pattern(raw.get("pre_tokenizer"))
    size = config.text.vocab_size
    tokens: list[str | None] = [None] * size
    types = [UNUSED] * size
    for token, index in _entries(model.get("vocab"), size):
        tokens[index], types[index] = token, NORMAL
    for token, index, special in _added(raw.get("added_tokens"), size):
        tokens[index], types[index] = token, CONTROL if special else USER_DEFINED
    ids = {token: index for index, token in enumerate(tokens) if token is not None}
    for eos in config.eos_token_ids:
        if not 0 <= eos < size or tokens[eos] is None:
            raise CheckpointError(
                f"generation_config.json: eos_token_id {eos} is no token (vocabulary of {size})"
            )
    merges, template = _merges(model.get("merges")), read_template(directory)
    _check_encodable([*ids, *merges, template or ""])
    return Vocabulary(
        pre=_PRE_BY_IGNORE_MERGES[bool(model.get("ignore_merges"))],
        tokens=tuple(t if t is not None else f"[PAD{i}]" for i, t in enumerate(tokens)),
        token_types=tuple(types),
        merges=merges,
        chat_template=template,
        ids=ids,
    )


def _check_pattern(pre_tokenizer: Any) -> None:
    steps = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    split = steps[0] if isinstance(steps, list) and len(steps) == 2 else None
    pattern = split.get("pattern") if isinstance(split, dict) else None
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if regex != GLM4_PATTERN:
        raise UnsupportedModelError(
            f"tokenizer.json: unknown pre-tokeniser (pattern {regex!r})",
            hint="only GLM-4's pattern is known; llama.cpp would split text differently",
        )


def _entries(vocab: Any, size: int) -> list[tuple[str, int]]:
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError("tokenizer.json: no vocabulary")
    for token, index in vocab.items():
        if not isinstance(index, int) or not 0 <= index < size:
            raise CheckpointError(
                f"tokenizer.json: token {token!r} has id {index!r}, vocab_size is {size}"
            )
    if len(set(vocab.values())) != len(vocab):
        raise CheckpointError("tokenizer.json: two tokens have the same id")
    return list(vocab.items())


def _added(added: Any, size: int) -> list[tuple[str, int, bool]]:
    entries: list[tuple[str, int, bool]] = []
    for entry in added if isinstance(added, list) else []:
        token, index = (
            (entry.get(k) for k in ("content", "id")) if isinstance(entry, dict) else (0, 0)
        )
        if not isinstance(token, str) or not isinstance(index, int) or not 0 <= index < size:
            raise CheckpointError(f"tokenizer.json: added token {entry!r} has no usable id")
        entries.append((token, index, bool(entry.get("special"))))
    return entries


def _merges(merges: Any) -> tuple[str, ...]:
    """Both published forms: ``"a b"`` and ``["a", "b"]``."""
    if not isinstance(merges, list):
        raise CheckpointError("tokenizer.json: no merges")
    result = []
    for merge in merges:
        text = merge
        if isinstance(merge, list) and all(isinstance(piece, str) for piece in merge):
            text = " ".join(merge)
        if not isinstance(text, str) or text.count(" ") != 1:
            raise CheckpointError(f"tokenizer.json: broken merge {merge!r}")
        result.append(text)
    return tuple(result)


def _check_encodable(texts: list[str]) -> None:
    """JSON can hold half a surrogate pair; GGUF's UTF-8 cannot."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"tokenizer.json: a token, merge or template is no text ({error.reason})"
        ) from error


def read_template(directory: Path) -> str | None:
    """The chat template: ``chat_template.jinja`` first, as transformers does, then older places.

    Raises:
        CheckpointError: It is there but cannot be read.
    """
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path.name}: cannot be read ({error})") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(directory / name, required=False).get("chat_template")
        if isinstance(template, str):
            return template
    return None
