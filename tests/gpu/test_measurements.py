"""Measurements with layers on a GPU give the CPU's figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autoglm_gguf import Corpus, calibrate, evaluate_divergence, evaluate_perplexity
from autoglm_gguf.conversion.imatrix import read_imatrix

pytestmark = pytest.mark.gpu
TEXT = Path(__file__).parents[1] / "evaluate" / "golden" / "text.txt"
CORPUS = Corpus(TEXT, n_ctx=64, n_chunks=2)


def test_importance_matrix_is_the_cpus(
    tiny_pair: Callable[[str], tuple[Path, Path]], device: str, tmp_path: Path
) -> None:
    text = tiny_pair("q8_0")[0]
    found = []
    for layers in (0, 3, "all"):
        path = tmp_path / f"{layers}.gguf"
        places = {"n_gpu_layers": layers} | ({"device": device} if layers else {})
        calibrate(text, CORPUS, path, process_output=True, self_test=False, **places)
        found.append(read_imatrix(path).columns)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, values in found[0].items():
            assert np.linalg.norm(other[name] - values) < 0.02 * np.linalg.norm(values), name


def test_divergence_from_the_cpus_base_is_small(
    tiny_pair: Callable[[str], tuple[Path, Path]], device: str, tmp_path: Path
) -> None:
    text, base = tiny_pair("q8_0")[0], tmp_path / "base"
    evaluate_perplexity(text, CORPUS, save_base=base, n_gpu_layers=0)
    places = {"n_gpu_layers": "all", "device": device}
    found = evaluate_divergence(text, base, self_test=False, **places)
    assert found.kl_divergence.mean < 1e-3
    assert found.same_top.value > 0.98
