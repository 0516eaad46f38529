"""What an import costs: ours beside the packages that one could import in its place.

    python benchmarks/imports.py [--repeats 9]

Each turn of each row is a fresh process that imports and ends; the first turn, which may find the
disk cold, is left out. Seconds are of the import statement alone, Python's own start apart; memory
is the process's peak, an empty Python's beside it. ``AutoGLM`` is ours ready to load a model. Linux
only: peaks are read in /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping

import frame
from frame import Measure
from peers import PeerError, require

STATEMENTS = {
    "ours": "import autoglm_gguf",
    "ready": "from autoglm_gguf import AutoGLM",
    "llama_cpp": "import llama_cpp",
    "xllamacpp": "import xllamacpp",
    "onnxruntime": "import onnxruntime",
    "transformers": "from transformers import Glm4vForConditionalGeneration",
    "nothing": "pass",
}
MEASURES = [
    Measure("import_ms", "import", "ms", more=False),
    Measure("peak_bytes", "peak memory", "B", more=False),
]
CHILD = """
import sys, time
began = time.perf_counter()
exec(sys.argv[1])
seconds = time.perf_counter() - began
import json
# Not getrusage: its peak begins with what the parent held.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([1000 * seconds, 1024 * int(peak)]))
"""


def run(name: str) -> Mapping[str, float]:
    """Milliseconds and bytes of a fresh process.

    Raises:
        PeerError: The package is not installed, or its import failed.
    """
    statement = STATEMENTS[name]
    if name not in ("ours", "ready", "nothing"):
        require(name)
    words = [sys.executable, "-c", CHILD, statement]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise PeerError(f"{statement}: exit status {done.returncode}: {done.stderr[-200:]}")
    took, peak = json.loads(done.stdout.splitlines()[-1])
    return {"peak_bytes": peak} if name == "nothing" else {"import_ms": took, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    frame.add_options(parser, repeats=9)
    arguments = parser.parse_args()
    labels = {name: f"`{statement}`" for name, statement in STATEMENTS.items()}
    labels["nothing"] = "nothing, for scale"
    packages = ("xllamacpp", "onnxruntime", "torch", "transformers")
    record = frame.begin("imports", "Import time", MEASURES, labels, {}, packages)
    for name in STATEMENTS:
        frame.attempt(record.row(name), lambda name=name: run(name))  # the first, left out

    def again(name: str) -> Callable[[int], Mapping[str, float]]:
        return lambda _: run(name)

    frame.run_turns(record, {name: again(name) for name in STATEMENTS}, arguments)


if __name__ == "__main__":
    main()
