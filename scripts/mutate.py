"""Mutation testing of one module with mutmut: which small faults its tests would not see.

    python scripts/mutate.py MODULE [--tests PATH …] [--markers WORDS] [--most N] [--jobs N]

MODULE is a file under src/autoglm_gguf, such as ``memory/estimate.py``. Its tests are those that
mirror it. The sources are copied to OUT/MODULE and mutated there; with ``--most``, that many
mutants are run, taken evenly over the module. The survivors are printed as diffs, and the score at
the end. Functions are mutated; constants of a module are not. Needs the extra ``mutate``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src") / "autoglm_gguf"
# mutmut's exit codes; what ended the tests, or held them up, was seen as well.
_SURVIVED, _UNTESTED = 0, (5, 33)
_COPIED = ("src", "tests", "README.md")
_LINKED = ("benchmarks", "docs", "examples", "models", "scripts")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module", help="under src/autoglm_gguf, such as memory/estimate.py")
    parser.add_argument("--tests", nargs="*", default=[], help="beside those that mirror it")
    parser.add_argument("--markers", default="not slow", help="of tests; default: %(default)s")
    parser.add_argument("--most", type=int, help="mutants to run; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "mutate")
    options = parser.parse_args()
    module = Path(options.module.removeprefix(f"{PACKAGE}/"))
    if not (ROOT / PACKAGE / module).is_file():
        parser.error(f"{options.module}: no file of {PACKAGE}")
    mirror = Path("tests") / module.parent / f"test_{module.name}"
    tests = [str(path) for path in (mirror, *options.tests) if (ROOT / path).exists()]
    if not tests:
        parser.error(f"{mirror}: no such tests; name some with --tests")
    began = time.monotonic()
    folder = prepare(options.out / module.with_suffix(""), module, tests, options.markers)
    names = mutants_of(folder, module, options.jobs)
    chosen = names if options.most is None else evenly(names, options.most)
    print(f"{module}: {len(chosen)} of {len(names)} mutants", file=sys.stderr, flush=True)
    run_mutmut(folder, *chosen, jobs=options.jobs)
    codes = exit_codes(folder, module)
    survivors = [name for name in chosen if codes[name] == _SURVIVED]
    for name in survivors:
        print(run_mutmut(folder, name, verb="show"))
    told = Counter(_word(codes[name]) for name in chosen)
    score = 100 * told["killed"] / len(chosen)
    row = (module, len(names), len(chosen), told["killed"], told["survived"], told["untested"])
    print("| module | mutants | run | killed | survived | no test | score | seconds |")
    print("| --- " + "| ---: " * 7 + "|")
    spent = time.monotonic() - began
    print(f"| {' | '.join(map(str, row))} | {score:.1f} % | {spent:.0f} |")
    return 0


def prepare(folder: Path, module: Path, tests: list[str], markers: str) -> Path:
    """A fresh copy of what is needed, with mutmut's settings."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _COPIED:
        source = ROOT / name
        leave = shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=leave)
        else:
            shutil.copy(source, folder)
    (folder / "mutants").mkdir()
    for name in _LINKED:
        (folder / "mutants" / name).symlink_to(ROOT / name)
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    begin = settings.index("[tool.pytest.ini_options]")
    settings = settings[begin : settings.index("\n[", begin)]
    words = {
        "source_paths": ["src"],
        "only_mutate": [str(PACKAGE / module)],
        "pytest_add_cli_args_test_selection": tests,
        # The order is fixed: a mutant is run with the tests that were seen to reach it.
        "pytest_add_cli_args": ["-p", "no:randomly", "-p", "no:cacheprovider", "-m", markers],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in words.items()]
    (folder / "pyproject.toml").write_text(
        "\n".join(["[tool.mutmut]", *lines, "", settings, ""]), "utf-8"
    )
    return folder


def mutants_of(folder: Path, module: Path, jobs: int) -> list[str]:
    """All mutants' names: made, and the tests run once without any."""
    told = run_mutmut(folder, "none.of.these", jobs=jobs)
    if "nothing matches" not in told:
        raise SystemExit(f"error: mutmut could not begin\n{told[-4000:]}")
    return list(exit_codes(folder, module))


def exit_codes(folder: Path, module: Path) -> dict[str, int | None]:
    """Mutant to the code its tests ended with; None where it has not been run."""
    meta = folder / "mutants" / PACKAGE / module.with_name(module.name + ".meta")
    codes: dict[str, int | None] = json.loads(meta.read_text("utf-8"))["exit_code_by_key"]
    return codes


def run_mutmut(folder: Path, *names: str, jobs: int | None = None, verb: str = "run") -> str:
    """What mutmut says."""
    command = [sys.executable, "-m", "mutmut", verb, *names]
    if jobs is not None:
        command += ["--max-children", str(jobs)]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.stdout


def evenly(names: list[str], most: int) -> list[str]:
    """So many of the names, with equal steps between them."""
    n = min(most, len(names))
    return [names[i * len(names) // n] for i in range(n)]


def _word(code: int | None) -> str:
    if code is None:
        return "not run"
    if code == _SURVIVED:
        return "survived"
    return "untested" if code in _UNTESTED else "killed"


if __name__ == "__main__":
    sys.exit(main())
