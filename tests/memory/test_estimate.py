"""Bytes from headers: against sums made by hand, llama.cpp's own figures, measured processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import Shape, build_sparse_checkpoint, describe_sizes

from autoglm_gguf import ContextParams, GGUFError, convert, read_header
from autoglm_gguf.config import CacheType
from autoglm_gguf.memory import estimate
from autoglm_gguf.memory.estimate import TextShape, TowerShape
from autoglm_gguf.native.library import buffer_report, load_llama
from autoglm_gguf.native.llama import LlamaContext, LlamaModel

MIB = 2**20
PUBLISHED = TextShape(
    n_layers=40,
    n_embd=4096,
    n_ff=13696,
    n_heads=32,
    n_heads_kv=2,
    head_dim=128,
    n_vocab=151_552,
    n_merges=318_088,
    layer_bytes=(115_000_000,) * 40,
    token_embd_bytes=349_000_000,
    output_bytes=349_000_000,
    other_bytes=16_384,
    norm_bytes=16_384,
)
PUBLISHED_TOWER = TowerShape(
    weights_bytes=1_030_000_000,
    hidden=1536,
    n_ff=4096,
    merger_width=13696,
    n_embd=4096,
    patch_size=14,
    merge_size=2,
)


# --- shapes ---


def test_text_shape_adds_the_tensors_up() -> None:
    described = describe_sizes(layer_bytes=(10, 20, 30), token_embd_bytes=4, output_bytes=5)
    shape = estimate.text_shape(described.text)
    assert shape.layer_bytes == (10, 20, 30)
    assert (shape.token_embd_bytes, shape.output_bytes, shape.other_bytes) == (4, 5, 0)
    assert shape.weights_bytes == described.text.weights_bytes == 69
    assert (shape.n_layers, shape.n_heads, shape.n_heads_kv, shape.head_dim) == (3, 8, 2, 64)
    assert (shape.n_embd, shape.n_ff) == (512, 1536)
    assert (shape.n_vocab, shape.n_merges) == (1000, 0)


def test_text_shape_counts_what_belongs_to_no_layer() -> None:
    header = describe_sizes(layer_bytes=(10, 20), token_embd_bytes=4, output_bytes=5).text
    norm = replace(header.tensors["output.weight"], name="output_norm.weight", n_bytes=7)
    beyond = replace(norm, name="blk.2.ffn_up.weight", n_bytes=9)
    odd = {norm.name: norm, beyond.name: beyond}
    shape = estimate.text_shape(replace(header, tensors=header.tensors | odd))
    assert shape.layer_bytes == (10, 20)
    assert shape.other_bytes == 7 + 9  # a layer beyond the last is no layer
    assert shape.norm_bytes == 7


def test_text_shape_adds_up_a_layers_tensors() -> None:
    header = describe_sizes(layer_bytes=(10, 20)).text
    down = replace(header.tensors["blk.1.ffn_up.weight"], name="blk.1.ffn_down.weight")
    shape = estimate.text_shape(replace(header, tensors=header.tensors | {down.name: down}))
    assert shape.layer_bytes == (10, 20 + 20)


def test_text_shape_takes_the_heads_from_what_is_there() -> None:
    header = describe_sizes(n_embd=512, n_heads=8).text
    lacking = {
        key: value
        for key, value in header.metadata.items()
        if not key.endswith(("head_count_kv", "key_length"))
    }
    shape = estimate.text_shape(replace(header, metadata=lacking))
    assert (shape.n_heads_kv, shape.head_dim) == (8, 64)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("feed_forward_length", value) for value in (None, 0, -1, 2**40, "many")),
        ("attention.head_count_kv", -2),
        ("attention.key_length", 2**40),
    ],
)
def test_text_shape_refuses_a_size_that_is_missing_or_absurd(key: str, value: Any) -> None:
    header = describe_sizes().text
    broken = replace(header, metadata=header.metadata | {f"glm4.{key}": value})
    with pytest.raises(GGUFError, match=rf"sized\.gguf: no usable glm4\.{key}") as told:
        estimate.text_shape(broken)
    assert told.value.hint


def test_text_shape_refuses_more_layers_than_tensors() -> None:
    header = describe_sizes(layer_bytes=(10, 20)).text
    broken = replace(header, metadata=header.metadata | {"glm4.block_count": 2**31 - 1})
    with pytest.raises(GGUFError, match="2147483647 layers, but 4 tensors"):
        estimate.text_shape(broken)


def test_tower_shape_reads_the_mmproj() -> None:
    header = describe_sizes(tower_bytes=123).mmproj
    assert header is not None
    shape = estimate.tower_shape(header)
    assert (shape.weights_bytes, shape.hidden, shape.n_ff, shape.n_embd) == (123, 256, 512, 512)
    assert (shape.patch_size, shape.merge_size, shape.merger_width) == (14, 2, 1024)
    lacking = replace(header, tensors={})
    assert estimate.tower_shape(lacking).merger_width == 0


def test_layer_span_is_where_its_tensors_lie() -> None:
    header = describe_sizes(layer_bytes=(10, 20, 30)).text
    assert [estimate.layer_span(header, n) for n in range(3)] == [(0, 10), (10, 30), (30, 60)]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blk.0.ffn_up.weight", 0),
        ("blk.39.attn_q.bias", 39),
        ("output.weight", None),
        ("blk.", None),
    ],
)
def test_layer_of_reads_the_name(name: str, layer: int | None) -> None:
    assert estimate.layer_of(name) == layer


def test_layers_lie_together_when_no_other_tensor_is_between() -> None:
    header = describe_sizes(layer_bytes=(10_000, 10_000)).text
    assert estimate.layers_lie_together(header)
    first = header.tensors["blk.0.ffn_up.weight"]
    for n_between, together in ((4096, True), (2 * 4096 + 1, False)):
        offset = first.offset + first.n_bytes + n_between
        far = replace(first, name="blk.0.ffn_down.weight", offset=offset)
        apart = replace(header, tensors=header.tensors | {far.name: far})
        assert estimate.layers_lie_together(apart) is together, n_between


# --- the KV cache ---


@pytest.mark.parametrize(
    ("n_ctx", "kind", "n_bytes"),
    [
        (8192, "f16", 320 * MIB),
        (8192, "q8_0", 170 * MIB),
        (8192, "q4_0", 90 * MIB),  # 18 bytes for 32 values
        (8192, "f32", 640 * MIB),
        (4096, "bf16", 160 * MIB),
        (1, "f16", 10 * MIB),  # 256 cells
        (257, "f16", 20 * MIB),
    ],
)
def test_kv_cache_of_the_published_shape(n_ctx: int, kind: CacheType, n_bytes: int) -> None:
    assert estimate.kv_cache_bytes(PUBLISHED, n_ctx, kind, kind) == n_bytes


def test_kv_cache_adds_two_types() -> None:
    assert estimate.kv_cache_bytes(PUBLISHED, 8192, "f16", "q8_0") == (160 + 85) * MIB


@pytest.mark.parametrize(
    ("head_dim", "kind", "fits"),
    [(128, "q8_0", True), (16, "q8_0", False), (48, "q4_0", False), (16, "f16", True)],
)
def test_cache_type_fits_whole_heads_only(head_dim: int, kind: CacheType, fits: bool) -> None:
    assert estimate.cache_type_fits(replace(PUBLISHED, head_dim=head_dim), kind) is fits


# --- graphs ---


@pytest.mark.parametrize(
    ("n_batch", "n_outputs", "mib"), [(512, 512, 312), (512, 1, 117), (256, 1, 55), (128, 1, 27)]
)
def test_graph_of_the_published_shape(n_batch: int, n_outputs: int, mib: int) -> None:
    """As llama.cpp reserved it for the published model with 4096 cells."""
    params = ContextParams(n_ctx=4096, n_batch=n_batch)
    found = estimate.graph_bytes(PUBLISHED, params, n_outputs=n_outputs)
    assert found == pytest.approx(mib * MIB, rel=0.1)


def test_graph_is_its_largest_moment_and_the_mask() -> None:
    """The sums in `graph_bytes`' words; that llama.cpp reserves them is tested below."""
    base = ContextParams(n_ctx=4096)
    row, mask = 512 * 4 * 4096, 512 * 4096 * 2
    feed_forward = 512 * 4 * (3 * 13696 + 8)

    def graph(n_outputs: int = 1, **changed: Any) -> int:
        params = replace(base, **changed)
        return estimate.graph_bytes(PUBLISHED, params, n_outputs=n_outputs)

    assert graph() == feed_forward + 4 * row + mask
    assert graph(type_k="q8_0") == graph()
    assert graph(type_k="q8_0", type_v="q8_0") == feed_forward + 3 * row + mask
    copied = 4096 * 2 * 128 * 2  # a cache's values in f16
    assert graph(type_k="f32") == graph() + copied
    assert graph(type_k="f32", type_v="f32") == graph() + 2 * copied
    assert graph(512) == 512 * 4 * (151_552 + 2 * 4096) + mask
    scores = 512 * 4 * (32 * 4096 + 2 * 2 * 128)
    assert graph(flash_attn=False) == scores + 5 * row + 2 * mask
    small = replace(PUBLISHED, n_ff=64)
    long = replace(base, n_ctx=2**17, type_k="f32", type_v="f32")
    attention = 2 * 2**17 * 2 * 128 * 2 + 5 * row
    assert estimate.graph_bytes(small, long) == attention + 512 * 2**17 * 2
    assert estimate.graph_bytes(PUBLISHED, replace(base, n_ctx=256)) == graph(
        n_ctx=256, n_batch=256
    )


