"""The tables of docs/reference/verify.md say what `verify` holds files to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from autoglm_gguf.evaluate.parity import LOWEST_COSINE, LOWEST_EMBEDDING_COSINE
from autoglm_gguf.evaluate.weights import GAUSSIAN_RELATIVE_RMSE, LARGEST_RELATIVE_RMSE

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "verify.md"


def table(heading: str) -> dict[str, list[float]]:
    """The table below a heading: type to its other cells."""
    section = PAGE.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [number(cell) for cell in cells[1:]] for cells in rows[2:]}


def number(cell: str) -> float:
    cell = cell.strip()
    return float(cell[:-1]) / 100 if cell.endswith("%") else float(cell)


def test_page_states_the_limits_of_weights() -> None:
    stated = table("Weights")
    assert stated.keys() == LARGEST_RELATIVE_RMSE.keys()
    for kind, (limit, cosine, gaussian, *measured) in stated.items():
        assert limit == pytest.approx(LARGEST_RELATIVE_RMSE[kind], rel=0.005)
        assert cosine == pytest.approx(math.sqrt(1 - limit**2), abs=5e-4)
        assert gaussian == pytest.approx(GAUSSIAN_RELATIVE_RMSE.get(kind, gaussian), rel=1e-6)
        assert max(gaussian, *measured) <= limit


def test_page_states_the_thresholds_of_logits() -> None:
    stated = table("Logits")
    assert {kind: cells[0] for kind, cells in stated.items()} == LOWEST_COSINE
    for required, tiny, *_ in stated.values():
        assert 1 - required >= 2.5 * (1 - tiny) - 1e-9


def test_page_states_the_thresholds_of_image_embeddings() -> None:
    stated = table("Image embeddings")
    assert {kind: cells[0] for kind, cells in stated.items()} == LOWEST_EMBEDDING_COSINE
    assert all(tiny >= required for required, tiny, _ in stated.values())
