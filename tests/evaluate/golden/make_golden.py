"""Makes what the tests beside it compare with, by llama.cpp's own tools.

    python tests/evaluate/golden/make_golden.py FOLDER

FOLDER holds llama-imatrix and llama-perplexity, built from the commit that
``autoglm_gguf.native.library`` names, for example with

    cmake -B build -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF vendor/llama.cpp
    cmake --build build --target llama-imatrix llama-perplexity llama-quantize

``text.txt`` is fixed: samples of autoglm-tiny's training instructions. The models are made anew.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from builders import Shape, build_checkpoint  # noqa: E402

from autoglm_gguf import convert  # noqa: E402
from autoglm_gguf.native.library import LLAMA_CPP_COMMIT  # noqa: E402

TINY = HERE.parents[2] / "models" / "autoglm-tiny"
TEXT = HERE / "text.txt"
N_CTX, SMALL_N_CTX, SMALL_CHUNKS = 256, 32, 4
FIGURES = {
    "kl_mean": r"Mean +KLD: +([\d.]+) ± +([\d.]+)",
    "kl_median": r"Median +KLD: +([\d.]+)",
    "kl_p90": r"90.0% +KLD: +([\d.]+)",
    "kl_p95": r"95.0% +KLD: +([\d.]+)",
    "kl_p99": r"99.0% +KLD: +([\d.]+)",
    "kl_p99_9": r"99.9% +KLD: +([\d.]+)",
    "kl_maximum": r"Maximum KLD: +([\d.]+)",
    "perplexity": r"Mean PPL\(Q\) +: +([\d.]+) ± +([\d.]+)",
    "log_ratio": r"Mean ln\(PPL\(Q\)/PPL\(base\)\) +: +([\d.]+) ± +([\d.]+)",
    "delta_p": r"Mean +Δp: +(-?[\d.]+) ± +([\d.]+) %",
    "delta_p_rms": r"RMS Δp +: +([\d.]+) ± +([\d.]+) %",
    "same_top": r"Same top p: +([\d.]+) ± +([\d.]+) %",
}


def run(tools: Path, name: str, *arguments: object, last: str = "") -> str:
    """One tool's output, up to its last line: at their end the tools may lose what is not shown."""
    command = [str(part) for part in (tools / name, "--threads", "2", *arguments)]
    for _ in range(20):
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
        said = result.stdout + result.stderr
        if last in said:
            return said
    raise SystemExit(f"{name}: never said {last!r}")


def main(tools: Path) -> None:
    """Write imatrix.gguf, base.bin and figures.json."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        tiny = {
            kind: convert(TINY, base, kind, name="tiny").text for kind in ("q8_0", "f32", "q4_0")
        }
        small = convert(build_checkpoint(base / "small", Shape()), base, "f32").text
        context = ("-f", TEXT.name, "-c", N_CTX)
        run(
            tools,
            *("llama-imatrix", "-m", tiny["q8_0"], *context, "--no-ppl"),
            *("-o", HERE / "imatrix.gguf"),
        )
        logits = base / "logits.bin"
        said = run(
            tools,
            *("llama-perplexity", "-m", tiny["f32"], *context),
            *("--kl-divergence-base", logits),
            last="Final estimate",
        )
        found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", said)
        assert found is not None, said
        said = run(
            tools,
            *("llama-perplexity", "-m", tiny["q4_0"], "-c", N_CTX),
            *("--kl-divergence-base", logits, "--kl-divergence"),
            last="Same top p:",
        )
        matches = {name: re.search(pattern, said) for name, pattern in FIGURES.items()}
        assert all(matches.values()), said
        figures = {
            "llama.cpp": LLAMA_CPP_COMMIT,
            "base_perplexity": [float(n) for n in found.groups()],
            **{name: [float(n) for n in m.groups()] for name, m in matches.items() if m},
        }
        (HERE / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
        run(
            tools,
            *("llama-perplexity", "-m", small, "-f", TEXT.name, "-c", SMALL_N_CTX),
            *("--chunks", SMALL_CHUNKS, "--kl-divergence-base", HERE / "base.bin"),
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
