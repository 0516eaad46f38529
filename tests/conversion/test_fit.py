"""The choice of types: which are allowed, what is taken, what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest

from autoglm_gguf import ConversionError, DoesNotFitError, Fit
from autoglm_gguf.checkpoint.safetensors import LazyTensor
from autoglm_gguf.conversion.backends import SLOW_ON_CPU
from autoglm_gguf.conversion.fit import Layout, candidate_types, check_limit, choose_mix
from autoglm_gguf.conversion.recipe import OUTTYPES, Recipe
from autoglm_gguf.conversion.rounding import RoundingError
from autoglm_gguf.conversion.tensors import OutTensor
from autoglm_gguf.native.ggml import GGMLType

pytestmark = pytest.mark.native  # block sizes are ggml's
F16 = OUTTYPES["f16"]
FIT = Fit(weights="1GB")
SHAPES = {
    "token_embd.weight": (512, 256),
    "blk.0.attn_norm.weight": (256,),
    "blk.0.attn_k.weight": (64, 256),
    "blk.0.attn_v.weight": (64, 256),
    "blk.0.ffn_up.weight": (1024, 256),
    "blk.0.ffn_down.weight": (256, 672),
    "output.weight": (512, 256),
}


def lay_out(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Layout:
    def plan(name: str, shape: tuple[int, ...]) -> OutTensor:
        values = np.zeros(shape, np.float32)
        source = LazyTensor(name, shape, GGMLType.F32, values)
        return OutTensor(name, shape, recipe.choose(name, shape), source, lambda: values)

    return Layout(672, tuple(plan(name, shape) for name, shape in shapes.items()))


def types(fit: Fit = FIT, *overrides: tuple[str, GGMLType]) -> dict[str, tuple[GGMLType, ...]]:
    recipe = Recipe(F16, tuple((re.compile(text), kind) for text, kind in overrides))
    return candidate_types(lay_out(recipe), recipe, fit)


class Room:
    """Lets through what takes no more than a number of bytes."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def size(self, layout: Layout, chosen: Mapping[str, GGMLType]) -> int:
        return sum(t.n_bytes_as(chosen[t.name]) for t in layout.tensors if t.name in chosen)

    def serves(self, layout: Layout, chosen: Mapping[str, GGMLType]) -> bool:
        return self.size(layout, chosen) <= self.n_bytes

    def refuse(self, layout: Layout, chosen: Mapping[str, GGMLType]) -> None:
        least = self.size(layout, chosen)
        raise DoesNotFitError("no", budget_bytes=self.n_bytes, required_bytes=least)


# --- Fit ---


@pytest.mark.parametrize(
    ("fit", "label"),
    [
        (Fit("4GB"), "FIT_4GB"),
        (Fit("3500MB"), "FIT_3500MB"),
        (Fit(weights="3.2MB"), "FIT_3200KB"),
        (Fit("4GiB"), "FIT_4294967296B"),
    ],
)
def test_fit_has_a_label_that_says_its_limit(fit: Fit, label: str) -> None:
    assert fit.label == label


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either the budget of the run or"),
        ({"budget": "4GB", "weights": "3GB"}, "either the budget of the run or"),
        ({"budget": "none"}, "no size"),
        ({"budget": "4 bananas"}, "4 bananas"),
        ({"weights": "none"}, "'none': not a size"),
        ({"weights": -1}, "no size"),
        ({"weights": 0}, "no size"),
        ({"weights": 10**30}, "more than any machine has"),
        ({"weights": "9" * 400}, "more than any machine has"),
        ({"budget": "4GB", "n_ctx": 0}, "n_ctx 0"),
        ({"budget": "4GB", "image_tokens": 3}, "max_image_tokens 3"),
        ({"budget": "4GB", "prefer": "beauty"}, "prefer 'beauty'"),
        ({"budget": "4GB", "backend": "abacus"}, "backend 'abacus'"),
    ],
)
def test_fit_refuses_what_is_no_limit(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fit(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"weights": 1e9}, {"weights": True}, {"budget": 1e9}])
def test_fit_refuses_sizes_that_are_no_whole_bytes(given: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="not a size"):
        Fit(**given)  # type: ignore[arg-type]


# --- candidates ---


def test_candidates_are_types_whose_blocks_fill_the_rows() -> None:
    found = types()
    assert "blk.0.attn_norm.weight" not in found
    assert {GGMLType.Q2_K, GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.F16} <= set(
        found["blk.0.ffn_up.weight"]
    )
    assert not {k for k in found["blk.0.ffn_down.weight"] if k.name.endswith(("_K", "_S", "_XS"))}


