"""`HybridPolicy`: when an answer of this device is not enough, and what may leave it.

Judges answers by their text and their token probabilities. Knows no cloud and no network.

Judged are actions: answers that are held to the action language, or whose system prompt speaks it.
Free text is not: it has no action to be right or wrong, and is shown as it comes. Nor is thinking
that ``max_thinking_tokens`` ended, since that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoglm_gguf.actions import Launch, find_action, speaks_actions
from autoglm_gguf.config import CONSTRAIN_ACTION, SamplingParams
from autoglm_gguf.errors import ActionParseError
from autoglm_gguf.messages import Completion, Confidence, Message, TokenLogprob


@dataclass(frozen=True, slots=True)
class HybridPolicy:
    """When to ask the cloud.

    Raises:
        ValueError: A value outside its range.
    """

    escalate_below: float = 0.9
    """The cloud is asked when the mean probability of an action's tokens is lower; 0 never asks."""
    escalate_below_lowest: float = 0.0
    """The same for the least probable token of an action."""
    send_images: bool = False
    """Requests with images may leave the device. If not, they stay: they are not sent without."""
    offline: bool = False
    """Nothing leaves the device."""
    n_failures: int = 3
    """Failures of the cloud in a row after which it is left alone."""
    open_s: float = 30.0
    """For so long, seconds; longer where the cloud asks for it."""
    cache_size: int = 64
    """Cloud answers that are kept in memory, for requests of the same content; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("escalate_below", "escalate_below_lowest"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: not in 0..1")
        if self.n_failures < 1:
            raise ValueError(f"n_failures {self.n_failures}: at least 1")
        if not 0 <= self.open_s < math.inf:
            raise ValueError(f"open_s {self.open_s}: not a number of seconds")
        if self.cache_size < 0:
            raise ValueError(f"cache_size {self.cache_size}: at least 0")

    @property
    def reads_probabilities(self) -> bool:
        """Whether token probabilities can make a difference."""
        return self.escalate_below > 0 or self.escalate_below_lowest > 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy thinks of an answer."""

    enough: bool
    reason: str
    confidence: Confidence | None = None


def is_action_request(messages: Sequence[Message], params: SamplingParams) -> bool:
    """Whether the answer is to be an action."""
    if params.constrain is not None:
        return params.constrain == CONSTRAIN_ACTION
    return speaks_actions(messages)


def judge(answer: Completion, policy: HybridPolicy) -> Verdict:
    """Whether an answer that should be an action is good enough, and why."""
    if answer.finish_reason == "cancelled":
        return Verdict(True, "it was cancelled")
    try:
        start, end, _ = find_action(answer.text)
    except ActionParseError:
        cut = ", cut off at max_tokens" if answer.finish_reason == "length" else ""
        return Verdict(False, f"no valid action{cut}")
    confidence = measure_confidence(answer.logprobs, answer.text[start:end])
    if answer.finish_reason == "length":
        return Verdict(False, "the thinking was cut off at max_tokens", confidence)
    if confidence is None:
        return Verdict(True, "a valid action")
    told = f"{confidence.mean:.2f} on average, {confidence.lowest:.2f} at least"
    for value, least, what in (
        (confidence.mean, policy.escalate_below, "on average"),
        (confidence.lowest, policy.escalate_below_lowest, "at one of them"),
    ):
        if value < least:
            reason = f"an unsure action, token probability {value:.2f} {what}, under {least:g}"
            return Verdict(False, reason, confidence)
    return Verdict(True, f"a sure action, token probability {told}", confidence)


def measure_confidence(logprobs: Sequence[TokenLogprob], action: str) -> Confidence | None:
    """How probable the tokens of an action were held.

    Args:
        logprobs: Of the whole answer.
        action: The part of its text that counts. All of it counts where this is not found, as
            when the text shows other bytes than the tokens.

    Returns:
        None without probabilities, or where a constraint left no choice anywhere.
    """
    wanted = action.encode()
    start = b"".join(entry.bytes for entry in logprobs).rfind(wanted)
    span = range(start, start + len(wanted)) if start >= 0 else None
    found, at = list[float](), 0
    for entry in logprobs:
        begin, at = at, at + len(entry.bytes)
        inside = span is None or (begin < span.stop and at > span.start)
        if inside and entry.logprob is not None:
            found.append(math.exp(entry.logprob))
    return Confidence(math.fsum(found) / len(found), min(found), len(found)) if found else None


def check_app(action: object, apps: Sequence[str]) -> str:
    """Why an action may not be taken where apps are listed; empty if it may."""
    if apps and isinstance(action, Launch) and action.app not in apps:
        return f"it launches {action.app!r}, which is not in the list of apps"
    return ""
