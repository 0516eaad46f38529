"""The action language as a byte automaton, compiled from the `Action` classes.

Knows what may follow, byte by byte: free text until the action begins, then exactly what
`Action.render` writes, and nothing after it. Knows no tokens. The action begins after ``<answer>``,
or where ``do(action="`` or ``finish(message="`` stands outside ``<think>…</think>``.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.actions import ACTIONS, Action, Finish, Kind

DEAD = -1
_MOST_STATES = 2**15 - 1  # of a table of int16; a phone's 1,000 apps take 5,000 to 10,000
_ANY = bytes(range(256))
_DIGITS = b"0123456789"
# What may stand unescaped in a string: no control characters but the two a text is laid out with.
_PLAIN = bytes(b for b in (*b"\n\t", *range(0x20, 0x7F)) if b not in b'"\\')
_JSON_ESCAPES = b'"\\nrt'
_CONTINUED = bytes(range(0x80, 0xC0))
# RFC 3629, section 4: lead bytes, then the second byte's range, then how many more.
_UTF8 = (
    (bytes(range(0xC2, 0xE0)), _CONTINUED, 0),
    (b"\xe0", bytes(range(0xA0, 0xC0)), 1),
    (bytes((*range(0xE1, 0xED), 0xEE, 0xEF)), _CONTINUED, 1),
    (b"\xed", bytes(range(0x80, 0xA0)), 1),
    (b"\xf0", bytes(range(0x90, 0xC0)), 2),
    (b"\xf1\xf2\xf3", _CONTINUED, 2),
    (b"\xf4", bytes(range(0x80, 0x90)), 2),
)


@dataclass(frozen=True, slots=True, eq=False)
class Automaton:
    """A deterministic automaton over bytes."""

    table: NDArray[np.int16]
    """``(n_states + 1, 256)``, the next state; `DEAD` where a byte is not allowed, and in the last
    row, so that `DEAD` leads to itself."""
    start: int
    complete: int
    """The state in which the action is whole; nothing may follow."""
    distance: tuple[int, ...]
    """Per state, the fewest bytes to `complete`."""
    nearest: bytes
    """Per state, the first byte of that shortest way."""
    single: tuple[int, ...]
    """Per state, the only byte allowed, or `DEAD` if there are several or none."""
    lead_in: dict[int, bytes]
    """Per state before the action, what begins it there."""

    def after(self, state: int, data: bytes) -> int:
        """The state after some bytes, `DEAD` if they are not allowed."""
        for byte in data:
            if state == DEAD:
                return DEAD
            state = int(self.table[state, byte])
        return state

    def forced(self, state: int) -> bytes:
        """The bytes that must come, as far as there is no choice."""
        found = bytearray()
        while (byte := self.single[state]) != DEAD:
            found.append(byte)
            state = int(self.table[state, byte])
        return bytes(found)

    def shortest(self, state: int, n_max: int | None = None) -> bytes:
        """The shortest way to `complete`, or its first ``n_max`` bytes."""
        found = bytearray()
        while state != self.complete and (n_max is None or len(found) < n_max):
            found.append(self.nearest[state])
            state = int(self.table[state, found[-1]])
        return bytes(found)


@lru_cache(maxsize=8)
def compile_actions(apps: tuple[str, ...] = ()) -> Automaton:
    """The automaton of a whole answer: thinking, then one action.

    Args:
        apps: The only names ``Launch`` may open; without any, every name that is not empty.

    Raises:
        ValueError: So many names that they need over 32,767 states.
    """
    builder = _Builder()
    inside, outside, end = _answer(builder, apps)
    return _determinise(builder, inside, outside, end)


class _Builder:
    """Nodes of a nondeterministic automaton; equal parts are made once."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[bytes, int]]] = []
        self.commits: set[int] = set()
        """Nodes that end every other reading of the bytes before them."""
        self.forbidden: set[int] = set()
        self._literals: dict[tuple[bytes, int], int] = {}
        self._strings: dict[tuple[str, int], int] = {}

    def node(self, *edges: tuple[bytes, int]) -> int:
        self.edges.append(list(edges))
        return len(self.edges) - 1

    def choice(self, nodes: Iterable[int]) -> int:
        return self.node(*(edge for node in nodes for edge in self.edges[node]))

    def commit(self, node: int) -> int:
        copy = self.choice([node])
        self.commits.add(copy)
        return copy

    def literal(self, text: bytes, then: int) -> int:
        """Exactly ``text``."""
        for at in range(len(text) - 1, -1, -1):
            key = (text[at:], then)
            if key not in self._literals:
                rest = self._literals[(text[at + 1 :], then)] if at + 1 < len(text) else then
                self._literals[key] = self.node((text[at : at + 1], rest))
        return self._literals[(text, then)]

    def _characters(self, body: int) -> list[tuple[bytes, int]]:
        """Edges of every character beyond ASCII, back to ``body``."""
        more = [body]
        for _ in range(2):
            more.append(self.node((_CONTINUED, more[-1])))
        return [(lead, self.node((second, more[n]))) for lead, second, n in _UTF8]

    def string(self, kind: str, end: int) -> int:
        """What follows an opening quote, through ``")`` to ``end``.

        Args:
            kind: ``text``: no bare quotes, JSON's escapes, as a Python literal is read.
                ``sliced``: anything up to ``")``, as the client slices it. ``name``: like ``text``,
                but not empty.
            end: The node after the closing parenthesis.
        """
        if (kind, end) in self._strings:
            return self._strings[(kind, end)]
        if kind == "name":
            made = self.node(*(e for e in self.edges[self.string("text", end)] if e[0] != b'"'))
        else:
            made = self.node()
            tag = self.literal(b"</answer>", self.forbid())
            self.edges[made] += [(_PLAIN, made), *self._characters(made), *self.edges[tag]]
            if kind == "text":
                self.edges[made].append((b"\\", self.node((_JSON_ESCAPES, made))))
                self.edges[made].append((b'"', self.literal(b")", end)))
            else:
                anything = [(_PLAIN + b'"\\', made), *self._characters(made)]
                self.edges[made].append((b"\\", self.node(*anything)))
                quote = self.node(*(e for e in self.edges[made] if e[0] != _PLAIN))
                self.edges[quote] += [(_PLAIN.replace(b")", b""), made), (b")", end), (b'"', quote)]
                self.edges[made].append((b'"', quote))
        self._strings[(kind, end)] = made
        return made

    def forbid(self) -> int:
        node = self.node()
        self.forbidden.add(node)
        return node

    def number(self, then: int, n_digits: int = 3) -> int:
        """A whole number without leading zeros."""
        rest = then
        for _ in range(n_digits - 1):
            rest = self.choice([self.node((_DIGITS, rest)), then])
        return self.node((b"0", then), (b"123456789", rest))


