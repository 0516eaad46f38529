"""Schemas from strangers: what is let through, and what would never come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autoglm_gguf import AutoGLM
from autoglm_gguf.server.errors import ApiError
from autoglm_gguf.server.json_schema import check_schema

DATE = "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
SOUND: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "fields": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 40}, "n": {"type": "integer"}},
        "required": ["name"],
    },
    "choices": {"anyOf": [{"type": "string"}, {"enum": ["a", "b", 1, None]}]},
    "tree": {
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            }
        },
    },
    "date": {"type": "string", "pattern": DATE},
    "word": {"type": "string", "pattern": r"^(yes|no|[a-z]+)\.?$"},
    "fields called as keywords are": {
        "properties": {"pattern": {"type": "string"}, "minLength": {"type": "integer"}}
    },
}
DEFS = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(20)}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "deep": (eval('{"a":' * 40 + "{}" + "}" * 40), "levels"),
    "wide": ({"enum": list(range(3000))}, "values"),
    "long": ({"const": "x" * 70_000}, "characters"),
    "unrolled": ({"type": "string", "maxLength": 10**9}, "maxLength"),
    "unrolled by many": (
        {"anyOf": [{"type": "string", "maxLength": 500}] * 20},
        "together",
    ),
    "negative": ({"type": "array", "items": {}, "minItems": -1}, "minItems"),
    "fractional": ({"type": "string", "maxLength": 1.5}, "maxLength"),
    "properties": ({"properties": {f"p{n}": {} for n in range(101)}}, "properties"),
    "itself": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "itself"),
    "doubling": (
        {"properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": {**DEFS, "a20": {"type": "null"}}},
        "alternatives",
    ),
    "elsewhere": ({"$ref": "https://example.com/schema"}, "within"),
    "nowhere": ({"$ref": "#/$defs/x"}, "nothing"),
    "long chain": (
        {"$defs": {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(900)}},
        "recursion|nothing",
    ),
    **{
        f"pattern {pattern}": ({"type": "string", "pattern": pattern}, "pattern")
        for pattern in (
            *("^]$", "^}$", "^a]b$", "^[$", "^(a$", "^a)$", "^\\$", "^(?=a)$", "^[]$", "^[z-a]$"),
            *(
                "^((a?){500})$",
                "^(a?){50}$",
                "^a?{9}$",
                "^a{9}{9}$",
                "^[a]{60}[b]{60}$",
                "^a{9999}$",
            ),
            *("^\x00$", "^\n$", "^\\x00$", "^\\u0000$", "x" * 101),
        )
    },
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_schema_is_let_through(name: str) -> None:
    assert check_schema(SOUND[name], "p") is SOUND[name]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schema_is_refused_at_once(name: str) -> None:
    schema, says = HOSTILE[name]
    began = time.process_time()
    with pytest.raises(ApiError, match=says) as caught:
        check_schema(schema, "response_format")
    assert caught.value.status == 400
    assert caught.value.param == "response_format"
    assert time.process_time() - began < 1.0


@pytest.fixture(scope="module")
def model(tiny_pair: Callable[[str], tuple[Path, Path]]) -> Iterator[AutoGLM]:
    with AutoGLM.load(tiny_pair("q8_0")[0], mmproj=None, n_ctx=512) as model:
        yield model


ODD: tuple[dict[str, Any], ...] = (
    *SOUND.values(),
    {"type": "string", "maxLength": 500},
    {"type": "array", "items": {"type": "string", "maxLength": 500}, "maxItems": 500},
    {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(100)}},
    {"type": "string", "pattern": "^(a*)*$"},
    {"type": "string", "pattern": "^" + "a?" * 49 + "$"},
    {"type": "string", "pattern": "^.{50}.{50}$"},
    {"type": "string", "pattern": "^" + "(" * 48 + "a" + ")" * 48 + "$"},
    {"enum": ["a\u0000b", "\u2028", '"', "\\"]},
    {"enum": []},
    {"anyOf": []},
    {"type": 5},
    {"properties": {"a": True}},
    {"properties": {"": {"type": "string"}}, "required": [""]},
    {"type": "string", "pattern": "^|$"},
    {"type": "string", "pattern": "^*$"},
    {"type": "string", "pattern": "^\\d$"},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "object"}}},
)


@pytest.mark.native
@pytest.mark.parametrize("schema", ODD, ids=lambda schema: str(schema)[:60])
def test_whatever_is_let_through_is_followed_or_refused_and_comes_back(
    model: AutoGLM, schema: dict[str, Any]
) -> None:
    check_schema(schema, "p")
    began = time.process_time()
    try:
        answer = model.generate("hi", constrain=schema, max_tokens=4)
    except ValueError as error:
        assert "schema" in str(error)
    else:
        assert answer.text
    assert time.process_time() - began < 20
