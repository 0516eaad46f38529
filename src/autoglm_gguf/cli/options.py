"""Options that several commands share, and how they become library arguments."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from autoglm_gguf.cli import output
from autoglm_gguf.config import (
    CACHE_TYPES,
    CONTENT_FORMATS,
    NO_TOKEN_BUDGET,
    ContextParams,
    SamplingParams,
    TokenBudget,
)
from autoglm_gguf.errors import AutoGLMError
from autoglm_gguf.memory.budget import DEFAULT_BUDGET
from autoglm_gguf.memory.offload import ALL, AUTO
from autoglm_gguf.session import AutoGLM


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and how it is loaded and run."""
    add_memory_options(parser)
    parser.add_argument("--n-threads", type=int, metavar="N", help="default: usable cores")
    parser.add_argument(
        "--content-format",
        choices=CONTENT_FORMATS,
        default="openai",
        help="openai: as transformers renders; string: as the official server does",
    )
    add_self_test_option(parser)
    parser.add_argument(
        "--stats", action="store_true", help="tell the memory that was planned and measured"
    )


def add_self_test_option(parser: argparse.ArgumentParser) -> None:
    """Whether a GPU is compared with the CPU."""
    parser.add_argument(
        "--no-self-test",
        dest="self_test",
        action="store_false",
        help="use a GPU without comparing it with the CPU",
    )


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and what decides how much memory it takes; what is not given, the plan chooses."""
    default = ContextParams()
    add_pair_options(parser)
    parser.add_argument(
        "--token-budget",
        type=_token_budget,
        default=NO_TOKEN_BUDGET,
        metavar="PARTS",
        help="shares of the context, such as prompt=6000,image=1024,thinking=400,answer=200",
    )
    parser.add_argument(
        "--n-ctx", type=int, metavar="N", help=f"context, tokens (default: {default.n_ctx})"
    )
    add_place_options(parser)
    parser.add_argument(
        "--n-draft-max",
        type=int,
        metavar="N",
        help="tokens that an answer may guess from its prompt and evaluate in one batch, where "
        f"that is faster; 0: none (default: {default.n_draft_max})",
    )


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, its tower, and the budget."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="text GGUF or a directory with one; without it, the embedded autoglm-tiny",
    )
    parser.add_argument("--mmproj", metavar="FILE", help="vision tower (default: beside MODEL)")
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        default=DEFAULT_BUDGET,
        help="for everything the process holds, such as 4GB, 4GiB or none (default: %(default)s)",
    )


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Batch, GPU, types of the KV cache, image size."""
    default = ContextParams()
    add = partial(parser.add_argument, default=None)
    add("--n-batch", type=int, metavar="N", help=f"tokens a batch (default: {default.n_batch})")
    add(
        "--n-gpu-layers",
        type=_gpu_layers,
        metavar="N",
        help="layers on the GPU: a number, all, or auto: as many as fit (default: auto)",
    )
    add("--device", metavar="NAME", help="the GPU, as doctor lists it (default: the best)")
    add(
        "--no-kv-offload",
        dest="offload_kqv",
        action="store_false",
        help="keep the KV cache in main memory",
    )
    add(
        "--mmproj-offload",
        action=argparse.BooleanOptionalAction,
        help="run the vision tower on the GPU (default: yes, but for Vulkan)",
    )
    add("--type-k", choices=CACHE_TYPES, help=f"K cache type (default: {default.type_k})")
    add("--type-v", choices=CACHE_TYPES, help=f"V cache type (default: {default.type_v})")
    add(
        "--max-image-tokens",
        type=int,
        metavar="N",
        help="upper bound for one image (default: the model's own)",
    )


def _gpu_layers(text: str) -> int | str:
    if text in (AUTO, ALL):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: neither a number nor auto nor all") from None


