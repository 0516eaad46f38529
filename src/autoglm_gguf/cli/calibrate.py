"""``autoglm-gguf calibrate``: an importance matrix for ``convert --imatrix``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from autoglm_gguf.cli import options, output
from autoglm_gguf.cli.corpus import Watcher, add_options, read_options
from autoglm_gguf.evaluate.calibration import OUTFILE, calibrate
from autoglm_gguf.units import format_seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "calibrate", help="run a model over a text and write its importance matrix"
    )
    add_options(parser)
    parser.add_argument(
        "--outfile",
        default=OUTFILE,
        metavar="FILE",
        help="importance matrix (default: %(default)s)",
    )
    parser.add_argument(
        "--process-output", action="store_true", help="collect for the output matrix too"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run it, and tell what was written."""
    corpus, given = read_options(arguments)
    assert corpus is not None
    watcher = Watcher()
    model, mmproj = options.find_model(arguments)
    made = calibrate(
        model,
        corpus,
        arguments.outfile,
        process_output=arguments.process_output,
        mmproj=mmproj,
        on_load=watcher.on_load,
        on_passage=watcher.on_passage,
        **given,
    )
    if arguments.json:
        output.write_json({**asdict(made), "path": str(made.path)})
    else:
        kind = "transcripts" if arguments.text is None else f"chunks of {made.n_ctx}"
        output.write(
            f"{made.path}: {made.n_tensors} matrices, {made.n_tokens} tokens of {made.corpus} "
            f"({made.n_passages} {kind})"
        )
        model = output.escape_controls(made.model)
        output.note(f"{model}: {format_seconds(made.seconds)}")
    if arguments.stats:
        watcher.tell_memory()
