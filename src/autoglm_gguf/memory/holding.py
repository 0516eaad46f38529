"""What a choice of sizes and places costs: bytes per phase, and which layers stay.

Arithmetic over one pair's shapes; searches nothing (that is ``levers``) and loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from autoglm_gguf.config import ContextParams
from autoglm_gguf.gguf.describe import ModelDescription
from autoglm_gguf.memory import estimate
from autoglm_gguf.memory.estimate import TextShape, TowerShape
from autoglm_gguf.memory.residency import LAYERS_AHEAD
from autoglm_gguf.native import pages
from autoglm_gguf.native.ggml import Device, can_repack

Weights: TypeAlias = Literal["repacked", "mapped", "streamed"]
FLOOR_BYTES = 72_000_000
"""Python, numpy, Pillow and the libraries' pages: measured, Linux x86-64."""
READ_AHEAD = "read_ahead"
"""The item for pages that are in the page cache but not yet in the process."""
_VULKAN = "Vulkan"  # ggml-vulkan's registry name
DECODED_PIXEL_BYTES = 8
"""RGBA and RGB: Pillow's pixels take 4 bytes."""
SCREEN_BYTES = 1080 * 2400 * DECODED_PIXEL_BYTES
"""A decoded screenshot: of each image so much is planned for."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that takes memory."""

    name: str
    load_bytes: int
    encode_bytes: int
    decode_bytes: int
    reason: str
    on_device: bool = False
    """In a GPU's buffers, which may be the machine's main memory too."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One point in the space of choices."""

    params: ContextParams
    weights: Weights
    """``repacked``: copied into kernel order; ``mapped``: the file's own pages; ``streamed``: some
    layers copied, the others read and dropped for every batch."""
    tower_on_demand: bool
    gives_way: bool
    """Mapped layers are dropped while an image is encoded."""


@dataclass(frozen=True, slots=True)
class Places:
    """Which layers lie where; those in none of the three are mapped for good."""

    copied: tuple[int, ...] = ()
    """In anonymous memory."""
    streamed: tuple[int, ...] = ()
    """Read and dropped for every batch."""
    yielding: tuple[int, ...] = ()
    """Mapped, and dropped while an image is encoded."""


