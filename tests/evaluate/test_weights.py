"""Weights of a converted model against its checkpoint, without torch."""

from __future__ import annotations

import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, build_checkpoint, pack_gguf

from autoglm_gguf import GGUFError, convert, read_header
from autoglm_gguf.conversion.recipe import OUTTYPES
from autoglm_gguf.evaluate.weights import (
    GAUSSIAN_RELATIVE_RMSE,
    LARGEST_RELATIVE_RMSE,
    compare_files,
    compare_with_checkpoint,
)
from autoglm_gguf.native.ggml import GGMLType, dequantize, quantize

pytestmark = pytest.mark.native
# Rows of 256, so that no type falls back.
WIDE = Shape(
    hidden_size=256,
    n_layers=1,
    n_heads=4,
    head_dim=64,
    intermediate_size=256,
    mrope_section=(4, 6, 6),
)


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
    assert all(t.passed for t in found.values())
    assert 0.03 < found["v.blk.0.ffn_up.weight"].relative_rmse < 0.12
    assert found["blk.0.attn_norm.weight"].rmse == 0


def test_one_changed_weight_is_found(checkpoint: Path, tmp_path: Path) -> None:
    pair = convert(checkpoint, tmp_path, "f32")
    info = read_header(pair.text).tensors["blk.1.ffn_down.weight"]
    data = bytearray(pair.text.read_bytes())
    data[info.offset + 4 * 7 + 3] ^= 0x80  # the sign of the eighth weight
    pair.text.write_bytes(data)
    found = compare_with_checkpoint(checkpoint, pair.text, None)
    assert [t.name for t in found if t.max_abs] == ["blk.1.ffn_down.weight"]
    assert [t.name for t in found if not t.passed] == ["blk.1.ffn_down.weight"]


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


# --- what a type allows ---


def squared_largest(n: int) -> float:
    """The mean square of the largest of ``n`` standard normal magnitudes."""
    x = np.linspace(0, 12, 200_001)
    below = np.array([math.erf(value / math.sqrt(2)) for value in x])
    return float((2 * x * (1 - below**n)).sum() * (x[1] - x[0]))


@pytest.mark.parametrize(("kind", "n_steps"), [("Q8_0", 127), ("Q5_0", 16), ("Q4_0", 8)])
def test_gaussian_error_follows_from_the_blocks_largest_weight(kind: str, n_steps: int) -> None:
    """Steps of largest / n_steps in blocks of 32, and an even error within a step: step / √12."""
    expected = math.sqrt(squared_largest(32)) / n_steps / math.sqrt(12)
    assert GAUSSIAN_RELATIVE_RMSE[kind] == pytest.approx(expected, rel=0.02)


def through(rows: np.ndarray, kind: str) -> float:
    """The relative error of a matrix through a type and back."""
    number = GGMLType[kind]
    decoded = dequantize(quantize(rows, number), number, rows.shape[1])
    delta = decoded.astype(np.float64) - rows
    return float(np.linalg.norm(delta) / np.linalg.norm(rows.astype(np.float64)))


@pytest.mark.parametrize("kind", GAUSSIAN_RELATIVE_RMSE)
def test_gaussian_error_is_what_ggml_makes(kind: str) -> None:
    rows = np.random.default_rng(5).standard_normal((128, 1024)).astype(np.float32)
    for scale in (0.02, 2.0):
        measured = through(np.float32(scale) * rows, kind)
        assert measured == pytest.approx(GAUSSIAN_RELATIVE_RMSE[kind], rel=0.02)


@pytest.mark.parametrize("kind", [k for k in LARGEST_RELATIVE_RMSE if k != "F32"])
def test_limit_leaves_room_for_heavy_tails_and_small_tensors(kind: str) -> None:
    rng = np.random.default_rng(6)
    heavy = rng.standard_t(3, (128, 1024)), rng.laplace(size=(128, 1024))
    columns = rng.standard_normal((128, 1024)) * np.exp(0.5 * rng.standard_normal(1024))
    small = [rng.standard_normal((1, 256)) for _ in range(50)]
    for rows in (*heavy, columns, *small):
        assert through(rows.astype(np.float32), kind) <= LARGEST_RELATIVE_RMSE[kind]


