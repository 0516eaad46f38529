"""Results that could not be written, or would take the place of what is read: refused first."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from autoglm_gguf import Corpus, EvaluationError, calibrate, evaluate_perplexity
from autoglm_gguf.evaluate import outfile
from autoglm_gguf.evaluate.outfile import check_outfile

TEXT = Path(__file__).parent / "golden" / "text.txt"


def test_new_and_older_files_are_let_pass(tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.write_text("mine")
    for path in (older, tmp_path / "new"):
        check_outfile(path, tmp_path / "input", None, n_bytes=1)
    assert older.read_text() == "mine"


def test_file_in_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "none" / "a", tmp_path / "file" / "a"):
        with pytest.raises(EvaluationError, match="cannot be written"):
            check_outfile(path)


def test_input_is_not_overwritten(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_text("mine")
    path = tmp_path / "linked"
    path.hardlink_to(given)
    with pytest.raises(EvaluationError, match="is read, and would be overwritten"):
        check_outfile(path, tmp_path / "other", given)


def test_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outfile.shutil, "disk_usage", lambda _path: SimpleNamespace(free=100))
    check_outfile(tmp_path / "a", n_bytes=100)
    with pytest.raises(EvaluationError, match=r"disk too small \(100 B free, needs 101 B\)"):
        check_outfile(tmp_path / "a", n_bytes=101)


@pytest.mark.native
def test_model_is_neither_base_nor_importance_matrix(random_pair: tuple[Path, Path]) -> None:
    text, mmproj = random_pair
    before = text.read_bytes()
    corpus = Corpus(TEXT, n_ctx=32, n_chunks=2)
    for path in (text, mmproj):
        with pytest.raises(EvaluationError, match="would be overwritten"):
            calibrate(text, corpus, path, mmproj=mmproj)
        with pytest.raises(EvaluationError, match="would be overwritten"):
            evaluate_perplexity(text, corpus, save_base=path, mmproj=mmproj)
    assert text.read_bytes() == before


@pytest.mark.native
@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
def test_full_disk_leaves_nothing_under_a_final_name(
    random_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where others fill the disk meanwhile: the check before says that there is room."""
    import resource
    import signal

    corpus = Corpus(TEXT, n_ctx=32, n_chunks=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(EvaluationError, match="cannot be written"):
            calibrate(random_pair[0], corpus, tmp_path / "im.gguf")
        with pytest.raises(EvaluationError, match="cannot be written"):
            evaluate_perplexity(random_pair[0], corpus, save_base=tmp_path / "base")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
