"""`HybridClient`: stands where `AutoGLM` stands, and asks a cloud when a policy says so.

Without a cloud it adds nothing but the words on who answered. What is decided, and when an answer
is held back, is in `autoglm_gguf.hybrid.routing`.
"""

from __future__ import annotations

import os
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from autoglm_gguf.config import SamplingParams
from autoglm_gguf.conversation import ChatSession
from autoglm_gguf.engine.base import EngineInfo
from autoglm_gguf.errors import CloudError
from autoglm_gguf.hybrid.breaker import CircuitBreaker
from autoglm_gguf.hybrid.cache import AnswerCache
from autoglm_gguf.hybrid.cloud import CloudModel
from autoglm_gguf.hybrid.local import LocalModel, PromptLike
from autoglm_gguf.hybrid.policy import HybridPolicy
from autoglm_gguf.hybrid.routing import REFUSALS, Ends, Routing
from autoglm_gguf.memory.measure import MemoryUsage
from autoglm_gguf.messages import (
    Chunk,
    Completion,
    ImageSource,
    Message,
    collect,
    parse_messages,
    user_message,
)
from autoglm_gguf.prompt import Prompt
from autoglm_gguf.sampling import act_options
from autoglm_gguf.session import ACT_MAX_TOKENS, AUTO_SYSTEM, Step, act_messages, read_step
from autoglm_gguf.stopping import StopFlag

if TYPE_CHECKING:
    from autoglm_gguf.saved_session import SavedSession

_DEFAULT_POLICY = HybridPolicy()


