"""Saved conversations over the fake engine: what comes back, what it costs, what is refused."""

from __future__ import annotations

import io
import json
import os
import random
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from autoglm_gguf import (
    AutoGLM,
    ChatSession,
    EngineBusyError,
    EngineError,
    ImageError,
    ImagePart,
    Message,
    SavedSessionError,
    TextPart,
)
from autoglm_gguf.engine.base import MMPROJ, MODEL
from autoglm_gguf.engine.fake import FakeEngine

SCREEN = Image.linear_gradient("L").resize((112, 168)).convert("RGB")  # 4 x 6 image tokens
Members = dict[str, bytes]


def talk(engine: FakeEngine, *, with_image: bool = True) -> ChatSession:
    """Two turns, a screenshot in the first."""
    chat = AutoGLM(engine).chat(system="S")
    chat.send("what is this?", image=SCREEN if with_image else None)
    chat.send("and now?")
    return chat


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "monday.session"
    talk(FakeEngine(b"yes")).save(path)
    return path


def unpack(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path: Path, members: Members, kind: int = zipfile.ZIP_STORED) -> None:
    """A whole ZIP with the right checksums."""
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def change_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    members = unpack(path)
    session = json.loads(members["session.json"])
    change(session)
    pack(path, {**members, "session.json": json.dumps(session).encode()})


def refuse(path: Path, engine: FakeEngine | None = None) -> str:
    """Load what must be refused, and leave the engine as it was; the message."""
    engine = engine or FakeEngine(b"yes")
    model = AutoGLM(engine)
    model.generate("something else", raw=True)
    before = engine.content.pieces
    with pytest.raises(SavedSessionError) as caught:
        model.load_chat(path)
    assert engine.content.pieces == before
    assert caught.value.hint
    return caught.value.message


# --- there and back ---


def test_save_and_load_give_the_conversation_back(tmp_path: Path) -> None:
    chat = talk(FakeEngine(b"yes"))
    summary = chat.save(tmp_path / "a")
    restored = AutoGLM(FakeEngine(b"yes")).load_chat(tmp_path / "a")
    assert restored.notes == ()
    assert [m.role for m in restored.messages] == [m.role for m in chat.messages]
    assert restored.messages[2:] == chat.messages[2:]
    image, text = restored.messages[1].content
    assert text == TextPart("what is this?")
    assert isinstance(image, ImagePart)
    assert isinstance(image.source, bytes)
    assert Image.open(io.BytesIO(image.source)).tobytes() == SCREEN.tobytes()
    assert (summary.n_messages, summary.n_images) == (5, 1)
    assert summary.file_bytes == (tmp_path / "a").stat().st_size
    restored.clear()
    assert restored.messages == [Message("system", "S")]


def test_turn_after_a_restart_costs_what_it_would_have_cost(saved: Path) -> None:
    again = talk(FakeEngine(b"yes")).send("go on", max_tokens=1)
    engine = FakeEngine(b"yes")
    answer = AutoGLM(engine).load_chat(saved).send("go on", max_tokens=1)
    n_new = len("<|user|>\ngo on<|assistant|>\n")
    assert answer.timings.prompt_n == again.timings.prompt_n == n_new
    assert answer.timings.cache_n == again.timings.cache_n > 0
    assert (engine.n_evaluated, engine.n_encoded) == (n_new, 0)


def test_loading_takes_the_place_of_what_the_engine_held(saved: Path) -> None:
    engine = FakeEngine(b"yes")
    model = AutoGLM(engine)
    model.generate("something else", raw=True)
    restored = model.load_chat(saved)
    before = engine.n_evaluated
    restored.send("go on", max_tokens=1)
    assert engine.n_evaluated - before == len("<|user|>\ngo on<|assistant|>\n")


def test_saving_changes_nothing_for_the_conversation_that_goes_on(tmp_path: Path) -> None:
    engine = FakeEngine(b"yes")
    chat = talk(engine)
    messages, held = list(chat.messages), engine.content.pieces
    chat.save(tmp_path / "a")
    assert (chat.messages, engine.content.pieces) == (messages, held)


def test_saving_keeps_a_conversation_that_only_a_short_answer_leaves_room_for(
    tmp_path: Path,
) -> None:
    chat = AutoGLM(FakeEngine(b"yes", n_ctx=1000)).chat()
    for _ in range(4):
        dropped = chat.send("x" * 190, max_tokens=5).usage.dropped_messages
    assert dropped == 0, "they fit since 5 tokens are kept for the answer, not 250"
    assert chat.save(tmp_path / "a").n_cells > 800


