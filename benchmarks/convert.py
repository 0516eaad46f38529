"""Conversion against upstream's two steps, in the same run, on the same disk, from a cold cache.

    python benchmarks/convert.py --work DIR [--size 1.7b] [--repeats 3]
    python benchmarks/convert.py --work DIR --size 9b --only ours,disk --repeats 1

The first compares with ``convert_hf_to_gguf.py`` (to bf16) and ``llama_model_quantize`` (to q4_0)
plus its mmproj step; it needs torch and llama.cpp's sources (``build_peers.sh`` unpacks them,
--upstream names others). Reading the source once and writing the result once is the disk's own
time, the third row: no converter can be faster. All times end when the result is on the disk
(``sync``). Caches are dropped before each, the whole system's where that is allowed. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import frame
from frame import Measure
from peers import PeerError, find_upstream, require
from random_checkpoint import find_or_build

LABELS = {
    "ours": "autoglm-gguf",
    "upstream": "upstream: convert to bf16, quantise, mmproj",
    "disk": "the disk: read the source, write the result",
}
MEASURES = [
    Measure("seconds", "time", "s", more=False),
    Measure("anonymous_bytes", "peak anonymous", "B", more=False),
    Measure("rss_bytes", "peak RSS", "B", more=False),
]
OURS = """
import sys
from autoglm_gguf import convert
convert(sys.argv[1], sys.argv[2], {outtype!r}, mmproj_outtype='f16', name='model')
"""
# Upstream recognises tokenizers by a hash; a random checkpoint's is told to it.
UPSTREAM = """
import runpy, sys
root = sys.argv[1]
sys.path[:0] = [root, root + '/gguf-py']
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'glm4'
sys.argv = ['convert_hf_to_gguf.py', *sys.argv[2:]]
runpy.run_path(root + '/convert_hf_to_gguf.py', run_name='__main__')
"""
QUANTIZE = """
import sys
from llama_cpp import llama_cpp as llama
params = llama.llama_model_quantize_default_params()
params.ftype, params.pure = 2, True
sys.exit(llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


def drop_caches(directory: Path) -> None:
    """Forget cached pages: the whole system's where that is allowed, else these files'."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in directory.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Sampler(threading.Thread):
    """Peak resident and anonymous memory of a process, looked at every 10 ms."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._halt = threading.Event()
        self.peaks = {"VmRSS": 0, "RssAnon": 0}

    def run(self) -> None:
        while not self._halt.wait(0.01):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                key, _, value = line.partition(":")
                if key in self.peaks:
                    self.peaks[key] = max(self.peaks[key], int(value.split()[0]) * 1024)

    def stop(self) -> dict[str, int]:
        self._halt.set()
        self.join()
        return {"rss_bytes": self.peaks["VmRSS"], "anonymous_bytes": self.peaks["RssAnon"]}


def run_step(*command: str) -> dict[str, Any]:
    """Run a Python snippet to its end and to the disk; seconds and memory peaks."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    sampler = Sampler(process.pid)
    sampler.start()
    _, errors = process.communicate()
    peaks = sampler.stop()
    if process.returncode:
        raise PeerError(f"a step failed: {errors.decode()[-400:]}")
    os.sync()
    return {"seconds": time.perf_counter() - began, **peaks}


def run_ours(checkpoint: Path, out: Path, outtype: str) -> dict[str, Any]:
    return run_step(OURS.format(outtype=outtype), str(checkpoint), str(out))


def run_upstream(checkpoint: Path, out: Path, upstream: Path) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    full, small = out / "bf16.gguf", out / "q4_0.gguf"
    base = (UPSTREAM, str(upstream), str(checkpoint))
    steps = [
        run_step(*base, "--outtype", "bf16", "--outfile", str(full)),
        run_step(QUANTIZE, str(full), str(small)),
        run_step(*base, "--mmproj", "--outtype", "f16", "--outfile", str(out / "mmproj.gguf")),
    ]
    return {
        "seconds": sum(step["seconds"] for step in steps),
        "rss_bytes": max(step["rss_bytes"] for step in steps),
        "anonymous_bytes": max(step["anonymous_bytes"] for step in steps),
        **{f"step_{n}_seconds": step["seconds"] for n, step in enumerate(steps, 1)},
    }


def time_disk(checkpoint: Path, out: Path, n_bytes: int) -> dict[str, float]:
    """Seconds to read the source once, cold, and to write the result's size once, synced."""
    buffer = bytearray(1 << 24)
    began = time.perf_counter()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    read = time.perf_counter() - began
    out.mkdir(parents=True, exist_ok=True)
    noise = os.urandom(1 << 24)
    began = time.perf_counter()
    with (out / "written").open("wb", buffering=0) as file:
        for _ in range(n_bytes >> 24):
            file.write(noise)
        os.fsync(file.fileno())
    os.sync()
    write = time.perf_counter() - began
    return {"seconds": read + write, "read_seconds": read, "write_seconds": write}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    frame.add_options(parser, repeats=3)
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to use")
    parser.add_argument("--size", choices=["0.4b", "1.7b", "9b"], default="1.7b")
    parser.add_argument(
        "--upstream", type=Path, help="llama.cpp's sources, if not build_peers.sh's"
    )
    frame.add_rows_option(parser, LABELS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    checkpoint = find_or_build(arguments.work, arguments.size)
    out = arguments.work / "out"
    written: list[int] = []

    def ours() -> Mapping[str, float]:
        found = run_ours(checkpoint, out, "q4_0")
        written.append(sum(path.stat().st_size for path in out.glob("*.gguf")))
        return found

    def upstream() -> Mapping[str, float]:
        require("torch", "transformers")
        return run_upstream(checkpoint, out, find_upstream(arguments.upstream))

    def disk() -> Mapping[str, float]:
        if not written:
            raise PeerError("not measured: what ours writes is not known")
        return time_disk(checkpoint, out, written[0])

    def cold(work: Callable[[], Mapping[str, float]]) -> Callable[[int], Mapping[str, float]]:
        def run(_: int) -> Mapping[str, float]:
            drop_caches(checkpoint)
            try:
                return work()
            finally:
                shutil.rmtree(out, ignore_errors=True)

        return run

    n_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    shown = {"source": f"{frame.figure(n_bytes, 'B')} bf16", "result": "q4_0, mmproj f16"}
    title = f"Conversion, {arguments.size}"
    labels = {name: LABELS[name] for name in arguments.only}
    packages = ["torch", "transformers"] if "upstream" in arguments.only else []
    record = frame.begin(f"convert-{arguments.size}", title, MEASURES, labels, shown, packages)
    works = {"ours": ours, "upstream": upstream, "disk": disk}
    frame.run_turns(record, {name: cold(works[name]) for name in arguments.only}, arguments)


if __name__ == "__main__":
    main()
