"""Instructions and the actions that answer them: what AutoGLM-tiny is trained on and held to.

Deterministic: the same seed gives the same samples on every machine. Imports no torch, so tests can
use :func:`held_out` without it. Knows the client's grammar of actions and its three prompt layouts;
knows nothing of tokens. ``python instructions.py`` checks that nothing held out is in the training
space.
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from dataclasses import dataclass
from datetime import date
from typing import Any

import patterns
import vocabulary as voc
from patterns import Pattern, all_patterns

Message = dict[str, str]
Slots = dict[str, str]

LANGUAGES = ("zh", "en")
LAYOUTS = ("bare", "system", "steps")
HELD_OUT_SEED = 20261122
HELD_OUT_COUNT = 600

# One (pattern, slot values) pair in eight is never trained on.
_PAIR_MODULUS = 8

# How often training asks for each kind, relative to the others. Long copies get more.
KIND_WEIGHTS = {
    "Launch": 20,
    "Tap": 13,
    "Type": 12,
    "Type_Name": 6,
    "Interact": 3,
    "Swipe": 10,
    "Note": 3,
    "Call_API": 6,
    "Long Press": 7,
    "Double Tap": 7,
    "Take_over": 6,
    "Back": 4,
    "Home": 4,
    "Wait": 5,
    "finish": 8,
}
LAYOUT_WEIGHTS = {"bare": 62, "system": 22, "steps": 16}
LATE_LAYOUT_WEIGHTS = {"bare": 48, "system": 24, "steps": 28}

_THOUGHTS = {
    "zh": {
        "Launch": "打开{app}。",
        "Tap": "点击屏幕。",
        "Type": "输入文字。",
        "Type_Name": "输入名字。",
        "Interact": "让用户选择。",
        "Swipe": "滑动屏幕。",
        "Note": "记录页面。",
        "Call_API": "调用接口。",
        "Long Press": "长按屏幕。",
        "Double Tap": "双击屏幕。",
        "Take_over": "请用户接管。",
        "Back": "返回上一页。",
        "Home": "回到桌面。",
        "Wait": "等待页面。",
        "finish": "回答用户。",
        "done": "任务完成了。",
    },
    "en": {
        "Launch": "Open {app}.",
        "Tap": "Tap the screen.",
        "Type": "Type the text.",
        "Type_Name": "Type the name.",
        "Interact": "Let the user choose.",
        "Swipe": "Swipe the screen.",
        "Note": "Note the page.",
        "Call_API": "Call the API.",
        "Long Press": "Long press the screen.",
        "Double Tap": "Double tap the screen.",
        "Take_over": "Let the user take over.",
        "Back": "Go back.",
        "Home": "Go home.",
        "Wait": "Wait for the page.",
        "finish": "Answer the user.",
        "done": "All is done.",
    },
}

_ACTIONS = {
    "Launch": 'do(action="Launch", app="{app}")',
    "Tap": 'do(action="Tap", element=[{x},{y}])',
    "Type": 'do(action="Type", text="{text}")',
    "Type_Name": 'do(action="Type_Name", text="{name}")',
    "Interact": 'do(action="Interact")',
    "Swipe": 'do(action="Swipe", start=[{x},{y}], end=[{u},{v}])',
    "Note": 'do(action="Note", message="True")',
    "Call_API": 'do(action="Call_API", instruction="{task}")',
    "Long Press": 'do(action="Long Press", element=[{x},{y}])',
    "Double Tap": 'do(action="Double Tap", element=[{x},{y}])',
    "Take_over": 'do(action="Take_over", message="{hurdle}")',
    "Back": 'do(action="Back")',
    "Home": 'do(action="Home")',
    "Wait": 'do(action="Wait", duration="{n} seconds")',
    "finish": 'finish(message="{answer}")',
}


@dataclass(frozen=True)
class Step:
    """One instruction with its answer."""

    pattern: Pattern
    phrase: str  # the pattern with its slots filled
    thought: str
    action: str

    @property
    def answer(self) -> str:
        """The whole answer as the model writes it, ``<think>`` to ``</answer>``."""
        return f"<think>{self.thought}</think>\n<answer>{self.action}</answer>"

    @property
    def history(self) -> str:
        """The answer as the client sends it back in later requests."""
        return f"<think>{self.thought}</think><answer>{self.action}</answer>"


@dataclass(frozen=True)
class Sample:
    """A prompt and the answer to it."""

    messages: list[Message]
    step: Step
    layout: str


def slot_values(rng: random.Random, language: str, long_texts: bool = True) -> Slots:
    """Draw a value for every slot; ``long_texts`` of up to three words to type, or one."""
    other = "en" if language == "zh" else "zh"
    own_app = rng.random() < 0.72
    number = {key: str(rng.randrange(1000)) for key in "xyuv"}
    verb, thing = (rng.choice(voc.API_VERBS[language]), rng.choice(voc.API_OBJECTS[language]))
    return number | {
        "app": rng.choice(voc.APPS[language if own_app else other]),
        "text": _phrase(rng, language) if long_texts else _payload(rng, language),
        "name": _name(rng, language if rng.random() < 0.85 else other),
        "task": f"{verb}{thing}" if language == "zh" else f"{verb} {thing}",
        "risk": rng.choice(voc.RISKS[language]),
        "hurdle": rng.choice(voc.HURDLES[language]),
        "dir": rng.choice(tuple(voc.DIRECTIONS[language])),
        "n": str(rng.randint(1, 60)),
        "topic": rng.choice(tuple(voc.TOPICS[language])),
    }


def _name(rng: random.Random, language: str) -> str:
    if language == "zh":
        return rng.choice(voc.SURNAMES) + rng.choice(voc.GIVEN_NAMES)
    first = rng.choice(voc.FIRST_NAMES)
    return first if rng.random() < 0.4 else f"{first} {rng.choice(voc.LAST_NAMES)}"


def _phrase(rng: random.Random, language: str) -> str:
    """Draw a text to type: one to three words, now and then a name, an app or a number."""
    words = [rng.choice(voc.WORDS[language]) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    if rng.random() < 0.12:
        words[-1] = rng.choice(voc.APPS[rng.choice(LANGUAGES)])
    elif rng.random() < 0.1:
        words[0] = _name(rng, language)
    elif rng.random() < 0.1:
        words.append(str(rng.randrange(1000)))
    if language == "en":
        return " ".join(words)
    return "的".join(words[:2]) if len(words) == 2 and rng.random() < 0.3 else "".join(words)


def _payload(rng: random.Random, language: str) -> str:
    """Draw a short text to type: a word of the vocabulary, now and then a name, app or number."""
    chance = rng.random()
    if chance < 0.1:
        return rng.choice(voc.APPS[rng.choice(LANGUAGES)])
    if chance < 0.2:
        return _name(rng, language)
    if chance < 0.25:
        return str(rng.randrange(1000))
    return rng.choice(voc.WORDS[language])


def pair_is_held_out(pattern: Pattern, slots: Slots) -> bool:
    """Whether these values are never put into this pattern in training.

    Decided by a checksum of the pattern and the values it uses, so that it needs no table.
    """
    used = sorted(key for key in slots if "{" + key + "}" in pattern.text)
    if not used:
        return False
    text = "|".join((pattern.text, *(slots[key] for key in used)))
    return zlib.crc32(text.encode()) % _PAIR_MODULUS == 0


def make_step(pattern: Pattern, slots: Slots) -> Step:
    """Fill a pattern and write its answer."""
    language, kind = pattern.language, pattern.kind
    slots = dict(slots)
    if "{dir}" in pattern.text:
        swipe = voc.DIRECTIONS[language][slots["dir"]]
        slots.update(zip("xyuv", map(str, swipe), strict=True))
    if kind == "finish":
        replies, topics = voc.REPLIES[language], voc.TOPICS[language]
        slots["answer"] = replies[pattern.reply] if pattern.reply else topics[slots["topic"]]
    action = _ACTIONS[kind].format(**slots)
    if kind == "Tap" and "{risk}" in pattern.text:
        message = f"确认{slots['risk']}" if language == "zh" else f"Confirm {slots['risk']}"
        action = f'{action[:-1]}, message="{message}")'
    thought = _THOUGHTS[language][kind].format(**slots)
    return Step(pattern, pattern.text.format(**slots), thought, action)


def tap_answer(language: str, x: int, y: int) -> str:
    """The whole answer that taps a point, as `make_step` writes it."""
    action = _ACTIONS["Tap"].format(x=x, y=y)
    return f"<think>{_THOUGHTS[language]['Tap']}</think>\n<answer>{action}</answer>"


def done_step(pattern: Pattern) -> Step:
    """The step that ends a task of several steps in the pattern's language."""
    language = pattern.language
    action = _ACTIONS["finish"].format(answer=voc.REPLIES[language]["done"])
    return Step(pattern, "", _THOUGHTS[language]["done"], action)


