"""What mkdocs needs to know of this repository; a hook of mkdocs.yml.

The pages are written for the repository: the README is not in docs/, and links lead to sources.
In the site, what lies outside docs/ and is linked lies beside its pages. After the build every page
is searched for files of other hosts: the site has to work without a network.
"""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
INDEX = "index.md"  # the README's place
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
_PAGES = ("README.md", "README.zh.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write out folders of the nav: each page of one, in the order of their names."""
    config.nav = [_expanded(entry) for entry in config.nav or []]
    return config


def _expanded(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_expanded(inner) for inner in entry]
    if isinstance(entry, dict):
        return {title: _expanded(inner) for title, inner in entry.items()}
    if isinstance(entry, str) and entry.endswith("/"):
        docs = ROOT / "docs"
        return [path.relative_to(docs).as_posix() for path in sorted((docs / entry).glob("*.md"))]
    return entry


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and the files that any page links to."""
    for name in _PAGES:
        uri = INDEX if name == "README.md" else name
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    pages = [file for file in files if file.src_uri.endswith(".md")]
    while pages:
        for target in _linked(pages.pop()):
            uri = target.relative_to(ROOT).as_posix()
            if target.is_file() and not files.get_file_from_path(_uri(target)):
                file = File.generated(config, uri, abs_src_path=str(target))
                files.append(file)
                pages += [file] if uri.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where their files lie in the site."""
    source = _source(page.file)
    here = Path(page.file.src_uri).parent

    def moved(found: re.Match[str]) -> str:
        target = _target(source, found[1])
        if target is None or not target.is_file():
            return found[1]
        return Path(os.path.relpath(_uri(target), here)).as_posix()

    return _LINK.sub(moved, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would load something of another host.

    Raises:
        PluginError: A page does; it is named.
    """
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        seeker = _Foreign()
        seeker.feed(path.read_text("utf-8"))
        if seeker.found:
            raise PluginError(f"{path.name}: loads {seeker.found[0]}")
    for path in sorted(Path(config.site_dir).rglob("*.css")):
        found = re.search(
            r"url\([\"']?(?:https?:)?//[^)]*\)|@import\s+[\"']?(?:https?:)?//",
            path.read_text("utf-8"),
        )
        if found:
            raise PluginError(f"{path.name}: loads {found[0]}")


class _Foreign(HTMLParser):
    """Collects what a page loads from elsewhere; links to follow are no matter."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loads = given.get("href") if tag == "link" else given.get("src")
        if loads and re.match(r"(?:https?:)?//", loads):
            self.found.append(loads)


def _source(file: File) -> Path:
    return Path(file.abs_src_path or "").resolve()


def _target(source: Path, link: str) -> Path | None:
    """The file that a link means; None for another host's, and for one outside the repository."""
    if re.match(r"\w+:", link):
        return None
    target = (source.parent / link).resolve()
    return target if target.is_relative_to(ROOT) else None


def _uri(target: Path) -> str:
    """Where a file of the repository lies in the site."""
    docs = ROOT / "docs"
    if target == ROOT / "README.md":
        return INDEX
    return target.relative_to(docs if target.is_relative_to(docs) else ROOT).as_posix()


def _linked(file: File) -> list[Path]:
    """Files outside docs/ that a page links to."""
    source = _source(file)
    found = (_target(source, link) for link in _LINK.findall(source.read_text("utf-8")))
    return [path for path in found if path and not path.is_relative_to(ROOT / "docs")]
