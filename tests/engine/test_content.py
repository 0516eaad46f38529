"""`Content` and `EmbeddingCache`: what is held, and what of a prompt that already is."""

from __future__ import annotations

import numpy as np
import pytest

from autoglm_gguf.engine.base import ImageEmbedding
from autoglm_gguf.engine.content import Content, ImageCells, Piece, count_cells, lay_out
from autoglm_gguf.engine.images import EmbeddingCache

WIDE, TALL = ImageCells("wide", (5, 2)), ImageCells("tall", (2, 3))


def holding(*pieces: Piece) -> Content:
    content = Content()
    content.add(pieces)
    return content


def test_lay_out_places_an_image_in_columns_and_rows_at_one_position() -> None:
    tall = [(2 + 0, 2 + column, 2 + row, -1) for row in range(3) for column in range(2)]
    assert lay_out([7, 8, TALL, 9]).tolist() == [
        [0, 0, 0, 7],
        [1, 1, 1, 8],
        *map(list, tall),
        [5, 5, 5, 9],
    ]
    assert lay_out([]).shape == (0, 4)


def test_content_counts_a_cell_per_image_token_and_positions_by_the_longer_side() -> None:
    content = holding(7, WIDE, 8, TALL)
    assert (content.n_cells, content.position) == (1 + 10 + 1 + 6, 1 + 5 + 1 + 3)
    assert count_cells(content.pieces) == 18
    content.cut(2)
    assert (content.pieces, content.n_cells, content.position) == ((7, WIDE), 11, 6)
    content.cut(0)
    assert (len(content), content.n_cells, content.position) == (0, 0, 0)


@pytest.mark.parametrize(
    ("prompt", "n"),
    [
        ((), 0),
        ((9,), 0),
        ((7,), 1),
        ((7, WIDE, 8), 3),
        ((7, WIDE, 8, 9), 3),
        ((7, TALL, 8), 1),
        ((7, ImageCells("other", WIDE.grid), 8), 1),
        ((7, ImageCells("wide", (2, 5)), 8), 1),
        ((7, 8), 1),
    ],
)
def test_content_finds_the_longest_common_beginning(prompt: tuple[Piece, ...], n: int) -> None:
    assert holding(7, WIDE, 8).n_common(prompt) == n


def image(key: str, n_tokens: int) -> ImageEmbedding:
    return ImageEmbedding(np.zeros((n_tokens, 2), np.float32), (n_tokens, 1), key)


def test_embeddings_are_dropped_when_unused_longest_and_the_bound_is_kept() -> None:
    cache = EmbeddingCache(10)
    cache.keep(image("a", 4))
    cache.keep(image("b", 4))
    assert cache.find("a") is not None, "and so b is the one used longest ago"
    cache.make_room(3)
    assert (cache.find("b"), cache.n_tokens) == (None, 4)
    cache.keep(image("c", 6))
    assert (cache.n_tokens, cache.find("a") is not None) == (10, True)


def test_embedding_larger_than_the_bound_is_not_kept() -> None:
    cache = EmbeddingCache(10)
    cache.keep(image("a", 4))
    cache.keep(image("b", 11))
    assert (cache.find("b"), cache.n_tokens) == (None, 0)
