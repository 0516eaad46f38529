"""A conversation in a file, with the KV state that makes its next turn cheap.

The file is a ZIP without compression: ``session.json``, one ``images/N`` per different image, and
``kv.bin`` in llama.cpp's format. It may come from an enemy: nothing of it is trusted before it was
checked, no name in it becomes a path, and nothing of it is larger than the file. Knows engines and
messages; knows nothing of prompts.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoglm_gguf.engine.base import MMPROJ, MODEL, Engine
from autoglm_gguf.engine.content import ImageCells, Piece, count_cells
from autoglm_gguf.errors import ImageError, SavedSessionError
from autoglm_gguf.messages import ImagePart, Message, Part, Role, TextPart
from autoglm_gguf.vision import MAX_FILE_BYTES, encode_image_file, open_image

FORMAT, VERSION = "autoglm-gguf session", 1
_JSON, _STATE, _IMAGES = "session.json", "kv.bin", "images/"
_MEMBER = re.compile(r"session\.json|kv\.bin|images/(0|[1-9][0-9]{0,3})")
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$"
_MAX_JSON_BYTES = 16 * 2**20
_MAX_CELLS = 2**20
_COPY_BYTES = 1 << 20
_DRAFT = ".autoglm-"
_ENCRYPTED = 0x1  # a flag bit of a ZIP member


_Name: TypeAlias = Annotated[str, Field(pattern=_PRINTABLE, max_length=500)]
_Token: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Heading(BaseModel):
    """What stays in every version."""

    format: Literal["autoglm-gguf session"]
    version: int


class _Text(_Checked):
    text: str


class _Image(_Checked):
    image: int = Field(ge=0, lt=10_000)
    """N of ``images/N``."""


class _Message(_Checked):
    role: Role
    content: str | Annotated[list[_Text | _Image], Field(max_length=10_000)]


class _ImageCells(_Checked):
    key: str = Field(pattern=r"^[0-9a-f]{0,64}$")
    n_columns: int = Field(ge=1, le=_MAX_CELLS)
    n_rows: int = Field(ge=1, le=_MAX_CELLS)


class _State(_Checked):
    facts: dict[_Name, _Name]
    """`Engine.state_facts`."""
    pieces: list[_Token | _ImageCells] = Field(min_length=1, max_length=_MAX_CELLS)


class _Session(_Checked):
    format: str
    version: int
    name: _Name
    """Of the model."""
    model: _Name
    """`MODEL` of the facts."""
    system: str | None
    messages: list[_Message] = Field(max_length=100_000)
    state: _State | None


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What was written."""

    path: Path
    n_messages: int
    n_images: int
    """Different ones."""
    n_cells: int
    """KV cells that need not be evaluated again."""
    file_bytes: int


@dataclass(frozen=True, slots=True)
class RestoredSession:
    """What was read; the KV state went to the engine."""

    messages: tuple[Message, ...]
    system: str | None
    notes: tuple[str, ...]
    """What could not be restored, and why."""


def write_session(
    path: Path,
    engine: Engine,
    messages: Sequence[Message],
    system: str | None,
    prompt: Sequence[Piece],
) -> SavedSession:
    """Write a conversation and the engine's KV state of it.

    The file appears under its name when it is whole. Until then the folder holds the state twice;
    this process holds one image and a copy of one layer's keys or values.

    Args:
        path: Replaced if it exists.
        engine: Held exclusively by the caller. What it holds beyond ``prompt`` is forgotten: it
            belongs to another conversation, or no later turn can use it.
        messages: Their images are stored as the files they are; Pillow images as PNG.
        system: The session's system prompt.
        prompt: What a next turn would begin with.

    Raises:
        SavedSessionError: The file cannot be written.
        ImageError: An image cannot be read any more.
        EngineError: The KV state cannot be written.
    """
    engine.keep(engine.content.n_common(prompt))
    pieces = engine.content.pieces
    images: dict[str, int] = {}
    try:
        with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=path.parent) as folder:
            draft, state = Path(folder, "session"), Path(folder, _STATE)
            with zipfile.ZipFile(draft, "w") as archive:
                stored = [_store_message(archive, message, images) for message in messages]
                if pieces:
                    engine.save_state(state)
                    with state.open("rb") as source:
                        _store(archive, _STATE, source, state.stat().st_size)
                    state.unlink()
                session = _Session(
                    format=FORMAT,
                    version=VERSION,
                    name="".join(c if c.isprintable() else "?" for c in engine.info.name),
                    model=engine.state_facts[MODEL],
                    system=system,
                    messages=stored,
                    state=_describe_state(engine, pieces) if pieces else None,
                )
                data = session.model_dump_json().encode()
                _store(archive, _JSON, io.BytesIO(data), _bounded(_JSON, len(data)))
            _sync(draft)
            n_bytes = draft.stat().st_size
            draft.replace(path)
    except OSError as error:
        raise SavedSessionError(
            f"{path}: cannot be written ({error.strerror or error})", hint="give another file"
        ) from error
    return SavedSession(path, len(messages), len(images), count_cells(pieces), n_bytes)


