"""The keys of both GGUF files, written with gguf-py's writer. No tensor data passes here.

Stop tokens: llama.cpp takes one eos, one eot and one eom id and finds ``<|endoftext|>`` by its
text, so ``</answer>``, ``<|user|>`` and ``<|observation|>`` go there and stock programs stop at all
four; the whole list is kept in a key of our own.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf

from autoglm_gguf.checkpoint.config import ModelConfig
from autoglm_gguf.checkpoint.tokenizer import Vocabulary
from autoglm_gguf.conversion.recipe import Outtype
from autoglm_gguf.conversion.tensors import OutTensor
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.header import Header, read_header

logger = logging.getLogger(__name__)
_QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION


def write_text_header(
    path: Path,
    name: str,
    fingerprint: str,
    config: ModelConfig,
    vocabulary: Vocabulary,
    outtype: Outtype,
    tensors: list[OutTensor],
    more: Mapping[str, int | float | str] | None = None,
) -> None:
    """Write the text GGUF up to its tensor table; ``more`` are further keys."""
    text = config.text
    with _writer(path, config.gguf_architecture, name, fingerprint, outtype, tensors) as writer:
        writer.add_type("model")
        writer.add_block_count(text.num_hidden_layers)
        writer.add_context_length(text.max_position_embeddings)
        writer.add_embedding_length(text.hidden_size)
        writer.add_feed_forward_length(_ffn_width(tensors, text.intermediate_size))
        writer.add_head_count(text.num_attention_heads)
        writer.add_head_count_kv(text.num_key_value_heads)
        writer.add_key_length(text.head_dim)
        writer.add_value_length(text.head_dim)
        writer.add_layer_norm_rms_eps(text.rms_norm_eps)
        writer.add_vocab_size(text.vocab_size)
        writer.add_rope_freq_base(text.rope.rope_theta)
        writer.add_rope_dimension_count(text.rotary_dim)
        if text.rope.mrope_section is not None:
            writer.add_rope_dimension_sections([*text.rope.mrope_section, 0])
        _add_vocabulary(writer, config, vocabulary)
        for key, value in (more or {}).items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float64(key, value)
            else:
                writer.add_uint64(key, value)


def write_mmproj_header(
    path: Path,
    name: str,
    fingerprint: str,
    config: ModelConfig,
    outtype: Outtype,
    tensors: list[OutTensor],
) -> None:
    """Write the mmproj GGUF up to its tensor table."""
    vision, image = config.vision, config.image
    if vision is None:
        raise ValueError("config: a text-only model has no mmproj")
    with _writer(path, "clip", name, fingerprint, outtype, tensors) as writer:
        writer.add_type("mmproj")
        writer.add_clip_projector_type(names.PROJECTOR_GLM4V)
        writer.add_clip_has_vision_encoder(True)
        writer.add_vision_use_silu(True)
        writer.add_vision_projection_dim(vision.out_hidden_size)
        writer.add_vision_image_size(vision.image_size)
        writer.add_vision_patch_size(vision.patch_size)
        writer.add_vision_embedding_length(vision.hidden_size)
        writer.add_vision_feed_forward_length(vision.out_hidden_size)
        writer.add_vision_block_count(vision.depth)
        writer.add_vision_head_count(vision.num_heads)
        writer.add_vision_attention_layernorm_eps(vision.rms_norm_eps)
        writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
        writer.add_vision_image_mean(list(image.image_mean))
        writer.add_vision_image_std(list(image.image_std))
        writer.add_uint64(names.MIN_PIXELS, image.min_pixels)
        writer.add_uint64(names.MAX_PIXELS, image.max_pixels)
        writer.add_uint32(names.MERGE_SIZE, vision.spatial_merge_size)


def read_back(write: Callable[[Path, list[OutTensor]], None]) -> Header:
    """The keys that a file will have, without any tensor; nothing stays on the disk.

    Args:
        write: Writes the header of a file with these tensors.
    """
    with tempfile.TemporaryDirectory(prefix="autoglm-gguf-") as directory:
        path = Path(directory) / "keys.gguf"
        write(path, [])
        return read_header(path)


def _ffn_width(tensors: list[OutTensor], published: int) -> int:
    """The feed-forward width in the file: the published one, or what it was padded to."""
    widths = {t.n_per_row for t in tensors if t.name.endswith("ffn_down.weight")}
    return widths.pop() if len(widths) == 1 else published


@contextlib.contextmanager
def _writer(
    path: Path,
    arch: str,
    name: str,
    fingerprint: str,
    outtype: Outtype,
    tensors: list[OutTensor],
) -> Iterator[gguf.GGUFWriter]:
    writer = gguf.GGUFWriter(path, arch)
    try:
        writer.add_name(name)
        writer.add_file_type(outtype.ftype)
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        writer.add_string(names.SOURCE_ID, fingerprint)
        yield writer
        for t in tensors:
            kind = gguf.GGMLQuantizationType(int(t.ggml_type))
            writer.add_tensor_info(t.name, t.shape, None, t.n_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, config: ModelConfig, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.token_types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
    stops = tuple(dict.fromkeys((*config.eos_token_ids, *vocabulary.extra_stop_ids)))
    for key, token_id in place_stop_tokens(stops, vocabulary.ids).items():
        writer.add_uint32(key, token_id)
    if stops:
        writer.add_array(names.EOS_IDS, list(stops))
    writer.add_add_bos_token(False)  # the template writes [gMASK]<sop> itself
    end = vocabulary.ids.get("<|endoftext|>")
    if end is not None:
        writer.add_pad_token_id(end)
        # Never added to a prompt, but llama-cpp-python's image handler asks for its text, which
        # ends the process where there is none. Upstream's converter names the same token.
        writer.add_bos_token_id(end)


def place_stop_tokens(eos_ids: tuple[int, ...], ids: dict[str, int]) -> dict[str, int]:
    """Put a stop list into the three places stock llama.cpp has.

    Args:
        eos_ids: ``generation_config.json``'s list.
        ids: Token to id.

    Returns:
        GGUF key to id. ``<|endoftext|>`` takes a place only if one is left, since llama.cpp knows
        it by its text; ids beyond the places are logged as a warning.
    """
    known_by_text = ids.get("<|endoftext|>")
    preferred = {
        names.EOS_ID: "</answer>",
        names.EOT_ID: "<|user|>",
        names.EOM_ID: "<|observation|>",
    }
    placed = {key: ids[token] for key, token in preferred.items() if ids.get(token) in eos_ids}
    rest = [i for i in eos_ids if i not in placed.values() and i != known_by_text]
    if known_by_text is not None and known_by_text in eos_ids:
        rest.append(known_by_text)
    for key in preferred:
        if key not in placed and rest:
            placed[key] = rest.pop(0)
    left = [i for i in rest if i != known_by_text]
    if left:
        logger.warning(
            "stop tokens %s have no place in stock llama.cpp; this package keeps them", left
        )
    return placed
