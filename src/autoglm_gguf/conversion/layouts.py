"""Which published tensor becomes which GGUF tensor: names, shapes, order, changes of layout.

Covers Glm4v and Glm4 (arch ``glm4``, norms after attention and MLP), Glm and ChatGLM (arch
``chatglm``), and the GLM-4V vision tower. Sources: conversion/glm.py, conversion/chatglm.py,
conversion/qwen3vl.py, gguf-py's tensor_mapping.py. Knows no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from autoglm_gguf.checkpoint.config import TextConfig, VisionConfig

# Seen in the wild, longest first: the first that fits is cut off.
_VISION_PREFIXES = ("model.vision_tower.", "model.visual.", "vision_tower.", "visual.")
_TEXT_PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "transformer.encoder.",
    "transformer.",
    "model.",
)
PATCH_KERNEL = "patch_embed.proj.weight"


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of the output."""

    name: str
    source: str
    """Published name without its prefix."""
    shape: tuple[int, ...]
    """As published, rows first."""
    heads: int = 0
    """Above 0: rows are permuted on the rotary half of this many heads."""
    pads: Literal["", "rows", "columns"] = ""
    """Where the feed-forward width may be padded: both halves of the rows, or the columns."""


def split_prefix(name: str) -> tuple[str, bool]:
    """A tensor's bare name, and whether it belongs to the vision tower."""
    for prefix in _VISION_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix), True
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix), False
    return name, False


def text_specs(config: TextConfig) -> Iterator[Spec]:
    """The text model's tensors in file order: token_embd, layers, output."""
    names = _ChatGLMNames() if config.naming == "chatglm" else _HFNames()
    vocab, width = config.vocab_size, config.hidden_size
    yield Spec("token_embd.weight", names.embeddings, (vocab, width))
    for n in range(config.num_hidden_layers):
        yield from _layer_specs(config, names, n)
    yield Spec("output_norm.weight", names.final_norm, (width,))
    if not config.tie_word_embeddings:
        yield Spec("output.weight", names.output, (vocab, width))


def vision_specs(c: VisionConfig) -> Iterator[Spec]:
    """The vision tower's tensors in file order, without the patch kernels."""
    width, inner, out = c.hidden_size, c.out_hidden_size, c.out_hidden_size
    merge, wide = c.spatial_merge_size, c.intermediate_size
    n_positions = (c.image_size // c.patch_size) ** 2
    yield Spec("v.patch_embd.bias", "patch_embed.proj.bias", (width,))
    positions = "embeddings.position_embedding.weight"
    yield Spec("v.position_embd.weight", positions, (n_positions, width))
    yield Spec("v.norm_embd.weight", "post_conv_layernorm.weight", (width,))
    for n in range(c.depth):
        to, src = f"v.blk.{n}.", f"blocks.{n}."
        yield Spec(to + "ln1.weight", src + "norm1.weight", (width,))
        yield Spec(to + "attn_qkv.weight", src + "attn.qkv.weight", (3 * width, width))
        yield Spec(to + "attn_out.weight", src + "attn.proj.weight", (width, width))
        yield Spec(to + "ln2.weight", src + "norm2.weight", (width,))
        yield Spec(to + "ffn_gate.weight", src + "mlp.gate_proj.weight", (inner, width))
        yield Spec(to + "ffn_up.weight", src + "mlp.up_proj.weight", (inner, width))
        yield Spec(to + "ffn_down.weight", src + "mlp.down_proj.weight", (width, inner))
    yield Spec("v.post_ln.weight", "post_layernorm.weight", (width,))
    yield Spec("mm.patch_merger.weight", "downsample.weight", (out, width, merge, merge))
    yield Spec("mm.patch_merger.bias", "downsample.bias", (out,))
    yield Spec("mm.model.fc.weight", "merger.proj.weight", (out, out))
    yield Spec("mm.post_norm.weight", "merger.post_projection_norm.weight", (out,))
    yield Spec("mm.post_norm.bias", "merger.post_projection_norm.bias", (out,))
    yield Spec("mm.gate.weight", "merger.gate_proj.weight", (wide, out))
    yield Spec("mm.up.weight", "merger.up_proj.weight", (wide, out))
    yield Spec("mm.down.weight", "merger.down_proj.weight", (out, wide))


def _layer_specs(c: TextConfig, names: _HFNames, n: int) -> Iterator[Spec]:
    to, src, width = f"blk.{n}.", f"layers.{n}.", c.hidden_size
    yield Spec(to + "attn_norm.weight", src + "input_layernorm.weight", (width,))
    yield from names.attention(c, to, src)
    if c.has_post_norms:
        after_attn = src + "post_self_attn_layernorm.weight"
        yield Spec(to + "post_attention_norm.weight", after_attn, (width,))
    yield Spec(to + "ffn_norm.weight", src + "post_attention_layernorm.weight", (width,))
    gate_up = (2 * c.intermediate_size, width)
    yield Spec(to + "ffn_up.weight", src + names.gate_up, gate_up, pads="rows")
    down = (width, c.intermediate_size)
    yield Spec(to + "ffn_down.weight", src + names.down, down, pads="columns")
    if c.has_post_norms:
        yield Spec(to + "post_ffw_norm.weight", src + "post_mlp_layernorm.weight", (width,))


class _HFNames:
    """transformers' own layout."""

    embeddings = "embed_tokens.weight"
    final_norm = "norm.weight"
    output = "lm_head.weight"
    gate_up = "mlp.gate_up_proj.weight"
    down = "mlp.down_proj.weight"

    def attention(self, c: TextConfig, to: str, src: str) -> Iterator[Spec]:
        permuted = c.rope.mrope_section is not None
        parts = (
            ("q", c.num_attention_heads, c.num_attention_heads if permuted else 0),
            ("k", c.num_key_value_heads, c.num_key_value_heads if permuted else 0),
            ("v", c.num_key_value_heads, 0),
        )
        for letter, n_heads, heads in parts:
            rows, proj = n_heads * c.head_dim, f"{src}self_attn.{letter}_proj."
            shape = (rows, c.hidden_size)
            yield Spec(f"{to}attn_{letter}.weight", proj + "weight", shape, heads)
            if c.attention_bias:
                yield Spec(f"{to}attn_{letter}.bias", proj + "bias", (rows,), heads)
        o_shape = (c.hidden_size, c.num_attention_heads * c.head_dim)
        yield Spec(to + "attn_output.weight", src + "self_attn.o_proj.weight", o_shape)


class _ChatGLMNames(_HFNames):
    """The layout of chatglm's own code: q, k and v in one matrix."""

    embeddings = "embedding.word_embeddings.weight"
    final_norm = "final_layernorm.weight"
    output = "output_layer.weight"
    gate_up = "mlp.dense_h_to_4h.weight"
    down = "mlp.dense_4h_to_h.weight"

    def attention(self, c: TextConfig, to: str, src: str) -> Iterator[Spec]:
        rows = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        fused = src + "self_attention.query_key_value."
        yield Spec(to + "attn_qkv.weight", fused + "weight", (rows, c.hidden_size))
        if c.attention_bias:
            yield Spec(to + "attn_qkv.bias", fused + "bias", (rows,))
        o_shape = (c.hidden_size, c.num_attention_heads * c.head_dim)
        yield Spec(to + "attn_output.weight", src + "self_attention.dense.weight", o_shape)
