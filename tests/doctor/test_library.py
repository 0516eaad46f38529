"""llama-cpp-python in every state: absent, old, broken in several ways, and as installed.

The broken ones are copies of the installed package with bytes changed, loaded for real.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest

from autoglm_gguf import devices
from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.doctor.library import (
    LibraryReport,
    check_gpu,
    check_library,
    describe_devices,
    rebuild_command,
)
from autoglm_gguf.native.library import PINNED_VERSION, _loading_error
from autoglm_gguf.programs import Answer

ROOT = Path(__file__).parents[2]
GB = 10**9
TRAPS = {"x86_64": b"\x0f\x0b", "aarch64": b"\0\0\0\0"}  # ud2, udf: no such instruction
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="changes ELF files")


def found() -> dict[str, Finding]:
    return {finding.name: finding for finding in check_library()}


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the installed package, which the child finds first."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, tmp_path / "llama_cpp")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "llama_cpp" / "lib"


@pytest.mark.native
def test_library_as_installed_loads_and_computes() -> None:
    told = found()
    assert told["llama-cpp-python"].state == "ok"
    assert told["llama-cpp-python"].text.startswith(f"{PINNED_VERSION}, llama.cpp 0c1e57098")
    assert "CPU" in told["build"].text
    assert told["device CPU"].state == "ok"


@linux
@pytest.mark.native
def test_library_that_needs_another_names_it_and_its_package(copied: Path) -> None:
    for path in copied.glob("*.so*"):
        path.write_bytes(path.read_bytes().replace(b"libstdc++.so.6\0", b"libgone++.so.6\0"))
    told = found()["llama-cpp-python"]
    assert (told.state, "it needs libgone++.so.6" in told.text) == ("problem", True)
    assert told.hint.startswith("install the package that has libgone++.so.6")


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        (
            "libgomp.so.1: cannot open shared object file: No such file",
            "apt-get install -y libgomp1",
        ),
        ("Error loading shared library libstdc++.so.6: No such file or directory", "libstdc++6"),
        ("/x/libggml.so.0: cannot open shared object file", "--force-reinstall"),
        ("version `GLIBC_2.38' not found (required by /x/libggml.so)", "--force-reinstall"),
    ],
)
def test_what_the_loader_says_becomes_a_command(reason: str, hint: str) -> None:
    assert hint in _loading_error(f"Failed to load shared library '/x/libllama.so': {reason}").hint


@pytest.mark.native
def test_package_without_its_libraries_is_to_be_installed_again(copied: Path) -> None:
    shutil.rmtree(copied)
    told = found()["llama-cpp-python"]
    assert (told.state, "--force-reinstall" in told.hint) == ("problem", True)


@linux
@pytest.mark.native
@pytest.mark.skipif(platform.machine() not in TRAPS, reason="no illegal instruction known")
def test_build_for_another_processor_is_told_though_it_ends_its_process(copied: Path) -> None:
    library = copied / "libggml-cpu.so"
    address = ctypes.cast(ctypes.CDLL(str(library)).ggml_graph_compute, ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            at = address - start + int(offset, 16)
    whole, trap = library.read_bytes(), TRAPS[platform.machine()]
    for path in copied.glob("libggml-cpu.so*"):
        path.unlink()  # this process has it mapped
        path.write_bytes(whole[:at] + trap + whole[at + len(trap) :])
    told = found()["llama-cpp-python"]
    assert told.state == "problem"
    assert "instructions that this processor lacks" in told.text
    assert told.hint == rebuild_command()


def test_old_version_and_none_at_all_are_problems_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    told = found()["llama-cpp-python"]
    command = f"pip install llama-cpp-python=={PINNED_VERSION}"
    assert (told.state, told.hint) == ("problem", command)
    assert told.text.startswith("not installed")
    info = tmp_path / "llama_cpp_python-0.3.16.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.16\n"
    )
    told = found()["llama-cpp-python"]
    assert (told.state, told.hint) == ("problem", command)
    assert told.text == f"wrong version (found 0.3.16), required {PINNED_VERSION}"


def test_compiler_is_asked_for_first_where_a_build_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert [(one.name, one.state) for one in check_library()] == [
        ("build tools", "problem"),
        ("llama-cpp-python", "problem"),
    ]
    (tmp_path / "c++").touch(mode=0o755)
    tools = found()["build tools"]
    assert tools.text == "to build llama-cpp-python: no cmake"
    assert tools.state == "note", "pip fetches one"


# --- GPUs and devices, from what the child reports ---


def report(
    *listed: dict[str, object], backends: tuple[str, ...], step: str = "done"
) -> LibraryReport:
    cpu = device("CPU", "CPU", "cpu", "Ryzen", 16, 16)
    facts = {"step": step, "backends": backends, "devices": [*listed, cpu], "features": ""}
    return LibraryReport(facts, Answer(0 if step == "done" else -11, ""))


def device(
    name: str, backend: str, kind: str, description: str, total: int, free: int, **more: object
) -> dict[str, object]:
    facts: dict[str, object] = {"name": name, "backend": backend, "kind": kind}
    facts |= {"description": description, "maps_files": True, "computes": True}
    return {**facts, "total_bytes": total * GB, "free_bytes": free * GB, **more}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an AMD GPU, and PATH as given."""
    node = tmp_path / "drm" / "renderD128" / "device"
    node.mkdir(parents=True)
    (node / "vendor").write_text("0x1002\n")
    monkeypatch.setattr(devices, "_RENDERERS", tmp_path / "drm")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_gpu_that_the_build_leaves_out_is_noted_with_the_command(gpu: Path) -> None:
    note, tools = check_gpu(report(backends=("CPU",)))
    assert note.state == "note"
    assert note.text == "AMD GPU: there, but llama-cpp-python was built without a GPU backend"
    assert note.hint == (
        'CMAKE_ARGS="-DGGML_VULKAN=on" pip install --force-reinstall --no-cache-dir --no-deps '
        f"--no-binary llama-cpp-python llama-cpp-python=={PINNED_VERSION}"
    )
    assert (tools.name, tools.state) == ("build tools", "note")
    assert "glslc" in tools.text


