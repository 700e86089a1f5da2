"""A Hub of one repository, served on this machine: as much of the protocol as a download needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """`files` by name; `requests` as they came; `status` other than 200 answers all of them."""

    repo: str
    files: dict[str, bytes]
    status: int = 200
    error_code: str = ""
    lies: dict[str, str] = field(default_factory=dict)  # checksums that are announced but wrong
    requests: list[str] = field(default_factory=list)

    @contextmanager
    def serve(self) -> Iterator[str]:
        """The endpoint's address, while inside."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, has_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, has_body=False)

            def log_message(self, *args: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, handler: BaseHTTPRequestHandler, *, has_body: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(f"{handler.command} {path}")
        status, body, name = self._find(path)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("X-Repo-Commit", COMMIT)
        if self.error_code:
            handler.send_header("X-Error-Code", self.error_code)
        if name:
            handler.send_header("ETag", f'"{self._sha256(name)}"')
        else:
            handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        if has_body:
            handler.wfile.write(body)

    def _find(self, path: str) -> tuple[int, bytes, str | None]:
        if self.status != 200:
            return self.status, b"{}", None
        if path.startswith(f"/api/models/{self.repo}/tree/"):
            return 200, json.dumps([self._tree_entry(name) for name in self.files]).encode(), None
        if path.startswith(f"/api/models/{self.repo}"):
            siblings = [self._sibling(name) for name in self.files]
            info = {"id": self.repo, "sha": COMMIT, "siblings": siblings}
            return 200, json.dumps(info).encode(), None
        name = path.removeprefix(f"/{self.repo}/resolve/{COMMIT}/")
        if name in self.files:
            return 200, self.files[name], name
        return 404, b"", None

    def _sha256(self, name: str) -> str:
        return self.lies.get(name) or hashlib.sha256(self.files[name]).hexdigest()

    def _sibling(self, name: str) -> dict[str, object]:
        size = len(self.files[name])
        entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": "0" * 40}
        if name.endswith((".safetensors", ".gguf")):
            entry["lfs"] = {"sha256": self._sha256(name), "size": size, "pointerSize": 100}
        return entry

    def _tree_entry(self, name: str) -> dict[str, object]:
        size = len(self.files[name])
        entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": "0" * 40}
        if name.endswith((".safetensors", ".gguf")):
            entry["lfs"] = {"oid": self._sha256(name), "size": size, "pointerSize": 100}
        return entry
