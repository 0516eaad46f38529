"""Screenshots of every kind to the tower's pixels, and what is no screenshot."""

from __future__ import annotations

import base64
import io
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoglm_gguf import ImageError
from autoglm_gguf.gguf.describe import VisionLimits
from autoglm_gguf.vision import (
    MAX_SOURCE_PIXELS,
    Pixels,
    encode_image_file,
    fit_size,
    open_image,
    read_pixels,
)

PHONE = VisionLimits(14, 2, 12_544, 5_000_000)
GLM = VisionLimits(14, 2, 12_544, 47_040_000)
SIZE = (112, 168)  # needs no resize: 4 x 6 image tokens


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header is sound and whose data is missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# --- sizes ---


@pytest.mark.parametrize(
    ("size", "limits", "fitted", "n_tokens"),
    [
        # Known from the published processor, with the phone model's limit and without it.
        ((1080, 2400), PHONE, (1036, 2352), 3108),
        ((1080, 2400), GLM, (1092, 2408), 3354),
        ((1216, 2688), GLM, (1204, 2688), 4128),
        ((720, 1600), PHONE, (728, 1596), 1482),
        ((540, 1200), PHONE, (532, 1204), 817),
        ((360, 800), PHONE, (364, 812), 377),
        ((2400, 1080), PHONE, (2352, 1036), 3108),
        ((336, 448), PHONE, (336, 448), 192),
        ((28, 28), PHONE, (84, 84), 9),
        ((1, 1), PHONE, (84, 84), 9),
        ((14, 2800), PHONE, (28, 5600), 200),
    ],
)
def test_fit_size_is_transformers_smart_resize(
    size: tuple[int, int], limits: VisionLimits, fitted: tuple[int, int], n_tokens: int
) -> None:
    assert fit_size(*size, limits) == fitted
    assert fitted[0] * fitted[1] // 784 == n_tokens


