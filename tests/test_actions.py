"""The action language: what is written is read back, and what the client reads, we read."""

from __future__ import annotations

import ast
import random
import runpy
import time
from pathlib import Path
from typing import Any

import pytest

from autoglm_gguf import Action, ActionParseError, parse_answer
from autoglm_gguf.actions import (
    ACTIONS,
    SYSTEM_PROMPT_EN,
    SYSTEM_PROMPT_ZH,
    Back,
    CallAPI,
    DoubleTap,
    Finish,
    Home,
    Interact,
    Kind,
    Launch,
    LongPress,
    Note,
    Swipe,
    TakeOver,
    Tap,
    Type,
    TypeName,
    Wait,
    choose_system_prompt,
    parse_action,
    speaks_actions,
)
from autoglm_gguf.messages import Message, Role

PIECES = [
    *"\\\"'()[],= \n\tab好（）“”🙂",
    '", x="',
    '")',
    ", b=[",
    "do(action=",
    "</think>",
    "<answer>",
]
EVERY_KIND = [
    ('do(action="Launch", app="微信")', Launch(app="微信")),
    ('do(action="Tap", element=[500,300])', Tap(element=(500, 300))),
    (
        'do(action="Tap", element=[0,999], message="付款")',
        Tap(element=(0, 999), message="付款"),
    ),
    ('do(action="Type", text="hello")', Type(text="hello")),
    ('do(action="Type_Name", text="张三")', TypeName(text="张三")),
    ('do(action="Interact")', Interact()),
    (
        'do(action="Swipe", start=[500,800], end=[500,200])',
        Swipe(start=(500, 800), end=(500, 200)),
    ),
    ('do(action="Note", message="True")', Note(message="True")),
    ('do(action="Call_API", instruction="sum")', CallAPI(instruction="sum")),
    ('do(action="Long Press", element=[1,2])', LongPress(element=(1, 2))),
    ('do(action="Double Tap", element=[3,4])', DoubleTap(element=(3, 4))),
    ('do(action="Take_over", message="log in")', TakeOver(message="log in")),
    ('do(action="Back")', Back()),
    ('do(action="Home")', Home()),
    ('do(action="Wait", duration="3 seconds")', Wait(duration="3 seconds")),
    ('finish(message="done")', Finish(message="done")),
]


@pytest.mark.parametrize(("text", "action"), EVERY_KIND)
def test_action_is_written_and_read_in_the_clients_words(text: str, action: Action) -> None:
    assert action.render() == text
    assert parse_action(text) == action


def test_every_kind_covers_the_whole_grammar() -> None:
    assert {action.name for _, action in EVERY_KIND} == {*ACTIONS}


def client_reads(call: str) -> dict[str, Any]:
    """As Open-AutoGLM's ``parse_action`` does: texts by slicing, the rest as a Python call."""
    if call.startswith(('do(action="Type"', 'do(action="Type_Name"')):
        return {"text": call.split("text=", 1)[1][1:-2]}
    if call.startswith("finish"):
        return {"message": call.replace("finish(message=", "")[1:-2]}
    call = call.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    parsed = ast.parse(call, mode="eval").body
    assert isinstance(parsed, ast.Call)
    values = {str(item.arg): ast.literal_eval(item.value) for item in parsed.keywords}
    return {name: value for name, value in values.items() if name != "action"}


@pytest.mark.parametrize("kind", ACTIONS.values())
def test_every_action_is_read_back_whatever_its_text_holds(kind: type[Action]) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 12)))
        values: dict[Kind, object] = {
            Kind.TEXT: text,
            Kind.APP: text or "x",
            Kind.POINT: (rng.randint(0, 999), rng.randint(0, 999)),
            Kind.SECONDS: f"{rng.randint(0, 99)} seconds",
        }
        action = kind(**{name: values[of] for name, (of, _) in kind.kinds().items()})
        call = action.render()
        assert parse_action(call) == action, f"seed {seed}"
        answer = f"<think>{'thought' * (seed % 2)}</think>\n<answer>{call}</answer>"
        assert parse_answer(answer) == ("thought" * (seed % 2), action), f"seed {seed}"
        if "\\" not in call:  # what needs escapes, the client cannot slice
            read = {k: tuple(v) if k in action.points else v for k, v in client_reads(call).items()}
            assert read == action.arguments, f"seed {seed}"


def test_render_writes_quotes_as_the_client_slices_them() -> None:
    assert Type(text='say "hi"').render() == 'do(action="Type", text="say "hi"")'
    assert Note(message='say "hi"').render() == 'do(action="Note", message="say \\"hi\\"")'
    # A reader may end the answer at the tag: the quotes before it are not left bare.
    assert Type(text='"</answer>').render() == 'do(action="Type", text="\\"</answer>")'


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
    assert parse_action(text) == Type(text=argument)


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ("[ 1 , 2 ]", (1, 2)),
        ("[500.4,299.6]", (500, 300)),
        ("[999,0]", (999, 0)),
        ("[-0.5,-0.5]", (0, 0)),
        ("[999.4,999.4]", (999, 999)),
    ],
)
def test_point_is_read_leniently(point: str, expected: tuple[int, int]) -> None:
    assert parse_action(f'do(action="Tap", element={point})').arguments["element"] == expected


