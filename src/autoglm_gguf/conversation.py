"""`ChatSession`: a conversation whose turns are kept. Knows no engine, only who answers."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autoglm_gguf.gguf.names import END_OF_ANSWER
from autoglm_gguf.messages import (
    Chunk,
    Completion,
    ImageSource,
    Message,
    MessageLike,
    collect,
    parse_messages,
    user_message,
)

if TYPE_CHECKING:
    from autoglm_gguf.saved_session import SavedSession


class Answering(Protocol):
    """Who answers: `AutoGLM`."""

    def stream(
        self, prompt: str | Sequence[MessageLike], **options: Any
    ) -> Generator[Chunk, None, None]:
        """See `AutoGLM.stream`."""

    def save_chat(
        self, path: Path, messages: Sequence[Message], system: str | None
    ) -> SavedSession:
        """See `ChatSession.save`."""


class ChatSession:
    """A conversation; its turns are kept, an interrupted answer as far as it went.

    Args:
        model: Outlives the session.
        system: The system prompt.
        messages: Said before, the system prompt included; None begins anew.
        notes: What of a saved conversation could not be restored, and why.
    """

    def __init__(
        self,
        model: Answering,
        *,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._model = model
        self._system = system
        self.notes = notes
        self.messages: list[Message] = []
        self.clear()
        if messages is not None:
            self.messages = list(messages)

    def answered_by(self, model: Answering) -> ChatSession:
        """The same conversation, with another who answers."""
        return ChatSession(model, system=self._system, messages=self.messages, notes=self.notes)

    def clear(self) -> None:
        """Forget every turn; the system prompt stays."""
        self.messages = [] if self._system is None else [Message("system", self._system)]

    def stream(
        self, text: str, *, image: ImageSource | None = None, **sampling: Any
    ) -> Iterator[Chunk]:
        """Say something and stream the answer. Arguments and errors are those of `AutoGLM.stream`.

        A request that is refused leaves the conversation as it was.
        """
        turn = user_message(text, image)
        answer = self._model.stream([*self.messages, turn], **sampling)
        return self._keep(turn, answer)

    def send(self, text: str, *, image: ImageSource | None = None, **sampling: Any) -> Completion:
        """Say something and take the answer as a whole."""
        return collect(self.stream(text, image=image, **sampling))

    def save(self, path: str | os.PathLike[str]) -> SavedSession:
        """Save the conversation, for `AutoGLM.load_chat`: messages, images and KV state.

        Paths of images are read now, once more. What the engine holds of other conversations does
        not get into the file, and is forgotten. While saving, the file's folder needs room for the
        KV state twice (40,960 bytes a token of the 9B, in f16); this process holds one image and
        one layer's keys or values besides what it held.

        Args:
            path: Replaced if it exists, when the new file is whole.

        Raises:
            SavedSessionError: The file cannot be written.
            ImageError: An image cannot be read any more.
            EngineBusyError: This thread has a stream of the model open.
            EngineError: The KV state cannot be written.
        """
        return self._model.save_chat(Path(path), parse_messages(self.messages), self._system)

    def _keep(self, turn: Message, answer: Generator[Chunk, None, None]) -> Iterator[Chunk]:
        said, finished = "", False
        try:
            for chunk in answer:
                said += chunk.text
                finished = chunk.finish_reason in ("stop", "length")
                yield chunk
        finally:
            answer.close()
            if said or finished:
                self.messages += [turn, Message("assistant", close_answer(said))]

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def close_answer(text: str) -> str:
    """Add the ``</answer>`` that ended a turn, as the client writes it into the history."""
    return text + END_OF_ANSWER if "<answer>" in text and END_OF_ANSWER not in text else text
