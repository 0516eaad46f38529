"""``autoglm-gguf``: parses the command line, runs one command, turns errors into exit codes."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from autoglm_gguf import __version__
from autoglm_gguf.cli import output
from autoglm_gguf.cli.errors import EXIT_OK, report

# Modules of this folder. One is imported when it is asked for: doctor runs where numpy is missing.
_COMMANDS = (
    *("pull", "convert", "inspect", "plan", "chat", "act"),
    *("serve", "verify", "calibrate", "evaluate", "bench", "doctor"),
)


def build_parser(names: Sequence[str] = _COMMANDS) -> argparse.ArgumentParser:
    """The command line, with all commands or some.

    Raises:
        ImportError: A package that one of them needs is missing.
    """
    parser = argparse.ArgumentParser(
        prog="autoglm-gguf", description="AutoGLM on your own device, with llama.cpp."
    )
    parser.add_argument("--version", action="version", version=f"autoglm-gguf {__version__}")
    parser.add_argument("--verbose", action="store_true", help="show llama.cpp's own log")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in names:
        importlib.import_module(f"autoglm_gguf.cli.{name}").add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; by default the process's.

    Returns:
        0 done, 1 our error, 2 usage, 130 interrupted.
    """
    output.escape_unprintable()
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = next((word for word in given if word != "--verbose"), "")
    names = [first] if first in _COMMANDS else _COMMANDS if first != "--version" else ()
    try:
        parsed = build_parser(names).parse_args(given)
        logging.basicConfig(format="%(name)s: %(message)s")  # warnings and worse, to stderr
        level = logging.DEBUG if parsed.verbose else logging.CRITICAL
        logging.getLogger("autoglm_gguf.llama_cpp").setLevel(level)
        parsed.run(parsed)
    except BaseException as error:
        return report(error)
    return EXIT_OK
