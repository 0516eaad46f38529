"""Bytes that running a GGUF pair takes, by arithmetic from its headers alone.

Knows llama.cpp's graphs of this family, on the CPU and on a GPU, as far as they decide sizes; loads
nothing and asks the machine nothing. Checked against llama.cpp's own dry run and against measured
processes in tests/memory and benchmarks/memory.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoglm_gguf.config import CACHE_TYPES, CacheType, ContextParams
from autoglm_gguf.errors import GGUFError
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.describe import GLM_MERGE_SIZE
from autoglm_gguf.gguf.header import TENSOR_TYPES, Header, TensorInfo

_LAYER = re.compile(r"blk\.(\d+)\.")
_BLOCKS = {name.lower(): (elements, n_bytes) for name, elements, n_bytes in TENSOR_TYPES.values()}
_CACHE_BLOCKS: dict[CacheType, tuple[int, int]] = {kind: _BLOCKS[kind] for kind in CACHE_TYPES}
"""Elements and bytes of a block."""
N_CTX_STEP = 256
"""KV cells: llama.cpp rounds n_ctx up to a multiple of them."""
_F32, _F16 = 4, 2
_MAX_ALIGNMENT = 4096  # between tensors; 32 unless the file says otherwise
# What llama.cpp keeps of a vocabulary, measured with the published model's 151,552 tokens (6 bytes
# each on average) and 302,077 merges: two tables of tokens, one of merge ranks.
_BYTES_PER_TOKEN = 130
_BYTES_PER_CANDIDATE = 200  # 16 of the sampler, 185 of `sampling.Vocabulary`: measured
_BYTES_PER_MERGE = 110
_BYTES_PER_STRING = 115  # tokens and merges as the file has them, freed after the load; measured
_TOWER_BYTES = 4_400_000  # libmtmd's own, beside the weights; measured with two towers


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of a text model, from its header."""

    n_layers: int
    n_embd: int
    n_ff: int
    """Feed-forward width after gating."""
    n_heads: int
    n_heads_kv: int
    head_dim: int
    n_vocab: int
    n_merges: int
    layer_bytes: tuple[int, ...]
    """Weights of each layer."""
    token_embd_bytes: int
    output_bytes: int
    """0 where the token embedding is used twice."""
    other_bytes: int
    """Norms and whatever belongs to no layer."""
    norm_bytes: int
    """Of these, the norm before the output, which lies where the output does."""

    @property
    def weights_bytes(self) -> int:
        """All weights."""
        return sum(self.layer_bytes) + self.token_embd_bytes + self.output_bytes + self.other_bytes


@dataclass(frozen=True, slots=True)
class TowerShape:
    """Sizes of a vision tower, from its header."""

    weights_bytes: int
    hidden: int
    """Width of its blocks."""
    n_ff: int
    """Width of its blocks' feed-forward."""
    merger_width: int
    n_embd: int
    """Width of the text model's embeddings."""
    patch_size: int
    merge_size: int


