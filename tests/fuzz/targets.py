"""What is fuzzed: four readers of what strangers send, each with seeds and what must hold.

A target takes any bytes and raises nothing for them; what it does raise is a fault. `run_checked`
holds its time and memory too. Knows no fuzzer: `run.py` drives it with atheris, the tests with
seeds, kept cases and blind changes.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from builders import (
    MMPROJ_METADATA,
    SPECIALS,
    TEMPLATE,
    TEXT_METADATA,
    TOWER_TENSORS,
    encode,
    pack_gguf,
)
from fuzz import mutators
from serving import GrammarEngine, data_url, png

from autoglm_gguf import AutoGLM
from autoglm_gguf.actions import ACTIONS, SYSTEM_PROMPT_EN, find_action, parse_action, parse_answer
from autoglm_gguf.checkpoint.safetensors import INDEX, SINGLE, Shards
from autoglm_gguf.errors import ActionParseError, CheckpointError, GGUFError
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.describe import describe_headers
from autoglm_gguf.gguf.groups import describe_groups
from autoglm_gguf.gguf.header import TENSOR_TYPES, read_header
from autoglm_gguf.gguf.identity import identify_model
from autoglm_gguf.memory.estimate import layers_lie_together, text_shape, tower_shape
from autoglm_gguf.server.asking import Asking, parse_body
from autoglm_gguf.server.errors import ApiError, as_api_error
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.protocol import ChatRequest, CompletionRequest

MOST_S = 1.0
"""CPU seconds for one input."""
MOST_BYTES = 64 * 2**20
"""By which one input may raise the process's peak."""
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")


@dataclass(frozen=True)
class Target:
    """One reader."""

    name: str
    run: Callable[[bytes], bool]
    """Takes any bytes; tells whether the reader took them."""
    seeds: Callable[[], list[bytes]]
    covers: tuple[str, ...]
    """The files under src/autoglm_gguf whose lines are counted."""
    words: tuple[bytes, ...] = ()
    """What the format is made of, for the fuzzer's dictionary."""
    mutate: Callable[[bytes, random.Random], bytes | None] | None = None
    """Changes an input as its format has it; None where it does not have the format."""
    most_bytes: int = 4096
    """Of one input."""


class TooMuchError(AssertionError):
    """An input that took more time or memory than `MOST_S` or `MOST_BYTES`."""


def run_checked(target: Target, data: bytes) -> bool:
    """Run a target; time and memory are held too.

    Raises:
        TooMuchError: It took too much of either.
    """
    before, began = _peak_bytes(), time.thread_time()
    took = target.run(data)
    spent_s, grown = time.thread_time() - began, _peak_bytes() - before
    if spent_s > MOST_S:
        raise TooMuchError(f"{spent_s:.2f} s, {MOST_S} at most")
    if grown > MOST_BYTES:
        raise TooMuchError(f"{grown} bytes more at its peak, {MOST_BYTES} at most")
    return took


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES


# --- the action language ---


def run_actions(data: bytes) -> bool:
    text = data.decode("utf-8", "replace")
    try:
        _, action = parse_answer(text)
    except ActionParseError as error:
        assert error.text == text
        return False
    start, end, found = find_action(text)
    assert found == action
    assert 0 <= start < end <= len(text.rstrip())
    assert type(action) is ACTIONS[action.name]
    assert all(0 <= side <= 999 for point in action.points.values() for side in point)
    assert parse_action(action.render()) == action, action.render()
    return True


def seed_actions() -> list[bytes]:
    calls = [
        'do(action="Launch", app="微信")',
        'do(action="Tap", element=[500,300], message="pay")',
        'do(action="Type", text="say \\"hi\\"")',
        'do(action="Type_Name", text="张三")',
        'do(action="Interact")',
        'do(action="Swipe", start=[1,2], end=[998,999])',
        'do(action="Note", message="True")',
        'do(action="Call_API", instruction="sum it up")',
        'do(action="Long Press", element=[0,0])',
        'do(action="Double Tap", element=[1.5, 2])',
        'do(action="Take_over", message="log in")',
        'do(action="Back")',
        'do(action="Home")',
        'do(action="Wait", duration="2.5 seconds")',
        'finish(message="done")',
        "do（action＝“Tap”，element＝［5，6］）",
        "do(action='wait', duration=3)",
    ]
    whole = f"<think>it says finish(message=…</think><answer>{calls[1]}</answer>"
    twice = f"{calls[11]}\n{calls[12]} and more"
    return [text.encode() for text in (*calls, whole, twice)]


