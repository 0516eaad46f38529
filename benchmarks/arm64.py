"""The pinned llama.cpp built for arm64 and run under emulation: the same logits as on x86-64?

    python benchmarks/arm64.py --llama-cpp LLAMA_CPP_DIR --work DIR

LLAMA_CPP_DIR is ``vendor/llama.cpp`` of the pinned llama-cpp-python's sdist. Needs cmake, ninja,
g++, aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu qemu-user). Builds the
libraries once for each machine and ggml's CPU backend once for each set of instructions, converts
autoglm-tiny, runs ``logits.cpp`` with each build, and compares with the x86-64 build (AVX2). Writes
Markdown to stdout. Says nothing about speed: the arm64 builds are emulated.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoglm_gguf import AutoGLM, convert

Numbers: TypeAlias = NDArray[np.float32]
ROOT = Path(__file__).parents[1]
OUTTYPES = ("f16", "q8_0", "q4_0")
MMPROJ = {"f32": "f16", "f16": "f16", "q8_0": "q8_0", "q4_0": "q8_0"}
TASKS = ("打开微信", "Open Settings", "返回上一页", "Open Chrome", "打开设置", "Go back home")
SIZE = (280, 616)  # pixels; multiples of 28, so that libmtmd leaves them alone
MODES = {
    "batch, repacked": (128, True),
    "one by one, repacked": (1, True),
    "batch": (128, False),
    "one by one": (1, False),
}
REPACKED = ("q8_0", "q4_0")  # f16 has no order but the file's
HEAD = "| build | run | max abs error / range | 1 - cosine | same largest |\n|---|---|---|---|---|"
COMMON = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=ON",
    "GGML_NATIVE=OFF",
    "GGML_OPENMP=OFF",
    "GGML_LLAMAFILE=OFF",
    "GGML_CCACHE=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_COMMON=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_TOOLS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_SERVER=OFF",
    "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_MTMD=ON",
)
ARM64 = (
    "CMAKE_SYSTEM_NAME=Linux",
    "CMAKE_SYSTEM_PROCESSOR=aarch64",
    "CMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
    "CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
)
X86_FEATURES = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
# 128-bit vectors where there is SVE, as in phones.
QEMU = ("qemu-aarch64", "-cpu", "max,sve-max-vq=1", "-L", "/usr/aarch64-linux-gnu")


@dataclass(frozen=True)
class Build:
    """One set of instructions."""

    name: str
    machine: str
    """``x86`` or ``arm64``; the builds of one machine share a build folder."""
    options: tuple[str, ...]
    variant: str = ""
    """What GGML_CPU_ALL_VARIANTS calls this CPU backend on Android (ggml/src/CMakeLists.txt)."""


def _x86(name: str, value: str) -> Build:
    return Build(name, "x86", tuple(f"GGML_{feature}={value}" for feature in X86_FEATURES))


def _arm64(march: str, variant: str) -> Build:
    return Build(march, "arm64", (*ARM64, f"GGML_CPU_ARM_ARCH={march}"), variant)


BUILDS = (
    _x86("x86-64, AVX2", "ON"),
    _x86("x86-64, SSE2", "OFF"),
    _arm64("armv8-a", "android_armv8.0_1"),
    _arm64("armv8.2-a+dotprod", "android_armv8.2_1"),
    _arm64("armv8.2-a+dotprod+fp16", "android_armv8.2_2"),
    _arm64("armv8.6-a+dotprod+fp16+i8mm", "android_armv8.6_1"),
    _arm64("armv8.6-a+dotprod+fp16+i8mm+sve2", "android_armv9.0_1"),
)


def build(spec: Build, llama_cpp: Path, work: Path, jobs: int) -> Path:
    """Build and install the libraries and ``logits``; returns the prefix."""
    folder, prefix = work / f"build-{spec.machine}", work / re.sub(r"[^\w.+-]+", "_", spec.name)
    options = [f"-D{option}" for option in (*COMMON, *spec.options)]
    run("cmake", "-S", llama_cpp, "-B", folder, "-G", "Ninja", *options)
    run("cmake", "--build", folder, "--parallel", jobs)
    run("cmake", "--install", folder, "--prefix", prefix)
    compiler = "aarch64-linux-gnu-g++" if spec.machine == "arm64" else "g++"
    libraries = ("-lmtmd", "-lllama", "-lggml", "-lggml-base")
    source = ROOT / "benchmarks" / "logits.cpp"
    include, lib = f"-I{prefix}/include", f"-L{prefix}/lib"
    indirect = f"-Wl,-rpath-link,{prefix}/lib"
    run(compiler, "-O2", include, source, "-o", prefix / "logits", lib, indirect, *libraries)
    return prefix


def run(*command: object) -> None:
    """Run a build step, its output on stderr."""
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)


def emulate(
    spec: Build, prefix: Path, *arguments: object, stdin: bytes = b"", allowed: int = 0
) -> tuple[bytes, str]:
    """What ``logits`` writes, and its log; any other exit code than ``allowed`` ends the script."""
    command = [str(prefix / "logits"), *map(str, arguments)]
    environment = dict(os.environ)
    if spec.machine == "arm64":
        command = [*QEMU, "-E", f"LD_LIBRARY_PATH={prefix}/lib", *command]
    else:
        environment["LD_LIBRARY_PATH"] = f"{prefix}/lib"
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment)
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode != allowed:
        raise SystemExit(f"{spec.name}: logits failed ({done.returncode})\n{log[-2000:]}")
    return done.stdout, log


def compare(found: Numbers, wanted: Numbers) -> str:
    """Largest error against the range, of rows the worst cosine and how many share the largest."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    error = np.abs(found - wanted).max() / np.ptp(wanted)
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    distance = (1 - (found * wanted).sum(-1) / norms).max()
    same = (found.argmax(-1) == wanted.argmax(-1)).mean()
    return f"{error:.1e} | {distance:.1e} | {same:.1%}"


