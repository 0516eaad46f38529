"""`verify`: the same inputs through the original and the GGUF pair, and how far the outputs differ.

Weights are compared at any size and without torch; logits and image embeddings where torch and
transformers are installed. What could not be checked is part of the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.config import ContextParams
from autoglm_gguf.engine.base import ImageEmbedding
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.errors import NativeLibraryError, UnsupportedModelError
from autoglm_gguf.evaluate.screens import draw_screen, held_out_tasks
from autoglm_gguf.evaluate.weights import (
    EXACT_TYPES,
    LARGEST_RELATIVE_RMSE,
    TensorDifference,
    compare_files,
    compare_with_checkpoint,
)
from autoglm_gguf.gguf.describe import describe_pair
from autoglm_gguf.gguf.header import read_header
from autoglm_gguf.messages import ImagePart, Message, TextPart
from autoglm_gguf.prompt import render_prompt
from autoglm_gguf.vision import Pixels, read_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

    from autoglm_gguf.evaluate.original import OriginalModel

PROMPTS = (
    "打开微信",
    "Open Chrome and search for the weather in Paris, then go back to the home screen.",
    "def area(r):\n    return 3.14159 * r ** 2  # 圆的面积 🎉",
    "今天的日期是: 2026年11月22日 星期日\n你是手机操作助手。\n在设置里打开蓝牙，等待3秒。",
)
IMAGE_SIZES = ((336, 672), (500, 1000))
_N_BATCH = 256
# Lowest cosine of logits over positions that a file of each type must reach. What rounding does to
# logits is the model's own: these are autoglm-tiny's figures with a margin, see
# docs/reference/verify.md. Types not listed have no threshold: the figures are shown alone.
LOWEST_COSINE = {
    "F32": 0.99999,
    "F16": 0.9999,
    "BF16": 0.999,
    "Q8_0": 0.999,
    **dict.fromkeys(("Q6_K", "Q5_K", "Q5_1", "Q5_0"), 0.99),
    **dict.fromkeys(("Q4_K", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0"), 0.98),
    **dict.fromkeys(("Q3_K", "IQ3_S"), 0.95),
    "IQ3_XXS": 0.9,
    "Q2_K": 0.6,
}
# The same after an image, where a model is less sure of itself. At Q2_K nothing is promised.
LOWEST_IMAGE_TEXT_COSINE = {
    **{kind: min(limit, 0.9999) for kind, limit in LOWEST_COSINE.items() if limit >= 0.99},
    **dict.fromkeys(("Q4_K", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0"), 0.94),
    **dict.fromkeys(("Q3_K", "IQ3_S", "IQ3_XXS"), 0.8),
}
F32_RELATIVE_MAX_ABS = 1e-5
LOWEST_EMBEDDING_COSINE = {"F32": 0.9999, "F16": 0.9999, "BF16": 0.999, "Q8_0": 0.998, "Q4_0": 0.9}


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far one kind of output is from the original, over all inputs."""

    what: str
    """``text logits``, ``image embeddings`` or ``image and text logits``."""
    type_name: str
    """The ggml type whose thresholds count: the coarsest of the files that take part."""
    n_positions: int
    max_abs: float
    relative_max_abs: float
    """``max_abs`` over the largest absolute value of the original's output."""
    lowest_cosine: float
    """Over positions."""
    kl_divergence: float | None
    """Mean over positions, original against ours, nats; None for embeddings."""
    same_top: float | None
    """Share of positions with the same most probable token; None for embeddings."""
    required: str
    """The thresholds, as text; empty if there is none for the file's type."""
    passed: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `verify` found."""

    weights: tuple[TensorDifference, ...]
    outputs: tuple[OutputDifference, ...]
    unchecked: tuple[str, ...]
    """What was not compared, and why."""

    @property
    def passed(self) -> bool:
        """Whether every tensor and every output is within its threshold."""
        return all(t.passed for t in self.weights) and all(o.passed for o in self.outputs)


def verify(
    checkpoint: Path,
    text: Path,
    mmproj: Path | None,
    *,
    prompts: Sequence[str] = PROMPTS,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare a GGUF pair with the checkpoint it was made from.

    Args:
        checkpoint: The published directory.
        text: The text GGUF.
        mmproj: Its vision tower; None leaves the tower out, and the report says so.
        prompts: User messages for the logits.
        on_tensor: Told ``(done, total)`` while weights are compared.

    Raises:
        CheckpointError: The checkpoint is broken.
        GGUFError: A file is broken, or was not made from this checkpoint.
    """
    weights = compare_with_checkpoint(checkpoint, text, mmproj, on_tensor=on_tensor)
    unchecked = [] if mmproj is not None else ["vision tower: no mmproj was given or found"]
    outputs: list[OutputDifference] = []
    try:
        from autoglm_gguf.evaluate.original import OriginalModel

        with OriginalModel(checkpoint) as original:
            outputs = list(_compare_outputs(original, text, mmproj, prompts))
    except (NativeLibraryError, UnsupportedModelError) as error:
        unchecked.append(f"logits and image embeddings: {error.message}")
    unchecked += _without_threshold(weights, outputs)
    return Report(tuple(weights), tuple(outputs), tuple(unchecked))


