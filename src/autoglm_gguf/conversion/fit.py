"""The types of all matrices such that a run, or a file, keeps within a number of bytes.

What each type does to each matrix has been measured (``rounding``) and is weighed
(``sensitivity``); a knapsack chooses, and a `Limit` says whether a choice fits. Knows nothing of
how tensors are encoded, files written, or memory planned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from autoglm_gguf.config import ContextParams
from autoglm_gguf.conversion.backends import BACKEND_TYPES, SLOW_ON_CPU
from autoglm_gguf.conversion.knapsack import Allocation, Knapsack, Option
from autoglm_gguf.conversion.recipe import OUTTYPES, Recipe
from autoglm_gguf.conversion.rounding import Errors
from autoglm_gguf.conversion.tensors import OutTensor
from autoglm_gguf.errors import ConversionError
from autoglm_gguf.memory.budget import MOST_BYTES, Budget, parse_budget
from autoglm_gguf.native.ggml import GGMLType, block_size
from autoglm_gguf.units import parse_bytes

Prefer: TypeAlias = Literal["quality", "speed"]
PREFERENCES: tuple[Prefer, ...] = ("quality", "speed")
# Of the GLM family's weights 1 %, read for every token that is looked back at: never under 6 bits.
_KEPT_HIGH = ("attn_k.weight", "attn_v.weight")
_HIGH = frozenset((GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16))
_CANDIDATES = tuple(kind.ggml_type for key, kind in OUTTYPES.items() if key not in ("f32", "bf16"))
_STEPS = 1 << 17  # how finely the size of the weights is searched


@dataclass(frozen=True, slots=True)
class Fit:
    """What a converted pair must fit into.

    Raises:
        ValueError: Neither or both of budget and weights are given, or a value is out of range.
        TypeError: A size that is neither a number of bytes nor text.
    """

    budget: Budget = None
    """Of the whole run, as ``memory_budget`` of `plan_memory`: bytes, ``"4GB"``, ``"4GiB"``."""
    weights: int | str | None = None
    """Of the text file alone, its header included; bytes, ``"3.3GB"``, ``"3GiB"``."""
    n_ctx: int = 4096
    """KV cells of the run."""
    image_tokens: int = 1024
    """Largest image of the run."""
    prefer: Prefer = "quality"
    """``speed`` leaves out the types that decode slowly on CPUs."""
    backend: str = "cpu"
    """Where it will run, a key of `BACKEND_TYPES`: types that it lacks are left out."""

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.weights is None):
            raise ValueError("fit: give either the budget of the run or the size of the weights")
        if self.prefer not in PREFERENCES:
            raise ValueError(f"prefer {self.prefer!r}: not one of {', '.join(PREFERENCES)}")
        if self.backend not in BACKEND_TYPES:
            raise ValueError(f"backend {self.backend!r}: not one of {', '.join(BACKEND_TYPES)}")
        self.context()
        if not 0 < self.limit_bytes <= MOST_BYTES:
            raise ValueError("fit: no size, or more than any machine has (write for example 4GB)")

    @property
    def limit_bytes(self) -> int:
        """The size, of the run or of the text file."""
        if self.weights is None:
            return parse_budget(self.budget) or 0
        if isinstance(self.weights, bool) or not isinstance(self.weights, int | str):
            raise TypeError(f"fit: weights {self.weights!r}: not a size (write for example 4GB)")
        return parse_bytes(self.weights) if isinstance(self.weights, str) else self.weights

    @property
    def option(self) -> str:
        """How the command line calls the limit."""
        return "--fit" if self.weights is None else "--fit-weights"

    @property
    def label(self) -> str:
        """For the file's name: ``FIT_4GB``, ``FIT_3200KB``."""
        n_bytes = self.limit_bytes
        for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
            if n_bytes % factor == 0:
                return f"FIT_{n_bytes // factor}{unit}"
        return f"FIT_{n_bytes}B"

    def context(self) -> ContextParams:
        """The sizes of the run."""
        return ContextParams(n_ctx=self.n_ctx, max_image_tokens=self.image_tokens)


