"""When a cloud is left alone, on a clock that tests turn."""

from __future__ import annotations

import pytest
from cloud_server import Cloud, Play, event, refuse, say
from hybrids import HOME, LONG, Ask, cloud_of, device, route_of, sources

from autoglm_gguf import ContextFullError, HybridClient, HybridPolicy
from autoglm_gguf.hybrid.breaker import MAX_OPEN_S, CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        assert breaker.admit() == ""
        breaker.fail()


def test_breaker_opens_after_failures_in_a_row(clock: Clock) -> None:
    breaker = CircuitBreaker(3, 30, clock=clock)
    fail(breaker, 2)
    assert breaker.obstacle() == ""
    fail(breaker)
    told = "the cloud failed 3 times in a row and is left alone for 30 s more"
    assert breaker.obstacle() == breaker.admit() == told
    clock.now += 10
    assert breaker.obstacle().endswith("for 20 s more")


def test_success_forgets_the_failures_before_it(clock: Clock) -> None:
    breaker = CircuitBreaker(2, 30, clock=clock)
    fail(breaker)
    assert breaker.admit() == ""
    breaker.succeed()
    fail(breaker)
    assert breaker.obstacle() == ""


def test_half_open_breaker_lets_one_request_through(clock: Clock) -> None:
    breaker = CircuitBreaker(1, 30, clock=clock)
    fail(breaker)
    clock.now += 30
    assert breaker.obstacle() == "", "asking does not take the turn"
    assert breaker.admit() == ""
    assert breaker.admit() == "the cloud failed and is being tried by another request"


def test_half_open_breaker_closes_with_success_and_opens_with_failure(clock: Clock) -> None:
    breaker = CircuitBreaker(2, 30, clock=clock)
    fail(breaker, 2)
    clock.now += 30
    fail(breaker)
    assert breaker.obstacle().startswith("the cloud failed 3 times in a row")
    clock.now += 30
    assert breaker.admit() == ""
    breaker.succeed()
    fail(breaker)
    assert breaker.obstacle() == "", "it counts from zero again"


def test_half_open_breaker_lets_another_through_when_the_first_was_given_up(clock: Clock) -> None:
    breaker = CircuitBreaker(1, 30, clock=clock)
    fail(breaker)
    clock.now += 30
    assert breaker.admit() == ""
    breaker.release()
    assert breaker.admit() == ""


@pytest.mark.parametrize(("asked_s", "open_s"), [(5.0, 5.0), (90.0, 90.0), (1e9, MAX_OPEN_S)])
def test_cloud_that_asks_to_be_left_alone_is(clock: Clock, asked_s: float, open_s: float) -> None:
    breaker = CircuitBreaker(3, 30, clock=clock)
    breaker.fail(asked_s)
    assert breaker.obstacle().startswith("the cloud failed once")
    clock.now += open_s - 1
    assert breaker.obstacle() != ""
    clock.now += 1
    assert breaker.obstacle() == ""


def test_last_failure_opens_for_the_longer_of_both_times(clock: Clock) -> None:
    breaker = CircuitBreaker(1, 30, clock=clock)
    breaker.fail(5)
    clock.now += 29
    assert breaker.obstacle() != ""


# --- behind a `HybridClient` ---


def test_cloud_that_fails_is_left_alone_and_tried_again(ask: Ask, clock: Clock) -> None:
    with Cloud(*[refuse(500)] * 3, say(HOME)) as cloud:
        policy = HybridPolicy(n_failures=2, open_s=30, cache_size=0)
        model = HybridClient(device(), cloud_of(cloud), policy, clock=clock)
        assert sources(model, ask, 4) == ["local"] * 4
        assert len(cloud.requests) == 2, "left alone after two"
        reason = route_of(ask(model, constrain="action")).reason
        assert reason == "the cloud failed 2 times in a row and is left alone for 30 s more"
        clock.now += 30
        assert sources(model, ask, 2) == ["local"] * 2
        assert len(cloud.requests) == 3, "one try, which failed"
        clock.now += 30
        assert sources(model, ask, 2) == ["cloud"] * 2


def test_retry_after_of_a_cloud_is_heeded(ask: Ask, clock: Clock) -> None:
    with Cloud(refuse(429, Retry_After="60"), say(HOME)) as cloud:
        model = HybridClient(device(), cloud_of(cloud), clock=clock)
        assert sources(model, ask, 2) == ["local"] * 2
        assert len(cloud.requests) == 1
        clock.now += 60
        assert sources(model, ask, 1) == ["cloud"]


@pytest.mark.parametrize("play", [refuse(400), refuse(422), say("no action")])
def test_answers_to_bad_requests_do_not_count_as_failures(ask: Ask, play: Play) -> None:
    with Cloud(*[play] * 3, say(HOME)) as cloud:
        model = HybridClient(device(), cloud_of(cloud), HybridPolicy(n_failures=1, cache_size=0))
        assert sources(model, ask, 4) == ["local"] * 3 + ["cloud"]


def test_request_that_was_given_up_frees_the_try(ask: Ask, clock: Clock) -> None:
    with Cloud(refuse(500), Play([event("a")], hangs=True), say("hello")) as cloud:
        model = HybridClient(
            device(), cloud_of(cloud), HybridPolicy(n_failures=1, open_s=5), clock=clock
        )
        with pytest.raises(ContextFullError):
            ask(model, LONG)
        clock.now += 5
        stream = model.stream(LONG)
        assert next(stream).text == "a"
        with pytest.raises(ContextFullError) as caught:
            ask(model, LONG + "x")
        assert "not asked: the cloud failed and is being tried by another" in caught.value.hint
        stream.close()
        assert ask(model, LONG).text == "hello"
