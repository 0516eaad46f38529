"""Steps of a phone agent, replayed: ours, llama-server and llama-cpp-python's vision handler.

    python benchmarks/agent_steps.py --work DIR [--server LLAMA_SERVER] [--steps 10] [--repeats 3]
    python benchmarks/agent_steps.py --work DIR --only ours,handler --steps 3 --json steps.json

The conversation is Open-AutoGLM's: each step brings one screenshot, before its text; the one before
it is then removed from the history and the assistant's turn appended, the same fixed text for
everybody. Each runtime makes 16 tokens a step, which are thrown away. All are loaded side by side,
each in a process of its own, and answer a step one after another, in an order that changes from
step to step and from repeat to repeat. Weights are random (``random_checkpoint.py``, q4_0 with a
q8_0 mmproj, made in DIR once); LLAMA_SERVER is what build_peers.sh builds, unless it is named.
Prints Markdown. Exit status 1: ours evaluated other counts than expected.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import agent_peers
import frame
from frame import OURS, Measure, Record, Row, figure, turned
from peers import Child, Messages, Peer, PeerError, Server, Settings, find_program, read_version

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


class Replay:
    """The conversation, replayed by runtimes that stand side by side.

    Args:
        record: Its rows get a turn for each step of each repeat.
        opens: How each row's runtime is started.
        sent: What the client sends, step by step.
        wanted: Tokens a step.
    """

    def __init__(
        self,
        record: Record,
        opens: dict[str, Callable[[], Peer]],
        sent: list[Messages],
        wanted: int,
    ) -> None:
        self.record, self.sent, self._opens, self._wanted = record, sent, opens, wanted
        self.expected: list[dict[str, int]] = []
        self._said: dict[str, list[str]] = {name: [] for name in opens}
        self._made: dict[str, set[int]] = {name: set() for name in opens}

    def run(self, n_repeats: int, save: Callable[[], object]) -> None:
        """All repeats; Ctrl-C ends them early."""
        with frame.until_interrupted(self.record):
            for repeat in range(n_repeats):
                self._repeat(repeat)
                save()
        self._note()

    def _repeat(self, repeat: int) -> None:
        peers: dict[str, Peer] = {}
        answers: list[list[int]] = []
        with contextlib.ExitStack() as stack:
            for name in turned([*self._opens], repeat):

                def start(name: str = name) -> None:
                    peers[name] = peer = stack.enter_context(self._opens[name]())
                    self.record.row(name).facts |= peer.start()

                frame.attempt(self.record.row(name), start)
            for number, messages in enumerate(self.sent):
                for name in turned([*peers], repeat + number):
                    step = partial(self._step, peers[name], name, repeat, number, messages)
                    answer = frame.attempt(self.record.row(name), step)
                    if name == OURS and answer is not None:
                        answers.append(answer["tokens"])
            for name, peer in peers.items():
                row = self.record.row(name)
                frame.attempt(row, partial(self._hold, peer, row))
            mine = peers.get(OURS)
            if isinstance(mine, Child) and repeat == 0 and len(answers) == len(self.sent):
                self.expected = expect(*lay_out(mine, self.sent), answers)

    def _step(
        self, peer: Peer, name: str, repeat: int, number: int, messages: Messages
    ) -> dict[str, Any]:
        before = peer.cpu_seconds()
        answer = peer.answer(messages)
        cpu = peer.cpu_seconds() - before
        self._said[name].append(answer["text"])
        self._made[name].add(int(answer["predicted_n"]))
        turn: dict[str, float] = {"repeat": repeat + 1, "step": number + 1}
        if number == 0 and len(self.sent) > 1:
            turn["first_ttft_s"] = frame.rounded(answer["ttft_s"])
            turn["first_total_s"] = frame.rounded(answer["total_s"])
        else:
            for key, value in (("ttft_s", answer["ttft_s"]), ("total_s", answer["total_s"])):
                turn[key] = frame.rounded(value)
            turn["cpu_s"] = frame.rounded(cpu)
        turn |= {key: answer[key] for key in ("evaluated_n", "prompt_tokens") if key in answer}
        self.record.row(name).turns.append(turn)
        counts = f"{answer.get('evaluated_n', '-')} of {answer.get('prompt_tokens', '-')} cells"
        frame.tell(
            f"repeat {repeat + 1}, step {number + 1}, {name}: first token {answer['ttft_s']:.2f} "
            f"s, all {answer['total_s']:.2f} s, {counts}, {answer['predicted_n']} tokens"
        )
        return answer

    def _hold(self, peer: Peer, row: Row) -> None:
        """What it held at most, after the last step."""
        row.turns[-1]["peak_bytes"] = peer.memory()["VmHWM"]
        if isinstance(peer, Child):
            row.facts |= peer.ask("facts")
            if "planned_bytes" in row.facts:
                row.turns[-1]["planned_bytes"] = row.facts["planned_bytes"]

    def _note(self) -> None:
        """What is to be said of a row beside its figures."""
        for name, said in self._said.items():
            row = self.record.row(name)
            told = []
            if name != OURS and self._said.get(OURS):
                pairs = [*zip(self._said[OURS], said, strict=False)]
                told.append(f"{sum(o == t for o, t in pairs)} of {len(pairs)} answers as ours")
            if self._made[name] - {self._wanted}:
                told.append(f"tokens made a step: {', '.join(map(str, sorted(self._made[name])))}")
            if "weights" in row.facts:
                told.append(f"weights {row.facts['weights']}, tower {row.facts['tower']}")
            if told:
                row.facts["note"] = "; ".join(told)

    def wrong_counts(self) -> list[str]:
        """Steps at which one of ours evaluated another number of cells than expected."""
        return [
            f"{NAMES[name]}, repeat {turn['repeat']}, step {turn['step']}: {turn['evaluated_n']} "
            f"cells, expected {self.expected[int(turn['step']) - 1]['expected']}"
            for name in MINE
            if name in self._opens and self.expected
            for turn in self.record.row(name).turns
            if turn["evaluated_n"] != self.expected[int(turn["step"]) - 1]["expected"]
        ]


def lay_out(mine: Child, sent: list[Messages]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Each step's prompt as token ids and images, with its image and without."""
    prompts = [mine.ask("items", messages) for messages in sent]
    return prompts, [mine.ask("items", without_images(messages)) for messages in sent]


