"""`verify` end to end: it passes what is right and finds what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, build_checkpoint
from family import build_chatglm, glm46v
from parity import Original, screenshot

from autoglm_gguf import convert
from autoglm_gguf.cli.main import main
from autoglm_gguf.evaluate.original import OriginalModel
from autoglm_gguf.evaluate.parity import kl_divergence, verify

pytestmark = [pytest.mark.reference, pytest.mark.native]


def test_original_run_layer_by_layer_equals_the_whole_model(tiny: Original) -> None:
    image = screenshot(336, 448)
    with OriginalModel(tiny.directory) as original:
        inputs = original.pixels(image)
        embedding = original.embed(inputs)
        ids = [1, 2, *[original.image_token_id] * len(embedding), 3, 4]
        assert np.array_equal(embedding, tiny.embed(image))
        assert np.abs(original.logits(ids, inputs) - tiny.logits(ids, image)).max() <= 1e-5
        assert all(p.is_meta for p in original.model.parameters())


@pytest.mark.parametrize("shape", [Shape(), glm46v()], ids=["Glm4v", "Glm46V"])
def test_verify_passes_the_f32_pair_and_says_so_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: Shape
) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint", shape)
    pair = convert(checkpoint, tmp_path, "f32")
    assert main(["verify", str(checkpoint), str(pair.text), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert [o["what"] for o in report["outputs"]] == [
        "text logits",
        "image embeddings",
        "image and text logits",
    ]
    assert report["outputs"][0]["relative_max_abs"] <= 1e-5
    assert report["unchecked"] == []


def test_verify_fails_a_pair_of_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint", Shape())
    other = build_checkpoint(tmp_path / "other", Shape(seed=3))
    pair = convert(other, tmp_path / "out", "f32")
    assert main(["verify", str(checkpoint), str(pair.text)]) == 1
    captured = capsys.readouterr()
    assert "MISSED" in captured.out
    assert "outside its thresholds" in captured.err


def test_verify_against_another_file_compares_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint", Shape())
    exact, half = (convert(checkpoint, tmp_path, kind).text for kind in ("f32", "f16"))
    assert main(["verify", str(checkpoint), str(half), "--against", str(exact)]) == 0
    assert "text logits" in capsys.readouterr().out


def test_verify_says_what_it_could_not_check(tmp_path: Path) -> None:
    checkpoint = build_chatglm(tmp_path / "checkpoint")
    report = verify(checkpoint, convert(checkpoint, tmp_path, "f32").text, None)
    assert report.outputs == ()
    assert any("ChatGLMModel" in reason for reason in report.unchecked)
    assert max(t.max_abs for t in report.weights) == 0


def test_kl_divergence_of_two_coins() -> None:
    """Even against one to three: 0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75)."""
    even, odd = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert kl_divergence(even, odd) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert kl_divergence(odd, odd + 7) == pytest.approx(0)
