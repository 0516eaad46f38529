"""Encoded images, kept for the requests that come with the same screenshot again.

Knows nothing of pixels: whoever asks names an image by its key.
"""

from __future__ import annotations

from autoglm_gguf.engine.base import ImageEmbedding


class EmbeddingCache:
    """The images used last, within a bound.

    Args:
        max_tokens: Image tokens of all that is kept; 0 keeps nothing. The memory plan counts the
            bytes of as many.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._kept: dict[str, ImageEmbedding] = {}

    @property
    def n_tokens(self) -> int:
        """Image tokens of all that is kept now."""
        return sum(image.n_tokens for image in self._kept.values())

    def find(self, key: str) -> ImageEmbedding | None:
        """An image that was kept; it counts as used."""
        image = self._kept.pop(key, None)
        if image is not None:
            self._kept[key] = image
        return image

    def make_room(self, n_tokens: int) -> None:
        """Drop the images used longest ago until one of ``n_tokens`` may come.

        Before it is encoded, not after: what is kept counts while the vision tower works.
        """
        while self._kept and self.n_tokens + n_tokens > self._max_tokens:
            del self._kept[next(iter(self._kept))]

    def keep(self, image: ImageEmbedding) -> None:
        """Keep an image; one that is larger than the bound is not."""
        self.make_room(image.n_tokens)
        if image.n_tokens <= self._max_tokens:
            self._kept[image.key] = image

    def clear(self) -> None:
        """Drop all."""
        self._kept.clear()
