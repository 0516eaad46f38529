"""Pages of a mapped file on Linux: where they are, how many are held, and letting go of them."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mapped import MappedFile, nearly_all, open_mapped

from autoglm_gguf.native import pages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

PAGE = mmap.PAGESIZE


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[MappedFile]:
    with open_mapped(tmp_path / "weights file.bin", 64 * PAGE) as found:
        yield found


def test_mapping_is_found_where_it_is(mapped: MappedFile) -> None:
    assert pages.find_mappings(mapped.path) == [pages.Mapping(mapped.address, 64 * PAGE, 0)]


def test_mapping_is_found_through_a_link(mapped: MappedFile) -> None:
    link = mapped.path.with_name("link")
    link.symlink_to(mapped.path)
    assert len(pages.find_mappings(link)) == 1


def test_mapping_of_a_part_knows_its_offset(mapped: MappedFile) -> None:
    with mapped.path.open("rb") as file:
        part = mmap.mmap(file.fileno(), 4 * PAGE, access=mmap.ACCESS_READ, offset=16 * PAGE)
    with part:
        found = pages.find_mappings(mapped.path)
        assert (4 * PAGE, 16 * PAGE) in [(m.n_bytes, m.offset) for m in found]


def test_file_that_is_not_mapped_has_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(PAGE))
    assert pages.find_mappings(tmp_path / "other") == []


@pytest.mark.parametrize(
    ("start", "end", "n_dropped"),
    [
        (0, 64 * PAGE, 64),
        (8 * PAGE, 16 * PAGE, 8),
        (8 * PAGE - 1, 16 * PAGE + 1, 8),  # neighbours' pages stay
        (8 * PAGE + 1, 16 * PAGE - 1, 6),
        (100, 200, 0),
        (60 * PAGE, 999 * PAGE, 4),  # beyond the mapping
        (999 * PAGE, 1000 * PAGE, 0),
        (9 * PAGE, 9 * PAGE, 0),
    ],
)
def test_whole_pages_inside_a_span_are_dropped(
    mapped: MappedFile, start: int, end: int, n_dropped: int
) -> None:
    mapped.touch()
    assert mapped.resident_bytes() == 64 * PAGE
    pages.drop_pages(pages.find_mappings(mapped.path)[0], start, end, mapped.descriptor)
    assert mapped.resident_bytes() == (64 - n_dropped) * PAGE


def test_dropped_pages_come_back_as_they_were(mapped: MappedFile) -> None:
    before = mapped.touch()
    pages.drop_pages(pages.find_mappings(mapped.path)[0], 0, 64 * PAGE, mapped.descriptor)
    assert mapped.touch() == before


def test_bytes_are_read_in_before_they_are_used(tmp_path: Path) -> None:
    with open_mapped(tmp_path / "file", 64 << 20) as mapped:
        mapped.forget()
        pages.read_exactly_what_is_asked(mapped.descriptor)
        pages.read_in(None, mapped.descriptor, 8 << 20, 24 << 20, lambda: False)
        assert mapped.is_cached(8 << 20, 24 << 20, nearly_all)
        assert not mapped.is_cached(0, 8 << 20, any)
        assert not mapped.is_cached(24 << 20, 64 << 20, any)


def test_bytes_are_read_in_through_the_mapping(tmp_path: Path) -> None:
    with open_mapped(tmp_path / "file", 64 << 20) as mapped:
        mapped.forget()
        mapping = pages.find_mappings(mapped.path)[0]
        pages.read_exactly_what_is_asked(mapped.descriptor)
        pages.read_in(mapping, mapped.descriptor, 0, 64 << 20, lambda: False)
        assert mapped.is_cached(0, 64 << 20, nearly_all)


def test_part_whose_edges_alone_are_cached_is_read_in(tmp_path: Path) -> None:
    """Asking for a page without waiting may read it: two such pages are no sign of the rest."""
    with open_mapped(tmp_path / "file", 8 << 20) as mapped:
        mapped.forget()
        pages.read_exactly_what_is_asked(mapped.descriptor)
        for at in (0, (4 << 20) - PAGE, 4 << 20, (8 << 20) - PAGE):
            os.pread(mapped.descriptor, 1, at)
        assert not mapped.is_cached(PAGE, (4 << 20) - PAGE, any)
        mapping = pages.find_mappings(mapped.path)[0]
        pages.read_in(mapping, mapped.descriptor, 0, 8 << 20, lambda: False)
        assert mapped.is_cached(0, 8 << 20, nearly_all)


def test_part_that_is_cached_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    with open_mapped(tmp_path / "file", 8 << 20) as mapped:
        mapped.touch()
        mapping = pages.find_mappings(mapped.path)[0]
        monkeypatch.setattr(os, "preadv", lambda *_: reads.append(1))
        pages.read_in(mapping, mapped.descriptor, 0, 8 << 20, lambda: False)
    assert reads == []


def test_reading_in_ends_when_it_is_stopped(tmp_path: Path) -> None:
    with open_mapped(tmp_path / "file", 16 << 20) as mapped:
        mapped.forget()
        pages.read_in(None, mapped.descriptor, 0, 16 << 20, lambda: True)
        assert not mapped.is_cached(0, 16 << 20, any)


def test_cached_bytes_are_forgotten(tmp_path: Path) -> None:
    with open_mapped(tmp_path / "file", 1 << 20) as mapped:
        mapped.forget()  # skips where the file system keeps them
        os.pread(mapped.descriptor, 1 << 20, 0)
        assert mapped.is_cached(0, 1 << 20, nearly_all)
        pages.forget_cached(mapped.descriptor, 0, 1 << 20)
        assert not mapped.is_cached(0, 1 << 20, any)


def test_cached_file_is_forgotten(tmp_path: Path) -> None:
    with open_mapped(tmp_path / "file", 1 << 20) as mapped:
        mapped.forget()
        os.pread(mapped.descriptor, 1 << 20, 0)
        pages.forget_file(mapped.path)
        assert not mapped.is_cached(0, 1 << 20, any)


def test_scattered_reads_find_what_is_there(mapped: MappedFile) -> None:
    pages.expect_scattered_reads(pages.find_mappings(mapped.path)[0], 0, 64 * PAGE)
    assert mapped.touch() == mapped.path.read_bytes()[::PAGE]


def test_free_memory_is_returned() -> None:
    pages.return_free_memory()
