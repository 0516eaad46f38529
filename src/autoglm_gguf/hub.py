"""A path becomes the files of a model. Downloads nothing yet; a repo id is told so.

Knows the directory layouts of GGUF pairs and where the embedded checkpoint and the cache lie.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from autoglm_gguf.errors import GGUFError
from autoglm_gguf.gguf.describe import find_mmproj
from autoglm_gguf.gguf.names import MMPROJ_PREFIX

CACHE_VARIABLE = "AUTOGLM_GGUF_CACHE"
EMBEDDED = "autoglm-tiny"


def resolve_pair(
    model: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None = "auto"
) -> tuple[Path, Path | None]:
    """Find the text GGUF and its mmproj.

    Args:
        model: A text GGUF, or a directory that holds exactly one.
        mmproj: A file; ``"auto"`` looks beside the text GGUF; None for text only.

    Raises:
        GGUFError: Nothing there, or several candidates.
    """
    path = Path(model)
    text = _only_text(path) if path.is_dir() else path
    if not text.exists():
        raise GGUFError(
            f"{model}: no such file or directory",
            hint="give a GGUF file; make one with: autoglm-gguf convert CHECKPOINT --outdir DIR",
        )
    if mmproj is None:
        return text, None
    if mmproj == "auto":
        return text, find_mmproj(text)
    return text, Path(mmproj)


def _only_text(directory: Path) -> Path:
    found = [p for p in sorted(directory.glob("*.gguf")) if not p.name.startswith(MMPROJ_PREFIX)]
    if len(found) == 1:
        return found[0]
    if found:
        listing = ", ".join(p.name for p in found)
        raise GGUFError(f"{directory}: several models ({listing})", hint="give one of these files")
    if (directory / "config.json").exists():
        raise GGUFError(
            f"{directory}: a checkpoint, not a GGUF model",
            hint=f"autoglm-gguf convert {directory} --outdir models",
        )
    raise GGUFError(f"{directory}: no GGUF model in this directory", hint="check the path")


def embedded_checkpoint() -> Path:
    """The directory of autoglm-tiny: inside an installed package, or in the source tree.

    Raises:
        GGUFError: It is in neither place.
    """
    package = Path(__file__).parent
    for place in (package / "models" / EMBEDDED, package.parents[1] / "models" / EMBEDDED):
        if (place / "config.json").exists():
            return place
    raise GGUFError(
        f"{EMBEDDED}: the embedded checkpoint is not in this installation",
        hint="reinstall autoglm-gguf, or give a MODEL",
    )


def cache_directory() -> Path:
    """Where converted files may be kept: the system's cache directory for this user.

    ``AUTOGLM_GGUF_CACHE`` names another.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "autoglm-gguf"
    if os.name == "nt":
        local = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        return Path(local) / "autoglm-gguf"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoglm-gguf"
