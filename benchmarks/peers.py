"""Other programs and libraries beside ours: each in a process of its own, asked and watched.

Finds llama.cpp's programs, starts what is compared, talks with it and reads what it holds. Whatever
does not answer in time is killed, by its process id. Knows no benchmark and no tables. Linux only:
peaks are read in /proc.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from frame import ROOT, RowError

TOOLS = "AUTOGLM_GGUF_LLAMA_TOOLS"
"""The variable that names the folder of llama.cpp's programs."""
UPSTREAM = "AUTOGLM_GGUF_UPSTREAM"
"""The variable that names llama.cpp's sources."""
BUILT = ROOT / "out" / "peers"
"""Where build_peers.sh puts both."""
_TAIL_CHARACTERS = 500


Messages = list[dict[str, Any]]
"""OpenAI's shapes."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every runtime."""

    text: str
    mmproj: str = ""
    """Nothing: no image will come."""
    n_ctx: int = 4096
    n_batch: int = 512
    n_threads: int = 2
    max_tokens: int = 16


class PeerError(RowError):
    """A runtime died, refused or did not answer in time."""


# ---- what is here


def find_program(name: str, given: Path | None = None) -> Path:
    """One of llama.cpp's programs: given, in the variable's folder, or where we build them.

    Raises:
        PeerError: It is not there.
    """
    folder = Path(os.environ.get(TOOLS) or BUILT / "bin")
    path = given or folder / name
    if not path.is_file():
        raise PeerError(f"not measured, {name} is not here (benchmarks/build_peers.sh builds it)")
    return path.absolute()


def find_upstream(given: Path | None = None) -> Path:
    """llama.cpp's sources: given, in the variable, or where build_peers.sh unpacks them.

    Raises:
        PeerError: They are not there.
    """
    path = given or Path(os.environ.get(UPSTREAM) or BUILT / "llama.cpp")
    if not (path / "convert_hf_to_gguf.py").is_file():
        raise PeerError("not measured, its sources are not here (benchmarks/build_peers.sh)")
    return path.absolute()


def require(*modules: str) -> None:
    """Refuse to start what is not installed.

    Raises:
        PeerError: One of the modules is missing.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise PeerError(f"not measured, {module} is not installed (make bench EXTRAS=...)")


# ---- in the processes of their own


class Runtime(Protocol):
    """What a child process does, besides methods of its own."""

    def facts(self) -> dict[str, Any]: ...


def serve(open_runtime: Callable[..., Runtime], job: dict[str, Any]) -> None:
    """Answer requests, a line of JSON each, until there are no more; the facts come first."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    runtime = open_runtime(**job)

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    reply(runtime.facts())
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., Any] = getattr(runtime, request["method"])
        reply(method(*request["arguments"]))


# ---- around them


