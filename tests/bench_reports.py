"""A bench that was never run, with figures that are easy to divide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoglm_gguf.bench.report import (
    SCHEMA,
    DeviceFacts,
    Held,
    Machine,
    ModelFacts,
    Report,
    Result,
    Settings,
    Versions,
    make_measure,
)

GB = 10**9


def make_result(n_gpu_layers: int, speed: float = 1.0, **changed: Any) -> Result:
    """Prefill at 100 and decode at 10 tokens per second, ``speed`` times as fast, each ±10 %."""
    spread = (0.9, 1.0, 1.1)
    measures = (
        make_measure("load", 0, "ms", [2000 * s / speed for s in spread]),
        make_measure("prefill", 512, "tok/s", [100 * s * speed for s in spread]),
        make_measure("ttft", 512, "ms", [5120 * s / speed for s in spread]),
        make_measure("decode", 64, "tok/s", [10 * s * speed for s in spread]),
    )
    held = Held(4 * GB, 0, 3 * GB, 2 * GB, GB // 2, 0, {"CPU_Mapped": 2 * GB})
    devices = ("Vulkan0",) if n_gpu_layers else ()
    return replace(Result(n_gpu_layers, devices, {"n_ctx": 4096}, measures, held), **changed)


def make_report(*results: Result, **changed: Any) -> Report:
    """A report of a model of 40 layers on a machine with a GPU."""
    gpu = DeviceFacts("Vulkan0", "A GPU", "Vulkan", "gpu", 8 * GB)
    report = Report(
        schema=SCHEMA,
        complete=True,
        started="2026-01-01T00:00:00+00:00",
        machine=Machine("Linux 6.1 x86_64", "A CPU", 8, 16 * GB, (gpu,)),
        versions=Versions("0.1.0", "3.11.2", "0.3.36", "0c1e57098", ("CPU", "Vulkan")),
        model=ModelFacts("m-Q4_0.gguf", 5 * GB, "glm4", 40, {"Q4_0": 5 * GB}),
        settings=Settings((512,), 64, 3, 0.0, None, 4 * GB, True),
        results=results or (make_result(0), make_result(41, 4.0)),
    )
    return replace(report, **changed)
