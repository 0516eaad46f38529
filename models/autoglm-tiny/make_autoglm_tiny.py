"""Make AutoGLM-tiny: tokenizer, training, checkpoint, evaluation. Everything is seeded.

    python make_autoglm_tiny.py --work-dir build           # train and write the checkpoint
    python make_autoglm_tiny.py --work-dir build --resume  # go on after an interruption
    python make_autoglm_tiny.py --evaluate                 # measure the saved checkpoint

Needs torch, transformers, tokenizers and safetensors; no network and no data set. Files appear
under their final names only when they are complete.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from evaluation import evaluate_actions, evaluate_pictures, evaluate_rounding, load
from instructions import self_test
from layout import build_tokenizer, save_weights, write_surroundings
from model import build_model
from training import Plan, train

HERE = Path(__file__).resolve().parent
SEED = 20261122
BATCHES = 8000
EARLY_BATCHES = 4238  # two to a step; then four, weighed by their answer tokens
BARE_SHARE = 0.15  # of the batches, at the start: only short prompts
ROUNDED_SHARE = 0.27  # of the batches, at the end: forward passes with q4_0-rounded weights


def make(folder: Path, work_dir: Path, batches: int, seed: int, resume: bool) -> None:
    """Write the whole checkpoint.

    Args:
        folder: Where the checkpoint goes.
        work_dir: Where a stopped run's state is.
        batches: Batches to train on; 0 leaves the first, random weights.
        seed: Decides the weights, the samples and the pictures.
        resume: Go on from the state in ``work_dir`` when there is one.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    write_surroundings(folder, tokenizer)
    model = build_model(folder, seed)
    if batches:
        plan = Plan(
            seed,
            batches,
            bare_batches=int(batches * BARE_SHARE),
            early_batches=EARLY_BATCHES,
            rounded_batches=int(batches * ROUNDED_SHARE),
        )
        state = work_dir / "state.pt"
        progress = train(model, tokenizer, plan, state, resume)
        print(f"trained {progress.step} steps in {progress.seconds / 60:.1f} minutes", flush=True)
    save_weights(folder, model.state_dict())


def evaluate(folder: Path) -> dict[str, Any]:
    """Measure the saved checkpoint; see :mod:`evaluation` for the values."""
    model, encoder = load(folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "actions": evaluate_actions(model, encoder),
        "pictures": evaluate_pictures(model, encoder),
        "rounding": evaluate_rounding(model, encoder),
    }


def table(report: dict[str, Any]) -> str:
    """Write an evaluation as Markdown tables."""
    actions, pictures = report["actions"], report["pictures"]
    lines = ["| held-out instructions | exact actions | of | % |", "|---|---|---|---|"]

    def row(name: str, correct: int, items: int) -> None:
        lines.append(f"| {name} | {correct} | {items} | {100 * correct / items:.1f} |")

    row("**all**", actions["correct"], actions["items"])
    for group, counts in actions["by"].items():
        for key, (correct, items) in counts.items():
            row(f"{group.replace('_', ' ')}: {key}", correct, items)
    row("with a picture before the text", pictures["correct"], pictures["items"])
    lines += [
        "",
        "| weights | lowest cosine, answers | mean | lowest, centred | mean "
        "| lowest, prompts | mean | same greedy token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, values in report["rounding"].items():
        numbers = " | ".join(
            f"{values[key]:.5f}"
            for key in (
                "answer_lowest",
                "answer_mean",
                "centred_lowest",
                "centred_mean",
                "prompt_lowest",
                "prompt_mean",
                "same_greedy_token",
            )
        )
        lines.append(f"| {kind} | {numbers} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="the checkpoint's folder")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("autoglm-tiny-work"),
        help="where the state of a run is kept",
    )
    parser.add_argument("--batches", type=int, default=BATCHES, help="0: random weights")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads outside of training")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work-dir")
    parser.add_argument("--evaluate", action="store_true", help="only measure the saved checkpoint")
    parser.add_argument("--json", action="store_true", help="print the evaluation as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    if not options.evaluate:
        self_test()
        make(options.out, options.work_dir, options.batches, options.seed, options.resume)
    report = evaluate(options.out)
    print(json.dumps(report, ensure_ascii=False, indent=2) if options.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
