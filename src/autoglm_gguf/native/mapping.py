"""Lets llama.cpp map a file without touching its pages.

llama.cpp maps a model with all its pages at once (MAP_POPULATE), which takes a cached file into the
process within milliseconds, whatever the budget; nothing can look at that often enough. Where a
machine has several memory nodes it maps without, and leaves the pages to their first use. Whether
there are several it asks the CPU backend's registry entry; `without_populating` answers for it.
Knows that entry's layout and nothing of files.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import cache

from autoglm_gguf.errors import NativeLibraryError
from autoglm_gguf.native.ggml import cpu_registry, find_in_cpu_backend
from autoglm_gguf.native.library import PINNED_VERSION

_QUESTION = b"ggml_backend_cpu_is_numa"
_API_VERSION = 2  # GGML_BACKEND_API_VERSION
_ANSWER = ctypes.CFUNCTYPE(ctypes.c_bool)
_FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_lock = threading.Lock()


class _Registry(ctypes.Structure):
    """ggml-backend-impl.h, ``struct ggml_backend_reg``."""

    _fields_ = (
        ("api_version", ctypes.c_int),
        ("get_name", ctypes.c_void_p),
        ("get_device_count", ctypes.c_void_p),
        ("get_device", ctypes.c_void_p),
        ("get_proc_address", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


@contextlib.contextmanager
def without_populating() -> Iterator[None]:
    """Inside the ``with`` block llama.cpp maps files page by page, one block at a time.

    The mapping expects scattered reads then; see `expect_any_reads` in ``pages``.

    Raises:
        NativeLibraryError: The registry entry has another layout than the pinned version's.
    """
    entry = _entry()
    with _lock:
        found = entry.get_proc_address
        find = _FIND(found)

        def answer_or_find(registry: int, name: bytes) -> int | None:
            return _yes_address() if name == _QUESTION else find(registry, name)

        hook = _FIND(answer_or_find)
        entry.get_proc_address = ctypes.cast(hook, ctypes.c_void_p).value
        try:
            yield
        finally:
            entry.get_proc_address = found


@cache
def _entry() -> _Registry:
    registry = cpu_registry()
    entry = ctypes.cast(registry, ctypes.POINTER(_Registry)).contents
    told = find_in_cpu_backend(_QUESTION)
    known = entry.api_version == _API_VERSION and told and entry.get_proc_address
    if not known or _FIND(entry.get_proc_address)(registry, _QUESTION) != told:
        raise NativeLibraryError(
            "ggml: ggml_backend_reg has another layout, so a load cannot be kept small",
            hint=f"pip install --force-reinstall llama-cpp-python=={PINNED_VERSION}",
        )
    return entry


_yes = _ANSWER(lambda: True)


def _yes_address() -> int | None:
    return ctypes.cast(_yes, ctypes.c_void_p).value
