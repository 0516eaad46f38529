"""Prefill and decode: ours, llama-bench, llama-cpp-python, xllamacpp, transformers, ONNX Runtime.

    python benchmarks/speed.py --work DIR [--size 1.7b] [--prompt 512] [--tokens 64] [--repeats 5]
    python benchmarks/speed.py --work DIR --only ours,held,llama-bench

The same random weights (``random_checkpoint.py``, made in DIR once), prompt and threads for all;
the llama.cpp ones and ONNX Runtime hold the very same q4_0 blocks, transformers the checkpoint's
own bf16 and f32. Each turn of each row is a process of its own: it loads, answers a short prompt to
warm up, then the one that counts. llama-bench samples nothing and shows no text; the others sample,
and ours, llama-cpp-python and xllamacpp look for stop strings too. What is not installed or not
built says so in its row. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import frame
import onnx_text
import runtimes
from agent_steps import make_pair
from frame import Measure
from peers import PeerError, find_program, library_path, require
from random_checkpoint import find_or_build
from runtimes import Prompt, TextSettings

LABELS = {
    "ours": "autoglm-gguf",
    "held": "autoglm-gguf, held to an action",
    "llama-bench": "llama-bench",
    "handler": "llama-cpp-python",
    "xllamacpp": "xllamacpp, its wheel",
    "onnx": "ONNX Runtime, the same q4_0",
    "bf16": "transformers, bf16",
    "f32": "transformers, f32",
}
PACKAGES = ("xllamacpp", "onnxruntime", "torch", "transformers")
WORDS = " ".join(str(n) for n in range(2000))
WARM_UP = 16
"""Tokens of the short prompt that comes first."""


def measures(n_prompt: int, n_tokens: int) -> list[Measure]:
    return [
        Measure("prefill", f"prefill of {n_prompt}", "tok/s", more=True),
        Measure("decode", f"decode of {n_tokens}", "tok/s", more=True),
        Measure("peak_bytes", "peak memory", "B", more=False),
    ]


def make_prompt(settings: TextSettings, n: int, n_tokens: int) -> tuple[Prompt, Prompt]:
    """One of about ``n`` tokens, and the short one, as text and as token ids."""
    with runtimes.start("ours", LABELS["ours"], settings, 600.0) as child:
        child.start()

        def cut(n_wanted: int, max_tokens: int) -> Prompt:
            low, high = 1, len(WORDS)
            while low < high:  # the longest text within
                middle = (low + high + 1) // 2
                if len(child.ask("tokenize", WORDS[:middle])) <= n_wanted:
                    low = middle
                else:
                    high = middle - 1
            return Prompt(WORDS[:low], child.ask("tokenize", WORDS[:low]), max_tokens)

        return cut(n, n_tokens), cut(WARM_UP, 2)


def run_child(
    kind: str, settings: TextSettings, prompts: tuple[Prompt, Prompt], timeout_s: float
) -> tuple[Mapping[str, float], dict[str, Any]]:
    """Figures of a fresh process, and what it tells of itself."""
    with runtimes.start(kind, LABELS[kind], settings, timeout_s) as child:
        facts = child.start()
        for prompt in reversed(prompts):
            found = child.answer(vars(prompt))
        return {**found, "peak_bytes": child.memory()["VmHWM"]}, facts


def run_llama_bench(
    program: Path, settings: TextSettings, n_prompt: int, n_tokens: int, timeout_s: float
) -> dict[str, float]:
    """Its own figures; it warms up by itself.

    Left alone it decodes in an empty context; so that is asked of it at the depth where the other
    rows decode, behind the prompt.

    Raises:
        PeerError: It failed.
    """
    options = {"-m": settings.text, "-t": settings.n_threads, "-b": settings.n_batch}
    options |= {"-ub": settings.n_batch, "-r": 1, "-ngl": 0, "-fa": 1}
    options |= {"-lm": "none", "--repack": 1, "-o": "json"}
    words = [str(program), *(str(word) for pair in options.items() for word in pair)]
    tests = {"prefill": (n_prompt, 0, 0), "decode": (0, n_tokens, n_prompt)}
    return {
        name: _ask_llama_bench([*words, "-p", str(p), "-n", str(n), "-d", str(depth)], timeout_s)
        for name, (p, n, depth) in tests.items()
    }


def _ask_llama_bench(words: Sequence[str], timeout_s: float) -> float:
    """Tokens per second of its one test."""
    environment = {**os.environ, **library_path(Path(words[0]))}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_s, env=environment, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or ""
        raise PeerError(f"llama-bench: {error!r} {said[-200:]}") from error
    (test,) = json.loads(done.stdout)
    return float(test["avg_ts"])


def find_graph(work: Path, size: str, text: Path) -> Path:
    """The ONNX graph in ``work``, made at the first time.

    Raises:
        PeerError: onnx is not installed.
    """
    path = work / f"{size}-onnx" / "model.onnx"
    if not path.with_suffix(".json").exists():  # written last
        require("onnx", "onnxruntime")
        frame.tell("writing the ONNX graph")
        onnx_text.build(text, path)
    return path


def make_runs(
    arguments: argparse.Namespace, record: frame.Record, settings: TextSettings
) -> dict[str, Callable[[int], Mapping[str, float]]]:
    """What each row does a turn."""
    prompts = make_prompt(settings, arguments.prompt, arguments.tokens)
    seconds = arguments.timeout

    def child(kind: str) -> Callable[[int], Mapping[str, float]]:
        def run(_: int) -> Mapping[str, float]:
            if kind == "onnx":
                find_graph(arguments.work, arguments.size, Path(settings.text))
            found, facts = run_child(kind, settings, prompts, seconds)
            row = record.row(kind)
            row.facts |= facts
            if found["predicted_n"] != arguments.tokens:
                row.facts["note"] = f"ended after {found['predicted_n']:.0f} tokens"
            return found

        return run

    def bench(_: int) -> Mapping[str, float]:
        program = find_program("llama-bench", arguments.llama_bench)
        n_prompt = len(prompts[0].ids)
        return run_llama_bench(program, settings, n_prompt, arguments.tokens, seconds)

    return {name: bench if name == "llama-bench" else child(name) for name in arguments.only}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    frame.add_options(parser, repeats=5)
    parser.add_argument("--work", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--size", default="1.7b", choices=["0.4b", "1.7b", "9b"])
    parser.add_argument("--llama-bench", type=Path, help="its executable, if not build_peers.sh's")
    parser.add_argument("--prompt", type=frame.positive, default=512, help="tokens")
    parser.add_argument("--tokens", type=frame.positive, default=64)
    parser.add_argument("--threads", type=frame.positive, default=2)
    frame.add_rows_option(parser, LABELS)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a start or an answer")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    text, _ = make_pair(arguments.work, arguments.size)
    settings = TextSettings(
        str(text),
        str(find_or_build(arguments.work, arguments.size)),
        str(arguments.work / f"{arguments.size}-onnx" / "model.onnx"),
        n_ctx=1024,
        n_threads=arguments.threads,
    )
    shown = {
        "weights": f"random, {arguments.size}, q4_0",
        "n_ctx": settings.n_ctx,
        "n_batch": settings.n_batch,
        "n_threads": settings.n_threads,
    }
    record = frame.begin(
        f"speed-{arguments.size}",
        f"Prefill and decode, {arguments.size}",
        measures(arguments.prompt, arguments.tokens),
        {name: LABELS[name] for name in arguments.only},
        shown,
        PACKAGES,
    )
    frame.run_turns(record, make_runs(arguments, record, settings), arguments)


if __name__ == "__main__":
    main()
