"""A device with a cloud behind the server: who answers and why, in every kind of answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeAlias

import httpx2
import pytest
from cloud_server import Cloud, Play, event, frame, refuse, say
from rated_engine import RatedEngine
from serving import (
    CHAT,
    client_of,
    events,
    fake_app,
    image_part,
    listening,
    png,
    service_of,
    text_of,
    wait_until,
)
from wires import answer, opened, said, send

from autoglm_gguf import AutoGLM, CloudModel, HybridClient, HybridPolicy
from autoglm_gguf.errors import DoesNotFitError
from autoglm_gguf.hybrid.local import UnloadedModel
from autoglm_gguf.server.params import ServerParams

BACK = '<think>t</think><answer>do(action="Back")'
HOME = '<think>c</think>\n<answer>do(action="Home")'
SYSTEM = {"role": "system", "content": 'answer with do(action="…")'}
STEP = {"messages": [SYSTEM, {"role": "user", "content": "go back"}], "max_tokens": 200}
PICTURE = {
    "messages": [SYSTEM, {"role": "user", "content": [image_part(png(112, 168)), "go back"]}],
    "max_tokens": 200,
}
UNSURE = "an unsure action, token probability 0.40 on average, under 0.9"
Answered: TypeAlias = tuple[str, Any]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback is reached directly, whatever the machine's proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def hybrid(
    base_url: str | None,
    policy: HybridPolicy | None = None,
    *,
    probability: float = 0.4,
    n_ctx: int = 4096,
    **cloud: Any,
) -> HybridClient:
    local = AutoGLM(RatedEngine(BACK.encode(), probability, n_ctx=n_ctx), content_format="string")
    behind = CloudModel(base_url, "big", **cloud) if base_url else None
    return HybridClient(local, behind, policy or HybridPolicy())


def ask_whole(url: str, body: dict[str, Any]) -> Answered:
    told = httpx2.post(url + CHAT, json=body, timeout=30).raise_for_status().json()
    return told["choices"][0]["message"]["content"], told["route"]


def ask_stream(url: str, body: dict[str, Any]) -> Answered:
    told = httpx2.post(url + CHAT, json={**body, "stream": True}, timeout=30)
    *found, done = events(told.raise_for_status().text)
    assert done == "[DONE]"
    return text_of(found), found[-1]["route"]


def ask_socket(url: str, body: dict[str, Any]) -> Answered:
    with opened(url) as wire:
        send(wire, type="generate", **body)
        frames = answer(wire)
        assert frames[-1]["type"] == "done", frames[-1]
        return said(frames), frames[-1]["route"]


WAYS = {"whole": ask_whole, "stream": ask_stream, "websocket": ask_socket}


@pytest.fixture(params=WAYS)
def ask(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], Answered]:
    return WAYS[request.param]


Ask: TypeAlias = Callable[[str, dict[str, Any]], Answered]


# --- the answer says who gave it ---


def test_sure_action_is_the_devices(ask: Ask) -> None:
    with Cloud() as cloud:
        model = hybrid(cloud.base_url, probability=0.99)
        with listening(fake_app(load=lambda: model)) as url:
            text, route = ask(url, STEP)
    assert text == BACK
    assert (route["source"], route["model"], route["cached"]) == ("local", "fake", False)
    assert route["reason"].startswith("a sure action")
    assert route["confidence"]["mean"] == pytest.approx(0.99, abs=0.01)
    assert cloud.n_connections == 0


def test_unsure_action_is_the_clouds(ask: Ask) -> None:
    with (
        Cloud(say(HOME)) as cloud,
        listening(fake_app(load=lambda: hybrid(cloud.base_url))) as url,
    ):
        text, route = ask(url, STEP)
        assert text == HOME
        assert (route["source"], route["model"], route["reason"]) == ("cloud", "big", UNSURE)
        assert route["confidence"]["lowest"] == pytest.approx(0.4, abs=0.01)
        again, route = ask(url, STEP)
        assert (again, route["cached"]) == (HOME, True)
        assert len(cloud.requests) == 1
        metrics = httpx2.get(url + "/metrics").text
        assert 'autoglm_gguf_routes_total{source="cloud"} 2.0' in metrics


def test_no_cloud_says_nothing_of_routes() -> None:
    with listening(fake_app()) as url:
        told = httpx2.post(url + CHAT, json={"messages": [{"role": "user", "content": "x"}]})
        assert "route" not in told.json()


# --- what may leave ---


def test_image_is_not_sent_where_it_may_not_be(ask: Ask) -> None:
    with (
        Cloud(say(HOME)) as cloud,
        listening(fake_app(load=lambda: hybrid(cloud.base_url))) as url,
    ):
        text, route = ask(url, PICTURE)
    assert text == BACK
    assert route["source"] == "local"
    assert "may not leave the device" in route["reason"]
    assert cloud.n_connections == 0


def test_image_is_sent_where_it_may_be(ask: Ask) -> None:
    policy = HybridPolicy(send_images=True)
    with (
        Cloud(say(HOME)) as cloud,
        listening(fake_app(load=lambda: hybrid(cloud.base_url, policy))) as url,
    ):
        text, route = ask(url, PICTURE)
    assert (text, route["source"]) == (HOME, "cloud")
    assert [part["type"] for part in cloud.requests[0].body["messages"][1]["content"]] == [
        "image_url",
        "text",
    ]


@pytest.mark.parametrize("policy", [HybridPolicy(offline=True), HybridPolicy(send_images=True)])
def test_network_that_is_cut_leaves_the_device_answering(
    no_network: list[object], policy: HybridPolicy
) -> None:
    model = hybrid("http://127.0.0.1:9/v1", policy)

    async def run() -> Any:
        async with client_of(fake_app(load=lambda: model)) as client:
            return (await client.post(CHAT, json=PICTURE)).json()

    told = asyncio.run(run())
    assert told["choices"][0]["message"]["content"] == BACK
    assert told["route"]["source"] == "local"
    if policy.offline:
        assert not no_network
        assert told["route"]["reason"] == "offline: nothing may leave the device"
    else:
        assert no_network
        assert "the cloud was asked in vain" in told["route"]["reason"]


def test_no_cloud_tries_nothing(no_network: list[object]) -> None:
    async def run() -> int:
        async with client_of(fake_app(load=lambda: hybrid(None))) as client:
            return (await client.post(CHAT, json=PICTURE)).status_code

    assert asyncio.run(run()) == 200
    assert not no_network


# --- what the device cannot do ---


@pytest.mark.parametrize("n_chars", [5_000, 200_000])
def test_request_that_exceeds_the_device_is_the_clouds(ask: Ask, n_chars: int) -> None:
    body = {"messages": [{"role": "user", "content": "x" * n_chars}]}
    with (
        Cloud(say("a ", "summary")) as cloud,
        listening(fake_app(load=lambda: hybrid(cloud.base_url))) as url,
    ):
        text, route = ask(url, body)
    assert (text, route["source"]) == ("a summary", "cloud")
    assert "does not fit" in route["reason"]
    assert cloud.requests[0].body["messages"][0]["content"] == "x" * n_chars


def unloaded(base_url: str) -> HybridClient:
    error = DoesNotFitError(
        "model: does not fit", budget_bytes=1, required_bytes=2, hint="a larger budget"
    )
    return HybridClient(UnloadedModel("large", error), CloudModel(base_url, "big"))


def test_model_that_does_not_fit_leaves_the_cloud_answering(ask: Ask) -> None:
    with (
        Cloud(say("hello")) as cloud,
        listening(fake_app(load=lambda: unloaded(cloud.base_url))) as url,
    ):
        assert httpx2.get(url + "/health").json() == {"status": "ready", "takes_images": False}
        text, route = ask(url, {"messages": [{"role": "user", "content": "hi"}]})
        assert (text, route["source"]) == ("hello", "cloud")
        assert route["reason"] == "model: does not fit"


def test_nobody_who_can_answer_is_a_503_with_both_reasons() -> None:
    with (
        Cloud(refuse(500)) as cloud,
        listening(fake_app(load=lambda: unloaded(cloud.base_url))) as url,
    ):
        told = httpx2.post(url + CHAT, json={"messages": [{"role": "user", "content": "hi"}]})
        assert told.status_code == 503
        error = told.json()["error"]
        assert (error["code"], error["message"]) == ("does_not_fit", "model: does not fit")
        assert "asked in vain" in error["hint"]


def test_health_says_whether_images_are_taken() -> None:
    with (
        Cloud() as cloud,
        listening(fake_app(load=lambda: hybrid(cloud.base_url))) as url,
    ):
        assert httpx2.get(url + "/health").json() == {"status": "ready", "takes_images": True}


# --- a cloud that fails ---

BROKEN = {
    "down": None,
    "failing": refuse(500, "oh no"),
    "refusing": refuse(401, json.dumps({"error": {"message": "no"}})),
    "full": refuse(429, "", Retry_After="5"),
    "not JSON": Play([b"data: {nonsense\n\n"]),
    "another shape": Play([frame({"choices": [5]})]),
    "no events": Play([b"<html>"], headers={"Content-Type": "text/html"}),
    "breaking off": Play([event("<think>")], breaks=True),
    "without an action": say("I would rather not"),
    "silent": Play(hangs=True),
}


@pytest.mark.parametrize("name", BROKEN)
def test_cloud_that_fails_leaves_the_devices_answer(ask: Ask, name: str) -> None:
    play = BROKEN[name]
    with Cloud(*([play] if play else [])) as cloud:
        address = cloud.base_url if play else "http://127.0.0.1:9/v1"
        model = hybrid(address, connect_s=2.0, first_byte_s=0.3)
        with listening(fake_app(load=lambda: model)) as url:
            text, route = ask(url, STEP)
    assert text == BACK
    assert route["source"] == "local"
    assert route["reason"].startswith(f"{UNSURE}; the cloud was asked in vain: ")


def test_cloud_that_breaks_off_in_the_middle_is_an_error_that_is_told() -> None:
    body = {"messages": [{"role": "user", "content": "x" * 5000}], "stream": True}
    play = Play([event("the beginning"), event(" and")], breaks=True, wait_s=0.05)
    with (
        Cloud(play) as cloud,
        listening(fake_app(load=lambda: hybrid(cloud.base_url))) as url,
    ):
        found = events(httpx2.post(url + CHAT, json=body).text)
        assert text_of(found).startswith("the beginning")
        assert found[-1]["error"]["code"] == "cloud_error"


def test_slow_cloud_is_waited_for_with_signs_of_life() -> None:
    play = Play(say(HOME).blocks, wait_s=0.1)
    params = ServerParams(keep_alive_s=0.05)
    with (
        Cloud(play) as cloud,
        listening(fake_app(params=params, load=lambda: hybrid(cloud.base_url))) as url,
    ):
        found = events(httpx2.post(url + CHAT, json={**STEP, "stream": True}).text)
        assert ": keep-alive" in found
        assert text_of(found) == HOME


@pytest.mark.parametrize("way", ["stream", "websocket"])
def test_client_that_leaves_ends_what_the_cloud_is_asked(way: str) -> None:
    with Cloud(Play([event("<think>")], hangs=True)) as cloud:
        app = fake_app(load=lambda: hybrid(cloud.base_url))
        with listening(app) as url:
            body = {**STEP, "stream": True}
            if way == "stream":
                with httpx2.stream("POST", url + CHAT, json=body) as told:
                    lines = told.iter_lines()
                    next(lines)
                    wait_until(lambda: cloud.requests)
            else:
                with opened(url) as wire:
                    send(wire, type="generate", **STEP)
                    wait_until(lambda: cloud.requests)
            assert cloud.left.wait(10)
            wait_until(lambda: service_of(app).queue.is_idle)
            cloud.plays = [say(HOME)]
            assert ask_whole(url, STEP)[0] == HOME


def test_cancel_ends_what_the_cloud_is_asked() -> None:
    with (
        Cloud(Play([event("<think>")], hangs=True)) as cloud,
        listening(fake_app(load=lambda: hybrid(cloud.base_url))) as url,
        opened(url) as wire,
    ):
        send(wire, type="generate", **STEP)
        wait_until(lambda: cloud.requests)
        send(wire, type="cancel")
        frames = answer(wire)
        assert frames[-1] == {"type": "done", "finish_reason": "cancelled"}
        assert cloud.left.wait(10)
