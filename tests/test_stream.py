"""What a reader of a stream may rely on, against a plain definition of the right answer."""

from __future__ import annotations

import itertools
import random

import pytest

from autoglm_gguf.stream import TextStream

ALPHABET = "ab</> \n答案好。é🙂👩‍👧"


def stream(data: bytes, stop: tuple[str, ...], cuts: list[int]) -> list[str]:
    """Every piece that comes out when ``data`` goes in, cut at these places."""
    text = TextStream(stop)
    edges = [0, *cuts, len(data)]
    pieces = [text.push(data[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, text.finish()]


def first_stop(text: str, stop: tuple[str, ...]) -> str:
    """The oracle: read on until some stop string is complete, then leave it (the longest) out."""
    for end in range(1, len(text) + 1):
        met = [s for s in stop if text[:end].endswith(s)]
        if met:
            return text[: end - max(map(len, met))]
    return text


def random_stop(rng: random.Random, text: str) -> str:
    """A piece of the text, or a string of its own."""
    at = rng.randrange(len(text) + 1)
    return text[at : at + rng.randint(1, 4)] or "".join(rng.choices(ALPHABET, k=2))


def random_cuts(rng: random.Random, n_bytes: int) -> list[int]:
    return sorted(rng.randint(0, n_bytes) for _ in range(rng.randint(0, n_bytes)))


def test_stream_equals_the_whole_text_cut_at_the_first_stop() -> None:
    for seed in range(1000):
        rng = random.Random(seed)
        text = "".join(rng.choices(ALPHABET, k=rng.randint(0, 60)))
        stop = tuple(random_stop(rng, text) for _ in range(rng.randint(0, 3)))
        data = text.encode()
        pieces = stream(data, stop, random_cuts(rng, len(data)))
        assert "".join(pieces) == first_stop(text, stop), f"seed {seed}"


def test_stream_tells_when_a_stop_string_was_met() -> None:
    text = TextStream(("b",))
    assert (text.push(b"a"), text.stopped) == ("a", False)
    assert (text.push(b"b"), text.stopped) == ("", True)


def test_stream_never_shows_half_a_character_or_part_of_the_stop() -> None:
    stop = ("</answer>", "好。好", "ab")
    for seed in range(500):
        rng = random.Random(seed)
        body = "".join(rng.choices([*ALPHABET, "</answer", "好。", "a"], k=40))
        data = (body + rng.choice(stop) + "after").encode()
        whole = first_stop(data.decode(), stop)
        shown = ""
        for piece in stream(data, stop, random_cuts(rng, len(data))):
            shown += piece
            assert whole.startswith(shown), f"seed {seed}: {piece!r} is no part of the answer"
        assert shown == whole, f"seed {seed}"


def test_stream_decodes_any_bytes_as_python_does() -> None:
    for seed in range(500):
        rng = random.Random(seed)
        data = bytes(rng.choices([*rng.randbytes(4), *"好🙂".encode(), 0x41, 0xFF, 0xE4], k=80))
        pieces = stream(data, (), random_cuts(rng, len(data)))
        assert "".join(pieces) == data.decode("utf-8", "replace"), f"seed {seed}"


@pytest.mark.parametrize("byte", [0x80, 0xC0, 0xC1, 0xF5, 0xFF])
def test_stream_goes_on_at_once_when_a_byte_is_never_valid(byte: int) -> None:
    text = TextStream()
    assert text.push(bytes([byte])) == "�"
    assert text.push(b"on") == "on"


def test_stream_replaces_a_broken_character_when_the_next_one_begins() -> None:
    text = TextStream()
    assert text.push("好".encode()[:2]) == ""
    assert text.push(b"A") == "�A"


def test_stream_holds_a_character_until_its_last_byte() -> None:
    text = TextStream()
    assert [text.push(bytes([b])) for b in "🙂".encode()] == ["", "", "", "🙂"]


def test_finish_replaces_an_unfinished_character() -> None:
    text = TextStream()
    text.push("🙂".encode()[:3])
    assert text.finish() == "�"


def test_stream_holds_what_may_become_a_stop_string_and_gives_it_back() -> None:
    text = TextStream(("</answer>",))
    assert text.push(b"x</ans") == "x"
    assert text.push(b"wers") == "</answers"
    assert text.push(b"</a") == ""
    assert text.finish() == "</a"
    assert not text.stopped


def test_stream_drops_everything_after_a_stop_string() -> None:
    text = TextStream(("STOP",))
    assert text.push(b"oneSTOPtwo") == "one"
    assert text.stopped
    assert text.push(b"three") == ""
    assert text.finish() == ""


def test_stream_takes_the_stop_that_is_complete_first_however_it_is_split() -> None:
    # "b" is complete before "abc" is; a reader of single characters could not know better.
    for cuts in ([], [1], [2], [1, 2]):
        assert "".join(stream(b"abc", ("abc", "b"), cuts)) == "a"


def test_stream_takes_the_longer_of_two_stops_that_end_together() -> None:
    assert "".join(stream(b"xab", ("b", "ab"), [])) == "x"
