"""``autoglm-gguf convert``: a checkpoint to a GGUF pair."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from autoglm_gguf.cli import output
from autoglm_gguf.conversion.backends import BACKEND_TYPES
from autoglm_gguf.conversion.fit import PREFERENCES, Fit
from autoglm_gguf.conversion.fitting import FitReport
from autoglm_gguf.conversion.pipeline import DEFAULT_OUTTYPE, convert
from autoglm_gguf.conversion.recipe import OUTTYPES
from autoglm_gguf.gguf.names import FIT_PREFIX
from autoglm_gguf.memory.budget import DEFAULT_BUDGET
from autoglm_gguf.units import format_bytes, format_seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("convert", help="convert a checkpoint to a GGUF pair")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or repo id")
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of the repo (default: main)"
    )
    parser.add_argument("--outdir", default=".", metavar="DIR", help="where the files go")
    parser.add_argument(
        "--outtype", metavar="TYPE", help=f"{', '.join(OUTTYPES)} (default: {DEFAULT_OUTTYPE})"
    )
    parser.add_argument(
        "--mmproj-outtype", metavar="TYPE", help="vision tower (default: OUTTYPE, at least q8_0)"
    )
    _add_fit_options(parser)
    parser.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="an exception, for example attn_v=q8_0; may be given several times",
    )
    parser.add_argument(
        "--imatrix", metavar="FILE", help="importance matrix, of calibrate or llama-imatrix"
    )
    parser.add_argument("--name", help="base of the file names (default: the directory's name)")
    parser.add_argument("--n-threads", type=int, metavar="N", help="default: usable cores")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def _add_fit_options(parser: argparse.ArgumentParser) -> None:
    default = Fit(budget=DEFAULT_BUDGET)
    group = parser.add_argument_group(
        "fit", "choose a type for every matrix, so that a limit is kept at the least error"
    )
    limit = group.add_mutually_exclusive_group()
    limit.add_argument(
        "--fit", metavar="SIZE", help="of the whole run, as --memory-budget: 4GB, 4GiB"
    )
    limit.add_argument("--fit-weights", metavar="SIZE", help="of the text file alone")
    group.add_argument(
        "--n-ctx", type=int, metavar="N", help=f"context of the run (default: {default.n_ctx})"
    )
    group.add_argument(
        "--image-tokens",
        type=int,
        metavar="N",
        help=f"largest image of the run (default: {default.image_tokens})",
    )
    group.add_argument(
        "--prefer",
        choices=PREFERENCES,
        help=f"speed leaves out types that decode slowly on CPUs (default: {default.prefer})",
    )
    group.add_argument(
        "--backend",
        choices=sorted(BACKEND_TYPES),
        help=f"where it will run; types that it lacks are left out (default: {default.backend})",
    )
    parser.add_argument(
        "--search-scales",
        action="store_true",
        help="better scales than ggml's for q4_0, q4_1, q5_0, q5_1 and q8_0; a fit always does",
    )


def _fit(arguments: argparse.Namespace) -> Fit | None:
    keys = ("n_ctx", "image_tokens", "prefer", "backend")
    given = {key: value for key in keys if (value := getattr(arguments, key)) is not None}
    options = {key: f"--{key.replace('_', '-')}" for key in given}
    if arguments.fit is None and arguments.fit_weights is None:
        if options:
            option = next(iter(options.values()))
            raise ValueError(f"{option}: belongs to a fit (give --fit or --fit-weights)")
        return None
    if arguments.fit is None and (of_run := options.keys() & {"n_ctx", "image_tokens"}):
        raise ValueError(
            f"{options[min(of_run)]}: belongs to a run (--fit); --fit-weights bounds a file"
        )
    return Fit(budget=arguments.fit, weights=arguments.fit_weights, **given)


def run(arguments: argparse.Namespace) -> None:
    """Convert and print the two files."""
    began = time.monotonic()
    pair = convert(
        arguments.checkpoint,
        arguments.outdir,
        arguments.outtype,
        revision=arguments.revision,
        mmproj_outtype=arguments.mmproj_outtype,
        tensor_types=arguments.tensor_type,
        imatrix=arguments.imatrix,
        fit=_fit(arguments),
        search_scales=arguments.search_scales,
        name=arguments.name,
        n_threads=arguments.n_threads,
        on_progress=output.ProgressLine(),
    )
    seconds = time.monotonic() - began
    files = {"text": pair.text} | ({"mmproj": pair.mmproj} if pair.mmproj else {})
    if arguments.json:
        report: dict[str, Any] = {
            "files": {
                part: {"path": str(path), "n_bytes": path.stat().st_size}
                for part, path in files.items()
            },
            "seconds": round(seconds, 3),
        }
        if pair.fit is not None:
            report["fit"] = {
                key.removeprefix(FIT_PREFIX): value for key, value in pair.fit.keys().items()
            }
        output.write_json(report)
        return
    for part, path in files.items():
        output.write(f"{part:<7} {format_bytes(path.stat().st_size):>10}  {path}")
    if pair.fit is not None:
        for line in describe_fit(pair.fit):
            output.write(line)
    output.note(f"converted in {format_seconds(seconds)}")


def describe_fit(report: FitReport) -> Iterator[str]:
    """What was chosen, in a few lines."""
    fit, plan = report.fit, report.plan
    types = ", ".join(f"{kind} ×{n}" for kind, n in report.types.items())
    yield f"types   {types}"
    yield (
        f"error   {report.estimated_error:.4g} ± {report.sampling_error:.2g} by sampling, "
        f"at most {report.gap:.2%} above the best mix"
    )
    if plan is None:
        return
    yield (
        f"run     {format_bytes(plan.peak_bytes)} of {format_bytes(fit.limit_bytes)} with n_ctx "
        f"{fit.n_ctx} and {fit.image_tokens} image tokens; weights {plan.weights}"
    )
    for note in plan.notes:
        yield f"        {note}"
