"""The model one gets without naming one: autoglm-tiny, converted once into the user's cache."""

from __future__ import annotations

from pathlib import Path

from autoglm_gguf.checkpoint.safetensors import Shards
from autoglm_gguf.conversion.pipeline import ModelPair, convert
from autoglm_gguf.conversion.recipe import parse_outtype
from autoglm_gguf.errors import ConversionError, GGUFError
from autoglm_gguf.gguf.describe import describe_pair
from autoglm_gguf.gguf.names import MMPROJ_PREFIX
from autoglm_gguf.hub import EMBEDDED, cache_directory, embedded_checkpoint
from autoglm_gguf.progress import OnProgress


def default_pair(outtype: str = "q8_0", *, on_progress: OnProgress | None = None) -> ModelPair:
    """The embedded model as a GGUF pair; converted if this version of it is not in the cache.

    Args:
        outtype: See `convert`.
        on_progress: Told only when there is something to convert.

    Raises:
        GGUFError: The installation lacks the embedded checkpoint.
        ConversionError: The cache directory cannot be written.
    """
    checkpoint = embedded_checkpoint()
    with Shards(checkpoint) as shards:
        directory = cache_directory() / f"{EMBEDDED}-{shards.fingerprint}"
    kind = parse_outtype(outtype)
    pair = ModelPair(
        directory / f"{EMBEDDED}-{kind.name.upper()}.gguf",
        directory / f"{MMPROJ_PREFIX}{EMBEDDED}-{kind.mmproj.upper()}.gguf",
    )
    try:
        describe_pair(pair.text, pair.mmproj)
        return pair
    except GGUFError:  # absent, or damaged since
        return _convert(checkpoint, directory, kind.name, name=EMBEDDED, on_progress=on_progress)


def _convert(
    checkpoint: Path, directory: Path, outtype: str, *, name: str, on_progress: OnProgress | None
) -> ModelPair:
    try:
        return convert(checkpoint, directory, outtype, name=name, on_progress=on_progress)
    except ConversionError as error:
        raise ConversionError(
            error.message, hint="set AUTOGLM_GGUF_CACHE to a directory that can be written"
        ) from error
