"""What a KV cache holds, piece by piece, and how much of a prompt that already is.

A token takes a cell and a position; an image takes a cell per image token, but advances the
position only by its longer side (M-RoPE). Knows no engine and no pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ImageCells:
    """An image among the tokens."""

    key: str
    """Of its pixels: equal keys are equal images."""
    grid: tuple[int, int]
    """``(n_columns, n_rows)`` of image tokens."""

    @property
    def n_cells(self) -> int:
        """KV cells: one per image token."""
        return self.grid[0] * self.grid[1]

    @property
    def n_positions(self) -> int:
        """How far it moves what follows."""
        return max(self.grid)


Piece: TypeAlias = int | ImageCells
"""A token id, or an image."""


def count_cells(pieces: Iterable[Piece]) -> int:
    """KV cells of some pieces."""
    return sum(1 if isinstance(piece, int) else piece.n_cells for piece in pieces)


def lay_out(pieces: Iterable[Piece]) -> NDArray[np.int32]:
    """Where M-RoPE puts some pieces, from the first position on.

    Returns:
        ``(n_cells, 4)``: position, column, row and token id (-1 in an image) of each KV cell.
    """
    rows: list[NDArray[np.int32]] = [np.empty((0, 4), np.int32)]
    position = 0
    for piece in pieces:
        if isinstance(piece, int):
            rows.append(np.array([[position, position, position, piece]], np.int32))
            position += 1
            continue
        cells = np.full((piece.n_cells, 4), position, np.int32)
        number = np.arange(piece.n_cells, dtype=np.int32)
        cells[:, 1] += number % piece.grid[0]
        cells[:, 2] += number // piece.grid[0]
        cells[:, 3] = -1
        rows.append(cells)
        position += piece.n_positions
    return np.concatenate(rows)


class Content:
    """The pieces that were evaluated, in order.

    Every change is one step that an interrupt cannot split: what is listed here was evaluated.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Piece, int, int]] = []  # and cells, and the next position, after it

    def __len__(self) -> int:
        return len(self._held)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All of them."""
        return tuple(piece for piece, _, _ in self._held)

    @property
    def n_cells(self) -> int:
        """KV cells in use."""
        return self._held[-1][1] if self._held else 0

    @property
    def position(self) -> int:
        """Position of the next piece."""
        return self._held[-1][2] if self._held else 0

    def add(self, pieces: Sequence[Piece]) -> None:
        """Note what was evaluated."""
        n_cells, position = self.n_cells, self.position
        added: list[tuple[Piece, int, int]] = []
        for piece in pieces:
            n_cells += 1 if isinstance(piece, int) else piece.n_cells
            position += 1 if isinstance(piece, int) else piece.n_positions
            added.append((piece, n_cells, position))
        self._held += added

    def cut(self, n: int) -> None:
        """Forget all but the first ``n`` pieces."""
        del self._held[n:]

    def n_common(self, prompt: Sequence[Piece]) -> int:
        """How many pieces a prompt begins with that are held already."""
        pairs = zip(self._held, prompt, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0][0] == pair[1], pairs))
