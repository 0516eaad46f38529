"""Layers on a GPU give the CPU's answers, wherever the layers and the KV cache lie."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from builders import Shape, build_sparse_checkpoint
from parity import lowest_cosine

from autoglm_gguf import AutoGLM, convert, plan_memory
from autoglm_gguf.devices import probe_devices
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.native.library import buffer_report
from autoglm_gguf.vision import read_pixels

pytestmark = pytest.mark.gpu
SCREEN = Path(__file__).parents[2] / "examples" / "screen.png"
N_LAYERS = 6  # autoglm-tiny's
ALL = N_LAYERS + 1  # and the output
SAID = '<think>打开微信。</think>\n<answer>do(action="Launch", app="微信")'
DONE = 'do(action="Launch", app="Settings")'
PROMPT = (
    f"[gMASK]<sop><|user|>\n打开微信<|assistant|>\n{SAID}</answer><|user|>\n<|begin_of_image|>",
    "<|end_of_image|>Open Settings<|assistant|>\n<think>Open Settings.</think>\n",
)
# lavapipe: q8_0 0.99995 and 0.010 with all layers, else, and f16, 0.99999 and 0.004
LOWEST_COSINE, LARGEST_SHARE = 0.999, 0.02
# 12 layers of 21 MB as f16, and 6 MB of embeddings and output
LARGE = Shape(
    hidden_size=1024,
    n_layers=12,
    n_heads=16,
    head_dim=64,
    intermediate_size=2560,
    n_vocab=1536,
    mrope_section=(4, 4, 8),
)
LOADING = """
import json, sys
from pathlib import Path
from autoglm_gguf import plan_memory
from autoglm_gguf.engine.llama import LlamaEngine
text, budget, device = sys.argv[1:]
plan = plan_memory(text, mmproj=None, memory_budget=int(budget), device=device, n_ctx=512)
engine = LlamaEngine(Path(text), None, plan.context, plan=plan)
planned = {"n": plan.context.n_gpu_layers, "peak": plan.peak_bytes, "device": plan.device_bytes}
print(json.dumps({**planned, "reported": engine.device_bytes, "notes": plan.notes}))
"""
BUDGET_BYTES = 240 * 10**6
ROUNDING_BYTES = 5300  # ggml prints hundredths of a MiB


class Outputs(NamedTuple):
    """What one placement of the layers computes of `PROMPT` around the example screenshot."""

    logits: np.ndarray
    """``(n_tokens, n_vocab)``: every text position, before and after the image."""
    image: np.ndarray
    """``(n_image_tokens, n_embd)``: the image, out of the vision tower."""
    buffers: dict[tuple[str, str], int]
    """``(buffer, use)`` to bytes, as ggml reports them."""


@pytest.fixture(scope="session")
def compute(tiny_pair: Callable[[str], tuple[Path, Path]], device: str) -> Callable[..., Outputs]:
    def with_layers(outtype: str, n_gpu_layers: int, **given: Any) -> Outputs:
        text, mmproj = tiny_pair(outtype)
        sizes = {"n_ctx": 1024, "n_batch": 256, "n_gpu_layers": n_gpu_layers, "device": device}
        plan = plan_memory(text, mmproj=mmproj, memory_budget="none", **sizes | given)
        with buffer_report() as buffers:
            engine = LlamaEngine(text, mmproj, plan.context, n_outputs_max=256, plan=plan)
        try:
            assert engine.info.vision is not None
            pixels = read_pixels(SCREEN, engine.info.vision, max_image_tokens=200)
            image = engine.encode_image(pixels.array, pixels.grid)
            head = text_logits(engine, PROMPT[0])
            engine.eval_image(image)
            logits = np.concatenate([head, text_logits(engine, PROMPT[1])])
            return Outputs(logits, image.data, buffers)
        finally:
            engine.close()

    return with_layers


@pytest.fixture(scope="session")
def on_cpu(compute: Callable[..., Outputs]) -> dict[str, Outputs]:
    return {outtype: compute(outtype, 0) for outtype in ("q8_0", "f16")}


@pytest.fixture(scope="session")
def offloaded(tiny_pair: Callable[[str], tuple[Path, Path]], device: str) -> Iterator[AutoGLM]:
    text, mmproj = tiny_pair("q8_0")
    sizes: dict[str, Any] = {"n_ctx": 2048, "n_batch": 32, "max_image_tokens": 200}
    places = {"n_gpu_layers": "all", "device": device}
    with AutoGLM.load(text, mmproj=mmproj, self_test=False, **sizes, **places) as model:
        yield model


def text_logits(engine: LlamaEngine, text: str) -> np.ndarray:
    ids = engine.tokenize(text)
    engine.eval_tokens(ids, n_outputs=len(ids))
    return np.stack([engine.logits(i) for i in range(len(ids))])


def assert_agrees(here: Outputs, cpu: Outputs) -> None:
    """The image to the bit, since the tower stays on the CPU; logits by angle and by distance."""
    np.testing.assert_array_equal(here.image, cpu.image)
    assert lowest_cosine(here.logits, cpu.logits) > LOWEST_COSINE
    assert np.abs(here.logits - cpu.logits).max() < LARGEST_SHARE * np.ptp(cpu.logits)
    assert (here.logits.argmax(-1) == cpu.logits.argmax(-1)).all()


def test_without_layers_on_it_the_device_takes_no_part(on_cpu: dict[str, Outputs]) -> None:
    for outputs in on_cpu.values():
        assert {buffer[:3] for buffer, _ in outputs.buffers} == {"CPU"}


@pytest.mark.parametrize("n_gpu_layers", [1, 2, N_LAYERS // 2, ALL])
@pytest.mark.parametrize("outtype", ["q8_0", "f16"])
def test_logits_agree_with_the_cpu(
    outtype: str,
    n_gpu_layers: int,
    device: str,
    compute: Callable[..., Outputs],
    on_cpu: dict[str, Outputs],
) -> None:
    here = compute(outtype, n_gpu_layers)
    assert here.buffers[device, "model"] > 0
    assert_agrees(here, on_cpu[outtype])


def test_kv_cache_stays_off_the_device_when_told(
    device: str, compute: Callable[..., Outputs], on_cpu: dict[str, Outputs]
) -> None:
    there, here = compute("q8_0", ALL), compute("q8_0", ALL, offload_kqv=False)
    assert there.buffers[device, "KV"] == here.buffers["CPU", "KV"] > 0
    assert (device, "KV") not in here.buffers
    assert_agrees(here, on_cpu["q8_0"])


@pytest.mark.parametrize(
    "given",
    [
        {"n_gpu_layers": 1},
        {"n_gpu_layers": 3, "n_ctx": 4096, "n_batch": 512},
        {"n_gpu_layers": ALL, "type_k": "q8_0", "type_v": "q8_0"},
        {"n_gpu_layers": ALL, "offload_kqv": False},
        {"n_gpu_layers": ALL, "flash_attn": False},
    ],
    ids=str,
)
def test_planned_device_bytes_are_within_5_percent_of_what_ggml_reports(
    given: dict[str, Any], tiny_pair: Callable[[str], tuple[Path, Path]], device: str
) -> None:
    text, mmproj = tiny_pair("q8_0")
    plan = plan_memory(text, mmproj=mmproj, device=device, **given)
    with buffer_report() as buffers:
        engine = LlamaEngine(text, mmproj, plan.context, plan=plan)
    reported = engine.device_bytes
    engine.close()
    planned = {item.name: item.decode_bytes for item in plan.items if item.on_device}
    uses = {"gpu_weights": "model", "gpu_kv_cache": "KV", "gpu_compute": "compute"}
    found = {name: buffers.get((device, use), 0) for name, use in uses.items()}
    assert reported == sum(found.values())
    assert planned == pytest.approx(found, rel=0.05, abs=ROUNDING_BYTES)
    assert plan.device_bytes == pytest.approx(reported, rel=0.05)


def test_auto_under_a_budget_below_the_model_leaves_layers_off_the_device(
    tmp_path: Path, device: str
) -> None:
    """In a process of its own, where nothing but the model is held."""
    checkpoint = build_sparse_checkpoint(tmp_path / "checkpoint", LARGE)
    text = convert(checkpoint, tmp_path / "pair", "f16").text
    assert text.stat().st_size > BUDGET_BYTES
    command = [sys.executable, "-c", LOADING, str(text), str(BUDGET_BYTES), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    n = found["n"]
    assert 1 < n <= LARGE.n_layers
    reason = f"auto: {n - 1} of {LARGE.n_layers} layers and the output fit {device}"
    assert any(note.startswith(f"n_gpu_layers: {n} ({reason}") for note in found["notes"])
    assert found["peak"] <= BUDGET_BYTES
    assert found["device"] == pytest.approx(found["reported"], rel=0.05)


def test_auto_takes_a_gpu_and_names_a_driver_for_the_cpu_instead_of_taking_it(
    tiny_pair: Callable[[str], tuple[Path, Path]], device: str
) -> None:
    plan = plan_memory(tiny_pair("q8_0")[0], mmproj=None)
    [note] = plan.notes
    if any(found.is_gpu and not found.is_software for found in probe_devices()):
        assert plan.devices and note.startswith(f"n_gpu_layers: {ALL} (auto: all layers")
    else:
        assert not plan.devices
        assert note.startswith("n_gpu_layers: 0 (auto: no GPU") and f"--device {device}" in note


def test_stream_gives_the_known_answer(offloaded: AutoGLM) -> None:
    chunks = list(offloaded.stream("打开微信"))
    assert "".join(chunk.text for chunk in chunks) == SAID
    assert chunks[-1].finish_reason == "stop"


def test_act_reads_a_screenshot(offloaded: AutoGLM) -> None:
    assert offloaded.act("Open Settings", screenshot=SCREEN).action.render() == DONE


def test_tower_on_the_device_is_right_or_goes_back_to_the_cpu(
    tiny_pair: Callable[[str], tuple[Path, Path]],
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AUTOGLM_GGUF_CACHE", str(tmp_path))
    text, mmproj = tiny_pair("q8_0")
    places: dict[str, Any] = {"n_gpu_layers": "all", "device": device, "mmproj_offload": True}
    with AutoGLM.load(text, mmproj=mmproj, max_image_tokens=200, **places) as model:
        [note] = [note for note in model.info.notes if note.startswith("self-test:")]
        assert f"{device} says what the CPU says" in note
        assert model.act("Open Settings", screenshot=SCREEN).action.render() == DONE


def test_closed_stream_leaves_the_model_usable(offloaded: AutoGLM) -> None:
    stream = offloaded.stream("打开微信")
    next(stream)
    stream.close()
    assert offloaded.generate("打开微信").text == SAID


class Counting(LlamaEngine):
    """Counts batches, and calls back after the second one."""

    n_calls = 0
    after_second: Callable[[], None]

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        super().eval_tokens(tokens, n_outputs=n_outputs)
        self.n_calls += 1
        if self.n_calls == 2:
            self.after_second()


def test_cancel_stops_between_batches(
    tiny_pair: Callable[[str], tuple[Path, Path]], device: str
) -> None:
    """No backend but the CPU's and Metal's can be stopped inside a batch."""
    text, _ = tiny_pair("q8_0")
    sizes: dict[str, Any] = {"n_ctx": 1024, "n_batch": 32, "n_gpu_layers": ALL, "device": device}
    plan = plan_memory(text, mmproj=None, **sizes)
    engine = Counting(text, None, plan.context, plan=plan)
    with AutoGLM(engine) as model:
        engine.after_second = model.cancel
        answer = model.generate("a" * 400, raw=True)
        assert (answer.finish_reason, answer.text, engine.n_calls) == ("cancelled", "", 2)
        assert model.generate("打开微信").text == SAID


@pytest.mark.parametrize("n_gpu_layers", [1, ALL])
def test_saved_session_goes_on_after_a_restart(
    tiny_pair: Callable[[str], tuple[Path, Path]], device: str, n_gpu_layers: int, tmp_path: Path
) -> None:
    text, mmproj = tiny_pair("q8_0")
    sizes: dict[str, Any] = {"n_ctx": 1024, "max_image_tokens": 64, "device": device}

    def load(n: int) -> AutoGLM:
        return AutoGLM.load(text, mmproj=mmproj, self_test=False, n_gpu_layers=n, **sizes)

    with load(n_gpu_layers) as model:
        chat = model.chat()
        chat.send("Open Settings", image=SCREEN, max_tokens=6)
        chat.save(tmp_path / "a")
        wanted = chat.send("打开微信", max_tokens=6)
    with load(n_gpu_layers) as model:
        found = model.load_chat(tmp_path / "a").send("打开微信", max_tokens=6)
    assert found.tokens == wanted.tokens
    assert found.timings.cache_n == wanted.timings.cache_n > 64
    with load(0) as model:
        assert f"n_gpu_layers: {n_gpu_layers} when saved, 0 now" in str(
            model.load_chat(tmp_path / "a").notes
        )
