"""Weights that stay, stream and give way: the answers are those of weights that lie still."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Shape, build_checkpoint
from numpy.typing import NDArray

from autoglm_gguf import AutoGLM, MemoryPlan, convert, plan_memory
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.memory.holding import Places
from autoglm_gguf.memory.plan import Decision
from autoglm_gguf.memory.residency import Residency
from autoglm_gguf.native import pages
from autoglm_gguf.native.nodes import InputWatch
from autoglm_gguf.stopping import StopFlag, Stopped

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not pages.SUPPORTED, reason="weights cannot be streamed here"),
]

SHAPE = Shape(hidden_size=256, n_layers=6, n_heads=4, head_dim=64, intermediate_size=512)
GRID = (4, 6)
PIXELS = np.random.default_rng(1).integers(0, 256, (6 * 28, 4 * 28, 3), np.uint8)
PLACES = {
    "all streamed": Places(streamed=(0, 1, 2, 3, 4, 5)),
    "one kept": Places(copied=(3,), streamed=(0, 1, 2, 4, 5)),
    "kept, streamed and yielding": Places(copied=(0, 2), streamed=(1, 4), yielding=(3, 5)),
    "one streamed": Places(copied=(0, 1, 2, 3, 4), streamed=(5,)),
}
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    base = tmp_path_factory.mktemp("streaming")
    shape = replace(SHAPE, mrope_section=(4, 6, 6))
    checkpoint = build_checkpoint(base / "checkpoint", shape)
    made: dict[str, Pair] = {}

    def make(outtype: str) -> Pair:
        if outtype not in made:
            pair = convert(checkpoint, base / outtype, outtype)
            made[outtype] = (pair.text, pair.mmproj)
        return made[outtype]

    return make


def planned(pair: Pair, **changed: Any) -> MemoryPlan:
    sizes = {"n_ctx": 512, "n_batch": 64, "n_threads": 1}  # several wait for each other per node
    plan = plan_memory(pair[0], mmproj=pair[1], memory_budget="none", **sizes)
    return replace(plan, **changed)


def engine(pair: Pair, plan: MemoryPlan) -> LlamaEngine:
    return LlamaEngine(*pair, plan.context, plan=plan)


def follow(model: LlamaEngine) -> list[NDArray[np.float32]]:
    """Logits after a prompt of two batches, an image, and three tokens."""
    model.keep(0)
    tokens = [17 + 3 * n % 200 for n in range(100)]
    model.eval_tokens(tokens[:64])
    model.eval_tokens(tokens[64:])
    found = [model.logits()]
    model.eval_image(model.encode_image(PIXELS, GRID))
    for token in (5, 6, 7):
        model.eval_tokens([token])
        found.append(model.logits())
    return found


def run(pair: Pair, **changed: Any) -> list[NDArray[np.float32]]:
    model = engine(pair, planned(pair, **changed))
    try:
        return follow(model)
    finally:
        model.close()


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_streamed_weights_answer_as_mapped_ones(
    pairs: Callable[[str], Pair], outtype: str, places: Places
) -> None:
    mapped = run(pairs(outtype), weights="mapped")
    streamed = run(pairs(outtype), weights="streamed", places=places, tower="on_demand")
    if outtype == "q8_0" and not _lies_still(outtype):
        assert_near(mapped, streamed)
        return
    for one, other in zip(mapped, streamed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_inputs_of_streamed_layers_are_seen_as_those_of_mapped_ones(
    pairs: Callable[[str], Pair],
) -> None:
    found = []
    names = [f"blk.{layer}.ffn_down.weight" for layer in range(SHAPE.n_layers)]
    for changed in ({"weights": "mapped"}, {"weights": "streamed", "places": PLACES["one kept"]}):
        watch = InputWatch(names)
        watch.begin()
        plan = planned(pairs("f16"), **changed)
        model = LlamaEngine(*pairs("f16"), plan.context, plan=plan, watches=(watch,))
        follow(model)
        model.close()
        watch.check()
        found.append(watch)
    assert found[0].counts == found[1].counts
    for name in names:
        np.testing.assert_array_equal(found[0].sums[name], found[1].sums[name])


def test_copied_layers_in_another_order_answer_alike(pairs: Callable[[str], Pair]) -> None:
    """q4_0 has kernels of its own order on most CPUs, which round in another order."""
    mapped = run(pairs("q4_0"), weights="mapped")
    for weights, places in (("repacked", Places()), ("streamed", PLACES["one streamed"])):
        assert_near(mapped, run(pairs("q4_0"), weights=weights, places=places))


def assert_near(one: list[NDArray[np.float32]], other: list[NDArray[np.float32]]) -> None:
    for a, b in zip(one, other, strict=True):
        cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
        assert cosine > 0.9995
        assert b[int(a.argmax())] > np.sort(b)[-3]


def _lies_still(outtype: str) -> bool:
    """Whether copied matrices keep their order, and so the order of their sums, on this CPU."""
    from autoglm_gguf.native.ggml import GGMLType, can_repack

    return not can_repack(GGMLType[outtype.upper()], 256, 256)


def test_weights_that_gave_way_come_back(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("q8_0")
    still = engine(pair, planned(pair, weights="mapped"))
    giving = engine(
        pair,
        planned(pair, weights="mapped", places=Places(yielding=(2, 3, 4, 5)), tower="on_demand"),
    )
    for _ in range(3):  # each time the tower is loaded again, and pages are dropped
        for one, other in zip(follow(still), follow(giving), strict=True):
            np.testing.assert_array_equal(one, other)
    still.close()
    giving.close()


def test_greedy_answers_are_equal(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("f16")
    answers = []
    for changed in ({"weights": "mapped"}, {"weights": "streamed", "places": PLACES["one kept"]}):
        with AutoGLM(engine(pair, planned(pair, **changed))) as model:
            answers.append(model.generate("hello", max_tokens=24).tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("n_passed", [1, 2, 5])
def test_cancelled_between_two_layers_the_batch_leaves_nothing_behind(
    pairs: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, n_passed: int
) -> None:
    """llama.cpp calls a graph that was ended there done, and keeps its cells."""
    stop, n_left, passed = StopFlag(), n_passed, Residency.passed

    def stopping(self: Residency, layer: int) -> None:
        nonlocal n_left
        passed(self, layer)
        n_left -= 1
        if n_left == 0:
            stop.set()

    monkeypatch.setattr(Residency, "passed", stopping)
    pair = pairs("f16")
    plan = planned(pair, weights="streamed", places=PLACES["all streamed"])
    fresh, model = engine(pair, plan), engine(pair, plan)
    n_left = -1
    fresh.eval_tokens([8, 9, 10])
    n_left = n_passed
    model.watch(stop)
    with pytest.raises(Stopped):
        model.eval_tokens([5, 6, 7])  # the first of all: nothing is cut before the next batch
    model.watch(StopFlag())
    assert len(model.content) == 0
    model.eval_tokens([8, 9, 10])
    np.testing.assert_array_equal(model.logits(), fresh.logits())
    model.close()
    fresh.close()


def test_plan_is_told_by_the_engine(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("f16")
    decided = (Decision("n_gpu_layers", 0, "so it is"),)
    plan = planned(pair, weights="streamed", places=PLACES["one kept"], decisions=decided)
    model = engine(pair, plan)
    assert model.info.plan is plan
    assert "n_gpu_layers: 0 (so it is)" in model.info.notes
    assert model.info.n_ctx == model.info.plan.context.n_ctx == 512
    assert model.device_bytes == 0
    model.close()


def test_closing_a_streaming_engine_leaves_nothing_behind(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("f16")
    model = engine(pair, planned(pair, weights="streamed", places=PLACES["one kept"]))
    assert pages.find_mappings(pair[0])
    model.close()
    assert pages.find_mappings(pair[0]) == []
    assert not {"read-ahead", "load-watch"} & {thread.name for thread in threading.enumerate()}
