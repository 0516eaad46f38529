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
from autoglm_gguf.conversion.fit import Fit
from autoglm_gguf.conversion.fitting import FitReport, Fitted, Fitter
from autoglm_gguf.conversion.imatrix import read_imatrix
from autoglm_gguf.conversion.limits import check_written
from autoglm_gguf.conversion.metadata import read_back, write_mmproj_header, write_text_header
from autoglm_gguf.conversion.recipe import Outtype, Recipe, parse_outtype, parse_overrides
from autoglm_gguf.conversion.tensors import OutTensor, check_unused, plan_mmproj, plan_text
from autoglm_gguf.conversion.writer import TensorWriter, open_temporary, sync_directory
from autoglm_gguf.devices import usable_cores
from autoglm_gguf.errors import ConversionError
from autoglm_gguf.gguf.names import MMPROJ_PREFIX
from autoglm_gguf.hub import resolve_checkpoint
from autoglm_gguf.memory.estimate import layer_of
from autoglm_gguf.progress import OnProgress
from autoglm_gguf.units import format_bytes

DEFAULT_OUTTYPE = "q8_0"
_HEADER_ROOM_BYTES = 32 * 2**20  # vocabulary and tables of the largest models, rounded up


@dataclass(frozen=True, slots=True)
class ModelPair:
    """The two files of a converted model."""

    text: Path
    mmproj: Path | None
    """None for a text-only model."""
    fit: FitReport | None = None
    """What was chosen, where `convert` was given a limit."""


