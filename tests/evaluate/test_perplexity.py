"""Perplexity and divergence: known answers of a fake engine, llama-perplexity's of a real one."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Shape, build_checkpoint
from measured import N_VOCAB, Following
from PIL import Image

from autoglm_gguf import (
    Corpus,
    EvaluationError,
    convert,
    evaluate_divergence,
    evaluate_perplexity,
)
from autoglm_gguf.evaluate.base_file import BaseRows, read_base
from autoglm_gguf.evaluate.measuring import PassageProgress
from autoglm_gguf.evaluate.passages import Passages, cut_corpus, read_corpus
from autoglm_gguf.evaluate.perplexity import check_base, measure_divergence, measure_perplexity

GOLDEN = Path(__file__).parent / "golden"
N_CTX, SMALL_N_CTX, SMALL_CHUNKS = 256, 32, 4  # golden/make_golden.py's
STEP = [
    {"role": "user", "content": "Open Chrome"},
    {"role": "assistant", "content": "abcdez"},
]


def passages_of(corpus: Corpus, engine: Following) -> Passages:
    return cut_corpus(engine, corpus, read_corpus(corpus))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghabcdefgxabcdefgh", "utf-8")
    return path


# --- known answers ---


@pytest.mark.parametrize("n_outputs", [1, 2, 3, 64])
def test_perplexity_is_that_of_each_chunks_second_half(text: Path, n_outputs: int) -> None:
    """In each chunk f, g and h (or x) are scored: 8 - 1 - 4 tokens."""
    engine = Following(n_outputs=n_outputs)
    corpus = Corpus(text, n_ctx=8)
    told: list[PassageProgress] = []
    found = measure_perplexity(engine, passages_of(corpus, engine), corpus, on_passage=told.append)
    expected = [engine.nll(follows=True)] * 8 + [engine.nll(follows=False)]
    assert (found.n_passages, found.n_tokens) == (3, 9)
    assert found.nll.value == pytest.approx(np.mean(expected), rel=1e-6)
    assert found.nll.error == pytest.approx(np.std(expected) / math.sqrt(8), rel=1e-6)
    assert found.perplexity.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)
    assert [(p.done, p.total) for p in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[-1].value == pytest.approx(found.perplexity.value)


def test_chunks_are_evaluated_in_as_few_batches_as_outputs_allow(text: Path) -> None:
    engine = Following(n_outputs=64)
    corpus = Corpus(text, n_ctx=8)
    measure_perplexity(engine, passages_of(corpus, engine), corpus)
    assert engine.batches == [(8, 4)] * 3  # 4 to 6 predict what is scored, 7 comes along


def test_answers_of_transcripts_are_scored_and_shared_prompts_evaluated_once() -> None:
    engine = Following(n_outputs=64)
    other = [STEP[0], {"role": "assistant", "content": "xyz"}]
    corpus = Corpus([STEP, other])
    passages = passages_of(corpus, engine)
    found = measure_perplexity(engine, passages, corpus)
    follows, differs = engine.nll(follows=True), engine.nll(follows=False)
    # after the prompt's line break comes a; then b c d e follow, z does not; x, and y z follow
    assert found.n_tokens == 9
    assert found.nll.value == pytest.approx((differs * 3 + follows * 6) / 9, rel=1e-6)
    n_prompt = len(passages.passage(0).pieces) - 6
    assert engine.n_evaluated == n_prompt + 6 + 1 + 3  # its last token predicts the x


def test_images_are_evaluated_in_their_place(tmp_path: Path) -> None:
    Image.new("RGB", (112, 224), "red").save(tmp_path / "screen.png")
    content = [{"type": "image_url", "image_url": {"url": "screen.png"}}]
    steps = tmp_path / "steps.jsonl"
    steps.write_text(json.dumps([{"role": "user", "content": content}, STEP[1]]) + "\n", "utf-8")
    engine = Following(n_outputs=64)
    corpus = Corpus(steps)
    passages = passages_of(corpus, engine)
    measure_perplexity(engine, passages, corpus)
    assert engine.n_encoded == 1
    assert engine.content.pieces == passages.passage(0).pieces


def test_divergence_is_that_of_the_two_softmaxes(text: Path, tmp_path: Path) -> None:
    base, model = Following(), Following(strength=3.0)
    corpus = Corpus(text, n_ctx=8)
    path = tmp_path / "base"
    of_base = measure_perplexity(base, passages_of(corpus, base), corpus, save_base=path)
    passages = passages_of(corpus, model)
    found = measure_divergence(model, passages, "text.txt", read_base(path))
    p, q = (np.exp([-e.nll(follows=True), -e.nll(follows=False)]) for e in (base, model))
    expected = float((np.array([1, N_VOCAB - 1]) * p * np.log(p / q)).sum())
    assert found.kl_divergence.mean == pytest.approx(expected, abs=1e-4)
    assert found.kl_divergence.maximum == pytest.approx(expected, abs=1e-4)
    assert found.same_top.value == 1
    assert found.base_perplexity is not None
    assert found.base_perplexity.value == pytest.approx(of_base.perplexity.value)
    assert found.base == "fake"
    expected_delta = (8 * (q[0] - p[0]) + q[1] - p[1]) / 9
    assert found.delta_p.value == pytest.approx(expected_delta, abs=1e-5)


def test_base_of_another_vocabulary_text_or_n_ctx_is_refused(text: Path, tmp_path: Path) -> None:
    engine = Following()
    corpus = Corpus(text, n_ctx=8)
    passages = passages_of(corpus, engine)
    path = tmp_path / "base"
    measure_perplexity(engine, passages, corpus, save_base=path)
    base = read_base(path)
    check_base(base, engine, passages)
    other = Following()
    other.vocabulary_key = "others"
    with pytest.raises(EvaluationError, match=r"another vocabulary \(as many tokens"):
        check_base(base, other, passages)
    with pytest.raises(EvaluationError, match="made with n_ctx 8, not 12") as caught:
        check_base(base, engine, passages_of(Corpus(text, n_ctx=12), engine))
    assert "--n-ctx 8" in caught.value.hint
    changed = tmp_path / "other.txt"
    changed.write_text(text.read_text("utf-8")[::-1], "utf-8")
    with pytest.raises(EvaluationError, match="made from another text"):
        check_base(base, engine, passages_of(Corpus(changed, n_ctx=8), engine))
    with pytest.raises(EvaluationError, match="made from text, not from transcripts"):
        check_base(base, engine, passages_of(Corpus([STEP]), engine))


def test_base_of_other_transcripts_is_refused(tmp_path: Path) -> None:
    engine = Following(n_outputs=64)
    corpus = Corpus([STEP])
    path = tmp_path / "base"
    measure_perplexity(engine, passages_of(corpus, engine), corpus, save_base=path)
    check_base(read_base(path), engine, passages_of(corpus, engine))
    other = [[{"role": "user", "content": "Close Chrome"}, STEP[1]]]
    with pytest.raises(EvaluationError, match="another set of transcripts"):
        check_base(read_base(path), engine, passages_of(Corpus(other), engine))


def test_base_of_transcripts_needs_them_again(tmp_path: Path) -> None:
    engine = Following(n_outputs=64)
    corpus = Corpus([STEP])
    path = tmp_path / "base"
    measure_perplexity(engine, passages_of(corpus, engine), corpus, save_base=path)
    with pytest.raises(EvaluationError, match="does not hold them") as caught:
        evaluate_divergence("model.gguf", path)
    assert "--transcripts" in caught.value.hint


# --- llama-perplexity's answers ---


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "figures.json").read_text("utf-8"))
    return found


@pytest.mark.native
def test_perplexity_and_divergence_equal_llama_perplexitys(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path, figures: dict[str, Any]
) -> None:
    """Closer than its own error by far: what is left is the order of additions in the kernels."""
    corpus = Corpus(GOLDEN / "text.txt", n_ctx=N_CTX)
    path = tmp_path / "base"
    base = evaluate_perplexity(tiny_pair("f32")[0], corpus, save_base=path)
    value, error = figures["base_perplexity"]
    assert base.perplexity.value == pytest.approx(value, rel=1e-3)
    assert base.perplexity.error == pytest.approx(error, rel=1e-3)
    found = evaluate_divergence(tiny_pair("q4_0")[0], path)
    value, error = figures["perplexity"]
    assert abs(found.perplexity.value - value) < error / 20
    assert found.perplexity.error == pytest.approx(error, rel=0.02)
    kl = found.kl_divergence
    value, error = figures["kl_mean"]
    assert abs(kl.mean - value) < error / 4
    assert kl.error == pytest.approx(error, rel=0.05)
    for name in ("p90", "p95", "p99", "p99_9", "maximum"):
        assert getattr(kl, name) == pytest.approx(figures[f"kl_{name}"][0], rel=0.05), name
    assert kl.median == pytest.approx(figures["kl_median"][0], rel=0.05, abs=1e-4)
    for name, estimate in (("same_top", found.same_top), ("delta_p", found.delta_p)):
        value, error = figures[name]
        assert abs(100 * estimate.value - value) < error / 2, name
        assert 100 * estimate.error == pytest.approx(error, rel=0.05), name
    assert 100 * found.delta_p_rms == pytest.approx(figures["delta_p_rms"][0], rel=0.05)
    value, error = figures["log_ratio"]
    assert abs(found.log_ratio.value - value) < error / 4
    assert found.log_ratio.error == pytest.approx(error, rel=0.05)
    assert found.base_perplexity == base.perplexity


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("small")
    return convert(build_checkpoint(base / "small", Shape()), base, "f32").text


@pytest.mark.native
def test_base_file_equals_llama_perplexitys(small: Path, tmp_path: Path) -> None:
    corpus = Corpus(GOLDEN / "text.txt", n_ctx=SMALL_N_CTX, n_chunks=SMALL_CHUNKS)
    path = tmp_path / "base"
    evaluate_perplexity(small, corpus, save_base=path)
    ours, theirs = read_base(path), read_base(GOLDEN / "base.bin")
    assert theirs.tokens is not None and ours.tokens is not None
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert (ours.n_vocab, ours.n_scored) == (theirs.n_vocab, theirs.n_scored)
    head = ours.rows_offset
    assert path.read_bytes()[:head] == (GOLDEN / "base.bin").read_bytes()[:head]
    n = sum(ours.n_scored)
    with BaseRows(ours) as first, BaseRows(theirs) as second:
        a, b = first.read(n), second.read(n)
    scale = [np.ascontiguousarray(rows[:, :4]).view("<f4") for rows in (a, b)]
    assert scale[0] == pytest.approx(scale[1], rel=1e-5)
    steps = np.abs(a[:, 4:].astype(int) - b[:, 4:])
    assert steps.max() <= 2  # of 65,535: other kernels add in another order
    assert (GOLDEN / "base.bin").stat().st_size == head + n * ours.row_bytes


@pytest.mark.native
def test_llama_perplexitys_base_file_is_taken(small: Path) -> None:
    found = evaluate_divergence(small, GOLDEN / "base.bin")
    assert abs(found.kl_divergence.mean) < 1e-4
    assert found.same_top.value == 1
    assert found.base_perplexity is None
    assert found.base == "base.bin"


@pytest.mark.native
def test_base_of_another_model_is_refused_before_it_is_run(
    tiny_pair: Callable[[str], tuple[Path, Path]],
) -> None:
    with pytest.raises(EvaluationError, match=r"another vocabulary \(288 tokens"):
        evaluate_divergence(tiny_pair("q8_0")[0], GOLDEN / "base.bin")


@pytest.mark.native
def test_base_may_be_a_model(small: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nothing to run it on"):
        evaluate_divergence(small, small)
    corpus = Corpus(GOLDEN / "text.txt", n_ctx=SMALL_N_CTX, n_chunks=2)
    told: list[PassageProgress] = []
    found = evaluate_divergence(small, small, corpus, on_passage=told.append)
    assert abs(found.kl_divergence.mean) < 1e-4
    assert len(told) == 4


@pytest.mark.native
@pytest.mark.parametrize("n_told", [1, 3])
def test_interrupted_divergence_leaves_no_temporary_base(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_told: int
) -> None:
    """While the base is run (two chunks), and while the model is."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    corpus = Corpus(GOLDEN / "text.txt", n_ctx=SMALL_N_CTX, n_chunks=2)
    told: list[PassageProgress] = []

    def interrupt(progress: PassageProgress) -> None:
        told.append(progress)
        assert [path.is_dir() for path in tmp_path.iterdir()] == [True]
        if len(told) == n_told:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_divergence(small, small, corpus, on_passage=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.native
def test_transcripts_with_screens_are_measured(
    tiny_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """A tap on a drawn screen: q8_0 is closer to f32 than q4_0 is."""
    from autoglm_gguf.evaluate.screens import draw_screen, held_out_tasks

    steps = []
    for task in held_out_tasks(2):
        image = draw_screen(task.screen).resize((112, 224))
        content = [{"type": "image", "image": image}, {"type": "text", "text": task.text}]
        answer = f"<think>点击屏幕。</think>\n<answer>{task.action.render()}</answer>"
        steps.append(
            [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        )
    text, mmproj = tiny_pair("f32")
    corpus = Corpus(steps, n_ctx=512)
    path = tmp_path / "base"
    base = evaluate_perplexity(text, corpus, mmproj=mmproj, save_base=path)
    assert base.kind == "transcripts"
    assert base.perplexity.value < 100  # it was trained to say about this
    found = [
        evaluate_divergence(tiny_pair(kind)[0], path, corpus, mmproj=mmproj).kl_divergence.mean
        for kind in ("f32", "q8_0", "q4_0")
    ]
    assert found[0] < 1e-4
    assert found == sorted(found)
