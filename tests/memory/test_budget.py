"""The budget a user writes."""

from __future__ import annotations

import pytest

from autoglm_gguf.memory.budget import DEFAULT_BUDGET, parse_budget


@pytest.mark.parametrize(
    ("written", "n_bytes"),
    [
        (DEFAULT_BUDGET, 4_000_000_000),
        ("4GB", 4_000_000_000),
        ("4GiB", 4_294_967_296),
        ("4 gib", 4_294_967_296),
        ("1500MB", 1_500_000_000),
        ("512MiB", 536_870_912),
        ("3000000000", 3_000_000_000),
        (3_000_000_000, 3_000_000_000),
        (1_000_000, 1_000_000),
    ],
)
def test_budget_is_read_as_it_is_written(written: int | str, n_bytes: int) -> None:
    assert parse_budget(written) == n_bytes


@pytest.mark.parametrize("written", [None, "none", "None", " NONE "])
def test_budget_is_lifted_by_none(written: str | None) -> None:
    assert parse_budget(written) is None


@pytest.mark.parametrize(
    "nonsense",
    ["4 GB of fun", "", "lots", "-4GB", "0", "0GB", "4XB", "4GB!", 0, -1, 999_999, "1kB", "4"],
)
def test_budget_that_is_no_size_is_a_value_error(nonsense: int | str) -> None:
    with pytest.raises(ValueError, match="memory budget"):
        parse_budget(nonsense)


@pytest.mark.parametrize("nonsense", [4.0, True, b"4GB", [4]])
def test_budget_of_another_type_is_a_type_error(nonsense: object) -> None:
    with pytest.raises(TypeError, match="memory budget"):
        parse_budget(nonsense)  # type: ignore[arg-type]


def test_budget_error_tells_how_to_write_one() -> None:
    with pytest.raises(ValueError, match=r"'4 GB of fun'.*4GB.*none lifts it"):
        parse_budget("4 GB of fun")


@pytest.mark.parametrize("absurd", [10**400, "9" * 5000, "99999999999999999999999TB"])
def test_absurd_budget_is_told_in_our_words(absurd: int | str) -> None:
    with pytest.raises(ValueError, match=r"^memory budget: .*none lifts it$"):
        parse_budget(absurd)
