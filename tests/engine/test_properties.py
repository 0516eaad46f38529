"""Whatever came before, an answer is a fresh session's: requests and mishaps in random order.

A difference counts as a near-tie, not as an error, only where a fresh engine gives the two tokens
logits that differ by less than a thousandth of the largest.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from autoglm_gguf import (
    AutoGLM,
    Completion,
    ContextFullError,
    EngineError,
    ImageError,
    ImagePart,
    MemoryPlan,
    Message,
    TextPart,
    plan_memory,
)
from autoglm_gguf.config import ContextParams
from autoglm_gguf.engine.base import ImageEmbedding
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.memory.holding import Places
from autoglm_gguf.messages import collect
from autoglm_gguf.native import pages
from autoglm_gguf.native.mtmd import VisionTower
from autoglm_gguf.stopping import StopFlag

pytestmark = pytest.mark.native
Pair = tuple[Path, Path]
Engine = TypeVar("Engine", bound=LlamaEngine)
SIZES = {"n_ctx": 384, "n_batch": 16, "n_threads": 1}
NEAR = 1e-3  # of the largest logit
WORDS = ("hello", "in", "the", "hell", "好", "!", "tin")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
MALFORMED: tuple[Any, ...] = (b"", b"\x89PNG\r\n\x1a\n", b"not an image", "no/such/file.png")


class TroubledEngine(LlamaEngine):
    """Counts its calls; before one of them is done, or when its work is done, something happens."""

    before: Callable[[StopFlag], None] | None = None
    after: Callable[[StopFlag], None] | None = None
    n_left = -1
    flag = StopFlag()

    def trouble(self, n: int, *, before: Any = None, after: Any = None) -> None:
        """Call one of these at the n-th call from now on."""
        self.n_left, self.before, self.after = n, before, after

    def watch(self, stop: StopFlag) -> None:
        super().watch(stop)
        self.flag = stop

    def _count(self, work: Callable[[], Any]) -> Any:
        self.n_left -= 1
        if self.n_left == 0 and self.before is not None:
            self.before(self.flag)
        found = work()
        if self.n_left == 0 and self.after is not None:
            self.after(self.flag)
        return found

    def encode_image(self, pixels: NDArray[np.uint8], grid: tuple[int, int]) -> ImageEmbedding:
        encode = super().encode_image
        found: ImageEmbedding = self._count(lambda: encode(pixels, grid))
        return found

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        evaluate = super().eval_tokens
        self._count(lambda: evaluate(tokens, n_outputs=n_outputs))

    def eval_image(self, image: ImageEmbedding) -> None:
        evaluate = super().eval_image
        self._count(lambda: evaluate(image))


class RememberingEngine(LlamaEngine):
    """Keeps the logits after every batch, by KV cells in use."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: dict[int, NDArray[np.float32]] = {}

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        super().eval_tokens(tokens, n_outputs=n_outputs)
        self.seen[self.content.n_cells] = self.logits()


