"""Which ggml type each tensor gets, by llama.cpp's own rules.

Source of the rules: conversion/base.py (``prepare_tensors``, ``tensor_force_quant``) and
llama-quant.cpp (``tensor_allows_quantization``, ``tensor_type_fallback``,
``tensor_requires_imatrix``). Vectors and norms stay f32, convolution kernels f16 or f32, a row that
is no multiple of the block falls back to a type with smaller blocks, then to f16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autoglm_gguf.conversion.imatrix import Imatrix
from autoglm_gguf.errors import ConversionError
from autoglm_gguf.native.ggml import GGMLType, block_size


@dataclass(frozen=True, slots=True)
class Outtype:
    """One of the uniform output types."""

    name: str
    ggml_type: GGMLType
    ftype: int
    """llama.h, ``llama_ftype``: what ``general.file_type`` says."""
    mmproj: str
    """The vision tower's outtype when none is asked for."""


# The tower is 5 % of the weights and decides where taps land: below 8 bits it stays at q8_0.
OUTTYPES = {
    name: Outtype(name, GGMLType[key], ftype, mmproj)
    for name, key, ftype, mmproj in (
        ("f32", "F32", 0, "f32"),
        ("f16", "F16", 1, "f16"),
        ("bf16", "BF16", 32, "bf16"),
        ("q8_0", "Q8_0", 7, "q8_0"),
        ("q6_K", "Q6_K", 18, "q8_0"),
        ("q5_1", "Q5_1", 9, "q8_0"),
        ("q5_0", "Q5_0", 8, "q8_0"),
        ("q5_K", "Q5_K", 16, "q8_0"),
        ("q4_1", "Q4_1", 3, "q8_0"),
        ("q4_0", "Q4_0", 2, "q8_0"),
        ("q4_K", "Q4_K", 14, "q8_0"),
        ("iq4_nl", "IQ4_NL", 25, "q8_0"),
        ("iq4_xs", "IQ4_XS", 30, "q8_0"),
        ("q3_K", "Q3_K", 11, "q8_0"),
        ("iq3_s", "IQ3_S", 26, "q8_0"),
        ("iq3_xxs", "IQ3_XXS", 23, "q8_0"),
        ("q2_K", "Q2_K", 10, "q8_0"),
    )
}
MMPROJ_OUTTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
PADDED_MULTIPLE = 256
_BY_LOWER_NAME = {name.lower(): outtype for name, outtype in OUTTYPES.items()}
_CONVOLUTIONS = ("v.patch_embd.weight", "v.patch_embd.weight.1", "mm.patch_merger.weight")
_ALWAYS_F32 = ("v.position_embd.weight",)
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_NEEDS_IMATRIX = (GGMLType.IQ3_XXS,)
_FALLBACK = {  # 256-block type -> 32-block type
    GGMLType.IQ3_XXS: GGMLType.IQ4_NL,
    GGMLType.IQ3_S: GGMLType.IQ4_NL,
    GGMLType.IQ4_XS: GGMLType.IQ4_NL,
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}


def parse_outtype(name: str, *, mmproj: bool = False) -> Outtype:
    """Look an outtype up by name, in any case.

    Args:
        name: Such as ``q4_0`` or ``Q4_K``.
        mmproj: Only the types that the vision tower takes.

    Raises:
        ValueError: Unknown, or not for the vision tower.
    """
    outtype = _BY_LOWER_NAME.get(name.lower())
    if outtype is None:
        raise ValueError(f"outtype {name!r}: unknown (one of {', '.join(OUTTYPES)})")
    if mmproj and outtype.name not in MMPROJ_OUTTYPES:
        listing = ", ".join(MMPROJ_OUTTYPES)
        raise ValueError(f"mmproj outtype {name!r}: not for the vision tower (one of {listing})")
    return outtype


@dataclass(frozen=True, slots=True)
class Recipe:
    """An outtype, exceptions from it, and an importance matrix.

    Args:
        outtype: For every matrix that no exception names.
        overrides: ``(pattern, type)``; the first pattern found in a tensor's name wins.
        imatrix: Weighs the quantisation error by column.
        chosen: Types of single tensors, by name; they come before the exceptions.
        search: Encode with a search over scales, see ``encode``.
    """

    outtype: Outtype
    overrides: tuple[tuple[re.Pattern[str], GGMLType], ...] = ()
    imatrix: Imatrix | None = None
    chosen: Mapping[str, GGMLType] = field(default_factory=dict)
    search: bool = False

    def choose(self, name: str, shape: tuple[int, ...]) -> GGMLType:
        """The type of one tensor.

        Args:
            name: Its GGUF name.
            shape: Rows first, as Hugging Face writes it; the last is the row length.

        Raises:
            ConversionError: The type needs an importance matrix and there is none.
        """
        if len(shape) <= 1 or name.endswith("_norm.weight") or name in _ALWAYS_F32:
            return GGMLType.F32
        wanted = self.wanted(name)
        if name in _CONVOLUTIONS:
            return GGMLType.F16 if wanted == GGMLType.F16 else GGMLType.F32
        if shape[-1] % block_size(wanted):
            wanted = _FALLBACK.get(wanted, GGMLType.F16)
            if shape[-1] % block_size(wanted):
                wanted = GGMLType.F16
        if self.lacks_imatrix(name, wanted):
            raise ConversionError(
                f"{name}: {wanted.name} needs an importance matrix",
                hint="give --imatrix FILE (made by autoglm-gguf calibrate), or take iq3_s",
            )
        return wanted

    def lacks_imatrix(self, name: str, ggml_type: GGMLType) -> bool:
        """Whether a type may not be had for want of an importance matrix."""
        weighed = self.imatrix is not None and name in self.imatrix.columns
        return ggml_type in _NEEDS_IMATRIX and name not in _EMBEDDINGS and not weighed

    def wanted(self, name: str) -> GGMLType:
        """The type asked for, before the shape is looked at."""
        if name in self.chosen:
            return self.chosen[name]
        for pattern, ggml_type in self.overrides:
            if pattern.search(name):
                return ggml_type
        return self.outtype.ggml_type


def parse_overrides(texts: Sequence[str]) -> tuple[tuple[re.Pattern[str], GGMLType], ...]:
    """Read ``REGEX=TYPE`` pairs, as llama-quantize's ``--tensor-type`` takes them.

    Raises:
        ValueError: No ``=``, an invalid pattern, or an unknown type.
    """
    overrides = []
    for text in texts:
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"tensor type {text!r}: write REGEX=TYPE, for example attn_v=q8_0")
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"tensor type {text!r}: not a pattern ({error})") from None
        overrides.append((compiled, parse_outtype(name).ggml_type))
    return tuple(overrides)


def padded_width(recipe: Recipe, width: int, n_layers: int) -> int:
    """The feed-forward width to write: padded where a 256-block type would not fit otherwise.

    llama.cpp would give ``ffn_down``, a quarter of the text weights, a larger type instead. Zero
    rows in ``ffn_up`` and zero columns in ``ffn_down`` change no logit.
    """
    if width % PADDED_MULTIPLE == 0:
        return width
    names = (f"blk.{n}.ffn_down.weight" for n in range(n_layers))
    if any(block_size(recipe.wanted(name)) == PADDED_MULTIPLE for name in names):
        return -(-width // PADDED_MULTIPLE) * PADDED_MULTIPLE
    return width
