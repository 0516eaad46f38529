"""Devices and clouds that tests put behind a `HybridClient`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloud_server import Cloud
from PIL import Image
from rated_engine import RatedEngine

from autoglm_gguf import (
    AutoGLM,
    CloudModel,
    Completion,
    HybridClient,
    HybridPolicy,
    Route,
)

BACK = '<think>t</think><answer>do(action="Back")'
HOME = '<think>c</think>\n<answer>do(action="Home")'
SCREEN = Image.new("RGB", (112, 168), "red")
PICTURES = HybridPolicy(send_images=True)
UNSURE = "an unsure action, token probability 0.40 on average, under 0.9"
LONG = "x" * 5000


def device(answer: str = BACK, probability: float = 0.4, **options: Any) -> AutoGLM:
    return AutoGLM(RatedEngine(answer.encode(), probability, **options))


def cloud_of(cloud: Cloud, **options: Any) -> CloudModel:
    """With more patience than the default: a busy machine is no cloud that is down."""
    patient = {"connect_s": 60.0, "first_byte_s": 60.0}
    return CloudModel(cloud.base_url, "big", **{**patient, **options})


Ask = Callable[..., Completion]


def route_of(answer: Completion) -> Route:
    assert answer.route is not None
    return answer.route


def sources(model: HybridClient, ask: Ask, n: int) -> list[str]:
    return [route_of(ask(model, constrain="action")).source for _ in range(n)]
