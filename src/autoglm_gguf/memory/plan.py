"""`plan_memory`: one budget for the whole process, what is chosen to stay under it, and why.

Levers are pulled mildest first until every phase (load, image encode, decode) fits; then those that
turn out not to be needed are released, what costs the user most first (``levers``). What the caller
has set is never changed. Chooses from headers and numbers; loads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from autoglm_gguf.config import ContextParams
from autoglm_gguf.devices import MachineMemory, probe_memory
from autoglm_gguf.errors import DoesNotFitError
from autoglm_gguf.gguf.describe import ModelDescription, describe_pair
from autoglm_gguf.hub import resolve_pair
from autoglm_gguf.memory.budget import DEFAULT_BUDGET, Budget, parse_budget
from autoglm_gguf.memory.holding import (
    FLOOR_BYTES,
    READ_AHEAD,
    Choice,
    Holding,
    Item,
    Places,
    Weights,
    sum_phases,
)
from autoglm_gguf.memory.levers import MEGABYTE, UNBOUNDED, Search, usable_bytes
from autoglm_gguf.memory.measure import measure_memory
from autoglm_gguf.native import pages
from autoglm_gguf.units import format_bytes

AUTO = "auto"
_AUTO_LAYERS = (
    "n_gpu_layers: auto means 0 for now; layers are put on a GPU where their number is given"
)


@dataclass(frozen=True, slots=True)
class Lever:
    """One choice that was taken to save memory."""

    name: str
    saved_bytes: int
    """Off the phase that it helps most."""
    reason: str
    cost: str
    """What gets slower or smaller; empty if nothing does."""
    avoided_by_bytes: int
    """A budget, in whole megabytes, whose plan does without it; a megabyte less takes it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One size or place, and why it is what it is."""

    name: str
    value: int | str
    reason: str


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What will be held, and how."""

    name: str
    budget_bytes: int | None
    """None: no bound."""
    context: ContextParams
    """With every size chosen."""
    weights: Weights
    places: Places
    tower: Literal["resident", "on_demand", "none"]
    items: tuple[Item, ...]
    levers: tuple[Lever, ...]
    decisions: tuple[Decision, ...]
    remarks: tuple[str, ...]
    """Choices made for the caller that are no levers, one sentence each."""
    streamed_bytes: int
    """Weights read for every batch, and so for every token, where the page cache holds none."""
    cached_bytes: int
    """What is read from files again and again: mapped weights, and a tower loaded for each image.
    Where the page cache cannot hold them, they are dropped from it as soon as they were used."""

    @property
    def phase_bytes(self) -> dict[str, int]:
        """Bytes held at the worst moment of each phase; no encode without a tower."""
        sums = sum_phases(self.items)
        if self.tower == "none":
            del sums["encode"]
        return sums

    @property
    def peak_bytes(self) -> int:
        """Bytes held at most: what the budget is for."""
        return max(self.phase_bytes.values())

    @property
    def process_bytes(self) -> int:
        """Of `peak_bytes`, what shows as held by the process: without pages read ahead of use."""
        ahead = tuple(item for item in self.items if item.name != READ_AHEAD)
        sums = sum_phases(ahead)
        return max(n for phase, n in sums.items() if phase in self.phase_bytes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What costs speed or size and which budget would avoid it, one sentence each."""
        costly = (
            f"{lever.name}: {lever.reason}; {lever.cost} "
            f"(a budget of {lever.avoided_by_bytes // MEGABYTE}MB avoids it)"
            for lever in self.levers
            if lever.cost
        )
        return (*self.remarks, *costly)


def plan_memory(
    model: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = "auto",
    memory_budget: Budget = DEFAULT_BUDGET,
    **context: Any,
) -> MemoryPlan:
    """Plan how a GGUF pair is held under a budget, without loading it.

    Args:
        model: A text GGUF, or a directory with one.
        mmproj: The vision tower; ``"auto"`` looks beside the model, None leaves it out.
        memory_budget: For everything this process holds, resident pages and device buffers, at
            load, at image encode and at decode: bytes, ``"4GB"`` (10**9 each), ``"4GiB"`` (2**30),
            or ``"none"``.
        **context: Fields of `ContextParams`. What is given is kept; the rest may be made smaller.
            ``n_gpu_layers="auto"`` means 0 for now, and a note says so.

    Raises:
        ValueError, TypeError: A budget or an argument out of range.
        GGUFError: A file is missing or broken.
        DoesNotFitError: No choice stays under the budget, or the machine has too little memory.
    """
    budget_bytes = parse_budget(memory_budget)
    remarks: tuple[str, ...] = ()
    if context.get("n_gpu_layers") == AUTO:
        del context["n_gpu_layers"]
        remarks = (_AUTO_LAYERS,)
    params = ContextParams(**context)
    usage = measure_memory()
    text, tower = resolve_pair(model, mmproj)
    return plan_pair(
        describe_pair(text, tower),
        params,
        budget_bytes,
        fixed=frozenset(context),
        held_bytes=usage.total_bytes if usage else 0,
        machine=probe_memory(),
        remarks=remarks,
    )


def plan_pair(
    described: ModelDescription,
    params: ContextParams,
    budget_bytes: int | None,
    *,
    fixed: frozenset[str] = frozenset(),
    held_bytes: int = 0,
    machine: MachineMemory | None = None,
    remarks: tuple[str, ...] = (),
) -> MemoryPlan:
    """Plan a described pair; see `plan_memory`.

    Args:
        described: The pair.
        params: Wanted sizes.
        budget_bytes: None lifts the bound.
        fixed: Fields of ``params`` that may not be changed.
        held_bytes: What this process holds before anything of the model is loaded.
        machine: Its memory; None if unknown.
        remarks: Go into the plan's notes.

    Raises:
        DoesNotFitError: See `plan_memory`.
    """
    holding = Holding(described, max(held_bytes, FLOOR_BYTES))
    planner = _Planner(described.text.path.stem, holding, params, fixed)
    plan = replace(planner.plan(budget_bytes), remarks=remarks)
    wanted = plan.peak_bytes - held_bytes  # what is held already is not asked for again
    if machine is not None and wanted > machine.available_bytes:
        budget = "none" if budget_bytes is None else format_bytes(budget_bytes)
        raise DoesNotFitError(
            f"{plan.name}: needs {format_bytes(wanted)} more, and this {machine.limit} has "
            f"{format_bytes(machine.available_bytes)} free (budget {budget})",
            budget_bytes=budget_bytes,
            required_bytes=plan.peak_bytes,
            hint="close other programs, or keep within what is free: --memory-budget "
            f"{max(1, (machine.available_bytes + held_bytes) // MEGABYTE)}MB",
        )
    return plan


class _Planner:
    """Plans one pair under any budget, and explains what was chosen."""

    def __init__(
        self, name: str, holding: Holding, params: ContextParams, fixed: frozenset[str]
    ) -> None:
        self._name, self._holding, self._fixed = name, holding, fixed
        self._search = Search(holding, params, fixed)

    def plan(self, budget_bytes: int | None) -> MemoryPlan:
        if budget_bytes is None:
            return self._describe(self._search.first, None)
        choice = self._search.find(budget_bytes)
        if choice is None:
            raise self._refusal(budget_bytes)
        return self._describe(choice, budget_bytes)

    def _describe(self, choice: Choice, budget_bytes: int | None) -> MemoryPlan:
        holding = self._holding
        usable = UNBOUNDED if budget_bytes is None else usable_bytes(budget_bytes)
        places = holding.places(choice, usable)
        tower: Literal["resident", "on_demand"] = (
            "on_demand" if choice.tower_on_demand else "resident"
        )
        levers = () if budget_bytes is None else tuple(self._explain(choice, budget_bytes))
        return MemoryPlan(
            name=self._name,
            budget_bytes=budget_bytes,
            context=choice.params,
            weights=choice.weights,
            places=places,
            tower="none" if holding.tower is None else tower,
            items=holding.items(choice, usable),
            levers=levers,
            decisions=tuple(self._decide(choice, usable, {lever.name for lever in levers})),
            remarks=(),
            streamed_bytes=holding.layers_bytes(places.streamed),
            cached_bytes=holding.cached_bytes(choice, places),
        )

    def _decide(self, choice: Choice, usable: int, pulled: set[str]) -> Iterator[Decision]:
        params, holding = choice.params, self._holding
        for name, value, lever in (
            ("n_ctx", params.n_ctx, "n_ctx"),
            ("n_batch", params.n_batch, "n_batch"),
            ("type_k", params.type_k, "kv_cache"),
            ("type_v", params.type_v, "kv_cache"),
            ("n_gpu_layers", params.n_gpu_layers, ""),
        ):
            why = "given" if name in self._fixed else "default"
            yield Decision(name, value, "to fit the budget" if lever in pulled else why)
        if holding.tower is not None:
            why = "given" if "max_image_tokens" in self._fixed else "the model's own limit"
            most = holding.image_tokens(params)
            if most == params.n_ctx != params.max_image_tokens:
                why = "n_ctx"
            why = "to fit the budget" if "image_tokens" in pulled else why
            yield Decision("max_image_tokens", most, why)
        for item in holding.items(choice, usable):
            if item.name == "weights":
                yield Decision("weights", choice.weights, item.reason)
            elif item.name == "tower":
                place = "on_demand" if choice.tower_on_demand else "resident"
                yield Decision("tower", place, item.reason)

    def _pulled(self, choice: Choice, budget_bytes: int) -> list[str]:
        """The levers that tell a choice from the first one, mildest first."""
        first, params, holding = self._search.first, choice.params, self._holding
        yielding = holding.places(choice, usable_bytes(budget_bytes)).yielding
        found = {
            "n_batch": params.n_batch < first.params.n_batch,
            "tower": choice.tower_on_demand != first.tower_on_demand,
            "kv_cache": params.type_k != first.params.type_k,
            "repack": choice.weights == "mapped" != first.weights,
            "give_way": bool(yielding) and holding.tower is not None,
            "image_tokens": holding.image_tokens(params) < holding.image_tokens(first.params),
            "n_ctx": params.n_ctx < first.params.n_ctx,
            "streaming": choice.weights == "streamed",
        }
        return [name for name, is_pulled in found.items() if is_pulled]

    def _explain(self, choice: Choice, budget_bytes: int) -> Iterator[Lever]:
        for name in self._pulled(choice, budget_bytes):
            saved, reason, cost = self._tell(name, choice, usable_bytes(budget_bytes))
            avoided_by = self._search.least_budget(
                budget_bytes,
                lambda other, n, name=name: name not in self._pulled(other, n),  # type: ignore[misc]
            )
            yield Lever(name, saved, reason, cost, avoided_by)

    def _tell(self, name: str, choice: Choice, usable: int) -> tuple[int, str, str]:
        """What a pulled lever saves, does and costs."""
        first, now, holding = self._search.first.params, choice.params, self._holding
        places = holding.places(choice, usable)
        if name == "n_batch":
            without = _with(choice, n_batch=first.n_batch)
            reason = f"{now.n_batch} tokens a batch instead of {first.n_batch}"
            return self._saved(choice, without), reason, "prefill is a little slower"
        if name == "tower":
            saved = self._saved(choice, replace(choice, tower_on_demand=False))
            size = format_bytes(holding.tower.weights_bytes if holding.tower else 0)
            reason = "the vision tower is loaded for each image and freed after it"
            return saved, reason, f"each image waits for {size} to be read"
        if name == "kv_cache":
            without = _with(choice, type_k=first.type_k, type_v=first.type_v)
            return self._saved(choice, without), f"the KV cache is kept in {now.type_k}", ""
        if name == "repack":
            staging = self._peak(replace(choice, weights="repacked"), "load")
            saved = staging - self._peak(replace(choice, weights="mapped"), "load")
            reason = "the weights stay in the file's pages, not in the faster kernels' order"
            return saved, reason, "prefill and decode are slower"
        if name == "give_way":
            given = holding.layers_bytes(places.yielding)
            reason = f"{format_bytes(given)} of the weights give way while an image is encoded"
            return given, reason, "they are read again after it"
        if name == "image_tokens":
            without = _with(choice, max_image_tokens=first.max_image_tokens)
            most = holding.image_tokens(now)
            reason = f"an image takes at most {most} tokens"
            cost = "small text in screenshots is harder to read"
            return self._saved(choice, without), reason, cost
        if name == "n_ctx":
            reason = f"n_ctx is {now.n_ctx} instead of {first.n_ctx}"
            saved = self._saved(choice, _with(choice, n_ctx=first.n_ctx))
            return saved, reason, "conversations are shorter"
        read = holding.layers_bytes(places.streamed)
        saved = self._peak(replace(choice, weights="mapped", gives_way=False), "decode")
        saved -= holding.phases(choice, usable)["decode"]
        reason = f"{len(places.streamed)} of {holding.text.n_layers} layers pass through memory"
        cost = f"each token reads {format_bytes(read)}, from the page cache or else the disk"
        return saved, reason, cost

    def _saved(self, choice: Choice, without: Choice) -> int:
        # Compared with all weights held: else they would give way to the difference.
        held = [replace(c, weights="mapped", gives_way=False) for c in (choice, without)]
        taken, more = (self._holding.phases(c, UNBOUNDED) for c in held)
        return max(more[phase] - taken[phase] for phase in taken)

    def _peak(self, choice: Choice, phase: str) -> int:
        return self._holding.phases(choice, UNBOUNDED)[phase]

    def _refusal(self, budget_bytes: int) -> DoesNotFitError:
        """Nothing fits: name what would."""
        least = self._search.least_budget(budget_bytes, lambda *_: True)
        choice = self._search.find(least) or self._search.first
        phases = self._holding.phases(choice, usable_bytes(least))
        phase = max(phases, key=lambda name: phases[name])
        streams = "" if pages.SUPPORTED else "; weights cannot be streamed on this system"
        return DoesNotFitError(
            f"{self._name}: does not fit {format_bytes(budget_bytes)} (at {phase} it needs "
            f"{least // MEGABYTE}MB with n_ctx {choice.params.n_ctx} and every lever "
            f"pulled{streams})",
            budget_bytes=budget_bytes,
            required_bytes=least,
            hint=f"--memory-budget {least // MEGABYTE}MB{self._other_way(budget_bytes)}",
        )

    def _other_way(self, budget_bytes: int) -> str:
        """What else would fit: the largest n_ctx, where the caller has set a larger one."""
        params = self._search.first.params
        if "n_ctx" not in self._fixed:
            return ", or a smaller outtype"
        low, high = 0, params.n_ctx // 256  # in the steps that llama.cpp rounds up to
        while high - low > 1:
            middle = (low + high) // 2
            smaller = replace(params, n_ctx=256 * middle)
            fits = Search(self._holding, smaller, self._fixed).find(budget_bytes) is not None
            low, high = (middle, high) if fits else (low, middle)
        return f", or --n-ctx {256 * low}" if low else ", or a smaller outtype"


def _with(choice: Choice, **changed: Any) -> Choice:
    return replace(choice, params=replace(choice.params, **changed))