def _token_budget(text: str) -> TokenBudget:
    names = TokenBudget.__dataclass_fields__
    try:
        parts = [part.partition("=") for part in text.split(",")]
        given = {name.strip(): int(value) for name, _, value in parts}
        if len(given) < len(parts):
            raise ValueError("budget parts are given once each")
        return TokenBudget(**given)
    except TypeError:
        hint = f"parts are {', '.join(names)}"
    except ValueError as error:
        hint = str(error) if "budget" in str(error) else "each part is a name, = and a number"
    raise argparse.ArgumentTypeError(f"{text!r}: {hint}")


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """How answers are sampled."""
    default = SamplingParams()
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help="of the answer at most (default: %(default)s)",
    )
    parser.add_argument(
        "--max-thinking-tokens", type=int, metavar="N", help="then the answer is begun for it"
    )
    parser.add_argument(
        "--temperature", type=float, default=default.temperature, metavar="T", help="0 is greedy"
    )
    add = parser.add_argument
    add("--top-p", type=float, default=default.top_p, metavar="P", help="default: 1, off")
    add("--top-k", type=int, default=default.top_k, metavar="K", help="0 switches it off")
    add("--min-p", type=float, default=default.min_p, metavar="P", help="default: 0, off")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: a fresh one)")
    for name in ("frequency_penalty", "presence_penalty", "repeat_penalty"):
        off: float = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=off,
            metavar="F",
            help=f"over generated tokens (default: {off:g}, off)",
        )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the answer and is not part of it; may be given several times",
    )
    parser.add_argument(
        "--no-cache-prompt",
        action="store_false",
        dest="cache_prompt",
        help="evaluate the whole prompt each time, also what the KV cache holds of it",
    )
    parser.add_argument(
        "--n-draft",
        type=int,
        metavar="N",
        help="guess so many tokens wherever the text repeats itself (default: as many as pay)",
    )
    parser.add_argument(
        "--apps", metavar="FILE", help="names that Launch may open, one a line; others cannot come"
    )


def sampling_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options as keyword arguments of `AutoGLM.stream`, checked before loading."""
    others = ("apps", "logprobs", "top_logprobs")  # a file; for programs only
    keys = [key for key in SamplingParams.__dataclass_fields__ if key not in others]
    chosen = {key: getattr(arguments, key) for key in keys}
    if arguments.apps is not None:
        lines = _read_text(arguments.apps).splitlines()
        chosen["apps"] = [line.strip() for line in lines if line.strip()]
        if not chosen["apps"]:
            raise ValueError(f"--apps {arguments.apps}: holds no names (write one a line)")
    SamplingParams.of(**chosen)
    return chosen


def read_schema(path: str) -> dict[str, Any]:
    """A JSON schema from a file, as a type for argparse."""
    try:
        schema = json.loads(_read_text(path))
    except AutoGLMError as error:
        raise argparse.ArgumentTypeError(error.message) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path}: not JSON ({error})") from error
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError(f"{path}: not a JSON schema (no object)")
    return schema


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8-sig")  # Windows' editors put a mark first
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AutoGLMError(f"{path}: cannot be read ({reason})", hint="check the path") from error


def memory_arguments(arguments: argparse.Namespace, *, with_images: bool = True) -> dict[str, Any]:
    """The memory options as keyword arguments of `plan_memory`: only the sizes that were given."""
    given = _given(arguments, "n_ctx", "n_draft_max") | place_arguments(arguments)
    sizes = arguments.token_budget.sizes(with_images=with_images)
    return {"memory_budget": arguments.memory_budget, **sizes, **given}


def place_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_place_options` describes, as fields of `ContextParams`: only what was given."""
    return _given(
        arguments,
        *("n_batch", "n_gpu_layers", "device", "offload_kqv", "mmproj_offload"),
        *("type_k", "type_v", "max_image_tokens"),
    )


def _given(arguments: argparse.Namespace, *keys: str) -> dict[str, Any]:
    chosen = {key: getattr(arguments, key) for key in keys}
    return {key: value for key, value in chosen.items() if value is not None}


def find_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and mmproj that the options name, or the embedded pair, converted if need be."""
    model, mmproj = arguments.model, arguments.mmproj
    if model is None:
        from autoglm_gguf.embedded import default_pair

        output.note("no MODEL given: using the embedded autoglm-tiny, a toy that shows the way")
        pair = default_pair(on_progress=output.ProgressLine())
        model, mmproj = pair.text, mmproj or pair.mmproj
    return model, mmproj or "auto"


def load_model(arguments: argparse.Namespace, *, reserved_bytes: int = 0) -> AutoGLM:
    """Load the model that the options name, or convert and load the embedded one.

    Args:
        arguments: As parsed.
        reserved_bytes: See `AutoGLM.load`.
    """
    model, mmproj = find_model(arguments)
    given = memory_arguments(arguments)
    if arguments.n_threads is not None:
        given["n_threads"] = arguments.n_threads
    loaded = AutoGLM.load(
        model,
        mmproj=mmproj,
        content_format=arguments.content_format,
        token_budget=arguments.token_budget,
        self_test=arguments.self_test,
        reserved_bytes=reserved_bytes,
        **given,
    )
    for remark in loaded.info.notes:
        output.note(f"note: {remark}")
    return loaded