def _answer(builder: _Builder, apps: tuple[str, ...]) -> tuple[frozenset[int], frozenset[int], int]:
    """Nodes ``(inside thinking, outside it, complete)``."""
    end = builder.node()
    names = builder.choice(
        builder.literal(f'{name}"'.encode(), _arguments(builder, kind, apps, end))
        for name, kind in ACTIONS.items()
        if kind is not Finish
    )
    message = builder.string("sliced", end)
    do, finish = b'do(action="', b'finish(message="'
    call = builder.choice([builder.literal(do, names), builder.literal(finish, message)])
    for _ in range(2):  # some models break the line after the tag; the client strips it
        call = builder.choice([call, builder.node((b" \n", call))])
    answer = builder.commit(call)
    # Each has a door: a node of the same edges that ends what was read before.
    inside, outside, door_in, door_out = (builder.node() for _ in range(4))
    builder.commits |= {door_in, door_out}
    opens = builder.literal(b"<answer>", answer)
    closes = builder.literal(b"</answer>", builder.forbid())  # the client would stop there
    calls = [
        builder.literal(do, builder.commit(names)),
        builder.literal(finish, builder.commit(message)),
    ]
    ways = {
        inside: [builder.literal(b"</think>", door_out), opens, closes],
        outside: [builder.literal(b"<think>", door_in), opens, closes, *calls],
    }
    for node, door in ((inside, door_in), (outside, door_out)):
        builder.edges[node] = [(_ANY, node), *builder.edges[builder.choice(ways[node])]]
        builder.edges[door] = builder.edges[node]
    return frozenset([inside, door_in]), frozenset([outside, door_out]), end


