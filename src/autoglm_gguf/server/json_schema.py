"""JSON schemas from strangers: bounded before a grammar is made of them.

What is bounded is what the bindings' converter unrolls or never comes back from (stray brackets in
a pattern), what llama.cpp's parser recurses into, and what its grammar multiplies: alternatives
that begin without a character between them, and repetitions of what may be empty. Whether a schema
can be followed, the converter says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from autoglm_gguf.server.errors import ApiError

MAX_CHARS = 65_536
MAX_DEPTH = 32
MAX_NODES = 2000
MAX_PROPERTIES = 100
MAX_COUNT = 500
"""For minLength, maxLength, minItems and maxItems: each becomes so many grammar elements."""
MAX_COUNTS = 5000
"""For all of them together."""
MAX_WAYS = 1000
"""Alternatives of one place, references followed."""
MAX_PATTERN = 100
"""Characters of a pattern, and elements of its repetitions together."""
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_TOKEN = re.compile(
    r"""(?P<set>\[\^?(?:[^\\\[\]\x00-\x1f]|\\[^xuU\x00-\x1f])+\])
      | (?P<times>\{\d{1,3}(?:,\d{0,3})?\})
      | (?P<many>[*+?])
      | (?P<close>\))
      | (?P<open>\((?!\?))
      | (?P<or>\|)
      | (?P<atom>\\[^xuU\x00-\x1f]|[^\\\[\]{}\x00-\x1f])""",
    re.VERBOSE,
)
_RANGE = re.compile(r"([^\\])-([^\\\]])")


def check_schema(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """The schema itself, if it is within bounds.

    Raises:
        ApiError: It is not; 400.
    """
    try:
        _check(schema)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_schema", f"{param}: {error}", param=param) from None
    return schema


def _check(schema: dict[str, Any]) -> None:
    n_nodes = n_counted = 0
    objects: list[dict[str, Any]] = []
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        node, depth = pending.pop()
        n_nodes += 1
        if depth > MAX_DEPTH or n_nodes > MAX_NODES:
            raise ValueError(f"over {MAX_DEPTH} levels or {MAX_NODES} values")
        if isinstance(node, dict):
            objects.append(node)
            n_counted += _check_object(node)
            pending += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, list):
            pending += [(value, depth + 1) for value in node]
    if n_counted > MAX_COUNTS:
        raise ValueError(f"lengths and counts over {MAX_COUNTS} together")
    if len(json.dumps(schema)) > MAX_CHARS:
        raise ValueError(f"over {MAX_CHARS} characters")
    ways = _Ways(schema)
    for node in objects:
        if ways.count(node) > MAX_WAYS:
            raise ValueError(f"over {MAX_WAYS} alternatives in one place")


def _check_object(node: dict[str, Any]) -> int:
    """Its lengths and counts together."""
    found = 0
    for name in _COUNTS:
        n = node.get(name)
        if not isinstance(n, int | float):  # a property of this name, perhaps
            continue
        if type(n) is not int or not 0 <= n <= MAX_COUNT:
            raise ValueError(f"{name} is not in 0..{MAX_COUNT}")
        found += n
    pattern, properties = node.get("pattern"), node.get("properties")
    if isinstance(pattern, str):
        _check_pattern(pattern)
    if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
        raise ValueError(f"over {MAX_PROPERTIES} properties of one object")
    return found


class _Ways:
    """How many alternatives a place in a schema begins with, references followed."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._known: dict[int, int] = {}  # by the identity of parts of the schema, which lives on

    def count(self, node: Any) -> int:
        """At least one.

        Raises:
            ValueError: It begins with itself.
        """
        if not isinstance(node, dict):
            return 1
        key = id(node)
        if key not in self._known:
            self._known[key] = -1
            self._known[key] = max(1, sum(map(self.count, self._choices(node))))
        if self._known[key] < 0:
            raise ValueError("a reference that leads to itself")
        return self._known[key]

    def _choices(self, node: dict[str, Any]) -> Iterator[Any]:
        if "$ref" in node:
            yield self._find(node["$ref"])
            return
        for name in ("anyOf", "oneOf", "enum"):
            found = node.get(name)
            if isinstance(found, list):
                yield from found if name != "enum" else [None] * len(found)
                return

    def _find(self, ref: Any) -> Any:
        if not isinstance(ref, str) or not ref.startswith("#/"):
            raise ValueError("$ref: only references within the schema, as #/$defs/name")
        target: Any = self._schema
        for step in ref.split("/")[1:]:
            target = target.get(step) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise ValueError("$ref: leads to nothing")
        return target


def _check_pattern(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern of over {MAX_PATTERN} characters")
    if not (len(pattern) >= 2 and pattern[0] == "^" and pattern[-1] == "$"):
        raise ValueError("pattern: does not begin with ^ and end with $")
    at, depth, n_times, before = 1, 0, 0, ""
    while at < len(pattern) - 1:
        match = _TOKEN.match(pattern, at, len(pattern) - 1)
        kind = match.lastgroup if match else None
        if match is None or kind is None:
            raise ValueError(f"pattern: not understood at character {at}")
        depth += (kind == "open") - (kind == "close")
        if depth < 0:
            raise ValueError("pattern: unbalanced parentheses")
        if kind == "times":
            if before not in ("atom", "set"):
                raise ValueError("pattern: {} repeats single characters and sets only")
            n_times += max(int(n) for n in re.findall(r"\d+", match.group()))
        if kind == "set" and any(a > b for a, b in _RANGE.findall(match.group())):
            raise ValueError("pattern: a range that runs backwards")
        before, at = kind, match.end()
    if depth or n_times > MAX_PATTERN:
        raise ValueError(f"pattern: unbalanced, or over {MAX_PATTERN} repetitions")
