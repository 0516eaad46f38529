"""A model, a context and a sampler chain of llama.cpp, each closed exactly once.

Checks what llama.cpp would abort the process over (batch size, positions, output count) before
calling it. Knows tokens, embeddings and positions; knows nothing of messages or images.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.config import CacheType, ContextParams, SamplingParams
from autoglm_gguf.errors import ContextFullError
from autoglm_gguf.native.ggml import GGMLType, device_handle, tensor_name
from autoglm_gguf.native.interrupts import HeldInterrupts
from autoglm_gguf.native.library import clear_errors, engine_error, load_llama

_CACHE_TYPES: dict[CacheType, GGMLType] = {
    "f32": GGMLType.F32,
    "f16": GGMLType.F16,
    "bf16": GGMLType.BF16,
    "q8_0": GGMLType.Q8_0,
    "q4_0": GGMLType.Q4_0,
}
_MROPE_AXES = 4  # time, row, column, unused: llama.cpp's positions per embedding under M-RoPE


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights lie."""

    mapped: bool = True
    """The file is mapped; otherwise every weight is read into anonymous memory."""
    repacked: bool = False
    """Weights whose type has faster kernels are copied into their order, all of them."""
    copied: Mapping[str, int] = field(default_factory=dict)
    """Tensor name to the ggml buffer type it is copied into, out of the mapping."""
    vocabulary_only: bool = False


class LlamaModel:
    """Weights and vocabulary of a text GGUF.

    Args:
        path: A whole, checked GGUF file.
        n_gpu_layers: Layers on the GPU, the last ones first; -1 means all.
        devices: Names of the GPUs they go to; none, and llama.cpp sees only the CPU.
        placement: Where the weights lie; by default all in the mapped file.
        on_tensor: Called before each tensor is loaded.

    Raises:
        EngineError: llama.cpp refused the file; its reason is in the message.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_gpu_layers: int = 0,
        devices: Sequence[str] = (),
        placement: Placement | None = None,
        on_tensor: Callable[[], None] | None = None,
    ) -> None:
        self._llama = load_llama()
        placement = placement or Placement()
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        # Always given, ended by NULL: else a GPU would take part in what is meant for the CPU.
        handles = (ctypes.c_void_p * (len(devices) + 1))(*map(device_handle, devices))
        params.devices = ctypes.addressof(handles)
        params.no_host = placement.repacked  # else pinned memory takes the kernels' order's place
        params.load_mode = (
            self._llama.LLAMA_LOAD_MODE_MMAP
            if placement.mapped
            else self._llama.LLAMA_LOAD_MODE_NONE
        )
        params.use_extra_bufts = placement.repacked
        params.vocab_only = placement.vocabulary_only
        overrides = _overrides(placement.copied)
        if placement.copied:
            params.tensor_buft_overrides = ctypes.addressof(overrides)

        interrupts = HeldInterrupts()

        def on_progress(_share: float, _data: Any) -> bool:
            if on_tensor is not None:
                on_tensor()
            return not interrupts.ends_work  # False ends the load

        callback = self._llama.llama_progress_callback(on_progress)  # lives until the load is done
        params.progress_callback = callback
        clear_errors()
        self.handle = None
        with interrupts:
            self.handle = self._llama.llama_model_load_from_file(str(path).encode(), params)
            if self.handle and interrupts.ends_work:
                self.close()
        if not self.handle:
            raise engine_error(f"{path.name}: llama.cpp could not load the model")
        self.vocab = self._llama.llama_model_get_vocab(self.handle)
        self.n_vocab = int(self._llama.llama_vocab_n_tokens(self.vocab))
        self.n_embd = int(self._llama.llama_model_n_embd_inp(self.handle))
        self.n_ctx_train = int(self._llama.llama_model_n_ctx_train(self.handle))
        rope_type = self._llama.llama_model_rope_type(self.handle)
        self.uses_mrope = rope_type in (
            self._llama.LLAMA_ROPE_TYPE_MROPE,
            self._llama.LLAMA_ROPE_TYPE_IMROPE,
        )

    def tokenize(self, text: str) -> list[int]:
        """Token ids of text; special tokens written literally become their ids, none is added."""
        data = text.encode()
        capacity = len(data) + 8
        ids = (ctypes.c_int32 * capacity)()
        n = self._llama.llama_tokenize(self.vocab, data, len(data), ids, capacity, False, True)
        if n < 0:  # more tokens than bytes cannot happen with a byte-level BPE
            raise engine_error(f"llama.cpp: could not tokenise {len(data)} bytes")
        return list(ids[:n])

    def token_bytes(self, token: int, *, special: bool) -> bytes:
        """The bytes a token stands for; a control token gives none unless ``special``."""
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token id {token}: outside 0..{self.n_vocab - 1}")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._llama.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that are no text."""
        is_control = self._llama.llama_vocab_is_control
        return frozenset(n for n in range(self.n_vocab) if is_control(self.vocab, n))

    def close(self) -> None:
        """Free the weights. Every context made from them must be closed before."""
        if self.handle:
            self._llama.llama_model_free(self.handle)
            self.handle = None


