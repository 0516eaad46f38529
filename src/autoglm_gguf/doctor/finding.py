"""What a check found, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``doctor``."""

    name: str
    """What was looked at."""
    state: State
    """``problem`` keeps this package from running; ``note`` does not, but something is amiss."""
    text: str
    hint: str = ""
    """What to do or type next; empty where nothing is amiss."""
