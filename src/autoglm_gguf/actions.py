"""Answer text to (thinking, `Action`): the action language of Open-AutoGLM's client.

Knows ``do(...)`` and ``finish(...)``; knows no phone. Reads what the client reads: ``finish(`` or
``do(`` after the thinking, arguments as string or ``[x, y]`` literals. Nothing is evaluated.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TypeAlias

from autoglm_gguf.errors import ActionParseError

Argument: TypeAlias = "str | tuple[int, int]"
COORDINATE_MAX = 999
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # action -> (required arguments, optional ones)
    "Launch": (("app",), ()),
    "Tap": (("element",), ("message",)),
    "Type": (("text",), ()),
    "Type_Name": (("text",), ()),
    "Interact": ((), ()),
    "Swipe": (("start", "end"), ()),
    "Note": (("message",), ()),
    "Call_API": (("instruction",), ()),
    "Long Press": (("element",), ()),
    "Double Tap": (("element",), ()),
    "Take_over": (("message",), ()),
    "Back": ((), ()),
    "Home": ((), ()),
    "Wait": (("duration",), ()),
}
_POINTS = ("element", "start", "end")
_FOLLOWING = re.compile(r"[\"\]]\)\s*\n\s*(?:do\(action=|finish\(message=)")
_CALL = re.compile(r"(?<![A-Za-z0-9_])(?:(finish)|do)\(\s*\w+\s*=")
_NEXT = re.compile(r'\s*,?\s*(\w+)\s*=\s*(?=["\'\[])')
_POINT = re.compile(r"\[\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*\]")


_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_ACTION_LIST = """do(action="Launch", app="…")
do(action="Tap", element=[x,y])
do(action="Tap", element=[x,y], message="…")
do(action="Type", text="…")
do(action="Type_Name", text="…")
do(action="Interact")
do(action="Swipe", start=[x1,y1], end=[x2,y2])
do(action="Note", message="True")
do(action="Call_API", instruction="…")
do(action="Long Press", element=[x,y])
do(action="Double Tap", element=[x,y])
do(action="Take_over", message="…")
do(action="Back")
do(action="Home")
do(action="Wait", duration="x seconds")
finish(message="…")"""
SYSTEM_PROMPT_ZH = (
    "你是手机操作助手。先在<think>里简短思考，再在<answer>里给出一个操作，坐标范围是0到999：\n"
    + _ACTION_LIST
)
SYSTEM_PROMPT_EN = (
    "You operate a phone. Think briefly in <think>, then give one action in <answer>; "
    "coordinates run from 0 to 999:\n" + _ACTION_LIST
)


def choose_system_prompt(task: str) -> str:
    """A system prompt that describes the action language, in the task's language."""
    return SYSTEM_PROMPT_ZH if _CHINESE.search(task) else SYSTEM_PROMPT_EN


