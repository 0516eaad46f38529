"""`plan_memory`: one budget for the whole process, what is chosen to stay under it, and why.

Levers are pulled mildest first until every phase (load, image encode, decode) fits; then those that
turn out not to be needed are released, what costs the user most first. What the caller has set is
never changed. Chooses from headers and numbers; loads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

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
from autoglm_gguf.memory.measure import measure_memory
from autoglm_gguf.native import pages
from autoglm_gguf.units import format_bytes

_SLACK = 64  # a budget's 64th part is left free: allocators round up, and estimates are only near
_UNBOUNDED = 2**62
# What is taken from the layers that stay is read again for every token: under streaming the KV
# cache stays small. Batches do not shrink further: every batch of a prompt reads the layers once.
_STREAMED_BATCH = 256
_BATCHES = (256, 128)
_IMAGE_TOKENS = (2048, 1620, 1024, 768, 512)
_SMALLER_N_CTX = (3072, 2048)


@dataclass(frozen=True, slots=True)
class Lever:
    """One choice that was taken to save memory."""

    name: str
    saved_bytes: int
    """Off the highest phase."""
    reason: str
    cost: str
    """What gets slower or smaller; empty if nothing does."""
    avoided_by_bytes: int
    """The budget that would do without it, all else unchanged."""


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
    streamed_bytes: int
    """Weights read for every batch, and so for every token, where the page cache holds none."""

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
        return tuple(
            f"{lever.name}: {lever.reason}; {lever.cost} "
            f"(a budget of {format_bytes(lever.avoided_by_bytes)} avoids it)"
            for lever in self.levers
            if lever.cost
        )


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

    Raises:
        ValueError, TypeError: A budget or an argument out of range.
        GGUFError: A file is missing or broken.
        DoesNotFitError: No choice stays under the budget, or the machine has too little memory.
    """
    budget_bytes = parse_budget(memory_budget)
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
    )


def plan_pair(
    described: ModelDescription,
    params: ContextParams,
    budget_bytes: int | None,
    *,
    fixed: frozenset[str] = frozenset(),
    held_bytes: int = 0,
    machine: MachineMemory | None = None,
) -> MemoryPlan:
    """Plan a described pair; see `plan_memory`.

    Args:
        described: The pair.
        params: Wanted sizes.
        budget_bytes: None lifts the bound.
        fixed: Fields of ``params`` that may not be changed.
        held_bytes: What this process holds before anything of the model is loaded.
        machine: Its memory; None if unknown.

    Raises:
        DoesNotFitError: See `plan_memory`.
    """
    name = described.text.path.stem
    holding = Holding(described, max(held_bytes, FLOOR_BYTES))
    plan = _Search(name, holding, params, fixed).run(budget_bytes)
    wanted = plan.peak_bytes - held_bytes  # what is held already is not asked for again
    if machine is not None and wanted > machine.available_bytes:
        budget = "none" if budget_bytes is None else format_bytes(budget_bytes)
        raise DoesNotFitError(
            f"{name}: needs {format_bytes(wanted)} more, and this {machine.limit} has "
            f"{format_bytes(machine.available_bytes)} free (budget {budget})",
            budget_bytes=budget_bytes,
            required_bytes=plan.peak_bytes,
            hint="close other programs, or keep within what is free: --memory-budget "
            f"{(machine.available_bytes + held_bytes) // 10**6}MB",
        )
    return plan


_Change: TypeAlias = Callable[[Choice], Choice | None]


