"""Reads what a person types: prompt_toolkit with history in a terminal, plain lines otherwise.

One rule for both: a trailing backslash continues, a line of three quotes opens and closes a block.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

from autoglm_gguf.cli import output
from autoglm_gguf.hub import cache_directory

_FENCE = '"""'


class EndOfInput(Exception):  # noqa: N818  (an end, not an error)
    """Ctrl-D, or the end of a pipe."""


@dataclass(frozen=True, slots=True)
class LineReader:
    """Gives whole inputs, built from lines."""

    read_line: Callable[[str], str]
    """Takes the prompt; raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""
    interactive: bool

    def read(self) -> str:
        """The next input, one or several lines.

        Raises:
            EndOfInput: There is no more.
        """
        lines: list[str] = []
        fenced = False
        while True:
            try:
                line = self.read_line("... " if lines or fenced else "> ")
            except EOFError:
                if lines:
                    return "\n".join(lines)
                raise EndOfInput from None
            except KeyboardInterrupt:
                output.note("(Ctrl-D or /exit leaves)")
                lines, fenced = [], False
                continue
            if line.strip() == _FENCE:
                if fenced:
                    return "\n".join(lines)
                fenced = not lines
                if fenced:
                    continue
            if not fenced and line.endswith("\\"):
                lines.append(line[:-1])
                continue
            lines.append(line)
            if not fenced:
                return "\n".join(lines)


def open_reader(*, interactive: bool) -> LineReader:
    """A reader for this terminal or pipe."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text spoil no later line
    if not interactive:
        return LineReader(_read_piped, interactive=False)
    try:
        return LineReader(_toolkit(), interactive=True)
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - else terminals cut lines at 4,095 bytes, and say nothing
        output.note('(for line editing and history: pip install "autoglm-gguf[chat]")')
        return LineReader(input, interactive=True)


def _read_piped(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _toolkit() -> Callable[[str], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        history = FileHistory(str(directory / "chat_history"))
    except OSError:
        history = InMemoryHistory()
    session = PromptSession(history=history)

    def read_line(prompt: str) -> str:
        typed = str(session.prompt(prompt))
        return typed.encode(
            "utf-8", "replace"
        ).decode()  # it gives bytes that are no text as halves

    return read_line
