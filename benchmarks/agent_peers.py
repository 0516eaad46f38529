"""The runtimes that `agent_steps.py` compares, as they are in their own processes.

Messages are the client's own, OpenAI's shapes with images as data URLs; every runtime decodes them
itself. Knows no conversation and no tables.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers import Child, Messages, Runtime, Settings, serve


class Ours:
    """`AutoGLM.load` and `AutoGLM.stream`."""

    def __init__(self, settings: Settings, *, defaults: bool) -> None:
        from autoglm_gguf import AutoGLM

        given: dict[str, Any] = {
            "memory_budget": "none",
            "n_ctx": settings.n_ctx,
            "n_batch": settings.n_batch,
            "n_threads": settings.n_threads,
            "n_gpu_layers": 0,
            "type_k": "f16",
            "type_v": "f16",
            "flash_attn": True,
        }
        self._model = AutoGLM.load(
            settings.text, mmproj=settings.mmproj, **({} if defaults else given)
        )
        self._max_tokens = settings.max_tokens

    def facts(self) -> dict[str, Any]:
        """How it is held, as planned and as measured now."""
        plan, usage = self._model.info.plan, self._model.memory()
        assert plan is not None and usage is not None
        return {
            "weights": plan.weights,
            "tower": plan.tower,
            "context": asdict(plan.context),
            "planned_bytes": plan.peak_bytes,
            "measured_bytes": usage.peak_bytes,
        }

    def answer(self, messages: Messages) -> dict[str, Any]:
        """One step, timed from the call to the first chunk and to the last."""
        began = time.perf_counter()
        first, text, tokens, last = 0.0, "", list[int](), None
        for last in self._model.stream(messages, max_tokens=self._max_tokens):
            first = first or time.perf_counter()
            text += last.text
            tokens.extend(last.tokens)
        ended = time.perf_counter()
        assert last is not None and last.timings is not None and last.usage is not None
        timings = last.timings
        return {
            "ttft_s": first - began,
            "total_s": ended - began,
            "text": text,
            "tokens": tokens,
            "predicted_n": timings.predicted_n,
            "prompt_tokens": last.usage.prompt_tokens,
            "evaluated_n": timings.prompt_n,
            "cache_n": getattr(timings, "cache_n", 0),
            "image_s": timings.image_ms / 1000,
            "prompt_s": timings.prompt_ms / 1000,
        }

    def items(self, messages: Messages) -> list[Any]:
        """A prompt's token ids, an image as ``[digest, cells]``; nothing is evaluated."""
        from autoglm_gguf.vision import read_pixels

        prompt, limits = self._model.render(messages), self._model.info.vision
        assert limits is not None
        found: list[Any] = list(self._model.tokenize(prompt.segments[0]))
        for source, segment in zip(prompt.images, prompt.segments[1:], strict=True):
            pixels = read_pixels(source, limits)
            digest = hashlib.sha256(pixels.array.tobytes()).hexdigest()
            found += [[digest, pixels.n_tokens], *self._model.tokenize(segment)]
        return found


class Handler:
    """llama-cpp-python's `Llama` with its vision handler for any libmtmd model."""

    def __init__(self, settings: Settings) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_chat_format import MTMDChatHandler

        self._max_tokens = settings.max_tokens
        self._model = Llama(
            settings.text,
            chat_handler=MTMDChatHandler(settings.mmproj, verbose=False, use_gpu=False),
            n_ctx=settings.n_ctx,
            n_batch=settings.n_batch,
            n_ubatch=settings.n_batch,
            n_threads=settings.n_threads,
            n_threads_batch=settings.n_threads,
            n_gpu_layers=0,
            flash_attn=True,  # the handler takes it over for the vision tower
            # It shows the template bos's text and aborts the process where a file names none. This
            # template has no use for it, and nothing adds one.
            kv_overrides={"tokenizer.ggml.bos_token_id": 0},
            verbose=False,
        )
        # A stream tells no count: every token made passes through here.
        self._tokens: list[int] = []
        sample: Callable[..., int] = self._model.sample

        def counted(*args: Any, **kwargs: Any) -> int:
            self._tokens.append(sample(*args, **kwargs))
            return self._tokens[-1]

        self._model.sample = counted

    def facts(self) -> dict[str, Any]:
        import llama_cpp

        return {"version": llama_cpp.__version__}

    def answer(self, messages: Messages) -> dict[str, Any]:
        """One step; everything is evaluated again, since the handler clears the KV cache."""
        self._tokens.clear()
        began = time.perf_counter()
        first, text = 0.0, ""
        for chunk in self._model.create_chat_completion(
            messages,
            stream=True,
            temperature=0.0,
            repeat_penalty=1.0,
            max_tokens=self._max_tokens,
        ):
            piece = chunk["choices"][0]["delta"].get("content")
            if piece:
                first = first or time.perf_counter()
                text += piece
        ended = time.perf_counter()
        return {
            "ttft_s": (first or ended) - began,
            "total_s": ended - began,
            "text": text,
            "tokens": list(self._tokens),
            "predicted_n": len(self._tokens),
        }


def open_runtime(kind: str, settings: dict[str, Any]) -> Runtime:
    """Load a model: ours, defaults or handler."""
    if kind == "handler":
        return Handler(Settings(**settings))
    return Ours(Settings(**settings), defaults=kind == "defaults")


def start(name: str, kind: str, settings: Settings, timeout_s: float) -> Child:
    """One of them in a process of its own."""
    job = {"kind": kind, "settings": asdict(settings)}
    return Child(name, Path(__file__), job, timeout_s)


if __name__ == "__main__":
    serve(open_runtime, json.loads(sys.argv[1]))
