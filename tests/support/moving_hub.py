"""A hub of models and data sets on the loopback interface whose branches move, with all that
`huggingface_hub`, `transformers` and `datasets` need to look them up and load them. Written from
their requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePath
from typing import Literal
from urllib.parse import unquote, urlsplit

Kind = Literal["models", "datasets"]
Files = Mapping[str, bytes]


@dataclass
class Repository:
    """Commits by their names, and where branches and tags are."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        """The commit that a revision names."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class MovingHub:
    """The whole hub, and the requests to it."""

    url: str = ""
    repositories: dict[tuple[Kind, str], Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # method and path, in order
    # The HTTP status for all requests about repositories; requests for files are still answered.
    refuses_with: int | None = None

    def commit(self, kind: Kind, name: str, commit: str, files: Files) -> None:
        """Make a new commit, to which the branch `main` moves."""
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.commits[commit] = dict(files)
        repository.branches["main"] = commit

    def take_requests(self) -> list[str]:
        """Return the requests since the last call."""
        taken, self.requests[:] = list(self.requests), []
        return taken

    def environment(self, cache_dir: Path) -> dict[str, str]:
        """Environment variables by which a process loads from this hub into its own cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(cache_dir),
            "HF_HUB_CACHE": str(cache_dir / "hub"),
            "HF_DATASETS_CACHE": str(cache_dir / "datasets"),
        }


class _Handler(BaseHTTPRequestHandler):
    hub: MovingHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.refuses_with is not None and path.startswith("/api/"):
            code = {401: "RepoNotFound", 403: "GatedRepo"}.get(self.hub.refuses_with, "")
            self._send(b"{}", status=self.hub.refuses_with, error=code)
            return
        for (kind, name), repository in self.hub.repositories.items():
            api = f"/api/{kind}/{name}"
            resolve = f"/datasets/{name}/resolve/" if kind == "datasets" else f"/{name}/resolve/"
            if path == api or path.startswith(f"{api}/"):
                self._describe(name, repository, path.removeprefix(api).strip("/"), body)
                return
            if path.startswith(resolve):
                revision, _, file = path.removeprefix(resolve).partition("/")
                self._give(repository, revision, file)
                return
        self._send(b"{}", status=404, error="RepoNotFound")

    def _give(self, repository: Repository, revision: str, file: str) -> None:
        commit = repository.find(revision)
        if commit is None:
            self._send(b"", status=404, error="RevisionNotFound")
        elif file not in repository.commits[commit]:
            self._send(b"", status=404, error="EntryNotFound", commit=commit)
        else:
            self._send(repository.commits[commit][file], commit=commit)

    def _describe(self, name: str, repository: Repository, asked: str, body: bytes) -> None:
        what, _, rest = asked.partition("/")
        revision, _, below = rest.partition("/")
        commit = repository.find(revision or "main")
        if commit is None:
            self._send(b"{}", status=404, error="RevisionNotFound")
            return
        files = repository.commits[commit]
        entries: list[dict[str, object]] = [
            {"type": "file", "path": file, "size": len(content), "oid": _hash(content)}
            for file, content in files.items()
        ]
        answer: object = {
            "id": name,
            "sha": commit,
            "private": False,
            "siblings": [{"rfilename": file} for file in files],
            "tags": [],
        }
        if what == "paths-info":
            asked_for = json.loads(body)["paths"]
            answer = [entry for entry in entries if entry["path"] in asked_for]
        elif what == "tree" and "recursive=true" in self.path.lower():
            answer = entries
        elif what == "tree":
            folders = {str(PurePath(file).parent) for file in files} - {"."}
            entries += [{"type": "directory", "path": one, "size": 0, "oid": ""} for one in folders]
            answer = [
                one for one in entries if str(PurePath(str(one["path"])).parent) == (below or ".")
            ]
            if below and not answer:
                self._send(b"{}", status=404, error="EntryNotFound", commit=commit)
                return
        self._send(json.dumps(answer).encode(), kind="application/json", commit=commit)

    def _send(
        self,
        content: bytes,
        *,
        kind: str = "application/octet-stream",
        status: int = 200,
        error: str = "",
        commit: str = "",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_hash(content)}"')
        if commit:
            self.send_header("X-Repo-Commit", commit)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the output belongs to the tests."""


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder, as a commit has them."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextmanager
def moving_hub() -> Iterator[MovingHub]:
    """A running hub."""
    hub = MovingHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
