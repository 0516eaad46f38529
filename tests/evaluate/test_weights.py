"""Weights of a converted model against its checkpoint, without torch."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from builders import Shape, build_checkpoint

from autoglm_gguf import GGUFError, convert, read_header
from autoglm_gguf.evaluate.weights import compare_files, compare_with_checkpoint

pytestmark = pytest.mark.native


def test_f32_weights_are_the_checkpoints_own(checkpoint: Path, tmp_path: Path) -> None:
    pair = convert(checkpoint, tmp_path, "f32")
    found = compare_with_checkpoint(checkpoint, pair.text, pair.mmproj)
    assert {tensor.name for tensor in found} == {
        *read_header(pair.text).tensors,
        *read_header(pair.mmproj or "").tensors,
    }
    assert all(t.max_abs == t.rmse == t.relative_rmse == 0 for t in found)
    assert min(t.cosine for t in found) == pytest.approx(1)


def test_quantised_weights_differ_by_the_types_step(checkpoint: Path, tmp_path: Path) -> None:
    pair = convert(checkpoint, tmp_path, "q8_0", mmproj_outtype="q4_0")
    found = {t.name: t for t in compare_with_checkpoint(checkpoint, pair.text, pair.mmproj)}
    assert 0 < found["blk.0.attn_q.weight"].relative_rmse < 0.01
    assert 0.03 < found["v.blk.0.ffn_up.weight"].relative_rmse < 0.12
    assert found["blk.0.attn_norm.weight"].rmse == 0


def test_one_changed_weight_is_found(checkpoint: Path, tmp_path: Path) -> None:
    pair = convert(checkpoint, tmp_path, "f32")
    info = read_header(pair.text).tensors["blk.1.ffn_down.weight"]
    data = bytearray(pair.text.read_bytes())
    data[info.offset + 4 * 7 + 3] ^= 0x80  # the sign of the eighth weight
    pair.text.write_bytes(data)
    wrong = [t.name for t in compare_with_checkpoint(checkpoint, pair.text, None) if t.max_abs]
    assert wrong == ["blk.1.ffn_down.weight"]


def test_weights_of_another_checkpoint_are_unrelated(checkpoint: Path, tmp_path: Path) -> None:
    other = build_checkpoint(tmp_path / "other", Shape(seed=2))
    pair = convert(other, tmp_path / "out", "f32")
    found = {t.name: t for t in compare_with_checkpoint(checkpoint, pair.text, None)}
    assert found["blk.0.ffn_up.weight"].relative_rmse == pytest.approx(math.sqrt(2), rel=0.1)
    assert abs(found["blk.0.ffn_up.weight"].cosine) < 0.1


def test_file_of_another_shape_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = build_checkpoint(tmp_path / "other", Shape(n_layers=1))
    pair = convert(other, tmp_path / "out", "f32")
    with pytest.raises(GGUFError, match=r"blk\.1\..* is missing"):
        compare_with_checkpoint(checkpoint, pair.text, None)


def test_padded_weights_compare_with_zeros(tmp_path: Path) -> None:
    shape = Shape(
        hidden_size=256, head_dim=64, intermediate_size=160, mrope_section=(4, 6, 6), n_layers=1
    )
    checkpoint = build_checkpoint(tmp_path / "odd", shape)
    pair = convert(checkpoint, tmp_path, "q6_K")
    found = {t.name: t for t in compare_with_checkpoint(checkpoint, pair.text, None)}
    assert found["blk.0.ffn_down.weight"].type_name == "Q6_K"
    assert max(t.relative_rmse for t in found.values()) < 0.03


def test_two_files_are_compared_tensor_by_tensor(checkpoint: Path, tmp_path: Path) -> None:
    exact = convert(checkpoint, tmp_path, "f32").text
    small = convert(checkpoint, tmp_path, "q8_0").text
    twin = Path(shutil.copy(exact, tmp_path / "twin.gguf"))
    assert all(t.max_abs == 0 for t in compare_files(twin, exact))
    assert any(t.max_abs > 0 for t in compare_files(small, exact))
