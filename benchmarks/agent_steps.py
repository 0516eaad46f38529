"""Steps of a phone agent, replayed: ours, llama-server and llama-cpp-python's vision handler.

    python benchmarks/agent_steps.py --work DIR --server LLAMA_SERVER [--steps 10] [--repeats 3]
    python benchmarks/agent_steps.py --work DIR --only ours,handler --steps 3 --json steps.json

The conversation is Open-AutoGLM's: each step brings one screenshot, before its text; the one before
it is then removed from the history and the assistant's turn appended, the same fixed text for
everybody. Each runtime makes 16 tokens a step, which are thrown away. All are loaded side by side,
each in a process of its own, and answer a step one after another, in an order that changes from
step to step and from repeat to repeat. Weights are random (``random_checkpoint.py``, q4_0 with a
q8_0 mmproj, made in DIR once); LLAMA_SERVER is best built from the sources inside the pinned
llama-cpp-python. Prints Markdown. Exit status 1: ours evaluated other counts than expected.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent_peers import Child, Messages, Peer, PeerError, Server, Settings, read_version

NAMES = {
    "ours": "autoglm-gguf",
    "defaults": "autoglm-gguf, its defaults",
    "server": "llama-server",
    "handler": "llama-cpp-python, MTMDChatHandler",
}
MINE = ("ours", "defaults")
SIZE = (448, 952)
"""Screenshots, px: 16 x 34 image tokens, near the drawn screens' 1 : 2; nobody resizes them."""
FACTOR = 28
# What must be shown: the handler takes at least 2 times ours, the server at least 1/1.05 of it.
AT_LEAST = {"handler": 2.0, "server": 1 / 1.05}
TASK = "打开设置,调大字体,然后告诉我现在的屏幕亮度"
DATE = "今天的日期是: 2026年01月05日 星期一\n"
TURNS = (
    ("Home", "The task starts on the home screen. Settings has to be opened first.",
     'do(action="Launch", app="Settings")'),
    ("Settings", "Settings is open. The entry for the display is in the upper half of the list.",
     'do(action="Tap", element=[499,312])'),
    ("Settings", "The list has not moved. I scroll down to find the entry for the display.",
     'do(action="Swipe", start=[499,800], end=[499,250])'),
    ("Settings", "Now the display entry can be seen near the middle. I tap it.",
     'do(action="Tap", element=[420,537])'),
    ("Settings", "The page of the display shows brightness, dark mode and the size of the font.",
     'do(action="Tap", element=[500,688])'),
    ("Settings", "The slider for the font stands in the middle. I tap the third mark on it.",
     'do(action="Tap", element=[742,861])'),
    ("Settings", "The text has become larger. I go back to read the brightness.",
     'do(action="Back")'),
    ("Settings", "The page is still loading. I wait a moment before I look at it again.",
     'do(action="Wait", duration="2 seconds")'),
    ("Settings", "The slider for the brightness stands a little under two thirds, at 62 percent.",
     'do(action="Note", message="True")'),
    ("Settings", "Everything was done: the font is larger and the brightness is known.",
     'finish(message="The font is larger; the brightness is 62 percent.")'),
)  # fmt: skip

Runs = dict[str, list[dict[str, Any]]]
"""For each runtime its repeats: facts, steps and memory."""
Layout = list[dict[str, list[Any]]]
"""Each step's prompt as token ids and images, and the same without its image."""


# ---- the conversation


def conversation(n_steps: int) -> list[Messages]:
    """What the client sends at each step."""
    from autoglm_gguf.actions import choose_system_prompt

    history: Messages = [{"role": "system", "content": DATE + choose_system_prompt(TASK)}]
    sent: list[Messages] = []
    for number, screen in enumerate(screenshots(n_steps)):
        app, thinking, action = TURNS[number % len(TURNS)]
        shown = json.dumps({"current_app": app}, ensure_ascii=False)
        said = f"** Screen Info **\n\n{shown}" if number else f"{TASK}\n\n{shown}"
        text = {"type": "text", "text": said}
        image = {"type": "image_url", "image_url": {"url": screen}}
        sent.append([*history, {"role": "user", "content": [image, text]}])
        answer = f"<think>{thinking}</think><answer>{action}</answer>"
        history = [*without_images(sent[-1]), {"role": "assistant", "content": answer}]
    return sent


