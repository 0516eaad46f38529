"""Whether a result can be written, asked before a model is run for it.

Knows paths and room on a disk; writes nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from autoglm_gguf.errors import EvaluationError
from autoglm_gguf.units import format_bytes


def check_outfile(
    path: Path,
    *inputs: str | os.PathLike[str] | None,
    n_bytes: int = 0,
    smaller: str = "free some space",
) -> None:
    """Refuse a file that could not be written, or that would take the place of what is read.

    Args:
        path: The file.
        *inputs: Files that the work reads; None are none.
        n_bytes: What it will take.
        smaller: What to do where that is not free.

    Raises:
        EvaluationError: A directory, one of the inputs, in a folder that is not there or takes no
            files, or on a disk that is too small.
    """
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise EvaluationError(
            f"{path}: cannot be written (no such folder, not writable, or a directory itself)",
            hint="give another name, or another folder",
        )
    for given in inputs:
        if given is not None and path.exists() and Path(given).exists() and path.samefile(given):
            raise EvaluationError(
                f"{path}: is read, and would be overwritten", hint="give another name"
            )
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise EvaluationError(
            f"{path}: disk too small ({format_bytes(free)} free, needs {format_bytes(n_bytes)})",
            hint=f"{smaller}, or use another disk",
        )
