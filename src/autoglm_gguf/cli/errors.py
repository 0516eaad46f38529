"""Error class to exit code and text, in one table."""

from __future__ import annotations

import sys

from autoglm_gguf.cli import output
from autoglm_gguf.errors import AutoGLMError

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
EXIT_CODES: dict[type[BaseException], int] = {
    AutoGLMError: EXIT_ERROR,
    ValueError: EXIT_USAGE,
    TypeError: EXIT_USAGE,
    KeyboardInterrupt: EXIT_INTERRUPTED,
    BrokenPipeError: EXIT_OK,
    ImportError: EXIT_ERROR,  # a package that this one needs
    OSError: EXIT_ERROR,  # a full disk behind stdout, a name that is too long
}


def report(error: BaseException) -> int:
    """Tell the user about an error; returns the exit code.

    Raises:
        BaseException: The error itself, if it is not one the table knows: a bug keeps its trace.
    """
    code = next((c for kind, c in EXIT_CODES.items() if isinstance(error, kind)), None)
    if code is None or (isinstance(error, ImportError) and _is_ours(error.name)):
        raise error
    if isinstance(error, KeyboardInterrupt):
        output.note("interrupted")
    elif isinstance(error, BrokenPipeError):
        sys.stdout = None  # the reader left; nothing more to flush
    elif isinstance(error, AutoGLMError):
        output.note(f"error: {error.message}")
        if error.hint:
            output.note(f"hint: {error.hint}")
    else:
        output.note(f"error: {error}")
        if isinstance(error, ImportError):
            output.note("hint: autoglm-gguf doctor")
    return code


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "autoglm_gguf"
