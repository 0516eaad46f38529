"""One answer: prefill, sampling, text, and when it ends.

Knows an engine and a checked request; knows nothing of messages, templates or threads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autoglm_gguf.actions_grammar import compile_actions
from autoglm_gguf.config import SamplingParams
from autoglm_gguf.drafting import Drafts, evaluate
from autoglm_gguf.engine.base import Engine, ImageEmbedding, Sampler
from autoglm_gguf.engine.content import Piece, count_cells
from autoglm_gguf.engine.images import EmbeddingCache
from autoglm_gguf.logprobs import find_logprobs
from autoglm_gguf.lookup import Profit
from autoglm_gguf.messages import Chunk, FinishReason, Timings, TokenLogprob, Usage
from autoglm_gguf.sampling import (
    ActionConstraint,
    ActionTokens,
    Constraint,
    GrammarConstraint,
    ThinkingLimit,
)
from autoglm_gguf.stopping import StopFlag, Stopped
from autoglm_gguf.stream import TextStream
from autoglm_gguf.vision import Pixels


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request."""

    pieces: tuple[Piece, ...]
    """The prompt; its last piece is a token."""
    images: Mapping[str, Pixels]
    """The prompt's images by their keys."""
    params: SamplingParams
    n_dropped: int = 0
    """Messages of the history that were left out of the prompt."""

    @property
    def n_prompt(self) -> int:
        """KV cells of the prompt: text tokens plus image tokens."""
        return count_cells(self.pieces)


