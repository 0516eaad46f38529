"""Every outtype byte for byte as llama.cpp's own quantiser writes it; padding changes no logit."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from builders import Shape, build_checkpoint, pack_imatrix, write_safetensors
from family import GLM, build_glm4

from autoglm_gguf import ConversionError, GGUFError, convert, read_header
from autoglm_gguf.checkpoint.config import read_config
from autoglm_gguf.checkpoint.safetensors import Shards
from autoglm_gguf.checkpoint.tokenizer import read_vocabulary
from autoglm_gguf.config import ContextParams
from autoglm_gguf.conversion.imatrix import read_imatrix
from autoglm_gguf.conversion.metadata import write_text_header
from autoglm_gguf.conversion.recipe import OUTTYPES, Recipe, parse_outtype
from autoglm_gguf.conversion.tensors import plan_text
from autoglm_gguf.conversion.writer import TensorWriter
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.native.library import load_llama

pytestmark = pytest.mark.native

# Rows of 256 everywhere, so that no type falls back.
WIDE = Shape(
    hidden_size=256, n_heads=4, head_dim=64, intermediate_size=512, mrope_section=(4, 6, 6)
)
QUANTISED = [name for name in OUTTYPES if name not in ("f32", "f16", "bf16")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("wide") / "wide", WIDE)


@pytest.fixture(scope="module")
def exact(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(wide, tmp_path_factory.mktemp("exact"), "f32").text


@pytest.fixture(scope="module")
def importance(exact: Path) -> dict[str, np.ndarray]:
    """Seeded column weights for every quantised matrix."""
    rng = np.random.default_rng(3)
    tensors = read_header(exact).tensors.values()
    return {
        t.name: rng.exponential(1.0, t.shape[0]).astype(np.float32)
        for t in tensors
        if len(t.shape) == 2 and t.name != "token_embd.weight"
    }


def quantise_with_llama(
    source: Path, target: Path, outtype: str, imatrix: dict[str, np.ndarray] | None
) -> Path:
    """llama_model_quantize with ``pure``: the same type for every matrix."""
    llama = load_llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = OUTTYPES[outtype].ftype, True, 1
    if imatrix is not None:
        entries = (llama.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    return target


def tensor_bytes(path: Path) -> Iterator[tuple[str, str, bytes]]:
    data = path.read_bytes()
    for info in read_header(path).tensors.values():
        yield info.name, info.type_name, data[info.offset : info.offset + info.n_bytes]


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    expected = {name: (kind, data) for name, kind, data in tensor_bytes(theirs)}
    found = {name: (kind, data) for name, kind, data in tensor_bytes(ours)}
    assert found.keys() == expected.keys()
    for name, (kind, data) in found.items():
        assert (name, kind) == (name, expected[name][0])
        assert data == expected[name][1], name


def write_imatrix(path: Path, columns: dict[str, np.ndarray], *, legacy: bool) -> Path:
    """Sums over 10 tokens (GGUF) or 10 calls (legacy), as llama-imatrix writes them."""
    if legacy:
        path.write_bytes(pack_imatrix(columns, n_calls=8) + struct.pack("<ii", 8, 4) + b"text")
        return path
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 8)
    for name, values in columns.items():
        writer.add_tensor(f"{name}.in_sum2", (values * np.float32(8)).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[8.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("outtype", [name for name in QUANTISED if name != "iq3_xxs"])
def test_tensors_equal_llama_model_quantize(
    wide: Path, exact: Path, tmp_path: Path, outtype: str
) -> None:
    ours = convert(wide, tmp_path, outtype, n_threads=2).text
    theirs = quantise_with_llama(exact, tmp_path / "theirs.gguf", outtype, None)
    assert_same_tensors(ours, theirs)


@pytest.mark.parametrize("legacy", [False, True], ids=["gguf", "legacy"])
@pytest.mark.parametrize("outtype", ["iq3_xxs", "q4_0", "q2_K", "iq4_xs"])
def test_tensors_equal_llama_model_quantize_when_weighted(
    wide: Path,
    exact: Path,
    importance: dict[str, np.ndarray],
    tmp_path: Path,
    outtype: str,
    legacy: bool,
) -> None:
    path = write_imatrix(tmp_path / "imatrix", importance, legacy=legacy)
    ours = convert(wide, tmp_path, outtype, imatrix=path).text
    theirs = quantise_with_llama(exact, tmp_path / "theirs.gguf", outtype, importance)
    assert_same_tensors(ours, theirs)


def test_iq3_xxs_is_refused_without_an_importance_matrix(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"blk\.0\.attn_q\.weight.*importance") as caught:
        convert(wide, tmp_path, "iq3_xxs")
    assert "--imatrix" in caught.value.hint
    only_embeddings = ["^(token_embd|output).weight=iq3_xxs"]
    pair = convert(wide, tmp_path, "q4_0", tensor_types=only_embeddings)
    tensors = read_header(pair.text).tensors
    assert tensors["token_embd.weight"].type_name == "IQ3_XXS"
    assert tensors["output.weight"].type_name == "IQ3_XXS"


def test_overrides_take_the_first_pattern_that_is_found(wide: Path, tmp_path: Path) -> None:
    rules = [r"blk\.0\.attn_v=q8_0", "attn_[kv]=q6_K", "ffn_down=bf16"]
    tensors = read_header(convert(wide, tmp_path, "q4_0", tensor_types=rules).text).tensors
    kinds = {name: tensor.type_name for name, tensor in tensors.items()}
    assert kinds["blk.0.attn_v.weight"] == "Q8_0"
    assert kinds["blk.1.attn_v.weight"] == kinds["blk.0.attn_k.weight"] == "Q6_K"
    assert kinds["blk.1.ffn_down.weight"] == "BF16"
    assert kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.attn_v.bias"] == kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("rule", ["attn_v", "=q8_0", "attn_v=q9", "(=q8_0"])
def test_override_that_is_broken_is_a_value_error(wide: Path, tmp_path: Path, rule: str) -> None:
    with pytest.raises(ValueError, match=r"tensor type|outtype"):
        convert(wide, tmp_path, "q4_0", tensor_types=[rule])


def test_imatrix_of_another_model_is_refused(
    wide: Path, importance: dict[str, np.ndarray], tmp_path: Path
) -> None:
    short = {name: values[:128] for name, values in importance.items()}
    path = write_imatrix(tmp_path / "imatrix", short, legacy=False)
    with pytest.raises(GGUFError, match="made for another model"):
        convert(wide, tmp_path, "q4_K", imatrix=path)


def test_imatrix_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GGUFError, match="a pipe, not a file"):
        read_imatrix(tmp_path / "pipe")


def test_imatrix_that_is_none_is_refused(wide: Path, exact: Path, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="not an importance matrix"):
        convert(wide, tmp_path, "q4_K", imatrix=exact)
    (tmp_path / "text").write_text("no matrix at all")
    with pytest.raises(GGUFError, match="not an importance matrix"):
        convert(wide, tmp_path, "q4_K", imatrix=tmp_path / "text")


@pytest.mark.parametrize("outtype", ["q4_K", "iq4_xs", "q2_K"])
def test_ffn_is_padded_where_a_256_block_type_asks_for_it(tmp_path: Path, outtype: str) -> None:
    """672 = 2.625 * 256: llama.cpp alone would give ffn_down a larger type."""
    shape = Shape(
        hidden_size=256, head_dim=64, intermediate_size=672, mrope_section=(4, 6, 6), n_layers=1
    )
    pair = convert(build_checkpoint(tmp_path / "odd", shape), tmp_path, outtype)
    header = read_header(pair.text)
    assert header.metadata["glm4.feed_forward_length"] == 768
    assert header.tensors["blk.0.ffn_down.weight"].type_name == outtype.upper()
    assert header.tensors["blk.0.ffn_up.weight"].shape == (256, 2 * 768)
    kept = read_header(convert(tmp_path / "odd", tmp_path, "q4_0").text)
    assert kept.metadata["glm4.feed_forward_length"] == 672


def test_padding_changes_no_logit(tmp_path: Path) -> None:
    """The same f32 weights, padded and not."""
    directory = build_glm4(tmp_path / "checkpoint", GLM)  # a width of 160
    ours = []
    for width in (160, 256):
        path = tmp_path / f"{width}.gguf"
        config = read_config(directory)
        recipe = Recipe(parse_outtype("f32"))
        with Shards(directory) as shards:
            tensors = plan_text(shards.tensors, config, recipe, ffn_width=width)
            vocabulary = read_vocabulary(directory, config)
            write_text_header(path, "x", "0", config, vocabulary, recipe.outtype, tensors)
            TensorWriter(1, 1, None).write(path, tensors, path.name)
        params = ContextParams(n_ctx=64, type_k="f32", type_v="f32", flash_attn=False)
        engine = LlamaEngine(path, None, params)
        engine.eval_tokens(engine.tokenize("hello padding"))
        ours.append(engine.logits())
        engine.close()
    assert np.abs(ours[0] - ours[1]).max() <= 1e-6 * np.abs(ours[0]).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, dtype: str) -> None:
    from autoglm_gguf import CheckpointError

    directory = build_glm4(tmp_path / "checkpoint", GLM)
    from family import text_tensors

    tensors = text_tensors(GLM)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    write_safetensors(directory / "model.safetensors", tensors, dtype)
    for outtype in ("q4_0", "f32", "f16"):
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj.*NaN or infinity"):
            convert(directory, tmp_path / "out", outtype)
    assert not list((tmp_path / "out").glob("*"))


def test_value_beyond_f16_is_an_error_for_f16_only(tmp_path: Path) -> None:
    from family import text_tensors

    directory = build_glm4(tmp_path / "checkpoint", GLM)
    tensors = text_tensors(GLM)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e6
    write_safetensors(directory / "model.safetensors", tensors, "BF16")
    with pytest.raises(ConversionError, match="beyond f16") as caught:
        convert(directory, tmp_path / "out", "f16")
    assert "bf16" in caught.value.hint
    convert(directory, tmp_path / "out", "bf16")


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_types": ["no_such_tensor=q8_0"]},
        {"n_threads": 0},
        {"n_threads": 100_000},
        {"name": ".."},
        {"outdir": ""},
    ],
)
def test_convert_refuses_arguments_that_mean_nothing(
    wide: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        convert(wide, **{"outdir": tmp_path, "outtype": "q4_0", **options})  # type: ignore[arg-type]