def test_graph_on_a_device_lacks_the_rows_that_lie_on_the_cpu() -> None:
    params = ContextParams(n_ctx=4096, n_gpu_layers=41)
    row, whole = 512 * 4 * 4096, estimate.graph_bytes(PUBLISHED, params)
    found = estimate.device_graph_bytes
    assert found(PUBLISHED, params) == whole - 2 * row
    away = replace(params, offload_kqv=False)
    assert found(PUBLISHED, away) == estimate.graph_bytes(PUBLISHED, away)
    small = replace(params, type_k="q8_0", type_v="q8_0")
    assert found(PUBLISHED, small) == estimate.graph_bytes(PUBLISHED, small) - row
    short = replace(params, n_ctx=256)
    assert found(PUBLISHED, short) == estimate.graph_bytes(PUBLISHED, short) - row, "256 cells"
    many = found(PUBLISHED, params, n_outputs=512)
    assert many == estimate.graph_bytes(PUBLISHED, params, n_outputs=512) - 2 * row


def test_graph_on_a_device_with_the_output_alone_holds_the_logits() -> None:
    params = ContextParams(n_ctx=4096, n_gpu_layers=1)
    assert estimate.device_graph_bytes(PUBLISHED, params) == 4 * (151_552 + 4096)
    assert estimate.device_graph_bytes(PUBLISHED, params, n_outputs=8) == 32 * (151_552 + 4096)


