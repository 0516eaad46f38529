"""The action language: what is written is read back, and what the client reads, we read."""

from __future__ import annotations

import random
import runpy
import time
from pathlib import Path

import pytest

from autoglm_gguf import Action, ActionParseError, parse_answer
from autoglm_gguf.actions import (
    ARGUMENTS,
    SYSTEM_PROMPT_EN,
    SYSTEM_PROMPT_ZH,
    choose_system_prompt,
    parse_action,
)

EVERY_KIND = [
    ('do(action="Launch", app="微信")', Action("Launch", {"app": "微信"})),
    ('do(action="Tap", element=[500,300])', Action("Tap", {"element": (500, 300)})),
    (
        'do(action="Tap", element=[0,999], message="付款")',
        Action("Tap", {"element": (0, 999), "message": "付款"}),
    ),
    ('do(action="Type", text="hello")', Action("Type", {"text": "hello"})),
    ('do(action="Type_Name", text="张三")', Action("Type_Name", {"text": "张三"})),
    ('do(action="Interact")', Action("Interact", {})),
    (
        'do(action="Swipe", start=[500,800], end=[500,200])',
        Action("Swipe", {"start": (500, 800), "end": (500, 200)}),
    ),
    ('do(action="Note", message="True")', Action("Note", {"message": "True"})),
    ('do(action="Call_API", instruction="sum")', Action("Call_API", {"instruction": "sum"})),
    ('do(action="Long Press", element=[1,2])', Action("Long Press", {"element": (1, 2)})),
    ('do(action="Double Tap", element=[3,4])', Action("Double Tap", {"element": (3, 4)})),
    ('do(action="Take_over", message="log in")', Action("Take_over", {"message": "log in"})),
    ('do(action="Back")', Action("Back", {})),
    ('do(action="Home")', Action("Home", {})),
    ('do(action="Wait", duration="3 seconds")', Action("Wait", {"duration": "3 seconds"})),
    ('finish(message="done")', Action("finish", {"message": "done"})),
]


@pytest.mark.parametrize(("text", "action"), EVERY_KIND)
def test_action_is_written_and_read_in_the_clients_words(text: str, action: Action) -> None:
    assert action.render() == text
    assert parse_action(text) == action


def test_every_kind_covers_the_whole_grammar() -> None:
    assert {action.name for _, action in EVERY_KIND} == {*ARGUMENTS, "finish"}


def test_render_is_read_back_whatever_the_text_holds() -> None:
    pieces = [*"\\\"'()[],= \n\tab好（）“”🙂", '", x="', '")', ", b=[", "do(action=", "</think>"]
    for seed in range(2000):
        rng = random.Random(seed)
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        for action in (
            Action("finish", {"message": text}),
            Action("Type", {"text": text}),
            Action("Tap", {"element": (rng.randint(0, 999), 0), "message": text}),
        ):
            assert parse_action(action.render()) == action, f"seed {seed}"


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        ('do(action="Type", text="say "hi" to her")', 'say "hi" to her'),
        ('do(action="Type", text="a (")") b")', 'a (")") b'),
        ('do(action="Type", text="two\nlines")', "two\nlines"),
        ('do(action="Type", text="two\nlines and \\"quotes\\"")', 'two\nlines and "quotes"'),
        ('do(action="Type", text="两\\n行")', "两\n行"),
        ('do(action="Type", text="你好，（世界）“引号”：完")', "你好，（世界）“引号”：完"),
        ("do(action='Type', text='it is \"so\"')", 'it is "so"'),
        ('do(action="Type", text="back\\\\")', "back\\"),
        ('do(action="Type", text="50% \\d")', "50% \\d"),
        ('do(action="Type", text="\\ud83d")', "\\ud83d"),
        ('do( action = "Type" ,text = "x" )', "x"),
        ('do(text="x", action="Type")', "x"),
        ('do(action="Type", text="")', ""),
    ],
)
def test_text_argument_is_read_leniently(text: str, argument: str) -> None:
    assert parse_action(text) == Action("Type", {"text": argument})


@pytest.mark.parametrize(
    ("point", "expected"),
    [("[ 1 , 2 ]", (1, 2)), ("[500.4,299.6]", (500, 300)), ("[999,0]", (999, 0))],
)
def test_point_is_read_leniently(point: str, expected: tuple[int, int]) -> None:
    assert parse_action(f'do(action="Tap", element={point})').arguments["element"] == expected


