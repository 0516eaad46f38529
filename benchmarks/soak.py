"""A server under mixed traffic for ten minutes or longer: does it hold no more than it did?

    python benchmarks/soak.py [MODEL.gguf] [--seconds 600] [--clients 4] [--seed 0]

The server is ``autoglm-gguf serve`` in a process of its own. Clients ask for text and about
screenshots, whole and streamed, for actions and JSON, over HTTP and WebSocket, with one prefix and
with new ones; they leave in the middle, cancel, and send what is wrong. In ten rounds: after each
the clients wait, and what the idle server holds is looked at, with its threads and files, beside
its peak within the round. The first rounds warm up. It fails when an answer has a status that its
request should not get, or when the idle server grows by more than 4 MiB or 2 kB a request. Linux
only: /proc tells.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import frame
import httpx2
import numpy as np
import websockets
from frame import Measure
from PIL import Image

N_ROUNDS = 10
N_WARM = 3
MOST_GROWN_BYTES = 4 * 2**20
MOST_GROWN_REQUEST_BYTES = 2000
CHAT = "/v1/chat/completions"
ANSWER_TOKENS = 48
_PATIENCE_S = 600.0  # of a crowded machine, too
_START_S = 300.0
_SETTLE_S = 1.0
_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
_ACTIONS = 'Answer with one action: do(action="Tap", element=[x,y]) or finish(message="…")'
_WORDS = (
    *("the", "screen", "shows", "a", "list", "of", "apps", "and", "one", "is", "open", "now"),
    *("好", "的", "请", "打开"),
)


@dataclass
class Round:
    """What one round did, and what the server held after it."""

    n_requests: int = 0
    idle_bytes: int = 0
    """Anonymous memory, the clients waiting."""
    mapped_bytes: int = 0
    peak_bytes: int = 0
    """Resident, at most, in the round."""
    n_threads: int = 0
    n_files: int = 0


@dataclass
class Traffic:
    """What clients do, counted.

    Args:
        url: The server's address.
        chance: Seeded: a run's requests come again, their order in time does not.
    """

    url: str
    chance: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    """By what was done and how it ended."""
    faults: list[str] = field(default_factory=list)
    n_requests: int = 0

    def __post_init__(self) -> None:
        self._screens = [_screenshot(n) for n in range(6)]
        self._numbers = itertools.count()
        self._kinds: list[tuple[Callable[[httpx2.AsyncClient], Awaitable[str]], int]] = [
            (self._whole, 5),
            (self._streamed, 5),
            (self._left, 3),
            (self._socket, 4),
            (self._wrong, 4),
            (self._asked, 2),
        ]

    async def run(self, until: float) -> None:
        """One client, asking until a time of the monotonic clock."""
        async with httpx2.AsyncClient(base_url=self.url, timeout=_PATIENCE_S) as client:
            while time.monotonic() < until:
                kinds, weights = zip(*self._kinds, strict=True)
                kind = self.chance.choices(kinds, weights)[0]
                name = kind.__name__.strip("_")
                try:
                    self.seen[f"{name}: {await kind(client)}"] += 1
                except Exception as error:
                    self._fault(f"{name}: {error!r}")
                self.n_requests += 1

    def _fault(self, what: str) -> None:
        self.seen["faults"] += 1
        if len(self.faults) < 20:
            self.faults.append(what[:300])

    def _expect(self, status: int, *expected: int, body: object = "") -> str:
        if status not in expected:
            self._fault(f"status {status}, not {expected}: {body!r}"[:300])
        return str(status)

    def body(self) -> dict[str, Any]:
        """A sound chat completion: short or long, old or new, with a screenshot or without."""
        chance = self.chance
        words = chance.choices(_WORDS, k=chance.choice((3, 30, 300)))
        text = " ".join(words if chance.random() < 0.5 else _WORDS)
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"{text} {next(self._numbers)}"}]
        if chance.random() < 0.3:
            url = chance.choice(self._screens)
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        more: dict[str, Any] = {}
        kind = chance.randrange(8)
        if kind == 0:
            messages.insert(0, {"role": "system", "content": _ACTIONS})
        elif kind == 1:
            shape = {"name": "n", "schema": _SCHEMA}
            more["response_format"] = {"type": "json_schema", "json_schema": shape}
        elif kind == 2:
            more = {"logprobs": True, "top_logprobs": 5}
        elif kind == 3:
            more = {"temperature": 1.0, "top_p": 0.9, "seed": chance.randrange(1000)}
        return {"messages": messages, "max_tokens": chance.randint(1, ANSWER_TOKENS), **more}

    async def _whole(self, client: httpx2.AsyncClient) -> str:
        if self.chance.random() < 0.2:
            given = {"prompt": "Once upon a time", "max_tokens": ANSWER_TOKENS}
            answer = await client.post("/v1/completions", json=given)
        else:
            answer = await client.post(CHAT, json=self.body())
        return self._expect(answer.status_code, 200, body=answer.text)

    async def _streamed(self, client: httpx2.AsyncClient) -> str:
        body = {**self.body(), "stream": True}
        async with client.stream("POST", CHAT, json=body) as answer:
            text = "".join([piece async for piece in answer.aiter_text()])
        if not text.endswith("data: [DONE]\n\n") or '"error"' in text:
            self._fault(f"a stream ended with {text[-200:]!r}")
        return self._expect(answer.status_code, 200)

    async def _left(self, client: httpx2.AsyncClient) -> str:
        """Leave while it waits, while the prompt is evaluated, or after some tokens."""
        body = {**self.body(), "stream": self.chance.random() < 0.7}
        try:
            async with asyncio.timeout(self.chance.choice((0.001, 0.02, 0.1, 0.5))):
                async with client.stream("POST", CHAT, json=body) as answer:
                    async for _ in answer.aiter_bytes():
                        pass
                return "had ended"
        except TimeoutError:
            return "left"

    async def _socket(self, _: httpx2.AsyncClient) -> str:
        """A connection with some answers, of which some are cancelled, and faults between them."""
        address = self.url.replace("http", "ws", 1) + "/ws/generate"
        ended = "ended"
        async with websockets.connect(address, max_size=2**24, open_timeout=_PATIENCE_S) as socket:
            await socket.recv()
            for _ in range(self.chance.randint(1, 4)):
                if self.chance.random() < 0.2:
                    await socket.send(self.chance.choice(("{", "[]", '{"type": "x"}')))
                    ended = json.loads(await socket.recv())["type"]
                    continue
                await socket.send(json.dumps({"type": "generate", **self.body()}))
                cancels, n_frames = self.chance.random() < 0.4, 0
                while (got := json.loads(await socket.recv()))["type"] not in ("done", "error"):
                    n_frames += got["type"] == "token"
                    if cancels and n_frames == 2:
                        await socket.send('{"type": "cancel"}')
                ended = got.get("finish_reason", "error")
                if ended == "error":
                    self._fault(f"a WebSocket's answer: {got}")
                if self.chance.random() < 0.1:
                    await socket.send(json.dumps({"type": "generate", **self.body()}))
                    return "left"
        return ended

    async def _wrong(self, client: httpx2.AsyncClient) -> str:
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        said = self.body()
        tall = {"minLength": 10**9, "type": "string"}
        held = {"type": "json_schema", "json_schema": {"name": "x", "schema": tall}}
        bodies: list[Any] = [
            b"{",
            b"\xff" * 1000,
            {"messages": []},
            {**said, "temperature": -1},
            {**said, "max_tokens": 0},
            {**said, "response_format": held},
            {"messages": [{"role": "user", "content": [picture]}]},
            {"messages": [{"role": "user", "content": "word " * 50_000}]},
        ]
        body = self.chance.choice(bodies)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        answer = await client.post(CHAT, content=raw, headers=headers)
        return self._expect(answer.status_code, 400, body=answer.text)

    async def _asked(self, client: httpx2.AsyncClient) -> str:
        """What watches a server asks for, and what is not there."""
        path = self.chance.choice(("/health", "/metrics", "/v1/models", "/status", "/", "/nothing"))
        answer = await client.get(path)
        return self._expect(answer.status_code, 404 if path == "/nothing" else 200)


def _screenshot(n: int) -> str:
    """A screenshot's data URL, of another size and other noise for each number."""
    rows, columns = 10 + 4 * n, 6 + 2 * n
    noise = np.random.default_rng(n).integers(0, 255, (rows, columns, 3), np.uint8)
    data = io.BytesIO()
    size = (28 * columns, 28 * rows)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


