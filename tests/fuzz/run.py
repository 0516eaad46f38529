"""Coverage-guided fuzzing of the targets with atheris; what is found is run again without it.

    python tests/fuzz/run.py [TARGET …] [--seconds 180] [--out out/fuzz]

Inputs that reach new code are kept in OUT/TARGET/corpus, where a later run goes on; inputs that
break something in OUT/TARGET/found. A table goes to stdout and to OUT/fuzz.md. Exit code 1 when a
fault repeats without instrumentation. Needs the extra ``fuzz``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
NAMES = ("actions", "gguf", "safetensors", "requests")
_HANG_S = 60  # of wall clock, for what never comes back; a second of CPU is held by the target
_MOST_MIB = 2048
_GRACE_S = 300
_MOST_FOUND = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="*", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--seconds", type=int, default=180, help="for each target")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fuzz")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer; 0 takes a fresh one")
    parser.add_argument("--part", choices=("fuzz", "replay"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.target) - set(NAMES):
        parser.error(f"unknown target: {', '.join(sorted(unknown))}")
    names = options.target or list(NAMES)
    if options.part == "fuzz":
        fuzz(names[0], options.seconds, options.out / names[0], options.seed)
    elif options.part == "replay":
        print(json.dumps(replay(names[0], options.out / names[0])))
        return 0
    rows = [run_target(name, options) for name in names]
    table = tabulate(rows, options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fuzz.md").write_text(table, "utf-8")
    (options.out / "fuzz.json").write_text(json.dumps(rows, indent=1), "utf-8")
    print(table, end="")
    return 1 if any(row["faults"] for row in rows) else 0


def run_target(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fuzz one target in a process of its own, then replay in another; the row of the table."""
    print(f"{name}: fuzzing for {options.seconds} s", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, name, "--out", str(options.out), "--part"]
    done = subprocess.run(
        [*command, "fuzz", "--seconds", str(options.seconds), "--seed", str(options.seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=options.seconds + _GRACE_S,
    )
    if not (options.out / name).exists():
        raise RuntimeError(f"{name}: the fuzzer did not begin:\n{done.stdout}")
    (options.out / name / "log.txt").write_text(done.stdout, "utf-8")
    runs = re.search(r"number_of_executed_units: (\d+)", done.stdout)
    if runs is None:  # the fuzzer ended it: a hang, too much memory, or an abort in native code
        print(done.stdout[-2000:], file=sys.stderr)
    replayed = subprocess.run([*command, "replay"], stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(replayed.stdout)
    counted = re.findall(r"cov: (\d+) ft: (\d+)", done.stdout) or [("0", "0")]
    ended = [] if runs else [f"the fuzzer ended with code {done.returncode}, see log.txt"]
    return {
        "target": name,
        "runs": int(runs[1]) if runs else 0,
        "edges": int(counted[-1][0]),
        **row,
        "faults": row["faults"] + ended,
    }


def fuzz(name: str, seconds: int, folder: Path, seed: int) -> None:
    """Drive one target until the time is over; never returns."""
    import atheris

    sys.path.insert(0, str(TESTS))
    atheris.enabled_hooks.add("str")  # not "RegEx": its patterns take no position to begin at
    with atheris.instrument_imports(include=["autoglm_gguf"]):
        from fuzz import targets

    target = targets.TARGETS[name]
    corpus, found = folder / "corpus", folder / "found"
    for path in (corpus, found):
        path.mkdir(parents=True, exist_ok=True)
    for data in target.seeds():
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    words = folder / "words.dict"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words), "ascii")
    seen: set[str] = set()

    def one(data: bytes) -> None:
        # A fault is noted and the search goes on: one fault must not hide the next.
        try:
            targets.run_checked(target, data)
        except Exception as error:
            if place_of(error) not in seen and len(seen) < _MOST_FOUND:
                seen.add(place_of(error))
                (found / hashlib.sha1(data).hexdigest()).write_bytes(data)
                print(f"FOUND {place_of(error)}: {error!r}"[:500], file=sys.stderr, flush=True)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        changed = None
        if target.mutate is not None and chance.random() < 0.7:
            changed = target.mutate(bytes(data), chance)
        return (atheris.Mutate(data, most) if changed is None else changed)[:most]

    arguments = [
        *(sys.argv[0], str(corpus), f"-max_total_time={seconds}", f"-max_len={target.most_bytes}"),
        *(f"-dict={words}", f"-timeout={_HANG_S}", f"-rss_limit_mb={_MOST_MIB}"),
        *(f"-artifact_prefix={found}/", "-print_final_stats=1", f"-seed={seed}", "-len_control=20"),
    ]
    more = {"custom_mutator": mutate} if target.mutate is not None else {}
    atheris.Setup(arguments, one, **more)
    atheris.Fuzz()


def replay(name: str, folder: Path) -> dict[str, Any]:
    """Run what was kept and what was found without the fuzzer; count the lines reached."""
    import coverage

    sys.path.insert(0, str(TESTS))
    meter = coverage.Coverage(branch=True, data_file=None, source=[str(ROOT / "src")])
    meter.start()
    from fuzz import targets

    target = targets.TARGETS[name]
    took = n_kept = 0
    for path in sorted((folder / "corpus").iterdir()):
        n_kept += 1
        try:
            took += target.run(path.read_bytes())
        except Exception:
            pass  # a fault that lies in found/ too
    meter.stop()
    faults = {}
    for path in sorted((folder / "found").iterdir()):
        try:
            targets.run_checked(target, path.read_bytes())
        except Exception as error:
            faults[place_of(error)] = f"{place_of(error)}: {error!r}, found/{path.name}"[:300]
    files = [str(ROOT / "src" / "autoglm_gguf" / file) for file in target.covers]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as told:
        meter.json_report(morfs=files, outfile=told.name)
        totals = json.load(told)["totals"]
    return {
        "kept": n_kept,
        "taken": took,
        "lines_percent": round(100 * totals["covered_lines"] / totals["num_statements"], 1),
        "branches_percent": round(100 * totals["covered_branches"] / totals["num_branches"], 1),
        "faults": list(faults.values()),
    }


def place_of(error: Exception) -> str:
    """Where an error came from: its class, and the last line of ours."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "autoglm_gguf" in frame.filename or "targets.py" in frame.filename
    ]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}"


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def tabulate(rows: list[dict[str, Any]], seconds: int) -> str:
    """The rows as a Markdown table."""
    head = ("target", "runs", "edges", "kept inputs", "taken", "lines", "branches", "faults")
    lines = [f"{seconds} s for each target.", "", f"| {' | '.join(head)} |"]
    lines.append("| --- " + "| ---: " * (len(head) - 1) + "|")
    for row in rows:
        cells = (
            *(row["target"], f"{row['runs']:,}", row["edges"], row["kept"], row["taken"]),
            *(f"{row['lines_percent']} %", f"{row['branches_percent']} %", len(row["faults"])),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for row in rows:
        lines += [f"\n{row['target']}: {fault}" for fault in row["faults"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