class Cells:
    """What llama.cpp itself says its KV cache holds."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine, self._context = engine, engine._context
        self._llama = self._context._llama
        sizes = []
        for token in (5, 6):
            engine.eval_tokens([token])
            sizes.append(self._state_bytes())
        self._first, self._each = sizes[0], sizes[1] - sizes[0]

    def _state_bytes(self) -> int:
        return int(self._llama.llama_state_seq_get_size(self._context.handle, 0))

    def check(self) -> None:
        """The KV cache, our count of it and `content` agree, once it has followed."""
        self._engine._follow()
        content = self._engine.content
        empty = 16  # bytes of a state without cells
        n_cells = content.n_cells
        wanted = self._first + (n_cells - 1) * self._each if n_cells else empty
        assert self._state_bytes() == wanted
        assert (self._context.n_past, self._context.position) == (n_cells, content.position)
        memory = self._llama.llama_get_memory(self._context.handle)
        last = int(self._llama.llama_memory_seq_pos_max(memory, 0))
        # All cells of an image carry its first position on the axis that llama.cpp looks at.
        assert last == (content._held[-2][2] if len(content) > 1 else len(content) - 1)


@dataclass
class Tally:
    """Over all sequences."""

    n_answers: int = 0
    n_cut: int = 0
    n_tokens: int = 0
    near_ties: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    found = Tally()
    yield found
    print(
        f"\n{found.n_answers} whole answers, {found.n_cut} cut ones, {found.n_tokens} tokens, "
        f"near-ties: {len(found.near_ties)} {found.near_ties}"
    )
    assert len(found.near_ties) <= max(1, found.n_answers // 20)


@dataclass(frozen=True)
class Model:
    """What is tested."""

    pair: Pair
    words: tuple[str, ...]
    plan: MemoryPlan | None = None

    def open(self, kind: type[Engine]) -> Engine:
        return kind(*self.pair, ContextParams(**SIZES), plan=self.plan)


@dataclass
class Request:
    prompt: Any
    options: dict[str, Any]


class Steps:
    """One random conversation of a dozen steps with one model, each checked against a fresh one."""

    def __init__(self, tested: Model, seed: int, tally: Tally) -> None:
        self._rng, self._tested, self._tally = random.Random(seed), tested, tally
        self._words = tested.words
        self._engine = tested.open(TroubledEngine)
        self._cells = Cells(self._engine)
        self._model = AutoGLM(self._engine)
        self._history: list[Message] = []
        self._screens = [_screen(seed, n) for n in range(3)]

    def run(self) -> None:
        """Twelve steps."""
        steps = (
            [self._whole] * 4
            + [self._cancelled] * 3
            + [self._cancelled_in_tower, self._cancelled_anywhere, self._dropped]
            + [self._failing, self._malformed, self._oversize, self._bad_schema]
        )
        with self._model:
            for _ in range(12):
                self._rng.choice(steps)()
                self._engine.trouble(-1)
                self._cells.check()
            self._whole()

    # --- requests ---

    def _request(self, *, with_image: bool | None = None) -> Request:
        rng = self._rng
        options: dict[str, Any] = {"max_tokens": rng.choice([1, 3, 12, 24])}
        kind = rng.random()
        if kind < 0.15:
            options |= {"constrain": "action", "max_tokens": 60}
        elif kind < 0.25:
            options |= {"constrain": SCHEMA, "max_tokens": 24}
        options["n_draft"] = rng.choice([None, 0, 3])
        if rng.random() < 0.1:
            options |= {"cache_prompt": False, "n_draft": None}
        if rng.random() < 0.3 and not with_image:
            text = " ".join(rng.choices(self._words, k=rng.choice([1, 4, 30])))
            return Request(text, {**options, "raw": True})
        if rng.random() < 0.2 or len(self._history) > 5:
            self._history = []
        image = with_image if with_image is not None else rng.random() < 0.5
        if rng.random() < 0.7:  # as the client does
            self._history = [_without_image(message) for message in self._history]
        turn: list[Any] = [TextPart(" ".join(rng.choices(self._words, k=rng.randint(1, 6))))]
        if image:
            turn.insert(0, ImagePart(rng.choice(self._screens)))
        return Request([*self._history, Message("user", tuple(turn))], options)

    def _keep(self, request: Request, text: str) -> None:
        if isinstance(request.prompt, list) and self._rng.random() < 0.7:
            self._history = [*request.prompt, Message("assistant", text)]

    # --- steps ---

    def _whole(self) -> None:
        request = self._request()
        answer = self._model.generate(request.prompt, **request.options)
        assert answer.finish_reason != "cancelled"
        self._compare(request, answer)
        self._keep(request, answer.text)

    def _cancelled(self) -> None:
        """After any number of calls into the engine, just before or just after one."""
        when = self._rng.choice(["before", "after"])
        self._engine.trouble(self._rng.randint(1, 12), **{when: StopFlag.set})
        request = self._request()
        self._end(request, self._model.generate(request.prompt, **request.options))

    def _cancelled_in_tower(self) -> None:
        """Behind any node of the vision tower's graph that it looks behind."""
        n_left = self._rng.randint(1, 24)
        ask = VisionTower._on_node

        def look(tower: VisionTower, tensor: int, asks: bool, data: Any) -> bool:
            nonlocal n_left
            n_left -= not asks
            if n_left == 0:
                tower._stop.set()
            return ask(tower, tensor, asks, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VisionTower, "_on_node", look)
            if self._engine._tower is not None:
                self._engine._close_tower()  # the next one calls what was patched
            request = self._request(with_image=True)
            answer = self._model.generate(request.prompt, **request.options)
            self._engine._close_tower()
        self._end(request, answer)

    def _cancelled_anywhere(self) -> None:
        """From another thread, at a moment that nobody chose."""
        timer = threading.Timer(self._rng.uniform(0, 0.02), self._model.cancel)
        timer.start()
        request = self._request()
        answer = self._model.generate(request.prompt, **request.options)
        timer.join()
        self._end(request, answer)

    def _dropped(self) -> None:
        request, chunks = self._request(), []
        stream = self._model.stream(request.prompt, **request.options)
        for _ in range(self._rng.randint(0, 4)):
            chunk = next(stream, None)
            chunks += [] if chunk is None else [chunk]
        if self._rng.random() < 0.5:
            stream.close()
        del stream
        self._compare(request, collect(chunks))

    def _failing(self) -> None:
        """llama.cpp fails, or worked and something fails after it."""

        def fail(_: StopFlag) -> None:
            raise EngineError("made up")

        when = self._rng.choice(["before", "after"])
        self._engine.trouble(self._rng.randint(1, 6), **{when: fail})
        request = self._request()
        try:
            answer = self._model.generate(request.prompt, **request.options)
        except EngineError as error:
            assert "made up" in str(error)
        else:
            self._end(request, answer)

    def _malformed(self) -> None:
        turn = Message("user", (ImagePart(self._rng.choice(MALFORMED)), TextPart("hello")))
        with pytest.raises(ImageError):
            self._model.generate([*self._history, turn], max_tokens=4)

    def _oversize(self) -> None:
        with pytest.raises(ContextFullError):
            self._model.generate("hello in the " * 400, raw=self._rng.random() < 0.5)

    def _bad_schema(self) -> None:
        with pytest.raises(ValueError, match="schema"):
            self._model.generate("hello", constrain={"type": "no such type"})

    def _end(self, request: Request, answer: Completion) -> None:
        """An answer that may have been cancelled: as far as it went it is right."""
        self._compare(request, answer)
        if answer.text:
            self._keep(request, answer.text)

    # --- what a fresh session says ---

    def _compare(self, request: Request, answer: Completion) -> None:
        cut = answer.finish_reason == "cancelled"
        engine = self._tested.open(RememberingEngine)
        with AutoGLM(engine) as fresh:
            wanted = fresh.generate(request.prompt, **{**request.options, "n_draft": 0})
        self._tally.n_cut += cut
        self._tally.n_answers += not cut
        self._tally.n_tokens += len(answer.tokens)
        pairs = zip(wanted.tokens, answer.tokens, strict=False)
        n_same = sum(1 for _ in takewhile(lambda two: two[0] == two[1], pairs))
        if n_same == len(answer.tokens) and (cut or n_same == len(wanted.tokens)):
            assert cut or (answer.text, answer.usage) == (wanted.text, wanted.usage)
            return
        assert request.options.get("cache_prompt", True), "evaluated anew it is the same to the bit"
        assert n_same < min(len(answer.tokens), len(wanted.tokens)), (answer, wanted)
        logits = engine.seen[wanted.usage.prompt_tokens + n_same]
        one, other = logits[[wanted.tokens[n_same], answer.tokens[n_same]]]
        gap = abs(float(one - other)) / float(np.abs(logits).max())
        assert gap < NEAR, f"token {n_same} of {request}: {answer.tokens} for {wanted.tokens}"
        self._tally.near_ties.append(f"{gap:.1e}")


