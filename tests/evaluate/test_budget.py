"""Measurements keep the memory budget: fresh processes, a model larger than it, what they held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import Shape, build_sparse_checkpoint

from autoglm_gguf import convert
from autoglm_gguf.native import pages

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.skipif(not pages.SUPPORTED, reason="weights cannot be streamed here"),
]

MB = 10**6
TEXT = Path(__file__).parent / "golden" / "text.txt"
SHAPE = Shape(
    hidden_size=1024,
    n_layers=12,
    n_heads=8,
    head_dim=128,
    intermediate_size=4096,
    mrope_section=(8, 12, 12),
    n_vocab=32768,
)
CHILD = """
import json, sys
from autoglm_gguf import Corpus, calibrate, evaluate_divergence, evaluate_perplexity, measure_memory
job = json.loads(sys.argv[1])
plans = []
given = {
    "memory_budget": job["budget"],
    "n_threads": 1,
    "n_gpu_layers": 0,
    "on_load": lambda info: plans.append(info.plan),
}
corpus = Corpus(job["text"], n_ctx=128, n_chunks=2)
if job["what"] == "calibrate":
    calibrate(job["model"], corpus, job["out"], process_output=True, **given)
else:
    evaluate_perplexity(job["model"], corpus, save_base=job["out"], **given)
    evaluate_divergence(job["model"], job["out"], **given)
print(json.dumps({
    "peak_bytes": measure_memory().peak_bytes,
    "weights": plans[0].weights,
    "planned_bytes": plans[0].peak_bytes,
    "type_k": plans[0].context.type_k,
}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text GGUF of 276 MB in q8_0; the weights are all zero."""
    base = tmp_path_factory.mktemp("budget")
    return convert(build_sparse_checkpoint(base / "c", SHAPE), base / "out", "q8_0").text


@pytest.mark.slow
@pytest.mark.parametrize("what", ["calibrate", "evaluate"])
@pytest.mark.parametrize(("budget", "weights"), [(260, "streamed"), (500, "mapped")])
def test_measurement_stays_within_its_budget(
    model: Path, tmp_path: Path, what: str, budget: int, weights: str
) -> None:
    job = {
        "model": str(model),
        "text": str(TEXT),
        "out": str(tmp_path / "out"),
        "budget": f"{budget}MB",
        "what": what,
    }
    command = [sys.executable, "-c", CHILD, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["weights"] == weights
    assert report["type_k"] == "f16"  # never another one to save memory: it changes the figures
    assert report["peak_bytes"] < budget * MB
    assert report["peak_bytes"] <= 1.03 * report["planned_bytes"]
