"""What a fit buys: KL divergence and hit rate of fitted files beside every uniform type.

    python benchmarks/fit.py [--transcripts 120] [--screens 50] [--chunks 24] [--json FILE]
    python benchmarks/fit.py --scales      # instead: what --search-scales does to each type

Converts models/autoglm-tiny, and measures on its held-out instructions and held-out drawn screens
against its own f32 file: KL divergence over all tokens of the transcripts, over the answers' tokens
of some of them and of the screens, and taps that hit. The importance matrix comes from training
instructions and screens. A budget is a uniform type's own size, so that the fitted file competes
with that type and with every other one up to 5 % larger; these alone are measured. Prints a
Markdown table; needs no torch.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import frame

from autoglm_gguf import AutoGLM, Fit, convert
from autoglm_gguf.conversion.encode import SEARCHED
from autoglm_gguf.conversion.recipe import OUTTYPES
from autoglm_gguf.evaluate.actions import evaluate_actions
from autoglm_gguf.evaluate.calibration import calibrate
from autoglm_gguf.evaluate.passages import Corpus
from autoglm_gguf.evaluate.perplexity import evaluate_divergence, evaluate_perplexity
from autoglm_gguf.evaluate.screens import draw_screen, held_out_tasks, training_tasks

CHECKPOINT = Path(__file__).parents[1] / "models/autoglm-tiny"
sys.path.insert(0, str(CHECKPOINT))
instructions = importlib.import_module("instructions")
TRAINING_SEED = 77
CALIBRATION = (160, 16)  # transcripts, screens
N_CTX = 512  # tokens of a chunk, half of them scored
HEAD = ("type", "imatrix", "MB", "KL, all tokens", "KL, answers", "same top", "hits", "beats")
UNIFORM = [name for name in OUTTYPES if name not in ("f32", "f16", "bf16")]
RUN = {"memory_budget": "none", "n_gpu_layers": 0, "n_threads": 1}


def held_out(n: int, n_screens: int) -> list[list[dict[str, Any]]]:
    """Requests with their right answers, none of them in the training space."""
    found = instructions.held_out()
    rows = [
        [*one["messages"], {"role": "assistant", "content": one["answer"]}]
        for one in found[:: max(1, len(found) // max(1, n))][:n]
    ]
    return rows + [seen(task) for task in (held_out_tasks(n_screens) if n_screens else ())]


def training(n: int, n_screens: int) -> list[list[dict[str, Any]]]:
    """The same kinds from the training space."""
    generator = instructions.Generator(TRAINING_SEED)
    samples = (generator.training_sample() for _ in range(n))
    rows = [[*s.messages, {"role": "assistant", "content": s.step.answer}] for s in samples]
    return rows + [seen(t) for t in itertools.islice(training_tasks(TRAINING_SEED), n_screens)]


def seen(task: Any) -> list[dict[str, Any]]:
    """A drawn screen, what is asked, and the right answer."""
    parts = [
        {"type": "image", "image": draw_screen(task.screen)},
        {"type": "text", "text": task.text},
    ]
    x, y = task.action.element
    answer = instructions.tap_answer(task.language, x, y)
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def as_text(n: int) -> str:
    """Held-out transcripts one after another, special tokens written out."""
    return "".join(
        "[gMASK]<sop>" + "".join(f"<|{m['role']}|>\n{m['content']}" for m in transcript)
        for transcript in held_out(n, 0)
    )


class Bench:
    """Files of one folder, each measured once."""

    def __init__(self, work: Path, n: int, n_screens: int, n_chunks: int) -> None:
        self._work, self._n_screens = work, n_screens
        self._corpus = Corpus(held_out(n, n_screens))
        exact = convert(CHECKPOINT, work, "f32")
        self.mmproj = exact.mmproj
        self._base = work / "f32.base"
        evaluate_perplexity(
            exact.text, self._corpus, save_base=self._base, mmproj=self.mmproj, **RUN
        )
        (work / "text.txt").write_text(as_text(600), "utf-8")
        self._text = Corpus(work / "text.txt", n_ctx=N_CTX, n_chunks=n_chunks, parse_special=True)
        self._text_base = work / "text.base"
        evaluate_perplexity(exact.text, self._text, save_base=self._text_base, **RUN)
        self.imatrix = work / "imatrix.gguf"
        calibration = Corpus(training(*CALIBRATION))
        calibrate(
            exact.text, calibration, self.imatrix, process_output=True, mmproj=self.mmproj, **RUN
        )

    def measure(self, text: Path) -> dict[str, Any]:
        """Size, KL divergence from the f32 file, and hits; the f32 tower is everybody's."""
        plain = evaluate_divergence(text, self._text_base, self._text, **RUN).kl_divergence
        found = evaluate_divergence(text, self._base, self._corpus, mmproj=self.mmproj, **RUN)
        with AutoGLM.load(text, mmproj=self.mmproj, **RUN) as model:
            report = evaluate_actions(model, n=self._n_screens, max_image_tokens=(72,))
        return {
            "n_bytes": text.stat().st_size,
            "kl": plain.mean,
            "kl_error": plain.error,
            "answers": found.kl_divergence.mean,
            "answers_error": found.kl_divergence.error,
            "same_top": found.same_top.value,
            "hits": report.sizes[0].ours.hit_rate,
        }

    def convert_uniform(self, outtype: str, imatrix: bool) -> Path | None:
        """One type for all matrices; None where it needs an importance matrix."""
        if outtype == "iq3_xxs" and not imatrix:
            return None
        given = self.imatrix if imatrix else None
        outdir = self._work / f"uniform-{imatrix}"
        return convert(CHECKPOINT, outdir, outtype, imatrix=given, mmproj_outtype="f32").text

    def fitted(self, n_bytes: int, imatrix: bool, prefer: str) -> dict[str, Any]:
        """A mix of types within a size."""
        given = self.imatrix if imatrix else None
        fit = Fit(weights=n_bytes, prefer=prefer)  # type: ignore[arg-type]
        pair = convert(CHECKPOINT, self._work / "f", fit=fit, imatrix=given, mmproj_outtype="f32")
        assert pair.fit is not None
        found = {"name": f"fit, {prefer}", "imatrix": imatrix, **self.measure(pair.text)}
        return found | {
            "estimated": pair.fit.estimated_error,
            "types": dict(pair.fit.types),
            "limit": n_bytes,
        }


