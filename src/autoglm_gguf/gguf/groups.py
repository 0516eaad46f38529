"""Which part of a model a tensor belongs to, and what each part weighs.

Goes by names alone: llama.cpp's for text models (also of other architectures) and libmtmd's for
the GLM-4V tower; a name it does not know is `TensorGroup.OTHER`. Source: gguf-py's constants.py,
``TENSOR_NAMES``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from autoglm_gguf.gguf.header import Header, TensorInfo


class TensorGroup(StrEnum):
    """A part of a model, in the order of a file; a bias counts with its matrix."""

    TOKEN_EMBEDDING = "token embedding"
    ATTENTION_Q = "attention q"
    ATTENTION_K = "attention k"
    ATTENTION_V = "attention v"
    ATTENTION_QKV = "attention qkv"
    """q, k and v in one matrix (ChatGLM)."""
    ATTENTION_OUTPUT = "attention output"
    FFN_GATE = "ffn gate"
    FFN_UP = "ffn up"
    """In the GLM family gate and up in one matrix."""
    FFN_DOWN = "ffn down"
    NORMS = "norms"
    OUTPUT = "output"
    """Absent where the token embedding is used twice (tied)."""
    PATCH_EMBEDDING = "patch embedding"
    POSITION_EMBEDDING = "position embedding"
    VISION_ATTENTION = "vision attention"
    VISION_FFN = "vision ffn"
    VISION_NORMS = "vision norms"
    MERGER = "merger"
    """From the tower's patches to the text model's embeddings, its norm included."""
    OTHER = "other"


# ``blk.7.attn_q.weight`` -> attn_q; ``v.patch_embd.weight.1`` -> patch_embd
_TEXT_NAME = re.compile(r"(?:blk\.\d+\.)?(\w+)\.(?:weight|bias)")
_VISION_NAME = re.compile(r"v\.(?:blk\.\d+\.)?(\w+)\.(?:weight|bias)(?:\.1)?")
_MERGER_PREFIX = "mm."
_TEXT_PARTS = {
    "token_embd": TensorGroup.TOKEN_EMBEDDING,
    "output": TensorGroup.OUTPUT,
    "attn_q": TensorGroup.ATTENTION_Q,
    "attn_k": TensorGroup.ATTENTION_K,
    "attn_v": TensorGroup.ATTENTION_V,
    "attn_qkv": TensorGroup.ATTENTION_QKV,
    "attn_output": TensorGroup.ATTENTION_OUTPUT,
    "ffn_gate": TensorGroup.FFN_GATE,
    "ffn_up": TensorGroup.FFN_UP,
    "ffn_down": TensorGroup.FFN_DOWN,
}
_VISION_PARTS = {
    "patch_embd": TensorGroup.PATCH_EMBEDDING,
    "position_embd": TensorGroup.POSITION_EMBEDDING,
    "norm_embd": TensorGroup.VISION_NORMS,
    "pre_ln": TensorGroup.VISION_NORMS,
    "post_ln": TensorGroup.VISION_NORMS,
    "ln1": TensorGroup.VISION_NORMS,
    "ln2": TensorGroup.VISION_NORMS,
    "attn_qkv": TensorGroup.VISION_ATTENTION,
    "attn_q": TensorGroup.VISION_ATTENTION,
    "attn_k": TensorGroup.VISION_ATTENTION,
    "attn_v": TensorGroup.VISION_ATTENTION,
    "attn_out": TensorGroup.VISION_ATTENTION,
    "ffn_gate": TensorGroup.VISION_FFN,
    "ffn_up": TensorGroup.VISION_FFN,
    "ffn_down": TensorGroup.VISION_FFN,
}


def group_of(name: str) -> TensorGroup:
    """The group of a tensor, by its GGUF name."""
    if name.startswith(_MERGER_PREFIX):
        return TensorGroup.MERGER
    if match := _VISION_NAME.fullmatch(name):
        return _VISION_PARTS.get(match[1], TensorGroup.OTHER)
    if match := _TEXT_NAME.fullmatch(name):
        if match[1].endswith("_norm"):
            return TensorGroup.NORMS
        return _TEXT_PARTS.get(match[1], TensorGroup.OTHER)
    return TensorGroup.OTHER


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """What one group of a file weighs."""

    group: TensorGroup
    n_tensors: int
    n_params: int
    """Number of weights, biases included."""
    n_bytes: int
    types: Mapping[str, int]
    """ggml's type name to number of tensors, the type with the most bytes first."""

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.n_bytes / self.n_params


def describe_groups(header: Header) -> tuple[GroupWeights, ...]:
    """What each group of a file weighs; the groups it has, in the order of `TensorGroup`."""
    members: dict[TensorGroup, list[TensorInfo]] = {group: [] for group in TensorGroup}
    for tensor in header.tensors.values():
        members[group_of(tensor.name)].append(tensor)
    return tuple(_weigh(group, tensors) for group, tensors in members.items() if tensors)


def _weigh(group: TensorGroup, tensors: list[TensorInfo]) -> GroupWeights:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.type_name] += 1
        sizes[tensor.type_name] += tensor.n_bytes
    return GroupWeights(
        group,
        len(tensors),
        sum(tensor.n_elements for tensor in tensors),
        sizes.total(),
        {kind: counts[kind] for kind, _ in sizes.most_common()},
    )
