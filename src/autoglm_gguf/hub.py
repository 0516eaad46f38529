"""A path or a repo id becomes files on disk; `pull` is the only downloader.

Knows the directory layouts of GGUF pairs, where the embedded checkpoint and the cache lie, which of
a repo's files a conversion reads, and what to do when some are missing, damaged or out of reach.
How the hub is asked is `hub_client`'s matter, how its cache is laid out `hub_cache`'s.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from autoglm_gguf import hub_client
from autoglm_gguf.checkpoint.config import read_json
from autoglm_gguf.checkpoint.safetensors import INDEX, SINGLE
from autoglm_gguf.errors import CheckpointError, GGUFError, HubError
from autoglm_gguf.gguf.describe import find_mmproj
from autoglm_gguf.gguf.names import MMPROJ_PREFIX
from autoglm_gguf.hub_cache import (
    HubFile,
    RepoCache,
    VerifiedFiles,
    content_digest,
    damaged,
    is_repo_id,
    linked_digest,
)
from autoglm_gguf.hub_client import Listing
from autoglm_gguf.progress import OnProgress, Progress
from autoglm_gguf.units import format_bytes

CACHE_VARIABLE = "AUTOGLM_GGUF_CACHE"
EMBEDDED = "autoglm-tiny"
_CONFIG = "config.json"
# What `checkpoint` reads beside the weights. Nothing else is fetched.
_SMALL_FILES = re.compile(
    r"(config|generation_config|preprocessor_config|tokenizer[\w.-]*)\.json"
    r"|tokenizer\.model|chat_template\.(jinja|json)"
)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_log = logging.getLogger(__name__)


def resolve_pair(
    model: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None = "auto"
) -> tuple[Path, Path | None]:
    """Find the text GGUF and its mmproj.

    Args:
        model: A text GGUF, or a directory that holds exactly one.
        mmproj: A file; ``"auto"`` looks beside the text GGUF; None for text only.

    Raises:
        GGUFError: Nothing there, or several candidates.
    """
    path = Path(model)
    text = _only_text(path) if path.is_dir() else path
    if not text.exists():
        if is_repo_id(str(model)) and text.suffix != ".gguf":
            raise GGUFError(
                f"{model}: no such file or directory",
                hint=f"if it is a repo, make a model of it: autoglm-gguf convert {model} "
                "--outdir models",
            )
        raise GGUFError(
            f"{model}: no such file or directory",
            hint="give a GGUF file; make one with: autoglm-gguf convert CHECKPOINT --outdir DIR",
        )
    if mmproj is None:
        return text, None
    if mmproj == "auto":
        return text, find_mmproj(text)
    tower = Path(mmproj)
    if not tower.exists():
        raise GGUFError(
            f"mmproj {mmproj}: no such file",
            hint="give the mmproj's GGUF file, or leave it out: the one beside the model is found",
        )
    return text, tower


def _only_text(directory: Path) -> Path:
    found = [p for p in sorted(directory.glob("*.gguf")) if not p.name.startswith(MMPROJ_PREFIX)]
    if len(found) == 1:
        return found[0]
    if found:
        listing = ", ".join(p.name for p in found)
        raise GGUFError(f"{directory}: several models ({listing})", hint="give one of these files")
    if (directory / _CONFIG).exists():
        raise GGUFError(
            f"{directory}: a checkpoint, not a GGUF model",
            hint=f"autoglm-gguf convert {directory} --outdir models",
        )
    raise GGUFError(f"{directory}: no GGUF model in this directory", hint="check the path")


def resolve_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Find a checkpoint's directory; a repo id that is no path here is pulled first.

    Args:
        checkpoint: A directory, ``owner/name`` on the hub, or ``autoglm-tiny``, the embedded one.
        revision: Of the repo, see `pull`; a directory has none.
        on_progress: See `pull`.

    Raises:
        ValueError: A revision of a directory, or not a revision's name.
        CheckpointError: No such directory, and no repo id either.
        GGUFError: The installation lacks the embedded checkpoint.
        HubError: See `pull`.
    """
    path = Path(checkpoint)
    if str(checkpoint) == EMBEDDED and not path.exists():
        path = embedded_checkpoint()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r}: {path} is a directory here, not a repo")
        return path
    if path.exists():
        raise CheckpointError(
            f"{path}: a file, not a directory", hint="give the directory that holds config.json"
        )
    if not is_repo_id(str(checkpoint)):
        raise CheckpointError(
            f"{path}: no such directory",
            hint="give a directory with config.json, a repo such as zai-org/AutoGLM-Phone-9B, "
            f"or {EMBEDDED}, which comes with the package",
        )
    return pull(str(checkpoint), revision=revision, on_progress=on_progress)


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Download what a conversion needs of a repo, and verify it.

    Goes on where an earlier call was interrupted. A file that is here and was verified is neither
    fetched nor read again while its size and time are unchanged. Without a network the cached
    snapshot is used if it is whole; a warning on the logger ``autoglm_gguf.hub`` says so.

    Args:
        repo_id: ``owner/name``.
        revision: Branch, tag or commit; by default main.
        cache_dir: huggingface_hub's cache; by default the user's, as ``HF_HUB_CACHE`` says.
        on_progress: Told after every block that is fetched or checked.

    Returns:
        The snapshot directory, to be given to `convert`.

    Raises:
        ValueError: Not a repo id, or not a revision's name.
        HubError: The repo, revision, access, network or disk space is missing; or a file was
            damaged, which is deleted then, so that the next call fetches it again.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"{repo_id!r}: not a repo id (write owner/name)")
    root = Path(cache_dir or hub_client.cache_root()).expanduser().absolute()
    cache = RepoCache(root, repo_id)
    known = cache.commit_of(revision or "main")
    try:
        if hub_client.is_offline():
            return _cached_snapshot(cache, repo_id, known, on_progress)
        try:
            listing = hub_client.list_files(repo_id, revision)
        except HubError as error:
            if not error.unreachable or known is None or _missing(cache.snapshot(known)):
                raise
            _log.warning("%s; using the copy in the cache, commit %s", error.message, known[:12])
            return _cached_snapshot(cache, repo_id, known, on_progress)
        with hub_client.lock(cache.lock_path):
            return _Pull(cache, listing, on_progress).run(revision or "main")
    except OSError as error:
        raise HubError(
            f"{cache.folder}: cannot be read or written ({error.strerror or error})",
            hint="free disk space, or name another cache with HF_HUB_CACHE=DIR",
        ) from error


