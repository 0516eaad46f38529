"""Small random checkpoints in the published layout, written without torch.

The shapes are chosen by the test; the weights are seeded noise, scaled so that activations stay of
order one. `build_checkpoint` gives everything `convert` needs.
"""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autoglm_gguf.checkpoint.tokenizer import GLM4_PATTERN
from autoglm_gguf.gguf.describe import ModelDescription, VisionLimits
from autoglm_gguf.gguf.header import Header, TensorInfo

SPECIALS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)
TAGS = SPECIALS[-4:]
EOS = ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")
TEMPLATE = (
    "{{- '[gMASK]<sop>' -}}"
    "{%- for m in messages -%}{{ '<|' ~ m.role ~ '|>\n' }}"
    "{%- if m.content is string -%}{{ m.content }}{%- else -%}"
    "{%- for part in m.content -%}"
    "{%- if part.type == 'image' -%}<|begin_of_image|><|image|><|end_of_image|>"
    "{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Layout:
    """The special tokens of a tokenizer, in the order of their ids, behind the plain vocabulary."""

    specials: tuple[str, ...]
    shown: tuple[str, ...]
    """Those that tokenizer.json does not mark as special: they are part of the text."""
    eos: tuple[str, ...]


GLM41V = Layout(SPECIALS, TAGS, EOS)
# GLM-4.6V-Flash, whose 151329 is the first: 151348, GLM-4.1V's </answer>, is <|code_middle|> here,
# there is no </answer>, <|image|> is 151363 and not marked as special.
_GLM46V_SPECIALS = (
    *SPECIALS[:14],
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|begin_of_transcription|>",
    "<|end_of_transcription|>",
    "<|code_prefix|>",
    "<|code_middle|>",
    "<|code_suffix|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "/nothink",
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "<|image|>",
    "<|video|>",
)
GLM46V = Layout(_GLM46V_SPECIALS, _GLM46V_SPECIALS[18:], EOS[:3])


@dataclass
class Shape:
    """A checkpoint's sizes and style; the defaults are as small as q4_0 and q8_0 allow."""

    hidden_size: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 96
    tied: bool = False
    rope_style: str = "rope_scaling"
    """rope_scaling (published), rope_parameters (transformers 5) or flat."""
    mrope_section: tuple[int, int, int] = (1, 1, 2)
    rope_theta: float = 10000.0
    vision_depth: int = 2
    vision_hidden: int = 64
    vision_heads: int = 4
    image_size: int = 112
    merger_width: int = 96
    max_pixels: int = 5_000_000
    prefixes: tuple[str, str] = ("model.language_model.", "model.visual.")
    dtype: str = "BF16"
    n_shards: int = 2
    seed: int = 1
    layout: Layout = GLM41V
    architecture: str = "Glm4vForConditionalGeneration"
    eos: tuple[str, ...] | None = None
    """Listed in generation_config.json; None takes the layout's."""
    template: str = TEMPLATE
    n_vocab: int = 0
    """Rows of the embeddings; 0 takes `vocab_size`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into config.json's top level."""


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in visible}
    hidden = [byte for byte in range(256) if byte not in table]
    return {**table, **{byte: chr(256 + n) for n, byte in enumerate(hidden)}}


