"""What a model is shown when it is measured: chunks of a text, or the steps of an agent.

A text is cut as llama.cpp's tools cut it: one after another, n_ctx tokens each, the first replaced
by the bos token where the vocabulary has one, the second half scored. A transcript is one request
and its answer, which is scored. Reads and cuts; evaluates nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.config import ContentFormat
from autoglm_gguf.engine.base import EngineInfo
from autoglm_gguf.engine.content import ImageCells, Piece, count_cells
from autoglm_gguf.errors import ContextFullError, EvaluationError, ImageError, PromptError
from autoglm_gguf.memory.estimate import round_n_ctx
from autoglm_gguf.messages import (
    ImagePart,
    ImageSource,
    Message,
    MessageLike,
    TextPart,
    parse_messages,
)
from autoglm_gguf.prompt import render_prompt
from autoglm_gguf.units import format_bytes
from autoglm_gguf.vision import Pixels, read_pixels

Kind: TypeAlias = Literal["text", "transcripts"]
Source: TypeAlias = "str | os.PathLike[str] | Sequence[Sequence[MessageLike]]"
N_CTX: dict[Kind, int] = {"text": 512, "transcripts": 4096}
"""The context where none is given, tokens."""
LEAST_N_CTX = 8
_MAX_BYTES = 256 * 2**20
_JSON_LINES = ".jsonl"


class Reader(Protocol):
    """Who cuts text into tokens: an engine."""

    @property
    def info(self) -> EngineInfo:
        """Its model's properties."""

    @property
    def bos(self) -> int | None:
        """What the vocabulary puts before a text; None where it puts nothing."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids; literal special tokens become their ids; nothing is added."""

    def tokenize_document(self, text: str, *, parse_special: bool = False) -> NDArray[np.int32]:
        """Token ids ``(n,)`` of a text that is no prompt."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text or transcripts, and how they are cut.

    Raises:
        ValueError: A size out of range.
    """

    source: Source
    """A file: text in UTF-8, or JSON lines, each the messages of one request and its answer, the
    last one (``{"messages": […]}`` or the list alone; images as paths beside the file, or ``data:``
    URLs). Or conversations."""
    kind: Kind | None = None
    """None tells by the name: ``.jsonl`` are transcripts."""
    n_ctx: int | None = None
    """Tokens of a chunk, or room for a transcript; None: 512, and 4096."""
    n_chunks: int | None = None
    """Only the first chunks, or transcripts; None: all."""
    parse_special: bool = False
    """Special tokens written literally in a text become their ids. In transcripts they do."""
    content_format: ContentFormat = "openai"
    """How a transcript's image and text are joined; see `render_prompt`."""

    def __post_init__(self) -> None:
        if self.n_ctx is not None and self.n_ctx < LEAST_N_CTX:
            raise ValueError(f"n_ctx {self.n_ctx}: at least {LEAST_N_CTX}")
        if self.n_chunks is not None and self.n_chunks < 1:
            raise ValueError(f"n_chunks {self.n_chunks}: at least 1")
        if self.kind == "text" and self.path is None:
            raise ValueError("corpus: conversations are transcripts, not text")

    @property
    def path(self) -> Path | None:
        """The file; None for conversations."""
        return Path(self.source) if isinstance(self.source, str | os.PathLike) else None

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return "transcripts" if self.path is None else self.path.name

    @property
    def resolved(self) -> Corpus:
        """With kind and n_ctx decided."""
        kind = self.kind
        if kind is None:
            is_text = self.path is not None and self.path.suffix != _JSON_LINES
            kind = "text" if is_text else "transcripts"
        return replace(self, kind=kind, n_ctx=self.n_ctx or N_CTX[kind])


