"""A checkpoint and a limit in, a type for every matrix out.

The order of work: the limit is checked against the smallest mix first, so that what cannot be met
costs nothing; then the weights are measured and the mix is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autoglm_gguf.checkpoint.config import ModelConfig
from autoglm_gguf.checkpoint.safetensors import LazyTensor
from autoglm_gguf.conversion.fit import (
    Fit,
    Layout,
    Mix,
    candidate_types,
    check_limit,
    choose_mix,
    least_bytes,
)
from autoglm_gguf.conversion.limits import FileLimit, RunLimit, with_table
from autoglm_gguf.conversion.recipe import OUTTYPES, PADDED_MULTIPLE, Outtype, Recipe, padded_width
from autoglm_gguf.conversion.rounding import measure_rounding
from autoglm_gguf.conversion.sensitivity import sensitivities
from autoglm_gguf.conversion.tensors import OutTensor, plan_mmproj, plan_text
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.header import Header
from autoglm_gguf.memory.plan import MemoryPlan
from autoglm_gguf.native.ggml import GGMLType
from autoglm_gguf.progress import OnProgress

_TOWER = "q8_0"  # taps are decided there: it gets no less, and more only where nothing is short
_LAVISH_TOWER = "f16"


@dataclass(frozen=True, slots=True)
class FitReport:
    """What was chosen for a limit, and how well it is known."""

    fit: Fit
    imatrix: str | None
    """Name of the importance matrix's file."""
    types: Mapping[str, int]
    """Matrices of the text by type, ggml's names, the type with the most bytes first."""
    estimated_error: float
    sampling_error: float
    gap: float
    """These three: see `Mix`."""
    plan: MemoryPlan | None
    """Of the run; None where only the text file is limited."""

    def keys(self) -> dict[str, int | float | str]:
        """What the text file's header says of it."""
        fit = self.fit
        found: dict[str, int | float | str] = {
            "limit": "run" if self.plan else "text file",
            "limit_bytes": fit.limit_bytes,
            "prefer": fit.prefer,
            "backend": fit.backend,
            "imatrix": self.imatrix or "none",
            "types": ", ".join(f"{kind} ×{n}" for kind, n in self.types.items()),
            "estimated_error": self.estimated_error,
            "sampling_error": self.sampling_error,
            "gap": self.gap,
        }
        if self.plan is not None:
            found |= {
                "n_ctx": fit.n_ctx,
                "image_tokens": fit.image_tokens,
                "planned_peak_bytes": self.plan.peak_bytes,
                "planned_weights": self.plan.weights,
            }
        return {names.FIT_PREFIX + key: value for key, value in found.items()}


@dataclass(frozen=True, slots=True)
class Fitted:
    """The types of both files."""

    recipe: Recipe
    """Of the text."""
    ffn_width: int
    outtype: Outtype
    """The type with the most weights, for what names one."""
    mmproj_outtype: Outtype
    report: FitReport


