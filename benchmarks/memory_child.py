"""One run of `memory.py`, in a process of its own: what was planned and what was held.

It imports what it measures and nothing else, since all it holds counts. A job is JSON, the only
argument; the report is JSON on stdout.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load a pair as planned, show it images, make tokens; what was planned and what was held."""
    from autoglm_gguf.config import ContextParams, SamplingParams
    from autoglm_gguf.engine.llama import LlamaEngine
    from autoglm_gguf.gguf.describe import describe_pair
    from autoglm_gguf.hub import resolve_pair
    from autoglm_gguf.memory.budget import parse_budget
    from autoglm_gguf.memory.measure import measure_memory
    from autoglm_gguf.memory.plan import plan_pair
    from autoglm_gguf.vision import read_pixels

    text, tower = resolve_pair(job["model"], "auto" if job["images"] else None)
    before = measure_memory()
    context = job["context"]
    # Not plan_memory: plain mmap must be let run where the plan knows better.
    plan = plan_pair(
        describe_pair(text, tower),
        ContextParams(**context),
        parse_budget(job["budget"]),
        fixed=frozenset(context),
        held_bytes=before.total_bytes,
    )
    if job.get("plain"):
        from dataclasses import replace

        plan = replace(plan, weights="mapped")
    began = time.perf_counter()
    engine = LlamaEngine(text, tower, plan.context, plan=plan)
    report: dict[str, Any] = {"load_s": time.perf_counter() - began, "peaks": {}}
    report["peaks"]["load"] = measure_memory().peak_bytes
    n_prompt = job.get("prompt", 5)
    for at in range(0, n_prompt, engine.n_batch):
        engine.eval_tokens([1 + n % 500 for n in range(at, min(n_prompt, at + engine.n_batch))])
    for number in range(job["images"]):
        limits, most = engine.info.vision, engine.info.max_image_tokens
        pixels = read_pixels(job["screens"][number], limits, max_image_tokens=most)
        began = time.perf_counter()
        image = engine.encode_image(pixels.array, pixels.grid)
        report[f"encode_{number}_s"] = time.perf_counter() - began
        report["peaks"][f"encode_{number}"] = measure_memory().peak_bytes
        began = time.perf_counter()
        del pixels
        engine.eval_image(image)
        report[f"eval_image_{number}_s"] = time.perf_counter() - began
        report["image_tokens"] = image.n_tokens
        del image
        report[f"tokens_per_second_{number}"] = _generate(engine, SamplingParams(), job["tokens"])
    if not job["images"]:
        seconds = []
        for n in range(job["tokens"]):
            began = time.perf_counter()
            engine.eval_tokens([100 + n])
            seconds.append(time.perf_counter() - began)
        report["tokens_per_second"] = len(seconds) / sum(seconds)
        report["token_seconds"] = [round(s, 3) for s in seconds]
    usage = measure_memory()
    report |= {
        "peak_bytes": usage.peak_bytes,
        "anonymous_bytes": usage.anonymous_bytes,
        "mapped_bytes": usage.mapped_bytes,
        "planned_bytes": plan.peak_bytes,
        "planned_phases": plan.phase_bytes,
        "budget_bytes": plan.budget_bytes,
        "weights": plan.weights,
        "places": [len(getattr(plan.places, kind)) for kind in ("copied", "streamed", "yielding")],
        "tower": plan.tower,
        "streamed_bytes": plan.streamed_bytes,
        "n_batch": plan.context.n_batch,
        "type_k": plan.context.type_k,
    }
    return report


def _generate(engine: Any, sampling: Any, n_tokens: int) -> float:
    sampler = engine.open_sampler(sampling)
    began = time.perf_counter()
    for _ in range(n_tokens):
        engine.eval_tokens([sampler.sample()])
    sampler.close()
    return n_tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
