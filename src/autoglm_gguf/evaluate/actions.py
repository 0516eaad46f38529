"""How well a model hits what it is asked to tap, on drawn screens whose targets are known.

Any model that takes images can be asked; with the checkpoint it was made from, the original answers
the same prompts about the same pixels. A score on these screens compares models, sizes and types
with one another; it is no prediction for real phones. Needs no torch unless there is an original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from autoglm_gguf.actions import parse_answer
from autoglm_gguf.errors import ActionParseError, ImageError
from autoglm_gguf.evaluate.screens import (
    HELD_OUT_SEED,
    SIZE,
    Box,
    Task,
    draw_screen,
    held_out_tasks,
)
from autoglm_gguf.session import AUTO_SYSTEM, AutoGLM, act_messages
from autoglm_gguf.vision import read_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_TOKENS = (32, 72)
"""What autoglm-tiny is made for; a model for real phones wants 512 and more."""
N_SCREENS = 100
MAX_TOKENS = 128  # an answer of autoglm-tiny takes 21


class Original(Protocol):
    """What answers beside the model; `original.OriginalModel` in earnest."""

    def answer(
        self, head: Sequence[int], image: Image, tail: Sequence[int], *, draft: Sequence[int]
    ) -> str:
        """The greedy answer to a prompt with one image between its two parts."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one answer did."""

    answer: str
    """The action as it is rendered; the whole answer if it holds none."""
    point: tuple[int, int] | None
    """Where it taps, px of the drawn screen; None for anything but a tap."""
    is_hit: bool
    """Whether the point is in the target's box."""
    is_exact: bool
    """Whether it is the action that autoglm-tiny is trained to give."""
    error_px: float | None
    """Distance of the point from the exact action's, px of the drawn screen."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One screen at one size."""

    task: str
    layout: str
    language: str
    expected: str
    box: Box
    """The target's, px of the drawn screen: left, top, right, bottom."""
    image_tokens: int
    ours: Outcome
    original: Outcome | None


@dataclass(frozen=True, slots=True)
class Score:
    """All screens at one size."""

    image_tokens: int
    """What a screen takes, at most."""
    n: int
    n_hits: int
    n_exact: int
    n_taps: int
    mean_error_px: float | None
    """Over the taps; None when there is none."""

    @property
    def hit_rate(self) -> float:
        """Share of the screens whose target was hit."""
        return self.n_hits / self.n


@dataclass(frozen=True, slots=True)
class Comparison:
    """One size: the model's score, and the original's."""

    max_image_tokens: int
    ours: Score
    original: Score | None
    n_same: int | None
    """Screens on which both gave the same action."""
    mean_distance_px: float | None
    """Between both's taps, px of the drawn screen."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `evaluate_actions` found."""

    model: str
    seed: int
    screen_size: tuple[int, int]
    """Of the drawn screens, px."""
    sizes: tuple[Comparison, ...]
    attempts: tuple[Attempt, ...]


def evaluate_actions(
    model: AutoGLM,
    *,
    n: int = N_SCREENS,
    max_image_tokens: Sequence[int] = IMAGE_TOKENS,
    seed: int = HELD_OUT_SEED,
    system: str | None = AUTO_SYSTEM,
    original: Original | None = None,
    on_screen: Callable[[int, int], None] | None = None,
) -> Report:
    """Ask for a tap on every held-out screen, greedily, at several image sizes.

    Args:
        model: Any that takes images.
        n: Screens.
        max_image_tokens: Upper bounds for one image; each is a row of the report. A model loaded
            with a lower bound of its own keeps to that.
        seed: Decides the screens; the default ones are never in autoglm-tiny's training.
        system: As `AutoGLM.act` takes it.
        original: Answers the same; None leaves it out.
        on_screen: Told ``(done, total)``.

    Raises:
        ValueError: No screens, no sizes, or a size below 1.
        ImageError: The model takes no images.
        Exception: What `AutoGLM.act` raises, but for answers without an action, which are misses.
    """
    if not max_image_tokens or min(max_image_tokens) < 1:
        raise ValueError(f"max_image_tokens {list(max_image_tokens)}: sizes of at least 1")
    if model.info.vision is None:
        raise ImageError(f"{model.info.name}: takes no images", hint="give its mmproj")
    tasks = held_out_tasks(n, seed=seed)
    attempts: list[Attempt] = []
    sizes = []
    for bound in max_image_tokens:
        rows = []
        for task in tasks:
            rows.append(_attempt(model, task, bound, system, original))
            if on_screen is not None:
                on_screen(len(attempts) + len(rows), n * len(max_image_tokens))
        sizes.append(_compare(bound, rows))
        attempts += rows
    return Report(model.info.name, seed, SIZE, tuple(sizes), tuple(attempts))


