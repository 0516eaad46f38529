"""Who answers on the device: the protocol, and a stand-in for a model that cannot be held."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias

from autoglm_gguf.conversation import ChatSession
from autoglm_gguf.engine.base import EngineInfo
from autoglm_gguf.errors import DoesNotFitError
from autoglm_gguf.memory.measure import MemoryUsage, measure_memory
from autoglm_gguf.messages import Chunk, ImageSource, Message, MessageLike, parse_messages
from autoglm_gguf.prompt import Prompt

if TYPE_CHECKING:
    from autoglm_gguf.saved_session import SavedSession

CLOUD_N_CTX = 65_536
"""Taken for a cloud's context, which is not known here: the family's."""
PromptLike: TypeAlias = str | Sequence[MessageLike]


class LocalModel(Protocol):
    """What `AutoGLM` offers; each method is described there."""

    @property
    def info(self) -> EngineInfo:
        """See `AutoGLM.info`."""

    def memory(self) -> MemoryUsage | None:
        """See `AutoGLM.memory`."""

    def render(self, prompt: PromptLike, *, raw: bool = False) -> Prompt:
        """See `AutoGLM.render`."""

    def stream(
        self,
        prompt: PromptLike,
        *,
        image: ImageSource | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> Generator[Chunk, None, None]:
        """See `AutoGLM.stream`."""

    def astream(
        self,
        prompt: PromptLike,
        *,
        image: ImageSource | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> AsyncIterator[Chunk]:
        """See `AutoGLM.astream`."""

    def load_chat(self, path: str | os.PathLike[str]) -> ChatSession:
        """See `AutoGLM.load_chat`."""

    def save_chat(
        self, path: Path, messages: Sequence[Message], system: str | None
    ) -> SavedSession:
        """See `AutoGLM.save_chat`."""

    def cancel(self) -> None:
        """See `AutoGLM.cancel`."""

    def close(self) -> None:
        """See `AutoGLM.close`."""


class UnloadedModel:
    """Refuses every request, since its model could not be loaded; the cloud may then answer.

    Args:
        name: The model's.
        error: Why it is not loaded.
        n_ctx: What to tell of the context, which is the cloud's and not known here.
    """

    def __init__(self, name: str, error: DoesNotFitError, *, n_ctx: int = CLOUD_N_CTX) -> None:
        self._error = error
        self.info = EngineInfo(
            name=name,
            n_ctx=n_ctx,
            n_vocab=0,
            stop_ids=frozenset(),
            chat_template=None,
            vision=None,
            max_image_tokens=None,
            notes=(f"model: not loaded ({error.message}); the cloud answers, or nobody",),
        )

    def memory(self) -> MemoryUsage | None:
        """What this process holds now."""
        return measure_memory()

    def render(self, prompt: PromptLike, *, raw: bool = False) -> Prompt:
        """The words alone: the template is in the model.

        Raises:
            ValueError: A message that is none.
        """
        messages = [Message("user", prompt)] if isinstance(prompt, str) else parse_messages(prompt)
        return Prompt(("\n".join(m.text for m in messages),))

    def stream(self, prompt: PromptLike, **options: Any) -> Generator[Chunk, None, None]:
        """Refuse.

        Raises:
            DoesNotFitError: Always.
        """
        self._refuse()

    async def astream(self, prompt: PromptLike, **options: Any) -> AsyncIterator[Chunk]:
        """Refuse, as `stream`."""
        self._refuse()
        yield Chunk("")  # makes it a generator

    def load_chat(self, path: str | os.PathLike[str]) -> ChatSession:
        """Refuse, as `stream`: a saved conversation has the model's KV state."""
        self._refuse()

    def save_chat(
        self, path: Path, messages: Sequence[Message], system: str | None
    ) -> SavedSession:
        """Refuse, as `stream`: there is no KV state to save."""
        self._refuse()

    def cancel(self) -> None:
        """Nothing to cancel."""

    def close(self) -> None:
        """Nothing to free."""

    def _refuse(self) -> NoReturn:
        error = self._error  # a new one each time: whoever catches it may add to its hint
        raise DoesNotFitError(
            error.message,
            budget_bytes=error.budget_bytes,
            required_bytes=error.required_bytes,
            hint=error.hint,
        )
