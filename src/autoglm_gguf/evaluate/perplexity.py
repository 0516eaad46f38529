"""`evaluate_perplexity` and `evaluate_divergence`: how well a model predicts, and how far from its
base.

Figures are llama-perplexity's on the same model and text: chunks of n_ctx, the second half of each
scored. Of transcripts, the answers are scored. Needs no torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.errors import EvaluationError
from autoglm_gguf.evaluate import base_file, scores
from autoglm_gguf.evaluate.base_file import BaseHeader, BaseRows, create_base, read_base
from autoglm_gguf.evaluate.measuring import (
    Clock,
    Measured,
    OnLoad,
    OnPassage,
    open_measured,
    read_logits,
)
from autoglm_gguf.evaluate.outfile import check_outfile
from autoglm_gguf.evaluate.passages import (
    Corpus,
    Kind,
    Passage,
    Passages,
    TextChunks,
    cut_corpus,
    read_corpus,
)
from autoglm_gguf.evaluate.scores import Estimate, Spread, TokenScores
from autoglm_gguf.gguf.header import MAGIC
from autoglm_gguf.hub import resolve_pair
from autoglm_gguf.memory.budget import DEFAULT_BUDGET, Budget

_ANSWER_OUTPUTS = 128  # tokens of an answer whose logits are held at a time


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a corpus."""

    model: str
    corpus: str
    kind: Kind
    n_ctx: int
    n_passages: int
    """Chunks, or transcripts."""
    n_tokens: int
    """Scored ones."""
    perplexity: Estimate
    nll: Estimate
    """Mean negative log-probability of a token, nats."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a model is from its base."""

    model: str
    base: str
    """The base model's name; the file's where that does not say."""
    corpus: str
    kind: Kind
    n_ctx: int
    n_passages: int
    n_tokens: int
    kl_divergence: Spread
    """Of the model from the base, nats a token."""
    same_top: Estimate
    """Share of the tokens before which both hold the same one the most probable, 0 to 1."""
    delta_p: Estimate
    """Probability of the token that comes, less the base's: mean, -1 to 1."""
    delta_p_rms: float
    perplexity: Estimate
    base_perplexity: Estimate | None
    """None where the base file, made by llama-perplexity, does not say."""
    log_ratio: Estimate
    """ln(perplexity / base's perplexity), token by token, with the base's log-probabilities as the
    file has them: cut off at `scores.FLOOR`. Only where that floor is never met is it their
    quotient's logarithm."""
    seconds: float


def evaluate_perplexity(
    model: str | os.PathLike[str],
    corpus: Corpus | str | os.PathLike[str],
    *,
    save_base: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = "auto",
    memory_budget: Budget = DEFAULT_BUDGET,
    on_load: OnLoad | None = None,
    on_passage: OnPassage | None = None,
    **context: Any,
) -> Perplexity:
    """Measure how well a model predicts a text, or the answers of transcripts.

    Args:
        model: A text GGUF, or a directory with one.
        corpus: A file, or a `Corpus` that says how it is cut.
        save_base: Write the log-probabilities there, for `evaluate_divergence` of other types of
            the model: two bytes for each token of the vocabulary and each scored token.
        mmproj: The vision tower, for transcripts with images.
        memory_budget: For everything the process holds; see `plan_memory`.
        on_load: Told what was loaded, and how: its ``notes`` say what was made smaller.
        on_passage: Told after each chunk or transcript, with the perplexity so far.
        **context: Fields of `ContextParams` but n_ctx, which is the corpus's; ``self_test``.

    Raises:
        ValueError, TypeError: An argument out of range.
        EvaluationError: The corpus is missing, not UTF-8, too short or no transcripts; or the base
            cannot be written.
        ContextFullError: A transcript that does not fit n_ctx.
        AutoGLMError: What `AutoGLM.load` raises.
    """
    corpus = _as_corpus(corpus)
    content = read_corpus(corpus)
    path = None if save_base is None else Path(save_base)
    if path is not None:
        check_outfile(path, *resolve_pair(model, mmproj), corpus.path)
    with open_measured(
        model,
        corpus,
        mmproj=mmproj,
        memory_budget=memory_budget,
        n_outputs=_count_outputs(corpus),
        on_load=on_load,
        **context,
    ) as engine:
        passages = cut_corpus(engine, corpus, content)
        return measure_perplexity(engine, passages, corpus, save_base=path, on_passage=on_passage)


