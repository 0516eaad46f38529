"""Parameter sets refuse what cannot be meant."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from autoglm_gguf import ContextParams, SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_ctx": 8},
        {"n_ctx": 2**20, "n_batch": 16384, "n_threads": 512},
        {"n_gpu_layers": -1},
        {"type_k": "q8_0", "type_v": "q4_0"},
        {"type_k": "q8_0", "type_v": "f16", "flash_attn": False},
        {"max_image_tokens": 16},
    ],
)
def test_context_params_take_the_whole_range(options: dict[str, Any]) -> None:
    params = ContextParams(**options)
    assert all(getattr(params, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 7},
        {"n_ctx": -1},
        {"n_ctx": 2**20 + 1},
        {"n_gpu_layers": -2},
        {"n_gpu_layers": 10**9},
        {"n_threads": 0},
        {"n_threads": 513},
        {"n_batch": 0},
        {"n_batch": 16385},
        {"type_k": "q3_K"},
        {"type_v": "F16"},
        {"type_v": "q8_0", "flash_attn": False},
        {"max_image_tokens": 15},
        {"max_image_tokens": -1},
    ],
)
def test_context_params_name_the_value_out_of_range(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=name) as caught:
        ContextParams(**options)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 1},
        {"temperature": 0.0, "top_p": 0.0, "min_p": 1.0, "top_k": 0},
        {"temperature": 100.0, "frequency_penalty": -2.0, "presence_penalty": 2.0},
        {"seed": 0},
        {"seed": 2**32 - 2},
        {"stop": ("a", "b")},
        {"logprobs": True, "top_logprobs": 20},
    ],
)
def test_sampling_params_take_the_whole_range(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    assert all(getattr(params, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"temperature": -0.1},
        {"temperature": NAN},
        {"temperature": INF},
        {"top_p": 1.1},
        {"top_p": NAN},
        {"min_p": -0.1},
        {"top_k": -1},
        {"frequency_penalty": 2.1},
        {"presence_penalty": -2.1},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": NAN},
        {"seed": -1},
        {"seed": 2**32 - 1},
        {"top_logprobs": 1},
        {"top_logprobs": -1, "logprobs": True},
        {"top_logprobs": 21, "logprobs": True},
    ],
)
def test_sampling_params_name_the_value_out_of_range(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**options)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("stop", ["text", ("",), ("a", ""), (1,), (None,)])
def test_sampling_params_refuse_stops_that_are_no_strings(stop: Any) -> None:
    with pytest.raises(ValueError, match="stop"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("apps", [("",), ("x" * 101,), (1,), "abc"])
def test_sampling_params_refuse_apps_that_no_phone_has(apps: Any) -> None:
    with pytest.raises(ValueError, match="apps: "):
        SamplingParams(constrain="action", apps=apps)
    assert SamplingParams(constrain="action", apps=("x" * 100,)).apps


def test_params_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ContextParams().n_ctx = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 1.5},
        {"top_k": float("inf")},
        {"seed": "1"},
        {"temperature": "hot"},
        {"logprobs": 1},
        {"top_logprobs": None},
        {"top_logprobs": True},
    ],
)
def test_sampling_params_of_a_wrong_type_name_the_argument(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(TypeError, match=name):
        SamplingParams(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"n_ctx": 64.0}, {"flash_attn": "no"}, {"n_threads": True}])
def test_context_params_of_a_wrong_type_name_the_argument(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(TypeError, match=name):
        ContextParams(**values)  # type: ignore[arg-type]