def test_messages_that_were_added_as_dicts_are_saved(tmp_path: Path) -> None:
    chat = talk(FakeEngine(b"yes"))
    chat.messages.append({"role": "user", "content": "by hand"})  # type: ignore[arg-type]
    chat.save(tmp_path / "a")
    restored = AutoGLM(FakeEngine(b"yes")).load_chat(tmp_path / "a")
    assert restored.messages[-1] == Message("user", "by hand")


def test_file_keeps_nothing_of_another_conversation(tmp_path: Path) -> None:
    engine = FakeEngine(b"yes")
    model = AutoGLM(engine)
    mine = model.chat()
    mine.send("hello")
    model.chat().send("my PIN is 1234")
    summary = mine.save(tmp_path / "mine")
    state = json.loads(unpack(tmp_path / "mine")["session.json"])["state"]
    assert bytes(state["pieces"]) == b"[gMASK]<sop><|user|>\n"
    assert summary.n_cells == len(state["pieces"])


def test_conversation_that_was_never_evaluated_has_no_state(tmp_path: Path) -> None:
    summary = AutoGLM(FakeEngine()).chat(system="S").save(tmp_path / "a")
    assert summary.n_cells == 0
    assert unpack(tmp_path / "a").keys() == {"session.json"}
    assert AutoGLM(FakeEngine()).load_chat(tmp_path / "a").messages == [Message("system", "S")]


def test_images_are_stored_once_as_the_files_they_are(tmp_path: Path) -> None:
    screen = tmp_path / "screen.jpg"
    SCREEN.save(screen)
    chat = AutoGLM(FakeEngine(b"yes")).chat()
    for source in (screen, str(screen), screen.read_bytes(), SCREEN):
        chat.send("?", image=source)
    assert chat.save(tmp_path / "a").n_images == 2
    screen.unlink()
    restored = AutoGLM(FakeEngine(b"yes")).load_chat(tmp_path / "a")
    members = unpack(tmp_path / "a")
    sources = [m.content[0].source for m in restored.messages[::2]]  # type: ignore[union-attr]
    assert sources == [members["images/0"]] * 3 + [members["images/1"]]
    assert members["images/0"][:3] == b"\xff\xd8\xff"
    assert restored.send("go on").timings.cache_n > 0


def test_transparent_image_is_kept_as_the_model_sees_it(tmp_path: Path) -> None:
    pale = SCREEN.convert("RGBA")
    pale.putalpha(100)
    engine = FakeEngine(b"yes")
    chat = AutoGLM(engine).chat()
    chat.send("?", image=pale)
    chat.save(tmp_path / "a")
    answer = AutoGLM(FakeEngine(b"yes")).load_chat(tmp_path / "a").send("go on", max_tokens=1)
    assert answer.timings.prompt_n == len("<|user|>\ngo on<|assistant|>\n")


def test_text_comes_back_whatever_it_holds(tmp_path: Path) -> None:
    said = '打开微信 🙂 \x00 \u2028 \\ " <|image|> </answer>'
    chat = AutoGLM(FakeEngine(b"yes")).chat(system=said)
    chat.send(said)
    chat.save(tmp_path / "a")
    assert AutoGLM(FakeEngine()).load_chat(tmp_path / "a").messages == chat.messages


# --- what fits only in part ---


@pytest.mark.parametrize("fact", ["text", MMPROJ])
def test_state_of_another_engine_is_dropped_with_a_note(saved: Path, fact: str) -> None:
    engine = FakeEngine(b"yes")
    engine.state_facts[fact] = "other"
    restored = AutoGLM(engine).load_chat(saved)
    (note,) = restored.notes
    assert note.startswith("KV state: not restored")
    assert f"{fact}: fake when saved, other now" in note
    assert len(restored.messages) == 5
    answer = restored.send("go on")
    assert (answer.timings.cache_n, engine.n_encoded) == (0, 1)


def test_state_without_images_fits_whatever_the_mmproj(tmp_path: Path) -> None:
    talk(FakeEngine(b"yes"), with_image=False).save(tmp_path / "a")
    restored = AutoGLM(FakeEngine(b"yes", vision=False)).load_chat(tmp_path / "a")
    assert restored.notes == ()
    assert restored.send("go on").timings.cache_n > 0


def test_state_that_n_ctx_does_not_hold_is_dropped_with_a_note(tmp_path: Path) -> None:
    n_cells = talk(FakeEngine(b"yes")).save(tmp_path / "a").n_cells
    small = AutoGLM(FakeEngine(b"yes", n_ctx=n_cells - 1)).load_chat(tmp_path / "a")
    assert f"n_ctx: {n_cells} cells were saved, {n_cells - 1} are there now" in small.notes[0]
    assert AutoGLM(FakeEngine(b"yes", n_ctx=n_cells)).load_chat(tmp_path / "a").notes == ()