def _arguments(builder: _Builder, kind: type[Action], apps: tuple[str, ...], end: int) -> int:
    """What follows an action's name and its quote."""
    node = builder.literal(b")", end)
    for name, (of, required) in reversed(kind.kinds().items()):
        if of is Kind.POINT:
            second = builder.number(builder.literal(b"]", node))
            value = builder.literal(b"[", builder.number(builder.literal(b",", second)))
        elif of is Kind.SECONDS:
            value = builder.literal(b'"', builder.number(builder.literal(b' seconds"', node), 2))
        else:  # a text is always the last argument: it goes on to the closing parenthesis
            text = "sliced" if kind.sliced else "name" if of is Kind.APP else "text"
            if of is Kind.APP and apps:
                listed = (json.dumps(app, ensure_ascii=False)[1:] + ")" for app in apps)
                value = builder.choice(builder.literal(app.encode(), end) for app in listed)
                value = builder.literal(b'"', value)
            else:
                value = builder.literal(b'"', builder.string(text, end))
        given = builder.literal(f", {name}=".encode(), value)
        node = given if required else builder.choice([given, node])
    return node


def _determinise(
    builder: _Builder, inside: frozenset[int], outside: frozenset[int], end: int
) -> Automaton:
    start = frozenset([min(outside)])
    states: dict[frozenset[int], int] = {start: 0}
    rows: list[NDArray[np.int16]] = []
    queue = deque([start])
    while queue:
        row = np.full(256, DEAD, np.int16)
        reached: dict[int, set[int]] = {}
        for node in queue.popleft():
            for allowed, target in builder.edges[node]:
                for byte in allowed:
                    reached.setdefault(byte, set()).add(target)
        for byte, targets in reached.items():
            if targets & builder.forbidden:
                continue
            subset = frozenset(targets & builder.commits or targets)
            if subset not in states:
                if len(states) == _MOST_STATES:
                    raise ValueError(
                        f"apps: too many names (over {_MOST_STATES} states); list fewer"
                    )
                states[subset] = len(states)
                queue.append(subset)
            row[byte] = states[subset]
        rows.append(row)
    rows.append(np.full(256, DEAD, np.int16))
    table = np.stack(rows)
    complete = states[frozenset([end])]
    distance, nearest = _ways(table, complete)
    lead_in = {
        n: b"</think><answer>" if subset & inside else b"<answer>"
        for subset, n in states.items()
        if subset & (inside | outside)
    }
    n_ways = (table[:-1] != DEAD).sum(1)
    first = (table[:-1] != DEAD).argmax(1)
    single = tuple(int(b) if n == 1 else DEAD for b, n in zip(first, n_ways, strict=True))
    return Automaton(table, 0, complete, distance, nearest, single, lead_in)


def _ways(table: NDArray[np.int16], complete: int) -> tuple[tuple[int, ...], bytes]:
    """Per state the fewest bytes to ``complete``, and the first of them."""
    n_states = len(table) - 1
    far = 10**6
    distance = np.full(n_states + 1, far)
    distance[complete] = 0
    while True:  # a pass per byte of the longest way
        best = distance[table[:-1]].min(1) + 1
        shorter = best < distance[:-1]
        if not shorter.any():
            break
        distance[:-1][shorter] = best[shorter]
    nearest = bytes(distance[table[:-1]].argmin(1).astype(np.uint8))
    return tuple(int(n) for n in distance[:-1]), nearest
