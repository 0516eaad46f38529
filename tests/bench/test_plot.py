"""The picture of a bench: what stands in it, and what is refused beforehand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bench_reports import make_report, make_result
from PIL import Image

from autoglm_gguf import BenchError
from autoglm_gguf.bench.plot import check_plot, draw_report


def test_plot_names_its_axes_with_units(tmp_path: Path) -> None:
    failed = make_result(17, measures=(), held=None, failed="killed")
    draw_report(tmp_path / "p.svg", make_report(make_result(0), failed, make_result(41, 4.0)))
    drawn = (tmp_path / "p.svg").read_text()
    # matplotlib draws letters as paths and names each text in a comment.
    for text in (
        "prefill, 512 tokens",
        "decode, 64 tokens",
        "tokens per second",
        "GB (10⁹ bytes)",
        "n_gpu_layers (of 40 and the output)",
        "m-Q4_0.gguf (5.00 GB) · A GPU, A CPU",
        "all",
        "400",
        "budget",
    ):
        assert f"<!-- {text} -->" in drawn
    assert "<!-- 17 -->" not in drawn
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("n_results", [1, 2, 9])
def test_plot_is_a_picture_of_a_readable_size(tmp_path: Path, n_results: int) -> None:
    results = [make_result(4 * n, 1 + n) for n in range(n_results)]
    draw_report(tmp_path / "p.PNG", make_report(*results))
    with Image.open(tmp_path / "p.PNG") as picture:
        assert (picture.format, picture.size) == ("PNG", (1920, 700))
    assert [path.name for path in tmp_path.iterdir()] == ["p.PNG"]


def test_plot_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BenchError, match=r"suffix \.gif, required \.png or \.svg"):
        check_plot(tmp_path / "p.gif")
    with pytest.raises(BenchError, match="suffix none"):
        check_plot(tmp_path / "p")
    with pytest.raises(BenchError, match="no such folder"):
        check_plot(tmp_path / "none" / "p.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(BenchError, match="matplotlib: not installed") as caught:
        check_plot(tmp_path / "p.png")
    assert caught.value.hint == "pip install 'autoglm-gguf[plot]'"


def test_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="nothing to draw"):
        draw_report(tmp_path / "p.png", make_report(make_result(0, measures=())))
