"""From messages to a checked `Request`: rendered, cut into tokens, screenshots read, made to fit.

Knows what an engine tells of itself, its tokenizer and its KV cells; evaluates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoglm_gguf.config import ContentFormat, SamplingParams, TokenBudget
from autoglm_gguf.engine.base import Engine
from autoglm_gguf.engine.content import ImageCells, Piece
from autoglm_gguf.errors import ContextFullError, ImageError, PromptError
from autoglm_gguf.generation import Request
from autoglm_gguf.history import fit_history
from autoglm_gguf.messages import ImageSource, Message, MessageLike, parse_messages
from autoglm_gguf.prompt import Prompt, render_prompt
from autoglm_gguf.vision import Pixels, read_pixels

_ANSWER_ROOM = 512
"""Cells kept free for an answer whose length is not bounded; never more than a quarter of n_ctx."""


class Preparation:
    """Prepares the requests of one engine.

    Args:
        engine: What will evaluate them.
        content_format: How image and text of a message are joined; see `render_prompt`.
        budget: How n_ctx is shared out.
    """

    def __init__(self, engine: Engine, content_format: ContentFormat, budget: TokenBudget) -> None:
        self._engine, self._format, self._budget = engine, content_format, budget

    @property
    def notes(self) -> tuple[str, ...]:
        """What the token budget shares out and n_ctx does not have; empty where it has it."""
        image = self._budget.image if self._engine.info.vision is not None else None
        n_shared = (self._budget.prompt or 0) + (image or 0) + self._budget.n_generated
        n_ctx = self._engine.info.n_ctx
        if n_shared <= n_ctx:
            return ()
        return (
            f"token budget: its parts take {n_shared} tokens, n_ctx is {n_ctx}: "
            "turns are left out earlier, or answers cut",
        )

    def render(self, prompt: str | Sequence[MessageLike], *, raw: bool = False) -> Prompt:
        """The prompt as the model will see it; see `AutoGLM.render`."""
        if raw:
            if not isinstance(prompt, str):
                raise ValueError("raw: takes a string, not messages")
            return Prompt((prompt,))
        template = self._engine.info.chat_template
        if template is None:
            raise PromptError(
                f"{self._engine.info.name}: has no chat template",
                hint="use raw=True for plain completion, or convert the checkpoint again",
            )
        return render_prompt(_as_messages(prompt), template, content_format=self._format)

    def prepare(
        self, prompt: str | Sequence[MessageLike], params: SamplingParams, *, raw: bool = False
    ) -> Request:
        """A request that fits; the caller holds the engine.

        Raises:
            ValueError, PromptError, ImageError, ContextFullError: See `AutoGLM.stream`.
        """
        params = self._bound(params)
        reading = _Reading(self._engine)
        if not raw:
            prompt = _as_messages(prompt)
        request = reading.request(self.render(prompt, raw=raw), params)
        room = self._room(request)
        if not raw and request.n_prompt > room:

            def count(part: Sequence[Message]) -> int:
                fewer = reading.request(self.render(part), params)
                # Without its newest image, a conversation may take less.
                return fewer.n_prompt + room - self._room(fewer)

            kept, n_dropped = fit_history(_as_messages(prompt), room, count)
            request = replace(reading.request(self.render(kept), params), n_dropped=n_dropped)
        self._check(request)
        return request

    def _bound(self, params: SamplingParams) -> SamplingParams:
        """Sampling as asked for, within the token budget."""
        budget, most = self._budget, params.max_tokens
        bounds = (params.max_thinking_tokens, budget.thinking)
        thinking = min((n for n in bounds if n is not None), default=None)
        if budget.answer is not None:
            most = min(most or budget.n_generated, budget.n_generated)
        return replace(params, max_tokens=most, max_thinking_tokens=thinking)

    def _room(self, request: Request) -> int:
        """KV cells that a conversation may take."""
        n_ctx = self._engine.info.n_ctx
        room = n_ctx - min(request.params.max_tokens or _ANSWER_ROOM, n_ctx // 4)
        return min(room, self._budgeted(request))

    def _budgeted(self, request: Request) -> int:
        """KV cells that the token budget gives a prompt: its newest image comes on top."""
        if self._budget.prompt is None:
            return self._engine.info.n_ctx
        images = [piece.n_cells for piece in request.pieces if not isinstance(piece, int)]
        return self._budget.prompt + (images[-1] if images else 0)

    def _check(self, request: Request) -> None:
        n_prompt, n_ctx = request.n_prompt, self._engine.info.n_ctx
        if not request.pieces or not isinstance(request.pieces[-1], int):
            raise PromptError("prompt: empty" if n_prompt == 0 else "prompt: ends with an image")
        most = min(n_ctx - 1, self._budgeted(request))
        if n_prompt <= most:
            return
        what = "n_ctx" if most == n_ctx - 1 else "the token budget"
        raise ContextFullError(
            f"prompt: does not fit the context ({n_prompt} tokens, n_ctx {n_ctx})"
            if what == "n_ctx"
            else f"prompt: over the token budget ({n_prompt} tokens, {most} at most)",
            n_prompt=n_prompt,
            n_ctx=n_ctx,
            hint=f"raise {what}, set max_image_tokens, or shorten the conversation",
        )


class _Reading:
    """Reads prompts for one request; each image once, however often it is rendered."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pixels: dict[int, Pixels] = {}

    def request(self, prompt: Prompt, params: SamplingParams) -> Request:
        images = [self._read(source) for source in prompt.images]
        try:
            segments = [self._engine.tokenize(segment) for segment in prompt.segments]
        except UnicodeEncodeError as error:
            raise PromptError(
                f"prompt: holds half a character ({error.object[error.start]!a})",
                hint="leave it out, or give its other half too",
            ) from error
        pieces: list[Piece] = [*segments[0]]
        for image, segment in zip(images, segments[1:], strict=True):
            pieces += [ImageCells(image.key, image.grid), *segment]
        return Request(tuple(pieces), {image.key: image for image in images}, params)

    def _read(self, source: ImageSource) -> Pixels:
        known = self._pixels.get(id(source))  # the caller's messages keep it alive
        if known is not None:
            return known
        info = self._engine.info
        if info.vision is None:
            reason = next((note for note in info.notes if note.startswith("images:")), "")
            raise ImageError(
                f"{info.name}: takes no images" + (f" ({reason})" if reason else ""),
                hint="load the model together with its mmproj file",
            )
        pixels = read_pixels(
            source,
            info.vision,
            max_image_tokens=info.max_image_tokens,
            max_pixels=info.plan.largest_image_pixels if info.plan is not None else None,
        )
        self._pixels[id(source)] = pixels
        return pixels


def _as_messages(prompt: str | Sequence[MessageLike]) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else parse_messages(prompt)
