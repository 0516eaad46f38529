"""`verify` end to end: it passes what is right and finds what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, build_checkpoint, rewrite_gguf
from family import build_chatglm, glm46v
from parity import Original, screenshot

from autoglm_gguf import convert
from autoglm_gguf.cli.main import main
from autoglm_gguf.conversion.recipe import OUTTYPES
from autoglm_gguf.evaluate.original import OriginalModel
from autoglm_gguf.evaluate.parity import kl_divergence, verify, verify_against

pytestmark = [pytest.mark.reference, pytest.mark.native]
TINY = Path(__file__).parents[2] / "models" / "autoglm-tiny"


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
    assert {t["limit"] for t in report["weights"]} == {0.0}
    assert all(t["passed"] for t in report["weights"])


def test_verify_fails_a_pair_of_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint", Shape())
    other = build_checkpoint(tmp_path / "other", Shape(seed=3))
    pair = convert(other, tmp_path / "out", "f32")
    assert main(["verify", str(checkpoint), str(pair.text)]) == 1
    captured = capsys.readouterr()
    assert "MISSED by" in captured.out and captured.out.endswith("verdict: failed\n")
    assert "outside its thresholds (weights: token_embd.weight and " in captured.err
    assert "hint: not made from this checkpoint, or damaged" in captured.err


def test_verify_against_another_file_compares_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint", Shape())
    exact, half = (convert(checkpoint, tmp_path, kind).text for kind in ("f32", "f16"))
    assert main(["verify", str(checkpoint), str(half), "--against", str(exact)]) == 0
    printed = capsys.readouterr().out
    assert "ok: cosine >= 0.9999" in printed
    assert printed.endswith("verdict: passed what was checked\n"), "the tower was not"


def test_verify_against_a_rounded_file_holds_nothing_to_it(tmp_path: Path) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint", Shape())
    ours, against = (convert(checkpoint, tmp_path, kind).text for kind in ("q4_0", "q8_0"))
    report = verify_against(ours, against)
    assert report.passed
    assert report.outputs[0].required == ""
    listed = "\n".join(report.unchecked)
    assert f"{against.name} is rounded itself" in listed
    assert "of Q4_0, figures only" in listed and "text logits: no threshold" in listed


# One of each step of the thresholds.
@pytest.mark.parametrize(
    ("outtype", "mmproj_outtype"),
    [("q8_0", "q8_0"), ("q6_K", "q8_0"), ("q4_0", "q4_0"), ("iq3_s", "q8_0"), ("q2_K", "q8_0")],
)
def test_verify_passes_autoglm_tiny(tmp_path: Path, outtype: str, mmproj_outtype: str) -> None:
    pair = convert(TINY, tmp_path, outtype, mmproj_outtype=mmproj_outtype)
    report = verify(TINY, pair.text, pair.mmproj)
    assert report.passed
    nothing_promised = ("image and text logits: no threshold for Q2_K, figures only",)
    assert report.unchecked == (nothing_promised if outtype == "q2_K" else ())
    expected = [OUTTYPES[name].ggml_type.name for name in (outtype, mmproj_outtype)]
    assert [o.type_name for o in report.outputs[:2]] == expected


def test_verify_holds_a_mixture_to_its_coarsest_type(tmp_path: Path) -> None:
    pair = convert(TINY, tmp_path, "q8_0", tensor_types=["blk.0.attn_v=q2_K"])
    report = verify(TINY, pair.text, None)
    assert report.outputs[0].type_name == "Q2_K"
    assert report.outputs[0].required == "cosine >= 0.6"


def test_verify_fails_wrong_keys_though_the_weights_are_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint", Shape())
    text = convert(checkpoint, tmp_path, "f16").text
    wrong = rewrite_gguf(text, tmp_path / "wrong.gguf", glm4__rope__freq_base=50.0)
    assert main(["verify", str(checkpoint), str(wrong)]) == 1
    captured = capsys.readouterr()
    assert "ok: rel. rmse <= 0.000488" in captured.out
    assert "MISSED: cosine >= 0.9999" in captured.out
    assert "(text logits" in captured.err and "please report it" in captured.err


def test_verify_says_how_to_tell_rounding_from_a_wrong_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model's answers compete everywhere: right weights, logits far off."""
    checkpoint = build_checkpoint(tmp_path / "checkpoint", Shape())
    text = convert(checkpoint, tmp_path, "q4_0").text
    assert main(["verify", str(checkpoint), str(text)]) == 1
    captured = capsys.readouterr()
    assert "MISSED by" not in captured.out
    assert "hint: the weights keep their types' limits; convert to f16" in captured.err


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
