"""The phone agent's protocol, replayed: Open-AutoGLM's client, its calls and its parsing rules.

Source: Open-AutoGLM, ``phone_agent/model/client.py`` and ``phone_agent/actions/handler.py``, as
docs/concepts/actions.md describes them.
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from serving import fake_app, image_part, listening, png

from autoglm_gguf import AutoGLM
from autoglm_gguf.actions import ACTIONS, choose_system_prompt
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.server.params import ServerParams

PROBE_S = 30.0


class Agent:
    """What the client does, as far as a server sees it."""

    def __init__(self, url: str, task: str) -> None:
        self._client = openai.OpenAI(base_url=url + "/v1", api_key="EMPTY", timeout=600)
        self._task, self.max_tokens = task, 3000
        self._messages: list[Any] = [{"role": "system", "content": choose_system_prompt(task)}]
        self.usages: list[Any] = []

    def probe(self) -> str:
        """The check before the first step."""
        answer = self._client.chat.completions.create(
            model="autoglm-phone-9b",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=5,
            temperature=0.0,
            stream=False,
            timeout=PROBE_S,
        )
        assert answer.choices
        return answer.choices[0].message.content or ""

    def step(self, screenshot: bytes, app: str) -> dict[str, Any]:
        """One step: ask with a screenshot, take it out of the history, keep the answer."""
        screen = json.dumps({"current_app": app}, ensure_ascii=False)
        is_first = len(self._messages) == 1
        text = f"{self._task}\n\n{screen}" if is_first else f"** Screen Info **\n\n{screen}"
        parts = [image_part(screenshot), {"type": "text", "text": text}]
        self._messages.append({"role": "user", "content": parts})
        said = self._ask()
        thinking, action = split_answer(said)
        assert split_at_the_tag(said)[1] == action
        self._messages[-1]["content"] = [p for p in parts if p["type"] == "text"]
        turn = f"<think>{thinking}</think><answer>{action}</answer>"
        self._messages.append({"role": "assistant", "content": turn})
        assert action.endswith(")"), said
        return parse_action(action)

    def _ask(self) -> str:
        stream = self._client.chat.completions.create(
            model="autoglm-phone-9b",
            messages=self._messages,
            max_tokens=self.max_tokens,
            temperature=0.0,
            top_p=0.85,
            frequency_penalty=0.2,
            extra_body={},
            stream=True,
            stream_options={"include_usage": True},  # not the client's: for what we check
        )
        said = ""
        for chunk in stream:
            if not chunk.choices:
                self.usages.append(chunk.usage)
            elif chunk.choices[0].delta.content is not None:
                said += chunk.choices[0].delta.content
        return said


def split_at_the_tag(content: str) -> tuple[str, str]:
    """The rules in another order, as some versions of the client have them."""
    if "<answer>" not in content:
        return split_answer(content)
    thinking, _, rest = content.partition("<answer>")
    thinking = thinking.replace("<think>", "").replace("</think>", "").strip()
    return thinking, rest.replace("</answer>", "").strip()


def split_answer(content: str) -> tuple[str, str]:
    """The client's rules, in its order."""
    for mark in ("finish(message=", "do(action="):
        if mark in content:
            thinking, _, rest = content.partition(mark)
            return thinking.strip(), mark + rest
    if "<answer>" in content:
        thinking, _, rest = content.partition("<answer>")
        thinking = thinking.replace("<think>", "").replace("</think>", "").strip()
        return thinking, rest.replace("</answer>", "").strip()
    return "", content


