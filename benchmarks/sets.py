"""The benchmarks one after another: `quick` in ten minutes, or `full`, which takes hours.

    python benchmarks/sets.py quick [--out out/bench] [--publish]
    python benchmarks/sets.py full [--work DIR] [--list]

Disk and time are told and checked first. Each benchmark is a process of its own, its JSON and its
Markdown go to ``--out``; one that fails is a line at the end and the others run. Ctrl-C ends the
one that runs, which keeps what it has, and no further one begins. Then the page is made of what
there is, and the ratios found here stand beside the published ones. ``--publish`` puts the JSON of
what came to its end in benchmarks/results and makes docs/benchmarks of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import frame
import results
from frame import ROOT, tell

HERE = Path(__file__).resolve().parent
GB = 10**9
QUICK_SECONDS = 600
"""What `quick` may measure; what does not fit any more is left out and named."""
_GRACE_S = 30


@dataclass(frozen=True, slots=True)
class Step:
    """One benchmark of a set."""

    name: str
    """Its record's, or that of its Markdown."""
    words: str
    """Script and options; WORK stands for the work folder."""
    seconds: int
    """About, on two cores."""
    disk_bytes: int = 0
    """What it leaves in the work folder, or needs there for a while."""
    json: bool = True
    """Whether it writes a record."""
    root: bool = False
    """Whether it needs root (memory control groups, the page cache)."""


QUICK = (
    Step("imports", "imports.py --repeats 5", 40),
    Step("load-0.4b", "load.py --work WORK --size 0.4b --repeats 3", 60, 1 * GB),
    Step(
        "speed-0.4b",
        "speed.py --work WORK --size 0.4b --prompt 256 --tokens 32 --repeats 3",
        200,
        1 * GB,
    ),
    Step("agent-steps-0.4b", "agent_steps.py --work WORK --size 0.4b --steps 3 --repeats 2", 110),
    Step("convert-0.4b", "convert.py --work WORK --size 0.4b --repeats 3", 90, 1 * GB),
    Step("server-tiny", "server.py --repeats 9", 30),
    Step(
        "memory-estimates-0.4b",
        "memory.py estimates --work WORK --sizes 0.4b --outtypes q4_0",
        60,
    ),
)
_NINE = "WORK/9b-q4_0"
FULL = (
    *QUICK,
    Step("speed-1.7b", "speed.py --work WORK --size 1.7b --repeats 3", 1800, 6 * GB),
    Step("load-1.7b", "load.py --work WORK --size 1.7b", 180),
    Step("convert-1.7b", "convert.py --work WORK --size 1.7b", 400, 7 * GB),
    Step("agent-steps-1.7b", "agent_steps.py --work WORK --size 1.7b", 5400),
    Step("server-1.7b", "server.py WORK/1.7b-q4_0/model-Q4_0.gguf --repeats 9", 700),
    Step(
        "server-1.7b-short",
        "server.py WORK/1.7b-q4_0/model-Q4_0.gguf --short --tokens 16 --repeats 100",
        400,
    ),
    Step("memory-estimates-0.4b-1.7b", "memory.py estimates --work WORK", 900, 3 * GB),
    Step("cancel", "cancel.py WORK/1.7b-q4_0", 5400),
    Step("lookup", "lookup.py WORK/1.7b-q4_0/model-Q4_0.gguf", 1800),
    Step("agent-answers", "agent_answers.py --work WORK", 1500, json=False),
    Step("constrain", "constrain.py", 60, json=False),
    Step("outtypes", "outtypes.py", 120, json=False),
    Step("fit", "fit.py", 3600, json=False),
    Step("escalation", "escalation.py", 600, json=False),
    Step(
        "convert-9b", "convert.py --work WORK --size 9b --only ours,disk --repeats 2", 900, 35 * GB
    ),
    Step(
        "speed-9b",
        "speed.py --work WORK --size 9b --only ours,held,llama-bench,handler --repeats 3",
        2400,
        7 * GB,
    ),
    Step(
        "memory-phone-model-Q4_0",
        f"memory.py phone --pair {_NINE} --cgroup",
        1800,
        root=True,
    ),
    Step(
        "memory-streaming",
        f"memory.py streaming --text {_NINE}/model-Q4_0.gguf",
        1200,
        root=True,
    ),
)
SETS = {"quick": QUICK, "full": FULL}


