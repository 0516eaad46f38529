"""Streaming: words as they are made, in a conversation. Ctrl-C ends an answer, not the program.

    python examples/streaming.py
    echo 打开微信 | python examples/streaming.py --model models/AutoGLM-Phone-9B-Q4_0.gguf

Each line is a turn. A turn costs only what is new in it: the KV cache holds the ones before.
"""

from __future__ import annotations

import argparse
import sys

from autoglm_gguf import AutoGLM, ChatSession, default_pair


def say(chat: ChatSession, text: str) -> None:
    """Print one answer while it is made, then what it took."""
    try:
        for chunk in chat.stream(text, max_tokens=512, temperature=0.0):
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:  # what was said so far stays in the conversation
        print(" [stopped]")
        return
    timings = chunk.timings  # on the last chunk, like usage and finish_reason
    if timings is not None:
        print(f"\n[{timings.prompt_n} tokens read, {timings.cache_n} known before,", end=" ")
        print(f"first word after {timings.ttft_ms:.0f} ms]")


def main() -> None:
    parser = argparse.ArgumentParser(description="A conversation, line by line.")
    parser.add_argument("--model", help="a text GGUF; autoglm-tiny, a toy, without it")
    options = parser.parse_args()

    with AutoGLM.load(options.model or default_pair().text) as model:
        chat = model.chat()
        for line in sys.stdin:
            if line.strip():
                say(chat, line.strip())


if __name__ == "__main__":
    main()
