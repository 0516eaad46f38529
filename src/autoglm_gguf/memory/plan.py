"""`plan_memory`: one budget for the whole process, what is chosen to stay under it, and why.

Levers are pulled mildest first until every phase (load, image encode, decode) fits; then those that
turn out not to be needed are released, what costs the user most first (``levers``). What the caller
has set is never changed. Chooses from headers and numbers; loads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from autoglm_gguf.config import ContextParams
from autoglm_gguf.devices import (
    NO_GPU,
    MachineMemory,
    choose_devices,
    explain_no_gpu,
    probe_devices,
    probe_memory,
)
from autoglm_gguf.errors import DoesNotFitError
from autoglm_gguf.gguf.describe import ModelDescription, describe_pair
from autoglm_gguf.hub import resolve_pair
from autoglm_gguf.memory.budget import DEFAULT_BUDGET, Budget, parse_budget
from autoglm_gguf.memory.estimate import N_CTX_STEP
from autoglm_gguf.memory.holding import (
    DECODED_PIXEL_BYTES,
    FLOOR_BYTES,
    READ_AHEAD,
    SCREEN_BYTES,
    Choice,
    Holding,
    Item,
    Places,
    Weights,
    sum_phases,
)
from autoglm_gguf.memory.levers import MEGABYTE, UNBOUNDED, Search, usable_bytes
from autoglm_gguf.memory.measure import measure_memory
from autoglm_gguf.memory.offload import choose_layers, count_layers, find_choice, parse_layers
from autoglm_gguf.native import pages
from autoglm_gguf.native.ggml import Device
from autoglm_gguf.units import format_bytes

_PLAIN_REASONS = ("given", f"auto: {NO_GPU}")  # nothing that need be told


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
    devices: tuple[str, ...]
    """The GPUs that layers go to, by ggml's names; empty where none does."""
    tower_on_device: bool
    devices_count_in_process: bool
    """Their buffers are among this process's pages, and are to be counted once."""
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
    def device_bytes(self) -> int:
        """Of `peak_bytes`, what lies in GPU buffers at most."""
        return max(sum_phases([item for item in self.items if item.on_device]).values())

    @property
    def process_bytes(self) -> int:
        """Of `peak_bytes`, what shows as held by the process: without pages read ahead of use."""
        ahead = tuple(item for item in self.items if item.name != READ_AHEAD)
        sums = sum_phases(ahead)
        return max(n for phase, n in sums.items() if phase in self.phase_bytes)

    @property
    def largest_image_pixels(self) -> int | None:
        """Pixels of the largest image that can be decoded within the budget; None: no bound.

        More than the screenshot that is planned for: what the budget leaves free is used too.
        """
        if self.budget_bytes is None:
            return None
        free_bytes = max(0, self.budget_bytes - self.phase_bytes["decode"])
        return (SCREEN_BYTES + free_bytes) // DECODED_PIXEL_BYTES

    @property
    def notes(self) -> tuple[str, ...]:
        """What costs speed or size and which budget would avoid it, one sentence each."""
        costly = (
            f"{lever.name}: {lever.reason}; {lever.cost} "
            f"(a budget of {lever.avoided_by_bytes // MEGABYTE}MB avoids it)"
            for lever in self.levers
            if lever.cost
        )
        placed = (
            f"n_gpu_layers: {decision.value} ({decision.reason})"
            for decision in self.decisions
            if decision.name == "n_gpu_layers" and decision.reason not in _PLAIN_REASONS
        )
        return (*placed, *costly)


