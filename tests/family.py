"""Random checkpoints of the other members of the family, written without torch.

`build_glm` and `build_chatglm` hold the same weights in two layouts; `glm46v` is a `Shape` for
`build_checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from builders import (
    GLM46V,
    TEMPLATE,
    Shape,
    random_tensors,
    read_json,
    token_ids,
    tokenizer_json,
    vocab_size,
    write_json,
    write_safetensors,
)

GLM = Shape(
    hidden_size=128, n_heads=4, n_kv_heads=2, head_dim=32, intermediate_size=160, n_layers=2
)


# What sets GLM-4.6V's template apart: a macro for content, a pass over all messages first, thinking
# that is dropped from the history, and switches that a caller may leave undefined.
GLM46V_TEMPLATE = """[gMASK]<sop>
{%- macro visible(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- else -%}
        {%- for item in content -%}
            {%- if item.type == 'image' or 'image' in item -%}
                <|begin_of_image|><|image|><|end_of_image|>
            {%- elif item.type == 'video' or 'video' in item -%}
                <|begin_of_video|><|video|><|end_of_video|>
            {%- elif item.type == 'text' -%}
                {{- item.text }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set seen = namespace(last=-1) -%}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}{%- set seen.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set quick = enable_thinking is defined and not enable_thinking -%}
{%- for m in messages %}
{%- if m.role == 'assistant' -%}
<|assistant|>
    {%- set text = visible(m.content) -%}
    {%- if '</think>' in text -%}{%- set text = text.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
{{ '\n<think></think>\n' + text.strip() }}
{%- else -%}
<|{{ m.role }}|>
{{ visible(m.content) }}{{ '/nothink' if quick and loop.index0 == seen.last else '' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{ '\n<think></think>' if quick else '' }}
{%- endif -%}
"""


def glm46v(architecture: str = "Glm46VForConditionalGeneration", **changes: Any) -> Shape:
    """GLM-4.6V-Flash: other special tokens, rope theta 500,000, another template.

    Args:
        architecture: It is published under Glm4v's class too.
        **changes: Fields of `Shape`.
    """
    values: dict[str, Any] = {
        "architecture": architecture,
        "layout": GLM46V,
        "template": GLM46V_TEMPLATE,
        "rope_style": "rope_parameters",
        "rope_theta": 500_000.0,
        "max_pixels": 9_633_792,
    }
    return Shape(**values | changes)


def build_glm4(directory: Path, shape: Shape = GLM) -> Path:
    """Glm4ForCausalLM: GLM-4-9B-0414's layout, norms after attention and MLP, no M-RoPE."""
    tensors = text_tensors(shape)
    return _write(
        directory, shape, tensors, {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}
    )


def build_glm(directory: Path, shape: Shape = GLM) -> Path:
    """GlmForCausalLM: GLM-Edge's layout."""
    tensors = {k: v for k, v in text_tensors(shape).items() if not _is_post_norm(k)}
    return _write(
        directory, shape, tensors, {"architectures": ["GlmForCausalLM"], "model_type": "glm"}
    )


def build_chatglm(directory: Path, shape: Shape = GLM, *, spm: Path | None = None) -> Path:
    """ChatGLMModel with the weights of `build_glm`: q, k and v fused, chatglm's own names."""
    source = {k: v for k, v in text_tensors(shape).items() if not _is_post_norm(k)}
    tensors = {
        "transformer.embedding.word_embeddings.weight": source["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": source["model.norm.weight"],
        "transformer.output_layer.weight": source["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": np.ones(shape.head_dim // 4, np.float32),
    }
    for n in range(shape.n_layers):
        src, to = f"model.layers.{n}.", f"transformer.encoder.layers.{n}."
        for part in ("weight", "bias"):
            fused = [source[f"{src}self_attn.{letter}_proj.{part}"] for letter in "qkv"]
            tensors[f"{to}self_attention.query_key_value.{part}"] = np.concatenate(fused)
        for ours, theirs in (
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            ("self_attn.o_proj", "self_attention.dense"),
            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
        ):
            tensors[f"{to}{theirs}.weight"] = source[f"{src}{ours}.weight"]
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "num_layers": shape.n_layers,
        "padded_vocab_size": shape.n_vocab or vocab_size(),
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.intermediate_size,
        "kv_channels": shape.head_dim,
        "num_attention_heads": shape.n_heads,
        "multi_query_attention": True,
        "multi_query_group_num": shape.n_kv_heads,
        "seq_length": 4096,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "eos_token_id": 2 if spm else token_ids()["<|endoftext|>"],
    }
    _write(directory, shape, tensors, config)
    write_json(directory / "config.json", config)
    if spm is not None:
        (directory / "tokenizer.json").unlink()
        (directory / "generation_config.json").unlink()
        (directory / "chat_template.jinja").unlink()
        (directory / "tokenizer.model").write_bytes(spm.read_bytes())
    return directory


def text_tensors(shape: Shape) -> dict[str, np.ndarray]:
    prefix = shape.prefixes[0]
    return {
        name.replace(prefix, "model."): values
        for name, values in random_tensors(shape).items()
        if not name.startswith(shape.prefixes[1])
    }


def _is_post_norm(name: str) -> bool:
    return "post_self_attn_layernorm" in name or "post_mlp_layernorm" in name


def _write(
    directory: Path, shape: Shape, tensors: dict[str, np.ndarray], extra: dict[str, Any]
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    ids = token_ids()
    write_json(
        directory / "config.json",
        {
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.n_layers,
            "num_attention_heads": shape.n_heads,
            "num_key_value_heads": shape.n_kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.intermediate_size,
            "vocab_size": shape.n_vocab or vocab_size(),
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "hidden_act": "silu",
            "partial_rotary_factor": 0.5,
            "rope_theta": shape.rope_theta,
            "tie_word_embeddings": shape.tied,
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|endoftext|>"],
            **extra,
        },
    )
    write_json(directory / "tokenizer.json", tokenizer_json())
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    eos = [ids[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    write_json(directory / "generation_config.json", {"eos_token_id": eos})
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    write_safetensors(directory / "model.safetensors", tensors, shape.dtype)
    assert read_json(directory / "config.json")
    return directory