def convert(
    checkpoint: str | os.PathLike[str],
    outdir: str | os.PathLike[str] = ".",
    outtype: str | None = None,
    *,
    revision: str | None = None,
    mmproj_outtype: str | None = None,
    tensor_types: Sequence[str] = (),
    imatrix: str | os.PathLike[str] | None = None,
    fit: Fit | None = None,
    search_scales: bool = False,
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
        outtype: A key of `OUTTYPES`: f32, f16, bf16, q8_0, q4_0, q4_K, iq3_s, …; by default q8_0.
        revision: Branch, tag or commit of the repo; by default main. A directory has none.
        mmproj_outtype: f32, f16, bf16, q8_0 or q4_0; by default the outtype down to q8_0.
        tensor_types: Exceptions as ``REGEX=TYPE``, for example ``attn_v=q8_0``; the first pattern
            found in a text tensor's GGUF name wins.
        imatrix: An importance matrix, of `calibrate` or llama-imatrix (GGUF or its legacy format);
            iq3_xxs needs one.
        fit: Choose the types so that a run, or the text file, keeps within a limit; stands in the
            place of an outtype.
        search_scales: Look for better scales than ggml's in the types whose blocks have one or two
            (see ``encode``), at a few times the work; a fit always does.
        name: Base of the file names; by default the directory's name.
        n_threads: Threads; by default the usable cores.
        on_progress: Told after every block.

    Returns:
        The final paths, in llama.cpp's manner: ``NAME-Q8_0.gguf``, ``mmproj-NAME-Q8_0.gguf``;
        of a fit ``NAME-FIT_4GB.gguf``.

    Raises:
        ValueError: Unknown outtype, or one beside a fit, a broken tensor_types entry, a name that
            is a path, or a revision of a directory.
        CheckpointError: The checkpoint is incomplete, broken, or of another family.
        HubError: The repo could not be pulled.
        GGUFError: The importance matrix is broken, or another model's.
        ConversionError: The output cannot be written, the disk is too small, or an exception asks
            for a type that cannot be had.
        DoesNotFitError: No mix of types keeps within the fit's limit.
    """
    _check_arguments(name, outdir, n_threads)
    if fit is not None and outtype is not None:
        raise ValueError(f"outtype {outtype!r} beside a fit, which chooses the types: give one")
    kind = parse_outtype(outtype or DEFAULT_OUTTYPE)
    overrides = parse_overrides(tensor_types)
    tower_kind = None if mmproj_outtype is None else parse_outtype(mmproj_outtype, mmproj=True)
    importance = None if imatrix is None else read_imatrix(Path(imatrix))
    recipe = Recipe(kind, overrides, importance, search=search_scales)
    source = resolve_checkpoint(checkpoint, revision=revision, on_progress=on_progress)
    config = read_config(source)
    vocabulary = _read_vocabulary(source, config)
    base = name or Path(checkpoint).resolve().name  # a pulled repo: NAME of OWNER/NAME
    n_threads = n_threads or usable_cores()
    with Shards(source) as shards:
        job = _Job(base, shards, config, vocabulary, recipe, tower_kind)
        job.check()
        if fit is not None:
            job = job.fitted(fit, Path(outdir), n_threads, on_progress)
        target = _prepare_outdir(Path(outdir), job.n_bytes)
        return job.write(target, n_threads, on_progress)


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


class _Job:
    """A conversion: what both files will hold.

    Args:
        base: Of the file names.
        shards: The checkpoint's tensors.
        config: Its shapes.
        vocabulary: Its tokens.
        recipe: The text's types.
        mmproj_outtype: The tower's; None for what goes with the text's.
        fitted: What a fit has found, which comes before both.
    """

    def __init__(
        self,
        base: str,
        shards: Shards,
        config: ModelConfig,
        vocabulary: Vocabulary,
        recipe: Recipe,
        mmproj_outtype: Outtype | None,
        fitted: Fitted | None = None,
    ) -> None:
        self._base, self._shards, self._config = base, shards, config
        self._vocabulary, self._recipe, self._fitted = vocabulary, recipe, fitted
        self._mmproj_given = mmproj_outtype
        if fitted is not None:
            recipe = fitted.recipe
            self._outtype, self._mmproj_outtype = fitted.outtype, fitted.mmproj_outtype
        else:
            self._outtype = recipe.outtype
            self._mmproj_outtype = mmproj_outtype or parse_outtype(recipe.outtype.mmproj)
        width = None if fitted is None else fitted.ffn_width
        self._text = plan_text(shards.tensors, config, recipe, ffn_width=width)
        tower = Recipe(self._mmproj_outtype, search=recipe.search)
        self._mmproj = plan_mmproj(shards.tensors, config, tower)

    @property
    def n_bytes(self) -> int:
        """Of both files' tensors."""
        return sum(tensor.n_bytes for tensor in self._text + self._mmproj)

    def check(self) -> None:
        """Refuse tensors, exceptions or an importance matrix that belong to nothing."""
        check_unused(self._shards.tensors, self._config)
        known = [tensor.name for tensor in self._text]
        for pattern, _ in self._recipe.overrides:
            if not any(pattern.search(name) for name in known):
                raise ValueError(f"tensor type {pattern.pattern!r}: no tensor has such a name")
        if self._recipe.imatrix is not None:
            layers = [
                t.name for t in self._text if len(t.shape) > 1 and layer_of(t.name) is not None
            ]
            self._recipe.imatrix.check_names(known, layers)

    def fitted(
        self, fit: Fit, outdir: Path, n_threads: int, on_progress: OnProgress | None
    ) -> _Job:
        """The same conversion in the types that keep within a limit."""
        fitter = Fitter(
            fit,
            self._shards.tensors,
            self._config,
            self._recipe,
            self._mmproj_given,
            read_back(self._write_text_header),
            read_back(self._write_mmproj_header) if self._mmproj else None,
        )
        fitter.check()
        _prepare_outdir(outdir, fitter.least_bytes)  # before minutes are spent
        found = fitter.find(n_threads=n_threads, on_progress=on_progress)
        return _Job(
            self._base,
            self._shards,
            self._config,
            self._vocabulary,
            self._recipe,
            self._mmproj_given,
            found,
        )

    def write(self, outdir: Path, n_threads: int, on_progress: OnProgress | None) -> ModelPair:
        """Write both files under temporary names, look at them, and rename them."""
        report = None if self._fitted is None else self._fitted.report
        label = report.fit.label if report else self._outtype.name.upper()
        text = outdir / f"{self._base}-{label}.gguf"
        mmproj = outdir / f"{MMPROJ_PREFIX}{self._base}-{self._mmproj_outtype.name.upper()}.gguf"
        files = [(mmproj, self._mmproj, self._write_mmproj_header)] if self._mmproj else []
        # The text file last: where it is, the pair is whole.
        files.append((text, self._text, self._write_text_header))
        for path, *_ in files:
            if path.is_dir():
                raise ConversionError(
                    f"{path}: a directory is in the way", hint="give another name or --outdir"
                )
        writer = TensorWriter(n_threads, self.n_bytes, on_progress)
        try:
            with ExitStack() as stack:
                parts = [stack.enter_context(open_temporary(path)) for path, *_ in files]
                for part, (path, tensors, write_header) in zip(parts, files, strict=True):
                    write_header(part, tensors)
                    writer.write(part, tensors, path.name)
                if report is not None:
                    check_written(report.fit, parts[-1], parts[0] if self._mmproj else None)
                for part, (path, *_) in zip(parts, files, strict=True):
                    part.replace(path)
            sync_directory(outdir)
        except OSError as error:
            raise ConversionError(
                f"{outdir}: cannot be written ({error.strerror or error})",
                hint="give another --outdir, or free disk space",
            ) from error
        return ModelPair(text, mmproj if self._mmproj else None, report)

    def _write_text_header(self, path: Path, tensors: list[OutTensor]) -> None:
        write_text_header(
            path,
            self._base,
            self._shards.fingerprint,
            self._config,
            self._vocabulary,
            self._outtype,
            tensors,
            self._fitted.report.keys() if self._fitted else None,
        )

    def _write_mmproj_header(self, path: Path, tensors: list[OutTensor]) -> None:
        common = (path, self._base, self._shards.fingerprint, self._config)
        write_mmproj_header(*common, self._mmproj_outtype, tensors)


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