def print_row(row: dict[str, Any], note: str = "") -> None:
    cells = (
        row["name"],
        "yes" if row["imatrix"] else "no",
        f"{row['n_bytes'] / 1e6:.3f}",
        f"{row['kl']:.5f} ± {row['kl_error']:.5f}",
        f"{row['answers']:.5f} ± {row['answers_error']:.5f}",
        f"{row['same_top']:.1%}",
        f"{row['hits']:.0%}",
        note,
    )
    print(frame.line(cells), flush=True)


def compare_scales(bench: Bench, work: Path) -> list[dict[str, Any]]:
    """Each type with ggml's scales and with better ones."""
    rows = []
    for kind, search in itertools.product(SEARCHED, (False, True)):
        given = {"search_scales": search, "mmproj_outtype": "f32"}
        text = convert(CHECKPOINT, work / f"scales-{search}", kind.name, **given).text
        name = f"{kind.name.lower()}{', better scales' if search else ''}"
        rows.append({"name": name, "imatrix": False, **bench.measure(text)})
        print_row(rows[-1])
    return rows


def compare_fits(bench: Bench, budgets: list[str], preferences: list[str]) -> list[dict[str, Any]]:
    """Fitted files of some types' sizes, and the types that compete with them."""
    rows = []
    files = {
        (outtype, imatrix): text
        for outtype, imatrix in itertools.product(UNIFORM, (False, True))
        if (text := bench.convert_uniform(outtype, imatrix)) is not None
    }
    measured: dict[tuple[str, bool], dict[str, Any]] = {}
    for budget, imatrix in itertools.product(budgets, (False, True)):
        limit = files[budget, True].stat().st_size
        rivals = []
        for key, text in files.items():
            if key[1] != imatrix or not limit <= text.stat().st_size <= 1.05 * limit:
                continue
            if key not in measured:
                measured[key] = {"name": key[0], "imatrix": imatrix, **bench.measure(text)}
                rows.append(measured[key])
                print_row(rows[-1])
            rivals.append(measured[key])
        for prefer in preferences:
            row = bench.fitted(limit, imatrix, prefer)
            beaten = [other["name"] for other in rivals if row["kl"] < other["kl"]]
            lost = [other["name"] for other in rivals if row["kl"] >= other["kl"]]
            rows.append(row)
            print_row(row, ", ".join(beaten) + (f"; not {', '.join(lost)}" if lost else ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transcripts", type=int, default=120)
    parser.add_argument("--screens", type=int, default=50)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument(
        "--budgets", default="q3_K,q4_0,q4_K,q5_0,iq3_xxs", help="types whose sizes"
    )
    parser.add_argument("--prefer", default="quality", help="quality,speed")
    parser.add_argument("--scales", action="store_true", help="compare --search-scales instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        bench = Bench(work, arguments.transcripts, arguments.screens, arguments.chunks)
        print(frame.table(HEAD, []))
        if arguments.scales:
            rows = compare_scales(bench, work)
        else:
            budgets, preferences = arguments.budgets.split(","), arguments.prefer.split(",")
            rows = compare_fits(bench, budgets, preferences)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
