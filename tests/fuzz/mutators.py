"""Changes that keep an input's format, so that most inputs get past its first check."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

_ODD_NUMBERS = (0, -1, 1, 2, 0.5, 255, 2**31, 2**53 + 1, 2**62, 2**63, 2**64, -(2**63), 1e308, -0.0)
_ODD_TEXTS = (
    "",
    "\0",
    "\ud800",
    "a" * 300,
    "好",
    "..",
    "/",
    "^$",
    "^(a|b){2}$",
    "<|image|>",
    "data:,",
)
_ODD_LENGTHS = (0, 1, 7, 2**16, 2**31, 2**32, 2**61, 2**63, 2**64 - 1)
_MOST_NODES = 2000


def mutate_json(raw: bytes, chance: random.Random) -> bytes | None:
    """Change one place of a JSON value; None where it is none."""
    try:
        root = [json.loads(raw)]
        places = list(_places(root))
    except (ValueError, RecursionError):
        return None
    container, key = chance.choice(places)
    other, other_key = chance.choice(places)
    kind = chance.randrange(8)
    if kind == 0 and container is not root:
        del container[key]
    elif kind == 1:
        container[key] = json.loads(json.dumps(other[other_key]))
    elif kind == 2 and isinstance(container, dict):
        container[str(other_key)] = container[key]
    elif kind == 3 and isinstance(container, list) and container is not root:
        container.extend([container[key]] * chance.choice((1, 2, 30)))
    elif kind == 4:
        container[key] = _nested(container[key], chance)
    else:
        container[key] = _changed(container[key], chance)
    return json.dumps(root[0], ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def _places(root: Any) -> Iterator[tuple[Any, Any]]:
    pending, n_found = [root], 0
    while pending and n_found < _MOST_NODES:
        container = pending.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            n_found += 1
            yield container, key
            if isinstance(container[key], dict | list):
                pending.append(container[key])


def _nested(value: Any, chance: random.Random) -> Any:
    key = chance.choice(("", "anyOf", "properties", "items", "content"))
    for _ in range(chance.choice((1, 2, 40, 300))):
        value = {key: value} if key else [value]
    return value


def _changed(value: Any, chance: random.Random) -> Any:
    if isinstance(value, bool) or value is None or chance.random() < 0.2:
        return chance.choice((None, True, False, [], {}, "", chance.choice(_ODD_NUMBERS)))
    if isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2)
        return chance.choice((*near, *_ODD_NUMBERS))
    if isinstance(value, str):
        at = chance.randint(0, len(value))
        grown = value[:at] + chance.choice(_ODD_TEXTS) + value[at:]
        return chance.choice((grown, value[:at], value[at:], chance.choice(_ODD_TEXTS), [value]))
    return chance.choice((None, 0, "", [], {}, [value]))


def mutate_gguf(data: bytes, chance: random.Random) -> bytes | None:
    """Replace a string of a GGUF header with its length, or a number; None without any."""
    at = _find_string(data, chance)
    if at < 0:
        return None
    end = at + 8 + struct.unpack_from("<Q", data, at)[0]
    kind = chance.randrange(5)
    if kind == 0:  # what follows a key: its type, or a value
        return data[:end] + struct.pack("<I", chance.randrange(40)) + data[end + 4 :]
    if kind == 1:
        return data[: end + 4] + struct.pack("<I", chance.getrandbits(32)) + data[end + 8 :]
    if kind == 2:
        return data[:at] + struct.pack("<Q", chance.choice(_ODD_LENGTHS)) + data[at + 8 :]
    if kind == 3:  # the version, or one of the counts
        field = chance.choice((4, 8, 16))
        n = struct.unpack_from("<I", data, field)[0] + chance.choice((-1, 1))
        return data[:field] + struct.pack("<I", n % 2**32) + data[field + 4 :]
    other = _find_string(data, chance)
    text = data[other + 8 : other + 8 + chance.randrange(40)]
    return data[:at] + struct.pack("<Q", len(text)) + text + data[end:]


def _find_string(data: bytes, chance: random.Random) -> int:
    """Where some string begins, with its length; -1 for none."""
    first, last = 24, len(data) - 9
    start = chance.randint(first, max(first, last))
    for at in (*range(start, last), *range(first, min(start, last))):
        (length,) = struct.unpack_from("<Q", data, at)
        if 0 < length <= 64 and at + 8 + length < len(data) and data[at + 8] >= 0x20:
            return at
    return -1


def mutate_bytes(data: bytes, words: Sequence[bytes], chance: random.Random) -> bytes:
    """Cut, change or insert bytes, or a word."""
    at = chance.randint(0, len(data))
    end = min(len(data), at + chance.choice((0, 1, 1, 4, 30)))
    fresh = chance.choice((b"", chance.randbytes(1), chance.choice(words or (b"",)), data[at:] * 2))
    return data[:at] + fresh + data[end:]
