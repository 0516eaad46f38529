"""Bytes and durations to text, and sizes back to bytes: the only size parser.

``GB`` is 10**9 bytes and ``GiB`` is 2**30 bytes, everywhere.
"""

from __future__ import annotations

import re
from fractions import Fraction

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Read a size such as ``"4GB"``, ``"4GiB"``, ``"512 MiB"`` or ``"4000000000"``.

    Raises:
        ValueError: Not a number with a known unit, or zero or less.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r}: not a size (write for example 4GB, 4GiB or 512MiB)")
    n_bytes = round(Fraction(match.group(1)) * factor)
    if n_bytes <= 0:
        raise ValueError(f"{text!r}: a size must be more than zero bytes")
    return n_bytes


def format_bytes(n_bytes: int) -> str:
    """Write a size in decimal units, as disks and this package's budgets count: ``"5.29 GB"``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.2f} {unit}"
    return f"{n_bytes} B"


def format_seconds(seconds: float) -> str:
    """Write a duration for a person: ``"0.4 s"``, ``"12 s"``, ``"3 min 05 s"``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
