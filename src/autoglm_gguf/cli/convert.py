"""``autoglm-gguf convert``: a checkpoint to a GGUF pair."""

from __future__ import annotations

import argparse
import time

from autoglm_gguf.cli import output
from autoglm_gguf.conversion.pipeline import convert
from autoglm_gguf.conversion.recipe import OUTTYPES
from autoglm_gguf.units import format_bytes, format_seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("convert", help="convert a checkpoint to a GGUF pair")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or repo id")
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of the repo (default: main)"
    )
    parser.add_argument("--outdir", default=".", metavar="DIR", help="where the files go")
    parser.add_argument("--outtype", default="q8_0", metavar="TYPE", help=", ".join(OUTTYPES))
    parser.add_argument(
        "--mmproj-outtype", metavar="TYPE", help="vision tower (default: OUTTYPE, at least q8_0)"
    )
    parser.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="an exception, for example attn_v=q8_0; may be given several times",
    )
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix of llama.cpp")
    parser.add_argument("--name", help="base of the file names (default: the directory's name)")
    parser.add_argument("--n-threads", type=int, metavar="N", help="default: usable cores")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


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
        name=arguments.name,
        n_threads=arguments.n_threads,
        on_progress=output.ProgressLine(),
    )
    seconds = time.monotonic() - began
    files = {"text": pair.text} | ({"mmproj": pair.mmproj} if pair.mmproj else {})
    if arguments.json:
        output.write_json(
            {
                "files": {
                    part: {"path": str(path), "n_bytes": path.stat().st_size}
                    for part, path in files.items()
                },
                "seconds": round(seconds, 3),
            }
        )
        return
    for part, path in files.items():
        output.write(f"{part:<7} {format_bytes(path.stat().st_size):>10}  {path}")
    output.note(f"converted in {format_seconds(seconds)}")
