"""The runtimes that `agent_steps.py` compares: each in a process of its own, asked step by step.

Messages are the client's own, OpenAI's shapes with images as data URLs; every runtime decodes them
itself. Whatever does not answer in time is killed, by its process id. Knows no conversation and no
tables. Linux only: peaks are read in /proc.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

Messages = list[dict[str, Any]]
_TAIL_CHARACTERS = 500


class PeerError(RuntimeError):
    """A runtime died, refused or did not answer in time."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every runtime but `ours` with its defaults."""

    text: str
    mmproj: str
    n_ctx: int = 4096
    n_batch: int = 512
    n_threads: int = 2
    max_tokens: int = 16


# ---- in the processes of their own


class Runtime(Protocol):
    """What a child process does."""

    def facts(self) -> dict[str, Any]: ...

    def answer(self, messages: Messages) -> dict[str, Any]: ...


class Ours:
    """`AutoGLM.load` and `AutoGLM.stream`."""

    def __init__(self, settings: Settings, *, defaults: bool) -> None:
        from autoglm_gguf import AutoGLM

        given: dict[str, Any] = {
            "memory_budget": "none",
            "n_ctx": settings.n_ctx,
            "n_batch": settings.n_batch,
            "n_threads": settings.n_threads,
            "n_gpu_layers": 0,
            "type_k": "f16",
            "type_v": "f16",
            "flash_attn": True,
        }
        self._model = AutoGLM.load(
            settings.text, mmproj=settings.mmproj, **({} if defaults else given)
        )
        self._max_tokens = settings.max_tokens

    def facts(self) -> dict[str, Any]:
        """How it is held, as planned and as measured now."""
        plan, usage = self._model.info.plan, self._model.memory()
        assert plan is not None and usage is not None
        return {
            "weights": plan.weights,
            "tower": plan.tower,
            "context": asdict(plan.context),
            "planned_bytes": plan.peak_bytes,
            "measured_bytes": usage.peak_bytes,
        }

    def answer(self, messages: Messages) -> dict[str, Any]:
        """One step, timed from the call to the first chunk and to the last."""
        began = time.perf_counter()
        first, text, tokens, last = 0.0, "", list[int](), None
        for last in self._model.stream(messages, max_tokens=self._max_tokens):
            first = first or time.perf_counter()
            text += last.text
            tokens.extend(last.tokens)
        ended = time.perf_counter()
        assert last is not None and last.timings is not None and last.usage is not None
        timings = last.timings
        return {
            "ttft_s": first - began,
            "total_s": ended - began,
            "text": text,
            "tokens": tokens,
            "predicted_n": timings.predicted_n,
            "prompt_tokens": last.usage.prompt_tokens,
            "evaluated_n": timings.prompt_n,
            "cache_n": getattr(timings, "cache_n", 0),
            "image_s": timings.image_ms / 1000,
            "prompt_s": timings.prompt_ms / 1000,
        }

    def items(self, messages: Messages) -> list[Any]:
        """A prompt's token ids, an image as ``[digest, cells]``; nothing is evaluated."""
        from autoglm_gguf.vision import read_pixels

        prompt, limits = self._model.render(messages), self._model.info.vision
        assert limits is not None
        found: list[Any] = list(self._model.tokenize(prompt.segments[0]))
        for source, segment in zip(prompt.images, prompt.segments[1:], strict=True):
            pixels = read_pixels(source, limits)
            digest = hashlib.sha256(pixels.array.tobytes()).hexdigest()
            found += [[digest, pixels.n_tokens], *self._model.tokenize(segment)]
        return found


class Handler:
    """llama-cpp-python's `Llama` with its vision handler for any libmtmd model."""

    def __init__(self, settings: Settings) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_chat_format import MTMDChatHandler

        self._max_tokens = settings.max_tokens
        self._model = Llama(
            settings.text,
            chat_handler=MTMDChatHandler(settings.mmproj, verbose=False, use_gpu=False),
            n_ctx=settings.n_ctx,
            n_batch=settings.n_batch,
            n_ubatch=settings.n_batch,
            n_threads=settings.n_threads,
            n_threads_batch=settings.n_threads,
            n_gpu_layers=0,
            flash_attn=True,  # the handler takes it over for the vision tower
            # It shows the template bos's text and aborts the process where a file names none. This
            # template has no use for it, and nothing adds one.
            kv_overrides={"tokenizer.ggml.bos_token_id": 0},
            verbose=False,
        )
        # A stream tells no count: every token made passes through here.
        self._tokens: list[int] = []
        sample: Callable[..., int] = self._model.sample

        def counted(*args: Any, **kwargs: Any) -> int:
            self._tokens.append(sample(*args, **kwargs))
            return self._tokens[-1]

        self._model.sample = counted

    def facts(self) -> dict[str, Any]:
        import llama_cpp

        return {"version": llama_cpp.__version__}

    def answer(self, messages: Messages) -> dict[str, Any]:
        """One step; everything is evaluated again, since the handler clears the KV cache."""
        self._tokens.clear()
        began = time.perf_counter()
        first, text = 0.0, ""
        for chunk in self._model.create_chat_completion(
            messages,
            stream=True,
            temperature=0.0,
            repeat_penalty=1.0,
            max_tokens=self._max_tokens,
        ):
            piece = chunk["choices"][0]["delta"].get("content")
            if piece:
                first = first or time.perf_counter()
                text += piece
        ended = time.perf_counter()
        return {
            "ttft_s": (first or ended) - began,
            "total_s": ended - began,
            "text": text,
            "tokens": list(self._tokens),
            "predicted_n": len(self._tokens),
        }


def open_runtime(kind: str, settings: Settings) -> Runtime:
    """Load a model."""
    if kind == "handler":
        return Handler(settings)
    return Ours(settings, defaults=kind == "defaults")


def child(job: dict[str, Any]) -> None:
    """Answer requests, a line of JSON each, until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    runtime = open_runtime(job["kind"], Settings(**job["settings"]))

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
    """`Ours` or `Handler` in a process of its own; kinds: ours, defaults, handler."""

    def __init__(self, name: str, kind: str, settings: Settings, timeout_s: float) -> None:
        job = json.dumps({"kind": kind, "settings": asdict(settings)})
        super().__init__(name, [sys.executable, __file__, job], timeout_s)

    def start(self) -> dict[str, Any]:
        return dict(self._read())

    def answer(self, messages: Messages) -> dict[str, Any]:
        return dict(self.ask("answer", messages))

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
        command = [str(program), "-m", settings.text, "--mmproj", settings.mmproj]
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
        with self.in_time():
            try:
                return self._stream(json.dumps(body).encode())
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self.failure(f"request failed: {error!r}") from error

    def _stream(self, body: bytes) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout_s)
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
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
            piece = "".join(c["delta"].get("content") or "" for c in chunk["choices"])
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


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
