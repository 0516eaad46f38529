"""Random Glm4v checkpoints of real shapes, written straight to disk as bf16 shards.

    python benchmarks/random_checkpoint.py 1.7b DIR
    python benchmarks/random_checkpoint.py 9b DIR

The 9B has AutoGLM-Phone-9B's exact shapes (20.6 GB in 5 GB shards). Weights are noise of a trained
model's scale, repeated from a pool, so that writing is as fast as the disk.
"""

from __future__ import annotations

import itertools
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from builders import (
    TEMPLATE,
    Shape,
    config_json,
    tensor_shapes,
    token_ids,
    tokenizer_json,
    vocab_size,
    write_json,
)

SHAPES = {
    # 16 layers of width 1024 and a 4-block tower: 0.4 B parameters
    "0.4b": (
        Shape(
            hidden_size=1024,
            n_layers=16,
            n_heads=8,
            n_kv_heads=2,
            head_dim=128,
            intermediate_size=4096,
            mrope_section=(8, 12, 12),
            vision_depth=4,
            vision_hidden=512,
            vision_heads=8,
            image_size=336,
            merger_width=2048,
        ),
        65536,
    ),
    # 24 layers of width 2048 and a 12-block tower: 1.7 B parameters
    "1.7b": (
        Shape(
            hidden_size=2048,
            n_layers=24,
            n_heads=16,
            n_kv_heads=2,
            head_dim=128,
            intermediate_size=6848,
            mrope_section=(8, 12, 12),
            vision_depth=12,
            vision_hidden=1024,
            vision_heads=8,
            image_size=336,
            merger_width=6848,
        ),
        65536,
    ),
    "9b": (
        Shape(
            hidden_size=4096,
            n_layers=40,
            n_heads=32,
            n_kv_heads=2,
            head_dim=128,
            intermediate_size=13696,
            mrope_section=(8, 12, 12),
            vision_depth=24,
            vision_hidden=1536,
            vision_heads=12,
            image_size=336,
            merger_width=13696,
        ),
        151552,
    ),
}
SHARD_BYTES = 5 * 10**9
_UNUSED_IDS = 223  # GLM-4's: 151,552 ids, 151,329 tokens before the special ones
_MERGES_PER_TOKEN = 2
_POOL = 1 << 24


def build(directory: Path, size: str) -> Path:
    """Write a checkpoint; returns the directory. Deterministic."""
    shape, n_vocab = SHAPES[size]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, ids = large_tokenizer(n_vocab - _UNUSED_IDS)
    config = config_json(shape)
    small = {number: token for token, number in token_ids().items()}
    for holder in (config, config["text_config"]):
        for key, number in holder.items():
            if key.endswith("_token_id"):
                holder[key] = ids[small[number]]
    config["text_config"]["vocab_size"] = n_vocab
    write_json(directory / "config.json", config)
    eos = [ids[t] for t in ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")]
    write_json(directory / "generation_config.json", {"eos_token_id": eos})
    write_json(directory / "tokenizer.json", tokenizer)
    # transformers' tokenizer class, which upstream's converter loads
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    limits = {"size": {"shortest_edge": 12544, "longest_edge": 5_000_000}}
    means = {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
    stds = {"image_std": [0.26862954, 0.26130258, 0.27577711]}
    write_json(directory / "preprocessor_config.json", limits | means | stds)
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    sides = {
        name: tuple(n_vocab if side == vocab_size() else side for side in dims)
        for name, dims in tensor_shapes(shape).items()
    }
    _write_shards(directory, sides)
    return directory


def find_or_build(work: Path, size: str) -> Path:
    """The checkpoint of a size in ``work``, made at the first time."""
    directory = work / f"random-{size}"
    if not (directory / "model.safetensors.index.json").exists():
        build(directory, size)
    return directory


def large_tokenizer(n_tokens: int) -> tuple[dict[str, Any], dict[str, int]]:
    """A tokenizer of a real one's size: ``n_tokens`` before the special ones, and 2 merges each.

    Its tokens are meaningless, but as long as real ones, so that what llama.cpp keeps of a
    vocabulary weighs what it weighs with the published model (151,329 tokens, 318,088 merges).
    """
    raw = tokenizer_json()
    vocab: dict[str, int] = raw["model"]["vocab"]
    merges: list[list[str]] = raw["model"]["merges"]
    strings = (
        "".join(letters)
        for length in range(2, 9)
        for letters in itertools.product("etaoinsr", repeat=length)
    )
    made = list(itertools.islice((s for s in strings if s not in vocab), n_tokens - len(vocab)))
    for token in made:
        vocab[token] = len(vocab)
        merges.append([token[:-1], token[-1]])
    second = ([token[:1], token[1:]] for token in made if len(token) > 2)
    merges.extend(itertools.islice(second, int(_MERGES_PER_TOKEN * n_tokens) - len(merges)))
    for number, entry in enumerate(raw["added_tokens"]):
        entry["id"] = n_tokens + number
    return raw, vocab | {entry["content"]: entry["id"] for entry in raw["added_tokens"]}


def _write_shards(directory: Path, sides: dict[str, tuple[int, ...]]) -> None:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(_POOL, np.float32)
    matrix = (noise * np.float32(0.02)).view(np.uint32) >> 16
    vector = (1 + noise * np.float32(0.05)).view(np.uint32) >> 16
    pools = (vector.astype(np.uint16).tobytes(), matrix.astype(np.uint16).tobytes())
    shards: list[list[str]] = [[]]
    filled = 0
    for name, dims in sides.items():
        n_bytes = 2 * int(np.prod(dims))
        if filled and filled + n_bytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += n_bytes
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_shard(directory / file, {name: sides[name] for name in names}, pools)
    n_bytes = sum(2 * int(np.prod(dims)) for dims in sides.values())
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def _write_shard(path: Path, sides: dict[str, tuple[int, ...]], pools: tuple[bytes, bytes]) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, dims in sides.items():
        n_bytes = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, dims in sides.items():
            pool, left = pools[len(dims) > 1], 2 * int(np.prod(dims))
            start = 2 * (hash_of(name) % (_POOL // 2))
            while left:
                part = pool[start : start + left]
                file.write(part)
                left -= len(part)
                start = 0


def hash_of(name: str) -> int:
    """A place in the pool, the same on every run."""
    return sum((i + 1) * byte for i, byte in enumerate(name.encode())) * 7919


if __name__ == "__main__":
    build(Path(sys.argv[2]), sys.argv[1])
