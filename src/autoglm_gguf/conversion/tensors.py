"""Hugging Face tensors to GGUF tensors: names, order, and the three changes of layout.

The changes: q/k rows permuted on the rotary half where M-RoPE is used (llama.cpp's kernel wants the
even rows first, then the odd), the Conv3d patch kernel split into its two frames, and nothing else
(gate and up are already fused). Source: conversion/glm.py, conversion/qwen3vl.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.checkpoint.config import ModelConfig, TextConfig
from autoglm_gguf.checkpoint.safetensors import LazyTensor
from autoglm_gguf.conversion.recipe import Outtype, choose_type
from autoglm_gguf.errors import CheckpointError
from autoglm_gguf.native.ggml import GGMLType, row_bytes

# Seen in the wild, longest first: the first that fits is cut off.
_VISION_PREFIXES = ("model.vision_tower.", "model.visual.", "vision_tower.", "visual.")
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of the output: where its rows come from and what they become."""

    name: str
    shape: tuple[int, ...]
    """Rows first; the last side is the row length."""
    ggml_type: GGMLType
    source_type: GGMLType
    load: Callable[[], NDArray[Any]]
    """Gives ``(n_rows, n_per_row)`` of the source's words; a view of the map where it can be."""
    row_order: NDArray[np.int64] | None = None
    """Row ``i`` of the output is row ``row_order[i]`` of the source; None keeps the order."""

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
        return self.n_rows * row_bytes(self.ggml_type, self.n_per_row)


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
    tensors: Mapping[str, LazyTensor], config: ModelConfig, outtype: Outtype
) -> list[OutTensor]:
    """The text GGUF's tensors in file order: token_embd, layers, output.

    Raises:
        CheckpointError: A tensor is missing or has another shape than the config says.
    """
    table = _strip(tensors, vision=False)
    text = config.text
    return [_take(table, spec, outtype) for spec in _text_specs(text)]


def plan_mmproj(
    tensors: Mapping[str, LazyTensor], config: ModelConfig, outtype: Outtype
) -> list[OutTensor]:
    """The mmproj GGUF's tensors in file order.

    Raises:
        CheckpointError: A tensor is missing or has another shape than the config says.
    """
    table = _strip(tensors, vision=True)
    planned = list(_patch_kernels(table, config, outtype))
    return planned + [_take(table, spec, outtype) for spec in _vision_specs(config)]


def check_unused(tensors: Mapping[str, LazyTensor], config: ModelConfig) -> None:
    """Refuse a checkpoint with tensors that no rule maps: something would be lost.

    Raises:
        CheckpointError: Names the first such tensor.
    """
    known = {spec.source for spec in _text_specs(config.text)}
    known |= {spec.source for spec in _vision_specs(config)} | {"patch_embed.proj.weight"}
    known.add("lm_head.weight")  # may be stored beside tied embeddings
    for name in tensors:
        bare, _ = _split_prefix(name)
        if bare not in known and not bare.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                f"checkpoint: tensor {name!r} is not one this architecture has",
                hint="check that config.json belongs to these shards",
            )


@dataclass(frozen=True, slots=True)
class _Spec:
    name: str
    source: str
    shape: tuple[int, ...]
    row_order: NDArray[np.int64] | None = None


def _text_specs(c: TextConfig) -> Iterator[_Spec]:
    width, q_width = c.hidden_size, c.num_attention_heads * c.head_dim
    kv_width = c.num_key_value_heads * c.head_dim
    q_order = k_order = None
    if c.rope.mrope_section is not None:
        q_order = permute_rotary(c.num_attention_heads, c.head_dim, c.rotary_dim)
        k_order = permute_rotary(c.num_key_value_heads, c.head_dim, c.rotary_dim)
    yield _Spec("token_embd.weight", "embed_tokens.weight", (c.vocab_size, width))
    for n in range(c.num_hidden_layers):
        out, src = f"blk.{n}.", f"layers.{n}."
        yield _Spec(out + "attn_norm.weight", src + "input_layernorm.weight", (width,))
        for letter, rows, order in (
            ("q", q_width, q_order),
            ("k", kv_width, k_order),
            ("v", kv_width, None),
        ):
            proj = f"{src}self_attn.{letter}_proj."
            yield _Spec(f"{out}attn_{letter}.weight", proj + "weight", (rows, width), order)
            if c.attention_bias:
                yield _Spec(f"{out}attn_{letter}.bias", proj + "bias", (rows,), order)
        o_proj = src + "self_attn.o_proj.weight"
        yield _Spec(out + "attn_output.weight", o_proj, (width, q_width))
        after_attn = src + "post_self_attn_layernorm.weight"
        yield _Spec(out + "post_attention_norm.weight", after_attn, (width,))
        yield _Spec(out + "ffn_norm.weight", src + "post_attention_layernorm.weight", (width,))
        gate_up = (2 * c.intermediate_size, width)
        yield _Spec(out + "ffn_up.weight", src + "mlp.gate_up_proj.weight", gate_up)
        down = (width, c.intermediate_size)
        yield _Spec(out + "ffn_down.weight", src + "mlp.down_proj.weight", down)
        yield _Spec(out + "post_ffw_norm.weight", src + "post_mlp_layernorm.weight", (width,))
    yield _Spec("output_norm.weight", "norm.weight", (width,))
    if not c.tie_word_embeddings:
        yield _Spec("output.weight", "lm_head.weight", (c.vocab_size, width))


