"""Memory: estimates against measured peaks, and the promise at the 9B's real shape.

    python benchmarks/memory.py estimates --work DIR
    python benchmarks/memory.py phone --pair DIR [--budget 4GB] [--cgroup]
    python benchmarks/memory.py streaming --text FILE [--budget 4GB] [--repeats 3]

``estimates`` plans and runs pairs of two sizes in fresh processes and compares. ``phone`` loads,
encodes a 1080x2400 screenshot at 1024 image tokens, makes 64 tokens, then does the same with a
second screenshot, keeping the KV cache; ``--cgroup`` does it inside a memory control group of the
budget's size (version 1 or 2, root only), caches dropped first. ``streaming`` compares tokens per
second of the planned run with plain mmap, interleaved: inside such a group, cold, and outside,
cached. Pairs of the 9B's shape come from ``random_checkpoint.py 9b`` and ``autoglm-gguf convert``.
Linux only. Writes JSON to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCREEN = (1080, 2400)
GROUP = "autoglm-bench"


# ---- in the measured process


def child_run(job: dict[str, Any]) -> dict[str, Any]:
    """Load a pair as planned, show it images, make tokens; what was planned and what was held."""
    from autoglm_gguf.config import ContextParams, SamplingParams
    from autoglm_gguf.engine.llama import LlamaEngine
    from autoglm_gguf.gguf.describe import describe_pair
    from autoglm_gguf.hub import resolve_pair
    from autoglm_gguf.memory.budget import parse_budget
    from autoglm_gguf.memory.measure import measure_memory
    from autoglm_gguf.memory.plan import plan_pair
    from autoglm_gguf.vision import read_pixels

    text, tower = resolve_pair(job["model"], "auto" if job["images"] else None)
    before = measure_memory()
    context = job["context"]
    # Not plan_memory: plain mmap must be let run where the plan knows better.
    plan = plan_pair(
        describe_pair(text, tower),
        ContextParams(**context),
        parse_budget(job["budget"]),
        fixed=frozenset(context),
        held_bytes=before.total_bytes,
    )
    if job.get("plain"):
        from dataclasses import replace

        plan = replace(plan, weights="mapped")
    began = time.perf_counter()
    engine = LlamaEngine(text, tower, plan.context, plan=plan)
    report: dict[str, Any] = {"load_s": time.perf_counter() - began, "peaks": {}}
    report["peaks"]["load"] = measure_memory().peak_bytes
    n_prompt = job.get("prompt", 5)
    for at in range(0, n_prompt, engine.n_batch):
        engine.eval_tokens([1 + n % 500 for n in range(at, min(n_prompt, at + engine.n_batch))])
    for number in range(job["images"]):
        limits, most = engine.info.vision, engine.info.max_image_tokens
        pixels = read_pixels(job["screens"][number], limits, max_image_tokens=most)
        began = time.perf_counter()
        image = engine.encode_image(pixels.array, pixels.grid)
        report[f"encode_{number}_s"] = time.perf_counter() - began
        report["peaks"][f"encode_{number}"] = measure_memory().peak_bytes
        began = time.perf_counter()
        del pixels
        engine.eval_image(image)
        report[f"eval_image_{number}_s"] = time.perf_counter() - began
        report["image_tokens"] = image.n_tokens
        del image
        report[f"tokens_per_second_{number}"] = _generate(engine, SamplingParams(), job["tokens"])
    if not job["images"]:
        seconds = []
        for n in range(job["tokens"]):
            began = time.perf_counter()
            engine.eval_tokens([100 + n])
            seconds.append(time.perf_counter() - began)
        report["tokens_per_second"] = len(seconds) / sum(seconds)
        report["token_seconds"] = [round(s, 3) for s in seconds]
    usage = measure_memory()
    report |= {
        "peak_bytes": usage.peak_bytes,
        "anonymous_bytes": usage.anonymous_bytes,
        "mapped_bytes": usage.mapped_bytes,
        "planned_bytes": plan.peak_bytes,
        "planned_phases": plan.phase_bytes,
        "budget_bytes": plan.budget_bytes,
        "weights": plan.weights,
        "places": [len(getattr(plan.places, kind)) for kind in ("copied", "streamed", "yielding")],
        "tower": plan.tower,
        "streamed_bytes": plan.streamed_bytes,
        "n_batch": plan.context.n_batch,
        "type_k": plan.context.type_k,
    }
    return report


def _generate(engine: Any, sampling: Any, n_tokens: int) -> float:
    sampler = engine.open_sampler(sampling)
    began = time.perf_counter()
    for _ in range(n_tokens):
        engine.eval_tokens([sampler.sample()])
    sampler.close()
    return n_tokens / (time.perf_counter() - began)


# ---- around it


def run_child(job: dict[str, Any], group: Group | None = None) -> dict[str, Any]:
    """Run a job in a fresh process, inside a group where one is given."""
    job = {"images": 0, "tokens": 8, "context": {}, "budget": "4GB", **job}

    def enter() -> None:
        if group is not None:
            group.enter()

    with tempfile.TemporaryDirectory() as folder:
        job["screens"] = [str(draw_screen(Path(folder), n)) for n in range(job["images"])]
        process = subprocess.run(
            [sys.executable, __file__, "child", json.dumps(job)],
            capture_output=True,
            preexec_fn=enter,
            check=False,
        )
    if process.returncode:
        killed = " (killed)" if process.returncode == -9 else ""
        return {"failed": f"exit {process.returncode}{killed}: {process.stderr.decode()[-300:]}"}
    report: dict[str, Any] = json.loads(process.stdout)
    return report


def draw_screen(folder: Path, number: int) -> Path:
    """A screenshot's file: 1080x2400, RGBA as phones write it, with something to see."""
    from PIL import Image

    rows, columns = Image.linear_gradient("L").resize(SCREEN), Image.radial_gradient("L")
    bands = (rows, columns.resize(SCREEN), rows.rotate(180), Image.new("L", SCREEN, 255))
    path = folder / f"screen-{number}.png"
    Image.merge("RGBA", bands).rotate(180 * number).save(path)
    return path


