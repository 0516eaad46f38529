"""How large a context and images the server takes: so that the phone agent's requests fit.

The agent's first request has 2,019 tokens of words (the Chinese system prompt, the task, the app),
a screenshot of 3,108 at 1080 x 2400, and asks for up to 3,000 more. Source: Open-AutoGLM's issue
210 (5,127 prompt tokens), its client (max_tokens) and its server's command line (max_pixels).
Chooses by planning; loads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from autoglm_gguf.errors import DoesNotFitError
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.describe import describe_pair
from autoglm_gguf.hub import resolve_pair
from autoglm_gguf.memory.budget import Budget
from autoglm_gguf.memory.estimate import round_n_ctx
from autoglm_gguf.memory.plan import MemoryPlan, plan_memory

AGENT_WORDS, AGENT_ANSWER = 2019, 3000
"""Tokens, as above."""
OFFICIAL_IMAGE_TOKENS = 3188
"""The largest image of the official server: 5,000,000 pixels, of two frames."""
REQUEST_BYTES = 6 * (1080 * 2400 * 3 * 4 // 3)
"""Of the budget, for a request on its way: a screenshot that does not compress, in base64, and its
copies: what arrived, the JSON's text, the file. Measured: 57 MB. Larger bodies come on top."""
_LEAST_ANSWER = 512  # tokens
_SMALLER_IMAGES = (2048, 1620, 1024)  # tokens; below 1024, taps land beside small targets
_SMALLER = (
    (4096, 1024),
    (3072, 512),
    (2048, 256),
)  # n_ctx and image tokens, where nothing else fits


@dataclass(frozen=True, slots=True)
class Sizes:
    """What was chosen."""

    context: dict[str, int]
    """Fields of `ContextParams` that nobody gave: n_ctx, max_image_tokens."""
    reason: str
    """For a person; empty where nothing was chosen."""


def choose_sizes(
    model: str | os.PathLike[str],
    mmproj: str | os.PathLike[str] | None,
    memory_budget: Budget,
    given: dict[str, Any],
) -> Sizes:
    """Choose n_ctx and max_image_tokens for serving a GGUF pair.

    Args:
        model: See `plan_memory`.
        mmproj: See `plan_memory`.
        memory_budget: See `plan_memory`.
        given: Fields of `ContextParams` that the user gave, which are kept.

    Raises:
        ValueError, TypeError, GGUFError, DoesNotFitError: See `plan_memory`.
    """
    text, tower = resolve_pair(model, mmproj)
    described = describe_pair(text, tower)
    limit = 0 if described.vision is None else described.vision.max_tokens
    n_ctx_train = described.text.get_int(names.CONTEXT_LENGTH)
    plan = partial(
        plan_memory,
        Path(text),
        mmproj=tower,
        memory_budget=memory_budget,
        reserved_bytes=REQUEST_BYTES,
    )
    return find_sizes(plan, limit, n_ctx_train, given)


def find_sizes(
    plan: Callable[..., MemoryPlan],
    image_limit: int,
    n_ctx_train: int | None,
    given: dict[str, Any],
) -> Sizes:
    """The first candidate that fits without streaming weights, else the first that fits.

    Args:
        plan: Plans with fields of `ContextParams`, or raises DoesNotFitError.
        image_limit: The model's own largest image, in tokens; 0: it takes none.
        n_ctx_train: The context that the model was trained for, None if unknown.
        given: See `choose_sizes`.

    Raises:
        DoesNotFitError: Nothing fits.
    """
    if "n_ctx" in given and ("max_image_tokens" in given or not image_limit):
        return Sizes({}, "")
    first_that_fits: dict[str, int] | None = None
    refusal: DoesNotFitError | None = None
    for candidate, is_small in _candidates(image_limit, n_ctx_train or 2**20, given):
        if is_small and first_that_fits is not None:
            break
        try:
            weights = plan(**{**given, **candidate}).weights
        except DoesNotFitError as error:
            refusal = refusal or error
            continue
        first_that_fits = first_that_fits or candidate
        if weights != "streamed":
            first_that_fits = candidate
            break
    if first_that_fits is None:
        assert refusal is not None  # there is always a candidate
        raise refusal
    return Sizes(first_that_fits, _tell({**given, **first_that_fits}, image_limit))


def _candidates(
    image_limit: int, n_ctx_train: int, given: dict[str, Any]
) -> Iterator[tuple[dict[str, int], bool]]:
    """Sizes, the best first, and whether the agent's first request is cut short by them."""
    largest = min(image_limit, OFFICIAL_IMAGE_TOKENS)
    images = [largest, *(n for n in _SMALLER_IMAGES if n < largest)]
    if "max_image_tokens" in given:
        images = [min(given["max_image_tokens"], image_limit)]
    if "n_ctx" in given:
        room = given["n_ctx"] - AGENT_WORDS - _LEAST_ANSWER
        fitting = [n for n in images if n <= room] or [max(16, min(largest, given["n_ctx"] // 4))]
        yield from (({"max_image_tokens": n}, False) for n in fitting)
        return
    for n_image in images:
        n_ctx = round_n_ctx(AGENT_WORDS + n_image + AGENT_ANSWER)
        if n_ctx <= n_ctx_train:
            yield _sizes(n_ctx, n_image, given), False
    for n_ctx, n_image in _SMALLER:
        yield _sizes(min(n_ctx, n_ctx_train), min(n_image, largest), given), True


def _sizes(n_ctx: int, n_image: int, given: dict[str, Any]) -> dict[str, int]:
    if not n_image or "max_image_tokens" in given:
        return {"n_ctx": n_ctx}
    return {"n_ctx": n_ctx, "max_image_tokens": n_image}


def _tell(sizes: dict[str, Any], image_limit: int) -> str:
    n_ctx, n_image = sizes["n_ctx"], min(sizes.get("max_image_tokens", 0), image_limit)
    left = n_ctx - AGENT_WORDS - n_image
    parts = [f"n_ctx {n_ctx}"]
    if n_image:
        parts.append(f"images of at most {n_image} tokens")
    needs = "the phone agent's first request"
    if left >= AGENT_ANSWER:
        why = f"{needs} and its {AGENT_ANSWER} tokens of answer fit"
    elif left >= _LEAST_ANSWER:
        why = f"{needs} fits, and an answer of {left} tokens in place of {AGENT_ANSWER}"
    else:
        why = f"{needs} does not fit: it needs {AGENT_WORDS} tokens for words alone"
    largest = min(image_limit, OFFICIAL_IMAGE_TOKENS)
    if 0 < n_image < largest:
        why += f"; the official server takes images of {largest}"
    return f"{', '.join(parts)}: {why}"