class Generator:
    """Draws samples. Training and held-out samples come from the same drawing rules."""

    def __init__(self, seed: int) -> None:
        """Start a stream of samples that depends on ``seed`` alone."""
        self.rng = random.Random(seed)
        self.long_texts = True  # up to three words to type; held-out texts have one
        self.late = False  # late in training: more tasks of several steps, fewer that just end
        self._by_key: dict[tuple[str, str, bool], list[Pattern]] = {}
        for pattern in all_patterns():
            key = (pattern.kind, pattern.language, pattern.held_out)
            self._by_key.setdefault(key, []).append(pattern)

    def patterns(self, kind: str, language: str, held_out: bool, clause: bool) -> list[Pattern]:
        """List the patterns of a kind; with ``clause``, those that may stand in a longer task."""
        found = self._by_key[kind, language, held_out]
        return [p for p in found if p.clause] if clause else found

    def step(
        self, kind: str, language: str, held_out_by: str | None = None, clause: bool = False
    ) -> Step:
        """Draw one instruction.

        Args:
            kind: An action's name, or ``finish``.
            language: ``zh`` or ``en``.
            held_out_by: None for training; ``pattern`` or ``pair`` for what training never sees.
            clause: Draw a clause of a longer task.
        """
        choices = self.patterns(kind, language, held_out_by == "pattern", clause)
        if held_out_by == "pair":
            choices = [p for p in choices if "{" in p.text]
        if kind == "finish" and held_out_by != "pair" and self.rng.random() < 0.4:
            choices = [p for p in choices if p.reply] or choices
        while True:
            pattern = self.rng.choice(choices)  # anew each time: some patterns have few pairs
            slots = slot_values(self.rng, language, self.long_texts)
            pair = pair_is_held_out(pattern, slots)
            if held_out_by == "pattern" or pair == (held_out_by == "pair"):
                return make_step(pattern, slots)

    def sentence(self, step: Step) -> str:
        """Put polite words around a phrase, and English in the case of a sentence."""
        rng, pattern = self.rng, step.pattern
        before = after = ""
        if not pattern.bare:
            before = rng.choice(patterns.BEFORE[pattern.language]) if rng.random() < 0.35 else ""
            open_end = pattern.text.endswith(("{text}", "{task}", "{name}"))
            if not open_end and rng.random() < 0.3:
                after = rng.choice(patterns.AFTER[pattern.language])
        return self._cased(before + step.phrase + after, pattern)

    def _cased(self, text: str, pattern: Pattern) -> str:
        keep = pattern.language == "zh" or self.rng.random() < 0.2
        return text if keep else text[0].upper() + text[1:]

    def bare(self, step: Step) -> Sample:
        """Layout of a chat: one user message."""
        return Sample([{"role": "user", "content": self.sentence(step)}], step, "bare")

    def system(self, step: Step) -> Sample:
        """Layout of a first request of the phone client."""
        messages = self.opening(step.pattern.language, self.sentence(step))
        return Sample(messages, step, "system")

    def steps(self, language: str, last: Step | None) -> Sample:
        """Layout of a later request of the phone client.

        Args:
            language: ``zh`` or ``en``.
            last: The held-out step to end on; None draws a training task and where in it to stop.
        """
        rng = self.rng
        kinds = [kind for kind in KIND_WEIGHTS if kind != "finish"]
        before = rng.choice((1, 1, 1, 1, 2)) if last else rng.choice((1, 2, 2, 2, 3))
        drawn = rng.choices(kinds, _weights(kinds), k=before)
        tasks = [self.step(kind, language, clause=True) for kind in drawn]
        if last is not None:
            tasks.append(last)
        text = self._join(tasks, language, held_out=last is not None and rng.random() < 0.25)
        if last is not None:
            history = before
        elif self.late:
            history = rng.randint(1, before if rng.random() < 0.5 else max(1, before - 1))
        else:
            history = rng.choice((*range(1, before + 1), before))
        target = (*tasks, done_step(tasks[-1].pattern))[history]
        messages = self.opening(language, self._cased(text, tasks[0].pattern))
        for past in tasks[:history]:
            messages.append({"role": "assistant", "content": past.history})
            info = json.dumps({"current_app": self._screen()}, ensure_ascii=False)
            messages.append({"role": "user", "content": f"** Screen Info **\n\n{info}"})
        return Sample(messages, target, "steps")

    def composite(self, language: str, layout: str) -> Sample:
        """A task of two steps at its first step, in the layouts of a first request."""
        kinds = [kind for kind in KIND_WEIGHTS if kind != "finish"]
        drawn = self.rng.choices(kinds, _weights(kinds), k=2)
        tasks = [self.step(kind, language, clause=True) for kind in drawn]
        text = self._cased(self._join(tasks, language, held_out=False), tasks[0].pattern)
        if layout == "bare":
            return Sample([{"role": "user", "content": text}], tasks[0], "bare")
        return Sample(self.opening(language, text), tasks[0], "system")

    def _join(self, tasks: list[Step], language: str, held_out: bool) -> str:
        phrases = [task.phrase for task in tasks]
        if len(phrases) == 1:
            return phrases[0]
        if len(phrases) == 3:
            return self.rng.choice(patterns.JOINS_OF_THREE[language]).format(*phrases)
        join = (
            patterns.JOINS_HELD_OUT[language]
            if held_out
            else self.rng.choice(patterns.JOINS[language])
        )
        return join.format(*phrases)

    def _screen(self) -> str:
        apps = voc.APPS["zh"] + voc.APPS["en"]
        return self.rng.choice(voc.HOME_SCREENS if self.rng.random() < 0.3 else apps)

    def opening(self, language: str, text: str) -> list[Message]:
        """The messages of a first request of the phone client for a task."""
        info = json.dumps({"current_app": self._screen()}, ensure_ascii=False)
        return [
            {"role": "system", "content": self._system_prompt(language)},
            {"role": "user", "content": text if self.rng.random() < 0.2 else f"{text}\n\n{info}"},
        ]

    def _system_prompt(self, language: str) -> str:
        rng = self.rng
        if rng.random() < 0.2:
            return voc.ACTION_PROMPTS[language]
        day = date(rng.randint(2024, 2030), rng.randint(1, 12), rng.randint(1, 28))
        weekday = voc.WEEKDAYS[language][day.weekday()]
        if language == "zh":
            today = f"今天的日期是: {day.year}年{day.month:02d}月{day.day:02d}日 {weekday}"
        else:
            today = f"The current date: {day.isoformat()}, {weekday}"
        sentences = voc.SYSTEM_SENTENCES[language]
        count = min(int(rng.expovariate(0.5)), len(sentences))
        return "\n".join((today, *rng.sample(sentences, count)))

    def training_sample(self, layout: str | None = None) -> Sample:
        """Draw one training sample: a kind, a language and, unless given, a layout by weight."""
        rng = self.rng
        language = rng.choice(LANGUAGES)
        if layout is None:
            weights = LATE_LAYOUT_WEIGHTS if self.late else LAYOUT_WEIGHTS
            layout = rng.choices(tuple(weights), tuple(weights.values()))[0]
        if layout == "steps":
            return self.steps(language, None)
        if rng.random() < 0.1:
            return self.composite(language, layout)
        kind = rng.choices(tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values()))[0]
        step = self.step(kind, language)
        return self.bare(step) if layout == "bare" else self.system(step)