def verify_against(
    ours: Path, against: Path, *, on_tensor: Callable[[int, int], None] | None = None
) -> Report:
    """Compare two GGUF text files: weights, and logits on `PROMPTS`.

    Raises:
        GGUFError: A file is broken, or they hold different tensors.
    """
    for path in (ours, against):
        describe_pair(path, None)  # refuses an mmproj
    weights = compare_files(ours, against, on_tensor=on_tensor)
    first, second = _open(ours, None), _open(against, None)
    try:
        pairs = []
        for ids in _prompt_ids(first, PROMPTS):
            pairs.append((_logits(first, ids), _logits(second, ids)))
        # Thresholds are stated against an exact original; a rounded one gives figures alone.
        kind, rounded = _type_of(ours), _type_of(against) not in EXACT_TYPES
        output = _difference("text logits", pairs, kind, held=not rounded)
    finally:
        first.close()
        second.close()
    unchecked = ["vision tower: two text files were compared"]
    if rounded:
        unchecked.append(f"thresholds: {against.name} is rounded itself, no exact original")
    unchecked += _without_threshold(weights, [output])
    return Report(tuple(weights), (output,), tuple(unchecked))


def _without_threshold(
    weights: Sequence[TensorDifference], outputs: Sequence[OutputDifference]
) -> Iterator[str]:
    """What was compared, but held to nothing."""
    for kind, n in Counter(t.type_name for t in weights if t.limit is None).items():
        yield f"weights: no threshold for {n} tensors of {kind}, figures only"
    for output in outputs:
        if not output.required:
            yield f"{output.what}: no threshold for {output.type_name}, figures only"


def _compare_outputs(
    original: OriginalModel, text: Path, mmproj: Path | None, prompts: Sequence[str]
) -> Iterator[OutputDifference]:
    engine = _open(text, mmproj)
    try:
        pairs = [
            (_logits(engine, ids), original.logits(ids)) for ids in _prompt_ids(engine, prompts)
        ]
        yield _difference("text logits", pairs, _type_of(text))
        if mmproj is not None and engine.info.vision is not None:
            yield from _compare_images(original, engine, text, mmproj)
    finally:
        engine.close()


def _compare_images(
    original: OriginalModel, engine: LlamaEngine, text: Path, mmproj: Path
) -> Iterator[OutputDifference]:
    embeddings, logits = [], []
    assert engine.info.vision is not None
    for size in IMAGE_SIZES:
        image = _test_image(size)
        inputs = original.pixels(image)
        pixels = read_pixels(image, engine.info.vision)
        encoded = engine.encode_image(pixels.array, pixels.grid)
        embeddings.append((encoded.data, original.embed(inputs)))
        head, tail = _image_prompt(engine)
        ids = [*head, *[original.image_token_id] * pixels.n_tokens, *tail]
        expected = original.logits(ids, inputs)
        logits.append((_image_logits(engine, head, encoded, tail), _cut(expected, head, pixels)))
    yield _difference("image embeddings", embeddings, _type_of(mmproj), LOWEST_EMBEDDING_COSINE)
    coarsest = min(_type_of(text), _type_of(mmproj), key=_rank)
    yield _difference("image and text logits", logits, coarsest, LOWEST_IMAGE_TEXT_COSINE)


