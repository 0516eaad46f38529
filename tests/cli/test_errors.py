"""Error classes to exit codes and text."""

from __future__ import annotations

import pytest

from autoglm_gguf import AutoGLMError, ContextFullError, errors
from autoglm_gguf.cli.errors import EXIT_CODES, report


def family(base: type[AutoGLMError]) -> list[type[AutoGLMError]]:
    return [base, *(cls for sub in base.__subclasses__() for cls in family(sub))]


@pytest.mark.parametrize("cls", family(AutoGLMError))
def test_every_error_of_the_package_exits_with_1(
    cls: type[AutoGLMError], capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {
        ContextFullError: {"n_prompt": 9, "n_ctx": 8},
        errors.DoesNotFitError: {"budget_bytes": 1, "required_bytes": 2},
        errors.ActionParseError: {"text": "x"},
    }
    error = cls("thing: wrong", hint="do this", **extra.get(cls, {}))
    assert report(error) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: thing: wrong\nhint: do this\n"


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("n_ctx 1: too small"), 2, "error: n_ctx 1: too small\n"),
        (TypeError("no such option"), 2, "error: no such option\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (AutoGLMError("no hint"), 1, "error: no hint\n"),
    ],
)
def test_report_prints_to_stderr_and_returns_the_code(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("error", [ZeroDivisionError("bug"), SystemExit(3)])
def test_report_lets_bugs_keep_their_trace(error: BaseException) -> None:
    with pytest.raises(type(error)):
        report(error)


def test_exit_codes_are_the_documented_ones() -> None:
    assert set(EXIT_CODES.values()) == {0, 1, 2, 130}