# ---- the server's process


class Server:
    """``autoglm-gguf serve`` on a free port; its log goes to a file.

    Args:
        model: A text GGUF; None for the embedded model.
        log: Where it writes.
    """

    def __init__(self, model: Path | None, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "autoglm_gguf", "serve", "--port", "0", "--n-ctx", "2048"]
        command += [] if model is None else [str(model)]
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self._proc = Path("/proc") / str(self._process.pid)

    def wait_ready(self) -> str:
        """Its address, once the model is loaded."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            told = self._log.read_text("utf-8", "replace")
            address = re.search(r"listening on (http://\S+?);", told)
            if address and "ready: " in told:
                return address[1]
            time.sleep(0.2)
        self.stop()
        raise SystemExit(f"error: the server did not begin\n{self._log.read_text()[-2000:]}")

    def look(self, round_: Round) -> None:
        """Note what it holds; the peak counts anew from here."""
        status = (self._proc / "status").read_text()
        found = {k: int(v) for k, v in re.findall(r"(\w+):\s+(\d+)(?: kB)?\n", status)}
        round_.idle_bytes = found["RssAnon"] * 1024
        round_.mapped_bytes = (found["RssFile"] + found.get("RssShmem", 0)) * 1024
        round_.peak_bytes = found["VmHWM"] * 1024
        round_.n_threads = found["Threads"]
        round_.n_files = len(list((self._proc / "fd").iterdir()))
        (self._proc / "clear_refs").write_text("5")  # proc(5): VmHWM begins again

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


async def soak(server: Server, traffic: Traffic, seconds: float, n_clients: int) -> list[Round]:
    """Ten rounds of traffic; what was held after each."""
    rounds: list[Round] = []
    for number in range(N_ROUNDS):
        before = traffic.n_requests
        until = time.monotonic() + seconds / N_ROUNDS
        await asyncio.gather(*(traffic.run(until) for _ in range(n_clients)))
        await asyncio.sleep(_SETTLE_S)
        rounds.append(Round(traffic.n_requests - before))
        server.look(rounds[-1])
        frame.tell(f"round {number + 1}: {rounds[-1]}")
    return rounds


def judge(rounds: Sequence[Round]) -> tuple[int, list[str]]:
    """How much the idle server grew after the warm-up, and what is wrong with that.

    The growth is between the medians of the first and of the last three rounds after the warm-up:
    the allocator keeps a little more after one round and a little less after another.
    """
    kept = rounds[N_WARM:]
    first, last = kept[:3], kept[-3:]
    grown = round(
        statistics.median(r.idle_bytes for r in last)
        - statistics.median(r.idle_bytes for r in first)
    )
    most = max(MOST_GROWN_BYTES, MOST_GROWN_REQUEST_BYTES * sum(r.n_requests for r in kept))
    faults = []
    if grown > most:
        faults.append(f"the idle server grew by {grown} bytes ({most} at most)")
    for name in ("n_threads", "n_files"):
        before, after = (max(getattr(r, name) for r in part) for part in (first, last))
        if after > before + 2:  # a connection that is being closed, a thread about to end
            faults.append(f"{name} grew from {before} to {after}")
    return grown, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="default: the embedded autoglm-tiny")
    parser.add_argument("--seconds", type=frame.positive, default=600)
    parser.add_argument("--clients", type=frame.positive, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--log", type=Path, default=frame.ROOT / "out" / "soak" / "server.log")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").exists():
        parser.error("needs Linux's /proc")
    measures = [
        Measure("n_requests", "requests"),
        Measure("idle_bytes", "held when idle", "B"),
        Measure("mapped_bytes", "mapped", "B"),
        Measure("peak_bytes", "peak", "B"),
        Measure("n_threads", "threads"),
        Measure("n_files", "open files"),
    ]
    settings = {name: getattr(arguments, name) for name in ("seconds", "clients", "seed")}
    title = "A server under mixed traffic"
    record = frame.begin("soak", title, measures, {"ours": "autoglm-gguf serve"}, settings)
    server = Server(arguments.model, arguments.log)
    traffic = Traffic(server.wait_ready(), random.Random(arguments.seed))
    try:
        work = soak(server, traffic, arguments.seconds, arguments.clients)
        rounds = asyncio.run(work)
    finally:
        code = server.stop()
    record.rows[0].turns = [vars(r).copy() for r in rounds]
    record.complete = True
    grown, faults = judge(rounds)
    faults += [f"the server ended with code {code}"] if code else []
    faults += traffic.faults
    n = sum(r.n_requests for r in rounds[N_WARM:])
    record.notes.append(f"Grown when idle after {N_WARM} rounds: {grown} bytes in {n} requests.")
    record.notes += [f"Fault: {fault}" for fault in faults]
    kinds = frame.table(("what", "times"), sorted(traffic.seen.items()))
    head = ("round", *(measure.label for measure in measures))
    lines = [
        (number + 1, *(frame.figure(turn[m.key], m.unit) for m in measures))
        for number, turn in enumerate(record.rows[0].turns)
    ]
    frame.finish(record, arguments.json, [frame.table(head, lines), kinds])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
