"""A device is compared with the CPU before it is used, and one that lies is found out.

The devices here are the CPU again, under a plan that names another; the liars change what the real
engine says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autoglm_gguf import DoesNotFitError, EngineError, MemoryPlan, plan_memory
from autoglm_gguf.engine.base import ImageEmbedding
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.engine.trust import TrustStore, Verdict, gather, open_trusted

pytestmark = pytest.mark.native

Pair = tuple[Path, Path]
Lie = Callable[[NDArray[np.float32]], NDArray[np.float32]]
SIZES: dict[str, Any] = {"n_ctx": 512, "n_threads": 1}


class Liar(LlamaEngine):
    """Says something else than the model, as a device with a broken driver does."""

    lie: Lie | None = None
    image_lie: Lie | None = None

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        found = super().logits(index)
        return self.lie(found) if self.lie else found

    def encode_image(self, pixels: NDArray[np.uint8], grid: tuple[int, int]) -> ImageEmbedding:
        found = super().encode_image(pixels, grid)
        return ImageEmbedding(self.image_lie(found.data), grid) if self.image_lie else found


class Bench:
    """Opens engines for a pair as `AutoGLM.load` does, and counts them."""

    def __init__(
        self, pair: Pair, folder: Path, *, tower_on_device: bool = False, n_ctx: int = 512
    ) -> None:
        self.pair, self.store = pair, TrustStore(folder)
        self.sizes = SIZES | {"n_ctx": n_ctx}
        self.tower_on_device = tower_on_device
        self.lie: Lie | None = None
        self.image_lie: Lie | None = None
        self.opened: list[MemoryPlan] = []

    def replan(self, **changed: Any) -> MemoryPlan:
        plan = plan_memory(self.pair[0], mmproj=self.pair[1], n_gpu_layers=0, **self.sizes)
        if changed.get("n_gpu_layers") == 0:
            return plan
        on_device = self.tower_on_device and changed.get("mmproj_offload", True)
        return replace(plan, devices=("Lying0",), tower_on_device=on_device)

    def open_engine(self, plan: MemoryPlan) -> Liar:
        self.opened.append(plan)
        plain = replace(plan, devices=(), tower_on_device=False)  # there is only the CPU
        engine = Liar(*self.pair, plan.context, plan=plain)
        engine.lie = self.lie if plan.devices else None
        engine.image_lie = self.image_lie if plan.tower_on_device else None
        return engine

    def open(self) -> tuple[MemoryPlan, str]:
        """The plan that was used in the end, and what is told."""
        engine = open_trusted(
            self.replan(),
            self.pair,
            replan=self.replan,
            open_engine=self.open_engine,
            store=self.store,
        )
        note = engine.info.notes[-1]
        engine.close()
        return self.opened[-1], note


def fail(_: NDArray[np.float32]) -> NDArray[np.float32]:
    raise EngineError("llama.cpp: the device is lost")


def noisy(scale: float) -> Lie:
    rng = np.random.default_rng(0)
    return lambda x: x + scale * x.std() * rng.standard_normal(x.shape, np.float32)


@pytest.fixture(scope="session")
def pair(tiny_pair: Callable[[str], Pair]) -> Pair:
    return tiny_pair("q8_0")


def test_honest_device_is_used_and_tested_once(pair: Pair, tmp_path: Path) -> None:
    bench = Bench(pair, tmp_path / "kept", tower_on_device=True)
    plan, note = bench.open()
    assert (plan.devices, len(bench.opened)) == (("Lying0",), 2)
    assert note == (
        "self-test: Lying0 says what the CPU says (16 tokens, lowest cosine 1.0000) and sees what "
        "it sees (mean cosine 1.0000)"
    )
    assert bench.open()[0].devices == ("Lying0",)
    assert len(bench.opened) == 3  # no CPU beside it this time


@pytest.mark.parametrize(
    "lie",
    [
        lambda x: np.roll(x, 1),
        lambda x: -x,
        lambda x: x * np.nan,
        lambda x: np.zeros_like(x),
        noisy(0.5),
    ],
    ids=["shifted", "negated", "nan", "zeros", "noise"],
)
def test_device_that_lies_is_not_used_and_the_user_is_told(
    pair: Pair, tmp_path: Path, lie: Lie
) -> None:
    bench = Bench(pair, tmp_path)
    bench.lie = lie
    plan, note = bench.open()
    assert plan.devices == ()
    assert note.startswith("self-test: Lying0 does not say what the CPU says (16 tokens, ")
    assert note.endswith("; the CPU does everything")


def test_rounding_is_no_lie(pair: Pair, tmp_path: Path) -> None:
    bench = Bench(pair, tmp_path)
    bench.lie = noisy(0.01)
    assert bench.open()[0].devices == ("Lying0",)


def test_device_that_cannot_see_keeps_the_text(pair: Pair, tmp_path: Path) -> None:
    bench = Bench(pair, tmp_path, tower_on_device=True)
    bench.image_lie = noisy(1.0)
    plan, note = bench.open()
    assert (plan.devices, plan.tower_on_device) == (("Lying0",), False)
    assert "does not see what it sees" in note
    assert note.endswith("; images are encoded on the CPU")


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"verdict": {"text": true}}',
        '{"verdict": {"text": "false", "image": "false", "reason": "none"}}',
    ],
    ids=lambda damage: damage[:60],
)
def test_damaged_verdict_is_made_anew(pair: Pair, tmp_path: Path, damage: str) -> None:
    bench = Bench(pair, tmp_path)
    bench.open()
    (kept,) = tmp_path.glob("*.json")
    kept.write_text(damage)
    bench.open()
    assert len(bench.opened) == 4
    assert json.loads(kept.read_text())["verdict"]["text"] is True


def test_verdict_that_cannot_take_its_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "key.json").mkdir()
    TrustStore(tmp_path).keep("key", Verdict(True, True, "says the same"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]


@pytest.mark.parametrize("n_ctx", [8, 16, 17, 40])
def test_small_context_is_tested_with_what_fits(pair: Pair, tmp_path: Path, n_ctx: int) -> None:
    bench = Bench(pair, tmp_path, n_ctx=n_ctx)
    plan, note = bench.open()
    assert (plan.devices, plan.context.n_ctx) == (("Lying0",), n_ctx)
    assert note.startswith("self-test: Lying0 says what the CPU says (")


def test_device_that_fails_in_the_test_is_not_used_and_that_is_not_kept(
    pair: Pair, tmp_path: Path
) -> None:
    bench = Bench(pair, tmp_path)
    bench.lie = fail
    plan, note = bench.open()
    assert (plan.devices, plan.context.n_gpu_layers) == ((), 0)
    assert (
        note == "self-test: Lying0 failed (llama.cpp: the device is lost); the CPU does everything"
    )
    assert list(tmp_path.iterdir()) == []


def test_other_file_is_tested_anew(pair: Pair, tmp_path: Path) -> None:
    bench = Bench(pair, tmp_path / "kept")
    bench.open()
    copy = tmp_path / pair[0].name
    copy.write_bytes(pair[0].read_bytes())
    bench.pair = (copy, pair[1])
    bench.open()
    assert len(bench.opened) == 4


def test_folder_that_cannot_be_written_is_done_without(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Bench(pair, tmp_path / "file" / "kept").open()[0].devices == ("Lying0",)


def test_model_too_large_for_the_cpu_is_used_untested_and_that_is_told(
    pair: Pair, tmp_path: Path
) -> None:
    bench = Bench(pair, tmp_path)
    planned = bench.replan()

    def replan(**_: Any) -> MemoryPlan:
        raise DoesNotFitError("model: too large", budget_bytes=1, required_bytes=2)

    engine = open_trusted(
        planned, pair, replan=replan, open_engine=bench.open_engine, store=bench.store
    )
    assert engine.info.notes[-1].startswith("self-test: skipped")
    engine.close()


def test_evidence_leaves_the_engine_as_it_was(pair: Pair) -> None:
    engine = LlamaEngine(*pair, plan_memory(pair[0], n_gpu_layers=0, **SIZES).context)
    first, again = (gather(engine, with_image=True) for _ in range(2))
    assert first.answer == again.answer
    assert np.array_equal(first.logits, again.logits)
    assert first.image is not None
    assert first.image.shape[0] == 128
    engine.close()