def without_images(messages: Messages) -> Messages:
    """The history as the client keeps it."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [p for p in message["content"] if p["type"] == "text"]}
        for message in messages
    ]


def screenshots(n: int) -> list[str]:
    """Data URLs of different screens, PNG, `SIZE` px."""
    from PIL.Image import Resampling

    from autoglm_gguf.evaluate.screens import draw_screen, held_out_tasks

    urls: list[str] = []
    for task in held_out_tasks(n):
        image, file = draw_screen(task.screen).resize(SIZE, Resampling.BICUBIC), io.BytesIO()
        image.save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    assert len(set(urls)) == n
    return urls


# ---- what each step should cost


def shared_cells(first: list[Any], second: list[Any]) -> int:
    """KV cells of the longest common prefix of two lists of token ids and images."""
    n_cells = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        n_cells += count_cells([left])
    return n_cells


def count_cells(items: Iterable[Any]) -> int:
    """KV cells: one a token; an image, ``[digest, cells]``, its own."""
    return sum(item[1] if isinstance(item, list) else 1 for item in items)


def expect(
    prompts: list[list[Any]], stripped: list[list[Any]], answers: list[list[int]]
) -> list[dict[str, int]]:
    """What each step has to evaluate when the longest common prefix is kept.

    Args:
        prompts: Of each step, token ids and images.
        stripped: The same without their images, as the next step's history has them.
        answers: Token ids that were made; the last one of each was never evaluated.

    Returns:
        For each step, in cells: ``prompt``; ``expected``, to be evaluated; of that ``again``, which
        had been evaluated behind the image that was removed, and ``new``.
    """
    rows = [dict.fromkeys(("prompt", "expected", "new"), count_cells(prompts[0])) | {"again": 0}]
    for number in range(1, len(prompts)):
        prompt = prompts[number]
        n_prompt = count_cells(prompt)
        held = prompts[number - 1] + answers[number - 1][:-1]
        # Logits are needed: the last token is evaluated even if it was held.
        n_kept = min(shared_cells(held, prompt), n_prompt - 1)
        new = n_prompt - shared_cells(stripped[number - 1], prompt)
        expected = n_prompt - n_kept
        rows.append({"prompt": n_prompt, "expected": expected, "new": new, "again": expected - new})
    return rows


# ---- measuring


def measure(
    opens: dict[str, Callable[[], Peer]], sent: list[Messages], n_repeats: int
) -> tuple[Runs, Layout]:
    """Replay the conversation; each runtime's repeats, and what each prompt is made of."""
    runs: Runs = {name: [] for name in opens}
    layout: Layout = []
    names = list(opens)
    for repeat in range(n_repeats):
        with contextlib.ExitStack() as stack:
            peers = {n: stack.enter_context(opens[n]()) for n in turned(names, repeat)}
            for name, peer in peers.items():
                runs[name].append({"facts": peer.start(), "steps": []})
            for number, messages in enumerate(sent):
                for name in turned(names, repeat + number):
                    before = peers[name].cpu_seconds()
                    answer = peers[name].answer(messages)
                    answer["cpu_s"] = peers[name].cpu_seconds() - before
                    runs[name][-1]["steps"].append(answer)
                    tell(repeat, number, name, answer)
            for name, peer in peers.items():
                runs[name][-1]["memory"] = peer.memory()
                if isinstance(peer, Child):
                    runs[name][-1]["facts"] = peer.ask("facts")
            mine = next((peers[n] for n in MINE if n in peers), None)
            if isinstance(mine, Child) and repeat == 0:
                layout = lay_out(mine, sent)
    return runs, layout


def turned(names: list[str], by: int) -> list[str]:
    """The same names, another one first."""
    by %= len(names)
    return names[by:] + names[:by]


