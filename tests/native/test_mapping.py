"""llama.cpp maps files with all their pages, and without where it is told to."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
from mapped import resident_of

from autoglm_gguf.native.library import load_ggml
from autoglm_gguf.native.llama import LlamaModel
from autoglm_gguf.native.mapping import without_populating

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def resident_after_load(path: Path) -> int:
    model = LlamaModel(path)
    try:
        return resident_of(path)
    finally:
        model.close()


def test_model_is_mapped_with_all_its_pages_unless_it_is_told_otherwise(
    random_pair: tuple[Path, Path],
) -> None:
    path = random_pair[0]
    weights = path.stat().st_size // 2  # the vocabulary before them is unmapped after the load
    assert resident_after_load(path) > weights
    with without_populating():
        assert resident_after_load(path) == 0
    assert resident_after_load(path) > weights


def test_everything_else_is_answered_as_before() -> None:
    lib = load_ggml()
    pointer = ctypes.c_void_p
    device = pointer(lib.ggml_backend_dev_by_type(0))
    registry = pointer(lib.ggml_backend_dev_backend_reg(device))
    names = (b"ggml_backend_set_n_threads", b"ggml_backend_dev_get_extra_bufts", b"no such thing")
    before = [lib.ggml_backend_reg_get_proc_address(registry, name) for name in names]
    with without_populating():
        during = [lib.ggml_backend_reg_get_proc_address(registry, name) for name in names]
    assert during == before
    assert all(before[:2])
    assert not before[2]


def test_entry_is_restored_after_an_error(random_pair: tuple[Path, Path]) -> None:
    with pytest.raises(ZeroDivisionError), without_populating():
        raise ZeroDivisionError
    assert resident_after_load(random_pair[0]) > 0
