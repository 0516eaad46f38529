"""Thousands of bad requests, and a crowd that comes and goes: never a 500, and the server lives."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter
from typing import Any

import httpx2
from serving import (
    CHAT,
    HI,
    PATIENCE_S,
    GrammarEngine,
    PacedEngine,
    client_of,
    data_url,
    fake_app,
    image_part,
    listening,
    png,
    service_of,
    wait_until,
)

from autoglm_gguf import measure_memory
from autoglm_gguf.server.openapi import describe_api
from autoglm_gguf.server.params import ServerParams
from autoglm_gguf.server.replies import ChatCompletion, TextCompletion

API = describe_api()
N_CHATS, N_COMPLETIONS, N_OTHERS = 3000, 1000, 500
REPLIES = {CHAT: ChatCompletion, "/v1/completions": TextCompletion}
TEXTS = (
    "",
    "a",
    "\x00",
    "</answer>",
    "<|image|>",
    "<|user|>",
    "do(action=",
    "\u202e",
    "data:",
    "好" * 9,
)
IMAGES = (data_url(png()), data_url(png()[:60]), data_url(b"x"), "file:///etc/passwd", "http://x/")
NUMBERS = (0, -1, 1, 2, 0.5, 21, 1000, -(2**63), 2**64, 10**400, 1e308, -0.0)


class Mess:
    """Makes values of a described shape, and every so often something else.

    Args:
        chance: Seeded: a failure comes again.
        often: How likely a value is something else.
    """

    def __init__(self, chance: random.Random, often: float) -> None:
        self._chance, self._often = chance, often

    def value(self, schema: dict[str, Any]) -> Any:
        chance = self._chance
        if chance.random() < self._often:
            return self.junk()
        if "$ref" in schema:
            return self.value(API["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.value(chance.choice(schema[key]))
        if "const" in schema or "enum" in schema:
            return chance.choice(schema.get("enum") or [schema["const"]])
        if schema.get("type") == "object" and "properties" in schema:
            return self._fields(schema)
        if schema.get("type") == "array":
            return [self.value(schema.get("items", {})) for _ in range(chance.randint(0, 3))]
        return self._simple(schema)

    def _fields(self, schema: dict[str, Any]) -> dict[str, Any]:
        names = list(schema["properties"])
        needed = set(schema.get("required", ()))
        few = set(self._chance.sample(names, min(len(names), self._chance.randint(0, 4))))
        kept = [name for name in names if name in needed | few]
        if kept and self._chance.random() < self._often:
            kept.remove(self._chance.choice(kept))
        return {name: self.value(schema["properties"][name]) for name in kept}

    def _simple(self, schema: dict[str, Any]) -> Any:
        low, high = schema.get("minimum", -5), schema.get("maximum", 50)
        kind = schema.get("type")
        if kind == "string":
            return self._chance.choice(TEXTS + IMAGES)
        if kind == "integer":
            return self._chance.randint(low, high)
        if kind == "number":
            return self._chance.uniform(low, high)
        if kind == "boolean":
            return self._chance.random() < 0.5
        return None if kind == "null" else self.junk()

    def junk(self, depth: int = 0) -> Any:
        kind = self._chance.randint(0, 5 if depth < 3 else 3)
        if kind == 4:
            return [self.junk(depth + 1) for _ in range(self._chance.randint(0, 3))]
        if kind == 5:
            names = ("type", "text", "url", "schema", "", "role")
            return {self._chance.choice(names): self.junk(depth + 1) for _ in range(2)}
        return self._chance.choice([(None,), (True, False), NUMBERS, TEXTS][kind])


def test_requests_of_every_shape_never_break_the_server() -> None:
    """Nearly right ones, wrong in one place, and quite wrong ones."""
    chance = random.Random(7)

    async def run() -> Counter[tuple[str, int]]:
        seen: Counter[tuple[str, int]] = Counter()
        async with client_of(fake_app(GrammarEngine(b"ok"))) as client:
            for path, n in ((CHAT, N_CHATS), ("/v1/completions", N_COMPLETIONS)):
                content = API["paths"][path]["post"]["requestBody"]["content"]
                for _ in range(n):
                    mess = Mess(chance, chance.choice([0.0, 0.02, 0.1]))
                    body = mess.value(content["application/json"]["schema"])
                    answer = await client.post(path, content=json.dumps(body))
                    check(answer, path, body)
                    seen[path, answer.status_code] += 1
            assert (await client.post(CHAT, json=HI)).status_code == 200
        return seen

    seen = asyncio.run(run())
    for path in REPLIES:
        assert min(seen[path, 200], seen[path, 400]) > 100, seen


def check(answer: httpx2.Response, path: str, body: Any) -> None:
    assert answer.status_code in (200, 400), (answer.text, body)
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert set(error) - {"hint"} == {"message", "type", "param", "code"}
        assert error["message"]
    elif isinstance(body, dict) and body.get("stream"):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("data: [DONE]\n\n") or '"error"' in answer.text
        assert "server_error" not in answer.text, (answer.text, body)
    else:
        REPLIES[path].model_validate_json(answer.content)


def test_bytes_methods_and_paths_at_random_never_break_the_server() -> None:
    chance = random.Random(8)
    paths = [*API["paths"], "/", "/index.html", "/ws/generate", "/v1", "//", "/v1/models/%00"]
    methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "BREW"]
    kinds = ["application/json", "text/plain", "x", ""]

    async def run() -> None:
        async with client_of(fake_app()) as client:
            for _ in range(N_OTHERS):
                path = chance.choice(paths).replace("{name}", "x")
                answer = await client.request(
                    chance.choice(methods),
                    path,
                    content=chance.randbytes(chance.randint(0, 64)),
                    headers={"content-type": chance.choice(kinds)},
                )
                assert answer.status_code < 500, (path, answer.text)
            assert (await client.post(CHAT, json=HI)).status_code == 200

    asyncio.run(run())


# --- a crowd ---

N_REQUESTS, N_CLIENTS = 500, 32


async def crowd(url: str) -> dict[str, int]:
    """Clients that ask, stream, or leave in the middle of it; how it ended, by kind."""
    ended: dict[str, int] = {}
    waiting = list(range(N_REQUESTS))
    picture = image_part(png(112, 168))

    async def ask(client: httpx2.AsyncClient, chance: random.Random, name: str) -> str:
        content = ["hi", picture] if chance.random() < 0.2 else "hi"
        body = {
            "messages": [{"role": "user", "content": content}],
            "stream": chance.random() < 0.5,
            "user": name,
        }
        patience = chance.choice([0.005, 0.03, PATIENCE_S, PATIENCE_S])
        try:
            async with asyncio.timeout(patience):
                answer = await client.post(url + CHAT, json=body)
                return str(answer.status_code)
        except TimeoutError:
            return "left"

    async def run(n: int) -> None:
        chance = random.Random(n)
        async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
            while waiting:
                waiting.pop()
                kind = await ask(client, chance, f"client-{n}")
                ended[kind] = ended.get(kind, 0) + 1

    await asyncio.gather(*(run(n) for n in range(N_CLIENTS)))
    return ended


def held_bytes() -> int:
    gc.collect()
    usage = measure_memory()
    assert usage is not None
    return usage.anonymous_bytes


def test_crowd_that_comes_and_goes_is_answered_or_refused_and_leaves_nothing() -> None:
    engine = PacedEngine(b"a few words", prefill_s=0.001, token_s=0.0002)
    app = fake_app(engine, ServerParams(max_queue=16))
    with listening(app) as url:
        service = service_of(app)
        first = asyncio.run(crowd(url))
        before = held_bytes()
        second = asyncio.run(crowd(url))
        for ended in (first, second):
            assert set(ended) <= {"200", "429", "left"}
            assert sum(ended.values()) == N_REQUESTS
            assert ended["200"] > 0
            assert ended["left"] > 0
        wait_until(lambda: service.queue.is_idle and service.queue.n_waiting == 0)
        wait_until(lambda: service.bodies.n_bytes == 0)
        assert held_bytes() - before < 10_000_000
        assert not service._answers
        assert httpx2.post(url + CHAT, json=HI).status_code == 200
