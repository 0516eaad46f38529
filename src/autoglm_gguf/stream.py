"""Token bytes to text: never half a character, never part of a stop string.

Knows bytes and strings only.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns token bytes into text that may be shown at once.

    A character is held back until its last byte is there; a byte that can never be valid UTF-8
    becomes U+FFFD at once. Text that may be the beginning of a stop string is held back until it is
    clear.

    Args:
        stop: Strings that end the answer and are not part of it.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=1) - 1
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False
        """A stop string was met; what follows is dropped."""

    def push(self, data: bytes) -> str:
        """Take a token's bytes; returns what can be shown now, often nothing."""
        return self._release(self._decoder.decode(data), final=False)

    def finish(self) -> str:
        """Return what is left: an unfinished character becomes U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        # The stop that is complete first ends the answer, so that tokens of one character and of
        # many give the same text; of two that end together, the longer.
        met = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if met:
            self.stopped = True
            shown, self._held = self._held[: min(met)[1]], ""
            return shown
        keep = 0 if final else self._n_ambiguous()
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def _n_ambiguous(self) -> int:
        """Length of the longest ending that is the beginning of a stop string."""
        for n in range(min(self._longest, len(self._held)), 0, -1):
            ending = self._held[-n:]
            if any(stop.startswith(ending) for stop in self._stop):
                return n
        return 0
