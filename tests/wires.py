"""The WebSocket as a client uses it: frames of JSON, with patience."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from serving import PATIENCE_S
from websockets.sync.client import ClientConnection, connect


@contextlib.contextmanager
def opened(url: str, **more: Any) -> Iterator[ClientConnection]:
    """A connection; the first frame, which says that it is ready, is read."""
    with dialled(url, **more) as wire:
        assert receive(wire)["type"] == "ready"
        yield wire


def dialled(url: str, **more: Any) -> ClientConnection:
    address = url.replace("http", "ws") + "/ws/generate"
    return connect(address, open_timeout=PATIENCE_S, close_timeout=0.5, proxy=None, **more)


def receive(wire: ClientConnection) -> Any:
    return json.loads(wire.recv(PATIENCE_S))


def send(wire: ClientConnection, **frame: Any) -> None:
    wire.send(json.dumps(frame))


def answer(wire: ClientConnection) -> list[Any]:
    """Frames up to the last one of an answer."""
    frames = [receive(wire)]
    while frames[-1]["type"] not in ("done", "error"):
        frames.append(receive(wire))
    return frames


def said(frames: list[Any]) -> str:
    return "".join(frame["text"] for frame in frames if frame["type"] == "token")
