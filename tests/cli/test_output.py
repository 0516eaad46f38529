"""Data to stdout, remarks to stderr, and progress that suits the place it is shown."""

from __future__ import annotations

import io
import json

import pytest

from autoglm_gguf import Progress
from autoglm_gguf.cli import output


def test_write_goes_to_stdout_and_note_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.write("data")
    output.note("remark")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("data\n", "remark\n")


def test_json_keeps_chinese_readable(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_json({"app": "微信"})
    output.write_json_line({"app": "微信", "n": 1})
    document, line = capsys.readouterr().out.rsplit("}\n{", 1)
    assert json.loads(document + "}") == {"app": "微信"}
    assert line == '"app": "微信", "n": 1}\n'


def test_dim_is_plain_where_there_is_no_terminal() -> None:
    assert output.dim("x", io.StringIO()) == "x"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_dim_is_faint_in_a_terminal_unless_colour_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.dim("x", Terminal()) == "\x1b[2mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.dim("x", Terminal()) == "x"


def progress(done: int) -> Progress:
    return Progress("m.gguf", done, 1000, 2.0)


def test_progress_prints_a_line_per_tenth_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    line = output.ProgressLine()
    for done in range(0, 1001, 5):
        line(progress(done))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert " 50%  500 B of 1.00 kB" in lines[5]
    assert "2.0 s left" in lines[5]
    assert all("\r" not in text and "m.gguf" in text for text in lines)


def test_progress_draws_over_its_line_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    line = output.ProgressLine()
    for done in (0, 500, 1000):
        line(progress(done))
    assert terminal.getvalue().count("\r\x1b[K") == 3
    assert terminal.getvalue().count("\n") == 1, "a line break at the end only"


def test_text_of_a_file_has_no_power_over_the_terminal() -> None:
    assert output.escape_controls("a\x1b[2Jb\r\x9bc\td\ne微") == "a\\x1b[2Jb\\x0d\\x9bc\td\ne微"
