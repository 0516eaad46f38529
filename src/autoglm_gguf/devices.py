"""What this machine has. The only prober; knows nothing of models."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from autoglm_gguf.native.pages import LINUX
from autoglm_gguf.programs import ask_program, find_program

if TYPE_CHECKING:
    from autoglm_gguf.native.ggml import Device

_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/proc/self/cgroup")
_CGROUP = Path("/sys/fs/cgroup")
_RENDERERS = Path("/sys/class/drm")
_VULKAN_DRIVERS = ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d")
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}  # PCI vendor ids
NO_GPU = "no GPU"
_NO_LIMIT = 2**60  # cgroup v1 writes a number near 2**63 where there is no limit


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """Main memory, as this process may use it."""

    total_bytes: int
    available_bytes: int
    """What can still be taken without swapping, file pages that can be dropped included."""
    limit: str
    """Who sets the bound: ``machine`` or ``cgroup``."""


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of this machine, whether or not anything here can drive it."""

    vendor: str
    """``NVIDIA``, ``AMD``, ``Intel``, ``Apple``; empty where the system does not tell."""
    name: str


def probe_memory() -> MachineMemory | None:
    """Memory of the machine or of this process's control group, whichever is tighter.

    Returns:
        None where the system does not say (no /proc, and psutil is not installed).
    """
    return min(probe_bounds(), key=lambda memory: memory.available_bytes, default=None)


def probe_bounds() -> tuple[MachineMemory, ...]:
    """Memory of the machine, then of the control group if that has a limit; what is known."""
    linux = sys.platform in LINUX
    machine = _linux_memory() if linux else _other_memory()
    group = _cgroup_memory() if linux and machine is not None else None
    return tuple(memory for memory in (machine, group) if memory is not None)


def probe_gpus() -> tuple[Gpu, ...]:
    """What GPUs the system shows, asked without ggml.

    Covers Apple Silicon, NVIDIA's driver (``nvidia-smi``), PCI GPUs that Linux can render with, and
    Windows where a graphics driver brought Vulkan. Display chips of servers and virtual machines
    have no render node and are not counted. GPUs of ARM boards and phones are not found.
    """
    if sys.platform == "darwin":
        # Under Rosetta the machine is x86_64, but the kernel's version still tells.
        apple = platform.machine() == "arm64" or "ARM64" in platform.version()
        return (Gpu("Apple", "Apple GPU"),) if apple else ()
    found = _nvidia_gpus()
    if sys.platform == "win32":
        loader = Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "vulkan-1.dll"
        return found or ((Gpu("", "a GPU with a Vulkan driver"),) if loader.exists() else ())
    for node in sorted(_RENDERERS.glob("renderD*")):
        try:
            vendor = _VENDORS.get((node / "device" / "vendor").read_text().strip())
        except OSError:
            continue
        if vendor and (vendor, bool(found)) != ("NVIDIA", True):
            found += (Gpu(vendor, f"{vendor} GPU"),)
    return found


def vulkan_drivers() -> tuple[str, ...]:
    """Names of the installed Vulkan drivers of Linux, without Mesa's for the CPU."""
    given = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES")
    if given:
        files = [Path(name) for name in given.split(os.pathsep)]
    else:
        files = [path for folder in _VULKAN_DRIVERS for path in Path(folder).glob("*.json")]
    return tuple(sorted({path.stem for path in files if not path.stem.startswith("lvp")}))


def _nvidia_gpus() -> tuple[Gpu, ...]:
    """``GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-...)`` and so on."""
    program = find_program("nvidia-smi")
    answer = ask_program([program, "-L"]) if program else None
    if answer is None or answer.code != 0:
        return ()
    names = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", answer.text, re.MULTILINE)
    return tuple(Gpu("NVIDIA", name) for name in names)


@cache
def probe_devices() -> tuple[Device, ...]:
    """Every device that the installed ggml can drive, the CPU included.

    Free memory is as it was when this was first asked: drivers count what this process takes.

    Raises:
        NativeLibraryError: llama-cpp-python is missing or not the pinned version.
    """
    from autoglm_gguf.native.ggml import list_devices

    return tuple(list_devices())


def choose_devices(found: Sequence[Device], wanted: str | None = None) -> tuple[Device, ...]:
    """The GPUs that layers go to; empty where there is none.

    Args:
        found: As `probe_devices` gives them.
        wanted: A name, or several with commas; None takes the discrete GPUs of the first backend
            that has one, else its first integrated one. Drivers that compute on the CPU are taken
            only by name.

    Raises:
        ValueError: A name that is not there, or is no GPU.
    """
    if wanted is not None:
        return tuple(dict.fromkeys(_named(found, name.strip()) for name in wanted.split(",")))
    real = [device for device in found if device.is_gpu and not device.is_software]
    discrete = [device for device in real if device.kind == "gpu"]
    return tuple(d for d in discrete if d.backend == discrete[0].backend) or tuple(real[:1])


def explain_no_gpu(found: Sequence[Device]) -> str:
    """Why `choose_devices` takes none: no GPU is there, or only one that waits to be asked for.

    Returns:
        A clause, without a name for what it explains.
    """
    software = next((device for device in found if device.is_gpu and device.is_software), None)
    if software is None:
        return NO_GPU
    return (
        f"{NO_GPU}, and {software.name} ({software.description}), which computes on the CPU, "
        f"is used only when asked for: --device {software.name}"
    )


def _named(found: Sequence[Device], name: str) -> Device:
    for device in found:
        if device.name.lower() == name.lower() and device.is_gpu:
            return device
    gpus = ", ".join(device.name for device in found if device.is_gpu) or "no GPU"
    raise ValueError(f"device {name!r}: not found (found {gpus}); autoglm-gguf doctor tells why")


def _linux_memory() -> MachineMemory | None:
    found: dict[str, int] = {}
    try:
        for line in _MEMINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if value.endswith("kB"):
                found[key] = int(value.split()[0]) * 1024
    except (OSError, ValueError):
        return None
    if "MemTotal" not in found or "MemAvailable" not in found:
        return None
    return MachineMemory(found["MemTotal"], found["MemAvailable"], "machine")


def _other_memory() -> MachineMemory | None:
    try:
        import psutil
    except ImportError:
        return None
    memory = psutil.virtual_memory()
    return MachineMemory(memory.total, memory.available, "machine")


def _cgroup_memory() -> MachineMemory | None:
    """The tightest limit on the way up from this process's group; version 2, else version 1."""
    try:
        groups = _GROUPS.read_text().splitlines()
    except OSError:
        return None
    found: list[MachineMemory] = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = _CGROUP, ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            root = _CGROUP / "memory"
            files = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
                "total_active_file",
            )
        else:
            continue
        level = root / path.lstrip("/")
        while True:
            memory = _read_group(level, *files)
            if memory is not None:
                found.append(memory)
            if level == root or root not in level.parents:
                break
            level = level.parent
    return min(found, key=lambda memory: memory.available_bytes) if found else None


def _read_group(level: Path, limit: str, usage: str, *caches: str) -> MachineMemory | None:
    try:
        most = int((level / limit).read_text())  # "max" where there is no limit: ValueError
        used = int((level / usage).read_text())
        stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if most >= _NO_LIMIT:
        return None
    dropped = sum(int(stat.get(key, 0)) for key in caches)
    return MachineMemory(most, max(0, most - used + dropped), "cgroup")
