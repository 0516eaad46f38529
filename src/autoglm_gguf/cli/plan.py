"""``autoglm-gguf plan``: what a model will hold under a budget, item by item, and why.

Draws plans, alone and beside what was measured; the planning is `plan_memory`'s.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Protocol

from autoglm_gguf.cli import options, output
from autoglm_gguf.engine.base import EngineInfo
from autoglm_gguf.hub import resolve_pair
from autoglm_gguf.memory.measure import MemoryUsage
from autoglm_gguf.memory.plan import MemoryPlan, parse_sizes, plan_memory
from autoglm_gguf.units import format_bytes

_BAR = 40


class Measured(Protocol):
    """A model that tells what it planned to hold, and what it holds: `AutoGLM`'s kind."""

    @property
    def info(self) -> EngineInfo:
        """See `AutoGLM.info`."""

    def memory(self) -> MemoryUsage | None:
        """See `AutoGLM.memory`."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("plan", help="show what a model will hold under a memory budget")
    options.add_memory_options(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the plan; nothing is loaded."""
    given = options.memory_arguments(arguments)
    parse_sizes(given.pop("memory_budget"), given)  # wrong ones are told before a file is missed
    text, tower = resolve_pair(*options.find_model(arguments))
    given = options.memory_arguments(arguments, with_images=tower is not None)
    plan = plan_memory(text, mmproj=tower, **given)
    if arguments.json:
        output.write_json(plan_as_json(plan))
        return
    for line in draw_plan(plan):
        output.write(line)


def plan_as_json(plan: MemoryPlan) -> dict[str, Any]:
    """The whole plan, sizes in bytes."""
    derived = {
        "phase_bytes": plan.phase_bytes,
        "peak_bytes": plan.peak_bytes,
        "process_bytes": plan.process_bytes,
        "device_bytes": plan.device_bytes,
        "notes": list(plan.notes),
    }
    return {**asdict(plan), **derived}


def memory_as_json(model: Measured) -> dict[str, Any]:
    """The plan and what is measured now."""
    plan, usage = model.info.plan, model.memory()
    return {
        "planned": None if plan is None else plan_as_json(plan),
        "measured": None if usage is None else asdict(usage),
    }


def draw_plan(plan: MemoryPlan) -> Iterator[str]:
    """Items by phase, a bar for each phase, what was chosen, and the levers."""
    phases = plan.phase_bytes
    budget = "no budget" if plan.budget_bytes is None else format_bytes(plan.budget_bytes)
    yield f"{plan.name}: {format_bytes(plan.peak_bytes)} at most, budget {budget}"
    yield ""
    yield f"{'':<16}" + "".join(f"{phase:>11}" for phase in phases)
    for item in plan.items:
        sizes = (getattr(item, f"{phase}_bytes") for phase in phases)
        yield f"{item.name:<16}" + "".join(f"{_size(n):>11}" for n in sizes) + f"  {item.reason}"
    yield f"{'total':<16}" + "".join(f"{format_bytes(n):>11}" for n in phases.values())
    yield ""
    yield from (_bar(phase, n, plan) for phase, n in phases.items())
    yield ""
    for decision in plan.decisions:
        yield f"{decision.name:<16} {decision.value!s:>10}  {decision.reason}"
    if not plan.levers:
        return
    yield ""
    yield f"{'lever':<16}{'saves':>11}{'avoided by':>12}"
    for lever in plan.levers:
        avoided = f"{lever.avoided_by_bytes // 10**6}MB"
        row = f"{lever.name:<16}{format_bytes(lever.saved_bytes):>11}{avoided:>12}  {lever.reason}"
        yield f"{row};" if lever.cost else row
        if lever.cost:
            yield f"{'':<41}{lever.cost}"


def draw_memory(model: Measured) -> Iterator[str]:
    """The plan's phases beside what is measured now."""
    yield from draw_usage(model.info.plan, model.memory())


def draw_usage(plan: MemoryPlan | None, usage: MemoryUsage | None) -> Iterator[str]:
    """A plan's phases beside a measurement."""
    yield f"{'memory':<12}{'planned':>11}{'measured':>11}"
    if plan is not None:
        for phase, n_bytes in plan.phase_bytes.items():
            yield f"{phase:<12}{format_bytes(n_bytes):>11}"
    peak = "" if plan is None else format_bytes(plan.peak_bytes)
    yield f"{'peak':<12}{peak:>11}{_measured(usage, 'peak'):>11}"
    for kind in ("anonymous", "mapped", "device"):
        yield f"{kind:<12}{'':>11}{_measured(usage, kind):>11}"
    if plan is not None and plan.budget_bytes is not None:
        yield f"{'budget':<12}{format_bytes(plan.budget_bytes):>11}"


def _measured(usage: MemoryUsage | None, kind: str) -> str:
    return "unknown" if usage is None else format_bytes(getattr(usage, f"{kind}_bytes"))


def _size(n_bytes: int) -> str:
    return format_bytes(n_bytes) if n_bytes else "-"


def _bar(phase: str, n_bytes: int, plan: MemoryPlan) -> str:
    """A phase's share of the budget; without one, of the highest phase."""
    share = n_bytes / (plan.budget_bytes or plan.peak_bytes)
    done = min(_BAR, round(share * _BAR))
    return f"{phase:<8}{'█' * done}{'░' * (_BAR - done)} {share:4.0%}"
