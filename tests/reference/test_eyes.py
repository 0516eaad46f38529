"""A few steps of the training of autoglm-tiny's eyes: a killed run ends with the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_gguf import convert

pytestmark = [pytest.mark.reference, pytest.mark.slow]

TINY = Path(__file__).parents[2] / "models" / "autoglm-tiny"
STEPS = ("--tower-steps", "2", "--language-steps", "4", "--settle-steps", "2", "--pool", "9")
SAVING = ("--checkpoint-seconds", "0", "--log-steps", "1")  # after every step


def command(work: Path) -> list[str]:
    return [sys.executable, str(TINY / "train_eyes.py"), "--work-dir", str(work), *STEPS, *SAVING]


def weights(work: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((work / "autoglm-tiny").glob("*.safetensors"))]


def test_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, timeout=600)
    killed = subprocess.Popen(command(tmp_path / "cut"), stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("language 2/4"):
            killed.kill()
            break
    killed.wait(timeout=60)
    killed.stdout.close()
    assert not (tmp_path / "cut" / "autoglm-tiny").exists()
    again = subprocess.run(
        command(tmp_path / "cut"), check=True, capture_output=True, text=True, timeout=600
    )
    assert "going on from language" in again.stdout
    assert "tower 1/2" not in again.stdout
    whole = weights(tmp_path / "whole")
    assert len(whole) == 2
    assert weights(tmp_path / "cut") == whole
    assert whole != [path.read_bytes() for path in sorted(TINY.glob("*.safetensors"))]
    pair = convert(tmp_path / "cut" / "autoglm-tiny", tmp_path / "gguf", "q8_0")
    assert pair.mmproj is not None


def test_time_limit_stops_a_run_that_can_go_on(tmp_path: Path) -> None:
    stopped = subprocess.run(
        [*command(tmp_path), "--minutes", "0"], capture_output=True, text=True, timeout=600
    )
    assert stopped.returncode == 3, stopped.stderr
    assert "stopped; the same command goes on" in stopped.stdout
    assert (tmp_path / "eyes.pt").exists()
