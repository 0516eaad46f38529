"""Thousands of bad requests, and a crowd that comes and goes: never a 500, and the server lives."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
from collections import Counter
from contextlib import aclosing
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
    events,
    fake_app,
    image_part,
    listening,
    png,
    service_of,
    text_of,
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
WORDS = "a few words"
LONGEST_S = 20 * PATIENCE_S  # for a crowd, which a busy machine serves slowly
STAYS, LEAVES = ("whole", "stream"), ("at the first event", "at once")


class Crowd:
    """Clients that ask, stream, or leave in the middle of it; how it ended, by kind.

    Who leaves is drawn, not timed: so it is known what must have become of every request. Who
    stays and is refused asks again, until there is a place.
    """

    def __init__(self, url: str) -> None:
        self.ended: Counter[tuple[str, str]] = Counter()
        self._url = url
        self._left = N_REQUESTS
        self._picture = image_part(png(112, 168))

    async def run(self) -> None:
        async with asyncio.timeout(LONGEST_S):
            await asyncio.gather(*(self._client(n) for n in range(N_CLIENTS)))

    async def _client(self, n: int) -> None:
        chance = random.Random(n)
        async with httpx2.AsyncClient(timeout=LONGEST_S) as client:
            while self._left:
                self._left -= 1
                kind = chance.choice(STAYS + LEAVES)
                content = ["hi", self._picture] if chance.random() < 0.2 else "hi"
                body = {"messages": [{"role": "user", "content": content}], "user": f"{n}"}
                self.ended[kind, await self._ask(client, kind, body)] += 1

    async def _ask(self, client: httpx2.AsyncClient, kind: str, body: dict[str, Any]) -> str:
        if kind == "at once":
            return await self._send_and_go(body)
        stream = {"stream": kind != "whole"}
        while True:
            async with client.stream("POST", self._url + CHAT, json=body | stream) as answer:
                if answer.status_code == 429:
                    assert 1 <= int(answer.headers["retry-after"]) <= 60
                    await asyncio.sleep(0.02)
                    if kind in STAYS:
                        continue
                    return "refused"
                assert answer.status_code == 200
                if kind in LEAVES:
                    async with aclosing(answer.aiter_bytes()) as pieces:
                        await anext(pieces)
                    return "left"
                text = (await answer.aread()).decode()
            break
        if kind == "whole":
            assert json.loads(text)["choices"][0]["message"]["content"] == WORDS
        else:
            assert text_of(events(text)) == WORDS and text.endswith("[DONE]\n\n")
        return "answered"

    async def _send_and_go(self, body: dict[str, Any]) -> str:
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", int(self._url.rpartition(":")[2]))
        writer.write(head.encode() + data)
        await writer.drain()
        writer.close()
        return "left"


def held_bytes() -> int:
    gc.collect()
    usage = measure_memory()
    assert usage is not None
    return usage.anonymous_bytes


def requests_by_status(url: str) -> dict[str, int]:
    """Chat completions as the server counts them."""
    counted = re.findall(
        rf'requests_total{{endpoint="{CHAT}",status="(\d+)"}} (\d+)',
        httpx2.get(url + "/metrics").text,
    )
    return {status: int(n) for status, n in counted}


def test_crowd_that_comes_and_goes_is_answered_or_refused_and_leaves_nothing() -> None:
    engine = PacedEngine(WORDS.encode(), prefill_s=0.001, token_s=0.0002)
    app = fake_app(engine, ServerParams(max_queue=16))
    with listening(app) as url:
        service = service_of(app)
        n_answered, before = 0, 0
        for _ in range(2):
            crowd = Crowd(url)
            asyncio.run(crowd.run())
            assert crowd.ended.total() == N_REQUESTS
            for (kind, how), n in crowd.ended.items():
                assert how == "answered" if kind in STAYS else how in ("left", "refused")
                assert n > 0
                n_answered += n * (how == "answered")
            wait_until(lambda: service.queue.is_idle and not service._answers, LONGEST_S)
            wait_until(lambda: service.bodies.n_bytes == 0, LONGEST_S)
            assert service.queue.n_waiting == 0
            before = before or held_bytes()
        assert held_bytes() - before < 10_000_000
        seen = requests_by_status(url)
        assert set(seen) <= {"200", "429", "499"}, "and no other way"
        assert seen["200"] >= n_answered
        assert httpx2.post(url + CHAT, json=HI).status_code == 200
