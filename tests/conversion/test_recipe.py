"""Which type each tensor gets."""

from __future__ import annotations

import pytest

from autoglm_gguf.conversion.recipe import Recipe, parse_outtype
from autoglm_gguf.native.ggml import GGMLType

pytestmark = pytest.mark.native  # block sizes are ggml's
UNIFORM = ("f32", "f16", "bf16", "q8_0", "q4_0")


@pytest.mark.parametrize(
    ("name", "ftype", "mmproj"),
    [
        ("f32", 0, "f32"),
        ("f16", 1, "f16"),
        ("bf16", 32, "bf16"),
        ("q8_0", 7, "q8_0"),
        ("q4_0", 2, "q8_0"),
    ],
)
def test_outtype_carries_llama_cpps_number_and_the_towers_type(
    name: str, ftype: int, mmproj: str
) -> None:
    for spelling in (name, name.upper()):
        outtype = parse_outtype(spelling)
        assert (outtype.name, outtype.ftype, outtype.mmproj) == (name, ftype, mmproj)


@pytest.mark.parametrize("name", ["q5_9", "", "q4", "int4"])
def test_outtype_is_refused_when_unknown(name: str) -> None:
    with pytest.raises(ValueError, match="unknown") as caught:
        parse_outtype(name)
    assert "f32, f16, bf16, q8_0" in str(caught.value)


@pytest.mark.parametrize("outtype", UNIFORM)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (4096,)),
        ("blk.0.attn_q.bias", (4096,)),
        ("v.patch_embd.bias", (1536,)),
        ("v.position_embd.weight", (576, 1536)),
    ],
)
def test_vectors_and_positions_stay_f32(outtype: str, name: str, shape: tuple[int, ...]) -> None:
    assert Recipe(parse_outtype(outtype)).choose(name, shape) == GGMLType.F32


@pytest.mark.parametrize(
    ("outtype", "kind"),
    [("f32", "F32"), ("f16", "F16"), ("bf16", "F32"), ("q8_0", "F32"), ("q4_0", "F32")],
)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v.patch_embd.weight", (1536, 3, 14, 14)),
        ("v.patch_embd.weight.1", (1536, 3, 14, 14)),
        ("mm.patch_merger.weight", (4096, 1536, 2, 2)),
    ],
)
def test_convolutions_are_f16_or_f32(
    outtype: str, kind: str, name: str, shape: tuple[int, ...]
) -> None:
    assert Recipe(parse_outtype(outtype)).choose(name, shape).name == kind


@pytest.mark.parametrize("outtype", UNIFORM)
def test_matrices_get_the_outtype(outtype: str) -> None:
    kind = Recipe(parse_outtype(outtype)).choose("blk.0.ffn_down.weight", (4096, 13696))
    assert kind.name.lower() == outtype


@pytest.mark.parametrize(("outtype", "kind"), [("q8_0", "F16"), ("q4_0", "F16"), ("bf16", "BF16")])
def test_rows_that_fill_no_block_fall_back_to_f16(outtype: str, kind: str) -> None:
    assert Recipe(parse_outtype(outtype)).choose("blk.0.ffn_down.weight", (64, 100)).name == kind
