"""`AutoGLM`, the runtime class: where prompt, engine, sampling and text meet.

One engine, one sequence: calls from several threads queue; a second stream in the thread that holds
an open one is an error, since it would wait for itself. Knows no files beyond passing paths on.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from inspect import GEN_CLOSED, getgeneratorstate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from autoglm_gguf.actions import Action, choose_system_prompt, parse_answer
from autoglm_gguf.config import (
    CONTENT_FORMATS,
    NO_TOKEN_BUDGET,
    ContentFormat,
    SamplingParams,
    TokenBudget,
)
from autoglm_gguf.conversation import ChatSession
from autoglm_gguf.engine.base import Engine, EngineInfo
from autoglm_gguf.engine.content import Piece
from autoglm_gguf.engine.images import EmbeddingCache
from autoglm_gguf.errors import (
    ActionParseError,
    ContextFullError,
    PromptError,
)
from autoglm_gguf.generation import Request, Run
from autoglm_gguf.hub import resolve_pair
from autoglm_gguf.lookup import Profit
from autoglm_gguf.memory.budget import DEFAULT_BUDGET, Budget
from autoglm_gguf.memory.measure import MemoryUsage, measure_memory
from autoglm_gguf.messages import (
    Chunk,
    Completion,
    FinishReason,
    ImageSource,
    Message,
    MessageLike,
    Route,
    Timings,
    Usage,
    collect,
    user_message,
)
from autoglm_gguf.preparation import Preparation
from autoglm_gguf.prompt import Prompt
from autoglm_gguf.sampling import act_options
from autoglm_gguf.stopping import StopFlag
from autoglm_gguf.turns import Turn, Turns

if TYPE_CHECKING:
    from autoglm_gguf.saved_session import SavedSession

AUTO_SYSTEM = "auto"
ACT_MAX_TOKENS = 512
"""Of an `AutoGLM.act`, where nothing else is asked for: thinking and action together."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a phone agent."""

    thinking: str
    action: Action
    text: str
    """The whole answer."""
    usage: Usage
    timings: Timings
    finish_reason: FinishReason = "stop"
    """``length``: tokens ran out, so thinking or a text of the action was cut short and closed."""
    route: Route | None = None
    """Who gave it; of a `HybridClient` only."""


def act_messages(
    task: str,
    screenshot: ImageSource | None,
    system: str | None = AUTO_SYSTEM,
    current_app: str | None = None,
) -> list[Message]:
    """A step of a phone agent as messages, in the client's layout; see `AutoGLM.act`."""
    text = task
    if current_app is not None:
        screen = json.dumps({"current_app": current_app}, ensure_ascii=False)
        text = f"{task}\n\n{screen}"
    prompt = choose_system_prompt(task) if system == AUTO_SYSTEM else system
    messages = [] if prompt is None else [Message("system", prompt)]
    return [*messages, user_message(text, screenshot)]


def read_step(answer: Completion) -> Step:
    """The step that an answer is.

    Raises:
        ActionParseError: No valid action; where the answer was ended early, that is the reason.
    """
    reason = answer.finish_reason
    try:
        thinking, action = parse_answer(answer.text)
    except ActionParseError as error:
        if reason == "stop":
            raise
        hint = "raise max_tokens; or n_ctx, or the token budget, where they bound it"
        cut, hint = ("cut", hint) if reason == "length" else ("cancelled", "ask again")
        message = f"{error.message}: {cut} after {answer.usage.completion_tokens} tokens"
        raise ActionParseError(message, text=error.text, hint=hint) from error
    return Step(thinking, action, answer.text, answer.usage, answer.timings, reason, answer.route)


