"""Memory against the default budget, and the disk that checkpoints go to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from autoglm_gguf.devices import MachineMemory, probe_bounds
from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.hub_cache import RepoCache
from autoglm_gguf.hub_client import cache_root, endpoint, is_offline
from autoglm_gguf.memory.budget import DEFAULT_BUDGET, parse_budget
from autoglm_gguf.units import format_bytes

REPO = "zai-org/AutoGLM-Phone-9B"
CHECKPOINT_BYTES = 20_600_000_000
"""Of `REPO`: 10.29 billion bf16 parameters."""
PAIR_BYTES = 6_330_000_000
"""Its q4_0 text and q8_0 mmproj."""
_STEP_BYTES = 100_000_000


def check_machine() -> Iterator[Finding]:
    """Memory, disk and the way to the hub."""
    yield _memory(probe_bounds())
    try:
        import huggingface_hub
    except ImportError:  # told among the dependencies
        return
    yield _disk(cache_root())
    yield _hub(has_token=huggingface_hub.get_token() is not None)


def _memory(bounds: tuple[MachineMemory, ...]) -> Finding:
    """What is there, and whether the default budget is."""
    if not bounds:
        text = "this system does not tell how much there is"
        return Finding("memory", "note", text, "pip install psutil")
    names = {"machine": "machine", "cgroup": "control group (container)"}
    told = "; ".join(
        f"{names[bound.limit]} {format_bytes(bound.total_bytes)}, "
        f"{format_bytes(bound.available_bytes)} available"
        for bound in bounds
    )
    least = min(bounds, key=lambda bound: bound.available_bytes)
    budget = parse_budget(DEFAULT_BUDGET) or 0
    if least.available_bytes >= budget:
        return Finding("memory", "ok", f"{told}; the default budget of {DEFAULT_BUDGET} fits")
    fits = least.available_bytes * 9 // 10 // _STEP_BYTES * _STEP_BYTES
    raise_it = "close other programs"
    if least.limit == "cgroup":
        raise_it = "raise the container's limit (docker run --memory)"
    hint = f"{raise_it}, or give less: --memory-budget {fits // 10**6}MB" if fits else raise_it
    text = f"{told}; the default budget of {DEFAULT_BUDGET} does not fit"
    return Finding("memory", "note", text, hint)


def _disk(cache: Path) -> Finding:
    """Room for the published checkpoint, less what of it is there."""
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    blobs = RepoCache(cache, REPO).folder / "blobs"
    there = sum(path.stat().st_size for path in blobs.glob("*") if path.is_file())
    needed = max(0, CHECKPOINT_BYTES - there)
    text = (
        f"{format_bytes(free)} free in {cache}; {REPO} takes {format_bytes(CHECKPOINT_BYTES)} there"
        f"{f' ({format_bytes(there)} has come)' if there else ''}, "
        f"{format_bytes(PAIR_BYTES)} as q4_0 in --outdir"
    )
    if not os.access(existing, os.W_OK):
        hint = "set HF_HUB_CACHE to a folder that can be written"
        return Finding("disk", "note", f"{existing}: cannot be written; {text}", hint)
    if free < needed:
        hint = "free some, or set HF_HUB_CACHE to a folder on a larger disk"
        return Finding("disk", "note", f"too little for the 9B: {text}", hint)
    return Finding("disk", "ok", text)


def _hub(*, has_token: bool) -> Finding:
    token = "a token is set" if has_token else "no token, which only private and gated repos need"
    if is_offline():
        text = f"{endpoint()}, but downloads are forbidden (HF_HUB_OFFLINE); {token}"
        return Finding("hub", "note", text, "unset HF_HUB_OFFLINE, or convert a local folder")
    return Finding("hub", "ok", f"{endpoint()} (not asked); {token}")