class Suite:
    """Pairs and inputs, the same for every build."""

    def __init__(self, work: Path) -> None:
        source = ROOT / "models" / "autoglm-tiny"
        self.pairs = {
            outtype: convert(source, work / "models", outtype, mmproj_outtype=MMPROJ[outtype])
            for outtype in ("f32", *OUTTYPES)
        }
        with AutoGLM.load(self.pairs["f32"].text, mmproj=None) as model:
            texts = []
            for task in TASKS:
                said = [{"role": "user", "content": task}]
                texts += [model.render(said).text, model.generate(said, max_tokens=48).text]
            self.ids = model.tokenize("".join(texts))
        with Image.open(ROOT / "examples" / "screen.png") as screen:
            self.pixels = screen.convert("RGB").resize(SIZE).tobytes()

    def logits(self, spec: Build, prefix: Path, outtype: str, mode: str) -> tuple[Numbers, str]:
        """Logits ``(n_ids, n_vocab)`` of every position, and the log."""
        n_batch, repack = MODES[mode]
        path = self.pairs[outtype].text
        out, log = emulate(spec, prefix, "text", path, n_batch, int(repack), *self.ids)
        return np.frombuffer(out, np.float32).reshape(len(self.ids), -1), log

    def embeddings(self, spec: Build, prefix: Path, outtype: str) -> Numbers:
        """Image embeddings ``(n_image_tokens, n_embd)``."""
        pair = self.pairs[outtype]
        out, _ = emulate(spec, prefix, "image", pair.text, pair.mmproj, *SIZE, stdin=self.pixels)
        n_tokens = SIZE[0] * SIZE[1] // 28**2
        return np.frombuffer(out, np.float32).reshape(n_tokens, -1)


def report(suite: Suite, prefixes: dict[Build, Path]) -> None:
    """Compare every build with the first; print Markdown."""
    reference, others = BUILDS[0], BUILDS[1:]
    home = prefixes[reference]
    for outtype in OUTTYPES:
        print(f"\n### {outtype}, logits at {len(suite.ids)} positions\n\n{HEAD}")
        for mode, (_, repack) in MODES.items():
            if repack and outtype not in REPACKED:
                continue
            wanted, _ = suite.logits(reference, home, outtype, mode)
            for spec in others:
                found, log = suite.logits(spec, prefixes[spec], outtype, mode)
                print(
                    f"| {spec.name} | {mode}{_repacked(log)} | {compare(found, wanted)} |",
                    flush=True,
                )
        wanted, _ = suite.logits(reference, home, outtype, "batch")
        exact, _ = suite.logits(reference, home, "f32", "batch")
        print(f"| for scale: f32 on x86-64, AVX2 | batch | {compare(exact, wanted)} |")
    for outtype in ("f16", "q8_0"):
        print(f"\n### {outtype} mmproj, embeddings of a {SIZE[0]} x {SIZE[1]} image\n\n{HEAD}")
        embeddings = suite.embeddings(reference, home, outtype)
        for spec in others:
            found = suite.embeddings(spec, prefixes[spec], outtype)
            print(f"| {spec.name} | encode | {compare(found, embeddings)} |", flush=True)


def _repacked(log: str) -> str:
    """Whether weights lay in the CPU's own order, by llama.cpp's log."""
    return " (was)" if "CPU_REPACK model buffer size" in log else ""


def main() -> None:
    """Build, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    prefixes = {
        spec: build(spec, arguments.llama_cpp.resolve(), arguments.work.resolve(), arguments.jobs)
        for spec in BUILDS
    }
    for spec, prefix in prefixes.items():
        _, log = emulate(spec, prefix, "text", "none", 1, 0, 0, allowed=1)
        features = re.search(r"^system: (.*)$", log, re.M)
        print(f"- {spec.name}: {features.group(1) if features else 'unknown'}")
    report(Suite(arguments.work), prefixes)


if __name__ == "__main__":
    main()