def text_shape(header: Header) -> TextShape:
    """Sizes of a text GGUF.

    Raises:
        GGUFError: A size is missing or absurd.
    """
    n_layers = _size(header, names.BLOCK_COUNT)
    n_embd = _size(header, names.EMBEDDING_LENGTH)
    n_heads = _size(header, "{arch}.attention.head_count")
    if n_layers > len(header.tensors):
        raise GGUFError(
            f"{header.path.name}: {n_layers} layers, but {len(header.tensors)} tensors",
            hint="convert the checkpoint again",
        )
    layers: dict[int, int] = dict.fromkeys(range(n_layers), 0)
    loose = {"token_embd.weight": 0, "output.weight": 0}
    other = 0
    for tensor in header.tensors.values():
        number = layer_of(tensor.name)
        if number is not None and number in layers:
            layers[number] += tensor.n_bytes
        elif tensor.name in loose:
            loose[tensor.name] += tensor.n_bytes
        else:
            other += tensor.n_bytes
    norm = header.tensors.get("output_norm.weight")
    merges = header.metadata.get(names.MERGES)
    return TextShape(
        n_layers=n_layers,
        n_embd=n_embd,
        n_ff=_size(header, names.FEED_FORWARD_LENGTH),
        n_heads=n_heads,
        n_heads_kv=_size(header, "{arch}.attention.head_count_kv", n_heads),
        head_dim=_size(header, "{arch}.attention.key_length", max(1, n_embd // n_heads)),
        n_vocab=len(header.metadata[names.TOKENS]),
        n_merges=len(merges) if isinstance(merges, list) else 0,
        layer_bytes=tuple(layers.values()),
        token_embd_bytes=loose["token_embd.weight"],
        output_bytes=loose["output.weight"],
        other_bytes=other,
        norm_bytes=norm.n_bytes if norm else 0,
    )


def tower_shape(header: Header) -> TowerShape:
    """Sizes of an mmproj GGUF.

    Raises:
        GGUFError: A size is missing or absurd.
    """
    merger = header.tensors.get("mm.down.weight")
    return TowerShape(
        weights_bytes=header.weights_bytes,
        hidden=_size(header, "clip.vision.embedding_length"),
        n_ff=_size(header, "clip.vision.feed_forward_length"),
        merger_width=merger.shape[0] if merger is not None else 0,
        n_embd=_size(header, names.PROJECTION_DIM),
        patch_size=_size(header, names.PATCH_SIZE),
        merge_size=header.get_int(names.MERGE_SIZE) or GLM_MERGE_SIZE,
    )


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to; None for those outside the layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def layer_span(header: Header, layer: int) -> tuple[int, int]:
    """``(first, last + 1)`` file byte of a layer's tensors, which `convert` writes side by side."""
    inside: list[TensorInfo] = [t for t in header.tensors.values() if layer_of(t.name) == layer]
    return min(t.offset for t in inside), max(t.offset + t.n_bytes for t in inside)


def layers_lie_together(header: Header) -> bool:
    """Whether each layer's tensors are side by side, as `convert` writes them."""
    held: dict[int, int] = {}
    for tensor in header.tensors.values():
        layer = layer_of(tensor.name)
        if layer is not None:
            held[layer] = held.get(layer, 0) + tensor.n_bytes + _MAX_ALIGNMENT
    return all(
        end - start <= held[layer] for layer in held for start, end in [layer_span(header, layer)]
    )


def round_n_ctx(n_cells: int) -> int:
    """What llama.cpp makes of an n_ctx of ``n_cells``: rounded up to whole steps."""
    return -(-n_cells // N_CTX_STEP) * N_CTX_STEP


def kv_cache_bytes(shape: TextShape, n_ctx: int, type_k: CacheType, type_v: CacheType) -> int:
    """The KV cache of one sequence: n_ctx rounded up to 256 cells."""
    width = shape.n_heads_kv * shape.head_dim
    per_cell = 0
    for kind in (type_k, type_v):
        elements, n_bytes = _CACHE_BLOCKS[kind]
        per_cell += -(-width // elements) * n_bytes
    return round_n_ctx(n_ctx) * shape.n_layers * per_cell


def cache_type_fits(shape: TextShape, kind: CacheType) -> bool:
    """Whether heads can be kept in a cache type: llama.cpp wants whole blocks."""
    return shape.head_dim % _CACHE_BLOCKS[kind][0] == 0


def graph_bytes(shape: TextShape, params: ContextParams, *, n_outputs: int = 1) -> int:
    """llama.cpp's compute buffer on the CPU: the graph's largest moment.

    Usually the feed-forward (its fused input and gated output, and three or four rows of
    embeddings); without flash attention the attention scores, with f32 caches their f16 copies,
    with many outputs the logits. Every graph holds the attention mask.
    """
    n_batch, cells = min(params.n_batch, params.n_ctx), round_n_ctx(params.n_ctx)
    caches = (params.type_k, params.type_v)
    width, row = shape.n_heads_kv * shape.head_dim, n_batch * _F32 * shape.n_embd
    # Where K and V are quantised as they are stored, the allocator finds room for one row less.
    n_rows = 3 if all(_CACHE_BLOCKS[kind][0] > 1 for kind in caches) else 4
    feed_forward = n_batch * _F32 * (3 * shape.n_ff + 8) + n_rows * row
    if params.flash_attn:
        copied = cells * width * _F16 * caches.count("f32")
        attention = copied + 5 * row
        feed_forward += min(copied, row)  # sometimes: the free room left by the copies is cut up
    else:
        attention = n_batch * _F32 * (shape.n_heads * cells + 2 * width) + 5 * row
    logits = n_outputs * _F32 * (shape.n_vocab + 2 * shape.n_embd)
    mask = n_batch * cells * (_F16 if params.flash_attn else _F32)
    return max(feed_forward, attention, logits) + mask


def input_bytes(shape: TextShape, params: ContextParams) -> int:
    """llama.cpp's compute buffer on the CPU where all layers are on a GPU.

    The looked up embeddings, the attention mask, positions and indices.
    """
    n_batch = min(params.n_batch, params.n_ctx)
    mask = n_batch * round_n_ctx(params.n_ctx) * (_F16 if params.flash_attn else _F32)
    return n_batch * (2 * shape.n_embd * _F32 + 32) + mask


def device_graph_bytes(shape: TextShape, params: ContextParams, *, n_outputs: int = 1) -> int:
    """llama.cpp's compute buffer on a GPU: the CPU's, less the rows that lie on the CPU then.

    With the output alone there, only the logits. Fitted to ggml-vulkan's report.
    """
    if params.n_gpu_layers == 1:
        return n_outputs * _F32 * (shape.n_vocab + shape.n_embd)
    quantised = _CACHE_BLOCKS[params.type_k][0] > 1
    n_rows = (1 if quantised else 2) if params.offload_kqv else 0
    away = n_rows * min(params.n_batch, params.n_ctx) * _F32 * shape.n_embd
    return graph_bytes(shape, params, n_outputs=n_outputs) - away


def work_bytes(shape: TextShape, params: ContextParams) -> int:
    """The CPU kernels' work space: a batch's activations quantised for the widest matrix."""
    return _quantised_bytes(min(params.n_batch, params.n_ctx) * shape.n_ff)


def output_bytes(shape: TextShape, n_outputs: int = 1) -> int:
    """Logits kept for the caller."""
    return n_outputs * shape.n_vocab * _F32


def vocabulary_bytes(shape: TextShape) -> int:
    """What llama.cpp keeps of the tokens and merges."""
    return shape.n_vocab * _BYTES_PER_TOKEN + shape.n_merges * _BYTES_PER_MERGE


def sampling_bytes(shape: TextShape) -> int:
    """A sampler's candidates; and at most, while it is built, a constraint's table of tokens."""
    return shape.n_vocab * _BYTES_PER_CANDIDATE


def loading_bytes(shape: TextShape) -> int:
    """What llama.cpp holds of the file's tokens and merges while it loads."""
    return (shape.n_vocab + shape.n_merges) * _BYTES_PER_STRING


def encode_bytes(shape: TowerShape, n_image_tokens: int) -> int:
    """Peak scratch while one image is encoded, with flash attention, beside the tower's weights.

    Four patches a token: the blocks' feed-forward (gate, up, their product) and three rows of width
    ``hidden``; or the merger on whole tokens. Besides, the kernels' work space, the pixels, and
    what libmtmd keeps.
    """
    n_patches = n_image_tokens * shape.merge_size**2
    blocks = n_patches * _F32 * 3 * (shape.n_ff + shape.hidden)
    merger = n_image_tokens * _F32 * (3 * shape.merger_width + 2 * shape.n_embd)
    downsample = shape.hidden * shape.merge_size**2 * shape.n_embd  # a kernel, turned into f16
    work = max(_quantised_bytes(n_patches * shape.n_ff), downsample * _F16)
    pixels = n_patches * shape.patch_size**2 * 3
    return max(blocks, merger) + work + 3 * pixels + _TOWER_BYTES


def embedding_bytes(shape: TowerShape, n_image_tokens: int) -> int:
    """An encoded image: ``(n_image_tokens, n_embd)`` in f32."""
    return n_image_tokens * shape.n_embd * _F32


def _quantised_bytes(n_elements: int) -> int:
    """Activations as the kernels take them: q8_K at most; f16 weights would take twice that."""
    elements, n_bytes = _BLOCKS["q8_k"]
    return n_elements * n_bytes // elements


def _size(header: Header, key: str, default: int | None = None) -> int:
    value = header.get_int(key)
    if value is None:
        value = default
    if value is None or not 0 < value < 2**31:
        name = key.format(arch=header.architecture)
        raise GGUFError(
            f"{header.path.name}: no usable {name} ({value})", hint="convert the checkpoint again"
        )
    return value
