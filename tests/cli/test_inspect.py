"""``inspect`` on text and mmproj files, sound and strange."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import MMPROJ_METADATA, TEXT_METADATA, pack_gguf, write_gguf

from autoglm_gguf.cli.main import main


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_counts_weights_by_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "a": ((64, 3), 8, bytes(204)),
        "b": ((4,), 0, bytes(16)),
        "c": ((32,), 8, bytes(34)),
    }
    (tmp_path / "m.gguf").write_bytes(pack_gguf(TEXT_METADATA, tensors))
    summary = inspect(tmp_path / "m.gguf", capsys)
    assert summary["file"] == "m.gguf"
    assert summary["file_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert summary["n_params"] == 192 + 4 + 32
    assert summary["bpw"] == round(8 * 254 / 228, 3)
    assert summary["weights_by_type"] == {
        "F32": {"n_tensors": 1, "n_bytes": 16},
        "Q8_0": {"n_tensors": 2, "n_bytes": 238},
    }
    assert (summary["architecture"], summary["name"], summary["n_tokens"]) == ("glm4", "small", 22)


GROUPED = {
    "token_embd.weight": ((64, 3), 8, bytes(204)),
    "blk.0.attn_q.weight": ((32, 2), 2, bytes(36)),
    "blk.0.attn_q.bias": ((2,), 0, bytes(8)),
    "blk.1.attn_q.weight": ((32, 2), 2, bytes(36)),
}


def test_inspect_weighs_tensor_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(pack_gguf(TEXT_METADATA, GROUPED))
    assert inspect(tmp_path / "m.gguf", capsys)["groups"] == [
        {
            "group": "token embedding",
            "n_tensors": 1,
            "n_params": 192,
            "n_bytes": 204,
            "bpw": 8.5,
            "types": {"Q8_0": 1},
        },
        {
            "group": "attention q",
            "n_tensors": 3,
            "n_params": 130,
            "n_bytes": 80,
            "bpw": 4.923,  # 8 * 80 / 130
            "types": {"Q4_0": 2, "F32": 1},
        },
    ]


def test_inspect_prints_tensor_groups_as_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").write_bytes(pack_gguf(TEXT_METADATA, GROUPED))
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    at = lines.index("group tensors size bpw types")
    assert lines[at + 1] == "token embedding 1 204 B 8.500 Q8_0 ×1"
    assert lines[at + 2] == "attention q 3 80 B 4.923 Q4_0 ×2, F32 ×1"


def test_inspect_shows_the_pair_and_what_was_completed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_gguf(tmp_path / "m-F32.gguf", TEXT_METADATA)
    write_gguf(tmp_path / "mmproj-m-F32.gguf", MMPROJ_METADATA)
    pair = inspect(text, capsys)["pair"]
    assert isinstance(pair, dict)
    assert pair["mmproj"] == "mmproj-m-F32.gguf"
    assert pair["matches"] is True
    assert set(pair["stops"]) == {"<|endoftext|>", "<|user|>", "<|observation|>", "</answer>"}
    assert pair["max_image_tokens"] == 30_000
    assert len(pair["notes"]) == 3


def test_inspect_shows_why_a_pair_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_gguf(tmp_path / "m-F32.gguf", TEXT_METADATA)
    write_gguf(tmp_path / "mmproj-m-F32.gguf", MMPROJ_METADATA, clip__vision__projection_dim=8)
    pair = inspect(text, capsys)["pair"]
    assert isinstance(pair, dict)
    assert pair["matches"] is False
    assert "embeddings of 8" in pair["problem"]


def test_inspect_shows_an_mmproj_without_a_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = inspect(write_gguf(tmp_path / "mmproj-m.gguf", MMPROJ_METADATA), capsys)
    assert (summary["architecture"], summary["projector"]) == ("clip", "glm4v")
    assert "pair" not in summary
    assert "n_tokens" not in summary
    assert [row["group"] for row in summary["groups"]] == [
        "patch embedding",
        "position embedding",
        "vision attention",
        "vision norms",
        "merger",
    ]


def test_inspect_shows_any_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"})
    pair = inspect(path, capsys)["pair"]
    assert isinstance(pair, dict)
    assert "'llama' is not run here" in pair["problem"]
    assert "matches" not in pair


def test_inspect_prints_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(write_gguf(tmp_path / "m-F32.gguf", TEXT_METADATA))]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = {line.split()[0]: line for line in printed.out.splitlines()}
    assert lines["architecture"].endswith(" glm4")
    assert lines["mmproj"].endswith("none beside it")
    assert "matches" not in lines
    assert lines["F32"].endswith("10 tensors  160 B")


@pytest.mark.parametrize("as_json", [False, True])
def test_inspect_shows_names_that_are_no_text(tmp_path: Path, as_json: bool) -> None:
    path = write_gguf(tmp_path / "m.gguf", {**TEXT_METADATA, "general.name": b"\xff\xfe"})
    command = [sys.executable, "-m", "autoglm_gguf", "inspect", str(path)]
    result = subprocess.run(
        [*command, "--json"] if as_json else command,
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0, result.stderr
    if as_json:
        assert json.loads(result.stdout)["architecture"] == "glm4"
