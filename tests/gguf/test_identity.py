"""Which file a GGUF is: equal for copies, and for nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from builders import Shape, build_checkpoint

from autoglm_gguf import convert, read_header
from autoglm_gguf.gguf.identity import identify_file, identify_model

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("identity")
    return convert(build_checkpoint(base / "one"), base / "gguf", "q8_0").text


def test_copy_is_the_same_file(text: Path, tmp_path: Path) -> None:
    copy = shutil.copy(text, tmp_path / "another-name.gguf")
    assert identify_file(read_header(copy)) == identify_file(read_header(text))


@pytest.mark.parametrize("part", ["header", "weights"])
def test_changed_byte_makes_another_file(text: Path, part: str, tmp_path: Path) -> None:
    header = read_header(text)
    first = min(tensor.offset for tensor in header.tensors.values())
    data = bytearray(text.read_bytes())
    where = data.index(b"<|system|>") + 3 if part == "header" else first
    data[where] ^= 1
    (tmp_path / "a.gguf").write_bytes(data)
    assert identify_file(read_header(tmp_path / "a.gguf")) != identify_file(header)


def test_weights_of_another_training_are_another_file(text: Path, tmp_path: Path) -> None:
    """The same header and size, as checkpoints of one training have them elsewhere."""
    header = read_header(text)
    first = min(tensor.offset for tensor in header.tensors.values())
    data = bytearray(text.read_bytes())
    data[first:] = bytes(255 - byte for byte in data[first:])
    (tmp_path / "a.gguf").write_bytes(data)
    assert identify_file(read_header(tmp_path / "a.gguf")) != identify_file(header)


def test_types_of_one_checkpoint_are_one_model_in_two_files(tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "one")
    one = read_header(convert(source, tmp_path / "a", "q8_0").text)
    two = read_header(convert(source, tmp_path / "b", "f16").text)
    other = read_header(
        convert(build_checkpoint(tmp_path / "two", Shape(seed=2)), tmp_path / "c", "q8_0").text
    )
    assert identify_model(one) == identify_model(two) != identify_model(other)
    assert len({identify_file(header) for header in (one, two, other)}) == 3


def test_file_that_names_no_source_is_a_model_of_its_own(text: Path) -> None:
    header = read_header(text)
    header.metadata.pop("autoglm.source_fingerprint")
    assert identify_model(header) == identify_file(header)
