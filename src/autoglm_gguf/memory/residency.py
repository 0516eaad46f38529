"""Which pages of a mapped model stay in memory, and which pass through.

Three kinds of layer: *copied* ones lie in anonymous memory, which nothing takes away where there is
no swap, and need no right to lock; *mapped* ones stay in the mapping while tokens are made and
give way to the vision tower while an image is encoded; *streamed* ones are read one ahead of the
computation and dropped behind it. Linux and macOS; knows byte spans, not what is in them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

from autoglm_gguf.errors import EngineError
from autoglm_gguf.native import pages
from autoglm_gguf.native.mapping import without_populating

LAYERS_AHEAD = 1
"""Streamed layers that are read while another is in use."""
Span = tuple[int, int]


class LoadWatch:
    """Keeps a mapping small while llama.cpp loads it: what a tensor touched goes before the next.

    Use as a context manager around the load, which calls `look` before each tensor.

    Args:
        path: The file that is being mapped.
        enabled: Do nothing if False.
    """

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self._path = path
        self._enabled = enabled and pages.SUPPORTED
        self._descriptor = -1
        self._is_first = True
        self._undo = contextlib.ExitStack()

    def look(self) -> None:
        """Drop the pages that were touched since the last look."""
        if not self._enabled:
            return
        # Found anew each time: at its end the load unmaps what it has copied, and dropping pages
        # there would empty whatever memory comes to lie in its place.
        for mapping in pages.find_mappings(self._path):
            if self._is_first:
                pages.expect_any_reads(mapping)
            end = mapping.offset + mapping.n_bytes
            pages.drop_pages(mapping, mapping.offset, end, self._descriptor)
        self._is_first = False

    def __enter__(self) -> LoadWatch:
        if self._enabled:
            self._descriptor = os.open(self._path, os.O_RDONLY)
            self._undo.callback(os.close, self._descriptor)
            self._undo.enter_context(without_populating())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()


class Residency:
    """Drops and reads ahead the pages of one mapped file; close it before the file is unmapped.

    Args:
        path: The mapped file.
        streamed: Layer number to its span of file bytes, in the order of computation.
        yielding: Spans that are dropped by `give_way`.
        scattered: Spans of which single pages are read here and there.
        cache_is_scarce: The page cache cannot hold the streamed layers: what was used is dropped
            there too, so that the system need not choose.
    """

    def __init__(
        self,
        path: Path,
        *,
        streamed: Mapping[int, Span],
        yielding: Sequence[Span] = (),
        scattered: Sequence[Span] = (),
        cache_is_scarce: Callable[[], bool],
    ) -> None:
        self._mappings = pages.find_mappings(path)
        if not self._mappings:
            raise EngineError(
                f"{path.name}: its pages cannot be found in this process, so the memory budget "
                "cannot be kept",
                hint="copy the file to a local disk, or give --memory-budget none",
            )
        self._descriptor = os.open(path, os.O_RDONLY)
        self._streamed = dict(streamed)
        self._yielding = list(yielding)
        self._cache_is_scarce = cache_is_scarce
        for start, end in scattered:
            for mapping in self._mappings:
                pages.expect_scattered_reads(mapping, start, end)
        order = list(self._streamed)
        self._next = {
            layer: order[(at + LAYERS_AHEAD) % len(order)] for at, layer in enumerate(order)
        }
        self._wanted: list[int] = []
        self._ready: set[int] = set()
        self._reading: int | None = None
        self._is_late = False
        """The computation has passed the layer that is being read: it is dropped when read."""
        self._drops: dict[int, Future[None]] = {}
        self._dropper = ThreadPoolExecutor(1, "drop")
        self._changed = threading.Condition()
        self._closed = False
        pages.read_exactly_what_is_asked(self._descriptor)
        self._reader = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        if order:
            self._reader.start()

    @property
    def watched_layers(self) -> tuple[int, ...]:
        """The layers after which `passed` must be called: streamed ones and those before them."""
        before = {layer - 1 for layer in self._streamed if layer > 0}
        return tuple(sorted(before | self._streamed.keys()))

    def begin(self) -> None:
        """A batch is about to start."""
        self._want(list(self._streamed)[:LAYERS_AHEAD])
        self._enter(0)

    def passed(self, layer: int) -> None:
        """The computation is done with a layer: a streamed one is dropped.

        If the next one is streamed, wait until it is there (faulting it in page by page would read
        more than it), and let the following one be read meanwhile.
        """
        if layer in self._streamed:
            span = self._streamed[layer]
            self._drop(*span)
            with self._changed:
                self._ready.discard(layer)
                self._is_late = self._is_late or layer == self._reading
                if self._cache_is_scarce():
                    # Freeing cached pages takes time that the computation can use: done aside.
                    self._drops[layer] = self._dropper.submit(
                        pages.forget_cached, self._descriptor, *span
                    )
        self._enter(layer + 1)

    def _enter(self, layer: int) -> None:
        if layer not in self._streamed:
            return
        if self._cache_is_scarce():
            with self._changed:
                while not self._closed and layer not in self._ready:
                    if layer not in self._wanted and layer != self._reading:
                        self._wanted.insert(0, layer)
                        self._changed.notify_all()
                    self._changed.wait()
        self._want([self._next[layer]])

    def give_way(self) -> None:
        """Drop all that may be dropped from this process; it comes back as it is used."""
        with self._changed:
            self._wanted.clear()
            while self._reading is not None and not self._closed:
                self._changed.wait()
            self._ready.clear()
            drops = list(self._drops.values())
        wait(drops)
        for span in [*self._yielding, *self._streamed.values()]:
            self._let_go(span)

    def drop_all(self) -> None:
        """Drop every page of the file from this process, as after a load."""
        size = os.fstat(self._descriptor).st_size
        self._drop(0, size)
        if self._cache_is_scarce():
            pages.forget_cached(self._descriptor, 0, size)

    def close(self) -> None:
        """Stop reading ahead."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._reader.ident is not None:
            self._reader.join()
        self._dropper.shutdown()
        os.close(self._descriptor)

    def _let_go(self, span: Span) -> None:
        """Drop a span from this process, and from the page cache where that is too small."""
        self._drop(*span)
        if self._cache_is_scarce():
            pages.forget_cached(self._descriptor, *span)

    def _drop(self, start: int, end: int) -> None:
        for mapping in self._mappings:
            pages.drop_pages(mapping, start, end, self._descriptor)

    def _want(self, layers: Sequence[int]) -> None:
        with self._changed:
            known = {*self._wanted, *self._ready, self._reading}
            self._wanted += [layer for layer in layers if layer not in known]
            self._changed.notify_all()

    def _read(self) -> None:
        while True:
            with self._changed:
                while not self._wanted and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                layer = self._reading = self._wanted.pop(0)
                pending = self._drops.pop(layer, None)
            if pending is not None:
                wait([pending])  # or what is read now would be dropped
            start, end = self._streamed[layer]
            holding = [m for m in self._mappings if m.offset <= start < m.offset + m.n_bytes]
            mapping = holding[0] if holding else None
            try:
                with contextlib.suppress(OSError):  # the computation meets the same pages
                    pages.read_in(mapping, self._descriptor, start, end, lambda: self._closed)
            finally:  # or the computation would wait for ever
                with self._changed:
                    if self._is_late:
                        self._drop(start, end)
                    else:
                        self._ready.add(layer)
                    self._reading, self._is_late = None, False
                    self._changed.notify_all()