# ---- telling


def counts(replay: Replay) -> str:
    """What was evaluated, step by step."""
    if not replay.expected:
        return ""
    rows = [row for row in replay.record.rows if any("evaluated_n" in t for t in row.turns)]
    lines = []
    for k, row in enumerate(replay.expected):
        cells = [str(k + 1), *(str(row[x]) for x in ("prompt", "new", "again", "expected"))]
        for one in rows:
            found = sorted({int(t["evaluated_n"]) for t in one.turns if t["step"] == k + 1})
            shown = ", ".join(map(str, found))
            cells.append(shown if found == [row["expected"]] else f"**{shown}**")
        lines.append(cells)
    head = ["step", "prompt", "new", "evaluated again", "expected", *(row.label for row in rows)]
    title = "Evaluated, in KV cells (bold: another number than expected):"
    return f"{title}\n\n{frame.table(head, lines)}"


def at(row: Row, number: int) -> list[dict[str, float]]:
    """A row's turns at a step."""
    return [turn for turn in row.turns if turn["step"] == number]


def steps(record: Record) -> str:
    """The first token's seconds, by step."""
    rows = [row for row in record.rows if row.turns]
    lines = []
    for number in sorted({int(turn["step"]) for row in rows for turn in row.turns}):
        key = "ttft_s" if any("ttft_s" in t for t in at(rows[0], number)) else "first_ttft_s"
        found = ([turn[key] for turn in at(row, number) if key in turn] for row in rows)
        cells = [f"{statistics.median(seconds):.2f}" if seconds else "-" for seconds in found]
        lines.append([str(number), *cells])
    title = "Seconds to the first token, medians of the repeats:"
    return f"{title}\n\n{frame.table(['step', *(row.label for row in rows)], lines)}"


