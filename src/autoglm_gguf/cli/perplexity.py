"""``autoglm-gguf evaluate perplexity`` and ``evaluate divergence``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from autoglm_gguf.cli import options, output
from autoglm_gguf.cli.corpus import Watcher, add_options, read_options
from autoglm_gguf.evaluate.perplexity import (
    Divergence,
    Perplexity,
    evaluate_divergence,
    evaluate_perplexity,
)
from autoglm_gguf.evaluate.scores import Estimate


def add_parsers(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe both."""
    parser = kinds.add_parser("perplexity", help="how well a model predicts a text or answers")
    add_options(parser)
    parser.add_argument(
        "--save-base",
        metavar="FILE",
        help="write the log-probabilities, for divergence; llama-perplexity reads those of a text",
    )
    parser.set_defaults(run=run_perplexity)
    parser = kinds.add_parser(
        "divergence", help="how far a model's predictions are from its base's"
    )
    parser.add_argument(
        "--base",
        required=True,
        metavar="FILE",
        help="what --save-base or llama-perplexity --kl-divergence-base wrote; or the base's GGUF",
    )
    add_options(parser, is_needed=False)
    parser.set_defaults(run=run_divergence)


def run_perplexity(arguments: argparse.Namespace) -> None:
    """Measure, and print two lines."""
    corpus, given = read_options(arguments)
    assert corpus is not None
    watcher = Watcher()
    model, mmproj = options.find_model(arguments)
    found = evaluate_perplexity(
        model,
        corpus,
        save_base=arguments.save_base,
        mmproj=mmproj,
        on_load=watcher.on_load,
        on_passage=watcher.on_passage,
        **given,
    )
    if arguments.json:
        output.write_json(asdict(found))
    else:
        output.write(_head(found))
        output.write(f"{'perplexity':<14}{_show(found.perplexity)}")
        output.write(f"{'nats a token':<14}{_show(found.nll)}")
    if arguments.stats:
        watcher.tell_memory()


def run_divergence(arguments: argparse.Namespace) -> None:
    """Measure, and print the spread."""
    corpus, given = read_options(arguments)
    watcher = Watcher()
    model, mmproj = options.find_model(arguments)
    found = evaluate_divergence(
        model,
        arguments.base,
        corpus,
        mmproj=mmproj,
        on_load=watcher.on_load,
        on_passage=watcher.on_passage,
        **given,
    )
    if arguments.json:
        output.write_json(asdict(found))
    else:
        _print(found)
    if arguments.stats:
        watcher.tell_memory()


def _print(found: Divergence) -> None:
    kl = found.kl_divergence
    output.write(f"{_head(found)}, base {output.escape_controls(found.base)}")
    output.write(f"{'KL divergence':<14}{_show(Estimate(kl.mean, kl.error))}")
    for name, value in (
        ("median", kl.median),
        ("90 %", kl.p90),
        ("95 %", kl.p95),
        ("99 %", kl.p99),
        ("99.9 %", kl.p99_9),
        ("maximum", kl.maximum),
    ):
        output.write(f"  {name:<12}{value:.6f}")
    output.write(f"{'same top':<14}{_percent(found.same_top)}")
    output.write(f"{'delta p':<14}{_percent(found.delta_p)}, RMS {found.delta_p_rms:.3%}")
    base = "unknown" if found.base_perplexity is None else _show(found.base_perplexity)
    output.write(f"{'perplexity':<14}{_show(found.perplexity)}, base {base}")


def _head(found: Perplexity | Divergence) -> str:
    kind = "transcripts" if found.kind == "transcripts" else f"chunks of {found.n_ctx}"
    names = output.escape_controls(f"{found.model}: {found.corpus}")
    return f"{names}, {found.n_passages} {kind}, {found.n_tokens} tokens scored"


def _show(estimate: Estimate) -> str:
    return f"{estimate.value:.6f} ± {estimate.error:.6f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.3%} ± {estimate.error:.3%}"
