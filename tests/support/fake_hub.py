"""A hub of models on the loopback interface, with all that an upload by `huggingface_hub` needs.
Written from its requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """One repository: its files, and the messages of its commits."""

    is_private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        """The newest commit."""
        return f"{len(self.messages):040x}"


@dataclass
class Hold:
    """Requests that are not answered, or whose answer is not sent, until the test releases them."""

    path: str  # a part of it
    is_after: bool  # the request is carried out first
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


@dataclass
class FakeHub:
    """The whole hub. Only `token` may do anything."""

    token: str = "hf_secret_of_the_tests"
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    holds: list[Hold] = field(default_factory=list)

    def hold(self, path: str, *, is_after: bool = False) -> Hold:
        """From now on, requests whose path holds this text wait."""
        self.holds.append(Hold(path, is_after))
        return self.holds[-1]

    def let_go(self) -> None:
        """Answer all waiting requests, and hold no others."""
        holds, self.holds = self.holds, []
        for hold in holds:
            hold.go.set()

    def wait_at(self, path: str, *, is_after: bool) -> None:
        """Wait, inside a request, until the test releases it."""
        for hold in list(self.holds):
            if hold.path in path and hold.is_after == is_after:
                hold.reached.set()
                hold.go.wait()

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Environment variables by which a process uses this hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": self.token if token is None else token,
        }

    def answer(self, path: str, body: bytes) -> Any:
        """The JSON answer of one request."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(
                name, Repository(is_private=asked.get("visibility") == "private")
            )
            return {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return {"transfer": "basic", "objects": objects}
        owner, name, action = [*path.removeprefix("/api/models/").split("/"), ""][:3]
        name = f"{owner}/{name}"
        if action == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    **self._find_oid(name, one["path"]),
                }
                for one in json.loads(body)["files"]
            ]
            return {"files": files}
        if action == "commit":
            self._commit(self.repositories[name], body)
            head = self.repositories[name].head
            return {"commitUrl": f"{self.url}/{name}/commit/{head}", "commitOid": head}
        if action == "tree":
            files = self.repositories[name].files
            return [
                {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40}
                for path in files
            ]
        return {
            "id": name,
            "private": self.repositories[name].is_private,
            "sha": self.repositories[name].head,
            "siblings": [],
        }

    def _find_oid(self, name: str, path: str) -> dict[str, str]:
        """The id of a file that exists already, as the client computes it."""
        content = self.repositories[name].files.get(path)
        if content is None:
            return {}
        if path.endswith(".safetensors"):
            return {"oid": hashlib.sha256(content).hexdigest()}
        return {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}

    def _commit(self, repository: Repository, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                repository.messages.append(value["summary"])
            elif key == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repository.files[value["path"]] = self.blobs[value["oid"]]
            elif key == "deletedFile":
                del repository.files[value["path"]]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running hub."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            shown = self.headers.get("Authorization")
            is_known = path.startswith("/lfs/") or shown == f"Bearer {hub.token}"
            hub.wait_at(path, is_after=False)
            answer = (
                hub.answer(path, body) if is_known else {"error": f"nobody has the token {shown}"}
            )
            hub.wait_at(path, is_after=True)
            content = json.dumps(answer).encode()
            self.send_response(200 if is_known else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.let_go()
        server.shutdown()
        thread.join()
        server.server_close()