class Holding:
    """Evaluates choices for one pair.

    ``usable``, in every method, is the bytes that may be held: it decides how many layers give way
    or are streamed, where the choice allows that.

    Args:
        described: The pair.
        floor_bytes: What the process holds without the model.
        devices: The GPUs that layers may go to.
        reserved_bytes: What the program holds for its own work while the model answers.
    """

    def __init__(
        self,
        described: ModelDescription,
        floor_bytes: int,
        devices: Sequence[Device] = (),
        reserved_bytes: int = 0,
    ) -> None:
        self.text: TextShape = estimate.text_shape(described.text)
        tower = described.mmproj
        self.tower: TowerShape | None = None if tower is None else estimate.tower_shape(tower)
        self.repacks = _repacks(described)
        """Most of the layers' weights have faster kernels in another order on this CPU."""
        self.devices = tuple(devices)
        self.can_page = pages.SUPPORTED and estimate.layers_lie_together(described.text)
        """Layers can be dropped and read one by one."""
        self._limits = described.vision
        self._floor_bytes, self._reserved_bytes = floor_bytes, reserved_bytes
        # While a tensor is copied, its pages are in the mapping too.
        self._touched_bytes = max(self.text.output_bytes, *self.text.layer_bytes)

    def peak(self, choice: Choice, usable: int) -> int:
        """Bytes at the worst moment."""
        return max(self.phases(choice, usable).values())

    def phases(self, choice: Choice, usable: int) -> dict[str, int]:
        """Bytes at the worst moment of each phase; no encode without a tower."""
        sums = sum_phases(self.items(choice, usable))
        if self.tower is None:
            del sums["encode"]
        return sums

    def items(self, choice: Choice, usable: int) -> tuple[Item, ...]:
        """Everything that is held."""
        return (
            *self._base(choice),
            *self._vision(choice),
            *self._weights(choice, self.places(choice, usable)),
        )

    def image_tokens(self, params: ContextParams) -> int:
        """The largest image that can come; 0 without a tower. What exceeds n_ctx is refused."""
        if self._limits is None:
            return 0
        most = self._limits.max_tokens
        if params.max_image_tokens is not None:
            most = min(most, params.max_image_tokens)
        return min(most, params.n_ctx)

    def n_on_device(self, params: ContextParams) -> int:
        """Layers on the GPU, the last ones; the output, which goes first, is not one of them."""
        return max(0, params.n_gpu_layers - 1)

    def tower_on_device(self, params: ContextParams) -> bool:
        """Whether the vision tower runs on the GPU."""
        if params.n_gpu_layers == 0 or params.mmproj_offload is not None:
            return params.n_gpu_layers > 0 and bool(params.mmproj_offload)
        return all(device.backend != _VULKAN for device in self.devices)

    def device_weights_bytes(self, params: ContextParams) -> int:
        """Text weights in GPU buffers."""
        text, first = self.text, self.text.n_layers - self.n_on_device(params)
        if params.n_gpu_layers == 0:
            return 0
        # The output matrix: a second copy of the embedding where the model has only that.
        output = text.output_bytes or text.token_embd_bytes
        return output + text.norm_bytes + self.layers_bytes(range(first, text.n_layers))

    def host_weights_bytes(self, params: ContextParams) -> int:
        """Text weights in main memory; the token embedding always is."""
        if params.n_gpu_layers == 0:
            return self.text.weights_bytes
        first = self.text.n_layers - self.n_on_device(params)
        rest = self.text.other_bytes - self.text.norm_bytes
        return self.text.token_embd_bytes + rest + self.layers_bytes(range(first))

    def cached_bytes(self, choice: Choice, places: Places) -> int:
        """What is read from files again and again, and so should stay in the page cache."""
        mapped = 0 if choice.weights == "repacked" else self.host_weights_bytes(choice.params)
        if choice.weights == "streamed":
            mapped -= self.layers_bytes(places.copied) + self._lasting(choice.params)
        again = choice.tower_on_demand and self.tower is not None
        return mapped + (self.tower.weights_bytes if again and self.tower else 0)

    def layers_bytes(self, layers: Sequence[int]) -> int:
        """Weights of some layers."""
        return sum(self.text.layer_bytes[layer] for layer in layers)

    def places(self, choice: Choice, usable: int) -> Places:
        """Which layers lie where."""
        if choice.weights == "streamed":
            return self._streamed_places(choice, usable)
        if not choice.gives_way:
            return Places()
        others = sum_phases([*self._base(choice), *self._vision(choice)])
        excess = self.host_weights_bytes(choice.params) + others["encode"] - usable
        yielding: list[int] = []
        for layer in reversed(range(self.text.n_layers - self.n_on_device(choice.params))):
            if excess <= 0:
                break
            yielding.insert(0, layer)
            excess -= self.text.layer_bytes[layer]
        return Places(yielding=tuple(yielding))

    def _streamed_places(self, choice: Choice, usable: int) -> Places:
        text, lasting = self.text, self._lasting(choice.params)
        n_layers = text.n_layers - self.n_on_device(choice.params)
        others = sum_phases([*self._base(choice), *self._vision(choice)])
        largest = max(1, *text.layer_bytes)
        window = min(n_layers, LAYERS_AHEAD + 1) * largest
        n_kept = (usable - others["decode"] - lasting - window) // largest
        n_kept = max(0, min(n_layers - 1, n_kept))
        # What is copied stays through the load and through every image.
        tightest = max(others["load"] + self._touched_bytes, others["encode"])
        n_copied = max(0, min(n_kept, (usable - tightest - lasting) // largest))
        streamed = _spread(n_layers, n_layers - n_kept)
        kept = [layer for layer in range(n_layers) if layer not in streamed]
        return Places(tuple(kept[:n_copied]), streamed, tuple(kept[n_copied:]))

    def _base(self, choice: Choice) -> list[Item]:
        """What is held in every phase, whatever is chosen for the weights."""
        text, params = self.text, choice.params
        n_away = self.n_on_device(params)
        work = estimate.work_bytes(text, params) if n_away < text.n_layers else 0
        n_outputs = params.n_outputs_max
        compute = estimate.graph_bytes(text, params, n_outputs=n_outputs)
        if n_away == text.n_layers:
            compute = estimate.input_bytes(text, params)
        kv_cache = estimate.kv_cache_bytes(text, params.n_ctx, params.type_k, params.type_v)
        kv_away = kv_cache * n_away // text.n_layers if params.offload_kqv else 0
        cells = f"{params.n_ctx} cells, "
        cells += "/".join(dict.fromkeys((params.type_k, params.type_v)))
        outputs = estimate.output_bytes(text, n_outputs)
        batch = f"{min(params.n_batch, params.n_ctx)} tokens a batch"
        logits = f"{batch}, logits of {n_outputs}"
        own: list[tuple[str, int, str]] = [
            ("process", self._floor_bytes, "Python and libraries"),
            ("vocabulary", estimate.vocabulary_bytes(text), f"{text.n_vocab} tokens"),
            ("kv_cache", kv_cache - kv_away, cells),
            ("compute", compute + work + outputs, logits),
        ]
        if self._reserved_bytes:
            own.append(("reserved", self._reserved_bytes, "for the program's own work"))
        # KV cache and compute come after the weights, when what was held for loading has gone.
        later = ("kv_cache", "compute", "reserved")
        items = [Item(name, 0 if name in later else n, n, n, reason) for name, n, reason in own]
        sampling = estimate.sampling_bytes(text)
        items.append(Item("sampling", 0, 0, sampling, "candidates, and what holds an answer"))
        items.insert(
            2, Item("loading", estimate.loading_bytes(text), 0, 0, "the file's vocabulary")
        )
        if params.n_gpu_layers:
            where = "on " + ", ".join(device.name for device in self.devices)
            graph = estimate.device_graph_bytes(text, params, n_outputs=n_outputs)
            away = (
                ("gpu_weights", self.device_weights_bytes(params), f"{_layers(n_away)} {where}"),
                ("gpu_kv_cache", kv_away, f"of these layers, {where}"),
                ("gpu_compute", graph, f"{batch}, {where}"),
            )
            items += [
                Item(name, n if name == "gpu_weights" else 0, n, n, reason, on_device=True)
                for name, n, reason in away
            ]
        return items

    def _vision(self, choice: Choice) -> list[Item]:
        if self.tower is None:
            return []
        n_tokens = self.image_tokens(choice.params)
        scratch = estimate.encode_bytes(self.tower, n_tokens)
        image = estimate.embedding_bytes(self.tower, n_tokens)
        weights, screen = self.tower.weights_bytes, SCREEN_BYTES
        stays = 0 if choice.tower_on_demand else 1
        how = "loaded for each image" if choice.tower_on_demand else "resident from the first image"
        most, away = f"{n_tokens} image tokens at most", self.tower_on_device(choice.params)
        return [
            Item("tower", 0, weights, stays * weights, how, on_device=away),
            Item("encode", 0, scratch, stays * scratch, most, on_device=away),
            # A screenshot is decoded before the tower is loaded: while everything else is held.
            Item("image", 0, screen + 2 * image, screen + image, "pixels and embeddings"),
        ]

    def _weights(self, choice: Choice, places: Places) -> list[Item]:
        text = self.text
        total = self.host_weights_bytes(choice.params)
        if choice.weights == "repacked":
            why = "copied into the kernels' order"
            # A tensor is staged before it is copied, but llama.cpp takes the largest ones first.
            return [Item("weights", total, total, total, why)]
        if choice.weights == "mapped":
            left = total - self.layers_bytes(places.yielding)
            return [Item("weights", total, left, total, "the file's own pages")]
        kept = self.layers_bytes(places.copied) + self._lasting(choice.params)
        largest = max(text.layer_bytes)
        ahead = min(len(places.streamed) - 1, LAYERS_AHEAD) * largest
        counts = (
            f"{len(places.copied)} layers copied, {len(places.yielding)} mapped, "
            f"{len(places.streamed)} streamed one at a time"
        )
        held = kept + self.layers_bytes(places.yielding) + largest
        loading = kept + self._touched_bytes
        return [
            Item("weights", loading, kept, held, counts),
            Item(READ_AHEAD, 0, 0, ahead, "in the page cache, before it is used"),
        ]

    def _lasting(self, params: ContextParams) -> int:
        """Read for every token on the CPU, and in no layer."""
        text = self.text
        if params.n_gpu_layers:
            return text.other_bytes - text.norm_bytes
        return (
            text.output_bytes
            + text.other_bytes
            + (0 if text.output_bytes else text.token_embd_bytes)
        )


def sum_phases(items: Sequence[Item]) -> dict[str, int]:
    """Bytes of all items in each phase."""
    return {
        "load": sum(item.load_bytes for item in items),
        "encode": sum(item.encode_bytes for item in items),
        "decode": sum(item.decode_bytes for item in items),
    }


def _layers(n: int) -> str:
    return "the output" if n == 0 else f"the last {n} layers and the output"


def _spread(n_layers: int, n_chosen: int) -> tuple[int, ...]:
    """Layers spread evenly: between two streamed ones there is time to read."""
    return tuple(int((at + 0.5) * n_layers / n_chosen) for at in range(n_chosen))


def _repacks(described: ModelDescription) -> bool:
    total = fast = 0
    for tensor in described.text.tensors.values():
        if len(tensor.shape) == 2 and estimate.layer_of(tensor.name) is not None:
            total += tensor.n_bytes
            if can_repack(tensor.ggml_type, *tensor.shape):
                fast += tensor.n_bytes
    return 2 * fast > total
