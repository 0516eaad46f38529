"""Screenshot to action: what to do on this screen, and the adb command that does it.

    python examples/screenshot_to_action.py
    python examples/screenshot_to_action.py --task "打开微信" --screenshot screen.png \\
        --model models/AutoGLM-Phone-9B-Q4_0.gguf

Without --screenshot it is a drawn screen, the only kind that autoglm-tiny can read. What would be
touched is drawn into action.png.
"""

from __future__ import annotations

import argparse

from PIL import Image

from autoglm_gguf import Action, AutoGLM, default_pair
from autoglm_gguf.actions import Back, Home, Swipe, Tap
from autoglm_gguf.annotate import annotate
from autoglm_gguf.evaluate.screens import draw_screen, held_out_tasks


def adb_command(action: Action, size: tuple[int, int]) -> str:
    """The command for a phone whose screen is ``size`` ``(width, height)`` px."""
    match action:
        case Tap():
            x, y = action.to_pixels("element", size)
            return f"adb shell input tap {x} {y}"
        case Swipe():
            (x1, y1), (x2, y2) = (action.to_pixels(name, size) for name in ("start", "end"))
            return f"adb shell input swipe {x1} {y1} {x2} {y2}"
        case Back() | Home():
            return f"adb shell input keyevent {action.name.upper()}"
    return f"# for the agent: {action.render()}"


def main() -> None:
    drawn = held_out_tasks(5)[4]
    parser = argparse.ArgumentParser(description="The next action for a task.")
    parser.add_argument("--task", default=drawn.text)
    parser.add_argument("--screenshot", help="a PNG or JPEG of a phone's screen")
    parser.add_argument("--model", help="a text GGUF; autoglm-tiny, a toy, without it")
    options = parser.parse_args()

    given = options.screenshot
    screenshot = Image.open(given) if given else draw_screen(drawn.screen)
    with AutoGLM.load(options.model or default_pair().text) as model:
        step = model.act(options.task, screenshot)
    print(f"{options.task}: {step.thinking}\n{step.action.render()}")
    print(adb_command(step.action, screenshot.size))
    annotate(screenshot, step.action).save("action.png")


if __name__ == "__main__":
    main()