def judge(task: Task, answer: str) -> Outcome:
    """Compare an answer with what a task's screen wants."""
    try:
        _, action = parse_answer(answer)
    except ActionParseError:
        return Outcome(answer, None, False, False, None)
    if action.name != "Tap":
        return Outcome(action.render(), None, False, False, None)
    point = action.to_pixels("element", SIZE)
    left, top, right, bottom = task.target.box
    return Outcome(
        action.render(),
        point,
        left <= point[0] <= right and top <= point[1] <= bottom,
        action == task.action,
        math.dist(point, task.action.to_pixels("element", SIZE)),
    )


def _attempt(
    model: AutoGLM, task: Task, bound: int, system: str | None, original: Original | None
) -> Attempt:
    shown, n_tokens = _show(model, task, bound)
    try:
        # Free, as the original answers: what it cannot say is to be seen.
        step = model.act(task.text, shown, system=system, max_tokens=MAX_TOKENS, constrain=None)
        text = step.text
    except ActionParseError as error:
        text = error.text
    theirs = None
    if original is not None:
        head, tail = _prompt(model, task, shown, system)
        theirs = judge(task, original.answer(head, shown, tail, draft=model.tokenize(text)))
    return Attempt(
        task.text,
        task.screen.layout,
        task.language,
        task.action.render(),
        task.target.box,
        n_tokens,
        judge(task, text),
        theirs,
    )


def _show(model: AutoGLM, task: Task, bound: int) -> tuple[Image, int]:
    """The screen at the size the model will see, and its image tokens."""
    from PIL import Image as PILImage

    info = model.info
    assert info.vision is not None
    if info.max_image_tokens is not None:
        bound = min(bound, info.max_image_tokens)
    pixels = read_pixels(draw_screen(task.screen), info.vision, max_image_tokens=bound)
    return PILImage.fromarray(pixels.array), pixels.n_tokens


def _prompt(
    model: AutoGLM, task: Task, shown: Image, system: str | None
) -> tuple[list[int], list[int]]:
    """Token ids before and after the image, as `AutoGLM.act` asks."""
    head, tail = model.render(act_messages(task.text, shown, system)).segments
    return model.tokenize(head), model.tokenize(tail)


def _compare(bound: int, rows: Sequence[Attempt]) -> Comparison:
    ours = _score(rows, [row.ours for row in rows])
    originals = [row.original for row in rows if row.original is not None]
    if not originals:
        return Comparison(bound, ours, None, None, None)
    pairs = list(zip((row.ours for row in rows), originals, strict=True))
    distances = [
        math.dist(mine.point, theirs.point) for mine, theirs in pairs if mine.point and theirs.point
    ]
    n_same = sum(mine.answer == theirs.answer for mine, theirs in pairs)
    return Comparison(bound, ours, _score(rows, originals), n_same, _mean(distances))


def _score(rows: Sequence[Attempt], outcomes: Sequence[Outcome]) -> Score:
    errors = [outcome.error_px for outcome in outcomes if outcome.error_px is not None]
    return Score(
        max(row.image_tokens for row in rows),
        len(outcomes),
        sum(outcome.is_hit for outcome in outcomes),
        sum(outcome.is_exact for outcome in outcomes),
        len(errors),
        _mean(errors),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
