"""Check what a wheel and an sdist hold: ``python scripts/check_dist.py dist``.

``--version`` tells the version that they should have.

The wheel: every tracked file of the package, its marker of types and the server's page among them,
and the embedded checkpoint without the scripts that trained it; nothing else. The sdist: every
tracked file but vendor/, so that it builds and tests as a clone does. Needs git.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
PACKAGE = "autoglm_gguf"
TINY = ROOT / "models" / "autoglm-tiny"
MAX_WHEEL_BYTES = 20_000_000  # of 14.8 MB of weights; PyPI takes 100 MB


def read_version() -> str:
    """The version, from the one place where it stands."""
    text = (ROOT / "src" / PACKAGE / "__init__.py").read_text("utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.M)
    if found is None:
        raise SystemExit("error: no __version__ in the package")
    return found[1]


def check_wheel(path: Path, tracked: set[str]) -> list[str]:
    """What is wrong with a wheel, a line each."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    info = f"{PACKAGE}-{read_version()}.dist-info/"
    models = f"{PACKAGE}/models/{TINY.name}/"
    wanted = {name.removeprefix("src/") for name in tracked if name.startswith(f"src/{PACKAGE}/")}
    wanted |= {
        models + PurePosixPath(name).name
        for name in tracked
        if name.startswith(f"models/{TINY.name}/") and not name.endswith(".py")
    }
    found = {name for name in names if not name.startswith(info)}
    problems = [f"{path.name}: lacks {name}" for name in sorted(wanted - found)]
    problems += [f"{path.name}: should not hold {name}" for name in sorted(found - wanted)]
    for name in ("METADATA", "entry_points.txt", "licenses/LICENSE"):
        if info + name not in names:
            problems.append(f"{path.name}: lacks {info}{name}")
    if path.stat().st_size > MAX_WHEEL_BYTES:
        problems.append(f"{path.name}: {path.stat().st_size} bytes, {MAX_WHEEL_BYTES} at most")
    return problems


def check_sdist(path: Path, tracked: set[str]) -> list[str]:
    """What is wrong with an sdist, a line each."""
    with tarfile.open(path) as archive:
        names = {member.name for member in archive.getmembers() if member.isfile()}
    found = {name.split("/", 1)[1] for name in names}
    wanted = {name for name in tracked if not name.startswith("vendor/")}
    problems = [f"{path.name}: lacks {name}" for name in sorted(wanted - found)]
    extra = found - tracked - {"PKG-INFO"}
    return problems + [f"{path.name}: should not hold {name}" for name in sorted(extra)]


def main() -> None:
    """Check the one wheel and the one sdist of a folder; or tell the version."""
    if sys.argv[1] == "--version":
        print(read_version())
        return
    folder = Path(sys.argv[1])
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = {name for name in listed.stdout.split("\0") if name}
    stem = f"{PACKAGE}-{read_version()}"
    wheel, sdist = folder / f"{stem}-py3-none-any.whl", folder / f"{stem}.tar.gz"
    problems = [f"{path.name}: not built" for path in (wheel, sdist) if not path.exists()]
    if not problems:
        problems = check_wheel(wheel, tracked) + check_sdist(sdist, tracked)
    if problems:
        raise SystemExit("\n".join(f"error: {problem}" for problem in problems))
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in (wheel, sdist))
    print(f"contents as they should be: {sizes}")


if __name__ == "__main__":
    main()
