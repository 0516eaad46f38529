"""A small hub on loopback, for the real huggingface_hub client.

Serves what the client asks the real one for: the listing of a revision, and files with ETag,
X-Repo-Commit, ranges, and LFS files through a redirect to another origin. Counts every byte it
sends, and can be told to misbehave.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_IDLE_SECONDS = 30  # no handler thread outlives a forgotten connection for longer


@functools.cache
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repo with one commit; names in ``lfs`` are listed with a sha256."""

    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    gated: bool = False
    """Listed, but no file is given out."""

    def is_lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin", "tokenizer.json"))

    def etag(self, name: str) -> str:
        return (sha256 if self.is_lfs(name) else git_blob_id)(self.files[name])


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class Hub:
    """The server; use it in a ``with`` block.

    Attributes:
        repos: By repo id.
        requests: All requests in order.
        sent: Content bytes sent, by file name.
        cut_at: File name to the number of bytes after which its next answer breaks off.
        reset: Whether a cut is a reset instead of an early end.
        hold_at: File name to the number of bytes after which its answer stalls until `release`.
        claim: File name to the size that the listing claims.
        tamper: File name to the content to be sent in its place.
        ignore_ranges: Whether every answer begins at byte 0.
        status: When not 200, the answer to everything.
        page: When not empty, the answer to everything, as a proxy's login page would be.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        self.cut_at: dict[str, int] = {}
        self.reset = False
        self.hold_at: dict[str, int] = {}
        self.holding, self.release = threading.Event(), threading.Event()
        self.claim: dict[str, int] = {}
        self.tamper: dict[str, bytes] = {}
        self.ignore_ranges = False
        self.status = 200
        self.page = ""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo_id: str, directory: Path, **extra: bytes) -> Repo:
        """Publish a directory's files."""
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.repos[repo_id] = Repo(files | extra)
        return self.repos[repo_id]

    def forget_traffic(self) -> None:
        self.requests.clear()
        self.sent.clear()

    def fetched(self) -> set[str]:
        """Names of the files that were asked for."""
        paths = [urlsplit(request.path).path for request in self.requests]
        return {unquote(path.split("/")[-1]) for path in paths if "/resolve/" in path}

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub: Hub = self.server.hub  # type: ignore[attr-defined]
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, self.path, headers))
        path = unquote(urlsplit(self.path).path)
        if self.hub.page or self.hub.status != 200:
            self._send(self.hub.status, self.hub.page.encode(), {"Content-Type": "text/html"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._list(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)", path):
            self._content(match[2], self.hub.repos[match[1]].files[match[2]], {})
        else:
            self._refuse(404, "EntryNotFound")

    def _repo(self, repo_id: str, revision: str) -> tuple[Repo, str] | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            self._refuse(404, "RepoNotFound")
        elif revision not in repo.revisions:
            self._refuse(404, "RevisionNotFound")
        else:
            return repo, repo.revisions[revision]
        return None

    def _list(self, repo_id: str, revision: str) -> None:
        found = self._repo(repo_id, revision)
        if found is None:
            return
        repo, commit = found
        siblings = []
        for name, content in repo.files.items():
            size = self.hub.claim.get(name, len(content))
            entry = {"rfilename": name, "size": size, "blobId": git_blob_id(content)}
            if repo.is_lfs(name):
                entry["lfs"] = {"size": size, "sha256": sha256(content), "pointerSize": 134}
            siblings.append(entry)
        body = json.dumps({"id": repo_id, "sha": commit, "siblings": siblings, "tags": []})
        self._send(200, body.encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._repo(repo_id, revision)
        if found is None:
            return
        repo, commit = found
        if repo.gated:
            self._refuse(403, "GatedRepo")
        elif name not in repo.files:
            self._refuse(404, "EntryNotFound")
        elif repo.is_lfs(name):
            self._send(
                302,
                b"",
                {
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{repo.etag(name)}"',
                    "X-Linked-Size": str(len(repo.files[name])),
                    # another name for the same machine is another origin
                    "Location": f"http://localhost:{self.hub.port}/cdn/{repo_id}/{name}",
                },
            )
        else:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{repo.etag(name)}"'}
            self._content(name, repo.files[name], headers)

    def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        content = self.hub.tamper.get(name, content)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match is None or self.hub.ignore_ranges:
            self._send(200, content, headers, name)
            return
        start = int(match[1])
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], headers | {"Content-Range": span}, name)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(body)
        if name in self.hub.cut_at:
            end = min(end, self.hub.cut_at.pop(name))
            self.close_connection = True
        hold = self.hub.hold_at.pop(name, end)
        try:
            self._write(name, body[:hold])
            if hold < end:
                self.hub.holding.set()
                self.hub.release.wait(_IDLE_SECONDS)
                self._write(name, body[hold:end])
        except OSError:  # the client left
            self.close_connection = True
        if end < len(body) and self.hub.reset:
            self.hub.release.wait(0.3)  # let the bytes before the reset arrive
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _write(self, name: str, data: bytes) -> None:
        self.wfile.write(data)
        if name:
            self.hub.sent[name] += len(data)
