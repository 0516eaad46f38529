"""How many layers go to a GPU: checks what was asked for, and chooses where that was left open.

Chooses by the plan that each number leads to and by the devices' free memory; asks nothing of the
machine itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoglm_gguf.devices import NO_GPU
from autoglm_gguf.memory.holding import Choice, Holding, sum_phases
from autoglm_gguf.memory.levers import UNBOUNDED, Search, usable_bytes
from autoglm_gguf.native.ggml import Device
from autoglm_gguf.units import format_bytes

AUTO, ALL = "auto", "all"
_ALL_LAYERS = -1
_MARGIN_BYTES = 256 << 20
_MARGIN_SHARE = 32  # of a device's memory: drivers and other programs take some, now and then


def parse_layers(wanted: object) -> int | None:
    """``n_gpu_layers`` as a user gives it: a number, ``"all"`` (-1), or ``"auto"`` (None).

    Raises:
        TypeError: Anything else.
    """
    if wanted is None or wanted == AUTO:
        return None
    if wanted == ALL:
        return _ALL_LAYERS
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise TypeError(f"n_gpu_layers {wanted!r}: neither a number nor auto nor all")
    return wanted


def count_layers(wanted: int, holding: Holding, no_gpu: str = NO_GPU) -> int:
    """The layers that a number stands for: at most all and the output.

    Args:
        wanted: -1 for all.
        holding: Of the pair.
        no_gpu: Why there is no device, where there is none.

    Raises:
        ValueError: Layers are wanted on a GPU, and there is none.
    """
    if wanted and not holding.devices:
        asked = ALL if wanted == _ALL_LAYERS else wanted
        why = f"{NO_GPU} can be used here; autoglm-gguf doctor tells why"
        raise ValueError(
            f"n_gpu_layers {asked}: {why if no_gpu == NO_GPU else no_gpu} "
            "(n_gpu_layers=0, or auto, runs on the CPU)"
        )
    most = holding.text.n_layers + 1
    return most if wanted < 0 else min(wanted, most)


def choose_layers(
    search: Search, budget_bytes: int | None, no_gpu: str = NO_GPU
) -> tuple[int, str]:
    """The most layers that fit the budget and the devices' free memory, and the reason.

    Layers go to a GPU only as far as the answers stay what they would be without it: neither n_ctx
    nor the image tokens shrink for it.

    Args:
        search: Over the pair, its ``first`` choice without layers on a GPU.
        budget_bytes: None for no bound.
        no_gpu: Why there is no device, where there is none.
    """
    holding = search.holding
    devices, n_layers = holding.devices, holding.text.n_layers
    if not devices:
        return 0, f"auto: {no_gpu}"
    names = ", ".join(device.name for device in devices)
    without = find_choice(search, budget_bytes)
    for n in range(n_layers + 1, 0, -1):
        choice = find_choice(search.with_layers(n), budget_bytes)
        if choice is None or (without is not None and _is_worse(holding, choice, without)):
            continue
        spare = spare_bytes(holding, choice, budget_bytes)
        if spare is None or spare >= margin_bytes(devices):
            which = "all" if n > n_layers else f"{n - 1} of {n_layers}"
            with_room = "" if spare is None else f", with {format_bytes(spare)} to spare"
            return n, f"auto: {which} layers and the output fit {names}{with_room}"
    short = "the memory budget" if budget_bytes is not None else "its free memory"
    return 0, f"auto: {short} leaves no room on {names}"


def find_choice(search: Search, budget_bytes: int | None) -> Choice | None:
    """What a search finds; without a budget its first choice."""
    return search.first if budget_bytes is None else search.find(budget_bytes)


def spare_bytes(holding: Holding, choice: Choice, budget_bytes: int | None) -> int | None:
    """What stays free on the devices; None where no driver tells."""
    if any(device.total_bytes == 0 for device in holding.devices):
        return None
    usable = UNBOUNDED if budget_bytes is None else usable_bytes(budget_bytes)
    items = [item for item in holding.items(choice, usable) if item.on_device]
    free = sum(device.free_bytes for device in holding.devices)
    return free - max(sum_phases(items).values())


def margin_bytes(devices: Sequence[Device]) -> int:
    """What ``auto`` leaves free on the devices."""
    return max(_MARGIN_BYTES, sum(device.total_bytes for device in devices) // _MARGIN_SHARE)


def _is_worse(holding: Holding, choice: Choice, without: Choice) -> bool:
    params, other = choice.params, without.params
    fewer = holding.image_tokens(params) < holding.image_tokens(other)
    return params.n_ctx < other.n_ctx or fewer
