"""What the tests of a device with a cloud share."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hybrids import Ask

from autoglm_gguf import Chunk, Completion, HybridClient
from autoglm_gguf.messages import collect


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback is reached directly, whatever the machine's proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(params=["stream", "astream"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Ask as a thread does, and as an event loop does."""

    def ask(model: HybridClient, prompt: Any = "go back", **options: Any) -> Completion:
        if request.param == "stream":
            return model.generate(prompt, **options)

        async def read() -> list[Chunk]:
            return [chunk async for chunk in model.astream(prompt, **options)]

        return collect(asyncio.run(read()))

    return ask
