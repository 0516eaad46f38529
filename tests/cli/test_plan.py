"""``plan``: what is printed of a plan, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import describe_sizes

from autoglm_gguf import AutoGLM, ContextParams, MemoryPlan, TokenBudget
from autoglm_gguf.cli.main import main
from autoglm_gguf.cli.plan import draw_plan, plan_as_json
from autoglm_gguf.memory.plan import plan_pair
from autoglm_gguf.native import pages

MB = 10**6


def plan(budget: int | None, **given: Any) -> MemoryPlan:
    described = describe_sizes(layer_bytes=(100 * MB,) * 40, tower_bytes=900 * MB)
    return plan_pair(described, ContextParams(**given), budget, fixed=frozenset(given))


def drawn(found: MemoryPlan) -> list[list[str]]:
    return [line.split() for line in draw_plan(found)]


def test_plan_draws_every_item_in_every_phase() -> None:
    found = plan(None)
    rows = drawn(found)
    assert rows[0][-2:] == ["no", "budget"]
    assert rows[2] == ["load", "encode", "decode"]
    names = [row[0] for row in rows[3 : 4 + len(found.items)]]
    assert names == [*(item.name for item in found.items), "total"]
    weights = next(row for row in rows if row[:1] == ["weights"])
    assert weights[1:7] == ["4.01", "GB"] * 3
    tower = next(row for row in rows if row[:1] == ["tower"])
    assert tower[1:6] == ["-", "900.00", "MB", "900.00", "MB"]


def test_plan_draws_a_bar_against_the_budget_for_each_phase() -> None:
    found = plan(8 * 10**9)
    bars = [row for row in drawn(found) if len(row) == 3 and row[2].endswith("%")]
    assert [row[0] for row in bars] == ["load", "encode", "decode"]
    for name, bar, percent in bars:
        share = found.phase_bytes[name] / (8 * 10**9)
        assert len(bar) == 40
        assert abs(bar.count("█") - 40 * share) <= 0.5
        assert percent == f"{share:.0%}"


@pytest.mark.skipif(not pages.SUPPORTED, reason="weights cannot be streamed here")
def test_plan_draws_levers_with_what_they_save_and_the_budget_that_avoids_them() -> None:
    found = plan(2 * 10**9, n_ctx=4096)
    rows = drawn(found)
    assert ["n_ctx", "4096", "given"] in rows
    at = rows.index(["lever", "saves", "avoided", "by"])
    streaming = next(lever for lever in found.levers if lever.name == "streaming")
    row = next(row for row in rows[at:] if row[:1] == ["streaming"])
    assert row[3] == f"{streaming.avoided_by_bytes // MB}MB"
    assert streaming.cost.split() in rows[at:]


def test_plan_without_levers_draws_none() -> None:
    assert ["lever", "saves", "avoided", "by"] not in drawn(plan(None))


def test_plan_as_json_holds_all_of_it() -> None:
    found = plan(2 * 10**9)
    value = json.loads(json.dumps(plan_as_json(found)))
    assert value["budget_bytes"] == 2 * 10**9
    assert value["peak_bytes"] == max(value["phase_bytes"].values())
    assert value["context"]["n_ctx"] == found.context.n_ctx
    assert [lever["name"] for lever in value["levers"]] == [lever.name for lever in found.levers]
    assert value["notes"] == list(found.notes)
    for phase, n_bytes in value["phase_bytes"].items():
        assert sum(item[f"{phase}_bytes"] for item in value["items"]) == n_bytes
    assert value["places"]["streamed"] == list(found.places.streamed)


@pytest.mark.native
def test_plan_prints_json(
    random_pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--memory-budget", "4GiB", "--n-ctx", "512", "--n-gpu-layers", "0", "--json"]
    assert main(["plan", str(random_pair[0]), *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    value = json.loads(printed.out)
    assert value["budget_bytes"] == 4 * 2**30
    assert (value["context"]["n_ctx"], value["context"]["n_gpu_layers"]) == (512, 0)
    reasons = {d["name"]: d["reason"] for d in value["decisions"]}
    assert (reasons["n_ctx"], reasons["n_batch"]) == ("given", "default")


@pytest.mark.native
def test_plan_prints_a_table(
    random_pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(random_pair[0])]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith(f"{random_pair[0].stem}: ")
    assert "budget 4.00 GB" in printed.out.splitlines()[0]


@pytest.mark.native
def test_plan_that_cannot_fit_exits_with_1(
    random_pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("plan", "chat"):
        assert main([command, str(random_pair[0]), "--memory-budget", "2MB"]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "does not fit 2.00 MB" in printed.err
        assert "hint: --memory-budget " in printed.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt=x", "each part is a name"),
        ("words=3", "parts are prompt, image, thinking, answer"),
        ("image=3", "image 3: at least 16"),
        ("prompt=600,prompt=700", "given once each"),
        ("", "each part is a name"),
    ],
)
def test_token_budget_that_cannot_be_read_says_what_it_takes(
    text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--token-budget", text])
    assert said in capsys.readouterr().err


@pytest.mark.native
def test_token_budget_decides_the_sizes_of_a_plan(
    random_pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    budget = "prompt=600,image=100,thinking=50,answer=50"
    assert main(["plan", str(random_pair[0]), "--token-budget", budget, "--json"]) == 0
    context = json.loads(capsys.readouterr().out)["context"]
    assert (context["n_ctx"], context["max_image_tokens"]) == (800, 100)


@pytest.mark.native
def test_token_budget_needs_no_image_where_the_model_takes_none(
    random_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(random_pair[0].read_bytes())
    budget = "prompt=600,thinking=50,answer=50"
    for model, n_ctx in ((alone, 700), (random_pair[0], 4096)):
        assert main(["plan", str(model), "--token-budget", budget, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["context"]["n_ctx"] == n_ctx
    with AutoGLM.load(alone, token_budget=TokenBudget(600, None, 50, 50)) as loaded:
        assert loaded.info.n_ctx == 700
