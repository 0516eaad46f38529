"""Published tensors with the rows, types and padding of the GGUF file: what the writer streams.

The changes of layout: q/k rows permuted on the rotary half where M-RoPE is used (llama.cpp's kernel
wants the even rows first, then the odd), the Conv3d patch kernel split into its two frames, the
feed-forward width padded with zeros where a 256-block type asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.checkpoint.config import ModelConfig, VisionConfig
from autoglm_gguf.checkpoint.safetensors import LazyTensor
from autoglm_gguf.conversion.layouts import (
    PATCH_KERNEL,
    Spec,
    split_prefix,
    text_specs,
    vision_specs,
)
from autoglm_gguf.conversion.recipe import Recipe, padded_width
from autoglm_gguf.errors import CheckpointError
from autoglm_gguf.native.ggml import GGMLType, row_bytes

ZERO_ROW = -1


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of the output: where its rows come from and what they become."""

    name: str
    shape: tuple[int, ...]
    """Rows first; the last side is the row length, padding included."""
    ggml_type: GGMLType
    source: LazyTensor
    load: Callable[[], NDArray[Any]]
    """Gives ``(n_source_rows, n_source_per_row)`` of the source's words; a view where it can be.
    Rows shorter than ``n_per_row`` are filled with zeros."""
    row_order: NDArray[np.int64] | None = None
    """Row ``i`` of the output is row ``row_order[i]`` of the source, or zeros for `ZERO_ROW`; None
    keeps the order."""
    imatrix: NDArray[np.float32] | None = None
    """``(n_per_row,)``, the importance of each column."""
    search: bool = False
    """Encode with a search over scales."""

    @property
    def n_per_row(self) -> int:
        """Elements per row."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Rows, all leading sides together."""
        return int(np.prod(self.shape[:-1], dtype=np.int64)) if len(self.shape) > 1 else 1

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return self.n_bytes_as(self.ggml_type)

    def n_bytes_as(self, ggml_type: GGMLType) -> int:
        """Bytes in the file if it had another type."""
        return self.n_rows * row_bytes(ggml_type, self.n_per_row)

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """Rows ``first`` to ``last`` of the output as the source's words, C-contiguous."""
        return self._gather(slice(first, last))

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows of the output, as `rows` gives them."""
        return self._gather(rows)

    def _gather(self, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        table = self.load()
        if self.row_order is None:
            block = table[rows]
        else:
            order = self.row_order[rows]
            block = table[order]
            block[order == ZERO_ROW] = 0
        missing = self.n_per_row - block.shape[1]
        if missing:
            block = np.pad(block, ((0, 0), (0, missing)))
        return np.ascontiguousarray(block)

    def release(self, first: int, last: int) -> None:
        """Tell the system that the source of rows ``first`` to ``last`` is not needed any more."""
        sources = (
            np.array([first, last - 1]) if self.row_order is None else self.row_order[first:last]
        )
        sources = sources[sources != ZERO_ROW]
        n_per_row = self.source.shape[-1]
        if sources.size:
            self.source.release(
                int(sources.min()) * n_per_row, (int(sources.max()) + 1) * n_per_row
            )


def permute_rotary(n_heads: int, head_dim: int, rotary_dim: int) -> NDArray[np.int64]:
    """Row order that turns interleaved rotary pairs into halves, head by head.

    Returns:
        ``(n_heads * head_dim,)``: the source row of each output row.
    """
    head = np.arange(head_dim)
    head[:rotary_dim] = np.concatenate([np.arange(0, rotary_dim, 2), np.arange(1, rotary_dim, 2)])
    starts = np.arange(n_heads)[:, None] * head_dim
    return (starts + head[None, :]).reshape(-1).astype(np.int64)


def plan_text(
    tensors: Mapping[str, LazyTensor],
    config: ModelConfig,
    recipe: Recipe,
    *,
    ffn_width: int | None = None,
) -> list[OutTensor]:
    """The text GGUF's tensors in file order: token_embd, layers, output.

    Args:
        tensors: The checkpoint's.
        config: Its shapes.
        recipe: The types.
        ffn_width: The feed-forward width to write, at least the published one; by default padded
            only where the recipe's types ask for it.

    Raises:
        CheckpointError: A tensor is missing or has another shape than the config says.
        ConversionError: A type needs an importance matrix.
        GGUFError: The importance matrix belongs to another model.
    """
    table = _strip(tensors, vision=False)
    text = config.text
    default = padded_width(recipe, text.intermediate_size, text.num_hidden_layers)
    padding = (ffn_width or default) - text.intermediate_size
    return [_plan(table, spec, recipe, config, padding) for spec in text_specs(text)]


def plan_mmproj(
    tensors: Mapping[str, LazyTensor], config: ModelConfig, recipe: Recipe
) -> list[OutTensor]:
    """The mmproj GGUF's tensors in file order; none for a text-only model.

    Raises:
        CheckpointError: A tensor is missing or has another shape than the config says.
    """
    if config.vision is None:
        return []
    table = _strip(tensors, vision=True)
    planned = list(_patch_kernels(table, config.vision, recipe))
    specs = vision_specs(config.vision)
    return planned + [_plan(table, spec, recipe, config, 0) for spec in specs]


def check_unused(tensors: Mapping[str, LazyTensor], config: ModelConfig) -> None:
    """Refuse a checkpoint with tensors that no rule maps: something would be lost.

    Raises:
        CheckpointError: Names the first such tensor.
    """
    known = {(spec.source, False) for spec in text_specs(config.text)}
    if config.vision is not None:
        known |= {(spec.source, True) for spec in vision_specs(config.vision)}
        known.add((PATCH_KERNEL, True))
    if config.text.tie_word_embeddings:  # the head may be stored beside the embeddings it equals
        known |= {("lm_head.weight", False), ("output_layer.weight", False)}
    for name in tensors:
        if split_prefix(name) not in known and not name.endswith("inv_freq"):
            raise CheckpointError(
                f"checkpoint: tensor {name!r} is not one this architecture has",
                hint="check that config.json belongs to these shards",
            )


def _plan(
    table: Mapping[str, LazyTensor],
    spec: Spec,
    recipe: Recipe,
    config: ModelConfig,
    padding: int,
) -> OutTensor:
    tensor = _find(table, spec.source, spec.shape)
    order: NDArray[np.int64] | None = None
    shape = spec.shape
    if spec.heads:
        order = permute_rotary(spec.heads, config.text.head_dim, config.text.rotary_dim)
    if padding and spec.pads == "rows":
        half = spec.shape[0] // 2
        zeros = np.full(padding, ZERO_ROW)
        order = np.concatenate([np.arange(half), zeros, np.arange(half, 2 * half), zeros])
        shape = (spec.shape[0] + 2 * padding, spec.shape[1])
    elif padding and spec.pads == "columns":
        shape = (spec.shape[0], spec.shape[1] + padding)
    kind = recipe.choose(spec.name, shape)
    if len(shape) == 1:

        def load_vector() -> NDArray[Any]:
            return (tensor.data if order is None else tensor.data[order]).reshape(1, -1)

        return OutTensor(spec.name, shape, kind, tensor, load_vector)

    def load() -> NDArray[Any]:
        return tensor.data.reshape(-1, spec.shape[-1])

    weights = None
    if recipe.imatrix is not None:
        weights = recipe.imatrix.weights(spec.name, shape[-1], padded_from=spec.shape[-1])
    return OutTensor(spec.name, shape, kind, tensor, load, order, weights, recipe.search)


def _patch_kernels(
    table: Mapping[str, LazyTensor], c: VisionConfig, recipe: Recipe
) -> Iterator[OutTensor]:
    """The Conv3d kernel ``(out, 3, 2, p, p)`` as two Conv2d kernels ``(out, 3, p, p)``."""
    side = c.patch_size
    kernel = (c.hidden_size, c.in_channels, c.temporal_patch_size, side, side)
    tensor = _find(table, PATCH_KERNEL, kernel)
    shape = (c.hidden_size, c.in_channels, side, side)
    for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):

        def load(frame: int = frame) -> NDArray[Any]:
            return np.ascontiguousarray(tensor.data[:, :, frame]).reshape(-1, side)

        yield OutTensor(name, shape, recipe.choose(name, shape), tensor, load)


def _find(table: Mapping[str, LazyTensor], source: str, shape: tuple[int, ...]) -> LazyTensor:
    tensor = table.get(source)
    if tensor is None:
        raise CheckpointError(
            f"checkpoint: tensor {source!r} is missing", hint="download the checkpoint completely"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"checkpoint: tensor {tensor.name!r} has another shape than config.json says "
            f"(found {tensor.shape}, required {shape})",
            hint="check that config.json belongs to these shards",
        )
    return tensor


def _strip(tensors: Mapping[str, LazyTensor], *, vision: bool) -> dict[str, LazyTensor]:
    """Tensors of one half by their bare names."""
    table: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        bare, is_vision = split_prefix(name)
        if is_vision == vision:
            table[bare] = tensor
    return table