# ---- command line


def make_pair(work: Path, size: str, outtype: str = "q4_0") -> tuple[Path, Path]:
    """The random pair in ``work``, made at the first time."""
    from random_checkpoint import find_or_build

    from autoglm_gguf import convert

    out = work / f"{size}-{outtype}"
    if not [*out.glob("mmproj-*.gguf")]:
        convert(find_or_build(work, size), out, outtype, mmproj_outtype="q8_0", name="model")
    return next(out.glob("model-*.gguf")), next(out.glob("mmproj-*.gguf"))


def openers(arguments: argparse.Namespace, settings: Settings) -> dict[str, Callable[[], Peer]]:
    """How each runtime is started."""
    extra = tuple(arguments.server_options.split())

    def opener(kind: str) -> Callable[[], Peer]:
        name, seconds = NAMES[kind], arguments.timeout
        if kind == "server":
            given = arguments.server
            return lambda: Server(
                name, find_program("llama-server", given), settings, seconds, extra
            )
        return lambda: agent_peers.start(name, kind, settings, seconds)

    return {kind: opener(kind) for kind in arguments.only}


def open_record(arguments: argparse.Namespace, settings: Settings) -> Record:
    """The empty record."""
    n_tokens = SIZE[0] // FACTOR * (SIZE[1] // FACTOR)
    files = [Path(settings.text), Path(settings.mmproj)]
    shown = {
        "weights": f"random, {arguments.size}",
        "files": " and ".join(figure(path.stat().st_size, "B") for path in files),
        "steps": arguments.steps,
        "image tokens": n_tokens,
        "tokens made a step": settings.max_tokens,
        "n_ctx": settings.n_ctx,
        "n_batch": settings.n_batch,
        "n_threads": settings.n_threads,
        "KV cache": "f16",
    }
    later = f"steps 2 to {arguments.steps}" if arguments.steps > 1 else "step 1"
    measures = [
        Measure("ttft_s", f"first token, {later}", "s", more=False),
        Measure("total_s", "whole step", "s", more=False),
        Measure("cpu_s", "CPU", "s"),
        Measure("first_total_s", "step 1", "s", more=False),
        Measure("peak_bytes", "peak memory", "B", more=False),
        Measure("planned_bytes", "planned", "B"),
    ]
    labels = {name: NAMES[name] for name in arguments.only}
    name = f"agent-steps-{arguments.size}"
    record = frame.begin(name, f"Steps of a phone agent, {arguments.size}", measures, labels, shown)
    with contextlib.suppress(PeerError):
        if "server" in arguments.only:
            told = read_version(find_program("llama-server", arguments.server))
            record.versions["llama-server"] = told.removeprefix("version: ")
    return record


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    frame.add_options(parser, repeats=3)
    parser.add_argument("--work", type=Path, required=True, help="where the random pair is kept")
    parser.add_argument("--size", default="1.7b", choices=["0.4b", "1.7b", "9b"])
    parser.add_argument("--server", type=Path, help="llama-server's executable")
    parser.add_argument("--server-options", default="", help="more of its own: ='--no-warmup'")
    parser.add_argument("--steps", type=frame.positive, default=10)
    frame.add_rows_option(parser, NAMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a start or a step")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the peers are ended too
    text, mmproj = make_pair(arguments.work, arguments.size)
    settings = Settings(str(text), str(mmproj), n_threads=arguments.threads)
    record = open_record(arguments, settings)
    sent = conversation(arguments.steps)
    replay = Replay(record, openers(arguments, settings), sent, settings.max_tokens)
    replay.run(arguments.repeats, frame.keeper(record, arguments.json))
    frame.finish(record, arguments.json, more=[counts(replay), steps(record)])
    wrong = replay.wrong_counts()
    if wrong:
        sys.exit("\n".join(["error: other counts than expected:", *wrong]))


if __name__ == "__main__":
    main()
