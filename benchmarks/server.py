"""What the server adds to an answer: the same requests through the library and over HTTP, in turn.

One process holds the model and serves it; requests over HTTP come from a process of their own, as a
client's do. Measured from outside: to the first text, and from there to the last. Nothing is reused
of an earlier prompt, so that every request costs the same.

    python benchmarks/server.py [MODEL.gguf] [--tokens 64] [--repeats 7] [--short]

The ratio is the library's time over the server's: below 1 is what HTTP costs. The spread of a long
prompt's time hides a few milliseconds; one sentence can be asked often enough to tell them:
``--short --tokens 16 --repeats 100``. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import frame
import numpy as np
import uvicorn
from frame import Measure, Record
from PIL import Image

from autoglm_gguf import AutoGLM, default_pair
from autoglm_gguf.server.app import create_app
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.running import configure, open_sockets

# Takes requests, a line of JSON each; tells milliseconds to the first text, and on to the end.
CLIENT = """
import http.client, json, sys, time
for line in sys.stdin:
    body = line.strip().encode()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=600)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    first = last = n = 0
    while event := answer.readline():
        if not event.startswith(b"data: {"):
            continue
        now = time.perf_counter()
        chunk = json.loads(event[6:])
        choice = chunk["choices"][0]
        if choice["delta"].get("content") and not first:
            first = now
        if choice["finish_reason"]:
            last, n = now, chunk["timings"]["predicted_n"]
    connection.close()
    print(json.dumps([1000 * (first - began), 1000 * (last - first), n]), flush=True)
"""
SENTENCE = "You are an agent that operates a phone. "
LONG = SENTENCE * 12
RESAMPLED = 4000
SCREEN = (432, 952)  # 15 x 34 = 510 image tokens


def screenshot() -> bytes:
    """A PNG of blocks."""
    blocks = np.random.default_rng(0).integers(0, 255, (34, 15, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(blocks).resize(SCREEN, Image.Resampling.NEAREST).save(data, "PNG")
    return data.getvalue()


def requests(words: str, n_tokens: int) -> dict[str, dict[str, Any]]:
    """Bodies by what they show; one sentence is asked alone."""
    url = "data:image/png;base64," + base64.b64encode(screenshot()).decode()
    picture = {"type": "image_url", "image_url": {"url": url}}
    more = {"max_tokens": n_tokens, "temperature": 0.0, "cache_prompt": False, "stream": True}
    bodies = {
        "text": {"messages": [{"role": "user", "content": words}], **more},
        "screenshot": {"messages": [{"role": "user", "content": [picture, words]}], **more},
    }
    return {"text": bodies["text"]} if words == SENTENCE else bodies


def ask_library(model: AutoGLM, kind: str, words: str, n_tokens: int) -> list[float]:
    """Milliseconds to the first text, from there to the end, and tokens."""
    image = screenshot() if kind == "screenshot" else None
    first = 0.0
    began = time.perf_counter()
    stream = model.stream(
        words, image=image, max_tokens=n_tokens, temperature=0.0, cache_prompt=False
    )
    for chunk in stream:
        if chunk.text and not first:
            first = time.perf_counter()
    last = time.perf_counter()
    n = chunk.timings.predicted_n if chunk.timings else 0
    return [1000 * (first - began), 1000 * (last - first), n]


@contextmanager
def serving(model: AutoGLM) -> Iterator[int]:
    """The model on a free port of loopback."""
    params = ServerParams(port=0)
    app = create_app(lambda: model, params)
    sockets = open_sockets(params)
    server = uvicorn.Server(configure(app, params))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)))
    thread.start()
    while app.state.service.holder.state == "loading":
        time.sleep(0.01)
    try:
        yield sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def measure(
    model: AutoGLM, words: str, n_tokens: int, repeats: int
) -> dict[str, dict[str, list[list[float]]]]:
    """By request and way, what each repeat took; the ways take turns."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    with serving(model) as port:
        command = [sys.executable, "-c", CLIENT, str(port)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as client:
            assert client.stdin is not None and client.stdout is not None
            for kind, body in requests(words, n_tokens).items():
                ways = found[kind] = {"library": [], "server": []}
                for n in range(repeats + 1):  # the first one warms up
                    order = ("library", "server") if n % 2 else ("server", "library")
                    for way in order:  # neither always comes after the other's heat
                        if way == "library":
                            taken = ask_library(model, kind, words, n_tokens)
                        else:
                            client.stdin.write(json.dumps(body) + "\n")
                            taken = json.loads(client.stdout.readline())
                        if n:
                            ways[way].append(taken)
            client.stdin.close()
    return found


def fill(record: Record, found: dict[str, dict[str, list[list[float]]]]) -> None:
    """What each repeat took, into the rows."""
    for kind, ways in found.items():
        for way, runs in ways.items():
            row = record.row("ours" if way == "server" else way)
            for turn, (first, rest, n) in enumerate(runs):
                while len(row.turns) <= turn:
                    row.turns.append({})
                row.turns[turn] |= {
                    f"{kind}_first_ms": frame.rounded(first),
                    f"{kind}_token_ms": frame.rounded(rest / max(1, n - 1)),
                }
        pairs = list(zip(ways["library"], ways["server"], strict=True))
        more = [served[0] - taken[0] for taken, served in pairs]
        low, high = likely_median(more)
        record.notes.append(
            f"{kind}: first text {statistics.median(more):+.1f} ms, between {low:+.1f} and "
            f"{high:+.1f} ms with 95 % confidence; {pairs[0][0][2]:.0f} tokens."
        )


def likely_median(values: Sequence[float]) -> tuple[float, float]:
    """Between what the median lies with 95 % confidence, by resampling."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLED)
    )
    return medians[RESAMPLED // 40], medians[-RESAMPLED // 40 - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    frame.add_options(parser, repeats=7)
    parser.add_argument("model", nargs="?", type=Path, help="default: the embedded autoglm-tiny")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--short", action="store_true", help="one sentence, no screenshot")
    arguments = parser.parse_args()
    pair = default_pair() if arguments.model is None else None
    path = pair.text if pair else arguments.model
    words = SENTENCE if arguments.short else LONG
    measures = [
        Measure(f"{kind}_{key}_ms", f"{kind}, {label}", "ms", more=False)
        for kind in requests(words, 1)
        for key, label in (("first", "first text"), ("token", "a token"))
    ]
    labels = {"library": "the library", "ours": "the server"}
    weights = "autoglm-tiny" if pair else frame.figure(path.stat().st_size, "B")
    settings = {"model": path.name, "weights": weights, "tokens at most": arguments.tokens}
    name = "server-tiny" if pair else f"server-{path.parent.name.partition('-')[0]}"
    name += "-short" if arguments.short else ""
    title = f"What the server adds, {name.partition('-')[2].replace('-', ', ')}"
    record = frame.begin(name, title, measures, labels, settings)
    model = AutoGLM.load(
        path, memory_budget="none", n_ctx=2048, n_gpu_layers=0, n_threads=arguments.threads
    )
    with frame.until_interrupted(record):
        fill(record, measure(model, words, arguments.tokens, arguments.repeats))
    frame.finish(record, arguments.json)


if __name__ == "__main__":
    main()
