"""What each outtype does to weights and to logits: the figures behind `verify`'s thresholds.

    python benchmarks/outtypes.py                          # weights drawn from known distributions
    python benchmarks/outtypes.py --checkpoint DIR         # a checkpoint in every outtype
    python benchmarks/outtypes.py --random                 # the same for a random one of width 512

The first needs no torch. The others convert to a temporary directory, iq3_xxs with an importance
matrix of ones, and run the original in transformers. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import frame
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from builders import Shape, build_checkpoint

from autoglm_gguf import convert, read_header
from autoglm_gguf.conversion.recipe import MMPROJ_OUTTYPES, OUTTYPES
from autoglm_gguf.evaluate.parity import verify
from autoglm_gguf.native.ggml import dequantize, quantize

N_ROWS, N_PER_ROW = 512, 1024
WIDE = Shape(
    hidden_size=512,
    n_layers=6,
    n_heads=8,
    n_kv_heads=2,
    head_dim=64,
    intermediate_size=1024,
    mrope_section=(4, 6, 6),
)


def distributions() -> Iterator[tuple[str, np.ndarray]]:
    """Weights ``(N_ROWS, N_PER_ROW)``; their scale does not matter."""
    rng = np.random.default_rng(0)
    size = (N_ROWS, N_PER_ROW)
    gaussian = rng.standard_normal(size)
    yield "gaussian", gaussian
    yield "uniform", rng.uniform(-1, 1, size)
    yield "Laplace", rng.laplace(size=size)
    yield "Student t, 3", rng.standard_t(3, size)
    yield "outlier columns", gaussian * np.exp(0.5 * rng.standard_normal(N_PER_ROW))


def relative_rmse(rows: np.ndarray, outtype: str, imatrix: np.ndarray | None = None) -> float:
    """Of one matrix through a type and back."""
    kind = OUTTYPES[outtype].ggml_type
    decoded = dequantize(quantize(rows, kind, imatrix), kind, rows.shape[1])
    error = decoded.astype(np.float64) - rows
    return float(np.sqrt((error**2).sum() / (rows.astype(np.float64) ** 2).sum()))


def print_weights() -> None:
    """Every type on every distribution, and gaussian weights under an importance matrix."""
    drawn = {name: np.float32(0.02) * rows.astype(np.float32) for name, rows in distributions()}
    importance = np.random.default_rng(1).exponential(1.0, N_PER_ROW).astype(np.float32)
    print_row("type", *drawn, "gaussian, imatrix")
    print_row(*["---"] * (len(drawn) + 2))
    for outtype in OUTTYPES:
        found = [relative_rmse(rows, outtype) for rows in drawn.values()]
        found.append(relative_rmse(drawn["gaussian"], outtype, importance))
        print_row(OUTTYPES[outtype].ggml_type.name, *(f"{error:.3g}" for error in found))


def print_checkpoint(checkpoint: Path, work: Path) -> None:
    """A checkpoint in every outtype against the original."""
    print_row("outtype", "rel. rmse", "lowest cosine", "KL", "same top", "image embeddings")
    print_row(*["---"] * 6)
    ones = write_ones(convert(checkpoint, work, "f32", name="exact").text, work / "ones.dat")
    for outtype in OUTTYPES:
        pair = convert(
            checkpoint,
            work,
            outtype,
            mmproj_outtype=outtype if outtype in MMPROJ_OUTTYPES else None,
            imatrix=ones if outtype == "iq3_xxs" else None,
        )
        report = verify(checkpoint, pair.text, pair.mmproj)
        kind = OUTTYPES[outtype].ggml_type.name
        ours = read_header(pair.text).tensors
        worst = max(
            t.relative_rmse for t in report.weights if t.name in ours and t.type_name == kind
        )
        text, image = report.outputs[0], report.outputs[1] if len(report.outputs) > 1 else None
        shown = f"{image.lowest_cosine:.6f}" if image and outtype in MMPROJ_OUTTYPES else ""
        assert text.kl_divergence is not None and text.same_top is not None
        print_row(
            outtype,
            f"{worst:.3g}",
            f"{text.lowest_cosine:.6f}",
            f"{text.kl_divergence:.2g}",
            f"{text.same_top:.1%}",
            shown,
        )


def write_ones(text: Path, path: Path) -> Path:
    """An importance matrix, legacy format, that weighs all columns alike."""
    matrices = [t for t in read_header(text).tensors.values() if len(t.shape) == 2]
    data = struct.pack("<i", len(matrices))
    for tensor in matrices:
        name, n = tensor.name.encode(), tensor.shape[0]
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, n)
        data += np.ones(n, "<f4").tobytes()
    path.write_bytes(data)
    return path


def print_row(*cells: str) -> None:
    """A row of a Markdown table."""
    print(frame.line(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--random", action="store_true", help="a random checkpoint of width 512")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        if arguments.checkpoint is not None:
            print_checkpoint(arguments.checkpoint, work)
        elif arguments.random:
            print_checkpoint(build_checkpoint(work / "random", WIDE), work)
        else:
            print_weights()


if __name__ == "__main__":
    main()
