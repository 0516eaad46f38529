"""Loads the pinned llama-cpp-python once, checks it, and turns its logs into ``logging`` records.

Knows the version whose struct layouts the bindings describe. Does not know models or files.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

from autoglm_gguf.errors import EngineError, NativeLibraryError
from autoglm_gguf.stopping import StopFlag

PINNED_VERSION = "0.3.36"
LLAMA_CPP_COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"

logger = logging.getLogger("autoglm_gguf.llama_cpp")
logger.addHandler(logging.NullHandler())  # quiet unless the application configures logging
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT: the rest of the line before
_KEPT_LINES = 8
_last_errors: deque[str] = deque(maxlen=_KEPT_LINES)
_last_level = logging.DEBUG
_BUFFER_LINE = re.compile(r"(\S+) +(model|KV|compute|output) buffer size += +([\d.]+) MiB")
_OWN_LIBRARY = re.compile(r"lib(llama|ggml|mtmd)")
# What glibc's and musl's loaders say of a library that is not there.
_MISSING_LIBRARY = re.compile(
    r"([\w.+-]+\.so[.\w]*): cannot open shared object|Error loading shared library ([\w.+-]+):"
)
_DEBIAN_PACKAGES = {
    "libgomp.so.1": "libgomp1",
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
    "libopenblas.so.0": "libopenblas0",
    "libvulkan.so.1": "libvulkan1",
}
_reports: list[dict[tuple[str, str], int]] = []
_lock = threading.Lock()
_thread = threading.local()


@cache
def load_llama() -> ModuleType:
    """Return llama-cpp-python's low-level module, initialised and with its logs redirected.

    Raises:
        NativeLibraryError: Not installed, not loadable, or another version than the pinned one.
    """
    llama = _import("llama_cpp.llama_cpp")
    found = str(getattr(importlib.import_module("llama_cpp"), "__version__", "unknown"))
    if found != PINNED_VERSION:
        raise NativeLibraryError(
            f"llama-cpp-python: wrong version (found {found}, required {PINNED_VERSION})",
            hint=f"pip install llama-cpp-python=={PINNED_VERSION}",
        )
    _check_layout(llama)
    llama.llama_log_set(_callback(llama), ctypes.c_void_p(0))
    llama.llama_backend_init()
    return llama


@cache
def load_mtmd() -> ModuleType:
    """Return llama-cpp-python's multimodal module, its logs redirected.

    Raises:
        NativeLibraryError: See `load_llama`.
    """
    llama = load_llama()
    mtmd = _import("llama_cpp.mtmd_cpp")
    mtmd.mtmd_log_set(_callback(llama), ctypes.c_void_p(0))
    mtmd.mtmd_helper_log_set(_callback(llama), ctypes.c_void_p(0))
    return mtmd


@cache
def load_ggml() -> ctypes.CDLL:
    """Return ggml's shared library (types, quantisation kernels, backends).

    Raises:
        NativeLibraryError: See `load_llama`.
    """
    load_llama()
    library: ctypes.CDLL = _import("llama_cpp._ggml").libggml
    return library


def string_length() -> int:
    """Address of libc's ``strlen``: as a callback it reads a `StopFlag` without Python."""
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return int(ctypes.cast(libc.strlen, ctypes.c_void_p).value or 0)


@contextlib.contextmanager
def buffer_report() -> Iterator[dict[tuple[str, str], int]]:
    """Collect what ggml says it allocates inside the ``with`` block.

    Yields:
        ``(buffer, use)``, for example ``("Vulkan0", "compute")``, to bytes, as lines arrive. Uses
        are model, KV, compute and output; sizes are printed to a hundredth of a MiB.
    """
    found: dict[tuple[str, str], int] = {}
    _reports.append(found)
    try:
        yield found
    finally:
        _reports.remove(found)


def clear_errors(stop: StopFlag | None = None) -> None:
    """Forget the error lines seen so far; call before an operation that may fail.

    Args:
        stop: What llama.cpp says in this thread once it is set is no error: it was ended early.
    """
    _thread.stop = stop
    with _lock:
        _last_errors.clear()