@dataclass(frozen=True, slots=True)
class Layout:
    """The text's tensors at one feed-forward width; the types are those that nobody chooses."""

    ffn_width: int
    tensors: tuple[OutTensor, ...]


class Limit(Protocol):
    """What a choice of types has to keep within."""

    def serves(self, layout: Layout, types: Mapping[str, GGMLType]) -> bool:
        """Whether the text in these types fits."""

    def refuse(self, layout: Layout, types: Mapping[str, GGMLType]) -> None:
        """Raise, naming the limit that would let these types fit; they are the smallest."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A type for every matrix of the text, and how well the choice is known."""

    layout: Layout
    types: Mapping[str, GGMLType]
    estimated_error: float
    """Sum over the matrices of relative error times sensitivity."""
    sampling_error: float
    """Standard error of ``estimated_error``: not all rows were measured."""
    gap: float
    """Share of ``estimated_error`` by which it may lie above the least of any mix of this size."""

    def count_types(self) -> dict[GGMLType, int]:
        """Matrices by type, the type with the most bytes first."""
        sizes: Counter[GGMLType] = Counter()
        for tensor in self.layout.tensors:
            if tensor.name in self.types:
                kind = self.types[tensor.name]
                sizes[kind] += tensor.n_bytes_as(kind)
        counts = Counter(self.types.values())
        return {kind: counts[kind] for kind, _ in sizes.most_common()}


def candidate_types(layout: Layout, recipe: Recipe, fit: Fit) -> dict[str, tuple[GGMLType, ...]]:
    """The types that each matrix may get; what an exception names has no other.

    Raises:
        ConversionError: An exception asks for a type that the backend lacks.
    """
    tied = all(tensor.name != "output.weight" for tensor in layout.tensors)
    found: dict[str, tuple[GGMLType, ...]] = {}
    for tensor in layout.tensors:
        if tensor.ggml_type == GGMLType.F32:
            continue
        looked_up = tensor.name == "token_embd.weight" and not tied  # on the CPU, row by row
        allowed = frozenset(GGMLType) if looked_up else BACKEND_TYPES[fit.backend]
        if any(pattern.search(tensor.name) for pattern, _ in recipe.overrides):
            if tensor.ggml_type not in allowed:
                raise ConversionError(
                    f"{tensor.name}: {fit.backend} cannot multiply with {tensor.ggml_type.name}, "
                    "which an exception asks for",
                    hint="leave that --tensor-type out, or name another --backend",
                )
            found[tensor.name] = (tensor.ggml_type,)
            continue
        if fit.prefer == "speed" and not looked_up:
            allowed -= SLOW_ON_CPU
        if tensor.name.endswith(_KEPT_HIGH):
            allowed &= _HIGH
        found[tensor.name] = tuple(
            kind
            for kind in _CANDIDATES
            if kind in allowed
            and tensor.n_per_row % block_size(kind) == 0
            and not recipe.lacks_imatrix(tensor.name, kind)
        )
    return found


def check_limit(
    layouts: Sequence[Layout],
    candidates: Sequence[Mapping[str, tuple[GGMLType, ...]]],
    limit: Limit,
) -> None:
    """Refuse a limit that no mix meets, before anything is measured.

    Raises:
        DoesNotFitError: Names the smallest limit that could be met.
    """
    smallest = [_smallest(layout, kinds) for layout, kinds in zip(layouts, candidates, strict=True)]
    for layout, (types, _) in zip(layouts, smallest, strict=True):
        if limit.serves(layout, types):
            return
    at = min(range(len(layouts)), key=lambda i: smallest[i][1])
    limit.refuse(layouts[at], smallest[at][0])


def least_bytes(
    layouts: Sequence[Layout], candidates: Sequence[Mapping[str, tuple[GGMLType, ...]]]
) -> int:
    """What the matrices of the text take in the smallest types."""
    return min(_smallest(*both)[1] for both in zip(layouts, candidates, strict=True))