def test_facts_that_one_side_lacks_are_a_mismatch(saved: Path) -> None:
    engine = FakeEngine(b"yes")
    engine.state_facts["device"] = "Vulkan0"
    assert "device: ? when saved, Vulkan0 now" in AutoGLM(engine).load_chat(saved).notes[0]


# --- what is refused ---


def test_load_refuses_another_model(saved: Path) -> None:
    engine = FakeEngine(b"yes")
    engine.state_facts[MODEL] = "other"
    engine.info = replace(engine.info, name="other-9B")
    assert "saved with another model (fake, this is other-9B)" in refuse(saved, engine)


def test_load_refuses_images_for_a_model_without_eyes(saved: Path) -> None:
    assert "holds images" in refuse(saved, FakeEngine(b"yes", vision=False))


def test_load_refuses_another_version(saved: Path) -> None:
    change_json(saved, lambda session: session.update(version=2, surprise=1))
    assert "version 2, this reads 1" in refuse(saved)


def test_load_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refuse(tmp_path / "nowhere")
    assert "directory" in refuse(tmp_path)


def test_load_refuses_a_pipe_and_does_not_wait_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in refuse(tmp_path / "pipe")


@pytest.mark.parametrize("data", [b"", b"PK", b"hello" * 99, b"PK\x05\x06" + bytes(18)])
def test_load_refuses_what_is_no_session(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert "broken, or no saved session" in refuse(tmp_path / "a")


def test_load_refuses_a_file_truncated_anywhere(saved: Path) -> None:
    data = saved.read_bytes()
    for n in range(0, len(data), 97):
        saved.write_bytes(data[:n])
        assert "broken" in refuse(saved) or "cannot be read" in refuse(saved)


def test_load_survives_any_flipped_byte(saved: Path) -> None:
    """A flip is refused, or lies where nothing is said: dates, for example."""
    data, draw = saved.read_bytes(), random.Random(1)
    for _ in range(200):
        at = draw.randrange(len(data))
        flipped = bytearray(data)
        flipped[at] ^= 1 << draw.randrange(8)
        saved.write_bytes(flipped)
        try:
            restored = AutoGLM(FakeEngine(b"yes")).load_chat(saved)
        except SavedSessionError:
            continue
        assert (len(restored.messages), restored.notes) == (5, ())


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "images/../x", "images/01", "images/10000", "images/", "a\\b", "x"],
)
def test_load_refuses_members_of_other_names(saved: Path, name: str, tmp_path: Path) -> None:
    pack(saved, {**unpack(saved), name: b"1"})
    before = sorted(tmp_path.iterdir())
    assert "unexpected or double member" in refuse(saved)
    assert sorted(tmp_path.iterdir()) == before


def test_load_refuses_a_member_twice(saved: Path) -> None:
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(saved, "a") as archive,
    ):
        archive.writestr("kv.bin", b"1")
    assert "double member" in refuse(saved)


def test_load_refuses_a_zip_bomb(saved: Path) -> None:
    pack(saved, {**unpack(saved), "kv.bin": bytes(10_000_000)}, zipfile.ZIP_DEFLATED)
    assert "compressed" in refuse(saved)


def test_load_refuses_members_that_lie_over_each_other(saved: Path) -> None:
    """Two entries for the same bytes: the file would grow as it is read."""
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        entries = archive.infolist()
        directory = archive.start_dir
    largest = max(entries, key=lambda info: info.file_size)
    at = directory
    for info in entries:
        if info is not largest:  # its sizes and place in the central directory
            size = largest.file_size.to_bytes(4, "little")
            data[at + 20 : at + 28] = size * 2
            data[at + 42 : at + 46] = largest.header_offset.to_bytes(4, "little")
        at += 46 + len(info.filename.encode())
    saved.write_bytes(data)
    message = refuse(saved)
    assert "broken" in message