def test_inputs_are_embeddings_the_mask_and_indices() -> None:
    embeddings, indices = 2 * 4096 * 4, 32
    params = ContextParams(n_ctx=4000)  # 4096 cells
    mask = 4096 * 2
    assert estimate.input_bytes(PUBLISHED, params) == 512 * (embeddings + indices + mask)
    slow = ContextParams(n_ctx=256, flash_attn=False)
    assert estimate.input_bytes(PUBLISHED, slow) == 256 * (embeddings + indices + 256 * 4)


# --- what llama.cpp itself says ---

SHAPES = {
    "small": Shape(
        hidden_size=512,
        n_heads=8,
        head_dim=64,
        intermediate_size=1536,
        mrope_section=(4, 6, 6),
        n_vocab=4096,
    ),
    "published, a quarter as wide": Shape(
        hidden_size=1024,
        n_heads=8,
        head_dim=128,
        intermediate_size=3424,
        mrope_section=(8, 12, 12),
        n_vocab=16384,
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def text_gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("shape")
    checkpoint = build_sparse_checkpoint(base / "c", SHAPES[request.param])
    return convert(checkpoint, base / "out", "q8_0").text


@pytest.mark.native
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "bf16", "f32"])
@pytest.mark.parametrize("n_ctx", [1024, 4096, 16384])
def test_graph_is_what_llama_cpp_reserves(text_gguf: Path, n_ctx: int, kind: CacheType) -> None:
    for n_batch in (128, 512, 1024):
        params = ContextParams(n_ctx=n_ctx, n_batch=n_batch, type_k=kind, type_v=kind)
        assert_near_dry_run(text_gguf, params)


@pytest.mark.native
@pytest.mark.parametrize("n_ctx", [1024, 4096])
def test_graph_is_what_llama_cpp_reserves_without_flash_attention(
    text_gguf: Path, n_ctx: int
) -> None:
    assert_near_dry_run(text_gguf, ContextParams(n_ctx=n_ctx, flash_attn=False))
    assert_near_dry_run(text_gguf, ContextParams(n_ctx=n_ctx, n_batch=64, flash_attn=False))


@pytest.mark.native
def test_graph_is_what_llama_cpp_reserves_for_many_outputs(text_gguf: Path) -> None:
    params = ContextParams(n_ctx=1024, n_batch=512)
    assert_near_dry_run(text_gguf, params, n_outputs=512)


