"""Trust, then use: before a GPU is used with a model, it must say what the CPU says.

Drivers have bugs that show as fluent nonsense. So at a device's first use with a model, a short
greedy answer, and an image where the tower lies there too, are compared with the CPU's; what
disagrees stays on the CPU. The verdict is remembered until device, driver, model or library change.
Knows engines and plans; what a device is, and who drives it, is `native.ggml`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf import __version__
from autoglm_gguf.devices import probe_devices
from autoglm_gguf.engine.base import EngineInfo, ImageEmbedding
from autoglm_gguf.errors import DoesNotFitError, EngineError
from autoglm_gguf.memory.plan import MemoryPlan
from autoglm_gguf.native.library import PINNED_VERSION

# Long enough for the kernels that work on batches; the answer after it for those on one token.
_PROMPT = (
    "The phone shows the settings page. Open Wi-Fi, then go back and read the battery level. "
    "请打开设置,然后返回桌面。 1 2 3 4 5 6 7 8 9 10, {'x': 499, 'y': 120}."
)
_N_PROMPT, _N_ANSWER = 64, 16
_GRID = (8, 16)
# What int8 activations on one side and f16 on the other make of the same weights stays well within.
_MIN_COSINE = 0.98
_MIN_IMAGE_COSINE = 0.98
_MAX_GAP = 0.1  # of the distance from the median logit to the best
_NVIDIA = Path("/proc/driver/nvidia/version")


class Measurable(Protocol):
    """What an engine must have to be compared."""

    @property
    def info(self) -> EngineInfo:
        """The model's properties."""

    @property
    def n_batch(self) -> int:
        """Tokens a batch at most."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids."""

    def keep(self, n: int) -> None:
        """Forget all but the first ``n`` pieces."""

    def eval_tokens(self, tokens: Sequence[int]) -> None:
        """Evaluate a batch."""

    def logits(self) -> NDArray[np.float32]:
        """``(n_vocab,)`` of the last token."""

    def encode_image(self, pixels: NDArray[np.uint8], grid: tuple[int, int]) -> ImageEmbedding:
        """Run the vision tower."""

    def add_note(self, note: str) -> None:
        """Tell it in ``info.notes``."""

    def close(self) -> None:
        """Free everything."""


E = TypeVar("E", bound=Measurable)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an engine said."""

    answer: tuple[int, ...]
    logits: NDArray[np.float32]
    """``(n_answer, n_vocab)``: what each token of the answer was chosen from."""
    image: NDArray[np.float32] | None
    """``(n_tokens, n_embd)``; None where the tower was not asked."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be left to a device."""

    text: bool
    image: bool
    reason: str
    """One sentence with the figures."""


