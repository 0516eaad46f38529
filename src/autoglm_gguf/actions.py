"""Answer text to (thinking, `Action`) and back: the action language of Open-AutoGLM's client.

One class per action. ``do(...)`` and ``finish(...)`` are read as leniently as models write them;
what comes out is strict: known names, whole arguments, points in 0..999. Nothing is evaluated.
Knows no phone. Source: Open-AutoGLM, ``phone_agent/actions/handler.py``, ``model/client.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Annotated, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoglm_gguf.errors import ActionParseError
from autoglm_gguf.messages import Message

COORDINATE_MAX = 999
Argument: TypeAlias = "str | tuple[int, int]"


class Kind(Enum):
    """What an argument holds; `autoglm_gguf.actions_grammar` has an automaton for each."""

    POINT = "point"
    TEXT = "text"
    APP = "app"
    SECONDS = "seconds"


_Coordinate = Annotated[int, Field(ge=0, le=COORDINATE_MAX)]
Point = Annotated[tuple[_Coordinate, _Coordinate], Kind.POINT]
Text = Annotated[str, Kind.TEXT]
Remark = Annotated[str | None, Kind.TEXT]
App = Annotated[str, Field(min_length=1), Kind.APP]
Seconds = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? seconds$"), Kind.SECONDS]


class Action(BaseModel):
    """One action of the client's grammar; each is a subclass with its arguments as fields.

    Points are ``(x, y)`` in 0..999 of the original screenshot, whatever size the model saw.

    Raises:
        ValueError: An argument is missing, unknown, of another type or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str] = ""
    """As in ``do(action="…")``, or ``finish``."""
    sliced: ClassVar[bool] = False
    """The client cuts the last argument out of the call as it stands, and undoes no escapes."""

    @classmethod
    def kinds(cls) -> dict[str, tuple[Kind, bool]]:
        """Argument name to its kind and whether it is required, in the order they are written."""
        found = {}
        for name, field in cls.model_fields.items():
            kind = next(item for item in field.metadata if isinstance(item, Kind))
            found[name] = (kind, field.is_required())
        return found

    @property
    def arguments(self) -> dict[str, Argument]:
        """The arguments that are given, in the order they are written."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def points(self) -> dict[str, tuple[int, int]]:
        """The arguments that are points, 0..999."""
        return {k: v for k, v in self.arguments.items() if not isinstance(v, str)}

    def render(self) -> str:
        """The action as the client reads it: ``do(action="Tap", element=[500,300])``.

        Where the client cuts text out without undoing escapes (Type, Type_Name, finish), it is
        written without any, unless only escapes bring it back: a text with ``\\n`` in letters.
        """
        escaped = self._render(raw=False)
        if self.sliced and "</answer>" not in escaped:
            raw = self._render(raw=True)
            if raw != escaped and _reads_as(raw, self):
                return raw
        return escaped

    def _render(self, *, raw: bool) -> str:
        items = [f"{name}={_render_value(v, raw=raw)}" for name, v in self.arguments.items()]
        if self.name == Finish.name:
            return f"{self.name}({', '.join(items)})"
        return "do(" + ", ".join([f'action="{self.name}"', *items]) + ")"

    def to_pixels(self, name: str, size: tuple[int, int]) -> tuple[int, int]:
        """A point argument in pixels of a screenshot of ``size`` ``(width, height)``.

        Raises:
            KeyError: The action has no such point.
        """
        x, y = self.points[name]
        return (x * size[0] // 1000, y * size[1] // 1000)


class Launch(Action):
    """Open an app by its name."""

    name = "Launch"
    app: App


class Tap(Action):
    """Touch a point; a message marks a sensitive tap, to be confirmed by a person."""

    name = "Tap"
    element: Point
    message: Remark = None


class Type(Action):
    """Type into the focused field."""

    name, sliced = "Type", True
    text: Text


class TypeName(Action):
    """Type a person's name."""

    name, sliced = "Type_Name", True
    text: Text


class Interact(Action):
    """Ask the person to choose."""

    name = "Interact"


class Swipe(Action):
    """Drag from one point to another."""

    name = "Swipe"
    start: Point
    end: Point


class Note(Action):
    """Remember what the page says."""

    name = "Note"
    message: Text


class CallAPI(Action):
    """Sum up or comment on what was noted."""

    name = "Call_API"
    instruction: Text


class LongPress(Action):
    """Hold a point."""

    name = "Long Press"
    element: Point


class DoubleTap(Action):
    """Touch a point twice."""

    name = "Double Tap"
    element: Point


