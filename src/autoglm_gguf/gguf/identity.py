"""Which file a GGUF is, told without reading all of it."""

from __future__ import annotations

import hashlib

from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.header import Header

_N_SAMPLES = 64
_SAMPLE_BYTES = 512
_CHUNK_BYTES = 1 << 20


def identify_file(header: Header) -> str:
    """24 hex digits over a file's size, its header, and 64 times 512 bytes spread over its weights.

    Equal for copies of a file; another type, another checkpoint, or one trained further give other
    digits.

    Raises:
        OSError: The file is gone.
    """
    digest = hashlib.sha256(str(header.file_bytes).encode())
    start = min((tensor.offset for tensor in header.tensors.values()), default=header.file_bytes)
    with header.path.open("rb", buffering=0) as file:
        while start > file.tell() and (data := file.read(min(start - file.tell(), _CHUNK_BYTES))):
            digest.update(data)
        for n in range(_N_SAMPLES):
            file.seek(start + n * (header.file_bytes - start) // _N_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:24]


def identify_model(header: Header) -> str:
    """The checkpoint that a file was converted from; the file itself where it does not say."""
    source = header.metadata.get(names.SOURCE_ID)
    return source if isinstance(source, str) else identify_file(header)
