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
Linux only. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import frame
from agent_steps import make_pair
from frame import Measure, Row

SCREEN = (1080, 2400)
GROUP = "autoglm-bench"
CHILD = Path(__file__).with_name("memory_child.py")


# ---- the measured process


def run_child(job: dict[str, Any], group: Group | None = None) -> dict[str, Any]:
    """Run a job in a fresh process, inside a group where one is given."""
    job = {"images": 0, "tokens": 8, "context": {}, "budget": "4GB", **job}

    def enter() -> None:
        if group is not None:
            group.enter()

    with tempfile.TemporaryDirectory() as folder:
        job["screens"] = [str(draw_screen(Path(folder), n)) for n in range(job["images"])]
        process = subprocess.run(
            [sys.executable, str(CHILD), json.dumps(job)],
            capture_output=True,
            preexec_fn=enter,
            check=False,
        )
    if process.returncode:
        killed = " (killed)" if process.returncode == -9 else ""
        why = f"exit status {process.returncode}{killed}: {process.stderr.decode()[-300:]}"
        raise frame.RowError(why)
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


def estimates(arguments: argparse.Namespace) -> None:
    """At least 24 combinations of size, type, context, image, levers."""
    measures = [
        Measure("planned_bytes", "planned", "B"),
        Measure("peak_bytes", "measured", "B"),
        Measure("error_percent", "error, %"),
    ]
    sizes, outtypes = arguments.sizes.split(","), arguments.outtypes.split(",")
    name = "-".join(["memory-estimates", *sizes])
    record = frame.begin(name, f"Estimates, {' and '.join(sizes)}", measures, {}, {})
    with frame.until_interrupted(record):
        for size, outtype in itertools.product(sizes, outtypes):
            text, _ = make_pair(arguments.work, size, outtype)
            for job in combinations(text.parent):
                record.rows.append(compare(size, outtype, job))
                frame.keeper(record, arguments.json)()
    frame.finish(record, arguments.json)


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


def compare(size: str, outtype: str, job: dict[str, Any]) -> Row:
    """One combination as a row."""
    budget = job["budget"]
    given = ", ".join(f"{key} {value}" for key, value in job["context"].items())
    told = budget if isinstance(budget, str) else frame.figure(budget, "B")
    label = f"{size}, {outtype}, {given}, images {job.get('images', 0)}, budget {told}"
    row = Row(label, label)
    report = frame.attempt(row, lambda: run_child(job))
    if report is not None:
        error = 100 * (report["planned_bytes"] / report["peak_bytes"] - 1)
        figures = {key: report[key] for key in ("planned_bytes", "peak_bytes")}
        row.turns.append({**figures, "error_percent": round(error, 1)})
        row.facts = {key: report[key] for key in ("weights", "tower", "places")}
        frame.tell(f"{label}: {report['weights']}, {error:+.1f} %")
    return row


def phone(arguments: argparse.Namespace) -> None:
    """Two screenshots in one session."""
    job = {
        "model": str(arguments.pair),
        "images": 2,
        "tokens": arguments.tokens,
        "prompt": 200,
        "budget": arguments.budget,
        "context": {"n_ctx": 4096, "max_image_tokens": 1024},
    }
    measures = [
        Measure("planned_bytes", "planned", "B"),
        Measure("peak_bytes", "measured", "B"),
        Measure("encode_0_s", "encode", "s"),
        Measure("eval_image_0_s", "prefill of the image", "s"),
        Measure("tokens_per_second_0", "decode", "tok/s"),
        Measure("tokens_per_second_1", "decode, second image", "tok/s"),
    ]
    where = "in a memory control group of the budget's size" if arguments.cgroup else "unbounded"
    settings = {"budget": arguments.budget, "where": where, **job["context"]}
    text = next(path.name for path in arguments.pair.glob("*.gguf") if "mmproj" not in path.name)
    name = f"memory-phone-{Path(text).stem}"
    record = frame.begin(name, "Memory of a phone's session", measures, {"ours": text}, settings)

    def run(_: int) -> dict[str, float]:
        report = measure()
        row = record.row("ours")
        row.facts = {key: value for key, value in report.items() if not isinstance(value, float)}
        return {m.key: report[m.key] for m in measures}

    def measure() -> dict[str, Any]:
        if not arguments.cgroup:
            return run_child(job)
        from autoglm_gguf.units import parse_bytes

        with cold_group(parse_bytes(arguments.budget)) as group:
            report = run_child(job, group)
            return report | {"group": group.figures()}

    frame.run_turns(record, {"ours": run}, arguments)


def streaming(arguments: argparse.Namespace) -> None:
    """Tokens per second of the planned run and of plain mmap."""
    from autoglm_gguf.units import parse_bytes

    limit = parse_bytes(arguments.budget)
    jobs: dict[str, dict[str, Any]] = {
        "ours": {"budget": arguments.budget, "tokens": 12},
        "plain": {"budget": "none", "plain": True, "tokens": 6},
    }
    measures = [
        Measure("cold", "in the group, cold", "tok/s", more=True),
        Measure("cached", "outside, in the page cache", "tok/s", more=True),
        Measure("cold_peak_bytes", "peak in the group", "B"),
        Measure("cached_peak_bytes", "peak outside", "B"),
        Measure("disk_bytes_per_second", "the disk's own, a second", "B"),
    ]
    labels = {"ours": "streamed, as planned", "plain": "plain mmap"}
    settings = {"file": arguments.text.name, "budget": arguments.budget}
    record = frame.begin(
        "memory-streaming", "Streamed weights against plain mmap", measures, labels, settings
    )

    def runner(name: str) -> Callable[[int], dict[str, float]]:
        job = {"model": str(arguments.text), **jobs[name]}

        def run(_: int) -> dict[str, float]:
            speed = disk_bytes_per_second(arguments.text)
            with cold_group(limit) as group:
                cold = run_child(job, group)
                record.row(name).facts["group"] = group.figures()
            disk_bytes_per_second(arguments.text)  # puts the file into the page cache
            cached = run_child(job)
            if cached["streamed_bytes"]:
                record.row(name).facts["streamed_bytes"] = cached["streamed_bytes"]
            return {
                "cold": cold["tokens_per_second"],
                "cached": cached["tokens_per_second"],
                "cold_peak_bytes": cold["peak_bytes"],
                "cached_peak_bytes": cached["peak_bytes"],
                "disk_bytes_per_second": round(speed),
            }

        return run

    frame.run_turns(record, {name: runner(name) for name in labels}, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("estimates")
    frame.add_options(command, repeats=1)
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--sizes", default="0.4b,1.7b")
    command.add_argument("--outtypes", default="q8_0,q4_0")
    command.set_defaults(run=estimates)
    command = commands.add_parser("phone")
    frame.add_options(command, repeats=1)
    command.add_argument("--pair", type=Path, required=True, help="a directory with the GGUF pair")
    command.add_argument("--budget", default="4GB")
    command.add_argument("--tokens", type=int, default=64)
    command.add_argument("--cgroup", action="store_true")
    command.set_defaults(run=phone)
    command = commands.add_parser("streaming")
    frame.add_options(command, repeats=3)
    command.add_argument("--text", type=Path, required=True)
    command.add_argument("--budget", default="4GB")
    command.set_defaults(run=streaming)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
