"""Fixtures: checkpoints and converted pairs, each made once per session."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders import Shape, build_checkpoint

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models" / "autoglm-tiny"
_NEEDS = {
    "native": ("llama_cpp",),
    "gpu": ("llama_cpp",),  # and a device: tests/gpu/conftest.py
    "browser": ("playwright",),  # and Chromium and axe-core: tests/browser.py
    "reference": ("llama_cpp", "torch", "transformers"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--max-skips", type=int, help="fail when more tests than this are skipped")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """CI allows no skips: a missing requirement must not turn into silence."""
    allowed = session.config.getoption("--max-skips")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter else 0
    if allowed is not None and skipped > allowed and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\n{skipped} tests were skipped, {allowed} allowed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this installation cannot run, and say what is missing."""
    missing = {
        marker: [name for name in modules if importlib.util.find_spec(name) is None]
        for marker, modules in _NEEDS.items()
    }
    for item in items:
        for marker, names in missing.items():
            if names and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(names)}"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small random checkpoint of this test's own."""
    return build_checkpoint(tmp_path / "checkpoint", Shape())


@pytest.fixture(scope="session")
def random_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small random checkpoint as a q8_0 pair."""
    from autoglm_gguf import convert

    base = tmp_path_factory.mktemp("random")
    pair = convert(build_checkpoint(base / "random"), base / "gguf", "q8_0")
    return pair.text, pair.mmproj


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """autoglm-tiny as a pair of the asked outtype, the mmproj of the same type."""
    from autoglm_gguf import convert

    base = tmp_path_factory.mktemp("tiny")

    def make(outtype: str) -> tuple[Path, Path]:
        text = base / f"autoglm-tiny-{outtype.upper()}.gguf"
        mmproj = base / f"mmproj-{text.name}"
        if not (text.exists() and mmproj.exists()):
            convert(TINY, base, outtype, mmproj_outtype=outtype, name="autoglm-tiny")
        return text, mmproj

    return make


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Every attempt to reach anything fails, and is told."""
    tried: list[object] = []

    def refuse_to(*arguments: object, **_: object) -> None:
        tried.append(arguments)
        raise OSError("the network is cut")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse_to)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse_to)
    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", refuse_to)
    yield tried
