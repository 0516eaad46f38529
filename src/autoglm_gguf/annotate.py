"""A screenshot with what an action touches drawn on it.

Knows actions and Pillow; opens and writes no file.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from autoglm_gguf.actions import Action, DoubleTap, LongPress, Swipe

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

    Place = tuple[float, float]

_COLOUR, _EDGE = (230, 30, 60), (255, 255, 255)


def annotate(screenshot: Image, action: Action) -> Image:
    """Draw the tap or the swipe.

    A tap is a ring with a cross, a double tap two rings, a long press a filled ring, a swipe an
    arrow. Other actions touch nothing: the copy shows the screenshot alone.

    Args:
        screenshot: Of the size the action was chosen for, or any other: points are relative.
        action: Its points are 0..999.

    Returns:
        A new RGB image of the same size.
    """
    from PIL import ImageDraw as PILImageDraw

    image = screenshot.convert("RGB")
    if image is screenshot:
        image = screenshot.copy()
    draw = PILImageDraw.Draw(image)
    # The middle of the thousandth that the point names, so that 999 is not drawn outside.
    places = {
        name: ((x + 0.5) * image.width / 1000, (y + 0.5) * image.height / 1000)
        for name, (x, y) in action.points.items()
    }
    radius = max(4.0, min(image.size) / 30)
    if isinstance(action, Swipe):
        _arrow(draw, places["start"], places["end"], radius)
    else:
        for place in places.values():
            _tap(draw, place, radius, action)
    return image


def _tap(draw: ImageDraw, place: Place, radius: float, action: Action) -> None:
    _ring(draw, place, radius, filled=isinstance(action, LongPress))
    if isinstance(action, DoubleTap):
        _ring(draw, place, radius * 1.6)
    x, y = place
    half = radius / 2
    _line(draw, (x - half, y), (x + half, y), radius)
    _line(draw, (x, y - half), (x, y + half), radius)


def _ring(draw: ImageDraw, place: Place, radius: float, *, filled: bool = False) -> None:
    width = max(2, round(radius / 5))
    for extra, colour in ((width, _EDGE), (0, _COLOUR)):  # a light edge, seen on any ground
        reach = radius + extra
        box = (place[0] - reach, place[1] - reach, place[0] + reach, place[1] + reach)
        draw.ellipse(box, outline=colour, width=width + 2 * extra)
    if filled:
        draw.ellipse((*(c - radius for c in place), *(c + radius for c in place)), fill=_COLOUR)


def _arrow(draw: ImageDraw, start: Place, end: Place, radius: float) -> None:
    _ring(draw, start, radius / 2)
    _line(draw, start, end, radius)
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    for turn in (-2.6, 2.6):  # radians from the way it goes
        wing = (
            end[0] + 1.5 * radius * math.cos(angle + turn),
            end[1] + 1.5 * radius * math.sin(angle + turn),
        )
        _line(draw, wing, end, radius)


def _line(draw: ImageDraw, start: Place, end: Place, radius: float) -> None:
    width = max(2, round(radius / 5))
    draw.line((*start, *end), fill=_EDGE, width=2 * width)
    draw.line((*start, *end), fill=_COLOUR, width=width)