class Fitter:
    """Finds types for one checkpoint.

    Args:
        fit: The limit.
        tensors: The checkpoint's.
        config: Its shapes.
        recipe: Exceptions and the importance matrix; its outtype does not count.
        mmproj_outtype: The vision tower's; None leaves it to the fit.
        text_keys: Header of the text file, without tensors.
        mmproj_keys: Header of the mmproj, without tensors; None without one.

    Raises:
        ConversionError: An exception asks for a type that the backend lacks.
        GGUFError: The importance matrix belongs to another model.
    """

    def __init__(
        self,
        fit: Fit,
        tensors: Mapping[str, LazyTensor],
        config: ModelConfig,
        recipe: Recipe,
        mmproj_outtype: Outtype | None,
        text_keys: Header,
        mmproj_keys: Header | None,
    ) -> None:
        self._fit, self._tensors, self._config = fit, tensors, config
        self._recipe = replace(recipe, outtype=OUTTYPES["f16"], search=True)
        self._mmproj_outtype = mmproj_outtype
        self._text_keys, self._mmproj_keys = text_keys, mmproj_keys
        self._layouts = tuple(self._lay_out())
        self._candidates = [candidate_types(each, self._recipe, fit) for each in self._layouts]

    @property
    def least_bytes(self) -> int:
        """What the matrices of both files take in the smallest types."""
        return least_bytes(self._layouts, self._candidates) + sum(
            tensor.n_bytes for tensor in self._tower(self._mmproj_outtype or OUTTYPES[_TOWER])
        )

    def check(self) -> None:
        """Refuse a limit that no mix meets; costs nothing.

        Raises:
            DoesNotFitError: Names the smallest limit that could be met.
        """
        limit = self._limit(self._mmproj_outtype or OUTTYPES[_TOWER])
        check_limit(self._layouts, self._candidates, limit)

    def find(self, *, n_threads: int, on_progress: OnProgress | None) -> Fitted:
        """Measure and choose, once the limit is known to be met.

        Raises:
            CheckpointError: A measured row holds NaN or infinity.
        """
        layouts, candidates = self._layouts, self._candidates
        mmproj = self._mmproj_outtype or OUTTYPES[_TOWER]
        limit = self._limit(mmproj)
        widest = layouts[-1].tensors
        errors = measure_rounding(
            widest, _join(candidates), n_threads=n_threads, on_progress=on_progress
        )
        weights = sensitivities(widest)
        mix = choose_mix(layouts, candidates, errors, weights, limit)
        if self._mmproj_outtype is None and _is_lavish(mix):
            richer = self._limit(OUTTYPES[_LAVISH_TOWER])
            if richer.serves(mix.layout, mix.types):
                limit, mmproj = richer, OUTTYPES[_LAVISH_TOWER]
        return self._conclude(mix, mmproj, limit)

    def _lay_out(self) -> Iterator[Layout]:
        """The text as published and, where that differs, padded for 256-block types."""
        text = self._config.text
        width = text.intermediate_size
        widest = -(-width // PADDED_MULTIPLE) * PADDED_MULTIPLE
        asked = padded_width(self._recipe, width, text.num_hidden_layers)
        for each in dict.fromkeys((asked, widest)):
            tensors = plan_text(self._tensors, self._config, self._recipe, ffn_width=each)
            yield Layout(each, tuple(tensors))

    def _limit(self, mmproj: Outtype) -> FileLimit | RunLimit:
        if self._fit.weights is not None:
            return FileLimit(self._fit, self._text_keys)
        tower = None
        if self._mmproj_keys is not None:
            tower = with_table(self._mmproj_keys, self._tower(mmproj), {})
        return RunLimit(self._fit, self._text_keys, tower)

    def _tower(self, mmproj: Outtype) -> list[OutTensor]:
        return plan_mmproj(self._tensors, self._config, Recipe(mmproj))

    def _conclude(self, mix: Mix, mmproj: Outtype, limit: FileLimit | RunLimit) -> Fitted:
        plan = limit.plan(mix.layout, mix.types) if isinstance(limit, RunLimit) else None
        imatrix, counts = self._recipe.imatrix, mix.count_types()
        report = FitReport(
            self._fit,
            None if imatrix is None else imatrix.path.name,
            {kind.name: n for kind, n in counts.items()},
            mix.estimated_error,
            mix.sampling_error,
            mix.gap,
            plan,
        )
        most = next(iter(counts), GGMLType.F32)  # none is chosen where exceptions name them all
        outtype = next(o for o in OUTTYPES.values() if o.ggml_type == most)
        recipe = replace(self._recipe, chosen=mix.types)
        return Fitted(recipe, mix.layout.ffn_width, outtype, mmproj, report)


def _join(candidates: Sequence[Mapping[str, tuple[GGMLType, ...]]]) -> dict[str, list[GGMLType]]:
    """What has to be measured for any layout."""
    found: dict[str, list[GGMLType]] = {}
    for kinds in candidates:
        for name, types in kinds.items():
            have = found.setdefault(name, [])
            have += [kind for kind in types if kind not in have]
    return found


def _is_lavish(mix: Mix) -> bool:
    """Nothing is short: every matrix is as good as it can be."""
    return all(kind == GGMLType.F16 for kind in mix.types.values())
