"""Which token comes next, from the logits of the last batch.

Knows logits and token ids; knows nothing of text.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.config import SamplingParams
from autoglm_gguf.native.library import engine_error, load_llama
from autoglm_gguf.native.llama import LlamaContext, LlamaModel

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.h, ``llama_token_data``."""


_LEAST_TEMPERATURE = 1e-5  # vLLM's: logits divided by much less are infinite


def candidate_array(llama: Any, candidates: NDArray[Any]) -> Any:
    """llama.cpp's view of ``(n,)`` `CANDIDATE` records, which must outlive it."""
    data = ctypes.cast(candidates.ctypes.data, llama.llama_token_data_p)
    return llama.llama_token_data_array(data, len(candidates), -1, False)


class SamplerChain:
    """The official server's choice; remembers generated tokens only.

    Penalties and the greedy choice are numpy's, over the few tokens they concern: llama.cpp's look
    every token of the vocabulary up, a millisecond at 151,552. Draws are llama.cpp's.

    Args:
        model: Gives the vocabulary size.
        params: Checked values.
    """

    def __init__(self, model: LlamaModel, params: SamplingParams) -> None:
        self._llama = load_llama()
        self._params = params
        self._counts: dict[int, int] = {}
        """How often each token was generated, as far as penalties ask."""
        self._penalises = (
            params.repeat_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        ) != (1, 0, 0)
        self.handle = None if params.temperature < _LEAST_TEMPERATURE else self._open_chain(params)
        if self.handle:
            self._ids = np.arange(model.n_vocab, dtype=np.int32)
            self._candidates = np.zeros(model.n_vocab, CANDIDATE)

    def _open_chain(self, params: SamplingParams) -> Any:
        llama = self._llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        links = [llama.llama_sampler_init_temp(params.temperature)]
        if params.min_p > 0:
            links.append(llama.llama_sampler_init_min_p(params.min_p, 1))
        if params.top_k > 0:
            links.append(llama.llama_sampler_init_top_k(params.top_k))
        if params.top_p < 1:
            links.append(llama.llama_sampler_init_top_p(params.top_p, 1))
        seed = llama.LLAMA_DEFAULT_SEED if params.seed is None else params.seed
        links.append(llama.llama_sampler_init_dist(seed))
        for link in links:
            llama.llama_sampler_chain_add(chain, link)
        return chain

    def sample(
        self, context: LlamaContext, among: NDArray[np.int32] | None = None, *, output: int = -1
    ) -> int:
        """Choose from an output's logits; the penalties count it when it is accepted.

        Args:
            context: Has evaluated a batch.
            among: Ids to choose from, at least one; None means all.
            output: Which of the batch's outputs, the last by default.

        Raises:
            EngineError: The logits hold NaN, which llama.cpp's samplers do not survive.
        """
        raw = context.logits(output)
        best = int(raw.argmax())  # a NaN, where there is one
        if not math.isfinite(raw[best]):
            raise engine_error(
                "model: its logits are not finite", hint="convert the checkpoint again and verify"
            )
        logits = self._penalised(raw)
        if not self.handle:
            # The first of equal ones, as llama.cpp's greedy sampler takes it.
            if among is not None:
                return int(among[logits[among].argmax()])
            return best if logits is raw else int(logits.argmax())
        candidates = self._candidates[: len(logits) if among is None else len(among)]
        candidates["id"] = self._ids if among is None else among
        candidates["logit"] = logits if among is None else logits[among]
        array = candidate_array(self._llama, candidates)
        self._llama.llama_sampler_apply(self.handle, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """OpenAI's frequency and presence penalty after HF's repetition penalty, as vLLM."""
        if not self._counts:
            return logits
        params, n = self._params, len(self._counts)
        ids = np.fromiter(self._counts.keys(), np.int32, n)
        counts = np.fromiter(self._counts.values(), np.float32, n)
        said = logits[ids]
        said = np.where(said > 0, said / params.repeat_penalty, said * params.repeat_penalty)
        logits = logits.copy()
        logits[ids] = said - counts * params.frequency_penalty - params.presence_penalty
        return logits

    def accept(self, token: int) -> None:
        """Remember a token as generated."""
        if self._penalises:
            self._counts[token] = self._counts.get(token, 0) + 1

    def close(self) -> None:
        """Free the chain and its links."""
        if self.handle:
            self._llama.llama_sampler_free(self.handle)
            self.handle = None
