"""Which tensors lie on a GPU, as llama.cpp places them: the output, then the last layers."""

from __future__ import annotations

import pytest
from builders import describe_sizes

from autoglm_gguf import ContextParams
from autoglm_gguf.engine.weights import device_tensors

OUTPUT = {"output.weight"}


def layers(*numbers: int) -> set[str]:
    return {f"blk.{n}.ffn_up.weight" for n in numbers}


@pytest.mark.parametrize(
    ("n_gpu_layers", "expected"),
    [
        (0, set()),
        (1, OUTPUT),
        (3, OUTPUT | layers(2, 3)),
        (5, OUTPUT | layers(0, 1, 2, 3)),
    ],
)
def test_device_tensors_are_the_output_and_the_last_layers(
    n_gpu_layers: int, expected: set[str]
) -> None:
    header = describe_sizes(layer_bytes=(1000,) * 4, tower_bytes=0).text
    assert device_tensors(header, ContextParams(n_gpu_layers=n_gpu_layers)) == expected
