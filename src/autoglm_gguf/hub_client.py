"""The one seam to huggingface_hub: what a repo holds, and one file's bytes.

The client lists, authenticates, follows redirects and names what went wrong; all its failures leave
as `HubError`. The bytes are streamed here, through the client's session, because the client keeps
nothing of an interrupted file (2.4: ``_download_to_tmp_and_move`` writes to a random name and
removes it). For the same reason Xet is never used: hf_xet writes such a temporary file too. It also
fetches from a server of its own, whose address the hub's answer names, so behind an ``HF_ENDPOINT``
mirror it would reach past the mirror. The plain address serves the same bytes, with ranges.

huggingface_hub reads HF_* when it is imported; what may change later is read here at each call.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from autoglm_gguf.errors import HubError
from autoglm_gguf.hub_cache import HubFile, damaged, is_commit, is_digest
from autoglm_gguf.units import format_bytes

DEFAULT_ENDPOINT = "https://huggingface.co"
RETRY_SECONDS = 1.0
"""Wait before the second attempt; doubles with each one that brings nothing."""
_ATTEMPTS = 5
_LOCK_SECONDS = 0.2
_BLOCK_BYTES = 1 << 20
_TRUE = ("1", "ON", "YES", "TRUE")
_BUSY = (408, 429, 500, 502, 503, 504)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listing:
    """A repo at one commit."""

    repo_id: str
    commit: str
    files: dict[str, HubFile]


def endpoint() -> str:
    """The hub's address, or that of the mirror that ``HF_ENDPOINT`` names."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_offline() -> bool:
    """Whether the user forbids the network (``HF_HUB_OFFLINE``, ``TRANSFORMERS_OFFLINE``)."""
    from huggingface_hub import is_offline_mode

    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.upper() in _TRUE or is_offline_mode()


def cache_root() -> Path:
    """The cache that all Hugging Face programs of this user share (``HF_HUB_CACHE``)."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE).expanduser()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file, then hold it."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(path, timeout=_LOCK_SECONDS))
        except TimeoutError:
            _log.warning("another process is pulling this repo; waiting for it")
            stack.enter_context(WeakFileLock(path))
        yield


def list_files(repo_id: str, revision: str | None) -> Listing:
    """Ask the hub what a repo holds.

    Raises:
        HubError: No such repo or revision, no access, or no answer (``unreachable`` is set).
    """
    from huggingface_hub import HfApi, constants, errors

    api = HfApi(endpoint=endpoint(), library_name="autoglm-gguf")
    with _client_errors(repo_id, revision):
        try:
            info = api.model_info(
                repo_id,
                revision=revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
            files = {
                item.rfilename: HubFile(
                    item.rfilename,
                    int(item.lfs.size if item.lfs else item.size or 0),
                    str(item.lfs.sha256 if item.lfs else item.blob_id),
                )
                for item in info.siblings or ()
            }
        except errors.HfHubHTTPError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _no_hub(f"is not what a hub answers ({error})") from error
    commit = str(info.sha)
    # Both become file names, and a mirror can be anybody's.
    if not is_commit(commit) or not all(is_digest(file.digest) for file in files.values()):
        raise _no_hub("has a commit or a digest that is none")
    if any(file.n_bytes < 0 for file in files.values()):
        raise _no_hub("has a negative size")
    return Listing(repo_id, commit, files)


def fetch(listing: Listing, file: HubFile, partial: Path, on_bytes: Callable[[int], None]) -> None:
    """Download what is missing of a file, and verify all of it.

    Args:
        listing: The repo and commit.
        file: One of its files.
        partial: Holds the first bytes, or does not exist; afterwards the whole file, on disk.
        on_bytes: Told how many bytes of this file are there, after every block.

    Raises:
        HubError: No access, no connection (the bytes so far stay), or wrong content (deleted).
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as out:
        part = _Partial(file, out, on_bytes)
        failures = 0
        while part.n_bytes < file.n_bytes:
            before = part.n_bytes
            problem = _stream(listing, part)
            failures = 0 if part.n_bytes > before else failures + 1
            if failures == _ATTEMPTS:
                raise HubError(
                    f"{file.name}: the download stopped at {format_bytes(part.n_bytes)} of "
                    f"{format_bytes(file.n_bytes)} ({problem})",
                    unreachable=True,
                    hint=f"to go on from there: autoglm-gguf pull {listing.repo_id}",
                )
            if failures:
                time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
        found = part.hash.hexdigest()
        if part.n_bytes == file.n_bytes and found == file.digest:
            out.flush()
            os.fsync(out.fileno())
            return
    partial.unlink()
    reason = f"digest {found}" if part.n_bytes == file.n_bytes else "more bytes"
    raise damaged(
        f"{file.name}: damaged on the way (found {reason}, required {file.digest} over "
        f"{file.n_bytes} bytes)",
        listing.repo_id,
    )


