"""The original side of each comparison: transformers in f32, and helpers for both sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from builders import read_json
from PIL import Image

from autoglm_gguf import ContextParams
from autoglm_gguf.engine.llama import LlamaEngine

N_BATCH = 256


@dataclass
class Original:
    """A checkpoint on both sides."""

    directory: Path
    model: Any
    tokenizer: Any
    processor: Any

    def logits(self, ids: list[int], image: Image.Image | None = None) -> np.ndarray:
        """``(n_tokens, n_vocab)`` in f32; ``ids`` hold the image token once per image token."""
        import torch

        batch: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if image is not None:
            batch |= self.pixels(image)
            batch["mm_token_type_ids"] = (
                batch["input_ids"] == self.model.config.image_token_id
            ).int()
        with torch.no_grad():
            return self.model(**batch).logits[0].numpy()

    def pixels(self, image: Image.Image) -> dict[str, Any]:
        """``pixel_values`` and ``image_grid_thw``."""
        return dict(self.processor(images=[image], return_tensors="pt"))

    def embed(self, image: Image.Image) -> np.ndarray:
        """``(n_image_tokens, n_embd)`` out of the vision tower."""
        import torch

        inputs = self.pixels(image)
        with torch.no_grad():
            out = self.model.model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"]
            ).pooler_output
        return (out[0] if isinstance(out, list | tuple) else out).numpy()


def load_original(directory: Path) -> Original:
    """transformers' own classes; the tokenizer is the fast one of tokenizer.json."""
    import torch
    import transformers
    from transformers import AutoTokenizer
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    [architecture] = read_json(directory / "config.json")["architectures"]
    of_46v = architecture == "Glm46VForConditionalGeneration"
    processor = Glm46VImageProcessorPil if of_46v else Glm4vImageProcessorPil
    model = getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32)
    return Original(
        directory,
        model.eval(),
        AutoTokenizer.from_pretrained(directory),
        processor.from_pretrained(directory),
    )


def exact_params(n_ctx: int = 4096) -> ContextParams:
    """f32 everywhere, no fused attention: what parity is stated for."""
    return ContextParams(n_ctx=n_ctx, n_batch=N_BATCH, type_k="f32", type_v="f32", flash_attn=False)


def screenshot(width: int, height: int, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Blocks of random colours, smooth enough that resizing matters and noise does not hide it."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (max(2, height // 40), max(2, width // 40), 4), np.uint8)
    image = Image.fromarray(blocks, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(mode)


def lowest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the rows of two ``(n, width)`` arrays."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / norms).min())


def engine_logits(engine: LlamaEngine, ids: list[int], *, reset: bool = True) -> np.ndarray:
    """``(n_tokens, n_vocab)``, batch by batch."""
    if reset:
        engine.keep(0)
    rows = []
    for at in range(0, len(ids), N_BATCH):
        part = ids[at : at + N_BATCH]
        engine.eval_tokens(part, n_outputs=len(part))
        rows += [engine.logits(i) for i in range(len(part))]
    return np.stack(rows)
