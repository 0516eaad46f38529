"""``python -m autoglm_gguf``: the command line."""

from autoglm_gguf.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
