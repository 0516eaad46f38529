"""How probable a model held a token, and which ones it held more probable.

Pure arithmetic over one row of logits, as the model gave them: before penalties, temperature and
filters, which is what vLLM reports by default and OpenAI's field is read as.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def find_logprobs(
    logits: NDArray[np.float32], token: int, n_top: int
) -> tuple[float, list[tuple[int, float]]]:
    """Natural logarithms of probabilities over the whole vocabulary.

    Args:
        logits: ``(n_vocab,)``, at least one of them finite, none NaN.
        token: The one asked about.
        n_top: How many of the most probable to list.

    Returns:
        The token's own, and ``(id, logprob)`` of the most probable: best first, equal ones by id.
        A token that cannot come has ``-inf``.
    """
    wide = logits.astype(np.float64)  # 151,552 addends: float32 loses the fourth digit
    wide -= wide.max()
    logprobs = wide - np.log(np.exp(wide).sum())
    n_top = min(n_top, len(logprobs))
    if n_top == 0:
        return float(logprobs[token]), []
    least = np.partition(logprobs, -n_top)[-n_top]
    best = np.flatnonzero(logprobs >= least)
    best = best[np.argsort(-logprobs[best], kind="stable")][:n_top]
    return float(logprobs[token]), [(int(n), float(logprobs[n])) for n in best]
