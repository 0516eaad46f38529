"""How much noise in what a matrix gives comes to matter at the logits; from weights alone.

The residual stream is a sum: the embedding, then two contributions a layer. In Glm4 and Glm4v each
contribution passes a norm of its own before it is added, so its energy is known without running the
model: the mean square of that norm's weights. Noise of a share r in a contribution becomes noise of
a share r·e/E in the stream, where e is the contribution's energy and E the stream's so far; later
layers pass that share on. The KL divergence grows with it, by a factor for each kind of matrix.

The factors come from the one trained model at hand: autoglm-tiny, each of its 38 matrices rounded
alone to q3_K, KL divergence on held-out transcripts against relative error. e/E explains the
layers: the factor is the same for each within 20 % for ffn_down, 50 % for attn_output; attn_q and
attn_k matter more in early layers than it says. The same factors predict q2_K and q4_0 within a
factor of 1.9 (standard deviation), and the sum over all matrices within 20 %. No published
checkpoint has been measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autoglm_gguf.conversion.rounding import sample_rows
from autoglm_gguf.conversion.tensors import OutTensor
from autoglm_gguf.memory.estimate import layer_of
from autoglm_gguf.native.ggml import to_float32

# KL divergence, nats a token, for a relative error of 1 in all of the stream: extrapolated from
# errors of 0.02.
_EMBEDDING, _OUTPUT = 0.9, 0.9
_ATTENTION = {"attn_q": 0.22, "attn_k": 0.19, "attn_v": 0.13, "attn_qkv": 0.2, "attn_output": 0.12}
_FEED_FORWARD = {"ffn_up": 0.36, "ffn_down": 0.23}
_AFTER_ATTENTION, _AFTER_FEED_FORWARD = "post_attention_norm.weight", "post_ffw_norm.weight"


def sensitivities(tensors: Sequence[OutTensor]) -> dict[str, float]:
    """What a relative error of 1 in each matrix of the text costs, by name.

    Args:
        tensors: All of the text. Where contributions have no norms of their own, each is taken to
            be as large as the embedding.
    """
    table = {tensor.name: tensor for tensor in tensors}
    tied = "output.weight" not in table
    found = {"token_embd.weight": _EMBEDDING + (_OUTPUT if tied else 0.0), "output.weight": _OUTPUT}
    shares = _shares(table)
    for name in table:
        layer = layer_of(name)
        if layer is None or not name.endswith(".weight"):
            continue
        kind = name.removesuffix(".weight").rpartition(".")[2]
        attention, feed_forward = shares[layer]
        if kind in _ATTENTION:
            found[name] = _ATTENTION[kind] * attention
        elif kind in _FEED_FORWARD:
            found[name] = _FEED_FORWARD[kind] * feed_forward
    return found


def _shares(table: Mapping[str, OutTensor]) -> dict[int, tuple[float, float]]:
    """Each layer's two contributions as shares of the stream that they have become part of."""
    embedding = _energy(table["token_embd.weight"])
    stream, shares = embedding, {}
    for layer in sorted({n for name in table if (n := layer_of(name)) is not None}):
        found = []
        for norm in (_AFTER_ATTENTION, _AFTER_FEED_FORWARD):
            tensor = table.get(f"blk.{layer}.{norm}")
            energy = embedding if tensor is None else _energy(tensor)
            stream += energy
            found.append(energy / stream if stream > 0 else 1.0)
        shares[layer] = (found[0], found[1])
    return shares


def _energy(tensor: OutTensor) -> float:
    """Mean square."""
    values = to_float32(tensor.take(sample_rows(tensor)), tensor.source.ggml_type)
    return float(np.square(values, dtype=np.float64).mean())
