"""Answers that cannot go wrong: which tokens an automaton or a grammar lets through.

The sampled token is checked first, which costs microseconds; only when it is refused are all tokens
looked at and one of the allowed ones is sampled. Knows tokens as bytes; knows no engine, no prompt.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.actions_grammar import DEAD, Automaton
from autoglm_gguf.config import CONSTRAIN_ACTION
from autoglm_gguf.errors import EngineError
from autoglm_gguf.gguf.names import END_OF_ANSWER

ACTION_RESERVE = 96
"""Tokens kept for the action: longer thinking is ended, so that max_tokens never cuts it off."""
_REPRESENTATIVES = b'aZ05 "(),.[]\n' + "好".encode()[:1]
_LOOKAHEAD = 8  # bytes after a forced text that may change where its last token ends
_N_CACHED = 8  # states whose allowed tokens are remembered; up to 0.6 MB each
Ids = NDArray[np.int32]


class TokenTable(Protocol):
    """What an engine tells about its tokens."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids; literal special tokens become their ids; nothing is added."""

    def token_bytes(self, token: int) -> bytes:
        """Bytes a token shows; none for control tokens."""


class TokenSampler(Protocol):
    """Chooses among tokens; see `autoglm_gguf.engine.base.Sampler`."""

    def sample(self, among: Ids | None = None) -> int:
        """A token, of ``among`` if given; nothing is remembered yet."""

    def accept(self, token: int) -> None:
        """Remember a token as chosen."""


class Constraint(Protocol):
    """Chooses the next tokens of one answer."""

    @property
    def complete(self) -> bool:
        """Nothing may follow."""

    @property
    def cut(self) -> bool:
        """It was brought to its end because the tokens ran out."""

    def next_tokens(self, sampler: TokenSampler, n_left: int) -> list[int]:
        """One sampled token and those that must follow it, at most ``n_left``; all accepted."""

    def close(self) -> None:
        """Release what it holds."""


class Vocabulary:
    """Every token's bytes as a trie, level by level.

    Args:
        tokens: The bytes of token 0, 1, …; a token without any is never allowed.
    """

    def __init__(self, tokens: Iterable[bytes]) -> None:
        self._allowed: dict[tuple[Automaton, int], Ids] = {}
        ids, lengths, data = _sort(tokens)
        offsets = np.cumsum(lengths, dtype=np.int32) - lengths
        self._levels: list[tuple[NDArray[np.uint8], Ids, Ids, Ids]] = []
        """Per depth: each node's byte; its first child, and its first token among those that end
        there, both one longer than the nodes; these tokens."""
        # Sorted, so that tokens with a common beginning lie side by side: a node is a run of them.
        run = np.zeros(len(ids), np.int32)  # which node of the level above each token goes through
        starts: list[Ids] = []
        depth = 0
        while len(ids):
            column = data[offsets + depth]
            is_new = np.ones(len(ids), bool)
            is_new[1:] = (column[1:] != column[:-1]) | (run[1:] != run[:-1])
            node = np.cumsum(is_new, dtype=np.int32) - 1
            starts.append(run[is_new])
            ends = lengths == depth + 1
            first_id = _firsts(node[ends], int(is_new.sum()))
            self._levels.append((column[is_new], np.zeros(0, np.int32), first_id, ids[ends]))
            ids, offsets, lengths, run = (a[~ends] for a in (ids, offsets, lengths, node))
            depth += 1
        starts.append(np.zeros(0, np.int32))
        for depth, (byte, _, first_id, found) in enumerate(self._levels):
            first_child = _firsts(starts[depth + 1], len(byte))
            self._levels[depth] = (byte, first_child, first_id, found)

    def allowed(self, automaton: Automaton, state: int) -> Ids:
        """Ids of all tokens that an automaton lets through in a state, ascending."""
        key = (automaton, state)
        if key not in self._allowed:
            if len(self._allowed) >= _N_CACHED:
                self._allowed.pop(next(iter(self._allowed)))
            self._allowed[key] = self._find(automaton, state)
        return self._allowed[key]

    def _find(self, automaton: Automaton, state: int) -> Ids:
        found: list[Ids] = []
        nodes = np.arange(len(self._levels[0][0]) if self._levels else 0, dtype=np.int32)
        states = np.full(len(nodes), state, np.int16)
        for byte, first_child, first_id, ids in self._levels:
            states = automaton.table[states, byte[nodes]]
            alive = states != DEAD
            nodes, states = nodes[alive], states[alive]
            if not len(nodes):
                break
            found.append(ids[_runs(first_id, nodes)[0]])
            nodes, n_children = _runs(first_child, nodes)
            states = np.repeat(states, n_children)
        return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int32)


