"""Which pages of a mapped file stay, on Linux: dropped, given way, read ahead, watched at load."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mapped import MappedFile, nearly_all, open_mapped, resident_of

from autoglm_gguf import EngineError
from autoglm_gguf.memory.residency import LoadWatch, Residency, Span
from autoglm_gguf.native import pages
from autoglm_gguf.native.llama import LlamaModel

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MIB = 2**20
N_LAYERS = 8


def layer(n: int) -> Span:
    return n * 4 * MIB, (n + 1) * 4 * MIB


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[MappedFile]:
    """Eight layers of 4 MiB."""
    with open_mapped(tmp_path / "model.gguf", N_LAYERS * 4 * MIB) as found:
        yield found


@contextmanager
def reside(
    mapped: MappedFile,
    streamed: tuple[int, ...] = (),
    yielding: tuple[int, ...] = (),
    *,
    scarce: bool = False,
) -> Iterator[Residency]:
    residency = Residency(
        mapped.path,
        streamed={n: layer(n) for n in streamed},
        yielding=[layer(n) for n in yielding],
        cache_is_scarce=lambda: scarce,
    )
    try:
        yield residency
    finally:
        residency.close()


def held(mapped: MappedFile) -> list[int]:
    """The layers this process holds, whole or in part."""
    return [n for n in range(N_LAYERS) if mapped.resident_bytes(*layer(n))]


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_streamed_layer_is_dropped_when_it_is_passed(mapped: MappedFile) -> None:
    with reside(mapped, streamed=(1, 4)) as residency:
        mapped.touch()
        residency.passed(1)
        assert held(mapped) == [0, 2, 3, 4, 5, 6, 7]
        residency.passed(4)
        assert held(mapped) == [0, 2, 3, 5, 6, 7]


def test_layers_that_stay_are_not_dropped(mapped: MappedFile) -> None:
    with reside(mapped, streamed=(1, 4)) as residency:
        mapped.touch()
        residency.passed(0)
        residency.passed(3)
        assert held(mapped) == list(range(N_LAYERS))


def test_watched_layers_are_the_streamed_ones_and_those_before_them(mapped: MappedFile) -> None:
    with reside(mapped, streamed=(0, 3, 4)) as residency:
        assert residency.watched_layers == (0, 2, 3, 4)
    with reside(mapped, yielding=(3,)) as residency:
        assert residency.watched_layers == ()


def test_yielding_layers_give_way_and_come_back(mapped: MappedFile) -> None:
    with reside(mapped, streamed=(1,), yielding=(2, 5)) as residency:
        before = mapped.touch()
        residency.give_way()
        assert held(mapped) == [0, 3, 4, 6, 7]  # what was read ahead goes too
        assert mapped.touch() == before
        assert held(mapped) == list(range(N_LAYERS))


def test_everything_is_dropped_after_a_load(mapped: MappedFile) -> None:
    with reside(mapped, yielding=(2,)) as residency:
        mapped.touch()
        residency.drop_all()
        assert held(mapped) == []


@pytest.mark.parametrize("scarce", [False, True])
def test_first_streamed_layer_is_read_when_a_batch_begins(mapped: MappedFile, scarce: bool) -> None:
    mapped.forget()
    with reside(mapped, streamed=(2, 5), scarce=scarce) as residency:
        residency.begin()
        wait_until(lambda: mapped.is_cached(*layer(2), nearly_all))
        assert not mapped.is_cached(*layer(5), any)


def test_next_streamed_layer_is_read_while_one_is_in_use(mapped: MappedFile) -> None:
    mapped.forget()
    with reside(mapped, streamed=(2, 5)) as residency:
        residency.begin()
        residency.passed(1)
        wait_until(lambda: mapped.is_cached(*layer(5), nearly_all))
        residency.passed(2)
        residency.passed(4)  # the last one asks for the first: the next batch needs it


def test_computation_waits_for_a_layer_where_the_cache_is_scarce(mapped: MappedFile) -> None:
    mapped.forget()
    with reside(mapped, streamed=(0, 5), scarce=True) as residency:
        residency.begin()
        assert mapped.is_cached(*layer(0), nearly_all)
        residency.passed(4)
        assert mapped.is_cached(*layer(5), nearly_all)


@pytest.mark.parametrize("scarce", [False, True])
def test_used_layer_leaves_the_page_cache_only_where_it_is_scarce(
    mapped: MappedFile, scarce: bool
) -> None:
    mapped.forget()
    mapped.touch()
    with reside(mapped, streamed=(3,), yielding=(6,), scarce=scarce) as residency:
        residency.passed(3)
        wait_until(lambda: mapped.is_cached(*layer(3), nearly_all) is not scarce)
        residency.give_way()
        assert mapped.is_cached(*layer(6), nearly_all) is not scarce


def test_many_batches_read_every_layer_again(mapped: MappedFile) -> None:
    mapped.forget()
    with reside(mapped, streamed=(0, 2, 4, 6), scarce=True) as residency:
        for _ in range(5):
            residency.begin()
            for n in range(N_LAYERS):
                if n in (0, 2, 4, 6):
                    assert mapped.is_cached(*layer(n), nearly_all)
                if n in residency.watched_layers:
                    residency.passed(n)


def test_closing_ends_the_reader(mapped: MappedFile) -> None:
    with reside(mapped, streamed=(0, 1, 2)) as residency:
        residency.begin()
        assert "read-ahead" in [thread.name for thread in threading.enumerate()]
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]


def test_file_that_is_not_mapped_is_an_error(tmp_path: Path) -> None:
    """Its pages could not be dropped: the budget would be a word."""
    (tmp_path / "m.gguf").write_bytes(bytes(MIB))
    with pytest.raises(EngineError, match=r"m\.gguf: its pages cannot be found"):
        Residency(tmp_path / "m.gguf", streamed={}, cache_is_scarce=lambda: False)


# --- the load ---


@pytest.mark.native
def test_load_watch_drops_what_was_touched_since_the_last_look(mapped: MappedFile) -> None:
    with LoadWatch(mapped.path) as watch:
        for _ in range(2):
            mapped.touch()
            watch.look()
            assert held(mapped) == []


@pytest.mark.native
def test_load_watch_leaves_what_took_the_place_of_pages_that_were_unmapped(tmp_path: Path) -> None:
    """At its end the load unmaps what it has copied; anything may come to lie there."""
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(4 * MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        with LoadWatch(path) as watch:
            watch.look()
            (mapping,) = pages.find_mappings(path)
            libc = ctypes.CDLL(None)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = (
                *(ctypes.c_void_p, ctypes.c_size_t),
                *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
            )
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
            both = mmap.PROT_READ | mmap.PROT_WRITE
            place = libc.mmap(mapping.address + MIB, MIB, both, kind, -1, 0)
            ctypes.memset(place, 7, MIB)
            watch.look()
            assert ctypes.string_at(place, MIB) == bytes([7]) * MIB
        assert view[0] == 0


def test_load_watch_does_nothing_when_disabled(mapped: MappedFile) -> None:
    with LoadWatch(mapped.path, enabled=False) as watch:
        mapped.touch()
        watch.look()
        assert held(mapped) == list(range(N_LAYERS))


@pytest.mark.native
def test_load_watch_waits_for_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(MIB))
    with LoadWatch(path) as watch:
        watch.look()


@pytest.mark.native
def test_load_that_is_watched_stays_small_although_the_file_is_cached(
    random_pair: tuple[Path, Path],
) -> None:
    """llama.cpp's own way maps every page; nothing could drop them soon enough."""
    path = random_pair[0]
    seen: list[int] = []
    with LoadWatch(path) as watch:

        def look() -> None:
            watch.look()
            seen.append(resident_of(path))

        LlamaModel(path, on_tensor=look).close()
    assert len(seen) > 10
    assert max(seen) < 64 * 1024  # the edges that the tensors share with what lies around them