class Group:
    """A memory control group, version 1 or 2, removed at the end."""

    def __init__(self, limit_bytes: int) -> None:
        first = Path("/sys/fs/cgroup/memory")
        self.version = 1 if first.is_dir() else 2
        self.path = (first if self.version == 1 else first.parent) / GROUP
        self.path.mkdir(exist_ok=True)
        limit = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        (self.path / limit).write_text(str(limit_bytes))
        if self.version == 2:
            with contextlib.suppress(OSError):
                (self.path / "memory.swap.max").write_text("0")

    def enter(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def figures(self) -> dict[str, Any]:
        """Peak usage and kills; the present file pages, charged to this group."""
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        if self.version == 1:
            kills = (self.path / "memory.oom_control").read_text()
            peak = int((self.path / "memory.max_usage_in_bytes").read_text())
            file_bytes = int(stat["cache"])
        else:
            kills = (self.path / "memory.events").read_text()
            peak = int((self.path / "memory.peak").read_text())
            file_bytes = int(stat["file"])
        n_kills = next(int(line.split()[1]) for line in kills.splitlines() if "oom_kill " in line)
        return {
            "version": self.version,
            "peak_usage_bytes": peak,
            "file_bytes_at_end": file_bytes,
            "kills": n_kills,
        }

    def close(self) -> None:
        self.path.rmdir()


@contextlib.contextmanager
def cold_group(limit_bytes: int) -> Iterator[Group]:
    drop_caches()
    group = Group(limit_bytes)
    try:
        yield group
    finally:
        group.close()


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def disk_bytes_per_second(path: Path) -> float:
    """Sequential read of a whole file, cold."""
    drop_caches()
    buffer = bytearray(8 << 20)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return path.stat().st_size / (time.perf_counter() - began)


# ---- commands


def estimates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """At least 24 combinations of size, type, context, image, levers."""
    from random_checkpoint import build

    from autoglm_gguf import convert

    rows: list[dict[str, Any]] = []
    for size in arguments.sizes.split(","):
        source = arguments.work / f"random-{size}"
        if not (source / "model.safetensors.index.json").exists():
            build(source, size)
        for outtype in arguments.outtypes.split(","):
            out = arguments.work / f"{size}-{outtype}"
            if not out.exists():
                convert(source, out, outtype, mmproj_outtype="q8_0", name="model")
            for job in combinations(out):
                rows.append(compare(size, outtype, job))
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def combinations(out: Path) -> list[dict[str, Any]]:
    weights = next(p.stat().st_size for p in out.glob("model-*.gguf"))
    base = {"model": str(out), "tokens": 8, "prompt": 1024}
    seen = {"images": 2, **base}
    return [
        {**base, "budget": "none", "context": {"n_ctx": 2048}},
        {**base, "budget": "none", "context": {"n_ctx": 8192, "n_batch": 256}},
        {**base, "budget": "none", "context": {"n_ctx": 8192, "type_k": "q8_0", "type_v": "q8_0"}},
        {**seen, "budget": "none", "context": {"n_ctx": 4096, "max_image_tokens": 512}},
        {**seen, "budget": "none", "context": {"n_ctx": 4096, "max_image_tokens": 1024}},
        {**seen, "budget": weights + 900_000_000, "context": {"max_image_tokens": 256}},
        {**base, "budget": int(0.6 * weights) + 150_000_000, "context": {"n_ctx": 2048}},
        {
            **seen,
            "budget": int(0.5 * weights) + 300_000_000,
            "context": {"n_ctx": 4096, "max_image_tokens": 256},
        },
    ]


def compare(size: str, outtype: str, job: dict[str, Any]) -> dict[str, Any]:
    report = run_child(job)
    row = {"size": size, "outtype": outtype, "budget": job["budget"], **job["context"]}
    row["images"] = job.get("images", 0)
    if "failed" in report:
        return {**row, **report}
    keys = ("weights", "tower", "places", "planned_bytes", "peak_bytes")
    row |= {key: report[key] for key in keys}
    row["error_percent"] = round(100 * (report["planned_bytes"] / report["peak_bytes"] - 1), 1)
    return row


def phone(arguments: argparse.Namespace) -> dict[str, Any]:
    job = {
        "model": str(arguments.pair),
        "images": 2,
        "tokens": arguments.tokens,
        "prompt": 200,
        "budget": arguments.budget,
        "context": {"n_ctx": 4096, "max_image_tokens": 1024},
    }
    if not arguments.cgroup:
        return run_child(job)
    from autoglm_gguf.units import parse_bytes

    with cold_group(parse_bytes(arguments.budget)) as group:
        report = run_child(job, group)
        return report | {"group": group.figures()}


def streaming(arguments: argparse.Namespace) -> dict[str, Any]:
    from autoglm_gguf.units import parse_bytes

    limit = parse_bytes(arguments.budget)
    planned = {"model": str(arguments.text), "budget": arguments.budget, "tokens": 12}
    plain = {"model": str(arguments.text), "budget": "none", "plain": True, "tokens": 6}
    runs: dict[str, list[Any]] = {
        name: [] for name in ("disk", "cold", "cold_plain", "cached", "cached_plain")
    }
    for _ in range(arguments.repeats):
        runs["disk"].append(disk_bytes_per_second(arguments.text))
        for name, job in (("cold", planned), ("cold_plain", plain)):
            with cold_group(limit) as group:
                report = run_child(job, group)
                runs[name].append(report | {"group": group.figures()})
            print(name, runs[name][-1], file=sys.stderr, flush=True)
        runs["disk"].append(disk_bytes_per_second(arguments.text))
        for name, job in (("cached", planned), ("cached_plain", plain)):
            runs[name].append(run_child(job))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    speeds = {
        name: [round(run["tokens_per_second"], 3) for run in found]
        for name, found in runs.items()
        if name != "disk"
    }
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    disk = statistics.median(runs["disk"])
    limit_tokens = disk / runs["cold"][0]["streamed_bytes"]
    return {
        "tokens_per_second": speeds,
        "disk_bytes_per_second": [round(speed) for speed in runs["disk"]],
        "cold_times_plain": round(middle["cold"] / middle["cold_plain"], 2),
        "cold_share_of_disk_limit": round(middle["cold"] / limit_tokens, 2),
        "cached_share_of_plain": round(middle["cached"] / middle["cached_plain"], 2),
        "runs": runs,
    }


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(child_run(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("estimates")
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--sizes", default="0.4b,1.7b")
    command.add_argument("--outtypes", default="q8_0,q4_0")
    command.set_defaults(run=estimates)
    command = commands.add_parser("phone")
    command.add_argument("--pair", type=Path, required=True, help="a directory with the GGUF pair")
    command.add_argument("--budget", default="4GB")
    command.add_argument("--tokens", type=int, default=64)
    command.add_argument("--cgroup", action="store_true")
    command.set_defaults(run=phone)
    command = commands.add_parser("streaming")
    command.add_argument("--text", type=Path, required=True)
    command.add_argument("--budget", default="4GB")
    command.add_argument("--repeats", type=int, default=3)
    command.set_defaults(run=streaming)
    arguments = parser.parse_args()
    began = time.strftime("%Y-%m-%d %H:%M")
    result = arguments.run(arguments)
    print(json.dumps({"began": began, "command": " ".join(sys.argv), "result": result}, indent=2))


if __name__ == "__main__":
    main()
