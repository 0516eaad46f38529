"""Error classes to HTTP statuses and OpenAI's error object."""

from __future__ import annotations

import json
import logging

import pytest
from pydantic import BaseModel, ValidationError
from serving import CHAT, ask, chat, fake_app

from autoglm_gguf import AutoGLMError, EngineError, ImageError, errors
from autoglm_gguf.server.errors import HTTP_STATUS, ApiError, as_api_error, as_bad_request

EXTRA = {
    errors.ContextFullError: {"n_prompt": 9, "n_ctx": 8},
    errors.DoesNotFitError: {"budget_bytes": 1, "required_bytes": 2},
    errors.ActionParseError: {"text": "x"},
}


def family(base: type[AutoGLMError]) -> list[type[AutoGLMError]]:
    return [cls for sub in base.__subclasses__() for cls in (sub, *family(sub))]


OURS = [cls for cls in family(AutoGLMError) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", OURS)
def test_every_error_of_the_package_has_a_status_of_its_own(cls: type[AutoGLMError]) -> None:
    assert any(issubclass(cls, kind) for kind in HTTP_STATUS), "give it a line in HTTP_STATUS"
    told = as_api_error(cls("thing: wrong", hint="do this", **EXTRA.get(cls, {})))
    assert 400 <= told.status < 600


def test_table_lists_no_class_after_its_base() -> None:
    kinds = list(HTTP_STATUS)
    for n, kind in enumerate(kinds):
        assert not any(issubclass(later, kind) for later in kinds[n + 1 :]), kind


def test_clients_fault_is_told_in_full() -> None:
    told = as_api_error(ImageError("image: broken", hint="give a PNG"))
    assert told.body() == {
        "error": {
            "message": "image: broken",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_image",
            "hint": "give a PNG",
        }
    }


@pytest.mark.parametrize("error", [EngineError("/home/me/model.gguf: broke"), KeyError("x")])
def test_own_fault_is_logged_and_not_told(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        told = as_api_error(error)
    assert told.status == 500
    assert "home" not in json.dumps(told.body())
    assert str(error) in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        errors.CloudError("cloud: down", hint="start it"),
        errors.DoesNotFitError("model: large", budget_bytes=1, required_bytes=2, hint="start it"),
    ],
)
def test_what_is_broken_elsewhere_is_told(error: AutoGLMError) -> None:
    told = as_api_error(error)
    assert told.status in (502, 503)
    assert (told.message, told.hint) == (error.message, "start it")


def test_response_has_the_headers_of_its_status() -> None:
    assert ApiError(429, "c", "m", retry_after_s=7).response().headers["retry-after"] == "7"
    assert ApiError(401, "c", "m").response().headers["www-authenticate"] == "Bearer"


def test_long_message_is_cut() -> None:
    assert len(ApiError(400, "c", "x" * 10_000).message) < 1000


class Body(BaseModel):
    a: int
    b: list[int]


def test_faults_of_a_body_name_the_field_and_not_the_value() -> None:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate_json('{"a": "sekrit", "b": [1, "sekrit"]}')
    told = as_bad_request(caught.value)
    assert (told.status, told.param) == (400, "a")
    assert "b.1:" in told.message
    assert "sekrit" not in json.dumps(told.body())


def test_missing_field_has_a_code_of_its_own() -> None:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate_json('{"b": []}')
    assert as_bad_request(caught.value).code == "missing_required_parameter"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/chat/completions", "/v1/embeddings", "/nothing"])
def test_path_that_is_none_is_not_found_by_any_method(method: str, path: str) -> None:
    answer = ask(fake_app(), (method, path, {}))[0]
    told = answer.json()["error"]
    assert (answer.status_code, told["code"]) == (404, "not_found")
    assert "/v1/chat/completions" in told["hint"]


def test_fault_in_a_part_of_a_message_is_named_as_the_client_wrote_it() -> None:
    broken = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": 5}}]
    told = chat(fake_app(), messages=[{"role": "user", "content": broken}]).json()["error"]
    assert told["param"] == "messages.0.content.1.image_url.url"


def test_path_that_takes_other_methods_says_so() -> None:
    answers = ask(fake_app(), ("GET", CHAT, {}), ("POST", "/health", {}), ("POST", "/", {}))
    assert [answer.status_code for answer in answers] == [405] * 3
