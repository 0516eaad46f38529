"""What noise in each matrix is taken to cost."""

from __future__ import annotations

import numpy as np
import pytest

from autoglm_gguf.checkpoint.safetensors import LazyTensor
from autoglm_gguf.conversion.sensitivity import sensitivities
from autoglm_gguf.conversion.tensors import OutTensor
from autoglm_gguf.native.ggml import GGMLType

pytestmark = pytest.mark.native
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")


def tensor(name: str, value: float, *shape: int) -> OutTensor:
    values = np.full(shape, value, np.float32)
    source = LazyTensor(name, shape, GGMLType.F32, values)
    return OutTensor(name, shape, GGMLType.F32, source, lambda: values.reshape(-1, shape[-1]))


def model(*norms: tuple[float, float], tied: bool = False) -> list[OutTensor]:
    """Embeddings of energy 1, and each layer's two norms of constant weight."""
    found = [tensor("token_embd.weight", 1.0, 8, 32)]
    for layer, (attention, feed_forward) in enumerate(norms):
        to = f"blk.{layer}."
        found += [tensor(f"{to}{kind}.weight", 0.1, 32, 32) for kind in MATRICES]
        found.append(tensor(to + "post_attention_norm.weight", attention, 32))
        found.append(tensor(to + "post_ffw_norm.weight", feed_forward, 32))
    return found if tied else [*found, tensor("output.weight", 1.0, 8, 32)]


def test_a_contribution_matters_as_its_share_of_the_stream() -> None:
    # Energies 1 (embedding), 1 and 2: attention is a half of the stream, feed-forward then a half.
    found = sensitivities(model((1.0, 2.0**0.5)))
    half = sensitivities(model((1.0, 0.0)))
    assert found["blk.0.attn_v.weight"] == half["blk.0.attn_v.weight"]
    assert half["blk.0.ffn_up.weight"] == 0.0
    deeper = sensitivities(model((1.0, 2.0**0.5), (2.0, 0.0)))
    # Energy 4 joins 4: a half again, as in the first layer.
    assert deeper["blk.1.attn_q.weight"] == pytest.approx(found["blk.0.attn_q.weight"])


def test_every_matrix_has_a_sensitivity() -> None:
    tensors = model((1.0, 1.0), (1.0, 1.0))
    found = sensitivities(tensors)
    assert {t.name for t in tensors if len(t.shape) == 2} == set(found)


def test_tied_embeddings_count_twice() -> None:
    apart, tied = sensitivities(model((1.0, 1.0))), sensitivities(model((1.0, 1.0), tied=True))
    total = apart["token_embd.weight"] + apart["output.weight"]
    assert tied["token_embd.weight"] == pytest.approx(total)


def test_contributions_without_norms_are_taken_as_large_as_the_embedding() -> None:
    bare = [t for t in model((5.0, 5.0)) if "post_" not in t.name]
    assert sensitivities(bare) == sensitivities(model((1.0, 1.0)))
