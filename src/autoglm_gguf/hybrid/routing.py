"""`Routing`: the way of one request between device and cloud, and the words for it.

A state machine without I/O: it is told what came, and says what is to be shown and whom to ask.
`HybridClient` carries it out, for threads and for event loops alike.

An answer that the cloud may replace is held back until it was judged; nothing that was shown is
ever taken back. All other answers pass as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoglm_gguf.actions import find_action
from autoglm_gguf.config import CONSTRAIN_ACTION, SamplingParams
from autoglm_gguf.errors import (
    ActionParseError,
    AutoGLMError,
    CloudError,
    ContextFullError,
    DoesNotFitError,
    ImageError,
)
from autoglm_gguf.hybrid.breaker import CircuitBreaker
from autoglm_gguf.hybrid.cache import AnswerCache
from autoglm_gguf.hybrid.cloud import CloudModel
from autoglm_gguf.hybrid.policy import HybridPolicy, check_app, is_action_request, judge
from autoglm_gguf.messages import (
    Chunk,
    Completion,
    Confidence,
    ImagePart,
    Message,
    Route,
    Timings,
    collect,
)

REFUSALS = (ContextFullError, DoesNotFitError, ImageError)
"""What a model on the device raises when a request exceeds it."""
_BAD_REQUEST = (400, 413, 422)
"""Refusals of one request, which say nothing about the next."""


@dataclass(frozen=True, slots=True)
class Ends:
    """What all requests of a `HybridClient` share."""

    local_name: str
    cloud: CloudModel | None
    policy: HybridPolicy
    breaker: CircuitBreaker
    cache: AnswerCache


class Routing:
    """One request.

    Args:
        ends: Device and cloud.
        messages: The conversation; None for a raw prompt.
        params: As the caller gave them.
    """

    def __init__(
        self, ends: Ends, messages: Sequence[Message] | None, params: SamplingParams
    ) -> None:
        self._ends, self._messages, self._params = ends, messages or (), params
        self._is_action = is_action_request(self._messages, params)
        self._forbidden = self._find_obstacle(is_raw=messages is None)
        self._obstacle = self._forbidden or ends.breaker.obstacle()
        self._held = self._is_action and not self._obstacle
        self._kept: list[Chunk] = []
        self._heard: list[Chunk] = []
        self._shown = self._entered = False
        self._body = b""
        self._refusal: AutoGLMError | None = None
        self._confidence: Confidence | None = None
        self._reason = self._obstacle or "the device answers first, and only actions are judged"
        self.wants_cloud = False
        """The cloud is to be asked: `enter` next."""

    def _find_obstacle(self, *, is_raw: bool) -> str:
        """Why this request may not leave the device; empty if it may."""
        ends = self._ends
        if ends.cloud is None:
            return "no cloud is configured"
        if ends.policy.offline:
            return "offline: nothing may leave the device"
        if is_raw:
            return "a raw prompt has no messages that a cloud could be sent"
        contents = [m.content for m in self._messages if not isinstance(m.content, str)]
        if not ends.policy.send_images and any(
            isinstance(part, ImagePart) for content in contents for part in content
        ):
            return "its images may not leave the device (send_images, --cloud-images)"
        return ""

    def body(self) -> bytes:
        """The request as the cloud gets it.

        Raises:
            ImageError: An image that cannot be read.
        """
        if not self._body:
            assert self._ends.cloud is not None
            self._body = self._ends.cloud.build_body(self._messages, self._params)
        return self._body

    # --- an answer of before ---

    def find_cached(self) -> list[Chunk]:
        """The cloud's answer to an earlier request of the same content; empty if there is none."""
        if self._forbidden or not self._can_be_cached or not len(self._ends.cache):
            return []
        try:
            answer = self._ends.cache.find(self.body())
        except ImageError:  # for the device to tell
            return []
        if answer is None or answer.route is None:
            return []
        return [_whole(replace(answer, timings=Timings()), replace(answer.route, cached=True))]

    @property
    def _can_be_cached(self) -> bool:
        return self._params.temperature == 0 or self._params.seed is not None

    # --- the device's answer ---

    def local_options(self, sampling: dict[str, Any]) -> dict[str, Any]:
        """Sampling options for the device: as given, with probabilities where they are judged."""
        wanted = self._held and self._ends.policy.reads_probabilities
        return {**sampling, "logprobs": True} if wanted else sampling

    def take(self, chunk: Chunk) -> list[Chunk]:
        """A piece of the device's answer; returns what is to be shown now."""
        if not self._held:
            self._shown = True
            return [self._label(chunk)]
        self._kept.append(chunk)
        if chunk.finish_reason is None:
            return []
        verdict = judge(collect(self._kept), self._ends.policy)
        self._reason, self._confidence = verdict.reason, verdict.confidence
        self.wants_cloud = not verdict.enough
        return [] if self.wants_cloud else self._show_kept()

    def refuse(self, error: AutoGLMError) -> None:
        """The device refused, with one of `REFUSALS`.

        Raises:
            AutoGLMError: The same, if the cloud cannot be asked in its place.
        """
        if self._shown or self._obstacle:
            if self._ends.cloud is not None:
                _add_hint(error, f"the cloud was not asked: {self._obstacle}")
            raise error
        try:
            self.body()
        except ImageError as broken:  # no model could take it
            raise (error if isinstance(error, ImageError) else broken) from None
        self._refusal, self._reason, self.wants_cloud = error, error.message, True

    def _show_kept(self) -> list[Chunk]:
        return [self._label(chunk) for chunk in self._kept]

    def _label(self, chunk: Chunk) -> Chunk:
        if not self._params.logprobs:
            chunk = replace(chunk, logprobs=())
        if chunk.finish_reason is None:
            return chunk
        return replace(
            chunk, route=Route("local", self._reason, self._ends.local_name, self._confidence)
        )

    # --- the cloud's answer ---

    def enter(self) -> None:
        """Go to the cloud; to be followed by `leave`.

        Raises:
            CloudError: It is left alone for now.
        """
        obstacle = self._ends.breaker.admit()
        if obstacle:
            raise CloudError(obstacle)
        self._entered = True

    def take_cloud(self, chunk: Chunk) -> list[Chunk]:
        """A piece of the cloud's answer; returns what is to be shown now.

        Raises:
            CloudError: Its answer is not what was asked for.
        """
        assert self._ends.cloud is not None
        self._heard.append(chunk)
        if chunk.finish_reason is None:
            self._shown = self._shown or not self._is_action
            return [] if self._is_action else [chunk]
        route = Route("cloud", self._reason, self._ends.cloud.model, self._confidence)
        if chunk.finish_reason == "cancelled":
            return [replace(chunk, route=route)]
        self._leave_as("succeeded")
        answer = replace(collect(self._heard), route=route)
        if self._is_action:
            answer = replace(answer, text=self._read_action(answer.text))
        if self._can_be_cached:
            self._ends.cache.keep(self.body(), answer)
        return [_whole(answer, route)] if self._is_action else [replace(chunk, route=route)]

    def _read_action(self, text: str) -> str:
        """The cloud's answer as the caller may have it: ended by its action, where that was asked.

        Raises:
            CloudError: No action, or one that is not allowed.
        """
        assert self._ends.cloud is not None
        try:
            start, _, action = find_action(text)
        except ActionParseError:
            raise CloudError(f"{self._ends.cloud.name}: its answer is no valid action") from None
        if wrong := check_app(action, self._params.apps):
            raise CloudError(f"{self._ends.cloud.name}: {wrong}")
        held = self._params.constrain == CONSTRAIN_ACTION
        return text[:start] + action.render() if held else text

    def fail(self, error: CloudError) -> list[Chunk]:
        """The cloud gave no answer; returns what is to be shown: the device's.

        Raises:
            AutoGLMError: The device had refused, with what it said; or a part of the cloud's answer
                was shown already.
        """
        was_asked = self._entered or bool(self._heard)
        self._leave_as("refused" if error.status in _BAD_REQUEST else "failed", error.retry_after_s)
        told = f"the cloud was {'asked in vain' if was_asked else 'not asked'}: {error.message}"
        if self._shown:
            raise error
        if self._refusal is not None:
            _add_hint(self._refusal, told)
            raise self._refusal from error
        self._reason = f"{self._reason}; {told}"
        return self._show_kept()

    def leave(self) -> None:
        """The cloud's part has ended, however it did."""
        self._leave_as("given up")

    def _leave_as(self, outcome: str, retry_after_s: float | None = None) -> None:
        """Tell the breaker, once."""
        if not self._entered:
            return
        self._entered = False
        if outcome == "failed":
            self._ends.breaker.fail(retry_after_s)
        elif outcome == "given up":
            self._ends.breaker.release()
        else:
            self._ends.breaker.succeed()


def _whole(answer: Completion, route: Route) -> Chunk:
    return Chunk(
        answer.text,
        finish_reason=answer.finish_reason,
        usage=answer.usage,
        timings=answer.timings,
        route=route,
    )


def _add_hint(error: AutoGLMError, text: str) -> None:
    error.hint = f"{error.hint}; {text}" if error.hint else text
