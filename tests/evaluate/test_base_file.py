"""Base files byte by byte, and what is refused of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from autoglm_gguf import EvaluationError
from autoglm_gguf.evaluate import outfile
from autoglm_gguf.evaluate.base_file import BaseRows, base_bytes, create_base, read_base
from autoglm_gguf.evaluate.passages import Passage, TextChunks, Transcripts

TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8)
CHUNKS = TextChunks(TOKENS, None)
N_VOCAB = 21
ROW = 22 + 4  # 16-bit words: 21 rounded up to even, and two f32


def rows(n: int, start: int = 0) -> np.ndarray:
    return (np.arange(start, start + n)[:, None] * 1000 + np.arange(ROW)).astype(np.uint16)


def write(path: Path, **facts: object) -> Path:
    with create_base(path, CHUNKS, N_VOCAB) as writer:
        writer.add(rows(2))
        writer.add(rows(4, 2))
        writer.facts |= facts
    return path


def test_file_of_a_text_is_llama_perplexitys_with_facts_behind_it(tmp_path: Path) -> None:
    data = write(tmp_path / "base", model="m").read_bytes()
    head = b"_logits_" + struct.pack("<iii", 8, N_VOCAB, 2) + TOKENS.astype("<i4").tobytes()
    body = rows(6).astype("<u2").tobytes()  # of each chunk 8 - 1 - 8 / 2 rows
    assert data[: len(head) + len(body)] == head + body
    assert base_bytes(CHUNKS, N_VOCAB) == len(head) + len(body)
    tail = data[len(head) + len(body) :]
    assert tail == b'{"model": "m"}' + struct.pack("<I", 14) + b"_facts__"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    header = read_base(write(tmp_path / "base", model="m"))
    assert (header.kind, header.n_vocab, header.n_scored) == ("text", N_VOCAB, (3, 3))
    assert header.tokens is not None
    assert np.array_equal(header.tokens, TOKENS)
    assert header.facts == {"model": "m"}
    with BaseRows(header) as reader:
        assert np.array_equal(reader.read(4), rows(4))
        assert np.array_equal(reader.read(2), rows(2, 4))


def test_file_without_facts_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "base")
    path.write_bytes(path.read_bytes()[: base_bytes(CHUNKS, N_VOCAB)])
    assert read_base(path).facts == {}
    for tail in (b"x" * 40, b"[]" + struct.pack("<I", 2) + b"_facts__", b"{" * 12 + b"_facts__"):
        path.write_bytes(path.read_bytes()[: base_bytes(CHUNKS, N_VOCAB)] + tail)
        assert read_base(path).facts == {}


def test_transcripts_have_their_keys_and_lengths(tmp_path: Path) -> None:
    passages = Transcripts((Passage((1, 2, 3), 2, {}), Passage((4, 5), 1, {})))
    path = tmp_path / "base"
    with create_base(path, passages, N_VOCAB) as writer:
        writer.add(rows(3))
    header = read_base(path)
    assert (header.kind, header.n_scored, header.tokens) == ("transcripts", (2, 1), None)
    assert header.keys == tuple(passage.key for passage in passages)
    assert path.read_bytes()[:8] == b"_answer_"


def test_nothing_is_left_when_writing_ends_early(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt, EvaluationError):
        with pytest.raises(error), create_base(tmp_path / "base", CHUNKS, N_VOCAB) as writer:
            writer.add(rows(2))
            raise error("stopped")
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="4 rows are missing"):  # noqa: SIM117
        with create_base(tmp_path / "base", CHUNKS, N_VOCAB) as writer:
            writer.add(rows(2))
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_too_small_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr(outfile.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(EvaluationError, match="disk too small") as caught:  # noqa: SIM117
        with create_base(tmp_path / "base", CHUNKS, N_VOCAB):
            pytest.fail("it was opened")
    assert "--chunks" in caught.value.hint


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be written"):  # noqa: SIM117
        with create_base(tmp_path / "none" / "base", CHUNKS, N_VOCAB):
            pytest.fail("it was opened")


def test_truncated_files_are_refused_at_every_length(tmp_path: Path) -> None:
    data = write(tmp_path / "base").read_bytes()[: base_bytes(CHUNKS, N_VOCAB)]
    path = tmp_path / "cut"
    for length in [*range(0, 90), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(EvaluationError, match=r"truncated|not a file of base logits") as caught:
            read_base(path)
        assert "--save-base" in caught.value.hint


@pytest.mark.parametrize(
    ("at", "value"),
    [(8, 0), (8, 7), (8, 2**31 - 1), (12, 0), (12, -1), (12, 2**31 - 1), (16, 0), (16, -5)],
)
def test_absurd_sizes_are_refused(tmp_path: Path, at: int, value: int) -> None:
    data = bytearray(write(tmp_path / "base").read_bytes())
    struct.pack_into("<i", data, at, value)
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(EvaluationError, match=r"damaged|truncated"):
        read_base(path)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "base").read_bytes())
    struct.pack_into("<i", data, 20, N_VOCAB)
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(EvaluationError, match="damaged"):
        read_base(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(json.dumps({"a": 1}) * 10)
    with pytest.raises(EvaluationError, match="not a file of base logits"):
        read_base(path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_base(tmp_path / "none")
