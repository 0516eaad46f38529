"""Which type each tensor gets."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autoglm_gguf.conversion.imatrix import Imatrix
from autoglm_gguf.conversion.recipe import Recipe, padded_width, parse_outtype, parse_overrides
from autoglm_gguf.errors import ConversionError
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


@pytest.mark.parametrize(
    ("outtype", "kind"),
    [
        ("iq3_s", "IQ4_NL"),
        ("iq4_xs", "IQ4_NL"),
        ("q2_K", "Q4_0"),
        ("q3_K", "Q4_0"),
        ("q4_K", "Q5_0"),
        ("q5_K", "Q5_1"),
        ("q6_K", "Q8_0"),
    ],
)
def test_rows_that_fill_no_large_block_get_a_type_of_small_ones(outtype: str, kind: str) -> None:
    """As llama-quant.cpp's tensor_type_fallback has it; 13696 is 53.5 blocks of 256."""
    recipe = Recipe(parse_outtype(outtype))
    assert recipe.choose("blk.0.ffn_down.weight", (4096, 13696)).name == kind
    assert recipe.choose("blk.0.ffn_down.weight", (4096, 13824)).name == outtype.upper()
    assert recipe.choose("blk.0.ffn_down.weight", (4096, 100)).name == "F16"


@pytest.mark.parametrize(
    ("outtype", "shape", "kind"),
    [
        ("q8_0", (64, 3, 64), "Q8_0"),
        ("q4_K", (64, 256, 96), "Q5_0"),
        ("q4_K", (64, 64, 100), "F16"),
    ],
)
def test_rows_are_the_last_of_several_dimensions(
    outtype: str, shape: tuple[int, ...], kind: str
) -> None:
    assert Recipe(parse_outtype(outtype)).choose("blk.0.x.weight", shape).name == kind


def test_norm_stays_f32_whatever_its_shape() -> None:
    assert Recipe(parse_outtype("q8_0")).choose("blk.0.attn_norm.weight", (2, 64)).name == "F32"


def test_iq3_xxs_needs_an_imatrix_of_this_very_tensor() -> None:
    up, down = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
    bare = Recipe(parse_outtype("iq3_xxs"))
    with pytest.raises(ConversionError, match=rf"{up}: IQ3_XXS needs an importance matrix") as told:
        bare.choose(up, (512, 256))
    assert "--imatrix" in told.value.hint
    columns = {up: np.ones(256, np.float32)}
    weighed = replace(bare, imatrix=Imatrix(Path("x.gguf"), columns))
    assert weighed.choose(up, (512, 256)) == GGMLType.IQ3_XXS
    assert weighed.lacks_imatrix(down, GGMLType.IQ3_XXS)
    assert not weighed.lacks_imatrix(down, GGMLType.IQ3_S)
    for rows in ("token_embd.weight", "output.weight"):
        assert bare.choose(rows, (512, 256)) == GGMLType.IQ3_XXS, "llama.cpp asks for none there"
    assert bare.choose(up, (512, 96)) == GGMLType.IQ4_NL, "nor for what it falls back to"


def test_single_tensors_come_before_exceptions_and_these_before_the_outtype() -> None:
    exceptions = parse_overrides(["attn_[qk]=q8_0", "attn=q5_0"])
    chosen = {"blk.0.attn_q.weight": GGMLType.F16}
    recipe = Recipe(parse_outtype("q4_0"), exceptions, chosen=chosen)
    found = {
        name: recipe.choose(f"blk.{name}.weight", (64, 64)).name
        for name in ("0.attn_q", "1.attn_q", "0.attn_v", "0.ffn_up")
    }
    expected = {"0.attn_q": "F16", "1.attn_q": "Q8_0", "0.attn_v": "Q5_0", "0.ffn_up": "Q4_0"}
    assert found == expected


def test_exception_may_hold_an_equals_sign() -> None:
    ((pattern, kind),) = parse_overrides(["a=b=Q8_0"])
    assert (pattern.pattern, kind) == ("a=b", GGMLType.Q8_0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("attn_v", "write REGEX=TYPE, for example attn_v=q8_0"),
        ("=q8_0", "write REGEX=TYPE, for example attn_v=q8_0"),
        ("(=q8_0", "not a pattern"),
    ],
)
def test_exception_is_refused_when_it_is_none(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"tensor type '{re.escape(text)}': {why}"):
        parse_overrides([text])


def test_exception_to_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="outtype 'q9': unknown"):
        parse_overrides(["attn_v=q9"])


def test_tower_takes_the_types_that_libmtmd_was_seen_to_run() -> None:
    for name in ("f32", "f16", "bf16", "q8_0", "q4_0"):
        assert parse_outtype(name, mmproj=True).name == name
    with pytest.raises(ValueError, match="mmproj outtype 'Q4_K': not for the vision tower") as told:
        parse_outtype("Q4_K", mmproj=True)
    assert "one of f32, f16, bf16, q8_0, q4_0" in str(told.value)


@pytest.mark.parametrize(
    ("outtype", "exceptions", "width", "padded"),
    [
        ("q4_K", [], 13696, 13824),
        ("q4_K", [], 13824, 13824),
        ("q4_K", [], 1, 256),
        ("q8_0", [], 13696, 13696),
        ("q8_0", ["blk.1.ffn_down=q3_K"], 13696, 13824),
        ("q8_0", ["blk.2.ffn_down=q3_K"], 13696, 13696),  # there is no third layer
        ("q8_0", ["ffn_up=q3_K"], 13696, 13696),  # its rows are not as long
    ],
)
def test_padded_width_follows_ffn_down(
    outtype: str, exceptions: list[str], width: int, padded: int
) -> None:
    recipe = Recipe(parse_outtype(outtype), parse_overrides(exceptions))
    assert padded_width(recipe, width, n_layers=2) == padded
