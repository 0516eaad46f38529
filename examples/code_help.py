"""Code help: problems of a source file as a compiler prints them, so that editors can jump there.

    python examples/code_help.py FILE --model models/AutoGLM-Phone-9B-Q4_0.gguf

The answer is held to a JSON schema: it is read without guessing, whatever the model knows of code.
autoglm-tiny, without --model, knows nothing of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from autoglm_gguf import AutoGLM, AutoGLMError, default_pair

PROBLEM = {
    "type": "object",
    "properties": {
        "line": {"type": "integer"},
        "problem": {"type": "string", "minLength": 1, "maxLength": 120},
    },
    "required": ["line", "problem"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"problems": {"type": "array", "items": PROBLEM, "maxItems": 3}},
    "required": ["problems"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Look for problems in a source file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", help="a text GGUF; autoglm-tiny, a toy, without it")
    options = parser.parse_args()

    lines = options.file.read_text("utf-8").splitlines()
    code = "\n".join(f"{number} {line}" for number, line in enumerate(lines, 1))
    question = f"Which lines of this code are wrong, and why?\n\n{code}"
    try:
        with AutoGLM.load(options.model or default_pair().text, mmproj=None) as model:
            answer = model.generate(question, max_tokens=1024, constrain=SCHEMA)
    except AutoGLMError as error:  # such as ContextFullError: the file is too long for n_ctx
        sys.exit(f"error: {error}")
    if answer.finish_reason != "stop":
        sys.exit("error: the answer is longer than max_tokens")
    for found in json.loads(answer.text)["problems"]:
        if 1 <= found["line"] <= len(lines):  # a schema says that it is a number, not which
            print(f"{options.file}:{found['line']}: {found['problem']}")


if __name__ == "__main__":
    main()
