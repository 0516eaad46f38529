"""The way of a request: what may leave the device, and what holds when the cloud fails."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from cloud_server import Cloud, Play, event, frame, refuse, say
from hybrids import BACK, HOME, LONG, PICTURES, SCREEN, UNSURE, Ask, cloud_of, device, route_of
from PIL import Image

from autoglm_gguf import (
    ActionParseError,
    CloudError,
    ContextFullError,
    DoesNotFitError,
    HybridClient,
    HybridPolicy,
    ImageError,
    ImagePart,
    Message,
    Route,
    TextPart,
)
from autoglm_gguf.hybrid.local import UnloadedModel


def test_image_is_not_sent_unless_allowed(ask: Ask) -> None:
    with Cloud(say(HOME)) as cloud:
        model = HybridClient(device(), cloud_of(cloud))
        answer = ask(model, "see", image=SCREEN, constrain="action")
        history = [
            Message("user", (ImagePart(SCREEN), TextPart("see"))),
            Message("assistant", BACK),
            Message("user", "and now?"),
        ]
        older = ask(model, history, constrain="action")
        assert cloud.n_connections == 0
        ask(model, "text alone", constrain="action")
    for kept in (answer, older):
        assert kept.text == BACK
        assert route_of(kept) == Route(
            "local", "its images may not leave the device (send_images, --cloud-images)", "fake"
        )
    (request,) = cloud.requests
    assert b"image" not in request.raw and b"base64" not in request.raw


def test_image_is_sent_as_its_pixels_when_allowed(ask: Ask) -> None:
    with Cloud(say(HOME)) as cloud:
        model = HybridClient(device(), cloud_of(cloud), PICTURES)
        answer = ask(model, "see", image=SCREEN, constrain="action")
    assert route_of(answer).source == "cloud"
    image, text = cloud.requests[0].body["messages"][0]["content"]
    assert text == {"type": "text", "text": "see"}
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.tobytes() == SCREEN.tobytes()


def test_image_that_the_device_takes_none_of_goes_to_the_cloud_when_allowed(ask: Ask) -> None:
    with Cloud(say("a red screen")) as cloud:
        blind = device(vision=False)
        assert ask(HybridClient(blind, cloud_of(cloud), PICTURES), "see", image=SCREEN).text
        model = HybridClient(blind, cloud_of(cloud))
        with pytest.raises(ImageError, match="takes no images") as caught:
            ask(model, "see", image=SCREEN)
    assert "the cloud was not asked: its images may not leave the device" in caught.value.hint
    assert len(cloud.requests) == 1
    assert not model.takes_images


def test_what_is_no_image_goes_nowhere(ask: Ask) -> None:
    error = DoesNotFitError("9B: does not fit", budget_bytes=1, required_bytes=2)
    with Cloud() as cloud:
        for local in (device(), device(vision=False), UnloadedModel("9B", error)):
            with pytest.raises(ImageError):
                ask(HybridClient(local, cloud_of(cloud), PICTURES), "see", image=b"no image")
    assert cloud.n_connections == 0


@pytest.mark.parametrize(
    ("policy", "options", "reason"),
    [
        (HybridPolicy(offline=True), {}, "offline: nothing may leave the device"),
        (
            HybridPolicy(),
            {"raw": True},
            "a raw prompt has no messages that a cloud could be sent",
        ),
    ],
)
def test_request_that_may_not_leave_stays(
    ask: Ask, policy: HybridPolicy, options: dict[str, Any], reason: str
) -> None:
    with Cloud() as cloud:
        model = HybridClient(device(), cloud_of(cloud), policy)
        answer = ask(model, constrain="action", **options)
        assert (answer.text, route_of(answer).reason) == (BACK, reason)
        with pytest.raises(ContextFullError) as caught:
            ask(model, LONG, **options)
    assert caught.value.hint.endswith(f"the cloud was not asked: {reason}")
    assert cloud.n_connections == 0


def test_error_of_a_device_without_a_cloud_is_as_it_was(ask: Ask) -> None:
    with pytest.raises(ContextFullError) as caught:
        ask(HybridClient(device()), LONG)
    with pytest.raises(ContextFullError) as own:
        device().generate(LONG)
    assert str(caught.value) == str(own.value)


# --- the cloud fails ---

FAILURES = {
    "refuses": (refuse(500), r"refuses (HTTP 500)"),
    "has enough": (refuse(429, Retry_After="9"), "refuses (HTTP 429)"),
    "says wrong JSON": (Play([b"data: {oops\n\n"]), "its answer is no chat completion"),
    "says an error": (Play([frame({"error": "oom"})]), "an error within its answer (oom)"),
    "is truncated": (Play([event(HOME)]), "its answer ended in the middle"),
    "breaks off": (Play([event(HOME)], breaks=True), "its answer broke off"),
    "hangs": (Play([event(HOME)], hangs=True), "its answer took over 2 s"),
    "withholds": (say("", finish="content_filter"), "withholds its answer"),
    "says no action": (say("I cannot help."), "its answer is no valid action"),
    "says an unknown action": (say('do(action="Fly")'), "its answer is no valid action"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_devices_answer_stands_when_the_cloud_fails(ask: Ask, kind: str) -> None:
    play, told = FAILURES[kind]
    with Cloud(play) as cloud:
        answer = ask(HybridClient(device(), cloud_of(cloud, total_s=2)), constrain="action")
    assert (answer.text, answer.finish_reason) == (BACK, "stop")
    assert answer.tokens and answer.usage.image_tokens == 0
    route = route_of(answer)
    assert (route.source, route.model) == ("local", "fake")
    assert route.reason.startswith(
        f"{UNSURE}; the cloud was asked in vain: {cloud.address}: {told}"
    )
    assert route.confidence is not None


def test_devices_refusal_stands_when_the_cloud_fails(ask: Ask) -> None:
    with Cloud(refuse(500)) as cloud, pytest.raises(ContextFullError) as caught:
        ask(HybridClient(device(), cloud_of(cloud)), LONG)
    assert caught.value.hint.endswith(f"in vain: {cloud.address}: refuses (HTTP 500)")
    assert isinstance(caught.value.__cause__, CloudError)


def test_answer_that_broke_off_after_it_was_shown_is_an_error(ask: Ask) -> None:
    with Cloud(Play([event("he")], breaks=True)) as cloud, pytest.raises(CloudError, match="broke"):
        ask(HybridClient(device(), cloud_of(cloud)), LONG)


def test_clouds_launch_of_an_app_that_is_not_listed_is_not_taken(ask: Ask) -> None:
    launch = 'do(action="Launch", app="{}")'
    with Cloud(say(launch.format("Bank")), say(launch.format("Maps"))) as cloud:
        model = HybridClient(device(), cloud_of(cloud))
        first = ask(model, "one", constrain="action", apps=["Maps"])
        second = ask(model, "two", constrain="action", apps=["Maps"])
    assert first.text == BACK
    assert "it launches 'Bank', which is not in the list of apps" in route_of(first).reason
    assert second.text == launch.format("Maps")


def test_invalid_answers_of_both_leave_the_devices(ask: Ask) -> None:
    with Cloud(say("no")) as cloud:
        model = HybridClient(device("Sorry."), cloud_of(cloud))
        with pytest.raises(ActionParseError):
            model.act("go back", constrain=None)
