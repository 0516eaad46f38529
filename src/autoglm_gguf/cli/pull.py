"""``autoglm-gguf pull``: a repo's checkpoint into the cache, verified."""

from __future__ import annotations

import argparse
import time

from autoglm_gguf.cli import output
from autoglm_gguf.hub import pull
from autoglm_gguf.units import format_bytes, format_seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("pull", help="download and verify a checkpoint")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub, or on HF_ENDPOINT")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: main)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Pull and print the snapshot's directory."""
    began = time.monotonic()
    try:
        snapshot = pull(
            arguments.repo, revision=arguments.revision, on_progress=output.ProgressLine()
        )
    except KeyboardInterrupt:
        output.note("\nwhat came so far is kept; the same command goes on from there")
        raise
    found = sorted(path for path in snapshot.iterdir() if path.is_file())
    sizes = {path.name: path.stat().st_size for path in found}
    if arguments.json:
        output.write_json(
            {
                "path": str(snapshot),
                "commit": snapshot.name,
                "files": {name: {"n_bytes": n_bytes} for name, n_bytes in sizes.items()},
            }
        )
        return
    output.write(str(snapshot))
    seconds = format_seconds(time.monotonic() - began)
    output.note(f"{len(sizes)} files, {format_bytes(sum(sizes.values()))}, verified in {seconds}")
