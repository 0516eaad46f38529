"""What this process really holds: the figures that stand beside a plan.

Linux counts in /proc; macOS in task_info, phys_footprint and resident file pages, whose sum is what
the budget is for; Windows in working sets, through psutil. The macOS and Windows halves follow the
documented interfaces and have not been run. Device buffers are the engine's to report.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from autoglm_gguf.native.pages import LINUX

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets VmHWM to the present resident set


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Bytes held by this process."""

    anonymous_bytes: int
    """Allocated: on macOS the phys_footprint, on Windows the private bytes."""
    mapped_bytes: int
    """Resident pages of files: mapped weights, libraries."""
    peak_bytes: int
    """Most of all together since the start of the process, or since `reset_peak`."""
    device_bytes: int = 0
    """Buffers on devices with memory of their own."""

    @property
    def total_bytes(self) -> int:
        """What a budget is for."""
        return self.anonymous_bytes + self.mapped_bytes + self.device_bytes


def measure_memory() -> MemoryUsage | None:
    """What this process holds now and has held at most.

    Returns:
        None where the system does not say.
    """
    if sys.platform in LINUX:
        return _linux()
    if sys.platform == "darwin":
        return _macos()
    return _psutil()


def reset_peak() -> bool:
    """Let ``peak_bytes`` count from now on; False where the system cannot (all but Linux)."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _linux() -> MemoryUsage | None:
    found: dict[str, int] = {}
    try:
        for line in _STATUS.read_text().splitlines():
            key, _, value = line.partition(":")
            if value.endswith("kB"):
                found[key] = int(value.split()[0]) * 1024
    except (OSError, ValueError):
        return None
    if "RssAnon" not in found:
        return None
    mapped = found.get("RssFile", 0) + found.get("RssShmem", 0)
    return MemoryUsage(found["RssAnon"], mapped, found.get("VmHWM", found["RssAnon"] + mapped))


# <mach/task_info.h>, task_vm_info_data_t up to ledger fields; offsets in bytes
_TASK_VM_INFO = 22
_TASK_VM_INFO_WORDS = 93
_EXTERNAL, _EXTERNAL_PEAK, _FOOTPRINT, _FOOTPRINT_PEAK = 64, 72, 144, 168


def _macos() -> MemoryUsage | None:
    libc = ctypes.CDLL(None)
    task = ctypes.c_uint32.in_dll(libc, "mach_task_self_")
    info = (ctypes.c_int32 * _TASK_VM_INFO_WORDS)()
    n_words = ctypes.c_uint32(_TASK_VM_INFO_WORDS)
    if libc.task_info(task, _TASK_VM_INFO, info, ctypes.byref(n_words)) != 0:
        return None
    raw = bytes(info)
    known = 4 * n_words.value

    def at(offset: int) -> int:
        return int(struct.unpack_from("<Q", raw, offset)[0]) if offset + 8 <= known else 0

    footprint, external = at(_FOOTPRINT), at(_EXTERNAL)
    # Both peaks may not have come together: their sum is an upper bound.
    peak = max(at(_FOOTPRINT_PEAK), footprint) + max(at(_EXTERNAL_PEAK), external)
    return MemoryUsage(footprint, external, peak)


def _psutil() -> MemoryUsage | None:
    try:
        import psutil
    except ImportError:
        return None
    memory = psutil.Process().memory_info()
    private = int(getattr(memory, "private", memory.rss))
    resident = int(memory.rss)
    peak = int(getattr(memory, "peak_wset", resident))
    return MemoryUsage(private, max(0, resident - private), max(peak, private))
