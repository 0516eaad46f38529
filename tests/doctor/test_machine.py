"""Memory and disk: what is told of given figures."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import pytest

from autoglm_gguf.devices import MachineMemory
from autoglm_gguf.doctor import machine
from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.doctor.machine import REPO, check_machine

GB = 10**9
LARGE = MachineMemory(16 * GB, 8 * GB, "machine")


def found(name: str) -> Finding:
    return next(finding for finding in check_machine() if finding.name == name)


@pytest.mark.parametrize(
    ("bounds", "state", "hint"),
    [
        ((LARGE,), "ok", ""),
        ((MachineMemory(8 * GB, 3 * GB, "machine"),), "note", "--memory-budget 2700MB"),
        ((LARGE, MachineMemory(2 * GB, GB, "cgroup")), "note", "docker run --memory"),
        ((MachineMemory(GB, 10**7, "machine"),), "note", "close other programs"),
        ((), "note", "pip install psutil"),
    ],
)
def test_memory_is_held_against_the_default_budget(
    monkeypatch: pytest.MonkeyPatch, bounds: tuple[MachineMemory, ...], state: str, hint: str
) -> None:
    monkeypatch.setattr(machine, "probe_bounds", lambda: bounds)
    memory = found("memory")
    assert memory.state == state
    assert hint in memory.hint
    assert ("control group" in memory.text) == (len(bounds) == 2)


@pytest.mark.parametrize(
    ("free", "there", "state"), [(30, 0, "ok"), (10, 0, "note"), (10, 15, "ok"), (5, 15, "note")]
)
def test_disk_is_held_against_what_is_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, there: int, state: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    usage = types.SimpleNamespace(free=free * GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if path.exists() else None)
    if there:
        blobs = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"
        blobs.mkdir(parents=True)
        with (blobs / "0a").open("wb") as file:
            file.truncate(there * GB)
    disk = found("disk")
    assert disk.state == state
    assert ("HF_HUB_CACHE" in disk.hint) == (state == "note")
    assert "20.60 GB" in disk.text and "6.33 GB" in disk.text


def test_token_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub = found("hub")
    assert "a token is set" in hub.text
    assert "secret" not in str(hub)
