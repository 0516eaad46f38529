"""Every console and Python block of the pages is run, or says why not.

The console blocks run in a folder where autoglm-tiny lies under the 9B's names, so sizes, times
and answers are not the pages': of the output shown, words are compared and numbers are not; ``…``
stands for anything. A page's Python blocks share their names, and find those of the package.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from documents import CHINESE, PAGES, Block, Command, read_blocks
from stage import MODEL, Stage

import autoglm_gguf
from autoglm_gguf.cli.main import build_parser

# README.zh.md has the README's blocks: tests/docs/test_chinese.py.
RUN = [page for page in PAGES if page != CHINESE and any(b.is_run for b in read_blocks(page))]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?: ?[kMG]?B\b)?")


def accepts(shown: str, said: str) -> bool:
    """Whether a line of output is the one that the page shows, numbers aside."""
    parts = [
        r"\s+".join(map(re.escape, re.split(r"\s+", part)))
        for part in NUMBER.sub("\0", shown).split("…")
    ]
    pattern = ".*".join(parts).replace("\0", "\1").replace(re.escape("\1"), "\1")
    return re.fullmatch(pattern.replace("\1", f"(?:{NUMBER.pattern})"), said) is not None


def check_output(block: Block, command: Command, said: str) -> None:
    """The lines that the page shows came, in their order."""
    lines = iter(line.rstrip() for line in said.splitlines())
    for shown in command.shown:
        if shown.strip() in ("", "…"):
            continue
        found = any(accepts(shown.strip(), line.strip()) for line in lines)
        assert found, f"{block}: {command.text}\nnot said: {shown}\nbut:\n{said}"


def run_console(block: Block, stage: Stage) -> None:
    for command in block.commands:
        if command.text.split()[0] in block.skipped:
            continue
        said = stage.run(command)
        if block.is_compared:
            check_output(block, command, said)


@pytest.mark.native
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bash") or not shutil.which("curl"), reason="bash, curl")
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stage.folder)
    monkeypatch.setenv("AUTOGLM_GGUF_CACHE", str(stage.folder / "cache"))
    monkeypatch.setenv("CLOUD_KEY", "secret")
    monkeypatch.delenv("AUTOGLM_GGUF_API_KEY", raising=False)
    blocks = [block for block in read_blocks(page) if block.is_run]
    names = {name: getattr(autoglm_gguf, name) for name in autoglm_gguf.__all__}
    names |= {"__name__": "page", "path": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    if uses_a_model(blocks):
        names["model"] = autoglm_gguf.AutoGLM.load(MODEL)
    given, environment = names.get("model"), dict(os.environ)
    try:
        for block in blocks:
            if block.language == "console":
                run_console(block, stage)
            elif block.language == "python":
                stage.execute(block, names)
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for model in (given, names.get("model")):
            if model is not None:
                model.close()


def uses_a_model(blocks: list[Block]) -> bool:
    """Whether the first Python block that speaks of a model does not make one."""
    speaking = (b.text for b in blocks if b.language == "python" and "model." in b.text)
    first = next(speaking, "")
    return bool(first) and not re.search(r"\bmodel = |\bas model:", first)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_has_only_blocks_of_known_languages(page: Path) -> None:
    known = {"", "console", "python", "json", "kotlin", "xml"}
    for block in read_blocks(page):
        assert block.language in known, block
        if block.language == "python":
            compile(block.text, str(block), "exec")  # also where it is not run
        assert block.language != "console" or any(True for _ in block.commands), f"{block}: no $"
        if "not run" in block.comment:
            is_told = not block.is_run or block.skipped
            assert is_told, f"{block}: write <!-- not run: reason -->, or not run (a, b): reason"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_not_run_are_there(page: Path) -> None:
    for block in read_blocks(page):
        found = {command.text.split()[0] for command in block.commands}
        assert block.skipped <= found, f"{block}: not run, and not there either"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_ours_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("step.json").write_text("{}", "utf-8")  # which the parser opens
    parser = build_parser()
    for block in read_blocks(page):
        for command in block.commands if block.language == "console" else ():
            words = shlex.split(command.text.rpartition("| ")[2], comments=True)
            if words[0] == "autoglm-gguf":
                parser.parse_args(words[1:])  # exits where an option does not exist


@pytest.mark.parametrize(
    ("shown", "said", "same"),
    [
        ("6.50 MB  out/a.gguf", "12.1 GB out/a.gguf", True),
        ("[125,812]", "[3,4]", True),
        ("thinking: …", "thinking: Tap the screen.", True),
        ("ready: A, n_ctx 8192", "ready: A, n_batch 8192", False),
        ("text 1 GB", "text 1 GB more", False),
    ],
)
def test_output_is_compared_but_for_its_numbers(shown: str, said: str, same: bool) -> None:
    assert accepts(shown, said) is same
