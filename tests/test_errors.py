"""The error family: one root, a message, a hint, and facts as attributes."""

from __future__ import annotations

import re

import pytest

from autoglm_gguf import (
    ActionParseError,
    AutoGLMError,
    ContextFullError,
    DoesNotFitError,
    GGUFError,
    errors,
)

FAMILY = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, AutoGLMError)]


def test_error_shows_its_hint_on_a_line_of_its_own() -> None:
    error = GGUFError("m.gguf: broken", hint="convert again")
    assert (error.message, error.hint) == ("m.gguf: broken", "convert again")
    assert str(error) == "m.gguf: broken\nhint: convert again"


def test_error_without_a_hint_is_its_message() -> None:
    assert str(GGUFError("m.gguf: broken")) == "m.gguf: broken"


def test_errors_carry_facts() -> None:
    full = ContextFullError("full", n_prompt=9, n_ctx=8, hint="h")
    assert (full.n_prompt, full.n_ctx, full.hint) == (9, 8, "h")
    assert ActionParseError("none", text="said").text == "said"
    tight = DoesNotFitError("large", budget_bytes=None, required_bytes=9)
    assert (tight.budget_bytes, tight.required_bytes) == (None, 9)


@pytest.mark.parametrize("cls", FAMILY)
def test_error_is_exported_and_documented(cls: type[AutoGLMError]) -> None:
    import autoglm_gguf

    assert cls.__name__ in autoglm_gguf.__all__
    assert cls.__doc__


def test_tree_in_the_docstring_is_the_classes_tree() -> None:
    drawn: dict[str, str] = {}
    path = ["AutoGLMError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"(.*[├└]── )(\w+)", line)
        if match:
            depth = (len(match.group(1)) - 4) // 4
            del path[depth:]
            drawn[match.group(2)] = path[-1]
            path.append(match.group(2))
    expected = {cls.__name__: cls.__base__.__name__ for cls in FAMILY if cls is not AutoGLMError}
    assert drawn == expected
