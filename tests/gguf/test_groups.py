"""Tensors by the part of the model they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import Shape, build_checkpoint, pack_gguf
from family import build_chatglm, build_glm, build_glm4

from autoglm_gguf import read_header
from autoglm_gguf.checkpoint.config import ModelConfig, read_config
from autoglm_gguf.conversion.layouts import text_specs, vision_specs
from autoglm_gguf.gguf.groups import GroupWeights, TensorGroup, describe_groups, group_of

F32, Q4_0, Q8_0 = 0, 2, 8


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("token_embd.weight", "token embedding"),
        ("blk.0.attn_q.weight", "attention q"),
        ("blk.39.attn_q.bias", "attention q"),
        ("blk.0.attn_k.weight", "attention k"),
        ("blk.0.attn_v.bias", "attention v"),
        ("blk.0.attn_qkv.weight", "attention qkv"),
        ("blk.0.attn_output.weight", "attention output"),
        ("blk.0.ffn_gate.weight", "ffn gate"),
        ("blk.0.ffn_up.weight", "ffn up"),
        ("blk.0.ffn_down.weight", "ffn down"),
        ("blk.0.attn_norm.weight", "norms"),
        ("blk.0.post_attention_norm.weight", "norms"),
        ("blk.0.ffn_norm.weight", "norms"),
        ("blk.0.post_ffw_norm.weight", "norms"),
        ("blk.0.attn_q_norm.weight", "norms"),
        ("output_norm.weight", "norms"),
        ("output.weight", "output"),
        ("v.patch_embd.weight", "patch embedding"),
        ("v.patch_embd.weight.1", "patch embedding"),
        ("v.patch_embd.bias", "patch embedding"),
        ("v.position_embd.weight", "position embedding"),
        ("v.blk.0.attn_qkv.weight", "vision attention"),
        ("v.blk.23.attn_out.weight", "vision attention"),
        ("v.blk.0.ffn_gate.weight", "vision ffn"),
        ("v.blk.0.ffn_up.weight", "vision ffn"),
        ("v.blk.0.ffn_down.weight", "vision ffn"),
        ("v.blk.0.ln1.weight", "vision norms"),
        ("v.norm_embd.weight", "vision norms"),
        ("v.post_ln.weight", "vision norms"),
        ("mm.patch_merger.weight", "merger"),
        ("mm.model.fc.weight", "merger"),
        ("mm.post_norm.bias", "merger"),
        ("mm.down.weight", "merger"),
        ("rope_freqs.weight", "other"),
        ("blk.0.ffn_up_exps.weight", "other"),
        ("blk.attn_q.weight", "other"),
        ("blk.0.attn_q", "other"),
        ("token_embd.weight.more", "other"),
        ("", "other"),
        ("\udcff", "other"),
    ],
)
def test_group_follows_from_the_name(name: str, group: str) -> None:
    assert group_of(name) == group


def configs(base: Path) -> Iterator[ModelConfig]:
    yield read_config(build_checkpoint(base / "glm4v", Shape()))
    for build in (build_glm4, build_glm, build_chatglm):
        yield read_config(build(base / build.__name__))


def test_every_tensor_the_converter_writes_has_a_group(tmp_path: Path) -> None:
    names: set[str] = {"v.patch_embd.weight", "v.patch_embd.weight.1"}
    for config in configs(tmp_path):
        names |= {spec.name for spec in text_specs(config.text)}
        if config.vision is not None:
            names |= {spec.name for spec in vision_specs(config.vision)}
    assert {name for name in names if group_of(name) is TensorGroup.OTHER} == set()
    # ffn gate: of other architectures, here it is one matrix with up
    assert set(TensorGroup) - {group_of(name) for name in names} == {
        TensorGroup.FFN_GATE,
        TensorGroup.OTHER,
    }


def test_groups_add_up_and_come_in_order(tmp_path: Path) -> None:
    tensors = {
        "output.weight": ((32, 2), Q8_0, bytes(68)),
        "blk.0.attn_q.weight": ((32, 2), Q4_0, bytes(36)),
        "blk.0.attn_q.bias": ((2,), F32, bytes(8)),
        "blk.1.attn_q.weight": ((32, 2), Q8_0, bytes(68)),
        "blk.1.attn_q.bias": ((2,), F32, bytes(8)),
        "token_embd.weight": ((32, 2), Q4_0, bytes(36)),
        "strange": ((4,), F32, bytes(16)),
    }
    path = tmp_path / "m.gguf"
    path.write_bytes(pack_gguf({"general.architecture": "glm4"}, tensors))
    header = read_header(path)
    embedding, q, output, other = describe_groups(header)
    assert embedding == GroupWeights(TensorGroup.TOKEN_EMBEDDING, 1, 64, 36, {"Q4_0": 1})
    assert q == GroupWeights(TensorGroup.ATTENTION_Q, 4, 132, 120, {"Q8_0": 1, "Q4_0": 1, "F32": 2})
    assert list(q.types) == ["Q8_0", "Q4_0", "F32"], "68, 36 and 16 bytes"
    assert output == GroupWeights(TensorGroup.OUTPUT, 1, 64, 68, {"Q8_0": 1})
    assert (embedding.bpw, output.bpw) == (4.5, 8.5)
    assert (other.group, other.n_tensors) == ("other", 1)
    total = sum(group.n_bytes for group in (embedding, q, output, other))
    assert total == header.weights_bytes == 240


def test_file_without_tensors_has_no_groups(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(pack_gguf({"general.architecture": "glm4"}))
    assert describe_groups(read_header(tmp_path / "m.gguf")) == ()