class TakeOver(Action):
    """Hand over to a person, as for a login."""

    name = "Take_over"
    message: Text


class Back(Action):
    """Go back."""

    name = "Back"


class Home(Action):
    """Go to the home screen."""

    name = "Home"


class Wait(Action):
    """Wait for a page."""

    name = "Wait"
    duration: Seconds

    @property
    def seconds(self) -> float:
        """The duration in seconds."""
        return float(self.duration.removesuffix(" seconds"))


class Finish(Action):
    """The task is done, or cannot be."""

    name, sliced = "finish", True
    message: Text


ACTIONS: dict[str, type[Action]] = {kind.name: kind for kind in Action.__subclasses__()}
"""Every action by its name, in the order of the system prompt."""

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


def speaks_actions(messages: Iterable[Message]) -> bool:
    """Whether an answer should be an action: a system prompt has ``do(action=`` in it."""
    return any("do(action=" in message.text for message in messages if message.role == "system")


# Models slip into full-width punctuation between Chinese words; inside texts it stays as it is.
_OPEN, _CLOSE, _IS, _COMMA = "[(（]", "[)）]", "[=＝:：]", "[,，、]"
_CALL = re.compile(
    rf"do\(action=|finish\(message=|(?<![A-Za-z0-9_])(?:finish|do)\s*{_OPEN}\s*\w+\s*{_IS}"
)
_ANSWER = re.compile(rf"<answer>\s*(?=(?:do|finish)\s*{_OPEN})")
_TAGS = re.compile(r"(?:</?(?:think|answer)>|<\|\w+\|>|\s)+")
_FOLLOWING = re.compile(rf"[\"\]]{_CLOSE}\s*\n\s*(?:do\(action=|finish\(message=)")
_CLOSERS = {'"': '"”“＂', "'": "'’‘", "“": '”"“', "”": '”"', "＂": '＂"', "‘": "’'", "「": "」"}
_NEXT = re.compile(rf"\s*{_COMMA}?\s*(\w+)\s*{_IS}\s*(?=[{''.join(_CLOSERS)}\[(（［【\d])")
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_POINT = re.compile(rf"[\[(（［【]{_NUMBER}{_COMMA}{_NUMBER}[\])）］】]")
_SECONDS = re.compile(r"\d+(?:\.\d+)?")


def parse_answer(text: str) -> tuple[str, Action]:
    """Split an answer into its thinking and its action.

    The action is the call after ``<answer>``; without that tag, the one after the thinking, or
    whichever the client would take. A call that cannot be read gives way to the next.

    Raises:
        ActionParseError: No action, an unknown one, or arguments missing or out of range.
    """
    start, _, action = find_action(text)
    return _thinking(text[:start].lstrip()), action


def find_action(text: str) -> tuple[int, int, Action]:
    """An answer's action and where it stands: ``text[start:end]``, chatter after it included.

    Raises:
        ActionParseError: See `parse_answer`.
    """
    body = text.rstrip()
    first: ActionParseError | None = None
    for start in _starts(body):
        # Usually the last tag ends the action, and what follows it is chatter; a text may hold one.
        ends = {max(body.rfind("</answer>"), start), len(body)} - {start}
        for end in sorted(ends):
            try:
                return start, end, parse_action(body[start:end], whole=text)
            except ActionParseError as error:
                first = first or error
    raise first or _no_action("no do(...) or finish(...) in the answer", text)


def _starts(body: str) -> Iterator[int]:
    """Where calls begin, the likeliest first."""
    tagged = _ANSWER.search(body)
    if tagged is not None:
        yield tagged.end()
    after = body.find("</think>")
    if after < 0:
        after = body.find("<answer>")
    calls = list(_CALL.finditer(body, max(0, after))) or list(_CALL.finditer(body))
    # A finish text may mention do(...) and the other way round: the first call after the thinking
    # counts. Where no tag ends the thinking, finish(...) goes first, as in the client.
    finishes = [call for call in calls if after < 0 and call.group().startswith("finish")]
    tries = [call.start() for call in (*finishes[:1], *calls[:8])]  # each may take a whole scan
    yield from dict.fromkeys(tries)


