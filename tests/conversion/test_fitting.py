"""`convert` with a limit, end to end on small checkpoints: kept, told, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders import Shape, build_checkpoint, pack_imatrix
from family import build_chatglm, build_glm, build_glm4

from autoglm_gguf import (
    ConversionError,
    DoesNotFitError,
    Fit,
    GGUFError,
    ModelPair,
    Progress,
    convert,
    read_header,
)
from autoglm_gguf.config import ContextParams
from autoglm_gguf.conversion import pipeline
from autoglm_gguf.conversion.limits import HELD_BYTES
from autoglm_gguf.gguf.describe import describe_pair, find_mmproj
from autoglm_gguf.memory.plan import plan_pair

pytestmark = pytest.mark.native

# 672 = 2.6 x 256, as autoglm-tiny: 256-block types need padding.
SHAPE = Shape(
    hidden_size=256, n_heads=4, head_dim=64, intermediate_size=672, mrope_section=(4, 6, 6)
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("fit") / "small", SHAPE)


@pytest.fixture(scope="module")
def q8_0_bytes(source: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    return convert(source, tmp_path_factory.mktemp("q8_0")).text.stat().st_size


def fitted(source: Path, outdir: Path, fit: Fit, **more: object) -> ModelPair:
    return convert(source, outdir, fit=fit, n_threads=2, **more)  # type: ignore[arg-type]


def write_imatrix(path: Path, columns: dict[str, int]) -> Path:
    """llama.cpp's legacy format, seeded values."""
    rng = np.random.default_rng(2)
    drawn = {name: rng.exponential(1.0, n).astype(np.float32) for name, n in columns.items()}
    path.write_bytes(pack_imatrix(drawn))
    return path


