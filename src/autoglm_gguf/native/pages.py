"""Pages of a mapped file: where it lies, giving its pages back, reading them ahead.

Knows addresses and byte spans; knows nothing of tensors. Linux and macOS; elsewhere `SUPPORTED` is
False and nothing here may be called. The macOS half follows Apple's documented interfaces and has
not been run.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LINUX = ("linux", "android")
"""What ``sys.platform`` may be on Linux: Termux's Python 3.13 says android (PEP 738)."""
IS_LINUX = sys.platform in LINUX
IS_MACOS = sys.platform == "darwin"
SUPPORTED = IS_LINUX or IS_MACOS
_PART_BYTES = 4 << 20
# How far around a fault a system with read-ahead windows of 8 MB reads.
_HEAD_BYTES, _TAIL_BYTES = 4 << 20, 16 << 20
_local = threading.local()  # a read buffer for each thread
_MADV_NORMAL, _MADV_RANDOM, _MADV_DONTNEED = 0, 1, 4  # the same numbers on Linux and macOS
_MADV_POPULATE_READ = 22  # Linux 5.14
_MAP_FIXED, _MAP_SHARED, _PROT_READ = 0x10, 0x01, 0x01  # the same on both


@dataclass(frozen=True, slots=True)
class Mapping:
    """A stretch of a file in this process's memory."""

    address: int
    n_bytes: int
    offset: int
    """File offset of ``address``."""


def find_mappings(path: Path) -> list[Mapping]:
    """Where a file is mapped into this process; empty if it is not."""
    wanted = os.path.realpath(path)
    return _linux_mappings(wanted) if IS_LINUX else _macos_mappings(wanted)


def _linux_mappings(wanted: str) -> list[Mapping]:
    """By path, or by inode where the kernel shows another path (bind mounts, renamed files)."""
    inode = str(Path(wanted).stat().st_ino)
    found: list[Mapping] = []
    for line in Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines():
        fields = line.split(None, 5)
        if len(fields) < 6:
            continue
        if fields[5] == wanted or (
            fields[4] == inode and Path(fields[5]).name == Path(wanted).name
        ):
            first, _, last = fields[0].partition("-")
            address = int(first, 16)
            found.append(Mapping(address, int(last, 16) - address, int(fields[2], 16)))
    return found


def drop_pages(mapping: Mapping, start: int, end: int, descriptor: int) -> None:
    """Take the whole pages within file bytes ``start`` to ``end`` out of this process.

    They stay in the system's page cache as far as it likes; a later use maps them again. The span
    is rounded inward: a page shared with a neighbour is the neighbour's.

    Args:
        mapping: Holds the span, or part of it.
        start: First file byte.
        end: File byte after the last.
        descriptor: The open file (macOS maps it anew).
    """
    first, last = _whole_pages(mapping, start, end)
    if first >= last:
        return
    if IS_LINUX:
        _libc().madvise(first, last - first, _MADV_DONTNEED)
        return
    # macOS keeps pages resident after madvise; mapping the span anew lets go of them.
    offset = first - mapping.address + mapping.offset
    _libc().mmap(first, last - first, _PROT_READ, _MAP_SHARED | _MAP_FIXED, descriptor, offset)


def expect_scattered_reads(mapping: Mapping, start: int, end: int) -> None:
    """Let a fault within file bytes ``start`` to ``end`` read its own page, not those around it."""
    first, last = _whole_pages(mapping, start, end)
    if first < last:
        _libc().madvise(first, last - first, _MADV_RANDOM)


def expect_any_reads(mapping: Mapping) -> None:
    """Let the system judge by itself how far to read ahead of a fault."""
    _libc().madvise(mapping.address, mapping.n_bytes, _MADV_NORMAL)


def _whole_pages(mapping: Mapping, start: int, end: int) -> tuple[int, int]:
    """Addresses of the whole pages of a span of file bytes that lie in a mapping."""
    first = max(start, mapping.offset) - mapping.offset + mapping.address
    last = min(end, mapping.offset + mapping.n_bytes) - mapping.offset + mapping.address
    return -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE


