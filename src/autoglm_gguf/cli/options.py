"""Options that several commands share, and how they become library arguments."""

from __future__ import annotations

import argparse
from typing import Any

from autoglm_gguf.cli import output
from autoglm_gguf.config import CACHE_TYPES, CONTENT_FORMATS, SamplingParams
from autoglm_gguf.session import AutoGLM


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and how it is loaded."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="text GGUF or a directory with one; without it, the embedded autoglm-tiny",
    )
    parser.add_argument("--mmproj", metavar="FILE", help="vision tower (default: beside MODEL)")
    parser.add_argument("--n-ctx", type=int, default=4096, metavar="N", help="context, tokens")
    parser.add_argument(
        "--n-gpu-layers", type=int, default=0, metavar="N", help="layers on the GPU; -1 means all"
    )
    parser.add_argument("--n-threads", type=int, metavar="N", help="default: usable cores")
    parser.add_argument("--type-k", choices=CACHE_TYPES, default="f16", help="K cache type")
    parser.add_argument("--type-v", choices=CACHE_TYPES, default="f16", help="V cache type")
    parser.add_argument(
        "--max-image-tokens", type=int, metavar="N", help="upper bound for one image"
    )
    parser.add_argument(
        "--content-format",
        choices=CONTENT_FORMATS,
        default="openai",
        help="openai: as transformers renders; string: as the official server does",
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """How answers are sampled."""
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 switches it off")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="F")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="F")
    parser.add_argument("--repeat-penalty", type=float, default=1.0, metavar="F")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT")


def sampling_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options as keyword arguments of `AutoGLM.stream`, checked before loading."""
    keys = SamplingParams.__dataclass_fields__
    chosen = {key: getattr(arguments, key) for key in keys}
    chosen["stop"] = tuple(chosen["stop"])
    SamplingParams(**chosen)
    return chosen


def load_model(arguments: argparse.Namespace) -> AutoGLM:
    """Load the model that the options name, or convert and load the embedded one."""
    model, mmproj = arguments.model, arguments.mmproj
    if model is None:
        from autoglm_gguf.embedded import default_pair

        output.note("no MODEL given: using the embedded autoglm-tiny, a toy that shows the way")
        pair = default_pair(on_progress=output.ProgressLine())
        model, mmproj = pair.text, mmproj or pair.mmproj
    loaded = AutoGLM.load(
        model,
        mmproj=mmproj or "auto",
        content_format=arguments.content_format,
        n_ctx=arguments.n_ctx,
        n_gpu_layers=arguments.n_gpu_layers,
        n_threads=arguments.n_threads,
        type_k=arguments.type_k,
        type_v=arguments.type_v,
        max_image_tokens=arguments.max_image_tokens,
    )
    for remark in loaded.info.notes:
        output.note(f"note: {remark}")
    return loaded