class AutoGLM:
    """A loaded model.

    Make one with `AutoGLM.load`; use it as a context manager, or `close` it.

    Args:
        engine: What evaluates; `autoglm_gguf.engine.fake.FakeEngine` for tests.
        content_format: How image and text of a message are joined; see `render_prompt`.
        token_budget: How n_ctx is shared out; see `TokenBudget`.

    Raises:
        ValueError: Unknown content_format.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        content_format: ContentFormat = "openai",
        token_budget: TokenBudget = NO_TOKEN_BUDGET,
    ) -> None:
        if content_format not in CONTENT_FORMATS:
            raise ValueError(
                f"content_format {content_format!r}: not one of {', '.join(CONTENT_FORMATS)}"
            )
        self._engine = engine
        self._preparation = Preparation(engine, content_format, token_budget)
        self._turns = Turns(engine.info.name)
        self._cancel = StopFlag()
        self._embeddings = EmbeddingCache(engine.info.image_cache_tokens)
        self._profit = Profit()
        self._sampling = SamplingParams()  # of the last answer: how much history it leaves room for
        self._open_stream: Callable[[], Generator[Chunk, None, None] | None] = lambda: None
        self._closed = False

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        mmproj: str | os.PathLike[str] | None = "auto",
        memory_budget: Budget = DEFAULT_BUDGET,
        content_format: ContentFormat = "openai",
        token_budget: TokenBudget = NO_TOKEN_BUDGET,
        self_test: bool = True,
        reserved_bytes: int = 0,
        **context: Any,
    ) -> AutoGLM:
        """Load a GGUF pair within a memory budget.

        Args:
            model: A text GGUF, or a directory with one.
            mmproj: The vision tower; ``"auto"`` looks beside the model, None leaves it out.
            memory_budget: For everything the process holds, at load, at image encode and at
                decode: bytes, ``"4GB"``, ``"4GiB"``, or ``"none"``; see `plan_memory`.
            content_format: ``openai`` renders as transformers does, ``string`` as the official
                server does (image, line break, text).
            token_budget: How n_ctx is shared out. Where it bounds prompt, image (of a model that
                takes any) and answer, n_ctx is their sum, unless it is given.
            self_test: Compare a GPU with the CPU when it is first used with this model, and keep
                on the CPU what it gets wrong; ``info.notes`` tells.
            reserved_bytes: Of the budget, left to the program for its own work beside the model.
            **context: Fields of `ContextParams`: n_ctx, n_gpu_layers, device, n_threads, type_k,
                type_v, flash_attn, n_batch, n_draft_max, max_image_tokens, offload_kqv,
                mmproj_offload. What is given is kept, the rest may be made smaller to stay within
                the budget.
                ``n_gpu_layers="auto"``, the default, puts as many layers on a GPU as fit.

        Raises:
            ValueError, TypeError: An argument out of range or unknown.
            GGUFError: A file is missing, broken or of another kind.
            PairMismatchError: The mmproj belongs to another model.
            DoesNotFitError: No choice stays under the budget, or the machine has too little memory.
            EngineError: llama.cpp refused the model.
            NativeLibraryError: llama-cpp-python is missing or not the pinned version.
        """
        from autoglm_gguf.engine.loading import load_engine
        from autoglm_gguf.memory.plan import parse_sizes

        if not isinstance(token_budget, TokenBudget):
            raise TypeError(f"token_budget {token_budget!r}: not a TokenBudget")
        parse_sizes(memory_budget, context)  # what is wrong there is told before a file is missed
        text, tower = resolve_pair(model, mmproj)
        context = token_budget.sizes(with_images=tower is not None) | context
        engine = load_engine(
            text,
            tower,
            memory_budget,
            self_test=self_test,
            reserved_bytes=reserved_bytes,
            context=context,
        )
        return cls(engine, content_format=content_format, token_budget=token_budget)

    @property
    def info(self) -> EngineInfo:
        """Name, sizes, stop tokens, image limits, and notes on what was chosen."""
        info, more = self._engine.info, self._preparation.notes
        return replace(info, notes=(*info.notes, *more)) if more else info

    @property
    def takes_images(self) -> bool:
        """Whether messages with images are answered: a vision tower is loaded."""
        return self.info.vision is not None

    def memory(self) -> MemoryUsage | None:
        """What this process holds now, with the model's buffers on devices; plan: ``info.plan``.

        Returns:
            None where the system does not say.
        """
        usage = measure_memory()
        if usage is None:
            return None
        device_bytes = self._engine.device_bytes  # as long as the model is loaded
        plan = self.info.plan
        if device_bytes and plan is not None and plan.devices_count_in_process:
            return replace(
                usage,
                anonymous_bytes=max(0, usage.anonymous_bytes - device_bytes),
                device_bytes=device_bytes,
            )
        peak_bytes = usage.peak_bytes + device_bytes
        return replace(usage, device_bytes=device_bytes, peak_bytes=peak_bytes)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of text; literal special tokens become their ids, nothing is added."""
        with self._exclusive():
            return self._engine.tokenize(text)

    def render(self, prompt: str | Sequence[MessageLike], *, raw: bool = False) -> Prompt:
        """The prompt as the model will see it.

        Args:
            prompt: A user message, or a conversation.
            raw: Take a string as it is, without the chat template.

        Raises:
            PromptError: The template cannot render it, or the model has none.
        """
        return self._preparation.render(prompt, raw=raw)

    def stream(
        self,
        prompt: str | Sequence[MessageLike],
        *,
        image: ImageSource | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> Generator[Chunk, None, None]:
        """Answer, piece by piece. Closing the generator stops the work.

        Args:
            prompt: A user message, or a conversation.
            image: A screenshot for a prompt that is a string; it comes before the text.
            raw: Complete the string as it is, without the chat template.
            **sampling: Fields of `SamplingParams`: max_tokens, temperature, top_p, top_k, min_p,
                seed, frequency_penalty, presence_penalty, repeat_penalty, stop, constrain, apps,
                max_thinking_tokens, cache_prompt, logprobs, top_logprobs, n_draft.

        Returns:
            Chunks whose texts add up to the answer; the last has finish_reason, usage and timings.

        Raises:
            ValueError, TypeError: An argument out of range or unknown.
            PromptError, ImageError: The prompt cannot be rendered, an image cannot be used.
            ContextFullError: The prompt does not fit n_ctx; nothing was evaluated.
            EngineBusyError: This thread has another stream open.
        """
        return self._open(self._prepare(prompt, image, raw, sampling), StopFlag())

    def generate(
        self,
        prompt: str | Sequence[MessageLike],
        *,
        image: ImageSource | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> Completion:
        """Answer as a whole. Arguments and errors are those of `stream`."""
        return collect(self.stream(prompt, image=image, raw=raw, **sampling))

    async def astream(
        self,
        prompt: str | Sequence[MessageLike],
        *,
        image: ImageSource | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Like `stream`, without blocking the event loop; closing the iterator stops the work."""
        import asyncio  # costs those who do not await as much as numpy

        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()
        stopped = StopFlag()

        def work() -> None:
            last: BaseException | None = None
            try:
                request = self._prepare(prompt, image, raw, sampling, stopped)
                for chunk in self._open(request, stopped):
                    loop.call_soon_threadsafe(queue.put_nowait, chunk)
            except BaseException as error:
                last = error
            loop.call_soon_threadsafe(queue.put_nowait, last)

        worker = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            while isinstance(item := await queue.get(), Chunk):
                yield item
            if item is not None:
                raise item
        finally:
            stopped.set()
            await asyncio.shield(worker)

    def chat(self, *, system: str | None = None) -> ChatSession:
        """Open a conversation.

        Args:
            system: The system prompt.
        """
        return ChatSession(self, system=system)

    def load_chat(self, path: str | os.PathLike[str]) -> ChatSession:
        """Open a conversation that `ChatSession.save` saved, where it ended.

        Its KV state takes the place of what the engine holds, and its next turn evaluates only what
        is new. Where the model is the same but the state does not fit (another quantisation, type_k
        or n_gpu_layers, too small an n_ctx, …), the session's ``notes`` say so, and its next turn
        evaluates the whole conversation.

        Raises:
            SavedSessionError: The file is missing, broken, or saved with another model.
            EngineBusyError: This thread has a stream of the model open.
            EngineError: llama.cpp refused the KV state; the engine holds nothing then.
        """
        from autoglm_gguf.saved_session import read_session

        with self._exclusive():
            saved = read_session(Path(path), self._engine)
        return ChatSession(self, system=saved.system, messages=saved.messages, notes=saved.notes)

    def save_chat(
        self, path: Path, messages: Sequence[Message], system: str | None
    ) -> SavedSession:
        """Write what `ChatSession.save` describes."""
        from autoglm_gguf.saved_session import write_session

        pieces: tuple[Piece, ...] = ()
        with self._exclusive():
            with contextlib.suppress(PromptError, ContextFullError):  # nor could a next turn use it
                following = [*messages, Message("user", "")]
                pieces = self._preparation.prepare(following, self._sampling).pieces
            return write_session(path, self._engine, messages, system, pieces)

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
        """Choose the next action for a task, as one step of a phone agent.

        Args:
            task: What the user wants, in any language the model speaks.
            screenshot: The phone's screen.
            system: The system prompt; ``"auto"`` describes the action language in the task's
                language, None leaves it out.
            current_app: Shown to the model in the client's layout.
            max_tokens: For thinking and action together.
            **sampling: See `stream`; greedy, and held to the action language, by default
                (``constrain=None`` lifts it). ``apps`` lists the names Launch may open.

        Raises:
            ActionParseError: The answer holds no valid action.
            Exception: Everything `stream` raises.
        """
        messages = act_messages(task, screenshot, system, current_app)
        return read_step(self.generate(messages, max_tokens=max_tokens, **act_options(sampling)))

    async def aact(self, task: str, screenshot: ImageSource | None = None, **options: Any) -> Step:
        """Like `act`, without blocking the event loop; cancelling the task stops the work."""
        system = options.pop("system", AUTO_SYSTEM)
        messages = act_messages(task, screenshot, system, options.pop("current_app", None))
        options.setdefault("max_tokens", ACT_MAX_TOKENS)
        chunks = [chunk async for chunk in self.astream(messages, **act_options(options))]
        return read_step(collect(chunks))

    def cancel(self) -> None:
        """End the answer being generated, from any thread; its last chunk says ``cancelled``."""
        self._cancel.set()

    def close(self) -> None:
        """Free weights, KV cache and vision tower; a stream that is still open is closed first.

        Requests that wait are refused. A stream that another thread is reading is cancelled, and
        this waits until that thread has read its last chunk or dropped it.
        """
        self._turns.closing = True
        self.cancel()
        if self._turns.is_mine:
            stream = self._open_stream()
            if stream is not None:
                stream.close()
        with self._exclusive(closes=True):
            if not self._closed:
                self._closed = True
                self._embeddings.clear()
                self._engine.close()

    def __enter__(self) -> AutoGLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _prepare(
        self,
        prompt: str | Sequence[MessageLike],
        image: ImageSource | None,
        raw: bool,
        sampling: dict[str, Any],
        stopped: StopFlag | None = None,
    ) -> Request:
        params = SamplingParams.of(**sampling)
        if image is not None:
            if not isinstance(prompt, str) or raw:
                raise ValueError("image: goes with a prompt that is a string and not raw")
            prompt = [user_message(prompt, image)]
        with self._exclusive(stopped):
            return self._preparation.prepare(prompt, params, raw=raw)

    def _exclusive(self, stopped: StopFlag | None = None, *, closes: bool = False) -> Turn:
        stream = self._open_stream()
        is_open = stream is not None and getgeneratorstate(stream) != GEN_CLOSED
        return Turn(self._turns, has_stream=is_open, stopped=stopped, closes=closes)

    def _open(self, request: Request, stopped: StopFlag) -> Generator[Chunk, None, None]:
        slot: list[weakref.ref[Generator[Chunk, None, None]]] = []
        stream = self._generate(request, stopped, slot)
        slot.append(weakref.ref(stream))  # weak: dropping the stream must close it at once
        return stream

    def _generate(
        self,
        request: Request,
        stopped: StopFlag,
        slot: list[weakref.ref[Generator[Chunk, None, None]]],
    ) -> Generator[Chunk, None, None]:
        with self._exclusive(stopped):
            self._cancel, self._open_stream, self._sampling = stopped, slot[0], request.params
            run = Run(self._engine, request, stopped, self._embeddings, self._profit)
            try:
                yield from run.chunks()
            finally:
                run.close()
