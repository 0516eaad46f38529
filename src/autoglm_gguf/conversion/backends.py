"""Which tensor types a llama.cpp backend multiplies with, and which are slow on CPUs.

Copied from the ``supports_op`` of each backend of the pinned llama.cpp (``MUL_MAT`` with an f32
right side); a type that a backend lacks is not refused there, the whole matrix moves to the CPU.
Covers the backends of phones, Macs and PCs; not SYCL, CANN, MUSA and others.
"""

from __future__ import annotations

from autoglm_gguf.native.ggml import GGMLType

_PLAIN = (GGMLType.F32, GGMLType.F16, GGMLType.Q4_0, GGMLType.Q8_0)
_ALL = frozenset(GGMLType)
BACKEND_TYPES: dict[str, frozenset[GGMLType]] = {
    "cpu": _ALL,
    "metal": _ALL - {GGMLType.BF16},  # Apple's GPUs before the M2's and A17's have no bfloat
    "vulkan": _ALL,
    "cuda": _ALL,
    # ggml-opencl.cpp: Adreno's
    "opencl": frozenset(
        (
            *_PLAIN,
            *(GGMLType.BF16, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.IQ4_NL),
            *(GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K),
        )
    ),
    # ggml-hexagon.cpp, ggml_hexagon_supported_mul_mat
    "hexagon": frozenset(
        (
            *_PLAIN,
            *(GGMLType.Q4_1, GGMLType.IQ4_NL, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K),
        )
    ),
}
"""By the backend's name."""

SLOW_ON_CPU = frozenset((GGMLType.IQ3_S, GGMLType.IQ3_XXS, GGMLType.Q3_K))
"""Decoding takes them about half the bandwidth, or a third, that q4_0 and q2_K reach; figures in
docs/guides/fit.md."""
