"""Synthetic phone screens with known targets: app grids, lists, buttons and dialogs.

Deterministic: the same seed gives the same screens with the same Pillow. A screen has 4 x 8 slots
and at most one thing in each; a thing is known by its colours and its shape, since no font with
Chinese can be presumed: Chinese stands in the task alone. Knows nothing of models.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from autoglm_gguf.actions import Action, Tap

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Language = Literal["zh", "en"]
Layout = Literal["apps", "list", "buttons", "dialog"]
Box = tuple[float, float, float, float]
Slot = tuple[int, int]
Colour = tuple[int, int, int]

COLUMNS, ROWS = 4, 8
SLOT = 180
"""Side of a slot, px: 28 px, one image token, where a screen is shown at 32 tokens."""
SIZE = (COLUMNS * SLOT, ROWS * SLOT)
LAYOUTS: tuple[Layout, ...] = ("apps", "list", "buttons", "dialog")
LANGUAGES: tuple[Language, ...] = ("zh", "en")
HELD_OUT_SEED = 20261123
_HELD_OUT_SHARE = 8  # one (thing, slot) pair in eight is never trained on


@dataclass(frozen=True, slots=True)
class Thing:
    """Something that can be tapped."""

    key: str
    zh: str
    en: str
    """The words that tell it from every other thing; ``zh`` likewise."""

    def word(self, language: Language) -> str:
        """What it is called."""
        return self.zh if language == "zh" else self.en


APPS = (
    Thing("wechat", "微信", "WeChat"),
    Thing("settings", "设置", "Settings"),
    Thing("camera", "相机", "Camera"),
    Thing("calendar", "日历", "Calendar"),
    Thing("calculator", "计算器", "Calculator"),
    Thing("photos", "相册", "Photos"),
    Thing("chrome", "浏览器", "Chrome"),
    Thing("contacts", "联系人", "Contacts"),
    Thing("weather", "天气", "weather"),
    Thing("video", "视频", "video"),
)
BUTTONS = (
    Thing("red", "红色", "red"),
    Thing("blue", "蓝色", "blue"),
    Thing("black", "黑色", "black"),
    Thing("white", "白色", "white"),
)
CHOICES = (Thing("confirm", "确认", "confirm"), Thing("cancel", "取消", "cancel"))
THINGS = (*APPS, *BUTTONS, *CHOICES)
_BUTTON_COLOURS: dict[str, Colour] = {
    "red": (226, 48, 46),
    "blue": (38, 96, 235),
    "black": (16, 16, 18),
    "white": (252, 252, 252),
}
# Sentences: {name} is a thing's name; the last of each tuple are held out of training.
_SENTENCES: dict[Language, tuple[str, ...]] = {
    "zh": ("点击{name}", "点一下{name}", "轻触{name}", "请点击{name}", "点击屏幕上的{name}"),
    "en": ("tap {name}", "tap on {name}", "click {name}", "press {name}", "touch {name}"),
}
_HELD_OUT_SENTENCES: dict[Language, tuple[str, ...]] = {
    "zh": ("点按{name}", "帮我点击{name}"),
    "en": ("please tap {name}", "click on {name}"),
}
_LIST_SENTENCES: dict[Language, str] = {
    "zh": "打开设置里的{name}",
    "en": "open {name} in the settings",
}
_NAMES: dict[str, dict[Language, tuple[str, ...]]] = {
    "app": {
        "zh": ("{word}", "{word}图标", "{word}的图标"),
        "en": ("{word}", "the {word} icon"),
    },
    "button": {"zh": ("{word}按钮", "{word}的按钮"), "en": ("the {word} button",)},
}


@dataclass(frozen=True, slots=True)
class Item:
    """A thing on a screen."""

    thing: Thing
    slot: Slot
    """``(column, row)``, of what is distinct about it: a list row's icon, a button's middle."""
    box: Box
    """What answers to a tap: left, top, right, bottom, px."""
    size: float
    """Side of the icon or height of the button, as a share of a slot."""


@dataclass(frozen=True, slots=True)
class Screen:
    """What is drawn."""

    layout: Layout
    is_dark: bool
    ground: Colour
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction for a screen."""

    screen: Screen
    target: Item
    language: Language
    text: str
    word_end: int
    """Where in ``text`` the target's word ends: with it the task is known."""

    @property
    def point(self) -> tuple[int, int]:
        """The middle of the target's slot, in 0..999 of the screen; inside the target's box."""
        column, row = self.target.slot
        return ((2 * column + 1) * 500 // COLUMNS, (2 * row + 1) * 500 // ROWS)

    @property
    def action(self) -> Action:
        """The action that is exactly right."""
        return Tap(element=self.point)


def held_out_tasks(n: int, *, seed: int = HELD_OUT_SEED) -> list[Task]:
    """Tasks that autoglm-tiny is never trained on, the same ones for the same seed.

    The thing is never trained on in this slot, and half of the sentences are never trained on.
    Layouts and languages take turns.

    Args:
        n: How many.
        seed: Decides all of them; a longer list begins with the shorter one.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n {n}: at least one screen is needed")
    rng = random.Random(seed)
    tasks: list[Task] = []
    while len(tasks) < n:
        turn = len(tasks)
        screen = make_screen(rng, LAYOUTS[turn % len(LAYOUTS)])
        targets = [item for item in screen.items if is_held_out(item)]
        if targets:
            language = LANGUAGES[turn // len(LAYOUTS) % 2]
            tasks.append(make_task(rng, screen, rng.choice(targets), language, held_out=True))
    return tasks


def training_tasks(seed: int, *, max_items: int = 6) -> Iterator[Task]:
    """Tasks for training, without end; nothing that `held_out_tasks` may ask is asked.

    Args:
        seed: Decides all of them.
        max_items: Things on a screen, at most.
    """
    rng = random.Random(seed)
    while True:
        screen = make_screen(rng, rng.choice(LAYOUTS), max_items=max_items)
        targets = [item for item in screen.items if not is_held_out(item)]
        if targets:
            yield make_task(rng, screen, rng.choice(targets), rng.choice(LANGUAGES))


def is_held_out(item: Item) -> bool:
    """Whether this thing in this slot is kept from training, decided by a checksum."""
    text = f"{item.thing.key} {item.slot[0]} {item.slot[1]}"
    return zlib.crc32(text.encode()) % _HELD_OUT_SHARE == 0


def make_task(
    rng: random.Random, screen: Screen, target: Item, language: Language, *, held_out: bool = False
) -> Task:
    """Word an instruction for one item; ``held_out`` lets it use sentences kept from training."""
    sentences = _SENTENCES[language]
    if held_out and rng.random() < 0.5:
        sentences = _HELD_OUT_SENTENCES[language]
    elif screen.layout == "list":
        sentences = (*sentences, _LIST_SENTENCES[language])
    word = target.thing.word(language)
    kind = "app" if target.thing in APPS else "button"
    name = rng.choice(_NAMES[kind][language]).format(word=word)
    text = rng.choice(sentences).format(name=name)
    if language == "en" and rng.random() < 0.8:
        text = text[0].upper() + text[1:]
    return Task(screen, target, language, text, text.rindex(word) + len(word))


def make_screen(rng: random.Random, layout: Layout, *, max_items: int = 6) -> Screen:
    """Lay out a screen of ``max_items`` things at most, no thing twice."""
    is_dark = rng.random() < 0.5
    low, high = (24, 56) if is_dark else (200, 244)
    level = rng.randint(low, high)
    ground = (_near(rng, level), _near(rng, level), _near(rng, level))
    if layout == "apps":
        items = _lay_apps(rng, max_items)
    elif layout == "list":
        items = _lay_list(rng, max_items)
    elif layout == "buttons":
        items = _lay_buttons(rng, max_items)
    else:
        items = _lay_dialog(rng, max_items)
    return Screen(layout, is_dark, ground, tuple(items))


def _near(rng: random.Random, level: int) -> int:
    return max(0, min(255, level + rng.randint(-10, 10)))


def _middle(slot: Slot) -> tuple[float, float]:
    return (slot[0] + 0.5) * SLOT, (slot[1] + 0.5) * SLOT


def _around(slot: Slot, width: float, height: float) -> Box:
    """A box in the middle of a slot, sides as shares of the slot's."""
    x, y = _middle(slot)
    dx, dy = width * SLOT / 2, height * SLOT / 2
    return (x - dx, y - dy, x + dx, y + dy)


def _lay_apps(rng: random.Random, max_items: int) -> list[Item]:
    n = rng.randint(min(2, max_items), min(6, max_items))
    slots = rng.sample([(c, r) for c in range(COLUMNS) for r in range(ROWS)], n)
    size = rng.choice((0.7, 0.8, 0.9))
    things = rng.sample(APPS, n)
    return [
        Item(thing, slot, _around(slot, size, size), size)
        for thing, slot in zip(things, slots, strict=True)
    ]


def _lay_list(rng: random.Random, max_items: int) -> list[Item]:
    n = rng.randint(min(2, max_items), min(5, max_items))
    rows = rng.sample(range(1, ROWS), n)
    size = rng.choice((0.65, 0.75, 0.85))
    return [
        Item(thing, (0, row), (0, row * SLOT, COLUMNS * SLOT, (row + 1) * SLOT), size)
        for thing, row in zip(rng.sample(APPS, n), rows, strict=True)
    ]


def _lay_buttons(rng: random.Random, max_items: int) -> list[Item]:
    n = rng.randint(min(2, max_items), min(len(BUTTONS), max_items))
    height = rng.choice((0.55, 0.7))
    if rng.random() < 0.5:  # wide ones: one a row, in an inner column, over half of each neighbour
        rows = rng.sample(range(ROWS), n)
        slots = [(rng.randint(1, COLUMNS - 2), row) for row in rows]
        width = 1.8
    else:
        slots = rng.sample([(c, r) for c in range(COLUMNS) for r in range(ROWS)], n)
        width = 0.9
    things = rng.sample(BUTTONS, n)
    return [
        Item(thing, slot, _around(slot, width, height), height)
        for thing, slot in zip(things, slots, strict=True)
    ]


def _lay_dialog(rng: random.Random, max_items: int) -> list[Item]:
    row = rng.randint(2, ROWS - 2)
    columns = [rng.choice((0, 1)), rng.choice((2, 3))]
    rng.shuffle(columns)
    size = rng.choice((0.7, 0.8))
    items = [
        Item(thing, (column, row), _around((column, row), 0.95, size), size)
        for thing, column in zip(CHOICES, columns, strict=True)
    ]
    if max_items == 1:
        return [rng.choice(items)]
    if max_items > 2 and rng.random() < 0.5:  # the app that asks
        slot = (rng.randint(1, COLUMNS - 2), row - 1)
        items.append(Item(rng.choice(APPS), slot, _around(slot, 0.8, 0.8), 0.8))
    return items


# --- drawing ---


def draw_screen(screen: Screen) -> Image:
    """Draw a screen, RGB, `SIZE` px."""
    from PIL import Image as PILImage
    from PIL import ImageDraw as PILImageDraw

    image = PILImage.new("RGB", SIZE, screen.ground)
    draw = PILImageDraw.Draw(image)
    soft = _blend(screen.ground, (255, 255, 255) if screen.is_dark else (0, 0, 0), 0.18)
    if screen.layout == "dialog":
        row = screen.items[0].slot[1]
        panel = (0.04 * SLOT, (row - 1.9) * SLOT, (COLUMNS - 0.04) * SLOT, (row + 0.6) * SLOT)
        draw.rounded_rectangle(panel, 36, _blend(screen.ground, soft, 0.5))
        for line in range(2):
            top = (row - 1.7 + 0.25 * line) * SLOT
            draw.rounded_rectangle((SLOT * 0.4, top, SLOT * (2.6 - line), top + 20), 10, soft)
    for item in screen.items:
        if screen.layout == "list":
            _draw_row(draw, item, soft)
        elif item.thing in APPS:
            x, y = _middle(item.slot)
            below = y + item.size * SLOT / 2 + 6
            draw.rounded_rectangle((x - 40, below, x + 40, below + 8), 4, soft)
        if item.thing in BUTTONS:
            _draw_button(draw, item)
        elif item.thing in CHOICES:
            _draw_choice(draw, item)
        else:
            draw_icon(draw, item.thing.key, _around(item.slot, item.size, item.size))
    return image


def _blend(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return (red, green, blue)


def _draw_row(draw: ImageDraw, item: Item, soft: Colour) -> None:
    _, top, right, bottom = item.box
    draw.line((0, bottom, right, bottom), soft, 4)
    middle = (top + bottom) / 2
    length = 200 + 40 * (len(item.thing.en) % 5)
    draw.rounded_rectangle((SLOT * 1.2, middle - 30, SLOT * 1.2 + length, middle - 8), 11, soft)
    draw.rounded_rectangle((SLOT * 1.2, middle + 12, SLOT * 1.2 + 140, middle + 28), 8, soft)


def _draw_button(draw: ImageDraw, item: Item) -> None:
    left, top, right, bottom = item.box
    colour = _BUTTON_COLOURS[item.thing.key]
    edge = (150, 150, 150) if item.thing.key in ("black", "white") else colour
    draw.rounded_rectangle(item.box, (bottom - top) / 2, colour, edge, 6)
    x, y = (left + right) / 2, (top + bottom) / 2
    ink = (90, 90, 90) if item.thing.key == "white" else (255, 255, 255)
    draw.rounded_rectangle((x - 46, y - 12, x + 46, y + 12), 12, ink)  # stands for its caption


def _draw_choice(draw: ImageDraw, item: Item) -> None:
    left, top, right, bottom = item.box
    is_yes = item.thing.key == "confirm"
    draw.rounded_rectangle(item.box, 24, (22, 160, 84) if is_yes else (214, 120, 20))
    x, y, r = (left + right) / 2, (top + bottom) / 2, (bottom - top) / 3
    white = (255, 255, 255)
    if is_yes:
        draw.line((x - r, y, x - r / 4, y + r, x + r, y - r), white, 18, joint="curve")
    else:
        draw.line((x - r, y - r, x + r, y + r), white, 18)
        draw.line((x - r, y + r, x + r, y - r), white, 18)


def draw_icon(draw: ImageDraw, key: str, box: Box) -> None:
    """Draw an app's icon: a rounded square and one bold shape.

    Args:
        draw: Where.
        key: Of one of `APPS`.
        box: Left, top, right, bottom, px.
    """
    left, top, right, _ = box
    side = right - left

    def at(*shares: float) -> tuple[float, ...]:
        """Shares of the side, x and y in turn, to px."""
        return tuple((top if n % 2 else left) + s * side for n, s in enumerate(shares))

    white = (255, 255, 255)
    ground: dict[str, Colour] = {
        "wechat": (20, 190, 70),
        "settings": (130, 136, 148),
        "camera": (52, 48, 60),
        "calendar": (250, 250, 250),
        "calculator": (255, 150, 0),
        "photos": (236, 90, 170),
        "chrome": (250, 205, 40),
        "contacts": (120, 80, 40),
        "weather": (90, 190, 250),
        "video": (110, 50, 200),
    }
    draw.rounded_rectangle(box, side * 0.2, ground[key])
    if key == "wechat":
        draw.ellipse(at(0.12, 0.2, 0.65, 0.62), white)
        draw.ellipse(at(0.42, 0.45, 0.9, 0.82), white)
    elif key == "settings":
        draw.ellipse(at(0.18, 0.18, 0.82, 0.82), (70, 74, 84))
        draw.ellipse(at(0.38, 0.38, 0.62, 0.62), white)
    elif key == "camera":
        draw.ellipse(at(0.22, 0.22, 0.78, 0.78), (170, 210, 240))
        draw.ellipse(at(0.36, 0.36, 0.64, 0.64), (30, 60, 110))
    elif key == "calendar":
        draw.rectangle(at(0, 0.08, 1, 0.38), (220, 40, 40))
        draw.rectangle(at(0.3, 0.52, 0.7, 0.88), (60, 60, 60))
    elif key == "calculator":
        for place in range(4):
            x, y = 0.16 + 0.4 * (place % 2), 0.16 + 0.4 * (place // 2)
            draw.rectangle(at(x, y, x + 0.28, y + 0.28), white)
    elif key == "photos":
        draw.polygon(at(0.06, 0.86, 0.4, 0.24, 0.74, 0.86), white)
        draw.ellipse(at(0.62, 0.14, 0.86, 0.38), (255, 230, 90))
    elif key == "chrome":
        draw.pieslice(at(0.08, 0.08, 0.92, 0.92), 180, 300, (220, 50, 40))
        draw.pieslice(at(0.08, 0.08, 0.92, 0.92), 60, 180, (30, 150, 70))
        draw.ellipse(at(0.3, 0.3, 0.7, 0.7), (40, 110, 240))
    elif key == "contacts":
        draw.ellipse(at(0.32, 0.14, 0.68, 0.5), (245, 215, 180))
        draw.pieslice(at(0.14, 0.54, 0.86, 1.26), 180, 360, (245, 215, 180))
    elif key == "weather":
        draw.ellipse(at(0.24, 0.24, 0.76, 0.76), (255, 220, 0))
    else:
        draw.polygon(at(0.3, 0.2, 0.3, 0.8, 0.82, 0.5), white)