def lay_out(mine: Child, sent: list[Messages]) -> Layout:
    """Each step's prompt as token ids and images, with its image and without."""
    return [
        {"prompt": mine.ask("items", m), "stripped": mine.ask("items", without_images(m))}
        for m in sent
    ]


def tell(repeat: int, number: int, name: str, answer: dict[str, Any]) -> None:
    counts = f"{answer.get('evaluated_n', '-')} of {answer.get('prompt_tokens', '-')} cells"
    print(
        f"repeat {repeat + 1}, step {number + 1}, {name}: first token {answer['ttft_s']:.2f} s, "
        f"all {answer['total_s']:.2f} s, {counts}, {answer['predicted_n']} tokens",
        file=sys.stderr,
        flush=True,
    )


# ---- telling


class Report:
    """Figures and tables of a measurement.

    Args:
        runs, layout: As `measure` returns them.
        settings: Of all runtimes.
    """

    def __init__(self, runs: Runs, layout: Layout, settings: Settings) -> None:
        self.runs, self.settings = runs, settings
        self.n_steps = len(next(iter(runs.values()))[0]["steps"])
        self.expected: list[dict[str, int]] = []
        name = next((n for n in MINE if n in runs), None)
        if layout and name is not None:
            answers = [step["tokens"] for step in runs[name][0]["steps"]]
            prompts = [row["prompt"] for row in layout]
            self.expected = expect(prompts, [row["stripped"] for row in layout], answers)

    def values(self, name: str, key: str) -> list[list[float]]:
        """A figure, by repeat and step."""
        return [[step[key] for step in run["steps"]] for run in self.runs[name]]

    def later(self, name: str, key: str) -> list[float]:
        """A figure at steps 2 and later (at 1, if there is no other) of all repeats."""
        return [v for run in self.values(name, key) for v in (run[1:] or run)]

    def ratios(self, name: str, key: str) -> list[float]:
        """Times ours, each step against the same step of the same repeat."""
        ours = self.later("ours", key)
        return [v / o for v, o in zip(self.later(name, key), ours, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Medians and extremes, for JSON."""
        found: dict[str, Any] = {}
        for name in self.runs:
            found[name] = {
                key: spread(self.later(name, key)) for key in ("ttft_s", "total_s", "cpu_s")
            }
            if "ours" in self.runs:
                for key in ("ttft_s", "total_s"):
                    found[name][f"{key}_times_ours"] = spread(self.ratios(name, key))
        return found

    def wrong_counts(self) -> list[str]:
        """Steps at which one of ours evaluated another number of cells than expected."""
        return [
            f"{NAMES[name]}, repeat {r + 1}, step {k + 1}: {n} cells, expected {row['expected']}"
            for name in MINE
            if name in self.runs
            for r, run in enumerate(self.values(name, "evaluated_n"))
            for k, (n, row) in enumerate(zip(run, self.expected, strict=True))
            if n != row["expected"]
        ]

    def markdown(self) -> str:
        """All tables."""
        parts = [self.times(), self.counts(), self.steps(), self.notes()]
        return "\n\n".join(part for part in parts if part)

    def times(self) -> str:
        ratio = "ours" in self.runs
        head = ["", "first token, s", "× ours", "whole step, s", "× ours", "CPU, s", "step 1, s"]
        head += ["peak memory", "planned"]
        rows = []
        for name, runs in self.runs.items():
            cells = [NAMES[name]]
            for key in ("ttft_s", "total_s"):
                cells.append(show(self.later(name, key), 2))
                cells.append(show(self.ratios(name, key), 2) if ratio else "")
            cells.append(show(self.later(name, "cpu_s"), 1))
            cells.append(show([run[0] for run in self.values(name, "total_s")], 2))
            peak = max(run["memory"]["VmHWM"] for run in runs)
            planned = runs[0]["facts"].get("planned_bytes")
            cells += [gigabytes(peak), gigabytes(planned) if planned else ""]
            rows.append(cells)
        which = f"steps 2 to {self.n_steps}" if self.n_steps > 1 else "step 1"
        n_repeats = len(next(iter(self.runs.values())))
        title = f"Medians of {which}, repeats: {n_repeats} (smallest to largest of all):"
        return f"{title}\n\n{table(head, rows)}"

    def counts(self) -> str:
        if not self.expected:
            return ""
        counted = [name for name in self.runs if name != "handler"]
        head = ["step", "prompt", "new", "evaluated again", "expected"]
        head += [NAMES[name] for name in counted]
        rows = []
        for k, row in enumerate(self.expected):
            cells = [str(k + 1), *(str(row[x]) for x in ("prompt", "new", "again", "expected"))]
            for name in counted:
                found = sorted({run[k] for run in self.values(name, "evaluated_n")})
                shown = ", ".join(map(str, found))
                cells.append(shown if found == [row["expected"]] else f"**{shown}**")
            rows.append(cells)
        title = "Evaluated, in KV cells (bold: another number than expected):"
        return f"{title}\n\n{table(head, rows)}"

    def steps(self) -> str:
        rows = [
            [
                str(k + 1),
                *(
                    f"{statistics.median(run[k] for run in self.values(name, 'ttft_s')):.2f}"
                    for name in self.runs
                ),
            ]
            for k in range(self.n_steps)
        ]
        title = "Seconds to the first token, medians of the repeats:"
        return f"{title}\n\n{table(['step', *(NAMES[name] for name in self.runs)], rows)}"

    def notes(self) -> str:
        lines = []
        for name in self.runs:
            made = sorted({int(n) for run in self.values(name, "predicted_n") for n in run})
            if made != [self.settings.max_tokens]:
                lines.append(f"Tokens made a step by {NAMES[name]}: {', '.join(map(str, made))}.")
            if "ours" in self.runs and name != "ours":
                lines.append(f"{self._same_answers(name)} by {NAMES[name]}.")
        for name in MINE:
            if name in self.runs:
                facts = self.runs[name][-1]["facts"]
                lines.append(
                    f"{NAMES[name]}: weights {facts['weights']}, tower {facts['tower']}; its own "
                    f"measure of its peak {gigabytes(facts['measured_bytes'])}."
                )
        for name, least in AT_LEAST.items():
            if "ours" in self.runs and name in self.runs:
                found = statistics.median(self.ratios(name, "ttft_s"))
                met = "met" if found >= least else "not met"
                lines.append(f"{NAMES[name]}, at least {least:.3f} times ours: {found:.3f}, {met}.")
        return "\n".join(f"- {line}" for line in lines)

    def _same_answers(self, name: str) -> str:
        pairs = [
            (ours["text"], theirs["text"])
            for one, other in zip(self.runs["ours"], self.runs[name], strict=True)
            for ours, theirs in zip(one["steps"], other["steps"], strict=True)
        ]
        return f"{sum(o == t for o, t in pairs)} of {len(pairs)} answers as ours"


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(values: list[float], digits: int) -> str:
    """``median (min to max)``."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    median = f"{statistics.median(values):.{digits}f}"
    return median if low == high else f"{median} ({low} to {high})"


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def introduce(
    arguments: argparse.Namespace, settings: Settings, load: float, sent: list[Messages]
) -> str:
    """Machine, versions and settings, and the command without this machine's paths."""
    from autoglm_gguf.bench.process import probe_machine

    machine, versions, _ = probe_machine(None)
    memory = f", {machine.memory_bytes / 2**30:.0f} GiB" if machine.memory_bytes else ""
    pair = [Path(settings.text), Path(settings.mmproj)]
    files = " and ".join(gigabytes(path.stat().st_size) for path in pair)
    n_tokens = SIZE[0] // FACTOR * (SIZE[1] // FACTOR)
    used = f"llama-cpp-python {versions.llama_cpp_python} (llama.cpp {versions.llama_cpp[:9]})"
    if "server" in arguments.only:
        used += f", llama-server {read_version(arguments.server).removeprefix('version: ')}"
    command = "python benchmarks/agent_steps.py --work DIR"
    command += " --server LLAMA_SERVER" if "server" in arguments.only else ""
    command += f" --steps {len(sent)} --repeats {arguments.repeats}"
    command += f" --only {','.join(arguments.only)}" if len(arguments.only) < len(NAMES) else ""
    facts = (
        f"`benchmarks/agent_steps.py`. Machine: {machine.n_cores} cores ({machine.cpu}){memory}; "
        f"load average at the start {load:.1f}. {used}. Random weights, {arguments.size} "
        f"parameters, GGUF pair of {files}; {n_tokens} image tokens and {settings.max_tokens} "
        f"tokens made a step; n_ctx {settings.n_ctx}, n_batch and n_ubatch {settings.n_batch}, "
        f"{settings.n_threads} threads, f16 KV cache, flash attention, no GPU. Weights are "
        "repacked by all; the others map the file as well, as is their default. Side by side in "
        "one run, each runtime in a process of its own."
    )
    facts = textwrap.fill(facts, 110, break_on_hyphens=False)
    return f"# Steps of a phone agent\n\n{facts}\n\n    {command}"


# ---- command line


def make_pair(work: Path, size: str) -> tuple[Path, Path]:
    """The random pair in ``work``, made at the first time."""
    from random_checkpoint import build

    from autoglm_gguf import convert

    out, source = work / f"{size}-q4_0", work / f"random-{size}"
    if not out.exists():
        if not (source / "model.safetensors.index.json").exists():
            build(source, size)
        convert(source, out, "q4_0", mmproj_outtype="q8_0", name="model")
    return next(out.glob("model-*.gguf")), next(out.glob("mmproj-*.gguf"))


def openers(arguments: argparse.Namespace, settings: Settings) -> dict[str, Callable[[], Peer]]:
    """How each runtime is started."""
    extra = tuple(arguments.server_options.split())

    def opener(kind: str) -> Callable[[], Peer]:
        name, seconds = NAMES[kind], arguments.timeout
        if kind == "server":
            return lambda: Server(name, arguments.server, settings, seconds, extra)
        return lambda: Child(name, kind, settings, seconds)

    return {kind: opener(kind) for kind in arguments.only}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the random pair is kept")
    parser.add_argument("--size", default="1.7b", choices=["0.4b", "1.7b", "9b"])
    parser.add_argument("--server", type=Path, help="llama-server's executable")
    parser.add_argument("--server-options", default="", help="more of its own: ='--no-warmup'")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(NAMES), help=f"of {','.join(NAMES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a start or a step")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    asked = arguments.only.split(",")
    arguments.only = [name for name in NAMES if name in asked]
    if len(arguments.only) < len(asked) or min(arguments.steps, arguments.repeats) < 1:
        parser.error(f"--only: of {','.join(NAMES)}; at least one step and one repeat")
    if "server" in arguments.only and arguments.server is None:
        parser.error("--server: name llama-server's executable, or leave it out with --only")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the peers are ended too
    began, load = time.strftime("%Y-%m-%d %H:%M"), os.getloadavg()[0]
    text, mmproj = make_pair(arguments.work, arguments.size)
    settings = Settings(str(text), str(mmproj), n_threads=arguments.threads)
    sent = conversation(arguments.steps)
    try:
        runs, layout = measure(openers(arguments, settings), sent, arguments.repeats)
    except PeerError as error:
        sys.exit(f"error: {error}")
    report = Report(runs, layout, settings)
    print(introduce(arguments, settings, load, sent), report.markdown(), sep="\n\n")
    if arguments.json is not None:
        command = " ".join(sys.argv)
        found = {"began": began, "command": command, "load_average": load}
        found |= {"settings": asdict(settings), "summary": report.summary()}
        found |= {"expected": report.expected, "runs": runs}
        arguments.json.write_text(json.dumps(found, indent=1, ensure_ascii=False), "utf-8")
    wrong = report.wrong_counts()
    if wrong:
        sys.exit("\n".join(["error: other counts than expected:", *wrong]))


if __name__ == "__main__":
    main()
