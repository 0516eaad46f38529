"""The guide and the reference name what there is, and nothing else."""

from __future__ import annotations

import ast
import json
import re

from conftest import ROOT
from serving import CHAT, HI, ask, fake_app

from autoglm_gguf.cli.main import build_parser
from autoglm_gguf.server import errors
from autoglm_gguf.server.openapi import describe_api
from autoglm_gguf.server.protocol import ChatRequest, CompletionRequest, Sampling

GUIDE = (ROOT / "docs" / "guides" / "server.md").read_text("utf-8")
REFERENCE = (ROOT / "docs" / "reference" / "http.md").read_text("utf-8")
SOURCES = sorted((ROOT / "src" / "autoglm_gguf" / "server").glob("*.py"))


def section(title: str) -> str:
    return REFERENCE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def firsts(table: str) -> set[str]:
    """What stands in backticks in the first column of tables."""
    rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_guides_commands_are_understood() -> None:
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", GUIDE, re.S)).replace("\\\n", " ")
    ours = [line[2:].split() for line in blocks.splitlines() if line.startswith("$ autoglm-gguf")]
    assert len(ours) >= 3
    parser = build_parser()
    for words in ours:
        parser.parse_args(words[1:])  # exits where an option does not exist
    options = set(re.findall(r"`(--[a-z-]+)", GUIDE))
    assert len(options) > 8
    known = {word for action in serve_options() for word in action}
    assert options <= known, options - known


def serve_options() -> list[list[str]]:
    actions = build_parser()._subparsers._group_actions[0].choices["serve"]._actions  # type: ignore
    return [list(action.option_strings) for action in actions]


def test_guides_python_is_python() -> None:
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.S):
        ast.parse(block)
    for block in re.findall(r"```json\n(.*?)```", GUIDE, re.S):
        json.loads(block)


def test_guides_curl_asks_what_the_server_answers() -> None:
    body = json.loads(re.findall(r"-d '(\{.*?\})'", GUIDE)[0])
    assert body.keys() == {"messages", "max_tokens", "stream"}
    answer = ask(fake_app(), ("POST", CHAT, {"json": body}))[0]
    assert answer.status_code == 200


def test_reference_lists_every_field_of_a_request() -> None:
    both, _, rest = section("Fields of a request").partition("Chat completions:")
    chat, _, plain = rest.partition("Completions:\n")
    shared = set(Sampling.model_fields)
    assert firsts(both) == shared
    assert firsts(chat) == set(ChatRequest.model_fields) - shared
    assert firsts(plain) == set(CompletionRequest.model_fields) - shared


def test_reference_names_every_field_of_an_answer() -> None:
    schemas = describe_api()["components"]["schemas"]
    told = section("Fields of an answer")
    for shape in ("Timings", "Route"):
        for name in schemas[shape]["properties"]:
            assert f"`{name}`" in told, name


def test_reference_lists_every_path() -> None:
    paths = set(re.findall(r"(/[\w./]*)", " ".join(firsts(REFERENCE.partition("\n## ")[0]))))
    described = {path.replace("{name}", "NAME") for path in describe_api()["paths"]}
    assert paths == described | {"/", "/ws/generate"}


def test_reference_lists_every_error_code() -> None:
    codes = {code for _, code in errors.HTTP_STATUS.values()}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ApiError":
                codes |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
    codes |= {"missing_required_parameter", "not_found", "method_not_allowed"}
    told = set(re.findall(r"`([a-z_]+)`", section("Errors").partition("| 400 |")[2]))
    assert told - {"param"} == codes


def test_reference_lists_every_metric() -> None:
    text = ask(fake_app(), ("POST", CHAT, {"json": HI}), ("GET", "/metrics", {}))[1].text
    found = set(re.findall(r"^# TYPE autoglm_gguf_(\w+) \w+$", text, re.MULTILINE))
    found = {name for name in found if not name.endswith("_created")}
    told = {re.sub(r"\{.*", "", name) for name in firsts(section("Metrics"))}
    planned = {"memory_planned_bytes", "memory_budget_bytes"}  # of a model that has a plan
    assert told - planned == found