def run_step(step: Step, arguments: argparse.Namespace, limit_s: float | None) -> str:
    """Run one; what went wrong, or nothing.

    Raises:
        KeyboardInterrupt: Once the benchmark has kept what it has.
    """
    script, *options = (word.replace("WORK", str(arguments.work)) for word in step.words.split())
    command = [sys.executable, str(HERE / script), *options]
    if step.json:
        command += ["--json", str(arguments.out / f"{step.name}.json")]
    began = time.monotonic()
    tell(f"== {step.name} (about {step.seconds} s)")
    with (arguments.out / f"{step.name}.md").open("wb") as out:
        process = subprocess.Popen(command, stdout=out)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            end(process)
            return f"stopped after {time.monotonic() - began:.0f} s, the set's time was over"
        except KeyboardInterrupt:
            end(process)  # it was interrupted too
            raise
    return f"exit status {status}" if status else ""


def end(process: subprocess.Popen[bytes]) -> None:
    """Let an interrupted benchmark save, then make sure that it is gone."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    process.kill()
    process.wait()


def check(steps: Sequence[Step], work: Path) -> None:
    """Tell what is needed.

    Raises:
        SystemExit: There is too little disk.
    """
    needed = sum(step.disk_bytes for step in steps)
    held = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needed = max(0, needed - held)
    free = shutil.disk_usage(work).free
    hours = sum(step.seconds for step in steps) / 3600
    tell(
        f"{len(steps)} benchmarks, about {hours:.1f} h on two cores; {frame.figure(needed, 'B')} "
        f"more of disk in {work} ({frame.figure(free, 'B')} free)"
    )
    if free < needed + GB:
        raise SystemExit(
            f"error: {work}: not enough disk ({frame.figure(free, 'B')} free, "
            f"{frame.figure(needed + GB, 'B')} required)\n"
            "hint: --work FOLDER on another disk, or: make bench"
        )


def run_set(steps: Sequence[Step], arguments: argparse.Namespace, limit_s: float | None) -> int:
    """Run what can be run; the exit status."""
    failed: dict[str, str] = {}
    began, status = time.monotonic(), 0
    for step in steps:
        left = None if limit_s is None else limit_s - (time.monotonic() - began)
        if step.root and os.geteuid() != 0:
            failed[step.name] = "left out, it needs root"
        elif left is not None and left <= 0:
            failed[step.name] = "left out, the set's time was over"
        else:
            try:
                why = run_step(step, arguments, left)
            except KeyboardInterrupt:
                failed[step.name] = "interrupted"
                status = frame.INTERRUPTED
                break
            if why:
                failed[step.name] = why
    tell(f"== {time.monotonic() - began:.0f} s")
    for name, why in failed.items():
        tell(f"{name}: {why}")
    return status or (1 if any("exit status" in why for why in failed.values()) else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    parser.add_argument("--work", type=Path, help="where models are kept (default: OUT/work)")
    parser.add_argument("--only", help="names of benchmarks, with commas between")
    parser.add_argument("--publish", action="store_true", help="to benchmarks/results and docs")
    parser.add_argument("--list", action="store_true", help="say what would run, and its needs")
    arguments = parser.parse_args()
    steps = SETS[arguments.set]
    if arguments.only:
        steps = tuple(step for step in steps if step.name in arguments.only.split(","))
        if not steps:
            parser.error(f"--only: of {','.join(s.name for s in SETS[arguments.set])}")
    arguments.work = arguments.work or arguments.out / "work"
    for folder in (arguments.work, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.list:
        for step in steps:
            tell(f"{step.seconds:6} s  python benchmarks/{step.words}")
    check(steps, arguments.work)
    if arguments.list:
        return
    status = run_set(steps, arguments, QUICK_SECONDS if arguments.set == "quick" else None)
    found = [*frame.records(arguments.out)]
    results.write_page(found, arguments.out / "page")
    tell(f"page: {arguments.out / 'page' / 'README.md'}")
    print(results.comparison(found, [*frame.records(results.RESULTS)]))
    if arguments.publish:
        results.publish(found)
    sys.exit(status)


if __name__ == "__main__":
    main()
