"""What a confidence threshold would send to a cloud, and how many wrong actions would stay.

autoglm-tiny answers its held-out instructions (text; nearly all right) and drawn screens (all hit),
as `HybridClient` lets a device answer: held to actions, with probabilities. Nothing is sent.

    python benchmarks/escalation.py [--outtype q4_0] [--instructions 200] [--screens 60]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from autoglm_gguf import AutoGLM, Confidence, convert, parse_answer
from autoglm_gguf.actions import find_action
from autoglm_gguf.evaluate.actions import judge
from autoglm_gguf.evaluate.screens import draw_screen, held_out_tasks
from autoglm_gguf.hybrid.policy import measure_confidence
from autoglm_gguf.session import act_messages

TINY = Path(__file__).parents[1] / "models" / "autoglm-tiny"
HELD: dict[str, Any] = {"constrain": "action", "max_tokens": 256, "logprobs": True}
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
Result = tuple[Confidence, bool]


def held_out() -> list[dict[str, Any]]:
    """The instructions autoglm-tiny never saw, from the script beside the checkpoint."""
    sys.path.insert(0, str(TINY))
    spec = importlib.util.spec_from_file_location("instructions", TINY / "instructions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["instructions"] = module
    spec.loader.exec_module(module)
    items: list[dict[str, Any]] = module.held_out()
    return items


def answer(model: AutoGLM, messages: Any) -> tuple[Confidence, str]:
    said = model.generate(messages, **HELD)
    start, end, _ = find_action(said.text)
    confidence = measure_confidence(said.logprobs, said.text[start:end])
    assert confidence is not None
    return confidence, said.text


def ask_instructions(model: AutoGLM, n: int) -> list[Result]:
    results = []
    items = held_out()
    for item in items[:: max(1, len(items) // n)][:n]:
        confidence, text = answer(model, item["messages"])
        wanted = parse_answer(item["action"])[1]
        results.append((confidence, parse_answer(text)[1] == wanted))
    return results


def ask_screens(model: AutoGLM, n: int) -> list[Result]:
    results = []
    for task in held_out_tasks(n):
        confidence, text = answer(model, act_messages(task.text, draw_screen(task.screen)))
        results.append((confidence, judge(task, text).is_hit))
    return results


def area(results: list[Result], of: str) -> float:
    """How often a right action is held for more probable than a wrong one; 0.5 is chance."""
    right = [getattr(c, of) for c, is_right in results if is_right]
    wrong = [getattr(c, of) for c, is_right in results if not is_right]
    pairs = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def report(name: str, results: list[Result]) -> None:
    n_wrong = sum(not is_right for _, is_right in results)
    print(f"\n{name}: {len(results)} answers, {n_wrong} wrong")
    for of in ("mean", "lowest"):
        print(f"  a right one has the higher {of} probability in {area(results, of):.0%} of pairs")
        print(f"  {'under':>7} {'sent':>6} {'wrong kept':>11} {'right sent':>11}")
        for least in THRESHOLDS:
            sent = [is_right for c, is_right in results if getattr(c, of) < least]
            kept_wrong = n_wrong - sent.count(False)
            share = len(sent) / len(results)
            print(f"  {least:7} {share:6.0%} {kept_wrong:11} {sent.count(True):11}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--outtype", default="q4_0")
    parser.add_argument("--instructions", type=int, default=200)
    parser.add_argument("--screens", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pair = convert(TINY, folder, arguments.outtype, name="autoglm-tiny")
        with AutoGLM.load(pair.text, mmproj=pair.mmproj, n_ctx=2048, n_threads=1) as model:
            words = ask_instructions(model, arguments.instructions)
            screens = ask_screens(model, arguments.screens)
    report("instructions", words)
    report("screens", screens)
    report("both", words + screens)


if __name__ == "__main__":
    main()