def _sort(tokens: Iterable[bytes]) -> tuple[Ids, Ids, NDArray[np.uint8]]:
    """Ids of the tokens that have bytes, in the order of their bytes; lengths; all bytes."""
    listed = list(tokens)
    order = sorted(range(len(listed)), key=listed.__getitem__)
    order = order[sum(not data for data in listed) :]  # those without bytes sort first
    data = np.frombuffer(b"".join(listed[n] for n in order), np.uint8)
    lengths = np.fromiter((len(listed[n]) for n in order), np.int32, len(order))
    return np.array(order, np.int32), lengths, data


def _firsts(parents: Ids, n_parents: int) -> Ids:
    """Where each parent's run begins in ascending ``parents``, and the end."""
    return np.searchsorted(parents, np.arange(n_parents + 1)).astype(np.int32)


def _runs(first: Ids, parents: Ids) -> tuple[Ids, Ids]:
    """The members of several runs one after another, and how many each has."""
    counts: Ids = first[parents + 1] - first[parents]
    ends = np.cumsum(counts, dtype=np.int32)
    members: Ids = np.repeat(first[parents] - ends + counts, counts)
    members += np.arange(len(members), dtype=np.int32)
    return members, counts


class ActionTokens:
    """Which tokens of a model spell an action.

    Args:
        tokens: The model's; the trie over them is built when the first sampled token is refused.
        n_vocab: How many there are.
        stop_ids: Those that end a turn.
        automaton: What may be said.
    """

    def __init__(
        self, tokens: TokenTable, n_vocab: int, stop_ids: frozenset[int], automaton: Automaton
    ) -> None:
        self.table, self.automaton, self.stop_ids = tokens, automaton, stop_ids
        self._n_vocab = n_vocab
        closing = tokens.tokenize(END_OF_ANSWER)
        self.closing = [n for n in closing if len(closing) == 1 and n in stop_ids]
        """The token that ends the turn after an action, if the model has one."""

    def after(self, state: int, token: int) -> int:
        """The state after a token, `DEAD` where it is not allowed."""
        data = b"" if token in self.stop_ids else self.table.token_bytes(token)
        if not data:  # a control token shows nothing; before the action it does no harm
            free = state in self.automaton.lead_in and token not in self.stop_ids
            return state if free else DEAD
        return self.automaton.after(state, data)

    def allowed(self, state: int) -> Ids:
        """Ids of all tokens that are allowed in a state, ascending.

        Raises:
            EngineError: There is none: the vocabulary lacks letters.
        """
        found = _vocabulary(self.table, self._n_vocab).allowed(self.automaton, state)
        found = found[~np.isin(found, list(self.stop_ids))]
        if not len(found):
            raise EngineError(
                "vocabulary: no token goes on with the action (0 found, 1 required)",
                hint="leave the constraint out: constrain=None, or --no-constrain",
            )
        return found

    def forced(self, state: int, said: bytearray, said_tokens: Sequence[int]) -> list[int]:
        """Tokens that must come next, as the model itself would cut them.

        Args:
            state: Where the automaton is.
            said: The answer's bytes since a token boundary that no merge crosses.
            said_tokens: The tokens of ``said``; where they are not the tokenizer's own cut, none is
                forced, since what follows could not be known either.
        """
        text = self.automaton.forced(state)
        whole = self._cut(state, bytes(said), text) if text else []
        n_said = len(said_tokens)
        return whole[n_said:] if whole[:n_said] == list(said_tokens) else []

    def _cut(self, state: int, said: bytes, text: bytes) -> list[int]:
        """Tokens of ``said + text`` that stay the same whatever comes after."""
        automaton = self.automaton
        state = automaton.after(state, text)
        ways = [b""]
        if state != automaton.complete:
            row = automaton.table[state]
            after = [b for b in range(256) if row[b] != DEAD]
            few = after if len(after) <= 16 else [b for b in after if b in _REPRESENTATIVES]
            ways = [bytes([b]) + automaton.shortest(int(row[b]), _LOOKAHEAD) for b in few]
        cuts = [self.table.tokenize((said + text + way).decode("utf-8", "ignore")) for way in ways]
        common: list[int] = []
        n_bytes, most = 0, len(said) + len(text)
        for column in zip(*cuts, strict=False):
            n_bytes += len(self.table.token_bytes(column[0]))
            if len(set(column)) > 1 or n_bytes > most:
                break
            common.append(column[0])
        return common


