"""Streams tensors into a GGUF file whose header is written: row block by row block, on threads.

Memory is a few blocks per thread, whatever the model's size. The file has a temporary name until it
is whole and on disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.conversion.encode import encode
from autoglm_gguf.conversion.tensors import OutTensor
from autoglm_gguf.errors import CheckpointError, ConversionError
from autoglm_gguf.gguf.header import DEFAULT_ALIGNMENT
from autoglm_gguf.native.ggml import GGMLType, row_bytes, to_float32
from autoglm_gguf.progress import OnProgress, Progress

_BLOCK_ELEMENTS = 1 << 21  # 8 MiB of f32 per thread
F16_MAX = 65504.0
"""The largest value that f16 holds."""
_EXPONENTS = {  # type -> (mask without the sign, all exponent bits)
    GGMLType.F32: (0x7FFFFFFF, 0x7F800000),
    GGMLType.F16: (0x7FFF, 0x7C00),
    GGMLType.BF16: (0x7FFF, 0x7F80),
}


@contextlib.contextmanager
def open_temporary(final: Path) -> Iterator[Path]:
    """A temporary name beside ``final``; renamed on success, removed on any failure."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class TensorWriter:
    """Writes planned tensors behind a GGUF header.

    Args:
        n_threads: Blocks converted at a time.
        total_bytes: Of the whole conversion, for the progress.
        on_progress: Called between blocks, from this thread and others in turn, never at once.
    """

    def __init__(self, n_threads: int, total_bytes: int, on_progress: OnProgress | None) -> None:
        self._n_threads = n_threads
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._done_bytes = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def write(self, path: Path, tensors: list[OutTensor], label: str) -> None:
        """Append the tensors' data to ``path`` and sync it to the disk.

        Args:
            path: Holds the header; grows to its final size.
            tensors: In the order of the header's table.
            label: The final name, for the progress.
        """
        with path.open("r+b") as file:
            start = pad(file.seek(0, os.SEEK_END))
            jobs = _jobs(tensors, start)
            stop = threading.Event()
            with ThreadPoolExecutor(self._n_threads, "convert") as pool:
                workers = [
                    pool.submit(self._work, file, jobs, label, stop) for _ in range(self._n_threads)
                ]
                try:
                    wait(workers, return_when=FIRST_EXCEPTION)
                finally:
                    stop.set()
            for worker in workers:
                worker.result()
            end = start + sum(pad(t.n_bytes) for t in tensors)
            file.truncate(end)  # grows it: the last tensor's padding
            file.flush()
            os.fsync(file.fileno())

    def _work(
        self,
        file: BinaryIO,
        jobs: Iterator[tuple[OutTensor, int, int, int]],
        label: str,
        stop: threading.Event,
    ) -> None:
        while True:
            with self._lock:
                job = next(jobs, None)
            if job is None or stop.is_set():
                return
            tensor, first, last, offset = job
            try:
                data = _convert_rows(tensor, first, last)
                tensor.release(first, last)
            except BaseException:
                stop.set()
                raise
            with self._lock:
                if stop.is_set():
                    return
                try:
                    self._store(file, offset, data, label)
                except BaseException:
                    stop.set()  # under the lock: nobody writes or reports after a failure
                    raise

    def _store(self, file: BinaryIO, offset: int, data: NDArray[np.uint8], label: str) -> None:
        file.seek(offset)
        file.write(data.data)
        self._done_bytes += data.nbytes
        if self._on_progress is not None:
            seconds = time.monotonic() - self._started
            self._on_progress(Progress(label, self._done_bytes, self._total_bytes, seconds))


def _jobs(tensors: list[OutTensor], start: int) -> Iterator[tuple[OutTensor, int, int, int]]:
    """``(tensor, first row, last row, byte offset)`` for every block of every tensor."""
    for tensor in tensors:
        step = max(1, _BLOCK_ELEMENTS // tensor.n_per_row)
        stride = row_bytes(tensor.ggml_type, tensor.n_per_row)
        for first in range(0, tensor.n_rows, step):
            yield tensor, first, min(first + step, tensor.n_rows), start + first * stride
        start += pad(tensor.n_bytes)


def _convert_rows(tensor: OutTensor, first: int, last: int) -> NDArray[np.uint8]:
    block = tensor.rows(first, last)
    source = tensor.source
    check_finite(tensor, block)
    if source.ggml_type == tensor.ggml_type:
        return block.view(np.uint8)
    values = to_float32(block, source.ggml_type)
    if tensor.ggml_type == GGMLType.F16 and float(np.abs(values).max()) > F16_MAX:
        raise ConversionError(
            f"checkpoint: tensor {source.name!r} holds values beyond f16's {F16_MAX:g}",
            hint="convert to bf16, or to a quantised type",
        )
    return encode(values, tensor.ggml_type, tensor.imatrix, search=tensor.search)


def check_finite(tensor: OutTensor, block: NDArray[Any]) -> None:
    """Refuse rows that hold infinity or NaN: all exponent bits set, in each of the formats.

    Raises:
        CheckpointError: They do.
    """
    bits = block.view(np.uint32) if block.dtype.itemsize == 4 else block
    magnitude, exponent = _EXPONENTS[tensor.source.ggml_type]
    if int((bits & bits.dtype.type(magnitude)).max()) >= exponent:
        raise CheckpointError(
            f"checkpoint: tensor {tensor.source.name!r} holds NaN or infinity",
            hint="download the checkpoint again; if it stays, the published weights are broken",
        )


def pad(n_bytes: int) -> int:
    """Bytes of a tensor's data with what follows it up to the next one."""
    return -(-n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
