"""What makes an answer of the device good enough."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autoglm_gguf import Completion, HybridPolicy, Message, SamplingParams, TextPart, TokenLogprob
from autoglm_gguf.actions import SYSTEM_PROMPT_EN, SYSTEM_PROMPT_ZH
from autoglm_gguf.hybrid.policy import is_action_request, judge, measure_confidence
from autoglm_gguf.messages import FinishReason

BACK = 'do(action="Back")'


def tokens(*pieces: tuple[str, float | None]) -> tuple[TokenLogprob, ...]:
    """Texts and their probabilities; None for a token that a constraint appended."""
    return tuple(
        TokenLogprob(n, text.encode(), None if p is None else math.log(p) if p else -math.inf)
        for n, (text, p) in enumerate(pieces)
    )


def answer(
    *pieces: tuple[str, float | None], finish: FinishReason = "stop", end: str = ""
) -> Completion:
    text = "".join(text for text, _ in pieces)
    return Completion(text.removesuffix(end), finish, logprobs=tokens(*pieces))


# --- confidence ---


def test_confidence_counts_the_tokens_of_the_action_alone() -> None:
    said = answer(
        ("<think>", 0.1), ("hm", 0.2), ("</think><answer>", 0.3), ("do(", 0.5), (BACK[3:], 0.9)
    )
    found = measure_confidence(said.logprobs, BACK)
    assert found is not None
    assert (found.mean, found.lowest, found.n_tokens) == pytest.approx((0.7, 0.5, 2))


def test_confidence_counts_a_token_that_reaches_into_the_action() -> None:
    found = measure_confidence(tokens(("<answer>do(", 0.4), (BACK[3:], 0.8)), BACK)
    assert found is not None and found.n_tokens == 2


def test_confidence_leaves_out_what_a_constraint_appended_and_what_follows() -> None:
    said = tokens(("do", 0.6), (BACK[2:], None), ("</answer>", 0.01))
    found = measure_confidence(said, BACK)
    assert found is not None
    assert (found.mean, found.lowest, found.n_tokens) == pytest.approx((0.6, 0.6, 1))


def test_confidence_takes_the_last_of_equal_texts() -> None:
    """The thinking may quote the action."""
    said = tokens((BACK, 0.1), ("</think><answer>", 0.1), (BACK, 0.9))
    found = measure_confidence(said, BACK)
    assert found is not None and found.mean == pytest.approx(0.9)


def test_confidence_counts_everything_where_the_text_shows_other_bytes() -> None:
    said = (TokenLogprob(0, b"\xff", math.log(0.2)), TokenLogprob(1, b"x", math.log(0.4)))
    found = measure_confidence(said, "\ufffdx")
    assert found is not None and found.n_tokens == 2


def test_confidence_of_a_token_that_cannot_come_is_zero() -> None:
    found = measure_confidence(tokens((BACK, 0.0)), BACK)
    assert found is not None and found.lowest == 0.0


@pytest.mark.parametrize("said", [(), ((BACK, None),)])
def test_there_is_no_confidence_without_a_choice(said: tuple[Any, ...]) -> None:
    assert measure_confidence(tokens(*said), BACK) is None


# --- the verdict ---


def test_sure_action_is_enough() -> None:
    verdict = judge(answer(("do(", 0.9), (BACK[3:], 0.8)), HybridPolicy(escalate_below=0.8))
    assert verdict.enough
    assert verdict.reason == "a sure action, token probability 0.85 on average, 0.80 at least"


def test_action_is_not_enough_when_its_mean_probability_is_low() -> None:
    verdict = judge(answer(("do(", 0.9), (BACK[3:], 0.1)), HybridPolicy(escalate_below=0.7))
    assert not verdict.enough
    assert verdict.reason == "an unsure action, token probability 0.50 on average, under 0.7"
    assert verdict.confidence is not None and verdict.confidence.lowest == pytest.approx(0.1)


def test_action_is_not_enough_when_one_token_is_improbable() -> None:
    policy = HybridPolicy(escalate_below=0.5, escalate_below_lowest=0.3)
    verdict = judge(answer(("do(", 0.9), (BACK[3:], 0.2)), policy)
    assert not verdict.enough
    assert verdict.reason == "an unsure action, token probability 0.20 at one of them, under 0.3"


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("I would go back.", "stop", "no valid action"),
        ('do(action="Fly")', "stop", "no valid action"),
        ("<think>Let me", "length", "no valid action, cut off at max_tokens"),
        (BACK, "length", "the thinking was cut off at max_tokens"),
    ],
)
def test_answer_is_not_enough_without_a_whole_action(
    text: str, finish: FinishReason, reason: str
) -> None:
    verdict = judge(answer((text, 1.0), finish=finish), HybridPolicy())
    assert (verdict.enough, verdict.reason) == (False, reason)


def test_action_without_probabilities_is_judged_by_its_validity() -> None:
    verdict = judge(Completion(BACK, "stop"), HybridPolicy())
    assert (verdict.enough, verdict.reason) == (True, "a valid action")


def test_cancelled_answer_is_enough() -> None:
    assert judge(Completion("<thi", "cancelled"), HybridPolicy()).enough


# --- what is judged ---


@pytest.mark.parametrize(
    ("system", "constrain", "expected"),
    [
        (SYSTEM_PROMPT_EN, None, True),
        (SYSTEM_PROMPT_ZH, None, True),
        ("You are kind.", None, False),
        (None, None, False),
        (None, "action", True),
        (SYSTEM_PROMPT_EN, {"type": "object"}, False),
    ],
)
def test_actions_are_judged_and_other_answers_are_not(
    system: str | None, constrain: Any, expected: bool
) -> None:
    messages = [Message("user", f"what does {BACK} mean?")]
    for content in [system, (TextPart(system),)] if system else [None]:
        head = [] if content is None else [Message("system", content)]
        params = SamplingParams(constrain=constrain)
        assert is_action_request([*head, *messages], params) is expected


# --- values ---


@pytest.mark.parametrize(
    "values",
    [
        {"escalate_below": 1.1},
        {"escalate_below": float("nan")},
        {"escalate_below_lowest": -0.1},
        {"n_failures": 0},
        {"open_s": -1},
        {"open_s": float("inf")},
        {"cache_size": -1},
    ],
)
def test_policy_names_the_value_out_of_range(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=name):
        HybridPolicy(**values)


def test_policy_keeps_images_here_unless_told() -> None:
    assert not HybridPolicy().send_images
