"""Temporary files, padding and progress."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from autoglm_gguf import Progress
from autoglm_gguf.checkpoint.safetensors import LazyTensor
from autoglm_gguf.conversion.tensors import OutTensor
from autoglm_gguf.conversion.writer import TensorWriter, open_temporary
from autoglm_gguf.native.ggml import GGMLType

pytestmark = pytest.mark.native  # row sizes are ggml's


def f32(name: str, values: np.ndarray, order: np.ndarray | None = None) -> OutTensor:
    source = LazyTensor(name, values.shape, GGMLType.F32, values)
    return OutTensor(name, values.shape, GGMLType.F32, source, lambda: values, order)


def test_open_temporary_lies_beside_the_final_name(tmp_path: Path) -> None:
    final = tmp_path / "m.gguf"
    with open_temporary(final) as part:
        assert part.parent == tmp_path
        assert part.suffix != ".gguf", "no glob for models may find it"
        part.write_bytes(b"x")
        part.replace(final)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_open_temporary_leaves_nothing_on_failure(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), open_temporary(tmp_path / "m.gguf") as part:
        part.write_bytes(b"x")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n_threads", [1, 4])
def test_writer_puts_tensors_at_multiples_of_32_bytes(tmp_path: Path, n_threads: int) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"H" * 40)
    one, two = np.arange(3, dtype=np.float32)[None], np.arange(20, dtype=np.float32).reshape(5, 4)
    reverse = np.array([4, 3, 2, 1, 0])
    TensorWriter(n_threads, 92, None).write(path, [f32("a", one), f32("b", two, reverse)], "m")
    data = path.read_bytes()
    assert data[:40] == b"H" * 40
    assert data[64 : 64 + 12] == one.tobytes()
    assert data[96 : 96 + 80] == two[::-1].tobytes()
    assert len(data) == 192, "the last tensor is padded too"


def test_writer_splits_large_tensors_and_reports_between_blocks(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.touch()
    values = np.arange(3 * 2**20, dtype=np.float32).reshape(-1, 1024)  # 12 MiB: two blocks
    seen: list[Progress] = []
    TensorWriter(2, values.nbytes, seen.append).write(path, [f32("a", values)], "final.gguf")
    assert path.read_bytes() == values.tobytes()
    assert len(seen) == 2
    assert {p.file for p in seen} == {"final.gguf"}
    assert seen[-1].done_bytes == seen[-1].total_bytes == values.nbytes
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)


def test_writer_never_reports_from_two_threads_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.touch()
    busy = threading.Lock()

    def report(_: Progress) -> None:
        assert busy.acquire(blocking=False)
        busy.release()

    tensors = [f32(str(n), np.ones((64, 64), np.float32)) for n in range(50)]
    TensorWriter(8, 50 * 16384, report).write(path, tensors, "m")


def test_writer_raises_what_a_tensor_raises(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.touch()

    def fail() -> np.ndarray:
        raise MemoryError

    source = LazyTensor("a", (1, 4), GGMLType.F32, np.ones((1, 4), np.float32))
    tensor = OutTensor("a", (1, 4), GGMLType.F32, source, fail)
    with pytest.raises(MemoryError):
        TensorWriter(2, 16, None).write(path, [tensor, f32("b", np.ones((1, 4)))], "m")


def test_progress_estimates_the_rest_at_the_speed_so_far() -> None:
    assert Progress("m", 25, 100, 5.0).seconds_left == 15.0
    assert Progress("m", 0, 100, 5.0).seconds_left == 0.0
