"""What is counted, as Prometheus reads it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from builders import describe_sizes
from prometheus_client.parser import text_string_to_metric_families
from serving import CHAT, HI, ask, client_of, fake_app, image_part, png

from autoglm_gguf import AutoGLM, ContextParams
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.errors import DoesNotFitError
from autoglm_gguf.memory.plan import plan_pair
from autoglm_gguf.server.params import ServerParams


def metrics_after(app: Any, *bodies: dict[str, Any]) -> dict[str, float]:
    """Samples by name, with labels, after some chats."""

    async def run() -> str:
        async with client_of(app) as client:
            for body in bodies:
                await client.post(CHAT, json=body)
            answer = await client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            return answer.text

    found = {}
    for family in text_string_to_metric_families(asyncio.run(run())):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_requests_tokens_and_times_are_counted() -> None:
    picture = {"messages": [{"role": "user", "content": [image_part(png(112, 168)), "?"]}]}
    wrong = {"messages": []}
    found = metrics_after(fake_app(FakeEngine(b"four")), HI, HI, picture, wrong)
    assert all(name.startswith("autoglm_gguf_") for name in found)
    endpoint = "endpoint=/v1/chat/completions"
    assert found[f"autoglm_gguf_requests_total{{{endpoint},status=200}}"] == 3
    assert found[f"autoglm_gguf_requests_total{{{endpoint},status=400}}"] == 1
    assert found["autoglm_gguf_answers_total{finish_reason=stop}"] == 3
    assert found["autoglm_gguf_completion_tokens_total"] == 15
    hi = len(b"[gMASK]<sop>\n<|user|>\nhi<|assistant|>\n")
    assert found["autoglm_gguf_prompt_tokens_total"] > 2 * (hi - 2)
    assert found["autoglm_gguf_cached_tokens_total"] > 0
    assert found["autoglm_gguf_image_tokens_total"] == 24
    for name in ("queue_seconds", "first_token_seconds", "prefill_seconds"):
        assert found[f"autoglm_gguf_{name}_count"] == 3
    assert found["autoglm_gguf_image_seconds_count"] == 1
    assert found["autoglm_gguf_queue_waiting"] == 0
    assert found["autoglm_gguf_running"] == 0
    assert found["autoglm_gguf_ready"] == 1
    assert found["autoglm_gguf_model_info{name=fake}"] == 1


def test_memory_is_planned_and_measured() -> None:
    plan = plan_pair(
        describe_sizes(layer_bytes=(10**8,) * 4, tower_bytes=10**8), ContextParams(), 4 * 10**9
    )
    engine = FakeEngine()
    from dataclasses import replace

    engine.info = replace(engine.info, plan=plan)
    found = metrics_after(fake_app(load=lambda: AutoGLM(engine)))
    for phase, n_bytes in plan.phase_bytes.items():
        assert found[f"autoglm_gguf_memory_planned_bytes{{phase={phase}}}"] == n_bytes
    assert found["autoglm_gguf_memory_budget_bytes"] == 4 * 10**9
    assert found["autoglm_gguf_memory_bytes{kind=anonymous}"] > 10**6
    assert found["autoglm_gguf_memory_peak_bytes"] > 10**6


def test_paths_that_clients_make_up_make_no_series() -> None:
    async def run() -> str:
        async with client_of(fake_app()) as client:
            for n in range(20):
                await client.get(f"/made/up/{n}")
            return (await client.get("/metrics")).text

    text = asyncio.run(run())
    assert 'requests_total{endpoint="other",status="404"} 20.0' in text
    assert "made" not in text


@pytest.mark.parametrize("vision", [True, False])
def test_health_says_whether_images_are_taken(vision: bool) -> None:
    answer = ask(fake_app(FakeEngine(vision=vision)), ("GET", "/health", {}))[0]
    assert answer.json() == {"status": "ready", "takes_images": vision}


@pytest.mark.parametrize("params", [ServerParams(), ServerParams(max_queue=1)])
def test_status_tells_what_a_page_shows(params: ServerParams) -> None:
    async def run() -> Any:
        async with client_of(fake_app(params=params)) as client:
            return (await client.get("/status")).json()

    status = asyncio.run(run())
    assert status["status"] == "ready"
    assert status["limits"] == {
        "max_body_bytes": params.max_body_bytes,
        "max_image_pixels": params.max_image_pixels,
    }
    assert all("do(action=" in prompt for prompt in status["system_prompts"].values())
    assert (status["model"], status["n_ctx"], status["takes_images"]) == ("fake", 4096, True)
    assert status["queue"] == {"waiting": 0, "running": False}
    assert status["memory"]["planned_bytes"] is None
    assert status["memory"]["measured"]["total_bytes"] > 10**6


def test_answer_that_does_not_fit_is_counted_as_an_error() -> None:
    """Its status, 503, is that of answers which were ended from outside as well."""

    def refuse(_: str) -> bytes:
        raise DoesNotFitError("model: does not fit", budget_bytes=1, required_bytes=2)

    found = metrics_after(fake_app(FakeEngine(refuse)), HI)
    assert found["autoglm_gguf_answers_total{finish_reason=error}"] == 1
    assert "autoglm_gguf_answers_total{finish_reason=cancelled}" not in found
