"""`ChatSession`: a conversation whose turns are kept. Knows no engine, only who answers."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

from autoglm_gguf.gguf.names import END_OF_ANSWER
from autoglm_gguf.messages import (
    Chunk,
    Completion,
    ImageSource,
    Message,
    MessageLike,
    collect,
    user_message,
)


class Answering(Protocol):
    """Who answers: `AutoGLM`."""

    def stream(
        self, prompt: str | Sequence[MessageLike], **options: Any
    ) -> Generator[Chunk, None, None]:
        """See `AutoGLM.stream`."""


class ChatSession:
    """A conversation; its turns are kept, an interrupted answer as far as it went.

    Args:
        model: Outlives the session.
        system: The system prompt.
    """

    def __init__(self, model: Answering, *, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self.messages: list[Message] = []
        self.clear()

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
