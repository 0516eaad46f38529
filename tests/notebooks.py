"""Notebooks run without Jupyter: cells in order, one namespace, outputs as a notebook keeps them.

``python tests/notebooks.py examples/tour.ipynb`` runs one and writes its outputs into it. Knows
plain Python cells, text on stdout and pictures; no magics and no ``await`` outside functions.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

Output = dict[str, Any]


def run_notebook(notebook: dict[str, Any]) -> list[list[Output]]:
    """The outputs of each code cell, in nbformat's shape."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [run_cell("".join(cell["source"]), namespace) for cell in cells]


def run_cell(source: str, namespace: dict[str, Any]) -> list[Output]:
    """Run a cell; what it printed, and the value of a last line that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
    outputs: list[Output] = []
    if text := printed.getvalue():
        lines = text.splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        outputs.append({"output_type": "display_data", "metadata": {}, "data": shown(value)})
    return outputs


def shown(value: object) -> dict[str, Any]:
    """A value as a notebook shows it: a picture, or its repr."""
    picture = getattr(value, "_repr_png_", None)
    if picture is None:
        return {"text/plain": [repr(value)]}
    return {"image/png": base64.b64encode(picture()).decode("ascii")}


def write_outputs(path: Path) -> None:
    """Run a notebook and keep its outputs in the file."""
    notebook = json.loads(path.read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for n, (cell, outputs) in enumerate(zip(cells, run_notebook(notebook), strict=True), 1):
        cell["execution_count"], cell["outputs"] = n, outputs
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    write_outputs(Path(sys.argv[1]))