def _vision_specs(config: ModelConfig) -> Iterator[_Spec]:
    c = config.vision
    width, inner, out = c.hidden_size, c.out_hidden_size, c.out_hidden_size
    n_positions = (c.image_size // c.patch_size) ** 2
    merge = c.spatial_merge_size
    yield _Spec("v.patch_embd.bias", "patch_embed.proj.bias", (width,))
    positions = "embeddings.position_embedding.weight"
    yield _Spec("v.position_embd.weight", positions, (n_positions, width))
    yield _Spec("v.norm_embd.weight", "post_conv_layernorm.weight", (width,))
    for n in range(c.depth):
        to, src = f"v.blk.{n}.", f"blocks.{n}."
        yield _Spec(to + "ln1.weight", src + "norm1.weight", (width,))
        yield _Spec(to + "attn_qkv.weight", src + "attn.qkv.weight", (3 * width, width))
        yield _Spec(to + "attn_out.weight", src + "attn.proj.weight", (width, width))
        yield _Spec(to + "ln2.weight", src + "norm2.weight", (width,))
        yield _Spec(to + "ffn_gate.weight", src + "mlp.gate_proj.weight", (inner, width))
        yield _Spec(to + "ffn_up.weight", src + "mlp.up_proj.weight", (inner, width))
        yield _Spec(to + "ffn_down.weight", src + "mlp.down_proj.weight", (width, inner))
    yield _Spec("v.post_ln.weight", "post_layernorm.weight", (width,))
    yield _Spec("mm.patch_merger.weight", "downsample.weight", (out, width, merge, merge))
    yield _Spec("mm.patch_merger.bias", "downsample.bias", (out,))
    yield _Spec("mm.model.fc.weight", "merger.proj.weight", (out, out))
    yield _Spec("mm.post_norm.weight", "merger.post_projection_norm.weight", (out,))
    yield _Spec("mm.post_norm.bias", "merger.post_projection_norm.bias", (out,))
    wide = c.intermediate_size
    yield _Spec("mm.gate.weight", "merger.gate_proj.weight", (wide, out))
    yield _Spec("mm.up.weight", "merger.up_proj.weight", (wide, out))
    yield _Spec("mm.down.weight", "merger.down_proj.weight", (out, wide))


def _patch_kernels(
    table: Mapping[str, LazyTensor], config: ModelConfig, outtype: Outtype
) -> Iterator[OutTensor]:
    """The Conv3d kernel ``(out, 3, 2, p, p)`` as two Conv2d kernels ``(out, 3, p, p)``."""
    c = config.vision
    side = c.patch_size
    kernel = (c.hidden_size, c.in_channels, c.temporal_patch_size, side, side)
    tensor = _find(table, "patch_embed.proj.weight", kernel)
    shape = (c.hidden_size, c.in_channels, side, side)
    for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):

        def load(frame: int = frame) -> NDArray[Any]:
            return np.ascontiguousarray(tensor.data[:, :, frame]).reshape(-1, side)

        yield OutTensor(name, shape, choose_type(name, shape, outtype), tensor.ggml_type, load)


def _take(table: Mapping[str, LazyTensor], spec: _Spec, outtype: Outtype) -> OutTensor:
    tensor = _find(table, spec.source, spec.shape)
    rows = (1, -1) if len(spec.shape) == 1 else (-1, spec.shape[-1])
    order = spec.row_order
    if order is not None and len(spec.shape) == 1:

        def load() -> NDArray[Any]:
            return tensor.data[order].reshape(rows)

        order_left = None
    else:

        def load() -> NDArray[Any]:
            return tensor.data.reshape(rows)

        order_left = order
    kind = choose_type(spec.name, spec.shape, outtype)
    return OutTensor(spec.name, spec.shape, kind, tensor.ggml_type, load, order_left)


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
        bare, is_vision = _split_prefix(name)
        if is_vision == vision:
            table[bare] = tensor
    return table


def _split_prefix(name: str) -> tuple[str, bool]:
    for prefix in _VISION_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix), True
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix), False
    return name, False
