"""What can only be collected beside llama.cpp's own tools."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("AUTOGLM_GGUF_LLAMA_TOOLS") else ["test_llama_tools.py"]
