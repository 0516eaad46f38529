"""Every check, in the order in which their findings help.

Knows the order and nothing else. Each check works where whatever it looks at is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.doctor.installation import check_installation
from autoglm_gguf.doctor.library import check_library
from autoglm_gguf.doctor.machine import check_machine
from autoglm_gguf.doctor.phones import check_phones


def examine() -> Iterator[Finding]:
    """Look at the installation, llama.cpp, the machine and the phones; a second or two.

    Yields:
        Findings as they are made. Nothing is changed: an adb server that had to be started is
        stopped again.
    """
    for check in (check_installation, check_library, check_machine, check_phones):
        try:
            yield from check()
        except OSError as error:  # such as a folder that may not be read
            name = check.__name__.removeprefix("check_")
            hint = "check the rights to that file, then try again"
            yield Finding(name, "note", f"could not be looked at ({error})", hint)
