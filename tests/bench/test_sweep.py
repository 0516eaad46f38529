"""Measuring for real, on small models; and what happens to a process that is killed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoglm_gguf.bench import sweep
from autoglm_gguf.bench.report import Settings, make_measure
from autoglm_gguf.bench.sweep import Bench, Stage, _slowing, parse_sweep

SMALL = Settings(
    prompt_n=(16, 32),
    predicted_n=4,
    repeats=2,
    pause_s=0.0,
    screen=(112, 224),
    memory_budget_bytes=4 * 10**9,
    self_test=True,
    context={"n_ctx": 256},
)


def ignore(_stage: Stage) -> None:
    pass


@pytest.fixture
def text(tiny_pair: Callable[[str], tuple[Path, Path]]) -> Path:
    return tiny_pair("q8_0")[0]


@pytest.mark.native
def test_bench_measures_every_figure_in_a_fresh_process(text: Path) -> None:
    bench = Bench(text, settings=SMALL, layers=())
    stages: list[Stage] = []
    results = list(bench.run(stages.append))
    report = bench.report
    assert report.complete and report.results == tuple(results)
    labels = [report.label(result) for result in results]
    if report.notes:
        assert (
            report.notes[0].startswith("no GPU") and "the CPU alone is measured" in report.notes[0]
        )
        assert labels == ["0"]
    else:
        assert (labels[0], labels[-1]) == ("0", "all")
    result = results[0]
    assert result.failed is None
    # 112 x 224 pixels are 4 x 8 image tokens of 28 x 28.
    assert [(m.name, m.n, len(m.values)) for m in result.measures] == [
        ("load", 0, 2),
        ("prefill", 16, 2),
        ("ttft", 16, 2),
        ("prefill", 32, 2),
        ("ttft", 32, 2),
        ("decode", 4, 2),
        ("image_encode", 32, 2),
        ("image_prefill", 32, 2),
        ("image_ttft", 32, 2),
    ]
    assert all(m.low > 0 for m in result.measures)
    prefill, ttft = result.find("prefill", 32), result.find("ttft", 32)
    assert prefill and ttft and ttft.median >= 0.99 * 1000 * 32 / prefill.median
    held = result.held
    assert held is not None
    assert held.peak_bytes >= held.anonymous_bytes > 10**7
    # All weights lie somewhere: ggml's own lines tell where.
    assert sum(held.buffers.values()) > 0.9 * report.model.file_bytes / 2
    assert (result.chosen["n_ctx"], result.chosen["n_gpu_layers"]) == (256, 0)
    assert [s.run for s in stages if s.what == "decode 4"][:3] == [0, 1, 2]


@pytest.mark.native
def test_killed_process_costs_one_configuration(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    settings = replace(SMALL, screen=None, repeats=20)  # more than it gets through before it dies
    bench = Bench(text, settings=settings, layers=(0,))
    bench._layers = (0, 0)  # where there is no GPU, a sweep has one configuration

    def kill_first(stage: Stage) -> None:
        if (stage.position, stage.run, stage.what) == (1, 2, "decode 4"):
            started[-1].kill()

    first, second = bench.run(kill_first)
    assert first.failed is not None and first.failed.startswith("was killed by SIGKILL")
    # The repeats that it had finished: one, and what it did before the signal came.
    (n_finished,) = {len(m.values) for m in first.measures}
    assert len(first.measures) == 5 and 1 <= n_finished < settings.repeats
    assert (second.failed, bench.report.complete) == (None, True)


@pytest.mark.native
def test_configuration_that_is_refused_says_why(text: Path) -> None:
    bench = Bench(text, settings=replace(SMALL, memory_budget_bytes=2 * 10**6))
    (result,) = bench.run(ignore)
    assert result.failed is not None
    assert "does not fit 2.00 MB" in result.failed and "--memory-budget" in result.failed
    assert (result.measures, result.held, bench.report.complete) == ((), None, True)


@pytest.mark.native
def test_stopped_bench_keeps_finished_repeats(text: Path) -> None:
    bench = Bench(text, settings=replace(SMALL, screen=None))

    def stop(stage: Stage) -> None:
        if (stage.run, stage.what) == (2, "decode 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(bench.run(stop))
    (result,) = bench.report.results
    assert (result.failed, bench.report.complete) == ("interrupted", False)
    assert {len(m.values) for m in result.measures} == {1}


@pytest.mark.native
def test_layers_that_the_model_does_not_have_are_refused(text: Path) -> None:
    with pytest.raises(ValueError, match="layers 99: the model has"):
        Bench(text, settings=SMALL, layers=(0, 99))


@pytest.mark.parametrize("refused", ["", "0,", "0;8", "-1", "auto", "1.5", "²", "1000000"])
def test_layer_list_that_is_none_is_refused(refused: str) -> None:
    assert parse_sweep("0, 8,all") == (0, 8, "all")
    with pytest.raises(ValueError, match="layers "):
        parse_sweep(refused)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt_n": ()}, "prompt_n: none"),
        ({"prompt_n": (0,)}, "prompt_n 0"),
        ({"predicted_n": 2**30}, "predicted_n 1073741824"),
        ({"repeats": 0}, "repeats 0"),
        ({"pause_s": float("nan")}, "pause nan"),
        ({"context": {"n_ctx": 32}}, "n_ctx 32: too small"),
        ({"context": {"n_batch": 0}}, "n_batch 0"),
    ],
)
def test_setting_out_of_range_is_refused(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Bench("none.gguf", settings=replace(SMALL, **changed))


def test_longer_prompt_gets_the_context_it_needs() -> None:
    checked = sweep._check_settings(replace(SMALL, prompt_n=(8000,), context={}))
    assert checked.context == {"n_ctx": 8192}


@pytest.mark.parametrize(
    ("name", "unit", "values", "told"),
    [
        ("decode", "tok/s", (10.0, 8.0, 7.0), True),
        ("decode", "tok/s", (10.0, 9.5, 9.2), False),
        ("decode", "tok/s", (10.0, 8.0, 9.9), False),  # it came back
        ("decode", "tok/s", (10.0,), False),
        ("image_encode", "ms", (100.0, 120.0, 130.0), True),
        ("load", "ms", (100.0, 120.0, 130.0), False),
    ],
)
def test_repeats_that_get_slower_are_told(
    name: str, unit: str, values: tuple[float, ...], told: bool
) -> None:
    note = _slowing(make_measure(name, 64, unit, values))
    assert (note is not None) == told
    assert note is None or "slows as it repeats" in note