def test_load_refuses_sizes_beyond_the_file(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        at = archive.start_dir
    data[at + 20 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little") * 2
    saved.write_bytes(data)
    assert "members of" in refuse(saved)


@pytest.mark.parametrize("member", ["session.json", "kv.bin", "images/0"])
def test_load_refuses_a_missing_or_emptied_member(saved: Path, member: str) -> None:
    members = unpack(saved)
    pack(saved, {name: data for name, data in members.items() if name != member})
    assert "broken" in refuse(saved)
    pack(saved, {**members, member: b""})
    assert "broken" in refuse(saved)


def test_load_refuses_an_image_that_is_none(saved: Path) -> None:
    pack(saved, {**unpack(saved), "images/0": b"no image"})
    assert "images/0: image: not an image" in refuse(saved)


def test_load_refuses_an_image_that_no_message_shows(saved: Path) -> None:
    members = unpack(saved)
    pack(saved, {**members, "images/1": members["images/0"]})
    assert "do not belong together" in refuse(saved)


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b"null",
        b'{"format": "autoglm-gguf session", "version": 1}',
        b'{"format": "another", "version": 1}',
        b'{"format": "autoglm-gguf session", "version": 1e400}',
        b'{"format": "autoglm-gguf session", "version": ' + b"9" * 5000 + b"}",
    ],
)
def test_load_refuses_another_json(saved: Path, data: bytes) -> None:
    pack(saved, {**unpack(saved), "session.json": data})
    assert "broken" in refuse(saved)


def _set_piece(value: object) -> Callable[[dict[str, object]], object]:
    def change(session: dict[str, object]) -> None:
        session["state"]["pieces"][3] = value  # type: ignore[index]

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(surprise=1),
        lambda s: s.update(system=5),
        lambda s: s["messages"].append({"role": "boss", "content": "x"}),
        lambda s: s["messages"].append({"role": "user", "content": [{"image": 7}]}),
        lambda s: s["messages"].append({"role": "user", "content": [{"image": -1}]}),
        lambda s: s["messages"].append({"role": "user", "content": [{"path": "/etc/passwd"}]}),
        lambda s: s.update(state=None),
        lambda s: s["state"].update(pieces=[]),
        lambda s: s["state"]["pieces"].pop(),
        lambda s: s["state"]["pieces"].append(5),
        _set_piece(-1),
        _set_piece(258),
        _set_piece(2**31),
        _set_piece(2**70),
        _set_piece(1.5),
        _set_piece("5"),
        _set_piece({"key": "0", "n_columns": 0, "n_rows": 1}),
        _set_piece({"key": "0", "n_columns": -1, "n_rows": -1}),
        _set_piece({"key": "../x", "n_columns": 1, "n_rows": 1}),
        lambda s: s["state"]["facts"].update(text="\x1b[2J"),
        lambda s: s.update(name="\x1b[2J"),
    ],
)
def test_load_refuses_a_session_that_contradicts_itself(
    saved: Path, change: Callable[[dict[str, object]], object]
) -> None:
    change_json(saved, change)
    message = refuse(saved)
    assert "broken" in message
    assert message.isprintable()


def test_load_refuses_a_state_of_other_pieces(saved: Path) -> None:
    members = unpack(saved)
    state = bytearray(members["kv.bin"])
    state[40] ^= 1
    pack(saved, {**members, "kv.bin": bytes(state)})
    assert "KV state: does not fit" in refuse(saved)


# --- saving that fails ---


@pytest.mark.parametrize("name", ["nowhere/a", "."])
def test_save_names_a_file_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(SavedSessionError, match="cannot be written"):
        talk(FakeEngine(b"yes")).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [EngineError("no"), KeyboardInterrupt(), OSError(28, "full")])
def test_save_that_fails_leaves_the_older_file(saved: Path, error: BaseException) -> None:
    class FailingEngine(FakeEngine):
        def save_state(self, path: Path) -> None:
            path.write_bytes(b"half")
            raise error

    before = saved.read_bytes()
    with pytest.raises((type(error), SavedSessionError)):
        talk(FailingEngine(b"yes")).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_save_refuses_an_image_that_is_gone(tmp_path: Path) -> None:
    screen = tmp_path / "screen.png"
    SCREEN.save(screen)
    chat = AutoGLM(FakeEngine(b"yes")).chat()
    chat.send("?", image=screen)
    screen.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        chat.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_save_and_load_refuse_while_a_stream_is_open(saved: Path, tmp_path: Path) -> None:
    model = AutoGLM(FakeEngine(b"a long answer"))
    chat = model.chat()
    answer = chat.stream("?")
    next(answer)
    with pytest.raises(EngineBusyError):
        chat.save(tmp_path / "a")
    with pytest.raises(EngineBusyError):
        model.load_chat(saved)


def test_load_from_a_folder_that_is_closed_to_us(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(tempfile.TemporaryDirectory[str]):
        def __init__(self, prefix: str, dir: Path | None = None) -> None:
            if dir is not None:
                raise PermissionError(13, "closed")
            super().__init__(prefix=prefix, dir=tmp_path)

    monkeypatch.setattr("autoglm_gguf.saved_session.tempfile.TemporaryDirectory", Closed)
    restored = AutoGLM(FakeEngine(b"yes")).load_chat(saved)
    assert restored.send("go on").timings.cache_n > 0
    assert list(tmp_path.iterdir()) == [saved]