class LlamaContext:
    """A KV cache of one sequence, with the compute buffers to fill it.

    Args:
        model: Outlives the context.
        params: Sizes and types.
        n_threads: Compute threads.
        n_outputs_max: Positions per batch whose logits may be asked for.
        on_layer: Called with a layer's number when a batch has passed it; must not raise.
        watched_layers: The layers it is called for.

    Raises:
        EngineError: llama.cpp could not make the context (most often: too little memory).
    """

    def __init__(
        self,
        model: LlamaModel,
        params: ContextParams,
        *,
        n_threads: int,
        n_outputs_max: int = 1,
        on_layer: Callable[[int], None] | None = None,
        watched_layers: Collection[int] = (),
    ) -> None:
        self._llama = load_llama()
        self._model = model
        raw = self._llama.llama_context_default_params()
        raw.n_ctx = params.n_ctx
        raw.n_batch = raw.n_ubatch = min(params.n_batch, params.n_ctx)
        raw.n_seq_max = 1
        raw.n_outputs_max = n_outputs_max
        raw.n_threads = raw.n_threads_batch = n_threads
        raw.type_k = _CACHE_TYPES[params.type_k]
        raw.type_v = _CACHE_TYPES[params.type_v]
        raw.flash_attn_type = (
            self._llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if params.flash_attn
            else self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        raw.offload_kqv = params.offload_kqv
        raw.op_offload = False  # what stays on the CPU is computed there: the plan counts on it
        raw.no_perf = True
        self._interrupts = HeldInterrupts()
        self._callback = None  # kept as long as llama.cpp may call it
        if on_layer is not None:
            names = {f"l_out-{n}".encode(): n for n in watched_layers}
            self._callback = self._llama.ggml_backend_sched_eval_callback(
                partial(self._on_node, names, on_layer)
            )
            raw.cb_eval = self._callback
        clear_errors()
        self.handle = self._llama.llama_init_from_model(model.handle, raw)
        if not self.handle:
            raise engine_error(
                f"llama.cpp: no context of {params.n_ctx} tokens",
                hint="use a smaller n_ctx, or type_k and type_v of q8_0",
            )
        self.n_ctx = params.n_ctx
        self.n_batch = int(self._llama.llama_n_batch(self.handle))
        self.n_outputs_max = n_outputs_max
        self._n_outputs = 0
        self.n_past = 0
        """KV cells in use."""
        self.position = 0
        """Position of the next token; behind n_past after an image, which takes fewer positions."""

    def clear(self) -> None:
        """Empty the KV cache."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self.handle), False)
        self.n_past = self.position = self._n_outputs = 0

    def decode_tokens(self, tokens: list[int], *, n_outputs: int = 1) -> None:
        """Evaluate tokens (at most n_batch) and keep logits of the last ``n_outputs`` of them."""
        n = len(tokens)
        ids = np.asarray(tokens, np.int32)
        if n and not (int(ids.min()) >= 0 and int(ids.max()) < self._model.n_vocab):
            raise ValueError(f"token id outside 0..{self._model.n_vocab - 1}")
        positions = np.arange(self.position, self.position + n, dtype=np.int32)
        self._decode(n, n_outputs, positions, tokens=ids)
        self.position += n

    def decode_image(self, embeddings: NDArray[np.float32], grid: tuple[int, int]) -> None:
        """Evaluate image embeddings, batch by batch.

        Args:
            embeddings: ``(n_rows * n_columns, n_embd)``, row by row from the top left.
            grid: ``(n_columns, n_rows)`` of image tokens.
        """
        n_columns, n_rows = grid
        if not self._model.uses_mrope:
            # llama.cpp ends the process on embeddings without M-RoPE for this architecture.
            raise engine_error("model: cannot take images (no rope.dimension_sections)")
        if embeddings.shape != (n_columns * n_rows, self._model.n_embd):
            raise ValueError(f"embeddings of shape {embeddings.shape} do not fit grid {grid}")
        cells = np.arange(n_columns * n_rows, dtype=np.int32)
        positions = np.empty((_MROPE_AXES, cells.size), np.int32)
        positions[0] = self.position
        positions[1] = self.position + cells // n_columns
        positions[2] = self.position + cells % n_columns
        positions[3] = 0
        for start in range(0, cells.size, self.n_batch):
            part = slice(start, min(start + self.n_batch, cells.size))
            self._decode(
                part.stop - part.start,
                1,
                np.ascontiguousarray(positions[:, part]),
                embeddings=np.ascontiguousarray(embeddings[part], np.float32),
            )
        self.position += max(n_columns, n_rows)

    def _decode(
        self,
        n: int,
        n_outputs: int,
        positions: NDArray[np.int32],
        *,
        tokens: NDArray[np.int32] | None = None,
        embeddings: NDArray[np.float32] | None = None,
    ) -> None:
        if not (1 <= n <= self.n_batch and 1 <= n_outputs <= min(n, self.n_outputs_max)):
            raise ValueError(f"batch of {n} tokens with {n_outputs} outputs")
        if self.n_past + n > self.n_ctx:
            raise ContextFullError(
                f"context: full ({self.n_past} cells used, {n} more wanted, n_ctx {self.n_ctx})",
                n_prompt=self.n_past + n,
                n_ctx=self.n_ctx,
                hint="raise n_ctx or shorten the conversation",
            )
        wanted = np.zeros(n, np.int8)
        wanted[n - n_outputs :] = 1
        batch = self._llama.llama_batch()
        batch.n_tokens = n
        batch.token = _as(tokens, ctypes.c_int32)
        batch.embd = _as(embeddings, ctypes.c_float)
        batch.pos = _as(positions, ctypes.c_int32)
        batch.logits = _as(wanted, ctypes.c_int8)
        clear_errors()
        if self._callback is None:
            status = int(self._llama.llama_decode(self.handle, batch))
        else:
            with HeldInterrupts() as self._interrupts:
                status = int(self._llama.llama_decode(self.handle, batch))
        if status != 0:
            raise engine_error(f"llama.cpp: decode failed (status {status})")
        self.n_past += n
        self._n_outputs = n_outputs

    def _on_node(
        self,
        names: dict[bytes, int],
        on_layer: Callable[[int], None],
        tensor: int,
        ask: bool,
        _: Any,
    ) -> bool:
        """llama.cpp asks for every node whether it is wanted, and calls again when it is done."""
        layer = names.get(tensor_name(tensor))
        if not ask and layer is not None:
            on_layer(layer)
            return not self._interrupts.ends_work  # False ends the batch, which is not counted then
        return layer is not None or not ask

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits ``(n_vocab,)`` of one of the last batch's outputs; a view until the next batch."""
        if not -self._n_outputs <= index < self._n_outputs:
            raise IndexError(f"output {index} of {self._n_outputs}")
        # Outputs are stored one after another, so the last batch's rows start at the buffer's head.
        row = index % self._n_outputs
        pointer = self._llama.llama_get_logits(self.handle)
        if not pointer:
            raise engine_error("llama.cpp: no logits")
        shape = (self._n_outputs, self._model.n_vocab)
        view: NDArray[np.float32] = np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape
        )
        row_view: NDArray[np.float32] = view[row]
        return row_view

    def close(self) -> None:
        """Free the KV cache and the buffers."""
        if self.handle:
            self._llama.llama_free(self.handle)
            self.handle = None


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


class _Override(ctypes.Structure):
    """llama.h, ``struct llama_model_tensor_buft_override``."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def _overrides(copied: Mapping[str, int]) -> ctypes.Array[_Override]:
    """One pattern per buffer type, since llama.cpp tries each pattern on each tensor."""
    by_type: dict[int, list[str]] = {}
    for name, kind in copied.items():
        by_type.setdefault(kind, []).append(re.escape(name))
    table = (_Override * (len(by_type) + 1))()  # the last one, empty, ends it
    for entry, (kind, found) in zip(table, by_type.items(), strict=False):
        entry.pattern = f"^({'|'.join(found)})$".encode()
        entry.buft = kind
    return table


def _as(array: NDArray[Any] | None, ctype: Any) -> Any:
    pointer = ctypes.POINTER(ctype)
    return pointer() if array is None else array.ctypes.data_as(pointer)