def assert_near_dry_run(path: Path, params: ContextParams, *, n_outputs: int = 1) -> None:
    """llama.cpp plans its graphs without memory behind them, and tells how much they would take."""
    llama = load_llama()
    model = llama.llama_model_default_params()
    model.no_alloc, model.load_mode = True, llama.LLAMA_LOAD_MODE_NONE
    model.use_extra_bufts = False
    handle = llama.llama_model_load_from_file(str(path).encode(), model)
    raw = llama.llama_context_default_params()
    raw.n_ctx, raw.n_batch, raw.n_ubatch = params.n_ctx, params.n_batch, params.n_batch
    raw.n_seq_max, raw.n_outputs_max = 1, n_outputs
    raw.flash_attn_type = int(params.flash_attn)
    kinds = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
    raw.type_k, raw.type_v = kinds[params.type_k], kinds[params.type_v]
    with buffer_report() as report:
        context = llama.llama_init_from_model(handle, raw)
    llama.llama_free(context)
    llama.llama_model_free(handle)
    reserved = report["CPU", "compute"]
    shape = estimate.text_shape(read_header(path))
    estimated = estimate.graph_bytes(shape, params, n_outputs=n_outputs)
    # f32 caches, which only comparisons use, are counted generously: see `graph_bytes`.
    most = 1.05 if params.type_k != "f32" else 1.17
    assert 0.97 * reserved <= estimated <= most * reserved, (params, estimated, reserved)


@pytest.mark.native
@pytest.mark.parametrize(("n_ctx", "kind"), [(512, "f16"), (700, "q8_0"), (512, "f32")])
def test_kv_cache_is_what_llama_cpp_allocates(text_gguf: Path, n_ctx: int, kind: CacheType) -> None:
    params = ContextParams(n_ctx=n_ctx, type_k=kind, type_v=kind)
    model = LlamaModel(text_gguf)
    with buffer_report() as report:
        LlamaContext(model, params, n_threads=1).close()
    model.close()
    shape = estimate.text_shape(read_header(text_gguf))
    expected = estimate.kv_cache_bytes(shape, n_ctx, kind, kind)
    assert report["CPU", "KV"] == pytest.approx(expected, abs=0.01 * MIB)
    assert report["CPU", "output"] == pytest.approx(estimate.output_bytes(shape), abs=0.01 * MIB)


# --- the vision tower ---


@pytest.mark.parametrize(
    ("n_image_tokens", "measured"),
    [(392, 162_600_000), (756, 261_600_000), (1620, 511_000_000), (3108, 908_000_000)],
)
def test_encode_scratch_is_near_what_was_measured(n_image_tokens: int, measured: int) -> None:
    """Peaks of the published tower's widths with two blocks (it keeps nothing per block), Linux:
    highest resident set during the encode, less the weights and two copies of the embeddings."""
    estimated = estimate.encode_bytes(PUBLISHED_TOWER, n_image_tokens)
    assert 0.97 * measured <= estimated <= 1.05 * measured


def test_encode_scratch_is_blocks_or_merger_and_what_lies_beside() -> None:
    patches, libmtmd = 4 * 3108, 4_400_000
    beside = patches * 4096 * 292 // 256 + 3 * patches * 14 * 14 * 3 + libmtmd
    found = estimate.encode_bytes
    assert found(PUBLISHED_TOWER, 3108) == patches * 4 * 3 * (4096 + 1536) + beside
    thin = replace(PUBLISHED_TOWER, hidden=28, n_ff=28)
    for merge, patches in ((2, 400), (4, 1600)):
        kernel = 28 * merge * merge * 4096 * 2
        beside = kernel + 3 * patches * 14 * 14 * 3 + libmtmd
        merger = 100 * 4 * (3 * 13696 + 2 * 4096)
        assert found(replace(thin, merge_size=merge), 100) == merger + beside


def test_embeddings_of_a_screenshot() -> None:
    assert estimate.embedding_bytes(PUBLISHED_TOWER, 3108) == 3108 * 4096 * 4


# --- the rest ---


def test_work_space_holds_a_batch_of_the_widest_activations() -> None:
    # 292 bytes for 256 values
    assert estimate.work_bytes(PUBLISHED, ContextParams(n_ctx=4096)) == 512 * 13696 * 292 // 256
    assert estimate.work_bytes(PUBLISHED, ContextParams(n_ctx=256)) == 256 * 13696 * 292 // 256
    assert isinstance(estimate.work_bytes(PUBLISHED, ContextParams()), int)


def test_logits_are_one_row_of_f32() -> None:
    assert estimate.output_bytes(PUBLISHED) == 151_552 * 4
    assert estimate.output_bytes(PUBLISHED, 16) == 16 * 151_552 * 4


def test_vocabulary_of_the_published_model_takes_what_was_measured() -> None:
    """151,552 tokens at 130 bytes and 318,088 merges at 110; while it loads, 115 bytes each."""
    assert estimate.vocabulary_bytes(PUBLISHED) == 54_691_440
    assert estimate.loading_bytes(PUBLISHED) == 54_008_600
    assert estimate.sampling_bytes(PUBLISHED) == 30_310_400