def measure_perplexity(
    engine: Measured,
    passages: Passages,
    corpus: Corpus,
    *,
    save_base: Path | None = None,
    on_passage: OnPassage | None = None,
) -> Perplexity:
    """`evaluate_perplexity` with an engine and passages."""
    clock = Clock(len(passages), on_passage, "perplexity")
    if save_base is None:
        nll = np.concatenate(list(_score(engine, passages, clock)))
    else:
        with create_base(save_base, passages, engine.info.n_vocab) as writer:
            nll = np.concatenate(list(_score(engine, passages, clock, writer)))
            mean = scores.estimate_mean(nll)
            writer.facts |= {
                base_file.MODEL: engine.info.name,
                base_file.CORPUS: corpus.name,
                base_file.VOCABULARY: engine.vocabulary_key,
                base_file.NLL: [mean.value, mean.error],
            }
    return Perplexity(
        engine.info.name,
        corpus.name,
        passages.kind,
        engine.info.n_ctx,
        len(passages),
        nll.size,
        scores.estimate_perplexity(nll),
        scores.estimate_mean(nll),
        clock.seconds,
    )


def evaluate_divergence(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    corpus: Corpus | str | os.PathLike[str] | None = None,
    *,
    mmproj: str | os.PathLike[str] | None = "auto",
    memory_budget: Budget = DEFAULT_BUDGET,
    on_load: OnLoad | None = None,
    on_passage: OnPassage | None = None,
    **context: Any,
) -> Divergence:
    """Measure how far a model's predictions are from its base's, token by token.

    Args:
        model: A text GGUF, or a directory with one.
        base: A file of `evaluate_perplexity`'s ``save_base`` or of llama-perplexity's
            ``--kl-divergence-base``; or the base model's GGUF, which is run first, its
            log-probabilities in a temporary file meanwhile.
        corpus: Needed for transcripts and where the base is a model. A base file of a text has the
            text's tokens, and a corpus that is given all the same must have the same ones.
        mmproj: The vision tower, for transcripts with images; of both.
        memory_budget: See `plan_memory`.
        on_load: As in `evaluate_perplexity`; of a base that is a model first.
        on_passage: Told after each chunk or transcript, with the mean KL divergence so far (while
            the base is run, its perplexity).
        **context: As in `evaluate_perplexity`.

    Raises:
        ValueError, TypeError: An argument out of range.
        EvaluationError: See `evaluate_perplexity`; or the base has another vocabulary, text or
            n_ctx, is broken, or was made of transcripts and none are given.
        AutoGLMError: What `AutoGLM.load` raises.
    """
    given = None if corpus is None else _as_corpus(corpus)
    context |= {"mmproj": mmproj, "memory_budget": memory_budget, "on_load": on_load}
    if not _is_gguf(Path(base)):
        return _diverge(model, read_base(Path(base)), given, on_passage, context)
    if given is None:
        raise EvaluationError(
            f"{base}: a model, and nothing to run it on",
            hint="give the text or the transcripts too: --text FILE",
        )
    with tempfile.TemporaryDirectory(prefix="autoglm-gguf-") as folder:
        path = Path(folder) / f"{Path(base).stem}.base"
        evaluate_perplexity(base, given, save_base=path, on_passage=on_passage, **context)
        return _diverge(model, read_base(path), given, on_passage, context)


def measure_divergence(
    engine: Measured,
    passages: Passages,
    corpus_name: str,
    base: BaseHeader,
    *,
    on_passage: OnPassage | None = None,
) -> Divergence:
    """`evaluate_divergence` with an engine and passages that `check_base` lets pass."""
    clock = Clock(len(passages), on_passage, "kl_divergence")
    parts: list[TokenScores] = []
    with BaseRows(base) as rows:
        for passage in passages:
            blocks = [
                scores.compare_with_base(block, rows.read(len(block)), targets)
                for block, targets in read_logits(engine, passage, passages.kind)
            ]
            parts.append(scores.join_scores(blocks))
            divergences = [part.kl_divergence for part in parts]
            clock.tick(float(np.concatenate(divergences).mean()))
    found = scores.join_scores(parts)
    nll = base.facts.get(base_file.NLL)
    return Divergence(
        engine.info.name,
        str(base.facts.get(base_file.MODEL, base.path.name)),
        corpus_name,
        passages.kind,
        engine.info.n_ctx,
        len(passages),
        found.nll.size,
        scores.spread(found.kl_divergence),
        scores.estimate_mean(found.same_top),
        scores.estimate_mean(found.delta_p),
        float(np.sqrt((found.delta_p**2).mean())),
        scores.estimate_perplexity(found.nll),
        _perplexity_of(nll),
        scores.estimate_log_ratio(found),
        clock.seconds,
    )


