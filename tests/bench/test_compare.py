"""Two benches side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench_reports import GB, make_report, make_result

from autoglm_gguf.bench.compare import compare_reports


def test_ratios_are_b_by_a_and_say_which_way_is_better() -> None:
    held = make_result(0).held
    assert held is not None
    twice = make_result(0, 2.0, held=replace(held, peak_bytes=3 * GB // 2))
    found = compare_reports(make_report(make_result(0)), make_report(twice))
    told = {(r.name, r.n): (r.ratio, r.verdict) for r in found.ratios}
    assert told == {
        ("load", 0): (0.5, "faster"),
        ("prefill", 512): (2.0, "faster"),
        ("ttft", 512): (0.5, "faster"),
        ("decode", 64): (2.0, "faster"),
        ("peak_memory", 0): (0.5, "less memory"),
    }
    assert (found.differences, found.unmatched) == ((), ())


@pytest.mark.parametrize(("speed", "verdict"), [(1.15, "within the spread"), (0.5, "slower")])
def test_repeats_that_overlap_decide_nothing(speed: float, verdict: str) -> None:
    found = compare_reports(make_report(make_result(0)), make_report(make_result(0, speed)))
    speeds = [ratio.verdict for ratio in found.ratios if ratio.name != "peak_memory"]
    assert speeds == [verdict] * 4


def test_all_layers_of_two_models_are_the_same_configuration() -> None:
    larger, smaller = make_report(make_result(41)), make_report(make_result(29))
    smaller = replace(smaller, model=replace(smaller.model, block_count=28))
    assert {ratio.label for ratio in compare_reports(larger, smaller).ratios} == {"all"}


def test_only_configurations_are_compared_whatever_their_layers_are() -> None:
    found = compare_reports(make_report(make_result(12)), make_report(make_result(20)))
    assert {ratio.label for ratio in found.ratios} == {"12 | 20"}
    assert found.unmatched == ()


def test_memory_that_one_did_not_tell_is_not_compared() -> None:
    held = make_result(0).held
    assert held is not None
    unknown = make_report(make_result(0, held=replace(held, peak_bytes=0)))
    known = make_report(make_result(0))
    for a, b in ((known, unknown), (unknown, known)):
        assert "peak_memory" not in {ratio.name for ratio in compare_reports(a, b).ratios}


def test_what_only_one_has_is_told() -> None:
    failed = make_result(41, measures=(), held=None, failed="killed by SIGABRT")
    b = make_report(make_result(0, measures=make_result(0).measures[:3]), make_result(10), failed)
    found = compare_reports(make_report(), b)
    assert found.unmatched == (
        "n_gpu_layers 0: decode 64 only in A",
        "n_gpu_layers all: failed in B (killed by SIGABRT)",
        "n_gpu_layers 10: only in B",
    )


def test_differences_name_the_fact() -> None:
    a, b = make_report(), make_report()
    b = replace(
        b,
        machine=replace(b.machine, cpu="Another CPU"),
        settings=replace(b.settings, context={"n_ctx": 8192}),
    )
    told = [(d.fact, d.a, d.b) for d in compare_reports(a, b).differences]
    assert told == [
        ("machine.cpu", "A CPU", "Another CPU"),
        ("settings.context.n_ctx", None, 8192),
    ]
