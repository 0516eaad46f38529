"""`CloudModel` against a scripted cloud: whole answers, and every way to fail."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from cloud_server import DONE, Cloud, Play, Request, event, frame, refuse, say

from autoglm_gguf import CloudError, CloudModel, Completion, Message, SamplingParams, Usage
from autoglm_gguf.messages import Chunk, collect
from autoglm_gguf.stopping import StopFlag

KEY = "sk-very-secret"
SSE = {"Content-Type": "text/event-stream"}


@pytest.fixture(params=["stream", "astream"])
def ask(request: pytest.FixtureRequest) -> Any:
    """Ask a cloud as a thread does, and as an event loop does."""

    def ask(cloud: CloudModel) -> Completion:
        body = cloud.build_body([Message("user", "hi")], SamplingParams())
        if request.param == "stream":
            return collect(list(cloud.stream(body)))

        async def read() -> list[Chunk]:
            return [chunk async for chunk in cloud.astream(body)]

        return collect(asyncio.run(read()))

    return ask


def model_of(cloud: Cloud, **options: Any) -> CloudModel:
    return CloudModel(cloud.base_url, "big", api_key=KEY, **options)


def body_of(model: CloudModel) -> bytes:
    return model.build_body([Message("user", "hi")], SamplingParams())


# --- an answer ---


def test_answer_comes_whole_with_its_usage(ask: Any) -> None:
    with Cloud(say("he", "llo", finish="length")) as cloud:
        answer = ask(model_of(cloud))
    assert (answer.text, answer.finish_reason) == ("hello", "length")
    assert answer.usage == Usage(7, 3)
    assert answer.timings.predicted_n == 3 and answer.timings.ttft_ms > 0
    assert answer.tokens == () and answer.logprobs == ()


def test_request_has_the_model_the_messages_and_the_key(ask: Any) -> None:
    with Cloud() as cloud:
        ask(model_of(cloud))
    (request,) = cloud.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["user-agent"] == "autoglm-gguf"
    assert request.body["model"] == "big"
    assert request.body["messages"] == [{"role": "user", "content": "hi"}]
    assert KEY.encode() not in request.raw


def test_no_key_is_sent_when_there_is_none(ask: Any) -> None:
    with Cloud() as cloud:
        ask(CloudModel(cloud.base_url + "/", "m"))
    assert "authorization" not in cloud.requests[0].headers
    assert cloud.requests[0].path == "/v1/chat/completions"


def test_pieces_come_as_they_are_said() -> None:
    with Cloud(Play([event("a")], hangs=True)) as cloud:
        stream = model_of(cloud).stream(body_of(model_of(cloud)))
        assert next(stream).text == "a"
        stream.close()
        assert cloud.left.wait(5), "the request ends with the stream"


def test_nothing_is_connected_before_a_request() -> None:
    with Cloud() as cloud:
        model_of(cloud)
        time.sleep(0.05)
    assert cloud.n_connections == 0


def test_several_threads_may_ask_at_once() -> None:
    answers: list[str] = []
    with Cloud(lambda request: say(request.body["messages"][0]["content"])) as cloud:
        model = model_of(cloud)

        def work(n: int) -> None:
            body = model.build_body([Message("user", str(n))], SamplingParams())
            answers.append(collect(list(model.stream(body))).text)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == ["0", "1", "2", "3"]


def test_stream_works_where_an_event_loop_runs() -> None:
    async def inside() -> str:
        return collect(list(model.stream(body_of(model)))).text

    with Cloud() as cloud:
        model = model_of(cloud)
        assert asyncio.run(inside()) == "ok"


@pytest.mark.parametrize(
    "ending",
    [
        Play([event("ok"), event(finish_reason="stop")], breaks=True),
        Play([event("ok"), event(finish_reason="stop")], hangs=True),
        Play([event("ok"), event(finish_reason="stop")]),
        Play([event("ok"), DONE]),
        Play([b": keep-alive\n\n", event("ok"), DONE, b"data: garbage\n\n"]),
        Play([b"event: x\r\nid: 1\r\n" + event("ok").replace(b"\n", b"\r\n"), DONE]),
    ],
)
def test_answer_is_whole_however_its_stream_ends(ask: Any, ending: Play) -> None:
    with Cloud(ending) as cloud:
        assert ask(model_of(cloud, total_s=5)).text == "ok"


# --- failures ---

FAILURES = {
    "says 500": (refuse(500), r"refuses \(HTTP 500\)"),
    "says 503 with a page": (refuse(503, "<html>busy</html>"), r"refuses \(HTTP 503\)"),
    "says why": (refuse(400, '{"error":{"message":"too long"}}'), r"\(HTTP 400, too long\)"),
    "redirects": (refuse(307, Location="http://127.0.0.1:9/"), r"refuses \(HTTP 307\)"),
    "is a login page": (refuse(200, "<html>", Content_Type="text/html"), "is no event stream"),
    "is one JSON": (refuse(200, "{}", Content_Type="application/json"), "is no event stream"),
    "is wrong JSON": (Play([b"data: {oops\n\n"]), "is no chat completion"),
    "is other JSON": (Play([frame({"hello": 1})]), "is no chat completion"),
    "fails on the way": (Play([event("a"), frame({"error": {"message": "oom"}})]), r"\(oom\)"),
    "is truncated": (Play([event("a")]), "ended in the middle"),
    "is truncated in an event": (Play([event("a"), event("b")[:20]]), "ended in the middle"),
    "breaks off": (Play([event("a")], breaks=True), "broke off"),
    "is reset": (Play([event("a")], resets=True), "broke off|cannot be reached"),
    "is empty": (Play([]), "ended in the middle"),
    "is huge": (Play([b"data: " + b"x" * (1 << 20) + b"\n"]), "no event stream .*exceeded"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failure_is_a_cloud_error_that_names_it(ask: Any, kind: str) -> None:
    play, told = FAILURES[kind]
    with Cloud(play) as cloud, pytest.raises(CloudError, match=told) as caught:
        ask(model_of(cloud))
    assert caught.value.message.startswith(f"{cloud.address}: ")
    assert KEY not in str(caught.value)
    assert cloud.n_connections == 1, "no second try, and no redirect is followed"


@pytest.mark.parametrize(
    ("play", "told"),
    [
        (Play([], hangs=True), "nothing came within 0.5 s"),
        (Play([b": keep-alive\n\n"] * 80, wait_s=0.02, hangs=True), "nothing came within 0.5 s"),
        (Play([event("a")], hangs=True), "its answer took over 2 s"),
        (Play([event("a")] * 400, wait_s=0.02), "its answer took over 2 s"),
    ],
    ids=["silent", "keeps alive", "stalls", "endless"],
)
def test_slow_cloud_is_left_when_its_time_is_up(ask: Any, play: Play, told: str) -> None:
    first_byte_s = 0.5 if "nothing" in told else 20
    with Cloud(play) as cloud:
        began = time.monotonic()
        with pytest.raises(CloudError, match=told):
            ask(model_of(cloud, first_byte_s=first_byte_s, total_s=2))
        assert time.monotonic() - began < 10
        assert cloud.left.wait(5)


def test_cloud_that_is_down_is_a_cloud_error(ask: Any) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        model = CloudModel(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", "m")
        with pytest.raises(CloudError, match="cannot be reached"):
            ask(model)


@pytest.mark.skipif(sys.platform != "linux", reason="how a full backlog behaves is the system's")
def test_cloud_that_does_not_connect_is_left_after_the_time_to_connect(ask: Any) -> None:
    with socket.socket() as full, socket.socket() as first:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        first.connect(full.getsockname())  # the backlog is full: further ones wait
        with socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(full.getsockname())
            port = full.getsockname()[1]
            model = CloudModel(f"http://127.0.0.1:{port}/v1", "m", connect_s=0.2, first_byte_s=9)
            with pytest.raises(CloudError, match=r"not connected within 0.2 s"):
                ask(model)


def test_name_look_up_that_hangs_takes_no_longer_than_connecting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: known.wait(60) and [])
    model = CloudModel("http://cloud.example/v1", "m", connect_s=0.2)
    began = time.monotonic()
    with pytest.raises(CloudError, match=r"not connected within 0.2 s"):
        list(model.stream(body_of(model)))
    assert time.monotonic() - began < 30
    known.set()


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "API key"), (404, "model's name"), (429, "later"), (500, "")]
)
def test_refusal_has_its_status_and_what_to_do(status: int, hint: str) -> None:
    with Cloud(refuse(status)) as cloud, pytest.raises(CloudError) as caught:
        model = model_of(cloud)
        list(model.stream(body_of(model)))
    assert caught.value.status == status
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        (formatdate(time.time() + 4000, usegmt=True), 1, 4000),
        (formatdate(0, usegmt=True), 0, 0),
        ("soon", None, None),
        ("-5", None, None),
        ("1e9", None, None),
    ],
)
def test_refusal_tells_how_long_to_wait(value: str, least: float, most: float) -> None:
    with Cloud(refuse(429, Retry_After=value)) as cloud, pytest.raises(CloudError) as caught:
        model = model_of(cloud)
        list(model.stream(body_of(model)))
    found = caught.value.retry_after_s
    assert found is None if least is None else found is not None and least <= found <= most


def test_error_page_is_read_in_part_and_in_time() -> None:
    with Cloud(Play([b"x" * 4096] * 1000, status=500)) as cloud, pytest.raises(CloudError):
        model = model_of(cloud)
        list(model.stream(body_of(model)))
    with Cloud(Play([b"{"], status=500, hangs=True)) as cloud:
        model = model_of(cloud, first_byte_s=1)
        with pytest.raises(CloudError, match="HTTP 500"):
            list(model.stream(body_of(model)))


# --- cancelling ---


@pytest.mark.parametrize("play", [Play([], hangs=True), Play([event("a")], hangs=True)])
def test_cancelled_answer_ends_at_once_and_says_so(play: Play) -> None:
    stop = StopFlag()

    def play_and_stop(_: Request) -> Play:
        threading.Timer(0.1, stop.set).start()
        return play

    with Cloud(play_and_stop) as cloud:
        model = model_of(cloud)
        answer = collect(list(model.stream(body_of(model), stop)))
        assert answer.finish_reason == "cancelled"
        assert cloud.left.wait(5)


def test_cancelled_task_ends_the_request() -> None:
    async def run(model: CloudModel) -> None:
        async def read() -> None:
            async for _ in model.astream(body_of(model)):
                pass

        task = asyncio.create_task(read())
        while not cloud.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Cloud(Play([], hangs=True)) as cloud:
        asyncio.run(run(model_of(cloud)))
        assert cloud.left.wait(5)


# --- secrets ---


def shown_by(model: CloudModel) -> Iterator[str]:
    yield repr(model)
    yield str(model)
    yield f"{model.name} {model.model}"


def test_key_is_in_no_repr_log_or_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f'{{"error":{{"message":"Incorrect API key provided: {KEY}"}}}}'
    plays = [say("ok"), refuse(401, echo), Play([frame({"error": f"bad {KEY}"})])]
    with Cloud(*plays) as cloud:
        model = model_of(cloud)
        assert collect(list(model.stream(body_of(model)))).text == "ok"
        for _ in range(2):
            with pytest.raises(CloudError, match=r"\*\*\*") as caught:
                list(model.stream(body_of(model)))
            assert KEY not in f"{caught.value!r}{caught.value}{vars(caught.value)}"
    assert len(cloud.requests) == 3
    assert not any(KEY in text for text in shown_by(model))
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    "key", ["two words", "line\nbreak", "schlüssel", "nul\0"], ids=["space", "line", "ascii", "nul"]
)
def test_key_that_no_header_can_hold_is_refused_without_being_told(key: str) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        CloudModel("https://c/v1", "m", api_key=key)
    assert key not in str(caught.value)


def test_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_KEY", f"{KEY}\n")
    with Cloud() as cloud:
        model = CloudModel(cloud.base_url, "m", api_key_env="CLOUD_KEY")
        list(model.stream(body_of(model)))
    assert cloud.requests[0].headers["authorization"] == f"Bearer {KEY}"
    monkeypatch.delenv("CLOUD_KEY")
    with pytest.raises(ValueError, match="CLOUD_KEY is not set"):
        CloudModel("https://c/v1", "m", api_key_env="CLOUD_KEY")


# --- arguments ---


@pytest.mark.parametrize(
    "url",
    [
        *("", "api.example.com/v1", "ftp://c/v1", "file:///v1", "http://", "https:///v1"),
        *(
            "https://user:pw@c/v1",
            "https://c/v1?key=pw",
            "https://c/v1#pw",
            "http://[::1",
            "http://c:x",
        ),
    ],
)
def test_base_url_that_cannot_be_used_is_refused_without_being_told(url: str) -> None:
    with pytest.raises(ValueError, match="base URL") as caught:
        CloudModel(url, "m")
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"connect_s": 0}, {"first_byte_s": -1}, {"total_s": float("inf")}, {"total_s": float("nan")}],
)
def test_time_out_of_range_is_named(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        CloudModel("https://c/v1", "m", **options)


def test_model_without_a_name_and_two_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="name"):
        CloudModel("https://c/v1", "")
    with pytest.raises(ValueError, match="both"):
        CloudModel("https://c/v1", "m", api_key="a", api_key_env="B")


def test_cloud_is_named_by_its_host_and_port() -> None:
    assert CloudModel("https://c.example:8443/a/v1", "m").name == "https://c.example:8443"
    assert CloudModel("https://c/v1", "m").is_encrypted
    assert not CloudModel("http://[::1]:8000/v1", "m").is_encrypted