ACTION_WORDS = tuple(
    word.encode()
    for word in (
        *("do(action=", "finish(message=", "<think>", "</think>", "<answer>", "</answer>"),
        *("element=[", "start=[", "end=[", 'text="', 'app="', 'message="', 'duration="', '")'),
        *(
            "（",
            "）",
            "＝",
            "：",
            "，",
            "、",
            "“",
            "”",
            "＂",
            "‘",
            "’",
            "「",
            "」",
            "［",
            "］",
            "【",
        ),
        *("\\u0041", '\\"', "\\\\", "\\ud800", "<|user|>", " seconds", "\n"),
        *(f'"{name}"' for name in ACTIONS),
    )
)


# --- GGUF headers ---


def run_gguf(data: bytes) -> bool:
    path = Path(_FOLDER.name) / "fuzzed.gguf"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except GGUFError:
        return False
    for tensor in header.tensors.values():
        assert 24 <= tensor.offset <= tensor.offset + tensor.n_bytes <= len(data)
        assert not tensor.offset % header.alignment
        block, block_bytes = TENSOR_TYPES[tensor.ggml_type][1:]
        assert tensor.n_bytes * block == tensor.n_elements * block_bytes
    assert sum(group.n_bytes for group in describe_groups(header)) == header.weights_bytes
    identify_model(header)
    for use in (_use_as_text, _use_as_tower):
        try:
            use(header)
        except GGUFError:
            pass
    return True


def _use_as_text(header: Any) -> None:
    described = describe_headers(header, None)
    assert all(0 <= token < len(header.metadata[names.TOKENS]) for token in described.stop_ids)
    shape = text_shape(header)
    assert shape.weights_bytes == header.weights_bytes
    layers_lie_together(header)


def _use_as_tower(header: Any) -> None:
    width = header.get_int("clip.vision.projection_dim")
    metadata = {**TEXT_METADATA, "glm4.embedding_length": width}
    text = replace(header, metadata=metadata)
    limits = describe_headers(text, header).vision
    assert limits is not None and limits.min_pixels <= limits.max_pixels
    tower_shape(header)


_TOWER_METADATA = {
    **MMPROJ_METADATA,
    "clip.vision.embedding_length": 256,
    "clip.vision.feed_forward_length": 512,
    names.MERGE_SIZE: 2,
    names.MIN_PIXELS: 12_544,
    names.MAX_PIXELS: 5_000_000,
}
_TEXT_METADATA = {
    **TEXT_METADATA,
    "glm4.feed_forward_length": 128,
    "glm4.attention.head_count": 2,
    "glm4.attention.head_count_kv": 1,
    "glm4.attention.key_length": 32,
    "glm4.rope.dimension_sections": [8, 12, 12, 0],
    "glm4.attention.layer_norm_rms_epsilon": 1e-5,
    names.CHAT_TEMPLATE: TEMPLATE,
    names.EOS_ID: 3,
    names.EOS_IDS: [3, 4],
    names.MERGES: ["a b"],
    names.SOURCE_ID: "0" * 24,
}


def seed_gguf() -> list[bytes]:
    text = dict.fromkeys(
        ("token_embd.weight", "output.weight", "blk.0.attn_q.weight", "blk.1.ffn_up.weight"),
        ((32, 2), 8, bytes(68)),
    )
    text["output_norm.weight"] = ((4,), 0, bytes(16))
    tower = dict.fromkeys(TOWER_TENSORS, ((4,), 0, bytes(16)))
    odd = {
        "a": True,
        "b": -1,
        "c": 2**40,
        "d": 0.5,
        "e": [1, 2],
        "f": [],
        "g": "名",
        "h": [b"\xff"],
    }
    return [
        pack_gguf(_TEXT_METADATA, text),
        pack_gguf(_TOWER_METADATA, tower),
        pack_gguf(odd, version=2),
        pack_gguf({"general.alignment": 64}, {"x": ((256, 1, 1, 1), 12, bytes(144))}),
    ]


