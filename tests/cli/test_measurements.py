"""``calibrate``, ``evaluate perplexity`` and ``evaluate divergence`` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import Shape, build_checkpoint

from autoglm_gguf import convert
from autoglm_gguf.cli.main import main

TEXT = Path(__file__).parents[1] / "evaluate" / "golden" / "text.txt"
SHORT = ("--text", str(TEXT), "--n-ctx", "32", "--chunks", "12", "--n-threads", "1")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("small")
    return convert(build_checkpoint(base / "small", Shape()), base, "f32").text


@pytest.mark.native
def test_calibrate_writes_and_says_what(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "imatrix.gguf"
    assert main(["calibrate", str(small), *SHORT, "--outfile", str(target)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{target}: 12 matrices, 384 tokens of text.txt (12 chunks of 32)\n"
    assert "12 of 12" in err
    assert target.exists()


@pytest.mark.native
def test_calibrate_prints_json_and_memory(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "imatrix.gguf"
    options = [*SHORT, "--outfile", str(target), "--json", "--stats"]
    assert main(["calibrate", str(small), *options]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) | {"seconds": 0} == {
        "path": str(target),
        "model": small.stem,
        "corpus": "text.txt",
        "n_ctx": 32,
        "n_passages": 12,
        "n_tokens": 384,
        "n_tensors": 12,
        "n_resumed": 0,
        "seconds": 0,
    }
    assert "peak" in err and "budget" in err


@pytest.mark.native
def test_perplexity_then_divergence(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    options = [str(small), *SHORT, "--save-base", str(base)]
    assert main(["evaluate", "perplexity", *options]) == 0
    out, err = capsys.readouterr()
    head, perplexity, nats = out.splitlines()
    assert head == f"{small.stem}: text.txt, 12 chunks of 32, 180 tokens scored"
    assert perplexity.split()[0] == "perplexity" and "±" in perplexity
    assert nats.startswith("nats a token")
    assert "12 of 12, perplexity" in err
    assert main(["evaluate", "divergence", str(small), "--base", str(base)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"180 tokens scored, base {small.stem}")
    assert [line.split()[0] for line in lines[1:]] == [
        *("KL", "median", "90", "95", "99", "99.9", "maximum", "same", "delta", "perplexity")
    ]
    assert "100.000% ± 0.000%" in lines[8]


@pytest.mark.native
def test_divergence_prints_json(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(small), "--base", str(small), *SHORT, "--json"]
    assert main(["evaluate", "divergence", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_tokens"] == 180
    assert found["same_top"] == {"value": 1.0, "error": 0.0}
    assert abs(found["kl_divergence"]["mean"]) < 1e-4


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["calibrate"], "one of the arguments --text --transcripts is required"),
        (["evaluate", "perplexity"], "one of the arguments --text --transcripts is required"),
        (["evaluate", "divergence"], "the following arguments are required: --base"),
        (["calibrate", "--text", "a", "--transcripts", "b"], "not allowed with"),
    ],
)
def test_missing_sources_are_wrong_usage(
    capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_text_that_is_not_there_is_one_error_with_a_hint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["model.gguf", "--text", str(tmp_path / "none.txt")]
    assert main(["evaluate", "perplexity", *options]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'none.txt'}: cannot be read (No such file or directory)",
        "hint: check the path",
    ]
    assert main(["calibrate", "model.gguf", "--text", str(TEXT), "--n-ctx", "4"]) == 2
