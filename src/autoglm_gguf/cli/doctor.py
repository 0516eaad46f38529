"""``autoglm-gguf doctor``: what is installed, how it was built, and what to do where it is amiss.

Draws findings as they are made; the looking is `autoglm_gguf.doctor`'s.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from autoglm_gguf.cli import output
from autoglm_gguf.doctor.examine import examine
from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.errors import AutoGLMError

_NAME_WIDTH = 18


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    text = "check the installation, llama.cpp's build, devices, memory, disk, adb and phones"
    parser = commands.add_parser("doctor", help=text)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print every finding.

    Raises:
        AutoGLMError: Something keeps this package from running.
    """
    found: list[Finding] = []
    for finding in examine():
        found.append(finding)
        if not arguments.json:
            for line in draw_finding(finding):
                output.write(line)
    if arguments.json:
        output.write_json([asdict(finding) for finding in found])
    problems = [finding for finding in found if finding.state == "problem"]
    if problems:
        names = ", ".join(finding.name for finding in problems)
        raise AutoGLMError(f"doctor: not ready to run ({names})", hint=problems[0].hint)


def draw_finding(finding: Finding) -> Iterator[str]:
    """State, name and text; the hint on a line of its own, to be copied."""
    yield f"{finding.state:<9}{finding.name:<{_NAME_WIDTH}} {finding.text}"
    if finding.hint:
        yield f"{'':<9}{'':<{_NAME_WIDTH}} -> {finding.hint}"
