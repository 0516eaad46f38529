"""`convert` from end to end: right bytes, clear refusals, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from builders import Shape, build_checkpoint, random_tensors, read_json, write_json

from autoglm_gguf import (
    AutoGLMError,
    CheckpointError,
    ConversionError,
    Progress,
    UnsupportedModelError,
    convert,
)

pytestmark = pytest.mark.native
# One layer's matrices whose rows keep their order.
PLAIN = {
    "token_embd.weight": "model.language_model.embed_tokens.weight",
    "blk.1.ffn_up.weight": "model.language_model.layers.1.mlp.gate_up_proj.weight",
    "blk.1.ffn_down.weight": "model.language_model.layers.1.mlp.down_proj.weight",
    "output.weight": "lm_head.weight",
}
TOWER = {
    "v.blk.0.attn_qkv.weight": "model.visual.blocks.0.attn.qkv.weight",
    "mm.gate.weight": "model.visual.merger.gate_proj.weight",
}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- what comes out ---


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_convert_writes_what_ggufs_own_quantiser_writes(
    tmp_path: Path, outtype: str, dtype: str
) -> None:
    shape = Shape(dtype=dtype)
    source = random_tensors(shape)
    if dtype == "F16":
        source = {name: v.astype(np.float16).astype(np.float32) for name, v in source.items()}
    pair = convert(
        build_checkpoint(tmp_path / "c", shape), tmp_path, outtype, mmproj_outtype=outtype
    )
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    for path, table in ((pair.text, PLAIN), (pair.mmproj, TOWER)):
        found = tensors_of(path)
        for name, original in table.items():
            expected = gguf.quants.quantize(source[original], kind)
            assert found[name].tobytes() == expected.tobytes(), name


def test_convert_names_files_as_llama_cpp_does(checkpoint: Path, tmp_path: Path) -> None:
    pair = convert(checkpoint, tmp_path / "made" / "here", "q4_0")
    assert pair.text == tmp_path / "made" / "here" / "checkpoint-Q4_0.gguf"
    assert pair.mmproj == tmp_path / "made" / "here" / "mmproj-checkpoint-Q8_0.gguf"


def test_convert_takes_name_and_types(checkpoint: Path, tmp_path: Path) -> None:
    pair = convert(str(checkpoint), str(tmp_path), "Q8_0", mmproj_outtype="F16", name="AutoGLM")
    assert pair.text.name == "AutoGLM-Q8_0.gguf"
    assert pair.mmproj.name == "mmproj-AutoGLM-F16.gguf"


def test_convert_gives_the_same_bytes_on_any_number_of_threads(
    checkpoint: Path, tmp_path: Path
) -> None:
    one = convert(checkpoint, tmp_path / "one", "q4_0", n_threads=1)
    four = convert(checkpoint, tmp_path / "four", "q4_0", n_threads=4)
    assert one.text.read_bytes() == four.text.read_bytes()
    assert one.mmproj.read_bytes() == four.mmproj.read_bytes()


def test_convert_reports_progress_over_both_files(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    pair = convert(checkpoint, tmp_path / "out", "q8_0", on_progress=seen.append)
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert {p.file for p in seen} == {pair.text.name, pair.mmproj.name}


def test_convert_replaces_an_older_pair(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint-F16.gguf").write_bytes(b"old")
    pair = convert(checkpoint, out, "f16")
    assert pair.text.read_bytes()[:4] == b"GGUF"
    assert names_in(out) == ["checkpoint-F16.gguf", "mmproj-checkpoint-F16.gguf"]


# --- what is refused, before anything is written ---


def drop_shard(checkpoint: Path) -> None:
    next(checkpoint.glob("*.safetensors")).unlink()


def cut_shard(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def haunt_index(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors.index.json"
    index = read_json(path)
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    write_json(path, index)


def rename_architecture(checkpoint: Path) -> None:
    raw = read_json(checkpoint / "config.json")
    write_json(checkpoint / "config.json", {**raw, "architectures": ["LlamaForCausalLM"]})


def widen_config(checkpoint: Path) -> None:
    raw = read_json(checkpoint / "config.json")
    raw["text_config"]["intermediate_size"] = 128
    write_json(checkpoint / "config.json", raw)


def empty_directory(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (drop_shard, CheckpointError, "missing shard"),
        (cut_shard, CheckpointError, "truncated"),
        (haunt_index, CheckpointError, "ghost"),
        (rename_architecture, UnsupportedModelError, "LlamaForCausalLM"),
        (widen_config, CheckpointError, "another shape"),
        (empty_directory, CheckpointError, "config.json: missing"),
    ],
)
def test_convert_refuses_a_bad_checkpoint_and_writes_nothing(
    checkpoint: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[AutoGLMError],
    named: str,
) -> None:
    damage(checkpoint)
    with pytest.raises(error, match=named) as caught:
        convert(checkpoint, tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"outtype": "q5_9"}, "outtype 'q5_9': unknown"),
        ({"mmproj_outtype": "q5_9"}, "outtype 'q5_9': unknown"),
        ({"name": "../elsewhere"}, "name '../elsewhere'"),
        ({"name": ""}, "name ''"),
    ],
)
def test_convert_refuses_bad_arguments(
    checkpoint: Path, tmp_path: Path, options: dict[str, str], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        convert(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_convert_refuses_what_is_no_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{name}: .*directory") as caught:
        convert(tmp_path / name, tmp_path / "out")
    assert caught.value.hint


@pytest.mark.parametrize("outdir", ["file", "file/below"])
def test_convert_refuses_an_outdir_that_cannot_be(
    checkpoint: Path, tmp_path: Path, outdir: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConversionError, match="file") as caught:
        convert(checkpoint, tmp_path / outdir)
    assert "--outdir" in caught.value.hint
    assert (tmp_path / "file").read_text() == "mine"


def test_convert_refuses_a_directory_in_the_files_place(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-Q8_0.gguf").mkdir(parents=True)
    with pytest.raises(ConversionError, match="out"):
        convert(checkpoint, out)
    assert names_in(out) == ["checkpoint-Q8_0.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
@pytest.mark.parametrize("limit", [0, 4096, 100_000, 300_000])
def test_convert_leaves_nothing_when_the_disk_takes_no_more(
    checkpoint: Path, tmp_path: Path, limit: int
) -> None:
    script = (
        "import resource, sys\n"
        "from autoglm_gguf.cli.main import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.exit(main(['convert', {str(checkpoint)!r}, '--outdir', {str(tmp_path / 'out')!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1, result.stderr
    assert "cannot be written" in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr
    assert names_in(tmp_path / "out") == []


# --- interruptions ---


# 29 blocks of text tensors and 28 of the tower.
@pytest.mark.parametrize("n_calls", [1, 2, 20, 28, 29, 30, 57])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_convert_leaves_nothing(
    checkpoint: Path, tmp_path: Path, n_calls: int, error: type[BaseException]
) -> None:
    out, calls = tmp_path / "out", 0

    def interrupt(_: Progress) -> None:
        nonlocal calls
        calls += 1
        if calls == n_calls:
            raise error

    with pytest.raises(error):
        convert(checkpoint, out, "q4_0", n_threads=2, on_progress=interrupt)
    assert calls == n_calls, "nobody is told of more after that"
    assert names_in(out) == []


def test_interrupted_convert_leaves_the_older_pair_as_it_was(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pair = convert(checkpoint, out, "q8_0")
    before = {path: path.read_bytes() for path in (pair.text, pair.mmproj)}
    build_checkpoint(checkpoint, Shape(seed=2))

    def interrupt(progress: Progress) -> None:
        if progress.done_bytes == progress.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, out, "q8_0", on_progress=interrupt)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