def _store_message(archive: zipfile.ZipFile, message: Message, images: dict[str, int]) -> _Message:
    """Describe a message; images that are new (by their files' sha256) go to the archive."""
    if isinstance(message.content, str):
        return _Message(role=message.role, content=message.content)
    parts: list[_Text | _Image] = []
    for part in message.content:
        if isinstance(part, TextPart):
            parts.append(_Text(text=part.text))
            continue
        data = encode_image_file(part.source)
        digest = hashlib.sha256(data).hexdigest()
        if digest not in images:
            images[digest] = len(images)
            name = f"{_IMAGES}{images[digest]}"
            _store(archive, name, io.BytesIO(data), _bounded(name, len(data)))
        parts.append(_Image(image=images[digest]))
    return _Message(role=message.role, content=parts)


def _describe_state(engine: Engine, pieces: Sequence[Piece]) -> _State:
    return _State(
        facts=_facts(engine, pieces),
        pieces=[
            piece
            if isinstance(piece, int)
            else _ImageCells(key=piece.key, n_columns=piece.grid[0], n_rows=piece.grid[1])
            for piece in pieces
        ],
    )


def _facts(engine: Engine, pieces: Sequence[Piece]) -> dict[str, str]:
    """What the state of these pieces depends on; on the mmproj where there is an image."""
    has_images = any(isinstance(piece, ImageCells) for piece in pieces)
    return {k: v for k, v in engine.state_facts.items() if has_images or k != MMPROJ}


def _store(archive: zipfile.ZipFile, name: str, source: IO[bytes], n_bytes: int) -> None:
    info = zipfile.ZipInfo(name)
    info.file_size = n_bytes  # zipfile asks it whether 32 bits will do
    with archive.open(info, "w") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)


def _bounded(name: str, n_bytes: int) -> int:
    """What would not be read back is not written."""
    n_most = _MAX_JSON_BYTES if name == _JSON else MAX_FILE_BYTES
    if n_bytes > n_most:
        raise SavedSessionError(
            f"{name}: too large to be saved ({n_bytes} bytes, {n_most} at most)"
        )
    return n_bytes


def _sync(path: Path) -> None:
    """Have it on the disk before it gets its name."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_session(path: Path, engine: Engine) -> RestoredSession:
    """Read a conversation, and give the engine its KV state where that fits.

    What fits the conversation only (another quantisation of the model, another n_gpu_layers, too
    small an n_ctx, …) is told in ``notes``, and costs the next turn its time. The state is copied
    to a file of its own first, beside ``path`` or, where that is not allowed, in the system's
    temporary folder. This process holds the images, and a copy of one layer's keys or values.

    Args:
        path: Written by `write_session`, or by an enemy.
        engine: Held exclusively by the caller; unchanged by a file that is refused.

    Raises:
        SavedSessionError: The file is missing, broken, of another version or of another model.
        EngineError: llama.cpp refused the KV state.
    """
    try:
        if path.is_fifo():  # opening it waits for ever
            raise _BrokenError("a pipe")
        with path.open("rb") as file:
            archive = _Archive(file)
            session = _read_json(archive)
            messages = _restore_messages(archive, session)
            _check_model(path, session, engine, has_images=len(archive.image_numbers) > 0)
            notes = (
                ()
                if session.state is None
                else _restore_state(path, archive, session.state, engine)
            )
    except _BrokenError as error:
        raise SavedSessionError(
            f"{path.name}: broken, or no saved session ({error})",
            hint="save it again: /save FILE in autoglm-gguf chat, or ChatSession.save",
        ) from error
    except OSError as error:
        raise SavedSessionError(
            f"{path}: cannot be read ({error.strerror or error})", hint="check the path"
        ) from error
    return RestoredSession(messages, session.system, notes)


class _BrokenError(Exception):
    """The file is no session as `write_session` writes it."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (OSError, _BrokenError):
        raise
    except Exception as error:  # zipfile raises nearly everything on broken files
        raise _BrokenError(str(error) or type(error).__name__) from error


