"""Which ggml type each tensor gets under an outtype, by llama.cpp's own rules.

Source of the rules: conversion/base.py (``prepare_tensors``, ``tensor_force_quant``) and
llama-quant.cpp: vectors and norms stay f32, convolution kernels f16 or f32, a row that is no
multiple of the block falls back to f16.
"""

from __future__ import annotations

from dataclasses import dataclass

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


OUTTYPES = {
    o.name: o
    for o in (
        Outtype("f32", GGMLType.F32, 0, "f32"),
        Outtype("f16", GGMLType.F16, 1, "f16"),
        Outtype("bf16", GGMLType.BF16, 32, "bf16"),
        Outtype("q8_0", GGMLType.Q8_0, 7, "q8_0"),
        # The tower is 5 % of the weights and decides where taps land: it stays at 8 bits.
        Outtype("q4_0", GGMLType.Q4_0, 2, "q8_0"),
    )
}
_CONVOLUTIONS = ("v.patch_embd.weight", "mm.patch_merger.weight")
_ALWAYS_F32 = ("v.position_embd.weight", "v.patch_embd.weight.1")


def parse_outtype(name: str) -> Outtype:
    """Look an outtype up by name, upper or lower case.

    Raises:
        ValueError: Not one of `OUTTYPES`.
    """
    outtype = OUTTYPES.get(name.lower())
    if outtype is None:
        raise ValueError(f"outtype {name!r}: unknown (one of {', '.join(OUTTYPES)})")
    return outtype


def choose_type(name: str, shape: tuple[int, ...], outtype: Outtype) -> GGMLType:
    """The type of one tensor.

    Args:
        name: Its GGUF name.
        shape: Rows first, as Hugging Face writes it; the last is the row length.
        outtype: What was asked for.
    """
    if len(shape) <= 1 or name.endswith("_norm.weight") or name in _ALWAYS_F32:
        return GGMLType.F32
    if name in _CONVOLUTIONS:
        return GGMLType.F16 if outtype.ggml_type == GGMLType.F16 else GGMLType.F32
    if shape[-1] % block_size(outtype.ggml_type):
        return GGMLType.F16
    return outtype.ggml_type
