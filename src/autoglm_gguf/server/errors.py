"""Error class to HTTP status, in one table, and OpenAI's error object.

What a client did wrong is told in full; what went wrong in here is told without details, which the
log has.
"""

from __future__ import annotations

import logging
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from autoglm_gguf.errors import (
    ActionParseError,
    AutoGLMError,
    BenchError,
    CheckpointError,
    CloudError,
    ContextFullError,
    ConversionError,
    DoesNotFitError,
    EngineBusyError,
    EngineError,
    EvaluationError,
    GGUFError,
    HubError,
    ImageError,
    NativeLibraryError,
    PromptError,
    SavedSessionError,
    ServerError,
    VerificationError,
)

CLIENT_LEFT = 499
"""Status of a request whose client did not wait; nobody sees it but log and metrics."""
_log = logging.getLogger(__name__)
_MAX_MESSAGE = 600  # characters
_MAX_TOLD = 3  # faults of a body that are told at once

HTTP_STATUS: dict[type[BaseException], tuple[int, str]] = {
    ContextFullError: (400, "context_length_exceeded"),
    ImageError: (400, "invalid_image"),
    PromptError: (400, "invalid_prompt"),
    ValueError: (400, "invalid_value"),
    TypeError: (400, "invalid_type"),
    EngineBusyError: (503, "engine_busy"),
    EngineError: (500, "engine_error"),
    ActionParseError: (500, "no_action"),
    DoesNotFitError: (503, "does_not_fit"),
    CloudError: (502, "cloud_error"),
    # No request leads to these: the model would not have been loaded.
    CheckpointError: (500, "internal_error"),
    HubError: (500, "internal_error"),
    GGUFError: (500, "internal_error"),
    ConversionError: (500, "internal_error"),
    BenchError: (500, "internal_error"),
    EvaluationError: (500, "internal_error"),
    SavedSessionError: (500, "internal_error"),
    ServerError: (500, "internal_error"),
    VerificationError: (500, "internal_error"),
    NativeLibraryError: (500, "internal_error"),
}
"""Status and OpenAI's ``code``. The first entry that an error is an instance of counts."""
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status, 4xx or 5xx.
        code: For programs, in OpenAI's words where it has one.
        message: For people.
        param: The field that is wrong, dotted.
        hint: What to do about it.
        retry_after_s: When to try again, seconds.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        hint: str = "",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.hint = status, code, param, hint
        self.message = message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "…"
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error object; a hint is one field more."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": {**error, "hint": self.hint} if self.hint else error}

    def response(self) -> JSONResponse:
        """The same as an answer, with the headers that go with it."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error; what it is not told is logged."""
    if isinstance(error, ApiError):
        return error
    found = next((v for kind, v in HTTP_STATUS.items() if isinstance(error, kind)), None)
    status, code = found or (500, "internal_error")
    if status < 500:
        hint = error.hint if isinstance(error, AutoGLMError) else ""
        message = error.message if isinstance(error, AutoGLMError) else str(error)
        return ApiError(status, code, message, hint=hint)
    _log.error("a request failed: %s", error, exc_info=error)
    if isinstance(error, CloudError | DoesNotFitError):  # nothing in here is broken
        return ApiError(status, code, error.message, hint=error.hint)
    if status == 503:
        return ApiError(status, code, "the model is busy", retry_after_s=1)
    return ApiError(status, code, "the server failed; its log says more")


def as_bad_request(error: ValidationError) -> ApiError:
    """The faults of a body, the first ones, without the values that were sent."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    first = faults[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"body: not JSON ({first['msg']})")
    told = "; ".join(f"{_dotted(f['loc'])}: {f['msg']}" for f in faults[:_MAX_TOLD])
    more = f"; and {len(faults) - _MAX_TOLD} more" if len(faults) > _MAX_TOLD else ""
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, code, told + more, param=_dotted(first["loc"]))


def unsupported(param: str, why: str, hint: str = "") -> ApiError:
    """A field that is known and cannot be honoured; to ignore it would change the answer."""
    return ApiError(400, "unsupported_parameter", f"{param}: {why}", param=param, hint=hint)


def _dotted(place: tuple[int | str, ...]) -> str:
    if place[2:3] == ("content",):  # pydantic names the part's type after its number
        place = (*place[:4], *place[5:])
    return ".".join(map(str, place)) or "body"
