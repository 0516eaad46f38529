"""What makes tokens of text here, ours and others: each as it is in a process of its own.

All are given the same prompt, as text and as token ids, and make tokens greedily. A figure is taken
from outside where a runtime shows each token as it is sampled, from its own clocks where it does
not; both count the prompt up to the first token, and single tokens from the first to the last. A
kind's imports are inside it, so that its process holds nothing of the others.

    ours, held         `AutoGLM.generate`, all weights in memory; held to the action language
    defaults           `AutoGLM.load` with nothing but the path
    handler            llama-cpp-python's `Llama.create_completion`
    xllamacpp          its `Server`, in the process
    bf16, f32          transformers, the checkpoint itself in that type
    onnx               ONNX Runtime, the GGUF's own q4_0 blocks (onnx_text.py)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers import Child, Runtime, require, serve


@dataclass(frozen=True)
class TextSettings:
    """The same for all."""

    text: str
    """GGUF."""
    checkpoint: str = ""
    """What it was made of."""
    onnx: str = ""
    """The same weights as an ONNX graph."""
    n_ctx: int = 1024
    n_batch: int = 512
    n_threads: int = 2


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    text: str
    ids: list[int]
    max_tokens: int


Figures = dict[str, float]
NEEDS = {
    "ours": (),
    "held": (),
    "defaults": (),
    "handler": ("llama_cpp",),
    "xllamacpp": ("xllamacpp",),
    "bf16": ("torch", "transformers"),
    "f32": ("torch", "transformers"),
    "onnx": ("onnxruntime",),
}


def figures(began: float, shown: list[float], n_prompt: int) -> Figures:
    """Speeds of an answer whose tokens were seen at these times, in seconds.

    Returns:
        ``prompt_n``, ``prefill`` in tokens per second up to the first token, ``predicted_n``, and
        ``decode`` in tokens per second from the first to the last, where there are two.
    """
    found: Figures = {
        "prompt_n": n_prompt,
        "prefill": n_prompt / (shown[0] - began),
        "predicted_n": len(shown),
    }
    if len(shown) > 1:
        found["decode"] = (len(shown) - 1) / (shown[-1] - shown[0])
    return found


class Ours:
    """`AutoGLM.load` and `AutoGLM.generate`; nothing is guessed ahead, nothing reused."""

    def __init__(
        self, settings: TextSettings, constrain: str = "", *, defaults: bool = False
    ) -> None:
        from autoglm_gguf import AutoGLM

        given: dict[str, Any] = {
            "memory_budget": "none",
            "n_ctx": settings.n_ctx,
            "n_batch": settings.n_batch,
            "n_threads": settings.n_threads,
            "n_gpu_layers": 0,
        }
        self._model = AutoGLM.load(settings.text, mmproj=None, **({} if defaults else given))
        self._options: dict[str, Any] = {"constrain": constrain} if constrain else {}

    def facts(self) -> dict[str, Any]:
        plan = self._model.info.plan
        assert plan is not None
        return {"weights": plan.weights, "planned_bytes": plan.peak_bytes}

    def tokenize(self, text: str) -> list[int]:
        return list(self._model.tokenize(text))

    def answer(self, prompt: dict[str, Any]) -> Figures:
        answer = self._model.generate(
            prompt["text"],
            raw=True,
            max_tokens=prompt["max_tokens"],
            temperature=0.0,
            n_draft=0,
            cache_prompt=False,
            **self._options,
        )
        timings = answer.timings
        return {
            "prompt_n": timings.prompt_n,
            "prefill": 1000 * timings.prompt_n / timings.ttft_ms,
            "predicted_n": timings.predicted_n,
            "decode": timings.predicted_per_second,
        }


class Handler:
    """llama-cpp-python's `Llama`."""

    def __init__(self, settings: TextSettings) -> None:
        from llama_cpp import Llama

        self._model = Llama(
            settings.text,
            n_ctx=settings.n_ctx,
            n_batch=settings.n_batch,
            n_ubatch=settings.n_batch,
            n_threads=settings.n_threads,
            n_threads_batch=settings.n_threads,
            n_gpu_layers=0,
            flash_attn=True,
            # It aborts the process where a file names no bos token; nothing here adds one.
            kv_overrides={"tokenizer.ggml.bos_token_id": 0},
            verbose=False,
        )
        self._shown: list[float] = []
        sample: Callable[..., int] = self._model.sample

        def seen(*args: Any, **kwargs: Any) -> int:
            token = sample(*args, **kwargs)
            self._shown.append(time.perf_counter())
            return token

        self._model.sample = seen

    def facts(self) -> dict[str, Any]:
        return {}

    def answer(self, prompt: dict[str, Any]) -> Figures:
        self._model.reset()
        self._shown.clear()
        began = time.perf_counter()
        for _ in self._model.create_completion(
            prompt["ids"],
            max_tokens=prompt["max_tokens"],
            temperature=0.0,
            repeat_penalty=1.0,
            stream=True,
        ):
            pass
        return figures(began, self._shown, len(prompt["ids"]))


