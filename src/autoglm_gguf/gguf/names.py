"""The GGUF keys and values that this package reads or writes, each with who defined it."""

from __future__ import annotations

# llama.cpp, gguf-py/gguf/constants.py
ARCHITECTURE = "general.architecture"
TYPE = "general.type"
NAME = "general.name"
CHAT_TEMPLATE = "tokenizer.chat_template"
TOKENS = "tokenizer.ggml.tokens"
MERGES = "tokenizer.ggml.merges"
EOS_ID = "tokenizer.ggml.eos_token_id"
EOT_ID = "tokenizer.ggml.eot_token_id"
EOM_ID = "tokenizer.ggml.eom_token_id"
EMBEDDING_LENGTH = "{arch}.embedding_length"
BLOCK_COUNT = "{arch}.block_count"
FEED_FORWARD_LENGTH = "{arch}.feed_forward_length"
CONTEXT_LENGTH = "{arch}.context_length"
PROJECTOR_TYPE = "clip.projector_type"
PROJECTION_DIM = "clip.vision.projection_dim"
PATCH_SIZE = "clip.vision.patch_size"
# llama.cpp, common/imatrix-loader.h
IMATRIX_DATASETS = "imatrix.datasets"
IMATRIX_CHUNK_COUNT = "imatrix.chunk_count"
IMATRIX_CHUNK_SIZE = "imatrix.chunk_size"

# autoglm-gguf
EOS_IDS = "autoglm.eos_token_ids"
"""The whole list of ``generation_config.json``; llama.cpp has room for one eos only."""
MIN_PIXELS = "autoglm.vision.min_pixels"
MAX_PIXELS = "autoglm.vision.max_pixels"
"""Limits of ``preprocessor_config.json``, counted as transformers counts: two frames of pixels."""
MERGE_SIZE = "autoglm.vision.spatial_merge_size"
SOURCE_ID = "autoglm.source_fingerprint"
"""The same value in both files of a pair made from one checkpoint."""

FIT_PREFIX = "autoglm.fit."
"""What a fit chose and for which limit; `conversion.fitting.FitReport` lists the keys."""
CALIBRATION_FACTS = "autoglm.calibration"
"""In unfinished importance matrices only: what they were made from."""

MMPROJ_PREFIX = "mmproj-"
TEXT_ARCHITECTURES = ("glm4", "chatglm")
PROJECTOR_GLM4V = "glm4v"
IMAGE_TOKEN = "<|image|>"
END_OF_ANSWER = "</answer>"
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>", END_OF_ANSWER)
"""The tokens of AutoGLM-Phone-9B's ``eos_token_id`` list, by name."""
