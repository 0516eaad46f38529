"""Other programs: what they say, how long they may take, how they are installed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from autoglm_gguf.programs import ask_program, find_program, install_command

posix = pytest.mark.skipif(os.name != "posix", reason="shell scripts")


def test_answer_has_both_streams_the_code_and_no_control_characters() -> None:
    script = "import sys; print('\\x1b[31mred\\x07'); sys.stderr.write('\\nmore\\n'); sys.exit(3)"
    answer = ask_program([sys.executable, "-c", script])
    assert answer is not None
    assert answer.code == 3
    assert sorted(answer.lines) == ["[31mred", "more"]


@posix
def test_program_that_takes_too_long_is_killed_and_what_it_left_behind_not_waited_for() -> None:
    began = time.monotonic()
    answer = ask_program(["/bin/sh", "-c", "echo begun; sleep 300 & sleep 300"], seconds=1)
    assert time.monotonic() - began < 100
    assert answer is not None
    assert (answer.code, answer.text) == (None, "begun\n")


def test_program_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert ask_program([str(tmp_path / "nothing")]) is None
    assert find_program("", "surely-no-such-program") is None


@posix
def test_install_command_is_that_of_the_package_manager_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_command(apt="adb", brew="android-platform-tools") == ""
    (tmp_path / "brew").touch(mode=0o755)
    found = install_command(apt="adb", brew="android-platform-tools")
    assert found == "brew install android-platform-tools"
    (tmp_path / "apt-get").touch(mode=0o755)
    assert install_command(apt="adb") == "sudo apt-get install -y adb"
