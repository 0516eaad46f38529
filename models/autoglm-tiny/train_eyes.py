"""Teach the finished text model of AutoGLM-tiny to see, in the background if asked.

    python train_eyes.py --work-dir build --background   # start; the log's name is printed
    python train_eyes.py --work-dir build --background   # the same again goes on where it was
    python train_eyes.py --work-dir build --minutes 20   # stop after 20 minutes, to go on later

A run that is killed goes on from the state it saved last, at most `Plan.checkpoint_seconds` old.
The checkpoint appears under ``--out`` when all is done; ``autoglm-gguf convert`` and
``autoglm-gguf evaluate actions --against`` measure it. Needs what make_autoglm_tiny.py needs, and
the package itself, which draws the screens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from eyes import Plan, Run, Stopped
from layout import save_weights
from tokenizers import Tokenizer
from training import Encoder
from transformers import Glm4vForConditionalGeneration

HERE = Path(__file__).resolve().parent
SEED = 20261124
_SURROUNDINGS = ("*.json", "*.jinja")


def train(base: Path, out: Path, work_dir: Path, plan: Plan, stop: Callable[[], bool]) -> bool:
    """Begin or go on, and write the checkpoint at the end.

    Args:
        base: The checkpoint of the finished text model; not changed.
        out: Where the seeing one goes.
        work_dir: Where a stopped run's state is.
        plan: What to do.
        stop: Asked after every step; True saves and ends the run.

    Returns:
        Whether the run is done.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    model = Glm4vForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    encoder = Encoder(Tokenizer.from_file(str(base / "tokenizer.json")))
    run = Run(model, encoder, plan, work_dir / "eyes.pt", stop)
    if run.resume():
        where = f"{run.progress.stage} {run.progress.step}"
        print(f"going on from {where} after {run.progress.seconds:.0f} s", flush=True)
    try:
        run.finish()
    except Stopped:
        print("stopped; the same command goes on", flush=True)
        return False
    out.mkdir(parents=True, exist_ok=True)
    for pattern in _SURROUNDINGS:
        for path in base.glob(pattern):
            if out != base:
                shutil.copyfile(path, out / path.name)
    save_weights(out, model.state_dict())
    print(f"done after {run.progress.seconds / 60:.1f} minutes: {out}", flush=True)
    return True


def start_in_background(arguments: list[str], work_dir: Path) -> None:
    """Start this program again, detached, its output in a log."""
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / "eyes.log"
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
        )
    print(f"process {process.pid}, log {log}")


def _stop_when(minutes: float | None) -> Callable[[], bool]:
    """True once the time is up or the process was asked to end."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda found, _: asked.append(found))
    end = None if minutes is None else time.monotonic() + 60 * minutes
    return lambda: bool(asked) or (end is not None and time.monotonic() > end)


def _parser() -> argparse.ArgumentParser:
    plan = Plan(SEED)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--base", type=Path, default=HERE, help="the text model's checkpoint")
    parser.add_argument("--work-dir", type=Path, default=Path("autoglm-tiny-work"))
    parser.add_argument("--out", type=Path, help="default: WORK_DIR/autoglm-tiny")
    parser.add_argument("--background", action="store_true", help="detach and write a log")
    parser.add_argument("--minutes", type=float, help="stop after this time, to go on later")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tower-steps", type=int, default=plan.tower_steps)
    parser.add_argument("--language-steps", type=int, default=plan.language_steps)
    parser.add_argument("--settle-steps", type=int, default=plan.settle_steps)
    parser.add_argument("--pool", type=int, default=plan.pool, help="screens to train on")
    parser.add_argument("--checkpoint-seconds", type=int, default=plan.checkpoint_seconds)
    parser.add_argument("--log-steps", type=int, default=plan.log_steps)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status: 0 done or started, 3 stopped before the end."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    if options.background:
        rest = [argument for argument in given if argument != "--background"]
        start_in_background(rest, options.work_dir)
        return 0
    torch.set_num_threads(1)  # two threads of the run have a batch each
    torch.set_flush_denormal(True)
    names = (
        *("seed", "tower_steps", "language_steps", "settle_steps", "pool"),
        *("checkpoint_seconds", "log_steps"),
    )
    plan = replace(Plan(SEED), **{name: getattr(options, name) for name in names})
    out = options.out or options.work_dir / "autoglm-tiny"
    print(f"process {os.getpid()}, seed {plan.seed}", flush=True)
    stop = _stop_when(options.minutes)
    return 0 if train(options.base, out, options.work_dir, plan, stop) else 3


if __name__ == "__main__":
    sys.exit(main())
