"""Lines to inputs."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from autoglm_gguf.cli.prompt_line import EndOfInput, LineReader


def scripted(lines: Iterable[str | type[BaseException]]) -> tuple[LineReader, list[str]]:
    """A reader that is given these lines; also the prompts it showed."""
    script, prompts = iter(lines), []

    def read_line(prompt: str) -> str:
        prompts.append(prompt)
        line = next(script, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    return LineReader(read_line, interactive=False), prompts


def read_all(*lines: str | type[BaseException]) -> list[str]:
    reader, _ = scripted(lines)
    inputs = []
    while True:
        try:
            inputs.append(reader.read())
        except EndOfInput:
            return inputs


@pytest.mark.parametrize(
    ("lines", "inputs"),
    [
        (["one", "two"], ["one", "two"]),
        (["one\\", "two"], ["one\ntwo"]),
        (["one\\", "two\\", "three"], ["one\ntwo\nthree"]),
        (["one\\"], ["one"]),
        (['"""', "a", "", "b\\", '"""', "c"], ["a\n\nb\\", "c"]),
        (['  """ ', "a", '"""'], ["a"]),
        (['"""', '"""'], [""]),
        (['"""', "never closed"], ["never closed"]),
        (['say """', "b"], ['say """', "b"]),
        ([], []),
    ],
)
def test_reader_builds_inputs_from_lines(lines: list[str], inputs: list[str]) -> None:
    assert read_all(*lines) == inputs


def test_reader_shows_that_it_waits_for_more() -> None:
    reader, prompts = scripted(["one\\", "two"])
    reader.read()
    assert prompts == ["> ", "... "]


def test_reader_forgets_the_lines_on_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_all("half\\", KeyboardInterrupt, "whole") == ["whole"]
    assert read_all('"""', "half", KeyboardInterrupt, "whole") == ["whole"]
    assert "Ctrl-D" in capsys.readouterr().err
