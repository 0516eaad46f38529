"""The promise itself: fresh processes under a budget smaller than the file, and what they held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import Shape, build_sparse_checkpoint
from PIL import Image

from autoglm_gguf import convert
from autoglm_gguf.native import pages

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.skipif(not pages.SUPPORTED, reason="weights cannot be streamed here"),
]

MB = 10**6
SHAPE = Shape(
    hidden_size=1024,
    n_layers=16,
    n_heads=8,
    head_dim=128,
    intermediate_size=5120,
    mrope_section=(8, 12, 12),
    vision_depth=2,
    vision_hidden=512,
    vision_heads=8,
    merger_width=2048,
    n_vocab=16384,
)
SIZES = {"n_ctx": 512, "n_batch": 64, "n_threads": 1, "n_gpu_layers": 0}
SMALL = {**SIZES, "max_image_tokens": 96}
# Loads, makes 16 tokens after a whole batch, and after an image where there is a tower.
CHILD = """
import json, sys
from PIL import Image
from autoglm_gguf import AutoGLM
job = json.loads(sys.argv[1])
sizes = job["sizes"]
report = {"tokens": []}
with AutoGLM.load(
    job["model"], mmproj="auto" if job["image"] else None, memory_budget=job["budget"], **sizes
) as model:
    report["load_peak_bytes"] = model.memory().peak_bytes
    for turn in range(2 if job["image"] else 1):
        image = Image.new("RGB", (168, 224), "red") if job["image"] else None
        image = job["file"] if job["file"] and turn else image
        text = "a" * (1 if job["image"] else 80)
        answer = model.generate(text, image=image, max_tokens=16)
        report["tokens"].append(len(answer.tokens))
    plan, usage = model.info.plan, model.memory()
report |= {
    "peak_bytes": usage.peak_bytes,
    "weights": plan.weights,
    "planned_bytes": plan.peak_bytes,
    "process_bytes": plan.process_bytes,
    "planned_load_bytes": plan.phase_bytes["load"],
    "largest_image_pixels": plan.largest_image_pixels,
}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text GGUF of 350 MB in q8_0, its mmproj beside it; the weights are all zero."""
    base = tmp_path_factory.mktemp("process")
    return convert(build_sparse_checkpoint(base / "c", SHAPE), base / "out", "q8_0").text


def run(
    model: Path,
    budget: str,
    *,
    image: bool = False,
    sizes: dict[str, int] = SIZES,
    file: Path | None = None,
) -> dict[str, Any]:
    """Run CHILD.

    Args:
        model: The text GGUF.
        budget: What it may hold.
        image: With the tower, and two images.
        sizes: Fields of `ContextParams`.
        file: The second image.
    """
    path = None if file is None else str(file)
    job = {"model": str(model), "budget": budget, "image": image, "sizes": sizes, "file": path}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(job)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_text_model_larger_than_its_budget_streams_within_it(model: Path) -> None:
    assert model.stat().st_size > 320 * MB
    report = run(model, "320MB")
    assert report["weights"] == "streamed"
    assert report["tokens"] == [16]
    assert report["load_peak_bytes"] <= report["planned_load_bytes"]
    assert report["peak_bytes"] < 320 * MB
    # What was read ahead is in the page cache. Where the system takes unused pages from there in
    # time (as Linux's DAMON does), a layer is read anew, through the mapping: the process holds it.
    assert 0.97 * report["peak_bytes"] <= report["planned_bytes"]
    assert report["process_bytes"] <= 1.05 * report["peak_bytes"]


def test_text_model_of_twice_its_budget_streams_within_it(model: Path) -> None:
    report = run(model, "200MB")
    assert report["weights"] == "streamed"
    assert report["peak_bytes"] < 200 * MB


def test_pair_larger_than_its_budget_sees_images_within_it(model: Path) -> None:
    report = run(model, "300MB", image=True)
    assert report["weights"] == "streamed"
    assert report["tokens"] == [16, 16]
    assert report["peak_bytes"] < 300 * MB
    assert 0.97 * report["peak_bytes"] <= report["planned_bytes"]


def test_largest_image_that_a_budget_leaves_room_for_is_seen_within_it(
    model: Path, tmp_path: Path
) -> None:
    most = run(model, "300MB", image=True, sizes=SMALL)["largest_image_pixels"]
    assert most > 1080 * 2400
    screen = tmp_path / "screen.png"  # a little less: the process may hold a little more this time
    Image.new("RGBA", (1000, int(0.95 * most / 1000)), "red").save(screen)
    report = run(model, "300MB", image=True, sizes=SMALL, file=screen)
    assert report["tokens"] == [16, 16]
    assert report["peak_bytes"] < 300 * MB


def test_model_that_fits_lies_still_within_its_budget(model: Path) -> None:
    report = run(model, "600MB")
    assert report["weights"] == "mapped"
    assert report["peak_bytes"] < 600 * MB
    assert 0.97 * report["peak_bytes"] <= report["process_bytes"] <= 1.05 * report["peak_bytes"]
