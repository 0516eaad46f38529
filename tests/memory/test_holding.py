"""What a choice costs: sums made by hand, and where layers go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders import describe_sizes

from autoglm_gguf import ContextParams
from autoglm_gguf.memory.holding import Choice, Holding, Item, Places, sum_phases

MB = 10**6
FLOOR = 70 * MB
UNBOUNDED = 2**62


def choose(weights: Any = "mapped", **changed: Any) -> Choice:
    params = ContextParams(n_ctx=4096, n_batch=512)
    return replace(Choice(params, weights, tower_on_demand=False, gives_way=False), **changed)


def hold(**sizes: Any) -> Holding:
    return Holding(describe_sizes(**sizes), FLOOR)


def by_name(items: tuple[Item, ...]) -> dict[str, tuple[int, int, int]]:
    return {item.name: (item.load_bytes, item.encode_bytes, item.decode_bytes) for item in items}


# 4096 cells, 8 layers, K and V of 2 heads of 64 in f16
KV_CACHE = 4096 * 8 * 2 * 2 * 64 * 2
# 512 tokens: three of 1536 and 8 more and four rows of 512 in f32, the f16 mask, q8_K work
GRAPH = 512 * 4 * (3 * 1536 + 8 + 4 * 512) + 512 * 4096 * 2 + 512 * 1536 * 292 // 256
COMPUTE = GRAPH + 8 * 1000 * 4  # logits of a sampled token and seven guessed ones
IMAGE = 3188 * 512 * 4  # 5,000,000 pixels of two frames, 28 x 28 each: 3188 tokens of 512 in f32


@pytest.mark.parametrize(("n_draft_max", "n_outputs"), [(0, 1), (3, 4), (63, 64)])
def test_logits_are_held_of_each_guessed_token(n_draft_max: int, n_outputs: int) -> None:
    params = ContextParams(n_ctx=4096, n_batch=512, n_draft_max=n_draft_max)
    items = by_name(hold().items(choose(params=params), UNBOUNDED))
    assert items["compute"][2] == GRAPH + n_outputs * 1000 * 4


def test_items_of_a_mapped_model_are_the_sums_made_by_hand() -> None:
    items = by_name(hold().items(choose(), UNBOUNDED))
    assert items["process"] == (FLOOR,) * 3
    assert items["loading"] == (1000 * 115, 0, 0)
    assert items["kv_cache"] == (0, KV_CACHE, KV_CACHE)
    assert items["compute"] == (0, COMPUTE, COMPUTE)
    assert items["weights"] == (88 * MB,) * 3
    assert items["tower"] == (0, 40 * MB, 40 * MB)
    assert items["image"] == (0, 1080 * 2400 * 8 + 2 * IMAGE, 1080 * 2400 * 8 + IMAGE)
    assert items["encode"][0] == 0
    assert items["encode"][1] == items["encode"][2] > 3188 * 4 * 4 * 3 * (256 + 512)


def test_tower_on_demand_is_gone_while_tokens_are_made() -> None:
    items = by_name(hold().items(choose(tower_on_demand=True), UNBOUNDED))
    assert items["tower"] == (0, 40 * MB, 0)
    assert items["encode"][2] == 0


def test_phases_are_the_sums_of_the_items() -> None:
    holding = hold()
    phases = holding.phases(choose(), UNBOUNDED)
    assert phases == sum_phases(holding.items(choose(), UNBOUNDED))
    assert phases["load"] == sum(item.load_bytes for item in holding.items(choose(), UNBOUNDED))
    assert holding.peak(choose(), UNBOUNDED) == max(phases.values()) == phases["encode"]


def test_text_model_has_no_encode() -> None:
    assert set(hold(tower_bytes=0).phases(choose(), UNBOUNDED)) == {"load", "decode"}


def test_repacked_weights_take_no_more_at_load() -> None:
    """The buffer for the largest tensor is gone before the last ones come: 381 MB were measured
    where 379 are planned so, and 417 would be with the buffer on top (docs/benchmarks/memory.md).
    """
    items = by_name(hold(output_bytes=6 * MB).items(choose("repacked"), UNBOUNDED))
    assert items["weights"] == (90 * MB, 90 * MB, 90 * MB)


def test_floor_is_what_the_process_holds_already() -> None:
    held = Holding(describe_sizes(), 500 * MB).phases(choose(), UNBOUNDED)
    without = hold().phases(choose(), UNBOUNDED)
    assert {held[phase] - without[phase] for phase in held} == {430 * MB}


# --- images ---


@pytest.mark.parametrize(
    ("max_pixels", "context", "most"),
    [
        (5_000_000, {}, 3188),
        (5_000_000, {"max_image_tokens": 1000}, 1000),
        (5_000_000, {"max_image_tokens": 9000}, 3188),
        (5_000_000, {"n_ctx": 2048}, 2048),  # a larger one is refused before it is encoded
        (47_040_000, {"n_ctx": 65536}, 30_000),
    ],
)
def test_largest_image(max_pixels: int, context: dict[str, int], most: int) -> None:
    assert hold(max_pixels=max_pixels).image_tokens(ContextParams(**context)) == most


def test_text_model_takes_no_image() -> None:
    assert hold(tower_bytes=0).image_tokens(ContextParams()) == 0


# --- which layers lie where ---


def test_no_layer_gives_way_where_there_is_room() -> None:
    giving = choose(gives_way=True, tower_on_demand=True)
    assert hold().places(giving, UNBOUNDED) == Places()
    assert hold().places(choose(), 0) == Places()


@pytest.mark.parametrize(
    ("short_by", "n_yielding"), [(0, 0), (1, 1), (10 * MB, 1), (10 * MB + 1, 2), (500 * MB, 8)]
)
def test_last_layers_give_way_as_far_as_it_takes(short_by: int, n_yielding: int) -> None:
    holding, choice = hold(), choose(gives_way=True, tower_on_demand=True)
    whole = holding.phases(choice, UNBOUNDED)["encode"]
    yielding = holding.places(choice, whole - short_by).yielding
    assert yielding == tuple(range(8 - n_yielding, 8))
    left = holding.phases(choice, whole - short_by)["encode"]
    assert left == whole - n_yielding * 10 * MB


def test_streamed_layers_are_spread_and_every_layer_has_one_place() -> None:
    holding = hold(layer_bytes=(100 * MB,) * 20)
    choice = choose("streamed", tower_on_demand=True, gives_way=True)
    for usable in range(500 * MB, 2500 * MB, 50 * MB):
        places = holding.places(choice, usable)
        together = sorted((*places.copied, *places.streamed, *places.yielding))
        assert together == list(range(20)), usable
        gaps = [b - a for a, b in zip(places.streamed, places.streamed[1:], strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1, usable


def test_streaming_keeps_what_fits_and_stays_below() -> None:
    holding = hold(layer_bytes=(100 * MB,) * 20)
    choice = choose("streamed", tower_on_demand=True, gives_way=True)
    base = FLOOR + KV_CACHE * 20 // 8 + COMPUTE + 1000 * 130 + 1080 * 2400 * 8 + IMAGE
    base += 4 * MB + 1000 * 200  # the output; sampling
    # One layer is in use, another is read meanwhile.
    for n_kept in (0, 1, 7, 16):
        usable = base + (n_kept + 2) * 100 * MB
        places = holding.places(choice, usable)
        assert len(places.copied) + len(places.yielding) == n_kept
        assert holding.phases(choice, usable)["decode"] == usable
        less = holding.places(choice, usable - 1)
        assert len(less.copied) + len(less.yielding) == max(0, n_kept - 1)


def test_copied_layers_leave_room_for_the_load_and_for_an_image() -> None:
    holding = hold(layer_bytes=(100 * MB,) * 20)
    choice = choose("streamed", tower_on_demand=True, gives_way=True)
    for usable in range(700 * MB, 2500 * MB, 50 * MB):
        phases = holding.phases(choice, usable)
        assert max(phases.values()) <= usable
        assert phases["encode"] > usable - 100 * MB or not holding.places(choice, usable).yielding


def test_tied_embeddings_stay_as_the_output_does() -> None:
    """They are read for every token; an untied embedding is only looked up."""
    choice = choose("streamed", tower_on_demand=True, gives_way=True)
    untied = by_name(hold(token_embd_bytes=9 * MB, output_bytes=4 * MB).items(choice, 0))
    tied = by_name(hold(token_embd_bytes=9 * MB, output_bytes=0).items(choice, 0))
    assert untied["weights"][1] == 4 * MB
    assert tied["weights"][1] == 9 * MB


def test_streamed_load_touches_one_tensor_beside_what_stays() -> None:
    choice = choose("streamed", tower_on_demand=True, gives_way=True)
    assert by_name(hold().items(choice, 0))["weights"][0] == 4 * MB + 10 * MB
    wide = hold(output_bytes=30 * MB).items(choice, 0)
    assert by_name(wide)["weights"][0] == 30 * MB + 30 * MB


@pytest.mark.parametrize(
    ("weights", "changed", "places", "expected_mb"),
    [
        ("repacked", {}, Places(), 0),
        ("repacked", {"tower_on_demand": True}, Places(), 40),
        ("mapped", {}, Places(), 88),
        ("mapped", {"tower_on_demand": True}, Places(yielding=(7,)), 88 + 40),
        # Two layers and the output are copied.
        ("streamed", {"tower_on_demand": True}, Places((0, 1), (2, 3)), 88 - 20 - 4 + 40),
    ],
)
def test_what_is_read_from_files_again_and_again(
    weights: str, changed: dict[str, Any], places: Places, expected_mb: int
) -> None:
    assert hold().cached_bytes(choose(weights, **changed), places) == expected_mb * MB


def test_text_model_reads_no_tower_again() -> None:
    assert hold(tower_bytes=0).cached_bytes(choose(tower_on_demand=True), Places()) == 88 * MB


# --- kernels ---


def test_f16_weights_are_not_repacked() -> None:
    assert not hold(ggml_type=1).repacks


@pytest.mark.native
def test_repacking_is_decided_by_the_bulk_of_the_layers() -> None:
    from autoglm_gguf.native.ggml import GGMLType, can_repack, repack_buffer_type

    if repack_buffer_type() is None or not can_repack(GGMLType.Q4_0, 1024, 1024):
        pytest.skip("this CPU has no q4_0 kernels in another order")
    assert hold(ggml_type=GGMLType.Q4_0).repacks
    described = describe_sizes(ggml_type=GGMLType.Q4_0)
    for n in range(5):
        name = f"blk.{n}.ffn_up.weight"
        described.text.tensors[name] = replace(described.text.tensors[name], ggml_type=1)
    assert not Holding(described, FLOOR).repacks
