"""Sum up a document of any length within a fixed number of tokens.

    python examples/summarise_document.py LICENSE --model models/AutoGLM-Phone-9B-Q4_0.gguf

Parts that fit are summed up one by one, then the summaries, until one is left. Memory follows the
token budget, not the document: n_ctx is prompt and answer, and no more is reserved. autoglm-tiny,
without --model, shows the way and writes nonsense.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from autoglm_gguf import AutoGLM, TokenBudget, default_pair

ASK = "Summarise the following text in two sentences.\n\n"
MARKS = ("\n\n", "\n", "。", ". ", "，", " ")  # where to cut, the best first


def split(model: AutoGLM, text: str, n_tokens: int) -> list[str]:
    """Cut a text, at its paragraphs if possible, into parts of at most ``n_tokens``."""
    if len(model.tokenize(text)) <= n_tokens:
        return [text]
    quarter, middle = len(text) // 4, len(text) // 2
    found = (text.rfind(mark, quarter, middle) for mark in MARKS)
    cut = next((at + 1 for at in found if at >= 0), max(1, middle))
    return split(model, text[:cut], n_tokens) + split(model, text[cut:], n_tokens)


def summarise(model: AutoGLM, text: str, budget: TokenBudget) -> str:
    """One summary of all of it."""
    around = len(model.tokenize(model.render(ASK).text))  # the question and the chat template
    parts = split(model, text, (budget.prompt or 0) - around)
    said = []
    for number, part in enumerate(parts, 1):
        answer = model.generate(ASK + part, max_tokens=budget.answer)
        print(f"part {number} of {len(parts)}: {answer.usage.prompt_tokens} tokens read")
        said.append(answer.text.strip())
    return said[0] if len(said) == 1 else summarise(model, "\n".join(said), budget)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sum up a text file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--n-tokens", type=int, default=1024, help="read at once; %(default)s")
    parser.add_argument("--model", help="a text GGUF; autoglm-tiny, a toy, without it")
    options = parser.parse_args()

    budget = TokenBudget(prompt=options.n_tokens, answer=options.n_tokens // 8)
    path = options.model or default_pair().text
    with AutoGLM.load(path, mmproj=None, token_budget=budget) as model:
        print(summarise(model, options.file.read_text("utf-8"), budget))


if __name__ == "__main__":
    main()
