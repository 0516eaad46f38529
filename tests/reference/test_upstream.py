"""Byte for byte against upstream's own converter and quantiser.

Needs llama.cpp's sources as the pinned llama-cpp-python's sdist carries them; AUTOGLM_GGUF_UPSTREAM
names that ``vendor/llama.cpp``. See CONTRIBUTING.md for the commands.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import GLM46V, Shape, build_checkpoint
from family import glm46v

from autoglm_gguf import AutoGLM, convert, read_header
from autoglm_gguf.native.library import load_llama

UPSTREAM = os.environ.get("AUTOGLM_GGUF_UPSTREAM", "")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.native,
    pytest.mark.skipif(
        not (Path(UPSTREAM) / "convert_hf_to_gguf.py").exists() or not UPSTREAM,
        reason="AUTOGLM_GGUF_UPSTREAM does not name llama.cpp's sources",
    ),
]
SHAPE = Shape(hidden_size=256, head_dim=64, intermediate_size=320, mrope_section=(4, 6, 6))
# Upstream recognises tokenizers by a hash of their output; a random checkpoint's is told to it.
RUN = """
import runpy, sys
root = sys.argv[1]
sys.path[:0] = [root, root + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "glm4"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("upstream") / "model", SHAPE)


def run_upstream(source: Path, target: Path, *options: str) -> Path:
    command = [sys.executable, "-c", RUN, UPSTREAM, str(source), *options, "--outfile", str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return target


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    first, second = read_header(ours), read_header(theirs)
    assert first.tensors.keys() == second.tensors.keys()
    our_data, their_data = ours.read_bytes(), theirs.read_bytes()
    for name, info in first.tensors.items():
        other = second.tensors[name]
        assert (name, info.type_name, info.shape) == (name, other.type_name, other.shape)
        a = our_data[info.offset : info.offset + info.n_bytes]
        assert a == their_data[other.offset : other.offset + other.n_bytes], name


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_pair_equals_upstreams(source: Path, tmp_path: Path, outtype: str) -> None:
    ours = convert(source, tmp_path / "ours", outtype)
    assert ours.mmproj is not None
    text = run_upstream(source, tmp_path / "text.gguf", "--outtype", outtype)
    tower = run_upstream(source, tmp_path / "tower.gguf", "--outtype", outtype, "--mmproj")
    assert_same_tensors(ours.text, text)
    assert_same_tensors(ours.mmproj, tower)


def test_pair_with_glm46vs_tokens_equals_upstreams(tmp_path: Path) -> None:
    """Under Glm4v's name, since upstream does not know Glm46V's.

    Upstream makes control tokens, which are not shown, of all added tokens that look like one. We
    take tokenizer.json's word, as transformers does.
    """
    source = build_checkpoint(tmp_path / "flash", glm46v("Glm4vForConditionalGeneration"))
    ours = convert(source, tmp_path / "ours", "q8_0")
    assert ours.mmproj is not None
    text = run_upstream(source, tmp_path / "text.gguf", "--outtype", "q8_0")
    tower = run_upstream(source, tmp_path / "tower.gguf", "--outtype", "q8_0", "--mmproj")
    assert_same_tensors(ours.text, text)
    assert_same_tensors(ours.mmproj, tower)
    first, second = read_header(ours.text).metadata, read_header(text).metadata
    for name in ("tokens", "merges", "padding_token_id", "bos_token_id"):
        key = f"tokenizer.ggml.{name}"
        assert first[key] == second[key], key
    tokens = first["tokenizer.ggml.tokens"]
    types = (metadata["tokenizer.ggml.token_type"] for metadata in (first, second))
    changed = {t for t, a, b in zip(tokens, *types, strict=True) if a != b}
    assert changed == {t for t in GLM46V.shown if t.startswith("<|")}
    assert first["glm4.rope.freq_base"] == second["glm4.rope.freq_base"] == 500_000.0


def test_q4_0_equals_upstreams_two_steps(source: Path, tmp_path: Path) -> None:
    ours = convert(source, tmp_path / "ours", "q4_0")
    full = run_upstream(source, tmp_path / "bf16.gguf", "--outtype", "bf16")
    llama = load_llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.pure = llama.LLAMA_FTYPE_MOSTLY_Q4_0, True
    small = tmp_path / "q4_0.gguf"
    assert llama.llama_model_quantize(str(full).encode(), str(small).encode(), params) == 0
    assert_same_tensors(ours.text, small)


def test_pair_of_upstream_loads_and_answers_as_ours(source: Path, tmp_path: Path) -> None:
    from PIL import Image

    text = run_upstream(source, tmp_path / "text.gguf", "--outtype", "q8_0")
    tower = run_upstream(source, tmp_path / "tower.gguf", "--outtype", "q8_0", "--mmproj")
    ours = convert(source, tmp_path / "ours", "q8_0")
    image = Image.new("RGB", (140, 112), "red")
    answers = []
    for pair in ((text, tower), (ours.text, ours.mmproj)):
        with AutoGLM.load(pair[0], mmproj=pair[1], n_ctx=256) as model:
            answers.append(model.generate("hello", image=image, max_tokens=12).tokens)
            stops = model.info.stop_ids
    assert answers[0] == answers[1]
    assert len(stops) == 4
