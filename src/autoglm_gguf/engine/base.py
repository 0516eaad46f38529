"""The protocol between sessions and engines. One sequence, one caller at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.config import SamplingParams
from autoglm_gguf.engine.content import Content, Piece
from autoglm_gguf.gguf.describe import VisionLimits
from autoglm_gguf.memory.plan import MemoryPlan
from autoglm_gguf.sampling import Grammar
from autoglm_gguf.stopping import StopFlag

MODEL, MMPROJ = "model", "mmproj"  # among the names of `Engine.state_facts`


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a session must know about the model behind an engine."""

    name: str
    n_ctx: int
    n_vocab: int
    stop_ids: frozenset[int]
    """Every token that ends a turn."""
    chat_template: str | None
    vision: VisionLimits | None
    """None for a text-only model."""
    max_image_tokens: int | None
    image_cache_tokens: int = 0
    """Encoded images of so many image tokens may be kept for later requests."""
    n_draft_max: int = 0
    """Tokens that may be evaluated ahead beside a sampled one: outputs of a batch, less one."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a turn too: a stop token that a model may also write in plain letters."""
    notes: tuple[str, ...] = ()
    """What was chosen or completed for the user, with reasons."""
    path: Path | None = None
    plan: MemoryPlan | None = None
    """How it is held; None for an engine that was not planned."""


@dataclass(frozen=True, slots=True)
class ImageEmbedding:
    """An encoded image."""

    data: NDArray[np.float32]
    """``(n_tokens, n_embd)``, row by row from the top left."""
    grid: tuple[int, int]
    """``(n_columns, n_rows)``."""
    key: str = ""
    """Of the pixels: equal keys are equal images. Empty: like no other."""

    @property
    def n_tokens(self) -> int:
        """KV cells it takes."""
        return self.grid[0] * self.grid[1]


class Sampler(Protocol):
    """Chooses tokens and remembers those that were accepted."""

    output: int
    """Which of the last batch's outputs is sampled from, the first being 0."""

    def sample(self, among: NDArray[np.int32] | None = None) -> int:
        """A token from an output's logits, of ``among`` (ids) if given."""

    def accept(self, token: int) -> None:
        """Remember a token as part of the answer."""

    def close(self) -> None:
        """Release it."""


class Engine(Protocol):
    """Evaluates one sequence."""

    @property
    def info(self) -> EngineInfo:
        """The model's properties."""

    @property
    def device_bytes(self) -> int:
        """Held on devices with memory of their own."""

    @property
    def n_batch(self) -> int:
        """Tokens per `eval_tokens` call at most."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids; literal special tokens become their ids; nothing is added."""

    def token_bytes(self, token: int) -> bytes:
        """Bytes to show for a token; none for control tokens that are no tags."""

    @property
    def content(self) -> Content:
        """What was evaluated and is kept."""

    def encode_image(self, pixels: NDArray[np.uint8], grid: tuple[int, int]) -> ImageEmbedding:
        """Run the vision tower over ``(height, width, 3)`` RGB pixels.

        Raises:
            Stopped: See `watch`.
        """

    def keep(self, n: int) -> None:
        """Forget all that was evaluated but the first ``n`` pieces of `content`."""

    def watch(self, stop: StopFlag) -> None:
        """End evaluation with `Stopped` when a flag is set, from now on."""

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        """Evaluate at most `n_batch` tokens after what was evaluated so far.

        Whatever is raised, `content` is as it was before.

        Args:
            tokens: At least one.
            n_outputs: After so many of the last ones a token may be sampled; ``info.n_draft_max``
                and one at most.

        Raises:
            Stopped: See `watch`.
        """

    def eval_image(self, image: ImageEmbedding) -> None:
        """Evaluate an encoded image after what was evaluated so far; errors as `eval_tokens`."""

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits ``(n_vocab,)`` of one of the last batch's outputs, copied."""

    @property
    def state_facts(self) -> Mapping[str, str]:
        """What a KV state depends on: one that was saved fits where all of it is the same.

        `MODEL` says whether a conversation belongs to this model at all; `MMPROJ` matters to a
        state that holds images only.
        """

    def state_bytes(self, pieces: Sequence[Piece]) -> int:
        """Size of the file that `save_state` writes for some pieces."""

    def save_state(self, path: Path) -> None:
        """Write the KV state of all of `content` to a file.

        Raises:
            EngineError: It could not be written.
        """

    def load_state(self, path: Path, pieces: Sequence[Piece]) -> None:
        """Take a saved KV state in place of what was evaluated.

        Args:
            path: Written by an engine with the same `state_facts`, or by an enemy.
            pieces: What it holds.

        Raises:
            SavedSessionError: It is not these pieces' state; all is as it was.
            EngineError: llama.cpp refused it; nothing is kept then.
        """

    def open_sampler(self, params: SamplingParams) -> Sampler:
        """A fresh sampler."""

    def open_grammar(self, schema: str) -> Grammar:
        """The grammar of the JSON documents that a JSON schema describes.

        Raises:
            ValueError: The schema cannot be turned into a grammar.
        """

    def close(self) -> None:
        """Free everything; the engine must not be used any more."""
