"""llama-cpp-python: its version, whether it loads and computes, what it was built for, its devices.

The library is loaded by a child process (`native.report`), so that one which ends the process is
told like any other. What is said of macOS and Windows follows llama.cpp's sources and has not been
run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoglm_gguf.devices import choose_devices, probe_gpus, vulkan_drivers
from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.doctor.installation import LLAMA
from autoglm_gguf.native.library import LLAMA_CPP_COMMIT, PINNED_VERSION
from autoglm_gguf.native.pages import LINUX
from autoglm_gguf.programs import Answer, ask_program, find_program, install_command
from autoglm_gguf.units import format_bytes

if TYPE_CHECKING:
    from autoglm_gguf.native.ggml import Device

_SECONDS = 120  # a GPU driver may compile shaders the first time
_ASK = "import sys; from autoglm_gguf.native.report import write_report; write_report(sys.argv[1])"
_ILLEGAL = (-getattr(signal, "SIGILL", 4), 0xC000001D)  # POSIX; Windows' STATUS_ILLEGAL_INSTRUCTION
_NO_GPU = ("CPU", "BLAS", "RPC")  # backends that drive none
_FLAGS = {"Metal": "-DGGML_METAL=on", "CUDA": "-DGGML_CUDA=on", "Vulkan": "-DGGML_VULKAN=on"}
_INSTALL = f"pip install {LLAMA}=={PINNED_VERSION}"


@dataclass(frozen=True, slots=True)
class LibraryReport:
    """What the child wrote, and how it ended."""

    facts: dict[str, Any]
    """As `native.report.write_report` has them; empty if it wrote nothing."""
    answer: Answer | None
    """None if the child could not be started."""

    @property
    def devices(self) -> list[Device]:
        """What ggml listed."""
        # It imports numpy: only where the library, which needs that too, was found to load.
        from autoglm_gguf.native.ggml import Device

        return [
            Device(**{key: value for key, value in facts.items() if key != "computes"})
            for facts in self.facts["devices"]
        ]

    @property
    def step(self) -> str:
        """What the child was doing last; ``done`` if it came to its end."""
        return str(self.facts.get("step", "starting"))

    @property
    def ending(self) -> str:
        """Why the child did not come to its end; empty if it did."""
        if self.step == "done" or "error" in self.facts:
            return ""
        if self.answer is None:
            return "Python cannot be started"
        code = self.answer.code
        if code is None:
            return f"no end after {_SECONDS} s"
        if code in _ILLEGAL:
            return "it uses instructions that this processor lacks: built for another one"
        if code < 0:
            return f"it ended the process: {signal.strsignal(-code) or 'signal'} ({-code})"
        said = "".join(f": {line}" for line in self.answer.lines[-1:])
        return f"it ended the process, exit code {code}{said}"


def check_library() -> Iterator[Finding]:
    """The version against the pin, then what the library tells of itself."""
    version, report = _version(), LibraryReport({}, None)
    failure: Finding | None
    if version != PINNED_VERSION:
        what = "not installed" if version is None else f"wrong version (found {version})"
        failure = Finding(LLAMA, "problem", f"{what}, required {PINNED_VERSION}", _INSTALL)
    else:
        report = _ask_library()
        failure = _failure(report)
    if failure is not None:
        if LLAMA in failure.hint:  # a build is advised
            yield _build_tools("", needed=True)
        yield failure
        return
    yield Finding(LLAMA, "ok", f"{version}, llama.cpp {LLAMA_CPP_COMMIT[:9]}, loads and computes")
    yield _build(report)
    yield from check_gpu(report)
    yield from describe_devices(report)


def rebuild_command(backend: str = "") -> str:
    """The command that builds llama-cpp-python anew; pip's cache would give the old build again.

    Args:
        backend: ``Metal``, ``CUDA`` or ``Vulkan``; empty for none.
    """
    build = (
        "pip install --force-reinstall --no-cache-dir --no-deps "
        f"--no-binary {LLAMA} {LLAMA}=={PINNED_VERSION}"
    )
    if not backend:
        return build
    if sys.platform == "win32":
        return f'$env:CMAKE_ARGS="{_FLAGS[backend]}"; {build}'
    return f'CMAKE_ARGS="{_FLAGS[backend]}" {build}'


def _version() -> str | None:
    try:
        return metadata.version(LLAMA)
    except metadata.PackageNotFoundError:
        return None


def _ask_library() -> LibraryReport:
    """Have a child of this interpreter, with the same search path, load the library."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        command = [sys.executable, "-c", _ASK, str(file)]
        answer = ask_program(command, seconds=_SECONDS, environment=environment)
        try:
            facts = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):
            facts = {}
    return LibraryReport(facts, answer)


def _failure(report: LibraryReport) -> Finding | None:
    """Why the library is no use at all, if so."""
    facts = report.facts
    if "error" in facts:
        text = str(facts["error"]).removeprefix(f"{LLAMA}: ")
        return Finding(LLAMA, "problem", text, str(facts["hint"]))
    if "devices" not in facts:
        return Finding(LLAMA, "problem", f"cannot be loaded ({report.ending})", rebuild_command())
    for device in facts["devices"]:
        if device["kind"] == "cpu" and (
            device["name"] == report.step or device["computes"] is False
        ):
            reason = report.ending or "wrong results"
            text = f"loads, but cannot compute ({reason})"
            return Finding(LLAMA, "problem", text, rebuild_command())
    return None


