"""``python -m autoglm_gguf.chat [MODEL]``: the interactive conversation."""

import sys

from autoglm_gguf.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["chat", *sys.argv[1:]]))