def test_candidates_of_k_and_v_have_six_bits_and_more() -> None:
    found = types()
    for name in ("blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        assert set(found[name]) == {GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16}


def test_candidates_need_no_imatrix_that_is_not_there() -> None:
    found = types()
    assert GGMLType.IQ3_XXS not in found["blk.0.ffn_up.weight"]
    assert GGMLType.IQ3_S in found["blk.0.ffn_up.weight"]


def test_speed_leaves_out_what_is_slow_on_cpus_but_for_rows_that_are_looked_up() -> None:
    found = types(Fit(weights="1GB", prefer="speed"))
    assert not SLOW_ON_CPU & set(found["blk.0.ffn_up.weight"])
    assert SLOW_ON_CPU & set(found["token_embd.weight"])


def test_types_that_a_backend_lacks_are_left_out() -> None:
    found = types(Fit(weights="1GB", backend="opencl"))
    assert GGMLType.Q2_K not in found["blk.0.ffn_up.weight"]
    assert GGMLType.Q2_K not in found["output.weight"]
    assert GGMLType.Q2_K in found["token_embd.weight"], "the CPU looks its rows up"


def test_exception_leaves_no_other_type() -> None:
    found = types(FIT, ("ffn_up", GGMLType.Q3_K))
    assert found["blk.0.ffn_up.weight"] == (GGMLType.Q3_K,)


def test_exception_that_the_backend_lacks_is_refused() -> None:
    with pytest.raises(ConversionError, match="opencl cannot multiply with Q3_K"):
        types(Fit(weights="1GB", backend="opencl"), ("ffn_up", GGMLType.Q3_K))


# --- choice ---

TWO = {"blk.0.ffn_up.weight": (512, 256), "blk.0.ffn_down.weight": (512, 256)}
KINDS = (GGMLType.Q2_K, GGMLType.Q4_0, GGMLType.Q8_0)
ERRORS = {
    GGMLType.Q2_K: RoundingError(0.09, 0.003, 10),
    GGMLType.Q4_0: RoundingError(0.007, 0.004, 10),
    GGMLType.Q8_0: RoundingError(0.00003, 0.0, 10),
}


def choose(sensitivities: dict[str, float], room: Room) -> tuple[list[GGMLType], float, float]:
    layout = lay_out(Recipe(F16), TWO)
    mix = choose_mix(
        [layout], [dict.fromkeys(TWO, KINDS)], dict.fromkeys(TWO, ERRORS), sensitivities, room
    )
    assert room.serves(layout, mix.types)
    return [mix.types[name] for name in TWO], mix.estimated_error, mix.sampling_error


def test_mix_gives_the_bytes_to_the_matrix_that_matters() -> None:
    up, down = TWO
    n_bytes = 512 * (144 + 84)  # one in q4_0, one in q2_K
    found, error, uncertain = choose({up: 3.0, down: 1.0}, Room(n_bytes))
    assert found == [GGMLType.Q4_0, GGMLType.Q2_K]
    assert error == pytest.approx(3 * 0.007 + 0.09)
    assert uncertain == pytest.approx(((3 * 0.004) ** 2 + 0.003**2) ** 0.5)
    found, *_ = choose({up: 1.0, down: 3.0}, Room(n_bytes + 100))
    assert found == [GGMLType.Q2_K, GGMLType.Q4_0]


def test_mix_takes_everything_where_there_is_room() -> None:
    found, *_ = choose(dict.fromkeys(TWO, 1.0), Room(10**9))
    assert found == [GGMLType.Q8_0, GGMLType.Q8_0]


def test_limit_under_the_smallest_mix_is_refused_with_what_would_do() -> None:
    layout, kinds = lay_out(Recipe(F16), TWO), dict.fromkeys(TWO, KINDS)
    check_limit([layout], [kinds], Room(2 * 512 * 84))
    with pytest.raises(DoesNotFitError) as refused:
        check_limit([layout], [kinds], Room(2 * 512 * 84 - 1))
    assert refused.value.required_bytes == 2 * 512 * 84


def test_mix_takes_the_layout_with_less_error() -> None:
    narrow, wide = (lay_out(Recipe(F16), TWO) for _ in range(2))
    only_large = dict.fromkeys(TWO, (GGMLType.Q8_0,))
    room = Room(512 * (144 + 84))
    mix = choose_mix(
        [narrow, wide],
        [only_large, dict.fromkeys(TWO, KINDS)],
        dict.fromkeys(TWO, ERRORS),
        dict.fromkeys(TWO, 1.0),
        room,
    )
    assert mix.layout is wide, "the other one does not fit at all"