def _build(report: LibraryReport) -> Finding:
    """Backends and instruction sets; llama.cpp writes ``CPU : AVX = 1 | AVX2 = 1 | ``."""
    backends = ", ".join(report.facts["backends"])
    pieces = report.facts["features"].replace(" = 1", "").split(" | ")
    features = " ".join(piece.rpartition(" : ")[2].strip() for piece in pieces if piece.strip())
    return Finding("build", "ok", f"for {backends}; {features}")


def check_gpu(report: LibraryReport) -> Iterator[Finding]:
    """A GPU that is there and not used; with what a build for it would need."""
    if choose_devices(report.devices):
        return
    gpus = probe_gpus()
    built = [backend for backend in report.facts["backends"] if backend not in _NO_GPU]
    if not gpus:
        yield Finding("gpu", "ok", "none found; the CPU computes")
        return
    names = ", ".join(gpu.name for gpu in gpus)
    if built:
        text = f"{names}: there, but {' and '.join(built)} in llama.cpp finds no device"
        yield Finding("gpu", "note", text, _driver_hint())
        return
    vendors = {gpu.vendor for gpu in gpus}
    backend = "Vulkan"
    if vendors & {"NVIDIA", "Apple"}:
        backend = "Metal" if "Apple" in vendors else "CUDA" if find_program("nvcc") else "Vulkan"
    text = f"{names}: there, but llama-cpp-python was built without a GPU backend"
    yield Finding("gpu", "note", text, rebuild_command(backend))
    yield _build_tools(backend, needed=False)


def _driver_hint() -> str:
    """Why a backend that is compiled in may see nothing."""
    nodes = sorted(Path("/dev/dri").glob("renderD*"))
    if nodes and not any(os.access(node, os.R_OK | os.W_OK) for node in nodes):
        return "sudo usermod -aG render,video $USER, then log in again"
    if sys.platform in LINUX and not vulkan_drivers():
        found = install_command(apt="mesa-vulkan-drivers", dnf="mesa-vulkan-drivers")
        return found or "install the GPU's Vulkan driver"
    return "install or update the GPU's driver"


def _build_tools(backend: str, *, needed: bool) -> Finding:
    """The compiler and cmake, and what the backend's shaders are compiled with."""
    programs = {
        "C++ compiler": find_program(os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"),
        "cmake": find_program("cmake"),
    }
    if backend == "Vulkan":
        programs["glslc"] = find_program("glslc")
    missing = [name for name, path in programs.items() if path is None]
    if not missing:
        return Finding("build tools", "ok", ", ".join(str(path) for path in programs.values()))
    text = f"to build llama-cpp-python: no {', no '.join(missing)}"
    vulkan = backend == "Vulkan"
    hint = install_command(
        apt="g++ cmake" + " glslc libvulkan-dev spirv-headers" * vulkan,
        dnf="gcc-c++ cmake"
        + " glslc vulkan-headers vulkan-loader-devel spirv-headers-devel" * vulkan,
        pacman="gcc cmake" + " shaderc vulkan-headers vulkan-icd-loader spirv-headers" * vulkan,
        pkg="clang cmake ninja" + " shaderc vulkan-headers spirv-headers" * vulkan,
        brew="cmake" + " shaderc vulkan-headers vulkan-loader spirv-headers" * vulkan,
        winget="Kitware.CMake" + " KhronosGroup.VulkanSDK" * vulkan,
    )
    if "C++ compiler" in missing and sys.platform == "darwin":
        hint = "xcode-select --install" + (f"; {hint}" if hint else "")
    if "C++ compiler" in missing and sys.platform == "win32":
        hint = "install Visual Studio Build Tools with C++" + (f"; {hint}" if hint else "")
    # cmake alone is no obstacle: the build fetches one where there is none
    stops = needed and "C++ compiler" in missing
    return Finding(
        "build tools",
        "problem" if stops else "note",
        text,
        hint or f"install with this system's package manager: {', '.join(missing)}",
    )


def describe_devices(report: LibraryReport) -> Iterator[Finding]:
    """Each device: what it is, its memory, whether layers go to it, whether it computes."""
    computes = {facts["name"]: facts["computes"] for facts in report.facts["devices"]}
    chosen = choose_devices(report.devices)
    for device in report.devices:
        name = f"device {device.name}"
        text = f"{device.description or device.backend}, {_kind(device)}, {_memory(device)}"
        hint = "update its driver; until then: --n-gpu-layers 0"
        if device.name == report.step:
            failed = f"{text}: computing on it failed ({report.ending})"
            yield Finding(name, "note", failed, hint)
        elif computes[device.name] is False:
            yield Finding(name, "note", f"{text}: it computes wrong results", hint)
        elif computes[device.name] is None and device.is_gpu and not device.is_software:
            yield Finding(name, "note", f"{text}: not tried, as one before it failed", hint)
        else:
            yield Finding(name, "ok", text + "; layers go there" * (device in chosen))


def _kind(device: Device) -> str:
    if device.is_gpu and device.is_software:
        return f"a CPU behind {device.backend}, used only when asked for (--device {device.name})"
    by = "" if device.kind == "cpu" else f" by {device.backend}"
    return {"cpu": "CPU", "gpu": "GPU", "igpu": "GPU"}.get(device.kind, device.kind) + by


def _memory(device: Device) -> str:
    if not device.total_bytes:
        return "memory unknown"
    total = format_bytes(device.total_bytes)
    if device.kind == "cpu":  # what ggml tells as free is all of it
        return f"{total} of memory"
    owner = "shared with the machine" if device.shares_memory else "of its own"
    return f"{total} {owner}, {format_bytes(device.free_bytes)} free"