@pytest.mark.parametrize("backend", ["Vulkan", "CUDA", "Metal"])
def test_guide_has_the_commands_that_are_printed(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    guide = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text("utf-8")
    monkeypatch.setattr(sys, "platform", "linux")
    assert f"$ {rebuild_command(backend)}\n" in guide
    monkeypatch.setattr(sys, "platform", "win32")
    powershell, _, _ = rebuild_command("Vulkan").partition(" ")
    assert f"`{powershell}`" in guide


@pytest.mark.skipif(os.name != "posix", reason="the small nvidia-smi is a shell script")
def test_gpu_of_nvidia_is_built_for_cuda_where_its_compiler_is(gpu: Path) -> None:
    (gpu / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA T4 (UUID: GPU-1)'\n")
    (gpu / "nvidia-smi").chmod(0o755)
    note, _ = check_gpu(report(backends=("CPU",)))
    assert "NVIDIA T4" in note.text
    assert "GGML_VULKAN" in note.hint
    (gpu / "nvcc").touch(mode=0o755)
    note, _ = check_gpu(report(backends=("CPU",)))
    assert "GGML_CUDA" in note.hint


def test_gpu_without_a_driver_is_noted(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_VULKAN_DRIVERS", ())
    (note,) = check_gpu(report(backends=("Vulkan", "CPU")))
    assert "Vulkan in llama.cpp finds no device" in note.text
    assert note.hint


def test_gpu_that_is_driven_needs_no_words(gpu: Path) -> None:
    driven = device("Vulkan0", "Vulkan", "gpu", "RX 7600", 8, 7)
    assert list(check_gpu(report(driven, backends=("Vulkan", "CPU")))) == []


@pytest.mark.native  # devices are native's values
def test_devices_are_told_with_their_memory_and_who_gets_layers() -> None:
    listed = (
        device("Vulkan0", "Vulkan", "gpu", "RX 7600", 8, 7),
        device("Vulkan1", "Vulkan", "igpu", "Radeon 780M", 16, 9),
        device("Vulkan2", "Vulkan", "gpu", "llvmpipe (LLVM 15.0.6)", 16, 16, computes=None),
    )
    told = [one.text for one in describe_devices(report(*listed, backends=("Vulkan", "CPU")))]
    assert told == [
        "RX 7600, GPU by Vulkan, 8.00 GB of its own, 7.00 GB free; layers go there",
        "Radeon 780M, GPU by Vulkan, 16.00 GB shared with the machine, 9.00 GB free",
        "llvmpipe (LLVM 15.0.6), a CPU behind Vulkan, used only when asked for (--device Vulkan2), "
        "16.00 GB shared with the machine, 16.00 GB free",
        "Ryzen, CPU, 16.00 GB of memory",
    ]


@pytest.mark.native
def test_device_that_fails_or_miscalculates_is_noted() -> None:
    listed = (
        device("Vulkan0", "Vulkan", "gpu", "RX 7600", 8, 7, computes=False),
        device("Vulkan1", "Vulkan", "gpu", "Arc", 8, 7, computes=None),
        device("Vulkan2", "Vulkan", "gpu", "T4", 8, 7, computes=None),
    )
    whole = report(*listed, backends=("Vulkan", "CPU"), step="Vulkan1")
    wrong, failed, untried, _ = describe_devices(whole)
    assert [one.state for one in (wrong, failed, untried)] == ["note"] * 3
    assert "wrong results" in wrong.text
    assert "it ended the process" in failed.text
    assert "not tried" in untried.text
    assert wrong.hint == failed.hint == "update its driver; until then: --n-gpu-layers 0"