class _Search:
    """Finds the mildest choice for one pair under one budget."""

    def __init__(
        self, name: str, holding: Holding, params: ContextParams, fixed: frozenset[str]
    ) -> None:
        self._name, self._holding, self._fixed = name, holding, fixed
        weights: Weights = "repacked" if holding.repacks else "mapped"
        self._first = Choice(params, weights, holding.tower is None, gives_way=False)

    def run(self, budget_bytes: int | None) -> MemoryPlan:
        if budget_bytes is None:
            return self._plan(self._first, None, _UNBOUNDED)
        usable = budget_bytes - budget_bytes // _SLACK
        choice = self._first
        for change in self._levers():
            peak = self._holding.peak(choice, usable)
            if peak <= usable:
                break
            following = change(choice)
            if following is not None and self._holding.peak(following, usable) < peak:
                choice = following
        if self._holding.peak(choice, usable) > usable:
            raise self._refusal(choice, budget_bytes)
        return self._plan(self._release(choice, usable), budget_bytes, usable)

    def _levers(self) -> Iterator[_Change]:
        """Changes, mildest first; one that does not apply gives None."""
        params, fixed = self._first.params, self._fixed
        has_tower = self._holding.tower is not None
        if "n_batch" not in fixed:
            yield from (_setting(n_batch=n) for n in _BATCHES if n < params.n_batch)
        if has_tower:
            yield lambda c: replace(c, tower_on_demand=True)
        if not fixed & {"type_k", "type_v"} and params.flash_attn:
            yield _setting(type_k="q8_0", type_v="q8_0")
        if has_tower and pages.SUPPORTED:
            yield lambda c: replace(c, weights="mapped", gives_way=True, tower_on_demand=True)
        if has_tower and "max_image_tokens" not in fixed:
            most = self._holding.image_tokens(params)
            yield from (_setting(max_image_tokens=n) for n in _IMAGE_TOKENS if n < most)
        if "n_ctx" not in fixed:
            yield from (_setting(n_ctx=n) for n in _SMALLER_N_CTX if n < params.n_ctx)
        if pages.SUPPORTED and params.n_gpu_layers == 0:
            yield lambda c: replace(c, weights="streamed", gives_way=True, tower_on_demand=True)

    def _release(self, choice: Choice, usable: int) -> Choice:
        """Undo what is not needed after all."""
        first, now = self._first.params, choice.params
        back: list[_Change] = []
        if now.n_ctx < first.n_ctx:
            back.append(_setting(n_ctx=first.n_ctx))
        if now.max_image_tokens != first.max_image_tokens:
            back.append(_setting(max_image_tokens=first.max_image_tokens))
            larger = [n for n in _IMAGE_TOKENS if n > (now.max_image_tokens or 0)]
            back += [_setting_if_smaller("max_image_tokens", n) for n in larger]
        if not choice.gives_way or choice.weights == "streamed":
            pass
        elif self._first.weights == "mapped":
            back.append(lambda c: replace(c, gives_way=False))
        else:
            back.append(lambda c: replace(c, weights=self._first.weights, gives_way=False))
        streams = choice.weights == "streamed"
        if now.type_k != first.type_k and not streams:
            back.append(_setting(type_k=first.type_k, type_v=first.type_v))
        batches = [_STREAMED_BATCH] if streams else sorted({first.n_batch, *_BATCHES}, reverse=True)
        back += [_setting_if_smaller("n_batch", n) for n in batches if n > now.n_batch]
        if choice.tower_on_demand and not self._first.tower_on_demand and not choice.gives_way:
            back.append(lambda c: replace(c, tower_on_demand=False))
        for change in back:
            milder = change(choice)
            if milder is not None and self._holding.peak(milder, usable) <= usable:
                choice = milder
        return choice

    def _plan(self, choice: Choice, budget_bytes: int | None, usable: int) -> MemoryPlan:
        places = self._holding.places(choice, usable)
        params = choice.params
        if self._holding.tower is not None:
            largest = max(16, self._holding.image_tokens(params))
            params = replace(params, max_image_tokens=largest)
        tower: Literal["resident", "on_demand"] = (
            "on_demand" if choice.tower_on_demand else "resident"
        )
        return MemoryPlan(
            name=self._name,
            budget_bytes=budget_bytes,
            context=params,
            weights=choice.weights,
            places=places,
            tower="none" if self._holding.tower is None else tower,
            items=self._holding.items(choice, usable),
            levers=tuple(self._explain(choice, usable)),
            streamed_bytes=self._holding.layers_bytes(places.streamed),
        )

    def _explain(self, choice: Choice, usable: int) -> Iterator[Lever]:
        """One lever per difference from the first choice."""
        first, params, places = (
            self._first.params,
            choice.params,
            self._holding.places(choice, usable),
        )
        text = self._holding.text
        if params.n_batch < first.n_batch:
            yield self._lever(
                "n_batch",
                choice,
                _with(choice, n_batch=first.n_batch),
                f"{params.n_batch} tokens a batch instead of {first.n_batch}",
                "prefill is a little slower",
            )
        if choice.tower_on_demand and self._holding.tower is not None:
            weights = format_bytes(self._holding.tower.weights_bytes)
            yield self._lever(
                "tower",
                choice,
                replace(choice, tower_on_demand=False),
                "the vision tower is loaded for each image and freed after it",
                f"each image waits for {weights} to be read",
            )
        if params.type_k != first.type_k:
            yield self._lever(
                "kv_cache",
                choice,
                _with(choice, type_k=first.type_k, type_v=first.type_v),
                f"the KV cache is kept in {params.type_k}",
                "",
            )
        if places.yielding:
            given = self._holding.layers_bytes(places.yielding)
            peak = self._holding.peak(choice, usable)
            yield Lever(
                "give_way",
                given,
                f"{format_bytes(given)} of the weights give way while an image is encoded",
                "they are read again after it",
                _budget_for(peak + given),
            )
        if params.max_image_tokens != first.max_image_tokens:
            yield self._lever(
                "image_tokens",
                choice,
                _with(choice, max_image_tokens=first.max_image_tokens),
                f"an image takes at most {params.max_image_tokens} tokens",
                "small text in screenshots is harder to read",
            )
        if params.n_ctx < first.n_ctx:
            yield self._lever(
                "n_ctx",
                choice,
                _with(choice, n_ctx=first.n_ctx),
                f"n_ctx is {params.n_ctx} instead of {first.n_ctx}",
                "conversations are shorter",
            )
        if choice.weights == "streamed":
            whole = self._holding.peak(replace(choice, weights="mapped"), usable)
            read = self._holding.layers_bytes(places.streamed)
            yield Lever(
                "streaming",
                max(0, whole - self._holding.peak(choice, usable)),
                f"{len(places.streamed)} of {text.n_layers} layers pass through memory",
                f"each token reads {format_bytes(read)}, from the page cache or else the disk",
                _budget_for(whole),
            )

    def _lever(self, name: str, choice: Choice, without: Choice, reason: str, cost: str) -> Lever:
        # Compared with all weights held: else they would give way to the difference.
        held = [replace(c, weights="mapped", gives_way=False) for c in (choice, without)]
        taken, more = (self._holding.peak(c, _UNBOUNDED) for c in held)
        saved = max(0, more - taken)
        return Lever(name, saved, reason, cost, _budget_for(more))

    def _refusal(self, choice: Choice, budget_bytes: int) -> DoesNotFitError:
        """Nothing fits: name what would."""
        phases = self._holding.phases(choice, 0)
        phase = max(phases, key=lambda name: phases[name])
        least = _budget_for(phases[phase])
        streams = "" if pages.SUPPORTED else "; weights cannot be streamed on this system"
        return DoesNotFitError(
            f"{self._name}: does not fit {format_bytes(budget_bytes)} (at {phase} it needs "
            f"{format_bytes(least)} with n_ctx {choice.params.n_ctx} and every lever "
            f"pulled{streams})",
            budget_bytes=budget_bytes,
            required_bytes=least,
            hint=f"--memory-budget {-(-least // 10**6)}MB, or a smaller n_ctx or outtype",
        )


def _with(choice: Choice, **changed: Any) -> Choice:
    return replace(choice, params=replace(choice.params, **changed))


def _setting(**changed: Any) -> _Change:
    return lambda choice: _with(choice, **changed)


def _setting_if_smaller(field: str, value: int) -> _Change:
    def change(choice: Choice) -> Choice | None:
        now = getattr(choice.params, field)
        return None if now is None or now >= value else _with(choice, **{field: value})

    return change


def _budget_for(peak_bytes: int) -> int:
    """The budget whose usable part is ``peak_bytes``."""
    return -(-peak_bytes * _SLACK // (_SLACK - 1))
