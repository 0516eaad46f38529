"""The reference says what there is: commands, public names, environment variables, messages."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache

from conftest import ROOT
from documents import DOCS

import autoglm_gguf

SOURCE = ROOT / "src" / "autoglm_gguf"
ENVIRONMENT = (DOCS / "reference" / "environment.md").read_text("utf-8")
TROUBLE = (DOCS / "guides" / "troubleshooting.md").read_text("utf-8")
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|SYSTEMROOT|LOCALAPPDATA|CXX|TMPDIR")


def test_cli_page_is_what_the_parsers_say() -> None:
    path = ROOT / "scripts" / "cli_reference.py"
    spec = importlib.util.spec_from_file_location("cli_reference", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (DOCS / "reference" / "cli.md").read_text("utf-8")
    assert page == script.render(), "run: python scripts/cli_reference.py"


def test_python_page_has_every_public_name_once() -> None:
    page = (DOCS / "reference" / "python.md").read_text("utf-8")
    told = re.findall(r"^::: autoglm_gguf\.(\w+)$", page, re.MULTILINE)
    assert sorted(told) == sorted(set(autoglm_gguf.__all__) - {"__version__"})


# --- environment variables ---


@cache
def trees() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text("utf-8"))
        for path in sorted(SOURCE.rglob("*.py"))
    }


def is_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def variables_read() -> set[str]:
    """What is looked up in ``os.environ``: by a literal, or by a constant of some module."""
    constants = {
        target.id.lstrip("_"): node.value.value
        for tree in trees().values()
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = set()
    for name, tree in trees().items():
        for key in filter(None, map(looked_up, ast.walk(tree))):
            if isinstance(key, ast.Constant):
                found.add(key.value)
            elif isinstance(key, ast.Name) and key.id.lstrip("_") in constants:
                found.add(constants[key.id.lstrip("_")])
            else:  # the one that a caller names
                assert name == "hybrid/cloud.py", f"{name}: a variable that this test cannot name"
    return found


def looked_up(node: ast.AST) -> ast.expr | None:
    """What a node looks up in the environment, if it does."""
    if isinstance(node, ast.Subscript) and is_environment(node.value):
        return node.slice
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    is_asked = is_environment(node.func.value) or node.func.attr == "getenv"
    return node.args[0] if is_asked else None


def test_environment_page_lists_every_variable_that_is_read() -> None:
    tables = "\n".join(line for line in ENVIRONMENT.splitlines() if line.startswith("|"))
    told = {
        name for row in re.findall(r"^\| (.*?) \|", tables, re.M) for name in VARIABLE.findall(row)
    }
    libraries = {
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
    }  # read by huggingface_hub's is_offline_mode
    assert told - libraries == variables_read() - libraries


def test_no_variable_is_read_while_importing() -> None:
    for name, tree in trees().items():
        inside = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for inner in ast.walk(node)
        }
        outside = [n for n in ast.walk(tree) if is_environment(n) and id(n) not in inside]
        assert not outside, name


# --- troubleshooting ---


def messages() -> str:
    """Every text in the sources, the pieces of f-strings one after another."""
    texts = [
        node.value
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n".join(texts)


def test_troubleshooting_names_messages_that_there_are() -> None:
    known = messages()
    sections = re.split(r"^## ", TROUBLE, flags=re.MULTILINE)
    foreign = ("The phone", "The GPU is not used", "Not run")  # adb's words
    for section in sections[1:]:
        if section.startswith(foreign):
            continue
        for cell in re.findall(r"^\| (.*?) \|", section, re.MULTILINE):
            for shown in re.findall(r"`([^`]+)`", cell):
                assert shown in known or shown in OTHERS, f"{shown!r}: no such message"


OTHERS = {  # of make, of the loader through doctor, and of Python
    "no C++ compiler",
    "it needs libgomp.so.1, which this system lacks",
    "No module named ...",
}


def test_troubleshooting_has_every_kind_of_error() -> None:
    """An error class with a hint of its own stands in some row: by one of its messages."""
    rows = set(re.findall(r"`([^`]+)`", TROUBLE))
    for kind, texts in sorted(messages_by_kind().items()):
        assert any(shown in text for shown in rows for text in texts), f"{kind}: in no row"


def messages_by_kind() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tree in trees().values():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            if node.func.id in autoglm_gguf.__all__ and node.func.id.endswith("Error"):
                parts = [p.value for p in ast.walk(node.args[0]) if isinstance(p, ast.Constant)]
                found.setdefault(node.func.id, []).extend(map(str, parts))
    return found