def test_fit_size_keeps_multiples_and_limits() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        width = rng.randint(28, 6000)
        height = rng.randint(max(28, width // 20), min(6000, width * 20))
        fitted = fit_size(width, height, PHONE)
        area = 2 * fitted[0] * fitted[1]
        assert fitted[0] % 28 == fitted[1] % 28 == 0
        assert 12_544 <= area <= 5_000_000, (width, height)


@pytest.mark.parametrize("most", [16, 256, 1024, 1620, 3108, 10**6])
def test_fit_size_keeps_within_max_image_tokens(most: int) -> None:
    width, height = fit_size(1080, 2400, PHONE, most)
    assert width * height // 784 <= min(most, 3188)
    if most == 10**6:
        assert (width, height) == (1036, 2352)


@pytest.mark.parametrize("size", [(10, 2010), (2010, 10), (1, 10_000)])
def test_fit_size_refuses_extreme_shapes(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="aspect ratio over 200"):
        fit_size(*size, PHONE)


# --- kinds of image ---


def test_pixels_are_the_images_own_when_the_size_fits() -> None:
    raw = np.random.default_rng(1).integers(0, 256, (168, 112, 3), np.uint8)
    pixels = read_pixels(Image.fromarray(raw), PHONE)
    assert pixels.array.tolist() == raw.tolist()
    assert (pixels.grid, pixels.n_tokens, pixels.source_size) == ((4, 6), 24, SIZE)


def test_pixels_are_stretched_and_not_padded() -> None:
    pixels = read_pixels(Image.new("RGB", (500, 777), (9, 8, 7)), PHONE)
    assert pixels.array.shape == (784, 504, 3)
    assert pixels.grid == (18, 28)
    assert (pixels.array == (9, 8, 7)).all()
    assert pixels.source_size == (500, 777)


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("RGB", (200, 100, 50), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (200, 100, 50)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_pixels_of_every_mode_are_rgb(mode: str, colour: object, rgb: tuple[int, int, int]) -> None:
    image = Image.new(mode, SIZE, colour)  # type: ignore[arg-type]
    if mode == "P":
        image.putpalette([200, 100, 50])
    assert (read_pixels(image, PHONE).array == rgb).all()


def test_transparent_palette_shows_white() -> None:
    image = Image.new("P", SIZE, 0)
    image.putpalette([200, 100, 50])
    data = encoded(image, transparency=0)
    assert (read_pixels(data, PHONE).array == 255).all()


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees to show"
    data = encoded(Image.new("RGB", SIZE), "JPEG", exif=exif)
    assert read_pixels(data, PHONE).source_size == SIZE


# --- sources ---


def test_sources_give_the_same_pixels(tmp_path: Path) -> None:
    image = Image.effect_noise(SIZE, 50)
    data = encoded(image)
    (tmp_path / "屏幕.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    read: list[Pixels] = [
        read_pixels(source, PHONE)
        for source in (image, data, tmp_path / "屏幕.png", str(tmp_path / "屏幕.png"), url)
    ]
    assert all((pixels.array == read[0].array).all() for pixels in read)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_open_image_reads_common_formats(form: str) -> None:
    assert open_image(encoded(Image.new("RGB", SIZE), form)).size == SIZE


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (b"", "not an image"),
        (b"no image at all", "not an image"),
        (encoded(Image.effect_noise(SIZE, 9))[:-500], "not an image"),
        (png_that_claims(20, 20), "not an image"),
        ("data:image/png;base64,@@@", "not base64"),
        ("data:image/png;base64,", "not an image"),
        ("data:image/png,plain", "not an image"),
        ("https://example.org/a.png", "not fetched"),
        ("nowhere.png", "nowhere.png: image cannot be read"),
        (".", "image cannot be read"),
        ("x\0y.png", "image cannot be read"),
        (Image.new("RGB", (0, 5)), "0x5 px"),
        (Image.open(io.BytesIO(encoded(Image.effect_noise(SIZE, 9))[:-500])), "not an image"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_an_image_error(source: object, named: str) -> None:
    with pytest.raises(ImageError) as caught:
        read_pixels(source, PHONE)  # type: ignore[arg-type]
    assert named in caught.value.message


def test_image_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ImageError, match=r"notes\.txt: not an image") as caught:
        read_pixels(tmp_path / "notes.txt", PHONE)
    assert caught.value.hint


def test_image_without_room_to_be_decoded_is_refused_by_its_header() -> None:
    data = png_that_claims(3000, 2000)
    with pytest.raises(ImageError, match=r"3000x2000 px.* room to decode 5\.9 million") as caught:
        read_pixels(data, PHONE, max_pixels=5_900_000)
    assert "raise the memory budget" in str(caught.value.hint)
    with pytest.raises(ImageError, match="not an image that can be read"):
        read_pixels(data, PHONE, max_pixels=6_000_000)  # as far as its data, which is missing


def test_pillow_image_needs_no_room_to_be_decoded() -> None:
    assert read_pixels(Image.new("RGB", SIZE), PHONE, max_pixels=1).source_size == SIZE


@pytest.mark.parametrize("size", [(10_001, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    began = time.perf_counter()
    with pytest.raises(ImageError, match="too large") as caught:
        read_pixels(png_that_claims(*size), PHONE)
    assert time.perf_counter() - began < 1
    assert caught.value.hint
    assert size[0] * size[1] > MAX_SOURCE_PIXELS


def test_file_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(2**30)  # of which nothing is on the disk
    with pytest.raises(ImageError, match=r"disk.img: not an image \(more than 256 MiB\)"):
        open_image(path)


def test_image_cut_or_damaged_anywhere_is_an_image_or_an_image_error() -> None:
    whole = encoded(Image.effect_noise((56, 56), 50))
    for seed in range(150):
        rng = random.Random(seed)
        damaged = bytearray(whole[: rng.randint(1, len(whole))])
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read_pixels(bytes(damaged), PHONE)
        except ImageError:
            pass


def test_fit_size_keeps_max_image_tokens_when_the_shape_is_extreme() -> None:
    width, height = fit_size(28, 5600, VisionLimits(14, 2, 12_544, 5_000_000), 16)
    assert (width, height) == (28, 16 * 28)


# --- back to files ---


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "F", "CMYK", "YCbCr"])
def test_encode_image_file_keeps_what_the_model_sees(mode: str) -> None:
    image = Image.linear_gradient("L").resize((56, 84))
    image = image.convert("RGBA").convert(mode) if mode != "I;16" else image.convert("I;16")
    if mode in ("RGBA", "LA"):
        image.putalpha(90)
    wanted = read_pixels(image, PHONE)
    assert read_pixels(encode_image_file(image), PHONE).key == wanted.key


def test_encode_image_file_leaves_files_as_they_are(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", SIZE, "red"), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    for source in (data, url, tmp_path / "a.jpg", str(tmp_path / "a.jpg")):
        assert encode_image_file(source) == data
