"""README.zh.md says what README.md says: the same headings, code, tables and links, in order."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from documents import CHINESE, README, Block, read_blocks

LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def without_remarks(block: Block) -> str:
    return re.sub(r"\s+# .*$", "", block.text, flags=re.MULTILINE)


def rows(page: Path) -> list[list[str]]:
    lines = [line for line in read(page).splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


def targets(page: Path) -> set[str]:
    found = set(LINK.findall(read(page))) - {README.name, CHINESE.name}
    return {"#" if target.startswith("#") else target for target in found}


def test_headings_correspond() -> None:
    levels = [
        [len(m) for m in re.findall(r"^(#+) ", read(p), re.MULTILINE)] for p in (README, CHINESE)
    ]
    assert levels[0] == levels[1]


def test_blocks_are_the_same_but_for_remarks() -> None:
    english, chinese = (read_blocks(page) for page in (README, CHINESE))
    assert [(b.language, b.comment, without_remarks(b)) for b in english] == [
        (b.language, b.comment, without_remarks(b)) for b in chinese
    ]


def test_tables_have_the_same_rows_and_code() -> None:
    english, chinese = rows(README), rows(CHINESE)
    assert [len(row) for row in english] == [len(row) for row in chinese]
    for ours, theirs in zip(english, chinese, strict=True):
        for cell, other in zip(ours, theirs, strict=True):
            assert sorted(re.findall(r"`[^`]+`", cell)) == sorted(re.findall(r"`[^`]+`", other))


def test_links_are_the_same() -> None:
    assert targets(README) == targets(CHINESE)


def test_paragraphs_and_items_are_as_many() -> None:
    for pattern in (r"^- ", r"\n\n(?=[^\s#|<`!\-\[])"):
        below = [read(page).partition("\n## ")[2] for page in (README, CHINESE)]
        found = [len(re.findall(pattern, text, re.MULTILINE)) for text in below]
        assert found[0] == found[1], pattern


def test_numbers_are_the_same() -> None:
    english, chinese = (
        Counter(re.findall(r"\d[\d.,]*\d|\d", re.sub(r"\]\([^)]*\)", "", read(page))))
        for page in (README, CHINESE)
    )
    assert (english - chinese, chinese - english) == ({"7": 1}, {"700": 1})  # 7 million: 700 万


@pytest.mark.parametrize(("page", "other"), [(README, CHINESE), (CHINESE, README)])
def test_each_links_to_the_other_at_its_top(page: Path, other: Path) -> None:
    assert f"]({other.name})" in page.read_text("utf-8").splitlines()[2]