def engine_error(what: str, *, hint: str = "") -> EngineError:
    """Build an error whose message ends with llama.cpp's last error lines."""
    with _lock:
        lines = [line for line in _last_errors if line]
    detail = f" (llama.cpp: {' | '.join(lines[-3:])})" if lines else ""
    return EngineError(f"{what}{detail}", hint=hint)


def _import(name: str) -> ModuleType:
    try:
        with _android_as_linux():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != "llama_cpp":
            raise NativeLibraryError(
                f"llama-cpp-python: cannot be imported (it needs {error.name}, not installed)",
                hint=f"pip install {error.name}",
            ) from error
        raise NativeLibraryError(
            f"llama-cpp-python: not installed ({error})",
            hint=f"pip install llama-cpp-python=={PINNED_VERSION} (needs a C++ compiler and cmake)",
        ) from error
    except (OSError, RuntimeError, AttributeError, ImportError) as error:
        raise _loading_error(str(error)) from error


def _loading_error(reason: str) -> NativeLibraryError:
    """What the system's loader said, in words that name what to install."""
    match = _MISSING_LIBRARY.search(reason)
    missing = "" if match is None else match[1] or match[2]
    if not missing or _OWN_LIBRARY.match(missing):
        return NativeLibraryError(
            f"llama-cpp-python: its library cannot be loaded ({reason})",
            hint=f"pip install --force-reinstall --no-cache-dir llama-cpp-python=={PINNED_VERSION}",
        )
    package = _DEBIAN_PACKAGES.get(missing)
    return NativeLibraryError(
        f"llama-cpp-python: its library cannot be loaded (it needs {missing}, which this system "
        "lacks)",
        hint=f"Debian/Ubuntu: sudo apt-get install -y {package}; elsewhere, what has {missing}"
        if package
        else f"install the package that has {missing}, or rebuild without it: pip install "
        f"--force-reinstall --no-cache-dir llama-cpp-python=={PINNED_VERSION}",
    )


@contextlib.contextmanager
def _android_as_linux() -> Iterator[None]:
    """Let llama-cpp-python load on Android as it does on Linux.

    Its loader knows Linux's file names and refuses the platform that Python 3.13 calls "android"
    ("Unsupported platform"), though the names are the same.
    """
    if sys.platform != "android":
        yield
        return
    sys.platform = "linux"
    try:
        yield
    finally:
        sys.platform = "android"


def _check_layout(llama: ModuleType) -> None:
    """Compare the library's defaults with what the header promises: a shifted struct shows here."""
    params = llama.llama_context_default_params()
    found = (params.n_batch, params.n_ubatch, params.type_k, params.type_v, params.n_seq_max)
    required = (2048, 512, llama.GGML_TYPE_F16, llama.GGML_TYPE_F16, 1)
    if found != required:
        raise NativeLibraryError(
            f"llama.cpp: llama_context_params has another layout (found {found}, "
            f"required {required})",
            hint=f"pip install --force-reinstall llama-cpp-python=={PINNED_VERSION}",
        )


@cache
def _callback(llama: ModuleType) -> Any:
    return llama.llama_log_callback(_on_log)  # kept alive by the cache: C holds the pointer


def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    global _last_level
    line = text.decode("utf-8", "replace").rstrip("\n")
    if level != _CONTINUED:
        _last_level = _LEVELS.get(level, logging.DEBUG)
    stop = getattr(_thread, "stop", None)
    if stop is not None and stop.is_set():
        _last_level = logging.INFO
    if _last_level >= logging.ERROR and line:
        with _lock:
            _last_errors.append(line.strip())
    if _reports and (match := _BUFFER_LINE.search(line)):
        key, n_bytes = (match[1], match[2]), round(float(match[3]) * 2**20)
        for report in _reports:
            report[key] = report.get(key, 0) + n_bytes
    if line:
        # Quiet by default: llama.cpp's info is our debug, its warnings our info.
        logger.log(_last_level if _last_level >= logging.ERROR else _last_level - 10, "%s", line)
