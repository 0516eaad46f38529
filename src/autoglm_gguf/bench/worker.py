"""The measured process: one configuration, told as JSON lines to the process that started it.

It takes a line on stdin, ``{"job": ..., "device": ..., "log": ...}``, and ends when stdin does, so
that it never outlives who asked. Without a job it tells machine and versions, and the GPUs that
layers would go to. Interrupts are left to the parent, which kills it.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import autoglm_gguf
from autoglm_gguf.bench.report import (
    LOAD,
    MILLISECONDS,
    TOKENS_PER_SECOND,
    DeviceFacts,
    Held,
    Machine,
    Versions,
)
from autoglm_gguf.config import SamplingParams
from autoglm_gguf.devices import (
    choose_devices,
    explain_no_gpu,
    probe_devices,
    probe_memory,
    usable_cores,
)
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.engine.loading import load_engine
from autoglm_gguf.errors import AutoGLMError, ContextFullError
from autoglm_gguf.memory.plan import MemoryPlan, plan_memory
from autoglm_gguf.native.ggml import Device
from autoglm_gguf.native.library import LLAMA_CPP_COMMIT, PINNED_VERSION, buffer_report
from autoglm_gguf.session import AutoGLM
from autoglm_gguf.vision import Pixels, read_pixels

SELF_TEST = "self-test"
Say = Callable[[dict[str, Any]], None]
Figure = tuple[str, int, str, float]
"""Name, tokens, unit and value of one measurement."""
_CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Job:
    """One configuration; see `Settings` for what is not told here."""

    text: str
    mmproj: str | None
    memory_budget_bytes: int | None
    context: dict[str, Any]
    """Fields of `ContextParams`, ``n_gpu_layers`` among them."""
    prompt_n: list[int]
    predicted_n: int
    repeats: int
    self_test: bool
    screen: list[int] | None = None


def main() -> None:
    """Do the job that stdin holds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stream = _take_stdout()

    def say(message: dict[str, Any]) -> None:
        stream.write(f"{json.dumps(message)}\n")
        stream.flush()

    with open(0, "rb", buffering=0, closefd=False) as stdin:
        asked = json.loads(stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    if asked["log"]:
        _log_to_stderr()
    try:
        if asked["job"] is None:
            _probe(say, asked["device"])
        else:
            _measure(Job(**asked["job"]), say)
        say({"event": "done"})
    except AutoGLMError as error:
        say({"event": "failed", "message": error.message, "hint": error.hint})
    except (ValueError, TypeError, MemoryError) as error:
        say({"event": "failed", "message": str(error) or type(error).__name__, "hint": ""})


def _take_stdout() -> TextIO:
    """The pipe behind stdout, for messages alone: what a driver prints goes to stderr."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(pipe, "w", encoding="utf-8")


def _end_with_stdin() -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock would be held at exit
        pass
    os._exit(1)


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("autoglm_gguf.llama_cpp").setLevel(logging.DEBUG)


# --- machine and versions ---


def _probe(say: Say, wanted: str | None) -> None:
    devices = probe_devices()
    gpus = [device.name for device in choose_devices(devices, wanted)]
    memory = probe_memory()
    processor = next((d.description for d in devices if d.kind == _CPU), "")
    machine = Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=processor or platform.processor() or platform.machine(),
        n_cores=usable_cores(),
        memory_bytes=None if memory is None else memory.total_bytes,
        devices=tuple(_facts(device) for device in devices if device.kind != _CPU),
    )
    versions = Versions(
        package=autoglm_gguf.__version__,
        python=platform.python_version(),
        llama_cpp_python=PINNED_VERSION,  # probe_devices has refused every other one
        llama_cpp=LLAMA_CPP_COMMIT,
        backends=tuple(sorted({device.backend for device in devices})),
    )
    say(
        {
            "event": "probed",
            "machine": asdict(machine),
            "versions": asdict(versions),
            "gpus": gpus,
            "no_gpu": explain_no_gpu(devices),
        }
    )


def _facts(device: Device) -> DeviceFacts:
    return DeviceFacts(
        device.name, device.description, device.backend, device.kind, device.total_bytes
    )


# --- one configuration ---


def _measure(job: Job, say: Say) -> None:
    """The first run is the warm-up: what is held is read after it, its times are not counted."""
    say({"event": "stage", "run": 0, "what": "plan"})
    plan = plan_memory(
        job.text, mmproj=job.mmproj, memory_budget=job.memory_budget_bytes, **job.context
    )
    _check_room(job, plan)
    say({"event": "stage", "run": 0, "what": LOAD})
    with buffer_report() as buffers:
        engine = _load(job, plan)
    try:
        say(
            {
                "event": "planned",
                "chosen": _chosen(plan),
                "devices": plan.devices,
                "notes": engine.info.notes,
            }
        )
        screen = _screen(job, engine)
        for run in range(1 + job.repeats):
            figures = [*_run(engine, job, screen, _stages(say, run))]
            if run == 0:
                say({"event": "held", **asdict(_held(engine, plan, buffers))})
            else:
                say({"event": "figures", "figures": figures})
    finally:
        engine.close()
    for run in range(1, 1 + job.repeats):
        say({"event": "stage", "run": run, "what": LOAD})
        began = time.perf_counter()
        engine = _load(job, plan)
        elapsed = _milliseconds(began)
        engine.close()
        say({"event": "figures", "figures": [(LOAD, 0, MILLISECONDS, elapsed)]})
    if job.self_test and plan.devices:
        # Last: it loads the model for the CPU alone too, and belongs to no figure.
        say({"event": "stage", "run": job.repeats, "what": SELF_TEST})
        say({"event": "noted", "notes": _self_test(job)})


def _self_test(job: Job) -> list[str]:
    """What the device's answers are worth, in the words of every other load."""
    engine = load_engine(
        job.text, job.mmproj, job.memory_budget_bytes, self_test=True, context=job.context
    )
    engine.close()
    return [note for note in engine.info.notes if note.startswith(SELF_TEST)]


def _check_room(job: Job, plan: MemoryPlan) -> None:
    n_prompt, n_ctx = max(job.prompt_n) + job.predicted_n, plan.context.n_ctx
    if n_prompt > n_ctx:
        raise ContextFullError(
            f"n_ctx: made too small by the memory budget ({n_ctx}, required {n_prompt})",
            n_prompt=n_prompt,
            n_ctx=n_ctx,
            hint="give a larger --memory-budget, or a smaller --prompt-n",
        )


def _load(job: Job, plan: MemoryPlan) -> LlamaEngine:
    mmproj = None if job.mmproj is None else Path(job.mmproj)
    return LlamaEngine(Path(job.text), mmproj, plan.context, plan=plan)


def _chosen(plan: MemoryPlan) -> dict[str, Any]:
    context = asdict(plan.context)
    context["n_threads"] = plan.context.n_threads or usable_cores()
    return {
        **context,
        "weights": plan.weights,
        "streamed_layers": len(plan.places.streamed),
        "tower": plan.tower,
        "tower_on_device": plan.tower_on_device,
    }


def _held(engine: LlamaEngine, plan: MemoryPlan, buffers: dict[tuple[str, str], int]) -> Held:
    usage = AutoGLM(engine).memory()
    places: dict[str, int] = {}
    for (place, _), n_bytes in buffers.items():
        places[place] = places.get(place, 0) + n_bytes
    return Held(
        planned_bytes=plan.peak_bytes,
        planned_device_bytes=plan.device_bytes,
        peak_bytes=0 if usage is None else usage.peak_bytes,
        anonymous_bytes=0 if usage is None else usage.anonymous_bytes,
        mapped_bytes=0 if usage is None else usage.mapped_bytes,
        device_bytes=engine.device_bytes,
        buffers=places,
    )


def _screen(job: Job, engine: LlamaEngine) -> Pixels | None:
    """A screenshot as the tower takes it; the tower's time does not depend on what it shows."""
    limits, n_ctx = engine.info.vision, engine.info.n_ctx
    if job.screen is None or limits is None:
        return None
    from PIL import Image

    width, height = job.screen
    image = Image.frombytes("RGB", (width, height), random.Random(0).randbytes(3 * width * height))
    most = min(engine.info.max_image_tokens or n_ctx, n_ctx)
    return read_pixels(image, limits, max_image_tokens=most)


def _stages(say: Say, run: int) -> Callable[[str], None]:
    return lambda what: say({"event": "stage", "run": run, "what": what})


def _run(
    engine: LlamaEngine, job: Job, screen: Pixels | None, stage: Callable[[str], None]
) -> Iterator[Figure]:
    """Prompts, tokens after the last of them, and a screenshot."""
    words = random.Random(0)
    sampler = engine.open_sampler(SamplingParams())
    try:
        token = 0
        for n in job.prompt_n:
            stage(f"prefill {n}")
            prompt = words.choices(range(engine.info.n_vocab), k=n)
            engine.keep(0)
            began = time.perf_counter()
            for at in range(0, n, engine.n_batch):
                engine.eval_tokens(prompt[at : at + engine.n_batch])
            engine.logits()  # waits for the device: evaluating only queues the work there
            yield "prefill", n, TOKENS_PER_SECOND, 1000 * n / _milliseconds(began)
            token = sampler.sample()
            yield "ttft", n, MILLISECONDS, _milliseconds(began)
        stage(f"decode {job.predicted_n}")
        began = time.perf_counter()
        for _ in range(job.predicted_n):  # on past a token that would end the turn
            engine.eval_tokens([token])
            token = sampler.sample()
        per_second = 1000 * job.predicted_n / _milliseconds(began)
        yield "decode", job.predicted_n, TOKENS_PER_SECOND, per_second
        if screen is None:
            return
        n = screen.n_tokens
        stage(f"image {n}")
        engine.keep(0)
        began = time.perf_counter()
        image = engine.encode_image(screen.array, screen.grid)
        encoded = _milliseconds(began)
        yield "image_encode", n, MILLISECONDS, encoded
        engine.eval_image(image)
        engine.logits()
        per_second = 1000 * n / (_milliseconds(began) - encoded)
        yield "image_prefill", n, TOKENS_PER_SECOND, per_second
        sampler.sample()
        yield "image_ttft", n, MILLISECONDS, _milliseconds(began)
    finally:
        sampler.close()


def _milliseconds(began: float) -> float:
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
