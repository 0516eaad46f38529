"""The ASGI application: endpoints around one `Service`.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/NAME
GET /health   GET /status   GET /metrics   GET /openapi.json
WebSocket /ws/generate      GET / (the page)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

from autoglm_gguf.server.backend import Backend
from autoglm_gguf.server.completions import chat_completions, completions
from autoglm_gguf.server.errors import ApiError, as_api_error
from autoglm_gguf.server.metrics import CONTENT_TYPE
from autoglm_gguf.server.openapi import describe_api
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.security import (
    PAGE_POLICY,
    SOCKET_PATH,
    Guard,
    Observed,
    normal_origin,
)
from autoglm_gguf.server.service import Service
from autoglm_gguf.server.status import describe_status
from autoglm_gguf.server.websocket import generate

PAGE = Path(__file__).parent / "page"
_PATHS = "paths of the API begin with /v1/, as /v1/chat/completions; /openapi.json lists all"
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    load: Callable[[], Backend],
    params: ServerParams | None = None,
    *,
    on_loaded: Callable[[Service], None] | None = None,
) -> Starlette:
    """An application that loads a model when it starts up, and serves it once it is there.

    Args:
        load: Gives the model, in a thread; ``AutoGLM.load`` with its arguments, or what stands in
            its place.
        params: See `ServerParams`.
        on_loaded: Told when the model is there, or has failed (``service.holder.error``).
    """
    service = Service(load, params or ServerParams())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with service.running(on_loaded):
            yield

    middleware = [Middleware(Observed, metrics=service.metrics, params=service.params)]
    if service.params.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=[*map(normal_origin, service.params.allowed_origins)],
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            )
        )
    middleware.append(Middleware(Guard, params=service.params))
    app = Starlette(
        routes=_routes(),
        middleware=middleware,
        exception_handlers={ApiError: _on_error, HTTPException: _on_http_error},
        lifespan=lifespan,
    )
    if PAGE.is_dir():  # after all else: a path that takes other methods is no file
        app.router.default = _Page(directory=PAGE, html=True)
    app.state.service = service
    return app


def _routes() -> list[BaseRoute]:
    return [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/health", _health),
        Route("/status", _status),
        Route("/metrics", _metrics),
        Route("/openapi.json", _openapi),
        WebSocketRoute(SOCKET_PATH, generate),
    ]


class _Page(StaticFiles):
    """The page's files, which may load nothing from elsewhere and be framed by nobody."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await super().__call__(scope, receive, send)
        else:
            await WebSocketClose()(scope, receive, send)

    async def get_response(self, path: str, scope: Scope) -> Response:
        if scope["method"] not in ("GET", "HEAD") and path != ".":
            raise HTTPException(404)  # no endpoint, whatever the method: a wrong base URL, mostly
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = PAGE_POLICY
        response.headers["Cache-Control"] = "no-cache"
        if path.endswith(".js"):  # Windows may know it as text/plain, which browsers do not run
            response.headers["Content-Type"] = "text/javascript; charset=utf-8"
        return response


async def _health(request: Request) -> Response:
    """Whether requests are answered, and whether images may be among them."""
    holder = _service(request).holder
    is_ready = holder.state == "ready"
    headers = {} if is_ready else {"Retry-After": "2"}
    told: dict[str, Any] = {"status": holder.state}
    if is_ready and holder.backend is not None:
        told["takes_images"] = holder.backend.takes_images
    return JSONResponse(told, 200 if is_ready else 503, headers)


async def _models(request: Request) -> Response:
    """The one model there is."""
    return JSONResponse({"object": "list", "data": [_describe_model(_service(request))]})


async def _model(request: Request) -> Response:
    """The same by its name."""
    service, name = _service(request), request.path_params["name"]
    if name != service.ready().info.name:
        raise ApiError(404, "model_not_found", "no model of this name is loaded", param="model")
    return JSONResponse(_describe_model(service))


def _describe_model(service: Service) -> dict[str, Any]:
    info = service.ready().info
    return {
        "id": info.name,
        "object": "model",
        "created": service.started,
        "owned_by": "autoglm-gguf",
        "max_model_len": info.n_ctx,
    }


async def _status(request: Request) -> Response:
    """How the server is; see `describe_status`."""
    return JSONResponse(describe_status(_service(request)))


async def _metrics(request: Request) -> Response:
    """Everything that is counted."""
    service = _service(request)
    return Response(await service.read(service.metrics.render), media_type=CONTENT_TYPE)


async def _openapi(_: Request) -> Response:
    """This interface, described."""
    return JSONResponse(describe_api())


async def _on_error(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "invalid_request")
    hint = _PATHS if error.status_code == 404 else ""
    response = ApiError(error.status_code, code, error.detail.lower(), hint=hint).response()
    response.headers.update(error.headers or {})
    return response


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