@pytest.mark.parametrize(
    ("text", "thinking", "action"),
    [
        (
            '<think>Open it.</think>\n<answer>do(action="Home")</answer>',
            "Open it.",
            Home(),
        ),
        ('<think>想</think><answer>do(action="Back")', "想", Back()),
        ('<think>a\nb</think>\n<answer>do(action="Back")</answer>\n', "a\nb", Back()),
        ('do(action="Back")', "", Back()),
        ('I go back. do(action="Back")', "I go back.", Back()),
        ('Well.<answer>do(action="Back")</answer>', "Well.", Back()),
        ('先返回do(action="Back")', "先返回", Back()),
        ('<think></think><answer>do(action="Back")', "", Back()),
        ('<think>a</think>\n<answer>\n  do(action="Back")', "a", Back()),
        ('<|assistant|>\n<think>a</think><|user|> do(action="Back")', "a", Back()),
    ],
)
def test_answer_is_split_into_thinking_and_action(text: str, thinking: str, action: Action) -> None:
    assert parse_answer(text) == (thinking, action)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (
            '<answer>finish(message="I did do(action="Back") twice")</answer>',
            Finish(message='I did do(action="Back") twice'),
        ),
        (
            'finish(message="use do(action=\\"Tap\\")")',
            Finish(message='use do(action="Tap")'),
        ),
        (
            '<think>I could do(action="Back").</think><answer>finish(message="ok")',
            Finish(message="ok"),
        ),
        (
            '<think>or finish(message="x")</think><answer>do(action="Home")',
            Home(),
        ),
        (
            'I could do(action="Back") but all is done. finish(message="ok")',
            Finish(message="ok"),
        ),
        (
            'What to do(maybe undo(x=1))? Tap. do(action="Tap", element=[5,6])',
            Tap(element=(5, 6)),
        ),
        (
            '<think>a</think><answer>finish(message="say </think> or <answer>")',
            Finish(message="say </think> or <answer>"),
        ),
        ('finish(message="say </think>")', Finish(message="say </think>")),
        ('</think>do(action="Tap", element=[5,6]) or finish(message="x")', Tap(element=(5, 6))),
        (
            '<answer>I do(action="Tap", element=[5,6]) or finish(message="x")',
            Tap(element=(5, 6)),
        ),
        (
            'finish(x=1) do(action="Tap", element=[5,6]) or finish(message="x")',
            Tap(element=(5, 6)),
        ),
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
        ('do(action="Wait")', "Wait with arguments [], needs ['duration']"),
        ('do(action="Wait", duration="soon")', "duration is 'soon'"),
        ('do(action="Wait", duration=[1,2])', "duration is (1, 2)"),
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


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ('do(action="Tap")', "Tap with arguments [], needs ['element']"),
        ('do(action="Back", x="1")', "Back with arguments ['x'], needs []"),
        ('do(action="Launch", app="")', "Launch: argument app is ''"),
        ('do(action="Tap", element=[1,2], message=[3,4])', "Tap: argument message is (3, 4)"),
        ('do(action="Type", text=")', "text has no closing quote"),
    ],
)
def test_answer_error_says_which_argument_is_wrong(call: str, why: str) -> None:
    with pytest.raises(ActionParseError) as caught:
        parse_answer(call)
    assert caught.value.message == f"answer: {why} (answer {call!r})"


def test_answer_error_is_the_likeliest_calls_and_holds_the_whole_answer() -> None:
    text = '<think>a</think><answer>do(action="Fly")</answer> or do(action="Swim")'
    with pytest.raises(ActionParseError, match="unknown action 'Fly'") as caught:
        parse_answer(text)
    assert caught.value.text == text
    with pytest.raises(ActionParseError) as caught:
        parse_action('do(action="Fly")')
    assert caught.value.text == 'do(action="Fly")'


def test_answer_is_searched_for_eight_calls_at_most() -> None:
    good = 'do(action="Tap", element=[5,6])'
    assert parse_answer("do(x=1) " * 7 + good)[1] == Tap(element=(5, 6))
    with pytest.raises(ActionParseError, match="unknown action None"):
        parse_answer("do(x=1) " * 8 + good)


@pytest.mark.parametrize("point", ["-1,5", "5,-0.6", "999.5,5", "5,999.5", "1000,5", "5,1000"])
def test_answer_error_tells_a_point_outside(point: str) -> None:
    with pytest.raises(ActionParseError, match=rf"point \[{point}\] outside 0\.\.999"):
        parse_answer(f'do(action="Tap", element=[{point}])')


