"""Held answers: whatever a model wants, a valid action comes out, and a valid one untouched."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from autoglm_gguf import AutoGLM, EngineError, parse_answer
from autoglm_gguf.actions import ACTIONS, Action, Back, Kind, Launch, Type
from autoglm_gguf.actions_grammar import DEAD, compile_actions
from autoglm_gguf.engine.fake import STOP, FakeEngine
from autoglm_gguf.sampling import ActionConstraint, ActionTokens, Vocabulary

WORDS = [
    *(bytes([b]) for b in range(256)),
    *(s.encode() for s in ("<think>", "</think>", "<answer>", "do", "(action", '="', "Tap", '",')),
    *(s.encode() for s in (" element", "=[", "],", '")', ")]", "Launch", "微信", "微", "finish(")),
    b"\xe5\xbe", b"", b"</answer>",
]  # fmt: skip
IDS = {word: n for n, word in enumerate(WORDS)}


class Words:
    """A vocabulary of more than bytes: the longest token that fits comes first."""

    stop = len(WORDS) - 1

    def tokenize(self, text: str) -> list[int]:
        data, ids = text.encode(), list[int]()
        while data:
            n = next(n for n in range(9, 0, -1) if len(data) >= n and data[:n] in IDS)
            ids.append(IDS[data[:n]])
            data = data[n:]
        return ids

    def token_bytes(self, token: int) -> bytes:
        return WORDS[token]


MODEL = Words()  # one, so that its trie is made once


class Dice:
    """Random logits; tokens in ``loaded`` are likelier."""

    def __init__(self, seed: int, loaded: list[int]) -> None:
        self._rng, self._loaded = np.random.default_rng(seed), loaded
        self.accepted: list[int] = []

    def sample(self, among: NDArray[np.int32] | None = None) -> int:
        logits = self._rng.standard_normal(len(WORDS))
        logits[self._loaded] += 3
        ids = np.arange(len(WORDS)) if among is None else among
        return int(ids[logits[ids].argmax()])

    def accept(self, token: int) -> None:
        self.accepted.append(token)


class Script(Dice):
    """Wants the tokens of a text and then the end, whatever was taken instead."""

    def __init__(self, text: str) -> None:
        super().__init__(0, [])
        self._script = [*MODEL.tokenize(text), MODEL.stop]

    def sample(self, among: NDArray[np.int32] | None = None) -> int:
        return self._script[min(len(self.accepted), len(self._script) - 1)]


def hold(sampler: Dice, n_left: int, apps: tuple[str, ...] = ()) -> tuple[str, ActionConstraint]:
    words = MODEL
    tokens = ActionTokens(words, len(WORDS), frozenset([MODEL.stop]), compile_actions(apps))
    constraint = ActionConstraint(tokens)
    while not constraint.complete and n_left > 0:
        taken = constraint.next_tokens(sampler, n_left)
        assert taken
        n_left -= len(taken)
    shown = [t for t in sampler.accepted if t != MODEL.stop]
    return b"".join(map(words.token_bytes, shown)).decode("utf-8", "replace"), constraint


@pytest.mark.parametrize("n_left", [40, 60, 200])
def test_random_walks_always_give_an_action(n_left: int) -> None:
    names = set()
    for seed in range(100):
        loaded = [[], [MODEL.stop], MODEL.tokenize('"),</answer>')][seed % 3]
        text, constraint = hold(Dice(seed, loaded), n_left, ("微信", "x"))
        assert constraint.complete, f"seed {seed}"
        action = parse_answer(text)[1]
        names.add(action.name)
        if isinstance(action, Launch):
            assert action.app in ("微信", "x")
        assert parse_answer(action.render())[1] == action or "finish(" in action.render()
    assert len(names) > 5


def an_action(kind: type[Action], seed: int) -> Action:
    rng = random.Random(seed)
    values: dict[Kind, object] = {
        Kind.TEXT: "".join(rng.choices("ab你 <好,)[", k=rng.randint(0, 9))),
        Kind.APP: "微信",
        Kind.POINT: (rng.randint(0, 999), rng.choice([0, 7, 10, 999])),
        Kind.SECONDS: f"{rng.randint(0, 99)} seconds",
    }
    return kind(**{name: values[of] for name, (of, _) in kind.kinds().items()})


@pytest.mark.parametrize("kind", ACTIONS.values())
@pytest.mark.parametrize("before", ["<think>想 do(x</think>\n<answer>", "", "Well. <answer>\n"])
def test_a_valid_answer_is_left_as_it_is(kind: type[Action], before: str) -> None:
    for seed in range(5):
        script = Script(before + an_action(kind, seed).render())
        wanted = script._script
        hold(script, 300, ("微信",))
        assert script.accepted == wanted, f"seed {seed}"


def test_apps_that_the_automaton_cannot_hold_are_refused() -> None:
    letters = random.Random(0)
    apps = tuple("".join(letters.choices("abcdefgh", k=100)) for _ in range(400))
    with pytest.raises(ValueError, match="apps: too many names"):
        compile_actions(apps)
    assert compile_actions(apps[:100]).distance[0] == compile_actions().distance[0]


def test_every_prefix_of_an_action_allows_what_the_words_say() -> None:
    automaton, vocabulary = compile_actions(), Vocabulary(WORDS)
    text = '<think>a</think><answer>do(action="Launch", app="微信")'.encode()
    for n in range(len(text)):
        state = automaton.after(automaton.start, text[:n])
        plainly = [i for i, w in enumerate(WORDS) if w and automaton.after(state, w) != DEAD]
        assert list(vocabulary.allowed(automaton, state)) == plainly


# --- through a session ---


class Counting(FakeEngine):
    n_evaluations = 0

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        self.n_evaluations += 1
        super().eval_tokens(tokens, n_outputs=n_outputs)


def test_act_evaluates_what_must_follow_in_one_batch() -> None:
    answer = b'<answer>do(action="Tap", element=[1,2])'
    free, held = Counting(answer), Counting(answer)
    assert AutoGLM(free).act("t", constrain=None).action == AutoGLM(held).act("t").action
    assert held.evaluated == free.evaluated[: len(held.evaluated)]
    assert held.n_evaluations < free.n_evaluations - 20


@pytest.mark.parametrize(
    ("said", "options", "action"),
    [
        (b"I do not know", {}, None),  # the end of the turn is not taken for an answer
        (b'<answer>do(action="Fly")', {}, None),
        (b'<answer>do(action="Launch", app="Chrome")', {"apps": ["Chrom", "WeChat"]}, "Chrom"),
        (b'<think>go</think>do(action="Back") and more', {}, Back()),
        (b'<answer>do(action="Type", text="say "hi"")', {}, Type(text='say "hi"')),
    ],
)
def test_act_always_has_an_action(said: bytes, options: dict[str, object], action: object) -> None:
    step = AutoGLM(FakeEngine(said)).act("t", **options)  # type: ignore[arg-type]
    if isinstance(action, str):
        assert step.action == Launch(app=action)
    elif action is not None:
        assert step.action == action


def test_thinking_that_does_not_end_is_ended() -> None:
    answer = AutoGLM(FakeEngine(b"<think>" + b"so " * 999)).generate(
        "t", max_tokens=90, constrain="action"
    )
    assert answer.finish_reason == "length"
    assert "</think><answer>" in answer.text
    assert parse_answer(answer.text)[0].startswith("so so")


def test_text_that_does_not_end_is_closed() -> None:
    said = b'<answer>finish(message="' + "好".encode() * 99
    answer = AutoGLM(FakeEngine(said)).generate("t", max_tokens=60, constrain="action")
    assert answer.finish_reason == "length"
    assert set(parse_answer(answer.text)[1].arguments["message"]) == {"好"}
    assert answer.tokens[-1] != STOP


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"constrain": "json"}, "constrain 'json'"),
        ({"apps": ["x"]}, "apps"),
        ({"apps": [""], "constrain": "action"}, "apps"),
    ],
)
def test_constraint_that_means_nothing_is_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AutoGLM(FakeEngine()).generate("t", **options)  # type: ignore[arg-type]


def test_schema_needs_a_real_engine() -> None:
    with pytest.raises(EngineError, match="no JSON schema"):
        AutoGLM(FakeEngine()).generate("t", constrain={"type": "object"})


# --- on llama.cpp ---

SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "app": {"enum": ["微信", "Chrome"]}},
    "required": ["x", "app"],
}


@pytest.mark.native
def test_schema_is_kept_by_a_model_that_knows_none(
    tiny_pair: Callable[[str], tuple[Path, Path]],
) -> None:
    import json

    with AutoGLM.load(tiny_pair("q8_0")[0], mmproj=None, n_ctx=512, n_threads=1) as model:
        answer = model.generate(
            "打开微信", max_tokens=200, temperature=1.0, seed=1, constrain=SCHEMA
        )
        document = json.loads(answer.text)
        assert isinstance(document["x"], int) and document["app"] in ("微信", "Chrome")
        assert answer.finish_reason == "stop"
        with pytest.raises(ValueError, match="schema: cannot"):
            model.generate("t", constrain={"type": "nothing"})


@pytest.mark.native
def test_held_answers_of_a_model_are_valid_and_those_that_were_stay(
    tiny_pair: Callable[[str], tuple[Path, Path]],
) -> None:
    tasks = ["打开微信", "Open Chrome", "点击(350,720)", "Type hello", "Go back", "等3秒"]
    with AutoGLM.load(tiny_pair("q8_0")[0], mmproj=None, n_ctx=1024, n_threads=1) as model:
        for task in tasks:
            free = model.generate(task, max_tokens=96)
            held = model.generate(task, max_tokens=96, constrain="action")
            assert held.tokens == free.tokens
        for seed in range(4):  # too hot to make sense
            step = model.act("打开微信", temperature=3.0, seed=seed, max_tokens=80, apps=["微信"])
            assert step.action.name in ACTIONS
