"""What prompt lookup gains and costs: answers with guessed tokens against the same without.

Both take turns in one process, on one loaded model; each turn begins knowing nothing of what
guesses are worth. Prefill is not counted. With one thread CPU time is taken, so that other work on
the machine counts less; with more, only a quiet machine gives figures.

    python benchmarks/lookup.py                                   # autoglm-tiny, its own answers
    python benchmarks/lookup.py MODEL.gguf [--repeats 5] [--memory-budget SIZE] [--n-draft-max N]

What is answered, by name (``--case``):

    held-out  what autoglm-tiny answers to its held-out instructions, greedily, a history in some
    free      what the model itself says at temperature 1
    agent     the transcript below, seven steps of a phone agent
    prose     the second part of a text of this repository, after the first

In agent and prose a model of any weights is led through given tokens: it is evaluated and sampled
from, and what it would say is put aside. So speed is that of the model, and what guesses are worth
is that of the text. Words, digits and pairs of Chinese characters are given a token each, about as
the published tokenizer cuts them, whatever the model's own does. The transcript is made up, in the
published model's manner: how much real answers repeat themselves was not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import frame
import numpy as np
from frame import Measure, Row
from numpy.typing import NDArray

from autoglm_gguf.config import SamplingParams
from autoglm_gguf.embedded import default_pair
from autoglm_gguf.engine.base import Sampler
from autoglm_gguf.engine.images import EmbeddingCache
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.generation import Request, Run
from autoglm_gguf.lookup import Profit
from autoglm_gguf.memory.plan import plan_memory
from autoglm_gguf.messages import Timings, collect, parse_messages
from autoglm_gguf.prompt import render_prompt
from autoglm_gguf.stopping import StopFlag

ROOT = Path(__file__).parents[1]
TASK = "打开美团，搜索附近评分最高的火锅店，收藏第一家"
STEPS = [
    (
        "用户想要打开美团，搜索附近评分最高的火锅店，并收藏第一家。当前在系统桌面，我需要先启动美团应用。",
        'do(action="Launch", app="美团")',
    ),
    (
        "美团已经打开，当前在首页。顶部有一个搜索框，里面写着“烧烤”。我需要点击搜索框，然后输入“火锅”。",
        'do(action="Tap", element=[499,96])',
    ),
    (
        "搜索框已经激活，键盘已经弹出，下方有历史搜索记录。我现在输入“火锅”来搜索火锅店。",
        'do(action="Type", text="火锅")',
    ),
    (
        "已经输入“火锅”，右侧有一个“搜索”按钮。我需要点击“搜索”按钮来查看搜索结果。",
        'do(action="Tap", element=[915,96])',
    ),
    (
        "搜索结果页面已经出现，当前按“综合排序”显示。用户要评分最高的火锅店，我需要点击“综合排序”，"
        "然后选择“好评优先”。",
        'do(action="Tap", element=[126,168])',
    ),
    (
        "排序菜单已经展开，里面有“综合排序”、“距离优先”、“好评优先”等选项。我需要点击“好评优先”。",
        'do(action="Tap", element=[180,392])',
    ),
    (
        "搜索结果现在按“好评优先”显示，第一家是“蜀大侠火锅（中关村店）”，评分4.9。我需要点击第一家店铺进入"
        "详情页，然后收藏。",
        'do(action="Tap", element=[499,285])',
    ),
]
_PIECE = re.compile(r" ?[A-Za-z]+|\d|[\u4e00-\u9fff]{1,2}|</?\w+>|\s+|[^\w\s]")


class Words:
    """Token ids for words, in the order of their first appearance."""

    def __init__(self, n_vocab: int) -> None:
        self._ids: dict[str, int] = {}
        self._first, self._n = min(1000, n_vocab // 2), n_vocab

    def tokens(self, text: str) -> list[int]:
        pieces = _PIECE.findall(text)
        found = [self._first + self._ids.setdefault(p, len(self._ids)) for p in pieces]
        if max(found) >= self._n:
            raise SystemExit(f"vocabulary: too small ({self._n}, {max(found) + 1} required)")
        return found


class LedSampler:
    """Samples as asked, and then says what is to be said."""

    def __init__(self, inner: Sampler, script: Sequence[int]) -> None:
        self._inner, self._script, self._at = inner, script, 0

    @property
    def output(self) -> int:
        return self._inner.output

    @output.setter
    def output(self, value: int) -> None:
        self._inner.output = value

    def sample(self, among: NDArray[np.int32] | None = None) -> int:
        self._inner.sample(among)
        return self._script[self._at]

    def accept(self, token: int) -> None:
        self._inner.accept(token)
        self._at += 1

    def close(self) -> None:
        self._inner.close()


class LedEngine(LlamaEngine):
    """Says ``script`` where it is given one."""

    script: Sequence[int] | None = None

    def open_sampler(self, params: SamplingParams) -> Sampler:  # type: ignore[override]
        sampler = super().open_sampler(params)
        return sampler if self.script is None else LedSampler(sampler, self.script)


Answer = tuple[Sequence[int], Sequence[int] | None, dict[str, Any]]
"""Prompt, what is said, and how it is sampled."""


def held_out(engine: LedEngine, n: int) -> Iterator[Answer]:
    """autoglm-tiny's instructions, as many with a history as without."""
    sys.path.insert(0, str(ROOT / "models" / "autoglm-tiny"))
    items = importlib.import_module("instructions").held_out()
    late = [item for item in items if item["layout"] == "steps"][: n // 2]
    others = [item for item in items if item["layout"] != "steps"][: n - len(late)]
    template = engine.info.chat_template
    assert template is not None
    for item in [*late, *others]:
        prompt = render_prompt(parse_messages(item["messages"]), template)
        yield engine.tokenize(prompt.text), None, {"max_tokens": 96}


def free(engine: LedEngine, n: int) -> Iterator[Answer]:
    """The model's own words."""
    for seed in range(n):
        prompt = engine.tokenize(f"Tell me about your day. {seed}")
        yield prompt, None, {"temperature": 1.0, "seed": seed, "max_tokens": 96}


def agent(engine: LedEngine, n: int) -> Iterator[Answer]:
    """Step after step, each with the answers before it."""
    words = Words(engine.info.n_vocab)
    text = (ROOT / "src/autoglm_gguf/actions.py").read_text("utf-8")
    system = text[text.index("_ACTION_LIST") :][:900]
    prompt = words.tokens(f"<system>{system}<user>{TASK}")
    for thought, action in STEPS[:n]:
        said = words.tokens(f"<think>{thought}</think><answer>{action}</answer>")
        yield prompt, said, {"max_tokens": len(said)}
        prompt = [*prompt, *said, *words.tokens('<user>** Screen Info **{"current_app": "美团"}')]
        prompt += words.tokens("<assistant>")


def prose(engine: LedEngine, n: int) -> Iterator[Answer]:
    """A text that goes on."""
    words = Words(engine.info.n_vocab)
    tokens = words.tokens((ROOT / "docs/concepts/memory.md").read_text("utf-8"))
    for at in range(n):
        begin = 600 + 100 * at
        yield tokens[:begin], tokens[begin : begin + 100], {"max_tokens": 100}


CASES = {"held-out": held_out, "free": free, "agent": agent, "prose": prose}


def answer(
    engine: LedEngine,
    job: Answer,
    profit: Profit,
    n_draft: int | None,
    clock: Callable[[], float],
) -> Timings:
    prompt, engine.script, options = job
    params = SamplingParams(**options, n_draft=n_draft)
    request = Request(tuple(prompt), {}, params)
    run = Run(engine, request, StopFlag(), EmbeddingCache(0), profit, clock)
    with contextlib.closing(run):
        return collect(run.chunks()).timings


def measure(engine: LedEngine, row: Row, arguments: argparse.Namespace) -> None:
    """Each turn's ratio of times, then that of the median times, and what became of the guesses."""
    jobs = list(CASES[row.name](engine, arguments.answers))
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    spent: dict[tuple[bool, int], list[float]] = {}
    n_drafts = n_right = n_tokens = 0
    for turn in range(arguments.repeats):
        profit = Profit()
        for at, job in enumerate(jobs):
            for drafts in (False, True) if (turn + at) % 2 == 0 else (True, False):
                timings = answer(engine, job, profit, arguments.n_draft if drafts else 0, clock)
                spent.setdefault((drafts, at), []).append(timings.predicted_ms)
                n_tokens += timings.predicted_n * drafts
                n_drafts += timings.draft_n
                n_right += timings.draft_n_accepted
        ratio = _total(spent, drafts=False, turn=-1) / _total(spent, drafts=True, turn=-1)
        row.turns.append({"by_turn": frame.rounded(ratio)})
        frame.tell(f"{row.name}, turn {turn + 1}: {ratio:.3f}")
    middle = {key: [statistics.median(times)] for key, times in spent.items()}
    row.turns[0] |= {
        "whole": frame.rounded(_total(middle, drafts=False) / _total(middle, drafts=True)),
        "tokens": n_tokens // arguments.repeats,
        "guessed": frame.rounded(n_right / n_tokens),
        "drafts": n_drafts,
    }


def _total(spent: dict[tuple[bool, int], list[float]], *, drafts: bool, turn: int = 0) -> float:
    """Milliseconds of all answers."""
    return sum(times[turn] for (drafted, _), times in spent.items() if drafted == drafts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    frame.add_options(parser, repeats=3)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--answers", type=int, default=7, help="a turn")
    parser.add_argument("--n-draft", type=int, help="always so many, not as many as pay")
    parser.add_argument("--n-draft-max", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory-budget", default="none")
    arguments = parser.parse_args()
    path = arguments.model or default_pair().text
    cases = arguments.case or (["held-out"] if arguments.model is None else [*CASES][1:])
    sizes = {"n_ctx": 4096, "n_draft_max": arguments.n_draft_max, "n_threads": arguments.threads}
    plan = plan_memory(path, mmproj=None, memory_budget=arguments.memory_budget, **sizes)
    engine = LedEngine(path, None, plan.context, plan=plan)
    measures = [
        Measure("whole", "speed with guesses / without"),
        Measure("by_turn", "by turn"),
        Measure("tokens", "tokens a turn"),
        Measure("guessed", "guessed rightly, of all"),
        Measure("drafts", "guesses"),
    ]
    settings = {
        "model": path.name,
        "weights": plan.weights,
        "n_threads": arguments.threads or "all",
    }
    labels = {name: name for name in cases}
    record = frame.begin("lookup", "Prompt lookup", measures, labels, settings)
    with frame.until_interrupted(record):
        for row in record.rows:
            measure(engine, row, arguments)
    engine.close()
    frame.finish(record, arguments.json)


if __name__ == "__main__":
    main()
