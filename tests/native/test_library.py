"""Loading llama.cpp's bindings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_gguf import AutoGLM

# What Python 3.13 calls Termux's system. This Python's build facts are read before: their file is
# named after the system it was built for.
AS_ANDROID = """
import sys, sysconfig
sysconfig.get_config_vars()
sys.platform = "android"
from autoglm_gguf import AutoGLM
from autoglm_gguf.devices import probe_memory
with AutoGLM.load(sys.argv[1], mmproj=None, n_ctx=256) as model:
    tokens = model.generate("Open Settings", max_tokens=8).tokens
    print(tokens, probe_memory() is not None, model.memory() is not None, sys.platform)
"""


@pytest.mark.native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Android is a Linux")
def test_android_loads_answers_and_measures_as_linux(
    tiny_pair: Callable[[str], tuple[Path, Path]],
) -> None:
    text, _ = tiny_pair("q8_0")
    with AutoGLM.load(text, mmproj=None, n_ctx=256) as model:
        tokens = model.generate("Open Settings", max_tokens=8).tokens
    done = subprocess.run(
        [sys.executable, "-c", AS_ANDROID, str(text)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[0] == f"{tokens} True True android", done.stderr
