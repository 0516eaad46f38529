"""What the server needs of a model, and the model's way from loading to gone.

`AutoGLM` and `HybridClient` are `Backend`s, and so is whatever answers in their place.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from autoglm_gguf.engine.base import EngineInfo
from autoglm_gguf.memory.measure import MemoryUsage
from autoglm_gguf.messages import Chunk, MessageLike
from autoglm_gguf.prompt import Prompt

State: TypeAlias = Literal["loading", "ready", "failed", "stopping"]


class Backend(Protocol):
    """Who answers; the methods are those of `autoglm_gguf.session.AutoGLM`.

    The server has one answer at a time made, and closes its stream to end it early.
    """

    @property
    def info(self) -> EngineInfo:
        """Name, sizes, limits, and notes on what was chosen."""

    @property
    def takes_images(self) -> bool:
        """Whether messages with images are answered."""

    def astream(
        self, prompt: str | Sequence[MessageLike], *, raw: bool = False, **sampling: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Answer, piece by piece; closing the generator stops the work and waits for its end."""

    def render(self, prompt: str | Sequence[MessageLike], *, raw: bool = False) -> Prompt:
        """The prompt as the model will see it, or the error that this makes."""

    def memory(self) -> MemoryUsage | None:
        """What this process holds now."""

    def cancel(self) -> None:
        """End the answer being made, from any thread."""

    def close(self) -> None:
        """Free everything."""


class Holder:
    """Loads a backend in a thread of its own and tells how far it is.

    The thread is a daemon: a process that is told to stop does not wait for weights to arrive.

    Args:
        load: Called once, in that thread.
    """

    def __init__(self, load: Callable[[], Backend]) -> None:
        self._load = load
        self.state: State = "loading"
        self.backend: Backend | None = None
        self.error: BaseException | None = None
        """Why it failed."""

    async def fetch(self) -> None:
        """Load it; returns when it is ready or has failed."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def work() -> None:
            backend: Backend | None = None
            error: BaseException | None = None
            try:
                backend = self._load()
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(arrive, backend, error)
            except RuntimeError:  # the loop is closed: the server was stopped meanwhile
                if backend is not None:
                    backend.close()

        def arrive(backend: Backend | None, error: BaseException | None) -> None:
            self.backend, self.error = backend, error
            if self.state == "loading":
                self.state = "ready" if error is None else "failed"
            done.set()

        threading.Thread(target=work, name="load", daemon=True).start()
        await done.wait()

    def stop(self) -> None:
        """No request is taken any more."""
        if self.state != "failed":
            self.state = "stopping"
