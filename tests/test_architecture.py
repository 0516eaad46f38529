"""The shape of the package: who may import whom, what is public, and what an import costs."""

from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import autoglm_gguf

SOURCE = Path(autoglm_gguf.__file__).parent
# From the top down; a module imports its own group and lower lines only.
LEVELS = (
    ("chat", "__main__"),
    ("cli",),
    ("server",),
    ("hybrid",),
    ("evaluate", "bench", "doctor"),
    ("session", "embedded"),
    ("conversation",),
    ("preparation",),
    ("generation", "saved_session"),
    ("drafting",),
    ("conversion", "engine"),
    ("memory", "sampling", "lookup", "annotate"),
    ("hub",),
    ("hub_client", "checkpoint", "prompt", "history", "vision", "actions"),
    ("stream", "devices", "logprobs", "turns"),
    ("hub_cache", "native", "gguf"),
    ("config", "messages", "units", "errors", "progress", "programs", "stopping"),
)
ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
HEIGHT = {group: -n for n, groups in enumerate(LEVELS) for group in groups}
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path != SOURCE / "__init__.py"
}


def group_of(name: str) -> str:
    """A folder is a group; so are the flat modules that share a first word, as ``hub_cache``."""
    first = name.split(".")[0]
    return first if first in HEIGHT else first.split("_")[0]


def imports_of(name: str) -> set[str]:
    """Modules of this package that a module names in any import, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            base = node.module or ""
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    inner = {
        full.removeprefix("autoglm_gguf.") for full in found if full.startswith("autoglm_gguf.")
    }
    return {module for module in inner if module in MODULES} - {name}


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_downward(name: str) -> None:
    group = group_of(name)
    assert group in HEIGHT, f"{name}: give it a place in LEVELS"
    for other in imports_of(name):
        below = group_of(other)
        assert below == group or HEIGHT[below] < HEIGHT[group], f"{name} imports {other}"


def test_modules_import_in_no_circle() -> None:
    # A package's __init__ is empty here, so that importing it is importing nothing.
    graph = {name: imports_of(name) for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_llama_cpp_is_named_in_native_only() -> None:
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {imported.split(".")[0] for imported in names}
            assert not roots & {"torch", "transformers"} or name.startswith("evaluate"), name
            assert "llama_cpp" not in roots or name.startswith("native"), name


def test_only_cli_output_prints() -> None:
    for name, path in MODULES.items():
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "print" not in calls or name == "cli.output", name
        assert not calls & {"exit", "quit"}, name


@pytest.mark.parametrize("name", MODULES)
def test_module_says_what_it_knows(name: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[name].read_text("utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_begins_with_its_title_and_holds_no_leftovers_of_a_merge(page: Path) -> None:
    lines = page.read_text("utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert not [line for line in lines if line.startswith(("<<<<<<<", "=======", ">>>>>>>"))]


# --- public names ---


def test_all_is_the_lazy_table_and_the_version() -> None:
    assert autoglm_gguf.__all__ == sorted([*autoglm_gguf._HOME, "__version__"])
    assert dir(autoglm_gguf) == autoglm_gguf.__all__


def test_type_checkers_see_the_same_names_and_homes() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text("utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.name: (node.module or "").removeprefix("autoglm_gguf.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == autoglm_gguf._HOME


@pytest.mark.parametrize("name", autoglm_gguf._HOME)
def test_public_name_is_its_homes_and_documented(name: str) -> None:
    value = getattr(autoglm_gguf, name)
    assert value is getattr(importlib.import_module(value.__module__), name)
    documentation = value.__doc__ or ""
    assert documentation.strip() and not documentation.startswith(f"{name}("), "its own words"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Llama'"):
        autoglm_gguf.Llama  # noqa: B018


def test_import_loads_nothing_heavy() -> None:
    script = (
        "import sys, autoglm_gguf\n"
        "heavy = {'llama_cpp', 'numpy', 'PIL', 'pydantic', 'jinja2', 'gguf', 'torch', 'starlette',"
        " 'transformers', 'asyncio', 'huggingface_hub', 'prompt_toolkit'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.split() == []