GGUF_WORDS = (
    *(key.encode() for key in (*_TEXT_METADATA, *_TOWER_METADATA, "general.alignment")),
    *(name.encode() for name in (*SPECIALS, *TOWER_TENSORS, "blk.0.", "mmproj", "glm4")),
    *(struct.pack("<I", kind) for kind in range(14)),
    *(struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)),
)


# --- safetensors ---

_SEPARATOR = b"\xff\xfe"


def run_safetensors(data: bytes) -> bool:
    """An input is one shard; or an index, a separator, and the shard ``a.safetensors``."""
    folder = Path(_FOLDER.name)
    index, separator, shard = data.partition(_SEPARATOR)
    for name in (INDEX, SINGLE, "a.safetensors"):
        (folder / name).unlink(missing_ok=True)
    if separator:
        (folder / INDEX).write_bytes(index)
        (folder / "a.safetensors").write_bytes(shard)
    else:
        (folder / SINGLE).write_bytes(data)
    try:
        with Shards(folder) as shards:
            for tensor in shards.tensors.values():
                assert tensor.data.shape == tensor.shape
                assert 0 < tensor.data.nbytes <= len(data)
                tensor.data.tobytes()
                tensor.release(0, tensor.data.size)
                del tensor
            assert len(shards.fingerprint) > 0
    except CheckpointError:
        return False
    return True


def seed_safetensors() -> list[bytes]:
    values = np.arange(6, dtype=np.float32)
    header = {"__metadata__": {"format": "pt"}}
    entries: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c.inv_freq": {"dtype": "I64", "shape": [1], "data_offsets": [32, 40]},
    }
    data = encode(values, "F32") + bytes(16)
    whole = _shard({**header, **entries}, data)
    index = json.dumps({"weight_map": dict.fromkeys(entries, "a.safetensors")}).encode()
    scalar = _shard({"s": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}, b"\0\x3c")
    return [whole, index + _SEPARATOR + whole, scalar, _shard({}, b"")]


