"""Layers on GPUs: how many, where everything lies, what is refused; devices described by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders import describe_sizes

from autoglm_gguf import ContextParams, DoesNotFitError, MemoryPlan
from autoglm_gguf.devices import MachineMemory, choose_devices, explain_no_gpu
from autoglm_gguf.memory.offload import parse_layers
from autoglm_gguf.memory.plan import plan_pair
from autoglm_gguf.native.ggml import Device

MB, GB = 10**6, 10**9
CPU = Device("CPU", "a CPU", "CPU", "cpu", 16 * GB, 16 * GB, maps_files=True)
CARD = Device("Vulkan0", "a card", "Vulkan", "gpu", 8 * GB, 8 * GB, maps_files=False)
METAL = Device("MTL0", "Apple M", "MTL", "gpu", 12 * GB, 12 * GB, maps_files=True)
CHIP = Device("Vulkan1", "in the CPU", "Vulkan", "igpu", 16 * GB, 8 * GB, maps_files=False)
LLVM = Device("Vulkan2", "llvmpipe (LLVM 15)", "Vulkan", "gpu", 16 * GB, 16 * GB, maps_files=False)
# 40 layers of 100 MB, 4 MB of output and of token embedding
SIZES: dict[str, Any] = {"layer_bytes": (100 * MB,) * 40, "tower_bytes": 0}


def plan(
    budget: int | None, device: Device = CARD, machine: MachineMemory | None = None, **given: Any
) -> MemoryPlan:
    found = (CPU, device)
    return plan_pair(
        describe_sizes(**SIZES),
        ContextParams(**given),
        budget,
        fixed=frozenset(given),
        machine=machine,
        devices=choose_devices(found),
        no_gpu=explain_no_gpu(found),
    )


def sizes(found: MemoryPlan) -> dict[str, int]:
    return {item.name: item.decode_bytes for item in found.items}


def reason(found: MemoryPlan) -> str:
    return next(d.reason for d in found.decisions if d.name == "n_gpu_layers")


# --- which device ---


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ((CPU,), ()),
        ((CPU, LLVM), ()),
        ((CPU, LLVM, CHIP), (CHIP,)),
        ((CHIP, CARD, CPU), (CARD,)),
        ((CARD, replace(CARD, name="Vulkan3"), METAL), (CARD, replace(CARD, name="Vulkan3"))),
    ],
)
def test_real_gpus_are_chosen_and_discrete_ones_first(found: Any, chosen: Any) -> None:
    assert choose_devices(found) == chosen


def test_software_driver_is_taken_by_name_only() -> None:
    assert choose_devices((CPU, LLVM), "vulkan2") == (LLVM,)
    assert choose_devices((CPU, LLVM, CARD), "Vulkan0, Vulkan2") == (CARD, LLVM)


def test_device_named_twice_is_taken_once() -> None:
    assert choose_devices((CPU, CARD, LLVM), "Vulkan0,vulkan0 , Vulkan2") == (CARD, LLVM)


def test_unknown_device_names_those_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"device 'CUDA0': not found \(found Vulkan2\)"):
        choose_devices((CPU, LLVM), "CUDA0")
    with pytest.raises(ValueError, match=r"found no GPU"):
        choose_devices((CPU,), "CPU")


# --- how many layers ---


def test_all_layers_go_where_there_is_room() -> None:
    found = plan(None)
    assert (found.context.n_gpu_layers, found.devices) == (41, ("Vulkan0",))
    assert reason(found).startswith("auto: all layers and the output fit Vulkan0, with ")
    assert any(note.startswith("n_gpu_layers: 41 (auto: all layers") for note in found.notes)
    assert sizes(found)["gpu_weights"] == 4004 * MB
    assert sizes(found)["weights"] == 4 * MB  # the token embedding is looked up on the CPU
    assert sizes(found)["kv_cache"] == 0


def test_auto_leaves_a_margin_on_the_device() -> None:
    found = plan(None, replace(CARD, free_bytes=3 * GB))
    n = found.context.n_gpu_layers
    assert 3 * GB - found.device_bytes >= 256 * 2**20
    assert reason(found).startswith(f"auto: {n - 1} of 40 layers and the output fit Vulkan0")
    more = plan(None, n_gpu_layers=n + 1)
    assert 3 * GB - more.device_bytes < 256 * 2**20


def test_auto_uses_the_cpu_alone_where_the_device_is_full() -> None:
    found = plan(None, replace(CARD, free_bytes=200 * MB))
    assert (found.context.n_gpu_layers, found.devices, found.device_bytes) == (0, (), 0)
    assert reason(found) == "auto: its free memory leaves no room on Vulkan0"


def test_auto_without_a_gpu_is_nothing_to_tell() -> None:
    found = plan(None, CPU)
    assert (found.context.n_gpu_layers, reason(found)) == (0, "auto: no GPU")
    assert not any("n_gpu_layers" in note for note in found.notes)


def test_auto_names_the_software_driver_that_it_leaves_alone() -> None:
    found = plan(None, LLVM)
    assert (found.context.n_gpu_layers, found.devices) == (0, ())
    assert reason(found) == (
        "auto: no GPU, and Vulkan2 (llvmpipe (LLVM 15)), which computes on the CPU, is used only "
        "when asked for: --device Vulkan2"
    )
    assert any(note.startswith("n_gpu_layers: 0 (auto: no GPU, and") for note in found.notes)


def test_budget_below_the_model_leaves_some_layers_off() -> None:
    found = plan(3 * GB)
    n = found.context.n_gpu_layers
    assert 1 < n < 41
    assert found.peak_bytes < 3 * GB
    assert found.weights == "streamed"
    assert found.places.streamed
    assert max(found.places.streamed) < 41 - n  # those on the device never pass through
    assert plan(2 * GB).context.n_gpu_layers < n


def test_mapped_file_in_use_by_a_gpu_is_not_streamed() -> None:
    assert plan(5 * GB, METAL).context.n_gpu_layers == 41
    found = plan(3 * GB, METAL)
    assert (found.context.n_gpu_layers, found.weights) == (0, "streamed")
    with pytest.raises(DoesNotFitError):
        plan(3 * GB, METAL, n_gpu_layers=20)


def test_kv_cache_stays_where_it_is_told_to() -> None:
    away, kept = plan(None), plan(None, offload_kqv=False)
    cache = sizes(away)["gpu_kv_cache"]
    assert cache == 4096 * 40 * 2 * 2 * 64 * 2  # cells, layers, K and V, heads, width, f16
    assert (sizes(kept)["gpu_kv_cache"], sizes(kept)["kv_cache"]) == (0, cache)


def test_half_of_the_layers_take_half_of_the_cache() -> None:
    found = plan(None, n_gpu_layers=21)
    assert sizes(found)["gpu_weights"] == 2004 * MB
    assert sizes(found)["weights"] == 2004 * MB
    assert sizes(found)["gpu_kv_cache"] == sizes(found)["kv_cache"]


@pytest.mark.parametrize(
    ("device", "given", "on_device"),
    [
        (CARD, {}, False),
        (CARD, {"mmproj_offload": True}, True),
        (METAL, {}, True),
        (METAL, {"mmproj_offload": False}, False),
        (METAL, {"n_gpu_layers": 0, "mmproj_offload": True}, False),
    ],
)
def test_tower_stays_off_vulkan_unless_asked_for(
    device: Device, given: dict[str, Any], on_device: bool
) -> None:
    described = describe_sizes(tower_bytes=40 * MB)
    fixed = frozenset(given)
    found = plan_pair(described, ContextParams(**given), None, fixed=fixed, devices=(device,))
    tower = next(item for item in found.items if item.name == "tower")
    assert found.tower_on_device == tower.on_device == on_device


# --- what is asked for ---


def test_number_is_kept_and_all_means_all() -> None:
    assert plan(None, n_gpu_layers=7).context.n_gpu_layers == 7
    assert reason(plan(None, n_gpu_layers=7)) == "given"
    assert plan(None, n_gpu_layers=-1).context.n_gpu_layers == 41
    assert [parse_layers(text) for text in ("auto", None, "all", 7)] == [None, None, -1, 7]


@pytest.mark.parametrize("wanted", ["some", 1.5, True])
def test_nonsense_for_layers_is_refused(wanted: object) -> None:
    with pytest.raises(TypeError, match="neither a number nor auto nor all"):
        parse_layers(wanted)


def test_layers_for_a_gpu_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="n_gpu_layers 4: no GPU can be used here; autoglm-gguf d"):
        plan(None, CPU, n_gpu_layers=4)
    with pytest.raises(ValueError, match=r"n_gpu_layers 4: no GPU, and Vulkan2 .*--device Vulkan2"):
        plan(None, LLVM, n_gpu_layers=4)


def test_all_layers_are_called_all_where_there_is_no_gpu() -> None:
    with pytest.raises(ValueError, match="n_gpu_layers all: no GPU can be used here"):
        plan(None, CPU, n_gpu_layers=parse_layers("all"))


def test_more_than_the_device_has_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(DoesNotFitError, match=r"GB on Vulkan0, which has 1\.00 GB free") as caught:
        plan(None, replace(CARD, free_bytes=GB), n_gpu_layers=41)
    assert caught.value.hint == "--n-gpu-layers auto puts there what fits"


def test_shared_memory_is_counted_once() -> None:
    machine = MachineMemory(8 * GB, 3 * GB, "machine")
    assert plan(None, CARD, machine).device_bytes > 4 * GB  # on the card's own memory
    with pytest.raises(DoesNotFitError, match=r"this machine has 3\.00 GB free"):
        plan(None, CHIP, machine)
