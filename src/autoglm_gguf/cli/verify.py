"""``autoglm-gguf verify``: how close a GGUF model is to the checkpoint it was made from."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from autoglm_gguf.cli import output
from autoglm_gguf.errors import VerificationError
from autoglm_gguf.evaluate.parity import Report, verify, verify_against
from autoglm_gguf.evaluate.weights import EXACT_TYPES, TensorDifference
from autoglm_gguf.hub import resolve_checkpoint, resolve_pair


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("verify", help="compare a GGUF model with its checkpoint")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or repo id")
    parser.add_argument("model", metavar="MODEL", help="text GGUF, or a directory with one")
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of the repo (default: main)"
    )
    parser.add_argument("--mmproj", metavar="FILE", help="vision tower (default: beside MODEL)")
    parser.add_argument(
        "--against", metavar="GGUF", help="compare MODEL with this text GGUF instead"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print the tables, and fail if a threshold is missed."""
    text, mmproj = resolve_pair(arguments.model, arguments.mmproj or "auto")
    if arguments.against is not None:
        report = verify_against(text, Path(arguments.against), on_tensor=_progress)
    else:
        checkpoint = resolve_checkpoint(arguments.checkpoint, revision=arguments.revision)
        report = verify(checkpoint, text, mmproj, on_tensor=_progress)
    if arguments.json:
        output.write_json({**asdict(report), "passed": report.passed})
    else:
        _print(report)
    if not report.passed:
        raise _failure(text, report)


def _failure(text: Path, report: Report) -> VerificationError:
    """What was missed, and what that may mean."""
    weights = [t.name for t in report.weights if not t.passed]
    outputs = [o for o in report.outputs if not o.passed]
    missed = [o.what for o in outputs]
    if weights:
        others = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        missed.insert(0, f"weights: {weights[0]}{others}")
        hint = "not made from this checkpoint, or damaged: convert the checkpoint again"
    elif any(o.type_name in EXACT_TYPES for o in outputs):
        hint = "convert the checkpoint again; if it stays, please report it"
    else:
        hint = (
            "the weights keep their types' limits; convert to f16 and verify that: if it passes, "
            "this is what rounding does to this model, and a larger outtype helps"
        )
    return VerificationError(
        f"{text.name}: outside its thresholds ({'; '.join(missed)})", hint=hint
    )


def _print(report: Report) -> None:
    output.write(f"{'weights':<12} {'tensors':>8} {'max abs':>10} {'rel. rmse':>10} {'cosine':>11}")
    kinds: dict[tuple[str, float | None], list[TensorDifference]] = {}
    for tensor in report.weights:
        kinds.setdefault((tensor.type_name, tensor.limit), []).append(tensor)
    for (kind, limit), tensors in kinds.items():
        output.write(
            f"{kind:<12} {len(tensors):>8} {max(t.max_abs for t in tensors):>10.3g} "
            f"{max(t.relative_rmse for t in tensors):>10.3g} "
            f"{min(t.cosine for t in tensors):>11.7f}{_verdict(tensors, limit)}"
        )
    if report.outputs:
        output.write()
        output.write(
            f"{'outputs':<22} {'n':>5} {'rel. max abs':>13} {'cosine':>10} {'KL':>10} "
            f"{'same top':>9}"
        )
    for o in report.outputs:
        kl = "" if o.kl_divergence is None else f"{o.kl_divergence:.3g}"
        same = "" if o.same_top is None else f"{o.same_top:.1%}"
        verdict = f"  {'ok' if o.passed else 'MISSED'}: {o.required}" if o.required else ""
        output.write(
            f"{o.what:<22} {o.n_positions:>5} {o.relative_max_abs:>13.3g} {o.lowest_cosine:>10.7f} "
            f"{kl:>10} {same:>9}{verdict}"
        )
    for reason in report.unchecked:
        output.write(f"not checked: {reason}")
    passed = "passed what was checked" if report.unchecked else "passed"
    output.write(f"verdict: {passed if report.passed else 'failed'}")


def _verdict(tensors: list[TensorDifference], limit: float | None) -> str:
    if limit is None:
        return ""
    n_missed = sum(not t.passed for t in tensors)
    required = f"rel. rmse <= {limit:.3g}" if limit else "equal"
    return f"  {f'MISSED by {n_missed}' if n_missed else 'ok'}: {required}"


def _progress(done: int, total: int) -> None:
    if done == total and not sys.stderr.isatty():
        output.note(f"weights: {total} tensors compared; logits and images take longer")
    if sys.stderr.isatty():
        output.note(f"\r\x1b[Kweights: {done} of {total} tensors", end="")
        if done == total:
            output.note("")
