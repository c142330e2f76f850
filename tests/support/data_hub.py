"""A hub of data sets on loopback, as far as `datasets` needs one to list and read files. Written
from its requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePath
from urllib.parse import urlsplit

COMMIT = "c" * 40


class _Handler(BaseHTTPRequestHandler):
    files: Mapping[str, Mapping[str, bytes]]

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        asked = json.loads(self.rfile.read(size) or "{}") if size else {}
        path = urlsplit(self.path).path
        for name, files in self.files.items():
            if path.startswith(f"/api/datasets/{name}"):
                self._send_json(self._describe(name, files, path, asked))
                return
            start = f"/datasets/{name}/resolve/"
            if path.startswith(start):
                _, _, file = path.removeprefix(start).partition("/")
                if file in files:
                    self._send(files[file], "application/octet-stream")
                    return
                self._send(b"", "text/plain", status=404, error="EntryNotFound")
                return
        self._send(b"{}", "application/json", status=404, error="RepoNotFound")

    def _describe(
        self, name: str, files: Mapping[str, bytes], path: str, asked: Mapping[str, list[str]]
    ) -> object:
        entries = [self._describe_file(file, content) for file, content in files.items()]
        if "/paths-info/" in path:
            return [entry for entry in entries if entry["path"] in asked.get("paths", [])]
        if "/tree/" in path:
            below = path.partition("/tree/")[2].partition("/")[2]
            folders = {str(PurePath(file).parent) for file in files} - {"."}
            entries += [{"type": "directory", "path": one, "size": 0, "oid": ""} for one in folders]
            return [
                one for one in entries if str(PurePath(str(one["path"])).parent) == (below or ".")
            ]
        siblings = [{"rfilename": file} for file in files]
        return {"id": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}

    @staticmethod
    def _describe_file(file: str, content: bytes) -> dict[str, object]:
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": file, "size": len(content), "oid": oid}

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, content: bytes, kind: str, *, status: int = 200, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is their own."""


@contextmanager
def serve_data_sets(
    files: Mapping[str, Mapping[str, bytes]], cache_dir: Path
) -> Iterator[dict[str, str]]:
    """A hub with these files of these data sets; gives the environment of a process that uses
    it.
    """
    handler = type("Handler", (_Handler,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(cache_dir),
        }
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
