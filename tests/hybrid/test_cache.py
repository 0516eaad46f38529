"""Cloud answers by request: bounded, the one asked for longest ago goes."""

from __future__ import annotations

from typing import Any

import pytest
from cloud_server import Cloud, refuse, say
from hybrids import HOME, LONG, PICTURES, Ask, cloud_of, device, route_of, sources
from PIL import Image

from autoglm_gguf import Completion, ContextFullError, HybridClient, HybridPolicy
from autoglm_gguf.hybrid.cache import AnswerCache


def answer(text: str) -> Completion:
    return Completion(text, "stop")


def test_cache_finds_what_was_kept_for_the_same_bytes() -> None:
    cache = AnswerCache(2)
    cache.keep(b"a", answer("A"))
    assert cache.find(b"a") == answer("A")
    assert cache.find(b"a ") is None


def test_cache_drops_what_was_asked_for_longest_ago() -> None:
    cache = AnswerCache(2)
    cache.keep(b"a", answer("A"))
    cache.keep(b"b", answer("B"))
    cache.find(b"a")
    cache.keep(b"c", answer("C"))
    assert (cache.find(b"a"), cache.find(b"b")) == (answer("A"), None)
    assert len(cache) == 2


def test_cache_of_size_zero_keeps_nothing() -> None:
    cache = AnswerCache(0)
    cache.keep(b"a", answer("A"))
    assert cache.find(b"a") is None


# --- behind a `HybridClient` ---


@pytest.mark.parametrize("prompt", ["go back", LONG])
def test_same_request_is_sent_once(ask: Ask, prompt: str) -> None:
    with Cloud(say(HOME)) as cloud:
        local = device()
        model = HybridClient(local, cloud_of(cloud))
        first = ask(model, prompt, constrain="action")
        second = ask(model, prompt, constrain="action")
        ask(model, prompt + "!", constrain="action")
    assert second.text == first.text == HOME
    assert (second.usage, second.finish_reason) == (first.usage, first.finish_reason)
    assert not route_of(first).cached and route_of(second).cached
    assert route_of(second).reason == route_of(first).reason
    assert len(cloud.requests) == 2


@pytest.mark.parametrize(
    ("options", "size", "n_sent"),
    [
        ({"temperature": 0.7}, 64, 2),
        ({"temperature": 0.7, "seed": 1}, 64, 1),
        ({}, 0, 2),
    ],
)
def test_only_what_would_come_again_is_kept(
    ask: Ask, options: dict[str, Any], size: int, n_sent: int
) -> None:
    with Cloud(say("hello")) as cloud:
        model = HybridClient(device(), cloud_of(cloud), HybridPolicy(cache_size=size))
        for _ in range(2):
            assert ask(model, LONG, **options).text == "hello"
    assert len(cloud.requests) == n_sent


def test_request_with_another_image_is_another_request(ask: Ask) -> None:
    with Cloud(say(HOME)) as cloud:
        model = HybridClient(device(), cloud_of(cloud), PICTURES)
        for colour in ("red", "blue", "red"):
            image = Image.new("RGB", (112, 168), colour)
            ask(model, "see", image=image, constrain="action")
    assert len(cloud.requests) == 2


def test_kept_answer_is_given_while_the_cloud_is_left_alone(ask: Ask) -> None:
    with Cloud(say("hello"), refuse(500)) as cloud:
        model = HybridClient(device(), cloud_of(cloud), HybridPolicy(n_failures=1))
        ask(model, LONG)
        with pytest.raises(ContextFullError):
            ask(model, LONG + "!")
        assert ask(model, LONG).text == "hello"


def test_what_failed_is_not_kept(ask: Ask) -> None:
    with Cloud(say("no action"), say(HOME)) as cloud:
        model = HybridClient(device(), cloud_of(cloud))
        assert sources(model, ask, 2) == ["local", "cloud"]