class Xllamacpp:
    """xllamacpp's `Server`: llama.cpp's own, called in the process."""

    def __init__(self, settings: TextSettings) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = settings.text
        params.n_ctx, params.n_parallel = settings.n_ctx, 1
        params.n_batch = params.n_ubatch = settings.n_batch
        params.cpuparams.n_threads = settings.n_threads
        params.cpuparams_batch.n_threads = settings.n_threads
        params.n_gpu_layers = 0
        params.fit_params = False
        params.warmup = False  # as the others: a short answer comes before what is measured
        self._server = xllamacpp.Server(params)
        self._version = xllamacpp.__version__

    def facts(self) -> dict[str, Any]:
        return {}

    def answer(self, prompt: dict[str, Any]) -> Figures:
        found = self._server.handle_completions(
            {
                "prompt": prompt["ids"],
                "max_tokens": prompt["max_tokens"],
                "temperature": 0.0,
                "cache_prompt": False,
                "ignore_eos": True,
            }
        )
        if isinstance(found, str | bytes):
            found = json.loads(found)
        timings = found["timings"]
        n = timings["predicted_n"]
        answer: Figures = {
            "prompt_n": timings["prompt_n"],
            "prefill": 1000 * timings["prompt_n"] / timings["prompt_ms"],
            "predicted_n": n,
        }
        if n > 1:  # its clock runs from the first token to the last
            answer["decode"] = 1000 * (n - 1) / timings["predicted_ms"]
        return answer


class Transformers:
    """The original, from the checkpoint."""

    def __init__(self, settings: TextSettings, dtype: str) -> None:
        import torch
        from transformers import Glm4vForConditionalGeneration

        torch.set_num_threads(settings.n_threads)
        self._model = Glm4vForConditionalGeneration.from_pretrained(
            settings.checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    def facts(self) -> dict[str, Any]:
        return {}

    def answer(self, prompt: dict[str, Any]) -> Figures:
        import torch

        shown: list[float] = []

        class Watch:
            """Called with the prompt, then with each token."""

            def put(self, _: Any) -> None:
                shown.append(time.perf_counter())

            def end(self) -> None:
                pass

        ids = torch.tensor([prompt["ids"]])
        n = prompt["max_tokens"]
        began = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
                streamer=Watch(),
            )
        return figures(began, shown[1:], len(prompt["ids"]))


class Onnx:
    """ONNX Runtime over the graph that onnx_text.py makes of the GGUF."""

    def __init__(self, settings: TextSettings) -> None:
        from onnx_text import OnnxText

        self._model = OnnxText(Path(settings.onnx), settings.n_threads)

    def facts(self) -> dict[str, Any]:
        return {}

    def answer(self, prompt: dict[str, Any]) -> Figures:
        shown: list[float] = []
        began = time.perf_counter()
        for _ in self._model.generate(prompt["ids"], prompt["max_tokens"]):
            shown.append(time.perf_counter())
        return figures(began, shown, len(prompt["ids"]))


def open_runtime(kind: str, settings: dict[str, Any]) -> Runtime:
    """Load a model."""
    given = TextSettings(**settings)
    kinds: dict[str, Callable[[], Runtime]] = {
        "ours": lambda: Ours(given),
        "held": lambda: Ours(given, "action"),
        "defaults": lambda: Ours(given, defaults=True),
        "handler": lambda: Handler(given),
        "xllamacpp": lambda: Xllamacpp(given),
        "bf16": lambda: Transformers(given, "bfloat16"),
        "f32": lambda: Transformers(given, "float32"),
        "onnx": lambda: Onnx(given),
    }
    return kinds[kind]()


def start(kind: str, label: str, settings: TextSettings, timeout_s: float) -> Child:
    """One of them in a process of its own.

    Raises:
        PeerError: What it is made of is not installed.
    """
    require(*NEEDS[kind])
    job = {"kind": kind, "settings": asdict(settings)}
    return Child(label, Path(__file__), job, timeout_s)


if __name__ == "__main__":
    serve(open_runtime, json.loads(sys.argv[1]))
