"""What reuse changes in the answers of a phone agent's steps: kept KV cells against none.

    python benchmarks/agent_answers.py --work DIR [--size 1.7b] [--steps 10] [--tokens 16]

The conversation and the random weights are those of ``agent_steps.py``. Each step is answered twice
by one model, greedily: from what the steps before left in the KV cache, and by another engine that
evaluates all of it anew. Where the two answers part, the logits that the fresh one chose from say
how near the two tokens were; behind that they are not compared. Nothing is timed. Prints Markdown.
Exit status 1: they parted where the fresh logits were further apart than 1e-3 of the largest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from agent_steps import conversation, make_pair
from numpy.typing import NDArray
from peers import Settings

from autoglm_gguf import AutoGLM, Completion, plan_memory
from autoglm_gguf.engine.llama import LlamaEngine

NEAR = 1e-3  # of the largest logit


class RememberingEngine(LlamaEngine):
    """Keeps the logits after every batch, by KV cells in use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, NDArray[np.float32]] = {}

    def eval_tokens(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        """See `LlamaEngine.eval_tokens`."""
        super().eval_tokens(tokens, n_outputs=n_outputs)
        self.seen[self.content.n_cells] = self.logits()


def open_engine(settings: Settings) -> RememberingEngine:
    """An engine of its own, all weights in memory."""
    text, mmproj = Path(settings.text), Path(settings.mmproj)
    plan = plan_memory(
        text,
        mmproj=mmproj,
        memory_budget="none",
        n_ctx=settings.n_ctx,
        n_batch=settings.n_batch,
        n_threads=settings.n_threads,
        n_gpu_layers=0,
    )
    return RememberingEngine(text, mmproj, plan.context, plan=plan)


def compare(
    kept: Completion, fresh: Completion, engines: list[RememberingEngine]
) -> dict[str, Any]:
    """One step: tokens alike, how far the logits of these differ, the gap where they part."""
    n_prompt = fresh.usage.prompt_tokens
    n = min(len(kept.tokens), len(fresh.tokens))
    n_same = next((k for k in range(n) if kept.tokens[k] != fresh.tokens[k]), n)
    differences = []
    for k in range(min(n_same + 1, n)):
        one, other = (engine.seen[n_prompt + k] for engine in engines)
        differences.append(float(np.abs(one - other).max() / np.abs(other).max()))
    found = {"n_same": n_same, "n": n, "difference": max(differences), "gap": None}
    if n_same < n:
        logits = engines[1].seen[n_prompt + n_same]
        pair = logits[[kept.tokens[n_same], fresh.tokens[n_same]]]
        found["gap"] = float(abs(pair[0] - pair[1]) / np.abs(logits).max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", default="1.7b", choices=["0.4b", "1.7b", "9b"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    text, mmproj = make_pair(arguments.work, arguments.size)
    settings = Settings(str(text), str(mmproj), n_threads=arguments.threads)
    engines = [open_engine(settings), open_engine(settings)]
    options = {"max_tokens": arguments.tokens, "n_draft": 0, "temperature": 0.0}
    print("| step | prompt | kept | evaluated | alike | logits differ by | gap at parting |")
    print("|---|---|---|---|---|---|---|", flush=True)
    n_far = n_near = 0
    with AutoGLM(engines[0]) as keeping, AutoGLM(engines[1]) as evaluating:
        for number, messages in enumerate(conversation(arguments.steps), 1):
            for engine in engines:
                engine.seen.clear()
            kept = keeping.generate(messages, **options)
            fresh = evaluating.generate(messages, cache_prompt=False, **options)
            found = compare(kept, fresh, engines)
            gap = found["gap"]
            n_near += gap is not None and gap < NEAR
            n_far += gap is not None and gap >= NEAR
            cells = (fresh.usage.prompt_tokens, kept.timings.cache_n, kept.timings.prompt_n)
            told = "" if gap is None else f"{gap:.1e}"
            print(
                f"| {number} | {' | '.join(map(str, cells))} | {found['n_same']} of {found['n']} "
                f"| {found['difference']:.1e} | {told} |",
                flush=True,
            )
    print(
        f"\nParted at a near-tie (< {NEAR:g} of the largest logit): {n_near}; elsewhere: {n_far}."
    )
    if n_far:
        sys.exit("error: answers parted where the logits do not explain it")


if __name__ == "__main__":
    main()
