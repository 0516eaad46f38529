"""The one number a user gives: how much the whole process may hold."""

from __future__ import annotations

from typing import TypeAlias

from autoglm_gguf.units import parse_bytes

Budget: TypeAlias = int | str | None
DEFAULT_BUDGET = "4GB"
NO_BUDGET = "none"
_MIN_BUDGET_BYTES, MOST_BYTES = 10**6, 2**60
_LONGEST = 40  # characters of a size that anyone means


def parse_budget(budget: Budget) -> int | None:
    """Bytes of a budget: a number, a size such as ``"4GB"`` or ``"4GiB"``, or None for ``"none"``.

    Raises:
        ValueError: No size, or less than a megabyte.
        TypeError: Neither a number of bytes nor text.
    """
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise TypeError(f"memory budget {budget!r}: not a size (write for example 4GB)")
    n_bytes = budget
    if isinstance(n_bytes, str):
        if n_bytes.strip().lower() == NO_BUDGET:
            return None
        if len(n_bytes) > _LONGEST:
            raise ValueError("memory budget: not a size (write for example 4GB); none lifts it")
        try:
            n_bytes = parse_bytes(n_bytes)
        except ValueError as error:
            raise ValueError(f"memory budget {error}; none lifts it") from error
    if n_bytes > MOST_BYTES:
        raise ValueError("memory budget: more than any machine has; none lifts it")
    if n_bytes < _MIN_BUDGET_BYTES:
        raise ValueError(
            f"memory budget {budget!r}: under a megabyte (write for example 4GB); none lifts it"
        )
    return n_bytes