def check_base(base: BaseHeader, engine: Measured, passages: Passages) -> None:
    """Refuse a base that was not made with this vocabulary and from these passages.

    Raises:
        EvaluationError: It was not.
    """
    name, n_vocab = base.path.name, engine.info.n_vocab
    made_with = base.facts.get(base_file.VOCABULARY)
    if base.n_vocab != n_vocab or made_with not in (None, engine.vocabulary_key):
        sizes = f"{base.n_vocab} tokens, {engine.info.name} has {n_vocab}"
        what = sizes if base.n_vocab != n_vocab else "as many tokens, but other ones"
        raise EvaluationError(
            f"{name}: made with another vocabulary ({what})",
            hint="compare types of one model; make the base with its own largest type",
        )
    if base.kind != passages.kind:
        raise EvaluationError(
            f"{name}: made from {base.kind}, not from {passages.kind}",
            hint="give what the base was made from",
        )
    if isinstance(passages, TextChunks):
        assert base.tokens is not None
        if base.tokens.shape[1] != passages.tokens.shape[1]:
            raise EvaluationError(
                f"{name}: made with n_ctx {base.tokens.shape[1]}, not {passages.tokens.shape[1]}",
                hint=f"--n-ctx {base.tokens.shape[1]}, or leave the text out",
            )
        same = np.array_equal(base.tokens, passages.tokens)
    else:
        same = base.keys == tuple(passage.key for passage in passages)
    if not same:
        raise EvaluationError(
            f"{name}: made from another {'text' if base.kind == 'text' else 'set of transcripts'} "
            f"({len(base.n_scored)} passages, {len(passages)} here)",
            hint="give the same file, template and sizes as for the base, or make the base again",
        )


def _diverge(
    model: str | os.PathLike[str],
    base: BaseHeader,
    corpus: Corpus | None,
    on_passage: OnPassage | None,
    context: dict[str, Any],
) -> Divergence:
    if base.kind == "transcripts" and corpus is None:
        raise EvaluationError(
            f"{base.path.name}: made from transcripts, and it does not hold them",
            hint="give them too: --transcripts FILE",
        )
    content = None if corpus is None else read_corpus(corpus)
    if corpus is None:
        assert base.tokens is not None
        name = str(base.facts.get(base_file.CORPUS, base.path))
        corpus = Corpus(name, kind="text", n_ctx=base.tokens.shape[1])
    with open_measured(model, corpus, n_outputs=_count_outputs(corpus), **context) as engine:
        passages: Passages
        if content is None:
            assert base.tokens is not None
            passages = TextChunks(base.tokens, engine.bos)
        else:
            passages = cut_corpus(engine, corpus, content)
        check_base(base, engine, passages)
        return measure_divergence(engine, passages, corpus.name, base, on_passage=on_passage)


def _score(
    engine: Measured,
    passages: Passages,
    clock: Clock,
    writer: base_file.BaseWriter | None = None,
) -> Iterator[NDArray[np.float64]]:
    """Negative log-likelihoods, passage by passage."""
    total, n = 0.0, 0

    def blocks(passage: Passage) -> Iterator[NDArray[np.float64]]:
        for rows, targets in read_logits(engine, passage, passages.kind):
            if writer is not None:
                writer.add(scores.encode_base(rows))
            yield scores.negative_log_likelihoods(rows, targets)

    for passage in passages:
        nll = np.concatenate(list(blocks(passage)))
        yield nll
        total, n = total + float(nll.sum()), n + nll.size
        clock.tick(float(np.exp(min(total / n, 700))))


def _perplexity_of(nll: Any) -> Estimate | None:
    """From the facts of a base file, which anyone may have written."""
    if not (isinstance(nll, list) and len(nll) == 2):
        return None
    if not all(isinstance(n, int | float) and 0 <= n < 700 for n in nll):
        return None
    value = float(np.exp(nll[0]))
    return Estimate(value, value * nll[1])


def _count_outputs(corpus: Corpus) -> int:
    """Of a chunk's second half; of an answer, some at a time."""
    n_ctx = corpus.resolved.n_ctx
    assert n_ctx is not None
    if corpus.resolved.kind == "text":
        return n_ctx - n_ctx // 2
    return min(n_ctx, _ANSWER_OUTPUTS)


def _as_corpus(corpus: Corpus | str | os.PathLike[str]) -> Corpus:
    return corpus if isinstance(corpus, Corpus) else Corpus(corpus)


def _is_gguf(path: Path) -> bool:
    """Whether a base is a model: a GGUF file, or a directory with one."""
    if path.is_dir():
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