def tokenizer_json(layout: Layout = GLM41V) -> dict[str, Any]:
    """A byte-level BPE with GLM-4's pattern, a few merges and the special tokens."""
    symbols = byte_symbols()
    vocab = {symbols[byte]: byte for byte in range(256)}
    merges = []
    for left, right in [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("i", "n"),
        ("Ġ", "t"),
    ]:
        merges.append([left, right])
        vocab[left + right] = len(vocab)
    added = [
        {
            "id": len(vocab) + n,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in layout.shown,
        }
        for n, token in enumerate(layout.specials)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": GLM4_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def token_ids(layout: Layout = GLM41V) -> dict[str, int]:
    """Every token of `tokenizer_json` and its id."""
    raw = tokenizer_json(layout)
    return {**raw["model"]["vocab"], **{t["content"]: t["id"] for t in raw["added_tokens"]}}


def vocab_size(layout: Layout = GLM41V) -> int:
    """Rounded up to a multiple of 32: some ids have no token, as in the published models."""
    return -(-len(token_ids(layout)) // 32) * 32


def config_json(shape: Shape) -> dict[str, Any]:
    """``config.json`` in one of the three rope styles."""
    ids = token_ids(shape.layout)
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": list(shape.mrope_section)}
    theta = {"rope_theta": shape.rope_theta, "partial_rotary_factor": 0.5}
    text: dict[str, Any] = {
        "model_type": "glm4v_text",
        "vocab_size": shape.n_vocab or vocab_size(shape.layout),
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "hidden_act": "silu",
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": shape.tied,
    }
    if shape.rope_style == "rope_parameters":
        text["rope_parameters"] = {**rope, **theta}
    elif shape.rope_style == "rope_scaling":
        text |= {"rope_scaling": rope, **theta}
    else:
        text |= {"mrope_section": list(shape.mrope_section), **theta}
    return {
        "architectures": [shape.architecture],
        "model_type": shape.architecture.removesuffix("ForConditionalGeneration").lower(),
        "tie_word_embeddings": shape.tied,
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "text_config": text,
        "vision_config": {
            "model_type": "glm4v_vision",
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "num_heads": shape.vision_heads,
            "image_size": shape.image_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "out_hidden_size": shape.hidden_size,
            "intermediate_size": shape.merger_width,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
        },
        **shape.extra,
    }


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published layout."""
    text, vision = shape.prefixes
    width, inner = shape.hidden_size, shape.intermediate_size
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    table: dict[str, tuple[int, ...]] = {
        f"{text}embed_tokens.weight": (shape.n_vocab or vocab_size(shape.layout), width)
    }
    for n in range(shape.n_layers):
        layer = f"{text}layers.{n}."
        for norm in (
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ):
            table[f"{layer}{norm}.weight"] = (width,)
        for letter, rows in (("q", q), ("k", kv), ("v", kv)):
            table[f"{layer}self_attn.{letter}_proj.weight"] = (rows, width)
            table[f"{layer}self_attn.{letter}_proj.bias"] = (rows,)
        table[f"{layer}self_attn.o_proj.weight"] = (width, q)
        table[f"{layer}mlp.gate_up_proj.weight"] = (2 * inner, width)
        table[f"{layer}mlp.down_proj.weight"] = (width, inner)
    table[f"{text}norm.weight"] = (width,)
    if not shape.tied:
        table["lm_head.weight"] = (shape.n_vocab or vocab_size(shape.layout), width)
    eye = shape.vision_hidden
    table[f"{vision}patch_embed.proj.weight"] = (eye, 3, 2, 14, 14)
    table[f"{vision}patch_embed.proj.bias"] = (eye,)
    positions = (shape.image_size // 14) ** 2
    table[f"{vision}embeddings.position_embedding.weight"] = (positions, eye)
    table[f"{vision}post_conv_layernorm.weight"] = (eye,)
    for n in range(shape.vision_depth):
        block = f"{vision}blocks.{n}."
        table[f"{block}norm1.weight"] = table[f"{block}norm2.weight"] = (eye,)
        table[f"{block}attn.qkv.weight"] = (3 * eye, eye)
        table[f"{block}attn.proj.weight"] = (eye, eye)
        table[f"{block}mlp.gate_proj.weight"] = (width, eye)
        table[f"{block}mlp.up_proj.weight"] = (width, eye)
        table[f"{block}mlp.down_proj.weight"] = (eye, width)
    table[f"{vision}post_layernorm.weight"] = (eye,)
    table[f"{vision}downsample.weight"] = (width, eye, 2, 2)
    table[f"{vision}downsample.bias"] = (width,)
    merger, wide = f"{vision}merger.", shape.merger_width
    table[f"{merger}proj.weight"] = (width, width)
    table[f"{merger}post_projection_norm.weight"] = (width,)
    table[f"{merger}post_projection_norm.bias"] = (width,)
    table[f"{merger}gate_proj.weight"] = table[f"{merger}up_proj.weight"] = (wide, width)
    table[f"{merger}down_proj.weight"] = (width, wide)
    return table


def random_tensors(shape: Shape) -> dict[str, np.ndarray]:
    """f32 weights by name, seeded; rounded to bf16 so that every dtype holds them exactly."""
    rng = np.random.default_rng(shape.seed)
    tensors = {}
    for name, sides in tensor_shapes(shape).items():
        values = rng.standard_normal(sides, np.float32)
        if len(sides) == 1:
            values = values * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            values /= np.sqrt(np.prod(sides[1:]), dtype=np.float32)
            if "embed" in name:
                values *= np.sqrt(sides[1], dtype=np.float32) * 0.5
        words = values.astype(np.float32).view(np.uint32)
        tensors[name] = ((words >> 16) << 16).view(np.float32)
    return tensors


def encode(values: np.ndarray, dtype: str) -> bytes:
    """f32 values as safetensors stores ``dtype``."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "BF16") -> None:
    """One shard."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, at = [], 0
    for name, values in tensors.items():
        blob = encode(values, dtype)
        offsets = [at, at + len(blob)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        blobs.append(blob)
        at += len(blob)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(blobs))


def build_checkpoint(directory: Path, shape: Shape | None = None) -> Path:
    """Write a whole checkpoint; returns the directory."""
    shape = shape or Shape()
    directory.mkdir(parents=True, exist_ok=True)
    ids = token_ids(shape.layout)
    write_json(directory / "config.json", config_json(shape))
    eos = [ids[token] for token in (shape.layout.eos if shape.eos is None else shape.eos)]
    write_json(
        directory / "generation_config.json",
        {"eos_token_id": eos, "pad_token_id": ids["<|endoftext|>"]},
    )
    write_json(directory / "tokenizer.json", tokenizer_json(shape.layout))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )
    write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": shape.architecture.replace(
                "ForConditionalGeneration", "ImageProcessor"
            ),
            "size": {"shortest_edge": 12544, "longest_edge": shape.max_pixels},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
    )
    (directory / "chat_template.jinja").write_text(shape.template, "utf-8")
    tensors = list(random_tensors(shape).items())
    weight_map = {}
    for n in range(shape.n_shards):
        part = dict(tensors[n :: shape.n_shards])
        name = f"model-{n + 1:05d}-of-{shape.n_shards:05d}.safetensors"
        write_safetensors(directory / name, part, shape.dtype)
        weight_map |= dict.fromkeys(part, name)
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": 0}, "weight_map": weight_map},
    )
    return directory


def write_json(path: Path, value: Any) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value), "utf-8")


def read_json(path: Path) -> Any:
    """A JSON file's value."""
    return json.loads(path.read_text("utf-8"))


def pack_string(text: str | bytes) -> bytes:
    """A GGUF string: length and bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pack_value(value: Any) -> bytes:
    """A GGUF value with its type: u32 where it fits, u64 above, i32 below zero, f32, text, list."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        if value < 0:
            return struct.pack("<Ii", 5, value)
        return struct.pack("<II", 4, value) if value < 2**32 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str | bytes):
        return struct.pack("<I", 8) + pack_string(value)
    items = [pack_value(item) for item in value]
    kind = items[0][:4] if items else struct.pack("<I", 4)
    return (
        struct.pack("<I", 9)
        + kind
        + struct.pack("<Q", len(items))
        + b"".join(item[4:] for item in items)
    )


def pack_gguf(
    metadata: dict[str, Any],
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]] | None = None,
    *,
    version: int = 3,
) -> bytes:
    """A GGUF file, written from the format's description and from nothing else.

    Args:
        metadata: See `pack_value`.
        tensors: Name to ``(shape, ggml type, data)``; the shape's first side is the row length.
        version: 2 and 3 have the same layout.
    """
    tensors = tensors or {}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(pack_string(key) + pack_value(value) for key, value in metadata.items())
    data = b""
    for name, (shape, kind, blob) in tensors.items():
        head += pack_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", kind, len(data))
        data += blob + bytes(-len(blob) % 32)
    return head + bytes(-len(head) % 32) + data


