"""kill -9 at random moments: what stands under a final name is whole."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import Shape, build_checkpoint

pytestmark = [pytest.mark.native, pytest.mark.slow]

COMMAND = [sys.executable, "-m", "autoglm_gguf", "convert", "--outtype", "q8_0", "--n-threads", "1"]


def test_killed_conversion_leaves_no_broken_file_under_a_final_name(tmp_path: Path) -> None:
    shape = Shape(hidden_size=512, head_dim=128, intermediate_size=1024, n_layers=6)
    shape.mrope_section = (8, 12, 12)
    checkpoint = build_checkpoint(tmp_path / "checkpoint", shape)
    out = tmp_path / "out"
    command = [*COMMAND, str(checkpoint), "--outdir", str(out)]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - began
    whole = {path.name: path.read_bytes() for path in out.glob("*.gguf")}
    assert len(whole) == 2

    rng = random.Random(11)
    n_killed = 0
    for _ in range(10):
        for path in out.iterdir():
            path.unlink()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        process.kill()
        n_killed += process.wait() != 0
        for path in out.glob("*.gguf"):
            if not path.name.startswith("."):
                assert path.read_bytes() == whole[path.name], path.name
    assert n_killed >= 3  # otherwise the moments missed the work
