"""The only module that prints: data to stdout, progress and hints to stderr."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from typing import Any, TextIO

from autoglm_gguf.progress import Progress
from autoglm_gguf.units import format_bytes, format_seconds

_BAR = 24
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tab and line feed
_FIRST_ESTIMATE = 0.02  # before this share is done, the time left is a guess


def escape_unprintable() -> None:
    """Let stdout show what its encoding lacks as escapes: a model or file may say anything."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stderr is so by default


def escape_controls(text: str) -> str:
    """Text of a file that may come from anywhere, without power over the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def write(text: str = "", *, end: str = "\n") -> None:
    """Data for the user or the next program."""
    print(text, end=end, flush=True)


def write_json(value: Any) -> None:
    """A value as one JSON document."""
    print(_dump_json(value, indent=2), flush=True)


def write_json_line(value: Any) -> None:
    """A value as one line of JSON."""
    print(_dump_json(value), flush=True)


def _dump_json(value: Any, *, indent: int | None = None) -> str:
    utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name == "utf-8"
    return json.dumps(value, ensure_ascii=not utf8, indent=indent)


def note(text: str, *, end: str = "\n") -> None:
    """A remark for the person in front of the screen."""
    print(text, end=end, file=sys.stderr, flush=True)


def dim(text: str, stream: TextIO | None = None) -> str:
    """Text in the terminal's faint style, or as it is where there is no colour."""
    target = stream or sys.stdout
    if not target.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[2m{text}\x1b[0m"


class ProgressLine:
    """Progress of downloads and conversions: a line drawn over, or one per tenth when piped."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = -1

    def __call__(self, progress: Progress) -> None:
        """Draw the progress if it has moved."""
        share = progress.done_bytes / max(1, progress.total_bytes)
        step = int(share * (200 if self._live else 10))
        if step == self._shown:
            return
        self._shown = step
        done = round(share * _BAR)
        left = f"{format_seconds(progress.seconds_left)} left" if share >= _FIRST_ESTIMATE else ""
        line = (
            f"{'█' * done}{'░' * (_BAR - done)} {share:4.0%}  "
            f"{format_bytes(progress.done_bytes)} of {format_bytes(progress.total_bytes)}  "
            f"{left:<11} {progress.file}"
        )
        note(f"\r\x1b[K{line}" if self._live else line, end="" if self._live else "\n")
        if progress.done_bytes >= progress.total_bytes:
            self._shown = -1  # the next step, such as the conversion after a download, draws again
            if self._live:
                note("")