@dataclass(frozen=True, slots=True)
class Action:
    """One action of the client's grammar."""

    name: str
    """A key of `ARGUMENTS`, or ``finish``."""
    arguments: dict[str, Argument]
    """Points are ``(x, y)`` in 0..999 of the original screenshot."""

    def render(self) -> str:
        """The action as the client reads it: ``do(action="Tap", element=[500,300])``."""
        items = [f"{name}={_render_value(value)}" for name, value in self.arguments.items()]
        if self.name == "finish":
            return f"finish({', '.join(items)})"
        return "do(" + ", ".join([f'action="{self.name}"', *items]) + ")"

    def to_pixels(self, name: str, size: tuple[int, int]) -> tuple[int, int]:
        """A point argument in pixels of a screenshot of ``size`` ``(width, height)``.

        Raises:
            KeyError: The action has no such point.
        """
        point = self.arguments[name]
        if isinstance(point, str):
            raise KeyError(name)
        return (point[0] * size[0] // 1000, point[1] * size[1] // 1000)


def parse_answer(text: str) -> tuple[str, Action]:
    """Split an answer into its thinking and its action.

    Raises:
        ActionParseError: No action, an unknown one, or arguments missing or out of range.
    """
    body = text.strip().removesuffix("</answer>").strip()
    after = body.find("</think>")
    if after < 0:
        after = body.find("<answer>")
    calls = list(_CALL.finditer(body, max(0, after))) or list(_CALL.finditer(body))
    if not calls:
        raise _no_action("no do(...) or finish(...) in the answer", text)
    # A finish text may mention do(...) and the other way round: the first call after the thinking
    # counts. Where no tag ends the thinking, finish(...) goes first, as in the client.
    finishes = [call for call in calls if after < 0 and call.group(1)]
    start = (finishes or calls)[0].start()
    head = body[:start].strip().removesuffix("<answer>").rstrip().removesuffix("</think>")
    thinking = head.removeprefix("<think>").strip()
    return thinking, parse_action(body[start:], whole=text)


def parse_action(text: str, *, whole: str | None = None) -> Action:
    """Read ``do(...)`` or ``finish(...)``.

    Args:
        text: Begins with the call.
        whole: The answer it came from, for the error.

    Raises:
        ActionParseError: See `parse_answer`.
    """
    source = whole if whole is not None else text
    following = _FOLLOWING.search(text)  # some answers go on with a second call: the first counts
    head, _, rest = text[: following.start() + 2 if following else None].partition("(")
    arguments = _parse_arguments(rest, source)
    if head.strip() == "finish":
        if not isinstance(arguments.get("message"), str):
            raise _no_action("finish(...) without a message", source)
        return Action("finish", {"message": arguments["message"]})
    name = arguments.pop("action", None)
    if head.strip() != "do" or not isinstance(name, str) or name not in ARGUMENTS:
        raise _no_action(f"unknown action {name!r}", source)
    required, optional = ARGUMENTS[name]
    missing = [key for key in required if key not in arguments]
    unknown = [key for key in arguments if key not in required + optional]
    if missing or unknown:
        raise _no_action(f"{name} with arguments {sorted(arguments)}, needs {required}", source)
    for key, value in arguments.items():
        if isinstance(value, str) == (key in _POINTS):
            raise _no_action(f"{name}: argument {key} is {value!r}", source)
    return Action(name, arguments)


def _parse_arguments(rest: str, source: str) -> dict[str, Argument]:
    """Read ``name=value, name=value)``; strings end where an argument or ``)`` follows."""
    arguments: dict[str, Argument] = {}
    at = 0
    while match := _NEXT.match(rest, at):
        at = match.end()
        value: Argument
        if rest[at] == "[":
            point = _POINT.match(rest, at)
            if point is None:
                raise _no_action(f"{match.group(1)} is no [x,y] pair", source)
            value = _point(point, source)
            at = point.end()
        else:
            end = _string_end(rest, at)
            if end < 0:
                raise _no_action(f"{match.group(1)} has no closing quote", source)
            value = _unquote(rest[at + 1 : end])
            at = end + 1
        arguments[match.group(1)] = value
    if not rest[at:].lstrip().startswith(")"):
        raise _no_action("the call is not closed", source)
    return arguments


def _string_end(rest: str, at: int) -> int:
    """Index of the quote that closes the string opened at ``at``; quotes inside text are common."""
    quote, end = rest[at], at
    while (end := rest.find(quote, end + 1)) >= 0:
        first = end
        while rest[first - 1] == "\\":
            first -= 1
        if (end - first) % 2:  # an odd number of backslashes escapes the quote
            continue
        tail = rest[end + 1 :].lstrip()
        if tail.startswith(")") or _NEXT.match("," + tail.removeprefix(",")):
            closing = rest.rfind(quote + ")")
            # The last '")' closes the call: a '")' inside the text does not end it.
            return closing if tail.startswith(")") and closing > end else end
    return -1


def _unquote(raw: str) -> str:
    try:
        value = str(json.loads(f'"{raw}"', strict=False))  # takes line breaks as they are
        value.encode()  # half a surrogate pair is no text
        return value
    except ValueError:
        return raw  # bare quotes or stray backslashes inside: taken as written


def _point(match: re.Match[str], source: str) -> tuple[int, int]:
    x, y = map(float, match.groups())
    if not (-0.5 <= x < COORDINATE_MAX + 0.5 and -0.5 <= y < COORDINATE_MAX + 0.5):
        raise _no_action(f"point {match.group()} outside 0..{COORDINATE_MAX}", source)
    return round(x), round(y)


def _render_value(value: Argument) -> str:
    if isinstance(value, tuple):
        return f"[{value[0]},{value[1]}]"
    return json.dumps(value, ensure_ascii=False)


def _no_action(what: str, text: str) -> ActionParseError:
    shown = text if len(text) <= 200 else text[:200] + "…"
    return ActionParseError(
        f"answer: {what} (answer {shown!r})",
        text=text,
        hint="not the action language; try a larger outtype, or a system prompt that describes it",
    )
