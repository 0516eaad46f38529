"""What is compared with ours: found or named as missing, told apart when it dies or is late."""

from __future__ import annotations

from pathlib import Path

import frame
import numpy as np
import peers
import pytest
from onnx_text import repack
from peers import Child, PeerError

CHILD = """
import json, os, sys
job = json.loads(sys.argv[1])
print(json.dumps({"version": job["version"]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["method"] == "die":
        print("no memory left in /home/somebody/models", file=sys.stderr, flush=True)
        os._exit(7)
    if request["method"] == "wait":
        import time
        time.sleep(60)
    print(json.dumps({"said": request["arguments"]}), flush=True)
"""


@pytest.fixture
def child(tmp_path: Path) -> Child:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return Child("a peer", script, {"version": "1"}, 30.0)


def test_child_tells_of_itself_and_answers(child: Child) -> None:
    with child:
        assert child.start() == {"version": "1"}
        assert child.answer(["words"]) == {"said": [["words"]]}
        assert child.memory()["VmHWM"] > 10**6
        assert child.cpu_seconds() >= 0


def test_child_that_dies_is_a_row_that_says_how(child: Child) -> None:
    row = frame.Row("peer", "a peer")
    with child:
        child.start()
        assert frame.attempt(row, lambda: child.ask("die")) is None
    assert row.failed == "a peer: ended (exit status 7) no memory left in models"


def test_child_that_is_late_is_killed(child: Child) -> None:
    with child:
        child.start()
        child.timeout_s = 0.2
        with pytest.raises(PeerError, match=r"no answer in 0\.2 s"):
            child.ask("wait")
    assert child.process.poll() is not None


def test_program_is_taken_from_the_variables_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(peers.TOOLS, str(tmp_path))
    with pytest.raises(PeerError, match="llama-bench is not here"):
        peers.find_program("llama-bench")
    (tmp_path / "llama-bench").touch()
    assert peers.find_program("llama-bench") == tmp_path / "llama-bench"


def test_sources_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(peers.UPSTREAM, str(tmp_path))
    with pytest.raises(PeerError, match="sources are not here"):
        peers.find_upstream()
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert peers.find_upstream() == tmp_path


def test_package_that_is_not_installed_is_named() -> None:
    peers.require("json")
    with pytest.raises(PeerError, match="no_such_package is not installed"):
        peers.require("json", "no_such_package")


def test_q4_0_blocks_hold_the_same_numbers_for_onnx_runtime() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    rows = np.random.default_rng(0).standard_normal((4, 96)).astype(np.float32)
    blocks = quantize(rows, GGMLQuantizationType.Q4_0)
    packed, scales = repack(blocks, 4, 96)
    assert packed.shape == (4, 3, 16) and scales.shape == (4, 3)
    # MatMulNBits: two neighbours a byte, the first in the low half; 8 is zero.
    quants = np.stack([packed & 15, packed >> 4], axis=-1).reshape(4, 3, 32).astype(np.float32)
    found = ((quants - 8) * scales[..., None]).reshape(4, 96)
    assert np.array_equal(found, dequantize(blocks, GGMLQuantizationType.Q4_0))
