"""Scores of known answers, over the fake engine: an answer says which screen it was given."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from PIL import Image

from autoglm_gguf import AutoGLM, ImageError
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.evaluate.actions import evaluate_actions, judge
from autoglm_gguf.evaluate.screens import SLOT, held_out_tasks


def knowing(prompt: str) -> bytes:
    """Answer exactly what is asked for on the first of the held-out screens that asks it."""
    task = next(task for task in held_out_tasks(8) if task.text in prompt)
    return f"<think>t</think>\n<answer>{task.action.render()}".encode()


class Answering:
    """An original that always says the same."""

    def __init__(self, answer: str) -> None:
        self.answer_text = answer
        self.asked: list[tuple[bytes, tuple[int, int], bytes]] = []

    def answer(
        self, head: Sequence[int], image: Image.Image, tail: Sequence[int], *, draft: Sequence[int]
    ) -> str:
        assert b"<answer>" in bytes(draft)
        self.asked.append((bytes(head), image.size, bytes(tail)))
        return self.answer_text


def test_exact_answers_hit_without_error_at_every_size() -> None:
    told: list[tuple[int, int]] = []
    report = evaluate_actions(
        AutoGLM(FakeEngine(knowing)),
        n=8,
        max_image_tokens=(32, 128),
        on_screen=lambda done, total: told.append((done, total)),
    )
    assert [size.max_image_tokens for size in report.sizes] == [32, 128]
    for size in report.sizes:
        assert size.ours.image_tokens == size.max_image_tokens
        assert (size.ours.n, size.ours.n_hits, size.ours.n_exact, size.ours.n_taps) == (8, 8, 8, 8)
        assert size.ours.mean_error_px == 0
        assert size.original is None
    assert told[-1] == (16, 16)


def test_answers_are_judged_by_the_targets_box() -> None:
    task = next(t for t in held_out_tasks(40) if t.screen.layout == "apps")
    x, y = task.point
    near = judge(task, f'<answer>do(action="Tap", element=[{x + 25},{y}])')
    assert (near.is_hit, near.is_exact) == (True, False)
    assert near.error_px == pytest.approx(25 * 0.72, abs=1)  # 720 px wide
    column = (x + 250) % 1000
    away = judge(task, f'<answer>do(action="Tap", element=[{column},{y}])')
    assert (away.is_hit, away.is_exact) == (False, False)
    assert away.error_px is not None and away.error_px >= SLOT - 1
    for answer in ("Hello", '<answer>do(action="Back")'):
        assert judge(task, answer).point is None
        assert not judge(task, answer).is_hit


def test_original_is_asked_the_same_and_compared() -> None:
    first = held_out_tasks(1)[0]
    original = Answering(f"<answer>{first.action.render()}</answer>")
    report = evaluate_actions(
        AutoGLM(FakeEngine(knowing)), n=4, max_image_tokens=(32,), original=original, system=None
    )
    [size] = report.sizes
    assert size.original is not None
    assert (
        size.original.n_hits
        == size.n_same
        == sum(attempt.expected == first.action.render() for attempt in report.attempts)
    )
    assert size.mean_distance_px is not None
    head, shown, tail = original.asked[0]
    assert head.decode().endswith("<|user|>\n<|begin_of_image|>")
    assert shown == (112, 224)
    assert first.text in tail.decode()


@pytest.mark.parametrize("sizes", [(), (32, 0)])
def test_wrong_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="max_image_tokens"):
        evaluate_actions(AutoGLM(FakeEngine()), max_image_tokens=sizes)


def test_model_without_a_tower_is_refused() -> None:
    with pytest.raises(ImageError, match="takes no images"):
        evaluate_actions(AutoGLM(FakeEngine(vision=False)))
