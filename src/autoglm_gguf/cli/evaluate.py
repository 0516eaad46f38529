"""``autoglm-gguf evaluate``; ``actions``: how well a model hits what it is asked to tap."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from autoglm_gguf.cli import options, output, perplexity
from autoglm_gguf.cli.plan import draw_memory
from autoglm_gguf.evaluate.actions import IMAGE_TOKENS, N_SCREENS, Report, Score, evaluate_actions
from autoglm_gguf.evaluate.screens import HELD_OUT_SEED
from autoglm_gguf.hub import resolve_checkpoint
from autoglm_gguf.session import AUTO_SYSTEM


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    evaluate = commands.add_parser("evaluate", help="measure what a model does right")
    kinds = evaluate.add_subparsers(required=True, metavar="WHAT")
    perplexity.add_parsers(kinds)
    parser = kinds.add_parser(
        "actions",
        help="taps on drawn screens with known targets",
        conflict_handler="resolve",  # several sizes here, where other commands take one
    )
    options.add_model_options(parser)
    parser.add_argument(
        "--max-image-tokens",
        dest="image_tokens",
        type=_sizes,
        default=IMAGE_TOKENS,
        metavar="N,N",
        help="sizes to try (default: 32,72, autoglm-tiny's; the 9B wants 512 and more)",
    )
    parser.add_argument(
        "--against",
        metavar="CHECKPOINT",
        help="let the original answer too: directory or repo id (needs torch; slow for a 9B)",
    )
    parser.add_argument(
        "--screens", type=int, default=N_SCREENS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=HELD_OUT_SEED, metavar="N", help="other screens"
    )
    parser.add_argument("--no-system", action="store_true", help="leave the system prompt out")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run, max_image_tokens=None)


def run(arguments: argparse.Namespace) -> None:
    """Ask, and print a row for each size."""
    checkpoint = None
    if arguments.against is not None:
        checkpoint = resolve_checkpoint(arguments.against, on_progress=output.ProgressLine())
    given = {
        "n": arguments.screens,
        "max_image_tokens": arguments.image_tokens,
        "seed": arguments.seed,
        "system": None if arguments.no_system else AUTO_SYSTEM,
        "on_screen": _progress,
    }
    with options.load_model(arguments) as model:
        if checkpoint is None:
            report = evaluate_actions(model, **given)
        else:
            from autoglm_gguf.evaluate.original import OriginalModel

            with OriginalModel(checkpoint) as original:
                report = evaluate_actions(model, original=original, **given)
        memory = [*draw_memory(model)] if arguments.stats else []
    if arguments.json:
        output.write_json(asdict(report))
    else:
        _print(report)
    for line in memory:
        output.note(line)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: not numbers such as 32,72") from None


def _print(report: Report) -> None:
    width, height = report.screen_size
    output.write(f"{report.model}: held-out screens of {width}x{height} px, seed {report.seed}")
    output.write(
        f"{'':<10} {'image tokens':>12} {'screens':>8} {'hits':>7} {'exact':>7} {'taps':>6} "
        f"{'mean error':>11}"
    )
    for size in report.sizes:
        _row("model", size.ours)
        if size.original is not None and size.n_same is not None:
            _row("original", size.original)
            apart = _pixels(size.mean_distance_px)
            same = size.n_same / size.ours.n
            output.write(f"{'':<10} same action on {same:.1%}, taps {apart} apart on average")


def _row(who: str, score: Score) -> None:
    output.write(
        f"{who:<10} {score.image_tokens:>12} {score.n:>8} {score.hit_rate:>7.1%} "
        f"{score.n_exact / score.n:>7.1%} {score.n_taps:>6} {_pixels(score.mean_error_px):>11}"
    )


def _pixels(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} px"


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        output.note(f"\r\x1b[K{done} of {total} answers", end="\n" if done == total else "")
