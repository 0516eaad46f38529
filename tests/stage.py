"""A folder in which the documentation's commands work: autoglm-tiny under the 9B's names."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from cloud_server import Cloud
from conftest import ROOT, TINY
from documents import Block, Command

import autoglm_gguf
from autoglm_gguf.cli.main import main

MODEL = "models/AutoGLM-Phone-9B-Q4_0.gguf"
CLOUD = "https://api.example.com/v1"
PORT = re.compile(r"(?:127\.0\.0\.1|localhost):8000")
SHELL = re.compile(r"[|<>;&$`]")  # such a line is bash's; others are run in this process
PATIENCE_S = 60.0


class Stage:
    """Runs commands and Python blocks as a reader would, in one folder.

    Args:
        folder: With models, a screenshot and texts, under the names that the pages use.
        cloud: What stands for the pages' cloud.
    """

    def __init__(self, folder: Path, cloud: Cloud) -> None:
        self.folder, self._cloud = folder, cloud
        self._done: dict[str, str] = {}
        self._server: Server | None = None

    def run(self, command: Command) -> str:
        """Run a line; what was run before is not run again.

        Returns:
            What it said, on both streams.

        Raises:
            AssertionError: It failed.
        """
        text = self._here(command.text)
        if text.startswith("export "):
            name, _, value = text.removeprefix("export ").partition("=")
            os.environ[name] = value.replace("…", "secret")
            return ""
        if text not in self._done:
            self._done[text] = self._run(text)
        return self._done[text]

    def execute(self, block: Block, names: dict[str, Any]) -> None:
        """Run a Python block with the names of the blocks before it."""
        code = compile(self._here(block.text), str(block), "exec")
        with redirect_stdout(io.StringIO()):
            exec(code, names)

    def close(self) -> None:
        """End the server, if one was needed."""
        if self._server is not None:
            self._server.end()

    def _here(self, text: str) -> str:
        """The same with this machine's addresses."""
        text = text.replace(CLOUD, self._cloud.base_url)
        if PORT.search(text):
            if self._server is None:
                key = os.environ.pop("AUTOGLM_GGUF_API_KEY", None)  # of a page's own server
                self._server = Server(f"autoglm-gguf serve {MODEL}", self.folder)
                os.environ |= {} if key is None else {"AUTOGLM_GGUF_API_KEY": key}
            text = PORT.sub(self._server.address, text)
        return text

    def _run(self, text: str) -> str:
        words = shlex.split(text, comments=True)
        if words[:2] == ["autoglm-gguf", "serve"]:
            return Server(text, self.folder).end()
        if words in (["make", "demo"], ["python", "examples/demo.py"]):
            return self._run_script(ROOT / "examples" / "demo.py")
        if words[0] == "autoglm-gguf" and not SHELL.search(shlex.join(words)):
            return self._run_ours(words[1:])
        return self._run_bash(text)

    def _run_ours(self, arguments: list[str]) -> str:
        said = io.StringIO()
        before, sys.stdin = sys.stdin, io.StringIO("打开微信\n/mem\n")
        try:
            with redirect_stdout(said), redirect_stderr(said):
                code = main(arguments)
        finally:
            sys.stdin = before
        assert code == 0, f"{arguments}: exit code {code}\n{said.getvalue()}"
        return said.getvalue()

    def _run_script(self, path: Path) -> str:
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(io.StringIO()):
            runpy.run_path(str(path), run_name="__main__")
        return said.getvalue()

    def _run_bash(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail; {text}"],
            cwd=self.folder,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{text}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout


class Server:
    """A ``serve`` line in a process of its own, on a free port, once it is ready."""

    def __init__(self, text: str, folder: Path) -> None:
        words = shlex.split(text, comments=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autoglm_gguf", *words[1:], "--port", "0"],
            cwd=folder,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        watchdog = threading.Timer(PATIENCE_S, self._process.kill)
        watchdog.start()
        self._said = ""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said += line
            if line.startswith("ready:"):
                break
        watchdog.cancel()
        found = re.search(r"listening on http://(\S+);", self._said)
        assert found and self._process.poll() is None, f"{text}\n{self._said}"
        self.address = found[1].replace("0.0.0.0", "127.0.0.1")

    def end(self) -> str:
        """Ctrl-C; returns what it said."""
        self._process.send_signal(signal.SIGINT)
        rest, _ = self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode in (0, 130), self._said + rest
        return self._said + rest


def child_environment() -> dict[str, str]:
    """This process's, with its Python, and so ``autoglm-gguf``, first on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONIOENCODING": "utf-8"}


def furnish(folder: Path) -> None:
    """What the pages' commands find."""
    for name in ("zai-org/AutoGLM-Phone-9B", "AutoGLM-Phone-9B"):
        (folder / name).mkdir(parents=True)
        for path in TINY.glob("*.*"):
            (folder / name / path.name).symlink_to(path)
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    for name in ("screen.png", "screen-1.png"):
        shutil.copy(ROOT / "examples" / "screen.png", folder / name)
    for outtype in ("q4_0", "q8_0"):
        autoglm_gguf.convert(folder / "AutoGLM-Phone-9B", folder / "models", outtype)
    (folder / "MODEL").mkdir()
    for name in (Path(MODEL).name, "mmproj-AutoGLM-Phone-9B-Q8_0.gguf"):
        for place in (folder, folder / "MODEL"):
            (place / name).symlink_to(folder / "models" / name)
    text = (ROOT / "tests" / "evaluate" / "golden" / "text.txt").read_text("utf-8")
    (folder / "held-out.txt").write_text(text[:5000], "utf-8")  # two chunks and a little
    said = {"role": "assistant", "content": '<answer>do(action="Back")'}
    steps = [{"messages": [{"role": "user", "content": "go back"}, said]}] * 2
    (folder / "steps.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps), "utf-8")
    corpus = autoglm_gguf.Corpus(folder / "held-out.txt", n_ctx=128, n_chunks=2)
    autoglm_gguf.calibrate(folder / MODEL, corpus, outfile=folder / "imatrix.gguf")
    (folder / "apps.txt").write_text("微信\nChrome\nSettings\n", "utf-8")
    app = {"type": "string", "maxLength": 20}
    schema = {"type": "object", "properties": {"app": app}, "required": ["app"]}
    (folder / "step.json").write_text(json.dumps(schema), "utf-8")
