"""Python, this package, and the packages it needs, as their metadata tell; nothing is imported.

llama-cpp-python is `library`'s matter. The requirements are those of the installed metadata: names,
bounds of release numbers, and markers of ``extra`` and ``sys_platform`` as in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shlex
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path

import autoglm_gguf
from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.programs import ask_program, find_program

PACKAGE = "autoglm-gguf"
LLAMA = "llama-cpp-python"
_MIN_PYTHON = (3, 11)
_USES = {  # extras, and what they are for
    "chat": "line editing and history in chat",
    "server": "the server",
    "reference": "logits and image embeddings in verify",
    "plot": "bench --plot",
}
_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(\[.*?\])?\s*\(?(?P<bounds>[^;)]*)\)?\s*(;(?P<marker>.*))?"
)
_BOUND = re.compile(r"([<>=!]+)\s*([\w.]+)")
_EXTRA = re.compile(r"extra\s*==\s*['\"](.+?)['\"]")
_PLATFORM = re.compile(r"sys_platform\s*(==|!=)\s*['\"](.+?)['\"]")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One package that this one needs."""

    name: str
    bounds: tuple[tuple[str, str], ...]
    """``((">=", "2"), ("<", "3"))``."""
    extra: str
    """Empty if it is always needed."""

    @property
    def range(self) -> str:
        """``>=2,<3``."""
        return ",".join(map("".join, self.bounds))

    def __str__(self) -> str:
        return self.name + self.range

    def found(self) -> str | None:
        """The installed version; None if it is not installed."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None

    def allows(self, version: str) -> bool:
        """Whether a version lies within the bounds."""
        return all(_holds(version, *bound) for bound in self.bounds)


def check_installation() -> Iterator[Finding]:
    """Python, pip where it is amiss, this package, its dependencies, its extras."""
    yield _python()
    yield from check_pip()
    try:
        listed = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        text = (
            f"{autoglm_gguf.__version__}, from source and not installed: what it needs is unknown"
        )
        yield Finding(PACKAGE, "note", text, "pip install -e . in the folder with pyproject.toml")
        return
    where = Path(autoglm_gguf.__file__).parent
    yield Finding(PACKAGE, "ok", f"{autoglm_gguf.__version__} in {where}")
    needed = [needed for line in listed if (needed := parse_requirement(line))]
    yield _dependencies([one for one in needed if not one.extra and one.name != LLAMA])
    for extra in sorted({one.extra for one in needed} - {"", "dev", "all"}):
        yield _extra(extra, [one for one in needed if one.extra == extra])


def check_pip() -> Iterator[Finding]:
    """What to type in place of ``pip``, which every other hint writes, where that goes astray.

    Covers a Python that its system manages (PEP 668), a virtual environment that is not activated,
    and a Python without pip.
    """
    in_venv = sys.prefix != sys.base_prefix
    if not in_venv and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        text = "this Python is the system's, where pip does not install"
        hint = f"{sys.executable} -m venv .venv && . .venv/bin/activate, then install there"
        yield Finding("pip", "note", text, hint)
        return
    program = find_program("pip")
    if program is not None and _is_ours(program):
        return
    text = "not found" if program is None else f"{program} installs for another Python"
    activate = Path(sys.prefix, "bin", "activate")
    if importlib.util.find_spec("pip") is None:
        text = f"not installed in {sys.prefix}"
        hint = f"{sys.executable} -m ensurepip"
    elif in_venv and activate.exists():
        hint = f". {shlex.quote(str(activate))}"
    else:
        hint = f"where a hint says pip, write: {sys.executable} -m pip"
    yield Finding("pip", "note", text, hint)


def _is_ours(pip: str) -> bool:
    """Whether a pip installs for this Python: by its folder, else by what it says of itself."""
    if Path(pip).parent == Path(sys.executable).parent:
        return True
    answer = ask_program([pip, "--version"])  # pip 23.0.1 from FOLDER/pip (python 3.11)
    match = re.search(r" from (.+)[\\/]pip \(python", answer.text) if answer else None
    return match is not None and match[1] in sys.path


def parse_requirement(line: str) -> Requirement | None:
    """Read a line of ``Requires-Dist``; None if it is for another system."""
    match = _REQUIREMENT.fullmatch(line.strip())
    if match is None:
        return None
    marker = match["marker"] or ""
    systems = _PLATFORM.findall(marker)  # joined by "and"
    if any((name == sys.platform) != (operator == "==") for operator, name in systems):
        return None
    bounds = tuple(_BOUND.findall(match["bounds"]))
    extra = _EXTRA.search(marker)
    return Requirement(match["name"], bounds, extra[1] if extra else "")


def pip_install(requirements: list[Requirement]) -> str:
    """The command that brings these."""
    return "pip install " + " ".join(f'"{one}"' for one in requirements)


def _python() -> Finding:
    version = platform.python_version()
    text = f"{version} ({platform.machine()}) at {sys.executable}"
    if sys.version_info < _MIN_PYTHON:
        least = ".".join(map(str, _MIN_PYTHON))
        hint = f"install Python {least} or newer, and this package with it"
        return Finding("python", "problem", f"{text}: too old (required {least})", hint)
    if sys.maxsize < 2**32:
        hint = "install a 64-bit Python, and this package with it"
        return Finding("python", "problem", f"{text}: 32 bits cannot map a model", hint)
    if sys.platform == "darwin" and platform.machine() != "arm64" and "ARM64" in platform.version():
        hint = "install a Python for arm64, and this package with it"
        return Finding("python", "note", f"{text}: translated by Rosetta, slow and no Metal", hint)
    return Finding("python", "ok", text)


def _dependencies(needed: list[Requirement]) -> Finding:
    versions = {one: one.found() for one in needed}
    missing = [one for one in needed if versions[one] is None]
    wrong = [one for one in needed if (found := versions[one]) and not one.allows(found)]
    if not missing and not wrong:
        told = ", ".join(f"{one.name} {version}" for one, version in versions.items())
        return Finding("dependencies", "ok", told)
    told = ", ".join(
        (
            *(f"{one} not installed" for one in missing),
            *(f"{one.name} {versions[one]} (required {one.range})" for one in wrong),
        )
    )
    return Finding("dependencies", "problem", told, pip_install([*missing, *wrong]))


def _extra(extra: str, needed: list[Requirement]) -> Finding:
    use = f" (for {_USES[extra]})" if extra in _USES else ""
    lacking = [one for one in needed if not (found := one.found()) or not one.allows(found)]
    if not lacking:
        return Finding(f"extra {extra}", "ok", f"installed{use}")
    names = ", ".join(one.name for one in lacking)
    hint = f'pip install "{PACKAGE}[{extra}]"'
    if any(one.name == "torch" for one in lacking) and sys.platform.startswith("linux"):
        hint = f"first a CPU build of torch (pytorch.org tells how), then: {hint}"
    return Finding(f"extra {extra}", "note", f"not installed{use}: {names}", hint)


def _holds(version: str, operator: str, bound: str) -> bool:
    """Compare release numbers; of ``2.0rc1`` the ``2.0``."""
    pairs = list(zip_longest(_release(version), _release(bound), fillvalue=0))
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return {
        ">=": left >= right,
        "<": left < right,
        "==": left == right,
        "<=": left <= right,
        ">": left > right,
        "!=": left != right,
    }.get(operator, True)


def _release(version: str) -> list[int]:
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in match[0].split(".")] if match else []
