"""Cloud answers by request: bounded, the one asked for longest ago goes."""

from __future__ import annotations

from autoglm_gguf import Completion
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
