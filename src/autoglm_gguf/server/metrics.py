"""What the server counts, as Prometheus reads it: all names begin with ``autoglm_gguf_``.

Counters are fed by requests and answers; queue and memory are looked at when somebody asks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from autoglm_gguf.messages import Chunk
from autoglm_gguf.server.backend import Holder
from autoglm_gguf.server.queue import FairQueue

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_RATES = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The counters of one server.

    Args:
        queue: Looked at when asked.
        holder: Likewise, for the model's memory.
    """

    def __init__(self, queue: FairQueue, holder: Holder) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._registry.register(_Now(queue, holder))
        self._requests = Counter(
            "autoglm_gguf_requests",
            "Requests by endpoint and HTTP status; 499: the client left.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._answers = self._count("answers", "Answers by how they ended.", "finish_reason")
        self._routes = self._count("routes", "Answers by who gave them, with a cloud.", "source")
        self._prompt = self._count("prompt_tokens", "KV cells of prompts.")
        self._cached = self._count("cached_tokens", "Of these, held by the KV cache already.")
        self._images = self._count("image_tokens", "Of these, taken by images.")
        self._completion = self._count("completion_tokens", "Tokens generated.")
        self._queued = self._time("queue_seconds", "From the request to its turn.")
        self._first = self._time("first_token_seconds", "From the request to its first token.")
        self._prefill = self._time("prefill_seconds", "Prompt evaluation without images.")
        self._vision = self._time("image_seconds", "Images through the vision tower.")
        self._rate = self._time("decode_tokens_per_second", "Decode speed of an answer.", _RATES)
        started = Gauge(
            "autoglm_gguf_start_time_seconds", "When the server began.", registry=self._registry
        )
        started.set(time.time())

    def _count(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(f"autoglm_gguf_{name}", says, labels, registry=self._registry)

    def _time(self, name: str, says: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"autoglm_gguf_{name}", says, buckets=buckets, registry=self._registry)

    def saw_request(self, endpoint: str, status: int) -> None:
        """A request was answered, or left by its client (499)."""
        self._requests.labels(endpoint, str(status)).inc()

    def saw_turn(self, waited_s: float) -> None:
        """A request got its turn."""
        self._queued.observe(waited_s)

    def saw_tokens(self, n: int) -> None:
        """Tokens were generated."""
        self._completion.inc(n)

    def saw_first_token(self, after_s: float) -> None:
        """The first token of an answer came, so long after the request."""
        self._first.observe(after_s)

    def saw_end(self, last: Chunk | None, reason: str) -> None:
        """An answer ended; ``last`` is its last chunk, if it came to that."""
        self._answers.labels(reason).inc()
        if last is None or last.usage is None or last.timings is None:
            return
        if last.route is not None:
            self._routes.labels(last.route.source).inc()
            if last.route.source == "cloud":  # its tokens are not ours
                return
        usage, timings = last.usage, last.timings
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(timings.cache_n)
        self._images.inc(usage.image_tokens)
        self._prefill.observe(timings.prompt_ms / 1000)
        if timings.image_ms:
            self._vision.observe(timings.image_ms / 1000)
        if timings.predicted_per_second:
            self._rate.observe(timings.predicted_per_second)

    def render(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)


class _Now(Collector):
    """What is true at the moment it is asked for."""

    def __init__(self, queue: FairQueue, holder: Holder) -> None:
        self._queue, self._holder = queue, holder

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known once a model is there."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Queue and memory."""
        yield _gauge("queue_waiting", "Requests that wait.", self._queue.n_waiting)
        yield _gauge("running", "Requests being answered.", int(not self._queue.is_idle))
        yield _gauge("ready", "Whether the model is loaded.", int(self._holder.state == "ready"))
        backend = self._holder.backend
        if backend is None or self._holder.state not in ("ready", "stopping"):
            return
        info = backend.info
        yield _labelled("model_info", "The model.", "name", {info.name: 1})
        yield _gauge("n_ctx", "KV cells of the context.", info.n_ctx)
        if info.plan is not None:
            says = "Planned to be held at most, by phase."
            yield _labelled("memory_planned_bytes", says, "phase", info.plan.phase_bytes)
            if info.plan.budget_bytes is not None:
                says = "What may be held."
                yield _gauge("memory_budget_bytes", says, info.plan.budget_bytes)
        usage = backend.memory()
        if usage is not None:
            kinds = ("anonymous", "mapped", "device")
            held = {kind: getattr(usage, f"{kind}_bytes") for kind in kinds}
            yield _labelled("memory_bytes", "Held now, by kind.", "kind", held)
            yield _gauge("memory_peak_bytes", "Held at most so far.", usage.peak_bytes)


def _gauge(name: str, says: str, value: float) -> Metric:
    return GaugeMetricFamily(f"autoglm_gguf_{name}", says, value=value)


def _labelled(name: str, says: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"autoglm_gguf_{name}", says, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