def gather(
    engine: Measurable, *, with_image: bool, answer: Sequence[int] | None = None
) -> Evidence:
    """Let an engine answer a fixed prompt.

    Args:
        engine: Used alone; what it had evaluated is forgotten.
        with_image: Encode a fixed image too.
        answer: Tokens it is led through; None lets it choose, greedily.
    """
    image = engine.encode_image(_picture(), _GRID).data if with_image else None
    engine.keep(0)
    n_ctx = engine.info.n_ctx
    n_answer = min(_N_ANSWER, n_ctx // 2)
    prompt = engine.tokenize(_PROMPT)[: min(_N_PROMPT, n_ctx - n_answer)]
    for at in range(0, len(prompt), engine.n_batch):
        engine.eval_tokens(prompt[at : at + engine.n_batch])
    found: list[int] = []
    rows: list[NDArray[np.float32]] = []
    for n in range(n_answer):
        rows.append(engine.logits())
        found.append(int(rows[-1].argmax()) if answer is None else answer[n])
        engine.eval_tokens([found[-1]])
    engine.keep(0)
    return Evidence(tuple(found), np.stack(rows), image)


def compare(cpu: Evidence, device: Evidence, name: str) -> Verdict:
    """Judge a device that was led through the CPU's answer.

    Its logits must point the same way at every token, and where it would choose another one, that
    must be nearly as good in the CPU's eyes.
    """
    cosines = _cosines(cpu.logits, device.logits)
    best = cpu.logits.max(1)
    chosen = np.take_along_axis(cpu.logits, device.logits.argmax(1)[:, None], 1)[:, 0]
    gaps = (best - chosen) / np.maximum(best - np.median(cpu.logits, 1), 1e-9)
    lowest, worst = float(cosines.min()), float(gaps.max())
    text = bool(np.isfinite(device.logits).all()) and lowest >= _MIN_COSINE and worst <= _MAX_GAP
    said = "says" if text else "does not say"
    reason = f"{name} {said} what the CPU says ({len(cosines)} tokens, lowest cosine {lowest:.4f})"
    if cpu.image is None or device.image is None:
        return Verdict(text, True, reason)
    seen = float(_cosines(cpu.image, device.image).mean())
    image = seen >= _MIN_IMAGE_COSINE
    sees = "sees" if image else "does not see"
    return Verdict(text, image, f"{reason} and {sees} what it sees (mean cosine {seen:.4f})")


class TrustStore:
    """Verdicts on disk, one small JSON file each. What cannot be read or written is done without.

    Args:
        folder: Made when the first verdict is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str) -> Verdict | None:
        """A verdict kept before."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            value = json.loads((self._folder / f"{key}.json").read_text("utf-8"))["verdict"]
            if isinstance(value["text"], bool) and isinstance(value["image"], bool):
                return Verdict(value["text"], value["image"], str(value["reason"]))
        return None

    def keep(self, key: str, verdict: Verdict, facts: dict[str, Any]) -> None:
        """Keep a verdict, with what it was about for whoever opens the file."""
        draft = self._folder / f".{key}.{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({"verdict": asdict(verdict), **facts}, indent=1), "utf-8")
            draft.replace(self._folder / f"{key}.json")
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()


def about(plan: MemoryPlan, files: Sequence[Path | None]) -> dict[str, Any]:
    """What a verdict holds for: when any of it changes, the device is tested again."""
    params = plan.context
    driver = platform.release()
    with contextlib.suppress(OSError):
        driver += " " + _NVIDIA.read_text("utf-8").splitlines()[0]
    return {
        "devices": [
            (device.name, device.description, device.backend)
            for device in probe_devices()
            if device.name in plan.devices
        ],
        "driver": driver,
        "library": [PINNED_VERSION, __version__],
        "files": [_stamp(path) for path in files if path is not None],
        "parts": [plan.context.n_gpu_layers, plan.tower_on_device],
        "kernels": [params.type_k, params.type_v, params.flash_attn, params.offload_kqv],
    }


def open_trusted(
    plan: MemoryPlan,
    files: Sequence[Path | None],
    *,
    replan: Callable[..., MemoryPlan],
    open_engine: Callable[[MemoryPlan], E],
    store: TrustStore,
) -> E:
    """Open an engine as planned, or with what its device got wrong moved to the CPU.

    A note in its info tells the verdict.

    Args:
        plan: With layers on a GPU.
        files: The pair, to know it again.
        replan: Plans anew with other `ContextParams` fields.
        open_engine: Opens what a plan describes.
        store: Remembers.
    """
    facts = about(plan, files)
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    verdict, engine = store.find(key), None
    if verdict is None:
        try:
            alone = open_engine(replan(n_gpu_layers=0))
        except DoesNotFitError:
            engine = open_engine(plan)
            engine.add_note("self-test: skipped, since the CPU alone cannot hold the model")
            return engine
        try:
            cpu = gather(alone, with_image=plan.tower_on_device)
        finally:
            alone.close()
        engine, verdict = _test(plan, cpu, open_engine)
        if engine is not None:
            store.keep(key, verdict, facts)
    note = f"self-test: {verdict.reason}"
    if not (verdict.text and verdict.image):
        if engine is not None:
            engine.close()
        changed = {"mmproj_offload": False} if verdict.text else {"n_gpu_layers": 0}
        engine = open_engine(replan(**changed))
        note += "; images are encoded on the CPU" if verdict.text else "; the CPU does everything"
    engine = engine or open_engine(plan)
    engine.add_note(note)
    return engine


def _test(
    plan: MemoryPlan, cpu: Evidence, open_engine: Callable[[MemoryPlan], E]
) -> tuple[E | None, Verdict]:
    """An engine on the device, and its verdict; None in its place if the device failed."""
    name = ", ".join(plan.devices)
    engine: E | None = None
    try:
        engine = open_engine(plan)
        device = gather(engine, with_image=plan.tower_on_device, answer=cpu.answer)
    except EngineError as error:
        if engine is not None:
            engine.close()
        return None, Verdict(False, False, f"{name} failed ({error.message})")
    return engine, compare(cpu, device, name)


def _stamp(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return path.name, found.st_size, found.st_mtime_ns


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row by row."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    found: NDArray[np.float64] = (x * y).sum(1) / np.maximum(norms, 1e-30)
    return np.nan_to_num(found, nan=-1.0)


def _picture() -> NDArray[np.uint8]:
    """Something like a screen: a gradient, bars and buttons; ``(height, width, 3)``."""
    width, height = 28 * _GRID[0], 28 * _GRID[1]
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 90], axis=-1)
    picture[:24] = 20
    for n in range(4):
        top = 48 + 96 * n
        picture[top : top + 56, 24 : width - 24] = (230 - 50 * n, 40 + 60 * n, 250)
        picture[top + 20 : top + 36 : 2, 40:120:3] = 255 * (n % 2)
    return np.ascontiguousarray(picture.astype(np.uint8))
