"""Write docs/reference/cli.md: every command and option, out of the parsers themselves.

    python scripts/cli_reference.py

A test compares the page with what this writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoglm_gguf.cli.main import build_parser

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
HEAD = """\
# The command line

<!-- written by scripts/cli_reference.py; do not edit -->

`autoglm-gguf COMMAND` and `python -m autoglm_gguf COMMAND` are the same. MODEL is a text GGUF,
whose mmproj is found beside it, or a folder with one. Data goes to stdout, progress and hints to
stderr. Exit codes: 0 done, 1 an error with a hint, 2 wrong usage, 130 interrupted. Sizes are `4GB`
(10⁹ bytes each) or `4GiB` (2³⁰).
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), "utf-8")


def render() -> str:
    """The page's text."""
    parser = build_parser()
    parts = [HEAD, _section("autoglm-gguf", 2, "Before the command", parser)]
    parts += [_section(*found) for found in _commands(parser, 2)]
    return "\n".join(parts)


def _commands(
    parser: argparse.ArgumentParser, level: int
) -> Iterator[tuple[str, int, str, argparse.ArgumentParser]]:
    """Each command's name, heading level, help and parser, in the order of ``--help``."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, inner in action.choices.items():
            yield inner.prog.removeprefix("autoglm-gguf "), level, helps[name], inner
            yield from _commands(inner, level + 1)


def _section(name: str, level: int, about: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"{'#' * level} {name}", "", _sentence(about), ""]
    plain, *own = _groups(parser)
    lines += _table(plain, parser)
    for title, about_group, actions in own:
        lines += [f"{title.capitalize()}: {_sentence(about_group)}", "", *_table(actions, parser)]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _groups(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Arguments and options together; then title, description and options of each group."""
    told = [
        (group.title, group.description, [a for a in group._group_actions if _is_told(a)])
        for group in parser._action_groups
    ]
    yield [action for _, description, actions in told if not description for action in actions]
    yield from ((title, about, actions) for title, about, actions in told if about and actions)


def _table(actions: list[argparse.Action], parser: argparse.ArgumentParser) -> list[str]:
    rows = [f"| {_name(action)} | {_about(action, parser)} |" for action in actions]
    return ["| option | |", "|---|---|", *rows, ""] if rows else []


def _is_told(action: argparse.Action) -> bool:
    return not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = "" if action.nargs == 0 else _value(action)
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, tuple):
        return "".join(f" {name}" for name in action.metavar)
    if action.metavar is None and action.choices is not None:
        return f" {{{','.join(map(str, action.choices))}}}"
    return f" {action.metavar or action.dest.upper()}"


def _about(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    default = action.default
    is_plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    if action.option_strings and action.nargs != 0 and is_plain and "default" not in text:
        text += f"{' ' if text else ''}(default: {default})"
    if action.required and action.option_strings:
        text += " (required)"
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
