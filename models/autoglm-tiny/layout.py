"""The files around the weights: tokenizer, configuration, chat template, preprocessor, shards.

Everything is in the layout of the published AutoGLM-Phone-9B checkpoint, at a small size. Knows
names, shapes and files; knows nothing of training.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import vocabulary as voc
from instructions import Generator
from patterns import all_patterns
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

VOCAB_SIZE = 3328  # rows of the embeddings; the tokenizer has fewer, as in the published checkpoint
TRAINED_MERGES = 2000
SHARDS = 2

SPECIAL = (
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
)
ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BOX = ("<|begin_of_box|>", "<|end_of_box|>")
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")

_GLM4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Runs of punctuation that the prompts and the answers are full of.
_PUNCTUATION = (
    '="',
    '",',
    '")',
    "=[",
    "],",
    "])",
    '{"',
    '":',
    ' "',
    '"}',
    '"}\n',
    "**",
    " **",
    "\n\n",
    "**\n\n",
    "...",
    "={",
    '!"',
    ").",
    '("',
    "，",
    "。",
    "！",
    "：",
    "“",
    "”",
    "；",
    '。")',
    '！")',
    '.")',
    '!")',
)
_HAN = re.compile(r"[\u4e00-\u9fff]+")
_LATIN = re.compile(r"[A-Za-z]+")

CHAT_TEMPLATE = """\
{#- A message is its role's token, a line break and its content; nothing ends a turn. -#}
{%- macro put(content) -%}
    {%- if content is none -%}
    {%- elif content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is string -%}
                {{- part -}}
            {%- elif part.type in ['image', 'image_url'] -%}
                {{- '<|begin_of_image|><|image|><|end_of_image|>' -}}
            {%- elif part.type in ['video', 'video_url'] -%}
                {{- '<|begin_of_video|><|video|><|end_of_video|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
    {%- set role = 'observation' if message.role == 'tool' else message.role -%}
    {{- '<|' ~ role ~ '|>\\n' -}}
    {{- put(message.content) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


def number_merges() -> list[tuple[str, str]]:
    """Merges that make each of 10 to 999 one token; of two ways, the one BPE would take first."""
    rank = {f"{n}": n for n in range(10, 100)}
    merges = [(text[0], text[1]) for text in rank]
    for number in map(str, range(100, 1000)):
        left, right = rank[number[:2]], rank.get(number[1:], 1000)
        merges.append((number[:2], number[2]) if left <= right else (number[0], number[1:]))
    return merges


def _word_counts() -> Counter[str]:
    """Count the words that the merges are trained on.

    Chinese comes as single characters and as the listed words, never as running text: no token then
    spans the end of an app's name. Latin words come without the blank before them, so that a word
    is the same token in an instruction and between quotation marks in the answer.
    """
    generator = Generator(7)
    text: list[str] = [pattern.text for pattern in all_patterns()]
    for _ in range(6000):
        sample = generator.training_sample()
        text += [message["content"] for message in sample.messages] + [sample.step.answer]
    words: Counter[str] = Counter()
    for line in text:
        words.update(_LATIN.findall(line))
    characters = {character for line in text for run in _HAN.findall(line) for character in run}
    listed = {
        *voc.LEXICON_ZH,
        *voc.APPS["zh"],
        *voc.WORDS["zh"],
        *voc.API_VERBS["zh"],
        *voc.API_OBJECTS["zh"],
        *voc.RISKS["zh"],
        *voc.HURDLES["zh"],
        *voc.TOPICS["zh"],
    }
    listed |= {run for value in voc.APPS["zh"] for run in _LATIN.findall(value)}
    counts = Counter({word: 20 + min(count, 200) for word, count in words.items()})
    for app in voc.APPS["en"]:
        counts.update(dict.fromkeys(app.split(), 300))
    counts.update(dict.fromkeys(characters, 150))
    counts.update(dict.fromkeys(listed, 100))
    counts.update(dict.fromkeys(_PUNCTUATION, 400))
    return counts


def _trained_merges() -> list[tuple[str, str]]:
    """Train merges on the words of the instructions with the tokenizers library's own trainer."""
    trainer = trainers.BpeTrainer(
        vocab_size=256 + TRAINED_MERGES,
        show_progress=False,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def lines() -> Iterator[str]:
        for word, count in sorted(_word_counts().items()):
            yield from [word] * count

    tokenizer.train_from_iterator(lines(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def build_tokenizer() -> Tokenizer:
    """Make the tokenizer: byte-level BPE with GLM-4's splitting and GLM-4.1V's added tokens."""
    merges = [*number_merges(), *_trained_merges()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GLM4_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=True, trim_offsets=False, use_regex=True
    )
    for text in (*SPECIAL, *ANSWER_TAGS, *BOX):
        special = text not in ANSWER_TAGS
        token = AddedToken(text, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def model_config(ids: dict[str, int]) -> dict[str, Any]:
    """Write config.json in the published style; ``ids`` maps a token's text to its id."""
    stops = [ids[text] for text in STOP_TOKENS]
    return {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "text_config": {
            "model_type": "glm4v_text",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 672,
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-05,
            "max_position_embeddings": 65536,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]},
            "eos_token_id": stops,
            "pad_token_id": ids["<|endoftext|>"],
            "use_cache": True,
            "torch_dtype": "bfloat16",
        },
        "vision_config": {
            "model_type": "glm4v",
            "depth": 3,
            "hidden_size": 128,
            "num_heads": 4,
            "in_channels": 3,
            "image_size": 336,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 256,
            "intermediate_size": 512,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-05,
        },
    }


def preprocessor_config() -> dict[str, Any]:
    """Write preprocessor_config.json: the published one with a smaller pixel limit."""
    return {
        "image_processor_type": "Glm4vImageProcessor",
        "processor_class": "Glm4vProcessor",
        # At most 72 image tokens: what it has learned to see.
        "size": {"shortest_edge": 12544, "longest_edge": 112896},
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Write tokenizer_config.json, loadable as a ``PreTrainedTokenizerFast``."""
    added = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "added_tokens_decoder": added,
        "additional_special_tokens": [*SPECIAL],
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "model_max_length": 65536,
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: the name appears when the content is complete."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_surroundings(folder: Path, tokenizer: Tokenizer) -> None:
    """Write every file of the checkpoint but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
    _write_json(folder / "config.json", model_config(ids))
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [ids[text] for text in STOP_TOKENS],
            "pad_token_id": ids["<|endoftext|>"],
            "transformers_version": "4.57.1",
        },
    )
    _write_json(folder / "preprocessor_config.json", preprocessor_config())
    write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)


def save_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write bf16 shards of about equal size and their index, names as published."""
    tensors = {
        name: weights[name].detach().to(torch.bfloat16).contiguous() for name in sorted(weights)
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(written * SHARDS // total, SHARDS - 1)][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, folder / (file + ".part"), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    for file in sorted(set(weight_map.values())):
        part = folder / (file + ".part")
        part.chmod(0o644)
        part.replace(folder / file)
    metadata = {"total_parameters": sum(t.numel() for t in tensors.values()), "total_size": total}
    index = {"metadata": metadata, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
