"""llama.cpp's sampler chain: which token comes next, from the logits of the last batch.

Knows logits and token ids; knows nothing of text.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.config import SamplingParams
from autoglm_gguf.native.library import engine_error, load_llama
from autoglm_gguf.native.llama import LlamaContext, LlamaModel

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.h, ``llama_token_data``."""


def candidate_array(llama: Any, candidates: NDArray[Any]) -> Any:
    """llama.cpp's view of ``(n,)`` `CANDIDATE` records, which must outlive it."""
    data = ctypes.cast(candidates.ctypes.data, llama.llama_token_data_p)
    return llama.llama_token_data_array(data, len(candidates), -1, False)


class SamplerChain:
    """llama.cpp's samplers in the official server's order; remembers generated tokens only.

    Args:
        model: Gives the vocabulary size.
        params: Checked values.
        n_ctx: How many generated tokens the penalties can look back on: all of them.
    """

    def __init__(self, model: LlamaModel, params: SamplingParams, *, n_ctx: int) -> None:
        llama = self._llama = load_llama()
        self.handle = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        links: list[Any] = []
        if (params.repeat_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0):
            links.append(
                llama.llama_sampler_init_penalties(
                    model.n_vocab,
                    n_ctx,
                    params.repeat_penalty,
                    params.frequency_penalty,
                    params.presence_penalty,
                )
            )
        if params.temperature == 0:
            links.append(llama.llama_sampler_init_greedy())
        else:
            seed = llama.LLAMA_DEFAULT_SEED if params.seed is None else params.seed
            links.append(llama.llama_sampler_init_temp(params.temperature))
            if params.min_p > 0:
                links.append(llama.llama_sampler_init_min_p(params.min_p, 1))
            if params.top_k > 0:
                links.append(llama.llama_sampler_init_top_k(params.top_k))
            if params.top_p < 1:
                links.append(llama.llama_sampler_init_top_p(params.top_p, 1))
            links.append(llama.llama_sampler_init_dist(seed))
        for link in links:
            llama.llama_sampler_chain_add(self.handle, link)
        self._ids = np.arange(model.n_vocab, dtype=np.int32)
        self._candidates = np.zeros(model.n_vocab, CANDIDATE)

    def sample(self, context: LlamaContext, among: NDArray[np.int32] | None = None) -> int:
        """Choose from the last output's logits; the penalties count it when it is accepted.

        Args:
            context: Has evaluated a batch.
            among: Ids to choose from, at least one; None means all.

        Raises:
            EngineError: The logits hold NaN, which llama.cpp's samplers do not survive.
        """
        logits = context.logits()
        if not bool(np.isfinite(logits.max())):
            raise engine_error(
                "model: its logits are not finite", hint="convert the checkpoint again and verify"
            )
        candidates = self._candidates[: len(logits) if among is None else len(among)]
        candidates["id"] = self._ids if among is None else among
        candidates["logit"] = logits if among is None else logits[among]
        array = candidate_array(self._llama, candidates)
        self._llama.llama_sampler_apply(self.handle, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def accept(self, token: int) -> None:
        """Remember a token as generated."""
        self._llama.llama_sampler_accept(self.handle, token)

    def close(self) -> None:
        """Free the chain and its links."""
        if self.handle:
            self._llama.llama_sampler_free(self.handle)
            self.handle = None
