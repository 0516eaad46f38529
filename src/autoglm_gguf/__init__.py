"""autoglm-gguf: AutoGLM on your own device.

Public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoglm_gguf.actions import Action, parse_answer
    from autoglm_gguf.config import ContextParams, SamplingParams
    from autoglm_gguf.conversion.pipeline import ModelPair, convert
    from autoglm_gguf.conversion.writer import Progress
    from autoglm_gguf.embedded import default_pair
    from autoglm_gguf.errors import (
        ActionParseError,
        AutoGLMError,
        CheckpointError,
        ContextFullError,
        ConversionError,
        EngineBusyError,
        EngineError,
        GGUFError,
        ImageError,
        NativeLibraryError,
        PairMismatchError,
        PromptError,
        UnsupportedModelError,
    )
    from autoglm_gguf.gguf.header import Header, TensorInfo, read_header
    from autoglm_gguf.messages import (
        Chunk,
        Completion,
        ImagePart,
        Message,
        TextPart,
        Timings,
        Usage,
    )
    from autoglm_gguf.session import AutoGLM, ChatSession, Step

__version__ = "0.1.0"

_HOMES = {
    "actions": ("Action", "parse_answer"),
    "config": ("ContextParams", "SamplingParams"),
    "conversion.pipeline": ("ModelPair", "convert"),
    "conversion.writer": ("Progress",),
    "embedded": ("default_pair",),
    "errors": (
        "ActionParseError",
        "AutoGLMError",
        "CheckpointError",
        "ContextFullError",
        "ConversionError",
        "EngineBusyError",
        "EngineError",
        "GGUFError",
        "ImageError",
        "NativeLibraryError",
        "PairMismatchError",
        "PromptError",
        "UnsupportedModelError",
    ),
    "gguf.header": ("Header", "TensorInfo", "read_header"),
    "messages": ("Chunk", "Completion", "ImagePart", "Message", "TextPart", "Timings", "Usage"),
    "session": ("AutoGLM", "ChatSession", "Step"),
}
_HOME = {name: home for home, listed in _HOMES.items() for name in listed}

__all__ = [
    "Action",
    "ActionParseError",
    "AutoGLM",
    "AutoGLMError",
    "ChatSession",
    "CheckpointError",
    "Chunk",
    "Completion",
    "ContextFullError",
    "ContextParams",
    "ConversionError",
    "EngineBusyError",
    "EngineError",
    "GGUFError",
    "Header",
    "ImageError",
    "ImagePart",
    "Message",
    "ModelPair",
    "NativeLibraryError",
    "PairMismatchError",
    "Progress",
    "PromptError",
    "SamplingParams",
    "Step",
    "TensorInfo",
    "TextPart",
    "Timings",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "convert",
    "default_pair",
    "parse_answer",
    "read_header",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