class _Archive:
    """The members of a ZIP, which are what it says they are: plain, named as ours, in the file.

    Raises:
        _BrokenError: They are not.
    """

    def __init__(self, file: IO[bytes]) -> None:
        with _reading():
            self._zip = zipfile.ZipFile(file)
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            name = info.filename
            if not _MEMBER.fullmatch(name) or name in self._members:
                raise _BrokenError(f"unexpected or double member {name!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
                raise _BrokenError(f"{name}: compressed or encrypted")
            self._members[name] = info
        # Stored, so nothing grows; added up, so that no bytes are read twice under two names.
        claimed = sum(max(i.file_size, i.compress_size) for i in self._members.values())
        if claimed > os.fstat(file.fileno()).st_size:
            raise _BrokenError(f"members of {claimed} bytes")

    @property
    def image_numbers(self) -> set[int]:
        """Of the images it has."""
        names = (name for name in self._members if name.startswith(_IMAGES))
        return {int(name.removeprefix(_IMAGES)) for name in names}

    def n_bytes(self, name: str) -> int:
        """Size of a member; 0 if there is none."""
        return self._members[name].file_size if name in self._members else 0

    def read(self, name: str, n_most: int) -> bytes:
        """A member as a whole."""
        if not 0 < self.n_bytes(name) <= n_most:
            raise _BrokenError(f"{name}: missing, empty or too large ({self.n_bytes(name)} bytes)")
        with _reading():
            return self._zip.read(self._members[name])

    def copy(self, name: str, target: Path) -> None:
        """A member into a file."""
        with _reading(), self._zip.open(self._members[name]) as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy, _COPY_BYTES)


def _read_json(archive: _Archive) -> _Session:
    data = archive.read(_JSON, _MAX_JSON_BYTES)
    try:
        version = _Heading.model_validate_json(data).version
        if version != VERSION:
            raise _BrokenError(f"version {version}, this reads {VERSION}")
        return _Session.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(place) for place in first["loc"])
        raise _BrokenError(f"{_JSON}: {where!r}: {first['msg']}") from error


def _restore_messages(archive: _Archive, session: _Session) -> tuple[Message, ...]:
    """The messages, their images as the bytes of files."""
    said = [message.content for message in session.messages if not isinstance(message.content, str)]
    shown = {part.image for parts in said for part in parts if isinstance(part, _Image)}
    if shown != archive.image_numbers or (session.state is None) != (not archive.n_bytes(_STATE)):
        raise _BrokenError("its parts do not belong together")
    images = {number: _read_image(archive, number) for number in sorted(shown)}

    def restore(content: str | list[_Text | _Image]) -> str | tuple[Part, ...]:
        if isinstance(content, str):
            return content
        return tuple(
            TextPart(part.text) if isinstance(part, _Text) else ImagePart(images[part.image])
            for part in content
        )

    return tuple(Message(message.role, restore(message.content)) for message in session.messages)


def _read_image(archive: _Archive, number: int) -> bytes:
    data = archive.read(f"{_IMAGES}{number}", MAX_FILE_BYTES)
    try:
        open_image(data)
    except ImageError as error:
        raise _BrokenError(f"{_IMAGES}{number}: {error.message}") from error
    return data


def _check_model(path: Path, session: _Session, engine: Engine, *, has_images: bool) -> None:
    if session.model != engine.state_facts[MODEL]:
        raise SavedSessionError(
            f"{path.name}: saved with another model ({session.name}, this is {engine.info.name})",
            hint="load the model it was saved with",
        )
    if has_images and engine.info.vision is None:
        raise SavedSessionError(
            f"{path.name}: holds images, and {engine.info.name} takes none",
            hint="load the model together with its mmproj file",
        )


def _restore_state(path: Path, archive: _Archive, state: _State, engine: Engine) -> tuple[str, ...]:
    """Give the engine its KV state, or say why not."""
    pieces: tuple[Piece, ...] = tuple(
        piece if isinstance(piece, int) else ImageCells(piece.key, (piece.n_columns, piece.n_rows))
        for piece in state.pieces
    )
    n_cells, facts = count_cells(pieces), _facts(engine, pieces)
    changed = [
        f"{name}: {state.facts.get(name, '?')} when saved, {facts.get(name, '?')} now"
        for name in sorted({*facts, *state.facts})
        if facts.get(name) != state.facts.get(name)
    ]
    if n_cells > engine.info.n_ctx:
        changed.append(f"n_ctx: {n_cells} cells were saved, {engine.info.n_ctx} are there now")
    if changed:
        return (
            "KV state: not restored, so the next answer evaluates the whole conversation "
            f"({'; '.join(changed)})",
        )
    if any(isinstance(piece, int) and piece >= engine.info.n_vocab for piece in pieces):
        raise _BrokenError("tokens that the model does not have")
    n_bytes = engine.state_bytes(pieces)
    if archive.n_bytes(_STATE) != n_bytes:
        raise _BrokenError(f"{_STATE}: {archive.n_bytes(_STATE)} bytes, {n_bytes} are required")
    with _open_folder(path.parent) as folder:
        archive.copy(_STATE, folder / _STATE)
        try:
            engine.load_state(folder / _STATE, pieces)
        except SavedSessionError as error:
            raise _BrokenError(error.message) from error
    return ()


@contextlib.contextmanager
def _open_folder(parent: Path) -> Iterator[Path]:
    """A folder for a while, in another one or, where that is not allowed, in the system's."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=_DRAFT, dir=parent)
    except OSError:
        folder = tempfile.TemporaryDirectory(prefix=_DRAFT)
    with folder as name:
        yield Path(name)
