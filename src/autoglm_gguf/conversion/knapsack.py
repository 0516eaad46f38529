"""One option for each of many things, at the least damage within a size: an exact knapsack.

Knows sizes and damages; knows nothing of tensors or types. Where sizes are too fine for the table
they are rounded up, so that a choice never exceeds its size, and the gap to a bound that no choice
can beat is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

_MAX_CELLS = 1 << 18  # 240 tensors of them take 63 MB
_BISECTIONS = 100


@dataclass(frozen=True, slots=True)
class Option:
    """One way to hold a thing."""

    n_bytes: int
    damage: float
    """Comparable across things; damages add up."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """One option for each thing."""

    picks: tuple[int, ...]
    """Index of the option, thing by thing."""
    n_bytes: int
    damage: float


class Knapsack:
    """Chooses one option per thing for any size up to a largest one.

    Args:
        things: The options of each; none is empty.
        most_bytes: The largest size that will be asked for.
        max_cells: Sizes that the table tells apart.
    """

    def __init__(
        self,
        things: Sequence[Sequence[Option]],
        most_bytes: int,
        *,
        max_cells: int = _MAX_CELLS,
    ) -> None:
        self._things = [_frontier(options) for options in things]
        self.least_bytes = sum(kept[0][1].n_bytes for kept in self._things)
        """What every thing takes at its smallest."""
        self._most_bytes = most_bytes
        extra = [[o.n_bytes - kept[0][1].n_bytes for _, o in kept] for kept in self._things]
        room = min(max(0, most_bytes - self.least_bytes), sum(sizes[-1] for sizes in extra))
        unit = gcd(*(size for sizes in extra for size in sizes)) or 1
        self._grain = unit * max(1, -(-room // (unit * max_cells)))
        self._extra = [[-(-size // self._grain) for size in sizes] for sizes in extra]
        self._n_cells = room // self._grain + 1
        self._choices = self._fill()

    def _fill(self) -> list[NDArray[np.uint8]]:
        """For each thing and room, the option that is best with the things before it."""
        best = np.zeros(self._n_cells)
        choices = []
        for kept, sizes in zip(self._things, self._extra, strict=True):
            found = best + kept[0][1].damage
            choice = np.zeros(self._n_cells, np.uint8)
            for index, ((_, option), size) in enumerate(zip(kept, sizes, strict=True)):
                if not 0 < size < self._n_cells:
                    continue
                with_it = best[:-size] + option.damage
                better = with_it < found[size:]
                found[size:][better] = with_it[better]
                choice[size:][better] = index
            choices.append(choice)
            best = found
        return choices

    def choose(self, capacity_bytes: int) -> Allocation | None:
        """The least damage within a size; None if nothing is so small.

        Args:
            capacity_bytes: At most the largest size.
        """
        if capacity_bytes < self.least_bytes:
            return None
        room = min(capacity_bytes, self._most_bytes) - self.least_bytes
        cell = min(room // self._grain, self._n_cells - 1)
        picks: list[int] = []
        n_bytes, damage = 0, 0.0
        for kept, sizes, choice in zip(
            reversed(self._things), reversed(self._extra), reversed(self._choices), strict=True
        ):
            index = int(choice[cell])
            cell -= sizes[index]
            original, option = kept[index]
            picks.append(original)
            n_bytes += option.n_bytes
            damage += option.damage
        return Allocation(tuple(reversed(picks)), n_bytes, damage)

    def bound(self, capacity_bytes: int) -> float:
        """A damage that no choice within a size can be under.

        Lagrange's: with a price on bytes, each thing chooses for itself.
        """
        low, high, bound = 0.0, 1.0, 0.0
        while self._priced(high)[1] > capacity_bytes and high < 1e300:
            high *= 4
        for _ in range(_BISECTIONS):
            price = (low + high) / 2
            damage, n_bytes = self._priced(price)
            bound = max(bound, damage + price * (n_bytes - capacity_bytes))
            low, high = (price, high) if n_bytes > capacity_bytes else (low, price)
        return bound

    def _priced(self, price: float) -> tuple[float, int]:
        """Damage and bytes where a byte costs ``price``."""
        picked = [
            min((option for _, option in kept), key=lambda o: o.damage + price * o.n_bytes)
            for kept in self._things
        ]
        return sum(o.damage for o in picked), sum(o.n_bytes for o in picked)


def _frontier(options: Sequence[Option]) -> list[tuple[int, Option]]:
    """Options that no other one beats in size and damage, by size, with their places."""
    kept: list[tuple[int, Option]] = []
    order = sorted(range(len(options)), key=lambda i: (options[i].n_bytes, options[i].damage))
    for index in order:
        if not kept or options[index].damage < kept[-1][1].damage:
            kept.append((index, options[index]))
    return kept
