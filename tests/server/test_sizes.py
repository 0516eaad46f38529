"""n_ctx and image tokens for the phone agent, under budgets from none to too little."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import describe_sizes

from autoglm_gguf import ContextParams, DoesNotFitError, MemoryPlan
from autoglm_gguf.memory.plan import plan_pair
from autoglm_gguf.server.sizes import choose_sizes, find_sizes

MB = 10**6
GB = 10**9
# AutoGLM-Phone-9B in q4_0: 40 layers of 115 MB, a tower of 900 MB.
NINE_B = {"layer_bytes": (115 * MB,) * 40, "tower_bytes": 900 * MB}
IMAGES = 30_000  # GLM-4.1V's own limit, tokens


def plan(budget: int | None, **given: Any) -> MemoryPlan:
    described = describe_sizes(**NINE_B)  # type: ignore[arg-type]
    return plan_pair(described, ContextParams(**given), budget, fixed=frozenset(given))


def test_agents_first_request_and_its_answer_fit_where_memory_does() -> None:
    sizes = find_sizes(partial(plan, None), IMAGES, 65_536, {})
    assert sizes.context == {"n_ctx": 8448, "max_image_tokens": 3188}
    assert sizes.context["n_ctx"] >= 5127 + 3000, "issue 210's prompt, the client's max_tokens"
    assert "first request and its 3000 tokens of answer fit" in sizes.reason


@pytest.mark.parametrize("budget_mb", range(2000, 14_000, 500))
def test_whatever_is_chosen_fits_and_is_explained(budget_mb: int) -> None:
    budget = budget_mb * MB
    try:
        sizes = find_sizes(partial(plan, budget), IMAGES, 65_536, {})
    except DoesNotFitError:
        assert budget_mb <= 2500
        return
    found = plan(budget, **sizes.context)
    assert found.peak_bytes <= budget
    assert str(sizes.context["n_ctx"]) in sizes.reason
    assert str(sizes.context["max_image_tokens"]) in sizes.reason


def scripted(held: int, streamed: int) -> Any:
    """A planner that holds images of ``held`` tokens, streams for larger ones, refuses others."""

    def plan(**given: int) -> Any:
        n_image = given["max_image_tokens"]
        if n_image > streamed:
            raise DoesNotFitError("too large", budget_bytes=1, required_bytes=2)
        return SimpleNamespace(weights="mapped" if n_image <= held else "streamed")

    return plan


@pytest.mark.parametrize(
    ("held", "streamed", "chosen"),
    [
        (9999, 9999, (8448, 3188)),
        (1700, 9999, (6656, 1620)),
        (1024, 9999, (6144, 1024)),
        (800, 9999, (8448, 3188)),  # smaller ones would not help: large and streamed
        (0, 2500, (7168, 2048)),
        (0, 1100, (6144, 1024)),
        (600, 600, (3072, 512)),
    ],
)
def test_images_get_smaller_where_that_keeps_weights_from_being_streamed(
    held: int, streamed: int, chosen: tuple[int, int]
) -> None:
    sizes = find_sizes(scripted(held, streamed), IMAGES, 65_536, {})
    assert (sizes.context["n_ctx"], sizes.context["max_image_tokens"]) == chosen
    assert ("official server takes" in sizes.reason) is (chosen[1] < 3188)


def test_given_sizes_are_kept() -> None:
    unbounded = partial(plan, None)
    given = {"n_ctx": 4096, "max_image_tokens": 512}
    assert find_sizes(unbounded, IMAGES, None, given).context == {}
    assert find_sizes(unbounded, IMAGES, None, {"n_ctx": 4096}).context == {
        "max_image_tokens": 1024
    }
    assert find_sizes(unbounded, IMAGES, None, {"n_ctx": 512}).context == {"max_image_tokens": 128}
    assert find_sizes(unbounded, IMAGES, None, {"max_image_tokens": 1000}).context == {
        "n_ctx": 6144
    }


def test_small_images_of_a_model_leave_n_ctx_smaller() -> None:
    sizes = find_sizes(partial(plan, None), 768, 65_536, {})
    assert sizes.context == {"n_ctx": 5888, "max_image_tokens": 768}


def test_model_without_images_needs_no_image_size() -> None:
    sizes = find_sizes(partial(plan, None), 0, 65_536, {})
    assert sizes.context == {"n_ctx": 5120}
    assert "image" not in sizes.reason


def test_context_is_not_larger_than_the_model_was_trained_for() -> None:
    sizes = find_sizes(partial(plan, None), IMAGES, 2048, {})
    assert sizes.context == {"n_ctx": 2048, "max_image_tokens": 1024}
    assert "does not fit" in sizes.reason


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(DoesNotFitError):
        find_sizes(partial(plan, 300 * MB), IMAGES, 65_536, {})


@pytest.mark.native
def test_sizes_of_a_pair_come_from_its_files(
    tiny_pair: Callable[[str], tuple[Path, Path]],
) -> None:
    text, mmproj = tiny_pair("q8_0")
    sizes = choose_sizes(text, mmproj, "4GB", {})
    assert sizes.context == {"n_ctx": 5120, "max_image_tokens": 72}
    assert choose_sizes(text, None, "4GB", {}).context == {"n_ctx": 5120}