def plan_memory(
    model: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = "auto",
    memory_budget: Budget = DEFAULT_BUDGET,
    reserved_bytes: int = 0,
    **context: Any,
) -> MemoryPlan:
    """Plan how a GGUF pair is held under a budget, without loading it.

    Args:
        model: A text GGUF, or a directory with one.
        mmproj: The vision tower; ``"auto"`` looks beside the model, None leaves it out.
        memory_budget: For everything this process holds, resident pages and device buffers, at
            load, at image encode and at decode: bytes, ``"4GB"`` (10**9 each), ``"4GiB"`` (2**30),
            or ``"none"``.
        reserved_bytes: Of the budget, left to the program for its own work at encode and decode.
        **context: Fields of `ContextParams`. What is given is kept; the rest may be made smaller.
            ``n_gpu_layers`` is a number, ``"all"`` or ``"auto"``: as many layers as fit the
            budget and the GPU's free memory.

    Raises:
        ValueError, TypeError: A budget or an argument out of range.
        GGUFError: A file is missing or broken.
        DoesNotFitError: No choice stays under the budget, or the machine has too little memory.
    """
    return plan_described(
        lambda: describe_pair(*resolve_pair(model, mmproj)),
        memory_budget=memory_budget,
        reserved_bytes=reserved_bytes,
        context=context,
    )


def plan_described(
    describe: Callable[[], ModelDescription],
    *,
    memory_budget: Budget,
    reserved_bytes: int,
    context: Mapping[str, Any],
) -> MemoryPlan:
    """Plan a pair that is described when the arguments are checked and the process is measured.

    Args:
        describe: Gives the pair; what its headers take in memory is part of the load.
        memory_budget: See `plan_memory`, as the rest and the errors.
        reserved_bytes: See `plan_memory`.
        context: Fields of `ContextParams`.
    """
    budget_bytes, context = parse_sizes(memory_budget, context)
    if reserved_bytes < 0:
        raise ValueError(f"reserved_bytes {reserved_bytes}: less than nothing")
    params, n_gpu_layers = ContextParams(**context), context.get("n_gpu_layers")
    # Before this process is measured: drivers take memory when they are first asked.
    found = () if n_gpu_layers == 0 else probe_devices()
    devices = () if n_gpu_layers == 0 else choose_devices(found, params.device)
    usage = measure_memory()
    return plan_pair(
        describe(),
        params,
        budget_bytes,
        fixed=frozenset(context),
        held_bytes=usage.total_bytes if usage else 0,
        machine=probe_memory(),
        devices=devices,
        no_gpu=explain_no_gpu(found),
        reserved_bytes=reserved_bytes,
    )


def parse_sizes(
    memory_budget: Budget, context: Mapping[str, Any]
) -> tuple[int | None, dict[str, Any]]:
    """What `plan_memory` is asked for, checked as far as that goes without a file.

    Returns:
        The budget in bytes, None for no bound; fields of `ContextParams`.

    Raises:
        ValueError, TypeError: One is out of range or unknown.
    """
    n_gpu_layers = parse_layers(context.get("n_gpu_layers"))
    sizes = {key: value for key, value in context.items() if key != "n_gpu_layers"}
    sizes |= {} if n_gpu_layers is None else {"n_gpu_layers": n_gpu_layers}
    ContextParams(**sizes)
    return parse_budget(memory_budget), sizes


def plan_pair(
    described: ModelDescription,
    params: ContextParams,
    budget_bytes: int | None,
    *,
    fixed: frozenset[str] = frozenset(),
    held_bytes: int = 0,
    machine: MachineMemory | None = None,
    devices: Sequence[Device] = (),
    no_gpu: str = NO_GPU,
    reserved_bytes: int = 0,
) -> MemoryPlan:
    """Plan a described pair; see `plan_memory`.

    Args:
        described: The pair.
        params: Wanted sizes.
        budget_bytes: None lifts the bound.
        fixed: Fields of ``params`` that may not be changed.
        held_bytes: What this process holds before anything of the model is loaded.
        machine: Its memory; None if unknown.
        devices: The GPUs that layers may go to.
        no_gpu: Why there is none, where there is none.
        reserved_bytes: See `plan_memory`.

    Raises:
        DoesNotFitError: See `plan_memory`.
    """
    holding = Holding(described, max(held_bytes, FLOOR_BYTES), devices, reserved_bytes)
    plan = _Planner(described.text.path.stem, holding, params, fixed, no_gpu).plan(budget_bytes)
    _check_machine(plan, holding, machine, held_bytes)
    return plan


