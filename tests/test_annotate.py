"""What is drawn on a screenshot, and where."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops

from autoglm_gguf.actions import Action, Back, DoubleTap, LongPress, Swipe, Tap
from autoglm_gguf.annotate import annotate


def drawn_box(action: Action, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of what differs from a grey screen."""
    screen = Image.new("RGB", size, "grey")
    marked = annotate(screen, action)
    assert marked.size == size
    assert screen.getcolors() == [(size[0] * size[1], (128, 128, 128))]
    return ImageChops.difference(marked, screen).getbbox()


@pytest.mark.parametrize(
    "action",
    [Tap(element=(250, 500)), DoubleTap(element=(250, 500)), LongPress(element=(250, 500))],
)
def test_tap_is_drawn_around_its_point(action: Action) -> None:
    box = drawn_box(action, (400, 800))
    assert box is not None
    left, top, right, bottom = box
    assert (left + right) / 2 == pytest.approx(100, abs=2)
    assert (top + bottom) / 2 == pytest.approx(400, abs=2)
    assert 20 < right - left < 80


def test_swipe_reaches_from_start_to_end() -> None:
    box = drawn_box(Swipe(start=(500, 800), end=(500, 200)), (400, 800))
    assert box is not None
    assert box[1] == pytest.approx(160, abs=5)
    assert box[3] == pytest.approx(640, abs=20)


def test_action_without_a_point_leaves_the_screen_as_it_is() -> None:
    assert drawn_box(Back(), (40, 80)) is None


@pytest.mark.parametrize("point", [(0, 0), (999, 999)])
def test_corner_is_drawn_on_any_screen(point: tuple[int, int]) -> None:
    assert drawn_box(Tap(element=point), (3, 7)) is not None
