"""Conversion against upstream's two steps, in the same run, on the same disk, from a cold cache.

    python benchmarks/convert.py --work DIR --upstream LLAMA_CPP_DIR [--size 1.7b] [--repeats 3]
    python benchmarks/convert.py --work DIR --size 9b --repeats 1

The first compares with ``convert_hf_to_gguf.py`` (to bf16) and ``llama_model_quantize`` (to q4_0)
plus its mmproj step; LLAMA_CPP_DIR is ``vendor/llama.cpp`` of the pinned llama-cpp-python's sdist
and needs torch. The second measures against the disk alone: reading the source once and writing the
result once. All times end when the result is on the disk (``sync``). Writes JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from random_checkpoint import build

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
        sys.exit(f"a step failed:\n{errors.decode()[-2000:]}")
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
        "steps_seconds": [round(step["seconds"], 2) for step in steps],
    }


def time_disk(checkpoint: Path, out: Path, n_bytes: int) -> dict[str, float]:
    """Seconds to read the source once, cold, and to write the result's size once, synced."""
    drop_caches(checkpoint)
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
    (out / "written").unlink()
    return {"read_seconds": read, "write_seconds": write}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    return {
        "median_seconds": round(statistics.median(seconds), 2),
        "spread_seconds": [round(min(seconds), 2), round(max(seconds), 2)],
        "peak_rss_bytes": max(run["rss_bytes"] for run in runs),
        "peak_anonymous_bytes": max(run["anonymous_bytes"] for run in runs),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to use")
    parser.add_argument("--size", choices=["1.7b", "9b"], default="1.7b")
    parser.add_argument("--upstream", type=Path, help="llama.cpp's sources; without it, disk only")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    checkpoint = arguments.work / f"random-{arguments.size}"
    if not (checkpoint / "model.safetensors.index.json").exists():
        build(checkpoint, arguments.size)
    source_bytes = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    out = arguments.work / "out"
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    disk: list[dict[str, float]] = []
    result_bytes = 0
    for _ in range(arguments.repeats):
        drop_caches(checkpoint)
        ours.append(run_ours(checkpoint, out / "ours", "q4_0"))
        result_bytes = sum(p.stat().st_size for p in (out / "ours").glob("*.gguf"))
        shutil.rmtree(out)
        if arguments.upstream is not None:
            drop_caches(checkpoint)
            theirs.append(run_upstream(checkpoint, out / "theirs", arguments.upstream))
            shutil.rmtree(out)
        disk.append(time_disk(checkpoint, out, result_bytes))
        shutil.rmtree(out)
    report: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "source_bytes": source_bytes,
        "result_bytes": result_bytes,
        "ours": summary(ours),
        "disk": disk,
    }
    limit = statistics.median(d["read_seconds"] + d["write_seconds"] for d in disk)
    report["times_the_disk"] = round(report["ours"]["median_seconds"] / limit, 2)
    if theirs:
        report["upstream"] = summary(theirs)
        ratio = report["upstream"]["median_seconds"] / report["ours"]["median_seconds"]
        report["times_faster_than_upstream"] = round(ratio, 2)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
