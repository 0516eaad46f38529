"""`convert`: a checkpoint directory in, a GGUF pair out.

Order of work: everything is read and checked first, so bad input costs nothing; then both files are
written under temporary names and renamed together at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from autoglm_gguf.checkpoint.config import ModelConfig, read_config
from autoglm_gguf.checkpoint.safetensors import Shards
from autoglm_gguf.checkpoint.spm import read_spm_vocabulary
from autoglm_gguf.checkpoint.tokenizer import Vocabulary, read_vocabulary
from autoglm_gguf.conversion.imatrix import read_imatrix
from autoglm_gguf.conversion.metadata import write_mmproj_header, write_text_header
from autoglm_gguf.conversion.recipe import Outtype, Recipe, parse_outtype, parse_overrides
from autoglm_gguf.conversion.tensors import OutTensor, check_unused, plan_mmproj, plan_text
from autoglm_gguf.conversion.writer import TensorWriter, open_temporary, sync_directory
from autoglm_gguf.devices import usable_cores
from autoglm_gguf.errors import ConversionError
from autoglm_gguf.gguf.names import MMPROJ_PREFIX
from autoglm_gguf.hub import resolve_checkpoint
from autoglm_gguf.progress import OnProgress
from autoglm_gguf.units import format_bytes

_HEADER_ROOM_BYTES = 32 * 2**20  # vocabulary and tables of the largest models, rounded up


@dataclass(frozen=True, slots=True)
class ModelPair:
    """The two files of a converted model."""

    text: Path
    mmproj: Path | None
    """None for a text-only model."""


def convert(
    checkpoint: str | os.PathLike[str],
    outdir: str | os.PathLike[str] = ".",
    outtype: str = "q8_0",
    *,
    revision: str | None = None,
    mmproj_outtype: str | None = None,
    tensor_types: Sequence[str] = (),
    imatrix: str | os.PathLike[str] | None = None,
    name: str | None = None,
    n_threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> ModelPair:
    """Convert a Hugging Face checkpoint to a text GGUF and an mmproj GGUF.

    Peak anonymous memory is a few row blocks per thread, whatever the model's size.

    Args:
        checkpoint: A directory with config.json, tokenizer.json and safetensors shards; or a repo
            id, which is pulled first (see `pull`).
        outdir: Where the files go; made if it does not exist.
        outtype: A key of `OUTTYPES`: f32, f16, bf16, q8_0, q4_0, q4_K, iq3_s, …
        revision: Branch, tag or commit of the repo; by default main. A directory has none.
        mmproj_outtype: f32, f16, bf16, q8_0 or q4_0; by default the outtype down to q8_0.
        tensor_types: Exceptions as ``REGEX=TYPE``, for example ``attn_v=q8_0``; the first pattern
            found in a text tensor's GGUF name wins.
        imatrix: An importance matrix of llama.cpp, GGUF or legacy; iq3_xxs needs one.
        name: Base of the file names; by default the directory's name.
        n_threads: Threads; by default the usable cores.
        on_progress: Told after every block.

    Returns:
        The final paths, in llama.cpp's manner: ``NAME-Q8_0.gguf``, ``mmproj-NAME-Q8_0.gguf``.

    Raises:
        ValueError: Unknown outtype, a broken tensor_types entry, a name that is a path, or a
            revision of a directory.
        CheckpointError: The checkpoint is incomplete, broken, or of another family.
        HubError: The repo could not be pulled.
        ConversionError: The output cannot be written, or the disk is too small.
    """
    _check_arguments(name, outdir, n_threads)
    kind = parse_outtype(outtype)
    overrides = parse_overrides(tensor_types)
    tower_kind = parse_outtype(mmproj_outtype or kind.mmproj, mmproj=True)
    recipe = Recipe(kind, overrides, None if imatrix is None else read_imatrix(Path(imatrix)))
    source = resolve_checkpoint(checkpoint, revision=revision, on_progress=on_progress)
    config = read_config(source)
    vocabulary = _read_vocabulary(source, config)
    base = name or Path(checkpoint).resolve().name  # a pulled repo: NAME of OWNER/NAME
    with Shards(source) as shards:
        job = _Job(
            base,
            shards.fingerprint,
            config,
            vocabulary,
            kind,
            tower_kind,
            plan_text(shards.tensors, config, recipe),
            plan_mmproj(shards.tensors, config, Recipe(tower_kind)),
        )
        check_unused(shards.tensors, config)
        for pattern, _ in overrides:
            if not any(pattern.search(tensor.name) for tensor in job.text):
                raise ValueError(f"tensor type {pattern.pattern!r}: no tensor has such a name")
        target = _prepare_outdir(Path(outdir), job.n_bytes)
        return job.write(target, n_threads or usable_cores(), on_progress)


def _check_arguments(
    name: str | None, outdir: str | os.PathLike[str], n_threads: int | None
) -> None:
    if name is not None and (Path(name).name != name or not name.strip(".")):
        raise ValueError(f"name {name!r}: not a plain file name")
    if not str(outdir):
        raise ValueError("outdir: empty (give . for the current directory)")
    if n_threads is not None and not 1 <= n_threads <= 512:
        raise ValueError(f"n_threads {n_threads}: not in 1..512")


def _read_vocabulary(source: Path, config: ModelConfig) -> Vocabulary:
    is_spm = config.text.naming == "chatglm" and not (source / "tokenizer.json").exists()
    return (read_spm_vocabulary if is_spm else read_vocabulary)(source, config)


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
        files = [(mmproj, self.mmproj)] if self.mmproj else []
        files.append((text, self.text))  # the text file last: where it is, the pair is whole
        for path, _ in files:
            if path.is_dir():
                raise ConversionError(
                    f"{path}: a directory is in the way", hint="give another name or --outdir"
                )
        writer = TensorWriter(n_threads, self.n_bytes, on_progress)
        try:
            with ExitStack() as stack:
                parts = [stack.enter_context(open_temporary(path)) for path, _ in files]
                for part, (path, tensors) in zip(parts, files, strict=True):
                    self._write_header(part, tensors)
                    writer.write(part, tensors, path.name)
                for part, (path, _) in zip(parts, files, strict=True):
                    part.replace(path)
            sync_directory(outdir)
        except OSError as error:
            raise ConversionError(
                f"{outdir}: cannot be written ({error.strerror or error})",
                hint="give another --outdir, or free disk space",
            ) from error
        return ModelPair(text, mmproj if self.mmproj else None)

    def _write_header(self, path: Path, tensors: list[OutTensor]) -> None:
        common = (path, self.base, self.fingerprint, self.config)
        if tensors is self.mmproj:
            write_mmproj_header(*common, self.mmproj_outtype, tensors)
        else:
            write_text_header(*common, self.vocabulary, self.outtype, tensors)


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
