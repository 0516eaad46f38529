"""Sizes and durations."""

from __future__ import annotations

import pytest

from autoglm_gguf.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4GB", 4_000_000_000),
        ("4GiB", 4_294_967_296),
        ("512 MiB", 536_870_912),
        ("  1.5 kB ", 1_500),
        ("1.1GB", 1_100_000_000),
        ("2tb", 2_000_000_000_000),
        ("1TIB", 1_099_511_627_776),
        ("7", 7),
        ("7B", 7),
        ("0.6", 1),
        ("9007199254740993", 9_007_199_254_740_993),
        ("9" * 400, int("9" * 400)),
    ],
)
def test_parse_bytes_reads_decimal_and_binary_units(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "4 G B", "4PB", "-4GB", "4,5GB", "0", "0GB", "0.1", "nan", "1e9", "4GB!"]
)
def test_parse_bytes_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="size") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_234_567, "1.23 MB"),
        (5_290_000_000, "5.29 GB"),
        (20_600_000_000_000, "20600.00 GB"),
    ],
)
def test_format_bytes_counts_in_thousands(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.44, "0.4 s"), (12.4, "12 s"), (60, "1 min 00 s"), (185.4, "3 min 05 s")],
)
def test_format_seconds_speaks_to_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
