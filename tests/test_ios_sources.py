"""The Swift sources in examples/ios against the pinned llama.cpp and against our own constants.

Reads them as text, so it runs without Swift; examples/ios/check.sh compiles and runs them. A rename
in llama.cpp or in this package fails here, one line per name.
"""

from __future__ import annotations

import plistlib
import re
from pathlib import Path

import pytest
from gguf import GGUFValueType

from autoglm_gguf.actions import SYSTEM_PROMPT_EN, SYSTEM_PROMPT_ZH
from autoglm_gguf.gguf import describe, names
from autoglm_gguf.native.library import LLAMA_CPP_COMMIT, load_ggml, load_llama, load_mtmd

pytestmark = pytest.mark.native

FOLDER = Path(__file__).parents[1] / "examples" / "ios"
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "ios-macos.md"
MODEL, PROMPT, SCREENSHOT = (
    (FOLDER / f"{name}.swift").read_text("utf-8") for name in ("PhoneModel", "Prompt", "Screenshot")
)
STRUCTS = {
    "model": ("llama_model_params", load_llama),
    "context": ("llama_context_params", load_llama),
    "tower": ("mtmd_context_params", load_mtmd),
}


def found(pattern: str, source: str = MODEL) -> list[str]:
    """What a pattern's one group meets, each once."""
    return sorted(set(re.findall(pattern, source)))


# gguf_init_params is a struct that llama-cpp-python does not bind.
@pytest.mark.parametrize("name", found(r"\b((?:llama|mtmd|gguf)_(?!init_params)\w+)\("))
def test_function_that_swift_calls_exists(name: str) -> None:
    assert any(hasattr(load(), name) for load in (load_llama, load_mtmd, load_ggml))


@pytest.mark.parametrize("name", found(r"\b((?:LLAMA|MTMD)_\w+)"))
def test_constant_that_swift_names_exists(name: str) -> None:
    assert any(hasattr(load(), name) for load in (load_llama, load_mtmd))


@pytest.mark.parametrize("name", found(r"GGUF_TYPE_(\w+)"))
def test_gguf_type_that_swift_names_exists(name: str) -> None:
    assert name in GGUFValueType.__members__


@pytest.mark.parametrize("struct", STRUCTS)
def test_field_that_swift_sets_exists(struct: str) -> None:
    name, load = STRUCTS[struct]
    fields = {field[0] for field in getattr(load(), name)._fields_}
    written = set(found(rf"\b{struct}Params\.(\w+)"))
    assert written and written <= fields


def test_swift_knows_our_special_tokens() -> None:
    stop, tags = re.findall(r"static let (?:stop|tags) = \[(.*)\]", PROMPT)
    assert re.findall('"(.*?)"', stop) == list(names.STOP_TOKENS)
    assert re.findall('"(.*?)"', tags) == ["<think>", "</think>", "<answer>", "</answer>"]
    begin, end = re.findall(r'static let \w+OfImage = "(.*)"', PROMPT)
    assert begin + names.IMAGE_TOKEN + end in describe.GLM_TEMPLATE
    assert describe.GLM_TEMPLATE.startswith(found(r'segments = \["(.*)"\]', PROMPT)[0])


@pytest.mark.parametrize("prompt", [SYSTEM_PROMPT_EN, SYSTEM_PROMPT_ZH])
def test_swift_has_our_system_prompts(prompt: str) -> None:
    source = re.sub(r'"\s*\+ "', "", PROMPT)  # one literal again where Swift's was cut
    for line in prompt.splitlines():
        assert line in source


def test_swift_knows_our_image_limits_and_keys() -> None:
    assert found(r"var (?:min|max)Pixels = ([\d_]+)", SCREENSHOT) == ["12_544", "47_040_000"]
    assert (describe.GLM_MIN_PIXELS, describe.GLM_MAX_PIXELS) == (12_544, 47_040_000)
    assert f"var mergeSize = {describe.GLM_MERGE_SIZE}\n" in SCREENSHOT
    keys = {names.PATCH_SIZE, names.MERGE_SIZE, names.MIN_PIXELS, names.MAX_PIXELS}
    assert set(found(r'number\("(.*?)"\)')) == keys


def test_sources_and_guide_name_the_pinned_commit() -> None:
    assert LLAMA_CPP_COMMIT in GUIDE.read_text("utf-8")
    assert f"commit {LLAMA_CPP_COMMIT[:9]})" in MODEL


def test_entitlements_raise_the_memory_limit() -> None:
    granted = plistlib.loads((FOLDER / "AutoGLMPhone.entitlements").read_bytes())
    assert granted["com.apple.developer.kernel.increased-memory-limit"] is True
