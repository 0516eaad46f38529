"""The Android kit names only what exists: our commands, and upstream's options.

Upstream's names are looked up in its sources, which AUTOGLM_GGUF_UPSTREAM names (CONTRIBUTING.md).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from autoglm_gguf.cli.main import build_parser

UPSTREAM = Path(os.environ.get("AUTOGLM_GGUF_UPSTREAM") or "unset")
GUIDE = (ROOT / "docs" / "guides" / "android.md").read_text("utf-8")
SCRIPT = ROOT / "examples" / "android" / "build-libs.sh"
BENCHMARK = (ROOT / "benchmarks" / "arm64.py").read_text("utf-8")
# Not upstream's: CMake's own, the NDK's, and those of the packages that upstream looks for.
FOREIGN = re.compile(r"(CMAKE|ANDROID|Vulkan|OpenCL|SPIRV-Headers)_\w+")
needs_upstream = pytest.mark.skipif(
    not (UPSTREAM / "ggml" / "CMakeLists.txt").exists(),
    reason="AUTOGLM_GGUF_UPSTREAM does not name llama.cpp's sources",
)


def commands_of(text: str) -> list[list[str]]:
    """Every command of the console blocks, as words; a line that ends with \\ goes on."""
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = (line[2:] for line in blocks.splitlines() if line[:2] in ("$ ", "# "))
    return [shlex.split(line, comments=True) for line in lines]


def test_guides_commands_of_ours_are_understood() -> None:
    ours = [words[1:] for words in commands_of(GUIDE) if words[0] == "autoglm-gguf"]
    assert len(ours) >= 5
    parser = build_parser()
    for words in ours:
        parser.parse_args(words)  # exits where a command or an option does not exist


@needs_upstream
def test_guides_options_of_llama_cpps_programs_exist() -> None:
    known = set(re.findall(r'"(--?[\w-]+)"', (UPSTREAM / "common" / "arg.cpp").read_text("utf-8")))
    used = {
        word
        for words in commands_of(GUIDE)
        if words[0].startswith("./llama-")
        for word in words
        if word.startswith("-")
    }
    used |= set(re.findall(r"`(--[\w-]+)(?: none)?`", GUIDE)) - {"--max-image-tokens"}
    assert len(used) > 10
    assert used <= known


@needs_upstream
@pytest.mark.parametrize(
    "text", [GUIDE, SCRIPT.read_text("utf-8"), BENCHMARK], ids=["guide", "script", "benchmark"]
)
def test_cmake_options_exist(text: str) -> None:
    paths = ("CMakeLists.txt", "ggml/CMakeLists.txt")
    listed = "\n".join((UPSTREAM / path).read_text("utf-8") for path in paths)
    known = set(re.findall(r"(?:option|set) ?\((\w+)", listed))
    used = set(re.findall(r"(?:-D|(?<!f)\")([A-Z]+_[\w-]+)=", text))
    assert len(used) > 10
    assert {name for name in used if not FOREIGN.fullmatch(name)} <= known


@needs_upstream
def test_benchmark_builds_androids_cpu_variants() -> None:
    """Names and instruction sets of upstream's list for Android, those that need no SME."""
    listed = (UPSTREAM / "ggml" / "src" / "CMakeLists.txt").read_text("utf-8")
    theirs = dict(re.findall(r"variant\((android_\S+?) *((?: \w+)*)\)", listed))
    ours = dict(re.findall(r'_arm64\("armv[\d.]+-a((?:\+\w+)*)", "(\S+)"\)', BENCHMARK))
    assert len(theirs) == 7
    words = {"i8mm": "MATMUL_INT8", "fp16": "FP16_VECTOR_ARITHMETIC"}
    assert {
        variant: {words.get(tag, tag.upper()) for tag in tags.split("+")[1:]}
        for tags, variant in ours.items()
    } == {name: set(tags.split()) for name, tags in theirs.items() if "SME" not in tags.split()}


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "too few arguments (found 0, required 2)"),
        (["src", "out"], "ANDROID_NDK: no NDK there (found '')"),
    ],
)
def test_build_script_says_what_is_missing(arguments: list[str], said: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ANDROID_NDK"}
    command = ["bash", str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)
    assert done.returncode == 1
    assert said in done.stderr
    assert "\nhint: " in done.stderr
