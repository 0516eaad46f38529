"""A model and a context of llama.cpp, each closed exactly once.

Checks what llama.cpp would abort the process over (batch size, positions, output count) before
calling it. Knows tokens, embeddings and positions; knows nothing of messages or images.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.config import CACHE_TYPES, ContextParams
from autoglm_gguf.errors import ContextFullError
from autoglm_gguf.native.batch import MROPE_AXES, Batch, point_at
from autoglm_gguf.native.ggml import GGMLType, device_handle
from autoglm_gguf.native.interrupts import HeldInterrupts
from autoglm_gguf.native.library import (
    LLAMA_CPP_COMMIT,
    PINNED_VERSION,
    clear_errors,
    engine_error,
    load_llama,
    string_length,
)
from autoglm_gguf.native.nodes import NodeWatch
from autoglm_gguf.native.state import StateLayout
from autoglm_gguf.stopping import StopFlag, Stopped

_CACHE_TYPES = {kind: GGMLType[kind.upper()] for kind in CACHE_TYPES}
_ROTATION = "LLAMA_ATTN_ROT_DISABLE"  # of quantised KV; llama.cpp reads it for each context
_ROTATION_IS_OFF = re.compile(r"\s*[+-]?0*[1-9]")  # what its atoi takes for true


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
        found: list[int] = self._tokenize(text, add_special=False, parse_special=True).tolist()
        return found

    def tokenize_document(self, text: str, *, parse_special: bool) -> NDArray[np.int32]:
        """Token ids ``(n,)`` of a text that is no prompt, with what the vocabulary adds to one."""
        return self._tokenize(text, add_special=True, parse_special=parse_special)

    def _tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        data = text.encode()
        capacity = len(data) + 8
        ids = np.empty(capacity, np.int32)
        pointer = point_at(ids, ctypes.c_int32)
        n = self._llama.llama_tokenize(
            self.vocab, data, len(data), pointer, capacity, add_special, parse_special
        )
        if n < 0:  # more tokens than bytes cannot happen with a byte-level BPE
            raise engine_error(f"llama.cpp: could not tokenise {len(data)} bytes")
        return ids[:n].copy()

    @cached_property
    def bos(self) -> int | None:
        """The token that the vocabulary puts before a text; None where it puts none."""
        adds = self._llama.llama_vocab_get_add_bos(self.vocab)
        return int(self._llama.llama_vocab_bos(self.vocab)) if adds else None

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
            with HeldInterrupts():
                self._llama.llama_model_free(self.handle)
                self.handle = None


class LlamaContext:
    """A KV cache of one sequence, with the compute buffers to fill it.

    Args:
        model: Outlives the context.
        params: Sizes and types.
        n_threads: Compute threads.
        n_outputs_max: Positions per batch whose logits may be asked for.
        watches: Look at the nodes of every batch.

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
        watches: Sequence[NodeWatch] = (),
    ) -> None:
        self._llama = load_llama()
        self._model = model
        raw = self._raw_params(params)
        raw.n_outputs_max = n_outputs_max
        raw.n_threads = raw.n_threads_batch = n_threads
        self._callback = None  # kept as long as llama.cpp may call it
        if watches:
            self._callback = self._llama.ggml_backend_sched_eval_callback(
                partial(self._on_node, tuple(watches))
            )
            raw.cb_eval = self._callback
        clear_errors()
        self.handle = None
        try:
            with HeldInterrupts():
                self.handle = self._llama.llama_init_from_model(model.handle, raw)
        except BaseException:
            self.close()
            raise
        if not self.handle:
            raise engine_error(
                f"llama.cpp: no context of {params.n_ctx} tokens",
                hint="use a smaller n_ctx, or type_k and type_v of q8_0",
            )
        self.n_ctx = params.n_ctx
        self.n_batch = int(self._llama.llama_n_batch(self.handle))
        self.n_outputs_max = n_outputs_max
        self._batch = Batch(self._llama.llama_batch(), self.n_batch)
        self._n_outputs = 0
        self._rows = np.empty((0, model.n_vocab), np.float32)
        self._rows_at = 0  # llama.cpp's own memory, as long as it lives
        self._stop = StopFlag()
        self._abort = self._llama.ggml_abort_callback(string_length())
        self.n_past = 0
        """KV cells in use."""
        self.position = 0
        """Position of the next token; behind n_past after an image, which takes fewer positions."""
        self.state_facts = {
            "library": f"llama-cpp-python {PINNED_VERSION}, llama.cpp {LLAMA_CPP_COMMIT[:9]}",
            "type_k": params.type_k,
            "type_v": params.type_v,
            "flash_attn": str(params.flash_attn),
            "attn_rot": "off" if _ROTATION_IS_OFF.match(os.environ.get(_ROTATION, "")) else "on",
        }
        """What the numbers in the KV cache depend on, beside the model."""

    def _raw_params(self, params: ContextParams) -> Any:
        """llama.h, ``struct llama_context_params``."""
        raw = self._llama.llama_context_default_params()
        raw.n_ctx = params.n_ctx
        raw.n_batch = raw.n_ubatch = min(params.n_batch, params.n_ctx)
        raw.n_seq_max = 1
        self._type_k = raw.type_k = _CACHE_TYPES[params.type_k]
        self._type_v = raw.type_v = _CACHE_TYPES[params.type_v]
        self._flash_attn = params.flash_attn
        raw.flash_attn_type = (
            self._llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if params.flash_attn
            else self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        raw.offload_kqv = params.offload_kqv
        raw.op_offload = False  # what stays on the CPU is computed there: the plan counts on it
        raw.no_perf = True
        return raw

    def watch(self, stop: StopFlag) -> None:
        """End every batch that runs when a flag is set with `Stopped`; it must outlive this."""
        self._stop = stop
        with HeldInterrupts():  # it writes to the log
            self._llama.llama_set_abort_callback(self.handle, self._abort, stop.address)

    def truncate(self, n_past: int, position: int) -> None:
        """Empty the KV cache from a token or the beginning of an image on.

        Args:
            n_past: KV cells that stay.
            position: Of the first token or image that goes.
        """
        memory = self._llama.llama_get_memory(self.handle)
        with HeldInterrupts():
            if not self._llama.llama_memory_seq_rm(memory, 0, position, -1):
                raise engine_error(f"llama.cpp: the KV cache cannot be cut at position {position}")
            self.n_past, self.position, self._n_outputs = n_past, position, 0

    def state_layout(self, n_layers: int, n_embd: int) -> StateLayout:
        """The shape of the KV cache.

        Args:
            n_layers: Of the model.
            n_embd: Elements of one cell's keys, and as many of its values, in one layer.
        """
        return StateLayout(
            n_layers,
            n_embd,
            n_embd,
            type_k=self._type_k,
            type_v=self._type_v,
            transposed=not self._flash_attn,
            uses_mrope=self._model.uses_mrope,
        )

    def save_state(self, path: Path) -> None:
        """Write the KV state to a file, layer by layer: the rows of one layer are copied at a time.

        Raises:
            EngineError: llama.cpp could not write it.
        """
        clear_errors()
        with HeldInterrupts():
            n_bytes = self._llama.llama_state_seq_save_file(
                self.handle, os.fsencode(path), 0, (ctypes.c_int32 * 1)(), 0
            )
        # What is left in its buffer is written as the file closes, and nobody asks how that went.
        if not n_bytes or path.stat().st_size != n_bytes:
            raise engine_error(
                "KV state: cannot be written", hint="is there room on the disk for it?"
            )

    def load_state(self, path: Path, n_past: int, position: int) -> None:
        """Take a KV state in place of what is held, layer by layer as `save_state`.

        Args:
            path: Checked by `StateLayout.check`: llama.cpp trusts it.
            n_past: KV cells it holds.
            position: Of the token after them.

        Raises:
            EngineError: llama.cpp refused it; nothing is held then.
        """
        self.truncate(0, 0)
        clear_errors()
        n_tokens = ctypes.c_size_t(0)
        try:
            with HeldInterrupts():
                n_bytes = self._llama.llama_state_seq_load_file(
                    self.handle, os.fsencode(path), 0, (ctypes.c_int32 * 1)(), 0, n_tokens
                )
            if not n_bytes:
                raise engine_error("KV state: llama.cpp could not restore it")
        except BaseException:
            self.truncate(0, 0)
            raise
        self.n_past, self.position = n_past, position

    def decode_tokens(self, tokens: list[int], *, n_outputs: int = 1) -> None:
        """Evaluate tokens (at most n_batch) and keep logits of the last ``n_outputs`` of them.

        After an exception the KV cache may hold a part of them: `truncate` it.

        Raises:
            ContextFullError: They do not fit n_ctx.
            Stopped: See `watch`.
            EngineError: llama.cpp failed.
        """
        n = len(tokens)
        self._check_batch(n, n_outputs)
        if not (min(tokens) >= 0 and max(tokens) < self._model.n_vocab):
            raise ValueError(f"token id outside 0..{self._model.n_vocab - 1}")
        self._batch.put_tokens(tokens)
        self._batch.positions[:n] = np.arange(self.position, self.position + n)
        self._decode(n, n_outputs)
        self.position += n

    def decode_image(
        self,
        embeddings: NDArray[np.float32],
        grid: tuple[int, int],
        *,
        whole: bool = False,
    ) -> None:
        """Evaluate image embeddings, batch by batch; errors as `decode_tokens`.

        Args:
            embeddings: ``(n_rows * n_columns, n_embd)``, row by row from the top left.
            grid: ``(n_columns, n_rows)`` of image tokens.
            whole: Keep logits of every cell, so that all of them pass the whole last layer.
        """
        n_columns, n_rows = grid
        if not self._model.uses_mrope:
            # llama.cpp ends the process on embeddings without M-RoPE for this architecture.
            raise engine_error("model: cannot take images (no rope.dimension_sections)")
        if embeddings.shape != (n_columns * n_rows, self._model.n_embd):
            raise ValueError(f"embeddings of shape {embeddings.shape} do not fit grid {grid}")
        cells = np.arange(n_columns * n_rows, dtype=np.int32)
        positions = np.empty((MROPE_AXES, cells.size), np.int32)
        positions[0] = self.position
        positions[1] = self.position + cells // n_columns
        positions[2] = self.position + cells % n_columns
        positions[3] = 0
        for start in range(0, cells.size, self.n_batch):
            part = slice(start, min(start + self.n_batch, cells.size))
            n = part.stop - part.start
            n_outputs = n if whole else 1
            self._check_batch(n, n_outputs)
            self._batch.put_embeddings(np.ascontiguousarray(embeddings[part], np.float32))
            self._batch.positions[: MROPE_AXES * n] = positions[:, part].ravel()
            self._decode(n, n_outputs)
        self.position += max(n_columns, n_rows)

    def _check_batch(self, n: int, n_outputs: int) -> None:
        if not (1 <= n <= self.n_batch and 1 <= n_outputs <= min(n, self.n_outputs_max)):
            raise ValueError(f"batch of {n} tokens with {n_outputs} outputs")
        if self.n_past + n > self.n_ctx:
            raise ContextFullError(
                f"context: full ({self.n_past} cells used, {n} more wanted, n_ctx {self.n_ctx})",
                n_prompt=self.n_past + n,
                n_ctx=self.n_ctx,
                hint="raise n_ctx or shorten the conversation",
            )

    def _decode(self, n: int, n_outputs: int) -> None:
        """Evaluate what `_batch` holds."""
        batch = self._batch.of_size(n, n_outputs)
        clear_errors(self._stop)
        status = int(self._llama.llama_decode(self.handle, batch))
        if self._stop.is_set():  # status 2; or 0, where `_on_node` ended the graph
            raise Stopped
        if status != 0:
            raise engine_error(f"llama.cpp: decode failed (status {status})")
        self.n_past += n
        self._n_outputs = n_outputs

    def _on_node(self, watches: tuple[NodeWatch, ...], tensor: int, ask: bool, _data: Any) -> bool:
        """llama.cpp asks for every node whether it is wanted, and calls again when it is done."""
        wanting = [watch for watch in watches if watch.wants(tensor)]
        if ask:
            return bool(wanting)
        goes_on = not self._stop.is_set()
        for watch in wanting:
            goes_on = watch.see(tensor) and goes_on
        return goes_on  # False ends the batch

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits ``(n_vocab,)`` of one of the last batch's outputs; a view until the next batch."""
        if not -self._n_outputs <= index < self._n_outputs:
            raise IndexError(f"output {index} of {self._n_outputs}")
        # Outputs are stored one after another, so the last batch's rows start at the buffer's head.
        row = index % self._n_outputs
        pointer = self._llama.llama_get_logits(self.handle)
        if not pointer:
            raise engine_error("llama.cpp: no logits")
        address, n = ctypes.addressof(pointer.contents), self._n_outputs
        if len(self._rows) != n or self._rows_at != address:
            values = (ctypes.c_float * (n * self._model.n_vocab)).from_address(address)
            self._rows, self._rows_at = np.ctypeslib.as_array(values).reshape(n, -1), address
        row_view: NDArray[np.float32] = self._rows[row]
        return row_view

    def close(self) -> None:
        """Free the KV cache and the buffers."""
        if self.handle:
            with HeldInterrupts():
                self._llama.llama_free(self.handle)
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
