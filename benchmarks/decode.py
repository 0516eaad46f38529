"""What our Python loop adds to a token: `AutoGLM.stream` against llama-bench, same weights and run.

llama-bench evaluates one token after another and samples nothing; ours samples, decodes to text and
yields a chunk for each. Both hold all weights in the kernels' order, with the same threads. They
take turns; each turn is a process of its own.

    python benchmarks/decode.py MODEL.gguf --llama-bench PATH [--tokens 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

OURS = """
import json, sys
from autoglm_gguf import AutoGLM
path, n_tokens, n_threads, constrain = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
options = {"n_draft": 0, **({"constrain": constrain} if constrain else {})}
with AutoGLM.load(path, mmproj=None, memory_budget="none", n_ctx=512, n_threads=n_threads,
                  n_gpu_layers=0) as model:
    model.generate("warm up", raw=True, max_tokens=2)
    answer = model.generate("a", raw=True, max_tokens=n_tokens, **options)
timings = answer.timings
print(json.dumps([timings.predicted_n, timings.predicted_per_second]))
"""


def run_ours(model: Path, n_tokens: int, n_threads: int, constrain: str) -> tuple[int, float]:
    """Tokens generated, and tokens per second from the first to the last."""
    command = [sys.executable, "-c", OURS, str(model), str(n_tokens), str(n_threads), constrain]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)
    n, speed = json.loads(found.stdout.splitlines()[-1])
    return n, speed


def run_llama_bench(program: Path, model: Path, n_tokens: int, n_threads: int) -> float:
    """Tokens per second."""
    options = {"-p": 0, "-n": n_tokens, "-t": n_threads, "-r": 1, "-ngl": 0, "-fa": 1}
    options |= {"-lm": "none", "--repack": 1}
    words = [str(word) for pair in options.items() for word in pair]
    command = [str(program), "-m", str(model), *words, "-o", "json"]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)
    return float(json.loads(found.stdout)[0]["avg_ts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    kinds = ("llama-bench", "ours", "ours, held to an action")
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(arguments.repeats):
        for kind in kinds if turn % 2 == 0 else reversed(kinds):
            size = (arguments.tokens, arguments.threads)
            if kind == "llama-bench":
                speed = run_llama_bench(arguments.llama_bench, arguments.model, *size)
            else:
                constrain = "action" if "action" in kind else ""
                n, speed = run_ours(arguments.model, *size, constrain)
                if n != arguments.tokens:
                    print(f"note: {kind} ended after {n} tokens", file=sys.stderr)
            speeds[kind].append(speed)
            print(f"turn {turn + 1}: {kind} {speed:.2f} tok/s", file=sys.stderr, flush=True)
    base = statistics.median(speeds["llama-bench"])
    print(f"{arguments.model.name}, {arguments.tokens} tokens, {arguments.threads} threads\n")
    print("| | tok/s, median (spread) | of llama-bench |\n|---|---|---|")
    for kind, found in speeds.items():
        median, spread = statistics.median(found), f"{min(found):.2f} to {max(found):.2f}"
        print(f"| {kind} | {median:.2f} ({spread}) | {median / base:.3f} |")


if __name__ == "__main__":
    main()
