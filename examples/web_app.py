"""A web app of your own around the library: one model, answers as they are made.

    pip install 'autoglm-gguf[server]'
    python examples/web_app.py --port 8001
    curl --get --data-urlencode 'q=打开微信' http://127.0.0.1:8001/ask
    curl --data-binary @screen.png 'http://127.0.0.1:8001/act?task=Open+Chrome'

Requests wait for each other, and a client that leaves ends its answer. OpenAI's API, limits and
keys are in `autoglm-gguf serve`; this has none of them and listens on this machine alone.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from autoglm_gguf import AutoGLM, AutoGLMError, default_pair


async def ask(request: Request) -> Response:
    async def words(model: AutoGLM, question: str) -> AsyncIterator[str]:
        async with aclosing(model.astream(question, max_tokens=256)) as chunks:
            async for chunk in chunks:
                yield chunk.text

    answer = words(request.app.state.model, request.query_params.get("q", ""))
    return StreamingResponse(answer, media_type="text/plain")


async def act(request: Request) -> Response:
    model, task = request.app.state.model, request.query_params.get("task", "")
    try:
        step = await model.aact(task, await request.body() or None)
    except AutoGLMError as error:  # such as ImageError: the body is no image
        return JSONResponse({"error": error.message, "hint": error.hint}, status_code=422)
    return JSONResponse({"thinking": step.thinking, "action": step.action.render()})


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    with AutoGLM.load(default_pair().text) as app.state.model:  # or the path of a text GGUF
        yield


routes = [Route("/ask", ask), Route("/act", act, methods=["POST"])]
app = Starlette(routes=routes, lifespan=lifespan)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A model behind two addresses.")
    parser.add_argument("--port", type=int, default=8001)
    uvicorn.run(app, host="127.0.0.1", port=parser.parse_args().port)