def parse_action(response: str) -> dict[str, Any]:
    """The client's rules; what they cannot read, it reports as a finished task."""
    response = response.strip()
    if response.startswith(('do(action="Type"', 'do(action="Type_Name"')):
        text = response.split("text=", 1)[1][1:-2]
        return {"_metadata": "do", "action": "Type", "text": text}
    if response.startswith("finish"):
        return {"_metadata": "finish", "message": response.replace("finish(message=", "")[1:-2]}
    assert response.startswith("do"), response
    call = ast.parse(response, mode="eval").body
    assert isinstance(call, ast.Call)
    fields = {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
    return {"_metadata": "do", **fields}


NAMES = set(ACTIONS)


def check(action: dict[str, Any]) -> None:
    """It is one that the client can execute."""
    if action["_metadata"] == "finish":
        return
    assert action["action"] in NAMES
    for name in ("element", "start", "end"):
        for coordinate in action.get(name, ()):
            assert 0 <= coordinate <= 999


@pytest.fixture(scope="module")
def tiny_url(tiny_pair: Callable[[str], tuple[Path, Path]]) -> Iterator[str]:
    text, mmproj = tiny_pair("q8_0")

    def load() -> AutoGLM:
        return AutoGLM.load(text, mmproj=mmproj, content_format="string", n_ctx=5888, n_threads=1)

    with listening(fake_app(load=load)) as url:
        yield url


@pytest.mark.native
def test_probe_is_answered_in_its_time(tiny_url: str) -> None:
    began = time.monotonic()
    assert Agent(tiny_url, "打开微信").probe()
    assert time.monotonic() - began < PROBE_S


@pytest.mark.native
@pytest.mark.parametrize("task", ["打开微信", "Open Chrome"])
def test_every_step_gives_an_action_that_the_client_executes(tiny_url: str, task: str) -> None:
    agent = Agent(tiny_url, task)
    actions = [agent.step(png(224, 448, seed=n), "微信") for n in range(3)]
    for action in actions:
        check(action)
    assert [usage.prompt_tokens_details.image_tokens for usage in agent.usages] == [72] * 3
    n_system = agent.usages[0].prompt_tokens - 72
    for usage in agent.usages[1:]:
        assert usage.prompt_tokens_details.cached_tokens > n_system / 2, "the prefix is kept"


@pytest.mark.native
def test_model_that_knows_nothing_gives_actions_too(random_pair: tuple[Path, Path]) -> None:
    """Weights at random: what comes out is the constraint's doing alone."""

    def load() -> AutoGLM:
        return AutoGLM.load(random_pair[0], mmproj=random_pair[1], n_ctx=4096, n_threads=1)

    with listening(fake_app(load=load)) as url:
        agent = Agent(url, "Open Chrome")
        agent.max_tokens = 150
        for n in range(2):
            check(agent.step(png(112, 168, seed=n), "Home"))


SAID = (
    '<think>Tap it.</think><answer>do(action="Tap", element=[500,300])</answer>',
    'thinking\ndo(action="Type", text="say "hi" (now)")',
    '<think>x</think><answer>finish(message="Done (all).")</answer>\nand more',
    "<think>no action",
    "",
    "plain words, and a lot of them " * 20,
    '<answer>do(action="Fly", element=[5000,1])',
)


@pytest.mark.parametrize("said", SAID)
def test_whatever_the_model_says_the_client_can_execute_it(said: str) -> None:
    with listening(fake_app(FakeEngine(said.encode(), n_ctx=8192))) as url:
        agent = Agent(url, "Open Chrome")
        agent.max_tokens = 600
        check(agent.step(png(112, 168), "Home"))


def test_text_that_was_typed_arrives_as_it_was_meant() -> None:
    said = '<answer>do(action="Type", text="你好, world (1)")</answer>'
    with listening(fake_app(FakeEngine(said.encode(), n_ctx=8192))) as url:
        assert Agent(url, "x").step(png(), "Home")["text"] == "你好, world (1)"


def test_unheld_answer_ends_where_the_answer_does() -> None:
    """Without the constraint too: ``</answer>`` ends the turn, and is not said."""
    said = '<think>x</think><answer>do(action="Back")</answer> trailing'
    app = fake_app(FakeEngine(said.encode()), ServerParams(constrain_actions="off"))
    with listening(app) as url:
        agent = Agent(url, "x")
        agent._messages[0]["content"] = "do(action="
        assert agent.step(png(), "Home") == {"_metadata": "do", "action": "Back"}


def test_large_screenshots_come_within_the_limits() -> None:
    """A phone's own screenshot, PNG, with an alpha channel."""
    import io

    data = io.BytesIO()
    Image.new("RGBA", (1080, 2400), (20, 120, 220, 255)).save(data, "PNG")
    said = b'<answer>do(action="Home")</answer>'
    with listening(fake_app(FakeEngine(said, n_ctx=8448))) as url:
        agent = Agent(url, "x")
        assert agent.step(data.getvalue(), "Home")["action"] == "Home"
        assert agent.usages[0].prompt_tokens_details.image_tokens == 3108
