"""The pages of the documentation, and the blocks of code in them.

A comment before a block says what of it is not run, and why (CONTRIBUTING.md):
``<!-- not run: reason -->``, or ``<!-- not run (pip, adb): reason -->`` for lines with these
commands alone; ``<!-- output not compared: reason -->`` runs it all. Knows Markdown as these pages
use it; runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
DOCS = ROOT / "docs"
PAGES = [
    *(README, CHINESE, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"),
    *sorted(DOCS.glob("*/*.md")),
]
BESIDE = [  # pages that lie beside what they are about; their blocks are not run by tests/docs
    ROOT / "changelog.d" / "README.md",
    ROOT / "models" / "autoglm-tiny" / "README.md",
    *sorted((ROOT / "examples").rglob("*.md")),
]
_BLOCK = re.compile(
    r"(?:^<!--(?P<comment>(?:(?!-->).)*)-->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_NOT_RUN = re.compile(r" not run(?: \((?P<commands>[^)]*)\))?: (?P<reason>.+) ", re.DOTALL)
_GOES_ON = re.compile(r"\\\n\s*")


@dataclass(frozen=True)
class Command:
    """A line of a console block and what the page shows below it."""

    text: str
    shown: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    comment: str = ""

    @property
    def is_run(self) -> bool:
        """Whether none of its comment keeps it from being run as a whole."""
        found = _NOT_RUN.fullmatch(self.comment)
        return found is None or bool(found["commands"])

    @property
    def is_compared(self) -> bool:
        """Whether it says what the page shows."""
        return not self.comment.startswith(" output not compared: ")

    @property
    def skipped(self) -> frozenset[str]:
        """First words of the commands that are not run."""
        found = _NOT_RUN.fullmatch(self.comment)
        return (
            frozenset(re.split(r",\s*", found["commands"]))
            if found and found["commands"]
            else frozenset()
        )

    @property
    def commands(self) -> Iterator[Command]:
        """Of a console block, those with a ``$`` before them."""
        text, shown = "", []
        for line in [*_GOES_ON.sub(" ", self.text).splitlines(), "$ "]:
            if not line.startswith("$ "):
                shown.append(line)
                continue
            if text:
                yield Command(text, tuple(shown))
            text, shown = line[2:], []

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")),
            found["language"],
            found["text"],
            found["comment"] or "",
        )
        for found in _BLOCK.finditer(text)
    ]