@dataclass(frozen=True, slots=True)
class Passage:
    """Something that is evaluated from its beginning on."""

    pieces: tuple[Piece, ...]
    n_scored: int
    """Of the last tokens, how many are scored: their probabilities after what comes before them."""
    images: Mapping[str, ImageSource]
    """By their keys."""

    @property
    def targets(self) -> NDArray[np.int32]:
        """The scored tokens, ``(n_scored,)``."""
        return np.array(self.pieces[len(self.pieces) - self.n_scored :], np.int32)

    @property
    def key(self) -> str:
        """Equal keys are equal passages."""
        plain = [p if isinstance(p, int) else [p.key, *p.grid] for p in self.pieces]
        return hashlib.sha256(json.dumps([self.n_scored, plain]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TextChunks:
    """A text in chunks of n_ctx tokens."""

    tokens: NDArray[np.int32]
    """``(n_chunks, n_ctx)``, as they are in the text."""
    bos: int | None
    """Shown in the place of each chunk's first token."""
    kind: Kind = "text"

    @property
    def n_scored(self) -> tuple[int, ...]:
        """Scored tokens of each chunk: its second half, less the token that nothing follows."""
        n_chunks, n_ctx = map(int, self.tokens.shape)
        return (n_ctx - 1 - n_ctx // 2,) * n_chunks

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Passage]:
        return map(self.passage, range(len(self)))

    def passage(self, index: int) -> Passage:
        """One chunk."""
        chunk = self.tokens[index].tolist()
        if self.bos is not None:
            chunk[0] = self.bos
        return Passage(tuple(chunk), self.n_scored[index], {})


@dataclass(frozen=True, slots=True)
class Transcripts:
    """Requests with their answers, cut and checked."""

    passages: tuple[Passage, ...]
    kind: Kind = "transcripts"

    @property
    def n_scored(self) -> tuple[int, ...]:
        """Scored tokens of each: its answer."""
        return tuple(passage.n_scored for passage in self.passages)

    def __len__(self) -> int:
        return len(self.passages)

    def __iter__(self) -> Iterator[Passage]:
        return iter(self.passages)

    def passage(self, index: int) -> Passage:
        """One of them."""
        return self.passages[index]


Passages: TypeAlias = TextChunks | Transcripts


def read_corpus(corpus: Corpus) -> str | list[tuple[Message, ...]]:
    """Read a corpus before any model is loaded: the text, or the conversations.

    Raises:
        EvaluationError: It cannot be read, is not UTF-8, empty, or no transcripts.
    """
    corpus = corpus.resolved
    if corpus.path is None:
        assert not isinstance(corpus.source, str | os.PathLike)
        given = list(corpus.source)[: corpus.n_chunks]
        if not given:
            raise EvaluationError("transcripts: none given")
        return [_check_conversation(c, f"transcript {n}") for n, c in enumerate(given, 1)]
    text = _read_text(corpus.path)
    if corpus.kind == "text":
        return text.removesuffix("\n")  # one, as llama.cpp's tools do
    return list(_parse_lines(text, corpus.path, corpus.n_chunks))


def cut_corpus(
    reader: Reader, corpus: Corpus, content: str | list[tuple[Message, ...]]
) -> Passages:
    """Cut what `read_corpus` gave with a model's tokenizer and template.

    Raises:
        EvaluationError: A text of fewer than two chunks.
        ContextFullError: A transcript that does not fit n_ctx.
        PromptError, ImageError: A transcript that cannot be rendered, or its image not used.
    """
    corpus = corpus.resolved
    assert corpus.n_ctx is not None
    if isinstance(content, str):
        tokens = reader.tokenize_document(content, parse_special=corpus.parse_special)
        return cut_tokens(tokens, corpus.n_ctx, reader.bos, corpus.n_chunks, corpus.name)
    passages = []
    for number, messages in enumerate(content, 1):
        try:
            passage = _cut_transcript(reader, messages, corpus.content_format)
        except (PromptError, ImageError) as error:
            where = f"{corpus.name}, transcript {number}"
            raise type(error)(f"{where}: {error.message}", hint=error.hint) from error
        n_cells = count_cells(passage.pieces)
        if n_cells > corpus.n_ctx:
            raise ContextFullError(
                f"{corpus.name}, transcript {number}: does not fit the context ({n_cells} tokens, "
                f"n_ctx {corpus.n_ctx})",
                n_prompt=n_cells,
                n_ctx=corpus.n_ctx,
                hint=f"--n-ctx {round_n_ctx(n_cells)}, or a smaller --max-image-tokens",
            )
        passages.append(passage)
    return Transcripts(tuple(passages))


def cut_tokens(
    tokens: NDArray[np.int32], n_ctx: int, bos: int | None, n_chunks: int | None, name: str
) -> TextChunks:
    """Chunks of a tokenised text; what is left at its end is not used.

    Raises:
        EvaluationError: There are fewer than two chunks of tokens, which llama.cpp's tools refuse.
    """
    if tokens.size < 2 * n_ctx:
        smaller = tokens.size // 2
        raise EvaluationError(
            f"{name}: too short ({tokens.size} tokens, required {2 * n_ctx}: two chunks of n_ctx "
            f"{n_ctx})",
            hint="give a longer text"
            + (f", or --n-ctx {smaller} at most" if smaller >= LEAST_N_CTX else ""),
        )
    n = min(tokens.size // n_ctx, n_chunks or tokens.size)
    return TextChunks(tokens[: n * n_ctx].reshape(n, n_ctx), bos)


def read_image(source: ImageSource, info: EngineInfo) -> Pixels:
    """A transcript's image as the model sees it.

    Raises:
        ImageError: It cannot be used, or the model takes none.
    """
    if info.vision is None:
        raise ImageError(f"{info.name}: takes no images", hint="give its mmproj")
    return read_pixels(source, info.vision, max_image_tokens=info.max_image_tokens)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be read ({error.strerror})", hint="check the path"
        ) from error
    if len(data) > _MAX_BYTES:
        raise EvaluationError(
            f"{path}: too large (at most {format_bytes(_MAX_BYTES)})",
            hint="a few megabytes are enough: head -c 10000000",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path}: not UTF-8 (byte 0x{data[error.start]:02x} at {error.start})",
            hint=f"iconv -f ENCODING -t UTF-8 {path.name} > utf8.txt",
        ) from error
    if not text.strip():
        raise EvaluationError(f"{path}: empty", hint="give a file with text")
    return text


def _parse_lines(text: str, path: Path, n_most: int | None) -> Iterator[tuple[Message, ...]]:
    text = text.removeprefix("\N{BYTE ORDER MARK}")
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines[:n_most]:
        where = f"{path.name}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(
                f"{where}: not JSON ({error})",
                hint='transcripts are JSON lines: {"messages": […]} each; text goes with --text',
            ) from error
        messages = value.get("messages") if isinstance(value, dict) else value
        conversation = _check_conversation(messages, where)
        yield tuple(_beside(message, path.parent, where) for message in conversation)


