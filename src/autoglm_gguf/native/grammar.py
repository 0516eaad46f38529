"""llama.cpp's grammars, followed token by token; from JSON schemas by the bindings' own converter.

Checks what llama.cpp would end the process over: only tokens that were found allowed are accepted.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import math
import operator
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.native.library import clear_errors, engine_error, load_llama
from autoglm_gguf.native.llama import LlamaModel
from autoglm_gguf.native.sampler import CANDIDATE, candidate_array

_MOST_TIMES = 1000  # llama.cpp's parser calls itself for each: twice as many overflow 512 KiB
_TIMES = ("minLength", "maxLength", "minItems", "maxItems")
_LEFT_ASIDE = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "uniqueItems"),
    *("contains", "minContains", "maxContains", "minProperties", "maxProperties"),
    *("patternProperties", "propertyNames", "dependentRequired", "dependentSchemas"),
    *("not", "if", "then", "else"),
)
"""What narrows a document, and the converter would pass over without a word."""
_NARROWING = (
    *("$ref", "oneOf", "anyOf", "allOf", "const", "enum", "pattern", *_TIMES),
    *("properties", "required", "additionalProperties", "items", "prefixItems"),
)
_CLASS_OR_LITERAL = re.compile(r'\[(?:[^\]\\]|\\.)*\]|"(?:[^"\\]|\\.)*"')
_NAMED = ("properties", "$defs", "definitions")  # their keys are names, their values schemas
_NESTED = ("items", "prefixItems", "additionalProperties", "oneOf", "anyOf", "allOf")


def schema_to_grammar(schema: str) -> str:
    """A JSON schema as llama.cpp's grammar (GBNF), properties in the schema's order.

    Raises:
        ValueError: It is no JSON, uses what the converter does not know or would not keep to, or
            lengths over 1,000.
    """
    load_llama()
    converter = importlib.import_module("llama_cpp.llama_grammar")
    try:
        parsed = _without_root_reference(json.loads(schema))
        order = list(parsed.get("properties", {}))
        _check_schema(parsed)
        written = converter.SchemaConverter(
            prop_order={name: n for n, name in enumerate(order)},
            allow_fetch=False,
            dotall=False,
            raw_pattern=False,
        )
        written._format_literal = _write_literal
        whole = json.loads(json.dumps(parsed))  # references are written into it, once each
        written.visit(written.resolve_refs(whole, "schema"), "")
        return _only_json(str(written.format_grammar()))
    except _UnfollowedError as error:
        raise ValueError(f"schema: {error}") from None
    except Exception as error:  # it raises nearly everything, AssertionError among it
        raise ValueError(
            f"schema: cannot be turned into a grammar ({type(error).__name__}: {error})"
        ) from error


def _write_literal(text: str) -> str:
    r"""A JSON value as GBNF writes it: what llama.cpp's converter in C++ does.

    The one in Python leaves backslashes as they are, and GBNF takes them away: of ``"a\"b"`` it
    makes no grammar, of a line break one that breaks the line. Other characters than ASCII stay.
    """
    value = json.dumps(json.loads(text), ensure_ascii=False)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _only_json(grammar: str) -> str:
    """The same without the control characters, quotes and backslashes that no JSON text holds bare.

    The converter's ``char`` lets line breaks through, and the dot of a pattern quotes as well.
    """

    def narrow(found: re.Match[str]) -> str:
        text = found[0]
        return rf'[^\x00-\x1F"\\{text[2:]}' if text.startswith("[^") else text

    return _CLASS_OR_LITERAL.sub(narrow, grammar)


def _without_root_reference(schema: dict[str, Any]) -> dict[str, Any]:
    """The same with what its root refers to in the reference's place.

    Beside a reference the converter overlooks the definitions; pydantic writes recursive models so.
    """
    root, seen = schema, set[str]()
    while (ref := str(root.get("$ref", ""))).startswith("#/") and ref not in seen:
        seen.add(ref)
        root = functools.reduce(operator.getitem, ref.split("/")[1:], schema)
    kept: dict[str, Any] = {
        name: schema[name] for name in ("$defs", "definitions") if name in schema
    }
    return {**kept, **root}


class _UnfollowedError(Exception):
    """A keyword whose meaning would be lost."""


def _check_schema(schema: object) -> None:
    """Refuse what would be passed over, or take llama.cpp's parser too deep."""
    unseen = [schema]
    while unseen:
        part = unseen.pop()
        if isinstance(part, list):
            unseen += part
        if not isinstance(part, dict):
            continue
        _check_siblings(part)
        if "" in (part.get("properties") or ()):  # its rule would take the root's name
            raise _UnfollowedError("a property without a name is not kept to")
        for key, value in part.items():
            if key in _LEFT_ASIDE and value is not False:
                raise _UnfollowedError(
                    f"{key!r} is not kept to; leave it out, and check the answer"
                )
            times = value if isinstance(value, int) and key in _TIMES else 0
            if key == "pattern" and isinstance(value, str):
                counts = re.findall(r"\d+", "".join(re.findall(r"\{[^}]*\}", value)))
                times = max(value.count("("), *map(int, counts), 0)
            if times > _MOST_TIMES:
                raise _UnfollowedError(f"{key} asks for {times} ({_MOST_TIMES} at most)")
            if key in _NAMED and isinstance(value, dict):
                unseen += value.values()
            elif key in _NESTED:
                unseen.append(value)