def _cut(logits: NDArray[np.float32], head: list[int], pixels: Pixels) -> NDArray[np.float32]:
    """Positions of the text only; llama.cpp gives none inside an image."""
    after = len(head) + pixels.n_tokens
    return np.concatenate([logits[: len(head)], logits[after:]])


def _image_logits(
    engine: LlamaEngine, head: list[int], image: ImageEmbedding, tail: list[int]
) -> NDArray[np.float32]:
    before = _logits(engine, head)
    engine.eval_image(image)
    return np.concatenate([before, _logits(engine, tail, reset=False)])


def _image_prompt(engine: LlamaEngine) -> tuple[list[int], list[int]]:
    message = Message("user", (ImagePart(b""), TextPart(PROMPTS[0])))
    template = engine.info.chat_template or "<|begin_of_image|><|image|><|end_of_image|>"
    head, tail = render_prompt([message], template).segments
    return engine.tokenize(head), engine.tokenize(tail)


def _prompt_ids(engine: LlamaEngine, prompts: Sequence[str]) -> list[list[int]]:
    template = engine.info.chat_template
    if template is None:
        return [engine.tokenize(prompt) for prompt in prompts]
    messages = ([Message("user", prompt)] for prompt in prompts)
    return [engine.tokenize(render_prompt(m, template).text) for m in messages]


def _open(text: Path, mmproj: Path | None) -> LlamaEngine:
    """f32 cache and no fused attention: what is left of the difference is the weights'."""
    params = ContextParams(
        n_ctx=4096, n_batch=_N_BATCH, type_k="f32", type_v="f32", flash_attn=False
    )
    return LlamaEngine(text, mmproj, params, n_outputs_max=_N_BATCH)


def _logits(engine: LlamaEngine, ids: list[int], *, reset: bool = True) -> NDArray[np.float32]:
    """``(n_tokens, n_vocab)``, batch by batch."""
    if reset:
        engine.keep(0)
    rows: list[NDArray[np.float32]] = []
    for at in range(0, len(ids), _N_BATCH):
        part = ids[at : at + _N_BATCH]
        engine.eval_tokens(part, n_outputs=len(part))
        rows += [engine.logits(i) for i in range(len(part))]
    return np.stack(rows)


def _difference(
    what: str,
    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
    kind: str,
    limits: Mapping[str, float] = LOWEST_COSINE,
    *,
    held: bool = True,
) -> OutputDifference:
    of_logits = limits is not LOWEST_EMBEDDING_COSINE
    ours = np.concatenate([pair[0] for pair in pairs]).astype(np.float64)
    theirs = np.concatenate([pair[1] for pair in pairs]).astype(np.float64)
    max_abs = float(np.abs(ours - theirs).max())
    relative = max_abs / float(np.abs(theirs).max())
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosine = float(((ours * theirs).sum(-1) / norms).min())
    required, passed = [], True
    limit = limits.get(kind)
    if held and limit is not None:
        required.append(f"cosine >= {limit}")
        passed = cosine >= limit
    if held and kind == "F32" and limits is LOWEST_COSINE:
        required.append(f"relative max abs <= {F32_RELATIVE_MAX_ABS:g}")
        passed = passed and relative <= F32_RELATIVE_MAX_ABS
    return OutputDifference(
        what,
        kind,
        len(ours),
        max_abs,
        relative,
        cosine,
        kl_divergence(theirs, ours) if of_logits else None,
        float((ours.argmax(-1) == theirs.argmax(-1)).mean()) if of_logits else None,
        ", ".join(required),
        passed,
    )


def kl_divergence(base: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Mean KL divergence of ``other`` from ``base`` over rows of logits, in nats."""
    p, q = _log_softmax(base), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _type_of(path: Path) -> str:
    """The coarsest ggml type in a file: one matrix of it is enough to move every logit."""
    return min({tensor.type_name for tensor in read_header(path).tensors.values()}, key=_rank)


def _rank(kind: str) -> tuple[float, float, str]:
    """Sorts types from the coarsest; those without a threshold come first, so that none is held."""
    return (LOWEST_COSINE.get(kind, 0), -LARGEST_RELATIVE_RMSE.get(kind, 1), kind)


def _test_image(size: tuple[int, int]) -> Image:
    """A drawn phone screen, the same every time."""
    return draw_screen(held_out_tasks(4)[0].screen).resize(size)
