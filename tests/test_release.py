"""What a release is made of: one version, changelog fragments, workflows that call make."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import autoglm_gguf

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FRAGMENTS = [path for path in (ROOT / "changelog.d").iterdir() if path.name != "README.md"]


def test_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    home = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert f'\n__version__ = "{autoglm_gguf.__version__}"\n' in home.read_text("utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", autoglm_gguf.__version__)


def test_changelog_begins_with_this_version_or_the_one_before() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    above, marker, below = text.partition(PROJECT["tool"]["towncrier"]["start_string"])
    assert marker and "\n## " not in above, "sections stand below the marker"
    assert re.match(r"\n## \d+\.\d+\.\d+ \(", below)


def test_fragments_have_a_known_kind_and_one_entry() -> None:
    kinds = "|".join(kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"])
    for path in FRAGMENTS:  # there may be none
        assert re.fullmatch(rf"(\+[a-z0-9-]+|\d+)\.({kinds})\.md", path.name), path.name
        text = path.read_text("utf-8")
        assert text.strip() and not text.startswith(("-", "#")), "an entry without its dash"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_calls_targets_that_exist(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    called = {
        word
        for line in re.findall(r"(?m)^(?:\s*)make ((?:[a-z-]+ ?)+)", commands)
        for word in line.split()
    }
    assert called <= TARGETS, called - TARGETS


def test_every_workflow_job_has_a_time_limit() -> None:
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text("utf-8"))["jobs"].items():
            assert "timeout-minutes" in job, f"{path.name}: {name}"


def test_wheel_holds_the_marker_of_types() -> None:
    assert (Path(autoglm_gguf.__file__).parent / "py.typed").exists()
