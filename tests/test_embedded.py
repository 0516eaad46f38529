"""The model one gets without naming one."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_gguf import ConversionError, default_pair, read_header
from autoglm_gguf.hub import embedded_checkpoint

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOGLM_GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_default_pair_is_converted_once_into_the_cache(cache: Path) -> None:
    calls: list[object] = []
    pair = default_pair(on_progress=calls.append)
    assert pair.text.name == "autoglm-tiny-Q8_0.gguf"
    assert pair.mmproj.name == "mmproj-autoglm-tiny-Q8_0.gguf"
    assert pair.text.is_relative_to(cache)
    n_calls = len(calls)
    assert n_calls > 0
    assert default_pair(on_progress=calls.append) == pair
    assert len(calls) == n_calls, "found, not made again"


def test_default_pair_takes_an_outtype() -> None:
    pair = default_pair("q4_0")
    assert (pair.text.name, pair.mmproj.name) == (
        "autoglm-tiny-Q4_0.gguf",
        "mmproj-autoglm-tiny-Q8_0.gguf",
    )


def test_default_pair_replaces_a_damaged_file() -> None:
    pair = default_pair()
    whole = pair.text.read_bytes()
    pair.text.write_bytes(whole[: len(whole) // 2])
    assert default_pair() == pair
    assert pair.text.read_bytes() == whole


def test_default_pair_writes_nothing_into_the_package() -> None:
    default_pair()
    assert list(embedded_checkpoint().rglob("*.gguf")) == []


def test_default_pair_names_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOGLM_GGUF_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConversionError, match="file"):
        default_pair()


def test_default_pair_keeps_text_and_mmproj_of_one_checkpoint() -> None:
    pair = default_pair("f16")
    key = "autoglm.source_fingerprint"
    assert read_header(pair.text).metadata[key] == read_header(pair.mmproj).metadata[key]
