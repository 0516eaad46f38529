"""JSON schemas from strangers: bounded before a grammar is made of them.

What is bounded is what the converter unrolls (lengths, counts, patterns) and what it and
llama.cpp's grammar parser recurse into. Whether a schema can be followed, the converter says.
"""

from __future__ import annotations

import json
from typing import Any

from autoglm_gguf.server.errors import ApiError

MAX_CHARS = 65_536
MAX_DEPTH = 32
MAX_NODES = 2000
MAX_PROPERTIES = 100
MAX_COUNT = 500
"""For minLength, maxLength, minItems and maxItems: each becomes so many grammar elements."""
MAX_PATTERN = 200
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")


def check_schema(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """The schema itself, if it is within bounds.

    Raises:
        ApiError: It is not; 400.
    """
    n_nodes = 0
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        node, depth = pending.pop()
        n_nodes += 1
        if depth > MAX_DEPTH or n_nodes > MAX_NODES:
            raise _too_large(param, f"over {MAX_DEPTH} levels or {MAX_NODES} values")
        if isinstance(node, dict):
            _check_object(node, param)
            pending += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, list):
            pending += [(value, depth + 1) for value in node]
    if len(json.dumps(schema)) > MAX_CHARS:
        raise _too_large(param, f"over {MAX_CHARS} characters")
    return schema


def _check_object(node: dict[str, Any], param: str) -> None:
    for name in _COUNTS:
        n = node.get(name)
        if n is not None and not (type(n) is int and 0 <= n <= MAX_COUNT):
            raise _too_large(param, f"{name} is not in 0..{MAX_COUNT}")
    pattern = node.get("pattern")
    if isinstance(pattern, str) and not _is_short(pattern):
        raise _too_large(param, f"a pattern is longer than {MAX_PATTERN}, or repeats too often")
    properties = node.get("properties")
    if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
        raise _too_large(param, f"over {MAX_PROPERTIES} properties of one object")


def _is_short(pattern: str) -> bool:
    """Whether it is, unrolled too: ``a{9}`` becomes nine elements."""
    digits = "".join(c if c in "0123456789" else " " for c in pattern[: MAX_PATTERN + 1])
    return len(pattern) <= MAX_PATTERN and sum(map(int, digits.split())) <= MAX_COUNT


def _too_large(param: str, why: str) -> ApiError:
    return ApiError(400, "schema_too_large", f"{param}: {why}", param=param)
