"""What a fitted pair has to keep within: a run's budget as the memory plan counts it, or a size.

Both look at the header that the file will have, made from the real one and other types, so that
what is promised here is what `plan_memory` says of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from autoglm_gguf.conversion.fit import Fit, Layout
from autoglm_gguf.conversion.tensors import OutTensor
from autoglm_gguf.conversion.writer import pad
from autoglm_gguf.errors import ConversionError, DoesNotFitError
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.describe import ModelDescription, describe_headers, describe_pair
from autoglm_gguf.gguf.header import Header, TensorInfo
from autoglm_gguf.memory.holding import Choice, Holding
from autoglm_gguf.memory.levers import MEGABYTE, Search
from autoglm_gguf.memory.plan import MemoryPlan, plan_pair
from autoglm_gguf.native.ggml import GGMLType
from autoglm_gguf.units import format_bytes

# Of a process that runs a model, before it: `holding` takes 72 MB for the least; a command line, a
# server and their libraries come on top. A process that holds still more streams a layer.
HELD_BYTES = 100_000_000
_RECIPE_BYTES = 4096  # what the keys of the recipe add to a header, at most
_FIXED = frozenset(("n_ctx", "max_image_tokens", "n_gpu_layers"))


def with_table(keys: Header, tensors: Sequence[OutTensor], types: Mapping[str, GGMLType]) -> Header:
    """The header that a file of these tensors will have.

    Args:
        keys: The header without tensors, and its size.
        tensors: In the file's order.
        types: By name; the others keep their own.
    """
    start = keys.file_bytes + _RECIPE_BYTES
    start += sum(len(t.name.encode()) + 24 + 8 * len(t.shape) for t in tensors)
    at, table = pad(start), {}
    for tensor in tensors:
        kind = types.get(tensor.name, tensor.ggml_type)
        n_bytes = tensor.n_bytes_as(kind)
        shape = tuple(reversed(tensor.shape))
        table[tensor.name] = TensorInfo(tensor.name, shape, kind, at, n_bytes)
        at = pad(at + n_bytes)
    return replace(keys, tensors=table, file_bytes=at)


def _text_header(keys: Header, layout: Layout, types: Mapping[str, GGMLType]) -> Header:
    width = {names.FEED_FORWARD_LENGTH.format(arch=keys.architecture): layout.ffn_width}
    keys = replace(keys, metadata=keys.metadata | width)
    return with_table(keys, layout.tensors, types)


class FileLimit:
    """The text file is to be no larger than a number of bytes.

    Args:
        fit: The size.
        keys: Of the text file, see `with_table`.
    """

    def __init__(self, fit: Fit, keys: Header) -> None:
        self._fit, self._keys = fit, keys

    def serves(self, layout: Layout, types: Mapping[str, GGMLType]) -> bool:
        """Whether the text in these types fits."""
        return self._size(layout, types) <= self._fit.limit_bytes

    def refuse(self, layout: Layout, types: Mapping[str, GGMLType]) -> None:
        """Raise `DoesNotFitError` with the size of the smallest file."""
        raise _refusal(self._fit, self._keys, self._size(layout, types))

    def _size(self, layout: Layout, types: Mapping[str, GGMLType]) -> int:
        return _text_header(self._keys, layout, types).file_bytes


class RunLimit:
    """A run of the pair is to keep within a budget, its weights resident between two images.

    Every lever of the plan may be pulled but the last, streaming, and those that the fit settles:
    n_ctx and the image's size.

    Args:
        fit: The budget and the sizes of the run.
        keys: Of the text file, see `with_table`.
        tower: Of the mmproj; None without one.
    """

    def __init__(self, fit: Fit, keys: Header, tower: Header | None) -> None:
        self._fit, self._keys, self._tower = fit, keys, tower

    def serves(self, layout: Layout, types: Mapping[str, GGMLType]) -> bool:
        """Whether the text in these types fits."""
        choice = self._search(layout, types).find(self._fit.limit_bytes)
        return choice is not None and _stays(choice)

    def refuse(self, layout: Layout, types: Mapping[str, GGMLType]) -> None:
        """Raise `DoesNotFitError` with the least budget for these types."""
        search = self._search(layout, types)
        least = search.least_budget(self._fit.limit_bytes, lambda choice, _: _stays(choice))
        raise _refusal(self._fit, self._keys, least)

    def plan(self, layout: Layout, types: Mapping[str, GGMLType]) -> MemoryPlan:
        """The plan of a run in these types."""
        return plan_run(self._fit, self._describe(layout, types))

    def _describe(self, layout: Layout, types: Mapping[str, GGMLType]) -> ModelDescription:
        return describe_headers(_text_header(self._keys, layout, types), self._tower)

    def _search(self, layout: Layout, types: Mapping[str, GGMLType]) -> Search:
        return Search(
            Holding(self._describe(layout, types), HELD_BYTES), self._fit.context(), _FIXED
        )


def plan_run(fit: Fit, described: ModelDescription) -> MemoryPlan:
    """The plan of a run as a fit describes it.

    Raises:
        DoesNotFitError: It keeps within the budget under no choice.
    """
    return plan_pair(described, fit.context(), fit.limit_bytes, fixed=_FIXED, held_bytes=HELD_BYTES)


def check_written(fit: Fit, text: Path, mmproj: Path | None) -> None:
    """Hold a written pair to its limit once more, by what its headers say.

    Raises:
        ConversionError: It misses the limit: a mistake of this package.
    """
    described = describe_pair(text, mmproj)
    if fit.weights is not None:
        found = described.text.file_bytes
        misses = found > fit.limit_bytes
    else:
        plan = plan_run(fit, described)
        found = plan.peak_bytes
        misses = plan.weights == "streamed"
    if misses:
        raise ConversionError(
            f"{described.text.metadata.get(names.NAME)}: the fitted file misses its limit "
            f"({format_bytes(found)}, required {format_bytes(fit.limit_bytes)})",
            hint="report this, with the command",
        )


def _stays(choice: Choice) -> bool:
    return choice.weights != "streamed"


def _refusal(fit: Fit, keys: Header, required_bytes: int) -> DoesNotFitError:
    what = "the text file" if fit.weights is not None else "a run"
    terms = ""
    if fit.weights is None:
        terms = f" with n_ctx {fit.n_ctx} and {fit.image_tokens} image tokens"
    least = f"{required_bytes}"
    if required_bytes > 100 * MEGABYTE:
        least = f"{-(-required_bytes // MEGABYTE)}MB"
    return DoesNotFitError(
        f"{keys.metadata.get(names.NAME)}: no mix of types fits {what} into "
        f"{format_bytes(fit.limit_bytes)} (the smallest takes {format_bytes(required_bytes)}"
        f"{terms})",
        budget_bytes=fit.limit_bytes,
        required_bytes=required_bytes,
        hint=f"{fit.option} {least}",
    )