class Peer:
    """A process that answers steps; killed at the latest when the ``with`` block ends.

    Args:
        name: For messages.
        command: What is started.
        timeout_s: For the start and for each request.
        env: Variables set on top of this process's own.
        talks: Whether its standard output is read; else it is kept with its errors.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        timeout_s: float,
        *,
        env: dict[str, str] | None = None,
        talks: bool = True,
    ) -> None:
        self.name, self.timeout_s = name, timeout_s
        self._late = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if talks else self._errors,
            stderr=self._errors,
            env={**os.environ, **(env or {}), "GGML_NO_BACKTRACE": "1"},
        )

    def start(self) -> dict[str, Any]:
        """Wait until it answers; what it tells of itself."""
        raise NotImplementedError

    def answer(self, messages: Messages) -> dict[str, Any]:
        """One step: ttft_s, total_s, text, predicted_n, and what else the runtime tells."""
        raise NotImplementedError

    def memory(self) -> dict[str, int]:
        """Peak and present resident bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        found = {key: value for key, _, value in (line.partition(":") for line in lines)}
        return {key: 1024 * int(found[key].split()[0]) for key in ("VmHWM", "VmRSS")}

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far; proc(5), fields 14 and 15 of stat."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()  # from field 3 on: a name may hold spaces
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @contextlib.contextmanager
    def in_time(self) -> Iterator[None]:
        """Kill the process when the block takes longer than it may."""

        def end() -> None:
            self._late = True
            self.process.kill()

        timer = threading.Timer(self.timeout_s, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def failure(self, what: str) -> PeerError:
        """What went wrong, with the process's last words."""
        try:
            status: int | None = self.process.wait(1)
        except subprocess.TimeoutExpired:
            status = None
        self._errors.seek(0)
        tail = self._errors.read().decode("utf-8", "replace").strip()[-_TAIL_CHARACTERS:]
        if self._late:
            what = f"no answer in {self.timeout_s:g} s"
        return PeerError(f"{self.name}: {what} (exit status {status})\n{tail}")

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()  # nothing happens if it has ended
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Child(Peer):
    """A Python script of ours that calls `serve`.

    Args:
        name: For messages.
        script: It takes the job, JSON, as its only argument.
        job: What it opens its runtime with.
        timeout_s: For the start and for each request.
    """

    def __init__(self, name: str, script: Path, job: dict[str, Any], timeout_s: float) -> None:
        super().__init__(name, [sys.executable, str(script), json.dumps(job)], timeout_s)

    def start(self) -> dict[str, Any]:
        return dict(self._read())

    def answer(self, asked: Any) -> dict[str, Any]:
        return dict(self.ask("answer", asked))

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the runtime."""
        line = json.dumps({"method": method, "arguments": arguments})
        return self._read(f"{line}\n".encode())

    def _read(self, request: bytes = b"") -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.in_time():
            try:
                self.process.stdin.write(request)
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = b""
        if not line.endswith(b"\n"):
            raise self.failure("ended")
        return json.loads(line)


class Server(Peer):
    """llama-server on a free port of the loopback interface.

    Args:
        name: For messages.
        program: The executable; its folder holds its libraries.
        settings: Given as its options.
        timeout_s: For the start and for each request.
        extra: Options of its own, the last ones.
    """

    def __init__(
        self,
        name: str,
        program: Path,
        settings: Settings,
        timeout_s: float,
        extra: tuple[str, ...] = (),
    ) -> None:
        self._max_tokens = settings.max_tokens
        self.port = free_port()
        n_batch, n_threads = str(settings.n_batch), str(settings.n_threads)
        command = [str(program), "-m", settings.text]
        command += ["--mmproj", settings.mmproj] if settings.mmproj else []
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--no-ui", "--offline"]
        command += ["-c", str(settings.n_ctx), "-b", n_batch, "-ub", n_batch, "-np", "1"]
        command += ["-t", n_threads, "-tb", n_threads, "-fa", "on", "-ctk", "f16", "-ctv", "f16"]
        command += ["-ngl", "0", "--no-mmproj-offload", "--fit", "off"]
        # Answers and history as they are; no second copy of the KV cache in main memory.
        command += ["--jinja", "--reasoning-format", "none", "--cache-ram", "0", *extra]
        super().__init__(name, command, timeout_s, env=library_path(program), talks=False)

    def start(self) -> dict[str, Any]:
        with self.in_time():
            while self.process.poll() is None:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        return {}
                time.sleep(0.1)
        raise self.failure("did not start")

    def answer(self, messages: Messages) -> dict[str, Any]:
        body = {
            "messages": messages,
            "stream": True,
            "temperature": 0.0,
            "max_tokens": self._max_tokens,
            "cache_prompt": True,
            "ignore_eos": True,
        }
        return self._ask("/v1/chat/completions", body)

    def complete(self, ids: list[int], n_tokens: int) -> dict[str, Any]:
        """Tokens after a prompt of token ids; nothing is reused."""
        body = {"prompt": ids, "max_tokens": n_tokens, "temperature": 0.0, "stream": True}
        return self._ask("/v1/completions", {**body, "cache_prompt": False, "ignore_eos": True})

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self.in_time():
            try:
                return self._stream(path, json.dumps(body).encode())
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self.failure(f"request failed: {error!r}") from error

    def _stream(self, path: str, body: bytes) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout_s)
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read()[:300]!r}")
        first, text, timings = 0.0, "", dict[str, Any]()
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            timings = chunk.get("timings") or timings
            parts = (c.get("delta", {}).get("content") or c.get("text") for c in chunk["choices"])
            piece = "".join(part or "" for part in parts)
            if piece:
                first = first or time.perf_counter()
                text += piece
        ended = time.perf_counter()
        connection.close()
        return {
            "ttft_s": (first or ended) - began,
            "total_s": ended - began,
            "text": text,
            "predicted_n": timings["predicted_n"],
            "prompt_tokens": timings["prompt_n"] + timings["cache_n"],
            "evaluated_n": timings["prompt_n"],
            "cache_n": timings["cache_n"],
            "prompt_s": timings["prompt_ms"] / 1000,
        }


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def library_path(program: Path) -> dict[str, str]:
    """The variable that lets a llama.cpp program find the libraries beside it."""
    paths = [str(program.resolve().parent), os.environ.get("LD_LIBRARY_PATH", "")]
    return {"LD_LIBRARY_PATH": ":".join(path for path in paths if path)}


def read_version(program: Path) -> str:
    """The first line of ``llama-server --version``."""
    done = subprocess.run(
        [program, "--version"],
        capture_output=True,
        timeout=60,
        env={**os.environ, **library_path(program)},
        check=False,
    )
    return (done.stdout + done.stderr).decode("utf-8", "replace").splitlines()[0]
