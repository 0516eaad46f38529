"""Other programs, asked with a time limit. Knows none of them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program printed."""

    code: int | None
    """Exit code, the negative number of the signal that ended it, None if it took too long."""
    text: str
    """stdout and stderr together, without characters that could move a terminal's cursor."""

    @property
    def lines(self) -> list[str]:
        """The lines that are not empty."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]


def find_program(*names: str) -> str | None:
    """Path of the first of these programs that ``PATH`` has."""
    return next((path for name in names if name and (path := shutil.which(name))), None)


def ask_program(
    command: Sequence[str], *, seconds: float = 20.0, environment: Mapping[str, str] | None = None
) -> Answer | None:
    """Run a program to its end, or to the end of its time.

    Args:
        command: Path and arguments.
        seconds: After these it is killed.
        environment: Variables in place of this process's.

    Returns:
        None if it cannot be started.
    """
    # Into a file: a pipe would stay open as long as a server that the program leaves behind.
    with tempfile.TemporaryFile() as out:
        code: int | None = None
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env=environment,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            pass
        except OSError:
            return None
        out.seek(0)
        text = out.read().decode("utf-8", "replace").replace("\r\n", "\n")
    return Answer(code, "".join(c for c in text if c.isprintable() or c in "\n\t"))


def install_command(**packages: str) -> str:
    """How this system's package manager installs something.

    Args:
        packages: Names of packages by manager: ``apt``, ``dnf``, ``pacman``, ``brew``, ``winget``,
            ``pkg`` (Termux).

    Returns:
        A command, or empty where no manager is found.
    """
    for manager, program, command in _MANAGERS:
        if manager in packages and find_program(program):
            return f"{command} {packages[manager]}"
    return ""


_MANAGERS = (
    ("pkg", "termux-setup-storage", "pkg install"),  # Termux has apt-get too, and no sudo
    ("apt", "apt-get", "sudo apt-get install -y"),
    ("dnf", "dnf", "sudo dnf install"),
    ("pacman", "pacman", "sudo pacman -S"),
    ("brew", "brew", "brew install"),
    ("winget", "winget", "winget install"),
)
