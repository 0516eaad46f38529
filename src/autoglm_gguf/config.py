"""Frozen parameter sets, in llama.cpp's words. Values only; no defaults chosen from the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

CacheType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
ContentFormat: TypeAlias = Literal["openai", "string"]
CACHE_TYPES: tuple[CacheType, ...] = ("f32", "f16", "bf16", "q8_0", "q4_0")
CONTENT_FORMATS: tuple[ContentFormat, ...] = ("openai", "string")
CONSTRAIN_ACTION = "action"
MAX_APP_CHARS = 100  # of a name; a phone shows fewer than 20
MAX_TOP_LOGPROBS = 20  # OpenAI's
MAX_DRAFT = 63  # a batch with more logits than that would be the largest thing held
MAX_SEED = 2**32 - 2  # llama.cpp takes 0xFFFFFFFF for "draw one"


@dataclass(frozen=True, slots=True)
class ContextParams:
    """How a model is held and run.

    Raises:
        ValueError: A value outside its range.
    """

    n_ctx: int = 4096
    """KV cells: text tokens plus image tokens, prompt plus answer."""
    n_gpu_layers: int = 0
    """Layers placed on the GPU, the last ones first, the output counted as one; -1 means all."""
    device: str | None = None
    """The GPU, or several with commas, by ggml's names; None takes what is best."""
    offload_kqv: bool = True
    """The KV cache of layers on the GPU lies there too."""
    mmproj_offload: bool | None = None
    """The vision tower runs on the GPU; None leaves it off Vulkan, where it is not trusted."""
    n_threads: int | None = None
    """Compute threads; None takes the number of usable cores."""
    n_batch: int = 512
    """Tokens per decode call."""
    type_k: CacheType = "f16"
    type_v: CacheType = "f16"
    flash_attn: bool = True
    """Fused attention. A quantised V cache needs it."""
    max_image_tokens: int | None = None
    """Upper bound for one image; None leaves the model's own."""
    n_draft_max: int = 7
    """Tokens that an answer may guess from its prompt and evaluate beside a sampled one; logits are
    kept of each. 0: guesses none. A batch holds at least one more."""

    n_outputs: int | None = None
    """Tokens of a batch whose logits may be read, for those who measure; None: as many as drafts
    need. Each takes eight bytes per token of the vocabulary."""

    @property
    def n_outputs_max(self) -> int:
        """Tokens of a batch whose logits may be read."""
        wanted = 1 + self.n_draft_max if self.n_outputs is None else self.n_outputs
        return min(wanted, self.n_batch, self.n_ctx)

    def __post_init__(self) -> None:
        _check_ints(self, "n_threads", "max_image_tokens", "n_outputs")
        _check_ints(self, "n_ctx", "n_gpu_layers", "n_batch", "n_draft_max", may_be_none=False)
        for name, flag in (("flash_attn", self.flash_attn), ("offload_kqv", self.offload_kqv)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} {flag!r}: not True or False")
        if not (self.mmproj_offload is None or isinstance(self.mmproj_offload, bool)):
            raise TypeError(f"mmproj_offload {self.mmproj_offload!r}: not True, False or None")
        if not (self.device is None or isinstance(self.device, str)):
            raise TypeError(f"device {self.device!r}: not a name")
        if not 8 <= self.n_ctx <= 2**20:
            raise ValueError(f"n_ctx {self.n_ctx}: not in 8..{2**20}")
        if not -1 <= self.n_gpu_layers <= 10_000:
            raise ValueError(f"n_gpu_layers {self.n_gpu_layers}: not in -1..10000 (-1 means all)")
        if self.n_threads is not None and not 1 <= self.n_threads <= 512:
            raise ValueError(f"n_threads {self.n_threads}: not in 1..512")
        if not 1 <= self.n_batch <= 16384:
            raise ValueError(f"n_batch {self.n_batch}: not in 1..16384")
        if not 0 <= self.n_draft_max <= MAX_DRAFT:
            raise ValueError(f"n_draft_max {self.n_draft_max}: not in 0..{MAX_DRAFT}")
        if self.n_outputs is not None and self.n_outputs < 1:
            raise ValueError(f"n_outputs {self.n_outputs}: at least 1")
        for name, value in (("type_k", self.type_k), ("type_v", self.type_v)):
            if value not in CACHE_TYPES:
                raise ValueError(f"{name} {value!r}: not one of {', '.join(CACHE_TYPES)}")
        if self.type_v in ("q8_0", "q4_0") and not self.flash_attn:
            raise ValueError(f"type_v {self.type_v!r}: a quantised V cache needs flash_attn=True")
        if self.max_image_tokens is not None and self.max_image_tokens < 16:
            raise ValueError(f"max_image_tokens {self.max_image_tokens}: at least 16")


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """How a context is shared out: for what each part may take, n_ctx has room.

    Raises:
        ValueError: A value outside its range.
    """

    prompt: int | None = None
    """KV cells of a prompt without its last message's images. The oldest turns of a longer history
    are left out, never the system prompt or the last message. None: what n_ctx leaves."""
    image: int | None = None
    """Image tokens of one image; a larger one is made smaller. None: the model's own limit."""
    thinking: int | None = None
    """Tokens before the answer: then ``</think>`` is said for the model and the answer begun."""
    answer: int | None = None
    """Tokens kept for the answer after the thinking."""

    def __post_init__(self) -> None:
        _check_ints(self, "prompt", "image", "thinking", "answer")
        for name, least in (("prompt", 1), ("image", 16), ("thinking", 1), ("answer", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"token budget, {name} {value}: at least {least}")

    def sizes(self, *, with_images: bool = True) -> dict[str, int]:
        """Fields of `ContextParams` that follow: max_image_tokens, and n_ctx where all is bounded.

        Args:
            with_images: Images may come; where their size is not bounded, n_ctx is not either.
        """
        found: dict[str, int] = {}
        bounded = self.image is not None or not with_images
        if self.prompt is not None and self.answer is not None and bounded:
            found["n_ctx"] = max(8, self.prompt + (self.image or 0) + self.n_generated)
        if self.image is not None:
            found["max_image_tokens"] = self.image
        return found

    @property
    def n_generated(self) -> int:
        """Tokens that may be generated, as far as they are given; 0 if none is."""
        return (self.thinking or 0) + (self.answer or 0)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen: the official server's rules (vLLM's), in its order.

    repeat_penalty, frequency_penalty, presence_penalty; then the best at temperature 0, else
    temperature, min_p, top_k, top_p and a draw. All penalties count the generated tokens and no
    others; vLLM's repetition_penalty alone counts the prompt too.

    Raises:
        ValueError: A value outside its range.
    """

    max_tokens: int | None = None
    """Tokens to generate at most; None fills the context."""
    max_thinking_tokens: int | None = None
    """Of these, before ``</think>`` or the action: then the thinking is closed and ``<answer>``
    begun. Text that is not marked as thinking is none, but in an answer held to an action."""
    temperature: float = 0.0
    """0 takes the most probable token, whatever the filters; so does less than 1e-5."""
    top_p: float = 1.0
    top_k: int = 0
    """0 switches it off."""
    min_p: float = 0.0
    seed: int | None = None
    """None draws a fresh one."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    constrain: str | Mapping[str, Any] | None = None
    """``"action"``: thinking, then one action of the client's grammar and nothing after it. A JSON
    schema: a document that it describes, from the first token on. None leaves answers free."""
    apps: tuple[str, ...] = ()
    """With ``constrain="action"``, the only names that ``Launch`` may open; empty: any."""
    n_draft: int | None = None
    """Tokens to guess from the prompt and evaluate in one batch, where the text repeats itself;
    n_draft_max at most. The answer stays the same, but where tokens are all but equally likely.
    None: as many as the clock says pay, and none with ``cache_prompt=False``. 0: none."""
    cache_prompt: bool = True
    """Take from the KV cache what it holds of the prompt. False evaluates all of it, in batches cut
    as the first time: to the last bit the answer of a fresh session."""
    logprobs: bool = False
    """Report how probable the model held each token; see `TokenLogprob`."""
    top_logprobs: int = 0
    """With ``logprobs``, how many of the most probable tokens to list beside it: 0..20."""

    @classmethod
    def of(cls, **values: Any) -> SamplingParams:
        """From values as callers give them: stop may be one string, stop and apps lists.

        Raises:
            ValueError, TypeError: A value outside its range, or unknown.
        """
        if isinstance(values.get("stop"), str):
            values["stop"] = (values["stop"],)
        lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
        return cls(**{**values, **lists})

    def __post_init__(self) -> None:
        if self.constrain not in (None, CONSTRAIN_ACTION) and not isinstance(
            self.constrain, Mapping
        ):
            raise ValueError(
                f"constrain {self.constrain!r}: not {CONSTRAIN_ACTION!r}, a JSON schema or None"
            )
        if not _are_strings(self.apps) or (self.apps and self.constrain != CONSTRAIN_ACTION):
            raise ValueError("apps: names that are not empty, with constrain='action'")
        longest = max(map(len, self.apps), default=0)
        if longest > MAX_APP_CHARS:
            raise ValueError(f"apps: a name of {longest} characters, {MAX_APP_CHARS} at most")
        if not isinstance(self.cache_prompt, bool):
            raise TypeError(f"cache_prompt {self.cache_prompt!r}: not True or False")
        _check_ints(self, "max_tokens", "max_thinking_tokens", "n_draft", "top_k", "seed")
        if self.n_draft is not None and not 0 <= self.n_draft <= MAX_DRAFT:
            raise ValueError(f"n_draft {self.n_draft}: not in 0..{MAX_DRAFT}")
        if self.max_thinking_tokens is not None and self.max_thinking_tokens < 1:
            raise ValueError(f"max_thinking_tokens {self.max_thinking_tokens}: at least 1")
        if not isinstance(self.logprobs, bool):
            raise TypeError(f"logprobs {self.logprobs!r}: not True or False")
        _check_ints(self, "top_logprobs", may_be_none=False)
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs {self.top_logprobs}: not in 0..{MAX_TOP_LOGPROBS}")
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs {self.top_logprobs}: needs logprobs=True")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens}: at least 1")
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("repeat_penalty", self.repeat_penalty, 0.01, 10.0)
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: at least 0 (0 switches it off)")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed {self.seed}: not in 0..{MAX_SEED}")
        if not _are_strings(self.stop):
            raise ValueError("stop: a tuple of strings that are not empty")


def _are_strings(values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(s, str) and s for s in values)


def _check_ints(values: object, *fields: str, may_be_none: bool = True) -> None:
    for field in fields:
        value = getattr(values, field)
        if value is None and may_be_none:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{field} {value!r}: not an int")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} {value!r}: not a number")
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} {value}: not in {low:g}..{high:g}")


NO_TOKEN_BUDGET = TokenBudget()
