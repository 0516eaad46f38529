"""Quick start: load a model, ask it, and see what the answer cost.

    python examples/quick_start.py
    python examples/quick_start.py "请解释什么是机器学习" --model models/AutoGLM-Phone-9B-Q4_0.gguf

Without --model it is autoglm-tiny, which comes with the package and is a toy.
"""

from __future__ import annotations

import argparse

from autoglm_gguf import AutoGLM, default_pair


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model one question.")
    parser.add_argument("prompt", nargs="?", default="打开微信")
    parser.add_argument("--model", help="a text GGUF; its mmproj is found beside it")
    options = parser.parse_args()

    # The memory budget is for the whole process; 4GB is the default.
    with AutoGLM.load(options.model or default_pair().text, memory_budget="4GB") as model:
        answer = model.generate(options.prompt, max_tokens=256)
        print(answer.text)

        usage, timings = answer.usage, answer.timings
        print(f"\n{usage.prompt_tokens} tokens read, {usage.completion_tokens} written,", end=" ")
        print(f"{timings.predicted_per_second:.0f} a second")
        held = model.memory()
        if held is not None:
            print(f"{held.total_bytes / 1e6:.0f} MB held")


if __name__ == "__main__":
    main()
