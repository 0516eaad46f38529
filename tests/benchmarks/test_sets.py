"""The sets: what they need is checked first, and one benchmark's end is not the others'."""

from __future__ import annotations

import argparse
import shutil
from collections import namedtuple
from pathlib import Path

import frame
import pytest
import sets
from sets import Step

SCRIPTS = Path(sets.__file__).parent


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A set's own folders; scripts are found beside them."""
    monkeypatch.setattr(sets, "HERE", tmp_path)
    (tmp_path / "good.py").write_text("import sys; print('table', *sys.argv[1:])")
    (tmp_path / "bad.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "interrupted.py").write_text("import os, signal; os.kill(os.getppid(), 2)")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    return argparse.Namespace(out=tmp_path, work=tmp_path / "work")


def test_every_step_is_a_script_with_a_name_of_its_own() -> None:
    for steps in sets.SETS.values():
        assert len({step.name for step in steps}) == len(steps)
        assert all((SCRIPTS / step.words.split()[0]).is_file() for step in steps)


def test_quick_fits_its_time() -> None:
    assert sum(step.seconds for step in sets.QUICK) <= sets.QUICK_SECONDS


def test_failing_benchmark_does_not_end_the_set(
    arguments: argparse.Namespace, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = (Step("first", "bad.py", 1), Step("second", "good.py --work WORK", 1, json=False))
    assert sets.run_set(steps, arguments, None) == 1
    assert "first: exit status 3" in capfd.readouterr().err
    told = (arguments.out / "second.md").read_text()
    assert told == f"table --work {arguments.work}\n"


def test_what_does_not_fit_the_time_is_named(
    arguments: argparse.Namespace, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = (Step("first", "slow.py", 1, json=False), Step("second", "good.py", 1, json=False))
    assert sets.run_set(steps, arguments, 0.3) == 0
    told = capfd.readouterr().err
    assert "first: stopped after" in told
    assert "second: left out, the set's time was over" in told


def test_interrupt_begins_no_further_benchmark(arguments: argparse.Namespace) -> None:
    steps = (
        Step("first", "interrupted.py", 1, json=False),
        Step("second", "good.py", 1, json=False),
    )
    assert sets.run_set(steps, arguments, None) == frame.INTERRUPTED
    assert not (arguments.out / "second.md").exists()


def test_too_little_disk_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 3 * 10**9))
    sets.check((Step("small", "good.py", 1, 10**9),), tmp_path)
    with pytest.raises(SystemExit, match=r"not enough disk \(3.00 GB free, 41.00 GB required\)"):
        sets.check((Step("large", "good.py", 1, 40 * 10**9),), tmp_path)
