"""A sentencepiece vocabulary trained here, read as chatglm3-6b's, against sentencepiece itself."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from family import GLM, build_chatglm

from autoglm_gguf import AutoGLM, CheckpointError, UnsupportedModelError, convert
from autoglm_gguf.checkpoint.config import read_config
from autoglm_gguf.checkpoint.spm import APPENDED, read_spm_vocabulary

pytestmark = pytest.mark.native

WORDS = (
    *("open", "the", "phone", "app", "and", "tap", "settings", "wait", "three", "seconds"),
    *("hello", "world", "打开", "微信", "支付", "宝", "你好", "世界", "发送"),
)
N_PIECES = 400
SHAPE = replace(GLM, n_vocab=N_PIECES + len(APPENDED) + 4)  # four ids stay without a token


def train(directory: Path, **options: object) -> Path:
    rng = random.Random(0)
    corpus = directory / "corpus.txt"
    lines = (" ".join(rng.choice(WORDS) for _ in range(8)) for _ in range(500))
    corpus.write_text("\n".join(lines), "utf-8")
    settings = {
        "vocab_size": N_PIECES,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(directory / "spm"), **settings
    )
    return directory / "spm.model"


def test_ids_equal_sentencepieces_plus_the_special_tokens(tmp_path: Path) -> None:
    model = train(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    checkpoint = build_chatglm(tmp_path / "checkpoint", SHAPE, spm=model)
    n_pieces = processor.vocab_size()
    special = {token: n_pieces + i for i, token in enumerate(APPENDED)}
    with AutoGLM.load(convert(checkpoint, tmp_path, "f32").text, n_ctx=64) as loaded:
        for text in ("open the app", "打开微信 hello", "unseen ☃ bytes", "three  spaces   here"):
            assert loaded.tokenize(text) == processor.encode(text), text
        ids = loaded.tokenize("[gMASK]sop<|user|>open<|assistant|>")
        assert [i for i in ids if i >= n_pieces] == [
            special[token] for token in ("[gMASK]", "sop", "<|user|>", "<|assistant|>")
        ]
        assert loaded.info.stop_ids == {2, special["<|user|>"], special["<|observation|>"]}
        prompt = loaded.render("open").text
    assert prompt == "[gMASK]sop<|user|>\n open<|assistant|>"


def test_unigram_model_is_refused(tmp_path: Path) -> None:
    model = train(tmp_path, model_type="unigram", vocab_size=300)
    checkpoint = build_chatglm(tmp_path / "checkpoint", SHAPE, spm=model)
    with pytest.raises(UnsupportedModelError, match="not a BPE"):
        read_spm_vocabulary(checkpoint, read_config(checkpoint))


def test_normalising_model_is_refused(tmp_path: Path) -> None:
    model = train(tmp_path, normalization_rule_name="nmt_nfkc")
    checkpoint = build_chatglm(tmp_path / "checkpoint", SHAPE, spm=model)
    with pytest.raises(UnsupportedModelError, match="normalises"):
        read_spm_vocabulary(checkpoint, read_config(checkpoint))


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\xff\xff\xff\xff\x7f"])
def test_file_that_is_no_model_is_an_error(tmp_path: Path, data: bytes) -> None:
    model = tmp_path / "broken.model"
    model.write_bytes(data)
    checkpoint = build_chatglm(tmp_path / "checkpoint", SHAPE, spm=model)
    with pytest.raises(CheckpointError):
        read_spm_vocabulary(checkpoint, read_config(checkpoint))


def test_more_pieces_than_embeddings_is_an_error(tmp_path: Path) -> None:
    model = train(tmp_path, vocab_size=N_PIECES + 50)
    checkpoint = build_chatglm(tmp_path / "checkpoint", SHAPE, spm=model)
    with pytest.raises(CheckpointError, match="do not fit"):
        read_spm_vocabulary(checkpoint, read_config(checkpoint))
