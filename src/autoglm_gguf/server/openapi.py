"""The interface as OpenAPI 3.1, written from the shapes that requests are checked by."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from autoglm_gguf import __version__
from autoglm_gguf.server.protocol import ChatRequest, CompletionRequest
from autoglm_gguf.server.replies import ChatCompletion, ChatCompletionChunk, TextCompletion

_TEMPLATE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "hint": {"type": "string"},
            },
        }
    },
}
_ANSWER = (
    "The answer. With stream: server-sent events whose data are chunks, then [DONE]; where it "
    "fails on the way, an error object in place of the rest."
)
_OBJECT = {"type": "object"}
_REFUSALS = {
    "400": "A field is wrong, or the prompt does not fit.",
    "401": "No API key, or not the right one.",
    "403": "Host or Origin is not trusted.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many requests wait; Retry-After says when to come again.",
    "503": "The model is being loaded, or the server is shutting down.",
}


@cache
def describe_api() -> dict[str, Any]:
    """The OpenAPI document."""
    requests: list[type[BaseModel]] = [ChatRequest, CompletionRequest]
    replies: list[type[BaseModel]] = [ChatCompletion, ChatCompletionChunk, TextCompletion]
    _, schemas = models_json_schema(
        [(m, "validation") for m in requests] + [(m, "serialization") for m in replies],
        ref_template=_TEMPLATE,
    )
    unkeyed: list[dict[str, list[str]]] = [{}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "autoglm-gguf",
            "version": __version__,
            "description": "AutoGLM on your own device. Not described here: the WebSocket "
            "/ws/generate, and the page at /.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _completion("Answer a conversation", ChatRequest, ChatCompletion)
            },
            "/v1/completions": {
                "post": _completion("Go on with a text", CompletionRequest, TextCompletion)
            },
            "/v1/models": {"get": _query("The one model there is")},
            "/v1/models/{name}": {
                "get": {
                    **_query("The same by its name", "404"),
                    "parameters": [
                        {
                            "name": "name",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ],
                }
            },
            "/health": {"get": {**_query("Whether the model is loaded"), "security": unkeyed}},
            "/status": {"get": _query("Model, sizes, notes, limits, queue, memory in bytes")},
            "/metrics": {"get": _query("Prometheus metrics", content="text/plain")},
            "/openapi.json": {"get": {**_query("This document"), "security": unkeyed}},
        },
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _completion(summary: str, body: type[BaseModel], reply: type[BaseModel]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "application/json": {"schema": _ref(reply)},
        "text/event-stream": {},
    }
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(body)}},
        },
        "responses": {"200": {"description": _ANSWER, "content": content}, **_refusals()},
    }


def _query(summary: str, *more: str, content: str = "application/json") -> dict[str, Any]:
    schema = _OBJECT if content == "application/json" else {"type": "string"}
    refused = {k: v for k, v in _refusals().items() if k in ("401", "403", "503", *more)}
    if "404" in more:
        refused["404"] = _refusal("There is none of this name.")
    answer = {"description": "As asked.", "content": {content: {"schema": schema}}}
    return {"summary": summary, "responses": {"200": answer, **refused}}


def _refusals() -> dict[str, Any]:
    return {status: _refusal(why) for status, why in _REFUSALS.items()}


def _refusal(why: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": why, "content": {"application/json": {"schema": schema}}}


def _ref(shape: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _TEMPLATE.format(model=shape.__name__)}