@pytest.fixture(scope="module")
def columns(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Row lengths of all matrices of the layers."""
    whole = read_header(convert(source, tmp_path_factory.mktemp("f32"), "f32").text)
    tensors = whole.tensors.values()
    return {t.name: t.shape[0] for t in tensors if len(t.shape) == 2 and t.name[:4] == "blk."}


@pytest.fixture(scope="module")
def sizes(
    source: Path, q8_0_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, ModelPair]:
    """Fits by their limits, the smallest first."""
    out = tmp_path_factory.mktemp("sizes")
    limits = [int(share * q8_0_bytes) for share in (0.62, 0.8)]
    return {limit: fitted(source, out, Fit(weights=limit)) for limit in limits}


def test_text_file_is_no_larger_than_asked_and_little_smaller(
    sizes: dict[int, ModelPair],
) -> None:
    for limit, pair in sizes.items():
        assert 0.95 * limit < pair.text.stat().st_size <= limit
        header = read_header(pair.text)
        assert header.metadata["autoglm.fit.limit"] == "text file"
        assert header.metadata["autoglm.fit.limit_bytes"] == limit
        assert find_mmproj(pair.text) == pair.mmproj


def test_more_bytes_are_less_error(sizes: dict[int, ModelPair]) -> None:
    reports = [pair.fit for pair in sizes.values() if pair.fit is not None]
    errors = [report.estimated_error for report in reports]
    assert len(errors) == 2 and errors == sorted(errors, reverse=True)
    assert all(0 <= report.gap < 0.3 for report in reports)


def test_fit_is_the_same_every_time(
    source: Path, sizes: dict[int, ModelPair], tmp_path: Path
) -> None:
    limit, pair = next(iter(sizes.items()))
    again = fitted(source, tmp_path, Fit(weights=limit), name=source.name)
    assert again.text.read_bytes() == pair.text.read_bytes()


def test_run_keeps_within_the_budget_as_planned(source: Path, tmp_path: Path) -> None:
    fit = Fit(budget="160MB", n_ctx=512, image_tokens=64)
    pair = fitted(source, tmp_path, fit)
    assert pair.fit is not None and pair.fit.plan is not None
    plan = plan_pair(
        describe_pair(pair.text, pair.mmproj),
        fit.context(),
        fit.limit_bytes,
        fixed=frozenset(("n_ctx", "max_image_tokens", "n_gpu_layers")),
        held_bytes=HELD_BYTES,
    )
    assert plan.weights != "streamed"
    assert plan.peak_bytes == pair.fit.plan.peak_bytes <= 160_000_000
    assert read_header(pair.text).metadata["autoglm.fit.planned_peak_bytes"] == plan.peak_bytes


def test_fit_weighs_with_the_importance_matrix(
    source: Path, q8_0_bytes: int, columns: dict[str, int], tmp_path: Path
) -> None:
    imatrix = write_imatrix(tmp_path / "im.dat", columns)
    pair = fitted(source, tmp_path, Fit(weights=int(0.7 * q8_0_bytes)), imatrix=imatrix)
    assert read_header(pair.text).metadata["autoglm.fit.imatrix"] == "im.dat"


def test_exception_is_kept_and_padded_where_it_asks_for_it(
    source: Path, q8_0_bytes: int, tmp_path: Path
) -> None:
    fit = Fit(weights=int(0.8 * q8_0_bytes))
    pair = fitted(source, tmp_path, fit, tensor_types=["blk.1.ffn_down=q3_K", "ffn_down=q5_1"])
    header = read_header(pair.text)
    assert header.tensors["blk.0.ffn_down.weight"].type_name == "Q5_1"
    assert header.tensors["blk.1.ffn_down.weight"].type_name == "Q3_K"
    assert header.metadata["glm4.feed_forward_length"] == 768


def test_exceptions_may_leave_nothing_to_choose(source: Path, tmp_path: Path) -> None:
    pair = fitted(source, tmp_path, Fit(weights="100MB"), tensor_types=["weight=f32"])
    assert pair.fit is not None
    assert (pair.fit.types, pair.fit.estimated_error, pair.fit.gap) == ({}, 0.0, 0.0)
    assert {info.type_name for info in read_header(pair.text).tensors.values()} == {"F32"}


# --- refusals: one error, nothing written ---


def refuse(source: Path, outdir: Path, kind: type[Exception], message: str, **given: object) -> str:
    with pytest.raises(kind, match=message) as refused:
        convert(source, outdir, **given)  # type: ignore[arg-type]
    assert not outdir.exists() or not any(outdir.iterdir())
    return str(refused.value)


def test_file_that_no_mix_is_small_enough_for(
    source: Path, q8_0_bytes: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(DoesNotFitError, match="no mix of types fits the text file") as refused:
        convert(source, out, fit=Fit(weights=300_000))
    assert not out.exists()
    least = refused.value.required_bytes
    assert 300_000 < least < q8_0_bytes
    assert f"--fit-weights {least}" in str(refused.value)
    assert fitted(source, out, Fit(weights=least)).text.stat().st_size <= least


def test_run_that_no_mix_is_small_enough_for(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fit = Fit(budget="130MB", n_ctx=512, image_tokens=64)
    with pytest.raises(DoesNotFitError, match="no mix of types fits a run") as refused:
        convert(source, out, fit=fit)
    assert not out.exists()
    least = refused.value.required_bytes
    pair = fitted(source, out, Fit(budget=least, n_ctx=512, image_tokens=64))
    assert pair.fit is not None and pair.fit.plan is not None
    assert pair.fit.plan.peak_bytes <= least


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"blk.0.ffn_up.weight": 128}, "has 128 columns, required 256"),
        ({"blk.0.ffn_down.weight": 768}, "has 768 columns, required 672"),
        ({"blk.77.ffn_up.weight": 256}, "it has tensor 'blk.77.ffn_up.weight'"),
        ({"blk.1.attn_v.weight": 0}, "it lacks tensor 'blk.1.attn_v.weight'"),
    ],
    ids=["narrower", "wider", "more layers", "fewer tensors"],
)
def test_imatrix_of_another_model(
    source: Path, columns: dict[str, int], tmp_path: Path, changed: dict[str, int], said: str
) -> None:
    merged = {name: n for name, n in (columns | changed).items() if n}
    imatrix = write_imatrix(tmp_path / "other.dat", merged)
    fit = Fit(weights="100MB")
    message = rf"other\.dat: made for another model \(.*{said}"
    refuse(source, tmp_path / "out", GGUFError, message, fit=fit, imatrix=imatrix)
    refuse(source, tmp_path / "out", GGUFError, message, outtype="q4_0", imatrix=imatrix)


def test_type_that_the_backend_lacks(source: Path, tmp_path: Path) -> None:
    fit = Fit(weights="100MB", backend="hexagon")
    message = "hexagon cannot multiply with Q3_K"
    given = {"fit": fit, "tensor_types": ["ffn_up=q3_K"]}
    refuse(source, tmp_path / "out", ConversionError, message, **given)


def test_outtype_beside_a_fit(source: Path, tmp_path: Path) -> None:
    fit = Fit(weights="100MB")
    refuse(source, tmp_path / "out", ValueError, "beside a fit", fit=fit, outtype="q4_0")


@pytest.mark.parametrize("build", [build_glm4, build_glm, build_chatglm])
def test_text_only_models_fit_too(build: Callable[..., Path], tmp_path: Path) -> None:
    model = build(tmp_path / "model")  # build_glm ties its embeddings, build_chatglm fuses q, k, v
    whole = convert(model, tmp_path / "out", "f16").text.stat().st_size
    pair = fitted(model, tmp_path / "out", Fit(weights=int(0.75 * whole)))
    assert pair.mmproj is None
    assert pair.text.stat().st_size <= 0.75 * whole


def test_searched_scales_leave_size_and_types_as_they_are(source: Path, tmp_path: Path) -> None:
    plain = read_header(convert(source, tmp_path / "plain", "q4_0").text)
    found = read_header(convert(source, tmp_path / "found", "q4_0", search_scales=True).text)
    assert found.tensors == plain.tensors
    assert found.path.read_bytes() != plain.path.read_bytes()


def test_plan_of_a_fitted_pair_streams_nothing(source: Path, tmp_path: Path) -> None:
    pair = fitted(source, tmp_path, Fit(budget="400MB", n_ctx=512, image_tokens=64))
    params = ContextParams(n_ctx=512, max_image_tokens=64)
    plan = plan_pair(
        describe_pair(pair.text, pair.mmproj),
        params,
        400 * 10**6,
        fixed=frozenset({"n_ctx", "max_image_tokens"}),
        held_bytes=HELD_BYTES,
    )
    assert plan.weights != "streamed"


# --- interrupted, and too little room ---


@pytest.mark.parametrize("n_calls", [1, 5])
def test_interrupted_measuring_leaves_nothing(source: Path, tmp_path: Path, n_calls: int) -> None:
    out = tmp_path / "out"
    told: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        assert progress.file == "measuring"
        told.append(progress)
        if len(told) == n_calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(source, out, Fit(weights="100MB"), on_progress=interrupt)
    assert len(told) == n_calls, "nobody is told of more after that"
    assert list(out.iterdir()) == []


def test_disk_too_small_for_any_mix_is_refused_before_measuring(
    source: Path, q8_0_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Progress] = []
    room = pipeline._HEADER_ROOM_BYTES
    usage = SimpleNamespace(free=room + 100_000)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _path: usage)
    fit = Fit(weights=q8_0_bytes)
    message = "disk too small"
    given = {"fit": fit, "on_progress": told.append}
    refuse(source, tmp_path / "out", ConversionError, message, **given)
    assert not told
    usage.free = room + q8_0_bytes  # for the smallest pair, not for a text of this size and a tower
    refuse(source, tmp_path / "out", ConversionError, message, **given)
    assert {progress.file for progress in told} == {"measuring"}
