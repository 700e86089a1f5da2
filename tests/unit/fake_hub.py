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
    """`files` by name; `requests` as they came; `status` other than 200 answers all of them.

    `revisions` hold other files, by commit; `names` say which branch or tag is which commit.
    `token`: to who does not show it, there is no such repository.
    """

    repo: str
    files: dict[str, bytes]
    status: int = 200
    error_code: str = ""
    lies: dict[str, str] = field(default_factory=dict)  # checksums that are announced but wrong
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    token: str = ""
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
        status, body, checksum, error_code = self._refuse(handler.headers["Authorization"], path)
        if status == 200:
            status, body, checksum = self._find(path)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("X-Repo-Commit", self._commit(path))
        if error_code:
            handler.send_header("X-Error-Code", error_code)
        if checksum:
            handler.send_header("ETag", f'"{checksum}"')
        else:
            handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        if has_body:
            handler.wfile.write(body)

    def _refuse(self, authorization: str | None, path: str) -> tuple[int, bytes, str, str]:
        """The status, the body and the code of a refusal; 200 where there is none."""
        if self.status != 200:
            return self.status, b"{}", "", self.error_code
        if self.token and authorization != f"Bearer {self.token}":
            return 401, b"{}", "", "RepoNotFound"
        if self._commit(path) not in (COMMIT, *self.revisions):
            return 404, b"{}", "", "RevisionNotFound"
        return 200, b"", "", self.error_code

    def _commit(self, path: str) -> str:
        """The commit that a path names, as its hash or by a name; else that of `main`."""
        api = f"/api/models/{self.repo}"
        for before in (f"{api}/tree/", f"{api}/revision/", f"/{self.repo}/resolve/"):
            if path.startswith(before):
                rest = path.removeprefix(before)
                known = {**self.names, "main": COMMIT, COMMIT: COMMIT}
                known |= {commit: commit for commit in self.revisions}
                fits = [name for name in known if f"{rest}/".startswith(f"{name}/")]
                return known[fits[0]] if fits else "0" * 40
        return COMMIT

    def _find(self, path: str) -> tuple[int, bytes, str]:
        """The status, the body, and the checksum where it is a file."""
        commit = self._commit(path)
        files = self.revisions.get(commit, self.files)
        if path.startswith(f"/api/models/{self.repo}/tree/"):
            entries = [self._tree_entry(name, content) for name, content in files.items()]
            return 200, json.dumps(entries).encode(), ""
        if path.startswith(f"/api/models/{self.repo}"):
            siblings = [self._sibling(name, content) for name, content in files.items()]
            info = {"id": self.repo, "sha": commit, "siblings": siblings}
            return 200, json.dumps(info).encode(), ""
        name = path.removeprefix(f"/{self.repo}/resolve/{commit}/")
        if name in files:
            return 200, files[name], self._sha256(name, files[name])
        return 404, b"", ""

    def _sha256(self, name: str, content: bytes) -> str:
        return self.lies.get(name) or hashlib.sha256(content).hexdigest()

    def _sibling(self, name: str, content: bytes) -> dict[str, object]:
        size = len(content)
        entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": "0" * 40}
        if name.endswith((".safetensors", ".gguf")):
            sha256 = self._sha256(name, content)
            entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 100}
        return entry

    def _tree_entry(self, name: str, content: bytes) -> dict[str, object]:
        size = len(content)
        entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": "0" * 40}
        if name.endswith((".safetensors", ".gguf")):
            sha256 = self._sha256(name, content)
            entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 100}
        return entry
