"""The vision tower of libmtmd: RGB pixels in, embeddings out.

The pixels must already have the size the tower will see: libmtmd then only normalises them (its own
resizing letterboxes, which shifts coordinates). Knows nothing of prompts or of the KV cache.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.native.ggml import device_handle, operation_name
from autoglm_gguf.native.interrupts import HeldInterrupts
from autoglm_gguf.native.library import clear_errors, engine_error, load_llama, load_mtmd
from autoglm_gguf.native.llama import LlamaModel
from autoglm_gguf.stopping import StopFlag, Stopped

_LONG_OPERATIONS = (b"MUL_MAT", b"FLASH_ATTN_EXT")


class VisionTower:
    """An mmproj GGUF held in memory.

    Args:
        path: A checked mmproj file whose width is the text model's.
        model: The text model; libmtmd needs its vocabulary.
        n_threads: Compute threads.
        flash_attn: Fused attention; without it the encode peak is several times larger.
        max_image_tokens: Largest image that will be encoded; above llama.cpp's own limit of 4096
            it must be named here.
        device: The GPU it runs on, by ggml's name; None is the CPU.

    Raises:
        EngineError: libmtmd refused the file.
    """

    def __init__(
        self,
        path: Path,
        model: LlamaModel,
        *,
        n_threads: int,
        flash_attn: bool,
        max_image_tokens: int,
        device: str | None = None,
    ) -> None:
        self._mtmd = load_mtmd()
        self._n_embd = model.n_embd
        self._stop = StopFlag()
        params = self._mtmd.mtmd_context_params_default()
        params.use_gpu = device is not None
        params.device = None if device is None else device_handle(device)
        params.print_timings = False
        params.n_threads = n_threads
        params.flash_attn_type = 1 if flash_attn else 0
        params.warmup = False  # it would reserve 496 MiB whatever the limit
        params.image_min_tokens = 1  # the caller has already chosen the size
        params.image_max_tokens = self.max_image_tokens = max_image_tokens
        # The tower's backend takes no abort callback: this one ends the graph after any of the long
        # nodes. Asked for all of them, it cost a twentieth of the time.
        self._callback = load_llama().ggml_backend_sched_eval_callback(self._on_node)
        params.cb_eval = self._callback
        clear_errors()
        self._handle = None
        try:
            with HeldInterrupts():
                self._handle = self._mtmd.mtmd_init_from_file(
                    str(path).encode(), model.handle, params
                )
        except BaseException:
            self.close()
            raise
        if not self._handle:
            raise engine_error(f"{path.name}: libmtmd could not load the vision tower")
        if not self._mtmd.mtmd_support_vision(self._handle):
            self.close()
            raise engine_error(f"{path.name}: holds no vision tower")

    def _on_node(self, tensor: int, ask: bool, _data: Any) -> bool:
        if ask:  # whether to come back after this node, and those before it that were not wanted
            return operation_name(tensor) in _LONG_OPERATIONS
        return not self._stop.is_set()

    def encode(
        self, pixels: NDArray[np.uint8], grid: tuple[int, int], stop: StopFlag | None = None
    ) -> NDArray[np.float32]:
        """Run the tower over one image.

        Args:
            pixels: ``(height, width, 3)``, RGB, both sides multiples of patch size times merge.
            grid: ``(n_columns, n_rows)`` of image tokens the pixels must give.
            stop: Ends the work when it is set.

        Returns:
            ``(n_columns * n_rows, n_embd)``, a copy, row by row from the top left.

        Raises:
            Stopped: The flag was set.
            EngineError: libmtmd failed, or would have changed the image's size.
        """
        self._stop = stop or StopFlag()
        chunks = self._mtmd.mtmd_input_chunks_init()
        try:
            image = self._tokenize(pixels, chunks)
            n_tokens = int(self._mtmd.mtmd_input_chunk_get_n_tokens(image))
            if n_tokens != grid[0] * grid[1]:
                raise engine_error(f"libmtmd: {n_tokens} image tokens, not {grid[0]}x{grid[1]}")
            clear_errors()
            status = self._mtmd.mtmd_encode_chunk(self._handle, image)
            if self._stop.is_set():  # a graph that was ended early counts as done
                raise Stopped
            if status != 0:
                raise engine_error("libmtmd: encoding the image failed")
            pointer = self._mtmd.mtmd_get_output_embd(self._handle)
            return np.ctypeslib.as_array(pointer, (n_tokens, self._n_embd)).copy()
        finally:
            self._mtmd.mtmd_input_chunks_free(chunks)

    def _tokenize(self, pixels: NDArray[np.uint8], chunks: int) -> int:
        """Let libmtmd prepare the pixels; returns the image chunk, owned by ``chunks``."""
        height, width, _ = pixels.shape
        data = np.ascontiguousarray(pixels).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = self._mtmd.mtmd_bitmap_init(width, height, data)  # copies the pixels
        if not bitmap:
            raise engine_error(f"libmtmd: no bitmap of {width}x{height}")
        try:
            marker = self._mtmd.mtmd_get_marker(self._handle)
            text = self._mtmd.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            clear_errors()
            status = self._mtmd.mtmd_tokenize(self._handle, chunks, ctypes.byref(text), bitmaps, 1)
        finally:
            self._mtmd.mtmd_bitmap_free(bitmap)
        if status != 0:
            raise engine_error(f"libmtmd: could not prepare the image (status {status})")
        for index in range(self._mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self._mtmd.mtmd_input_chunks_get(chunks, index)
            if self._mtmd.mtmd_input_chunk_get_type(chunk) == 1:  # MTMD_INPUT_CHUNK_TYPE_IMAGE
                return int(chunk)
        raise engine_error("libmtmd: the prepared prompt holds no image")

    def close(self) -> None:
        """Free the tower."""
        if self._handle:
            with HeldInterrupts():
                self._mtmd.mtmd_free(self._handle)
                self._handle = None
