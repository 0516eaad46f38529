"""Install a wheel into an empty environment, away from the source tree, and try every command.

    python scripts/try_wheel.py dist/autoglm_gguf-0.1.0-py3-none-any.whl

A new virtual environment, a new HOME and an empty folder; pip keeps its cache, so that llama.cpp is
compiled once on a machine. Fails where a command fails, and where the program has a command that is
not tried here. The hub that `pull` asks is tests/hub_server.py, on this machine.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models" / "autoglm-tiny"
PAIR = "out/autoglm-tiny-Q8_0.gguf"
SCREEN = ROOT / "examples" / "screen.png"
TEXT = "打开微信。 The quick brown fox jumps over the lazy dog.\n" * 40
# One line a command; MODEL is what `convert` made.
LINES = (
    "doctor --json",
    "pull tiny/tiny",
    "convert autoglm-tiny --outtype q8_0 --outdir out",
    f"inspect {PAIR}",
    f"plan {PAIR} --memory-budget 1GB --n-ctx 2048",
    f"verify autoglm-tiny {PAIR}",
    f"chat {PAIR} --max-tokens 64",
    "chat --json",
    f"act --task Chrome --screenshot {SCREEN} --annotate tap.png",
    f"calibrate {PAIR} --text text.txt --n-ctx 128 --outfile imatrix.gguf",
    "convert autoglm-tiny --outtype q4_K --imatrix imatrix.gguf --outdir out --name small",
    f"evaluate perplexity {PAIR} --text text.txt --n-ctx 128 --save-base base.kld",
    "evaluate divergence out/small-Q4_K.gguf --base base.kld",
    "evaluate actions --screens 2",
    f"bench {PAIR} --prompt-n 64 --predicted-n 8 --repeats 1 --no-image",
)


class Place:
    """An environment with nothing in it but the wheel and what it asks for."""

    def __init__(self, folder: Path) -> None:
        self.venv, self.work = folder / "venv", folder / "work"
        self.work.mkdir()
        (self.work / "text.txt").write_text(TEXT, "utf-8")
        venv.create(self.venv, with_pip=True)
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        self.environment = kept | {"HOME": str(folder / "home")}

    def install(self, requirement: str) -> None:
        """With pip's own settings and cache, which are the user's."""
        pip = [self.venv / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, requirement], check=True, cwd=self.work)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The installed program with arguments."""
        return [str(self.venv / "bin" / "autoglm-gguf"), *arguments]

    def run(self, line: str, code: int = 0, **variables: str) -> str:
        """Run a command; what it printed.

        Raises:
            SystemExit: It ended with another code.
        """
        began = time.monotonic()
        done = subprocess.run(
            self.command(line.split()),
            input="打开微信\n",
            capture_output=True,
            encoding="utf-8",
            cwd=self.work,
            env=self.environment | variables,
            timeout=300,
        )
        if done.returncode != code:
            said = f"{done.stdout}{done.stderr}"
            raise SystemExit(f"error: autoglm-gguf {line}: exit code {done.returncode}\n{said}")
        print(f"{time.monotonic() - began:6.1f} s  autoglm-gguf {line}", flush=True)
        return done.stdout + done.stderr

    def serve(self) -> None:
        """Start the server, ask for its state and its page, and end it."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        arguments, url = ["serve", PAIR, "--port", str(port)], f"http://127.0.0.1:{port}"
        with subprocess.Popen(
            self.command(arguments), cwd=self.work, env=self.environment, stderr=subprocess.PIPE
        ) as process:
            try:
                assert b"openai" in _fetch(f"{url}/openapi.json").lower()
                assert b"<html" in _fetch(f"{url}/")
                assert b"text/javascript" in _fetch(f"{url}/app.js", "content-type")
            finally:
                process.send_signal(signal.SIGINT)
                said = process.communicate(timeout=60)[1]
        if process.returncode not in (0, 130):
            raise SystemExit(f"error: serve: exit code {process.returncode}\n{said.decode()}")
        print("          autoglm-gguf serve", flush=True)


def _fetch(url: str, header: str = "") -> bytes:
    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.headers[header].encode() if header else answer.read()
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.1)  # it does not listen yet
    raise SystemExit(f"error: serve: no answer at {url}")


def main() -> None:
    """Install, try, compare with what the program says it can do."""
    wheel = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import Hub

    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        hub.add("tiny/tiny", TINY)
        place = Place(Path(folder))
        place.install(str(wheel))
        known = set(re.findall(r"^    (\w+)\b", place.run("--help"), re.M))
        tried = {line.split()[0] for line in LINES} | {"serve"}
        if known != tried:
            raise SystemExit(
                f"error: commands not tried: {known - tried}, unknown: {tried - known}"
            )
        for line in LINES:
            place.run(line, HF_ENDPOINT=hub.endpoint)
        hint = "autoglm-gguf[server]"
        if hint not in place.run("serve", code=1):
            raise SystemExit(f"error: serve does not name {hint}")
        place.install(f"{wheel}[server]")
        place.serve()
    print("every command works from the wheel")


if __name__ == "__main__":
    main()