@pytest.mark.parametrize(
    ("text", "thinking", "action"),
    [
        (
            '<think>Open it.</think>\n<answer>do(action="Home")</answer>',
            "Open it.",
            Action("Home", {}),
        ),
        ('<think>想</think><answer>do(action="Back")', "想", Action("Back", {})),
        ('<think>a\nb</think>\n<answer>do(action="Back")</answer>\n', "a\nb", Action("Back", {})),
        ('do(action="Back")', "", Action("Back", {})),
        ('I go back. do(action="Back")', "I go back.", Action("Back", {})),
        ('Well.<answer>do(action="Back")</answer>', "Well.", Action("Back", {})),
        ('先返回do(action="Back")', "先返回", Action("Back", {})),
        ('<think></think><answer>do(action="Back")', "", Action("Back", {})),
    ],
)
def test_answer_is_split_into_thinking_and_action(text: str, thinking: str, action: Action) -> None:
    assert parse_answer(text) == (thinking, action)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (
            '<answer>finish(message="I did do(action="Back") twice")</answer>',
            Action("finish", {"message": 'I did do(action="Back") twice'}),
        ),
        (
            'finish(message="use do(action=\\"Tap\\")")',
            Action("finish", {"message": 'use do(action="Tap")'}),
        ),
        (
            '<think>I could do(action="Back").</think><answer>finish(message="ok")',
            Action("finish", {"message": "ok"}),
        ),
        (
            '<think>or finish(message="x")</think><answer>do(action="Home")',
            Action("Home", {}),
        ),
        (
            'I could do(action="Back") but all is done. finish(message="ok")',
            Action("finish", {"message": "ok"}),
        ),
        (
            'What to do(maybe undo(x=1))? Tap. do(action="Tap", element=[5,6])',
            Action("Tap", {"element": (5, 6)}),
        ),
        (
            '<think>a</think><answer>finish(message="say </think> or <answer>")',
            Action("finish", {"message": "say </think> or <answer>"}),
        ),
        ('finish(message="say </think>")', Action("finish", {"message": "say </think>"})),
    ],
)
def test_answer_takes_the_call_the_client_takes_when_another_is_mentioned(
    text: str, action: Action
) -> None:
    assert parse_answer(text)[1] == action


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no do"),
        ("I do not know.", "no do"),
        ('do(action="Fly")', "Fly"),
        ('do(action="finish", message="x")', "finish"),
        ("do(element=[1,2])", "None"),
        ('do(action="Tap")', "Tap"),
        ('do(action="Tap", element="500,300")', "element"),
        ('do(action="Type", text=[1,2])', "text"),
        ('do(action="Tap", element=[500])', "element"),
        ('do(action="Tap", element=[1,2,3])', "element"),
        ('do(action="Tap", element=[1000,2])', "1000"),
        ('do(action="Tap", element=[-1,2])', "-1"),
        ('do(action="Tap", element=[999.5,2])', "999.5"),
        (f'do(action="Tap", element=[{"9" * 400},2])', "999"),
        ('do(action="Back", app="x")', "Back"),
        ('do(action="Launch", app="x"', "closing quote"),
        ('do(action="Launch", app="x', "closing quote"),
        ('do(action="Tap", element=[1,2]', "not closed"),
        ("finish()", "no do"),
        ("finish(message=[1,2])", "message"),
        ('finish(text="x")', "message"),
    ],
)
def test_answer_is_refused_when_it_holds_no_valid_action(text: str, named: str) -> None:
    with pytest.raises(ActionParseError) as caught:
        parse_answer(text)
    assert named in caught.value.message
    assert caught.value.text == text
    assert caught.value.hint


def test_answer_error_shows_no_more_than_the_beginning() -> None:
    with pytest.raises(ActionParseError) as caught:
        parse_answer("x" * 100_000)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("filler", [" ", "\n", '"', "\\", "do(", "</think>", "[1,"])
def test_answer_of_rubbish_is_read_in_no_time(filler: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ActionParseError):
        parse_answer("<think>" + filler * 8000 + 'x do(action="Type", text="' + filler * 8000)
    assert time.perf_counter() - began < 2


def test_to_pixels_scales_thousandths_to_the_screenshot() -> None:
    action = Action("Swipe", {"start": (500, 250), "end": (999, 0)})
    assert action.to_pixels("start", (1080, 2400)) == (540, 600)
    assert action.to_pixels("end", (1080, 2400)) == (1078, 0)


def test_to_pixels_refuses_what_is_no_point() -> None:
    with pytest.raises(KeyError):
        Action("Launch", {"app": "x"}).to_pixels("app", (1, 1))


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        ("Open Chrome", SYSTEM_PROMPT_EN),
        ("打开微信", SYSTEM_PROMPT_ZH),
        ("用 Chrome", SYSTEM_PROMPT_ZH),
    ],
)
def test_system_prompt_speaks_the_tasks_language(task: str, prompt: str) -> None:
    assert choose_system_prompt(task) == prompt


@pytest.mark.parametrize("prompt", [SYSTEM_PROMPT_EN, SYSTEM_PROMPT_ZH])
def test_system_prompt_names_every_action(prompt: str) -> None:
    for name in ARGUMENTS:
        assert f'do(action="{name}"' in prompt
    assert "finish(message=" in prompt


def test_parse_answer_takes_the_first_call_when_another_follows() -> None:
    text = '<answer>do(action="Launch", app="A")\ndo(action="Launch", app="B")</answer>'
    assert parse_answer(text)[1] == Action("Launch", {"app": "A"})
    text = 'do(action="Tap", element=[1,2])\nfinish(message="x")'
    assert parse_action(text) == Action("Tap", {"element": (1, 2)})


def test_system_prompts_are_those_the_embedded_model_was_trained_with() -> None:
    path = Path(__file__).parents[1] / "models" / "autoglm-tiny" / "vocabulary.py"
    trained = runpy.run_path(str(path))["ACTION_PROMPTS"]
    assert trained == {"zh": SYSTEM_PROMPT_ZH, "en": SYSTEM_PROMPT_EN}
