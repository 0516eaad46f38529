"""``tokenizer.model`` of chatglm3-6b, a sentencepiece model, as llama.cpp's vocabulary tables.

The role tokens are not in the file: chatglm's own code appends them after its pieces, in a fixed
order. Source: THUDM/chatglm3-6b, tokenization_chatglm.py; conversion/chatglm.py. Covers the BPE
kind with an identity normaliser; llama.cpp runs no other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoglm_gguf.checkpoint.config import ModelConfig
from autoglm_gguf.checkpoint.tokenizer import CONTROL, NORMAL, UNUSED, Vocabulary, read_template
from autoglm_gguf.errors import CheckpointError, UnsupportedModelError

UNKNOWN, BYTE = 2, 6  # llama.h
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
APPENDED = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLES)
STOPS = ("<|user|>", "<|observation|>")
"""What chatglm's own chat loop stops at, besides the model's eos."""
CHATGLM3_TEMPLATE = (
    "{{- '[gMASK]sop' -}}{%- for m in messages -%}"
    "{%- set role = 'observation' if m.role == 'tool' else m.role -%}"
    "{{ '<|' ~ role ~ '|>\\n ' }}{{- m.content -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
_MODEL = "tokenizer.model"
# Field numbers of sentencepiece_model.proto.
_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3
_MODEL_TYPE, _BPE = 3, 2
_CHARSMAP = 2


def read_spm_vocabulary(directory: Path, config: ModelConfig) -> Vocabulary:
    """Read a sentencepiece vocabulary and append chatglm's special tokens.

    Raises:
        UnsupportedModelError: Not a BPE model, or text would be normalised first.
        CheckpointError: The file is missing or broken, or has more pieces than the embeddings.
    """
    processor = _load(directory / _MODEL)
    n_pieces, size = processor.vocab_size(), config.text.vocab_size
    if n_pieces + len(APPENDED) > size:
        raise CheckpointError(
            f"{_MODEL}: {n_pieces} pieces and {len(APPENDED)} special tokens do not fit "
            f"padded_vocab_size {size}"
        )
    tokens = [processor.id_to_piece(i) for i in range(n_pieces)]
    scores = [processor.get_score(i) for i in range(n_pieces)]
    types = [_type(processor, i) for i in range(n_pieces)]
    tokens += APPENDED
    types += [CONTROL] * len(APPENDED)
    padding = range(len(tokens), size)
    tokens += [f"[PAD{i}]" for i in padding]
    types += [UNUSED] * len(padding)
    scores += [0.0] * (size - n_pieces)
    ids = {token: index for index, token in enumerate(tokens[: n_pieces + len(APPENDED)])}
    return Vocabulary(
        pre="chatglm-spm",
        tokens=tuple(tokens),
        token_types=tuple(types),
        merges=(),
        chat_template=read_template(directory) or CHATGLM3_TEMPLATE,
        ids=ids,
        model="llama",
        scores=tuple(scores),
        extra_stop_ids=tuple(ids[token] for token in STOPS),
    )


def _load(path: Path) -> Any:
    import sentencepiece

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: missing in {path.parent} ({error.strerror})",
            hint="download the checkpoint completely",
        ) from error
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
        trainer = _last(raw, _TRAINER_SPEC, b"")
        normalizer = _last(raw, _NORMALIZER_SPEC, b"")
        model_type = _last(trainer, _MODEL_TYPE, 1)
        charsmap = _last(normalizer, _CHARSMAP, b"")
    except Exception as error:  # sentencepiece raises RuntimeError, the walker IndexError
        raise CheckpointError(
            f"{path.name}: not a sentencepiece model ({error})", hint="download the file again"
        ) from error
    if model_type != _BPE:
        raise UnsupportedModelError(f"{path.name}: not a BPE sentencepiece model")
    if charsmap:
        raise UnsupportedModelError(
            f"{path.name}: normalises text before it splits it, which llama.cpp does not"
        )
    return processor


def _last(message: Any, wanted: int, default: Any) -> Any:
    """The last value of a field of a protobuf message: bytes, or an int for a varint."""
    at, found = 0, default
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        value: Any
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            size = {1: 8, 5: 4}[wire]
            value, at = message[at : at + size], at + size
        if number == wanted:
            found = value
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _type(processor: Any, index: int) -> int:
    if processor.is_unknown(index):
        return UNKNOWN
    if processor.is_control(index):
        return CONTROL
    if processor.is_unused(index):
        return UNUSED
    return BYTE if processor.is_byte(index) else NORMAL