def _check_conversation(messages: Any, where: str) -> tuple[Message, ...]:
    try:
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise ValueError("no list of messages")
        parsed = parse_messages(messages)
        if len(parsed) < 2 or parsed[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's answer to those before it")
        if not isinstance(parsed[-1].content, str) or not parsed[-1].content:
            raise ValueError("the answer must be text")
        for message in parsed:
            _check_text(message)
    except ValueError as error:
        raise EvaluationError(f"{where}: no transcript ({error})") from error
    return parsed


def _check_text(message: Message) -> None:
    """Raise UnicodeEncodeError, a ValueError, for halves of characters, which JSON may escape."""
    content = message.content
    parts = (content,) if isinstance(content, str) else content
    for part in parts:
        text = part.text if isinstance(part, TextPart) else part
        if isinstance(text, str):
            text.encode()


def _beside(message: Message, folder: Path, where: str) -> Message:
    """With images that are named by relative paths looked for beside the file."""
    if isinstance(message.content, str):
        return message

    def find(part: Any) -> Any:
        if not isinstance(part, ImagePart):
            return part
        if not isinstance(part.source, str):
            raise EvaluationError(f"{where}: no transcript (an image is a path or a data: URL)")
        if part.source.startswith("data:"):
            return part
        return ImagePart(folder / part.source)  # an absolute path stays as it is

    return replace(message, content=tuple(map(find, message.content)))


def _cut_transcript(
    reader: Reader, messages: Sequence[Message], content_format: ContentFormat
) -> Passage:
    info = reader.info
    if info.chat_template is None:
        raise PromptError(
            f"{info.name}: has no chat template", hint="measure it with a text instead"
        )
    prompt = render_prompt(messages[:-1], info.chat_template, content_format=content_format)
    pieces: list[Piece] = [*reader.tokenize(prompt.segments[0])]
    images: dict[str, ImageSource] = {}
    for source, segment in zip(prompt.images, prompt.segments[1:], strict=True):
        pixels = read_image(source, info)  # read again when it is evaluated: not all are held
        images[pixels.key] = source
        pieces += [ImageCells(pixels.key, pixels.grid), *reader.tokenize(segment)]
    if not pieces or not isinstance(pieces[-1], int):
        raise PromptError("transcript: the prompt is empty, or ends with an image")
    answer = messages[-1].content
    assert isinstance(answer, str)
    tokens = reader.tokenize(answer)
    return Passage((*pieces, *tokens), len(tokens), images)
