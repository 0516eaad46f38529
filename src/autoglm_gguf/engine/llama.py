"""The real engine: a GGUF pair on llama.cpp.

Files are checked before llama.cpp sees them. The vision tower is loaded at the first image, or for
each image and freed after it, as the memory plan says.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.config import ContextParams, SamplingParams
from autoglm_gguf.devices import usable_cores
from autoglm_gguf.engine.base import MMPROJ, MODEL, EngineInfo, ImageEmbedding
from autoglm_gguf.engine.content import Content, ImageCells, Piece, count_cells, lay_out
from autoglm_gguf.engine.weights import CacheScarcity, load_weights, open_residency
from autoglm_gguf.errors import EngineError, ImageError, SavedSessionError
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.describe import ModelDescription, VisionLimits, describe_pair
from autoglm_gguf.gguf.identity import identify_file, identify_model
from autoglm_gguf.memory.estimate import text_shape
from autoglm_gguf.memory.plan import MemoryPlan
from autoglm_gguf.native.grammar import GrammarState, schema_to_grammar
from autoglm_gguf.native.interrupts import HeldInterrupts
from autoglm_gguf.native.library import buffer_report
from autoglm_gguf.native.llama import LlamaContext
from autoglm_gguf.native.mtmd import VisionTower
from autoglm_gguf.native.nodes import LayerWatch, NodeWatch
from autoglm_gguf.native.pages import forget_file, return_free_memory
from autoglm_gguf.native.sampler import SamplerChain
from autoglm_gguf.stopping import StopFlag

# Shown although some checkpoints mark them as control tokens: the client parses them.
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class LlamaEngine:
    """A text GGUF, optionally with its mmproj.

    Args:
        text: The text GGUF.
        mmproj: Its vision tower; None makes a text-only engine.
        params: Sizes and types; a plan's own take their place.
        n_outputs_max: Positions per batch whose logits may be read; None: as many as drafts need.
        described: The two files, where they were read before.
        plan: How the pair is held; without one, all weights are copied into memory.
        watches: Look at the nodes of every batch.

    Raises:
        GGUFError: A file is missing, broken or of another kind.
        PairMismatchError: The files do not belong together.
        EngineError: llama.cpp refused the model or the context.
    """

    def __init__(
        self,
        text: Path,
        mmproj: Path | None,
        params: ContextParams,
        *,
        n_outputs_max: int | None = None,
        described: ModelDescription | None = None,
        plan: MemoryPlan | None = None,
        watches: Sequence[NodeWatch] = (),
    ) -> None:
        described = described or describe_pair(text, mmproj)
        params = params if plan is None else plan.context
        self._mmproj = mmproj
        self._tower_on_demand = plan is not None and plan.tower == "on_demand"
        self._tower_device = plan.devices[0] if plan and plan.tower_on_device else None
        self._flash_attn = params.flash_attn
        self._n_threads = params.n_threads or usable_cores()
        self._tower: VisionTower | None = None
        self._cache_is_scarce = CacheScarcity(plan)
        self._stop = StopFlag()
        self.content = Content()
        """What was evaluated and is kept; the KV cache follows it at the next evaluation."""
        self._is_followed = True
        with buffer_report() as buffers, contextlib.ExitStack() as undo:
            self._model = load_weights(described.text, params, plan)
            undo.callback(self._model.close)
            self._residency = open_residency(described.text, plan, self._cache_is_scarce)
            if self._residency is not None:
                undo.callback(self._residency.close)
            if self._residency is not None and self._residency.watched_layers:
                passed = LayerWatch(self._residency.watched_layers, self._residency.passed)
                watches = (*watches, passed)
            self._context = LlamaContext(
                self._model,
                params,
                n_threads=self._n_threads,
                n_outputs_max=params.n_outputs_max if n_outputs_max is None else n_outputs_max,
                watches=watches,
            )
            undo.pop_all()
        devices = () if plan is None else plan.devices
        self.device_bytes = sum(n for (name, _), n in buffers.items() if name.startswith(devices))
        """Weights, KV cache and scratch on GPUs, as ggml reports them."""
        tokens = described.text.metadata[names.TOKENS]
        self._tag_ids = {i: t.encode() for i, t in enumerate(tokens) if t in _TAGS}
        self._info = self._tell(described, params, plan)
        shape = text_shape(described.text)
        self._layout = self._context.state_layout(shape.n_layers, shape.n_heads_kv * shape.head_dim)
        self.state_facts = self._find_facts(described, params, devices)
        """What a KV state depends on; see `Engine.state_facts`."""

    def _find_facts(
        self, described: ModelDescription, params: ContextParams, devices: Sequence[str]
    ) -> dict[str, str]:
        return {
            MODEL: identify_model(described.text),
            "text": identify_file(described.text),
            MMPROJ: "" if described.mmproj is None else identify_file(described.mmproj),
            **self._context.state_facts,
            "n_gpu_layers": str(params.n_gpu_layers),
            "device": ", ".join(devices),
        }

    def _tell(
        self, described: ModelDescription, params: ContextParams, plan: MemoryPlan | None
    ) -> EngineInfo:
        text = described.text.path
        notes = [*described.notes, *(plan.notes if plan else ())]
        trained = self._model.n_ctx_train
        if params.n_ctx > trained:
            notes.append(f"n_ctx: {params.n_ctx} is beyond the {trained} the model was trained for")
        tokens = described.text.metadata[names.TOKENS]
        ends_with_tag = names.END_OF_ANSWER in {tokens[i] for i in described.stop_ids}
        vision = described.vision if self._model.uses_mrope else None
        if described.vision is not None and vision is None:
            notes.append(
                f"images: refused, since {text.name} has no rope.dimension_sections; convert the "
                "checkpoint again with a newer converter"
            )
        return EngineInfo(
            name=text.stem,
            n_ctx=params.n_ctx,
            n_vocab=self._model.n_vocab,
            stop_ids=described.stop_ids,
            chat_template=described.chat_template,
            vision=vision,
            max_image_tokens=params.max_image_tokens,
            image_cache_tokens=_largest_image(vision, params),
            n_draft_max=min(params.n_draft_max, self._context.n_outputs_max - 1),
            stop_strings=(names.END_OF_ANSWER,) if ends_with_tag else (),
            notes=tuple(notes),
            path=text,
            plan=plan,
        )

    @property
    def info(self) -> EngineInfo:
        """The model's properties."""
        return self._info

    def add_note(self, note: str) -> None:
        """Tell one more thing in ``info.notes``."""
        self._info = replace(self._info, notes=(*self._info.notes, note))

    @property
    def n_batch(self) -> int:
        """Tokens per `eval_tokens` call at most."""
        return self._context.n_batch

    @property
    def n_outputs_max(self) -> int:
        """Tokens of a batch whose logits may be read."""
        return self._context.n_outputs_max

    @cached_property
    def vocabulary_key(self) -> str:
        """Equal keys are equal vocabularies."""
        digest = hashlib.sha256()
        for token in range(self._model.n_vocab):
            digest.update(self._model.token_bytes(token, special=True) + b"\n")
        return digest.hexdigest()

    def tokenize(self, text: str) -> list[int]:
        """Token ids; literal special tokens become their ids; nothing is added."""
        return self._model.tokenize(text)

    def tokenize_document(self, text: str, *, parse_special: bool = False) -> NDArray[np.int32]:
        """Token ids ``(n,)`` of a text that is no prompt, as llama.cpp's tools cut it.

        Args:
            text: Any; what the vocabulary puts at a text's ends is added.
            parse_special: Literal special tokens become their ids.
        """
        return self._model.tokenize_document(text, parse_special=parse_special)

    @property
    def bos(self) -> int | None:
        """The token that the vocabulary puts before a text; None where it puts none."""
        return self._model.bos

    def token_bytes(self, token: int) -> bytes:
        """Bytes to show for a token; none for control tokens that are no tags."""
        tag = self._tag_ids.get(token)
        return tag if tag is not None else self._model.token_bytes(token, special=False)

    def encode_image(self, pixels: NDArray[np.uint8], grid: tuple[int, int]) -> ImageEmbedding:
        """Run the vision tower over ``(height, width, 3)`` RGB pixels.

        Raises:
            ImageError: A text-only engine.
            Stopped: See `watch`.
            EngineError: libmtmd failed.
        """
        if self._mmproj is None or self._info.vision is None:
            raise ImageError(
                f"{self._info.name}: takes no images",
                hint="load the model together with its mmproj file",
            )
        return_free_memory()  # what decoding the screenshot has left behind
        n_tokens = grid[0] * grid[1]
        if self._tower is not None and n_tokens > self._tower.max_image_tokens:
            self._close_tower()
        if self._tower is None:
            if self._residency is not None:
                self._residency.give_way()
            self._tower = self._open_tower(self._mmproj, self._info.vision, n_tokens)
        try:
            with HeldInterrupts(self._stop):
                return ImageEmbedding(self._tower.encode(pixels, grid, self._stop), grid)
        finally:
            if self._tower_on_demand:
                self._close_tower()

    def _open_tower(self, mmproj: Path, limits: VisionLimits, n_tokens: int) -> VisionTower:
        # No tower of this family takes more: its position grid is stretched over the image.
        tower = VisionTower(
            mmproj,
            self._model,
            n_threads=self._n_threads,
            flash_attn=self._flash_attn,
            max_image_tokens=max(limits.max_tokens, n_tokens),
            device=self._tower_device,
        )
        if self._tower_on_demand and self._cache_is_scarce():
            forget_file(mmproj)  # it lies in memory now; its cached pages would push others out
        return tower

    def _close_tower(self) -> None:
        if self._tower is not None:
            self._tower.close()
            self._tower = None
            return_free_memory()

    def keep(self, n: int) -> None:
        """Forget all that was evaluated but the first ``n`` pieces of `content`."""
        self.content.cut(n)

    def watch(self, stop: StopFlag) -> None:
        """End evaluation with `Stopped` when a flag is set, from now on."""
        self._context.watch(stop)
        self._stop = stop

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        """Evaluate at most `n_batch` tokens after what was evaluated so far.

        Whatever is raised, `content` is as it was before.

        Raises:
            ContextFullError: They do not fit n_ctx.
            Stopped: See `watch`.
            EngineError: llama.cpp failed.
        """
        with self._evaluation():
            self._context.decode_tokens(list(tokens), n_outputs=n_outputs)
            self.content.add(tokens)

    def eval_image(self, image: ImageEmbedding, *, whole: bool = False) -> None:
        """Evaluate an encoded image after what was evaluated so far; errors as `eval_tokens`.

        Args:
            image: Its embeddings.
            whole: Let all its cells pass the whole last layer, not the last one alone: for those
                who watch. Needs as many outputs a batch as there are tokens in one.
        """
        with self._evaluation():
            self._context.decode_image(image.data, image.grid, whole=whole)
            self.content.add([ImageCells(image.key, image.grid)])

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """The KV cache is what `content` says when it begins, whatever ended the last one."""
        if self._residency is not None:
            self._residency.begin()
        self._follow()
        self._is_followed = False
        with HeldInterrupts(self._stop):
            yield
        self._is_followed = True

    def _follow(self) -> None:
        """Empty the KV cache from where `content` ends; a batch that failed may have left cells."""
        content, context = self.content, self._context
        wanted = (content.n_cells, content.position)
        if not self._is_followed or (context.n_past, context.position) != wanted:
            context.truncate(*wanted)
            self._is_followed = True

    def state_bytes(self, pieces: Sequence[Piece]) -> int:
        """Size of the file that `save_state` writes for some pieces."""
        return self._layout.n_bytes(count_cells(pieces))

    def save_state(self, path: Path) -> None:
        """Write the KV state of all of `content` to a file.

        Holds a copy of the keys or values of one layer: in f16, 512 bytes a cell of the 9B.

        Raises:
            EngineError: It could not be written, or not so that it can be read back.
        """
        self._follow()
        self._context.save_state(path)
        try:
            self._layout.check(path, lay_out(self.content.pieces))
        except SavedSessionError as error:
            raise EngineError(f"KV state: llama.cpp wrote another one ({error.message})") from error

    def load_state(self, path: Path, pieces: Sequence[Piece]) -> None:
        """Take a saved KV state in place of what was evaluated.

        Raises:
            SavedSessionError: It is not these pieces' state, or larger than n_ctx; all is as it
                was.
            EngineError: llama.cpp refused it; nothing is kept then.
        """
        held = Content()
        held.add(pieces)
        if held.n_cells > self._info.n_ctx:
            raise SavedSessionError(
                f"KV state: larger than the context ({held.n_cells} cells, n_ctx "
                f"{self._info.n_ctx})",
                hint="raise n_ctx",
            )
        self._layout.check(path, lay_out(pieces))
        self.content.cut(0)
        self._context.load_state(path, held.n_cells, held.position)
        self.content.add(pieces)

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits ``(n_vocab,)`` of one of the last batch's outputs, copied."""
        return self._context.logits(index).copy()

    def open_sampler(self, params: SamplingParams) -> _LlamaSampler:
        """A fresh sampler over this engine's logits."""
        return _LlamaSampler(SamplerChain(self._model, params), self._context)

    def open_grammar(self, schema: str) -> GrammarState:
        """The grammar of the JSON documents that a JSON schema describes.

        Raises:
            ValueError: The schema cannot be turned into a grammar.
        """
        return GrammarState(self._model, schema_to_grammar(schema))

    def close(self) -> None:
        """Free the vision tower, the context and the weights."""
        self._close_tower()
        self._context.close()
        if self._residency is not None:
            self._residency.close()
            self._residency = None
        self._model.close()
        return_free_memory()


def _largest_image(limits: VisionLimits | None, params: ContextParams) -> int:
    """Image tokens of it: the plan counts one such image's embeddings as kept."""
    if limits is None:
        return 0
    return min(limits.max_tokens, params.max_image_tokens or params.n_ctx, params.n_ctx)


class _LlamaSampler:
    def __init__(self, chain: SamplerChain, context: LlamaContext) -> None:
        self._chain, self._context = chain, context
        self.output = 0

    def sample(self, among: NDArray[np.int32] | None = None) -> int:
        return self._chain.sample(self._context, among, output=self.output)

    def accept(self, token: int) -> None:
        self._chain.accept(token)

    def close(self) -> None:
        self._chain.close()