class ActionConstraint:
    """Holds one answer to the action language.

    Thinking is free. When it would end the turn without an action, or leave too few tokens for one,
    it is closed and the action asked for. Inside the action only what fits is let through, what has
    no alternative is not sampled, and a text that would outgrow ``n_left`` is closed.

    Args:
        tokens: The model's.
        max_thinking_tokens: After so many the action is asked for; None lets it think.
    """

    def __init__(self, tokens: ActionTokens, max_thinking_tokens: int | None = None) -> None:
        self._tokens, self._automaton = tokens, tokens.automaton
        self._max_thinking, self._n_said = max_thinking_tokens, 0
        self._state = self._automaton.start
        self._said, self._said_tokens = bytearray(), list[int]()
        self._reserve: int | None = None
        self.complete = False
        self.cut = False

    def next_tokens(self, sampler: TokenSampler, n_left: int) -> list[int]:
        """One sampled token and those that must follow it, at most ``n_left``; all accepted.

        Raises:
            EngineError: See `ActionTokens.allowed`.
        """
        if self._reserve is None:
            self._reserve = min(ACTION_RESERVE, n_left // 2)
        lead_in = self._automaton.lead_in.get(self._state)
        if lead_in is not None and n_left <= self._reserve:
            self.cut = True
            return self._take(sampler, self._begin_action(lead_in), n_left)
        if lead_in is not None and self._n_said == self._max_thinking:
            return self._take(sampler, self._begin_action(lead_in), n_left)
        self._n_said += 1
        token = sampler.sample()
        state = self._tokens.after(self._state, token)
        if state == DEAD and lead_in is not None and token in self._tokens.stop_ids:
            return self._take(sampler, self._begin_action(lead_in), n_left)
        if state == DEAD:
            token = sampler.sample(self._tokens.allowed(self._state))
            state = self._tokens.after(self._state, token)
        ending = self._ending(state, n_left) if lead_in is None else []
        self.cut = self.cut or bool(ending)
        return self._take(sampler, ending or [token], n_left)

    def _ending(self, state: int, n_left: int) -> list[int]:
        """The shortest way to the end, if the one after ``state`` would be too long."""
        distance = self._automaton.distance
        # A byte is a token at most. The rest is for a character that is begun: it is completed.
        if not distance[state] + 4 >= n_left >= distance[self._state]:
            return []
        try:
            ending = self._automaton.shortest(self._state).decode()
        except UnicodeDecodeError:
            return []
        return self._tokens.table.tokenize(ending)

    def _begin_action(self, lead_in: bytes) -> list[int]:
        return self._tokens.table.tokenize(lead_in.decode())

    def _take(self, sampler: TokenSampler, tokens: list[int], n_left: int) -> list[int]:
        """Go on by tokens and by what must follow them."""
        for token in tokens:
            self._advance(token)
        taken = [*tokens, *self._tokens.forced(self._state, self._said, self._said_tokens)]
        for token in taken[len(tokens) :]:
            self._advance(token)
        if self._state == self._automaton.complete and len(taken) <= n_left:
            self.complete = True
            taken += self._tokens.closing
        taken = taken[:n_left]
        for token in taken:
            sampler.accept(token)
        return taken

    def close(self) -> None:
        """Nothing to release."""

    def _advance(self, token: int) -> None:
        data = self._tokens.table.token_bytes(token)
        self._state = self._automaton.after(self._state, data)
        self._said += data
        self._said_tokens.append(token)
        if data.endswith(b">") and self._said.endswith(b"<answer>"):
            # Tags are tokens of their own, or nearly: what follows is cut without regard to them.
            self._said, self._said_tokens = bytearray(), []


class ThinkingLimit:
    """Closes ``<think>`` after so many tokens and begins the answer; else lets everything through.

    Args:
        tokens: The model's.
        most: Tokens from the answer's beginning.
    """

    complete = cut = False

    def __init__(self, tokens: TokenTable, most: int) -> None:
        self._tokens, self._n_left = tokens, most
        self._said = bytearray()

    def next_tokens(self, sampler: TokenSampler, n_left: int) -> list[int]:
        """A sampled token, or those that end the thinking; all accepted."""
        if self._n_left == 0 and b"<think>" in self._said and b"</think>" not in self._said:
            taken = self._tokens.tokenize("</think><answer>")[:n_left]
        else:
            taken = [sampler.sample()]
        if self._n_left >= 0:
            self._n_left -= 1
            self._said += self._tokens.token_bytes(taken[0])
        for token in taken:
            sampler.accept(token)
        return taken

    def close(self) -> None:
        """Nothing to release."""


class Grammar(Protocol):
    """A grammar that an engine follows token by token; it may nest, as JSON does."""

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""

    def allowed(self) -> Ids:
        """Ids of all tokens that may come next; tens of milliseconds for a large vocabulary."""

    def accept(self, token: int) -> bool:
        """Go on by a token that is allowed; True if it ends the answer."""

    def close(self) -> None:
        """Release it."""


class GrammarConstraint:
    """Holds one answer to a grammar, from its first token; never cut short by the constraint.

    Args:
        grammar: Of this answer.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self.complete = self.cut = False

    def next_tokens(self, sampler: TokenSampler, n_left: int) -> list[int]:
        """The sampled token, accepted.

        Raises:
            ValueError: None is allowed: the grammar has a place that nothing leads out of.
        """
        token = sampler.sample()
        if not self._grammar.allows(token):
            allowed = self._grammar.allowed()
            if not len(allowed):
                raise ValueError(
                    "schema: no token can follow here, so that no answer does; leave out what no "
                    "document can be: control characters, empty choices"
                )
            token = sampler.sample(allowed)
        sampler.accept(token)
        self.complete = self._grammar.accept(token)
        return [token]

    def close(self) -> None:
        """Release the grammar."""
        self._grammar.close()


def act_options(sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling options of an ``act``: held to the action language, and ended by ``</answer>``."""
    sampling = {"constrain": CONSTRAIN_ACTION, **sampling}
    stop = sampling.get("stop", ())
    if not isinstance(stop, str | list | tuple):
        return sampling  # refused where it is read
    given = (stop,) if isinstance(stop, str) else tuple(stop)
    return {**sampling, "stop": (*given, END_OF_ANSWER)}


_VOCABULARIES: weakref.WeakKeyDictionary[TokenTable, Vocabulary] = weakref.WeakKeyDictionary()


def _vocabulary(table: TokenTable, n_vocab: int) -> Vocabulary:
    """The trie over a model's tokens, built once."""
    if table not in _VOCABULARIES:
        _VOCABULARIES[table] = Vocabulary(map(table.token_bytes, range(n_vocab)))
    return _VOCABULARIES[table]