def _shard(header: dict[str, Any], data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def mutate_safetensors(data: bytes, chance: random.Random) -> bytes | None:
    """Change the index or the header as JSON; the length before the header follows."""
    index, separator, shard = data.partition(_SEPARATOR)
    if separator and chance.random() < 0.5:
        changed = mutators.mutate_json(index, chance)
        return None if changed is None else changed + separator + shard
    shard = shard if separator else data
    n = struct.unpack("<Q", shard[:8])[0] if len(shard) >= 8 else 0
    changed = mutators.mutate_json(shard[8 : 8 + n], chance)
    if changed is None:
        return None
    made = struct.pack("<Q", len(changed)) + changed + shard[8 + n :]
    return index + separator + made if separator else made


SAFETENSORS_WORDS = tuple(
    word.encode()
    for word in (
        *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"weight_map"'),
        *('"F64"', '"I64"', '"F32"', '"F16"', '"BF16"', '"I8"', '"BOOL"', '"a.safetensors"'),
        *("[0,24]", "[0,0]", "18446744073709551616", "-1", "1e400", "NaN", "..", "\\u0000"),
    )
)


# --- request bodies ---

_PARAMS = ServerParams(max_messages=20, max_images=2, max_image_pixels=100_000)
_ANSWER_TOKENS = 4
_model: AutoGLM | None = None


def run_requests(data: bytes) -> bool:
    """A body becomes a question, and the question goes to a model that answers ``123``."""
    took = False
    for kind in (ChatRequest, CompletionRequest):
        try:
            body = parse_body(kind, data)
            asking = Asking(_PARAMS, n_ctx=512)
            ask = (
                asking.chat(body, "client")
                if isinstance(body, ChatRequest)
                else asking.completion(body, "client")
            )
        except ApiError as error:
            _check_told(error)
            continue
        took = True
        most = min(ask.sampling.get("max_tokens", _ANSWER_TOKENS), _ANSWER_TOKENS)
        sampling = {**ask.sampling, "max_tokens": most}
        try:
            for _ in _fake().stream(ask.prompt, raw=ask.raw, **sampling):
                pass
        except Exception as error:
            told = as_api_error(error)
            if told.status >= 500:
                raise
            _check_told(told)
    return took


def _check_told(error: ApiError) -> None:
    assert 400 <= error.status < 500, error
    json.dumps(error.body()).encode()
    assert error.message


def _fake() -> AutoGLM:
    global _model
    if _model is None:
        logging.getLogger("autoglm_gguf").setLevel(logging.CRITICAL)
        engine = GrammarEngine(b"123", n_ctx=512, n_draft_max=4)
        _model = AutoGLM(engine, content_format="string")
    return _model


def seed_requests() -> list[bytes]:
    said = [{"role": "user", "content": "hi"}]
    picture = {"type": "image_url", "image_url": {"url": data_url(png(28, 28))}}
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}, "s": {"pattern": "^a*$"}}}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1}
    bodies: list[dict[str, Any]] = [
        {"messages": said},
        {"messages": [{"role": "system", "content": SYSTEM_PROMPT_EN}, *said], "stream": True},
        {"messages": [{"role": "user", "content": [picture, {"type": "text", "text": "what"}]}]},
        {"messages": said, **sampling, "stop": ["a"], "max_tokens": 3, "logprobs": True},
        {"messages": said, "response_format": format_, "stream_options": {"include_usage": True}},
        {"messages": said, "constrain": "action", "apps": ["微信"], "max_thinking_tokens": 5},
        {
            "messages": [*said, {"role": "assistant", "content": None}, *said],
            "frequency_penalty": 0.2,
            "presence_penalty": -1,
            "repetition_penalty": 1.1,
            "n_draft": 2,
            "cache_prompt": False,
        },
        {"prompt": "ab", "max_tokens": 2, "logprobs": 2, "echo": False, "user": "me"},
    ]
    return [json.dumps(body, ensure_ascii=False).encode() for body in bodies]


REQUEST_WORDS = tuple(
    json.dumps(word).encode()
    for word in (
        *ChatRequest.model_fields,
        *CompletionRequest.model_fields,
        *("role", "content", "type", "text", "image_url", "url", "refusal", "schema", "name"),
        *("system", "developer", "user", "assistant", "tool", "json_object", "json_schema"),
        *("$ref", "#/$defs/a", "$defs", "anyOf", "oneOf", "enum", "const", "pattern", "items"),
        *("minLength", "maxItems", "properties", "required", "^[a-z]{1,9}$", "<|image|>"),
        *("data:image/png;base64,", "http://127.0.0.1/", "</answer>", "do(action=", "action"),
    )
)

TARGETS = {
    target.name: target
    for target in (
        Target(
            "actions", run_actions, seed_actions, ("actions.py",), ACTION_WORDS, most_bytes=16_384
        ),
        Target(
            "gguf",
            run_gguf,
            seed_gguf,
            ("gguf/header.py", "gguf/describe.py", "gguf/groups.py", "gguf/identity.py"),
            GGUF_WORDS,
            mutators.mutate_gguf,
        ),
        Target(
            "safetensors",
            run_safetensors,
            seed_safetensors,
            ("checkpoint/safetensors.py",),
            SAFETENSORS_WORDS,
            mutate_safetensors,
        ),
        Target(
            "requests",
            run_requests,
            seed_requests,
            (
                *("server/protocol.py", "server/asking.py", "server/json_schema.py"),
                *("server/images.py", "server/errors.py"),
            ),
            REQUEST_WORDS,
            mutators.mutate_json,
            most_bytes=16_384,
        ),
    )
}


def blind_changes(target: Target, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """A seed, changed in one to four places without looking at what that does."""
    data = chance.choice(seeds)
    for _ in range(chance.randint(1, 4)):
        changed = None
        if target.mutate is not None and chance.random() < 0.7:
            changed = target.mutate(data, chance)
        data = mutators.mutate_bytes(data, target.words, chance) if changed is None else changed
    return data[: target.most_bytes]
