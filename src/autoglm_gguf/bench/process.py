"""Fresh processes for `worker`: starting them, listening to them, and telling how they ended."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any

from autoglm_gguf.bench.report import DeviceFacts, Machine, Versions
from autoglm_gguf.bench.worker import Job
from autoglm_gguf.errors import BenchError

_TAIL_CHARACTERS = 300
# The parent's own sys.path: the child then is the same installation, however it was found.
_START = (
    "import json, sys; sys.path = json.loads(sys.argv[1]); "
    "from autoglm_gguf.bench.worker import main; main()"
)
_logger = logging.getLogger("autoglm_gguf.llama_cpp")


def probe_machine(device: str | None) -> tuple[Machine, Versions, str]:
    """Machine, versions, and why there is no GPU that layers would go to; empty if there is one.

    Asked in a process of its own: some drivers hold memory for whoever has asked them, and one that
    ends the process ends only that.

    Args:
        device: As ``ContextParams.device``.

    Raises:
        BenchError: The device is not there, or the process did not live to tell.
    """
    with Worker(None, device=device) as worker:
        answer = {message.pop("event"): message for message in worker.messages()}
        if "failed" in answer:
            raise BenchError(answer["failed"]["message"], hint=answer["failed"]["hint"])
        if "probed" not in answer:
            raise BenchError(f"devices: the process that lists them {worker.end()}")
    raw = answer["probed"]
    devices = tuple(DeviceFacts(**facts) for facts in raw["machine"].pop("devices"))
    backends = tuple(raw["versions"].pop("backends"))
    machine = Machine(**raw["machine"], devices=devices)
    versions = Versions(**raw["versions"], backends=backends)
    return machine, versions, "" if raw["gpus"] else raw["no_gpu"]


class Worker:
    """A fresh process that does one job; killed at the latest when the ``with`` block ends.

    Args:
        job: None lets it tell machine and versions.
        device: Whom it is asked about then.
    """

    def __init__(self, job: Job | None, *, device: str | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else an abort starts a debugger
        )
        asked = {
            "job": None if job is None else asdict(job),
            "device": device,
            "log": _logger.isEnabledFor(logging.DEBUG),
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{json.dumps(asked)}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died at once; `end` tells how

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it says, until it ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):  # else it died while it wrote
                yield json.loads(line)

    def end(self) -> str:
        """How it ended: exit status or signal, and its last words."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").splitlines()
        for line in lines:
            _logger.debug("%s", line)
        last = " | ".join(line.strip() for line in lines if line.strip())[-_TAIL_CHARACTERS:]
        how = f"ended with status {status}" if status >= 0 else f"was {_name_signal(-status)}"
        return f"{how} ({last})" if last else how

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()  # nothing happens if it has ended
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()


def _name_signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = ": most often the system had no memory left" if name == "SIGKILL" else ""
    return f"killed by {name}{why}"
