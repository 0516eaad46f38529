"""Importance matrices against llama-imatrix's, interrupted runs, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, build_checkpoint

from autoglm_gguf import Corpus, EvaluationError, GGUFError, calibrate, convert, read_header
from autoglm_gguf.conversion.imatrix import read_imatrix
from autoglm_gguf.evaluate import calibration
from autoglm_gguf.evaluate.measuring import PassageProgress

pytestmark = pytest.mark.native
GOLDEN = Path(__file__).parent / "golden"
TEXT = GOLDEN / "text.txt"
TINY = Path(__file__).parents[2] / "models" / "autoglm-tiny"
N_CTX = 256  # golden/make_golden.py's


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("small")
    return convert(build_checkpoint(base / "small", Shape()), base, "f32").text


def read_values(path: Path) -> dict[str, np.ndarray]:
    header, data = read_header(path), path.read_bytes()
    return {
        name: np.frombuffer(data, np.float32, info.n_bytes // 4, info.offset)
        for name, info in header.tensors.items()
    }


@pytest.fixture(scope="module")
def ours(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    made = calibrate(tiny_pair("q8_0")[0], Corpus(TEXT, n_ctx=N_CTX), path)
    assert (made.path, made.n_ctx, made.n_resumed) == (path, N_CTX, 0)
    assert made.n_tokens == made.n_passages * N_CTX
    assert made.n_tensors == 36
    return path


def test_values_equal_llama_imatrixs(ours: Path) -> None:
    """Every tensor within 1 %, column by column within 5 %."""
    found, expected = read_values(ours), read_values(GOLDEN / "imatrix.gguf")
    assert list(found) == list(expected)
    for name, values in expected.items():
        if name.endswith(".counts"):
            assert found[name].tolist() == values.tolist(), name
            continue
        difference = np.linalg.norm(found[name] - values) / np.linalg.norm(values)
        assert difference < 0.01, name
        assert found[name] == pytest.approx(values, rel=0.05), name


def test_file_is_laid_out_as_llama_imatrixs(ours: Path) -> None:
    """Byte for byte up to the values: keys, names, shapes, offsets."""
    start = min(info.offset for info in read_header(ours).tensors.values())
    assert ours.read_bytes()[:start] == (GOLDEN / "imatrix.gguf").read_bytes()[:start]
    assert ours.stat().st_size == (GOLDEN / "imatrix.gguf").stat().st_size


def test_conversion_takes_ours_and_theirs_alike(ours: Path, tmp_path: Path) -> None:
    first, second = (read_imatrix(path).columns for path in (ours, GOLDEN / "imatrix.gguf"))
    assert first.keys() == second.keys()
    for name, values in second.items():
        assert first[name] == pytest.approx(values, rel=0.05), name
    plain = convert(TINY, tmp_path / "plain", "q4_0").text
    weighted = convert(TINY, tmp_path / "weighted", "q4_0", imatrix=ours).text
    assert plain.read_bytes() != weighted.read_bytes()


def test_output_matrix_is_collected_when_asked(small: Path, tmp_path: Path) -> None:
    corpus = Corpus(TEXT, n_ctx=32, n_chunks=2)
    calibrate(small, corpus, tmp_path / "a.gguf")
    calibrate(small, corpus, tmp_path / "b.gguf", process_output=True)
    plain, more = read_values(tmp_path / "a.gguf"), read_values(tmp_path / "b.gguf")
    assert more.keys() - plain.keys() == {"output.weight.in_sum2", "output.weight.counts"}
    for name, values in plain.items():
        assert np.array_equal(more[name], values), name


def test_transcripts_count_text_and_image_tokens(
    random_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from PIL import Image

    content = [
        {"type": "image", "image": Image.new("RGB", (112, 224), "red")},
        {"type": "text", "text": "hello"},
    ]
    step = [{"role": "user", "content": content}, {"role": "assistant", "content": "hello in"}]
    made = calibrate(random_pair[0], Corpus([step], n_ctx=128), tmp_path / "a.gguf")
    text_only = [{"role": "user", "content": "hello"}, step[1]]
    plain = calibrate(random_pair[0], Corpus([text_only], n_ctx=128), tmp_path / "b.gguf")
    # <|begin_of_image|>, 4 x 8 image tokens, <|end_of_image|>
    assert made.n_tokens - plain.n_tokens == 34
    counts = {int(v[0]) for k, v in read_values(made.path).items() if k.endswith(".counts")}
    assert counts == {made.n_tokens}


def test_progress_is_told_after_each_chunk(small: Path, tmp_path: Path) -> None:
    told: list[PassageProgress] = []
    corpus = Corpus(TEXT, n_ctx=32, n_chunks=3)
    calibrate(small, corpus, tmp_path / "a.gguf", on_passage=told.append)
    assert [(p.done, p.total, p.resumed) for p in told] == [(1, 3, 0), (2, 3, 0), (3, 3, 0)]


# --- interrupted ---


class InterruptionError(Exception):
    pass


def stop_after(n: int) -> Callable[[PassageProgress], None]:
    def stop(progress: PassageProgress) -> None:
        if progress.done == n:
            raise InterruptionError

    return stop


def test_interrupted_run_goes_on_where_it_was(small: Path, tmp_path: Path) -> None:
    corpus = Corpus(TEXT, n_ctx=32, n_chunks=5)
    path, whole = tmp_path / "a.gguf", tmp_path / "whole.gguf"
    with pytest.raises(InterruptionError):
        calibrate(small, corpus, path, on_passage=stop_after(3))
    assert [p.name for p in tmp_path.iterdir()] == [".a.gguf.partial"]
    told: list[PassageProgress] = []
    made = calibrate(small, corpus, path, on_passage=told.append)
    assert made.n_resumed == 3
    assert [(p.done, p.resumed) for p in told] == [(4, 3), (5, 3)]
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    calibrate(small, corpus, whole)
    assert read_header(path).metadata == read_header(whole).metadata
    expected = read_values(whole)
    for name, values in read_values(path).items():
        assert values == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("changed", ["text", "n_ctx", "model", "output", "damage"])
def test_other_work_does_not_go_on_from_it(
    small: Path, random_pair: tuple[Path, Path], tmp_path: Path, changed: str
) -> None:
    corpus = Corpus(TEXT, n_ctx=32, n_chunks=3)
    path = tmp_path / "a.gguf"
    with pytest.raises(InterruptionError):
        calibrate(small, corpus, path, on_passage=stop_after(2))
    if changed == "text":
        other = tmp_path / "text.txt"
        other.write_text(TEXT.read_text("utf-8")[5:], "utf-8")
        corpus = Corpus(other, n_ctx=32, n_chunks=3)
    elif changed == "n_ctx":
        corpus = Corpus(TEXT, n_ctx=48, n_chunks=3)
    elif changed == "damage":
        partial = tmp_path / ".a.gguf.partial"
        partial.write_bytes(partial.read_bytes()[:-100])
    model = random_pair[0] if changed == "model" else small
    made = calibrate(model, corpus, path, process_output=changed == "output")
    assert made.n_resumed == 0
    assert not (tmp_path / ".a.gguf.partial").exists()


def test_sums_are_saved_now_and_then(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_SAVE_SECONDS", -1.0)
    seen: list[int] = []

    def look(_progress: PassageProgress) -> None:
        header = read_header(tmp_path / ".a.gguf.partial")
        seen.append(header.metadata["imatrix.chunk_count"])

    corpus = Corpus(TEXT, n_ctx=32, n_chunks=3)
    calibrate(small, corpus, tmp_path / "a.gguf", on_passage=look)
    assert seen == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child")
def test_ctrl_c_ends_it_and_leaves_only_the_temporary_file(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    text.write_text(TEXT.read_text("utf-8") * 40, "utf-8")
    outdir = tmp_path / "out"
    outdir.mkdir()
    command = [
        *(sys.executable, "-m", "autoglm_gguf", "calibrate", str(tiny_pair("f32")[0])),
        *("--text", str(text), "--outfile", str(outdir / "a.gguf"), "--n-threads", "1"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if b" of " in line:
                break
        child.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert child.wait(60) == 130
        assert time.monotonic() - began < 30
    assert [p.name for p in outdir.iterdir()] == [".a.gguf.partial"]


# --- refused ---


def test_output_that_cannot_be_written_is_refused_first(small: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "a.gguf"):
        with pytest.raises(EvaluationError, match="cannot be written"):
            calibrate(small, Corpus(TEXT, n_ctx=32), path, on_passage=stop_after(1))


def test_model_that_is_none_is_refused(random_pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(GGUFError):
        calibrate(tmp_path / "none.gguf", TEXT, tmp_path / "a.gguf")
    with pytest.raises(GGUFError):
        calibrate(GOLDEN / "imatrix.gguf", TEXT, tmp_path / "a.gguf")
    with pytest.raises(GGUFError):
        calibrate(random_pair[1], TEXT, tmp_path / "a.gguf")


def test_too_short_text_is_refused_and_nothing_left(small: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello", "utf-8")
    with pytest.raises(EvaluationError, match="too short"):
        calibrate(small, text, tmp_path / "a.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]
    assert json.dumps(list(tmp_path.glob(".*"))) == "[]"
