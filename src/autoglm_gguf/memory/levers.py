"""The levers that save memory, mildest first, and the search that pulls and releases them.

Knows what each lever changes and in which order; what a choice costs is ``holding``'s matter, what
is told of it ``plan``'s. Chooses from numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from autoglm_gguf.config import CacheType, ContextParams
from autoglm_gguf.memory.estimate import cache_type_fits
from autoglm_gguf.memory.holding import Choice, Holding, Weights

UNBOUNDED = 2**62
"""More than any machine has: what may be used without a budget."""
MEGABYTE = 10**6
_SLACK = 64  # a budget's 64th part is left free: allocators round up, and estimates are only near
_BATCHES = (256, 128)
# What is taken from the layers that stay is read again for every token: under streaming the KV
# cache stays small. Batches do not shrink further: every batch of a prompt reads the layers once.
_STREAMED_BATCH = 256
_IMAGE_TOKENS = (2048, 1620, 1024, 768, 512)
_SMALLER_N_CTX = (3072, 2048)
_SMALL_CACHE: CacheType = "q8_0"
_ROOM_FOR_WORDS = 256  # of an n_ctx made smaller, what an image may not take

_Change: TypeAlias = Callable[[Choice], Choice]


def usable_bytes(budget_bytes: int) -> int:
    """What may be planned for under a budget."""
    return budget_bytes - budget_bytes // _SLACK


def budget_for(peak_bytes: int) -> int:
    """The least budget under which ``peak_bytes`` may be planned for."""
    return -(-peak_bytes * _SLACK // (_SLACK - 1))


class Search:
    """Finds the mildest choice for one pair under any budget.

    Args:
        holding: What choices cost.
        params: Wanted sizes.
        fixed: Fields of ``params`` that may not be changed.
    """

    def __init__(self, holding: Holding, params: ContextParams, fixed: frozenset[str]) -> None:
        self.holding = holding
        """What choices cost."""
        self._fixed = fixed
        weights: Weights = "repacked" if holding.repacks else "mapped"
        self.first = Choice(params, weights, holding.tower is None, gives_way=False)
        """The choice without any lever."""
        self._found: dict[int, Choice | None] = {}

    def with_layers(self, n_gpu_layers: int) -> Search:
        """The same search with so many layers on the GPU."""
        params = replace(self.first.params, n_gpu_layers=n_gpu_layers)
        return Search(self.holding, params, self._fixed)

    def find(self, budget_bytes: int) -> Choice | None:
        """The mildest choice that fits; None if none does."""
        if budget_bytes not in self._found:
            self._found[budget_bytes] = self._find(usable_bytes(budget_bytes))
        return self._found[budget_bytes]

    def least_budget(self, above_bytes: int, serves: Callable[[Choice, int], bool]) -> int:
        """A budget in whole megabytes whose choice serves, while a megabyte less does not.

        Args:
            above_bytes: A budget that does not serve.
            serves: Whether a choice, under a budget of so many bytes, is good enough; the choice
                without any lever must be.
        """
        low = above_bytes // MEGABYTE
        high = -(-budget_for(self.holding.peak(self.first, UNBOUNDED)) // MEGABYTE)
        while high - low > 1:
            middle = (low + high) // 2
            choice = self.find(middle * MEGABYTE)
            if choice is not None and serves(choice, middle * MEGABYTE):
                high = middle
            else:
                low = middle
        return high * MEGABYTE

    def _find(self, usable: int) -> Choice | None:
        choice, peak = self.first, self.holding.peak(self.first, usable)
        for change in self._levers():
            if peak <= usable:
                break
            following = change(choice)
            needs = self.holding.peak(following, usable)
            if needs <= peak:  # what helps only later, beside another lever, is pulled too
                choice, peak = following, needs
        return self._release(choice, usable) if peak <= usable else None

    def _levers(self) -> Iterator[_Change]:
        """Changes, mildest first."""
        params, fixed, holding = self.first.params, self._fixed, self.holding
        if "n_batch" not in fixed:
            yield from (_setting(n_batch=n) for n in _BATCHES if n < params.n_batch)
        if holding.tower is not None:
            yield lambda c: replace(c, tower_on_demand=True)
        if self._takes_small_cache():
            yield _setting(type_k=_SMALL_CACHE, type_v=_SMALL_CACHE)
        if self.first.weights == "repacked":
            yield lambda c: replace(c, weights="mapped")
        if holding.tower is not None and self.holding.can_page and not self._maps_away(params):
            yield lambda c: replace(c, weights="mapped", gives_way=True)
        if holding.tower is not None and "max_image_tokens" not in fixed:
            most = holding.image_tokens(params)
            yield from (_setting(max_image_tokens=n) for n in _IMAGE_TOKENS if n < most)
        if "n_ctx" not in fixed:
            least = (params.max_image_tokens or 0) + _ROOM_FOR_WORDS
            yield from (_setting(n_ctx=n) for n in _SMALLER_N_CTX if least <= n < params.n_ctx)
        if self.holding.can_page and not self._maps_away(params):
            yield lambda c: replace(c, weights="streamed", gives_way=True)

    def _maps_away(self, params: ContextParams) -> bool:
        """Whether a GPU works on the mapped file itself: its pages cannot be let go then."""
        return params.n_gpu_layers > 0 and any(d.maps_files for d in self.holding.devices)

    def _takes_small_cache(self) -> bool:
        params = self.first.params
        known = cache_type_fits(self.holding.text, _SMALL_CACHE) and params.flash_attn
        return known and not self._fixed & {"type_k", "type_v"}

    def _release(self, choice: Choice, usable: int) -> Choice:
        """Undo what is not needed after all, what costs the user most first."""
        for change in self._releases(choice):
            milder = change(choice)
            if milder != choice and self.holding.peak(milder, usable) <= usable:
                choice = milder
        return choice

    def _releases(self, pulled: Choice) -> Iterator[_Change]:
        first, now = self.first.params, pulled.params
        for n in sorted({first.n_ctx, *_SMALLER_N_CTX}, reverse=True):
            if now.n_ctx < n <= first.n_ctx:
                yield partial(_raise, "n_ctx", n)
        if now.max_image_tokens != first.max_image_tokens:
            for n in (self.holding.image_tokens(first), *_IMAGE_TOKENS):
                yield partial(self._widen_image, n)
        if pulled.weights == "mapped":
            yield lambda c: replace(c, weights=self.first.weights, gives_way=False)
            yield lambda c: replace(c, gives_way=False)
        streams = pulled.weights == "streamed"
        if not streams:
            yield _setting(type_k=first.type_k, type_v=first.type_v)
        for n in sorted({first.n_batch, *_BATCHES}, reverse=True):
            if n <= (min(first.n_batch, _STREAMED_BATCH) if streams else first.n_batch):
                yield partial(_raise, "n_batch", n)
        if not self.first.tower_on_demand:
            yield lambda c: c if c.gives_way else replace(c, tower_on_demand=False)

    def _widen_image(self, n_tokens: int, choice: Choice) -> Choice:
        """Let images of ``n_tokens`` come, as far as a smaller n_ctx leaves room for words."""
        first, now = self.first.params, choice.params
        most = self.holding.image_tokens(first)
        room = now.n_ctx if now.n_ctx == first.n_ctx else now.n_ctx - _ROOM_FOR_WORDS
        if n_tokens >= most and most <= room:
            return _setting(max_image_tokens=first.max_image_tokens)(choice)
        return _raise("max_image_tokens", min(n_tokens, room), choice)


def _setting(**changed: Any) -> _Change:
    return lambda choice: replace(choice, params=replace(choice.params, **changed))


def _raise(field: str, value: int, choice: Choice) -> Choice:
    now = getattr(choice.params, field)
    return choice if now is None or now >= value else _setting(**{field: value})(choice)
