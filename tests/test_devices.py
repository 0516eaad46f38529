"""What the machine has, read from files laid out as Linux lays them out."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

from autoglm_gguf import devices
from autoglm_gguf.devices import (
    Gpu,
    MachineMemory,
    probe_bounds,
    probe_gpus,
    probe_memory,
    usable_cores,
    vulkan_drivers,
)

GIB = 2**30
UNLIMITED_V1 = "9223372036854771712"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine of 16 GiB, 8 of them free, as /proc and /sys tell it."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(devices, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(devices, "_CGROUP", tmp_path / "fs")
    (tmp_path / "meminfo").write_text(
        f"MemTotal:       {16 * GIB // 1024} kB\n"
        "MemFree:          123456 kB\n"
        f"MemAvailable:   {8 * GIB // 1024} kB\n"
        "HugePages_Total:       0\n"
    )
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "fs").mkdir()
    return tmp_path


def make_group(level: Path, limit: str, used: int, stat: str, version: int = 2) -> None:
    level.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }
    (level / names[version][0]).write_text(f"{limit}\n")
    (level / names[version][1]).write_text(f"{used}\n")
    (level / "memory.stat").write_text(stat)


MACHINE = MachineMemory(16 * GIB, 8 * GIB, "machine")


def test_memory_of_a_machine_without_groups(root: Path) -> None:
    assert probe_memory() == MACHINE
    (root / "cgroup").unlink()
    assert probe_memory() == MACHINE


def test_memory_is_the_groups_where_it_is_tighter(root: Path) -> None:
    (root / "cgroup").write_text("0::/user/app\n")
    stat = f"anon {GIB}\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\n"
    make_group(root / "fs" / "user" / "app", str(4 * GIB), 3 * GIB, stat)
    # File pages can be dropped: what is used less those.
    assert probe_memory() == MachineMemory(4 * GIB, GIB + 3 * GIB // 4, "cgroup")


def test_memory_is_the_machines_where_the_group_has_more(root: Path) -> None:
    (root / "cgroup").write_text("0::/app\n")
    make_group(root / "fs" / "app", str(12 * GIB), GIB, "")
    assert probe_memory() == MACHINE


@pytest.mark.parametrize(("inner", "outer"), [("max", str(2 * GIB)), (str(2 * GIB), "max")])
def test_memory_is_the_tightest_limit_on_the_way_up(root: Path, inner: str, outer: str) -> None:
    (root / "cgroup").write_text("0::/user/app\n")
    make_group(root / "fs" / "user", outer, GIB, "")
    make_group(root / "fs" / "user" / "app", inner, GIB, "")
    assert probe_memory() == MachineMemory(2 * GIB, GIB, "cgroup")


def test_memory_of_a_container_that_sees_its_group_as_the_root(root: Path) -> None:
    make_group(root / "fs", str(GIB), GIB // 4, "")
    assert probe_memory() == MachineMemory(GIB, 3 * GIB // 4, "cgroup")


def test_memory_group_of_version_1(root: Path) -> None:
    (root / "cgroup").write_text("5:cpu,cpuacct:/other\n4:memory:/docker/abc\n0::/ignored\n")
    stat = f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"
    group = root / "fs" / "memory" / "docker" / "abc"
    make_group(group, str(4 * GIB), 2 * GIB, stat, version=1)
    assert probe_memory() == MachineMemory(4 * GIB, 3 * GIB, "cgroup")


def test_memory_group_of_version_1_in_a_container(root: Path) -> None:
    """Its own path is the host's and not to be found; the limit lies at the root it sees."""
    (root / "cgroup").write_text("4:memory:/docker/abc\n")
    make_group(root / "fs" / "memory", str(2 * GIB), GIB, "", version=1)
    assert probe_memory() == MachineMemory(2 * GIB, GIB, "cgroup")


def test_memory_group_without_a_limit_is_none(root: Path) -> None:
    (root / "cgroup").write_text("4:memory:/app\n0::/app\n")
    make_group(root / "fs" / "memory" / "app", UNLIMITED_V1, GIB, "", version=1)
    make_group(root / "fs" / "app", "max", GIB, "")
    assert probe_memory() == MACHINE


