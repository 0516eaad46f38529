"""Python and packages, as metadata on disk tells of them."""

from __future__ import annotations

import os
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from autoglm_gguf.doctor import installation
from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.doctor.installation import (
    Requirement,
    check_installation,
    check_pip,
    parse_requirement,
)

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    """A package as pip leaves it, without its code."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(lines) + "\n\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which packages are looked for."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def found() -> dict[str, Finding]:
    return {finding.name: finding for finding in check_installation()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("numpy>=1.26", Requirement("numpy", ((">=", "1.26"),), "")),
        ("httpx2<3,>=2", Requirement("httpx2", (("<", "3"), (">=", "2")), "")),
        ("old (>=2.0)", Requirement("old", ((">=", "2.0"),), "")),
        ("torch>=2.6; extra == 'reference'", Requirement("torch", ((">=", "2.6"),), "reference")),
        ('uvicorn[standard]; extra == "server"', Requirement("uvicorn", (), "server")),
        ("psutil>=6; sys_platform == 'no such system'", None),
        ("psutil; sys_platform != 'no such system'", Requirement("psutil", (), "")),
        (f"psutil; sys_platform != 'x' and sys_platform != '{sys.platform}'", None),
    ],
)
def test_requirement_is_read(line: str, expected: Requirement | None) -> None:
    assert parse_requirement(line) == expected


def test_every_requirement_of_this_package_is_understood() -> None:
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
        needed = parse_requirement(line)
        assert needed is None or str(needed) in line.replace(" ", "") or "[" in line
        assert needed is not None or "sys_platform" in line


@pytest.mark.parametrize(
    ("version", "allowed"),
    [
        ("2.0", True),
        ("2.10.1", True),
        ("2", True),
        ("1.99", False),
        ("3.0", False),
        ("3.0rc1", False),
    ],
)
def test_version_is_compared_by_its_numbers(version: str, allowed: bool) -> None:
    assert Requirement("x", ((">=", "2"), ("<", "3")), "").allows(version) == allowed


def test_missing_and_old_packages_are_a_problem_with_the_command(packages: Path) -> None:
    install(packages, "autoglm-gguf", "0.1.0", "numpy>=1.26", "pydantic>=2.7", "Pillow>=10.3")
    install(packages, "numpy", "1.20.0")
    install(packages, "pillow", "11.0")
    assert found()["dependencies"] == Finding(
        "dependencies",
        "problem",
        "pydantic>=2.7 not installed, numpy 1.20.0 (required >=1.26)",
        'pip install "pydantic>=2.7" "numpy>=1.26"',
    )


def test_extras_are_told_each(packages: Path) -> None:
    lines = ('prompt_toolkit>=3; extra == "chat"', 'torch>=2.6; extra == "reference"')
    install(packages, "autoglm-gguf", "0.1.0", *lines)
    install(packages, "prompt-toolkit", "3.0.53")
    told = found()
    assert told["extra chat"].state == "ok"
    assert told["extra reference"].state == "note"
    assert 'pip install "autoglm-gguf[reference]"' in told["extra reference"].hint


@pytest.fixture
def place_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The only pip on PATH, which says that it lies in the folder given."""
    if os.name != "posix":
        pytest.skip("the small pip is a shell script")

    def place(folder: str) -> Path:
        pip = tmp_path / "bin" / "pip"
        pip.parent.mkdir()
        pip.write_text(f'#!/bin/sh\necho "pip 25.0 from {folder}/pip (python 3.11)"\n')
        pip.chmod(0o755)
        monkeypatch.setenv("PATH", f"{pip.parent}{os.pathsep}/bin")
        return pip

    monkeypatch.setattr(sys, "base_prefix", "/usr")  # as in a virtual environment
    return place


def test_pip_of_this_python_is_not_worth_a_line(place_pip: Callable[[str], Path]) -> None:
    place_pip(sys.path[-1])
    assert list(check_pip()) == []


def test_pip_of_another_python_names_what_to_activate(
    place_pip: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = place_pip("/opt/other/site-packages")
    text = f"{pip} installs for another Python"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "no venv here"))
    instead = f"where a hint says pip, write: {sys.executable} -m pip"
    assert list(check_pip()) == [Finding("pip", "note", text, instead)]
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "bin" / "activate").touch()
    assert list(check_pip()) == [Finding("pip", "note", text, f". {tmp_path}/bin/activate")]


def test_python_of_the_system_needs_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    [finding] = check_pip()
    assert (finding.name, finding.state) == ("pip", "note")
    assert " -m venv .venv && . .venv/bin/activate" in finding.hint


def test_source_that_is_not_installed_is_noted(packages: Path) -> None:
    assert found()["autoglm-gguf"].state == "note"
    assert "pip install -e ." in found()["autoglm-gguf"].hint


def test_python_that_is_too_old_is_a_problem(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found()["python"].state == "ok"
    monkeypatch.setattr(installation, "_MIN_PYTHON", (99, 1))
    assert (found()["python"].state, "required 99.1" in found()["python"].text) == ("problem", True)
