"""``evaluate actions`` on real pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_gguf.cli.main import main

TINY = Path(__file__).parents[2] / "models" / "autoglm-tiny"


@pytest.mark.native
def test_evaluate_prints_a_row_for_each_size(
    acting_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--screens", "2", "--max-image-tokens", "8,32", "--no-system", "--n-threads", "1"]
    assert main(["evaluate", "actions", str(acting_model), *options]) == 0
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert "held-out screens of 720x1440 px, seed 20261123" in first
    assert [row.split() for row in rows] == [
        ["model", "8", "2", "0.0%", "0.0%", "0", "-"],  # it launches an app, whatever is asked
        ["model", "32", "2", "0.0%", "0.0%", "0", "-"],
    ]


@pytest.mark.native
@pytest.mark.reference
def test_evaluate_against_the_original_prints_json(
    tiny_pair: Callable[[str], tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    text, mmproj = tiny_pair("f32")
    options = ["--mmproj", str(mmproj), "--screens", "1", "--max-image-tokens", "32", "--no-system"]
    assert main(["evaluate", "actions", str(text), "--json", "--against", str(TINY), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    [size], [attempt] = report["sizes"], report["attempts"]
    assert size["n_same"] == 1
    assert attempt["original"] == attempt["ours"]
    assert attempt["ours"]["answer"]


def test_wrong_sizes_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "actions", "x.gguf", "--max-image-tokens", "many"])
    assert caught.value.code == 2
    assert "'many': not numbers" in capsys.readouterr().err
