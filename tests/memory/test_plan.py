"""The plan: what is chosen under a budget, in which order, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from builders import describe_sizes

from autoglm_gguf import ContextParams, DoesNotFitError, GGUFError, MemoryPlan, plan_memory
from autoglm_gguf.devices import MachineMemory
from autoglm_gguf.memory.plan import plan_pair
from autoglm_gguf.native import pages

MB = 10**6
SMALL: dict[str, Any] = {}
DEEP = {"layer_bytes": (100 * MB,) * 40, "tower_bytes": 900 * MB}
TEXT_ONLY = {"tower_bytes": 0, "layer_bytes": (50 * MB,) * 12}
NARROW = {"head_dim": 16, "n_embd": 128}
SHAPES = {"small": SMALL, "deep": DEEP, "text only": TEXT_ONLY, "narrow": NARROW}
# From the top: what each lever's first appearance must come before.
ORDER = ("n_batch", "kv_cache", "give_way", "image_tokens", "n_ctx", "streaming")

needs_streaming = pytest.mark.skipif(not pages.SUPPORTED, reason="weights cannot be streamed here")


def plan(sizes: dict[str, Any], budget: int | None, **given: Any) -> MemoryPlan:
    return plan_pair(
        describe_sizes(**sizes), ContextParams(**given), budget, fixed=frozenset(given)
    )


@cache
def plans(sizes: str, **given: Any) -> tuple[MemoryPlan, ...]:
    """Plans from the least budget that fits to one without levers, upwards."""
    with pytest.raises(DoesNotFitError) as caught:
        plan(SHAPES[sizes], 50 * MB, **given)
    least = caught.value.required_bytes
    most = plan(SHAPES[sizes], None, **given).peak_bytes * 1.05
    step = max(1, int(most - least) // 80 // MB) * MB
    budgets = range(least, int(most) + step, step)
    return tuple(plan(SHAPES[sizes], budget, **given) for budget in budgets)


def names(found: MemoryPlan) -> list[str]:
    return [lever.name for lever in found.levers]


# --- fitting ---


@pytest.mark.parametrize("sizes", SHAPES)
def test_plan_stays_under_its_budget_in_every_phase(sizes: str) -> None:
    for found in plans(sizes):
        assert found.budget_bytes is not None
        assert max(found.phase_bytes.values()) == found.peak_bytes < found.budget_bytes
        assert found.process_bytes <= found.peak_bytes


@pytest.mark.parametrize("budget", [None, 6 * 10**9])
def test_plan_pulls_no_lever_where_all_fits(budget: int | None) -> None:
    found = plan(DEEP, budget)
    assert found.context == ContextParams()
    assert (found.weights, found.tower, found.levers) == ("mapped", "resident", ())
    assert found.notes == ()


def test_plan_without_a_tower_says_so() -> None:
    found = plan(TEXT_ONLY, None)
    assert found.tower == "none"
    assert set(found.phase_bytes) == {"load", "decode"}


def test_gb_and_gib_are_different_budgets(random_pair: tuple[Path, Path]) -> None:
    found = [plan_memory(random_pair[0], memory_budget=written) for written in ("4GB", "4GiB")]
    assert [p.budget_bytes for p in found] == [4_000_000_000, 4_294_967_296]
    assert plan_memory(random_pair[0]).budget_bytes == 4_000_000_000
    assert plan_memory(random_pair[0], memory_budget="none").budget_bytes is None


# --- levers ---


@needs_streaming
def test_levers_come_in_their_order_as_the_budget_shrinks() -> None:
    seen = list(dict.fromkeys(name for p in reversed(plans("small")) for name in names(p)))
    assert [name for name in seen if name in ORDER] == list(ORDER)


def test_plan_names_its_levers_mildest_first() -> None:
    order = ("n_batch", "tower", "kv_cache", "repack", *ORDER[2:])
    for found in [*plans("small"), *plans("deep")]:
        assert names(found) == [name for name in order if name in names(found)]


@needs_streaming
@pytest.mark.parametrize("sizes", SHAPES)
def test_a_larger_budget_never_gives_less(sizes: str) -> None:
    """Not across the step from streamed to held weights, which costs sizes: see memory.md."""
    before: MemoryPlan | None = None
    for found in plans(sizes):
        if before is not None:
            assert not (found.weights == "streamed" != before.weights)
            if found.weights == before.weights:
                assert found.context.n_ctx >= before.context.n_ctx
                assert image(found) >= image(before)
            if found.context == before.context and found.weights == "streamed" == before.weights:
                assert len(found.places.streamed) <= len(before.places.streamed)
                assert len(found.places.copied) >= len(before.places.copied)
            if found.weights == "mapped" == before.weights and image(found) == image(before):
                assert len(found.places.yielding) <= len(before.places.yielding) or (
                    found.context != before.context
                )
        before = found


def image(found: MemoryPlan) -> int:
    return next(
        (int(d.value) for d in found.decisions if d.name == "max_image_tokens"),
        0,
    )


@pytest.mark.parametrize("sizes", SHAPES)
def test_budget_that_avoids_a_lever_does(sizes: str) -> None:
    for found in plans(sizes)[::15]:
        for lever in found.levers:
            assert lever.avoided_by_bytes % MB == 0
            assert lever.name not in names(plan(SHAPES[sizes], lever.avoided_by_bytes))
            assert lever.name in names(plan(SHAPES[sizes], lever.avoided_by_bytes - MB))


@pytest.mark.parametrize("sizes", SHAPES)
def test_every_lever_says_what_it_saves_and_why(sizes: str) -> None:
    for found in plans(sizes)[::15]:
        for lever in found.levers:
            assert lever.saved_bytes > 0, lever
            assert lever.reason
            assert bool(lever.cost) == (lever.name != "kv_cache")


def test_levers_that_turn_out_not_to_be_needed_are_released() -> None:
    """Once the weights give way, batch and cache have room again: they were pulled before."""
    tight = max((p for p in plans("small") if "give_way" in names(p)), key=lambda p: p.budget_bytes)
    assert (tight.context.n_batch, tight.context.type_k) == (512, "f16")


@needs_streaming
def test_streaming_gives_n_ctx_and_image_back_but_neither_batch_nor_cache() -> None:
    """Those take room from layers that are then read again for every token."""
    found = plan(DEEP, 2 * 10**9)
    assert found.weights == "streamed"
    assert found.context == ContextParams(n_batch=256, type_k="q8_0", type_v="q8_0")
    assert found.streamed_bytes == 100 * MB * len(found.places.streamed) > 0


@needs_streaming
def test_smaller_n_ctx_leaves_room_for_words() -> None:
    small = [p for p in plans("deep") if p.context.n_ctx < 4096]
    assert small
    assert all(image(p) <= p.context.n_ctx - 256 for p in small)


def test_quantised_cache_is_not_chosen_where_heads_are_too_narrow() -> None:
    assert all(p.context.type_k == "f16" for p in plans("narrow"))
    assert any(p.context.type_k == "q8_0" for p in plans("small"))


def test_quantised_cache_is_not_chosen_without_flash_attention() -> None:
    assert all(p.context.type_v == "f16" for p in plans("small", flash_attn=False))


def test_weights_that_cannot_be_paged_neither_stream_nor_give_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages, "SUPPORTED", False)
    found = plans.__wrapped__("small")
    assert {p.weights for p in found} == {"mapped"}
    assert not any(p.places.yielding for p in found)
    with pytest.raises(DoesNotFitError, match="cannot be streamed on this system"):
        plan(DEEP, 10**9)


@needs_streaming
def test_layers_that_are_scattered_in_the_file_are_not_streamed() -> None:
    described = describe_sizes(layer_bytes=(10 * MB,) * 8, tower_bytes=0)
    tensors = dict(described.text.tensors)
    last = tensors["blk.7.ffn_up.weight"]
    first = replace(last, name="blk.0.ffn_down.weight")  # at the other end of the file
    tensors[first.name] = first
    scattered = replace(described, text=replace(described.text, tensors=tensors))
    budget = 150 * MB
    assert plan_pair(described, ContextParams(n_ctx=512), budget).weights == "streamed"
    with pytest.raises(DoesNotFitError, match="its layers are scattered in the file"):
        plan_pair(scattered, ContextParams(n_ctx=512), budget)


# --- what was given ---


@pytest.mark.parametrize(
    "given",
    [
        {"n_ctx": 4096},
        {"n_batch": 512, "type_v": "f16"},
        {"max_image_tokens": 2900},
        {"n_ctx": 3000, "n_batch": 300, "type_k": "f32", "type_v": "f32", "max_image_tokens": 999},
    ],
)
def test_what_was_given_is_never_changed(given: dict[str, Any]) -> None:
    for found in plans("small", **given):
        assert {key: getattr(found.context, key) for key in given} == given
        for decision in found.decisions:
            assert (decision.reason == "given") == (decision.name in given)


def test_n_ctx_is_not_made_smaller_than_a_given_image() -> None:
    assert {p.context.n_ctx for p in plans("small", max_image_tokens=2900)} == {4096}


def test_n_ctx_that_was_not_given_may_become_smaller() -> None:
    assert min(p.context.n_ctx for p in plans("small")) == 2048


# --- what is told ---


@needs_streaming
def test_notes_name_cost_and_the_budget_that_avoids_it() -> None:
    found = plan(DEEP, 2 * 10**9)
    streaming = next(lever for lever in found.levers if lever.name == "streaming")
    note = next(note for note in found.notes if note.startswith("streaming: "))
    n = len(found.places.streamed)
    assert f"{n} of 40 layers pass through memory" in note
    assert f"each token reads {n / 10:.2f} GB" in note
    assert f"(a budget of {streaming.avoided_by_bytes // MB}MB avoids it)" in note


def test_decisions_name_every_size_and_place() -> None:
    found = plan(DEEP, 6 * 10**9, n_ctx=1024)
    assert {d.name: (d.value, d.reason) for d in found.decisions} == {
        "n_ctx": (1024, "given"),
        "n_batch": (512, "default"),
        "type_k": ("f16", "default"),
        "type_v": ("f16", "default"),
        "n_gpu_layers": (0, "auto: no GPU"),
        "max_image_tokens": (1024, "n_ctx"),
        "tower": ("resident", "resident from the first image"),
        "weights": ("mapped", "the file's own pages"),
    }


# --- what does not fit ---


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("given", [{}, {"n_ctx": 16384}, {"n_batch": 1024, "type_k": "f32"}])
def test_budget_that_the_error_names_is_the_least(
    sizes: dict[str, Any], given: dict[str, Any]
) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan(sizes, 60 * MB, **given)
    error = caught.value
    assert error.budget_bytes == 60 * MB
    assert f"--memory-budget {error.required_bytes // MB}MB" in error.hint
    assert plan(sizes, error.required_bytes, **given).budget_bytes == error.required_bytes
    with pytest.raises(DoesNotFitError):
        plan(sizes, error.required_bytes - MB, **given)


def test_error_names_the_n_ctx_that_would_fit() -> None:
    budget = 300 * MB
    with pytest.raises(DoesNotFitError) as caught:
        plan(SMALL, budget, n_ctx=65536)
    n_ctx = int(caught.value.hint.split("--n-ctx ")[1])
    assert n_ctx < 65536
    assert plan(SMALL, budget, n_ctx=n_ctx).context.n_ctx == n_ctx
    with pytest.raises(DoesNotFitError):
        plan(SMALL, budget, n_ctx=n_ctx + 256)


def test_error_names_phase_and_n_ctx() -> None:
    with pytest.raises(
        DoesNotFitError, match=r"sized: does not fit 60\.00 MB \(at encode it needs"
    ):
        plan(SMALL, 60 * MB)


@pytest.mark.parametrize(("free_mb", "fits"), [(10_000, True), (5_300, True), (300, False)])
def test_machine_with_too_little_memory_is_an_error(free_mb: int, fits: bool) -> None:
    machine = MachineMemory(16 * 10**9, free_mb * MB, "machine")
    described = describe_sizes(**DEEP)
    if fits:
        assert plan_pair(described, ContextParams(), 6 * 10**9, machine=machine).levers == ()
        return
    with pytest.raises(DoesNotFitError, match=r"more, and this machine has 300\.00 MB free") as e:
        plan_pair(described, ContextParams(), 6 * 10**9, held_bytes=80 * MB, machine=machine)
    assert e.value.budget_bytes == 6 * 10**9
    assert e.value.hint.endswith("--memory-budget 380MB")  # what is free, and what is held already


def test_what_the_program_needs_itself_is_planned_once_the_model_is_loaded() -> None:
    described = describe_sizes(**SMALL)
    alone = plan_pair(described, ContextParams(), None).phase_bytes
    beside = plan_pair(described, ContextParams(), None, reserved_bytes=50 * MB).phase_bytes
    grown = {phase: beside[phase] - n_bytes for phase, n_bytes in alone.items()}
    assert grown == {"load": 0, **dict.fromkeys(set(alone) - {"load"}, 50 * MB)}


def test_plan_refuses_to_reserve_less_than_nothing() -> None:
    with pytest.raises(ValueError, match="reserved_bytes -1"):
        plan_memory("model.gguf", reserved_bytes=-1)


def test_control_group_is_named_where_it_is_the_bound() -> None:
    group = MachineMemory(2 * 10**9, 10**9, "cgroup")
    with pytest.raises(DoesNotFitError, match=r"this cgroup has 1\.00 GB free \(budget none\)"):
        plan_pair(describe_sizes(**DEEP), ContextParams(), None, machine=group)


def test_machine_is_asked_only_for_what_is_not_held_yet() -> None:
    described = describe_sizes(**SMALL)
    peak = plan_pair(described, ContextParams(), None, held_bytes=500 * MB).peak_bytes
    machine = MachineMemory(10**9, peak - 500 * MB, "machine")
    plan_pair(described, ContextParams(), None, held_bytes=500 * MB, machine=machine)
    less = MachineMemory(10**9, peak - 500 * MB - 1, "machine")
    with pytest.raises(DoesNotFitError):
        plan_pair(described, ContextParams(), None, held_bytes=500 * MB, machine=less)


def test_what_the_process_holds_counts() -> None:
    described = describe_sizes(**DEEP)
    free = plan_pair(described, ContextParams(), 3 * 10**9, held_bytes=100 * MB)
    full = plan_pair(described, ContextParams(), 3 * 10**9, held_bytes=600 * MB)
    assert len(full.places.streamed) == len(free.places.streamed) + 5


# --- before anything is loaded ---


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"memory_budget": "4 GB of fun"}, ValueError),
        ({"memory_budget": 0}, ValueError),
        ({"memory_budget": "-1GB"}, ValueError),
        ({"memory_budget": 4.0}, TypeError),
        ({"n_ctx": 1}, ValueError),
        ({"n_gpu_layers": "some"}, TypeError),
        ({"surprise": 1}, TypeError),
    ],
)
def test_arguments_are_checked_before_files(
    arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        plan_memory("nowhere.gguf", **arguments)


def test_missing_model_is_an_error_of_its_own() -> None:
    with pytest.raises(GGUFError, match=r"nowhere\.gguf"):
        plan_memory("nowhere.gguf")


@pytest.mark.native
def test_budget_below_the_floor_is_refused_before_loading(random_pair: tuple[Path, Path]) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan_memory(random_pair[0], memory_budget="2MB")
    assert caught.value.required_bytes > 70 * MB
