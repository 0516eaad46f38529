"""A path becomes the files of a model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autoglm_gguf import GGUFError
from autoglm_gguf.hub import cache_directory, embedded_checkpoint, resolve_pair


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).touch()
    return directory


def test_file_finds_the_mmproj_beside_it(tmp_path: Path) -> None:
    touch(tmp_path, "m-Q4_0.gguf", "mmproj-m-Q8_0.gguf")
    assert resolve_pair(tmp_path / "m-Q4_0.gguf") == (
        tmp_path / "m-Q4_0.gguf",
        tmp_path / "mmproj-m-Q8_0.gguf",
    )


def test_directory_with_one_model_is_that_model(tmp_path: Path) -> None:
    touch(tmp_path, "m-Q4_0.gguf", "mmproj-m-Q8_0.gguf", ".m-Q4_0.gguf.77.partial", "README.md")
    assert resolve_pair(str(tmp_path)) == (
        tmp_path / "m-Q4_0.gguf",
        tmp_path / "mmproj-m-Q8_0.gguf",
    )


def test_mmproj_is_taken_as_given_or_left_out(tmp_path: Path) -> None:
    text = touch(tmp_path, "m.gguf", "mmproj-m.gguf", "other.gguf") / "m.gguf"
    assert resolve_pair(text, None) == (text, None)
    assert resolve_pair(text, str(tmp_path / "other.gguf")) == (text, tmp_path / "other.gguf")


def test_missing_mmproj_is_called_one(tmp_path: Path) -> None:
    text = touch(tmp_path, "m.gguf") / "m.gguf"
    with pytest.raises(GGUFError, match=r"^mmproj x: no such file"):
        resolve_pair(text, "x")


def test_model_without_an_mmproj_is_text_only(tmp_path: Path) -> None:
    text = touch(tmp_path, "m.gguf") / "m.gguf"
    assert resolve_pair(text) == (text, None)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ((), "no GGUF model"),
        (("mmproj-m.gguf",), "no GGUF model"),
        (("a.gguf", "b.gguf"), "several models (a.gguf, b.gguf)"),
        (("config.json", "model.safetensors"), "a checkpoint, not a GGUF"),
    ],
)
def test_directory_without_exactly_one_model_is_refused(
    tmp_path: Path, names: tuple[str, ...], named: str
) -> None:
    with pytest.raises(GGUFError) as caught:
        resolve_pair(touch(tmp_path, *names))
    assert named in caught.value.message
    assert caught.value.hint


def test_missing_model_is_named_with_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"nowhere\.gguf: no such file") as caught:
        resolve_pair(tmp_path / "nowhere.gguf")
    assert "autoglm-gguf convert" in caught.value.hint


def test_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOGLM_GGUF_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="the rule of Linux")
def test_cache_follows_the_systems_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AUTOGLM_GGUF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "autoglm-gguf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "autoglm-gguf"


def test_embedded_checkpoint_is_in_the_source_tree() -> None:
    assert (embedded_checkpoint() / "config.json").exists()
