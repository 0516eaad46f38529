"""The real engine's KV state in a file: the same answers after a restart, and nothing trusted."""

from __future__ import annotations

import os
import random
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Shape, build_checkpoint
from PIL import Image

from autoglm_gguf import (
    AutoGLM,
    ChatSession,
    EngineError,
    SavedSession,
    SavedSessionError,
    convert,
)
from autoglm_gguf.config import ContextParams
from autoglm_gguf.engine.base import ImageEmbedding
from autoglm_gguf.engine.content import ImageCells
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.native.library import load_llama

pytestmark = pytest.mark.native
Pair = tuple[Path, Path]
PIXELS = np.random.default_rng(0).integers(0, 255, (112, 168, 3), np.uint8)
GRID = (6, 4)
SCREEN = Image.fromarray(PIXELS)
OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_batch": 16, "n_threads": 1}


@pytest.fixture(scope="session")
def wide_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Heads wide enough for a quantised KV cache, and for its rotation."""
    base = tmp_path_factory.mktemp("wide")
    shape = Shape(head_dim=64, mrope_section=(8, 4, 4))
    pair = convert(build_checkpoint(base / "wide", shape), base / "gguf", "q8_0")
    return pair.text, pair.mmproj


def open_engine(pair: Pair, **options: Any) -> LlamaEngine:
    return LlamaEngine(*pair, ContextParams(**{**OPTIONS, **options}))


def fill(engine: LlamaEngine) -> None:
    """Text, an image of 24 cells and 6 positions, text; a part of it evaluated twice."""
    found = engine.encode_image(PIXELS, GRID)
    engine.eval_tokens([5, 6, 7])
    engine.eval_image(ImageEmbedding(found.data, GRID, "ab"))
    engine.eval_tokens([8, 9, 10])
    engine.keep(5)
    engine.eval_tokens([11, 12])


CONTENT = (5, 6, 7, ImageCells("ab", GRID), 8, 11, 12)
HEAD_BYTES = 5 * 4 + 30 * 24 + 2 * 4  # up to the first layer, of 30 cells


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flash_attn": False},
        {"type_k": "q8_0", "type_v": "q8_0"},
        {"type_k": "q4_0", "type_v": "q4_0"},
        {"type_k": "f32", "type_v": "bf16"},
    ],
    ids=str,
)
def test_restored_state_gives_the_same_logits(
    wide_pair: Pair, options: dict[str, Any], tmp_path: Path
) -> None:
    engine = open_engine(wide_pair, **options)
    fill(engine)
    engine.save_state(tmp_path / "kv")
    assert (tmp_path / "kv").stat().st_size == engine.state_bytes(CONTENT)
    engine.eval_tokens([20])
    wanted = engine.logits()
    engine.close()
    other = open_engine(wide_pair, **{**options, "n_ctx": 300})
    other.eval_tokens([1, 2, 3, 4])
    other.load_state(tmp_path / "kv", CONTENT)
    assert other.content.pieces == CONTENT
    other.eval_tokens([20])
    np.testing.assert_array_equal(other.logits(), wanted)
    other.keep(5)  # cut behind the image
    other.eval_tokens([11, 12])
    other.eval_tokens([20])
    np.testing.assert_array_equal(other.logits(), wanted)


def converse(model: AutoGLM, chat: ChatSession) -> None:
    chat.send("what is this?", image=SCREEN, max_tokens=9)
    chat.send("and now?", max_tokens=5)


@pytest.mark.parametrize("options", [{}, {"flash_attn": False}], ids=str)
def test_conversation_goes_on_after_a_restart_as_without(
    random_pair: Pair, options: dict[str, Any], tmp_path: Path
) -> None:
    with AutoGLM.load(*random_pair[:1], mmproj=random_pair[1], **OPTIONS, **options) as model:
        chat = model.chat(system="S")
        converse(model, chat)
        chat.save(tmp_path / "a")
        wanted = chat.send("go on", max_tokens=12)
    with AutoGLM.load(*random_pair[:1], mmproj=random_pair[1], **OPTIONS, **options) as model:
        restored = model.load_chat(tmp_path / "a")
        found = restored.send("go on", max_tokens=12)
    assert restored.notes == ()
    assert found.tokens == wanted.tokens
    assert (found.timings.cache_n, found.timings.prompt_n) == (
        wanted.timings.cache_n,
        wanted.timings.prompt_n,
    )
    assert found.timings.cache_n > found.usage.image_tokens > 0
    assert found.timings.image_ms == 0
    assert restored.messages[2:] == chat.messages[2:]


def save(pair: Pair, path: Path, **options: Any) -> SavedSession:
    with AutoGLM(open_engine(pair, **options)) as model:
        chat = model.chat()
        converse(model, chat)
        return chat.save(path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"type_k": "f32"}, "type_k: f16 when saved, f32 now"),
        ({"type_v": "bf16"}, "type_v: f16 when saved, bf16 now"),
        ({"flash_attn": False}, "flash_attn: True when saved, False now"),
        ({"n_ctx": 64}, "n_ctx: "),
        ({"n_threads": 2, "n_batch": 64, "n_ctx": 1024}, ""),
    ],
    ids=str,
)
def test_state_is_dropped_with_a_note_where_the_engine_is_another(
    random_pair: Pair, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    save(random_pair, tmp_path / "a")
    with AutoGLM(open_engine(random_pair, **options)) as model:
        restored = model.load_chat(tmp_path / "a")
        assert len(restored.messages) == 4
        assert [named in note for note in restored.notes] == [True] * bool(named)
        if options.get("n_ctx") != 64:
            answer = restored.send("go on", max_tokens=1)
            assert (answer.timings.cache_n > 0) == (not named)


def test_state_is_dropped_when_quantised_cells_are_no_longer_rotated(
    wide_pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"type_k": "q8_0", "type_v": "q8_0"}
    save(wide_pair, tmp_path / "a", **options)
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    with AutoGLM(open_engine(wide_pair, **options)) as model:
        assert "attn_rot: on when saved, off now" in model.load_chat(tmp_path / "a").notes[0]


def test_conversation_moves_to_another_quantisation_and_not_to_another_model(
    tmp_path: Path,
) -> None:
    source = build_checkpoint(tmp_path / "one", Shape())
    pair = convert(source, tmp_path / "q8_0", "q8_0")
    half = convert(source, tmp_path / "f16", "f16")
    other = convert(build_checkpoint(tmp_path / "two", Shape(seed=2)), tmp_path / "other", "q8_0")
    assert pair.mmproj and half.mmproj and other.mmproj
    save((pair.text, pair.mmproj), tmp_path / "a")
    with AutoGLM(open_engine((half.text, half.mmproj))) as model:
        restored = model.load_chat(tmp_path / "a")
        assert "text: " in restored.notes[0]
        assert len(restored.messages) == 4
    with (
        AutoGLM(open_engine((other.text, other.mmproj))) as model,
        pytest.raises(SavedSessionError, match="saved with another model"),
    ):
        model.load_chat(tmp_path / "a")
    copied = (tmp_path / "text-copy.gguf", tmp_path / "mmproj-copy.gguf")
    for original, copy in zip((pair.text, pair.mmproj), copied, strict=True):
        shutil.copy(original, copy)
    with AutoGLM(open_engine(copied)) as model:
        assert model.load_chat(tmp_path / "a").notes == ()


# --- files of an enemy ---


@pytest.fixture
def engine(random_pair: Pair) -> LlamaEngine:
    return open_engine(random_pair)


@pytest.fixture
def state(engine: LlamaEngine, tmp_path: Path) -> bytes:
    fill(engine)
    engine.save_state(tmp_path / "kv")
    return (tmp_path / "kv").read_bytes()


def test_truncated_state_is_refused(engine: LlamaEngine, state: bytes, tmp_path: Path) -> None:
    engine.keep(3)
    for n in [*range(0, len(state), 300), len(state) - 1]:
        (tmp_path / "kv").write_bytes(state[:n])
        with pytest.raises(SavedSessionError, match="KV state"):
            engine.load_state(tmp_path / "kv", CONTENT)
    (tmp_path / "kv").write_bytes(state + b"\0")
    with pytest.raises(SavedSessionError, match="KV state"):
        engine.load_state(tmp_path / "kv", CONTENT)
    assert engine.content.pieces == CONTENT[:3]


def test_any_other_byte_before_the_numbers_is_refused(
    engine: LlamaEngine, state: bytes, tmp_path: Path
) -> None:
    """Counts, positions, columns, rows, tokens, sequences, transposition, layers, types, rows."""
    row_bytes = (len(state) - HEAD_BYTES - 4 * 12) // 4  # keys and values of two layers
    places = [*range(20), *range(20, HEAD_BYTES - 8, 7), *range(HEAD_BYTES - 8, HEAD_BYTES)]
    for n in range(4):
        first = HEAD_BYTES + n * (12 + row_bytes)
        places += range(first, first + 12)
    engine.keep(0)
    for place in places:
        changed = bytearray(state)
        changed[place] ^= 0xFF
        (tmp_path / "kv").write_bytes(changed)
        with pytest.raises(SavedSessionError, match="not as required"):
            engine.load_state(tmp_path / "kv", CONTENT)
    assert len(engine.content) == 0


def test_other_numbers_never_end_the_process(
    engine: LlamaEngine, state: bytes, tmp_path: Path
) -> None:
    draw = random.Random(1)
    for _ in range(60):
        changed = bytearray(state)
        for _ in range(40):
            changed[draw.randrange(HEAD_BYTES + 12, len(state))] = draw.choice((0, 0x7C, 0xFF))
        (tmp_path / "kv").write_bytes(changed)
        try:
            engine.load_state(tmp_path / "kv", CONTENT)
        except SavedSessionError:  # a type or a row size was hit
            continue
        engine.eval_tokens([20])
        engine.logits()
    (tmp_path / "kv").write_bytes(state)
    engine.load_state(tmp_path / "kv", CONTENT)
    engine.eval_tokens([20])
    assert np.isfinite(engine.logits()).all()


def test_flipped_state_in_a_sound_zip_is_refused_or_answers(
    random_pair: Pair, tmp_path: Path
) -> None:
    path, draw = tmp_path / "a", random.Random(2)
    save(random_pair, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    n_refused = 0
    with AutoGLM(open_engine(random_pair)) as model:
        for _ in range(60):
            flipped = bytearray(members["kv.bin"])
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in {**members, "kv.bin": bytes(flipped)}.items():
                    archive.writestr(name, data)
            try:
                restored = model.load_chat(path)
            except SavedSessionError:
                n_refused += 1
                continue
            assert restored.send("go on", max_tokens=2).timings.cache_n > 0
        assert model.generate("hello", max_tokens=2).finish_reason
    assert 0 < n_refused < 60


@pytest.mark.parametrize(
    "pieces",
    [
        CONTENT[:-1],
        (*CONTENT[:-1], 13),
        (*CONTENT[:3], ImageCells("ab", (4, 6)), *CONTENT[4:]),
        (*CONTENT, *range(1000)),
    ],
    ids=["fewer", "another token", "another grid", "more than n_ctx"],
)
def test_state_of_other_pieces_is_refused(
    engine: LlamaEngine, state: bytes, pieces: tuple[int | ImageCells, ...], tmp_path: Path
) -> None:
    with pytest.raises(SavedSessionError, match="KV state"):
        engine.load_state(tmp_path / "kv", pieces)
    assert engine.content.pieces == CONTENT


# --- what goes wrong on the way ---


def test_state_that_cannot_be_written_is_an_error(engine: LlamaEngine, tmp_path: Path) -> None:
    engine.eval_tokens([1, 2])
    with pytest.raises(EngineError, match="KV state: cannot be written"):
        engine.save_state(tmp_path / "nowhere" / "kv")
    engine.eval_tokens([3])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_full_disk_is_an_error(engine: LlamaEngine) -> None:
    fill(engine)
    with pytest.raises(EngineError, match="KV state: cannot be written"):
        engine.save_state(Path("/dev/full"))


def test_ctrl_c_while_a_state_is_restored_leaves_nothing_half(
    engine: LlamaEngine, state: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = load_llama()
    restore = llama.llama_state_seq_load_file

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return restore(*arguments)

    monkeypatch.setattr(llama, "llama_state_seq_load_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.load_state(tmp_path / "kv", CONTENT)
    assert len(engine.content) == 0
    engine.eval_tokens([5, 6, 7])
    found = engine.logits()
    engine.keep(0)
    engine.eval_tokens([5, 6, 7])
    np.testing.assert_array_equal(engine.logits(), found)
