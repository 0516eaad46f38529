"""Links between pages lead somewhere: files that there are, and headings in them."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT
from documents import BESIDE, DOCS, PAGES

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)", re.DOTALL)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def without_code(page: Path) -> str:
    return CODE.sub("", page.read_text("utf-8"))


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {slug(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def slug(title: str) -> str:
    title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
    kept = (c for c in title if c in " -_" or unicodedata.category(c)[0] in "LNM")
    return "".join(kept).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES + BESIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_page_lead_to_files_and_headings(page: Path) -> None:
    for plain, picture in LINK.findall(without_code(page)):
        target = plain or picture
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.is_file(), f"{target}: no such file"
        if anchor:
            assert anchor in slugs(found), f"{target}: no such heading ({sorted(slugs(found))})"


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / (plain or picture).partition("#")[0]).resolve()
        for page in PAGES
        for plain, picture in LINK.findall(without_code(page))
    }
    # Measurements are listed by the site.
    pages = [page for page in DOCS.glob("*/*.md") if page.parent.name != "benchmarks"]
    assert [page for page in sorted(pages) if page not in linked] == []


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("What it buys", "what-it-buys"),
        ("macOS: install", "macos-install"),
        ("启动服务", "启动服务"),
    ],
)
def test_slug_is_githubs(title: str, expected: str) -> None:
    assert slug(title) == expected
