"""From nothing to the first token, and what is held then: ours and what one could load instead.

    python benchmarks/load.py --work DIR [--size 1.7b] [--repeats 5]

Each turn of each row starts a process of its own (ours, llama-cpp-python, llama-server, xllamacpp)
with the same random q4_0 weights, their file in the page cache, waits until it says that it is
ready, and asks for one token after 16 of a prompt. Then comes a prompt of 512 tokens with 16 more,
and its peak of resident memory is read. Ours stands there twice: with everything in memory, as the
others hold it, and with its defaults, the plan for 4 GB. Python's own start and all imports are
counted. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import frame
import runtimes
from agent_steps import make_pair
from frame import Measure
from peers import Server, Settings, find_program
from runtimes import Prompt, TextSettings
from speed import make_prompt

LABELS = {
    "ours": "autoglm-gguf",
    "defaults": "autoglm-gguf, its defaults",
    "handler": "llama-cpp-python",
    "server": "llama-server",
    "xllamacpp": "xllamacpp, its wheel",
}
MEASURES = [
    Measure("ready_s", "ready", "s", more=False),
    Measure("first_s", "first token", "s", more=False),
    Measure("peak_bytes", "peak memory", "B", more=False),
    Measure("planned_bytes", "planned", "B"),
]
N_PROMPT, N_TOKENS = 512, 16


def run_child(
    kind: str, settings: TextSettings, prompts: tuple[Prompt, Prompt]
) -> Mapping[str, float]:
    """Seconds since the process was started, and bytes."""
    long, short = prompts
    began = time.perf_counter()
    with runtimes.start(kind, LABELS[kind], settings, 600.0) as child:
        facts = child.start()
        ready = time.perf_counter()
        child.answer({**vars(short), "max_tokens": 1})
        first = time.perf_counter()
        child.answer(vars(long))
        found = {"ready_s": ready - began, "first_s": first - began}
        found["peak_bytes"] = child.memory()["VmHWM"]
        if "planned_bytes" in facts:
            found["planned_bytes"] = facts["planned_bytes"]
        return found


def run_server(
    program: Path, settings: TextSettings, prompts: tuple[Prompt, Prompt]
) -> Mapping[str, float]:
    """The same of llama-server, asked over HTTP."""
    long, short = prompts
    given = Settings(
        settings.text,
        n_ctx=settings.n_ctx,
        n_batch=settings.n_batch,
        n_threads=settings.n_threads,
        max_tokens=N_TOKENS,
    )
    began = time.perf_counter()
    with Server(LABELS["server"], program, given, 600.0) as server:
        server.start()
        ready = time.perf_counter()
        server.complete(short.ids, 1)
        first = time.perf_counter()
        server.complete(long.ids, N_TOKENS)
        found = {"ready_s": ready - began, "first_s": first - began}
        return {**found, "peak_bytes": server.memory()["VmHWM"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    frame.add_options(parser, repeats=5)
    parser.add_argument("--work", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--size", default="1.7b", choices=["0.4b", "1.7b", "9b"])
    parser.add_argument("--server", type=Path, help="llama-server, if not build_peers.sh's")
    parser.add_argument("--threads", type=frame.positive, default=2)
    arguments = parser.parse_args()
    text, _ = make_pair(arguments.work, arguments.size)
    settings = TextSettings(str(text), n_threads=arguments.threads)
    shown = {
        "weights": f"random, {arguments.size}, q4_0",
        "file": frame.figure(text.stat().st_size, "B"),
        "n_ctx": settings.n_ctx,
        "n_batch": settings.n_batch,
        "n_threads": settings.n_threads,
    }
    title = f"Load time and memory, {arguments.size}"
    record = frame.begin(f"load-{arguments.size}", title, MEASURES, LABELS, shown, ["xllamacpp"])
    prompts = make_prompt(settings, N_PROMPT, N_TOKENS)

    def child(kind: str) -> Callable[[int], Mapping[str, float]]:
        return lambda _: run_child(kind, settings, prompts)

    runs = {kind: child(kind) for kind in LABELS if kind != "server"}
    runs["server"] = lambda _: run_server(
        find_program("llama-server", arguments.server), settings, prompts
    )
    frame.run_turns(record, {kind: runs[kind] for kind in LABELS}, arguments)


if __name__ == "__main__":
    main()