TEXT_METADATA: dict[str, Any] = {
    "general.architecture": "glm4",
    "general.name": "small",
    "glm4.embedding_length": 64,
    "glm4.block_count": 2,
    "glm4.context_length": 4096,
    "tokenizer.ggml.tokens": ["a", "b", *SPECIALS],
}
MMPROJ_METADATA: dict[str, Any] = {
    "general.architecture": "clip",
    "general.type": "mmproj",
    "clip.projector_type": "glm4v",
    "clip.vision.projection_dim": 64,
    "clip.vision.patch_size": 14,
}


TOWER_TENSORS = (
    "v.patch_embd.weight",
    "v.patch_embd.weight.1",
    "v.patch_embd.bias",
    "v.position_embd.weight",
    "v.blk.0.attn_qkv.weight",
    "v.post_ln.weight",
    "mm.patch_merger.weight",
    "mm.patch_merger.bias",
    "mm.model.fc.weight",
    "mm.down.weight",
)


def write_gguf(path: Path, metadata: dict[str, Any], **changes: Any) -> Path:
    """A GGUF with a mmproj's tensor names; the tensors are too small to be run.

    Args:
        path: The file.
        metadata: `TEXT_METADATA` or `MMPROJ_METADATA`.
        **changes: Keys to replace, ``__`` for a dot; None drops one.
    """
    merged = metadata | {key.replace("__", "."): value for key, value in changes.items()}
    kept = {key: value for key, value in merged.items() if value is not None}
    path.write_bytes(pack_gguf(kept, dict.fromkeys(TOWER_TENSORS, ((4,), 0, bytes(16)))))
    return path


