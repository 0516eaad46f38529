"""JSON schemas: what the grammar keeps to, and what is refused before llama.cpp sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoglm_gguf import AutoGLM
from autoglm_gguf.native.grammar import schema_to_grammar

pytestmark = pytest.mark.native
STRING = {"type": "string"}


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "integer", "minimum": 0, "maximum": 999}, "'minimum' is not kept to"),
        ({"properties": {"x": {"multipleOf": 5}}}, "'multipleOf'"),
        ({"$defs": {"a": {"not": {}}}, "properties": {}}, "'not'"),
        ({"type": "array", "items": STRING, "uniqueItems": True}, "'uniqueItems'"),
        ({"anyOf": [STRING, {"type": "object", "minProperties": 1}]}, "'minProperties'"),
        ({"type": "string", "maxLength": 10**8}, "maxLength asks for 100000000 (1000 at most)"),
        ({"type": "string", "minLength": 10**8}, "minLength asks for"),
        ({"type": "array", "items": STRING, "maxItems": 1001}, "maxItems asks for 1001"),
        ({"type": "string", "pattern": "^a{2,3000}$"}, "pattern asks for 3000"),
        ({"type": "string", "pattern": "^" + "(" * 2000 + "a" + ")" * 2000 + "$"}, "pattern"),
        ({"type": ["string", "null"], "enum": ["a", None]}, "'enum' beside 'type'"),
        ({"type": ["string", "null"], "maxLength": 3}, "'maxLength' beside 'type'"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "'maxLength' beside 'pattern'"),
        ({"type": "array", "minItems": 3}, "'minItems' is not kept to"),
        ({"type": "object", "required": ["a"]}, "'required' is not kept to"),
        ({"anyOf": [STRING], "properties": {"a": STRING}}, "'properties' beside 'anyOf'"),
        ({"prefixItems": [STRING], "minItems": 3, "maxItems": 3}, "'minItems' beside"),
        ({"type": "nothing"}, "cannot be turned into a grammar"),
        ({"properties": 5}, "cannot be turned into a grammar"),
        ({"type": "object", "properties": {"": STRING}}, "a property without a name"),
    ],
)
def test_schema_that_would_not_be_kept_to_is_refused(schema: object, named: str) -> None:
    with pytest.raises(ValueError, match=r"^schema: ") as caught:
        schema_to_grammar(json.dumps(schema))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"minimum": STRING, "not": STRING}},  # names, not keywords
        {"type": "array", "items": STRING, "uniqueItems": False, "maxItems": 1000},
        {"enum": [{"maximum": 1}], "default": {"not": 1}, "title": "maximum"},
        {"type": "string", "pattern": "^2026,3000$"},
        {"type": "string", "maxLength": 1000},
        {"type": "string", "enum": ["a"], "title": "t"},
        {"type": "object", "properties": {"a": STRING}, "required": [], "minItems": 0},
        {"type": "array", "prefixItems": [STRING, STRING], "minItems": 2, "maxItems": 2},
        {"$defs": {"a": STRING}, "properties": {"a": {"$ref": "#/$defs/a", "description": "d"}}},
        {"type": "object", "additionalProperties": True},
    ],
)
def test_schema_whose_words_only_look_like_keywords_is_taken(schema: object) -> None:
    assert "root ::=" in schema_to_grammar(json.dumps(schema))


def test_schema_whose_root_is_a_reference_is_taken() -> None:
    node = {"type": "object", "properties": {"b": STRING, "a": {"$ref": "#/$defs/Node"}}}
    grammar = schema_to_grammar(json.dumps({"$defs": {"Node": node}, "$ref": "#/$defs/Node"}))
    assert "root ::= " in grammar
    assert "Node ::= " in grammar
    assert grammar.index("-b-kv") < grammar.index("-a-kv")


def test_schema_whose_references_lead_in_a_circle_is_refused() -> None:
    circle = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
    with pytest.raises(ValueError, match=r"^schema: "):
        schema_to_grammar(json.dumps({"$defs": circle, "$ref": "#/$defs/a"}))


def test_schema_that_no_answer_fits_leaves_the_model_usable(random_pair: tuple[Path, Path]) -> None:
    with AutoGLM.load(random_pair[0], mmproj=None, n_ctx=256, n_threads=1) as model:
        with pytest.raises(ValueError, match="schema: no token can follow"):
            nothing = {"type": "string", "pattern": "^\\u0000$"}  # no token holds that character
            model.generate("t", max_tokens=9, constrain=nothing)
        with pytest.raises(ValueError, match="schema: nested too deeply"):
            model.generate("t", max_tokens=9, constrain=nested(5000))
        assert model.generate("t", max_tokens=30, constrain={"enum": ["a"]}).text == '"a"'


@pytest.mark.parametrize(
    "value",
    ['a"b', "a\\b", "a\nb\t", "\0", "打开微信", "", {"a": ['"', 1.5, None]}, "\u2028\u202e🎉"],
    ids=ascii,
)
def test_constant_comes_back_as_it_was(random_pair: tuple[Path, Path], value: Any) -> None:
    with AutoGLM.load(random_pair[0], mmproj=None, n_ctx=256, n_threads=1) as model:
        for schema in ({"const": value}, {"enum": [value]}):
            answer = model.generate("t", max_tokens=90, constrain=schema)
            assert json.loads(answer.text) == value
        name = json.dumps(value)
        named = {"type": "object", "properties": {name: {"const": 1}}, "required": [name]}
        answer = model.generate("t", max_tokens=90, constrain=named)
        assert json.loads(answer.text) == {name: 1}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 60},
        {"type": "string", "pattern": "^.{1,60}$"},
    ],
    ids=["string", "pattern"],
)
def test_answer_held_to_a_schema_is_json_where_the_model_would_break_the_line(
    schema: object, tiny_pair: Callable[[str], tuple[Path, Path]]
) -> None:
    with AutoGLM.load(tiny_pair("q8_0")[0], mmproj=None, n_ctx=512) as model:
        free = model.generate("打开微信", max_tokens=60)
        assert "\n" in free.text and '"' in free.text, "what a JSON string cannot hold as it is"
        held = model.generate("打开微信", max_tokens=400, constrain=schema)
        assert held.finish_reason == "stop" and json.loads(held.text) is not None


def test_schema_keeps_texts_that_look_like_classes() -> None:
    grammar = schema_to_grammar(json.dumps({"enum": ["[^a]", '"[^']}))
    assert '"\\"[^a]\\""' in grammar