class _Pull:
    """One repo at one commit on its way into the cache, which is locked.

    Args:
        cache: The repo's folder.
        listing: What the hub has.
        on_progress: See `pull`.
    """

    def __init__(self, cache: RepoCache, listing: Listing, on_progress: OnProgress | None) -> None:
        self._cache, self._listing, self._on_progress = cache, listing, on_progress
        self._verified = _verified_files(cache)

    def run(self, revision: str) -> Path:
        snapshot = self._cache.snapshot(self._listing.commit)
        wanted = self._small_files()
        if INDEX in self._listing.files:  # first: it names the shards
            self._bring([self._listing.files[INDEX]], None)
            wanted += [self._listing.files[INDEX], *self._shards(_shard_names(snapshot / INDEX))]
        else:
            wanted += self._shards([SINGLE])
        self._bring(wanted, self._on_progress)
        self._cache.remember_revision(revision, self._listing.commit)
        return snapshot

    def _small_files(self) -> list[HubFile]:
        found = [file for name, file in self._listing.files.items() if _SMALL_FILES.fullmatch(name)]
        if _CONFIG not in self._listing.files:
            raise HubError(
                f"{self._listing.repo_id}: no {_CONFIG}, so no checkpoint",
                hint="give the repo that the model was published in",
            )
        return sorted(found, key=lambda file: file.name)

    def _shards(self, names: Iterable[str]) -> list[HubFile]:
        files = self._listing.files
        absent = [name for name in names if name not in files]
        if not absent:
            return [files[name] for name in names]
        others = [name for name in files if name.endswith(_OTHER_WEIGHTS)]
        found = ", ".join(sorted(others)[:3]) or "none"
        raise HubError(
            f"{self._listing.repo_id}: lacks {absent[0]} (other weights: {found})",
            hint="only whole safetensors checkpoints can be converted; look for such a repo",
        )

    def _bring(self, files: list[HubFile], on_progress: OnProgress | None) -> None:
        """Make the files present and right; those that are there come first."""
        commit, repo_id = self._listing.commit, self._listing.repo_id
        here = {file: path for file in files if (path := self._cache.find(commit, file))}
        _verify(here, self._verified, self._cache, commit, repo_id, on_progress)
        absent = [file for file in files if file not in here]
        parts = {file: min(file.n_bytes, self._cache.partial_bytes(file)) for file in absent}
        resumed = sum(file.n_bytes for file in here) + sum(parts.values())
        total = sum(file.n_bytes for file in files)
        _check_space(self._cache, total - resumed)
        meter = _Meter(on_progress, total, resumed)
        for file in absent:
            meter.done_bytes -= parts[file]
            show = partial(meter.show, file.name)
            hub_client.fetch(self._listing, file, self._cache.partial(file), show)
            self._verified.add(self._cache.place(commit, file), file.digest)
            meter.done_bytes += file.n_bytes


