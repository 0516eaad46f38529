"""From paths and a budget to an engine: planned, tested where a GPU takes part, loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.engine.trust import TrustStore, open_trusted
from autoglm_gguf.gguf.describe import ModelDescription, describe_pair
from autoglm_gguf.hub import cache_directory, resolve_pair
from autoglm_gguf.memory.budget import Budget
from autoglm_gguf.memory.plan import MemoryPlan, plan_described
from autoglm_gguf.native.nodes import NodeWatch


def load_engine(
    model: str | os.PathLike[str],
    mmproj: str | os.PathLike[str] | None,
    memory_budget: Budget,
    *,
    self_test: bool,
    reserved_bytes: int = 0,
    context: dict[str, Any],
    watches: Sequence[NodeWatch] = (),
) -> LlamaEngine:
    """Load a pair as `AutoGLM.load` describes it.

    Args:
        model: A text GGUF, or a directory with one.
        mmproj: The vision tower; ``"auto"`` looks beside the model.
        memory_budget: See `plan_memory`.
        self_test: Compare a GPU with the CPU when it is first used with this model.
        reserved_bytes: See `plan_memory`.
        context: Fields of `ContextParams`.
        watches: Look at the nodes of every batch, those of a self-test too.

    Raises:
        ValueError, TypeError, AutoGLMError: See `AutoGLM.load`.
    """

    @cache
    def describe() -> ModelDescription:
        return describe_pair(*resolve_pair(model, mmproj))

    def plan_with(**changed: Any) -> MemoryPlan:
        return plan_described(
            describe,
            memory_budget=memory_budget,
            reserved_bytes=reserved_bytes,
            context={**context, **changed},
        )

    def open_engine(plan: MemoryPlan) -> LlamaEngine:
        return LlamaEngine(
            *describe().paths, plan.context, described=describe(), plan=plan, watches=watches
        )

    plan = plan_with()
    if not (self_test and plan.devices):
        return open_engine(plan)
    store = TrustStore(cache_directory() / "self-tests")
    return open_trusted(
        plan, describe().paths, replan=plan_with, open_engine=open_engine, store=store
    )