def pack_imatrix(columns: dict[str, np.ndarray], *, n_calls: int = 1) -> bytes:
    """An importance matrix in llama.cpp's legacy format: mean squares by tensor name."""
    data = struct.pack("<i", len(columns))
    for name, values in columns.items():
        raw = name.encode()
        data += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", n_calls, values.size)
        data += (values * np.float32(n_calls)).astype("<f4").tobytes()
    return data


def rewrite_gguf(source: Path, target: Path, *, drop: tuple[str, ...] = (), **changed: Any) -> Path:
    """Copy a GGUF without the keys in ``drop`` (prefixes) and with ``changed`` ones.

    In keyword names ``__`` stands for the dot of a GGUF key.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    values = {key.replace("__", "."): value for key, value in changed.items()}
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, entry in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture", *drop)):
            continue
        sub_type = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
        value = values.get(key, entry.contents())
        writer.add_key_value(key, value, entry.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def build_sparse_checkpoint(directory: Path, shape: Shape) -> Path:
    """A checkpoint of any size whose weights are all zero and take no room on the disk."""
    build_checkpoint(directory)
    for path in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        path.unlink()
    write_json(directory / "config.json", config_json(shape))
    header: dict[str, Any] = {}
    at = 0
    for name, sides in tensor_shapes(shape).items():
        end = at + 2 * int(np.prod(sides))
        header[name] = {"dtype": "BF16", "shape": list(sides), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return directory


def build_scripted_checkpoint(
    directory: Path,
    pieces: tuple[str, ...],
    *,
    endless: bool = False,
    shape: Shape | None = None,
) -> Path:
    """A checkpoint that answers every prompt with these pieces, a token each, then ends the turn.

    Its layers add nothing, and its head knows which token follows which, beginning with what ends
    the assistant's header: the role's token or a line break. All pieces must differ; at most six
    may be new tokens. The turn ends with ``</answer>``, or with the layout's first stop.

    Args:
        directory: Where it goes.
        pieces: Special tokens or new ones.
        endless: Repeat the last piece for ever.
        shape: Its layout and template; the sizes stay small.
    """
    shape = shape or Shape()
    build_checkpoint(directory, shape)
    ids, symbols = token_ids(shape.layout), byte_symbols()
    raw = tokenizer_json(shape.layout)
    first_free = len(ids)
    for piece in pieces:
        if piece not in ids:
            ids[piece] = first_free
            raw["model"]["vocab"]["".join(symbols[b] for b in piece.encode())] = first_free
            first_free += 1
    write_json(directory / "tokenizer.json", raw)
    stop = "</answer>" if "</answer>" in shape.layout.eos else shape.layout.eos[0]
    chain = [ids[symbols[ord("\n")]], *(ids[piece] for piece in pieces)]
    chain.append(ids[pieces[-1] if endless else stop])
    header = ids["<|assistant|>"]
    tensors = random_tensors(shape)
    for name, values in tensors.items():
        if name.endswith(("self_attn.o_proj.weight", "lm_head.weight")) or (
            "language_model" in name and name.endswith("mlp.down_proj.weight")
        ):
            values[:] = 0
    embedding = tensors[f"{shape.prefixes[0]}embed_tokens.weight"]
    signs = np.random.default_rng(7).choice([-1.0, 1.0], embedding.shape)
    embedding[[header, *chain]] = signs[[header, *chain]]
    for token, following in [(header, chain[1]), *itertools.pairwise(chain)]:
        tensors["lm_head.weight"][following] += embedding[token]
    for path in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        path.unlink()
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def describe_sizes(
    *,
    layer_bytes: tuple[int, ...] = (10_000_000,) * 8,
    token_embd_bytes: int = 4_000_000,
    output_bytes: int = 4_000_000,
    n_embd: int = 512,
    n_ff: int = 1536,
    n_heads: int = 8,
    n_heads_kv: int = 2,
    head_dim: int = 64,
    n_vocab: int = 1000,
    ggml_type: int = 1,
    tower_bytes: int = 40_000_000,
    max_pixels: int = 5_000_000,
) -> ModelDescription:
    """What a pair of these sizes says of itself; there are no files behind it.

    Args:
        layer_bytes: Weights of each layer.
        token_embd_bytes: Weights of the token embedding.
        output_bytes: Weights of the output matrix; 0 uses the token embedding twice.
        n_embd: Embedding width.
        n_ff: Feed-forward width.
        n_heads: Attention heads.
        n_heads_kv: Key and value heads.
        head_dim: Width of a head.
        n_vocab: Tokens; there are no merges.
        ggml_type: Of the layers; F16 by default, which no CPU has in another order.
        tower_bytes: Weights of the vision tower (4 blocks of 256, feed-forward 512); 0 for none.
        max_pixels: Largest image, in two frames.
    """
    metadata = {
        "general.architecture": "glm4",
        "glm4.block_count": len(layer_bytes),
        "glm4.embedding_length": n_embd,
        "glm4.feed_forward_length": n_ff,
        "glm4.attention.head_count": n_heads,
        "glm4.attention.head_count_kv": n_heads_kv,
        "glm4.attention.key_length": head_dim,
        "tokenizer.ggml.tokens": [f"t{n}" for n in range(n_vocab)],
    }
    sizes = {f"blk.{n}.ffn_up.weight": n_bytes for n, n_bytes in enumerate(layer_bytes)}
    sizes |= {"token_embd.weight": token_embd_bytes, "output.weight": output_bytes}
    text = _sized_header("sized.gguf", metadata, sizes, ggml_type)
    tower = None
    if tower_bytes:
        eyes = {
            "general.architecture": "clip",
            "clip.vision.embedding_length": 256,
            "clip.vision.feed_forward_length": 512,
            "clip.vision.projection_dim": n_embd,
            "clip.vision.patch_size": 14,
            "clip.vision.spatial_merge_size": 2,
        }
        tower = _sized_header("mmproj-sized.gguf", eyes, {"mm.down.weight": tower_bytes}, 1)
    limits = VisionLimits(14, 2, 12_544, max_pixels) if tower_bytes else None
    return ModelDescription(text, tower, None, frozenset(), limits, ())


def _sized_header(
    name: str, metadata: dict[str, Any], sizes: dict[str, int], ggml_type: int
) -> Header:
    tensors, at = {}, 0
    for tensor, n_bytes in sizes.items():
        if n_bytes:
            shape = (1024, 1024)  # only its divisibility is looked at
            tensors[tensor] = TensorInfo(tensor, shape, ggml_type, at, n_bytes)
            at += n_bytes
    return Header(Path(name), 3, 32, metadata, tensors, at)
