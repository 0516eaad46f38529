"""huggingface_hub's cache on disk, and what of it has been verified.

The layout is the client's documented one (docs: "Understand caching"), so that every program shares
one copy: ``blobs/DIGEST``, ``snapshots/COMMIT/NAME`` linking to it, ``refs/REVISION`` holding a
commit. An unfinished file is ``blobs/DIGEST.incomplete``. Knows nothing of the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autoglm_gguf.errors import HubError

SHA256_DIGITS, GIT_DIGITS = 64, 40
_DIGEST = re.compile(rf"[0-9a-f]{{{SHA256_DIGITS}}}|[0-9a-f]{{{GIT_DIGITS}}}")
_COMMIT = re.compile(rf"[0-9a-f]{{{GIT_DIGITS}}}")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MAX_REPO_ID = 96  # the hub's own limit
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it."""

    name: str
    n_bytes: int
    digest: str
    """Lower-case hex: 64 digits are the content's sha256 (LFS files), 40 its git blob id."""

    def new_hash(self) -> hashlib._Hash:
        """A hash whose hexdigest is `digest` once the whole content has gone through it."""
        if len(self.digest) == SHA256_DIGITS:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.n_bytes}\0".encode(), usedforsecurity=False)


def linked_digest(pointer: Path) -> str | None:
    """The digest of a snapshot's file by its blob's name; None where the file is no link.

    Only the first link says it: the client may keep the blob itself as a link to a store whose
    names are Xet hashes, which look like a sha256 and are none.
    """
    name = pointer.readlink().name if pointer.is_symlink() else ""
    return name if is_digest(name) else None


def is_repo_id(text: str) -> bool:
    """Whether a text has the form ``owner/name``; nobody is asked whether it exists."""
    return (
        _REPO_ID.fullmatch(text) is not None
        and len(text) <= _MAX_REPO_ID
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def is_digest(text: str) -> bool:
    """Whether a text is a sha256 or a git blob id, and so safe as a file name."""
    return _DIGEST.fullmatch(text) is not None


def is_commit(text: str) -> bool:
    """Whether a revision is already a whole commit id."""
    return _COMMIT.fullmatch(text) is not None


class RepoCache:
    """One repo's folder in the cache.

    Args:
        root: The cache of all repos.
        repo_id: ``owner/name``.
    """

    def __init__(self, root: Path, repo_id: str) -> None:
        self.root = root
        self.name = "models--" + repo_id.replace("/", "--")
        self.folder = root / self.name

    @property
    def lock_path(self) -> Path:
        """Beside the client's own locks."""
        return self.root / ".locks" / self.name / "autoglm-gguf-pull.lock"

    def snapshot(self, commit: str) -> Path:
        """Directory of a commit's files."""
        return self.folder / "snapshots" / commit

    def partial(self, file: HubFile) -> Path:
        """Where the bytes of an unfinished download stay."""
        return self.folder / "blobs" / f"{file.digest}.incomplete"

    def partial_bytes(self, file: HubFile) -> int:
        """How much of an unfinished download is there."""
        try:
            return self.partial(file).stat().st_size
        except OSError:
            return 0

    def find(self, commit: str, file: HubFile) -> Path | None:
        """The real file with this content, linked into the snapshot; None if it is not there."""
        pointer = self.snapshot(commit) / file.name
        if pointer.is_file():
            return pointer.resolve()
        blob = self._blob(file)
        if not blob.is_file():
            return None
        return self._link(commit, file)

    def place(self, commit: str, file: HubFile) -> Path:
        """Give a finished, verified download its final name; returns the real file."""
        self.partial(file).replace(self._blob(file))
        return self._link(commit, file)

    def remove(self, commit: str, file: HubFile) -> None:
        """Delete a file: the snapshot's link and the content behind it."""
        pointer, blob = self.snapshot(commit) / file.name, self._blob(file)
        for path in {pointer.resolve(), blob.resolve(), blob, pointer}:
            path.unlink(missing_ok=True)

    def commit_of(self, revision: str) -> str | None:
        """The commit a revision had when it was last pulled."""
        if is_commit(revision):
            return revision
        try:
            commit = self._ref(revision).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if is_commit(commit) else None

    def remember_revision(self, revision: str, commit: str) -> None:
        """Note which commit a branch or tag means now."""
        ref = self._ref(revision)
        if not is_commit(revision) and self.commit_of(revision) != commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(ref, commit)

    def _ref(self, revision: str) -> Path:
        refs = Path(os.path.normpath(self.folder / "refs"))
        path = Path(os.path.normpath(refs / revision))
        if refs not in path.parents:
            raise ValueError(f"revision {revision!r}: not the name of a branch, tag or commit")
        return path

    def _blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.digest

    def _link(self, commit: str, file: HubFile) -> Path:
        blob, pointer = self._blob(file), self.snapshot(commit) / file.name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)  # a link whose content is gone
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:  # Windows without the right to link: the snapshot holds the file itself
            blob.replace(pointer)
        return pointer.resolve()


class VerifiedFiles:
    """Which files had the right digest, so that 20 GB are not read again before every conversion.

    A file counts as unchanged while path, size and modification time are the same. Losing this
    record costs time and nothing else.

    Args:
        path: A JSON file; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table: dict[str, list[str | int]] = {}
        try:
            table = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(table, dict):
            self._table = table

    def has(self, path: Path, digest: str) -> bool:
        """Whether this very file was found to have the digest."""
        return self._table.get(str(path)) == _state(path, digest)

    def add(self, path: Path, digest: str) -> None:
        """Remember a file that was found right."""
        self._table[str(path)] = _state(path, digest)
        kept = {name: state for name, state in self._table.items() if Path(name).exists()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(self._path, json.dumps(kept, indent=1))
        except OSError:
            pass  # hashed once more next time


def _state(path: Path, digest: str) -> list[str | int]:
    facts = path.stat()
    return [digest, facts.st_size, facts.st_mtime_ns]


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def content_digest(path: Path, file: HubFile, on_bytes: Callable[[int], None]) -> str:
    """Hash a file.

    Args:
        path: The content.
        file: Decides the kind of digest.
        on_bytes: Told how many bytes are done, after every block.
    """
    digest, done = file.new_hash(), 0
    with path.open("rb") as content:
        while block := content.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            on_bytes(done)
    return digest.hexdigest()


def damaged(what: str, repo_id: str) -> HubError:
    """The error for content that is not what the hub lists; it has been deleted by then.

    Args:
        what: ``<file>: <what is wrong>``.
        repo_id: For the hint.
    """
    return HubError(f"{what}; deleted", hint=f"run again: autoglm-gguf pull {repo_id}")
