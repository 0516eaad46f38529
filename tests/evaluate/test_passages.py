"""What is cut out of files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from measured import Following
from PIL import Image

from autoglm_gguf import ContextFullError, EvaluationError, ImageError, PromptError
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.evaluate import passages
from autoglm_gguf.evaluate.passages import (
    Corpus,
    TextChunks,
    Transcripts,
    cut_corpus,
    read_corpus,
)

STEP = [
    {"role": "system", "content": "You tap."},
    {"role": "user", "content": "Open Chrome"},
    {"role": "assistant", "content": 'do(action="Launch", app="Chrome")'},
]


def cut(corpus: Corpus, engine: FakeEngine | None = None) -> TextChunks | Transcripts:
    return cut_corpus(engine or Following(), corpus, read_corpus(corpus))


def write_lines(path: Path, *values: object) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n", "utf-8")
    return path


# --- text ---


def test_text_is_cut_one_chunk_after_another_and_its_rest_left(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("0123456789abcdefghijk", "utf-8")
    chunks = cut(Corpus(path, n_ctx=10))
    assert isinstance(chunks, TextChunks)
    assert [bytes(row.tolist()) for row in chunks.tokens] == [b"0123456789", b"abcdefghij"]
    first = chunks.passage(0)
    assert first.pieces == tuple(b"0123456789")
    assert (first.n_scored, bytes(first.targets.tolist())) == (4, b"6789")  # n_ctx - 1 - n_ctx / 2


def test_bos_takes_the_place_of_each_chunks_first_token(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab" * 16, "utf-8")
    engine = Following()
    engine.bos = 257
    chunks = cut(Corpus(path, n_ctx=8), engine)
    assert [passage.pieces[:3] for passage in chunks] == [(257, 98, 97)] * 4
    assert isinstance(chunks, TextChunks)
    assert chunks.tokens[0, 0] == ord("a")  # a base file holds the text's own


def test_one_line_break_at_the_end_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"a\r\nb\n\n")
    assert read_corpus(Corpus(path)) == "a\r\nb\n"


def test_only_the_first_chunks_are_taken_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 100, "utf-8")
    assert len(cut(Corpus(path, n_ctx=8, n_chunks=3))) == 3
    assert len(cut(Corpus(path, n_ctx=8, n_chunks=99))) == 12


def test_too_short_text_is_refused_with_the_n_ctx_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 30, "utf-8")
    with pytest.raises(EvaluationError, match=r"too short \(30 tokens, required 1024") as caught:
        cut(Corpus(path))
    assert "--n-ctx 15" in caught.value.hint
    path.write_text("x" * 3, "utf-8")
    with pytest.raises(EvaluationError, match="too short") as caught:
        cut(Corpus(path, n_ctx=8))
    assert caught.value.hint == "give a longer text"


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (b"", "empty", "with text"),
        (b" \n\n", "empty", "with text"),
        (b"ab\xff", "not UTF-8 \\(byte 0xff at 2\\)", "iconv"),
        (b"\xff\xfea\x00", "not UTF-8 \\(byte 0xff at 0\\)", "iconv"),
    ],
)
def test_files_that_are_no_text_are_refused(
    tmp_path: Path, data: bytes, message: str, hint: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_corpus(Corpus(path))
    assert hint in caught.value.hint


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(EvaluationError, match="cannot be read"):
            read_corpus(Corpus(path))


def test_more_than_anyone_means_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "_MAX_BYTES", 10)
    path = tmp_path / "text.txt"
    path.write_text("x" * 10, "utf-8")
    assert read_corpus(Corpus(path)) == "x" * 10
    path.write_text("x" * 11, "utf-8")
    with pytest.raises(EvaluationError, match=r"too large \(at most 10 B\)"):
        read_corpus(Corpus(path))


@pytest.mark.parametrize("sizes", [{"n_ctx": 7}, {"n_chunks": 0}])
def test_sizes_out_of_range_are_wrong_usage(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Corpus("text.txt", **sizes)  # type: ignore[arg-type]


# --- transcripts ---


def test_transcript_is_its_request_and_its_answer_is_scored(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "steps.jsonl", {"messages": STEP}, STEP)
    found = cut(Corpus(path))
    assert isinstance(found, Transcripts)
    assert len(found) == 2
    first, second = found
    text = bytes(piece for piece in first.pieces if isinstance(piece, int)).decode()
    assert text.endswith("<|user|>\nOpen Chrome<|assistant|>\n" + STEP[2]["content"])
    assert bytes(first.targets.tolist()).decode() == STEP[2]["content"]
    assert first.key == second.key


def test_lines_of_windows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    line = json.dumps(STEP).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    assert len(cut(Corpus(path))) == 2


def test_conversations_may_be_given_in_memory() -> None:
    corpus = Corpus([STEP, STEP, STEP], n_chunks=2)
    assert len(cut(corpus)) == 2
    assert corpus.name == "transcripts"
    with pytest.raises(ValueError, match="not text"):
        Corpus([STEP], kind="text")
    with pytest.raises(EvaluationError, match="none given"):
        read_corpus(Corpus([]))


def test_images_are_found_beside_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (112, 224), "red").save(tmp_path / "screen.png")
    content = [
        {"type": "image_url", "image_url": {"url": "screen.png"}},
        {"type": "text", "text": "Open Chrome"},
    ]
    step = [{"role": "user", "content": content}, STEP[2]]
    [passage] = cut(Corpus(write_lines(tmp_path / "steps.jsonl", step)))
    [image] = [piece for piece in passage.pieces if not isinstance(piece, int)]
    assert image.grid == (4, 8)
    assert passage.images == {image.key: tmp_path / "screen.png"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('"text"', "line 2: no transcript"),
        ('{"text": "a"}', "no list of messages"),
        ("[]", "must be the assistant's answer"),
        (json.dumps(STEP[:2]), "must be the assistant's answer"),
        (json.dumps(STEP[2:]), "must be the assistant's answer"),
        (json.dumps([STEP[1], {"role": "assistant", "content": ""}]), "answer must be text"),
        (json.dumps([{"role": "robot", "content": "a"}, STEP[2]]), "robot"),
        ("[" * 100_000, "not JSON"),
        (json.dumps([{"role": "user", "content": "a\ud800"}, STEP[2]]), "surrogates not allowed"),
        (json.dumps([STEP[1], {"role": "assistant", "content": "\udfff"}]), "surrogates not"),
        (
            json.dumps([{"role": "user", "content": [{"type": "image", "image": 5}]}, STEP[2]]),
            "URL",
        ),
    ],
)
def test_lines_that_are_no_transcript_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(f"{json.dumps(STEP)}\n{line}\n", "utf-8")
    with pytest.raises(EvaluationError, match=message):
        read_corpus(Corpus(path))


def test_transcript_larger_than_n_ctx_is_refused_with_what_would_do() -> None:
    with pytest.raises(ContextFullError, match="transcript 1: does not fit") as caught:
        cut(Corpus([STEP], n_ctx=16))
    assert caught.value.n_prompt > 16
    assert "--n-ctx 256" in caught.value.hint


def test_missing_image_is_told_with_its_transcript(tmp_path: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": "none.png"}}]
    path = write_lines(
        tmp_path / "steps.jsonl", STEP, [{"role": "user", "content": content}, STEP[2]]
    )
    with pytest.raises(ImageError, match=r"steps\.jsonl, transcript 2: .*none\.png: image cannot"):
        cut(Corpus(path))


def test_transcripts_need_a_template_and_images_a_tower() -> None:
    with pytest.raises(PromptError, match="no chat template"):
        cut(Corpus([STEP]), FakeEngine(chat_template=None))
    image = {"type": "image", "image": Image.new("RGB", (56, 56))}
    step = [{"role": "user", "content": [image, {"type": "text", "text": "a"}]}, STEP[2]]
    with pytest.raises(ImageError, match="takes no images"):
        cut(Corpus([step]), FakeEngine(vision=False))


def test_kind_is_told_by_the_name_unless_it_is_given(tmp_path: Path) -> None:
    assert Corpus("a.jsonl").resolved.kind == "transcripts"
    assert Corpus("a.txt").resolved.kind == "text"
    assert Corpus("a.jsonl", kind="text").resolved == Corpus("a.jsonl", kind="text", n_ctx=512)
    assert np.isclose(Corpus("a.jsonl").resolved.n_ctx or 0, 4096)
