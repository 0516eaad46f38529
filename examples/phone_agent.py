"""A phone agent: look, think, act, until the task is done.

    python examples/phone_agent.py "打开微信然后返回上一页"

The phone is scripted. For a real one write the same three members around adb (`exec-out screencap
-p`, `shell input tap X Y`), or let Open-AutoGLM's own agent ask `autoglm-gguf serve`.
"""

from __future__ import annotations

import argparse
import json

from PIL import Image

from autoglm_gguf import Action, AutoGLM, ImagePart, Message, TextPart, default_pair, parse_answer
from autoglm_gguf.actions import Back, Finish, Launch, choose_system_prompt


class ScriptedPhone:
    """Opens what it is told to, and goes back."""

    def __init__(self) -> None:
        self.app = "Home"

    def screenshot(self) -> Image.Image:
        return Image.new("RGB", (1080, 2400), "navy" if self.app == "Home" else "white")

    def perform(self, action: Action) -> None:
        if isinstance(action, Launch):
            self.app = action.app
        elif isinstance(action, Back):
            self.app = "Home"


def run(model: AutoGLM, phone: ScriptedPhone, task: str, max_steps: int = 10) -> str:
    """Work on a task; what the model says at its end."""
    history, text = [Message("system", choose_system_prompt(task))], task
    for _ in range(max_steps):
        text += "\n\n" + json.dumps({"current_app": phone.app}, ensure_ascii=False)
        look = Message("user", (ImagePart(phone.screenshot()), TextPart(text)))
        answer = model.generate([*history, look], max_tokens=512, constrain="action")
        thinking, action = parse_answer(answer.text)
        print(f"{phone.app}: {thinking} {action.render()}")
        if isinstance(action, Finish):
            return action.message
        phone.perform(action)
        # The client keeps no screenshot in the history: a step costs one image, not all of them.
        said = f"<think>{thinking}</think><answer>{action.render()}</answer>"
        history += [Message("user", text), Message("assistant", said)]
        text = "** Screen Info **"
    return f"not done after {max_steps} steps"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A phone agent, on a scripted phone.")
    parser.add_argument("task", nargs="?", default="打开微信然后返回上一页")
    with AutoGLM.load(default_pair().text, n_ctx=8192) as loaded:
        print(run(loaded, ScriptedPhone(), parser.parse_args().task))
