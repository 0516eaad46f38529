"""A deterministic engine for tests and examples: it answers from a script, one byte a token.

Token ``i`` below 256 is the byte ``i``; 256 ends a turn; 257 is ``<|image|>``. It keeps the rules
of the real engine (batch size, context size), so that sessions are tested as they run. It has no
weights and knows no language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.config import SamplingParams
from autoglm_gguf.engine.base import MMPROJ, MODEL, EngineInfo, ImageEmbedding
from autoglm_gguf.engine.content import Content, ImageCells, Piece, count_cells, lay_out
from autoglm_gguf.errors import ContextFullError, EngineError, ImageError, SavedSessionError
from autoglm_gguf.gguf.describe import (
    GLM_MERGE_SIZE,
    GLM_MIN_PIXELS,
    GLM_TEMPLATE,
    VisionLimits,
)
from autoglm_gguf.gguf.names import END_OF_ANSWER
from autoglm_gguf.sampling import Grammar
from autoglm_gguf.stopping import StopFlag, Stopped

STOP = 256
IMAGE = 257
_LIMITS = VisionLimits(14, GLM_MERGE_SIZE, GLM_MIN_PIXELS, max_pixels=5_000_000)


class FakeEngine:
    """Answers with ``answer``: bytes, or a function from the prompt's text to bytes.

    Args:
        answer: What it says before it ends the turn.
        n_ctx: Cells it pretends to have.
        vision: Whether it takes images.
        chat_template: The template it reports; None for a plain completion model.
        stop_strings: Texts that end its turns; none for a model without ``</answer>``.
        n_draft_max: Tokens it evaluates ahead at most.
    """

    n_batch = 64
    device_bytes = 0
    bos: int | None = None
    """Change it to pretend that texts begin with a token."""
    vocabulary_key = "bytes"

    def __init__(
        self,
        answer: bytes | Callable[[str], bytes] = b"ok",
        *,
        n_ctx: int = 4096,
        vision: bool = True,
        chat_template: str | None = GLM_TEMPLATE,
        stop_strings: tuple[str, ...] = (END_OF_ANSWER,),
        n_draft_max: int = 0,
    ) -> None:
        self._answer = answer
        self.content = Content()
        self.n_evaluated = self.n_encoded = 0
        """KV cells evaluated, and images encoded, since the beginning."""
        self.closed = False
        self.state_facts = {MODEL: "fake", "text": "fake", MMPROJ: "fake" if vision else ""}
        """See `Engine.state_facts`; change it to pretend to be another one."""
        self._n_outputs = 1
        self._stop = StopFlag()
        self._sampler = FakeSampler(self, b"")
        self._wanted = STOP
        self.info = EngineInfo(
            name="fake",
            n_ctx=n_ctx,
            n_vocab=258,
            stop_ids=frozenset({STOP}),
            chat_template=chat_template,
            vision=_LIMITS if vision else None,
            max_image_tokens=None,
            image_cache_tokens=n_ctx,
            n_draft_max=n_draft_max,
            stop_strings=stop_strings,
        )

    @property
    def evaluated(self) -> list[int]:
        """Every token that is kept, `IMAGE` once per image token."""
        return [
            token
            for piece in self.content.pieces
            for token in ([piece] if isinstance(piece, int) else [IMAGE] * piece.n_cells)
        ]

    def tokenize(self, text: str) -> list[int]:
        """One token per byte."""
        return list(text.encode())

    def tokenize_document(self, text: str, *, parse_special: bool = False) -> NDArray[np.int32]:
        """One token per byte, ``(n,)``."""
        return np.array(self.tokenize(text), np.int32)

    @property
    def n_outputs_max(self) -> int:
        """Tokens of a batch whose logits may be read."""
        return 1 + self.info.n_draft_max

    def token_bytes(self, token: int) -> bytes:
        """The byte itself; nothing for the two special tokens."""
        return bytes([token]) if token < STOP else b""

    def encode_image(self, pixels: NDArray[np.uint8], grid: tuple[int, int]) -> ImageEmbedding:
        """One mean colour per image token."""
        if self.info.vision is None:
            raise ImageError("fake: takes no images")
        self._check()
        self.n_encoded += 1
        means = np.full((grid[0] * grid[1], 1), pixels.mean(), np.float32)
        return ImageEmbedding(means, grid)

    def keep(self, n: int) -> None:
        """Forget all that was evaluated but the first ``n`` pieces."""
        self.content.cut(n)

    def watch(self, stop: StopFlag) -> None:
        """Refuse to evaluate once a flag is set."""
        self._stop = stop

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        """Remember tokens; refuses what the real engine refuses."""
        most = min(len(tokens), 1 + self.info.n_draft_max)
        if not (1 <= len(tokens) <= self.n_batch and 1 <= n_outputs <= most):
            raise ValueError(f"batch of {len(tokens)} tokens with {n_outputs} outputs")
        self._count(len(tokens))
        self.content.add(list(tokens))
        self._n_outputs = n_outputs
        self._wanted = self._sampler.wanted

    def eval_image(self, image: ImageEmbedding, *, whole: bool = False) -> None:
        """Remember an image."""
        self._count(image.n_tokens)
        self.content.add([ImageCells(image.key, image.grid)])

    def _count(self, n: int) -> None:
        self._check()
        used = self.content.n_cells
        if used + n > self.info.n_ctx:
            raise ContextFullError("context: full", n_prompt=used + n, n_ctx=self.info.n_ctx)
        self.n_evaluated += n

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def state_bytes(self, pieces: Sequence[Piece]) -> int:
        """16 bytes a cell: the state is where M-RoPE would put it."""
        return 16 * count_cells(pieces)

    def save_state(self, path: Path) -> None:
        """Write where each cell lies."""
        path.write_bytes(lay_out(self.content.pieces).tobytes())

    def load_state(self, path: Path, pieces: Sequence[Piece]) -> None:
        """Hold these pieces, as if they had been evaluated.

        Raises:
            SavedSessionError: The file is of other ones.
        """
        if path.read_bytes() != lay_out(pieces).tobytes():
            raise SavedSessionError("KV state: does not fit the conversation")
        self.content.cut(0)
        self.content.add(pieces)

    def open_sampler(self, params: SamplingParams) -> FakeSampler:
        """A sampler that reads the script from its beginning."""
        prompt = bytes(t for t in self.evaluated if t < STOP).decode("utf-8", "replace")
        answer = self._answer if isinstance(self._answer, bytes) else self._answer(prompt)
        self._sampler = FakeSampler(self, answer)
        self._wanted = self._sampler.wanted
        return self._sampler

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """5 for the token that the script wants, and less the higher the id for the others.

        Those of the output that was sampled from last; of the last batch before that.
        """
        if not -self._n_outputs <= index < self._n_outputs:
            raise IndexError(f"output {index} of {self._n_outputs}")
        values = np.linspace(0, -1, self.info.n_vocab, dtype=np.float32)
        values[self._wanted] = 5
        return values

    def before(self, output: int) -> tuple[Piece, ...]:
        """What one of the last batch's outputs has seen: the pieces up to it.

        Raises:
            IndexError: The batch has no such output.
        """
        if not 0 <= output < self._n_outputs:
            raise IndexError(f"output {output} of {self._n_outputs}")
        return self.content.pieces[: len(self.content) - self._n_outputs + 1 + output]

    def open_grammar(self, schema: str) -> Grammar:
        """Refused: it knows no grammars.

        Raises:
            EngineError: Always.
        """
        raise EngineError("fake: follows no JSON schema", hint="load a model")

    def close(self) -> None:
        """Mark it closed."""
        self.closed = True


class FakeSampler:
    """Wants an answer's bytes one by one, then `STOP` for ever.

    What is accepted in place of the byte it wants does not move it on. It refuses to sample where
    something else was evaluated than the prompt and what was accepted.

    Args:
        engine: Has evaluated the prompt.
        answer: The bytes.
    """

    def __init__(self, engine: FakeEngine, answer: bytes) -> None:
        self._engine, self._answer, self._at = engine, answer, 0
        self._pieces = list(engine.content.pieces)
        self.output = 0

    def sample(self, among: NDArray[np.int32] | None = None) -> int:
        """The next byte, or `STOP`; the lowest of ``among`` if that is not there.

        Raises:
            EngineError: The output is not the one after the last accepted token.
        """
        if list(self._engine.before(self.output)) != self._pieces:
            raise EngineError("fake: sampled from the wrong output", hint="follow what was chosen")
        wanted = self._engine._wanted = self.wanted
        return wanted if among is None or wanted in among else int(among.min())

    @property
    def wanted(self) -> int:
        """The next byte, or `STOP`."""
        return self._answer[self._at] if self._at < len(self._answer) else STOP

    def accept(self, token: int) -> None:
        """Move on if it is the wanted byte."""
        self._pieces.append(token)
        self._at += self._answer[self._at : self._at + 1] == bytes([token % STOP])

    def close(self) -> None:
        """Nothing to release."""
