"""What the installed llama.cpp says of itself, written to a file by a process of its own.

Loading a library that was built for another processor, or computing with a broken GPU driver, may
end the process. So the asking is done by a child, which writes down each step before it is taken.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autoglm_gguf.errors import NativeLibraryError
from autoglm_gguf.native.library import PINNED_VERSION

_PINNED = f"llama-cpp-python=={PINNED_VERSION}"
_COMPUTING = ("cpu", "gpu", "igpu")


def write_report(path: str) -> None:
    """Load the library, list what it has, and compute a little on each device that is real.

    Args:
        path: A JSON file, rewritten before each step. ``step``: what was being done when it was
            written (``loading``, a device's name, ``done``). ``error`` and ``hint``: why the
            library is no use. ``backends``, ``features``: as llama.cpp names them. ``devices``:
            `Device` as dictionaries, and under ``computes`` whether the device can.
    """
    report: dict[str, Any] = {"step": "loading"}
    _write(path, report)
    try:
        # numpy, which llama-cpp-python needs too, may be missing
        from autoglm_gguf.native.ggml import can_compute, list_backends, list_devices
        from autoglm_gguf.native.library import load_llama, load_mtmd

        load_mtmd()
        report["features"] = load_llama().llama_print_system_info().decode("utf-8", "replace")
    except NativeLibraryError as error:
        _write(path, {**report, "error": error.message, "hint": error.hint})
        return
    except ImportError as error:
        hint = f"pip install --force-reinstall {error.name or _PINNED}"
        text = f"llama-cpp-python: cannot be imported ({error})"
        _write(path, {**report, "error": text, "hint": hint})
        return
    report["backends"] = list_backends()
    devices = list_devices()
    report["devices"] = [{**asdict(device), "computes": None} for device in devices]
    for device, facts in zip(devices, report["devices"], strict=True):
        # Not a driver that computes on the CPU: its shaders compile for seconds, for nobody.
        if device.kind in _COMPUTING and not (device.is_gpu and device.is_software):
            _write(path, {**report, "step": device.name})
            facts["computes"] = can_compute(device.name)
    _write(path, {**report, "step": "done"})


def _write(path: str, report: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(report), "utf-8")
