"""``autoglm-gguf``: parses the command line, runs one command, turns errors into exit codes."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from autoglm_gguf import __version__
from autoglm_gguf.cli import act, bench, chat, convert, inspect, output, plan, pull, verify
from autoglm_gguf.cli.errors import EXIT_OK, report

_COMMANDS = (pull, convert, inspect, plan, chat, act, verify, bench)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="autoglm-gguf", description="AutoGLM on your own device, with llama.cpp."
    )
    parser.add_argument("--version", action="version", version=f"autoglm-gguf {__version__}")
    parser.add_argument("--verbose", action="store_true", help="show llama.cpp's own log")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; by default the process's.

    Returns:
        0 done, 1 our error, 2 usage, 130 interrupted.
    """
    output.escape_unprintable()
    parsed = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(name)s: %(message)s")  # warnings and worse, to stderr
    level = logging.DEBUG if parsed.verbose else logging.CRITICAL
    logging.getLogger("autoglm_gguf.llama_cpp").setLevel(level)
    try:
        parsed.run(parsed)
    except BaseException as error:
        return report(error)
    return EXIT_OK