def forget_cached(descriptor: int, start: int, end: int) -> None:
    """Let the page cache drop file bytes that no process maps any more (Linux only)."""
    if IS_LINUX:
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def forget_file(path: Path) -> None:
    """Let the page cache drop a file that no process maps (Linux only)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        forget_cached(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def read_exactly_what_is_asked(descriptor: int) -> None:
    """Switch the system's own read-ahead off for a descriptor (Linux only)."""
    if IS_LINUX:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def read_in(
    mapping: Mapping | None, descriptor: int, start: int, end: int, stopped: Callable[[], bool]
) -> None:
    """Read file bytes before they are used; what is in the page cache already costs nothing.

    All is faulted in at once, which lets the system read far ahead with large requests and little
    work (three times as fast as part by part, beside a computation). The edges are asked for
    exactly, and beforehand, so that its reading ahead ends within the span.

    Args:
        mapping: Holds the span; None reads into the page cache only, and everything anew.
        descriptor: The open file, set to `read_exactly_what_is_asked`.
        start: First byte.
        end: Byte after the last.
        stopped: Asked now and then; True ends the reading.
    """
    asks = mapping if mapping is not None and _may_ask(descriptor) else None
    if stopped() or (asks is not None and _is_cached(asks, start, end)):
        return
    if mapping is not None and IS_LINUX:
        inner = (min(start + _HEAD_BYTES, end), max(start, end - _TAIL_BYTES))
        _request(descriptor, start, inner[0])
        _request(descriptor, inner[1], end)
        done = inner[0] >= inner[1] or _populate(mapping, *inner)
        if done and _populate(mapping, start, inner[0]) and _populate(mapping, inner[1], end):
            return
    for at in range(start, end, _PART_BYTES):
        if stopped():
            return
        last = min(at + _PART_BYTES, end)
        if asks is None or not _is_cached(asks, at, last):
            os.preadv(descriptor, [_buffer()[: last - at]], at)


def _request(descriptor: int, start: int, end: int) -> None:
    """Let Linux begin to read a span; returns before it is there."""
    for at in range(start, end, _PART_BYTES):
        n_bytes = min(_PART_BYTES, end - at)
        os.posix_fadvise(descriptor, at, n_bytes, os.POSIX_FADV_WILLNEED)


def _populate(mapping: Mapping, start: int, end: int) -> bool:
    """Fault a span in; False where the system cannot (Linux before 5.14)."""
    first, last = _whole_pages(mapping, start, end)
    return first >= last or _libc().madvise(first, last - first, _MADV_POPULATE_READ) == 0


def _buffer() -> memoryview:
    buffer: memoryview | None = getattr(_local, "buffer", None)
    if buffer is None:
        buffer = _local.buffer = memoryview(bytearray(_PART_BYTES))
    return buffer


def _is_cached(mapping: Mapping, start: int, end: int) -> bool:
    """Whether all whole pages of a span are in the page cache; only where `_may_ask`.

    mincore reads nothing. Reading a page without waiting (RWF_NOWAIT) does: a fast disk has it
    there before the answer, and every page seems cached.
    """
    first, last = _whole_pages(mapping, start, end)
    found = ctypes.create_string_buffer(max(0, last - first) // mmap.PAGESIZE)
    done = first < last and _libc().mincore(first, last - first, found) == 0
    return done and b"\0" not in found.raw


def _may_ask(descriptor: int) -> bool:
    """Whether mincore tells the truth: of a file that it may not write, it calls all cached."""
    if not IS_LINUX:
        return False
    owner = os.fstat(descriptor).st_uid
    return os.geteuid() in (0, owner) or os.access(f"/proc/self/fd/{descriptor}", os.W_OK)


def return_free_memory() -> None:
    """Give the C heap's free pages back to the system, where it can be asked to (glibc)."""
    if IS_LINUX:
        trim = getattr(_libc(), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


_BASIC_INFO_64, _BASIC_INFO_WORDS = 9, 9  # <mach/vm_region.h>
_MAX_PATH_BYTES = 4096


def _macos_mappings(wanted: str) -> list[Mapping]:
    """Walk this task's regions and ask for the file behind each."""
    libc = _libc()
    task = ctypes.c_uint32.in_dll(libc, "mach_task_self_")
    address, size = ctypes.c_uint64(0), ctypes.c_uint64(0)
    found: list[Mapping] = []
    name = ctypes.create_string_buffer(_MAX_PATH_BYTES)
    while True:
        info = (ctypes.c_int32 * _BASIC_INFO_WORDS)()
        n_words = ctypes.c_uint32(_BASIC_INFO_WORDS)
        port = ctypes.c_uint32()
        status = libc.mach_vm_region(
            task,
            ctypes.byref(address),
            ctypes.byref(size),
            _BASIC_INFO_64,
            info,
            ctypes.byref(n_words),
            ctypes.byref(port),
        )
        if status != 0:
            return found
        n = libc.proc_regionfilename(os.getpid(), address, name, _MAX_PATH_BYTES)
        if n > 0 and os.fsdecode(name.value) == wanted:
            offset = int(ctypes.c_uint64.from_buffer(info, 20).value)  # vm_region_basic_info_64
            found.append(Mapping(address.value, size.value, offset))
        address.value += size.value


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    libc.madvise.argtypes = (pointer, size, ctypes.c_int)
    libc.mincore.argtypes = (pointer, size, ctypes.c_char_p)
    libc.mmap.restype = pointer
    libc.mmap.argtypes = (pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    if IS_MACOS:
        libc.proc_regionfilename.argtypes = (
            ctypes.c_int,
            ctypes.c_uint64,
            pointer,
            ctypes.c_uint32,
        )
    return libc