class _Meter:
    """Turns bytes of one file into the progress of all."""

    def __init__(self, on_progress: OnProgress | None, total_bytes: int, resumed: int = 0) -> None:
        self.done_bytes = resumed
        self._on_progress = on_progress
        self._total_bytes, self._resumed_bytes = total_bytes, resumed
        self._started = time.monotonic()

    def show(self, file: str, n_bytes: int) -> None:
        """Report: ``n_bytes`` beside the files that are done."""
        if self._on_progress is not None:
            done, seconds = self.done_bytes + n_bytes, time.monotonic() - self._started
            self._on_progress(
                Progress(file, done, self._total_bytes, seconds, min(done, self._resumed_bytes))
            )


def _verify(
    files: Mapping[HubFile, Path],
    verified: VerifiedFiles,
    cache: RepoCache,
    commit: str,
    repo_id: str,
    on_progress: OnProgress | None,
) -> None:
    """Hash what is new or changed; delete every wrong file, then say so once."""
    unknown = {f: path for f, path in files.items() if not verified.has(path, f.digest)}
    meter = _Meter(on_progress, sum(path.stat().st_size for path in unknown.values()))
    wrong = []
    for file, path in unknown.items():
        n_bytes, show = path.stat().st_size, partial(meter.show, f"checking {file.name}")
        if n_bytes == file.n_bytes and content_digest(path, file, show) == file.digest:
            verified.add(path, file.digest)
        else:
            wrong.append(file.name)
            cache.remove(commit, file)
        meter.done_bytes += n_bytes
    if wrong:
        raise damaged(f"{', '.join(wrong)}: damaged in {cache.folder}", repo_id)


def _cached_snapshot(
    cache: RepoCache, repo_id: str, commit: str | None, on_progress: OnProgress | None
) -> Path:
    """A snapshot without asking the hub; its digests are the names of its blobs."""
    missing = _missing(cache.snapshot(commit)) if commit else ["everything"]
    if commit is None or missing:
        raise HubError(
            f"{repo_id}: not whole in the cache, and HF_HUB_OFFLINE forbids to fetch "
            f"{', '.join(missing[:3])}",
            hint=f"without HF_HUB_OFFLINE: autoglm-gguf pull {repo_id}",
        )
    snapshot = cache.snapshot(commit)
    files = {}
    for path in sorted(snapshot.iterdir()):
        digest = linked_digest(path)
        if digest is not None and path.exists() and _is_needed(path.name):
            files[HubFile(path.name, path.stat().st_size, digest)] = path.resolve()
    _verify(files, _verified_files(cache), cache, commit, repo_id, on_progress)
    return snapshot


def _missing(snapshot: Path) -> list[str]:
    """What a conversion would miss in a snapshot; an interrupted pull has its small files first."""
    names = [_CONFIG]
    if (snapshot / INDEX).is_file():
        names += _shard_names(snapshot / INDEX)
    else:
        names.append(SINGLE)
    return [name for name in names if not (snapshot / name).is_file()]


def _is_needed(name: str) -> bool:
    return _SMALL_FILES.fullmatch(name) is not None or name.endswith((".safetensors", INDEX))


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise CheckpointError(f"{INDEX}: its weight_map does not name shards beside it")
    return sorted(set(names))


def _is_plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\:\0")


def _check_space(cache: RepoCache, n_bytes: int) -> None:
    place = next(p for p in (cache.folder, *cache.folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if n_bytes > free:
        raise HubError(
            f"{cache.root}: disk too small ({format_bytes(free)} free, needs "
            f"{format_bytes(n_bytes)})",
            hint="free disk space, or name a cache on another disk with HF_HUB_CACHE=DIR",
        )


def _verified_files(cache: RepoCache) -> VerifiedFiles:
    return VerifiedFiles(cache_directory() / "verified" / f"{cache.name}.json")


def embedded_checkpoint() -> Path:
    """The directory of autoglm-tiny: inside an installed package, or in the source tree.

    Raises:
        GGUFError: It is in neither place.
    """
    package = Path(__file__).parent
    for place in (package / "models" / EMBEDDED, package.parents[1] / "models" / EMBEDDED):
        if (place / _CONFIG).exists():
            return place
    raise GGUFError(
        f"{EMBEDDED}: the embedded checkpoint is not in this installation",
        hint="reinstall autoglm-gguf, or give a MODEL",
    )


def cache_directory() -> Path:
    """Where converted files may be kept: the system's cache directory for this user.

    ``AUTOGLM_GGUF_CACHE`` names another.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "autoglm-gguf"
    if os.name == "nt":
        local = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        return Path(local) / "autoglm-gguf"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoglm-gguf"
