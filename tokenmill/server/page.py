"""The page at `/`, file by file, and what its files may do in a browser."""

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response

STATIC_DIR = Path(__file__).with_name("static")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Cache-Control": "no-cache"}
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def static_paths(folder: Path = STATIC_DIR) -> dict[str, Path]:
    """The page's files by their address; there are no others, so nothing can be listed."""
    files = {f"/{file.name}": file for file in sorted(folder.iterdir()) if file.is_file()}
    return {**files, "/": folder / "index.html"}


def add_page(app: FastAPI) -> None:
    """Serve the page's files, as they were when the server started."""
    for address, file in static_paths().items():
        _add_file(app, address, file)


def _add_file(app: FastAPI, address: str, file: Path) -> None:
    async def serve(request: Request) -> Response:
        return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=_HEADERS)

    app.add_route(address, serve, methods=["GET", "HEAD"], include_in_schema=False)