def _check_machine(
    plan: MemoryPlan, holding: Holding, machine: MachineMemory | None, held_bytes: int
) -> None:
    """Refuse what neither main memory nor the devices have room for."""
    elsewhere = 0 if any(d.shares_memory for d in holding.devices) else plan.device_bytes
    wanted = plan.peak_bytes - elsewhere - held_bytes  # what is held is not asked for again
    budget = "none" if plan.budget_bytes is None else format_bytes(plan.budget_bytes)
    if machine is not None and wanted > machine.available_bytes:
        raise DoesNotFitError(
            f"{plan.name}: needs {format_bytes(wanted)} more, and this {machine.limit} has "
            f"{format_bytes(machine.available_bytes)} free (budget {budget})",
            budget_bytes=plan.budget_bytes,
            required_bytes=plan.peak_bytes,
            hint="close other programs, or keep within what is free: --memory-budget "
            f"{max(1, (machine.available_bytes + held_bytes) // MEGABYTE)}MB",
        )
    free = sum(device.free_bytes for device in holding.devices)
    if free and plan.device_bytes > free:
        raise DoesNotFitError(
            f"{plan.name}: needs {format_bytes(plan.device_bytes)} on "
            f"{', '.join(plan.devices)}, which has "
            f"{format_bytes(free)} free (n_gpu_layers {plan.context.n_gpu_layers})",
            budget_bytes=plan.budget_bytes,
            required_bytes=plan.peak_bytes,
            hint="--n-gpu-layers auto puts there what fits",
        )


class _Planner:
    """Plans one pair under any budget, and explains what was chosen."""

    def __init__(
        self,
        name: str,
        holding: Holding,
        params: ContextParams,
        fixed: frozenset[str],
        no_gpu: str,
    ) -> None:
        self._name, self._holding, self._fixed, self._no_gpu = name, holding, fixed, no_gpu
        self._is_auto = "n_gpu_layers" not in fixed
        n = 0 if self._is_auto else count_layers(params.n_gpu_layers, holding, no_gpu)
        self._search = Search(holding, replace(params, n_gpu_layers=n), fixed)
        self._layers_reason = "given"

    def plan(self, budget_bytes: int | None) -> MemoryPlan:
        if self._is_auto:
            n, self._layers_reason = choose_layers(self._search, budget_bytes, self._no_gpu)
            self._search = self._search.with_layers(n)
        choice = find_choice(self._search, budget_bytes)
        if choice is None:
            raise self._refusal(budget_bytes or 0)
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
            devices=tuple(d.name for d in holding.devices if choice.params.n_gpu_layers),
            devices_count_in_process=any(d.counts_in_process for d in holding.devices),
            tower_on_device=holding.tower_on_device(choice.params),
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
        ):
            why = "given" if name in self._fixed else "default"
            yield Decision(name, value, "to fit the budget" if lever in pulled else why)
        yield Decision("n_gpu_layers", params.n_gpu_layers, self._layers_reason)
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
        streams = "" if self._holding.can_page else "; weights cannot be streamed on this system"
        if pages.SUPPORTED and streams:
            streams = "; its layers are scattered in the file, so they cannot be streamed"
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
        low, high = 0, params.n_ctx // N_CTX_STEP
        while high - low > 1:
            middle = (low + high) // 2
            smaller = replace(params, n_ctx=N_CTX_STEP * middle)
            fits = Search(self._holding, smaller, self._fixed).find(budget_bytes) is not None
            low, high = (middle, high) if fits else (low, middle)
        return f", or --n-ctx {N_CTX_STEP * low}" if low else ", or a smaller outtype"


def _with(choice: Choice, **changed: Any) -> Choice:
    return replace(choice, params=replace(choice.params, **changed))
