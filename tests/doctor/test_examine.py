"""All checks together: one that fails costs its own line, and says what to do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autoglm_gguf.doctor import examine
from autoglm_gguf.doctor.finding import Finding


def test_check_that_may_not_look_says_so_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused() -> Iterator[Finding]:
        raise PermissionError(13, "Permission denied", "/secret")
        yield

    seen = Finding("phone", "ok", "ready")
    for name in ("check_installation", "check_library"):
        monkeypatch.setattr(examine, name, lambda: iter(()))
    refused.__name__ = "check_machine"
    monkeypatch.setattr(examine, "check_machine", refused)
    monkeypatch.setattr(examine, "check_phones", lambda: iter((seen,)))
    machine, phone = examine.examine()
    assert (machine.name, machine.state, phone) == ("machine", "note", seen)
    assert "/secret" in machine.text and machine.hint