def test_memory_group_over_its_limit_has_nothing_left(root: Path) -> None:
    make_group(root / "fs", str(GIB), 2 * GIB, "")
    assert probe_memory() == MachineMemory(GIB, 0, "cgroup")


@pytest.mark.parametrize("text", ["", "MemTotal: 16 kB\n", "MemTotal: many kB\n"])
def test_memory_is_unknown_where_proc_does_not_tell(root: Path, text: str) -> None:
    (root / "meminfo").write_text(text)
    assert probe_memory() is None


def test_memory_of_other_systems_comes_from_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    told = types.SimpleNamespace(total=16 * GIB, available=5 * GIB)
    library = types.SimpleNamespace(virtual_memory=lambda: told)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "psutil", library)
    assert probe_memory() == MachineMemory(16 * GIB, 5 * GIB, "machine")
    monkeypatch.setitem(sys.modules, "psutil", None)  # not installed
    assert probe_memory() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_this_machine_is_plausible() -> None:
    memory = probe_memory()
    assert memory is not None
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_bounds_are_the_machines_and_the_groups(root: Path) -> None:
    assert probe_bounds() == (MACHINE,)
    make_group(root / "fs", str(4 * GIB), GIB, "")
    assert probe_bounds() == (MACHINE, MachineMemory(4 * GIB, 3 * GIB, "cgroup"))


# --- GPUs, as /sys and nvidia-smi tell of them ---


@pytest.fixture
def renderers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No GPU, and no program."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(devices, "_RENDERERS", tmp_path / "drm")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "drm"


def add_renderer(renderers: Path, name: str, vendor: str) -> None:
    (renderers / name / "device").mkdir(parents=True)
    (renderers / name / "device" / "vendor").write_text(f"{vendor}\n")


def test_gpus_are_those_that_can_render(renderers: Path) -> None:
    assert probe_gpus() == ()
    add_renderer(renderers, "card0", "0x1002")  # its display half: the same GPU
    add_renderer(renderers, "renderD128", "0x1002")
    add_renderer(renderers, "renderD129", "0x1af4")  # virtio
    add_renderer(renderers, "renderD130", "0x8086")
    (renderers / "renderD131" / "device").mkdir(parents=True)  # a board's, without a vendor
    assert probe_gpus() == (Gpu("AMD", "AMD GPU"), Gpu("Intel", "Intel GPU"))


@pytest.mark.skipif(os.name != "posix", reason="the small nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("said", "code", "names"),
    [
        (
            "GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-1b)\nGPU 1: NVIDIA T4 (UUID: GPU-2c)\n",
            0,
            ["NVIDIA GeForce RTX 3060", "NVIDIA T4"],
        ),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver.\n", 9, []),
        ("No devices found.\n", 0, []),
    ],
)
def test_gpus_of_nvidia_are_told_once_by_its_driver(
    renderers: Path, tmp_path: Path, said: str, code: int, names: list[str]
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\nwhile read -r x; do echo "$x"; done <<E\n{said}E\nexit {code}\n')
    script.chmod(0o755)
    add_renderer(renderers, "renderD128", "0x10de")
    assert [gpu.name for gpu in probe_gpus()] == (names or ["NVIDIA GPU"])


def test_vulkan_drivers_are_named_without_the_one_for_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lvp_icd.x86_64.json", "radeon_icd.x86_64.json"):
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "_VULKAN_DRIVERS", (str(tmp_path), str(tmp_path / "absent")))
    for variable in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        monkeypatch.delenv(variable, raising=False)
    assert vulkan_drivers() == ("radeon_icd.x86_64",)
    monkeypatch.setenv("VK_DRIVER_FILES", "/x/nvidia_icd.json")
    assert vulkan_drivers() == ("nvidia_icd",)


def test_usable_cores_are_those_this_process_may_run_on() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