def _check_siblings(part: dict[str, Any]) -> None:
    """Refuse a keyword beside another for whose sake the converter does not look at it."""
    followed = _followed(part)
    for key in _NARROWING:
        if key in part and part[key] and part[key] is not True and key not in followed:
            beside = f" beside {followed[0]!r}" if followed and followed[0] in part else ""
            raise _UnfollowedError(f"{key!r}{beside} is not kept to; leave it out, or put it apart")


def _followed(part: dict[str, Any]) -> tuple[str, ...]:
    """The keywords that the converter goes by, in its order."""
    for key in ("$ref", "oneOf", "anyOf"):
        if key in part:
            return (key,)
    if isinstance(part.get("type"), list):
        return ("type",)
    for key in ("const", "enum"):
        if key in part:
            return (key,)
    if "properties" in part or part.get("additionalProperties", True) is not True:
        return ("properties", "required", "additionalProperties")
    if "allOf" in part:
        return ("allOf",)
    items = part.get("items") or part.get("prefixItems")
    if items:
        name = "items" if part.get("items") else "prefixItems"
        n_items = len(items) if isinstance(items, list) else None  # of a tuple, its length says it
        bounds = [key for key in _TIMES[2:] if n_items is None or part.get(key) == n_items]
        return (name, *bounds)
    return ("pattern",) if "pattern" in part else _TIMES[:2]


class GrammarState:
    """Where an answer is in a grammar.

    Args:
        model: Outlives the state.
        grammar: GBNF with a rule ``root``.

    Raises:
        ValueError: llama.cpp refused the grammar.
    """

    def __init__(self, model: LlamaModel, grammar: str) -> None:
        self._llama, self._model = load_llama(), model
        clear_errors()
        self.handle = self._llama.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
        if not self.handle:
            refusal = engine_error("schema: its grammar is not one that llama.cpp follows")
            raise ValueError(refusal.message)
        self._one = np.zeros(1, CANDIDATE)

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if token in self._model.control_ids and not self._ends(token):
            return False  # llama.cpp would take its name as text, but it shows nothing
        self._one["id"], self._one["logit"] = token, 0
        return bool(len(self._apply(self._one)))

    def allowed(self) -> NDArray[np.int32]:
        """Ids of all tokens that may come next."""
        candidates = np.zeros(self._model.n_vocab, CANDIDATE)
        candidates["id"] = np.arange(self._model.n_vocab)
        allowed = self._apply(candidates)
        control = [n for n in self._model.control_ids if not self._ends(n)]
        return allowed[~np.isin(allowed, control)]

    def _apply(self, candidates: NDArray[np.void]) -> NDArray[np.int32]:
        array = candidate_array(self._llama, candidates)
        self._llama.llama_sampler_apply(self.handle, ctypes.byref(array))
        ids: NDArray[np.int32] = candidates["id"][candidates["logit"] > -math.inf]
        return ids

    def accept(self, token: int) -> bool:
        """Go on by a token; True if it ends the answer.

        Raises:
            ValueError: The token is not allowed.
        """
        if not self.allows(token):
            raise ValueError(f"token {token}: not allowed by the grammar")
        self._llama.llama_sampler_accept(self.handle, token)
        return self._ends(token)

    def _ends(self, token: int) -> bool:
        return bool(self._llama.llama_vocab_is_eog(self._model.vocab, int(token)))

    def close(self) -> None:
        """Free it."""
        if self.handle:
            self._llama.llama_sampler_free(self.handle)
            self.handle = None
