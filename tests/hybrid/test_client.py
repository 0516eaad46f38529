"""`HybridClient` over a fake device and a scripted cloud: who answers, and as what model."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloud_server import Cloud, Play, Request, event, refuse, say
from hybrids import BACK, HOME, LONG, PICTURES, SCREEN, UNSURE, Ask, cloud_of, device, route_of
from numpy.typing import NDArray
from PIL import Image
from rated_engine import RatedEngine

from autoglm_gguf import (
    AutoGLM,
    CloudModel,
    DoesNotFitError,
    HybridClient,
    HybridPolicy,
    ImagePart,
    Message,
    Route,
    TextPart,
    Usage,
)
from autoglm_gguf.actions import SYSTEM_PROMPT_EN, Tap
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.hybrid.local import UnloadedModel

# --- the device answers ---


@pytest.mark.parametrize("screenshot", [None, SCREEN])
def test_device_answers_alone_and_tries_nothing_without_a_cloud(
    ask: Ask, no_network: list[object], screenshot: Image.Image | None
) -> None:
    model = HybridClient(device(probability=0.01))
    answer = ask(model, image=screenshot, constrain="action")
    step = model.act("go back", screenshot)
    with model.chat() as chat:
        said = chat.send("hello")
    assert answer.text == step.text == said.text == BACK
    for route in (answer.route, step.route, said.route):
        assert route == Route("local", "no cloud is configured", "fake")
    assert no_network == []


def test_device_answers_with_the_network_cut_and_says_that_the_cloud_did_not(
    ask: Ask, no_network: list[object]
) -> None:
    model = HybridClient(device(), CloudModel("https://cloud.example/v1", "big"))
    answer = ask(model, constrain="action")
    assert answer.text == BACK
    assert route_of(answer).source == "local"
    assert route_of(answer).reason.startswith(
        f"{UNSURE}; the cloud was asked in vain: https://cloud.example: cannot be reached ("
    )
    assert no_network


def test_sure_action_stays_on_the_device(ask: Ask) -> None:
    with Cloud() as cloud:
        answer = ask(HybridClient(device(probability=0.95), cloud_of(cloud)), constrain="action")
    assert answer.text == BACK and answer.finish_reason == "stop"
    route = route_of(answer)
    told = "a sure action, token probability 0.95 on average, 0.95 at least"
    assert (route.source, route.reason, route.model) == ("local", told, "fake")
    assert route.confidence is not None
    assert (route.confidence.mean, route.confidence.lowest) == pytest.approx((0.95, 0.95), abs=1e-4)
    assert cloud.n_connections == 0


def test_held_answer_is_the_devices_own_piece_by_piece(ask: Ask) -> None:
    """Nothing but the route, and the time, is added to what the device says."""
    with Cloud() as cloud:
        held = list(
            HybridClient(device(probability=0.95), cloud_of(cloud)).stream("x", constrain="action")
        )
    own = list(device(probability=0.95).stream("x", constrain="action"))
    assert [(c.text, c.tokens, c.usage) for c in held] == [(c.text, c.tokens, c.usage) for c in own]
    assert [chunk.route is not None for chunk in held] == [False] * (len(held) - 1) + [True]


@pytest.mark.parametrize("wanted", [False, True])
def test_probabilities_are_shown_only_to_who_asked(ask: Ask, wanted: bool) -> None:
    with Cloud() as cloud:
        model = HybridClient(device(probability=0.95), cloud_of(cloud))
        answer = ask(model, constrain="action", logprobs=wanted)
    assert bool(answer.logprobs) is wanted


def test_probabilities_are_not_computed_where_they_cannot_matter(ask: Ask) -> None:
    class Silent(FakeEngine):
        def logits(self, index: int = -1) -> NDArray[np.float32]:
            raise AssertionError("asked")

    policy = HybridPolicy(escalate_below=0)
    with Cloud() as cloud:
        alone = HybridClient(AutoGLM(Silent(BACK.encode())))
        never = HybridClient(AutoGLM(Silent(BACK.encode())), cloud_of(cloud), policy)
        assert ask(alone, constrain="action").text == BACK
        assert route_of(ask(never, constrain="action")).reason == "a valid action"


def test_free_text_is_shown_as_it_comes_and_stays_on_the_device(ask: Ask) -> None:
    engine = RatedEngine(b"abcdef", 0.01)
    with Cloud() as cloud:
        model = HybridClient(AutoGLM(engine), cloud_of(cloud))
        stream = model.stream("tell me")
        assert next(stream).text == "a"
        assert bytes(t for t in engine.evaluated if t < 256)[-1:] != b"b", "no token ahead"
        stream.close()
        answer = ask(model, "tell me")
    assert answer.text == "abcdef"
    assert route_of(answer).reason == "the device answers first, and only actions are judged"
    assert cloud.n_connections == 0


# --- the cloud answers ---


def test_unsure_action_is_replaced_by_the_clouds(ask: Ask) -> None:
    with Cloud(say(HOME, "</answer>")) as cloud:
        model = HybridClient(device(), cloud_of(cloud))
        answer = ask(model, [Message("user", "go home")], constrain="action", max_tokens=99)
    assert answer.text == HOME, "ends with its action, as the device's do"
    route = route_of(answer)
    assert (route.source, route.reason, route.model) == ("cloud", UNSURE, "big")
    assert route.confidence is not None and not route.cached
    assert answer.usage == Usage(7, 3)
    (request,) = cloud.requests
    assert request.body["messages"] == [{"role": "user", "content": "go home"}]
    assert request.body["max_tokens"] == 99
    assert "logprobs" not in request.body


def test_clouds_answer_is_left_as_it_is_where_actions_are_not_held(ask: Ask) -> None:
    said = "Well: " + HOME + "</answer>"
    with Cloud(say(said)) as cloud:
        model = HybridClient(device(), cloud_of(cloud))
        messages = [Message("system", SYSTEM_PROMPT_EN), Message("user", "go home")]
        assert ask(model, messages).text == said


@pytest.mark.parametrize(
    ("said", "options", "reason"),
    [
        ("Sorry.", {}, "no valid action"),
        ("<think>hm", {"max_tokens": 5}, "no valid action, cut off at max_tokens"),
        (
            "<think>" + "hm " * 50,
            {"max_tokens": 100, "constrain": "action"},
            "the thinking was cut off at max_tokens",
        ),
    ],
)
def test_answer_without_a_whole_action_is_replaced(
    ask: Ask, said: str, options: dict[str, Any], reason: str
) -> None:
    messages = [Message("system", SYSTEM_PROMPT_EN), Message("user", "go home")]
    with Cloud(say(HOME)) as cloud:
        model = HybridClient(device(said, 0.99), cloud_of(cloud))
        answer = ask(model, messages, **options)
    assert answer.text == HOME
    assert route_of(answer).reason == reason


def test_request_that_does_not_fit_is_streamed_from_the_cloud() -> None:
    with Cloud(Play([event("he"), event("llo")], hangs=True)) as cloud:
        model = HybridClient(device(), cloud_of(cloud))
        stream = model.stream(LONG)
        assert [next(stream).text, next(stream).text] == ["he", "llo"]
        stream.close()
        assert cloud.left.wait(5)


@pytest.mark.parametrize("constrain", [None, "action"])
def test_request_that_does_not_fit_goes_to_the_cloud(ask: Ask, constrain: str | None) -> None:
    with Cloud(say(HOME)) as cloud:
        answer = ask(HybridClient(device(), cloud_of(cloud)), LONG, constrain=constrain)
    assert answer.text == HOME
    assert route_of(answer).source == "cloud"
    assert route_of(answer).reason.startswith("prompt: does not fit the context (50")
    assert route_of(answer).confidence is None


def test_model_that_is_not_loaded_leaves_all_to_the_cloud(ask: Ask) -> None:
    error = DoesNotFitError("9B: does not fit 1 GB", budget_bytes=1, required_bytes=2, hint="more")
    with Cloud(say("hello"), refuse(500)) as cloud:
        model = HybridClient(UnloadedModel("9B", error), cloud_of(cloud))
        answer = ask(model)
        assert (answer.text, route_of(answer).reason) == ("hello", "9B: does not fit 1 GB")
        for _ in range(2):
            with pytest.raises(DoesNotFitError) as caught:
                ask(model, "other")
            asked = f"the cloud was asked in vain: {cloud.address}: refuses (HTTP 500)"
            assert caught.value.hint == f"more; {asked}"
        assert model.render([Message("user", (TextPart("a"), ImagePart(SCREEN)))]).text == "a"
        with pytest.raises(DoesNotFitError):
            model.chat().save("nowhere")
        with pytest.raises(DoesNotFitError):
            model.load_chat("nowhere")
    assert any("not loaded" in note for note in model.info.notes)
    assert model.memory() is not None
    model.cancel()
    model.close()


# --- as a model ---


def test_act_takes_the_clouds_action_and_says_so() -> None:
    tap = '<think>the button</think><answer>do(action="Tap", element=[500,300])'
    with Cloud(say(tap)) as cloud:
        model = HybridClient(device(), cloud_of(cloud), PICTURES)
        step = model.act("press", SCREEN, current_app="Home")
        again = asyncio.run(model.aact("press", SCREEN, current_app="Home"))
    assert step.action == again.action == Tap(element=(500, 300))
    assert step.thinking == "the button"
    assert step.route is not None and step.route.source == "cloud"
    assert again.route is not None and again.route.cached
    (request,) = cloud.requests
    assert request.body["max_tokens"] == 512 and request.body["stop"] == ["</answer>"]
    assert request.body["messages"][0] == {"role": "system", "content": SYSTEM_PROMPT_EN}


def test_conversation_goes_on_with_what_the_cloud_said() -> None:
    def reply(request: Request) -> Play:
        return say(f"{len(request.body['messages'])} messages")

    with Cloud(reply) as cloud, HybridClient(device(), cloud_of(cloud)) as model:
        chat = model.chat(system="kind")
        assert chat.send(LONG).text == "2 messages"
        assert chat.send(LONG).text == "4 messages"
    assert [m["role"] for m in cloud.requests[1].body["messages"]] == [
        *("system", "user", "assistant", "user")
    ]


def test_loaded_conversation_goes_on_through_the_client(tmp_path: Path) -> None:
    with Cloud(say("from afar")) as cloud, HybridClient(device(), cloud_of(cloud)) as model:
        chat = model.chat(system="kind")
        chat.send("hello")
        chat.save(tmp_path / "a")
        loaded = model.load_chat(tmp_path / "a")
        assert loaded.messages == chat.messages
        assert loaded.send(LONG).text == "from afar"
        loaded.clear()
        assert loaded.messages == [Message("system", "kind")]


def test_info_tells_what_may_be_sent_where() -> None:
    local = device()
    plain = CloudModel("http://cloud.example/v1", "big", api_key="sk-secret")
    safe = CloudModel("https://cloud.example/v1", "big")
    assert HybridClient(local).info == local.info
    assert HybridClient(local, safe).info.notes == (
        "cloud: big at https://cloud.example; may be sent: text; requests with images stay here",
    )
    assert HybridClient(local, plain, PICTURES).info.notes == (
        "cloud: big at http://cloud.example; may be sent: text and images",
        "cloud: http://cloud.example is not encrypted; who is on the way reads along",
    )
    offline = HybridClient(local, safe, HybridPolicy(offline=True))
    assert offline.info.notes[0].endswith("may be sent: nothing, it is offline")


def test_client_closes_the_model_on_the_device() -> None:
    engine = FakeEngine()
    with HybridClient(AutoGLM(engine)) as model:
        assert model.render("hi").text == AutoGLM(FakeEngine()).render("hi").text
    assert engine.closed


def test_wrong_arguments_are_told_before_anything_is_asked(ask: Ask) -> None:
    with Cloud() as cloud:
        model = HybridClient(device(), cloud_of(cloud))
        for options in ({"temperature": -1}, {"tempurature": 1}):
            with pytest.raises((ValueError, TypeError)):
                ask(model, **options)
        with pytest.raises(ValueError, match="role"):
            ask(model, [{"role": "god", "content": "x"}])
    assert cloud.n_connections == 0


def test_cancelled_answer_of_the_cloud_ends_and_says_so(ask: Ask) -> None:
    def play_and_cancel(_: Request) -> Play:
        threading.Timer(0.1, model.cancel).start()
        return Play([event("he")], hangs=True)

    with Cloud(play_and_cancel) as cloud:
        model = HybridClient(device(), cloud_of(cloud))
        answer = ask(model, LONG)
        assert (answer.text, answer.finish_reason) == ("he", "cancelled")
        assert route_of(answer).source == "cloud"
        assert cloud.left.wait(5)


def test_cancelled_answer_of_the_device_is_not_replaced() -> None:
    class Cancelling(RatedEngine):
        def logits(self, index: int = -1) -> NDArray[np.float32]:
            model.cancel()
            return super().logits(index)

    with Cloud(say(HOME)) as cloud:
        model = HybridClient(AutoGLM(Cancelling(BACK.encode(), 0.1)), cloud_of(cloud))
        answer = model.generate("x", constrain="action")
    assert answer.finish_reason == "cancelled"
    assert route_of(answer).reason == "it was cancelled"
    assert cloud.n_connections == 0


def test_actions_of_several_threads_are_each_routed(ask: Ask) -> None:
    with Cloud(lambda request: say(HOME)) as cloud:
        model = HybridClient(device(), cloud_of(cloud))
        found: list[str] = []

        def work(n: int) -> None:
            found.append(ask(model, f"task {n}", constrain="action").text)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [HOME] * 4
    assert len(cloud.requests) == 4
