"""autoglm-gguf: AutoGLM on your own device.

Public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoglm_gguf.actions import Action, parse_answer
    from autoglm_gguf.config import ContextParams, SamplingParams, TokenBudget
    from autoglm_gguf.conversation import ChatSession
    from autoglm_gguf.conversion.fit import Fit
    from autoglm_gguf.conversion.pipeline import ModelPair, convert
    from autoglm_gguf.embedded import default_pair
    from autoglm_gguf.errors import (
        ActionParseError,
        AutoGLMError,
        BenchError,
        CheckpointError,
        CloudError,
        ContextFullError,
        ConversionError,
        DoesNotFitError,
        EngineBusyError,
        EngineError,
        EvaluationError,
        GGUFError,
        HubError,
        ImageError,
        NativeLibraryError,
        PairMismatchError,
        PromptError,
        SavedSessionError,
        ServerError,
        UnsupportedModelError,
        VerificationError,
    )
    from autoglm_gguf.evaluate.calibration import Calibration, calibrate
    from autoglm_gguf.evaluate.passages import Corpus
    from autoglm_gguf.evaluate.perplexity import (
        Divergence,
        Perplexity,
        evaluate_divergence,
        evaluate_perplexity,
    )
    from autoglm_gguf.gguf.header import Header, TensorInfo, read_header
    from autoglm_gguf.hub import pull
    from autoglm_gguf.hybrid.client import HybridClient
    from autoglm_gguf.hybrid.cloud import CloudModel
    from autoglm_gguf.hybrid.policy import HybridPolicy
    from autoglm_gguf.memory.measure import MemoryUsage, measure_memory
    from autoglm_gguf.memory.plan import MemoryPlan, plan_memory
    from autoglm_gguf.messages import (
        Chunk,
        Completion,
        Confidence,
        ImagePart,
        Message,
        Route,
        TextPart,
        Timings,
        TokenLogprob,
        Usage,
    )
    from autoglm_gguf.progress import Progress
    from autoglm_gguf.saved_session import SavedSession
    from autoglm_gguf.session import AutoGLM, Step

__version__ = "0.1.0"

_HOMES = {
    "actions": ("Action", "parse_answer"),
    "config": ("ContextParams", "SamplingParams", "TokenBudget"),
    "conversation": ("ChatSession",),
    "conversion.fit": ("Fit",),
    "conversion.pipeline": ("ModelPair", "convert"),
    "embedded": ("default_pair",),
    "errors": (
        "ActionParseError",
        "AutoGLMError",
        "BenchError",
        "CheckpointError",
        "CloudError",
        "ContextFullError",
        "ConversionError",
        "DoesNotFitError",
        "EngineBusyError",
        "EngineError",
        "EvaluationError",
        "GGUFError",
        "HubError",
        "ImageError",
        "NativeLibraryError",
        "PairMismatchError",
        "PromptError",
        "SavedSessionError",
        "ServerError",
        "UnsupportedModelError",
        "VerificationError",
    ),
    "evaluate.calibration": ("Calibration", "calibrate"),
    "evaluate.passages": ("Corpus",),
    "evaluate.perplexity": (
        *("Divergence", "Perplexity", "evaluate_divergence", "evaluate_perplexity"),
    ),
    "gguf.header": ("Header", "TensorInfo", "read_header"),
    "hub": ("pull",),
    "hybrid.client": ("HybridClient",),
    "hybrid.cloud": ("CloudModel",),
    "hybrid.policy": ("HybridPolicy",),
    "memory.measure": ("MemoryUsage", "measure_memory"),
    "memory.plan": ("MemoryPlan", "plan_memory"),
    "messages": (
        *("Chunk", "Completion", "Confidence", "ImagePart", "Message", "Route", "TextPart"),
        *("Timings", "TokenLogprob", "Usage"),
    ),
    "progress": ("Progress",),
    "saved_session": ("SavedSession",),
    "session": ("AutoGLM", "Step"),
}
_HOME = {name: home for home, listed in _HOMES.items() for name in listed}

__all__ = [
    "Action",
    "ActionParseError",
    "AutoGLM",
    "AutoGLMError",
    "BenchError",
    "Calibration",
    "ChatSession",
    "CheckpointError",
    "Chunk",
    "CloudError",
    "CloudModel",
    "Completion",
    "Confidence",
    "ContextFullError",
    "ContextParams",
    "ConversionError",
    "Corpus",
    "Divergence",
    "DoesNotFitError",
    "EngineBusyError",
    "EngineError",
    "EvaluationError",
    "Fit",
    "GGUFError",
    "Header",
    "HubError",
    "HybridClient",
    "HybridPolicy",
    "ImageError",
    "ImagePart",
    "MemoryPlan",
    "MemoryUsage",
    "Message",
    "ModelPair",
    "NativeLibraryError",
    "PairMismatchError",
    "Perplexity",
    "Progress",
    "PromptError",
    "Route",
    "SamplingParams",
    "SavedSession",
    "SavedSessionError",
    "ServerError",
    "Step",
    "TensorInfo",
    "TextPart",
    "Timings",
    "TokenBudget",
    "TokenLogprob",
    "UnsupportedModelError",
    "Usage",
    "VerificationError",
    "__version__",
    "calibrate",
    "convert",
    "default_pair",
    "evaluate_divergence",
    "evaluate_perplexity",
    "measure_memory",
    "parse_answer",
    "plan_memory",
    "pull",
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
