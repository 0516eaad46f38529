"""A file mapped into this process, and how much of it is held, as Linux tells it."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@dataclass
class MappedFile:
    """A file of random bytes, mapped whole and read-only."""

    path: Path
    view: mmap.mmap
    descriptor: int

    @property
    def address(self) -> int:
        """Where it lies."""
        return int(np.frombuffer(self.view, np.uint8).ctypes.data)

    def touch(self) -> bytes:
        """Use every page; the first byte of each."""
        return np.frombuffer(self.view, np.uint8)[:: mmap.PAGESIZE].tobytes()

    def resident_bytes(self, start: int = 0, end: int | None = None) -> int:
        """How many bytes of a span (whole pages) this process holds."""
        pages = Path("/proc/self/pagemap")
        size = end if end is not None else len(self.view)
        with pages.open("rb") as file:
            file.seek((self.address + start) // mmap.PAGESIZE * 8)
            entries = np.frombuffer(file.read((size - start) // mmap.PAGESIZE * 8), np.uint64)
        return int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE

    def forget(self) -> None:
        """Take the file out of the page cache; skips the test where the file system keeps it."""
        os.fsync(self.descriptor)
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(len(self.view)), 4)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if self.is_cached(0, len(self.view), any):
            pytest.skip("this file system keeps its pages (tmpfs)")

    def is_cached(self, start: int, end: int, which: Callable[[Any], bool] = all) -> bool:
        """Whether a span's pages are in the page cache; asking reads none of them."""
        n_pages = -(-(end - start) // mmap.PAGESIZE)
        found = np.zeros(n_pages, np.uint8)
        libc = ctypes.CDLL(None)
        at = ctypes.c_void_p(self.address + start)
        assert (
            libc.mincore(at, ctypes.c_size_t(end - start), ctypes.c_void_p(found.ctypes.data)) == 0
        )
        return which(found & 1)


def nearly_all(pages: Any) -> bool:
    """Whether a span was read in: a system may take pages back at any time (DAMON)."""
    return bool(pages.mean() > 0.9)


@contextmanager
def open_mapped(path: Path, n_bytes: int) -> Iterator[MappedFile]:
    """Write and map a file of random bytes."""
    path.write_bytes(np.random.default_rng(0).bytes(n_bytes))
    descriptor = os.open(path, os.O_RDWR)
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as view:
        try:
            yield MappedFile(path, view, descriptor)
        finally:
            os.close(descriptor)


def resident_of(path: Path) -> int:
    """Bytes of a file that this process holds, in all its mappings."""
    text = Path("/proc/self/smaps").read_text()
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    mine = [block for block in blocks if block.split("\n")[0].endswith(str(path))]
    return sum(1024 * int(re.search(r"^Rss:\s+(\d+)", b, re.M)[1]) for b in mine)  # type: ignore[index]