class Run:
    """One answer being generated.

    Args:
        engine: Held exclusively by the caller.
        request: Fits the engine's context.
        stop: Set from any thread, it ends the answer.
        embeddings: Encoded images of earlier requests; this one's are added.
        profit: What earlier answers taught about drafts; this one's is added.
        clock: Seconds.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        stop: StopFlag,
        embeddings: EmbeddingCache,
        profit: Profit,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._request, self._stop = engine, request, stop
        self._embeddings, self._n_prompt, self._profit = embeddings, request.n_prompt, profit
        self._text = TextStream((*request.params.stop, *engine.info.stop_strings))
        self._sampler: Sampler | None = None
        self._constraint: Constraint | None = None
        self._drafts: Drafts | None = None
        self._timings = Timings()
        self._rated: list[TokenLogprob] = []  # of the tokens that no chunk has told yet
        self._n_predicted = 0
        self._predicted_ms = self._ttft_ms = 0.0
        self._clock, self._began = clock, clock()

    def chunks(self) -> Iterator[Chunk]:
        """Evaluate the prompt, then sample to the end; the last chunk has a finish_reason."""
        self._constraint = open_constraint(self._engine, self._request.params)  # may refuse
        self._engine.watch(self._stop)
        try:
            self._prefill()
        except Stopped:
            yield self._last("", (), "cancelled")
            return
        self._sampler = self._engine.open_sampler(self._request.params)
        drafts = self._drafts = Drafts(
            self._engine,
            self._sampler,
            self._request.pieces,
            self._request.params,
            self._profit,
            self._clock,
        )
        pending: list[int] = []
        first = 0.0
        while True:
            chosen, shown, reason = self._choose(), "", None
            now = self._clock()
            ratings = self._rate(chosen)
            first = first or now
            self._predicted_ms, self._ttft_ms = 1000 * (now - first), 1000 * (first - self._began)
            for n, token in enumerate(chosen, 1):
                self._n_predicted += 1
                pending.append(token)
                self._rated += ratings[n - 1 : n]
                ended = token in self._engine.info.stop_ids
                shown += "" if ended else self._text.push(self._engine.token_bytes(token))
                ended = ended or (n == len(chosen) and self._is_complete())
                reason = self._reason(ended or self._text.stopped)
                if reason is not None:
                    yield self._last(shown, tuple(pending), reason)
                    return
            if shown:
                yield Chunk(shown, tuple(pending), logprobs=tuple(self._rated))
                pending.clear()
                self._rated.clear()
            try:
                drafts.follow(chosen, self._n_left(), now)
            except Stopped:
                yield self._last("", tuple(pending), "cancelled")
                return

    def _rate(self, chosen: Sequence[int]) -> list[TokenLogprob]:
        """What the model held of these tokens: of the first one, as it was asked for no other."""
        params, show = self._request.params, self._engine.token_bytes
        if not params.logprobs or self._sampler is None:
            return []
        logits = self._engine.logits(self._sampler.output)
        own, best = find_logprobs(logits, chosen[0], params.top_logprobs)
        top = tuple(TokenLogprob(n, show(n), logprob) for n, logprob in best)
        first = TokenLogprob(chosen[0], show(chosen[0]), own, top)
        return [first, *(TokenLogprob(token, show(token), None) for token in chosen[1:])]

    def _choose(self) -> list[int]:
        """The next tokens: a sampled one, and those a constraint leaves no choice about."""
        assert self._sampler is not None
        if self._constraint is not None:
            return self._constraint.next_tokens(self._sampler, self._n_left())
        token = self._sampler.sample()
        self._sampler.accept(token)
        return [token]

    def _n_left(self) -> int:
        """Tokens until `_reason` ends the answer."""
        room = self._engine.info.n_ctx + 1 - self._n_prompt
        return min(self._request.params.max_tokens or room, room) - self._n_predicted

    def _is_complete(self) -> bool:
        return self._constraint is not None and self._constraint.complete

    def _reason(self, ended: bool) -> FinishReason | None:
        if ended:
            return "length" if self._constraint is not None and self._constraint.cut else "stop"
        if self._stop.is_set():
            return "cancelled"
        limit = self._request.params.max_tokens
        used = self._n_prompt + self._n_predicted
        if self._n_predicted == limit or used > self._engine.info.n_ctx:
            return "length"
        return None

    def _prefill(self) -> None:
        """Evaluate what the KV cache does not hold of the prompt, at least its last token.

        Raises:
            Stopped: It was cancelled on the way.
        """
        engine, pieces = self._engine, self._request.pieces
        common = engine.content.n_common(pieces) if self._request.params.cache_prompt else 0
        engine.keep(min(common, len(pieces) - 1))
        n_kept = engine.content.n_cells
        image_ms = 0.0
        tokens: list[int] = []
        for piece in pieces[len(engine.content) :]:
            if isinstance(piece, int):
                tokens.append(piece)
                continue
            evaluate(engine, tokens)
            tokens = []
            began = self._clock()
            image = self._encode(piece.key)
            image_ms += 1000 * (self._clock() - began)
            engine.eval_image(image)
        evaluate(engine, tokens)
        total_ms = 1000 * (self._clock() - self._began)
        self._timings = Timings(
            image_ms,
            prompt_n=self._n_prompt - n_kept,
            cache_n=n_kept,
            prompt_ms=total_ms - image_ms,
        )

    def _encode(self, key: str) -> ImageEmbedding:
        """An image of the request, by the vision tower unless it was kept."""
        kept = self._embeddings.find(key)
        if kept is not None:
            return kept
        pixels = self._request.images[key]
        self._embeddings.make_room(pixels.n_tokens)
        image = replace(self._engine.encode_image(pixels.array, pixels.grid), key=key)
        self._embeddings.keep(image)
        return image

    def _last(self, shown: str, tokens: tuple[int, ...], reason: FinishReason) -> Chunk:
        n_image = count_cells(p for p in self._request.pieces if not isinstance(p, int))
        usage = Usage(self._n_prompt, self._n_predicted, n_image, self._request.n_dropped)
        timings = replace(
            self._timings,
            predicted_n=self._n_predicted,
            predicted_ms=self._predicted_ms,
            ttft_ms=self._ttft_ms,
            draft_n=self._drafts.n_drafted if self._drafts else 0,
            draft_n_accepted=self._drafts.n_accepted if self._drafts else 0,
        )
        shown += self._text.finish()
        return Chunk(shown, tokens, reason, usage, timings, tuple(self._rated))

    def close(self) -> None:
        """Release the sampler and the constraint; the engine keeps what is part of the answer."""
        if self._drafts is not None:
            self._drafts.finish()
            self._drafts = None
        if self._constraint is not None:
            self._constraint.close()
            self._constraint = None
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None


def open_constraint(engine: Engine, params: SamplingParams) -> Constraint | None:
    """What holds an answer, if anything does.

    Raises:
        ValueError: A JSON schema that cannot be turned into a grammar.
    """
    most = params.max_thinking_tokens
    if params.constrain is None:
        return None if most is None else ThinkingLimit(engine, most)
    if isinstance(params.constrain, Mapping):
        try:
            schema = json.dumps(dict(params.constrain))
        except RecursionError as error:
            raise ValueError("schema: nested too deeply to be written as JSON") from error
        return GrammarConstraint(engine.open_grammar(schema))
    info = engine.info
    automaton = compile_actions(params.apps)
    return ActionConstraint(ActionTokens(engine, info.n_vocab, info.stop_ids, automaton), most)
