"""A ModelScope of one repository, served on this machine: as much of the protocol as is used."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, urlsplit

Files = dict[str, bytes]


@dataclass
class FakeModelScope:
    """`revisions` hold files by name, `tags` says which are tags; `requests` as they came.

    `token`: who does not show it is refused. `breaks`: how many bytes of a file each of the next
    answers sends before the connection ends. `lies`: checksums that are announced but wrong.
    `redirect`: where files lie, in place of here.
    """

    repo: str
    revisions: dict[str, Files]
    tags: tuple[str, ...] = ()
    token: str = ""
    status: int = 200
    body: bytes | None = None
    knows_ranges: bool = True
    has_checksums: bool = True
    breaks: list[int] = field(default_factory=list)
    lies: dict[str, str] = field(default_factory=dict)
    redirect: str = ""
    requests: list[str] = field(default_factory=list)
    secrets_seen: list[str | None] = field(default_factory=list)

    @contextmanager
    def serve(self) -> Iterator[str]:
        """The endpoint's address, while inside."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *args: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def downloads(self) -> list[str]:
        """Names of the files that were asked for, each with the range."""
        return [request[5:] for request in self.requests if request.startswith("file ")]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        address = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        authorization, cookie = handler.headers["Authorization"], handler.headers["Cookie"]
        self.secrets_seen.append(authorization)
        if self.token and (authorization, cookie) != (
            f"Bearer {self.token}",
            f"m_session_id={self.token}",
        ):
            self._refuse(handler, 403, "no permission")
        elif self.status != 200 or self.body is not None:
            self._send(handler, self.status, self.body or b"oh")
        else:
            self._answer_known(handler, address.path.removeprefix("/moved"), query)

    def _answer_known(
        self, handler: BaseHTTPRequestHandler, path: str, query: dict[str, str]
    ) -> None:
        base = f"/api/v1/models/{self.repo}"
        files = self.revisions.get(query.get("Revision", ""))
        if path == f"{base}/revisions":
            self._send_data(handler, {"RevisionMap": self._revision_map()})
        elif path == f"{base}/repo/files" and files is not None:
            self._send_data(handler, {"Files": self._entries(files, query)})
        elif path == f"{base}/repo" and files is not None and query["FilePath"] in files:
            self._send_file(handler, files[query["FilePath"]], query["FilePath"])
        else:
            self._refuse(handler, 404, "\u6a21\u578b\u4e0d\u5b58\u5728")

    def _send_file(self, handler: BaseHTTPRequestHandler, content: bytes, name: str) -> None:
        wanted = handler.headers["Range"]
        self.requests.append(f"file {name} {wanted or 'whole'}")
        if self.redirect and not handler.path.startswith("/moved"):
            handler.send_response(302)
            handler.send_header("Location", f"{self.redirect}/moved{handler.path}")
            handler.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if not self.knows_ranges:
            start = 0
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content)}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        stop = start + self.breaks.pop(0) if self.breaks else len(content)
        handler.wfile.write(content[start:stop])

    def _revision_map(self) -> dict[str, list[dict[str, str]]]:
        branches = [name for name in self.revisions if name not in self.tags]
        return {
            "Branches": [{"Revision": name} for name in branches],
            "Tags": [{"Revision": name} for name in self.tags],
        }

    def _entries(self, files: Files, query: dict[str, str]) -> list[dict[str, object]]:
        root = PurePosixPath(query.get("Root", "."))
        paths = {name: PurePosixPath(name) for name in files}
        here = [
            {
                "Type": "blob",
                "Path": name,
                "Size": len(files[name]),
                "Sha256": self.lies.get(name) or self._checksum(files[name]),
            }
            for name, path in paths.items()
            if path.parent == root
        ]
        folders = {path.parts[0] for path in paths.values() if len(path.parts) > 1}
        trees = [{"Type": "tree", "Path": name, "Size": 0, "Sha256": ""} for name in folders]
        return here + (trees if root == PurePosixPath() else [])

    def _checksum(self, content: bytes) -> str:
        return hashlib.sha256(content).hexdigest() if self.has_checksums else ""

    def _send_data(self, handler: BaseHTTPRequestHandler, data: object) -> None:
        self.requests.append(handler.path)
        answer = {"Code": 200, "Success": True, "Data": data}
        self._send(handler, 200, json.dumps(answer).encode())

    def _refuse(self, handler: BaseHTTPRequestHandler, status: int, message: str) -> None:
        body = {"Code": 10010205001, "Success": False, "Data": None, "Message": message}
        self._send(handler, status, json.dumps(body).encode())

    def _send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
