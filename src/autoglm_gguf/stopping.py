"""`StopFlag`: ends work that is under way, from any thread, inside native code too.

Knows nothing of what it ends.
"""

from __future__ import annotations

import ctypes


class StopFlag:
    """Set once, from any thread; whoever works looks at it.

    llama.cpp looks too, between any two nodes of its graph, without Python: the flag is a string of
    C, empty until it is set, and the callback that reads it is libc's ``strlen``.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)
        self.address = ctypes.addressof(self._text)
        """Of the C string; valid as long as the flag lives."""

    def set(self) -> None:
        """End the work."""
        self._text[0] = b"\x01"

    def is_set(self) -> bool:
        """Whether the work is to end."""
        return self._text[0] != b"\x00"


class Stopped(Exception):  # noqa: N818 - not an error: it was asked for
    """Work ended early since its `StopFlag` was set; nothing of it counts as evaluated."""
