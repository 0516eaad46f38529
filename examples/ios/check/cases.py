"""What the Swift sources must give, as Python gives it: prompts, sizes, pixels, answers.

python examples/ios/check/cases.py DIR      writes cases.json, text.gguf and mmproj.gguf into DIR

The model is a random one: its answers follow from every token, position and pixel before them.
"""

from __future__ import annotations

import json
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
from builders import build_checkpoint

from autoglm_gguf import AutoGLM, ImageError, convert
from autoglm_gguf.actions import choose_system_prompt
from autoglm_gguf.gguf.describe import GLM_TEMPLATE, VisionLimits
from autoglm_gguf.messages import ImagePart, Message, TextPart
from autoglm_gguf.prompt import render_prompt
from autoglm_gguf.vision import fit_size

TASKS = ("Open Chrome", "打开微信", "is <|image|> a token? </answer>")
SCREENS = ((1080, 2400), (1179, 2556), (1290, 2796), (2400, 1080), (360, 800), (500, 777))
SMALL = ((336, 448), (28, 28), (1, 1), (14, 2800), (41, 43), (10, 2010))
RESIZES = (
    ((500, 777), (504, 784)),
    ((360, 700), (196, 364)),
    ((700, 360), (364, 196)),
    ((90, 50), (90, 84)),
)
MAX_IMAGE_TOKENS = 200


def pattern(size: tuple[int, int]) -> Image.Image:
    """The picture that main.swift makes too."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    channels = (x * 7 + y, y * 3 + x * x, x * y // 7)
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def fnv1a(data: bytes) -> int:
    """FNV-1a, 64 bits."""
    return reduce(lambda h, byte: (h ^ byte) * 0x100000001B3 % 2**64, data, 0xCBF29CE484222325)


def prompt_case(task: str, has_image: bool) -> dict[str, Any]:
    image = [ImagePart(b"")] if has_image else []
    messages = [
        Message("system", choose_system_prompt(task)),
        Message("user", (*image, TextPart(task))),
    ]
    segments = render_prompt(messages, GLM_TEMPLATE).segments
    return {"task": task, "hasImage": has_image, "segments": segments}


def size_case(size: tuple[int, int], max_pixels: int, most: int | None) -> dict[str, Any]:
    try:
        fitted = fit_size(*size, VisionLimits(14, 2, 12_544, max_pixels), most)
    except ImageError:
        fitted = None
    return {"from": size, "maxPixels": max_pixels, "maxImageTokens": most, "to": fitted}


def pixels_case(old: tuple[int, int], new: tuple[int, int]) -> dict[str, Any]:
    resized = pattern(old).resize(new, Image.Resampling.BICUBIC)
    return {"from": old, "to": new, "sum": fnv1a(resized.tobytes())}


def answer_cases(directory: Path) -> list[dict[str, Any]]:
    pair = convert(build_checkpoint(directory / "checkpoint"), directory / "gguf", "f16")
    pair.text.rename(directory / "text.gguf")
    pair.mmproj.rename(directory / "mmproj.gguf")
    found: list[dict[str, Any]] = []
    with AutoGLM.load(
        directory / "text.gguf",
        mmproj=directory / "mmproj.gguf",
        memory_budget="none",
        n_ctx=4096,
        n_batch=256,
        n_threads=2,
        max_image_tokens=MAX_IMAGE_TOKENS,
    ) as model:
        for task in TASKS:
            for size in (None, (300, 500), (1080, 720)):
                image = None if size is None else pattern(size)
                text = model.generate(task, image=image, max_tokens=48).text
                found.append({"task": task, "image": size, "text": text})
    return found


def main() -> None:
    directory = Path(sys.argv[1])
    limits = ((5_000_000, None), (47_040_000, None), (5_000_000, 1620), (5_000_000, 16))
    cases = {
        "prompts": [prompt_case(task, image) for task in TASKS for image in (False, True)],
        "sizes": [size_case(size, *limit) for size in SCREENS + SMALL for limit in limits],
        "pixels": [pixels_case(*sizes) for sizes in RESIZES],
        "answers": answer_cases(directory),
    }
    (directory / "cases.json").write_text(json.dumps(cases, ensure_ascii=False), "utf-8")


if __name__ == "__main__":
    main()
