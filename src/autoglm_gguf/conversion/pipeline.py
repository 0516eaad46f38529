"""`convert`: a checkpoint directory in, a GGUF pair out.

Order of work: everything is read and checked first, so bad input costs nothing; then both files are
written under temporary names and renamed together at the end.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from autoglm_gguf.checkpoint.config import ModelConfig, read_config
from autoglm_gguf.checkpoint.safetensors import Shards
from autoglm_gguf.checkpoint.tokenizer import Vocabulary, read_vocabulary
from autoglm_gguf.conversion.metadata import write_mmproj_header, write_text_header
from autoglm_gguf.conversion.recipe import Outtype, parse_outtype
from autoglm_gguf.conversion.tensors import OutTensor, check_unused, plan_mmproj, plan_text
from autoglm_gguf.conversion.writer import OnProgress, TensorWriter, open_temporary, sync_directory
from autoglm_gguf.devices import usable_cores
from autoglm_gguf.errors import CheckpointError, ConversionError
from autoglm_gguf.gguf.names import MMPROJ_PREFIX
from autoglm_gguf.units import format_bytes

_HEADER_ROOM_BYTES = 32 * 2**20  # vocabulary and tables of the largest models, rounded up


@dataclass(frozen=True, slots=True)
class ModelPair:
    """The two files of a converted model."""

    text: Path
    mmproj: Path


def convert(
    checkpoint: str | os.PathLike[str],
    outdir: str | os.PathLike[str] = ".",
    outtype: str = "q8_0",
    *,
    mmproj_outtype: str | None = None,
    name: str | None = None,
    n_threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> ModelPair:
    """Convert a Hugging Face checkpoint to a text GGUF and an mmproj GGUF.

    Peak anonymous memory is a few row blocks per thread, whatever the model's size.

    Args:
        checkpoint: A directory with config.json, tokenizer.json and safetensors shards.
        outdir: Where the files go; made if it does not exist.
        outtype: f32, f16, bf16, q8_0 or q4_0.
        mmproj_outtype: The vision tower's type; by default the outtype, and q8_0 for q4_0.
        name: Base of the file names; by default the directory's name.
        n_threads: Threads; by default the usable cores.
        on_progress: Told after every block.

    Returns:
        The final paths, in llama.cpp's manner: ``NAME-Q8_0.gguf``, ``mmproj-NAME-Q8_0.gguf``.

    Raises:
        ValueError: Unknown outtype.
        CheckpointError: The checkpoint is incomplete, broken, or of another family.
        ConversionError: The output cannot be written, or the disk is too small.
    """
    kind = parse_outtype(outtype)
    tower_kind = parse_outtype(mmproj_outtype or kind.mmproj)
    source = Path(checkpoint)
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: no such directory", hint="give a checkpoint directory with config.json"
        )
    config = read_config(source)
    vocabulary = read_vocabulary(source, config)
    base = name or source.resolve().name
    with Shards(source) as shards:
        job = _Job(
            base,
            shards.fingerprint,
            config,
            vocabulary,
            kind,
            tower_kind,
            plan_text(shards.tensors, config, kind),
            plan_mmproj(shards.tensors, config, tower_kind),
        )
        check_unused(shards.tensors, config)
        target = _prepare_outdir(Path(outdir), job.n_bytes)
        return job.write(target, n_threads or usable_cores(), on_progress)


@dataclass(frozen=True, slots=True)
class _Job:
    """A conversion that has been checked and can start."""

    base: str
    fingerprint: str
    config: ModelConfig
    vocabulary: Vocabulary
    outtype: Outtype
    mmproj_outtype: Outtype
    text: list[OutTensor]
    mmproj: list[OutTensor]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.text + self.mmproj)

    def write(self, outdir: Path, n_threads: int, on_progress: OnProgress | None) -> ModelPair:
        text = outdir / f"{self.base}-{self.outtype.name.upper()}.gguf"
        mmproj = outdir / f"{MMPROJ_PREFIX}{self.base}-{self.mmproj_outtype.name.upper()}.gguf"
        writer = TensorWriter(n_threads, self.n_bytes, on_progress)
        try:
            with open_temporary(text) as text_part, open_temporary(mmproj) as mmproj_part:
                write_text_header(
                    text_part,
                    self.base,
                    self.fingerprint,
                    self.config,
                    self.vocabulary,
                    self.outtype,
                    self.text,
                )
                writer.write(text_part, self.text, text.name)
                write_mmproj_header(
                    mmproj_part,
                    self.base,
                    self.fingerprint,
                    self.config,
                    self.mmproj_outtype,
                    self.mmproj,
                )
                writer.write(mmproj_part, self.mmproj, mmproj.name)
                mmproj_part.replace(mmproj)
                text_part.replace(text)
            sync_directory(outdir)
        except OSError as error:
            raise ConversionError(
                f"{outdir}: cannot be written ({error.strerror or error})",
                hint="give another --outdir, or free disk space",
            ) from error
        return ModelPair(text, mmproj)


def _prepare_outdir(outdir: Path, n_bytes: int) -> Path:
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(outdir).free
        writable = os.access(outdir, os.W_OK | os.X_OK)
    except OSError as error:
        raise ConversionError(
            f"{outdir}: cannot be used as the output directory ({error.strerror})",
            hint="give another --outdir",
        ) from error
    if not writable:
        raise ConversionError(f"{outdir}: not writable", hint="give another --outdir")
    required = n_bytes + _HEADER_ROOM_BYTES
    if free < required:
        raise ConversionError(
            f"{outdir}: disk too small ({format_bytes(free)} free, needs {format_bytes(required)})",
            hint="free disk space, or give an --outdir on another disk",
        )
    return outdir