def choose_mix(
    layouts: Sequence[Layout],
    candidates: Sequence[Mapping[str, tuple[GGMLType, ...]]],
    errors: Errors,
    sensitivities: Mapping[str, float],
    limit: Limit,
) -> Mix:
    """The mix of least estimated error that a limit lets through.

    Args:
        layouts: The ways the text can be laid out.
        candidates: Types by matrix, for each layout.
        errors: Of every matrix in every candidate type.
        sensitivities: What a relative error of 1 in a matrix costs, by name.
        limit: Must let the smallest types of one layout through, see `check_limit`.
    """
    mixes = [
        mix
        for layout, kinds in zip(layouts, candidates, strict=True)
        if (mix := _Choice(layout, kinds, errors, sensitivities).find(limit)) is not None
    ]
    return min(mixes, key=lambda mix: mix.estimated_error)


class _Choice:
    """One layout's knapsack."""

    def __init__(
        self,
        layout: Layout,
        candidates: Mapping[str, tuple[GGMLType, ...]],
        errors: Errors,
        sensitivities: Mapping[str, float],
    ) -> None:
        self._layout, self._candidates = layout, candidates
        self._errors, self._sensitivities = errors, sensitivities
        self._matrices = [tensor for tensor in layout.tensors if tensor.name in candidates]
        self._options = [self._list_options(tensor) for tensor in self._matrices]
        self._most_bytes = sum(max(o.n_bytes for o in options) for options in self._options)

    def _list_options(self, tensor: OutTensor) -> list[Option]:
        weight, errors = self._sensitivities[tensor.name], self._errors[tensor.name]
        return [
            Option(tensor.n_bytes_as(kind), weight * errors[kind].relative)
            for kind in self._candidates[tensor.name]
        ]

    def find(self, limit: Limit) -> Mix | None:
        """The largest size whose best choice the limit lets through; None if none is."""
        knapsack = Knapsack(self._options, self._most_bytes)
        low, high = knapsack.least_bytes, self._most_bytes
        best = self._serving(knapsack, low, limit)
        if best is None:
            return None
        largest = self._serving(knapsack, high, limit)
        if largest is not None:
            return self._describe(knapsack, largest, high)
        step = max(1, high // _STEPS)
        while high - low > step:
            middle = (low + high) // 2
            found = self._serving(knapsack, middle, limit)
            if found is None:
                high = middle
            else:
                low, best = middle, found
        return self._describe(knapsack, best, low)

    def _serving(self, knapsack: Knapsack, n_bytes: int, limit: Limit) -> Allocation | None:
        found = knapsack.choose(n_bytes)
        if found is None or not limit.serves(self._layout, self._types(found)):
            return None
        return found

    def _types(self, allocation: Allocation) -> dict[str, GGMLType]:
        return {
            tensor.name: self._candidates[tensor.name][pick]
            for tensor, pick in zip(self._matrices, allocation.picks, strict=True)
        }

    def _describe(self, knapsack: Knapsack, allocation: Allocation, n_bytes: int) -> Mix:
        types = self._types(allocation)
        variance = sum(
            (self._sensitivities[name] * self._errors[name][kind].standard_error) ** 2
            for name, kind in types.items()
        )
        damage = allocation.damage
        above = max(0.0, damage - knapsack.bound(n_bytes))
        return Mix(self._layout, types, damage, variance**0.5, above / damage if damage else 0.0)


def _smallest(
    layout: Layout, candidates: Mapping[str, tuple[GGMLType, ...]]
) -> tuple[dict[str, GGMLType], int]:
    """The smallest types, and the bytes of the matrices in them."""
    types: dict[str, GGMLType] = {}
    n_bytes = 0
    for tensor in layout.tensors:
        if tensor.name in candidates:
            types[tensor.name] = min(candidates[tensor.name], key=tensor.n_bytes_as)
            n_bytes += tensor.n_bytes_as(types[tensor.name])
    return types, n_bytes
