"""Files exchanged with llama.cpp's own tools.

Collected only where AUTOGLM_GGUF_LLAMA_TOOLS names the folder of llama-imatrix, llama-perplexity
and llama-quantize, built from the pinned commit (see golden/make_golden.py): CI has none, and the
files that they wrote are in golden.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autoglm_gguf import Corpus, calibrate, convert, evaluate_divergence, evaluate_perplexity
from autoglm_gguf.conversion.imatrix import read_imatrix

pytestmark = [pytest.mark.native, pytest.mark.slow]
TOOLS = Path(os.environ["AUTOGLM_GGUF_LLAMA_TOOLS"])
TEXT = Path(__file__).parent / "golden" / "text.txt"
TINY = Path(__file__).parents[2] / "models" / "autoglm-tiny"
N_CTX = 256


def run(name: str, *arguments: object, last: str = "") -> str:
    """What a tool says, up to its last line: at their end they may lose what is not shown yet."""
    command = [str(TOOLS / name), *map(str, arguments)]
    for _ in range(20):
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        if last in (said := result.stdout + result.stderr):
            return said
    raise AssertionError(f"{name} never said {last!r}")


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_importance_matrix_equals_theirs(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    text = tiny_pair(kind)[0]
    theirs = tmp_path / "theirs.gguf"
    run("llama-imatrix", "-m", text, "-f", TEXT, "-c", N_CTX, "-o", theirs, "--process-output")
    made = calibrate(text, Corpus(TEXT, n_ctx=N_CTX), tmp_path / "ours.gguf", process_output=True)
    first, second = read_imatrix(made.path).columns, read_imatrix(theirs).columns
    assert first.keys() == second.keys()
    for name, values in second.items():
        assert np.linalg.norm(first[name] - values) < 0.01 * np.linalg.norm(values), name


def test_llama_quantize_takes_ours(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """And makes of it what it makes of llama-imatrix's file with the same numbers."""
    full = tiny_pair("f32")[0]
    ours = calibrate(full, Corpus(TEXT, n_ctx=N_CTX), tmp_path / "ours.gguf").path
    said = run("llama-quantize", "--imatrix", ours, full, tmp_path / "small.gguf", "Q4_K_M", "2")
    assert "loaded 36 importance matrix entries" in said
    assert "datasets=['text.txt']" in said
    plain = tmp_path / "plain.gguf"
    run("llama-quantize", full, plain, "Q4_K_M", "2")
    assert plain.read_bytes() != (tmp_path / "small.gguf").read_bytes()


def test_llama_perplexity_takes_our_base(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    evaluate_perplexity(tiny_pair("f32")[0], Corpus(TEXT, n_ctx=N_CTX), save_base=base)
    said = run(
        "llama-perplexity",
        *("-m", tiny_pair("q4_0")[0], "-c", N_CTX),
        *("--kl-divergence-base", base, "--kl-divergence"),
        last="Same top p:",
    )
    match = re.search(r"Mean +KLD: +([\d.]+) ± +([\d.]+)", said)
    assert match is not None, said
    found = evaluate_divergence(tiny_pair("q4_0")[0], base).kl_divergence
    assert abs(found.mean - float(match[1])) < float(match[2]) / 4


def test_we_take_llama_perplexitys_base(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    run(
        "llama-perplexity",
        *("-m", tiny_pair("f32")[0], "-f", TEXT, "-c", N_CTX, "--kl-divergence-base", base),
    )
    assert evaluate_divergence(tiny_pair("f32")[0], base).kl_divergence.mean < 1e-4


def test_importance_matrix_lowers_the_divergence(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    corpus = Corpus(TEXT, n_ctx=N_CTX)
    evaluate_perplexity(tiny_pair("f32")[0], corpus, save_base=base)
    imatrix = calibrate(tiny_pair("q8_0")[0], corpus, tmp_path / "imatrix.gguf").path
    plain = convert(TINY, tmp_path / "plain", "q3_K").text
    weighted = convert(TINY, tmp_path / "weighted", "q3_K", imatrix=imatrix).text
    first, second = (evaluate_divergence(m, base).kl_divergence.mean for m in (plain, weighted))
    assert second < first