def _thinking(head: str) -> str:
    """What stands before the call, without the tags at either end."""
    opened = _TAGS.match(head)
    head = head[opened.end() :] if opened else head
    while tag := re.search(r"(?:</?(?:think|answer)>|<\|\w+\|>)$", head.rstrip()):
        head = head[: tag.start()]
    return head.strip()


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
    head, *rest = re.split(_OPEN, text[: following.start() + 2 if following else None], maxsplit=1)
    head = head.strip()
    arguments = _parse_arguments(rest[0] if rest else "", source, finish=head == Finish.name)
    name: Argument | None = head
    if head != Finish.name:
        name = arguments.pop("action", None)
        if isinstance(name, str):
            name = _NAMES.get(_plain(name), name)
    if head != (Finish.name if name == Finish.name else "do") or name not in ACTIONS:
        raise _no_action(f"unknown action {name!r}", source)
    kind = ACTIONS[str(name)]
    if kind is Wait and isinstance(duration := arguments.get("duration"), str):
        found = _SECONDS.search(duration)
        arguments["duration"] = f"{float(found[0]):g} seconds" if found else duration
    try:
        return kind(**arguments)
    except ValidationError as error:
        raise _no_action(_told(kind, error, arguments), source) from error


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-]", "", name).casefold()


_NAMES = {_plain(name): name for name in ACTIONS if name != Finish.name}


def _told(kind: type[Action], error: ValidationError, arguments: dict[str, Argument]) -> str:
    """The first thing that is wrong with an action's arguments."""
    required = [name for name, (_, is_required) in kind.kinds().items() if is_required]
    problem = error.errors(include_url=False)[0]
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] in ("missing", "extra_forbidden"):
        return f"{kind.name} with arguments {sorted(arguments)}, needs {required}"
    return f"{kind.name}: argument {key} is {arguments.get(key)!r}"


def _parse_arguments(rest: str, source: str, *, finish: bool) -> dict[str, Argument]:
    """Read ``name=value, name=value)``; strings end where an argument or ``)`` follows."""
    arguments: dict[str, Argument] = {}
    at = 0
    while match := _NEXT.match(rest, at):
        at, name = match.end(), match.group(1)
        value: Argument
        if rest[at] in _CLOSERS:
            action = arguments.get("action")
            kind = Finish if finish else ACTIONS.get(action if isinstance(action, str) else "")
            last = kind is not None and kind.sliced and name in kind.model_fields
            end = _call_end(rest, at) if last else -1
            end = _string_end(rest, at) if end < 0 else end
            if end < 0:
                raise _no_action(f"{name} has no closing quote", source)
            value = _unquote(rest[at + 1 : end], rest[at])
            at = end + 1
        elif number := _SECONDS.match(rest, at):
            value, at = number[0], number.end()  # duration=3, without quotes
        else:
            point = _POINT.match(rest, at)
            if point is None:
                raise _no_action(f"{name} is no [x,y] pair", source)
            value = _point(point, source)
            at = point.end()
        arguments[name] = value
    if not re.match(_CLOSE, rest[at:].lstrip()):
        raise _no_action("the call is not closed", source)
    return arguments


def _call_end(rest: str, at: int) -> int:
    """Index of the last quote that closes the call: there the client ends a text; -1: none."""
    ends = (rest.rfind(f"{quote})", at + 1) for quote in _CLOSERS[rest[at]])
    return next((end for end in ends if end >= 0), -1)


def _string_end(rest: str, at: int) -> int:
    """Index of the quote that closes the string opened at ``at``; quotes inside text are common."""
    for quote in _CLOSERS[rest[at]]:
        end = at
        while (end := rest.find(quote, end + 1)) >= 0:
            first = end
            while rest[first - 1] == "\\":
                first -= 1
            if (end - first) % 2:  # an odd number of backslashes escapes the quote
                continue
            tail = rest[end + 1 : end + 200].lstrip()
            if re.match(_CLOSE, tail):
                # The last '")' closes the call: a '")' inside the text does not end it.
                return max(end, rest.rfind(quote + ")"), rest.rfind(quote + "）"))
            if _NEXT.match("," + re.sub(f"^{_COMMA}", "", tail)):
                return end
    return -1


def _unquote(raw: str, quote: str) -> str:
    if quote == "'":
        raw = raw.replace("\\'", "'")
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


def _render_value(value: Argument, *, raw: bool) -> str:
    if isinstance(value, tuple):
        return f"[{value[0]},{value[1]}]"
    return f'"{value}"' if raw else json.dumps(value, ensure_ascii=False)


def _reads_as(text: str, action: Action) -> bool:
    try:
        return parse_action(text) == action
    except ActionParseError:
        return False


def _no_action(what: str, text: str) -> ActionParseError:
    shown = text if len(text) <= 200 else text[:200] + "…"
    return ActionParseError(
        f"answer: {what} (answer {shown!r})",
        text=text,
        hint="not the action language; try a larger outtype, or a system prompt that describes it",
    )