def test_every_outtype_has_a_limit() -> None:
    assert {o.ggml_type.name for o in OUTTYPES.values()} == LARGEST_RELATIVE_RMSE.keys()


@pytest.mark.parametrize("outtype", [name for name in OUTTYPES if name != "iq3_xxs"])
def test_right_conversion_passes_at_every_outtype(tmp_path: Path, outtype: str) -> None:
    checkpoint = build_checkpoint(tmp_path / "wide", WIDE)
    pair = convert(checkpoint, tmp_path, outtype)
    found = compare_with_checkpoint(checkpoint, pair.text, pair.mmproj)
    assert [t.name for t in found if not t.passed] == []
    kind = OUTTYPES[outtype].ggml_type.name
    assert {t.limit for t in found if t.type_name == kind} == {LARGEST_RELATIVE_RMSE[kind]}


@pytest.mark.parametrize("outtype", ["q8_0", "q2_K"])
def test_rows_in_another_order_fail_even_the_coarsest_type(tmp_path: Path, outtype: str) -> None:
    checkpoint = build_checkpoint(tmp_path / "wide", WIDE)
    text = convert(checkpoint, tmp_path, outtype).text
    info = read_header(text).tensors["blk.0.attn_q.weight"]
    data = bytearray(text.read_bytes())
    half = info.n_bytes // 2
    rows = data[info.offset : info.offset + info.n_bytes]
    data[info.offset : info.offset + info.n_bytes] = rows[half:] + rows[:half]
    text.write_bytes(data)
    found = compare_with_checkpoint(checkpoint, text, None)
    assert [t.name for t in found if not t.passed] == ["blk.0.attn_q.weight"]


def test_weight_that_is_no_number_passes_no_limit(checkpoint: Path, tmp_path: Path) -> None:
    pair = convert(checkpoint, tmp_path, "f16")
    info = read_header(pair.text).tensors["blk.0.attn_q.weight"]
    data = bytearray(pair.text.read_bytes())
    data[info.offset : info.offset + 2] = struct.pack("<H", 0x7E00)
    pair.text.write_bytes(data)
    found = compare_with_checkpoint(checkpoint, pair.text, None)
    assert [t.name for t in found if not t.passed] == ["blk.0.attn_q.weight"]


def test_no_number_in_place_of_zeros_passes_no_limit(tmp_path: Path) -> None:
    for name, data in (("ours", np.full(4, np.nan, "<f4")), ("against", np.zeros(4, "<f4"))):
        tensors = {"t": ((4,), 0, data.tobytes())}
        (tmp_path / name).write_bytes(pack_gguf({"general.architecture": "glm4"}, tensors))
    [found] = compare_files(tmp_path / "ours", tmp_path / "against")
    assert not found.passed


def test_limit_against_another_file_is_the_coarser_types(checkpoint: Path, tmp_path: Path) -> None:
    files = {kind: convert(checkpoint, tmp_path, kind).text for kind in ("f32", "f16", "q8_0")}

    def limit(ours: str, against: str) -> float | None:
        found = {t.name: t for t in compare_files(files[ours], files[against])}
        assert all(t.passed for t in found.values())
        return found["blk.0.attn_q.weight"].limit

    assert limit("f32", "f32") == 0
    assert limit("f32", "f16") == limit("f16", "f32") == 2**-11
    assert limit("q8_0", "f16") == limit("q8_0", "f32") == LARGEST_RELATIVE_RMSE["Q8_0"]
    assert limit("f16", "q8_0") is None, "what is rounded itself is no original"


def test_type_without_a_limit_is_compared_but_not_held(tmp_path: Path) -> None:
    blank = bytes(66)  # a block of TQ2_0
    for name, kind, data in (("ours", 35, blank), ("against", 0, bytes(4 * 256))):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(pack_gguf({"general.architecture": "glm4"}, {"t": ((256,), kind, data)}))
    [found] = compare_files(tmp_path / "ours.gguf", tmp_path / "against.gguf")
    assert (found.type_name, found.limit, found.passed) == ("TQ2_0", None, True)
    assert found.max_abs == 0
