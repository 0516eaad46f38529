"""``config.json`` and its neighbours, as checked values in one shape whatever their age.

RoPE keys live in three places by age: top level of ``text_config``, inside ``rope_scaling``, or
inside ``rope_parameters`` (transformers 5); all three are read. Covers `ARCHITECTURES`; others are
refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autoglm_gguf.errors import CheckpointError, UnsupportedModelError
from autoglm_gguf.gguf.describe import GLM_MAX_PIXELS, GLM_MIN_PIXELS, MOST_PIXELS

# published architecture -> llama.cpp's
ARCHITECTURES = {
    "Glm4vForConditionalGeneration": "glm4",
    "Glm46VForConditionalGeneration": "glm4",
    "Glm4ForCausalLM": "glm4",
    "GlmForCausalLM": "chatglm",
    "ChatGLMModel": "chatglm",
    "ChatGLMForConditionalGeneration": "chatglm",
}
_CHATGLM = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_SIDE = 2**24
_MAX_JSON_BYTES = 256 * 2**20
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "mrope_section", "rope_type", "type")


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=False)


class Rope(_Config):
    """Rotary embedding of the text model."""

    rope_theta: float = Field(default=10000.0, gt=0, lt=1e12)
    partial_rotary_factor: float = Field(default=0.5, gt=0, le=1)
    mrope_section: tuple[int, int, int] | None = None
    """Rotary pairs for time, row and column; None for a model without M-RoPE."""
    rope_type: Literal["default"] = "default"


class TextConfig(_Config):
    """``text_config``, Hugging Face's names."""

    hidden_size: int = Field(gt=0, le=_MAX_SIDE)
    num_hidden_layers: int = Field(gt=0, le=1024)
    num_attention_heads: int = Field(gt=0, le=4096)
    num_key_value_heads: int = Field(gt=0, le=4096)
    intermediate_size: int = Field(gt=0, le=_MAX_SIDE)
    vocab_size: int = Field(gt=0, le=_MAX_SIDE)
    max_position_embeddings: int = Field(default=32768, gt=0, le=2**31 - 1)
    rms_norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    head_dim: int = Field(gt=0, le=65536)
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    rope: Rope
    has_post_norms: bool = True
    """Norms after attention and MLP, besides those before (GLM-4)."""
    naming: Literal["hf", "chatglm"] = "hf"
    """Whose tensor names the shards use."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        data = dict(raw)
        heads, width = data.get("num_attention_heads"), data.get("hidden_size")
        if data.get("num_key_value_heads") is None and heads is not None:
            data["num_key_value_heads"] = heads
        if data.get("head_dim") is None and isinstance(heads, int) and isinstance(width, int):
            data["head_dim"] = width // heads if heads > 0 else 0
        data["rope"] = _gather_rope(data)
        return {key: value for key, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError("head_dim times partial_rotary_factor is not an even number above 0")
        section = self.rope.mrope_section
        if section is not None and 2 * sum(section) != self.rotary_dim:
            raise ValueError(f"mrope_section {section} does not add up to {self.rotary_dim // 2}")
        return self

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that rotate."""
        return int(self.head_dim * self.rope.partial_rotary_factor)


class VisionConfig(_Config):
    """``vision_config``, Hugging Face's names."""

    depth: int = Field(gt=0, le=1024)
    hidden_size: int = Field(gt=0, le=_MAX_SIDE)
    num_heads: int = Field(gt=0, le=4096)
    patch_size: int = Field(default=14, gt=0, le=256)
    image_size: int = Field(default=336, gt=0, le=65536)
    spatial_merge_size: int = Field(default=2, gt=0, le=16)
    temporal_patch_size: Literal[2] = 2
    in_channels: Literal[3] = 3
    out_hidden_size: int = Field(gt=0, le=_MAX_SIDE)
    intermediate_size: int = Field(gt=0, le=_MAX_SIDE)
    """Width of the merger's MLP. The blocks' own MLP is ``out_hidden_size`` wide."""
    rms_norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ValueError("hidden_size is not num_heads times a multiple of 4")
        if self.spatial_merge_size != 2:
            raise ValueError("spatial_merge_size other than 2: llama.cpp's graph has 2 built in")
        return self


class ImageLimits(_Config):
    """``preprocessor_config.json``: how screenshots become pixels."""

    min_pixels: int = Field(default=GLM_MIN_PIXELS, gt=0, le=MOST_PIXELS)
    max_pixels: int = Field(default=GLM_MAX_PIXELS, gt=0, le=MOST_PIXELS)
    """Two frames of width times height, as transformers counts."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        data = {key: value for key, value in raw.items() if value is not None}
        size = data.get("size")
        if isinstance(size, dict):
            data.setdefault("min_pixels", size.get("shortest_edge", GLM_MIN_PIXELS))
            data.setdefault("max_pixels", size.get("longest_edge", GLM_MAX_PIXELS))
        return data

    @model_validator(mode="after")
    def _check(self) -> ImageLimits:
        if self.min_pixels > self.max_pixels:
            raise ValueError("shortest_edge is larger than longest_edge")
        return self


class ModelConfig(_Config):
    """A whole checkpoint's configuration."""

    architecture: str
    gguf_architecture: str
    """llama.cpp's name."""
    text: TextConfig
    vision: VisionConfig | None
    """None for a text-only model."""
    image: ImageLimits
    eos_token_ids: tuple[int, ...]
    """``generation_config.json``'s list; every one of them ends a turn."""


