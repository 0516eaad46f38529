"""The drawn screens: the same every time, their targets where they say, the held-out ones apart."""

from __future__ import annotations

from itertools import islice

import pytest

from autoglm_gguf.evaluate.screens import (
    COLUMNS,
    LAYOUTS,
    ROWS,
    SIZE,
    THINGS,
    draw_screen,
    held_out_tasks,
    is_held_out,
    training_tasks,
)


def test_held_out_tasks_are_the_same_for_the_same_seed_and_begin_alike() -> None:
    assert held_out_tasks(12) == held_out_tasks(24)[:12]
    assert held_out_tasks(12) != held_out_tasks(12, seed=1)
    with pytest.raises(ValueError, match="at least one screen"):
        held_out_tasks(0)


def test_training_never_asks_for_what_is_held_out() -> None:
    asked = {(t.target.thing.key, t.target.slot) for t in islice(training_tasks(1), 3000)}
    kept = {(t.target.thing.key, t.target.slot) for t in held_out_tasks(300)}
    assert len(kept) > 30
    assert not asked & kept


def test_every_layout_language_and_thing_is_held_out_somewhere() -> None:
    tasks = held_out_tasks(200)
    assert {task.screen.layout for task in tasks} == set(LAYOUTS)
    assert {task.language for task in tasks} == {"zh", "en"}
    assert {task.target.thing for task in tasks} == set(THINGS)
    assert all(is_held_out(task.target) for task in tasks)


def test_exact_action_lies_in_the_targets_box_and_in_no_other() -> None:
    for task in [*held_out_tasks(100), *islice(training_tasks(3), 300)]:
        x, y = task.action.to_pixels("element", SIZE)
        hits = [i for i in task.screen.items if i.box[0] <= x <= i.box[2]]
        assert [i for i in hits if i.box[1] <= y <= i.box[3]] == [task.target]
        assert task.text[: task.word_end].endswith(task.target.thing.word(task.language))
        slots = [item.slot for item in task.screen.items]
        assert len(set(slots)) == len(slots)
        assert all(0 <= c < COLUMNS and 0 <= r < ROWS for c, r in slots)


def test_drawing_shows_the_target_at_its_box() -> None:
    task = next(t for t in held_out_tasks(200) if t.target.thing.key == "red")
    image = draw_screen(task.screen)
    assert image.size == SIZE
    left, top, _, bottom = task.target.box
    inside = image.getpixel((round(left) + 40, round((top + bottom) / 2)))
    assert inside == (226, 48, 46)
    assert draw_screen(task.screen).tobytes() == image.tobytes()