def test_answer_error_shows_no_more_than_the_beginning() -> None:
    for n, shown in ((200, "x" * 200), (201, "x" * 200 + "…")):
        with pytest.raises(ActionParseError) as caught:
            parse_answer("x" * n)
        assert caught.value.message.endswith(f"(answer {shown!r})")
        assert caught.value.text == "x" * n


@pytest.mark.parametrize("filler", [" ", "\n", '"', "\\", "do(", "</think>", "[1,"])
def test_answer_of_rubbish_is_read_in_no_time(filler: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ActionParseError):
        parse_answer("<think>" + filler * 8000 + 'x do(action="Type", text="' + filler * 8000)
    assert time.perf_counter() - began < 2


def test_to_pixels_scales_thousandths_to_the_screenshot() -> None:
    action = Swipe(start=(500, 250), end=(999, 0))
    assert action.to_pixels("start", (1080, 2400)) == (540, 600)
    assert action.to_pixels("end", (1080, 2400)) == (1078, 0)
    assert repr(action.to_pixels("start", (1079, 2401))) == "(539, 600)", "whole pixels"


def test_to_pixels_refuses_what_is_no_point() -> None:
    with pytest.raises(KeyError):
        Launch(app="x").to_pixels("app", (1, 1))


def test_arguments_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="999"):
        Tap(element=(1000, 0))
    with pytest.raises(ValueError, match="seconds"):
        Wait(duration="soon")
    assert Wait(duration="1.5 seconds").seconds == 1.5


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


@pytest.mark.parametrize(
    ("role", "text", "speaks"),
    [
        ("system", SYSTEM_PROMPT_EN, True),
        ("system", "You are kind.", False),
        ("user", SYSTEM_PROMPT_EN, False),
    ],
)
def test_speaks_actions_looks_at_system_prompts_alone(role: Role, text: str, speaks: bool) -> None:
    messages = [Message("user", "hi"), Message(role, text)]
    assert speaks_actions(messages) is speaks


@pytest.mark.parametrize("prompt", [SYSTEM_PROMPT_EN, SYSTEM_PROMPT_ZH])
def test_system_prompt_names_every_action(prompt: str) -> None:
    for name in ACTIONS:
        assert (f'do(action="{name}"' if name != "finish" else "finish(message=") in prompt


def test_parse_answer_takes_the_first_call_when_another_follows() -> None:
    text = '<answer>do(action="Launch", app="A")\ndo(action="Launch", app="B")</answer>'
    assert parse_answer(text)[1] == Launch(app="A")
    text = 'do(action="Tap", element=[1,2])\nfinish(message="x")'
    assert parse_action(text) == Tap(element=(1, 2))


def test_system_prompts_are_those_the_embedded_model_was_trained_with() -> None:
    path = Path(__file__).parents[1] / "models" / "autoglm-tiny" / "vocabulary.py"
    trained = runpy.run_path(str(path))["ACTION_PROMPTS"]
    assert trained == {"zh": SYSTEM_PROMPT_ZH, "en": SYSTEM_PROMPT_EN}


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("do（action=“Tap”，element=［５００，３００］）", Tap(element=(500, 300))),
        ("do(action=“Type”, text=“他说“好”吧”)", Type(text="他说“好”吧")),
        ('do(action="Launch", app="微信”)', Launch(app="微信")),
        ("<answer>do(action='Launch', app='it\\'s')", Launch(app="it's")),
        ('<answer><answer>do(action="Back")</answer></answer>', Back()),
        ('<|assistant|>\n<think>a</think><answer>\ndo(action="Back")</answer> ok ("x")', Back()),
        ('<answer>do(action="Type", text="a")</answer> see ("b")', Type(text="a")),
        ('<answer>finish(message="say </answer>")', Finish(message="say </answer>")),
        ('<think>do(x=1)</think>do(x=1), so do(action="Back")', Back()),
        ('do(action="long_press", element=(1,2))', LongPress(element=(1, 2))),
        ('do(action="Wait", duration="3s")', Wait(duration="3 seconds")),
        ('do(action="Wait", duration=3)', Wait(duration="3 seconds")),
        ('do(action="Wait", duration="2.50")', Wait(duration="2.5 seconds")),
        ('do(action="Note", message="a") b")', Note(message='a") b')),
        (
            'do(action="Tap", message="pay", element=[5,6]) ("so")',
            Tap(element=(5, 6), message="pay"),
        ),
        ('do（action="Note"，message="a"） b"）', Note(message='a"） b')),
        ('do(action="Type", text="a", x="b")', Type(text='a", x="b')),
    ],
)
def test_answer_is_read_when_the_model_slips(text: str, action: Action) -> None:
    assert parse_answer(text)[1] == action