def _screen(seed: int, n: int) -> Image.Image:
    size = [(112, 168, 3), (140, 112, 3), (112, 112, 3)][n % 3]
    pixels = np.random.default_rng(1000 * seed + n).integers(0, 255, size, np.uint8)
    return Image.fromarray(pixels)


def _without_image(message: Message) -> Message:
    if isinstance(message.content, str):
        return message
    return Message(message.role, tuple(p for p in message.content if isinstance(p, TextPart)))


@pytest.mark.parametrize("seed", range(30))
def test_random_conversations_answer_as_fresh_sessions_do(
    random_pair: Pair, tally: Tally, seed: int
) -> None:
    Steps(Model(random_pair, WORDS), seed, tally).run()


@pytest.mark.skipif(not pages.SUPPORTED, reason="weights cannot be streamed here")
@pytest.mark.parametrize("seed", range(30, 33))
def test_random_conversations_with_streamed_weights_answer_as_fresh_sessions_do(
    random_pair: Pair, tally: Tally, seed: int
) -> None:
    plan = plan_memory(random_pair[0], mmproj=random_pair[1], memory_budget="none", **SIZES)
    plan = replace(plan, weights="streamed", places=Places(streamed=(0, 1)), tower="on_demand")
    Steps(Model(random_pair, WORDS, plan), seed, tally).run()


@pytest.mark.parametrize("seed", range(33, 36))
def test_random_conversations_with_autoglm_tiny_answer_as_fresh_sessions_do(
    tiny_pair: Callable[[str], Pair], tally: Tally, seed: int
) -> None:
    words = ("Open", "the", "red", "button", "打开", "设置", "Chrome", "and", "type")
    Steps(Model(tiny_pair("q8_0"), words), seed, tally).run()