def _weights(kinds: list[str]) -> list[int]:
    return [KIND_WEIGHTS[kind] for kind in kinds]


def held_out() -> list[dict[str, Any]]:
    """List the held-out instructions, the same ones on every call.

    Returns:
        Items with ``id``, ``language``, ``kind``, ``layout`` (``bare``, ``system`` or ``steps``),
        ``held_out_by`` (``pattern`` or ``pair``), ``messages`` (OpenAI style), ``action``, the text
        that has to stand between ``<answer>`` and ``</answer>``, and ``answer``, the whole of it.
    """
    generator = Generator(HELD_OUT_SEED)
    generator.long_texts = False
    items: list[dict[str, Any]] = []
    seen: set[str] = set()
    turn = 0
    while len(items) < HELD_OUT_COUNT:
        kind = tuple(KIND_WEIGHTS)[turn % len(KIND_WEIGHTS)]
        language = LANGUAGES[turn // len(KIND_WEIGHTS) % 2]
        by = ("pattern", "pair")[turn // (2 * len(KIND_WEIGHTS)) % 2]
        turn += 1
        layout = generator.rng.choices(LAYOUTS, (5, 3, 2))[0]
        sample = _held_out_sample(generator, kind, language, by, layout)
        key = json.dumps(sample.messages[-1] if layout == "bare" else sample.messages)
        if sample.step.pattern.held_out == (by == "pattern") and key not in seen:
            seen.add(key)
            items.append(
                {
                    "id": f"h{len(items):03d}",
                    "language": language,
                    "kind": kind,
                    "layout": sample.layout,
                    "held_out_by": by,
                    "messages": sample.messages,
                    "action": sample.step.action,
                    "answer": sample.step.answer,
                }
            )
    return items


def _held_out_sample(
    generator: Generator, kind: str, language: str, by: str, layout: str
) -> Sample:
    """Draw one held-out sample; kinds without slots are always held out by their pattern."""
    clause = layout == "steps" and kind != "finish"
    choices = generator.patterns(kind, language, by == "pattern", clause)
    if by == "pair" and not any("{" in p.text for p in choices):
        by, choices = "pattern", generator.patterns(kind, language, True, clause)
    if clause and not choices:
        clause, layout = False, "system"
    step = generator.step(kind, language, by, clause)
    if clause:
        return generator.steps(language, step)
    return generator.bare(step) if layout == "bare" else generator.system(step)


def self_test(samples: int = 20000) -> None:
    """Check that no held-out pattern or pair is in the training space.

    Args:
        samples: How many training samples are drawn and compared with the held-out prompts.

    Raises:
        AssertionError: When something held out could be trained on.
    """
    generator, drawer = Generator(1), Generator(2)
    training = {(p.kind, p.language, p.text) for p in all_patterns() if not p.held_out}
    apart = {(p.kind, p.language, p.text) for p in all_patterns() if p.held_out}
    assert apart and not apart & training
    items = held_out()
    assert items == held_out() and len({item["id"] for item in items}) == HELD_OUT_COUNT
    assert {item["kind"] for item in items} == set(KIND_WEIGHTS)
    prompts = {json.dumps(item["messages"]) for item in items}
    slotted = [kind for kind in KIND_WEIGHTS if kind not in ("Interact", "Note", "Back", "Home")]
    pairs = set()
    for turn in range(samples // 4):
        step = drawer.step(slotted[turn % len(slotted)], LANGUAGES[turn % 2], "pair")
        pairs.add((step.pattern.text, step.phrase))
    for _ in range(samples):
        sample = generator.training_sample()
        pattern = sample.step.pattern
        assert (pattern.kind, pattern.language, pattern.text) in training
        assert (pattern.text, sample.step.phrase) not in pairs, sample.step.phrase
        assert json.dumps(sample.messages) not in prompts, sample.messages


if __name__ == "__main__":
    self_test()
    sys.stdout.write(f"ok: {HELD_OUT_COUNT} held-out instructions, none in the training space\n")
