"""``autoglm-gguf inspect``: what a GGUF file holds, in words a person reads."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from autoglm_gguf.cli import output
from autoglm_gguf.errors import AutoGLMError, PairMismatchError
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.describe import describe_pair, find_mmproj
from autoglm_gguf.gguf.groups import describe_groups
from autoglm_gguf.gguf.header import Header, read_header
from autoglm_gguf.units import format_bytes


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("inspect", help="show what a GGUF file holds")
    parser.add_argument("file", metavar="FILE", help="a GGUF file")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a summary of one file and of its pair."""
    header = read_header(arguments.file)
    summary = summarize(header)
    if header.metadata.get(names.TYPE) != "mmproj" and header.architecture != "clip":
        summary["pair"] = _pair(header.path)
    if arguments.json:
        output.write_json(summary)
        return
    for key, value in summary.items():
        if isinstance(value, dict):
            output.write(f"{key}:")
            for inner, item in value.items():
                output.write(output.escape_controls(f"  {inner:<22} {_text(item)}"))
        elif key == "groups":
            _print_groups(value)
        else:
            output.write(output.escape_controls(f"{key:<24} {_text(value)}"))


def summarize(header: Header) -> dict[str, Any]:
    """The facts of a header, sizes in bytes, ready for JSON."""
    tokens = header.metadata.get(names.TOKENS)
    n_params = header.n_params
    summary: dict[str, Any] = {
        "file": header.path.name,
        "file_bytes": header.file_bytes,
        "architecture": header.architecture,
        "name": header.metadata.get(names.NAME),
        "n_params": n_params,
        "bpw": round(8 * header.weights_bytes / n_params, 3) if n_params else 0.0,
        "context_length": header.get_int(names.CONTEXT_LENGTH),
        "block_count": header.get_int(names.BLOCK_COUNT),
        "embedding_length": header.get_int(names.EMBEDDING_LENGTH),
        "projector": header.metadata.get(names.PROJECTOR_TYPE),
        "n_tokens": len(tokens) if isinstance(tokens, list) else None,
        "chat_template": names.CHAT_TEMPLATE in header.metadata if tokens else None,
        "fit": _fit(header) or None,
        "weights_by_type": _by_type(header),
        "groups": _groups(header),
    }
    return {key: value for key, value in summary.items() if value is not None}


def _fit(header: Header) -> dict[str, Any]:
    """What the types were chosen for, if they were."""
    return {
        key.removeprefix(names.FIT_PREFIX): value
        for key, value in header.metadata.items()
        if key.startswith(names.FIT_PREFIX)
    }


def _by_type(header: Header) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = defaultdict(lambda: {"n_tensors": 0, "n_bytes": 0})
    for tensor in header.tensors.values():
        groups[tensor.type_name]["n_tensors"] += 1
        groups[tensor.type_name]["n_bytes"] += tensor.n_bytes
    return dict(sorted(groups.items()))


def _groups(header: Header) -> list[dict[str, Any]]:
    return [
        {
            "group": str(found.group),
            "n_tensors": found.n_tensors,
            "n_params": found.n_params,
            "n_bytes": found.n_bytes,
            "bpw": round(found.bpw, 3),
            "types": dict(found.types),
        }
        for found in describe_groups(header)
    ]


def _print_groups(groups: list[dict[str, Any]]) -> None:
    output.write(f"{'group':<20} {'tensors':>7} {'size':>10} {'bpw':>7}  types")
    for row in groups:
        types = ", ".join(f"{kind} ×{n}" for kind, n in row["types"].items())
        size = format_bytes(row["n_bytes"])
        output.write(
            f"{row['group']:<20} {row['n_tensors']:>7} {size:>10} {row['bpw']:>7.3f}  {types}"
        )


def _pair(path: Path) -> dict[str, Any]:
    """Stop tokens, image limits and whether the mmproj beside the file fits."""
    mmproj = find_mmproj(path)
    try:
        described = describe_pair(path, mmproj)
    except PairMismatchError as error:
        name = mmproj.name if mmproj else None
        return {"mmproj": name, "matches": False, "problem": error.message}
    except AutoGLMError as error:
        return {"mmproj": mmproj.name if mmproj else None, "problem": error.message}
    tokens = described.text.metadata[names.TOKENS]
    facts: dict[str, Any] = {
        "mmproj": mmproj.name if mmproj else "none beside it",
        "matches": True if mmproj else None,
        "stops": {tokens[i]: i for i in sorted(described.stop_ids)},
    }
    if described.vision is not None:
        facts["max_image_tokens"] = described.vision.max_tokens
    if described.notes:
        facts["notes"] = list(described.notes)
    return {key: value for key, value in facts.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        if set(value) == {"n_tensors", "n_bytes"}:
            return f"{value['n_tensors']:>4} tensors  {format_bytes(value['n_bytes'])}"
        return ", ".join(f"{key} ({item})" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and value >= 10**6:
        return f"{value:,}"
    return str(value)
