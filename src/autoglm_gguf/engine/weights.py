"""Puts a text model's weights where a plan says, and keeps the page bookkeeping for it.

The peak at load is part of the promise: llama.cpp would map the whole file with all its pages, so a
load that must stay small is watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from autoglm_gguf.config import ContextParams
from autoglm_gguf.devices import probe_memory
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.header import Header
from autoglm_gguf.memory.estimate import layer_of, layer_span
from autoglm_gguf.memory.plan import MemoryPlan
from autoglm_gguf.memory.residency import LoadWatch, Residency
from autoglm_gguf.native.ggml import can_repack, host_buffer_type, repack_buffer_type
from autoglm_gguf.native.llama import LlamaModel, Placement

_PROBE_SECONDS = 5.0


def load_weights(header: Header, params: ContextParams, plan: MemoryPlan | None) -> LlamaModel:
    """Load the weights of a checked text GGUF.

    Raises:
        EngineError: llama.cpp refused the file.
    """
    if plan is None or plan.weights == "repacked":
        placement = Placement(mapped=False, repacked=True)
    elif plan.weights == "mapped":
        placement = Placement()
    else:
        placement = Placement(copied=_copied(header, plan))
    passes_through = plan is not None and plan.weights != "repacked" and bool(plan.devices)
    watched = plan is not None and (plan.weights == "streamed" or passes_through)
    with LoadWatch(header.path, enabled=watched) as watch:
        return LlamaModel(
            header.path,
            n_gpu_layers=params.n_gpu_layers,
            devices=() if plan is None else plan.devices,
            placement=placement,
            on_tensor=watch.look,
        )


def open_residency(
    header: Header, plan: MemoryPlan | None, cache_is_scarce: Callable[[], bool]
) -> Residency | None:
    """The page bookkeeping that a plan asks for; None if it asks for none."""
    if plan is None or not (plan.places.streamed or plan.places.yielding):
        return None
    residency = Residency(
        header.path,
        streamed={layer: layer_span(header, layer) for layer in plan.places.streamed},
        yielding=[layer_span(header, layer) for layer in plan.places.yielding],
        scattered=_embedding_spans(header),
        cache_is_scarce=cache_is_scarce,
    )
    if plan.weights == "streamed":
        residency.drop_all()
    return residency


def _embedding_spans(header: Header) -> list[tuple[int, int]]:
    """The token embedding, of which each token reads one row; none where it is the output too."""
    tensor = header.tensors.get("token_embd.weight")
    if tensor is None or "output.weight" not in header.tensors:
        return []
    return [(tensor.offset, tensor.offset + tensor.n_bytes)]


def _copied(header: Header, plan: MemoryPlan) -> dict[str, int]:
    """What stays, each tensor with the buffer type whose kernels are the fastest for it.

    Vectors stay in every layer: a few kilobytes each, but where they were left in the mapping, one
    fault on them made the system read megabytes around them.
    """
    repack, host = repack_buffer_type(), host_buffer_type()
    layers, away = frozenset(plan.places.copied), device_tensors(header, plan.context)
    placed: dict[str, int] = {}
    for tensor in header.tensors.values():
        if tensor.name in away:
            continue
        if len(tensor.shape) == 1:
            placed[tensor.name] = host
            continue
        if tensor.name != "output.weight" and layer_of(tensor.name) not in layers:
            continue
        fast = repack is not None and can_repack(tensor.ggml_type, *tensor.shape)
        placed[tensor.name] = repack if fast and repack is not None else host
    return placed


def device_tensors(header: Header, params: ContextParams) -> frozenset[str]:
    """Names of the tensors that llama.cpp puts on GPUs: the output, then the last layers."""
    if params.n_gpu_layers == 0:
        return frozenset()
    n_layers = header.get_int(names.BLOCK_COUNT) or 0
    away = range(max(0, n_layers - (params.n_gpu_layers - 1)), n_layers)
    ends = ("output.weight", "output_norm.weight")
    return frozenset(name for name in header.tensors if name in ends or layer_of(name) in away)


class CacheScarcity:
    """Whether the page cache is too small for all that is read from files again and again.

    That is the text model's mapped weights and, where it is loaded for each image, the tower. Asked
    anew every few seconds.

    Args:
        plan: How the pair is held; without one nothing is read again.
    """

    def __init__(self, plan: MemoryPlan | None) -> None:
        self._wanted_bytes = 0 if plan is None else plan.cached_bytes
        self._asked = -_PROBE_SECONDS
        self._scarce = False

    def __call__(self) -> bool:
        """Whether it is too small now."""
        now = time.monotonic()
        if now - self._asked >= _PROBE_SECONDS:
            memory = probe_memory()
            self._scarce = memory is not None and memory.available_bytes < self._wanted_bytes
            self._asked = now
        return self._scarce
