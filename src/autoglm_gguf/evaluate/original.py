"""The original model in transformers, its weights brought in part by part as they are needed.

The skeleton has no memory; each layer's weights are read from the shards just before it runs and
dropped after it, so that a 9B model runs in f32 on a machine that could not hold it. Needs torch
and transformers (``pip install "autoglm-gguf[reference]"``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.checkpoint.config import read_config
from autoglm_gguf.checkpoint.safetensors import LazyTensor, Shards
from autoglm_gguf.conversion.layouts import split_prefix
from autoglm_gguf.errors import NativeLibraryError, UnsupportedModelError
from autoglm_gguf.evaluate.actions import MAX_TOKENS
from autoglm_gguf.native.ggml import to_float32

_CLASSES = (
    "Glm4vForConditionalGeneration",
    "Glm46VForConditionalGeneration",
    "Glm4ForCausalLM",
    "GlmForCausalLM",
)


@dataclass(frozen=True, slots=True)
class _Unit:
    """A module that is called as a whole, and the weights it owns."""

    module: Any
    names: tuple[str, ...]


class OriginalModel:
    """A checkpoint's own logits and image embeddings, in f32.

    Args:
        checkpoint: The published directory.

    Raises:
        NativeLibraryError: torch or transformers is not installed.
        UnsupportedModelError: transformers has no class for this architecture.
        CheckpointError: The checkpoint is broken.
    """

    def __init__(self, checkpoint: Path) -> None:
        torch, transformers = _import()
        architecture = read_config(checkpoint).architecture
        if architecture not in _CLASSES or not hasattr(transformers, architecture):
            raise UnsupportedModelError(
                f"{checkpoint.name}: transformers has no class for {architecture}",
                hint="the weights can still be compared; only the logits cannot",
            )
        self._torch = torch
        self._directory = checkpoint
        self._shards = Shards(checkpoint)
        self._stored = {split_prefix(name): t for name, t in self._shards.tensors.items()}
        raw = transformers.AutoConfig.from_pretrained(checkpoint)
        with torch.device("meta"):
            model_class = getattr(transformers, architecture)
            self.model = model_class._from_config(raw, dtype=torch.float32).eval()
        self._tied = bool(read_config(checkpoint).text.tie_word_embeddings)
        for unit in self._units():
            self._hook(unit)
        self._make_buffers()

    def logits(
        self, ids: Sequence[int], image: dict[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Logits of every position.

        Args:
            ids: Tokens, the image token once per image token.
            image: What `pixels` gave, for a prompt with an image.

        Returns:
            ``(n_tokens, n_vocab)``.
        """
        torch = self._torch
        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
        if image is not None:
            inputs |= image
            image_id = self.model.config.image_token_id
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).int()
        with torch.no_grad():
            out: NDArray[np.float32] = self.model(**inputs, use_cache=False).logits[0].numpy()
        return out

    def embed(self, image: dict[str, Any]) -> NDArray[np.float32]:
        """Image embeddings ``(n_image_tokens, n_embd)`` of what `pixels` gave."""
        with self._torch.no_grad():
            out = self.model.model.get_image_features(
                image["pixel_values"], image["image_grid_thw"]
            ).pooler_output
        out = out[0] if isinstance(out, list | tuple) else out
        embedding: NDArray[np.float32] = out.numpy()
        return embedding

    def pixels(self, image: Any) -> dict[str, Any]:
        """transformers' own preprocessing of a Pillow image."""
        from transformers.models.glm4v.image_processing_pil_glm4v import (  # type: ignore[import-not-found, unused-ignore]
            Glm4vImageProcessorPil,
        )

        processor = Glm4vImageProcessorPil.from_pretrained(self._directory)
        return dict(processor(images=[image], return_tensors="pt"))

    def answer(
        self,
        head: Sequence[int],
        image: Any,
        tail: Sequence[int],
        *,
        draft: Sequence[int] = (),
        max_tokens: int = MAX_TOKENS,
    ) -> str:
        """The greedy answer to a prompt with one image.

        Args:
            head: Tokens before the image.
            image: A Pillow image at the size the tower is to see it, sides multiples of 28 px.
            tail: Tokens after it.
            draft: A likely answer: where it is right, its tokens cost one pass together instead
                of one each, which for a large model is what makes this bearable.
            max_tokens: Of the answer.

        Returns:
            Its text, special tokens included, without the token that ended the turn.
        """
        from tokenizers import Tokenizer

        stops = read_config(self._directory).eos_token_ids
        inputs = self.pixels(image)
        n_image = len(self.embed(inputs))
        prompt = [*head, *[self.image_token_id] * n_image, *tail]
        said: list[int] = []
        guess = list(draft)
        while len(said) < max_tokens:
            best = self.logits([*prompt, *said, *guess], inputs)[len(prompt) + len(said) - 1 :]
            for wanted, row in zip([*guess, None], best, strict=True):
                said.append(int(row.argmax()))
                if said[-1] in stops or said[-1] != wanted:
                    break
            guess = []
            if said[-1] in stops:
                said.pop()
                break
        tokenizer = Tokenizer.from_file(str(self._directory / "tokenizer.json"))
        text: str = tokenizer.decode(said[:max_tokens], skip_special_tokens=False)
        return text

    @property
    def image_token_id(self) -> int:
        """The id that stands for one image token in `logits`."""
        return int(self.model.config.image_token_id)

    def close(self) -> None:
        """Release the shards."""
        self._stored.clear()
        self._shards.close()

    def __enter__(self) -> OriginalModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _units(self) -> Iterator[_Unit]:
        """Layers and blocks one by one; everything else in the smallest modules around them."""
        layers = {
            id(item)
            for module in self.model.modules()
            if isinstance(module, self._torch.nn.ModuleList)
            for item in module
        }

        def walk(module: Any, prefix: str) -> Iterator[_Unit]:
            names = tuple(f"{prefix}{name}" for name, _ in module.named_parameters())
            inside = any(id(part) in layers for part in module.modules() if part is not module)
            if id(module) in layers or not inside:
                if names:
                    yield _Unit(module, names)
                return
            for name, child in module.named_children():
                yield from walk(child, f"{prefix}{name}.")

        yield from walk(self.model, "")

    def _hook(self, unit: _Unit) -> None:
        def bring(*_: Any) -> None:
            for name in unit.names:
                self._set(name, self._load(name))

        def drop(*_: Any) -> None:
            for name in unit.names:
                value = self._torch.empty(self._load_shape(name), device="meta")
                self._set(name, value)

        unit.module.register_forward_pre_hook(bring)
        unit.module.register_forward_hook(drop)

    def _set(self, name: str, value: Any) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        module._parameters[leaf] = self._torch.nn.Parameter(value, requires_grad=False)

    def _find(self, name: str) -> LazyTensor:
        if self._tied and name == "lm_head.weight":
            name = next(n for n, _ in self.model.named_parameters() if n.endswith("tokens.weight"))
        return self._stored[split_prefix(name)]

    def _load(self, name: str) -> Any:
        tensor = self._find(name)
        values = to_float32(tensor.data, tensor.ggml_type)
        return self._torch.from_numpy(values if values.flags.writeable else values.copy())

    def _load_shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def _make_buffers(self) -> None:
        """Rotary tables are computed, not stored: made again where there is memory."""
        for name, module in list(self.model.named_modules()):
            if not any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
                continue
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, type(module)(module.config))


def _import() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise NativeLibraryError(
            f"torch and transformers: not installed ({error})",
            hint='pip install "autoglm-gguf[reference]" (a CPU build of torch first)',
        ) from error
    return torch, transformers