class _Partial:
    """The bytes of a file so far, on disk and through its hash."""

    def __init__(self, file: HubFile, out: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        self.file, self._out, self._on_bytes = file, out, on_bytes
        self.hash, self.n_bytes = file.new_hash(), 0
        out.seek(0)
        while block := out.read(_BLOCK_BYTES):
            self.hash.update(block)
            self.n_bytes += len(block)
        if self.n_bytes > file.n_bytes:
            self.restart()

    def restart(self) -> None:
        self._out.truncate(0)
        self.hash, self.n_bytes = self.file.new_hash(), 0

    def append(self, block: bytes) -> None:
        self._out.write(block)  # opened for appending: always at the end
        self.hash.update(block)
        self.n_bytes += len(block)
        self._on_bytes(self.n_bytes)


def _stream(listing: Listing, part: _Partial) -> str:
    """Append what one connection brings; returns why it brought no more."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there, no __all__
        build_hf_headers,
        hf_raise_for_status,
    )

    name = part.file.name
    url = hf_hub_url(listing.repo_id, name, revision=listing.commit, endpoint=endpoint())
    # identity: a compressed answer has other sizes and cannot be resumed
    headers = build_hf_headers(library_name="autoglm-gguf") | {"Accept-Encoding": "identity"}
    if part.n_bytes:
        headers["Range"] = f"bytes={part.n_bytes}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with (
            _client_errors(listing.repo_id, listing.commit),
            get_session().stream("GET", url, headers=headers, timeout=timeout) as response,
        ):
            hf_raise_for_status(response)
            start = response.headers.get("Content-Range", "").removeprefix("bytes ")
            if part.n_bytes and not start.startswith(f"{part.n_bytes}-"):
                part.restart()  # the server sends everything again
            for block in response.iter_bytes():
                part.append(block)
                if part.n_bytes > part.file.n_bytes:
                    break
    except HubError as error:
        if not error.unreachable:
            raise
        return error.message
    return "the connection ended early"


@contextmanager
def _client_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Every way the client and its transport can fail, as ours."""
    import httpx2
    from huggingface_hub import errors

    place = endpoint()
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo_id}: gated, and this user has not been granted access",
            hint=f"ask for it at {place}/{repo_id}, then: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id}: no such repo on {place}, or a private one",
            hint="check the name; for a private repo: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repo_id}: no revision {revision!r}",
            hint=f"the branches, tags and commits are at {place}/{repo_id}/tree/main",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(repo_id, error.response.status_code) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{place}: cannot be reached ({str(error) or type(error).__name__})",
            unreachable=True,
            hint="check the network; a mirror is named with HF_ENDPOINT=https://...",
        ) from error


def _refused(repo_id: str, status: int) -> HubError:
    place = endpoint()
    if status in (401, 403):
        return HubError(
            f"{repo_id}: {place} refuses access (HTTP {status})",
            hint="log in with a token that may read it: hf auth login",
        )
    if status in _BUSY:
        return HubError(
            f"{place}: does not serve now (HTTP {status})",
            unreachable=True,
            hint="try again later, or name a mirror with HF_ENDPOINT=https://...",
        )
    return HubError(f"{repo_id}: {place} answers HTTP {status}", hint="check the name")


def _no_hub(what: str) -> HubError:
    return HubError(
        f"{endpoint()}: its answer {what}",
        unreachable=True,
        hint="check HF_ENDPOINT, and whether a proxy or login page answers in the hub's place",
    )
