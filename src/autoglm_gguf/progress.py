"""How far a long piece of work is: one shape for downloads and conversions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download or a conversion is."""

    file: str
    """Name of the file being worked on."""
    done_bytes: int
    total_bytes: int
    """Of all files together."""
    seconds: float
    """Since the work began."""
    resumed_bytes: int = 0
    """The part of done_bytes that an earlier run did; it says nothing about the speed."""

    @property
    def seconds_left(self) -> float:
        """At the speed so far."""
        done_now = self.done_bytes - self.resumed_bytes
        if done_now <= 0:
            return 0.0
        return self.seconds / done_now * (self.total_bytes - self.done_bytes)


OnProgress = Callable[[Progress], None]
