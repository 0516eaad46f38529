"""What the process holds: known amounts taken and given back."""

from __future__ import annotations

import mmap
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from autoglm_gguf import MemoryUsage, measure_memory
from autoglm_gguf.memory import measure
from autoglm_gguf.memory.measure import reset_peak

MB = 10**6
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def usage() -> MemoryUsage:
    found = measure_memory()
    assert found is not None
    return found


@linux
def test_anonymous_memory_is_counted_as_such() -> None:
    before = usage()
    taken = np.ones(80 * MB, np.uint8)
    during = usage()
    del taken
    after = usage()
    assert during.anonymous_bytes - before.anonymous_bytes == pytest.approx(80 * MB, abs=2 * MB)
    assert abs(during.mapped_bytes - before.mapped_bytes) < 2 * MB
    assert after.anonymous_bytes - before.anonymous_bytes < 2 * MB


@linux
def test_pages_of_a_mapped_file_are_counted_as_such(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(80 * MB))
    before = usage()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        untouched = usage()
        np.frombuffer(view, np.uint8)[:: mmap.PAGESIZE].max()
        during = usage()
    assert untouched.mapped_bytes - before.mapped_bytes < 2 * MB
    assert during.mapped_bytes - before.mapped_bytes == pytest.approx(80 * MB, abs=2 * MB)
    assert abs(during.anonymous_bytes - before.anonymous_bytes) < 2 * MB


@linux
def test_peak_remembers_what_was_given_back() -> None:
    assert reset_peak()
    before = usage()
    assert before.peak_bytes == pytest.approx(before.total_bytes, abs=4 * MB)
    np.ones(80 * MB, np.uint8)
    after = usage()
    assert after.peak_bytes - before.total_bytes == pytest.approx(80 * MB, abs=4 * MB)
    assert after.total_bytes - before.total_bytes < 4 * MB


def test_total_adds_the_three_kinds() -> None:
    assert MemoryUsage(1, 20, 999, 300).total_bytes == 321


@pytest.mark.parametrize("text", ["", "VmRSS: 1 kB\n", "RssAnon: some kB\n"])
def test_usage_is_unknown_where_proc_does_not_tell(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "status").write_text(text)
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "status")
    assert measure_memory() is None
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "nowhere")
    assert measure_memory() is None


def test_usage_is_read_from_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "status").write_text(
        "Name:\tx\nVmHWM:\t   900 kB\nRssAnon:\t 100 kB\nRssFile:\t  20 kB\nRssShmem:\t   3 kB\n"
    )
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "status")
    assert measure_memory() == MemoryUsage(100 * 1024, 23 * 1024, 900 * 1024)


def test_reset_peak_says_when_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_CLEAR", tmp_path / "no" / "such" / "place")
    assert not reset_peak()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"rss": 300, "private": 200, "peak_wset": 400}, MemoryUsage(200, 100, 400)),
        # Part of what is private may lie in the page file.
        ({"rss": 300, "private": 500, "peak_wset": 400}, MemoryUsage(500, 0, 500)),
        ({"rss": 300}, MemoryUsage(300, 0, 300)),
    ],
)
def test_usage_on_windows_comes_from_psutil(
    told: dict[str, int], expected: MemoryUsage, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(**told))
    library = types.SimpleNamespace(Process=lambda: process)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "psutil", library)
    assert measure_memory() == expected
    monkeypatch.setitem(sys.modules, "psutil", None)  # not installed
    assert measure_memory() is None