class HybridClient:
    """This device first; the cloud when the device is not enough and the policy allows it.

    Each answer says who gave it and why: ``route`` of its last chunk, its completion, its step. If
    the cloud fails after the device answered, the device's answer stands. A cloud's chunks have no
    token ids and no logprobs.

    Args:
        local: The model on this device; closed with this client.
        cloud: Asked when the policy says so; None keeps everything on the device.
        policy: See `HybridPolicy`.
        clock: For the circuit breaker: seconds that never go back.
    """

    def __init__(
        self,
        local: LocalModel,
        cloud: CloudModel | None = None,
        policy: HybridPolicy = _DEFAULT_POLICY,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local, self._cloud, self._policy = local, cloud, policy
        breaker = CircuitBreaker(policy.n_failures, policy.open_s, clock=clock)
        cache = AnswerCache(policy.cache_size)
        self._ends = Ends(local.info.name, cloud, policy, breaker, cache)
        self._open: set[StopFlag] = set()

    def _notes(self) -> Iterator[str]:
        cloud, policy = self._cloud, self._policy
        if cloud is None:
            return
        sent = "text and images" if policy.send_images else "text; requests with images stay here"
        if policy.offline:
            sent = "nothing, it is offline"
        yield f"cloud: {cloud.model} at {cloud.name}; may be sent: {sent}"
        if not cloud.is_encrypted:
            yield f"cloud: {cloud.name} is not encrypted; who is on the way reads along"

    @property
    def info(self) -> EngineInfo:
        """The device's, with notes on the cloud."""
        info = self._local.info
        return replace(info, notes=(*info.notes, *self._notes()))

    @property
    def may_ask_cloud(self) -> bool:
        """Whether anything may leave the device: it has a cloud, and the policy is not offline."""
        return self._cloud is not None and not self._policy.offline

    @property
    def takes_images(self) -> bool:
        """Whether images can be answered, here or by the cloud."""
        sends = self.may_ask_cloud and self._policy.send_images
        return self._local.info.vision is not None or sends

    def memory(self) -> MemoryUsage | None:
        """The device's; see `AutoGLM.memory`."""
        return self._local.memory()

    def render(self, prompt: PromptLike, *, raw: bool = False) -> Prompt:
        """The prompt as the model on the device will see it; see `AutoGLM.render`."""
        return self._local.render(prompt, raw=raw)

    def stream(
        self,
        prompt: PromptLike,
        *,
        image: ImageSource | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> Generator[Chunk, None, None]:
        """Answer, piece by piece; see `AutoGLM.stream`.

        An answer that the cloud may replace comes in one go, once it was judged: actions, with a
        cloud that may be asked. Others come as they are made.

        Raises:
            CloudError: The device refused, and the cloud broke off in the middle of its answer.
            Exception: Everything `AutoGLM.stream` raises; where the cloud was asked in vain, the
                hint says so.
        """
        routing = self._route(prompt, image, raw, sampling)
        known = routing.find_cached()
        if known:
            return (chunk for chunk in known)
        try:
            local: Iterable[Chunk] = self._local.stream(
                prompt, image=image, raw=raw, **routing.local_options(sampling)
            )
        except REFUSALS as error:
            routing.refuse(error)
            local = ()
        return self._answer(routing, local)

    def generate(
        self,
        prompt: PromptLike,
        *,
        image: ImageSource | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> Completion:
        """Answer as a whole. Arguments and errors are those of `stream`."""
        return collect(self.stream(prompt, image=image, raw=raw, **sampling))

    async def astream(
        self,
        prompt: PromptLike,
        *,
        image: ImageSource | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Like `stream`, for an event loop; closing the iterator stops the work."""
        routing = self._route(prompt, image, raw, sampling)
        known = routing.find_cached()
        for chunk in known:
            yield chunk
        if known:
            return
        local = self._local.astream(prompt, image=image, raw=raw, **routing.local_options(sampling))
        try:
            async for chunk in local:
                for shown in routing.take(chunk):
                    yield shown
        except REFUSALS as error:
            routing.refuse(error)
        finally:
            await _aclose(local)
        if not routing.wants_cloud:
            return
        assert self._cloud is not None
        with self._asking() as stop:
            try:
                routing.enter()
                async with aclosing(self._cloud.astream(routing.body(), stop)) as answer:
                    async for chunk in answer:
                        for shown in routing.take_cloud(chunk):
                            yield shown
            except CloudError as error:
                for shown in routing.fail(error):
                    yield shown
            finally:
                routing.leave()

    def chat(self, *, system: str | None = None) -> ChatSession:
        """Open a conversation; see `AutoGLM.chat`."""
        return ChatSession(self, system=system)

    def load_chat(self, path: str | os.PathLike[str]) -> ChatSession:
        """Open a saved conversation; see `AutoGLM.load_chat`. Its KV state is the device's."""
        return self._local.load_chat(path).answered_by(self)

    def save_chat(
        self, path: Path, messages: Sequence[Message], system: str | None
    ) -> SavedSession:
        """See `AutoGLM.save_chat`."""
        return self._local.save_chat(path, messages, system)

    def act(
        self,
        task: str,
        screenshot: ImageSource | None = None,
        *,
        system: str | None = AUTO_SYSTEM,
        current_app: str | None = None,
        max_tokens: int = ACT_MAX_TOKENS,
        **sampling: Any,
    ) -> Step:
        """Choose the next action for a task; see `AutoGLM.act`."""
        messages = act_messages(task, screenshot, system, current_app)
        return read_step(self.generate(messages, max_tokens=max_tokens, **act_options(sampling)))

    async def aact(self, task: str, screenshot: ImageSource | None = None, **options: Any) -> Step:
        """Like `act`, for an event loop; cancelling the task stops the work."""
        system = options.pop("system", AUTO_SYSTEM)
        messages = act_messages(task, screenshot, system, options.pop("current_app", None))
        options.setdefault("max_tokens", ACT_MAX_TOKENS)
        async with aclosing(self.astream(messages, **act_options(options))) as answer:
            return read_step(collect([chunk async for chunk in answer]))

    def cancel(self) -> None:
        """End the answer being generated, from any thread; its last chunk says ``cancelled``."""
        self._local.cancel()
        for stop in tuple(self._open):
            stop.set()

    def close(self) -> None:
        """Close the model on this device, and end what the cloud is being asked."""
        for stop in tuple(self._open):
            stop.set()
        self._local.close()

    def __enter__(self) -> HybridClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _route(
        self, prompt: PromptLike, image: ImageSource | None, raw: bool, sampling: dict[str, Any]
    ) -> Routing:
        params = SamplingParams.of(**sampling)
        if raw:
            return Routing(self._ends, None, params)
        if not isinstance(prompt, str):
            return Routing(self._ends, parse_messages(prompt), params)
        return Routing(self._ends, (user_message(prompt, image),), params)

    def _answer(self, routing: Routing, local: Iterable[Chunk]) -> Generator[Chunk, None, None]:
        try:
            for chunk in local:
                yield from routing.take(chunk)
        except REFUSALS as error:
            routing.refuse(error)
        finally:
            if isinstance(local, Generator):
                local.close()
        if not routing.wants_cloud:
            return
        assert self._cloud is not None
        with self._asking() as stop:
            try:
                routing.enter()
                with closing(self._cloud.stream(routing.body(), stop)) as answer:
                    for chunk in answer:
                        yield from routing.take_cloud(chunk)
            except CloudError as error:
                yield from routing.fail(error)
            finally:
                routing.leave()

    @contextmanager
    def _asking(self) -> Iterator[StopFlag]:
        stop = StopFlag()
        self._open.add(stop)
        try:
            yield stop
        finally:
            stop.set()
            self._open.discard(stop)


async def _aclose(chunks: AsyncIterator[Chunk]) -> None:
    if isinstance(chunks, AsyncGenerator):
        await chunks.aclose()