def read_config(directory: Path) -> ModelConfig:
    """Read ``config.json``, ``generation_config.json`` and ``preprocessor_config.json``.

    Raises:
        UnsupportedModelError: Another architecture.
        CheckpointError: A file is missing, is no JSON, or holds impossible values.
    """
    raw = read_json(directory / "config.json")
    architecture = _architecture(raw)
    text = _text_values(raw, architecture)
    vision = raw.get("vision_config") if "text_config" in raw else None
    generation = read_json(directory / "generation_config.json", required=False)
    limits = read_json(directory / "preprocessor_config.json", required=False)
    try:
        config = ModelConfig(
            architecture=architecture,
            gguf_architecture=ARCHITECTURES[architecture],
            text=TextConfig.model_validate(text),
            vision=None if vision is None else VisionConfig.model_validate(vision),
            image=ImageLimits.model_validate(limits),
            eos_token_ids=_eos(generation, text, raw),
        )
    except ValidationError as error:
        first = error.errors()[0]
        is_image = error.title == ImageLimits.__name__
        file = "preprocessor_config.json" if is_image else "config.json"
        place = ".".join(str(part) for part in first["loc"]) or error.title
        raise CheckpointError(
            f"{file}: {place}: {first['msg']} (found {_short(first.get('input'))})",
            hint="download the checkpoint again, or compare its config with the published one",
        ) from None
    width, required = config.vision and config.vision.out_hidden_size, config.text.hidden_size
    if width is not None and width != required:
        raise CheckpointError(
            f"config.json: vision out_hidden_size {width} is not the text model's hidden_size "
            f"{required}"
        )
    return config


def _text_values(raw: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The text model's values under transformers' names, wherever the checkpoint keeps them."""
    if architecture in _CHATGLM:
        return _chatglm_values(raw)
    if not architecture.endswith("ForConditionalGeneration"):
        return {**raw, "has_post_norms": architecture == "Glm4ForCausalLM"}
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError("config.json: no text_config")
    if raw.get("vision_config") is None:
        raise CheckpointError("config.json: no vision_config")
    if "tie_word_embeddings" not in text and "tie_word_embeddings" in raw:
        text = {**text, "tie_word_embeddings": raw["tie_word_embeddings"]}
    return text


def _chatglm_values(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of chatglm3-6b's configuration_chatglm.py under transformers' names."""
    for key, required in (("rmsnorm", True), ("add_bias_linear", False)):
        if raw.get(key, required) != required:
            raise UnsupportedModelError(f"config.json: {key} {raw[key]!r} is not run by llama.cpp")
    heads = raw.get("num_attention_heads")
    grouped = raw.get("multi_query_attention", False)
    ratio = raw.get("rope_ratio", 1.0)
    if not isinstance(ratio, int | float):
        raise CheckpointError(f"config.json: rope_ratio {ratio!r} is no number")
    return {
        "hidden_size": raw.get("hidden_size"),
        "num_hidden_layers": raw.get("num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("multi_query_group_num") if grouped else heads,
        "head_dim": raw.get("kv_channels"),
        "intermediate_size": raw.get("ffn_hidden_size"),
        "vocab_size": raw.get("padded_vocab_size"),
        "max_position_embeddings": raw.get("seq_length"),
        "rms_norm_eps": raw.get("layernorm_epsilon"),
        "attention_bias": bool(raw.get("add_qkv_bias") or raw.get("add_bias_linear")),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "rope_theta": 10000.0 * ratio,
        "eos_token_id": raw.get("eos_token_id"),
        "has_post_norms": False,
        "naming": "chatglm",
    }


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        required: Whether its absence is an error; otherwise an absent file is an empty object.

    Raises:
        CheckpointError: Missing, unreadable, too large, no JSON, or no object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name}: larger than {_MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if not required:
            return {}
        raise CheckpointError(
            f"{path.name}: missing in {path.parent}",
            hint="give the directory that holds config.json and the safetensors shards",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name}: not valid JSON ({error})", hint="download the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: a JSON {type(value).__name__}, not an object")
    return value


def _architecture(raw: dict[str, Any]) -> str:
    listed = raw.get("architectures")
    found = listed[0] if isinstance(listed, list) and listed else None
    if found not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"config.json: unknown architecture (found {found!r}, required "
            f"{' or '.join(ARCHITECTURES)})",
            hint="give a checkpoint such as zai-org/AutoGLM-Phone-9B",
        )
    return str(found)


def _gather_rope(text: dict[str, Any]) -> dict[str, Any]:
    """One place for the rope keys; the newest place wins."""
    found = {key: text[key] for key in _ROPE_KEYS if text.get(key) is not None}
    for place in ("rope_scaling", "rope_parameters"):
        inner = text.get(place)
        if isinstance(inner, dict):
            found.update({key: inner[key] for key in _ROPE_KEYS if inner.get(key) is not None})
    if "type" in found:
        found.setdefault("rope_type", found["type"])
    return found


def _eos(*places: dict[str, Any]) -> tuple[int, ...]:
    """The first eos_token_id found: an id or a list of ids."""
    for place in places:
        value = place.get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value and all(isinstance(i, int) for i in value):
            return tuple(dict.fromkeys(value))
    return ()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
