"""Screenshots to the exact pixels transformers would feed the vision tower.

RGB, stretched by Pillow's bicubic filter to multiples of 28 px. Normalisation is libmtmd's. Knows
nothing of models beyond their image limits. Source: transformers, ``Glm4vImageProcessor``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.errors import ImageError
from autoglm_gguf.gguf.describe import VisionLimits
from autoglm_gguf.messages import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

_FRAMES = 2  # transformers counts a still image as two frames
_MAX_ASPECT = 200
MAX_SOURCE_PIXELS = 100_000_000
"""Larger images are refused before they are decoded."""
MAX_FILE_BYTES = 256 * 2**20
"""Of a larger file no more is read, and it is refused."""


@dataclass(frozen=True)
class Pixels:
    """An image ready for the tower."""

    array: NDArray[np.uint8]
    """``(height, width, 3)``, RGB, both sides multiples of the limits' factor."""
    grid: tuple[int, int]
    """``(n_columns, n_rows)`` of image tokens."""
    source_size: tuple[int, int]
    """``(width, height)`` in pixels of the image that was given."""

    @property
    def n_tokens(self) -> int:
        """Image tokens."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def key(self) -> str:
        """Of the pixels and their shape: equal keys are equal images."""
        digest = hashlib.sha256(repr(self.array.shape).encode())
        digest.update(np.ascontiguousarray(self.array).data)
        return digest.hexdigest()


def read_pixels(
    source: ImageSource,
    limits: VisionLimits,
    *,
    max_image_tokens: int | None = None,
    max_pixels: int | None = None,
) -> Pixels:
    """Decode and resize an image.

    Args:
        source: A path, a ``data:`` URL, an encoded file's bytes, or a Pillow image.
        limits: The model's.
        max_image_tokens: A lower bound than the model's own.
        max_pixels: What the memory budget leaves room to decode; None: no bound. A Pillow image
            is decoded already.

    Raises:
        ImageError: No image, too many pixels, or an aspect ratio over 200.
    """
    image = open_image(source, max_pixels=max_pixels)
    width, height = fit_size(image.width, image.height, limits, max_image_tokens)
    from PIL import Image as PILImage

    size = image.size
    image = _to_rgb(image)  # of a screenshot, one copy at a time: each takes 10 MB
    if size != (width, height):
        image = image.resize((width, height), PILImage.Resampling.BICUBIC)
    grid = (width // limits.factor, height // limits.factor)
    return Pixels(np.asarray(image, np.uint8), grid, size)


def encode_png(source: ImageSource) -> bytes:
    """An image's pixels as an RGB PNG file, and nothing else of it: no name, place, time or camera.

    Raises:
        ImageError: See `open_image`.
    """
    from PIL import Image as PILImage

    image = _to_rgb(open_image(source))
    bare = PILImage.frombytes("RGB", image.size, image.tobytes())  # a copy would keep image.info
    file = io.BytesIO()
    bare.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _to_rgb(image: Image) -> Image:
    """RGB; whatever is transparent shows white, as transformers composites it."""
    from PIL import Image as PILImage

    is_opaque = image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255)
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent and not is_opaque:  # phones write opaque RGBA
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        image = PILImage.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def fit_size(
    width: int, height: int, limits: VisionLimits, max_image_tokens: int | None = None
) -> tuple[int, int]:
    """Pixels ``(width, height)`` at which an image is shown to the tower.

    Both are multiples of ``limits.factor``; the area stays within the limits as transformers'
    ``smart_resize`` keeps it, and within ``max_image_tokens``.

    Raises:
        ImageError: One side is more than 200 times the other.
    """
    factor, high, given = limits.factor, limits.max_pixels, (width, height)
    if max_image_tokens is not None:
        high = min(high, max_image_tokens * factor * factor * _FRAMES)
    if min(width, height) < factor:
        scale = max(factor / width, factor / height)
        width, height = int(width * scale), int(height * scale)
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise ImageError(f"image: aspect ratio over {_MAX_ASPECT} ({given[0]}x{given[1]} px)")
    fitted = (round(width / factor) * factor, round(height / factor) * factor)
    area = _FRAMES * width * height
    if _FRAMES * fitted[0] * fitted[1] > high:
        shrink = math.sqrt(area / high)
        fitted = (
            max(factor, math.floor(width / shrink / factor) * factor),
            max(factor, math.floor(height / shrink / factor) * factor),
        )
        if max_image_tokens is None:
            return fitted
        # A side that cannot shrink below one token leaves the other too long: ours is a bound.
        longest = max_image_tokens * factor
        return (min(fitted[0], longest), min(fitted[1], longest))
    if _FRAMES * fitted[0] * fitted[1] < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / area)
        return (
            math.ceil(width * grow / factor) * factor,
            math.ceil(height * grow / factor) * factor,
        )
    return fitted


def open_image(source: ImageSource, *, max_pixels: int | None = None) -> Image:
    """Open an image and decode it.

    Args:
        source: See `read_pixels`.
        max_pixels: See `read_pixels`.

    Raises:
        ImageError: See `read_pixels`.
    """
    from PIL import Image as PILImage
    from PIL import UnidentifiedImageError

    label, data = ("image", b"") if isinstance(source, PILImage.Image) else _read_source(source)
    try:
        image = source if isinstance(source, PILImage.Image) else PILImage.open(io.BytesIO(data))
        if not 0 < image.width * image.height <= MAX_SOURCE_PIXELS:
            raise _wrong_size(label, f"{image.width}x{image.height} px")
        if image is not source and max_pixels is not None:
            _check_room(label, image, max_pixels)
        image.load()
    except ImageError:
        raise
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise _wrong_size(label, "more than Pillow opens") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{label}: not an image", hint="give a PNG or JPEG file") from error
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files
        raise ImageError(
            f"{label}: not an image that can be read ({error})", hint="give a PNG or JPEG file"
        ) from error
    return image


def encode_image_file(source: ImageSource) -> bytes:
    """An image as the bytes of a file: those it has, or a PNG of a Pillow image's RGB.

    Raises:
        ImageError: It cannot be read.
    """
    from PIL import Image as PILImage

    if not isinstance(source, PILImage.Image):
        return _read_source(source)[1]
    out = io.BytesIO()
    _to_rgb(open_image(source)).save(out, "PNG")
    return out.getvalue()


def _check_room(label: str, image: Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{label}: {image.width}x{image.height} px, and the memory budget leaves room to "
            f"decode {max_pixels / 1e6:.1f} million",
            hint="give a smaller image, or raise the memory budget",
        )


def _wrong_size(label: str, found: str) -> ImageError:
    return ImageError(
        f"{label}: too large or empty ({found}, 1 to {MAX_SOURCE_PIXELS} pixels are taken)",
        hint="give a screenshot, not a poster",
    )


def _read_source(source: str | os.PathLike[str] | bytes) -> tuple[str, bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        return "image", bytes(source)
    if isinstance(source, str) and source.startswith("data:"):
        head, _, body = source.partition(",")
        try:
            return "image", base64.b64decode(body, validate=True) if ";base64" in head else b""
        except binascii.Error as error:
            raise ImageError(f"image: its data URL is not base64 ({error})") from error
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError("image: web addresses are not fetched", hint="download the image first")
    path = Path(source)
    try:
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size or MAX_FILE_BYTES  # 0: a pipe, or /dev/zero
            data = file.read(min(n_bytes, MAX_FILE_BYTES) + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"{path}: image cannot be read ({reason})", hint="check the path"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(
            f"{path}: not an image (more than {MAX_FILE_BYTES >> 20} MiB)",
            hint="give a PNG or JPEG file",
        )
    return path.name, data
