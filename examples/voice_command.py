"""A voice assistant's middle: what was heard becomes an action and a spoken reply.

    printf '打开微信\\nwhat can you do?\\n' | python examples/voice_command.py
    whisper-stream … | python examples/voice_command.py --apps Chrome,微信 | espeak-ng --stdin

A line in is one command, as a speech recogniser writes it; a line out is one sentence to say. The
action goes to stderr, where a program would perform it. Only the listed apps can be opened: the
answer is held to them, so a name that was misheard becomes the nearest one.
"""

from __future__ import annotations

import argparse
import sys

from autoglm_gguf import Action, ActionParseError, AutoGLM, default_pair
from autoglm_gguf.actions import Finish, Interact, Launch, TakeOver

APPS = "微信,支付宝,Chrome,Settings,Camera"


def reply(action: Action) -> str:
    """What is said while the action is performed."""
    match action:
        case Launch(app=app):
            return f"Opening {app}."
        case Finish(message=message):  # an answer in words: there is nothing to do
            return message
        case TakeOver() | Interact():
            return "I need your help with this."
        case _:
            return f"{action.name}: done."


def main() -> None:
    parser = argparse.ArgumentParser(description="Commands in, sentences out, a line each.")
    parser.add_argument("--apps", default=APPS, help="names with commas; %(default)s")
    parser.add_argument("--model", help="a text GGUF; autoglm-tiny, a toy, without it")
    options = parser.parse_args()
    apps = options.apps.split(",")

    # No screenshot is shown, so the vision tower need not be loaded.
    with AutoGLM.load(options.model or default_pair().text, mmproj=None) as model:
        for heard in filter(None, map(str.strip, sys.stdin)):
            try:
                action = model.act(heard, apps=apps, max_tokens=128).action
            except ActionParseError:  # cut off: too long for a spoken command
                print("I did not understand that.", flush=True)
                continue
            print(action.render(), file=sys.stderr)
            print(reply(action), flush=True)


if __name__ == "__main__":
    main()
